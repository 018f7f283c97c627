"""Non-negative least squares for many columns, and for many targets at once: block principal pivoting.

Whole blocks of columns change sides at a time, and problems with the same columns share the products that this takes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv, dpotrs, dpstrf

from gradsurgery.geometry.units import EPS, Array, bound

#: With fewer columns scipy's active sets are as fast.
MANY = 48
# From so many targets on a first guess for all of them at once pays.
_TARGETS = 8
# Its steps, and their length where columns are one long: between the least and the largest eigenvalue.
_SPLITS, _STEP = 20, 1.5
# What a rough answer may leave of the slope in a column that is not free.
_ROUGH = 1e-4
# Rounds of exchanges, and after how many of them half of the problems must be settled.
_ROUNDS, _PATIENCE = 18, 10
# In how many rounds large sets are solved for by conjugate gradients, in how many steps, and what part of all columns
# is a large set.
_GRADIENT_ROUNDS, _GRADIENT_STEPS, _LARGE = 8, 12, 0.25


def suits(columns: Array) -> bool:
    """Whether :func:`exchange` is the way to begin.

    Args:
        columns: (k, m), of full row rank.

    Returns:
        Whether there are many, and not more than twice as many as their rank: beyond, the positive columns tend to be
        dependent in every problem, and one column at a time is the way.
    """
    k, m = columns.shape
    return m >= MANY and 2 * k >= m


def exchange(columns: Array, targets: Array, begin: Array | None = None) -> Array:
    """The x ≥ 0 with the least ‖t − columns x‖ for each target, in most cases; whoever asks verifies it.

    Of each problem the least squares solution on a set of free columns is found; then columns whose x is negative
    leave, and those whose product with the residual is positive enter, all at once (Portugal, Júdice & Vicente 1994).
    That is not sure to end, so that it is given up after some rounds.

    Args:
        columns: a_1 … a_m, (k, m).
        targets: (n, k), one problem per row.
        begin: an answer to similar problems, (n, m).

    Returns:
        (n, m), none of it negative.
    """
    m = columns.shape[1]
    sizes = np.sqrt(np.einsum("ij,ij->i", targets, targets))[:, None]
    wanted = np.divide(targets, sizes, out=np.zeros_like(targets), where=sizes > 0).dot(columns)
    # Half of what whoever asks allows: rounding of these products is not that of the columns.
    products, allowed = columns.T.dot(columns), bound(m) / 2
    if begin is None and len(targets) >= _TARGETS:
        begin = _split(products, wanted)
    if begin is None:
        x, slope = np.zeros(wanted.shape), wanted
        free = slope > 0
    else:
        x = np.divide(begin, sizes, out=np.zeros_like(begin), where=sizes > 0)
        slope = wanted - x.dot(products)
        free = (x > 0) | (slope > _ROUGH)
    out, left = x.copy(), np.arange(len(x))
    for n in range(_ROUNDS):
        x += _steps(products, slope, free, n < _GRADIENT_ROUNDS)
        slope = wanted - x.dot(products)
        positive = x > 0
        entering = ~free & (slope > allowed)
        negative = (x < 0).any(axis=1)
        unsettled = negative | entering.any(axis=1)
        again = unsettled | (positive & (np.abs(slope) > allowed)).any(axis=1)
        np.maximum(x, 0.0, out=x)
        out[left] = x
        if not again.any() or (n == _PATIENCE and 2 * np.count_nonzero(unsettled) > len(out)):
            break
        slope[negative] = wanted[negative] - x[negative].dot(products)
        left, x, slope, wanted, free = (part[again] for part in (left, x, slope, wanted, positive | entering))
    return out * sizes


def _split(products: Array, slopes: Array) -> Array:
    """Rough answers to all problems by the alternating direction method (Boyd et al. 2011), in single precision.

    With v = z + u of its z ≥ 0 and scaled dual u: x = (C + ρ)⁻¹ (b + ρ |v|) and v ← x + min(v, 0).
    """
    m = len(products)
    inverse = np.linalg.inv((products + _STEP * np.eye(m)).astype(np.float32))
    constant = slopes.astype(np.float32) @ inverse
    inverse *= _STEP
    v = constant.copy()
    for _ in range(_SPLITS):
        x = np.abs(v) @ inverse
        x += constant
        np.minimum(v, 0.0, out=v)
        v += x
    return np.maximum(v, 0.0).astype(np.float64)


def _steps(products: Array, slopes: Array, free: NDArray[np.bool_], gradients: bool) -> Array:
    """By how much the free entries of each problem are to change."""
    out = np.zeros(slopes.shape)
    counts = free.sum(axis=1)
    large = counts > _LARGE * len(products)
    if gradients and np.count_nonzero(large) >= _TARGETS:
        out[large] = _conjugate(products, slopes[large], free[large])
    else:
        large[:] = False
    for i in np.flatnonzero(~large & (counts > 0)):
        f = np.flatnonzero(free[i])
        part, right = products[f[:, None], f], slopes[i, f]
        _, step, failed = dposv(part, right)
        if failed:
            triangle, pivots, rank, _ = dpstrf(part, tol=len(products) * EPS)
            f = f[pivots[:rank] - 1]
            step = dpotrs(triangle[:rank, :rank], slopes[i, f])[0]
        out[i, f] = step
    return out


def _conjugate(products: Array, slopes: Array, free: NDArray[np.bool_]) -> Array:
    """Some steps of conjugate gradients for all problems at once, in single precision: a few digits."""
    inside = free.astype(np.float32)
    sizes = np.abs(slopes * free).max(axis=1, keepdims=True)
    sizes[sizes == 0] = 1.0
    matrix = products.astype(np.float32)
    rest = (slopes / sizes).astype(np.float32) * inside
    x, along, square = np.zeros_like(rest), rest.copy(), np.einsum("ij,ij->i", rest, rest)
    for _ in range(_GRADIENT_STEPS):
        turned = along @ matrix
        turned *= inside
        curvature = np.einsum("ij,ij->i", along, turned)
        length = np.divide(square, curvature, out=np.zeros_like(square), where=curvature > 0)[:, None]
        x += length * along
        turned *= length
        rest -= turned
        last, square = square, np.einsum("ij,ij->i", rest, rest)
        along *= np.divide(square, last, out=np.zeros_like(square), where=last > 0)[:, None]
        along += rest
    return x * sizes
