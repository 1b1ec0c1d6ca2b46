"""The order that the PTX machine asks for: programs that have it, and each without one of its waits or fences."""

from __future__ import annotations

import pytest
import torch
from ptx_by_hand import THREADS, each_left_out, run
from ptx_memory import MemoryFault
from ptx_order import FACTORS_NEED_A_FENCE

ONES = "\n".join(f"st.shared.b32 [%r4+{part}], 1006648320;" for part in range(0, 4096, 512))
"""4096 bytes of 1 in half precision: tiles that are the same however a descriptor lays them out."""


def left_out(body: str, faults: dict[str, str]) -> list[object]:
    """(body without a line, message) for each line whose comment begins with `!`."""
    bodies = dict(each_left_out(body, "//!"))
    assert bodies.keys() == faults.keys()
    return [pytest.param(bodies[name], message, id=name) for name, message in faults.items()]


# ---------------------------------------------------------------- tensor memory

# Accumulators and A lie in tensor memory: columns 0 to 15 (3 in each of 128 lanes) and 16 to 23 (halves of 1).
# B [16, 16] is in shared memory. D = A B + 3 = 19; then each thread stores its lane's first number plus 1, and
# reads it again.
TENSOR = f"""
    {ONES}
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p2, %r1, 0;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3+4096], 32;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%p2 mbarrier.init.shared::cta.b64 [%r3+4104], 1;
    add.s32 %r14, %r3, 4104;
    fence.proxy.async.shared::cta;                          //! fence-for-shared-memory
    bar.sync 0;                                             //! barrier-after-allocation
    ld.shared.b32 %r11, [%r3+4096];
    shl.b32 %r12, %r1, 16;
    and.b32 %r12, %r12, 6291456;
    add.s32 %r12, %r11, %r12;                               // the lanes of this warp
    mov.b32 %r20, 0f40400000;
    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r12 + 0], {{{", ".join(["%r20"] * 16)}}};
    mov.b32 %r21, 1006648320;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r12 + 16], {{{", ".join(["%r21"] * 8)}}};
    tcgen05.wait::st.sync.aligned;                          //! wait-for-stores
    bar.sync 0;                                             //! barrier-after-stores
    mov.b32 %r13, {128 >> 4 << 24 | 16 >> 3 << 17 | 1 << 4};
    mov.b64 %rd10, {2 << 61 | 1024 >> 4 << 32 | 1 << 16 | 1024 >> 4};
    mov.pred %p3, -1;
    mov.pred %p4, -1;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r11 + 0], [%r11 + 16], %rd10, %r13, %p3;
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r14]; //! commit
$L__wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r14], 0; //! wait-for-product
    @!%p4 bra $L__wait;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r30}}, [%r12 + 0];
    add.f32 %r31, %r30, 0f3F800000;
    tcgen05.wait::ld.sync.aligned;                          //! wait-for-loads
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r12 + 0], {{%r31}};
    tcgen05.wait::st.sync.aligned;                          //! wait-for-own-store
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r32}}, [%r12 + 0];
    st.global.b32 [ %rd4 + 0 ], {{ %r32 }};
    tcgen05.wait::ld.sync.aligned;                          //! wait-before-deallocation
    bar.sync 0;                                             //! barrier-before-deallocation
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32; //! deallocation
    @%p2 mbarrier.inval.shared::cta.b64 [%r14];
"""
TENSOR_FAULTS = {
    "fence-for-shared-memory": "without a fence.proxy.async since",
    "barrier-after-allocation": "shared load: another thread wrote here",
    "wait-for-stores": "mma: a tcgen05.st here was not waited for",
    "barrier-after-stores": "mma: a tcgen05.st here was waited for by other threads, and no barrier",
    "commit": "for what nobody has committed",
    "wait-for-product": "ld: a tcgen05.mma here was not waited for",
    "wait-for-loads": "st: a tcgen05.ld here was not waited for",
    "wait-for-own-store": "ld: a tcgen05.st here was not waited for",
    "wait-before-deallocation": "dealloc: a tcgen05.ld here was not waited for",
    "barrier-before-deallocation": "dealloc: a tcgen05.ld here was waited for by other threads",
    "deallocation": "has not deallocated its tensor memory",
}


def test_an_ordered_program_on_tensor_memory() -> None:
    out = torch.zeros(THREADS)
    run(TENSOR, out)
    assert out.unique().tolist() == [20]


PRODUCT = next(line for line in TENSOR.splitlines() if ".mma." in line)
COMMIT = next(line for line in TENSOR.splitlines() if ".commit." in line)
TRY_WAIT = next(line for line in TENSOR.splitlines() if ".try_wait." in line)
FREE = next(line for line in TENSOR.splitlines() if ".dealloc." in line)
INVALIDATE = next(line for line in TENSOR.splitlines() if ".inval." in line)
NARROWER = f"mov.b32 %r13, {128 >> 4 << 24 | 8 >> 3 << 17 | 1 << 4};"
RELAXED = TRY_WAIT.replace("parity", "parity.relaxed.cluster")
AFTER = "tcgen05.fence::after_thread_sync;"

CHANGED = {
    "no-wait-by-all": (TRY_WAIT, f"@%p1 {TRY_WAIT}\n@!%p1 mov.pred %p4, -1;", "waited for by other threads"),
    "relaxed-wait": (TRY_WAIT, RELAXED, "ld: a tcgen05.mma here was not waited for"),
    "another-shape": (PRODUCT, f"{PRODUCT}\n{NARROWER}\n{PRODUCT}", "mma: a tcgen05.mma here was not waited for"),
    "another-thread": (
        PRODUCT, f"{PRODUCT}\nsetp.eq.u32 %p5, %r1, 5;\n{PRODUCT.replace('%p2', '%p5')}",
        "mma: a tcgen05.mma here was not waited for"),
    "uncommitted-product": (COMMIT, f"{COMMIT}\n{PRODUCT}", "ld: a tcgen05.mma here was not waited for"),
    "the-phase-before": (TRY_WAIT, TRY_WAIT.replace(", 0;", ", 1;"), "succeeds before the products"),
    "two-phases": (COMMIT, f"{COMMIT}\n{COMMIT}", "the end of either"),
    "something-over-the-barrier": (
        COMMIT, f"{COMMIT}\n@%p2 st.shared.b32 [%r3+4104], %r1;\nbar.sync 0;", "something was stored over it"),
    "wait-without-a-barrier": (TRY_WAIT, TRY_WAIT.replace("[%r14]", "[%r3]"), "no mbarrier is here"),
    "invalid-while-others-wait": (
        "tcgen05.ld.", f"{INVALIDATE}\ntcgen05.ld.", "shared store: another thread read here"),
    "invalid-too-early": (TRY_WAIT, f"{INVALIDATE}\n{TRY_WAIT}", "inval: products that it reports"),
    "deallocated-too-early": (COMMIT, f"{COMMIT}\n{FREE}", "dealloc: a tcgen05.mma here was not waited for"),
    "two-warps-deallocate": (FREE, FREE.replace("@%p1 ", ""), "dealloc: is for one warp"),
    "a-warp-commits": (COMMIT, COMMIT.replace("%p2", "%p1"), "commit: is for one thread"),
    "part-of-a-warp": (FREE, FREE.replace("%p1", "%p2"), "some lanes of a warp are not there"),
    "beyond-the-allocation": (PRODUCT, PRODUCT.replace("[%r11 + 0]", "[%r11 + 24]"), "are not allocated"),
    "allocation-of-24-columns": ("+4096], 32;", "+4096], 24;", "not of "),
    "allocation-after-the-permit": (
        FREE, f"{FREE}\n@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3+4096], 32;",
        "after relinquish_alloc_permit"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CHANGED.values(), ids=CHANGED)
def test_tensor_memory_with_one_change(old: str, new: str, message: str) -> None:
    assert old in TENSOR
    with pytest.raises(MemoryFault, match=message):
        run(TENSOR.replace(old, new), torch.zeros(THREADS))


ALLOWED = {
    "fence-by-the-thread-that-multiplies": (
        "fence.proxy.async.shared::cta;", "bar.sync 0;\n@%p2 fence.proxy.async.shared::cta;", 20),
    "products-into-one-accumulator": (PRODUCT, f"{PRODUCT}\n{PRODUCT}", 36),
    "relaxed-wait-and-fence": ("tcgen05.ld.", f"{AFTER}\ntcgen05.ld.", 20),
    "one-warp-waits-for-all": (
        TRY_WAIT, f"@%p1 {TRY_WAIT}\n@!%p1 mov.pred %p4, -1;\nbar.sync 0;", 20),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "result"), ALLOWED.values(), ids=ALLOWED)
def test_what_is_ordered_in_another_way(old: str, new: str, result: int) -> None:
    out = torch.zeros(THREADS)
    body = TENSOR.replace(old, new, 1)
    run(body.replace(TRY_WAIT, RELAXED) if AFTER in body else body, out)
    assert out.unique().tolist() == [result]


def test_each_commit_reports_all_products_so_far() -> None:
    """Two barriers for one product: the load waits for the second only."""
    initialise = next(line for line in TENSOR.splitlines() if "mbarrier.init" in line)
    second = f"{initialise.replace('4104', '4112')}\nadd.s32 %r15, %r3, 4112;"
    body = TENSOR.replace(initialise, f"{initialise}\n{second}")
    body = body.replace(COMMIT, f"{COMMIT}\n{COMMIT.replace('%r14', '%r15')}")
    body = body.replace(TRY_WAIT, TRY_WAIT.replace("%r14", "%r15"))
    out = torch.zeros(THREADS)
    run(body.replace(INVALIDATE, f"{TRY_WAIT}\nbar.sync 0;\n{INVALIDATE}"), out)
    assert out.unique().tolist() == [20]


def test_a_load_that_packs_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match=r"pack::16b"):
        run(TENSOR.replace("x1.b32 {%r30}", "x1.pack::16b.b32 {%r30}"), torch.zeros(THREADS))


# ---------------------------------------------------------------- wgmma

# A [64, 16] in registers (halves of 1), B [16, 8] in shared memory, twice: D = 2 A B = 32.
SUMS = "%r20, %r21, %r22, %r23"
FACTORS = "%r24, %r25, %r26, %r27"
MULTIPLY = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{SUMS}}}, {{{FACTORS}}}, %rd10, %p3, 1, 1, 0;"
WGMMA = f"""
    {ONES}
    fence.proxy.async.shared::cta;                          //! fence-for-shared-memory
    bar.sync 0;                                             //! barrier
    mov.b32 %r20, 0;
    mov.b32 %r21, 0;
    mov.b32 %r22, 0;
    mov.b32 %r23, 0;
    mov.b32 %r24, 1006648320;
    mov.b32 %r25, 1006648320;
    mov.b32 %r26, 1006648320;
    mov.b32 %r27, 1006648320;
    mov.b64 %rd10, {1 << 62 | 1024 >> 4 << 32 | 1 << 16 | 1024 >> 4};
    mov.pred %p3, -1;
    wgmma.fence.sync.aligned;                               //! fence-for-registers
    {MULTIPLY}
    {MULTIPLY}
    wgmma.commit_group.sync.aligned;                        //! commit
    wgmma.wait_group.sync.aligned 0;                        //! wait
    st.global.b32 [ %rd4 + 0 ], {{ %r23 }};
"""
WGMMA_FAULTS = {
    "fence-for-shared-memory": "without a fence.proxy.async since",
    "barrier": "written since the last barrier",
    "fence-for-registers": "no wgmma.fence since",
    "commit": "a register that a wgmma works on is used",
    "wait": "a register that a wgmma works on is used",
}


def test_an_ordered_program_with_wgmma() -> None:
    out = torch.zeros(THREADS)
    run(WGMMA, out)
    assert out.unique().tolist() == [32]


@pytest.mark.parametrize(("body", "message"), [*left_out(TENSOR, TENSOR_FAULTS), *left_out(WGMMA, WGMMA_FAULTS)])
def test_either_without_one_line(body: str, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        run(body, torch.zeros(THREADS))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("mov.b32 %r20, 0;", "works on is used"),
        ("mov.b32 %r24, 0;", "works on is used"),
        ("mov.b32 %r40, %r27;", "works on is used"),
        (MULTIPLY.replace("%r24", "%r20"), "another one works on these registers"),
        (MULTIPLY.replace("n8k", "n16k").replace(SUMS, f"{SUMS}, %r40, %r41, %r42, %r43"), "no wgmma.fence since"),
    ],
    ids=["accumulator-written", "factor-written", "factor-read", "sum-as-a-factor", "another-shape"],
)
def test_registers_of_a_wgmma_under_way(between: str, message: str) -> None:
    zeros = "\n".join(f"mov.b32 %r{number}, 0;" for number in range(40, 44))
    body = f"{zeros}\n{WGMMA}".replace(f"{MULTIPLY}\n", f"{MULTIPLY}\n{between}\n", 1)
    with pytest.raises(MemoryFault, match=message):
        run(body, torch.zeros(THREADS))


@pytest.mark.skipif(not FACTORS_NEED_A_FENCE, reason="this Triton's kernels compute factors after the fence")
def test_a_factor_written_after_the_fence() -> None:
    body = WGMMA.replace(MULTIPLY, f"mov.b32 %r25, 0;\n{MULTIPLY}", 1)
    with pytest.raises(MemoryFault, match=r"no wgmma.fence since"):
        run(body, torch.zeros(THREADS))


def test_a_fence_follows_what_uses_the_sums_between_two_products() -> None:
    again = f"add.f32 %r23, %r23, 0f3F800000;\n{{}}\n{MULTIPLY}\nwgmma.commit_group.sync.aligned;\n"
    again += "wgmma.wait_group.sync.aligned 0;\nst.global.b32 [ %rd4 + 0 ], { %r23 };"
    out = torch.zeros(THREADS)
    run(WGMMA + again.replace("{}", "wgmma.fence.sync.aligned;"), out)
    assert out.unique().tolist() == [49]
    with pytest.raises(MemoryFault, match=r"no wgmma.fence since"):
        run(WGMMA + again.replace("{}", ""), out)
