"""Every method as it stands in a training loop: how to build it, a small network full of conflict, and one step.

What is tested with it holds for every method there is: those of both catalogues, GradNorm, a weighting under a surgery
and a cadence. A method that is added to a catalogue is tested here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradsurgery
from gradsurgery import MGDA, GradNormWeighter, MultiLossOptimizer, NTKWeighter, PCGrad
from tests.support import catalogue, weighting_catalogue

NAMES = weighting_catalogue.NAMES


def _grad_norm(base: Optimizer, **switches: Any) -> GradNormWeighter:
    return GradNormWeighter(base, base.param_groups[0]["params"][:2], **switches)


METHODS: dict[str, Callable[..., MultiLossOptimizer]] = {
    **{row.name: row.build for row in catalogue.CATALOGUE},
    **{row.name: row.build for row in weighting_catalogue.CATALOGUE},
    "GradNormWeighter": _grad_norm,
    "PCGrad over GradNormWeighter": lambda base, **switches: PCGrad(_grad_norm(base), **switches),
    "MGDA, every second step after one": lambda base, **switches: MGDA(base, every=2, warmup=1, **switches),
}
BY_EPOCHS = {row.name for row in weighting_catalogue.CATALOGUE if row.epochs}

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}


class Net(nn.Module):
    """A trunk and three heads whose targets pull apart."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in NAMES)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x))
        targets = (1.0, -3.0, 9.0)
        return {name: head(z) - t for name, head, t in zip(NAMES, self.heads, targets, strict=True)}


def inputs(t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The batch of step t: exact in half precision too."""
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(100 + t)).bfloat16().to(dtype)


def losses_of(residuals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positive losses, as some methods need them, in single precision or better."""
    return {
        name: r.to(torch.promote_types(r.dtype, torch.float32)).square().mean() + 0.1 for name, r in residuals.items()
    }


def propose(optimizer: Any, residuals: dict[str, Tensor], losses: dict[str, Tensor], **options: Any) -> Any:
    """``backward``, with the residuals for the one method that wants them."""
    extra = {"residuals": residuals} if isinstance(optimizer, NTKWeighter) else {}
    return optimizer.backward(losses, **extra, **options)


def train(name: str, optimizer: Any, net: nn.Module, steps: Sequence[int], dtype: torch.dtype = torch.float64) -> None:
    """Plain steps, or steps with a closure where the innermost optimizer is L-BFGS."""
    for t in steps:

        def closure(t: int = t) -> float:
            optimizer.zero_grad()
            residuals = net(inputs(t, dtype))
            return float(propose(optimizer, residuals, losses_of(residuals)).objective)

        if isinstance(innermost(optimizer), torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        end_epoch(name, optimizer)


def end_epoch(name: str, optimizer: Any) -> None:
    """Tell the methods that work by epochs that one is over; here each step is one."""
    if name in BY_EPOCHS:
        optimizer.epoch_end()


def innermost(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer under all wrappers."""
    while isinstance(optimizer, MultiLossOptimizer):
        optimizer = optimizer.base
    return optimizer


def memory_of(optimizer: MultiLossOptimizer) -> Any:
    """A private copy of what the method would save."""
    return copy.deepcopy(optimizer.state_dict()["gradsurgery"])


def gradients(net: nn.Module) -> list[Tensor | None]:
    """Private copies of all ``.grad``."""
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit, through containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def weights_of(net: nn.Module) -> list[Tensor]:
    """Private copies of all parameters."""
    return [p.detach().clone() for p in net.parameters()]


def public_methods() -> set[str]:
    """Names of all method classes of the package."""
    bases = {gradsurgery.MultiLossOptimizer, gradsurgery.Surgery, gradsurgery.Weighter}
    values = {name: getattr(gradsurgery, name) for name in gradsurgery.__all__}
    return {
        name
        for name, value in values.items()
        if isinstance(value, type) and issubclass(value, MultiLossOptimizer) and value not in bases
    }
