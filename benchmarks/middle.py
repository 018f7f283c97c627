"""What a step of models of middle size costs over m bare backward passes, where rows are formed, and with adapters.

    python -m benchmarks.middle [--rounds 9] [--seconds 10] [--only ViT] [--json docs/middle.json]

`PCGrad` with rows and with the default engine takes turns with the floor, m bare ``torch.autograd.grad`` calls over the
same parameters. Processor time of one thread, median of the ratios of the same round. Gradients are checked first.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import check, ours, yardsticks
from benchmarks.engines import Mean, Recurrent, Residual, Vision, conv_norm, described, lora
from benchmarks.steps import clock, figures
from benchmarks.workloads import Multi, Workload

LOSSES = (2, 4, 8)
ENGINES = ("rows", "auto")


def resnet18() -> nn.Sequential:
    """ResNet-18 without its last layer."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for k in range(4):
        for j in range(2):
            i, o, stride = 64 << max(0, k - (j == 0)), 64 << k, 1 + (k > 0 and j == 0)
            inside = nn.Sequential(conv_norm(i, o, stride), nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
            down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else None
            layers.append(Residual(inside, down))
    return nn.Sequential(*layers, Mean())


#: Name → the trunk, the width of its features, inputs, and what a step may cost over m bare backward passes.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[], Tensor], float]] = {
    "ViT 6 × 192, batch 8": (lambda: Vision(16, 4, 192, 6), 192, lambda: torch.randn(8, 3, 16, 16), 1.10),
    "ViT 6 × 192, batch 64": (lambda: Vision(16, 4, 192, 6), 192, lambda: torch.randn(64, 3, 16, 16), 1.05),
    "LSTM 2 × 256, batch 16": (lambda: Recurrent(nn.LSTM, 32, 256, 2), 256, lambda: torch.randn(16, 24, 32), 1.10),
    "ResNet-18, batch 4": (resnet18, 512, lambda: torch.randn(4, 3, 64, 64), 1.10),
    "ResNet-18, batch 32": (resnet18, 512, lambda: torch.randn(32, 3, 64, 64), 1.05),
    "adapters of 8 × 512, rank 16, batch 32": (lambda: lora(512, 8, 16), 512, lambda: torch.randn(32, 512), 1.05),
    "adapters of 4 × 1024, rank 8, batch 256": (lambda: lora(1024, 4, 8), 1024, lambda: torch.randn(256, 1024), 1.05),
}


def cell(name: str, m: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Time one model with m losses.

    Args:
        name: The model.
        m: Number of losses.
        rounds: In how many rounds candidates take turns at most.
        seconds: After how many no further round begins.

    Returns:
        For each engine its time over the floor: median, middle half, shortest.
    """
    torch.manual_seed(0)
    trunk, width, draw, _ = MODELS[name]
    work = Workload(Multi(trunk(), width, m), draw, torch.device("cpu"))
    mine = [ours(work, "PCGrad", engine, engine=engine) for engine in ENGINES]
    found, _, _ = check(work, [*yardsticks(work), *mine])
    times = clock(found, rounds, seconds)
    costs = {engine: figures(times[engine], times["floor"], times["plain sum"]) for engine in ENGINES}
    took = {c.name: c.optimizer.report.engine for c in mine if c.optimizer is not None and c.optimizer.report}
    return {
        "model": name,
        "m": m,
        "most": MODELS[name][-1],
        "took": took["auto"],
        "floor": min(times["floor"]) * 1e3,
        **costs,
    }


def main() -> None:
    """Time the models, print what was found, and keep it if so wished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one cell after which no round begins")
    parser.add_argument("--only", nargs="+", default=[""], help="models whose name contains one of these")
    parser.add_argument("--losses", type=int, nargs="+", default=list(LOSSES), help="numbers of losses")
    parser.add_argument("--json", type=Path, help="keep the figures here, in place of those that are there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {"run": described(), "cells": []}
    for name in (name for name in MODELS if any(part in name for part in options.only)):
        for m in options.losses:
            found = cell(name, m, options.rounds, options.seconds)
            results["cells"].append(found)
            ratios = "  ".join(f"{e} {found[e]['to_floor']:.3f} ({found[e]['shortest']:.3f})" for e in ENGINES)
            print(f"{name:42} m={m:<3} floor {found['floor']:9.1f} ms  {ratios}  {found['took']}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
