"""What ``bench.kernels`` times: our implementations, and the peers that a JAX user could take instead.

A contender prepares each case's inputs in the layout that it wants (not timed), runs, and returns results of the same
meaning as ours, so that they can be compared. One that cannot run a case raises ``NotImplementedError`` with the
reason.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.attention_case import AttentionInputs
from bench.edit_case import EditInputs
from bench.kernel_cases import AttentionCase, Case, EditCase
from kernels.types import Site


class Contender(NamedTuple):
    """A way to compute a case: ``run(prepare(case, inputs))``, traced."""

    prepare: Callable[[Case, Any], Any]
    run: Callable[[Any], Any]


def ours(case: Case, implementation: str) -> Contender:
    """Return one of our implementations."""
    return Contender(lambda _, inputs: inputs, lambda inputs: case.run(inputs, implementation))


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotImplementedError(reason)


# jax.lax.ragged_dot: one matrix for each request.


def _request_pages(case: EditCase, site: Site) -> np.ndarray:
    """Return the pages of each request, ``[B, pages]``: the entries of the tile where it starts that start with it."""
    page, start = np.asarray(site.tiles.page_NE), np.asarray(site.tiles.start_NE)
    first = np.cumsum([0, *case.lengths[:-1]])
    rows = [page[t // case.tile][(start[t // case.tile] == t % case.tile) & (page[t // case.tile] > 0)] for t in first]
    return np.stack(rows)


def _prepare_ragged(case: Case, inputs: EditInputs) -> Any:
    assert isinstance(case, EditCase)
    _require(len(case.ranks) == 1 and not case.base_fraction, "every request needs a matrix, all of one rank")
    _require(case.mask == "all" and case.groups == 1, "it knows no edit mask")
    _require(not case.padding and sum(case.lengths) == case.num_tokens, "it knows no padding")
    sites = inputs.all_sites()
    if case.op != "lowrank_edit":
        _require(all(n % case.tile == 0 for n in case.lengths), "our shrunk edits lie otherwise if tiles are shared")
    matrices = []
    for site in sites:
        pages = _request_pages(case, site)
        a_BEDR, c_BER, b_BERF = (leaf[pages] for leaf in site.pool)
        a_BDR = jnp.moveaxis(a_BEDR, 1, 2).reshape(len(pages), a_BEDR.shape[2], -1)
        matrices.append((a_BDR, c_BER.reshape(len(pages), -1), b_BERF.reshape(len(pages), -1, b_BERF.shape[3])))
    s_TR = None
    if case.op == "expand":
        assert inputs.edits[0] is not None
        s_TR = inputs.edits[0].s_TER.reshape(case.num_tokens, -1)
    request_T = jnp.asarray(np.repeat(np.arange(len(case.lengths)), case.lengths), jnp.int32)
    return inputs.x_TD, inputs.y_TF, s_TR, matrices, jnp.asarray(case.lengths, jnp.int32), request_T


def _ragged(op: str, prepared: Any) -> Any:
    x, y, s, matrices, lengths, request_T = prepared
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=lengths, preferred_element_type=jnp.float32)

    def shrink(a_BDR: jax.Array, c_BR: jax.Array) -> jax.Array:
        return dot(x, a_BDR) + c_BR[request_T]

    def expand(s_TR: jax.Array, b_BRF: jax.Array) -> jax.Array:
        return (y.astype(jnp.float32) + dot(s_TR.astype(y.dtype), b_BRF)).astype(y.dtype)

    if op == "shrink":
        shrunk = (shrink(a, c) for a, c, _ in matrices)
        return tuple(s_TR.reshape(s_TR.shape[0], -1, 16) for s_TR in shrunk)
    ((a, c, b),) = matrices
    return expand(s if op == "expand" else shrink(a, c), b)


# cuDNN, through JAX.


def _uniform(case: AttentionCase) -> None:
    _require(len(set(case.query_lens)) == 1 and len(set(case.kv_lens)) == 1, "it needs requests of one length")
    _require(not case.padding and not case.shared_pages, "it needs a pool without shared pages, and no padding")
    _require(case.kv_dtype in (None, case.dtype), "it needs queries and KV of one dtype")


def _own_kv(inputs: AttentionInputs, pages_per_request: int) -> tuple[jax.Array, jax.Array]:
    """Return each request's keys and values, ``[B, S, K, C]`` each, in order."""
    own = inputs.kv_PSJC[inputs.page_table_BP[:, :pages_per_request]]
    own_BSJC = own.reshape(own.shape[0], -1, *own.shape[3:])
    return own_BSJC[:, :, 0::2], own_BSJC[:, :, 1::2]


def _prepare_cudnn_paged(case: Case, inputs: AttentionInputs) -> Any:
    assert isinstance(case, AttentionCase)
    _uniform(case)
    queries, keys = case.query_lens[0], case.kv_lens[0]
    _require(jax.default_backend() == "gpu", "cuDNN needs an NVIDIA GPU")
    _require(queries in (1, keys), "it has no causal mask for queries that follow a prefix")
    pages = -(-keys // case.page_size)
    batch = len(case.kv_lens)
    table = np.random.default_rng(0).permutation(batch * pages).astype(np.int32).reshape(batch, pages)
    place = np.argsort(table.reshape(-1))
    k, v = (
        array.reshape(batch * pages, case.page_size, case.kv_heads, case.head_size)[place]
        for array in _own_kv(inputs, pages)
    )
    q = inputs.q_THC.reshape(batch, queries, case.heads, case.head_size)
    return q, k, v, jnp.full(batch, queries, jnp.int32), inputs.kv_len_B, jnp.asarray(table)[:, None, :, None]


def _cudnn_paged(prepared: Any, *, scale: float) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    q, k, v, query_len_B, kv_len_B, table = prepared
    mask = cudnn.MaskType.PADDING if q.shape[1] == 1 else cudnn.MaskType.PADDING_CAUSAL
    out = cudnn.paged_attention(q, k, v, query_len_B, kv_len_B, table, table, scale=scale, mask_type=mask)
    return out.reshape(-1, *out.shape[2:])  # pyright: ignore[reportAttributeAccessIssue]


def _prepare_cudnn(case: Case, inputs: AttentionInputs) -> Any:
    assert isinstance(case, AttentionCase)
    _uniform(case)
    queries, keys = case.query_lens[0], case.kv_lens[0]
    _require(jax.default_backend() == "gpu", "cuDNN needs an NVIDIA GPU")
    _require(queries in (1, keys), "it has no causal mask for queries that follow a prefix")
    k, v = (array[:, :keys] for array in _own_kv(inputs, -(-keys // case.page_size)))
    return inputs.q_THC.reshape(len(case.kv_lens), queries, case.heads, case.head_size), k, v


def _cudnn(prepared: Any, *, scale: float) -> jax.Array:
    q, k, v = prepared
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=q.shape[1] > 1, implementation="cudnn")
    return out.reshape(-1, *out.shape[2:])


def _ragged_contender(case: Case) -> Contender:
    return Contender(_prepare_ragged, functools.partial(_ragged, case.op))


def _attention_contender(prepare: Any, run: Any, case: Case) -> Contender:
    assert isinstance(case, AttentionCase)
    return Contender(prepare, functools.partial(run, scale=case.scale or case.head_size**-0.5))


PEERS: Mapping[str, tuple[tuple[str, ...], Callable[[Case], Contender]]] = {
    "ragged_dot": (("shrink", "expand", "lowrank_edit"), _ragged_contender),
    "cudnn_paged": (("paged_attention",), functools.partial(_attention_contender, _prepare_cudnn_paged, _cudnn_paged)),
    "cudnn_contiguous": (("paged_attention",), functools.partial(_attention_contender, _prepare_cudnn, _cudnn)),
}
"""Peer to the operations that it can be compared on, and what makes the contender.

``jax.lax.ragged_dot``; cuDNN's paged attention; and cuDNN's attention over keys in order, which needs no page table.
"""
