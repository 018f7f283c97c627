"""Weights from the lengths of gradients, from the neural tangent kernel, and what two losses share, as measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.gradients import rows
from gradsurgery.weighting.lr_annealing import LRAnnealingWeighter
from gradsurgery.weighting.normalized_gradient import NormalizedGradientWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from tests.support.weighters import SEQUENCES, A, memory, setting, step
from tests.support.weighting_catalogue import NAMES, run, tied

JS = np.array(SEQUENCES["_inputs"]["JS"])


# ------------------------------------------------------------------------------------------------------- gradient norms


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


# ------------------------------------------------------------------------------------------------------------------ NTK


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


# ----------------------------------------------------------------------------------- what two losses share, as measured


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
