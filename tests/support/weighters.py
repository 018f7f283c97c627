"""What the tests of weighting methods have in common."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.support.weighting_catalogue import NAMES, tied

SEQUENCES = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())["sequences"]
A = np.array(SEQUENCES["_inputs"]["A"])


def memory(optimizer):
    return copy.deepcopy(optimizer.state_dict()["gradsurgery"]["memory"])


def setting(build, m=3, **switches):
    p = nn.Parameter(torch.zeros(m, dtype=torch.float64))
    return p, build(torch.optim.SGD([p], lr=0.0), **switches)


def step(optimizer, p, values, names=NAMES):
    """One full step; returns the applied weights."""
    optimizer.zero_grad()
    losses = tied(p, [1.0 if v is None else v for v in values])
    report = optimizer.backward(
        {n: None if v is None else loss for n, v, loss in zip(names, values, losses, strict=False)}
    )
    optimizer.step()
    return np.array(list(report.weights.values()))
