"""Kinds of modules and parameters: one forward pass, and gradients as autograd gives them for each loss alone.

The yardstick is written without the library's engine: one forward pass with the same random numbers, one
``torch.autograd.grad`` a loss, and the method's ``combine`` on the rows laid side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import gradsurgery
from tests.support import loops

# Methods that are functions of the rows alone, so that their `combine` is a yardstick.
METHODS = {
    "PCGrad": gradsurgery.PCGrad,
    "MGDA": gradsurgery.MGDA,
    "UPGrad": gradsurgery.UPGrad,
}
OVER_METHODS = pytest.mark.parametrize("method", METHODS)


class Model(nn.Module):
    """A trunk of the kind under test, and two heads that disagree."""

    def __init__(self, trunk, width, run=None):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))
        with torch.no_grad():
            self.heads[1].weight.copy_(-0.5 * self.heads[0].weight)
        self.run = run or (lambda trunk, x: trunk(x))

    def forward(self, x):
        z = self.run(self.trunk, x)
        z = torch.view_as_real(z).flatten(1) if z.is_complex() else z.flatten(1)
        return {name: (head(z) - 2).square().mean() for name, head in zip("ab", self.heads, strict=True)}


class Cubed(torch.autograd.Function):
    """A custom function that saves its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class ScaledWithIndex(torch.autograd.Function):
    """Two inputs, one of which needs no gradient, and an output that is not differentiable."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        index = x.argmax(-1)
        ctx.mark_non_differentiable(index)
        return x * scale, index

    @staticmethod
    def backward(ctx, grad, _):
        (scale,) = ctx.saved_tensors
        return grad * scale, None


def dropout_net():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.5))


def conv():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    return net.to(memory_format=torch.channels_last)


class Transposed(nn.Module):
    """A parameter that is a view with strides of its own, as after `weight.t()`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4).t())

    def forward(self, x):
        return torch.tanh(x @ self.weight)


class Complex(nn.Module):
    """A Fourier layer with complex weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x):
        return torch.fft.rfft(x) @ self.weight


class Tied(nn.Module):
    """One weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.weight) @ self.weight.t())


@dataclass
class Case:
    """A kind of trunk: how to make it, its width, its input, and how it is run."""

    trunk: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...] = (8, 4)
    run: Callable[[nn.Module, Tensor], Tensor] | None = None


CASES = {
    "dropout": Case(dropout_net, 6),
    "batch norm": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()), 6),
    "layer norm": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), 6),
    "rnn": Case(lambda: nn.RNN(4, 5, batch_first=True), 5, (3, 7, 4), lambda net, x: net(x)[0][:, -1]),
    "lstm": Case(lambda: nn.LSTM(4, 5, num_layers=2, dropout=0.3), 5, (7, 3, 4), lambda net, x: net(x)[0][-1]),
    "gru": Case(lambda: nn.GRU(4, 5, bidirectional=True), 10, (7, 3, 4), lambda net, x: net(x)[0][-1]),
    "attention": Case(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), 12, (5, 3, 4)),
    "custom function": Case(lambda: nn.Linear(4, 6), 6, run=lambda net, x: Cubed.apply(net(x))),
    "custom function with two outputs": Case(
        lambda: nn.Linear(4, 6), 6, run=lambda net, x: ScaledWithIndex.apply(net(x), torch.arange(6.0).to(x.dtype))[0]
    ),
    "checkpointed": Case(dropout_net, 6, run=lambda net, x: checkpoint(net, x, use_reentrant=False)),
    "checkpointed in parts": Case(
        dropout_net,
        6,
        run=lambda net, x: checkpoint(net[2:], checkpoint(net[:2], x, use_reentrant=False), use_reentrant=False),
    ),
    "channels last": Case(conv, 12, (6, 2, 4, 4), lambda net, x: net(x.to(memory_format=torch.channels_last))),
    "transposed": Case(Transposed, 6),
    "complex": Case(Complex, 6),
    "tied": Case(Tied, 4),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), 6),
    "in-place relu": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)), 6),
}
OVER_CASES = pytest.mark.parametrize("case", CASES)


def setting(case):
    chosen = CASES[case]
    torch.manual_seed(0)
    model = Model(chosen.trunk(), chosen.width, chosen.run).double()
    if case == "complex":
        model.trunk.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
    return model, torch.randn(chosen.shape, dtype=torch.float64)


def flat(tensors, params):
    """A row in one vector, complex entries as pairs of reals."""
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(tensors, params, strict=True)]
    return torch.cat([torch.view_as_real(g).reshape(-1) if g.is_complex() else g.reshape(-1) for g in parts])


def yardstick(method, model, x):
    """Rows of one forward pass, laid side by side, and the method's direction for them."""
    losses = model(x)
    params = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses.values()]
    direct = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.1)).combine
    direction = direct(torch.stack([flat(row, params) for row in rows]), [loss.item() for loss in losses.values()])
    heads = [
        torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)
        for loss, head in zip(losses.values(), model.heads, strict=True)
    ]
    return direction, heads


@OVER_CASES
@OVER_METHODS
def test_gradients_are_those_of_one_forward_pass(method, case):
    model, x = setting(case)
    twin = copy.deepcopy(model)
    torch.manual_seed(7)  # one draw of every mask, the same for all losses
    direction, heads = yardstick(method, twin, x)
    optimizer = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(7)
    optimizer.backward(model(x))
    params = list(model.trunk.parameters())
    torch.testing.assert_close(flat([p.grad for p in params], params), direction, rtol=1e-10, atol=1e-12)
    for head, expected in zip(model.heads, heads, strict=True):
        torch.testing.assert_close([p.grad for p in head.parameters()], list(expected), rtol=1e-12, atol=0)
    for p in model.parameters():
        assert p.grad is None or p.grad.stride() == p.stride()
    # Running statistics, random numbers and whatever else a forward pass leaves behind.
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other)


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.UncertaintyWeighter])
@OVER_CASES
def test_a_loop_leaves_what_the_plain_loop_leaves(method, case):
    """With a learning rate of 0: buffers and the random stream are where a plain loop would have left them."""
    ends = []
    for wrapped in (False, True):
        model, x = setting(case)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = method(base) if wrapped else base
        torch.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            losses = model(x)
            optimizer.backward(losses) if wrapped else sum(losses.values()).backward()
            optimizer.step()
        ends.append([*model.buffers(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


# ---------------------------------------------------------------------------------------- reentrant checkpointing


class Checkpointed(loops.Net):
    """A layer, then a checkpointed block with dropout, then the heads."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.drop = nn.Dropout(0.3)
        self.inner = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.inner.weight.copy_(torch.eye(4))

    def forward(self, x):
        z = checkpoint(
            lambda z: self.drop(torch.tanh(self.inner(z))), torch.tanh(self.trunk(x)), use_reentrant=self.reentrant
        )
        targets = (1.0, -3.0, 9.0)
        return {name: head(z) - t for name, head, t in zip(loops.NAMES, self.heads, targets, strict=True)}


def inner_measures(optimizer):
    """Whether the method, or a weighting in it, differentiates at some parameters only."""
    inner = optimizer.base if isinstance(optimizer.base, gradsurgery.Weighter) else optimizer
    return isinstance(inner, gradsurgery.Weighter) and type(inner).measure is not gradsurgery.Weighter.measure


@pytest.mark.parametrize("name", loops.METHODS)
def test_reentrant_checkpointing_gives_what_the_other_kind_gives(name):
    """Where it cannot, because a method wants gradients at some parameters only, the error says so."""
    ends = []
    for reentrant in (False, True):
        torch.manual_seed(5)
        net = Checkpointed(reentrant)
        optimizer = loops.METHODS[name](loops.OPTIMIZERS["sgd"](net.parameters()))
        if reentrant and inner_measures(optimizer):
            before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
            with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
                loops.train(name, optimizer, net, range(1))
            assert loops.same([net.state_dict(), optimizer.state_dict()], before)
            assert all(p.grad is None for p in net.parameters())
            return
        loops.train(name, optimizer, net, range(4))
        ends.append((loops.weights_of(net), torch.get_rng_state()))
    (found, state), (expected, other) = ends
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(state, other)


def test_losses_as_functions_run_the_model_once_a_loss():
    """The price of functions: running statistics move with every forward pass, and every loss has masks of its own."""
    found = []
    for as_functions in (False, True):
        model, x = setting("batch norm")
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        losses = {name: lambda name=name: model(x)[name] for name in "ab"} if as_functions else model(x)  # noqa: B023
        optimizer.backward(losses)
        found.append([p.grad for p in model.parameters()])
        assert model.trunk[1].num_batches_tracked == (2 if as_functions else 1)
    torch.testing.assert_close(*found)  # in training mode the normalisation itself is the same


# ----------------------------------------------------------------------------------------------- sparse embeddings


class Words(nn.Module):
    """A table that both tasks read, and one that only the first reads."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(9, 3, sparse=True)
        self.private = nn.Embedding(9, 3, sparse=True)

    def forward(self):
        ids = torch.tensor([1, 4, 4])
        both, own = self.shared(ids), self.private(ids)
        return {"a": (both + own - 1).square().sum(), "b": (2 * both + 1).square().sum()}


def rows_of(words, table):
    return [torch.autograd.grad(loss, table, allow_unused=True)[0] for loss in (words()["a"], words()["b"])]


def test_a_private_table_stays_sparse_and_a_shared_one_gets_dense_rows():
    words = Words()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(words.parameters(), lr=0.1))
    optimizer.backward(words())
    own, _ = rows_of(words, words.private.weight)
    assert words.private.weight.grad.is_sparse
    torch.testing.assert_close(words.private.weight.grad.to_dense(), own.to_dense())
    rows = torch.stack([g.to_dense().flatten() for g in rows_of(words, words.shared.weight)])
    grad = words.shared.weight.grad
    assert grad.layout == torch.strided
    torch.testing.assert_close(grad.flatten(), optimizer.combine(rows))
    assert not grad[[0, 2, 3, 5, 6, 7, 8]].any()


def test_tables_of_sparse_adam_are_left_out_of_the_surgery():
    """SparseAdam takes sparse gradients only: in `other_optimizers`, its tables get the sparse gradient of the sum."""
    words = Words()
    optimizer = gradsurgery.PCGrad(torch.optim.SparseAdam(words.parameters(), lr=0.1))
    optimizer.backward(words())
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()
    words.zero_grad()
    dense = nn.Parameter(torch.ones(3))
    tables = torch.optim.SparseAdam(words.parameters(), lr=0.1)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([dense], lr=0.1))
    optimizer.backward({name: loss + dense.square().sum() for name, loss in words().items()}, other_optimizers=tables)
    tables.step()
    for table in (words.shared.weight, words.private.weight):
        assert table.grad.is_sparse


@pytest.mark.parametrize("build", [gradsurgery.UncertaintyWeighter, gradsurgery.MGDA])
def test_tables_stay_sparse_where_there_is_one_backward_pass(build):
    words = Words()
    switches = {"warmup": 1} if build is gradsurgery.MGDA else {}
    optimizer = build(torch.optim.SparseAdam(words.parameters(), lr=0.1), **switches)
    optimizer.backward(words())
    optimizer.step()
    assert words.shared.weight.grad.is_sparse
    assert words.private.weight.grad.is_sparse


# ------------------------------------------------------------------------------------------------ complex parameters


def complex_setting(build, paired):
    """Four steps on losses with given complex gradients; with `paired` the parameter holds pairs of reals."""
    rows = torch.randn(3, 3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    w = nn.Parameter(torch.zeros(3, 4, 2) if paired else torch.zeros(3, 4, dtype=torch.complex64))
    w.data = w.data.to(torch.float64 if paired else torch.complex128)
    optimizer = build(torch.optim.SGD([w], lr=0.01))
    found = []
    for t in range(4):
        optimizer.zero_grad()
        pairs = w if paired else torch.view_as_real(w)
        pulls = zip(loops.NAMES, torch.view_as_real(rows), (1.0, 2.0, 4.0), strict=True)
        optimizer.backward({n: (pairs * row).sum() + 0.1 * pairs.square().sum() + c + t for n, row, c in pulls})
        found.append(w.grad if paired else torch.view_as_real(w.grad))
        optimizer.step()
    return found


@pytest.mark.parametrize("name", list(loops.METHODS))
def test_complex_parameters_count_as_pairs_of_reals(name):
    build = loops.METHODS[name]
    torch.testing.assert_close(complex_setting(build, False), complex_setting(build, True), rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------------------- several devices


@pytest.mark.parametrize("build", [gradsurgery.PCGrad, gradsurgery.UncertaintyWeighter])
def test_parameters_that_are_not_there_yet_are_left_alone(build):
    """A part of the model still lies on the meta device, and no loss reaches it."""
    net, later = loops.Net(), nn.Linear(3, 3, device="meta")
    optimizer = build(torch.optim.SGD([*later.parameters(), *net.parameters()], lr=0.1))
    optimizer.backward(loops.losses_of(net(loops.inputs(0))))
    optimizer.step()
    assert all(p.grad is None for p in later.parameters())
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@OVER_METHODS
def test_a_model_cut_in_two_trains_as_a_whole_one(method, device):
    nets = [loops.Net(), loops.Net()]
    nets[1].heads.to(device)
    for net in nets:
        for head in net.heads:
            head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.device),))
        optimizer = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.01))
        for t in range(2):
            optimizer.zero_grad()
            optimizer.backward(loops.losses_of(net(loops.inputs(t))))
            optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu())


# -------------------------------------------------------------------------------------------------- functional calls


def named(net):
    return dict(net.named_parameters())


def outcome(net, losses, optimizer):
    optimizer.backward(loops.losses_of(losses))
    return [p.grad for p in net.parameters()]


def test_functional_call_with_the_optimizers_own_parameters_is_a_call():
    net, twin = loops.Net(), loops.Net()
    x = loops.inputs(0)
    found = outcome(
        net, functional_call(net, named(net), (x,)), gradsurgery.MGDA(loops.OPTIMIZERS["sgd"](net.parameters()))
    )
    expected = outcome(twin, twin(x), gradsurgery.MGDA(loops.OPTIMIZERS["sgd"](twin.parameters())))
    assert loops.same(found, expected)


def test_functional_call_with_fast_weights_reaches_what_they_were_made_of():
    """The outer step of meta-learning: one gradient step is differentiated through."""
    net = loops.Net()
    optimizer = gradsurgery.MGDA(loops.OPTIMIZERS["sgd"](net.parameters()))
    x = loops.inputs(0)

    def outer():
        inner = sum(loops.losses_of(net(x)).values())
        grads = torch.autograd.grad(inner, list(named(net).values()), create_graph=True)
        fast = {key: p - 0.01 * g for (key, p), g in zip(named(net).items(), grads, strict=True)}
        return loops.losses_of(functional_call(net, fast, (loops.inputs(1),)))

    optimizer.backward(outer())
    # Through the inner step every loss reaches every parameter.
    params = list(net.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in outer().values()]
    rows = torch.stack([flat(row, params) for row in rows])
    torch.testing.assert_close(flat([p.grad for p in params], params), optimizer.combine(rows), rtol=1e-9, atol=1e-11)


def test_functional_call_with_copies_needs_an_optimizer_over_the_copies():
    net = loops.Net()
    copies = {key: p.detach().clone().requires_grad_() for key, p in named(net).items()}
    losses = lambda: loops.losses_of(functional_call(net, copies, (loops.inputs(0),)))  # noqa: E731
    with pytest.raises(RuntimeError, match="reaches no parameter of the optimizer"):
        gradsurgery.MGDA(loops.OPTIMIZERS["sgd"](net.parameters())).backward(losses())
    optimizer = gradsurgery.MGDA(loops.OPTIMIZERS["sgd"](copies.values()))
    optimizer.backward(losses())
    optimizer.step()
    assert all(p.grad is not None for p in copies.values())
    assert all(p.grad is None for p in net.parameters())
