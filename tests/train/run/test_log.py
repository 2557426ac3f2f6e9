"""What a run tells: rates, rows, status lines and the picture."""

import io
import json
import math
import sys

import numpy as np
import pytest
from rich.console import Console

from train.run.log import Meter, Metrics, Status, peak_flops, read_metrics
from train.run.picture import _smooth, draw_losses

pytestmark = pytest.mark.host


def clock(*times):
    return iter(times).__next__


def test_the_meter_counts_from_one_reading_to_the_next():
    meter = Meter(clock(10.0, 12.0, 12.5, 16.5))
    meter.add(30)
    meter.add(10)
    assert meter.read() == 20.0
    meter.add(7)
    assert meter.read() == 14.0
    assert meter.read() == 0.0


def test_time_that_is_left_out_does_not_count():
    meter = Meter(clock(10.0, 16.0))
    meter.add(40)
    meter.leave_out(4.0)
    assert meter.read() == 20.0


def test_a_clock_that_stands_still_gives_a_finite_rate():
    meter = Meter(clock(1.0, 1.0))
    meter.add(5)
    assert math.isfinite(meter.read())


def write(path, rows, **fields):
    metrics = Metrics(path, **fields)
    for row in rows:
        metrics.write(row)
    metrics.close()


def strict(constant):
    raise ValueError(constant)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    rows = [{"step": 1, "job": "a", "loss": math.nan, "grad_norm": math.inf, "rate": -math.inf, "learning_rate": 0.5}]
    write(tmp_path / "metrics.jsonl", rows)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=strict) == {
        "step": 1, "job": "a", "loss": None, "grad_norm": None, "rate": None, "learning_rate": 0.5
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "job": "a", "lo', b"\xff\xfe{}", b"[3]", b"3", b'{"step": "x"}', b"[" * 10**5, b"\0" * 64]
)
def test_a_damaged_line_costs_no_other(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1, "job": "a"}, {"step": 3, "job": "a"}])
    first, last = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + damage + b"\n" + last + b"\n")
    Metrics(path, keep_until={"a": 3}).close()
    assert read_metrics(path) == [{"step": 1, "job": "a"}, {"step": 3, "job": "a"}]


def test_rows_can_be_read_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path / "new" / "metrics.jsonl")
    metrics.write({"step": 1, "failed": "line\u2028break"})
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == [{"step": 1, "failed": "line\u2028break"}]
    metrics.close()


@pytest.mark.parametrize(
    ("keep_until", "kept"),
    [
        (None, []),
        ({}, ["a1", "b1", "b1", "a2", "b2", "a3"]),
        ({"a": 9, "b": 9}, ["a1", "b1", "b1", "a2", "b2", "a3"]),
        ({"a": 2, "b": 2}, ["a1", "b1", "b1", "a2", "b2"]),
        ({"a": 3, "b": 1}, ["a1", "b1", "b1", "a2", "a3"]),
        ({"a": 0, "b": 0}, []),
    ],
)
def test_a_resumed_run_drops_what_came_after_its_checkpoint(keep_until, kept, tmp_path):
    path = tmp_path / "metrics.jsonl"
    places = [("a", 1), ("b", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]
    rows = [{"step": step, "job": job, "loss": 0.1 * i} for i, (job, step) in enumerate(places)]
    write(path, rows)
    write(path, [{"step": 4, "job": "a"}], keep_until=keep_until)
    found = read_metrics(path)
    assert [f"{row['job']}{row['step']}" for row in found] == [*kept, "a4"]
    assert all(row in rows for row in found[:-1])
    assert [name.name for name in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_was_cut_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    write(path, [{"step": 1, "job": "a", "loss": 0.25}, {"step": 2, "job": "a", "loss": 0.5}])
    whole = path.read_text()
    for cut in range(len(whole) // 2 + 1, len(whole) - 1):
        path.write_text(whole[:cut])
        assert [row["step"] for row in read_metrics(path)] == [1]
    write(path, [{"step": 2, "job": "a", "loss": 0.75}], keep_until={"a": 5})
    assert [row["loss"] for row in read_metrics(path)] == [0.25, 0.75]


def rows_of(job, count, rng):
    losses = rng.uniform(0.1, 3.0, count)
    train = [{"step": i + 1, "job": job, "loss": float(loss)} for i, loss in enumerate(losses)]
    return [*train, {"step": count, "job": job, "eval_loss": float(losses[-1]), "exact_match": 0.5}]


@pytest.mark.parametrize("jobs", [["a"], ["a", "b", "c"]])
def test_the_picture_is_a_png_of_every_job(jobs, tmp_path, rng, monkeypatch):
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    rows = [row for name in jobs for row in rows_of(name, 12, rng)]
    rows += [{"step": 13, "job": "a", "loss": None}, {"step": 13, "job": "a", "failed": "not finite"}]
    assert draw_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = kept[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        f"{name}: {what}" if len(jobs) > 1 else what for name in jobs for what in ("training", "held out")
    ]
    for line, name in zip(axes.lines[::3], jobs, strict=True):
        own = [row["loss"] for row in rows if row["job"] == name and row.get("loss") is not None]
        np.testing.assert_array_equal(line.get_ydata(), own)
    monkeypatch.undo()
    pyplot.close(kept[0])


def test_without_matplotlib_there_is_no_picture(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw_losses(rows_of("a", 3, rng), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_smooth_line_is_a_mean_that_begins_with_the_first_point(rng):
    points = [(i, float(value)) for i, value in enumerate(rng.uniform(0, 1, 50))]
    smooth = _smooth(points)
    assert [step for step, _ in smooth] == list(range(50))
    assert smooth[0] == pytest.approx(points[0])
    values = np.array([value for _, value in points])
    weights = (1 - 1 / (1 + 50 / 20)) ** np.arange(50)[::-1]
    assert smooth[-1][1] == pytest.approx(float((values * weights).sum() / weights.sum()))
    assert [value for _, value in _smooth([(i, 0.3) for i in range(9)])] == pytest.approx([0.3] * 9)


def test_status_lines_are_told_as_they_are():
    told = io.StringIO()
    status = Status(Console(file=told, width=20), total=3)
    status.line("step 1/3  loss [bold]0.5000[/bold] and so on")
    status.advance(1)
    status.close()
    assert told.getvalue() == "step 1/3  loss [bold]0.5000[/bold] and so on\n"


def test_a_terminal_has_a_bar_that_counts_from_where_the_run_goes_on():
    told = io.StringIO()
    status = Status(Console(file=told, force_terminal=True, width=80), total=9, done=4)
    status.advance(2)
    status.close()
    assert "6/9" in told.getvalue()


@pytest.mark.parametrize(
    ("kind", "flops"), [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)]
)
def test_peak_flops_are_known_by_the_devices_kind(kind, flops):
    assert peak_flops(kind) == flops
