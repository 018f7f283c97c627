"""Write what the library answers to the playground's reference cases: ``python docs/playground_cases.py``.

The playground computes in the browser, so its mathematics is written a second time. The cases hold both together: one
test recomputes the file with the library, another compares the page with the file, in a browser.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradsurgery
from gradsurgery import geometry

FILE = Path(__file__).parents[1] / "tests" / "data" / "playground_cases.json"
METHODS: dict[str, type[gradsurgery.Surgery]] = {
    "mgda": gradsurgery.MGDA,
    "cagrad": gradsurgery.CAGrad,
    "nash": gradsurgery.NashMTL,
    "upgrad": gradsurgery.UPGrad,
    "config": gradsurgery.ConFIG,
    "conic": gradsurgery.ConicGrad,
    "fairgrad": gradsurgery.FairGrad,
    "gcs": gradsurgery.GCS,
    "blur": gradsurgery.BLUR,
    "sago": gradsurgery.SAGO,
}
# Methods with other arguments than the defaults, which have the same names on the page.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cagrad, c = 0": ("cagrad", {"c": 0.0}),
    "cagrad, c = 1": ("cagrad", {"c": 1.0}),
    "cagrad, c = 2": ("cagrad", {"c": 2.0}),
    **{
        f"config, {length}": ("config", {"length": length})
        for length in ("min", "max", "mean", "harmonic", "geometric")
    },
    "conic, c = 0": ("conic", {"c": 0.0}),
    "conic, c = 0.9": ("conic", {"c": 0.9}),
    "conic, c = 1": ("conic", {"c": 1.0}),
    "fairgrad, alpha = 0": ("fairgrad", {"alpha": 0.0}),
    "fairgrad, alpha = 0.5": ("fairgrad", {"alpha": 0.5}),
    "fairgrad, alpha = 4": ("fairgrad", {"alpha": 4.0}),
    "gcs, switched": ("gcs", {"switched": True}),
    "sago, prefer_retain": ("sago", {"prefer_retain": True}),
}
Answer = dict[str, list[float] | None]
# The situations that the page offers.
PRESETS = {
    "conflict": [[2.0, 0.35], [-0.85, 0.5]],
    "agreement": [[1.2, 0.2], [0.3, 0.9]],
    "lengths": [[2.2, 0.8], [-0.28, 0.18]],
    "opposite": [[1.8, 0.6], [-0.9, -0.3]],
    "fan": [[1.1, 0.2], [0.75, 0.75], [-1.3, 0.45]],
    "outvoted": [[1.4, 0.5], [1.3, -0.1], [-1.1, 0.6]],
    "around": [[1.6, 0.2], [-0.9, 1.3], [-0.5, -1.4]],
    "zero": [[1.7, 0.5], [-0.8, 0.9], [0.0, 0.0]],
}


def turned(angle: float, length: float = 1.0) -> list[float]:
    """Return a row by its angle in degrees and its length."""
    return [length * math.cos(math.radians(angle)), length * math.sin(math.radians(angle))]


def inputs() -> dict[str, list[list[float]]]:
    """Return the rows of every case by name."""
    found = {f"preset {name}": rows for name, rows in PRESETS.items()}
    random = np.random.default_rng(7)
    for m in (2, 3):
        for k in range(20):
            found[f"random {m} {k}"] = random.normal(size=(m, 2)).tolist()
        for k in range(20):  # as the page has them
            found[f"hundredths {m} {k}"] = (random.integers(-250, 251, size=(m, 2)) / 100).tolist()
        for k in range(12):
            lengths = 10.0 ** random.uniform(-3, 3, size=(m, 1))
            found[f"lengths {m} {k}"] = (lengths * random.normal(size=(m, 2))).tolist()
    found |= {
        "parallel": [[1.2, 0.5], [1.2, 0.5]],
        "parallel, other lengths": [[1.2, 0.4], [0.3, 0.1]],
        "parallel, a million": [[1.2e3, 0.4e3], [0.3e-3, 0.1e-3]],
        "opposite, one length": [[0.7, -0.4], [-0.7, 0.4]],
        "opposite, other lengths": [[0.3, 0.1], [-0.6, -0.2]],
        "opposite, a million": [[3e2, 1e2], [-6e-4, -2e-4]],
        "right angle": [[0.0, 2.0], [1.0, 0.0]],
        "right angle, a million": [[0.0, 1e3], [1e-3, 0.0]],
        "conflict, a million": [[2e3, 1e3], [-1e-3, 1e-3]],
        "agreement, a million": [[2e3, 1e3], [1e-3, 1e-3]],
        "small": [[2e-8, 0.4e-8], [-0.8e-8, 0.5e-8]],
        "large": [[2e8, 0.4e8], [-0.8e8, 0.5e8]],
        "one zero of two": [[1.0, -0.6], [0.0, 0.0]],
        "both zero": [[0.0, 0.0], [0.0, 0.0]],
        "two equal of three": [[1.4, 0.3], [1.4, 0.3], [-0.9, 0.7]],
        "three equal": [[1.4, 0.3], [1.4, 0.3], [1.4, 0.3]],
        "three on a line": [[1.0, 0.5], [-0.4, -0.2], [2.0, 1.0]],
        "opposite, and one across": [[0.3, 0.1], [-0.6, -0.2], [-0.1, 0.3]],
        "opposite, and one aslant": [[1.2, 0.4], [-0.9, -0.3], [0.5, 1.1]],
        "opposite, the mean opposed": [[1.2, 0.4], [-0.9, -0.3], [0.5, 0.4]],
        "one zero and a conflict": [[1.2, 0.4], [0.0, 0.0], [-0.9, 0.3]],
        "one zero and opposites": [[1.2, 0.4], [0.0, 0.0], [-0.9, -0.3]],
        "two zeros": [[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]],
        "three zeros": [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        "all round, evenly": [turned(90), turned(210), turned(330)],
        "all round, a million": [turned(10, 1e3), turned(140), turned(260, 1e-3)],
        "fan, a million": [turned(0, 1e3), turned(60), turned(150, 1e-3)],
        "fan, the short one in the middle": [turned(10, 1e3), turned(80, 1e-3), turned(170, 1e3)],
        "mean zero": [[1.0, 0.5], [1.0, -0.5], [-2.0, 0.0]],
    }
    for power in (2, 4, 6, 8):
        angle = math.degrees(10.0**-power)
        found |= {
            f"nearly parallel, 1e-{power}": [turned(20), turned(20 + angle, 1.7)],
            f"nearly opposite, 1e-{power}": [turned(20), turned(200 - angle, 0.7)],
            f"nearly opposite and one inside, 1e-{power}": [turned(20), turned(200 - angle, 0.7), turned(80)],
            f"nearly opposite and one beyond, 1e-{power}": [turned(20), turned(200 - angle, 0.7), turned(-60)],
        }
    return found


def step(method: type[gradsurgery.Surgery], rows: torch.Tensor, **options: Any) -> Answer:
    """Return the weights, None if it has none, and the direction of one step of a method, on linear losses."""
    theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = method(torch.optim.SGD([theta], lr=1.0), **options)
    report = optimizer.backward([(row * theta).sum() for row in rows])
    assert theta.grad is not None
    weights = None if report.weights is None else list(report.weights.values())
    return {"weights": weights, "direction": theta.grad.tolist()}


def pcgrad(rows: torch.Tensor) -> Answer:
    """Return the mean of PCGrad over all orders of visits."""
    m = len(rows)
    orders = itertools.product(*(itertools.permutations([j for j in range(m) if j != i]) for i in range(m)))
    gram = (rows @ rows.T).numpy()
    weights = np.mean([geometry.pcgrad_mixing(gram, order).sum(axis=0) for order in orders], axis=0)
    return {"weights": weights.tolist(), "direction": (torch.from_numpy(weights) @ rows).tolist()}


class InOrder(gradsurgery.PCGrad):
    """PCGrad without its draw."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, shuffle=False)


def answers(rows: list[list[float]]) -> dict[str, Answer]:
    """Return what the library answers to some rows, by method and variant."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    found: dict[str, Answer] = {"sum": {"weights": [1.0] * len(rows), "direction": matrix.sum(dim=0).tolist()}}
    found["pcgrad"] = pcgrad(matrix)
    found["pcgrad in order"] = step(InOrder, matrix)
    found |= {key: step(method, matrix) for key, method in METHODS.items()}
    return found | {name: step(METHODS[key], matrix, **options) for name, (key, options) in VARIANTS.items()}


def main() -> None:
    """Write the file."""
    lines = [json.dumps({"name": name, "rows": rows, "answers": answers(rows)}) for name, rows in inputs().items()]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
