"""Copies of optimizers, by copy.deepcopy and pickle, beside their parameters' copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from electra_core import optim
from electra_core.adam import ElectraAdam
from electra_core.muon import Muon
from electra_core.training import reads_found_inf

# What is unpickled has just been pickled here; weights_only, for files of others, knows no optimizers.
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def made(kind: Any, params: list[nn.Parameter], fused: bool | None) -> Any:
    first: dict[str, Any] = {"params": [("layers.0.qkv.weight", params[0])], "lr_scale": 2.0}
    if kind is Muon:
        first |= {"muon": True, "momentum": 0.5}
    return kind([first, {"params": [("bias", params[1])]}], lr=0.1, fused=fused)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", [ElectraAdam, Muon])
def test_a_copy_goes_on_as_the_original_does(kind: Any, captured: bool, fused: bool | None, copied: Any) -> None:
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]
    optimizer = made(kind, params, fused)
    if captured:
        optim.make_capturable(optimizer, torch.device("cpu"))
    gradients(params, 0)
    optimizer.step()
    others, other = copied((params, optimizer))
    assert other.fused is fused and reads_found_inf(other)
    for ps, o in ((params, optimizer), (others, other)):
        gradients(ps, 1)
        optim.set_learning_rate(o, 0.01)
        o.step()
        o.found_inf = torch.tensor(1.0)
        o.step()
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, others, strict=True))


def test_a_state_that_is_loaded_leaves_the_rest() -> None:
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]
    optimizer, kernel = made(ElectraAdam, params, False), made(ElectraAdam, params, True)
    gradients(params, 0)
    kernel.step()
    infinite = kernel._infinite_step(torch.device("cpu"))
    kernel.load_state_dict(optimizer.state_dict())
    assert kernel.fused is True, "the choice is not part of the state"
    assert kernel._infinite_step(torch.device("cpu")) is infinite, "a captured step reads it at its address"
