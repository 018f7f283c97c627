"""Approximations that save memory: rounded rows, rows on another device, and PCGrad without rows."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery import PCGrad, geometry, gradients, testing
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.flat import Flat
from gradsurgery.watch.diagnose import peak_bytes
from tests.support.catalogue import CATALOGUE, any_optimizer
from tests.support.loops import NAMES, Net, inputs, losses_of, same
from tests.support.samplers import integer_matrices

CPU = torch.device("cpu")
FORGETS = [row for row in CATALOGUE if not row.build(any_optimizer()).observes]
KEEPS = [row for row in CATALOGUE if row.build(any_optimizer()).observes]
STORES = [{"row_dtype": torch.bfloat16}, {"row_device": "cpu"}, {"row_dtype": torch.bfloat16, "row_device": CPU}]


def over(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def train(build, options, steps=4, dtype=torch.float32, rounding=False, **call):
    """A few steps; by hooks on the trunk, each row of it can be rounded before anything looks at it."""
    net = Net(dtype)
    if rounding:
        for p in net.trunk.parameters():
            p.register_hook(lambda g: g.bfloat16().to(g.dtype))
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), **options)
    for t in range(steps):
        optimizer.zero_grad()
        report = optimizer.backward(losses_of(net(inputs(t, dtype))), **call)
        optimizer.step()
    return net, optimizer, report


def equal(found, wanted):
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad.dtype == p.dtype


@pytest.fixture(autouse=True)
def _one_by_one(monkeypatch):
    """Rows of small models are not put into one matrix, which is multiplied in another order."""
    monkeypatch.setattr(
        gradients, "ENGINES", tuple(engine for engine in gradients.ENGINES if engine.gather != Flat.gather)
    )


# ------------------------------------------------------------------------------------------------- rows put away


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over(FORGETS)
def test_rounded_rows_are_those_rows_exactly(row, dtype):
    """Bit for bit the exact method on rounded rows; heads are not rounded."""
    found, optimizer, report = train(row.build, {"row_dtype": torch.bfloat16}, dtype=dtype)
    wanted, _, told = train(row.build, {"engine": "rows"}, dtype=dtype, rounding=True)
    if dtype is torch.float32:
        equal(found, wanted)
        torch.testing.assert_close(report.gram, told.gram, rtol=0, atol=0)
    else:  # products of rounded rows are formed in single precision
        for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(report.gram, told.gram, rtol=1e-3, atol=1e-5)
    assert (report.engine, report.reason) == ("rows", "`row_dtype` and `row_device` put rows away")
    assert "rounded-rows" in report.flags
    assert "rounded-rows" not in told.flags
    assert same(optimizer.state_dict()["gradsurgery"]["class"], type(optimizer).__name__)


def test_rounding_is_what_makes_the_difference():
    found, *_ = train(gradsurgery.MGDA, {"row_dtype": torch.bfloat16})
    exact, *_ = train(gradsurgery.MGDA, {"engine": "rows"})
    pairs = zip(found.parameters(), exact.parameters(), strict=True)
    off = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert 0 < off < 1e-2


@over(FORGETS)
def test_rows_on_another_device_change_nothing(row):
    found, _, report = train(row.build, {"row_device": "cpu"})
    equal(found, train(row.build, {"engine": "rows"})[0])
    assert report.engine == "rows"
    assert "rounded-rows" not in report.flags


@pytest.mark.parametrize("options", STORES)
@over(KEEPS)
def test_methods_that_keep_rows_refuse(row, options):
    with pytest.raises(ValueError, match="`row_dtype` and `row_device` need a method that forgets its rows"):
        row.build(any_optimizer(), **options)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda o, **k: PCGrad(gradsurgery.UncertaintyWeighter(o), **k), {}),
        (lambda o, **k: PCGrad(gradsurgery.GradNormWeighter(o, o.param_groups[0]["params"][0]), **k), {}),
        (gradsurgery.MGDA, {"granularity": "parameter"}),
        (gradsurgery.GradDrop, {"granularity": "group", "reduction": "mean"}),
        (gradsurgery.CAGrad, {"every": 2}),
        (gradsurgery.CAGrad, {"warmup": 2, "weight_momentum": 0.5}),
        (gradsurgery.MGDA, {"normalize": "loss+", "log_losses": True}),
    ],
)
@pytest.mark.parametrize("store", STORES)
def test_other_switches_mean_what_they_mean(build, options, store):
    found, *_ = train(build, {**options, **store})
    wanted, *_ = train(build, {**options, "engine": "rows"}, rounding="row_dtype" in store)
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        if "row_dtype" in store:  # hooks round what reused weights and a weighter's own measurement see as well
            torch.testing.assert_close(p, q, rtol=1e-2, atol=5e-3)
        else:
            assert torch.equal(p, q)


def test_under_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=100)
    net = Net(torch.float32)
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), row_dtype=torch.bfloat16)
    for t in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses_of(net(inputs(t, torch.float32))), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**100, "bfloat16 has the range of float32"
    # Squares of scaled rows are beyond float32, so that their products are made in float64: not the same bits.
    wanted = train(PCGrad, {"row_dtype": torch.bfloat16})[0]
    torch.testing.assert_close(list(net.parameters()), list(wanted.parameters()))
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    losses = losses_of(net(inputs(5, torch.float32)))
    optimizer.backward({**losses, "b": losses["b"] * float("inf")}, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**99
    assert same([net.state_dict(), optimizer.state_dict()], before)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_what_overflows_in_rounding_is_not_written(policy):
    """Above the largest number of bfloat16 there are float32 numbers."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.1), row_dtype=torch.bfloat16, nonfinite=policy)
    losses = [(p * torch.tensor([3.4e38, 0.0])).sum(), p.sum()]
    if policy == "raise":
        with pytest.raises(RuntimeError, match="gradient of '0' is not finite"):
            optimizer.backward(losses)
    else:
        assert "skipped" in optimizer.backward(losses).flags
    assert p.grad is None
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_stay_as_they_are(dtype):
    rows = torch.randn(3, 8).to(dtype)
    grads = []
    for options in ({"row_dtype": torch.bfloat16}, {"engine": "rows"}):
        p = nn.Parameter(torch.zeros(8, dtype=dtype))
        report = PCGrad(torch.optim.SGD([p], lr=0.1), **options).backward([(p * row).sum().float() for row in rows])
        assert "rounded-rows" not in report.flags
        grads.append(p.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", [PCGrad, gradsurgery.GradDrop])
@pytest.mark.parametrize("store", STORES)
def test_complex_rows_stay_as_they_are(method, store):
    found = []
    for options in (store, {"engine": "rows"}):
        p = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex64))
        a = torch.tensor([1.1 + 0.3j, 2.0])
        losses = [(p - a).abs().square().sum(), (p + a).abs().square().sum(), p.imag.square().sum()]
        method(torch.optim.SGD([p], lr=0.1), **options).backward(losses)
        found.append(p.grad)
    assert torch.equal(*found)


def test_sparse_rows_are_added_up_before_they_are_rounded():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = PCGrad(torch.optim.SGD(table.parameters(), lr=0.1), row_dtype=torch.bfloat16)
    at = torch.tensor([1, 1, 1])
    scale = torch.tensor([[1.0], [2.0**-8], [2.0**-8]])
    optimizer.backward([(table(at) * scale).sum(), table(torch.tensor([2])).sum()])
    assert table.weight.grad[1].tolist() == [1 + 2.0**-7] * 2, "rounding each of the three first would give 1"


@pytest.mark.parametrize("store", STORES)
def test_strides_and_private_gradients_after_all(store):
    """A node that passes nothing on hides from the walk that its parameter is private; .grad is as torch makes it."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.set_materialize_grads(False)
            return a * 1, b * 1

        @staticmethod
        def backward(ctx, g, h):
            return g, h

    trunk = nn.Parameter(torch.randn(3, 5).t())
    heads = [nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
    table = nn.Embedding(3, 2, sparse=True)
    a, b = Both.apply(trunk * heads[0] + table(torch.tensor([0])).sum(), trunk * heads[1])
    optimizer = PCGrad(torch.optim.SGD([trunk, *heads, *table.parameters()], lr=0.1), **store)
    optimizer.backward([a.sum(), b.square().sum()])
    assert trunk.grad.stride() == trunk.stride()
    for p in (trunk, *heads):
        assert (p.grad.dtype, p.grad.device) == (p.dtype, p.device)
    assert table.weight.grad.is_sparse
    assert table.weight.grad.dtype == torch.float32
    wanted = trunk.detach() if "row_dtype" not in store else trunk.detach().bfloat16().float()
    assert torch.equal(heads[0].grad, wanted)


def test_entries_on_another_device():
    """What there is to do with a row elsewhere, on a device without numbers, since a test machine may have one only."""
    row = [torch.zeros(2, 3), None, torch.zeros(4, dtype=torch.float64)]
    assert rows_module.store(row, torch.bfloat16, torch.device("meta"))
    assert [None if g is None else (g.device.type, g.dtype) for g in row] == [
        ("meta", torch.bfloat16),
        None,
        ("meta", torch.bfloat16),
    ]
    assert not rows_module.store([torch.zeros(1), None], None, torch.device("meta"))
    elsewhere = torch.zeros(3, dtype=torch.float64, device="meta")
    back = rows_module.restored(torch.zeros(3, dtype=torch.bfloat16), elsewhere)
    assert (back.device.type, back.dtype) == ("meta", torch.float64)
    pairs = rows_module.restored(torch.zeros(3, 2), torch.zeros(3, dtype=torch.complex128, device="meta"))
    assert (pairs.device.type, pairs.dtype) == ("meta", torch.float64)
    column = [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)]
    out = rows_module.combine(column, [0.5, 2.0], torch.zeros(3, device="meta"))
    assert (out.device.type, out.dtype) == ("meta", torch.float32)


class Elsewhere(torch.Tensor):
    """A tensor that is added to another one only after it was sent to a device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.add_:
            raise RuntimeError("Expected all tensors to be on the same device.")
        if func is torch.Tensor.to and any(isinstance(a, torch.device) for a in args):
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_sums_bring_entries_back_one_by_one():
    away = torch.full((3,), 2.0, dtype=torch.bfloat16).as_subclass(Elsewhere)
    out = rows_module.combine([torch.ones(3), away, None], [1.0, 0.25, 1.0], torch.zeros(3))
    assert type(out) is torch.Tensor
    assert out.tolist() == [1.5] * 3


def test_methods_that_look_at_entries_see_full_precision():
    seen = []

    class Looks(gradsurgery.Surgery):
        def weights(self, gram, losses):
            return np.ones(len(gram))

        def direct(self, column, applied, like, share):
            seen.extend(g.dtype for g in column if g is not None)
            return super().direct(column, applied, like, share)

    train(Looks, {"row_dtype": torch.bfloat16}, steps=1)
    train(Looks, {"row_dtype": torch.bfloat16}, steps=1, dtype=torch.float64)
    assert seen == [torch.float32] * 6 + [torch.float64] * 6, "three rows of two parameters, twice"


@pytest.mark.cuda
@pytest.mark.parametrize("method", [PCGrad, gradsurgery.GradDrop, gradsurgery.MGDA])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_wait_on_the_host(method, dtype):
    found = []
    for device in (None, "cpu"):
        net = Net(torch.float32).cuda()
        optimizer = method(
            torch.optim.SGD(net.parameters(), lr=0.01), engine="rows", row_dtype=dtype, row_device=device
        )
        optimizer.backward(losses_of(net(inputs(0, torch.float32).cuda())))
        assert all(p.grad.is_cuda for p in net.parameters())
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_dtype": torch.float16}, "`row_dtype` must be None or torch.bfloat16, got torch.float16. .*overflow"),
        ({"row_dtype": torch.int8}, "`row_dtype` must be None or torch.bfloat16, got torch.int8"),
        ({"row_dtype": "bfloat16"}, "`row_dtype` must be None or torch.bfloat16, got 'bfloat16'"),
        ({"row_device": "nowhere"}, "`row_device` must be a device of this machine, got 'nowhere'"),
        ({"row_device": 1.5}, "`row_device` must be a device of this machine, got 1.5"),
        ({"row_device": "meta"}, "`row_device` must hold numbers"),
        ({"row_device": "cpu", "engine": "ghosts"}, "engine='ghosts' excludes them"),
        ({"row_dtype": torch.bfloat16, "engine": "blocks"}, "engine='blocks' excludes them"),
        ({"row_device": "cpu", "distributed": True}, "are not for several processes"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=f"MGDA: .*{message}"):
        gradsurgery.MGDA(any_optimizer(), **options)


@pytest.mark.parametrize("options", [*STORES, {"streaming": True}])
def test_micro_batches_are_refused_and_nothing_is_lost(options):
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), **options)
    x = inputs(0, torch.float64)
    optimizer.backward(losses_of(net(x)))
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"PCGrad.*accumulate=True"):
        optimizer.backward(losses_of(net(x)), accumulate=True)
    for p, g in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 1}


@pytest.mark.parametrize("options", [*STORES, {"streaming": True}])
def test_parameters_that_are_spread_over_processes_are_refused(options, monkeypatch):
    """They are found in the call, not by a switch."""
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), **options)
    monkeypatch.setattr(optimizer, "_communicator", lambda: SimpleNamespace(is_alone=False))
    with pytest.raises(ValueError, match=r"PCGrad.*(DTensors|spread over processes)"):
        optimizer.backward(losses_of(net(inputs(0, torch.float64))))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("options", [*STORES, {"streaming": True}])
def test_copies_and_checkpoints(options):
    """Nothing is kept between steps, and the switches are not part of the state."""
    net, optimizer, _ = train(PCGrad, options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = PCGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict()["gradsurgery"] == optimizer.state_dict()["gradsurgery"]
    twin = copy.deepcopy(optimizer)
    assert (twin.row_dtype, twin.row_device, twin.streaming) == (
        optimizer.row_dtype,
        optimizer.row_device,
        optimizer.streaming,
    )


# -------------------------------------------------------------------------------------------------------- memory


def peak(m, **options):
    """Largest memory of a call, in sizes of the parameters. The losses are dot products: they keep no graph to free."""
    n = 500_000
    params = [nn.Parameter(torch.zeros(n)) for _ in range(4)]
    torch.manual_seed(0)
    data = [[torch.randn(n) for _ in params] for _ in range(m)]
    optimizer = PCGrad(torch.optim.SGD(params, lr=0.1), **options)
    losses = [sum((p * x).sum() for p, x in zip(params, row, strict=True)) for row in data]
    return peak_bytes(lambda: optimizer.backward(losses), CPU) / (4 * n * len(params))


def test_memory():
    rows, rounded = peak(12, engine="rows"), peak(12, row_dtype=torch.bfloat16)
    few, many = peak(4, streaming=True), peak(12, streaming=True)
    assert 12 < rows < 12.9, "rows are freed while they are combined"
    assert rounded < 0.5 * 12 + 0.9
    assert many < 3
    assert many < few + 0.1, "whatever m"


# ----------------------------------------------------------------------------------------------------- streaming


def literal(rows, order):
    """The sum so far and the next gradient, each projected off the other if they conflict."""
    total = None
    for i in order:
        g = rows[i]
        if total is None:
            total = g.copy()
        elif total @ g < 0:
            total = (total - (total @ g) / (g @ g) * g) + (g - (total @ g) / (total @ total) * total)
        else:
            total = total + g
    return total


def drawn(optimizer, step, m):
    """The order in a step, as the documentation of the stream says: by the seed and the number of steps alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([optimizer.seed, step], dtype=np.uint64)))
    return generator.permutation(m)


@st.composite
def gaussian(draw, least=2, most=6):
    """Rows of different lengths in random directions, full of conflict."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    m = draw(st.integers(least, most))
    return generator.standard_normal((m, draw(st.integers(2, 8)))) * np.exp(generator.standard_normal((m, 1)))


@given(rows=gaussian())
def test_streaming_is_what_it_says(rows):
    found = PCGrad(any_optimizer(), streaming=True, shuffle=False).combine(torch.from_numpy(rows)).numpy()
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found, literal(rows, range(len(rows))), rtol=1e-6, atol=1e-6 * lengths.sum())


@given(rows=gaussian(2, 2))
def test_streaming_of_two_losses_is_the_method_of_the_paper(rows):
    exact = PCGrad(any_optimizer()).combine(torch.from_numpy(rows)).numpy()
    found = PCGrad(any_optimizer(), streaming=True).combine(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-12 * np.abs(rows).max(initial=1e-300))


@given(rows=gaussian(3), seed=st.integers(0, 5))
def test_what_is_left_of_the_guarantee(rows, seed):
    optimizer = PCGrad(any_optimizer(), streaming=True, seed=seed)
    d = optimizer.combine(torch.from_numpy(rows)).numpy()
    order = drawn(optimizer, 0, len(rows))
    lengths = np.linalg.norm(rows, axis=1)
    before = literal(rows, order[:-1])
    assert np.linalg.norm(d) <= lengths.sum() * (1 + 1e-9)
    for other in (rows[order[-1]], before):
        assert d @ other >= -1e-6 * np.linalg.norm(other) * lengths.sum()
    weights = geometry.streaming_pcgrad(rows @ rows.T, order)
    assert (weights >= 1).all()


@given(rows=gaussian(), factor=st.floats(1e-3, 1e3))
def test_streaming_keeps_the_sum_and_the_scale(rows, factor):
    def direction(j):
        return PCGrad(any_optimizer(), streaming=True).combine(torch.from_numpy(j.copy())).numpy()

    testing.assert_homogeneous(direction, rows, factor)
    testing.assert_rotation_equivariant(direction, rows)
    testing.assert_plain_sum_without_conflict(direction, np.abs(rows))


@given(rows=integer_matrices())
def test_streaming_where_sums_cancel(rows):
    """What rounding leaves of a sum that vanishes has no direction, and nothing is projected off it."""
    found = PCGrad(any_optimizer(), streaming=True).combine(torch.from_numpy(rows)).numpy()
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) <= np.linalg.norm(rows, axis=1).sum() * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_of_a_sum_that_cancels_is_no_gradient(dtype):
    row = torch.tensor([0.1, 0.7, -0.3, 0.9], dtype=dtype)
    last = torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=dtype)
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.1), streaming=True, shuffle=False)
    for third in (last, -last):
        rows = torch.stack([row, -row / 3, third])
        p.grad = None
        optimizer.backward([(p * r).sum() for r in rows])
        torch.testing.assert_close(p.grad, third)
        torch.testing.assert_close(optimizer.combine(rows), third)


def test_streaming_looks_at_every_gradient():
    """The value of the second loss is finite, its slope at zero is not."""
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="the gradient of '1' is not finite"):
        PCGrad(torch.optim.SGD([p], lr=0.1), streaming=True).backward([(p - 1).square().sum(), p[0].sqrt() + p[1]])
    assert p.grad is None


def test_the_rest_of_a_sum_that_cancels_in_inner_products():
    gram = np.array([[1, -1, 0.5], [-1, 1 + 1e-12, -0.5 - 1e-9], [0.5, -0.5 - 1e-9, 1]])
    np.testing.assert_allclose(geometry.streaming_pcgrad(gram, range(3), noise=1e-12), [2, 2, 1], rtol=1e-6)
    assert geometry.streaming_pcgrad(gram, range(3), noise=0.0).max() > 100, "noise is what makes the difference"


def stream_by_hand(net, losses, order, priorities=(1.0, 1.0, 1.0), present=NAMES):
    """Rows over the trunk and gradients of the heads by autograd, and the projections on flat vectors."""
    trunk = list(net.trunk.parameters())
    rows = [
        priorities[i]
        * torch.cat([g.flatten() for g in torch.autograd.grad(losses[n], trunk, retain_graph=True)]).numpy()
        for i, n in enumerate(present)
    ]
    parts = torch.from_numpy(literal(rows, order)).split([p.numel() for p in trunk])
    heads = list(net.heads.parameters())
    return (
        [part.view(p.shape) for part, p in zip(parts, trunk, strict=True)],
        torch.autograd.grad(sum(losses.values()), heads, retain_graph=True, allow_unused=True),
        [float(np.linalg.norm(row)) / priority for row, priority in zip(rows, priorities, strict=True)],
    )


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": False}, {"seed": 7}, {"reduction": "mean"}, {"preference": [1.0, 4.0, 0.5]}]
)
def test_streaming_step(options):
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, **options)
    orders, projected = set(), 0
    for t in range(6):
        losses = losses_of(net(inputs(t, torch.float64)))
        order = range(3) if options.get("shuffle") is False else drawn(optimizer, t, 3)
        orders.add(tuple(order))
        trunk, heads, norms = stream_by_hand(net, losses, order, options.get("preference", (1.0, 1.0, 1.0)))
        optimizer.zero_grad()
        report = optimizer.backward(losses)
        share = 1 / 3 if "reduction" in options else 1.0
        for p, g in zip(net.parameters(), [*trunk, *heads], strict=True):
            torch.testing.assert_close(p.grad, share * g, rtol=1e-9, atol=1e-12)
        # The weights are those of the gradients as they are.
        again = losses_of(net(inputs(t, torch.float64)))
        weighted = sum(report.weights[n] * loss for n, loss in again.items())
        for p, g in zip(
            net.trunk.parameters(), torch.autograd.grad(weighted, list(net.trunk.parameters())), strict=True
        ):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        assert report.engine == "streaming"
        assert report.gram is None
        assert list(report.norms.values()) == pytest.approx(norms)
        priorities = options.get("preference", (1.0, 1.0, 1.0))
        projected += any(w > 1.001 * share * c for w, c in zip(report.weights.values(), priorities, strict=True))
        optimizer.step()
    assert projected, "without conflict this tests nothing"
    assert len(orders) == 1 if options.get("shuffle") is False else len(orders) > 1


def test_an_evaluation_that_is_repeated_draws_the_same():
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True)
    reports = []
    for _ in range(3):
        optimizer.zero_grad()
        reports.append(optimizer.backward(losses_of(net(inputs(0, torch.float64)))).weights)
    assert reports[0] == reports[1] == reports[2]


def test_graphs_in_any_order():
    """Losses share parts of their graphs in pairs, and come in another order than that of the list."""
    for seed in range(12):
        net = Net()
        optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, seed=seed)
        z = torch.tanh(net.trunk(inputs(0, torch.float64)))
        first, last = [net.heads[0](z.exp()), net.heads[1](z.exp())], net.heads[2](net.trunk(inputs(1, torch.float64)))
        optimizer.backward([last.square().mean(), first[0].square().mean(), first[1].square().mean()])
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("absent", ["a", "c"])
def test_streaming_with_an_absent_task(absent):
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True)
    losses = losses_of(net(inputs(0, torch.float64)))
    present = [n for n in NAMES if n != absent]
    kept = {n: losses[n] for n in present}
    trunk, heads, _ = stream_by_hand(net, kept, range(2), (1.0, 1.0), present)
    report = optimizer.backward({**losses, absent: None})
    assert list(report.weights) == present
    for p, g in zip(net.parameters(), [*trunk, *heads], strict=True):
        if g is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_tasks_without_a_shared_parameter_take_no_part():
    p, q = nn.Parameter(torch.tensor([1.0, 0.0])), nn.Parameter(torch.ones(2))
    optimizer = PCGrad(torch.optim.SGD([p, q], lr=0.1), streaming=True, shuffle=False)
    rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
    report = optimizer.backward([rows[0] @ p, q.sum(), rows[1] @ p])
    assert p.grad.tolist() == pytest.approx([-2.281188118811881, 5.988118811881188])
    assert q.grad.tolist() == [1.0, 1.0]
    assert report.weights["1"] == 1.0
    lone = PCGrad(torch.optim.SGD([p, q], lr=0.1), streaming=True).backward([p.sum(), q.sum()])
    assert lone.flags == ("nothing-shared",)
    assert (lone.norms, lone.engine) == (None, "streaming")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streaming_adds_up_in_single_precision(dtype):
    """256 + 1 + 1 in bfloat16, or 2048 + 1 + 1 in float16, would not move."""
    big = 256.0 if dtype is torch.bfloat16 else 2048.0
    p = nn.Parameter(torch.zeros(3, 2, dtype=dtype).t())
    losses = [(p * c).sum().float() for c in (big, 1.0, 1.0)]
    PCGrad(torch.optim.SGD([p], lr=0.1), streaming=True, shuffle=False).backward(losses)
    assert p.grad.tolist() == [[big + 2] * 3] * 2
    assert p.grad.dtype == dtype
    assert p.grad.stride() == p.stride()


def test_streaming_complex_and_sparse():
    table = nn.Embedding(4, 1, sparse=True).double()
    c = nn.Parameter(torch.tensor([1 + 2j], dtype=torch.complex128))
    grads = []
    for options in ({"streaming": True}, {"engine": "rows"}):
        optimizer = PCGrad(torch.optim.SGD([*table.parameters(), c], lr=0.1), **options)
        optimizer.zero_grad()
        u = table(torch.tensor([1, 1, 2])).sum() + c.real.sum()
        v = c.imag.sum() - 3 * table(torch.tensor([1])).sum()
        optimizer.backward([u, v])
        grads.append([table.weight.grad, c.grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_streaming_names_parameters_where_the_graph_does_not():
    def run(**options):
        net = Net()
        optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, **options)
        z = checkpoint(net.trunk, inputs(0, torch.float64).requires_grad_(), use_reentrant=True)
        optimizer.backward({n: head(z).square().mean() for n, head in zip(NAMES, net.heads, strict=True)})
        return net

    with pytest.raises(RuntimeError, match="Name them in `shared_params`"):
        run()
    net = Net()
    names = list(net.trunk.parameters())
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, shared_params=names)
    grads = []
    for reentrant in (True, False):
        optimizer.zero_grad()
        z = checkpoint(net.trunk, inputs(0, torch.float64).requires_grad_(), use_reentrant=reentrant)
        optimizer.backward({n: head(z).square().mean() for n, head in zip(NAMES, net.heads, strict=True)})
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["value", "gradient", "private"])
@pytest.mark.parametrize("policy", ["raise", "skip", "scaler"])
def test_streaming_writes_nothing_that_is_not_finite(policy, what):
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if policy == "scaler" else None
    base = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = PCGrad(base, streaming=True, nonfinite="raise" if policy == "scaler" else policy)
    residuals = net(inputs(0, torch.float64))
    losses = losses_of(residuals)
    if what == "value":
        losses["b"] = losses["b"] * float("inf")
    elif what == "gradient":
        losses["b"] = losses["b"] + (residuals["b"] - residuals["b"].detach()).abs().sqrt().sum()
    else:
        bias = net.heads[1].bias
        losses["b"] = losses["b"] + (bias - bias.detach()).abs().sqrt().sum()
    if policy == "raise":
        with pytest.raises(
            RuntimeError, match=f"the {'value' if what == 'value' else 'gradient'} of 'b' is not finite"
        ):
            optimizer.backward(losses)
    else:
        report = optimizer.backward(losses, scaler=scaler)
        assert "nonfinite" in report.flags
    if policy == "scaler":
        before = copy.deepcopy(net.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert same(net.state_dict(), before)
    else:
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


def test_streaming_sees_through_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=100)
    net, _, report = train(PCGrad, {"streaming": True}, dtype=torch.float32)
    scaled = Net(torch.float32)
    optimizer = PCGrad(torch.optim.SGD(scaled.parameters(), lr=0.01, momentum=0.9), streaming=True)
    for t in range(4):
        optimizer.zero_grad()
        told = optimizer.backward(losses_of(scaled(inputs(t, torch.float32))), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(net.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert told.norms == pytest.approx(report.norms)


def test_a_failure_in_the_middle_loses_nothing():
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, shuffle=False)
    optimizer.backward(losses_of(net(inputs(0, torch.float64))))
    before = [p.grad.clone() for p in net.parameters()]
    losses = losses_of(net(inputs(1, torch.float64)))

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        optimizer.backward({**losses, "c": Breaks.apply(losses["c"])})
    for p, g in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 1}, "of the previous call"


def test_a_monitor_shows_norms_and_weights():
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True)
    with gradsurgery.Monitor(optimizer) as monitor:
        for t in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses_of(net(inputs(t, torch.float64))))
            optimizer.step()
    assert (monitor.column("norm", "a") > 0).all()
    assert (monitor.column("weight", "a") >= 1).all()


def test_streaming_warmup_and_features():
    net = Net()
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), streaming=True, shuffle=False, warmup=1)
    assert optimizer.backward(losses_of(net(inputs(0, torch.float64)))).flags == ("warmup",)
    optimizer.step()
    z = torch.tanh(net.trunk(inputs(0, torch.float64)))
    losses = [(-1.0) ** k * head(z).mean() for k, head in enumerate(net.heads)]
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses])
    report = optimizer.backward(losses, features=z)
    expected = geometry.streaming_pcgrad((rows @ rows.T).numpy(), range(3))
    assert list(report.weights.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 4}, "`every`=4"),
        ({"weight_momentum": 0.5}, "`weight_momentum`=0.5"),
        ({"min_weight": 0.1}, "`min_weight`=0.1"),
        ({"max_weight": 2.0}, "`max_weight`=2.0"),
        ({"normalize": "l2"}, "`normalize`='l2'"),
        ({"log_losses": True}, "`log_losses`=True"),
        ({"granularity": "group"}, "`granularity`='group'"),
        ({"engine": "ghosts"}, "`engine`='ghosts'"),
        ({"engine": "blocks"}, "`engine`='blocks'"),
        ({"row_dtype": torch.bfloat16}, "`row_dtype`=torch.bfloat16"),
        ({"row_device": "cpu"}, "`row_device`="),
        ({"distributed": True}, "`distributed` or `process_group`"),
    ],
)
def test_streaming_refuses_what_needs_rows(options, named):
    with pytest.raises(ValueError, match=f"PCGrad: streaming=True excludes {named}"):
        PCGrad(any_optimizer(), streaming=True, **options)


def test_streaming_refuses_a_weighter_inside():
    with pytest.raises(ValueError, match=r"excludes a weighter inside \(UncertaintyWeighter\)"):
        PCGrad(gradsurgery.UncertaintyWeighter(any_optimizer()), streaming=True)
