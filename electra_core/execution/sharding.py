"""Sharded models, of which every rank stores only a part: `--sharding fsdp`.

Each rank stores a part of every parameter and of the optimizer's state (FSDP2, `fully_shard`); a layer is gathered
just before it is used. Gradients are reduced after every part of a batch: keeping them whole would need the
memory that sharding saves. Checkpoints hold whole tensors (`gathered`, `placed_like`), so a run can be resumed
sharded or whole, and with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from electra_core.linear import cast_one_by_one


def shard(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """Splits the parameters of `model` over all ranks, in place, and moves them to `device`.

    Each of `layers` is gathered when it is used and freed afterwards; everything else, shared embeddings
    included, is gathered for the whole step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*dict.fromkeys(layers), model):
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        part.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    cast_one_by_one(model)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank stores only a part of `tensor` (a DTensor)."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes as long as all else in this file


def local(tensor: Tensor) -> Tensor:
    """The part that this rank stores, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, a whole tensor that every rank has, moved to the device of `target` and split in the same way."""
    value = value.to(target.device)
    if not is_sharded(target) or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


def norm_over_shards(norm: Tensor) -> Tensor:
    """The norm of a whole vector, from the norm of each rank's part."""
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()
