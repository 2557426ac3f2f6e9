import json

import pytest

from bench import overload

TINY = (
    "--model tiny --max-num-seqs 2 --max-waiting 4 --concurrency 4 --num-prompts 3 --input-len 12 --output-len 200 "
    "--capacity-seconds 1 --seconds 1 --recovery-timeout 60"
)


def test_a_tiny_server_is_overloaded_and_comes_back(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert overload.main([*TINY.split(), "--output-json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert (found["schema"], found["model"], found["options"]["factor"]) == (overload.SCHEMA, "tiny", 10.0)
    assert {"versions", "device", "commit", "date"} <= set(found)
    figures = found["figures"]
    assert figures["offered"] == figures["accepted"] + figures["rejected"] == sum(figures["statuses"].values())
    assert figures["offered"] == max(round(10 * figures["capacity_per_s"]), 2)
    assert figures["same_answers"] == figures["accepted"] > 0
    assert figures["rejected"] > 0
    assert 0 < figures["most_waiting"] <= figures["max_waiting"] == 4
    assert (figures["wrong"], figures["kept"]) == (0, True)
    assert figures["queue_empty_seconds"] is not None


@pytest.mark.parametrize(
    ("status", "text", "excuse", "kind"),
    [
        (200, "a", False, "accepted"),
        (200, None, False, "wrong"),
        (429, None, True, "rejected"),
        (503, None, True, "rejected"),
        (429, None, False, "wrong"),
        (500, None, True, "wrong"),
        (0, None, False, "wrong"),
    ],
)
def test_only_an_answer_and_a_refusal_with_an_excuse_are_right(status, text, excuse, kind):
    assert overload.Result(0, status, 0.1, text, excuse).kind == kind


def test_what_cannot_be_measured_ends_with_one_line(capsys):
    assert overload.main(["--seconds", "0"]) == 1
    assert "--seconds is 0" in capsys.readouterr().err
    assert overload.main(["--model", "no-such-model"]) == 1
    assert "the server ended with status 1" in capsys.readouterr().err
