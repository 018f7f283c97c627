"""Adam's arithmetic on the entries of a row: as many calls for forty tensors as for one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.communication import shards
from gradsurgery.gradients.gram import Row
from gradsurgery.graph.torch_private import (
    foreach_add_,
    foreach_addcmul_,
    foreach_div,
    foreach_lerp,
    foreach_mul,
    foreach_mul_,
    foreach_norm,
    foreach_sqrt,
)


def averages(before: Sequence[Tensor | None], now: Sequence[Tensor], beta: float) -> list[Tensor]:
    """First moments: β m + (1 − β) g.

    Args:
        before: m, one tensor per entry; None: 0.
        now: g.
        beta: β.

    Returns:
        New tensors, of the dtype of g.
    """
    return list(foreach_lerp(_started(before, now), list(now), 1 - beta))


def mixtures(before: Sequence[Tensor], now: Sequence[Tensor], betas: Sequence[float]) -> list[Tensor]:
    """Averages with a weight of the past for each entry: β N + (1 − β) n.

    Args:
        before: N.
        now: n.
        betas: β, one number per entry.

    Returns:
        New tensors, of the dtype of n.
    """
    found = foreach_mul(_started(before, now), list(betas))
    foreach_add_(found, foreach_mul(list(now), [1 - beta for beta in betas]))
    return list(found)


def square_averages(before: Sequence[Tensor | None], now: Sequence[Tensor], beta: float) -> list[Tensor]:
    """Second moments: β v + (1 − β) g².

    Args:
        before: v, one tensor per entry; None: 0.
        now: g.
        beta: β.

    Returns:
        New tensors, of the dtype of g.
    """
    found = foreach_mul(_started(before, now), beta)
    foreach_addcmul_(found, list(now), list(now), value=1 - beta)
    return list(found)


def roots(second: Sequence[Tensor], corrections: Sequence[float], eps: float) -> list[Tensor]:
    """What Adam divides by: √(v / c) + ε.

    Args:
        second: v.
        corrections: c, one number per entry.
        eps: ε.

    Returns:
        New tensors.
    """
    found = foreach_sqrt(list(second))
    _multiply(found, [1 / math.sqrt(c) for c in corrections])
    if eps:
        foreach_add_(found, eps)
    return list(found)


def quotients(first: Row, by: Row, corrections: Sequence[float], vanishing: bool) -> Row:
    """Adam's step: (m / c) / r.

    Args:
        first: m, None where there is none.
        by: r, likewise.
        corrections: c, one number per entry.
        vanishing: r may be 0, and 0 / 0 is 0.

    Returns:
        New tensors.
    """
    both = [(j, m, r) for j, (m, r) in enumerate(zip(first, by, strict=True)) if m is not None and r is not None]
    if not both:
        return [None] * len(first)
    places, above, below = map(list, zip(*both, strict=True))
    found = foreach_div(above, below)
    _multiply(found, [1 / corrections[j] for j in places])
    if vanishing:
        found = tuple(torch.where((m == 0) & (r == 0), 0.0, u) for m, r, u in zip(above, below, found, strict=True))
    return spread(len(first), places, found)


def largest(rows: Sequence[Row]) -> Row:
    """The largest of several rows in every coordinate.

    Args:
        rows: Rows, with None where one has no entry. Entries that are no numbers count in none but their own row, so
            that it can be told whose they are.

    Returns:
        One row.
    """
    found = list(rows[0])
    for row in rows[1:]:
        for j, entry in enumerate(row):
            before = found[j]
            if before is None or entry is None:
                found[j] = entry if before is None else before
            else:
                found[j] = torch.fmax(before, entry)
    return found


def lengths(row: Row) -> Row:
    """The length of each entry of a row.

    Args:
        row: A gradient.

    Returns:
        Scalars on the devices of the entries.
    """
    places = [j for j, g in enumerate(row) if g is not None]
    return spread(len(row), places, foreach_norm([g for g in row if g is not None]) if places else [])


def scaled(row: Row, by: Sequence[Tensor]) -> Row:
    """Multiply each entry of a row by a number of its own, which the host does not know.

    Args:
        row: A gradient.
        by: Scalars, one per entry.

    Returns:
        New tensors.
    """
    places = [j for j, g in enumerate(row) if g is not None]
    here = [g for g in row if g is not None]
    factors = [by[j].to(g) for j, g in zip(places, here, strict=True)]
    return spread(len(row), places, foreach_mul(here, factors) if here else [])


def spread(count: int, places: Sequence[int], entries: Sequence[Tensor]) -> Row:
    """Put entries in their places in a row.

    Args:
        count: Number of places.
        places: Those of the entries.
        entries: Tensors.

    Returns:
        The row, with None in all other places.
    """
    found: Row = [None] * count
    for j, entry in zip(places, entries, strict=True):
        found[j] = entry
    return found


def descend(params: Sequence[Tensor], directions: Sequence[Tensor], lr: float, decay: float) -> None:
    """Step along directions, after a decay that is not part of them: p ← (1 − lr λ) p − lr d.

    Args:
        params: p, changed in place, without a graph.
        directions: d.
        lr: The learning rate.
        decay: λ.
    """
    if not params:
        return
    pieces = list(map(shards.local, params))  # some may be spread over processes, and some not
    if decay:
        foreach_mul_(pieces, 1 - lr * decay)
    foreach_add_(pieces, list(map(shards.local, directions)), alpha=-lr)


def _multiply(tensors: Sequence[Tensor], by: Sequence[float]) -> None:
    """Multiply in place. After many steps corrections are 1, and nothing is left to do."""
    if any(factor != 1.0 for factor in by):
        foreach_mul_(list(tensors), list(by))


def _started(before: Sequence[Tensor | None], now: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(g) if m is None else m.to(g.dtype) for m, g in zip(before, now, strict=True)]
