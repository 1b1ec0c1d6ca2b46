"""Kernels beside twins before a run: what is right passes, what is spoiled is found, and the twins are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_kernels import (
    attention_triton,
    bias_gelu_triton,
    dispatch,
    embedding_layer_norm_triton,
    layer_norm_triton,
    mlm_head_triton,
    native,
    rtd_loss_triton,
    use,
)
from electra_kernels.operators import Operator
from kernel_helpers import INTERPRETED, ON_PTX_MACHINE
from small_runs import make_data, train
from tiny_steps import CASES, CONFIG, ENCODER
from torch import Tensor

from electra_core import electra, model_dir
from electra_core.config import PRESETS, updated
from electra_core.electra import Generator
from electra_core.execution import cross_check
from electra_core.execution.cross_check import check_pretraining, check_task_model
from electra_core.execution.placement import autocast_context
from electra_core.initialisation import initialise
from electra_core.objectives import build_objective
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SMALL = dataclasses.replace(ENCODER, num_attention_heads=1, hidden_dropout_prob=0.1)  # 16 wide: has a kernel
DTYPES = [FP32, BF16] if ON_PTX_MACHINE else [FP32]
kernels = pytest.mark.skipif(not (INTERPRETED or ON_PTX_MACHINE), reason="kernels on CPU tensors")


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Why the kernels were not trusted; inside, they run on CPU tensors as on a GPU."""
    told: list[str] = []
    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    monkeypatch.setattr(cross_check, "distrust", lambda _, reason: told.append(reason))
    with use("triton"):
        yield told


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["electra", "mlm", "all-tokens-mlm"])
def test_right_kernels_pass_and_the_model_is_as_before(name: str, dtype: torch.dtype, reasons: list[str]) -> None:
    model: Any = build_objective(SMALL, updated(CONFIG, CASES[name], "test")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert check_pretraining(model, CPU, dtype, CONFIG.max_length, static=True) and not reasons
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and "fill" not in vars(model.generator)


@kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "prediction"])
@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier, QuestionAnswerer, MultipleChoice])
def test_right_kernels_pass_with_a_downstream_model(kind: Any, training: bool, reasons: list[str]) -> None:
    model = kind(dataclasses.replace(SMALL, type_vocab_size=1)).eval()
    assert check_task_model(model, CPU, FP32, 24, training=training, static=training) and not reasons
    assert not model.training


def test_every_kernel_that_batches_of_a_task_may_need_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(cross_check, "_check_text", lambda _m, _d, _t, length, *_: lengths.append(length) or True)
    assert check_task_model(SequenceClassifier(SMALL), CPU, FP32, 200, training=True) and not lengths  # no kernels
    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    assert check_task_model(SequenceClassifier(SMALL), CPU, FP32, 200, training=True)
    assert check_task_model(SequenceClassifier(SMALL), CPU, FP32, 32, training=False)
    assert lengths == [16, 32, 64, 128, 200, 16, 32]


OPERATORS: dict[str, Operator] = {
    "attention": attention_triton.forward,
    "attention-backward": attention_triton.backward,
    "word-head": mlm_head_triton.forward,
    "word-head-backward": mlm_head_triton.backward,
    "layer-norm": layer_norm_triton.forward,
    "layer-norm-backward": layer_norm_triton.backward,
    "embedding": embedding_layer_norm_triton.forward,
    "embedding-backward": embedding_layer_norm_triton.backward,
    "gelu": bias_gelu_triton.forward,
    "gelu-backward": bias_gelu_triton.backward,
    "rtd": rtd_loss_triton.rtd_head,
    "rtd-backward": rtd_loss_triton.rtd_head_backward,
}


def without_first_rows(result: Any, rows: int) -> Any:
    """Rows forgotten of what an operator gives first, or of the one thing it gives. (The last only fill up.)"""
    first: Tensor = result if isinstance(result, Tensor) else result[0]
    (first if first.dim() == 0 else first[:rows]).zero_()
    return result


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_kernel_is_found(
    name: str, dtype: torch.dtype, reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong row of a hundred is seen in fp32; in bf16 attention's would pass for rounding, so it is a tile."""
    operator, model = OPERATORS[name], build_objective(SMALL, CONFIG).train()
    initialise(model, 0.2, seed=0)  # so narrow a model's attention adds next to nothing at the usual 0.02
    right, rows = operator.direct, 1 if dtype == FP32 else 16
    monkeypatch.setattr(operator, "direct", lambda *inputs: without_first_rows(right(*inputs), rows))
    assert not check_pretraining(model, CPU, dtype, CONFIG.max_length, static=True)
    assert len(reasons) == 1 and "is off by" in reasons[0]


@kernels
def test_a_kernel_that_does_not_start_is_found(reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nRequired: 131072")

    monkeypatch.setattr(attention_triton.backward, "direct", too_large)
    assert not check_pretraining(build_objective(SMALL, CONFIG).train(), CPU, FP32, CONFIG.max_length, static=True)
    assert "they failed (RuntimeError: out of resource: shared memory)" in reasons[0]


@kernels
def test_words_drawn_otherwise_are_found(reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = build_objective(SMALL, CONFIG).train(), mlm_head_triton.forward.direct

    def other_words(*inputs: Any) -> Any:
        loss_M, ids_M, *rest = right(*inputs)
        return loss_M, ids_M.roll(1), *rest

    monkeypatch.setattr(mlm_head_triton.forward, "direct", other_words)
    assert not check_pretraining(model, CPU, FP32, CONFIG.max_length, static=False)
    assert "of the words are drawn otherwise" in reasons[0]


def test_half_precision_is_no_disagreement() -> None:
    """The loops in C in bf16 beside the twins: other sums and other roundings, and far from what is allowed."""
    if native.problem() is not None:
        pytest.skip("the loops in C are not built here")
    model: Any = build_objective(dataclasses.replace(SMALL, num_hidden_layers=4), CONFIG).train()
    batch = cross_check._masked(cross_check._text(SMALL, CONFIG.max_length))
    with cross_check._one_draw(model.generator) as others:
        compute = lambda: cross_check._gradients(model, model(batch, 1).loss)  # noqa: E731
        assert cross_check.disagreement(compute, autocast_context(CPU, BF16), BF16) is None
    assert len(others) == 2 and float(others[-1]) <= cross_check.OTHER_WORDS


def trained() -> Any:
    """The shipped pair, whose generator has favourites."""
    folder = model_dir.shipped_model()
    config, _ = model_dir.load_config(folder / "discriminator")
    settings = dataclasses.replace(PRESETS["tiny"].pretrain, embedding_init="normal", position_init="normal")
    model = build_objective(config, settings)
    model_dir.load_pair(model, folder / "discriminator", folder / "generator")
    return model.train()


def pretended_kernels(monkeypatch: pytest.MonkeyPatch, rounding: float, wrong: bool = False) -> None:
    """In place of kernels the twins, with features as from other sums in half precision; `wrong`: and with words
    of their neighbours."""
    features, head = Generator.features, electra.mlm_head

    def rounded(self: Generator, *arguments: Any) -> Tensor:
        right_ME = features(self, *arguments)
        if dispatch._choice == "reference":
            return right_ME
        noise_ME = torch.randn(right_ME.shape, generator=torch.Generator().manual_seed(0))
        return right_ME + (rounding * right_ME.detach().float().std() * noise_ME).to(right_ME.dtype)

    def with_other_words(*arguments: Any, **named: Any) -> Any:
        result = head(*arguments, **named)
        return result if dispatch._choice == "reference" else result._replace(sampled_ids_M=result[1].roll(1))

    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    monkeypatch.setattr(Generator, "features", rounded)
    if wrong:
        monkeypatch.setattr(electra, "mlm_head", with_other_words)


@pytest.mark.parametrize("seed", [100, 103, 108])
def test_a_trained_generators_words_are_compared_for_the_same_features(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside fp32's draws up to a quarter would be others here, and right kernels refused on `--resume`."""
    told: list[str] = []
    monkeypatch.setattr(cross_check, "distrust", lambda _, reason: told.append(reason))
    monkeypatch.setattr(cross_check, "SEED", seed)
    pretended_kernels(monkeypatch, 0.012)
    assert check_pretraining(trained(), CPU, BF16, 128, static=False) and not told
    pretended_kernels(monkeypatch, 0.0, wrong=True)
    assert not check_pretraining(trained(), CPU, BF16, 128, static=False)
    assert "of the words are drawn otherwise" in told[0]


def set_newer_name(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision  # type: ignore[attr-defined]


def tf32_names() -> list[str]:
    """What torch says about TF32 under each of its names, or that it refuses to."""
    names: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        torch._C._get_cublas_allow_tf32,  # which TunableOp asks
        lambda: torch.backends.cuda.matmul.fp32_precision,  # type: ignore[attr-defined]
        lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    ]
    return [said(name) for name in names]


def said(ask: Callable[[], Any]) -> str:
    try:
        return str(ask())
    except RuntimeError:
        return "refuses"


@pytest.mark.parametrize(
    "set_by_caller",
    [
        *(partial(torch.set_float32_matmul_precision, name) for name in ("highest", "high", "medium")),
        partial(setattr, torch.backends.cuda.matmul, "allow_tf32", True),
        partial(set_newer_name, "tf32"),
    ],
    ids=["highest", "high", "medium", "allow_tf32", "newer name"],
)
def test_tf32_is_no_part_of_the_exact_result_and_stays_set(set_by_caller: Callable[[], None]) -> None:
    """Nor does anything refuse that asks for the older name."""
    seen: list[list[str]] = []

    def compute() -> cross_check.Figures:
        seen.append(tf32_names())
        return {"it": torch.ones(1)}

    set_by_caller()
    before = tf32_names()
    try:
        assert cross_check.disagreement(compute, autocast_context(CPU, FP32), FP32) is None
        assert seen[0][1:3] == ["False", "ieee"] and seen[1:] == [before, before] and tf32_names() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_result_that_is_no_number_disagrees() -> None:
    calls = iter([1.0, 1.0, float("nan")])
    compute = lambda: {"it": torch.tensor([next(calls)])}  # noqa: E731
    assert "it is off by nan" in (cross_check.disagreement(compute, autocast_context(CPU, FP32), FP32) or "")


def test_pretraining_goes_on_with_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import electra_core.pretraining.setup as module

    data = make_data(tmp_path)
    expected = train(data, tmp_path / "eager", {"engine": "eager"})
    chosen = iter(["graph", "eager"])  # before the check, after it
    monkeypatch.setattr(module, "choose_engine", lambda *_: next(chosen))
    monkeypatch.setattr(module, "check_pretraining", lambda *_, **__: False)
    assert train(data, tmp_path / "run").evaluation == expected.evaluation
