"""The two sides that a benchmark can load, an engine in this process or a server, set up from its options."""

import argparse
import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.init import random_adapter
from preft_jax.adapters.pages import adapter_page_counts
from preft_jax.cli import quantization_of
from preft_jax.device.memory import in_use, limit
from preft_jax.errors import ConfigError
from preft_jax.io.hf import read_config
from preft_jax.loading import Model, load_model
from preft_jax.models.batch import round_up
from preft_jax.sampling.parameters import SamplingParams
from preft_jax.text.chat import EncodedPrompt, encode_prompt
from preft_jax.text.tokenizer import load_tokenizer
from serve.bench.client import HttpTarget, ServedModel, list_models
from serve.bench.contest import Contender
from serve.bench.load import EngineTarget, LoadRequest, Target
from serve.bench.workload import adapter_configs
from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.request import Request

_LEAST_BANK = 64
"""Rank pages that a bank may always have, besides those that the running requests need."""


def memory_in_use() -> float | None:
    """Return which part of an accelerator's memory is in use; None where that means nothing, as on a CPU."""
    devices = jax.local_devices()[:1]
    most = limit(devices)
    return None if most is None else in_use(devices) / most


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What prompts are made of: token ids below ``size``, a tokenizer or none, and the most tokens of a request."""

    size: int
    tokenizer: Any
    max_len: int | None

    def encode(self, text: str) -> list[int]:
        """Return a text as token ids."""
        if self.tokenizer is None:
            raise ConfigError("--dataset-name sharegpt needs a tokenizer, which --model does not have")
        return self.tokenizer.encode(text, add_special_tokens=False)


def parse_counts(text: str) -> tuple[int, ...]:
    """Parse ``"1,8,64"``, numbers of adapters."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--num-adapters is {text}; give at least 1, or several such as 1,8,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
"""What the base and two adapters are asked, for people to see that they differ."""

ANSWER_TOKENS = 16


class Side(Protocol):
    """What is loaded.

    Attributes:
        facts: about it, for the JSON line.
        vocabulary: of its model.
        modes: that it takes part in.
        counts: numbers of adapters.
        in_process: whether it compiles in this process.
    """

    facts: dict[str, Any]
    vocabulary: Vocabulary
    modes: tuple[str, ...]
    counts: tuple[int, ...]
    in_process: bool

    def target(self, contender: Contender, longest: int) -> Target:
        """Return what serves a contender's requests, none of which has more than ``longest`` tokens in all."""
        ...

    def answers(self) -> list[tuple[str, str]]:
        """Return who answers one question what, for people to see; empty where nobody is asked."""
        ...


class EngineSide:
    """One engine for each mode, made when it is first needed; numbers of adapters share it, and its programs.

    Modes take turns in every round, so all engines live at once and divide an accelerator's memory: each takes at most
    an equal share of what is left for those that are still to be made. Modes with adapters have engines of one config
    otherwise, so that their programs are compiled once where they have as many KV pages. Every number of adapters
    has adapters of its own, so that none finds another's KV or pages.
    """

    in_process = True

    def __init__(
        self,
        args: argparse.Namespace,
        make_engine: Callable[[Model, EngineConfig], Any],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ):
        self.modes: tuple[str, ...] = args.mode
        self.counts = parse_counts(args.num_adapters or "16")
        counts = self.counts if self.modes != ("base",) else ()
        wanted = {n: adapter_configs(n, args.adapter_kind, args.rank, args.positions) for n in counts}
        self._model = model = load_model(args.model, args.dtype, **quantization_of(args), mesh=args.mesh)
        most = model.config.max_position_embeddings
        self.facts = {"model": model.name, "server": None, "num_devices": model.placement.num_devices}
        self.vocabulary = Vocabulary(model.config.vocab_size, model.tokenizer, args.max_model_len or most)
        self._args, self._make_engine, self._clock, self._sleep = args, make_engine, clock, sleep
        self._engines: dict[str, Any] = {}
        self._adapters: dict[int, list[Adapter]] = {}
        for count, configs in wanted.items():
            keys = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), count), count)
            pairs = zip(configs, keys, strict=True)
            self._adapters[count] = [random_adapter(config, model.config, key) for config, key in pairs]

    def target(self, contender: Contender, longest: int) -> Target:
        """See ``Side``."""
        engine = self._engine(contender.mode, longest)
        adapters = self._adapters[contender.num_adapters] if contender.num_adapters else []
        if contender.mode == "all-token":
            adapters = [Adapter(dataclasses.replace(a.config, positions="all"), a.params) for a in adapters]
        if adapters:
            engine.load_adapters(adapters)
        sampling = SamplingParams(temperature=0.0, ignore_eos=self._args.ignore_eos)

        def make_request(request: LoadRequest) -> Request:
            return Request(
                prompt=EncodedPrompt(request.prompt, ()),
                adapter=None if request.user is None else adapters[request.user],
                sampling=sampling,
                max_tokens=request.max_tokens,
            )

        return EngineTarget(
            engine,
            make_request,
            max_concurrency=self._args.max_concurrency,
            clock=self._clock,
            sleep=self._sleep,
        )

    def answers(self) -> list[tuple[str, str]]:
        """Return who answers one question what: the base, and two users' adapters; empty where nobody can be asked."""
        engine = self._engines.get("prefill-only")
        if not isinstance(engine, Engine) or self._model.tokenizer is None:
            return []
        adapters = next(iter(self._adapters.values()))
        asked = {"base": None, "user 1": adapters[0], f"user {len(adapters)}": adapters[-1]}
        prompt = encode_prompt(self._model.tokenizer, QUESTION, vocab_size=self._model.config.vocab_size)
        room = engine.config.max_model_len - len(prompt.token_ids)
        if room < 1:
            return []
        greedy = SamplingParams(temperature=0.0)
        requests = [
            Request(prompt=prompt, adapter=adapter, sampling=greedy, max_tokens=min(ANSWER_TOKENS, room))
            for adapter in asked.values()
        ]
        return list(zip(asked, (one.text for one in engine.generate(requests)), strict=True))

    def _engine(self, mode: str, longest: int) -> Any:
        """Return a mode's engine, with every program compiled."""
        if mode not in self._engines:
            gc.collect()  # Whatever an engine or a model was made from and nothing holds any more.
            engine = self._engines[mode] = self._make_engine(self._model, self._config(mode, longest))
            engine.warm_up()
        return self._engines[mode]

    def _config(self, mode: str, longest: int) -> EngineConfig:
        args, shape = self._args, self._model.config
        length = min(round_up(longest, 64), shape.max_position_embeddings)
        config = EngineConfig(
            max_num_seqs=args.max_num_seqs,
            max_model_len=length if args.max_model_len is None else args.max_model_len,
            prefix_caching=args.enable_prefix_caching,
            kv_dtype=args.kv_cache_dtype,
            memory_utilization=self._share(),
            all_token="all-token" in self.modes,
        )
        if mode == "base":
            return config
        kinds = [adapter.config for own in self._adapters.values() for adapter in own]
        return dataclasses.replace(
            config,
            bank_pages=args.bank_pages or self._bank_pages(),
            bank_sites=tuple({site for kind in kinds for site in kind.targets}),
            adapter_dtype=args.adapter_dtype,
            max_rank=max(kind.rank for kind in kinds),
        )

    def _share(self) -> float:
        """Return up to which part of the memory the next engine may fill it."""
        most, used = self._args.memory_utilization, memory_in_use()
        left = len(self.modes) - len(self._engines)
        return most if used is None or used >= most else used + (most - used) / left

    def _bank_pages(self) -> int:
        """Return room for the largest number of adapters, but not for more than twice what can run at once."""
        sizes = [
            [max(adapter_page_counts(adapter.config, self._model.config).values()) for adapter in own]
            for own in self._adapters.values()
        ]
        running = 2 * self._args.max_num_seqs * max(max(own) for own in sizes)
        return 1 + min(max(sum(own) for own in sizes), max(_LEAST_BANK, running))


class ServerSide:
    """A server that speaks OpenAI's API.

    Its adapters are prefill-only or all-token as its list of models says (``positions``). Those of which it says
    nothing are what ``--mode`` names, and prefill-only if that names both.
    """

    in_process = False

    def __init__(self, args: argparse.Namespace, clock: Callable[[], float]):
        self._args, self._clock = args, clock
        self._base, adapters = self._served()
        self._names = self._by_mode(adapters)
        self.modes = self._known_modes()
        fewest = min((len(self._names[mode]) for mode in self.modes if mode != "base"), default=0)
        self.counts = parse_counts(args.num_adapters or str(max(fewest, 1)))
        if self.modes != ("base",) and max(self.counts) > fewest:
            raise ConfigError(f"--num-adapters is {max(self.counts)}, but the server has {fewest} adapters of a mode")
        self.vocabulary = self._make_vocabulary()
        self.facts = {"model": self._base, "server": {"base_url": args.base_url, "endpoint": args.endpoint}}

    def _served(self) -> tuple[str, list[ServedModel]]:
        """Return the base model's name, and the adapters."""
        base, adapters = self._args.served_model_name, self._args.lora_modules
        if base is None or (adapters is None and self._args.mode != ("base",)):
            models = list_models(self._args.base_url.rstrip("/"), self._args.api_key)
            bases = [model.id for model in models if model.parent is None]
            if base is None and not bases:
                raise ConfigError(f"{self._args.base_url} lists no base model; name it with --served-model-name")
            base = base or bases[0]
            listed = {model.id: model for model in models if model.parent is not None}
            return base, list(listed.values()) if adapters is None else [
                listed.get(name, ServedModel(name, base)) for name in adapters
            ]
        return base, [ServedModel(name, base) for name in adapters or []]

    def _by_mode(self, adapters: Sequence[ServedModel]) -> dict[str, list[str]]:
        """Return the adapters' names by the mode that they take part in."""
        wanted = [mode for mode in self._args.mode if mode != "base"]
        unsaid = wanted[0] if len(wanted) == 1 else "prefill-only"
        names: dict[str, list[str]] = {"prefill-only": [], "all-token": []}
        for model in adapters:
            said = "all-token" if model.positions == "all" else "prefill-only"
            names[unsaid if model.positions is None else said].append(model.id)
        return names

    def _known_modes(self) -> tuple[str, ...]:
        """Return the modes to run.

        All of them means base and those that there are adapters of.
        """
        modes = self._args.mode
        if {"prefill-only", "all-token"} <= set(modes):
            return ("base", *(mode for mode in modes if self._names.get(mode)))
        for mode in modes:
            if mode != "base" and not self._names[mode]:
                where = self._args.base_url
                raise ConfigError(f"--mode {mode}: {where} lists no such adapters; name them with --lora-modules")
        return modes

    def _make_vocabulary(self) -> Vocabulary:
        """Return the vocabulary of ``--model``, without its weights where it is a directory."""
        directory, longest = Path(self._args.model).expanduser(), self._args.max_model_len
        if directory.is_dir():
            return Vocabulary(read_config(directory).vocab_size, load_tokenizer(directory), longest)
        model = load_model(self._args.model)
        return Vocabulary(model.config.vocab_size, model.tokenizer, longest)

    def answers(self) -> list[tuple[str, str]]:
        """See ``Side``: a server is loaded with what is counted alone."""
        return []

    def target(self, contender: Contender, longest: int) -> Target:
        """See ``Side``."""
        tokenizer = self.vocabulary.tokenizer
        return HttpTarget(
            self._args.base_url,
            lambda user: self._base if user is None else self._names[contender.mode][user],
            endpoint=self._args.endpoint,
            api_key=self._args.api_key,
            decode=None if tokenizer is None else tokenizer.decode,
            ignore_eos=self._args.ignore_eos,
            max_concurrency=self._args.max_concurrency,
            clock=self._clock,
        )
