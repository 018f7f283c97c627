"""What a case is, how it is put to a library, and what the cases have in common."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradsurgery.testing.adapters import Kind, Library
from gradsurgery.testing.reference import reference, reference_cases

Array = NDArray[Any]
Outcome = Literal["right", "wrong", "error", "not offered"]
Check = Callable[[Callable[..., Any]], None]


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
    check: Check


class Verdict(NamedTuple):
    """What a library did with a case.

    Attributes:
        outcome: "right"; "wrong": another answer; "error": an exception instead of an answer; "not offered".
        detail: What was wrong.
    """

    outcome: Outcome
    detail: str = ""


class NotOfferedError(ValueError):
    """The library does not have the method, or an option of it."""


def _require_offered(factory: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> None:
    try:
        signature(factory).bind(*args, **options)
    except TypeError as error:
        raise NotOfferedError(str(error)) from error


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
        _require_offered(factory, args, options)
        return factory(*args, **options)

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            case.check(make)
    except NotOfferedError:
        return Verdict("not offered")
    except AssertionError as error:
        return Verdict("wrong", str(error).strip().splitlines()[0])
    except Exception as error:  # whatever another library may raise
        return Verdict("error", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Verdict("right")


def into(cases: list[Defect]) -> Callable[..., Callable[[Check], Check]]:
    """Collect cases.

    Args:
        cases: Where they go.

    Returns:
        A function that takes the name of a case, its method and kind, `asked`, `right` and `seen`, and decorates its
        check.
    """

    def case(
        name: str, method: str, kind: Kind = "direction", *, asked: str, right: str, seen: str
    ) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            cases.append(Defect(name, method, kind, asked, right, seen, check))
            return check

        return register

    return case


CONFLICT = np.array([[2.0, 1.0], [-10.0, 1.0]])
TURNS = np.array([[3.0, -2.0], [2.0, 1.0], [-3.0, -1.0]])


def reference_rows(name: str) -> Array:
    """Rows of the reference answers.

    Args:
        name: Which input.

    Returns:
        (m, n).
    """
    return np.array(reference()["inputs"][name]["J"], dtype=np.float64)


def assert_near(found: Array, expected: Any, tolerance: float = 1e-6, what: str = "answer") -> None:
    """Require an answer up to rounding.

    Args:
        found: The answer.
        expected: The right one.
        tolerance: How far it may be off, relative to its length.
        what: What it is.
    """
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    size = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(found - expected)) / size
    assert error <= tolerance, f"{what} {shown(found)}, expected {shown(expected)}"


def assert_exact(direct: Callable[..., Any], method: str, name: str, tolerance: float = 1e-6) -> None:
    """Require a reference answer. Single cases ask for the idea, not for the last digits.

    Args:
        direct: Gives the direction of rows and losses.
        method: Whose answer.
        name: Which input.
        tolerance: How far it may be off, relative to its length.
    """
    case = next(case for case in reference_cases(method) if case.name == name)
    found = np.asarray(direct(case.rows, case.losses))
    assert_finite(found)
    length = float(np.linalg.norm(case.direction)) or float(np.linalg.norm(case.rows, axis=1).max())
    error = float(np.linalg.norm(found - case.direction)) / length
    assert error <= tolerance, f"{shown(found)} is off by {error:.1e}"


def shown(values: Array) -> str:
    """The first few numbers of an array.

    Args:
        values: The array.

    Returns:
        Text.
    """
    flat = np.ravel(values)
    return "[" + ", ".join(f"{x:.4g}" for x in flat[:4]) + (", …]" if len(flat) > 4 else "]")


def assert_finite(found: Array) -> None:
    """Require finite numbers.

    Args:
        found: The numbers.
    """
    assert np.isfinite(found).all(), f"not finite: {shown(found)}"


def assert_parallel(found: Array, expected: Array, tolerance: float = 1e-6) -> None:
    """Require a direction, whatever its length.

    Args:
        found: The direction.
        expected: The right one.
        tolerance: How far its unit vector may be off.
    """
    assert_finite(found)
    length = float(np.linalg.norm(found))
    assert length > 0, "the direction is zero"
    assert_near(found / length, expected / np.linalg.norm(expected), tolerance, "unit direction")


def assert_equal_projections(rows: Array, d: Array, tolerance: float) -> None:
    """Require equal and positive projections on all rows.

    Args:
        rows: The rows, (m, n).
        d: The direction, (n,).
        tolerance: By how much they may differ, relative to the largest.
    """
    found = rows @ d / np.linalg.norm(rows, axis=1)
    assert found.min() > 0, f"the projections {shown(found)} are not positive"
    assert np.ptp(found) <= tolerance * found.max(), f"the projections {shown(found)} are not equal"


def losses_at(p: nn.Parameter, rows: Any, values: Sequence[float]) -> list[Tensor]:
    """Losses with given values and gradients.

    Args:
        p: The parameter, (n,).
        rows: The gradients, (m, n).
        values: The values, (m,).

    Returns:
        m scalars.
    """
    here = p - p.detach()
    return [torch.tensor(g, dtype=p.dtype) @ here + v for g, v in zip(rows, values, strict=True)]


def sgd(*params: nn.Parameter, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer for what is tried.

    Args:
        *params: The parameters.
        weight_decay: As in torch.

    Returns:
        The optimizer.
    """
    return torch.optim.SGD(params, lr=0.1, weight_decay=weight_decay)


def assert_resumes(make: Callable[..., Any], calls: Sequence[Any], **options: Any) -> None:
    """Require that the call after a state round trip gives what an uninterrupted run gives.

    Args:
        make: Makes instances.
        calls: What each call is given.
        **options: Arguments of the constructor.
    """
    kept, fresh = make(**options), make(**options)
    for call in calls[:-1]:
        kept(call)
    fresh.load_state_dict(kept.state_dict())
    expected = kept(calls[-1])
    assert_near(fresh(calls[-1]), expected, 1e-12, "resumed answer")


def steps_of_two(count: int) -> list[Array]:
    """Two rows per step: with more, GradVac would draw an order.

    Args:
        count: Number of steps.

    Returns:
        The rows of each step, (2, 6).
    """
    rng = np.random.default_rng(7)
    return [rng.standard_normal((2, 6)) * np.array([[1.0], [3.0]]) for _ in range(count)]
