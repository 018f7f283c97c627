"""Gradients of small networks of the kinds that are trained on many losses, kept as test data of the solvers.

    python -m benchmarks.grams [--write tests/data/gradients.npz]

Each entry holds B, (m, k) with k ≤ m, float64: B Bᵀ = J Jᵀ for the gradients J of m losses, by a QR decomposition of
Jᵀ, or J itself where it has no more columns than rows. All data are random, and all seeds are fixed.

* ``detector-9-k``, ``detector-21-k``: a transformer that decodes queries, with the class, box and overlap losses of
  each of 3 or 7 decoder layers through the same heads, after k steps.
* ``pinn-3-k``, ``pinn-5-k``: a network for the heat or the wave equation; residual, initial and boundary losses.
* ``samples-m``: a network of two layers, one loss per sample; ``logistic-m``: logistic regression with fewer features
  than samples and some inputs with both labels.
* ``sparse-m``: rows with a few entries each, between 1e-40 and 1.
* ``wide-…-256``: one loss per sample as above, and rows near a space of few dimensions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 20


def compact(rows: np.ndarray) -> np.ndarray:
    return rows if rows.shape[1] <= len(rows) else np.ascontiguousarray(np.linalg.qr(rows.T, mode="r").T)


def rows_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> np.ndarray:
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
            )
        )
    return torch.stack(rows).double().numpy()


class Detector(nn.Module):
    """Queries that attend to features, with class and box heads that all layers share."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 16, 4, stride=4)
        self.queries = nn.Parameter(torch.randn(6, 16))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.classes, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, images: Tensor, labels: Tensor, boxes: Tensor) -> list[Tensor]:
        features = self.trunk(images).flatten(2).transpose(1, 2)
        z, losses = self.queries.expand(len(images), -1, -1), []
        for layer in self.layers:
            z = layer(z, features)
            box = self.boxes(z).sigmoid()
            low = torch.maximum(box[..., :2], boxes[..., :2])
            high = torch.minimum(box[..., :2] + box[..., 2:], boxes[..., :2] + boxes[..., 2:])
            both = (high - low).clamp(min=0).prod(-1)
            either = box[..., 2:].prod(-1) + boxes[..., 2:].prod(-1) - both
            losses += [
                F.cross_entropy(self.classes(z).flatten(0, 1), labels.flatten()),
                5 * F.l1_loss(box, boxes),
                2 * (1 - both / either).mean(),
            ]
        return losses


def detector(layers: int) -> dict[str, np.ndarray]:
    torch.manual_seed(layers)
    model = Detector(layers).double()
    images, labels = torch.randn(4, 3, 16, 16).double(), torch.randint(5, (4, 6))
    boxes = torch.rand(4, 6, 4).double() / 2 + 0.05
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = {}
    for step in range(STEPS + 1):
        losses = model(images, labels, boxes)
        if step in (0, STEPS):
            found[f"detector-{len(losses)}-{step}"] = rows_of(losses, list(model.parameters()))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return found


def pinn(wave: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(10 + wave)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    inside = torch.rand(64, 2).double().requires_grad_()
    side, zero, one = torch.rand(32, 1).double(), torch.zeros(32, 1).double(), torch.ones(32, 1).double()
    start = torch.cat((side, zero), 1).requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def slopes(u: Tensor, points: Tensor) -> Tensor:
        return torch.autograd.grad(u.sum(), points, create_graph=True)[0]

    found = {}
    for step in range(STEPS + 1):
        first = slopes(model(inside), inside)
        second_x, second_t = slopes(first[:, 0], inside)[:, 0], slopes(first[:, 1], inside)[:, 1]
        residual = (second_t - second_x if wave else first[:, 1] - second_x).square().mean()
        before = model(start)
        losses = [residual, (before - torch.sin(np.pi * side)).square().mean()]
        edges = [model(torch.cat((edge, side), 1)).square().mean() for edge in (zero, one)]
        losses += [slopes(before, start)[:, 1].square().mean(), *edges] if wave else [torch.stack(edges).sum()]
        if step in (0, STEPS):
            found[f"pinn-{len(losses)}-{step}"] = rows_of(losses, list(model.parameters()))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return found


def samples(m: int, hidden: int) -> np.ndarray:
    torch.manual_seed(m)
    model = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()
    losses = F.cross_entropy(model(torch.randn(m, 8).double()), torch.randint(3, (m,)), reduction="none")
    return rows_of(list(losses), list(model.parameters()))


def logistic(m: int, features: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, features))
    x[: m // 8] = x[m // 8 : 2 * (m // 8)] + 1e-3 * rng.standard_normal((m // 8, features))
    y = rng.integers(0, 2, m)
    y[: m // 8] = 1 - y[m // 8 : 2 * (m // 8)]
    return (1 / (1 + np.exp(-x @ rng.standard_normal(features) / 2)) - y)[:, None] * x


def sparse(m: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    rows = rng.standard_normal((m, 2 * m)) * 10.0 ** rng.uniform(-40, 0, (m, 2 * m)) * (rng.random((m, 2 * m)) < 0.2)
    rows[np.arange(m), rng.integers(0, m // 2, m)] = rng.choice((-1.0, 1.0), m)
    return rows


def near_few_dimensions(m: int, few: int) -> np.ndarray:
    rng = np.random.default_rng(few)
    return rng.standard_normal((m, few)) @ rng.standard_normal((few, m)) + 0.03 * rng.standard_normal((m, m))


def collection() -> dict[str, np.ndarray]:
    found = detector(3) | detector(7) | pinn(False) | pinn(True)
    found |= {f"samples-{m}": samples(m, 8) for m in (16, 32, 64, 128)}
    found |= {f"logistic-{m}": logistic(m, m // 2) for m in (16, 64)}
    found |= {f"sparse-{m}": sparse(m) for m in (8, 24)}
    found |= {"wide-samples-256": samples(256, 16), "wide-logistic-256": logistic(256, 40)}
    found["wide-near-256"] = near_few_dimensions(256, 12).astype(np.float32).astype(np.float64)
    return {name: compact(rows) for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=Path("tests/data/gradients.npz"))
    options = parser.parse_args()
    found = collection()
    np.savez_compressed(options.write, **found)
    for name, rows in found.items():
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        print(f"{name}: {rows.shape}, least nonzero singular value of the unit rows {np.linalg.svd(unit)[1][-1]:.1e}")


if __name__ == "__main__":
    main()
