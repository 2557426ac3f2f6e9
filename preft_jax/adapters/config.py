"""``AdapterConfig``: what an adapter is and where it acts, and the shapes of its parameters."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from preft_jax.adapters.patterns import Matcher, parse
from preft_jax.adapters.positions import parse_positions
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError, did_you_mean, shown
from preft_jax.models.family import HF_MODULES
from preft_jax.shapes import LINEAR_SITES, NUM_GROUPS

KINDS = ("lora", "direft", "loreft")


MAX_RANK = 1024


_LARGEST = float(np.finfo(np.float32).max)


MAX_PATTERNS = 2048
"""Names of one ``rank_pattern`` or ``alpha_pattern``; a model of a hundred layers has 700 linears."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter is and where it acts.

    Attributes:
        kind: ``lora``, ``direft`` or ``loreft``.
        rank: rank of every edit that ``rank_pattern`` does not name.
        alpha: LoRA's scale numerator; ``None`` means ``rank``, a scale of 1 without rsLoRA and patterns.
            Not used by ReFT.
        use_rslora: divide by the square root of the rank instead of the rank.
        targets: sites edited in each layer; ReFT has ``("block",)``.
        layers: layers edited; ``None`` means all.
        rank_pattern: rank by name, as in PEFT: a key matches a module whose path ends with it
            (``"layers.3.self_attn.q_proj"``, ``"q_proj"``) or that it matches as a regular expression (see
            ``module_pattern``); first match wins. Sites' own names (``"q"``) work too.
        alpha_pattern: the same for alpha.
        positions: ``prompt`` (prefill-only), ``f{n}+l{m}`` (first and last prompt positions) or ``all`` (every token).
        share_weights: with ``f{n}+l{m}``: one set of weights for first and last positions (true), or one each.
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
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    positions: str = "prompt"
    share_weights: bool = True
    assistant_turns: str = "edit"
    orthonormal: bool = True
    dropout: float = 0.0
    base_model: str | None = None
    base_model_digest: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(str(self.kind), KINDS)
            raise ConfigError(f"unknown adapter kind {shown(self.kind)}{near}; allowed: {', '.join(KINDS)}")
        if isinstance(self.targets, str):
            raise ConfigError(f"targets is {self.targets!r}; give a tuple of sites, such as ({self.targets[:1]!r},)")
        if not self.targets:
            object.__setattr__(self, "targets", LINEAR_SITES if self.kind == "lora" else ("block",))
        self._check_targets()
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
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or min(self.layers, default=-1) < 0):
            raise ConfigError(
                f"layers {shown(self.layers)} is empty, or holds a negative or repeated layer; None means all"
            )
        if not self.orthonormal and self.kind == "loreft":
            raise ConfigError("orthonormal false is for DiReFT; LoReFT's rows are orthonormal by its definition")
        rule = parse_positions(self.positions)
        if not self.share_weights and (self.kind == "lora" or rule.first is None):
            raise ConfigError(
                "share_weights false needs a ReFT kind and positions such as 'f7+l7'; "
                f"this adapter is {self.kind!r} at {self.positions!r}"
            )

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, field)
            if len(pattern) > MAX_PATTERNS:
                raise ConfigError(f"{field} has {len(pattern)} names; allowed: up to {MAX_PATTERNS}")
            for key in pattern:
                parse(key)

    def _check_targets(self) -> None:
        allowed = LINEAR_SITES if self.kind == "lora" else ("block",)
        for target in self.targets:
            if target not in allowed:
                raise ConfigError(
                    f"unknown target {target!r} for kind {self.kind!r}{did_you_mean(target, allowed)}; "
                    f"allowed: {', '.join(allowed)}"
                )
        if len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"targets {self.targets} names a site twice")
        if self.kind != "lora" and (
            self.rank_pattern or self.alpha_pattern or self.use_rslora or self.alpha is not None
        ):
            raise ConfigError(
                f"alpha, use_rslora, rank_pattern and alpha_pattern are LoRA's; this adapter is {self.kind!r}"
            )

    @property
    def prefill_only(self) -> bool:
        """True if no generated token is edited, so that decoding is the plain base model."""
        return not parse_positions(self.positions).edits_generated

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
        """Return LoRA's scale at one site: alpha / rank, or alpha / sqrt(rank) with rsLoRA; raises as ``rank_at``."""
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
            path, matcher = f"model.layers.{layer}.{PEFT_MODULES[site]}", self._matchers[field]
            matching = (value for name, value in pattern.items() if name == site or matcher.selects_end(name, path))
            self._found[key] = next(matching, default)
        return self._found[key]


PEFT_MODULES: Mapping[str, str] = HF_MODULES
"""Each linear site's module path inside a Hugging Face layer."""


def site_leaf_shapes(config: AdapterConfig, model: ModelConfig, layer: int, site: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each trainable leaf at one edited site."""
    d, f = model.site_shape(site)
    rank = config.rank_at(layer, site) if config.kind == "lora" else config.rank * config.groups
    if config.kind == "lora":
        return {"lora_a": (rank, d), "lora_b": (f, rank)}
    return {"w": (rank, d), "b": (rank,), "r": (rank, d)}


def adapter_shapes(config: AdapterConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the tree of an adapter's parameter shapes: ``{"layers": [{site: {leaf: shape}}]}``.

    Raises:
        ConfigError: if the config names a layer that the model does not have, or a ReFT rank wider than the model.
    """
    count = model.num_hidden_layers
    if config.layers is not None and max(config.layers, default=0) >= count:
        raise ConfigError(f"layers names layer {max(config.layers)}; the base model has layers 0 to {count - 1}")
    if config.kind != "lora" and config.rank > model.hidden_size:
        raise ConfigError(f"rank {config.rank} is larger than the model's hidden size {model.hidden_size}")
    return {
        "layers": [
            {site: site_leaf_shapes(config, model, layer, site) for site in config.targets}
            if config.edits_layer(layer)
            else {}
            for layer in range(count)
        ]
    }
