"""The host's parts of an engine, made together: at its start, and anew when it was interrupted."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from serve.engine.admission import Admission
from serve.engine.calls import Starter
from serve.engine.config import EngineConfig
from serve.engine.observer import Observer
from serve.engine.pages import PageManager
from serve.engine.residency import Residency
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.staging import Staging
from serve.store.host import AdapterStore
from serve.store.host_copy import Known


class Parts(NamedTuple):
    """What knows of requests, pages and adapters; plain Python, but for what starts calls."""

    pages: PageManager
    adapters: Residency
    staging: Staging
    scheduler: Scheduler
    starter: Starter
    admission: Admission

    def counters(self) -> dict[str, int]:
        """Return those of ``Stats`` that are counted here."""
        return {
            "prefix_hit_tokens": self.scheduler.prefix_hit_tokens,
            "preemptions": self.scheduler.preemptions,
            "adapter_loads": self.adapters.loads,
            "adapter_waits": self.staging.waits,
            "unmarked_prompts": self.admission.unmarked_prompts,
        }

    def inherit(self, old: "Parts") -> None:
        """Take over what outlives requests: adapters that the user keeps on the host, and counters."""
        self.adapters.inherit(old.adapters)
        self.staging.waits = old.staging.waits
        self.admission.unmarked_prompts = old.admission.unmarked_prompts
        self.scheduler.preemptions = old.scheduler.preemptions
        self.scheduler.prefix_hit_tokens = old.scheduler.prefix_hit_tokens


def make_parts(
    runner: Runner,
    model: Model,
    config: EngineConfig,
    *,
    pack: Callable[[Adapter], Known],
    store: AdapterStore | None,
    observer: Observer,
    goes_ahead: bool,
    seeds: np.random.Generator,
) -> Parts:
    """Return the parts of an engine without requests; ``config`` is resolved, ``seeds`` as ``Admission`` has it."""
    pages = PageManager(runner.num_kv_pages, config.page_size or 1)
    adapters = Residency(config.bank_pages, pack, config.bank_sites, store)
    staging = Staging(adapters, runner, runner.staged_pages, observer)
    scheduler = Scheduler(
        pages,
        adapters,
        max_num_seqs=config.max_num_seqs,
        prefill_tokens=config.prefill_tokens,
        prefill_seqs=config.prefill_seqs,
        chunk_tokens=config.chunk_tokens or config.prefill_tokens,
        tile=config.tile,
        tile_entries=config.tile_entries or 1,
        decode_steps=config.decode_steps,
        goes_ahead=goes_ahead,
        prefill_sizes=runner.filled_counts,
        mixed_sizes=runner.mixed_counts,
    )
    starter = Starter(runner, scheduler, adapters, staging, observer)
    admission = Admission(model, config, pages, adapters.knows, str(runner.kv_dtype), runner.stored_adapters, seeds)
    if store is not None:
        if store.dtype != runner.adapter_dtype:
            raise ConfigError(
                f"the store has rank pages in {store.dtype} and the engine takes {runner.adapter_dtype}: give "
                "AdapterFiles the engine's adapter_dtype (else its bank_dtype) as dtype"
            )
        store.check = admission.check_config
    return Parts(pages, adapters, staging, scheduler, starter, admission)
