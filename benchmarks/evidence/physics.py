"""Physics-informed networks: the equation against boundary and initial values, judged by a known solution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.problem import Losses, Problem, Split, Start, mlp, seeded

WIDTH = 32


def jets(network: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and pure second derivatives of a tanh network, in one forward pass.

    Derivatives are carried from layer to layer, which is far cheaper than differentiating twice.

    Args:
        network: Linear layers with tanh between them, one output.
        x: Points, (n, d).

    Returns:
        u (n,), ∂u/∂xₖ (n, d) and ∂²u/∂xₖ² (n, d).
    """
    n, d = x.shape
    # (1 + 2d, n, width): the value, d first and d second derivatives.
    carried = torch.cat([x[None], torch.eye(d)[:, None].expand(d, n, d), torch.zeros(d, n, d)])
    for layer in network:
        if isinstance(layer, nn.Linear):
            carried = carried @ layer.weight.T
            carried = torch.cat([carried[:1] + layer.bias, carried[1:]])
        else:
            value = torch.tanh(carried[:1])
            slope = 1.0 - value * value
            first, second = carried[1 : d + 1], carried[d + 1 :]
            carried = torch.cat([value, slope * first, slope * (second - 2.0 * value * first * first)])
    u = carried[..., 0]
    return u[0], u[1 : d + 1].T, u[d + 1 :].T


def square_boundary(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Points on the four sides of a square, (count, 2)."""
    points = low + (high - low) * torch.rand(count, 2, generator=generator)
    sides = torch.arange(count) % 4
    points[torch.arange(count), sides // 2] = torch.where(sides % 2 == 0, low, high)
    return points


# ----------------------------------------------------------------------------------------------- exact solutions


def poisson(x: Tensor) -> Tensor:
    """u = ½ eˣ sin πy + ½ sin πx on the unit square: −Δu = f with :func:`poisson_source`."""
    return 0.5 * torch.exp(x[:, 0]) * torch.sin(math.pi * x[:, 1]) + 0.5 * torch.sin(math.pi * x[:, 0])


def poisson_source(x: Tensor) -> Tensor:
    """−Δu of :func:`poisson`."""
    first = 0.5 * (math.pi**2 - 1.0) * torch.exp(x[:, 0]) * torch.sin(math.pi * x[:, 1])
    return first + 0.5 * math.pi**2 * torch.sin(math.pi * x[:, 0])


#: Wave numbers of the Helmholtz solution along the axes, in units of π, and the number k of the equation.
WAVES, K = (1.0, 2.0), 1.0


def helmholtz(x: Tensor) -> Tensor:
    """u = sin(a πx) sin(b πy) on (−1, 1)²: Δu + k² u = q with :func:`helmholtz_source`."""
    return torch.sin(WAVES[0] * math.pi * x[:, 0]) * torch.sin(WAVES[1] * math.pi * x[:, 1])


def helmholtz_source(x: Tensor) -> Tensor:
    """Δu + k² u of :func:`helmholtz`."""
    return (K**2 - math.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)) * helmholtz(x)


#: Viscosity of Burgers' equation. Much larger than the usual 0.01/π, which no short training gets near.
VISCOSITY = 0.05


def burgers(x: Tensor, order: int = 100, viscosity: float = VISCOSITY) -> Tensor:
    """The solution of u_t + u u_x = ν u_xx with u(x, 0) = −sin πx and u(±1, t) = 0.

    By the Cole-Hopf transformation, u is a ratio of two integrals against a heat kernel; Gauss-Hermite quadrature gives
    both. No network and no difference scheme is involved.

    Args:
        x: Points (x, t), (n, 2), with t ≥ 0.
        order: Number of nodes.
        viscosity: ν.

    Returns:
        u, (n,), in the dtype of `x`.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(order)
    place, time = x.double().numpy().T
    shifted = place[:, None] - np.sqrt(4.0 * viscosity * time)[:, None] * nodes
    exponent = -np.cos(np.pi * shifted) / (2.0 * np.pi * viscosity)
    heat = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return torch.from_numpy(-(heat * np.sin(np.pi * shifted)).sum(axis=1) / heat.sum(axis=1)).to(x.dtype)


# ----------------------------------------------------------------------------------------------- the problems

Residuals = Callable[[nn.Sequential, torch.Generator], Losses]


def poisson_residuals(network: nn.Sequential, generator: torch.Generator) -> Losses:
    inside = torch.rand(64, 2, generator=generator)
    edge = square_boundary(24, 0.0, 1.0, generator)
    _, _, second = jets(network, inside)
    return {
        "equation": second.sum(dim=1) + poisson_source(inside),
        "boundary": network(edge)[:, 0] - poisson(edge),
    }


def helmholtz_residuals(network: nn.Sequential, generator: torch.Generator) -> Losses:
    inside = 2.0 * torch.rand(96, 2, generator=generator) - 1.0
    edge = square_boundary(32, -1.0, 1.0, generator)
    u, _, second = jets(network, inside)
    return {
        "equation": second.sum(dim=1) + K**2 * u - helmholtz_source(inside),
        "boundary": network(edge)[:, 0],
    }


def burgers_residuals(network: nn.Sequential, generator: torch.Generator) -> Losses:
    inside = burgers_points(64, generator)
    ends = torch.stack([torch.arange(24) % 2 * 2.0 - 1.0, torch.rand(24, generator=generator)], dim=1)
    first = torch.stack([2.0 * torch.rand(24, generator=generator) - 1.0, torch.zeros(24)], dim=1)
    u, slopes, second = jets(network, inside)
    return {
        "equation": slopes[:, 1] + u * slopes[:, 0] - VISCOSITY * second[:, 0],
        "boundary": network(ends)[:, 0],
        "initial": network(first)[:, 0] + torch.sin(math.pi * first[:, 0]),
    }


def unit_points(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 2, generator=generator)


def centred_points(count: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.rand(count, 2, generator=generator) - 1.0


def burgers_points(count: int, generator: torch.Generator) -> Tensor:
    """Points (x, t) with −1 < x < 1 and 0 < t < 1."""
    return torch.rand(count, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


@functools.cache
def _truth(
    solution: Callable[[Tensor], Tensor], points: Callable[[int, torch.Generator], Tensor], split: Split
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed({"validation": 1, "test": 2}[split])
    x = points(1000, generator)
    return x, solution(x)


def begin(
    seed: int,
    residuals: Residuals,
    solution: Callable[[Tensor], Tensor],
    points: Callable[[int, torch.Generator], Tensor],
) -> Start:
    with seeded(seed):
        network = nn.Sequential(*mlp([2, WIDTH, WIDTH, WIDTH], nn.Tanh), nn.Linear(WIDTH, 1))

    def of_step(step: int, draw: int) -> Losses:
        return residuals(network, torch.Generator().manual_seed(((seed + 1) * 10_000 + step) * 3 + draw))

    def losses(step: int, draw: int) -> Losses:
        return {name: r.square().mean() for name, r in of_step(step, draw).items()}

    def scaled(step: int) -> Losses:
        return {name: r / math.sqrt(len(r)) for name, r in of_step(step, 0).items()}

    @torch.no_grad()
    def errors(split: Split) -> dict[str, float]:
        x, u = _truth(solution, points, split)
        return {"solution": float((network(x)[:, 0] - u).norm() / u.norm())}

    return Start(network, list(network[-1].parameters()), losses, errors, None, scaled)


def _problem(name: str, says: str, losses: tuple[str, ...], steps: int, *parts: Callable) -> Problem:
    residuals, solution, points = parts
    return Problem(
        name,
        "physics-informed networks",
        f"{says} A tanh network of three layers of {WIDTH}, new points in every step. Error: relative L² distance from "
        "the solution, in validation too.",
        losses,
        ("solution",),
        functools.partial(begin, residuals=residuals, solution=solution, points=points),
        steps,
        1e-2,
        alone=False,
        has_priors=False,
        has_residuals=True,
    )


PROBLEMS = (
    _problem(
        "Poisson",
        "−Δu = f on the unit square, with boundary values that are not zero.",
        ("equation", "boundary"),
        120,
        poisson_residuals,
        poisson,
        unit_points,
    ),
    _problem(
        "Helmholtz",
        "Δu + u = q on (−1, 1)², for u = sin πx sin 2πy.",
        ("equation", "boundary"),
        220,
        helmholtz_residuals,
        helmholtz,
        centred_points,
    ),
    _problem(
        "Burgers",
        f"u_t + u u_x = {VISCOSITY:g} u_xx from −sin πx; the solution to compare with is a Cole-Hopf quadrature.",
        ("equation", "boundary", "initial"),
        150,
        burgers_residuals,
        burgers,
        burgers_points,
    ),
)
