"""What takes part: this library, what it is measured against, and other libraries where they are installed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import gradsurgery
from benchmarks.workloads import Workload
from gradsurgery.testing import import_peer

METHODS = ("PCGrad", "MGDA", "CAGrad", "NashMTL", "UPGrad")
WEIGHTERS = ("FixedWeighter", "UncertaintyWeighter", "GradNormWeighter")
PEERS = {"torchjd": "torchjd.autojac", "pytorch_optimizer": "pytorch_optimizer", "conflictfree": "conflictfree"}

Run = Callable[[list[Tensor], "Tensor | None"], object]


@dataclass
class Candidate:
    """Something that turns losses into gradients.

    Attributes:
        name: What the tables call it.
        work: The model and its inputs; a copy of its own where the candidate puts hooks on the model.
        run: Called with the losses and the features.
        method: Whose gradient it should give: a method's, "sum" or, if it gives none, "".
        optimizer: Ours, if it is one of ours.
        appetite: Peak memory to expect, in sizes of the shared parameters, where it is large.
    """

    name: str
    work: Workload
    run: Run
    method: str = "PCGrad"
    optimizer: gradsurgery.MultiLossOptimizer | None = None
    appetite: float = 0.0

    def losses(self) -> tuple[list[Tensor], Tensor | None]:
        """A forward pass, with empty ``.grad``."""
        for p in (*self.work.shared, *self.work.private):
            p.grad = None
        return self.work.model(self.work.x)


def yardsticks(work: Workload) -> list[Candidate]:
    """What all others are compared with.

    Args:
        work: The model and its inputs.

    Returns:
        The backward pass of the plain sum, and m bare ones.
    """
    everything = [*work.shared, *work.private]

    def floor(losses: list[Tensor], features: Tensor | None) -> None:
        for i, loss in enumerate(losses):
            torch.autograd.grad(loss, everything, retain_graph=i < len(losses) - 1, allow_unused=True)

    return [
        Candidate("plain sum", work, lambda losses, features: sum(losses).backward(), "sum"),
        Candidate("floor", work, floor, ""),
    ]


def candidates(work: Workload) -> list[Candidate]:
    """All of them, for one workload.

    Args:
        work: The model and its inputs.

    Returns:
        The yardsticks first. What needs a library that is not installed, or cannot serve this model, is left out.
    """
    found = [
        *yardsticks(work),
        *(ours(work, name) for name in METHODS),
        ours(work, "PCGrad", 'PCGrad, engine="rows"', engine="rows"),
        ours(work, "PCGrad", 'PCGrad, engine="blocks"', engine="blocks"),
        ours(work, "ConFIG"),
        *(ours(work, name) for name in WEIGHTERS),
    ]
    for peer in (torchjd, pytorch_optimizer, conflictfree):
        with suppress(RuntimeError):  # it is not installed; the page says so
            found += peer(work)
    return found


def missing() -> list[str]:
    """Libraries that would take part, but are not installed."""
    absent = []
    for name, module in PEERS.items():
        try:
            import_peer(name, module)
        except RuntimeError:
            absent.append(name)
    return absent


def ours(work: Workload, method: str, name: str = "", **switches: Any) -> Candidate:
    base = torch.optim.SGD([*work.shared, *work.private], lr=0.0)
    if method == "GradNormWeighter":
        switches["shared_params"] = [p for p in work.shared if p.dim() > 1][-1]
    optimizer = getattr(gradsurgery, method)(base, **switches)

    def run(losses: list[Tensor], features: Tensor | None) -> object:
        return optimizer.backward(losses)

    return Candidate(name or method, work, run, method, optimizer)


def torchjd(work: Workload) -> list[Candidate]:
    autojac: Any = import_peer("torchjd", "torchjd.autojac")
    autogram: Any = import_peer("torchjd", "torchjd.autogram")
    aggregation: Any = import_peer("torchjd", "torchjd.aggregation")
    aggregator, weighting = aggregation.PCGrad(), aggregation.PCGradWeighting()

    # The surgery acts on the trunk alone, as everywhere here; the heads get their plain gradients.
    def backward(chunk: int | None, **options: bool) -> Run:
        def run(losses: list[Tensor], features: Tensor | None) -> None:
            heads = bool(work.private)
            autojac.backward(losses, inputs=work.shared, parallel_chunk_size=chunk, retain_graph=heads)
            if heads:
                torch.autograd.backward(losses, inputs=work.private)
            autojac.jac_to_grad(work.shared, aggregator, **options)

        return run

    def mtl(losses: list[Tensor], features: Tensor | None) -> None:
        heads = [list(head.parameters()) for head in work.model.heads]
        autojac.mtl_backward(losses, features, tasks_params=heads, shared_params=work.shared, parallel_chunk_size=1)
        autojac.jac_to_grad(work.shared, aggregator)

    # Its hooks stay in the graph of every forward pass, so it has a model of its own.
    own = copy.deepcopy(work)
    engine = autogram.Engine(own.model.trunk, batch_dim=None)

    def gram(losses: list[Tensor], features: Tensor | None) -> None:
        stacked = torch.stack(losses)
        weights = weighting(engine.compute_gramian(stacked))
        stacked.backward(weights, inputs=own.shared, retain_graph=bool(own.private))
        if own.private:
            torch.autograd.backward(losses, inputs=own.private)

    found = [
        Candidate("TorchJD, sequential", work, backward(1)),
        Candidate("TorchJD, vmapped", work, backward(None)),
        Candidate("TorchJD, Gramian accumulation", work, backward(1, optimize_gramian_computation=True)),
        Candidate("TorchJD, autogram", own, gram),
    ]
    if work.private:
        found.insert(2, Candidate("TorchJD, mtl_backward", work, mtl))
    return found


def pytorch_optimizer(work: Workload) -> list[Candidate]:
    module: Any = import_peer("pytorch_optimizer", "pytorch_optimizer")
    optimizer = module.PCGrad(torch.optim.SGD(work.shared, lr=0.0), reduction="sum")
    return [Candidate("pytorch_optimizer PCGrad", work, lambda losses, features: optimizer.pc_backward(losses))]


def conflictfree(work: Workload) -> list[Candidate]:
    operators: Any = import_peer("conflictfree", "conflictfree.grad_operator")
    utils: Any = import_peer("conflictfree", "conflictfree.utils")
    operator, trunk = operators.ConFIGOperator(), work.model.trunk

    def run(losses: list[Tensor], features: Tensor | None) -> None:
        rows = []
        for i, loss in enumerate(losses):
            trunk.zero_grad()
            loss.backward(retain_graph=i < len(losses) - 1)
            rows.append(utils.get_gradient_vector(trunk))
        utils.apply_gradient_vector(trunk, operator.calculate_gradient(rows))

    # Least squares over more unknowns than equations takes this much, whatever m is; two losses go another way.
    appetite = 150.0 if len(work.model(work.x)[0]) > 2 else 20.0
    return [Candidate("conflictfree ConFIG", work, run, "ConFIG", appetite=appetite)]


# -------------------------------------------------------------------------------------------------------- the truth


@contextmanager
def in_order() -> Iterator[None]:
    """Have everybody's PCGrad visit the tasks in the order of the losses."""

    def identity(n: int, **options: Any) -> Tensor:
        return torch.arange(n)

    visit = mock.patch.object(
        gradsurgery.PCGrad, "visiting_orders", lambda self, shuffle: gradsurgery.Surgery.visiting_orders(self, False)
    )
    stream = mock.patch.object(gradsurgery.PCGrad, "visiting_order", lambda self: list(range(len(self.names))))
    with mock.patch("torch.randperm", identity), mock.patch("random.shuffle"), visit, stream:
        yield


def pcgrad(gram: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper, on inner products: the weights of the rows."""
    total = np.zeros(len(gram))
    for i in range(len(gram)):
        w = np.eye(len(gram))[i]
        for j in range(len(gram)):
            if j != i and (product := gram[j] @ w) < 0:
                w[j] -= product / gram[j, j]
        total += w
    return total


class Truth:
    """The gradients, literally: m backward passes, inner products in float64.

    Args:
        work: The model and its inputs.
    """

    def __init__(self, work: Workload) -> None:
        losses, _ = work.model(work.x)
        everything = [*work.shared, *work.private]
        rows = [torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True) for loss in losses]
        cut = len(work.shared)
        self.heads = [next((g for g in column if g is not None), None) for column in zip(*rows, strict=True)][cut:]
        columns = list(zip(*(row[:cut] for row in rows), strict=True))
        self.columns = [
            torch.stack([torch.zeros_like(p).flatten() if g is None else g.flatten() for g in column])
            for p, column in zip(work.shared, columns, strict=True)
        ]
        m = len(losses)
        self.gram = np.zeros((m, m))
        for rows_here in self.columns:
            for part in rows_here.split(2**20, dim=1):
                wide = part.double()
                self.gram += (wide @ wide.T).cpu().numpy()
        self.weights = {"sum": np.ones(m), "PCGrad": pcgrad(self.gram)}

    def distance(self, candidate: Candidate) -> float:
        """How far the gradient of a candidate is off, relative to its length. It must have run just before.

        Args:
            candidate: The candidate.

        Returns:
            ‖g − Jᵀw‖ / ‖Jᵀw‖ over the trunk. Infinite if a head has not its plain gradient.
        """
        weights = self.weights[candidate.method]
        off = 0.0
        for p, column in zip(candidate.work.shared, self.columns, strict=True):
            w = torch.from_numpy(weights).to(column)
            off += float((p.grad.flatten() - w @ column).double().square().sum())
        weighter = candidate.optimizer is not None and not isinstance(candidate.optimizer, gradsurgery.Surgery)
        scales = weights if weighter else np.ones(len(weights))
        each = np.repeat(scales, len(self.heads) // len(scales))
        for p, g, scale in zip(candidate.work.private, self.heads, each, strict=True):
            if not torch.allclose(p.grad, scale * g, rtol=1e-3, atol=1e-5 * float(g.abs().max())):
                return float("inf")
        return float(np.sqrt(off / (weights @ self.gram @ weights)))

    def tolerance(self, method: str) -> float:
        """How far off rounding may be, relative to the length: more where long rows nearly cancel."""
        weights = self.weights[method]
        terms = np.abs(weights) @ np.sqrt(self.gram.diagonal())
        return max(1e-4, 1e-5 * float(terms / np.sqrt(weights @ self.gram @ weights)))


def room(device: torch.device) -> float:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def check(work: Workload, found: list[Candidate]) -> tuple[list[Candidate], dict[str, float], dict[str, str]]:
    """Compare everybody's gradient with the truth. Ours must be right.

    Args:
        work: The model and its inputs.
        found: Who takes part.

    Returns:
        Those that ran; how far off each was; why the others are left out.

    Raises:
        AssertionError: Ours is wrong.
    """
    truth, distances, failed, kept = Truth(work), {}, {}, []
    lengths = np.sqrt(truth.gram.diagonal())
    for candidate in found:
        if (needed := candidate.appetite * work.size) > room(work.device) / 2:
            failed[candidate.name] = f"It would need about {needed / 2**30:.0f} GiB."
            continue
        try:
            with in_order():
                report = candidate.run(*candidate.losses())
        except Exception as error:
            if candidate.optimizer is not None:
                raise
            failed[candidate.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        kept.append(candidate)
        if isinstance(report, gradsurgery.Report) and report.weights is not None:
            truth.weights.setdefault(candidate.method, np.array(list(report.weights.values())))
        if candidate.method:
            distances[candidate.name] = truth.distance(candidate)
        if candidate.optimizer is not None and not distances[candidate.name] <= truth.tolerance(candidate.method):
            raise AssertionError(f"{candidate.name} is wrong by {distances[candidate.name]:.2g}")
        gram = getattr(report, "gram", None)
        if gram is not None and (np.abs(gram.numpy() - truth.gram) > 1e-4 * np.outer(lengths, lengths)).any():
            raise AssertionError(f"{candidate.name}: the inner products are wrong")
    return kept, distances, failed
