"""GPUs that the kernels are not for, and machines that lack what Triton needs: shown without any of them.

What torch and Triton say of a machine is put in their mouths; what is tested is what becomes of it: the twins, in
eager steps, with the reason said once, or a refusal that names a way out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import electra_kernels
import pytest
import torch
from electra_kernels import dispatch, triton_support, use
from electra_kernels.fast_bf16 import has_gpu_bf16
from electra_kernels.operators import architecture

from benchmarks.gpu_summary import FALLBACKS
from electra_core.cli import main
from electra_core.errors import UserError
from electra_core.execution import engine
from electra_core.execution.cross_check import _uses_kernels as uses_kernels
from electra_core.execution.memory import way_of
from electra_core.execution.placement import _warn_once, resolve_device, resolve_precision
from electra_core.muon import orthogonalise
from electra_core.pretraining.meter import peak_flops

GPU = torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    caches = (triton_support._import_problem, triton_support._launch_problem, dispatch._say_once, _warn_once)
    for cache in caches:
        cache.cache_clear()
    answers = (dispatch._answers, triton_support.DISTRUSTED)
    for known in answers:
        known.clear()
    yield
    for known in answers:
        known.clear()
    for cache in caches:
        cache.cache_clear()


class Machine:
    """A machine with one GPU, as torch and Triton describe it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.launched = patch, 0

    def with_gpu(self, name: str, capability: tuple[int, int], hip: str | None = None) -> Machine:
        for function, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name,
            "get_device_capability": capability, "is_current_stream_capturing": False,
            "get_per_process_memory_fraction": 1.0,
        }.items():  # fmt: skip
            self.patch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)
        self.patch.setattr(torch.version, "hip", hip)
        return self.launching(None)

    def launching(self, error: Exception | None) -> Machine:
        """What the first launch of a kernel raises."""
        from electra_kernels import probe_triton

        def launch(device: torch.device) -> None:
            assert device == GPU
            self.launched += 1
            if error is not None:
                raise error

        self.patch.setattr(probe_triton, "launch", launch)
        return self


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def tensor_on_the_gpu(dtype: torch.dtype) -> Any:
    """As far as `use_triton` looks at it."""
    return SimpleNamespace(is_cuda=True, is_meta=False, dtype=dtype, device=GPU)


KINDS = {  # name, capability, hip -> takes the kernels in fp32, in bf16; has bf16; engine of an fp32 run
    "P100": (("Tesla P100-PCIE-16GB", (6, 0), None), False, False, False, "eager"),
    "V100": (("Tesla V100-SXM2-16GB", (7, 0), None), False, False, False, "eager"),
    "T4": (("Tesla T4", (7, 5), None), True, False, False, "graph"),
    "RTX 3060": (("NVIDIA GeForce RTX 3060", (8, 6), None), True, True, True, "graph"),
    "H100": (("NVIDIA H100 80GB HBM3", (9, 0), None), True, True, True, "graph"),
    "MI300X": (("AMD Instinct MI300X", (9, 4), "7.0"), False, False, True, "eager"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_on_which_gpu(kind: str, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    gpu, in_fp32, in_bf16, has_bf16, chosen = KINDS[kind]
    machine.with_gpu(*gpu)
    assert dispatch.use_triton(tensor_on_the_gpu(FP32)) == in_fp32
    assert engine.choose_engine("auto", torch.device("cuda"), dtype=FP32) == chosen
    assert electra_kernels.available()["triton"] == ("yes" if in_fp32 else dispatch.gpu_problem(GPU, FP32))
    assert bool(caplog.records) == (not in_fp32)
    assert dispatch.use_triton(tensor_on_the_gpu(BF16)) == in_bf16
    assert not dispatch.use_triton(tensor_on_the_gpu(torch.float64))
    assert engine.choose_engine("auto", GPU, dtype=BF16) == ("graph" if in_bf16 else "eager")
    assert has_gpu_bf16(GPU) == has_bf16 and resolve_precision("auto", GPU) == (BF16 if has_bf16 else FP32)
    assert way_of(torch.device("cuda"), "fp32") == ("triton" if in_fp32 else "reference", FP32)
    assert all(gpu[0] in record.message for record in caplog.records)
    assert len(caplog.records) == (not in_fp32) + (in_fp32 and not in_bf16)  # each reason once


@pytest.mark.parametrize(("version", "in_bf16"), [("3.7.0", False), ("3.7.1", True)])
def test_a_triton_without_fences(
    version: str, in_bf16: bool, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.patch.setattr("triton.__version__", version)
    machine.with_gpu("NVIDIA B200", (10, 0))
    assert dispatch.use_triton(tensor_on_the_gpu(BF16)) == in_bf16
    assert dispatch.use_triton(tensor_on_the_gpu(FP32)) and in_bf16 == ("triton==3.7.1" not in caplog.text)
    machine.with_gpu("NVIDIA H100 80GB HBM3", (9, 0))
    dispatch._answers.clear()
    assert dispatch.use_triton(tensor_on_the_gpu(BF16))


def test_the_switch_turns_the_kernels_off_or_tries_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.with_gpu("AMD Instinct MI300X", (9, 4), "7.0")
    assert not dispatch.use_triton(tensor_on_the_gpu(BF16)) and machine.launched == 0
    monkeypatch.setenv("ELECTRA_TRITON", "1")
    assert dispatch.use_triton(tensor_on_the_gpu(BF16)) and machine.launched == 1
    assert architecture(GPU) == 80  # (9, 4) is no Hopper
    monkeypatch.setenv("ELECTRA_TRITON", "0")
    assert not dispatch.use_triton(tensor_on_the_gpu(BF16)) and "ELECTRA_TRITON=0 is set" in caplog.text
    with use("triton"), pytest.raises(RuntimeError, match="ELECTRA_TRITON=0 is set"):
        dispatch.use_triton(tensor_on_the_gpu(BF16))


def test_what_is_distrusted_is_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.with_gpu("NVIDIA H100 80GB HBM3", (9, 0))
    assert dispatch.use_triton(tensor_on_the_gpu(BF16)) and uses_kernels(GPU, BF16)
    dispatch.distrust(torch.device("cuda"), "they disagree")
    assert not dispatch.use_triton(tensor_on_the_gpu(BF16)) and not uses_kernels(GPU, BF16)
    assert engine.choose_engine("auto", GPU, dtype=BF16) == "eager"
    assert [record.message for record in caplog.records] == [
        "cuda:0: using plain PyTorch instead of the Triton kernels, which is slower: they disagree"
    ]
    assert any(words in caplog.text for words in FALLBACKS), "a GPU's summary would not show the line"
    monkeypatch.setenv("ELECTRA_TRITON", "1")
    assert dispatch.use_triton(tensor_on_the_gpu(BF16)) and not uses_kernels(GPU, BF16)
    assert triton_support.DISTRUSTED.keys() == {GPU}


def test_who_asks_for_triton_gets_it_on_any_gpu_that_launches_it(machine: Machine) -> None:
    machine.with_gpu("Tesla T4", (7, 5))
    with use("triton"):
        assert dispatch.use_triton(tensor_on_the_gpu(BF16))
    machine.launching(RuntimeError("no"))
    triton_support._launch_problem.cache_clear()
    with use("triton"), pytest.raises(RuntimeError, match="cannot run: RuntimeError: no"):
        dispatch.use_triton(tensor_on_the_gpu(BF16))


LAUNCHES = {
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC"), "needs a C compiler .*gcc"),
    "no headers": (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "-O3"]), "/usr/bin/gcc failed.*python3-dev"),
    "no driver": (
        AssertionError("libcuda.so cannot found!\nPlease make sure"),
        "AssertionError: libcuda.so cannot",
    ),
    "no place": (
        PermissionError(13, "Permission denied", "/.triton"),
        r"may not write /\.triton: set TRITON_CACHE_DIR",
    ),
    "silent": (RuntimeError(), "RuntimeError$"),
}


@pytest.mark.parametrize("what", LAUNCHES)
def test_a_machine_that_lacks_what_triton_needs(
    what: str, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    error, said = LAUNCHES[what]
    machine.with_gpu("NVIDIA A100-SXM4-40GB", (8, 0)).launching(error)
    for _ in range(3):
        assert not dispatch.use_triton(tensor_on_the_gpu(BF16))
    assert machine.launched == 1 and len(caplog.records) == 1
    (line,) = caplog.text.strip().splitlines()
    assert re.search(said, line)
    assert engine.choose_engine("auto", GPU, dtype=BF16) == "eager"
    for wanted in ("graph", "compile"):
        assert engine.choose_engine(wanted, GPU, dtype=BF16) == "eager" and f"engine={wanted!r}: " in caplog.text
    assert way_of(GPU, "auto") == ("reference", BF16)


def test_triton_says_that_the_compiler_is_missing_as_we_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("triton.runtime.build")
    if not hasattr(build, "_find_compiler"):
        pytest.skip("another version of Triton")
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as missing:
        build._find_compiler.__wrapped__("c")
    assert "needs a C compiler" in triton_support.in_words(missing.value)


def test_nothing_is_launched_while_a_graph_is_captured(machine: Machine) -> None:
    machine.with_gpu("NVIDIA A100", (8, 0)).launching(RuntimeError("no"))
    machine.patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.use_triton(tensor_on_the_gpu(FP32)) and machine.launched == 0
    machine.patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not dispatch.use_triton(tensor_on_the_gpu(FP32))


@pytest.mark.parametrize(
    ("version", "said"),
    [("3.2.0", "triton 3.2.0 is too old; the kernels need 3.6"), ("3.6.0+rocm7.1", None), ("3.10.0", None)],
)
def test_an_old_triton_is_not_taken(version: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert (triton_support.import_problem() or "None").startswith(str(said))


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), OSError("libtriton.so: no such file")])
def test_a_triton_that_is_missing_or_broken(
    error: Exception, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.with_gpu("NVIDIA A100", (8, 0))

    def import_(name: str, *rest: Any) -> Any:
        if name.startswith("triton"):
            raise error
        return original(name, *rest)

    original = __import__
    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", import_)
        assert not dispatch.use_triton(tensor_on_the_gpu(BF16))
    assert str(error) in caplog.text and len(caplog.records) == 1
    assert engine.choose_engine("auto", GPU, dtype=BF16) == "eager"


def test_an_answer_is_kept(machine: Machine) -> None:
    """An eager step asks a hundred times; what is asked of torch and Triton each time would add up."""
    machine.with_gpu("NVIDIA H100 80GB HBM3", (9, 0))
    assert dispatch.use_triton(tensor_on_the_gpu(BF16))

    def asked_again(*_: object) -> None:
        raise AssertionError("asked again")

    machine.patch.setattr(triton_support, "kind_problem", asked_again)
    machine.patch.setattr(triton_support, "launch_problem", asked_again)
    assert dispatch.use_triton(tensor_on_the_gpu(BF16))
    with pytest.raises(AssertionError, match="asked again"):
        dispatch.use_triton(tensor_on_the_gpu(FP32))


def test_torch_compile_takes_the_answer_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def problem(device: torch.device, dtype: torch.dtype) -> None:
        asked.append((device, dtype))

    monkeypatch.setattr(triton_support, "kind_problem", problem)
    monkeypatch.setattr(triton_support, "launch_problem", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "numbered", lambda device: device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.gpu_problem(x.device, x.dtype) is None else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), x + 1)
    assert asked == [(torch.device("cpu"), FP32)]


# Devices ------------------------------------------------------------------------------------------------------


def trouble(machine: Machine, said: str | None) -> None:
    machine.patch.setattr("electra_core.execution.placement.gpu_trouble", lambda place: said)


NO_IMAGE = "CUDA error: no kernel image is available for execution on the device"


def test_a_gpu_that_torch_was_not_built_for(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.with_gpu("Tesla P100", (6, 0))
    trouble(machine, NO_IMAGE)
    assert resolve_device("auto") == torch.device("cpu")
    assert "not built for Tesla P100" in caplog.text and "using the CPU" in caplog.text
    with pytest.raises(UserError, match=r"^device cuda: .*not built for Tesla P100.*the device cpu"):
        resolve_device("cuda")
    machine.patch.setenv("LOCAL_RANK", "0")
    assert resolve_device("auto") == torch.device("cpu"), "a leftover"
    machine.patch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not built for Tesla P100"):
        resolve_device("auto")


def test_a_gpu_that_does_not_start_ends_the_command(machine: Machine) -> None:
    machine.with_gpu("NVIDIA A100", (8, 0))
    trouble(machine, "CUDA error: all CUDA-capable devices are busy or unavailable")
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(
            UserError, match=f"^device {device}: NVIDIA A100 does not compute: .*busy.*the device cpu"
        ):
            resolve_device(device)
    trouble(machine, None)
    assert resolve_device("cuda:0") == GPU


def test_info_tells_what_a_machine_computes_with(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.with_gpu("Tesla T4", (7, 5))
    machine.patch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * 2**30, 16 * 2**30))
    trouble(machine, None)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"].startswith("cuda:0: Tesla T4, sm_75") and facts["memory free"] == "15.0 GiB"
    assert (facts["precision"], facts["engine"], facts["Triton kernels"]) == ("fp32", "graph", "yes")
    trouble(machine, "CUDA error: busy")
    assert main(["info"]) == 0
    assert "Tesla T4 does not compute: CUDA error: busy" in capsys.readouterr().out
    trouble(machine, NO_IMAGE)
    assert main(["info"]) == 0
    assert re.search("device  cpu, ", capsys.readouterr().out)
    assert main(["info", "--memory"]) == 2 and "--model: expected one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA RTX A1000", None),
     ("Tesla T4", None), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
     ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
)  # fmt: skip
def test_a_peak_is_that_of_the_very_card(name: str, peak: float | None, machine: Machine) -> None:
    machine.with_gpu(name, (8, 0))
    assert peak_flops(GPU, 1) == peak


def test_what_torch_says_of_a_gpu_comes_as_a_line() -> None:
    from electra_core.execution.placement import gpu_trouble

    assert gpu_trouble(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert "\n" not in (gpu_trouble(GPU) or "\n")


@pytest.mark.parametrize(("device", "whose"), [("mps", "Apple"), ("xpu", "Intel")])
def test_other_gpus_are_not_used(device: str, whose: str) -> None:
    with pytest.raises(UserError, match=f"^device {device}: expected auto, cpu or cuda; .*{whose}.* not used"):
        resolve_device(device)


def test_bf16_that_is_emulated_is_warned_of(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.with_gpu("Tesla T4", (7, 5))
    for _ in range(2):
        assert resolve_precision("bf16", GPU) == BF16
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "precision bf16: Tesla T4 has no bf16 and emulates it; fp32 is faster"
    ]


def test_fp32_that_is_tf32_is_said_and_left(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        machine.with_gpu("Tesla T4", (7, 5))  # has no TF32
        assert resolve_precision("fp32", GPU) == FP32 and not caplog.records
        machine.with_gpu("NVIDIA H100 80GB HBM3", (9, 0))
        for precision in ("auto", "bf16", "fp32", "fp32"):
            resolve_precision(precision, GPU)
        (record,) = caplog.records
        assert "precision fp32: PyTorch computes products in TF32" in record.message
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_muon_multiplies_in_fp32_where_bf16_is_emulated(machine: Machine) -> None:
    class OnGpu(torch.Tensor):
        is_cuda, device = True, GPU

    matrices = torch.randn(1, 8, 8, dtype=torch.float64).as_subclass(OnGpu)  # on a CPU float64 stays as it is
    machine.with_gpu("Tesla T4", (7, 5))
    exact = orthogonalise(matrices)
    machine.with_gpu("NVIDIA A100", (8, 0))
    assert not torch.equal(orthogonalise(matrices), exact)
    assert torch.equal(exact, orthogonalise(matrices.as_subclass(torch.Tensor)))
