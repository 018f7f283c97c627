"""From results to verdicts: what the papers say, what was found, and whether that agrees.

Every condition of a claim is computed from the results; the words of the verdict follow from how many of them hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.published import reasons

Results = dict[str, Any]


class Claim(NamedTuple):
    """One claim of a paper beside what was found.

    Attributes:
        paper: Which paper, and where in it.
        says: What it says, in our words.
        found: Our figures.
        holds: Whether each condition of the claim holds.
        why: Where a difference comes from; it is shown if there is one.
    """

    paper: str
    says: str
    found: str
    holds: tuple[bool, ...]
    why: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return verdict(self.holds)


def verdict(holds: tuple[bool, ...]) -> str:
    """The verdict on a claim, from the conditions it consists of.

    Args:
        holds: Whether each condition holds; at least one.

    Returns:
        "as claimed" if all hold, "not reproduced" if none does, "in part" otherwise.

    Raises:
        ValueError: If there is no condition.
    """
    if not holds:
        raise ValueError("verdict: a claim needs at least one condition.")
    return "as claimed" if all(holds) else "in part" if any(holds) else "not reproduced"


def count(runs: list[Results], key: str) -> int:
    """In how many runs something holds."""
    return sum(bool(run[key]) for run in runs)


def basin(found: Results) -> list[Claim]:
    """What is claimed of the toy with five starts.

    Args:
        found: Results of `benchmarks.published.basin.run`.

    Returns:
        The claims.
    """
    scaled, equal = (five(found[key]) for key in ("scaled", "equal"))
    surgery = ("PCGrad", "MGDA", "CAGrad", "Nash-MTL")
    slow = ("plain sum", "PCGrad", "CAGrad")  # what Nash-MTL's figure 1 shows in one light
    reached = {name: count(runs, "on front") for name, runs in scaled.items()}
    # Where a run ends on the front: θ₁ from −7 (the minimum of f₂) to 7 (that of f₁).
    places = {name: [run["end"][0] for run in runs if run["on front"]] for name, runs in scaled.items()}
    leaning = {name: float(np.mean(at)) if at else np.nan for name, at in places.items()}
    three = {name: cagrad_starts(found["equal"], name) for name in ("plain sum", "PCGrad", "MGDA", "CAGrad")}
    lowest = {name: count(runs, "at minimum") for name, runs in equal.items()}
    lowest_scaled = {name: count(runs, "at minimum") for name, runs in scaled.items()}
    early = {name: sum(at is not None and at <= 35_000 for at in front_steps(runs)) for name, runs in scaled.items()}
    balanced = [abs(at) for at in places["Nash-MTL"]]
    return [
        Claim(
            "FAMO, section 5.1",
            "FAMO reaches the Pareto front from all five starts, as all gradient manipulations do",
            f"FAMO from {reached['FAMO']} of 5; " + ", ".join(f"{name} {reached[name]}" for name in surgery),
            (reached["FAMO"] == 5, *(reached[name] == 5 for name in surgery)),
            reasons.FAMO_FRONT,
        ),
        Claim(
            "FAMO, figure 1",
            "Adam on the plain sum fails from one of five starts",
            f"it reaches the front from {reached['plain sum']} of 5",
            (reached["plain sum"] == 4,),
        ),
        Claim(
            "Nash-MTL, figure 1",
            "after 35 000 steps, the plain sum, PCGrad and CAGrad have not got through from the start whose first loss "
            "is largest",
            "on the front by then: " + ", ".join(f"{name} {early[name]} of 5" for name in slow),
            tuple(at is None or at > 35_000 for at in (front_steps(scaled[name])[2] for name in slow)),
            reasons.NASH_START,
        ),
        Claim(
            "Nash-MTL, figure 1",
            "where losses differ tenfold, the plain sum, PCGrad and CAGrad favour f₂ and MGDA favours f₁; Nash-MTL "
            "ends in between",
            "mean θ₁ at the end, from −7 (best for f₂) to 7: "
            + ", ".join(f"{name} {leaning[name]:.1f}" for name in (*slow, "MGDA", "Nash-MTL")),
            (
                all(leaning[name] < -1.0 for name in slow),
                leaning["MGDA"] > 1.0,
                abs(leaning["Nash-MTL"]) < 1.0 and max(balanced, default=np.nan) < 5.0,
            ),
            reasons.NASH_PLACES,
        ),
        Claim(
            "CAGrad, figure 1",
            "Adam on the plain sum is stuck from two of three starts",
            f"it is stuck from {3 - count(three['plain sum'], 'on front')} of 3",
            (count(three["plain sum"], "on front") == 1,),
        ),
        Claim(
            "CAGrad, figure 1",
            "PCGrad and MGDA stop where they reach the front; CAGrad goes on to the minimum of the average loss",
            "on the front / at the minimum, of 3: "
            + ", ".join(
                f"{name} {count(three[name], 'on front')} / {count(three[name], 'at minimum')}"
                for name in ("PCGrad", "MGDA", "CAGrad")
            ),
            (
                *(
                    count(three[name], "on front") == 3 and count(three[name], "at minimum") == 0
                    for name in ("PCGrad", "MGDA")
                ),
                count(three["CAGrad"], "at minimum") == 3,
            ),
            reasons.CAGRAD_MINIMUM,
        ),
        Claim(
            "ConicGrad, figure 1",
            "FAMO reaches the front from all five starts; Nash-MTL reaches the minimum of the average loss from three "
            "and CAGrad from all five",
            f"FAMO on the front from {reached['FAMO']}; at the minimum, with equal scales, Nash-MTL from "
            f"{lowest['Nash-MTL']} and CAGrad from {lowest['CAGrad']}; with f₁ × 0.1 from {lowest_scaled['Nash-MTL']} "
            f"and {lowest_scaled['CAGrad']}",
            (reached["FAMO"] == 5, lowest["Nash-MTL"] == 3, lowest["CAGrad"] == 5),
            reasons.CONICGRAD,
        ),
    ]


def five(setting: Results) -> dict[str, list[Results]]:
    """The runs from the five starts; the last start is CAGrad's third."""
    return {name: runs[:5] for name, runs in setting["methods"].items()}


def cagrad_starts(setting: Results, name: str) -> list[Results]:
    """The runs from the three starts of the CAGrad paper."""
    runs = setting["methods"][name]
    return [runs[0], runs[5], runs[2]]


def front_steps(runs: list[Results]) -> list[int | None]:
    """After how many steps each run was on the front, None if it never was."""
    return [run["on front after"] for run in runs]


def valleys(found: Results) -> list[Claim]:
    """What is claimed of PCGrad's landscape.

    Args:
        found: Results of `benchmarks.published.valleys.run`.

    Returns:
        The claims.
    """
    plain, pcgrad = found["methods"]["plain sum"], found["methods"]["PCGrad"]
    return [
        Claim(
            "PCGrad, section 2.2",
            "Adam on the sum stalls in the valley of one task",
            f"after {plain['steps']} steps at {place(plain)}, losses {pair(plain['mean losses'])}; the second began "
            f"at {found['start losses'][1]:.1f}",
            (plain["mean losses"][1] > found["start losses"][1], not through(plain)),
        ),
        Claim(
            "PCGrad, figure 1",
            "Adam with PCGrad gets to where the valleys meet",
            f"after {pcgrad['steps']} steps at {place(pcgrad)}, losses {pair(pcgrad['mean losses'])}; the floors are "
            f"at {pair(found['floors'])}",
            (through(pcgrad),),
            reasons.VALLEYS,
        ),
    ]


def through(run: Results) -> bool:
    """Whether the mean of the last steps lies in both valleys: θ₁ near −2, where tanh θ₂ is within 0.01 of 1."""
    x, y = run["mean point"]
    return abs(x + 2.0) < 0.1 and np.tanh(y) > 0.99


def place(run: Results) -> str:
    """A mean point in words."""
    x, y = run["mean point"]
    return f"({x:.2f}, {y:.2f})"


def pair(numbers: list[float]) -> str:
    """Losses in words."""
    return " and ".join(f"{x:.1f}" for x in numbers)


def scales(found: Results) -> list[Claim]:
    """What is claimed of GradNorm's toy.

    Args:
        found: Results of `benchmarks.published.scales.run`.

    Returns:
        The claims.
    """
    weights = {k: mean_over_seeds(found[k]["methods"]["GradNorm"], "weights") for k in ("two", "ten")}
    ratios = {k: {m: mean_over_seeds(r, "ratios") for m, r in found[k]["methods"].items()} for k in ("two", "ten")}
    mean = {k: {m: float(r.mean()) for m, r in each.items()} for k, each in ratios.items()}
    names = {"two": "two tasks", "ten": "ten tasks"}
    return [
        Claim(
            "GradNorm, section 4",
            "the smaller the scale of a task's targets, the larger its weight",
            "; ".join(f"{names[k]}: weights from {w[0]:.3g} down to {w[-1]:.2g}" for k, w in weights.items()),
            tuple(bool((np.diff(w) < 0).all()) for w in weights.values()),
        ),
        Claim(
            "GradNorm, section 4",
            "with equal weights, the task of scale 100 keeps that of scale 1 from learning",
            f"two tasks: the small one ends at {ratios['two']['plain sum'][0]:.3f} of its first loss, the large one at "
            f"{ratios['two']['plain sum'][1]:.3f}",
            (ratios["two"]["plain sum"][0] > 0.95,),
            reasons.SUPPRESSED,
        ),
        Claim(
            "GradNorm, figure 2",
            "the normalised test loss is lower than with equal weights, for two tasks and for ten",
            "; ".join(f"{names[k]}: {mean[k]['GradNorm']:.3f} instead of {mean[k]['plain sum']:.3f}" for k in names),
            tuple(mean[k]["GradNorm"] < mean[k]["plain sum"] for k in names),
            reasons.NORMALISED,
        ),
        Claim(
            "GradNorm, section 4",
            "it ends better than uncertainty weighting",
            "; ".join(f"{names[k]}: {mean[k]['GradNorm']:.3f} against {mean[k]['uncertainty']:.3f}" for k in names),
            tuple(mean[k]["GradNorm"] < mean[k]["uncertainty"] for k in names),
            reasons.UNCERTAIN,
        ),
    ]


def mean_over_seeds(runs: list[Results], key: str) -> np.ndarray:
    """The mean of a list of numbers over the seeds."""
    return np.mean([run[key] for run in runs], axis=0)


def softadapt(found: Results) -> list[Claim]:
    """What the README of SoftAdapt prints.

    Args:
        found: Results of `benchmarks.published.softadapt.run`.

    Returns:
        One claim a variant.
    """
    return [
        Claim(
            "SoftAdapt, README",
            f"{name}: {', '.join(each['printed'])}",
            ", ".join(each["found"]),
            tuple(a == b for a, b in zip(each["printed"], each["found"], strict=True)),
        )
        for name, each in found.items()
    ]


def pinn(found: Results) -> list[Claim]:
    """What is claimed of ConFIG on the Burgers equation.

    Args:
        found: Results of `benchmarks.published.pinn.run`.

    Returns:
        The claims.
    """
    runs = found["methods"]
    error = {name: geometric_mean(errors) for name, errors in runs.items()}
    least = "M-ConFIG, as many gradients"
    adam, config, cheap = error["plain sum"], error["ConFIG"], error[least]
    others = [name for name in error if "ConFIG" not in name]

    def better(first: str, second: str) -> bool:
        """With every seed: what differs by less than the seeds do says nothing."""
        return all(a < b for a, b in zip(runs[first], runs[second], strict=True))

    return [
        Claim(
            "ConFIG, section 4",
            "ConFIG ends with a smaller error than Adam on the sum, at as many steps",
            f"{config:.1e} against {adam:.1e}",
            (better("ConFIG", "plain sum"),),
            reasons.PINN,
        ),
        Claim(
            "ConFIG, section 4",
            "ConFIG is better than other surgeries and weightings, too",
            ", ".join(f"{name} {error[name]:.1e}" for name in others if name != "plain sum") + f"; ConFIG {config:.1e}",
            tuple(better("ConFIG", name) for name in others if name != "plain sum"),
            reasons.PINN,
        ),
        Claim(
            "ConFIG, section 4",
            "for the same work, M-ConFIG, which computes one gradient per step, is best of all",
            f"with as many gradients as the others {cheap:.1e}; best of the others "
            f"{min(error[name] for name in [*others, 'ConFIG']):.1e}",
            tuple(better(least, name) for name in [*others, "ConFIG"]),
            reasons.PINN,
        ),
    ]


def geometric_mean(errors: list[float]) -> float:
    """Mean of errors that span powers of ten."""
    return float(np.exp(np.mean(np.log(errors))))
