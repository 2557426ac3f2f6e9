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
from preft_jax.cli import hyphenated, quantization_of
from preft_jax.errors import AdapterError, ConfigError, PreftError
from preft_jax.io.adapter_limits import AdapterLimits, limits_for
from preft_jax.loading import Model, load_model, serving_model
from preft_jax.shapes import RANK_PAGE
from serve.engine.async_engine import AsyncEngine
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.pacing import Pacing, Promise, Share
from serve.finetune import Service, make_service, read_jobs, start_jobs
from serve.options import MODEL_LEN, add_environment, check, fine_tunes, make_parser
from serve.server.apart import PrefillServer
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


def _engine_config(args: argparse.Namespace, model: Model) -> EngineConfig:
    longest = model.config.max_position_embeddings
    mixed = args.mixed_tokens
    if mixed is None:
        mixes = jax.default_backend() == "gpu" and not args.all_token and args.role != "prefill"
        mixed = 512 if mixes else 0
    return EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_model_len=min(MODEL_LEN, longest) if args.max_model_len is None else args.max_model_len,
        memory_utilization=args.memory_utilization,
        max_rank=args.max_lora_rank,
        bank_pages=1 if args.role == "decode" else args.bank_pages,
        bank_sites=tuple(site.strip() for site in args.bank_sites.split(",")),
        all_token=args.all_token,
        mixed_tokens=mixed,
        kv_dtype=args.kv_cache_dtype,
        adapter_dtype=args.adapter_dtype,
        prefix_caching=args.enable_prefix_caching,
        reserved_bytes=int(args.finetune_memory_gib * 2**30) if fine_tunes(args) else 0,
        role=args.role,
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
    if not fine_tunes(args):
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
        hands_over=args.role == "prefill",
        prefill=None if args.prefill_url is None else PrefillServer(args.prefill_url, args.prefill_timeout),
    )
    serving.scan()
    return serving


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; returns the exit status."""
    check(args)
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
    args = make_parser(__doc__).parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
    add_environment(args, environment)
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
