"""Sampling on the device: one function from logits to tokens and their log-probabilities.

The random key of a token is ``fold_in(key(seed), position)``: it depends on the request alone, never on its place in a
batch.
"""

import dataclasses
import functools
import itertools
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import api
from kernels.types import Array
from preft_jax.errors import RequestError
from preft_jax.logits import History as History
from preft_jax.logits import add_bias, penalise

MAX_BIAS = 300
"""Most entries of one request's ``logit_bias``."""

MAX_LOGPROBS = 20
"""Most tokens that ``top_logprobs`` lists for a row."""

INVALID = -2
"""The token of a row whose logits are no distribution: they hold a NaN or +inf, or are all -inf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are drawn; names and defaults are vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; -1 (or 0) keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        presence_penalty: subtracted from the logit of each token generated so far; -2 to 2.
        frequency_penalty: the same, once for each time it was generated; -2 to 2.
        repetition_penalty: divides the logit of each token of the prompt and the generated text if it is positive,
            multiplies it if not; above 0, at most 10, and 1 does nothing.
        logit_bias: token ids and what is added to the logit of each, -100 to 100: a mapping (or pairs) of at most
            ``MAX_BIAS``, kept as a tuple of pairs.
        seed: of this request; None lets the caller derive one.
        stop_token_ids: end the text when one is drawn, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
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
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, _between(getattr(self, name), -2, 2), "a number from -2 to 2")
        repetition = self.repetition_penalty
        check("repetition_penalty", _between(repetition, 0, 10) and repetition > 0, "a number above 0 and at most 10")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        check("seed", self.seed is None or _within(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1")
        check(
            "stop_token_ids",
            isinstance(self.stop_token_ids, Sequence) and all(_within(i, 0, 2**31 - 1) for i in self.stop_token_ids),
            "a sequence of token ids",
        )

    @functools.cached_property
    def _bias_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``logit_bias`` as int32 ids and float32 biases, made once: the same parameters fill many batches."""
        biases = dict(self.logit_bias or ())
        return np.array(list(biases), np.int32), np.array(list(biases.values()), np.float32)


def _bias_pairs(given: object) -> tuple[tuple[int, float], ...] | None:
    """Return ``logit_bias`` as pairs sorted by token id, or None if there are none.

    Raises:
        RequestError: naming the entry that cannot work.
    """
    if given is None:
        return None
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if isinstance(pairs, Sequence) and len(pairs) > MAX_BIAS:
        raise RequestError(f"logit_bias has {len(pairs)} entries; allowed: at most {MAX_BIAS}")
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise RequestError(f"logit_bias is {given!r}; allowed: a mapping from token ids to biases, or None")
    for token, bias in pairs:
        if not _within(token, 0, 2**31 - 1):
            raise RequestError(f"logit_bias names the token {token!r}; allowed: token ids, integers of at least 0")
        if not _between(bias, -100, 100):
            raise RequestError(f"logit_bias gives token {token} the bias {bias!r}; allowed: a number from -100 to 100")
    biases = {int(token): float(bias) for token, bias in pairs}
    if len(biases) < len(pairs):
        raise RequestError("logit_bias names a token more than once; give each token one bias")
    return tuple(sorted(biases.items())) or None


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, numbers.Real) and low <= float(value) <= high


def _within(value: object, low: int, high: int) -> bool:
    return isinstance(value, numbers.Integral) and low <= int(value) <= high


_LEAST_TEMPERATURE = 1e-30
"""Smaller ones count as this one: devices take the smallest float32 numbers for zero."""

_LEAST_REPETITION = 1e-20
"""Smaller ones count as this one: a logit divided by it must stay finite."""

_NUMBERS = operator.attrgetter(
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
)


class SamplingArrays(NamedTuple):
    """``SamplingParams`` of a batch as arrays of shape ``[B]``: float32, ``top_k_B`` int32, ``seed_B`` uint32.

    Biases are ``[B, MAX_BIAS]``: int32 token ids, padded with -1, and float32 biases, padded with 0.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    seed_B: Array
    presence_B: Array
    frequency_B: Array
    repetition_B: Array
    bias_token_BM: Array
    bias_BM: Array


def sampling_arrays(params: Sequence[SamplingParams], seeds: Sequence[int], size: int) -> SamplingArrays:
    """Stack the parameters of a batch in NumPy arrays, padded to ``size`` rows with greedy ones."""
    padding = size - len(params)
    arrays = SamplingArrays(
        temperature_B=np.empty(size, np.float32),
        top_k_B=np.empty(size, np.int32),
        top_p_B=np.empty(size, np.float32),
        min_p_B=np.empty(size, np.float32),
        seed_B=np.empty(size, np.uint32),
        presence_B=np.empty(size, np.float32),
        frequency_B=np.empty(size, np.float32),
        repetition_B=np.empty(size, np.float32),
        bias_token_BM=np.empty((size, MAX_BIAS), np.int32),
        bias_BM=np.empty((size, MAX_BIAS), np.float32),
    )
    _fill(arrays, 0, [*params, *[SamplingParams(temperature=0.0)] * padding], [*seeds, *[0] * padding])
    return arrays


def set_row(arrays: SamplingArrays, row: int, params: SamplingParams, seed: int) -> None:
    """Write one request's parameters in place; ``arrays`` are NumPy's, as ``sampling_arrays`` makes them."""
    size = len(arrays.temperature_B)
    if not 0 <= row < size:
        raise IndexError(f"row is {row}; allowed: 0 to {size - 1}")
    _fill(arrays, row, [params], [seed])


def _fill(arrays: SamplingArrays, first: int, params: Sequence[SamplingParams], seeds: Sequence[int]) -> None:
    """Write parameters into the rows from ``first`` on, all fields of all of them."""
    rows = slice(first, first + len(params))
    table = np.fromiter(itertools.chain.from_iterable(map(_NUMBERS, params)), np.float64)
    temperature, top_k, top_p, min_p, presence, frequency, repetition = table.reshape(-1, 7).T
    arrays.temperature_B[rows] = np.where(temperature > 0, np.maximum(temperature, _LEAST_TEMPERATURE), 0.0)
    arrays.top_k_B[rows] = top_k
    arrays.top_p_B[rows] = top_p
    arrays.min_p_B[rows] = min_p
    arrays.seed_B[rows] = seeds
    arrays.presence_B[rows] = presence
    arrays.frequency_B[rows] = frequency
    arrays.repetition_B[rows] = np.maximum(repetition, _LEAST_REPETITION)
    arrays.bias_token_BM[rows] = -1
    arrays.bias_BM[rows] = 0.0
    for row, p in enumerate(params, first):
        if p.logit_bias:
            token_M, bias_M = p._bias_arrays
            arrays.bias_token_BM[row, : len(token_M)] = token_M
            arrays.bias_BM[row, : len(bias_M)] = bias_M


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


def is_penalised(params: SamplingParams) -> bool:
    """Return whether a request has a penalty, for which its text so far is needed."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def is_plain(params: SamplingParams) -> bool:
    """Return whether ``sample_plain`` can draw for a request: it only has a temperature and a seed."""
    filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    return not (is_penalised(params) or filtered or params.logit_bias)


def sample_plain(
    logits_RV: jax.Array, index_B: Array, position_B: jax.Array, alive_B: jax.Array, s: SamplingArrays
) -> Sample:
    """Draw as ``sample`` does for rows that ``is_plain``, without branches, which make the host of a GPU wait.

    Args:
        logits_RV: float32.
        index_B: int32, the row of the logits of each row.
        position_B: int32, the position that the drawn token will have in its request.
        alive_B: bool, rows that count.
        s: parameters of each row, of which only temperature and seed are used.
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
