"""Every family of models there is: the records of ``models/families``."""

import importlib
import pkgutil
from collections.abc import Mapping

from preft_jax.errors import ConfigError
from preft_jax.models import families
from preft_jax.models.family import Family


def _records() -> list[Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]


FAMILIES: Mapping[str, Family] = {record.model_type: record for record in _records()}
"""Records by the ``model_type`` of ``config.json``."""

GGUF_FAMILIES: Mapping[str, Family] = {
    record.gguf_architecture: record for record in FAMILIES.values() if record.gguf_architecture is not None
}
"""Records by the architecture of GGUF files."""


def family(model_type: str) -> Family:
    """Return the record of a ``model_type``.

    Raises:
        ConfigError: there is none.
    """
    if model_type not in tuple(FAMILIES):
        raise ConfigError(f"model_type {model_type!r} is not supported; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
