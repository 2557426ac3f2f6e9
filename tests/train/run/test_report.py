"""What a run tells of its updates: when a rise of the loss is one."""

import dataclasses
import io

import pytest
import train_cases as cases
from rich.console import Console

from train.results import Result, StepResult
from train.run.directory import RunDirectory
from train.run.log import Meter, read_metrics
from train.run.options import make_parser, settings
from train.run.report import Report


@pytest.fixture
def run(tiny, rng, tmp_path):
    """Return what tells updates of these losses, by job, and then returns the warnings."""

    def told(losses, *, total, before=0, failed=(), logging_steps=1):
        example = cases.example(cases.LORA, rng)
        jobs = [cases.job(tiny, cases.LORA, [example], name=name, max_steps=total) for name in losses]
        argv = ["--logging-steps", str(logging_steps), "--output-dir", str(tmp_path)]
        found = dataclasses.replace(settings(make_parser(""), argv), resume=before > 0)
        for job in jobs:
            job.step = before
        console = io.StringIO()
        directory = RunDirectory(tmp_path, list(losses), named=False)
        report = Report(found, tiny, directory, jobs, [], Console(file=console, width=200))
        for job in jobs:
            job.failed = "its loss is no number" if job.name in failed else None
            for loss in losses[job.name]:
                job.step += 1
                report.updates(StepResult([Result(job, job.step, loss, 1.0, 0.1, True)], 1, 1))
        report.warn(jobs)
        report.close(failed=False)
        return [line for line in console.getvalue().splitlines() if "warning" in line]

    return told


@pytest.mark.parametrize(
    ("losses", "numbers"),
    [
        ([3.0, 2.0, 1.0], None),
        ([3.0], None),
        ([3.0, 3.0], None),
        ([3.0, 9.0, 2.9], None),
        ([3.0, 1.0, 4.0], "was 3.0000 at first and is 4.0000 at the end; lower"),
        ([3.0, *[5.0] * 18, 2.0], "was 3.0000 at first and is 3.5000 at the end (mean of 2 updates); lower"),
        ([3.0, *[1.0] * 18, 4.0], None),
    ],
)
def test_a_loss_has_risen_when_the_last_tenth_is_above_the_first(losses, numbers, run):
    for logging_steps in (1, 100):
        told = run({"ann": losses}, total=len(losses), logging_steps=logging_steps)
        assert len(told) == (numbers is not None)
        assert not numbers or f"warning: the training loss {numbers} learning_rate" in told[0]


def test_the_jobs_that_rose_are_told_and_those_that_failed_are_told_otherwise(run):
    (told,) = run({"ann": [1.0, 2.0], "bob": [2.0, 1.0], "carl": [1.0, 5.0]}, total=2, failed=("carl",))
    assert "was 1.0000 at first and is 2.0000" in told


@pytest.mark.parametrize(("losses", "last"), [([4.0, 2.5], None), ([2.0, 3.5], "3.5000"), ([], None)])
def test_the_first_loss_of_a_resumed_run_is_that_of_its_beginning(losses, last, run):
    run({"ann": [3.0, 5.0]}, total=4)
    told = run({"ann": losses}, total=4, before=2)
    assert len(told) == (last is not None)
    assert not last or f"was 3.0000 at first and is {last}" in told[0]


def test_speeds_are_those_of_the_logged_interval_without_what_is_left_out(tiny, rng, tmp_path, monkeypatch):
    job = cases.job(tiny, cases.LORA, [cases.example(cases.LORA, rng)], max_steps=4)
    times = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr("train.run.report.Meter", lambda: Meter(lambda: next(times)))
    found = settings(make_parser(""), ["--logging-steps", "2", "--output-dir", str(tmp_path)])
    directory = RunDirectory(tmp_path, [job.name], named=False)
    report = Report(found, tiny, directory, [job], [], Console(file=io.StringIO()))
    for step, tokens in enumerate((30, 20, 40, 10), 1):
        report.updates(StepResult([Result(job, step, 1.0, 1.0, 0.1, True)], tokens, tokens))
        if step == 3:
            report.leave_out(10.0)
    report.close(failed=False)
    assert [row["tokens_per_s"] for row in read_metrics(directory.metrics)] == [10.0, 10.0]
