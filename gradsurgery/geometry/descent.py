"""Whether no loss rises along a direction, and the smallest change after which none does."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import solve_triangular

from gradsurgery.geometry.cones import least_distance
from gradsurgery.geometry.units import EPS, Array, half, unit


def is_descent(gram: Array, weights: Array, rounding: float) -> bool:
    """Whether ⟨g_i, Σ w_j g_j⟩ ≥ 0 for all i, however products and sum were rounded.

    Args:
        gram: (m, m) Gram matrix.
        weights: w, (m,).
        rounding: bound on the error of the Gram's entries relative to n_i n_j, and on that of the sum relative to its
            terms, together.

    Returns:
        Whether it is certain; False where a number is not finite.
    """
    weights, lengths = _below_one(weights)[0], np.sqrt(gram.diagonal())
    least = rounding * float(np.abs(weights).dot(lengths)) * lengths
    return bool((gram.dot(weights) >= least).all())


def moved_inside(gram: Array, weights: Array, rounding: float) -> Array | None:
    """Weights next to the given ones with which :func:`is_descent` is certain.

    Args:
        gram: (m, m) Gram matrix.
        weights: w, (m,).
        rounding: as there.

    Returns:
        (m,); None if that takes more than a small multiple of the rounding.
    """
    norms, cosines = unit(gram)
    if not (norms.all() and np.isfinite(cosines).all()):
        return None
    weights, exponent = _below_one(weights)
    total = float(np.abs(weights) @ norms)
    extra = shift(half(cosines)[0], 2 * rounding * total - cosines @ (weights * norms))
    if extra is None or np.abs(extra).sum() > 20 * len(norms) * rounding * total:
        return None
    found = weights + extra / norms
    return np.ldexp(found, exponent) if is_descent(gram, found, rounding) else None


def _below_one(weights: Array) -> tuple[Array, int]:
    """Weights near enough to one for products with a Gram matrix, and the power of two that they were divided by."""
    exponent = math.frexp(max(map(abs, weights.tolist()), default=0.0))[1]
    if abs(exponent) < 100:  # as almost always, and near enough to one
        return weights, 0
    return np.ldexp(weights, -exponent), exponent


def shift(columns: Array, bounds: Array) -> Array | None:
    """Multipliers λ of the shortest e = Σ λ_i u_i with ⟨u_i, e⟩ ≥ h_i.

    Args:
        columns: unit columns u_1 … u_m, (k, m).
        bounds: h, (m,).

    Returns:
        λ, (m,); None if there is no such e, as far as rounding tells.
    """
    top = float(bounds.max())
    if top <= 0:
        return np.zeros(len(bounds))
    # What has a thousand times more to spare than any other lacks is no constraint.
    h = np.maximum(bounds / top, -1e3)
    x, _, gap = least_distance(columns, h, lambda what: None)  # whoever asks looks at what comes of it
    support = np.flatnonzero(x)
    if 0 < len(support) <= len(columns):
        # There the constraints are equations; the division below loses digits where e is long.
        triangle = np.asarray(np.linalg.qr(columns[:, support], mode="r"))
        pivots = np.abs(triangle.diagonal())
        if pivots.min() > 4 * len(x) * EPS * pivots.max():
            exact = np.zeros(len(x))
            exact[support] = solve_triangular(triangle, solve_triangular(triangle, h[support], trans=1))
            if exact.min() >= 0:
                return top * exact
    return None if gap <= 64 * len(x) * EPS else top / gap * x
