"""``AdapterConfig``: what an adapter is and where it acts, and the shapes of its parameters."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from preft_jax.adapters import builtin_kinds as _builtin_kinds  # noqa: F401  They register themselves.
from preft_jax.adapters.kinds import KINDS as KINDS
from preft_jax.adapters.kinds import Kind, find_kind
from preft_jax.adapters.patterns import Matcher, parse
from preft_jax.adapters.positions import parse_positions
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, did_you_mean, shown
from preft_jax.frozen import FrozenDict
from preft_jax.models.family import HF_MODULES
from preft_jax.shapes import NUM_GROUPS, PREFIX

MAX_RANK = 1024


_LARGEST = float(np.finfo(np.float32).max)


MAX_MARKER = 256
"""Most tokens of ``alora_invocation_tokens``."""

MAX_PATTERNS = 2048
"""Names of one ``rank_pattern`` or ``alpha_pattern``; a model of a hundred layers has 700 linears."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter is and where it acts. Hashable, so that it can be a static argument of a jitted function.

    Attributes:
        kind: ``lora``, ``direft``, ``loreft``, ``edits``, ``prefix``, or one of your own
            (``adapters.kinds.register_kind``).
        rank: rank of every edit that ``rank_pattern`` does not name; a prefix's number of positions.
        alpha: LoRA's scale numerator; ``None`` means ``rank``, a scale of 1 without rsLoRA and patterns.
            Not used by ReFT.
        use_rslora: divide by the square root of the rank instead of the rank.
        targets: sites edited in each layer; ReFT has ``("block",)``. Empty: those of the kind.
        layers: layers edited; ``None`` means all.
        rank_pattern: rank by name, as in PEFT: a key matches a module whose path ends with it
            (``"layers.3.self_attn.q_proj"``, ``"q_proj"``) or that it matches as a regular expression (see
            ``module_pattern``); first match wins. Sites' own names (``"q"``) work too.
        alpha_pattern: the same for alpha.
        positions: ``prompt`` (prefill-only), ``f{n}+l{m}`` (first and last prompt positions) or ``all`` (every token).
        share_weights: with ``f{n}+l{m}``: one set of weights for first and last positions (true), or one each.
        alora_invocation_tokens: a marker, as token ids; of what ``positions`` says, ``prompt`` or ``all``, only tokens
            from its last place in the prompt on are edited, and nothing if the prompt does not hold it. ``None``:
            no marker. The name is PEFT's, whose activated LoRA is ``all`` with a marker.
        assistant_turns: ``edit`` or ``skip`` earlier answers of a chat.
        orthonormal: DiReFT only: keep the rows of ``r`` orthonormal, as pyreft's ``DireftIntervention`` does.
        dropout: on LoRA's input, in training only.
        base_model: name of the base model, for people.
        base_model_digest: SHA-256 of the base model; ``None`` if unknown (PEFT adapters).
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()
    positions: str = "prompt"
    share_weights: bool = True
    alora_invocation_tokens: tuple[int, ...] | None = None
    assistant_turns: str = "edit"
    orthonormal: bool = True
    dropout: float = 0.0
    base_model: str | None = None
    base_model_digest: str | None = None

    def __post_init__(self) -> None:
        kind = find_kind(self.kind)
        if isinstance(self.targets, str):
            raise ConfigError(f"targets is {shown(self.targets)}; give a tuple of sites: ({self.targets[:1]!r},)")
        object.__setattr__(self, "targets", tuple(self.targets) or kind.targets)
        self._check_targets(kind)
        self._check_patterns()
        for name, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise ConfigError(
                    f"rank {shown(rank)} of {shown(name)} is not allowed; give an integer from 1 to {MAX_RANK}"
                )
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if alpha is not None and not (isinstance(alpha, int | float) and abs(alpha) <= _LARGEST):
                raise ConfigError(
                    f"alpha {shown(alpha)} of {shown(name)} is not allowed; give a finite number, in float32 too"
                )
        if self.assistant_turns not in ("edit", "skip"):
            raise ConfigError(f"assistant_turns {shown(self.assistant_turns)} is not allowed; give 'edit' or 'skip'")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"dropout {shown(self.dropout)} is not allowed; give a number from 0 up to, not including, 1"
            )
        if self.layers is not None and not isinstance(self.layers, tuple | list):
            raise ConfigError(f"layers is {shown(self.layers)}; give a tuple of layers, or None for all")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or min(self.layers, default=-1) < 0):
            raise ConfigError(
                f"layers {shown(self.layers)} is empty, or holds a negative or repeated layer; None means all"
            )
        if not self.orthonormal and self.kind == "loreft":
            raise ConfigError("orthonormal false is for DiReFT; LoReFT's rows are orthonormal by its definition")
        rule = parse_positions(self.positions)
        self._check_marker()
        self._check_prefix()
        if not self.share_weights and (not kind.grouped or rule.first is None):
            raise ConfigError(
                "share_weights false needs a ReFT kind and positions such as 'f7+l7'; "
                f"this adapter is {self.kind!r} at {self.positions!r}"
            )

    def _check_marker(self) -> None:
        marker = self.alora_invocation_tokens
        if marker is None:
            return
        is_list = isinstance(marker, tuple | list) and 1 <= len(marker) <= MAX_MARKER
        if not is_list or not all(type(token) is int and 0 <= token < 2**31 for token in marker):
            raise ConfigError(
                f"alora_invocation_tokens is {shown(marker)}; give a tuple of 1 to {MAX_MARKER} token ids, or None for "
                "no marker"
            )
        object.__setattr__(self, "alora_invocation_tokens", tuple(marker))
        if self.positions not in ("prompt", "all"):
            raise ConfigError(
                f"alora_invocation_tokens begin the edits at a marker, and positions {self.positions!r} counts them "
                "otherwise; give positions 'prompt' (from the marker to the prompt's end) or 'all' (generated tokens "
                "too), or leave the marker out"
            )

    def _check_prefix(self) -> None:
        """Refuse what means nothing for learned positions, which every token of every layer sees."""
        if not self.prefix_length:
            return
        for name, nothing in (("positions", "prompt"), ("layers", None), ("alora_invocation_tokens", None),
                              ("assistant_turns", "edit"), ("dropout", 0.0)):  # fmt: skip
            value = getattr(self, name)
            if value != nothing:
                raise ConfigError(
                    f"{name} is {shown(value)}, and a learned prefix is in front of every prompt, in every layer; "
                    f"leave {name} out"
                )

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, field)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{field} is {shown(pattern)}; give a mapping of names")
            object.__setattr__(self, field, FrozenDict(pattern))
            if len(pattern) > MAX_PATTERNS:
                raise ConfigError(f"{field} has {len(pattern)} names; allowed: up to {MAX_PATTERNS}")
            for key in pattern:
                parse(key)

    def _check_targets(self, kind: Kind) -> None:
        allowed = kind.sites
        for target in self.targets:
            if target not in allowed:
                raise ConfigError(
                    f"unknown target {shown(target)} for kind {self.kind!r}{did_you_mean(str(target), allowed)}; "
                    f"allowed: {', '.join(allowed)}"
                )
        if len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"targets {self.targets} names a site twice")
        scales = self.alpha_pattern or self.use_rslora or self.alpha is not None
        if (self.rank_pattern and not kind.ranked) or (scales and not kind.scaled):
            raise ConfigError(
                f"alpha, use_rslora, rank_pattern and alpha_pattern are LoRA's; this adapter is {self.kind!r}"
                + ("" if kind.scaled or not kind.ranked else ", which may have a rank_pattern alone")
            )

    @property
    def prefill_only(self) -> bool:
        """True if no generated token is edited, so that decoding is the plain base model."""
        return not parse_positions(self.positions).edits_generated

    @property
    def prefix_length(self) -> int:
        """Learned positions in front of each prompt; 0 for adapters that edit tokens."""
        return self.rank if PREFIX in self.targets else 0

    @property
    def groups(self) -> int:
        """Position groups with weights of their own: 1, or 2 without ``share_weights``."""
        return 1 if self.share_weights else NUM_GROUPS

    def edits_layer(self, layer: int) -> bool:
        """Return whether ``layer`` is edited at all."""
        return self.layers is None or layer in self.layers

    def rank_at(self, layer: int, site: str) -> int:
        """Return the rank of the edit at one site, after ``rank_pattern``.

        Raises:
            ConfigError: if the pattern takes too much work to match.
        """
        return int(self._looked_up("rank_pattern", layer, site, self.rank))

    def scale_at(self, layer: int, site: str) -> float:
        """Return LoRA's scale at one site: alpha / rank, or alpha / sqrt(rank) with rsLoRA; raises as ``rank_at``.

        It is 1 for kinds without one.
        """
        if not find_kind(self.kind).scaled:
            return 1.0
        rank = self.rank_at(layer, site)
        default = self.rank if self.alpha is None else self.alpha
        alpha = self._looked_up("alpha_pattern", layer, site, default)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @functools.cached_property
    def _found(self) -> dict[tuple[str, int, str], Any]:
        """What was looked up already: each answer takes a match of every pattern."""
        return {}

    @functools.cached_property
    def _matchers(self) -> dict[str, Matcher]:
        return {"rank_pattern": Matcher(), "alpha_pattern": Matcher()}

    def _looked_up(self, field: str, layer: int, site: str, default: Any) -> Any:
        """Look a site up in a rank or alpha pattern as PEFT does: keys match the end of the module path."""
        pattern, key = getattr(self, field), (field, layer, site)
        if not pattern:
            return default
        if key not in self._found:
            path, matcher = f"model.layers.{layer}.{PEFT_MODULES.get(site, site)}", self._matchers[field]
            matching = (value for name, value in pattern.items() if name == site or matcher.selects_end(name, path))
            self._found[key] = next(matching, default)
        return self._found[key]


PEFT_MODULES: Mapping[str, str] = HF_MODULES
"""Each linear site's module path inside a Hugging Face layer."""


def site_leaf_shapes(config: AdapterConfig, model: ModelConfig, layer: int, site: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each trainable leaf at one edited site."""
    d, f = model.site_shape(site)
    return dict(find_kind(config.kind).shapes(config, d, f, config.rank_at(layer, site) * config.groups))


def adapter_shapes(config: AdapterConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the tree of an adapter's parameter shapes: ``{"layers": [{site: {leaf: shape}}]}``.

    Raises:
        ConfigError: if the config names a layer that the model does not have, a marker outside its vocabulary, or a
            ReFT rank wider than the model; or has a prefix, which the model's sliding window would pass.
    """
    if config.prefix_length and model.sliding_window is not None:
        raise ConfigError(
            f"the base model's tokens see {model.sliding_window} tokens (sliding_window), and no learned prefix beyond "
            "them; use an adapter of another kind"
        )
    marker = config.alora_invocation_tokens or ()
    if max(marker, default=0) >= model.vocab_size:
        raise ConfigError(
            f"alora_invocation_tokens holds the token {max(marker)}; the base model has tokens 0 to "
            f"{model.vocab_size - 1}"
        )
    count = model.num_hidden_layers
    if config.layers is not None and max(config.layers, default=0) >= count:
        raise ConfigError(f"layers names layer {max(config.layers)}; the base model has layers 0 to {count - 1}")
    return {
        "layers": [
            {site: site_leaf_shapes(config, model, layer, site) for site in config.targets}
            if config.edits_layer(layer)
            else {}
            for layer in range(count)
        ]
    }
