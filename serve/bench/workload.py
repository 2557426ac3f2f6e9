"""What a benchmark asks for: prompts, output lengths, arrivals and who uses which adapter, all drawn from one seed."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from preft_jax.adapters.config import KINDS, AdapterConfig
from preft_jax.adapters.positions import parse_positions
from preft_jax.errors import ConfigError
from serve.bench.datasets import Conversation, Trace

MIXED_ADAPTERS = (("lora", 8), ("lora", 16), ("lora", 32), ("direft", 16))
"""Kinds and ranks that ``--adapter-kind mixed`` goes round."""

DISTRIBUTIONS = ("uniform", "zipf", "round-robin", "distinct")

_SHORTEST_TEXT = 4
"""Conversations with fewer tokens in prompt or answer are left out, as vLLM's benchmark does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Prompts as token ids and how many tokens to generate for each.

    Attributes:
        prompts: token ids.
        output_lens: tokens to generate.
        skipped: requests of the data set that were left out because they are too long or too short.
        clipped: requests that were shortened to fit the model's length.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    skipped: int = 0
    clipped: int = 0


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


def adapter_configs(num_adapters: int, kind: str, rank: int | None, positions: str = "prompt") -> list[AdapterConfig]:
    """Return the adapters of a benchmark: ``kind`` (or ``mixed``) at ``rank`` (16, or the mix's own, if None).

    Raises:
        ConfigError: for another kind, or ``positions`` that are not of prompt-only adapters.
    """
    if parse_positions(positions).edits_generated:
        raise ConfigError(f"--positions is {positions!r}, which --mode all-token measures; give prompt, l64 or f7+l7")
    if kind == "mixed":
        mix = [(k, r if rank is None else rank) for k, r in MIXED_ADAPTERS]
    elif kind in KINDS:
        mix = [(kind, 16 if rank is None else rank)]
    else:
        raise ConfigError(f"adapter kind {kind!r} is not allowed; allowed: mixed, {', '.join(KINDS)}")
    kinds = [mix[i % len(mix)] for i in range(num_adapters)]
    return [AdapterConfig(kind=kind, rank=rank, positions=positions) for kind, rank in kinds]


def draw_users(
    rng: np.random.Generator, num_prompts: int, num_adapters: int, distribution: str, alpha: float = 1.0
) -> list[int]:
    """Draw each request's adapter.

    Args:
        rng: where the draws come from.
        num_prompts: requests.
        num_adapters: adapters to choose from.
        distribution: ``uniform``; ``zipf``, the k-th most popular with probability proportional to ``k ** -alpha``;
            ``round-robin``, each in turn; ``distinct``, no adapter twice.
        alpha: exponent of zipf.

    Raises:
        ConfigError: for another distribution, or if there are fewer adapters than ``distinct`` requests.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"adapter distribution {distribution!r} is not allowed; allowed: {', '.join(DISTRIBUTIONS)}")
    if distribution == "distinct" and num_adapters < num_prompts:
        raise ConfigError(
            f"{num_prompts} requests with distinct adapters need as many adapters, --num-adapters is {num_adapters}; "
            "give more, or use --adapter-distribution round-robin"
        )
    if distribution == "distinct":
        return rng.permutation(num_adapters)[:num_prompts].tolist()
    if distribution == "round-robin":
        return [i % num_adapters for i in range(num_prompts)]
    weights = np.ones(num_adapters) if distribution == "uniform" else np.arange(1, num_adapters + 1.0) ** -alpha
    return rng.choice(num_adapters, size=num_prompts, p=weights / weights.sum()).tolist()


def random_texts(
    rng: np.random.Generator,
    num_prompts: int,
    *,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    vocab_size: int,
    prefix_len: int = 0,
) -> Texts:
    """Draw prompts of random tokens; lengths are uniform over their ranges, both ends included.

    ``prefix_len`` tokens more are in front of each, the same for all.
    """
    prefix = rng.integers(0, vocab_size, prefix_len).tolist()
    input_lens = rng.integers(input_len[0], input_len[1] + 1, num_prompts)
    return Texts(
        prompts=[prefix + rng.integers(0, vocab_size, n).tolist() for n in input_lens],
        output_lens=rng.integers(output_len[0], output_len[1] + 1, num_prompts).tolist(),
    )


def trace_texts(rng: np.random.Generator, trace: Trace, *, vocab_size: int, max_len: int | None) -> Texts:
    """Draw random prompts with the lengths of a trace; what is longer than ``max_len`` in all is clipped to it."""
    prompts, output_lens, clipped = [], [], 0
    for prompt_len, output_len in zip(trace.prompt_lens, trace.output_lens, strict=True):
        output = output_len if max_len is None else min(output_len, max_len - 1)
        prompt = prompt_len if max_len is None else min(prompt_len, max_len - output)
        clipped += (prompt, output) != (prompt_len, output_len)
        prompts.append(rng.integers(0, vocab_size, prompt).tolist())
        output_lens.append(output)
    return Texts(prompts=prompts, output_lens=output_lens, clipped=clipped)


def conversation_texts(
    rng: np.random.Generator,
    num_prompts: int,
    conversations: Sequence[Conversation],
    encode: Callable[[str], list[int]],
    *,
    output_len: tuple[int, int] | None,
    max_len: int | None,
) -> Texts:
    """Draw conversations in random order, again from the beginning if there are fewer than ``num_prompts``.

    Args:
        rng: where the order, and lengths drawn from ``output_len``, come from.
        num_prompts: conversations to draw.
        conversations: what to draw from.
        encode: text to token ids.
        output_len: a range to draw output lengths from; None takes the answers' lengths.
        max_len: prompt and answer together; longer conversations are left out.

    Raises:
        ConfigError: if none of them can be used.
    """
    prompts: list[list[int]] = []
    output_lens: list[int] = []
    skipped = 0
    for number in rng.permutation(len(conversations)):
        prompt = encode(conversations[number].prompt)
        if output_len is None:
            output = len(encode(conversations[number].answer))
        else:
            output = int(rng.integers(output_len[0], output_len[1] + 1))
        short = len(prompt) < _SHORTEST_TEXT or (output_len is None and output < _SHORTEST_TEXT)
        if short or (max_len is not None and len(prompt) + output > max_len):
            skipped += 1
            continue
        prompts.append(prompt)
        output_lens.append(output)
        if len(prompts) == num_prompts:
            break
    if not prompts:
        raise ConfigError(
            f"none of the {len(conversations)} conversations of --dataset-path can be used: each has fewer than "
            f"{_SHORTEST_TEXT} tokens, or more than {max_len} with its answer; raise --max-model-len"
        )
    again = [i % len(prompts) for i in range(num_prompts)]
    return Texts(prompts=[prompts[i] for i in again], output_lens=[output_lens[i] for i in again], skipped=skipped)
