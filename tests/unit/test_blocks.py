"""Rows of one block of the model at a time: the graphs that could make it wrong, and what it spares."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery.gradients import blocks, descent
from gradsurgery.gradients.gram import Table
from gradsurgery.graph import walk

DEPTH, WIDTH = 5, 6


class Layer(nn.Module):
    """Attention by hand, so that a block has branches and a way around them."""

    def __init__(self):
        super().__init__()
        self.mix, self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + torch.softmax(self.mix(x), -1) * x
        return self.norm(x + self.narrow(torch.tanh(self.wide(x))))


class Net(nn.Module):
    def __init__(self, tasks=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(tasks))
        self.double()

    def trunk(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        z = self.trunk(x)
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


@pytest.fixture
def x():
    return torch.randn(4, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(net, losses, engine, method=gradsurgery.UPGrad, **options):
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine, **options)
    report = optimizer.backward(losses)
    return [p.grad for p in net.parameters()], report


def same(make, losses_of, engine="blocks", **options):
    """Both engines agree; returns what each did."""
    (a, found), (b, wanted) = (step(net := make(), losses_of(net), e, **options) for e in ("blocks", "rows"))
    for g, h in zip(a, b, strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gram, wanted.gram, rtol=1e-9, atol=1e-12)
    assert found.engine == engine
    return found


def plan_of(net, losses, share=0.0):
    shared = [p for layer in net.layers for p in layer.parameters()]
    return blocks.plan(losses, shared, walk(losses).nodes, share)


def test_a_deep_model_is_cut_between_its_layers(x):
    net = Net()
    plan = plan_of(net, net(x))
    sizes = [sum(plan.shared[place].numel() for place in block.places) for block in plan.blocks]
    assert len(plan.blocks) >= DEPTH
    assert sum(sizes) == sum(p.numel() for p in plan.shared)
    assert max(sizes) <= sum(p.numel() for p in net.layers[0].parameters())


def test_small_blocks_are_put_together(x):
    net = Net()
    assert len(plan_of(net, net(x), 0.5).blocks) < len(plan_of(net, net(x)).blocks)
    assert plan_of(net, net(x), 1.0) is None


def test_layers_with_ways_around(x):
    same(Net, lambda net: net(x))


def test_tied_weights(x):
    def tied():
        net = Net()
        net.layers[3].mix = net.layers[0].mix
        net.layers[4] = net.layers[1]
        return net

    same(tied, lambda net: net(x))


def test_losses_that_enter_half_way(x):
    def losses(net):
        z = net.layers[1](net.layers[0](x))
        early = net.heads[0](z).square().mean()
        return [early, *(head(net.layers[2](z)).mean() for head in net.heads[1:]), -z.square().mean()]

    same(Net, losses)


def test_a_loss_that_is_a_penalty_on_a_weight(x):
    def losses(net):
        weight = net.layers[2].mix.weight
        return [*net(x), weight.square().sum(), net.layers[0].mix.bias.sum()]

    same(Net, losses)


def test_a_loss_that_reaches_only_some_blocks(x):
    def losses(net):
        z = net.layers[0](x)
        return [*net(x), net.heads[0](net.layers[4](z.detach())).mean()]

    same(Net, losses)


def test_a_loss_that_is_a_parameter(x):
    def scaled():
        net = Net()
        net.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        return net

    same(scaled, lambda net: [*(loss for loss in net(x * net.scale)), net.scale])


class FirstOnly(torch.autograd.Function):
    """Passes on what comes to its first output alone."""

    @staticmethod
    def forward(ctx, z):
        ctx.set_materialize_grads(False)
        return z * 1, z * 1

    @staticmethod
    def backward(ctx, g, h):
        return g


def seen_by_the_first(net, x, shared):
    """Two losses of which one alone reaches all but the first layers, which the graph does not tell."""
    early = x
    for layer in net.layers[:shared]:
        early = layer(early)
    z = early
    for layer in net.layers[shared:]:
        z = layer(z)
    a, b = FirstOnly.apply(z)
    return [net.heads[0](a).square().mean(), (net.heads[1](b) + net.heads[2](early)).square().mean()]


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_layers_that_one_loss_alone_reaches_after_all(x, shared):
    found = same(Net, lambda net: seen_by_the_first(net, x, shared))
    assert ("nothing-shared" in found.flags) == (not shared)


def test_rows_that_are_formed_in_the_end_are_those_of_what_is_shared(x):
    def losses(net):
        first, second = seen_by_the_first(net, x, 3)
        return [first, second, 1e-3 * first - second, second - first]

    found = same(Net, losses, engine="rows")
    assert found.reason == "rounding could make a loss rise"
    net = Net()
    given = losses(net)
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine="blocks")
    optimizer.backward(given)
    with pytest.raises(RuntimeError, match="already freed"):
        optimizer.backward(given)


def test_checkpointed_layers(x):
    def losses(net):
        z = x.clone().requires_grad_()
        for layer in net.layers:
            z = checkpoint(layer, z, use_reentrant=False)
        return [(head(z) - i).square().mean() for i, head in enumerate(net.heads)]

    same(Net, losses)


def test_changes_in_place(x):
    def losses(net):
        z = x
        for layer in net.layers:
            z = layer(z)
            z[:, 0] *= 0.5
            z = torch.relu_(z)
        return [(head(z) - i).square().mean() for i, head in enumerate(net.heads)]

    same(Net, losses)


def halved_in_place(g):
    g.mul_(0.5)


HOOKS = {
    "new": lambda z: z.register_hook(lambda g: 0.5 * g),
    "in place": lambda z: z.register_hook(halved_in_place),
    "retain_grad": lambda z: z.retain_grad(),
    "before a node": lambda z: z.grad_fn.register_prehook(lambda gs: (0.5 * gs[0],)),
    "after a node": lambda z: z.grad_fn.register_hook(lambda gs, _: tuple(None if g is None else g * 0.5 for g in gs)),
}


def hooked(net, x, hook):
    """A hook at every place where blocks could meet."""
    z = x.flatten(0, 1)  # in two dimensions a layer is one node
    for layer in net.layers:
        z = layer.mix(z)
        hook(z)
        z = torch.tanh(z)
        hook(z)
    return [(head(z) - i).square().mean() for i, head in enumerate(net.heads)]


@pytest.mark.parametrize("kind", HOOKS)
def test_where_hooks_may_look_rows_are_formed(x, kind):
    """Those of tensors at a border would act twice, and all would see one pass more than there are losses."""
    report = same(Net, lambda net: hooked(net, x, HOOKS[kind]), "blocks" if kind == "retain_grad" else "rows")
    if kind != "retain_grad":
        assert report.reason.startswith("hooks may look at gradients")


def test_a_hook_on_a_parameter_sees_each_row(x):
    net, seen = Net(), []
    net.layers[0].mix.weight.register_hook(seen.append)
    assert step(net, net(x), "blocks")[1].engine == "rows"
    found = list(seen)
    rows = [torch.autograd.grad(loss, net.layers[0].mix.weight, retain_graph=True)[0] for loss in net(x)]
    torch.testing.assert_close(found, rows)


def test_given_shared_parameters(x):
    net, other = Net(), Net()
    chosen = [list(n.layers[2].parameters()) for n in (net, other)]
    a, _ = step(net, net(x), "blocks", shared_params=chosen[0])
    b, _ = step(other, other(x), "rows", shared_params=chosen[1])
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_rows_outside_the_range_of_single_precision(x, scale):
    def losses(net):
        return [loss * scale for loss in net.float()(x.float())]

    (a, found), (b, wanted) = (step(net := Net(), losses(net), e, gradsurgery.MGDA) for e in ("blocks", "rows"))
    torch.testing.assert_close(found.gram, wanted.gram, rtol=1e-5, atol=0)
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4 * float(h.abs().max()))


def test_an_inactive_loss_needs_no_second_look(x, monkeypatch):
    net = Net().float()
    swept = []
    sweep = blocks.Found.sweep
    monkeypatch.setattr(blocks.Found, "sweep", lambda *args: swept.append(1) or sweep(*args))
    losses = net(x.float())
    losses[1] = torch.relu(losses[1] - 100)
    _, report = step(net, losses, "blocks", gradsurgery.PCGrad)
    assert report.norms["1"] == 0
    assert len(swept) == 1


def test_products_of_blocks_are_trusted_as_far_as_single_precision_goes(x):
    net = Net(tasks=2).float()
    losses = net(x.float())
    found = plan_of(net, losses).differentiate(losses, [torch.ones(())] * 2, False, [], single=False)
    gram, weights = np.array([[1.0, 4e-6 - 1], [4e-6 - 1, 1.0]]), np.ones(2)
    assert not descent.is_certain(found, gram, weights)
    assert descent.is_certain(Table([[torch.ones(2)], [torch.ones(2)]]), gram, weights)


def test_shallow_models_form_rows(x):
    layer = nn.Linear(WIDTH, WIDTH).double()
    losses = [layer(x).mean(), layer(x).square().mean()]
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(layer.parameters(), lr=0.1), engine="blocks")
    assert optimizer.backward(losses).engine == "rows"


def test_half_precision(x):
    def make():
        return Net().bfloat16()

    (a, found), (b, _) = (step(net := make(), net(x.bfloat16()), e, gradsurgery.MGDA) for e in ("blocks", "rows"))
    assert found.engine == "blocks"
    for g, h in zip(a, b, strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g.float(), h.float(), rtol=0.05, atol=0.02 * float(h.float().abs().max()))


def test_peak_memory_is_that_of_a_block():
    """Eight losses over twelve layers: rows would take eight sizes of the parameters."""
    from benchmarks.steps import peak_bytes

    torch.manual_seed(0)
    trunk = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(96, 96), nn.Tanh())))
    head = nn.Linear(96, 8)
    size = sum(p.numel() * p.element_size() for p in trunk.parameters())
    peaks = {}
    for engine in ("rows", "blocks"):
        optimizer = gradsurgery.MGDA(torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.0), engine=engine)
        losses = list(head(trunk(torch.randn(4, 96))).square().mean(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peaks[engine] = peak_bytes(lambda o=optimizer, v=losses: o.backward(v), torch.device("cpu")) / size
    assert peaks["rows"] > 8
    assert peaks["blocks"] < 3.5


class Bends(torch.autograd.Function):
    """A backward that does what it is told to the gradient."""

    @staticmethod
    def forward(ctx, x, bend):
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.bend(g), None


def drawn(g):
    return g * torch.randn_like(g)


BENDS = {
    "clips": lambda g: g.clamp(-1e-3, 1e-3),
    "takes signs": torch.sign,
    "normalizes": lambda g: g / g.norm(),
    "rectifies": torch.relu,
    "draws": drawn,
}


def bent(net, x, bend, at=(1, 3)):
    z = x
    for i, layer in enumerate(net.layers):
        z = layer(z)
        if i in at:
            z = Bends.apply(z, bend)
    return [(head(z) - i).square().mean() for i, head in enumerate(net.heads)]


@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e160])
@pytest.mark.parametrize("at", [(1,), (DEPTH - 1,), (0, 2, 4)])
@pytest.mark.parametrize("bend", BENDS)
def test_a_function_that_is_not_linear_is_refused_since_the_last_pass_is_one_of_a_sum(x, bend, at, scale):
    net = Net()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine="blocks")

    def turned(g):
        return BENDS[bend](g / scale) * scale

    losses = [loss * scale for loss in bent(net, x, turned, at)]
    with pytest.raises(RuntimeError, match=r'UPGrad\.backward: engine="blocks".*Bends.*not linear.*Pass engine="rows"'):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())
    optimizer.engine = "rows"
    assert optimizer.backward(net(x)).engine == "rows"


LINEAR = {
    "multiplies": lambda g: -0.5 * g,
    "is zero": torch.zeros_like,
    "loses all but rounding": lambda g: g - (g + g.abs().max() * 2) + g.abs().max() * 2,
    "passes nothing on": lambda g: None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bend", LINEAR)
def test_a_function_that_is_linear_up_to_rounding_may_stay(x, bend, dtype):
    def losses(net):
        return bent(net.to(dtype), x.to(dtype), LINEAR[bend], (2,))

    _, report = step(net := Net(), losses(net), "blocks")
    assert report.engine == "blocks"


def test_a_function_that_only_some_losses_reach(x):
    def losses(net, bend):
        z = net.trunk(x)
        return [head(Bends.apply(z, bend) if i else z).square().mean() for i, head in enumerate(net.heads)]

    same(Net, lambda net: losses(net, lambda g: 2 * g))
    with pytest.raises(RuntimeError, match="Bends"):
        step(net := Net(), losses(net, torch.sign), "blocks", gradsurgery.MGDA)


@pytest.mark.parametrize("bend", sorted(BENDS.keys() - {"draws"}))
def test_ghosts_and_rows_give_it_the_gradient_of_one_loss_at_a_time(x, bend):
    found = []
    for engine in ("ghosts", "rows"):
        net = Net(tasks=4)
        found.append(step(net, bent(net, x.flatten(0, 1), BENDS[bend]), engine))
        assert found[-1][1].engine == engine
    net = Net(tasks=4)
    losses, params = bent(net, x.flatten(0, 1), BENDS[bend]), list(net.layers.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    for grads, report in found:
        for j, g in enumerate(grads[: len(params)]):
            wanted = sum(w * row[j] for w, row in zip(report.weights.values(), rows, strict=True))
            torch.testing.assert_close(g, wanted, rtol=1e-9, atol=1e-12)


def test_a_linear_function_in_reduced_precision_may_stay(x):
    net = Net().float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = bent(net, x.float(), lambda g: 3 * g)
    assert step(net, [loss.float() for loss in losses], "blocks", gradsurgery.PCGrad)[1].engine == "blocks"


class Subtracts(torch.autograd.Function):
    """Takes signs, and hands them to two inputs of one shape."""

    @staticmethod
    def forward(ctx, a, b):
        return a - b

    @staticmethod
    def backward(ctx, g):
        return g.sign(), -g.sign()


def test_what_a_function_hands_to_two_inputs_does_not_cancel(x):
    net = Net()
    z = net.layers[1](net.layers[0](x))
    z = Subtracts.apply(z, -z.roll(1, 0))
    for layer in net.layers[2:]:
        z = layer(z)
    with pytest.raises(RuntimeError, match=r"Subtracts.*not linear"):
        step(net, [(head(z) - i).square().mean() for i, head in enumerate(net.heads)], "blocks")


def test_what_a_function_hands_to_the_two_sides_of_a_square_does_not_cancel():
    net, x = Net(), torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Bends.*not linear"):
        step(net, bent(net, x, lambda g: g + g.sign() - g.sign().T, (2,)), "blocks")


def test_what_is_rounded_to_a_fixed_step_may_stay(x):
    """Numbers below the smallest normal one, on which the sum of three rows is a few steps off."""
    net = Net().float()
    losses = [loss * 1e-39 for loss in bent(net, x.float(), lambda g: -0.3 * g)]
    assert step(net, losses, "blocks", gradsurgery.MGDA)[1].engine == "blocks"
