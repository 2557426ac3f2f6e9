"""How ``bench.kernels`` times: what is inside the clock, and the machine's two ceilings."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.attention_case import AttentionInputs
from bench.edit_case import EditInputs, normal
from bench.kernel_cases import Case
from kernels.xla.fp8 import FP8, gpu_has_fp8
from preft_jax.quantize import is_quantized

CACHE_BYTES = 64 << 20
"""More than the last cache of a GPU or a CPU core's share (50 MB of L2 on an H100)."""

CALL_SECONDS = 5e-4
"""A call should take at least so long by the floor, more than Python takes to queue the next."""


class Ceilings(NamedTuple):
    """What the machine reaches: bytes/s of a large copy, and FLOP/s of a large matrix product by dtype."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def together(self, devices: int) -> "Ceilings":
        """Return those of several devices that share all bytes and FLOPs equally, and tell each other nothing."""
        rates = {dtype: devices * rate for dtype, rate in self.flops_per_s.items()}
        return Ceilings(devices * self.bytes_per_s, rates)

    def floor(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """Return the least seconds of a case, and which ceiling says so: ``compute`` or ``memory``."""
        seconds = {"compute": flops / self.flops_per_s[dtype], "memory": moved / self.bytes_per_s}
        bound = max(seconds, key=seconds.__getitem__)
        return seconds[bound], bound


def _best_call(call: Callable[..., Any], state: Any, *arguments: Any, repeats: int, batch: int = 4) -> float:
    """Return the least seconds of ``state = call(state, ...)``, ``batch`` of them queued before each wait."""
    state = jax.block_until_ready(call(state, *arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(batch):
            state = call(state, *arguments)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / batch)
    return min(seconds)


def measure_ceilings(dtypes: Sequence[str], repeats: int) -> Ceilings:
    """Measure ``x += 1`` over 1 GiB (256 MiB on a CPU), read and write counted, and square matrix products."""
    cpu = jax.default_backend() == "cpu"
    rng = np.random.default_rng(0)
    x = normal(rng, ((1 << 26) if cpu else (1 << 28),), "float32")
    moved = 2 * x.nbytes
    bandwidth = moved / _best_call(jax.jit(lambda x: x + 1, donate_argnums=0), x, repeats=repeats)
    size = 1024 if cpu else 8192
    rates = {}
    for dtype in dtypes:
        a, b = (normal(rng, (size, size), dtype, size**-0.25) for _ in range(2))
        rates[dtype] = 2 * size**3 / _best_call(jax.jit(_product), a, b, repeats=repeats)
    return Ceilings(bandwidth, rates)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    if a.dtype != FP8:
        return a @ b
    # Matrix units multiply FP8 with the summed axis last in both, which no transpose gives.
    product = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    return product.astype(FP8)


def dtype_of_products(params: Any) -> np.dtype:
    """Return the dtype of a layer's matrix products: FP8 where weights are and the backend multiplies it."""
    return np.dtype(FP8) if is_quantized(params) and gpu_has_fp8() else params["embed"].dtype


def plan(moved: int, floor: float) -> tuple[int, int]:
    """Return how many runs one program makes, each on inputs of its own, and how many calls of it are queued at a time.

    The inputs together are four times the cache, so that no run finds its own there (on a CPU two sets are made: what
    is small there stays in the cache and can beat a floor that counts memory).
    """
    most = 2 if jax.default_backend() == "cpu" else 48
    runs = min(most, max(math.ceil(4 * CACHE_BYTES / moved), math.ceil(CALL_SECONDS / floor)))
    return runs, max(1, min(20, math.ceil(10 * CALL_SECONDS / (floor * runs))))


def make_sets(case: Case, runs: int) -> list[Any]:
    """Return inputs for each run. Large pools are shared: each run then names other pages of them."""
    sets: list[Any] = []
    for i in range(runs):
        inputs = case.inputs(np.random.default_rng([0, i]))
        if sets and isinstance(inputs, AttentionInputs) and inputs.kv_PSJC.nbytes > CACHE_BYTES:
            inputs = inputs._replace(kv_PSJC=sets[0].kv_PSJC)
        elif sets and isinstance(inputs, EditInputs) and inputs.pages:
            inputs = inputs._replace(sites=sets[0].sites)
        sets.append(inputs)
    return sets


class TimedProgram:
    """One contender on one case, compiled: a run on each set of inputs, one after the other, in one program.

    Its results are the program's, so nothing can be optimised away, and each run has inputs of its own, so nothing is
    shared between them. (A loop on the device would not do: XLA may move what does not change out of it, and an
    optimisation barrier does not keep it from that.) Timed are the operation on inputs in device memory and whatever
    its implementation does before and after its kernels; calls are queued faster than they run, so dispatch from Python
    is not timed where a call takes longer than that, nor are making and laying out of inputs, and compilation.
    """

    def __init__(self, run: Callable[[Any], Any], sets: Sequence[Any], batch: int):
        self._batch = batch
        self._sets = list(sets)
        self._kv_PSJC: Any = None
        if isinstance(self._sets[0], EditInputs) and self._sets[0].kv_PSJC is not None:
            self._kv_PSJC = jnp.copy(self._sets[0].kv_PSJC)
            self._sets = [inputs._replace(kv_PSJC=None) for inputs in self._sets]
        self._outs: list[Any] = []

        def through_all(kv_PSJC: Any, sets: Sequence[Any]) -> tuple[Any, list[Any]]:
            """Run each set; a KV pool, donated, passes from one to the next, as it would from call to call."""
            outs = []
            for inputs in sets:
                if kv_PSJC is None:
                    outs.append(run(inputs))
                else:
                    out, kv_PSJC = run(inputs._replace(kv_PSJC=kv_PSJC))
                    outs.append(out)
            return kv_PSJC, outs

        self._lowered = jax.jit(through_all, donate_argnums=0).lower(self._kv_PSJC, self._sets)
        self._program: Any = None

    def compile(self) -> None:
        """Compile; may be called from any thread."""
        self._program = self._lowered.compile()

    def seconds(self) -> float:
        """Queue a batch of calls, wait for them and return the seconds of one run of the operation."""
        self._outs = []
        start = time.perf_counter()
        for _ in range(self._batch):
            self._kv_PSJC, self._outs = self._program(self._kv_PSJC, self._sets)
        jax.block_until_ready((self._kv_PSJC, self._outs))
        return (time.perf_counter() - start) / (self._batch * len(self._sets))

    def result(self) -> list[jax.Array]:
        """Return what the first set gave, the KV pool included, and free the other results."""
        self._outs = self._outs[:1]
        return jax.tree.leaves((self._outs, self._kv_PSJC))


@jax.jit
def difference(ours: list[jax.Array], other: list[jax.Array]) -> jax.Array:
    """Return the largest ``|a - b| / |b|`` (norms) over the arrays of two results."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)

    return jnp.max(jnp.stack([one(a, b) for a, b in zip(ours, other, strict=True)]))
