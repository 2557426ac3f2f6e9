"""Position rules: the strings that say which tokens an adapter edits."""

import dataclasses
import re

from preft_jax.errors import ConfigError, shown

_FIRST_LAST = re.compile(r"f([0-9]{1,9})(?:\+l([0-9]{1,9}))?|l([0-9]{1,9})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRule:
    """A parsed position rule.

    ``edits_generated`` is true for all-token adapters only. ``first`` and ``last`` are ``None`` where every prompt
    token is edited.
    """

    edits_generated: bool = False
    first: int | None = None
    last: int | None = None


def parse_positions(positions: str) -> PositionRule:
    """Parse ``prompt``, ``all`` or ``f{n}+l{m}``.

    Raises:
        ConfigError: for anything else, and for a rule that could never edit a token (``f0+l0``).
    """
    if positions == "prompt":
        return PositionRule()
    if positions == "all":
        return PositionRule(edits_generated=True)
    match = _FIRST_LAST.fullmatch(positions) if isinstance(positions, str) and positions else None
    if match is None:
        raise ConfigError(
            f"positions {shown(positions)} is not a rule; allowed: 'prompt', 'all', or 'f7+l7' with any numbers"
        )
    first, last = int(match.group(1) or 0), int(match.group(2) or match.group(3) or 0)
    if first + last == 0:
        raise ConfigError(f"positions {positions!r} edits no token; give at least one first or last position")
    return PositionRule(first=first, last=last)
