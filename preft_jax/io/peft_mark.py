"""A second mark of what a LoRA is, in a field that PEFT keeps.

PEFT drops the ``preft`` object when it loads and saves an adapter, and a prefill-only adapter would come back as an
all-token one. ``megatron_core`` is a text that PEFT carries along and uses with ``megatron_config`` alone, which is
refused here. So it repeats what matters:

    "megatron_core": "preft:{\\"version\\": 1, \\"kind\\": \\"lora\\", \\"positions\\": \\"prompt\\", ...}"
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

from preft_jax.errors import AdapterError, shown

KEY = "megatron_core"

_PREFIX = "preft:"
_FIELDS = ("version", "kind", "positions", "assistant_turns", "base_model_digest")
"""Others follow from PEFT's own keys, which may have changed since."""


def mark_of(preft: Mapping[str, Any]) -> dict[str, str]:
    """Return the field that repeats a ``preft`` object in ``adapter_config.json``."""
    return {KEY: _PREFIX + json.dumps({key: preft[key] for key in _FIELDS})}


def preft_of(contents: Mapping[str, Any], where: str) -> Any:
    """Return the ``preft`` object of an ``adapter_config.json``, or the one that its mark says; None without both.

    A ``UserWarning`` says that the mark counts, where that changes which tokens are edited.

    Raises:
        AdapterError: if there is only a mark, and it cannot be read.
    """
    if "preft" in contents:
        return contents["preft"]
    mark = _read(contents.get(KEY), where)
    if mark is not None and (mark["positions"], mark["assistant_turns"]) != ("all", "edit"):
        warnings.warn(
            f"{where} comes back from PEFT without its 'preft' object; its mark in {KEY} says positions "
            f"{shown(mark['positions'])} and assistant_turns {shown(mark['assistant_turns'])}, which count. If it was "
            "trained on all tokens since, convert it with --positions all",
            stacklevel=3,
        )
    return mark


def check_mark(contents: Mapping[str, Any], where: str) -> None:
    """Raise ``AdapterError`` if the mark beside a ``preft`` object that was read contradicts it, or cannot be read."""
    mark, preft = _read(contents.get(KEY), where), contents.get("preft") or {}
    for key, value in (mark or {}).items():
        if key in preft and preft[key] != value:
            raise AdapterError(
                f"{where}: the 'preft' object has {key} {shown(preft[key])}, and its mark in {KEY} has "
                f"{shown(value)}; correct one of them, or remove {KEY}"
            )


def _read(text: Any, where: str) -> dict[str, Any] | None:
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    try:
        mark = json.loads(text.removeprefix(_PREFIX))
    except (ValueError, RecursionError):
        mark = None
    if not isinstance(mark, dict) or sorted(mark) != sorted(_FIELDS) or mark["kind"] != "lora":
        raise AdapterError(
            f"{where}: {KEY} is {shown(text)}, no mark of a LoRA with {', '.join(_FIELDS)}; save the adapter again, or "
            "remove the field to load it as PEFT would, on all tokens"
        )
    return mark
