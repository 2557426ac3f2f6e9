"""A needle task: numbers that stand in a long text, and are asked for at its end.

In prose stand sentences at even distances: "The magic number of Oslo is 4711." At the end they stand again in another
order, one after the other, each with its number. A number is found if at each of its tokens that token is the most
likely one: the answer that greedy decoding would give, with the true answers to the questions before it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.fp8_bases import Base, stream
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError
from preft_jax.models.forward import lm_head
from preft_jax.models.params import Params

PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Dakar", "Hanoi", "Minsk", "Perth", "Sofia", "Tunis", "Delhi", "Kyoto")


class Haystack(NamedTuple):
    """Token ids ``[S]``, and the places of the tokens of each asked number ``[N, A]``."""

    tokens_S: np.ndarray
    answers_NA: np.ndarray


def haystack(
    encode: Callable[[str], list[int]], prose: Callable[[int], np.ndarray], context: int, rng: np.random.Generator
) -> Haystack:
    """Return a text of ``context`` tokens with a needle for each of ``PLACES``; ``prose`` gives so many tokens.

    Raises:
        ConfigError: if the needles alone take more.
    """
    values = rng.choice(np.arange(1000, 10000), len(PLACES), replace=False)
    needles = [encode(f"\nThe magic number of {p} is {v}.\n") for p, v in zip(PLACES, values, strict=True)]
    order = rng.permutation(len(PLACES))
    asked = [(encode(f"\nThe magic number of {PLACES[n]} is"), encode(f" {values[n]}")) for n in order]
    end = [token for question, answer in asked for token in (*question, *answer)]
    room = context - sum(map(len, needles)) - len(end)
    if room < len(PLACES):
        raise ConfigError(f"--context is {context}; the questions alone take {context - room}, give more")
    parts = np.array_split(prose(room), len(PLACES))
    tokens = [token for part, needle in zip(parts, needles, strict=True) for token in (*part, *needle)]
    places = []
    for question, answer in asked:
        tokens += question
        places.append(range(len(tokens), len(tokens) + len(answer)))
        tokens += answer
    return Haystack(np.array(tokens, np.int32), np.array(places))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(
    config: ModelConfig, kv_dtype: str | None, params: Params, folded: Any, tokens_BS: jax.Array, at_NA: jax.Array
) -> jax.Array:
    h_BSD = stream(config, kv_dtype, params, folded, tokens_BS, 0)
    return lm_head(params, h_BSD[:, at_NA.reshape(-1)]).argmax(-1)


def found(config: ModelConfig, base: Base, haystacks: Sequence[Haystack]) -> int:
    """Return how many of all numbers a base model finds."""
    total = 0
    for tokens_S, answers_NA in haystacks:
        given = _likeliest(config, base.kv_dtype, base.params, base.folded, tokens_S[None], answers_NA - 1)
        total += int((np.asarray(given).reshape(answers_NA.shape) == tokens_S[answers_NA]).all(1).sum())
    return total


def wilson(count: int, of: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a rate."""
    z, rate = 1.96, count / of
    middle, spread = rate + z * z / (2 * of), z * math.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of))
    return (middle - spread) / (1 + z * z / of), (middle + spread) / (1 + z * z / of)
