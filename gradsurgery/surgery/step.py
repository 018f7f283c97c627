"""The step of every surgery method: losses → rows → inner products → weights → ``.grad``."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradsurgery import blocks, ghost, shards
from gradsurgery import rows as rows_module
from gradsurgery.call import Call, require_reached
from gradsurgery.gram import Row, Table, precision
from gradsurgery.report import Report
from gradsurgery.surgery import descent, streaming
from gradsurgery.weighting.base import Weighter
from gradsurgery.world import Slices, alike

if TYPE_CHECKING:
    from gradsurgery.surgery.base import Surgery

#: Shared entries below which rows are always formed.
FEW = 100_000


@dataclass
class Found:
    """What the backward passes have found.

    Attributes:
        shared: The shared parameters.
        rows: The gradients over them, (m,). Empty if the processes have slices of them instead.
        terms: Of every other parameter the gradients that reach it, by task; or their sum under the first task.
        peaks: The largest entry of those for each task, m scalars.
        slices: The rows as they are spread over the processes, if they are.
        ghosts: The rows as what they follow from, or a block of the model at a time, if that is cheaper.
        silent: Parameters in the slices that no loss has really reached.
        reaching: Which losses reach a shared parameter, where the rows at hand do not tell, (m,).
        late: The part of the slices that turned out to be private, by task.
    """

    shared: list[Tensor]
    rows: list[Row]
    terms: dict[Tensor, list[tuple[int, Tensor]]]
    peaks: list[Tensor]
    slices: Slices | None = None
    ghosts: ghost.Found | blocks.Found | None = None
    late: Tensor | None = None
    silent: set[Tensor] = field(default_factory=set)
    reaching: list[bool] | None = None


class Step:
    """One call of ``backward``.

    Args:
        method: The surgery.
        call: The call.
    """

    def __init__(self, method: Surgery, call: Call) -> None:
        self.method = method
        self.call = call
        self.names = call.tasks.present
        self.m = len(self.names)
        self.share = 1.0 / self.m if method.reduction == "mean" else 1.0
        self.inner = method.base if isinstance(method.base, Weighter) else None
        self.due = method._due()
        self.observes = method.observes and self.due == "act"
        self.reason = ""

    def report(self) -> Report:
        """Take the step.

        Returns:
            What happened.
        """
        if self.due != "act":
            self.method.flag("reused" if self.due == "reuse" else self.due)
        measured = None if self.inner is None else self.inner.measure(self.call)
        if self.call.kept is None and (self.due != "act" or self.call.features) and not self._reuses_by_rows():
            return self._in_one_pass(measured)
        return streaming.report(self) if self.method.streaming else self._row_by_row(measured)

    def _reuses_by_rows(self) -> bool:
        """Whether a step that reuses weights makes one backward pass a loss all the same."""
        method, call = self.method, self.call
        if self.due != "reuse":
            return False
        shared = method._shared(call.mine, call.graph.masks)
        # Where every loss has a graph of its own one pass a loss does: two passes over all would need them twice.
        apart = call.world is None and not any(call.graph.overlaps) and len(shared) < len(call.mine) + len(call.theirs)
        return apart or bool(self._open(shared))

    def _open(self, shared: list[Tensor]) -> list[Tensor]:
        """Find the shared parameters of which the graph of this call does not tell that two losses reach them."""
        method = self.method
        if method.shared_params is not None:
            return []
        if method.observes:
            ever, position = method._reached_ever(), method._run["positions"]
            shared = [p for p in shared if len(ever.get(position[p], ())) < 2]
        proofs: dict[str, list[int]] = method.memory.get("nonzero", {})
        places = {j: method._run["positions"][shared[j]] for j in self._doubtful(shared)}
        doubtful = {shared[j] for j, place in places.items() if sum(place in seen for seen in proofs.values()) < 2}
        undecided = set(self.call.undecided(shared))
        return [p for p in shared if p in undecided or p in doubtful]

    def settled(self, shared: list[Tensor]) -> list[Tensor]:
        """Take out what only one loss really reaches, before the first pass over all.

        Args:
            shared: What two losses may reach.

        Returns:
            What they do reach. Where the graph does not tell, short passes do.
        """
        if not (left := self._open(shared)):
            return shared
        private = {p for p, n in zip(left, self._marks(left).sum(dim=0).tolist(), strict=True) if n < 2}
        return [p for p in shared if p not in private]

    def _marks(self, params: list[Tensor]) -> Tensor:
        """Which losses reach which parameters, found by short passes, (m, P)."""
        rows = self.call.rows_at(params, whole=False)
        there = [
            [g is not None and (p not in self.call.suspects or bool(g.any())) for p, g in zip(params, row, strict=True)]
            for row in rows
        ]
        marks = torch.tensor(there, dtype=torch.uint8, device="cpu")
        return marks if self.call.world is None else self.call.world.any_of(marks)

    def _is_balanced(self, shared: list[Tensor]) -> bool:
        """Whether two losses reach the parameters that the surgery acts on, before the first pass over all."""
        masks = self.call.graph.masks
        if masks is None and self.due == "reuse":  # the user has named them, and one pass is to be enough
            return bool(shared)
        if masks is not None:
            twice = [p for p in shared if masks[p] & (masks[p] - 1)]
            if len(self.call.undecided(twice)) < len(twice):
                return True
            covered = functools.reduce(operator.or_, (masks[p] for p in shared), 0)
            if not covered & (covered - 1):
                return False
        return bool(shared) and int(self._marks(shared).any(dim=1).sum()) > 1

    def _stopped(self, values: np.ndarray, finite: np.ndarray) -> Report | None:
        method, scaler = self.method, self.call.scaler
        if method._stops(np.isfinite(values), "the value", scaler) or method._stops(finite, "the gradient", scaler):
            return Report(self.names, values, flags=method._run["flags"])
        return None

    # --------------------------------------------------------------------------------------- m backward passes

    def _row_by_row(self, measured: Tensor | None) -> Report:
        method, call, m = self.method, self.call, self.m
        found = self._gather()
        early = None  # what multiplies each loss, where it has to be known before the method sees the rows
        if self.observes:
            if self.inner is not None or method.log_losses:
                early = method._early_coefficients(call.values, measured)
                if (stopped := self._stopped(early, np.ones(m))) is not None:
                    return stopped
                largest = rows_module.largest_factor([*found.shared, *found.terms])
                if method._fitting(early, largest, call.scaler) is None:
                    return Report(self.names, call.values.cpu().numpy(), flags=method._run["flags"])
            self._observe(found, early)

        # Inner products; one transfer to the host.
        named_parts = method._parts(found.shared)
        parts = list(named_parts.values())
        tables = [self._table(found, part) for part in parts]
        alone = [call.values, call.loss_scale, *([] if measured is None else [measured])]
        together = [torch.stack(found.peaks), *map(self._products, tables)]
        if (sent := method._run.pop("numbers", None)) is not None:
            together.append(self._counted(sent, found.shared))
        (values, scale, *more), (peaks, *flat) = self._to_the_host(alone, together)
        columns = None if sent is None else flat.pop().reshape(len(sent), -1)
        if self.observes:
            scale = np.ones(1)
        grams = [table.repaired(g.reshape(len(table), -1)) / scale**2 for table, g in zip(tables, flat, strict=True)]
        count = len(tables[0]) if tables else m
        unit = max((table.unit for table in tables), default=1.0)
        gram = sum(
            (g if table.unit == unit else g * (table.unit / unit) ** 2 for table, g in zip(tables, grams, strict=True)),
            np.zeros((count, count)),
        )
        finite = np.isfinite(peaks) & _each_or_all(np.isfinite(gram.diagonal()), m)
        for numbers in more:
            finite &= np.isfinite(numbers).reshape(m, -1).all(axis=1)
        if (stopped := self._stopped(values, finite)) is not None:
            return stopped

        # Weights. Without a draft of the memory the scaler is to see inf and nan, and to skip this step.
        coefficients = np.ones(m)
        weights = [np.ones(count) for _ in parts]
        promised = [False for _ in parts]
        if method._run["draft"] is not None:
            if early is None:
                coefficients = method._coefficients(values, *more)
            multiplied = None if early is not None or (self.inner is None and not method.log_losses) else coefficients
            seen = method._seen(values, coefficients if early is None else early)
            for k, name in enumerate(named_parts):
                if columns is not None:
                    method._run["measured"] = columns[:, parts[k]].sum(axis=1)
                if self.due == "act":
                    with method._part(name):
                        reaching = found.reaching
                        if call.sharded:
                            reaching = [any(row[j] is not None for j in parts[k]) for row in found.rows[:m]]
                        weights[k] = method._solve_where_reached(
                            tables[k], grams[k], seen, multiplied, 1 / scale, reaching
                        )
                    # A loss that is multiplied by 0 or less takes no part in what the method promises.
                    factors = coefficients if early is None else early
                    promised[k] = method._promises(len(grams[k])) and bool((factors > 0).all())
                elif self.due == "reuse" and (m == 1 or self._count_reaching(found) > 1):
                    weights[k] = np.array([method.memory["last_weights"][name] for name in self.names])
            if not found.shared and m > 1:
                method.flag("nothing-shared")
            if method.every > 1 and self.due == "act":
                self._remember(weights[0] if weights else np.ones(m))
        doubts = [(g, table.unit) if p else None for p, g, table in zip(promised, grams, tables, strict=True)]
        del tables  # no name may hold the rows while they are combined
        return self._write(found, parts, weights, coefficients, early, values, gram, peaks, unit, doubts)

    @staticmethod
    def _count_reaching(found: Found) -> int:
        """How many losses reach the shared parameters."""
        rows = found.rows if found.ghosts is None else found.ghosts.rows
        return sum(found.reaching or [any(g is not None for g in row) for row in rows])

    def _write(
        self,
        found: Found,
        parts: list[list[int]],
        weights: list[np.ndarray],
        coefficients: np.ndarray,
        early: np.ndarray | None,
        values: np.ndarray,
        gram: np.ndarray,
        peaks: np.ndarray,
        unit: float,
        doubts: list[tuple[np.ndarray, float] | None],
    ) -> Report:
        """Combine the rows, and add the result to ``.grad``.

        No loss may rise along the rows whose inner products are in `doubts`, with their unit.
        """
        method, call, share, m = self.method, self.call, self.share, self.m
        if call.world is not None:
            weights = [call.world.first(w, call.values.device) for w in weights]
        total = coefficients if early is None else early
        most = rows_module.largest_factor([*found.shared, *found.terms])
        applied = [share * (w * coefficients if len(w) == m else w) for w in weights]
        if found.ghosts is not None and applied and doubts[0] is not None:
            applied[0] = self._form_where_needed(found, applied[0], doubts[0][0])
        held = [self._held(found, part, w, doubt) for part, w, doubt in zip(parts, applied, doubts, strict=True)]
        # What is held was added up in double precision.
        fitting = [
            method._fitting(w, most, call.scaler) if d is None else d.weights
            for w, d in zip(applied, held, strict=True)
        ]
        applied = [w for w in fitting if w is not None]
        if len(applied) < len(fitting) or method._fitting(share * total, most, call.scaler) is None:
            return Report(self.names, values, flags=method._run["flags"])
        doubtful = self._may_overflow(found, applied, share * total, unit * np.sqrt(gram.diagonal()), peaks)
        if found.slices is not None:
            flat = None if held[0] is None else held[0].flat
            gradients: list[Tensor | None] = list(
                found.slices.direction(applied[0], found.late, share * coefficients, flat)
            )
            gradients = [None if p in found.silent else g for p, g in zip(found.shared, gradients, strict=True)]
        elif found.ghosts is not None and applied:
            combined = dict(zip(found.ghosts.shared, found.ghosts.combine(applied[0].tolist()), strict=True))
            gradients = [combined[p] for p in found.shared]
        else:
            gradients = [None] * len(found.shared)
            for part, w, direction in zip(parts, applied, held, strict=True):
                if direction is not None:
                    self._take(direction, found, part, gradients)
                    continue
                for j in self._combine_small(found, part, w.tolist(), gradients):
                    column = [row[j] for row in found.rows]
                    for row in found.rows:
                        row[j] = None  # freed while consumed: never more than m rows and one parameter
                    gradients[j] = self._direction(column[: len(w)], w.tolist(), found.shared[j])
        plain = []
        for p, terms in found.terms.items():
            plain.append(rows_module.plain([(share * float(total[i]), g) for i, g in terms], shards.empty(p)))
            terms.clear()
        if call.world is not None and not call.sharded:
            plain = call.world_total(plain, list(found.terms))
        targets = [*found.shared, *found.terms]
        sums = [shards.like(g, p) for g, p in zip([*gradients, *plain], targets, strict=True)]
        if method._spoiled(sums if doubtful else [], call.scaler, call.world, doubtful):
            return Report(self.names, values, flags=method._run["flags"])
        rows_module.write(targets, sums)

        same = len(applied) == 1 or self.due != "act"  # in all parts
        uniform = share * total if not applied else applied[0] if same else None
        if uniform is not None and (not method.has_weights or len(uniform) != m):
            uniform = None
        if uniform is not None and applied and early is not None:
            uniform = uniform * early
        engine = "slices" if found.slices is not None else "rows" if found.ghosts is None else found.ghosts.engine
        shown = gram[:m, :m] if found.shared else None
        return Report(
            self.names,
            values,
            uniform,
            shown,
            flags=method._run["flags"],
            engine=engine,
            reason=self.reason or None,
            projections=method._run.get("projections"),
            unit=unit,
        )

    def _may_overflow(
        self, found: Found, applied: list[np.ndarray], total: np.ndarray, lengths: np.ndarray, peaks: np.ndarray
    ) -> bool:
        """Whether the result may be too large for the dtype of a parameter, though every row and weight is in range.

        No entry of a sum is larger than the lengths of its rows together.
        """
        with np.errstate(over="ignore"):
            bounds = [float(np.abs(w) @ lengths[: len(w)]) for w in applied] + [float(np.abs(total) @ peaks)]
        return rows_module.may_overflow(max(bounds), [*found.shared, *found.terms])

    def _form_where_needed(self, found: Found, weights: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """Weights with which ghosts may be added up; where there are none, the rows are formed."""
        ghosts = found.ghosts
        assert ghosts is not None
        if not np.isfinite(weights).all() or descent.is_certain(ghosts, gram, weights):
            return weights
        if (moved := descent.moved_inside(ghosts, gram, weights)) is not None:
            return moved
        self.reason = "rounding could make a loss rise"
        places = {p: place for place, p in enumerate(ghosts.shared)}
        found.rows = [[row[places[p]] for p in found.shared] for row in ghosts.whole()]
        found.ghosts = None
        return weights

    def _held(
        self, found: Found, part: list[int], weights: np.ndarray, doubt: tuple[np.ndarray, float] | None
    ) -> descent.Direction | None:
        """The direction of a part, where rounding could make a loss rise; see :mod:`descent`."""
        method, call = self.method, self.call
        if doubt is None or found.ghosts is not None:
            return None
        params = [self._like(found.shared[j]) for j in part]
        table = self._table(found, part)
        gram, table.unit = doubt
        if found.slices is not None:
            return method._held(table, gram, weights, [found.slices.rows[0]])
        if not call.sharded:
            return method._held(table, gram, weights, params)
        assert call.world is not None
        world = call.world
        counted = [shards.counts_here(found.shared[j], world.rank, world.first_rank) for j in part]
        local = [[row[j] for j in part] for row in found.rows]
        return method._held(table, gram, weights, params, rows=local, counted=counted)

    def _take(
        self, direction: descent.Direction, found: Found, part: list[int], gradients: list[Tensor | None]
    ) -> None:
        """Put the direction of a part where it belongs, and free the rows."""
        scale = self.call.loss_scale if self.observes and self.call.scaler is not None else None
        for j, g in zip(part, direction.split([shards.empty(found.shared[j]) for j in part]), strict=True):
            gradients[j] = g if g is None or scale is None else g * scale.to(g.device, g.dtype)
            for row in found.rows:
                row[j] = None

    def _combine_small(
        self, found: Found, part: list[int], weights: list[float], gradients: list[Tensor | None]
    ) -> list[int]:
        """Add up the rows of many small parameters at once. Returns the places that are left."""
        method = self.method
        if not method.needs_gram_only or self.observes or method._puts_rows_away or self.call.sharded:
            return part
        rows = found.rows[: len(weights)]
        done: set[int] = set()
        for group in rows_module.together([[row[j] for j in part] for row in rows], [found.shared[j] for j in part]):
            places = [part[k] for k in group]
            sums = rows_module.combine_together([[row[j] for j in places] for row in rows], weights)  # type: ignore[misc]
            for j, g in zip(places, sums, strict=True):
                gradients[j] = g
                for row in found.rows:
                    row[j] = None
            done.update(places)
        return [j for j in part if j not in done]

    def _direction(self, column: list[Tensor | None], applied: list[float], p: Tensor) -> Tensor | None:
        method, call = self.method, self.call
        if method._run["draft"] is None or self.due != "act":
            return rows_module.combine(list(map(_complex, column, [p] * len(column))), applied, shards.empty(p))
        if method._puts_rows_away and not method._adds_rows:  # it sees one parameter in full precision at a time
            column = [rows_module.restored(g, p) for g in column]
        g = method.direct(column, applied, self._like(p), self.share)
        if g is not None and p.is_complex() and not method.needs_gram_only:
            g = torch.view_as_complex(g)
        if g is not None and self.observes and call.scaler is not None:
            g = g * call.loss_scale.to(g.device, g.dtype)
        return g

    def _like(self, p: Tensor) -> Tensor:
        """What stands for a parameter before the method: the local piece, and pairs of reals for complex entries."""
        pairs = p.is_complex() and not self.method.needs_gram_only
        if not hasattr(p, "device_mesh") and not pairs:
            return p
        known: dict[Tensor, Tensor] = self.method._run["pieces"]
        if p not in known:
            known[p] = piece = torch.view_as_real(shards.empty(p).detach()) if pairs else shards.empty(p)
            known[piece] = p
            self.method._run["positions"][piece] = self.method._run["positions"][p]
        return known[p]

    def _gather(self) -> Found:
        """Differentiate the losses one by one, or take what micro-batches have left."""
        method, call, m = self.method, self.call, self.m
        kept = call.kept
        masks, mine, theirs = call.graph.masks, call.mine, call.theirs
        if kept is not None:
            masks = kept.masks()
            if call.world is not None:
                masks = call.world.united(masks, [*method.parameters(), *theirs], m)
            mine = [p for p in method.parameters() if p in masks]
            theirs = [p for p in theirs if p in masks]
        shared = method._shared(mine, masks)
        is_shared = set(shared)
        found = Found(shared, [], {p: [] for p in (*mine, *theirs) if p not in is_shared}, [])
        if (plan := self._plan(shared)) is not None and self._gather_ghosts(found, plan):
            return found
        everything = [*shared, *found.terms]
        found.slices = self._slices(shared)
        # Losses that are multiplied later keep their gradients apart.
        apart = self.inner is not None or method.log_losses
        there: list[list[bool]] = []
        doubtful = self._doubtful(shared)
        signs: list[Tensor] = []  # of gradients that are not zero
        reached: list[bool] = []
        for i in range(m):
            if kept is None:
                wanted, gradients = call.differentiate(i, everything)
                row = {p: g for p, g in zip(wanted, gradients, strict=True) if g is not None}
                del gradients
            else:
                row = dict(kept.rows[i])
            row = {p: shards.local(shards.placed(row.pop(p), p)) for p in list(row)} if call.sharded else row
            reached.append(bool(row))
            over_shared = [row.pop(p, None) for p in shared]
            there.append([g is not None for g in over_shared])
            found.peaks.append(rows_module.peak(list(row.values()), call.values.device))
            if doubtful:
                signs.append(self._signs(over_shared, doubtful, found.peaks[i]))
            for p in list(row):
                g = row.pop(p)
                if p not in found.terms:  # frozen between two micro-batches
                    continue
                terms = found.terms[p]
                if terms and not apart:
                    g = rows_module.total(terms.pop()[1], g)
                terms.append((i, g))
                del g
            if method._puts_rows_away and rows_module.store(over_shared, method.row_dtype, method.row_device):
                method.flag("rounded-rows")
            if found.slices is None:
                found.rows.append(over_shared if method.needs_gram_only else list(map(_real, over_shared)))
            else:
                found.slices.send(i, over_shared)
            del over_shared
        if masks is None:
            require_reached(method, reached)
        marks = torch.tensor(there, dtype=torch.uint8, device="cpu").reshape(m, len(shared))
        if call.world is not None and not call.sharded:
            marks = call.world.any_of(marks)
        if doubtful:
            marks = self._told_by_zeros(found, marks, torch.stack(signs), doubtful)
        if self.observes:
            method._remember_reached(marks.tolist(), shared)
        self._find_private(found, marks)
        if call.world is not None and not call.sharded and found.slices is None:
            like = [self._like(p) for p in found.shared]
            for i in range(m):
                found.rows[i] = call.world_total(found.rows[i], like)
        return found

    def _doubtful(self, shared: list[Tensor]) -> list[int]:
        """Places of shared parameters that lie below a join which cannot be read, such as one in a compiled model."""
        if self.method.shared_params is not None or self.m < 2:
            return []
        return [j for j, p in enumerate(shared) if p in self.call.suspects]

    def _signs(self, row: Row, doubtful: list[int], peak: Tensor) -> Tensor:
        """Whether the gradient of one loss is not zero: in each doubtful parameter, and in any parameter at all."""
        device = self.call.values.device
        norms = [rows_module.peak([] if (g := row[j]) is None else [g], device) for j in doubtful]
        rest = rows_module.peak([g for g in row if g is not None], device)
        return (torch.stack([*norms, torch.maximum(rest, peak)]) != 0).to(torch.uint8)

    def _told_by_zeros(self, found: Found, marks: Tensor, signs: Tensor, doubtful: list[int]) -> Tensor:
        """Decide which losses reach the doubtful parameters.

        Below a join that cannot be read every loss has a gradient in every parameter, of zeros where it does not reach
        it. One that is not zero proves that it does, now and in every later step. A loss that never had any other
        gradient than zero may reach everything.
        """
        method = self.method
        signs = signs.cpu() if self.call.world is None else self.call.world.any_of(signs.cpu())
        proofs: dict[str, list[int]] = method.memory.get("nonzero", {})
        places = [method._run["positions"][found.shared[j]] for j in doubtful]
        seen = torch.tensor([[j in proofs.get(name, ()) for j in places] for name in self.names], dtype=torch.bool)
        seen |= signs[:, :-1].bool()
        alive = signs[:, -1].bool() | torch.tensor([name in proofs for name in self.names])
        if method._run["draft"] is not None:
            new = {
                name: sorted({*proofs.get(name, ()), *(place for place, mark in zip(places, row, strict=True) if mark)})
                for name, row, lives in zip(self.names, seen.tolist(), alive.tolist(), strict=True)
                if lives
            }
            if any(new[name] != proofs.get(name) for name in new):
                method.memory["nonzero"] = {**proofs, **new}
        if not alive.all():
            method._warn_of_doubt([name for name, lives in zip(self.names, alive.tolist(), strict=True) if not lives])
        # Where all are zero, the parameter stays shared, so that its gradient is zero and not None.
        reached = seen | ~alive[:, None] | ~seen.any(dim=0)
        marks = marks.clone()
        marks[:, doubtful] &= reached.to(torch.uint8)
        for row, left in zip(found.rows, marks.tolist(), strict=False):
            for j in doubtful:
                if not left[j]:
                    row[j] = None
        return marks

    def _plan(self, shared: list[Tensor]) -> ghost.Plan | blocks.Plan | None:
        """How to do without rows, where the method needs no more than their inner products."""
        method, call = self.method, self.call
        refused = {
            "`row_dtype` and `row_device` put rows away": method._puts_rows_away,
            'engine="rows" was asked for': method.engine == "rows",
            "the method looks at the rows themselves": not method.needs_gram_only,
            "micro-batches are added up row by row": call.kept is not None,
            "several processes share the work": call.world is not None or call.sharded,
            "the graph cannot be read": call.graph.masks is None or bool(self._doubtful(shared)),
            # For so few numbers it takes longer to look than to make the rows.
            f"fewer than {FEW} shared entries": method.engine == "auto" and sum(p.numel() for p in shared) < FEW,
            "a hook at a border would act twice": method.engine == "blocks" and method._run["hooked"],
        }
        self.reason = next((why for why, so in refused.items() if so), "")
        if self.reason:
            return None
        roots = [root for root in call.tasks.roots if root is not None]
        if method.engine == "blocks":
            cut = blocks.plan(roots, shared, call.graph.nodes)
            self.reason = "the model cannot be cut" if cut is None else f"asked for; {len(cut.blocks)} blocks"
            return cut
        plan = ghost.plan(roots, shared, call.graph.nodes, method.engine == "ghosts")
        if plan is None:
            self.reason = "by their shapes all layers are cheaper as rows"
        else:
            spared = sum(plan.shared[place].numel() for place in plan.ghosts) / sum(p.numel() for p in shared)
            self.reason = f"{len(plan.layers)} layers with {spared:.0%} of the shared entries need no rows"
        return plan

    def _gather_ghosts(self, found: Found, plan: ghost.Plan | blocks.Plan) -> bool:
        """Differentiate the losses without the gradients of single losses, or without having them all at once.

        False if that turned out to be impossible; the graph is whole then.
        """
        method, call, plain = self.method, self.call, list(found.terms)
        roots = [root for root in call.tasks.roots if root is not None]
        ghosts: ghost.Found | blocks.Found
        if isinstance(plan, blocks.Plan):
            try:
                single = method.shared_params is not None
                ghosts = plan.differentiate(roots, call.seeds, call.retain[-1], plain, single)
            except blocks.HookedError:
                method._run["hooked"] = True
                self.reason = "a hook at a border would act twice"
                return False
        else:
            # The last loss goes alone, so that it takes three to have two side by side.
            batched = self.m > 2 and plan.is_mostly_ghosts and not method._run["unbatched"] and not plan.is_watched
            ghosts = plan.differentiate(roots, call.seeds, call.retain[-1], plain, batched)
            if batched and plan.trunk is not None and not ghosts.batched:
                method._run["unbatched"] = True
        found.peaks = rows_module.peaks(ghosts.others, call.values.device)
        for i, row in enumerate(ghosts.others):
            for p, g in zip(plain, row, strict=True):
                if g is not None:
                    found.terms[p].append((i, g))
        ghosts.others = []
        found.ghosts = ghosts
        if method.shared_params is not None:
            return True
        private = [place for place, mask in enumerate(ghosts.reached()) if not mask & (mask - 1)]
        for place in private:  # after all; see :meth:`_find_private`
            terms = [(i, g) for i in range(self.m) if (g := ghosts.row(i, place)) is not None]
            for i, g in terms:
                found.peaks[i] = torch.maximum(found.peaks[i], rows_module.peak([g], call.values.device))
            found.terms[plan.shared[place]] = terms
        ghosts.drop(private)
        found.shared = [p for p in found.shared if p not in found.terms]
        return True

    def _find_private(self, found: Found, marks: Tensor) -> None:
        """Take out of the rows what only one loss really reaches.

        The walk over the graph sees what may be reached. A node with several outputs may pass nothing on.
        """
        method = self.method
        there = marks.sum(dim=0).tolist()
        found.silent = {p for p, n in zip(found.shared, there, strict=True) if not n}
        # A method that keeps rows has averages there, and leaves them where they are.
        if method.observes and not method.moves_unreached and found.silent:
            kept = [j for j, n in enumerate(there) if n]
            found.rows = [[row[j] for j in kept] for row in found.rows]
            found.shared, there = [found.shared[j] for j in kept], [there[j] for j in kept]
        if method.shared_params is not None or method._undecided():
            found.reaching = None if found.slices is None else marks.any(dim=1).tolist()
            if found.slices is not None:
                found.slices.wait()
            return
        if method.observes:
            ever = method._reached_ever()
            positions = method._run["positions"]
            there = [max(n, len(ever.get(positions[p], ()))) for p, n in zip(found.shared, there, strict=True)]
        private = [j for j, n in enumerate(there) if n < 2]
        if found.slices is not None:
            left = [j for j in range(len(found.shared)) if j not in set(private)]
            found.reaching = marks[:, left].any(dim=1).tolist()
            found.slices.wait()
            found.late = found.slices.take_out(private) if private else None
            return
        device = self.call.values.device
        for j in reversed(private):
            p = found.shared[j]
            terms = [(i, g) for i, row in enumerate(found.rows) if (g := _complex(row.pop(j), p)) is not None]
            if method._puts_rows_away:
                terms = [(i, g) for i, row in terms if (g := rows_module.restored(row, p)) is not None]
            for i, g in terms:
                found.peaks[i] = torch.maximum(found.peaks[i], rows_module.peak([g], device))
            found.terms[found.shared.pop(j)] = terms

    def _slices(self, shared: list[Tensor]) -> Slices | None:
        """Spread the rows over the processes, if the method needs no more than their inner products."""
        world, method = self.call.world, self.method
        if world is None or self.call.sharded or not shared or not alike(shared) or not method.needs_gram_only:
            return None
        return Slices(world, shared, self.m)

    def _observe(self, found: Found, early: np.ndarray | None) -> None:
        """Let the method replace the rows."""
        method, call = self.method, self.call
        loss_scale = None if call.scaler is None else call.loss_scale
        method._run["factors"] = early
        for i, row in enumerate(found.rows):
            method._unscale(row, loss_scale, 1.0 if early is None else float(early[i]))
        if method._run["draft"] is not None:
            like = [self._like(p) for p in found.shared]
            seen = call.values
            if method.log_losses:
                seen = seen.log()
            elif early is not None:
                seen = seen * torch.from_numpy(early).to(seen.device)
            found.rows = method.observe(found.rows, list(seen.unbind()), like)

    def _table(self, found: Found, part: list[int]) -> Table:
        call = self.call
        if found.ghosts is not None:
            return found.ghosts
        if found.slices is not None:
            assert call.world is not None
            return Table(found.slices.rows, call.world)
        rows = [[row[j] for j in part] for row in found.rows]
        if not call.sharded:
            return Table(rows)
        assert call.world is not None
        params = [found.shared[j] for j in part]
        return Table(
            [shards.pieces(row, params, call.world.rank, call.world.first_rank) for row in rows],
            call.world,
            precision([[shards.empty(p) for p in params]]),
        )

    def _counted(self, numbers: Tensor, shared: list[Tensor]) -> Tensor:
        """Numbers of a parameter's columns, without those that another process counts."""
        if self.call.world is None:
            return numbers
        rank, first = self.call.world.rank, self.call.world.first_rank
        counts = [shards.counts_here(p, rank, first) if self.call.sharded else rank == 0 for p in shared]
        return torch.where(torch.tensor(counts, device=numbers.device), numbers, 0)

    def _products(self, table: Table) -> Tensor:
        """What this process adds to the inner products: of rows that all have whole, only the first one's count."""
        if self.call.world is not None and self.call.world.rank and table.world is None:
            return torch.zeros(len(table), len(table), dtype=torch.float64)
        return table.products()

    def _to_the_host(self, alone: list[Tensor], together: list[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Bring numbers to the host at once; those in the second list are added up over the processes before."""
        world, device = self.call.world, self.call.values.device
        if world is not None and together:
            sizes = [x.numel() for x in together]
            flat = torch.cat([x.reshape(-1).to(device, torch.float64) for x in together])
            together = list(world.total(flat.to(world.device(device))).to(device).split(sizes))
        numbers = rows_module.host([*alone, *together])
        return numbers[: len(alone)], numbers[len(alone) :]

    # ------------------------------------------------------------------------------------- one backward pass

    def _in_one_pass(self, measured: Tensor | None) -> Report:
        """A step whose weights are known before the parameters are reached.

        One more pass serves the private ones.
        """
        method, call, m, acts = self.method, self.call, self.m, self.due == "act"
        shared = method._shared(call.mine, call.graph.masks)
        if acts:
            shared = self.settled(shared)
        if m > 1 and self.due != "warmup" and not self._is_balanced(shared):
            shared, acts = [], False
            method.flag("nothing-shared")
        is_shared = set(shared)
        plain = [*(p for p in call.mine if p not in is_shared), *call.theirs]
        # Rows at the features instead of the parameters.
        rows = list(call.rows_at(call.features, whole=False)) if acts else []
        for name, row in zip(self.names, rows, strict=False):
            if all(g is None for g in row) and call.world is None:
                raise RuntimeError(f"{method._name}.backward: loss {name!r} does not reach `features`.")
        table = Table(rows, call.world)
        alone = [call.values, call.loss_scale, *([] if measured is None else [measured])]
        (values, scale, *more), flat = self._to_the_host(alone, [table.products()] if acts else [])
        gram = table.repaired(flat[0].reshape(m, m)) / scale**2 if acts else np.ones((m, m))
        finite = np.isfinite(gram.diagonal())
        for numbers in more:
            finite = finite & np.isfinite(numbers).reshape(m, -1).all(axis=1)
        if (stopped := self._stopped(values, finite)) is not None:
            return stopped
        coefficients = weights = np.ones(m)
        if method._run["draft"] is not None:
            coefficients = method._coefficients(values, *more)
            if acts:
                weights = method._solve(table, gram, method._seen(values, coefficients), coefficients, 1 / scale)
            elif self.due == "reuse" and shared:
                weights = np.array([method.memory["last_weights"][name] for name in self.names])
            if self.due == "act" and method.every > 1:
                self._remember(weights)
        if call.world is not None:
            weights = call.world.first(weights, call.values.device)
        applied = method._fitting(self.share * weights * coefficients, call.largest_weights, call.scaler, call.world)
        if applied is None:
            return Report(self.names, values, flags=method._run["flags"])
        if (weights == 1.0).all():
            gradients = call.one_pass(applied, [*shared, *plain], last=True)
        else:
            gradients = call.one_pass(applied, shared, last=not plain)
            gradients += call.one_pass(self.share * coefficients, plain, last=True)
        if not method._spoiled(gradients, call.scaler, call.world):
            rows_module.write([*shared, *plain], gradients)
        return Report(
            self.names,
            values,
            applied,
            gram if acts else None,
            flags=method._run["flags"],
            engine="one pass",
            unit=table.unit,
        )

    def _remember(self, weights: np.ndarray) -> None:
        """Keep the weights for the steps that reuse them."""
        self.method.memory["last_weights"] = dict(zip(self.names, map(float, weights), strict=True))


def _real(g: Tensor | None) -> Tensor | None:
    """Complex entries as pairs of reals, for the methods that look at entries."""
    return (
        torch.view_as_real((g.to_dense() if g.is_sparse else g).resolve_conj())
        if g is not None and g.is_complex()
        else g
    )


def _complex(g: Tensor | None, p: Tensor) -> Tensor | None:
    return torch.view_as_complex(g) if g is not None and p.is_complex() and not g.is_complex() else g


def _each_or_all(finite: np.ndarray, m: int) -> np.ndarray:
    """Finiteness by task, where there is one row a task; otherwise of all together."""
    return finite if len(finite) == m else np.full(m, finite.all())
