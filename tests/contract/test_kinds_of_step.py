"""Which gradient a parameter gets, in every kind of step: new weights or old ones, one pass or many, in parts or whole.

What is shared is decided in each call from its own graph. What a call before has seen proves nothing: a head is
unfrozen or added, an expert is not called, a loss leaves the model, a region is checkpointed, outputs change places.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery.gradients import rows as rows_module
from gradsurgery.graph import reach
from tests.support.literal import ByName, Joined, Keeps, PlainSum, Same, Signs

X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4).sin()


class Net(nn.Module):
    def __init__(self, heads=3):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(heads))
        self.own = nn.Linear(4, 1)
        self.double()

    def losses(self, z=None):
        z = torch.tanh(self.trunk(X)) if z is None else z
        return {
            n: (10.0**i * (h(z) - 1 - i)).square().mean()
            for i, (n, h) in enumerate(zip("abc", self.heads, strict=False))
        }


def own_gradient(loss, p):
    return torch.autograd.grad(loss, p, retain_graph=True)[0]


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.0)


def committed(optimizer, losses, **options):
    optimizer.backward(losses, **options)
    optimizer.step()
    optimizer.zero_grad()


class Skewed(gradsurgery.Surgery):
    """Weights 2, 3, 4, …: whatever gets one of them shows it."""

    def weights(self, gram, losses):
        return np.arange(2.0, 2.0 + len(losses))


# ------------------------------------------------------------------------------------------- one backward pass


@pytest.mark.parametrize("build", [ByName, gradsurgery.RandomWeighter, gradsurgery.RunningMaxWeighter])
def test_a_weighter_trains_what_is_checkpointed_later(build):
    net = Net()
    optimizer = build(sgd(net))
    committed(optimizer, net.losses())
    z = torch.tanh(checkpoint(net.trunk, X.clone().requires_grad_(), use_reentrant=True))
    weights = optimizer.backward(net.losses(z)).weights
    plain = sum(weights[n] * loss for n, loss in net.losses().items())
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(plain, net.trunk.weight))


def test_a_weight_used_in_a_head_and_in_a_checkpointed_region_keeps_both_parts():
    """Its gradient is there with and without the region: no pattern of None tells."""
    w = nn.Parameter(torch.eye(4, dtype=torch.float64) / 2)
    optimizer = ByName(torch.optim.SGD([w], lr=0.0))

    def losses(hides):
        def trunk(x):
            return torch.tanh(x @ w)

        z = checkpoint(trunk, X.clone().requires_grad_(), use_reentrant=True) if hides else trunk(X)
        return {"a": (z @ w).square().mean(), "b": (z @ w - 1).square().mean()}

    for hides in (False, True):
        optimizer.zero_grad()
        optimizer.backward(losses(hides))
        plain = losses(False)
        torch.testing.assert_close(w.grad, own_gradient(0.5 * plain["a"] + 3 * plain["b"], w))
        optimizer.step()


@pytest.mark.parametrize("build", [ByName, PlainSum])
def test_one_pass_begins_in_the_dtype_of_each_loss(build):
    net = Net()
    losses = net.losses()
    losses["b"] = losses["b"].float()
    report = build(sgd(net)).backward(losses)
    plain = sum((1.0 if report.weights is None else report.weights[n]) * loss for n, loss in net.losses().items())
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(plain, net.trunk.weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [ByName, PlainSum])
def test_a_loss_that_leaves_the_model_is_named(build):
    net = Net()
    optimizer = build(sgd(net))
    committed(optimizer, net.losses())
    elsewhere = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="loss 'b' reaches no parameter"):
        optimizer.backward({**net.losses(), "b": elsewhere.square().sum()})
    assert all(p.grad is None for p in net.parameters())


# ---------------------------------------------------------------------------------------- steps that reuse weights

EVERY = {
    "mine": Skewed,
    "PCGrad": gradsurgery.PCGrad,
    "ExcessMTL": gradsurgery.ExcessMTL,
    "MoDo": gradsurgery.MoDo,
    "under a weighter": lambda base, **switches: Skewed(ByName(base), **switches),
    "ghosts": lambda base, **switches: Skewed(base, engine="ghosts", **switches),
    "blocks": lambda base, **switches: Skewed(base, engine="blocks", **switches),
}
over_methods = pytest.mark.parametrize("build", EVERY.values(), ids=EVERY.keys())


def factor_of(build, name):
    return {"a": 0.5, "b": 3.0, "c": 1.7}[name] if build is EVERY["under a weighter"] else 1.0


def test_losses_with_graphs_of_their_own_reuse_their_weights():
    net = Net(heads=2)
    optimizer = Skewed(sgd(net), every=2)

    def losses():
        return {name: net.losses()[name] for name in "ab"}  # a forward pass for each

    committed(optimizer, losses())
    assert optimizer.backward(losses()).flags == ("reused",)
    found = losses()
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(2 * found["a"] + 3 * found["b"], net.trunk.weight))


@over_methods
@pytest.mark.parametrize("kind", ["unfrozen", "added", "not called", "in parts"])
def test_a_head_that_the_last_weights_do_not_know_gets_its_own_gradient(build, kind):
    net = Net()
    head, known = net.heads[2].weight, [p for p in net.parameters() if p is not net.heads[2].weight]
    head.requires_grad_(kind not in ("unfrozen", "added"))
    params = known if kind == "added" else net.parameters()
    optimizer = build(torch.optim.SGD(params, lr=0.0), every=3)
    first = net.losses()
    if kind == "not called":
        first["c"] = (net.trunk(X) ** 2).mean()
    committed(optimizer, first)
    head.requires_grad_(True)
    if kind == "added":
        optimizer.add_param_group({"params": [head]})
    share = 1.0
    if kind == "in parts":
        optimizer.backward({n: loss / 2 for n, loss in net.losses().items()}, accumulate=True)
        share = 0.5
    report = optimizer.backward({n: share * loss for n, loss in net.losses().items()})
    assert "reused" in report.flags
    torch.testing.assert_close(head.grad, factor_of(build, "c") * own_gradient(net.losses()["c"], head))
    losses = net.losses()
    weighted = sum(report.weights[n] * losses[n] for n in losses) if report.weights else None
    if weighted is not None:
        torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))


@over_methods
def test_what_another_loss_has_come_to_use_is_shared(build):
    net = Net()
    optimizer = build(sgd(net), every=3)
    committed(optimizer, net.losses())
    z = torch.tanh(net.trunk(X))
    losses = net.losses(z)
    losses["a"] = losses["a"] + net.heads[2](z).square().mean()
    report = optimizer.backward(losses)
    assert "reused" in report.flags
    weighted = sum(report.weights[n] * loss for n, loss in losses.items() if n != "b")
    z = torch.tanh(net.trunk(X))
    losses = net.losses(z)
    losses["a"] = losses["a"] + net.heads[2](z).square().mean()
    weighted = sum(report.weights[n] * loss for n, loss in losses.items())
    torch.testing.assert_close(net.heads[2].weight.grad, own_gradient(weighted, net.heads[2].weight))


@over_methods
def test_reentrant_checkpointing_in_a_step_that_reuses(build):
    net = Net()
    optimizer = build(sgd(net), every=3)
    committed(optimizer, net.losses())
    z = torch.tanh(checkpoint(net.trunk, X.clone().requires_grad_(), use_reentrant=True))
    report = optimizer.backward(net.losses(z))
    assert "reused" in report.flags
    losses = net.losses()
    weighted = sum(report.weights[n] * losses[n] for n in losses)
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))
    for n, head in zip("abc", net.heads, strict=True):
        torch.testing.assert_close(head.weight.grad, factor_of(build, n) * own_gradient(losses[n], head.weight))


def test_shared_params_decide_in_steps_that_reuse():
    net = Net()
    optimizer = Skewed(sgd(net), every=2, shared_params=[*net.trunk.parameters(), net.heads[0].weight])
    committed(optimizer, net.losses())
    optimizer.backward(net.losses())
    losses = net.losses()
    torch.testing.assert_close(net.heads[0].weight.grad, 2 * own_gradient(losses["a"], net.heads[0].weight))
    torch.testing.assert_close(net.heads[1].weight.grad, own_gradient(losses["b"], net.heads[1].weight))
    weighted = 2 * losses["a"] + 3 * losses["b"] + 4 * losses["c"]
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))


def test_a_named_parameter_that_one_loss_reaches_gets_its_own_gradient_where_the_graph_is_hidden():
    net = Net()
    scale = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
    optimizer = Skewed(torch.optim.SGD([*net.parameters(), scale], lr=0.0), every=3, shared_params=scale)

    def losses(scaled, hides=True):
        z = torch.tanh(checkpoint(net.trunk, X.clone().requires_grad_(), use_reentrant=True) if hides else net.trunk(X))
        plain, by = net.losses(z), net.losses(z * scale)
        return {n: by[n] if n in scaled else plain[n] for n in plain}

    for scaled, factors in (("abc", {"a": 2, "b": 3, "c": 4}), ("b", {"b": 1}), ("bc", {"b": 3, "c": 4})):
        report = optimizer.backward(losses(scaled))
        found = losses(scaled, hides=False)
        expected = own_gradient(sum(factors[n] * found[n] for n in scaled), scale)
        torch.testing.assert_close(scale.grad, expected)
        assert list(report.weights.values()) == ([1, 1, 1] if scaled == "b" else [2, 3, 4])
        torch.testing.assert_close(net.trunk.weight.grad, own_gradient(sum(found.values()), net.trunk.weight))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("every", [1, 2])
def test_features_with_old_weights(every):
    net = Net()
    optimizer = gradsurgery.FairGrad(sgd(net), every=every)
    for _ in range(2):
        optimizer.zero_grad()
        z = torch.tanh(net.trunk(X))
        optimizer.backward(net.losses(z), features=z)
        losses = net.losses()
        for n, head in zip("abc", net.heads, strict=True):
            torch.testing.assert_close(head.weight.grad, own_gradient(losses[n], head.weight))
        optimizer.step()


def test_features_where_the_graph_is_too_deep_to_be_walked(monkeypatch):
    """Short passes tell which parameters are shared."""
    monkeypatch.setattr(reach, "_DEEPEST", 2)
    net = Net()
    z = torch.tanh(net.trunk(X))
    Skewed(sgd(net)).backward(net.losses(z), features=z)
    losses = net.losses()
    for n, head in zip("abc", net.heads, strict=True):
        torch.testing.assert_close(head.weight.grad, own_gradient(losses[n], head.weight))
    weighted = 2 * losses["a"] + 3 * losses["b"] + 4 * losses["c"]
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))
    assert net.own.weight.grad is None


# ------------------------------------------------------------------------------ where the graph does not tell


class OneOfTwo(torch.autograd.Function):
    """Passes on what comes to its first output, and to its first input alone."""

    @staticmethod
    def forward(ctx, p, q):
        ctx.set_materialize_grads(False)
        return p * 1, q * 1

    @staticmethod
    def backward(ctx, g, h):
        return g, None


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 3, 1), (3, 1, 2, 0)], ids=str)
@pytest.mark.parametrize(
    ("build", "options", "dtype"),
    [
        (gradsurgery.MoCo, {}, torch.float32),
        (gradsurgery.PCGrad, {}, torch.float32),
        (gradsurgery.PCGrad, {}, torch.complex64),
        (gradsurgery.PCGrad, {"row_device": "cpu"}, torch.complex64),
    ],
    ids=["MoCo", "PCGrad", "complex", "complex, put away"],
)
def test_parameters_that_one_loss_or_none_reaches_after_all_leave_the_rest_as_it_is(build, options, dtype, order):
    def run(passed):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, dtype=dtype)) for _ in range(4)]
        p, q, s, t = params
        a, b = passed(p, q)
        losses = {"a": (s * t * a).abs().sum(), "b": (s.square() * t * (b - 2)).abs().sum()}
        build(torch.optim.SGD([params[k] for k in order], lr=0.1), **options).backward(losses)
        return [x.grad for x in params]

    found, wanted = run(OneOfTwo.apply), run(lambda p, q: (p * 1, q.detach()))
    assert found[1] is None
    for k in (0, 2, 3):
        torch.testing.assert_close(found[k], wanted[k])


WAYS = {
    "rows": (Skewed, {}, False),
    "streaming": (gradsurgery.PCGrad, {"streaming": True, "preference": {"a": 2.0, "b": 3.0, "c": 4.0}}, False),
    "features": (Skewed, {}, True),
    "old weights": (Skewed, {"every": 9}, False),
    "old weights, features": (Skewed, {"every": 9}, True),
    "ghosts": (Skewed, {"engine": "ghosts"}, False),
    "blocks": (Skewed, {"engine": "blocks"}, False),
    "warmup": (Skewed, {"warmup": 9}, False),
}
over_ways = pytest.mark.parametrize(("build", "switches", "features"), WAYS.values(), ids=WAYS.keys())


@over_ways
def test_outputs_of_one_node_that_change_places(build, switches, features):
    """The node hands each output its own gradient: the heads are private, now to this loss, now to that one."""
    net = Net()
    optimizer = build(sgd(net), **switches)
    for turn in range(3):

        def losses(turn=turn, joined=True):
            z = torch.tanh(net.trunk(X))
            found = list(net.losses(z).values())
            found = list(Joined.apply(*found)) if joined else found
            return z, dict(zip("abc", found[turn:] + found[:turn], strict=True))

        optimizer.zero_grad()
        z, found = losses()
        optimizer.backward(found, **({"features": z} if features else {}))
        plain = losses(joined=False)[1]
        for k, head in enumerate(net.heads):
            name = "abc"[(k - turn) % 3]
            torch.testing.assert_close(head.weight.grad, own_gradient(plain[name], head.weight))
        optimizer.step()


@over_ways
def test_an_input_that_a_function_gives_nothing(build, switches, features):
    """A codebook: the graph leads there from two losses, and only the third one trains it."""
    net, book = Net(), nn.Parameter(torch.eye(3, dtype=torch.float64))
    optimizer = build(torch.optim.SGD([*net.parameters(), book], lr=0.0), **switches)
    for _ in range(2):
        optimizer.zero_grad()
        z = torch.tanh(net.trunk(X))
        losses = net.losses(Keeps.apply(z, book))
        losses["c"] = (z.mean(dim=0) @ book - 1).square().mean()
        optimizer.backward(losses, **({"features": z} if features else {}))
        z = torch.tanh(net.trunk(X))
        torch.testing.assert_close(book.grad, own_gradient((z.mean(dim=0) @ book - 1).square().mean(), book))
        optimizer.step()


@over_ways
def test_an_input_that_a_function_gives_two_losses_of_three(build, switches, features):
    """It is shared by these two, as if the third one had not gone through the function."""
    ends = []
    for through in ("bc", "abc"):
        net, book = Net(), nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
        optimizer = build(torch.optim.SGD([*net.parameters(), book], lr=0.0), **switches)
        for _ in range(2):
            optimizer.zero_grad()
            z = torch.tanh(net.trunk(X))
            losses = net.losses(z)
            for name in through:
                losses[name] = net.losses(KeepsSome.apply(z - book.detach() * (name == "a"), book, name != "a"))[name]
            optimizer.backward(losses, **({"features": z} if features else {}))
            ends.append(book.grad)
            optimizer.step()
    torch.testing.assert_close(ends[2:], ends[:2])


@over_ways
def test_a_loss_that_a_function_gives_nothing_is_no_fault(build, switches, features):
    """The graph leads to a parameter, and no gradient comes in this step: one may in the next."""
    ends = []
    for names in ("ab", "abc"):
        net, book = Net(2), nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
        optimizer = build(torch.optim.SGD([*net.parameters(), book], lr=0.0), **switches)
        for _ in range(2):
            optimizer.zero_grad()
            z = torch.tanh(net.trunk(X))
            nothing = KeepsSome.apply(z.detach() + (0 * z if features else 0), book, False).square().mean()
            losses = {**net.losses(z), "c": nothing if "c" in names else None}
            optimizer.backward(losses, **({"features": z} if features else {}))
            ends.append(net.trunk.weight.grad)
            assert book.grad is None
            optimizer.step()
    torch.testing.assert_close(ends[2:], ends[:2])


def passes_of(monkeypatch):
    seen = []
    gradient = rows_module.gradient
    monkeypatch.setattr(
        rows_module, "gradient", lambda *a, **k: (seen.append(k.get("retain_graph", a[-1])), gradient(*a, **k))[1]
    )
    return seen


def test_a_function_that_all_losses_pass_in_the_same_way_costs_no_more(monkeypatch):
    net = Net()
    optimizer = Skewed(sgd(net), every=2)
    for _ in range(2):
        optimizer.zero_grad()
        seen = passes_of(monkeypatch)
        optimizer.backward(net.losses(Same.apply(torch.tanh(net.trunk(X)))))
        optimizer.step()
    assert not seen, "it passes on the gradients of all losses or of none"


def test_what_two_losses_have_reached_is_open_no_more_where_rows_are_kept():
    """The method goes on with its averages there, whatever one function passes on: old weights cost one pass."""
    net = Net(2)
    optimizer = gradsurgery.ExcessMTL(sgd(net), every=2)
    for engine in ("rows", "one pass"):
        optimizer.zero_grad()
        z = torch.tanh(net.trunk(X))
        assert optimizer.backward({**net.losses(z), "b": net.losses(Same.apply(z))["b"]}).engine == engine
        optimizer.step()


@pytest.mark.parametrize("foreign", [False, True])
def test_losses_with_graphs_of_their_own_pass_together_only_where_all_is_shared(foreign):
    """Otherwise there would be two passes over all of these graphs."""
    net = Net(1)
    optimizer = Skewed(torch.optim.SGD([*net.trunk.parameters(), *net.heads.parameters()], lr=0.0), every=2)
    others = {"other_optimizers": torch.optim.SGD(net.own.parameters(), lr=0.0)} if foreign else {}
    for _ in range(2):
        optimizer.zero_grad()
        losses = {"a": net.losses()["a"], "b": (net.losses()["a"] - 1).square()}
        if foreign:
            losses["a"] = losses["a"] + net.own(X).square().mean()
        report = optimizer.backward(losses, **others)
        optimizer.step()
    assert report.engine == ("rows" if foreign else "one pass")


def test_a_function_in_one_head_leaves_the_trunk_open(monkeypatch):
    net = Net(2)
    optimizer = Skewed(sgd(net), every=2)
    for _ in range(2):
        optimizer.zero_grad()
        seen = passes_of(monkeypatch)
        z = torch.tanh(net.trunk(X))
        losses = net.losses(z)
        report = optimizer.backward({**losses, "b": net.losses(Same.apply(z))["b"]})
        optimizer.step()
    assert len(seen) == 2, "a gradient of each loss tells"
    losses = net.losses()
    weighted = sum(report.weights[n] * losses[n] for n in losses)
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))


def test_a_private_gradient_that_shows_late_is_looked_at():
    """The walk takes the head for shared. What turns out to be private is not in the inner products."""
    net = Net(2)
    found = net.losses()
    spoilt = (net.heads[1].weight.sum() * 0).sqrt()  # infinite slope, finite value
    joined = dict(zip("ab", Joined.apply(found["a"], found["b"] + 0 * spoilt), strict=True))
    with pytest.raises(RuntimeError, match="the gradient of 'b' is not finite"):
        Skewed(sgd(net)).backward(joined)
    assert all(p.grad is None for p in net.parameters())


def test_where_old_weights_follow_every_pass_keeps_the_graph(monkeypatch):
    """A compiled backward that ran once without retain_graph refuses to run with it later."""
    net = Net(2)
    seen = passes_of(monkeypatch)
    Skewed(sgd(net), every=2).backward(net.losses())
    assert seen == [True, True]
    seen.clear()
    Skewed(sgd(net)).backward(net.losses())
    assert seen == [True, False]


# --------------------------------------------------------------------------- methods that keep rows between steps


def test_what_one_loss_reaches_at_a_time_is_private_and_what_two_have_reached_is_remembered():
    """One loss comes in the place of another at `turned`; `both` stays shared, and `trunk` is so for two of three."""
    trunk, both, turned = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    optimizer = gradsurgery.MoCo(torch.optim.SGD([trunk, both, turned], lr=0.0))
    for user in "abc":
        optimizer.zero_grad()
        losses = {"a": (trunk * both).sum(), "b": (trunk - 2 * both).square().sum(), "c": both.square().sum()}
        losses[user] = losses[user] + (turned - 5).square().sum()
        optimizer.backward(losses)
        torch.testing.assert_close(turned.grad, torch.full_like(turned, -8.0))
        optimizer.step()
    memory = optimizer.state_dict()["gradsurgery"]["memory"]
    assert memory["reached"] == {"a": [0, 1], "b": [0, 1], "c": [1]}
    optimizer = Skewed(torch.optim.SGD([trunk, both, turned], lr=0.0))
    optimizer.backward({"a": (trunk * both).sum(), "b": (trunk - 2 * both).square().sum()})
    optimizer.step()
    assert "reached" not in optimizer.state_dict()["gradsurgery"]["memory"]


def test_averages_stay_where_no_loss_gives_a_gradient():
    net, book = Net(2), nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
    optimizer = gradsurgery.MoCo(torch.optim.SGD([*net.parameters(), book], lr=0.1))
    kept = []
    for wanted in (True, False):
        optimizer.zero_grad()
        optimizer.backward(net.losses(KeepsSome.apply(torch.tanh(net.trunk(X)), book, wanted)))
        optimizer.step()
        place = len(list(net.parameters()))
        kept.append({n: row[place] for n, row in optimizer.state_dict()["gradsurgery"]["memory"]["tracked"].items()})
    assert book.grad is None
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ micro-batches

PARTED = {
    name: getattr(gradsurgery, name)
    for name in ("PCGrad", "UPGrad", "MGDA", "CAGrad", "GradDrop", "AlignedMTL", "MoCo", "ExcessMTL", "MoDo", "DBMTL")
}


@pytest.mark.parametrize("granularity", ["all", "group", "parameter"])
@pytest.mark.parametrize("build", PARTED.values(), ids=PARTED.keys())
def test_a_loss_that_reaches_nothing_of_a_part_over_micro_batches(build, granularity):
    net = Net(2)

    def losses():
        z = torch.tanh(net.trunk(X))
        found = net.losses(z)
        found["c"] = (net.own(X) - 3).square().mean() + net.trunk.bias.square().sum() * (granularity != "all")
        return found

    grads = []
    for parts in (1, 2):
        net.zero_grad()
        optimizer = build(sgd(net), granularity=granularity)
        for _ in range(parts - 1):
            optimizer.backward({n: loss / parts for n, loss in losses().items()}, accumulate=True)
        optimizer.backward({n: loss / parts for n, loss in losses().items()})
        grads.append([p.grad for p in net.parameters()])
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, whole)


# ------------------------------------------------------------------------------------------- a weighter inside

SEES = {
    "PCGrad": gradsurgery.PCGrad,
    "MoCo": gradsurgery.MoCo,
    "ExcessMTL": gradsurgery.ExcessMTL,
    "GCond": gradsurgery.GCond,
    "MoDo": gradsurgery.MoDo,
    "Bloop": gradsurgery.Bloop,
    "GRU": gradsurgery.GRU,
    "SAGO": gradsurgery.SAGO,
    "AndMask": lambda base, **options: gradsurgery.AndMask(base, tau=0.3, **options),
    "SandMask": lambda base, **options: gradsurgery.SandMask(base, tau=0.3, **options),
    "EPO": gradsurgery.EPO,
    "DBMTL": gradsurgery.DBMTL,
    "Signs": Signs,
}
COEFFICIENTS = {"a": 0.5, "b": 3.0, "c": 1.7}


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("build", SEES.values(), ids=SEES.keys())
def test_a_method_sees_each_loss_multiplied_by_its_coefficient(build, normalize):
    if build is gradsurgery.DBMTL and normalize != "none":
        with pytest.raises(ValueError, match="`normalize` has no effect here"):
            build(sgd(Net()), normalize=normalize)
        return
    ends = []
    for wrap in (True, False):
        net = Net()
        base = torch.optim.SGD(net.parameters(), lr=1e-3)
        optimizer = build(ByName(base) if wrap else base, normalize=normalize)
        for _ in range(3):
            optimizer.zero_grad()
            losses = net.losses()
            optimizer.backward(losses if wrap else {n: COEFFICIENTS[n] * loss for n, loss in losses.items()})
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("build", SEES.values(), ids=SEES.keys())
def test_a_weighter_under_logarithms_would_do_nothing_and_is_refused(build):
    with pytest.raises(ValueError, match=r"log_losses=True excludes a weighter inside \(ByName\).*drops out"):
        build(ByName(sgd(Net())), log_losses=True)


@pytest.mark.parametrize("build", [gradsurgery.MoDo, gradsurgery.SDMGrad, gradsurgery.ExcessMTL, gradsurgery.PCGrad])
def test_weights_of_logarithms_in_the_report(build):
    """Those of the losses as they were given, for methods that keep rows as for all others."""
    net = Net()
    report = build(sgd(net), log_losses=True).backward(net.losses())
    losses = net.losses()
    weighted = sum(report.weights[n] * losses[n] for n in losses)
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(weighted, net.trunk.weight))


@pytest.mark.parametrize("kind", ["a weighter inside", "logarithms"])
@pytest.mark.parametrize("switches", [{}, {"warmup": 1}])
def test_what_is_shared_and_not_named_gets_each_loss_times_its_coefficient(kind, switches):
    net = Net()
    losses = net.losses()
    by = COEFFICIENTS if kind == "a weighter inside" else {n: 1 / loss.item() for n, loss in losses.items()}
    base, logs = (ByName(sgd(net)), {}) if kind == "a weighter inside" else (sgd(net), {"log_losses": True})
    Skewed(base, shared_params=net.trunk.bias, **logs, **switches).backward(losses)
    plain = sum(by[n] * loss for n, loss in net.losses().items())
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(plain, net.trunk.weight))


# ------------------------------------------------------------------- one loss alone on what the surgery acts on


class KeepsSome(torch.autograd.Function):
    """z + x, of which x gets a gradient if it is wanted."""

    @staticmethod
    def forward(ctx, z, x, wanted):
        ctx.wanted = wanted
        return z + x

    @staticmethod
    def backward(ctx, g):
        return g, g.sum(dim=0) if ctx.wanted else None, None


USED = {"one loss": "b", "a function that gives the other nothing": "ab", "two losses": "ab", "each its own": "ab"}


class Offsets(Net):
    """Two heads, and offsets in front of them that losses use or not. The surgery acts on the offsets alone."""

    def __init__(self):
        super().__init__(2)
        self.offsets = nn.ParameterList(torch.full((3,), 0.1 + i, dtype=torch.float64) for i in range(2))

    def used(self, case):
        """The features, and the losses."""
        z, found = torch.tanh(self.trunk(X)), {}
        for i, n in enumerate("ab"):
            y, x = z, self.offsets[i if case == "each its own" else 0]
            if n in USED.get(case, "ab"):
                y = KeepsSome.apply(z, x, n == "b") if case.startswith("a function") else z + x
            found[n] = (10.0**i * (self.heads[i](y) - 1 - i)).square().mean()
        return z, found


def expected_of(net, case, weights):
    _, losses = net.used(case)
    total = sum(w * loss for w, loss in zip(weights, losses.values(), strict=True))
    return torch.autograd.grad(total, list(net.offsets), allow_unused=True)


@pytest.mark.parametrize("road", ["features", "one pass", "features, old weights", "in parts", "ghosts", "blocks"])
@pytest.mark.parametrize(
    ("case", "alone"),
    [
        ("frozen", True),
        ("one loss", True),
        ("a function that gives the other nothing", True),
        ("two losses", False),
        ("each its own", False),
    ],
)
def test_nothing_is_balanced_where_one_loss_alone_reaches_what_is_named(case, alone, road):
    """Neither by the gradients at the features, nor by old weights; what was named may lie above the features."""
    net = Offsets()
    engine = {"engine": road} if road in ("ghosts", "blocks") else {}
    optimizer = Skewed(sgd(net), shared_params=net.offsets, every=1 if road == "features" else 2, **engine)
    if road != "features":
        z, losses = net.used("two losses")
        committed(optimizer, losses, **({"features": z} if "features" in road else {}))
        assert optimizer.report.weights == {"a": 2.0, "b": 3.0}
    net.offsets.requires_grad_(case != "frozen")
    share = 1.0
    if road == "in parts":
        optimizer.backward({n: loss / 2 for n, loss in net.used(case)[1].items()}, accumulate=True)
        share = 0.5
    z, losses = net.used(case)
    losses = {n: share * loss for n, loss in losses.items()}
    report = optimizer.backward(losses, **({"features": z} if "features" in road else {}))
    weights = [1.0, 1.0] if alone else [2.0, 3.0]
    assert list(report.weights.values()) == weights
    if case == "frozen":
        assert "nothing-shared" in report.flags
        assert report.gram is None
        return
    for p, g in zip(net.offsets, expected_of(net, case, weights), strict=True):
        assert (p.grad is None) == (g is None)
        torch.testing.assert_close(p.grad, g)


def test_a_method_learns_nothing_at_features_where_nothing_is_balanced():
    net = Offsets()
    optimizer = gradsurgery.GradVac(sgd(net), shared_params=net.offsets)
    z, losses = net.used("one loss")
    committed(optimizer, losses, features=z)
    assert "targets" not in optimizer.state_dict()["gradsurgery"]["memory"]
    z, losses = net.used("two losses")
    committed(optimizer, losses, features=z)
    assert "targets" in optimizer.state_dict()["gradsurgery"]["memory"]


def test_features_with_named_parameters_cost_one_pass_through_the_trunk():
    """A function written in Python in between does not change that: the losses go through it side by side."""
    net, passes = Net(2), []
    z = torch.tanh(KeepsSome.apply(net.trunk(X), torch.zeros(3, dtype=torch.float64, requires_grad=True), True))
    net.trunk.weight.register_hook(lambda g: passes.append(1))
    Skewed(sgd(net), shared_params=net.trunk.parameters()).backward(net.losses(z), features=z)
    assert len(passes) == 1


# --------------------------------------------------------------------------- what no surgery acts on, out of sight


@pytest.mark.parametrize("switches", [{}, {"streaming": True}, {"granularity": "parameter"}])
@pytest.mark.parametrize("out_of_sight", ["checkpointed", "too deep"])
def test_losses_that_meet_outside_of_the_shared_parameters_reach_something(switches, out_of_sight, monkeypatch):
    """Their gradients there are added up as they come, and each loss has been seen all the same."""
    if out_of_sight == "too deep":
        monkeypatch.setattr(reach, "_DEEPEST", 2)
    net = Net(2)
    optimizer = gradsurgery.PCGrad(sgd(net), shared_params=net.own.parameters(), **switches)
    net.heads.requires_grad_(False)
    z = X.clone().requires_grad_()
    z = checkpoint(net.trunk, z, use_reentrant=True) if out_of_sight == "checkpointed" else net.trunk(z)
    optimizer.backward(net.losses(torch.tanh(z)))
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(sum(net.losses().values()), net.trunk.weight))
    apart = {**net.losses(), "b": nn.Parameter(torch.ones(1)).square().sum()}
    if out_of_sight == "checkpointed":
        apart["a"] = net.losses(torch.tanh(checkpoint(net.trunk, X.clone().requires_grad_(), use_reentrant=True)))["a"]
    with pytest.raises(RuntimeError, match="loss 'b' reaches no parameter"):
        optimizer.backward(apart)


# ------------------------------------------------------------------------------------------------- a task alone

SWITCHES = {
    "preference": {"preference": {"a": 10.0, "b": 1.0, "c": 1.0}},
    "normalize": {"normalize": "l2"},
    "min_weight": {"min_weight": 3.0},
    "max_weight": {"max_weight": 0.5},
    "weight_momentum": {"weight_momentum": 0.9},
    "streaming": {"streaming": True, "preference": {"a": 10.0, "b": 1.0, "c": 1.0}},
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("given", [True, False, "features"], ids=["shared_params", "detected", "features"])
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_a_task_that_is_alone_gets_its_plain_gradient(switch, given, reduction):
    """Nothing is there to balance it with, however sharing was found."""
    net = Net()
    shared = {"shared_params": net.trunk.parameters()} if given else {}
    if given == "features" and "streaming" in switch:
        given = True
    optimizer = gradsurgery.PCGrad(sgd(net), reduction=reduction, **switch, **shared)
    committed(optimizer, net.losses())
    z = torch.tanh(net.trunk(X))
    options = {"features": z} if given == "features" else {}
    report = optimizer.backward({**net.losses(z), "b": None, "c": None}, **options)
    torch.testing.assert_close(net.trunk.weight.grad, own_gradient(net.losses()["a"], net.trunk.weight))
    assert report.weights == {"a": pytest.approx(1.0)}


@pytest.mark.parametrize("given", [True, False], ids=["shared_params", "detected"])
@pytest.mark.parametrize("build", [gradsurgery.MoCo, gradsurgery.DBMTL, gradsurgery.ExcessMTL, gradsurgery.GCond])
def test_switches_leave_a_task_alone_under_methods_that_go_on_with_their_averages(build, given):
    ends = []
    weightless = not build.has_weights
    for switches in ({}, {"preference": [4.0, 1.0, 1.0]}, *([] if weightless else [{"min_weight": 3.0}])):
        net = Net()
        shared = {"shared_params": net.trunk.parameters()} if given else {}
        optimizer = build(sgd(net), **switches, **shared)
        committed(optimizer, net.losses())
        optimizer.backward({**net.losses(), "b": None, "c": None})
        ends.append(net.trunk.weight.grad)
    for grad in ends[1:]:
        torch.testing.assert_close(grad, ends[0])


def test_one_loss_alone_on_a_part_gets_its_plain_gradient():
    for switch in SWITCHES.values():
        net = Net(2)
        optimizer = gradsurgery.PCGrad(sgd(net), shared_params=net.own.parameters(), **switch)
        optimizer.backward({**net.losses(), "c": net.own(X).square().mean()})
        torch.testing.assert_close(net.own.weight.grad, own_gradient(net.own(X).square().mean(), net.own.weight))
