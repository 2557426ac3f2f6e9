"""``python -m bench.quantization``: what a base model and its keys and values in FP8 lose, alone and under an adapter.

The text is English prose of CPython's own reference, which every installation has (``pydoc_data.topics``), cut into
documents of one length. The first half of a document is its prompt, the second half is scored: perplexity, and against
the plain model the mean KL divergence of its next-token distributions and how often both have the same most likely
token. The adapter is prefill-only and the same for all: random, or one that was trained (``--adapter``).
A table for people, then one JSON line.
"""

import argparse
import functools
import math
import pydoc_data.topics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kernels.xla.fp8 import kept_as
from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edits import PrefixKV
from preft_jax.adapters.init import random_adapter
from preft_jax.cli import hyphenated
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, PreftError
from preft_jax.io.adapter_files import load_adapter
from preft_jax.loading import Model, check_base, load_model
from preft_jax.models.attention import Attention, dense_attention
from preft_jax.models.forward import edits_of, lm_head, rope_table
from preft_jax.models.layer import hidden
from preft_jax.models.params import Params
from preft_jax.models.plain import PlainLayers
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


class Base(NamedTuple):
    """Weights, and what keys and values are kept in (None: the model's dtype)."""

    params: Params
    kv_dtype: str | None = None


class KeptAttention(NamedTuple):
    """Attention to keys and values as a cache of a dtype keeps them."""

    attention: Attention
    dtype: str

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """See ``Attention``."""
        k, v = (kept_as(x, self.dtype).astype(x.dtype) for x in (k, v))
        return self.attention.attend(layer, q, k, v, window)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(
    config: ModelConfig, kv_dtype: str | None, params: Params, folded: Any, tokens_BS: jax.Array
) -> jax.Array:
    """Return the distributions behind the second half of each document but its last token, ``[B, S / 2 - 1, V]``."""
    half = tokens_BS.shape[1] // 2
    mask_BSG = jnp.zeros((*tokens_BS.shape, 2), bool).at[:, :half, 0].set(folded is not None)
    edits = edits_of(config, folded, None if folded is None else mask_BSG)
    rope = rope_table(config, jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape))
    attention: Attention = dense_attention(None, "xla")
    attention = attention if kv_dtype is None else KeptAttention(attention, kv_dtype)
    h_BSD = hidden(PlainLayers(config, rope, attention, edits), params, tokens_BS)
    return jax.nn.log_softmax(lm_head(params, h_BSD[:, half:-1]))


@jax.jit
def _compare(plain_BSV: jax.Array, other_BSV: jax.Array, targets_BS: jax.Array) -> dict[str, jax.Array]:
    chosen = jnp.take_along_axis(other_BSV, targets_BS[..., None], axis=2)
    return {
        "nll": -chosen.sum(),
        "kl": (jnp.exp(plain_BSV) * (plain_BSV - other_BSV)).sum(),
        "same": (plain_BSV.argmax(2) == other_BSV.argmax(2)).sum(),
    }


def compare(
    config: ModelConfig, bases: dict[str, Base], folded: Any, tokens: np.ndarray, batch: int
) -> dict[str, dict[str, float]]:
    """Return the figures of each base model; the first one is what the others are compared with."""
    totals = {name: dict.fromkeys(("nll", "kl", "same"), 0.0) for name in bases}
    half = tokens.shape[1] // 2
    for start in range(0, len(tokens), batch):
        some = tokens[start : start + batch]
        plain = None
        for name, (params, kv_dtype) in bases.items():
            found = _logprobs(config, kv_dtype, params, folded, some)
            plain = found if plain is None else plain
            for key, value in _compare(plain, found, some[:, half + 1 :]).items():
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the base models; returns the figures that the JSON line holds."""
    for name in ("documents", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.length < 4:
        raise ConfigError(f"--length is {args.length}; give at least 4")
    model = load_model(args.model, args.dtype)
    if model.tokenizer is None:
        raise ConfigError(f"--model {args.model} has no tokenizer; give one that has")
    tokens, start = documents(model, args.documents, args.length), time.perf_counter()
    fp8, kv_dtype = quantize(model.params), KV_DTYPES["fp8"]
    bases = {
        "plain": Base(model.params),
        "fp8": Base(fp8),
        "fp8, first and last layer plain": Base(quantize(model.params, (0, -1))),
        f"{model.params['embed'].dtype}, KV in fp8": Base(model.params, kv_dtype),
        "fp8, KV in fp8": Base(fp8, kv_dtype),
    }
    contenders = {"none": None, "lora, prefill-only": fold(make_adapter(args, model))}
    rows = []
    for name, folded in contenders.items():
        found = compare(model.config, bases, folded, tokens, args.batch_size)
        rows += [{"base": base, "adapter": name, **figures} for base, figures in found.items()]
    options = {name: value for name, value in vars(args).items() if name != "output_json"}
    return {
        "schema": SCHEMA,
        "model": model.name,
        "dtype": str(model.params["embed"].dtype),
        "options": options | {"adapter": None if args.adapter is None else str(args.adapter)},
        "scored_tokens": args.documents * (args.length - args.length // 2 - 1),
        "weight_bytes": {name: sum(leaf.nbytes for leaf in jax.tree.leaves(own.params)) for name, own in bases.items()},
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
    add("--documents", type=int, default=32, help="(default: %(default)s)")
    add("--length", type=int, default=256, help="tokens of a document (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="documents at a time (default: %(default)s)")
    add("--adapter", type=Path, default=None, help="directory of a prefill-only adapter (default: a random LoRA)")
    add("--rank", type=int, default=16, help="of the random one (default: %(default)s)")
    add("--strength", type=float, default=0.05, help="of the random one's edits (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the random one (default: %(default)s)")
    add("--output-json", type=Path, default=None, help="also write the JSON line here")
    return parser


def _print(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{found['model']}, {found['scored_tokens']:,} scored tokens", title_justify="left")
    for column in ("base", "adapter", "perplexity", "mean KL", "same top token"):
        table.add_column(column, justify="left" if column in ("base", "adapter") else "right")
    for row in found["rows"]:
        figures = f"{row['perplexity']:.3f}", f"{row['mean_kl']:.2g}", f"{row['same_top_1']:.1%}"
        table.add_row(row["base"], row["adapter"], *figures)
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
