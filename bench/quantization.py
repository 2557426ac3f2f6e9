"""``python -m bench.quantization``: what a base model, its keys and values, and an adapter in FP8 lose.

The text is English prose of CPython's own reference, which every installation has (``pydoc_data.topics``), cut into
documents of one length. The first half of a document is its prompt, the second half is scored: perplexity, and against
the plain model the mean KL divergence of its next-token distributions and how often both have the same most likely
token. The adapter is prefill-only and the same for all: random, or one that was trained (``--adapter``).
Without an adapter, numbers in a long text are asked for, too (``bench/needle.py``). A table for people, then one JSON
line.
"""

import argparse
import functools
import math
import pydoc_data.topics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.fp8_bases import Base, stream, tensor_wise
from bench.needle import PLACES, Haystack, found, haystack, wilson
from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.init import random_adapter
from preft_jax.adapters.own import adapter_in_fp8
from preft_jax.cli import hyphenated
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.adapter_files import load_adapter
from preft_jax.loading import Model, check_base, load_model
from preft_jax.models.forward import lm_head
from preft_jax.models.params import Params
from preft_jax.quantize import quantize
from preft_jax.shapes import KV_DTYPES
from serve.bench.environment import environment
from serve.bench.output import emit

SCHEMA = "preft-jax/quantization/1"


def documents(model: Model, count: int, length: int) -> np.ndarray:
    """Return tokens ``[count, length]`` of the text, one document after the other.

    Raises:
        ConfigError: if there is not so much text.
    """
    topics = pydoc_data.topics.topics
    tokens = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    if len(tokens) < count * length:
        raise ConfigError(
            f"--documents {count} of --length {length} need {count * length} tokens, and the text has {len(tokens)}; "
            "lower them"
        )
    at = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.array([tokens[start : start + length] for start in at], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(
    config: ModelConfig, kv_dtype: str | None, params: Params, folded: Any, tokens_BS: jax.Array
) -> jax.Array:
    """Return the distributions behind the second half of each document but its last token, ``[B, S / 2 - 1, V]``."""
    half = tokens_BS.shape[1] // 2
    h_BSD = stream(config, kv_dtype, params, folded, tokens_BS, half)
    return jax.nn.log_softmax(lm_head(params, h_BSD[:, half:-1]))


@jax.jit
def _compare(plain_BSV: jax.Array, other_BSV: jax.Array, targets_BS: jax.Array) -> dict[str, jax.Array]:
    chosen = jnp.take_along_axis(other_BSV, targets_BS[..., None], axis=2)
    return {
        "nll": -chosen.sum(),
        "kl": (jnp.exp(plain_BSV) * (plain_BSV - other_BSV)).sum(),
        "same": (plain_BSV.argmax(2) == other_BSV.argmax(2)).sum(),
    }


def compare(config: ModelConfig, bases: dict[str, Base], tokens: np.ndarray, batch: int) -> dict[str, dict[str, float]]:
    """Return the figures of each base model; the first one is what the others are compared with."""
    totals = {name: dict.fromkeys(("nll", "kl", "same"), 0.0) for name in bases}
    half = tokens.shape[1] // 2
    for start in range(0, len(tokens), batch):
        some = tokens[start : start + batch]
        plain = None
        for name, (params, kv_dtype, folded) in bases.items():
            own = _logprobs(config, kv_dtype, params, folded, some)
            plain = own if plain is None else plain
            for key, value in _compare(plain, own, some[:, half + 1 :]).items():
                totals[name][key] += float(value)
    count = len(tokens) * (tokens.shape[1] - half - 1)
    return {
        name: {
            "perplexity": round(math.exp(own["nll"] / count), 4),
            "mean_kl": float(f"{own['kl'] / count:.3g}"),
            "same_top_1": round(own["same"] / count, 4),
        }
        for name, own in totals.items()
    }


def make_adapter(args: argparse.Namespace, model: Model) -> Adapter:
    """Return the adapter that all base models have."""
    if args.adapter is not None:
        adapter = load_adapter(args.adapter, model)
    else:
        config = AdapterConfig(kind="lora", rank=args.rank)
        adapter = random_adapter(config, model.config, jax.random.key(args.seed), strength=args.strength)
    check_base(adapter, model)
    if adapter.config.positions != "prompt":
        raise ConfigError(f"--adapter has positions {adapter.config.positions!r}; give one for prompts")
    return adapter


def contenders(model: Model, adapter: Adapter) -> tuple[dict[str, Base], dict[str, Base]]:
    """Return the base models alone and under an adapter; the first of each is plain."""
    dtype, fp8, kv_dtype = str(model.params["embed"].dtype), quantize(model.params), KV_DTYPES["fp8"]
    folded, rounded = fold(adapter), fold(adapter_in_fp8(adapter, model.config))
    alone = {
        "plain": Base(model.params),
        "fp8": Base(fp8),
        "fp8, one scale for each weight": Base(tensor_wise(model.params)),
        "fp8, first and last layer plain": Base(quantize(model.params, (0, -1))),
        f"{dtype}, KV in fp8": Base(model.params, kv_dtype),
        "fp8, KV in fp8": Base(fp8, kv_dtype),
    }
    edited = {
        "plain": Base(model.params, None, folded),
        "fp8": Base(fp8, None, folded),
        f"{dtype}, KV in fp8": Base(model.params, kv_dtype, folded),
        f"{dtype}, adapter in fp8": Base(model.params, None, rounded),
        "fp8, KV and adapter in fp8": Base(fp8, kv_dtype, rounded),
    }
    return alone, edited


def haystacks(model: Model, args: argparse.Namespace) -> list[Haystack]:
    """Return the texts of the needle task."""
    rng, encode = np.random.default_rng(args.seed), model.tokenizer.encode
    return [
        haystack(encode, lambda count, n=n: documents(model, args.haystacks, count)[n], args.context, rng)
        for n in range(args.haystacks)
    ]


def retrieval(config: ModelConfig, base: Base, hay: Sequence[Haystack]) -> dict[str, Any]:
    """Return how many needles a base model finds, with an interval of the rate."""
    count, asked = found(config, base, hay), len(hay) * len(PLACES)
    low, high = wilson(count, asked)
    return {"found": count, "asked": asked, "found_low": round(low, 4), "found_high": round(high, 4)}


def num_bytes(base: Base) -> int:
    """Return the bytes of a base model's weights."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the base models; returns the figures that the JSON line holds."""
    for name in ("documents", "batch_size", "haystacks"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.length < 4:
        raise ConfigError(f"--length is {args.length}; give at least 4")
    model = load_model(args.model, args.dtype)
    if model.tokenizer is None:
        raise ConfigError(f"--model {args.model} has no tokenizer; give one that has")
    tokens, start = documents(model, args.documents, args.length), time.perf_counter()
    hay = haystacks(model, args)
    alone, edited = contenders(model, make_adapter(args, model))
    rows = []
    for kind, bases in (("none", alone), ("lora, prefill-only", edited)):
        figures = compare(model.config, bases, tokens, args.batch_size)
        for name, base in bases.items():
            needles = {} if base.folded is not None else retrieval(model.config, base, hay)
            rows.append({"base": name, "adapter": kind, **figures[name], **needles})
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "model": model.name,
        "dtype": str(model.params["embed"].dtype),
        "options": options | {"adapter": None if args.adapter is None else str(args.adapter)},
        "scored_tokens": args.documents * (args.length - args.length // 2 - 1),
        "weight_bytes": {name: num_bytes(base) for name, base in (alone | edited).items()},
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        **environment(),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="(default: %(default)s)")
    add("--dtype", default=None, help="of what is not in FP8 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--documents", type=int, default=16, help="(default: %(default)s)")
    add("--length", type=int, default=256, help="tokens of a document (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="documents at a time (default: %(default)s)")
    add("--adapter", type=Path, default=None, help="directory of a prefill-only adapter (default: a random LoRA)")
    add("--rank", type=int, default=16, help="of the random one (default: %(default)s)")
    add("--strength", type=float, default=0.05, help="of the random one's edits (default: %(default)s)")
    add("--haystacks", type=int, default=2, help="texts of the needle task (default: %(default)s)")
    add("--context", type=int, default=2048, help="tokens of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the random adapter and the needles (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def _print(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{found['model']}, {found['scored_tokens']:,} scored tokens", title_justify="left")
    for column in ("base", "adapter", "perplexity", "mean KL", "same top token", "needles"):
        table.add_column(column, justify="left" if column in ("base", "adapter") else "right")
    for row in found["rows"]:
        figures = f"{row['perplexity']:.3f}", f"{row['mean_kl']:.2g}", f"{row['same_top_1']:.1%}"
        table.add_row(
            row["base"], row["adapter"], *figures, f"{row['found']} of {row['asked']}" if "asked" in row else ""
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    try:
        found = measure(args)
    except (PreftError, OSError) as error:
        print(f"bench.quantization: {error}", file=sys.stderr)
        return 1
    _print(found, Console(stderr=True, highlight=False, soft_wrap=True, markup=False))
    emit(found, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
