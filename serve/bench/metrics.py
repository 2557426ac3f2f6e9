"""Latency and throughput figures of a benchmark, under vLLM's names, and what machine they were taken on."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preft_jax.errors import ConfigError

SCHEMA = "preft-jax/serve-bench/2"

LEGEND = {
    "TTFT": "from sending a request to its first output; it is sent at its arrival, or once --max-concurrency lets it",
    "TPOT": "(last output - first output) / (output tokens - 1) of each request with two tokens or more",
    "ITL": "each gap between two outputs of a request; one output may hold several tokens",
    "E2EL": "from sending a request to its last output",
    "throughput": "of completed requests over the time from the first arrival to the last end; rounds add up",
    "ratio": "geometric mean over rounds of this contender's figure over base's in the same round, with Student's t "
    "95% interval of the log ratios (from three rounds on)",
    "first, later": "mean TTFT of each adapter's first request in a round, and of the others; where requests queue, "
    "the later ones have also waited longer",
    "Jain": "Jain's index of the adapters' mean E2EL per output token: 1 is equal, 1/n is all for one of n; beside it "
    "the largest over the smallest",
    "goodput": "requests per second that met every objective of --goodput",
}
"""What the figures mean."""

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
STATUSES = ("completed", "rejected", "aborted", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """What became of one request.

    Attributes:
        prompt_len: tokens of the prompt.
        output_len: tokens generated.
        times: seconds after it was sent at which each output reached the client; an output holds one token or more.
        sent: seconds after the start of the run at which it was sent.
        adapter: number of its adapter; None for the base model.
        status: one of ``STATUSES``.
        error: why it did not complete.
        estimated: whether ``output_len`` counts outputs because the server did not report its tokens.
    """

    prompt_len: int
    output_len: int
    times: Sequence[float]
    sent: float = 0.0
    adapter: int | None = None
    status: str = "completed"
    error: str | None = None
    estimated: bool = False

    @property
    def ttft(self) -> float:
        """Seconds to the first output."""
        return self.times[0]

    @property
    def e2el(self) -> float:
        """Seconds to the last output."""
        return self.times[-1]

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        return (self.times[-1] - self.times[0]) / (self.output_len - 1) if self.output_len > 1 else None


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """The records of one run, in the order of its requests, and how many seconds it took."""

    records: Sequence[RequestRecord]
    duration: float

    @property
    def completed(self) -> list[RequestRecord]:
        """The records of requests that completed."""
        return [record for record in self.records if record.status == "completed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Which figures to report.

    Attributes:
        percentiles: from 0 to 100.
        percentile_metrics: metrics that get percentiles, of ``METRICS``.
        goodput: objectives in milliseconds by metric, of ``GOODPUT_METRICS``.
    """

    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    percentile_metrics: tuple[str, ...] = METRICS
    goodput: Mapping[str, float] = dataclasses.field(default_factory=dict)


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Parse ``"50,90,99"``."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= value <= 100 for value in found):
        raise ConfigError(f"--metric-percentiles is {text!r}; give numbers from 0 to 100 such as 50,90,99")
    return found


def parse_metrics(text: str) -> tuple[str, ...]:
    """Parse ``"ttft,tpot"``."""
    found = tuple(part.strip() for part in text.split(","))
    for name in found:
        if name not in METRICS:
            raise ConfigError(f"--percentile-metrics has {name!r}; allowed: {', '.join(METRICS)}")
    return found


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """Parse vLLM's form of service level objectives, ``["ttft:2000", "tpot:50"]``, in milliseconds."""
    found = {}
    for item in items:
        match = re.fullmatch(r"(\w+):(\d+(?:\.\d*)?)", item)
        if match is None or match.group(1) not in GOODPUT_METRICS:
            allowed = ", ".join(f"{name}:MS" for name in GOODPUT_METRICS)
            raise ConfigError(f"--goodput has {item!r}; allowed: {allowed}, with milliseconds")
        found[match.group(1)] = float(match.group(2))
    return found


def _statistics(name: str, seconds: Sequence[float], options: MetricOptions) -> dict[str, float]:
    ms = np.asarray(seconds if len(seconds) else [0.0]) * 1e3
    figures = {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
    if name in options.percentile_metrics:
        figures |= {f"p{value:g}_{name}_ms": np.percentile(ms, value) for value in options.percentiles}
    return {key: round(float(value), 3) for key, value in figures.items()}


def summarize(results: Sequence[LoadResult], options: MetricOptions | None = None) -> dict[str, float]:
    """Return vLLM's flat benchmark keys over all rounds of one contender."""
    options = options or MetricOptions()
    records = [record for result in results for record in result.records]
    done = [record for result in results for record in result.completed]
    duration = sum(result.duration for result in results)
    output, prompt = sum(record.output_len for record in done), sum(record.prompt_len for record in done)
    counts = collections.Counter(record.status for record in records)
    figures: dict[str, float] = {status: counts[status] for status in STATUSES}
    figures |= {
        "duration": round(duration, 3),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": round(len(done) / duration, 3),
        "output_throughput": round(output / duration, 3),
        "total_token_throughput": round((prompt + output) / duration, 3),
    }
    if options.goodput:
        good = sum(meets(record, options.goodput) for record in done)
        figures["request_goodput"] = round(good / duration, 3)
    figures |= _statistics("ttft", [record.ttft for record in done], options)
    figures |= _statistics("tpot", [tpot for record in done if (tpot := record.tpot) is not None], options)
    figures |= _statistics("itl", [gap for record in done for gap in np.diff(record.times)], options)
    figures |= _statistics("e2el", [record.e2el for record in done], options)
    return figures


def meets(record: RequestRecord, goodput: Mapping[str, float]) -> bool:
    """Return whether a completed request met every objective; one token has no TPOT, which counts as met."""
    return all((getattr(record, name) or 0.0) * 1e3 <= limit for name, limit in goodput.items())


def adapter_figures(results: Sequence[LoadResult], options: MetricOptions | None = None) -> dict[str, Any]:
    """Return how each adapter fared over all rounds, and how evenly.

    ``adapters`` holds TTFT and E2EL of each by number; ``fairness`` Jain's index, ``(sum x)^2 / (n sum x^2)`` (Jain,
    Chiu and Hawe, DEC-TR-301, 1984), of x, an adapter's mean E2EL per output token, and the largest x over the
    smallest.
    """
    options = options or MetricOptions()
    by_adapter: dict[int, list[RequestRecord]] = collections.defaultdict(list)
    for result in results:
        for record in result.completed:
            if record.adapter is not None and record.output_len:
                by_adapter[record.adapter].append(record)
    adapters, means = {}, []
    for number in sorted(by_adapter):
        own = by_adapter[number]
        means.append(float(np.mean([record.e2el / record.output_len for record in own])))
        adapters[str(number)] = {
            "completed": len(own),
            "output_tokens": sum(record.output_len for record in own),
            "mean_e2el_per_token_ms": round(means[-1] * 1e3, 3),
            **_statistics("ttft", [record.ttft for record in own], options),
            **_statistics("e2el", [record.e2el for record in own], options),
        }
    return {"adapters": adapters, "fairness": fairness(means)}


def fairness(values: Sequence[float]) -> dict[str, float]:
    """Return Jain's index of positive values, and the largest over the smallest; empty without values."""
    x = np.asarray(values)
    if not x.size or not x.min() > 0:
        return {}
    return {
        "jain_index": round(float(x.sum() ** 2 / (x.size * (x**2).sum())), 4),
        "max_over_min": round(float(x.max() / x.min()), 4),
    }


def first_and_later(results: Sequence[LoadResult], options: MetricOptions | None = None) -> dict[str, Any]:
    """Return TTFT of each adapter's first request in a round, for which it may have to be loaded, and of the others."""
    options = options or MetricOptions()
    times: dict[str, list[float]] = {"first": [], "later": []}
    for result in results:
        seen = set()
        for record in sorted(result.records, key=lambda record: record.sent):
            if record.adapter is None:
                continue
            if record.status == "completed":
                times["later" if record.adapter in seen else "first"].append(record.ttft)
            seen.add(record.adapter)
    return {
        name: {"completed": len(values), **_statistics("ttft", values, options)}
        for name, values in times.items()
        if values
    }


def _t95(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; beyond ten degrees of freedom an approximation good to 1%."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the ratio of two positive figures that were taken in pairs.

    ``mean`` is the geometric mean of the pairs' ratios; ``low`` and ``high`` bound it with 95% confidence (Student's t
    on the log ratios), absent below three pairs.
    """
    logs = np.log(np.asarray(numerators) / np.asarray(denominators))
    figures = {"mean": round(float(np.exp(logs.mean())), 4)}
    if len(logs) >= 3:
        half = _t95(len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
        figures |= {
            "low": round(float(np.exp(logs.mean() - half)), 4),
            "high": round(float(np.exp(logs.mean() + half)), 4),
        }
    return figures


def ratios(base: Sequence[LoadResult], other: Sequence[LoadResult]) -> dict[str, dict[str, float]]:
    """Return ``paired_ratio`` over rounds, other over base, of output throughput, mean TPOT and mean TTFT.

    A figure that a round of either lacks, such as TPOT where every output is one token, is left out.
    """
    figures = {}
    for key in ("output_throughput", "mean_tpot", "mean_ttft"):
        pairs = [[_round_figure(result, key) for result in side] for side in (other, base)]
        if all(value > 0 for side in pairs for value in side):
            figures[key] = paired_ratio(*pairs)
    return figures


def _round_figure(result: LoadResult, key: str) -> float:
    done = result.completed
    if key == "output_throughput":
        return sum(record.output_len for record in done) / result.duration
    values = [getattr(record, key.removeprefix("mean_")) for record in done]
    return float(np.mean([value for value in values if value is not None] or [0.0]))
