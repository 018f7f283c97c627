"""Where public implementations went wrong: each case with its question, the right answer, and a check.

Every case was seen in a published library or in widely copied code. A case is put to any :class:`Library` that offers
its method; what a library does not have cannot be wrong there.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import permutations, product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradsurgery.testing.adapters import Kind, Library
from gradsurgery.testing.properties import assert_common_descent, assert_homogeneous
from gradsurgery.testing.reference import reference, reference_cases

Array = NDArray[Any]
Outcome = Literal["right", "wrong", "error", "not offered"]


@dataclass(frozen=True)
class Defect:
    """One case.

    Attributes:
        id: Short name. Cases of several methods that share a cause share its first part.
        method: Which method is asked, by this library's name of it.
        kind: Which table of a :class:`Library` answers.
        asked: The question.
        right: The right answer.
        seen: What was seen, and where.
        check: Called with a function that makes fresh instances of the method; raises where the answer is wrong.
    """

    id: str
    method: str
    kind: Kind
    asked: str
    right: str
    seen: str
    check: Callable[[Callable[..., Any]], None]


class Verdict(NamedTuple):
    """What a library did with a case.

    Attributes:
        outcome: "right"; "wrong": another answer; "error": an exception instead of an answer; "not offered".
        detail: What was wrong.
    """

    outcome: Outcome
    detail: str = ""


class _NotOffered(ValueError):
    """The library does not have the method, or an option of it."""


DEFECTS: list[Defect] = []


def examine(library: Library, case: Defect) -> Verdict:
    """Put a case to a library.

    Args:
        library: The library.
        case: The case.

    Returns:
        What it did.
    """
    factory = library.table(case.kind).get(case.method)
    if factory is None:
        return Verdict("not offered")

    def make(*args: Any, **options: Any) -> Any:
        try:
            signature(factory).bind(*args, **options)
        except TypeError as error:
            raise _NotOffered(str(error)) from error
        return factory(*args, **options)

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            case.check(make)
    except _NotOffered:
        return Verdict("not offered")
    except AssertionError as error:
        return Verdict("wrong", str(error).strip().splitlines()[0])
    except Exception as error:  # whatever another library may raise
        return Verdict("error", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Verdict("right")


def _case(
    name: str, method: str, kind: Kind = "direction", *, asked: str, right: str, seen: str
) -> Callable[[Callable[[Callable[..., Any]], None]], Callable[[Callable[..., Any]], None]]:
    def register(check: Callable[[Callable[..., Any]], None]) -> Callable[[Callable[..., Any]], None]:
        DEFECTS.append(Defect(name, method, kind, asked, right, seen, check))
        return check

    return register


# ----------------------------------------------------------------------------------------------------- helpers

_CONFLICT = np.array([[2.0, 1.0], [-10.0, 1.0]])
_TURNS = np.array([[3.0, -2.0], [2.0, 1.0], [-3.0, -1.0]])


def _rows(name: str) -> Array:
    return np.array(reference()["inputs"][name]["J"], dtype=np.float64)


def _near(found: Array, expected: Any, tolerance: float = 1e-6, what: str = "answer") -> None:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    size = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(found - expected)) / size
    assert error <= tolerance, f"{what} {_shown(found)}, expected {_shown(expected)}"


def _exact(direct: Callable[..., Any], method: str, name: str, tolerance: float = 1e-6) -> None:
    """Agreement with a reference answer. Single cases ask for the idea, not for the last digits."""
    case = next(case for case in reference_cases(method) if case.name == name)
    found = np.asarray(direct(case.rows, case.losses))
    _finite(found)
    length = float(np.linalg.norm(case.direction)) or float(np.linalg.norm(case.rows, axis=1).max())
    error = float(np.linalg.norm(found - case.direction)) / length
    assert error <= tolerance, f"{_shown(found)} is off by {error:.1e}"


def _shown(values: Array) -> str:
    flat = np.ravel(values)
    return "[" + ", ".join(f"{x:.4g}" for x in flat[:4]) + (", …]" if len(flat) > 4 else "]")


def _finite(found: Array) -> None:
    assert np.isfinite(found).all(), f"not finite: {_shown(found)}"


def _parallel(found: Array, expected: Array, tolerance: float = 1e-6) -> None:
    _finite(found)
    length = float(np.linalg.norm(found))
    assert length > 0, "the direction is zero"
    _near(found / length, expected / np.linalg.norm(expected), tolerance, "unit direction")


def _projections(rows: Array, d: Array, tolerance: float) -> None:
    found = rows @ d / np.linalg.norm(rows, axis=1)
    assert found.min() > 0, f"the projections {_shown(found)} are not positive"
    assert np.ptp(found) <= tolerance * found.max(), f"the projections {_shown(found)} are not equal"


def _losses(p: nn.Parameter, rows: Any, values: Sequence[float]) -> list[Tensor]:
    """Losses with given values and gradients."""
    here = p - p.detach()
    return [torch.tensor(g, dtype=p.dtype) @ here + v for g, v in zip(rows, values, strict=True)]


def _sgd(*params: nn.Parameter, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, weight_decay=weight_decay)


def _resumes(make: Callable[..., Any], calls: Sequence[Any], **options: Any) -> None:
    """The call after a state round trip gives what an uninterrupted run gives."""
    kept, fresh = make(**options), make(**options)
    for call in calls[:-1]:
        kept(call)
    fresh.load_state_dict(kept.state_dict())
    expected = kept(calls[-1])
    _near(fresh(calls[-1]), expected, 1e-12, "resumed answer")


def _steps(count: int) -> list[Array]:
    """Two rows per step: with more, GradVac would draw an order."""
    rng = np.random.default_rng(7)
    return [rng.standard_normal((2, 6)) * np.array([[1.0], [3.0]]) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- state

for _method, _options in (("GradVac", {"beta": 0.5}), ("PCD", {}), ("ExcessMTL", {}), ("NashMTL", {"every": 10})):
    _case(
        f"ST1 {_method}",
        _method,
        asked="three steps, the state into a fresh instance, the fourth step",
        right="as without the interruption",
        seen="TorchJD: loading raises, or the next step differs; others keep such state outside any state_dict",
    )(lambda make, options=_options: _resumes(make, _steps(4), **options))  # type: ignore[misc]

_HISTORY = np.array([[4.0, 4.0], [3.0, 3.9], [2.5, 2.0], [2.4, 1.9], [1.2, 1.8]])
for _method in ("DWA", "FAMO"):
    _case(
        f"ST1 {_method}",
        _method,
        "weights",
        asked="some steps, the state into a fresh instance, one more step",
        right="as without the interruption",
        seen="TorchJD: loads, and the next step differs",
    )(lambda make: _resumes(make, [_HISTORY[:4], _HISTORY[4:]]))


# ------------------------------------------------------------------------------------------------ PCGrad, GradVac


@_case(
    "PC1",
    "PCGrad",
    asked='"sum" and "mean" of [[2, 1], [-10, 1]]',
    right="[-2.281188, 5.988119], and half of it",
    seen='WeiChengTseng/Pytorch-PCGrad: both are the mean, since `if reduction:` is true for "sum" as well',
)
def _pc1(make: Callable[..., Any]) -> None:
    exact = np.array([-2.281188118811881, 5.988118811881188])
    _near(make(reduction="sum")(_CONFLICT), exact)
    _near(make(reduction="mean")(_CONFLICT), exact / 2)


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
    training = make(_sgd(used, unused, weight_decay=0.5))
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
        p = _TURNS[i].copy()
        for j in order:
            p -= min(p @ _TURNS[j], 0.0) / (_TURNS[j] @ _TURNS[j]) * _TURNS[j]
        return p

    terms = [[projected(i, order) for order in permutations({0, 1, 2} - {i})] for i in range(3)]
    possible = np.array([sum(choice) for choice in product(*terms)])
    direct = make()
    for _ in range(60):
        d = direct(_TURNS)
        assert np.abs(possible - d).max(axis=1).min() < 1e-9, f"{_shown(d)} is none of them"


for _method in ("PCGrad", "GradVac"):

    @_case(
        f"PC4 {_method}",
        _method,
        asked="[[2, 1], [-10, 1]] · 1e-5",
        right="1e-5 times the answer for [[2, 1], [-10, 1]], without conflict",
        seen="LibMTL, SamsungLabs, TorchJD (GradVac): an absolute epsilon, 86 to 114 % off",
    )
    def _pc4(make: Callable[..., Any]) -> None:
        _near(make()(_CONFLICT * 1e-5) * 1e5, make()(_CONFLICT))
        assert_common_descent(make(), _CONFLICT * 1e-5)


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
    make(_sgd(p, q), reduction="mean").backward([(p + 0 * q).sum(), (p + q).sum()])
    assert p.grad is not None, "p has no gradient"
    assert q.grad is not None, "q has no gradient"
    _near(np.array([p.grad.item(), q.grad.item()]), [1.0, 0.5])


@_case(
    "PC7",
    "PCGrad",
    asked="many draws of three tasks in conflict",
    right="more than one direction: the order of the visits is drawn",
    seen="conflictfree: always the order of the tasks, which favours some by their place",
)
def _pc7(make: Callable[..., Any]) -> None:
    direct = make()
    draws = np.array([direct(_rows("m3_n3_conflict")) for _ in range(60)])
    _finite(draws)
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
        make(_sgd(p)).backward([p.sum(), 2 * p.detach().sum()])
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
    _near(direct(np.eye(2)), [gain, gain], 1e-3)


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
    make(_sgd(p)).backward([p[0] + p[1], p[0] - p[1]])
    assert p.grad is not None, ".grad is None"
    _near(p.grad.numpy(), [2.0, 0.0])


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


# ---------------------------------------------------------------------------------------------------------- MGDA


@_case(
    "MG1",
    "MGDA",
    asked="eight rows of rank 4",
    right="the min-norm point",
    seen="TorchJD: 32 % off after its 100 rounds",
)
def _mg1(make: Callable[..., Any]) -> None:
    _exact(make(), "MGDA", "m8_n10_rank4")


@_case(
    "MG2",
    "MGDA",
    asked="row lengths from 1e-6 to 1e6",
    right="the min-norm point, which is never longer than the shortest row",
    seen="TorchJD: length 2.5 where the shortest row has 3e-6",
)
def _mg2(make: Callable[..., Any]) -> None:
    rows = _rows("m5_n10_badscale")
    length, shortest = float(np.linalg.norm(make()(rows))), float(np.linalg.norm(rows, axis=1).min())
    assert length <= shortest * (1 + 1e-6), f"length {length:.2g}, shortest row {shortest:.2g}"
    _exact(make(), "MGDA", "m5_n10_badscale")


@_case(
    "MG3",
    "MGDA",
    asked="Frank-Wolfe with five rounds at most",
    right="the point after five rounds",
    seen="isl-org and copies: the counter never moves, 105991 rounds at a limit of 250",
)
def _mg3(make: Callable[..., Any]) -> None:
    rows = _rows("m8_n10_rank4")
    w = np.full(8, 1 / 8)
    for _ in range(5):
        point = w @ rows
        corner = rows[(rows @ point).argmin()]
        step = np.clip((point - corner) @ point / ((point - corner) @ (point - corner)), 0.0, 1.0)
        w = (1 - step) * w + step * (np.arange(8) == (rows @ point).argmin())
    _near(make(solver="frank-wolfe", max_iterations=5, tolerance=1e-30)(rows), w @ rows)


@_case("MG4", "MGDA", asked="one task", right="its gradient", seen="isl-org, nash-mtl, LibMTL: UnboundLocalError")
def _mg4(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[1.0, 2.0]])), [1.0, 2.0])


@_case(
    "MG5",
    "MGDA",
    asked="[[2e4, 1e4], [-1e4, 1e4]]",
    right="weights 1/3 and 2/3",
    seen="isl-org, nash-mtl, LibMTL, SamsungLabs: an error or zero once the squared norm passes 1e8",
)
def _mg5(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[2e4, 1e4], [-1e4, 1e4]])), [0.0, 1e4])


@_case(
    "MG7",
    "MGDA",
    asked="[[1, 0], [3, 0.1]]",
    right="weights 1 and 0",
    seen="isl-org and copies: 0.999 and 0.001",
)
def _mg7(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[1.0, 0.0], [3.0, 0.1]])), [1.0, 0.0], 1e-9)


@_case(
    "MG8",
    "MGDA",
    asked="rows divided by their lengths",
    right="the min-norm point of the unit rows",
    seen="nash-mtl: IndexError",
)
def _mg8(make: Callable[..., Any]) -> None:
    _exact(make(normalize="l2"), "MGDA normalised l2", "m3_n3_conflict")


@_case(
    "MG9",
    "MGDA",
    asked="rows divided by their losses",
    right="no loss rises: weights of the scaled rows belong to the scaled rows",
    seen="nash-mtl, isl-org: ⟨g₁, d⟩ = -0.90",
)
def _mg9(make: Callable[..., Any]) -> None:
    d = make(normalize="loss")(np.array([[-0.1, 2.1], [-1.1, -0.4]]), np.array([1.68, 6.83]))
    _near(d, [-0.155574, 0.012071], 1e-4)


@_case("MG10", "MGDA", asked="a zero row, rows normalised", right="zero: stationary", seen="LibMTL: nan")
def _mg10(make: Callable[..., Any]) -> None:
    d = make(normalize="l2")(_rows("m3_n10_zero_row"))
    _finite(d)
    assert not d.any(), _shown(d)


@_case("MG11", "MGDA", asked="gradients of length 1e-6", right="1e-6 times the answer", seen="libmoon: 12 % off")
def _mg11(make: Callable[..., Any]) -> None:
    _near(make()(_rows("m3_n50_unit") * 1e-6) * 1e6, make()(_rows("m3_n50_unit")))


# -------------------------------------------------------------------------------------------- UPGrad, DualProj, PCD

for _method in ("UPGrad", "DualProj"):

    @_case(
        f"UP1 {_method}",
        _method,
        asked="[[2, 1], [-10, 1]] · 5e-4",
        right="5e-4 times the answer, without conflict",
        seen="TorchJD: the plain mean, in full conflict; LibMTL (UPGrad) too",
    )
    def _up1(make: Callable[..., Any]) -> None:
        assert_homogeneous(make(), _CONFLICT, 5e-4, tolerance=1e-6)
        assert_common_descent(make(), _CONFLICT * 5e-4, tolerance=1e-6)


@_case(
    "UP2",
    "UPGrad",
    asked="row lengths from 1e-6 to 1e6, and eight rows of rank 4",
    right="the sum of the projections",
    seen="TorchJD: 6 % and 0.2 % off, by its regularisation",
)
def _up2(make: Callable[..., Any]) -> None:
    _exact(make(), "UPGrad", "m5_n10_badscale")
    _exact(make(), "UPGrad", "m8_n10_rank4")


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
    assert (rows @ d >= -1e-9).all(), f"products {_shown(rows @ d)}"


# -------------------------------------------------------------------------------------------------------- CAGrad


@_case(
    "CA1",
    "CAGrad",
    asked="[[2, 1], [-10, 1]] · 5e-4, c = 0.5",
    right="5e-4 times [-2.156091, 1.921954]",
    seen="TorchJD: zero, training stops",
)
def _ca1(make: Callable[..., Any]) -> None:
    _near(make(c=0.5)(_CONFLICT * 5e-4) / 5e-4, [-2.156091, 1.921954])


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
    _finite(d)
    assert np.linalg.norm(d) > 0.5 * np.linalg.norm(rows.mean(axis=0)), _shown(d)
    assert (rows @ d >= 0).all(), f"products {_shown(rows @ d)}"


@_case(
    "CA3",
    "CAGrad",
    asked="gradients of length 1e-6",
    right="1e-6 times the answer",
    seen="LibMTL, nash-mtl, the official code, SamsungLabs: 720 to 830 % off",
)
def _ca3(make: Callable[..., Any]) -> None:
    # Compared with the solver's own answer at length one, which general solvers know to five digits.
    _near(make(c=0.5)(_rows("m3_n50_unit") * 1e-6) * 1e6, make(c=0.5)(_rows("m3_n50_unit")), 1e-4)


# ------------------------------------------------------------------------------------------ IMTL-G, Aligned-MTL, ConFIG


@_case(
    "IM1",
    "IMTLG",
    asked="rows for which the paper's weights, of sum one, point uphill",
    right="equal and positive projections",
    seen="TorchJD, nash-mtl, LibMTL, SamsungLabs, conflictfree: every loss rises",
)
def _im1(make: Callable[..., Any]) -> None:
    rows = _rows("m3_n3_imtlg_negative")
    _projections(rows, make()(rows), 1e-6)


@_case("IM2", "IMTLG", asked="rows of length 1e13", right="1e13 times the answer", seen="TorchJD: zero")
def _im2(make: Callable[..., Any]) -> None:
    rows = np.array([[2.0, 1.0], [-1.0, 1.0]])
    _near(make()(rows * 1e13) * 1e-13, make()(rows))


@_case(
    "IM3",
    "IMTLG",
    asked="row lengths from 1e-6 to 1e6",
    right="equal projections",
    seen="TorchJD: projections 1.6, 0.2, 2.3, 2.3, 2.3",
)
def _im3(make: Callable[..., Any]) -> None:
    rows = _rows("m5_n10_badscale")
    _projections(rows, make()(rows), 1e-6)


@_case("IM4", "IMTLG", asked="two equal rows", right="the row", seen="LibMTL: the matrix is singular")
def _im4(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[1.0, -2.0, 0.5]] * 2)), [1.0, -2.0, 0.5])


@_case("IM5", "IMTLG", asked="a zero row", right="a finite direction", seen="LibMTL, nash-mtl, SamsungLabs: nan")
def _im5(make: Callable[..., Any]) -> None:
    _finite(make()(_rows("m3_n10_zero_row")))


@_case("IM6", "IMTLG", asked="one task", right="its gradient", seen="conflictfree: an error")
def _im6(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[1.0, 2.0]])), [1.0, 2.0])


@_case(
    "AL1",
    "AlignedMTL",
    asked="any input, under a current torch",
    right="a direction",
    seen="LibMTL, SamsungLabs: torch.symeig is gone",
)
def _al1(make: Callable[..., Any]) -> None:
    _exact(make(), "Aligned-MTL min", "m3_n3_conflict")


@_case(
    "CF1",
    "ConFIG",
    asked="two equal rows; a zero row; opposite rows",
    right="their sum; the other row; zero",
    seen="conflictfree: nan, three times",
)
def _cf1(make: Callable[..., Any]) -> None:
    g = np.array([1.0, -2.0, 0.5])
    _near(make()(np.array([g, g])), 2 * g)
    _near(make()(np.array([g, 0 * g])), g)
    d = make()(np.array([g, -g]))
    _finite(d)
    assert np.linalg.norm(d) <= 1e-6 * np.linalg.norm(g), _shown(d)


@_case(
    "CF2",
    "ConFIG",
    asked="nearly parallel rows",
    right="about their sum",
    seen="conflictfree: nearly orthogonal to it, 2 % as long",
)
def _cf2(make: Callable[..., Any]) -> None:
    _exact(make(), "ConFIG", "m2_n10_nearparallel", 1e-3)


@_case(
    "CF3",
    "ConFIG",
    asked="g and 1.7 g in float32, 1000 entries",
    right="their sum",
    seen="conflictfree: cosine 0.25, a quarter of the length",
)
def _cf3(make: Callable[..., Any]) -> None:
    g = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    _near(make()(np.array([g, np.float32(1.7) * g])), 2.7 * g, 1e-4)


@_case("CF6", "ConFIG", asked="three rows in float64", right="an answer in float64", seen="conflictfree: RuntimeError")
def _cf6(make: Callable[..., Any]) -> None:
    d = make()(_rows("m3_n3_conflict"))
    assert d.dtype == np.float64, f"{d.dtype}"
    _exact(make(), "ConFIG", "m3_n3_conflict")


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
    _near(make(length="min")(np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0]])), [1.0, 1.0])


# --------------------------------------------------------------------------------------------- Nash-MTL and FairGrad


@_case("NA1", "NashMTL", asked="one task", right="its gradient's direction", seen="nash-mtl, TorchJD: ValueError")
def _na1(make: Callable[..., Any]) -> None:
    _parallel(make()(np.array([[1.0, 2.0]])), np.array([1.0, 2.0]))


@_case(
    "NA2",
    "NashMTL",
    asked="two equal rows",
    right="the row at length √2: G w = 1/w",
    seen="nash-mtl, TorchJD: the start value, silently",
)
def _na2(make: Callable[..., Any]) -> None:
    g = np.array([1.0, -2.0, 0.5])
    _near(make()(np.array([g, g])), g * 2**0.5 / np.linalg.norm(g))


@_case(
    "NA3",
    "NashMTL",
    asked="gradients of length 1e-6 and 1e6",
    right="the same direction and length as at 1",
    seen="nash-mtl, TorchJD: weights of 1 instead of 157111",
)
def _na3(make: Callable[..., Any]) -> None:
    rows = _rows("m3_n50_unit")
    expected = make()(rows)
    _near(make()(rows * 1e-6), expected)
    _near(make()(rows * 1e6), expected)


@_case(
    "NA4",
    "NashMTL, defaults",
    asked="the length with default arguments, for J and 10 J",
    right="√m, as in the paper, or in proportion to the gradients",
    seen="nash-mtl, TorchJD: always 1, since max_norm=1 cuts every exact solution",
)
def _na4(make: Callable[..., Any]) -> None:
    rows = _rows("m3_n3_conflict")
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
    rows = _rows("m3_n50_unit")
    _exact(make(alpha=1.0), "FairGrad alpha=1.0", "m3_n50_unit")
    _near(make(alpha=1.0)(rows * 1e-6), make(alpha=1.0)(rows))


@_case(
    "FG2",
    "FairGrad",
    asked="a zero row, α = 1",
    right="the solution without that row",
    seen="TorchJD: weight 572 on the zero row",
)
def _fg2(make: Callable[..., Any]) -> None:
    rows = _rows("m3_n10_zero_row")
    _near(make(alpha=1.0)(rows), make(alpha=1.0)(rows[np.abs(rows).max(axis=1) > 0]))


@_case(
    "FG3",
    "FairGrad",
    asked="[[2, 1], [-10, 1]] with α = 0",
    right="[-2.4, 4.8], the limit as α goes to 0: no loss rises",
    seen="the official code: a division by zero; TorchJD: the mean, along which the first loss rises",
)
def _fg3(make: Callable[..., Any]) -> None:
    _near(make(alpha=0.0)(_CONFLICT), [-2.4, 4.8])


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
    _finite(d)
    weights = np.linalg.lstsq(rows.T / np.linalg.norm(rows, axis=1), d, rcond=None)[0] / np.linalg.norm(rows, axis=1)
    assert (weights > 0).all(), f"weights {_shown(weights)}"
    _near((rows @ d) ** 2 * weights, [1.0, 1.0], what="squared products times weights")


# ----------------------------------------------------------------------------------------------- FERERO and AGDA


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
    _finite(d)
    _near(rows[0] @ d - rows[1] @ d, 3.0, what="the difference")


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
    _near(direct(rows, losses), [3.0, 3.0])
    # The average goes from 0.002 to 0.002998, so that r = 1.499 / 2.499.
    share = 1.499 / 2.499
    _near(direct(rows, losses / 2), [4 - share, 2 + share])
    _finite(direct(rows, losses / 4))


# ------------------------------------------------------------------------------- Krum, GradDrop, ExcessMTL, MoCo


@_case(
    "KR1",
    "Krum",
    asked="six rows, one of them Byzantine",
    right="the row with the least sum of squared distances",
    seen="TorchJD: the row with the least sum of distances",
)
def _kr1(make: Callable[..., Any]) -> None:
    rows = np.array([[4.0, 2.0], [1.0, 0.0], [4.0, -3.0], [-1.0, 1.0], [1.0, -4.0], [-3.0, 2.0]])
    _near(make(n_byzantine=1)(rows), rows[1])


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
    assert (np.abs(_OPPOSED - d).min(axis=0) < 1e-9).all(), f"leak 0: {_shown(d)}"
    _near(make(leak=1.0)(_OPPOSED), [0.0, 0.0, -0.1])


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
    _finite(direct(np.array([[0.0, 0.0], [1.0, 2.0]])))
    _finite(direct(np.array([[1.0, 1.0], [1.0, 2.0]])))


@_case(
    "EX2",
    "ExcessMTL",
    asked="the first step, rows of length 100 and 1",
    right="weights 1/m: it only stores the baseline",
    seen="TorchJD: weights 1 and 1e-43",
)
def _ex2(make: Callable[..., Any]) -> None:
    _near(make()(np.array([[100.0, 0.0], [0.0, 1.0]])), [50.0, 0.5])


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
    _near(d, [1.0, 0.0], 1e-6)


# --------------------------------------------------------------------------------------- Adam's moments for each loss


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
            _near(np.array([p.item(), q.item()]), [-0.1 * factor * rate, -0.01 * factor * rate], what="step")


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
        kept, fresh = make(_sgd(p)), make(_sgd(q))
        for k in range(5):
            if k == 3:
                q.data.copy_(p.data)
                fresh.load_state_dict(kept.state_dict())
            row = [(-2.0) ** k, 3.0 + k]
            _taken(kept, row, params=[p])
            if k >= 3:
                _taken(fresh, row, params=[q])
        _near(q.detach().numpy(), p.detach().numpy(), 1e-12, "resumed parameters")

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
            _taken(make(_sgd(p), weight_decay=decay), [3.0, 5.0], params=[p])
            found.append(p.item())
        _near(np.array(found[0] - found[1]), 0.05, what="decay")


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
    _taken(make(_sgd(unused, p)), [None, None], [3.0, 5.0], params=[unused, p])
    _near(np.array([unused.item(), p.item()]), [0.0, -0.2])


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
    training, adam = make(_sgd(trunk, head)), torch.optim.Adam([twin], lr=0.1)
    for g in (1.0, 4.0, -2.0, 7.0):
        _taken(training, [1.0, 2.0], [None, g], params=[trunk, head])
        twin.grad = torch.tensor([g], dtype=torch.float64)
        adam.step()
    _near(head.detach().numpy(), twin.detach().numpy(), 1e-9, "head")


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
    _taken(make(_sgd(p)), [1.0, 1e-12], params=[p])
    _near(np.array(p.item()), -0.2, what="step")


# ------------------------------------------------------------------------------------------- masks, unlearning

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
    _finite(d)
    assert (d[:2] > 0).all(), f"the direction is {_shown(d)}"
    assert d[2] == 0, f"the direction is {_shown(d)}"


@_case(
    "AN1",
    "AndMask",
    asked="the same rows, and a loss whose gradient is zero",
    right="the answer without that loss",
    seen="DomainBed: zero, since a sign of 0 is a vote against",
)
def _am1_masked(make: Callable[..., Any]) -> None:
    _near(make()(np.vstack([_AGREEING, np.zeros(3)])), [2.25, 2.25, 0.0])


@_case(
    "BL1",
    "BLUR",
    asked="forget and retain gradients of length 1e-6",
    right="1e-6 times the answer at length 1",
    seen="the official code: 3 % off, by an epsilon of 1e-10 beside the squared length",
)
def _bl1(make: Callable[..., Any]) -> None:
    rows = np.array([[2.0, 0.0], [3.0, 1.0]])
    _near(make()(rows), [2.0, 1.0])
    _near(make()(rows * 1e-6) * 1e6, [2.0, 1.0])


# ---------------------------------------------------------------------------------------------- loss weighting


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
        _near(make()(np.tile([2000.0, 1.0], (epochs, 1))), [1.0, 1.0], 1e-9, f"epoch {epochs}: weights")


_FALLING = np.array([[5.0, 1.0], [4.0, 0.9], [3.0, 0.8], [2.0, 0.7], [1.0, 0.6]])


def _ratio(weights: Array) -> float:
    _finite(weights)
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
    except _NotOffered:
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
    raise AssertionError(f"no error, weights {_shown(found)}")


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
    _near(make()(np.full((1, 8), 1e-50)), np.full(8, 1 / 8))


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
    training = make(_sgd(p))
    training.backward(_losses(p, np.eye(3), [1.0, 0.2, 3.0]))
    assert p.grad is not None, "no gradient"
    _near(training.weights, p.grad.numpy(), 1e-9, "reported weights")


def _refused_or_finite(weigh: Callable[..., Any], history: Any) -> None:
    try:
        found = weigh(np.array(history))
    except (ValueError, RuntimeError):
        return
    _finite(found)


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
    _finite(found)
    assert np.abs(found).max() < 1e6, _shown(found)


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
    _near(found, [0.0, 0.0, 0.1])


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
    _finite(plain)
    assert np.abs(plain - moved).max() > 1e-3, f"{_shown(plain)} both times"


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


# --------------------------------------------------------------------------------------- GradNorm, LR annealing


def _gradnorm(
    make: Callable[..., Any], norms: Sequence[float], history: Sequence[Sequence[float]], **options: Any
) -> Any:
    p = nn.Parameter(torch.zeros(2))
    training = make(_sgd(p), shared_params=p, **options)
    reported, weights = [], []
    for values in history:
        p.grad = None
        rows = np.diag(np.asarray(norms))
        reported.append(training.backward(_losses(p, rows, values)))
        training.step()
        weights.append(np.array(training.weights))
    p.grad = None
    training.backward(_losses(p, rows, history[-1]))
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
    assert weights[-1][1] > weights[-1][0], _shown(weights[-1])


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
    _near(np.array(reported), [2.0, 2.0])


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
    assert all((w > 0).all() for w in weights), _shown(min(weights, key=lambda w: float(w.min())))


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
    total = make(_sgd(p), shared_params=p, alpha=0.0, lr=0.01).backward(_losses(p, np.eye(2), [1.0, 1e-9]))
    if total is None:
        raise _NotOffered("backward returns nothing")
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
    training = make(_sgd(p), rate=1.0)
    training.backward(_losses(p, [[3.0, 1.0], [1.0, 1.0]], [1.0, 1.0]))
    _near(training.weights, [1.0, 3.0])
