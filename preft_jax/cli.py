"""What the programs' command lines share."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from preft_jax.quantize import SCHEMES
from preft_jax.shapes import ADAPTER_DTYPES, KV_DTYPES


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Accept underscores in option names: ``--output_json=f`` becomes ``--output-json=f``; values stay as they are."""

    def one(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return (name.replace("_", "-") if name.startswith("--") else name) + equals + value

    return [one(argument) for argument in arguments]


def add_quantization(add: Callable[..., Any]) -> None:
    """Add the options of ``load_model`` that quantise, ``add`` being ``add_argument`` of a parser or a group."""
    help = "fp8: linears and what they read in FP8 (default: %(default)s)"
    add("--quantization", choices=SCHEMES, default="none", help=help)
    help = "layers that --quantization leaves as they are, such as 0,-1 for the first and the last (default: none)"
    add("--keep-layers", type=_numbers, default=(), metavar="N,N", help=help)


def add_mesh(add: Callable[..., Any]) -> None:
    """Add the option that says over which devices a model is cut to serve it, ``mesh`` of ``load_model``."""
    add("--mesh", default=None, help="devices that the model is cut over: tp=N, or tp for all (default: one device)")


def add_kv_cache_dtype(add: Callable[..., Any]) -> None:
    """Add the option that says what keys and values are kept in, ``kv_dtype`` of ``EngineConfig``."""
    add("--kv-cache-dtype", choices=tuple(KV_DTYPES), default=None, help="of keys and values (default: the weights')")


def add_adapter_dtype(add: Callable[..., Any]) -> None:
    """Add the option that says what adapters are kept in outside the bank, ``adapter_dtype`` of ``EngineConfig``."""
    help = "of adapters in host memory, on disk and on their way to the device (default: as there)"
    add("--adapter-dtype", choices=ADAPTER_DTYPES, default=None, help=help)


def quantization_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``load_model`` that ``add_quantization``'s options give."""
    return {"quantization": args.quantization, "keep_layers": args.keep_layers}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers; give numbers with commas, such as 0,-1"
        ) from None
