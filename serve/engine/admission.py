"""From requests to sequences: what is checked, what is edited, and which seeds are drawn from, once and for all."""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import extend_edit_mask, lacks_marker, sequence_edit_mask
from preft_jax.adapters.fold import FOLD_VERSION
from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.errors import AdapterError, RequestError
from preft_jax.loading import Model, check_base, check_made_for
from preft_jax.sampling.parameters import derived_seed
from preft_jax.text.chat import EncodedPrompt, encode_prompt
from preft_jax.text.streams import TextStream
from serve.engine.config import EngineConfig
from serve.engine.handover import check_handover
from serve.engine.outputs import Sample
from serve.engine.pages import PageManager
from serve.engine.prefix import PageKeys, adapter_salt, cache_salt
from serve.engine.request import Request
from serve.engine.sequence import NO_TOKEN, Sequence, Status
from serve.store.names import Registered

_log = logging.getLogger("preft.engine")


def encoded(model: Model, request: Request) -> Request:
    """Return a request whose prompt is encoded.

    Raises:
        RequestError: if it is no prompt.
    """
    if isinstance(request.prompt, EncodedPrompt):
        return request
    prompt = encode_prompt(model.tokenizer, request.prompt, vocab_size=model.config.vocab_size)
    return dataclasses.replace(request, prompt=prompt)


class Admission:
    """Checks requests against an engine's model and sizes.

    Args:
        model: that is served.
        config: sizes.
        pages: of the KV cache.
        knows: whether an adapter, by its digest, is on the host: it was checked then.
        kv_dtype: of the cache.
        adapter_dtype: of rank pages, on the host and in the bank.
        seeds: of which requests without one get theirs, in the order of their arrival.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        pages: PageManager,
        knows: Callable[[str], bool],
        kv_dtype: str,
        adapter_dtype: str,
        seeds: np.random.Generator,
    ):
        self._model = model
        self._config = config
        self._pages = pages
        self._knows = knows
        self._kv_dtype = kv_dtype
        self._adapter_dtype = adapter_dtype
        self._seeds = seeds
        # Requests whose prompts lack the marker of their adapter, and adapters of which the log says so.
        self.unmarked_prompts = 0
        self._unmarked: set[str] = set()

    def sequences(self, request: Request, request_id: int) -> list[Sequence]:
        """Check a request and return its samples.

        Raises:
            RequestError, AdapterError: if it can never be served.
        """
        self._check_sizes(request)
        prefix = 0 if request.adapter is None else request.adapter.config.prefix_length
        prompt, sampling, given = request.token_ids, request.sampling, request.handover
        entries = 0 if request.adapter is None else self.check_adapter(request.adapter)
        if given is None:
            mask, edited_by = self._mask(request), None if request.adapter is None else request.adapter.digest
            self._note_marker(request)
        else:
            check_handover(given, request, self._model, self._kv_dtype, self._config.role)
            mask = extend_edit_mask(given.prompt.edit_mask, request.max_tokens, "prompt")
            edited_by = given.prompt.adapter
        eos = () if sampling.ignore_eos else self._model.config.eos_token_ids
        salt = cache_salt(base=self._model.kv_digest, kv_dtype=self._kv_dtype, salt=request.cache_salt)
        edits = None
        if edited_by is not None:
            stored = self._adapter_dtype if given is None else given.prompt.adapter_dtype
            edits = adapter_salt(digest=edited_by, fold_version=FOLD_VERSION, adapter_dtype=stored)
        first_seed = self._first_seed(request)
        sequences = []
        for index in range(request.n):
            keys = PageKeys(salt, self._pages.page_size, edits) if self._config.prefix_caching else None
            sequence = Sequence(
                request_id=request_id,
                index=index,
                tenant=request.tenant,
                order=request_id,
                priority=request.priority,
                tokens=[NO_TOKEN] * prefix + list(prompt) if given is None else [*prompt, given.first[index].token_id],
                prompt_len=prefix + len(prompt),
                prefix=prefix,
                mask=mask,
                max_tokens=1 if self._config.role == "prefill" else request.max_tokens,
                stop_ids=frozenset((*eos, *sampling.stop_token_ids)),
                sampling=sampling,
                seed=derived_seed(first_seed, index),
                logprobs=request.logprobs,
                adapter=None if request.adapter is None else request.adapter.digest,
                entries=entries,
                all_token=not prefix and bool(mask[len(prompt) :].any()),
                keys=keys,
                score=request.prompt_logprobs is not None and index == 0 and given is None,
                prompt_kv=None if given is None else given.prompt,
                status=Status.FORKING if index and given is None else Status.NEW,
            )
            sequences.append(sequence)
        if given is None:
            sequences[0].followers = sequences[1:]
        sequences[0].page_keys(prefix + len(prompt) - 1)  # Hashed now, and not for many sequences in one step.
        return sequences

    def _check_sizes(self, request: Request) -> None:
        """Raise ``RequestError`` for a prompt that the model or the engine's sizes do not allow."""
        prompt, model = request.token_ids, self._model.config
        prefix = 0 if request.adapter is None else request.adapter.config.prefix_length
        longest = prefix + len(prompt) + request.max_tokens
        if longest > self._config.max_model_len:
            behind = f" behind a learned prefix of {prefix}" if prefix else ""
            raise RequestError(
                f"the prompt has {len(prompt)} tokens{behind} and max_tokens is {request.max_tokens}: together more "
                f"than max_model_len {self._config.max_model_len}; shorten the prompt, or raise max_model_len"
            )
        if longest > self._pages.num_pages * self._pages.page_size:
            raise RequestError(
                f"the request needs room for {longest} tokens and the whole KV cache holds "
                f"{self._pages.num_pages * self._pages.page_size}; lower max_tokens, or raise num_kv_pages"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise RequestError(
                f"the prompt holds token ids outside 0 to {model.vocab_size - 1}, the model's vocabulary"
            )
        if request.prompt_logprobs is not None and not self._config.scoring and request.handover is None:
            raise RequestError("prompt_logprobs is not served by this engine; make it with EngineConfig(scoring=True)")
        if request.stop and self._model.tokenizer is None:
            raise RequestError("stop texts need a tokenizer, and this model has none; use stop_token_ids")

    def _first_seed(self, request: Request) -> int:
        """Return the seed of which those of a request's samples are derived."""
        if request.handover is not None:
            return request.handover.prompt.seed
        given = (seed for seed in (request.sampling.seed, request.seed) if seed is not None)
        first_seed = next(given, None)
        return int(self._seeds.integers(2**32)) if first_seed is None else first_seed

    def _mask(self, request: Request) -> np.ndarray:
        """Return which tokens are edited, those that may be generated included; with a learned prefix, all."""
        assert isinstance(request.prompt, EncodedPrompt)
        config = None if request.adapter is None else request.adapter.config
        mask_TG = sequence_edit_mask(request.prompt, config, request.max_tokens, own=request.edit_mask)
        if config is None or not config.prefix_length:
            return mask_TG
        return np.concatenate([np.repeat(mask_TG[:1], config.prefix_length, axis=0), mask_TG])

    def _note_marker(self, request: Request) -> None:
        """Count a prompt that lacks its adapter's marker, and log it once for each adapter."""
        assert isinstance(request.prompt, EncodedPrompt)
        if request.adapter is None or request.edit_mask is not None:
            return
        if lacks_marker(request.prompt, request.adapter.config):
            self.unmarked_prompts += 1
            if request.adapter.digest not in self._unmarked:
                self._unmarked.add(request.adapter.digest)
                _log.warning(
                    "a prompt for the adapter %s lacks its alora_invocation_tokens %s: nothing is edited, the base "
                    "model answers; stats.unmarked_prompts counts such prompts",
                    request.adapter.digest[:12], list(request.adapter.config.alora_invocation_tokens or ()),
                )  # fmt: skip

    def sample(self, request: Request) -> Sample:
        """Return what is kept of one of a request's samples for its outputs."""
        stop = () if self._config.role == "prefill" else request.stop  # It ends with its first token in any case.
        text = TextStream(self._model.tokenizer, stop, continues=True)
        return Sample(text=text, prompt_logprobs=request.prompt_logprobs)

    def check_adapter(self, adapter: Adapter | Registered) -> int:
        """Return how many rank pages an adapter puts on a tile's list.

        Raises:
            AdapterError: if it can never be served, or is of another base model.
        """
        if isinstance(adapter, Adapter):
            # The digest needs every leaf: it is not asked for before they were checked.
            has_digest = "digest" in vars(adapter)
            if not has_digest or not self._knows(adapter.digest):
                check_base(adapter, self._model)
        return self.check_config(adapter.config)

    def check_config(self, config: AdapterConfig) -> int:
        """``check_adapter`` by its configuration alone, which is what is known of a name of an earlier run."""
        if self._config.role == "decode":
            raise AdapterError(
                "this engine decodes what others prefilled, and has no adapters; send the request to one that prefills "
                "(a server of --role prefill)"
            )
        check_made_for(config, self._model)
        if config.prefix_length and self._config.role == "prefill":
            raise AdapterError(
                "the adapter has a learned prefix, and learned prefixes are not handed over; serve them with role both"
            )
        if not config.prefill_only and self._config.role == "prefill":
            raise AdapterError(
                "the adapter edits every token (positions 'all', as an adapter of PEFT does unless it says otherwise), "
                "and what this engine prefills is decoded by engines without adapters; serve it by one of role both"
            )
        if not config.prefill_only and not self._config.all_token:
            raise AdapterError(
                "the adapter edits every token (positions 'all', as an adapter of PEFT does unless it says otherwise) "
                "and this engine serves prompt-only adapters; make it with EngineConfig(all_token=True), a server "
                "with --all-token"
            )
        return self._check_pages(config)

    def _check_pages(self, config: AdapterConfig) -> int:
        engine = self._config
        counts = adapter_page_counts(config, self._model.config)
        if missing := [site for site in counts if site not in engine.bank_sites]:
            raise AdapterError(
                f"the adapter edits {', '.join(missing)} and the engine serves edits of "
                f"{', '.join(engine.bank_sites)}; name them in bank_sites (a server's --bank-sites)"
            )
        most, most_served = max(counts.values(), default=0), engine.tile_entries or 1
        entries = 0 if config.prefix_length else most
        if entries > most_served:
            raise AdapterError(
                f"the adapter takes {most} rank pages of 16 and the engine serves up to {most_served}; raise "
                "max_rank (a server's --max-lora-rank), or use an adapter of lower rank"
            )
        if most > engine.bank_pages - 1:
            raise AdapterError(
                f"the adapter takes {most} rank pages and the bank has {engine.bank_pages - 1}; raise bank_pages (a "
                "server's --bank-pages)"
            )
        return entries
