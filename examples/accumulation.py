"""Four micro-batches a step: the method acts once, on the gradients of the whole batch."""

import torch
from torch import nn

import gradsurgery

PARTS = 4

inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
targets = torch.cat([inputs[:, :1].sin(), -5 * inputs[:, :1]], dim=1)


def losses(model, batch):
    first, second = (model(inputs[batch]) - targets[batch]).square().mean(0)
    return {"first": first, "second": second}


def train(in_parts):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = gradsurgery.UPGrad(torch.optim.AdamW(model.parameters(), lr=0.01))
    for _ in range(50):
        optimizer.zero_grad()
        if in_parts:
            for k, batch in enumerate(torch.arange(64).chunk(PARTS)):
                parts = {name: loss / PARTS for name, loss in losses(model, batch).items()}  # divide, as always
                report = optimizer.backward(parts, accumulate=k < PARTS - 1)
        else:
            report = optimizer.backward(losses(model, torch.arange(64)))
        optimizer.step()
    return model, report


(in_parts, report), (at_once, _) = train(True), train(False)
apart = max((p - q).abs().max().item() for p, q in zip(in_parts.parameters(), at_once.parameters(), strict=True))
print(f"losses {report.losses}; parameters differ by {apart:.0e} from training on whole batches")
