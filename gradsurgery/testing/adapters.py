"""What a library offers, in one form, so that the same questions can be put to all of them.

A :class:`Library` is three tables by method name. Names and options are those of this library's classes ("PCGrad",
"CAGrad" with ``c=0.4``), lengths those of :func:`gradsurgery.testing.reference_cases`. An entry is a function that
makes a fresh instance; an option that it does not take is one that the library does not have. To put the questions to
an implementation of your own::

    mine = Library("mine", directions={"MGDA": lambda: my_mgda})
    for case in DEFECTS:
        print(case.id, examine(mine, case).outcome)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

import gradsurgery
from gradsurgery.surgery.excessmtl import ExcessMTL
from gradsurgery.surgery.graddrop import GradDrop
from gradsurgery.surgery.moco import MoCo

Array = NDArray[Any]
Kind = Literal["direction", "weights", "training"]


class Training(Protocol):
    """A method in a training loop."""

    def backward(self, losses: Sequence[Tensor]) -> float | None:
        """Fill ``.grad`` from scalar losses.

        Args:
            losses: Of one batch.

        Returns:
            The weighted sum of the losses, if the library tells.
        """

    def step(self) -> None:
        """Make the step of the optimizer."""

    @property
    def weights(self) -> Array:
        """The weights that the library reports."""


@dataclass(frozen=True)
class Library:
    """What a library offers.

    Attributes:
        name: Shown in tables.
        directions: Makes a function from rows (m, n) and losses (m,) to the direction (n,). Calling it again is the
            next step.
        weights: Makes a function from a history of losses, (t, m), the oldest first, to the coefficients of the losses
            in the step after it, (m,), up to a common factor, if its losses were the last ones again. Calling it again
            continues. For methods that work by epochs the history has one entry per epoch.
        trainings: Makes a :class:`Training` around a torch optimizer. A method that makes the step itself takes over
            the parameters and learning rates, and has ``param_groups``.

    What keeps something between calls has ``state_dict()`` and ``load_state_dict(state)`` too.
    """

    name: str
    directions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    weights: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    trainings: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def table(self, kind: Kind) -> Mapping[str, Callable[..., Any]]:
        """One of the three tables.

        Args:
            kind: "direction", "weights" or "training".

        Returns:
            Factories by method name.
        """
        return {"direction": self.directions, "weights": self.weights, "training": self.trainings}[kind]


def import_peer(package: str, module: str) -> Any:
    """Import another library, which is never a requirement of this one.

    Args:
        package: What to install.
        module: What to import.

    Returns:
        The module.

    Raises:
        RuntimeError: It is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{package} cannot be imported ({error}). Install it: pip install {package}") from error


# ------------------------------------------------------------------------------------------------ this library


class _Directions:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __call__(self, rows: Array, losses: Array | None = None) -> Array:
        d = self.optimizer.combine(torch.from_numpy(np.ascontiguousarray(rows)), losses=losses, update=True)
        return np.asarray(d.numpy())

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


# Runs a weighter on losses of given values, whose gradients are the unit vectors.
class _Weights:
    def __init__(self, build: Callable[[Optimizer, int], Any]) -> None:
        self.build = build
        self.optimizer: Any = None
        self.saved: Any = None

    def __call__(self, history: Array) -> Array:
        history = np.asarray(history, dtype=np.float64)
        if self.optimizer is None:
            self.p = nn.Parameter(torch.zeros(history.shape[1], dtype=torch.float64))
            self.optimizer = self.build(torch.optim.SGD([self.p], lr=0.0), len(history))
            if self.saved is not None:
                self.optimizer.load_state_dict(self.saved)
        for losses in history:
            self._backward(losses)
            self.optimizer.step()
            if hasattr(self.optimizer, "epoch_end"):
                self.optimizer.epoch_end()
        self._backward(history[-1])
        self.optimizer.transaction.proposed = None
        assert self.p.grad is not None
        return self.p.grad.numpy().copy()

    def _backward(self, losses: Array) -> None:
        self.optimizer.zero_grad()
        self.optimizer.backward(list(torch.from_numpy(losses) + (self.p - self.p.detach())))

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.saved = state


class _Training:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def backward(self, losses: Sequence[Tensor]) -> float:
        return float(self.optimizer.backward(list(losses)).objective)

    def step(self) -> None:
        self.optimizer.step()

    @property
    def weights(self) -> Array:
        return np.array(list(self.optimizer.report.weights.values()))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


def _any_optimizer() -> Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)


def _directions(cls: Any, reduction: str, **fixed: Any) -> Callable[..., Any]:
    return lambda **options: _Directions(cls(_any_optimizer(), **{"reduction": reduction, **fixed, **options}))


def _weighter(cls: Any) -> Callable[..., Any]:
    return lambda **options: _Weights(lambda base, t: cls(base, **options))


def _softadapt(cls: Any) -> Callable[..., Any]:
    return lambda **options: _Weights(lambda base, t: cls(base, window=t, interval=t, **options))


def _trained(cls: Any) -> Callable[..., Any]:
    return lambda base, **options: _Training(cls.around(base, **options))


def ours() -> Library:
    """This library.

    Returns:
        Every method that a case of ``gradsurgery.testing.DEFECTS`` asks for.
    """
    g = gradsurgery
    return Library(
        "gradsurgery",
        directions={
            "PCGrad": _directions(g.PCGrad, "sum"),
            "GradVac": _directions(g.GradVac, "sum"),
            "MGDA": _directions(g.MGDA, "mean"),
            "CAGrad": _directions(g.CAGrad, "mean", rescale=0),
            "IMTLG": _directions(g.IMTLG, "mean"),
            "NashMTL": _directions(g.NashMTL, "sum", scale="paper"),
            "NashMTL, defaults": _directions(g.NashMTL, "sum"),
            "FairGrad": _directions(g.FairGrad, "sum", scale="paper"),
            "AlignedMTL": _directions(g.AlignedMTL, "mean"),
            "UPGrad": _directions(g.UPGrad, "mean"),
            "DualProj": _directions(g.DualProj, "mean"),
            "ConFIG": _directions(g.ConFIG, "sum"),
            "PIVRG": _directions(g.PIVRG, "sum", scale="paper"),
            "FERERO": _directions(g.FERERO, "sum"),
            "AGDA": _directions(g.AGDA, "sum"),
            "Krum": _directions(g.Krum, "mean"),
            "GradDrop": _directions(GradDrop, "sum"),
            "PCD": _directions(g.PCD, "sum"),
            "AndMask": _directions(g.AndMask, "mean"),
            "SandMask": _directions(g.SandMask, "mean", tau=0.5),  # which has no default here
            "BLUR": _directions(g.BLUR, "sum"),
            "MoCo": _directions(MoCo, "mean"),
            "ExcessMTL": _directions(ExcessMTL, "mean"),
        },
        weights={
            "DWA": _weighter(g.DWAWeighter),
            "FAMO": _weighter(g.FAMOWeighter),
            "GeometricMean": _weighter(g.GeometricMeanWeighter),
            "Uncertainty": _weighter(g.UncertaintyWeighter),
            "PBI": _weighter(g.PBIWeighter),
            "STCH": _weighter(g.STCHWeighter),
            "ReLoBRaLo": _weighter(g.ReLoBRaLoWeighter),
            "SoftAdapt": _softadapt(g.SoftAdaptWeighter),
            "NormalizedSoftAdapt": _softadapt(g.NormalizedSoftAdaptWeighter),
            "LossWeightedSoftAdapt": _softadapt(g.LossWeightedSoftAdaptWeighter),
        },
        trainings={
            "PCGrad": _trained(g.PCGrad),
            "GradVac": _trained(g.GradVac),
            "GradNorm": _trained(g.GradNormWeighter),
            "GeometricMean": _trained(g.GeometricMeanWeighter),
            "LRAnnealing": _trained(g.LRAnnealingWeighter),
            "MultiAdam": _trained(g.MultiAdam),
            "AdaTask": _trained(g.AdaTask),
            "MTAdam": _trained(g.MTAdam),
        },
    )
