"""What a whole step costs where the model is compiled: plain sum, weighters, surgery, side by side.

    python -m benchmarks.compiled [--rounds 60] [--models "MLP 2 x 64"] [--backend inductor] [--device cuda]
    [--write docs/performance.md]

The model with its losses is compiled as one function, and every candidate steps it: forward, backward, SGD. All take
turns within a round, in another order each time. On the CPU times are those of one thread on the processor; the median
of the ratios of one round is given. Whoever makes the compiler look at the model again, or cut it in two, ends the run
with an error. With ``--write`` the figures are kept as JSON, and the page on performance is written with them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

import gradsurgery
from benchmarks import page, workloads
from benchmarks.steps import versions, wait
from benchmarks.workloads import machine

TASKS = 4
#: Name → what builds the model and its inputs.
MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Callable[[], Tensor]]]] = {
    "MLP 2 x 64": lambda: workloads.mlp(TASKS, 64, 2, 64),
    "MLP 4 x 512": lambda: workloads.mlp(TASKS),
    "convolutions": lambda: workloads.conv(TASKS),
    "transformer": lambda: workloads.transformer(TASKS),
}
Losses = Callable[[Tensor], list[Tensor]]
Step = Callable[[], None]


def plain(optimizer: Any, losses: Losses, x: Tensor) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        torch.stack(losses(x)).sum().backward()
        optimizer.step()

    return step


def ours(optimizer: Any, losses: Losses, x: Tensor) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(losses(x))
        optimizer.step()

    return step


def candidates(work: workloads.Workload, compiled: Losses) -> dict[str, Step]:
    """The first two are the plain sum, compiled and not."""

    def eager(x: Tensor) -> list[Tensor]:
        return work.model(x)[0]

    def sgd() -> torch.optim.Optimizer:
        return torch.optim.SGD(work.model.parameters(), lr=0.0)

    x, shared = work.x, work.shared
    return {
        "plain sum": plain(sgd(), compiled, x),
        "plain sum, not compiled": plain(sgd(), eager, x),
        "FixedWeighter": ours(gradsurgery.FixedWeighter(sgd()), compiled, x),
        'FixedWeighter, "defer"': ours(gradsurgery.FixedWeighter(sgd(), nonfinite="defer"), compiled, x),
        "UncertaintyWeighter": ours(gradsurgery.UncertaintyWeighter(sgd(), lr=1e-9), compiled, x),
        'UncertaintyWeighter, "defer"': ours(
            gradsurgery.UncertaintyWeighter(sgd(), lr=1e-9, nonfinite="defer"), compiled, x
        ),
        "PCGrad": ours(gradsurgery.PCGrad(sgd()), compiled, x),
        "PCGrad, `shared_params` given": ours(gradsurgery.PCGrad(sgd(), shared_params=shared), compiled, x),
        "PCGrad, not compiled": ours(gradsurgery.PCGrad(sgd()), eager, x),
    }


def once(step: Step, device: torch.device) -> float:
    now = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    start = now()
    step()
    wait(device)
    return now() - start


def figures(spent: list[float], base: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(spent, base, strict=True))
    return {
        "milliseconds": statistics.median(spent) * 1e3,
        "to_plain": statistics.median(ratios),
        "spread": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of every candidate on one model.

    Args:
        name: The model.
        options: The command line.

    Returns:
        A row for each candidate.

    Raises:
        RuntimeError: The model was compiled in pieces, or more than once.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    device = torch.device(options.device)
    work = workloads.Workload(*MODELS[name](), device)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(lambda x: work.model(x)[0], backend=options.backend, mode=options.mode)
    found = candidates(work, compiled)
    spent: dict[str, list[float]] = {candidate: [] for candidate in found}
    order, draw = list(found), random.Random(0)
    gc.disable()
    try:
        for _ in range(options.rounds + 3):
            draw.shuffle(order)
            for candidate in order:
                spent[candidate].append(once(found[candidate], device))
            gc.collect()
    finally:
        gc.enable()
    if counters["graph_break"] or counters["stats"]["unique_graphs"] != 1:
        raise RuntimeError(f"{name}: the model was not compiled once and as a whole: {dict(counters)}.")
    base = spent["plain sum"][3:]
    return [{"model": name, "candidate": c, **figures(times[3:], base)} for c, times in spent.items()]


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--mode", default=None, help='of torch.compile, such as "reduce-overhead"')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="the page on performance")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Surgery runs a compiled backward m times, and buffers that are given away allow one.
    torch._functorch.config.donated_buffer = False
    run: dict[str, Any] = {
        "machine": machine(options.device),
        "device": torch.device(options.device).type,
        "versions": versions(),
        "backend": options.backend,
        "mode": options.mode or "default",
        "tasks": TASKS,
        "load": os.getloadavg()[0],
        "rows": [],
    }
    for name in options.models:
        run["rows"] += measure(name, options)
        print(page.compiled_table({**run, "rows": [r for r in run["rows"] if r["model"] == name]}), flush=True)
    if options.write:
        page.compiled_figures(options.write).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        page.again(options.write)


if __name__ == "__main__":
    main()
