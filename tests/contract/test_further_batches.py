"""MoDo and SDMGrad, which differentiate further batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.modo import MoDo
from gradsurgery.surgery.sdmgrad import SDMGrad
from tests.support.catalogue import any_optimizer
from tests.support.row_methods import JS, REFERENCE, SEQUENCES, Net, double, lossy, simplex


def test_modo_reference():
    optimizer = MoDo(any_optimizer(), reduction="mean")
    for k, shares in enumerate(SEQUENCES["MoDo"]["torchjd_gamma01_rho01"]):
        first, second, third = JS[3 * k : 3 * k + 3]
        d = optimizer.combine(third, update=True, independent=[first, second])
        torch.testing.assert_close(d, double(shares) @ third, rtol=1e-11, atol=2e-12)


def test_modo_converges_to_mgda_on_one_batch():
    rows = double(REFERENCE["inputs"]["m3_n3_conflict"]["J"])
    optimizer = MoDo(any_optimizer(), rho=0.0, reduction="mean")
    for _ in range(400):
        d = optimizer.combine(rows, update=True)
    torch.testing.assert_close(d, MGDA(any_optimizer(), reduction="mean").combine(rows), rtol=0, atol=1e-6)
    equal = MoDo(any_optimizer(), gamma=1e-3, rho=1e3)
    for _ in range(50):
        d = equal.combine(rows, update=True)
    torch.testing.assert_close(d, rows.sum(0), rtol=5e-3, atol=0)


def sdmgrad_by_hand(a, shares, strength, preferred):
    w = torch.tensor(shares, dtype=torch.float64)
    sgd = torch.optim.SGD([w], lr=10, momentum=0.5)
    a = a / a.diagonal().clamp(min=0).sqrt().mean() ** 2
    for _ in range(20):
        w.grad = a @ (w + strength * double(preferred))
        sgd.step()
        w.copy_(torch.from_numpy(simplex(w.numpy())))
    return w.numpy()


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_sdmgrad_by_hand(batches):
    optimizer = SDMGrad(any_optimizer(), reduction="mean", preference=[1, 2, 1])
    shares, preferred = np.full(3, 1 / 3), np.array([0.25, 0.5, 0.25])
    for k in range(3):
        last, *others = JS[3 * k], *JS[3 * k + 1 : 3 * k + 1 + batches]
        first, second = {0: (last, last), 1: (*others, last), 2: others}[batches]
        shares = sdmgrad_by_hand(first @ second.T, shares, 0.3, preferred)
        d = optimizer.combine(last, update=True, independent=others)
        torch.testing.assert_close(d, double((shares + 0.3 * preferred) / 1.3) @ last, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", ["sgd", "exact"])
def test_sdmgrad_of_zero_gradients(solver):
    # Seen: a crash where the weights lie on the simplex already.
    assert not SDMGrad(any_optimizer(), solver=solver).combine(torch.zeros(3, 4)).any()
    p = nn.Parameter(torch.zeros(2))
    report = SDMGrad(torch.optim.SGD([p], lr=0.1), solver="exact", strength=0.0).backward([p.sum(), -3 * p.sum()])
    assert report.flags == ("stationary",)
    assert not p.grad.any()
    assert SDMGrad(any_optimizer(), solver=solver).combine(torch.ones(3, 4)).tolist() == pytest.approx([3] * 4)


@pytest.mark.parametrize("strength", [0.0, 0.3, 50.0])
def test_sdmgrad_exact_is_the_minimum(strength):
    for rows in JS:
        preferred, j = np.full(3, 1 / 3), rows.numpy()

        def value(w, j=j, q=preferred):
            return float(np.square((w + strength * q) @ j).sum())

        found = minimize(
            value,
            preferred,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        expected = (found.x + strength * preferred) @ rows.numpy() / (1 + strength)
        d = SDMGrad(any_optimizer(), solver="exact", strength=strength, reduction="mean").combine(rows)
        torch.testing.assert_close(d, torch.from_numpy(expected), rtol=0, atol=3e-6)
        assert d.norm() <= np.linalg.norm(expected) * (1 + 1e-9)
    if strength == 0:
        torch.testing.assert_close(d, MGDA(any_optimizer(), reduction="mean").combine(rows), rtol=1e-9, atol=0)
    if strength == 50:
        torch.testing.assert_close(d, rows.mean(0), rtol=0, atol=0.05)


def test_sdmgrad_exact_on_independent_batches():
    # Its own answer where all batches are the same, and a point of the simplex where J₁J₂ᵀ is anything.
    for solver in ("exact", "sgd"):
        one = SDMGrad(any_optimizer(), solver=solver).combine(JS[0])
        torch.testing.assert_close(
            SDMGrad(any_optimizer(), solver=solver).combine(JS[0], independent=[JS[0], JS[0]]),
            one,
            rtol=1e-7,
            atol=1e-9,
        )
    for rows in JS:
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = SDMGrad(torch.optim.SGD([p], lr=0.1), solver="exact", strength=0.0)
        weights = optimizer.backward(lossy(rows, p), independent=[lossy(-rows, p), lossy(rows, p)]).weights
        assert min(weights.values()) >= 0
        assert sum(weights.values()) == pytest.approx(3)


@pytest.mark.parametrize("method", [MoDo, SDMGrad])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_independent_batches_through_backward(method, batches):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = method(torch.optim.SGD([p], lr=0.1))
    for k in range(3):
        last, *others = JS[3 * k], *JS[3 * k + 1 : 3 * k + 1 + batches]
        expected = optimizer.combine(last, independent=others)
        optimizer.zero_grad()
        report = optimizer.backward(lossy(last, p), independent=[lossy(rows, p) for rows in others])
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(report.gram, last @ last.T, rtol=1e-12, atol=0)
        torch.testing.assert_close(double(list(report.weights.values())) @ last, p.grad, rtol=1e-12, atol=1e-14)
        optimizer.step()
    if batches and method is MoDo:
        assert not torch.allclose(expected, optimizer.combine(last, independent=[-rows for rows in others[:1]]))


@pytest.mark.parametrize("method", [MoDo, SDMGrad])
def test_independent_batches_may_be_parts_of_one_forward_pass(method):
    net, x = Net(), torch.randn(24, 5, dtype=torch.float64)
    whole = net.errors(x)
    parts = [{name: e[8 * k : 8 * k + 8].mean() for name, e in whole.items()} for k in range(3)]
    method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(parts[2], independent=parts[:2])
    together = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    batches = [{name: e.mean() for name, e in net.errors(x[8 * k : 8 * k + 8]).items()} for k in range(3)]
    method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(batches[2], independent=batches[:2])
    for p, g in zip(net.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)
    plain = torch.autograd.grad(net.errors(x[16:])["t1"].mean(), net.heads[1].weight)[0]
    torch.testing.assert_close(net.heads[1].weight.grad, plain, rtol=1e-12, atol=0)


def test_independent_batches_take_part_in_preference_and_normalize():
    rows, factors = JS[0], double([[1], [4], [0.5]])
    others = [JS[1], JS[2]]
    found = MoDo(any_optimizer(), preference=[1, 4, 0.5]).combine(rows, independent=others)
    expected = MoDo(any_optimizer()).combine(factors * rows, independent=[factors * j for j in others])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found = MoDo(any_optimizer(), normalize="l2").combine(rows, independent=others)
    unit = [nn.functional.normalize(j, dim=1) for j in (rows, *others)]
    expected = MoDo(any_optimizer()).combine(unit[0], independent=unit[1:])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("method", [MoDo, SDMGrad])
def test_independent_batches_have_logarithms_of_their_own_losses(method, batches):
    def losses(k, p):
        return [(k + 1 + i) * ((row @ p - 1).square() + 0.5) for i, row in enumerate(JS[k])]

    start = torch.linspace(-1, 1, JS[0].shape[1], dtype=torch.float64)
    found, wanted = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    others = range(1, batches + 1)
    optimizer = method(torch.optim.SGD([found], lr=0.1), log_losses=True)
    optimizer.backward(losses(0, found), independent=[losses(k, found) for k in others])
    plain = method(torch.optim.SGD([wanted], lr=0.1))
    logs = [[x.log() for x in losses(k, wanted)] for k in range(batches + 1)]
    plain.backward(logs[0], independent=logs[1:])
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    for key, value in plain.state_dict()["gradsurgery"]["memory"].get("shares", {}).items():
        assert optimizer.state_dict()["gradsurgery"]["memory"]["shares"][key] == pytest.approx(value, rel=1e-10)


def test_a_further_batch_under_log_losses_is_checked():
    p = nn.Parameter(torch.ones(JS[0].shape[1], dtype=torch.float64))
    positive = [(row @ p).square() + 1 for row in JS[0]]
    optimizer = MoDo(torch.optim.SGD([p], lr=0.1), log_losses=True)
    with pytest.raises(
        ValueError, match=r"MoDo: every loss must be > 0.* in a batch of `independent` too; got {'1': -"
    ):
        optimizer.backward(positive, independent=[[positive[0], positive[1] - 1e6, positive[2]]])
    assert p.grad is None
    with pytest.raises(RuntimeError, match=r"the gradient of .* is not finite"):
        optimizer.backward(positive, independent=[[positive[0], positive[1] * math.nan, positive[2]]])
    assert p.grad is None
    with pytest.raises(
        ValueError, match=r"MoDo.combine: log_losses=True .*Divide the rows of each batch by its losses"
    ):
        optimizer.combine(JS[0], losses=[1.0, 2.0, 3.0], independent=[JS[1]])


def test_independent_batches_are_checked():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MoDo(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="MoDo: `independent` must hold at most two batches, got 3"):
        optimizer.backward(lossy(JS[0], p), independent=[lossy(JS[1], p)] * 3)
    with pytest.raises(ValueError, match=r"MoDo.backward: a batch in `independent` lacks the losses \['2'\]"):
        optimizer.backward(lossy(JS[0], p), independent=[lossy(JS[1][:2], p)])
    with pytest.raises(ValueError, match=r"MoDo.combine: `independent` must hold matrices of the shape of `rows`"):
        optimizer.combine(JS[0], independent=[JS[1][:2]])
    bad = lossy(JS[1], p)
    bad[1] = bad[1] * math.inf
    with pytest.raises(RuntimeError, match=r"the gradient of .*'1'.* is not finite"):
        optimizer.backward(lossy(JS[0], p), independent=[bad])
    assert p.grad is None
    # An absent task needs no loss in the other batches, and a failed call leaves nothing behind.
    losses = lossy(JS[0], p)
    report = optimizer.backward([losses[0], losses[1], None], independent=[lossy(JS[1], p)[:2]])
    assert list(report.weights) == ["0", "1"]
    torch.testing.assert_close(
        MoDo(any_optimizer()).combine(JS[0][:2], independent=[JS[1][:2]]), p.grad, rtol=1e-12, atol=1e-14
    )
