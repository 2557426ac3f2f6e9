"""The snippet of docs/training.md on fine-tuning jobs runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "training.md"


def test_the_snippet_of_jobs_beside_serving_runs(tmp_path, monkeypatch, capsys):
    section = PAGE.read_text().split("### Fine-tuning jobs beside serving, from Python")[1]
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", section.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "jobs"}
    exec(compile(snippet, "docs/training.md", "exec"), names)
    assert names["answer"].finish_reason == "length"
    assert capsys.readouterr().out.startswith("succeeded ft:tiny::")
