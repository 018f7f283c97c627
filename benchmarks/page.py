"""The page on performance: tables and pictures from what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import engines
from benchmarks.two_pages import beside
from benchmarks.workloads import WORKLOADS

WEIGHTERS = ("FixedWeighter", "UncertaintyWeighter", "GradNormWeighter")

PAGE = """# Performance

What the backward phase of a step costs, from the losses to `.grad`. Time is relative to the *floor*: m bare backward
passes for m losses.

{short}
{picture}All figures are in [the tables](performance-tables.md).

## How it was measured

*The floor* is m bare `torch.autograd.grad` calls over the same parameters, and nothing is done with the result. Any
method that needs the gradient of each loss costs at least that much if it differentiates the losses one by one. The
*plain sum* is one backward pass. All candidates take turns in one process, in a different order each round; the first
round is a warm-up and does not count. Before anything is timed, every direction is compared with a literal computation
(m backward passes, inner products in float64). This library's must agree to within 1e-4 of its length or, where the
terms of the sum cancel, to within 1e-5 of their lengths.

A cell such as `0.72 / 0.70 (0.68–0.77)` reads: median over the rounds of the time relative to the floor of the same
round / ratio of the shortest times / middle half of the rounds. Time is wall-clock time, except with one CPU thread:
there it is processor time, which excludes what other programs use meanwhile. *Memory* is the peak of the backward phase
beyond the model and the graph of the losses, in multiples of the size of the shared parameters. The gradient of the
plain sum has that size once.

`PCGrad` and the other methods use the default engine. It avoids per-loss weight gradients in layers whose shapes make
that cheaper; `engine="rows"` always forms them; `engine="blocks"` forms them for one part of the model at a time and
ends with one more backward pass. All methods act on the trunk here; the heads are private. `GradNormWeighter` measures
gradient norms at the last shared weight, with m short passes and a full one.

TorchJD's settings: *sequential* and *vmapped* are `autojac.backward` with `parallel_chunk_size` 1 and None;
*mtl_backward* is sequential; *Gramian accumulation* is sequential with `optimize_gramian_computation=True`; *autogram*
is its engine for Gramians, followed by a weighted backward pass. All of them run its PCGrad.

The directions of the other libraries are compared too, and the tables mark each one that is off by more than a
thousandth of its length. Two reasons are known. `conflictfree` solves a least squares problem over all parameters with
torch's default cut-off, machine precision times the number of parameters; in float32 and with millions of parameters
that discards true directions. TorchJD's autogram engine ignores what second derivatives contribute.

Workloads: {workloads}.
"""

CAPTION = """*The number beside a curve is its exponent: 1 means that the cost is proportional.*"""

TABLES = """---
hide-toc: true
---

# Performance: the tables

The full tables behind [the page on performance](performance.md). `make bench ARGS="--curves --write
docs/performance.md"` measures and writes both pages, in one run or in several that complement each other;
`performance.json` beside this page has all numbers. A cell such as `0.72 / 0.70 (0.68–0.77)` reads: median over the
rounds of the time relative to the floor of the same round / ratio of the shortest times / middle half of the rounds.
"""


def progress(rows: list[dict]) -> str:
    """What is known of the last workload."""
    return workload_table(rows, rows[-1]["workload"])


def write(path: Path | None, run: dict[str, Any]) -> None:
    """Add a run to the figures of earlier ones, and write the page anew.

    Args:
        path: Where the page is to be; None: nowhere.
        run: What was measured.
    """
    if path is None:
        return
    data = path.with_suffix(".json")
    old = json.loads(data.read_text()) if data.exists() else {}
    runs = old.get("runs", []) if isinstance(old, dict) else []

    def identity(r: dict[str, Any]) -> tuple:
        return r["device"], r["machine"], r["threads"]

    before = next((r for r in runs if identity(r) == identity(run)), {})
    cells = {(r["workload"], r["tasks"]) for r in run["steps"]}
    modes = {(r["workload"], r["tasks"]) for r in run["cheap"]}
    merged = {**before, **run}
    merged["steps"] = [r for r in before.get("steps", []) if (r["workload"], r["tasks"]) not in cells] + run["steps"]
    merged["cheap"] = [r for r in before.get("cheap", []) if (r["workload"], r["tasks"]) not in modes] + run["cheap"]
    runs = sorted([r for r in runs if identity(r) != identity(run)] + [merged], key=identity)
    data.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    again(path)


def again(path: Path) -> None:
    """Write both pages and their pictures from the figures beside them.

    Args:
        path: The first page.
    """
    runs = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["runs"]
    for r in runs:
        if r.get("curves"):
            draw(r["curves"], curves_picture(r, path))
    first, tables = pages(runs, path)
    path.write_text(first, encoding="utf-8")
    beside(path).write_text(tables, encoding="utf-8")


def pages(runs: list[dict[str, Any]], path: Path) -> tuple[str, str]:
    """Both pages, from what is kept as JSON.

    Args:
        runs: What was measured, a run for each machine and number of threads.
        path: The first page.

    Returns:
        Markdown of the first and the second.
    """
    workloads = "; ".join(f"*{name}*: {text}" for name, (text, _) in WORKLOADS.items())
    picture = ""
    for r in [r for r in runs if r.get("curves")][:1]:
        along = [AXES[axis] for axis in AXES if axis in {p["axis"] for p in r["curves"]}]
        shown = f"Time and memory against {', '.join(along)}"
        picture = f"![{shown}]({curves_picture(r, path).relative_to(path.parent).as_posix()})\n\n{CAPTION}\n\n"
        picture += exponent_text(r)
    text = PAGE.format(workloads=workloads, short="".join(map(short, runs)), picture=picture)
    if all(r["device"] == "cpu" for r in runs):
        text += "\nNothing here was measured on a GPU. `--device cuda` runs the same there.\n"
    text += "".join(f"\n## {title(r)}, in short\n\n{summary(r['steps'])}" for r in runs if r["steps"])
    if (grid := path.with_name("engines.json")).exists():
        text += engines.section(json.loads(grid.read_text(encoding="utf-8")))
    if (sizes := path.with_name("middle.json")).exists():
        text += middle(json.loads(sizes.read_text(encoding="utf-8")))
    if compiled_figures(path).exists():
        text += compiled(json.loads(compiled_figures(path).read_text(encoding="utf-8")))
    return text, TABLES + "".join(section(r, path) for r in runs)


def middle(results: dict[str, Any]) -> str:
    """What steps of models of middle size cost, as a section of the first page.

    Args:
        results: What ``benchmarks.middle`` has measured.

    Returns:
        Markdown.
    """
    counts = sorted({found["m"] for found in results["cells"]})
    by = {(found["model"], found["m"]): found for found in results["cells"]}
    head = ["model", "at most", *(f"m = {m}" for m in counts)]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: |" + " ---: |" * len(counts)]
    for name, most in dict.fromkeys((found["model"], found["most"]) for found in results["cells"]):
        shown = [
            f"{found['rows']['to_floor']:.2f}, {found['auto']['to_floor']:.2f}" if (found := by.get((name, m))) else "–"
            for m in counts
        ]
        lines.append(f"| {name} | {most:.2f} | {' | '.join(shown)} |")
    run = results["run"]
    return (
        f"""
## Models of middle size

The backward phase of a step of `PCGrad` relative to m bare `torch.autograd.grad` calls over the same parameters, with
`engine="rows"` and with the default engine, beside the ratio that we aim at. Images have 16² pixels in patches of 4²
for the vision transformer and 64² for the ResNet; sequences have 24 steps. Measured by `make bench-middle`: after a
comparison of the gradients with a literal computation the candidates take turns, and the median of the ratios of
processor time of the same round is shown, one thread; a dash: not measured yet. {run["machine"]}, torch {run["torch"]},
{run["beside"]}.

"""
        + "\n".join(lines)
        + "\n"
    )


def compiled_figures(path: Path) -> Path:
    """Where the figures of compiled models are kept.

    Args:
        path: The first page.

    Returns:
        A file beside it.
    """
    return path.with_name("compiled.json")


def compiled(run: dict[str, Any]) -> str:
    """What steps of compiled models cost, as a section of the first page.

    Args:
        run: What ``benchmarks.compiled`` has measured.

    Returns:
        Markdown.
    """
    slow = {
        model: next(r["to_plain"] for r in run["rows"] if (r["model"], r["candidate"]) == (model, "PCGrad"))
        for model in dict.fromkeys(r["model"] for r in run["rows"])
    }
    where = f"{run['machine']}; torch {run['versions']['torch']}, backend {run['backend']}, mode {run['mode']}"
    if run["load"] > 1.5:
        where += f", while other programs were running (load {run['load']:.1f})"
    least, most = min(slow.values()), max(slow.values())
    m = run["tasks"]
    return f"""
## Compiled models

Time of a whole step, forward pass and SGD included, of a model compiled together with its {m} losses, relative to a
step of the plain sum of the same compiled model: median of paired ratios, and the middle half of the rounds. Except
where a row says otherwise, all candidates run the same graph, compiled once and without graph breaks.

A step of `PCGrad` takes {least:.2f} to {most:.2f} times as long as one of the plain sum, because it makes {m} backward
passes through the whole model: in a compiled model a pass cannot skip the heads of the other losses, and no engine can
see which layers' weight gradients it could avoid. "defer" stands for `nonfinite="defer"`. On the CPU there is no device
to wait for, so it only adds cost: the weights are computed in torch rather than numpy, and the gradients pass through a
selection.

Measured with `make bench-compiled` on {where}.

{compiled_table(run)}"""


def compiled_table(run: dict[str, Any]) -> str:
    """The table of that section.

    Args:
        run: What was measured.

    Returns:
        Markdown: a row for each candidate, a column for each model.
    """
    models = list(dict.fromkeys(r["model"] for r in run["rows"]))
    names = list(dict.fromkeys(r["candidate"] for r in run["rows"]))
    by = {(r["model"], r["candidate"]): r for r in run["rows"]}
    lines = [f"|  | {' | '.join(models)} |", "| --- |" + " ---: |" * len(models)]
    for name in names:
        cells = [by[model, name] for model in models]
        shown = [f"{c['to_plain']:.2f} ({c['spread'][0]:.2f}–{c['spread'][1]:.2f})" for c in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    plain = [f"{by[model, names[0]]['milliseconds']:.2f} ms" for model in models]
    return "\n".join([*lines, f"| {names[0]}, in milliseconds | {' | '.join(plain)} |"]) + "\n"


def short(run: dict[str, Any]) -> str:
    """The first sentences of the page: over all workloads and numbers of losses."""
    choices = {
        "`PCGrad`": "PCGrad",
        '`PCGrad(..., engine="blocks")`': 'PCGrad, engine="blocks"',
        "TorchJD's PCGrad, in its fastest setting for each case,": "TorchJD",
    }
    lines = []
    for name, start in choices.items():
        cells: dict[tuple[str, int], dict] = {}
        for r in run["steps"]:
            chosen = r["candidate"].startswith(start) if start == "TorchJD" else r["candidate"] == start
            place = r["workload"], r["tasks"]
            if chosen and "shortest" in r and r["to_floor"] < cells.get(place, {"to_floor": np.inf})["to_floor"]:
                cells[place] = r
        if cells:
            times, memory = ([r[key] for r in cells.values()] for key in ("to_floor", "memory"))
            lines.append(
                f"* {title(run)}: {name} takes {np.median(times):.2f} times the floor in the median of {len(times)} "
                f"cases (range {min(times):.2f} to {max(times):.2f}). Median memory: {np.median(memory):.1f} times the "
                "size of the shared parameters.\n"
            )
    return "".join(lines)


def title(run: dict[str, Any]) -> str:
    """Where a run was made."""
    return f"{run['device'].upper()}, {run['threads']} thread{'s' * (run['threads'] > 1)}"


def section(run: dict[str, Any], path: Path) -> str:
    used = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    text = f"\n## {title(run)}\n\nMeasured on {run['machine']}, with {used}.\n"
    if run["missing"]:
        text += f"\nNot installed, and so not in the tables: {', '.join(run['missing'])}.\n"
    rows = run["steps"]
    rounds = [r["rounds"] for r in rows if "rounds" in r]
    if rounds:
        text += f"\nEach cell has {min(rounds)} to {max(rounds)} rounds: fewest where a round takes long, and where a "
        text += "candidate takes more than four times the floor.\n"
    if absent := [name for name in WORKLOADS if name not in {r["workload"] for r in rows}]:
        text += f"\nNot measured here: {', '.join(absent)}.\n"
    if rows:
        for name in dict.fromkeys(r["workload"] for r in rows):
            text += f"\n### {name[0].upper()}{name[1:]}\n\n{workload_table(rows, name)}\n"
        text += f"\n### Weighting methods\n\nTime relative to the plain sum.\n\n{weighter_table(rows)}\n"
    if run["cheap"]:
        text += "\n### Cheap modes\n\n" + cheap_text(run["device"]) + cheap_table(run["cheap"]) + "\n"
    if run.get("curves"):
        text += "\n### Against losses, parameters and layers\n\n" + curve_text(run)
    return text


def grid(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def by_task(rows: list[dict], name: str) -> tuple[list[int], dict[str, dict[int, dict]]]:
    """Numbers of tasks, and for each candidate its row for each of them."""
    here = [r for r in rows if r["workload"] == name]
    found: dict[str, dict[int, dict]] = {}
    for r in here:
        found.setdefault(r["candidate"], {})[r["tasks"]] = r
    return sorted({r["tasks"] for r in here}), found


def ratio(r: dict[str, Any]) -> str:
    low, high = r["spread"]
    return f"{r['to_floor']:.2f} / {r['shortest']:.2f} ({low:.2f}–{high:.2f})"


def workload_table(rows: list[dict], name: str) -> str:
    tasks, found = by_task(rows, name)
    lines, notes = [], []
    for candidate, cells in found.items():
        line = [candidate]
        for m in tasks:
            r = cells.get(m)
            if r is None or "failed" in r:
                line.append("–")
                if r is not None:
                    notes.append(f"{candidate} is left out at m = {m}: {r['failed']}")
                continue
            line.append(f"{r['milliseconds']:.1f} ms" if candidate == "floor" else ratio(r))
            if (r["distance"] or 0) > 1e-3:
                line[-1] += "\\*"
                notes.append(f"\\* {candidate}, m = {m}: its direction is off by {r['distance']:.1e} of its length.")
        line += [f"{cells[m]['memory']:.2f}" if m in cells and "memory" in cells[m] else "–" for m in tasks]
        lines.append(line)
    head = ["candidate", *(f"time, m = {m}" for m in tasks), *(f"memory, m = {m}" for m in tasks)]
    return "\n\n".join([grid(head, lines), *dict.fromkeys(notes)])


def summary(rows: list[dict]) -> str:
    """Shortest times relative to the floor: ours, TorchJD's best setting, the classic implementation."""

    def best(cells: list[dict]) -> dict | None:
        cells = [r for r in cells if "shortest" in r]
        return min(cells, key=lambda r: r["to_floor"], default=None)

    lines = []
    everything = sorted({r["tasks"] for r in rows})
    for name in dict.fromkeys(r["workload"] for r in rows):
        choices: dict[str, Callable[[str], bool]] = {
            "PCGrad": lambda c: c == "PCGrad",
            "PCGrad, blocks": lambda c: c == 'PCGrad, engine="blocks"',
            "TorchJD, fastest setting": lambda c: c.startswith("TorchJD"),
            "classic PCGrad": lambda c: c.startswith("pytorch_optimizer"),
        }
        for label, chosen in choices.items():
            line = [name, label]
            for m in everything:
                r = best([r for r in rows if (r["workload"], r["tasks"]) == (name, m) and chosen(r["candidate"])])
                setting = f" ({r['candidate'].split(', ')[1]})" if r and "TorchJD" in label else ""
                line.append("–" if r is None else f"{r['to_floor']:.2f}, {r['memory']:.1f}{setting}")
            if set(line[2:]) != {"–"}:
                lines.append(line)
    text = "Median time relative to the floor, and memory in multiples of the size of the shared parameters.\n\n"
    return text + grid(["workload", "", *(f"m = {m}" for m in everything)], lines) + "\n"


def weighter_table(rows: list[dict]) -> str:
    tasks = sorted({r["tasks"] for r in rows})
    lines = []
    for name in dict.fromkeys(r["workload"] for r in rows):
        for weighter in WEIGHTERS:
            cells = {
                r["tasks"]: f"{r['to_plain']:.2f} / {r['shortest_to_plain']:.2f}"
                for r in rows
                if r["workload"] == name and r["candidate"] == weighter
            }
            if cells:
                lines.append([name, weighter, *(cells.get(m, "–") for m in tasks)])
    return grid(["workload", "method", *(f"m = {m}" for m in tasks)], lines)


CHEAP = """Ways to spend less time or memory, with their cost and their error. Time is the mean over four steps. Memory
is in multiples of the size of the shared parameters and includes some megabytes for inner products. *Error* is the
distance from the exact direction relative to its length: median and worst over twelve training steps, each with a new
batch. `features=` takes inner products at the shared representation, which makes it a different method (such as
MGDA-UB), not an approximation of this one. `every=4` computes weights in every fourth step and reuses them in between.
`row_dtype=bfloat16` rounds each row after its backward pass; compare it with `engine="rows"`, which holds the same rows
unrounded. `streaming=True` holds two gradients for any m; it projects each gradient against the sum of the earlier
ones, not against each of them.
{device}
"""

ROW_DEVICE = {
    "cpu": """`row_device="cpu"` keeps the rows of a model on an accelerator in host memory. It is not measured here,
where the model is in host memory itself.
""",
    "other": """`row_device="cpu"` keeps rows in host memory, which is not counted: memory here is that of the device.
""",
}


def cheap_text(device: str) -> str:
    return CHEAP.format(device=ROW_DEVICE["cpu" if device == "cpu" else "other"])


def cheap_table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        errors = r["errors"]
        error = f"{np.median(errors):.1g}, {max(errors):.1g}" if errors else "exact"
        if errors and max(errors) >= 0.01:
            error = f"{np.median(errors):.3f}, {max(errors):.3f}"
        lines.append([r["workload"], str(r["tasks"]), r["mode"], ratio(r), f"{r['to_exact']:.2f}", f"{r['memory']:.2f}",
                      error])  # fmt: skip
    return grid(["workload", "m", "mode", "time / floor", "time / exact PCGrad", "memory", "error"], lines)


# ---------------------------------------------------------------------------------------------------------- pictures


def exponents(points: list[dict], key: str) -> dict[str, dict[str, float]]:
    """Slopes of the logarithms, by least squares: for each axis and candidate."""
    found: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(p["axis"] for p in points):
        for candidate in dict.fromkeys(p["candidate"] for p in points):
            mine = [
                (p["at"], p[key])
                for p in points
                if (p["axis"], p["candidate"]) == (axis, candidate) and not p.get("estimated")
            ]
            if len(mine) > 1:
                x, y = np.log(np.array(mine)).T
                found.setdefault(axis, {})[candidate] = float(np.polyfit(x, y, 1)[0])
    return found


def curves_picture(run: dict[str, Any], path: Path) -> Path:
    """The picture of a run, for the page at `path`."""
    return path.parent / "_static" / "performance" / f"{run['device']}-{run['threads']}.png"


#: What the curves go along, and how it is called.
AXES = {"tasks": "losses (m)", "parameters": "parameters", "depth": "layers"}


def curve_text(run: dict[str, Any]) -> str:
    points = run["curves"]
    text = _base(run)
    if any(p.get("estimated") for p in points):
        text += 'What would take more than 16 GiB was not run: it follows from the two points before, and has a "≈".\n'
    for axis in dict.fromkeys(p["axis"] for p in points):
        here = [p for p in points if p["axis"] == axis]
        places = sorted({p["at"] for p in here})
        by = {(p["candidate"], p["at"]): p for p in here}
        lines = [[c, *(_point(by.get((c, at))) for at in places)] for c in dict.fromkeys(p["candidate"] for p in here)]
        text += f"\nMilliseconds and megabytes against {AXES[axis]}:\n\n"
        text += grid(["", *(f"{at:,.0f}" for at in places)], lines) + "\n"
    return text


def _point(found: dict | None) -> str:
    if found is None:
        return "–"
    return f"{'≈ ' * bool(found.get('estimated'))}{found['milliseconds']:.3g}, {found['megabytes']:.3g}"


def _base(run: dict[str, Any]) -> str:
    """What the curves have in common. The first ones were made with 4 layers."""
    base = run.get("curves_base", {"tasks": 4, "parameters": 1e6, "depth": 4})
    return (
        f"An MLP, batch 128, of which one number varies; else {base['tasks']} losses, {base['parameters'] / 1e6:g} "
        f"million parameters and\n{base['depth']} layers. TorchJD's best: at each point its fastest setting, or the "
        "one with least memory.\n"
    )


def exponent_text(run: dict[str, Any]) -> str:
    """What the picture shows, in numbers.

    Args:
        run: A run with curves.

    Returns:
        Markdown: the slopes of time and memory for each candidate and axis.
    """
    points = run["curves"]
    time, memory = exponents(points, "milliseconds"), exponents(points, "megabytes")
    axes = [axis for axis in AXES if axis in time]
    lines = [
        [c, *(f"{time[a][c]:.2f}, {memory[a][c]:.2f}" for a in axes)]
        for c in dict.fromkeys(p["candidate"] for p in points)
        if all(c in time[a] for a in axes)
    ]
    text = (
        "Exponents of time and of peak memory, fitted to all points of each curve that were run.\n" + _base(run) + "\n"
    )
    return text + grid(["", *(AXES[a] for a in axes)], lines) + "\n\n"


def label_slopes(axes: Any, ends: dict[str, float], slopes: dict[str, float], colours: dict[str, str]) -> None:
    """Write each curve's exponent to the right of its end, on logarithmic axes, without overlap."""
    from gradsurgery.watch.pictures import spread_out

    names = [name for name in ends if name in slopes]
    low, high = np.log(axes.get_ylim())
    places = (np.log([ends[name] for name in names]) - low) / (high - low)
    for name, y in zip(names, spread_out(places, 0.075, 0.0, 1.0), strict=True):
        axes.text(
            1.02, y, f"{slopes[name]:.2f}", color=colours[name], transform=axes.transAxes, fontsize=8, va="center"
        )


def draw(points: list[dict], path: Path) -> None:
    """Draw time and memory against losses, parameters and layers, narrow enough for a phone.

    Args:
        points: The points of all curves; hollow where they were not run.
        path: Where the picture goes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from docs.figures import COLOUR, GREY, STYLE, VIOLET

    looks = {
        "plain sum": (COLOUR["plain sum"], "s", "-"),
        "floor": (GREY, "", "--"),
        "PCGrad": (COLOUR["PCGrad"], "o", "-"),
        "TorchJD's best": (VIOLET, "D", "-"),
        "classic PCGrad": (COLOUR["MGDA"], "^", "-"),
    }
    places = [axis for axis in AXES if axis in {p["axis"] for p in points}]
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(places), 2, figsize=(4.7, 0.6 + 2.0 * len(places)), layout="constrained", squeeze=False
        )
        for row, axis in enumerate(places):
            for column, (key, unit) in enumerate((("milliseconds", "Time, ms"), ("megabytes", "Memory, MB"))):
                axes = panels[row, column]
                ends: dict[str, float] = {}
                for candidate, (colour, marker, line) in looks.items():
                    mine = [p for p in points if (p["axis"], p["candidate"]) == (axis, candidate)]
                    if not mine:
                        continue
                    x, y = [p["at"] for p in mine], [p[key] for p in mine]
                    axes.plot(x, y, color=colour, marker=marker, ls=line, ms=3.2, lw=1.3, label=candidate)
                    guesses = [p for p in mine if p.get("estimated")]
                    axes.plot(
                        [p["at"] for p in guesses], [p[key] for p in guesses], marker or "o", color=colour, mfc="white"
                    )
                    ends[candidate] = y[-1]
                axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
                axes.set_title(unit)
                label_slopes(
                    axes, ends, exponents(points, key).get(axis, {}), {c: look[0] for c, look in looks.items()}
                )
                if axis != "parameters":
                    axes.set_xticks(sorted({p["at"] for p in points if p["axis"] == axis}))
                    axes.xaxis.set_major_formatter("{x:g}")
                    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
        plt.close(figure)
