"""GradNorm's toy: ten regressions, or two, whose targets differ in scale only.

Chen et al., ICML 2018, arXiv 1711.02257, section 4: 250 inputs, 100 outputs, four shared layers of 100 neurons,
α = 0.12. The paper does not say for how long, with which learning rate and on how many samples a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import gradsurgery
from gradsurgery.problems import ScaledRegression

LR, BATCH, ALPHA = 1e-3, 100, 0.12
SCALES = {"two": (1.0, 100.0), "ten": ScaledRegression.TEN}
METHODS = ("plain sum", "GradNorm", "uncertainty")


def train(scales: tuple[float, ...], method: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Train one network.

    Args:
        scales: σ of each task.
        method: One of `METHODS`.
        seed: Seed of the data, of the batches and of the network, which is the same for all methods.
        steps: Number of steps.

    Returns:
        Test loss of each task over that at the start, and the weights, averaged over the second half of training.
    """
    toy = ScaledRegression(tuple(scales), seed=seed)
    model = toy.model()
    test = toy.inputs(0, size=1000)
    first = toy.relative_losses(model, test)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=LR)
    if method == "GradNorm":
        optimizer = gradsurgery.GradNormWeighter(optimizer, model.last_shared.weight, alpha=ALPHA)
    elif method == "uncertainty":
        optimizer = gradsurgery.UncertaintyWeighter(optimizer, lr=0.025)
    weights = np.full(len(scales), float(method == "plain sum"))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        losses = toy.losses(model, toy.inputs(step, size=BATCH))
        if method == "plain sum":
            torch.stack(losses).sum().backward()
        else:
            report = optimizer.backward(losses)
            if step > steps // 2:
                weights += np.array(list(report.weights.values())) / (steps - steps // 2)
        optimizer.step()
    ratios = toy.relative_losses(model, test) / first
    return {name: [round(x, 5) for x in values.tolist()] for name, values in (("ratios", ratios), ("weights", weights))}


def run(quick: bool = False) -> dict[str, Any]:
    """Train on two and on ten tasks with each method.

    Args:
        quick: Fewer steps, one seed.

    Returns:
        For two and ten tasks, each method's results, one per seed.
    """
    steps, seeds = (40, 1) if quick else (2000, 3)
    return {
        "steps": steps,
        "seeds": seeds,
        **{
            name: {
                "scales": list(scales),
                "methods": {
                    method: [train(scales, method, seed, steps) for seed in range(seeds)] for method in METHODS
                },
            }
            for name, scales in SCALES.items()
        },
    }
