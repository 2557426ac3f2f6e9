import json

import jax
import pytest

from bench import decode, tables
from bench.kernel_profile import KernelTime, breakdown, kind_of
from bench.kernel_timing import Ceilings
from preft_jax.config import PRESETS

pytestmark = pytest.mark.usefixtures("one_layer_tiny")


def test_a_step_is_timed_beside_its_floor(capsys, tmp_path):
    path = tmp_path / "figures.json"
    command = ["--model", "tiny", "--sizes", "2x20,4x9", "--steps", "3", "--repeats", "2"]
    assert decode.main([*command, "--output-json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert [(row["rows"], row["context"]) for row in figures["rows"]] == [(2, 20), (4, 9)]
    for row in figures["rows"]:
        assert row["step_ms"] > row["floor_ms"] > 0
    assert tables.decode(figures).count("\n| ") == 3


def test_a_step_draws_as_many_tokens_as_it_has_rows():
    model = decode.serving_model(decode.load_model("tiny"), 4)
    drawn = jax.device_get(decode.Decoding(model, 4, 10, 3)())
    assert [step.shape for step in drawn] == [(1, 4)] * 3
    assert all(0 <= token < model.config.vocab_size for step in drawn for token in step.ravel())


def test_the_floor_grows_with_what_is_read():
    """With endless FLOP/s it is the bytes: the weights once, each row's keys and values."""
    model, dtype = PRESETS["llama3-8b"], jax.numpy.dtype("bfloat16")
    ceilings = Ceilings(1e12, {"bfloat16": 1e30})
    one = decode.floor_seconds(model, ceilings, dtype, 1, 1)
    assert one == pytest.approx(15.0e-3, rel=0.02), "7.5 billion weights of two bytes at 1 TB/s"
    long = decode.floor_seconds(model, ceilings, dtype, 1, 1001)
    assert long - one == pytest.approx(1000 * 131072 / 1e12, rel=1e-3)
    assert decode.floor_seconds(model, ceilings.together(4), dtype, 1, 1001) == pytest.approx(long / 4, rel=1e-3)


def test_the_floor_counts_a_byte_for_each_number_in_fp8():
    """Half of what layers' weights and of what keys and values are in bfloat16; the output head stays."""
    model, fp8 = PRESETS["llama3-8b"], jax.numpy.dtype("float8_e4m3fn")
    ceilings, dtype = Ceilings(1e12, {"bfloat16": 1e30, "float8_e4m3fn": 1e30}), jax.numpy.dtype("bfloat16")
    plain = decode.floor_seconds(model, ceilings, dtype, 1, 1000)
    keys = decode.floor_seconds(model, ceilings, dtype, 1, 1000, keys=fp8)
    linears = decode.floor_seconds(model, ceilings, dtype, 1, 1000, linears=fp8)
    assert plain - keys == pytest.approx(1000 * 131072 / 2 / 1e12, rel=1e-3)
    assert plain - linears == pytest.approx(6.98e-3, rel=0.01), "a byte of each of 6.98 billion weights"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sizes", "5"], "--sizes has '5'"),
        (["--sizes", "0x5"], "--sizes has '0x5'"),
        (["--steps", "0"], "--steps is 0"),
        (["--profile", "3"], "--profile is 3 and needs a GPU; the default backend is 'tpu'"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, told, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert decode.main(["--model", "tiny", *options]) == 1
    assert told in capsys.readouterr().err


def test_kernels_by_kind():
    times = [KernelTime("nvjet_sm90", 4, 0.4), KernelTime("attend_kernel", 2, 0.2), KernelTime("loop_fusion", 2, 0.1)]
    assert [kind_of(one.name) for one in times] == ["matrix products", "attention", "the rest"]
    found = breakdown(times, 0.8, 2)
    assert found["kinds_ms"] == {"matrix products": 200.0, "attention": 100.0, "the rest": 50.0}
    assert (found["idle_ms"], found["kernels"]) == (50.0, 4)


def test_a_profiled_step_has_its_kinds_in_the_table():
    row = {"rows": 2, "context": 20, "step_ms": 1.0, "floor_ms": 0.5, "ratio": 2.0}
    profiled = {**row, "kinds_ms": {"attention": 0.25}, "idle_ms": 0.125, "kernels": 7}
    figures = {
        "options": {"model": "tiny"}, "rows": [row, profiled], "date": "2026-11-27", "commit": None,
        "ceilings": {"copy_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0}, "device": {"kind": "x"},
        "versions": {"jax": "1"},
    }  # fmt: skip
    lines = tables.decode(figures).splitlines()
    assert lines[2].endswith("| **2.00** |  |  |  |  |  |  |  |")
    assert lines[3].endswith("| 0.00 | 0.25 | 0.00 | 0.00 | 0.00 | 0.12 | 7 |")
