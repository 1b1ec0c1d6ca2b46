"""The PTX machine by itself: instructions against NumPy, and every check on a program that breaks its rule.

The kernels' own tests run on it with `make test-ptx`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_by_hand import THREADS, run
from ptx_memory import MemoryFault
from torch import Tensor


def computed(body: str, dtype: torch.dtype = torch.int32, source: Tensor | None = None) -> Tensor:
    """What `body` leaves in %r9 of each thread; %r8 holds the thread's number of `source`."""
    source = torch.arange(THREADS, dtype=torch.int32) if source is None else source
    out = torch.zeros(THREADS, dtype=dtype)
    run(f"ld.global.b32 {{ %r8 }}, [ %rd4 + 0 ];\n{body}\nst.global.b32 [ %rd5 + 0 ], {{ %r9 }};", source, out)
    return out


INDEX = torch.arange(THREADS)


INSTRUCTIONS = {
    "add": ("add.s32 %r9, %r8, -5;", INDEX - 5),
    "mul-hi": ("mul.hi.u32 %r9, %r8, 2147483648;", INDEX // 2),
    "divide": ("sub.s32 %r7, %r8, 64;\ndiv.s32 %r9, %r7, 3;", torch.div(INDEX - 64, 3, rounding_mode="trunc")),
    "bits": ("bfe.u32 %r9, %r8, 2, 3;", (INDEX >> 2) & 7),
    "signed-bits": ("bfe.s32 %r9, %r8, 0, 2;", (INDEX & 3) - 4 * (INDEX & 2) // 2),
    "shift-too-far": ("shl.b32 %r9, %r8, 32;", 0 * INDEX),
    "permute-bytes": ("prmt.b32 %r9, %r8, 1, 0x0154U;", INDEX << 24 | 1),
    "select": ("setp.lt.s32 %p1, %r8, 10;\nselp.b32 %r9, 1, 2, %p1;", 2 - (INDEX < 10).int()),
    "guard": ("mov.b32 %r9, 7;\nsetp.lt.s32 %p1, %r8, 10;\n@!%p1 mov.b32 %r9, 8;", 8 - (INDEX < 10).int()),
    "halves": ("mov.b32 {%rs1, %rs2}, %r8;\nmov.b32 %r9, {%rs2, %rs1};", INDEX << 16),
    "butterfly": ("shfl.sync.bfly.b32 %r9, %r8, 5, 31, -1;", INDEX ^ 5),
    "up": ("shfl.sync.up.b32 %r9, %r8, 2, 0, -1;", torch.where(INDEX % 32 < 2, INDEX, INDEX - 2)),
    "broadcast": ("shfl.sync.idx.b32 %r9, %r8, 3, 31, -1;", INDEX // 32 * 32 + 3),
    "warp-sum": ("redux.sync.add.s32 %r9, %r8, -1;", (INDEX // 32 * 32) * 32 + 31 * 16),
    "branch": (
        "setp.lt.s32 %p1, %r8, 50;\nmov.b32 %r9, 1;\n@%p1 bra $L__one;\nmov.b32 %r9, 2;\n$L__one:\n"
        "add.s32 %r9, %r9, 10;",
        12 - (INDEX < 50).int(),
    ),
    "loop": (  # each thread its own number of turns
        "mov.b32 %r9, 0;\nmov.b32 %r7, 0;\n$L__turn:\nadd.s32 %r9, %r9, %r7;\nadd.s32 %r7, %r7, 1;\n"
        "setp.le.s32 %p1, %r7, %r8;\n@%p1 bra $L__turn;",
        INDEX * (INDEX + 1) // 2,
    ),
    "through-shared-memory": (
        "st.shared.b32 [%r4], %r8;\nbar.sync 0;\nxor.b32 %r5, %r4, 508;\nld.shared.b32 %r9, [%r5];",
        INDEX ^ 127,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instructions(body: str, expected: Tensor) -> None:
    assert torch.equal(computed(body), expected.to(torch.int32))


FLOATS = torch.linspace(-4, 4, THREADS)


FLOAT_INSTRUCTIONS = {
    "fma": ("fma.rn.f32 %r9, %r8, %r8, 0f3F800000;", FLOATS.double().square().add(1).float()),
    "exp2": ("ex2.approx.ftz.f32 %r9, %r8;", FLOATS.exp2()),
    "to-bf16-and-back": ("cvt.rn.bf16.f32 %rs1, %r8;\ncvt.f32.bf16 %r9, %rs1;", FLOATS.bfloat16().float()),
    "packed-f16": (
        "cvt.rn.f16x2.f32 %r7, %r8, 0f00000000;\nmov.b32 {%rs1, %rs2}, %r7;\ncvt.f32.f16 %r9, %rs2;",
        FLOATS.half().float(),
    ),
    "max-drops-nan": ("max.f32 %r9, %r8, 0f7FC00000;", FLOATS),
    "flush": ("mul.ftz.f32 %r9, %r8, 0f00000001;", torch.zeros(THREADS)),
}


@pytest.mark.parametrize(("body", "expected"), FLOAT_INSTRUCTIONS.values(), ids=FLOAT_INSTRUCTIONS)
def test_float_instructions(body: str, expected: Tensor) -> None:
    torch.testing.assert_close(computed(body, torch.float32, FLOATS), expected, rtol=2e-7, atol=0)


# ---------------------------------------------------------------- tensor cores


def test_mma_multiplies_what_ldmatrix_loads() -> None:
    """A [16, 16], B [16, 8] row by row in shared memory; every number a small integer, so the product is exact."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=generator).bfloat16() for shape in ((16, 16), (16, 8)))
    source = torch.cat([a.flatten(), b.flatten()])
    out = torch.zeros(16, 8)
    run(
        """
        mul.wide.u32 %rd6, %r1, 16;
        add.s64 %rd7, %rd1, %rd6;
        setp.lt.s32 %p1, %r1, 16;
        ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd7 + 0 ];
        shl.b32 %r5, %r1, 4;
        add.s32 %r5, %r5, %r3;
        st.shared.v4.b32 [%r5], {%r10, %r11, %r12, %r13};
        @%p1 ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd7 + 512 ];
        @%p1 st.shared.v4.b32 [%r5+512], {%r10, %r11, %r12, %r13};
        bar.sync 0;
        // Tiles of A: rows 0-7 and 8-15, then the right half of both. Lane l: row l % 16, half l / 16.
        and.b32 %r14, %r1, 15;
        shl.b32 %r14, %r14, 5;
        and.b32 %r15, %r1, 16;
        add.s32 %r14, %r14, %r15;
        add.s32 %r14, %r14, %r3;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r14];
        and.b32 %r16, %r1, 15;
        shl.b32 %r16, %r16, 4;
        add.s32 %r16, %r16, %r3;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r16+512];
        mov.b32 %r30, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r31, %r32, %r33, %r34 }, { %r20, %r21, %r22, %r23 },
         { %r24, %r25 }, { %r30, %r30, %r30, %r30 };
        mul.wide.u32 %rd8, %r1, 8;
        add.s64 %rd9, %rd2, %rd8;
        st.global.v2.b32 [ %rd9 + 0 ], { %r31, %r32 };
        st.global.v2.b32 [ %rd9 + 256 ], { %r33, %r34 };
        """.replace("},\n         {", "}, {"),
        source, out, threads=32,
    )  # fmt: skip
    assert torch.equal(out, a.float() @ b.float())


@pytest.mark.parametrize("swizzle", [128, 64, 32])
def test_wgmma_reads_swizzled_tiles(swizzle: int) -> None:
    """A [64, 16] and B [16, 8], both with k contiguous, written to shared memory where the swizzle says."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (rows, 16), generator=generator).half() for rows in (64, 8))
    image = np.zeros(16384, np.uint8)
    for first, matrix in ((0, a), (8192, b)):
        for row, numbers in enumerate(matrix.numpy()):
            for chunk in range(2):  # of 16 bytes
                address = first + row // 8 * 8 * swizzle + row % 8 * swizzle + chunk * 16
                address ^= (address >> 7 & swizzle // 16 - 1) << 4
                image[address : address + 16] = numbers[chunk * 8 : chunk * 8 + 8].view(np.uint8)
    source, out = torch.from_numpy(image.view(np.int32).copy()), torch.zeros(64, 8)
    kind = {128: 1, 64: 2, 32: 3}[swizzle]
    descriptors = [kind << 62 | (8 * swizzle >> 4) << 32 | 1 << 16 | (1024 + first) >> 4 for first in (0, 8192)]
    copies = "\n".join(
        f"ld.global.b32 {{ %r40 }}, [ %rd4 + {part} ];\nst.shared.b32 [%r4+{part}], %r40;"
        for part in range(0, 16384, 512)
    )
    run(
        f"""
        {copies}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        mov.b64 %rd10, {descriptors[0]};
        mov.b64 %rd11, {descriptors[1]};
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r20,%r21,%r22,%r23}}, %rd10, %rd11, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        shr.u32 %r5, %r1, 5;
        and.b32 %r6, %r1, 31;
        mul.lo.s32 %r5, %r5, 512;  // a warp owns 16 rows of 32 bytes
        mad.lo.s32 %r5, %r6, 8, %r5;
        cvt.u64.u32 %rd8, %r5;
        add.s64 %rd9, %rd2, %rd8;
        st.global.v2.b32 [ %rd9 + 0 ], {{ %r20, %r21 }};
        st.global.v2.b32 [ %rd9 + 256 ], {{ %r22, %r23 }};
        """,
        source, out, shared=16384,
    )  # fmt: skip
    assert torch.equal(out, a.float() @ b.float().T)


# ---------------------------------------------------------------- what a program must not do

NEIGHBOUR = "xor.b32 %r5, %r4, {bytes};\nld.shared.b32 %r9, [%r5];"
COPY = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 0x4;\ncp.async.commit_group;"
WGMMA = (
    "wgmma.fence.sync.aligned;\n"
    "mov.b64 %rd10, 4611686293305360448;\n"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20,%r21,%r22,%r23}, %rd10, %rd10, 0, 1, 1, 0, 0;"
)

FAULTS = {
    "beyond-the-tensor": ("ld.global.b32 { %r9 }, [ %rd4 + 4 ];", "outside of every argument"),
    "misaligned": ("ld.global.v2.b32 { %r8, %r9 }, [ %rd4 + 0 ];", "no multiple of it"),
    "beyond-shared-memory": ("st.shared.b32 [%r4+8192], %r1;", "outside of the program's 8192"),
    "another-warp-without-a-barrier": (
        f"st.shared.b32 [%r4], %r1;\n{NEIGHBOUR.format(bytes=128)}", "another thread wrote here"),
    "another-lane-without-a-warp-barrier": (
        f"st.shared.b32 [%r4], %r1;\n{NEIGHBOUR.format(bytes=4)}", "another thread wrote here"),
    "written-while-others-may-read": (
        f"st.shared.b32 [%r4], %r1;\nbar.sync 0;\n{NEIGHBOUR.format(bytes=128)}\nst.shared.b32 [%r4], %r3;",
        "another thread read here"),
    "two-values-for-one-place": ("st.shared.b32 [global_smem], %r1;", "different values to one place"),
    "barrier-in-a-branch": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $L__end;\nbar.sync 0;\n$L__end:", "not all threads reach"),
    "shuffle-in-a-branch": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", "some lanes of a warp"),
    "copy-not-waited-for-at-the-end": (COPY, "ends before its cp.async"),
    "copy-over-what-others-may-read": (
        f"st.shared.b32 [%r4], %r1;\nbar.sync 0;\n{NEIGHBOUR.format(bytes=128)}\n{COPY}",
        "cp.async: another thread read"),
    "store-over-a-copy": (f"{COPY}\nst.shared.b32 [%r4], %r1;", "store: a cp.async to here was not waited for"),
    "register-never-written": ("add.s32 %r9, %r1, %r77;", "was never written"),
    "tensor-cores-without-a-fence": (
        f"st.shared.b32 [%r4], %r1;\nbar.sync 0;\n{WGMMA}", "without a fence.proxy"),
    "tensor-cores-and-a-fence-by-one-thread": (
        f"st.shared.b32 [%r4], %r1;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 fence.proxy.async.shared::cta;\nbar.sync 0;\n"
        f"{WGMMA}", "without a fence.proxy"),
    "unknown-copy": ("cp.async.bulk.commit_group;", "does not know it"),
    "unknown": ("sin.approx.f32 %r9, %r1;", "does not know it"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(body: str, message: str) -> None:
    with pytest.raises((MemoryFault, NotImplementedError), match=message) as raised:
        run(body, torch.zeros(THREADS, dtype=torch.int32))
    assert " at kernel: " in str(raised.value), "says which instruction"


def test_a_copy_is_there_once_it_was_waited_for() -> None:
    source, out = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    wait, look = "cp.async.wait_group 0;", "ld.shared.b32 %r9, [%r4];\nst.global.b32 [ %rd5 + 0 ], { %r9 };"
    run(f"{COPY}\n{wait}\n{look}", source, out)
    assert torch.equal(out, source)
    with pytest.raises(MemoryFault, match=r"shared load: a cp.async to here was not waited for"):
        run(f"{COPY}\n{look}\n{wait}", source, out)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [ %rd4 + 0 ], { %r6 };", "another program of this launch wrote"),
        ("ld.global.b32 { %r9 }, [ %rd4 + 0 ];\n@%p1 st.global.b32 [ %rd4 + 0 ], { %r6 };", "launch read"),
    ],
    ids=["both-write", "one-reads-one-writes"],
)
def test_programs_of_a_launch_are_not_ordered(body: str, message: str) -> None:
    which = "mov.u32 %r6, %ctaid.x;\nadd.s32 %r6, %r6, 7;\nsetp.lt.s32 %p1, %r6, 8;\n"
    with pytest.raises(MemoryFault, match=message):
        run(which + body, torch.zeros(THREADS, dtype=torch.int32), programs=2)


def test_the_same_value_twice_is_no_race() -> None:
    run("st.shared.b32 [global_smem], 3;\nst.global.b32 [ %rd1 + 0 ], { %r3 };", torch.zeros(1), programs=2)
