"""Counters of an engine."""

import dataclasses


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
    device_failures: int = 0
    recompiles: int = 0
    finished: int = 0
    failed: int = 0
