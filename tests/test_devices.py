"""What would go wrong on a GPU only, shown without one.

**Placement.** The `meta` device stands for the GPU: its tensors have no values and do not mix with a CPU's, so a
number or a tensor that is left on the host ends the step with an error, as it would on a GPU.
**The twins**, which read lengths on the host, run on a second device that has values (`elsewhere.py`).
**Autocast.** On a GPU it computes LayerNorm in fp32, on a CPU it does not.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from electra_kernels import use
from elsewhere import Elsewhere, elsewhere
from kernel_helpers import skip_without_memory
from tiny_steps import CASES, CONFIG, ENCODER, batch_of
from torch import Tensor, nn

from electra_core.config import updated
from electra_core.electra import Generator
from electra_core.errors import UserError
from electra_core.execution.placement import resolve_device, resolve_precision
from electra_core.initialisation import initialise
from electra_core.objectives import build_objective
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TaskModel, TokenClassifier

META = torch.device("meta")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("electra_core.execution.placement.gpu_trouble", lambda place: None)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: this machine has 2 GPUs, numbered from 0"):
        resolve_device("cuda:2")
    for other in ("cuda:x", "mps", "meta", "tpu", ""):
        with pytest.raises(UserError, match=f"^device {other}: expected auto, cpu or cuda"):
            resolve_device(other)


def test_a_process_whose_gpu_it_cannot_see_is_told_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("electra_core.execution.placement.gpu_trouble", lambda place: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"at most 1 processes, one per GPU.* set device to cuda:0"):
        resolve_device("auto")
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


def test_a_gpu_has_its_number_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `torch.cuda.set_device(1)` a new thread, as that of the eager steps' batches, begins at GPU 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("electra_core.execution.placement.gpu_trouble", lambda place: None)
    for wanted in ("auto", "cuda", torch.device("cuda")):
        assert resolve_device(wanted) == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


WIDE_HEADS = replace(ENCODER, hidden_size=32)  # heads of 16, which the kernels take
NAMES = [name for name in CASES if name != "disallow-correct"]  # autocast does not know `meta`


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_of_a_step_is_left_on_the_host(name: str, training: bool) -> None:
    config = updated(CONFIG, CASES[name], "test")
    model = build_objective(WIDE_HEADS, config).to(META).train(training)
    for part in batch_of(0, config):
        with use("triton"):
            output = model(part.to(META), 5)  # a seed that is a number, as the eager engine and evaluation give it
        assert output.loss.device == META
        output.loss.backward()
    assert all(p.grad is None or p.grad.device == META for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_twins_leave_nothing_on_the_host(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on GPUs that the kernels are not for: the same loss and gradients as on the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know `meta`
    encoder = replace(WIDE_HEADS, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    config = updated(CONFIG, CASES[name], "test")
    model, (part, *_) = build_objective(encoder, config).train(training), batch_of(0, config)
    initialise(model, 0.1, seed=0)
    with use("reference"):
        loss = model(part, 5).loss
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with elsewhere():
            model.to(META)
            output = model(part.to(META), 5)
            output.loss.backward()
    assert isinstance(output.loss, Elsewhere)
    torch.testing.assert_close(output.loss.detach().inner, loss.detach(), rtol=1e-5, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.inner, expected[name], rtol=1e-4, atol=1e-5)


def test_a_large_test_says_what_memory_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_helpers.ON_PTX_MACHINE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    skip_without_memory(2)
    with pytest.raises(pytest.skip.Exception, match=r"takes 12 GiB of the GPU's memory, 3.0 are free"):
        skip_without_memory(12)


def test_another_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"^precision fp16: expected auto, bf16 or fp32"):
        resolve_precision("fp16", torch.device("cpu"))


def test_torchs_own_objects_are_taken() -> None:
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        assert resolve_precision(dtype, torch.device("cpu")) == dtype
    with pytest.raises(UserError, match=r"^precision torch\.float16: expected auto, bf16 or fp32"):
        resolve_precision(torch.float16, torch.device("cpu"))


def test_the_second_device_does_not_mix_with_the_host() -> None:
    with elsewhere():
        x, y = torch.ones(2, device=META), torch.ones(2)
        assert (x + 1).tolist() == [2, 2] and x.sum().item() == 2
        assert (x + torch.tensor([1.0, 2.0], device=META)).tolist() == [2, 3]
        with pytest.raises(RuntimeError, match="two devices"):
            x + y
        assert torch.equal((x + y.to(META)).cpu(), y + y)


@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier, QuestionAnswerer, MultipleChoice])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_of_a_fine_tuned_model_is_left_on_the_host(kind: type[TaskModel], training: bool) -> None:
    model = kind(WIDE_HEADS).to(META).train(training)
    with use("triton"):
        logits = model(batch_of(0)[0].tokens.to(META), 5)
    assert logits.device == META
    logits.sum().backward()


def test_the_word_head_multiplies_in_the_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the largest product of the generator would run without tensor cores."""
    plain = nn.LayerNorm.forward

    def as_on_a_gpu(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return plain(self, x.float())

    monkeypatch.setattr(nn.LayerNorm, "forward", as_on_a_gpu)
    part = batch_of(0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_ME = Generator(ENCODER).features(part.tokens, part.masked_positions_M)
    assert features_ME.dtype == torch.bfloat16
