"""Names of a package that are loaded when they are asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def forwarded(package: str, where: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: its name.
        where: names that it forwards, by the module in which they are.
    """
    module_of = {name: module for module, names in where.items() for name in names}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return find
