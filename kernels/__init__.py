"""electra_kernels: the hot operations, each a readable twin and a Triton kernel behind one contract."""

from electra_kernels.attention import attention
from electra_kernels.dispatch import available, use

__all__ = ["attention", "available", "use"]
