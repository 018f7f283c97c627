"""What the mathematics costs: time of one ``combine`` against TorchJD's aggregators, with the distance from the truth.

    python -m benchmarks.solvers [--rounds 15] [--tasks 4 8 20] [--methods MGDA CAGrad] [--write docs/solvers.md]
    python -m benchmarks.solvers --again docs/solvers.md    writes the pages from the figures beside them
    python -m benchmarks.solvers --samples docs/solvers.md  measures one loss per sample anew, and writes the pages

Both libraries get the same matrices, in turn, in one process. Figures are medians of ratios over rounds. The exact
answers are those of this library for the rows in float64; before anything is timed they are compared with the
reference answers that `gradsurgery.testing` ships.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import gradsurgery
from gradsurgery import testing

Call = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """One method in both libraries.

    Attributes:
        ours: Builds ours around an optimizer; called with `reduction`.
        peer: Builds theirs for m tasks, from the module `torchjd.aggregation`.
        reduction: In which both give the same length.
        target: Least ratio of times, by number of tasks at least.
        drawn: The answer depends on a random draw, so there is no one exact answer.
        by_direction: Lengths differ by convention; unit vectors are compared.
        least: Smallest number of tasks.
        reference: Name of the reference answers.
    """

    ours: Callable[..., gradsurgery.Surgery]
    peer: Callable
    reduction: str = "mean"
    target: tuple[tuple[int, float], ...] = ((0, 1.0),)
    drawn: bool = False
    by_direction: bool = False
    reference: str | None = None


METHODS = {
    "MGDA": Method(gradsurgery.MGDA, lambda jd, m: jd.MGDA(), target=((0, 10),), reference="MGDA"),
    "CAGrad": Method(
        lambda base, **switches: gradsurgery.CAGrad(base, c=0.4, rescale=0, **switches),
        lambda jd, m: jd.CAGrad(c=0.4),
        target=((0, 10),),
        reference="CAGrad c=0.4",
    ),
    "NashMTL": Method(
        lambda base, **switches: gradsurgery.NashMTL(base, scale="paper", **switches),
        lambda jd, m: jd.NashMTL(n_tasks=m, max_norm=0.0),
        "sum",
        target=((0, 10),),
        reference="Nash-MTL",
    ),
    "FairGrad": Method(
        lambda base, **switches: gradsurgery.FairGrad(base, alpha=1.0, scale="paper", **switches),
        lambda jd, m: jd.FairGrad(alpha=1.0),
        "sum",
        target=((0, 7),),
        reference="FairGrad alpha=1.0",
    ),
    "PCGrad": Method(gradsurgery.PCGrad, lambda jd, m: jd.PCGrad(), "sum", target=((4, 3), (8, 5)), drawn=True),
    "UPGrad": Method(gradsurgery.UPGrad, lambda jd, m: jd.UPGrad(), target=((0, 1.5),), reference="UPGrad"),
    "DualProj": Method(gradsurgery.DualProj, lambda jd, m: jd.DualProj(), reference="DualProj"),
    "IMTLG": Method(gradsurgery.IMTLG, lambda jd, m: jd.IMTLG(), reference="IMTL-G"),
    "ConFIG": Method(gradsurgery.ConFIG, lambda jd, m: jd.ConFIG(), "sum", reference="ConFIG"),
    "AlignedMTL": Method(gradsurgery.AlignedMTL, lambda jd, m: jd.AlignedMTL(), reference="Aligned-MTL min"),
    "GradVac": Method(
        lambda base, **switches: gradsurgery.GradVac(base, beta=0.5, **switches),
        lambda jd, m: jd.GradVac(beta=0.5),
        "sum",
        drawn=True,
    ),
    "Krum": Method(
        lambda base, **switches: gradsurgery.Krum(base, n_byzantine=1, **switches),
        lambda jd, m: jd.Krum(n_byzantine=1),
        drawn=True,  # not by a draw: theirs adds up distances and ours their squares, so both can be right
    ),
}


def any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def matrices(m: int, n: int, count: int, seed: int = 0) -> list[Tensor]:
    """Rows in conflict that still have a common descent direction.

    They lie near a space of m + 2 dimensions, so cosines are as wide as 1/√m whatever n is, and share a positive first
    entry there. Row lengths vary by a factor of three.
    """
    rng = np.random.default_rng([seed, m, n])
    found = []
    for _ in range(count):
        z = rng.standard_normal((m, m + 2))
        z[:, 0] = np.abs(z[:, 0]) + 0.3
        z *= 3 ** rng.uniform(-0.5, 0.5, (m, 1))
        if n > m + 2:
            z = z @ np.linalg.qr(rng.standard_normal((n, m + 2)))[0].T + 1e-3 * rng.standard_normal((m, n))
        found.append(torch.from_numpy(z[:, :n] if n < m + 2 else z))
    return found


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def spent(call: Call, rows: list[Tensor], repeats: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        for j in rows:
            call(j)
    return (time.perf_counter() - start) / (repeats * len(rows))


def measure(name: str, m: int, n: int, dtype: torch.dtype, rounds: int, jd: object | None) -> dict:
    """Time and error of one method in both libraries on the same matrices."""
    method = METHODS[name]
    exact_rows = matrices(m, n, 5)
    rows = [j.to(dtype) for j in exact_rows]
    ours = method.ours(any_optimizer(), reduction=method.reduction).combine
    calls: dict[str, Call] = {"ours": ours}
    if jd is not None:
        calls["theirs"] = method.peer(jd, m)
    errors: dict[str, float | None] = {}
    times: dict[str, list[float]] = {who: [] for who in calls}
    repeats = {}
    for who, call in calls.items():
        pairs = [(call(j), ours(j.double())) for j in rows]
        errors[who] = None if method.drawn else statistics.median(distance(d, exact) for d, exact in pairs)
        repeats[who] = max(1, int(0.01 / (spent(call, rows, 1) * len(rows))))
    for _ in range(rounds):
        for who, call in calls.items():
            times[who].append(spent(call, rows, repeats[who]))
    result = {
        "method": name, "m": m, "n": n, "dtype": str(dtype).removeprefix("torch."),
        "ours_us": statistics.median(times["ours"]) * 1e6, "ours_error": errors["ours"],
    }  # fmt: skip
    if jd is not None:
        ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        target = [t for least, t in method.target if m >= least][-1]
        result |= {
            "theirs_us": statistics.median(times["theirs"]) * 1e6, "theirs_error": errors["theirs"],
            "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]],
            "target": target, "met": statistics.median(ratios) >= target,
        }  # fmt: skip
    return result


def of_samples(m: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows, as many as there are samples in a batch: (m, rank)."""
    return torch.from_numpy(np.random.default_rng([m, rank]).standard_normal((m, rank))).to(dtype)


def measure_samples(name: str, m: int, times_m: int, rounds: int = 5) -> dict:
    """Processor time of one method on m random rows of length ``times_m`` m; the least of some rounds."""
    rows = of_samples(m, times_m * m)
    call = METHODS[name].ours(any_optimizer(), reduction=METHODS[name].reduction).combine
    call(rows)
    spent_each = []
    for _ in range(rounds):
        start = time.process_time()
        call(rows)
        spent_each.append(time.process_time() - start)
    return {"method": name, "m": m, "length": times_m, "seconds": min(spent_each)}


def samples_table(results: list[dict]) -> str:
    """A Markdown table of milliseconds, methods by number and length of rows."""
    columns = sorted({(r["length"], r["m"]) for r in results})
    lines = [
        "| method | " + " | ".join(f"{m} × {length * m}" for length, m in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in dict.fromkeys(r["method"] for r in results):
        cells = {(r["length"], r["m"]): f"{r['seconds'] * 1e3:.1f}" for r in results if r["method"] == name}
        lines.append(f"| {name} | " + " | ".join(cells[column] for column in columns) + " |")
    return "\n".join(lines)


def check() -> None:
    """What is timed must be right: every reference answer, in float64."""
    for method in METHODS.values():
        if method.reference is not None:
            optimizer = method.ours(any_optimizer(), reduction=method.reduction)
            testing.check_reference(
                lambda rows, losses, o=optimizer: o.combine(torch.from_numpy(rows), losses=losses).numpy(),
                method.reference,
            )


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def table(results: list[dict]) -> str:
    """A Markdown table of both libraries."""
    lines = [
        "| method | m | n | dtype | ours, µs | TorchJD, µs | ratio (quartiles) | target | our error | their error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        low, high = r["quartiles"]
        lines.append(
            f"| {r['method']} | {r['m']} | {r['n']} | {r['dtype']} | {r['ours_us']:.0f} | {r['theirs_us']:.0f} | "
            f"{r['ratio']:.1f} ({low:.1f}–{high:.1f}) | {r['target']:g}{'' if r['met'] else ', missed'} | "
            f"{_error(r['ours_error'])} | {_error(r['theirs_error'])} |"
        )
    return "\n".join(lines)


def wide_table(results: list[dict]) -> str:
    """A Markdown table of milliseconds per call, methods by number of tasks."""
    counts = sorted({r["m"] for r in results})
    lines = [
        "| method | " + " | ".join(f"m = {m}" for m in counts) + " |",
        "| --- |" + " --- |" * len(counts),
    ]
    for name in dict.fromkeys(r["method"] for r in results):
        cells = {r["m"]: f"{r['ours_us'] / 1e3:.2f}" for r in results if r["method"] == name}
        lines.append(f"| {name} | " + " | ".join(cells[m] for m in counts) + " |")
    return "\n".join(lines)


PAGE = """# Solvers

What the mathematics costs without a model: inner products, weights and direction. One call of `combine` is compared
with one call of TorchJD's aggregator, on the same matrices, in the same process, in turns.

{short}
![TorchJD's time divided by this library's, for each method and size](_static/solvers/solvers.png)

*One dot per size and dtype. All numbers are in [the tables](solvers-tables.md).*

## How it was measured

*Error* is the distance from the exact answer for the same rows, relative to its length; the tables give the median over
the matrices. In float32 it cannot be smaller than the rounding of the result. The exact answer is this library's in
float64; before anything is timed, it is checked against the reference answers of `gradsurgery.testing`. Methods that
draw a random order have no exact answer. Neither does Krum, which adds squared distances here and plain distances in
TorchJD.

MGDA, CAGrad, UPGrad, DualProj and PCD start from a guess: that of `scipy.optimize.nnls`, or, from 48 losses on, that of
a block pivoting method, which UPGrad runs for all losses at once. The result does not depend on the guess. That
matters, because SciPy releases from 1.15 on can return a point that is not optimal without an error, and releases 1.12
to 1.14 use the normal equations and may never terminate. So this library checks the optimality conditions to rounding
error. If they do not hold, its own active-set solver continues from the guess; if that does not converge either, the
report carries the flag "not-converged".

Measured on {machine}, on the CPU with one thread, with torch {torch}, TorchJD {torchjd} and Python {python}.
"""

TABLES = """---
hide-toc: true
---

# Solvers: the tables

The full tables behind [the page on solvers](solvers.md). `make bench-solvers ARGS="--write docs/solvers.md"` measures
and writes both pages. *Ratio*: TorchJD's time divided by this library's, median over {rounds} rounds. The rows
conflict, but a common descent direction exists; `n` is their length.

## Both libraries

{table}

## Up to 128 tasks

Milliseconds of one call, rows of length {wide} in float64.

{large}

## One loss per sample

Milliseconds of processor time for one call on m random rows of length 2m and 4m, in float64 with one thread: the
shortest of five calls, on a machine busy with other work, which makes them longer. Measured after the tables above,
with `make bench-solvers ARGS="--samples docs/solvers.md"`, once the solvers had their new start for 48 losses and more.

{samples}
"""


def short(pairs: list[dict]) -> str:
    """The first sentences of the page.

    Args:
        pairs: What was measured.

    Returns:
        A list in Markdown.
    """
    ratios = [pair["ratio"] for pair in pairs]
    slower = dict.fromkeys(pair["method"] for pair in pairs if pair["ratio"] < 1)
    missed = dict.fromkeys(pair["method"] for pair in pairs if not pair["met"])
    # In float64 the exact answer is ours.
    single = [pair for pair in pairs if pair["dtype"] == "float32" and pair["ours_error"] is not None]
    ours, theirs = (max((pair[key] for pair in single), default=0.0) for key in ("ours_error", "theirs_error"))
    return "".join(
        f"* {sentence}\n"
        for sentence in (
            f"TorchJD takes {statistics.median(ratios):.1f} times as long in the median of {len(pairs)} settings; the "
            f"range is {min(ratios):.1f} to {max(ratios):.0f}.",
            f"Methods for which this library is slower: {', '.join(slower) or 'none'}. Methods for which it misses its "
            f"own speed target: {', '.join(missed) or 'none'}.",
            f"The largest relative error in float32, over the methods with an exact answer, is {ours:.0e} in this "
            f"library and {theirs:.0e} in TorchJD.",
        )
    )


def pages(data: dict) -> tuple[str, str]:
    """Both pages.

    Args:
        data: What is kept as JSON.

    Returns:
        Markdown of the first and the second.
    """
    run = data["run"]
    first = PAGE.format(**run, short=short(data["pairs"]))
    return first, TABLES.format(
        **run, table=table(data["pairs"]), large=wide_table(data["large"]), samples=samples_table(data["samples"])
    )


def write(path: Path, data: dict) -> None:
    """Write both pages and the picture.

    Args:
        path: The first page.
        data: What is kept as JSON.
    """
    from benchmarks import two_pages

    ratios: dict[str, list[float]] = {}
    for pair in data["pairs"]:
        ratios.setdefault(pair["method"], []).append(pair["ratio"])
    ranked = dict(sorted(ratios.items(), key=lambda item: -statistics.median(item[1])))
    figure = two_pages.dots(ranked, "TorchJD's time / this library's time", "right of 1: this library is faster")
    two_pages.save(path, *pages(data), figure)


def save(path: Path, data: dict) -> None:
    """Keep what was measured as JSON beside the first page, and write the pages."""
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    write(path, data)


def all_samples() -> list[dict]:
    """One loss per sample, by all methods."""
    return [measure_samples(name, m, length) for name in METHODS for length in (2, 4) for m in (64, 256, 512)]


def main() -> int:
    """Run what the command line asks for, and print or write the tables.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which both libraries take turns")
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--columns", type=int, nargs="+", default=[10, 1000], help="lengths of the rows")
    parser.add_argument("--large", type=int, nargs="*", default=[32, 64, 128], help="task counts of the second table")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--write", type=Path, help="write the page here, and the figures beside it as JSON")
    parser.add_argument("--again", type=Path, help="write this page from the figures beside it, and measure nothing")
    parser.add_argument("--samples", type=Path, help="measure one loss per sample, and write this page again")
    options = parser.parse_args()
    if options.samples:
        torch.set_num_threads(1)
        check()
        kept = json.loads(options.samples.with_suffix(".json").read_text(encoding="utf-8"))
        save(options.samples, kept | {"samples": all_samples()})
        return 0
    if options.again:
        write(options.again, json.loads(options.again.with_suffix(".json").read_text(encoding="utf-8")))
        return 0
    torch.set_num_threads(1)
    try:
        jd = testing.import_peer("torchjd", "torchjd.aggregation")
    except RuntimeError as error:
        print(error)
        return 2
    warnings.simplefilter("ignore")  # their solvers warn of inaccurate solutions
    check()
    results = []
    for name in options.methods:
        first = len(results)
        for m in options.tasks:
            for n in options.columns:
                for dtype in (torch.float32, torch.float64):
                    results.append(measure(name, m, max(n, m + 2), dtype, options.rounds, jd))
        print(table(results[first:]), flush=True)
    wide = 1000
    large = [measure(name, m, wide, torch.float64, 3, None) for name in options.methods for m in options.large]
    if large:
        print(wide_table(large))
    if options.write:
        run = {
            "rounds": options.rounds,
            "machine": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "torchjd": importlib.metadata.version("torchjd"),
            "python": platform.python_version(),
            "wide": wide,
        }
        save(options.write, {"run": run, "pairs": results, "large": large, "samples": all_samples()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
