"""Sharded parameters: torchrun --nproc-per-node 2 examples/fully_shard.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

import gradsurgery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.near, self.far = nn.Linear(64, 1), nn.Linear(64, 1)

    def forward(self, x):
        z = self.trunk(x)
        return {"near": self.near(z), "far": self.far(z)}


dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(256, 4)
targets = {"near": inputs[:, :1].sin(), "far": 50 * inputs[:, 1:2]}
mine = slice(dist.get_rank(), None, dist.get_world_size())

model = Net()
for layer in model.trunk:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)
# Shard first. The optimizer then sees the sharded parameters, and exchanges what it needs by itself.
optimizer = gradsurgery.PCGrad(torch.optim.Adam(model.parameters(), lr=0.01))
for _ in range(100):
    outputs = model(inputs[mine])
    losses = {name: mse_loss(y, targets[name][mine]) for name, y in outputs.items()}
    optimizer.zero_grad()
    report = optimizer.backward(losses)
    optimizer.step()

held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
if dist.get_rank() == 0:
    print(f"{held} of {sum(p.numel() for p in model.parameters())} parameters here, losses {report.losses}")
dist.destroy_process_group()
