"""Replicas on several processes, stopped and resumed: `torchrun --nproc-per-node 2 examples/data_parallel.py`.

Half of the training is done, saved by torch.distributed.checkpoint, loaded into new replicas, and finished.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import accuracy, classifier, data
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rai_toolbox.optim import L1qNormedGradientOptim, ParamTransformingOptimizer


def replica() -> tuple[nn.Module, ParamTransformingOptimizer]:
    """A model, and an optimizer that draws how many entries of each gradient it keeps: the same on every rank."""
    model = DistributedDataParallel(classifier())
    return model, L1qNormedGradientOptim(model.parameters(), lr=2.0, q=0.5, dq=0.2, param_ndim=None)


def train(model: nn.Module, optim: ParamTransformingOptimizer, batches: tuple[Tensor, ...]) -> None:
    """One step for each batch, of which each rank takes its part."""
    x, y = data()
    for batch in batches:
        mine = batch[dist.get_rank() :: dist.get_world_size()]
        optim.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        optim.step()


def main(folder: str) -> float:
    """The accuracy on all digits."""
    dist.init_process_group("gloo")
    batches = torch.randint(1797, (120, 64), generator=torch.Generator().manual_seed(0)).unbind()
    model, optim = replica()
    train(model, optim, batches[:60])
    weights, state = get_state_dict(model, optim)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)

    model, optim = replica()
    weights, state = get_state_dict(model, optim)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_state_dict(model, optim, model_state_dict=weights, optim_state_dict=state)
    train(model, optim, batches[60:])
    dist.destroy_process_group()
    return accuracy(model.module)


if __name__ == "__main__":
    print(f"accuracy: {main(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir() + '/digits'):.3f}")
