"""Weighters: what each promises, the values of papers and references, and where other implementations went wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.gradients import rows
from gradsurgery.weighting.cosmos import COSMOSWeighter
from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.fixed import FixedWeighter
from gradsurgery.weighting.geometric_mean import GeometricMeanWeighter
from gradsurgery.weighting.go4align import GO4AlignWeighter, grouped
from gradsurgery.weighting.group_dro import GroupDROWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.loss_size import (
    InitialLossWeighter,
    PriorLossWeighter,
    RealTimeWeighter,
    label_entropy,
    label_variance,
    uniform_prior,
)
from gradsurgery.weighting.lr_annealing import LRAnnealingWeighter
from gradsurgery.weighting.normalized_gradient import NormalizedGradientWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from gradsurgery.weighting.pbi import PBIWeighter
from gradsurgery.weighting.relobralo import ReLoBRaLoWeighter
from gradsurgery.weighting.rlw import RandomWeighter
from gradsurgery.weighting.running_max import RunningMaxWeighter
from gradsurgery.weighting.slaw import SLAWWeighter
from gradsurgery.weighting.softadapt import (
    LossWeightedSoftAdaptWeighter,
    NormalizedSoftAdaptWeighter,
    SoftAdaptWeighter,
)
from gradsurgery.weighting.stch import STCHWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from gradsurgery.weighting.uwso import UWSOWeighter
from tests.support.weighting_catalogue import CATALOGUE, NAMES, any_optimizer, run, tied

SEQUENCES = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())["sequences"]
A = np.array(SEQUENCES["_inputs"]["A"])
JS = np.array(SEQUENCES["_inputs"]["JS"])
SOFTADAPT = {
    "SoftAdapt": SoftAdaptWeighter,
    "NormalizedSoftAdapt": NormalizedSoftAdaptWeighter,
    "LossWeightedSoftAdapt": LossWeightedSoftAdaptWeighter,
}


def every(promise=lambda row: True):
    chosen = [row for row in CATALOGUE if promise(row)]
    assert chosen, "a promise that no method makes tests nothing"
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.name)


def memory(optimizer):
    return copy.deepcopy(optimizer.state_dict()["gradsurgery"]["memory"])


def setting(build, m=3, **switches):
    p = nn.Parameter(torch.zeros(m, dtype=torch.float64))
    return p, build(torch.optim.SGD([p], lr=0.0), **switches)


def step(optimizer, p, values, names=NAMES):
    """One full step; returns the applied weights."""
    optimizer.zero_grad()
    losses = tied(p, [1.0 if v is None else v for v in values])
    report = optimizer.backward(
        {n: None if v is None else loss for n, v, loss in zip(names, values, losses, strict=False)}
    )
    optimizer.step()
    return np.array(list(report.weights.values()))


# ------------------------------------------------------------------------------------------- generic promises


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


# ---------------------------------------------------------------------------------------------- simple weights


def test_fixed_weights_by_order_and_share_of_the_absent():
    p, optimizer = setting(FixedWeighter, weights=[1, 2, 3])
    assert list(optimizer.backward(tied(p, [1, 1, 1])).weights.values()) == [1, 2, 3]
    optimizer.zero_grad()
    assert list(optimizer.backward([tied(p, [1])[0], None, tied(p, [1])[0]]).weights.values()) == [1, 3]
    p, optimizer = setting(FixedWeighter, weights={"a": 1, "b": 6, "c": 0})
    assert step(optimizer, p, [1, None, 1]).tolist() == pytest.approx([14 / 3, 0])
    assert step(optimizer, p, [None, None, 1]).tolist() == pytest.approx([7 / 3]), "0 cannot be rescaled"
    with pytest.raises(ValueError, match=r"FixedWeighter: `weights` must name every loss, \['d'\] is missing"):
        optimizer.backward({"d": p.sum()})


def test_users_dict_is_not_changed():
    # Seen: weights={'a': 2.0} got a 'b': 1.0 of the library's own.
    given = {"a": 2.0, "b": 1.0, "c": 1.0}
    p, optimizer = setting(FixedWeighter, weights=given)
    step(optimizer, p, [1, 1, 1])
    assert given == {"a": 2.0, "b": 1.0, "c": 1.0}


def test_running_max_never_falls_unless_it_decays():
    found = run(RunningMaxWeighter, [[4, 1, 1], [1, 1, 1], [8, 1, 1]])
    assert found[:, 0].tolist() == [1 / 4, 1 / 4, 1 / 8]
    found = run(RunningMaxWeighter, [[4, 1, 1], [1, 1, 1], [1, 1, 1]], decay=0.5, gamma={"a": 3, "b": 1, "c": 1})
    assert found[:, 0].tolist() == [3 / 4, 3 / 2, 3]
    assert run(RunningMaxWeighter, [[0, 1, 1], [0, 1, 1], [2, 1, 1]])[:, 0].tolist() == [0, 0, 0.5]


def test_no_gradient_flows_through_the_weights():
    # Seen in a forum thread: the loss itself was rescaled under no_grad and lost its graph.
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = RunningMaxWeighter(torch.optim.SGD([w], lr=0.1))
    loss = (w**2).sum()
    with torch.no_grad():
        detached = loss / 9
    with pytest.raises(RuntimeError, match=r"has no graph.*Detach only the scale"):
        optimizer.backward([detached])
    optimizer.backward([loss])
    assert w.grad.item() == pytest.approx(6 / 9), "2 w / M and not the derivative of l/l"


def test_initial_losses_given_and_missing():
    found = run(InitialLossWeighter, A, initial_losses={"a": math.log(10), "b": 2.0, "c": 4.0})
    np.testing.assert_allclose(found, np.tile([1 / math.log(10), 0.5, 0.25], (8, 1)))
    p, optimizer = setting(InitialLossWeighter, initial_losses={"a": 1.0})
    with pytest.raises(ValueError, match=r"`initial_losses` must name every loss, \['b', 'c'\] is missing"):
        step(optimizer, p, [1, 1, 1])


def test_initial_loss_of_a_task_that_starts_late():
    p, optimizer = setting(InitialLossWeighter)
    step(optimizer, p, [2.0, 4.0, None])
    assert step(optimizer, p, [1.0, 1.0, 5.0]).tolist() == [0.5, 0.25, 0.2]
    assert step(optimizer, p, [0.0, -1.0, 9.0]).tolist() == [0.5, 0.25, 0.2], "once measured, any loss will do"


def test_priors():
    assert uniform_prior(10) == math.log(10)
    assert label_entropy([5, 5, 5, 5]) == pytest.approx(uniform_prior(4))
    assert label_entropy(torch.tensor([1, 3, 0])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert label_entropy([0.1, 0.9]) < uniform_prior(2)
    y = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    assert label_variance(y) == (1 + 100) / 2
    assert label_variance(y + 5) == label_variance(y)
    assert label_variance(3 * y) == pytest.approx(9 * label_variance(y))
    assert label_variance([1.0, 2.0, 3.0]) == pytest.approx(2 / 3), "divided by N"
    for call in (
        lambda: uniform_prior(1),
        lambda: uniform_prior(2.0),
        lambda: label_entropy([5, 0]),
        lambda: label_entropy([1, -1]),
        lambda: label_variance([2.0, 2.0]),
        lambda: label_variance([]),
        lambda: label_variance([1.0, math.nan]),
    ):
        with pytest.raises(ValueError, match=r"(uniform_prior|label_entropy|label_variance): `"):
            call()
    assert run(PriorLossWeighter, [[1, 1, 1]], priors=[1, 2, 4], names=("0", "1", "2"), normalize=True)[
        0
    ].tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_real_time_is_the_gradient_of_the_logarithms():
    w = nn.Parameter(torch.tensor([0.3, 2.0], dtype=torch.float64))
    losses = [w.square().sum(), (w - 1).square().sum() + 1]
    RealTimeWeighter(torch.optim.SGD([w], lr=0.1)).backward(losses, retain_graph=True)
    (expected,) = torch.autograd.grad(sum(loss.log() for loss in losses), w)
    torch.testing.assert_close(w.grad, expected)


# --------------------------------------------------------------------------------------------- learnt weights


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({"kind": "regression"}, lambda s, loss: torch.exp(-s) * loss / 2 + s / 2),
        ({"kind": "classification"}, lambda s, loss: torch.exp(-s) * loss + s / 2),
        ({"form": "log1p"}, lambda s, loss: loss / (2 * torch.exp(s)) + torch.log1p(torch.exp(s))),
    ],
)
def test_uncertainty_descends_on_its_objective(options, objective):
    s = torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64, requires_grad=True)
    inner = torch.optim.SGD([s], lr=0.05)
    expected = []
    for losses in torch.from_numpy(A):
        expected.append(torch.func.vmap(torch.func.grad(objective, argnums=1))(s.detach(), losses).numpy())
        inner.zero_grad()
        objective(s, losses).sum().backward()
        inner.step()
    found = run(UncertaintyWeighter, A, initial=0.3, lr=0.05, weight_optimizer="sgd", **options)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kind": "classification"}, {"form": "log1p"}])
def test_uncertainty_settles_where_it_should(options):
    losses = np.array([0.5, 1.0, 4.0])
    weights = run(UncertaintyWeighter, [losses] * 150, lr=0.1, **options)[-1]
    square = (losses + np.sqrt(losses**2 + 8 * losses)) / 4
    expected = 1 / (2 * square) if options.get("form") else 1 / (2 * losses)
    np.testing.assert_allclose(weights, expected, rtol=0.05)


def test_log1p_settles_by_the_closed_form_of_sigma():
    losses = np.array([1.0, 0.1, 30.0])
    weights = run(UncertaintyWeighter, [losses] * 200, form="log1p", lr=1.0, weight_optimizer="sgd")[-1]
    np.testing.assert_allclose(1 / (2 * weights), (losses + np.sqrt(losses**2 + 8 * losses)) / 4, rtol=1e-6)


def test_uncertainty_kind_by_name_and_rate_of_the_first_group():
    p, optimizer = setting(
        UncertaintyWeighter, kind={"a": "regression", "b": "classification", "c": "regression"}, weight_optimizer="sgd"
    )
    optimizer.param_groups[0]["lr"] = 0.1
    assert step(optimizer, p, [2.0, 2.0, 2.0]).tolist() == [0.5, 1.0, 0.5]
    assert list(memory(optimizer)["log_variance"].values()) == pytest.approx([0.05, 0.15, 0.05])
    assert all(len(group["params"]) == 1 for group in optimizer.param_groups), "no weight joins the model's parameters"


@pytest.mark.parametrize("weight_optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("form", ["log_variance", "log1p"])
def test_a_loss_of_zero_does_not_blow_its_weight_up(form, weight_optimizer):
    # Seen: p = 3e-6 and a coefficient of 6e10 after 60 steps of a loss that was 0.
    found = run(UncertaintyWeighter, [[0.0, 1.0, 1.0]] * 60, form=form, lr=0.1, weight_optimizer=weight_optimizer)
    assert (found[:, 0] == 0.5).all()


def test_a_negative_loss_is_refused_by_learnt_weights():
    # Seen: log-variances of -inf after 200 steps of a loss of -1.
    for build in (UncertaintyWeighter, IMTLLWeighter):
        p, optimizer = setting(build)
        with pytest.raises(ValueError, match=r"every loss must be >= 0.*no lower bound.*'c': -1.0"):
            step(optimizer, p, [1.0, 1.0, -1.0])


def test_imtl_l_reference():
    expected = [entry["coefficients"] for entry in SEQUENCES["IMTL-L"]["torchjd"]]
    found = run(IMTLLWeighter, A, lr=0.1, weight_optimizer="sgd")
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_imtl_l_settles_at_the_inverse_loss():
    found = run(IMTLLWeighter, [[0.5, 1.0, 4.0]] * 150, lr=0.2, weight_optimizer="sgd")[-1]
    np.testing.assert_allclose(found, [2, 1, 0.25], rtol=1e-3)


# -------------------------------------------------------------------------------------------------- SoftAdapt

DATA = {
    "readme3": [SEQUENCES["SoftAdapt"]["inputs"][c] for c in ("c1", "c2", "c3")],
    "readme4": [SEQUENCES["SoftAdapt"]["inputs"][c] for c in ("c1", "c2", "c3", "c4")],
    "A_last5": A[:5].T.tolist(),
}
RUNS = SEQUENCES["SoftAdapt"]["runs"]


def test_softadapt_reference():
    for case in RUNS:
        # The package takes means in float32, which shows in the loss-weighted variant.
        tolerance = max(1e-9, 1.5 * case["max_abs_diff_closed_form"])
        weights = SOFTADAPT[case["variant"]].get_component_weights(
            *DATA[case["data"]], beta=case["beta"], accuracy_order=case["accuracy_order"]
        )
        np.testing.assert_allclose(weights.numpy(), case["weights"], rtol=0, atol=tolerance, err_msg=str(case))
        if abs(case["beta"]) < 1:
            np.testing.assert_allclose(weights.numpy(), case["weights"], rtol=2e-7, err_msg=str(case))


README = {
    "SoftAdapt": ["9.9343e-01", "6.5666e-03", "3.8908e-22"],
    "NormalizedSoftAdapt": ["3.2207e-01", "3.2508e-01", "3.5285e-01"],
    "LossWeightedSoftAdapt": ["8.7978e-01", "1.2022e-01", "7.1234e-20"],
}


@pytest.mark.parametrize("variant", README)
def test_softadapt_readme_as_applied_weights(variant):
    columns = DATA["readme3"]
    history = [*zip(*columns, strict=True), (1.0, 1.0, 1.0)]
    found = run(SOFTADAPT[variant], history, beta=0.1, window=5, reduction="mean")
    assert (found[:5] == 1 / 3).all(), "ones until the first update"
    assert [f"{w:.4e}" for w in found[5]] == README[variant]
    by_list = SOFTADAPT[variant].get_component_weights(*map(np.array, columns), beta=0.1)
    np.testing.assert_allclose(found[5], by_list.numpy(), rtol=1e-15)


def test_softadapt_coefficients():
    for order, expected in SEQUENCES["SoftAdapt"]["finite_difference_coefficients"].items():
        n = int(order)
        for k, c in enumerate(expected):
            bump, still = np.zeros(n + 1), np.zeros(n + 1)
            bump[k] = 1.0
            w = SoftAdaptWeighter.get_component_weights(bump, still, beta=1.0, accuracy_order=n)
            assert math.log(w[0] / w[1]) == pytest.approx(c, rel=1e-9, abs=1e-12)


def test_softadapt_updates_every_interval_from_a_sliding_window():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=3, interval=2)
    found = [step(optimizer, p, values) for values in A[:7]]
    changes = [i for i in range(1, 7) if (found[i] != found[i - 1]).any()]
    assert changes == [2, 4, 6]
    expected = 3 * SoftAdaptWeighter.get_component_weights(*A[3:6].T, beta=1.0).numpy()
    np.testing.assert_allclose(found[6], expected, rtol=1e-14)


def test_softadapt_by_epochs_uses_their_means():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, interval="epoch")
    for epoch in (A[0:2], A[2:5], A[5:7]):
        for values in epoch:
            step(optimizer, p, values)
        optimizer.epoch_end()
    means = np.array([A[0:2].mean(0), A[2:5].mean(0), A[5:7].mean(0)])
    expected = 3 * SoftAdaptWeighter.get_component_weights(*means.T, beta=1.0).numpy()
    np.testing.assert_allclose(step(optimizer, p, A[7]), expected, rtol=1e-12)


def test_softadapt_does_not_judge_an_absent_task_by_its_old_slope():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=2)
    for values in ([1.0, 1.0, 1.0], [1.0, 3.0, 1.0]):
        step(optimizer, p, values)
    kept = memory(optimizer)["weights"]
    assert kept["b"] > 1.5 > kept["a"]
    for value in (2.0, 2.5, 3.0, 3.0):
        step(optimizer, p, [value, None, 1.0])
    after = memory(optimizer)["weights"]
    assert after["b"] == kept["b"]
    assert sum(after.values()) == pytest.approx(3.0)
    step(optimizer, p, [1.0, 1.0, 1.0])
    assert len(memory(optimizer)["window"]["b"]) == 2


def test_softadapt_epoch_end_updates_at_once_in_step_mode():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=5)
    for values in A[:3]:
        step(optimizer, p, values)
    optimizer.epoch_end()
    expected = 3 * SoftAdaptWeighter.get_component_weights(*A[:3].T, beta=1.0).numpy()
    np.testing.assert_allclose(step(optimizer, p, A[3]), expected, rtol=1e-14)


def test_normalized_softadapt_absolute_keeps_the_order():
    # Seen: both losses fall, and the fast one gets 0.69 because the sum of the slopes is negative.
    fast, slow = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6]
    weights = NormalizedSoftAdaptWeighter.get_component_weights
    assert weights(fast, slow, beta=1).tolist() == pytest.approx([0.69385, 0.30615], abs=1e-5), "as the package does"
    plain = SoftAdaptWeighter.get_component_weights(fast, slow, beta=1)
    absolute = weights(fast, slow, beta=1, normalize="absolute")
    assert plain[0] < plain[1]
    assert absolute[0] < absolute[1]


@pytest.mark.parametrize("normalize", ["sum", "absolute"])
def test_normalized_softadapt_of_constant_losses_is_equal(normalize):
    # Seen: nan.
    weights = NormalizedSoftAdaptWeighter.get_component_weights([2.0] * 5, [7.0] * 5, normalize=normalize)
    assert weights.tolist() == pytest.approx([0.5, 0.5])
    if normalize == "sum":
        weights = NormalizedSoftAdaptWeighter.get_component_weights([1.0, 2.0], [2.0, 1.0])
        assert weights.tolist() == pytest.approx([0.5, 0.5]), "slopes that sum to 0"


def test_softadapt_needs_one_point_more_than_the_order():
    # Seen: IndexError.
    with pytest.raises(ValueError, match=r"loss '0' has 5 values; a finite difference of order 5 needs 6"):
        SoftAdaptWeighter.get_component_weights([1.0] * 5, [2.0] * 5, accuracy_order=5)
    for bad in ({"accuracy_order": 5}, {"accuracy_order": 0}, {"window": 1}, {"slope": "last"}, {"interval": "day"}):
        with pytest.raises(ValueError, match=r"SoftAdaptWeighter: `(accuracy_order|window|slope|interval)`"):
            SoftAdaptWeighter(any_optimizer(), **bad)
    with pytest.raises(ValueError, match="not finite"):
        SoftAdaptWeighter.get_component_weights([1.0, math.nan], [2.0, 1.0])
    with pytest.raises(ValueError, match="got none"):
        SoftAdaptWeighter.get_component_weights()


def test_softadapt_newest_slope_sees_a_jump():
    # Seen: a loss that has just jumped up by 8 gets weight 0.04.
    jumped, still = [5.0, 4.0, 3.0, 2.0, 10.0], [1.0] * 5
    weights = SoftAdaptWeighter.get_component_weights
    assert weights(jumped, still, beta=0.1)[0] < 0.5
    assert weights(jumped, still, beta=0.1, slope="newest")[0] > 0.5
    line = [1.0, 3.0, 5.0]
    torch.testing.assert_close(weights(line, still), weights(line, still, slope="newest"))


def test_softadapt_is_silent(capsys):
    # Seen: 302 characters in spite of verbose=False.
    SoftAdaptWeighter.get_component_weights([1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1], accuracy_order=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0])
def test_loss_weighted_softadapt_of_tiny_losses(scale):
    weights = LossWeightedSoftAdaptWeighter.get_component_weights([scale] * 3, [3 * scale] * 3)
    assert weights.tolist() == pytest.approx([0.25, 0.75], rel=1e-7)
    with pytest.raises(ValueError, match=r"mean of every loss must be >= 0.*'1': -1.0"):
        LossWeightedSoftAdaptWeighter.get_component_weights([1.0, 1.0], [-1.0, -1.0])


# -------------------------------------------------------------------------------- epochs, ratios and randomness


def test_dwa_reference():
    p, optimizer = setting(DWAWeighter)
    found = []
    for mean in A:
        for offset in (-0.1, 0.0, 0.1):  # three batches an epoch
            weights = step(optimizer, p, mean + offset * np.array([1, -1, 2]))
        found.append(weights)
        optimizer.epoch_end()
    np.testing.assert_allclose(found, SEQUENCES["DWA"]["torchjd"], rtol=1e-11)


def test_dwa_of_constant_losses_is_one():
    # Seen: (1.99, 0.007) at iteration 26, from a buffer filled with ones.
    p, optimizer = setting(DWAWeighter, m=2)
    for i in range(60):
        np.testing.assert_allclose(step(optimizer, p, (2000.0, 1.0), ("a", "b")), [1, 1], rtol=1e-15)
        if i % 7 == 6:
            optimizer.epoch_end()


def test_dwa_without_a_loss_in_an_epoch_keeps_the_ratio():
    p, optimizer = setting(DWAWeighter)
    for values in ([4.0, 4.0, 4.0], [2.0, 1.0, 4.0]):
        step(optimizer, p, values)
        optimizer.epoch_end()
    step(optimizer, p, [2.0, None, 4.0])
    optimizer.epoch_end()
    kept = memory(optimizer)
    assert (kept["before"], kept["previous"]) == ({"a": 2.0, "b": 4.0, "c": 4.0}, {"a": 2.0, "b": 1.0, "c": 4.0})
    optimizer.epoch_end()  # an epoch without any step changes nothing
    assert memory(optimizer) == kept


@pytest.mark.parametrize("committed", [True, False])
def test_epoch_end_between_backward_and_step(committed):
    """A step that is still to come counts as part of the epoch if it is made, and not if it is discarded."""
    p, optimizer = setting(DWAWeighter)
    step(optimizer, p, [1.0, 1.0, 1.0])
    optimizer.zero_grad()
    optimizer.backward(dict(zip(NAMES, tied(p, [3.0, 3.0, 3.0]), strict=True)))
    optimizer.epoch_end()
    if committed:
        optimizer.step()
    else:
        optimizer.zero_grad()
    kept = memory(optimizer)
    assert kept["previous"] == dict.fromkeys(NAMES, 2.0 if committed else 1.0)
    assert kept["epoch.sum"] == {}
    assert kept["step"] == 1 + committed


def test_epoch_end_that_fails_changes_nothing():
    p, optimizer = setting(DWAWeighter)
    step(optimizer, p, [1.0, 0.0, 1.0])
    before = memory(optimizer)
    with pytest.raises(ValueError, match=r"DWAWeighter.epoch_end: the mean of every loss must be > 0.*'b': 0.0"):
        optimizer.epoch_end()
    assert memory(optimizer) == before


class Drawn:
    """Stands in for a random stream."""

    def __init__(self, normals=(), uniform=0.0):
        self.normals, self.uniform = normals, uniform

    def standard_normal(self, size):
        return np.array(self.normals)

    def random(self):
        return self.uniform


def test_random_weights_reference(monkeypatch):
    monkeypatch.setattr(RandomWeighter, "rng", lambda self: Drawn([0.3, -1.2, 0.8]))
    found = run(RandomWeighter, [[1, 2, 3]], reduction="mean")
    np.testing.assert_allclose(found[0], SEQUENCES["RLW"]["weights"], rtol=1e-11)


def test_random_weights_are_reproducible_and_average_to_one():
    history = [[1.0, 1.0, 1.0]] * 400
    torch.manual_seed(1)
    found = run(RandomWeighter, history, seed=5)
    torch.manual_seed(2)
    assert (found[:50] == run(RandomWeighter, history[:50], seed=5)).all(), "no global state"
    assert (found[:50] != run(RandomWeighter, history[:50], seed=6)).all()
    assert len(np.unique(found[:, 0])) == 400
    np.testing.assert_allclose(found.mean(axis=0), 1.0, atol=5 * found.std() / 400**0.5)


@pytest.mark.parametrize(
    ("alpha", "key", "tolerance"),
    [(0.95, "closed_form_alpha095_tau1", 1e-10), (0.999, "closed_form_alpha0999_T1", 1e-10)],
)
def test_relobralo_reference(alpha, key, tolerance, monkeypatch):
    case = SEQUENCES["ReLoBRaLo"]
    looks_back = [False, False, False, True, False, False, True, False]  # rho = 1, 1, 0, 1, 1, 0, 1 from step 1 on
    monkeypatch.setattr(
        ReLoBRaLoWeighter, "rng", lambda self: Drawn(uniform=1.0 if looks_back[self.memory["step"]] else 0.0)
    )
    found = run(ReLoBRaLoWeighter, A, alpha=alpha)
    blocks = {**case["physicsnemo_sym"], **case["official_rbischof_under_torch_shim"]}
    expected = {**case, **blocks}[key]
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_relobralo_without_progress_stays_at_one():
    np.testing.assert_allclose(run(ReLoBRaLoWeighter, [[3.0, 0.1, 50.0]] * 50, alpha=0.5, rho=0.5), 1.0, rtol=1e-14)
    np.testing.assert_allclose(run(ReLoBRaLoWeighter, A, alpha=1.0, rho=1.0), 1.0, rtol=1e-14)


# --------------------------------------------------------------------------------------------- scalarisations

PREFERENCE = dict(zip(NAMES, SEQUENCES["Scalarisations"]["weights"], strict=True))
SCALARISATIONS = [
    ("GeometricMean", GeometricMeanWeighter, {}),
    ("STCH(mu=0.01, weights)", STCHWeighter, {"mu": 0.01, "preference": PREFERENCE}),
    ("STCH(mu=0.1, weights)", STCHWeighter, {"mu": 0.1, "preference": PREFERENCE}),
    ("STCH(mu=1.0, weights)", STCHWeighter, {"mu": 1.0, "preference": PREFERENCE}),
    ("STCH(mu=1, uniform)", STCHWeighter, {}),
    ("COSMOS(lambda=2)", COSMOSWeighter, {"penalty": 2.0, "preference": PREFERENCE}),
    ("PBI(theta=5)", PBIWeighter, {"preference": PREFERENCE}),
    ("PBI(theta=5, reference=0.1)", PBIWeighter, {"preference": PREFERENCE, "reference": 0.1}),
    ("UW(s=0)", UncertaintyWeighter, {}),
    ("IMTLL(s=0)", IMTLLWeighter, {}),
]


@pytest.mark.parametrize(("name", "build", "options"), SCALARISATIONS, ids=[name for name, *_ in SCALARISATIONS])
def test_scalarisation_reference(name, build, options):
    case = SEQUENCES["Scalarisations"]
    for losses, truth in zip(case["losses"], case["torchjd"][name], strict=True):
        found = run(build, [losses], **options)[0]
        np.testing.assert_allclose(found, truth["coefficients"], rtol=1e-9, atol=1e-35)


def test_geometric_mean_of_tiny_losses():
    # Seen: eight float32 losses of 1e-6 multiply to 0 and give nan; reported weights that were not the applied ones.
    w = nn.Parameter(torch.zeros(2))
    optimizer = GeometricMeanWeighter(torch.optim.SGD([w], lr=0.1))
    report = optimizer.backward([w[0] + 1e-6 for _ in range(8)])
    assert w.grad.tolist() == pytest.approx([1.0, 0.0])
    assert list(report.weights.values()) == pytest.approx([1 / 8] * 8)


def test_geometric_mean_refuses_zero():
    # Seen: nan.
    p, optimizer = setting(GeometricMeanWeighter, m=2)
    with pytest.raises(ValueError, match=r"GeometricMeanWeighter: every loss must be > 0.*'a': 0.0"):
        step(optimizer, p, [0.0, 1.0], ("a", "b"))


def test_stch_is_the_gradient_of_a_smooth_maximum():
    losses, mu = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64, requires_grad=True), 0.3
    vector, z = torch.tensor(list(PREFERENCE.values()), dtype=torch.float64), torch.tensor([0.1, 0.0, 0.5])
    value = mu * torch.logsumexp(vector * (losses - z) / mu, 0)
    # Seen: the maximum of the raw losses, 3.0, without preference and reference.
    largest = (vector * (losses - z)).max()
    assert largest <= value <= largest + mu * math.log(3)
    value.backward()
    found = run(STCHWeighter, [losses.tolist()], mu=mu, preference=PREFERENCE, reference=dict(zip(NAMES, z.tolist())))  # noqa: B905
    np.testing.assert_allclose(found[0], losses.grad, rtol=1e-7)


def test_the_reference_point_shifts_the_losses():
    # Seen: z was not used.
    for build in (STCHWeighter, COSMOSWeighter, PBIWeighter):
        plain = run(build, [[1.0, 0.2, 3.0]], preference=PREFERENCE)
        shifted = run(build, [[1.5, 0.7, 3.5]], preference=PREFERENCE, reference=0.5)
        np.testing.assert_allclose(shifted, plain, rtol=1e-12)
        unused = run(build, [[1.5, 0.7, 3.5]], preference=PREFERENCE)
        assert np.abs(unused - plain).max() > 1e-3


def test_cosmos_without_penalty_is_linear_and_its_pull_is_orthogonal():
    losses = np.array([1.0, 0.2, 3.0])
    linear = run(COSMOSWeighter, [losses], penalty=0.0, preference=PREFERENCE)[0]
    assert linear.tolist() == list(PREFERENCE.values())
    pull = run(COSMOSWeighter, [losses], penalty=1.0, preference=PREFERENCE)[0] - linear
    assert abs(pull @ losses) < 1e-14
    assert run(COSMOSWeighter, [[0, 0, 0]], preference=PREFERENCE)[0].tolist() == linear.tolist()


def test_pbi_on_its_ray_has_no_penalty():
    ray = np.array(list(PREFERENCE.values()))
    for size in (1e-9, 1.0, 1e9):
        found = run(PBIWeighter, [size * ray], preference=PREFERENCE)[0]
        np.testing.assert_allclose(found, ray / np.linalg.norm(ray), rtol=1e-9)


def test_preference_can_be_drawn_anew_for_each_step():
    p, optimizer = setting(COSMOSWeighter, penalty=0.0)
    for drawn in ({"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 0.6, "b": 0.3, "c": 0.1}):
        optimizer.preference = drawn
        assert step(optimizer, p, [1.0, 1.0, 1.0]).tolist() == list(drawn.values())


# ---------------------------------------------------------------------------- FAMO, variation, softmax, groups


def famo_by_torch(befores, afters, lr=0.025, decay=1e-3):
    """The official algorithm, with torch's Adam."""
    w = torch.zeros(len(befores[0]), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=lr, weight_decay=decay)
    weights = []
    for before, after in zip(torch.tensor(befores), torch.tensor(afters), strict=True):
        z = torch.softmax(w, 0)
        weights.append((z / before / (z / before).sum()).detach().numpy())
        delta = before.log() - after.log()
        adam.zero_grad()
        z.backward(delta)
        adam.step()
    return np.array(weights)


def test_famo_agrees_with_the_official_algorithm():
    expected = famo_by_torch(A[:-1], A[1:])
    p, optimizer = setting(FAMOWeighter, reduction="mean")
    found = []
    for before, after in itertools.pairwise(A):
        found.append(step(optimizer, p, before))
        optimizer.update(dict(zip(NAMES, torch.from_numpy(after), strict=True)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(run(FAMOWeighter, A, reduction="mean")[:-1], expected, rtol=1e-5)


def test_famo_equal_improvement_changes_nothing():
    p, optimizer = setting(FAMOWeighter, decay=0.0)
    for size in (1.0, 0.7, 0.3, 0.31):
        step(optimizer, p, size * np.array([0.1, 3.0, 1e5]))
    assert list(memory(optimizer)["logits"].values()) == [0.0, 0.0, 0.0], "rounding is not an improvement"


def test_famo_gives_more_weight_to_the_loss_that_fell_less():
    p, optimizer = setting(FAMOWeighter)
    step(optimizer, p, [1.0, 1.0, 1.0])
    optimizer.update({"a": 0.5, "b": 1.0, "c": 1.0})
    logits = memory(optimizer)["logits"]
    assert logits["a"] < 0 < logits["b"]


def test_famo_refuses_a_loss_below_its_bound():
    # Seen: nan for a loss of -0.1 with a lower bound of 0.
    p, optimizer = setting(FAMOWeighter)
    with pytest.raises(ValueError, match=r"FAMOWeighter: every loss must be finite and above its bound.*'b': -0.1"):
        step(optimizer, p, [1.0, -0.1, 1.0])
    p, optimizer = setting(FAMOWeighter, min_losses={"a": 0.0, "b": -1.0, "c": 0.0}, reduction="mean")
    np.testing.assert_allclose(step(optimizer, p, [1.0, -0.5, 1.0]), [0.25, 0.5, 0.25])


def test_famo_update_is_used_once_and_after_the_step():
    p, optimizer = setting(FAMOWeighter)
    with pytest.raises(RuntimeError, match=r"FAMOWeighter.update: there is no step to learn from"):
        optimizer.update([1.0, 1.0, 1.0])
    step(optimizer, p, [1.0, 1.0, 1.0])
    before = memory(optimizer)
    with pytest.raises(ValueError, match=r"`losses` must have the names of the losses"):
        optimizer.update([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"'b': 0.0"):
        optimizer.update({"a": 1.0, "b": 0.0})
    assert memory(optimizer) == before
    optimizer.update({"a": 0.5, "b": 1.0, "c": None})
    after = memory(optimizer)
    assert after["step"] == before["step"]
    assert after["logits"]["a"] < 0 < after["logits"]["b"]
    assert "c" not in after["logits"]
    with pytest.raises(RuntimeError, match="no step to learn from"):
        optimizer.update({"a": 0.5, "b": 1.0})
    step(optimizer, p, [0.4, 0.9, 1.0])
    assert memory(optimizer)["logits"] == after["logits"], "the next losses are not used a second time"


def test_famo_update_without_a_step_does_nothing():
    """As when a gradient scaler has skipped the step."""
    p, optimizer = setting(FAMOWeighter)
    optimizer.backward(dict(zip(NAMES, tied(p, [1.0, 1.0, 1.0]), strict=True)))
    optimizer.update({"a": 0.5, "b": 1.0, "c": 1.0})
    optimizer.zero_grad()
    assert memory(optimizer) == {"step": 0}


def test_famo_keeps_no_graph():
    # Seen: the graph of the previous step was kept alive.
    p, optimizer = setting(FAMOWeighter)
    step(optimizer, p, [1.0, 2.0, 3.0])
    assert all(type(x) is float for x in memory(optimizer)["before"].values())


def go4align_by_hand(history, groups, eta):
    """The authors' code, with the best of all partitions in place of k-means."""
    found, p = [], np.ones(len(history[0])) / len(history[0])
    for losses in np.asarray(history):
        p = p * np.exp(-eta * losses)
        p = p / p.sum()
        indicators = losses.sum() / losses * p
        candidates = []
        for labels in itertools.product(range(groups), repeat=len(losses)):
            means = [indicators[np.array(labels) == k].mean() for k in range(groups) if k in labels]
            labels = [sorted(set(labels)).index(k) for k in labels]
            fit = np.array(means)[labels]
            candidates.append((((indicators - fit) ** 2).sum(), fit))
        found.append(min(candidates, key=lambda candidate: candidate[0])[1])
    return np.array(found)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("eta", [0.0, 0.02])
def test_go4align_by_hand(groups, eta):
    history = np.exp(np.random.default_rng(groups).standard_normal((6, 5)))
    found = run(
        lambda base, **switches: GO4AlignWeighter(base, groups=groups, eta=eta, **switches), history, names="abcde"
    )
    np.testing.assert_allclose(found, go4align_by_hand(history, groups, eta), rtol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_groups_are_the_best_ones(shift):
    rng = np.random.default_rng(0)
    for _ in range(30):
        m, groups = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        values = shift + rng.integers(0, 6, m).astype(float)
        fit = grouped(values, groups)
        parts = [
            [values[np.array(labels) == k] for k in set(labels)]
            for labels in itertools.product(range(groups), repeat=m)
        ]
        best = min(sum(np.square(part - part.mean()).sum() for part in partition) for partition in parts)
        assert np.square(values - fit).sum() == pytest.approx(best, abs=1e-9)
        assert len(set(fit)) <= groups
        assert fit.mean() == pytest.approx(values.mean())


def test_cov_by_its_definition():
    found = run(CoVWeighter, A)
    np.testing.assert_array_equal(found[:2], 1.0)
    ratios = np.array([A[0] / A[0], *(A[t] / A[:t].mean(0) for t in range(1, len(A)))])
    for t in range(2, len(A)):
        cov = ratios[:t].std(0) / ratios[:t].mean(0)
        np.testing.assert_allclose(found[t], 3 * cov / cov.sum(), rtol=1e-12)


def test_cov_of_constant_losses_is_equal():
    np.testing.assert_array_equal(run(CoVWeighter, [[1.0, 5.0, 9.0]] * 6), 1.0)
    found = run(CoVWeighter, A, decay=0.9)
    assert np.isfinite(found).all()
    assert (found[3:] != run(CoVWeighter, A)[3:]).all()


def test_cov_with_decay_forgets_the_spread_too():
    """Against moments written out: weights fall as the factors of `decay` do."""
    history, decay = np.array(A), 0.8
    mean = ratios = variance = None
    for t, losses in enumerate(history[:-1]):
        now = losses / (losses if t == 0 else mean)
        keep = decay if t else 0.0
        variance = np.zeros(3) if t == 0 else keep * (variance + (1 - keep) * (now - ratios) ** 2)
        ratios = now if t == 0 else keep * ratios + (1 - keep) * now
        mean = losses if t == 0 else keep * mean + (1 - keep) * losses
    expected = np.sqrt(variance) / ratios
    found = run(CoVWeighter, history, decay=decay)[-1]
    np.testing.assert_allclose(found, 3 * expected / expected.sum(), rtol=1e-9)
    # A loss that was wild long ago, and calm since, against one that goes on as ever.
    calm = [[1.0 + (t < 20) * (t % 2), 1.0 + 0.1 * (t % 2), 1.0] for t in range(400)]
    assert run(CoVWeighter, calm, decay=0.9)[-1][0] < 1e-6
    assert run(CoVWeighter, calm)[-1][0] > 1.0


def test_slaw_by_its_definition():
    found = run(SLAWWeighter, A)
    for t in range(1, len(A)):
        inverse = 1 / A[: t + 1].std(0)
        np.testing.assert_allclose(found[t], 3 * inverse / inverse.sum(), rtol=1e-10)
    mean, square = A[:2].mean(0), (A[:2] ** 2).mean(0)  # plain means for the first 1/(1 - 0.5) steps
    found = run(SLAWWeighter, A, beta=0.5)
    for t in range(2, len(A)):
        mean, square = (mean + A[t]) / 2, (square + A[t] ** 2) / 2
        inverse = 1 / np.sqrt(square - mean**2)
        np.testing.assert_allclose(found[t], 3 * inverse / inverse.sum(), rtol=1e-8)


def test_slaw_of_a_small_variation_on_a_large_loss():
    """A difference of two large averages would lose it."""
    history = [[1e8 + 1000 * (-1) ** t, 1 + 1e-5 * (-1) ** t, 1 + 0.5 * (-1) ** t] for t in range(10)]
    found = run(SLAWWeighter, history)[-1]
    inverse = 1 / np.array([1000.0, 1e-5, 0.5])
    np.testing.assert_allclose(found, 3 * inverse / inverse.sum(), rtol=1e-6)


def test_uwso_limits():
    np.testing.assert_allclose(run(UWSOWeighter, [[0.5, 1, 2]], temperature=1e9)[0], 1.0, rtol=1e-8)
    np.testing.assert_allclose(run(UWSOWeighter, [[0.5, 1, 2]], temperature=1e-3)[0], [3, 0, 0], atol=1e-12)


def test_group_dro_by_its_definition():
    q, eta = np.full(3, 1 / 3), 0.3
    found = run(GroupDROWeighter, A, eta=eta, reduction="mean")
    for t, losses in enumerate(A):
        q = q * np.exp(eta * losses)
        q /= q.sum()
        np.testing.assert_allclose(found[t], q, rtol=1e-12)
    worst = run(GroupDROWeighter, [[1.0, 2.0, 1.0]] * 50, eta=100.0)[-1]
    np.testing.assert_allclose(worst, [0, 3, 0], atol=1e-300)


# --------------------------------------------------------------------------------------------- gradient norms

J = np.array([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0], [6.0, 0.0, 8.0]])
LENGTHS = np.array([5.0, 1.0, 10.0])


@pytest.mark.parametrize(
    ("length", "common"), [("mean", 16 / 3), ("max", 10), ("min", 1), ("geometric", 50 ** (1 / 3)), ("unit", 1)]
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_normalized_gradients_have_the_common_length(length, common, scale):
    found = run(NormalizedGradientWeighter, [[1, 2, 3]], rows=scale * J, length=length)[0]
    np.testing.assert_allclose(found * LENGTHS * scale, common * (1 if length == "unit" else scale), rtol=1e-12)


def test_normalized_gradients_follow_the_rates():
    found = run(NormalizedGradientWeighter, A, rows=J, alpha=0.7)
    for t, losses in enumerate(A):
        rates = losses / A[0]
        rates /= rates.mean()
        lengths = found[t] * LENGTHS
        np.testing.assert_allclose(lengths, LENGTHS.mean() * rates**0.7, rtol=1e-12)
    given = run(NormalizedGradientWeighter, A, rows=J, alpha=1.0, initial_losses=dict(zip(NAMES, A[0], strict=True)))
    np.testing.assert_allclose(given, run(NormalizedGradientWeighter, A, rows=J, alpha=1.0))


def test_normalized_gradients_of_finished_losses():
    build = lambda base, **switches: NormalizedGradientWeighter(base, alpha=0.5, **switches)  # noqa: E731
    found = run(build, [[1, 2, 4], [1, 0, 4], [0, 0, 0]])
    np.testing.assert_allclose(found, [[1, 1, 1], [1.5**0.5, 0, 1.5**0.5], [1, 1, 1]])


def test_normalized_gradients_are_smoothed_without_bias():
    found = run(NormalizedGradientWeighter, A[:5], rows=np.array([k * J for k in range(1, 6)]), decay=0.5)
    for t in range(5):
        shares = 0.5 ** np.arange(t, -1, -1)
        smooth = (shares * np.arange(1, t + 2)).sum() / shares.sum()
        np.testing.assert_allclose(found[t] * LENGTHS, LENGTHS.mean(), rtol=1e-12)
        assert smooth > 0
    p, optimizer = setting(NormalizedGradientWeighter, decay=0.5)
    rows = [np.diag([1.0, 1.0, 1.0]), np.diag([7.0, 1.0, 1.0])]
    for these in rows:
        optimizer.zero_grad()
        weights = optimizer.backward(dict(zip(NAMES, tied(p, [1, 1, 1], these), strict=True))).weights
        optimizer.step()
    assert weights["b"] / weights["a"] == pytest.approx((0.5 * 1 + 7) / 1.5)


def test_zero_gradients_get_no_weight():
    rows = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert run(NormalizedGradientWeighter, [[1, 1]], names=("a", "b"), rows=rows)[0].tolist() == [0, 1]
    assert run(NormalizedGradientWeighter, [[1, 1]], names=("a", "b"), rows=0 * rows)[0].tolist() == [0, 0]


def test_norms_are_taken_where_asked():
    trunk, heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.0)
    x = torch.randn(8, 3)

    def losses():
        z = torch.tanh(trunk(x))
        return z, {"a": heads[0](z).square().mean(), "b": (5 * heads[1](z) - 3).square().mean()}

    _, found = losses()
    rows = {n: torch.autograd.grad(v, list(trunk.parameters()), retain_graph=True) for n, v in found.items()}
    norms = {n: torch.cat([g.flatten() for g in row]).norm().item() for n, row in rows.items()}
    by_default = NormalizedGradientWeighter(base).backward(found).weights
    assert by_default["b"] / by_default["a"] == pytest.approx(norms["a"] / norms["b"], rel=1e-5)
    assert heads[0].weight.grad is not None

    _, found = losses()
    named = NormalizedGradientWeighter(base, shared_params=trunk.bias).backward(found, retain_graph=True).weights
    assert named["b"] / named["a"] == pytest.approx((rows["a"][1].norm() / rows["b"][1].norm()).item(), rel=1e-5)

    z, found = losses()
    at_features = {n: torch.autograd.grad(v, z, retain_graph=True)[0].norm().item() for n, v in found.items()}
    balanced = NormalizedGradientWeighter(base, decay=0.999).backward(found, features=z).weights
    assert balanced["b"] / balanced["a"] == pytest.approx(at_features["a"] / at_features["b"], rel=1e-5)

    for bad in ([], ["w"]):
        with pytest.raises(TypeError, match="`shared_params` must be a parameter"):
            NormalizedGradientWeighter(base, shared_params=bad)


def test_lr_annealing_reference():
    expected = np.array(SEQUENCES["LRAnnealing"]["closed_form_paper_max_ref_alpha_01"])
    found = run(LRAnnealingWeighter, np.ones((6, 3)), rows=JS[:6], rate=0.1)
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=3e-8)  # it adds 1e-8 to each mean
    assert (found[:, 0] == 1.0).all(), "the reference keeps weight 1"
    sizes = np.abs(JS[:6]).max(axis=2)[:, :1] / np.abs(JS[:6]).mean(axis=2)
    weights = np.ones(3)
    for t in range(6):
        weights = 0.9 * weights + 0.1 * sizes[t]
        np.testing.assert_allclose(found[t, 1:], weights[1:], rtol=1e-12)


def test_lr_annealing_uses_the_largest_entry_of_the_reference():
    # Seen: the mean of the reference in the numerator, (1, 2), and a weighted reference.
    rows = np.array([[3.0, 1.0], [1.0, 1.0]])
    for order, names, reference in (((0, 1), ("residual", "data"), None), ((1, 0), ("data", "residual"), "residual")):
        found = run(LRAnnealingWeighter, [[1, 1]], names=names, rows=rows[list(order)], rate=1.0, reference=reference)[
            0
        ]
        assert dict(zip(names, found, strict=True)) == {"residual": 1.0, "data": 3.0}
    with pytest.raises(ValueError, match=r"`reference` must be the name of a loss, one of \['a', 'b'\], got 'pde'"):
        run(LRAnnealingWeighter, [[1, 1]], names=("a", "b"), rows=rows, reference="pde")


def test_lr_annealing_by_norms():
    found = run(LRAnnealingWeighter, [[1, 1, 1]], rows=J, statistic="norm", rate=1.0)[0]
    np.testing.assert_allclose(found, LENGTHS.sum() / LENGTHS, rtol=1e-12)
    found = run(LRAnnealingWeighter, [[1, 1, 1]], rows=J, statistic="norm", rate=1.0, reduction="mean")[0]
    np.testing.assert_allclose(found * LENGTHS, LENGTHS.mean(), rtol=1e-12)


def test_lr_annealing_leaves_weights_alone_without_information():
    rows = np.array([[3.0, 1.0], [0.0, 0.0]])
    assert run(LRAnnealingWeighter, [[1, 1]], names=("a", "b"), rows=rows)[0].tolist() == [1, 1]
    p, optimizer = setting(LRAnnealingWeighter)
    step(optimizer, p, [1, 1, 1])
    kept = memory(optimizer)["weights"]
    assert step(optimizer, p, [None, 1, 1]).tolist() == [kept["b"], kept["c"]], "the reference is absent"


def test_measuring_stops_in_steps_that_reuse_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(rows, "gradient", lambda *args, f=rows.gradient, **kw: calls.append(1) or f(*args, **kw))
    for build in (NormalizedGradientWeighter, LRAnnealingWeighter):
        p, optimizer = setting(build, every=4)
        for values in A:
            step(optimizer, p, values)
        assert len(calls) == 2 * 3
        calls.clear()


# -------------------------------------------------------------------------------------------------------- NTK


def pinn(n=3, scale=1.0):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.linspace(0, 1, n, dtype=torch.float64).reshape(-1, 1)
    return net, lambda: {"pde": net(x).flatten() - 1, "edge": scale * (net(x[:2]).flatten())}


def squared(residuals):
    return {name: r.square().mean() for name, r in residuals.items()}


def traces(net, residuals):
    found = {}
    for name, r in residuals.items():
        rows = [torch.autograd.grad(x, list(net.parameters()), retain_graph=True) for x in r]
        found[name] = sum(g.square().sum().item() for row in rows for g in row)
    return found


def test_ntk_weights_are_one_until_residuals_are_given_and_then_stay():
    # Seen: every loss multiplied by 0 in steps 1 to 999.
    net, residuals = pinn()
    optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.01))
    found = []
    for t in range(5):
        r = residuals()
        optimizer.zero_grad()
        if t == 2:
            t_all = traces(net, r)
            found.append(optimizer.backward(squared(r), residuals=r).weights)
        else:
            found.append(optimizer.backward(squared(r)).weights)
        optimizer.step()
    assert found[0] == found[1] == {"pde": 1.0, "edge": 1.0}
    assert found[2] == pytest.approx({name: sum(t_all.values()) / t for name, t in t_all.items()}, rel=1e-10)
    assert found[2] == found[3] == found[4]


def test_ntk_of_equal_jacobians_and_of_scaled_residuals():
    net, residuals = pinn(n=2)
    optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0))
    r = residuals()
    assert optimizer.backward(squared(r), residuals=r).weights == pytest.approx({"pde": 2.0, "edge": 2.0})
    net, residuals = pinn(n=2, scale=3.0)
    optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0))
    r = residuals()
    weights = optimizer.backward(squared(r), residuals=r).weights
    assert weights["pde"] / weights["edge"] == pytest.approx(9.0)


def test_ntk_estimates_large_traces():
    net, residuals = pinn(n=200)
    exact = traces(net, residuals())
    truth = exact["edge"] / exact["pde"]
    found = []
    for seed in range(12):
        optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0), probes=8, seed=seed)
        r = residuals()
        weights = optimizer.backward(squared(r), residuals=r).weights
        found.append(weights["pde"] / weights["edge"])
    assert len(set(found)) == 12, "probes come from the method's own seed"
    assert all(abs(f / truth - 1) < 5 * 0.5 for f in found)
    assert np.median(found) == pytest.approx(truth, rel=0.5)


def test_ntk_averages_and_keeps_absent_tasks():
    net, residuals = pinn()
    optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0), decay=0.5)
    r = residuals()
    first = optimizer.backward(squared(r), residuals=r).weights
    optimizer.step()
    r = {name: 2 * x if name == "edge" else x for name, x in residuals().items()}
    t = traces(net, r)
    optimizer.zero_grad()
    second = optimizer.backward(squared(r), residuals=r).weights
    optimizer.step()
    for name in t:
        assert second[name] == pytest.approx((first[name] + sum(t.values()) / t[name]) / 2)
    alone = optimizer.backward({"pde": squared(residuals())["pde"], "edge": None}).weights
    assert alone == {"pde": pytest.approx(sum(second.values()) / 2)}, "the usual total per present task"


def test_ntk_bad_residuals_change_nothing():
    net, residuals = pinn()
    optimizer = NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0))
    r = residuals()
    cases = [
        ({"pde": r["pde"]}, ValueError, r"\['edge'\] missing"),
        ({**r, "ic": r["pde"]}, ValueError, r"\['ic'\] unknown"),
        (
            {**r, "pde": r["pde"].detach()},
            TypeError,
            r"residuals\['pde'\]` must be a floating point tensor with a graph",
        ),
        ([r["pde"], r["edge"]], ValueError, r"\['pde', 'edge'\] missing"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.backward(squared(residuals()), residuals=bad)
        assert all(p.grad is None for p in net.parameters())
        assert memory(optimizer) == {"step": 0}
    assert optimizer.backward(squared(residuals())).weights == {"pde": 1.0, "edge": 1.0}, "residuals are not kept"


def test_ntk_under_surgery_takes_what_it_has():
    net, residuals = pinn()
    optimizer = gradsurgery.PCGrad(NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.0)))
    optimizer.backward(squared(residuals()))
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------------------------------------------- arguments

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


# ------------------------------------------------------- weighters that do nothing, or stop, say so once


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


# -------------------------------------------------------------------------------- what two losses share, as measured


class Unread(torch.autograd.Function):
    """Torch knows nothing of what it does: every input has a gradient, of zeros where it has no part in the loss."""

    @staticmethod
    def forward(ctx, *xs):
        return tuple(x.clone() for x in xs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class Silent(Unread):
    """Likewise, but what has no part gets None."""

    @staticmethod
    def forward(ctx, *xs):
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in xs)


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("join", [Unread, Silent])
@pytest.mark.parametrize(
    "build",
    [
        NormalizedGradientWeighter,
        lambda base: NormalizedGradientWeighter(base, alpha=1.0),
        gradsurgery.LRAnnealingWeighter,
        lambda base: gradsurgery.LRAnnealingWeighter(base, statistic="norm"),
        lambda base: gradsurgery.PCGrad(NormalizedGradientWeighter(base)),
    ],
)
def test_gradients_of_heads_are_not_measured_however_losses_are_joined(build, join, accumulated):
    def trained(join):
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), *(nn.Linear(4, 1) for _ in range(3))]).double()
        optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01))
        weights = []
        for x in torch.randn(3, 2, 5, 3, dtype=torch.float64):
            optimizer.zero_grad()
            for k in (0, 1) if accumulated else (0,):
                z = net[0](x[k]).tanh()
                outputs = [net[2](z), net[3](net[1](z)), net[4](net[1](z))]  # the second layer is shared by two
                losses = [
                    (10.0**i * y + 1).square().mean() for i, y in enumerate(outputs if join is None else join(*outputs))
                ]
                report = optimizer.backward(losses, **({"accumulate": k == 0} if accumulated else {}))
            weights.append(list(report.weights.values()))
            optimizer.step()
        return np.array(weights)

    def join_apply(*outputs):
        return join.apply(*outputs)

    np.testing.assert_allclose(trained(join_apply), trained(None), rtol=1e-10)


def test_a_gate_that_closes_leaves_a_parameter_shared_as_measured():
    """One gradient that was not zero proves it, in a resumed run too."""

    def started():
        torch.manual_seed(0)
        trunk, gated = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
        return (
            trunk,
            gated,
            NormalizedGradientWeighter(torch.optim.SGD([*trunk.parameters(), *gated.parameters()], 0.01)),
        )

    def losses(trunk, gated, gate):
        z = trunk(torch.ones(1, 3, dtype=torch.float64))
        a, b = Unread.apply(gated(z), z + gate * gated(z))
        return {"a": a.square().sum(), "b": 3 * b.square().sum()}

    trunk, gated, optimizer = started()
    optimizer.backward(losses(trunk, gated, 1.0))
    optimizer.step()
    optimizer.zero_grad()
    resumed = started()
    resumed[2].load_state_dict(optimizer.state_dict())
    for ours, theirs in zip((trunk, gated), resumed, strict=False):
        theirs.load_state_dict(ours.state_dict())
    named = losses(trunk, gated, 0.0)
    both = [*trunk.parameters(), *gated.parameters()]
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, both, retain_graph=True)]).norm()
        for loss in named.values()
    ]
    for report in (optimizer.backward(named), resumed[2].backward(losses(*resumed[:2], 0.0))):
        assert report.weights["a"] / report.weights["b"] == pytest.approx(float(norms[1] / norms[0]), rel=1e-10)
