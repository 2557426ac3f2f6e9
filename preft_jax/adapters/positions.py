"""Position rules: the strings that say which tokens an adapter edits.

A rule of one's own is a function of a prompt's tokens, under a name that configs say:

    def after_the_last_newline(token_ids, prompt_len):
        return np.arange(prompt_len) > max(np.flatnonzero(token_ids == NEWLINE), default=-1)

    register_positions("after-newline", after_the_last_newline)
    AdapterConfig(positions="after-newline")
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preft_jax.errors import ConfigError, shown

RuleFunction = Callable[[np.ndarray, int], Any]
"""From token ids (int32 ``[P]``) and their number ``P`` to which are edited: bool ``[P]``, or ``[P, NUM_GROUPS]``."""

_BUILT_IN = ("prompt", "all")

_FIRST_LAST = re.compile(r"f([0-9]{1,9})(?:\+l([0-9]{1,9}))?|l([0-9]{1,9})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRule:
    """A parsed position rule.

    ``edits_generated`` is true for all-token adapters only. ``first`` and ``last`` are ``None`` where every prompt
    token is edited. ``function`` is that of a registered rule.
    """

    edits_generated: bool = False
    first: int | None = None
    last: int | None = None
    function: RuleFunction | None = None


_rules: dict[str, RuleFunction] = {}


def register_positions(name: str, function: RuleFunction, *, replace: bool = False) -> None:
    """Let a name stand for a position rule; no generated token is edited under it.

    A process that loads an adapter of the rule must have registered it before.

    Args:
        name: letters, digits, ``_`` and ``-``.
        function: see ``RuleFunction``; it gives the same for the same tokens, always.
        replace: let a name that is taken stand for it.

    Raises:
        ConfigError: if the name is taken or strange.
    """
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"the rule's name is {shown(name)}; give letters, digits, '_' and '-'")
    if not callable(function):
        raise ConfigError(f"the rule {name!r} is {shown(function)}; give a function of (token ids, prompt length)")
    if name in _BUILT_IN or _FIRST_LAST.fullmatch(name) or (name in _rules and not replace):
        raise ConfigError(f"there is a rule {name!r} already; choose another name, or give replace=True")
    _rules[name] = function


def marker_start(token_ids: Any, marker: Sequence[int]) -> int | None:
    """Return where a marker begins that a prompt holds, at its last place; None if it holds none.

    Args:
        token_ids: of the prompt, ``[P]``.
        marker: token ids, at least one.
    """
    ids_P = np.asarray(token_ids)
    starts = np.arange(len(ids_P) - len(marker) + 1)
    for at, token in enumerate(marker):
        starts = starts[ids_P[starts + at] == token]
    return int(starts[-1]) if len(starts) else None


def parse_positions(positions: str) -> PositionRule:
    """Parse ``prompt``, ``all``, ``f{n}+l{m}`` or a registered name.

    Raises:
        ConfigError: for anything else, and for a rule that could never edit a token (``f0+l0``).
    """
    if positions == "prompt":
        return PositionRule()
    if positions == "all":
        return PositionRule(edits_generated=True)
    if isinstance(positions, str) and positions in _rules:
        return PositionRule(function=_rules[positions])
    if callable(positions):
        raise ConfigError("positions is a function; register_positions gives it a name, and a config says that name")
    match = _FIRST_LAST.fullmatch(positions) if isinstance(positions, str) and positions else None
    if match is None:
        raise ConfigError(
            f"positions {shown(positions)} is not a rule; allowed: 'prompt', 'all', or 'f7+l7' with any numbers, "
            "and what register_positions adds"
        )
    first, last = int(match.group(1) or 0), int(match.group(2) or match.group(3) or 0)
    if first + last == 0:
        raise ConfigError(f"positions {positions!r} edits no token; give at least one first or last position")
    return PositionRule(first=first, last=last)
