"""The playground's reference cases are what the library answers, and reach what they are meant to reach.

That the page computes the same is tested in a browser (test_playground_browser.py).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
# LAPACK differs from machine to machine; the reference cases are well beyond that only where two gradients are nearly
# opposite, and there the weights are.
DIRECTION, WEIGHT, WEIGHT_NEARLY_SINGULAR = 1e-12, 1e-12, 1e-7
# Between two equal gradients MGDA may share their weight as it likes; the direction is the same. So may ConicGrad with
# c = 0, which is MGDA as long as the plain sum.
NOT_UNIQUE = {("mgda", "two equal of three"), ("conic, c = 0", "two equal of three")}
# The ball of CAGrad with c = 1 has 0 on its border, which is where these two gradients send it: a direction of length d
# is off by the rounding of one of length 1, divided by d.
STEEP = {("cagrad, c = 1", "nearly opposite, 1e-6"): 1e-10}

_spec = importlib.util.spec_from_file_location("playground_cases", DOCS / "playground_cases.py")
playground_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(playground_cases)
CASES = json.loads(playground_cases.FILE.read_text(encoding="utf-8"))


def errors(rows, answer, other):
    """How far two answers are apart: directions, and weights times lengths, relative to the terms of the direction."""
    lengths = np.linalg.norm(rows, axis=1)
    assert (answer["weights"] is None) == (other["weights"] is None)
    terms = max(lengths.sum() if answer["weights"] is None else np.abs(answer["weights"]) @ lengths, 1e-300)
    direction = np.linalg.norm(np.subtract(answer["direction"], other["direction"]))
    if answer["weights"] is None:
        return direction / terms, 0.0
    weights = np.abs(np.subtract(answer["weights"], other["weights"])) * lengths
    return direction / terms, weights.max() / terms


def direction_tolerance(method, name):
    return STEEP.get((method, name), DIRECTION)


def weight_tolerance(method, name):
    if (method, name) in STEEP:
        return 1e6 * STEEP[method, name]  # the two gradients are 1e-6 from being opposite
    return WEIGHT_NEARLY_SINGULAR if name.startswith("nearly") else WEIGHT


def test_the_file_has_the_cases_of_the_script():
    made = playground_cases.inputs()
    assert [case["name"] for case in CASES] == list(made), "run python docs/playground_cases.py"
    for case in CASES:  # sines, powers and normal draws differ in their last digits from processor to processor
        rows = np.array(case["rows"])
        off = np.linalg.norm(rows - made[case["name"]], axis=1)
        assert (off <= 1e-14 * np.linalg.norm(rows, axis=1)).all(), (
            f"{case['name']}: run python docs/playground_cases.py"
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cases_are_what_the_library_answers(case):
    now = playground_cases.answers(case["rows"])
    assert now.keys() == case["answers"].keys()
    for method, answer in case["answers"].items():
        direction, weights = errors(case["rows"], answer, now[method])
        assert direction <= direction_tolerance(method, case["name"]), method
        if (method, case["name"]) not in NOT_UNIQUE:
            assert weights <= weight_tolerance(method, case["name"]), method


def test_a_wrong_answer_is_seen():
    case = CASES[0]
    right = case["answers"]["upgrad"]
    wrong = {
        "weights": [w * (1 + 1e-10) for w in right["weights"]],
        "direction": [1.0000001 * x for x in right["direction"]],
    }
    direction, weights = errors(case["rows"], right, wrong)
    assert direction > DIRECTION
    assert weights > WEIGHT


def test_the_mean_over_orders_is_that_of_many_draws():
    """PCGrad's draws, averaged, come to what the cases have as its answer."""
    import torch

    import gradsurgery

    case = next(case for case in CASES if case["name"] == "preset around")
    rows = torch.tensor(case["rows"], dtype=torch.float64)
    base = torch.optim.SGD([torch.zeros(2)], lr=1.0)
    draws = torch.stack([gradsurgery.PCGrad(base, seed=seed).combine(rows) for seed in range(600)])
    spread = draws.std(dim=0) / len(draws) ** 0.5
    assert (spread > 0).all()
    expected = torch.tensor(case["answers"]["pcgrad"]["direction"], dtype=torch.float64)
    assert ((draws.mean(dim=0) - expected).abs() < 4 * spread).all()


def test_cases_cover_what_is_hard():
    rows = [np.array(case["rows"]) for case in CASES]
    lengths = [np.linalg.norm(each, axis=1) for each in rows]
    assert {len(each) for each in rows} == {2, 3}
    assert any((each == 0).any() for each in lengths)
    assert any((each > 0).all() and each.max() / each.min() > 0.99e6 for each in lengths)
    cosines = [
        float(u @ v)
        for each in rows
        if np.all(np.linalg.norm(each, axis=1))
        for u, v in [each[:2] / np.linalg.norm(each[:2], axis=1)[:, None]]
    ]
    assert min(cosines) == pytest.approx(-1, abs=1e-15)
    assert max(cosines) == pytest.approx(1, abs=1e-15)
    still = [case["name"] for case in CASES if case["answers"]["mgda"]["direction"] == [0.0, 0.0]]
    assert len(still) > 10
