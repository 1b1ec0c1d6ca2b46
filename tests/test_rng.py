# mypy: allow-untyped-defs, allow-incomplete-defs
"""The counter-based generator: known answers, the same bits in Triton, and that its bits look random."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from electra_kernels import attention, rng
from electra_kernels.checks import check_dropout
from electra_kernels.rng_triton import keep_tile, philox
from kernel_helpers import DEVICE
from scipy import stats
from torch import Tensor

ONES = 0xFFFFFFFF
# (key, counter, words) of 7 rounds: zeros, ones, digits of π; from the Random123 library's test vectors.
KNOWN_ANSWERS = [
    (0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (2**64 - 1, (ONES, ONES, ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        0x299F31D0_A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
# Keys that fill 64 bits and rows that wrap around 32 bits once `first_row` is added.
SEEDS = [
    pytest.param(0, id="zero"),
    pytest.param(-1, id="all-bits"),
    pytest.param(0x123456789ABCDEF0, id="63-bits"),
    pytest.param(torch.tensor([-5]), id="tensor-key"),
    pytest.param(torch.tensor([2**62 + 3, 2**32 - 3]), id="tensor-key-and-row-that-wraps"),
]


def words(seed: rng.Seed, rows: int, columns: int, stream: int = 0, plane: int = 0) -> Tensor:
    """Words of a block of counters, int64 [rows, columns, 4]."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return torch.stack(rng.philox(rng.seed_tensor(seed), column, row, stream, plane), dim=-1)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(key: int, counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    column, row, stream, plane = counter
    got = rng.philox(rng.seed_tensor(key), torch.tensor([column]), torch.tensor([row]), stream, plane)
    assert tuple(int(word) for word in got) == expected
    assert rng._philox_int((column, row, stream, plane), key) == expected


def test_fold_is_stable_and_tells_its_parts_apart() -> None:
    assert rng.fold(0) == 0
    assert rng.fold(1, 2) == 0x9F15046012F8E28  # runs of earlier versions must stay reproducible
    folded = {
        rng.fold(seed, *parts) for seed in (0, 1) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40,)]
    }
    assert len(folded) == 12 and all(0 <= value < 2**63 for value in folded)


def test_fold_takes_numpy_s_integers_for_what_they_are_and_refuses_fractions() -> None:
    assert rng.fold(np.int64(1), np.int64(2)) == rng.fold(1, 2) and type(rng.fold(np.int64(1), 2)) is int
    with pytest.raises(TypeError):
        rng.fold(0, 1.5)  # type: ignore[arg-type]


@triton.jit(do_not_specialize=["stream", "plane"])
def _words_kernel(p_seed, p_words, stream, plane, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    word0, word1, word2, word3 = philox(p_seed, columns[None, :], rows.to(tl.int64)[:, None], stream, plane)
    p_first = p_words + (rows[:, None] * COLUMNS + columns[None, :]) * 4
    tl.store(p_first, word0.to(tl.int64))
    tl.store(p_first + 1, word1.to(tl.int64))
    tl.store(p_first + 2, word2.to(tl.int64))
    tl.store(p_first + 3, word3.to(tl.int64))


@pytest.mark.host_only
@pytest.mark.parametrize("seed", SEEDS)
def test_triton_draws_the_same_bits(seed: rng.Seed) -> None:
    got = torch.full((8, 4, 4), -1, device=DEVICE)
    seed_2 = rng.seed_tensor(seed).to(DEVICE)
    _words_kernel[(1,)](seed_2, got, 5, 2**31 - 1, ROWS=8, COLUMNS=4)
    expected = words(seed, 8, 4, stream=5, plane=2**31 - 1)
    assert torch.equal(got.cpu(), expected)


def test_uniforms_exclude_both_ends() -> None:
    uniforms = rng.uniform(torch.tensor([0, 1, ONES - 1, ONES]))
    assert 0 < uniforms.min() and uniforms.max() < 1
    assert torch.isfinite(uniforms.log()).all() and torch.isfinite((-uniforms).log1p()).all()


@triton.jit(do_not_specialize=["stream", "plane"])
def _keep_kernel(
    p_seed, p_keep, stream, plane, first_column,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    keep = keep_tile(p_seed, rows.to(tl.int64), first_column, stream, plane, THRESHOLD, COLUMNS)
    tl.store(p_keep + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


@pytest.mark.host_only
@pytest.mark.parametrize("dropout_p", [0.0, 1e-5, 0.1, 0.5, 0.999])
def test_triton_keeps_what_the_specification_keeps(dropout_p: float) -> None:
    seed = rng.seed_tensor(torch.tensor([77, 2**31]))
    expected = rng.keep_mask(seed, torch.arange(16), 64, dropout_p, stream=3, plane=9)
    for first, columns in ((0, 64), (32, 32), (40, 8)):  # whatever the tile and where it starts
        got = torch.full((16, columns), -1, dtype=torch.int8, device=DEVICE)
        threshold = rng.dropout_threshold(dropout_p)
        _keep_kernel[(1,)](seed.to(DEVICE), got, 3, 9, first, THRESHOLD=threshold, ROWS=16, COLUMNS=columns)
        assert torch.equal(got.cpu(), expected[:, first : first + columns].to(torch.int8))


def test_keep_mask_follows_its_definition() -> None:
    seed, rows = rng.seed_tensor(9), torch.tensor([4, 0, 11])
    keep = rng.keep_mask(seed, rows, 19, 0.25, stream=1, plane=2)
    for i, row in enumerate(rows.tolist()):
        for column in range(19):
            word = rng._philox_int((column // 8, row, 1, 2), 9)[(column // 2) % 4]
            half = (word >> 16 * (column % 2)) & 0xFFFF
            assert bool(keep[i, column]) == (half >= 0.25 * 65536)


def test_first_row_shifts_rows() -> None:
    whole = rng.keep_mask(rng.seed_tensor(3), torch.arange(12), 16, 0.5, stream=0)
    part = rng.keep_mask(torch.tensor([3, 5]), torch.arange(7), 16, 0.5, stream=0)
    assert torch.equal(whole[5:], part)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_kept_fraction_and_scale(dropout_p: float) -> None:
    rows, columns = 2000, 128
    keep = rng.keep_mask(rng.seed_tensor(1), torch.arange(rows), columns, dropout_p, stream=0).double()
    rate = 1 / rng.keep_scale(dropout_p)
    assert rate == pytest.approx(1 - dropout_p, abs=2**-17)
    # Five standard deviations, of the whole and of every row (2000 rows: 5 is far out for each of them).
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(keep.mean().item() - rate) < 5 * deviation / (rows * columns) ** 0.5
    assert (keep.mean(1) - rate).abs().max() < 5 * deviation / columns**0.5
    # Neighbours in a row, in a column, and halves of one word are uncorrelated.
    for first, second in ((keep[:, :-1], keep[:, 1:]), (keep[:-1], keep[1:]), (keep[:, ::2], keep[:, 1::2])):
        covariance = ((first - rate) * (second - rate)).mean().item()
        assert abs(covariance) < 5 * deviation**2 / first.numel() ** 0.5


def test_bytes_are_uniform_and_streams_unrelated() -> None:
    block = words(12345, 64, 64)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((block >> shift) & 0xFF).flatten(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    for other in (words(12346, 64, 64), words(12345, 64, 64, stream=1), words(12345, 64, 64, plane=1)):
        # Unrelated words differ in half of their bits: 16384 x 32 coin tosses.
        differing = sum(((block ^ other) >> bit & 1).sum().item() for bit in range(32))
        assert abs(differing / (block.numel() * 32) - 0.5) < 5 * 0.5 / (block.numel() * 32) ** 0.5


@pytest.mark.parametrize(
    "seed", [torch.tensor([1, 2, 3]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)]
)
def test_bad_seed_tensors_are_refused(seed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"seed: expected an int or an int64 tensor of 1 or 2 elements"):
        rng.seed_tensor(seed)


@pytest.mark.parametrize(
    "seed", [None, 1.5, "1", torch.Generator()], ids=["none", "fraction", "text", "generator"]
)
def test_a_seed_that_is_no_integer_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed: expected an int or an int64 tensor, got "):
        rng.seed_tensor(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64 + 5])
def test_a_seed_is_its_low_64_bits(seed: int) -> None:
    assert int(rng.seed_tensor(seed)[0]) % 2**64 == seed % 2**64


@pytest.mark.parametrize("seed", [5, torch.tensor(5), torch.tensor([5])], ids=["int", "scalar", "one"])
def test_a_seed_without_a_first_row_counts_from_0(seed: rng.Seed) -> None:
    assert rng.seed_tensor(seed).tolist() == [5, 0] and rng.seed_tensor(torch.tensor([5, 7])).tolist() == [5, 7]


@pytest.mark.host_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("lanes", [None, 1])
def test_compiled_code_takes_another_seed_at_every_call(lanes: int | None) -> None:
    """Also where the compiled code has no vectors, as on a processor without AVX2: GCC takes its products of int64
    for positive, which they are unless they overflow."""

    def kept(rows_T: Tensor, seed: int) -> Tensor:
        return rng.keep_mask(rng.seed_tensor(seed), rows_T, 16, 0.5, 3)

    compiled, rows_T = torch.compile(kept, fullgraph=True, options={"cpp.simdlen": lanes}), torch.arange(6)
    for seed in (7, 8, 9):  # from the second on as a number that the compiled code does not know
        assert torch.equal(compiled(rows_T, seed), kept(rows_T, seed))


def test_a_seed_is_read_where_it_lies() -> None:
    """A column of a table of seeds, whose numbers are not side by side: in C, and by Triton, as by the twins."""
    column = torch.tensor([[5, 6], [7, 8]])[:, 0]
    assert rng.seed_tensor(column).is_contiguous() and rng.seed_tensor(column).tolist() == [5, 7]
    qkv = torch.randn(10, 3, 2, 16, device=DEVICE, requires_grad=True)
    starts = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
    seeds = column.to(DEVICE), torch.tensor([5, 7], device=DEVICE)
    results = [attention(qkv, starts, 6, dropout_p=0.3, seed=seed) for seed in seeds]
    assert torch.equal(*results)


def test_a_seed_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="seed: expected an int or a tensor on cpu, got one on meta"):
        rng.seed_tensor(torch.zeros(2, dtype=torch.int64, device="meta"), "cpu")
    with pytest.raises(ValueError, match="seed: expected an int or a tensor on cpu, got one on meta"):
        check_dropout(0.1, torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(1))
    key = check_dropout(0.1, 5, torch.zeros(1, device="meta"))
    assert key is not None and key.is_meta, "a number goes where the data lie"
