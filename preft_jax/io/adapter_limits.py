"""How much an adapter directory may hold. It may be anybody's, so this is checked before anything is read."""

import dataclasses

from preft_jax.adapters.config import MAX_RANK
from preft_jax.config import ModelConfig
from preft_jax.errors import ConfigError
from preft_jax.shapes import LINEAR_SITES

_FLOAT32 = 4
_MARGIN = 2**20
"""Bytes for the header of a file of tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """What is read of an adapter directory; whatever is larger is refused.

    Attributes:
        max_bytes: of ``adapter_model.safetensors``.
        max_config_bytes: of ``adapter_config.json``.
        max_header_bytes: of the header of ``adapter_model.safetensors``, which lists its tensors.
        max_tensors: in it.
        max_modules: entries of each list of modules or layers in the config.
        max_layers: of an adapter that is read without its base model.
        max_rank: of one edit, over its position groups together.
        roots: real paths of directories below one of which its files must lie, links followed; empty: anywhere.
    """

    max_bytes: int = 2**33
    max_config_bytes: int = 2**20
    max_header_bytes: int = 2**21
    max_tensors: int = 8192
    max_modules: int = 4096
    max_layers: int = 1024
    max_rank: int = MAX_RANK
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "roots":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; give an integer of at least 1")


def limits_for(model: ModelConfig, *, max_rank: int = MAX_RANK, max_bytes: int | None = None) -> AdapterLimits:
    """Return the limits of adapters for a base model.

    Args:
        model: its shape.
        max_rank: largest rank.
        max_bytes: of the file of tensors; None: what a LoRA of ``max_rank`` on all linears takes in float32, which is
            more than any other kind takes, and a little for its header.
    """
    if max_bytes is None:
        widths = sum(sum(model.site_shape(site)) for site in LINEAR_SITES)
        max_bytes = model.num_hidden_layers * widths * max_rank * _FLOAT32 + _MARGIN
    return AdapterLimits(max_bytes=max_bytes, max_rank=max_rank)
