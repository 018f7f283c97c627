"""`gradsurgery.testing.check`: every method of the catalogues passes, and each promise rejects a broken one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery.surgery.base import Surgery
from gradsurgery.testing import check, contract, inputs
from gradsurgery.weighting.base import Weighter
from tests.support import catalogue, weighting_catalogue

SURGERIES = {row.name: row for row in catalogue.CATALOGUE}
WEIGHTERS = {row.name: row for row in weighting_catalogue.CATALOGUE}


@pytest.mark.parametrize("row", SURGERIES.values(), ids=SURGERIES)
def test_surgeries_keep_what_they_promise(row):
    check(row.build, row.promises, examples=1)


@pytest.mark.parametrize("row", WEIGHTERS.values(), ids=WEIGHTERS)
def test_weighters_keep_what_they_promise(row):
    by_epochs = (lambda method: method.epoch_end()) if row.epochs else None
    check(row.build, row.promises, examples=1, names=weighting_catalogue.NAMES, after_step=by_epochs)


def test_every_promise_is_made_by_some_method():
    made = {name for row in SURGERIES.values() for name in row.promises}
    assert made == set(contract.SURGERY)
    made = {name for row in WEIGHTERS.values() for name in row.promises}
    assert made == set(contract.WEIGHTING)


# ------------------------------------------------------------------------------------------------ broken methods


class PlainSum(Surgery):
    """Keeps the contract, and none of what papers promise beyond it but the plain sum."""

    def weights(self, gram, losses):
        return np.ones(len(gram))


def surgery(weights, **members):
    """A surgery with these weights."""
    return type("Broken", (Surgery,), {"weights": weights, **members})


def weighter(weights, **members):
    return type("Broken", (Weighter,), {"weights": weights, **members})


def with_nan(self, gram, losses):
    return np.full(len(gram), np.nan)


def writes_something_else(self, batch):
    """`backward` writes another gradient than the method says."""
    report = super(type(self), self)._act(batch)
    for group in self.param_groups:
        for p in group["params"]:
            p.grad *= 1.5
    return report


def overwrites(self, losses, **options):
    for group in self.param_groups:
        for p in group["params"]:
            p.grad = None
    return PlainSum.backward(self, losses, **options)


def halves_in_place(self, gram, losses):
    gram *= 0.5
    return np.ones(len(gram))


def counts_in_place(self, gram, losses):
    self.memory.setdefault("kept", {})["calls"] = self.memory.get("kept", {}).get("calls", 0) + 1
    return np.ones(len(gram))


def tensor_in_place(self, gram, losses):
    if "kept" not in self.memory:
        self.memory["kept"] = torch.zeros(1)
    self.memory["kept"] += 1
    return np.ones(len(gram))


def counts_on_itself(self, gram, losses):
    self.calls = getattr(self, "calls", 0) + 1
    return np.full(len(gram), float(self.calls > 3) + 1)


def draws_globally(self, gram, losses):
    self.calls = getattr(self, "calls", 0) + 1
    return np.full(len(gram), 1.0 + self.calls)


def keeps_for_all(self, gram, losses):
    """The average of an absent task moves too."""
    self.keep("average", self.recall("average", 1.0, self.all_names) * 0.9, self.all_names)
    return np.ones(len(gram))


def needs_all(self, gram, losses):
    return np.ones(len(self.all_names))


def clears(self, gram, losses):
    """Writes to `.grad` before it is done."""
    for group in self.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    return np.ones(len(gram))


def measures_by_backward(self, batch):
    for loss in batch.losses:
        loss.backward(retain_graph=True)


def first_only(self, gram, losses):
    return np.array([1.0] + [0.0] * (len(gram) - 1))


def with_epsilon(self, gram, losses):
    return np.ones(len(gram)) / (1 + 1e-2 / (np.trace(gram) + 1e-9))


class Absolute(Surgery):
    """Depends on the coordinates."""

    has_weights = False

    def weights(self, gram, losses):
        return np.ones(len(gram))

    def direct(self, column, applied, like, share):
        return torch.stack([abs(w * g) for g, w in zip(column, applied, strict=True)]).sum(0)


def zero_without_flag(self, gram, losses):
    return np.zeros(len(gram))


def flag_without_zero(self, gram, losses):
    self.flag("stationary")
    return np.ones(len(gram))


def by_number(self, gram, losses):
    """A zero row counts, since the rows are counted: the direction turns."""
    return np.arange(1.0, 1.0 + len(gram))


BROKEN = {
    "finite": surgery(with_nan),
    "written": type("Broken", (PlainSum,), {"_act": writes_something_else}),
    "added": type("Broken", (PlainSum,), {"backward": overwrites}),
    "no change in place, arguments": surgery(halves_in_place),
    "no change in place, memory": surgery(tensor_in_place),
    "discard, memory": surgery(counts_in_place),
    "discard, elsewhere": surgery(draws_globally),
    "resume": surgery(counts_on_itself),
    "absent tasks, memory": surgery(keeps_for_all, stateful=True),
    "absent tasks, shapes": surgery(needs_all),
    "grad on error, weights": surgery(clears),
    "grad on error, loss": weighter(lambda self, losses: np.ones(len(losses)), measure=measures_by_backward),
    "common descent": PlainSum,
    "common descent at full rank": PlainSum,
    "homogeneous": surgery(with_epsilon),
    "row scale": PlainSum,
    "permutation": surgery(first_only),
    "rotation": Absolute,
    "copies": PlainSum,
    "plain sum": surgery(lambda self, gram, losses: np.full(len(gram), 0.5)),
    "equal rows": surgery(lambda self, gram, losses: np.full(len(gram), 1 / len(gram))),
    "one loss": surgery(lambda self, gram, losses: np.full(len(gram), 2.0)),
    "stationary": surgery(zero_without_flag),
    "stationary, direction": surgery(flag_without_zero),
    "zero rows": surgery(by_number),
}
BROKEN_WEIGHTERS = {
    "finite": lambda self, losses: np.full(len(losses), np.nan),
    "total": lambda self, losses: np.full(len(losses), 0.9),
    "permutation": lambda self, losses: np.arange(1.0, 1.0 + len(losses)),
    "loss scale": lambda self, losses: losses.copy(),
    "homogeneous": lambda self, losses: losses.copy(),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_surgery_is_rejected(case):
    name = case.partition(",")[0]
    with pytest.raises(AssertionError) as caught:
        check(BROKEN[case], [name] if name in contract.SURGERY else [], seed=3, examples=1)
    text = str(caught.value)
    assert text.startswith(f"{BROKEN[case].__name__} does not keep what it promises (seed 3):")
    assert f"\n- '{name}' (" in text
    assert "\n  rows = [[" in text
    assert "\n  losses = [" in text


def test_every_promise_rejects_a_broken_surgery():
    assert {case.partition(",")[0] for case in BROKEN} == {*contract.CONTRACT, *contract.SURGERY}
    assert {*BROKEN_WEIGHTERS} - {"finite"} == {*contract.WEIGHTING}


@pytest.mark.parametrize("name", BROKEN_WEIGHTERS)
def test_a_broken_weighter_is_rejected(name):
    with pytest.raises(AssertionError, match=rf"\n- '{name}' \("):
        check(weighter(BROKEN_WEIGHTERS[name]), [name] if name in contract.WEIGHTING else [], examples=1)


@pytest.mark.parametrize(
    ("promises", "weights"),
    [
        ({"homogeneous": 0}, lambda self, gram, losses: np.ones(len(gram))),
        ({"common descent": 3}, gradsurgery.PCGrad.weights),
        ({"equal rows": "priority"}, lambda self, gram, losses: np.ones(len(gram))),
        ({"zero rows": "stationary"}, lambda self, gram, losses: np.ones(len(gram))),
        ({"one loss": "direction"}, lambda self, gram, losses: -np.ones(len(gram))),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_what_exactly_is_promised_counts(promises, weights):
    with pytest.raises(AssertionError, match=next(iter(promises))):
        check(surgery(weights, shuffle=False), promises, examples=6)


def test_what_the_method_raises_is_told_with_the_input():
    def weights(self, gram, losses):
        raise KeyError("lost")

    with pytest.raises(AssertionError, match=r"- 'finite' .* on random input 0: KeyError: 'lost'\n  rows = "):
        check(surgery(weights), examples=1)


def test_all_that_is_broken_is_said_at_once():
    with pytest.raises(AssertionError) as caught:
        check(PlainSum, ["common descent", "plain sum", "row scale"], examples=2)
    assert [line.split("'")[1] for line in str(caught.value).splitlines() if line.startswith("- ")] == [
        "common descent",
        "row scale",
    ]


# ------------------------------------------------------------------------------------------------ what is asked


def test_the_report_counts_what_was_tried():
    checked = check(PlainSum, "plain sum", seed=7, examples=2)
    assert (checked.method, checked.seed) == ("PlainSum", 7)
    assert list(checked.inputs) == [*contract.CONTRACT, "plain sum"]
    assert checked.inputs["finite"] == 2 * len(inputs.KINDS)
    assert checked.inputs["plain sum"] == 2
    assert str(checked).startswith("PlainSum, seed 7: finite (26), written (6), ")


def test_a_promise_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"PlainSum cannot promise 'descent'") as caught:
        check(PlainSum, ["descent"])
    assert all(f"\n  '{name}': " in str(caught.value) for name in contract.SURGERY)
    with pytest.raises(ValueError, match="FixedWeighter cannot promise 'copies'") as caught:
        check(gradsurgery.FixedWeighter, ["copies"])
    assert all(f"\n  '{name}': " in str(caught.value) for name in contract.WEIGHTING)


@pytest.mark.parametrize(
    ("promises", "told"),
    [
        ({"equal rows": "mean"}, r"'equal rows' must be one of \('sum', 'priority'\), got 'mean'"),
        ({"homogeneous": "one"}, "'homogeneous' must be a number, got 'one'"),
    ],
)
def test_what_cannot_be_promised_is_refused(promises, told):
    with pytest.raises(ValueError, match=told):
        check(PlainSum, promises)


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="must return a Surgery or a Weighter, got"):
        check(lambda optimizer: optimizer)
    with pytest.raises(ValueError, match="must train the parameters of the optimizer that it is given"):
        check(lambda optimizer: PlainSum(catalogue.any_optimizer()))
    with pytest.raises(ValueError, match="`examples` must be >= 1, got 0"):
        check(PlainSum, examples=0)


def test_a_surgery_over_a_weighter_keeps_the_contract():
    check(lambda optimizer: gradsurgery.PCGrad(gradsurgery.SLAWWeighter(optimizer)), examples=1)


# ------------------------------------------------------------------------------------------------ the inputs


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs_are_what_they_are_called(kind):
    for number in range(20):
        item = inputs.drawn(kind, 1, number)
        again = inputs.drawn(kind, 1, number)
        assert (item.rows == again.rows).all()
        assert (item.history == again.history).all()
        assert (item.history > 0).all()
        gram, m = item.rows @ item.rows.T, len(item.rows)
        rank = np.linalg.matrix_rank(item.rows / np.abs(item.rows).max(axis=1, initial=1e-300, keepdims=True))
        assert {
            "random": m >= 2,
            "one loss": m == rank == 1,
            "aligned": m >= 2 and (gram >= 0).all(),
            "independent": rank == m,
            "conflicting": rank == m and (gram < 0).any(),
            "badly scaled": rank == m and (gram < 0).any(),
            "nearly dependent": rank == m and _least(item.rows) < 0.5,
            "dependent": rank < m,
            "duplicates": (np.abs(_cosines(gram)) - np.eye(m)).max() >= 1 - 1e-15,
            "zero row": not item.rows.any(axis=1).all(),
            "stationary": rank < m,
            "tiny": (gram < 0).any() and np.abs(item.rows).max() < 1e-9,
            "huge": (gram < 0).any() and np.abs(item.rows).max() > 1e9,
        }[kind], number
    assert not np.array_equal(inputs.drawn(kind, 1, 0).history, inputs.drawn(kind, 2, 0).history)


def _cosines(gram):
    lengths = np.sqrt(gram.diagonal())
    outer = np.outer(lengths, lengths)
    return np.divide(gram, outer, out=np.zeros_like(gram), where=outer > 0)


def _least(rows):
    return np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)[-1]


def test_the_number_of_losses_can_be_asked_for():
    for kind in inputs.KINDS:
        if inputs.possible(kind, 3):
            assert {len(inputs.drawn(kind, 0, number, 3).rows) for number in range(3)} == {3}
    assert [kind for kind in inputs.KINDS if inputs.possible(kind, 1)] == ["one loss"]
