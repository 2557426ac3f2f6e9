"""The command line of ``serve.api``: its options, and what is out of range or does not go together."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from preft_jax.cli import add_adapter_dtype, add_kv_cache_dtype, add_mesh, add_quantization
from preft_jax.errors import ConfigError
from preft_jax.shapes import SITES
from serve.engine.config import ROLES
from serve.finetune import read_jobs

_log = logging.getLogger("preft.server")

MODEL_LEN = 2048
"""``--max-model-len`` unless the model has fewer positions or another number is given."""


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the command line; names are vLLM's where it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.api", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smollm2-135m", help="name or path (default: %(default)s)")
    add("--served-model-name", nargs="+", default=None, metavar="NAME", help="its names here (default: --model's)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_mesh(add)
    add_kv_cache_dtype(add)
    add("--max-num-seqs", type=int, default=16, help="requests decoded together (default: %(default)s)")
    add("--max-model-len", type=int, default=None, help=f"prompt plus output tokens (default: at most {MODEL_LEN})")
    add("--memory-utilization", type=float, default=0.9, help="part of an accelerator's memory (default: %(default)s)")
    add(
        "--mixed-tokens",
        type=int,
        default=None,
        help="tokens of the largest call in which running requests take a step beside prompts; 0: none do (default: "
        "512 on a GPU without --all-token, else 0)",
    )
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="on by default")
    add("--share-prefix-cache", action="store_true", help="between keys too, who may then time each other's prompts")

    _add_role(parser)

    _add_adapters(parser)
    _add_fine_tuning(parser)

    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="default: %(default)s")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--api-key", action="append", default=[], metavar="[USER=]KEY", help="let in; also PREFT_API_KEY, with spaces")
    add("--admin-key", default=None, metavar="KEY", help="of who may load adapters and sees all; also PREFT_ADMIN_KEY")
    add("--max-waiting", type=int, default=256, help="requests without a first token (default: %(default)s)")
    add(
        "--max-connections",
        type=int,
        default=None,
        help="open at once; idle ones make room for new ones (default: what the limit of descriptors allows)",
    )
    add("--max-connections-per-address", type=int, default=None, help="of one client (default: half of all)")
    add("--max-body-mib", type=float, default=4.0, help="largest body (default: %(default)s)")
    add("--request-timeout", type=float, default=30.0, help="seconds a request may take to arrive (%(default)s)")
    add("--read-timeout", type=float, default=60.0, help="seconds an answer may lie unread (default: %(default)s)")
    add("--drain-seconds", type=float, default=30.0, help="to finish requests after SIGTERM (default: %(default)s)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="default: %(default)s")
    return parser


def _add_role(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prefill and decode apart").add_argument
    add("--role", default="both", choices=ROLES, help="what it does of a request (default: %(default)s)")
    add("--prefill-url", default=None, metavar="URL", help="of the server that prefills for one of the role decode")
    add("--prefill-timeout", type=float, default=60.0, help="seconds it may say nothing (default: %(default)s)")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adapters").add_argument
    add("--adapter-dir", type=Path, default=None, help="each subdirectory is an adapter, named by it; it is watched")
    add("--lora-modules", nargs="+", default=[], metavar="NAME=PATH", help="adapters, each with its name")
    add("--state-dir", type=Path, default=None, help="remembers adapters over restarts (default: nothing is kept)")
    add("--max-lora-rank", type=int, default=64, help="largest rank of an adapter (default: %(default)s)")
    add(
        "--max-adapter-bytes",
        type=int,
        default=None,
        help="largest file of an adapter's tensors (default: what --max-lora-rank takes on all linears in float32)",
    )
    add("--bank-pages", type=int, default=33, help="rank pages of 16 on the device (default: %(default)s)")
    add(
        "--bank-sites",
        default=",".join(SITES),
        help="what adapters may edit, with commas, and prefix for learned prefixes; the memory of others goes to the "
        "KV cache (default: %(default)s)",
    )
    add("--adapter-memory-gib", type=float, default=4.0, help="host memory for adapters (default: %(default)s)")
    add_adapter_dtype(add)
    add("--all-token", action="store_true", help="also serve adapters that edit every token")
    add("--allow-runtime-lora-updating", action="store_true", help="let the admin load and unload adapters")
    add("--adapter-root", type=Path, action="append", default=[], metavar="DIR", help="they may be loaded from here")


def _add_fine_tuning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--enable-finetuning", action="store_true", help="offer /v1/files and /v1/fine_tuning/jobs")
    add("--finetune", type=Path, default=None, metavar="JOBS.yaml", help="jobs to begin with, each once; enables it")
    add(
        "--finetune-state",
        type=Path,
        default=None,
        metavar="DIR",
        help="remembers files and jobs over restarts (default: finetuning in --state-dir)",
    )
    add(
        "--finetune-share",
        type=float,
        default=None,
        help="of the device's time, beside requests (default: 0.3, unless a promise is given)",
    )
    add(
        "--finetune-tpot-ms",
        type=float,
        default=None,
        help="in place of a share: as much as nearly all requests have to spare of so many milliseconds per token",
    )
    add(
        "--finetune-ttft-ms",
        type=float,
        default=None,
        help="the same for the first token (default: 2000, with --finetune-tpot-ms)",
    )
    add(
        "--finetune-memory-gib",
        type=float,
        default=4.0,
        help="of an accelerator's memory, kept for it (default: %(default)s)",
    )
    add("--max-finetune-jobs", type=int, default=4, help="that are trained at a time (default: %(default)s)")
    add("--max-open-finetune-jobs", type=int, default=16, help="of a key, that have not ended (default: %(default)s)")
    add("--max-upload-mib", type=float, default=512.0, help="largest file (default: %(default)s)")
    add("--max-uploads", type=int, default=256, help="files of a key (default: %(default)s)")
    add("--max-uploads-mib", type=float, default=2048.0, help="all files of a key (default: %(default)s)")
    add("--upload-timeout", type=float, default=600.0, help="seconds a file may take to arrive (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for options that are out of range or do not go together."""
    for name, least in (
        ("max_waiting", 1), ("drain_seconds", 0), ("port", 0), ("max_finetune_jobs", 1),
        ("max_open_finetune_jobs", 1), ("max_uploads", 1), ("finetune_memory_gib", 0),
    ):  # fmt: skip
        if not getattr(args, name) >= least:
            raise ConfigError(f"{_option(name)} is {getattr(args, name)}; give at least {least}")
    for name in ("max_adapter_bytes", "max_connections", "max_connections_per_address"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{_option(name)} is {getattr(args, name)}; give at least 1")
    if args.drain_seconds == float("inf"):
        raise ConfigError("--drain-seconds is inf; give a number of seconds")
    for name in (
        "adapter_memory_gib", "max_body_mib", "request_timeout", "read_timeout", "max_upload_mib", "max_uploads_mib",
        "upload_timeout", "prefill_timeout",
    ):  # fmt: skip
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"{_option(name)} is {getattr(args, name)}; give a number above 0")
    if args.finetune_share is not None and not 0 <= args.finetune_share < 1:
        raise ConfigError(f"--finetune-share is {args.finetune_share}; give 0 up to, not including, 1")
    for name in ("finetune_tpot_ms", "finetune_ttft_ms"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"{_option(name)} is {getattr(args, name)}; give a number above 0")
    if args.finetune_tpot_ms is not None and args.finetune_share is not None:
        raise ConfigError("--finetune-share and --finetune-tpot-ms are both given; give one of them")
    if args.finetune_ttft_ms is not None and args.finetune_tpot_ms is None:
        raise ConfigError("--finetune-ttft-ms is given without --finetune-tpot-ms; give both, or a --finetune-share")
    if fine_tunes(args) and args.finetune_state is None and args.state_dir is None:
        raise ConfigError("fine-tuning needs --finetune-state, or --state-dir: files and jobs are kept there")
    if fine_tunes(args) and args.mesh not in (None, "tp=1"):
        raise ConfigError(f"--mesh is {args.mesh}, and fine-tuning is on one device; leave one of them out")
    _check_role(args)
    if args.finetune is not None:
        read_jobs(args.finetune)  # What is wrong with it is told before the model is loaded.
    if args.port > 65535:
        raise ConfigError(f"--port is {args.port}; give 0 to 65535")
    if args.allow_runtime_lora_updating and args.admin_key is None:
        raise ConfigError("--allow-runtime-lora-updating needs --admin-key: only the admin may load adapters")
    if args.allow_runtime_lora_updating != bool(args.adapter_root):
        raise ConfigError("--allow-runtime-lora-updating and --adapter-root need each other; give both, or neither")


def _check_role(args: argparse.Namespace) -> None:
    if (args.role == "decode") != (args.prefill_url is not None):
        raise ConfigError("--role decode and --prefill-url need each other; give both, or neither")
    if args.prefill_url is not None and not args.prefill_url.startswith(("http://", "https://")):
        raise ConfigError(f"--prefill-url is {args.prefill_url!r}; give an address such as http://10.0.0.7:8000")
    if args.prefill_url is not None and not args.api_key:
        _log.warning("there is no --api-key: all clients are one tenant here, whichever keys the prefill server has")
    if args.role != "both" and args.all_token:
        raise ConfigError(
            f"--all-token is given, and --role is {args.role}: adapters of all tokens edit what is decoded; serve them "
            "with --role both"
        )
    if args.role == "decode":
        given = {
            "--adapter-dir": args.adapter_dir, "--lora-modules": args.lora_modules, "--adapter-root": args.adapter_root,
            "--enable-finetuning": fine_tunes(args),
        }  # fmt: skip
        if name := next((name for name, value in given.items() if value), None):
            raise ConfigError(f"{name} is given, and --role decode has no adapters; give it to the prefill server")


def fine_tunes(args: argparse.Namespace) -> bool:
    """Whether jobs are trained beside requests."""
    return args.enable_finetuning or args.finetune is not None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_environment(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Take keys from the environment, where other users of the machine do not see them."""
    args.api_key = [*args.api_key, *environment.get("PREFT_API_KEY", "").split()]
    args.admin_key = args.admin_key or environment.get("PREFT_ADMIN_KEY") or None
