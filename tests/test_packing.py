"""Packed batches: what goes in comes out, by every way in and out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_core.packing import TokenBatch, from_lengths, from_padded, pack, to_padded

words = st.integers(min_value=0, max_value=60_000)
sequences = st.lists(st.lists(words, min_size=1, max_size=9), min_size=1, max_size=7)


def assert_same(ours: TokenBatch, theirs: TokenBatch) -> None:
    for name in ("input_ids_T", "segment_ids_T", "position_ids_T", "cu_seqlens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.max_seqlen == theirs.max_seqlen


def test_the_header_s_picture() -> None:
    batch = pack([[2, 17, 23, 3], [2, 41, 3]], [[0, 0, 1, 1], [0, 0, 0]])
    assert batch.input_ids_T.tolist() == [2, 17, 23, 3, 2, 41, 3]
    assert batch.segment_ids_T.tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert (batch.num_sequences, batch.num_tokens, batch.max_seqlen) == (2, 7, 4)
    assert batch.lengths.tolist() == [4, 3]
    dtypes = (batch.input_ids_T.dtype, batch.segment_ids_T.dtype, batch.position_ids_T.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32, "what the kernels read"


@settings(max_examples=60)
@given(sequences, st.randoms(use_true_random=False))
def test_pack_and_split_are_inverses(ids: list[list[int]], draw) -> None:  # type: ignore[no-untyped-def]
    segments = [[draw.randint(0, 1) for _ in sequence] for sequence in ids]
    batch = pack(ids, segments)
    assert [part.tolist() for part in batch.split()] == ids
    assert [part.tolist() for part in batch.segment_ids_T.split(batch.lengths.tolist())] == segments
    assert [p for sequence in ids for p in range(len(sequence))] == batch.position_ids_T.tolist()
    assert batch.max_seqlen == max(map(len, ids))
    flat = torch.tensor([i for sequence in ids for i in sequence])
    assert_same(from_lengths(flat, batch.segment_ids_T, [len(sequence) for sequence in ids]), batch)


@settings(max_examples=60)
@given(sequences)
def test_padded_and_packed_are_inverses(ids: list[list[int]]) -> None:
    batch = pack(ids)
    padded_NS = to_padded(batch.input_ids_T, batch, fill=-1)
    longest = max(map(len, ids))
    assert padded_NS.tolist() == [sequence + [-1] * (longest - len(sequence)) for sequence in ids]
    assert_same(from_padded(padded_NS, padded_NS >= 0, torch.zeros_like(padded_NS)), batch)
    assert_same(from_padded(padded_NS, (padded_NS >= 0).long()), batch)


def test_to_padded_keeps_trailing_dimensions_and_gradient() -> None:
    batch = pack([[5], [6, 7, 8]])
    values_TD = torch.randn(4, 3, requires_grad=True)
    padded = to_padded(values_TD, batch)
    assert padded.shape == (2, 3, 3)
    assert torch.equal(padded[0, 0], values_TD[0]) and not padded[0, 1:].any()
    assert torch.equal(padded[1], values_TD[1:])
    padded.sum().backward()
    assert torch.equal(values_TD.grad, torch.ones(4, 3))  # type: ignore[arg-type]


def test_padding_on_the_left_is_taken_out_too() -> None:
    ids = torch.tensor([[0, 0, 2, 9, 3], [2, 8, 9, 7, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    segments = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    batch = from_padded(ids, mask, segments)
    assert [part.tolist() for part in batch.split()] == [[2, 9, 3], [2, 8, 9, 7, 3]]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.segment_ids_T.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_other_words_in_the_same_sequences() -> None:
    batch = pack([[1, 2], [3]])
    other = batch.with_ids(torch.tensor([7, 8, 9]))
    assert other.input_ids_T.tolist() == [7, 8, 9] and batch.input_ids_T.tolist() == [1, 2, 3]
    assert other.cu_seqlens is batch.cu_seqlens
    assert_same(batch.to("cpu"), batch)


def test_no_sequences_at_all() -> None:
    batch = pack([])
    assert (batch.num_sequences, batch.num_tokens, batch.max_seqlen) == (0, 0, 0)
    assert batch.cu_seqlens.tolist() == [0]


def test_segments_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="segments"):
        pack([[1, 2, 3], [4]], [[0, 0], [0]])


def test_a_flat_list_of_ids_is_refused() -> None:
    for flat in ([2, 17, 3], torch.tensor([2, 17, 3])):
        with pytest.raises(ValueError, match="sequences: expected a list of ids for every sequence"):
            pack(flat)  # type: ignore[arg-type]


def test_sequences_may_come_one_by_one() -> None:
    assert pack(ids for ids in ([2, 5, 3], [2, 3])).input_ids_T.tolist() == [2, 5, 3, 2, 3]  # type: ignore[arg-type]
    assert pack([torch.tensor([2, 3]), torch.tensor([4])]).input_ids_T.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("sequences", "segments", "said"),
    [
        ([[1.5, 2]], None, r"sequences: expected lists of integers, got 1\.5"),
        (["ab"], None, "sequences: expected lists of integers"),
        ([(i for i in range(3))], None, "sequences: expected a list of ids for every sequence, got .* generator"),
        ([[1, 2]], [[0, 0.5]], "segments: expected lists of integers"),
        ([[1, 2]], [0, 0], "segments: expected a list of ids for every sequence, got a list of ids"),
    ],
)
def test_what_is_no_ids_is_refused(sequences: Any, segments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(sequences, segments)


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        (torch.ones(2).long(), torch.ones(2), r"input_ids_NS: expected a tensor of shape \[N, S\], got \[2\]"),
        ([[1, 2]], torch.ones(1, 2), r"input_ids_NS: expected a tensor of shape \[N, S\], got list"),
        (torch.ones(1, 2).long(), None, "attention_mask_NS: expected a tensor, got NoneType"),
    ],
)
def test_what_is_no_padded_batch_is_refused(ids: Any, mask: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_padded(ids, mask)


def test_a_mask_of_another_shape_is_refused() -> None:
    ids_NS = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask_NS: expected shape \[2, 3\], got \[2, 4\]"):
        from_padded(ids_NS, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"segment_ids_NS: expected shape \[2, 3\], got \[3, 2\]"):
        from_padded(ids_NS, torch.ones(2, 3), ids_NS.T)
    with pytest.raises(ValueError, match="a token in every row, row 1 has none"):
        from_padded(ids_NS, torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_a_batch_lies_where_its_ids_lie() -> None:
    ids_T = torch.empty(3, dtype=torch.int64, device="meta")  # which stands for a GPU
    batch = from_lengths(ids_T, ids_T, [2, 1])
    assert {t.device.type for t in (batch.input_ids_T, batch.position_ids_T, batch.cu_seqlens)} == {"meta"}
