"""``python -m preft_jax.adapters``: look at, check, convert and merge adapter directories.

inspect DIR               what an adapter is, without its base model
validate DIR --model M    whether it loads for a base model
convert SRC DST           between preft, PEFT and (from) pyreft; change its positions
merge DIR --model M       an all-token LoRA into the weights of its base model
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.kinds import find_kind
from preft_jax.adapters.merge import check_mergeable, merge_lora
from preft_jax.cli import hyphenated
from preft_jax.config import PRESETS
from preft_jax.errors import AdapterError, PreftError
from preft_jax.io.adapter_files import FORMATS, load_adapter, read_adapter, save_adapter
from preft_jax.io.adapter_limits import AdapterLimits
from preft_jax.io.file_pair import ADVICE, CONFIG_FILE, current_tensors
from preft_jax.io.hf import save_hf_model
from preft_jax.io.hub import hub_snapshot
from preft_jax.io.peft_config import MARKER_KEY
from preft_jax.io.pyreft import convert_pyreft
from preft_jax.io.safetensors_io import read_bytes
from preft_jax.loading import HUB_ID, Model, load_model
from preft_jax.shapes import DTYPES

SOURCES = ("peft", "pyreft", "preft")


def describe(path: str | Path) -> dict[str, Any]:
    """Return what ``inspect`` prints of an adapter directory, as plain JSON values.

    Raises:
        AdapterError: if the directory holds no adapter that can be loaded.
    """
    adapter = read_adapter(path)
    config = adapter.config
    edited = [(i, site) for i, sites in enumerate(adapter.params["layers"]) for site in sites]
    ranks = {config.rank_at(i, site) for i, site in edited}
    scales = {config.scale_at(i, site) for i, site in edited} if find_kind(config.kind).scaled else set()
    return {
        "kind": config.kind,
        "ranks": sorted(ranks),
        "scales": sorted(scales),
        "targets": list(config.targets),
        "layers": "all" if config.layers is None else list(config.layers),
        "positions": config.positions,
        "acts_on": _tokens_of(config),
        "share_weights": config.share_weights,
        "assistant_turns": config.assistant_turns,
        **({} if config.alora_invocation_tokens is None else {MARKER_KEY: list(config.alora_invocation_tokens)}),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(adapter.params)),
        "bytes": current_tensors(Path(path)).stat().st_size,
        "digest": adapter.digest,
        "base_model": config.base_model,
        "base_model_digest": config.base_model_digest,
    }


def _inspect(options: argparse.Namespace) -> None:
    fields = describe(options.directory)
    if options.json:
        print(json.dumps(fields))
        return
    for name, value in fields.items():
        shown = (
            ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value) if isinstance(value, list) else value
        )
        print(f"{name:<18} {'unknown' if shown is None else shown}")


def _validate(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    adapter = load_adapter(options.directory, model, allow_base_mismatch=options.allow_base_mismatch)
    config = adapter.config
    print(f"ok: {options.directory} ({_acts_on(config)} {config.kind} adapter) fits {options.model}")
    if config.base_model_digest is None:
        print("it has no base model digest, so only its shapes were checked")


def _convert(options: argparse.Namespace) -> None:
    source = options.source or _guess_source(Path(options.src))
    model = load_model(options.model) if options.model else None
    adapter = _read_source(source, options, model)
    changes = {"positions": options.positions, "assistant_turns": options.assistant_turns}
    changes = {key: value for key, value in changes.items() if value is not None}
    if model is not None:
        changes |= {"base_model": adapter.config.base_model or options.model, "base_model_digest": model.digest}
    converted = Adapter(dataclasses.replace(adapter.config, **changes), adapter.params)
    save_adapter(
        options.dst, converted, format=options.to, allow_prefill_only_as_peft=options.allow_prefill_only_as_peft
    )
    print(f"wrote {options.dst} ({options.to}): {_acts_on(converted.config)} {converted.config.kind} adapter")
    if source != "pyreft":
        _say_changes(adapter.config, converted.config, options.to)


def _read_source(source: str, options: argparse.Namespace, model: Model | None) -> Adapter:
    if source == "pyreft":
        if model is None:
            raise AdapterError("a pyreft folder does not say how deep its base model is; give --model")
        given = {"positions": options.positions, "assistant_turns": options.assistant_turns, "act_fn": options.act_fn}
        return convert_pyreft(options.src, model.config, **{key: x for key, x in given.items() if x is not None})
    found = _guess_source(Path(options.src))
    if found != source:
        raise AdapterError(f"{options.src} is a {found} directory, not a {source} one; give --from {found}")
    if model is None:
        return read_adapter(options.src)
    return load_adapter(options.src, model, allow_base_mismatch=options.allow_base_mismatch)


def _guess_source(path: Path) -> str:
    """Tell the three kinds of directory apart by their config files."""
    if (path / CONFIG_FILE).is_file():
        try:
            most = AdapterLimits().max_config_bytes
            contents = json.loads(read_bytes(path / CONFIG_FILE, error=AdapterError, advice=ADVICE, max_bytes=most))
        except (ValueError, RecursionError) as cause:
            raise AdapterError(f"{path / CONFIG_FILE} cannot be read as JSON ({cause}); restore the file") from None
        return "preft" if isinstance(contents, dict) and "preft" in contents else "peft"
    if any(path.glob("intkey_*.bin")):
        return "pyreft"
    raise AdapterError(f"{path} holds neither {CONFIG_FILE} nor pyreft's intkey_*.bin; give an adapter directory")


def _say_changes(old: AdapterConfig, new: AdapterConfig, to: str) -> None:
    for name in ("positions", "assistant_turns"):
        if getattr(old, name) != getattr(new, name):
            print(f"{name}: {getattr(old, name)} -> {getattr(new, name)}")
    if old.positions != new.positions and to == "preft":
        print(
            "only the config changed, the tensors are the same: which tokens an adapter edits is not in its weights. "
            "It was trained for other positions, so check its quality or train it further"
        )
    if to == "peft" and not new.prefix_length and (new.prefill_only or new.assistant_turns == "skip"):
        print(
            "warning: PEFT's format cannot hold the position rule: every reader will edit ALL tokens"
            + (" from the marker on" if new.alora_invocation_tokens else ""),
            file=sys.stderr,
        )


def _merge(options: argparse.Namespace) -> None:
    check_mergeable(read_adapter(options.directory).config)
    source = _source_dtype(options.model)
    model = load_model(options.model, dtype=source)
    adapter = load_adapter(options.directory, model, allow_base_mismatch=options.allow_base_mismatch)
    dtype = options.dtype or source
    params = merge_lora(model.params, adapter, dtype=jnp.dtype(dtype))
    save_hf_model(options.output, model.config, jax.tree.map(np.asarray, params), model.tokenizer)
    print(f"wrote {options.output}: {options.model} with {options.directory} merged in, {dtype}")


def _source_dtype(name: str) -> str:
    """Return the dtype a model is stored in, by its ``config.json``; float32 for models that have none."""
    directory = Path(name).expanduser()
    if not directory.exists() and name not in PRESETS and HUB_ID.fullmatch(name):
        directory = hub_snapshot(name)
    try:
        contents = json.loads((directory / "config.json").read_bytes())
        dtype = contents.get("dtype") or contents.get("torch_dtype")
    except (OSError, ValueError, AttributeError):
        return "float32"
    return dtype if dtype in DTYPES else "float32"


def _tokens_of(config: AdapterConfig) -> str:
    if config.prefix_length:
        return "nothing: all tokens see it"
    return "prompt tokens" if config.prefill_only else "all tokens"


def _acts_on(config: AdapterConfig) -> str:
    return "prefill-only" if config.prefill_only else "all-token"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m preft_jax.adapters", description="Work with adapter directories.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{inspect,validate,convert,merge}")

    inspect = commands.add_parser("inspect", help="print what an adapter is")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of lines")

    validate = commands.add_parser("validate", help="check that an adapter loads for a base model")
    validate.set_defaults(run=_validate)

    convert = commands.add_parser("convert", help="convert between formats, or change which tokens an adapter edits")
    convert.set_defaults(run=_convert)
    convert.add_argument("src", help="directory to read")
    convert.add_argument("dst", help="directory to write")
    convert.add_argument("--from", dest="source", choices=SOURCES, help="format of SRC; by default found out")
    convert.add_argument("--to", choices=FORMATS, default="preft", help="format of DST (default: preft)")
    convert.add_argument("--positions", help="prompt, all, or f7+l7; by default as in SRC (pyreft: f7+l7)")
    convert.add_argument(
        "--assistant-turns", choices=("edit", "skip"), help="whether a chat's earlier answers are edited"
    )
    convert.add_argument("--act-fn", help="pyreft only: the act_fn that the interventions were made with")
    convert.add_argument(
        "--allow-prefill-only-as-peft",
        action="store_true",
        help="export to PEFT although every tool will then apply the adapter to all tokens",
    )

    merge = commands.add_parser("merge", help="write the base model with an all-token LoRA merged in")
    merge.set_defaults(run=_merge)
    merge.add_argument("--output", required=True, help="directory to write, new or empty")
    merge.add_argument("--dtype", choices=DTYPES, help="of the written weights; by default the base model's own")

    for command in (inspect, validate, merge):
        command.add_argument("directory", metavar="DIR", help="adapter directory")
    model_help = "base model: name or path; convert checks the adapter against it and records its digest"
    for command in (validate, convert, merge):
        command.add_argument("--model", required=command is not convert, help=model_help)
        command.add_argument(
            "--allow-base-mismatch", action="store_true", help="accept another base model of this shape"
        )
    return parser


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, or 1 after a failure; argparse exits with 2 for usage."""
    options = _parser().parse_args(hyphenated(sys.argv[1:] if arguments is None else arguments))
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            options.run(options)
        except PreftError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
