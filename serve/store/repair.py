"""Registered adapters whose rows are damaged: read again from where they came from, and told of."""

import logging
from collections.abc import Callable, Iterable

from preft_jax.errors import AdapterError
from serve.store.files import told
from serve.store.names import Asked

_log = logging.getLogger("preft.store")


def read_again(damaged: Iterable[Asked], register: Callable[..., object]) -> None:
    """Register adapters again as they were asked for; one that cannot be read is left out, and the log says so."""
    for asked in damaged:
        facts = {"adapter": asked.name, "source": asked.path}
        try:
            if not asked.path:
                raise AdapterError("it was published from memory; publish it again")
            register(asked.name, asked.path, owner=asked.owner, pinned=asked.pinned, replace=True)
            _log.warning("the row of a registered adapter is damaged: it was read again", extra={"facts": facts})
        except Exception as error:
            facts["reason"] = told(error)
            _log.error("the row of a registered adapter is damaged: register it again", extra={"facts": facts})
