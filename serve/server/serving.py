"""What the routes share: the model, its engine, the adapters, and who may see which."""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from preft_jax.errors import RequestError, did_you_mean
from preft_jax.loading import Model
from preft_jax.text.chat import EncodedPrompt, encode_prompt
from preft_jax.text.encoding import encode_text, with_begin_tokens
from serve.engine.async_engine import AsyncEngine
from serve.server.apart import PrefillServer
from serve.server.auth import Identity, Keys, RuntimeLoading
from serve.server.exposition import ServerMetrics
from serve.server.failures import ApiError, no_model
from serve.server.tuning import Tuning
from serve.store.directory import AdapterDirectory
from serve.store.names import Registered


class Adapters(Protocol):
    """What the routes need of an ``AdapterStore``."""

    def register(
        self, name: str, path: str, *, owner: str | None = None, pinned: bool = False, replace: bool = False
    ) -> Registered:
        """Read an adapter and let a name stand for it."""
        ...

    def unregister(self, name: str) -> Registered:
        """Forget a name."""
        ...

    def get(self, name: str) -> Registered | None:
        """Return what a name stands for."""
        ...

    def list(self) -> list[Registered]:
        """Return all adapters by name."""
        ...

    def tiers(self) -> Mapping[str, float]:
        """Return figures for metrics."""
        ...

    def close(self) -> None:
        """Stop loading."""
        ...


_log = logging.getLogger("preft.server")


@dataclasses.dataclass(kw_only=True)
class Serving:
    """One server.

    Attributes:
        model: the base model.
        names: under which it is served; the first is its id.
        engine: serves it.
        adapters: the store.
        keys: who is let in.
        loading: where adapters may come from.
        max_model_len: prompt plus generated tokens.
        max_body_bytes: most bytes of a request's body.
        body_seconds: how long one may take to arrive.
        share_prefix_cache: whether a request may find KV that another key's request left in the prefix cache.
        directory: kept in step with the store, looked at every ``scan_seconds``.
        tuning: fine-tuning beside requests; None: there is none.
        hands_over: whether requests are prefilled only, for other servers.
        prefill: the server that prefills for this one; None: it does that itself.
        clock: seconds.
        wall_clock: seconds since 1970.
    """

    model: Model
    names: tuple[str, ...]
    engine: AsyncEngine
    adapters: Adapters
    keys: Keys
    loading: RuntimeLoading = dataclasses.field(default_factory=RuntimeLoading)
    max_model_len: int
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    share_prefix_cache: bool = False
    directory: AdapterDirectory | None = None
    tuning: Tuning | None = None
    hands_over: bool = False
    prefill: PrefillServer | None = None
    scan_seconds: float = 5.0
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self.names[0], self.engine, self.adapters.tiers)
        self.created = int(self.wall_clock())
        self._longest_token = _longest_token(self.model.tokenizer)

    @property
    def is_compiling(self) -> bool:
        """Whether a thread compiles, for requests or for jobs, although the server has ended."""
        return self.engine.busy or (self.tuning is not None and self.tuning.jobs.is_compiling)

    def scan(self) -> None:
        """Bring the store in step with the directory, if there is one; the log tells what changed."""
        if self.directory is None:
            return
        changes = self.directory.scan()
        for name, reason in changes.refused.items():
            _log.warning("adapter refused", extra={"facts": {"adapter": name, "reason": reason}})
        if changes.registered or changes.removed:
            facts = {"registered": len(changes.registered), "removed": len(changes.removed)}
            _log.info("adapter directory", extra={"facts": facts})

    async def watch(self) -> None:
        """Scan again and again."""
        while self.directory is not None:
            await asyncio.sleep(self.scan_seconds)
            try:
                await asyncio.to_thread(self.scan)
            except Exception:
                _log.exception("the adapter directory could not be read")

    def visible(self, identity: Identity) -> list[Registered]:
        """Return the adapters that someone sees."""
        return [adapter for adapter in self.adapters.list() if identity.sees(adapter.owner)]

    def adapter(self, name: str, identity: Identity) -> Registered | None:
        """Return the adapter that a model's name stands for; None is the base model.

        Raises:
            ApiError: 404, for a name that is unknown, or that they do not see.
        """
        if name in self.names:
            return None
        found = self.adapters.get(name)
        if found is not None and identity.sees(found.owner):
            return found
        raise no_model(name, did_you_mean(name, self.names))

    def cache_salt(self, identity: Identity, given: str | None) -> str | None:
        """Return what keeps a request's KV apart from others' in the prefix cache: its tenant and its own salt."""
        tenant = None if self.share_prefix_cache else identity.tenant
        return None if tenant is None and given is None else json.dumps([tenant, given])

    def encode(
        self, prompt: Any, *, add_generation_prompt: bool = True, add_special_tokens: bool | None = None
    ) -> EncodedPrompt:
        """Turn a prompt of any kind into tokens, see ``encode_prompt``.

        Raises:
            RequestError: as ``encode_prompt`` does.
            ApiError: 400, if it has more tokens than the model takes.
        """
        self._check_length([prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if type(m) is dict])
        if not isinstance(prompt, str) and len(prompt) >= self.max_model_len and type(prompt[0]) is int:
            raise self.too_long(f"the prompt has {len(prompt)} tokens")
        encoded = encode_prompt(
            self.model.tokenizer,
            prompt,
            vocab_size=self.model.config.vocab_size,
            add_generation_prompt=add_generation_prompt,
            add_special_tokens=add_special_tokens,
        )
        if len(encoded.token_ids) >= self.max_model_len:
            raise self.too_long(f"the prompt has {len(encoded.token_ids)} tokens")
        return encoded

    def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turn a text into tokens, with those that begin every text or without; it may be empty."""
        self._check_length([text])
        tokenizer = self.require_tokenizer()
        token_ids = encode_text(tokenizer, text)
        return with_begin_tokens(tokenizer, token_ids) if add_special_tokens else token_ids

    def _check_length(self, texts: Sequence[str]) -> None:
        """Refuse texts that cannot fit before they are tokenised, which would take long."""
        length = sum(map(len, texts))
        if length > 4 * self._longest_token * self.max_model_len:
            raise self.too_long(f"the prompt has {length} characters")

    def too_long(self, what: str) -> ApiError:
        """Return the error of a request that is longer than the model takes."""
        return ApiError(
            400,
            f"{what}; this model takes {self.max_model_len} tokens, prompt and answer together; shorten the prompt, or "
            "ask for fewer tokens",
            code="context_length_exceeded",
        )

    def require_tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        if self.model.tokenizer is None:
            raise RequestError("this model has no tokenizer; send token ids")
        return self.model.tokenizer


def _longest_token(tokenizer: Any) -> int:
    """Return the characters of the longest token; no shorter text can become fewer tokens."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1) if tokenizer is not None else 1
