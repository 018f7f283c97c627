"""What ``backward``, ``step`` and ``zero_grad`` mean: the semantics that every method shares."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery
from gradsurgery.communication import alone
from gradsurgery.gradients import rows as rows_module
from gradsurgery.graph import torch_private


class Net(nn.Module):
    """A trunk and one head a task; the third head is used by no loss."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.to(dtype)

    def forward(self, x, targets=(1.0, -50.0)):
        z = torch.tanh(self.trunk(x))
        return {f"t{i}": (self.heads[i](z) - t).square().mean() for i, t in enumerate(targets)}

    @property
    def shared(self):
        return list(self.trunk.parameters())


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(8, 5, dtype=torch.float64)


def sgd(net, lr=0.1, **options):
    return torch.optim.SGD(net.parameters(), lr=lr, **options)


def grads(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(a, b):
    return all((u is None and v is None) or torch.equal(u, v) for u, v in zip(a, b, strict=True))


class PlainSum(gradsurgery.Surgery):
    def weights(self, gram, losses):
        return np.ones(len(gram))


class Halves(gradsurgery.Weighter):
    """Weights 1, 1/2, 1/4, …"""

    def weights(self, losses):
        return 0.5 ** np.arange(len(losses))


class Counting(gradsurgery.Surgery):
    """Remembers how many steps each task took part in, and draws a number."""

    stateful = True

    def weights(self, gram, losses):
        self.keep("count", self.recall("count", 0.0) + 1)
        self.memory["drawn"] = float(self.rng().random())
        return self.recall("count", 0.0) * (1 + self.memory["drawn"])


# --------------------------------------------------------------------------------------------- .grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", [gradsurgery.PCGrad, PlainSum])
def test_without_conflict_grad_is_that_of_the_sum(method, dtype, tolerance):
    net, x = Net(dtype), torch.randn(8, 5, dtype=dtype)
    losses = {"a": (net.heads[0](torch.tanh(net.trunk(x))) - 3).square().mean()}
    losses["b"] = losses["a"] * 2 + net.heads[1].weight.square().sum()  # parallel rows
    torch.autograd.backward(list(losses.values()), retain_graph=True)
    expected = grads(net)
    net.zero_grad()
    report = method(sgd(net)).backward(losses)
    assert report.conflict_rate == 0
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for p, want in zip(net.parameters(), expected, strict=True):
        if want is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, want, rtol=0, atol=tolerance * scale)
    assert torch.equal(net.heads[1].weight.grad, expected[6]), "private parameters are equal bit for bit"


def test_mean_divides_everything_by_m(net, x):
    for wrap in (gradsurgery.PCGrad, gradsurgery.MGDA, Halves):
        net.zero_grad()
        wrap(sgd(net)).backward(net(x))
        total = grads(net)
        net.zero_grad()
        wrap(sgd(net), reduction="mean").backward(net(x))
        for p, g in zip(net.parameters(), total, strict=True):
            if g is None:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, g / 2, rtol=1e-14, atol=0)


def test_backward_adds_to_grad(net, x):
    optimizer = gradsurgery.PCGrad(sgd(net))
    optimizer.backward(net(x))
    once = grads(net)
    kept = [p.grad for p in net.parameters()]
    optimizer.backward(net(x))
    for p, g, tensor in zip(net.parameters(), once, kept, strict=True):
        assert p.grad is tensor, "an existing .grad is added to in place"
        if g is not None:
            torch.testing.assert_close(p.grad, 2 * g, rtol=1e-14, atol=0)


@pytest.mark.parametrize("wrap", [gradsurgery.PCGrad, Halves])
def test_a_new_grad_has_the_strides_of_its_parameter(wrap):
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    turned = nn.Parameter(torch.randn(4, 8).T)
    loose = nn.Parameter(torch.randn(6, 4)[:, ::2])  # not dense
    z = conv(torch.randn(2, 3, 5, 5)).flatten(2).mean(2) @ turned
    s = (loose * 2).sum()
    wrap(torch.optim.SGD([*conv.parameters(), turned, loose], lr=0.1)).backward(
        [z.square().mean() + s, (z - 1).square().mean() - s.square()]
    )
    assert conv.weight.grad.stride() == conv.weight.stride() != conv.weight.contiguous().stride()
    assert turned.grad.stride() == turned.stride()
    assert loose.grad.shape == loose.shape


def test_grad_does_not_share_memory():
    # d(a + b) hands the same expanded tensor to a and to b.
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    for wrap in (gradsurgery.PCGrad, Halves):
        a.grad = b.grad = None
        wrap(torch.optim.SGD([a, b], lr=0.1)).backward([(a + b).sum()])
        a.grad[0] = 7
        assert b.grad.tolist() == [1, 1, 1]
        assert a.grad.tolist() == [7, 1, 1]


def test_unreached_parameters_keep_none_and_are_not_decayed(net, x):
    optimizer = gradsurgery.PCGrad(torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5))
    before = net.heads[2].weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(net(x))
        optimizer.step()
    assert net.heads[2].weight.grad is None
    assert torch.equal(net.heads[2].weight, before)


def test_a_zero_gradient_entry_is_still_shared():
    p = nn.Parameter(torch.zeros(2))
    gradsurgery.PCGrad(torch.optim.SGD([p], lr=1.0), reduction="mean").backward([p[0] + 0 * p[1], p[0] + p[1]])
    assert p.grad.tolist() == [1.0, 0.5]


def test_tied_weights_count_once(x):
    layer = nn.Linear(5, 5, dtype=torch.float64)
    other = nn.Linear(5, 5, dtype=torch.float64)
    other.weight = layer.weight
    optimizer = PlainSum(torch.optim.SGD(dict.fromkeys([*layer.parameters(), *other.parameters()]), lr=0.1))
    z = other(torch.tanh(layer(x)))
    losses = [z.square().mean(), (z - 3).square().mean()]
    expected = torch.autograd.grad(sum(losses), layer.weight, retain_graph=True)[0]
    report = optimizer.backward(losses)
    torch.testing.assert_close(layer.weight.grad, expected)
    rows = [torch.autograd.grad(f(other(torch.tanh(layer(x)))), [layer.weight, layer.bias, other.bias])
            for f in (lambda z: z.square().mean(), lambda z: (z - 3).square().mean())]  # fmt: skip
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(report.gram, flat @ flat.T)


def test_parameters_of_several_dtypes():
    a, b = nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.randn(4))
    c = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    base = torch.optim.SGD([a, b, c], lr=0.1)
    total = lambda k: (a * k).square().sum() + (b - k).square().sum() + (c.float() + k).square().sum()  # noqa: E731
    report = gradsurgery.PCGrad(base).backward([total(1), total(2)])
    assert [p.grad.dtype for p in (a, b, c)] == [torch.float64, torch.float32, torch.bfloat16]
    rows = [[g.double() for g in torch.autograd.grad(total(k), [a, b, c])] for k in (1, 2)]
    flat = torch.stack([torch.cat(row) for row in rows])
    torch.testing.assert_close(report.gram, flat @ flat.T, rtol=1e-6, atol=0)


def test_complex_parameters_count_as_pairs_of_reals():
    p = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
    optimizer = PlainSum(torch.optim.SGD([p], lr=0.1))
    losses = [p.abs().square().sum(), (p - 1).abs().square().sum()]
    expected = torch.autograd.grad(sum(losses), p, retain_graph=True)[0]
    report = optimizer.backward(losses)
    torch.testing.assert_close(p.grad, expected)
    rows = torch.stack([torch.view_as_real(g).flatten() for g in (2 * p.detach(), 2 * (p.detach() - 1))])
    torch.testing.assert_close(report.gram, rows @ rows.T)


def test_frozen_parameters_are_ignored(net, x):
    net.trunk[0].requires_grad_(False)
    optimizer = gradsurgery.PCGrad(sgd(net))
    optimizer.backward(net(x))
    assert net.trunk[0].weight.grad is None
    assert net.trunk[2].weight.grad is not None
    net.trunk[0].requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(net(x))
    assert net.trunk[0].weight.grad is not None, "the parameter list is read anew"


def test_tensor_hooks_see_every_row(net, x):
    seen = []
    net.trunk[0].weight.register_hook(lambda g: seen.append(1) or g * 0)
    gradsurgery.PCGrad(sgd(net)).backward(net(x))
    assert len(seen) == 2
    assert not net.trunk[0].weight.grad.any()


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.FixedWeighter])
def test_a_hook_that_changes_the_gradient_of_one_loss_in_place_changes_that_of_no_other(net, x, method):
    found = []
    for hook in (lambda g: g.mul_(5), lambda g: g * 5):
        losses = net(x)
        losses["t0"].register_hook(hook)
        optimizer = method(sgd(net))
        optimizer.backward(losses)
        found.append([p.grad for p in net.parameters()])
        optimizer.zero_grad()
    torch.testing.assert_close(*found)


def test_shared_params_override(net, x):
    optimizer = gradsurgery.MGDA(sgd(net), shared_params=(p for p in net.trunk[2].parameters()))
    report = optimizer.backward(net(x))
    rows = [torch.autograd.grad(loss, list(net.trunk[2].parameters())) for loss in [net(x)["t0"], net(x)["t1"]]]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(report.gram, flat @ flat.T)
    torch.testing.assert_close(
        net.trunk[0].weight.grad, torch.autograd.grad(sum(net(x).values()), net.trunk[0].weight)[0]
    )
    optimizer.backward(net(x))  # the iterable was materialised


def test_private_parameters_get_their_own_gradient(net, x):
    plain = [torch.autograd.grad(net(x)[f"t{i}"], net.heads[i].weight)[0] for i in range(2)]
    for wrap, factors in ((gradsurgery.MGDA, (1, 1)), (Halves, (1, 0.5))):
        net.zero_grad()
        wrap(sgd(net)).backward(net(x))
        for i, factor in enumerate(factors):
            torch.testing.assert_close(net.heads[i].weight.grad, plain[i] * factor, rtol=1e-15, atol=0)


class PassesOn(torch.autograd.Function):
    """A node behind all outputs of a model that hands each its own gradient only, like the one of DDP."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def test_private_is_what_only_one_loss_really_reaches(net, x):
    plain = [torch.autograd.grad(net(x)[f"t{i}"], net.heads[i].weight)[0] for i in range(2)]
    optimizer = gradsurgery.MGDA(sgd(net, 0.0), every=2)
    for flags in ((), ("reused",)):
        optimizer.zero_grad()
        joined = dict(zip(("t0", "t1"), PassesOn.apply(*net(x).values()), strict=True))
        assert optimizer.backward(joined).flags == flags
        for i in range(2):
            assert torch.equal(net.heads[i].weight.grad, plain[i])
        optimizer.step()


@pytest.mark.parametrize("granularity", ["all", "parameter"])
def test_a_loss_that_reaches_nothing_shared_takes_no_part(net, x, granularity):
    # Its row would be zero, and a zero row makes MGDA stop.
    gradsurgery.MGDA(sgd(net), granularity=granularity).backward(net(x))
    expected = grads(net)
    net.zero_grad()
    decay = net.heads[2].weight.square().sum()
    report = gradsurgery.MGDA(sgd(net), granularity=granularity).backward({**net(x), "decay": decay})
    assert "stationary" not in report.flags
    assert net.heads[2].weight.grad is not None
    for p, g in zip(net.shared, expected, strict=False):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)


def test_a_single_loss_is_all_private(net, x):
    report = gradsurgery.PCGrad(sgd(net)).backward({"t0": net(x)["t0"]})
    torch.testing.assert_close(net.trunk[0].weight.grad, torch.autograd.grad(net(x)["t0"], net.trunk[0].weight)[0])
    assert report.weights == {"t0": 1.0}


# ------------------------------------------------------------------ other networks, other optimizers


def test_the_other_network_of_a_gan_is_not_touched():
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(generator.parameters(), lr=0.1))
    fake = generator(torch.randn(4, 2))
    losses = lambda: [critic(generator(torch.randn(4, 2))).mean(), fake.square().mean()]  # noqa: E731
    with pytest.warns(UserWarning, match=r"2 parameter\(s\) outside the optimizer.*`other_optimizers`"):
        optimizer.backward(losses(), retain_graph=True)
    assert critic.weight.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(losses(), retain_graph=True)  # warns once


def test_inputs_that_require_grad_are_no_strangers(net):
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)  # a physics-informed loss differentiates by them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradsurgery.PCGrad(sgd(net)).backward(net(x))
    assert x.grad is None


@pytest.mark.parametrize("name", ["other_optimizers", "others"])
@pytest.mark.parametrize("wrap", [gradsurgery.MGDA, Halves])
def test_other_optimizers_get_the_plain_gradient(net, x, wrap, name):
    trunk = torch.optim.SGD(net.trunk.parameters(), lr=0.1)
    heads = torch.optim.SGD(net.heads.parameters(), lr=0.1)
    expected = [torch.autograd.grad(net(x)[f"t{i}"], net.heads[i].weight)[0] for i in range(2)]
    optimizer = wrap(trunk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(net(x), **{name: [heads]})
    for i in range(2):
        assert torch.equal(net.heads[i].weight.grad, expected[i])
    assert net.heads[2].weight.grad is None


@pytest.mark.parametrize("wrap", [gradsurgery.MGDA, Halves])
def test_a_parameter_that_another_optimizer_has_too_gets_its_gradient_once(net, x, wrap):
    """The other one has all parameters: what it has alone gets plain gradients, the rest what the method says."""
    expected = wrap(sgd(net.trunk))
    expected.backward(net(x), other_optimizers=sgd(net.heads))
    wanted = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    wrap(sgd(net.trunk)).backward(net(x), other_optimizers=[sgd(net), sgd(net.heads)])
    for p, g in zip(net.parameters(), wanted, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def test_both_names_of_the_other_optimizers_at_once(net, x):
    """The old name does what the new one does; the two together may contradict each other."""
    heads = sgd(net.heads)
    optimizer = gradsurgery.PCGrad(sgd(net.trunk))
    with pytest.raises(TypeError, match=r"PCGrad.backward: `others` is the old name of `other_optimizers`"):
        optimizer.backward(net(x), other_optimizers=[heads], others=heads)
    assert all(p.grad is None for p in net.parameters())


# ------------------------------------------------------------------------------ the graph, atomicity


class FailsOnSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        raise ZeroDivisionError("somebody's backward")


@pytest.mark.parametrize(
    "wrap",
    [
        gradsurgery.PCGrad,
        Halves,
        Counting,
        lambda base: gradsurgery.PCGrad(base, warmup=5),
        lambda base: gradsurgery.PCGrad(Halves(base)),
        lambda base: gradsurgery.GradNormWeighter(base, [base.param_groups[0]["params"][0]]),
    ],
)
def test_an_exception_halfway_changes_nothing(net, x, wrap):
    optimizer = wrap(sgd(net))
    optimizer.backward(net(x))
    before, memory, pending = (
        grads(net),
        optimizer.state_dict()["gradsurgery"],
        copy.deepcopy(optimizer.transaction.proposed),
    )
    bad = net(x)
    bad["t1"] = FailsOnSecond.apply(bad["t1"])
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(bad)
    assert same(grads(net), before)
    assert optimizer.state_dict()["gradsurgery"] == memory
    assert optimizer.transaction.proposed == pending
    assert not optimizer.transaction.writable
    assert not optimizer.transaction.rejected


def test_an_exception_in_the_method_changes_nothing(net, x):
    class Broken(gradsurgery.Surgery):
        def weights(self, gram, losses):
            self.memory["learnt"] = 1
            raise ValueError("no solution")

    optimizer = Broken(sgd(net))
    with pytest.raises(ValueError, match="no solution"):
        optimizer.backward(net(x))
    assert same(grads(net), [None] * len(grads(net)))
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


def test_the_graph_is_freed_with_the_last_loss(net, x):
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z * 1.0)
            return z * 2

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            alive.append(weakref.ref(z))
            return g * 2

    alive: list = []
    losses = {name: Keeps.apply(loss) for name, loss in net(x).items()}
    gradsurgery.PCGrad(sgd(net)).backward(losses)
    with pytest.raises(RuntimeError, match=r"already freed|second time"):
        torch.autograd.grad(losses["t1"], net.shared)
    gc.collect()
    assert alive[-1]() is None


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.MGDA, gradsurgery.RunningMaxWeighter])
def test_reentrant_checkpointing_is_found_and_gives_the_same(net, x, method):
    from torch.utils.checkpoint import checkpoint

    stranger = nn.Parameter(torch.ones((), dtype=x.dtype))
    results = []
    for reentrant in (True, False):
        z = checkpoint(net.trunk, x.detach().requires_grad_(), use_reentrant=reentrant)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer = method(sgd(net))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the stranger
            report = optimizer.backward({"a": stranger * z.square().mean(), "b": z.mean()})
        results.append([p.grad for p in net.parameters()])
        assert stranger.grad is None
        assert set(report.weights) == {"a", "b"}
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert any((g != 1).any() for g in results[0])


# ------------------------------------------------------------------- propose, commit, discard, draws


def memory_of(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]


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


# ------------------------------------------------------------------------------------------- cadence


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


# ---------------------------------------------------------------------------------------- non-finite


def with_bad_value(net, x):
    losses = net(x)
    return {**losses, "t1": losses["t1"] * float("nan")}


def with_bad_row(net, x):
    losses = net(x)
    return {**losses, "t1": losses["t1"] + (net.trunk[0].weight.sum() * 0).sqrt()}


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


# ----------------------------------------------------------------------------------- mixed precision


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


# --------------------------------------------------------------------------------------- composition


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


# ----------------------------------------------------------------------------------------- arguments

ARGUMENTS = [
    (gradsurgery.PCGrad, {"reduction": "max"}, r"PCGrad: `reduction` must be one of .*got 'max'"),
    (gradsurgery.PCGrad, {"nonfinite": "ignore"}, r"`nonfinite` must be one of"),
    (gradsurgery.PCGrad, {"every": 0}, r"PCGrad: `every` must be an integer >= 1, got 0"),
    (gradsurgery.PCGrad, {"every": 1.5}, r"`every` must be an integer"),
    (gradsurgery.PCGrad, {"warmup": -1}, r"`warmup` must be an integer >= 0, got -1"),
    (gradsurgery.PCGrad, {"seed": True}, r"`seed` must be an integer"),
    (gradsurgery.PCGrad, {"seed": 2**64}, r"`seed` must be an integer >= 0 and < 18446744073709551616, got 1844"),
    (gradsurgery.MGDA, {"normalize": "l1"}, r"MGDA: `normalize` must be one of"),
    (gradsurgery.MGDA, {"solver": "sgd"}, r"`solver` must be one of"),
    (gradsurgery.MGDA, {"max_iterations": 0}, r"`max_iterations` must be an integer >= 1"),
    (gradsurgery.MGDA, {"tolerance": 0.0}, r"`tolerance` must be > 0, got 0.0"),
]


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.GradDrop, gradsurgery.RandomWeighter])
def test_the_largest_seed_works(net, x, method):
    optimizer = method(sgd(net), seed=2**64 - 1)
    optimizer.backward(net(x))
    optimizer.step()


@pytest.mark.parametrize(("method", "arguments", "message"), ARGUMENTS)
def test_bad_arguments_are_named(net, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(sgd(net), **arguments)


# --------------------------------------------------------------------------------------- checkpoints


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


# ---------------------------------------------------------------------------------------- the report


def test_report_tells_what_happened(net, x):
    optimizer = gradsurgery.PCGrad(sgd(net))
    losses = net(x)
    report = optimizer.backward(losses)
    assert optimizer.report is report
    assert report.losses == {name: loss.item() for name, loss in losses.items()}
    assert report.total == sum(report.losses.values())
    assert report.objective == pytest.approx(sum(report.weights[n] * report.losses[n] for n in losses))
    assert list(report.norms.values()) == pytest.approx(report.gram.diagonal().sqrt().tolist())
    assert report.cosines.diagonal().tolist() == [1.0, 1.0]
    assert report.cosines[0, 1] < 0
    assert report.conflict_rate == 1.0
    assert "losses" in repr(report)
    assert set(report.as_dict()) >= {"losses", "total", "weights", "cosines", "flags"}
    report.gram.zero_()
    assert report.gram.any(), "a report hands out copies"
    assert all(loss.requires_grad for loss in losses.values())
    weighted = Halves(sgd(net)).backward(net(x))
    assert weighted.gram is weighted.norms is weighted.cosines is weighted.conflict_rate is None


class CountsReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wrap", [gradsurgery.PCGrad, gradsurgery.MGDA, Halves, lambda b: gradsurgery.PCGrad(Halves(b))]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_one_transfer_to_the_host_a_step(net, x, monkeypatch, wrap, scaled):
    transfers = []
    host = alone.host
    monkeypatch.setattr(alone, "host", lambda numbers: transfers.append(1) or host(numbers))
    optimizer = wrap(sgd(net))
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    losses = net(x)
    with CountsReads() as mode:
        optimizer.backward(losses, scaler=scaler)
    assert mode.reads == 0
    assert len(transfers) == 1


# ------------------------------------------------------------------------------------------- combine


@pytest.mark.parametrize("wrap", [gradsurgery.PCGrad, gradsurgery.MGDA, Counting])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_combine_gives_what_backward_writes(wrap, reduction):
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    rows = torch.randn(4, 7, dtype=torch.float64)
    optimizer = wrap(torch.optim.SGD([p], lr=0.1), reduction=reduction)
    for _ in range(3):
        direction = optimizer.combine(rows)
        assert torch.equal(optimizer.combine(rows), direction), "pure: the same draw, the same state"
        optimizer.zero_grad()
        optimizer.backward([row @ p for row in rows])
        assert torch.equal(optimizer.combine(rows), direction), "not moved by what is pending"
        torch.testing.assert_close(p.grad, direction, rtol=1e-14, atol=0)
        optimizer.step()


def test_combine_with_update_commits(net):
    optimizer = Counting(sgd(net))
    rows = torch.randn(2, 5)
    for step in range(3):
        optimizer.combine(rows)
        optimizer.combine(rows, update=True)
        assert memory_of(optimizer)["step"] == step + 1
        assert memory_of(optimizer)["count"] == {"0": step + 1.0, "1": step + 1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_keeps_the_dtype(net, dtype):
    assert gradsurgery.MGDA(sgd(net)).combine(torch.randn(2, 5).to(dtype)).dtype == dtype


def test_combine_goes_on_where_named_losses_left_off(net):
    """Rows stand for the losses in the order in which the method met them."""
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    rows = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [0, -1, 1]])
    found = []
    for names in ("abc", "012"):
        optimizer = gradsurgery.GradVac(base)
        (p,) = base.param_groups[0]["params"]
        optimizer.backward({name: (p * row).sum() for name, row in zip(names, rows, strict=True)})
        optimizer.step()
        found.append(optimizer.combine(rows))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"GradVac\.combine.*keeps something for each of \['0', '1', '2'\]"):
        optimizer.combine(rows[:2])
    keeps_rows = gradsurgery.MoCo(base)
    keeps_rows.backward([(p * row).sum() for row in rows])
    keeps_rows.step()
    assert torch.isfinite(keeps_rows.combine(rows)).all()
    with pytest.raises(RuntimeError, match=r"MoCo\.combine: .*rows of the parameters"):
        keeps_rows.combine(torch.eye(3, 4))


def test_combine_checks_its_input(net):
    optimizer = gradsurgery.MGDA(sgd(net), normalize="loss")
    good = torch.eye(2)
    for arguments, error, message in (
        (([[1.0]],), TypeError, r"MGDA\.combine: `rows` must be a real floating point tensor of shape \(m, n\)"),
        ((torch.ones(3),), TypeError, "`rows`"),
        ((torch.ones(0, 3), []), ValueError, "at least one row"),
        ((good,), ValueError, "`losses` must be given"),
        ((good, [1.0]), ValueError, r"`losses` must have shape \(2,\)"),
        ((good, [1.0, -1.0]), ValueError, r"every loss must be > 0.*\{'1': -1.0\}"),
        ((good * float("nan"), [1.0, 1.0]), ValueError, "finite"),
    ):
        with pytest.raises(error, match=message):
            optimizer.combine(*arguments)


# ------------------------------------------------------------------------------- found by trying to break it


def test_a_detached_entry_of_a_stack_is_named():
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(RuntimeError, match=r"loss '1' has no graph"):
        optimizer.backward(torch.stack([w.square().sum(), w.square().sum().detach()]))
    assert w.grad is None


@pytest.mark.parametrize("wrap", [gradsurgery.PCGrad, Halves])
def test_a_dense_gradient_on_top_of_a_sparse_one(wrap):
    table, w = nn.Embedding(10, 3, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = wrap(torch.optim.SGD([w, table.weight], lr=0.1))
    ids = torch.tensor([1, 2])

    def sparse():
        return [table(ids).square().sum() + w.sum(), w.square().sum()]

    def dense():
        return [table.weight.square().sum() + w.sum(), w.square().sum()]

    optimizer.backward(sparse())
    assert table.weight.grad.is_sparse
    first = table.weight.grad.to_dense()
    optimizer.zero_grad()
    optimizer.backward(dense())
    second = table.weight.grad.clone()
    optimizer.zero_grad()
    optimizer.backward(sparse())
    optimizer.backward(dense())
    torch.testing.assert_close(table.weight.grad, first + second)


def test_an_empty_bag_is_no_error():
    table, w = nn.Embedding(10, 3, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([w, table.weight], lr=0.1))
    empty = table(torch.empty(0, dtype=torch.long)).sum()
    optimizer.backward([empty + w.sum(), w.square().sum()])
    assert w.grad is not None


def test_unfreezing_does_not_exchange_private_and_shared():
    frozen, shared, head = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([frozen, head, shared], lr=0.0), every=3)

    def losses():
        return [(shared * 3).sum() + (frozen * head).sum(), shared.square().sum()]

    weights = list(optimizer.backward(losses()).weights.values())
    optimizer.step()
    optimizer.zero_grad()
    frozen.requires_grad_(True)
    assert optimizer.backward(losses()).flags == ("reused",)
    torch.testing.assert_close(shared.grad, torch.full((2,), 3 * weights[0] + 2 * weights[1]))
    torch.testing.assert_close(head.grad, torch.ones(2))


def test_shared_params_is_checked(net, x):
    with pytest.raises(TypeError, match=r"PCGrad: `shared_params` must be a parameter or an iterable of parameters"):
        gradsurgery.PCGrad(sgd(net), shared_params=net.named_parameters())
    one = gradsurgery.PCGrad(sgd(net), shared_params=net.trunk[0].weight)
    assert one.backward(net(x)).norms["t0"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_added_up_in_single_precision(dtype):
    rows = [torch.tensor([40000.0], dtype=dtype), torch.tensor([-40000.0], dtype=dtype)]
    assert rows_module.combine(rows, [2.0, 2.0], rows[0]).item() == 0.0


def test_autocast_around_backward_does_not_reach_the_gram():
    net, x = Net(torch.float32), torch.randn(8, 5)
    optimizer = gradsurgery.MGDA(sgd(net))
    expected = optimizer.backward(net(x)).gram
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = {name: loss.float() for name, loss in net(x).items()}
    with torch.autocast("cpu", enabled=False):
        exact = optimizer.backward(losses, retain_graph=True).gram
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = optimizer.backward(losses).gram
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert expected.shape == found.shape


def test_a_disabled_scaler_leaves_the_policy_alone(net, x):
    optimizer = Halves(sgd(net), nonfinite="skip")
    report = optimizer.backward(with_bad_row(net, x), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert "skipped" in report.flags
    assert net.trunk[0].weight.grad is None


def test_dropping_every_loss_still_lets_a_scaler_skip(net, x):
    net.float()
    optimizer = gradsurgery.PCGrad(sgd(net), nonfinite="drop")
    scaler = torch.amp.GradScaler("cpu")
    losses = {name: loss * float("nan") for name, loss in net(x.float()).items()}
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.FixedWeighter])
def test_a_graph_too_deep_to_walk_is_differentiated_all_the_same(method):
    w, head = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    h = w
    for _ in range(60_000):
        h = h + 1e-9
    optimizer = method(torch.optim.SGD([w, head], lr=0.1))
    report = optimizer.backward([h.sum(), (-3 * h * head).sum()])
    if report.gram is not None:
        assert report.gram.shape == (2, 2)
        assert head.grad.item() == pytest.approx(-3, rel=1e-3), "private: its own gradient"
        # 1 and -3 oppose each other: all of it is projected away
        assert w.grad.item() == pytest.approx(0, abs=1e-3)
    else:
        assert w.grad is not None
        assert head.grad is not None


def test_a_bad_gradient_during_warmup_teaches_the_weighter_nothing(net, x):
    optimizer = gradsurgery.PCGrad(gradsurgery.GradNormWeighter(sgd(net), net.trunk[0].weight), warmup=1)
    with pytest.raises(RuntimeError, match="gradient of 't1'"):
        optimizer.backward(with_bad_row(net, x))
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["inner"]["memory"] == {"step": 0}
