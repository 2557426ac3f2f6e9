"""Tensors of files, whole."""

from preft_jax.io.safetensors_io import open_safetensors


def read_safetensors(path, *, error, advice):
    """Return the tensors of a safetensors file by name."""
    with open_safetensors(path, error=error, advice=advice) as file:
        return file.read()
