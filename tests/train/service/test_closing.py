"""A service that is closed while a program compiles, which nothing can end: it does not wait, and jobs go on later."""

import threading

import pytest
import service_cases as cases

from preft_jax.device.ahead import Rehearsal

HELD = 60.0
"""Seconds after which a service that waits for a compilation has failed."""


class Compiler:
    """Holds what compiles programs from ``hold`` on, until ``go_on``."""

    def __init__(self, patch):
        self._patch, self._free = patch, threading.Event()
        self._compile = Rehearsal.compile

    def hold(self):
        self._patch.setattr(Rehearsal, "compile", lambda rehearsal: self._later(rehearsal))

    def go_on(self):
        self._free.set()

    def _later(self, rehearsal):
        assert self._free.wait(cases.PATIENCE)
        self._compile(rehearsal)


@pytest.fixture
def compiler(monkeypatch):
    made = Compiler(monkeypatch)
    yield made
    made.go_on()


def names(directory):
    return {path.name for path in directory.rglob("*")}


def test_what_runs_is_kept_and_what_waits_is_begun_again(lively, tmp_path, compiler):
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    service = cases.make_service(lively, tmp_path / "jobs")
    pump = cases.Pump(service, lively)
    runs = service.create(cases.spec(rows, cases.LORA | {"max_steps": 6}), owner="ann")
    pump.learn(runs, 2)
    compiler.hold()
    handed_over = threading.Event()
    service.wake = handed_over.set
    waits = service.create(cases.spec(rows, cases.REFT | {"max_steps": 2}), owner="bob")
    assert handed_over.wait(cases.PATIENCE)
    pump.until(lambda: service.is_compiling)
    closing = threading.Thread(target=service.close)
    closing.start()
    closing.join(HELD)
    assert not closing.is_alive()
    assert service.is_compiling, "it goes on, and the process ends without it"
    assert service.training.next() is None
    learned = service.get(runs.id).step
    assert 2 <= learned < 6
    assert not [name for name in names(tmp_path / "jobs") if "tmp" in name or name.startswith(".")]

    again = cases.make_service(lively, tmp_path / "jobs")
    try:
        assert {again.get(job.id).status for job in (runs, waits)} == {"queued"}
        compiler.go_on()
        ended = cases.Pump(again, lively).to_end(runs, waits)
        assert [(record.status, record.step) for record in ended] == [("succeeded", 6), ("succeeded", 2)]
        messages = [event.message for event in again.events(runs.id)]
        assert f"Fine-tuning job started, going on after step {learned}" in messages
    finally:
        again.close()
    cases.until(lambda: not (service.is_compiling or again.is_compiling))
