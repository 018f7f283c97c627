"""The step of every surgery method: losses → gradients → inner products → weights → ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsurgery.batch import Batch, Layout
from gradsurgery.communication import shards
from gradsurgery.gradients import Gradients, Request, Stream, gather
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.dense import Dense, whole
from gradsurgery.gradients.descent import Direction
from gradsurgery.gradients.gram import Gram, Row
from gradsurgery.guard import Guard
from gradsurgery.report import Report
from gradsurgery.sharing import Habits, Sharing
from gradsurgery.solve import Problem, solve

if TYPE_CHECKING:
    from gradsurgery.protocols import Method


class Seen(NamedTuple):
    """What the host knows of the gradients.

    Attributes:
        values: The losses, (m,).
        scale: The loss scale.
        measured: What a weighter inside has measured, if anything.
        peaks: The largest plain gradient of each loss, (m,), with the loss scale.
        grams: Inner products of the rows in each group of the shared parameters.
        unit: What the rows of :meth:`gram` were divided by.
        columns: What the method has sent, one column a shared parameter, or None.
        norms: Lengths of the gradients where they are all that was measured, or None.
    """

    values: np.ndarray
    scale: float
    measured: list[np.ndarray]
    peaks: np.ndarray
    grams: list[Gram]
    unit: float
    columns: np.ndarray | None
    norms: np.ndarray | None

    def is_finite(self) -> bool:
        """Whether everything surely is: sums of finite numbers may overflow.

        Returns:
            False where it has to be looked at one by one.
        """
        found = sum(self.values.tolist()) + sum(self.peaks.tolist())
        for gram in self.grams:
            found += sum(gram.values.diagonal().tolist())
        for numbers in self.measured:
            found += sum(numbers.ravel().tolist())
        return math.isfinite(found if self.norms is None else found + sum(self.norms.tolist()))

    def gram(self) -> np.ndarray | None:
        """Inner products over all groups.

        Returns:
            (m, m), or None if there are none.
        """
        if not self.grams:
            return None
        if len(self.grams) == 1:
            return self.grams[0].values
        parts = (g.values * (g.unit / self.unit) ** 2 for g in self.grams)
        return np.asarray(sum(parts, np.zeros_like(self.grams[0].values)))


class Weighed(NamedTuple):
    """What everything is multiplied by.

    Attributes:
        factors: The plain gradients, (m,).
        left: The rows, `weights` aside, (m,). None: nothing, or the rows had it before the method saw them.
        weights: The rows of each group of the shared parameters.
    """

    factors: np.ndarray
    left: np.ndarray | None
    weights: list[np.ndarray]


class SurgeryStep:
    """One call of ``backward``.

    Args:
        method: The surgery.
        batch: The losses.
        layout: The places of the parameters.
    """

    def __init__(self, method: Method, batch: Batch, layout: Layout) -> None:
        self.method = method
        self.inner = method.inner
        self.batch = batch
        self.layout = layout
        self.settings = method.settings
        self.transaction = method.transaction
        self.memory = self.transaction.memory
        self.phase = self.settings.phase(self.memory, batch.names)
        self.guard = Guard(batch, self.settings, self.transaction)
        self.m = len(batch.names)
        self.share = self.settings.share(self.m)
        self.observes = method.observes and self.phase == "solve"
        self.multiplies = self.inner is not None or self.settings.log_losses

    def take(self) -> Report:
        """Take the step.

        Returns:
            What happened.
        """
        if self.phase != "solve":
            self.transaction.flag("reused" if self.phase == "reuse" else self.phase)
        measured = None if self.inner is None else self.inner.measure(self.batch)
        request, gradients = self._differentiate()
        early = None
        if self.observes:
            early = self._early_factors(measured)
            if early is not None and self._stopped_early(early, gradients):
                return self._nothing(self.batch.values.cpu().numpy())
            self._observe(gradients, early, request)
        parts = self.method.parts(gradients.shared, self.layout)
        gradients.partition(list(parts.values()))
        seen = self._fetch(gradients, measured)
        if self._stopped(seen):
            return self._nothing(seen.values)
        weighed = self._weigh(gradients, parts, seen, early)
        if self.m > 1 and not gradients.shared and self.phase != "warmup":
            self.transaction.flag("nothing-shared")
        return self._write(gradients, request, seen, weighed)

    def _nothing(self, values: np.ndarray) -> Report:
        return Report(self.batch.names, values, flags=self.transaction.flags)

    # ---------------------------------------------------------------------------------- losses → gradients

    def _differentiate(self) -> tuple[Request, Gradients]:
        """Make the backward passes, and find out which parameters are shared."""
        method, transaction = self.method, self.transaction
        habits = Habits(
            method.observes, method.moves_unreached, method.undecided, method.acts_on_private, method.streaming
        )
        sharing = Sharing(self.batch, self.layout, self.settings, transaction, habits, self.phase)
        request = self._request(sharing)
        try:
            gradients = gather(request)
        finally:
            transaction.keep("failed", sorted(request.failed))
            transaction.keep("checked", request.checked)
        sharing.settle(gradients)
        transaction.flags += gradients.flags
        return request, gradients

    def _request(self, sharing: Sharing) -> Request:
        method, batch, settings, memory = self.method, self.batch, self.settings, self.memory
        shared, one_pass = sharing.plan()
        is_shared = set(map(id, shared))
        return Request(
            batch=batch,
            m=self.m,
            shared=shared,
            plain=[p for p in (*batch.owned, *batch.foreign) if id(p) not in is_shared],
            solves=self.phase == "solve",
            one_pass=one_pass,
            engine=settings.engine,
            gram_only=method.needs_gram_only,
            named=settings.shared_params is not None,
            apart=self.multiplies,
            doubtful=sharing.doubtful(shared),
            row_dtype=settings.row_dtype,
            row_device=settings.row_device,
            puts_away=settings.puts_rows_away,
            stand_in=self._stand_in,
            stream=self._stream() if method.streaming and not one_pass else None,
            share=self.share,
            failed=set(memory.get("failed", ())),
            step=memory["step"],
            checked=dict(memory.get("checked", {})),
        )

    def _stream(self) -> Stream:
        method = self.method
        return Stream(
            order=method.visiting_order(),
            priorities=method.preferences(),
            promises=method.promises(2),
            learns=self.transaction.writable,
        )

    def _stand_in(self, p: Tensor) -> Tensor:
        """What stands for a parameter before the method: the local piece, and pairs of reals for complex entries."""
        pairs = p.is_complex() and not self.method.needs_gram_only
        if not pairs and not hasattr(p, "device_mesh"):
            return p
        return self.layout.stand_in(
            p, lambda: torch.view_as_real(shards.empty(p).detach()) if pairs else shards.empty(p)
        )

    # ------------------------------------------------------------------------ methods that replace the rows

    def _early_factors(self, measured: Tensor | None) -> np.ndarray | None:
        """What multiplies each loss, if that has to be known before the method sees the rows: one more transfer."""
        if not self.multiplies:
            return None
        (values, *more), _ = self.batch.comm.fetch([self.batch.values, *([] if measured is None else [measured])], [])
        if not np.isfinite(values).all():
            return np.where(np.isfinite(values), 1.0, np.nan)
        return self.method.factors(values, *more)

    def _stopped_early(self, early: np.ndarray, gradients: Gradients) -> bool:
        return (
            self.guard.stops(np.isfinite(early), "the value")
            or self.guard.fitting(early, gradients.largest_weights) is None
        )

    def _observe(self, gradients: Gradients, early: np.ndarray | None, request: Request) -> None:
        """Let the method replace the rows."""
        assert isinstance(gradients, Dense)
        scale = None if self.batch.scaler is None else self.batch.loss_scale
        self._require_dense(gradients.rows)
        for i, row in enumerate(gradients.rows):
            rows_module.unscale(row, scale, 1.0 if early is None else float(early[i]))
        if not self.transaction.writable:
            return
        seen = self.batch.values
        if self.settings.log_losses:
            seen = seen.log()
        elif early is not None:
            seen = seen * torch.from_numpy(early).to(seen.device)
        params = list(map(request.stand_in, gradients.shared))
        with self.method.observing(early):
            gradients.replace(self.method.observe(gradients.rows, list(seen.unbind()), params))

    def _require_dense(self, rows: Sequence[Row]) -> None:
        why = self.method.sparse_refused
        if why and any(g is not None and g.is_sparse for row in rows for g in row):
            raise RuntimeError(
                f"{self.batch.owner}.backward: sparse gradients are refused: {why}. Nothing was written."
            )

    # ------------------------------------------------------------------------- gradients → inner products

    def _fetch(self, gradients: Gradients, measured: Tensor | None) -> Seen:
        """Bring everything that the host has to know there, in one transfer."""
        comm, products, peaks = self.batch.comm, gradients.products(), gradients.peaks()
        sent = self.method.sent()
        if sent is not None:
            counts = torch.tensor(list(map(comm.counts, gradients.shared)), dtype=torch.bool, device=sent.device)
            sent = torch.where(counts, sent, 0)
        scales = [] if self.batch.is_unscaled else [self.batch.loss_scale]
        alone = [self.batch.values, *scales, *([] if measured is None else [measured])]
        together = [*peaks, *products, *([] if sent is None else [sent])]
        (values, *more), found = comm.fetch(alone, together)
        scale = float(more.pop(0)[0]) if scales else 1.0
        columns = None if sent is None else found.pop().reshape(len(sent), -1)
        largest = found.pop(0) if peaks else np.zeros(self.m)
        grams = gradients.grams(found, 1.0 if self.observes else scale)
        return Seen(
            values=values,
            scale=scale,
            measured=more,
            peaks=largest,
            grams=grams,
            unit=max([gram.table.unit for gram in grams], default=1.0),
            columns=columns,
            norms=gradients.norms,
        )

    def _stopped(self, seen: Seen) -> bool:
        """Whether something is not finite, and nothing is to be written."""
        if seen.is_finite():  # as almost always
            return False
        finite = np.isfinite(seen.peaks)
        for gram in seen.grams:
            squares = np.isfinite(gram.values.diagonal())
            finite = finite & (squares if len(squares) == self.m else squares.all())
        for numbers in (*seen.measured, *([] if seen.norms is None else [seen.norms])):
            finite = finite & np.isfinite(numbers).reshape(self.m, -1).all(axis=1)
        return self.guard.stops(np.isfinite(seen.values), "the value") or self.guard.stops(finite, "the gradient")

    # -------------------------------------------------------------------------- inner products → weights

    def _weigh(
        self, gradients: Gradients, parts: dict[str, list[int]], seen: Seen, early: np.ndarray | None
    ) -> Weighed:
        """Find the weights. In a call that is rejected they are 1: a scaler has to see inf and nan to skip the step."""
        weights: list[np.ndarray] = []
        if not self.transaction.writable:
            return Weighed(np.ones(self.m) if early is None else early, None, self._plain_sum(seen))
        factors = self.method.factors(seen.values, *seen.measured) if early is None else early
        left = factors if self.multiplies and early is None else None
        if self.phase == "solve" and gradients.solved is not None:
            weights = [gradients.solved for _ in parts]
        elif self.phase == "solve":
            weights = self._solve(gradients, parts, seen, factors, left)
        elif self.phase == "reuse" and (self.m == 1 or gradients.balances):
            last = self.memory["last_weights"]
            weights = [np.array([last[name] for name in self.batch.names]) for _ in parts]
        weights = weights or self._plain_sum(seen)
        if self.settings.every > 1 and self.phase == "solve":
            new = weights[0] if weights else np.ones(self.m)
            self.memory["last_weights"] = dict(zip(self.batch.names, map(float, new), strict=True))
        comm, device = self.batch.comm, self.batch.values.device
        return Weighed(factors, left, weights if comm.is_alone else [comm.broadcast(w, device) for w in weights])

    def _plain_sum(self, seen: Seen) -> list[np.ndarray]:
        return [np.ones(len(gram)) for gram in seen.grams]

    def _solve(
        self,
        gradients: Gradients,
        parts: dict[str, list[int]],
        seen: Seen,
        factors: np.ndarray,
        left: np.ndarray | None,
    ) -> list[np.ndarray]:
        """Ask the method, group by group."""
        method, weights = self.method, []
        values = seen.values.copy()  # the method may change its own
        if self.multiplies:
            values = method.seen(values, factors)
        for k, (name, gram) in enumerate(zip(parts, seen.grams, strict=False)):
            measured = None if seen.columns is None else seen.columns[:, list(parts.values())[k]].sum(axis=1)
            problem = Problem(self.batch.names, gram, measured)
            with method.part(name):
                weights.append(solve(method, problem, values, left, gradients.reaching(k)))
        return weights

    # -------------------------------------------------------------------------------- weights → ``.grad``

    @property
    def _is_solved(self) -> bool:
        """Whether the weights are those that the method has found in this call."""
        return self.phase == "solve" and self.transaction.writable

    def _write(self, gradients: Gradients, request: Request, seen: Seen, weighed: Weighed) -> Report:
        share, left, factors = self.share, weighed.left, self.share * weighed.factors
        applied = [share * (w if left is None or len(w) != self.m else w * left) for w in weighed.weights]
        gram, unit, shared = seen.gram(), seen.unit, gradients.shared
        gradients, applied, held = self._hold(gradients, seen, weighed, applied)
        fitting = self._fitting(gradients, applied, factors, held)
        if fitting is None:
            return self._nothing(seen.values)
        doubtful = self._may_overflow(gradients, fitting, factors, gram, seen)
        seen.grams.clear()  # nothing else may hold the rows while they are added up
        found = gradients.combine(fitting, factors, held, self._adder(request))
        del held
        if self.observes and self.batch.scaler is not None:
            for p in shared:
                if (g := found[p]) is not None:
                    found[p] = g * self.batch.loss_scale.to(g.device, g.dtype)
        sums, comm = list(found.values()), self.batch.comm
        if not comm.is_alone:
            sums = [comm.like(g, p) for p, g in found.items()]
        if self.guard.spoiled(sums, doubtful, gradients.is_unseen):
            return self._nothing(seen.values)
        rows_module.write(list(found), sums)
        return Report(
            self.batch.names,
            seen.values,
            self._shown_weights(fitting, factors, weighed),
            None if gram is None else gram[: self.m, : self.m],
            norms=None if seen.norms is None or not shared else seen.norms / seen.scale,
            flags=self.transaction.flags,
            engine=gradients.engine,
            reason=gradients.reason or None,
            projections=self.transaction.projections,
            unit=unit,
        )

    def _hold(
        self, gradients: Gradients, seen: Seen, weighed: Weighed, applied: list[np.ndarray]
    ) -> tuple[Gradients, list[np.ndarray], list[Direction | None]]:
        """Keep the promise that no loss rises where rounding could break it."""
        # A loss that is multiplied by 0 or less takes no part in what the method promises.
        if not (self._is_solved and all(f > 0 for f in weighed.factors.tolist())):
            return gradients, applied, [None for _ in applied]
        promises = [self.method.promises(len(gram.values)) for gram in seen.grams]
        if promises and promises[0]:
            gradients, applied[0] = gradients.inside(seen.grams[0], applied[0])
        held: list[Direction | None] = [None for _ in applied]
        for k, gram in enumerate(seen.grams):
            if promises[k] and math.isfinite(sum(applied[k].tolist())):
                held[k] = gradients.hold(k, gram, applied[k])
        if gradients.may_rise or not all(direction is None or direction.descends for direction in held):
            self.transaction.flag("loss-may-rise")
        return gradients, applied, held

    def _fitting(
        self,
        gradients: Gradients,
        applied: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[Direction | None],
    ) -> list[np.ndarray] | None:
        """The weights, if what they multiply can hold them; what is held was added up in double precision."""
        most = gradients.largest_weights
        fitting = [self.guard.fitting(w, most) if d is None else d.weights for w, d in zip(applied, held, strict=True)]
        found = [w for w in fitting if w is not None]
        if len(found) < len(fitting) or self.guard.fitting(factors, most) is None:
            return None
        return found

    def _may_overflow(
        self,
        gradients: Gradients,
        applied: Sequence[np.ndarray],
        factors: np.ndarray,
        gram: np.ndarray | None,
        seen: Seen,
    ) -> bool:
        """Whether the result may be too large for the dtype of a parameter, though every row and weight is in range.

        No entry of a sum is larger than the lengths of its rows together.
        """
        if self.method.lengthens:
            return True
        if gram is not None:
            unit = seen.unit
            lengths = [unit * math.sqrt(square) for square in gram.diagonal().tolist()]
        else:
            lengths = [0.0] * self.m if seen.norms is None else seen.norms.tolist()
        terms = [*((w.tolist(), lengths) for w in applied), (factors.tolist(), seen.peaks.tolist())]
        bound = max(sum([abs(w) * most for w, most in zip(*pair, strict=False)]) for pair in terms)
        return rows_module.may_overflow(bound, [*gradients.shared, *gradients.private.params])

    def _adder(self, request: Request) -> rows_module.Add:
        """What adds up the rows of one parameter: the method, if it has its own way."""
        method = self.method
        if not self._is_solved:
            return lambda column, weights, p: rows_module.combine(
                [whole(g, p) for g in column], weights, shards.empty(p)
            )

        def add(column: list[Tensor | None], weights: list[float], p: Tensor) -> Tensor | None:
            if request.puts_away and not method.adds_rows:  # it sees one parameter in full precision at a time
                column = [rows_module.restored(g, p) for g in column]
            g = method.direct(column, weights, request.stand_in(p), self.share)
            return whole(g, p)

        return add

    def _shown_weights(self, applied: Sequence[np.ndarray], factors: np.ndarray, weighed: Weighed) -> np.ndarray | None:
        """One weight per loss for the report, where the method works by them."""
        if not self.method.has_weights:
            return None
        if not applied:
            return factors
        if (len(applied) > 1 and self.phase == "solve") or len(applied[0]) != self.m:  # one for each group or row
            return None
        return applied[0] * weighed.factors if weighed.left is None else applied[0]
