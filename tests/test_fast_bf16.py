"""Products on processors that are fast at bf16: exact where they must be, whichever processor the test runs on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from electra_kernels import fast_bf16, native
from electra_kernels.fast_bf16 import product_over_rows, turned
from kernel_helpers import assert_within_budget
from safetensors.torch import load_file, save_file

from electra_core import linear, model_dir
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import read_all
from electra_core.downstream.run_model import run_model
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.linear import Linear, gelu_of
from electra_core.predict import evaluate, load
from electra_core.tasks import SequenceClassifier
from electra_core.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("any_processor")
needs_native = pytest.mark.skipif(native.problem() is not None, reason=f"no C loops: {native.problem()}")


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 47), (64, 32), (5, 100), (100, 5)], ids=str)
def test_turned_is_the_transpose(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape).to(torch.bfloat16)
    assert torch.equal(turned(matrix), matrix.T)


@needs_native
@pytest.mark.parametrize("rows", [1, 101, 177, 200, 256])
def test_what_memory_held_before_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN reads behind a row's end, up to the next whole tile."""
    monkeypatch.setattr(fast_bf16, "_has_amx", lambda: True)
    full = torch.Tensor.new_full
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: full(tensor, size, float("nan")))
    a, b = torch.randn(rows, 32).to(torch.bfloat16), torch.randn(rows, 64).to(torch.bfloat16)
    for got, wanted in ((product_over_rows(a, b), a.T @ b), (product_over_rows(b, a), b.T @ a)):
        torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("rows", "out", "width"), [(40, 24, 24), (7, 16, 48), (50, 33, 20), (0, 4, 8)])
def test_products_over_rows(rows: int, out: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bf16, "_has_amx", lambda: True)
    a, b = torch.randn(rows, out).to(torch.bfloat16), torch.randn(rows, width).to(torch.bfloat16)
    same, exact = a.T @ b, a.double().T @ b.double()
    for problem in (native.problem(), "none wanted"):
        monkeypatch.setattr(native, "problem", lambda problem=problem: problem)
        product = product_over_rows(a, b)
        assert product.shape == (out, width) and product.is_contiguous()
        assert_within_budget("product", product, same, exact)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)], ids=str)
def test_linear_in_fast_bf16_is_as_exact_as_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    ours, theirs, exact = Linear(24, 40), torch.nn.Linear(24, 40), torch.nn.Linear(24, 40).double()
    theirs.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    x, dy = torch.randn(shape).to(torch.bfloat16), torch.randn(*shape[:-1], 40).to(torch.bfloat16)
    results = []
    for layer, kind in ((ours, torch.bfloat16), (theirs, torch.bfloat16), (exact, torch.float64)):
        given = x.detach().clone().to(kind).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
            y = layer(given)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), given.grad, layer.weight.grad, layer.bias.grad])
    for name, *values in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)], ids=str)
def test_gelu_in_the_product_is_as_exact_as_after_it(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    torch.manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(shape)
    rounded = x.to(torch.bfloat16)
    weight, bias = layer.weight.to(torch.bfloat16), layer.bias.to(torch.bfloat16)
    exact = F.gelu(F.linear(rounded.double(), weight.double(), bias.double()))
    same = F.gelu(F.linear(rounded, weight, bias))
    results = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(gelu_of(layer, x))
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # a torch without the operator
        results.append(gelu_of(layer, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(gelu_of(layer, x.requires_grad_()))
    assert results[-1].requires_grad
    for result in results:
        assert_within_budget("gelu", result.detach(), same, exact)


def test_weights_rounded_once_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    layers, x = torch.nn.Sequential(Linear(24, 40), torch.nn.LayerNorm(40), Linear(40, 3)), torch.randn(7, 24)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = layers(x)
        linear.round_weights(layers, torch.device("cpu"), torch.float32)
        assert layers[0].weight.dtype == torch.float32
        linear.round_weights(layers, torch.device("cpu"), torch.bfloat16)
        assert torch.equal(layers(x), before)
    assert layers[0].weight.dtype == torch.bfloat16 and layers[1].weight.dtype == torch.float32
    outside = layers(x)  # of a model that `predict.load` gave, called by itself
    assert outside.dtype == torch.float32
    torch.testing.assert_close(outside, before.float(), atol=0.02, rtol=0.02)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A discriminator whose biases are no numbers of bf16."""
    folder = tiny_model.make_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    biases = {name: torch.randn_like(value) for name, value in weights.items() if name.endswith(".bias")}
    save_file(weights | biases, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_with_rounded_weights_gives_the_same_logits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a bias is added outside the product, with the residual."""
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    tokenizer = load_tokenizer(model)
    task = Classify(labels=("neg", "pos"))
    classifier = model_dir.load(SequenceClassifier, model, labels=task.labels)
    examples, _ = read_all(task, tiny_model.reviews(tmp_path / "dev.tsv", 40))
    features = task.encode(examples, tokenizer)
    before = run_model(classifier, features, precision=torch.bfloat16)
    linear.round_weights(classifier, torch.device("cpu"), torch.bfloat16)
    after = run_model(classifier, features, precision=torch.bfloat16)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_evaluation_gives_the_figures_of_fine_tuning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    train = tiny_model.reviews(tmp_path / "train.tsv", 64)
    dev = tiny_model.reviews(tmp_path / "dev.tsv", 200, seed=1)
    settings = FinetuneSettings(epochs=1, batch_size=16, precision="bf16")
    report = finetune(model, Classify(), train, dev, tmp_path / "out", settings, quiet=True)
    figures = evaluate(load(tmp_path / "out", precision="bf16"), dev).metrics
    assert {name: report["best"][name] for name in figures} == figures


def test_a_regressor_s_numbers_keep_their_digits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its last layer adds their mean, and bf16 has eight bits."""
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    train = tiny_model.reviews(tmp_path / "train.tsv", 64)
    text = train.read_text().replace("\tpos", "\t11.5").replace("\tneg", "\t10.25")
    train.write_text(text)
    settings = FinetuneSettings(epochs=1, batch_size=16, precision="bf16")
    report = finetune(model, Regress(), train, train, tmp_path / "out", settings, quiet=True)
    figures = evaluate(load(tmp_path / "out", precision="bf16"), train).metrics
    assert {name: report["best"][name] for name in figures} == pytest.approx(figures, rel=1e-3)


def test_gelu_without_fast_bf16_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: False)
    layer, x = Linear(24, 40), torch.randn(7, 24)
    with torch.no_grad():
        assert torch.equal(gelu_of(layer, x), F.gelu(layer(x)))


@pytest.mark.parametrize(
    ("maker", "has_avx512_bf16", "tiles", "fast"),
    [
        ("GenuineIntel", True, True, True),
        ("GenuineIntel", True, False, False),
        ("AuthenticAMD", True, False, True),
        ("AuthenticAMD", False, False, False),
        ("", False, False, False),
    ],
)
def test_which_processors_are_fast(
    maker: str, has_avx512_bf16: bool, tiles: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_bf16, "_maker", lambda: maker)
    monkeypatch.setattr(fast_bf16, "_has_amx", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    assert fast_bf16._has_fast_bf16.__wrapped__() is fast


def test_the_maker_is_read_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_options: text)
    assert fast_bf16._maker() == "AuthenticAMD"
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_options: "Processor: ARMv8\n")
    assert fast_bf16._maker() == ""

    def missing(*_args: object, **_options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert fast_bf16._maker() == "AuthenticAMD"
