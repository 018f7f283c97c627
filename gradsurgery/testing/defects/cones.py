"""Methods that look for the shortest or the nearest direction: MGDA, UPGrad, DualProj, PCD, CAGrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gradsurgery.testing.defects.cases import (
    CONFLICT,
    Defect,
    assert_exact,
    assert_finite,
    assert_near,
    into,
    reference_rows,
    shown,
)
from gradsurgery.testing.properties import assert_common_descent, assert_homogeneous

CASES: list[Defect] = []
_case = into(CASES)

# ---------------------------------------------------------------------------------------------------------------- MGDA


@_case(
    "MG1",
    "MGDA",
    asked="eight rows of rank 4",
    right="the min-norm point",
    seen="TorchJD: 32 % off after its 100 rounds",
)
def _mg1(make: Callable[..., Any]) -> None:
    assert_exact(make(), "MGDA", "m8_n10_rank4")


@_case(
    "MG2",
    "MGDA",
    asked="row lengths from 1e-6 to 1e6",
    right="the min-norm point, which is never longer than the shortest row",
    seen="TorchJD: length 2.5 where the shortest row has 3e-6",
)
def _mg2(make: Callable[..., Any]) -> None:
    rows = reference_rows("m5_n10_badscale")
    length, shortest = float(np.linalg.norm(make()(rows))), float(np.linalg.norm(rows, axis=1).min())
    assert length <= shortest * (1 + 1e-6), f"length {length:.2g}, shortest row {shortest:.2g}"
    assert_exact(make(), "MGDA", "m5_n10_badscale")


@_case(
    "MG3",
    "MGDA",
    asked="Frank-Wolfe with five rounds at most",
    right="the point after five rounds",
    seen="isl-org and copies: the counter never moves, 105991 rounds at a limit of 250",
)
def _mg3(make: Callable[..., Any]) -> None:
    rows = reference_rows("m8_n10_rank4")
    w = np.full(8, 1 / 8)
    for _ in range(5):
        point = w @ rows
        corner = rows[(rows @ point).argmin()]
        step = np.clip((point - corner) @ point / ((point - corner) @ (point - corner)), 0.0, 1.0)
        w = (1 - step) * w + step * (np.arange(8) == (rows @ point).argmin())
    assert_near(make(solver="frank-wolfe", max_iterations=5, tolerance=1e-30)(rows), w @ rows)


@_case("MG4", "MGDA", asked="one task", right="its gradient", seen="isl-org, nash-mtl, LibMTL: UnboundLocalError")
def _mg4(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[1.0, 2.0]])), [1.0, 2.0])


@_case(
    "MG5",
    "MGDA",
    asked="[[2e4, 1e4], [-1e4, 1e4]]",
    right="weights 1/3 and 2/3",
    seen="isl-org, nash-mtl, LibMTL, SamsungLabs: an error or zero once the squared norm passes 1e8",
)
def _mg5(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[2e4, 1e4], [-1e4, 1e4]])), [0.0, 1e4])


@_case(
    "MG7",
    "MGDA",
    asked="[[1, 0], [3, 0.1]]",
    right="weights 1 and 0",
    seen="isl-org and copies: 0.999 and 0.001",
)
def _mg7(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[1.0, 0.0], [3.0, 0.1]])), [1.0, 0.0], 1e-9)


@_case(
    "MG8",
    "MGDA",
    asked="rows divided by their lengths",
    right="the min-norm point of the unit rows",
    seen="nash-mtl: IndexError",
)
def _mg8(make: Callable[..., Any]) -> None:
    assert_exact(make(normalize="l2"), "MGDA normalised l2", "m3_n3_conflict")


@_case(
    "MG9",
    "MGDA",
    asked="rows divided by their losses",
    right="no loss rises: weights of the scaled rows belong to the scaled rows",
    seen="nash-mtl, isl-org: ⟨g₁, d⟩ = -0.90",
)
def _mg9(make: Callable[..., Any]) -> None:
    d = make(normalize="loss")(np.array([[-0.1, 2.1], [-1.1, -0.4]]), np.array([1.68, 6.83]))
    assert_near(d, [-0.155574, 0.012071], 1e-4)


@_case("MG10", "MGDA", asked="a zero row, rows normalised", right="zero: stationary", seen="LibMTL: nan")
def _mg10(make: Callable[..., Any]) -> None:
    d = make(normalize="l2")(reference_rows("m3_n10_zero_row"))
    assert_finite(d)
    assert not d.any(), shown(d)


@_case("MG11", "MGDA", asked="gradients of length 1e-6", right="1e-6 times the answer", seen="libmoon: 12 % off")
def _mg11(make: Callable[..., Any]) -> None:
    assert_near(make()(reference_rows("m3_n50_unit") * 1e-6) * 1e6, make()(reference_rows("m3_n50_unit")))


# ----------------------------------------------------------------------------------------------- UPGrad, DualProj, PCD

for _method in ("UPGrad", "DualProj"):

    @_case(
        f"UP1 {_method}",
        _method,
        asked="[[2, 1], [-10, 1]] · 5e-4",
        right="5e-4 times the answer, without conflict",
        seen="TorchJD: the plain mean, in full conflict; LibMTL (UPGrad) too",
    )
    def _up1(make: Callable[..., Any]) -> None:
        assert_homogeneous(make(), CONFLICT, 5e-4, tolerance=1e-6)
        assert_common_descent(make(), CONFLICT * 5e-4, tolerance=1e-6)


@_case(
    "UP2",
    "UPGrad",
    asked="row lengths from 1e-6 to 1e6, and eight rows of rank 4",
    right="the sum of the projections",
    seen="TorchJD: 6 % and 0.2 % off, by its regularisation",
)
def _up2(make: Callable[..., Any]) -> None:
    assert_exact(make(), "UPGrad", "m5_n10_badscale")
    assert_exact(make(), "UPGrad", "m8_n10_rank4")


@_case(
    "PD1",
    "PCD",
    asked="a secondary row that almost opposes the primary one, with the primary loss protected",
    right="⟨g₁, d⟩ ≥ 0",
    seen="TorchJD: ⟨g₁, d⟩ < 0, as the exact solution of the paper's problem has it, without an option or a word",
)
def _pd1(make: Callable[..., Any]) -> None:
    rows = np.array([[1.0, 0.0], [-0.9987, 0.051]])
    d = make(tau=0.02, protect_primary=True)(rows)
    assert (rows @ d >= -1e-9).all(), f"products {shown(rows @ d)}"


# -------------------------------------------------------------------------------------------------------------- CAGrad


@_case(
    "CA1",
    "CAGrad",
    asked="[[2, 1], [-10, 1]] · 5e-4, c = 0.5",
    right="5e-4 times [-2.156091, 1.921954]",
    seen="TorchJD: zero, training stops",
)
def _ca1(make: Callable[..., Any]) -> None:
    assert_near(make(c=0.5)(CONFLICT * 5e-4) / 5e-4, [-2.156091, 1.921954])


@_case(
    "CA2",
    "CAGrad",
    asked="a zero row among two that agree",
    right="the others still train",
    seen="TorchJD: zero",
)
def _ca2(make: Callable[..., Any]) -> None:
    rows = np.array([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
    d = make(c=0.5)(rows)
    assert_finite(d)
    assert np.linalg.norm(d) > 0.5 * np.linalg.norm(rows.mean(axis=0)), shown(d)
    assert (rows @ d >= 0).all(), f"products {shown(rows @ d)}"


@_case(
    "CA3",
    "CAGrad",
    asked="gradients of length 1e-6",
    right="1e-6 times the answer",
    seen="LibMTL, nash-mtl, the official code, SamsungLabs: 720 to 830 % off",
)
def _ca3(make: Callable[..., Any]) -> None:
    # Compared with the solver's own answer at length one, which general solvers know to five digits.
    assert_near(
        make(c=0.5)(reference_rows("m3_n50_unit") * 1e-6) * 1e6, make(c=0.5)(reference_rows("m3_n50_unit")), 1e-4
    )
