"""Sharded training: `torchrun --nproc-per-node 2 examples/fsdp2.py`.

Norms of whole tensors cost one collective a step, whatever the number of parameters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import accuracy, classifier, data
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import L2ProjectedOptim


def main() -> float:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, y = data()
    model = classifier()
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,)))
    optim = L2ProjectedOptim(model.parameters(), torch.optim.SGD, lr=0.3, epsilon=12.0, param_ndim=None)
    torch.manual_seed(0)
    for batch in torch.randperm(len(x)).split(64)[:60]:
        mine = batch[rank::ranks]
        loss = cross_entropy(model(x[mine]), y[mine])
        optim.zero_grad()
        loss.backward()
        optim.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dist.destroy_process_group()
    if rank > 0:
        return 0.0
    whole = classifier()
    whole.load_state_dict(state)
    assert all(p.norm() <= 12.001 for p in whole.parameters())
    return accuracy(whole)


if __name__ == "__main__":
    result = main()
    if result:
        print(f"accuracy: {result:.3f}")
