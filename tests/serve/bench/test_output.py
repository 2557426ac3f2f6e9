"""Figures are a line for programs; a terminal is spared it."""

import json
import sys

import pytest

from serve.bench.output import emit

pytestmark = pytest.mark.host


@pytest.mark.parametrize("terminal", [False, True])
def test_figures_are_written_and_printed_unless_people_look(terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    path = tmp_path / "new" / "figures.json"
    emit({"speed": 2.5}, path)
    printed = capsys.readouterr().out
    assert path.read_text() == '{"speed": 2.5}\n'
    assert (json.loads(printed) == {"speed": 2.5}) if not terminal else not printed


def test_what_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        emit({"speed": float("nan")}, tmp_path / "figures.json")
    assert not list(tmp_path.iterdir())
