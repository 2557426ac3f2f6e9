"""What the engine is asked for and what it gives back."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from preft_jax.adapters.adapter import Adapter
from preft_jax.errors import RequestError, shown
from preft_jax.sampling.parameters import MAX_LOGPROBS, SamplingParams
from preft_jax.text.chat import EncodedPrompt
from serve.store.names import Registered

if TYPE_CHECKING:
    from serve.engine.handover import Handover, PromptKV

MAX_SAMPLES = 128
"""Samples of one prompt (``n``)."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt and what to generate for it; names are those of OpenAI's and vLLM's APIs.

    Attributes:
        prompt: text, token ids or chat messages, which the engine encodes, or what
            ``preft_jax.text.chat.encode_prompt`` made of them.
        adapter: edits the prompt (or every token, if its config says so), given itself or by what an
            ``AdapterStore`` has registered; None for the base model.
        edit_mask: which prompt tokens are edited, in place of what the adapter's rule says: bool ``[P]``, or ``[P,
            NUM_GROUPS]`` for weights of first and last positions of their own; needs an adapter.
        sampling: how tokens are drawn.
        max_tokens: generate at most this many tokens for each sample.
        n: samples of the prompt, which is prefilled once; each sample draws from a seed of its own.
        stop: texts that end a sample; they are not part of its text. They may hold special tokens, which have no place
            in the text either.
        logprobs: also return this many most likely tokens at each step (0: the drawn token's alone).
        prompt_logprobs: the same for each prompt token but the first, or None.
        priority: lower numbers are served first.
        deadline: seconds after its arrival at which the request is given up, or None.
        tenant: whose it is; waiting is fair between tenants.
        cache_salt: requests find each other's KV in the prefix cache only if theirs are the same.
        handover: what another engine prefilled of it; ``Handover.request`` makes such a request.
        seed: used where ``sampling.seed`` is None; if both are, the engine draws one.
    """

    prompt: EncodedPrompt | str | Sequence[int] | Sequence[Mapping[str, Any]]
    adapter: Adapter | Registered | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 64
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    seed: int | None = None
    tenant: str | None = None
    cache_salt: str | None = None
    edit_mask: Any = None
    handover: "Handover | None" = None

    def __post_init__(self) -> None:
        def whole(name: str, low: int, high: int) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
                raise RequestError(f"{name} is {shown(value)}; allowed: an integer from {low} to {high}")

        if isinstance(self.prompt, EncodedPrompt):
            _check_token_ids(self.prompt.token_ids)
        elif isinstance(self.prompt, bytes) or not (
            isinstance(self.prompt, str | Sequence) or hasattr(self.prompt, "__array__")
        ):
            raise RequestError(
                f"the prompt is {shown(self.prompt)}; give text, token ids, chat messages, or what encode_prompt gives"
            )
        if self.adapter is not None and not isinstance(self.adapter, Adapter | Registered):
            raise RequestError(
                f"adapter is {shown(self.adapter)}; give an Adapter (load_adapter makes one), what an AdapterStore has "
                "registered, or None"
            )
        for name in ("tenant", "cache_salt"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give a text, or None")
        if not isinstance(self.sampling, SamplingParams):
            raise RequestError(f"sampling is {shown(self.sampling)}; give SamplingParams(...)")
        whole("max_tokens", 1, 2**31 - 1)
        whole("n", 1, MAX_SAMPLES)
        if self.seed is not None:
            whole("seed", 0, 2**32 - 1)
        whole("priority", -(2**31), 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, 0, MAX_LOGPROBS)
        stops = self.stop
        if not isinstance(stops, tuple | list) or not all(isinstance(text, str) and text for text in stops):
            raise RequestError(f"stop is {shown(stops)}; give a sequence of texts, none of them empty")
        late = self.deadline
        if late is not None and (isinstance(late, bool) or not isinstance(late, numbers.Real) or not float(late) > 0):
            raise RequestError(f"deadline is {shown(late)}; give seconds above 0, or None")

    @property
    def token_ids(self) -> list[int]:
        """The encoded prompt's tokens."""
        if not isinstance(self.prompt, EncodedPrompt):
            raise RequestError("the prompt is not encoded yet; encode_prompt does it, and so does Engine.add")
        return self.prompt.token_ids


def _check_token_ids(token_ids: Sequence[Any]) -> None:
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    strange = [t for t in token_ids if isinstance(t, bool) or not isinstance(t, numbers.Integral)]
    if strange:
        raise RequestError(f"the prompt holds {shown(strange[0])}; token ids are integers")


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the token that is there, and of the most likely ones by token id."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What one step added to one sample.

    Attributes:
        request_id: what ``Engine.add`` returned.
        index: of the sample, from 0 to n - 1.
        token_ids: new tokens, the end token included.
        text: new text, as it stands behind the prompt; what may yet become another character, or a stop text, is held
            back.
        logprobs: raw log-probability of each new token, temperature 1.
        sampling_logprobs: log-probability of each under the distribution that it was drawn from.
        top_logprobs: for each new token, if the request asked for them.
        prompt_logprobs: of the prompt's tokens (None for the first), with the sample's first output.
        prompt_kv: of a prefill engine, with the only output of sample 0.
        finish_reason: None while it goes on; ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``.
        stop_reason: the stop text or end token that ended it.
        error: why it failed or was given up.
    """

    request_id: int
    index: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_kv: "PromptKV | None" = None
    finish_reason: str | None = None
    stop_reason: Any = None
    error: str | None = None
