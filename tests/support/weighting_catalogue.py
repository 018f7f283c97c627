"""One row a weighter: how to build it, what it promises, and the weights it gives over a short run.

Every generic test of test_weighting_promises.py runs over every row. A new weighter needs one entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.cosmos import COSMOSWeighter
from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.fixed import FixedWeighter
from gradsurgery.weighting.geometric_mean import GeometricMeanWeighter
from gradsurgery.weighting.go4align import GO4AlignWeighter
from gradsurgery.weighting.gradnorm import GradNormWeighter
from gradsurgery.weighting.group_dro import GroupDROWeighter
from gradsurgery.weighting.igb import IGBWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.ldc_mtl import LDCMTLWeighter
from gradsurgery.weighting.loss_size import InitialLossWeighter, PriorLossWeighter, RealTimeWeighter
from gradsurgery.weighting.lr_annealing import LRAnnealingWeighter
from gradsurgery.weighting.normalized_gradient import NormalizedGradientWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from gradsurgery.weighting.pbi import PBIWeighter
from gradsurgery.weighting.relobralo import ReLoBRaLoWeighter
from gradsurgery.weighting.rlw import RandomWeighter
from gradsurgery.weighting.running_max import RunningMaxWeighter
from gradsurgery.weighting.slaw import SLAWWeighter
from gradsurgery.weighting.softadapt import (
    LossWeightedSoftAdaptWeighter,
    NormalizedSoftAdaptWeighter,
    SoftAdaptWeighter,
)
from gradsurgery.weighting.stch import STCHWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from gradsurgery.weighting.uwso import UWSOWeighter

NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Row:
    """A weighter and its promises.

    Attributes:
        name: The class's name, with what sets this row apart from others of the class.
        build: Makes the weighter around an optimizer; keywords are switches of the base class.
        golden: Losses of a few steps, (t, m), and the weights of each that a paper's formula gives by hand, (t, m). The
            gradient of loss i is the i-th unit vector.
        total: Sum of the weights over m, or None.
        scaling: What happens when one loss is multiplied by a constant over the whole run: "weights": all weights stay;
            "terms": the weighted losses stay in proportion; None: no promise.
        equivariant: The order of the tasks does not matter.
        losses: What losses it takes: "positive", "nonnegative" or "any". One that is out of range it names.
        later: What losses it takes after the first steps, where that is more.
        epochs: It works by epochs; each step here is one.
        homogeneous: w(s l) = s^degree w(l) when all losses of a run are scaled together, or None.
        after: Number of steps at the beginning for which `scaling` and `homogeneous` are not promised.
        tolerance: Of the golden weights, relative.
    """

    name: str
    build: Callable[..., Weighter]
    golden: tuple[Sequence, Sequence]
    total: float | None = None
    scaling: Literal["weights", "terms"] | None = None
    equivariant: bool = True
    losses: Literal["positive", "nonnegative", "any"] = "any"
    later: Literal["nonnegative", "any"] | None = None
    epochs: bool = False
    homogeneous: int | None = None
    after: int = 0
    tolerance: float = 1e-9

    @property
    def promises(self) -> dict[str, object]:
        """What `gradsurgery.testing.check` is to hold, whose gradients are scaled with the losses."""
        by_values = type(self.build(any_optimizer())).measure is Weighter.measure
        scaled = by_values and not self.after
        made = {
            "permutation": self.equivariant or None,
            "total": self.total if by_values else None,
            "loss scale": self.scaling if scaled else None,
            "homogeneous": self.homogeneous if scaled else None,
        }
        return {name: value for name, value in made.items() if value is not None}


def any_optimizer() -> torch.optim.Optimizer:
    """An optimizer for calls that never touch a parameter."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def tied(parameters: nn.Parameter, values: Sequence[float], rows: np.ndarray | None = None) -> list[torch.Tensor]:
    """Losses of the given values whose gradients are the given rows, or unit vectors."""
    rows = np.eye(len(values), len(parameters)) if rows is None else rows
    here = parameters - parameters.detach()
    return [torch.from_numpy(row) @ here + value for row, value in zip(rows, values, strict=True)]


def run(
    build: Callable[..., Weighter],
    history: Sequence[Sequence[float]],
    *,
    names: Sequence[str] = NAMES,
    rows: np.ndarray | Sequence[np.ndarray] | None = None,
    epochs: bool = False,
    **switches,
) -> np.ndarray:
    """Weights that a weighter applies over a run, read from its reports."""
    p = nn.Parameter(torch.zeros(len(history[0]) if rows is None else np.shape(rows)[-1], dtype=torch.float64))
    optimizer = build(torch.optim.SGD([p], lr=0.0), **switches)
    found = []
    for t, values in enumerate(history):
        optimizer.zero_grad()
        these = None if rows is None else np.asarray(rows)[t] if np.ndim(rows) == 3 else np.asarray(rows)
        losses = tied(p, values, these)
        report = optimizer.backward(dict(zip(names, losses, strict=False)))
        found.append(list(report.weights.values()))
        expected = torch.tensor(found[-1], dtype=torch.float64) @ torch.from_numpy(
            np.eye(len(values), len(p)) if these is None else these
        )
        assert torch.allclose(p.grad, expected, rtol=1e-12, atol=0)
        optimizer.step()
        if epochs:
            optimizer.epoch_end()
    return np.array(found)


E = math.exp
_sum = lambda *powers: [len(powers) * x / sum(powers) for x in powers]  # noqa: E731

CATALOGUE = [
    Row(
        "FixedWeighter",
        FixedWeighter,
        ([[1, 2, 3]], [[1, 1, 1]]),
        total=1.0,
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "FixedWeighter, given",
        lambda base, **switches: FixedWeighter(base, weights={"a": 0.5, "b": 2.0, "c": 3.5}, **switches),
        ([[1, 2, 3]], [[0.5, 2, 3.5]]),
        total=2.0,
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "RunningMaxWeighter",
        RunningMaxWeighter,
        ([[1, 2, 4], [2, 1, 8]], [[1, 0.5, 0.25], [0.5, 0.5, 0.125]]),
        scaling="terms",
        losses="nonnegative",
        homogeneous=-1,
    ),
    Row(
        "InitialLossWeighter",
        InitialLossWeighter,
        ([[1, 2, 4], [2, 1, 8]], [[1, 0.5, 0.25], [1, 0.5, 0.25]]),
        scaling="terms",
        losses="positive",
        later="any",
        homogeneous=-1,
    ),
    Row(
        "InitialLossWeighter, two batches, normalised",
        lambda base, **switches: InitialLossWeighter(base, batches=2, normalize=True, **switches),
        ([[1, 1, 2], [3, 1, 2], [9, 9, 9]], [[1.2, 1.2, 0.6], [0.75, 1.5, 0.75], [0.75, 1.5, 0.75]]),
        total=1.0,
        scaling="terms",
        losses="positive",
        later="any",
        homogeneous=0,
    ),
    Row(
        "PriorLossWeighter",
        lambda base, **switches: PriorLossWeighter(base, {"a": 2.0, "b": 0.5, "c": 1.0}, **switches),
        ([[1, 2, 3]], [[0.5, 2, 1]]),
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "RealTimeWeighter",
        RealTimeWeighter,
        ([[1, 2, 4], [0.5, 1, 10]], [[1, 0.5, 0.25], [2, 1, 0.1]]),
        scaling="terms",
        losses="positive",
        homogeneous=-1,
    ),
    Row(
        "UncertaintyWeighter",
        lambda base, **switches: UncertaintyWeighter(base, lr=0.1, weight_optimizer="sgd", **switches),
        ([[1, 2, 4], [1, 1, 1]], [[0.5, 0.5, 0.5], [0.5, E(-0.05) / 2, E(-0.15) / 2]]),
        losses="nonnegative",
    ),
    Row(
        "UncertaintyWeighter, classification",
        lambda base, **switches: UncertaintyWeighter(
            base, kind="classification", lr=0.1, weight_optimizer="sgd", **switches
        ),
        ([[1, 2, 4], [1, 1, 1]], [[1, 1, 1], [E(-0.05), E(-0.15), E(-0.35)]]),
        losses="nonnegative",
    ),
    Row(
        "UncertaintyWeighter, log1p, Adam",
        lambda base, **switches: UncertaintyWeighter(base, form="log1p", lr=0.1, **switches),
        ([[1, 2, 4], [1, 1, 1]], [[0.5, 0.5, 0.5], [0.5, E(-0.1) / 2, E(-0.1) / 2]]),
        losses="nonnegative",
    ),
    Row(
        "IMTLLWeighter",
        lambda base, **switches: IMTLLWeighter(base, lr=0.1, weight_optimizer="sgd", **switches),
        ([[1, 0.5, 2], [1, 1, 1]], [[1, 1, 1], [1, E(0.05), E(-0.1)]]),
        losses="nonnegative",
    ),
    Row(
        "SoftAdaptWeighter",
        lambda base, **switches: SoftAdaptWeighter(base, window=2, beta=1.0, **switches),
        ([[1, 1, 1], [1, 2, 3], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(1, E(1), E(2))]),
        total=1.0,
        tolerance=1e-7,  # the 1e-8 of the softadapt package
    ),
    Row(
        "SoftAdaptWeighter, newest, epochs",
        lambda base, **switches: SoftAdaptWeighter(base, beta=1.0, slope="newest", interval="epoch", **switches),
        ([[1, 1, 1], [1, 2, 3], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(1, E(1), E(2))]),
        total=1.0,
        epochs=True,
        tolerance=1e-7,
    ),
    Row(
        "NormalizedSoftAdaptWeighter",
        lambda base, **switches: NormalizedSoftAdaptWeighter(base, window=2, beta=1.0, **switches),
        ([[1, 1, 1], [1, 2, 4], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(1, E(1 / 4), E(3 / 4))]),
        total=1.0,
        homogeneous=0,
        tolerance=1e-7,
    ),
    Row(
        "NormalizedSoftAdaptWeighter, absolute",
        lambda base, **switches: NormalizedSoftAdaptWeighter(
            base, window=2, beta=1.0, normalize="absolute", **switches
        ),
        ([[1, 1, 4], [1, 2, 1], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(1, E(1 / 4), E(-3 / 4))]),
        total=1.0,
        homogeneous=0,
        tolerance=1e-7,
    ),
    Row(
        "LossWeightedSoftAdaptWeighter",
        lambda base, **switches: LossWeightedSoftAdaptWeighter(base, window=2, beta=1.0, **switches),
        ([[1, 1, 1], [1, 2, 3], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(1, 1.5 * E(1), 2 * E(2))]),
        total=1.0,
        losses="nonnegative",
        tolerance=1e-7,
    ),
    Row(
        "DWAWeighter",
        DWAWeighter,
        ([[1, 2, 4], [1, 1, 2], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], _sum(E(0.5), E(0.25), E(0.25))]),
        total=1.0,
        scaling="weights",
        losses="positive",
        epochs=True,
        homogeneous=0,
    ),
    Row(
        "IGBWeighter",
        IGBWeighter,
        # relative to the second epoch (2, 4, 8): 1, 1/2, 1/4
        (
            [[1, 2, 4], [2, 4, 8], [2, 2, 2]],
            [[1, 0.5, 0.25], [0.5, 0.25, 0.125], [w / 2 for w in _sum(E(1), E(0.5), E(0.25))]],
        ),
        scaling="terms",
        losses="positive",
        epochs=True,
        homogeneous=-1,
    ),
    Row(
        "IGBWeighter, base_epoch = 0",
        lambda base, **switches: IGBWeighter(base, base_epoch=0, **switches),
        ([[1, 2, 4], [2, 2, 2]], [[1, 0.5, 0.25], [w / 2 for w in _sum(E(2), E(1), E(0.5))]]),
        scaling="terms",
        losses="positive",
        epochs=True,
        homogeneous=-1,
    ),
    Row(
        "LDCMTLWeighter",
        lambda base, **switches: LDCMTLWeighter(
            base, penalty=0.1, initial=0.0, lr=0.1, weight_optimizer="sgd", **switches
        ),
        # S = 1/2, signs (−1, 2, −1): 1/3 + S (−0.1, 0.2, −0.1); θ moves by −0.1 S (1 − S) l (2/3 + 0.1 s)
        (
            [[1, 3, 2], [1, 3, 2]],
            [
                [1 / 3 - 0.05, 1 / 3 + 0.1, 1 / 3 - 0.05],
                (lambda s: [x * (1 / sum(s) + 0.1 * y) for x, y in zip(s, (-1, 2, -1), strict=True)])(
                    [
                        1 / (1 + E(0.025 * loss * (2 / 3 + 0.1 * y)))
                        for loss, y in zip((1, 3, 2), (-1, 2, -1), strict=True)
                    ]
                ),
            ],
        ),
        equivariant=False,  # each loss is compared with the next one
    ),
    Row(
        "RandomWeighter",
        lambda base, **switches: RandomWeighter(base, seed=3, **switches),
        (
            [[1, 2, 3]],
            [_sum(*np.exp(np.random.Generator(np.random.Philox(key=np.array([3, 0], "uint64"))).standard_normal(3)))],
        ),
        total=1.0,
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "GeometricMeanWeighter",
        GeometricMeanWeighter,
        ([[1, 2, 4], [1, 1, 1]], [[2 / 3, 1 / 3, 1 / 6], [1 / 3, 1 / 3, 1 / 3]]),
        scaling="terms",
        losses="positive",
        homogeneous=0,
    ),
    Row(
        "STCHWeighter",
        lambda base, **switches: STCHWeighter(base, mu=0.5, **switches),
        ([[3, 1.5, 0]], [[E(2) / 3 / (E(2) + E(1) + 1), E(1) / 3 / (E(2) + E(1) + 1), 1 / 3 / (E(2) + E(1) + 1)]]),
    ),
    Row(
        "COSMOSWeighter",
        lambda base, **switches: COSMOSWeighter(base, penalty=2.0, reference=1.0, **switches),
        # above the reference (3, 0, 4), of length 5: r = 1/√3, u = (0.6, 0, 0.8), r·u = 1.4/√3
        (
            [[4, 1, 5]],
            [[1 / 3 - 0.4 * (1 - 1.4 * 0.6) / 3**0.5, 1 / 3 - 0.4 / 3**0.5, 1 / 3 - 0.4 * (1 - 1.4 * 0.8) / 3**0.5]],
        ),
    ),
    Row(
        "PBIWeighter",
        lambda base, **switches: PBIWeighter(base, theta=2.0, **switches),
        # (3, 0, 0) minus its mean is (2, -1, -1), of length √6
        (
            [[3, 0, 0]],
            [[3**-0.5 + 4 / 6**0.5, 3**-0.5 - 2 / 6**0.5, 3**-0.5 - 2 / 6**0.5]],
        ),
        homogeneous=0,
    ),
    Row(
        "FAMOWeighter",
        lambda base, **switches: FAMOWeighter(base, lr=0.1, decay=0.0, **switches),
        # ξ moves by ∓0.1 where a loss fell more or less than the mean
        ([[1, 2, 4], [1, 2, 2]], [_sum(4, 2, 1), _sum(E(0.1), E(0.1) / 2, E(-0.1) / 2)]),
        total=1.0,
        scaling="terms",
        losses="positive",
        homogeneous=0,
    ),
    Row(
        "GO4AlignWeighter",
        lambda base, **switches: GO4AlignWeighter(base, eta=0.1, **switches),
        # p ∝ e^(-0.1, -0.2, -0.4), then e^(-0.2, -0.3, -0.5); the last two, and then the first two, are the nearest
        (
            [[1, 2, 4], [1, 1, 1]],
            [
                [7 * E(-0.1) / sum(map(E, (-0.1, -0.2, -0.4)))]
                + [(3.5 * E(-0.2) + 1.75 * E(-0.4)) / 2 / sum(map(E, (-0.1, -0.2, -0.4)))] * 2,
                [3 * (E(-0.2) + E(-0.3)) / 2 / sum(map(E, (-0.2, -0.3, -0.5)))] * 2
                + [3 * E(-0.5) / sum(map(E, (-0.2, -0.3, -0.5)))],
            ],
        ),
        losses="positive",
    ),
    Row(
        "GO4AlignWeighter, eta = 0",
        lambda base, **switches: GO4AlignWeighter(base, eta=0.0, groups=1, **switches),
        ([[1, 2, 4]], [[(7 + 3.5 + 1.75) / 9] * 3]),
        losses="positive",
        homogeneous=0,
    ),
    Row(
        "ReLoBRaLoWeighter",
        lambda base, **switches: ReLoBRaLoWeighter(base, alpha=0.5, rho=1.0, **switches),
        ([[1, 2, 4], [1, 1, 2]], [[1, 1, 1], [(1 + x) / 2 for x in _sum(E(1), E(0.5), E(0.5))]]),
        total=1.0,
        scaling="weights",
        losses="positive",
        homogeneous=0,
    ),
    Row(
        "CoVWeighter",
        CoVWeighter,
        # ratios (1, 1, 1) and (1, 2, 0.5): deviations 0, 0.5, 0.25 and means 1, 1.5, 0.75
        ([[1, 2, 4], [1, 4, 2], [5, 5, 5]], [[1, 1, 1], [1, 1, 1], [0, 1.5, 1.5]]),
        total=1.0,
        scaling="weights",
        losses="positive",
        homogeneous=0,
    ),
    Row(
        "SLAWWeighter",
        SLAWWeighter,
        # deviations 1, 0.5, 2
        ([[1, 2, 4], [3, 1, 8]], [[1, 1, 1], _sum(1, 2, 0.5)]),
        total=1.0,
        scaling="terms",
        after=1,
        homogeneous=0,
    ),
    Row(
        "UWSOWeighter",
        lambda base, **switches: UWSOWeighter(base, temperature=0.5, **switches),
        ([[1, 2, 4]], [_sum(E(2), E(1), E(0.5))]),
        total=1.0,
        losses="positive",
    ),
    Row(
        "GroupDROWeighter",
        lambda base, **switches: GroupDROWeighter(base, eta=0.1, **switches),
        ([[1, 2, 4], [1, 1, 1]], [_sum(E(0.1), E(0.2), E(0.4)), _sum(E(0.1), E(0.2), E(0.4))]),
        total=1.0,
    ),
    *[
        Row(
            name,
            lambda base, rule=rule, **switches: GradNormWeighter(
                base, base.param_groups[0]["params"], alpha=1.0, lr=0.1, weight_optimizer=rule, **switches
            ),
            # rates (12, 6, 3)/7 and equal lengths: the second step gives to the first weight and takes from the rest
            (
                [[1, 2, 4], [1, 1, 1], [1, 1, 1]],
                [[1, 1, 1], [1, 1, 1], _sum(1 + 0.1 * moved, 1 - 0.1 * moved, 1 - 0.1 * moved)],
            ),
            total=1.0,
            scaling="weights",  # with unit gradients whatever the losses
            losses="positive",
            later="nonnegative",
            homogeneous=0,
        )
        # Adam, whose first gradient was 0, moves by m̂/√v̂.
        for name, rule, moved in (
            ("GradNormWeighter", "adam", (0.1 / (1 - 0.9**2)) / (0.001 / (1 - 0.999**2)) ** 0.5),
            ("GradNormWeighter, SGD", "sgd", 1.0),
        )
    ],
    Row(
        "NormalizedGradientWeighter",
        NormalizedGradientWeighter,
        ([[1, 2, 4]], [[1, 1, 1]]),
        total=1.0,
        scaling="weights",  # with unit gradients whatever the losses
        homogeneous=0,
    ),
    Row(
        "NormalizedGradientWeighter, alpha, decay",
        lambda base, **switches: NormalizedGradientWeighter(base, alpha=1.0, decay=0.9, **switches),
        ([[1, 2, 4], [1, 1, 2]], [[1, 1, 1], [1.5, 0.75, 0.75]]),
        total=1.0,
        scaling="weights",
        losses="positive",
        later="nonnegative",
        homogeneous=0,
    ),
    Row(
        "NormalizedGradientWeighter, total",
        lambda base, **switches: NormalizedGradientWeighter(base, total=6.0, **switches),
        ([[1, 2, 4]], [[2, 2, 2]]),
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "LRAnnealingWeighter",
        # unit vectors of length 3: the largest entry is 1, the mean 1/3
        lambda base, **switches: LRAnnealingWeighter(base, shared_params=base.param_groups[0]["params"], **switches),
        ([[1, 2, 4], [1, 1, 2]], [[1, 1.2, 1.2], [1, 1.38, 1.38]]),
        equivariant=False,  # the first loss is the reference
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "LRAnnealingWeighter, mean",
        lambda base, **switches: LRAnnealingWeighter(base, statistic="mean", **switches),
        ([[1, 2, 4], [1, 1, 2]], [[1, 1, 1], [1, 1, 1]]),
        equivariant=False,  # the first loss is the reference
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "LRAnnealingWeighter, norm",
        lambda base, **switches: LRAnnealingWeighter(base, statistic="norm", rate=0.5, **switches),
        ([[1, 2, 4], [1, 1, 2]], [[2, 2, 2], [2.5, 2.5, 2.5]]),
        scaling="weights",
        homogeneous=0,
    ),
    Row(
        "NTKWeighter",
        NTKWeighter,
        ([[1, 2, 4]], [[1, 1, 1]]),
        total=1.0,
        scaling="weights",
        homogeneous=0,
    ),
]
