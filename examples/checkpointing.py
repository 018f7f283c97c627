"""Activation checkpointing: the trunk is computed again for each loss instead of being kept."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4)]
        self.blocks = nn.ModuleList(layers)
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(2))
        self.forwards = 0

    def block(self, layer, x):
        self.forwards += 1
        return layer(x)

    def forward(self, x):
        for layer in self.blocks:
            x = checkpoint(self.block, layer, x, use_reentrant=False)
        return x, [head(x) for head in self.heads]


torch.manual_seed(0)
inputs = torch.randn(64, 16)
for name, features in (("surgery on the trunk", False), ("surgery on its output", True)):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01))
    z, (up, down) = net(inputs)
    losses = {"up": (up - 1).square().mean(), "down": (down + 1).square().mean()}
    optimizer.backward(losses, features=z if features else None)
    optimizer.step()
    print(f"{name}: {net.forwards} runs of the 4 blocks")
