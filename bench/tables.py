"""``python -m bench.tables``: rewrite the tables of README and docs from the committed result files.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is made from ``docs/results/NAME.json`` by the
function of that name here, so that no figure in the text is written by hand. ``--check`` changes nothing and fails if
a table is out of date. A block that is empty stays so while its file is not there.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- table ([\w:-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _machine(figures: dict[str, Any]) -> str:
    device = figures["device"]
    name = device.get("processor", device["kind"])
    return f"{figures['date']}, {name}, jax {figures['versions']['jax']}, commit {figures['commit']}"


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
    table = _markdown(["SmolLM2-135M, greedy, tokens/s", "preft-jax", "transformers", "ratio (min to max)"], rows)
    return f"{table}\n{_machine(figures)}, {figures['threads']} threads; peer: {peer}.\n"


def _interval(ratio: dict[str, float]) -> str:
    spread = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['mean']:.2f}{spread}"


def cpu_adapters(figures: dict[str, Any]) -> str:
    """Numbers of adapters beside the base in one run of ``serve.bench``."""
    rows = [
        [
            f"{row['mode'].replace('_', '-')}, {row['num_adapters']} adapters" if row["num_adapters"] else row["mode"],
            f"{row['figures']['mean_tpot_ms']:.0f}",
            _interval(row["ratio"]["mean_tpot"]),
            _interval(row["ratio"]["output_throughput"]),
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
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


def cpu_serve_bench(figures: dict[str, Any]) -> str:
    """The three modes of ``serve.bench``, of a file with its schema 1 or 2; one or two rounds have no interval."""
    rows = []
    for name, mode in figures["modes"].items():
        ratio = figures["ratio_to_base"].get(name)
        rows.append(
            [
                name.replace("_", "-"),
                f"{mode['output_throughput']:.1f}",
                _interval(ratio) if ratio else "",
                f"{mode['mean_tpot_ms']:.0f}",
            ]
        )
    header = ["mode", "output tokens/s", "vs base (95% interval)", "mean TPOT, ms"]
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


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
    return f"{_markdown(header, rows)}\n{_machine(figures)}; ceilings: {ceilings['copy_gb_per_s']:g} GB/s, {rates}.\n"


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
    header = [f"prefill of {figures['model']}, tokens/s", "base", "with adapters", "time over base (middle half)"]
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


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
    return f"{_markdown(header, rows)}\n{note}.\n"


def _contender(row: dict[str, Any]) -> str:
    if row["mode"] == "base":
        return "base"
    drawn = row.get("distribution", "round-robin")
    count = row["num_adapters"]
    return f"{row['mode']}, {count:,} adapter{'s' * (count != 1)}{'' if drawn == 'round-robin' else f', {drawn}'}"


def engine(figures: dict[str, Any]) -> str:
    """Contenders of ``bench.headline``, one row each, and the computed floors."""
    floor = figures["floors"]
    base = next((row["output_throughput"] for row in figures["rows"] if row["mode"] == "base"), float("nan"))
    rows = [
        [
            _contender(row),
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
    floors += [(f"floor of {_contender(row)}", row["floor"]) for row in figures["rows"] if "floor" in row]
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
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


def trace(figures: dict[str, Any]) -> str:
    """Contenders of ``bench.trace``, one row each, and what they were offered."""
    options, capacity, offered = figures["options"], figures["capacity"], figures["offered_requests_per_s"]
    rows = [
        [
            _contender(row),
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
    return f"{_markdown(header, rows)}\n{pace}; {bounds}; {_machine(figures)}.\n"


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
        f"{_markdown([title, 'median TTFT, ms', 'longest', 'GB/s from there'], first)}\n{_markdown(header, second)}\n"
        f"{size}; {_machine(figures)}.\n"
    )


def overload(figures: dict[str, Any]) -> str:
    """What a server did at many times its capacity."""
    rows = []
    for name, value in figures["figures"].items():
        shown = ", ".join(f"{n} x {status}" for status, n in value.items()) if isinstance(value, dict) else str(value)
        rows.append([name.replace("_", " "), shown])
    title = f"{figures['model']}, {figures['options']['factor']:g} times its capacity"
    return f"{_markdown([title, ''], rows)}\n{_machine(figures)}.\n"


def server(figures: dict[str, Any]) -> str:
    """Base and adapters through a server."""
    options = figures["options"]
    rows = [
        [
            f"{row['num_adapters']} adapters, {options['adapter_distribution']}" if row["num_adapters"] else "base",
            f"{row['figures']['output_throughput']:.1f}",
            _interval(row["ratio"]["output_throughput"]),
            f"{row['figures']['mean_tpot_ms']:.0f}",
            f"{row['figures']['mean_ttft_ms']:.0f}",
        ]
        for row in figures["contenders"]
    ]
    title = "through HTTP, {input_len} in, {output_len} out, {rounds} rounds".format(**options)
    header = [title, "output tokens/s", "vs base (95% interval)", "mean TPOT, ms", "mean TTFT, ms"]
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


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
    return f"{_markdown(header, rows)}\n{_machine(figures)}.\n"


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
        f"{_markdown(header, rows)}\n{seeds} seeds, {options['held_out']} held-out questions, {versions}; "
        f"{_machine(figures)}.\n"
    )


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
    return f"{_markdown([*header, 'kernels'], rows)}\n{_machine(figures)}; ceilings: {_ceilings(figures)}.\n"


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
                _contender(row),
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
    floors += [(f"floor of {_contender(row)}", row["floor"]) for row in every["rows"]]
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
    notes = [f"{_machine(one)}; ceilings: {_ceilings(one)}" for one in (figures, every)]
    note = notes[0] if together else f"{notes[0]}. All-token on another machine: {notes[1]}"
    return f"{_markdown(header, rows)}\n{note}.\n"


def headline_summary(figures: dict[str, Any]) -> str:
    """The base, most prefill-only adapters and most all-token ones of ``headline``: three rows."""
    every = json.loads((RESULTS / "h100-all-token.json").read_text())
    base = figures["rows"][0]
    most = [max(one["rows"], key=lambda row: row["num_adapters"]) for one in (figures, every)]
    rows = [
        [
            _contender(row),
            f"{row['output_throughput']:,.0f}",
            f"{row['mean_tpot_ms']:.1f}",
            f"{row['most_running']:.0f}",
        ]
        for row in (base, *most)
    ]
    options = figures["options"]
    header = [f"{options['model']}, up to 512 requests at a time", "output tokens/s", "mean TPOT, ms", "at a time"]
    return f"{_markdown(header, rows)}\n{_machine(figures)}; all-token: {_machine(every)}.\n"


TABLES = {
    "cpu-accuracy": accuracy,
    "cpu-generation": cpu_generation,
    "cpu-adapters": cpu_adapters,
    "cpu-overload": overload,
    "cpu-serve-bench": cpu_serve_bench,
    "cpu-server-uniform": server,
    "cpu-server-zipf": server,
    "cpu-tiers": tiers,
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
    "h200-trace": trace,
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
