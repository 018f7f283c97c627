"""Every way of holding gradients, behind one interface."""

from __future__ import annotations

import copy
import importlib
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery import gradients
from gradsurgery.gradients import ghosts, rows
from gradsurgery.gradients.dense import Dense
from gradsurgery.gradients.flat import Flat
from gradsurgery.graph import torch_private


class Net(nn.Module):
    """A trunk and two heads; one layer serves the first head only."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))

    def forward(self, x):
        z = self.trunk(x)
        return {"a": 3 * self.heads[0](z).square().mean(), "b": (self.heads[1](z) - 1).square().mean()}


X = torch.linspace(-1, 1, 15).reshape(5, 3)


def held_by(engines, monkeypatch, build=gradsurgery.PCGrad, net=None, **options):
    """The gradients that a step writes, its report, and the class of what held them."""
    seen = []

    def noted(engine):
        def gather(request):
            found = engine.gather(request)
            if not isinstance(found, str):
                seen.append(type(found))
            return found

        return engine._replace(gather=gather)

    monkeypatch.setattr(gradients, "ENGINES", tuple(map(noted, engines)))
    net = Net() if net is None else net
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.1), **options)
    report = optimizer.backward(net(X.to(next(net.parameters()).dtype)))
    return [p.grad for p in net.parameters()], report, seen[0]


WITHOUT_FLAT = tuple(engine for engine in gradients.ENGINES if engine.gather != Flat.gather)


@pytest.mark.parametrize("build", [gradsurgery.PCGrad, gradsurgery.MGDA, gradsurgery.UPGrad, gradsurgery.ConFIG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_rows_give_what_separate_ones_give(build, dtype, monkeypatch):
    flat, ours, kind = held_by(gradients.ENGINES, monkeypatch, build, Net().to(dtype))
    assert kind is Flat
    dense, theirs, kind = held_by(WITHOUT_FLAT, monkeypatch, build, Net().to(dtype))
    assert kind is Dense
    torch.testing.assert_close(flat, dense, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.gram, theirs.gram, rtol=1e-6, atol=0)
    assert ours.engine == theirs.engine == "rows"


def test_flat_gradients_share_no_memory(monkeypatch):
    grads, _, _ = held_by(gradients.ENGINES, monkeypatch)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def test_parameters_of_two_dtypes_stay_apart(monkeypatch):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.trunk[0].double()

        def forward(self, x):
            z = self.trunk[2](self.trunk[0](x.double()).float().tanh())
            return {"a": self.heads[0](z).square().mean(), "b": self.heads[1](z).mean()}

    net = Two()
    assert held_by(gradients.ENGINES, monkeypatch, net=net)[2] is Dense


def test_parameters_with_strides_of_their_own_keep_them(monkeypatch):
    net = Net()
    weight = net.trunk[2].weight
    weight.data = weight.data.t().contiguous().t()
    grads, _, kind = held_by(gradients.ENGINES, monkeypatch, net=net)
    assert kind is Dense
    assert grads[2].stride() == weight.stride()


def test_large_models_stay_apart(monkeypatch):
    assert held_by(gradients.ENGINES, monkeypatch, net=Net(width=400), engine="rows")[2] is Flat
    assert held_by(gradients.ENGINES, monkeypatch, net=Net(width=600), engine="rows")[2] is Dense


def test_a_row_with_a_gap_stays_apart(monkeypatch):
    class Three(Net):
        def forward(self, x):
            return {**super().forward(x), "c": self.trunk[0](x).square().mean()}

    grads, report, kind = held_by(gradients.ENGINES, monkeypatch, net=Three())
    assert kind is Dense
    assert all(g is not None for g in grads)
    assert report.gram.shape == (3, 3)


@pytest.mark.parametrize("old", ["call.Call", "kept.Kept", "world.World"])
def test_what_has_moved_says_where(old):
    module, name = old.split(".")
    with pytest.warns(DeprecationWarning, match=r"is now gradsurgery\..*The old name goes in version 1\.0"):
        assert isinstance(getattr(importlib.import_module(f"gradsurgery.{module}"), name), type)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module(f"gradsurgery.{module}").nothing  # noqa: B018


def test_a_resumed_run_knows_what_an_engine_could_not_do(monkeypatch):
    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
        return net, gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine="ghosts")

    x, tried = torch.randn(4, 8), []
    monkeypatch.setattr(ghosts.Plan, "_side_by_side", lambda *_: tried.append(1))
    net, optimizer = made()
    assert optimizer.backward(list(net(x).square().mean(0))).engine == "ghosts"
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert state["gradsurgery"]["memory"]["failed"] == ["unbatched"]
    net, again = made()
    again.load_state_dict(state)
    assert again.backward(list(net(x).square().mean(0))).engine == "ghosts"
    assert tried == [1]


def test_why_an_engine_was_refused_is_told_beside_why_another_one_was_taken():
    """Samples that batch norm brings together, in layers that pay as ghosts."""
    net = nn.Sequential(nn.Linear(32, 512), nn.BatchNorm1d(512), nn.Tanh(), nn.Linear(512, 512), nn.Linear(512, 1))
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    report = optimizer.backward(net(torch.randn(16, 32)).square()[:, 0])
    assert report.engine == "ghosts"
    assert "layers with" in report.reason
    assert "NativeBatchNormBackward0 brings samples together" in report.reason


# ------------------------------------------------------------------------------------------- autograd's engine


@pytest.mark.parametrize("build", [gradsurgery.UPGrad, gradsurgery.UncertaintyWeighter], ids=lambda c: c.__name__)
def test_without_the_engine_below_the_checks_the_public_calls_do(build, monkeypatch):
    assert torch_private._ENGINE is not None
    found = []
    for engine in (torch_private._ENGINE, None):
        monkeypatch.setattr(torch_private, "_ENGINE", engine)
        net = Net()
        optimizer = build(torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(net(X))
            optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "engine",
    [
        None,
        lambda outputs, seeds, retain: (),
        lambda outputs, seeds, *more: (torch.zeros(()), None),
        lambda outputs, seeds, *more: 1 / 0,
    ],
    ids=["missing", "other arguments", "wrong", "raises"],
)
def test_an_engine_that_does_not_do_is_left_alone(engine, monkeypatch):
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", engine)
    assert torch_private._probed() is None


def test_subclasses_of_tensors_may_handle_the_call(monkeypatch):
    class Own(torch.Tensor):
        pass

    monkeypatch.setattr(torch_private, "_ENGINE", lambda *_: 1 / 0)
    p = torch.ones(2).as_subclass(Own).requires_grad_()
    (g,) = torch_private.engine_backward(((p * 3).sum(),), (torch.ones(()),), (p,), retain=True, accumulate=False)
    assert g.tolist() == [3, 3]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_plain_gradients_of_many_kinds_are_what_torch_writes(m):
    """Small and large, transposed and broadcast, in two precisions, reached by one loss or several."""
    torch.manual_seed(0)
    shared = nn.Parameter(torch.randn(3))
    kinds = [torch.randn(4), torch.randn(3, 2).T, torch.randn(2, 3, dtype=torch.float64), torch.randn(200, 100)]
    own = [[nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in kinds] for _ in range(m)]
    other = nn.Parameter(torch.randn(5))

    def losses():
        return [
            shared.sum() * other.sum() + sum((p.double() * (k + i + 1)).sum() for k, p in enumerate(own[i])).float()
            for i in range(m)
        ]

    params = [shared, *(p for ps in own for p in ps)]
    sum(losses()).backward()
    plain = {p: p.grad for p in [*params, other]}
    for p in plain:
        p.grad = None
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(params, lr=0.1))
    optimizer.backward(losses(), others=torch.optim.SGD([other], lr=0.1))
    for p, g in plain.items():
        assert p.grad.dtype == p.dtype
        assert p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, g)
    assert len({p.grad.untyped_storage().data_ptr() for p in plain}) == len(plain)


def test_a_gradient_that_is_not_finite_is_found_where_all_are_small():
    net = Net()
    losses = net(X)
    losses["b"] = losses["b"] + (net.heads[1].bias * 0).sqrt().sum()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"the gradient of 'b' is not finite"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("bad", ["a", "b"])
def test_the_loss_whose_plain_gradient_is_not_finite_is_named(bad, kinds):
    """Whether both reach one parameter, whose gradients are summed, and others that are of another dtype."""
    net = Net()
    common, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    losses = {name: loss + common.sum() for name, loss in net(X).items()}
    if kinds == 2:
        losses["a"] = losses["a"] + other.sum().float()
    losses[bad] = losses[bad] + (common * 0).sqrt().sum()
    params = [*net.parameters(), common, other]
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(params, lr=0.1), shared_params=net.trunk.parameters())
    with pytest.raises(RuntimeError, match=f"the gradient of '{bad}' is not finite"):
        optimizer.backward(losses)


@pytest.mark.parametrize("sparse", [False, True])
def test_plain_gradients_of_one_parameter_are_multiplied_loss_by_loss(sparse):
    net, table = Net(), nn.Embedding(3, 2, sparse=sparse)
    places = torch.tensor([1])
    losses = {name: loss + (i + 1) * table(places).sum() for i, (name, loss) in enumerate(net(X).items())}
    base = torch.optim.SGD([*net.parameters(), table.weight], lr=0.1)
    weighter = gradsurgery.FixedWeighter(base, weights=[3.0, 5.0])
    gradsurgery.PCGrad(weighter, shared_params=net.trunk.parameters()).backward(losses)
    assert table.weight.grad.is_sparse == sparse
    assert table.weight.grad.to_dense().tolist() == [[0, 0], [13, 13], [0, 0]]


def alive_while_added(monkeypatch, name, params, losses):
    """How many gradients of the first parameters are there, each time the rows of another one are added up."""
    made, left, adds = [], [], getattr(rows, name)

    def noted(*args):
        left.append(sum(g() is not None for g in made))
        return adds(*args)

    monkeypatch.setattr(rows, name, noted)
    for p in params[:-1]:
        p.register_hook(lambda g: made.append(weakref.ref(g)))
    gradsurgery.PCGrad(torch.optim.SGD(params, lr=0.1), engine="rows").backward(losses)
    return left


def test_small_rows_are_gone_before_large_ones_are_added_up(monkeypatch):
    params = [*(nn.Parameter(torch.randn(5)) for _ in range(3)), nn.Parameter(torch.randn(2**18 + 1))]
    total = sum(p.square().sum() for p in params)
    assert alive_while_added(monkeypatch, "combine", params, [total, total.square()]) == [0]


def test_large_plain_gradients_go_one_by_one(monkeypatch):
    own = [nn.Parameter(torch.randn(2**14 + k)) for k in (1, 2, 3)]
    shared = nn.Parameter(torch.randn(2))
    losses = [shared.sum() * sum(p.square().sum() for p in own), shared.square().sum()]
    assert alive_while_added(monkeypatch, "plain", [*own, shared], losses) == [3, 2, 1]


def test_joined_gradients_are_those_of_each_loss():
    params = [torch.zeros(2, 3), torch.zeros(2), torch.zeros(1), torch.zeros(4)]
    grads = [torch.randn(p.shape) for p in params]
    grads[1] = torch.tensor([-9.0, 1.0])
    terms = [[(2, grads[0])], [(0, grads[1])], [], [(2, grads[3])]]
    joined = rows.Joined.of(params, terms)
    largest = max(float(grads[0].abs().max()), float(grads[3].abs().max()))
    assert joined.peaks(4).tolist() == pytest.approx([9.0, 0.0, largest, 0.0])
    for factors in ([1.0, 1.0, 1.0], [0.5, 9.0, -2.0]):
        found = joined.scaled(np.array(factors), params)
        assert found[2] is None
        for j, i in ((0, 2), (1, 0), (3, 2)):
            torch.testing.assert_close(found[j], factors[i] * grads[j])
        pointers = {g.untyped_storage().data_ptr() for g in (*grads, *found) if g is not None}
        assert len(pointers) == 7
    grads[3][1] = torch.nan
    assert np.isnan(rows.Joined.of(params, terms).peaks(3)[2])


@pytest.mark.parametrize(
    ("p", "g"),
    [
        (torch.zeros(2), torch.ones(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.zeros(2, 3).T, torch.ones(2, 3).T),
        (torch.zeros(3, 2), torch.ones(2, 3).T),
        (torch.zeros(2), torch.ones(2).to_sparse()),
        (torch.zeros(0), torch.ones(0)),
        (torch.zeros(2**14 + 1), torch.ones(2**14 + 1)),
    ],
    ids=["other dtype", "half", "transposed", "transposed gradient", "sparse", "empty", "large"],
)
def test_what_has_another_form_is_not_joined(p, g):
    usual = torch.zeros(2)
    assert rows.Joined.of([usual], [[(0, torch.ones(2))]]) is not None
    assert rows.Joined.of([usual, p], [[(0, torch.ones(2))], [(0, g)]]) is None
    assert rows.Joined.of([usual], [[(0, torch.ones(2)), (1, torch.ones(2))]]) is None
    assert rows.Joined.of([usual], [[]]) is None


@pytest.mark.parametrize(
    ("p", "g"),
    [
        (torch.zeros(2), torch.ones(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.zeros(3, 2), torch.ones(2, 3).T),
        (torch.zeros(2), torch.ones(2).to_sparse()),
        (torch.zeros(2**14 + 1), torch.ones(2**14 + 1)),
    ],
    ids=["other dtype", "half", "transposed gradient", "sparse", "large"],
)
def test_what_has_another_form_is_not_multiplied_with_the_rest(p, g):
    usual, ones = torch.zeros(2), torch.ones(2)
    found, other = rows.scaled_alone([usual, p], [[(0, ones)], [(1, g)]], [3.0, 5.0])
    assert found.tolist() == [3, 3]
    assert other is None
    assert rows.scaled_alone([usual], [[(0, ones), (1, ones)]], [3.0, 5.0]) == [None]


KINDS_OF_GRADIENT = {
    "dense": lambda: torch.tensor([[1.0, 2.0]]),
    "sparse": lambda: torch.tensor([[0.0, 4.0]]).to_sparse(),
    "expanded": lambda: torch.tensor([[8.0]]).expand(1, 2),
    "a row": lambda: torch.tensor([16.0, 32.0]).as_strided((1, 2), (0, 1)),
}


@pytest.mark.parametrize("new", KINDS_OF_GRADIENT)
@pytest.mark.parametrize("old", KINDS_OF_GRADIENT)
def test_gradients_of_all_kinds_are_added(old, new):
    p = nn.Parameter(torch.zeros(1, 2))
    a, b = KINDS_OF_GRADIENT[old](), KINDS_OF_GRADIENT[new]()
    wanted = (a.to_dense() + b.to_dense()).tolist()
    both = rows.total(a, b)
    assert both.to_dense().tolist() == wanted
    assert both.is_sparse == (old == new == "sparse")
    p.grad = a
    rows.write([p], [b])
    assert p.grad.to_dense().tolist() == wanted
    # In place, as torch does, where every entry has its own memory.
    assert (p.grad is a) == (old in ("dense", "a row"))


def test_a_pass_without_losses_finds_nothing():
    assert rows.one_pass([], [], [nn.Parameter(torch.ones(2))], retain_graph=False) == [None]
