"""sample_and_replace: the draws are exact, both implementations agree, and nothing else is touched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from electra_kernels import rng, sample_and_replace, use
from electra_kernels import sample_replace_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, LARGE, dtype_id, skip_without_memory
from scipy import stats
from torch import Tensor

from electra_core.execution.capture import capturing

# NaN and infinity go in on purpose, and NumPy, under the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEED = torch.tensor([987654321, 0])
UNLIKELY = 1e-4  # smallest p-value accepted; seeds are fixed, so a test that passes once always does


def sample(
    logits_MV: Tensor, seed: rng.Seed = SEED, implementation: str = "reference", **options: object
) -> Tensor:
    """Just the drawn ids, on the host."""
    rows = len(logits_MV)
    seed = seed.to(DEVICE) if isinstance(seed, Tensor) else seed
    with use(implementation):  # type: ignore[arg-type]
        out = sample_and_replace(
            logits_MV.to(DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE),
            torch.arange(rows, device=DEVICE), seed=seed, **options,  # type: ignore[arg-type]
        )  # fmt: skip
    return out.sampled_ids_M.cpu()


def random_logits(rows: int, vocabulary: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator)


# ---------------------------------------------------------------- the distribution


def assert_distributed(ids: Tensor, probabilities: Tensor) -> None:
    """Chi-square test; words expected fewer than 8 times are pooled, impossible ones must not occur."""
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * len(ids)
    rare = expected < 8
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).numpy()
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None])).numpy()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > UNLIKELY


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("vocabulary", [2, 128, 300], ids=["two-words", "one-whole-tile", "partial-last-tile"])
def test_frequencies(vocabulary: int, temperature: float) -> None:
    logits_V = random_logits(1, vocabulary)[0]
    logits_V[1::7] = -math.inf
    logits_V[0] = logits_V[-1] = logits_V.max()  # a tie, and the last word of the last tile
    ids = sample(logits_V.expand(20_000, -1), temperature=temperature)
    p_V = torch.softmax(logits_V.double() / temperature, 0)
    assert_distributed(ids, p_V)
    if vocabulary > 128:  # the first level by itself: a bias between tiles would drown among hundreds of words
        assert_distributed(ids // 128, torch.stack([part.sum() for part in p_V.split(128)]))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_probability_integral_transform(implementation: str) -> None:
    """Every row has another distribution; F(x - 1) + U·p(x) of its draw must be uniform."""
    rows = 4000 if implementation == "reference" or DEVICE == "cuda" else 50
    logits_MV = random_logits(rows, 300, scale=3.0)
    ids = sample(logits_MV, implementation=implementation)
    p_MV = torch.softmax(logits_MV.double(), 1)
    drawn = p_MV.gather(1, ids[:, None])[:, 0]
    below = p_MV.cumsum(1).gather(1, ids[:, None])[:, 0] - drawn
    uniforms = below + drawn * torch.from_numpy(np.random.default_rng(0).random(rows))
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > UNLIKELY


@pytest.mark.parametrize("other", ["next-row", "next-step", "other-stream"])
def test_independence(other: str) -> None:
    logits_MV = random_logits(1, 260)[0].expand(20_001, -1)
    ids = sample(logits_MV) % 5
    if other == "next-row":
        first, second = ids[:-1], ids[1:]
    elif other == "next-step":
        first, second = ids, sample(logits_MV, rng.fold(1, 7)) % 5
    else:
        first, second = ids, sample(logits_MV, stream=1) % 5
    table = torch.bincount(first * 5 + second, minlength=25).reshape(5, 5).numpy()
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


def test_the_two_levels_written_out() -> None:
    """The same uniforms by a loop over float64 probabilities give the same ids: the contract, literally."""
    logits_MV = random_logits(400, 300, scale=3.0)
    u_tile_M, u_word_M = reference.row_uniforms(SEED, torch.arange(400), 0)
    wanted = []
    for logits_V, u_tile, u_word in zip(logits_MV.double(), u_tile_M.tolist(), u_word_M.tolist(), strict=True):
        p_V = torch.softmax(logits_V, 0).tolist()
        tiles = [p_V[start : start + 128] for start in range(0, 300, 128)]
        tile = next(t for t in range(3) if sum(map(sum, tiles[: t + 1])) > u_tile * sum(p_V))
        word = next(w for w in range(128) if sum(tiles[tile][: w + 1]) > u_word * sum(tiles[tile]))
        wanted.append(128 * tile + word)
    assert sample(logits_MV).tolist() == wanted


def test_far_tail_is_reachable_and_ends_are_not_overrun() -> None:
    """A word of probability 1e-14 is what the highest uniforms hit; fp32 sums would have lost it."""
    weights = torch.tensor([[1.0, 1e-14, 0.0]])
    highest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert reference.inverse_cdf(weights, highest)[0].item() == 1
    assert reference.inverse_cdf(weights, torch.tensor([2.0**-53], dtype=torch.float64))[0].item() == 0


def test_uniforms_stay_inside_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr(reference, "philox", lambda *_, bits=bits: (torch.tensor([bits]),) * 4)
        assert all(0 < u.item() < 1 for u in reference.row_uniforms(SEED, torch.arange(1), 0))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_temperature_extremes(implementation: str) -> None:
    logits_MV = random_logits(6, 200)
    for temperature in (1e-3, 1e-30, 1e-300):
        ids = sample(logits_MV, implementation=implementation, temperature=temperature)
        assert torch.equal(ids, logits_MV.argmax(1)), temperature
    assert (sample(logits_MV * 1e30, implementation=implementation, temperature=1e30) >= 0).all()
    logits_MV[:, 100:] = -math.inf  # stays impossible, also where 1 / temperature is 0 in fp32
    ids = sample(logits_MV, implementation=implementation, temperature=1e60)
    assert ((ids >= 0) & (ids < 100)).all()


def test_high_temperature_is_uniform() -> None:
    ids = sample(random_logits(1, 50)[0].expand(20_000, -1), temperature=1e9)
    assert_distributed(ids, torch.full((50,), 1 / 50))


# ---------------------------------------------------------------- twin and kernel


def awkward_rows(vocabulary: int) -> Tensor:
    """Logits with ties, impossible words and rows that are no distribution (the last three)."""
    logits_MV = random_logits(8, vocabulary)
    logits_MV[1] = 0.0
    logits_MV[2, : vocabulary - 1] = -math.inf
    logits_MV[3, vocabulary // 2 :] = -math.inf
    logits_MV[5, vocabulary // 3] = math.nan
    logits_MV[6] = -math.inf
    logits_MV[7, -1] = math.inf
    return logits_MV


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("vocabulary", [2, 128, 129, 4500], ids=["tiny", "one-tile", "tile-plus-one", "two-steps"])
def test_kernel_draws_the_twins_ids(vocabulary: int, dtype: torch.dtype) -> None:
    logits_MV = awkward_rows(vocabulary).to(dtype)
    seed = torch.tensor([-5, 2**31])
    options = {"seed": seed, "stream": 3, "temperature": 0.7}
    ids = sample(logits_MV, implementation="triton", **options)  # type: ignore[arg-type]
    assert torch.equal(ids, sample(logits_MV, implementation="reference", **options))  # type: ignore[arg-type]
    assert ids[5:].tolist() == [-1, -1, -1] and (ids[:5] >= 0).all()
    assert ids[2] == vocabulary - 1 and ids[3] < vocabulary // 2


@settings(max_examples=12)
@given(rows=st.integers(0, 3), vocabulary=st.integers(1, 400), key=st.integers(-(2**63), 2**63 - 1))
def test_kernel_draws_the_twins_ids_for_any_shape(rows: int, vocabulary: int, key: int) -> None:
    logits_MV = random_logits(rows, vocabulary, seed=key % 1000)
    assert torch.equal(sample(logits_MV, key, "triton"), sample(logits_MV, key))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_split_batch_draws_what_the_whole_one_does(implementation: str) -> None:
    logits_MV = random_logits(7, 150)
    parts = [
        sample(logits_MV[start:stop], torch.tensor([42, start]), implementation)
        for start, stop in ((0, 3), (3, 7))
    ]
    assert torch.equal(torch.cat(parts), sample(logits_MV, torch.tensor([42]), implementation))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=dtype_id)
def test_batch_is_changed_at_the_masked_positions_only(implementation: str, id_dtype: torch.dtype) -> None:
    logits_MV = awkward_rows(300)
    input_ids_T = torch.arange(1000, 1020, dtype=id_dtype)
    positions_M = torch.tensor([3, 0, 19, 7, 8, 9, 10, 11])
    input_ids_T[19] = 299  # row 2 can only draw word 299: equal to the original, so not replaced
    before = input_ids_T.clone(), logits_MV.clone()
    with use(implementation):  # type: ignore[arg-type]
        out = sample_and_replace(
            logits_MV.to(DEVICE), input_ids_T.to(DEVICE), positions_M.to(DEVICE), seed=SEED.to(DEVICE)
        )
    corrupted_T, replaced_T, sampled_M = (part.cpu() for part in out)
    expected_T = input_ids_T.clone()
    expected_T[positions_M[:5]] = sampled_M[:5].to(id_dtype)  # rows 5-7 drew -1 and keep their word
    assert corrupted_T.dtype == id_dtype and torch.equal(corrupted_T, expected_T)
    assert torch.equal(replaced_T, corrupted_T != input_ids_T)
    assert replaced_T.sum() == 4 and not replaced_T[19]
    assert torch.equal(input_ids_T, before[0]) and torch.equal(logits_MV.nan_to_num(), before[1].nan_to_num())


def test_kernel_reads_padded_and_transposed_logits() -> None:
    logits_MV = random_logits(4, 200)
    padded = torch.full((4, 256), math.nan)
    padded[:, :200] = logits_MV
    wanted = sample(logits_MV)
    assert torch.equal(sample(padded[:, :200], implementation="triton"), wanted)
    assert torch.equal(sample(logits_MV.T.contiguous().T, implementation="triton"), wanted)


@LARGE
def test_offsets_beyond_two_to_the_31() -> None:
    """The second row starts 2^31 elements after the first: a 32-bit offset would read elsewhere."""
    skip_without_memory(5)
    logits_MV = random_logits(2, 200).half()
    storage = torch.empty(2**31 + 200, dtype=torch.float16, device=DEVICE)  # only touched pages cost memory
    far_MV = storage.as_strided((2, 200), (2**31, 1))
    far_MV.copy_(logits_MV)
    assert torch.equal(sample(far_MV, implementation="triton"), sample(logits_MV))


# ---------------------------------------------------------------- integration


def arguments(rows: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_MV = random_logits(rows, 140).to(DEVICE)
    return logits_MV, torch.arange(9, device=DEVICE), torch.tensor([8, 1, 4], device=DEVICE), SEED.to(DEVICE)


@pytest.mark.host_only
def test_opcheck() -> None:
    from electra_kernels import sample_replace_triton

    torch.library.opcheck(sample_replace_triton.sample_and_replace.custom, (*arguments(), 2, 0.5))


@pytest.mark.host_only
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_a_graph_break(implementation: str) -> None:
    def step(logits_MV: Tensor, ids_T: Tensor, positions_M: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return tuple(sample_and_replace(logits_MV * 1.0, ids_T, positions_M, seed=seed, stream=1))

    with use(implementation):  # type: ignore[arg-type]
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments())
        assert all(torch.equal(a, b) for a, b in zip(got, step(*arguments()), strict=True))


def test_no_gradient_flows() -> None:
    logits_MV, *rest = arguments()
    out = sample_and_replace(logits_MV.requires_grad_(), *rest[:2], seed=SEED.to(DEVICE))
    assert not any(part.requires_grad for part in out)


@pytest.mark.gpu
def test_graph_replay_draws_fresh_numbers_without_synchronising() -> None:
    logits_MV, ids_T, positions_M, seed = arguments()
    sample_and_replace(logits_MV, ids_T, positions_M, seed=seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle()):
        out = sample_and_replace(logits_MV, ids_T, positions_M, seed=seed)
    draws = []
    for key in range(20):
        seed[0] = key
        graph.replay()
        draws.append(out.sampled_ids_M.cpu())
        assert torch.equal(draws[-1], sample(logits_MV.cpu(), torch.tensor([key])))
    assert len({tuple(d.tolist()) for d in draws}) > 10


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "rank": ({"logits_MV": torch.zeros(3)}, r"logits_MV: expected shape \[any, any\], got \[3\]"),
        "dtype": ({"logits_MV": torch.zeros(3, 4, dtype=torch.int64)}, "logits_MV: expected dtype float32.*int64"),
        "ids": ({"input_ids_T": torch.zeros(5)}, "input_ids_T: expected dtype int64, int32, got float32"),
        "positions": ({"masked_positions_M": torch.tensor([1, 2])}, r"masked_positions_M: expected shape \[3\]"),
        "device": ({"input_ids_T": torch.arange(5, device="meta")}, "input_ids_T: expected a tensor on cpu"),
        "outside": ({"masked_positions_M": torch.tensor([1, 2, 5])}, r"expected values in \[0, 5\), got 5"),
        "negative": ({"masked_positions_M": torch.tensor([1, -1, 3])}, r"expected values in \[0, 5\), got -1"),
        "repeated": ({"masked_positions_M": torch.tensor([1, 2, 2])}, "expected distinct values"),
        "zero": ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        "nan": ({"temperature": math.nan}, "temperature: expected a finite number > 0, got nan"),
        "infinite": ({"temperature": math.inf}, "temperature: expected a finite number > 0, got inf"),
        "seed": ({"seed": torch.zeros(3)}, "seed: expected an int or an int64 tensor"),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    good = {
        "logits_MV": torch.zeros(3, 4), "input_ids_T": torch.arange(5),
        "masked_positions_M": torch.tensor([0, 1, 2]), "seed": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sample_and_replace(**{**good, **change})  # type: ignore[arg-type]
