"""What a step costs: time and memory of ``backward`` against bare autograd and other libraries, in one process.

    python -m benchmarks.steps [--rounds 15] [--seconds 20] [--tasks 2 4 8 16] [--workloads MLP transformer]
    [--threads 1] [--device cuda] [--cheap 4] [--curves] [--write docs/performance.md]

Yardsticks are measured in every round: the backward of the plain sum, and *the floor*, m bare ``torch.autograd.grad``
calls over the same parameters with nothing done to the result. Candidates take turns within a round, each round in
another order. Two figures are given: the median over rounds of the ratio to the floor of the same round, and the ratio
of the shortest times, which other processes disturb less. Before anything is timed, every gradient is compared with a
literal computation. With ``--write`` the figures join those of earlier runs with other threads or on other devices.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import page
from benchmarks.candidates import (
    Candidate,
    candidates,
    check,
    in_order,
    missing,
    ours,
    pytorch_optimizer,
    torchjd,
    yardsticks,
)
from benchmarks.workloads import WORKLOADS, Workload, build, machine, mlp_of_size

# Rounds that are always made, however long they take, after one that warms up. What takes longer than so many times the
# floor is in the first few only, which leaves more time for the others.
_LEAST, _SLOW, _SLOW_ROUNDS = 3, 4.0, 2


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that `run` has allocated and not freed at one time."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    gc.disable()  # memory of others that is collected meanwhile would count as freed by this one
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    held = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def once(candidate: Candidate) -> float:
    """Seconds of one backward phase."""
    # One thread's time on the processor does not count what other programs take meanwhile.
    alone = candidate.work.device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    losses, features = candidate.losses()
    wait(candidate.work.device)
    start = now()
    result = candidate.run(losses, features)
    wait(candidate.work.device)
    spent = now() - start
    del result
    return spent


def memory(found: Sequence[Candidate]) -> dict[str, int]:
    """Peak bytes of each candidate's backward phase, beyond the model and the graph of the losses."""
    peaks = {}
    for candidate in found:
        losses, features = candidate.losses()
        peaks[candidate.name] = peak_bytes(lambda c=candidate, a=losses, b=features: c.run(a, b), candidate.work.device)
    return peaks


def clock(found: Sequence[Candidate], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Times of all candidates, which take turns. Stops after `rounds`, or when the seconds are spent.

    The slowest leave early, so that their lists are shorter.
    """
    times: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    begin = time.perf_counter()
    for k in range(rounds + 1):
        if k > _LEAST and time.perf_counter() - begin > seconds:
            break
        if k > _SLOW_ROUNDS:
            found = [c for c in found if min(times[c.name]) <= _SLOW * min(times["floor"])]
        gc.collect()
        gc.disable()
        try:
            for candidate in (*found[k % len(found) :], *found[: k % len(found)]):
                times[candidate.name].append(once(candidate))
        finally:
            gc.enable()
    return {name: spent[1:] for name, spent in times.items()}  # the first round warms up


def figures(times: list[float], floors: list[float], plains: list[float]) -> dict[str, Any]:
    ratios = sorted(t / f for t, f in zip(times, floors, strict=False))  # of the rounds it took part in
    return {
        "rounds": len(times),
        "milliseconds": statistics.median(times) * 1e3,
        "to_floor": statistics.median(ratios),
        "shortest": min(times) / min(floors),
        "spread": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "to_plain": statistics.median(t / p for t, p in zip(times, plains, strict=False)),
        "shortest_to_plain": min(times) / min(plains),
    }


def measure(name: str, tasks: int, options: argparse.Namespace) -> list[dict]:
    """Time and memory of every candidate on one workload, after a check of the gradients."""
    work = build(name, tasks, torch.device(options.device))
    found = [
        c for c in candidates(work) if not options.candidates or c.name in ("plain sum", "floor", *options.candidates)
    ]
    found, distances, failed = check(work, found)
    peaks = memory(found)
    times = clock(found, options.rounds, options.seconds)
    key = {"workload": name, "tasks": tasks}
    return [
        {
            **key,
            "candidate": c.name,
            **figures(times[c.name], times["floor"], times["plain sum"]),
            "memory": peaks[c.name] / work.size,
            "extra_memory": (peaks[c.name] - peaks["plain sum"]) / work.size,
            "distance": distances.get(c.name),
        }
        for c in found
    ] + [{**key, "candidate": candidate, "failed": why} for candidate, why in failed.items()]


# ------------------------------------------------------------------------------------------------------ cheap modes


def cheap_modes(work: Workload) -> list[Candidate]:
    floor = next(c for c in candidates(work) if c.name == "floor")
    found = [floor, ours(work, "PCGrad"), ours(work, "PCGrad", 'engine="rows"', engine="rows")]
    found.append(ours(work, "PCGrad", "row_dtype=bfloat16", row_dtype=torch.bfloat16))
    if work.device.type != "cpu":  # there rows have nowhere else to go
        found.append(ours(work, "PCGrad", 'row_device="cpu"', row_device="cpu"))
        found.append(
            ours(work, "PCGrad", 'row_dtype=bfloat16, row_device="cpu"', row_dtype=torch.bfloat16, row_device="cpu")
        )
    found += [ours(work, "PCGrad", "streaming", streaming=True), ours(work, "PCGrad", "every=4", every=4)]
    if work.private:
        optimizer = ours(work, "PCGrad").optimizer
        found.append(Candidate("features=", work, lambda a, b: optimizer.backward(a, features=b), optimizer=optimizer))
    return found


def cheap(name: str, tasks: int, options: argparse.Namespace) -> list[dict]:
    """Cost of each approximation over four steps, and its distance from the exact direction while a model trains."""
    work = build(name, tasks, torch.device(options.device))
    found = cheap_modes(work)
    peaks: dict[str, int] = memory(found)
    for candidate in found[1:]:
        candidate.optimizer.zero_grad()
    times: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    begin = time.perf_counter()
    for k in range(options.rounds + 1):
        if k > 2 and time.perf_counter() - begin > options.seconds:
            break
        spent = dict.fromkeys(times, 0.0)
        for _ in range(4):
            for candidate in found:
                spent[candidate.name] += once(candidate) / 4
                if candidate.optimizer is not None:
                    candidate.optimizer.step()
        for candidate in found:
            times[candidate.name].append(spent[candidate.name])
    times = {mode: spent[1:] for mode, spent in times.items()}
    errors = train(name, tasks, torch.device(options.device))
    rows = []
    for candidate in found[1:]:
        mode = candidate.name
        figure = figures(times[mode], times["floor"], times["PCGrad"])
        figure["to_exact"], _ = figure.pop("to_plain"), figure.pop("shortest_to_plain")
        rows.append({"workload": name, "tasks": tasks, "mode": mode, **figure, "memory": peaks[mode] / work.size,
                     "errors": errors.get(mode)})  # fmt: skip
    return rows


def train(name: str, tasks: int, device: torch.device, steps: int = 12) -> dict[str, list[float]]:
    """Distances of cheap directions from the exact one, step by step along the exact path, a new batch each."""
    work = build(name, tasks, device)
    _, exact, *others = cheap_modes(work)
    stepper = torch.optim.Adam([*work.shared, *work.private], lr=1e-3)
    errors: dict[str, list[float]] = {candidate.name: [] for candidate in others}
    for _ in range(steps):
        work.renew()
        directions = {}
        for candidate in (*others, exact):
            with in_order():
                candidate.run(*candidate.losses())
            directions[candidate.name] = [p.grad for p in work.shared]
            candidate.optimizer.step()
        truth = directions[exact.name]
        length = sum(float(g.double().square().sum()) for g in truth) ** 0.5
        for candidate in others:
            pairs = zip(directions[candidate.name], truth, strict=True)
            off = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
            errors[candidate.name].append(off / length)
        stepper.step()
    return errors


# ----------------------------------------------------------------------------------------------------------- curves


# What the curves have in common where they do not vary it: losses, parameters, layers. What would take more bytes than
# the last is not run.
CURVES, ROOM = {"tasks": 4, "parameters": 1e6, "depth": 6}, 16 * 2**30


def curve(axis: str, at: float, options: argparse.Namespace, before: list[dict]) -> list[dict]:
    """One point of the scaling curves: time and memory of the yardsticks, of PCGrad, and of TorchJD's best setting.

    Args:
        axis: "tasks", "parameters" or "depth".
        at: Where on it; the others are as in :data:`CURVES`.
        options: Rounds, seconds and the device.
        before: The points of this axis so far. Who has some, and would take too much memory here, is not run: time and
            memory follow from the last two points.

    Returns:
        A point for each candidate.
    """
    setting = {**CURVES, axis: at}
    points, runs = [], []
    shape = {"axis": axis, "at": at}
    for name in dict.fromkeys(p["candidate"] for p in before):
        guess = {key: _continued([p for p in before if p["candidate"] == name], at, key) for key in _UNITS}
        model = 1e6 * guess["megabytes"] + 4 * setting["parameters"]
        if model > ROOM:
            points.append({**shape, "candidate": name, **guess, "estimated": True})
    work = mlp_of_size(
        setting["parameters"], int(setting["tasks"]), torch.device(options.device), int(setting["depth"])
    )
    left = {p["candidate"] for p in points}
    runs = [c for c in (*yardsticks(work), ours(work, "PCGrad")) if c.name not in left]
    if THEIRS not in left:
        with suppress(RuntimeError):  # it is not installed; the page says so
            runs += torchjd(work)
    if "classic PCGrad" not in left:
        with suppress(RuntimeError):
            runs += pytorch_optimizer(work)
    peaks = memory(runs)
    times = clock(runs, min(options.rounds, 5), options.seconds / 4)
    found: dict[str, list[dict[str, float]]] = {}
    for c in runs:
        name = THEIRS if c.name.startswith("TorchJD") else c.name.replace("pytorch_optimizer", "classic")
        figure = {"milliseconds": statistics.median(times[c.name]) * 1e3, "megabytes": peaks[c.name] / 1e6}
        found.setdefault(name, []).append(figure)
    # The fastest setting and the most frugal one: each curve may choose another.
    points += [
        {**shape, "candidate": name, **{key: min(f[key] for f in figures_) for key in _UNITS}}
        for name, figures_ in found.items()
    ]
    return points


THEIRS, _UNITS = "TorchJD's best", ("milliseconds", "megabytes")


def _continued(points: list[dict], at: float, key: str) -> float:
    """What a curve gives further on, straight through its last two points on logarithmic axes."""
    if len(points) < 2:
        return points[-1][key] if points else 0.0
    (x, y), (x2, y2) = ((p["at"], p[key]) for p in points[-2:])
    return y2 * (at / x2) ** (math.log(y2 / y) / math.log(x2 / x))


def curves(options: argparse.Namespace) -> list[dict]:
    points: list[dict] = []
    ranges = {"tasks": options.curve_tasks, "parameters": options.curve_sizes, "depth": options.curve_depths}
    for axis, places in ranges.items():
        for at in places:
            points += curve(axis, at, options, [p for p in points if p["axis"] == axis])
            print(f"curves: {axis} {at:g}", flush=True)
    return points


# ------------------------------------------------------------------------------------------------------------- main


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchjd", "pytorch_optimizer", "conflictfree"):
        if name not in missing():
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Run what the command line asks for, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which all candidates take turns, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which a table's cell ends, if it may")
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--candidates", nargs="+", help="by default all that are installed")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cheap", type=int, nargs="*", default=[4], help="numbers of tasks for the cheap modes")
    parser.add_argument("--curves", action="store_true", help="time and memory against m, parameters and depth")
    parser.add_argument("--only-curves", action="store_true", help="nothing else; other figures stay as they are")
    parser.add_argument("--curve-tasks", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--curve-sizes", type=float, nargs="*", default=[1e4, 1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--curve-depths", type=int, nargs="*", default=[1, 2, 4, 6, 12, 24, 48])
    parser.add_argument("--write", type=Path, help="write the page here, and the figures beside it as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # other libraries warn in every step
    for threads in options.threads:
        torch.set_num_threads(threads)
        run: dict[str, Any] = {
            "machine": machine(options.device),
            "device": torch.device(options.device).type,
            "threads": threads,
            "versions": versions(),
            "missing": missing(),
            "steps": [],
            "cheap": [],
        }
        for workload in [] if options.only_curves else options.workloads:
            for tasks in options.tasks:
                run["steps"] += measure(workload, tasks, options)
                print(page.progress(run["steps"]), flush=True)
                page.write(options.write, run)
            for tasks in options.cheap:
                run["cheap"] += cheap(workload, tasks, options)
            print(page.cheap_table(run["cheap"]), flush=True)
        if options.curves or options.only_curves:
            run["curves"], run["curves_base"] = curves(options), CURVES
        page.write(options.write, run)


if __name__ == "__main__":
    main()
