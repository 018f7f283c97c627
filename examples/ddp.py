"""Two processes, each on half of every batch: torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import gradsurgery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.near, self.far = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x):
        z = self.trunk(x)
        return {"near": self.near(z), "far": self.far(z)}


dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(256, 4)
targets = {"near": inputs[:, :1].sin(), "far": 50 * inputs[:, 1:2]}
mine = slice(dist.get_rank(), None, dist.get_world_size())  # this process sees every second sample

model = DistributedDataParallel(Net())
# The gradients of each loss are added up over the processes before the method sees them.
optimizer = gradsurgery.ConFIG(torch.optim.Adam(model.parameters(), lr=0.01), distributed=True)
for _ in range(200):
    outputs = model(inputs[mine])
    losses = {name: mse_loss(y, targets[name][mine]) for name, y in outputs.items()}
    optimizer.zero_grad()
    report = optimizer.backward(losses)
    optimizer.step()

sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
everyone = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, sums)
if dist.get_rank() == 0:
    same = all(torch.equal(sums, other) for other in everyone)
    print(f"losses over the whole batch: {report.losses}; replicas are equal: {same}")
del model  # before its group: torch may wait for ever where a model is the last to hold one
dist.destroy_process_group()
