"""What the optimizers ask of tensors, and do to them, whatever their layout: dense, sparse or sharded."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rai_toolbox.functional._layout import blocks
from rai_toolbox.kernels._machine import is_on_cpu
from rai_toolbox.optim._torch_private import is_flattened, sparse_values

_ORDINARY = (Tensor, Parameter)


def is_sharded(x: Tensor) -> bool:
    """Return whether `x` is a DTensor."""
    return type(x) not in _ORDINARY and "torch.distributed.tensor" in sys.modules and isinstance(x, dtensor().DTensor)


def dtensor() -> Any:
    """Return `torch.distributed.tensor`: whoever has a DTensor has imported it, which takes a second."""
    return sys.modules["torch.distributed.tensor"]


def has_nonzero(x: Tensor) -> bool:
    """Return whether any entry is not zero; NaN is not."""
    return bool((sparse_values(x) if x.layout is torch.sparse_coo else x).any())


def refuse_flattened(params: Iterable[Tensor], owner: str) -> None:
    """Raise if FSDP1 flattened a parameter: its data are no longer where `param_ndim` says."""
    if any(map(is_flattened, params)):
        raise TypeError(
            f"{owner} acts on data, and FullyShardedDataParallel (FSDP1) has flattened the parameters that they lie "
            f"in: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def scale_and_shift_(tensors: Iterable[Tensor], scale: float, bias: float) -> None:
    """Multiply every tensor by `scale`, then add `bias`, in place and in one pass."""
    if bias == 0:
        if scale != 1:
            for x in tensors:
                (sparse_values(x) if x.layout is torch.sparse_coo else x).mul_(scale)
        return
    for x in tensors:
        if x.layout is not torch.strided:
            raise TypeError(
                "`grad_bias` would make a sparse gradient dense: leave it 0 for parameters with sparse gradients"
            )
        if scale == 1:
            x.add_(bias)
        elif is_on_cpu(x):  # rounded twice, as by hand: one `add` with `alpha` would round once
            for block in blocks(x, 0):
                block.mul_(scale).add_(bias)
        else:
            torch.add(x.new_full((), bias), x, alpha=scale, out=x)
