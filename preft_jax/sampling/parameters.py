"""``SamplingParams``: how a request wants its tokens to be drawn. Names and meanings are vLLM's."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from preft_jax.errors import RequestError, shown

MAX_BIAS = 300
"""Most entries of one request's ``logit_bias``."""


MAX_LOGPROBS = 20
"""Most tokens that ``top_logprobs`` lists for a row."""


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of the index-th of several that draw beside each other; the first has ``seed`` itself.

    They are hashed: ``seed + index`` would be the first seed of whoever was given the next number.
    """
    return seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


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
                raise RequestError(f"{name} is {shown(getattr(self, name))}; allowed: {allowed}")

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
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

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


def is_penalised(params: SamplingParams) -> bool:
    """Return whether a request has a penalty, for which its text so far is needed."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def is_plain(params: SamplingParams) -> bool:
    """Return whether ``sample_plain`` can draw for a request: it only has a temperature and a seed."""
    filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    return not (is_penalised(params) or filtered or params.logit_bias)
