"""``backward`` on values that are not finite, under mixed precision, and around another method."""

from __future__ import annotations

import pytest
import torch

import gradsurgery
from tests.support.two_heads import Counting, Halves, Net, grads, memory_of, same, sgd, with_bad_row

# ----------------------------------------------------------------------------------------------------------- non-finite


def with_bad_value(net, x):
    losses = net(x)
    return {**losses, "t1": losses["t1"] * float("nan")}


def with_bad_head(net, x):
    losses = net(x)
    return {**losses, "t1": losses["t1"] + (net.heads[1].weight.sum() * 0).sqrt()}


BAD = [with_bad_value, with_bad_row, with_bad_head]


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_raise_names_the_loss(net, x, bad):
    optimizer = gradsurgery.MGDA(sgd(net))
    with pytest.raises(RuntimeError, match=r"MGDA\.backward.*'t1' is not finite"):
        optimizer.backward(bad(net, x))
    assert same(grads(net), [None] * len(grads(net)))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("wrap", [Counting, Halves])
def test_nonfinite_skip_writes_nothing(net, x, bad, wrap):
    optimizer = wrap(sgd(net), nonfinite="skip")
    net.heads[0].weight.grad = kept = torch.ones_like(net.heads[0].weight)
    report = optimizer.backward(bad(net, x))
    assert {"nonfinite", "skipped"} <= set(report.flags)
    assert net.heads[0].weight.grad is kept
    assert kept.eq(1).all()
    assert net.trunk[0].weight.grad is None
    optimizer.step()
    assert memory_of(optimizer) == {"step": 0}


def test_nonfinite_drop_equals_an_absent_task(net, x):
    optimizer = gradsurgery.PCGrad(sgd(net), nonfinite="drop")
    report = optimizer.backward(with_bad_value(net, x))
    dropped = grads(net)
    assert report.flags == ("dropped",)
    assert tuple(report.losses) == ("t0",)
    net.zero_grad()
    optimizer.backward({**net(x), "t1": None})
    assert same(grads(net), dropped)
    net.zero_grad()
    report = optimizer.backward({"t1": with_bad_value(net, x)["t1"]})
    assert "skipped" in report.flags
    assert same(grads(net), [None] * len(grads(net)))
    with pytest.raises(RuntimeError, match="gradient of 't1'"):
        optimizer.backward(with_bad_row(net, x))


@pytest.mark.parametrize("bad", BAD)
def test_with_a_scaler_bad_values_reach_grad(net, x, bad):
    net.float()
    optimizer = Counting(sgd(net))
    optimizer.backward(bad(net, x.float()), scaler=torch.amp.GradScaler("cpu"))
    assert any(p.grad is not None and not torch.isfinite(p.grad).all() for p in net.parameters())
    optimizer.step()
    assert memory_of(optimizer) == {"step": 0}


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize(
    "wrap",
    [
        gradsurgery.PCGrad,
        gradsurgery.MGDA,
        Halves,
        lambda base: gradsurgery.MGDA(base, every=2),
        lambda base: gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"][0]),
        lambda base: gradsurgery.MGDA(gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"][0])),
    ],
)
def test_a_scaler_changes_nothing(x, wrap):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.amp.GradScaler("cpu", enabled=False)):
        torch.manual_seed(0)
        net = Net(torch.float32)
        optimizer = wrap(sgd(net, 1e-3))
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.backward(net(x.float()), scaler=scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(a, c)


# ---------------------------------------------------------------------------------------------------------- composition


def test_a_weighter_under_surgery_is_like_weighted_losses(net, x):
    gradsurgery.MGDA(Halves(sgd(net))).backward(net(x))
    composed = grads(net)
    net.zero_grad()
    losses = net(x)
    gradsurgery.MGDA(sgd(net)).backward({"t0": losses["t0"], "t1": 0.5 * losses["t1"]})
    for a, b in zip(composed, grads(net), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_both_layers_commit_together(net, x):
    optimizer = Counting(gradsurgery.GradNormWeighter(sgd(net), net.trunk[2].weight))
    optimizer.backward(net(x))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["inner"]["memory"] == {"step": 0}
    optimizer.backward(net(x))
    optimizer.step()
    saved = optimizer.state_dict()["gradsurgery"]
    assert saved["memory"]["step"] == saved["inner"]["memory"]["step"] == 1
    assert saved["inner"]["class"] == "GradNormWeighter"


def test_other_nestings_are_refused(net):
    with pytest.raises(TypeError, match=r"MGDA: `optimizer` is already a surgery method \(PCGrad\)"):
        gradsurgery.MGDA(gradsurgery.PCGrad(sgd(net)))
    for inner in (Halves, gradsurgery.PCGrad):
        with pytest.raises(TypeError, match=r"Halves: `optimizer` must be a torch optimizer.*weighter goes inside"):
            Halves(inner(sgd(net)))
    with pytest.raises(TypeError, match=r"got the class SGD. Pass an instance"):
        gradsurgery.PCGrad(torch.optim.SGD)
    with pytest.raises(TypeError, match=r"PCGrad: `optimizer` must be a torch.optim.Optimizer, got .*Net"):
        gradsurgery.PCGrad(net)
