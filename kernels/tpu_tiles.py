"""How a TPU tiles arrays, as far as it decides how others store them. Knows nothing of Pallas."""

LANES = 128
"""Width of a TPU's vectors."""

SUBLANES = 8


def fills_tiles(heads: int) -> bool:
    """Return whether XLA keeps pages ``[S, heads, lanes]`` in that order on TPU: if the heads fill tiles."""
    return heads in (2, 4) or heads % SUBLANES == 0
