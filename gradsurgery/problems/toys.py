"""Toy conflict problems of the literature, each with its Pareto set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsurgery.problems.problem import Problem

# Both landscapes with logarithmic valleys cut the logarithm off here, so that a valley has a floor.
_FLOOR = 5e-6


def quadratics(condition: float = 10.0) -> Problem:
    """Two bowls in the plane, fᵢ(θ) = ½ (θ − cᵢ)ᵀ Aᵢ (θ − cᵢ), with a Pareto set in closed form.

    Minima at (−1, 0) and (1, 0). The steep axes, of curvature 1, are tilted by 35 and −35 degrees; the flat ones have
    curvature 1 / `condition`. So one step size suits every conditioning: the gradient of f₁ + f₂ has Lipschitz constant
    at most 2. Both losses are strictly convex, and the Pareto points are the minimisers of λ f₁ + (1 − λ) f₂,

        θ(λ) = (λ A₁ + (1 − λ) A₂)⁻¹ (λ A₁ c₁ + (1 − λ) A₂ c₂),    0 ≤ λ ≤ 1:

    the segment between the minima for `condition` = 1, an arc that bends further out the larger it is.

    Args:
        condition: Ratio of the largest to the smallest curvature of each loss, at least 1.

    Returns:
        The problem, with six starts around the set.

    Raises:
        ValueError: If `condition` is below 1 or not finite.
    """
    if not 1.0 <= condition < math.inf:
        raise ValueError(f"quadratics: `condition` must be finite and >= 1, got {condition}. 1 gives round bowls.")
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    bowls = torch.stack([_bowl(35.0, condition), _bowl(-35.0, condition)])

    def losses(theta: Tensor) -> tuple[Tensor, ...]:
        offsets = [theta - centre.to(theta) for centre in centres]
        return tuple(0.5 * ((x @ bowl.to(theta)) * x).sum(dim=-1) for x, bowl in zip(offsets, bowls, strict=True))

    def pareto(t: Tensor) -> Tensor:
        # Near its ends the arc is fast in λ, the faster the flatter the bowls; cos² slows it down there.
        share = torch.cos(0.5 * math.pi * t.double()) ** 2
        weights = torch.stack([share, 1.0 - share], dim=-1)[..., None, None]
        matrix = (weights * bowls).sum(dim=-3)
        target = (weights * (bowls @ centres[..., None])).sum(dim=-3)
        return torch.linalg.solve(matrix, target)[..., 0]

    starts = ((-2.6, 1.8), (0.4, 2.3), (2.5, 1.6), (-2.4, -1.2), (-0.3, -1.9), (2.6, -1.7))
    return Problem(f"quadratics, condition {condition:g}", losses, pareto, starts, (-3.0, 3.0, -2.5, 2.5))


def pcgrad_valleys() -> Problem:
    """The landscape of the PCGrad paper: conflict, steep curvature and unequal gradients at once.

    ::

        f₁(θ) = 20 log max(|θ₁ / 2 + tanh θ₂|, 5e-6)
        f₂(θ) = 25 log max(|θ₁ / 2 − tanh θ₂ + 2|, 5e-6)

    with the natural logarithm. Each loss is a curved valley whose walls steepen like 1 / distance, down to a floor
    1e-5 wide (in θ₁ / 2) where its gradient is zero. For large θ₂ the valleys run together along θ₁ = −2, and from
    θ₂ = artanh(1 − 5e-6) ≈ 6.45 on their floors overlap. There both losses are at their minima at once: the Pareto
    front is one pair of values, there is nothing to trade, and the whole difficulty is to get there. ``pareto`` is the
    middle line of the overlap, which is at most 2e-5 wide, up to θ₂ = 20.

    Every point of either floor is Pareto stationary, since one gradient is zero, but only the overlap is optimal.

    Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782. The start is (0.5, −3); they
    take 500 000 steps of Adam at a learning rate of 1e-3.

    Returns:
        The problem, with the paper's start.
    """

    def losses(theta: Tensor) -> tuple[Tensor, ...]:
        half, bend = 0.5 * theta[..., 0], torch.tanh(theta[..., 1])
        return 20.0 * _log_distance(half + bend), 25.0 * _log_distance(half - bend + 2.0)

    def pareto(t: Tensor) -> Tensor:
        # 6.45 is artanh(1 − 5e-6) rounded up; beyond 20, tanh is 1 in float64 and nothing depends on θ₂ any more.
        height = 6.45 + (20.0 - 6.45) * t.double()
        return torch.stack([torch.full_like(height, -2.0), height], dim=-1)

    return Problem("PCGrad valleys", losses, pareto, ((0.5, -3.0),), (-5.0, 5.0, -4.0, 9.0))


def cagrad_basin(scale: float = 1.0) -> Problem:
    """The landscape of CAGrad, Nash-MTL and FAMO, with the five starts of the latter two.

    Above θ₂ = 0 the losses are valleys with logarithmic walls, as in the PCGrad paper; below, overlapping bowls::

        u₁ = log max(|(−θ₁ − 7) / 2 + tanh θ₂|, 5e-6) + 6         b₁ = ((θ₁ − 7)² + 0.1 (θ₂ + 8)²) / 10 − 20
        u₂ = log max(|(−θ₁ + 3) / 2 − tanh θ₂ + 2|, 5e-6) + 6     b₂ = ((θ₁ + 7)² + 0.1 (θ₂ + 8)²) / 10 − 20

        fᵢ = max(tanh(θ₂ / 2), 0) uᵢ + max(tanh(−θ₂ / 2), 0) bᵢ,    and f₁ is multiplied by `scale`.

    The Pareto set lies in the bowls, at θ₁ in [−7, 7] and the θ₂ for which s = θ₂ + 8 solves

        s sinh(8 − s) = 50 ((49 − θ₁²) / 10 + s² / 100 − 20):

    an arc from (−7, −8.434) over (0, −8.355), where the sum is smallest if `scale` is 1, to (7, −8.434). (Published
    pictures draw the straight line θ₂ = −8.3552, which is right in the middle.) The front is convex. The valleys above
    hold Pareto-stationary points that are not optimal: their floors.

    On the line θ₂ = 0, where the start (0, 0) lies, torch counts the slopes of both sides, as in the published code.

    Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021, arXiv 2110.14048 (three starts, `scale` 1); Navon et
    al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv 2202.01017, and Liu et al., FAMO, NeurIPS 2023,
    arXiv 2306.03792 (these five starts, `scale` 0.1). Their code takes 35 000 to 100 000 steps of Adam at a learning
    rate of 1e-3.

    Args:
        scale: Factor of the first loss, > 0.

    Returns:
        The problem.

    Raises:
        ValueError: If `scale` is not positive and finite.
    """
    if not 0.0 < scale < math.inf:
        raise ValueError(f"cagrad_basin: `scale` must be positive and finite, got {scale}. The papers use 1 and 0.1.")

    def losses(theta: Tensor) -> tuple[Tensor, ...]:
        x, y = theta[..., 0], theta[..., 1]
        bend = torch.tanh(y)
        valley_1 = _log_distance(0.5 * (-x - 7.0) + bend) + 6.0
        valley_2 = _log_distance(0.5 * (-x + 3.0) - bend + 2.0) + 6.0
        bowl_1 = ((x - 7.0) ** 2 + 0.1 * (y + 8.0) ** 2) / 10.0 - 20.0
        bowl_2 = ((x + 7.0) ** 2 + 0.1 * (y + 8.0) ** 2) / 10.0 - 20.0
        above, below = torch.tanh(0.5 * y).clamp_min(0.0), torch.tanh(-0.5 * y).clamp_min(0.0)
        return scale * (above * valley_1 + below * bowl_1), above * valley_2 + below * bowl_2

    def pareto(t: Tensor) -> Tensor:
        x = 14.0 * t.double() - 7.0
        s = torch.full_like(x, -0.4)
        for _ in range(10):  # Newton; five steps reach float64
            value = s * torch.sinh(8.0 - s) - 50.0 * ((49.0 - x**2) / 10.0 + s**2 / 100.0 - 20.0)
            s = s - value / (torch.sinh(8.0 - s) - s * torch.cosh(8.0 - s) - s)
        return torch.stack([x, s - 8.0], dim=-1)

    starts = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
    return Problem(f"CAGrad basin, scale {scale:g}", losses, pareto, starts, (-11.0, 11.0, -11.0, 11.0))


def fonseca_fleming(dimension: int = 2) -> Problem:
    """The Fonseca-Fleming problem: a concave front, where minimising any weighted sum gives up one of the losses.

        f₁(θ) = 1 − exp(−‖θ − a‖²),    f₂(θ) = 1 − exp(−‖θ + a‖²),    a = (1, …, 1) / √n

    ∇f₁ is a positive multiple of θ − a and ∇f₂ of θ + a, so that a point is Pareto stationary exactly if it lies on the
    segment from −a to a, which has length 2 for every n; and all of these are Pareto points. On the front, concave but
    for its ends, √(−log(1 − f₁)) + √(−log(1 − f₂)) = 2. Gradients fade like exp(−‖θ ∓ a‖²), so the starts stay near.

    Fonseca and Fleming, An Overview of Evolutionary Algorithms in Multiobjective Optimization, Evolutionary Computation
    3(1), 1995.

    Args:
        dimension: Number n of coordinates, at least 2; usually 2 to 10.

    Returns:
        The problem, with six starts at distances of 0.6 and 0.9 from the segment.

    Raises:
        ValueError: If `dimension` is not an integer of at least 2.
    """
    if not isinstance(dimension, int) or dimension < 2:
        raise ValueError(f"fonseca_fleming: `dimension` must be an integer >= 2, got {dimension!r}. 2 to 10 are usual.")
    half = 1.0 / math.sqrt(dimension)

    def losses(theta: Tensor) -> tuple[Tensor, ...]:
        # expm1 keeps the digits of a loss near its minimum.
        return tuple(-torch.expm1(-((theta - shift) ** 2).sum(dim=-1)) for shift in (half, -half))

    def pareto(t: Tensor) -> Tensor:
        return ((2.0 * t.double() - 1.0) * half)[..., None].expand(*t.shape, dimension)

    across = torch.linspace(-1.0, 1.0, dimension, dtype=torch.float64)
    across = across / torch.linalg.vector_norm(across)
    starts = tuple(tuple((s * half + off * across).tolist()) for s in (-0.7, 0.1, 0.8) for off in (0.9, -0.6))
    frame = (-1.5, 1.5, -1.5, 1.5) if dimension == 2 else None
    return Problem(f"Fonseca-Fleming, {dimension} dimensions", losses, pareto, starts, frame)


def _bowl(degrees: float, condition: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    axes = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return axes @ torch.diag(torch.tensor([1.0, 1.0 / condition], dtype=torch.float64)) @ axes.T


def _log_distance(x: Tensor) -> Tensor:
    return x.abs().clamp_min(_FLOOR).log()
