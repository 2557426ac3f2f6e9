"""Operations of a layer over fused kernels: every edit happens inside an operation that the layer runs anyway.

What lies between two matrix products is one kernel, so a value travels with the edits that the next kernel adds to it.
Used where the backend has these kernels and the weights are in the serving layout, see ``why_not``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import api, dispatch
from kernels.types import Shrunk, Site
from preft_jax.adapters.edits import NoEdits, PackedEdits, RowEdits
from preft_jax.config import ModelConfig
from preft_jax.models.cache import KVCache
from preft_jax.models.layer import QKV, head_norms
from preft_jax.models.linear import joined, project
from preft_jax.models.params import Params
from preft_jax.models.places import Decoding, Mixed, Places
from preft_jax.models.shard import embedded, summed


def why_not(params: Params) -> str | None:
    """Return why layers with these weights cannot run over the fused kernels here; None: they do."""
    if dispatch.chosen("norm_shrink") == "xla":
        return "this backend has no fused kernels"
    if not joined(params["layers"][0], QKV):
        return "the weights are not in the serving layout (models.layout.fused_layout)"
    return None


class Stream(NamedTuple):
    """The residual stream ``x_TD``, and what the next norm adds to it: a linear's output, its edits, ``block``'s."""

    x_TD: jax.Array
    added_TD: jax.Array | None = None
    edits: tuple[Shrunk, ...] = ()
    block: Site | None = None


class Value(NamedTuple):
    """What linears read, with the first half of their edits; or their outputs side by side, with edits to be added.

    ``edits`` has one for each linear, None where the bank does not hold it.
    """

    y_TF: jax.Array
    edits: tuple[Shrunk | None, ...]


class FusedLayers:
    """A batch of packed tokens, of decoding rows, or of both.

    Args:
        config: static.
        rope: cos and sin, float32 ``[T, 1, C / 2]``.
        cache: the KV pools.
        places: where the tokens stand.
        edits: how adapters act on the batch.
        implementation: of all kernels; None takes the best of each.

    Attributes:
        kv: the KV pool of each layer, after those that have run.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache,
        places: Places,
        edits: NoEdits | PackedEdits | RowEdits,
        implementation: str | None = None,
    ):
        self.kv = list(cache.kv)
        self._config = config
        self._cos_TX, self._sin_TX = rope[0][:, 0], rope[1][:, 0]
        self._places = places
        self._packed = edits if isinstance(edits, PackedEdits) else None
        self._rows = edits if isinstance(edits, RowEdits) else None
        tokens = self._cos_TX.shape[0]
        self._mask_TG = jnp.zeros((tokens, 1), jnp.bool_) if self._packed is None else self._packed.mask_TG
        self._implementation = implementation

    @property
    def cache(self) -> KVCache:
        """The cache after all layers so far."""
        return KVCache(self.kv)

    def begin(self, embed_VD: jax.Array, tokens: jax.Array) -> Stream:
        """See ``Layers.begin``."""
        return Stream(embedded(self._config, embed_VD, tokens))

    def norm(self, layer: int, weight_D: jax.Array, stream: Stream, sites: tuple[str, ...]) -> tuple[Stream, Value]:
        """See ``Layers.norm``."""
        held = self._sites(layer, sites)
        x_TD, h_TD, shrunk = api.norm_shrink(
            stream.x_TD,
            stream.edits,
            stream.block,
            weight_D,
            self._config.rms_norm_eps,
            _present(held),
            self._mask_TG,
            add_TD=stream.added_TD,
            implementation=self._implementation,
        )
        return Stream(x_TD), Value(h_TD, _edits(held, shrunk))

    def project(self, layer: int, w: Params, h: Value, sites: tuple[str, ...]) -> Value:
        """See ``Layers.project``."""
        y_TF = project(w, h.y_TF, sites)
        if self._rows is not None:
            widths = [self._config.site_shape(site)[1] for site in sites]
            y_TF = self._rows.apply_beside(widths, layer, sites, h.y_TF, y_TF)
        return Value(y_TF, h.edits)

    def attend(self, layer: int, w: Params, qkv: Value) -> Value:
        """See ``Layers.attend``."""
        mixed_THC = self._attend(layer, w, qkv, self._places, self._cos_TX, self._sin_TX)
        mixed_TD = mixed_THC.reshape(mixed_THC.shape[0], -1)
        held = self._sites(layer, ("o",))
        own = _present(held)
        shrunk = api.shrink(
            mixed_TD, [s.pool for s in own], [s.tiles for s in own], self._mask_TG, implementation=self._implementation
        )
        return Value(mixed_TD, _edits(held, shrunk))

    def _attend(
        self, layer: int, w: Params, qkv: Value, places: Places, cos_TX: jax.Array, sin_TX: jax.Array
    ) -> jax.Array:
        """Rotate, keep keys and values, attend; returns ``[T, H, C]``."""
        if isinstance(places, Mixed):
            packed_THC = self._attend(layer, w, qkv, places.packed, cos_TX, sin_TX)
            at = qkv.y_TF.shape[0] - places.rows.position_B.shape[0]
            rows_BHC = self._attend(layer, w, Value(qkv.y_TF[at:], ()), places.rows, cos_TX[at:], sin_TX[at:])
            return places.put_rows(packed_THC, rows_BHC)
        options = {**head_norms(self._config, w), "implementation": self._implementation}
        window = self._config.sliding_window
        if isinstance(places, Decoding):
            out_THC, self.kv[layer] = api.decode_attention(
                qkv.y_TF, cos_TX, sin_TX, self.kv[layer], *places, window=window, **options
            )
            return out_THC
        q_THC, self.kv[layer] = api.rope_kv(
            qkv.y_TF, qkv.edits, cos_TX, sin_TX, self.kv[layer], places.slots_T, **options
        )
        return api.paged_attention(
            q_THC, self.kv[layer], places.page_table_BP, places.query_start_B1, places.kv_len_B,
            max_query_len=places.max_query_len, window=window, implementation=self._implementation,
        )  # fmt: skip

    def gate(self, layer: int, gate_up: Value) -> Value:
        """See ``Layers.gate``."""
        held = self._sites(layer, ("down",))
        h_TF, shrunk = api.silu_mul_shrink(
            gate_up.y_TF, gate_up.edits, _present(held), self._mask_TG, implementation=self._implementation
        )
        return Value(h_TF, _edits(held, shrunk))

    def add(self, layer: int, w: Params, stream: Stream, h: Value, site: str) -> Stream:
        """See ``Layers.add``."""
        y_TD, edits = self.project(layer, w, h, (site,))
        pending = [edit for edit in edits if edit is not None]
        # Shrunk, an edit is a hundredth of what it is expanded.
        y_TD, shrunk = summed(self._config, (y_TD, [edit.s_TER for edit in pending]))
        return Stream(stream.x_TD, y_TD, tuple(Shrunk(s, edit.site) for s, edit in zip(shrunk, pending, strict=True)))

    def end(self, layer: int, stream: Stream) -> Stream:
        """See ``Layers.end``."""
        if self._rows is not None and "block" in self._rows.bank.sites and stream.added_TD is not None:
            x_TD = stream.x_TD + stream.added_TD
            (x_TD,) = self._rows.apply(layer, ("block",), x_TD, (x_TD,))
            return Stream(x_TD)
        (block,) = self._sites(layer, ("block",))
        return stream._replace(block=block)

    def final_norm(self, weight_D: jax.Array, stream: Stream) -> jax.Array:
        """See ``Layers.final_norm``."""
        return self.norm(0, weight_D, stream, ())[1].y_TF

    def _sites(self, layer: int, names: Sequence[str]) -> list[Site | None]:
        """Return where the batch's page lists act at some sites; None where the bank does not hold one."""
        if self._packed is None:
            return [None] * len(names)
        bank, tiles, _ = self._packed
        return [bank.site(layer, name, tiles[name]) if name in bank.sites else None for name in names]


def _present(sites: Sequence[Site | None]) -> tuple[Site, ...]:
    return tuple(site for site in sites if site is not None)


def _edits(sites: Sequence[Site | None], shrunk: Sequence[jax.Array]) -> tuple[Shrunk | None, ...]:
    """Return one pending edit for each site, None where the bank does not hold it."""
    remaining = iter(shrunk)
    return tuple(None if site is None else Shrunk(next(remaining), site) for site in sites)
