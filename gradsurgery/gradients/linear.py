"""Whether the pass of a weighted sum gives the weighted sum of passes.

It does if every backward function is linear in the gradient that it is given. All of torch are. One that a user has
written may clip, normalise or take signs. So what each of these hands on is projected on a random vector, in the pass
of each loss and in that of the sum: one number per pass, which is as linear as the function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from gradsurgery.graph import hooks

# What a projection of the sum may be off, relative to Σ |wᵢ| times the length of what is projected, and in units of its
# precision, where that is more.
_ALLOWED, _UNITS = 1e-3, 16.0
# What is this small beside the gradients that came in is rounding: units of precision, but no more than a tenth. So is
# what is this small beside gradients of the smallest normal number, which are rounded to a fixed step.
_ROUNDING_UNITS, _MOST_ROUNDING = 1000.0, 0.1


class Functions:
    """The users' functions in a graph, while passes go through it.

    Args:
        nodes: Their nodes.
        m: Number of losses.
        eps: The coarsest precision of any gradient in the graph.
        least: The largest of the smallest normal numbers of their dtypes: what is below is coarser than that.
    """

    def __init__(self, nodes: Sequence[Node], m: int, eps: float, least: float) -> None:
        self._nodes = list(nodes)
        self._m = m
        self._eps = eps
        self._least = least
        self._now = 0
        self._handles: list[RemovableHandle] = []
        # For each node and pass: the projection of what is handed on, its length, that of what came in, and what this
        # would be if all its entries were one.
        self._seen: list[dict[int, Tensor]] = [{} for _ in nodes]

    def __enter__(self) -> Functions:
        self._handles = [hooks.ours(node.register_hook, partial(self._look, k)) for k, node in enumerate(self._nodes)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, i: int) -> None:
        """Say whose pass comes next.

        Args:
            i: The loss; m for the sum.
        """
        self._now = i

    def _look(self, k: int, onward: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        handed = {place: g for place, g in enumerate(onward) if g is not None}
        if handed:
            projection = torch.stack([_projection(g, place) for place, g in handed.items()]).sum()
            ones = torch.tensor(math.sqrt(sum(g.numel() for g in given if g is not None)), dtype=torch.float64)
            parts = [projection, _length(list(handed.values())), _length(given), ones]
            self._seen[k][self._now] = torch.stack([part.to(projection.device) for part in parts])

    def unlike(self, weights: Sequence[float]) -> str:
        """Compare the pass of the sum with those of the losses.

        Args:
            weights: w, (m,).

        Returns:
            The name of a function that is not linear; empty if all are.
        """
        w, eps = np.array([*weights, -1.0]), self._eps
        for node, seen in zip(self._nodes, self._seen, strict=True):
            if not seen:
                continue
            there = np.array(sorted(seen))
            found = torch.stack([seen[i] for i in there]).cpu().numpy()
            by = w[there]
            size, given, _ = np.abs(by[there < self._m]) @ found[there < self._m, 1:]
            given += self._least * (np.abs(by) @ found[:, 3])
            allowed = max(_ALLOWED, _UNITS * eps) * size + min(_ROUNDING_UNITS * eps, _MOST_ROUNDING) * given
            if abs(by @ found[:, 0]) > allowed:
                return type(node).__name__.removesuffix("Backward")
        return ""


@torch.no_grad()
def _projection(g: Tensor, place: int) -> Tensor:
    """⟨r, g⟩ for a random r that depends on the shape of g and its place alone, in double precision.

    What is handed to two inputs, or to the two sides of a square matrix, often differs by the sign. It must not cancel.
    """
    g = g.to_dense() if g.is_sparse else g
    g = torch.view_as_real(g) if g.is_complex() else g
    matrix = g.reshape(-1, g.shape[-1]) if g.dim() and g.numel() else g.reshape(1, -1)
    matrix = matrix.float() if g.dtype in (torch.float16, torch.bfloat16) else matrix
    left, right = (_random(n, 2 * place + side, matrix.dtype, matrix.device) for side, n in enumerate(matrix.shape))
    return (left @ matrix).double() @ right.double()


@functools.lru_cache(maxsize=256)
def _random(n: int, draw: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + draw)
    return torch.randn(n, generator=generator, dtype=dtype).to(device)


@torch.no_grad()
def _length(gradients: Sequence[Tensor | None]) -> Tensor:
    """Their lengths, added up, in double precision."""
    there = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    lengths = []
    for g in there:  # squares of what is very long or short are no numbers
        peak = torch.linalg.vector_norm(g, float("inf"))
        rest = torch.linalg.vector_norm(g / peak.clamp(min=torch.finfo(peak.dtype).tiny))
        lengths.append(peak.double() * rest.double())
    return torch.stack(lengths).sum() if lengths else torch.zeros((), dtype=torch.float64)
