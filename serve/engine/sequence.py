"""One sample of a request on its way through the engine: plain host state."""

import dataclasses
import enum
from typing import TYPE_CHECKING

import numpy as np

from preft_jax.sampling.parameters import SamplingParams
from serve.engine.prefix import PageKeys

if TYPE_CHECKING:
    from serve.engine.handover import PromptKV

NO_TOKEN = -1
"""Stands for a position of a learned prefix: its keys and values come from an adapter."""


class Status(enum.Enum):
    """Where a sequence is."""

    NEW = "new"
    """Not in the queue yet: its adapter may be on its way to the host."""
    WAITING = "waiting"
    FORKING = "forking"
    """Waits for the prefill of the first sample of its request."""
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt, what was generated for it so far, and the KV pages that hold it.

    Attributes:
        request_id, index: which request, and which of its samples.
        tenant: whose it is; the queue is fair between tenants.
        order: of arrival; with ``priority`` it decides who goes first.
        tokens: prompt and generated token ids; in front of them, ``NO_TOKEN`` for each position of a learned prefix.
        prompt_len: tokens of the prompt, and of a prefix.
        prefix: positions of a learned prefix.
        mask: bool ``[prompt_len + max_tokens, G]``: which tokens are edited, generated ones included, decided when the
            request was admitted and never again.
        max_tokens: at most so many are generated.
        stop_ids: end tokens.
        sampling: how its tokens are drawn.
        seed: of its draws.
        logprobs: most likely tokens that are wanted at each step; None: not even the drawn one's log-probability.
        adapter: digest of its adapter, or None.
        entries: rank pages that the adapter puts on a tile's list.
        all_token: whether its adapter also edits generated tokens.
        keys: content keys of its pages; None: its KV is neither looked up nor kept for others.
        score: whether log-probabilities of its prompt are wanted.
        prompt_kv: KV of its prompt that another engine computed; it is written to pages whenever they are allotted.
        followers: samples that fork from it when it is prefilled.
        pages: KV pages in order.
        computed: tokens whose KV is in the cache.
        started: the same with those that calls under way compute, of a prompt.
        drawing: tokens that calls under way may draw for it.
        slot: its place among the sequences that run, on the device.
        registered: pages that others can find.
        ticket: its place in the queue among sequences of one rank.
        deferred: whether a step was planned without it, beside which its adapter is copied.
        awaits: a sequence that computes pages which this one needs, and the last of them.
        overtaken: calls that took others with adapters before it, since its own found no room.
        holds_adapter: whether it keeps its adapter on the device.
        cohort: sequences whose device call failed together are run apart from others until a call succeeds.
        strikes: how often a call of it alone failed.
    """

    request_id: int
    index: int = 0
    tenant: str | None = None
    order: int
    priority: int = 0
    tokens: list[int]
    prompt_len: int
    prefix: int = 0
    mask: np.ndarray
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    logprobs: int | None = None
    adapter: str | None = None
    entries: int = 0
    all_token: bool = False
    keys: PageKeys | None = None
    score: bool = False
    prompt_kv: "PromptKV | None" = None
    followers: list["Sequence"] = dataclasses.field(default_factory=list)
    status: Status = Status.NEW
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    started: int = 0
    drawing: int = 0
    slot: int = -1
    registered: int = 0
    ticket: int = 0
    deferred: bool = False
    awaits: "tuple[Sequence, int] | None" = None
    overtaken: int = 0
    holds_adapter: bool = False
    cohort: tuple[str, int] | None = None
    strikes: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.priority, self.order

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.prompt_len + self.max_tokens - len(self.tokens)

    @property
    def given(self) -> int:
        """Tokens whose KV another engine computed."""
        return 0 if self.prompt_kv is None else self.prompt_len

    @property
    def undrawn(self) -> int:
        """Tokens that may still be generated beyond those that calls under way may draw."""
        return self.remaining - self.drawing

    def page_keys(self, num_tokens: int) -> list[bytes]:
        """Return the content keys of the full pages among the first ``num_tokens`` tokens."""
        return [] if self.keys is None else self.keys.keys(self.tokens, self.mask, num_tokens)
