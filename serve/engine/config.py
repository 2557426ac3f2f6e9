"""Sizes of an engine."""

import dataclasses

from preft_jax.errors import ConfigError, shown
from preft_jax.shapes import ADAPTER_DTYPES, BANK_SITES, DTYPES, KV_DTYPES, PREFIX, RANK_PAGE, SITES

_DTYPES = {"kv_dtype": KV_DTYPES, "bank_dtype": DTYPES, "adapter_dtype": ADAPTER_DTYPES}

ROLES = ("both", "prefill", "decode")
"""What an engine does of a request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and switches of an ``Engine``; all in tokens or counts. None: what suits the backend.

    Attributes:
        max_num_seqs: sequences that run together.
        max_model_len: prompt plus generated tokens of one sequence, learned positions in front of it included.
        page_size: tokens of a KV page (16 on a CPU, else 64).
        num_kv_pages: pages of the KV cache (room for ``max_num_seqs`` full sequences, or what
            ``memory_utilization`` leaves).
        memory_utilization: part of an accelerator's memory that the engine may take.
        prefill_tokens: tokens of the largest prefill call.
        prefill_seqs: sequences in one prefill call.
        chunk_tokens: tokens of one sequence in one prefill call.
        tile: tokens that share one list of rank pages (64).
        tile_entries: rank pages that one list may hold (as many as ``max_rank`` takes); every tile pays for all.
        max_rank: largest rank of an adapter, over its position groups together.
        bank_pages: rank pages for each layer and site, the null page included; 1: no adapters.
        bank_sites: what adapters may edit, of q, k, v, o, gate, up, down and block (all of these), and ``prefix`` for
            learned prefixes (one program more); what none edits leaves its memory to the KV cache.
        all_token: whether all-token adapters are served (one program more).
        kv_dtype: of the KV cache: ``float32``, ``bfloat16``, ``float16`` or ``fp8`` (that of the weights).
        bank_dtype: of rank pages in the bank: one of the first three (that of the weights).
        adapter_dtype: of rank pages in host memory, on disk and on their way to the bank: ``fp8``, with a scale for
            each rank of A and of B (that of the bank).
        reserved_bytes: of an accelerator's memory, left to other work (training beside serving, say), which leases it
            from ``Engine.memory``.
        scoring: whether ``prompt_logprobs`` is served (one program more).
        mixed_tokens: tokens of the largest call in which running sequences take a decode step beside chunks of prompts,
            both counted; 0: prompts and decode steps have calls of their own. A multiple of four tiles.
        decode_steps: decode steps between two looks at the prompts that wait, while none can go on: of one call, or
            of two that are under way together.
        prefix_caching: keep the KV of finished sequences for requests that begin alike.
        role: ``both``; ``prefill``: requests end with their first token and are handed over; ``decode``: they are taken
            over, and there are no adapters (``serve.engine.handover``).
    """

    max_num_seqs: int = 16
    max_model_len: int = 512
    page_size: int | None = None
    num_kv_pages: int | None = None
    memory_utilization: float = 0.9
    prefill_tokens: int = 512
    prefill_seqs: int = 8
    chunk_tokens: int | None = None
    tile: int = 64
    tile_entries: int | None = None
    max_rank: int = 64
    bank_pages: int = 1
    bank_sites: tuple[str, ...] = SITES
    all_token: bool = False
    scoring: bool = False
    mixed_tokens: int = 0
    decode_steps: int = 8
    prefix_caching: bool = True
    kv_dtype: str | None = None
    bank_dtype: str | None = None
    adapter_dtype: str | None = None
    reserved_bytes: int = 0
    role: str = "both"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "memory_utilization":
                if not isinstance(value, int | float) or not 0 < value <= 1:
                    raise ConfigError(f"memory_utilization is {shown(value)}; it must be above 0 and at most 1")
            elif field.name == "bank_sites":
                if not isinstance(value, tuple | list) or not value or any(site not in BANK_SITES for site in value):
                    raise ConfigError(f"bank_sites is {shown(value)}; give a tuple of some of {', '.join(BANK_SITES)}")
                object.__setattr__(self, field.name, tuple(site for site in BANK_SITES if site in value))
            elif field.name in _DTYPES:
                allowed = _DTYPES[field.name]
                if value is not None and value not in allowed:
                    raise ConfigError(f"{field.name} is {shown(value)}; allowed: {', '.join(allowed)}, or None")
            elif field.name == "role":
                if value not in ROLES:
                    raise ConfigError(f"role is {shown(value)}; allowed: {', '.join(ROLES)}")
            elif isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name} is {shown(value)}; it must be True or False")
            elif value == field.default and not value:
                continue  # Nothing is asked for.
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {shown(value)}; it must be an integer of at least 1")

    def resolve(self, backend: str) -> "EngineConfig":
        """Return the config with everything set that depends on the backend, but the number of KV pages."""
        entries = self.tile_entries or -(-self.max_rank // RANK_PAGE)
        chunk = min(self.chunk_tokens or self.prefill_tokens, self.prefill_tokens)
        if self.prefill_tokens % self.tile:
            raise ConfigError(f"prefill_tokens {self.prefill_tokens} is not a multiple of tile {self.tile}")
        if self.mixed_tokens % (4 * self.tile) or self.mixed_tokens > self.prefill_tokens:
            raise ConfigError(
                f"mixed_tokens is {self.mixed_tokens}; give 0, or a multiple of four tiles ({4 * self.tile}) up to "
                f"prefill_tokens {self.prefill_tokens}"
            )
        if self.role != "both" and self.all_token:
            raise ConfigError(
                f"all_token is on, and role is {self.role}: adapters of all tokens edit what is decoded; serve them "
                "with role both"
            )
        if self.role == "prefill" and PREFIX in self.bank_sites:
            raise ConfigError(
                f"bank_sites has {PREFIX!r}, and role is prefill: learned prefixes are not handed over; serve them "
                "with role both"
            )
        if self.role == "decode" and self.bank_pages > 1:
            raise ConfigError(
                f"bank_pages is {self.bank_pages}, and role is decode, which has no adapters; leave it out"
            )
        if self.role == "prefill" and self.mixed_tokens:
            raise ConfigError(
                f"mixed_tokens is {self.mixed_tokens}, and role is prefill: nothing is decoded; leave it out"
            )
        if self.mixed_tokens and (self.all_token or self.scoring):
            raise ConfigError("mixed_tokens needs an engine without all_token and scoring: their programs do not mix")
        return dataclasses.replace(
            self, page_size=self.page_size or (16 if backend == "cpu" else 64), tile_entries=entries, chunk_tokens=chunk
        )
