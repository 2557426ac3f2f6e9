"""Reverse-mode rules of the two halves of a low-rank edit.

With ``s = m * (x @ A + c)`` and ``y' = y + s @ B`` and cotangents ``dy``: ``ds = dy @ B^T``, ``dB = s^T @ dy``, and
with ``ds`` masked by m: ``dA = x^T @ ds``, ``dc = sum(ds)``, ``dx = ds @ A^T``. A page's gradient sums over all tiles
that list it, in the order of the tiles.
"""

import functools

import jax

from kernels import dispatch
from kernels.types import PagePool, Shrunk, Site


def _backward(op: str, implementation: str | None) -> str | None:
    """Return the implementation of a backward operation that goes with one of the forward."""
    return implementation if implementation is None or implementation in dispatch.OFFERED[op] else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def shrink(
    implementation: str | None, x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array
) -> tuple[jax.Array, ...]:
    """See ``kernels.api.shrink``."""
    return dispatch.run("shrink", implementation, x_TD, sites, mask_TG)


def _shrink_forward(implementation: str | None, x_TD: jax.Array, sites: tuple[Site, ...], mask_TG: jax.Array):
    return shrink(implementation, x_TD, sites, mask_TG), (x_TD, sites, mask_TG)


def _shrink_backward(implementation: str | None, kept, ds: tuple[jax.Array, ...]):
    x_TD, sites, mask_TG = kept
    name = _backward("shrink_backward", implementation)
    dx_TD, pages = dispatch.run("shrink_backward", name, x_TD, sites, mask_TG, ds)
    dsites = tuple(Site(PagePool(da, dc, None), None) for da, dc in pages)  # type: ignore[arg-type]
    return dx_TD, dsites, None


shrink.defvjp(_shrink_forward, _shrink_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand(implementation: str | None, edit: Shrunk, y_TF: jax.Array) -> jax.Array:
    """See ``kernels.api.expand``."""
    return dispatch.run("expand", implementation, edit, y_TF)


def _expand_forward(implementation: str | None, edit: Shrunk, y_TF: jax.Array):
    return expand(implementation, edit, y_TF), edit


def _expand_backward(implementation: str | None, edit: Shrunk, dy_TF: jax.Array):
    name = _backward("expand_backward", implementation)
    ds_TER, db_PRF = dispatch.run("expand_backward", name, edit, dy_TF)
    return Shrunk(ds_TER, Site(PagePool(None, None, db_PRF), None)), dy_TF  # type: ignore[arg-type]


expand.defvjp(_expand_forward, _expand_backward)
