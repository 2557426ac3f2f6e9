"""What a benchmark asks for: prompts, output lengths and who uses which adapter, all drawn from one seed."""

import dataclasses
import re

import numpy as np

from preft_jax.adapter import KINDS, AdapterConfig
from preft_jax.errors import ConfigError

MIXED_ADAPTERS = (("lora", 8), ("lora", 16), ("lora", 32), ("direft", 16))
"""Kinds and ranks that ``--adapter-kind mixed`` goes round."""

DISTRIBUTIONS = ("uniform", "zipf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of a benchmark, request i being ``prompts[i]``, ``output_lens[i]`` tokens long, for adapter
    ``users[i]``.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    users: list[int]


def parse_range(text: str, name: str) -> tuple[int, int]:
    """Parse a length, ``"256"``, or a range of lengths with both ends included, ``"32:256"``."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"{name} is {text!r}; give a number of tokens such as 256, or a range such as 32:256")
    low = int(match.group(1))
    high = int(match.group(2) or low)
    if not 1 <= low <= high:
        raise ConfigError(f"{name} is {text!r}; the range must rise and start at 1 or more")
    return low, high


def adapter_configs(num_adapters: int, kind: str, rank: int | None) -> list[AdapterConfig]:
    """Return the adapters of a benchmark: ``kind`` (or ``mixed``) at ``rank`` (16, or the mix's own, if None)."""
    if kind == "mixed":
        mix = [(k, r if rank is None else rank) for k, r in MIXED_ADAPTERS]
    elif kind in KINDS:
        mix = [(kind, 16 if rank is None else rank)]
    else:
        raise ConfigError(f"adapter kind {kind!r} is not allowed; allowed: mixed, {', '.join(KINDS)}")
    return [AdapterConfig(kind=mix[i % len(mix)][0], rank=mix[i % len(mix)][1]) for i in range(num_adapters)]


def draw_users(
    rng: np.random.Generator, num_prompts: int, num_adapters: int, distribution: str, alpha: float
) -> list[int]:
    """Draw each request's adapter: uniformly, or the k-th most popular with probability proportional to k^-alpha."""
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"adapter distribution {distribution!r} is not allowed; allowed: {', '.join(DISTRIBUTIONS)}")
    weights = np.ones(num_adapters) if distribution == "uniform" else np.arange(1, num_adapters + 1.0) ** -alpha
    return rng.choice(num_adapters, size=num_prompts, p=weights / weights.sum()).tolist()


def make_workload(
    *,
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    num_adapters: int,
    distribution: str,
    zipf_alpha: float,
    vocab_size: int,
    seed: int,
) -> Workload:
    """Draw a workload of random tokens; lengths are uniform over their ranges, both ends included."""
    rng = np.random.default_rng(seed)
    input_lens = rng.integers(input_len[0], input_len[1] + 1, num_prompts)
    return Workload(
        prompts=[rng.integers(0, vocab_size, n).tolist() for n in input_lens],
        output_lens=rng.integers(output_len[0], output_len[1] + 1, num_prompts).tolist(),
        users=draw_users(rng, num_prompts, num_adapters, distribution, zipf_alpha),
    )
