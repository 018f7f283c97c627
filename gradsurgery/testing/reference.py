"""Fixed inputs with exact answers, for any implementation.

Twelve small matrices: with conflict and without, near-parallel and opposite rows, a zero row, rank deficiency, row
lengths from 1e-6 to 1e6. The answers were computed in rational arithmetic or with 60 digits, without any library of the
field, and are given to 12 digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: A method: from rows J (m, n) and loss values (m,) to the direction (n,) that would be subtracted.
Method = Callable[[Array, Array], Array]

# What the file says in words. A method that sees the rows reaches these; one that sees only J Jᵀ cannot.
_IN_WORDS = {
    "1e-9 from an SVD of J, 1e-3 from the Gram matrix": 1e-9,
    "only from an SVD of J (1e-3); the Gram matrix loses the rank": 1e-3,
    "no unique dual solution: choose and document": None,
}
# The paper's weights sum to one, which points uphill here: every loss would rise. The answer wanted is downhill.
_TURNED = {("IMTL-G", "m3_n3_imtlg_negative")}


class ReferenceCase(NamedTuple):
    """One input and its exact answer.

    Attributes:
        name: Of the input.
        rows: J, (m, n).
        losses: Values of the losses, (m,).
        direction: The exact direction, (n,).
        tolerance: Largest error that a float64 implementation should show, relative to the length of the direction, or
            to the longest row where the direction is zero. None where the answer is not unique.
    """

    name: str
    rows: Array
    losses: Array
    direction: Array
    tolerance: float | None


@cache
def reference() -> dict[str, Any]:
    """The whole table as it is stored.

    Returns:
        "inputs", "methods" (answers for the inputs), "sequences" (answers of methods with a memory) and "meta". It is
        shared: do not change it.
    """
    text = resources.files("gradsurgery.testing").joinpath("reference.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def reference_methods() -> list[str]:
    """Names of the methods that have exact answers, parameters included.

    Returns:
        For example "MGDA" and "CAGrad c=0.4".
    """
    return list(reference()["methods"])


def reference_cases(method: str) -> list[ReferenceCase]:
    """Inputs and exact answers of one method.

    Args:
        method: One of :func:`reference_methods`. ``reference()["methods"][method]["convention"]`` says what length the
            direction has: simplex weights for MGDA, the sum of the projected rows for PCGrad, and so on.

    Returns:
        The cases.

    Raises:
        ValueError: There are no answers for this method.
    """
    stored = reference()["methods"].get(method)
    if stored is None:
        raise ValueError(f"reference_cases: `method` must be one of {reference_methods()}, got {method!r}.")
    allowed, exceptions = stored["tolerance"]["relative"], stored["tolerance"]["exceptions"]
    cases = []
    for name, answer in stored["truth"].items():
        given = reference()["inputs"][name]
        tolerance = exceptions.get(name, allowed)
        cases.append(
            ReferenceCase(
                name,
                np.array(given["J"], dtype=np.float64),
                np.array(given["losses"], dtype=np.float64),
                np.array(answer["direction"], dtype=np.float64) * (-1 if (method, name) in _TURNED else 1),
                _IN_WORDS[tolerance] if isinstance(tolerance, str) else tolerance,
            )
        )
    return cases


def reference_errors(
    direction: Method, method: str, inputs: Iterable[str] | None = None, tolerance: float = 0.0
) -> dict[str, float]:
    """How far an implementation is from the exact answers.

    Args:
        direction: The implementation.
        method: One of :func:`reference_methods`.
        inputs: Names of the inputs to try; by default all that have a unique answer.
        tolerance: Allow this much where the case allows less.

    Returns:
        By input, the error in units of what is allowed. Up to 1 is right; ``inf`` if the answer is not finite.
    """
    errors = {}
    for case in reference_cases(method):
        if case.tolerance is None or (inputs is not None and case.name not in inputs):
            continue
        found = np.asarray(direction(case.rows.copy(), case.losses.copy()), dtype=np.float64)
        length = float(np.linalg.norm(case.direction)) or float(np.linalg.norm(case.rows, axis=1).max())
        error = float(np.linalg.norm(found - case.direction)) / length
        errors[case.name] = error / max(case.tolerance, tolerance) if np.isfinite(error) else float("inf")
    return errors


def check_reference(
    direction: Method, method: str, inputs: Iterable[str] | None = None, tolerance: float = 0.0
) -> None:
    """Compare an implementation with the exact answers.

    Args:
        direction: The implementation, in float64.
        method: One of :func:`reference_methods`.
        inputs: Names of the inputs to try; by default all that have a unique answer.
        tolerance: Allow this much where the case allows less: 1e-5 for float32, say.

    Raises:
        AssertionError: An answer is farther off than allowed.
    """
    found = reference_errors(direction, method, inputs, tolerance)
    wrong = {name: f"{error:.2g}" for name, error in found.items() if not error <= 1}
    assert not wrong, f"{method}: errors in units of what is allowed: {wrong}"
