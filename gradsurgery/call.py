"""What one call of ``backward`` knows before anything is differentiated."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import losses as losses_module
from gradsurgery import rows as rows_module
from gradsurgery import shards
from gradsurgery.graph import Graph, Start, undecided, walk
from gradsurgery.kept import Kept, collect
from gradsurgery.losses import Tasks
from gradsurgery.text import warn
from gradsurgery.world import World

if TYPE_CHECKING:
    from gradsurgery.optimizer import MultiLossOptimizer


@dataclass
class Call:
    """One call of ``backward``, as the methods' steps see it.

    Attributes:
        owner: The class that errors should name.
        tasks: The losses.
        values: Their values, (m,), float64; over the whole batch, where it is spread over processes.
        graph: What the walk over their graph has found.
        mine: The parameters of this optimizer that the losses may reach.
        theirs: Those of the other optimizers.
        scaler: The gradient scaler, or None.
        loss_scale: What autograd's gradients are multiplied by, a scalar.
        seeds: What each backward pass starts from, m scalars: the loss scale times the share of this process.
        retain: For each loss, whether its graph has to outlive its own backward pass, (m,).
        retain_graph: Whether the graph has to outlive the last pass.
        features: The shared representation; empty if the rows are those of the parameters.
        kept: Gradients of earlier micro-batches and of this one; None if nothing is accumulated.
        world: The processes that share the work; None for one alone.
        sharded: Parameters are DTensors, whose gradients come added up over the processes.
        accumulate: More micro-batches follow.
    """

    owner: str
    tasks: Tasks
    values: Tensor
    graph: Graph
    mine: list[Tensor]
    theirs: list[Tensor]
    scaler: torch.amp.GradScaler | None
    loss_scale: Tensor
    seeds: list[Tensor]
    retain: list[bool]
    retain_graph: bool
    features: tuple[Tensor, ...]
    kept: Kept | None
    world: World | None
    sharded: bool
    accumulate: bool

    def differentiate(self, i: int, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Differentiate one loss.

        Args:
            i: Which loss.
            params: What to differentiate with respect to.

        Returns:
            Those of the parameters that the loss may reach, and their gradients, of this process.
        """
        root, masks = self.tasks.roots[i], self.graph.masks
        if self.graph.hidden:
            assert root is not None
            with rows_module.emptied(self.leaves):
                row = rows_module.gradient_by_backward(root, self.leaves, self.seeds[i], self.retain[i])
            found = dict(zip(self.leaves, row, strict=True))
            return list(params), [found[p] for p in params]
        wanted = list(params) if masks is None else [p for p in params if masks.get(p, 0) >> i & 1]
        if root is None:
            return wanted, [None] * len(wanted)
        return wanted, rows_module.gradient(root, wanted, self.seeds[i], self.retain[i])

    def rows_at(self, params: Sequence[Tensor], whole: bool = True) -> Iterator[list[Tensor | None]]:
        """Find the gradient of each loss at some parameters, and keep the graph.

        Args:
            params: The parameters, or `features`.
            whole: Exchange with the other processes.

        Yields:
            One row a loss, multiplied by the loss scale. Over the whole batch, if so wanted: parameters have a sum over
            the processes then, and features a row for each of them, one behind the other.

        Raises:
            RuntimeError: A graph hides its parameters, or all of these are frozen.
        """
        if self.kept is not None:
            for found in self.kept.rows:
                mine = [found.get(p) for p in params]  # of this process
                yield mine if self.world is None or self.sharded else self.world_total(mine, params)
            return
        if self.graph.hidden or self.sharded:
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
            if self.world is None or not whole:
                yield row
            elif self.features:
                yield self.world.joined(row, params)
            else:
                yield self.world_total(row, params)

    def one_pass(self, weights: np.ndarray, params: Sequence[Tensor], last: bool) -> list[Tensor | None]:
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
        roots = [self.tasks.roots[i] for i in used]
        starts = [self.seeds[i] if weights[i] == 1.0 else self.seeds[i] * float(weights[i]) for i in used]
        engine = "backward" if self.graph.hidden else "accumulate" if self.world is None else "grad"
        leaves = list(dict.fromkeys([*params, *self.leaves])) if engine == "backward" else list(params)
        # All of them: DistributedDataParallel may write to parameters that this pass does not reach.
        touched = list({id(p): p for p in (*leaves, *self.mine, *self.theirs)}.values())
        with rows_module.emptied(touched):
            found = rows_module.one_pass(
                [root for root in roots if root is not None], starts, leaves, self.retain_graph or not last, engine
            )[: len(params)]
        if self.world is None or self.sharded:
            return found
        return self.world_total(found, params)

    def world_total(self, found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Add up gradients over the processes. What no process has stays None.

        Args:
            found: One gradient a parameter.
            params: The parameters.

        Returns:
            The sums.
        """
        assert self.world is not None
        there = self.world.any_of(torch.tensor([g is not None for g in found], dtype=torch.uint8)).tolist()
        kept = [j for j, mark in enumerate(there) if mark]
        sums = self.world.total_each([found[j] for j in kept], [params[j] for j in kept])
        result: list[Tensor | None] = [None] * len(params)
        for j, g in zip(kept, sums, strict=True):
            result[j] = g
        return result

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
        certain, open_here = undecided(self.tasks.roots, self.graph.nodes)
        marks = [
            [(certain.get(p, 0) & masks.get(p, 0)) >> i & 1 for p in params] for i in range(len(self.tasks.present))
        ]
        found = torch.tensor([*marks, [p in open_here for p in params]], dtype=torch.uint8, device="cpu")
        if self.world is not None:
            found = self.world.any_of(found)
        counts, unsure = found[:-1].sum(dim=0).tolist(), found[-1].tolist()
        return [p for p, n, mark in zip(params, counts, unsure, strict=True) if mark and n < 2]

    @property
    def suspects(self) -> frozenset[Tensor]:
        """Parameters of which the graph does not tell which losses reach them: zeros in their gradients must decide.

        Returns:
            Parameters of this optimizer and of others.
        """
        if self.kept is not None:
            return self.kept.suspects
        return frozenset((*self.mine, *self.theirs)) if self.graph.unread else self.graph.suspects

    @property
    def largest_weights(self) -> np.ndarray:
        """What each loss can be multiplied by: the largest number of its dtype, or of kept gradients, (m,)."""
        if self.kept is not None:
            return np.full(len(self.tasks.present), rows_module.largest_factor([*self.mine, *self.theirs]))
        return np.array([torch.finfo(t.dtype).max for t in self.tasks.tensors])

    @cached_property
    def leaves(self) -> list[Tensor]:
        """Everything that an ordinary backward pass may write to, as far as it is known.

        Returns:
            Leaves.
        """
        return list(dict.fromkeys([*self.mine, *self.theirs, *self.graph.leaves]))


def prepare(
    method: MultiLossOptimizer,
    tasks: Tasks,
    accumulate: bool,
    batch_size: float | Mapping[str, float] | None,
    scaler: torch.amp.GradScaler | None,
    retain_graph: bool,
    others: Optimizer | Iterable[Optimizer],
    features: tuple[Tensor, ...],
    world: World | None,
) -> Call | None:
    """Look at the losses and their graph, and add what was accumulated.

    Args:
        method: The optimizer whose ``backward`` was called.
        tasks: The losses.
        accumulate: The call is one of several micro-batches, not the last.
        batch_size: Number of samples on this process.
        scaler: The gradient scaler, or None.
        retain_graph: Keep the graph.
        others: Optimizers of other parameters.
        features: The shared representation; empty if there is none.
        world: The processes that share the work, or None.

    Returns:
        The call; None if no loss is left.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: The arguments exclude each other.
    """
    others = _optimizers(method._name, others)
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(
            f"{method._name}.backward: `scaler` must be a gradient scaler, such as torch.amp.GradScaler, or None, got "
            f"{scaler!r}."
        )
    device = tasks.tensors[0].device if tasks.tensors else parameters(method)[0].device
    values = here = losses_module.values(tasks.tensors, device)
    shares = None
    if world is not None:
        kind = f"{method._name} accumulate={accumulate} features={bool(features)} step={method.memory['step']}"
        trainable = [*parameters(method), *(p for other in others for p in parameters(other))]
        kind += f" parameters={len(trainable)}:{zlib.crc32(str([tuple(p.shape) for p in trainable]).encode()):08x}"
        may_be_empty = method._run["kept"] is not None
        tasks, shares, found = world.agree(tasks, values, batch_size, kind, may_be_empty)
        values = torch.from_numpy(found)
        method._run["tasks"] = tasks
    if method.nonfinite == "drop":
        finite = torch.isfinite(values).tolist()
        # With nothing left a scaler is to see the values in .grad, and to skip the step.
        seen = scaler is not None and scaler.is_enabled() and not any(finite)
        if not all(finite) and not seen:
            method.flag("dropped")
            keep = [i for i, ok in enumerate(finite) if ok]
            tasks, values = tasks.only(keep), values[keep]
            shares = None if shares is None else shares[keep]
            method._run["tasks"] = tasks
            if not keep and (accumulate or method._run["kept"] is None):
                return None
    graph, mine, theirs = _reached(method, tasks, [p for other in others for p in parameters(other)], world)
    if graph.roots:
        tasks = tasks._replace(roots=graph.roots)
    spread = bool(shards.sharded(mine))
    if spread and world is not None:
        _require_everywhere(method, tasks, world)
        _require_exchanged(method, mine, float(here.nan_to_num().sum()), world)
    seeds = rows_module.seeds(tasks.tensors, scaler)
    loss_scale = seeds[0] if seeds else method._run["kept"].loss_scale
    if shares is not None:
        # Gradients of sharded parameters come back as means over the processes, all others as parts of a sum.
        factor = world.size if world is not None and spread else 1
        seeds = [seed * float(share * factor) for seed, share in zip(seeds, shares, strict=True)]
    # A compiled backward that first ran without retain_graph refuses to run with it later. Where steps of both
    # kinds follow each other all retain, and the references are dropped instead.
    cadence = method.every > 1 or method.warmup > 0
    retain = [
        retain_graph or (both if cadence else later)
        for both, later in zip(graph.overlaps, graph.overlaps_later, strict=True)
    ]
    for root in tasks.roots:
        if isinstance(root, Start) and root.together is not None:
            root.together.seeds, root.together.retain = seeds, retain
    call = Call(
        owner=method._name,
        tasks=tasks,
        values=values,
        graph=graph,
        mine=mine,
        theirs=theirs,
        scaler=scaler,
        loss_scale=loss_scale,
        seeds=seeds,
        retain=retain,
        retain_graph=retain_graph or (cadence and any(graph.overlaps)),
        features=features,
        kept=None,
        world=world,
        sharded=spread,
        accumulate=accumulate,
    )
    kept: Kept | None = method._run["kept"]
    if accumulate or kept is not None:
        if features or method._run["residuals"] is not None:
            raise ValueError(
                f"{method._name}.backward: `features` and `residuals` have no meaning for gradients that are "
                "accumulated over micro-batches."
            )
        new = collect(call)
        if graph.masks is None and world is None:
            require_reached(method, [bool(row) for row in new.rows])
        call.kept = new if kept is None else kept.plus(new)
        call.theirs = list(call.kept.theirs)
        if not accumulate:
            call.kept = call.kept.in_order([*tasks.names, *call.kept.present])
            call.values = call.kept.values
            m = len(call.kept.present)
            call.tasks = Tasks(tasks.names, call.kept.present, tuple(call.values.unbind()), (None,) * m)
            method._run["tasks"] = call.tasks
    return call


def representation(owner: str, features: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """Check the shared representation.

    Args:
        owner: The class that errors should name.
        features: One tensor, several, or None.

    Returns:
        Its parts; empty if there is none.

    Raises:
        TypeError: A part is no tensor that can be differentiated with respect to.
    """
    if features is None:
        return ()
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


def _optimizers(owner: str, others: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    found = list(others) if isinstance(others, Iterable) else [others]
    for other in found:
        if not isinstance(other, Optimizer):
            raise TypeError(
                f"{owner}.backward: `others` must be optimizers, one or several, got {type(other).__name__}. To leave "
                "parameters out of the surgery, name the shared ones in `shared_params`."
            )
    return found


def _reached(
    method: MultiLossOptimizer, tasks: Tasks, others: Sequence[Tensor], world: World | None
) -> tuple[Graph, list[Tensor], list[Tensor]]:
    """Walk over the graph of the losses.

    Returns:
        What was found, the parameters of this optimizer that may be reached, and those of the other ones.
    """
    params = parameters(method)
    graph = walk(tasks.roots)
    own = set(params)
    # fully_shard differentiates with respect to tensors of its own.
    if graph.masks is not None and any(p not in graph.masks for p in shards.sharded(params)):
        graph = graph._replace(hidden=True, masks=None, nodes={})
    if world is not None:  # all processes take the same road
        own_marks = [graph.hidden, graph.masks is None, graph.unread]
        marks = torch.tensor(own_marks, dtype=torch.uint8, device="cpu")
        hidden, unknown, unread = map(bool, world.any_of(marks).tolist())
        if hidden and not shards.sharded(params):
            raise RuntimeError(
                f"{method._name}.backward: the losses go through torch.utils.checkpoint with use_reentrant=True, which "
                "takes ordinary backward passes, and DistributedDataParallel reduces the first of them only. Pass "
                "use_reentrant=False."
            )
        if unknown:
            graph = graph._replace(hidden=hidden, masks=None, nodes={}, unread=unread)
    if graph.masks is None:
        return graph, params, [p for p in dict.fromkeys(others) if p not in own]
    masks = graph.masks
    if world is not None:
        m = len(tasks.present)
        told = {p: mask | (p in graph.suspects) << m for p, mask in masks.items()}
        told = world.united(told, [*params, *others], m + 1)
        masks = {p: mask & ~(1 << m) for p, mask in told.items()}
        graph = graph._replace(masks=masks, suspects=frozenset(p for p, mask in told.items() if mask >> m))
    mine = [p for p in params if p in masks]
    theirs = [p for p in dict.fromkeys(others) if p in masks and p not in own]
    covered = 0
    if len(masks) == len(mine) + len(theirs):  # as almost always
        for mask in masks.values():
            covered |= mask
    else:
        for p in (*mine, *theirs):
            covered |= masks[p]
    strangers: list[Tensor] = []
    if len(masks) > len(mine) + len(theirs):
        own.update(theirs)
        strangers = [p for p in masks if isinstance(p, torch.nn.Parameter) and p not in own]
    require_reached(method, [bool(covered >> i & 1) for i in range(len(tasks.present))], strangers)
    if strangers and not method._run["warned"]:
        method._run["warned"] = True
        warn(
            f"{method._name}.backward: the losses reach {len(strangers)} parameter(s) outside the "
            f"optimizer (the first has shape {tuple(strangers[0].shape)}). They get no gradient. If another "
            "optimizer should step them, pass it in `others`; if they are not to be trained here, as the other "
            "network of a GAN, freeze them with requires_grad_(False) or ignore this."
        )
    return graph, mine, theirs


def _require_everywhere(method: MultiLossOptimizer, tasks: Tasks, world: World) -> None:
    """Every backward pass of sharded parameters is a collective, which all processes have to join."""
    absent = world.any_of(torch.tensor([root is None for root in tasks.roots], dtype=torch.uint8)).tolist()
    missing = [name for name, mark in zip(tasks.present, absent, strict=True) if mark]
    if missing:
        raise RuntimeError(
            f"{method._name}.backward: with sharded parameters every process must have every loss, and {missing} "
            "is absent on one process. Give it a loss of no samples, such as 0.0 * output.sum(), and its "
            "`batch_size`, or use DistributedDataParallel."
        )


def _require_exchanged(method: MultiLossOptimizer, mine: Sequence[Tensor], total: float, world: World) -> None:
    """Next to sharded parameters, plain ones are right only where every process has the same batch.

    So it is under a tensor-parallel plan. Under fully_shard each has its own, and what lies outside of it is left with
    the gradient of one process.
    """
    loose = [p for p in mine if not hasattr(p, "device_mesh")]
    if loose and not world.is_same(total):
        raise RuntimeError(
            f"{method._name}.backward: {len(loose)} parameters of the optimizer (the first has shape "
            f"{tuple(loose[0].shape)}) lie outside of fully_shard, while the processes have different batches: nobody "
            "would add up their gradients. Shard the whole model, fully_shard(model), after its parts."
        )


def require_reached(method: MultiLossOptimizer, reached: Sequence[bool], strangers: Iterable[Tensor] = ()) -> None:
    """Refuse losses that reach nothing.

    Args:
        method: The optimizer.
        reached: Whether each present loss reaches a parameter, (m,).
        strangers: Parameters outside the optimizer that losses reach, where they are known.

    Raises:
        RuntimeError: One does not.
    """
    for name, ok in zip(method.names, reached, strict=True):
        if not ok:
            own = {tuple(p.shape) for p in parameters(method)}
            twins = sum(tuple(p.shape) in own for p in strangers)
            copied = (
                f" {twins} parameters of the same shapes outside of it are reached: if the optimizer was copied, or "
                "the model replaced, build or copy both together, copy.deepcopy((model, optimizer))."
            )
            raise RuntimeError(
                f"{method._name}.backward: loss {name!r} reaches no parameter of the optimizer."
                f"{copied if twins else ''} Was the model run under torch.no_grad(), are its parameters frozen, or do "
                "they belong to another "
                "optimizer? Name that one in `others`. If torch.func.functional_call ran the model on copies, build "
                "the optimizer over these."
            )


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Trainable parameters in the order of the groups, each once. Read anew in every call: groups change.

    Args:
        optimizer: Any optimizer.

    Returns:
        Its parameters that require grad.
    """
    # By id: hashing a tensor takes longer than anything else here.
    return list({id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}.values())
