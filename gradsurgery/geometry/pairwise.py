"""Methods that go from pair to pair of tasks: the mixing matrices of PCGrad and GradVac."""

from __future__ import annotations

from math import sqrt
from operator import mul

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradsurgery.geometry.units import AMPLIFICATION, EPS, Array, Factor

# Up to this many rows plain Python floats beat numpy's cost per call.
_SMALL = 8
# Cosine targets of GradVac stay this far from parallel at most, where a correction would have no bound.
_TARGET = 1 - 1e-6


def pcgrad_mixing(gram: ArrayLike, orders: ArrayLike) -> Array:
    """Mixing matrix of PCGrad: row i holds the weights of task i's projected gradient (Yu et al. 2020, algorithm 1).

    p_i starts as g_i and meets the other rows in its order: p_i ← p_i − ⟨p_i, g_j⟩ / ‖g_j‖² g_j where ⟨p_i, g_j⟩ < 0.

    Args:
        gram: (m, m) Gram matrix.
        orders: (m, m − 1) integers; row i lists the j ≠ i in the order of task i's visits.

    Returns:
        (m, m) matrix M; the direction of PCGrad is Jᵀ (Mᵀ 1).
    """
    g = np.asarray(gram, dtype=np.float64)
    m = len(g)
    if m <= _SMALL:
        table, visits = g.tolist(), np.asarray(orders).tolist()
        mixing = [[float(i == j) for j in range(m)] for i in range(m)]
        for weights, order in zip(mixing, visits, strict=True):
            for j in order:
                row = table[j]
                dot = sum(map(mul, weights, row))
                if dot < 0 < row[j]:
                    weights[j] -= dot / row[j]
        return np.array(mixing)
    squares = g.diagonal()
    out = np.eye(m)
    tasks = np.arange(m)
    for j in np.asarray(orders).T:
        dots = np.einsum("ij,ij->i", out, g[j])
        hit = (dots < 0) & (squares[j] > 0)
        i, j = tasks[hit], j[hit]
        out[i, j] -= dots[hit] / squares[j]
    return out


def pcgrad_of_two(
    first: float, product: float, second: float, least: float = 0.0, priority: float = 1.0
) -> tuple[float, float]:
    """Weights that PCGrad gives two rows u and p v.

    Args:
        first: ‖u‖².
        product: ⟨u, v⟩.
        second: ‖v‖².
        least: Below this ‖u‖² is what rounding has left of a sum that cancels: u has no direction then.
        priority: p > 0, whose square need not be a number.

    Returns:
        a and b of the direction a u + b v. 1 and p without conflict.
    """
    if not (product < 0 < second and first > least):
        return 1.0, priority
    return 1.0 - priority * (product / first), priority - product / second


def streaming_pcgrad(gram: ArrayLike, order: ArrayLike, *, noise: float = EPS) -> Array:
    """Weights of PCGrad between the sum of the rows so far and the next row, row after row.

    Args:
        gram: (m, m) Gram matrix.
        order: (m,) integers; in which order the rows come.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        (m,) weights.
    """
    g = np.asarray(gram, dtype=np.float64)
    w = np.zeros(len(g))
    lengths = np.sqrt(g.diagonal())
    for i in np.asarray(order).tolist():
        products = g @ w
        least = 4 * noise * float(w @ lengths) ** 2
        a, b = pcgrad_of_two(float(w @ products), float(products[i]), float(g[i, i]), least)
        w *= a
        w[i] = b
    return w


def gradvac_mixing(
    gram: ArrayLike, orders: ArrayLike, targets: ArrayLike, beta: float = 0.01, factor: Factor | None = None
) -> tuple[Array, Array]:
    """Mixing matrix of GradVac and the new cosine targets (Wang et al. 2021, algorithm 1).

    Where φ = cos(p_i, g_j) is below its target t_ij, p_i gains
    ‖p_i‖ (t √(1 − φ²) − φ √(1 − t²)) / (‖g_j‖ √(1 − t²)) · g_j, which makes the cosine t; with t = 0 that is PCGrad.
    Every visit moves the target: t_ij ← (1 − β) t_ij + β φ.

    Args:
        gram: (m, m) Gram matrix.
        orders: (m, m − 1) integers; row i lists the j ≠ i in the order of task i's visits.
        targets: (m, m) cosine targets; used within ±(1 − 1e-6), beyond which the step would have no bound.
        beta: step of the moving average.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when some p_i becomes too short for the Gram to tell its length.

    Returns:
        ``(mixing, targets)``, both (m, m): row i of ``mixing`` holds the weights of task i's gradient. Visits that
        involve a zero row, or a p_i that has become zero, change neither.
    """
    g = np.asarray(gram, dtype=np.float64)
    visits = np.asarray(orders)
    t = np.array(targets, dtype=np.float64)
    norms = np.sqrt(np.maximum(g.diagonal(), 0.0))
    # Of a p_i that has lost this much of its terms (squared) the Gram no longer tells the length.
    short = -1.0 if factor is None else EPS * AMPLIFICATION**2
    if len(g) <= _SMALL:
        found = _gradvac_small(g.tolist(), visits.tolist(), t.tolist(), norms.tolist(), beta, short)
    else:
        found = _gradvac_sweep(g, None, visits, t.copy(), norms, beta, short)
    if found is None:
        assert factor is not None
        rows = np.asarray(factor(), dtype=np.float64)
        found = _gradvac_sweep(g, rows, visits, t, np.sqrt(np.einsum("ij,ij->i", rows, rows)), beta, -1.0)
    assert found is not None
    return found


def _gradvac_sweep(
    g: Array, rows: Array | None, orders: NDArray[np.intp], t: Array, norms: Array, beta: float, short: float
) -> tuple[Array, Array] | None:
    """``gradvac_mixing`` for all tasks at a time, by the Gram or by the rows; None where some p_i becomes too short."""
    m = len(g)
    mixing, left = np.eye(m), None if rows is None else rows.copy()
    squares = norms * norms
    terms = squares.copy()  # the largest square among the terms of p_i
    nothing = m * EPS if rows is None else (4 * m * EPS) ** 2
    for j in orders.T:
        dots = np.einsum("ij,ij->i", mixing, g[j]) if left is None or rows is None else (left * rows[j]).sum(axis=1)
        own = norms[j]
        i = np.flatnonzero((own > 0) & (squares > nothing * terms))
        j, dots, own = j[i], dots[i], own[i]
        length = np.sqrt(squares[i])
        phi = np.clip(dots / (length * own), -1.0, 1.0)
        target = np.clip(t[i, j], -_TARGET, _TARGET)
        sine = np.sqrt(1 - target * target)
        gain = length * (target * np.sqrt(1 - phi * phi) - phi * sine) / (own * sine)
        gain[phi >= target] = 0.0
        mixing[i, j] += gain
        if left is None or rows is None:
            squares[i] += gain * (2 * dots + gain * own * own)
        else:
            left[i] += gain[:, None] * rows[j]
            squares[i] = np.einsum("ij,ij->i", left[i], left[i])
        terms[i] = np.maximum(terms[i], (gain * own) ** 2)
        t[i, j] += beta * (phi - t[i, j])
        if (squares < short * terms).any():
            return None
    return mixing, t


def _gradvac_small(
    g: list[list[float]], orders: list[list[int]], t: list[list[float]], norms: list[float], beta: float, short: float
) -> tuple[Array, Array] | None:
    """``_gradvac_sweep`` by the Gram in plain floats."""
    m = len(g)
    mixing = []
    for i, order in enumerate(orders):
        weights = [float(i == j) for j in range(m)]
        square = norms[i] * norms[i]
        terms = square
        for j in order:
            own = norms[j]
            if own == 0 or square <= m * EPS * terms:
                continue
            dot = sum(map(mul, weights, g[j]))
            length = sqrt(square)
            phi = min(max(dot / (length * own), -1.0), 1.0)
            target = min(max(t[i][j], -_TARGET), _TARGET)
            if phi < target:
                sine = sqrt(1 - target * target)
                gain = length * (target * sqrt(1 - phi * phi) - phi * sine) / (own * sine)
                weights[j] += gain
                square += gain * (2 * dot + gain * own * own)
                terms = max(terms, (gain * own) ** 2)
                if square < short * terms:
                    return None
            t[i][j] += beta * (phi - t[i][j])
        mixing.append(weights)
    return np.array(mixing), np.array(t)
