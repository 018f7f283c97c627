"""From single trainings to what the page says: everything is summed up here, and stored beside the page."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics as means
import time
from typing import Any

import numpy as np
import torch

import gradsurgery
from benchmarks.evidence import contenders
from benchmarks.evidence.contenders import ALONE, SUM, TUNED
from benchmarks.evidence.problem import Problem, clipped, one_thread, score
from benchmarks.evidence.runner import Queue, Records
from benchmarks.evidence.statistics import bootstrap, delta_m, ranks, relative, verdict
from benchmarks.evidence.training import PROBLEMS, Plan, first_trainings, last_trainings, vector
from gradsurgery.cli import catalogue
from gradsurgery.cli.comparing import NEAR

Data = dict[str, Any]
TOYS = "toys"
#: Problems on which the price of a step is measured.
PRICED = ("GradNorm's toy, 2 tasks", "GradNorm's toy, 10 tasks")


def collect(plan: Plan, records: Records) -> Data:
    """Gather what was trained, problem by problem.

    Args:
        plan: The plan.
        records: Results by key; what is missing is left out.

    Returns:
        By problem and contender: the choice, and scores and errors by seed.
    """
    found: Data = {}
    for name in plan.problems:
        problem = plan.problem(name)
        found[name] = {}
        for contender in [*contenders.alone(problem), *plan.contenders]:
            if contenders.refused(contender, problem):
                continue
            first = first_trainings(plan, name, contender)
            if any(training.key not in records for training in first):
                continue
            last = [t for t in last_trainings(plan, first, records) if t.key in records]
            if not last:
                continue
            rate, number = last[0].rate, last[0].vector
            # The best that each rate reached, over the weight vectors.
            reached = [
                min(score(records[t.key].get("validation")) for t in first if t.rate == r) for r in range(plan.rates)
            ]
            results = {str(t.seed): records[t.key] for t in last}
            found[name][contender] = {
                "rate": rate,
                "edge": rate in (0, plan.rates - 1),
                "validation": [round(value, 4) for value in reached],
                "errors": {seed: floored(record.get("test"), problem) for seed, record in results.items()},
                "failed": {seed: record["failed"] for seed, record in results.items() if "failed" in record},
            }
            if contender == TUNED:
                weights = vector(problem, number)
                found[name][contender]["weights"] = {loss: float(f"{w:.3g}") for loss, w in weights.items()}
    return found


def floored(errors: dict[str, float] | None, problem: Problem) -> dict[str, float] | None:
    """Errors, where what is near enough on a toy counts as there; who is nearer by a hair does not matter."""
    if errors is None or problem.family != TOYS:
        return errors
    return {task: max(error, NEAR) for task, error in errors.items()}


def scores(result: Data) -> dict[str, float]:
    """Score of each seed of a contender."""
    return {seed: score(errors) for seed, errors in result["errors"].items()}


def compared(results: Data, name: str, base: str, problems: list[str]) -> dict[str, list[float]]:
    """Logarithms of the ratios of scores of two contenders, by problem, seed by seed."""
    found = {}
    for problem in problems:
        here = results[problem]
        if name in here and base in here:
            mine, theirs = scores(here[name]), scores(here[base])
            seeds = [seed for seed in mine if seed in theirs]
            if seeds:
                found[problem] = relative([mine[s] for s in seeds], [theirs[s] for s in seeds])
    return found


def stretched_ranks(results: Data, problems: list[str], count: int) -> dict[str, dict[str, list[float]]]:
    """Ranks by contender and problem, a rank per seed; from 1 to `count`, however many take part."""
    found: dict[str, dict[str, list[float]]] = {}
    for problem in problems:
        table = {name: scores(result) for name, result in results[problem].items() if not name.startswith(ALONE)}
        for seed in sorted({seed for row in table.values() for seed in row}):
            here = [name for name, row in table.items() if seed in row]
            if len(here) < 2:
                continue
            places = ranks([table[name][seed] for name in here])
            for name, place in zip(here, places, strict=True):
                stretched = 1 + (place - 1) / (len(here) - 1) * (count - 1)
                found.setdefault(name, {}).setdefault(problem, []).append(stretched)
    return found


def improvements(results: Data, name: str, problems: list[str]) -> dict[str, list[float]]:
    """Δm of a contender by problem, a value per seed, where single-task models were trained with that seed."""
    found = {}
    for problem in problems:
        here = results[problem]
        tasks = PROBLEMS[problem].tasks
        if name not in here or not all(ALONE + task in here for task in tasks):
            continue
        values = []
        for seed, errors in here[name]["errors"].items():
            singles = {task: here[ALONE + task]["errors"].get(seed) for task in tasks}
            if any(single is None for single in singles.values()):
                continue
            base = {task: clipped(single[task]) for task, single in singles.items() if single is not None}
            mine = {task: clipped(errors[task]) if errors else clipped(float("nan")) for task in tasks}
            values.append(delta_m(mine, base))
        if values:
            found[problem] = values
    return found


def overall(plan: Plan, results: Data) -> list[Data]:
    """The table of all contenders over all problems but the toys, best mean rank first."""
    problems = [name for name in plan.problems if PROBLEMS[name].family != TOYS]
    facts = catalogue.facts()
    places = stretched_ranks(results, problems, len(plan.contenders))
    rows = []
    # As many questions are asked at once as there are contenders: Bonferroni's level for all of them together.
    strict = 1 - 0.05 / len(plan.contenders)
    for name in plan.contenders:
        if name not in places:
            continue
        mine = [problem for problem in problems if name in results[problem]]
        row: Data = {
            "name": name,
            "kind": facts[name].kind if name in facts else "baseline",
            "problems": len(mine),
            "rank": _interval(list(places[name].values())),
            "failed": sum(len(results[problem][name]["failed"]) for problem in mine),
            "trainings": sum(len(results[problem][name]["errors"]) for problem in mine),
            "edge": sum(results[problem][name]["edge"] for problem in mine),
        }
        for key, base in (("sum", SUM), ("tuned", TUNED)):
            if name == base or base not in places:
                continue
            differences = compared(results, name, base, problems)
            if not differences:
                continue
            verdicts = [verdict(values) for values in differences.values()]
            row[key] = {
                "ratio": _ratio(differences),
                "strict": _ratio(differences, level=strict),
                "better": verdicts.count(1),
                "even": verdicts.count(0),
                "worse": verdicts.count(-1),
            }
            _, low, high = row[key]["ratio"]
            if high < 1 or low > 1:
                row[key]["without"] = left_out(differences)
        deltas = improvements(results, name, problems)
        if deltas:
            row["delta_m"] = _interval(list(deltas.values()))
            row["median_delta_m"] = round(means.median(means.fmean(values) for values in deltas.values()), 4)
        rows.append(row)
    return sorted(rows, key=lambda row: row["rank"][0])


def left_out(differences: dict[str, list[float]]) -> Data:
    """How far a ratio of errors rests on one problem, or on one family of problems that resemble each other.

    Args:
        differences: Logarithms of ratios by problem, seed by seed.

    Returns:
        By "problem" and "family", the name of what is left out and the ratio with its interval over the others; nothing
        where no other is left.
    """
    families = {problem: PROBLEMS[problem].family for problem in differences}
    parts = {"problem": {name: [name] for name in differences}, "family": {}}
    for problem, family in families.items():
        parts["family"].setdefault(family, []).append(problem)
    return {
        kind: {
            name: _ratio({problem: values for problem, values in differences.items() if problem not in out})
            for name, out in groups.items()
            if len(out) < len(differences)
        }
        for kind, groups in parts.items()
    }


def _ratio(differences: dict[str, list[float]], level: float = 0.95) -> list[float]:
    return [round(float(np.exp(x)), 4) for x in bootstrap(list(differences.values()), level=level)]


def _interval(groups: list[list[float]]) -> list[float]:
    return [round(x, 4) for x in bootstrap(groups)]


def described(plan: Plan) -> list[Data]:
    """What was set for each problem."""
    found = []
    for name in plan.problems:
        problem = plan.problem(name)
        found.append(
            {
                "name": name,
                "family": problem.family,
                "says": problem.says,
                "losses": list(problem.losses),
                "tasks": list(problem.tasks),
                "alone": problem.alone,
                "steps": problem.steps,
                "base": problem.base.__name__,
                "parameters": sum(p.numel() for p in problem.begin(0).model.parameters()),
                "rates": [float(f"{rate:.2g}") for rate in problem.rates(plan.rates)],
                "sizes": {loss: float(f"{value:.2g}") for loss, value in _first_losses(name).items()},
            }
        )
    return found


def _first_losses(name: str) -> dict[str, float]:
    with torch.no_grad():
        return {loss: float(value) for loss, value in PROBLEMS[name].begin(0).losses(0, 0).items()}


def refusals(plan: Plan) -> Data:
    """By problem, who does not take part, and why."""
    found: Data = {}
    for name in plan.problems:
        reasons = {c: contenders.refused(c, PROBLEMS[name]) for c in plan.contenders}
        found[name] = {c: reason for c, reason in reasons.items() if reason}
    return found


def prices(plan: Plan, rounds: int = 5, steps: int = 12) -> Data:
    """Time of a whole step relative to that of the plain sum: median over rounds in which all take turns.

    Processor time of one thread, which does not count what other programs take meanwhile.

    Args:
        plan: The plan.
        rounds: Number of rounds; a first one warms up.
        steps: Steps of a round.

    Returns:
        Ratios by problem and contender, and the milliseconds of the plain sum.
    """
    found: Data = {}
    with one_thread():
        for name in PRICED:
            problem = PROBLEMS[name]
            entrants = [c for c in plan.contenders if c != TUNED and contenders.refused(c, problem) is None]
            steppers = {c: contenders.stepper(c, problem, 0, problem.lr) for c in dict.fromkeys([SUM, *entrants])}
            seconds: dict[str, list[float]] = {c: [] for c in steppers}
            for turn in range(rounds + 1):
                for c, stepper in steppers.items():
                    began = time.process_time()
                    for step in range(steps):
                        stepper.step(turn * steps + step)
                    if turn:
                        seconds[c].append((time.process_time() - began) / steps)
            plain = seconds[SUM]
            found[name] = {
                "milliseconds": round(1000 * means.median(plain), 3),
                "ratio": {
                    c: round(means.median(a / b for a, b in zip(mine, plain, strict=True)), 2)
                    for c, mine in seconds.items()
                },
            }
    return found


def summary(plan: Plan, records: Records, costs: Data) -> Data:
    """All that the page is written from.

    Args:
        plan: The plan.
        records: Results by key.
        costs: What :func:`prices` found.

    Returns:
        Plain values.
    """
    queue = Queue(plan, records)
    results = collect(plan, records)
    return {
        "versions": {"gradsurgery": gradsurgery.__version__}
        | {package: importlib.metadata.version(package) for package in ("torch", "numpy", "scipy", "scikit-learn")}
        | {"python": platform.python_version()},
        "plan": {
            "contenders": list(plan.contenders),
            "rates": plan.rates,
            "vectors": plan.vectors,
            "seeds": list(plan.seeds),
            "share": plan.share,
            "planned": queue.total(),
            "finished": sum(queue.done().values()),
        },
        "problems": described(plan),
        "refused": refusals(plan),
        "costs": costs,
        "overall": overall(plan, results),
        "results": results,
    }


def again(data: Data) -> Data:
    """Work out anew what follows from the errors that a summary holds. Nothing is trained.

    Args:
        data: A summary, for instance the one that is kept beside the page.

    Returns:
        The summary, with its sums over problems made by this version of the code.
    """
    names = (problem["name"] for problem in data["problems"])
    plan = Plan(tuple(names), tuple(data["plan"]["contenders"]))
    return data | {"overall": overall(plan, data["results"])}


def dumps(data: Data) -> str:
    """JSON with a line for each contender, which keeps differences readable."""

    def level(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            return "[\n" + ",\n".join(level(item, depth - 1) for item in value) + "\n]"
        lines = (f"{json.dumps(key, ensure_ascii=False)}: {level(item, depth - 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n}"

    parts = (
        f"{json.dumps(key)}: {level(value, {'results': 2, 'costs': 0, 'versions': 0, 'plan': 0}.get(key, 1))}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"
