"""``bench.tune``: what it asks of the kernels, and what it says."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import tune
from bench.kernel_cases import select
from bench.kernel_timing import Ceilings

attention = pytest.importorskip("kernels.triton.attention")

CASE = "attention/prefill/1x8192"


@pytest.fixture
def asked(monkeypatch):
    """Return how attention was cut up in what was traced since."""
    found = []

    def call(kernel, *args, out, **static):
        found.append({"queries": static["BQ"], "keys": static["BN"], "warps": static["warps"]})
        return [jnp.zeros(one.shape, one.dtype) for one in out]

    monkeypatch.setattr(attention, "call", call)
    return found


@pytest.fixture
def gpu(monkeypatch):
    """Let programs believe that there is a GPU, on which few keys a step are quick and four warps wrong."""
    monkeypatch.setattr(tune, "on_gpu", lambda: True)
    monkeypatch.setattr(tune, "measure_ceilings", lambda dtypes, repeats: Ceilings(1e9, dict.fromkeys(dtypes, 1e9)))

    def run_case(case, ceilings, contending, repeats, reference):
        assert reference == "chosen"
        results = {}
        for at, name in enumerate(contending):
            results[name] = {"us": 10.0 - at, "ratio_to_floor": 1.5, "difference": 0.0}
            if "warps=4" in name:
                results[name] = {"reason": "no room"}
        return {"case": case.name, "results": results}

    monkeypatch.setattr(tune, "run_case", run_case)


def test_each_combination_is_traced_and_the_rest_is_the_rules(asked):
    (case,) = select("small", "attention/prefill")
    inputs = case.inputs(np.random.default_rng(0))
    found = tune.contenders(case, {"keys": [64, 128], "warps": [8]})
    assert list(found) == ["chosen", "keys=64 warps=8", "keys=128 warps=8"]
    for contender in (*found.values(), found["chosen"]):
        contender.run(contender.prepare(case, inputs))
    chosen, one, other, again = asked
    assert chosen == again
    assert (one, other) == ({**chosen, "keys": 64, "warps": 8}, {**chosen, "keys": 128, "warps": 8})


def test_every_operation_has_the_rule_that_is_named_and_a_case():
    for op, (module, rule) in tune.RULES.items():
        assert callable(getattr(importlib.import_module(f"kernels.triton.{module}"), rule))
        assert any(case.op == op for case in select("bench")), op


def test_the_quickest_comes_first_and_figures_are_kept(gpu, capsys, tmp_path):
    path = tmp_path / "tune.json"
    assert tune.main(["--cases", CASE, "--most", "2", "--output-json", str(path), "keys=32,64,128", "warps=8"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert json.loads(printed.splitlines()[-1]) == figures
    order = [printed.index(name) for name in ("keys=128 warps=8", "keys=64 warps=8", "chosen")]
    assert order == sorted(order)
    assert "keys=32" not in printed.split("{")[0]
    (row,) = figures["cases"]
    assert row["case"].startswith(CASE)
    assert figures["options"]["grid"] == {"keys": [32, 64, 128], "warps": [8]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cases", CASE, "warps"], "'warps' is no field with its values; give one like warps=4,8"),
        (["--cases", CASE, "warps=4,x"], "'warps=4,x' is no field"),
        (["--cases", "draw", "warps=4"], "--cases 'draw' names no case of paged_attention, decode_edit"),
        (["--cases", CASE, "warps=4"], "nothing of the grid runs: no room"),
    ],
)
def test_what_cannot_be_tried_is_said(arguments, told, gpu, capsys):
    assert tune.main(arguments) == 1
    assert told in capsys.readouterr().err


def test_a_field_that_is_none_is_named_and_a_cpu_refused(asked, capsys):
    (case,) = select("small", "attention/prefill")
    contender = tune.contenders(case, {"rows": [64]})["rows=64"]
    with pytest.raises(ValueError, match="paged_attention has no rows; its fields are queries, keys, splits, warps"):
        contender.run(case.inputs(np.random.default_rng(0)))
    if jax.default_backend() != "gpu":
        assert tune.main(["--cases", CASE, "warps=4"]) == 1
        assert "it needs an NVIDIA GPU" in capsys.readouterr().err
