"""Exact answers of weighters with a memory, and what sets these weighters apart: IGB, LDC-MTL, means, items."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradsurgery import IGBWeighter, LDCMTLWeighter, LRAnnealingWeighter, NormalizedGradientWeighter
from tests.support.answers import answers
from tests.support.weighting_catalogue import tied


def near(found, expected):
    return np.allclose(found, expected, rtol=1e-9, atol=0)


def sgd(p, lr=0.0):
    return torch.optim.SGD([p], lr=lr)


def zeros(*shape):
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float64))


def theta_of(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]["theta"]


# ---------------------------------------------------------------------------------------------------------------- IGB


@pytest.mark.parametrize(("key", "base"), [("steps", 1), ("base0", 0)])
def test_igb_on_exact_answers(key, base):
    case = answers()["sequences"]["IGBv1"]
    steps = iter(case[key])
    p = zeros(4)
    optimizer = IGBWeighter(sgd(p), base_epoch=base)
    for epoch in case["epochs"]:
        for values in epoch:
            optimizer.zero_grad()
            report = optimizer.backward(tied(p, values))
            optimizer.step()
            assert near(list(report.weights.values()), next(steps)["coefficients"])
        optimizer.epoch_end()
    assert next(steps, None) is None


def test_igb_compares_a_task_with_the_first_epoch_that_has_it():
    p = zeros(2)
    optimizer = IGBWeighter(sgd(p), base_epoch=0)
    found = []
    for first, second in ((2.0, None), (2.0, 8.0), (1.0, 2.0)):
        optimizer.zero_grad()
        losses = tied(p, [first, 0.0 if second is None else second])
        report = optimizer.backward({"a": losses[0], "b": None if second is None else losses[1]})
        optimizer.step()
        optimizer.epoch_end()
        found.append(report.weights)
    assert found[0] == {"a": 0.5}
    assert near(list(found[1].values()), [0.5, 0.125]), "no epoch to compare with yet: r is 1"
    w = 2 / (1 + np.exp(0.25 - 0.5))
    assert near(list(found[2].values()), [w, (2 - w) / 2])


def test_igb_says_what_is_missing():
    with pytest.raises(ValueError, match="IGBWeighter: `base_epoch` must be an integer >= 0"):
        IGBWeighter(sgd(zeros(1)), base_epoch=-1)
    p = zeros(2)
    optimizer = IGBWeighter(sgd(p))
    for _ in range(999):
        optimizer.zero_grad()
        optimizer.backward(tied(p, [1.0, 2.0]))
        optimizer.step()
    with pytest.warns(UserWarning, match=r"IGBWeighter: epoch_end\(\) has not been called in 1000 steps") as told:
        report = optimizer.backward(tied(p, [1.0, 2.0]))
    assert "until it is the weight of each loss is 1 divided by its value, as in RealTimeWeighter." in str(
        told[0].message
    )
    assert near(list(report.weights.values()), [1.0, 0.5])


# ------------------------------------------------------------------------------------------------------------ LDC-MTL


def test_ldc_mtl_on_exact_answers():
    case = answers()["sequences"]["LDC-MTL"]
    p = zeros(4)
    optimizer = LDCMTLWeighter(sgd(p), penalty=case["lam"], lr=case["lr"], weight_optimizer="sgd")
    theta = [1.0] * 4
    for values, step in zip(case["losses"], case["steps"], strict=True):
        assert near(theta, step["theta"])
        optimizer.zero_grad()
        report = optimizer.backward(tied(p, values))
        optimizer.step()
        assert near(list(report.weights.values()), step["coefficients"])
        theta = list(theta_of(optimizer).values())


def test_ldc_mtl_keeps_to_the_order_of_the_first_call():
    def weights(orders):
        p = zeros(3)
        optimizer = LDCMTLWeighter(sgd(p, 0.1))
        for order in orders:
            optimizer.zero_grad()
            losses = dict(zip("abc", tied(p, [1.0, 3.0, 2.0]), strict=True))
            report = optimizer.backward({name: losses[name] for name in order})
            optimizer.step()
        return report.weights

    assert weights(["abc", "cba"]) == weights(["abc", "abc"])
    assert weights(["abc"]) != weights(["bac"])


def test_ldc_mtl_compares_neighbours_among_those_that_are_present():
    p = zeros(3)
    optimizer = LDCMTLWeighter(sgd(p, 0.1), penalty=0.1, initial=0.0)
    losses = tied(p, [1.0, 3.0, 2.0])
    report = optimizer.backward({"a": losses[0], "b": None, "c": losses[2]})
    assert near(list(report.weights.values()), [0.5 - 0.05, 0.5 + 0.05])
    optimizer.step()
    assert set(theta_of(optimizer)) == {"a", "c"}


def test_ldc_mtl_warns_once_where_a_loss_is_made_to_rise():
    p = zeros(3)
    optimizer = LDCMTLWeighter(sgd(p), penalty=1.0)
    values = [3.0, 1.0, 3.0]
    with pytest.warns(
        UserWarning, match="LDCMTLWeighter: coefficients are negative.*`penalty` below 0.228 none can be"
    ):
        report = optimizer.backward(tied(p, values))
    assert report.weights["1"] < 0
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.backward(tied(p, values)).weights["1"] < 0  # not a second time: warnings are errors here
    quiet = LDCMTLWeighter(sgd(p), penalty=0.227)
    assert min(quiet.backward(tied(p, values)).weights.values()) > 0


@pytest.mark.parametrize("scale", [1e-140, 1e160])
def test_ldc_mtl_learns_at_any_size_of_the_losses(scale):
    moved = []
    for factor in (1.0, scale):
        p = zeros(2)
        optimizer = LDCMTLWeighter(sgd(p, 0.1), penalty=0.0)
        optimizer.backward(tied(p, [2 * factor, factor]))
        optimizer.step()
        moved.append(list(theta_of(optimizer).values()))
    assert near(moved[1], moved[0])


@pytest.mark.parametrize("options", [{"penalty": -0.1}, {"initial": 1e4}, {"lr": 0.0}, {"weight_optimizer": "lion"}])
def test_ldc_mtl_refuses_arguments_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"LDCMTLWeighter: `{name}` must be"):
        LDCMTLWeighter(sgd(zeros(1)), **options)


# ------------------------------------------------------------------------------------------------- lengths of gradients


def test_lr_annealing_by_means_on_exact_answers():
    case = answers()["sequences"]["LRAnnealing mean/mean"]
    p = zeros(8)
    optimizer = LRAnnealingWeighter(sgd(p), statistic="mean", rate=case["rate"], shared_params=[p])
    for rows, expected in zip(case["inputs"], case["weights"], strict=True):
        optimizer.zero_grad()
        report = optimizer.backward(tied(p, [1.0, 2.0, 3.0], np.array(rows)))
        optimizer.step()
        assert near(list(report.weights.values()), expected)


@pytest.mark.parametrize(("key", "norm"), [("per_item", "item"), ("whole_batch", "all")])
def test_balancer_of_audio_codecs_on_exact_answers(key, norm):
    case = answers()["sequences"]["Balancer"]
    p = zeros(6, 2, 4)
    options = {"total": case["total_norm"], "decay": case["decay"], "preference": case["weights"]}
    optimizer = NormalizedGradientWeighter(sgd(p), norm=norm, **options)
    for grads, expected in zip(case["grads"], case[key], strict=True):
        z = 1.0 * p
        optimizer.zero_grad()
        report = optimizer.backward([(z * torch.tensor(g, dtype=torch.float64)).sum() for g in grads], features=z)
        optimizer.step()
        assert np.allclose(list(report.weights.values()), expected["scales"], rtol=1e-9, atol=0)
        assert torch.allclose(p.grad, torch.tensor(expected["gradient"], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_norms_of_items_do_not_depend_on_how_features_are_cut():
    rows = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def weights(parts):
        p = zeros(6, 5)
        optimizer = NormalizedGradientWeighter(sgd(p), norm="item", length="unit")
        pieces = (1.0 * p).split(parts, dim=1)
        losses = [sum((a * b).sum() for a, b in zip(pieces, g.split(parts, dim=1), strict=True)) for g in rows]
        return list(optimizer.backward(losses, features=list(pieces)).weights.values())

    by_hand = [1 / g.norm(dim=1).mean().item() for g in rows]
    assert near(weights([5]), by_hand)
    assert near(weights([2, 3]), by_hand)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (3,)), (torch.complex64, (3, 2))])
def test_items_may_be_numbers_or_complex(dtype, shape):
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = NormalizedGradientWeighter(sgd(p), norm="item", length="unit")
    z = 2 * p
    found = list(optimizer.backward([z.abs().sum(), 2 * z.abs().sum()], features=z).weights.values())
    length = (1 if len(shape) == 1 else shape[1]) ** 0.5
    assert found == pytest.approx([1 / length, 0.5 / length])


def test_total_counts_the_present_losses_alone():
    p = zeros(3)
    optimizer = NormalizedGradientWeighter(sgd(p), total=6.0, preference=[1.0, 2.0, 3.0])
    losses = tied(p, [1.0, 1.0, 1.0], 2 * np.eye(3))
    assert list(optimizer.backward(losses).weights.values()) == [0.5, 1.0, 1.5]
    optimizer.zero_grad()
    losses = tied(p, [1.0, 1.0, 1.0], 2 * np.eye(3))
    assert list(optimizer.backward([losses[0], None, losses[2]]).weights.values()) == [0.75, 2.25]


def test_items_need_features_and_a_first_dimension():
    p = nn.Parameter(torch.ones(4))
    for build, shown in (
        (lambda: None, "none"),
        (lambda: [p.sum()], r"of shape \(\)"),
        (lambda: [2 * p, 2 * p[:2]], r"\(4,\), \(2,\)"),
    ):
        features = build()
        losses = [sum(f.sum() for f in features or [p]), sum(f.square().sum() for f in features or [p])]
        with pytest.raises(ValueError, match=rf'NormalizedGradientWeighter.backward: norm="item" needs.*{shown}'):
            NormalizedGradientWeighter(sgd(p), norm="item").backward(losses, features=features)
    with pytest.raises(ValueError, match="`shared_params` has no effect"):
        NormalizedGradientWeighter(sgd(p), norm="item", shared_params=p)
    with pytest.raises(ValueError, match="`total` takes the place of `length`='max'"):
        NormalizedGradientWeighter(sgd(p), length="max", total=1.0)
    with pytest.raises(ValueError, match="`total` must be > 0"):
        NormalizedGradientWeighter(sgd(p), total=0.0)
    with pytest.raises(ValueError, match="`norm` must be one of"):
        NormalizedGradientWeighter(sgd(p), norm="row")
