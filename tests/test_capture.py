"""A capture of a CUDA graph that fails leaves the process as it was, with graphs that work on a CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pretend_graphs
import pytest
import torch
from pretend_graphs import Graph, Stream, left_behind

from benchmarks import harness, pytest_rows
from electra_core.execution.capture import after_failed_capture, capturing
from electra_core.execution.step_runners import GraphRunner, streams_of


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_graphs.on_a_cpu(monkeypatch)


def fail_to_capture(pool: object) -> None:
    """As torch does, which cleans nothing."""
    with pytest.raises(RuntimeError, match="previous error during capture"), torch.cuda.graph(Graph(), pool=pool):  # type: ignore[arg-type]
        torch.ones(2).sum().item()


def test_what_a_failed_capture_leaves_behind_is_put_right() -> None:
    before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    fail_to_capture(pool)
    assert left_behind() == ["stream", "allocator", "memory", "generator"]
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        torch.rand(1)
    after_failed_capture(pool, before)
    assert left_behind() == [] and torch.cuda.current_stream() is before
    torch.rand(1)


def test_a_capture_that_fails_raises_what_it_did_and_nothing_is_left() -> None:
    stream, inner = Stream(), Stream()
    with torch.cuda.stream(stream):  # as `GraphRunner`
        with pytest.raises(RuntimeError) as raised:
            with capturing(Graph(), torch.cuda.graph_pool_handle(), inner):  # type: ignore[arg-type]
                torch.ones(2).sum().item()
        assert torch.cuda.current_stream() is stream
    assert "not permitted when stream is capturing" in str(raised.value.__context__)
    assert left_behind() == []


def test_a_capture_that_succeeds_needs_no_other() -> None:
    graph = Graph()
    with capturing(graph, torch.cuda.graph_pool_handle()):  # type: ignore[arg-type]
        x = torch.ones(2) + 1
    x.zero_()
    graph.replay()
    assert x.tolist() == [2, 2] and left_behind() == [] and Graph.made == [graph]


def test_where_nothing_can_be_captured_stream_and_allocator_are_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("operation not supported")

    monkeypatch.setattr(torch, "zeros", refuse)  # in the capture that resets the generator
    with pytest.raises(RuntimeError, match="previous error") as raised:
        with capturing(Graph(), torch.cuda.graph_pool_handle()):  # type: ignore[arg-type]
            torch.ones(2).sum().item()
    assert "not permitted when stream is capturing" in str(raised.value.__context__)
    assert left_behind() == ["generator"]


def test_where_torch_ends_the_pool_itself_its_memory_is_not_released_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_releasePool", None)  # never called
    after_failed_capture(torch.cuda.graph_pool_handle(), torch.cuda.current_stream())
    assert left_behind() == []


@pytest.mark.parametrize("left", ["nothing", "stream", "generator", "device"])
def test_a_process_that_is_spoiled_counts_as_lost(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not pytest_rows.gpu_is_lost(), "it has not used CUDA"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost if left == "device" else lambda: None)
    monkeypatch.setattr(pretend_graphs.Left, "generator_refuses", left == "generator")
    if left == "stream":
        torch.cuda.set_stream(torch.cuda.Stream())
    assert pytest_rows.gpu_is_lost() == (left != "nothing")
    if left == "stream":
        with pytest.raises(RuntimeError, match="a failed capture has left its stream as the current one"):
            harness.require_cuda()


def test_runs_after_one_another_share_their_streams() -> None:
    """torch never gives back the workspaces that cuBLAS has for a stream: every seed would leave some behind."""
    one, two = (GraphRunner(lambda inputs: {}, torch.device("cpu")) for _ in range(2))
    assert one.compute is two.compute and one.copies is two.copies and one.copies is not one.compute
    own = {streams_of(torch.device("cuda", number))[0] for number in (0, 1)}
    assert len({one.compute, *own}) == 3, "each GPU has its own"
    with ThreadPoolExecutor(1) as pool:  # what it launches during a capture here is none of the graph's
        elsewhere = pool.submit(GraphRunner, lambda inputs: {}, torch.device("cpu")).result()
    assert elsewhere.compute is not one.compute


def test_memory_that_is_full_does_not_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "rand", full)
    assert not pytest_rows.gpu_is_lost()
