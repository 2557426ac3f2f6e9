"""vLLM on the workload of ``bench.trace``: a trace's arrivals and lengths, random weights and tokens, no adapters.

    python bench/peer_vllm_trace.py --trace AzureLLMInferenceTrace_conv.csv --speedups 3.5,4.5,inf --tpot-ms 30

Needs an interpreter with vllm and torch, not this package. Requests are given to vLLM's own engine as they arrive, and
its steps are called one after the other, as ``bench.trace`` does it with ours; a speedup of ``inf`` offers all at once,
which measures capacity. The last line of its output is one JSON object.
"""

import argparse
import csv
import datetime
import math
import os
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import peer_vllm

WARM_UPS = 64


class Row(NamedTuple):
    """A recorded request: seconds after the first, and its tokens."""

    arrival: float
    prompt: int
    output: int


def read_trace(path: Path, minutes: float, most: int) -> list[Row]:
    """Return the beginning of a trace; what is longer than ``most`` tokens is clipped as ``bench.trace`` clips it."""
    with path.open(newline="", encoding="utf-8") as file:
        read = [
            (
                datetime.datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).replace(tzinfo=None),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
            for row in csv.DictReader(file)
        ]
    read.sort(key=lambda row: row[0])
    rows = []
    for when, prompt, output in read:
        arrival = (when - read[0][0]).total_seconds()
        if arrival < 60 * minutes:
            output = min(output, most - 1)
            rows.append(Row(arrival, min(prompt, most - output), output))
    return rows


def summary(
    times: list[list[float]], rows: list[Row], seconds: float, ttft_ms: float, tpot_ms: float
) -> dict[str, Any]:
    """Return figures of a run: ``times`` of each request's tokens, in seconds after its arrival."""
    first = [1e3 * own[0] for own in times]
    each = [1e3 * (own[-1] - own[0]) / (row.output - 1) for own, row in zip(times, rows, strict=True) if row.output > 1]
    within = [
        1e3 * own[0] <= ttft_ms and (row.output == 1 or 1e3 * (own[-1] - own[0]) / (row.output - 1) <= tpot_ms)
        for own, row in zip(times, rows, strict=True)
    ]

    def at(values: list[float], part: float) -> float:
        return round(sorted(values)[min(len(values) - 1, int(part * len(values)))], 3)

    return {
        "requests": len(rows),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(rows) / seconds, 4),
        "request_goodput": round(sum(within) / seconds, 4),
        "goodput_fraction": round(sum(within) / len(within), 4),
        "output_throughput": round(sum(row.output for row in rows) / seconds, 1),
        "mean_ttft_ms": round(sum(first) / len(first), 3),
        "p99_ttft_ms": at(first, 0.99),
        "mean_tpot_ms": round(sum(each) / len(each), 3),
        "p99_tpot_ms": at(each, 0.99),
    }


class Prompts:
    """Draws random prompts, and what vLLM is to do with them."""

    def __init__(self, vllm: Any, kind: Any, vocab_size: int):
        import numpy as np

        self._vllm, self._kind, self._vocab_size = vllm, kind, vocab_size
        self._rng = np.random.default_rng(0)

    def draw(self, row: Row) -> tuple[dict[str, Any], Any]:
        """Return a prompt and its sampling parameters."""
        tokens = self._rng.integers(3, self._vocab_size - 1, row.prompt).tolist()
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=row.output, ignore_eos=True, detokenize=False, output_kind=self._kind
        )
        return {"prompt_token_ids": tokens}, params


def serve(engine: Any, prompts: Prompts, rows: list[Row], speedup: float) -> tuple[list[list[float]], float]:
    """Serve requests as they arrive; return the times of each one's tokens after its arrival, and all seconds."""
    drawn = [prompts.draw(row) for row in rows]
    waiting = deque(enumerate(rows))
    times: list[list[float]] = [[] for _ in rows]
    start = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting and waiting[0][1].arrival / speedup <= now:
            number, _ = waiting.popleft()
            engine.add_request(str(number), *drawn[number])
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][1].arrival / speedup - (time.perf_counter() - start)))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            number = int(output.request_id)
            times[number] += [now - rows[number].arrival / speedup] * len(output.outputs[0].token_ids)
    return times, time.perf_counter() - start


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=Path, required=True)
    add("--shape", choices=peer_vllm.SHAPES, default="llama3-8b")
    add("--minutes", type=float, default=2.5, help="of the trace, as recorded")
    add("--speedups", default="3.5", help="with commas; inf: all at once")
    add("--ttft-ms", type=float, default=2000.0)
    add("--tpot-ms", type=float, default=30.0)
    add("--max-num-seqs", type=int, default=256)
    add("--max-model-len", type=int, default=9216)
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser.parse_args()


def main() -> None:
    args = options()
    rows = read_trace(args.trace, args.minutes, args.max_model_len)
    speedups = [float(text) for text in args.speedups.split(",")]
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }  # fmt: skip
    # This folder's modules are not those that vLLM's packages mean by the same names.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

    import torch  # pyright: ignore[reportMissingImports]
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    found, output = [], args.output_json and args.output_json.resolve()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # vLLM starts modules by name, which look in the current folder first.
        folder = Path(name) / "model"
        folder.mkdir()
        peer_vllm.write_model(args.shape, folder)
        start = time.perf_counter()
        llm = vllm.LLM(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0, max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len, gpu_memory_utilization=0.92, enable_prefix_caching=False,
        )  # fmt: skip
        ready = time.perf_counter() - start
        prompts = Prompts(vllm, RequestOutputKind.DELTA, peer_vllm.SHAPES[args.shape]["vocab_size"])
        serve(llm.llm_engine, prompts, [Row(0.0, row.prompt, 4) for row in rows[:WARM_UPS]], math.inf)  # Not counted.
        for speedup in speedups:
            times, seconds = serve(llm.llm_engine, prompts, rows, speedup)
            assert all(len(own) == row.output for own, row in zip(times, rows, strict=True))
            figures = summary(times, rows, seconds, args.ttft_ms, args.tpot_ms)
            found.append({"speedup": None if math.isinf(speedup) else speedup, **figures})
            print(found[-1], flush=True)
    peer_vllm.report(
        {
            "who": "vllm",
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "device": {"kind": torch.cuda.get_device_name()},
            "date": datetime.date.today().isoformat(),
            **{key: value for key, value in vars(args).items() if key not in ("output_json", "trace")},
            "trace": args.trace.name,
            "ready_s": round(ready, 1),
            "rows": found,
        },
        output,
    )


if __name__ == "__main__":
    main()
