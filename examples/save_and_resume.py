"""Stop after half of the steps, save, load into fresh objects, and end where the uninterrupted run ends."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import gradsurgery

inputs = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
targets = [inputs[:, :1].sin(), -2 * inputs[:, :1]]


def fresh():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    weighter = gradsurgery.GradNormWeighter(torch.optim.AdamW(model.parameters(), lr=0.01), model[0].parameters())
    optimizer = gradsurgery.PCGrad(weighter)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def train(run, steps):
    model, optimizer, scheduler = run
    for _ in range(steps):
        outputs = model(inputs).split(1, dim=1)
        optimizer.zero_grad()
        optimizer.backward([nn.functional.mse_loss(y, t) for y, t in zip(outputs, targets, strict=True)])
        optimizer.step()
        scheduler.step()


whole = fresh()
train(whole, 40)

half = fresh()
train(half, 20)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    torch.save([part.state_dict() for part in half], path)
    saved = torch.load(path, weights_only=True)

resumed = fresh()
for part, state in zip(resumed, saved, strict=True):
    part.load_state_dict(state)
train(resumed, 20)

equal = all(torch.equal(p, q) for p, q in zip(resumed[0].parameters(), whole[0].parameters(), strict=True))
print(f"bit for bit equal: {equal}; the memory of the weighter: {list(saved[1]['gradsurgery']['inner']['memory'])}")
