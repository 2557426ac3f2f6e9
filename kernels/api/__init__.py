"""One entry for every kernel.

``implementation=None`` takes the best implementation that this backend and these shapes allow; a name takes that one or
raises ``NotImplementedError`` with the reason. Wrong arguments raise ``ValueError`` naming the argument; with
``kernels.debug`` page ids and positions are checked too, while the program runs. Axis letters: ``preft_jax/shapes.py``.
One family of operations is one file.

``shrink``, ``expand`` and ``lowrank_edit`` are differentiable in x, y, s and the pools' arrays, by reductions of fixed
order: the same inputs give the same bits.
"""

from kernels.api.attention import decode_attention as decode_attention
from kernels.api.attention import paged_attention as paged_attention
from kernels.api.draw import draw as draw
from kernels.api.edits import decode_edit as decode_edit
from kernels.api.edits import expand as expand
from kernels.api.edits import lowrank_edit as lowrank_edit
from kernels.api.edits import shrink as shrink
from kernels.api.edits import write_pages as write_pages
from kernels.api.layer import norm_shrink as norm_shrink
from kernels.api.layer import quantize as quantize
from kernels.api.layer import rope_kv as rope_kv
from kernels.api.layer import silu_mul_shrink as silu_mul_shrink
