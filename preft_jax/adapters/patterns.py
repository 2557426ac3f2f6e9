"""Regular expressions over module paths, matched in bounded work whoever wrote them.

PEFT's configs select modules with regular expressions, and an adapter's config is a stranger's. Python's matcher needs
exponential time for some of them, ``(a+)+$`` for one. Here a part of an expression is a function from a position in
the text to the set of positions where a match of that part can end; it is worked out once for each part and position,
so a match takes a number of steps that is a polynomial of its lengths, and a ``Matcher`` counts the steps and gives up
at a limit.

Python's syntax and meaning, but for what is refused by name: back-references, lookbehind, conditions, inline flags,
atomic groups and possessive repeats, and expressions that are longer or deeper than any that selects modules.
"""

import functools
import re
from collections.abc import Callable

from preft_jax.errors import ConfigError, shown

MAX_LENGTH = 4096
"""Characters of one expression."""

MAX_STEPS = 2_000_000
"""Steps of one ``Matcher``, a few seconds; honest expressions over a hundred layers take a tenth of it."""

_MAX_DEPTH = 32
_MAX_REPEATS = 1000
_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_COUNTS = re.compile(r"\{(?:(\d{1,9})(,(\d{1,9})?)?|,(\d{1,9}))\}", re.ASCII)
_SPECIAL = "\\.[{()*+?^$|"


class Matcher:
    """Matches expressions and counts what it costs, over all its matches together."""

    def __init__(self, max_steps: int = MAX_STEPS):
        self._left = self._most = max_steps

    def selects(self, expression: str, path: str) -> bool:
        """Return whether an expression matches a whole path.

        Raises:
            ConfigError: if it cannot be read, or the steps are used up.
        """
        return self._match(expression, path, [0])

    def selects_end(self, expression: str, path: str) -> bool:
        """Return whether an expression matches a whole path or what follows one of its dots; raises the same."""
        if _PLAIN.fullmatch(expression):
            self._spend(1, expression)
            start = len(path) - len(expression)
            at_name = start == 0 or (start > 0 and path[start - 1] == ".")
            return at_name and all(e in (".", p) for e, p in zip(expression, path[start:], strict=True))
        return self._match(expression, path, [0, *(i + 1 for i, letter in enumerate(path) if letter == ".")])

    def _match(self, expression: str, path: str, starts: list[int]) -> bool:
        run = _Run(path, functools.partial(self._spend, expression=expression))
        part = parse(expression)
        return any(run.ends(part, start) >> len(path) & 1 for start in starts)

    def _spend(self, steps: int, expression: str) -> None:
        self._left -= steps
        if self._left < 0:
            raise ConfigError(
                f"the expression {shown(expression)} takes more than {self._most} steps to match; name the modules in "
                "a list, or write it with fewer repeats"
            )


class _Run:
    """One text, and which ends are known of which part at which position, as the bits of an integer."""

    def __init__(self, text: str, spend: Callable[[int], None]):
        self.text = text
        self.spend = spend
        self._known: dict[tuple[int, int], int] = {}

    def ends(self, part: "_Part", start: int) -> int:
        """Return where matches of a part end that begin at ``start``."""
        key = id(part), start
        found = self._known.get(key)
        if found is None:
            self.spend(1)
            found = self._known[key] = part.ends(self, start)
        return found

    def ends_of_all(self, part: "_Part", starts: int) -> int:
        """Return where matches of a part end that begin at any of ``starts``."""
        found = 0
        self.spend(starts.bit_count())
        while starts:
            lowest = starts & -starts
            found |= self.ends(part, lowest.bit_length() - 1)
            starts ^= lowest
        return found


class _Part:
    """A part of an expression."""

    def ends(self, run: _Run, start: int) -> int:
        """Return where matches end that begin at ``start``."""
        raise NotImplementedError


class _Text(_Part):
    def __init__(self, text: str):
        self._text = text

    def ends(self, run: _Run, start: int) -> int:
        return 1 << start + len(self._text) if run.text.startswith(self._text, start) else 0


class _One(_Part):
    """One letter of a class, or a place such as ``^``: what Python's matcher does in one step."""

    def __init__(self, source: str):
        self._compiled = re.compile(source)

    def ends(self, run: _Run, start: int) -> int:
        match = self._compiled.match(run.text, start)
        return 1 << match.end() if match else 0


class _Sequence(_Part):
    def __init__(self, parts: list[_Part]):
        self._parts = parts

    def ends(self, run: _Run, start: int) -> int:
        found = 1 << start
        for part in self._parts:
            found = run.ends_of_all(part, found)
        return found


class _Either(_Part):
    def __init__(self, parts: list[_Part]):
        self._parts = parts

    def ends(self, run: _Run, start: int) -> int:
        found = 0
        for part in self._parts:
            found |= run.ends(part, start)
        return found


class _Repeat(_Part):
    def __init__(self, part: _Part, least: int, most: int | None):
        self._part, self._least, self._most = part, least, most

    def ends(self, run: _Run, start: int) -> int:
        found = 1 << start
        for _ in range(self._least):
            before, found = found, run.ends_of_all(self._part, found)
            if found in (0, before):
                break
        new, more = found, self._most
        count = self._least
        while new and (more is None or count < more):
            new = run.ends_of_all(self._part, new) & ~found
            found |= new
            count += 1
        return found


class _Ahead(_Part):
    """``(?=...)``, or ``(?!...)`` if ``wanted`` is false."""

    def __init__(self, part: _Part, wanted: bool):
        self._part, self._wanted = part, wanted

    def ends(self, run: _Run, start: int) -> int:
        return 1 << start if bool(run.ends(self._part, start)) == self._wanted else 0


@functools.lru_cache(256)
def parse(expression: str) -> _Part:
    """Return the parts of an expression.

    Raises:
        ConfigError: if it is none, or has what is not supported.
    """
    if not isinstance(expression, str):
        raise ConfigError(f"{shown(expression)} is no regular expression; give text")
    if len(expression) > MAX_LENGTH:
        raise ConfigError(
            f"the expression {shown(expression)} has {len(expression)} characters; allowed: up to {MAX_LENGTH}"
        )
    return _Parser(expression).parse()


class _Parser:
    def __init__(self, source: str):
        self._source = source
        self._at = 0
        self._depth = 0

    def parse(self) -> _Part:
        part = self._either()
        if self._at < len(self._source):
            raise self._error("an unbalanced parenthesis")
        return part

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{shown(self._source)} is not a valid regular expression: {what} at {self._at}")

    def _refused(self, what: str) -> ConfigError:
        return ConfigError(
            f"the expression {shown(self._source)} has {what} at {self._at}, which is not supported; name the modules "
            "in a list, or write it without"
        )

    def _next(self, text: str) -> bool:
        """Pass over ``text`` if it comes next."""
        found = self._source.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _either(self) -> _Part:
        branches = [self._sequence()]
        while self._next("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Either(branches)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            parts.append(self._repeated())
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def _repeated(self) -> _Part:
        start = self._at
        part = self._text() or self._one()
        counts = self._counts()
        if counts is None:
            return part
        if self._source[start] in "^$" or self._source[start : start + 2] in ("\\b", "\\B", "\\A", "\\Z"):
            raise self._error("nothing to repeat")
        if self._next("+"):
            raise self._refused("a possessive repeat")
        self._next("?")  # Lazy or not, the same texts match.
        if self._counts() is not None:
            raise self._error("multiple repeat")
        return _Repeat(part, *counts)

    def _text(self) -> _Part | None:
        """Pass over letters that stand for themselves, up to one that is repeated."""
        end = self._at
        while end < len(self._source) and self._source[end] not in _SPECIAL:
            end += 1
        if end < len(self._source) and end - self._at > 1 and self._source[end] in "*+?{":
            end -= 1
        if end == self._at:
            return None
        start, self._at = self._at, end
        return _Text(self._source[start:end])

    def _counts(self) -> tuple[int, int | None] | None:
        if self._next("*"):
            return 0, None
        if self._next("+"):
            return 1, None
        if self._next("?"):
            return 0, 1
        match = _COUNTS.match(self._source, self._at)
        if match is None:
            return None
        exact, comma, most, only_most = match.groups()
        least = int(exact or 0)
        last = only_most or most or (None if comma else exact)
        bound = None if last is None else int(last)
        if max(least, bound or 0) > _MAX_REPEATS:
            raise self._refused(f"a repeat of more than {_MAX_REPEATS} times")
        if bound is not None and bound < least:
            raise self._error("a smallest count above the largest")
        self._at = match.end()
        return least, bound

    def _one(self) -> _Part:
        letter = self._source[self._at]
        if letter == "(":
            return self._group()
        if letter in "*+?":
            raise self._error("nothing to repeat")
        if letter == "{" and _COUNTS.match(self._source, self._at):
            raise self._error("nothing to repeat")
        if letter == "[":
            return self._class()
        if letter == "\\":
            return self._escape()
        self._at += 1
        return _One(letter) if letter in ".^$" else _Text(letter)

    def _escape(self) -> _Part:
        letter = self._source[self._at + 1 : self._at + 2]
        if not letter:
            raise self._error("a backslash at the end")
        if letter.isalnum() and letter not in "dDwWsSbBAZ":
            raise self._refused(f"\\{letter}")
        self._at += 2
        return _One(f"\\{letter}") if letter.isalnum() else _Text(letter)

    def _class(self) -> _Part:
        start = self._at
        self._at += 1
        self._next("^")
        self._next("]")
        while self._at < len(self._source) and self._source[self._at] != "]":
            if self._source[self._at] == "[" or self._source[self._at : self._at + 2] in ("--", "&&", "~~", "||"):
                raise self._refused("a set in a set")
            self._at += 1 + (self._source[self._at] == "\\")
        if not self._next("]"):
            raise self._error("an unterminated set")
        try:
            return _One(self._source[start : self._at])
        except (re.error, OverflowError) as cause:
            raise self._error(f"a set that is none ({cause})") from None

    def _group(self) -> _Part:
        ahead = {"(?=": True, "(?!": False}.get(self._source[self._at : self._at + 3])
        if ahead is not None or self._next("(?:"):
            self._at += 3 * (ahead is not None)
        elif name := re.compile(r"\(\?P<[A-Za-z_]\w*>", re.ASCII).match(self._source, self._at):
            self._at = name.end()
        elif self._source.startswith("(?", self._at):
            raise self._refused(f"{self._source[self._at : self._at + 4]!r}")
        else:
            self._at += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._refused(f"groups more than {_MAX_DEPTH} deep")
        part = self._either()
        if not self._next(")"):
            raise self._error("an unclosed parenthesis")
        self._depth -= 1
        return part if ahead is None else _Ahead(part, ahead)
