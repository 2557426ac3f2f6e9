"""The snippets of docs/library.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

from preft_jax.adapters.kinds import KINDS

PAGE = Path(__file__).parent.parent / "docs" / "library.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """Return the names of the page, as one program has them."""
    yield {"__name__": "library"}
    KINDS.pop("tanh", None)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number, names):
    exec(compile(SNIPPETS[number], f"docs/library.md, snippet {number + 1}", "exec"), names)


def test_what_the_page_says(names):
    assert len(names["scores"]) == 2
    assert len(names["done"]) == 3
    assert float(names["loss"](names["nearer"])) < float(names["value"])
    assert names["trained"].digest != names["job"].initial.digest
    assert names["direction"].shape == (64,)
    assert names["logits"].shape == (8, 16, 256)
