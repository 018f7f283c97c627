"""What a diagnosis finds in models made for it, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery import diagnose
from gradsurgery.watch.diagnose import Cost, Pair, peak_bytes

A, B = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])  # of length 1, cosine −0.6


class Linear(nn.Module):
    """One parameter, which linear losses give any gradients one likes."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def losses(self, batch):
        return {name: None if g is None else (g * self.theta).sum() + 2.0 for name, g in batch.items()}


def found(*batches, **more):
    model = Linear()
    return diagnose(model, model.losses, batches, cost=False, **more)


def test_numbers_of_made_up_gradients():
    result = found({"a": A, "b": 2 * B}, {"a": 3 * A, "b": 2 * B}, {"a": A, "b": 2 * A})
    assert result.names == ("a", "b")
    assert result.losses == {"a": (2.0, 2.0, 2.0), "b": (2.0, 2.0, 2.0)}
    assert result.norms == pytest.approx({"a": 1.0, "b": 2.0})
    assert result.norm_ratio == pytest.approx(2.0)
    (pair,) = result.pairs
    assert pair.cosine == pytest.approx((-0.6 - 0.6 + 1.0) / 3)
    assert pair.error == pytest.approx(np.std([-0.6, -0.6, 1.0], ddof=1) / np.sqrt(3))
    assert pair.conflict_rate == pytest.approx(2 / 3)
    assert pair.batches == 3
    # 1 + ⟨a, b⟩ / ‖a‖² is −0.2, 0.6 and 3; for b it is 0.7, 0.1 and 1.5.
    assert result.kept == pytest.approx({"a": 0.6, "b": 0.7})
    assert result.rises == pytest.approx({"a": 1 / 3, "b": 0.0})
    assert result.weights == {"a": 1.3, "b": 0.67}


def test_who_hurts_whom():
    """Of two gradients that oppose each other the shorter one pays."""
    result = found(*[{"long": 4 * A, "short": B}] * 6)
    (pair,) = result.pairs
    # ⟨long, short⟩ = −2.4, and the squared lengths are 16 and 1.
    assert (pair.first_loses, pair.second_loses) == pytest.approx((0.15, 2.4))
    assert pair.word == "oppose each other: long loses 15%, short loses 240%"
    assert pair.word in str(result)
    assert result.as_dict()["pairs"][0]["second_loses"] == pytest.approx(2.4)


def test_no_conflict_means_that_the_sum_is_fine():
    result = found(*[{"a": A, "b": A + torch.tensor([0.0, 0.2 * k])} for k in range(8)])
    assert result.verdict == "sum"
    assert result.advice.startswith("The sum is fine.")
    assert "few batches" not in result.advice
    assert result.pairs[0].word == "agree"


def test_mild_conflict_is_told_and_left():
    result = found(*[{"a": A, "b": torch.tensor([-0.3, 1.0])}] * 8)
    assert result.verdict == "sum"
    assert "do oppose each other ('a' and 'b'), but the losses still fall" in result.advice


def test_different_sizes_ask_for_weights():
    result = found(*[{"quiet": A, "loud": 100 * torch.tensor([-0.1, 1.0])}] * 8)
    assert result.verdict == "weights"
    assert "'loud' is 100 times as long as that of 'quiet'" in result.advice
    assert "makes 'quiet' rise" in result.advice
    assert result.kept["quiet"] == pytest.approx(-9.0)
    assert result.rises["quiet"] == 1.0
    assert result.kept_weighted["quiet"] > 0.8
    assert "weights = {'quiet': 2, 'loud': 0.02}" in result.advice


def test_a_planted_conflict_asks_for_surgery():
    hard = torch.tensor([-0.9, 0.3])
    rows = [{"a": A * (1 + 0.1 * k), "b": hard, "c": torch.tensor([0.0, 1.0])} for k in range(8)]
    result = found(*rows)
    assert result.verdict == "surgery"
    worst = result.pairs[0]
    assert (worst.first, worst.second, worst.conflicts) == ("a", "b", True)
    assert "oppose each other steadily ('a' and 'b')" in result.advice
    assert "PCGrad or UPGrad" in result.advice
    assert [pair.conflicts for pair in result.pairs[1:]] == [False, False]


def test_noise_is_no_verdict():
    result = found(*[{"a": A, "b": sign * 3 * A} for sign in (1, -1, -1, 1, -1, -1, 1, -1)])
    assert result.verdict == "unclear"
    assert "noise of small batches" in result.advice


def test_few_batches_are_mentioned():
    assert "few batches" in found({"a": A, "b": A}).advice


def test_one_loss():
    assert "one loss only" in found({"a": A}, {"a": A}).advice


def test_nothing_shared():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    result = diagnose(model, lambda x: [head(x).square().mean() for head in model], [torch.ones(3, 2)], cost=False)
    assert result.verdict == "nothing shared"
    assert "no parameter is reached by two losses" in str(result)


def test_zero_gradients_are_named():
    result = found(*[{"a": A, "b": 0 * A}] * 6)
    assert result.verdict == "unclear"
    assert "'b' is zero" in result.advice
    assert result.weights == {}


def test_absent_tasks():
    result = found({"a": A, "b": None, "c": B}, {"a": A, "b": B, "c": None}, {"a": A, "b": B, "c": None})
    assert {(pair.first, pair.second): pair.batches for pair in result.pairs} == {("a", "c"): 1, ("a", "b"): 2}


def test_batches_that_are_not_finite_are_left_out():
    result = found({"a": A, "b": B}, {"a": A * torch.nan, "b": B}, {"a": A, "b": B})
    assert (result.batches, result.skipped) == (3, 1)
    assert "1 more left out" in str(result)
    with pytest.raises(ValueError, match="in no batch were all losses"):
        found({"a": A * torch.nan, "b": B})


def test_limit_takes_the_first_batches_only():
    taken = []

    def batches():
        for k in range(100):
            taken.append(k)
            yield {"a": A, "b": B}

    model = Linear()
    assert diagnose(model, model.losses, batches(), limit=3, cost=False).batches == 3
    assert taken == [0, 1, 2]


def test_as_dict_is_json():
    result = found({"a": A, "b": B})
    values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert values["pairs"][0]["error"] is None
    assert values["pairs"][0]["conflicts"] is True
    assert values["verdict"] == result.verdict


def test_pairs_need_two_standard_errors():
    assert Pair("a", "b", -0.3, 0.14, 0.8, 9).conflicts
    assert not Pair("a", "b", -0.3, 0.16, 0.8, 9).conflicts
    assert not Pair("a", "b", -0.05, 0.001, 1.0, 9).conflicts
    assert Pair("a", "b", 0.3, 0.14, 0.1, 9).word == "agree"


class Noisy(nn.Module):
    """Everything that a forward pass may change: statistics, random streams, a buffer that is replaced."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        np.random.rand()  # noqa: NPY002
        random.random()
        z = self.trunk(x)
        return z, [head(z).square().mean() for head in self.heads]


def snapshot(model, optimizer):
    memory = copy.deepcopy(optimizer.state_dict())
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    return copy.deepcopy(model.state_dict()), [id(b) for b in model.buffers()], memory, grads, streams


def same(first, second):
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("given", ["model", "optimizer"])
def test_nothing_changes(given):
    model = Noisy()
    optimizer = gradsurgery.GradVac(torch.optim.Adam(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model(torch.randn(5, 3))[1])
        optimizer.step()
    optimizer.backward(model(torch.randn(5, 3))[1])  # a proposal that no step has committed, and gradients
    report, pending = optimizer.report, copy.deepcopy(optimizer.transaction.proposed)
    batches = [torch.randn(5, 3) for _ in range(3)]
    before = snapshot(model, optimizer)
    result = diagnose(
        model if given == "model" else optimizer, lambda x: model(x)[::-1], batches, features=True, cost=True
    )
    assert same(before, snapshot(model, optimizer))
    assert model.training
    assert optimizer.report is report
    assert optimizer.transaction.proposed == pending
    assert result.batches == 3
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_changes_if_it_fails():
    model = Noisy()
    optimizer = gradsurgery.GradVac(torch.optim.Adam(model.parameters()))
    x = torch.randn(5, 3)
    before = snapshot(model, optimizer)

    def fails(x):
        model(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        diagnose(optimizer, fails, [x])
    assert same(before, snapshot(model, optimizer))
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_shared_parameters_of_the_method_count():
    model = Noisy().eval()
    trunk = gradsurgery.PCGrad(torch.optim.Adam(model.parameters()), shared_params=[model.trunk[0].bias])
    x = torch.randn(5, 3)
    narrow = diagnose(trunk, lambda x: model(x)[1], [x], cost=False)
    wide = diagnose(model, lambda x: model(x)[1], [x], cost=False)
    assert narrow.norms["0"] < wide.norms["0"]
    row = torch.autograd.grad(model(x)[1][0], model.trunk[0].bias)[0]
    assert narrow.norms["0"] == pytest.approx(row.norm().item(), rel=1e-5)


def test_costs_are_measured_side_by_side():
    model = Noisy()
    result = diagnose(model, lambda x: model(x)[::-1], [torch.randn(64, 3)], features=True)
    assert [cost.family for cost in result.costs] == ["plain sum", "weighting", "surgery", "surgery at features"]
    plain, *others = result.costs
    assert plain.times == 1.0
    assert all(isinstance(cost, Cost) and cost.milliseconds > 0 and cost.times > 0 for cost in others)
    assert all(cost.megabytes is not None and cost.megabytes > 0 for cost in result.costs)
    assert "surgery at features" in str(result)


def test_peak_bytes(capfd):
    peak = peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000), torch.device("cpu"))
    assert peak == 12_000
    assert capfd.readouterr().err == ""


def test_no_cost_where_a_hook_would_train():
    model = Linear()
    model.theta.register_post_accumulate_grad_hook(lambda p: p.data.add_(1.0))
    result = diagnose(model, model.losses, [{"a": A, "b": B}])
    assert result.costs == ()
    assert torch.equal(model.theta, torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, None, []), TypeError, "must be an optimizer or a module, got NoneType"),
        ((nn.ReLU(), None, []), ValueError, "no trainable parameters"),
        ((Linear(), None, []), ValueError, "`batches` is empty"),
        ((Linear(), lambda batch: 3, [1]), TypeError, "diagnose"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        diagnose(*arguments)


def test_bad_limit_and_features():
    with pytest.raises(ValueError, match="`limit` must be an integer >= 1 or None, got 0"):
        found({"a": A, "b": B}, limit=0)
    with pytest.raises(TypeError, match="must return a pair"):
        found({"a": A, "b": B}, features=True)
