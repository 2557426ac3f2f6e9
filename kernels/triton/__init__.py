"""Kernels for NVIDIA GPUs, in Triton through jax-triton.

Importing needs jax-triton, triton and JAX's CUDA plugin (``pip install preft-jax[gpu]``), not a GPU: ``lowering_for``
makes programs for a GPU that is not there.
"""

from kernels.triton.attention import decode_attention as decode_attention
from kernels.triton.attention import paged_attention as paged_attention
from kernels.triton.backward import expand_backward as expand_backward
from kernels.triton.backward import shrink_backward as shrink_backward
from kernels.triton.call import lowering_for as lowering_for
from kernels.triton.decode import decode_edit as decode_edit
from kernels.triton.draw import draw as draw
from kernels.triton.fused import norm_shrink as norm_shrink
from kernels.triton.fused import quantize as quantize
from kernels.triton.fused import rope_kv as rope_kv
from kernels.triton.fused import silu_mul_shrink as silu_mul_shrink
from kernels.triton.lowrank import expand as expand
from kernels.triton.lowrank import shrink as shrink
from kernels.triton.pages import write_pages as write_pages
