"""Several processes that train together, for tests: what torchrun does, without its ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

SECONDS = 300
PRELOADED = [
    "electra_core.pretrain", "electra_core.finetune", "torch.distributed.fsdp", "torch.utils.tensorboard",
    "sklearn.metrics", __name__,
]  # fmt: skip
"""What every rank would import by itself, most of its time."""


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `size` processes with torchrun's environment.

    Returns:
        What each rank returned; for one that raised, the exception's text.
    """
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(PRELOADED)
    results: Any = start.Queue()
    # Kept here, as torchrun does: a port that was free a moment ago may be another test's when rank 0 asks for it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = [
        start.Process(target=_rank, args=(r, size, store.port, results, function, arguments)) for r in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=SECONDS) for _ in range(size))
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [found[rank] for rank in range(size)]


def _rank(rank: int, size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        results.put((rank, function(*arguments)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
        traceback.print_exc()


def pretrain_rank(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any], options: dict) -> Any:
    """A pre-training run as one of its ranks sees it: (steps, tokens, evaluation, why it stopped)."""
    from electra_core.pretrain import pretrain

    result = pretrain(data, out, model="tiny", changes=changes, encoder_changes=sizes, quiet=True, device="cpu",
                      **options)  # fmt: skip
    return result.steps, result.tokens, result.evaluation, result.stopped_by


def pretrain_own(
    data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any], options: dict[str, Any] | None = None
) -> Any:
    """`pretrain_rank` where each rank has registered the objectives "contrastive" and "running"."""
    import contrastive  # noqa: F401

    return pretrain_rank(data, out, changes, sizes, options or {})


def pretrain_own_stopped(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """`pretrain_own`, of which the first evaluation is enough."""
    return pretrain_own(data, out, changes, sizes, {"on_evaluation": lambda _: True})


def pretrain_until_told(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """`pretrain_rank` of which the first evaluation is enough: (steps, why it stopped, evaluations seen)."""
    seen: list[float] = []

    def enough(figures: dict[str, float]) -> bool:
        seen.append(figures["step"])
        return True

    steps, _, _, why = pretrain_rank(data, out, changes, sizes, {"on_evaluation": enough})
    return steps, why, seen


def pretrain_captured(
    data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any], options: dict[str, Any]
) -> Any:
    """`pretrain_rank` over pretended CUDA graphs; what these hold besides: replays, and operators that other ranks
    would have to know of."""
    import pretend_graphs
    import pytest

    from electra_core.pretraining import setup as pretrain_setup

    with pytest.MonkeyPatch.context() as patch:
        pretend_graphs.on_a_cpu(patch)
        patch.setattr(pretrain_setup, "choose_engine", lambda *_: "graph")
        report = pretrain_rank(data, out, changes, sizes, options)
        graphs = pretend_graphs.Graph.made
    collective = {str(call[0]) for graph in graphs for call in graph.calls if "c10d" in str(call[0])}
    return report, [graph.replays for graph in graphs], collective


def finetune_rank(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any, options: dict) -> Any:
    """A fine-tuning as one of its ranks sees it: (report, what was said, figures of the evaluations)."""
    from electra_core.finetune import finetune

    lines: list[str] = []
    evaluations: list[dict[str, float]] = []
    report = finetune(model, task, *data, out, settings, quiet=True, device="cpu", say=lines.append,
                      on_evaluation=evaluations.append, **options)  # fmt: skip
    return report, lines, evaluations


def finetune_several(
    model: Path, data: tuple[Path, Path], outs: list[Path], task: Any, settings: Any
) -> list[int | str]:
    """Fine-tunings one after the other: the steps of each, or its error's name."""
    from electra_core.errors import UserError

    found: list[int | str] = []
    for out in outs:
        try:
            report, _, _ = finetune_rank(model, data, out, task, settings, {})
            found.append(report["seeds"][0]["steps"])
        except UserError as error:
            found.append(type(error).__name__)
    return found


def finetune_captured(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any) -> Any:
    """`finetune_rank` over pretended CUDA graphs; and how often each was replayed."""
    import pretend_graphs
    import pytest

    from electra_core.finetuning import steps as finetune_steps

    with pytest.MonkeyPatch.context() as patch:
        pretend_graphs.on_a_cpu(patch)
        patch.setattr(finetune_steps, "choose_engine", lambda *_: "graph")
        report, _, _ = finetune_rank(model, data, out, task, settings, {})
        return report, [graph.replays for graph in pretend_graphs.Graph.made]


def finetune_stopped_on_rank_1(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any) -> Any:
    """`finetune_rank` of which rank 1 alone gets a signal, after step 7."""
    import signal

    from electra_core.finetuning import seed as module

    original = module._step_figures

    def figures(result: Any, run: Any) -> Any:
        if result.step == 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(result, run)

    module._step_figures = figures  # type: ignore[assignment]
    return finetune_rank(model, data, out, task, settings, {})


def finetune_on_other_data(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any) -> Any:
    """`finetune_rank` with the dev data to train on, on rank 1."""
    train, dev = data
    mine = (dev, dev) if os.environ["RANK"] == "1" else (train, dev)
    return finetune_rank(model, mine, out, task, settings, {})


def eager_on_rank_1(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """`pretrain_rank` with steps in fixed shapes, which rank 1 cannot take."""
    from electra_core.pretraining import setup as pretrain_setup

    pretrain_setup.choose_engine = lambda *_: "eager" if os.environ["RANK"] == "1" else "static"  # type: ignore[assignment]
    return pretrain_rank(data, out, changes, sizes, {})


def local_share(data: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> float:
    """Of the numbers in a sharded model, the part that this rank stores."""
    import torch

    from electra_core.corpus import Corpus
    from electra_core.encoder import Layer
    from electra_core.execution.distributed import join_ranks
    from electra_core.execution.sharding import local, shard
    from electra_core.objectives import build_objective
    from electra_core.pretraining.setup import resolve_config

    device = torch.device("cpu")
    ranks = join_ranks(device)
    model = build_objective(*resolve_config("tiny", changes, sizes, Corpus.open(data)))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    shard(model, [module for module in model.modules() if isinstance(module, Layer)], device)
    stored = sum(local(parameter).numel() for parameter in model.parameters())
    ranks.leave()
    return stored / numbers


def evaluation_of(data: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> dict[str, float]:
    """Of a model that has learned nothing, split over the ranks."""
    from contextlib import nullcontext

    import torch

    from electra_core.corpus import Corpus
    from electra_core.execution.distributed import join_ranks
    from electra_core.objectives import build_objective
    from electra_core.pretraining.evaluation import evaluate
    from electra_core.pretraining.setup import resolve_config

    device = torch.device("cpu")
    ranks = join_ranks(device)
    encoder, config = resolve_config("tiny", changes, sizes, Corpus.open(data))
    model = build_objective(encoder, config)
    figures = evaluate(model, Corpus.open(data, "heldout"), config, device, nullcontext(), ranks)
    ranks.leave()
    return figures


def complaint(arguments: list[str], on_rank_1: list[str]) -> tuple[int, str]:
    """(exit status, standard error) of a command, to which rank 1 was given more than the others."""
    import contextlib
    import io

    from electra_core.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main([*arguments, *(on_rank_1 if os.environ["RANK"] == "1" else [])])
        except SystemExit as left:
            status = int(left.code or 0)
    return status, said.getvalue()


def stop_one(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """(steps, reason) of a run in which only rank 1 has a time limit."""
    limit = {"max_minutes": 0.0} if os.environ["RANK"] == "1" else {}
    steps, _, _, reason = pretrain_rank(data, out, changes, sizes, limit)
    return steps, reason


def with_nan_on_rank_1(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> float:
    """A run whose loss is NaN on rank 1 in the third step; returns the sum of all weights."""
    import dataclasses
    import math

    from electra_core.electra import Electra
    from electra_core.pretraining import setup as pretrain_setup

    whole, built, models = Electra.forward, pretrain_setup.build_optimizer, []
    calls = iter(range(1000))

    def spoiled(self: Any, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        if self.training and next(calls) == 2 and os.environ["RANK"] == "1":
            return dataclasses.replace(output, loss=output.loss * math.nan)
        return output

    def seen(model: Any, config: Any) -> Any:
        models.append(model)
        return built(model, config)

    Electra.forward, pretrain_setup.build_optimizer = spoiled, seen  # type: ignore[method-assign]
    pretrain_rank(data, out, changes, sizes, {})
    return sum(float(parameter.detach().double().sum()) for parameter in models[0].parameters())


KEPT: list[object] = []
"""See `distributed._left`."""


def drift_under_ddp(static_graph: bool) -> float:
    """How far two ranks' weights are apart after a step each on a batch of its own, in a loop of a user's own."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from electra_core.config import EncoderConfig, PretrainConfig
    from electra_core.electra import Electra
    from electra_core.execution import distributed
    from electra_core.masking import mask_tokens
    from electra_core.packing import pack

    dist.init_process_group("gloo")
    config = EncoderConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    sizes = {"generator_hidden_size": 8, "generator_attention_heads": 1, "generator_intermediate_size": 16}
    model = Electra(config, PretrainConfig(generator_layers=1, **sizes)).train()
    parallel = DistributedDataParallel(model, static_graph=static_graph)
    optimizer, rank = torch.optim.SGD(model.parameters(), 0.1), dist.get_rank()
    tokens = pack([[2, *range(5 + 10 * rank, 15 + 10 * rank), 3]])
    masks = {"mask_id": 4, "special_ids": [2, 3, 4], "fraction": 0.15, "max_predictions": 3}
    for step in range(2):
        parallel(mask_tokens(tokens, [rank], seed=0, **masks), step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybodys = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, weights)
    KEPT.append(parallel)
    distributed._abandon()
    return float((everybodys[0] - everybodys[1]).abs().max())


LACKING = {
    "model": ("electra_core.pretraining.setup", "build_objective"),
    "check": ("electra_core.pretraining.setup", "check_pretraining"),
    "capture": ("electra_core.execution.step_runners.GraphRunner", "rehearse"),
    "evaluation": ("electra_core.pretraining.evaluation", "_outcome"),
    "checkpoint": ("electra_core.checkpoint.Checkpoint", "restore"),
    "model of a task": ("electra_core.finetuning.seed", "starting_model"),
    "check of a task": ("electra_core.finetuning.seed", "check_task_model"),
    "evaluation of a task": ("electra_core.finetuning.seed", "run_model"),
}
"""Where a rank may lack memory -> what then raises."""


def lacks_memory_once(patch: Any, where: str) -> None:
    """The first call of `LACKING[where]` finds no memory on rank 1."""
    import torch

    owner, name = LACKING[where]
    patched = pkgutil.resolve_name(owner)
    usual, calls = getattr(patched, name), iter(range(1_000_000))

    def lacking(*arguments: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "1" and next(calls) == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return usual(*arguments, **named)

    patch.setattr(patched, name, lacking)


def tried_again(train: Callable[[], Any], where: str) -> tuple[str, Any]:
    """A script that goes on after an error: how `train` ended where memory is lacking, and the second time."""
    import pretend_graphs
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        pretend_graphs.on_a_cpu(patch)
        for module in ("pretraining.setup", "finetuning.steps"):
            patch.setattr(f"electra_core.{module}.choose_engine", lambda *_: "graph")
        lacks_memory_once(patch, where)
        try:
            train()
            ended = "at its end"
        except Exception as error:
            ended = type(error).__name__
        return ended, train()


def pretrain_again(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any], where: str) -> Any:
    """`tried_again` of `pretrain_rank`: how the first ended, and the second's number of steps."""
    options = {"resume": True}
    ended, again = tried_again(lambda: pretrain_rank(data, out, changes, sizes, options), where)
    return ended, again[0]


def finetune_again(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any, where: str) -> Any:
    """`pretrain_again` of a fine-tuning."""
    train = lambda: finetune_rank(model, data, out, task, settings, {"resume": True})  # noqa: E731
    ended, (report, _, _) = tried_again(train, where)
    return ended, report["seeds"][0]["steps"]


def pruned(train: Callable[[Callable[[dict[str, float]], None]], int]) -> tuple[str, int]:
    """A script that goes on after its function, which only rank 0 calls, has raised at the first evaluation: how
    `train` ended, and its steps the second time."""
    calls = iter(range(1_000_000))

    def prune(figures: dict[str, float]) -> None:
        if next(calls) == 0:
            raise KeyError(figures["step"])

    try:
        return "at its end", train(prune)
    except Exception as error:
        return repr(error), train(prune)


def pretrain_pruned(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any]) -> tuple[str, int]:
    options = {"resume": True}
    return pruned(lambda prune: pretrain_rank(data, out, changes, sizes, options | {"on_evaluation": prune})[0])


def finetune_pruned(model: Path, data: tuple[Path, Path], out: Path, task: Any, settings: Any) -> tuple[str, int]:
    from electra_core.finetune import finetune

    options: Any = {"quiet": True, "device": "cpu", "resume": True}

    def train(prune: Callable[[dict[str, float]], None]) -> int:
        report = finetune(model, task, *data, out, settings, on_evaluation=prune, **options)
        return int(report["seeds"][0]["steps"])

    return pruned(train)
