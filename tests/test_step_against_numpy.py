"""Whole training steps against a second implementation in NumPy that shares no line with the first.

It is naive on purpose: float64, padded arrays with a mask, plain formulas, a backward pass written by hand.
It is given only the numbers: the parameters, the masked positions and the words that were drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import erf

from electra_core import optim
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra, PretrainBatch
from electra_core.packing import from_padded

CONFIG = EncoderConfig(
    vocab_size=37, embedding_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=12, max_position_embeddings=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    generator_hidden_size=4, generator_attention_heads=1, generator_intermediate_size=8, generator_layers=2,
    steps=20, warmup_steps=4,
)  # fmt: skip
LENGTHS, MASK_ID = (7, 4, 9), 3
MASKED = [(0, 1), (0, 5), (1, 2), (2, 3), (2, 4), (2, 7)]
KEPT = (2, 4)  # masked, but its word was left as it is

# A little reverse-mode differentiation ----------------------------------------------------------------------


class Var:
    """An array and the gradient of the loss with respect to it."""

    def __init__(self, value: np.ndarray):
        self.value, self.grad = value, np.zeros_like(value)


class Tape:
    """Operations with their derivatives; `backward` runs them in reverse."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def record(self, value: np.ndarray, backward: Callable[[np.ndarray], None]) -> Var:
        out = Var(value)
        self.steps.append(lambda: backward(out.grad))
        return out

    def backward(self, out: Var) -> None:
        out.grad = np.ones_like(out.value)
        for step in reversed(self.steps):
            step()

    def add(self, *terms: Var) -> Var:
        def backward(g: np.ndarray) -> None:
            for term in terms:
                term.grad += g

        return self.record(sum((t.value for t in terms), np.zeros(())), backward)

    def scale(self, x: Var, factor: float) -> Var:
        def backward(g: np.ndarray) -> None:
            x.grad += factor * g

        return self.record(factor * x.value, backward)

    def look_up(self, table: Var, index: tuple[np.ndarray, ...] | np.ndarray) -> Var:
        def backward(g: np.ndarray) -> None:
            np.add.at(table.grad, index, g)

        return self.record(table.value[index], backward)

    def linear(self, x: Var, weight: Var, bias: Var) -> Var:
        def backward(g: np.ndarray) -> None:
            rows = g.reshape(-1, g.shape[-1])
            x.grad += g @ weight.value
            weight.grad += rows.T @ x.value.reshape(len(rows), -1)
            bias.grad += rows.sum(0)

        return self.record(x.value @ weight.value.T + bias.value, backward)

    def gelu(self, x: Var) -> Var:
        cumulative = 0.5 * (1 + erf(x.value / np.sqrt(2)))
        density = np.exp(-0.5 * x.value**2) / np.sqrt(2 * np.pi)

        def backward(g: np.ndarray) -> None:
            x.grad += g * (cumulative + x.value * density)

        return self.record(x.value * cumulative, backward)

    def layer_norm(self, x: Var, weight: Var, bias: Var) -> Var:
        centred = x.value - x.value.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.layer_norm_eps)
        normal = centred / deviation

        def backward(g: np.ndarray) -> None:
            axes = tuple(range(g.ndim - 1))
            weight.grad += (g * normal).sum(axes)
            bias.grad += g.sum(axes)
            h = g * weight.value
            along = (h * normal).mean(-1, keepdims=True)
            x.grad += (h - h.mean(-1, keepdims=True) - normal * along) / deviation

        return self.record(normal * weight.value + bias.value, backward)

    def attention(self, q: Var, k: Var, v: Var, mask: np.ndarray, heads: int) -> Var:
        """softmax(q k^T / sqrt(d)) v per head; keys where `mask` [N, S] is 0 get no weight."""
        n, s, width = q.value.shape
        d = width // heads

        def split(x: np.ndarray) -> np.ndarray:
            return x.reshape(n, s, heads, d).transpose(0, 2, 1, 3)

        def join(x: np.ndarray) -> np.ndarray:
            return x.transpose(0, 2, 1, 3).reshape(n, s, width)

        qh, kh, vh = split(q.value), split(k.value), split(v.value)
        scores = qh @ kh.transpose(0, 1, 3, 2) / np.sqrt(d)
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)

        def backward(g: np.ndarray) -> None:
            gh = split(g)
            dp = gh @ vh.transpose(0, 1, 3, 2)
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(d)
            q.grad += join(ds @ kh)
            k.grad += join(ds.transpose(0, 1, 3, 2) @ qh)
            v.grad += join(p.transpose(0, 1, 3, 2) @ gh)

        return self.record(join(p @ vh), backward)

    def cross_entropy(self, logits: Var, targets: np.ndarray) -> Var:
        """Mean over rows of -log softmax(logits)[target]."""
        rows = np.arange(len(targets))
        p = np.exp(logits.value - logits.value.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)

        def backward(g: np.ndarray) -> None:
            d = p.copy()
            d[rows, targets] -= 1
            logits.grad += g * d / len(rows)

        return self.record(-np.log(p[rows, targets]).mean(), backward)

    def binary_cross_entropy(self, logits: Var, labels: np.ndarray) -> Var:
        """Mean over elements of -y log sigmoid(x) - (1 - y) log(1 - sigmoid(x))."""
        probability = 1 / (1 + np.exp(-logits.value))
        loss = -np.where(labels, np.log(probability), np.log(1 - probability))

        def backward(g: np.ndarray) -> None:
            logits.grad += g * (probability - labels) / labels.size

        return self.record(loss.mean(), backward)


# ELECTRA, padded --------------------------------------------------------------------------------------------


class NumpyElectra:
    """Parameters by the model's names, moments of Adam, and one step."""

    def __init__(self, model: Electra):
        self.parameters = {name: Var(p.detach().numpy().copy()) for name, p in model.named_parameters()}
        zeros = {name: np.zeros_like(p.value) for name, p in self.parameters.items()}
        self.m, self.v = zeros, {name: zero.copy() for name, zero in zeros.items()}

    def encoder(self, tape: Tape, which: str, ids: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> Var:
        def own(name: str) -> Var:
            return self.parameters[f"{which}.encoder.{name}"]

        def shared(name: str) -> Var:
            return self.parameters[f"generator.encoder.embeddings.{name}"]

        def linear(x: Var, name: str) -> Var:
            return tape.linear(x, own(f"{name}.weight"), own(f"{name}.bias"))

        def norm(x: Var, name: str) -> Var:
            return tape.layer_norm(x, own(f"{name}.weight"), own(f"{name}.bias"))

        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        x = tape.add(
            tape.look_up(shared("word_embeddings.weight"), ids),
            tape.look_up(shared("position_embeddings.weight"), positions),
            tape.look_up(shared("token_type_embeddings.weight"), segments),
        )
        x = tape.layer_norm(x, shared("LayerNorm.weight"), shared("LayerNorm.bias"))
        x = linear(x, "embeddings_project")
        heads = CONFIG.num_attention_heads if which == "discriminator" else PRETRAIN.generator_attention_heads
        for layer in range(2):
            q, k, v = (self.third(tape, own, f"layers.{layer}.attention.qkv", part, x) for part in range(3))
            context = tape.attention(q, k, v, mask, heads)
            x = norm(
                tape.add(x, linear(context, f"layers.{layer}.attention.dense")), f"layers.{layer}.attention_norm"
            )
            inner = tape.gelu(linear(x, f"layers.{layer}.intermediate"))
            x = norm(tape.add(x, linear(inner, f"layers.{layer}.output")), f"layers.{layer}.output_norm")
        return x

    @staticmethod
    def third(tape: Tape, own: Callable[[str], Var], name: str, part: int, x: Var) -> Var:
        """Query, key or value: one third of the rows of a fused weight."""
        weight, bias = own(f"{name}.weight"), own(f"{name}.bias")
        rows = np.split(np.arange(len(bias.value)), 3)[part]
        return tape.linear(x, tape.look_up(weight, rows), tape.look_up(bias, rows))

    def losses(
        self, ids: np.ndarray, segments: np.ndarray, mask: np.ndarray, drawn: np.ndarray
    ) -> tuple[float, float, float]:
        """(loss, MLM loss, RTD loss); gradients go to the parameters."""
        tape, p = Tape(), self.parameters
        for parameter in p.values():
            parameter.grad = np.zeros_like(parameter.value)
        rows, columns = np.array(MASKED).T
        masked = ids.copy()
        for place in MASKED:
            masked[place] = MASK_ID if place != KEPT else ids[place]

        hidden = tape.look_up(self.encoder(tape, "generator", masked, segments, mask), (rows, columns))
        head = "generator.generator_predictions"
        hidden = tape.gelu(tape.linear(hidden, p[f"{head}.dense.weight"], p[f"{head}.dense.bias"]))
        hidden = tape.layer_norm(hidden, p[f"{head}.LayerNorm.weight"], p[f"{head}.LayerNorm.bias"])
        words = p["generator.encoder.embeddings.word_embeddings.weight"]
        logits = tape.linear(hidden, words, p["generator.output_bias"])
        mlm = tape.cross_entropy(logits, ids[rows, columns])

        corrupted = ids.copy()
        corrupted[rows, columns] = drawn
        real = np.nonzero(mask)
        head = "discriminator.discriminator_predictions"
        hidden = tape.look_up(self.encoder(tape, "discriminator", corrupted, segments, mask), real)
        hidden = tape.gelu(tape.linear(hidden, p[f"{head}.dense.weight"], p[f"{head}.dense.bias"]))
        name = f"{head}.dense_prediction"
        scores = tape.linear(hidden, p[f"{name}.weight"], p[f"{name}.bias"])
        rtd = tape.binary_cross_entropy(scores, (corrupted != ids)[real][:, None])

        loss = tape.add(mlm, tape.scale(rtd, 50.0))
        tape.backward(loss)
        return float(loss.value), float(mlm.value), float(rtd.value)

    def update(self, step: int) -> None:
        """Clip the gradient's norm at 1, then Adam without bias correction at the schedule's rate."""
        norm = np.sqrt(sum((p.grad**2).sum() for p in self.parameters.values()))
        rate = 5e-4 * (1 - step / 20) * min(1.0, step / 4)
        for name, p in self.parameters.items():
            g = p.grad / max(norm, 1.0)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            decay = 0.0 if "norm" in name.lower() or name.endswith("bias") else 0.01
            p.value -= rate * (self.m[name] / (np.sqrt(self.v[name]) + 1e-6) + decay * p.value)


# The comparison ---------------------------------------------------------------------------------------------


def make_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray, PretrainBatch]:
    generator = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    ids = generator.integers(5, 37, mask.shape) * mask
    segments = (np.arange(max(LENGTHS))[None] >= np.array(LENGTHS)[:, None] // 2) * mask
    tokens = from_padded(torch.tensor(ids), torch.tensor(mask).long(), torch.tensor(segments).long())
    starts = tokens.cu_seqlens.tolist()
    positions = torch.tensor([starts[row] + column for row, column in MASKED])
    masked_ids = tokens.input_ids_T.clone()
    masked_ids[[starts[row] + column for row, column in MASKED if (row, column) != KEPT]] = MASK_ID
    return ids, segments.astype(int), mask, PretrainBatch(tokens, masked_ids, positions)


def test_three_steps_equal_those_of_a_naive_implementation() -> None:
    model = Electra(CONFIG, PRETRAIN).double().train()
    with torch.no_grad():  # larger than initial values, so that every nonlinearity shows
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    naive = NumpyElectra(model)
    optimizer = optim.build_optimizer(model, PRETRAIN)
    ids, segments, mask, batch = make_batch()
    replaced = 0
    for step in (1, 2, 3):
        output = model(batch, seed=step)
        drawn = output.corrupted_ids_T[batch.masked_positions_M].numpy()
        replaced += int(output.is_replaced_T.sum())
        expected = naive.losses(ids, segments, mask, drawn)
        actual = [float(x.detach()) for x in (output.loss, output.mlm_loss, output.rtd_loss)]
        np.testing.assert_allclose(actual, expected, rtol=1e-9)

        optimizer.zero_grad()
        output.loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            np.testing.assert_allclose(
                p.grad.numpy(), naive.parameters[name].grad, rtol=1e-7, atol=1e-9, err_msg=name
            )

        norm = optim.clip_gradients(model.parameters(), PRETRAIN.clip_norm)
        assert norm > 1.0, "the step must really be clipped"
        rate = optim.learning_rate(step, PRETRAIN.learning_rate, PRETRAIN.steps, PRETRAIN.warmup_steps)
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()
        naive.update(step)
        for name, p in model.named_parameters():
            expected_value = naive.parameters[name].value
            np.testing.assert_allclose(p.detach().numpy(), expected_value, rtol=0, atol=1e-9, err_msg=name)
    assert 0 < replaced, "some draws must differ from the original words"


def test_the_naive_backward_pass_is_right() -> None:
    """Its own check: gradients against finite differences, at a few elements of every parameter."""
    naive = NumpyElectra(Electra(CONFIG, PRETRAIN).double())
    generator = np.random.default_rng(1)
    for p in naive.parameters.values():
        p.value += 0.3 * generator.standard_normal(p.value.shape)
    ids, segments, mask, _ = make_batch()
    drawn = generator.integers(5, 37, len(MASKED))
    naive.losses(ids, segments, mask, drawn)
    gradients = {name: p.grad.copy() for name, p in naive.parameters.items()}
    for name, p in naive.parameters.items():
        for _ in range(2):
            place = tuple(generator.integers(0, size) for size in p.value.shape)
            losses = []
            for sign in (1, -1):
                p.value[place] += sign * 1e-5
                losses.append(naive.losses(ids, segments, mask, drawn)[0])
                p.value[place] -= sign * 1e-5
            assert gradients[name][place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-6), (
                name
            )
