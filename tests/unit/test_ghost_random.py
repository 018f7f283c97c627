"""Random small models, whose layers are used again and again: every engine finds what rows tell."""

from __future__ import annotations

import copy
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsurgery.gradients import formed, ghost_layers
from gradsurgery.surgery.base import Surgery

WIDTH = 4
LAYERS = ("linear", "no bias", "not transposed", "both ways", "table", "images")
STEPS = ("call",) * 6 + (
    "sum",
    "product",
    "changed in place",
    "part changed in place",
    "residual in place",
    "one row",
    "one row expanded",
    "other strides",
    "detached",
    "recomputed",
    "widened",
)
LOSSES = ("head", "head", "sum", "decay", "penalty", "zero")


class Use(NamedTuple):
    """What happens to two earlier results: the name of a step, which results, and with which layer."""

    name: str
    first: int
    second: int
    layer: int


class Spec(NamedTuple):
    """A model and its losses: kinds of the layers, steps, kinds of the losses with the result that each looks at."""

    layers: list[str]
    steps: list[Use]
    losses: list[tuple[str, int]]
    shape: list[int]
    seed: int


LARGE = st.integers(0, 10**6)
SPECS = st.builds(
    Spec,
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4),
    steps=st.lists(st.builds(Use, st.sampled_from(STEPS), LARGE, LARGE, LARGE), min_size=1, max_size=8),
    losses=st.lists(st.tuples(st.sampled_from(LOSSES), LARGE), min_size=2, max_size=6),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)


class Random(nn.Module):
    """The model of a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(map(self._layer, spec.layers))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in spec.losses)

    def _layer(self, kind: str) -> nn.Module:
        if kind == "table":
            options = {"padding_idx": 1} if self.spec.seed % 2 else {"scale_grad_by_freq": True}
            return nn.Embedding(7, WIDTH, **options)
        if kind == "images":
            return nn.Conv2d(1, 2, (2, 1), stride=(2, 1), padding=(0, self.spec.seed % 2))
        return nn.Linear(WIDTH, WIDTH, bias=kind != "no bias")

    def call(self, k: int, x: Tensor, other: bool = False) -> Tensor:
        kind, layer = self.spec.layers[k], self.layers[k]
        if kind == "table":
            return layer((3 * x.detach().abs()).long().clamp(max=6)).mean(-2) + x.sin()
        if kind == "images":
            return layer(x.reshape(-1, 1, WIDTH, 1)).flatten(1)[:, :WIDTH].reshape(x.shape)
        if kind == "not transposed" or (kind == "both ways" and other):
            return x @ layer.weight
        return nn.functional.linear(x, layer.weight) if kind == "linear" and other else layer(x)

    def results(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for name, first, second, k in self.spec.steps:
            a, b, k, other = found[first % len(found)], found[second % len(found)], k % len(self.layers), k % 3 == 0
            if name == "sum":
                found.append(a + b)
                continue
            if name == "product":
                found.append(a * b.tanh())
                continue
            if name == "recomputed":
                found.append(checkpoint(self.call, k, a, other, use_reentrant=False))
                continue
            if name == "widened" and isinstance(self.layers[k], nn.Linear):
                weight = self.layers[k].weight.to(torch.float64, copy=True)
                found.append(nn.functional.linear(a, weight) + (weight.sum() if other else 0.0))
                continue
            if name == "one row expanded":
                a = a[:1].expand(a.shape)
            elif name == "other strides":
                a = a.mT.contiguous().mT
            elif name == "detached":
                a = a.detach()
            elif name == "one row":
                a = a[:1]
            y = self.call(k, a, other)
            if name == "changed in place":
                y = y.relu_() if other else y.mul_(0.5)
            elif name == "part changed in place":
                y[..., 1:3] *= b[..., :2].detach()
            elif name == "residual in place":
                y += b
            elif name == "one row":
                y = torch.cat([y, b[1:]])
            found.append(y.tanh() if k % 2 else y)
        return found

    def losses(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.spec.seed)
        shape = (*self.spec.shape, WIDTH) if len(self.spec.shape) > 1 else (self.spec.shape[0] + 1, WIDTH)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        found = self.results(x)
        losses = []
        for head, (kind, which) in zip(self.heads, self.spec.losses, strict=True):
            y = found[-1 - which % min(3, len(found))]
            loss = head(y).sin().square().mean()
            if kind == "sum":
                loss = y.sum() + head.bias.sum()
            elif kind == "decay":
                loss = loss + self.layers[which % len(self.layers)].weight.square().sum()
            elif kind == "penalty":
                (slope,) = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True)
                loss = loss if slope is None or not slope.requires_grad else slope.square().sum()
            elif kind == "zero":
                loss = 0.0 * loss
            losses.append(loss)
        return losses


class Fixed(Surgery):
    """Weights that depend on nothing, so that only the engine is compared."""

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.array([0.7, -1.3, 2.1, 0.4, 1.0, -0.2])[: len(gram)]


def found_by(model: Random, engine: str) -> tuple[np.ndarray | None, list[Tensor | None]]:
    model = copy.deepcopy(model)
    optimizer = Fixed(torch.optim.SGD(model.parameters(), lr=0.1), engine=engine)
    report = optimizer.backward(model.losses())
    return None if report.gram is None else report.gram.numpy(), [p.grad for p in model.parameters()]


@pytest.fixture(autouse=True)
def _small_models_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formed, "FEW", 0)
    # Which layers "auto" takes is drawn too, by what they are.
    for kind in (ghost_layers.Linear, ghost_layers.Convolution, ghost_layers.Embedding):
        monkeypatch.setattr(kind, "costs", lambda layer, m, *_: (float((layer.places[0] + m) % 3 == 0), 0.5))


# The node of a second derivative has several outputs, of which one is used.
@hypothesis.example(Spec(["images"], [Use("call", 0, 0, 0)], [("penalty", 0), ("zero", 0)], [1], 1))
@hypothesis.given(SPECS)
@hypothesis.settings(max_examples=100)
def test_engines_agree(spec: Spec) -> None:
    torch.manual_seed(spec.seed)
    model = Random(spec).double()
    gram, gradients = found_by(model, "rows")
    for engine in ("ghosts", "auto"):
        same, others = found_by(model, engine)
        assert (same is None) == (gram is None)
        if gram is not None and same is not None:
            norms = np.sqrt(gram.diagonal())
            assert (np.abs(same - gram) <= 1e-11 * np.outer(norms, norms)).all()
        for g, h in zip(gradients, others, strict=True):
            assert (g is None) == (h is None)
            if g is not None and h is not None:
                torch.testing.assert_close(h, g, rtol=1e-9, atol=1e-11)
