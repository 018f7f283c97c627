"""The toy problems with known Pareto sets, walked with the settings of ``gradsurgery compare``."""

from __future__ import annotations

import functools

import torch
from torch import nn

from benchmarks.evidence.problem import Losses, Problem, Split, Start
from gradsurgery.cli.comparing import PROBLEMS as SETTINGS

_BUILT = {name: setting.build() for name, setting in SETTINGS.items()}


class Point(nn.Module):
    """A point that is trained.

    Args:
        theta: Where it begins.
    """

    def __init__(self, theta: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)


def walk(seed: int, name: str) -> Start:
    toy = _BUILT[name]
    # One start per seed, a little off the toy's own, since some have one only.
    off = 0.2 * torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    point = Point(toy.starts[seed % len(toy.starts)] + off)

    def losses(step: int, draw: int) -> Losses:
        return dict(zip(("first", "second"), toy.losses(point.theta), strict=True))

    def errors(split: Split) -> dict[str, float]:
        if not torch.isfinite(point.theta).all():
            return {"gap": float("nan")}
        return {"gap": toy.gap(point.theta) / toy.breadth()}

    return Start(point, [point.theta], losses, errors)


_LIKE = {"quadratics": (40, 0.1), "concave": (80, 0.05), "basin": (150, 0.1), "valleys": (200, 0.03)}

PROBLEMS = tuple(
    Problem(
        name,
        "toys",
        f"{SETTINGS[name].says[0].upper()}{SETTINGS[name].says[1:]}. Error: by how much both losses could be lower at "
        "once, in shares of their range along the Pareto front. Each seed has another start.",
        ("first", "second"),
        ("gap",),
        functools.partial(walk, name=name),
        steps,
        lr,
        base=SETTINGS[name].base,
        alone=False,
        positive=name in ("quadratics", "concave"),
        has_priors=False,
        batches=False,
    )
    for name, (steps, lr) in _LIKE.items()
)
