"""One row a method: how to build it, and what its paper promises. Every generic test runs over every row.

A new method needs one entry here. What it does not promise it does not declare; nothing is skipped by name in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.optim import Optimizer

import gradsurgery

ALL = 1000  # promised for any number of tasks


@dataclass(frozen=True)
class Row:
    """A method and its promises.

    Attributes:
        name: The class's name, with what sets this row apart from others of the class.
        build: Makes the method around an optimizer, or in its place; keywords are switches of the base class.
        kind: "gram" (weights from inner products), or "rows" (it acts coordinate by coordinate, or jumps where rows
            tie).
        scale: What m equal rows g give: "sum" (m·g), "paper" (as published), or "priority" (g).
        common_descent: Largest number of tasks for which no loss rises to first order; 0 for none.
        descends_at_full_rank: No loss rises to first order where the rows are independent.
        homogeneous: d(sJ) = s^degree d(J), or None.
        row_scale_invariant: The direction does not turn when single rows, independent of each other, are scaled.
        equivariant: The order of the tasks does not matter.
        ignores_copies: A repeated row does not turn the direction, where the rows are independent otherwise.
        keeps_the_sum: Without conflict the direction is the plain sum.
        stationary_is_zero: Zero exactly on Pareto-stationary input, with the flag "stationary".
        zero_rows: A zero row makes the input stationary ("stationary"), or is left out ("dropped").
        golden: Rows, losses and the direction in sum scale that a paper's formula gives by hand.
        reference: Names of exact answers, and the `reduction` that they are for.
        given: The keyword whose value the inputs of these answers have, too.
        alone: One task gives "itself", its own gradient (up to length in the paper's scale), or is "defined".
    """

    name: str
    build: Callable[..., gradsurgery.MultiLossOptimizer]
    kind: Literal["gram", "rows"]
    golden: tuple[Sequence, Sequence | None, Sequence]
    scale: Literal["sum", "paper", "priority"] = "sum"
    common_descent: int = 0
    descends_at_full_rank: bool = False
    homogeneous: float | None = 1
    row_scale_invariant: bool = False
    equivariant: bool = True
    ignores_copies: bool = False
    keeps_the_sum: bool = False
    stationary_is_zero: bool = False
    zero_rows: Literal["stationary", "dropped"] = "stationary"
    alone: Literal["itself", "defined"] = "itself"
    needs_losses: bool = False
    reference: dict[str, str] = field(default_factory=dict)
    given: str = ""

    @property
    def promises(self) -> dict[str, object]:
        """What `gradsurgery.testing.check` is to hold."""
        stationary = "stationary" if self.zero_rows == "stationary" else "left out"
        made = {
            "common descent": self.common_descent or None,
            "common descent at full rank": self.descends_at_full_rank or None,
            "homogeneous": self.homogeneous,
            "row scale": self.row_scale_invariant or None,
            "permutation": self.equivariant or None,
            "rotation": True if self.kind == "gram" else None,
            "copies": self.ignores_copies or None,
            "plain sum": self.keeps_the_sum or None,
            "equal rows": None if self.scale == "paper" else self.scale,
            "one loss": None if self.alone == "defined" else "direction" if self.scale == "paper" else "gradient",
            "stationary": self.stationary_is_zero or None,
            "zero rows": stationary if self.stationary_is_zero else None,
        }
        return {name: value for name, value in made.items() if value is not None}

    def direction(self, **switches) -> Callable[[np.ndarray], np.ndarray]:
        """The method as a function from float64 rows to a direction."""
        optimizer = self.build(any_optimizer(), **switches)

        def direct(rows: np.ndarray) -> np.ndarray:
            losses = np.arange(1.0, len(rows) + 1) if self.needs_losses else None
            return optimizer.combine(torch.from_numpy(rows), losses=losses).numpy()

        return direct


def any_optimizer() -> Optimizer:
    """An optimizer for calls that never touch a parameter."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


CATALOGUE = [
    Row(
        "PCGrad",
        gradsurgery.PCGrad,
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-2.281188118811881, 5.988118811881188]),
        common_descent=2,
        equivariant=False,  # only in distribution: the visiting order is drawn
        keeps_the_sum=True,
    ),
    Row(
        "PCGrad, fixed order",
        lambda base, **switches: gradsurgery.PCGrad(base, shuffle=False, **switches),
        "gram",
        golden=([[3, -2], [2, 1], [-3, -1]], None, [1.353846153846, -3.507692307692]),
        common_descent=2,
        equivariant=False,
        keeps_the_sum=True,
        reference={"PCGrad fixed order": "sum"},
    ),
    Row(
        "GradVac",
        gradsurgery.GradVac,
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-2.281188118811881, 5.988118811881188]),
        common_descent=2,
        equivariant=False,
        keeps_the_sum=True,  # in the first step, where the targets are 0
    ),
    Row(
        "GradVac, fixed order",
        lambda base, **switches: gradsurgery.GradVac(base, shuffle=False, **switches),
        "gram",
        golden=([[3, -2], [2, 1], [-3, -1]], None, [1.353846153846, -3.507692307692]),
        common_descent=2,
        equivariant=False,
        keeps_the_sum=True,
        reference={"GradVac first call, fixed order": "sum"},
    ),
    Row(
        "MGDA",
        gradsurgery.MGDA,
        "gram",
        golden=([[2, 1], [-1, 1]], None, [0, 2]),
        common_descent=ALL,
        ignores_copies=True,
        stationary_is_zero=True,
        reference={"MGDA": "mean"},
    ),
    Row(
        "MGDA, l2",
        lambda base, **switches: gradsurgery.MGDA(base, normalize="l2", **switches),
        "gram",
        golden=([[2, 0], [0, 1]], None, [1, 1]),
        scale="paper",
        common_descent=ALL,
        homogeneous=0,
        row_scale_invariant=True,
        ignores_copies=True,
        stationary_is_zero=True,
        reference={"MGDA normalised l2": "mean"},
    ),
    Row(
        "MGDA, loss",
        lambda base, **switches: gradsurgery.MGDA(base, normalize="loss", **switches),
        "gram",
        golden=([[2, 0], [0, 4]], [1, 2], [2, 2]),
        scale="paper",
        common_descent=ALL,
        equivariant=False,  # the losses would have to be reordered too
        needs_losses=True,
        stationary_is_zero=True,
        reference={"MGDA normalised loss": "mean"},
    ),
    Row(
        "MGDA, loss+",
        lambda base, **switches: gradsurgery.MGDA(base, normalize="loss+", **switches),
        "gram",
        golden=([[2, 0], [0, 4]], [1, 1], [1, 1]),
        scale="paper",
        common_descent=ALL,
        homogeneous=0,
        equivariant=False,
        needs_losses=True,
        stationary_is_zero=True,
        reference={"MGDA normalised loss+": "mean"},
    ),
    Row(
        "CAGrad",
        gradsurgery.CAGrad,
        "gram",
        golden=([[1, 0], [0, 1]], None, [1, 1]),
    ),
    Row(
        "CAGrad, not rescaled",
        lambda base, **switches: gradsurgery.CAGrad(base, rescale=0, **switches),
        "gram",
        golden=([[1, 0], [0, 1]], None, [1.4, 1.4]),
        scale="paper",
        reference={"CAGrad c=0.4": "mean"},
    ),
    Row(
        "CAGrad, c = 0.5",
        lambda base, **switches: gradsurgery.CAGrad(base, c=0.5, rescale=0, **switches),
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-4.312182, 3.843908]),
        scale="paper",
        reference={"CAGrad c=0.5": "mean"},
    ),
    *[
        Row(
            f"CAGrad, c = {c}",
            lambda base, c=c, **switches: gradsurgery.CAGrad(base, c=c, rescale=0, **switches),
            "gram",
            golden=([[1, 0], [0, 1]], None, [1 + c, 1 + c]),
            scale="paper",
            common_descent=ALL,
            reference={f"CAGrad c={c}": "mean"},
        )
        for c in (1.0, 1.5, 4.0)
    ],
    Row(
        "ConicGrad",
        gradsurgery.ConicGrad,
        "gram",
        # MGDA's direction, (1, 11), has a cosine of 0.2 with (18, 2), which is turned by 60° towards it
        golden=([[20, 0], [-2, 2]], None, [7.26794919, 16.58845727]),
        reference={"ConicGrad c=0.5": "mean"},
    ),
    *[
        Row(
            f"ConicGrad, c = {c}",
            lambda base, c=c, **switches: gradsurgery.ConicGrad(base, c=c, **switches),
            "gram",
            golden=([[1, 0], [0, 1]], None, [1, 1]),
            reference={f"ConicGrad c={c}": "mean"},
        )
        for c in (0.25, 0.9)
    ],
    Row(
        "IMTLG",
        gradsurgery.IMTLG,
        "gram",
        golden=([[1, 0], [0, 4]], None, [1.6, 1.6]),
        descends_at_full_rank=True,
        row_scale_invariant=True,
        ignores_copies=True,
        reference={"IMTL-G": "mean"},
    ),
    Row(
        "ConFIG",
        gradsurgery.ConFIG,
        "gram",
        golden=([[1, 0], [0, 4]], None, [2.5, 2.5]),
        descends_at_full_rank=True,
        row_scale_invariant=True,
        ignores_copies=True,
        reference={"ConFIG": "sum", "ConFIG length=projection": "sum"},
    ),
    *[
        Row(
            f"ConFIG, {length}",
            lambda base, length=length, **switches: gradsurgery.ConFIG(base, length=length, **switches),
            "gram",
            golden=([[1, 0], [0, 4]], None, [tracked, tracked]),  # 2 L cos 45° along (1, 1) / √2
            descends_at_full_rank=True,
            row_scale_invariant=True,
            ignores_copies=True,
            reference={f"ConFIG length={length}": "sum"},
        )
        for length, tracked in (("min", 1), ("max", 4), ("mean", 2.5), ("harmonic", 1.6), ("geometric", 2))
    ],
    Row(
        "NashMTL",
        gradsurgery.NashMTL,
        "gram",
        golden=([[1, 0], [0, 4]], None, [1.6, 1.6]),
        common_descent=ALL,
        row_scale_invariant=True,
        stationary_is_zero=True,
        zero_rows="dropped",
    ),
    Row(
        "NashMTL, paper",
        lambda base, **switches: gradsurgery.NashMTL(base, scale="paper", **switches),
        "gram",
        golden=([[1, 0], [0, 4]], None, [1, 1]),
        scale="paper",
        common_descent=ALL,
        homogeneous=0,
        row_scale_invariant=True,
        stationary_is_zero=True,
        zero_rows="dropped",
        reference={"Nash-MTL": "sum"},
    ),
    Row(
        "FairGrad",
        gradsurgery.FairGrad,
        "gram",
        golden=([[1, 0], [0, 4]], None, [2 / (1 + 4 ** (-4 / 3)), 8 * 4 ** (-4 / 3) / (1 + 4 ** (-4 / 3))]),
        common_descent=ALL,
        stationary_is_zero=True,
        zero_rows="dropped",
    ),
    *[
        Row(
            f"FairGrad, paper, alpha = {alpha}",
            lambda base, alpha=alpha, **switches: gradsurgery.FairGrad(base, alpha=alpha, scale="paper", **switches),
            "gram",
            # On orthogonal rows G w = w^(-1/α) reads w = n^(-2α/(1+α)).
            golden=([[1, 0], [0, 4]], None, [1, 4 * 4 ** (-2 * alpha / (1 + alpha))]),
            scale="paper",
            common_descent=ALL,
            homogeneous=(1 - alpha) / (1 + alpha),
            stationary_is_zero=True,
            zero_rows="dropped",
            reference={f"FairGrad alpha={alpha}": "sum"},
        )
        for alpha in (0.5, 1.0, 2.0)
    ],
    Row(
        "FairGrad, alpha = 0",
        lambda base, **switches: gradsurgery.FairGrad(base, alpha=0.0, **switches),
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-2.4, 4.8]),
        common_descent=ALL,
        keeps_the_sum=True,
        reference={"FairGrad alpha=0 (limit)": "sum", "DualProj": "mean"},
    ),
    Row(
        "PIVRG",
        gradsurgery.PIVRG,
        "gram",
        golden=([[1, 0], [0, 4]], None, [2 / (1 + 4 ** (-4 / 3)), 8 * 4 ** (-4 / 3) / (1 + 4 ** (-4 / 3))]),
        common_descent=ALL,
        stationary_is_zero=True,
        zero_rows="dropped",
    ),
    Row(
        "PIVRG, paper",
        lambda base, **switches: gradsurgery.PIVRG(base, scale="paper", **switches),
        "gram",
        golden=([[1, 0], [0, 4]], None, [1, 4 * 4 ** (-4 / 3)]),
        scale="paper",
        common_descent=ALL,
        homogeneous=-1 / 3,
        stationary_is_zero=True,
        zero_rows="dropped",
        reference={"PIVRG": "sum"},
        given="scores",
    ),
    *[
        Row(
            f"AlignedMTL, {mode}",
            lambda base, mode=mode, **switches: gradsurgery.AlignedMTL(base, scale_mode=mode, **switches),
            "gram",
            golden=([[1, 0], [0, 4]], None, [sigma, sigma]),
            reference={f"Aligned-MTL {mode}": "mean"},
        )
        for mode, sigma in (("min", 1), ("median", 1), ("rmse", 8.5**0.5))
    ],
    Row(
        "UPGrad",
        gradsurgery.UPGrad,
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-2.281188118811881, 5.988118811881188]),
        common_descent=ALL,
        keeps_the_sum=True,
        reference={"UPGrad": "mean"},
    ),
    Row(
        "DualProj",
        gradsurgery.DualProj,
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-2.4, 4.8]),
        common_descent=ALL,
        keeps_the_sum=True,
        reference={"DualProj": "mean"},
    ),
    Row(
        "Krum",
        lambda base, **switches: gradsurgery.Krum(base, n_byzantine=1, **switches),
        "gram",
        golden=([[4, 2], [1, 0], [4, -3], [-1, 1], [1, -4], [-3, 2]], None, [6, 0]),
        equivariant=False,  # ties go to the first
    ),
    Row(
        "Krum, two selected",
        lambda base, **switches: gradsurgery.Krum(base, n_byzantine=0, n_selected=2, **switches),
        "gram",
        golden=([[0, 0], [1, 0], [3, 0]], None, [1.5, 0]),
        equivariant=False,
    ),
    Row(
        "PCD",
        gradsurgery.PCD,
        "gram",
        # d̃ = u₁ + (τ − C₁₂) u₂, made as long as g₁
        golden=([[1, 0], [-1, 1]], None, [0.686832103, 0.726816113]),
        scale="priority",
        row_scale_invariant=True,  # in the first step, where every row has its usual length
        equivariant=False,  # the first row is the primary one
    ),
    Row(
        "PCD, epsilon",
        lambda base, **switches: gradsurgery.PCD(base, eps=1e-8, **switches),
        "gram",
        golden=([[1e-4, 0], [0, 1]], None, [1e-4 / (1 + 0.0008) ** 0.5, 1e-4 * 0.0008**0.5 / (1 + 0.0008) ** 0.5]),
        scale="priority",
        homogeneous=None,
        equivariant=False,
        reference={"PCD first call tau=0.02": "sum"},
    ),
    Row(
        "MetaBalance",
        gradsurgery.MetaBalance,
        "gram",
        golden=([[3, 4], [0, 10]], None, [3, 10.5]),  # 0.7 · 5/10 + 0.3
        equivariant=False,  # the first row is the primary one
    ),
    Row(
        "MetaBalance, r = 1",
        lambda base, **switches: gradsurgery.MetaBalance(base, relax=1.0, **switches),
        "gram",
        golden=([[3, 4], [0, 10]], None, [3, 9]),
        equivariant=False,
    ),
    Row(
        "AGEM",
        gradsurgery.AGEM,
        "gram",
        golden=([[3, 0], [-1, 1], [-1, -2]], None, [0.6, -1.2]),
        scale="priority",
        common_descent=2,
        equivariant=False,
    ),
    Row(
        "GCS",
        gradsurgery.GCS,
        "gram",
        golden=([[3, 4], [10, 0], [-1, 0]], None, [9, 4]),
        equivariant=False,  # the first row is the primary one
        reference={"GCS weighted primary=0": "sum"},
    ),
    Row(
        "GCS, switched",
        lambda base, **switches: gradsurgery.GCS(base, switched=True, **switches),
        "rows",  # it jumps where a row is at a right angle to the first one
        golden=([[3, 4], [10, 0], [-1, 0]], None, [13, 4]),
        equivariant=False,
        reference={"GCS switched primary=0": "sum"},
    ),
    Row(
        "AGDA",
        gradsurgery.AGDA,
        "gram",
        # both as long as 4 and √18 on average, and the second without its part along the first
        golden=([[4, 0], [-3, 3]], [1, 2], [4.121320344, 2.914213562]),
        equivariant=False,  # the first row is the primary one
        needs_losses=True,
    ),
    *[
        Row(
            f"DCGD, {variant}",
            lambda base, variant=variant, **switches: gradsurgery.DCGD(base, variant=variant, **switches),
            "gram",
            golden=([[2, 1], [-10, 1]], None, direction),
            common_descent=2,
            equivariant=False,  # the first row against all others
            keeps_the_sum=variant != "center",
        )
        for variant, direction in (
            ("center", [-0.618044388, 3.358469045]),
            ("projection", [-2.4, 4.8]),
            ("average", [-1.14059406, 2.99405941]),
        )
    ],
    Row(
        "EPO",
        gradsurgery.EPO,
        "gram",
        golden=([[1, 0], [0, 1]], [4, 1], [2, 0]),
        equivariant=False,  # the losses would have to be reordered too
        needs_losses=True,
    ),
    Row(
        "FERERO",
        gradsurgery.FERERO,
        "gram",
        golden=([[1, 0], [0, 1]], [4, 1], [2, -1]),
        scale="paper",
        homogeneous=None,  # κ is in units of one over the step
        equivariant=False,  # the losses would have to be reordered too
        needs_losses=True,
        reference={"FERERO kappa=1": "sum"},
        given="preference",
    ),
    *[
        Row(
            name,
            lambda base, scale=scale, **switches: gradsurgery.PMGDA(base, scale=scale, **switches),
            "gram",
            # μ_h = (σ − √½) / (1 − √½), the rest of the simplex on the first row; in sum scale times the row lengths
            golden=([[2, 0], [0, 2]], [4, 1], [0.7571067811 * times, -0.5863961031 * times]),
            scale=scale,
            homogeneous=1 if scale == "sum" else None,
            equivariant=False,
            needs_losses=True,
        )
        for name, scale, times in (("PMGDA", "sum", 4), ("PMGDA, paper", "paper", 1))
    ],
    Row(
        "MoCo",
        gradsurgery.MoCo,
        "gram",
        golden=([[2, 0], [0, 1]], None, [1.7, 1.15]),
        homogeneous=None,  # the step of the weights is absolute
        equivariant=False,  # it jumps where long rows all but tie
    ),
    Row(
        "MoCo, relative",
        lambda base, **switches: gradsurgery.MoCo(base, relative=True, **switches),
        "gram",
        golden=([[2, 0], [0, 1]], None, [1.88, 1.06]),
    ),
    Row(
        "MoDo",
        gradsurgery.MoDo,
        "gram",
        golden=([[2, 0], [0, 1]], None, [1.7, 1.15]),
        homogeneous=None,  # the step of the weights is absolute
        equivariant=False,  # it jumps where long rows all but tie
    ),
    Row(
        "MoDo, relative",
        lambda base, **switches: gradsurgery.MoDo(base, relative=True, **switches),
        "gram",
        golden=([[2, 0], [0, 1]], None, [1.88, 1.06]),
    ),
    Row(
        "SDMGrad",
        gradsurgery.SDMGrad,
        "rows",
        golden=([[1, 0], [0, 1]], None, [1, 1]),
        equivariant=False,  # the inner iteration jumps between corners
    ),
    Row(
        "SDMGrad, exact",
        lambda base, **switches: gradsurgery.SDMGrad(base, solver="exact", **switches),
        "gram",
        # 4 a = b for a + b = 1.3, and 2 (2 a, b) / 1.3
        golden=([[2, 0], [0, 1]], None, [0.8, 1.6]),
    ),
    Row(
        "SDMGrad, exact, strength 0",
        lambda base, **switches: gradsurgery.SDMGrad(base, solver="exact", strength=0.0, **switches),
        "gram",
        golden=([[2, 1], [-1, 1]], None, [0, 2]),
        common_descent=ALL,
        ignores_copies=True,
        stationary_is_zero=True,
        reference={"MGDA": "mean"},
    ),
    Row(
        "ExcessMTL",
        gradsurgery.ExcessMTL,
        "gram",
        golden=([[2, 1], [-10, 1]], None, [-8, 2]),
        keeps_the_sum=True,  # in the first step, which is the plain sum
    ),
    Row(
        "DBMTL",
        gradsurgery.DBMTL,
        "gram",
        golden=([[2, 0], [0, 8]], [1, 2], [4, 4]),
        scale="paper",
        row_scale_invariant=True,
        equivariant=False,  # the losses would have to be reordered too
        needs_losses=True,
    ),
    Row(
        "Bloop",
        gradsurgery.Bloop,
        "gram",
        golden=([[2, 0], [-3, 1]], None, [2, 0.1]),
        scale="priority",
        equivariant=False,  # the first row is the primary one
    ),
    Row(
        "BLUR",
        gradsurgery.BLUR,
        "gram",
        golden=([[2, 0], [3, 1]], None, [2, 1]),
        scale="priority",
        equivariant=False,  # the first row is the forget loss
    ),
    Row(
        "BLUR, gamma = 0.5, alpha = 2",
        lambda base, **switches: gradsurgery.BLUR(base, gamma=0.5, alpha=2.0, **switches),
        "gram",
        golden=([[2, 0], [3, 1], [-1, 1]], None, [1, 4]),
        scale="paper",
        equivariant=False,
    ),
    Row(
        "GRU",
        gradsurgery.GRU,
        "gram",
        golden=([[2, 1], [-3, 0]], None, [-3, 1]),
        equivariant=False,
        keeps_the_sum=True,
    ),
    Row(
        "GRU, floor",
        lambda base, **switches: gradsurgery.GRU(base, floor=-0.5, **switches),
        "gram",
        # the cosine is −1: half of the length is taken out along the average
        golden=([[2, 0], [-3, 0]], None, [-2, 0]),
        equivariant=False,
        keeps_the_sum=True,
    ),
    Row(
        "SAGO",
        gradsurgery.SAGO,
        "rows",
        golden=([[1, -2, 0], [3, 4, 5]], None, [1, 4, 0]),
        scale="priority",
        equivariant=False,
    ),
    Row(
        "SAGO, prefer_retain",
        lambda base, **switches: gradsurgery.SAGO(base, prefer_retain=True, **switches),
        "rows",
        golden=([[1, -2, 0], [3, 4, 5]], None, [4, 4, 5]),
        equivariant=False,
        keeps_the_sum=True,
    ),
    Row(
        "SAGO, gamma = 0.5, alpha = 2",
        lambda base, **switches: gradsurgery.SAGO(base, gamma=0.5, alpha=2.0, **switches),
        "rows",
        golden=([[1, -2, 0], [3, 3, 5], [0, 1, -1]], None, [0.5, 8, 0]),
        scale="paper",
        equivariant=False,
    ),
    Row(
        "AndMask",
        gradsurgery.AndMask,
        "rows",
        golden=([[1, 2, 0], [3, -1, 0]], None, [8, 0, 0]),
        common_descent=ALL,
        zero_rows="dropped",
    ),
    Row(
        "AndMask, tau = 0.3",
        lambda base, **switches: gradsurgery.AndMask(base, tau=0.3, **switches),
        "rows",
        golden=([[1, 2, 1], [3, -1, 0], [1, -2, -1]], None, [7.5, -1.5, 0]),
        zero_rows="dropped",
    ),
    Row(
        "SandMask",
        lambda base, **switches: gradsurgery.SandMask(base, tau=0.5, k=1.0, **switches),
        "rows",
        # variances 2 and 0.5: tanh(1/4) and tanh(1)
        golden=(
            [[1, 2, 3], [3, 3, -1]],
            None,
            [12 / (1 + np.tanh(1) / np.tanh(0.25)), 15 / (1 + np.tanh(0.25) / np.tanh(1)), 0],
        ),
        homogeneous=None,  # the variance is absolute
        zero_rows="dropped",
    ),
    Row(
        "SandMask, relative",
        lambda base, **switches: gradsurgery.SandMask(base, tau=0.5, k=1.0, relative=True, **switches),
        "rows",
        # divided by the mean square, 33/6
        golden=(
            [[1, 2, 3], [3, 3, -1]],
            None,
            [12 / (1 + np.tanh(5.5) / np.tanh(5.5 / 4)), 15 / (1 + np.tanh(5.5 / 4) / np.tanh(5.5)), 0],
        ),
        zero_rows="dropped",
    ),
    Row(
        "GCond",
        gradsurgery.GCond,
        "rows",
        # c = −3/√10 is critical, and equally strong tasks let the first one win
        golden=([[2, 0], [-3, 1]], None, [2, 1]),
        equivariant=False,  # a tie goes to the first
        keeps_the_sum=True,
    ),
    Row(
        "GradDrop",
        gradsurgery.GradDrop,
        "rows",
        golden=([[1, -2], [3, -4]], None, [4, -6]),
        keeps_the_sum=True,
    ),
    Row(
        "GradDrop, leak 1",
        lambda base, **switches: gradsurgery.GradDrop(base, leak=1.0, **switches),
        "rows",
        golden=([[2, 1], [-10, 1]], None, [-8, 2]),
        keeps_the_sum=True,
    ),
    Row(
        "TrimmedMean",
        gradsurgery.TrimmedMean,
        "rows",
        golden=([[1, 2], [2, -50], [3, 1]], None, [6, 3]),
    ),
    Row(
        "MConFIG",
        lambda base, **switches: gradsurgery.MConFIG(base, eps=0.0, **switches),
        "rows",
        golden=([[1, 0], [0, 4]], None, [1, 1]),
        scale="paper",
        homogeneous=0,
        equivariant=False,  # the sign of a coordinate that all but vanishes is rounding
        alone="defined",  # the first step of Adam: the sign of each entry
    ),
    Row(
        "MultiAdam",
        gradsurgery.MultiAdam.around,
        "rows",
        golden=([[2, 1], [-10, 1], [0, 5]], None, [0, 1]),  # the mean of three first steps of Adam
        scale="paper",
        homogeneous=None,  # ε is absolute
        alone="defined",
    ),
    Row(
        "AdaTask",
        gradsurgery.AdaTask.around,
        "rows",
        golden=([[2, 1], [-10, 1], [0, 5]], None, [0, 3]),
        scale="paper",
        homogeneous=None,
        alone="defined",
    ),
    Row(
        "MTAdam",
        gradsurgery.MTAdam.around,
        "rows",
        # The second row is brought to length 5, and the larger of 4 and 5 divides both.
        golden=([[3, 4], [0, 10]], None, [1, 1.8]),
        scale="paper",
        homogeneous=None,
        equivariant=False,  # the first row is the anchor
        alone="defined",
    ),
]

GRAM = [row for row in CATALOGUE if row.kind in ("gram", "rows")]


def over_processes() -> list[Row]:
    """The rows that several processes may do wrong, each in its own way.

    One class's stateless functions of the Gram matrix differ in their numbers alone: by the time one of them is called
    the matrix is the same in every process. The first of each class stands for all of them.
    """
    found: list[Row] = []
    seen: set[type] = set()
    for row in CATALOGUE:
        method = row.build(any_optimizer())
        own = row.kind == "rows" or row.needs_losses or method.stateful
        if own or type(method) not in seen:
            found.append(row)
        seen.add(type(method))
    return found
