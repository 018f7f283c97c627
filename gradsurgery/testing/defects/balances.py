"""Methods that balance: IMTL-G, Aligned-MTL, ConFIG, Nash-MTL, FairGrad, FERERO, AGDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gradsurgery.testing.defects.cases import (
    CONFLICT,
    Defect,
    assert_equal_projections,
    assert_exact,
    assert_finite,
    assert_near,
    assert_parallel,
    into,
    reference_rows,
    shown,
)

CASES: list[Defect] = []
_case = into(CASES)

# ----------------------------------------------------------------------------------------- IMTL-G, Aligned-MTL, ConFIG


@_case(
    "IM1",
    "IMTLG",
    asked="rows for which the paper's weights, of sum one, point uphill",
    right="equal and positive projections",
    seen="TorchJD, nash-mtl, LibMTL, SamsungLabs, conflictfree: every loss rises",
)
def _im1(make: Callable[..., Any]) -> None:
    rows = reference_rows("m3_n3_imtlg_negative")
    assert_equal_projections(rows, make()(rows), 1e-6)


@_case("IM2", "IMTLG", asked="rows of length 1e13", right="1e13 times the answer", seen="TorchJD: zero")
def _im2(make: Callable[..., Any]) -> None:
    rows = np.array([[2.0, 1.0], [-1.0, 1.0]])
    assert_near(make()(rows * 1e13) * 1e-13, make()(rows))


@_case(
    "IM3",
    "IMTLG",
    asked="row lengths from 1e-6 to 1e6",
    right="equal projections",
    seen="TorchJD: projections 1.6, 0.2, 2.3, 2.3, 2.3",
)
def _im3(make: Callable[..., Any]) -> None:
    rows = reference_rows("m5_n10_badscale")
    assert_equal_projections(rows, make()(rows), 1e-6)


@_case("IM4", "IMTLG", asked="two equal rows", right="the row", seen="LibMTL: the matrix is singular")
def _im4(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[1.0, -2.0, 0.5]] * 2)), [1.0, -2.0, 0.5])


@_case("IM5", "IMTLG", asked="a zero row", right="a finite direction", seen="LibMTL, nash-mtl, SamsungLabs: nan")
def _im5(make: Callable[..., Any]) -> None:
    assert_finite(make()(reference_rows("m3_n10_zero_row")))


@_case("IM6", "IMTLG", asked="one task", right="its gradient", seen="conflictfree: an error")
def _im6(make: Callable[..., Any]) -> None:
    assert_near(make()(np.array([[1.0, 2.0]])), [1.0, 2.0])


@_case(
    "AL1",
    "AlignedMTL",
    asked="any input, under a current torch",
    right="a direction",
    seen="LibMTL, SamsungLabs: torch.symeig is gone",
)
def _al1(make: Callable[..., Any]) -> None:
    assert_exact(make(), "Aligned-MTL min", "m3_n3_conflict")


@_case(
    "CF1",
    "ConFIG",
    asked="two equal rows; a zero row; opposite rows",
    right="their sum; the other row; zero",
    seen="conflictfree: nan, three times",
)
def _cf1(make: Callable[..., Any]) -> None:
    g = np.array([1.0, -2.0, 0.5])
    assert_near(make()(np.array([g, g])), 2 * g)
    assert_near(make()(np.array([g, 0 * g])), g)
    d = make()(np.array([g, -g]))
    assert_finite(d)
    assert np.linalg.norm(d) <= 1e-6 * np.linalg.norm(g), shown(d)


@_case(
    "CF2",
    "ConFIG",
    asked="nearly parallel rows",
    right="about their sum",
    seen="conflictfree: nearly orthogonal to it, 2 % as long",
)
def _cf2(make: Callable[..., Any]) -> None:
    assert_exact(make(), "ConFIG", "m2_n10_nearparallel", 1e-3)


@_case(
    "CF3",
    "ConFIG",
    asked="g and 1.7 g in float32, 1000 entries",
    right="their sum",
    seen="conflictfree: cosine 0.25, a quarter of the length",
)
def _cf3(make: Callable[..., Any]) -> None:
    g = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert_near(make()(np.array([g, np.float32(1.7) * g])), 2.7 * g, 1e-4)


@_case("CF6", "ConFIG", asked="three rows in float64", right="an answer in float64", seen="conflictfree: RuntimeError")
def _cf6(make: Callable[..., Any]) -> None:
    d = make()(reference_rows("m3_n3_conflict"))
    assert d.dtype == np.float64, f"{d.dtype}"
    assert_exact(make(), "ConFIG", "m3_n3_conflict")


@_case(
    "CF7",
    "ConFIG",
    asked="200 pairs of opposite rows",
    right="zero: rounding must not be blown up to a direction",
    seen="conflictfree: a direction of full length in half of the cases",
)
def _cf7(make: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        g = rng.standard_normal(10)
        d = make()(np.array([g, -2 * g]))
        wrong += not np.linalg.norm(d) <= 1e-6 * np.linalg.norm(g)
    assert wrong == 0, f"{wrong} of 200 are not zero"


@_case(
    "CF8",
    "ConFIG",
    asked="the length of the shortest row, with a zero row among three",
    right="twice the shorter one of the other two rows, times their cosine with the direction",
    seen="conflictfree: nan with each of its length models but the default one",
)
def _cf8(make: Callable[..., Any]) -> None:
    assert_near(make(length="min")(np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0]])), [1.0, 1.0])


# ----------------------------------------------------------------------------------------------- Nash-MTL and FairGrad


@_case("NA1", "NashMTL", asked="one task", right="its gradient's direction", seen="nash-mtl, TorchJD: ValueError")
def _na1(make: Callable[..., Any]) -> None:
    assert_parallel(make()(np.array([[1.0, 2.0]])), np.array([1.0, 2.0]))


@_case(
    "NA2",
    "NashMTL",
    asked="two equal rows",
    right="the row at length √2: G w = 1/w",
    seen="nash-mtl, TorchJD: the start value, silently",
)
def _na2(make: Callable[..., Any]) -> None:
    g = np.array([1.0, -2.0, 0.5])
    assert_near(make()(np.array([g, g])), g * 2**0.5 / np.linalg.norm(g))


@_case(
    "NA3",
    "NashMTL",
    asked="gradients of length 1e-6 and 1e6",
    right="the same direction and length as at 1",
    seen="nash-mtl, TorchJD: weights of 1 instead of 157111",
)
def _na3(make: Callable[..., Any]) -> None:
    rows = reference_rows("m3_n50_unit")
    expected = make()(rows)
    assert_near(make()(rows * 1e-6), expected)
    assert_near(make()(rows * 1e6), expected)


@_case(
    "NA4",
    "NashMTL, defaults",
    asked="the length with default arguments, for J and 10 J",
    right="√m, as in the paper, or in proportion to the gradients",
    seen="nash-mtl, TorchJD: always 1, since max_norm=1 cuts every exact solution",
)
def _na4(make: Callable[..., Any]) -> None:
    rows = reference_rows("m3_n3_conflict")
    one, ten = (float(np.linalg.norm(make()(rows * s))) for s in (1.0, 10.0))
    assert abs(ten - 10 * one) < 1e-6 * ten or abs(one - 3**0.5) + abs(ten - 3**0.5) < 1e-5, f"{one:.4g}, {ten:.4g}"


@_case(
    "FG1",
    "FairGrad",
    asked="gradients of length 1e-6, α = 1",
    right="the direction at length 1, which does not depend on theirs",
    seen="the official code, TorchJD, LibMTL: 99 % off",
)
def _fg1(make: Callable[..., Any]) -> None:
    rows = reference_rows("m3_n50_unit")
    assert_exact(make(alpha=1.0), "FairGrad alpha=1.0", "m3_n50_unit")
    assert_near(make(alpha=1.0)(rows * 1e-6), make(alpha=1.0)(rows))


@_case(
    "FG2",
    "FairGrad",
    asked="a zero row, α = 1",
    right="the solution without that row",
    seen="TorchJD: weight 572 on the zero row",
)
def _fg2(make: Callable[..., Any]) -> None:
    rows = reference_rows("m3_n10_zero_row")
    assert_near(make(alpha=1.0)(rows), make(alpha=1.0)(rows[np.abs(rows).max(axis=1) > 0]))


@_case(
    "FG3",
    "FairGrad",
    asked="[[2, 1], [-10, 1]] with α = 0",
    right="[-2.4, 4.8], the limit as α goes to 0: no loss rises",
    seen="the official code: a division by zero; TorchJD: the mean, along which the first loss rises",
)
def _fg3(make: Callable[..., Any]) -> None:
    assert_near(make(alpha=0.0)(CONFLICT), [-2.4, 4.8])


@_case(
    "PI1",
    "PIVRG",
    asked="two rows of lengths 1e-4 and 1e3 with equal scores",
    right="weights w with G w = w^(-1/2)",
    seen="the authors' code (MTLlib): weights 3e3 to 3e4 times off, since the search starts at 1/m",
)
def _pi1(make: Callable[..., Any]) -> None:
    rows = np.array([[3e-4, 1e-4, 2e-4], [-400.0, 900.0, 100.0]])
    d = np.asarray(make()(rows))
    assert_finite(d)
    weights = np.linalg.lstsq(rows.T / np.linalg.norm(rows, axis=1), d, rcond=None)[0] / np.linalg.norm(rows, axis=1)
    assert (weights > 0).all(), f"weights {shown(weights)}"
    assert_near((rows @ d) ** 2 * weights, [1.0, 1.0], what="squared products times weights")


# ----------------------------------------------------------------------------------------------------- FERERO and AGDA


@_case(
    "FE1",
    "FERERO",
    asked="rows of length 5 and losses 4 and 1, which are to become equal",
    right="a finite direction along which their difference falls by 3",
    seen="the official code with its defaults: 200 steps diverge, to 1e106",
)
def _fe1(make: Callable[..., Any]) -> None:
    rows = np.array([[3.0, 4.0, 0.0], [0.0, -3.0, 4.0]])
    d = np.asarray(make()(rows, np.array([4.0, 1.0])))
    assert_finite(d)
    assert_near(rows[0] @ d - rows[1] @ d, 3.0, what="the difference")


@_case(
    "AG1",
    "AGDA",
    asked="three steps whose losses fall by half, with periods of two steps",
    right="rows of lengths 4 and 2 come out at 3 and 3 first, at 3.4 and 2.6 then",
    seen="PaddleScience: UnboundLocalError in each step whose number is no multiple of the period",
)
def _ag1(make: Callable[..., Any]) -> None:
    direct = make(period=2)
    rows, losses = np.array([[4.0, 0.0], [0.0, 2.0]]), np.array([2.0, 2.0])
    assert_near(direct(rows, losses), [3.0, 3.0])
    # The average goes from 0.002 to 0.002998, so that r = 1.499 / 2.499.
    share = 1.499 / 2.499
    assert_near(direct(rows, losses / 2), [4 - share, 2 + share])
    assert_finite(direct(rows, losses / 4))
