"""Device code of drawing tokens."""

import triton
import triton.language as tl


@triton.jit
def _rotate(x, by: tl.constexpr):
    return (x << by) | (x >> (32 - by))


@triton.jit
def _four_rounds(x0, x1, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, r3: tl.constexpr):
    x0 += x1
    x1 = _rotate(x1, r0) ^ x0
    x0 += x1
    x1 = _rotate(x1, r1) ^ x0
    x0 += x1
    x1 = _rotate(x1, r2) ^ x0
    x0 += x1
    x1 = _rotate(x1, r3) ^ x0
    return x0, x1


@triton.jit
def _threefry(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011), as JAX's random keys have it; all uint32."""
    k2 = k0 ^ k1 ^ tl.full([], 0x1BD11BDA, tl.uint32)
    x0 += k0
    x1 += k1
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k1
    x1 += k2 + tl.full([], 1, tl.uint32)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24)
    x0 += k2
    x1 += k0 + tl.full([], 2, tl.uint32)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k0
    x1 += k1 + tl.full([], 3, tl.uint32)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24)
    x0 += k1
    x1 += k2 + tl.full([], 4, tl.uint32)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k2
    x1 += k0 + tl.full([], 5, tl.uint32)
    return x0, x1


@triton.jit
def _gumbel(seed, position, v):
    """Gumbel noise of tokens ``v``: ``jax.random.gumbel`` of ``fold_in(key(seed), position)``."""
    zero = tl.full([], 0, tl.uint32)
    k0, k1 = _threefry(zero, seed, zero, position)
    bits0, bits1 = _threefry(k0, k1, tl.zeros_like(v).to(tl.uint32), v.to(tl.uint32))
    ones = ((bits0 ^ bits1) >> 9) | tl.full([], 0x3F800000, tl.uint32)
    uniform = tl.maximum(ones.to(tl.float32, bitcast=True) - 1.0, 1.1754943508222875e-38)
    return -tl.log(-tl.log(uniform))


@triton.jit
def draw_kernel(
    logits_ptr, index_ptr, temperature_ptr, seed_ptr, position_ptr, alive_ptr, part_ptr, id_ptr,
    B: tl.constexpr, V: tl.constexpr, NB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program: BV logits of one row. It leaves five numbers (largest logit, two sums of exponentials, best score, its
    logit) and the best token."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    v = block * BV + tl.arange(0, BV)
    live = tl.load(alive_ptr + row) != 0
    temperature = tl.load(temperature_ptr + row)
    base = logits_ptr + tl.load(index_ptr + row).to(tl.int64) * V
    logit = tl.load(base + v, mask=(v < V) & live, other=float("-inf"))
    largest = tl.max(logit, 0)
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    score = logit - origin
    total = tl.sum(tl.exp(score), 0)
    scaled_total = total
    if temperature > 0:
        score = score / temperature
        scaled_total = tl.sum(tl.exp(score), 0)
        seed = tl.load(seed_ptr + row).to(tl.uint32)
        position = tl.load(position_ptr + row).to(tl.uint32)
        score = score + _gumbel(seed, position, v)
    best, at = tl.max(score, 0, return_indices=True)
    chosen = tl.max(tl.where(tl.arange(0, BV) == at, logit, float("-inf")), 0)
    out = part_ptr + row * NB + block
    tl.store(out, largest)
    tl.store(out + B * NB, total)
    tl.store(out + 2 * B * NB, scaled_total)
    tl.store(out + 3 * B * NB, best)
    tl.store(out + 4 * B * NB, chosen)
    tl.store(id_ptr + row * NB + block, block * BV + at)
