"""Weighters that do nothing, or stop, say so once."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from gradsurgery.weighting.softadapt import SoftAdaptWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from gradsurgery.weighting.uwso import UWSOWeighter
from tests.support.weighting_catalogue import run


def told(build, history, each=lambda optimizer, t: None, **options):
    """What a run says."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = build(torch.optim.SGD([p], lr=0.0), **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t, losses in enumerate(history):
            optimizer.zero_grad()
            optimizer.backward({name: p.sum() * value for name, value in losses.items()})
            optimizer.step()
            each(optimizer, t)
    return [str(w.message) for w in said]


EVEN = [{"a": 1.0, "b": 2.0}] * 1200


@pytest.mark.parametrize("options", [(DWAWeighter, {}), (SoftAdaptWeighter, {"interval": "epoch"})])
def test_an_epoch_that_never_ends_is_told_once(options):
    build, switches = options
    (said,) = told(build, EVEN, **switches)
    assert "Call optimizer.epoch_end() after each epoch" in said
    assert not told(build, EVEN[:999], **switches)
    assert not told(build, EVEN, lambda o, t: o.epoch_end() if t % 500 == 499 else None, **switches)
    assert not told(build, EVEN * 2, lambda o, t: o.epoch_end() if t == 500 else None, **switches)


def test_ntk_without_residuals_is_told_once():
    (said,) = told(NTKWeighter, EVEN[:300])
    assert "optimizer.backward(losses, residuals={name: tensor, ...})" in said
    assert not told(NTKWeighter, EVEN[:100])
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = NTKWeighter(torch.optim.SGD([p], lr=0.0))
    for t in range(150):  # as all warnings are errors here
        optimizer.zero_grad()
        residuals = {"a": p, "b": 2 * p}
        found = {name: r.square().sum() for name, r in residuals.items()}
        optimizer.backward(found, residuals=residuals if t == 0 else None)
        optimizer.step()


COLLAPSES = [
    (UWSOWeighter, {"a": 0.02, "b": 0.5}, {}, {"temperature": 1 / 0.06}, "Raise `temperature`"),
    (gradsurgery.GroupDROWeighter, {"a": 1.0, "b": 1000.0}, {}, {"eta": 1e-6}, "constant factors"),
    (gradsurgery.GO4AlignWeighter, {"a": 1.0, "b": 1000.0}, {}, {"eta": 0.0}, "lower `eta`"),
    (gradsurgery.STCHWeighter, {"a": 1.0, "b": 1000.0}, {}, {"mu": 1000.0}, "raise `mu`"),
]


@pytest.mark.parametrize(("build", "losses", "bad", "good", "cure"), COLLAPSES)
def test_a_weight_that_collapses_is_told_once(build, losses, bad, good, cure):
    (said,) = told(build, [losses] * 400, **bad)
    assert cure in said
    assert "for 100 steps hardly any weight has been left for ['" in said
    assert not told(build, [losses] * 400, **good)
    assert not told(build, [{"a": 1.0, "b": 1.2}] * 400, **bad)


def test_a_group_that_is_nearly_as_good_may_be_neglected():
    assert not told(gradsurgery.GroupDROWeighter, [{"easy": 0.1, "hard": 0.6}] * 400, eta=0.1)
    assert not told(gradsurgery.STCHWeighter, [{"easy": 0.3, "hard": 1.0}] * 200, mu=0.01)


def test_the_rule_for_the_temperature_of_uwso_keeps_weights_within_e_cubed():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = UWSOWeighter(torch.optim.SGD([p], lr=0.0), temperature=1 / (3 * 0.02))
    weights = optimizer.backward({"a": 0.02 * p.sum(), "b": 500 * p.sum()}).weights
    assert weights["a"] / weights["b"] == pytest.approx(math.e**3, rel=1e-3)


@pytest.mark.parametrize("build", [UncertaintyWeighter, IMTLLWeighter])
def test_one_wild_loss_does_not_freeze_the_weight(build):
    calm = [[0.1, 1.0, 1.0]] * 1500
    wild = [*calm[:1], [1e5, 1.0, 1.0], *calm[2:]]
    late = [*calm[:100], [1e5, 1.0, 1.0], *calm[101:]]
    settled = 0.5 / 0.1 if build is UncertaintyWeighter else 1 / 0.1
    for history in (calm, wild, late):
        assert run(build, history, lr=1e-2)[-1][0] == pytest.approx(settled, rel=0.1)


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize(
    "build", [UncertaintyWeighter, IMTLLWeighter, lambda o, **k: UncertaintyWeighter(o, form="log1p", **k)]
)
def test_weights_recover_from_one_wild_loss_in_tens_of_steps(build, lr):
    noise = np.random.default_rng(0).uniform(0.5, 1.5, (600, 1))
    calm = noise * [0.1, 1.0, 10.0]
    wild = calm.copy()
    wild[500, 0] = 1e5
    there, undisturbed = (np.array(run(build, history.tolist(), lr=lr))[:, 0] for history in (wild, calm))
    np.testing.assert_allclose(there, undisturbed, rtol=3 * lr)  # never off by more than a few ordinary steps
    np.testing.assert_allclose(there[560:], undisturbed[560:], rtol=0.01)


@pytest.mark.parametrize("level", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("build", [UncertaintyWeighter, IMTLLWeighter])
def test_a_loss_that_stays_at_another_level_gets_its_weight(build, level):
    weights = run(build, [[1.0, 1.0]] * 110 + [[level, 1.0]] * 490, lr=3e-2)
    half = 0.5 if build is UncertaintyWeighter else 1.0
    assert weights[-1][0] == pytest.approx(half / level, rel=0.1)
    assert weights[-1][1] == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("begin", ["steady", "quick"])
@pytest.mark.parametrize("build", [UncertaintyWeighter, IMTLLWeighter])
def test_ordinary_losses_move_the_weights_as_torch_s_adam_does(build, begin):
    """So do losses that begin large, and fall or rise tenfold a step."""
    steady = np.random.default_rng(0).uniform(0.1, 5.0, (400, 3)) * [1.0, 2.0, 1e4]
    quick = np.array([[1e4 / 10**t, 10.0 ** (t - 4), 1e4 / 10**t] for t in range(8)])
    history = {"steady": steady, "quick": np.concatenate([quick, steady[:, [0, 1, 0]]])}[begin]
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=1e-2, eps=0.0)
    expected = []
    for losses in torch.from_numpy(history):
        if build is UncertaintyWeighter:
            expected.append((0.5 * torch.exp(-s)).tolist())
            objective = (0.5 * torch.exp(-s) * losses + 0.5 * s).sum()
        else:
            expected.append(torch.exp(s).tolist())
            objective = (torch.exp(s) * losses - s).sum()
        adam.zero_grad()
        objective.backward()
        adam.step()
    np.testing.assert_allclose(run(build, history, lr=1e-2), expected, rtol=1e-9)


ZEROS = [
    UWSOWeighter,
    gradsurgery.GeometricMeanWeighter,
    gradsurgery.GO4AlignWeighter,
    gradsurgery.RealTimeWeighter,
    CoVWeighter,
    gradsurgery.ReLoBRaLoWeighter,
    FAMOWeighter,
    gradsurgery.InitialLossWeighter,
]


@pytest.mark.parametrize("build", ZEROS)
def test_a_loss_of_zero_can_be_passed_over_as_the_error_says(build):
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = build(torch.optim.SGD([p], lr=0.0))
    with pytest.raises(ValueError, match=r"> 0|above its bound") as error:
        optimizer.backward({"a": 0 * p.sum(), "b": p.sum()})
    assert "pass None for it in that batch" in str(error.value)
    for a in (1.0, None, 1.0):
        optimizer.zero_grad()
        optimizer.backward({"a": None if a is None else a * p.sum(), "b": 2 * p.sum()})
        optimizer.step()
