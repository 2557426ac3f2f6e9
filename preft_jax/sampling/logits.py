"""What a request changes about its logits before a token is drawn: biases, and penalties on tokens its text has.

The semantics are vLLM's. Every function leaves the rows that ask for nothing exactly as they are. Axis letter ``M``:
biased tokens of a row; the others: ``preft_jax/shapes.py``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.types import Array


class History(NamedTuple):
    """The tokens of each row's text so far. All int32.

    ``token_BS`` holds prompt and generated token ids in order; what stands at or after ``length_B`` is ignored, and so
    are ids outside the vocabulary. The first ``prompt_len_B`` are the prompt's.
    """

    token_BS: Array
    prompt_len_B: Array
    length_B: Array


def add_bias(logits_BV: jax.Array, token_BM: Array, bias_BM: Array) -> jax.Array:
    """Add ``bias_BM`` to the logits of ``token_BM``; ids outside the vocabulary, such as the padding's -1, are
    dropped.
    """
    rows, vocab = logits_BV.shape
    return logits_BV.at[jnp.arange(rows)[:, None], _or_outside(token_BM, vocab)].add(bias_BM, mode="drop")


def penalise(
    logits_BV: jax.Array, history: History, repetition_B: Array, frequency_B: Array, presence_B: Array
) -> jax.Array:
    """Apply three penalties, in this order.

    Repetition (above 0; 1: none) acts on each token of the prompt or the generated text: a positive logit is divided
    by it, any other multiplied (Keskar et al. 2019, "CTRL", section 4.1, made sign-aware). Frequency is subtracted
    once for each time that a token was generated, presence once if it was generated at all.
    """
    prompt_BV, generated_BV = _counts(history, *logits_BV.shape)
    repetition_B1 = repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where((prompt_BV > 0) | (generated_BV > 0), repeated_BV, logits_BV)
    logits_BV = logits_BV - frequency_B[:, None] * generated_BV.astype(jnp.float32)
    return logits_BV - presence_B[:, None] * (generated_BV > 0).astype(jnp.float32)


def _counts(history: History, rows: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Return how often each row's prompt and its generated text hold each token: int32 ``[B, V]`` both."""
    place_S = jnp.arange(history.token_BS.shape[1])
    generated_BS = (place_S >= history.prompt_len_B[:, None]).astype(jnp.int32)
    token_BS = jnp.where(place_S < history.length_B[:, None], _or_outside(history.token_BS, vocab), vocab)
    counts = jnp.zeros((2, rows, vocab), jnp.int32)
    counts = counts.at[generated_BS, jnp.arange(rows)[:, None], token_BS].add(1, mode="drop")
    return counts[0], counts[1]


def _or_outside(token: Array, vocab: int) -> jax.Array:
    """Replace negative ids, which an index would count from the end, by ``vocab``, which a scatter drops."""
    return jnp.where(token < 0, vocab, token)
