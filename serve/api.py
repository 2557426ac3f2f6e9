"""``python -m serve.api``: a server with OpenAI's API for one base model and any number of adapters.

A request's ``model`` is the base model's name, or an adapter's, which then edits its prompt. Adapters come from
``--lora-modules``, from the subdirectories of ``--adapter-dir``, and, if the admin may do that, from requests. The log
is JSON, one line each, on standard error.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import uvicorn

from preft_jax.adapters.config import MAX_RANK
from preft_jax.adapters.pages import num_rank_pages
from preft_jax.cli import add_adapter_dtype, add_kv_cache_dtype, add_mesh, add_quantization, hyphenated, quantization_of
from preft_jax.errors import AdapterError, ConfigError, PreftError
from preft_jax.io.adapter_limits import AdapterLimits, limits_for
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.shapes import RANK_PAGE, SITES
from serve.engine.async_engine import AsyncEngine
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.pacing import Pacing, Promise, Share
from serve.finetune import Service, make_service, read_jobs, start_jobs
from serve.server.app import make_app
from serve.server.auth import Keys, RuntimeLoading, parse_keys
from serve.server.connections import AT_ONCE, Connections, allowed_connections
from serve.server.log import JsonLines
from serve.server.serving import Serving
from serve.server.slow_clients import timed_protocol
from serve.server.tuning import Tuning
from serve.store.directory import AdapterDirectory
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.host_copy import pin_for
from serve.store.names import Registry
from serve.store.uploads import UploadLimits, Uploads

_log = logging.getLogger("preft.server")

_SHARE, _TTFT_MS = 0.3, 2000.0
"""What fine-tuning gets of the device beside requests, and by when first tokens are promised, unless told otherwise."""
_BACKLOG = 2048
"""Connections that wait to be accepted."""

_UPLOAD_GRACE = 5.0
"""Seconds from the end of an upload's time until its connection is dropped."""

_MODEL_LEN = 2048
"""``--max-model-len`` unless the model has fewer positions or another number is given."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line; names are vLLM's where it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.api", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smollm2-135m", help="name or path (default: %(default)s)")
    add("--served-model-name", nargs="+", default=None, metavar="NAME", help="its names here (default: --model's)")
    add("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on CPU, bfloat16 elsewhere)")
    add_quantization(add)
    add_mesh(add)
    add_kv_cache_dtype(add)
    add("--max-num-seqs", type=int, default=16, help="requests decoded together (default: %(default)s)")
    add("--max-model-len", type=int, default=None, help=f"prompt plus output tokens (default: at most {_MODEL_LEN})")
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


def _check(args: argparse.Namespace) -> None:
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
        "upload_timeout",
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
    if _fine_tunes(args) and args.finetune_state is None and args.state_dir is None:
        raise ConfigError("fine-tuning needs --finetune-state, or --state-dir: files and jobs are kept there")
    if _fine_tunes(args) and args.mesh not in (None, "tp=1"):
        raise ConfigError(f"--mesh is {args.mesh}, and fine-tuning is on one device; leave one of them out")
    if args.finetune is not None:
        read_jobs(args.finetune)  # What is wrong with it is told before the model is loaded.
    if args.port > 65535:
        raise ConfigError(f"--port is {args.port}; give 0 to 65535")
    if args.allow_runtime_lora_updating and args.admin_key is None:
        raise ConfigError("--allow-runtime-lora-updating needs --admin-key: only the admin may load adapters")
    if args.allow_runtime_lora_updating != bool(args.adapter_root):
        raise ConfigError("--allow-runtime-lora-updating and --adapter-root need each other; give both, or neither")


def _fine_tunes(args: argparse.Namespace) -> bool:
    return args.enable_finetuning or args.finetune is not None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_environment(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Take keys from the environment, where other users of the machine do not see them."""
    args.api_key = [*args.api_key, *environment.get("PREFT_API_KEY", "").split()]
    args.admin_key = args.admin_key or environment.get("PREFT_ADMIN_KEY") or None


def _engine_config(args: argparse.Namespace, model: Model) -> EngineConfig:
    longest = model.config.max_position_embeddings
    mixed = args.mixed_tokens
    if mixed is None:
        mixed = 512 if jax.default_backend() == "gpu" and not args.all_token else 0
    return EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_model_len=min(_MODEL_LEN, longest) if args.max_model_len is None else args.max_model_len,
        memory_utilization=args.memory_utilization,
        max_rank=args.max_lora_rank,
        bank_pages=args.bank_pages,
        bank_sites=tuple(site.strip() for site in args.bank_sites.split(",")),
        all_token=args.all_token,
        mixed_tokens=mixed,
        kv_dtype=args.kv_cache_dtype,
        adapter_dtype=args.adapter_dtype,
        prefix_caching=args.enable_prefix_caching,
        reserved_bytes=int(args.finetune_memory_gib * 2**30) if _fine_tunes(args) else 0,
    )


def _make_store(args: argparse.Namespace, model: Model) -> AdapterStore:
    """Return the store, with what the state directory remembers."""
    state = args.state_dir
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    roots = [[] if args.adapter_dir is None else [args.adapter_dir], args.adapter_root]
    kept = None if state is None else state / "pages"
    files = AdapterFiles(model, kept, limits=_adapter_limits(args, model), dtype=args.adapter_dtype, roots=roots)
    registry = Registry(None if state is None else state / "adapters.sqlite")
    files.drop_others({adapter.digest for adapter in registry.list()})
    host_bytes = int(args.adapter_memory_gib * 2**30)
    return AdapterStore(files, registry, host_bytes=host_bytes, pin=pin_for(model.placement))


def _adapter_limits(args: argparse.Namespace, model: Model) -> AdapterLimits:
    """Return how much is read of an adapter: what the engine could serve, unless told otherwise."""
    rank = min(num_rank_pages(args.max_lora_rank) * RANK_PAGE, MAX_RANK)
    return limits_for(model.config, max_rank=rank, max_bytes=args.max_adapter_bytes)


def _register(store: AdapterStore, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Register ``--lora-modules``, and tell of adapters registered earlier that are served no more.

    Raises:
        AdapterError, ConfigError: for one that cannot be served.
    """
    for adapter in store.list():
        try:
            store.check(adapter.config)
        except AdapterError as error:
            _log.warning("adapter refused", extra={"facts": {"adapter": adapter.name, "reason": str(error)}})
    for item in args.lora_modules:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in names:
            raise ConfigError(f"--lora-modules has {item!r}; give NAME=PATH, with a name that the model has not")
        store.register(name, str(Path(path).resolve()), replace=True)


def _make_service(args: argparse.Namespace, model: Model, store: AdapterStore, name: str) -> Service | None:
    """Return what runs fine-tuning jobs, if any are to be."""
    if not _fine_tunes(args):
        return None
    return make_service(
        model,
        store,
        _state(args) / "jobs",
        name=name,
        max_jobs=args.max_finetune_jobs,
        max_open_jobs=args.max_open_finetune_jobs,
    )


def _state(args: argparse.Namespace) -> Path:
    return args.finetune_state or args.state_dir / "finetuning"


def _make_tuning(args: argparse.Namespace, service: Service, engine: AsyncEngine) -> Tuning:
    """Begin the operator's jobs, and return what the routes need."""
    service.wake = engine.wake
    for name, record, new in start_jobs(service, {} if args.finetune is None else read_jobs(args.finetune)):
        facts = {"name": name, "job": record.id, "status": record.status, "new": new}
        _log.info("fine-tuning job", extra={"facts": facts})
    limits = UploadLimits(
        file_bytes=int(args.max_upload_mib * 2**20),
        owner_bytes=int(args.max_uploads_mib * 2**20),
        owner_files=args.max_uploads,
    )
    uploads = Uploads(_state(args) / "files", limits)
    return Tuning(jobs=service, uploads=uploads, upload_seconds=args.upload_timeout)


def _start_log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("jax", "httpx", "asyncio", "absl"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets the engine finish when it is told to end, and ends when the engine fails."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_seconds: float):
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        return await super().on_tick(counter) or not self._engine.alive

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and finish or give up the requests there are."""
        await asyncio.gather(self._engine.stop(self._drain_seconds), super().shutdown(sockets))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, few connections accepted at a time and many waiting to be."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)


def make_connections(most: int | None, per_address: int | None) -> Connections:
    """Return the book of connections; None: what descriptors allow, and half of it for one address.

    Raises:
        ConfigError: if descriptors do not allow so many.
    """
    allowed = allowed_connections()
    if most is not None and most > allowed:
        raise ConfigError(
            f"--max-connections is {most}, and the limit of open files allows {allowed}; give less, or raise it "
            "(ulimit -n)"
        )
    most = allowed if most is None else most
    return Connections(most, min(most, max(1, most // 2) if per_address is None else per_address))


def make_server(
    serving: Serving,
    *,
    request_seconds: float,
    read_seconds: float,
    drain_seconds: float,
    connections: Connections | None = None,
) -> DrainingServer:
    """Return the server of an app, with limits for slow clients, for connections and for its end."""
    connections = connections or make_connections(None, None)
    config = uvicorn.Config(
        make_app(serving),
        http=timed_protocol(
            request_seconds,
            read_seconds,
            connections,
            # The route tells a client that it was too slow; this is for those who do not listen.
            upload_seconds=None if serving.tuning is None else serving.tuning.upload_seconds + _UPLOAD_GRACE,
        ),
        backlog=AT_ONCE,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=64 * 2**10,
        timeout_graceful_shutdown=int(drain_seconds) + 15,
    )
    return DrainingServer(config, serving.engine, drain_seconds)


def _pacing(args: argparse.Namespace) -> Pacing:
    """Return how much fine-tuning gets beside requests."""
    if args.finetune_tpot_ms is not None:
        return Promise(tpot_ms=args.finetune_tpot_ms, ttft_ms=args.finetune_ttft_ms or _TTFT_MS)
    return Share(_SHARE if args.finetune_share is None else args.finetune_share)


def make_serving(args: argparse.Namespace) -> Serving:
    """Load what the command line names."""
    keys = Keys(parse_keys(args.api_key), args.admin_key)
    loading = RuntimeLoading(args.adapter_root)
    model = load_model(args.model, args.dtype, **quantization_of(args), mesh=args.mesh)
    model = serving_model(model, args.max_num_seqs)
    names = tuple(args.served_model_name or (args.model,))
    config = _engine_config(args, model)
    store = _make_store(args, model)
    service = _make_service(args, model, store, names[0])
    background = None if service is None else service.training
    engine = Engine(model, config, store=store, background=background, background_pacing=_pacing(args))
    if service is not None:
        service.training.memory = engine.memory
    running = AsyncEngine(engine, max_waiting=args.max_waiting)
    _register(store, args, names)
    directory = None if args.adapter_dir is None else AdapterDirectory(store, args.adapter_dir, taken=names)
    serving = Serving(
        model=model,
        names=names,
        engine=running,
        adapters=store,
        keys=keys,
        loading=loading,
        max_model_len=config.max_model_len,
        max_body_bytes=int(args.max_body_mib * 2**20),
        body_seconds=args.request_timeout,
        share_prefix_cache=args.share_prefix_cache,
        directory=directory,
        tuning=None if service is None else _make_tuning(args, service, running),
    )
    serving.scan()
    return serving


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; returns the exit status."""
    _check(args)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family, backlog=_BACKLOG) as listener:
        serving = make_serving(args)
        server = make_server(
            serving,
            request_seconds=args.request_timeout,
            read_seconds=args.read_timeout,
            drain_seconds=args.drain_seconds,
            connections=make_connections(args.max_connections, args.max_connections_per_address),
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        facts = {"url": url, "model": serving.names[0], "adapters": len(serving.adapters.list())}
        _log.info("listening", extra={"facts": facts})
        # uvicorn takes the signal while it runs, and raises it again when it has ended.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        server.run([listener])
        status = 0 if serving.engine.alive else 1
        _log.info("ended", extra={"facts": {"status": status}})
        if not serving.engine.busy:
            serving.adapters.close()
        if serving.is_compiling:
            os._exit(status)  # A thread is inside a compilation, which nothing ends.
        return status


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the program; returns its exit status."""
    args = make_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    _add_environment(args, environment)
    _start_log(args.log_level)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        return run(args)
    except (PreftError, OSError) as error:
        print(f"serve.api: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
