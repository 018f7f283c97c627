"""What happened in the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsurgery import geometry


class Report:
    """What one call of ``backward`` saw and did.

    The report owns detached copies and holds no graph. Fields that a method does not have are ``None``. Values stay on
    their device until a field is read; reading may wait for the device.

    Args:
        names: Names of the present tasks, (m,).
        losses: Raw loss values, (m,).
        weights: Applied weights, (m,), or None.
        gram: Inner products of the rows over the shared parameters, (m, m), or None.
        norms: Row norms, (m,), where a method measures them without a Gram matrix, or None.
        flags: What was unusual.
        engine: How gradients were found.
        reason: Why in that way.
        projections: How often one gradient was projected off another, or None.
        unit: What the rows of `gram` were divided by: a power of two, where float64 does not hold their squares.
        nonfinite_before: Names of the losses of the previous call that were not finite.

    Attributes:
        names: Names of the tasks present in the call, (m,), in the order given.
        engine: How gradients were found: "rows", "ghosts" (some gradients of single losses were never formed), "blocks"
            (rows of one part of the model at a time; for both see `engine` of
            :class:`gradsurgery.surgery.base.Surgery`), "per sample" (all gradients from one backward pass; see there
            too), "slices" (rows spread over processes), "streaming" (see
            :class:`gradsurgery.PCGrad`), or "one pass". None if nothing was differentiated.
        reason: Why rows were formed or spared, in words. None where there was nothing to choose.
        projections: How often a gradient was projected off another, for the methods that do so pair by pair (PCGrad,
            GradVac); with one surgery per parameter or group, over all of them. None for all other methods.
        flags: What was unusual, for example "stationary", "rank-deficient", "nonfinite", "warmup", "reused",
            "rounded-rows"; "not-converged" where no weights were found whose optimality conditions hold to rounding;
            "loss-may-rise" where rounding may have broken the promise of the method that none does; "nonfinite-before"
            where `nonfinite_before` is not empty.
        nonfinite_before: Under ``nonfinite="defer"``, the names of the losses that were not finite, or whose weights
            were not, in the previous call. Always empty otherwise.
    """

    def __init__(
        self,
        names: Sequence[str],
        losses: Tensor | np.ndarray,
        weights: np.ndarray | Tensor | None = None,
        gram: np.ndarray | None = None,
        norms: np.ndarray | None = None,
        flags: Sequence[str] = (),
        engine: str | None = None,
        reason: str | None = None,
        projections: int | None = None,
        unit: float = 1.0,
        nonfinite_before: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.flags = tuple(dict.fromkeys(flags))
        self.engine = engine
        self.reason = reason
        self.projections = projections
        self.nonfinite_before = tuple(nonfinite_before)
        self._weights = (
            dict(zip(self.names, weights.tolist(), strict=True)) if isinstance(weights, np.ndarray) else weights
        )
        self._losses = losses
        self._gram = gram
        self._norms = norms
        self._unit = unit  # of the rows whose inner products `gram` holds, where float64 does not hold those of others

    @property
    def weights(self) -> dict[str, float] | None:
        """The weight of each loss in the update, by name, after `reduction`. None for methods that have no weights."""
        if isinstance(self._weights, Tensor):
            self._weights = dict(zip(self.names, self._weights.tolist(), strict=True))
        return self._weights

    @property
    def losses(self) -> dict[str, float]:
        """Raw values of the losses, by name."""
        return dict(zip(self.names, map(float, self._losses.tolist()), strict=True))

    @property
    def total(self) -> float:
        """Unweighted sum of the losses, for schedulers and early stopping, where moving weights would mislead."""
        return float(sum(self.losses.values()))

    @property
    def objective(self) -> float:
        """Σ wᵢ lᵢ at the applied weights, for an L-BFGS closure to return. The plain sum if a method has no weights."""
        weights = self.weights
        if weights is None:
            return self.total
        return float(sum(weights[name] * loss for name, loss in self.losses.items()))

    @property
    def gram(self) -> Tensor | None:
        """Inner products of the gradient rows over the shared parameters, (m, m), float64, on the CPU.

        What float64 does not hold is inf or 0; `norms` and `cosines` are right all the same.
        """
        return None if self._gram is None else torch.from_numpy(self._gram * self._unit * self._unit)

    @property
    def norms(self) -> dict[str, float] | None:
        """Norm of each gradient row, by name."""
        if self._gram is not None:
            norms = self._unit * np.sqrt(np.diag(self._gram))
        elif self._norms is not None:
            norms = self._norms
        else:
            return None
        return dict(zip(self.names, map(float, norms), strict=True))

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the gradient rows, (m, m), float64. A zero row has cosine 0 with every other and itself."""
        if self._gram is None:
            return None
        return torch.from_numpy(geometry.unit(self._gram)[1])

    @property
    def conflict_rate(self) -> float | None:
        """Share of the task pairs whose gradients have a negative inner product. 0 for one task."""
        if self._gram is None:
            return None
        pairs = self._gram[np.triu_indices(len(self.names), k=1)]
        return float((pairs < 0).mean()) if pairs.size else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Collect every field that has a value, for a logger.

        Returns:
            Field names to values.
        """
        fields = (
            *("losses", "total", "objective", "weights", "norms", "cosines"),
            *("conflict_rate", "projections", "engine", "flags"),
            *(("nonfinite_before",) if self.nonfinite_before else ()),
        )
        return {field: value for field in fields if (value := getattr(self, field)) is not None}

    def __repr__(self) -> str:
        parts = [f"losses={_short(self.losses)}"]
        weights = self.weights
        if weights is not None:
            parts.append(f"weights={_short(weights)}")
        if self.conflict_rate is not None:
            parts.append(f"conflict_rate={self.conflict_rate:.2f}")
        if self.flags:
            parts.append(f"flags={self.flags}")
        return f"Report({', '.join(parts)})"


def _short(values: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name!r}: {value:.4g}" for name, value in values.items()) + "}"
