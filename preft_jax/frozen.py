"""A mapping that can be part of a configuration: it hashes, cannot be changed, and its order counts."""

from collections.abc import Mapping
from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed. Two are equal if they hold the same entries in the same order."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: object, **_: object) -> NoReturn:
        raise TypeError("this mapping is part of a configuration and cannot be changed; make another configuration")

    __setitem__ = __delitem__ = clear = pop = popitem = __ior__ = _refuse
    setdefault = update = _refuse  # pyright: ignore[reportAssignmentType]
