"""A prefilled request as data: what an engine that holds adapters gives to one that holds none, and decodes.

    prefill = Engine(model, EngineConfig(role="prefill", bank_pages=33))
    decode = Engine(model, EngineConfig(role="decode"))
    (handover,) = hand_over(prefill, [request])
    (completion,) = decode.generate([handover.request(request)])

An adapter of prompt tokens lives on in their KV, so the engine that decodes needs no adapter: neither for new tokens
nor for those that it computes again after a preemption, which are never edited. The KV of the prompt is kept on the
host until the request ends.

As bytes a handover is the length of a header (8 bytes, little-endian), the header (JSON), the edit mask and the KV.
"""

import dataclasses
import functools
import itertools
import json
import math
import struct
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.fold import FOLD_VERSION
from preft_jax.errors import RequestError, check_type
from preft_jax.loading import Model
from preft_jax.text.chat import EncodedPrompt
from serve.engine.handover_header import VERSION, read_header
from serve.engine.request import Request, TokenLogprobs

if TYPE_CHECKING:
    from serve.engine.completion import Completion
    from serve.engine.engine import Engine
    from serve.engine.sequence import Sequence

_LENGTH = struct.Struct("<q")
_PLAIN = ("token_ids", "adapter", "adapter_dtype", "fold_version", "kv_digest", "seed")
"""Attributes of ``PromptKV`` that stand in the header as they are."""


class HandoverError(RequestError):
    """A handover cannot be read or gone on from: the engines do not fit each other, whatever was asked of them."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptKV:
    """The KV of a prompt, and all that it depends on.

    Attributes:
        token_ids: the prompt's P tokens.
        edit_mask: which of them were edited, bool ``[P, NUM_GROUPS]``.
        adapter: digest of the adapter that edited them, or None.
        adapter_dtype: how its rank pages were stored, on the host and in the bank.
        fold_version: of the arithmetic that folded it.
        kv_digest: of the base model (``Model.kv_digest``).
        parts: the KV in the order of tokens, each part ``[n, L, 2 * KV heads, head dim]``, heads in the order of
            ``KVCache``. The last part may go on behind the prompt.
        seed: of which the samples' seeds are derived.
    """

    token_ids: list[int]
    edit_mask: np.ndarray
    adapter: str | None
    adapter_dtype: str
    fold_version: int = FOLD_VERSION
    kv_digest: str
    parts: list[np.ndarray]
    seed: int

    @property
    def kv_dtype(self) -> str:
        """How the KV is stored."""
        return self.parts[0].dtype.name

    @functools.cached_property
    def kv(self) -> np.ndarray:
        """The KV in one piece, ``[P, L, 2 * KV heads, head dim]``."""
        whole = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        return whole[: len(self.token_ids)]


def prompt_kv_of(sequence: "Sequence", parts: list[np.ndarray], *, kv_digest: str, adapter_dtype: str) -> PromptKV:
    """Return the KV of a sequence's prompt, which its engine computed; it is the first sample of its request."""
    return PromptKV(
        token_ids=sequence.tokens[: sequence.prompt_len],
        edit_mask=sequence.mask[: sequence.prompt_len],
        adapter=sequence.adapter,
        adapter_dtype=adapter_dtype,
        kv_digest=kv_digest,
        parts=parts,
        seed=sequence.seed,
    )


class FirstToken(NamedTuple):
    """What the last prompt token's logits gave a sample; ``top``: the most likely tokens, best first, if asked for."""

    token_id: int
    logprob: float
    sampling_logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Handover:
    """A prefilled request.

    Attributes:
        prompt: its prompt's KV.
        first: the first token of each sample.
        prompt_logprobs: of the prompt's tokens, if they were asked for.
    """

    prompt: PromptKV
    first: list[FirstToken]
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @classmethod
    def of(cls, completions: Many["Completion"]) -> "Handover":
        """Return the handover of one request from its samples, which a prefill engine ended.

        Raises:
            RequestError: one of them failed, or they are of another engine.
        """
        failed = next((one for one in completions if one.error is not None), None)
        if failed is not None:
            raise RequestError(f"the prompt could not be prefilled: {failed.error}")
        first = completions[0]
        if first.prompt_kv is None:
            raise RequestError("the samples bring no KV; prefill with an engine of EngineConfig(role='prefill')")
        return cls(
            prompt=first.prompt_kv, first=[_first(one) for one in completions], prompt_logprobs=first.prompt_logprobs
        )

    def request(self, request: Request) -> Request:
        """Return a request for what is left to do of one that was prefilled."""
        prompt = EncodedPrompt(list(self.prompt.token_ids), ())
        return dataclasses.replace(request, prompt=prompt, adapter=None, edit_mask=None, handover=self)

    # As bytes

    def to_bytes(self) -> Iterator[bytes | memoryview]:
        """Yield the handover as bytes, in parts none of which copies KV."""
        prompt, left = self.prompt, len(self.prompt.token_ids)
        header = {
            "version": VERSION,
            "token_ids": prompt.token_ids,
            "mask_groups": prompt.edit_mask.shape[1],
            "adapter": prompt.adapter,
            "adapter_dtype": prompt.adapter_dtype,
            "fold_version": prompt.fold_version,
            "kv_digest": prompt.kv_digest,
            "kv_dtype": prompt.kv_dtype,
            "kv_shape": [left, *prompt.parts[0].shape[1:]],
            "seed": prompt.seed,
            "first": self.first,
            "prompt_logprobs": self.prompt_logprobs,
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        yield _LENGTH.pack(len(text))
        yield text
        yield np.packbits(prompt.edit_mask).tobytes()
        for part in prompt.parts:
            some = np.ascontiguousarray(part[:left])
            left -= len(some)
            yield memoryview(some.view(np.uint8).reshape(-1))

    @classmethod
    def all_from(cls, data: bytes) -> list["Handover"]:
        """Return the handovers that bytes hold, one after the other; their KV stays where it is.

        Raises:
            HandoverError: the bytes are no handovers of this version.
        """
        found, at = [], 0
        try:
            while at < len(data):
                handover, at = cls._from(data, at)
                found.append(handover)
        except (ValueError, struct.error) as error:
            raise HandoverError(f"the bytes at {at} are no handover of version {VERSION}: {error}") from error
        return found

    @classmethod
    def _from(cls, data: bytes, at: int) -> tuple["Handover", int]:
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if not 0 < length <= len(data) - at:
            raise ValueError(f"its header has {length} bytes, and {len(data) - at} are left")
        header = read_header(data[at : at + length])
        at += length
        shape, dtype = header["kv_shape"], jnp.dtype(header["kv_dtype"])
        mask_shape = (shape[0], header["mask_groups"])
        num_bits, num_values = math.prod(mask_shape), math.prod(shape)
        num_bytes = -(-num_bits // 8)
        if num_bytes + num_values * dtype.itemsize > len(data) - at:
            raise ValueError(f"it lacks bytes: {len(data) - at} are left for KV of the shape {shape}")
        bits = np.frombuffer(data, np.uint8, num_bytes, at)
        mask = np.unpackbits(bits, count=num_bits).astype(bool).reshape(mask_shape)
        if header["adapter"] is None and mask.any():
            raise ValueError("tokens are edited and it names no adapter")
        at += num_bytes
        kv = np.frombuffer(data, dtype, num_values, at).reshape(shape)
        prompt = PromptKV(edit_mask=mask, parts=[kv], **{name: header[name] for name in _PLAIN})
        first = [FirstToken(one[0], one[1], one[2], _by_token(one[3])) for one in header["first"]]
        scores = header["prompt_logprobs"]
        if scores is not None:
            scores = [None if one is None else TokenLogprobs(one[0], one[1], _by_token(one[2])) for one in scores]
        return cls(prompt=prompt, first=first, prompt_logprobs=scores), at + kv.nbytes


def _by_token(top: dict[str, float]) -> dict[int, float]:
    return {int(token): logprob for token, logprob in top.items()}


def _first(completion: "Completion") -> FirstToken:
    top = completion.top_logprobs[0].top if completion.top_logprobs else {}
    return FirstToken(completion.token_ids[0], completion.logprobs[0], completion.sampling_logprobs[0], top)


def hand_over(engine: "Engine", requests: Many[Request]) -> list[Handover]:
    """Prefill requests with an idle engine of the role ``prefill``.

    Raises:
        RequestError, AdapterError: one of them can never be served, or failed; none is then left.
    """
    completions = iter(engine.generate(requests))
    return [Handover.of(list(itertools.islice(completions, request.n))) for request in requests]


def check_handover(handover: Handover, request: Request, model: Model, kv_dtype: str, role: str) -> None:
    """Check that an engine can go on from a request's handover.

    Args:
        handover: of the request.
        request: what is asked of the engine.
        model: of the engine.
        kv_dtype: of its cache.
        role: of the engine.

    Raises:
        HandoverError: the engine takes none, or it is of another model, cache or request.
    """
    check_type("handover", handover, Handover, "what hand_over returns", HandoverError)
    if role != "decode":
        raise HandoverError(f"this engine has the role {role} and takes no handovers; make it with role='decode'")
    prompt, first, config = handover.prompt, handover.first, model.config
    kv_shape = (config.num_hidden_layers, 2 * config.num_key_value_heads, config.head_dim)

    def same(what: str, theirs: Any, ours: Any, todo: str) -> None:
        if theirs != ours:
            raise HandoverError(f"the handover's {what} is {theirs} and this engine's is {ours}; {todo}")

    same(
        "base model's digest",
        prompt.kv_digest,
        model.kv_digest,
        "serve the same weights and quantization in both roles",
    )
    same("KV dtype", prompt.kv_dtype, kv_dtype, "give both roles the same kv_dtype (a server's --kv-cache-dtype)")
    same("KV shape", prompt.parts[0].shape[1:], kv_shape, "it is not of this model")
    same("fold version", prompt.fold_version, FOLD_VERSION, "serve one version of preft-jax in both roles")
    if not all(0 <= one.token_id < config.vocab_size for one in first):
        raise HandoverError(f"the handover's first tokens are not all in the vocabulary, 0 to {config.vocab_size - 1}")
    if request.token_ids != prompt.token_ids:
        raise HandoverError("the request's prompt is not the handover's; make it with Handover.request")
    if request.n != len(first):
        raise HandoverError(f"n is {request.n}, and the handover has {len(first)} samples; ask both roles for the same")
    if (request.logprobs or 0) > min(len(one.top) for one in first):
        raise HandoverError(
            f"logprobs is {request.logprobs}, and the handover has the {min(len(one.top) for one in first)} most "
            "likely tokens; ask both roles for the same"
        )
