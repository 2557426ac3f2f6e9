"""Checks of array contents: page ids, spans, lengths.

Off by default, since they cost a round trip to the host. ``with kernels.debug.enabled():`` puts them into every program
that is called inside; a bad value then raises an error that names the argument. Arrays with known values are checked
before anything runs.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.core
import numpy as np

from kernels.types import Array, Site

_enabled = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Check array contents in everything that runs inside. Part of jit's cache key: programs are traced anew."""
    with _enabled(on):
        yield


def _raise_outside(name: str, stop: int, values: np.ndarray) -> None:
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= stop)]
    if wrong.size:
        raise ValueError(f"{name} holds {wrong[0]}; allowed: 0 to {stop - 1}")


def check_range(name: str, values: Array, stop: int) -> None:
    """Check that integers lie in ``0 <= value < stop``, if checks are enabled."""
    if not _enabled.value:
        return
    if isinstance(values, jax.core.Tracer):
        jax.debug.callback(lambda array: _raise_outside(name, stop, array), values)
    else:
        _raise_outside(name, stop, np.asarray(values))


def check_lengths(name: str, starts: Array, most: int) -> None:
    """Check that what starts at ``starts`` is at most ``most`` long and that no start lies before its predecessor."""
    if _enabled.value:
        check_range(f"{name}: its first entry", starts[:1], 1)
        check_range(f"{name}: the length of a run in it", starts[1:] - starts[:-1], most + 1)


def check_tiles(site: Site, num_tokens: int, groups: int | None = None) -> None:
    """Check a site's page ids, that spans lie within their tile and, with ``groups``, the columns of the mask."""
    if not _enabled.value:
        return
    tile = num_tokens // site.tiles.page_NE.shape[0]
    check_range("tiles.page_NE", site.tiles.page_NE, site.pool.a_PDR.shape[0])
    check_range("tiles.start_NE", site.tiles.start_NE, tile + 1)
    check_range("tiles.end_NE", site.tiles.end_NE, tile + 1)
    if groups is not None:
        check_range("tiles.group_NE", site.tiles.group_NE, groups)
