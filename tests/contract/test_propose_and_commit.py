"""``backward`` proposes, ``step`` commits, ``zero_grad`` discards: memory, draws, cadence and checkpoints."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery.graph import torch_private
from tests.support.two_heads import Counting, Halves, Net, memory_of, same, sgd

# -------------------------------------------------------------------------------------- propose, commit, discard, draws


def test_backward_proposes_step_commits_zero_grad_discards(net, x):
    optimizer = Counting(sgd(net))
    optimizer.backward(net(x))
    assert memory_of(optimizer) == {"step": 0}, "state_dict holds committed memory"
    optimizer.zero_grad()
    optimizer.step()
    assert memory_of(optimizer) == {"step": 0}
    optimizer.backward(net(x))
    optimizer.step()
    first = memory_of(optimizer)
    assert first["step"] == 1
    assert first["count"] == {"t0": 1.0, "t1": 1.0}
    optimizer.step()
    assert memory_of(optimizer) == first, "a step without a backward teaches nothing"
    optimizer.zero_grad()
    optimizer.backward(net(x))
    optimizer.backward(net(x))  # no zero_grad between: goes on from the pending state
    optimizer.step()
    assert memory_of(optimizer)["count"] == {"t0": 3.0, "t1": 3.0}
    assert memory_of(optimizer)["step"] == 2
    assert memory_of(optimizer)["drawn"] != first["drawn"]


def test_every_evaluation_of_a_closure_starts_from_the_same_state(net, x):
    drawn, counts = [], []

    class Spy(Counting):
        def weights(self, gram, losses):
            w = super().weights(gram, losses)
            drawn.append(self.memory["drawn"])
            counts.append(self.memory["count"]["t0"])
            return w

    optimizer = Spy(torch.optim.LBFGS(net.parameters(), lr=1e-3, max_iter=4))

    def closure():
        optimizer.zero_grad()
        return optimizer.backward(net(x)).objective

    optimizer.step(closure)
    assert len(drawn) > 2
    assert set(counts) == {1.0}
    assert len(set(drawn)) == 1
    assert memory_of(optimizer)["count"]["t0"] == 1.0
    assert memory_of(optimizer)["step"] == 1
    optimizer.step(closure)
    assert memory_of(optimizer)["count"]["t0"] == 2.0
    assert len(set(drawn)) == 2


def test_a_skipped_scaler_step_commits_nothing(net, x):
    net.float()
    optimizer = Counting(sgd(net))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.clone() for p in net.parameters()]
    losses = net(x.float())
    losses["t1"] = losses["t1"] * torch.tensor(float("inf"))
    report = optimizer.backward(losses, scaler=scaler)
    assert "nonfinite" in report.flags
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert memory_of(optimizer) == {"step": 0}
    optimizer.zero_grad()
    optimizer.backward(net(x.float()), scaler=scaler)
    scaler.step(optimizer)
    assert memory_of(optimizer)["step"] == 1


def test_randomness_is_the_methods_own(x):
    def run(seed, steps):
        torch.manual_seed(3)
        net = Net()
        optimizer = gradsurgery.PCGrad(sgd(net, 0.01), seed=seed)
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward(net(x, targets=(1.0, -50.0, 20.0)))
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    torch.manual_seed(3)
    Net()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = run(0, 12)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert same(run(0, 12), first), "neither python's nor numpy's global state matters"
    assert not same(run(1, 12), first), "the seed does"


# -------------------------------------------------------------------------------------------------------------- cadence


def passes(monkeypatch):
    counts = {"row": 0, "one": 0}
    monkeypatch.setattr(torch_private, "_ENGINE", None)  # then the public calls are made
    grad, backward = torch.autograd.grad, torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (counts.__setitem__("row", counts["row"] + 1), grad(*a, **k))[1]
    )
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *a, **k: (counts.__setitem__("one", counts["one"] + 1), backward(*a, **k))[1]
    )
    return counts


def test_cadence_reuses_weights_and_spares_passes(net, x, monkeypatch):
    optimizer = gradsurgery.MGDA(sgd(net, 0.0), every=3, warmup=2)
    counts = passes(monkeypatch)
    history = []
    for _ in range(8):
        counts.update(row=0, one=0)
        optimizer.zero_grad()
        report = optimizer.backward(net(x))
        history.append((report.flags, dict(counts)))
        if report.flags == ("reused",):
            w = report.weights
            losses = net(x)
            weighted = sum(w[n] * losses[n] for n in losses)
            (trunk,) = torch.autograd.grad(weighted, [net.trunk[0].weight], retain_graph=True)
            torch.testing.assert_close(net.trunk[0].weight.grad, trunk)
            (head,) = torch.autograd.grad(losses["t1"], [net.heads[1].weight])
            assert torch.equal(net.heads[1].weight.grad, head), "private parameters keep their plain gradient"
        optimizer.step()
    warmup, act, reuse = ("warmup",), (), ("reused",)
    assert [h[0] for h in history] == [warmup, warmup, act, reuse, reuse, act, reuse, reuse]
    assert [h[1] for h in history[:4]] == [{"row": 0, "one": 1}] * 2 + [{"row": 2, "one": 0}, {"row": 0, "one": 2}]


def test_cadence_recomputes_when_the_tasks_change(net, x):
    optimizer = gradsurgery.MGDA(sgd(net), every=10)
    for absent, flags in (({}, ()), ({}, ("reused",)), ({"t0": None}, ()), ({"t0": None}, ("reused",))):
        optimizer.zero_grad()
        assert optimizer.backward({**net(x), **absent}).flags == flags
        optimizer.step()


def test_cadence_counts_committed_steps_and_survives_a_checkpoint(net, x):
    optimizer = gradsurgery.MGDA(sgd(net), every=2)
    for _ in range(3):
        optimizer.zero_grad()
        assert optimizer.backward(net(x)).flags == ()
    optimizer.step()
    fresh = gradsurgery.MGDA(sgd(net), every=2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.backward(net(x)).flags == ("reused",)


def test_cadence_of_a_weighter(net, x):
    seen = []

    class Spy(Halves):
        def weights(self, losses):
            seen.append(losses)
            return super().weights(losses)

    optimizer = Spy(sgd(net), every=2, warmup=1)
    weights = []
    for _ in range(5):
        optimizer.zero_grad()
        weights.append(optimizer.backward(net(x)).weights["t1"])
        optimizer.step()
    assert weights == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert len(seen) == 2


# ---------------------------------------------------------------------------------------------------------- checkpoints


def train(optimizer, net, batches):
    for x in batches:
        optimizer.zero_grad()
        optimizer.backward(net(x, targets=(1.0, -50.0, 20.0)))
        optimizer.step()


@pytest.mark.parametrize(
    "wrap",
    [
        gradsurgery.PCGrad,
        lambda base: gradsurgery.PCGrad(base, every=3, warmup=2),
        gradsurgery.MGDA,
        lambda base: gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"][0]),
        lambda base: gradsurgery.PCGrad(gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"][0]), every=2),
    ],
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, wrap):
    batches = [torch.randn(8, 5, dtype=torch.float64) for _ in range(9)]
    net = Net()
    start = copy.deepcopy(net.state_dict())
    whole = wrap(torch.optim.AdamW(net.parameters(), lr=0.01))
    train(whole, net, batches)

    half = Net()
    half.load_state_dict(start)
    optimizer = wrap(torch.optim.AdamW(half.parameters(), lr=0.01))
    train(optimizer, half, batches[:4])
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    rest = Net()
    rest.load_state_dict(saved["net"])
    resumed = wrap(torch.optim.AdamW(rest.parameters(), lr=0.01))
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, rest, batches[4:])
    assert same(list(rest.parameters()), list(net.parameters()))


def test_another_methods_memory_starts_afresh_with_a_warning(net, x):
    saved = Counting(sgd(net))
    saved.backward(net(x))
    saved.step()
    target = gradsurgery.PCGrad(sgd(net))
    with pytest.warns(UserWarning, match=r"belongs to Counting.*not to PCGrad.*starts afresh"):
        target.load_state_dict(saved.state_dict())
    assert memory_of(target) == {"step": 0}


@pytest.mark.parametrize("call", ["backward", "combine"])
def test_a_call_inside_a_call_of_the_same_optimizer_is_refused_and_nothing_is_lost(net, x, call):
    optimizer = Counting(sgd(net))
    losses = net(x)

    def again(_):
        if call == "backward":
            with torch.enable_grad():
                optimizer.backward(net(x))
        else:
            optimizer.combine(torch.eye(2, dtype=torch.float64))

    handle = next(net.parameters()).register_hook(again)
    with pytest.raises(
        RuntimeError, match=rf"Counting\.{call}: was called while backward\(\) of the same optimizer runs"
    ):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())
    assert memory_of(optimizer) == {"step": 0}
    handle.remove()
    optimizer.backward(net(x))
    optimizer.step()
    assert memory_of(optimizer)["step"] == 1


def test_a_step_after_a_call_that_must_not_be_learnt_from_commits_nothing():
    """A scaler would skip it. Who makes it all the same finds weights of 1, and the memory where it was."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([p], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    report = optimizer.backward({"a": p.square().sum(), "b": p[0] * torch.inf}, scaler=scaler)
    assert report.weights == {"a": 1.0, "b": 1.0}
    assert not torch.isfinite(p.grad).all()
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"]["step"] == 0
