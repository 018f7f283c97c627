"""ConFIG's comparison in small: a network that solves the Burgers equation, trained on three losses.

    u_t + u u_x = ν u_xx    for x in [−1, 1], t in [0, 1];    u(x, 0) = −sin πx,    u(±1, t) = 0

Liu, Chu & Thuerey, ConFIG, ICLR 2025, arXiv 2408.11104; their settings are in the configuration files of their
repository.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery
from benchmarks.evidence.physics import burgers, burgers_points

LOSSES = ("equation", "boundary", "initial")


class Network(nn.Module):
    """A tanh network of (x, t), which gives u and the derivatives of u that the equation needs.

    Args:
        width: Neurons of each hidden layer.
        depth: Number of hidden layers.
        seed: Seed of the weights (Xavier, normal).
    """

    def __init__(self, width: int, depth: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [2] + [width] * depth + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise(sizes):
            self.weights.append(math.sqrt(2.0 / (a + b)) * torch.randn(a, b, generator=generator))
            self.biases.append(torch.full((b,), 1e-3))

    def forward(self, points: Tensor) -> Tensor:
        """u at points (x, t) of shape (n, 2): n numbers."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            points = torch.tanh(points @ weight + bias)
        return (points @ self.weights[-1] + self.biases[-1])[:, 0]

    def derivatives(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, u_x, u_t and u_xx at points (x, t) of shape (n, 2), carried forward layer by layer."""
        one, zero = torch.ones(len(points), 1), torch.zeros(len(points), 1)
        x, t = torch.cat([one, zero], dim=1), torch.cat([zero, one], dim=1)
        layers = torch.stack([points, x, t, torch.zeros_like(points)])  # value, ∂x, ∂t, ∂xx of each neuron
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            value, x, t, xx = (layers @ weight).unbind()
            value = value + bias
            if i == len(self.weights) - 1:
                return value[:, 0], x[:, 0], t[:, 0], xx[:, 0]
            bent = torch.tanh(value)
            slope = 1.0 - bent * bent
            layers = torch.stack([bent, slope * x, slope * t, slope * (xx - 2.0 * bent * x * x)])
        raise AssertionError("a network has a last layer")


@dataclass(frozen=True)
class Size:
    """How small the comparison is.

    Attributes:
        steps: Steps of every method, each with all losses but for M-ConFIG.
        seeds: Number of networks.
        viscosity: ν.
        width: Neurons of a hidden layer.
        depth: Hidden layers.
        inside: Points for the equation, new in each step.
        edge: Points for the boundary, and as many for the initial values.
        lr: Learning rate at its height.
    """

    steps: int = 2000
    seeds: int = 3
    viscosity: float = 0.1 / math.pi
    width: int = 20
    depth: int = 3
    inside: int = 200
    edge: int = 40
    lr: float = 5e-3


QUICK = Size(steps=12, seeds=1)
# How each wraps Adam. The constants of ReLoBRaLo are those of the paper's script.
METHODS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "plain sum": gradsurgery.FixedWeighter,
    "boundary and initial × 10": lambda base: gradsurgery.FixedWeighter(
        base, weights={"equation": 1.0, "boundary": 10.0, "initial": 10.0}
    ),
    "learning rate annealing": gradsurgery.LRAnnealingWeighter,
    "ReLoBRaLo": lambda base: gradsurgery.ReLoBRaLoWeighter(base, temperature=0.1),
    "PCGrad": gradsurgery.PCGrad,
    "IMTL-G": gradsurgery.IMTLG,
    "ConFIG": gradsurgery.ConFIG,
}
MOMENTUM = {"M-ConFIG, as many steps": 1, "M-ConFIG, as many gradients": len(LOSSES)}


def losses(model: Network, size: Size, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """The three losses on new points; each is computed when it is called."""
    inside = burgers_points(size.inside, generator)
    times = torch.rand(size.edge, generator=generator)
    places = 2.0 * torch.rand(size.edge, generator=generator) - 1.0
    sides = torch.where(torch.arange(size.edge) % 2 == 0, -1.0, 1.0)

    def equation() -> Tensor:
        u, x, t, xx = model.derivatives(inside)
        return (t + u * x - size.viscosity * xx).square().mean()

    def boundary() -> Tensor:
        return model(torch.stack([sides, times], dim=1)).square().mean()

    def initial() -> Tensor:
        start = model(torch.stack([places, torch.zeros_like(places)], dim=1))
        return (start + torch.sin(math.pi * places)).square().mean()

    return dict(zip(LOSSES, (equation, boundary, initial), strict=True))


def train(
    wrap: Callable[[torch.optim.Optimizer], Any], size: Size, seed: int, *, steps: int, one_loss: bool = False
) -> float:
    """Train one network.

    Args:
        wrap: Makes the method from its base optimizer.
        size: How small.
        seed: Seed of the network and of the points.
        steps: Number of steps.
        one_loss: One loss per step, in turn, over plain SGD: M-ConFIG. Otherwise all losses, over Adam.

    Returns:
        Mean square error against the exact solution.
    """
    model = Network(size.width, size.depth, seed)
    base = torch.optim.SGD if one_loss else torch.optim.Adam
    optimizer = wrap(base(model.parameters(), lr=size.lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        functions = losses(model, size, generator)
        turn = LOSSES[step % len(LOSSES)]
        optimizer.backward(
            {name: function() if not one_loss or name == turn else None for name, function in functions.items()}
        )
        optimizer.step()
        schedule.step()
    return error(model, size.viscosity)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up within 1 % of the steps, and down to a tenth along a cosine."""
    warm = max(1, steps // 100)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warm) / (steps - warm)))


@torch.no_grad()
def error(model: Network, viscosity: float) -> float:
    """Mean square error against the exact solution, on a grid of 128 places and 51 times."""
    x, t = torch.meshgrid(torch.linspace(-1.0, 1.0, 128), torch.linspace(0.0, 1.0, 51), indexing="xy")
    points = torch.stack([x.ravel(), t.ravel()], dim=1)
    exact = burgers(points.double(), viscosity=viscosity)
    return float(f"{float((model(points).double() - exact).square().mean()):.3e}")


def run(quick: bool = False) -> dict[str, Any]:
    """Train with every method.

    Args:
        quick: A few steps, one seed.

    Returns:
        The size, the errors of each method, one per seed, and how many gradients of single losses each computed.
    """
    size = QUICK if quick else Size()
    seeds, m = range(size.seeds), len(LOSSES)
    found = {name: [train(wrap, size, seed, steps=size.steps) for seed in seeds] for name, wrap in METHODS.items()}
    gradients = dict.fromkeys(METHODS, m * size.steps)
    for name, times in MOMENTUM.items():
        steps = times * size.steps
        found[name] = [train(gradsurgery.MConFIG, size, seed, steps=steps, one_loss=True) for seed in seeds]
        gradients[name] = steps
    return {"size": asdict(size), "methods": found, "gradients": gradients}
