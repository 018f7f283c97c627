"""The step of a method that has no rows: each gradient is added to the sum of those before as soon as it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from gradsurgery import geometry
from gradsurgery import rows as rows_module
from gradsurgery.call import require_reached
from gradsurgery.gram import Row, Table
from gradsurgery.report import Report

if TYPE_CHECKING:
    from gradsurgery.surgery.pcgrad import PCGrad
    from gradsurgery.surgery.step import Step


def report(step: Step) -> Report:
    """Take the step: PCGrad between the sum so far and the next gradient, loss after loss.

    The sum and one gradient are all that is held. Each loss costs one small transfer to the host, which decides what
    happens to its gradient.

    Args:
        step: The call of ``backward``.

    Returns:
        What happened.

    Raises:
        RuntimeError: Which parameters are shared cannot be known before the first pass.
    """
    method, call, m = cast("PCGrad", step.method), step.call, step.m
    if call.graph.masks is None and method.shared_params is None:
        raise RuntimeError(
            f"{method._name}.backward: streaming=True has to know before the first pass which parameters are shared, "
            "and the graph does not tell: it hides them behind reentrant activation checkpointing, or is too deep "
            "to be walked. Name them in `shared_params`."
        )
    shared = step.settled(method._shared(call.mine, call.graph.masks))
    is_shared = set(shared)
    everything = [*shared, *(p for p in (*call.mine, *call.theirs) if p not in is_shared)]
    values, scale = rows_module.host([call.values, call.loss_scale])
    if (stopped := step._stopped(values, np.ones(m))) is not None:
        return stopped
    order = method.visiting_order()
    if method.shuffle:  # a graph may be needed again by a loss that comes earlier in the list
        call.retain = [call.retain_graph or overlaps for overlaps in call.graph.overlaps]
    # Without a draft of the memory the scaler is to see inf and nan.
    priorities = np.ones(m) if method._run["draft"] is None else method.preferences()

    total: Row = [None] * len(shared)
    plain: dict[Tensor, Tensor] = {}
    weights, norms, size = np.ones(m), np.zeros(m), 0.0  # of all that was added up
    largest, peaks = rows_module.largest_factor(shared), 0.0
    finite, reached, seen = np.ones(m), np.zeros(m, dtype=bool), np.zeros(m, dtype=bool)
    for i in order:
        wanted, gradients = call.differentiate(i, everything)
        row = {p: g for p, g in zip(wanted, gradients, strict=True) if g is not None}
        del gradients
        reached[i] = bool(row)
        fresh = [row.pop(p, None) for p in shared]
        worst = rows_module.peak(list(row.values()), call.values.device)
        for p in list(row):
            g = row.pop(p)
            plain[p] = rows_module.total(plain.pop(p), g) if p in plain else g
            del g
        table = Table([total, fresh] if seen.any() else [fresh])
        (peak,), flat = rows_module.host([worst, table.products()])
        peaks += float(peak)
        products = table.repaired(flat.reshape(len(table), -1))
        method._require_squares(table)
        noise, unit = table.noise, table.unit
        del table
        finite[i] = np.nan if not np.isfinite([peak, products[-1, -1]]).all() else 1.0
        if (stopped := step._stopped(values, np.isfinite(finite))) is not None:
            return stopped
        norms[i] = unit * np.sqrt(products[-1, -1]) / scale[0]
        if all(g is None for g in fresh):
            continue
        before, own = 1.0, float(priorities[i])
        if seen.any() and method._run["draft"] is not None:
            least = (4 * noise * size / unit) ** 2
            first, product, second = products[0, 0].item(), products[0, 1].item(), products[1, 1].item()
            before, own = geometry.pcgrad_of_two(first, product, second, least, own)
        size = before * size + own * unit * float(np.sqrt(products[-1, -1]))
        with np.errstate(over="ignore"):  # an infinite weight is told of below
            weights[seen] *= before
        weights[i], seen[i] = own, True
        fitting = method._fitting(step.share * weights, largest, call.scaler)
        if fitting is None:
            return Report(step.names, values, flags=method._run["flags"])
        own = float(fitting[i]) / step.share
        held = None
        if m == 2 and seen.all() and method._run["draft"] is not None:  # PCGrad, and its promise
            held = method._held(Table([total, fresh], unit=unit), products, np.array([before, own]), shared)
        if held is None:
            _add(total, fresh, before, own, shared)
        else:
            total = held.split(shared)

    if seen.sum() == 1:  # nothing to balance: the priority of the only one does not act
        only = float(weights[seen][0])
        total = [s if s is None or only == 1.0 else s.div_(only) for s in total]
        weights[seen] = 1.0
    if call.graph.masks is None:
        require_reached(method, reached.tolist())
    if not shared and m > 1:
        method.flag("nothing-shared")
    gradients = [None if s is None else (s if step.share == 1.0 else s.mul_(step.share)) for s in total]
    gradients = [None if s is None else s.to(p.dtype) for s, p in zip(gradients, shared, strict=True)]
    gradients += [rows_module.plain([(step.share, g)], p) for p, g in plain.items()]
    doubtful = rows_module.may_overflow(step.share * max(size, peaks), [*shared, *plain])
    if method._spoiled(gradients if doubtful else [], call.scaler, call.world, doubtful):
        return Report(step.names, values, flags=method._run["flags"])
    rows_module.write([*shared, *plain], gradients)
    return Report(
        step.names,
        values,
        step.share * weights,
        norms=norms if shared else None,
        flags=method._run["flags"],
        engine="streaming",
        reason="streaming=True was asked for",
    )


@torch.no_grad()
def _add(total: Row, row: Row, before: float, own: float, params: list[Tensor]) -> None:
    """Make before · total + own · row of the total, and free the row."""
    for j, p in enumerate(params):
        g, row[j] = row[j], None
        s = total[j]
        if s is None:
            total[j] = rows_module.combine_wide([g], [own], p)
            continue
        if before != 1.0:
            s.mul_(before)
        if g is not None:
            s.add_(g.to_dense() if g.is_sparse else g, alpha=own)
