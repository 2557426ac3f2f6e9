"""Compiled programs that engines of one shape share in this process."""

from preft_jax.device import programs


def forget_shared():
    """Drop them: what is made later compiles anew."""
    programs._shared.clear()
