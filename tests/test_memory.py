"""Memory: predictions are what is measured, recomputation saves and changes nothing, parts are made to fit."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_runs import ORIGINAL, SIZES, make_data, one_thread  # noqa: F401
from tiny_steps import CONFIG, ENCODER, batch_of

from electra_core.cli import build_parser, main
from electra_core.commands import inspect as commands_inspect
from electra_core.commands import train as commands_train
from electra_core.config import PRESETS
from electra_core.encoder import set_recompute
from electra_core.errors import UserError, memory_trouble
from electra_core.execution.distributed import Ranks
from electra_core.execution.fake_step import StepTrace, trace_step
from electra_core.execution.memory import fitting_parts, free_bytes, measure_on_cpu, peak_with_graphs, predict
from electra_core.objectives import build_objective
from electra_core.pretraining.setup import open_job, with_agreed_parts

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
WIDE = replace(
    ENCODER, hidden_size=64, embedding_size=32, intermediate_size=256, vocab_size=500, num_hidden_layers=3
)
WIDE_CONFIG = replace(CONFIG, generator_hidden_size=32, generator_intermediate_size=128)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_peak_is_the_measured_one(recompute: bool, precision: str) -> None:
    config = replace(WIDE_CONFIG, recompute=recompute, precision=precision)
    predicted, measured = predict(WIDE, config, 64, 32, CPU).peak, measure_on_cpu(WIDE, config, 64, 32)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_recomputation_keeps_less_and_gives_the_same_gradients() -> None:
    model = build_objective(ENCODER, CONFIG).train()
    other = copy.deepcopy(model)
    set_recompute(other, True)
    for m in (model, other):
        m(batch_of(0)[0], 3).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    kept, less = (trace_step(WIDE, replace(WIDE_CONFIG, recompute=r), 64, 32).activations for r in (False, True))
    assert less < kept / 2


def test_memory_is_what_the_sizes_say() -> None:
    preset = PRESETS["small"]
    trace = trace_step(preset.discriminator, preset.pretrain, 8, 128)
    parameters = 14_195_515  # of the pair, embeddings once
    assert trace.weights == trace.gradients == pytest.approx(4 * parameters, rel=0.01)
    assert trace.optimizer == 2 * trace.weights
    assert trace.peak > trace.weights + trace.optimizer + trace.gradients


def test_parts_are_as_few_as_fit() -> None:
    config = replace(WIDE_CONFIG, batch_size=32)
    everything = predict(WIDE, config, 32, config.max_length, GPU).peak
    assert fitting_parts(WIDE, config, GPU, 1, free=2 * everything) == 1
    parts = fitting_parts(WIDE, config, GPU, 1, free=int(0.8 * everything))
    assert parts > 1 and 32 % parts == 0
    needed = predict(WIDE, config, 32 // parts, config.max_length, GPU).peak
    assert needed <= 0.8 * everything
    with pytest.raises(UserError, match="one sequence"):
        fitting_parts(WIDE, config, GPU, 1, free=1000)


def test_memory_of_a_gpu_that_torch_has_kept_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook goes on after a lack of memory: what the allocator still holds is not the driver's to offer."""
    cached, used = [20 * GIB], 3 * GIB
    for name, function in {
        "empty_cache": cached.clear,
        "get_per_process_memory_fraction": lambda _: 1.0,
        "mem_get_info": lambda _: (40 * GIB - used - sum(cached), 40 * GIB),
        "memory_reserved": lambda _: used + sum(cached),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert free_bytes(GPU) == 37 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.25)
    assert free_bytes(GPU) == 10 * GIB - used


def test_captured_steps_need_their_memory_twice() -> None:
    trace = predict(WIDE, replace(CONFIG, batch_size=32), 32, 24, GPU)
    step = trace.peak - trace.weights - trace.optimizer
    assert peak_with_graphs(trace) == trace.weights + trace.optimizer + 2 * step
    config, free = replace(CONFIG, batch_size=32), 3 * trace.peak
    assert fitting_parts(WIDE, config, GPU, 1, free=free) == 1
    free = round(1.3 * trace.peak)
    assert fitting_parts(WIDE, config, GPU, 1, free=free) == 1 < fitting_parts(WIDE, config, GPU, 1, "graph", free)


def test_gradients_of_several_processes_in_fixed_shapes_are_there_twice() -> None:
    config = replace(CONFIG, batch_size=64)
    trace = predict(WIDE, config, 32, config.max_length, GPU)
    free = round((trace.peak + 0.5 * trace.gradients) / 0.85)
    eager, static = (fitting_parts(WIDE, config, GPU, 2, engine, free) for engine in ("eager", "static"))
    assert eager == 1 < static


def test_ranks_agree_on_the_parts_of_a_batch(tmp_path: Path) -> None:
    """A GPU that others use, too, may need more of them."""
    job = open_job(
        make_data(tmp_path),
        None,
        "tiny",
        {"batch_size": 8, "accumulate": 2, "max_length": 24} | ORIGINAL,
        SIZES,
        CPU,
        Ranks(),
    )
    assert with_agreed_parts(job) is job
    ranks = mock.create_autospec(Ranks, instance=True, rank=0, size=1)
    ranks.joined.return_value = torch.tensor([2, 4])
    agreed = with_agreed_parts(replace(job, ranks=ranks))
    assert agreed.config.accumulate == 4 and len(agreed.batches(0)) == 4


def test_a_trace_is_the_same_for_a_number_of_layers_and_grows_with_tokens() -> None:
    # Enough tokens that the weights' copies in half precision, which do not grow, weigh little.
    small, large = (trace_step(WIDE, WIDE_CONFIG, n, 32) for n in (64, 128))
    assert isinstance(small, StepTrace) and small.total_launches == large.total_launches
    assert large.activations / large.tokens == pytest.approx(small.activations / small.tokens, rel=0.05)


def test_info_tells_what_a_preset_needs(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "2", "--length", "16"]
    assert main(["info", "--model", "tiny", "--memory", "--json", "--measure", *sizes]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu"]["predicted_peak"] == pytest.approx(facts["cpu"]["measured_peak"], rel=0.1)
    assert facts["cuda"]["weights"] == facts["cpu"]["weights"] and facts["cuda"]["kept_for_backward"]
    assert facts["cuda"]["predicted_peak_with_graphs"] > facts["cuda"]["predicted_peak"]
    assert "predicted_peak_with_graphs" not in facts["cpu"]
    assert main(["info", "--model", "tiny", "--memory", *sizes]) == 0
    assert "predicted peak" in capsys.readouterr().out
    assert main(["info", "--model", "nothing", "--memory"]) == 2


@pytest.mark.parametrize(("most", "numbers"), [("", 2**24), ("2**28", 2**22)], ids=["all", "some"])
def test_freed_memory_stays_the_processs(most: str, numbers: int) -> None:
    """In a process of its own: the same 64 or 16 MB cost new pages each time by default, and soon no more."""
    program = f"""
import platform, resource, torch
from electra_core.execution.placement import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros({numbers})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
by_default = faults()
keep_freed_memory({most})
for _ in range(20):
    faults()
print(platform.libc_ver()[0], by_default, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    library, by_default, kept = done.stdout.split()
    if library != "glibc":
        pytest.skip("another C library")
    assert int(kept) < 100 < int(by_default)


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 1.86 GiB. GPU 0 has a total capacity of 3.81 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 2.60 GiB memory in use. Of the allocated memory 2 GiB …"
)


def test_memory_that_does_not_suffice_is_a_line_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def captured(options: object) -> None:
        try:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        finally:  # as the end of a capture does
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")

    def other(options: object) -> None:
        raise RuntimeError("shapes differ")

    captured.__name__ = other.__name__ = "pretrain"  # what the command is called after
    monkeypatch.setattr(commands_train, "pretrain", captured)
    assert main(["pretrain", "--data", "D", "--out", "R"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("electra pretrain: CUDA out of memory. Tried to allocate 1.86 GiB. GPU 0 has a total")
    assert "1.20 GiB is free; continue with --resume --accumulate 0" in line and "--recompute" in line
    monkeypatch.setattr(commands_train, "pretrain", other)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["pretrain", "--data", "D", "--out", "R"])


@pytest.mark.parametrize(
    ("command", "way_out"),
    [("pretrain", "--accumulate 0"), ("finetune", "--batch-size"), ("predict", "--device cpu")],
)
@pytest.mark.parametrize(
    "said",
    ["HIP out of memory. Tried", "CUDA error: out of memory\nCompile with", "CUBLAS_STATUS_ALLOC_FAILED when",
     "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"],
)  # fmt: skip
def test_every_way_to_say_that_memory_does_not_suffice(command: str, way_out: str, said: str) -> None:
    line = memory_trouble(RuntimeError(said), command) or ""
    on_the_cpu = "alloc_cpu" in said and command == "predict"  # where else could it go
    assert (way_out in line) == (not on_the_cpu) and line.startswith(said[:10]) and "\n" not in line
    assert memory_trouble(ValueError(said), command) is None
    parser = build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr, index]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", line)) <= flags


def test_python_may_run_out_of_memory_itself() -> None:
    assert memory_trouble(MemoryError(), "status") == "out of memory"
    assert memory_trouble(MemoryError("Unable to allocate 3 GiB"), "predict") == "Unable to allocate 3 GiB"
    assert "; try a smaller --batch-size" in (memory_trouble(MemoryError(), "finetune") or "")


@pytest.mark.parametrize(
    ("module", "said", "hinted"),
    [("triton.runtime.errors", "out of resource: shared memory", True), ("builtins", "shapes differ", False),
     ("torch", "CUDA error: an illegal memory access was encountered", True)],
)  # fmt: skip
def test_a_kernel_that_fails_comes_with_a_way_around_it(
    module: str, said: str, hinted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def info(options: object) -> None:
        raise type("Error", (Exception,), {"__module__": module})(said)

    monkeypatch.setattr(commands_inspect, "info", info)
    with pytest.raises(Exception, match=said):
        main(["info"])
    assert ("ELECTRA_TRITON=0" in capsys.readouterr().err) == hinted
