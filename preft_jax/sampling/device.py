"""Sampling on the device: one function from logits to tokens and their log-probabilities.

The random key of a token is ``fold_in(key(seed), position)``: it depends on the request alone, never on its place in a
batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import api
from kernels.types import Array
from preft_jax.errors import RequestError
from preft_jax.sampling.arrays import PlainSampling, SamplingArrays
from preft_jax.sampling.logits import History, add_bias, penalise
from preft_jax.sampling.parameters import MAX_LOGPROBS, _within

INVALID = -2
"""The token of a row whose logits are no distribution: they hold a NaN or +inf, or are all -inf."""


class Sample(NamedTuple):
    """Drawn tokens and two log-probabilities of each, float32 ``[B]``.

    ``logprob_B`` is under the model (temperature 1, no bias, penalty or filter); ``sampling_logprob_B`` under the
    distribution that it was drawn from (0 for greedy). A row whose logits are no distribution has the token
    ``INVALID``, and NaN for both.
    """

    token_B: jax.Array
    logprob_B: jax.Array
    sampling_logprob_B: jax.Array


def _last_kept(logits_BV: jax.Array, s: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """Return the logit and the id of the last token that top-k, top-p and min-p leave in each row.

    Each keeps the first so many of a row's tokens, sorted by logit and then by id.
    """
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    negated_BV, order_BV = jax.lax.sort((-logits_BV, ids_BV), num_keys=1)
    sorted_BV = -negated_BV
    in_top_k = (ids_BV < s.top_k_B[:, None]) | (s.top_k_B[:, None] <= 0)
    scaled_BV = _scaled(sorted_BV, sorted_BV[:, :1], s)
    probs_BV = jax.nn.softmax(jnp.where(in_top_k, scaled_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    in_top_p = (before_BV < s.top_p_B[:, None]) | (s.top_p_B[:, None] >= 1)
    in_min_p = probs_BV >= s.min_p_B[:, None] * probs_BV[:, :1]
    kept_B = jnp.sum(in_top_k & in_top_p & in_min_p, axis=-1, dtype=jnp.int32)
    last_B1 = jnp.maximum(kept_B, 1)[:, None] - 1
    return jnp.take_along_axis(sorted_BV, last_B1, axis=-1)[:, 0], jnp.take_along_axis(order_BV, last_B1, axis=-1)[:, 0]


def _scaled(logits_BV: jax.Array, largest_B1: jax.Array, s: SamplingArrays) -> jax.Array:
    """Divide by the temperature, relative to the largest logit, so that no temperature overflows."""
    return (logits_BV - largest_B1) / jnp.where(s.temperature_B > 0, s.temperature_B, 1.0)[:, None]


def _draw(logits_BV: jax.Array, position_B: jax.Array, s: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """Draw with the Gumbel-max trick; noise belongs to the token id, so filters never change which noise a token
    gets.

    A filter only says which token is the last one kept. All rows then run through the same sums in the same order,
    whether a neighbour has a filter or not.
    """
    rows, vocab = logits_BV.shape

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,), jnp.float32)

    any_filter = jnp.any(((s.top_k_B > 0) | (s.top_p_B < 1) | (s.min_p_B > 0)) & (s.temperature_B > 0))
    keep_all = jnp.full(rows, -jnp.inf), jnp.full(rows, vocab, jnp.int32)
    last_B, last_id_B = jax.lax.cond(any_filter, lambda: _last_kept(logits_BV, s), lambda: keep_all)
    tied = (logits_BV == last_B[:, None]) & (jnp.arange(vocab) <= last_id_B[:, None])
    kept = (logits_BV > last_B[:, None]) | tied
    scaled_BV = _scaled(logits_BV, jnp.max(logits_BV, axis=-1, keepdims=True), s)
    scaled_BV = jnp.where(kept, scaled_BV, -jnp.inf)
    # Fused into the reduction of argmax, the noise would be computed one number at a time on a CPU.
    noise_BV = jax.lax.optimization_barrier(jax.vmap(noise)(s.seed_B, position_B))
    token_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
    return token_B, _at(scaled_BV, token_B) - jax.nn.logsumexp(scaled_BV, axis=-1)


def _at(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]


def _choose(logits_BV: jax.Array, position_B: jax.Array, s: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """Return each row's token, drawn or the most likely one, and its log-probability under what it was drawn from."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    certain_B = jnp.zeros(logits_BV.shape[0], jnp.float32)
    drawn_B, drawn_logprob_B = jax.lax.cond(
        jnp.any(s.temperature_B > 0), lambda: _draw(logits_BV, position_B, s), lambda: (greedy_B, certain_B)
    )
    is_greedy_B = s.temperature_B <= 0
    return jnp.where(is_greedy_B, greedy_B, drawn_B), jnp.where(is_greedy_B, certain_B, drawn_logprob_B)


def sample(logits_BV: jax.Array, position_B: jax.Array, s: SamplingArrays, history: History | None = None) -> Sample:
    """Draw one token for each row.

    In the order of vLLM's V1 engine: ``logit_bias``, then the repetition, frequency and presence penalties (all act on
    greedy rows too), then the temperature. The filters come last: top-k, top-p, then min-p (vLLM's min-p comes before
    the other two). What no row asks for is not computed.

    Args:
        logits_BV: float32, un-scaled; -inf forbids a token, whatever its bias.
        position_B: int32, the position that the drawn token will have in its request.
        s: parameters of each row.
        history: each row's text so far, which penalties need: without it they are not applied.
    """
    any_bias = jnp.any(s.bias_token_BM >= 0)
    penalised_B = (s.repetition_B != 1) | (s.frequency_B != 0) | (s.presence_B != 0)
    any_penalty = jnp.any(penalised_B) & (history is not None)

    def adjusted() -> jax.Array:
        biased_BV = jax.lax.cond(any_bias, lambda: add_bias(logits_BV, s.bias_token_BM, s.bias_BM), lambda: logits_BV)
        if history is None:
            return biased_BV
        penalised = functools.partial(penalise, biased_BV, history, s.repetition_B, s.frequency_B, s.presence_B)
        return jax.lax.cond(any_penalty, penalised, lambda: biased_BV)

    # The whole choice stands in both branches: one that only gave the logits back would copy them.
    token_B, sampling_logprob_B = jax.lax.cond(
        any_bias | any_penalty, lambda: _choose(adjusted(), position_B, s), lambda: _choose(logits_BV, position_B, s)
    )
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    valid_B = jnp.isfinite(total_B)
    return Sample(
        jnp.where(valid_B, token_B, INVALID),
        jnp.where(valid_B, _at(logits_BV, token_B) - total_B, jnp.nan),
        jnp.where(valid_B, sampling_logprob_B, jnp.nan),
    )


def sample_plain(
    logits_RV: jax.Array, index_B: Array, position_B: jax.Array, alive_B: jax.Array, s: PlainSampling
) -> Sample:
    """Draw as ``sample`` does for rows that ``is_plain``, without branches, which make the host of a GPU wait.

    Args:
        logits_RV: float32.
        index_B: int32, the row of the logits of each row.
        position_B: int32, the position that the drawn token will have in its request.
        alive_B: bool, rows that count.
        s: temperature and seed of each row.
    """
    index_B = jnp.asarray(index_B)
    drawn = api.draw(logits_RV, index_B, s.temperature_B, jnp.asarray(s.seed_B), position_B, alive_B)
    valid_B = jnp.isfinite(drawn.total_B)
    return Sample(
        jnp.where(valid_B, drawn.token_B, INVALID),
        jnp.where(valid_B, drawn.logprob_B, jnp.nan),
        jnp.where(valid_B, drawn.sampling_logprob_B, jnp.nan),
    )


def top_logprobs(logits_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the most likely tokens of each row, the lower id first among equals, and their log-probabilities.

    Like ``Sample.logprob_B`` they are under the model, and NaN (the tokens ``INVALID``) where there is none.

    Args:
        logits_BV: float32, un-scaled.
        count: tokens of each row, 1 to ``MAX_LOGPROBS`` and no more than the vocabulary; fixes the shape.

    Returns:
        ``token_BN`` int32 and ``logprob_BN`` float32, ``[B, count]``.
    """
    most = min(MAX_LOGPROBS, logits_BV.shape[-1])
    if not _within(count, 1, most):
        raise RequestError(f"count is {count!r}; allowed: an integer from 1 to {most}")
    logit_BN, token_BN = jax.lax.top_k(logits_BV, count)
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    valid_B1 = jnp.isfinite(total_B1)
    return jnp.where(valid_B1, token_BN, INVALID), jnp.where(valid_B1, logit_BN - total_B1, jnp.nan)
