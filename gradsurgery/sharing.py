"""Which parameters are shared by two losses or more, as far as the graph of a call, its gradients and memory tell."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.batch import Batch, Layout, require_reached
from gradsurgery.gradients import Gradients
from gradsurgery.gradients.base import signs_of
from gradsurgery.gradients.gram import Row
from gradsurgery.settings import Phase, Settings
from gradsurgery.transaction import Transaction


class Habits(NamedTuple):
    """What a method does that bears on sharing.

    Attributes:
        keeps_rows: It keeps rows of its own between steps, so that a trunk stays shared when tasks are absent.
        moves_unreached: It moves parameters that only absent losses have reached.
        undecided: It does not know yet which parameters are private.
        acts_on_private: It acts on these too.
        streaming: It works while the rows arrive, and has to know before the first which parameters are shared.
    """

    keeps_rows: bool
    moves_unreached: bool
    undecided: bool
    acts_on_private: bool
    streaming: bool


class Sharing:
    """The question of sharing in one call.

    Args:
        batch: The losses.
        layout: The places of the parameters.
        settings: The switches of the method.
        transaction: Its memory.
        habits: What else matters of it.
        phase: What kind of step this is.
    """

    def __init__(
        self,
        batch: Batch,
        layout: Layout,
        settings: Settings,
        transaction: Transaction,
        habits: Habits,
        phase: Phase,
    ) -> None:
        self._batch = batch
        self._layout = layout
        self._named = settings.shared_params
        self._transaction = transaction
        self._habits = habits
        self._params = batch.params
        self._phase = phase
        self._m = len(batch.names)

    # ------------------------------------------------------------------------------------ before the passes

    def plan(self) -> tuple[list[Tensor], bool]:
        """What the surgery acts on, as far as it is known before the first pass, and whether one pass over all will do.

        Returns:
            The shared parameters; True if the weights are known before, or come from the features.
        """
        shared, solves = self.candidates(), self._phase == "solve"
        one_pass = (not solves or bool(self._batch.features)) and self._does_with_one_pass(shared)
        if (one_pass and solves) or (self._habits.streaming and self._batch.masks is not None):
            shared = self._settled(shared)
        if one_pass and self._m > 1 and self._phase != "warmup" and not self._is_balanced(shared):
            shared = []
        return shared, one_pass

    def _does_with_one_pass(self, shared: Sequence[Tensor]) -> bool:
        if self._batch.accumulated is not None:
            return False
        return self._phase != "reuse" or not self._needs_rows(shared)

    def candidates(self) -> list[Tensor]:
        """The parameters that the surgery acts on: named by the user, or reached by two losses as far as is known.

        Returns:
            Those of the owned parameters; of all, where the method moves what no loss of this batch reaches.
        """
        batch, masks, habits = self._batch, self._batch.masks, self._habits
        moves_all = habits.moves_unreached and not habits.undecided
        params = self._params if moves_all else batch.owned
        if self._named is not None:
            return [p for p in params if p in self._named]
        if (
            masks is None or habits.undecided or habits.acts_on_private
        ):  # what is private shows when the gradients are there
            return list(params)
        if not habits.keeps_rows:
            return [p for p in params if (mask := masks[p]) & (mask - 1)]
        ever = self._reached_ever()
        here = {p: {n for i, n in enumerate(batch.names) if masks.get(p, 0) >> i & 1} for p in params}
        return [p for p in params if len(here[p] | ever.get(self._layout.place(p), set())) > 1]

    def doubtful(self, shared: Sequence[Tensor]) -> list[int]:
        """Places of shared parameters below a join that cannot be read, such as one in a compiled model.

        Args:
            shared: The parameters.

        Returns:
            Indices into them.
        """
        if self._named is not None or self._m < 2:
            return []
        suspects = self._batch.suspects
        return [j for j, p in enumerate(shared) if p in suspects]

    def _settled(self, shared: list[Tensor]) -> list[Tensor]:
        """Take out what only one loss really reaches, before the first pass over all.

        Args:
            shared: What two losses may reach.

        Returns:
            What they do reach. Where the graph does not tell, short passes do.
        """
        if not (left := self.open(shared)):
            return shared
        private = {p for p, n in zip(left, self._short_passes(left).sum(dim=0).tolist(), strict=True) if n < 2}
        return [p for p in shared if p not in private]

    def open(self, shared: Sequence[Tensor]) -> list[Tensor]:
        """Find the shared parameters of which the graph of this call does not tell that two losses reach them.

        Args:
            shared: What two losses may reach.

        Returns:
            Those of them.
        """
        if self._named is not None:
            return []
        if self._habits.keeps_rows:
            ever = self._reached_ever()
            shared = [p for p in shared if len(ever.get(self._layout.place(p), ())) < 2]
        proofs: dict[str, list[int]] = self._transaction.memory.get("nonzero", {})
        places = {j: self._layout.place(shared[j]) for j in self.doubtful(shared)}
        doubtful = {shared[j] for j, place in places.items() if sum(place in seen for seen in proofs.values()) < 2}
        undecided = set(self._batch.undecided(shared))
        return [p for p in shared if p in undecided or p in doubtful]

    def _is_balanced(self, shared: Sequence[Tensor]) -> bool:
        """Whether two losses reach the parameters that the surgery acts on, before the first pass over all.

        Args:
            shared: These parameters.

        Returns:
            True if there is something to balance.
        """
        masks = self._batch.masks
        if masks is not None:
            twice = [p for p in shared if (mask := masks[p]) & (mask - 1)]
            if len(self._batch.undecided(twice)) < len(twice):
                return True
            covered = functools.reduce(operator.or_, (masks[p] for p in shared), 0)
            if not covered & (covered - 1):
                return False
        return bool(shared) and int(self._short_passes(shared).any(dim=1).sum()) > 1

    def _needs_rows(self, shared: Sequence[Tensor]) -> bool:
        """Whether a step that reuses weights makes one backward pass per loss all the same.

        Args:
            shared: What two losses may reach.

        Returns:
            True where the graph leaves something open; where it hides its parameters, so that it does not tell whether
            two losses reach any that the user has named; and where every loss has a graph of its own, since two passes
            over all would need these twice.
        """
        batch = self._batch
        if batch.masks is None:
            return True
        apart = batch.comm.is_alone and not any(batch.graph.overlaps)
        return (apart and len(shared) < len(batch.owned) + len(batch.foreign)) or bool(self.open(shared))

    def _short_passes(self, params: Sequence[Tensor]) -> Tensor:
        """Which losses reach which parameters, found by short passes, (m, P)."""
        suspects = self._batch.suspects
        there = [
            [g is not None and (p not in suspects or bool(g.any())) for p, g in zip(params, row, strict=True)]
            for row in self._batch.rows_at(params, whole=False)
        ]
        return self._batch.comm.any_of(torch.tensor(there, dtype=torch.uint8, device="cpu"))

    # ------------------------------------------------------------------------------------- after the passes

    def settle(self, gradients: Gradients) -> None:
        """Let gradients that were found decide what only one loss really reaches.

        The walk over the graph sees what may be reached. A node with several outputs may pass nothing on.

        Args:
            gradients: The gradients; they learn what is shared.
        """
        marks = gradients.marks
        reached = gradients.reached if marks is None else marks.reached
        comm = self._batch.comm
        if self._batch.masks is None and reached is not None:
            anywhere = comm.any_of(torch.tensor(reached, dtype=torch.uint8, device="cpu")).tolist()
            require_reached(self._batch.owner, self._params, dict(zip(self._batch.names, anywhere, strict=True)))
        if marks is None:
            return
        shared = gradients.shared
        there: Sequence[Sequence[int]] = marks.there
        if not comm.is_alone:
            there = comm.any_of(torch.tensor(there, dtype=torch.uint8).reshape(self._m, len(shared))).tolist()
        unreached: list[tuple[int, int]] = []
        if marks.signs is not None:
            there, unreached = self._told_by_zeros(there, marks.signs, shared)
        if self._habits.keeps_rows and self._phase == "solve":
            self._remember_reached(there, shared)
        counts = list(map(sum, zip(*there, strict=True)))
        gradients.silent = {p for p, n in zip(shared, counts, strict=True) if not n}
        # A method that keeps rows has averages there, and leaves them where they are.
        stays = self._habits.keeps_rows and not self._habits.moves_unreached
        idle = [j for j, n in enumerate(counts) if not n] if stays else []
        private = self._private(shared, counts, idle)
        if unreached or private or idle or not comm.is_alone:
            gradients.settle(there, unreached, private, idle)

    def really_shared(self, params: Sequence[Tensor], rows: Sequence[Row]) -> list[Row]:
        """Cut rows down to the parameters that two losses really reach, for a weighter that measures there.

        Args:
            params: What two losses may reach.
            rows: The gradients there, (m,), over all processes.

        Returns:
            The rows over those of the parameters; over all if there are none.
        """
        there: Sequence[Sequence[int]] = [[g is not None for g in row] for row in rows]
        if doubtful := self.doubtful(params):
            peaks = [torch.zeros((), dtype=torch.float64, device=self._batch.values.device)] * len(rows)
            signs = torch.stack([signs_of(row, doubtful, peak) for row, peak in zip(rows, peaks, strict=True)])
            there, _ = self._told_by_zeros(there, signs, params)
        kept = [j for j, column in enumerate(zip(*there, strict=True)) if sum(column) > 1] or list(range(len(params)))
        return [[row[j] if marks[j] else None for j in kept] for row, marks in zip(rows, there, strict=True)]

    def _private(self, shared: Sequence[Tensor], counts: Sequence[int], idle: Sequence[int]) -> list[int]:
        """Places of the parameters that one loss alone reaches."""
        if self._named is not None or self._habits.undecided or self._habits.acts_on_private:
            return []
        if self._habits.keeps_rows:
            ever = self._reached_ever()
            places = map(self._layout.place, shared)
            counts = [max(n, len(ever.get(place, ()))) for n, place in zip(counts, places, strict=True)]
        return [j for j, n in enumerate(counts) if n < 2 and j not in idle]

    def _told_by_zeros(
        self, there: Sequence[Sequence[int]], found: Tensor, shared: Sequence[Tensor]
    ) -> tuple[Sequence[Sequence[int]], list[tuple[int, int]]]:
        """Decide which losses reach the doubtful parameters.

        Below a join that cannot be read every loss has a gradient in every parameter, of zeros where it does not reach
        it. One that is not zero proves that it does, now and in every later step. A loss that never had any other
        gradient than zero may reach everything.
        """
        names, transaction, doubtful = self._batch.names, self._transaction, self.doubtful(shared)
        signs = self._batch.comm.any_of(found.cpu())
        proofs: dict[str, list[int]] = transaction.memory.get("nonzero", {})
        places = [self._layout.place(shared[j]) for j in doubtful]
        seen = torch.tensor([[j in proofs.get(name, ()) for j in places] for name in names], dtype=torch.bool)
        seen |= signs[:, :-1].bool()
        alive = signs[:, -1].bool() | torch.tensor([name in proofs for name in names])
        if transaction.writable:
            new = {
                name: sorted({*proofs.get(name, ()), *(place for place, mark in zip(places, row, strict=True) if mark)})
                for name, row, lives in zip(names, seen.tolist(), alive.tolist(), strict=True)
                if lives
            }
            if any(new[name] != proofs.get(name) for name in new):
                transaction.memory["nonzero"] = {**proofs, **new}
        if not alive.all():
            self._warn_of_doubt([name for name, lives in zip(names, alive.tolist(), strict=True) if not lives])
        # Where all are zero, the parameter stays shared, so that its gradient is zero and not None.
        reached = seen | ~alive[:, None] | ~seen.any(dim=0)
        marks = [list(row) for row in there]
        for row, known in zip(marks, reached.tolist(), strict=True):
            for j, mark in zip(doubtful, known, strict=True):
                row[j] &= mark
        return marks, [(i, j) for i, row in enumerate(marks) for j in doubtful if not row[j]]

    def _warn_of_doubt(self, names: Sequence[str]) -> None:
        self._transaction.warn_once(
            "doubt",
            f"{self._batch.owner}.backward: the graph does not tell which parameters the losses reach (they are joined "
            "in a compiled region or in a Python function), and the gradients of "
            f"{', '.join(map(repr, names))} are zero so far. They count as reaching all parameters until one is "
            "not zero. To say which parameters are shared, pass `shared_params`, such as model.trunk.parameters().",
        )

    # ----------------------------------------------------------------------------------------------- memory

    def _reached_ever(self) -> dict[int, set[str]]:
        """Which losses have reached each parameter, by its place: a task may be absent, its trunk stays shared."""
        reached: dict[int, set[str]] = {}
        for name, places in self._transaction.memory.get("reached", {}).items():
            for j in places:
                reached.setdefault(j, set()).add(name)
        return reached

    def _remember_reached(self, marks: Sequence[Sequence[int]], shared: Sequence[Tensor]) -> None:
        if not self._transaction.writable:
            return
        names = self._batch.names
        known, ever = self._transaction.memory.get("reached", {}), self._reached_ever()
        places = list(map(self._layout.place, shared))
        # What one loss alone has reached so far is private, and stays so if another one comes in its place.
        reached = [{n for n, mark in zip(names, column, strict=True) if mark} for column in zip(*marks, strict=True)]
        lasting = [
            self._habits.moves_unreached or self._habits.acts_on_private or len(now | ever.get(j, set())) > 1
            for j, now in zip(places, reached, strict=True)
        ]
        for name, row in zip(names, marks, strict=True):
            now = {j for j, mark, kept in zip(places, row, lasting, strict=True) if mark and kept}
            if not now <= set(known.get(name, ())):
                known = {**known, name: sorted(now.union(known.get(name, ())))}
        self._transaction.memory["reached"] = known
