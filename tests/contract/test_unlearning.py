"""One loss that forgets and others that retain: SAGO, BLUR and GRU."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import gradsurgery
from gradsurgery import BLUR, GRU, SAGO
from tests.support.answers import answers
from tests.support.catalogue import any_optimizer
from tests.support.samplers import badly_scaled, matrices

METHODS = [SAGO, BLUR, GRU]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


EXACT = {
    "SAGO": (SAGO, {}),
    "SAGO gamma=0.5 alpha=2": (SAGO, {"gamma": 0.5, "alpha": 2.0}),
    "SAGO prefer-retain": (SAGO, {"prefer_retain": True}),
    "BLUR": (BLUR, {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_answers(name):
    method, options = EXACT[name]
    optimizer = method(any_optimizer(), **options)
    cases = answers()["directions"][name]
    assert len(cases) == 8
    for key, case in cases.items():
        found = optimizer.combine(double(answers()["inputs"][key]["J"])).numpy()
        expected = np.array(case["direction"])
        assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected), key


@pytest.mark.parametrize(("key", "floor"), [("plain", None), ("clipped", -0.5)])
def test_exact_sequence(key, floor):
    case = answers()["sequences"]["GRU"]
    optimizer = GRU(any_optimizer(), smoothing=case["share"], floor=floor)
    assert not np.allclose(case["plain"], case["clipped"])
    for rows, expected in zip(case["inputs"], case[key], strict=True):
        found = optimizer.combine(double(rows), update=True).numpy()
        assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------------ what is promised


@pytest.mark.parametrize("prefer", [False, True])
@given(rows=badly_scaled(matrices()))
def test_the_sum_of_the_retained_losses_never_rises_with_sago(prefer, rows):
    d = SAGO(any_optimizer(), prefer_retain=prefer).combine(torch.from_numpy(rows)).numpy()
    retained = rows[1:].sum(axis=0)
    assert (d * retained >= 0).all()


@given(rows=badly_scaled(matrices()))
def test_the_forget_loss_falls_as_alone_with_blur(rows):
    d = BLUR(any_optimizer(), gamma=0.5, alpha=3.0).combine(torch.from_numpy(rows)).numpy()
    f, retained = rows[0], rows[1:].sum(axis=0)
    if len(rows) > 1:
        noise = np.linalg.norm(f) * (np.linalg.norm(f) + sum(map(np.linalg.norm, rows[1:])) + np.linalg.norm(retained))
        assert d @ f == pytest.approx(0.5 * f @ f, rel=0, abs=1e-13 * noise)


@given(rows=badly_scaled(matrices()))
def test_without_a_floor_the_forget_gradient_ends_at_a_right_angle_to_the_average(rows):
    d = GRU(any_optimizer()).combine(torch.from_numpy(rows)).numpy()
    retained = rows[1:].sum(axis=0)
    projected = d - retained
    noise = sum(map(np.linalg.norm, rows)) * np.linalg.norm(retained)
    assert projected @ retained >= -1e-12 * noise
    if rows[0] @ retained >= 0:
        np.testing.assert_allclose(d, rows.sum(axis=0), atol=1e-13 * sum(map(np.linalg.norm, rows)))


def test_with_a_floor_the_conflict_stays_where_it_is_worse():
    f, r = double([-1.0, 0.1]), double([1.0, 0.0])
    for floor, expected in ((None, 0.0), (-1.0, 0.0), (-0.25, -0.75), (0.0, -1.0)):
        d = GRU(any_optimizer(), floor=floor).combine(torch.stack([f, r]))
        length = float(f.norm())
        left = -1.0 + length * min(1.0 / length, -floor if floor is not None else 1.0)
        assert float((d - r) @ r) == pytest.approx(left, abs=1e-12)
        assert left == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_several_retained_losses_count_by_their_sum(method):
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = method(any_optimizer()).combine(torch.stack([rows[0], rows[1:].sum(0)]))
    torch.testing.assert_close(method(any_optimizer()).combine(rows), together, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_name_says_which_loss_forgets(method):
    rows = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = method(any_optimizer()).combine(rows)
    found = method(any_optimizer(), forget="2").combine(rows[[1, 2, 0]])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    p = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    optimizer = method(torch.optim.SGD([p], lr=0.0))  # the first of the first call, and from then on by its name
    for order in ((0, 1, 2), (2, 0, 1)):
        optimizer.zero_grad()
        optimizer.backward({f"t{i}": rows[i] @ p for i in order})
        optimizer.step()
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------- entries of one sign or none


def test_coordinates_that_only_retained_losses_move():
    rows = double([[0.0, 1.0], [2.0, 2.0]])
    assert SAGO(any_optimizer()).combine(rows).tolist() == [0, 1]
    assert SAGO(any_optimizer(), prefer_retain=True).combine(rows).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_count_where_products_underflow(dtype):
    tiny = 1e-30 if dtype == torch.float32 else 1e-200
    rows = torch.tensor([[tiny, 1.0], [-tiny, 2.0]], dtype=dtype)
    assert SAGO(any_optimizer()).combine(rows).tolist() == [rows[1, 0].item(), 1.0]


def test_what_overflows_among_the_retained_is_told():
    rows = torch.tensor([[1.0, 1.0], [3e38, 1.0], [3e38, 1.0], [-3e38, 1.0], [-3e38, 1.0]])
    with pytest.raises(RuntimeError, match=r"SAGO.combine: .*overflows torch.float32"):
        SAGO(any_optimizer()).combine(rows)


@pytest.mark.parametrize(("method", "expected"), [(SAGO, [6, 8]), (BLUR, [6, 8]), (GRU, [3, 4])])
def test_a_forget_gradient_of_zero_is_left_out(method, expected):
    options = {} if method is GRU else {"alpha": 2.0}
    assert method(any_optimizer(), **options).combine(double([[0, 0], [3, 4]])).tolist() == expected
    assert method(any_optimizer(), **options).combine(torch.zeros(2, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_a_direction_scales_with_rows_of_any_length(method, scale):
    rows = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = method(any_optimizer()).combine(rows)
    torch.testing.assert_close(method(any_optimizer()).combine(rows * scale) / scale, expected, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------- names and absent tasks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.side = nn.Linear(4, 5).double(), nn.Linear(4, 5).double()

    def forward(self, t, absent=()):
        x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        z = self.trunk(x).tanh()
        losses = {
            "retain": (z - 0.5).square().mean(),
            "forget": -(z - 0.3).square().mean(),
            "more": (z + self.side(x) - 1).square().mean(),
            "most": (self.side(x) + 2).abs().mean(),
        }
        return {name: None if name in absent else loss for name, loss in losses.items()}


def grads(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def plain(t, absent):
    net = Net()
    sum(loss for loss in net(t, absent).values() if loss is not None).backward()
    return grads(net)


@pytest.mark.parametrize("method", METHODS)
def test_without_the_forget_loss_it_is_the_plain_sum(method):
    net = Net()
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), forget="forget")
    report = optimizer.backward(net(1, ["forget"]))
    assert report.flags == ("forget-absent",)
    for found, expected in zip(grads(net), plain(1, ["forget"]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_the_forget_loss_alone_is_itself(method):
    net = Net()
    absent = ["retain", "more", "most"]
    options = {} if method is GRU else {"gamma": 3.0}
    report = method(torch.optim.SGD(net.parameters(), lr=0.1), forget="forget", **options).backward(net(1, absent))
    assert report.flags == ()
    for found, expected in zip(grads(net), plain(1, absent), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", [SAGO, BLUR])
def test_what_the_forget_loss_does_not_reach_gets_the_plain_sum(method):
    net = Net()
    method(torch.optim.SGD(net.parameters(), lr=0.1), forget="forget", alpha=3.0).backward(net(1))
    expected = plain(1, ["forget"])[2:]
    found = grads(net)[2:]
    if method is BLUR:  # one weight per loss, wherever it reaches
        expected = [3 * g for g in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_the_average_waits_for_the_retained_losses():
    net = Net()
    optimizer = GRU(torch.optim.SGD(net.parameters(), lr=0.1), forget="forget", shared_params=net.trunk)
    for t, absent in ((1, ()), (2, ("retain", "more", "most")), (3, ("forget",))):
        before = optimizer.state_dict()["gradsurgery"]["memory"].get("average", {}).get("retain", {})
        optimizer.zero_grad()
        optimizer.backward(net(t, absent))
        weight = net.trunk.weight.grad.clone()
        optimizer.step()
        after = optimizer.state_dict()["gradsurgery"]["memory"]["average"]["retain"]
        moved = not before or any(not torch.equal(before[k], after[k]) for k in after)
        assert moved == (t != 2)
        if t == 2:  # the forget gradient alone is projected off the average of the step before
            products = sum(
                (net.trunk.weight.grad * before[0]).sum() + (net.trunk.bias.grad * before[1]).sum() for _ in "x"
            )
            assert float(products) >= -1e-14
            assert not torch.equal(weight, plain(t, absent)[0])


@pytest.mark.parametrize("method", METHODS)
def test_names_that_are_not_there(method):
    p = nn.Parameter(torch.ones(2))

    def losses(first, second):
        return {first: p.sum(), second: p.square().sum()}

    names = r"`forget` must be the name of a loss, one of \['forget', 'retain'\], got 'forgot'"
    with pytest.raises(ValueError, match=names):
        method(torch.optim.SGD([p], lr=0.1), forget="forgot").backward(losses("forget", "retain"))
    assert p.grad is None
    with pytest.raises(TypeError, match="`forget` must be the name of a loss or None, got 0"):
        method(torch.optim.SGD([p], lr=0.1), forget=0)
    optimizer = method(torch.optim.SGD([p], lr=0.1))
    optimizer.backward(losses("forget", "retain"))
    optimizer.step()
    gone = r"got 'forget' \(which None stands for|names of the losses must stay the same"
    with pytest.raises(ValueError, match=gone):
        optimizer.backward(losses("retain", "other"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SAGO, {"gamma": 0.0}),
        (SAGO, {"alpha": -1.0}),
        (SAGO, {"prefer_retain": "yes"}),
        (BLUR, {"gamma": float("inf")}),
        (BLUR, {"alpha": 0.0}),
        (GRU, {"smoothing": 0.0}),
        (GRU, {"smoothing": 1.5}),
        (GRU, {"floor": -1.5}),
        (GRU, {"floor": 0.5}),
    ],
)
def test_arguments_out_of_range(method, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{method.__name__}: `{name}` must be"):
        method(any_optimizer(), **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_itself(method):
    def train(net, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            optimizer.backward(net(t, ["most", "retain"] if t % 3 == 0 else []))
            optimizer.step()

    def make(net):
        return method(torch.optim.Adam(net.parameters(), lr=0.01), forget="forget")

    whole = Net()
    train(whole, make(whole), range(8))
    net = Net()
    optimizer = make(net)
    train(net, optimizer, range(4))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = Net()
    again.load_state_dict(weights)
    fresh = make(again)
    fresh.load_state_dict(state)
    train(again, fresh, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up(method):
    net, twin = Net(), Net()
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), forget="forget")
    optimizer.backward(net(1), accumulate=True)
    optimizer.backward(net(2))
    both = [twin(1), twin(2)]
    method(torch.optim.SGD(twin.parameters(), lr=0.1), forget="forget").backward(
        {name: both[0][name] + both[1][name] for name in both[0]}
    )
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)


def test_weights_that_blur_reuses():
    net = Net()
    optimizer = BLUR(torch.optim.SGD(net.parameters(), lr=0.0), forget="forget", every=2)
    first = optimizer.backward(net(1))
    optimizer.step()
    optimizer.zero_grad()
    second = optimizer.backward(net(2))
    assert "reused" in second.flags
    assert second.weights == first.weights
    for method in (SAGO, GRU):
        with pytest.raises(ValueError, match="need a method that works by one weight per loss"):
            method(torch.optim.SGD(net.parameters(), lr=0.0), every=2)


def test_a_weighter_inside_is_seen_by_the_method():
    rows = double([[1.0, -2.0, 1.0], [3.0, 4.0, -1.0]])
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    inner = gradsurgery.FixedWeighter(torch.optim.SGD([p], lr=0.1), weights=[2.0, 0.5])
    SAGO(inner).backward([row @ p for row in rows])
    assert p.grad.tolist() == [2, 2, -0.5]
