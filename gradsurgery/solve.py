"""From inner products to weights: what every surgery method has around its own mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradsurgery.gradients.gram import Gram, Scaled, central, in_range

if TYPE_CHECKING:
    from gradsurgery.protocols import Rule

# Rows whose lengths differ by more than two to this power have squares that float64 does not hold side by side.
_FAR_APART = 1000
# A term that is smaller than another by two to this power is lost when they are added up.
_NEGLIGIBLE = 60


class Problem(NamedTuple):
    """What a method is asked, as its own functions see it.

    Attributes:
        names: The losses that take part, (m,).
        gram: Inner products of the rows that it works on.
        measured: What it has sent to the host, or None.
        lengths: Lengths of these rows, where they were multiplied and may leave float64; None otherwise.
    """

    names: tuple[str, ...]
    gram: Gram
    measured: np.ndarray | None = None
    lengths: Scaled | None = None


def solve(
    method: Rule,
    problem: Problem,
    seen: np.ndarray,
    factors: np.ndarray | None,
    reaching: Sequence[bool] | None = None,
) -> np.ndarray:
    """Ask a method for weights, without the losses that reach none of these parameters: they have no zero row.

    Args:
        method: The method.
        problem: The raw rows.
        seen: Values of the losses as the method sees them, (m,).
        factors: What still multiplies each row, (m,). None: 1.
        reaching: Which losses take part, (m,). None: all.

    Returns:
        Weights of the multiplied rows, (m,), or fewer or more if the method has rows of its own.
    """
    if reaching is None:
        return _weights(method, problem, seen, factors)
    m, rows = len(seen), len(problem.gram)
    keep = [i for i in range(m) if reaching[i]]
    if len(keep) == m or (rows != m and not method.rows_repeat_tasks):
        return _weights(method, problem, seen, factors)
    weights = np.ones(m)
    if len(keep) > 1:
        every = [start + i for start in range(0, rows, m) for i in keep]
        part = Problem(
            tuple(problem.names[i] for i in keep),
            problem.gram.only(every),
            None if problem.measured is None else problem.measured[keep],
        )
        weights[keep] = _weights(method, part, seen[keep], None if factors is None else factors[keep])
    return weights


def _weights(method: Rule, problem: Problem, seen: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """Weights, with `normalize` and `preference` around the method."""
    gram, settings = problem.gram, method.settings
    if method.is_alone and not method.observes:
        return np.ones(1)
    if gram.table.far_apart and method.adds_rows:
        gram.table.require_squares(method.display_name)
    normalizes = settings.normalize != "none" and not method.is_alone
    prefers = settings.preference is not None and method.preference_scales_rows
    if factors is None and not normalizes and not prefers and _is_usual(gram):
        with method.asked(problem):
            return method.smoothed(method.weights(gram.values, seen))
    if factors is not None and not np.isfinite(factors).all():  # what is multiplied by them is told of later
        return np.ones(len(seen))
    return _scaled_weights(method, problem, seen, np.ones(len(seen)) if factors is None else factors)


def _is_usual(gram: Gram) -> bool:
    """Whether a method can work on these products as they are."""
    if gram.table.unit == 1.0 and in_range(gram.values):  # as almost always
        return True
    return central(gram.lengths()) is None


def _scaled_weights(method: Rule, problem: Problem, seen: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Weights of rows that are multiplied before the method sees them.

    Any of the multipliers, and their products, may leave float64 where what comes of them does not.
    """
    gram = problem.gram
    by = Scaled(_spread(method, factors, len(gram)))
    lengths = gram.lengths() * by
    with method.asked(problem):
        around = _around(method, lengths, seen)
    seen_lengths = around * lengths
    middle = central(seen_lengths)
    correction = _correction(method, middle, seen_lengths)
    _require_comparable(method, seen_lengths)
    inside = gram.scaled(around * by * Scaled(1.0, middle or 0))
    with method.asked(Problem(problem.names, inside, problem.measured, seen_lengths)):
        found = correction * Scaled(method.weights(inside.values, seen))
        if method.settings.changes_weights:
            found = Scaled(method.smoothed(found.values()))
    count = len(found.fraction)
    found = found * around.first(count)
    _require_held(method, found, lengths.first(count))
    return found.values()


def _around(method: Rule, lengths: Scaled, seen: np.ndarray) -> Scaled:
    """What the rows are multiplied by so that the method sees them as `normalize` and `preference` want it."""
    normalize, count = "none" if method.is_alone else method.settings.normalize, len(lengths.fraction)
    around = Scaled(np.ones(count))
    if normalize in ("loss", "loss+"):
        method.require_positive(seen, f'normalize="{normalize}" divides by it')
        around = around * Scaled(_spread(method, seen, count)).inverse()
    if normalize in ("l2", "loss+"):
        around = around * lengths.inverse()
    if method.preference_scales_rows:
        around = around * Scaled(_spread(method, method.preferences(), count))
    return around


def _spread(method: Rule, per_loss: np.ndarray, count: int) -> np.ndarray:
    """One number per row: a method may have added rows of its own behind those of the losses, or of absent ones."""
    if method.rows_repeat_tasks:
        return np.resize(per_loss, count)
    return np.append(per_loss, np.ones(max(0, count - len(per_loss))))[:count]


def _correction(method: Rule, middle: int | None, lengths: Scaled) -> Scaled:
    """What brings weights of rows that were multiplied by a power of two to those of the rows themselves."""
    if middle is None:
        return Scaled(1.0)
    if method.degree is None:
        known = lengths.exponent[lengths.fraction != 0] * math.log10(2)
        raise RuntimeError(
            f"{method.display_name}: gradients longer than 1e60 or shorter than 1e-60 are out of range, and here they "
            f"are about 1e{known.min():.0f} to 1e{known.max():.0f} long: the method compares them with those of other "
            "steps or with absolute numbers, and float64 does not hold the products. Divide the losses by a "
            "constant. Nothing was written."
        )
    rest, whole = math.modf(middle * (1.0 - method.degree))
    return Scaled(2.0**rest, int(whole))


def _require_held(method: Rule, weights: Scaled, lengths: Scaled) -> None:
    """Refuse weights that float64 rounds to zero, or nearly so, where what they multiply counts in the sum."""
    with np.errstate(invalid="ignore"):
        lost = (weights.fraction != 0) & (np.abs(weights.values()) < np.finfo(np.float64).tiny)
    if not lost.any():
        return
    terms = weights * lengths
    exponents = np.where(terms.fraction != 0, terms.exponent, -np.inf)
    if (exponents[lost] > exponents.max() - _NEGLIGIBLE).any():
        raise RuntimeError(
            f"{method.display_name}: the weights of gradients this long or short are out of range: some are below "
            "1e-308. Divide the losses by a constant. Nothing was written."
        )


def _require_comparable(method: Rule, lengths: Scaled) -> None:
    """Refuse rows that are too far apart once all that multiplies them is applied."""
    exponents = lengths.exponent[lengths.fraction != 0]
    if len(exponents) and exponents.max() - exponents.min() > _FAR_APART and method.adds_rows:
        apart = (exponents.max() - exponents.min()) * math.log10(2)
        raise RuntimeError(
            f"{method.display_name}: with `preference`, `normalize` and the weights inside applied, the longest "
            f"gradient is about 1e{apart:.0f} times as long as the shortest one, and float64 does not hold the squares "
            "of both. Bring the losses or what multiplies them closer together. Nothing was written."
        )
