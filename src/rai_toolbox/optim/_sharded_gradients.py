"""What a step asks of the gradients of sharded parameters before it changes them: sums carried out, all zero or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rai_toolbox.optim._shards import Layout, as_sharded, local_part, part_of
from rai_toolbox.optim._tensors import dtensor, has_nonzero, is_sharded


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Give every sharded parameter a gradient with its own placements: pending sums (`Partial`) are carried out.

    `param.grad` is then another tensor. All pending sums over one dimension of a mesh take one collective.
    """
    pending: dict[Any, list[Tensor]] = {}
    settled: list[tuple[Any, Tensor]] = []
    for p in params:
        grad: Any = p.grad
        if not is_sharded(p) or grad is None or not is_sharded(grad):
            continue
        if grad.placements == p.placements:  # pyright: ignore[reportAttributeAccessIssue]
            continue
        dims = _dims_to_sum(grad, p)
        if dims is None:
            p.grad = grad.redistribute(placements=p.placements)  # pyright: ignore[reportAttributeAccessIssue]
            continue
        part = local_part(grad).contiguous()
        for d in dims:
            group = grad.device_mesh.get_group(d)
            pending.setdefault((group.group_name, part.dtype), [group]).append(part)
        settled.append((p, part))
    for group, *parts in pending.values():
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))
    for p, part in settled:
        p.grad = as_sharded(part, p)


def _dims_to_sum(grad: Any, p: Any) -> list[int] | None:
    """The dimensions of the mesh over which a sum is all that is missing. None: something else is."""
    if grad.device_mesh != p.device_mesh or grad.device_mesh.get_coordinate() is None:
        return None
    dims = []
    for d, (have, want) in enumerate(zip(grad.placements, p.placements, strict=True)):
        if isinstance(have, dtensor().Partial) and have.reduce_op == "sum" and isinstance(want, dtensor().Replicate):
            dims.append(d)
        elif have != want:
            return None
    return dims


def all_zero(grads: Sequence[Any]) -> bool:
    """Whether all entries are zero on every rank of the meshes; the same answer on all of them."""
    nonzero = any(has_nonzero(local_part(g) if is_sharded(g) else g) for g in grads)
    groups: dict[str, Any] = {}
    for g in grads:
        if is_sharded(g) and g.device_mesh.get_coordinate() is not None:
            for d in range(g.device_mesh.ndim):
                group = g.device_mesh.get_group(d)
                groups.setdefault(group.group_name, (group, g.device_mesh.device_type))
    for group, device in groups.values():
        flag = torch.tensor(float(nonzero), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        nonzero = bool(flag)
    return not nonzero


def own_parts(*tensors: Any) -> tuple[Tensor, ...]:
    """This rank's parts of tensors that broadcast to the first, which is sharded; plain ones are whole everywhere."""
    layout = Layout(tensors[0])
    if layout.coordinate is None:
        return tuple(x.new_empty(0) for x in map(local_part, tensors[:1]) for _ in tensors)
    held = layout.held(layout.coordinate)
    return tuple(local_part(x) if is_sharded(x) else part_of(x.expand(layout.shape), held) for x in tensors)
