"""``generate``: text for library users, each prompt with an adapter of its own or none."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.errors import ConfigError, RequestError
from preft_jax.generator import Completion, Generator, Limits, Request, check_base, check_request
from preft_jax.loading import Model
from preft_jax.models.batch import bucket, round_up
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import encode_prompt


def _per_prompt(values: Any, count: int, what: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise RequestError(f"{what} has {len(values)} entries for {count} prompts; give one for all, or one for each")
    return list(values)


def generate(
    model: Model,
    prompts: Any,
    adapters: Any = None,
    sampling: Any = SamplingParams(),
    max_tokens: int = 64,
    *,
    max_num_seqs: int = 16,
    seed: int = 0,
) -> list[Completion]:
    """Generate for one prompt or many, each with its own adapter or none.

    Args:
        model: from ``load_model``.
        prompts: a list of prompts, each a string, a list of token ids, or a list of chat messages
            (``{"role": ..., "content": ...}``). One string, or one list of messages, stands for a list of one.
        adapters: one ``Adapter`` for all, or a list with one (or None, the base model) for each prompt.
        sampling: one ``SamplingParams`` for all, or one for each.
        max_tokens: generate at most this many tokens for each.
        max_num_seqs: prompts decoded together; more are done in turn.
        seed: where a request's own seed is None, it gets ``seed`` plus its index.

    Returns:
        One ``Completion`` for each prompt, in order.

    Raises:
        RequestError: for a prompt that is empty or too long, or wrong counts; nothing has run then.
        AdapterError: for an adapter of another base model.
    """
    prompts = _as_list(prompts)
    if not prompts:
        return []
    if not isinstance(max_num_seqs, int) or max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs is {max_num_seqs!r}; give an integer of at least 1")
    encoded = [encode_prompt(model.tokenizer, prompt, vocab_size=model.config.vocab_size) for prompt in prompts]
    each_adapter = _per_prompt(adapters, len(prompts), "adapters")
    each_sampling = _per_prompt(sampling, len(prompts), "sampling")
    requests = [
        Request(
            prompt=e,
            adapter=a,
            sampling=s,
            max_tokens=max_tokens,
            seed=(seed + i) % 2**32,
        )
        for i, (e, a, s) in enumerate(zip(encoded, each_adapter, each_sampling, strict=True))
    ]
    for request in requests:
        check_request(request)
        if request.adapter is not None:
            check_base(request.adapter, model)
    generator = Generator(model, limits_for(model, requests, max_num_seqs=max_num_seqs))
    done = dict(generator.run(requests))
    return [done[i] for i in range(len(requests))]


def _as_list(prompts: Any) -> list[Any]:
    """Return a list of prompts; one text, one sequence of token ids and one list of messages count as one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise RequestError(
            f"prompts is of type {type(prompts).__name__}; give text, token ids, messages, or a list of them"
        )
    one = len(prompts) > 0 and isinstance(prompts[0], Mapping | numbers.Integral)
    return [prompts] if one else list(prompts)


def limits_for(model: Model, requests: Sequence[Request], *, max_num_seqs: int) -> Limits:
    """Return limits that fit these requests: the longest of them, and a bank for the adapters of the fullest batch."""
    longest = max(len(r.prompt.token_ids) + r.max_tokens for r in requests)
    most = model.config.max_position_embeddings
    if longest > most:
        raise RequestError(
            f"the longest prompt with its max_tokens has {longest} tokens; the model has {most} positions"
        )
    size = min(max_num_seqs, bucket(len(requests)))
    pages = 0
    for at in range(0, len(requests), size):
        adapters = {r.adapter.digest: r.adapter for r in requests[at : at + size] if r.adapter is not None}
        counts = [adapter_page_counts(adapter.config, model.config) for adapter in adapters.values()]
        pages = max(pages, sum(max(count.values(), default=0) for count in counts))
    return Limits(
        max_num_seqs=size,
        max_model_len=min(round_up(longest, 64), most),
        bank_pages=bucket(pages + 1),
        prefill_seqs=min(size, 8),
    )
