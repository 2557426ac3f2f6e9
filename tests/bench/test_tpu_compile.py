"""``bench.tpu_compile`` with libtpu, for described TPUs; skipped where libtpu is not installed."""

import importlib.util
import json

import jax
import pytest

from bench import tpu_compile
from bench.tpu_cases import expand_case, program_cases
from kernels.pallas_tpu import lowrank

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


@pytest.fixture(autouse=True)
def _libtpu(compiled_here, monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


def run(capfd, *args):
    """Run the program; return its exit status and the rows of its JSON line."""
    status = tpu_compile.main(list(args))
    return status, json.loads(capfd.readouterr().out.strip().split("\n")[-1])


def test_a_whole_program_copies_no_kv_pool(capfd):
    """Narrow heads: stored as they are computed, XLA would lay pages innermost and copy every layer's pool twice."""
    status, figures = run(capfd, "--selection", "small", "--target", "v5e:1x1", "--case", "smollm2.* decode B")
    (row,) = figures["rows"]
    assert status == 0
    assert row["pallas_calls"] == 30
    assert row["pool_copies"] == {}
    assert row["alias_bytes"] > 300 * 2**20


@pytest.mark.parametrize("target", ["v5e:1x1", "v6e:2x2"])
def test_every_kernel_compiles_without_copying_a_pool(target, capfd):
    status, figures = run(capfd, "--selection", "small", "--target", target, "--case", "shrink|expand|edit|attention")
    assert status == 0
    assert len(figures["rows"]) == 5
    for row in figures["rows"]:
        assert row["pallas_calls"] == 1, row
        assert row["pool_copies"] == {}, row
        assert 0 < row["kernel_vmem_bytes"] < 16 * 2**20


def test_the_result_of_an_expand_takes_the_memory_of_y(capfd):
    _, figures = run(capfd, "--selection", "small", "--target", "v5e:1x1", "--case", "expand")
    (row,) = figures["rows"]
    assert row["alias_bytes"] == row["output_bytes"] > 0
    assert row["temp_bytes"] < row["output_bytes"]


def one_row(case, monkeypatch, capfd):
    """Compile one case; return its row, which must have failed and with it the program."""
    monkeypatch.setitem(tpu_compile.SELECTIONS, "small", lambda chips: [case(chips)])
    status, figures = run(capfd, "--selection", "small", "--target", "v5e:1x1")
    assert status == 1
    (row,) = figures["rows"]
    assert row["status"] == "failed"
    return row


def test_overflow_of_hbm_fails_the_row_and_the_program(monkeypatch, capfd):
    row = one_row(lambda chips: expand_case("llama3-70b", "gate", 2**19, chips, entries=2), monkeypatch, capfd)
    assert "RESOURCE_EXHAUSTED" in row["reason"]
    assert "hbm" in row["reason"].lower()


def test_overflow_of_vmem_fails_the_row_and_the_program(monkeypatch, capfd):
    monkeypatch.setattr(lowrank, "VMEM_BUDGET_BYTES", 2**40)
    row = one_row(lambda chips: expand_case("llama3-70b", "gate", 512, chips, tile=256), monkeypatch, capfd)
    assert "RESOURCE_EXHAUSTED" in row["reason"]
    assert "vmem" in row["reason"].lower()


def test_a_kernel_that_is_not_taken_fails_the_row_and_the_program(monkeypatch, capfd):
    monkeypatch.setattr(lowrank, "SMEM_BUDGET_BYTES", 4)
    row = one_row(lambda chips: expand_case("smollm2-135m", "gate", 512, chips), monkeypatch, capfd)
    assert "no TPU kernel took these shapes" in row["reason"]


def test_weights_that_a_chip_cannot_hold_are_skipped_with_the_sizes(capfd, monkeypatch):
    monkeypatch.setitem(tpu_compile.SELECTIONS, "small", lambda chips: program_cases(chips)[2:4])
    status, figures = run(capfd, "--selection", "small", "--target", "v5e:1x1")
    assert status == 0
    assert {row["status"] for row in figures["rows"]} == {"skipped"}
    assert all("15.0 GiB of a chip's 16 GiB" in row["reason"] for row in figures["rows"])


def test_copies_of_pools_are_counted_by_shape():
    hlo = """
      %copy.1 = bf16[9,16,6,64]{3,1,2,0:T(8,128)(2,1)} copy(%a)
      ROOT %copy.2 = bf16[9,16,6,64]{3,2,1,0} copy(%b)
      %copy-start.3 = (bf16[9,16,6,64]{3,2,1,0}, bf16[9,16,6,64]{3,2,1,0}, u32[]) copy-start(%c)
      %copy.4 = f32[9,16]{1,0} copy(%d)
      %fusion = bf16[9,16,6,64]{3,2,1,0} fusion(%copy.1)
    """
    assert tpu_compile.pool_copies(hlo, {"bf16[9,16,6,64]"}) == {"bf16[9,16,6,64]": 2}
