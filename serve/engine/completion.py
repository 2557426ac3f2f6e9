"""``Completion``: all that came of one sample, and how an engine is stepped until requests are done."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preft_jax.errors import RequestError, shown
from serve.engine.request import Output, Request, TokenLogprobs

if TYPE_CHECKING:
    from serve.engine.engine import Engine
    from serve.engine.handover import PromptKV


@dataclasses.dataclass(kw_only=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: decoded tokens, special tokens and the end token left out; empty without a tokenizer.
        token_ids: generated tokens, the end token included.
        logprobs: raw log-probability of each, temperature 1.
        sampling_logprobs: log-probability of each under the distribution that it was drawn from.
        finish_reason: ``"stop"`` (an end token), ``"length"``, ``"abort"``, or ``"error"``: the model's logits were not
            numbers (its weights or the adapter overflow); other prompts are not affected.
        error: why it is ``"error"`` or ``"abort"``.
        stop_reason: the stop text or end token that ended it.
        index: of the sample among its request's, from 0.
        top_logprobs: of each generated token, if the request asked for ``logprobs``.
        prompt_logprobs: of the prompt's tokens (None for the first), if the request asked for them: sample 0 has them.
        prompt_kv: of a prefill engine: sample 0 has it.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    error: str | None = None
    stop_reason: Any = None
    index: int = 0
    top_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_kv: "PromptKV | None" = None

    def take(self, output: Output) -> None:
        """Add what one step brought."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.sampling_logprobs += output.sampling_logprobs
        self.finish_reason, self.error = output.finish_reason or "", output.error
        self.stop_reason = output.stop_reason
        if output.top_logprobs is not None:
            self.top_logprobs = [*(self.top_logprobs or ()), *output.top_logprobs]
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.prompt_kv = output.prompt_kv or self.prompt_kv


def complete(engine: "Engine", requests: Sequence[Request]) -> list[Completion]:
    """Step an engine that is idle until requests are done; see ``Engine.generate``."""
    if isinstance(requests, Request) or not all(isinstance(request, Request) for request in requests):
        strange = requests if isinstance(requests, Request) else next(r for r in requests if not isinstance(r, Request))
        raise RequestError(f"requests holds {shown(strange)}; give a list of Request(prompt=...)")
    ids: list[int] = []
    try:
        for request in requests:
            ids.append(engine.add(request))
        order = [(one, index) for one, request in zip(ids, requests, strict=True) for index in range(request.n)]
        done = {key: Completion(index=key[1]) for key in order}
        while engine.has_work:
            for output in engine.step():
                if (output.request_id, output.index) in done:
                    done[output.request_id, output.index].take(output)
    except BaseException:
        # Nothing of them is left for a later call.
        for request_id in ids:
            engine.cancel(request_id)
        while ids and engine.has_work:
            engine.step()
        raise
    return [done[key] for key in order]
