"""Linear layers that multiply in the precision the processor is fastest at.

**On a GPU**, autocast casts each weight and each bias to half precision in an operation of its own, and casts
their gradients back one by one. `cast_together` does that for all `Linear`s of a module at once: the same numbers
with a few launches instead of four per layer.

**On a CPU**, bf16 autocast multiplies in bf16, which many processors do at half the speed of fp32
(`electra_kernels/fast_bf16.py`). There `Linear` stores activations in bf16, to save memory, and multiplies in
fp32:

    y = bf16(x W^T + b),  dx = bf16(dy W),  dW = dy^T x,  db = sum over rows of dy        x, y, dx, dy in bf16

The operands are those of a bf16 product, except that W is not rounded; so the result is no farther from the exact
one. Processors that are fast at bf16 do multiply in bf16, and compute the sum over tokens dW = dy^T x with
`product_over_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from electra_kernels import bias_gelu
from electra_kernels.dispatch import use_triton
from electra_kernels.fast_bf16 import has_fast_bf16, product_over_rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters and names; the file's header says what differs, and where."""

    copies: tuple[Tensor, Tensor] | None = None
    """Weight and bias in half precision, inside `cast_together`."""
    one_by_one = False
    """Whether `cast_together` leaves this one out (`cast_one_by_one`)."""

    def forward(self, input: Tensor, add_bias: bool = True) -> Tensor:
        """[..., in] -> [..., out]; `add_bias=False` leaves the bias to the operation that follows."""
        if multiplies_by_itself(input):
            products = _Bf16Products if has_fast_bf16() else _Fp32Products
            return products.apply(input, self.weight, self.bias if add_bias else None)
        weight, bias = self.copies or (self.weight, self.bias)
        if weight.dtype != input.dtype and autocast_dtype(input) is None:  # rounded for autocast (`round_weights`)
            weight, bias = weight.to(input.dtype), bias.to(input.dtype)
        return F.linear(input, weight, bias if add_bias else None)


def leaves_bias(layer: nn.Module) -> bool:
    """Whether `layer` is exactly a `Linear` with a bias, so that its product can be computed without it.
    Replacements (an `nn.Linear`, an adapter, a parametrized or quantized layer, another `forward`) are called as
    they are, and so is a layer with hooks, which see all of its output."""
    return by_its_parts(layer)


def product_of(layer: nn.Module, input: Tensor) -> Tensor:
    """layer(input), without the bias that `bias_after` returns."""
    return layer(input, add_bias=False) if leaves_bias(layer) else layer(input)


def bias_after(layer: nn.Module) -> Tensor | None:
    """The bias that `product_of` left out, or None; added by a later operation, together with something else."""
    return layer.bias if leaves_bias(layer) else None  # type: ignore[return-value]


def by_its_parts(layer: nn.Module, kind: type[nn.Linear] = Linear) -> bool:
    """Whether weight and bias determine what calling `layer` does: that of an adapter is another class, and a hook
    may change either (pruning does), or the output."""
    return type(layer) is kind and layer.bias is not None and calls_just(layer, kind.forward)


def calls_just(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether to call `module` is to call this `forward` of a class: `is_unchanged`, and no hook on all modules,
    such as profilers and FLOP counters register, sees or changes what goes in or comes out, or its gradient."""
    return is_unchanged(module, forward) and not _has_any_global_hook()


def is_unchanged(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether neither a subclass nor the module itself has another `forward`, and it has no hooks of its own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return getattr(module.forward, "__func__", None) is forward and not any(hooks)


def gelu_of(layer: nn.Module, input: Tensor) -> Tensor:
    """GELU(layer(input)), by erf; in fewer passes where a kernel adds the bias, or where oneDNN fuses GELU into
    the product (in fast bf16 on a CPU, if no backward pass needs the values in between)."""
    if torch.compiler.is_compiling() or not by_its_parts(layer):  # torch.compile fuses these itself
        return F.gelu(layer(input))
    weight, bias = cast(Linear, layer).weight, cast(Linear, layer).bias
    if not torch.is_grad_enabled() and multiplies_by_itself(input) and has_fast_bf16():
        return _product_in_bf16(input.to(torch.bfloat16), weight.to(torch.bfloat16), bias, "gelu")
    if use_triton(input):
        return bias_gelu(layer(input, add_bias=False), bias)
    return F.gelu(layer(input))


def round_weights(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Rounds the `Linear` weights of an inference-only module once, instead of in every product, where
    products are done in bf16 on a CPU; elsewhere it does nothing. The results are the same. Biases stay as they
    are, because the operation after a product may add them in fp32."""
    if device.type == "cpu" and dtype == torch.bfloat16 and has_fast_bf16():
        for linear in module.modules():
            if isinstance(linear, Linear) and by_its_parts(linear):
                linear.weight.data = linear.weight.data.to(torch.bfloat16)


@contextmanager
def cast_together(module: nn.Module) -> Iterator[None]:
    """Inside, the `Linear`s of `module` multiply with copies in autocast's dtype, all made by one operation.

    Does nothing where autocast is off, on a CPU (there is no launch to save), while torch.compile traces (it fuses
    such operations itself), and after `cast_one_by_one`. What the backward pass recomputes
    (`encoder.set_recompute`) is left to autocast.
    """
    linears = [m for m in module.modules() if isinstance(m, Linear) and by_its_parts(m)]
    parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
    if not linears or linears[0].one_by_one or not _casts_together(parameters[0]):
        yield
        return
    dtype = autocast_dtype(parameters[0])
    copies = iter(_CastTogether.apply(dtype, *parameters))
    for linear in linears:
        linear.copies = next(copies), next(copies)
    try:
        yield
    finally:
        for linear in linears:
            linear.copies = None


def _casts_together(parameter: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and parameter.dtype == torch.float32
        and autocast_dtype(parameter) is not None
        and use_triton(parameter)
    )


def cast_one_by_one(model: nn.Module) -> None:
    """Makes `cast_together` leave the `Linear`s of `model` to autocast: their gradients are sent to other
    processes as they become ready, and cast together they would all be ready at the end."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.one_by_one = True


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast multiplies in on this tensor's device; None where it is off."""
    device = tensor.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return None  # the meta device; asking would break the graph of torch.compile in 2.11
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _CastTogether(torch.autograd.Function):
    """Copies in another dtype; gradients come back in the parameters' own dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.set_materialize_grads(False)
        copies = tuple(torch.empty_like(p, dtype=dtype) for p in parameters)
        torch._foreach_copy_(copies, parameters)
        ctx.mark_non_differentiable(*(copy for copy, p in zip(copies, parameters) if not p.requires_grad))
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        came = [g for g in gradients if g is not None]
        wide = [torch.empty_like(g, dtype=dtype) for g, dtype in zip(gradients, ctx.dtypes) if g is not None]
        if came:
            torch._foreach_copy_(wide, came)
        converted = iter(wide)
        return None, *(None if g is None else next(converted) for g in gradients)


def multiplies_by_itself(tensor: Tensor) -> bool:
    """Whether `Linear` does its own products: under bf16 autocast on a CPU, but not while torch.compile traces,
    nor while a step is traced as a GPU would run it (`execution.fake_step.trace_step`)."""
    return (
        tensor.device.type == "cpu"
        and autocast_dtype(tensor) == torch.bfloat16
        and not torch.compiler.is_compiling()
        and not use_triton(tensor)
    )


class _Fp32Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, ctx.has_bias = x.to(torch.bfloat16), bias is not None
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias).to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy_TO, x_TI = dy.flatten(0, -2).float(), x.flatten(0, -2).float()
        with torch.autocast("cpu", enabled=False):
            dx = (dy_TO @ weight).to(torch.bfloat16).view(x.shape)
            return dx, dy_TO.T @ x_TI, dy_TO.sum(0) if ctx.has_bias else None


def _product_in_bf16(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """x Wᵀ + b of bf16 x and W, then `then` ("none" or "gelu"), in one pass by oneDNN: torch's `F.linear` first
    writes the bias into every row. The operator is the one torch.compile uses; without it, several do the same."""
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    bias = None if bias is None else bias.to(torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        if fused is not None and x.numel():
            return fused(x, weight, bias, then, [], "none")
        y = F.linear(x, weight, bias)
        return F.gelu(y) if then == "gelu" else y


class _Bf16Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight, ctx.has_bias = x.to(torch.bfloat16), weight.to(torch.bfloat16), bias is not None
        ctx.save_for_backward(x, weight)
        return _product_in_bf16(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy_TO, x_TI = dy.flatten(0, -2).contiguous(), x.flatten(0, -2).contiguous()
        dx = (dy_TO @ weight).view(x.shape)
        db = dy_TO.sum(0).float() if ctx.has_bias else None
        return dx, product_over_rows(dy_TO, x_TI).float(), db
