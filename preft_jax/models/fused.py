"""Operations of a layer over fused kernels: every edit happens inside an operation that the layer runs anyway.

What lies between two matrix products is one kernel, so a value travels with the edits that the next kernel adds to it.
Used where the backend has these kernels and the weights are in the serving layout, see ``why_not``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import api, dispatch
from kernels.types import Product, QuantizedRows, Shrunk, Site, Unscaled
from kernels.xla.fp8 import scaled
from preft_jax.adapters.edits import NoEdits, PackedEdits, RowEdits
from preft_jax.config import ModelConfig
from preft_jax.models.cache import KVCache
from preft_jax.models.layer import QKV, head_norms
from preft_jax.models.linear import joined, multiplies_fp8, name_of, project, unscaled_product
from preft_jax.models.params import Params
from preft_jax.models.places import Decoding, Mixed, Places
from preft_jax.models.shard import ShardConfig, embedded, summed


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
    added_TD: Product | None = None
    edits: tuple[Shrunk, ...] = ()
    block: Site | None = None


class Read(NamedTuple):
    """What linears read, and of each of them the first half of its edits; None where the bank does not hold it.

    Linears in FP8 read rows in FP8.
    """

    x_TD: jax.Array | QuantizedRows
    edits: tuple[Shrunk | None, ...]


class Given(NamedTuple):
    """Outputs of linears side by side, and the edits that are to be added to each. In FP8 their scales are, too."""

    y_TF: Product
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
        self._dtype: Any = jnp.float32

    @property
    def cache(self) -> KVCache:
        """The cache after all layers so far."""
        return KVCache(self.kv)

    def _in_fp8(self, w: Params, sites: tuple[str, ...]) -> bool:
        """Return whether linears take rows in FP8 and leave out scales. All-token edits read both in full."""
        return self._rows is None and multiplies_fp8(w, sites, self._dtype)

    def begin(self, embed_VD: jax.Array, tokens: jax.Array) -> Stream:
        """See ``Layers.begin``."""
        self._dtype = embed_VD.dtype
        return Stream(embedded(self._config, embed_VD, tokens))

    def norm(self, layer: int, w: Params, name: str, stream: Stream, sites: tuple[str, ...]) -> tuple[Stream, Read]:
        """See ``Layers.norm``."""
        return self._norm(layer, w[name], stream, sites, self._in_fp8(w, sites))

    def _norm(
        self, layer: int, weight_D: jax.Array, stream: Stream, sites: tuple[str, ...], quantized: bool = False
    ) -> tuple[Stream, Read]:
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
            quantized=quantized,
            implementation=self._implementation,
        )
        return Stream(x_TD), Read(h_TD, _edits(held, shrunk))

    def project(self, layer: int, w: Params, h: Read, sites: tuple[str, ...]) -> Given:
        """See ``Layers.project``."""
        if self._in_fp8(w, sites):
            rows = h.x_TD
            if not isinstance(rows, QuantizedRows):
                rows = api.quantize(rows, implementation=self._implementation)
            name = name_of(sites)
            return Given(unscaled_product(rows, w[name], self._dtype, w.get(f"{name}_bias")), h.edits)
        assert not isinstance(h.x_TD, QuantizedRows)
        y_TF = project(w, h.x_TD, sites)
        if self._rows is not None:
            widths = [self._config.site_shape(site)[1] for site in sites]
            y_TF = self._rows.apply_beside(widths, layer, sites, h.x_TD, y_TF)
        return Given(y_TF, h.edits)

    def attend(self, layer: int, w: Params, qkv: Given) -> Read:
        """See ``Layers.attend``."""
        mixed_THC = self._attend(layer, w, qkv, self._places, self._cos_TX, self._sin_TX)
        mixed_TD = mixed_THC.reshape(mixed_THC.shape[0], -1)
        held = self._sites(layer, ("o",))
        own = _present(held)
        shrunk = api.shrink(
            mixed_TD, [s.pool for s in own], [s.tiles for s in own], self._mask_TG, implementation=self._implementation
        )
        return Read(mixed_TD, _edits(held, shrunk))

    def _attend(
        self, layer: int, w: Params, qkv: Given, places: Places, cos_TX: jax.Array, sin_TX: jax.Array
    ) -> jax.Array:
        """Rotate, keep keys and values, attend; returns ``[T, H, C]``."""
        if isinstance(places, Mixed):
            packed_THC = self._attend(layer, w, qkv, places.packed, cos_TX, sin_TX)
            at = cos_TX.shape[0] - places.rows.position_B.shape[0]
            rows = Given(_rows_from(qkv.y_TF, at), ())
            rows_BHC = self._attend(layer, w, rows, places.rows, cos_TX[at:], sin_TX[at:])
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

    def gate(self, layer: int, w: Params, gate_up: Given) -> Read:
        """See ``Layers.gate``."""
        held = self._sites(layer, ("down",))
        h_TF, shrunk = api.silu_mul_shrink(
            gate_up.y_TF, gate_up.edits, _present(held), self._mask_TG, quantized=self._in_fp8(w, ("down",)),
            implementation=self._implementation,
        )  # fmt: skip
        return Read(h_TF, _edits(held, shrunk))

    def add(self, layer: int, w: Params, stream: Stream, h: Read, site: str) -> Stream:
        """See ``Layers.add``."""
        y_TD, edits = self.project(layer, w, h, (site,))
        pending = [edit for edit in edits if edit is not None]
        # Shrunk, an edit is a hundredth of what it is expanded.
        if isinstance(self._config, ShardConfig):
            y_TD = scaled(y_TD)  # Devices have scales of their own.
        y_TD, shrunk = summed(self._config, (y_TD, [edit.s_TER for edit in pending]))
        return Stream(stream.x_TD, y_TD, tuple(Shrunk(s, edit.site) for s, edit in zip(shrunk, pending, strict=True)))

    def end(self, layer: int, stream: Stream) -> Stream:
        """See ``Layers.end``."""
        if self._rows is not None and "block" in self._rows.bank.sites and stream.added_TD is not None:
            assert not isinstance(stream.added_TD, Unscaled)
            x_TD = stream.x_TD + stream.added_TD
            (x_TD,) = self._rows.apply(layer, ("block",), x_TD, (x_TD,))
            return Stream(x_TD)
        (block,) = self._sites(layer, ("block",))
        return stream._replace(block=block)

    def final_norm(self, weight_D: jax.Array, stream: Stream) -> jax.Array:
        """See ``Layers.final_norm``."""
        h_TD = self._norm(0, weight_D, stream, ())[1].x_TD
        assert not isinstance(h_TD, QuantizedRows)
        return h_TD

    def _sites(self, layer: int, names: Sequence[str]) -> list[Site | None]:
        """Return where the batch's page lists act at some sites; None where the bank does not hold one."""
        if self._packed is None:
            return [None] * len(names)
        bank, tiles, _ = self._packed
        return [bank.site(layer, name, tiles[name]) if name in bank.sites else None for name in names]


def _rows_from(y_TF: Product, at: int) -> Product:
    """Return the rows of a product from ``at`` on."""
    if isinstance(y_TF, Unscaled):
        return y_TF._replace(y_TF=y_TF.y_TF[at:], row_T=y_TF.row_T[at:])
    return y_TF[at:]


def _present(sites: Sequence[Site | None]) -> tuple[Site, ...]:
    return tuple(site for site in sites if site is not None)


def _edits(sites: Sequence[Site | None], shrunk: Sequence[jax.Array]) -> tuple[Shrunk | None, ...]:
    """Return one pending edit for each site, None where the bank does not hold it."""
    remaining = iter(shrunk)
    return tuple(None if site is None else Shrunk(next(remaining), site) for site in sites)
