"""When the state of a job is written: by updates and by time, with a clock of the test's own."""

import pytest
import service_cases as cases
from counting_training import counting_service

from preft_jax.errors import ConfigError
from train.service.options import ServiceOptions

pytestmark = pytest.mark.host


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def kept_steps(model, tmp_path, patch, seconds, **options):
    """Return the updates after which a job's state was written, and each update's time; ``seconds``: of each update."""
    clock, times = Clock(), {0: 1000.0}
    service, training, _, kept = counting_service(patch, model, tmp_path / "jobs", clock, **options)
    rows = cases.write_rows(tmp_path / "rows.jsonl")
    job = service.create(cases.spec(rows, {"max_steps": len(seconds)}), owner=None)
    cases.until(lambda: not training.inbox.empty())
    for n, took in enumerate(seconds, 1):
        training.join_waiting()
        clock.now += took
        times[n] = clock.now
        training.update()
        cases.until(lambda: not service._open or not service._open[job.id].writing)
    cases.until(lambda: service.get(job.id).status == "succeeded")
    service.close()
    return [step for _, step in kept], times


def test_no_more_than_a_minute_of_work_is_lost(tiny_text, tmp_path, monkeypatch, rng):
    each = float(rng.uniform(2, 25))
    kept, times = kept_steps(tiny_text, tmp_path, monkeypatch, [each] * 60, checkpoint_steps=1000)
    assert kept[-1] == 60
    gaps = [times[after] - times[before] for before, after in zip([0, *kept], kept, strict=False)]
    assert max(gaps) <= 60
    assert min(gaps[:-1]) + each > 60, "it is not written more often than it must be"


def test_a_long_update_costs_itself_and_many_short_ones_are_counted(tiny_text, tmp_path, monkeypatch):
    kept, _ = kept_steps(tiny_text, tmp_path, monkeypatch, [0.1] * 7 + [100.0] + [0.1] * 2, checkpoint_steps=3)
    assert kept == [3, 6, 8, 9, 10]


def test_seconds_between_states_are_checked():
    with pytest.raises(ConfigError, match="checkpoint_seconds is 0; give at least 1"):
        ServiceOptions(checkpoint_seconds=0)
