"""Weights of the losses."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsurgery.testing.defects.cases import (
    Array,
    Defect,
    NotOfferedError,
    assert_finite,
    assert_near,
    into,
    losses_at,
    sgd,
    shown,
)

CASES: list[Defect] = []
_case = into(CASES)

# ------------------------------------------------------------------------------------------------------ loss weighting


@_case(
    "DW1",
    "DWA",
    "weights",
    asked="constant losses 2000 and 1",
    right="weights 1 and 1 in every epoch",
    seen="nash-mtl, SamsungLabs: 1.99 and 0.01, since the window starts with ones",
)
def _dw1(make: Callable[..., Any]) -> None:
    for epochs in (1, 2, 3, 26, 30, 51):
        assert_near(make()(np.tile([2000.0, 1.0], (epochs, 1))), [1.0, 1.0], 1e-9, f"epoch {epochs}: weights")


_FALLING = np.array([[5.0, 1.0], [4.0, 0.9], [3.0, 0.8], [2.0, 0.7], [1.0, 0.6]])


def _ratio(weights: Array) -> float:
    assert_finite(weights)
    return float(weights[0] / weights[1])


@_case(
    "SA1",
    "NormalizedSoftAdapt",
    "weights",
    asked="losses that fall by 1 and 0.1 per step, slopes normalised in the sound way",
    right="the one that falls less gets more, as in SoftAdapt itself",
    seen="softadapt: 0.69 and 0.31, since it divides by the signed sum",
)
def _sa1(make: Callable[..., Any]) -> None:
    ratio = _ratio(_best(make, beta=1.0, normalize="absolute")(_FALLING))
    assert ratio < 1, f"weights in the ratio {ratio:.3g}"


def _best(make: Callable[..., Any], beta: float, **options: Any) -> Any:
    """With the sound option where the library has one, else as it is."""
    try:
        return make(beta=beta, **options)
    except NotOfferedError:
        return make(beta=beta)


@_case(
    "SA2",
    "NormalizedSoftAdapt",
    "weights",
    asked="constant losses",
    right="equal weights",
    seen="softadapt: nan",
)
def _sa2(make: Callable[..., Any]) -> None:
    ratio = _ratio(make(beta=0.1)(np.tile([2.0, 1.0], (5, 1))))
    assert abs(ratio - 1) < 1e-6, f"weights in the ratio {ratio:.3g}"


@_case(
    "SA3",
    "SoftAdapt",
    "weights",
    asked="a finite difference of order 5 from five points",
    right="ValueError: it needs six",
    seen="softadapt: IndexError",
)
def _sa3(make: Callable[..., Any]) -> None:
    try:
        found = make(accuracy_order=5)(_FALLING)
    except ValueError:
        return
    raise AssertionError(f"no error, weights {shown(found)}")


@_case(
    "SA4",
    "SoftAdapt",
    "weights",
    asked="a loss that has just jumped up, with the slope where the option puts it",
    right="more weight than the constant one",
    seen="softadapt: 0.04 and 0.96, since the slope is that of the oldest point",
)
def _sa4(make: Callable[..., Any]) -> None:
    history = np.array([[5.0, 1.0], [4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [10.0, 1.0]])
    ratio = _ratio(_best(make, beta=0.1, slope="newest")(history))
    assert ratio > 1, f"weights in the ratio {ratio:.3g}"


@_case(
    "SA5",
    "SoftAdapt",
    "weights",
    asked="a finite difference of order 2 from five points",
    right="nothing is printed",
    seen="softadapt 0.0.5: 302 characters, with verbose=False",
)
def _sa5(make: Callable[..., Any]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        make(accuracy_order=2)(_FALLING)
    assert not printed.getvalue(), f"{len(printed.getvalue())} characters"


@_case(
    "GL1",
    "GeometricMean",
    "weights",
    asked="eight losses of 1e-50",
    right="coefficients 1/8",
    seen="LibMTL: nan, since the product underflows (there with 1e-6 in float32)",
)
def _gl1(make: Callable[..., Any]) -> None:
    assert_near(make()(np.full((1, 8), 1e-50)), np.full(8, 1 / 8))


@_case(
    "GL2",
    "GeometricMean",
    "training",
    asked="reported weights for losses 1, 0.2 and 3",
    right="the coefficients that the gradients get",
    seen="LibMTL: others",
)
def _gl2(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    training = make(sgd(p))
    training.backward(losses_at(p, np.eye(3), [1.0, 0.2, 3.0]))
    assert p.grad is not None, "no gradient"
    assert_near(training.weights, p.grad.numpy(), 1e-9, "reported weights")


def _refused_or_finite(weigh: Callable[..., Any], history: Any) -> None:
    try:
        found = weigh(np.array(history))
    except (ValueError, RuntimeError):
        return
    assert_finite(found)


@_case("GL3", "GeometricMean", "weights", asked="losses 0 and 1", right="an error, or finite", seen="TorchJD: nan")
def _gl3(make: Callable[..., Any]) -> None:
    _refused_or_finite(make(), [[0.0, 1.0]])


@_case(
    "FA1",
    "FAMO",
    "weights",
    asked="a loss below its lower bound",
    right="an error, or finite",
    seen="the official code, TorchJD: nan",
)
def _fa1(make: Callable[..., Any]) -> None:
    _refused_or_finite(make(), [[1.0, 1.0], [-0.1, 1.0], [1.0, 1.0]])


@_case(
    "AW1",
    "Uncertainty",
    "weights",
    asked="a loss of 0 for 60 steps",
    right="a bounded coefficient",
    seen="AutomaticWeightedLoss: 6e10",
)
def _aw1(make: Callable[..., Any]) -> None:
    found = make()(np.tile([0.0, 1.0], (60, 1)))
    assert_finite(found)
    assert np.abs(found).max() < 1e6, shown(found)


@_case(
    "UW1",
    "Uncertainty",
    "weights",
    asked="a loss of -1 for 2000 steps",
    right="an error: the objective has no lower bound; or finite",
    seen="every implementation: the log-variance becomes -inf",
)
def _uw1(make: Callable[..., Any]) -> None:
    _refused_or_finite(make(), np.tile([-1.0, 1.0], (2000, 1)))


@_case(
    "LM1",
    "STCH",
    "weights",
    asked="losses 1, 0.2 and 3 under preferences 0.2, 0.5 and 0.1, with a small μ",
    right="all weight on the third, whose weighted loss 0.3 is the largest: 0.1",
    seen="libmoon: the preference is left out",
)
def _lm1(make: Callable[..., Any]) -> None:
    found = make(mu=1e-3, preference=(0.2, 0.5, 0.1))(np.array([[1.0, 0.2, 3.0]]))
    assert_near(found, [0.0, 0.0, 0.1])


@_case(
    "LM2",
    "PBI",
    "weights",
    asked="the same losses with reference points 0 and (0.5, 0, 0)",
    right="different weights",
    seen="libmoon: the same, the point is not used",
)
def _lm2(make: Callable[..., Any]) -> None:
    plain, moved = (make(theta=1.0, reference=(z, 0.0, 0.0))(np.array([[1.0, 0.7, 3.0]])) for z in (0.0, 0.5))
    assert_finite(plain)
    assert np.abs(plain - moved).max() > 1e-3, f"{shown(plain)} both times"


@_case(
    "PN3",
    "ReLoBRaLo",
    "weights",
    asked="a loss of exactly 0",
    right="an error, or finite",
    seen="physicsnemo-sym: nan, also in SoftAdapt",
)
def _pn3(make: Callable[..., Any]) -> None:
    _refused_or_finite(make(), [[1.0, 0.0], [0.5, 0.0], [0.4, 0.0]])


# ---------------------------------------------------------------------------------------------- GradNorm, LR annealing


def _gradnorm(
    make: Callable[..., Any], norms: Sequence[float], history: Sequence[Sequence[float]], **options: Any
) -> Any:
    p = nn.Parameter(torch.zeros(2))
    training = make(sgd(p), shared_params=p, **options)
    reported, weights = [], []
    for values in history:
        p.grad = None
        rows = np.diag(np.asarray(norms))
        reported.append(training.backward(losses_at(p, rows, values)))
        training.step()
        weights.append(np.array(training.weights))
    p.grad = None
    training.backward(losses_at(p, rows, history[-1]))
    return reported, [*weights[1:], np.array(training.weights)]


@_case(
    "GN2",
    "GradNorm",
    "training",
    asked="equal gradient norms; loss 1 has fallen to a tenth, loss 2 not at all; α = 1",
    right="the lagging loss 2 gets more weight",
    seen="gradnorm-pytorch since 0.1.1: 1.05 and 0.95, by a negated exponent",
)
def _gn2(make: Callable[..., Any]) -> None:
    _, weights = _gradnorm(make, [1.0, 1.0], [[1.0, 1.0], [0.1, 1.0]], alpha=1.0, lr=0.1)
    assert weights[-1][1] > weights[-1][0], shown(weights[-1])


@_case(
    "GN4",
    "GradNorm",
    "training",
    asked="what backward returns",
    right="the weighted sum of the losses, in every call",
    seen="gradnorm-pytorch: None in an ordinary training call",
)
def _gn4(make: Callable[..., Any]) -> None:
    reported, _ = _gradnorm(make, [1.0, 1.0], [[1.0, 1.0]] * 2, alpha=1.0, lr=0.1)
    assert all(value is not None for value in reported), f"{reported}"
    assert_near(np.array(reported), [2.0, 2.0])


@_case(
    "GN5",
    "GradNorm",
    "training",
    asked="norms 1 and 9 with a learning rate of 5",
    right="positive weights",
    seen="gradnorm-pytorch: 0.23 and -1.77",
)
def _gn5(make: Callable[..., Any]) -> None:
    _, weights = _gradnorm(make, [1.0, 9.0], [[1.0, 1.0]] * 3, alpha=0.0, lr=5.0)
    assert all((w > 0).all() for w in weights), shown(min(weights, key=lambda w: float(w.min())))


@_case(
    "RB1",
    "GradNorm",
    "training",
    asked="losses 2, 2, then 1, 2 twice; α = 1",
    right="loss 2 still lags in the third step: rates compare with the first loss",
    seen="rbischof: they compare with the previous step",
)
def _rb1(make: Callable[..., Any]) -> None:
    _, weights = _gradnorm(make, [1.0, 1.0], [[2.0, 2.0], [1.0, 2.0], [1.0, 2.0]], alpha=1.0, lr=0.01)
    assert weights[2][1] > weights[1][1], f"loss 2 has {weights[1][1]:.4g}, then {weights[2][1]:.4g}"


@_case(
    "PN4",
    "GradNorm",
    "training",
    asked="the objective of float64 losses 1 and 1e-9",
    right="1 + 1e-9",
    seen="physicsnemo-sym: 1, in float32",
)
def _pn4(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    total = make(sgd(p), shared_params=p, alpha=0.0, lr=0.01).backward(losses_at(p, np.eye(2), [1.0, 1e-9]))
    if total is None:
        raise NotOfferedError("backward returns nothing")
    assert abs(total - 1 - 1e-9) < 1e-13, f"1 + {total - 1:.3g}"


@_case(
    "PN6",
    "LRAnnealing",
    "training",
    asked="gradients (3, 1) of the reference and (1, 1) of the other, rate 1",
    right="weights 1 and 3: the largest entry over the mean one",
    seen="physicsnemo-sym: 1 and 2",
)
def _pn6(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    training = make(sgd(p), rate=1.0)
    training.backward(losses_at(p, [[3.0, 1.0], [1.0, 1.0]], [1.0, 1.0]))
    assert_near(training.weights, [1.0, 3.0])
