"""What each engine would cost on a model, before the first step."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurgery import losses as losses_module
from gradsurgery import text
from gradsurgery.batch import parameters
from gradsurgery.gradients import blocks, ghosts
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.formed import FEW, are_few
from gradsurgery.gradients.gram import gram
from gradsurgery.graph import Nodes, Root, walk
from gradsurgery.graph.torch_private import metadata
from gradsurgery.losses import Losses
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.surgery.base import Surgery
from gradsurgery.watch.diagnose import wait

# Entries of a row on which products and sums are timed; beyond the caches, and small beside a model.
_SAMPLE = 2**20
# Times of which the shortest counts.
_REPEATS = 3
# What rows are copied into for their products, in bytes.
_BUCKET = 2**21


@dataclass(frozen=True)
class EngineCost:
    """What one engine would cost.

    Args:
        engine: "rows", "ghosts", "blocks" or "streaming".
        milliseconds: Predicted time of ``backward``, without the forward pass.
        times: The same, in units of m bare backward passes, one per loss.
        megabytes: Predicted memory beyond what the backward pass of the plain sum needs at its peak, in 10⁶ bytes.
        fits: That much memory is free now.
    """

    engine: str
    milliseconds: float
    times: float
    megabytes: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """Costs of the engines that could serve these losses.

    Args:
        tasks: Number of losses, m.
        shared: Entries of the shared parameters.
        floor: Measured time of m bare backward passes, in milliseconds.
        engines: What each would cost; the first is what ``engine="auto"`` takes.
        reason: Why it takes that one.
        free: Free memory of the device, in 10⁶ bytes; None if unknown.
    """

    tasks: int
    shared: int
    floor: float
    engines: tuple[EngineCost, ...]
    reason: str
    free: float | None

    def as_dict(self) -> dict[str, Any]:
        """Collect everything, for a program.

        Returns:
            Field names to values; the engines as dicts.
        """
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["engines"] = [{field.name: getattr(cost, field.name) for field in fields(cost)} for cost in self.engines]
        return found

    def __str__(self) -> str:
        rows = [
            (
                cost.engine,
                text.number(cost.milliseconds),
                f"{cost.times:.2f}",
                text.number(cost.megabytes),
                "yes" if cost.fits else "no",
            )
            for cost in self.engines
        ]
        free = "" if self.free is None else f" {text.number(self.free)} MB are free."
        return (
            f"{self.tasks} losses, {self.shared:,} shared entries; m backward passes take {text.number(self.floor)} ms."
            f"{free}\nautomatic choice: {self.engines[0].engine} ({self.reason})\n\n"
            + text.grid(("engine", "ms", "× m passes", "extra MB", "fits"), rows)
        )


def estimate(optimizer_or_model: Optimizer | nn.Module, losses: Losses) -> Estimate:
    """Predict what a step of surgery costs with each engine, before the first one is made.

    One bare backward pass per loss is measured, and small samples of products and sums. The rest follows from shapes
    in the graph. Nothing is written: the graph, ``.grad`` and the method stay as they are, and no more memory is used
    than by the backward pass of one loss. Times are for these inputs on this machine in its present state. They are
    good to about a quarter: enough to choose by. Memory is that of tensors, without what an allocator wastes.

    Args:
        optimizer_or_model: Whose parameters count: an optimizer, one of this library, or a model.
        losses: As ``backward`` takes them, with their graphs.

    Returns:
        The costs. ``print`` shows them; ``as_dict()`` is for programs.

    Raises:
        TypeError: `optimizer_or_model` is neither an optimizer nor a module.
        ValueError: The graph cannot be read: reentrant checkpointing, or deeper than 20 000 nodes.
        RuntimeError: A loss reaches none of the parameters.

    Example:
        >>> first, second = model(inputs).unbind(dim=1)
        >>> found = gradsurgery.estimate(model, {"low": first.square().mean(), "high": second.mean()})
        >>> [cost.engine for cost in found.engines]
        ['rows']
    """
    if not isinstance(optimizer_or_model, (Optimizer, nn.Module)):
        raise TypeError(
            f"estimate: `optimizer_or_model` must be an optimizer or a module, got {type(optimizer_or_model).__name__}."
        )
    params = (
        [p for p in optimizer_or_model.parameters() if p.requires_grad]
        if isinstance(optimizer_or_model, nn.Module)
        else parameters(optimizer_or_model)
    )
    method = optimizer_or_model if isinstance(optimizer_or_model, MultiLossOptimizer) else None
    tasks = losses_module.read(losses, "estimate")
    graph = walk(tasks.roots)
    if graph.masks is None:
        raise ValueError(
            "estimate: the graph of the losses cannot be read. It is too deep, or goes through torch.utils.checkpoint "
            "with use_reentrant=True; pass use_reentrant=False."
        )
    roots = [root for root in graph.roots if root is not None]
    m = len(roots)
    reached = [p for p in params if p in graph.masks]
    _require_all_reach(tasks.present, [graph.masks[p] for p in reached])
    given = method.shared_params if isinstance(method, Surgery) else None
    shared = [p for p in reached if (graph.masks[p] & (graph.masks[p] - 1) if given is None else p in given)]
    seeds = rows_module.seeds(tasks.tensors, None)
    floor = _floor(roots, seeds, reached)
    free = _free(seeds[0].device)
    entries = sum(p.numel() for p in shared)
    found, chosen, reason = _offers(method if isinstance(method, Surgery) else None, roots, shared, graph.nodes, floor)
    engines = tuple(
        EngineCost(
            engine,
            milliseconds=1e3 * (floor + more.seconds),
            times=(floor + more.seconds) / floor,
            megabytes=max(0.0, more.held) / 1e6,
            fits=free is None or more.held < free,
        )
        for engine, more in sorted(found.items(), key=lambda pair: pair[0] != chosen)
    )
    return Estimate(m, entries, 1e3 * floor, engines, reason, None if free is None else free / 1e6)


class _More(NamedTuple):
    """Seconds beyond m backward passes, and bytes beyond the backward pass of the plain sum."""

    seconds: float
    held: float


def _require_all_reach(names: Sequence[str], masks: Sequence[int]) -> None:
    for i, name in enumerate(names):
        if not any(mask >> i & 1 for mask in masks):
            raise RuntimeError(f"estimate: loss {name!r} reaches none of the parameters.")


def _offers(
    method: Surgery | None, roots: Sequence[Root], shared: Sequence[Tensor], nodes: Nodes, floor: float
) -> tuple[dict[str, _More], str, str]:
    """What each engine that could serve costs, which one is taken, and why."""
    m = len(roots)
    if method is not None and method.streaming:
        return {"streaming": _streaming(shared, m)}, "streaming", "streaming=True"
    wants = "auto" if method is None else method.engine
    found, reason = {"rows": _rows(shared, m, method)}, "the method looks at the rows themselves"
    if method is None or method.needs_gram_only:
        reason = "by their shapes all layers are cheaper as rows"
        if wants == "auto" and are_few(shared, m):
            reason = f"fewer than {FEW} entries in all rows"
        elif (plan := ghosts.plan(roots, shared, nodes, wants == "ghosts")) is not None:
            found["ghosts"] = _ghosts(plan, m)
            reason = f"{len(plan.layers)} layers need no rows"
        if (cut := blocks.plan(roots, shared, nodes)) is not None:
            found["blocks"] = _blocks(cut, m, floor)
    if wants == "auto":
        return found, "ghosts" if "ghosts" in found else "rows", reason
    chosen = wants if wants in found else "rows"
    return found, chosen, f'engine="{wants}"' + ("" if chosen == wants else " cannot serve here")


def _floor(roots: Sequence[Root], seeds: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    """Seconds of m bare backward passes."""

    def once(i: int) -> Callable[[], object]:
        return lambda: rows_module.gradient(roots[i], params, seeds[i], retain_graph=True)

    return sum(_shortest(once(i), seeds[i].device) for i in range(len(roots)))


def _rows(shared: Sequence[Tensor], m: int, method: Surgery | None) -> _More:
    row = float(_bytes(shared))
    if method is not None and method.row_dtype is not None:
        row = float(sum(p.numel() * min(p.element_size(), method.row_dtype.itemsize) for p in shared))
    # Rows in the memory of the host are not this device's affair, but for one.
    kept = 1 if method is not None and method.row_device not in (None, *{p.device for p in shared}) else m
    held = kept * row + max(map(_size, shared), default=0) + _BUCKET - _bytes(shared)
    return _More(sum(_products_and_sum(shared, m)), held)


def _streaming(shared: Sequence[Tensor], m: int) -> _More:
    return _More((m - 1) * sum(_products_and_sum(shared, 2)), float(_bytes(shared)))


def _products_and_sum(shared: Sequence[Tensor], m: int) -> tuple[float, float]:
    """Seconds that the inner products and the weighted sum of m rows take."""
    if not shared:
        return 0.0, 0.0
    largest = max(shared, key=lambda p: p.numel())
    like = torch.zeros(min(_SAMPLE, sum(p.numel() for p in shared)), dtype=largest.dtype, device=largest.device)
    rows: list[list[Tensor | None]] = [[torch.ones_like(like)] for _ in range(m)]
    scale = sum(p.numel() for p in shared) / like.numel()
    products = _shortest(lambda: gram(rows), like.device)
    total = _shortest(lambda: rows_module.combine([row[0] for row in rows], [0.5] * m, like), like.device)
    return scale * products, scale * total


@torch.no_grad()
def _ghosts(plan: ghosts.Plan, m: int) -> _More:
    """Every layer is timed on gradients of the right shape; layers of one shape only once."""
    direct = [plan.shared[place] for place in plan.direct]
    seconds = sum(_products_and_sum(direct, m))
    held = m * _bytes(direct)
    known: dict[object, float] = {}
    for layer in plan.layers:
        sample = layer.sample()
        key = (type(layer), layer.params[0].shape, *(g.shape for g in sample))
        if key not in known:
            known[key] = layer.beyond_rows(m, _shortest)
        seconds += known[key]
        kept = layer.keep(sample)
        held += 0 if kept is None else m * _size(kept)
    return _More(seconds, held)


def _blocks(plan: blocks.Plan, m: int, floor: float) -> _More:
    def border(block: blocks.Block) -> int:
        if block.edge is None:
            return 0
        whole = metadata(block.edge.node)[0]
        return math.prod(whole.shape) * whole.dtype.itemsize

    largest = 0
    for block, after in itertools.zip_longest(plan.blocks, plan.blocks[1:]):
        params = [plan.shared[place] for place in block.places]
        # The gradients at the upper border are replaced one by one by those at the lower one.
        largest = max(largest, m * max(border(block), _bytes(params) + (0 if after is None else border(after))))
    products, _ = _products_and_sum(plan.shared, m)
    return _More(products + floor / m, largest + _BUCKET - _bytes(plan.shared))


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _bytes(params: Sequence[Tensor]) -> int:
    return sum(map(_size, params))


def _free(device: torch.device) -> int | None:
    """Bytes that can be had now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return None
