"""Batches that lack the labels of some tasks: `None` says that a task is absent, and the method keeps its memory."""

import torch
from torch import nn

import gradsurgery

torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh())
heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in ("depth", "normal", "edge")})
optimizer = gradsurgery.PCD(
    torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01), primary="depth", nonfinite="drop"
)
seen = dict.fromkeys(heads, 0)

for step in range(200):
    x = torch.randn(64, 6)
    target = x[:, :1].sin()
    z = trunk(x)
    labelled = {"depth": True, "normal": step % 2 == 0, "edge": step % 5 == 0}
    losses = {name: (head(z) - target).square().mean() if labelled[name] else None for name, head in heads.items()}
    if step % 50 == 0:
        losses["edge"] = (heads["edge"](z) - target).mean() * float("nan")  # nonfinite="drop" treats it as absent

    optimizer.zero_grad()
    report = optimizer.backward(losses)
    optimizer.step()
    for name in report.losses:
        seen[name] += 1

print(f"steps with a loss of each task: {seen}; last losses {report.losses}")
