"""The study trains, evaluates, keeps what it has, and goes on where it was."""

import json

import pytest

from bench import sft_study, tables_study

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.usefixtures("one_layer_tiny")

TASKS = ("letter_counting", "spell_backward")


def arguments(path, *more):
    return [
        "--model", "tiny", "--tasks", ",".join(TASKS), "--kinds", "prefix", "--ranks", "2", "--seeds", "2",
        "--num-examples", "4", "--num-eval", "2", "--num-answers", "1", "--max-steps", "2", "--batch-size", "2",
        "--max-length", "320", "--max-new-tokens", "2", "--sweep-rates", "1e-3,1e-1", "--sweep-ranks", "2",
        "--max-num-seqs", "1", "--output-json", str(path), *more,
    ]  # fmt: skip


def test_a_study_that_was_cut_off_goes_on_and_has_every_cell_once(tmp_path, monkeypatch, capsys):
    path, train = tmp_path / "study.json", sft_study.Study._train

    def cut(self, kind, cells):
        if not cells[0].is_swept:
            raise KeyboardInterrupt
        train(self, kind, cells)

    with monkeypatch.context() as patch:
        patch.setattr(sft_study.Study, "_train", cut)
        with pytest.raises(KeyboardInterrupt):
            sft_study.main(arguments(path))
    half = json.loads(path.read_text())["rows"]
    assert sft_study.main(arguments(path, "--output-png", str(tmp_path / "study.png"))) == 0
    figures = json.loads(path.read_text())
    assert figures["rows"][: len(half)] == half
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
    cells = [sft_study.Cell(**row["cell"]) for row in figures["rows"]]
    assert len(set(cells)) == len(cells) == len(TASKS) * (1 + 2 + 2)
    swept = {cell.learning_rate for cell in cells if cell.is_swept}
    (chosen,) = {cell.learning_rate for cell in cells if cell.kind == "prefix" and not cell.is_swept}
    assert chosen in swept == {1e-3, 1e-1}
    by_kind = tables_study.cells_of(figures)
    base = {task: by_kind["base", 0][task][0]["loss"] for task in TASKS}
    for (kind, rank), by_task in by_kind.items():
        for task, rows in by_task.items():
            assert [row["cell"]["seed"] for row in rows] == ([0, 1] if rank else [0])
            assert all(0 <= row["accuracy"] <= 1 for row in rows)
            assert (rows[0]["loss"] != base[task]) == (kind != "base")
    table = tables_study.sft_study(figures)
    assert "| prefix r2 |" in table
    assert " ± " in table
    capsys.readouterr()
    assert sft_study.main(arguments(path, "--max-steps", "3")) == 1
    assert "was made with max_steps 2, and 3 is asked for" in capsys.readouterr().err


def test_a_marker_is_the_header_of_the_answer_and_every_kind_has_a_configuration(tiny_text):
    found = {kind: sft_study.adapter_config(kind, 4, tiny_text) for kind in sft_study.KINDS}
    marker = found["marker"].alora_invocation_tokens
    assert tiny_text.tokenizer.decode(marker).endswith("assistant\n")
    assert [kind for kind, config in found.items() if not config.prefill_only] == ["lora"]
    assert found["prefix"].prefix_length == 4


def test_what_cannot_work_is_told(capsys):
    assert sft_study.main(["--kinds", "lora-q"]) == 1
    assert "there is no kind 'lora-q'" in capsys.readouterr().err
    assert sft_study.main(["--seeds", "0"]) == 1
    assert "--seeds is 0; give at least 1" in capsys.readouterr().err
