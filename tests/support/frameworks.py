"""What the tests of the frameworks share: a small problem in conflict, methods of each kind, and equality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradsurgery

#: (optimizer, a module with `trunk`, **switches) to a method: stateless, random with state a pair, with weights learnt,
#: composed, with a cadence.
METHODS: dict[str, Callable[..., gradsurgery.MultiLossOptimizer]] = {
    "pcgrad": lambda base, net, **switches: gradsurgery.PCGrad(base, **switches),
    "gradvac": lambda base, net, **switches: gradsurgery.GradVac(base, **switches),
    "gradnorm": lambda base, net, **switches: gradsurgery.GradNormWeighter(base, net.trunk.parameters(), **switches),
    "composed": lambda base, net, **switches: gradsurgery.PCGrad(gradsurgery.UncertaintyWeighter(base), **switches),
    "cadence": lambda base, net, **switches: gradsurgery.MGDA(base, every=2, warmup=1, **switches),
}


class Net(nn.Module):
    """A trunk and two heads that begin as mirror images."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
            for mirror, p in zip(self.right.parameters(), self.left.parameters(), strict=True):
                mirror.copy_(-0.7 * p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.trunk(x))
        return self.left(z), self.right(z)


def losses_of(model: Callable[[Tensor], tuple[Tensor, Tensor]], batch: Sequence[Tensor]) -> dict[str, Tensor]:
    x, y = batch
    left, right = (out.float() for out in model(x))
    return {
        "left": (left - y).square().mean(),
        "right": 3 * (right - y).square().mean(),
        "tie": (left + right + 1).square().mean(),
    }


def dataset(size: int = 56) -> TensorDataset:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, 1.5 + x[:, :1])


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, through containers."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_close(model: nn.Module, twin: nn.Module) -> None:
    """Parameters agree to rounding."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
