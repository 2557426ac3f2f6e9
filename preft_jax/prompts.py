"""One prompt or many, and what is said once for all or for each: how ``generate`` and ``logprobs`` read arguments."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preft_jax.errors import RequestError
from preft_jax.text.chat import EncodedPrompt


def is_one(prompts: Any) -> bool:
    """Return whether this is one text, one sequence of token ids, or one list of messages, and no list of such."""
    if isinstance(prompts, str | EncodedPrompt):
        return True
    if hasattr(prompts, "__array__"):
        return np.ndim(prompts) == 1
    return len(prompts) > 0 and isinstance(prompts[0], Mapping | numbers.Integral)


def as_list(prompts: Any, what: str = "prompts") -> list[Any]:
    """Return a list of prompts; one text, one sequence of token ids and one list of messages count as one prompt.

    Raises:
        RequestError: if it is nothing of these.
    """
    is_array = hasattr(prompts, "__array__")
    if isinstance(prompts, bytes) or (not isinstance(prompts, str | EncodedPrompt | Sequence) and not is_array):
        raise RequestError(
            f"{what} is of type {type(prompts).__name__}; give text, token ids, messages, or a list of them"
        )
    return [prompts] if isinstance(prompts, EncodedPrompt) or is_one(prompts) else list(prompts)


def per_prompt(values: Any, count: int, what: str) -> list[Any]:
    """Return a value for each prompt: each its own, or one for all.

    Raises:
        RequestError: if there are more or fewer than prompts.
    """
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise RequestError(f"{what} has {len(values)} entries for {count} prompts; give one for all, or one for each")
    return list(values)
