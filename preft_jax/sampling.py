"""Sampling on the device: one function from logits to tokens and their log-probabilities.

The random key of a token is ``fold_in(key(seed), position)``: it depends on the request alone, never on its place in a
batch.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.types import Array
from preft_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are drawn; names and defaults are vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; -1 (or 0) keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        seed: of this request; None lets the caller derive one.
        stop_token_ids: end the text when one is drawn, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

        check("temperature", _finite(self.temperature) and self.temperature >= 0, "a finite number of at least 0")
        check("top_k", _within(self.top_k, -1, 2**31 - 1), "an integer of at least 1, or -1 for all")
        check("top_p", _finite(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check("min_p", _finite(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        check("seed", self.seed is None or _within(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1")
        check(
            "stop_token_ids",
            isinstance(self.stop_token_ids, Sequence) and all(_within(i, 0, 2**31 - 1) for i in self.stop_token_ids),
            "a sequence of token ids",
        )


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _within(value: object, low: int, high: int) -> bool:
    return isinstance(value, numbers.Integral) and low <= int(value) <= high


_LEAST_TEMPERATURE = 1e-30
"""Smaller ones count as this one: devices take the smallest float32 numbers for zero."""


class SamplingArrays(NamedTuple):
    """``SamplingParams`` of a batch as arrays of shape ``[B]``: float32, ``top_k_B`` int32, ``seed_B`` uint32."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    seed_B: Array


def sampling_arrays(params: Sequence[SamplingParams], seeds: Sequence[int], size: int) -> SamplingArrays:
    """Stack the parameters of a batch, padded to ``size`` rows with greedy ones."""
    rows = list(params) + [SamplingParams(temperature=0.0)] * (size - len(params))
    return SamplingArrays(
        np.asarray([max(p.temperature, _LEAST_TEMPERATURE) if p.temperature else 0.0 for p in rows], np.float32),
        np.asarray([p.top_k for p in rows], np.int32),
        np.asarray([p.top_p for p in rows], np.float32),
        np.asarray([p.min_p for p in rows], np.float32),
        np.asarray([*seeds, *[0] * (size - len(params))], np.uint32),
    )


class Sample(NamedTuple):
    """Drawn tokens and two log-probabilities of each, float32 ``[B]``.

    ``logprob_B`` is under the model (temperature 1, nothing filtered); ``sampling_logprob_B`` under the distribution
    that it was drawn from (0 for greedy).
    """

    token_B: jax.Array
    logprob_B: jax.Array
    sampling_logprob_B: jax.Array


def _keep_mask(scaled_BV: jax.Array, order_BV: jax.Array, s: SamplingArrays) -> jax.Array:
    """Return bool ``[B, V]`` in sorted order: which tokens top-k, top-p and min-p leave, ties broken by token id."""
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_V = jnp.arange(scaled_BV.shape[-1], dtype=jnp.int32)
    in_top_k = (rank_V < s.top_k_B[:, None]) | (s.top_k_B[:, None] <= 0)
    probs_BV = jax.nn.softmax(jnp.where(in_top_k, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    in_top_p = (before_BV < s.top_p_B[:, None]) | (s.top_p_B[:, None] >= 1)
    in_min_p = probs_BV >= s.min_p_B[:, None] * probs_BV[:, :1]
    return (in_top_k & in_top_p & in_min_p) | (rank_V == 0)


def _draw(logits_BV: jax.Array, position_B: jax.Array, s: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """Draw with the Gumbel-max trick; noise belongs to the token id, so filters never change which noise a token
    gets.
    """
    vocab = logits_BV.shape[-1]
    # Relative to the largest logit, so that no temperature overflows.
    relative_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = relative_BV / jnp.where(s.temperature_B > 0, s.temperature_B, 1.0)[:, None]

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,), jnp.float32)

    noise_BV = jax.vmap(noise)(s.seed_B, position_B)

    def plain(_: None) -> tuple[jax.Array, jax.Array]:
        token_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
        return token_B, _log_prob(scaled_BV, token_B)

    def filtered(_: None) -> tuple[jax.Array, jax.Array]:
        order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
        kept_BV = _keep_mask(scaled_BV, order_BV, s)
        kept_logits_BV = jnp.where(kept_BV, jnp.take_along_axis(scaled_BV, order_BV, axis=-1), -jnp.inf)
        noisy_BV = kept_logits_BV + jnp.take_along_axis(noise_BV, order_BV, axis=-1)
        rank_B = jnp.argmax(noisy_BV, axis=-1)
        token_B = jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return token_B, _log_prob(kept_logits_BV, rank_B)

    any_filter = jnp.any((s.top_k_B > 0) | (s.top_p_B < 1) | (s.min_p_B > 0))
    return jax.lax.cond(any_filter, filtered, plain, None)


def _log_prob(logits_BV: jax.Array, index_B: jax.Array) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, index_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def sample(logits_BV: jax.Array, position_B: jax.Array, s: SamplingArrays) -> Sample:
    """Draw one token for each row.

    Args:
        logits_BV: float32, un-scaled.
        position_B: int32, the position that the drawn token will have in its request.
        s: parameters of each row.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    none_B = jnp.zeros(logits_BV.shape[0], jnp.float32)
    drawn_B, drawn_logprob_B = jax.lax.cond(
        jnp.any(s.temperature_B > 0), lambda _: _draw(logits_BV, position_B, s), lambda _: (greedy_B, none_B), None
    )
    is_greedy_B = s.temperature_B <= 0
    token_B = jnp.where(is_greedy_B, greedy_B, drawn_B)
    return Sample(token_B, _log_prob(logits_BV, token_B), jnp.where(is_greedy_B, 0.0, drawn_logprob_B))
