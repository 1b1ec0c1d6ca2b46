"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m benchmarks.compile_report [--json] [--only SUBSTRING] [--capability 80 90 100]

Kernels are found through `compile_cases(capability)` of each module in `MODULES`; see
`electra_kernels.compile_case` for what a case holds. To add a kernel, add its module there.
"""

from __future__ import annotations

MODULES = ("electra_kernels.attention_triton",)
