"""What the weighters that look at the size of the gradients have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import rows as rows_module
from gradsurgery.call import Call, parameters
from gradsurgery.gram import Row
from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import RecordingWeighter, picked, ratio, require_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradientSizeWeighter(RecordingWeighter):
    """Base of the weighters that look at the size of each gradient.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where gradients are measured: a parameter, or any iterable of them. None: all parameters that two
            or more losses reach. Where the graph does not tell which these are, gradients that are there and not zero
            do, as in a surgery.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` is empty or holds something that is not a tensor.
    """

    uses_features = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared_params: Tensor | Iterable[Tensor] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.shared_params: list[Tensor] | None = None
        if shared_params is not None:
            self.shared_params = self._given_params(shared_params)

    def _where(self, call: Call) -> list[Tensor]:
        if call.features:
            return list(call.features)
        if self.shared_params is not None:
            return self.shared_params
        masks = call.graph.masks
        if call.kept is not None:
            masks = call.kept.masks()
            if call.world is not None:
                masks = call.world.united(masks, [*parameters(self), *call.theirs], len(call.tasks.present))
        mine = [p for p in parameters(self) if masks is None or p in masks]
        return [p for p in mine if masks is not None and masks[p] & (masks[p] - 1)] or mine

    def _open(self, call: Call, where: list[Tensor]) -> bool:
        """Whether the graph leaves open that only one loss reaches some of the parameters."""
        if call.features or self.shared_params is not None or len(call.tasks.present) < 2:
            return False
        return any(p in call.suspects for p in where) or (call.kept is None and bool(call.undecided(where)))

    def _really_shared(self, call: Call, where: list[Tensor], rows: list[Row]) -> list[Row]:
        """The rows over the parameters that two losses really reach; over all if there are none.

        Below a join that cannot be read every loss has a gradient, of zeros where it does not reach the parameter. One
        that is not zero proves that it does, now and later. A loss that never had one may reach everything.
        """
        names = call.tasks.present
        doubtful = [j for j, p in enumerate(where) if p in call.suspects]
        reached = np.array([[g is not None for g in row] for row in rows])
        if doubtful:
            everything = dict.fromkeys(p for group in self.param_groups for p in group["params"])
            positions = {p: j for j, p in enumerate(everything)}
            places = [positions[where[j]] for j in doubtful]
            proofs: dict[str, list[int]] = self.memory.get("nonzero", {})
            peaks = [
                torch.stack([rows_module.peak([] if g is None else [g], call.values.device) for g in row])
                for row in rows
            ]
            there = (torch.stack(peaks) != 0).cpu().numpy()
            seen = there[:, doubtful] | np.array([[j in proofs.get(name, ()) for j in places] for name in names])
            alive = there.any(axis=1) | np.array([name in proofs for name in names])
            if self._run["draft"] is not None:
                fresh = {
                    name: sorted({*proofs.get(name, ()), *(j for j, mark in zip(places, row, strict=True) if mark)})
                    for name, row, lives in zip(names, seen.tolist(), alive.tolist(), strict=True)
                    if lives
                }
                self.memory["nonzero"] = {**proofs, **fresh}
            if not alive.all():
                self._warn_of_doubt([name for name, lives in zip(names, alive.tolist(), strict=True) if not lives])
            reached[:, doubtful] &= seen | ~alive[:, None] | ~seen.any(axis=0)
        kept = [j for j, n in enumerate(reached.sum(axis=0).tolist()) if n > 1] or list(range(len(where)))
        return [[row[j] if marks[j] else None for j in kept] for row, marks in zip(rows, reached.tolist(), strict=True)]

    def _sizes(self, call: Call, measure: Callable[[Row, torch.device], Tensor]) -> Tensor | None:
        """Apply a function, homogeneous of degree 1, to the gradient of each loss; None in steps that reuse weights."""
        if self._due() != "act":
            return None
        sizes, where = [], self._where(call)
        rows: Iterable[Row] = call.rows_at(where)
        if self._open(call, where):
            rows = self._really_shared(call, where, list(rows))
        for name, row in zip(call.tasks.present, rows, strict=True):
            if call.features and all(g is None for g in row):
                raise RuntimeError(f"{self._name}.backward: loss {name!r} does not reach `features`.")
            sizes.append(measure(row, call.values.device))
        return torch.stack(sizes) / call.loss_scale.to(call.values.device, torch.float64)


def training_rates(
    owner: Weighter, losses: np.ndarray, given: Mapping[str, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Relative inverse training rates, (lᵢ/lᵢ(0)) / meanⱼ (lⱼ/lⱼ(0)).

    Args:
        owner: The method; its memory may have "initial_losses".
        losses: Values of the present losses, (m,).
        given: Initial losses from the user, by name, or None.

    Returns:
        The initial losses, (m,), and the rates, (m,), of mean 1. If all losses are 0 all rates are 1.

    Raises:
        ValueError: A loss is negative, or not positive the first time, or has no entry in `given`.
    """
    if given is None:
        first = owner.recall("initial_losses", losses)
        bad = {name: float(x) for name, x in zip(owner.names, first, strict=True) if not x > 0}
        if bad:
            raise ValueError(
                f"{owner._name}: every loss must be > 0 the first time, since later values are compared with it; got "
                f"{bad}. Nothing was written. `initial_losses` takes values from theory instead; or pass None for it "
                "in that batch."
            )
    else:
        first = np.array(picked(owner, "initial_losses", given))
    require_nonnegative(owner, losses, "it is compared with its initial value")
    rates = np.minimum(ratio(losses, first), 1e300 / len(losses))
    mean = rates.mean()
    return first, rates / mean if mean > 0 else np.ones(len(rates))
