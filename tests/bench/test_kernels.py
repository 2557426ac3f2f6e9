import json

import jax
import numpy as np
import pytest

from bench import kernels, tables
from bench.kernel_cases import CASES, select
from bench.kernel_contenders import PEERS
from bench.kernel_timing import Ceilings, TimedProgram

SMALL = ["--selection", "small", "--repeats", "1"]
FEW = ["--cases", "lowrank_edit", "--implementations", "xla,triton,ragged_dot"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    where = tmp_path_factory.mktemp("bench") / "new"
    return where / "figures.json", where / "roofline.png"


@pytest.fixture(scope="module")
def figures(paths):
    out, picture = paths
    assert kernels.main([*SMALL, *FEW, "--output-json", str(out), "--plot", str(picture)]) == 0
    return json.loads(out.read_text())


def test_figures_say_what_they_are(figures):
    assert figures["schema"] == "preft-jax/kernels/1"
    assert {"versions", "device", "commit", "date", "options"} <= set(figures)
    assert figures["ceilings"]["copy_gb_per_s"] > 0
    assert figures["ceilings"]["matmul_tflop_per_s"]["float32"] > 0


def test_a_row_has_shapes_result_floor_and_ratio(figures):
    (row,) = figures["cases"]
    (case,) = select("small", "lowrank_edit")
    assert (row["case"], row["flops"], row["bytes"]) == (case.name, case.flops(), case.bytes())
    assert row["shape"]["lengths"] == [64] * 4
    assert row["bound"] in ("compute", "memory")
    for name in ("xla", "ragged_dot"):
        result = row["results"][name]
        assert result["us_min"] <= result["us"] <= result["us_max"]
        assert result["ratio_to_floor"] == pytest.approx(result["us"] / row["floor_us"], rel=0.01)
        assert result["tflop_per_s"] == pytest.approx(row["flops"] / result["us"] / 1e6, rel=0.01)
        assert result["difference"] < 1e-5


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="triton runs here")
def test_who_cannot_run_says_why(figures):
    assert "GPU" in figures["cases"][0]["results"]["triton"]["reason"]
    assert "us" not in figures["cases"][0]["results"]["triton"]


def test_the_picture_is_written(figures, paths):
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_earlier_run_can_be_kept(figures, paths, capsys):
    out = paths[0].with_name("kept.json")
    out.write_text(json.dumps({**figures, "cases": [{**figures["cases"][0], "case": "another", "kept": True}]}))
    assert kernels.main([*SMALL, *FEW, "--output-json", str(out), "--keep"]) == 0
    assert [row.get("kept", False) for row in json.loads(out.read_text())["cases"]] == [True, False]
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["schema"] == figures["schema"]
    out.write_text(json.dumps({**figures, "versions": {}}))
    with pytest.raises(SystemExit, match="other versions"):
        kernels.main([*SMALL, *FEW, "--output-json", str(out), "--keep"])


def test_a_wrong_result_is_no_result(monkeypatch, capsys):
    """A kernel that computes something else may be as fast as it likes."""
    case = select("small", "lowrank_edit")[0]
    right = type(case).run

    def run(self, inputs, implementation=None):
        out = right(self, inputs, "xla")
        return out if implementation == "xla" else out * 1.5

    monkeypatch.setattr(type(case), "run", run)
    assert kernels.main([*SMALL, "--cases", "lowrank_edit", "--implementations", "xla,pallas_tpu"]) == 1
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["cases"][0]["results"]["pallas_tpu"]
    assert result["reason"].startswith("wrong")
    assert "us" not in result


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_we_do(name):
    """Checked again in every run of the benchmark; here for those that run on this machine."""
    ops, make = PEERS[name]
    for case in select("small"):
        if case.op not in ops:
            continue
        inputs = case.inputs(np.random.default_rng(3))
        contender = make(case)
        try:
            theirs = contender.run(contender.prepare(case, inputs))
        except NotImplementedError as error:
            pytest.skip(str(error))
        for one, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(case.run(inputs, "xla")), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_nothing_is_optimised_away():
    """Every run in a timed program is computed: none is shared, hoisted or dropped."""
    (case,) = select("small", "decode_edit")
    sets = [case.inputs(np.random.default_rng(i)) for i in range(4)]

    def flops(sets):
        program = TimedProgram(lambda inputs: case.run(inputs, "xla"), sets, 1)
        program.compile()
        return program._program.cost_analysis()["flops"]

    assert flops(sets) == pytest.approx(4 * flops(sets[:1]), rel=0.05)


def test_the_floor_is_the_larger_of_two():
    ceilings = Ceilings(1e12, {"bfloat16": 1e14})
    assert ceilings.floor(10**12, 10**9, "bfloat16") == (pytest.approx(1e-2), "compute")
    assert ceilings.floor(10**10, 10**9, "bfloat16") == (pytest.approx(1e-3), "memory")


def test_work_counted_by_hand():
    """256 tokens of 4 adapters of rank 16 at 576 -> 576, all edited, float32."""
    case = select("small", "lowrank_edit")[0]
    assert case.flops() == 256 * 2 * 16 * (576 + 576)
    pages = 4 * (576 * 16 + 16 + 16 * 576) * 4
    assert case.bytes() == pages + 3 * 256 * 576 * 4
    decode = select("small", "attention/decode")[0]
    assert decode.flops() == 16 * 128 * 4 * 9 * 64
    assert decode.bytes() == 16 * 128 * 6 * 64 * 4 + 2 * 16 * 9 * 64 * 4
    prefill = select("small", "attention/prefill")[0]
    assert prefill.flops() == 4 * (64 * 65 // 2) * 4 * 9 * 64


def test_patterns_have_commas_between_them():
    both = select("small", "decode_edit,attention/*/small")
    assert [case.op for case in both] == ["decode_edit", "paged_attention", "paged_attention"]


def test_cases_have_names_of_their_own_and_known_tags():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {tag for case in CASES for tag in case.tags} == {"test", "odd", "bench", "small"}
    assert {case.op for case in select("bench")} == {case.op for case in select("test")}


@pytest.mark.parametrize("arguments", [["--cases", "no/such*"], ["--implementations", "cuda"], ["--repeats", "0"]])
def test_usage_errors_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        kernels.main([*SMALL, *arguments])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_a_table_is_made_of_what_there_is(figures):
    """Of a GPU's file, here a made-up one: a case without our kernel, one without peers."""
    time = {"us": 60.0, "ratio_to_floor": 1.2}
    cases = [
        {"case": "a", "floor_us": 50.0, "bound": "memory",
         "results": {"triton": time, "xla": {"us": 100.0}, "ragged_dot": {"us": 400.0}}},
        {"case": "b", "floor_us": 9.0, "bound": "compute",
         "results": {"triton": {"reason": "no"}, "cudnn_paged": {"us": 11.0}, "cudnn_contiguous": {"us": 10.0}}},
    ]  # fmt: skip
    made = tables.kernels({**figures, "cases": cases})
    assert "| a | 50 (memory) | **60** | 1.20 | 100 | 400 (ragged_dot) |" in made
    assert "| b | 9 (compute) |  |  |  | 10 (cudnn_contiguous) |" in made
    assert tables.kernels(figures).count("lowrank_edit") == 1
