"""Train a classifier of digits whose parameters are sharded; see fsdp2.md beside it.

torchrun --standalone --nproc-per-node 2 docs/tutorials/sharded_digits.py losses.json
"""

import json
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rai_toolbox.optim import L2NormedGradientOptim


def train(rank: int, ranks: int) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)  # the same weights and the same order of batches on every rank
    scans = load_digits()
    x, y = torch.tensor(scans.data / 16, dtype=torch.float32), torch.tensor(scans.target)
    model = nn.Sequential(nn.Linear(64, 63), nn.ReLU(), nn.Linear(63, 10))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = L2NormedGradientOptim(
        model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, param_ndim=None
    )
    losses = []
    for batch in torch.randperm(1792).split(64) * 3:
        mine = batch[rank::ranks]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    losses, model = train(dist.get_rank(), dist.get_world_size())
    shards = [0] * dist.get_world_size()
    dist.all_gather_object(
        shards,
        [tuple(p.to_local().shape) for p in model.parameters() if isinstance(p, DTensor)],
    )
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump({"losses": losses, "shards": shards}, file)
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()
