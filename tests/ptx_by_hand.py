"""Short programs in PTX, written by hand, on the PTX machine: what its own tests share."""

from __future__ import annotations

from collections.abc import Iterator

import ptx_machine
from ptx_program import parse
from torch import Tensor

THREADS = 128
HEAD = """
.version 8.0
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
.reqntid {threads}
{{
	.reg .b32 %r<999>;
	mov.u32 %r1, %tid.x;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b64 %rd2, [kernel_param_1];
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;  // this thread's number of the first tensor
	add.s64 %rd5, %rd2, %rd3;  // and of the second
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;     // this thread's word of shared memory
{body}
	ret;
}}
"""


def run(body: str, *tensors: Tensor, programs: int = 1, threads: int = THREADS, shared: int = 8192) -> None:
    """`body` between what every program here begins and ends with."""
    program = parse(HEAD.format(body=body, threads=threads))
    pointers = [tensor.data_ptr() for tensor in tensors]
    ptx_machine.launch(program, pointers + [0] * (2 - len(tensors)), (programs, 1, 1), tensors, shared)


def each_left_out(body: str, mark: str) -> Iterator[tuple[str, str]]:
    """(name, body without its line) for each line that ends with a comment `mark` and a name."""
    lines = body.splitlines()
    for place, line in enumerate(lines):
        _, found, name = line.partition(mark)
        if found:
            yield name.strip(), "\n".join(lines[:place] + lines[place + 1 :])
