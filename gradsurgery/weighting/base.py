"""The step that every weighting method makes: loss values, weights, one backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch, parameters, require_reached
from gradsurgery.communication import shards
from gradsurgery.gradients import rows as rows_module
from gradsurgery.graph.torch_private import hooks_after
from gradsurgery.guard import Guard
from gradsurgery.optimizer import MultiLossOptimizer, Switches
from gradsurgery.report import Report
from gradsurgery.weighting import deferred

if TYPE_CHECKING:
    from typing_extensions import Unpack


#: A weight, and a weighted loss, has collapsed below this share of the mean, for so many steps in a row.
COLLAPSED = 1e-3
COLLAPSED_STEPS = 100
#: Only where its loss is so many times larger or smaller than that of the largest weight: a method may well neglect a
#: loss that is nearly as it should be.
LOSSES_APART = 10.0


#: A gradient of a learnt number is wild above so many times its size so far; in the first steps, which know little of
#: that size, above so many.
WILD = 10.0
WILD_EARLY = 1000.0
EARLY_STEPS = 100


def _to_one(sizes: np.ndarray) -> np.ndarray:
    """Absolute values, the largest of them 1, whose products and sums stay finite."""
    sizes = np.abs(sizes)
    return sizes / (sizes.max() or 1.0)


def _small(sizes: np.ndarray) -> np.ndarray:
    return sizes < COLLAPSED * sizes.mean()


def _term(weight: float | Tensor, g: Tensor) -> tuple[float, Tensor]:
    """A factor that the host knows, and a gradient."""
    if isinstance(weight, Tensor):
        return 1.0, (g if g.is_sparse else rows_module.wide(g)) * weight.to(g.device)
    return float(weight), g


class Found:
    """What a method has measured in this call, changed in place: a framework may run it on an object of its own."""

    def __init__(self) -> None:
        self.measured: np.ndarray | None = None
        # Under nonfinite="defer": whether all values of this call are as they should be, a scalar on their device; what
        # the method has recalled in this call; and the values of the previous call.
        self.fine: Tensor | None = None
        self.before: dict[str, Tensor] = {}
        self.late: deferred.Late | None = None


class Weighter(MultiLossOptimizer):
    """Base of the methods that choose a weight for each loss from the values of the losses.

    Every parameter gets the gradient of Σ wᵢ lᵢ, at the cost of one backward pass. A method overrides :meth:`weights`,
    or :meth:`scalarize`, whose derivatives at the loss values are the weights.

    Args:
        optimizer: The torch optimizer that makes the step.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `optimizer` is a method of this library already.
    """

    #: The method measures gradients, and does so at `features` if they are given.
    uses_features = False
    #: The method reads `residuals`.
    uses_residuals = False
    #: What to do where one loss has taken all the weight for long; empty if that cannot happen, or is meant.
    if_collapsed = ""
    #: What to do where the weights have hardly moved for long; empty if that says nothing.
    if_still = ""
    #: Why negative losses are refused; empty if they are not.
    if_negative = ""

    def __init__(self, optimizer: Optimizer, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        if isinstance(optimizer, MultiLossOptimizer):
            raise TypeError(
                f"{self._name}: `optimizer` must be a torch optimizer, got {type(optimizer).__name__}. A "
                "weighter goes inside, surgery outside: PCGrad(UncertaintyWeighter(AdamW(...)))."
            )
        self._found = Found()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """The method: weights of the losses.

        Args:
            losses: Values of the present losses, (m,), float64.

        Returns:
            Weights, (m,).
        """
        x = torch.from_numpy(losses.copy()).requires_grad_()
        with torch.enable_grad():
            (weights,) = torch.autograd.grad(self.scalarize(x), x)
        return weights.numpy()

    def scalarize(self, losses: Tensor) -> Tensor:
        """The method as one differentiable function of the loss values.

        Args:
            losses: Values of the present losses, (m,), float64, detached from the model.

        Returns:
            A scalar.

        Raises:
            TypeError: The class defines no method.
        """
        raise TypeError(f"{self._name} defines neither `weights` nor `scalarize`.")

    def measure(self, batch: Batch) -> Tensor | None:
        """More numbers that the method needs, found before the backward pass and while the graph is whole.

        Args:
            batch: The losses of the call.

        Returns:
            (m, …), one entry or row per task. It travels to the host together with the loss values. None by default.
        """
        return None

    @property
    def measured(self) -> np.ndarray:
        """What :meth:`measure` returned, on the host, flat, float64."""
        assert self._found.measured is not None
        return self._found.measured

    @property
    def has_measured(self) -> bool:
        """Whether :meth:`measure` returned something in this call."""
        return self._found.measured is not None

    def descend(
        self,
        key: str,
        values: np.ndarray,
        gradient: np.ndarray,
        lr: float,
        rule: Literal["adam", "sgd"],
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """One step of a small optimizer of the method's own, on one learnt number per task.

        Adam's averages (β = 0.9 and 0.999) are kept in the memory by loss name, each with its own step count, so that
        an absent task is left alone. There is no weight decay and no absolute epsilon: a gradient of 1e-20 moves a
        number as far as one of 1e20.

        Args:
            key: Prefix under which the averages are kept.
            values: The numbers, (m,).
            gradient: Their gradient, (m,).
            lr: Step size.
            rule: "adam" or "sgd".
            names: Whose numbers they are; by default those of the present losses.

        Returns:
            The numbers after the step, (m,); keeping them is left to the caller.
        """
        if rule == "sgd":
            return values - lr * gradient
        count = self.recall(f"{key}.count", 0.0, names, like=values) + 1
        first = 0.9 * self.recall(f"{key}.first", 0.0, names, like=values) + 0.1 * gradient
        second = 0.999 * self.recall(f"{key}.second", 0.0, names, like=values) + 0.001 * gradient**2
        for name, value in (("count", count), ("first", first), ("second", second)):
            self.keep(f"{key}.{name}", value, names)
        library = deferred.library(values)
        size = library.sqrt(second / (1 - 0.999**count))
        moved = first / (1 - 0.9**count) / deferred.where(size > 0, size, 1.0)
        stepped: np.ndarray = values - lr * deferred.where(size > 0, moved, 0.0)
        return stepped

    def without_spikes(self, key: str, gradient: np.ndarray, rule: Literal["adam", "sgd"]) -> np.ndarray:
        """Count what is far longer than before as of usual length; Adam would remember it for thousands of steps.

        With u the root mean square of a task's entries so far (Adam's own average), an entry above 10 max(u, 1) becomes
        ±u. Cut to ten times u it would still move the number by tens of ordinary steps. A loss that stays at another
        level moves its number by the step size per step, as under Adam. The first 100 entries of a task may be above
        1000 max(u, 1), the first one anything.

        Args:
            key: As in :meth:`descend`, which follows.
            gradient: (m,), in units in which 1 is ordinary.
            rule: Under "sgd" nothing is cut.

        Returns:
            The gradient, (m,).
        """
        if rule == "sgd":
            return gradient
        library = deferred.library(gradient)
        count = self.recall(f"{key}.count", 0.0, like=gradient)
        second = self.recall(f"{key}.second", 0.0, like=gradient)
        usual = library.sqrt(second / deferred.where(count > 0, 1 - 0.999**count, 1.0))
        most = deferred.where(count < EARLY_STEPS, WILD_EARLY, WILD) * usual.clip(min=1.0)
        wild = (count > 0) & (abs(gradient) > most)
        # A number that never had to move has u = 0, and must still be able to.
        found: np.ndarray = deferred.where(wild, library.sign(gradient) * usual.clip(min=1e-3), gradient)
        return found

    def recall(
        self,
        key: str,
        default: float | np.ndarray,
        names: Sequence[str] | None = None,
        like: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read a number kept for each loss.

        Args:
            key: Its name in the memory.
            default: What a loss has that has none yet: a number, or one per loss, (m,).
            names: Of which losses; by default those that are present.
            like: What it is for: under ``nonfinite="defer"`` losses are tensors, and so is then what is read for them.

        Returns:
            (m,), float64.
        """
        like = default if like is None else like  # type: ignore[assignment]
        if not isinstance(like, Tensor):
            return super().recall(key, default, names)
        kept, names = self.memory.get(key, {}), self.names if names is None else names
        found: Any = deferred.recalled(kept, names, default, like)
        self._found.before[key] = found
        return found

    def keep(self, key: str, values: np.ndarray, names: Sequence[str] | None = None) -> None:
        """Keep a number for each loss; the others keep theirs.

        Tensors stay where they are. What was recalled in this call is kept in their place if a loss is not finite.

        Args:
            key: Its name in the memory.
            values: (m,).
            names: For which losses; by default those that are present.
        """
        if not isinstance(values, Tensor):
            super().keep(key, values, names)
            return
        if key in self._found.before and self._found.fine is not None:
            values = torch.where(self._found.fine, values, self._found.before[key])
        self.memory[key] = deferred.merged(self.memory.get(key, {}), self.names if names is None else names, values)

    def constants(self, values: Sequence[float], like: np.ndarray) -> np.ndarray:
        """Numbers that are the same in every step, as the method can multiply losses by them.

        Args:
            values: (m,).
            like: The losses.

        Returns:
            (m,), float64; a tensor if the losses are one.
        """
        found: Any = deferred.there(values, like) if isinstance(like, Tensor) else np.array(values, dtype=np.float64)
        return found

    def coefficients(self, losses: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        """Weights for this step, cadence included; `reduction` is not applied.

        Args:
            losses: Values of the present losses, (m,). Under ``nonfinite="defer"`` a tensor on their device.
            measured: What :meth:`~gradsurgery.weighting.base.Weighter.measure` gave.

        Returns:
            Weights, (m,).
        """
        phase = self.phase
        if phase == "warmup":
            self.flag("warmup")
            return np.ones(len(losses))
        if phase == "reuse":
            self.flag("reused")
            return self._last(losses)
        self._found.measured = measured
        try:
            weights = self.weights(losses)
        finally:
            self._found.measured = None
        if self.if_collapsed:
            self._look_for_collapse(weights, losses)
        if self.preference is not None:
            weights = weights * self.constants(self.preferences().tolist(), weights)
        weights = self.smoothed(weights)
        if self.every > 1:
            self.memory["last_weights"] = {}
            self.keep("last_weights", weights)
        return weights

    def _last(self, losses: np.ndarray) -> np.ndarray:
        last = self.memory["last_weights"]
        stays = isinstance(losses, Tensor) and isinstance(last, deferred.Numbers)
        return self.recall("last_weights", 0.0, like=losses if stays else None)

    def _look_for_collapse(self, weights: np.ndarray, losses: np.ndarray) -> None:
        """A loss that counts for nothing, neither by its weight nor by its weighted value, step after step."""
        if not np.isfinite(weights).all():
            return
        shares = _to_one(weights)
        sizes = _to_one(losses)
        leader = sizes[shares.argmax()]
        apart = np.maximum(sizes, leader) > LOSSES_APART * np.minimum(sizes, leader)
        gone = apart & _small(shares) & _small(shares * sizes)
        names = [name for name, yes in zip(self.names, gone, strict=True) if yes]
        if self.transaction.loop.lasts("collapsed", bool(names) and len(weights) > 1, COLLAPSED_STEPS):
            self.warn_once(
                "collapsed",
                f"{self._name}: for {COLLAPSED_STEPS} steps hardly any weight has been left for {names}: the weights "
                f"are {dict(zip(self.names, weights.tolist(), strict=True))} for losses of "
                f"{dict(zip(self.names, losses.tolist(), strict=True))}. {self.if_collapsed}",
            )

    def _act(self, batch: Batch) -> Report:
        if batch.features or batch.residuals is not None:
            self._require_meaning(batch)
        if self.settings.nonfinite == "defer":
            return self._act_unseen(batch)
        names, m, transaction = batch.names, len(batch.names), self.transaction
        guard = Guard(batch, self.settings, transaction)
        extra = self.measure(batch)
        (values, *more), _ = batch.comm.fetch([batch.values, *([] if extra is None else [extra])], [])
        # A sum of finite numbers may overflow, and they are then looked at one by one.
        stopped = not math.isfinite(sum(values.tolist())) and guard.stops(np.isfinite(values), "the value")
        if stopped or (more and guard.stops(np.isfinite(more[0]).reshape(m, -1).all(axis=1), "the gradient")):
            return Report(names, values, flags=transaction.flags)

        share = self.settings.share(m)
        weights = self.coefficients(values, *more) if transaction.writable else np.ones(m)
        weights = batch.comm.broadcast(weights, batch.values.device)
        applied = guard.fitting(share * weights, batch.largest_weights)
        if applied is None:
            return Report(names, values, flags=transaction.flags)
        targets = [*batch.owned, *batch.foreign]
        found = self._combined(batch, applied, share)
        if not guard.spoiled(found, doubtful=False, unseen=True):
            rows_module.write(targets, found)
        engine = "one pass" if batch.accumulated is None else "rows"
        return Report(names, values, applied, flags=transaction.flags, engine=engine)

    def _act_unseen(self, batch: Batch) -> Report:
        """The same without a look at the values: they stay on their device, and the next call looks at them."""
        if not batch.comm.is_alone:
            raise RuntimeError(
                f'{self._name}.backward: nonfinite="defer" works in one process, and these parameters are spread over '
                'several. Use "raise", "skip" or "drop".'
            )
        before, transaction, values = self._look_back(), self.transaction, batch.values
        fine = torch.isfinite(values) & (values >= 0) if self.if_negative else torch.isfinite(values)
        self._found.fine, self._found.before = fine.all(), {}
        try:
            share = self.settings.share(len(batch.names))
            weights = share * self.coefficients(values)  # type: ignore[arg-type]
        finally:
            self._found.fine, self._found.before = None, {}
        applied: Any = weights
        if isinstance(weights, Tensor):
            fine = fine & (weights.abs() <= float(batch.largest_weights().min()))
        else:
            applied = Guard(batch, self.settings, transaction).fitting(weights, batch.largest_weights)
        targets = [*batch.owned, *batch.foreign]
        found = self._combined(batch, applied, share)
        if not batch.is_scaled:
            deferred.kept_out(found, fine.all())
        rows_module.write(targets, found)
        self._found.late = deferred.Late(batch.names, values, fine)
        engine = "one pass" if batch.accumulated is None else "rows"
        return Report(batch.names, values, applied, flags=transaction.flags, engine=engine, nonfinite_before=before)

    def _look_back(self) -> tuple[str, ...]:
        """Look at the values of the previous call. Returns the names of the losses that were not as they should be."""
        late, self._found.late = self._found.late, None
        losses, bad = ({}, ()) if late is None else late.read()
        negative = {name: loss for name, loss in losses.items() if loss < 0} if self.if_negative else {}
        if negative:
            raise ValueError(
                f"{self._name}: every loss must be >= 0, since {self.if_negative}; got {negative} in the previous "
                'call, which nonfinite="defer" checks one call late. Nothing of that call went into `.grad`, unless a '
                "gradient scaler was given."
            )
        if bad:
            self.flag("nonfinite-before")
            shown = {name: losses[name] for name in bad}
            self.warn_once(
                "nonfinite-before",
                f"{self._name}.backward: in the previous call, a loss or its weight was not finite: {shown}. Nothing "
                "of that call went into `.grad`, unless a gradient scaler was given, and nothing was learnt from it. "
                "From now on `report.nonfinite_before` alone says so.",
            )
        return bad

    def _require_meaning(self, batch: Batch) -> None:
        """Refuse what this method has no use for."""
        if batch.features and not self.uses_features:
            raise ValueError(
                f"{self._name}.backward: `features` has no effect here: the method reads loss values only."
            )
        if batch.residuals is not None and not self.uses_residuals:
            raise ValueError(f"{self._name}.backward: `residuals` has no effect here: NTKWeighter alone reads them.")

    def _combined(self, batch: Batch, weights: np.ndarray, share: float) -> list[Tensor | None]:
        """Σ wᵢ gᵢ by parameter; other optimizers get the plain sum."""
        if batch.accumulated is not None:
            return self._of_rows(batch, weights, np.full(len(weights), share))
        found = batch.one_pass(weights, batch.owned, last=not batch.foreign)
        if batch.foreign:
            found += batch.one_pass(np.full(len(weights), share), batch.foreign, last=True)
        # A hook behind the accumulation may have taken the gradients, as those do that make the step themselves.
        if batch.comm.is_alone and all(g is None for g in found) and not any(map(hooks_after, batch.owned)):
            require_reached(self._name, parameters(self), dict.fromkeys(batch.names, False))
        return found

    def _of_rows(self, batch: Batch, weights: np.ndarray, plain: np.ndarray) -> list[Tensor | None]:
        """The same of gradients that were accumulated."""
        targets = [*batch.owned, *batch.foreign]
        rows = [row for _, row in batch.rows(targets)]
        sums = []
        for j, p in enumerate(targets):
            factors = weights if j < len(batch.owned) else plain
            terms = [
                _term(w, batch.comm.local(g, p))
                for w, row in zip(factors, rows, strict=True)
                if (g := row[j]) is not None
            ]
            sums.append(rows_module.plain(terms, shards.empty(p)))
        return [batch.comm.like(g, p) for p, g in zip(targets, batch.comm.totals(sums, targets), strict=True)]
