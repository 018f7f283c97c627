"""What one call of ``backward`` knows before anything is differentiated: its losses, their graph, their parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import losses as losses_module
from gradsurgery.communication import Communicator
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.accumulated import Accumulated
from gradsurgery.gradients.gram import Row
from gradsurgery.gradients.rows import parameters as parameters
from gradsurgery.graph import Graph, Root, Start, undecided, walk
from gradsurgery.graph.samples import Samples, grouped, traced, vector_of
from gradsurgery.losses import Tasks
from gradsurgery.settings import Settings
from gradsurgery.transaction import Transaction

#: Losses from which ``engine="auto"`` looks for one per sample.
FEWEST = 16


class Arguments(NamedTuple):
    """What ``backward`` was given besides the losses; see :meth:`gradsurgery.optimizer.MultiLossOptimizer.backward`.

    Attributes:
        accumulate: As there, as for all that follow.
        batch_size: As there.
        scaler: As there.
        retain_graph: As there.
        others: As there, checked.
        features: As there, checked; empty if there are none.
        residuals: As there.
        per_sample: What is wanted of one loss per sample: "" for nothing, "auto", "choose", "keep" or "rerun".
    """

    accumulate: bool
    batch_size: float | Mapping[str, float] | None
    scaler: torch.amp.GradScaler | None
    retain_graph: bool
    others: Sequence[Optimizer]
    features: tuple[Tensor, ...]
    residuals: Mapping[str, Tensor] | Iterable[Tensor] | None
    per_sample: str = ""


class Layout:
    """The parameters of an optimizer by their places, which last.

    Frozen parameters count too, so that freezing one does not exchange what is kept for the others.

    Args:
        groups: Parameters, group by group.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._groups = groups
        self._wholes: dict[Tensor, Tensor] = {}
        self._pieces: dict[Tensor, Tensor] = {}

    @cached_property
    def groups(self) -> dict[Tensor, int]:
        """The parameter group of each parameter.

        Returns:
            Its number.
        """
        return {p: k for k, params in enumerate(self._groups) for p in params}

    @cached_property
    def places(self) -> dict[Tensor, int]:
        """The place of each parameter, and of what stands for one.

        Returns:
            Numbers.
        """
        return {p: j for j, p in enumerate(self.groups)}

    def place(self, p: Tensor) -> int:
        """The place of a parameter.

        Args:
            p: The parameter, or what stands for it.

        Returns:
            Its place among all.
        """
        return self.places[p]

    def stand_in(self, p: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Let something stand for a parameter before a method.

        Args:
            p: The parameter.
            make: Makes what stands for it.

        Returns:
            The same in every call.
        """
        if p not in self._pieces:
            self._pieces[p] = piece = make()
            self.places[piece], self._wholes[piece] = self.places[p], p
        return self._pieces[p]

    def whole(self, p: Tensor) -> Tensor:
        """The parameter that something stands for.

        Args:
            p: The parameter, or what stands for it.

        Returns:
            The parameter.
        """
        return self._wholes.get(p, p)


@dataclass
class Batch:
    """The losses of one call of ``backward``, as the steps of the methods see them.

    Attributes:
        owner: The class that errors should name.
        params: Its trainable parameters.
        tasks: The losses.
        names: Their names, (m,).
        values: Their values, (m,), float64; over the whole batch, where it is spread over processes.
        graph: What the walk over their graph has found.
        owned: The parameters of this optimizer that the losses may reach.
        foreign: Those of the other optimizers.
        masks: For every parameter a bit mask of the losses that may reach it, on any process; None if unknown.
        scale: What autograd's gradients are multiplied by, a scalar; None: 1.
        starts: What each backward pass starts from, m scalars: the loss scale times the share of this process. None: 1.
        retain: For each loss, whether its graph has to outlive its own backward pass, (m,).
        retain_graph: Whether the graph has to outlive the last pass.
        comm: The processes that share the work.
        scaler: The gradient scaler, or None.
        features: The shared representation; empty if the rows are those of the parameters.
        residuals: What the user gave as `residuals`.
        accumulate: More micro-batches follow.
        accumulated: Gradients of earlier micro-batches and of this one; None if nothing is accumulated.
        samples: One loss per sample, and whose the entries of the graph are; None where that is not asked for.
        per_sample: As in `Arguments`.
        unsampled: Why there are no samples although they were looked for; empty if they were not.
    """

    owner: str
    params: list[Tensor]
    tasks: Tasks
    names: tuple[str, ...]
    values: Tensor
    graph: Graph
    owned: list[Tensor]
    foreign: list[Tensor]
    masks: dict[Tensor, int] | None
    scale: Tensor | None
    starts: list[Tensor] | None
    retain: list[bool]
    retain_graph: bool
    comm: Communicator
    scaler: torch.amp.GradScaler | None
    features: tuple[Tensor, ...] = ()
    residuals: Mapping[str, Tensor] | Iterable[Tensor] | None = None
    accumulate: bool = False
    accumulated: Accumulated | None = None
    samples: Samples | None = None
    per_sample: str = ""
    unsampled: str = ""

    @cached_property
    def seeds(self) -> list[Tensor]:
        """What each backward pass starts from, m scalars, which a hook may change in place.

        Returns:
            Scalars of the dtypes and on the devices of the losses.
        """
        return rows_module.seeds(self.tasks.tensors, None) if self.starts is None else self.starts

    @cached_property
    def loss_scale(self) -> Tensor:
        """What autograd's gradients are multiplied by.

        Returns:
            A scalar.
        """
        return torch.ones((), device=self.values.device) if self.scale is None else self.scale

    @property
    def roots(self) -> list[Root]:
        """Where the losses that this process has are differentiated from."""
        return [root for root in self.tasks.roots if root is not None]

    @property
    def is_scaled(self) -> bool:
        """Whether a gradient scaler will look for inf and nan."""
        return self.scaler is not None and self.scaler.is_enabled()

    @property
    def is_unscaled(self) -> bool:
        """Whether no gradient scaler had a part in its gradients, so that the loss scale is 1."""
        return self.scaler is None and self.accumulated is None

    @cached_property
    def leaves(self) -> list[Tensor]:
        """Everything that an ordinary backward pass may write to, as far as it is known.

        Returns:
            Leaves.
        """
        return list(dict.fromkeys([*self.owned, *self.foreign, *self.graph.leaves]))

    @property
    def suspects(self) -> frozenset[Tensor]:
        """Parameters of which the graph does not tell which losses reach them: zeros in their gradients must decide."""
        if self.accumulated is not None:
            return self.accumulated.suspects
        return frozenset((*self.owned, *self.foreign)) if self.graph.unread else self.graph.suspects

    # ---------------------------------------------------------------------------------- backward passes

    def rows(self, params: Sequence[Tensor], order: Iterable[int] | None = None) -> Iterator[tuple[int, Row]]:
        """Find the gradient of each loss, or take what micro-batches have left. Graphs are freed early.

        Args:
            params: The parameters.
            order: In which order the losses come; by default their own.

        Yields:
            Which loss, and its gradients on this process, one entry per parameter.
        """
        # Without joins autograd tells what a loss does not reach.
        masks = self.graph.masks if self.graph.joins else None
        bits = None if masks is None else [masks.get(p, 0) for p in params]
        for i in range(len(self.tasks.roots)) if order is None else order:
            yield i, self._row(i, params, bits)

    def _row(self, i: int, params: Sequence[Tensor], bits: Sequence[int] | None) -> Row:
        root = self.tasks.roots[i]
        if self.accumulated is not None:
            kept = self.accumulated.rows[i]
            return [kept.get(p) for p in params]
        if root is None:
            return [None] * len(params)
        if self.graph.hidden:
            with rows_module.emptied(self.leaves):
                row = rows_module.gradient_by_backward(root, self.leaves, self.seeds[i], self.retain[i])
            found = dict(zip(self.leaves, row, strict=True))
            return [found[p] for p in params]
        if bits is None:
            return rows_module.gradient(root, params, self.seeds[i], self.retain[i])
        places = [j for j, mask in enumerate(bits) if mask >> i & 1]
        entries: Row = [None] * len(params)
        for j, g in zip(
            places, rows_module.gradient(root, [params[j] for j in places], self.seeds[i], self.retain[i]), strict=True
        ):
            entries[j] = g
        return entries

    def rows_at(self, params: Sequence[Tensor], whole: bool = True) -> Iterator[list[Tensor | None]]:
        """Find the gradient of each loss at some parameters, and keep the graph.

        Args:
            params: The parameters, or `features`.
            whole: Exchange with the other processes.

        Yields:
            One row per loss, multiplied by the loss scale. Over the whole batch, if so wanted: parameters have a sum
            over the processes then, and features a row for each of them, one behind the other.

        Raises:
            RuntimeError: A graph hides its parameters, or all of these are frozen.
        """
        exchange = self.comm.joined if self.features else self.comm.totals
        for row in self._rows_here(params):
            yield exchange(row, params) if whole or self.accumulated is not None else row

    def _rows_here(self, params: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
        if self.accumulated is not None:
            yield from ([found.get(p) for p in params] for found in self.accumulated.rows)
            return
        if self.graph.hidden or self.comm.is_sharded:
            raise RuntimeError(
                f"{self.owner}.backward: gradients at some parameters only cannot be found under reentrant activation "
                "checkpointing or fully_shard. Use use_reentrant=False, or a method that measures no gradients."
            )
        trained = [j for j, p in enumerate(params) if p.requires_grad]
        if not trained:
            raise RuntimeError(
                f"{self.owner}.backward: all parameters at which gradients are to be measured are frozen. Name others, "
                "or unfreeze one."
            )
        for root, seed in zip(self.tasks.roots, self.seeds, strict=True):
            if self.features and isinstance(root, Start):  # these may lie above a join
                root = root.loss
            row: list[Tensor | None] = [None] * len(params)
            if root is not None:
                new = rows_module.gradient(root, [params[j] for j in trained], seed, retain_graph=True)
                for j, g in zip(trained, new, strict=True):
                    row[j] = g
            yield row

    def one_pass(self, weights: np.ndarray | Tensor, params: Sequence[Tensor], last: bool) -> list[Tensor | None]:
        """Differentiate Σ wᵢ lᵢ in one backward pass.

        Args:
            weights: w, (m,).
            params: What to differentiate with respect to.
            last: No other pass follows.

        Returns:
            The gradients, multiplied by the loss scale, over the whole batch.
        """
        if not params:
            return []
        used = [i for i, root in enumerate(self.tasks.roots) if root is not None]
        # A tensor stays where it is: all losses are there then.
        if isinstance(weights, Tensor) or self.starts is not None:
            starts = [self.seeds[i] for i in used]
            starts = rows_module.multiplied(starts, weights if isinstance(weights, Tensor) else weights[used].tolist())
        else:
            starts = rows_module.weighted([self.tasks.tensors[i] for i in used], weights[used])
        engine = "backward" if self.graph.hidden else "accumulate" if self.comm.in_place else "grad"
        leaves = list(dict.fromkeys([*params, *self.leaves])) if engine == "backward" else list(params)
        # All of them: DistributedDataParallel may write to parameters that this pass does not reach.
        touched = list({id(p): p for p in (*leaves, *self.owned, *self.foreign)}.values())
        with rows_module.emptied(touched):
            found = rows_module.one_pass(self.roots, starts, leaves, self.retain_graph or not last, engine)
        return self.comm.totals(found[: len(params)], params)

    @cached_property
    def _told_by_graph(self) -> tuple[dict[Tensor, int], set[Tensor]]:
        """Which losses surely reach each parameter, and the parameters of which that is open."""
        return undecided(self.tasks.roots, self.graph.nodes)

    def undecided(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Find the parameters of which the graph does not tell whether two losses reach them, or one alone.

        Args:
            params: The parameters that two losses may reach, the same on all processes.

        Returns:
            Those of them.
        """
        masks = self.graph.masks
        if masks is None or not params:
            return list(params)
        certain, unsure = self._told_by_graph
        marks = [[(certain.get(p, 0) & masks.get(p, 0)) >> i & 1 for p in params] for i in range(len(self.names))]
        found = self.comm.any_of(torch.tensor([*marks, [p in unsure for p in params]], dtype=torch.uint8, device="cpu"))
        counts, open_marks = found[:-1].sum(dim=0).tolist(), found[-1].tolist()
        return [p for p, n, mark in zip(params, counts, open_marks, strict=True) if mark and n < 2]

    def largest_weights(self) -> np.ndarray:
        """What each loss can be multiplied by.

        Returns:
            The largest number of its dtype, or of kept gradients, (m,).
        """
        if self.accumulated is not None:
            return np.full(len(self.names), rows_module.largest_factor([*self.owned, *self.foreign]))
        return np.array([torch.finfo(t.dtype).max for t in self.tasks.tensors])


# ------------------------------------------------------------------------------------------- how it is read


class Reading(NamedTuple):
    """Who reads the losses.

    Attributes:
        owner: The class that errors should name.
        params: Its trainable parameters.
        settings: Its switches.
        transaction: Its memory.
        comm: The processes that share the work.
        arguments: What ``backward`` was given.
        unsampled: Why samples are not looked for any more.
    """

    owner: str
    params: list[Tensor]
    settings: Settings
    transaction: Transaction
    comm: Communicator
    arguments: Arguments
    unsampled: str = ""

    def read(self, tasks: Tasks) -> Batch | None:
        """Look at the losses and their graph, and add what was accumulated.

        Args:
            tasks: The losses.

        Returns:
            The batch; None if no loss is left.
        """
        given, transaction = self.arguments, self.transaction
        device = tasks.tensors[0].device if tasks.tensors else self.params[0].device
        here = losses_module.values(tasks.tensors, device)
        count = len(tasks.present)
        values, shares = here, None
        if not self.comm.is_alone:
            tasks, values, shares = self._agreed(tasks, here)
        if self.settings.nonfinite == "drop":
            tasks, values, shares = self._finite(tasks, values, shares)
            if not tasks.present and (given.accumulate or transaction.accumulated is None):
                return None
        transaction.present = tasks.present
        samples, unsampled = self._samples(tasks, len(tasks.present) < count) if given.per_sample else (None, "")
        graph, owned, foreign = self._reached(tasks, samples)
        if graph.roots:
            tasks = tasks._replace(roots=graph.roots)
        comm = self.comm.over(owned)
        if comm.is_sharded:
            self._require_everywhere(tasks)
            self._require_exchanged(owned, float(here.nan_to_num().sum()))
        scale, starts = None, None
        if given.scaler is not None or shares is not None or transaction.accumulated is not None:
            scale, starts = self._starts(tasks, comm, shares)
        # A compiled backward that first ran without retain_graph refuses to run with it later. Where steps of both
        # kinds follow each other all retain, and the references are dropped instead.
        cadence = self.settings.has_cadence
        overlaps = graph.overlaps if cadence else graph.overlaps_later
        retain = [given.retain_graph or overlap for overlap in overlaps]
        batch = Batch(
            self.owner, self.params, tasks, tasks.present, values, graph, owned, foreign, graph.masks, scale,
            starts, retain, given.retain_graph or (cadence and any(graph.overlaps)),
            comm, given.scaler, given.features, given.residuals, given.accumulate, None,
            samples, given.per_sample, unsampled,
        )  # fmt: skip
        for root in tasks.roots if graph.joins else ():
            if isinstance(root, Start) and root.together is not None:
                root.together.seeds, root.together.retain = batch.seeds, retain
        if given.accumulate or transaction.accumulated is not None:
            return self._accumulated(batch)
        return batch

    def _starts(self, tasks: Tasks, comm: Communicator, shares: np.ndarray | None) -> tuple[Tensor, list[Tensor]]:
        """The loss scale, and what each backward pass starts from."""
        seeds = rows_module.seeds(tasks.tensors, self.arguments.scaler)
        if seeds:
            scale = seeds[0]
        else:
            assert self.transaction.accumulated is not None
            scale = self.transaction.accumulated.loss_scale
        if shares is not None:
            # Gradients of sharded parameters come back as means over the processes, all others as parts of a sum.
            factor = comm.size if comm.is_sharded else 1
            seeds = [seed * float(share * factor) for seed, share in zip(seeds, shares, strict=True)]
        return scale, seeds

    def _agreed(self, tasks: Tasks, values: Tensor) -> tuple[Tasks, Tensor, np.ndarray]:
        """The losses that any process has, their values over the whole batch, and the shares of this process."""
        given, accumulated = self.arguments, self.transaction.accumulated

        def kind() -> str:
            trainable = [*self.params, *(p for other in given.others for p in parameters(other))]
            shapes = zlib.crc32(str([tuple(p.shape) for p in trainable]).encode())
            step = self.transaction.memory["step"]
            return (
                f"{self.owner} accumulate={given.accumulate} features={bool(given.features)} step={step} "
                f"parameters={len(trainable)}:{shapes:08x}"
            )

        there, values, shares = self.comm.agree(
            tasks.names, tasks.present, values, given.batch_size, kind, accumulated is not None
        )
        assert shares is not None
        mine = dict(zip(tasks.present, zip(tasks.tensors, tasks.roots, strict=True), strict=True))
        absent = (torch.zeros((), device=tasks.tensors[0].device if tasks.tensors else self.params[0].device), None)
        names = tuple(tasks.names[i] for i in there)
        found = [mine[name] if share else absent for name, share in zip(names, shares, strict=True)]
        return Tasks(tasks.names, names, tuple(t for t, _ in found), tuple(r for _, r in found)), values, shares

    def _finite(
        self, tasks: Tasks, values: Tensor, shares: np.ndarray | None
    ) -> tuple[Tasks, Tensor, np.ndarray | None]:
        """Leave out losses whose value is not finite."""
        finite, scaler = torch.isfinite(values).tolist(), self.arguments.scaler
        # With nothing left a scaler is to see the values in .grad, and to skip the step.
        if all(finite) or (scaler is not None and scaler.is_enabled() and not any(finite)):
            return tasks, values, shares
        self.transaction.flag("dropped")
        keep = [i for i, ok in enumerate(finite) if ok]
        return tasks.only(keep), values[keep], None if shares is None else shares[keep]

    def _samples(self, tasks: Tasks, dropped: bool) -> tuple[Samples | None, str]:
        """One loss per sample, if that is wanted and there; else why not."""
        given = self.arguments
        if self.unsampled:
            return None, self.unsampled
        if dropped:
            return None, "a loss was dropped, and the others are no longer one per sample"
        found: Samples | str = "gradients of earlier micro-batches wait, and samples must be of one whole batch"
        if self.transaction.accumulated is None:
            found = samples_of(tasks.tensors, given.per_sample == "auto", self.comm.is_alone)
        if isinstance(found, str):
            if given.per_sample != "auto":
                raise RuntimeError(f"{self.owner}.backward: per_sample={shown_mode(given.per_sample)}: {found}.")
            return None, found
        return found, ""

    def _reached(self, tasks: Tasks, samples: Samples | None) -> tuple[Graph, list[Tensor], list[Tensor]]:
        """Walk over the graph. Returns what was found, the owned parameters that may be reached, and foreign ones."""
        others: list[Tensor] = []
        if self.arguments.others:
            others = list(dict.fromkeys(p for other in self.arguments.others for p in parameters(other)))
        graph = walk(tasks.roots) if samples is None else samples.graph(len(tasks.present))
        if not self.comm.is_alone:
            graph = self._walked(graph, tasks, others)
        own = set(self.params) if others else set()
        if graph.masks is None:
            return graph, self.params, [p for p in others if p not in own]
        masks = graph.masks
        owned = [p for p in self.params if p in masks]
        foreign = [p for p in others if p in masks and p not in own]
        covered = 0
        if len(masks) == len(owned) + len(foreign):  # as almost always
            for mask in masks.values():
                covered |= mask
        else:
            for p in (*owned, *foreign):
                covered |= masks[p]
        strangers: list[Tensor] = []
        if len(masks) > len(owned) + len(foreign):
            known = {*self.params, *foreign}
            strangers = [p for p in masks if isinstance(p, torch.nn.Parameter) and p not in known]
        if covered + 1 != 1 << len(tasks.present):
            reached = {name: bool(covered >> i & 1) for i, name in enumerate(tasks.present)}
            require_reached(self.owner, self.params, reached, strangers)
        if strangers:
            self.transaction.warn_once(
                "strangers",
                f"{self.owner}.backward: the losses reach {len(strangers)} parameter(s) outside the "
                f"optimizer (the first has shape {tuple(strangers[0].shape)}). They get no gradient. If another "
                "optimizer should step them, pass it in `other_optimizers`; if they are not to be trained here, as the "
                "other network of a GAN, freeze them with requires_grad_(False) or ignore this.",
            )
        return graph, owned, foreign

    def _walked(self, graph: Graph, tasks: Tasks, others: Sequence[Tensor]) -> Graph:
        """What the graphs of all processes tell."""
        comm = self.comm
        sharded = comm.over(self.params).is_sharded
        # fully_shard differentiates with respect to tensors of its own.
        if (
            graph.masks is not None
            and sharded
            and any(hasattr(p, "device_mesh") and p not in graph.masks for p in self.params)
        ):
            graph = graph._replace(hidden=True, masks=None, nodes={})
        own_marks = [graph.hidden, graph.masks is None, graph.unread]
        marks = torch.tensor(own_marks, dtype=torch.uint8, device="cpu")
        hidden, unknown, unread = map(bool, comm.any_of(marks).tolist())  # all processes take the same road
        if hidden and not sharded:
            raise RuntimeError(
                f"{self.owner}.backward: the losses go through torch.utils.checkpoint with use_reentrant=True, which "
                "takes ordinary backward passes, and DistributedDataParallel reduces the first of them only. Pass "
                "use_reentrant=False."
            )
        if unknown or graph.masks is None:
            return graph._replace(hidden=hidden, masks=None, nodes={}, unread=unread)
        m = len(tasks.present)
        told = {p: mask | (p in graph.suspects) << m for p, mask in graph.masks.items()}
        told = comm.united(told, [*self.params, *others], m + 1)
        masks = {p: mask & ~(1 << m) for p, mask in told.items()}
        return graph._replace(masks=masks, suspects=frozenset(p for p, mask in told.items() if mask >> m))

    def _accumulated(self, batch: Batch) -> Batch:
        """Add the gradients of this micro-batch to those before."""
        if batch.features or batch.residuals is not None:
            raise ValueError(
                f"{self.owner}.backward: `features` and `residuals` have no meaning for gradients that are "
                "accumulated over micro-batches."
            )
        everything = [*batch.owned, *batch.foreign]
        new = Accumulated.collect(batch, everything)
        if batch.graph.masks is None and self.comm.is_alone:
            reached = [bool(row) for row in new.rows]
            require_reached(self.owner, self.params, dict(zip(batch.names, reached, strict=True)))
        before = self.transaction.accumulated
        found = new if before is None else before.plus(new)
        batch.accumulated, batch.foreign = found, list(found.foreign)
        if batch.accumulate:
            return batch
        found = found.in_order([*batch.tasks.names, *found.present])
        m = len(found.present)
        tasks = Tasks(batch.tasks.names, found.present, tuple(found.values.unbind()), (None,) * m)
        self.transaction.present = found.present
        masks = self.comm.united(found.masks(), [*self.params, *batch.foreign], m)
        return replace(
            batch,
            tasks=tasks,
            names=tasks.present,
            values=found.values,
            accumulated=found,
            owned=[p for p in self.params if p in masks],
            foreign=[p for p in found.foreign if p in masks],
            masks=masks,
        )

    def _require_everywhere(self, tasks: Tasks) -> None:
        """Every backward pass of sharded parameters is a collective, which all processes have to join."""
        absent = self.comm.any_of(torch.tensor([root is None for root in tasks.roots], dtype=torch.uint8)).tolist()
        missing = [name for name, mark in zip(tasks.present, absent, strict=True) if mark]
        if missing:
            raise RuntimeError(
                f"{self.owner}.backward: with sharded parameters every process must have every loss, and {missing} "
                "is absent on one process. Give it a loss of no samples, such as 0.0 * output.sum(), and its "
                "`batch_size`, or use DistributedDataParallel."
            )

    def _require_exchanged(self, owned: Sequence[Tensor], total: float) -> None:
        """Next to sharded parameters, plain ones are right only where every process has the same batch.

        That is the case under a tensor-parallel plan. Under fully_shard each has its own, and what lies outside of it
        is left with the gradient of one process.
        """
        loose = [p for p in owned if not hasattr(p, "device_mesh")]
        if loose and not self.comm.is_same(total):
            raise RuntimeError(
                f"{self.owner}.backward: {len(loose)} parameters of the optimizer (the first has shape "
                f"{tuple(loose[0].shape)}) lie outside of fully_shard, while the processes have different batches: "
                "nobody would add up their gradients. Shard the whole model, fully_shard(model), after its parts."
            )


def arguments(
    owner: str,
    accumulate: bool,
    batch_size: float | Mapping[str, float] | None,
    scaler: torch.amp.GradScaler | None,
    retain_graph: bool,
    others: Optimizer | Iterable[Optimizer],
    features: Tensor | Sequence[Tensor] | None,
    residuals: Mapping[str, Tensor] | Iterable[Tensor] | None,
    per_sample: str = "",
) -> Arguments:
    """Check what ``backward`` was given besides the losses.

    Args:
        owner: The class that errors should name.
        accumulate: See :meth:`gradsurgery.optimizer.MultiLossOptimizer.backward`, as for all that follow.
        batch_size: As there.
        scaler: As there.
        retain_graph: As there.
        others: As there.
        features: As there.
        residuals: As there.
        per_sample: What is wanted of one loss per sample.

    Returns:
        The same.

    Raises:
        TypeError: One is of a wrong kind.
        ValueError: `per_sample` is given together with what excludes it.
    """
    found = list(others) if isinstance(others, Iterable) else [others]
    for other in found:
        if not isinstance(other, Optimizer):
            raise TypeError(
                f"{owner}.backward: `other_optimizers` must be optimizers, one or several, got {type(other).__name__}. "
                "To leave parameters out of the surgery, name the shared ones in `shared_params`."
            )
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(
            f"{owner}.backward: `scaler` must be a gradient scaler, such as torch.amp.GradScaler, or None, got "
            f"{scaler!r}."
        )
    at = () if features is None else representation(owner, features)
    if per_sample != "auto" and per_sample:
        others_of_it = {"accumulate": accumulate, "features": bool(at), "residuals": residuals is not None}
        if excluded := [name for name, there in others_of_it.items() if there]:
            raise ValueError(
                f"{owner}.backward: per_sample={shown_mode(per_sample)} excludes `{excluded[0]}`: the gradients of "
                "single samples come from one pass over one whole batch. Leave out one of the two."
            )
    elif accumulate or at or residuals is not None:
        per_sample = ""
    return Arguments(accumulate, batch_size, scaler, retain_graph, found, at, residuals, per_sample)


def shown_mode(per_sample: str) -> str:
    """What the user wrote for a mode.

    Args:
        per_sample: The mode.

    Returns:
        Text for an error.
    """
    return "True" if per_sample == "choose" else repr(per_sample)


def samples_of(losses: Sequence[Tensor], automatic: bool, is_alone: bool = True) -> Samples | str:
    """Look for one loss per sample.

    Args:
        losses: The losses, (m,).
        automatic: Nobody has asked for it, so that a look must not cost much where there are none.
        is_alone: No other process shares the work.

    Returns:
        The samples; why there are none, in words, or nothing where there was no reason to look.
    """
    if automatic and len(losses) < FEWEST:
        return ""
    groups: Tensor | None = None
    edge = vector_of(losses)
    if edge is None and not automatic:
        edge, groups = grouped(losses)
    if edge is None:
        if automatic:
            return ""
        return (
            'the losses must be one per sample: a 1-d tensor such as reduction="none" gives, everything that its '
            "unbind() returns, or means over groups of one such tensor, as losses_by_group makes"
        )
    if not is_alone:
        return "several processes share the work, and products of samples are not exchanged"
    found = traced(edge, groups)
    if found is None:
        return "the graph is too deep to be read"
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in found.nodes):
        return "reentrant checkpointing hides parameters: pass use_reentrant=False"
    return found


def representation(owner: str, features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Check the shared representation.

    Args:
        owner: The class that errors should name.
        features: One tensor, or several.

    Returns:
        Its parts.

    Raises:
        TypeError: A part is no tensor that can be differentiated with respect to.
    """
    parts = tuple(features) if isinstance(features, Iterable) and not isinstance(features, Tensor) else (features,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"{owner}.backward: `features` must be a tensor or several, the output of the trunk that every loss is "
                f"computed from, got {type(part).__name__}."
            )
        if not part.requires_grad:
            raise TypeError(
                f"{owner}.backward: `features` must have a graph, and a tensor of shape {tuple(part.shape)} has none. "
                "Pass the output of the trunk as the losses use it, not a detached copy."
            )
    return parts


def require_reached(
    owner: str, params: Sequence[Tensor], reached: Mapping[str, bool], strangers: Iterable[Tensor] = ()
) -> None:
    """Refuse losses that reach nothing.

    Args:
        owner: The class that errors should name.
        params: The parameters of the optimizer.
        reached: Whether each loss reaches a parameter, by name.
        strangers: Parameters outside the optimizer that losses reach, where they are known.

    Raises:
        RuntimeError: One does not.
    """
    for name, ok in reached.items():
        if ok:
            continue
        own = {tuple(p.shape) for p in params}
        twins = sum(tuple(p.shape) in own for p in strangers)
        copied = (
            f" {twins} parameters of the same shapes outside of it are reached: if the optimizer was copied, or "
            "the model replaced, build or copy both together, copy.deepcopy((model, optimizer))."
        )
        raise RuntimeError(
            f"{owner}.backward: loss {name!r} reaches no parameter of the optimizer."
            f"{copied if twins else ''} Was the model run under torch.no_grad(), are its parameters frozen, or do "
            "they belong to another "
            "optimizer? Name that one in `other_optimizers`. If torch.func.functional_call ran the model on copies, "
            "build the optimizer over these."
        )
