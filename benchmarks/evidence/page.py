"""The page on evidence: every figure and every sentence about figures comes from the summary of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.evidence.conclusions import conclusions, edges, short, unsolved
from benchmarks.evidence.contenders import SUM, TUNED
from benchmarks.evidence.problem import LEAST, MOST
from benchmarks.evidence.reading import (
    Data,
    mean_score,
    named,
    nearest,
    number,
    ordered,
    percent,
    real_problems,
    single_task,
    span,
    stands,
    tally,
)
from benchmarks.evidence.results import TOYS, dumps, scores
from benchmarks.page import grid
from gradsurgery.cli import catalogue
from gradsurgery.cli.comparing import NEAR

HEAD = """# Which method helps?

{methods} methods of [the catalogue](methods.md), with their defaults, on {problems} small problems, compared with
the plain sum and with tuned constant weights. {later}

{short}
![Error of every contender relative to the plain sum](_static/evidence/overall.png)

*Error of each method divided by that of the plain sum, over the {real} problems that are not toys, with 95 %
intervals. All numbers are in [the tables](evidence-tables.md).*
"""

DONE = """## What was done

* **Same budget.** On a problem, all contenders have the same model, batches, base optimizer and number of steps:
  {steps}, with the learning rate rising over the first tenth and then falling to zero.
* **Same grid.** The learning rate of each contender is chosen among the same {rates}, a factor of 3 apart, on
  validation data with one seed. Every other setting is a default.
* **Fresh seeds.** With the chosen rate each contender is trained again with {seeds} other seeds (weights, data and
  batches) and evaluated on test data. All errors on these pages come from those runs.
* **Tuned fixed weights** are chosen among {vectors} weight vectors at each of the {rates} rates: from {budget} training
  runs, where every other contender has {rates}. The vectors are the plain sum, one divided by each loss at the start,
  and random ones around both, log-uniform within factors of 30 and 10.
* **Error.** Each task has one error, 0 if everything is right and about 1 if nothing was learnt (wrong labels relative
  to guessing, squared error relative to the variance, 1 − IoU, relative distance from the solution). The error of a
  training run is the mean over its tasks, each clipped to between {least:g} and {most:g}. A run that failed or diverged
  has the error {most:g}.
* **Single-task models**, one per task, get the same grid and seeds. Δm is the mean relative improvement over their
  errors; it is positive where joint training helps.
* **As published.** `GradNormWeighter` and `NormalizedGradientWeighter` measure at the last shared layer; `MoDo` and
  `SDMGrad` get two extra batches in every step; `FAMOWeighter` sees the batch again after the step; `DWAWeighter` has
  ten epochs; `NTKWeighter` reads the residuals four times per run; `MConFIG` gets one loss per step, in turn, with
  plain SGD, and acts on heads too; methods with a primary loss take the first. Everything else is a default.
* **Intervals** (95 %) come from a bootstrap over problems, and over seeds within each. Comparisons are paired by seed.
  *Better* or *worse* on a problem means with every seed, and by 1 % or more on average. The {toys} toys do not enter
  figures over all problems: they show which path a method takes, not how it learns.
* **One left out.** Every interval that lies on one side of 1 is computed again without each problem, and without each
  family of problems. A result that does not survive this is not listed as a conclusion.
"""

TABLES = """---
hide-toc: true
---

# Which method helps? All tables

The full tables behind [the page on evidence](evidence.md). `make evidence ARGS="--write docs/evidence.md"` writes both
pages. `evidence.json` beside them has all figures; every sentence that quotes one is generated from that file.

"""

CANNOT = """## What cannot be concluded

* **Nothing about long training runs or large models.** The models have {parameters} parameters and train for {steps}
  steps. Methods that learn their weights with their own step size (`UncertaintyWeighter`, `IMTLLWeighter`,
  `GradNormWeighter`, `FAMOWeighter`, `GroupDROWeighter`, `MoCo`, `MoDo`) have little time to do so and may do better in
  longer runs.
* **Nothing about a method at its best.** Only the learning rate was tuned; every other constant is a default, and none
  was chosen for these problems. The fixed weights were chosen from {budget} training runs, the rate of each method from
  {rates}. What a method could do with {budget} tries was not tested.
* **Little about small differences.** There are {seeds} seeds per problem. On one problem, the error of one method
  varies between seeds as much as the errors of many methods differ, and by chance alone {seeds} seeds agree on the sign
  of a difference in 1 case out of {chance}. Learning rates were chosen with one seed. {edge}
* **Nothing about goals other than the mean error.** `AGEM`, `Bloop`, `MetaBalance` and `PCD` put one loss first; `EPO`,
  `PMGDA`, `PBIWeighter`, `STCHWeighter` and `COSMOSWeighter` aim at a given trade-off; `Krum` and `TrimmedMean` are
  robust to outliers. All of them are judged here by something they were not made for. Whether promises of common
  descent are kept is not measured either.
* **Nothing about problems of another kind.** {real} problems from {families} families are a small sample, and problems
  of one family resemble each other. The intervals say what {real} such problems can show, not what holds for yours.
* **Nothing about cost.** The plain sum and the weighters make one backward pass per step; surgery makes one per loss.
  The budget here is in steps. With a budget in seconds, the cheaper methods would have had more steps, or more weights
  to try.
"""


def write(path: Path, data: Data) -> None:
    """Write the page, its data and its pictures.

    Args:
        path: The page; data and pictures are put beside it.
        data: The summary.
    """
    from benchmarks.evidence import pictures

    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(dumps(data), encoding="utf-8")
    # From the file, so that the page can be written again from it.
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    pictures.draw(data, path.parent / "_static" / "evidence")
    path.write_text(text(data), encoding="utf-8")
    beside(path).write_text(tables(data), encoding="utf-8")


def beside(path: Path) -> Path:
    """The second page, of the tables."""
    return path.with_name(f"{path.stem}-tables.md")


def text(data: Data) -> str:
    """The page.

    Args:
        data: The summary.

    Returns:
        Markdown.
    """
    plan = data["plan"]
    steps = [problem["steps"] for problem in data["problems"]]
    real = [problem for problem in data["problems"] if problem["family"] != TOYS]
    facts = {
        "problems": len(data["problems"]),
        "steps": f"{min(steps)} to {max(steps)}",
        "parameters": f"{min(problem['parameters'] for problem in real)} to "
        f"{max(problem['parameters'] for problem in real)}",
        "rates": plan["rates"],
        "seeds": len(plan["seeds"]),
        "vectors": plan["vectors"],
        "budget": plan["rates"] * plan["vectors"],
        "least": LEAST,
        "most": MOST,
        "real": len(real),
        "toys": len(data["problems"]) - len(real),
        "families": len({problem["family"] for problem in real}),
        "chance": 2 ** (len(plan["seeds"]) - 1),
        "edge": edges(data),
    }
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    parts = [
        HEAD.format(**facts, **_who(plan), short="".join(f"* {sentence}\n" for sentence in short(data))),
        "## What can be concluded\n\n" + "".join(f"* {sentence}\n" for sentence in conclusions(data)),
        CANNOT.format(**facts) + unsolved(data),
        DONE.format(**facts),
        f"{ran(data)} With {versions}.\n",
    ]
    return "\n".join(parts)


def _who(plan: Data) -> dict[str, object]:
    """How many methods were run, and those that came afterwards."""
    ran = [name for name in plan["contenders"] if name not in (SUM, TUNED)]
    later = [f"`{name}`" for name in catalogue.facts() if name not in ran]
    return {"methods": len(ran), "later": f"Not measured yet: {', '.join(later)}." if later else "These are all."}


def tables(data: Data) -> str:
    """The second page.

    Args:
        data: The summary.

    Returns:
        Markdown.
    """
    parts = [
        "## All contenders\n\n" + contender_text(data),
        "## With one problem or one family left out\n\n" + without_text(data),
        "## All problems\n\n" + problem_text(data),
        "## Problem by problem\n\n" + pictures_text(data),
        "## What does not take part, and what failed\n\n" + absent_text(data),
    ]
    return TABLES + "\n".join(parts)


def brief(data: Data) -> str:
    """The conclusions, for a terminal.

    Args:
        data: The summary.

    Returns:
        Lines.
    """
    lines = [ran(data), *conclusions(data)]
    return "\n".join(re.sub(r"[*`]", "", line) for line in lines)


def ran(data: Data) -> str:
    """How much of the plan was trained."""
    plan = data["plan"]
    if plan["finished"] == plan["planned"]:
        return f"All {plan['planned']} planned training runs were made."
    return (
        f"Of the {plan['planned']} planned training runs, {plan['finished']} were made when this was written. What is "
        "missing is left out: contenders without a chosen rate, and seeds that have not been tested yet."
    )


# ----------------------------------------------------------------------------------------------- tables


def contender_text(data: Data) -> str:
    """The tables of all contenders: their errors, and what else is known of them."""
    costs = data["costs"]
    errors, rest = [], []
    for row in data["overall"]:
        name = row["name"]
        shown = name if row["kind"] == "baseline" else f"`{name}`"
        times = [f"{cost['ratio'][name]:.1f}" if name in cost["ratio"] else "–" for cost in costs.values()]
        errors.append([shown, span(row["rank"], 1), *versus(row.get("sum")), *versus(row.get("tuned"))])
        rest.append(
            [
                shown,
                percent(row["delta_m"]) if "delta_m" in row else "–",
                f"{100 * row['median_delta_m']:+.0f} %".replace("-", "−") if "median_delta_m" in row else "–",
                *times,
                f"{row['failed']} of {row['trainings']}" if row["failed"] else "0",
                f"{row['edge']} of {row['problems']}",
            ]
        )
    head = ["contender", "mean rank", "error / plain sum", "better, even, worse", "error / tuned weights"]
    head += ["better, even, worse"]
    text = (
        f"Over the {len(real_problems(data))} problems that are not toys, sorted by mean rank (1 is best, "
        f"{len(data['overall'])} last; where fewer take part, ranks are rescaled to the same range). *Error / plain "
        f"sum* is the geometric mean of the ratios.\n\n{grid(head, errors)}\n\n"
    )
    text += "Δm is the improvement over one model per task. "
    if costs:
        milliseconds = " and ".join(f"{cost['milliseconds']:.2f}" for cost in costs.values())
        text += (
            "*Time* is that of a whole step relative to the plain sum's, on GradNorm's toy, where the plain sum takes "
            f"{milliseconds} ms: processor time of one thread, median over rounds in which all take turns, measured "
            "separately from the training runs. "
        )
    text += "*Rate at an end*: on how many problems the chosen learning rate is the lowest or highest of the "
    text += "grid.\n\n"
    head = ["contender", "Δm, mean", "Δm, median", *(f"time, {name.split(', ')[-1]}" for name in costs)]
    return text + grid([*head, "failed", "rate at an end"], rest) + "\n"


def without_text(data: Data) -> str:
    """Which problems the intervals on one side of 1 depend on."""
    text = (
        "Ratios of errors whose 95 % interval lies on one side of 1 over all problems that are not toys. *Without a "
        "problem* and *without a family* show the one whose omission brings the interval closest to 1, or past it. A "
        "ratio *stays* if no omission takes the interval past 1.\n"
    )
    for key, label in (("sum", "the plain sum"), ("tuned", "the tuned fixed weights")):
        rows = [row for row in data["overall"] if "without" in row.get(key, {})]
        rows.sort(key=lambda row: row[key]["ratio"][0])
        lines = [
            [named([row["name"]]), span(row[key]["ratio"], 3), *left(row, key), "yes" if stands(row, key) else "no"]
            for row in rows
        ]
        head = [f"error / {label[4:]}", "all", "without a problem", "without a family", "stays"]
        text += f"\n{grid(head, lines)}\n" if lines else ""
    best = [row for row in data["overall"] if "sum" in row and row["sum"]["ratio"][2] < 1]
    best.sort(key=lambda row: row["sum"]["ratio"][0])
    if best:
        text += "\nThose with a lower error than the plain sum, with each problem and each family left out in turn:\n"
        text += f"\n{grid(['left out', *(named([row['name']]) for row in best)], turns(best))}\n"
    return text


def left(row: Data, key: str) -> list[str]:
    """Two cells: the ratio without the problem, and without the family, that matters most."""
    found = [nearest(row, key, kind) for kind in ("problem", "family")]
    return ["–" if out is None else f"{span(out[1], 3)}, {out[0]}" for out in found]


def turns(rows: list[Data]) -> list[list[str]]:
    """Ratios to the plain sum's errors, a line for each problem and family that is left out."""
    parts = [row["sum"]["without"] for row in rows]
    names = {(kind, name): None for part in parts for kind, group in part.items() for name in group}
    return [
        [
            name if kind == "problem" else f"*{name}*",
            *(span(part[kind][name], 3) if name in part[kind] else "–" for part in parts),
        ]
        for kind, name in names
    ]


def versus(comparison: Data | None) -> list[str]:
    """Two cells: the ratio of errors, and the count of verdicts."""
    if comparison is None:
        return ["–", "–"]
    return [span(comparison["ratio"]), f"{comparison['better']}, {comparison['even']}, {comparison['worse']}"]


def problem_text(data: Data) -> str:
    """The results on each problem, and the weights that were chosen."""
    lines, weights = [], []
    for problem in data["problems"]:
        name, sizes, order = problem["name"], problem["sizes"].values(), ordered(data, problem["name"])
        if not order:
            continue
        better, worse, count = tally(data, name)
        lines.append(
            [
                name,
                str(len(problem["losses"])),
                f"{max(sizes) / min(sizes):.2g}" if min(sizes) > 0 else "–",
                *map(number, (single_task(data, problem), mean_score(data, name, SUM), mean_score(data, name, TUNED))),
                f"{number(mean_score(data, name, order[0]))}, {named(order[:1])}",
                f"{better}, {count - better - worse}, {worse}",
            ]
        )
        if TUNED in data["results"][name]:
            chosen = data["results"][name][TUNED]["weights"]
            weights.append([name, ", ".join(f"{loss} {weight:g}" for loss, weight in chosen.items())])
    head = [
        "problem",
        "m",
        "size ratio",
        "one model per task",
        SUM,
        TUNED,
        "lowest error",
        "methods better, even, worse",
    ]
    return (
        "Mean test error. *Size ratio*: the largest loss over the smallest, at the start. The last column counts "
        "methods compared with the plain sum. The lowest of so many errors also owes something to luck.\n\n"
        f"{grid(head, lines)}\n\n"
        "Error relative to the plain sum, contenders by mean rank; a dash: does not take part.\n\n"
        "![Error of each contender on each problem](_static/evidence/map.png)\n\n"
        f"The tuned weights, scaled to a sum of m:\n\n{grid(['problem', TUNED], weights)}\n"
    )


def slug(name: str) -> str:
    """A problem's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pictures_text(data: Data) -> str:
    """A picture of each problem, with its settings."""
    text = (
        "All contenders, the lowest mean error first; a dot for each seed, a bar for the mean. Vertical lines: plain "
        "sum (orange), tuned fixed weights (black), mean of the single-task models (dotted). Crosses: runs that "
        "failed or diverged.\n"
    )
    for problem in data["problems"]:
        name = problem["name"]
        if not ordered(data, name):
            continue
        rates = ", ".join(f"{rate:g}" for rate in problem["rates"])
        budget = f"{problem['parameters']} parameters, {problem['steps']} steps of {problem['base']}, rates {rates}."
        said = f"{problem['says']} {budget} {toy_sentence(data, problem)}"
        text += f"\n### {name[0].upper()}{name[1:]}\n\n{said.strip()}\n\n"
        text += f"![All contenders on this problem](_static/evidence/{slug(name)}.png)\n"
    return text


def toy_sentence(data: Data, problem: Data) -> str:
    """On a toy: which contenders reach the solution."""
    if problem["family"] != TOYS:
        return ""
    order = ordered(data, problem["name"])
    there = [c for c in order if max(scores(data["results"][problem["name"]][c]).values()) <= NEAR]
    rest = [c for c in order if c not in there]
    text = f"{len(there)} of {len(order)} contenders get within {NEAR:g} of the solution with every seed"
    return text + (f": {named(there)}." if len(there) <= len(rest) else f"; not {named(rest)}." if rest else ".")


def absent_text(data: Data) -> str:
    """Refusals and failures."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for problem, refused in data["refused"].items():
        for contender, reason in refused.items():
            reasons.setdefault((contender, reason), []).append(problem)
    together: dict[tuple[str, str], list[str]] = {}
    for (contender, reason), problems in reasons.items():
        together.setdefault((reason, ", ".join(problems)), []).append(contender)
    lines = [[named(who), reason, problems] for (reason, problems), who in together.items()]
    text = f"{grid(['contender', 'why not', 'where'], lines)}\n\n" if lines else "All take part everywhere.\n\n"
    failures = [
        [named([contender]), problem, seed, reason.replace("|", "\\|")]
        for problem, here in data["results"].items()
        for contender, result in here.items()
        for seed, reason in result["failed"].items()
    ]
    if not failures:
        return text + "No training with a chosen rate failed.\n"
    head = ["contender", "problem", "seed", "what happened"]
    return f"{text}Trainings with the chosen rate that failed:\n\n{grid(head, failures)}\n"
