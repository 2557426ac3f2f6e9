"""Counters of an engine."""

import dataclasses
from collections.abc import Sequence as Many

import numpy as np

from preft_jax.sampling.rows import Drawn
from serve.engine.plan import Step


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Counters since the engine was made; seconds are those from the start of a call until its results were there."""

    prefill_calls: int = 0
    prefill_seconds: float = 0.0
    mixed_calls: int = 0
    mixed_seconds: float = 0.0
    decode_calls: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_waits: int = 0
    unmarked_prompts: int = 0
    device_failures: int = 0
    recompiles: int = 0
    finished: int = 0
    failed: int = 0

    def started(self, step: Step) -> None:
        """Count a call."""
        self.prefill_calls += step.kind == "prefill"
        self.mixed_calls += step.kind == "mixed"
        self.decode_calls += step.kind == "decode"

    def over(self, step: Step, seconds: float, drawn: Many[Drawn]) -> None:
        """Add what a call took and computed."""
        self.prompt_tokens += sum(chunk.end - chunk.start for chunk in step.chunks)
        if step.kind == "prefill":
            self.prefill_seconds += seconds
        elif step.kind == "mixed":
            self.mixed_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.decode_steps += max(int((np.asarray(d.token_NB) != -1).any(axis=1).sum()) for d in drawn)
