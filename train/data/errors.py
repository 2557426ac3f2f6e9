"""The error of training data."""

from preft_jax.errors import PreftError


class DataError(PreftError, ValueError):
    """A dataset that cannot be trained on; the message names the file and the line."""
