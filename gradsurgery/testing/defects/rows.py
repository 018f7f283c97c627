"""Methods that look at the rows themselves, or keep some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsurgery.testing.defects.cases import (
    Defect,
    assert_finite,
    assert_near,
    into,
    sgd,
    shown,
)

CASES: list[Defect] = []
_case = into(CASES)

# ------------------------------------------------------------------------------------- Krum, GradDrop, ExcessMTL, MoCo


@_case(
    "KR1",
    "Krum",
    asked="six rows, one of them Byzantine",
    right="the row with the least sum of squared distances",
    seen="TorchJD: the row with the least sum of distances",
)
def _kr1(make: Callable[..., Any]) -> None:
    rows = np.array([[4.0, 2.0], [1.0, 0.0], [4.0, -3.0], [-1.0, 1.0], [1.0, -4.0], [-3.0, 2.0]])
    assert_near(make(n_byzantine=1)(rows), rows[1])


_OPPOSED = np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.1]])


@_case(
    "GD1",
    "GradDrop",
    asked="opposed rows with leak 0 and 1",
    right="entries of one sign each; the plain sum",
    seen="SamsungLabs: the other way round",
)
def _gd1(make: Callable[..., Any]) -> None:
    d = make(leak=0.0)(_OPPOSED)
    assert (np.abs(_OPPOSED - d).min(axis=0) < 1e-9).all(), f"leak 0: {shown(d)}"
    assert_near(make(leak=1.0)(_OPPOSED), [0.0, 0.0, -0.1])


@_case(
    "GD2",
    "GradDrop",
    asked="1000 opposed entries",
    right="a draw for each entry",
    seen="SamsungLabs: one draw for all",
)
def _gd2(make: Callable[..., Any]) -> None:
    g = np.random.default_rng(0).standard_normal(1000)
    kept = int((make(leak=0.0)(np.array([g, -g])) * g > 0).sum())
    assert 300 < kept < 700, f"{kept} of 1000 are those of the first row"


@_case(
    "EX1",
    "ExcessMTL",
    asked="a task whose first gradient is zero, two steps",
    right="finite",
    seen="LibMTL, the official code: nan",
)
def _ex1(make: Callable[..., Any]) -> None:
    direct = make()
    assert_finite(direct(np.array([[0.0, 0.0], [1.0, 2.0]])))
    assert_finite(direct(np.array([[1.0, 1.0], [1.0, 2.0]])))


@_case(
    "EX2",
    "ExcessMTL",
    asked="the first step, rows of length 100 and 1",
    right="weights 1/m: it only stores the baseline",
    seen="TorchJD: weights 1 and 1e-43",
)
def _ex2(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[100.0, 0.0], [0.0, 1.0]])), [50.0, 0.5])


@_case(
    "MO1",
    "MoCo",
    asked="400 steps with constant rows [[1, 0], [3, 0.4]]",
    right="the weights of MGDA, 1 and 0",
    seen="LibMTL: 0.66 and 0.34, since it takes a softmax instead of a projection",
)
def _mo1(make: Callable[..., Any]) -> None:
    direct = make(beta=1.0, beta_sigma=0.0, gamma=0.1, gamma_sigma=0.0)
    for _ in range(400):
        d = direct(np.array([[1.0, 0.0], [3.0, 0.4]]))
    assert_near(d, [1.0, 0.0], 1e-6)


# ---------------------------------------------------------------------------------------- Adam's moments for each loss


def _double(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _taken(training: Any, *gradients: Sequence[float | None], params: Sequence[nn.Parameter]) -> None:
    """One step. For each parameter the gradient of each loss, or None where a loss does not reach it."""
    for p in params:
        p.grad = None
    losses = []
    for row in zip(*gradients, strict=True):
        terms = [g * p.sum() for g, p in zip(row, params, strict=True) if g is not None]
        losses.append(torch.stack(terms).sum())
    training.backward(losses)
    training.step()


for _method, _factor in (("MultiAdam", 1.0), ("AdaTask", 2.0)):

    @_case(
        f"AM1 {_method}",
        _method,
        "training",
        asked="two losses in parameter groups with learning rates of 0.1 and 0.01, then both halved",
        right=f"steps of {0.1 * _factor:g} and {0.01 * _factor:g}, then half of that",
        seen="PINNacle (MultiAdam): crashes with two groups, and has a rate of its own that no scheduler changes; "
        "EnnengYang (AdaTask): the rate of the last group for all",
    )
    def _am1(make: Callable[..., Any], factor: float = _factor) -> None:
        p, q = _double(0.0), _double(0.0)
        groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "lr": 0.01}]
        training = make(torch.optim.SGD(groups, lr=0.1))
        for rate in (1.0, 0.5):
            with torch.no_grad():
                p.zero_()
                q.zero_()
            for group in training.param_groups:
                group["lr"] *= rate
            _taken(training, [3.0, 5.0], [3.0, 5.0], params=[p, q])
            assert_near(np.array([p.item(), q.item()]), [-0.1 * factor * rate, -0.01 * factor * rate], what="step")


for _method in ("MultiAdam", "AdaTask", "MTAdam"):

    @_case(
        f"AM2 {_method}",
        _method,
        "training",
        asked="three steps, the state into a fresh instance, two more steps",
        right="as without the interruption",
        seen="PINNacle (MultiAdam): the first step after loading zeroes all moments; ItzikMalkiel (MTAdam): lengths "
        "live on the parameters and start anew",
    )
    def _am2(make: Callable[..., Any]) -> None:
        p, q = _double(0.0), _double(0.0)
        kept, fresh = make(sgd(p)), make(sgd(q))
        for k in range(5):
            if k == 3:
                q.data.copy_(p.data)
                fresh.load_state_dict(kept.state_dict())
            row = [(-2.0) ** k, 3.0 + k]
            _taken(kept, row, params=[p])
            if k >= 3:
                _taken(fresh, row, params=[q])
        assert_near(q.detach().numpy(), p.detach().numpy(), 1e-12, "resumed parameters")

    @_case(
        f"AM3 {_method}",
        _method,
        "training",
        asked="a step from 1 with and without a weight decay of 0.5, at a learning rate of 0.1",
        right="0.05 apart: the decay multiplies the parameter once, and enters no moments",
        seen="EnnengYang (AdaTask): `weight_decay` is taken and not used; PINNacle, ItzikMalkiel: it enters the "
        "moments of every loss, and drowns in them",
    )
    def _am3(make: Callable[..., Any]) -> None:
        found = []
        for decay in (0.0, 0.5):
            p = _double(1.0)
            _taken(make(sgd(p), weight_decay=decay), [3.0, 5.0], params=[p])
            found.append(p.item())
        assert_near(np.array(found[0] - found[1]), 0.05, what="decay")


@_case(
    "AM4",
    "MTAdam",
    "training",
    asked="a parameter that no loss reaches, in front of one that two losses reach",
    right="the second one moves by twice Adam's step",
    seen="ItzikMalkiel: the loop breaks off at the first parameter without a gradient, and the step raises",
)
def _am4(make: Callable[..., Any]) -> None:
    unused, p = _double(0.0), _double(0.0)
    _taken(make(sgd(unused, p)), [None, None], [3.0, 5.0], params=[unused, p])
    assert_near(np.array([unused.item(), p.item()]), [0.0, -0.2])


@_case(
    "AM5",
    "MTAdam",
    "training",
    asked="a head of the second loss, whose gradient there changes from step to step",
    right="Adam's steps: it is the only loss, and so the first one, that reaches the head",
    seen="ItzikMalkiel: gradients are brought to the length of the first loss there, which decays from 1",
)
def _am5(make: Callable[..., Any]) -> None:
    trunk, head, twin = _double(0.0), _double(0.0), _double(0.0)
    training, adam = make(sgd(trunk, head)), torch.optim.Adam([twin], lr=0.1)
    for g in (1.0, 4.0, -2.0, 7.0):
        _taken(training, [1.0, 2.0], [None, g], params=[trunk, head])
        twin.grad = torch.tensor([g], dtype=torch.float64)
        adam.step()
    assert_near(head.detach().numpy(), twin.detach().numpy(), 1e-9, "head")


@_case(
    "AM6",
    "MTAdam",
    "training",
    asked="gradients 1 and 1e-12 of two losses",
    right="both count: twice Adam's step",
    seen="ItzikMalkiel: lengths below 1e-10 are held for zero, and such a gradient stays as it is",
)
def _am6(make: Callable[..., Any]) -> None:
    p = _double(0.0)
    _taken(make(sgd(p)), [1.0, 1e-12], params=[p])
    assert_near(np.array(p.item()), -0.2, what="step")


# --------------------------------------------------------------------------------------------------- masks, unlearning

_AGREEING = np.array([[1.0, 2.0, -1.0], [2.0, 1.0, 1.0]])


@_case(
    "SM1",
    "SandMask",
    asked="rows that agree on two of three signs, with the library's own τ",
    right="an update of these two",
    seen="DomainBed: zero, always, since its τ of 1 is the most that signs can agree",
)
def _sm1(make: Callable[..., Any]) -> None:
    d = np.asarray(make()(_AGREEING))
    assert_finite(d)
    assert (d[:2] > 0).all(), f"the direction is {shown(d)}"
    assert d[2] == 0, f"the direction is {shown(d)}"


@_case(
    "AN1",
    "AndMask",
    asked="the same rows, and a loss whose gradient is zero",
    right="the answer without that loss",
    seen="DomainBed: zero, since a sign of 0 is a vote against",
)
def _am1_masked(make: Callable[..., Any]) -> None:
    assert_near(make()(np.vstack([_AGREEING, np.zeros(3)])), [2.25, 2.25, 0.0])


@_case(
    "BL1",
    "BLUR",
    asked="forget and retain gradients of length 1e-6",
    right="1e-6 times the answer at length 1",
    seen="the official code: 3 % off, by an epsilon of 1e-10 beside the squared length",
)
def _bl1(make: Callable[..., Any]) -> None:
    rows = np.array([[2.0, 0.0], [3.0, 1.0]])
    assert_near(make()(rows), [2.0, 1.0])
    assert_near(make()(rows * 1e-6) * 1e6, [2.0, 1.0])
