"""Sentences about the results, each worked out from the summary."""

from __future__ import annotations

import statistics as means

from benchmarks.evidence.contenders import SUM, TUNED
from benchmarks.evidence.reading import (
    Data,
    mean_score,
    named,
    nearest,
    ordered,
    percent,
    real_problems,
    span,
    stands,
    tally,
)
from benchmarks.evidence.results import scores

#: Over fewer problems than this nothing is said of a method.
LEAST_PROBLEMS = 3
#: Losses whose largest is this many times the smallest at the start are of different size.
DIFFERENT = 10.0
#: More names than this are a table's business.
MANY = 12
#: An error from here on: next to nothing has been learnt.
NOTHING = 0.95


def conclusions(data: Data) -> list[str]:
    """What the figures bear out.

    Args:
        data: The summary.

    Returns:
        Sentences in Markdown.
    """
    found = [
        against(data, "sum", "the plain sum"),
        against(data, "tuned", "the tuned fixed weights"),
        tuned_weights(data),
        by_size(data),
        leaders(data),
        winners(data),
        by_kind(data),
        together(data),
        yardsticks(data),
    ]
    return [sentence for sentence in found if sentence]


def short(data: Data) -> list[str]:
    """The first sentences of the page.

    Args:
        data: The summary.

    Returns:
        Sentences in Markdown; none if nothing can be compared.
    """
    if not conclusions(data):
        return []
    rows = [row for row in data["overall"] if row["name"] not in (SUM, TUNED)]

    def fewer(key: str) -> list[str]:
        return [row["name"] for row in rows if key in row and row[key]["ratio"][2] < 1 and stands(row, key)]

    return [
        f"Lower error than the plain sum, whichever problem or family of problems is left out: {named(fewer('sum'))}.",
        f"Lower error than tuned fixed weights: {named(fewer('tuned'))}. So try tuned weights first.",
        "No method is best everywhere, and these are small problems and short training runs: run your own comparison.",
    ]


def against(data: Data, key: str, label: str) -> str:
    """How many methods have a lower and a higher error than a baseline, over all problems."""
    methods = [row for row in data["overall"] if key in row and row["name"] not in (SUM, TUNED)]
    methods.sort(key=lambda row: row[key]["ratio"][0])
    few = [row["name"] for row in methods if row["problems"] < LEAST_PROBLEMS]
    methods = [row for row in methods if row["problems"] >= LEAST_PROBLEMS]
    if not methods:
        return ""

    fewer = [row for row in methods if row[key]["ratio"][2] < 1]
    more = [row for row in reversed(methods) if row[key]["ratio"][1] > 1]
    kept_fewer, kept_more = ([row for row in side if stands(row, key)] for side in (fewer, more))
    lost = [row for row in fewer if row not in kept_fewer]
    strict = [row["name"] for row in kept_fewer if row[key]["strict"][2] < 1]
    strict += [row["name"] for row in kept_more if row[key]["strict"][1] > 1]
    rest = len(methods) - len(kept_fewer) - len(kept_more)
    text = (
        f"**Compared with {label}, {len(kept_fewer)} of {len(methods)} methods "
        f"{'has' if len(kept_fewer) == 1 else 'have'} a lower error, {len(kept_more)} a "
        f"higher one, and for the other {rest} no difference can be shown.** A difference counts only if the 95 % "
        "interval of the ratio stays on one side of 1 whichever problem, or family of problems, is left out. "
        f"Lower: {listed(kept_fewer)}. Higher, worst first: {listed(kept_more)}."
    )
    if lost:
        text += " Lower over all problems, but not if a certain one is left out: "
        text += "; ".join(doubt(data, row, key) for row in lost) + "."
    if more != kept_more:
        others = len(more) - len(kept_more)
        text += (
            f" For {others} others it is higher over all problems, but not if a certain problem or family is left out."
        )
    return text + (
        f" With so many intervals some are wrong by chance; after correction for {len(data['plan']['contenders'])} "
        f"comparisons, what remains is {named(strict) if len(strict) <= MANY else f'{len(strict)} of these'}."
        + (f" Too few problems to say: {named(few)}." if few else "")
    )


def listed(rows: list[Data]) -> str:
    """Names in a sentence, unless they are too many."""
    return named([row["name"] for row in rows]) if len(rows) <= MANY else "too many to name here"


def doubt(data: Data, row: Data, key: str) -> str:
    """Which problem or family a method's lower error depends on."""
    found = (nearest(row, key, kind) for kind in ("problem", "family"))
    name, without = next(out for out in found if out is not None and out[1][2] >= 1)
    plain = mean_score(data, name, SUM)
    nothing = ", on which the plain sum learns nothing" if plain is not None and plain >= NOTHING else ""
    before, after = span(row[key]["ratio"], 3), span(without, 3)
    return f"`{row['name']}`, whose ratio of {before} becomes {after} without {name}{nothing}"


def tuned_weights(data: Data) -> str:
    """The two baselines against each other."""
    rows = {row["name"]: row for row in data["overall"]}
    if TUNED not in rows or "sum" not in rows[TUNED] or rows[TUNED]["problems"] < LEAST_PROBLEMS:
        return ""
    versus, places = rows[TUNED]["sum"], [row["name"] for row in data["overall"]]
    _, low, high = versus["ratio"]
    judged = "lower error" if high < 1 else "higher error" if low > 1 else "no clear difference over all problems"
    if judged.endswith("error"):
        held = "" if stands(rows[TUNED], "sum") else ", but not if a certain problem or family is left out"
        judged += held or ", whichever problem or family is left out"
    tries = data["plan"]["rates"] * data["plan"]["vectors"]
    return (
        f"**Tuned fixed weights compared with the plain sum: {judged}.** Chosen among {tries} trainings instead of "
        f"{data['plan']['rates']}, their error is {span(versus['ratio'])} times as large; they are better on "
        f"{versus['better']} and worse on {versus['worse']} of {rows[TUNED]['problems']} problems. By mean rank they "
        f"are number {places.index(TUNED) + 1} of {len(places)}, the plain sum is number {places.index(SUM) + 1}."
    )


def by_size(data: Data) -> str:
    """Where losses differ in size at the start, and where they do not."""
    parts = []
    for differ in (True, False):
        names = [
            problem["name"]
            for problem in real_problems(data)
            if differ == (max(problem["sizes"].values()) >= DIFFERENT * min(problem["sizes"].values()))
        ]
        counts = [tally(data, name) for name in names]
        better, worse, count = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
        if not count:
            return ""
        parts.append((len(names), 100 * better / count, 100 * worse / count))
    (many, up, down), (others, up_there, down_there) = parts
    return (
        f"**By the size of the losses.** On the {many} problems whose losses start a factor of {DIFFERENT:g} or more "
        f"apart, a method is better than the plain sum in {up:.0f} % of the cases and worse in {down:.0f} %. On the "
        f"{others} whose losses start closer together it is better in {up_there:.0f} % and worse in {down_there:.0f} %."
    )


def winners(data: Data) -> str:
    """Whether one contender wins everywhere."""
    orders = [order for order in (ordered(data, problem["name"]) for problem in real_problems(data)) if order]
    if len(orders) < LEAST_PROBLEMS:
        return ""

    def among(ends: list[list[str]]) -> dict[str, int]:
        return {name: sum(name in end for end in ends) for name in data["plan"]["contenders"]}

    top = among([order[: max(1, len(order) // 4)] for order in orders])
    bottom = among([order[-max(1, len(order) // 4) :] for order in orders])
    most = max(top.values())
    both = sum(top[name] > 0 and bottom[name] > 0 for name in top)
    lead = "One method wins everywhere" if most == len(orders) else "No method wins everywhere"
    return (
        f"**{lead}.** {len({order[0] for order in orders})} contenders share the first places on {len(orders)} "
        f"problems. Most often in the best quarter, on {most} of {len(orders)}: "
        f"{named([name for name, count in top.items() if count == most])}. {both} of {len(top)} contenders are in "
        "the best quarter on one problem and in the worst quarter on another."
    )


def leaders(data: Data) -> str:
    """The best mean ranks, and how little they are apart."""
    rows = [row for row in data["overall"] if row["problems"] >= LEAST_PROBLEMS]
    if len(rows) < 5:
        return ""
    best = ", ".join(f"{named([row['name']])} {span(row['rank'], 1)}" for row in rows[:5])
    overlap = sum(row["rank"][1] <= rows[0]["rank"][2] for row in rows[1:])
    last = ", ".join(f"{named([row['name']])} {span(row['rank'], 1)}" for row in rows[-3:])
    return (
        f"**Mean ranks among {len(data['overall'])}.** The first five: {best}. The interval of the first overlaps "
        f"those of {overlap} others. The last three: {last}."
    )


def by_kind(data: Data) -> str:
    """Surgery compared with weighting."""
    parts = []
    for kind in ("surgery", "weighting"):
        rows = [row for row in data["overall"] if row["kind"] == kind and "sum" in row]
        if not rows:
            return ""
        ratio = means.median(row["sum"]["ratio"][0] for row in rows)
        rank = means.fmean(row["rank"][0] for row in rows)
        parts.append(f"{kind} {ratio:.2f} and {rank:.1f} ({len(rows)} methods)")
    return (
        "**Surgery compared with weighting.** Median over the methods of the error relative to the plain sum, and mean "
        f"of their mean ranks among {len(data['overall'])}: {', '.join(parts)}."
    )


def together(data: Data) -> str:
    """Whether joint training helps at all."""
    rows = {row["name"]: row["delta_m"] for row in data["overall"] if "delta_m" in row}
    if SUM not in rows:
        return ""
    medians = [row["median_delta_m"] for row in data["overall"] if "delta_m" in row]
    best = max(rows, key=lambda name: rows[name][0])
    return (
        f"**Joint training compared with one model per task.** Δm of the plain sum is {percent(rows[SUM])}. The "
        f"interval lies above 0 for "
        f"{sum(low > 0 for _, low, _ in rows.values())} of {len(rows)} contenders and below for "
        f"{sum(high < 0 for _, _, high in rows.values())}. It is highest for {named([best])}: {percent(rows[best])}. "
        f"Tasks that a model of their own learns well dominate such means; the median over the problems is above 0 for "
        f"{sum(median > 0 for median in medians)} contenders."
    )


def yardsticks(data: Data) -> str:
    """How far apart results are that should be equal, or are drawn at random."""
    rows = {row["name"]: row["sum"]["ratio"] for row in data["overall"] if "sum" in row}
    spreads = []
    for problem in real_problems(data):
        if mean_score(data, problem["name"], SUM) is None:
            continue
        values = list(scores(data["results"][problem["name"]][SUM]).values())
        spreads.append((max(values) - min(values)) / means.fmean(values))
    if not spreads or "FixedWeighter" not in rows or "RandomWeighter" not in rows:
        return ""
    return (
        "**Yardsticks.** `FixedWeighter` with its defaults is the plain sum: its error is "
        f"{span(rows['FixedWeighter'], 3)} times as large. `RandomWeighter`, a baseline that any method should beat, "
        f"has {span(rows['RandomWeighter'])}. From best to worst seed the plain sum's error varies by "
        f"{100 * means.median(spreads):.0f} % of its mean, in the median over the problems."
    )


def edges(data: Data) -> str:
    """How often the best rate lay at an end of the grid."""
    rates = [result["rate"] for here in data["results"].values() for result in here.values()]
    low, high = rates.count(0), rates.count(data["plan"]["rates"] - 1)
    return (
        f"In {low + high} of {len(rates)} cases the chosen rate is at an end of the grid ({low} times the lowest, "
        f"{high} times the highest), so that a wider grid might have found a better one."
    )


def unsolved(data: Data) -> str:
    """Problems on which most contenders learnt next to nothing."""
    parts = []
    for problem in real_problems(data):
        found = [mean_score(data, problem["name"], name) for name in ordered(data, problem["name"])]
        nothing = sum(value is not None and value >= NOTHING for value in found)
        if 2 * nothing > len(found):
            parts.append(f"{problem['name']} ({nothing} of {len(found)})")
    if not parts:
        return ""
    return (
        f"* **Nothing from ratios of failures.** Where most contenders have an error of {NOTHING:g} or more, having "
        f"learnt next to nothing in the given steps, *better than the plain sum* does not mean good: "
        f"{', '.join(parts)}.\n"
    )
