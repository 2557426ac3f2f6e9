"""Figures of ``bench.coserve``: fine-tuning tokens, promises kept, latencies, and all of it by second."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.bench.metrics import RequestRecord

PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a request must keep, in seconds, to count as served well.

    Attributes:
        ttft: from its arrival to its first token, waiting included.
        tpot: per token after the first, in the mean of the request.
    """

    ttft: float
    tpot: float = math.inf

    def kept_by(self, record: RequestRecord) -> bool:
        """Return whether a request completed and kept both; one token has no TPOT."""
        return record.status == "completed" and record.ttft <= self.ttft and (record.tpot or 0.0) <= self.tpot


def published(ttft_ms: float, tpot_ms: float) -> dict[str, Bounds]:
    """Return the bounds of three publications by name; FlexLLM's are those that are given.

    ``flexllm``: TPOT, and waiting plus TTFT, jointly. ``loquetier``: admitted within 6 s and not dropped; here the
    first token within 6 s, which is stricter. ``deltaserve``: TTFT 400 ms and TPOT 120 ms.
    """
    return {
        "flexllm": Bounds(ttft=ttft_ms / 1e3, tpot=tpot_ms / 1e3),
        "loquetier": Bounds(ttft=6.0),
        "deltaserve": Bounds(ttft=0.4, tpot=0.12),
    }


def attainment(records: Sequence[RequestRecord], bounds: dict[str, Bounds]) -> dict[str, float]:
    """Return the part of all requests that kept each of some bounds."""
    return {name: round(sum(map(own.kept_by, records)) / len(records), 4) for name, own in bounds.items()}


def latencies(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Return mean and percentiles of TTFT, TPOT and E2EL of the completed requests, in milliseconds."""
    done, found = [record for record in records if record.status == "completed"], {}
    values = {
        "ttft": [one.ttft for one in done],
        "tpot": [one.tpot for one in done if one.tpot is not None],
        "e2el": [one.e2el for one in done],
    }
    for name, seconds in values.items():
        ms = 1e3 * np.asarray(seconds or [0.0])
        found[f"mean_{name}_ms"] = round(float(ms.mean()), 3)
        found |= {f"p{p}_{name}_ms": round(float(np.percentile(ms, p)), 3) for p in PERCENTILES}
    return found


def over(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return the latencies of a contender over those of another one, by name."""
    names = [name for name in own if name.endswith("_ms") and other.get(name)]
    return {name.removesuffix("_ms"): round(own[name] / other[name], 4) for name in names}


def tokens_per_second(ends: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return the tokens trained a second until some time, from when each unit ended and the tokens it stands for."""
    return sum(tokens for end, tokens in ends if end <= seconds) / seconds


def by_second(
    records: Sequence[RequestRecord], ends: Sequence[tuple[float, float]], seconds: float
) -> dict[str, list[float | None]]:
    """Return what happened in each second: requests that came, tokens trained, and the mean TPOT in milliseconds.

    The TPOT of a second is the mean of those of the requests that were being answered then; None if there were none.
    """
    count = max(1, math.ceil(seconds))
    came, trained = [0.0] * count, [0.0] * count
    running: list[list[float]] = [[] for _ in range(count)]
    for record in records:
        if record.sent < count:
            came[int(record.sent)] += 1
        if record.tpot is None or not record.times:
            continue
        first, last = record.sent + record.times[0], record.sent + record.times[-1]
        for second in range(int(first), min(count, int(last) + 1)):
            running[second].append(1e3 * record.tpot)
    for end, tokens in ends:
        if 0 <= end < count:
            trained[int(end)] += tokens
    return {
        "requests": list(came),
        "trained_tokens": [round(one, 1) for one in trained],
        "tpot_ms": [round(float(np.mean(own)), 3) if own else None for own in running],
    }
