"""Tables of what several devices and servers need: made from measured figures by arithmetic."""

from typing import Any

from bench.table_parts import machine, markdown
from preft_jax.config import PRESETS

LINKS = (10, 100, 400)
"""Gigabits a second."""

_PROMPT = 1024


def handover(figures: dict[str, Any]) -> str:
    """What a prefill engine sends: bytes of KV, at the speed at which it was measured to prefill with adapters."""
    options, config = figures["options"], PRESETS[figures["options"]["model"]]
    row = next(row for row in figures["rows"] if row["mode"] == "prefill-only")
    speed = row["prefill_tokens_per_s"]
    rows = []
    for name, size in (("bfloat16", 2), ("fp8", 1)):
        token = 2 * config.num_hidden_layers * config.kv_size * size
        over = [f"{_PROMPT * token * 8e-6 / link:,.1f}" for link in LINKS]
        rows.append([name, f"{token / 1024:.0f}", *over, f"{token * speed * 8e-9:.0f}"])
    header = [
        f"KV of {options['model']}",
        "KiB a token",
        *(f"{_PROMPT:,} tokens over {link} Gbit/s, ms" for link in LINKS),
        "all that one GPU prefills, Gbit/s",
    ]
    what = f"{speed:,.0f} prompt tokens/s, {row['num_adapters']} adapters"
    return f"{markdown(header, rows)}\n{what}: {machine(figures)}.\n"
