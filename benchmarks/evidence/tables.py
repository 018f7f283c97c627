"""Regressions with badly scaled targets: data that comes with scikit-learn, and GradNorm's toy."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.evidence.problem import (
    Losses,
    Problem,
    SharedTrunk,
    Split,
    Start,
    chosen,
    class_loss,
    mlp,
    seeded,
    unexplained,
    wrong,
)
from gradsurgery import label_entropy
from gradsurgery.problems import ScaledRegression


class Table(NamedTuple):
    """Rows of a data set.

    Attributes:
        inputs: (n, k).
        targets: By task, (n,): numbers in their own units, or labels as integers.
    """

    inputs: Tensor
    targets: dict[str, Tensor]


#: Columns of the diabetes data that are to be predicted besides the progression of the disease.
_MEASURED = {"body mass": "bmi", "blood pressure": "bp", "log triglycerides": "s5"}
_WINE = {"alcohol": "alcohol", "magnesium": "magnesium", "proline": "proline"}


@functools.cache
def table(name: str) -> Table:
    """Read a data set.

    Args:
        name: "linnerud", "diabetes" or "wine".

    Returns:
        Its rows.
    """
    from sklearn import datasets

    data: Any
    if name == "linnerud":
        data = datasets.load_linnerud()
        columns = [target.lower() for target in data.target_names]
        return Table(_tensor(data.data), dict(zip(columns, _tensor(data.target).T, strict=True)))
    if name == "diabetes":
        data, wanted = datasets.load_diabetes(scaled=False), _MEASURED
        first = {"progression": _tensor(data.target)}
    else:
        data, wanted = datasets.load_wine(), _WINE
        first = {"cultivar": torch.tensor(data.target, dtype=torch.int64)}
    names, values = list(data.feature_names), _tensor(data.data)
    kept = [i for i, column in enumerate(names) if column not in wanted.values()]
    return Table(values[:, kept], first | {task: values[:, names.index(column)] for task, column in wanted.items()})


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


#: Rows for validation and for testing; the rest is for training. Every seed splits anew.
HELD_OUT = {"linnerud": (5, 5), "diabetes": (80, 120), "wine": (36, 50)}
#: Layers of the network: few rows, few neurons.
LAYERS = {"linnerud": (8,), "diabetes": (32, 32), "wine": (32, 32)}
TABLE_STEPS = 100


def predict(seed: int, name: str) -> Start:
    whole = table(name)
    order = torch.randperm(len(whole.inputs), generator=torch.Generator().manual_seed(seed))
    validation, test = HELD_OUT[name]
    rows = {"validation": order[:validation], "test": order[validation : validation + test]}
    training = order[validation + test :]
    deviation, mean = torch.std_mean(whole.inputs[training], dim=0)
    inputs = (whole.inputs - mean) / deviation
    centre = {task: y[training].float().mean() for task, y in whole.targets.items()}
    spread = {task: y[training].float().std() for task, y in whole.targets.items()}
    heads = {task: 1 if y.is_floating_point() else int(y.max()) + 1 for task, y in whole.targets.items()}
    labels = {task for task, outputs in heads.items() if outputs > 1}
    with seeded(seed):
        model = SharedTrunk(mlp([inputs.shape[1], *LAYERS[name]]), LAYERS[name][-1], heads)
    batches = training[chosen(len(training), TABLE_STEPS, min(32, len(training)), seed)]

    def outputs(some: Tensor) -> dict[str, Tensor]:
        """Scores, and numbers in the units of the targets: a head works in standard deviations, as is usual."""
        found = model(inputs[some])
        return {t: y if t in labels else centre[t] + spread[t] * y[:, 0] for t, y in found.items()}

    def differences(step: int, draw: int) -> Losses:
        some = batches[step, draw]
        return {t: y - whole.targets[t][some] for t, y in outputs(some).items() if t not in labels}

    def losses(step: int, draw: int) -> Losses:
        some = batches[step, draw]
        return {
            t: class_loss(y, whole.targets[t][some]) if t in labels else (y - whole.targets[t][some]).square().mean()
            for t, y in outputs(some).items()
        }

    def residuals(step: int) -> Losses:
        return {t: r / math.sqrt(len(r)) for t, r in differences(step, 0).items()}

    @torch.no_grad()
    def errors(split: Split) -> dict[str, float]:
        found, some = outputs(rows[split]), rows[split]
        truth = {t: y[some] for t, y in whole.targets.items()}
        return {
            t: wrong(y, truth[t]) if t in labels else unexplained(y, truth[t], whole.targets[t].var(correction=0))
            for t, y in found.items()
        }

    priors = {
        t: label_entropy(torch.bincount(y[training]).tolist()) if t in labels else float(spread[t] ** 2)
        for t, y in whole.targets.items()
    }
    return Start(model, model.last_shared, losses, errors, priors, None if labels else residuals)


TOY_STEPS = {2: 120, 10: 70}


def scaled(seed: int, scales: tuple[float, ...]) -> Start:
    toy = ScaledRegression(scales, inputs=20, outputs=10, seed=seed)
    model = toy.model(width=48, depth=3)
    names = [f"task {i + 1}" for i in range(len(scales))]
    number = {"validation": -1, "test": -2}

    def batch(step: int, draw: int) -> Tensor:
        return toy.inputs(3 * step + draw, 64)

    def losses(step: int, draw: int) -> Losses:
        return dict(zip(names, toy.losses(model, batch(step, draw)), strict=True))

    def residuals(step: int) -> Losses:
        x = batch(step, 0)
        pairs = zip(names, model(x), toy.targets(x), strict=True)
        return {name: (y - t).flatten() / math.sqrt(t.numel()) for name, y, t in pairs}

    def errors(split: Split) -> dict[str, float]:
        return dict(zip(names, toy.relative_losses(model, toy.inputs(number[split], 1000)).tolist(), strict=True))

    power = [float(t.square().mean()) for t in toy.targets(toy.inputs(-3, 1000))]
    last = list(model.trunk[-1].parameters())
    return Start(model, last, losses, errors, dict(zip(names, power, strict=True)), residuals)


def _table_problem(name: str, says: str) -> Problem:
    tasks = tuple(table(name).targets)
    return Problem(
        name,
        "tables",
        f"{says} An MLP with layers of {' and '.join(map(str, LAYERS[name]))}, losses in the units of the targets. "
        "Errors: squared error in shares of the target's variance, and wrong labels in shares of guessing.",
        tasks,
        tasks,
        functools.partial(predict, name=name),
        TABLE_STEPS,
        3e-3,
        has_residuals=name != "wine",
    )


def _toy_problem(scales: tuple[float, ...]) -> Problem:
    tasks = tuple(f"task {i + 1}" for i in range(len(scales)))
    return Problem(
        f"GradNorm's toy, {len(scales)} tasks",
        "scaled regression",
        f"{len(scales)} regressions of one common function, with targets of size {scales[0]:g} to {scales[-1]:g} "
        "(`problems.ScaledRegression`, 20 inputs, 10 outputs), three layers of 48. Errors in shares of predicting 0.",
        tasks,
        tasks,
        functools.partial(scaled, scales=scales),
        TOY_STEPS[len(scales)],
        1e-2,
        has_residuals=True,
    )


PROBLEMS = (
    _table_problem("linnerud", "20 middle-aged men: weight, waist and pulse from three exercises."),
    _table_problem(
        "diabetes",
        "442 patients: the disease's progression, body mass, blood pressure and log triglycerides from six "
        "other measurements.",
    ),
    _table_problem(
        "wine", "178 wines: the cultivar (cross-entropy), alcohol, magnesium and proline from ten other measurements."
    ),
    _toy_problem((1.0, 100.0)),
    _toy_problem(ScaledRegression.TEN),
)
