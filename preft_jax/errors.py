"""The errors a user of preft-jax can meet. Every message says what was given, what is allowed and what to do."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_LONGEST_NAME = 256
"""Characters from which on nothing is compared with the names that are allowed, which would take long."""


_LONGEST_SHOWN = 240
"""Characters of a value that a message repeats."""


class PreftError(Exception):
    """Base of every error that preft-jax raises on purpose; catch this one to catch them all."""


class ConfigError(PreftError, ValueError):
    """A model, adapter or program option that cannot work, found before anything runs."""


class ModelError(PreftError):
    """A base model that cannot be found, read or trusted."""


class AdapterError(PreftError):
    """An adapter that cannot be read, does not fit its base model, or is used where it must not be."""


class RequestError(PreftError, ValueError):
    """One request that cannot be served; the others are not affected."""


class LimitError(PreftError):
    """Something was refused because as much as is allowed is there already; it may be allowed later."""


class ShapeError(PreftError, ValueError):
    """An array whose axes or dtype are not those that a function takes."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest allowed name, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1) if len(given) <= _LONGEST_NAME else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def reject_unknown(given: Iterable[str], allowed: Iterable[str], *, what: str, error: type[PreftError]) -> None:
    """Raise ``error`` naming the first of ``given`` that is not in ``allowed``, with the nearest valid name."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise error(
                f"unknown {what} {shown(name)}{did_you_mean(name, allowed)}; allowed: {', '.join(sorted(allowed))}"
            )


def check_type(name: str, value: Any, kind: type | tuple[type, ...], give: str, error: type[PreftError]) -> None:
    """Raise ``error`` unless a value is of a type; the message says its own, and what to give."""
    if not isinstance(value, kind):
        raise error(f"{name} is of type {type(value).__name__}; give {give}")


_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 8, 8, 8
_short.maxstring = _short.maxlong = _short.maxother = 160


def shown(value: Any) -> str:
    """Return a value that a stranger chose as a message repeats it: ``repr`` in a line, cut where it is long."""
    text = _short.repr(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def plain(text: str) -> str:
    """Return a text that a stranger chose without quotes: cut where it is long, its control characters escaped."""
    return shown(text)[1:-1]
