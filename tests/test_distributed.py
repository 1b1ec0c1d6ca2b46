"""Several processes train as one does: equal batches, equal losses, one checkpoint for all, and one fate.

The processes talk over gloo, as they do on machines without GPUs; NCCL has not been run here.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import poisoned_memory
from ranks import (
    complaint,
    drift_under_ddp,
    eager_on_rank_1,
    evaluation_of,
    local_share,
    pretrain_again,
    pretrain_captured,
    pretrain_pruned,
    pretrain_rank,
    pretrain_until_told,
    run_ranks,
    stop_one,
    with_nan_on_rank_1,
)
from small_runs import ORIGINAL, RUN, SIZES, data, rows, state, stop_at, train  # noqa: F401

from electra_core.corpus import Corpus
from electra_core.errors import AnotherRankFailed
from electra_core.examples import Examples
from electra_core.execution.distributed import ALIGNMENT, FlatGradients, Ranks
from electra_core.masking import mask
from electra_core.pretraining.batches import Batches
from electra_core.pretraining.setup import resolve_config

CHANGES = RUN | ORIGINAL | {"checkpoint_every": 2, "keep_checkpoints": 9, "engine": "eager"}
STATIC = {"engine": "static"}
FSDP = {"sharding": "fsdp"}


def on_ranks(size: int, data: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> Path:
    """A run by `size` processes, each of which reports the same."""
    reports = run_ranks(size, pretrain_rank, data, out, CHANGES | (changes or {}), SIZES, options)
    assert all(report == reports[0] for report in reports), reports
    assert reports[0][0] == RUN["steps"], reports[0]
    return out


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(data, out, CHANGES)
    return out


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by two."""
    return on_ranks(2, data, tmp_path_factory.mktemp("two") / "run")


@pytest.fixture(scope="module")
def four(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by four."""
    return on_ranks(4, data, tmp_path_factory.mktemp("four") / "run")


def assert_like(ours: Path, theirs: Path) -> None:
    """Losses, evaluations, weights and optimizer state within the rounding of a sum in another order."""
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        for name in other.keys() - {"data_wait", "memory_mb", "warnings"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (name, row["step"])
    one, two = state(ours), state(theirs)
    assert one.keys() == two.keys()
    for name in one:
        # A gradient near 0 may round to either side of it; Adam then takes a step of its full length there.
        assert (one[name] - two[name]).abs().mean() < 1e-5, name
    for part in ("discriminator", "generator"):
        sizes = [(run / part / "model.safetensors").stat().st_size for run in (ours, theirs)]
        assert sizes[0] == sizes[1]


# The same run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_all_shares_together_are_the_batch(data: Path, size: int, accumulate: int) -> None:
    """Word ids, masks and weights; and where each share's random numbers begin."""
    corpus, device = Corpus.open(data), torch.device("cpu")
    _, config = resolve_config("tiny", CHANGES | {"accumulate": accumulate}, SIZES, corpus)
    _, undivided = resolve_config("tiny", CHANGES, SIZES, corpus)
    for step in (0, 3):
        (whole,) = Batches(corpus, undivided, device)(step)
        shares = [part for rank in range(size) for part in Batches(corpus, config, device, rank, size)(step)]
        assert len(shares) == size * accumulate
        assert torch.equal(torch.cat([s.tokens.input_ids_T for s in shares]), whole.tokens.input_ids_T)
        assert torch.equal(torch.cat([s.masked_ids_T for s in shares]), whole.masked_ids_T)
        positions = torch.cat([s.masked_positions_M + int(s.first_token) for s in shares])
        assert torch.equal(positions, whole.masked_positions_M)
        assert sum(float(s.token_share) for s in shares) == pytest.approx(1)
        assert sum(float(s.masked_share) for s in shares) == pytest.approx(1)
        assert sum(float(s.sequence_share) for s in shares) == pytest.approx(1)


def test_a_batch_has_the_examples_and_masks_of_its_numbers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was planned before: no two steps share masks, and a step that is looked at again is the same."""
    corpus = Corpus.open(data)
    _, config = resolve_config("tiny", CHANGES, SIZES, corpus)
    size, seed = config.batch_size, config.seed
    monkeypatch.setattr("electra_core.pretraining.batches.PLANNED_AHEAD", 2 * size)
    batches, examples = Batches(corpus, config, torch.device("cpu")), Examples(corpus, config.max_length, seed)
    for step in (0, 5, 1, 4, 0):
        numbers = range(step * size, (step + 1) * size)
        expected = mask(examples.batch(examples.plan(numbers)), numbers, corpus.tokenizer, config, seed)
        (batch,) = batches(step)
        assert torch.equal(batch.tokens.input_ids_T, expected.tokens.input_ids_T)
        assert torch.equal(batch.masked_positions_M, expected.masked_positions_M)
        assert torch.equal(batch.masked_ids_T, expected.masked_ids_T)


def test_gradients_in_one_message_begin_where_wide_loads_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's fused kernels read other addresses number by number."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((30522,), (7, 5), (), (0, 3), (16,))]
    untrained = torch.nn.Parameter(torch.ones(3))
    flat, sent = FlatGradients([parameters[0], untrained, *parameters[1:]]), []

    def add_twice(values: torch.Tensor) -> None:
        sent.append(values.data_ptr())
        values.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", add_twice)
    with poisoned_memory():
        for _ in range(2):
            expected = [torch.randn_like(p) for p in parameters]
            for parameter, gradient in zip(parameters, expected, strict=True):
                parameter.grad = gradient.clone()
            flat.collect()
            assert all(p.grad is None for p in parameters)
            flat.add_up()
            for parameter, gradient in zip(parameters, expected, strict=True):
                assert parameter.grad is not None and torch.equal(parameter.grad, 2 * gradient)
                assert (parameter.grad.data_ptr() - sent[0]) % ALIGNMENT == 0 or not parameter.numel()
    assert sent[0] == sent[1] and untrained.grad is None
    assert flat._flat is not None and flat._flat.isfinite().all(), "what lies between gradients is summed, too"


def test_two_and_four_processes_train_as_one_does(data: Path, alone: Path, four: Path, tmp_path: Path) -> None:
    assert_like(on_ranks(2, data, tmp_path / "two", {"accumulate": 2}), alone)
    assert_like(four, alone)


def test_a_generator_without_gradients(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "one", CHANGES | {"uniform_generator": True})
    assert_like(on_ranks(2, data, tmp_path / "two", {"uniform_generator": True}), tmp_path / "one")


def test_four_that_resume_are_four_uninterrupted_bit_for_bit(data: Path, four: Path, tmp_path: Path) -> None:
    """More than two summands: their order has to be that of the uninterrupted run, too."""
    run = on_ranks(4, data, stop_at(tmp_path / "run", four, 4), resume=True)
    ours, theirs = state(run), state(four)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_two_one(data: Path, alone: Path, tmp_path: Path) -> None:
    run = on_ranks(2, data, stop_at(tmp_path / "two", alone, 2), resume=True)
    run = stop_at(tmp_path / "one", run, 4)
    train(data, run, CHANGES, resume=True)
    assert_like(run, alone)


# In fixed shapes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_static(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by four processes, each in shapes of its own."""
    return on_ranks(4, data, tmp_path_factory.mktemp("static") / "run", STATIC)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"uniform_generator": True}])
def test_fixed_shapes_on_two(data: Path, alone: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where some parameters have no gradient."""
    if "uniform_generator" in changes:
        train(data, tmp_path / "one", CHANGES | changes)
        alone = tmp_path / "one"
    assert_like(on_ranks(2, data, tmp_path / "two", STATIC | changes), alone)


def test_fixed_shapes_on_four_and_resumed_bit_for_bit(
    data: Path, alone: Path, four_static: Path, tmp_path: Path
) -> None:
    assert_like(four_static, alone)
    run = on_ranks(4, data, stop_at(tmp_path / "run", four_static, 4), STATIC, resume=True)
    ours, theirs = state(run), state(four_static)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_captured_on_four_are_the_same_bits(data: Path, four_static: Path, tmp_path: Path) -> None:
    """Over pretended graphs. What they hold is a process's own, for another may be capturing meanwhile."""
    reports = run_ranks(4, pretrain_captured, data, tmp_path / "run", CHANGES, SIZES, {})
    for report, replays, collective in reports:
        assert report == reports[0][0] and not collective
        assert max(replays) >= 2
    assert len({len(replays) for _, replays, _ in reports}) > 1, "not all captured at the same time"
    ours, theirs = state(tmp_path / "run"), state(four_static)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_that_takes_eager_steps_makes_all_take_them(data: Path, two: Path, tmp_path: Path) -> None:
    """Gradients are added up at another time in those; without an agreement both would wait for ever."""
    reports = run_ranks(2, eager_on_rank_1, data, tmp_path / "run", CHANGES, SIZES)
    assert reports[0][0] == RUN["steps"] and reports[0] == reports[1]
    ours, theirs = state(tmp_path / "run"), state(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Sharded ------------------------------------------------------------------------------------------------------


def test_each_process_stores_a_part_of_a_sharded_model(data: Path) -> None:
    shares = run_ranks(2, local_share, data, CHANGES | FSDP, SIZES)
    assert all(0.4 < share < 0.6 for share in shares) and sum(shares) == pytest.approx(1), shares


@pytest.mark.parametrize("changes", [{}, {"tying": "disentangled", "optimizer": "adamw", "accumulate": 2}])
def test_sharded_trains_as_unsharded(data: Path, alone: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes:
        train(data, tmp_path / "one", CHANGES | changes)
    sharded = on_ranks(2, data, tmp_path / "sharded", FSDP | changes)
    assert_like(sharded, tmp_path / "one" if changes else alone)


def test_checkpoints_are_the_same_sharded_or_not(data: Path, alone: Path, tmp_path: Path) -> None:
    """One process, then two with half of the model each, then one."""
    run = on_ranks(2, data, stop_at(tmp_path / "sharded", alone, 2), FSDP, resume=True)
    run = stop_at(tmp_path / "whole", run, 4)
    train(data, run, CHANGES, resume=True)
    assert_like(run, alone)


# One fate -----------------------------------------------------------------------------------------------------


def test_evaluation_is_the_same_however_it_is_split(data: Path) -> None:
    """Three batches over two processes, bit for bit."""
    arguments = (data, CHANGES | {"eval_examples": 150}, SIZES)
    (alone,), two = run_ranks(1, evaluation_of, *arguments), run_ranks(2, evaluation_of, *arguments)
    assert "eval_rtd_auc" in alone and two == [alone, alone]


def test_one_stops_all_stop_at_the_same_step(data: Path, tmp_path: Path) -> None:
    reports = run_ranks(2, stop_one, data, tmp_path / "run", CHANGES | {"eval_every": 100}, SIZES)
    assert reports == [(2, "time limit")] * 2, "one step later than it was known"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_first_one_sees_evaluations_and_may_stop_all(data: Path, tmp_path: Path) -> None:
    reports = run_ranks(2, pretrain_until_told, data, tmp_path / "run", CHANGES | {"eval_every": 4}, SIZES)
    assert reports == [(4, "on_evaluation", [4]), (4, "on_evaluation", [])]


def test_an_exception_of_the_caller_s_function_ends_all(data: Path, tmp_path: Path) -> None:
    """In a script that goes on with the next trial, the other process waited for the first."""
    reports = run_ranks(2, pretrain_pruned, data, tmp_path / "run", CHANGES | {"eval_every": 4}, SIZES)
    assert reports == [("KeyError(4)", 8), ("AnotherRankFailed('rank 0 has an error')", 8)]


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_a_step_that_is_not_finite_on_one_is_skipped_by_all(data: Path, tmp_path: Path, engine: str) -> None:
    sums = run_ranks(2, with_nan_on_rank_1, data, tmp_path / "run", CHANGES | {"engine": engine}, SIZES)
    assert sums[0] == sums[1], "the same weights"
    assert [row["skipped_steps"] for row in rows(tmp_path / "run") if "loss" in row] == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("where", ["model", "check", "capture", "evaluation", "checkpoint"])
def test_memory_that_one_lacks_ends_all_and_a_script_may_go_on(data: Path, tmp_path: Path, where: str) -> None:
    """In a script that catches the error the process lives on, so the other one might wait for it."""
    changes = CHANGES | {"engine": "graph", "eval_every": 4}
    if where == "checkpoint":
        run_ranks(2, pretrain_rank, data, tmp_path / "run", changes, SIZES, {"max_minutes": 0.0})
    reports = run_ranks(2, pretrain_again, data, tmp_path / "run", changes, SIZES, where)
    assert reports == [("AnotherRankFailed", 8), ("OutOfMemoryError", 8)]


def test_an_error_that_another_reports_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every GPU lacks it: a script that then tries a smaller batch needs all that the first one held."""
    held: list[weakref.ref[torch.Tensor]] = []

    def lacking() -> None:
        activations = torch.ones(1)
        held.append(weakref.ref(activations))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda lowest, _: lowest.zero_())
    gc.disable()
    try:
        for rank, error in enumerate([torch.cuda.OutOfMemoryError, AnotherRankFailed]):
            with pytest.raises(error):
                Ranks(rank, 2).together(lacking)
        assert [tensor() for tensor in held] == [None, None]
    finally:
        gc.enable()


def test_a_batch_that_cannot_be_split_is_told_before_anything_starts(data: Path, tmp_path: Path) -> None:
    reports = run_ranks(3, pretrain_rank, data, tmp_path / "run", CHANGES, SIZES, {})
    assert reports[0].startswith("UserError: batch_size: 8 sequences cannot be split evenly over 3")
    assert reports[1:] == ["AnotherRankFailed: rank 0 has an error"] * 2
    assert not (tmp_path / "run").exists()


IDLE = ["--objective", "mlm", "--temperature", "2"]


@pytest.mark.parametrize(
    ("more", "on_rank_1", "said"),
    [
        (IDLE, [], ["--temperature: no effect with --objective mlm"]),
        (["--setps", "9"], [], ["unrecognized arguments: --setps 9"]),
        (["--batch-size", "many"], [], ["argument --batch-size: invalid int value: 'many'"]),
        (IDLE, ["--setps", "9"], ["--temperature: no effect", "unrecognized arguments: --setps 9"]),
        ([], ["--max-minutes", "-1"], ["--max-minutes: expected a number of at least 0"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_told_once_whoever_finds_it(
    data: Path, tmp_path: Path, more: list[str], on_rank_1: list[str], said: list[str]
) -> None:
    """Also before the processes know of one another."""
    command = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", *more]
    reports = run_ranks(2, complaint, command, on_rank_1)
    assert [status for status, _ in reports] == [2, 2]
    lines = "".join(text for _, text in reports)
    assert [lines.count(line) for line in said] == [1] * len(said)


def test_a_warning_that_all_have_is_logged_once(data: Path, alone: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    command += ["--config", str(alone / "config.toml"), "--engine", "graph"]
    reports = run_ranks(2, complaint, command, [])
    assert [status for status, _ in reports] == [0, 0]
    assert "".join(text for _, text in reports).count("--engine graph: CUDA graphs need a GPU") == 1


# Restarts -----------------------------------------------------------------------------------------------------

BREAKS_ONCE = """
import os, signal, sys
from pathlib import Path
from electra_core.pretraining import batches
from electra_core.cli import main
whole, flag, how = batches.Batches.__call__, Path(sys.argv[1]), sys.argv[2]
def broken(self, step):
    if step == 5 and self.rank == 1 and not flag.exists():
        flag.touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(75)
        raise RuntimeError("broken on purpose")
    return whole(self, step)
batches.Batches.__call__ = broken
sys.exit(main(sys.argv[3:]))
"""


def torchrun(restarts: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(script), *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=240)  # fmt: skip


def breaking(folder: Path, how: str, data: Path, alone: Path) -> list[str]:
    """A script in which rank 1 ends in the sixth step, once, and its arguments; RUN is `folder`/run.

    --resume on an empty RUN starts it, so one command serves for the start and for every restart.
    """
    (folder / "breaks.py").write_text(BREAKS_ONCE, encoding="utf-8")
    arguments = [str(folder / "flag"), how, "pretrain", "--data", str(data), "--out", str(folder / "run")]
    return [*arguments, "--config", str(alone / "config.toml"), "--resume", "--quiet", "--device", "cpu"]


def test_a_failing_process_ends_the_others(data: Path, alone: Path, tmp_path: Path) -> None:
    arguments, began = breaking(tmp_path, "raises", data, alone), time.monotonic()
    ended = torchrun(0, tmp_path / "breaks.py", *arguments)
    assert ended.returncode == 1 and time.monotonic() - began < 230, "not after the timeout of half an hour"
    assert "RuntimeError: broken on purpose" in ended.stderr
    assert "[rank1]: Traceback" in ended.stderr and "[rank0]: Traceback" not in ended.stderr
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000004"


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_torchrun_starts_all_again_and_they_go_on(
    data: Path, alone: Path, two: Path, tmp_path: Path, how: str
) -> None:
    """--max-restarts: one is killed, or ends with 75; the run ends as that of two undisturbed, bit for bit."""
    ended = torchrun(1, tmp_path / "breaks.py", *breaking(tmp_path, how, data, alone))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "flag").exists()
    ours, theirs = state(tmp_path / "run"), state(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(two)]
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".lock"], "nothing half-written is left"


@pytest.mark.parametrize("static_graph", [False, True], ids=["", "static graph"])
def test_ranks_stay_together_in_a_loop_of_ones_own(static_graph: bool) -> None:
    """With a static graph DDP waits for the gradients of what it finds in the model's output."""
    assert run_ranks(2, drift_under_ddp, static_graph) == [0.0, 0.0]
