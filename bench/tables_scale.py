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


def capacity(figures: dict[str, Any]) -> str:
    """Replicas for users, and what they hold, move and cost."""
    rows = [
        [
            f"{row['users']:,}",
            row["kind"],
            row["policy"],
            f"**{row['replicas']:,}**",
            f"{row['host_hit_rate']:.0%}",
            f"{row['host_memory_gib'] / 1024:,.2f}",
            f"{row['network_gbit_per_replica']:.1f}",
            f"{row['p99_ttft_ms']:,.0f}",
            f"{row['p99_tpot_ms']:.1f}",
            f"{row['usd_per_million_output_tokens']:.2f}",
        ]
        for row in figures["rows"]
    ]
    header = [
        "users", "adapters", "routing", "replicas", "found in host memory", "host memory in all, TiB",
        "network, Gbit/s a replica", "TTFT p99, ms", "TPOT p99, ms", "$ / million output tokens",
    ]  # fmt: skip
    told = (
        "{requests_per_hour:g} requests an hour and user; {host_memory_gib:g} GiB for adapters and {network_gbit:g} "
        "Gbit/s a replica; ${gpu_hour_usd:g} a GPU and hour; {target:.0%} of requests within TTFT {ttft_ms:,.0f} ms "
        "and TPOT {tpot_ms:g} ms"
    ).format(**figures["options"])
    return f"{markdown(header, rows)}\n{told}; commit {figures['commit']}, {figures['date']}.\n"


def compared(figures: dict[str, Any]) -> str:
    """What the model makes of measured runs."""
    named = {
        "request_throughput": "requests/s", "device_seconds": "device, s", "mean_tpot_ms": "mean TPOT, ms",
        "mean_ttft_ms": "mean TTFT, ms",
    }  # fmt: skip
    rows = []
    for row in figures["compared"]:
        pairs = (row[name] for name in named)
        rows.append([f"{row['run']}, {row['mode']}", *(f"{p['model']:.1f} ({p['measured']:.1f})" for p in pairs)])
    return markdown(["run of the trace", *(f"{told}: model (measured)" for told in named.values())], rows)
