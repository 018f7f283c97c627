"""What every weighting method promises, and what bad arguments are told."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

import gradsurgery
from gradsurgery.weighting.cosmos import COSMOSWeighter
from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.fixed import FixedWeighter
from gradsurgery.weighting.go4align import GO4AlignWeighter
from gradsurgery.weighting.group_dro import GroupDROWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.loss_size import InitialLossWeighter, PriorLossWeighter
from gradsurgery.weighting.lr_annealing import LRAnnealingWeighter
from gradsurgery.weighting.normalized_gradient import NormalizedGradientWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from gradsurgery.weighting.pbi import PBIWeighter
from gradsurgery.weighting.relobralo import ReLoBRaLoWeighter
from gradsurgery.weighting.running_max import RunningMaxWeighter
from gradsurgery.weighting.slaw import SLAWWeighter
from gradsurgery.weighting.softadapt import NormalizedSoftAdaptWeighter
from gradsurgery.weighting.stch import STCHWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from gradsurgery.weighting.uwso import UWSOWeighter
from tests.support.weighters import A, memory, setting, step
from tests.support.weighting_catalogue import CATALOGUE, NAMES, any_optimizer, run, tied

# ----------------------------------------------------------------------------------------------------------------- head


def every(promise=lambda row: True):
    chosen = [row for row in CATALOGUE if promise(row)]
    assert chosen, "a promise that no method makes tests nothing"
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.name)


# ----------------------------------------------------------------------------------------------------- generic promises


@every()
def test_golden(row):
    history, expected = row.golden
    found = run(row.build, history, epochs=row.epochs)
    np.testing.assert_allclose(found, expected, rtol=row.tolerance, atol=1e-12)


@every()
def test_mean_divides_by_the_number_of_losses(row):
    both = [run(row.build, A, epochs=row.epochs, reduction=reduction) for reduction in ("sum", "mean")]
    np.testing.assert_allclose(both[1], both[0] / 3, rtol=1e-12)


@every(lambda row: row.total is not None)
def test_total(row):
    np.testing.assert_allclose(run(row.build, A, epochs=row.epochs).mean(axis=1), row.total, rtol=1e-8)


@every(lambda row: row.equivariant)
def test_permutation_equivariant(row):
    order = (1, 2, 0)
    plain = run(row.build, A, epochs=row.epochs)
    moved = run(row.build, A[:, order], names=[NAMES[i] for i in order], epochs=row.epochs)
    np.testing.assert_allclose(moved, plain[:, order], rtol=1e-10)


@every(lambda row: row.scaling)
@pytest.mark.parametrize("factor", [1e-9, 7.0, 1e6])
def test_scale_of_one_loss(row, factor):
    factors = np.array([1.0, factor, 1.0])
    plain, scaled = (run(row.build, history, epochs=row.epochs) for history in (A, A * factors))
    if row.scaling == "terms":  # the weighted losses stay in proportion
        plain, scaled = ((w := f * h) / w.sum(axis=1, keepdims=True) for f, h in ((plain, A), (scaled, A * factors)))
    np.testing.assert_allclose(scaled[row.after :], plain[row.after :], rtol=1e-6)


@every(lambda row: row.homogeneous is not None)
@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_scale_of_all_losses(row, factor):
    plain, scaled = (run(row.build, history, epochs=row.epochs) for history in (A, A * factor))
    np.testing.assert_allclose(scaled, plain * factor**row.homogeneous, rtol=1e-6)


@every()
def test_absent_tasks_are_left_alone(row):
    p, optimizer = setting(row.build)
    for values in A[:4]:
        step(optimizer, p, values)
        if row.epochs:
            optimizer.epoch_end()
    before = memory(optimizer)
    weights = step(optimizer, p, [A[4, 0], None, A[4, 2]])
    after = memory(optimizer)
    assert np.isfinite(weights).all()
    if row.total is not None:
        assert weights.mean() == pytest.approx(row.total, rel=1e-7), "the usual total per present task"
    for key, value in before.items():
        if isinstance(value, dict) and "b" in value:
            assert after[key].get("b", value["b"]) == value["b"], key
    assert np.isfinite(step(optimizer, p, A[5])).all()


@every()
@pytest.mark.parametrize("when", [0, 4])
@pytest.mark.parametrize("bad", [-100.0, 0.0])
def test_losses_out_of_range_are_named_and_nothing_moves(row, bad, when):
    """A loss out of the range that the row declares stops the run and is named, once its value counts; others pass."""
    takes = row.later if when and row.later else row.losses
    p, optimizer = setting(row.build)
    error = None
    for t, values in enumerate(A):
        values = [values[0], bad if t == when else values[1], values[2]]
        before = memory(optimizer)
        p.grad = None
        try:
            assert np.isfinite(step(optimizer, p, values)).all()
            if row.epochs:
                optimizer.epoch_end()
                before = memory(optimizer)
        except ValueError as caught:
            error = str(caught)
            break
    if takes == "any" or (takes == "nonnegative" and bad == 0):
        assert error is None
        return
    assert error is not None
    assert re.search(rf"^{type(optimizer).__name__}.*'b': -?\d", error)
    assert not any(f"'{name}': " in error for name in "ac"), "the others are innocent"
    if not row.epochs:
        assert t == when or row.name.startswith("LossWeightedSoftAdapt")
        assert p.grad is None
        assert memory(optimizer) == before


@every()
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_named_and_nothing_moves(row, bad):
    p, optimizer = setting(row.build)
    for values in A[:4]:
        before = memory(optimizer)
        p.grad = None
        with pytest.raises(
            RuntimeError, match=rf"^{type(optimizer).__name__}.backward: the value of 'b' is not finite"
        ):
            step(optimizer, p, [values[0], bad, values[2]])
        assert p.grad is None
        assert memory(optimizer) == before
        step(optimizer, p, values)


@every(lambda row: row.losses != "positive")
def test_zero_losses_do_no_harm(row):
    found = run(row.build, [[1, 0, 2]] * 8 + [[1, 1, 2]], epochs=row.epochs)
    assert np.isfinite(found).all()
    assert (np.abs(found) < 1e6).all()


@every()
def test_extreme_losses(row):
    for history in (
        [[1e-300, 1.0, 1e300]] * 4,
        [[1e-200, 1e-200, 1e-200], [1e200, 1e-200, 1.0]] * 3,
        [[5e-324, 1e-310, 1e-308]] * 3,
    ):
        found = run(row.build, history, epochs=row.epochs)
        assert not np.isnan(found).any()
        assert (np.abs(found) <= np.finfo(float).max).all()


@every()
@pytest.mark.filterwarnings("ignore:.*has an entry for .'b', 'c'.")  # the catalogue's rows name three losses
def test_one_loss(row):
    found = run(row.build, [[2.0], [1.0], [1.0]], names=("a",), epochs=row.epochs)
    assert np.isfinite(found).all()
    assert (found > 0).all()


@every()
def test_under_surgery(row):
    """Orthogonal gradients do not conflict, so PCGrad leaves the weights alone."""
    plain = run(row.build, A, epochs=row.epochs)
    p, inner = setting(row.build)
    outer = gradsurgery.PCGrad(inner)
    found = []
    for values in A:
        outer.zero_grad()
        outer.backward(dict(zip(NAMES, tied(p, values), strict=True)))
        found.append(p.grad.numpy().copy())
        outer.step()
        if row.epochs:
            inner.epoch_end()
    np.testing.assert_allclose(found, plain, rtol=1e-6)


@every()
def test_steps_that_reuse_weights_still_see_the_losses(row):
    p, optimizer = setting(row.build, every=3)
    found = []
    for values in A:
        found.append(step(optimizer, p, values))
        if row.epochs:
            optimizer.epoch_end()
    assert (found[1] == found[0]).all()
    assert (found[2] == found[0]).all()
    assert (found[4] == found[3]).all()


# ------------------------------------------------------------------------------------------------------------ arguments


ARGUMENTS = [
    (FixedWeighter, {"weights": [1.0, -1.0]}, r"FixedWeighter: `weights\['1'\]` must be >= 0, got -1.0"),
    (FixedWeighter, {"weights": [0.0, 0.0]}, r"`weights` must not all be 0"),
    (RunningMaxWeighter, {"decay": 0.0}, r"`decay` must be > 0"),
    (GO4AlignWeighter, {"groups": 0}, r"GO4AlignWeighter: `groups` must be an integer >= 1, got 0"),
    (GO4AlignWeighter, {"eta": -1.0}, r"`eta` must be >= 0"),
    (RunningMaxWeighter, {"gamma": {"a": 0.0}}, r"`gamma\['a'\]` must be > 0"),
    (InitialLossWeighter, {"batches": 0}, r"`batches` must be an integer >= 1"),
    (InitialLossWeighter, {"initial_losses": [0.0]}, r"`initial_losses\['0'\]` must be > 0"),
    (PriorLossWeighter, {"priors": {"a": 0.0}}, r"`priors\['a'\]` must be > 0"),
    (UncertaintyWeighter, {"form": "sigma"}, r"`form` must be one of"),
    (UncertaintyWeighter, {"kind": "counting"}, r"`kind` must be one of"),
    (UncertaintyWeighter, {"kind": ["counting"]}, r"`kind\['0'\]` must be one of"),
    (UncertaintyWeighter, {"form": "log1p", "kind": "classification"}, r"has no meaning with form=\"log1p\""),
    (UncertaintyWeighter, {"lr": 0.0}, r"`lr` must be > 0"),
    (IMTLLWeighter, {"weight_optimizer": "rmsprop"}, r"`weight_optimizer` must be one of"),
    (NormalizedSoftAdaptWeighter, {"normalize": "none"}, r"`normalize` must be one of"),
    (DWAWeighter, {"temperature": 0.0}, r"DWAWeighter: `temperature` must be > 0, got 0.0"),
    (STCHWeighter, {"mu": 0.0}, r"`mu` must be > 0"),
    (COSMOSWeighter, {"penalty": -1.0}, r"`penalty` must be >= 0"),
    (PBIWeighter, {"theta": -1.0}, r"`theta` must be >= 0"),
    (PBIWeighter, {"reference": [math.inf]}, r"`reference\['0'\]` must be a finite number"),
    (FAMOWeighter, {"lr": 0.0}, r"`lr` must be > 0"),
    (FAMOWeighter, {"decay": -1.0}, r"`decay` must be >= 0"),
    (ReLoBRaLoWeighter, {"alpha": 1.5}, r"`alpha` must be <= 1"),
    (ReLoBRaLoWeighter, {"rho": -0.5}, r"`rho` must be >= 0"),
    (CoVWeighter, {"decay": 1.0}, r"`decay` must be < 1"),
    (SLAWWeighter, {"beta": 1.0}, r"`beta` must be < 1"),
    (UWSOWeighter, {"temperature": 0.0}, r"`temperature` must be > 0"),
    (GroupDROWeighter, {"eta": 0.0}, r"`eta` must be > 0"),
    (NormalizedGradientWeighter, {"length": "median"}, r"`length` must be one of"),
    (NormalizedGradientWeighter, {"alpha": -1.0}, r"`alpha` must be >= 0"),
    (LRAnnealingWeighter, {"statistic": "median"}, r"`statistic` must be one of"),
    (LRAnnealingWeighter, {"statistic": "norm", "reference": "a"}, r"`reference` has no meaning"),
    (LRAnnealingWeighter, {"rate": 0.0}, r"`rate` must be > 0"),
    (NTKWeighter, {"probes": 0}, r"`probes` must be an integer >= 1"),
    (NTKWeighter, {"decay": 1.0}, r"`decay` must be < 1"),
]


@pytest.mark.parametrize(("build", "arguments", "message"), ARGUMENTS)
def test_bad_arguments_are_named(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(any_optimizer(), **arguments)
