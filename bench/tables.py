"""``python -m bench.tables``: rewrite the tables of README and docs from the committed result files.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is made from ``docs/results/NAME.json`` by the
function that ``TABLES`` names for it, so that no figure in the text is written by hand. ``--check`` changes nothing and
fails if a table is out of date. A block that is empty stays so while its file is not there.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.table_parts import RESULTS, ROOT, contender, interval, machine, markdown
from bench.tables_device import (
    background,
    before_after,
    coserve,
    decode,
    headline,
    headline_summary,
    in_fp8,
    kernels,
    prefill,
    tpu_programs,
    vllm_trace,
)
from bench.tables_scale import capacity, compared, handover
from bench.tables_study import sft_study

_BLOCK = re.compile(r"(<!-- table ([\w:-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def cpu_generation(figures: dict[str, Any]) -> str:
    """Our tokens/s beside transformers'."""
    rows = [
        [
            row["case"],
            f"{row['ours_tokens_per_s']:.1f}",
            f"{row['peer_tokens_per_s']:.1f}",
            f"**{row['ratio']:.2f}** ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        ]
        for row in figures["cases"]
    ]
    peer = ", ".join(f"{name} {version}" for name, version in figures["peer_versions"].items())
    table = markdown(["SmolLM2-135M, greedy, tokens/s", "preft-jax", "transformers", "ratio (min to max)"], rows)
    return f"{table}\n{machine(figures)}, {figures['threads']} threads; peer: {peer}.\n"


def cpu_adapters(figures: dict[str, Any]) -> str:
    """Numbers of adapters beside the base in one run of ``serve.bench``."""
    rows = [
        [
            f"{row['mode'].replace('_', '-')}, {row['num_adapters']} adapters" if row["num_adapters"] else row["mode"],
            f"{row['figures']['mean_tpot_ms']:.0f}",
            interval(row["ratio"]["mean_tpot"]),
            interval(row["ratio"]["output_throughput"]),
            f"{row['counters']['prefill_seconds']:.0f}",
            f"{row['counters']['decode_seconds']:.0f}",
        ]
        for row in figures["contenders"]
    ]
    header = [
        "{input_len} in, {output_len} out, {rounds} rounds".format(**figures["options"]),
        "mean TPOT, ms",
        "vs base (95% interval)",
        "tokens/s vs base",
        "prefill, s",
        "decode, s",
    ]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def cpu_serve_bench(figures: dict[str, Any]) -> str:
    """The three modes of ``serve.bench``, of a file with its schema 1 or 2; one or two rounds have no interval."""
    rows = []
    for name, mode in figures["modes"].items():
        ratio = figures["ratio_to_base"].get(name)
        rows.append(
            [
                name.replace("_", "-"),
                f"{mode['output_throughput']:.1f}",
                interval(ratio) if ratio else "",
                f"{mode['mean_tpot_ms']:.0f}",
            ]
        )
    header = ["mode", "output tokens/s", "vs base (95% interval)", "mean TPOT, ms"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def engine(figures: dict[str, Any]) -> str:
    """Contenders of ``bench.headline``, one row each, and the computed floors."""
    floor = figures["floors"]
    base = next((row["output_throughput"] for row in figures["rows"] if row["mode"] == "base"), float("nan"))
    rows = [
        [
            contender(row),
            f"{row['output_throughput']:,.0f}",
            f"{row.get('ratio_to_base', {}).get('mean', row['output_throughput'] / base):.3f}".replace("nan", ""),
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_step_ms']:.1f}",
            f"{row['mean_tpot_ms']:.1f}",
            f"{row['host_seconds'] / row['seconds']:.0%}",
            f"{row['most_running']:.0f}",
        ]
        for row in figures["rows"]
    ]
    floors = [("floor of base", floor)]
    floors += [(f"floor of {contender(row)}", row["floor"]) for row in figures["rows"] if "floor" in row]
    rows += [
        [
            name,
            f"{one['output_throughput']:,.0f}",
            "",
            f"{one['prefill_tokens_per_s']:,.0f}",
            f"{one['decode_step_ms']:.1f}",
            *[""] * 3,
        ]
        for name, one in floors
    ]
    options = figures["options"]
    header = [
        "{model}, {num_prompts} requests, {input_len} in, {output_len} out".format(**options),
        "output tokens/s",
        "vs base",
        "prefill tokens/s",
        "decode step, ms",
        "mean TPOT, ms",
        "host",
        "at a time",
    ]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def trace(figures: dict[str, Any]) -> str:
    """Contenders of ``bench.trace``, one row each, and what they were offered."""
    options, capacity, offered = figures["options"], figures["capacity"], figures["offered_requests_per_s"]
    rows = [
        [
            contender(row),
            f"**{row['request_goodput']:.2f}**",
            "" if row["goodput_ratio_to_base"] is None else f"{row['goodput_ratio_to_base']:.2f}",
            f"{row['goodput_fraction']:.1%}",
            f"{row['output_throughput']:,.0f}",
            f"{row['median_ttft_ms']:,.0f} ({row['p99_ttft_ms']:,.0f})",
            f"{row['median_tpot_ms']:.1f} ({row['p99_tpot_ms']:.1f})",
            f"{row['most_running']:.0f}",
        ]
        for row in figures["rows"]
    ]
    header = [
        f"{options['model']}, {figures['trace']['requests']:,} requests of a trace",
        "goodput, requests/s",
        "vs base",
        "within bounds",
        "output tokens/s",
        "TTFT, ms (p99)",
        "TPOT, ms (p99)",
        "at a time",
    ]
    pace = f"{figures['speedup']:.3g} times as fast as recorded"
    if offered is not None:
        pace = f"{offered:.2f} requests/s, {pace}"
    if capacity is not None:
        pace += f", {options['load']:.0%} of the base's capacity ({capacity['requests_per_s']:.2f} requests/s)"
    bounds = "bounds: TTFT {ttft_ms:,g} ms, TPOT {tpot_ms:g} ms".format(**options)
    return f"{markdown(header, rows)}\n{pace}; {bounds}; {machine(figures)}.\n"


def tiers(figures: dict[str, Any]) -> str:
    """TTFT by where an adapter is, and staged prompts beside others."""
    options = figures["options"]
    first = [
        [
            row["tier"],
            f"{row['median_ttft_ms']:.1f}",
            f"{row['max_ttft_ms']:.1f}",
            f"{row['gb_per_s']:.2f}" if "gb_per_s" in row else "",
        ]
        for row in figures["tiers"]
    ]
    title = "{model}, {adapter_kind} r{rank}, {input_len} prompt tokens".format(**options)
    second = [
        [
            f"{row['input_len']:,}",
            f"{row['staged_prompt_tokens_per_s']:,.0f}",
            f"{row['resident_prompt_tokens_per_s']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        ]
        for row in figures["staging"]
    ]
    header = [
        "prompt tokens",
        "tokens/s, each adapter copied",
        "tokens/s, adapters in the bank",
        "time ratio (min to max)",
    ]
    size = f"{figures['adapter_bytes'] / 1e6:.1f} MB of rank pages an adapter"
    return (
        f"{markdown([title, 'median TTFT, ms', 'longest', 'GB/s from there'], first)}\n{markdown(header, second)}\n"
        f"{size}; {machine(figures)}.\n"
    )


def overload(figures: dict[str, Any]) -> str:
    """What a server did at many times its capacity."""
    rows = []
    for name, value in figures["figures"].items():
        shown = ", ".join(f"{n} x {status}" for status, n in value.items()) if isinstance(value, dict) else str(value)
        rows.append([name.replace("_", " "), shown])
    title = f"{figures['model']}, {figures['options']['factor']:g} times its capacity"
    return f"{markdown([title, ''], rows)}\n{machine(figures)}.\n"


def hostile(figures: dict[str, Any]) -> str:
    """What bad bodies cost a server and those who stream meanwhile."""
    found = figures["figures"]
    rows = [
        [
            row["body"],
            str(row["status"]),
            f"{row['seconds']:.3f}",
            f"{row['peak_mib']:.0f}",
            f"{row['gap_seconds']:.3f}",
        ]
        for row in found["bodies"]
    ]
    header = ["body", "status", "seconds", "memory, MiB", "longer gap of a stream, s"]
    silent = found["connections"]
    told = (
        f"The longest gap without bad bodies: {found['usual_gap_seconds']:.3f} s. With {silent['silent']} silent "
        f"connections and {figures['options']['descriptors']} descriptors `/health` took at most "
        f"{silent['health_worst_seconds']:.3f} s."
    )
    return f"{markdown(header, rows)}\n{told} {machine(figures)}.\n"


def kills(figures: dict[str, Any]) -> str:
    """What was compared after each kill of a server that fine-tunes, and what was not as it must be."""
    found, interval = figures["figures"], figures["options"]["checkpoint_steps"]
    rows = [
        ["kills, of these while it started", f"{found['kills']}, {found['kills_while_starting']}"],
        ["jobs that succeeded, of those created", f"{found['jobs_succeeded']} of {found['jobs']}"],
        ["times that a job went on from a state", str(found["jobs_gone_on"])],
        [f"most updates that a job did again, {interval} between states", str(found["most_updates_lost"])],
        ["adapters that the jobs ended with, all of them learning the same", str(found["last_adapters"])],
        ["adapters with a name, read whole after a kill", str(found["adapters_read"])],
        ["answers, compared with the first of the same adapter", str(found["answers"])],
        ["uploads and deletions that were answered", f"{found['uploads']} and {found['deletions']}"],
        ["faults", str(len(found["faults"]))],
    ]
    return f"{markdown([f'{found["seconds"] / 60:.0f} minutes', ''], rows)}\n{machine(figures)}.\n"


def server(figures: dict[str, Any]) -> str:
    """Base and adapters through a server."""
    options = figures["options"]
    rows = [
        [
            f"{row['num_adapters']} adapters, {options['adapter_distribution']}" if row["num_adapters"] else "base",
            f"{row['figures']['output_throughput']:.1f}",
            interval(row["ratio"]["output_throughput"]),
            f"{row['figures']['mean_tpot_ms']:.0f}",
            f"{row['figures']['mean_ttft_ms']:.0f}",
        ]
        for row in figures["contenders"]
    ]
    title = "through HTTP, {input_len} in, {output_len} out, {rounds} rounds".format(**options)
    header = [title, "output tokens/s", "vs base (95% interval)", "mean TPOT, ms", "mean TTFT, ms"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def sft(figures: dict[str, Any]) -> str:
    """Fine-tuning, ours and the peer's."""
    options = figures["options"]
    rows = []
    for row in figures["rows"]:
        ours = row["who"] == "preft-jax"
        again = {"none": "nothing", "cheap": "all but matmuls", "full": "whole layers"}
        rows.append(
            [
                row["who"]
                if ours
                else f"{row['who']} {row['versions']['peft']}, torch {row['versions']['torch']}"
                + (", autocast" if row.get("autocast") else ""),
                f"{row['batch']} x {row['seq']:,}"
                + (f", {row['accumulation']} times" if row["accumulation"] > 1 else "")
                + (f", {row['packed']} documents each" if row.get("packed", 1) > 1 else ""),
                str(row["jobs"]),
                again[row["remat"]] if ours else {"none": "nothing", "full": "gradient checkpointing"}[row["remat"]],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tflops_4n']:,.0f}",
                f"{row['peak_gib']:.1f}",
            ]
        )
    title = "{model}, LoRA r{rank} on all linears".format(**options)
    header = [title, "rows x tokens", "adapters", "computed again", "tokens/s", "TFLOP/s (4N)", "peak GiB"]
    return f"{markdown(header, rows)}\n{machine(figures)}.\n"


def accuracy(figures: dict[str, Any]) -> str:
    """What each kind of adapter learned of a task; mean and standard deviation over seeds."""

    def spread(row: dict[str, Any], name: str, scale: float, form: str) -> str:
        if row[name] is None:
            return "diverged"
        std = row.get(f"{name}_std")
        return f"{scale * row[name]:{form}}" + ("" if std is None else f" ± {scale * std:{form}}")

    def figures_of(row: dict[str, Any]) -> list[str]:
        return [spread(row, "eval_loss", 1, ".3f"), spread(row, "accuracy", 100, ".1f"), spread(row, "score", 1, ".3f")]

    options = figures["options"]
    rows = [["base", "", "", *figures_of(figures["base"])]]
    rows += [
        [row["adapter"], f"{row['parameters']:,}", f"{row['learning_rate']:g}", *figures_of(row)]
        for row in figures["rows"]
    ]
    header = [
        "{model}, {task}, r{rank}, {updates} updates of {batch_size}".format(**options),
        "parameters",
        "learning rate",
        "held-out loss",
        "accuracy, %",
        "score",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in figures["task_versions"].items())
    seeds = len(figures["rows"][0]["runs"])
    return (
        f"{markdown(header, rows)}\n{seeds} seeds, {options['held_out']} held-out questions, {versions}; "
        f"{machine(figures)}.\n"
    )


def stored_adapters(figures: dict[str, Any]) -> str:
    """What trained adapters lose by rank pages of another dtype; the interval is that of paired answers."""
    options = figures["options"]
    rows = [
        [
            row["adapter"],
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['stored_accuracy']:.1f}",
            "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * row[name] for name in ("difference", "difference_low", "difference_high"))
            ),
            f"{row['stored_mean_kl']:.2g}",
        ]
        for row in figures["rows"]
    ]
    header = [
        "{model}, {task}, r{rank}, {updates} updates of {batch_size}".format(**options),
        "accuracy, %",
        f"rank pages in {options['adapter_dtype']}",
        "difference (95% interval)",
        "mean KL, nats",
    ]
    pairs = figures["rows"][0]["pairs"]
    return f"{markdown(header, rows)}\n{pairs} answers each; {machine(figures)}.\n"


def _needles(row: dict[str, Any]) -> str:
    if "asked" not in row:
        return ""
    return f"{row['found']} of {row['asked']} ({100 * row['found_low']:.0f}% to {100 * row['found_high']:.0f}%)"


def quantization(figures: dict[str, Any]) -> str:
    """What base models in FP8 lose, alone and under an adapter."""
    rows, needles = [], any("asked" in row for row in figures["rows"])
    for row in figures["rows"]:
        is_plain = row["base"] == "plain"
        same = ["", ""] if is_plain else [f"{row['mean_kl']:.2g}", f"{100 * row['same_top_1']:.1f}"]
        if needles:
            same.append(_needles(row))
        size = f"{figures['weight_bytes'][row['base']] / 1e6:.0f}"
        name = figures["dtype"] if is_plain else row["base"]
        rows.append([name, row["adapter"], size, f"{row['perplexity']:.2f}", *same])
    header = [f"{figures['model']}, linears in", "adapter", "MB", "perplexity", "mean KL, nats", "same top token, %"]
    header += [f"needles found in {figures['options']['context']:,} tokens"] if needles else []
    return f"{markdown(header, rows)}\n{figures['scored_tokens']:,} scored tokens; {machine(figures)}.\n"


TABLES = {
    "cpu-accuracy": accuracy,
    "cpu-fp8": quantization,
    "cpu-generation": cpu_generation,
    "cpu-accuracy-fp8": stored_adapters,
    "cpu-adapters": cpu_adapters,
    "cpu-hostile": hostile,
    "cpu-kills": kills,
    "cpu-overload": overload,
    "cpu-serve-bench": cpu_serve_bench,
    "cpu-sft-study": sft_study,
    "cpu-server-uniform": server,
    "cpu-server-zipf": server,
    "cpu-tiers": tiers,
    "cpu-before-after": before_after,
    "h100-decode": decode,
    "h100-direft": engine,
    "h100-headline": headline,
    "h100-headline:summary": headline_summary,
    "h100-headline-direft": engine,
    "h100-headline-long-prompts": engine,
    "h100-headline-lora-r64": engine,
    "h100-headline-qwen": engine,
    "h100-kernels": kernels,
    "h100-lora": engine,
    "h100-prefill-plain": prefill,
    "h100-prefill": prefill,
    "h100-sft": sft,
    "h100-sft-16k": sft,
    "h100-sft-jobs": sft,
    "h100-sft-remat": sft,
    "h100-tiers": tiers,
    "h100-trace": trace,
    "h200-background": background,
    "h200-before-after": before_after,
    "h200-before-after-engine": before_after,
    "h200-before-after-sft": before_after,
    "h200-coserve": coserve,
    "h200-coserve-8192": coserve,
    "h200-coserve-slowdown": coserve,
    "h200-decode-70b": decode,
    "h200-decode-fp8": decode,
    "h200-decode-fp8-kv": decode,
    "h200-headline": engine,
    "h200-headline:handover": handover,
    "h200-headline:fp8": in_fp8,
    "h200-headline-fp8": engine,
    "h200-headline-fp8-kv": engine,
    "h200-headline-r64": engine,
    "h200-prefill": prefill,
    "h200-prefill-small": prefill,
    "h200-sft-fp8": sft,
    "h200-trace": trace,
    "h200-trace-adapters": trace,
    "h200-trace-limit": trace,
    "h200-sft-study": sft_study,
    "h200-trace-limit-separate": trace,
    "h200-vllm-trace": vllm_trace,
    "model-capacity": capacity,
    "model-capacity:compared": compared,
    "tpu-fp8": tpu_programs,
    "tpu-programs": tpu_programs,
}


def render(text: str) -> str:
    """Return a document with every marked table made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; allowed: {', '.join(TABLES)}")
        path = RESULTS / f"{name.partition(':')[0]}.json"
        if not path.exists() and not match.group(3):
            return match.group(0)  # Its place is kept until it is measured.
        figures = json.loads(path.read_text())
        return match.group(1) + TABLES[name](figures) + match.group(4)

    return _BLOCK.sub(block, text)


def documents() -> list[Path]:
    """Return the documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    args = parser.parse_args(argv)
    stale = [path for path in documents() if render(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{'out of date' if args.check else 'rewritten'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.write_text(render(path.read_text()))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
