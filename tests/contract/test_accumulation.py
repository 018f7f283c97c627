"""Micro-batches: the gradients of each loss are added up, and the method acts once."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.graph import reach
from tests.support.catalogue import CATALOGUE
from tests.support.weighting_catalogue import CATALOGUE as WEIGHTERS

K = 3
METHODS = [pytest.param(row.build, id=row.name) for row in (*CATALOGUE, *WEIGHTERS)]


class Net(nn.Module):
    """A trunk, and a head for each of three tasks; losses are means over the batch and positive."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def forward(self, x):
        z = self.trunk(x)
        return {
            "abc"[i]: (head(z) - 3 * i - x.sum(1, keepdim=True)).square().mean() + 0.1
            for i, head in enumerate(self.heads)
        }


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def batches():
    return torch.randn(2, K, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(net, build, batches, split, scaler=None, **options):
    """Two steps, in micro-batches or at once."""
    net = copy.deepcopy(net)
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), **options)
    reports = []
    for step in batches:
        optimizer.zero_grad()
        if split:
            for k, x in enumerate(step):
                losses = {name: loss / K for name, loss in net(x).items()}
                report = optimizer.backward(losses, accumulate=k < K - 1, scaler=scaler)
                if k < K - 1:
                    assert "accumulating" in report.flags
                    assert all(p.grad is None for p in net.parameters())
        else:
            report = optimizer.backward(net(step.flatten(0, 1)), scaler=scaler)
        reports.append(report)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return net, reports


def assert_same(found, wanted, **tolerance):
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("build", METHODS)
def test_micro_batches_equal_one_batch(net, batches, build):
    found, reports = run(net, build, batches, split=True)
    wanted, whole = run(net, build, batches, split=False)
    assert_same(found, wanted, rtol=1e-7, atol=1e-9)
    assert reports[1].losses == pytest.approx(whole[1].losses, rel=1e-7)
    if whole[1].weights is not None:
        assert reports[1].weights == pytest.approx(whole[1].weights, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("build", METHODS)
def test_micro_batches_under_a_gradient_scaler(net, batches, build):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)

    found, _ = run(net, build, batches, split=True, scaler=scaler())
    wanted, _ = run(net, build, batches, split=False)
    assert_same(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "build",
    [
        lambda o: gradsurgery.PCGrad(gradsurgery.UncertaintyWeighter(o)),
        lambda o: gradsurgery.MGDA(o, log_losses=True),
        lambda o: gradsurgery.MoCo(gradsurgery.DWAWeighter(o)),
        lambda o: gradsurgery.CAGrad(o, granularity="parameter", normalize="l2"),
        lambda o: gradsurgery.PCGrad(o, warmup=1),
        lambda o: gradsurgery.PCGrad(o, every=2),
        lambda o: gradsurgery.UPGrad(o, reduction="mean", preference={"a": 1, "b": 2, "c": 3}),
    ],
)
def test_switches_and_compositions(net, batches, build):
    found, _ = run(net, build, batches, split=True)
    wanted, _ = run(net, build, batches, split=False)
    assert_same(found, wanted, rtol=1e-7, atol=1e-9)


def gradnorm(optimizer):
    (group,) = optimizer.param_groups
    return gradsurgery.GradNormWeighter(optimizer, group["params"][2])


@pytest.mark.parametrize("build", [gradnorm, lambda o: gradsurgery.PCGrad(gradnorm(o))])
def test_measured_gradients_are_those_of_the_whole_batch(net, batches, build):
    found, reports = run(net, build, batches, split=True)
    wanted, whole = run(net, build, batches, split=False)
    assert_same(found, wanted, rtol=1e-7, atol=1e-9)
    assert reports[1].weights == pytest.approx(whole[1].weights, rel=1e-6)


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.MGDA, gradsurgery.MoCo, gradsurgery.DWAWeighter])
def test_tasks_in_some_micro_batches_only(net, batches, method):
    found, wanted = copy.deepcopy(net), copy.deepcopy(net)
    x = batches[0]
    optimizer = method(torch.optim.SGD(found.parameters(), lr=0.01))
    first = found(x[0])
    optimizer.backward({"a": first["a"] / 2, "b": first["b"], "c": None}, accumulate=True)
    second = found(x[1])
    report = optimizer.backward({"a": second["a"] / 2, "b": None, "c": second["c"]})
    assert report.names == ("a", "b", "c")
    optimizer.step()
    optimizer = method(torch.optim.SGD(wanted.parameters(), lr=0.01))
    first, second = wanted(x[0]), wanted(x[1])
    optimizer.backward({"a": (first["a"] + second["a"]) / 2, "b": first["b"], "c": second["c"]})
    optimizer.step()
    assert_same(found, wanted, rtol=1e-9, atol=1e-12)


def test_what_is_shared_is_decided_over_all_micro_batches():
    a, b = (nn.Parameter(torch.tensor([1.0, 1.0])) for _ in range(2))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([a, b], lr=1.0))
    optimizer.backward({"x": a[0] + b[0], "y": a[1]}, accumulate=True)
    optimizer.backward({"x": a[0], "y": -2 * b[0] - a[0]})
    # Rows over (a, b): x = (2, 0, 1, 0), y = (-1, 1, -2, 0). Their product is -4: both are projected.
    x, y = torch.tensor([2.0, 0, 1, 0]), torch.tensor([-1.0, 1, -2, 0])
    expected = x - (x @ y) / (y @ y) * y + y - (x @ y) / (x @ x) * x
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), expected)


def test_step_refuses_rows_that_no_call_acted_on(net, batches):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(net(batches[0, 0]), accumulate=True)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="accumulate=True"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer.zero_grad()
    optimizer.step()


def test_zero_grad_throws_them_away(net, batches):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(net(batches[0, 0]), accumulate=True)
    optimizer.zero_grad()
    report = optimizer.backward(net(batches[0, 1]))
    assert report.losses == pytest.approx({name: loss.item() for name, loss in net(batches[0, 1]).items()})


def test_a_failing_micro_batch_leaves_the_others(net, batches):
    found = copy.deepcopy(net)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(found.parameters(), lr=0.1))
    optimizer.backward(found(batches[0, 0]), accumulate=True)
    freed = found(batches[0, 1])
    sum(freed.values()).backward()
    for p in found.parameters():
        p.grad = None
    for accumulate in (True, False):
        with pytest.raises(RuntimeError, match="already freed"):
            optimizer.backward(freed, accumulate=accumulate)
    optimizer.backward(found(batches[0, 1]))
    wanted = copy.deepcopy(net)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(wanted.parameters(), lr=0.1))
    optimizer.backward({k: wanted(batches[0, 0])[k] + wanted(batches[0, 1])[k] for k in ("a", "b", "c")})
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
def test_a_loss_that_is_not_finite(net, batches, policy):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), nonfinite=policy)
    losses = net(batches[0, 0])
    losses["b"] = losses["b"] * float("nan")
    optimizer.backward(losses, accumulate=True)
    if policy == "raise":
        with pytest.raises(RuntimeError, match="'b' is not finite"):
            optimizer.backward(net(batches[0, 1]))
    else:
        report = optimizer.backward(net(batches[0, 1]))
        assert ("skipped" in report.flags) == (policy == "skip")
        if policy == "drop":
            one = net(batches[0, 1])["b"].item()
            assert report.losses["b"] == pytest.approx(one), "one micro-batch is left of it"
    written = [p.grad is not None for p in net.parameters()]
    assert all(written) if policy == "drop" else not any(written)


def test_other_optimizers_get_the_plain_sum(net, batches):
    heads = torch.optim.SGD(net.heads.parameters(), lr=0.1)
    for method in (gradsurgery.PCGrad, gradsurgery.RunningMaxWeighter):
        optimizer = method(torch.optim.SGD(net.trunk.parameters(), lr=0.1))
        net.zero_grad()
        for accumulate, x in ((True, batches[0, 0]), (False, batches[0, 1])):
            optimizer.backward(net(x), accumulate=accumulate, other_optimizers=[heads])
        found = [p.grad for p in net.heads.parameters()]
        wanted = torch.autograd.grad(
            sum(net(batches[0, 0]).values()) + sum(net(batches[0, 1]).values()), list(net.heads.parameters())
        )
        for p, q in zip(found, wanted, strict=True):
            torch.testing.assert_close(p, q)


def test_what_has_no_meaning_is_refused(net, batches):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    z = net.trunk(batches[0, 0])
    with pytest.raises(ValueError, match="features"):
        optimizer.backward([z.sum(), z.square().sum()], features=z, accumulate=True)
    modo = gradsurgery.MoDo(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="independent"):
        modo.backward(net(batches[0, 0]), independent=[net(batches[0, 1])], accumulate=True)


# ------------------------------------------------------------------------------------ losses as functions


def test_functions_are_called_and_give_the_same(net, batches):
    def losses_of(model):
        return {name: lambda name=name: model(batches[0, 0])[name] for name in ("a", "b", "c")}

    results = []
    for closures in (True, False):
        model = copy.deepcopy(net)
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.backward(losses_of(model) if closures else model(batches[0, 0]))
        results.append([p.grad for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


class Once(torch.autograd.Function):
    """Like a compiled model: its graph may be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.used = False
        return x * 1

    @staticmethod
    def backward(ctx, g):
        assert not ctx.used
        ctx.used = True
        return g


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"warmup": 1}])
def test_functions_need_no_second_pass_over_a_graph(net, batches, options):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), **options)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(
            [
                lambda: Once.apply(net.trunk(batches[0, 0])).mean(),
                lambda: Once.apply(net.trunk(batches[0, 1])).square().mean(),
            ]
        )
        optimizer.step()


def test_functions_with_private_parameters_and_a_cadence(net, batches):
    x = batches[0, 0]

    def losses():
        return [
            lambda: Once.apply(net.heads[0](net.trunk(x))).mean(),
            lambda: Once.apply(net.heads[1](net.trunk(x))).square().mean(),
        ]

    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), every=2)
    optimizer.backward(losses())
    optimizer.step()
    optimizer.zero_grad()
    assert "reused" in optimizer.backward(losses()).flags
    first = torch.autograd.grad(net.heads[0](net.trunk(x)).mean(), net.heads[0].weight)[0]
    torch.testing.assert_close(net.heads[0].weight.grad, first)


def test_a_function_must_return_a_loss(net):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="loss 'a' must be a scalar tensor, a function"):
        optimizer.backward({"a": lambda: 3.0})


class Freed(torch.autograd.Function):
    """Tells when its graph is freed."""

    @staticmethod
    def forward(ctx, x, told):
        ctx.save_for_backward(x)
        told.append(ctx)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_graphs_that_nothing_shares_are_freed_at_once(net, batches):
    told = []

    def loss(x):
        return Freed.apply(net.trunk(x), told).square().mean()

    losses = [loss(batches[0, 0]), loss(batches[0, 1])]
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)
    for ctx in told:
        with pytest.raises(RuntimeError, match="freed"):
            _ = ctx.saved_tensors


def test_a_loss_that_reaches_nothing_is_named_where_the_graph_is_too_deep(net, batches, monkeypatch):
    monkeypatch.setattr(reach, "_DEEPEST", 2)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01))
    optimizer.backward(net(batches[0, 0]), accumulate=True)
    with pytest.raises(RuntimeError, match="loss 'b' reaches no parameter") as told:
        optimizer.backward({**net(batches[0, 1]), "b": nn.Parameter(torch.ones(1)).sum()}, accumulate=True)
    assert "of the same shapes" not in str(told.value)
    optimizer.backward(net(batches[0, 1]))


@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_a_micro_batch_of_which_no_loss_is_finite_is_left_out(net, batches, bad):
    """Under "drop", first, in between or last; a whole batch is skipped."""
    found, wanted = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(found.parameters(), lr=0.01), nonfinite="drop")
    if bad is None:
        report = optimizer.backward({n: loss * torch.nan for n, loss in found(batches[0, 0]).items()})
        assert report.names == ()
        assert report.flags == ("dropped", "skipped")
        assert all(p.grad is None for p in found.parameters())
        return
    for k in range(3):
        losses = found(batches[0, k])
        by = torch.nan if k == bad else 1.0
        report = optimizer.backward({n: by * loss for n, loss in losses.items()}, accumulate=k < 2)
    assert "dropped" in report.flags
    plain = gradsurgery.MGDA(torch.optim.SGD(wanted.parameters(), lr=0.01))
    first, last = (k for k in range(3) if k != bad)
    plain.backward(wanted(batches[0, first]), accumulate=True)
    plain.backward(wanted(batches[0, last]))
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_scale_of_what_waits_holds_where_the_last_micro_batch_has_no_loss(net, batches):
    reports = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=1024.0), None):
        model = copy.deepcopy(net)
        optimizer = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.01))
        optimizer.backward(model(batches[0, 0]), accumulate=True, scaler=scaler)
        reports.append(optimizer.backward(dict.fromkeys("abc")))
        if scaler is not None:
            scaler.unscale_(optimizer)
        reports.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(reports[0].gram, reports[2].gram)
    torch.testing.assert_close(reports[1], reports[3])


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.MoCo, gradsurgery.UncertaintyWeighter])
@pytest.mark.parametrize("absent", [(), ("a",)])
def test_a_scale_that_changes_between_micro_batches(net, batches, method, absent):
    found, wanted = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = method(torch.optim.SGD(found.parameters(), lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = method(torch.optim.SGD(wanted.parameters(), lr=0.01))
    for k, x in enumerate(batches[0]):
        gone = dict.fromkeys(absent if k else ())
        optimizer.backward({**found(x), **gone}, accumulate=k < K - 1, scaler=scaler)
        plain.backward({**wanted(x), **gone}, accumulate=k < K - 1)
        if k < K - 1:
            scaler.update(512.0)
    scaler.unscale_(optimizer)
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_sparse_gradient_follows_the_scale():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(table.parameters(), lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.backward([table(torch.tensor([1])).sum()], accumulate=True, scaler=scaler)
    scaler.update(4.0)
    optimizer.backward([table(torch.tensor([1])).sum()], scaler=scaler)
    assert table.weight.grad.to_dense()[1].tolist() == [8.0, 8.0]


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.MoCo, gradsurgery.UncertaintyWeighter])
def test_a_micro_batch_without_any_task_adds_nothing(net, batches, method):
    x, nothing = batches[0], dict.fromkeys("abc")
    found, wanted = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = method(torch.optim.SGD(found.parameters(), lr=0.01))
    assert "accumulating" in optimizer.backward(nothing, accumulate=True).flags
    optimizer.backward(found(x[0]), accumulate=True)
    assert optimizer.backward(nothing, accumulate=True).losses == {}
    assert optimizer.backward(nothing).names == ("a", "b", "c")
    optimizer.step()
    optimizer = method(torch.optim.SGD(wanted.parameters(), lr=0.01))
    optimizer.backward(wanted(x[0]))
    optimizer.step()
    assert_same(found, wanted)


def test_micro_batches_that_all_lack_every_task_are_an_error(net):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01))
    optimizer.backward(dict.fromkeys("abc"), accumulate=True)
    with pytest.raises(ValueError, match="every loss is None"):
        optimizer.backward(dict.fromkeys("abc"))


# ----------------------------------------------------------------------------------------- what was found later


def test_a_parameter_frozen_between_two_micro_batches_gets_nothing(net, batches):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(net(batches[0, 0]), accumulate=True)
    net.trunk[0].weight.requires_grad_(False)
    optimizer.backward(net(batches[0, 1]))
    assert net.trunk[0].weight.grad is None
    assert net.trunk[2].weight.grad is not None


class Reused(torch.autograd.Function):
    """Hands out the same memory in every backward pass, as captured graphs do."""

    buffer = None

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        if Reused.buffer is None:
            Reused.buffer = torch.empty_like(g)
        return Reused.buffer.copy_(g)


def test_memory_that_is_handed_out_again_does_not_spoil_what_was_kept():
    Reused.buffer = None
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.FixedWeighter(torch.optim.SGD([w], lr=0.1))
    optimizer.backward([(2 * Reused.apply(w)).sum()], accumulate=True)
    optimizer.backward([(5 * Reused.apply(w)).sum()])
    torch.testing.assert_close(w.grad, torch.full((3,), 7.0))


def test_a_closure_that_only_accumulates_is_an_error(net, batches):
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))

    def closure():
        return optimizer.backward(net(batches[0, 0]), accumulate=True).total

    with pytest.raises(RuntimeError, match="the closure accumulated gradients"):
        optimizer.step(closure)
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


def test_the_default_device_is_not_used(net, batches):
    optimizer = gradsurgery.GradDrop(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = net(batches[0, 0])
    torch.set_default_device("meta")
    try:
        optimizer.backward(losses)
    finally:
        torch.set_default_device(None)
    assert all(p.grad.device.type == "cpu" for p in net.parameters())
