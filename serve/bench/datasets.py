"""Files that a benchmark can take its requests from: ShareGPT conversations, and traces of arrivals and lengths."""

import csv
import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preft_jax.errors import ConfigError

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Columns of a trace, those of the Azure LLM inference traces."""

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt")


class Conversation(NamedTuple):
    """The first question of a conversation and the answer to it."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Arrivals in seconds after the first one, rising, with the lengths of prompt and answer in tokens."""

    arrivals: list[float]
    prompt_lens: list[int]
    output_lens: list[int]


def read_sharegpt(path: Path) -> list[Conversation]:
    """Read conversations in ShareGPT's form, from JSON lines or from one JSON list.

    An entry is ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}``; entries in
    which no answer follows a question are left out.

    Raises:
        ConfigError: naming the line (of a list: the entry) that is not of that form, or if there is no conversation.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); give ShareGPT conversations as JSON") from error
    found = [turns for where, entry in _entries(path, text) if (turns := _first_turns(where, entry)) is not None]
    if not found:
        raise ConfigError(f"{path} holds no conversation with a question and an answer to it; give another file")
    return found


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield each entry and where it stands, for error messages."""
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_parse(path, text, 1)):
            yield f"{path}, entry {number + 1}", entry
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parse(path, line, number)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConfigError(
            f"{path}, line {line}: {error.msg} (column {error.colno}); one JSON object a line, or one JSON list, is "
            "expected"
        ) from error


def _first_turns(where: str, entry: Any) -> Conversation | None:
    turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise ConfigError(f'{where}: an object with a list "conversations" is expected')
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise ConfigError(f'{where}: a turn is expected to be {{"from": "human" or "gpt", "value": text}}')
    for ask, answer in itertools.pairwise(turns):
        if ask["from"] in _ASKS and answer["from"] in _ANSWERS:
            return Conversation(ask["value"], answer["value"])
    return None


def read_trace(path: Path, *, minutes: float = math.inf, speedup: float = 1.0, limit: int | None = None) -> Trace:
    """Read the beginning of a trace with the columns ``TRACE_COLUMNS``.

    Args:
        path: a CSV file with a header.
        minutes: how much of the trace to take, in its own time.
        speedup: how much faster than recorded the requests are to arrive.
        limit: take at most this many requests.

    Raises:
        ConfigError: naming the line that cannot be read, or if nothing is left.
    """
    if not minutes > 0:
        raise ConfigError(f"--trace-minutes is {minutes}; give minutes above 0")
    if not 0 < speedup < math.inf:
        raise ConfigError(f"--trace-speedup is {speedup}; give a factor above 0 (2 is twice as fast as recorded)")
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}, line 1: no column {missing[0]!r}; expected: {', '.join(TRACE_COLUMNS)}")
            rows = [_row(f"{path}, line {reader.line_num}", row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {error}") from error
    if not rows:
        raise ConfigError(f"{path} holds no requests; give a trace with rows {', '.join(TRACE_COLUMNS)}")
    rows.sort(key=lambda row: row[0])
    kept = [row for row in rows if (row[0] - rows[0][0]).total_seconds() < 60 * minutes][:limit]
    return Trace(
        arrivals=[(row[0] - rows[0][0]).total_seconds() / speedup for row in kept],
        prompt_lens=[row[1] for row in kept],
        output_lens=[row[2] for row in kept],
    )


def _row(where: str, row: dict[str, Any]) -> tuple[datetime.datetime, int, int]:
    stamp, *lengths = (row[name] for name in TRACE_COLUMNS)
    try:
        when = datetime.datetime.fromisoformat(stamp.strip())
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{where}: TIMESTAMP is {stamp!r}; a time such as 2023-11-16 18:15:46.68 is expected"
        ) from error
    numbers = []
    for name, text in zip(TRACE_COLUMNS[1:], lengths, strict=True):
        if text is None or not text.strip().isdecimal() or int(text) < 1:
            raise ConfigError(f"{where}: {name} is {text!r}; a number of tokens of at least 1 is expected")
        numbers.append(int(text))
    return when.replace(tzinfo=None), numbers[0], numbers[1]
