"""The pages on published behaviour, written from the results that were kept."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.page import grid
from benchmarks.published import claims
from benchmarks.published.basin import AT_MINIMUM, ON_FRONT
from benchmarks.published.claims import Claim, Results, geometric_mean, mean_over_seeds

CLAIMS: dict[str, Callable[[Results], list[Claim]]] = {
    "basin": claims.basin,
    "valleys": claims.valleys,
    "scales": claims.scales,
    "softadapt": claims.softadapt,
    "pinn": claims.pinn,
}
# What docs/figures.py draws for this page.
PICTURES = ("scaled", "equal", "stall")

# What each experiment is called on the page.
PROBLEMS = {
    "basin": "five starts on the landscape of CAGrad, Nash-MTL and FAMO",
    "valleys": "PCGrad's valleys",
    "scales": "GradNorm's regressions",
    "softadapt": "SoftAdapt's README",
    "pinn": "ConFIG on the Burgers equation",
}
VERDICTS = ("as claimed", "in part", "not reproduced")

PAGE = """# Published behaviour

Papers show on small problems what their methods do. Here the same problems are run with this library, and each claim is
compared with the result.

{counts}

![Paths of seven methods from five starts, f₁ × 0.1, and their ends on the front](_static/published/scaled.png)

*The first problem, with f₁ × 0.1: the paths of each method from five starts. The grey band is the Pareto front.*

*As claimed*: every condition of the claim holds. *In part*: some of them hold. *Not reproduced*: none holds.
[The tables](published-tables.md) have each claim beside our result, all runs and their settings.

## Where results differ

{differs}

## How it is run

`make published ARGS="--write docs/published.md"` runs everything and writes both pages from `published.json`, which is
stored beside them; the verdicts follow from the numbers. `make published ARGS=--quick` runs a little of everything in
about a minute.
"""

TABLES = """# Published behaviour: the tables

The claims of the papers, in our words, beside the results of this library. [The summary](published.md) explains the
verdicts.

{summary}

## Five starts

The landscape of CAGrad, Nash-MTL and FAMO
([`cagrad_basin`](toy-problems.md#the-basin-of-cagrad-nash-mtl-and-famo)), with Adam at a learning rate of 0.001,
as in all of their scripts.

* *Setting of Nash-MTL and FAMO*: f₁ × 0.1, {scaled_steps} steps (FAMO's script; Nash-MTL's takes 35 000); CAGrad
  with c = 0.4 and Nash-MTL as published, their directions and FAMO's clipped to length 1, as in their common
  code; FAMO with a learning rate of 0.025 for its weights, no decay, and lower bounds of −21 for the unscaled
  losses.
* *Setting of CAGrad*: equal scales, {equal_steps} steps, c = 0.5, CAGrad's direction divided by 1 + c and not
  clipped. Its third start is (−8.5, −5).

The *front* is where no loss can fall without the other rising. A run *reaches the front* if, where it ends, no Pareto
point is better in both (unscaled) losses by more than {on_front}; along the front each loss ranges over 19.6. One point
of the front is *the minimum* of the sum of the losses, the star in the papers' figures: ({x_scaled}, {y_scaled}) with
f₁ × 0.1, ({x_equal}, {y_equal}) with equal scales. A run reaches it if it ends within {at_minimum} of it in the plane,
where the front is 14 long. A method *favours* a loss if the mean θ₁ of its ends on the front lies beyond 1 on that
side; it ends *in between* if the mean is within 1 and no end is beyond 5.

Steps are counted in blocks of 500. A run stops early if it is on the front and its mean position moves by less than
0.001 from one block to the next. Numbers are float64; the papers' scripts use float32.

### f₁ × 0.1

![Paths of seven methods from five starts, f₁ × 0.1, and their ends on the front](_static/published/scaled.png)

{scaled}

### Equal scales

![Paths of six methods from five starts, equal scales, and their ends on the front](_static/published/equal.png)

{equal}

{basin_why}

## PCGrad's valleys

[`pcgrad_valleys`](toy-problems.md#the-valleys-of-the-pcgrad-paper) with the paper's settings: {valley_steps}
steps of Adam at 0.001 from (0.5, −3). Mean point and mean losses of the last 1000 steps:

{valleys}

![Mean paths of the plain sum, PCGrad and MGDA through the valleys](_static/published/stall.png)

The floors of the valleys are 1e-5 wide and Adam's steps of 0.001 jump over them, so the mean losses of PCGrad stay
above the floors even where it has arrived. MGDA arrives in {mgda_steps} steps and stops, because one gradient is zero
on a floor.

{valleys_why}

## GradNorm's regressions

[`ScaledRegression`](toy-problems.md#gradnorms-regressions) at the paper's size: 250 inputs, 100 outputs, four shared
layers of 100 neurons, α = 0.12. The paper does not give the rest, which was chosen here: {scale_steps} steps of Adam at
0.001 on 100 new samples each; ten scales from 1 to 100 in equal ratios. The weights of both methods learn with Adam at
0.025, as in the paper. Test loss divided by the test loss at the start, mean over tasks and {scale_seeds} seeds:

{scales}

Predicting zero would give a value close to 1, so these few steps learn little; with the plain sum the small one of the
two tasks even gets *worse*. [The smaller version](toy-problems.md#gradnorms-regressions) trains further.

{scales_why}

## SoftAdapt's README

The example of the README: three losses over five epochs with β = 0.1, through `get_component_weights`. The README
prints five digits; they are compared.

## ConFIG on the Burgers equation

{pinn_text}

{pinn}

IMTL-G and ConFIG have the same direction and differ only in its length. M-ConFIG's advantage is that the same number of
gradients pays for more steps.

{pinn_why}
"""

PINN_TEXT = """$u_t + u u_x = \\nu u_{{xx}}$ with $u(x, 0) = -\\sin \\pi x$ for x in [−1, 1], three losses: the
equation, the boundary, the initial values. Small: ν = {viscosity:.3f}, a tanh network with {depth} hidden
layers of {width} neurons, {inside} + {edge} + {edge} new points per step, {steps} steps, {seeds} seeds. (The
paper: ν = 0.003, five layers of 50, 10 000 + 250 + 250 points, 30 000 steps.) Adam begins at {lr:g}, the
paper's at 0.001; both warm up for 1 % of the steps and fall to a tenth along a cosine. M-ConFIG computes the
gradient of one loss per step, in turn; it is run with as many steps as the others, and with as many gradients.
*Error*: mean squared error against the exact solution (Cole-Hopf transformation, by quadrature) on a grid of 128 × 51,
geometric mean over seeds. *Better* means better with every seed. Time was not measured."""


def write(results: Results) -> str:
    """The first page: how many claims hold, and where results differ.

    Args:
        results: What the experiments returned, by name.

    Returns:
        Markdown.
    """
    found = {name: make(results[name]) for name, make in CLAIMS.items()}
    every = [claim for each in found.values() for claim in each]
    return with_minus(PAGE.format(counts=counts(found), differs=why(every)))


def tables(results: Results) -> str:
    """The second page: all claims and runs.

    Args:
        results: What the experiments returned, by name.

    Returns:
        Markdown.
    """
    found = {name: make(results[name]) for name, make in CLAIMS.items()}
    basin, sizes = results["basin"], results["pinn"]["size"]
    lowest = {key: basin[key]["minimum"] for key in ("scaled", "equal")}
    text = TABLES.format(
        summary=summary([claim for each in found.values() for claim in each]),
        scaled_steps=spaced(basin["scaled"]["steps"]),
        equal_steps=spaced(basin["equal"]["steps"]),
        on_front=ON_FRONT,
        at_minimum=AT_MINIMUM,
        x_scaled=number(lowest["scaled"][0]),
        y_scaled=number(lowest["scaled"][1]),
        x_equal=number(lowest["equal"][0]),
        y_equal=number(lowest["equal"][1]),
        scaled=ends(basin["scaled"]),
        equal=ends(basin["equal"]),
        basin_why=why(found["basin"]),
        valley_steps=spaced(results["valleys"]["steps"]),
        mgda_steps=spaced(results["valleys"]["methods"]["MGDA"]["steps"]),
        valleys=valley_table(results["valleys"]),
        valleys_why=why(found["valleys"]),
        scale_steps=spaced(results["scales"]["steps"]),
        scale_seeds=results["scales"]["seeds"],
        scales=scale_table(results["scales"]),
        scales_why=why(found["scales"]),
        pinn_text=PINN_TEXT.format(**sizes),
        pinn=pinn_table(results["pinn"]),
        pinn_why=why(found["pinn"]),
    )
    return with_minus(text)


def with_minus(text: str) -> str:
    """Write a proper minus in front of numbers, but not in 1e-05."""
    return re.sub(r"(?<![\w−-])-(?=\d)", "−", text)


def counts(found: dict[str, list[Claim]]) -> str:
    """A table of how many claims about each problem have which verdict, and all of them."""
    lines = []
    every = [claim for each in found.values() for claim in each]
    for name, each in [*found.items(), ("all", every)]:
        verdicts = [claim.verdict for claim in each]
        lines.append([PROBLEMS.get(name, "**all**"), str(len(each)), *(str(verdicts.count(v)) for v in VERDICTS)])
    return grid(["problem", "claims", *VERDICTS], lines)


def spaced(steps: int) -> str:
    """A large number with spaces."""
    return f"{steps:,}".replace(",", " ")


def number(value: float) -> str:
    """A number of two digits behind the point, without a negative zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def summary(found: list[Claim]) -> str:
    """The table of all claims."""
    return grid(["paper", "claim", "here", "verdict"], [[c.paper, c.says, c.found, c.verdict] for c in found])


def why(found: list[Claim]) -> str:
    """Where differences come from: a list of the claims that do not hold entirely."""
    open_ones = [claim for claim in found if claim.verdict != "as claimed"]
    if not open_ones:
        return "Every claim holds."
    return "Claims that do not hold entirely, and why:\n\n" + "\n".join(
        f"* **{c.paper}**: {c.says}. *{c.verdict.capitalize()}:* {c.why}" for c in open_ones
    )


def ends(setting: Results) -> str:
    """A table of where each run ends: θ₁ on the front, or that it is held."""
    starts = [f"({number(x).removesuffix('.00')}, {number(y).removesuffix('.00')})" for x, y in setting["starts"]]
    counted = claims.five(setting)
    lines = []
    for name, runs in setting["methods"].items():
        on, at = (claims.count(counted[name], key) for key in ("on front", "at minimum"))
        lines.append([name, *map(end, runs), f"{on} of 5", f"{at} of 5"])
    last = " The last start is CAGrad's and is not counted." if len(starts) > 5 else ""
    return grid(["method", *starts, "on the front", "at the minimum"], lines) + (
        "\n\n*θ₁ where the run ends, from −7 (minimum of f₂) to 7 (minimum of f₁); in brackets, after how many\n"
        f"thousand steps it was on the front. A star marks the minimum.{last}*"
    )


def end(run: Results) -> str:
    """Where one run ends."""
    if not run["on front"]:
        x, y = run["end"]
        return f"off it, at ({number(x)}, {number(y)})"
    star = " ★" if run["at minimum"] else ""
    return f"{number(run['end'][0])}{star} ({run['on front after'] / 1000:.1f})"


def valley_table(found: Results) -> str:
    """Where each method is at the end."""
    lines = []
    for name, run in found["methods"].items():
        x, y = run["mean point"]
        losses = (f"{f:.1f}" for f in run["mean losses"])
        lines.append([name, spaced(run["steps"]), f"{x:.3f}", f"{y:.3f}", *losses])
    lines.append(["optimum", "", "−2", "≥ 6.45", *(f"{x:.1f}" for x in found["floors"])])
    return grid(["method", "steps", "θ₁", "θ₂", "f₁", "f₂"], lines)


def scale_table(found: Results) -> str:
    """Normalised test losses of two and of ten tasks."""
    methods = list(found["two"]["methods"])
    lines = []
    for count in ("two", "ten"):
        each = [mean_over_seeds(found[count]["methods"][m], "ratios") for m in methods]
        lines.append([f"{count}, mean", *(f"{ratios.mean():.3f}" for ratios in each)])
        lines.append([f"{count}, smallest scale", *(f"{ratios[0]:.3f}" for ratios in each)])
        lines.append([f"{count}, largest scale", *(f"{ratios[-1]:.3f}" for ratios in each)])
    return grid(["tasks", *methods], lines)


def pinn_table(found: Results) -> str:
    """Errors of each method."""
    lines = []
    for name, errors in found["methods"].items():
        each = ", ".join(f"{e:.1e}" for e in errors)
        lines.append([name, spaced(found["gradients"][name]), f"{geometric_mean(errors):.1e}", each])
    return grid(["method", "gradients of single losses", "error", "seeds"], lines)
