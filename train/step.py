"""The training step of adapters on a frozen base model: one adapter, or many side by side.

Adapters of one shape (kind, rank, sites, fold) and optimizer form a *group*; their parameters and optimizer states lie
stacked in its *slots*. Rows of a batch name their slot. ``accumulate`` adds a micro-batch's gradients, losses and token
counts; ``update`` divides by the counts and lets each slot's optimizer take its own step, by its own numbers. So a
slot's update does not depend on what lies in others, and a slot may become free and be taken again without a new
program.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from kernels.types import Array, PagePool, TilePages
from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edits import Dropout, Edits, FoldedEdits, RowsEdits
from preft_jax.adapters.fold import fold_params
from preft_jax.adapters.pages import adapter_page_counts, cut_edit
from preft_jax.config import ModelConfig
from preft_jax.device.ahead import Program
from preft_jax.errors import ConfigError
from preft_jax.models.attention import DenseKernel
from preft_jax.models.forward import hidden_states
from preft_jax.models.layer import Remat
from preft_jax.models.logprobs import token_logprobs
from preft_jax.models.params import Params
from preft_jax.shapes import BANK_SITES, RANK_PAGE
from train.data.batches import Batch
from train.flat import Flat, flat_like, flat_params, trees_of
from train.losses import CROSS_ENTROPY, Loss, LossInputs
from train.optimizer import Numbers, init_state, transformation

_TILE = 128
"""Most tokens of a row that share a list of rank pages."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Adapters that are trained by one stacked program.

    Attributes:
        config: of the fold: positions, turn rule, marker, dropout and base model are the default, whatever the adapters
            have.
        optim: the optimizer.
        size: slots.
    """

    config: AdapterConfig
    optim: str
    size: int


def fold_config(config: AdapterConfig) -> AdapterConfig:
    """Return what the fold depends on: two adapters with the same one are trained in one group."""
    positions = "prompt" if config.share_weights else config.positions
    return dataclasses.replace(
        config, positions=positions, assistant_turns="edit", alora_invocation_tokens=None, dropout=0.0,
        base_model=None, base_model_digest=None,
    )  # fmt: skip


class Slots(NamedTuple):
    """A group's adapters: float32 parameters and optimizer states, every leaf with a leading axis of slots.

    Programs hold them flat (``flat_slots``): an adapter's parameters are one vector.
    """

    params: Any
    opt_state: Any


State = tuple[Slots, ...]
"""One ``Slots`` for each group."""


class Means(NamedTuple):
    """A metric on its way to a mean by slot: the sum of its weighted values, and of the weights. Float32 ``[J]``."""

    sum_J: jax.Array
    count_J: jax.Array


class Sums(NamedTuple):
    """What micro-batches add up to: gradients (of the sum of losses), and by slot the losses, the weights of learned
    tokens (their number, where each weighs 1) and the metrics of the losses.
    """

    grads: Any
    loss_J: Array
    count_J: Array
    metrics: dict[str, Means]


Bare = tuple[Any, ...]
"""The leaves of a state or of gradients as a tuple, then what else a program gives, as plain tuples and dictionaries:
JAX puts these together without a line of Python, so none comes between a program that took arrays (donated) and its
results.
"""


class Report(NamedTuple):
    """What an update tells of each slot: mean loss, global norm of the mean gradient, whether these and the new
    parameters are finite, and the means of metrics, which are NaN where a slot has none.
    """

    loss_J: jax.Array
    grad_norm_J: jax.Array
    finite_J: jax.Array
    metrics: dict[str, jax.Array]


def empty_slots(group: Group, params: Any) -> Slots:
    """Return a group's slots, all with one adapter's parameters (a tree, unstacked) and new optimizer states."""
    flat = flat_params(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))
    stacked = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * group.size), flat)
    return Slots(stacked, jax.vmap(functools.partial(init_state, group.optim))(stacked))


def flat_slots(slots: Slots) -> Slots:
    """Return one adapter's parameters and optimizer state flat."""
    structure = jax.tree.structure(slots.params)
    return Slots(
        *(
            jax.tree.map(
                lambda own: flat_params(own) if jax.tree.structure(own) == structure else own,
                part,
                is_leaf=lambda own: jax.tree.structure(own) == structure,
            )
            for part in slots
        )
    )


def tree_slots(slots: Slots) -> Slots:
    """Return parameters and optimizer states as trees, such as files hold; those in NumPy arrays are not copied."""
    return jax.tree.map(
        lambda own: own.tree if isinstance(own, Flat) else own, slots, is_leaf=lambda own: isinstance(own, Flat)
    )


def unstacked(slots: Slots, slot: int) -> Slots:
    """Return one slot's adapter and optimizer state."""
    return jax.tree.map(lambda leaf: leaf[slot], slots)


def _folds(groups: Sequence[Group], params: Sequence[Any]) -> list[Any]:
    """Return each group's folds; every leaf has a leading axis of slots."""
    trees = trees_of(params)
    return [jax.vmap(functools.partial(fold_params, g.config))(p) for g, p in zip(groups, trees, strict=True)]


class PagePlan(NamedTuple):
    """Static: rank pages of each slot at each site, ``[J, E]`` (0 where there is none), and their mask columns."""

    page_JE: dict[str, np.ndarray]
    group_JE: dict[str, np.ndarray]


def plan_pages(config: ModelConfig, groups: Sequence[Group]) -> PagePlan:
    """Number the rank pages of all slots, from 1; a slot's pages at a site follow one another, in every layer."""
    pages, columns = {}, {}
    for site in BANK_SITES:
        counts = [adapter_page_counts(group.config, config).get(site, 0) for group in groups]
        own = [
            (count, group.config.groups) for count, group in zip(counts, groups, strict=True) for _ in range(group.size)
        ]
        pages[site] = np.zeros((len(own), max(1, *counts)), np.int32)
        columns[site] = np.zeros_like(pages[site])
        first = 1
        for j, (count, parts) in enumerate(own):
            pages[site][j, :count] = np.arange(first, first + count)
            columns[site][j, :count] = np.arange(count) // max(1, count // parts)
            first += count
    return PagePlan(pages, columns)


def _pools(config: ModelConfig, groups: Sequence[Group], folds: Sequence[Any], dtype: Any) -> list[dict[str, PagePool]]:
    """Cut all slots' folds to rank pages, in the order of ``plan_pages``: for each layer the pool of each site."""
    counts = [adapter_page_counts(group.config, config) for group in groups]

    def pool(layer: int, site: str) -> PagePool:
        d, f = config.site_shape(site)
        shapes = (d, RANK_PAGE), (RANK_PAGE,), (RANK_PAGE, f)
        parts = [[jnp.zeros((1, *shape)) for shape in shapes]]  # The null page.
        for group, fold, count in zip(groups, folds, counts, strict=True):
            if not count.get(site):
                continue
            edit, pages = fold["layers"][layer].get(site), count[site] * group.size
            if edit is None:  # Another layer's adapter edits the site.
                parts.append([jnp.zeros((pages, *shape)) for shape in shapes])
            else:
                cut = cut_edit(edit, count[site], group.config.groups)
                parts.append([array.reshape(pages, *shape) for array, shape in zip(cut, shapes, strict=True)])
        a, c, b = zip(*parts, strict=True)
        return PagePool(
            jnp.concatenate([x.astype(dtype) for x in a]),
            jnp.concatenate(c),
            jnp.concatenate([x.astype(dtype) for x in b]),
        )

    edited = [site for site in BANK_SITES if any(count.get(site) for count in counts)]
    return [{site: pool(layer, site) for site in edited} for layer in range(config.num_hidden_layers)]


def _tiles(plan: PagePlan, batch: Batch) -> dict[str, TilePages]:
    """Return each tile's page list: that of its row's slot."""
    rows, size = batch.tokens_BS.shape
    tile = math.gcd(_TILE, size)  # No tile may reach into the next row, which can be another adapter's.
    slot_N = jnp.repeat(batch.slot_B, size // tile, total_repeat_length=rows * size // tile)

    def one(site: str) -> TilePages:
        page_NE = jnp.asarray(plan.page_JE[site])[slot_N]
        end_NE = jnp.where(page_NE == 0, 0, tile)
        return TilePages(page_NE, jnp.zeros_like(page_NE), end_NE, jnp.asarray(plan.group_JE[site])[slot_N])

    return {site: one(site) for site in BANK_SITES}


def edits_by_layer(config: ModelConfig, groups: Sequence[Group], params: Sequence[Any], dtype: Any) -> list[Any]:
    """Return what acts in each layer: the fold of one adapter, or the rank pages of many; differentiable in ``params``.

    Args:
        config: of the base model.
        groups: static.
        params: stacked parameters of each group.
        dtype: of the base model.
    """
    folds = _folds(groups, params)
    if sum(group.size for group in groups) == 1:
        return jax.tree.map(lambda leaf: leaf[0], folds[0])["layers"]
    return _pools(config, groups, folds, dtype)


def make_edits(
    config: ModelConfig, groups: Sequence[Group], layers: Sequence[Any], batch: Batch, dropout: Dropout | None
) -> FoldedEdits | RowsEdits:
    """Return how adapters act on a batch, whose rows name slots; ``layers`` as of ``edits_by_layer``."""
    if sum(group.size for group in groups) == 1:
        return FoldedEdits({"layers": layers}, batch.edit_mask_BSG, dropout)
    return RowsEdits(layers, _tiles(plan_pages(config, groups), batch), batch.edit_mask_BSG, dropout)


def make_dropout(batch: Batch, dropout_J: jax.Array | None) -> Dropout | None:
    """Return the dropout of a batch's rows; ``dropout_J`` is each slot's rate, float32, None if there is none."""
    if dropout_J is None:
        return None
    return Dropout(jax.vmap(_row_key)(batch.draw_BU), dropout_J[batch.slot_B])


def _row_key(draw_U: jax.Array) -> jax.Array:
    key = jax.random.key(draw_U[0])
    return jax.random.fold_in(jax.random.fold_in(key, draw_U[1]), draw_U[2])


def _by_slot(row_B: jax.Array, slot_B: jax.Array, num_slots: int) -> jax.Array:
    """Sum rows' float32 values by slot, in a fixed order."""
    return jnp.where(slot_B[:, None] == jnp.arange(num_slots), row_B[:, None], 0.0).sum(axis=0)


def batch_losses(
    config: ModelConfig,
    base: Params,
    batch: Batch,
    edits: Edits,
    num_slots: int,
    *,
    loss: Loss,
    attention: DenseKernel,
    remat: Remat,
) -> tuple[jax.Array, jax.Array, dict[str, Means]]:
    """Return the losses of a batch as ``stream_losses`` does."""
    h_BSD = _stream(config, base, batch, edits, attention=attention, remat=remat)
    return stream_losses(base, h_BSD, batch, num_slots, loss)


def _stream(
    config: ModelConfig, base: Params, batch: Batch, edits: Edits, *, attention: DenseKernel, remat: Remat
) -> jax.Array:
    """Return the normed stream of a batch after the last layer, ``[B, S, D]``."""
    return hidden_states(
        config, base, batch.tokens_BS, edits, segments_BS=batch.segments_BS, positions_BS=batch.positions_BS,
        attention=attention, remat=remat,
    )  # fmt: skip


def batch_logprobs(base: Params, h_BSD: jax.Array, batch: Batch) -> jax.Array:
    """Return the log-probability of each target, float32 ``[B, S]``; 0 where nothing is learned."""
    temperature_T = None if batch.temperature_BS is None else batch.temperature_BS.reshape(-1)
    targets_T, learned_T = batch.targets_BS.reshape(-1), batch.weights_BS.reshape(-1) != 0
    logprob_T = token_logprobs(base, h_BSD.reshape(-1, h_BSD.shape[2]), targets_T, learned_T, temperature_T)
    return logprob_T.reshape(batch.targets_BS.shape)


def stream_losses(
    base: Params, h_BSD: jax.Array, batch: Batch, num_slots: int, loss: Loss
) -> tuple[jax.Array, jax.Array, dict[str, Means]]:
    """Return by slot the summed loss of learned tokens, their weights (float32 ``[J]`` each) and the loss's metrics.

    ``h_BSD`` is the normed stream after the last layer.
    """
    weights_T = batch.weights_BS.reshape(-1)
    logprob_T = batch_logprobs(base, h_BSD, batch).reshape(-1)
    needed = {f"{name}_T": getattr(batch, f"{name}_BS").reshape(-1) for name in loss.needs}
    loss_T, metrics = loss.function(logprob_T, LossInputs(weights_T, **needed))
    for name, value_T in {"its loss": loss_T, **metrics}.items():
        if jnp.shape(value_T) != weights_T.shape:
            raise ConfigError(
                f"the loss {loss.name!r} gives {name} the shape {list(jnp.shape(value_T))}, expected "
                f"{list(weights_T.shape)}: one value for each token, which the trainer weighs and sums"
            )

    def by_slot(value_T: jax.Array) -> jax.Array:
        # Zero without weight whatever the value is.
        weighted_T = jnp.where(weights_T != 0, value_T * weights_T, 0.0)
        return _by_slot(weighted_T.reshape(batch.tokens_BS.shape).sum(axis=1), batch.slot_B, num_slots)

    count_J = _by_slot(batch.weights_BS.sum(axis=1), batch.slot_B, num_slots)
    means = {name: Means(by_slot(jax.lax.stop_gradient(value_T)), count_J) for name, value_T in metrics.items()}
    return by_slot(loss_T), count_J, means


def gradients(
    config: ModelConfig,
    groups: tuple[Group, ...],
    attention: DenseKernel,
    remat: Remat,
    base: Params,
    params: tuple[Any, ...],
    batch: Batch,
    dropout_J: jax.Array | None,
    loss: Loss = CROSS_ENTROPY,
) -> Sums:
    """Return a micro-batch's gradients, losses, counts and metrics."""
    num_slots = sum(group.size for group in groups)

    def objective(params: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict[str, Means]]]:
        layers = edits_by_layer(config, groups, params, base["embed"].dtype)
        edits = make_edits(config, groups, layers, batch, make_dropout(batch, dropout_J))
        found = batch_losses(config, base, batch, edits, num_slots, loss=loss, attention=attention, remat=remat)
        return found[0].sum(), found

    grads, found = jax.grad(objective, has_aux=True)(trees_of(params))
    return Sums(flat_like(params, grads), *found)


def add_sums(sums: Sums, new: Sums) -> Sums:
    """Return the sums with those of another micro-batch added."""
    # Micro-batches of an update may have losses with metrics of different names.
    metrics = {**sums.metrics, **new.metrics}
    for name in sums.metrics.keys() & new.metrics.keys():
        metrics[name] = jax.tree.map(jnp.add, sums.metrics[name], new.metrics[name])
    grads, loss_J, count_J = jax.tree.map(jnp.add, tuple(sums[:3]), tuple(new[:3]))
    return Sums(grads, loss_J, count_J, metrics)


def bare(sums: Sums) -> Bare:
    """Return sums bare."""
    return tuple(jax.tree.leaves(sums.grads)), *sums[1:]


def sums_of(found: Bare, params: tuple[Any, ...]) -> Sums:
    """Return bare sums again, of gradients of these parameters."""
    return Sums(jax.tree.structure(params).unflatten(found[0]), *found[1:])


def evaluate(
    config: ModelConfig,
    groups: tuple[Group, ...],
    attention: DenseKernel,
    base: Params,
    params: tuple[Any, ...],
    batch: Batch,
) -> tuple[jax.Array, jax.Array]:
    """Return ``(sum, count)`` of a batch's cross-entropies by slot, without dropout."""
    edits = make_edits(config, groups, edits_by_layer(config, groups, params, base["embed"].dtype), batch, None)
    num_slots = sum(group.size for group in groups)
    loss_J, count_J, _ = batch_losses(
        config, base, batch, edits, num_slots, loss=CROSS_ENTROPY, attention=attention, remat="none"
    )
    return loss_J, count_J


def score(
    config: ModelConfig,
    groups: tuple[Group, ...],
    attention: DenseKernel,
    base: Params,
    params: tuple[Any, ...],
    batch: Batch,
) -> jax.Array:
    """Return the log-probabilities of a batch's targets as ``batch_logprobs`` does, without dropout."""
    edits = make_edits(config, groups, edits_by_layer(config, groups, params, base["embed"].dtype), batch, None)
    return batch_logprobs(base, _stream(config, base, batch, edits, attention=attention, remat="none"), batch)


def update(groups: tuple[Group, ...], state: State, sums: Sums, numbers: tuple[Numbers, ...]) -> tuple[State, Report]:
    """Let each slot that learned something take an optimizer step; ``state`` is donated.

    A slot keeps what it had if its loss, gradient or new parameters are not finite, or it learned no token.
    """
    new, norms, finite, first = [], [], [], 0
    for group, slots, grads, own in zip(groups, state, sums.grads, numbers, strict=True):
        here = slice(first, first + group.size)
        first += group.size

        def one(
            params: Any,
            opt_state: Any,
            grads: Any,
            n: Numbers,
            loss: jax.Array,
            count: jax.Array,
            optim: str = group.optim,
        ) -> tuple[Slots, jax.Array, jax.Array]:
            mean = jax.tree.map(lambda leaf: leaf / jnp.where(count > 0, count, 1), grads)
            norm = optax.tree.norm(mean)
            updates, after = transformation(optim, n).update(mean, opt_state, params)
            taken = Slots(optax.apply_updates(params, updates), after)
            moved = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(taken.params)]).all()
            good = jnp.isfinite(norm) & jnp.isfinite(loss) & moved
            keep = functools.partial(jnp.where, good & (count > 0))
            return jax.tree.map(keep, taken, Slots(params, opt_state)), norm, good

        slots, norm, good = jax.vmap(one)(
            slots.params, slots.opt_state, grads, own, sums.loss_J[here], sums.count_J[here]
        )
        new.append(slots)
        norms.append(norm)
        finite.append(good)
    loss_J = sums.loss_J / jnp.where(sums.count_J > 0, sums.count_J, 1)
    metrics = {name: means.sum_J / means.count_J for name, means in sums.metrics.items()}
    return tuple(new), Report(loss_J, jnp.concatenate(norms), jnp.concatenate(finite), metrics)


def bare_update(groups: tuple[Group, ...], state: State, sums: Sums, numbers: tuple[Numbers, ...]) -> Bare:
    """Return what ``update`` does, bare: the leaves of the state, and the report as a tuple."""
    new, report = update(groups, state, sums, numbers)
    return tuple(jax.tree.leaves(new)), tuple(report)


def updated_of(found: Bare, state: State) -> tuple[State, Report]:
    """Return what ``bare_update`` gave again as ``update`` has it; ``state`` is any of the same structure."""
    return jax.tree.structure(state).unflatten(found[0]), Report(*found[1])


def is_donated(leaves: Iterable[Any]) -> bool:
    """Return whether a program took one of these arrays."""
    return any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))


class Programs:
    """The jitted functions for one base model and one tuple of groups; each compiles once for each bucketed length.

    ``replicated``: of what they give, on several devices. Left to the compiler, it would be something else than what
    they are first given, and that would be compiled again.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: tuple[Group, ...],
        attention: DenseKernel,
        remat: Remat,
        replicated: NamedSharding | None = None,
    ):
        self._gradients = jax.jit(
            functools.partial(gradients, config, groups, attention, remat),
            static_argnames=("loss",),
            out_shardings=replicated,
        )
        self._add = jax.jit(lambda sums, new: bare(add_sums(sums, new)), donate_argnums=0, out_shardings=replicated)
        self.update = Program(
            functools.partial(bare_update, groups), name="update", donate=("state",), out_shardings=replicated
        )
        self.evaluate = jax.jit(functools.partial(evaluate, config, groups, attention))
        self.score = jax.jit(functools.partial(score, config, groups, attention))

    def accumulate(
        self, base: Params, params: tuple[Any, ...], sums: Sums | None, batch: Batch, dropout_J: Array | None,
        loss: Loss = CROSS_ENTROPY,
    ) -> Bare:  # fmt: skip
        """Return the sums (donated; None at an update's first micro-batch) with a micro-batch's ``gradients`` added.

        These are a program of their own: it takes long to compile, and the first micro-batch needs it, too.
        """
        new = self._gradients(base, params, batch, dropout_J, loss=loss)
        return bare(new) if sums is None else self._add(sums, new)
