"""What the tests of methods that act on rows have in common."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())
SEQUENCES = REFERENCE["sequences"]
JS = torch.tensor(SEQUENCES["_inputs"]["JS"], dtype=torch.float64)  # nine matrices (3, 4)
LOSSES = np.array(SEQUENCES["_inputs"]["A"])  # eight steps of three positive losses


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def lossy(rows, p, values=None):
    """Losses with the given gradients at p, and the given values."""
    values = range(1, len(rows) + 1) if values is None else values
    return [g @ p - (g @ p).detach() + v for g, v in zip(rows, values, strict=True)]


def simplex(v):
    """Projection on the simplex, by bisection of the shift."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - high, 0)


class Net(nn.Module):
    """A trunk and one head a task."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def errors(self, x):
        z = torch.tanh(self.trunk(x))
        return {f"t{i}": (h(z) - t).square() + 0.1 for i, (h, t) in enumerate(zip(self.heads, (1, -3, 9), strict=True))}

    def forward(self, x, absent=()):
        return {name: None if name in absent else e.mean() for name, e in self.errors(x).items()}


def tensors_in(memory):
    if isinstance(memory, torch.Tensor):
        return [memory]
    values = memory.values() if isinstance(memory, dict) else memory if isinstance(memory, list) else ()
    return [t for value in values for t in tensors_in(value)]


def memory_of(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]
