"""Reference implementations in plain JAX: readable, correct on every backend, and what the fast kernels are tested
against.
"""

from kernels.xla.attention import paged_attention as paged_attention
from kernels.xla.backward import expand_backward as expand_backward
from kernels.xla.backward import shrink_backward as shrink_backward
from kernels.xla.decode import decode_attention as decode_attention
from kernels.xla.draw import draw as draw
from kernels.xla.fp8 import quantize as quantize
from kernels.xla.fused import norm_shrink as norm_shrink
from kernels.xla.fused import rope_kv as rope_kv
from kernels.xla.fused import silu_mul_shrink as silu_mul_shrink
from kernels.xla.lowrank import decode_edit as decode_edit
from kernels.xla.lowrank import expand as expand
from kernels.xla.lowrank import shrink as shrink
from kernels.xla.pages import write_pages as write_pages
