"""Changes of bytes and of JSON that strangers and accidents make; all of them drawn from one ``random.Random``."""

import copy
import json

DEEP = 3000
"""Nesting that Python's own recursion does not bear."""


class Literal:
    """Text that stands in JSON as it is."""

    def __init__(self, text):
        self.text = text


def values(rng):
    """Return a value that is rarely the right one."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 10**9, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0,
            1e-320, 1e39, 1e308,
            Literal("NaN"), Literal("Infinity"), Literal("-Infinity"), Literal("1e400"), Literal("01"),
            Literal("9" * 5000), Literal("[" * DEEP + "]" * DEEP), Literal("[" * DEEP),
            Literal('{"a":' * DEEP + "1" + "}" * DEEP), "", " ", "a", "tiny", "all", "prompt", "lora", "\ud800",
            "\udfff\ud800", "\x00", "\x1b[31m", "\u202e", "é" * 50, "x" * 20_000, "(a+)+$", "(.*.*)*x", ".*",
            "q_proj|v_proj", "all-linear", "F32", "BF16", "BOOL", "../../etc", [], [[]], {}, {"a": 1}, [1, 2], ["a"],
            [None], list(range(300)), ["a"] * 300, {"text": "a", "type": "text"}, [{"type": "text", "text": "\ud800"}],
        ]
    )  # fmt: skip


def places(tree, path=()):
    """Yield the path of everything in a tree of objects and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def change_tree(tree, rng):
    """Return a tree in which one to three things were replaced, removed, added, moved or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(tree)))
        if not path:
            if rng.random() < 0.1:
                return values(rng)
            continue
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        key, action = path[-1], rng.randrange(6)
        if action <= 2:
            holder[key] = values(rng)
        elif action == 3:
            del holder[key]
        elif action == 4 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "\ud800", "r", "rank", "layers", f"{key}x", "n", "stop", "x" * 5000])] = values(
                rng
            )
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            other = rng.choice(list(holder))
            holder[key], holder[other] = holder[other], holder[key]
    return tree


def dump(tree, rng):
    """Return a tree as JSON, a key repeated now and then."""
    if isinstance(tree, Literal):
        return tree.text
    if isinstance(tree, dict):
        items = [f"{json.dumps(key)}:{dump(value, rng)}" for key, value in tree.items()]
        if items and rng.random() < 0.02:
            items.append(rng.choice(items))
        return "{" + ",".join(items) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(dump(value, rng) for value in tree) + "]"
    return json.dumps(tree)


def change_bytes(data, rng, first=None):
    """Return bytes of which some were changed, cut, added or moved; ``first`` bounds where, counted from the start."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        end = max(1, min(len(changed), first or len(changed)))
        at, action = rng.randrange(end), rng.randrange(7)
        if action <= 1 and changed:
            changed[at] = rng.randrange(256)
        elif action == 2 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 3:
            del changed[at : at + rng.choice((1, 2, 8, 100))]
        elif action == 4:
            changed[at:at] = rng.choice(
                (b"\0", b"\xff" * 8, b"9" * 30, b'"', b"{", b"]", b"\xed\xa0\x80", b"\\ud800", b"-", b"NaN")
            )
        elif action == 5:
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 60))]
    return bytes(changed)
