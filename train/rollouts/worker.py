"""The process in which a reward runs: ``python -m train.rollouts.worker MODULE:FUNCTION``.

It reads a JSON object a line, ``{"prompt": ..., "completion": ..., "row": {...}}``, and writes one for each:
``{"reward": 0.5}``, or ``{"error": "..."}`` where the function raised or gave no finite number. The first line that it
writes says whether the function was found: ``{"ready": true}``. What the function prints goes to standard error.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import IO, Any

_LONGEST_ERROR = 300


def main(spec: str) -> int:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    questions = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        function = find(spec)
    except Exception as error:
        _say(answers, {"error": _told(error)})
        return 1
    _say(answers, {"ready": True})
    for line in questions:
        question = json.loads(line)
        _say(answers, _answer(function, question))
    return 0


def find(spec: str) -> Callable[..., Any]:
    """Return the function of ``module:function``."""
    module, _, name = spec.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _answer(function: Callable[..., Any], question: dict[str, Any]) -> dict[str, Any]:
    try:
        reward = float(function(question["prompt"], question["completion"], **question["row"]))
    except Exception as error:
        return {"error": _told(error)}
    if not math.isfinite(reward):
        return {"error": f"the reward is {reward}"}
    return {"reward": reward}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
