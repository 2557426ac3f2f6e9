"""From what a device call drew to what each sample gets: tokens, why it ended, text."""

import dataclasses
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from preft_jax.sampling.device import INVALID
from preft_jax.sampling.rows import Drawn
from preft_jax.text.streams import TextStream
from serve.engine.arrays import MAX_STOP_IDS
from serve.engine.plan import Chunk
from serve.engine.request import Output, TokenLogprobs
from serve.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from serve.engine.handover import FirstToken, PromptKV

NOT_NUMBERS = "the model's logits are not numbers here; check its weights, the adapter and their dtype"


@dataclasses.dataclass(eq=False, kw_only=True)
class Sample:
    """What is kept of a sample for its outputs.

    Attributes:
        text: its text so far.
        prompt_logprobs: most likely tokens that are wanted at each prompt token, or None.
        prompt_scores: log-probabilities of the prompt's tokens, once they are computed.
        prompt_kv: KV of the prompt, once it is computed, if it is handed over.
        shown: generated tokens that went out.
    """

    text: TextStream
    prompt_logprobs: int | None = None
    prompt_scores: list[TokenLogprobs | None] | None = None
    prompt_kv: "PromptKV | None" = None
    shown: int = 0


@dataclasses.dataclass(kw_only=True)
class Delta:
    """What a call brought one sample."""

    sequence: Sequence
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    tops: list[TokenLogprobs] | None = None
    finish: str | None = None
    reason: Any = None
    error: str | None = None


def fetch(steps: Many[Drawn], sequences: Many[Sequence]) -> Drawn:
    """Bring what was drawn to the host, all steps together; the most likely tokens only if a sequence wants them."""
    if not any(sequence.logprobs for sequence in sequences):
        steps = [drawn._replace(top_token_NBE=None, top_logprob_NBE=None) for drawn in steps]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(steps))


def read(drawn: Drawn, sequences: Many[Sequence]) -> Iterator[Delta]:
    """Yield what a fetched call drew for each of its sequences that still runs; they do not know it yet."""
    count = len(sequences)
    tokens, logprobs, sampled = (np.asarray(x)[:, :count].T.tolist() for x in drawn[:3])
    for row, sequence in enumerate(sequences):
        if sequence.status is Status.FINISHED:
            continue
        new = Delta(sequence=sequence)
        ids = [token for token in tokens[row] if token != -1]
        if INVALID in ids:
            ids = ids[: ids.index(INVALID)]
            new.finish, new.error = "error", NOT_NUMBERS
        if len(sequence.stop_ids) > MAX_STOP_IDS:
            ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in sequence.stop_ids), len(ids))]
        if ids and ids[-1] in sequence.stop_ids:
            new.finish, new.reason = "stop", ids[-1]
        elif new.finish is None and sequence.remaining <= len(ids):
            new.finish = "length"
        new.token_ids, n = ids, len(ids)
        new.logprobs, new.sampling_logprobs = logprobs[row][:n], sampled[row][:n]
        if sequence.logprobs is not None:
            new.tops = _tops(drawn, row, new, sequence.logprobs)
        yield new


def taken_over(sequence: Sequence, first: "FirstToken") -> Delta:
    """Return what another engine drew for a sequence, which has it among its tokens already."""
    new = Delta(sequence=sequence, token_ids=[first.token_id], logprobs=[first.logprob])
    new.sampling_logprobs = [first.sampling_logprob]
    if first.token_id in sequence.stop_ids:
        new.finish, new.reason = "stop", first.token_id
    elif not sequence.remaining:
        new.finish = "length"
    if sequence.logprobs is not None:
        top = dict(itertools.islice(first.top.items(), sequence.logprobs))
        new.tops = [TokenLogprobs(first.token_id, first.logprob, top)]
    return new


def _tops(drawn: Drawn, row: int, new: Delta, count: int) -> list[TokenLogprobs]:
    if drawn.top_token_NBE is None or drawn.top_logprob_NBE is None:
        return [TokenLogprobs(*pair, {}) for pair in zip(new.token_ids, new.logprobs, strict=True)]
    tokens, logprobs = np.asarray(drawn.top_token_NBE)[:, row], np.asarray(drawn.top_logprob_NBE)[:, row]
    return [
        TokenLogprobs(token, logprob, dict(zip(tokens[n, :count].tolist(), logprobs[n, :count].tolist(), strict=True)))
        for n, (token, logprob) in enumerate(zip(new.token_ids, new.logprobs, strict=True))
    ]


def keep_scores(sample: Sample, chunk: Chunk, scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Note the log-probabilities of the prompt tokens after each token of a chunk."""
    sequence = chunk.sequence
    kept: list[TokenLogprobs | None] = [None] if chunk.start == sequence.prefix else sample.prompt_scores or [None]
    sample.prompt_scores = kept
    logprob_T, token_TE, top_logprob_TE = scores
    for n in range(chunk.end - chunk.start):
        following = chunk.start + n + 1
        if following < sequence.prompt_len:
            at, count = chunk.at + n, sample.prompt_logprobs
            top = dict(zip(token_TE[at, :count].tolist(), top_logprob_TE[at, :count].tolist(), strict=True))
            kept.append(TokenLogprobs(sequence.tokens[following], float(logprob_T[at]), top))


def to_output(new: Delta, sample: Sample) -> Output:
    """Turn a delta into an output, its tokens into text; a stop text found there ends the sample."""
    sequence = new.sequence
    at_end_token = new.finish == "stop"
    text, kept = sample.text.push(new.token_ids[:-1] if at_end_token else new.token_ids)
    if sample.text.stopped is not None:
        new.finish, new.reason, new.error = "stop", sample.text.stopped, None
        del new.token_ids[kept:], new.logprobs[kept:], new.sampling_logprobs[kept:]
    first = sample.shown == 0
    sample.shown += len(new.token_ids)
    if new.finish is not None:
        text += sample.text.finish(new.token_ids[-1] if at_end_token and new.token_ids else None)
        if new.finish in ("length", "stop") and sample.text.stopped is not None:
            new.finish, new.reason = "stop", sample.text.stopped
    return Output(
        request_id=sequence.request_id,
        index=sequence.index,
        token_ids=new.token_ids,
        text=text,
        logprobs=new.logprobs,
        sampling_logprobs=new.sampling_logprobs,
        top_logprobs=None if new.tops is None else new.tops[: len(new.token_ids)],
        prompt_logprobs=sample.prompt_scores if first else None,
        prompt_kv=sample.prompt_kv if first else None,
        finish_reason=new.finish,
        stop_reason=new.reason,
        error=new.error,
    )
