"""TPU kernels in Pallas. ``interpret`` runs them in Pallas' TPU interpreter on any backend, for tests.

What an implementation cannot do raises ``kernels.types.Unsupported`` naming the argument.
"""

from kernels.pallas_tpu.attention import paged_attention
from kernels.pallas_tpu.common import check_available, interpret
from kernels.pallas_tpu.decode import decode_edit
from kernels.pallas_tpu.lowrank import expand, shrink

__all__ = ["check_available", "decode_edit", "expand", "interpret", "paged_attention", "shrink"]
