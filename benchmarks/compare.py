"""Is this tree faster than another commit? ``python -m benchmarks.compare COMMIT [--quick] [--pairs 30]``.

Both trees run in turns, each in a process of its own: the models and loops are this tree's for both, the package is
that of each. What is timed is ``backward`` alone, in processor time of one thread, several calls at a time where one is
short. Each pair of measurements gives a ratio, this tree over the other. A cell shows the median of these ratios and an
interval that contains the true median with 95 % or more (from the ranks, as in the sign test, whatever the
distribution). Processes start anew several times, since where a process puts its memory moves its times by a per cent
or two. The first gradients are compared too: "apart" is their distance, relative to their length.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import Workload, conv, mlp, pinn, transformer

ROOT = Path(__file__).resolve().parent.parent
# Name → what builds the model and its inputs for so many losses.
WORKLOADS: dict[str, Callable[[int], Any]] = {
    "MLP 2 × 64": lambda tasks: mlp(tasks, 64, 2),
    "MLP 5 × 128": lambda tasks: mlp(tasks, 128, 5),
    "PINN 3 × 20": lambda tasks: pinn(tasks, 20, 3, 500),
    "wide MLP 3 × 1024": lambda tasks: mlp(tasks, 1024, 3, 64),
    "convolutions": lambda tasks: conv(tasks, 16),
    "transformer block": lambda tasks: transformer(tasks, 128, 1),
}
METHODS = ("PCGrad", "UPGrad", "MGDA", "UncertaintyWeighter")
TASKS = (2, 4, 8)
# Quick: a first look in a minute or two, with wide intervals.
QUICK: dict[str, Any] = {"workloads": list(WORKLOADS)[:3], "tasks": [2, 4], "pairs": 10, "restarts": 2}
# A measurement takes at least so long.
SECONDS = 0.02

Cell = tuple[str, str, int]


# --------------------------------------------------------------------------------------------------------- worker


class Loop:
    """One cell in one process: a model, a method, and its training loop."""

    def __init__(self, workload: str, method: str, tasks: int) -> None:
        import gradsurgery  # of the tree that this process measures

        torch.manual_seed(0)
        self.work = Workload(*WORKLOADS[workload](tasks), torch.device("cpu"))
        base = torch.optim.SGD([*self.work.shared, *self.work.private], lr=1e-5)
        self.optimizer = getattr(gradsurgery, method)(base)

    def first(self) -> dict[str, Any]:
        """Some numbers of the first gradient, and the seconds that a later call takes."""
        self.call()
        grads = [p.grad for p in self.work.shared if p.grad is not None]
        sums = [float(g.double().sum()) for g in grads] + [float(g.double().norm()) for g in grads]
        for _ in range(2):
            self.optimizer.step()
            spent = self.call()
        return {"gradient": sums, "seconds": spent}

    def call(self) -> float:
        """Processor time of one ``backward``."""
        self.optimizer.zero_grad()
        losses, _ = self.work.model(self.work.x)
        start = time.process_time()
        self.optimizer.backward(losses)
        return time.process_time() - start

    def measure(self, calls: int) -> dict[str, Any]:
        """Processor time of so many calls, with a step after each."""
        gc.collect()
        gc.disable()
        try:
            spent = 0.0
            for _ in range(calls):
                spent += self.call()
                self.optimizer.step()
        finally:
            gc.enable()
        return {"seconds": spent}


def work() -> None:
    """Answer, line by line, what the other process asks: a cell to build, or a number of calls to time."""
    torch.set_num_threads(1)
    loop: Loop | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if isinstance(asked, list):
                loop = Loop(*asked)
                answer = loop.first()
            else:
                assert loop is not None
                answer = loop.measure(asked)
        except Exception as error:  # a tree may lack the method
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that measures one tree."""

    def __init__(self, tree: Path) -> None:
        path = os.pathsep.join(
            dict.fromkeys([str(tree), str(ROOT)])
        )  # the package from here, the benchmarks from there
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.compare", "--worker"], text=True, cwd=tree,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, what: object) -> dict[str, Any]:
        """Put a question and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


# -------------------------------------------------------------------------------------------------------- figures


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """An interval that contains the median with at least 95 %; the whole range if there are fewer than 6."""
    n, ranked = len(ratios), sorted(ratios)
    k = below = 0
    while 2 * (below + math.comb(n, k)) <= 0.05 * 2**n:
        below += math.comb(n, k)
        k += 1
    low = max(k - 1, 0)
    return ranked[low], ranked[n - 1 - low]


def apart(here: Sequence[float], there: Sequence[float]) -> float:
    if len(here) != len(there):
        return math.inf
    return math.dist(here, there) / max(math.hypot(*there), 1e-300)


def measure(head: Worker, base: Worker, cell: Cell, pairs: int) -> dict[str, Any]:
    """Pairs of measurements of one cell, in turns; which comes first changes from pair to pair."""
    told = {"this tree": head.ask(cell), "the other": base.ask(cell)}
    errors = {name: answer["error"] for name, answer in told.items() if "error" in answer}
    if errors:
        return {"errors": errors}
    calls = max(1, math.ceil(SECONDS / max(1e-6, min(answer["seconds"] for answer in told.values()))))
    ratios, seconds = [], []
    for pair in range(pairs):
        spent = {}
        for worker in (head, base) if pair % 2 else (base, head):
            spent[worker] = worker.ask(calls)["seconds"] / calls
        ratios.append(spent[head] / spent[base])
        seconds.append(spent[base])
    return {
        "ratios": ratios,
        "seconds": seconds,
        "apart": apart(told["this tree"]["gradient"], told["the other"]["gradient"]),
    }


def compare(base: Path, cells: Sequence[Cell], pairs: int, restarts: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """All cells, with their results so far joined over the restarts; each yielded in the last one."""
    found: dict[Cell, dict[str, Any]] = {}
    for turn in range(restarts):
        with ExitStack() as stack:
            workers = [Worker(ROOT), Worker(base)]
            for worker in workers:
                stack.callback(worker.close)
            for cell in cells:
                share = pairs * (turn + 1) // restarts - pairs * turn // restarts
                new = measure(workers[0], workers[1], cell, share)
                if turn and "ratios" in new:
                    new = {"apart": new["apart"], **{key: found[cell][key] + new[key] for key in ("ratios", "seconds")}}
                found[cell] = new
                if turn == restarts - 1:
                    yield cell, new


def line(cell: Cell, result: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{cell[0]:18}  {cell[1]:20}  {cell[2]}"
    if "errors" in result:
        return f"{head}  " + "; ".join(f"{tree}: {error}" for tree, error in result["errors"].items())
    low, high = interval(result["ratios"])
    word = "faster" if high < 1 else "slower" if low > 1 else ""
    return (
        f"{head}  {statistics.median(result['seconds']) * 1e3:9.3f}  {statistics.median(result['ratios']):6.3f}  "
        f"{low:.3f} to {high:.3f}  {result['apart']:.0e}  {word}".rstrip()
    )


# ----------------------------------------------------------------------------------------------------------- main


@contextmanager
def package_of(commit: str) -> Iterator[Path]:
    """The package as it was in a commit, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "gradsurgery"], cwd=ROOT, capture_output=True)
        if archive.returncode:
            raise SystemExit(f"{commit}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    """Compare what the command line names, and print a row a cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="COMMIT", nargs="?", help="what to compare this tree with")
    parser.add_argument("--quick", action="store_true", help="three small models, two numbers of losses, ten pairs")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tasks", type=int, nargs="+")
    parser.add_argument("--pairs", type=int, help="measurements of both trees a cell; by default 30")
    parser.add_argument("--restarts", type=int, help="how often the processes start; by default 5")
    parser.add_argument("--json", type=Path, help="write all ratios here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work()
        return
    if not options.base:
        parser.error("name a commit: make bench-compare BASE=HEAD~1")
    default = {"workloads": list(WORKLOADS), "tasks": TASKS, "pairs": 30, "restarts": 5} | (
        QUICK if options.quick else {}
    )
    chosen = {key: getattr(options, key) or value for key, value in default.items()}
    cells = list(itertools.product(chosen["workloads"], options.methods, chosen["tasks"]))
    kept, medians = [], []
    print(f"{'model':18}  {'method':20}  m  {'base, ms':>9}  {'ratio':>6}  95 % interval   apart", flush=True)
    with package_of(options.base) as base:
        for cell, result in compare(base, cells, chosen["pairs"], chosen["restarts"]):
            print(line(cell, result), flush=True)
            kept.append({"cell": cell, **result})
            if "ratios" in result:
                medians.append(statistics.median(result["ratios"]))
    if medians:
        print(f"geometric mean of {len(medians)} cells: {statistics.geometric_mean(medians):.3f}")
    if options.json:
        options.json.write_text(json.dumps(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
