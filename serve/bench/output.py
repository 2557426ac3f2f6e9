"""Where figures go: one JSON line, printed for programs and written to a file."""

import json
import sys
from pathlib import Path
from typing import Any


def keep(figures: dict[str, Any], path: Path | None) -> str:
    """Write figures to a file, if one is given, and return them as one line; what is no number in JSON is an error."""
    line = json.dumps(figures, allow_nan=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    return line


def emit(figures: dict[str, Any], path: Path | None) -> None:
    """Write figures to a file, if one is given, and print them as one line, unless people look at a terminal."""
    line = keep(figures, path)
    if not sys.stdout.isatty():
        print(line)
