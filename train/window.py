"""Gradients of a micro-batch in units: some layers on a window of its tokens, forward and backward.

A forward unit computes a window's stream behind some layers and adds its keys and values to those of the tokens before
it. What is kept of a token is what these layers read, and its keys and values; all else is computed again, or what
products with weights gave is kept too (``remat="cheap"``). A backward
unit takes the cotangents of a window's stream, keys and values, right to left, and adds to those of the keys and values
before it: where several windows look at a token, its keys and values have several parts. So any unit can wait for as
long as it must, and the sum is that of ``step.gradients``.

    units = windowed.units(params, batch)
    while units.name is not None:
        arrays = units.start(base)  # Starts the unit of that name on the device, and does not wait.
    sums = units.sums

Windows behind the last learned token are left out, and so are backward units of windows before the first edited one; a
window without an edited token has no gradient of the edits, and only hands cotangents on.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.xla.fused import rms_norm
from preft_jax.adapters.edits import NoEdits
from preft_jax.config import ModelConfig
from preft_jax.device.ahead import Program
from preft_jax.models.attention import DenseKernel
from preft_jax.models.batch import bucket
from preft_jax.models.forward import rope_table
from preft_jax.models.layer import checkpointed, decoder_layer
from preft_jax.models.params import Params
from preft_jax.models.plain import PlainLayers
from train.cutting import WindowOptions
from train.data.batches import Batch
from train.flat import Flat, Floats, Vectors, flat_like, floats_of, trees_of
from train.kept import Kept
from train.losses import CROSS_ENTROPY, Loss
from train.past import KV, PastAttention, Window, zeros
from train.step import Group, Means, Sums, add_sums, edits_by_layer, make_dropout, make_edits, stream_losses


class Windowed:
    """The programs of units, for one base model and one tuple of groups.

    Args:
        config: of the base model.
        groups: of adapters, as for ``step.gradients``.
        options: how a micro-batch is cut.
        attention: the implementation over keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: tuple[Group, ...],
        options: WindowOptions = WindowOptions(),
        attention: DenseKernel = "xla",
    ):
        self.config = config
        self.groups = groups
        self.options = options
        self.attention: DenseKernel = attention
        count, step = config.num_hidden_layers, options.layers
        # Of layers, one after the other: a unit has one of them.
        self.runs = [range(at, min(at + step, count)) for at in range(0, count, step)]
        static = "past", "edited"
        self._embed = Program(lambda embed, tokens_BW: embed[tokens_BW], name="embed")
        self._zeros_like = Program(jnp.zeros_like, name="zeros-like")
        self._zeros = Program(zeros, name="zeros", static=("shape", "dtype", "layers"))
        self._no_grads = Program(self._no_grads_of, name="no-gradients")
        self._edits = Program(self._make_edits, name="edits")
        self._forward = Program(self._forward_unit, name="forward", donate=("kv",), static=(*static, "keeps"))
        self._backward = Program(self._backward_unit, name="backward", donate=("d_kv", "d_edits"), static=static)
        self._loss = Program(self._loss_unit, name="loss", static=("loss",))
        self._only_loss = Program(self._only_loss_unit, name="evaluate")
        self._fold = Program(self._fold_unit, name="fold")
        self._add = Program(add_sums, name="add")

    @property
    def programs(self) -> list[Program]:
        """The programs, each of which is compiled for some shapes."""
        return [own for own in vars(self).values() if isinstance(own, Program)]

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return sum(program.num_compiled for program in self.programs)

    def kept_bytes(self, tokens: int, dtype: Any) -> int:
        """Return the bytes that are kept of so many tokens between forward and backward."""
        config = self.config
        runs = -(-config.num_hidden_layers // self.options.layers)
        width = runs * config.hidden_size + 2 * config.num_hidden_layers * config.kv_size
        if self.options.remat == "cheap":
            # What ``q``, ``k``, ``v``, attention, ``o``, ``gate`` and ``up`` gave.
            products = 2 * config.q_size + 2 * config.kv_size + config.hidden_size + 2 * config.intermediate_size
            width += config.num_hidden_layers * products
        return tokens * width * jnp.dtype(dtype).itemsize

    def held_bytes(self, rows: int, length: int, params: int, dtype: Any) -> int:
        """Return the bytes of a device that a micro-batch's units take, computed from shapes and a bit too many.

        That is what is kept of its tokens, cotangents of streams, keys and values, edits with their gradients, and what
        one backward unit works in.

        Args:
            rows, length: of the micro-batch.
            params: trainable ones of all jobs.
            dtype: of the stream.
        """
        config, options, size = self.config, self.options, jnp.dtype(dtype).itemsize
        layers = min(options.layers, config.num_hidden_layers)
        by_layers = options.order == "layers"
        window = min(options.in_a_row(rows), length)
        # Cotangents of keys and values gather in float32.
        d_kv = 2 * 4 * config.kv_size * (layers if by_layers else config.num_hidden_layers) * rows * length
        streams = 2 * config.hidden_size * size * rows * (length if by_layers else window)
        edits = params * (size + 3 * 4)
        unit = layers * rows * window * (6 * config.hidden_size + 4 * config.intermediate_size) * size
        scores = (layers + 2) * rows * config.num_attention_heads * window * length * 4
        return self.kept_bytes(rows * length, dtype) + d_kv + streams + edits + unit + scores

    def units(
        self,
        params: tuple[Any, ...],
        batch: Batch,
        dropout_J: Any = None,
        loss: Loss = CROSS_ENTROPY,
        sums: Sums | None = None,
    ) -> "Units":
        """Return the units of a micro-batch; arguments as of ``Programs.accumulate``, of which the base comes later."""
        return Units(lambda units: self._plan(units, params, batch, dropout_J, loss, sums))

    def evaluation(self, params: tuple[Any, ...], batch: Batch) -> "Units":
        """Return the forward units of a batch: their sums are cross-entropies and weights by slot, without gradients.

        Arguments as of ``step.evaluate``, of which the base comes later. Dropout is off.
        """
        return Units(lambda units: self._evaluation_plan(units, params, batch))

    # The plan, on the host: names of units, each of which is started when the next one is asked for

    def _evaluation_plan(self, units: "Units", params: tuple[Any, ...], batch: Batch) -> Generator[str, None, Sums]:
        batch, size, starts, learned = self._cut(batch)
        yield "edits"
        edits = units.arrays = self._edits(params, units.base["embed"])
        run = _Run(self, units, batch, size, edits, None)
        total_J = count_J = jax.device_put(np.zeros(sum(group.size for group in self.groups), np.float32))
        for at in starts:
            yield from run.forward(at, keep=False)
            h_BWD = run.outputs.pop(at)
            if at in learned:
                yield "evaluate"
                total_J, count_J = self._only_loss(units.base, h_BWD, run.window(at).batch, (total_J, count_J))
                units.arrays = total_J
        return Sums((), total_J, count_J, {})

    def _cut(self, batch: Batch) -> tuple[Batch, int, list[int], list[int]]:
        """Return a batch in NumPy, tokens of a window, and where windows begin: those needed, those learned from."""
        batch = jax.tree.map(np.asarray, batch)
        num_rows, length = batch.tokens_BS.shape
        size = min(self.options.in_a_row(num_rows), length)
        starts = range(0, length, size)
        learned = [at for at in starts if (batch.weights_BS[:, at : at + size] != 0).any()]
        return batch, size, [at for at in starts if learned and at <= learned[-1]], learned

    def _plan(
        self, units: "Units", params: tuple[Any, ...], batch: Batch, dropout_J: Any, loss: Loss, sums: Sums | None
    ) -> Generator[str, None, Sums]:
        batch, size, starts, learned = self._cut(batch)
        edited = {at for at in starts if batch.edit_mask_BSG[:, at : at + size].any()}
        yield "edits"
        embed = units.base["embed"]
        edits = units.arrays = self._edits(params, embed)
        run = _Run(self, units, batch, size, edits, dropout_J)
        nothing_J = np.zeros(sum(group.size for group in self.groups), jnp.float32)
        found: tuple[Any, Any, dict[str, Means]] | None = None
        cotangents: dict[int, jax.Array] = {}
        for at in starts:
            yield from run.forward(at)
            if at in learned:
                yield "loss"
                cotangents[at], found = self._loss(
                    units.base, run.outputs.pop(at), run.window(at).batch, found, loss=loss
                )
                units.arrays = cotangents[at]
            else:
                run.outputs.pop(at)
        first = min(edited, default=None)
        yield from run.backward(
            [at for at in reversed(starts) if first is not None and at >= first], cotangents, edited
        )
        yield "fold"
        grads = units.arrays = self._fold(params, embed, run.d_edits)
        loss_J, count_J, metrics = found or (nothing_J, nothing_J, {})
        new = Sums(grads, loss_J, count_J, metrics)
        return new if sums is None else self._add(sums, new)

    # Programs

    def _no_grads_of(self, edits: list[Flat]) -> list[Vectors]:
        """Return zeros for the gradients of edits: they gather in float32 whatever the stream's dtype."""
        return [tuple(jnp.zeros(x.shape, jnp.float32) for x in own.vectors) for own in edits]

    def _by_run(self, params: tuple[Any, ...], embed: jax.Array) -> list[tuple[Any, ...]]:
        layers = edits_by_layer(self.config, self.groups, params, embed.dtype)
        return [tuple(layers[run.start : run.stop]) for run in self.runs]

    def _make_edits(self, params: tuple[Any, ...], embed: jax.Array) -> list[Flat]:
        return list(map(Flat.of, self._by_run(params, embed)))

    def _fold_unit(self, params: tuple[Any, ...], embed: jax.Array, d_edits: list[Vectors]) -> tuple[Any, ...]:
        def fold(params: tuple[Any, ...]) -> list[Floats]:
            return list(map(floats_of, self._by_run(params, embed)))

        edits, pull = jax.vjp(fold, trees_of(params))
        own = [flat.floats(d) for flat, d in zip(self._make_edits(params, embed), d_edits, strict=True)]
        (grads,) = pull(jax.tree.map(lambda d, own: d.astype(own.dtype), own, edits))
        return flat_like(params, grads)

    def _run_layers(
        self,
        ws: tuple[Params, ...],
        edits: Sequence[Any] | None,
        first_layer: jax.Array,
        h_BWD: jax.Array,
        kv: KV,
        window: Window,
        dropout_J: jax.Array | None,
        length: int,
    ) -> tuple[jax.Array, KV]:
        """Run some layers on a window: its stream behind them, and the keys and values up to its end."""
        batch, start, segments_BP = window
        acts: Any = NoEdits()
        if edits is not None:
            dropout = make_dropout(batch, dropout_J)
            if dropout is not None:
                dropout = dropout._replace(first_layer=first_layer, start=start, length=length)
            acts = make_edits(self.config, self.groups, edits, batch, dropout)
        attention = PastAttention(kv, start, segments_BP, batch.segments_BS, self.attention)
        layers = PlainLayers(self.config, rope_table(self.config, batch.positions_BS), attention, acts)
        for i, w in enumerate(ws):
            h_BWD = decoder_layer(layers, i, w, h_BWD)
        return h_BWD, KV(tuple(attention.k), tuple(attention.v))

    def _differentiated(
        self, ws: Any, edits: Flat, first_layer: Any, length: int, window: Window, dropout_J: Any, edited: bool
    ) -> tuple[Callable[[Any, jax.Array, KV], tuple[jax.Array, KV]], tuple[Any, ...]]:
        """Return what a unit computes, as a function of edits, stream and past; and the edits that it takes."""
        size = window.batch.tokens_BS.shape[1]

        def run(floats: Any, h_BWD: jax.Array, so_far: KV) -> tuple[jax.Array, KV]:
            acts = edits.unflatten(floats) if edited else None
            h_BWD, new = self._run_layers(ws, acts, first_layer, h_BWD, so_far, window, dropout_J, length)
            return h_BWD, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, window.start, size, 1), new)

        return run, edits.floats(edits.vectors) if edited else ()

    def _forward_unit(
        self, ws: Any, edits: Flat, first_layer: Any, h_BWD: Any, kv: KV, window: Window, dropout_J: Any, *,
        past: int, edited: bool, keeps: bool,
    ) -> tuple[jax.Array, KV, Kept | None]:  # fmt: skip
        length = kv.k[0].shape[1]
        run, floats = self._differentiated(ws, edits, first_layer, length, window, dropout_J, edited)
        so_far, kept = jax.tree.map(lambda x: x[:, :past], kv), None
        if keeps:
            (out, own), pull = jax.vjp(checkpointed(run, "cheap"), floats, h_BWD, so_far)
            kept = Kept.of(pull, (ws, floats, h_BWD, so_far))
        else:
            out, own = run(floats, h_BWD, so_far)
        kv = jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, window.start, 1), kv, own)
        return out, kv, kept

    def _backward_unit(
        self, ws: Any, edits: Flat, first_layer: Any, h_BWD: Any, kv: KV, window: Window, dropout_J: Any,
        dh_BWD: Any, d_kv: KV, d_edits: Vectors, kept: Kept | None, *, past: int, edited: bool,
    ) -> tuple[jax.Array, KV, Vectors]:  # fmt: skip
        length = kv.k[0].shape[1]
        size = h_BWD.shape[1]
        run, floats = self._differentiated(ws, edits, first_layer, length, window, dropout_J, edited)
        so_far = jax.tree.map(lambda x: x[:, :past], kv)
        pull = jax.vjp(run, floats, h_BWD, so_far)[1] if kept is None else kept.pullback((ws, floats, h_BWD, so_far))
        d_own = jax.tree.map(
            lambda d, x: jax.lax.dynamic_slice_in_dim(d, window.start, size, 1).astype(x.dtype), d_kv, kv
        )
        d_new_edits, dh_BWD, d_past = pull((dh_BWD.astype(h_BWD.dtype), d_own))
        d_kv = jax.tree.map(lambda d, more: d.at[:, :past].add(more.astype(d.dtype)), d_kv, d_past)
        if edited:
            more = edits.join(tuple(d.astype(jnp.float32) for d in d_new_edits))
            d_edits = tuple(d + new for d, new in zip(d_edits, more, strict=True))
        return dh_BWD, d_kv, d_edits

    def _loss_unit(
        self, base: Params, h_BWD: jax.Array, batch: Batch, found: Any, *, loss: Loss
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict[str, Means]]]:
        num_slots = sum(group.size for group in self.groups)

        def objective(h_BWD: jax.Array) -> Any:
            normed = rms_norm(h_BWD, base["norm"], self.config.rms_norm_eps)
            own = stream_losses(base, normed, batch, num_slots, loss)
            return own[0].sum(), own

        d_BWD, own = jax.grad(objective, has_aux=True)(h_BWD)
        return d_BWD, own if found is None else jax.tree.map(jnp.add, found, own)

    def _only_loss_unit(
        self, base: Params, h_BWD: jax.Array, batch: Batch, found: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        normed = rms_norm(h_BWD, base["norm"], self.config.rms_norm_eps)
        num_slots = sum(group.size for group in self.groups)
        loss_J, count_J, _ = stream_losses(base, normed, batch, num_slots, CROSS_ENTROPY)
        return found[0] + loss_J, found[1] + count_J


class Units:
    """A micro-batch's units, started one by one.

    Attributes:
        name: of the unit that comes next, its program's; None: all have been started.
        sums: what they add up to, when all have been started.
        base: of the base model, as the unit that is being started has it.
        arrays: of the unit that was started last.
    """

    def __init__(self, plan: Callable[["Units"], Generator[str, None, Sums]]):
        self.base: Params = {}
        self.arrays: Any = None
        self.sums: Sums | None = None
        self._plan = plan(self)
        self.name: str | None = next(self._plan)

    def start(self, base: Params) -> Any:
        """Start the next unit on the device and return its arrays.

        Args:
            base: the base model's weights in any layout, the same ones for all units.
        """
        assert self.name is not None, "all units have been started"
        self.base = base
        try:
            self.name = next(self._plan)
        except StopIteration as end:
            self.name, self.sums = None, end.value
        return self.arrays

    def finish(self, base: Params) -> Sums:
        """Start all that are left and return the sums."""
        while self.name is not None:
            self.start(base)
        assert self.sums is not None
        return self.sums


class _Run:
    """What a micro-batch holds on the device while its units run."""

    def __init__(self, owner: Windowed, units: Units, batch: Batch, size: int, edits: list[Flat], dropout_J: Any):
        self._owner = owner
        self._units = units
        self._batch = batch
        self._size = size
        self._edits = edits
        self._dropout_J = dropout_J
        config, self._runs = owner.config, owner.runs
        self._shape = (*batch.tokens_BS.shape, config.num_key_value_heads, config.head_dim)
        self._kv = [self._zeros(run, units.base["embed"].dtype) for run in self._runs]
        self._windows: dict[int, Window] = {}
        self._firsts = jax.device_put([np.int32(run.start) for run in self._runs])
        self._inputs: dict[tuple[int, int], tuple[jax.Array, Kept | None]] = {}
        self.outputs: dict[int, jax.Array] = {}
        # Many windows add to them.
        self.d_edits = owner._no_grads(edits)

    def _zeros(self, run: range, dtype: Any) -> KV:
        return self._owner._zeros(shape=self._shape, dtype=jnp.dtype(dtype), layers=len(run))

    def window(self, at: int) -> Window:
        """Return the window that begins at a token, on the device."""
        if at in self._windows:
            return self._windows[at]
        here = slice(at, at + self._size)
        own = {
            name: value[:, here]
            for name, value in self._batch._asdict().items()
            if name.endswith(("_BS", "_BSG")) and value is not None
        }
        segments = self._batch.segments_BS
        past = None if segments is None else segments[:, : self._past(at)]
        self._windows[at] = window = jax.device_put(Window(self._batch._replace(**own), np.int32(at), past))
        return window

    def _past(self, at: int) -> int:
        """Return how many tokens a window's program looks at: few sizes, so that there are few programs."""
        return min(bucket(at + self._size, self._size), self._shape[1])

    def _arguments(self, n: int) -> tuple[Any, ...]:
        run = self._runs[n]
        ws = tuple(self._units.base["layers"][i] for i in run)
        return ws, self._edits[n], self._firsts[n]

    def forward(self, at: int, *, keep: bool = True) -> Iterator[str]:
        """Yield the names of a window's forward units, each of which is started when the next is asked for.

        ``keep``: what the backward units need of it.
        """
        window, past = self.window(at), self._past(at)
        edited = bool(self._batch.edit_mask_BSG[:, at : at + self._size].any())
        keeps = keep and self._owner.options.remat == "cheap"
        h_BWD: Any = None
        for n in range(len(self._runs)):
            yield f"forward-{past}"
            if h_BWD is None:
                h_BWD = self._owner._embed(self._units.base["embed"], window.batch.tokens_BS)
            given = h_BWD
            h_BWD, self._kv[n], kept = self._owner._forward(
                *self._arguments(n), given, self._kv[n], window, self._dropout_J, past=past, edited=edited, keeps=keeps
            )
            if keep:
                self._inputs[n, at] = given, kept
            self._units.arrays = h_BWD
        assert h_BWD is not None
        self.outputs[at] = h_BWD

    def backward(self, starts: list[int], cotangents: dict[int, jax.Array], edited: set[int]) -> Iterator[str]:
        """Yield the names of the backward units of windows, the last of which comes first."""
        by_layers = self._owner.options.order == "layers"
        whole = None if by_layers else [self._zeros(run, jnp.float32) for run in self._runs]
        runs = range(len(self._runs) - 1, -1, -1)
        plan = [(n, at) for n in runs for at in starts] if by_layers else [(n, at) for at in starts for n in runs]
        d_kv = KV((), ())
        for n, at in plan:
            yield f"backward-{self._past(at)}" + ("" if at in edited else "-plain")
            if whole is not None:
                d_kv = whole[n]
            elif at == starts[0]:
                d_kv = self._zeros(self._runs[n], jnp.float32)
            (h_BWD, kept), dh_BWD = self._inputs.pop((n, at)), cotangents.pop(at, None)
            if dh_BWD is None:  # Nothing is learned from the window itself.
                dh_BWD = self._owner._zeros_like(h_BWD)
            cotangents[at], d_kv, self.d_edits[n] = self._owner._backward(
                *self._arguments(n), h_BWD, self._kv[n], self.window(at), self._dropout_J, dh_BWD, d_kv,
                self.d_edits[n], kept, past=self._past(at), edited=at in edited,
            )  # fmt: skip
            if whole is not None:
                whole[n] = d_kv
            self._units.arrays = cotangents[at]
