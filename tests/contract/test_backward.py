"""What ``backward`` writes into ``.grad``, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.gradients import rows as rows_module
from tests.support.two_heads import Counting, Halves, Net, grads, same, sgd, with_bad_row


class PlainSum(gradsurgery.Surgery):
    def weights(self, gram, losses):
        return np.ones(len(gram))


# ---------------------------------------------------------------------------------------------------------------- .grad


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


# ------------------------------------------------------------------------------------- other networks, other optimizers


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


# ------------------------------------------------------------------------------------------------- the graph, atomicity


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


# ------------------------------------------------------------------------------------------------------------ arguments


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


# ------------------------------------------------------------------------------------------ found by trying to break it


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
