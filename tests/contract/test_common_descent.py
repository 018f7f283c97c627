"""No loss rises along the gradient that is written, in the dtype in which it is written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradsurgery
from gradsurgery import geometry
from gradsurgery.gradients import descent
from gradsurgery.gradients import gram as gram_module
from tests.support.catalogue import ALL, CATALOGUE, any_optimizer
from tests.support.processes import run_cases, same_everywhere
from tests.support.two_heads import Nothing

PROMISING = {row.name: row for row in CATALOGUE if row.common_descent}
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
FLAG = "loss-may-rise"


def exact_dot(a, b):
    """Inner product of float64 vectors, rounded once."""

    def halves(x):
        far = x * 134217729.0
        high = far - (far - x)
        return high, x - high

    product, (p, q), (r, s) = a * b, halves(a), halves(b)
    return math.fsum(np.concatenate([product, ((p * r - product) + p * s + q * r) + q * s]).tolist())


def rise(rows, d):
    """The largest −⟨gᵢ, d⟩ in units of u Σₖ |gᵢₖ| |dₖ|; 0 where no loss rises."""
    x = d.double().numpy()
    assert np.isfinite(x).all()
    x = x / (np.abs(x).max() or 1.0)
    worst = 0.0
    for g in rows.double().numpy():
        g = g / 2.0 ** math.frexp(np.abs(g).max())[1]  # exact
        if (product := exact_dot(g, x)) < 0:
            worst = max(worst, -product / float(np.abs(g) @ np.abs(x)))
    return worst / ROUNDOFF[d.dtype]


def per_sample(rng, m=8, n=20):
    """Gradients of a logistic regression on single samples, two inputs with both labels."""
    x, y = rng.normal(size=(m, n)), rng.integers(0, 2, m)
    x[1], x[3], y[:4] = x[0], x[2], (0, 1, 1, 0)
    return (1 / (1 + np.exp(-x @ rng.normal(size=n) * 0.3)) - y)[:, None] * x


def opposed(rng, m, n):
    rows = rng.normal(size=(m, n))
    for i in range(0, m - 1, 2):
        off = 1 + 10.0 ** rng.uniform(-9, -1) * rng.normal(size=n)
        rows[i + 1] = -rows[i] * 10.0 ** rng.uniform(-1, 1) * off
    return rows


def dependent(rng, m, n):
    rows = rng.normal(size=(m, n))
    rows[-1] = rng.normal(size=m - 1) @ rows[:-1] + 10.0 ** rng.uniform(-9, -1) * rng.normal(size=n)
    return rows


def duplicated(rng, m, n):
    rows = rng.normal(size=(m, n))
    rows[-1] = rows[0] * rng.choice([-1, 1, 2, -0.3])
    return rows


KINDS = {
    "random": lambda rng, m, n: rng.normal(size=(m, n)),
    "opposed": opposed,
    "dependent": dependent,
    "duplicated": duplicated,
    "scaled": lambda rng, m, n: rng.normal(size=(m, n)) * 10.0 ** rng.uniform(-15, 15, size=(m, 1)),
    "sparse": lambda rng, m, n: rng.normal(size=(m, n)) * (rng.random((m, n)) < 0.3),
    "per sample": lambda rng, m, n: per_sample(rng),
}


def drawn(kind, seed, dtype, most):
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    m, n = min(int(rng.integers(2, 7)), most), int(rng.integers(2, 40))
    return torch.tensor(KINDS[kind](rng, m, n)[:most]).to(dtype)


def direction(row, rows):
    """The direction, and the flags."""
    optimizer = row.build(any_optimizer())
    found = optimizer.combine(rows, losses=np.arange(1.0, len(rows) + 1) if row.needs_losses else None)
    return found, optimizer.transaction.flags


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("name", PROMISING)
def test_no_loss_rises_along_what_is_written(name, dtype):
    row = PROMISING[name]
    for kind in KINDS:
        for seed in range(6):
            rows = drawn(kind, seed, dtype, row.common_descent)
            d, flags = direction(row, rows)
            assert rise(rows, d) <= 4, (kind, seed)
            assert FLAG not in flags, (kind, seed)


@given(
    st.sampled_from(sorted(PROMISING)),
    st.sampled_from(list(ROUNDOFF)),
    st.sampled_from(list(KINDS)),
    st.integers(0, 2**32),
)
def test_no_loss_rises_or_the_report_says_so(name, dtype, kind, seed):
    rows = drawn(kind, seed, dtype, PROMISING[name].common_descent)
    d, flags = direction(PROMISING[name], rows)
    assert rise(rows, d) <= 4 or FLAG in flags
    # Single and half precision have double precision to be corrected in.
    assert FLAG not in flags or (dtype == torch.float64 and kind in ("opposed", "dependent", "duplicated"))


@pytest.mark.parametrize("name", ["DualProj", "UPGrad"])
def test_what_rounding_leaves_of_rows_on_one_line_is_zero(name):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 6))
        g, h = rng.normal(size=(2, n))
        rows = [g, -g * rng.choice([1, 3, 0.1, 1 / 3]), g * rng.choice([0.7, 1e-3]), h][: int(rng.integers(2, 5))]
        d, flags = direction(PROMISING[name], torch.tensor(np.array(rows)))
        assert rise(torch.tensor(np.array(rows)), d) <= 4, seed
        assert FLAG not in flags, seed


def test_what_is_declared_is_what_is_held():
    for name, row in PROMISING.items():
        optimizer = row.build(any_optimizer())
        optimizer.combine(torch.eye(2), losses=[1.0, 2.0])
        # Entry by entry nothing cancels, so that there is no sum to be held.
        held = row.common_descent if optimizer.has_weights else 0
        assert min(optimizer.descends, ALL) == held, name
    for row in CATALOGUE:
        if not row.common_descent:
            assert row.build(any_optimizer()).descends == 0, row.name


# ------------------------------------------------------------------------------------------- through backward


class Logistic(nn.Module):
    """A regression on single samples, two inputs with both labels; wide enough for ghosts."""

    def __init__(self, dtype=torch.float32, hidden=None):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = (
            nn.Linear(20, 1)
            if hidden is None
            else nn.Sequential(nn.Linear(20, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        )
        self.to(dtype)

    def losses(self, seed, m=8):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(m, 20, generator=generator), torch.randint(0, 2, (m,), generator=generator)
        x[1], y[:2] = x[0], torch.tensor([0, 1])
        if m > 3:
            x[3], y[2:4] = x[2], torch.tensor([1, 0])
        dtype = next(self.parameters()).dtype
        out = self.trunk(x.to(dtype))[:, 0].float() if dtype == torch.bfloat16 else self.trunk(x.to(dtype))[:, 0]
        return list(nn.functional.binary_cross_entropy_with_logits(out, y.to(out.dtype), reduction="none").unbind())


def train(net, optimizer, steps=12, m=8, scaler=None, parts=1):
    """The largest rise over some steps, and the engines."""
    params = list(net.parameters())
    worst, engines = 0.0, set()
    for t in range(steps):
        optimizer.zero_grad()
        whole = [torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype) for _ in range(m)]
        scale = 1.0 if scaler is None else scaler.get_scale()
        for k in range(parts):
            losses = net.losses(t * parts + k, m)
            for i, loss in enumerate(losses):
                row = torch.autograd.grad(loss, params, torch.tensor(scale, dtype=loss.dtype), retain_graph=True)
                whole[i] += torch.cat([g.flatten() for g in row])
            options = {} if scaler is None else {"scaler": scaler}
            report = optimizer.backward(losses, accumulate=k < parts - 1, **options)
        worst = max(worst, rise(torch.stack(whole), torch.cat([p.grad.flatten() for p in params])))
        assert FLAG not in report.flags
        engines.add(report.engine)
        optimizer.step()
    return worst, engines


SWITCHES = {
    "rows": {"engine": "rows"},
    "mean": {"reduction": "mean"},
    "row_device": {"row_device": "cpu"},
    "log_losses": {"log_losses": True},
}


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj, gradsurgery.MGDA, gradsurgery.NashMTL])
def test_no_loss_rises_in_training(method, switches, dtype):
    net = Logistic(dtype)
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), **switches)
    assert train(net, optimizer)[0] <= 4


def test_no_loss_rises_for_fairgrad_next_to_the_sum():
    net = Logistic()
    assert train(net, gradsurgery.FairGrad(torch.optim.SGD(net.parameters(), lr=0.1), alpha=0.1))[0] <= 4


@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj])
def test_priorities_keep_the_promise(method):
    net = Logistic()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    assert train(net, method(base, preference=[1.0, 2.0, 0.3, 4.0, 1.0, 1.0, 7.0, 0.1]))[0] <= 4


@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj, gradsurgery.MGDA])
def test_micro_batches_and_a_loss_scale_keep_the_promise(method):
    net = Logistic()
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1))
    assert train(net, optimizer, parts=2, steps=6)[0] <= 4
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    assert train(net, optimizer, scaler=scaler, steps=6)[0] <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ["rows", "ghosts", "blocks"])
@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj])
def test_no_loss_rises_whatever_the_engine(method, engine, dtype):
    net = Logistic(dtype, hidden=200)
    optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
    worst, engines = train(net, optimizer, steps=5)
    assert worst <= 4
    # Two inputs with both labels: what is nearly opposed is looked at as rows.
    assert engines == {"rows"}


def test_a_part_of_the_model_keeps_the_promise_for_itself():
    net = Logistic(hidden=30)
    params = list(net.parameters())
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(params, lr=0.1), granularity="parameter")
    for t in range(5):
        optimizer.zero_grad()
        losses = net.losses(t)
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        assert FLAG not in optimizer.backward(losses).flags
        for j, p in enumerate(params):
            assert rise(torch.stack([row[j].flatten() for row in rows]), p.grad.flatten()) <= 4
        optimizer.step()


def test_streaming_of_two_keeps_the_promise():
    net = Logistic()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), streaming=True)
    assert train(net, optimizer, m=2)[0] <= 4


def test_complex_sparse_and_mixed_parameters_are_written_as_they_are():
    torch.manual_seed(0)
    table = nn.Embedding(5, 4, sparse=True)
    wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    half = nn.Parameter(torch.randn(4).to(torch.bfloat16))
    params = [table.weight, wave, half]
    # SGD takes no dense gradient on top of a sparse one; nothing is stepped here.
    optimizer = gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1))
    z = table(torch.tensor([1, 3])).sum(0) + (wave * torch.arange(1, 5)).abs() + half.float()
    first = (z * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()
    report = optimizer.backward([first, -first * 1.7 + 1e-6 * z.square().sum()])
    assert FLAG not in report.flags
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]
    assert all(p.grad.shape == p.shape for p in params)


@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj])
def test_a_corrected_sum_out_of_range_is_skipped_like_any_other(method):
    p = nn.Parameter(torch.zeros(3))
    opposed = [[1e38, 0.7e38, 0.0], [-1.7e38, -1.19e38 * (1 + 2e-7), 0.0]]
    losses = [(torch.tensor(row) * p).sum() for row in (*opposed, [0.0, 0.0, 3e38], [0.0, 0.0, 3e38])]
    report = method(torch.optim.SGD([p], lr=0.1), nonfinite="skip").backward(losses)
    assert report.flags == ("nonfinite", "skipped")
    assert p.grad is None


def test_parameters_that_no_loss_reaches_get_no_part_of_what_is_corrected():
    torch.manual_seed(0)
    wave, silent, empty = (nn.Parameter(torch.randn(n)) for n in (4, 3, 0))
    z = wave + Nothing.apply(silent).sum() + empty.sum()
    first = (z * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()
    losses = [first, -first * 1.7 + 1e-6 * z.square().sum()]
    rows = torch.stack([torch.autograd.grad(loss, wave, retain_graph=True)[0] for loss in losses])
    params = [wave, silent, empty]
    gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1), shared_params=params).backward(losses)
    assert rise(rows, wave.grad) <= 4
    assert silent.grad is None
    assert empty.grad.shape == (0,)


def descends_over_processes(rank, size):
    """Every process has the same batch, so that sums over them are exact multiples."""

    def case(method, shard):
        net = Logistic()
        rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in net.losses(0)]
        matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        options = {} if shard else {"distributed": True}
        if shard:
            fully_shard(net.trunk)
        optimizer = method(torch.optim.SGD(net.parameters(), lr=0.1), **options)
        report = optimizer.backward(net.losses(0))
        grads = [p.grad.full_tensor() if shard else p.grad for p in net.parameters()]
        same_everywhere(grads)
        assert FLAG not in report.flags
        assert rise(matrix, torch.cat([g.flatten() for g in grads])) <= 4

    return {
        f"{method.__name__}, {'sharded' if shard else 'slices'}": lambda method=method, shard=shard: case(method, shard)
        for method in (gradsurgery.UPGrad, gradsurgery.DualProj)
        for shard in (False, True)
    }


def test_no_loss_rises_over_processes(tmp_path):
    told = run_cases(descends_over_processes, 2, tmp_path)
    assert not any(told.values()), told


# ------------------------------------------------------------------------------------------------ the pieces


@pytest.mark.parametrize("switches", [{"weight_momentum": 0.5}, {"max_weight": 2.0}, {"min_weight": 0.5}])
def test_switches_that_change_weights_afterwards_break_the_promise_and_nothing_is_corrected(switches, monkeypatch):
    monkeypatch.setattr(descent, "held", lambda *args, **options: pytest.fail("corrected"))
    gradsurgery.UPGrad(any_optimizer(), **switches).combine(torch.tensor([[1.0, 0.0], [-1.0, 1e-7]]))


def test_the_flag_says_where_a_loss_may_rise(monkeypatch):
    monkeypatch.setattr(geometry, "shift", lambda columns, bounds: None)
    rows = torch.tensor(per_sample(np.random.default_rng(0))).float()
    monkeypatch.setattr(descent.Direction, "rounded", lambda self, flat: flat - rows[0].double())
    assert FLAG in direction(PROMISING["UPGrad"], rows)[1]
    w = nn.Parameter(torch.zeros(rows.shape[1]))
    assert FLAG in gradsurgery.UPGrad(torch.optim.SGD([w], lr=0.1)).backward(list(rows @ w)).flags


def test_a_loss_of_weight_zero_is_promised_nothing():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    inner = gradsurgery.FixedWeighter(torch.optim.SGD([w], lr=0.1), weights={"a": 1.0, "b": 0.0})
    report = gradsurgery.UPGrad(inner).backward({"a": w[0], "b": w[1] - w[0]})
    assert w.grad.tolist() == [1.0, 0.0]
    assert not report.flags


@pytest.mark.parametrize("exponent", [-900, 900])
@pytest.mark.parametrize("kind", ["opposed", "duplicated"])
def test_no_loss_rises_where_squares_leave_double_precision(kind, exponent, monkeypatch):
    corrected = []
    find = descent.Direction.find

    def noted(self, weights):
        find(self, weights)
        corrected.append(self.table.unit != 1 and (self.weights != weights).any())

    monkeypatch.setattr(descent.Direction, "find", noted)
    for seed in range(12):
        rows = drawn(kind, seed, torch.float64, 6)
        d, flags = direction(PROMISING["DualProj"], rows * 2.0**exponent)
        assert rise(rows, d / 2.0**exponent) <= 4, seed
        assert flags == direction(PROMISING["DualProj"], rows)[1], seed
    assert any(corrected)


def test_the_report_has_the_weights_of_what_was_corrected(monkeypatch):
    found = []
    find = descent.Direction.find

    def noted(self, weights):
        find(self, weights)
        found.append((weights, self.weights))

    monkeypatch.setattr(descent.Direction, "find", noted)
    rows = drawn("opposed", 3, torch.float64, 6)
    w = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    report = gradsurgery.DualProj(torch.optim.SGD([w], lr=0.1)).backward(list(rows @ w))
    ((before, after),) = found
    assert np.abs(before - after).max() > 0.1
    np.testing.assert_array_equal(list(report.weights.values()), after)


def test_a_sum_without_doubt_is_taken_as_ever(monkeypatch):
    monkeypatch.setattr(descent, "Direction", lambda *args, **options: pytest.fail("looked at"))
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.float64):
        for n in (50, 100_000):
            rows = torch.tensor(rng.normal(size=(4, n))).to(dtype)
            for method in (gradsurgery.UPGrad, gradsurgery.MGDA, gradsurgery.NashMTL):
                method(any_optimizer()).combine(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_in_single_precision_are_looked_at_sooner(dtype):
    gram, weights = np.array([[1.0, 4e-6 - 1], [4e-6 - 1, 1.0]]), np.ones(2)
    certain = {
        n: descent.is_certain(gram_module.Table(torch.zeros(2, n, dtype=dtype)), gram, weights) for n in (2, 2**17)
    }
    assert certain == {2: True, 2**17: dtype == torch.float64}


def test_products_of_many_entries_of_one_sign_are_not_trusted():
    # A float32 product over equal entries is off by much more than its roundoff.
    rng = np.random.default_rng(0)
    n = 140_000
    first = torch.full((n,), 0.7) * torch.tensor(1.0 + 1e-3 * rng.random(n)).float()
    rows = torch.stack([first, -first * torch.tensor(1.0 + 1e-5 * rng.random(n)).float(), torch.rand(n)])
    for name in ("DualProj", "UPGrad"):
        d, flags = direction(PROMISING[name], rows)
        assert rise(rows, d) <= 4
        assert FLAG not in flags


def test_weights_that_float32_cannot_hold():
    rows = torch.tensor([[1e-20, 1e-20, 0.0], [-1e20, 1e19, 1e20]])
    for name in ("DualProj", "UPGrad", "MGDA", "NashMTL"):
        d, _ = direction(PROMISING[name], rows)
        assert rise(rows, d) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_rows_and_of_their_sizes_have_the_signs_of_the_weights(dtype):
    table = gram_module.Table([[torch.tensor([1.0, -2.0], dtype=dtype)], [torch.tensor([3.0, 4.0], dtype=dtype)]])
    sums = descent.Direction(table, [dtype])
    weights = np.array([-1.0, 2.0])
    assert sums.sum(weights).tolist() == [5.0, 10.0]
    assert sums.sum(weights, sizes=True).tolist() == [7.0, 10.0]


def test_columns_that_another_process_counts_are_left_out_of_products_alone():
    rows = [[torch.tensor([1.0, -2.0]), torch.tensor([5.0])], [torch.tensor([3.0, 4.0]), torch.tensor([7.0])]]
    table = gram_module.Table([[row[0], None] for row in rows])
    found = descent.Direction(table, [torch.float32] * 2, rows, [True, False])
    assert found.sum(np.array([-1.0, 2.0])).tolist() == [5.0, 10.0, 9.0]
    products, limits = found.products(torch.tensor([5.0, 10.0, 9.0], dtype=torch.float64))
    assert products.tolist() == [-15.0, 55.0]
    assert (limits * 2.0**24).tolist() == [25.0, 55.0]


def test_a_sum_that_descends_at_once_takes_no_round(monkeypatch):
    monkeypatch.setattr(descent, "_ROUNDS", 0)
    found = descent.Direction(
        gram_module.Table([[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]]), [torch.float32]
    )
    found.find(np.ones(2))
    assert found.descends


def test_rows_are_corrected_beside_one_of_zeros():
    for seed in range(1, 4):
        rows = torch.cat([torch.tensor(per_sample(np.random.default_rng(seed))), torch.zeros(1, 20)])
        for name in ("DualProj", "UPGrad"):
            d, flags = direction(PROMISING[name], rows)
            assert rise(rows[:-1], d) <= 4, (seed, name)
            assert FLAG not in flags


def test_inner_products_in_twice_the_precision():
    rng = np.random.default_rng(0)
    rows, d = rng.normal(size=(3, 1001)), rng.normal(size=1001)
    rows[1] -= d * (rows[1] @ d) / (d @ d)  # cancels
    found = descent._dots(torch.from_numpy(rows), torch.from_numpy(d)).numpy()
    wanted = [exact_dot(row, d) for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert abs((rows @ d - wanted)[1]) > 1e-6 * abs(wanted[1])
    table = gram_module.Table([[torch.from_numpy(row)] for row in rows])
    np.testing.assert_array_equal(descent.Direction(table, [torch.float64]).products(torch.from_numpy(d))[0], found)


def test_a_factor_tells_rows_apart_that_differ_in_the_last_digit():
    rng = np.random.default_rng(0)
    first = rng.normal(size=50).astype(np.float32)
    second = -first
    second[7] = np.nextafter(second[7], np.float32(9))
    rows = torch.from_numpy(np.stack([first, second]))
    columns = geometry.unit_rows(lambda: gram_module.triangle(rows))[1]
    least = np.linalg.svd(columns, compute_uv=False)[-1]
    wanted = np.linalg.svd(rows.double().numpy() / rows.double().norm(dim=1, keepdim=True).numpy(), compute_uv=False)[
        -1
    ]
    assert least == pytest.approx(wanted, rel=1e-4)


def test_shift_is_the_shortest():
    rng = np.random.default_rng(1)
    for _ in range(50):
        columns = rng.normal(size=(5, 4))
        columns /= np.linalg.norm(columns, axis=0)
        bounds = rng.normal(size=4)
        found = geometry.shift(columns, bounds)
        assert found.min() >= -1e-12
        slack = columns.T @ columns @ found - bounds
        assert slack.min() >= -1e-9
        assert abs(found @ slack) <= 1e-9  # what pushes is met with equality
    assert geometry.shift(np.array([[1.0, -1.0]]), np.array([1.0, 0.5])) is None
    assert not geometry.shift(columns, -np.ones(4)).any()


# ------------------------------------------------------------------------------- beside a regularised projection


def regularised(rows, epsilon=1e-4):
    """UPGrad on the normalised Gram matrix plus ε I, as TorchJD solves it."""
    j = rows.double().numpy()
    gram = j @ j.T
    gram = gram / np.trace(gram) + epsilon * np.eye(len(j))
    root = np.linalg.cholesky(gram).T
    weights = sum(unit + lsq_linear(root, -root @ unit, bounds=(0, np.inf), tol=1e-14).x for unit in np.eye(len(j)))
    return torch.from_numpy(weights).float() @ rows


def made(m, n, rank, rng):
    """Matrices as that library's tests describe them: of given rank, weakly stationary, strongly stationary."""
    u, _ = np.linalg.qr(rng.normal(size=(m, m)))
    v, _ = np.linalg.qr(rng.normal(size=(n, n)))
    size = np.abs(rng.normal(size=rank)) + 1e-6
    plain = u[:, :rank] * size @ v[:, :rank].T
    u[:, 0] = np.abs(rng.normal(size=m)) + 0.1  # a positive combination of the rows vanishes
    strong, _ = np.linalg.qr(u)
    rank = min(rank, m - 1)
    stationary = strong[:, 1 : rank + 1] * size[:rank] @ v[:, :rank].T
    return plain, stationary


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_no_worse_than_a_regularised_projection(scale):
    rng = np.random.default_rng(0)
    broken = 0
    for m, n, rank in [(2, 5, 2), (3, 3, 2), (5, 9, 4), (9, 11, 5), (9, 11, 9), (4, 30, 2)]:
        for matrix in made(m, n, rank, rng):
            rows = torch.tensor(scale * matrix).float()
            d, flags = direction(PROMISING["UPGrad"], rows)
            assert FLAG not in flags
            assert rise(rows, d) <= 4
            broken += rise(rows, regularised(rows)) > 4
    assert broken  # the matrices are hard enough to tell the two apart
