"""Tables of single programs and of the headline, which stand beside their floors."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from bench.table_parts import RESULTS, contender, machine, markdown

_OURS = ("triton", "pallas_tpu")
_PEERS = ("ragged_dot", "cudnn_paged", "cudnn_contiguous")


def kernels(figures: dict[str, Any]) -> str:
    """Each kernel's time, floor and ratio to it, beside plain XLA and the fastest peer."""
    rows = []
    for row in figures["cases"]:
        timed = {name: result for name, result in row["results"].items() if "us" in result}
        ours = next((timed[name] for name in _OURS if name in timed), None)
        peers = {name: timed[name] for name in _PEERS if name in timed}
        fastest = min(peers, key=lambda name: peers[name]["us"], default=None)
        rows.append(
            [
                row["case"],
                f"{row['floor_us']:.0f} ({row['bound']})",
                f"**{ours['us']:.0f}**" if ours else "",
                f"{ours['ratio_to_floor']:.2f}" if ours else "",
                f"{timed['xla']['us']:.0f}" if "xla" in timed else "",
                f"{peers[fastest]['us']:.0f} ({fastest})" if fastest else "",
            ]
        )
    ceilings = figures["ceilings"]
    rates = ", ".join(f"{rate:g} TFLOP/s ({dtype})" for dtype, rate in ceilings["matmul_tflop_per_s"].items())
    header = ["kernel, median us", "floor (bound)", "preft-jax", "x floor", "XLA", "fastest peer"]
    return f"{markdown(header, rows)}\n{machine(figures)}; ceilings: {ceilings['copy_gb_per_s']:g} GB/s, {rates}.\n"


def prefill(figures: dict[str, Any]) -> str:
    """Each case of ``bench.prefill`` over its base."""
    rows = [
        [
            row["case"],
            f"{row['base_tokens_per_s']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"**{row['ratio']:.3f}** ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
        ]
        for row in figures["cases"]
    ]
    scheme = figures["options"].get("quantization", "none")
    what = f"prefill of {figures['model']}{'' if scheme == 'none' else f' in {scheme}'}, tokens/s"
    header = [what, "base", "with adapters", "time over base (middle half)"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def tpu_programs(figures: dict[str, Any]) -> str:
    """Whole programs as libtpu compiled them; memory of one chip."""

    def figures_of(row: dict[str, Any]) -> list[str]:
        if row["status"] != "ok":
            return [""] * 5
        memory = (f"{row[f'{key}_bytes'] / 2**20:,.0f}" for key in ("argument", "temp", "alias"))
        return [*memory, str(sum(row["pool_copies"].values())), f"{row['compile_s']:.0f}"]

    rows = [
        [
            f"{row['target']} {row['model']} {row['case']}",
            row["status"] if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
            *figures_of(row),
        ]
        for row in figures["rows"]
    ]
    header = ["compiled without a TPU", "status", "arguments, MiB", "temp", "aliased", "pool copies", "seconds"]
    versions = figures["versions"]
    note = f"{figures['date']}, libtpu {versions['libtpu']}, jax {versions['jax']}, commit {figures['commit']}"
    return f"{markdown(header, rows)}\n{note}.\n"


def decode(figures: dict[str, Any]) -> str:
    """A decode step beside its floor, and where it goes."""
    kinds = ("matrix products", "attention", "norms", "activation", "the rest")
    rows = [
        [
            f"{row['rows']} x {row['context']}",
            f"{row['step_ms']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"**{row['ratio']:.2f}**",
            *_profiled(row, kinds),
        ]
        for row in figures["rows"]
    ]
    header = [f"{figures['options']['model']}, rows x context", "step, ms", "floor", "over floor", *kinds, "idle"]
    return f"{markdown([*header, 'kernels'], rows)}\n{machine(figures)}; ceilings: {_ceilings(figures)}.\n"


def before_after(figures: dict[str, Any]) -> str:
    """The same programs at two commits, in turn on one machine: medians of runs."""
    rows = []
    for case in figures["cases"]:
        before, after = statistics.median(case["before"]), statistics.median(case["after"])
        runs = f"{len(case['before'])} and {len(case['after'])}"
        rows.append([case["what"], f"{before:,.2f}", f"{after:,.2f}", f"**{after / before:.3f}**", runs])
    header = ["", f"before ({figures['before_commit']})", "after", "after over before", "runs"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def background(figures: dict[str, Any]) -> str:
    """Units of other work beside requests, by their size."""
    rows = []
    for row in figures["rows"]:
        first, tpot, gap = row["ttft_ms"], row["tpot_ms"], row["gap_ms"]["p99"]
        rows.append(
            [
                f"{row['unit_ms']:.1f}",
                f"{row['idle_share']:.3f}",
                f"{first['alone']:.1f}",
                f"{first['median']:.1f} ({first['most']:.1f})",
                f"{tpot['alone']:.1f}",
                f"{tpot['beside']:.1f}",
                f"{gap['alone']:.1f}",
                f"{gap['beside']:.1f}",
                f"{row['ahead']:.3f}",
            ]
        )
    header = [
        "unit, ms",
        "of an idle device",
        "TTFT alone, ms",
        "beside units (most)",
        "TPOT alone, ms",
        "beside units",
    ]
    header += ["gap alone, p99", "beside units", "decode calls started ahead"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def _profiled(row: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    if "kinds_ms" not in row:
        return [""] * (len(kinds) + 2)
    return [*(f"{row['kinds_ms'].get(kind, 0):.2f}" for kind in kinds), f"{row['idle_ms']:.2f}", str(row["kernels"])]


def _ceilings(figures: dict[str, Any]) -> str:
    return "{copy_gb_per_s:,.0f} GB/s, {matmul_tflop_per_s:,.0f} TFLOP/s".format(**figures["ceilings"])


def headline(figures: dict[str, Any]) -> str:
    """All contenders beside the peer: ``bench.headline`` without and with all-token adapters."""
    every, peer = (json.loads((RESULTS / f"h100-{name}.json").read_text()) for name in ("all-token", "peer"))
    together = every["ceilings"] == figures["ceilings"]
    base = next(row["output_throughput"] for row in figures["rows"] if row["mode"] == "base")
    rows = []
    for row in (*figures["rows"], *every["rows"]):
        rate, beside = row["output_throughput"], together or row["mode"] != "all-token"
        rows.append(
            [
                contender(row),
                f"{rate:,.0f}",
                f"{row.get('ratio_to_base', {}).get('mean', rate / base):.3f}" if beside else "",
                f"{rate / peer['output_throughput']:.3f}" if beside else "",
                f"{row['prefill_tokens_per_s']:,.0f}",
                f"{row['decode_step_ms']:.1f}",
                f"{row['mean_tpot_ms']:.1f}",
                f"{row['most_running']:.0f}",
            ]
        )
    rate, prefill = peer["output_throughput"], peer["prefill_tokens_per_s"]
    name = f"vLLM {peer['versions']['vllm']}, base"
    rows.append([name, f"{rate:,.0f}", f"{rate / base:.3f}", "1.000", f"{prefill:,.0f}", "", "", "512"])
    floors = [("floor of base", figures["floors"])]
    floors += [(f"floor of {contender(row)}", row["floor"]) for row in every["rows"]]
    for name, one in floors:
        values = f"{one['output_throughput']:,.0f}", "", "", f"{one['prefill_tokens_per_s']:,.0f}"
        rows.append([name, *values, f"{one['decode_step_ms']:.1f}", "", ""])
    header = [
        "{model}, {num_prompts} requests, {input_len} in, {output_len} out".format(**figures["options"]),
        "output tokens/s",
        "vs base",
        "vs vLLM's base",
        "prefill tokens/s",
        "decode step, ms",
        "mean TPOT, ms",
        "at a time",
    ]
    notes = [f"{machine(one)}; ceilings: {_ceilings(one)}" for one in (figures, every)]
    note = notes[0] if together else f"{notes[0]}. All-token on another machine: {notes[1]}"
    return f"{markdown(header, rows)}\n{note}.\n"


def headline_summary(figures: dict[str, Any]) -> str:
    """The base, most prefill-only adapters and most all-token ones of ``headline``: three rows."""
    every = json.loads((RESULTS / "h100-all-token.json").read_text())
    base = figures["rows"][0]
    most = [max(one["rows"], key=lambda row: row["num_adapters"]) for one in (figures, every)]
    rows = [
        [
            contender(row),
            f"{row['output_throughput']:,.0f}",
            f"{row['mean_tpot_ms']:.1f}",
            f"{row['most_running']:.0f}",
        ]
        for row in (base, *most)
    ]
    options = figures["options"]
    header = [f"{options['model']}, up to 512 requests at a time", "output tokens/s", "mean TPOT, ms", "at a time"]
    return f"{markdown(header, rows)}\n{machine(figures)}; all-token: {machine(every)}.\n"


def in_fp8(figures: dict[str, Any]) -> str:
    """The base and 512 adapters in bfloat16, of ``figures``, and with more and more in FP8."""
    kinds = {"bfloat16": figures}
    for name, file in (("weights in FP8", "h200-headline-fp8"), ("keys and values, too", "h200-headline-fp8-kv")):
        kinds[name] = json.loads((RESULTS / f"{file}.json").read_text())
    rows = []
    for name, one in kinds.items():
        base, adapters = one["rows"]
        both = [f"{row['output_throughput']:,.0f}" for row in (base, adapters)]
        rows.append([name, *both, f"{adapters['ratio_to_base']['mean']:.2f}", f"{adapters['mean_tpot_ms']:.1f}"])
    options = figures["options"]
    header = [f"{options['model']}, output tokens/s", "base", "512 adapters", "ratio", "mean TPOT, ms"]
    return f"{markdown(header, rows)}\n{'; '.join(machine(one) for one in kinds.values())}.\n"


def vllm_trace(figures: dict[str, Any]) -> str:
    """What ``bench/peer_vllm_trace.py`` measured, a row for each pace."""
    rows = [
        [
            "all at once" if row["speedup"] is None else f"{row['speedup']:.3g} times as fast as recorded",
            f"{row['requests_per_s']:.2f}",
            "" if row["speedup"] is None else f"**{row['request_goodput']:.2f}**",
            "" if row["speedup"] is None else f"{row['goodput_fraction']:.1%}",
            f"{row['output_throughput']:,.0f}",
            f"{row['mean_ttft_ms']:,.0f} ({row['p99_ttft_ms']:,.0f})",
            f"{row['mean_tpot_ms']:.1f} ({row['p99_tpot_ms']:.1f})",
        ]
        for row in figures["rows"]
    ]
    header = [
        f"{figures['shape']}, vLLM {figures['versions']['vllm']}, {figures['rows'][0]['requests']:,} requests",
        "requests/s", "goodput, requests/s", "within bounds", "output tokens/s", "mean TTFT, ms (p99)",
        "mean TPOT, ms (p99)",
    ]  # fmt: skip
    bounds = "bounds: TTFT {ttft_ms:,g} ms, TPOT {tpot_ms:g} ms".format(**figures)
    versions = f"torch {figures['versions']['torch']}"
    return f"{markdown(header, rows)}\n{bounds}; {figures['date']}, {figures['device']['kind']}, {versions}.\n"


def coserve(figures: dict[str, Any]) -> str:
    """Each contender of ``bench.coserve`` at each request rate: tokens trained, promises kept, times per token."""
    options, rows = figures["options"], []
    for row in figures["rows"]:
        share, kept, beside = row.get("of_standalone"), row.get("attainment", {}), row.get("over_alone", {})
        tpot, ttft = row.get("p95_tpot_ms"), row.get("p95_ttft_ms")
        rows.append(
            [
                row["contender"],
                "" if row["request_rate"] is None else f"{row['requests'] / row['seconds']:.2g} ({row['requests']})",
                "" if row["contender"] == "alone" else f"{row['fine_tuning_tokens_per_s']:,.0f}",
                "" if share is None else f"**{share:.2f}**" if row["contender"] == "coserve" else f"{share:.2f}",
                *(f"{kept[name]:.1%}" if kept else "" for name in ("flexllm", "loquetier", "deltaserve")),
                "" if tpot is None else f"{row['mean_tpot_ms']:.1f} ({tpot:.1f})",
                "" if ttft is None else f"{row['mean_ttft_ms']:,.0f} ({ttft:,.0f})",
                f"{beside['mean_e2el']:.2f}" if beside else "",
            ]
        )
    header = [
        f"{options['model']}, {options['jobs']} LoRA r{options['rank']}, {options['seq']:,} tokens a row",
        "requests/s (all)", "tokens/s trained", "of alone", "FlexLLM", "Loquetier", "DeltaServe",
        "TPOT (p95), ms", "TTFT (p95), ms", "time of a request over alone",
    ]  # fmt: skip
    bounds = f"FlexLLM: TPOT {options['tpot_ms']:g} ms and TTFT {options['ttft_ms'] / 1e3:g} s"
    return (
        f"{markdown(header, rows)}\n{bounds}; Loquetier: first token within 6 s; "
        f"DeltaServe: TTFT 400 ms and TPOT 120 ms; {machine(figures)}.\n"
    )
