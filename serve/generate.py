"""``generate``: text for library users, each prompt with an adapter of its own or none, over the engine."""

from collections.abc import Sequence
from typing import Any

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.errors import ConfigError, ModelError, RequestError, check_type, shown
from preft_jax.loading import Model, check_base
from preft_jax.models.batch import bucket
from preft_jax.prompts import as_list, per_prompt
from preft_jax.sampling.parameters import SamplingParams, derived_seed
from preft_jax.shapes import BANK_SITES, PREFIX, RANK_PAGE, SITES
from serve.engine.admission import encoded
from serve.engine.completion import Completion as Completion
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request


def generate(
    model: Model,
    prompts: Any,
    adapters: Any = None,
    sampling: Any = SamplingParams(),
    max_tokens: int = 64,
    *,
    max_num_seqs: int = 16,
    seed: int = 0,
    edit_masks: Any = None,
) -> list[Completion]:
    """Generate for one prompt or many, each with its own adapter or none.

        generate(model, ["Hello", [{"role": "user", "content": "Hi"}]], adapters=[None, adapter])

    Args:
        model: from ``load_model``.
        prompts: a list of prompts, each a string, a list of token ids, or a list of chat messages
            (``{"role": ..., "content": ...}``). One string, or one list of messages, stands for a list of one.
        adapters: one ``Adapter`` for all, or a list with one (or None, the base model) for each prompt.
        sampling: one ``SamplingParams`` for all, or one for each.
        max_tokens: generate at most this many tokens for each.
        max_num_seqs: prompts that run together; more wait.
        seed: a request whose own seed is None gets one derived from ``seed`` and its index; the first has ``seed``.
        edit_masks: a list with one mask for each prompt (or None: what its adapter's rule says): bool ``[P]``.

    Returns:
        One ``Completion`` for each prompt, in order.

    Raises:
        RequestError: for a prompt that is empty or too long, or wrong counts; nothing has run then.
        AdapterError: for an adapter of another base model.
        ModelError: if ``model`` is no ``Model``.
    """
    check_type("model", model, Model, "what load_model returns", ModelError)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RequestError(f"seed is {shown(seed)}; give an integer from 0 to 2**32 - 1")
    prompts = as_list(prompts)
    if not prompts:
        return []
    requests = [
        Request(
            prompt=one, adapter=adapter, sampling=own, max_tokens=max_tokens, seed=derived_seed(seed, i), edit_mask=mask
        )
        for i, (one, adapter, own, mask) in enumerate(
            zip(
                prompts,
                per_prompt(adapters, len(prompts), "adapters"),
                per_prompt(sampling, len(prompts), "sampling"),
                per_prompt(edit_masks, len(prompts), "edit_masks"),
                strict=True,
            )
        )
    ]
    return run(model, requests, max_num_seqs=max_num_seqs)


def run(model: Model, requests: Sequence[Request], *, max_num_seqs: int = 16) -> list[Completion]:
    """Serve requests on an engine made for them; return their completions in order, as ``Engine.generate`` does.

    Raises:
        RequestError, AdapterError: for the first that can never be served; nothing has run then.
    """
    requests = [encoded(model, request) for request in requests]
    return Engine(model, config_for(model, requests, max_num_seqs=max_num_seqs)).generate(requests)


def config_for(model: Model, requests: Sequence[Request], *, max_num_seqs: int) -> EngineConfig:
    """Return sizes that fit these requests, rounded up, so that calls with like ones share compiled programs.

    The bank holds the adapters of as many requests as run together, the largest of them.

    Raises:
        ConfigError: for a ``max_num_seqs`` that is no positive integer.
        RequestError: if a request is longer than the model.
        AdapterError: for an adapter that is not of this model.
    """
    if isinstance(max_num_seqs, bool) or not isinstance(max_num_seqs, int) or max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs is {max_num_seqs!r}; give an integer of at least 1")
    longest = max(_length(request) for request in requests)
    most = model.config.max_position_embeddings
    if longest > most:
        raise RequestError(
            f"the longest prompt with its max_tokens has {longest} tokens; the model has {most} positions"
        )
    size = min(max_num_seqs, bucket(len(requests)))
    given = {id(r.adapter): r.adapter for r in requests if isinstance(r.adapter, Adapter)}
    for adapter in given.values():
        check_base(adapter, model)  # The digest needs every leaf.
    adapters = {adapter.digest: adapter for adapter in given.values()}
    counts = [adapter_page_counts(adapter.config, model.config) for adapter in adapters.values()]
    pages = sorted((max(count.values(), default=0) for count in counts), reverse=True)
    return EngineConfig(
        max_num_seqs=size,
        max_model_len=min(bucket(longest, 64), most),
        prefill_seqs=min(size, 8),
        max_rank=RANK_PAGE * bucket(max(pages, default=1)),
        bank_pages=bucket(sum(pages[:size]) + 1),
        bank_sites=BANK_SITES if any(PREFIX in count for count in counts) else SITES,
        all_token=any(not adapter.config.prefill_only for adapter in adapters.values()),
        prefix_caching=False,
    )


def _length(request: Request) -> int:
    prefix = 0 if request.adapter is None else request.adapter.config.prefix_length
    return prefix + len(request.token_ids) + request.max_tokens
