"""What the page, its sentences and its pictures read off the summary, and how they write numbers."""

from __future__ import annotations

import statistics as means
from typing import Any

from benchmarks.evidence.contenders import SUM, TUNED
from benchmarks.evidence.results import TOYS, compared, scores
from benchmarks.evidence.statistics import verdict

Data = dict[str, Any]


def real_problems(data: Data) -> list[Data]:
    """All problems but the toys."""
    return [problem for problem in data["problems"] if problem["family"] != TOYS]


def mean_score(data: Data, problem: str, contender: str) -> float | None:
    """Mean over the seeds of a contender's score, or None if it was not trained."""
    result = data["results"].get(problem, {}).get(contender)
    return None if result is None else means.fmean(scores(result).values())


def ordered(data: Data, problem: str) -> list[str]:
    """Contenders on a problem, the lowest mean score first."""
    found = {name: mean_score(data, problem, name) for name in data["plan"]["contenders"]}
    trained = {name: value for name, value in found.items() if value is not None}
    return sorted(trained, key=lambda name: trained[name])


def single_task(data: Data, problem: Data) -> float | None:
    """Mean error of the single-task models, if there is one for each task."""
    found = [mean_score(data, problem["name"], f"alone: {task}") for task in problem["tasks"]]
    known = [value for value in found if value is not None]
    return means.fmean(known) if problem["alone"] and len(known) == len(found) else None


def tally(data: Data, problem: str) -> tuple[int, int, int]:
    """On one problem: methods that are better than the plain sum, worse, and all."""
    methods = [name for name in ordered(data, problem) if name not in (SUM, TUNED)]
    verdicts = [
        verdict(values) for name in methods for values in compared(data["results"], name, SUM, [problem]).values()
    ]
    return verdicts.count(1), verdicts.count(-1), len(verdicts)


def named(names: list[str]) -> str:
    """Names in a sentence."""
    return ", ".join(name if name in (SUM, TUNED) else f"`{name}`" for name in names) or "none"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def span(interval: list[float], digits: int = 2) -> str:
    """An estimate and its interval."""
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} ({low}–{high})"


def percent(interval: list[float]) -> str:
    """Likewise, of a share that may be negative."""
    value, low, high = (f"{100 * x:+.0f}".replace("-", "−") for x in interval)
    return f"{value} % ({low} to {high})"


def nearest(row: Data, key: str, kind: str) -> tuple[str, list[float]] | None:
    """What brings a ratio of errors closest to 1, or past it, when it is left out.

    Args:
        row: A contender's row of the summary.
        key: "sum" or "tuned": whom it is compared with.
        kind: "problem" or "family".

    Returns:
        Its name, and the ratio without it; None where the ratio with all of them cannot be told from 1.
    """
    versus = row[key]
    without = versus.get("without", {}).get(kind)
    if not without:
        return None
    fewer = versus["ratio"][2] < 1
    name = max(without, key=lambda out: without[out][2]) if fewer else min(without, key=lambda out: without[out][1])
    return name, without[name]


def stands(row: Data, key: str) -> bool:
    """Whether a ratio of errors stays on its side of 1 whatever one problem, or one family, is left out."""
    fewer = row[key]["ratio"][2] < 1
    found = [nearest(row, key, kind) for kind in ("problem", "family")]
    return all(out is not None and (out[1][2] < 1 if fewer else out[1][1] > 1) for out in found)
