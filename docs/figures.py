"""Draw the pictures of the pages on toy problems and on monitoring, and print the numbers that they quote.

``python docs/figures.py`` draws all into ``docs/_static``; ``python docs/figures.py valleys`` one of them. Each
takes seconds, but the two landscapes with valleys take minutes: methods crawl there.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge

import gradsurgery
from gradsurgery.cli.method_pictures import EXAMPLES, direction
from gradsurgery.problems import Problem, ScaledRegression, cagrad_basin, fonseca_fleming, pcgrad_valleys, quadratics
from gradsurgery.watch.pictures import DARK, LIGHT, Palette, style

DOCS = Path(__file__).parent
METHODS = {"plain sum": None, "PCGrad": gradsurgery.PCGrad, "MGDA": gradsurgery.MGDA}
# Okabe and Ito's palette, told apart with any kind of colour blindness; markers and labels say it again.
COLOUR = {"plain sum": "#d55e00", "PCGrad": "#0072b2", "MGDA": "#009e73"}
MARKER = {"plain sum": "s", "PCGrad": "o", "MGDA": "^"}
VIOLET = "#aa4499"
# One colour and marker per start, where each panel is one method.
START_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900")
STARTS_LEGEND = """Upper panels: paths.
Lower panels: where
they end, as losses.

Band: Pareto set.
Star: minimum of
the sum.
One colour per start."""
INK, GREY, FAINT = "#222222", "#8c8c8c", "#dcdcdc"

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def path(problem: Problem, method: str, start: int, steps: int, base: type[torch.optim.Optimizer], lr: float):
    """Return the trajectory of a method as an array of shape (steps + 1, n)."""
    wrapper = METHODS[method]

    def optimizer(parameters):
        return wrapper(base(parameters, lr=lr)) if wrapper else base(parameters, lr=lr)

    return problem.trajectory(problem.starts[start], optimizer, steps).numpy()


def losses(problem: Problem, points) -> np.ndarray:
    return np.stack([loss.numpy() for loss in problem.losses(torch.as_tensor(points))], axis=-1)


def draw_set(axes: Axes, points, **settings) -> None:
    axes.plot(*np.asarray(points).T, color="#bbbbbb", lw=6, zorder=1.5, **settings)


def draw_path(axes: Axes, method: str, points, *, lw: float = 1.6, **settings) -> None:
    axes.plot(*points.T, color=COLOUR[method], lw=lw, zorder=3, **settings)
    draw_end(axes, method, points[-1])


def draw_end(axes: Axes, method: str, point) -> None:
    style = {"color": COLOUR[method], "marker": MARKER[method], "ms": 6, "mec": "white", "mew": 0.8}
    axes.plot(*point, ls="none", zorder=5, clip_on=False, **style)


def draw_start(axes: Axes, point) -> None:
    axes.plot(*point, "o", color="white", mec=INK, mew=1.1, ms=5, zorder=4)


def say(axes: Axes, text: str, at, colour: str = INK, **settings) -> None:
    halo = [matplotlib.patheffects.withStroke(linewidth=2.2, foreground="white")]
    axes.text(*at, text, color=colour, path_effects=halo, zorder=6, **{"fontsize": 8.5, "va": "center"} | settings)


def name_methods(axes: Axes, at, line: float) -> None:
    """Write the methods' names, each with its marker and colour, into an empty corner."""
    for i, method in enumerate(METHODS):
        draw_end(axes, method, (at[0] + 0.25 * line, at[1] - i * line))
        say(axes, method, (at[0] + 0.75 * line, at[1] - i * line), COLOUR[method])


def grid(frame, n: int = 401):
    left, right, bottom, top = frame
    x, y = np.meshgrid(np.linspace(left, right, n), np.linspace(bottom, top, n))
    return x, y, torch.from_numpy(np.stack([x, y], axis=-1))


def window(axes: Axes, frame) -> None:
    axes.set(xlim=frame[:2], ylim=frame[2:], aspect="equal")


def label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, labelpad=1)
    axes.set_ylabel(y, labelpad=4, rotation=0, ha="right", va="center")


# ------------------------------------------------------------------------------------------------------- the pictures


def draw_quadratics() -> Figure:
    count_steps({1.0: 10, 10.0: 150, 100.0: 1000})
    figure = plt.figure(figsize=(5, 6.3), layout="constrained")
    big, *small = figure.subplot_mosaic([["a", "a"], ["b", "c"]], height_ratios=[1.75, 1]).values()
    for axes, condition, steps in ((big, 10.0, 800), (small[0], 1.0, 200), (small[1], 100.0, 1200)):
        problem = quadratics(condition)
        x, y, points = grid(problem.frame)
        for loss in problem.losses(points):
            axes.contour(x, y, loss, levels=[0.1, 0.4, 0.9, 1.6], colors=FAINT, linewidths=0.7)
        draw_set(axes, problem.pareto_set())
        for start in (0, 1, 5):
            for method in METHODS:
                draw_path(axes, method, path(problem, method, start, steps, torch.optim.SGD, 0.1), lw=1.5)
            draw_start(axes, problem.start_points[start])
        window(axes, problem.frame)
        axes.set_title(f"condition number {condition:g}")
    label_axes(big, "θ₁", "θ₂")
    say(big, "start", (-2.62, 2.08))
    say(big, "MGDA", (-2.05, 0.75), COLOUR["MGDA"], ha="right")
    say(big, "PCGrad", (0.75, -1.28), COLOUR["PCGrad"], ha="left")
    say(big, "plain sum", (-0.95, 0.95), COLOUR["plain sum"], ha="left")
    say(big, "Pareto set", (0.72, -0.72), "#777777", ha="left")
    say(big, "minimum of f₂", (1.1, 0.12), "#777777", ha="left")
    say(big, "minimum of f₁", (-1.12, -0.12), "#777777", ha="right")
    for axes in small:
        axes.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    return figure


def count_steps(conditions: dict[float, int]) -> None:
    """Print in how many large steps methods come within 0.001 of the Pareto set, and how far a step raised a loss."""
    for condition, steps in conditions.items():
        problem = quadratics(condition)
        for method in METHODS:
            paths = [path(problem, method, start, steps, torch.optim.SGD, 0.5) for start in range(6)]
            far = [[problem.distance_to_pareto(torch.from_numpy(p)) > 1e-3 for p in points] for points in paths]
            counts = [int(np.flatnonzero(each)[-1]) + 1 for each in far]
            rise = max(np.diff(losses(problem, points), axis=0).max() for points in paths)
            print(f"condition {condition:g}, {method}: steps {sorted(counts)}, a loss rose by {rise:.2g} at most")


def draw_valleys() -> Figure:
    problem = pcgrad_valleys()
    figure, axes = plt.subplots(figsize=(5, 5.6), layout="constrained")
    x, y, points = grid(problem.frame)
    total = sum(problem.losses(points)).numpy()
    axes.contourf(x, y, total, levels=np.linspace(-160, 90, 11), cmap="Greys_r", alpha=0.3, extend="both")
    draw_set(axes, [(-2.0, 6.45), (-2.0, 9.0)])
    for method, steps in (("plain sum", 30_000), ("PCGrad", 30_000), ("MGDA", 1_500)):
        points = path(problem, method, 0, steps, torch.optim.Adam, 1e-2)
        # Two of them jump from wall to wall; drawn is their mean over the last 1000 steps, which shows where they go.
        draw_path(axes, method, smooth(points, 1000 if steps > 5000 else 1))
        values = losses(problem, points)
        print(method, "after", steps, "steps at", points[-1].round(2), "losses", values[-1].round(1))
        print(
            "  mean of the last 1000 steps", points[-1000:].mean(axis=0).round(2), values[-1000:].mean(axis=0).round(1)
        )
        print("  first loss at its floor for good after", 1 + np.max(np.flatnonzero(values[:, 0] > -244), initial=0))
    draw_start(axes, problem.start_points[0])
    window(axes, problem.frame)
    label_axes(axes, "θ₁", "θ₂")
    say(axes, "start", (0.5, -3.45), ha="center")
    say(axes, "plain sum\n30 000 steps", (2.45, -2.2), COLOUR["plain sum"])
    say(axes, "PCGrad\n30 000 steps", (-1.45, 4.1), COLOUR["PCGrad"])
    say(axes, "MGDA\n600 steps", (-1.6, 6.5), COLOUR["MGDA"])
    say(axes, "Pareto set", (-1.6, 8.2), "#777777")
    say(axes, "valley of f₁", (0.55, 0.2), "#777777", rotation=-27)
    say(axes, "valley of f₂", (-4.85, 0.15), "#777777", rotation=27)
    return figure


def smooth(points: np.ndarray, span: int) -> np.ndarray:
    """Running mean over the last `span` points, over fewer at the start."""
    total = np.cumsum(np.vstack([np.zeros((1, 2)), points]), axis=0)
    last = np.arange(1, len(total))
    first = np.maximum(last - span, 0)
    return (total[last] - total[first]) / (last - first)[:, None]


def draw_basin() -> Figure:
    problem = cagrad_basin()
    figure, grid_of_axes = plt.subplots(2, 2, figsize=(5, 5.3), layout="constrained")
    *panels, front = grid_of_axes.flat
    x, y, points = grid(problem.frame)
    total = sum(problem.losses(points)).numpy()
    values = losses(problem, problem.pareto_set())
    draw_set(front, values)
    for axes, method in zip(panels, METHODS, strict=True):
        axes.contour(x, y, total, levels=np.linspace(-30, 18, 13), colors=FAINT, linewidths=0.7, linestyles="solid")
        draw_set(axes, problem.pareto_set())
        for start in range(5):
            steps = 35_000 if problem.start_points[start][1] > 1.0 else 12_000
            points = path(problem, method, start, steps, torch.optim.Adam, 2e-3)
            draw_path(axes, method, points, lw=1.4)
            draw_start(axes, problem.start_points[start])
            draw_end(front, method, losses(problem, points[-1]))
            print(method, problem.start_points[start], "->", points[-1].round(2), losses(problem, points[-1]).round(2))
        window(axes, problem.frame)
        axes.set(xticks=[-10, 0, 10], yticks=[-10, 0, 10])
        axes.set_title(method, color=COLOUR[method])
    front.set_title("where they end")
    window(front, (-22.0, 10.0, -22.0, 10.0))
    front.set(xticks=[-20, -10, 0, 10], yticks=[-20, -10, 0, 10])
    say(front, "held in\nthe valleys", (0.5, 7.6), COLOUR["plain sum"], ha="right")
    say(front, "Pareto front", (-13.0, -9.0), "#777777")
    label_axes(front, "f₁", "f₂")
    return figure


def draw_concave() -> Figure:
    problem = fonseca_fleming(2)
    figure, (plane, front) = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
    draw_set(plane, problem.pareto_set())
    draw_set(front, losses(problem, problem.pareto_set()))
    for method in METHODS:
        for start in range(6):
            points = path(problem, method, start, 600, torch.optim.SGD, 0.05)
            draw_path(plane, method, points, lw=1.3)
            draw_path(front, method, losses(problem, points), lw=1.3)
            print(method, problem.start_points[start], "->", losses(problem, points[-1]).round(2))
    for start in problem.starts:
        draw_start(plane, start)
        draw_start(front, losses(problem, start))
    name_methods(front, (0.04, 0.36), 0.1)
    say(front, "Pareto front", (0.42, 0.55), "#777777", rotation=-47, ha="center")
    window(plane, (-1.3, 1.3, -1.3, 1.3))
    window(front, (0.0, 1.0, 0.0, 1.0))
    plane.set_title("parameters")
    front.set_title("losses")
    label_axes(plane, "θ₁", "θ₂")
    label_axes(front, "f₁", "f₂")
    return figure


def draw_scales() -> Figure:
    scales, steps = np.array(ScaledRegression.TEN), 1000
    plain, _ = train_seeds(scales, steps, balanced=False)
    balanced, weights = train_seeds(scales, steps, balanced=True)
    print("ten tasks, last 100 weights", weights[-100:].mean(axis=0).round(4))
    print("relative test losses: sum", plain.round(3), plain.mean(), "GradNorm", balanced.round(3), balanced.mean())
    for name in (False, True):
        print("two tasks, GradNorm" if name else "two tasks, sum", train_seeds((1.0, 100.0), steps, balanced=name)[0])

    figure, (left, right) = plt.subplots(1, 2, figsize=(5, 3.1), layout="constrained")
    shades = mpl.colormaps["viridis_r"](np.linspace(0.18, 1.0, 10))
    kernel = np.ones(25) / 25
    for weight, shade in zip(weights.T, shades, strict=True):
        left.plot(np.arange(13, steps - 11), np.convolve(weight, kernel, mode="valid"), color=shade, lw=1.4)
    left.set(yscale="log", xlim=(0, steps), ylim=(2e-3, 10), xlabel="step")
    left.set_title("GradNorm's weights")
    say(left, "σ = 1", (980, 6.6), ha="right")
    say(left, "σ = 100", (980, 3.4e-3), ha="right")
    right.vlines(scales, balanced, plain, color=FAINT, lw=2, zorder=1)
    right.plot(scales, plain, "s", color=COLOUR["plain sum"], ms=5)
    right.plot(scales, balanced, "D", color=VIOLET, ms=5)
    right.set(xscale="log", xlabel="scale σ of the task's targets", ylim=(0.28, 0.44))
    right.set_title("relative test loss")
    say(right, "plain sum", (3.2, 0.392), COLOUR["plain sum"])
    say(right, "GradNorm", (3.2, 0.298), VIOLET)
    left.yaxis.set_major_formatter("{x:g}")
    right.xaxis.set_major_formatter("{x:g}")
    return figure


def train_seeds(scales, steps: int, *, balanced: bool):
    """Return the relative test losses and the weights of each step, both as means over three seeds."""
    runs = [train(scales, seed, steps, balanced=balanced) for seed in (0, 1, 2)]
    return tuple(np.mean(values, axis=0) for values in zip(*runs, strict=True))


def train(scales, seed: int, steps: int, *, balanced: bool):
    toy = ScaledRegression(tuple(scales), inputs=20, outputs=10, seed=seed)
    model = toy.model(width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if balanced:
        optimizer = gradsurgery.GradNormWeighter(optimizer, model.last_shared.parameters(), alpha=0.12)
    weights = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        task_losses = toy.losses(model, toy.inputs(step, size=100))
        if balanced:
            weights.append(list(optimizer.backward(task_losses).weights.values()))
        else:
            sum(task_losses).backward()
        optimizer.step()
    return toy.relative_losses(model, toy.inputs(0, size=1000)).numpy(), np.array(weights)


def draw_run() -> Figure:
    """Run the first program of the page on monitoring, so that the picture is that of the code beside it."""
    page = (DOCS / "monitor.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(program, "monitor.md", "exec"), names)
        finally:
            os.chdir(here)
    return names["monitor"].plot()


# --------------------------------------------------------------------------------------------- published behaviour


def published(key: str) -> dict:
    """Results that `make published` kept."""
    return json.loads((DOCS / "published.json").read_text(encoding="utf-8"))[key]


def draw_starts(setting: str) -> Figure:
    """Paths of each method from five starts, and where on the front they end."""
    found = published("basin")[setting]
    problem = cagrad_basin(found["scale"])
    x, y, points = grid(problem.frame)
    total = sum(problem.losses(points)).numpy()
    front = losses(cagrad_basin(), problem.pareto_set())
    lowest = losses(cagrad_basin(), np.array(found["minimum"]))
    figure, panels = plt.subplots(4, 4, figsize=(7.4, 7.3), layout="constrained")
    places = [(row, column) for row in (0, 2) for column in range(4)]
    for (row, column), (method, runs) in zip(places, found["methods"].items(), strict=False):
        plane, ends = panels[row][column], panels[row + 1][column]
        plane.contour(x, y, total, levels=13, colors=FAINT, linewidths=0.6, linestyles="solid")
        draw_set(plane, problem.pareto_set())
        draw_set(ends, front)
        for run, colour, marker in zip(runs, START_COLOURS, "os^Dv", strict=False):
            plane.plot(*np.array(run["path"]).T, color=colour, lw=1.3, zorder=3)
            draw_start(plane, run["path"][0])
            for axes, end in ((plane, run["end"]), (ends, run["losses"])):
                axes.plot(*end, marker, color=colour, ms=5.5, mec="white", mew=0.7, zorder=5, clip_on=False)
        for axes, best in ((plane, found["minimum"]), (ends, lowest)):
            axes.plot(*best, "*", color=INK, ms=13, mec="white", mew=0.6, zorder=2)
        window(plane, problem.frame)
        window(ends, (-22.0, 11.0, -22.0, 11.0))
        plane.set(xticks=[-10, 0, 10], yticks=[-10, 0, 10], title=method)
        ends.set(xticks=[-20, 0], yticks=[-20, 0])
    label_axes(panels[0][0], "θ₁", "θ₂")
    label_axes(panels[1][0], "f₁", "f₂")
    free = places[len(found["methods"]) :]
    for row, column in free:
        panels[row][column].set_axis_off()
        panels[row + 1][column].set_axis_off()
    corner = panels[free[0][0]][free[0][1]]
    say(corner, STARTS_LEGEND, (0.02, 0.5), transform=corner.transAxes)
    return figure


def draw_stall() -> Figure:
    """PCGrad's landscape with the paper's own learning rate and number of steps."""
    problem, found = pcgrad_valleys(), published("valleys")
    figure, axes = plt.subplots(figsize=(4.4, 4.9), layout="constrained")
    x, y, points = grid(problem.frame)
    total = sum(problem.losses(points)).numpy()
    axes.contourf(x, y, total, levels=np.linspace(-160, 90, 11), cmap="Greys_r", alpha=0.3, extend="both")
    draw_set(axes, [(-2.0, 6.45), (-2.0, 9.0)])
    for method, run in found["methods"].items():
        draw_path(axes, method, np.array(run["path"]))
    draw_start(axes, problem.start_points[0])
    window(axes, problem.frame)
    label_axes(axes, "θ₁", "θ₂")
    name_methods(axes, (2.1, 8.3), 0.7)
    return figure


# -------------------------------------------------------------------------------------------------------------- home


def draw_step(palette: Palette) -> Figure:
    """One step on two gradients that oppose each other, as three methods would make it."""
    rows = EXAMPLES[0]
    figure = Figure(figsize=(4.2, 2.75), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1.75, 2.75), ylim=(-0.3, 2.1), aspect="equal")
    axes.set_axis_off()
    axes.set_title("One step: two gradients in conflict")
    angles = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    axes.add_patch(
        Wedge((0, 0), 1.9, angles.max() - 90, angles.min() + 90, color=palette.diverging[2], alpha=0.16, lw=0)
    )
    axes.text(0.35, 2.0, "both losses fall", color=palette.diverging[2], ha="center", fontsize=8.5)
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "lw": 2.2}
    for row, name, at in ((rows[0], "box loss", (2.05, 0.42)), (rows[1], "class loss", (-0.9, 0.58))):
        axes.annotate("", row, (0, 0), arrowprops=arrow | {"color": palette.grey, "lw": 1.6})
        axes.text(*at, f"{name}", color=palette.grey, ha="left" if row[0] > 0 else "right", va="bottom")
    for name, colour, place in (
        ("plain sum", palette.lines[0], (0.12, 0.05)),
        ("PCGrad", palette.lines[3], (0.42, -0.2)),
        ("MGDA", palette.lines[4], (-0.08, 0.08)),
    ):
        found = direction(name, rows)
        axes.annotate("", found, (0, 0), arrowprops=arrow | {"color": colour})
        across = "left" if place[0] > 0 else "right"
        axes.text(*(found + place), name, color=colour, ha=across, va="bottom", fontweight="bold")
    axes.text(1.27, 0.72, "class loss rises", color=palette.diverging[0], ha="left", va="top", fontsize=8.5)
    return figure


#: What to write to get each bar; sums need no library.
CALLS = {
    "plain sum": "class + box",
    "fixed, box × 3e-05": "class + 3e-5 · box",
    "relative sum": "class / class₀ + box / box₀",
    "PCGrad": "PCGrad(…)",
    "MGDA": "MGDA(…)",
    "MGDA, loss": 'MGDA(…, normalize="loss")',
    "GradNorm, relative": "GradNormWeighter(…), relative",
}


def draw_result(palette: Palette) -> Figure:
    """What became of it after the demo's training: the share of images with both digit and box right."""
    found = json.loads((DOCS / "_static" / "demo" / "numbers.json").read_text(encoding="utf-8"))
    runs = {
        method["name"]: [100 * run["test"]["both"] for run in method["runs"]]
        for method in found["methods"]
        if method["in the table"]
    }
    ranked = sorted(runs, key=lambda name: np.mean(runs[name]))
    figure = Figure(figsize=(4.2, 2.75), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(ranked):
        # Grey: sums with constant weights, which need no library.
        plain = palette.grey if name.startswith(("fixed", "relative")) else palette.lines[3]
        colour = palette.lines[0] if name == "plain sum" else plain
        axes.barh(i, np.mean(runs[name]), color=colour, height=0.62, alpha=0.85)
        axes.plot(runs[name], [i] * len(runs[name]), "o", color=palette.ink, ms=2.5)
        axes.text(max(runs[name]) + 2, i, f"{np.mean(runs[name]):.0f} %", va="center", fontsize=8.5)
    axes.set_yticks(range(len(ranked)), [CALLS[name] for name in ranked], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set(xlim=(0, 110), xticks=[])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{found['settings']['steps']} steps: digit and box both right", loc="right")
    return figure


def draw_home() -> None:
    """Both pictures of the first page, on light and on dark paper."""
    for name, draw in (("step", draw_step), ("result", draw_result)):
        for shade, palette in (("light", LIGHT), ("dark", DARK)):
            with style(palette), mpl.rc_context({"svg.hashsalt": name}):
                path = DOCS / "_static" / "home" / f"{name}-{shade}.svg"
                draw(palette).savefig(path, transparent=True, metadata={"Date": None})


PICTURES = {
    "home": ("home", draw_home),
    "quadratics": ("toy", draw_quadratics),
    "valleys": ("toy", draw_valleys),
    "basin": ("toy", draw_basin),
    "concave": ("toy", draw_concave),
    "scales": ("toy", draw_scales),
    "run": ("monitor", draw_run),
    "scaled": ("published", functools.partial(draw_starts, "scaled")),
    "equal": ("published", functools.partial(draw_starts, "equal")),
    "stall": ("published", draw_stall),
}


def main(names: list[str]) -> None:
    with mpl.rc_context(STYLE):
        for name in names or PICTURES:
            folder, draw = PICTURES[name]
            (DOCS / "_static" / folder).mkdir(parents=True, exist_ok=True)
            figure = draw()
            if figure is None:
                continue
            figure.savefig(DOCS / "_static" / folder / f"{name}.png", facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    mpl.use("Agg")
    torch.set_num_threads(1)
    main(sys.argv[1:])
