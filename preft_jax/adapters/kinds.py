"""Kinds of adapters: what parameters one has at a site, how they begin, and how they fold to a low-rank edit.

A kind is three functions under a name, and needs no other change: what it folds to is trained, saved, served and
digested as that of the kinds that are here already (``adapters/builtin_kinds.py``).

    def shapes(config, d, f, rank):
        return {"down": (d, rank), "up": (rank, f)}

    def init(config, shapes, rng):
        return {"down": rng.standard_normal(shapes["down"]) * 0.02, "up": np.zeros(shapes["up"])}

    def fold(config, leaves, scale):
        return jnp.tanh(leaves["down"]), None, leaves["up"]

    register_kind("tanh", shapes, init, fold)
    AdapterConfig(kind="tanh", rank=8, targets=("q", "v"))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from preft_jax.errors import ConfigError, did_you_mean, shown
from preft_jax.shapes import BANK_SITES, PREFIX, SITES

if TYPE_CHECKING:
    import numpy as np

    from kernels.types import Array
    from preft_jax.adapters.config import AdapterConfig


class Shapes(Protocol):
    """Which parameters a site has."""

    def __call__(self, config: "AdapterConfig", d: int, f: int, rank: int, /) -> Mapping[str, tuple[int, ...]]:
        """Return ``{leaf: shape}`` of a site that is ``d`` wide at its input and ``f`` at its output."""
        ...


class Init(Protocol):
    """How parameters begin: mostly so that the adapter changes nothing yet."""

    def __call__(
        self, config: "AdapterConfig", shapes: Mapping[str, tuple[int, ...]], rng: "np.random.Generator", /
    ) -> Mapping[str, Any]:
        """Return ``{leaf: array}`` of the shapes given; they are stored as float32."""
        ...


class Fold(Protocol):
    """What parameters do: ``y += m * ((x @ a + c) @ b)``."""

    def __call__(
        self, config: "AdapterConfig", leaves: "Mapping[str, Array]", scale: float, /
    ) -> "tuple[Array, Array | None, Array]":
        """Return ``a [D, R]``, ``c [R]`` (None: zeros) and ``b [R, F]``: pure, differentiable, float32.

        ``R`` is the rank that the shapes were asked for. ``scale`` is alpha over the rank, and 1 where there is none.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """A kind of adapter.

    Attributes:
        name: as a config says it.
        shapes, init, fold: see their protocols.
        sites: where it may act.
        targets: where it acts if a config does not say.
        ranked: whether ``rank_pattern`` means something.
        scaled: whether ``alpha``, ``use_rslora`` and ``alpha_pattern`` mean something: ``fold`` uses its scale.
        grouped: whether first and last positions may have weights of their own (``share_weights`` false); their ranks
            then follow one another on the rank axis.
    """

    name: str
    shapes: Shapes
    init: Init
    fold: Fold
    sites: tuple[str, ...]
    targets: tuple[str, ...]
    ranked: bool = False
    scaled: bool = False
    grouped: bool = False


_KINDS: dict[str, Kind] = {}

KINDS: Mapping[str, Kind] = _KINDS
"""The registered kinds by name."""


def register_kind(
    name: str,
    shapes: Shapes,
    init: Init,
    fold: Fold,
    *,
    sites: Sequence[str] = SITES,
    targets: Sequence[str] = (),
    ranked: bool = True,
    scaled: bool = False,
    grouped: bool = False,
    replace: bool = False,
) -> Kind:
    """Let a name stand for a kind of adapter; see ``Kind`` for the arguments and the module for an example.

    A process that loads an adapter of the kind must have registered it before: put the registration in a module that
    training and serving import.

    Args:
        name: letters, digits, ``_`` and ``-``.
        shapes: of a site's parameters.
        init: of them.
        fold: of them.
        sites: where it may act; ``("prefix",)`` alone: what it folds to are keys and values (see ``PrefixKV``), with
            ``c`` all ones.
        targets: where it acts if a config does not say; empty: at all of ``sites``.
        ranked: whether ``rank_pattern`` is allowed.
        scaled: whether ``alpha`` and its like are allowed.
        grouped: whether ``share_weights`` false is allowed.
        replace: let a name that is taken stand for it.

    Raises:
        ConfigError: if the name is taken or strange, or a site is unknown.
    """
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"the kind's name is {shown(name)}; give letters, digits, '_' and '-'")
    if name in _KINDS and not replace:
        raise ConfigError(f"there is a kind {name!r} already; choose another name, or give replace=True")
    for what, function in (("shapes", shapes), ("init", init), ("fold", fold)):
        if not callable(function):
            raise ConfigError(f"{what} of the kind {name!r} is {shown(function)}; give a function")
    if PREFIX in sites and len(sites) > 1:
        raise ConfigError(
            f"the kind {name!r} is to act at {PREFIX!r} and elsewhere; give sites ({PREFIX!r},), or others"
        )
    for site in (*sites, *targets):
        allowed = BANK_SITES if site in sites else sites
        if site not in allowed:
            raise ConfigError(f"unknown site {shown(site)}{did_you_mean(str(site), allowed)}; {', '.join(allowed)}")
    kind = Kind(
        name=name, shapes=shapes, init=init, fold=fold, sites=tuple(sites), targets=tuple(targets or sites),
        ranked=ranked, scaled=scaled, grouped=grouped,
    )  # fmt: skip
    _KINDS[name] = kind
    return kind


def find_kind(name: Any) -> Kind:
    """Return a registered kind.

    Raises:
        ConfigError: if the name is none of one.
    """
    if not isinstance(name, str) or name not in _KINDS:
        near = did_you_mean(name, KINDS) if isinstance(name, str) else ""
        raise ConfigError(
            f"unknown adapter kind {shown(name)}{near}; allowed: {', '.join(KINDS)}, and what register_kind adds"
        )
    return _KINDS[name]
