"""PCGrad and GradVac."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsurgery.testing.defects.cases import (
    CONFLICT,
    TURNS,
    Array,
    Defect,
    assert_finite,
    assert_near,
    into,
    reference_rows,
    sgd,
    shown,
)
from gradsurgery.testing.properties import assert_common_descent

CASES: list[Defect] = []
_case = into(CASES)


@_case(
    "PC1",
    "PCGrad",
    asked='"sum" and "mean" of [[2, 1], [-10, 1]]',
    right="[-2.281188, 5.988119], and half of it",
    seen='WeiChengTseng/Pytorch-PCGrad: both are the mean, since `if reduction:` is true for "sum" as well',
)
def _pc1(make: Callable[..., Any]) -> None:
    exact = np.array([-2.281188118811881, 5.988118811881188])
    assert_near(make(reduction="sum")(CONFLICT), exact)
    assert_near(make(reduction="mean")(CONFLICT), exact / 2)


@_case(
    "PC2",
    "PCGrad",
    "training",
    asked="a parameter that no loss reaches, under weight decay",
    right="its .grad stays None and it does not move",
    seen="WeiChengTseng, kozistr before 4: .grad becomes 0 and the parameter decays",
)
def _pc2(make: Callable[..., Any]) -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    training = make(sgd(used, unused, weight_decay=0.5))
    training.backward([used.sum(), (2 * used).sum()])
    training.step()
    assert used.grad is not None, "the used parameter has no gradient"
    assert unused.grad is None, f"its .grad is {unused.grad}"
    assert unused.item() == 1.0, f"it moves to {unused.item():.4f}"


@_case(
    "PC3",
    "PCGrad",
    asked="many draws of [[3, -2], [2, 1], [-3, -1]]",
    right="one of the 8 directions of algorithm 1, in which a task never meets itself",
    seen="kozistr, LibMTL, nash-mtl, PCGradAMP, SamsungLabs, WeiChengTseng visit j = i too",
)
def _pc3(make: Callable[..., Any]) -> None:
    def projected(i: int, order: Sequence[int]) -> Array:
        p = TURNS[i].copy()
        for j in order:
            p -= min(p @ TURNS[j], 0.0) / (TURNS[j] @ TURNS[j]) * TURNS[j]
        return p

    terms = [[projected(i, order) for order in permutations({0, 1, 2} - {i})] for i in range(3)]
    possible = np.array([sum(choice) for choice in product(*terms)])
    direct = make()
    for _ in range(60):
        d = direct(TURNS)
        assert np.abs(possible - d).max(axis=1).min() < 1e-9, f"{shown(d)} is none of them"


for _method in ("PCGrad", "GradVac"):

    @_case(
        f"PC4 {_method}",
        _method,
        asked="[[2, 1], [-10, 1]] · 1e-5",
        right="1e-5 times the answer for [[2, 1], [-10, 1]], without conflict",
        seen="LibMTL, SamsungLabs, TorchJD (GradVac): an absolute epsilon, 86 to 114 % off",
    )
    def _pc4(make: Callable[..., Any]) -> None:
        assert_near(make()(CONFLICT * 1e-5) * 1e5, make()(CONFLICT))
        assert_common_descent(make(), CONFLICT * 1e-5)


@_case(
    "PC6",
    "PCGrad",
    "training",
    asked="losses p + 0·q and p + q without conflict, averaged",
    right="gradients 1 and 1/2: a zero entry of a shared parameter is shared",
    seen="PCGrad-GradVac-AMP: 1 and 1",
)
def _pc6(make: Callable[..., Any]) -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    make(sgd(p, q), reduction="mean").backward([(p + 0 * q).sum(), (p + q).sum()])
    assert p.grad is not None, "p has no gradient"
    assert q.grad is not None, "q has no gradient"
    assert_near(np.array([p.grad.item(), q.grad.item()]), [1.0, 0.5])


@_case(
    "PC7",
    "PCGrad",
    asked="many draws of three tasks in conflict",
    right="more than one direction: the order of the visits is drawn",
    seen="conflictfree: always the order of the tasks, which favours some by their place",
)
def _pc7(make: Callable[..., Any]) -> None:
    direct = make()
    draws = np.array([direct(reference_rows("m3_n3_conflict")) for _ in range(60)])
    assert_finite(draws)
    assert np.ptp(draws, axis=0).max() > 1e-6, "always the same"


@_case(
    "LB1",
    "PCGrad",
    asked="float64 rows [1 + 1e-10], twice",
    right="2 + 2e-10",
    seen="LibMTL: rows are copied to float32",
)
def _lb1(make: Callable[..., Any]) -> None:
    d = make()(np.full((2, 1), 1 + 1e-10))
    assert abs(d[0] - 2 - 2e-10) < 1e-13, f"2 + {d[0] - 2:.3g}"


@_case(
    "FO1",
    "PCGrad",
    "training",
    asked="a loss that was detached by mistake, such as one scaled under no_grad",
    right="an error, not silence",
    seen="code in a forum thread: the loss trains nothing",
)
def _fo1(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(1))
    try:
        make(sgd(p)).backward([p.sum(), 2 * p.detach().sum()])
    except (RuntimeError, ValueError, TypeError):
        return
    raise AssertionError("no error")


@_case(
    "GV1",
    "GradVac",
    asked="20 steps at cosine 0.92 with β = 0.5, then orthogonal rows",
    right="the target has become 0.92: both rows are turned towards each other",
    seen="SamsungLabs: the average is written to a copy and stays 0",
)
def _gv1(make: Callable[..., Any]) -> None:
    direct = make(beta=0.5)
    for _ in range(20):
        direct(np.array([[1.0, 0.0], [0.92, (1 - 0.92**2) ** 0.5]]))
    gain = 1 + 0.92 / (1 - 0.92**2) ** 0.5
    assert_near(direct(np.eye(2)), [gain, gain], 1e-3)


@_case(
    "GV2",
    "GradVac",
    "training",
    asked="a step where .grad is None, as after zero_grad",
    right="every reached parameter gets its gradient",
    seen="SamsungLabs: .grad stays None",
)
def _gv2(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(2))
    make(sgd(p)).backward([p[0] + p[1], p[0] - p[1]])
    assert p.grad is not None, ".grad is None"
    assert_near(p.grad.numpy(), [2.0, 0.0])


@_case(
    "GV3",
    "GradVac",
    asked="β = 1: equal rows, then orthogonal unit rows",
    right="a bounded direction: the target 1 cannot be reached",
    seen="TorchJD, LibMTL: length 1e4",
)
def _gv3(make: Callable[..., Any]) -> None:
    direct = make(beta=1.0)
    direct(np.array([[1.0, 0.0], [1.0, 0.0]]))
    length = float(np.linalg.norm(direct(np.eye(2))))
    assert length < 2e3, f"length {length:.3g}"
