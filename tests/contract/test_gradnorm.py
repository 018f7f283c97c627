"""GradNorm: sequences, its promises, and where other implementations went wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.graph import torch_private

SEQUENCES = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())["sequences"]
A = np.array(SEQUENCES["_inputs"]["A"])
NORMS = np.linalg.norm(np.array(SEQUENCES["_inputs"]["J3"]), axis=1)


def with_norms_and_losses(p, norms, losses):
    """Losses of the given values whose gradients in p have the given norms."""
    return [(p[0] - p[0].detach()) * n + value for n, value in zip(norms, losses, strict=True)]


def run(history, norms=NORMS, scale=1.0, **options):
    """Weights after each step, and the optimizer."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.0), p, **options)
    weights = []
    for losses in history:
        optimizer.zero_grad()
        optimizer.backward(with_norms_and_losses(p, norms * scale, losses))
        optimizer.step()
        weights.append(list(optimizer.state_dict()["gradsurgery"]["memory"]["weights"].values()))
    return np.array(weights), optimizer


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_paper_form_agrees_with_the_closed_form(alpha):
    expected = np.array(SEQUENCES["GradNorm"][f"closed form, L1 SUM (paper), alpha={alpha}, lr=0.05"])
    found, _ = run(A[:7], alpha=alpha, lr=0.05, weight_optimizer="sgd")
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_weights_used_are_those_before_the_update():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.0), p, lr=0.1, weight_optimizer="sgd", alpha=0.0)
    first = optimizer.backward(with_norms_and_losses(p, [1.0, 3.0], [1.0, 1.0])).weights
    assert list(first.values()) == [1.0, 1.0]
    assert p.grad[0].item() == 4.0
    optimizer.step()
    optimizer.zero_grad()
    second = optimizer.backward(with_norms_and_losses(p, [1.0, 3.0], [1.0, 1.0])).weights
    # w - lr · sign(G - 2) · norm = (1.1, 0.7), then a sum of 2
    assert list(second.values()) == pytest.approx([2.2 / 1.8, 1.4 / 1.8])


def test_equal_norms_and_rates_change_nothing():
    found, _ = run(np.ones((5, 3)), norms=np.array([2.0, 2.0, 2.0]), alpha=0.0)
    assert (found == 1.0).all()


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_loss_that_lags_gets_more_weight(rule):
    # Seen: with a negated exponent the finished task got 1.05 and the one that had not moved 0.95.
    found, _ = run([[1.0, 1.0], [0.1, 1.0]], norms=np.array([1.0, 1.0]), alpha=1.0, weight_optimizer=rule)
    assert found[1][1] > 1.0 > found[1][0]


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_weights_stay_positive_and_sum_to_m(rule):
    # Seen: norms 1 and 9 with learning rate 5 gave weights (0.23, -1.77).
    found, _ = run(np.ones((50, 2)), norms=np.array([1.0, 9.0]), lr=5.0, alpha=0.0, weight_optimizer=rule)
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 2.0, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_adam_does_not_feel_the_scale_of_the_gradients(scale):
    plain, _ = run(A, alpha=1.5)
    scaled, _ = run(A, alpha=1.5, scale=scale)
    np.testing.assert_allclose(scaled, plain, rtol=1e-9)


def test_in_the_long_run_weighted_norms_are_equal():
    found, _ = run(np.ones((400, 3)), norms=np.array([1.0, 10.0, 100.0]), alpha=0.0, lr=0.01)
    lengths = found[-1] * [1.0, 10.0, 100.0]
    assert lengths.max() / lengths.min() < 2.0, "they start 100 apart"


def applied(history, norms, **options):
    """The weights that each step used."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.0), p, **options)
    found = []
    for losses, lengths in zip(history, norms, strict=True):
        optimizer.zero_grad()
        found.append(list(optimizer.backward(with_norms_and_losses(p, lengths, losses)).weights.values()))
        optimizer.step()
    return np.array(found)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("start", ["losses", "norms"])
def test_a_start_is_the_paper_on_losses_divided_by_constants(start, rule):
    rng = np.random.default_rng(3)
    history = rng.uniform(0.5, 2.0, (30, 3)) * [1.0, 1e5, 1e-4]
    norms = rng.uniform(0.5, 2.0, (30, 3)) * [1e-3, 1e6, 1.0]
    units = history[0] if start == "losses" else norms[0]
    plain = applied(history / units, norms / units, weight_optimizer=rule, alpha=0.3) / units
    found = applied(history, norms, weight_optimizer=rule, alpha=0.3, start=start)
    np.testing.assert_allclose(found, 3 * plain / plain.sum(axis=1, keepdims=True), rtol=1e-9)
    assert found[0] * units == pytest.approx(found[0, 0] * units[0], rel=1e-12)


def test_the_paper_s_start_is_the_default():
    np.testing.assert_array_equal(applied(A, [NORMS] * len(A)), applied(A, [NORMS] * len(A), start="ones"))
    np.testing.assert_array_equal(applied(A, [NORMS] * len(A))[0], 1.0)


def test_a_gradient_of_zero_waits_for_its_unit():
    found = applied(np.ones((3, 2)), [[2.0, 0.0], [2.0, 8.0], [2.0, 8.0]], start="norms", lr=1e-9)
    np.testing.assert_allclose(found, [[1.0, 1.0], [1.6, 0.4], [1.6, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal(applied(np.ones((1, 2)), [[0.0, 0.0]], start="norms"), 1.0)


@pytest.mark.parametrize("start", ["losses", "norms"])
def test_an_absent_task_gets_its_unit_when_it_comes(start):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.0), p, start=start, lr=1e-9)
    a, b = with_norms_and_losses(p, [1.0, 4.0], [1.0, 4.0])
    assert optimizer.backward({"a": a, "b": None}).weights == {"a": 1.0}
    optimizer.step()
    a, b = with_norms_and_losses(p, [2.0, 4.0], [2.0, 4.0])
    assert optimizer.backward({"a": a, "b": b}).weights == pytest.approx({"a": 1.6, "b": 0.4})


def test_the_initial_loss_is_the_first_and_stays():
    # Seen: the reference loss was overwritten in every step.
    _, optimizer = run(A)
    memory = optimizer.state_dict()["gradsurgery"]["memory"]
    assert list(memory["initial_losses"].values()) == A[0].tolist()
    given = {"0": 2.0, "1": 3.0, "2": 4.0}
    found, optimizer = run(A, initial_losses=given)
    assert given == {"0": 2.0, "1": 3.0, "2": 4.0}, "the user's dict is not changed"
    as_list, _ = run(A, initial_losses=[2.0, 3.0, 4.0])
    assert (found == as_list).all()


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_a_loss_that_has_come_to_zero_gives_its_weight_away(alpha, rule):
    """Its rate is 0, and so is its target, unless all targets are the same."""
    equal = np.array([1.0, 1.0, 1.0])
    found, _ = run([[1.0, 2.0, 4.0], [1.0, 0.0, 4.0]], norms=equal, alpha=alpha, lr=0.1, weight_optimizer=rule)
    if alpha == 0:
        np.testing.assert_allclose(found, 1.0)
    else:
        assert found[1][1] < 1.0 < found[1][0] == found[1][2]
    finished, _ = run([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], norms=equal, alpha=alpha, weight_optimizer=rule)
    np.testing.assert_allclose(finished, 1.0, err_msg="all rates are equal")


def test_a_first_loss_of_zero_needs_an_initial_loss():
    with pytest.raises(ValueError, match=r"every loss must be > 0 the first time.*'1': 0.0.*`initial_losses` takes"):
        run([[1.0, 0.0, 4.0]])
    found, _ = run([[1.0, 0.0, 4.0]], initial_losses=[1.0, 2.0, 4.0], lr=0.1, norms=np.ones(3))
    assert found[0][1] < 1.0
    with pytest.raises(ValueError, match=r"every loss must be >= 0.*'1': -0.5"):
        run([[1.0, -0.5, 4.0]], initial_losses=[1.0, 2.0, 4.0])


def test_every_tensor_of_shared_params_counts():
    # Seen: only the first gradient tensor, or only the one before the last parameter.
    a, b = nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    base = torch.optim.SGD([a, b], lr=0.0)

    def first_move(params):
        optimizer = gradsurgery.GradNormWeighter(base, params, alpha=0.0, weight_optimizer="sgd")
        optimizer.zero_grad()
        optimizer.backward([(3 * a + 4 * b).sum(), (a + 5 * b).sum() - 5])
        optimizer.step()
        return list(optimizer.state_dict()["gradsurgery"]["memory"]["weights"].values())

    both = first_move([a, b])  # norms 5 and √26
    assert both[0] > 1 > both[1]
    only_a = first_move(a)  # norms 3 and 1
    assert only_a[0] < 1 < only_a[1]
    assert first_move(p for p in (a, b)) == both, "any iterable is materialised"


def test_the_model_gets_the_weighted_gradient_only():
    # Seen elsewhere: the balancing loss back-propagated into the model.
    layer, heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    base = torch.optim.SGD([*layer.parameters(), *heads.parameters()], lr=0.0)
    optimizer = gradsurgery.GradNormWeighter(base, layer.weight, lr=0.2)
    x = torch.randn(8, 3)
    for _ in range(3):
        losses = [(h(layer(x)) - 3).square().mean() for h in heads]
        optimizer.zero_grad()
        report = optimizer.backward(losses, retain_graph=True)
        total = sum(w * loss for w, loss in zip(report.weights.values(), losses, strict=True))
        for p, g in zip(
            base.param_groups[0]["params"], torch.autograd.grad(total, base.param_groups[0]["params"]), strict=True
        ):
            torch.testing.assert_close(p.grad, g)
        assert report.objective == pytest.approx(total.item(), rel=1e-6), "seen: None returned"
        optimizer.step()
    assert report.weights["0"] != 1.0


def test_absent_tasks_are_left_alone():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.0), p, lr=0.1)
    names = ("a", "b", "c")
    for losses in ([2.0, 1.0, 1.0], [1.0, 1.0, 1.0]):
        optimizer.backward(dict(zip(names, with_norms_and_losses(p, [1, 2, 3], losses), strict=True)))
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["gradsurgery"]["memory"])
    a, _, c = with_norms_and_losses(p, [1, 2, 3], [1.0, 1.0, 1.0])
    report = optimizer.backward({"a": a, "b": None, "c": c})
    assert sum(report.weights.values()) == pytest.approx(2.0), "the usual total per present task"
    optimizer.step()
    after = optimizer.state_dict()["gradsurgery"]["memory"]
    for key in ("weights", "weights.first", "weights.second", "weights.count", "initial_losses"):
        assert after[key]["b"] == before[key]["b"]
        assert key == "initial_losses" or after[key]["a"] != before[key]["a"]
    assert sum(after["weights"].values()) == pytest.approx(3.0)


def test_cadence_spares_the_short_passes(monkeypatch):
    passes = []
    monkeypatch.setattr(torch_private, "_ENGINE", None)  # then the public calls are made
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(1), grad(*a, **k))[1])
    run(A[:4], every=2)
    assert len(passes) == 2 * 3


def test_schedule_multiplies_the_step():
    still, _ = run(A, schedule=lambda step: 0.0)
    assert (still == 1.0).all()
    found, _ = run(A, schedule=lambda step: 1.0 if step < 2 else 0.0)
    plain, _ = run(A)
    assert (found[:2] == plain[:2]).all()
    assert (found[2:] == found[1]).all()
    assert (found[1] != 1.0).any()


ARGUMENTS = [
    ({"alpha": -1.0}, ValueError, r"GradNormWeighter: `alpha` must be >= 0, got -1.0"),
    ({"lr": 0.0}, ValueError, r"GradNormWeighter: `lr` must be > 0, got 0.0"),
    ({"lr": float("nan")}, ValueError, r"`lr` must be a finite number"),
    ({"start": "measured"}, ValueError, r"`start` must be one of"),
    ({"weight_optimizer": "rmsprop"}, ValueError, r"`weight_optimizer` must be one of"),
    ({"initial_losses": "last"}, ValueError, r"`initial_losses` must be numbers by name or in order, got 'last'"),
    ({"initial_losses": [1.0, 0.0]}, ValueError, r"initial_losses\['1'\]` must be > 0, got 0.0"),
    ({"shared_params": []}, TypeError, r"GradNormWeighter: `shared_params` must be a parameter"),
    ({"shared_params": ["w"]}, TypeError, r"`shared_params`"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_bad_arguments_are_named(arguments, error, message):
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(error, match=message):
        gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.1), **{"shared_params": p, **arguments})


def test_losses_must_be_positive_and_initial_losses_complete():
    p = nn.Parameter(torch.ones(1))
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.1), p)
    with pytest.raises(ValueError, match=r"every loss must be > 0.*'b': -1.0"):
        optimizer.backward({"a": p.sum(), "b": -p.sum()})
    assert p.grad is None
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p], lr=0.1), p, initial_losses={"a": 1.0})
    with pytest.raises(ValueError, match=r"`initial_losses` must name every loss, \['b'\] is missing"):
        optimizer.backward({"a": p.sum(), "b": p.sum() * 2})


def test_frozen_parameters_among_those_measured_count_for_nothing():
    p, frozen = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    found = []
    for measured in ([p], [p, frozen]):
        frozen.requires_grad_(False)
        optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p, frozen], lr=0.0), measured)
        optimizer.zero_grad()
        optimizer.backward([p.sum() + frozen.sum(), (3 * p).square().sum()])
        optimizer.step()
        found.append(optimizer.state_dict()["gradsurgery"]["memory"])
    assert found[0] == found[1]
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([p, frozen], lr=0.0), frozen)
    with pytest.raises(RuntimeError, match=r"GradNormWeighter\.backward: .*are frozen"):
        optimizer.backward([p.sum(), p.square().sum()])
