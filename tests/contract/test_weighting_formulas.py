"""Weights that are a formula of the current losses, learnt weights, and scalarisations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradsurgery.weighting.cosmos import COSMOSWeighter
from gradsurgery.weighting.fixed import FixedWeighter
from gradsurgery.weighting.geometric_mean import GeometricMeanWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.loss_size import (
    InitialLossWeighter,
    PriorLossWeighter,
    RealTimeWeighter,
    label_entropy,
    label_variance,
    uniform_prior,
)
from gradsurgery.weighting.pbi import PBIWeighter
from gradsurgery.weighting.running_max import RunningMaxWeighter
from gradsurgery.weighting.stch import STCHWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from tests.support.weighters import SEQUENCES, A, memory, setting, step
from tests.support.weighting_catalogue import NAMES, run, tied

# ------------------------------------------------------------------------------------------------------- simple weights


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


def test_given_initial_losses_divide_and_must_name_every_loss():
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


# ------------------------------------------------------------------------------------------------------- learnt weights


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


# ------------------------------------------------------------------------------------------------------- scalarisations


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
