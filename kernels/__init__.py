"""electra_kernels: the hot operations, each a readable twin and a Triton kernel behind one contract."""

from electra_kernels.dispatch import available, use

__all__ = ["available", "use"]
