"""A compiled model, a warm-up with the plain sum, and new weights in every fourth step only.

Leave `backend` out for the default one, which compiles for longer.
"""

import torch
from torch import nn

import gradsurgery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(3))

    def forward(self, x):
        z = self.trunk(x)
        return [head(z) for head in self.heads]


torch.manual_seed(0)
net = Net()
model = torch.compile(net, backend="aot_eager")
optimizer = gradsurgery.NashMTL(
    torch.optim.Adam(net.parameters(), lr=0.01),
    shared_params=net.trunk.parameters(),  # found as well without, at a pass per loss where weights are reused
    warmup=10,
    every=4,
)
inputs = torch.randn(256, 6)
targets = [scale * inputs[:, i : i + 1].sin() for i, scale in enumerate((1, 10, -100))]
flags = []

for _ in range(60):
    outputs = model(inputs)
    losses = [nn.functional.mse_loss(y, t) for y, t in zip(outputs, targets, strict=True)]
    optimizer.zero_grad()
    report = optimizer.backward(losses)
    flags += report.flags
    optimizer.step()

seen = {flag: flags.count(flag) for flag in ("warmup", "reused")}
print(f"losses {report.losses}, of 60 steps {seen}")
