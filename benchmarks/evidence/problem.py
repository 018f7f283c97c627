"""What a problem of the comparison is, and what all of them share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Split = Literal["validation", "test"]
Losses = dict[str, Tensor]

#: Errors are clipped here: below, all has been learnt as far as we look; above, nothing is told any more.
LEAST, MOST = 1e-3, 10.0


@dataclass(frozen=True)
class Start:
    """A new model and its data, from one seed.

    Attributes:
        model: The model.
        last_shared: Parameters of the last layer that all losses stand on, where gradient norms are measured.
        losses: Losses of a step: of its batch (0), or of a further batch drawn independently (1 and 2).
        errors: One number per task: 0 if all is right, about 1 if nothing has been learnt. Lower is better.
        priors: What a model that knows the labels' distribution alone would pay, by loss, or None.
        residuals: Residuals of a step whose squares add up to each loss, or None.
    """

    model: nn.Module
    last_shared: list[Tensor]
    losses: Callable[[int, int], Losses]
    errors: Callable[[Split], dict[str, float]]
    priors: dict[str, float] | None = None
    residuals: Callable[[int], Losses] | None = None


@dataclass(frozen=True)
class Problem:
    """One problem, and the budget of a training on it.

    Attributes:
        name: What it is called.
        family: The kind of problem.
        says: What is learnt from what, in a sentence or two.
        losses: Names of the losses.
        tasks: Names of the errors.
        begin: Makes a new start from a seed.
        steps: Steps of a training.
        lr: The learning rate around which the grid lies.
        base: The optimizer below every method.
        alone: Each task has a loss of its own, of the same name, and can be learnt without the others.
        positive: No loss is ever below zero.
        has_priors: Starts have priors.
        has_residuals: Starts have residuals.
        batches: Further independent batches can be drawn.
    """

    name: str
    family: str
    says: str
    losses: tuple[str, ...]
    tasks: tuple[str, ...]
    begin: Callable[[int], Start]
    steps: int
    lr: float
    base: type[torch.optim.Optimizer] = torch.optim.Adam
    alone: bool = True
    positive: bool = True
    has_priors: bool = True
    has_residuals: bool = False
    batches: bool = True

    def rates(self, count: int = 5) -> tuple[float, ...]:
        """The grid of learning rates, the same for all methods.

        Args:
            count: How many; fewer keep the middle.

        Returns:
            Rates with a factor of 3 between neighbours, `lr` the second unless there are two.
        """
        first = -1 if count > 2 else 0
        return tuple(self.lr * 3.0**k for k in range(first, first + count))


def clipped(error: float) -> float:
    """An error within its bounds; what is not a number counts as the worst."""
    return MOST if math.isnan(error) else min(max(error, LEAST), MOST)


def score(errors: Mapping[str, float] | None) -> float:
    """One number for a training: the mean of its clipped errors; the worst if it failed."""
    if not errors:
        return MOST
    return sum(clipped(error) for error in errors.values()) / len(errors)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from a seed, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, and then in as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def chosen(rows: int, steps: int, batch: int, seed: int) -> Tensor:
    """Which rows make the batches: (steps, 3, batch), drawn with replacement."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(rows, (steps, 3, batch), generator=generator)


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation behind each."""
    layers = [(nn.Linear(a, b), activation()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in layer))


class SharedTrunk(nn.Module):
    """A trunk and one affine head a task.

    Args:
        trunk: Its last layer but the activation is the last shared one.
        width: What the trunk puts out.
        heads: Outputs of each head, by task.
    """

    def __init__(self, trunk: nn.Sequential, width: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({name: nn.Linear(width, outputs) for name, outputs in heads.items()})

    @property
    def last_shared(self) -> list[Tensor]:
        """Parameters of the last shared layer."""
        return list(self.trunk[-2].parameters())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of every head."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


def wrong(scores: Tensor, labels: Tensor) -> float:
    """Share of wrong labels, in shares of what guessing gives."""
    classes = scores.shape[-1]
    return float((scores.argmax(dim=1) != labels).double().mean()) / (1.0 - 1.0 / classes)


def unexplained(predicted: Tensor, target: Tensor, variance: Tensor | float) -> float:
    """Squared error in shares of the target's variance over all rows, since the rows that are held out may be few."""
    return float((predicted - target).square().mean() / variance)


def class_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, nats."""
    return F.cross_entropy(scores, labels)
