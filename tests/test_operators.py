"""How operators are called: as custom operators where PyTorch has to see them, else as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from electra_kernels.operators import Operator
from kernel_helpers import INTERPRETED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks import bench_host
from electra_core.execution.fake_step import Recorder

CALLS: list[str] = []


def _cube(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    CALLS.append("cube")
    return factor * x**3, (x > 0).long()


def _cube_backward(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    CALLS.append("cube_backward")
    return dy * 3 * factor * x**2


cube, cube_backward = Operator("test_cube", _cube), Operator("test_cube_backward", _cube_backward)
cube.register_fake(lambda x, factor: (torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)))
cube_backward.register_fake(lambda dy, x, factor: torch.empty_like(x))


def _save(ctx: object, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.factor = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(x)  # type: ignore[attr-defined]


def _differentiate(ctx: object, dy: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return cube_backward(dy, x, ctx.factor), None  # type: ignore[attr-defined]


cube.register_autograd(_differentiate, setup_context=_save)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def value_and_gradient(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    x = torch.linspace(-2, 2, 5, requires_grad=True)
    y, positive = function(x, 0.5)
    assert y.requires_grad and not positive.requires_grad
    return [y.detach(), positive, *torch.autograd.grad(y.sum(), x)]


def test_as_it_is_and_as_a_custom_operator_it_gives_the_same() -> None:
    for direct, custom in zip(value_and_gradient(cube), value_and_gradient(cube.custom), strict=True):
        assert torch.equal(direct, custom)


def test_the_dispatcher_is_left_out_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*_: object) -> None:
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(cube, "custom", seen)
    monkeypatch.setattr(cube_backward, "custom", seen)
    value_and_gradient(cube)
    with torch.no_grad():
        cube(torch.ones(2), 1.0)
    assert CALLS == ["cube", "cube_backward", "cube"]


def test_who_watches_sees_an_operator() -> None:
    with Recorder() as recorder:
        cube(torch.ones(3), 1.0)
    assert "electra_kernels::test_cube" in recorder.launches["losses"]


def test_who_traces_gets_what_the_results_look_like() -> None:
    """The function itself is not called: there are no values."""
    x = torch.ones(3)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert cube(fake, 1.0)[0].shape == x.shape
    assert cube(fake, 1.0)[0].shape == x.shape  # outside of the mode, too
    assert cube(x.to("meta"), 1.0)[0].is_meta
    assert not CALLS


def test_torch_compile_functorch_and_other_classes_of_tensors() -> None:
    class Marked(Tensor):
        """A tensor with operations of its own, as far as anybody knows."""

    x = torch.ones(3)
    compiled = torch.compile(lambda x: cube(x, 2.0)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * x + 1)
    assert torch.equal(torch.func.vmap(lambda row: cube(row, 2.0)[0])(x[None]), 2 * x[None])
    assert type(cube(x.as_subclass(Marked), 1.0)[0]) is Marked


def test_without_a_formula_a_gradient_is_refused_and_not_lost() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd"):
        cube_backward(torch.ones(3), x, 1.0).sum().backward()
    y, _ = cube(x, 1.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):  # a second derivative
        dx.sum().backward()


def test_the_hosts_time_can_be_measured() -> None:
    if not INTERPRETED:
        pytest.skip("Triton's launchers are left out of the interpreter only")
    for times in bench_host.measure(layers=1, rounds=1).values():
        assert len(times) == 1 and times[0] > 0


def test_opcheck() -> None:
    opcheck(cube.custom, (torch.ones(3, requires_grad=True), 0.5))
    opcheck(cube_backward.custom, (torch.ones(3), torch.ones(3), 0.5))
