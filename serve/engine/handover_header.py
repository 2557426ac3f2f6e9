"""What the JSON in front of a handover's bytes may hold: it comes from another process, and is believed in nothing."""

import json
from collections.abc import Callable
from typing import Any

from preft_jax.errors import shown
from preft_jax.sampling.parameters import MAX_LOGPROBS
from preft_jax.shapes import KV_DTYPES, NUM_GROUPS
from serve.engine.request import MAX_SAMPLES

VERSION = 1
"""Of the layout in bytes."""

_AXES = 4
"""Of the KV: tokens, layers, keys and values of heads, head dim."""

_Allowed = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_score(value: Any) -> bool:
    return type(value) is float


def _whole(low: int, high: int) -> _Allowed:
    return lambda value: type(value) is int and low <= value <= high


def _some(allowed: _Allowed, low: int, high: int) -> _Allowed:
    """Lists of ``low`` to ``high`` values, each of which is allowed."""
    return lambda value: type(value) is list and low <= len(value) <= high and all(map(allowed, value))


def _row(*columns: _Allowed) -> _Allowed:
    """Lists with one value for each column."""
    return lambda value: (
        type(value) is list
        and len(value) == len(columns)
        and all(allowed(one) for allowed, one in zip(columns, value, strict=True))
    )


def _or_none(allowed: _Allowed) -> _Allowed:
    return lambda value: value is None or allowed(value)


def _is_top(value: Any) -> bool:
    """Whether it is the most likely tokens by their ids, which are texts in JSON, and not too many."""
    return (
        type(value) is dict
        and len(value) <= MAX_LOGPROBS
        and all(token.isdecimal() and len(token) <= 10 and _is_score(score) for token, score in value.items())
    )


_token = _whole(0, 2**31 - 1)
_MOST = 2**31 - 1
_FIELDS: dict[str, _Allowed] = {
    "version": _whole(VERSION, VERSION),
    "token_ids": _some(_token, 1, _MOST),
    "mask_groups": _whole(NUM_GROUPS, NUM_GROUPS),
    "adapter": _or_none(_is_text),
    "adapter_dtype": _is_text,
    "fold_version": _whole(0, _MOST),
    "kv_digest": _is_text,
    "kv_dtype": tuple(KV_DTYPES.values()).__contains__,
    "kv_shape": _some(_whole(1, _MOST), _AXES, _AXES),
    "seed": _whole(0, 2**32 - 1),
    "first": _some(_row(_token, _is_score, _is_score, _is_top), 1, MAX_SAMPLES),
    "prompt_logprobs": _or_none(_some(_or_none(_row(_token, _is_score, _is_top)), 0, _MOST)),
}


def read_header(text: bytes) -> dict[str, Any]:
    """Return the header of a handover, each field of its type and in its range.

    Raises:
        ValueError: it is no such header.
    """
    try:
        header = json.loads(text)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if type(header) is not dict or header.keys() != _FIELDS.keys():
        raise ValueError(f"its header is no object with the fields {', '.join(_FIELDS)}")
    for name, allowed in _FIELDS.items():
        if not allowed(header[name]):
            raise ValueError(f"its {name} is {shown(header[name])}")
    if header["kv_shape"][0] != len(header["token_ids"]):
        raise ValueError(f"it has KV of {header['kv_shape'][0]} tokens for {len(header['token_ids'])}")
    return header
