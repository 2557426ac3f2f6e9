"""Tasks of reasoning-gym: questions that are made from a seed, and what an answer to one is worth.

https://github.com/open-thought/reasoning-gym; ``pip install 'preft-jax[rl]'``.
"""

import functools
import re
import warnings
from typing import Any

from preft_jax.errors import ConfigError

SIZE = 2**30
"""Questions of one seed: the one at ``i`` is made from ``seed + i``."""


@functools.cache
def dataset(name: str, seed: int) -> Any:
    """Return the questions of a task.

    Raises:
        ConfigError: if there is no such task, or the package is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # Of what it imports.
            import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"tasks of reasoning_gym need it ({error}); pip install 'preft-jax[rl]'") from error
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=SIZE)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"the task reasoning_gym:{name} cannot be made: {error}") from error


def reward(prompt: Any, completion: str, *, name: str, seed: int, index: int) -> float:
    """Return what the task's own scorer gives for an answer, from 0 to 1.

    The answer is what stands last between ``<answer>`` and ``</answer>``; without these, all of the completion.
    """
    questions = dataset(name, seed)
    return float(questions.score_answer(answer_of(completion), questions[index]))


def answer_of(completion: str) -> str:
    """Return the answer in a completion."""
    marked = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return (marked[-1] if marked else completion).strip()
