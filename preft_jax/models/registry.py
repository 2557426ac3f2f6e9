"""Every family of models there is. To add one: a record in a file of its own, and a line here."""

from collections.abc import Mapping

from preft_jax.errors import ConfigError
from preft_jax.models.family import Family
from preft_jax.models.llama import LLAMA
from preft_jax.models.qwen2 import QWEN2
from preft_jax.models.qwen3 import QWEN3

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        QWEN2,
        QWEN3,
    )
}
"""Records by the ``model_type`` of ``config.json``."""

GGUF_FAMILIES: Mapping[str, Family] = {
    family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture is not None
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
