"""Numbers at the ends of the range: what is finite stays right, and what cannot be held is never written."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradsurgery
from tests.support import catalogue


def fresh(dtype, *values):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


# ------------------------------------------------------------------------------ weights that a dtype cannot hold

TINY = {  # losses so small that their reciprocal leaves the dtype
    "RealTimeWeighter, half": (gradsurgery.RealTimeWeighter, torch.float16, 1e-5),
    "RealTimeWeighter, single": (gradsurgery.RealTimeWeighter, torch.float32, 1e-39),
    "InitialLossWeighter": (gradsurgery.InitialLossWeighter, torch.float32, 1e-39),
    "RunningMaxWeighter": (gradsurgery.RunningMaxWeighter, torch.float32, 1e-39),
    "PCGrad over RealTimeWeighter": (
        lambda base: gradsurgery.PCGrad(gradsurgery.RealTimeWeighter(base)),
        torch.float32,
        1e-39,
    ),
    "PCGrad, loss": (lambda base: gradsurgery.PCGrad(base, normalize="loss"), torch.float32, 1e-39),
    "UPGrad, log": (lambda base: gradsurgery.UPGrad(base, log_losses=True), torch.float32, 1e-39),
    "MoCo, log": (lambda base: gradsurgery.MoCo(base, log_losses=True), torch.float32, 1e-39),
    "FixedWeighter": (lambda base: gradsurgery.FixedWeighter(base, weights={"a": 1e39, "b": 1.0}), torch.float32, 1.0),
    "MGDA, preference": (lambda base: gradsurgery.MGDA(base, preference={"a": 1e39, "b": 1e39}), torch.float32, 1.0),
    "bounded": (lambda base: gradsurgery.FixedWeighter(base, min_weight=1e39), torch.float32, 1.0),
}


def losses(w, size):
    """Two losses; the first has this value and an ordinary gradient."""
    first = w[0] * w[0]
    return {"a": first - first.detach() + size, "b": (w[1] - w[0]) ** 2 + 1.0}


@pytest.mark.parametrize(
    ("name", "accumulated"),
    [
        (name, accumulated)
        for name, (_, dtype, _) in TINY.items()
        for accumulated in (False, True)
        # Kept gradients are added up in single precision, which holds that weight.
        if not accumulated or dtype is torch.float32
    ],
)
def test_a_weight_that_the_dtype_cannot_hold_is_never_written(name, accumulated):
    build, dtype, size = TINY[name]
    if accumulated and dtype is torch.float16:
        pytest.skip("kept gradients are added up in single precision, which holds this weight")
    w = fresh(dtype, 1.0, 3.0)
    optimizer = build(SGD([w], lr=0.1))
    w.grad = torch.ones_like(w)
    before = optimizer.state_dict()
    if accumulated:
        optimizer.backward({"a": losses(w, 0.0)["a"], "b": None}, accumulate=True)
    with pytest.raises(RuntimeError, match=r"the weight of 'a'.* is out of range.*max_weight.*Nothing was written"):
        optimizer.backward(losses(w, size))
    assert w.grad.tolist() == [1.0, 1.0]
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", TINY)
def test_such_a_weight_obeys_nonfinite(name):
    build, dtype, size = TINY[name]
    w = fresh(dtype, 1.0, 3.0)
    optimizer = build(SGD([w], lr=0.1))
    optimizer.nonfinite = "skip"
    report = optimizer.backward(losses(w, size))
    assert {"nonfinite", "skipped"} <= set(report.flags)
    assert w.grad is None
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


@pytest.mark.parametrize("name", TINY)
def test_such_a_weight_makes_a_scaler_skip_the_step(name):
    build, dtype, size = TINY[name]
    w = fresh(dtype, 1.0, 3.0)
    optimizer = build(SGD([w], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.backward(losses(w, size), scaler=scaler)
    assert not torch.isfinite(w.grad).all()
    if dtype is not torch.float16:  # torch refuses to unscale half gradients
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1.0
    optimizer.zero_grad()
    assert w.tolist() == [1.0, 3.0]
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["surgery", "weighter", "inside"])
def test_a_weight_that_is_no_number_is_never_written(kind, value):
    class Broken(gradsurgery.MGDA):
        def weights(self, gram, losses):
            return [value, 1.0] * super().weights(gram, losses)

    class BrokenWeighter(gradsurgery.FixedWeighter):
        def weights(self, losses):
            return [value, 1.0] * super().weights(losses)

    w = fresh(torch.float64, 1.0, 3.0)
    optimizer = {
        "surgery": Broken,
        "weighter": BrokenWeighter,
        "inside": lambda base: gradsurgery.GradDrop(BrokenWeighter(base)),
    }[kind](SGD([w], lr=0.1))
    with pytest.raises(RuntimeError, match=r"the weight of 'a' is out of range .(nan|inf); "):
        optimizer.backward({"a": w[0] ** 2, "b": (w[1] - w[0]) ** 2})
    assert w.grad is None


@pytest.mark.parametrize("method", [gradsurgery.FixedWeighter, gradsurgery.PCGrad])
def test_the_largest_number_is_a_weight(method):
    largest = torch.finfo(torch.float32).max
    w = fresh(torch.float32, 1.0, 3.0)
    given = {"weights" if method is gradsurgery.FixedWeighter else "preference": {"a": largest, "b": 1.0}}
    method(SGD([w], lr=0.1), **given).backward({"a": w[0], "b": w[1]})
    assert w.grad.tolist() == [largest, 1.0]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_weight_of_a_row_that_a_method_added_is_told_of_all_losses(nonfinite):
    class Extra(gradsurgery.Surgery):
        observes = True

        def observe(self, rows, losses, params):
            return [*rows, rows[0]]

        def weights(self, gram, losses):
            return np.array([1.0, 1.0, 1e39])

    w = fresh(torch.float32, 1.0, 3.0)
    optimizer = Extra(SGD([w], lr=0.1), nonfinite=nonfinite)
    two = {"a": w[0] ** 2, "b": (w[1] - w[0]) ** 2}
    if nonfinite == "skip":
        assert "skipped" in optimizer.backward(two).flags
    else:
        with pytest.raises(RuntimeError, match=r"the weight of 'a', 'b' is out of range .1e\+39; "):
            optimizer.backward(two)
    assert w.grad is None


def test_an_infinite_weight_on_a_private_parameter_makes_a_scaler_skip_the_step():
    class Broken(gradsurgery.FixedWeighter):
        def weights(self, losses):
            return [math.inf, 1.0, 1.0] * super().weights(losses)

    v, w = fresh(torch.float32, 1.0), fresh(torch.float32, 1.0, 3.0)
    optimizer = gradsurgery.MoCo(Broken(SGD([v, w], lr=0.1)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.backward({"a": v[0] ** 2, "b": w[0] ** 2, "c": (w[1] - w[0]) ** 2}, scaler=scaler)
    assert not torch.isfinite(v.grad).any()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert v.tolist() == [1.0]


def test_streaming_looks_at_its_weights_too():
    w = fresh(torch.float32, 1.0, 3.0)
    optimizer = gradsurgery.PCGrad(SGD([w], lr=0.1), streaming=True, preference={"a": 1e39, "b": 1.0})
    with pytest.raises(RuntimeError, match="the weight of 'a' is out of range"):
        optimizer.backward({"a": w[0] + w[1], "b": w[0] - w[1]})
    assert w.grad is None


@pytest.mark.parametrize("name", ["rows", "streaming", "private", "parameter"])
def test_a_sum_that_overflows_a_parameter_is_never_written(name):
    """Half precision holds 65504: every row is in range here, and their sum is not."""
    build = {
        "rows": gradsurgery.PCGrad,
        "streaming": lambda base: gradsurgery.PCGrad(base, streaming=True),
        "private": lambda base: gradsurgery.PCGrad(base, shared_params=[v]),
        "parameter": lambda base: gradsurgery.UPGrad(base, granularity="parameter"),
    }[name]
    v, w = fresh(torch.float16, 1.0), fresh(torch.float16, 1.0)
    optimizer = build(SGD([v, w], lr=0.1))

    def two(size):
        return {"a": (w.float() * size + v.float()).sum(), "b": (w.float() * size * 0.9 + v.float()).sum()}

    with pytest.raises(RuntimeError, match="every gradient is finite, and their weighted sum overflows float16"):
        optimizer.backward(two(6e4))
    assert w.grad is None
    assert v.grad is None
    optimizer.backward(two(1e4))
    assert torch.isfinite(w.grad).all()
    optimizer.zero_grad()
    optimizer.nonfinite = "skip"
    assert {"nonfinite", "skipped"} <= set(optimizer.backward(two(6e4)).flags)
    assert w.grad is None
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"]["step"] == 0, "it has learnt from what was skipped"


@pytest.mark.parametrize("bad", ["a", "b"])
def test_of_two_losses_on_a_plain_parameter_the_one_whose_gradient_is_infinite_is_named(bad):
    v, w = fresh(torch.float64, 0.0), fresh(torch.float64, 1.0)
    optimizer = gradsurgery.PCGrad(SGD([v, w], lr=0.1), shared_params=w)
    two = {name: w[0] + (v[0].sqrt() if name == bad else v[0]) for name in "ab"}
    with pytest.raises(RuntimeError, match=f"the gradient of '{bad}' is not finite"):
        optimizer.backward(two)
    assert v.grad is w.grad is None


def test_a_sum_that_only_might_overflow_is_written():
    """The lengths of the rows add up to more than half precision holds, and no entry of their sum does."""
    w = fresh(torch.float16, 1.0, 1.0)
    report = gradsurgery.PCGrad(SGD([w], lr=0.1)).backward({"a": w.float()[0] * 6e4, "b": w.float()[1] * 6e4})
    assert w.grad.tolist() == [6e4, 6e4]
    assert not report.flags


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_gradients_of_a_single_pass_are_looked_at_where_steps_may_be_skipped(nonfinite):
    w = fresh(torch.float32, 0.0, 1.0)
    optimizer = gradsurgery.FixedWeighter(SGD([w], lr=0.1), nonfinite=nonfinite)
    report = optimizer.backward({"a": w[0].sqrt(), "b": w[1]})
    if nonfinite == "skip":
        assert {"nonfinite", "skipped"} <= set(report.flags)
        assert w.grad is None
    else:
        assert not report.flags
        assert w.grad.tolist() == [math.inf, 1.0]


def test_combine_refuses_what_the_dtype_cannot_hold():
    rows = torch.tensor([[6e4, 0.0], [6e4, 1.0]], dtype=torch.float16)
    for method in (gradsurgery.PCGrad, gradsurgery.GradDrop):
        with pytest.raises(RuntimeError, match="combine: every row is finite, and their weighted sum overflows"):
            method(SGD([torch.zeros(2)], lr=0.1)).combine(rows)
    optimizer = gradsurgery.MGDA(SGD([torch.zeros(2)], lr=0.1), preference=[1e39, 1e39])
    with pytest.raises(RuntimeError, match=r"combine: the weights .* are out of range"):
        optimizer.combine(torch.eye(2))


# --------------------------------------------------------------- rows whose squares leave float64, and far apart

EXTREME = [1e-300, 1e-170, 1e-80, 1e80, 1e160, 1e300]
ROWS = torch.tensor([[2.0, 1.0, 0.5, 0.0], [-1.0, 1.5, 0.0, 0.3], [0.2, -1.0, 1.0, 1.0]], dtype=torch.float64)
HOMOGENEOUS = {row.name: row for row in catalogue.CATALOGUE if row.homogeneous is not None}
ABSOLUTE = {row.name: row for row in catalogue.CATALOGUE if row.homogeneous is None}


def direction(row, rows):
    optimizer = row.build(SGD([torch.zeros(rows.shape[1], dtype=rows.dtype)], lr=0.1))
    return optimizer.combine(rows, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_rows_of_any_length_give_their_direction_or_an_error(name, size):
    row = HOMOGENEOUS[name]
    usual = direction(row, ROWS)
    expected = usual * size**row.homogeneous
    if row.build(SGD([torch.zeros(4)], lr=0.1)).degree is None:  # it compares with lengths of other steps
        with pytest.raises(RuntimeError, match="longer than 1e60 or shorter than 1e-60"):
            direction(row, ROWS * size)
        return
    if not torch.isfinite(expected).all() or abs(math.log10(size) * (row.homogeneous - 1)) > 307:  # of the weights
        with pytest.raises(RuntimeError, match="out of range"):
            direction(row, ROWS * size)
        return
    found = direction(row, ROWS * size)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=float(1e-10 * expected.abs().max()))


@pytest.mark.parametrize("size", [1e-170, 1e160])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_methods_with_absolute_numbers_refuse_rows_out_of_range(name, size):
    with pytest.raises(RuntimeError, match=r"longer than 1e60 or shorter than 1e-60.*Divide the losses"):
        direction(ABSOLUTE[name], ROWS * size)


REFUSING = {
    "PCD": gradsurgery.PCD,
    "MConFIG": gradsurgery.MConFIG,
    "MoCo": gradsurgery.MoCo,
    "MoDo": gradsurgery.MoDo,
    "PMGDA": lambda base: gradsurgery.PMGDA(base, scale="paper"),
}


@pytest.mark.parametrize(("size", "shown"), [(1e-100, "1e-100 to 1e-99"), (1e200, "1e200 to 1e200")])
@pytest.mark.parametrize("name", REFUSING)
def test_a_refusal_names_the_method_the_lengths_and_the_cure_and_writes_nothing(name, size, shown):
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = REFUSING[name](SGD([w], lr=0.1))
    with pytest.raises(RuntimeError, match=f"{name}: .*here they are about {shown} long.*Divide the losses by a const"):
        step(optimizer, w, size)
    assert w.grad is None
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


def step(optimizer, w, size, turn=0):
    optimizer.zero_grad()
    rows = size * ROWS.roll(turn, dims=1)
    # Losses in a ratio of their own, whatever their gradients are.
    optimizer.backward([g @ (w - w.detach()) + size * k for k, g in enumerate(rows, 1)])
    found = w.grad.clone()
    optimizer.step()
    return found


KEEPING = {
    "GCond": lambda base: gradsurgery.GCond(base, dominance_window=2),
    "MetaBalance": gradsurgery.MetaBalance,
    "ExcessMTL": lambda base: gradsurgery.ExcessMTL(base, eta=0.7),
}


@pytest.mark.parametrize("size", [1e-250, 1e-100, 1e100, 1e250])
@pytest.mark.parametrize("name", KEEPING)
def test_methods_that_compare_steps_do_so_at_any_length(name, size):
    def directions(size):
        w = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = KEEPING[name](SGD([w], lr=0.1 / size))
        return torch.stack([step(optimizer, w, size * (1 + turn), turn) for turn in range(4)]) / size

    torch.testing.assert_close(directions(size), directions(1.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1e-100, 1e100), (1e100, 1e-100), (1e-250, 1e30), (1e-170, 1.0), (1e-30, 1e30)])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_far_apart_in_length_are_projected_as_unit_rows(a, b, streaming):
    """Each unit row without its part along the other one, at its own length."""
    u, v = (r / r.norm() for r in (ROWS[0], torch.tensor([-1.0, 0.5, 0.0, 1.0], dtype=torch.float64)))
    cosine = u @ v
    assert cosine < 0
    w = [nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    optimizer = gradsurgery.PCGrad(SGD(w, lr=0.1), streaming=streaming)
    # Entries of their own show each projection whole, however small beside the other.
    report = optimizer.backward({"a": (a * u * w[0]).sum(), "b": (b * v * w[0]).sum()})
    expected = a * (u - cosine * v) + b * (v - cosine * u)
    torch.testing.assert_close(w[0].grad, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(list(report.norms.values()), [a, b], rtol=1e-9, atol=0)
    if not streaming:
        assert report.projections == 2
        assert report.conflict_rate == 1.0
        torch.testing.assert_close(report.cosines[0, 1], cosine, rtol=1e-9, atol=0)


def test_float32_rows_far_apart_are_projected():
    w = fresh(torch.float32, 0.0, 0.0)
    optimizer = gradsurgery.PCGrad(SGD([w], lr=0.1))
    report = optimizer.backward({"a": 1e-18 * w[0], "b": 1e18 * (w[1] - w[0])})
    assert report.projections == 2
    assert report.norms["a"] == pytest.approx(1e-18, rel=1e-6)
    torch.testing.assert_close(w.grad, torch.tensor([0.0, 1e18]), rtol=1e-6, atol=1e12)
    optimizer.zero_grad()
    report = optimizer.backward({"a": 1e-30 * w[0], "b": 1e30 * (w[1] - w[0])})
    assert report.weights["a"] > torch.finfo(torch.float32).max  # the sum is taken in double precision
    torch.testing.assert_close(w.grad, torch.tensor([0.0, 1e30]), rtol=1e-6, atol=1e24)


# ------------------------------------------------------------------ what multiplies rows out of the range of float64

PREFERENCE = [1.0, 2.0, 0.5]
PREFERRED = [  # the others refuse it by name
    name
    for name, row in HOMOGENEOUS.items()
    if row.build(SGD([torch.zeros(4)], lr=0.1)).preference_refused == ""
    and row.build(SGD([torch.zeros(4)], lr=0.1)).degree is not None
]


def preferred(name, preference, size=1.0):
    """The direction, and whether it is what the method asks for."""
    row = HOMOGENEOUS[name]
    optimizer = row.build(SGD([torch.zeros(4, dtype=torch.float64)], lr=0.1), preference=preference)
    return optimizer.combine(ROWS * size, [1.0, 2.0, 3.0]), "not-converged" not in optimizer.transaction.flags


def assert_preferred(name, preference, size, expected):
    try:
        found, converged = preferred(name, preference, size)
    except RuntimeError as error:
        assert "out of range" in str(error)  # noqa: PT017
        # The weights, not the direction: it falls with the length of the rows less than they do.
        assert HOMOGENEOUS[name].homogeneous < 1 or name.startswith(("MetaBalance", "GCond"))  # they keep lengths
    else:
        atol = float(1e-10 * expected.abs().max())
        if converged:
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("exponent", [-900, 900])
# The bounds of EPO know their size, and no coordinate of these rows is one that all agree on.
@pytest.mark.parametrize("name", [name for name in PREFERRED if name not in ("EPO", "AndMask")])
def test_a_common_factor_of_the_priorities_does_what_a_small_one_does(name, exponent):
    usual = preferred(name, PREFERENCE)[0]
    power = float((preferred(name, [4 * p for p in PREFERENCE])[0].norm() / usual.norm()).log2()) / 2
    assert_preferred(name, [p * 2.0**exponent for p in PREFERENCE], 1.0, usual * 2.0 ** (exponent * power))


@pytest.mark.parametrize("size", [1e-200, 1e200])
@pytest.mark.parametrize("factor", [1e-150, 1e150])
@pytest.mark.parametrize("name", PREFERRED)
def test_a_priority_takes_no_row_out_of_range(name, factor, size):
    usual, converged = preferred(name, [factor, 1.0, 1.0])
    expected = usual * size ** HOMOGENEOUS[name].homogeneous
    if not torch.isfinite(expected).all():
        with pytest.raises(RuntimeError, match=r"out of range|overflows"):
            preferred(name, [factor, 1.0, 1.0], size)
    elif converged:
        assert_preferred(name, [factor, 1.0, 1.0], size, expected)


TWO = torch.tensor([[2.0, 1.0, 0.5, 0.0], [-1.0, 0.5, 0.0, 0.3]], dtype=torch.float64)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def exact(method, rows):
    """The direction of two opposed rows, by fractions."""
    a, b = rows
    product, first, second = dot(a, b), dot(a, a), dot(b, b)
    if method is gradsurgery.MGDA:
        part = min(max((second - product) / (first - 2 * product + second), 0), 1)
        return [2 * (part * x + (1 - part) * y) for x, y in zip(a, b, strict=True)]
    return [(1 - product / first) * x + (1 - product / second) * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("preference", [(1e150, 1.0), (1.0, 1e150), (1e-150, 1.0), (1e90, 1e-90)], ids=str)
@pytest.mark.parametrize("size", [1e-200, 1e200])
@pytest.mark.parametrize("method", [gradsurgery.MGDA, gradsurgery.UPGrad, gradsurgery.PCGrad])
def test_priorities_and_long_rows_give_the_exact_direction_or_an_error(method, size, preference):
    rows = [[Fraction(x * size) * Fraction(p) for x in row.tolist()] for row, p in zip(TWO, preference, strict=True)]
    if method is gradsurgery.UPGrad:  # its priorities are those of the two projections
        a, b = ([Fraction(x * size) for x in row.tolist()] for row in TWO)
        shares = [(dot(a, b) / dot(b, b), b, a), (dot(a, b) / dot(a, a), a, b)]
        parts = [[y - part * x for x, y in zip(away, own, strict=True)] for part, away, own in shares]
        expected = [sum(Fraction(p) * x for p, x in zip(preference, column, strict=True))
                    for column in zip(*parts, strict=True)]  # fmt: skip
    else:
        expected = exact(method, rows)
    optimizer = method(SGD([torch.zeros(4, dtype=torch.float64)], lr=0.1), preference=list(preference))
    if max(map(abs, expected)) > Fraction(1e308):
        with pytest.raises(RuntimeError, match=rf"{method.__name__}.*(out of range|overflows float64|torch.float64)"):
            optimizer.combine(TWO * size)
        return
    found = optimizer.combine(TWO * size)
    wanted = torch.tensor([float(x) for x in expected], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=float(1e-12 * wanted.abs().max()))


@pytest.mark.parametrize("preference", [(1e200, 1.0), (1e-200, 1.0), (1e200, 1e200), (1e-200, 1e-200)], ids=str)
def test_streaming_needs_no_square_of_a_priority(preference):
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = gradsurgery.PCGrad(SGD([w], lr=0.1), streaming=True, shuffle=False, preference=list(preference))
    optimizer.backward([row @ w for row in TWO])
    expected = exact(
        gradsurgery.PCGrad,
        [[Fraction(x) * Fraction(p) for x in row.tolist()] for row, p in zip(TWO, preference, strict=True)],
    )
    wanted = torch.tensor([float(x) for x in expected], dtype=torch.float64)
    torch.testing.assert_close(w.grad, wanted, rtol=1e-9, atol=float(1e-12 * wanted.abs().max()))


SEES_SQUARES = ["PCGrad", "GradVac", "MGDA", "CAGrad", "IMTLG", "ConFIG", "NashMTL", "FairGrad", "UPGrad", "DualProj"]


@pytest.mark.parametrize("name", SEES_SQUARES)
def test_rows_too_far_apart_for_their_squares_are_refused(name):
    rows = ROWS * torch.tensor([[1e-250], [1e50], [1e50]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"{name}: the longest gradient is more than 1e280 times as long"):
        direction(HOMOGENEOUS[name], rows)
    optimizer = gradsurgery.MGDA(SGD([torch.zeros(4)], lr=0.1), preference=[1e160, 1e-160, 1.0])
    with pytest.raises(RuntimeError, match=r"MGDA: with `preference`.* about 1e320 times as long"):
        optimizer.combine(ROWS)


def test_streaming_refuses_rows_too_far_apart_too():
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = gradsurgery.PCGrad(SGD([w], lr=0.1), streaming=True)
    with pytest.raises(RuntimeError, match="PCGrad: the longest gradient is more than 1e280 times as long"):
        optimizer.backward([1e-250 * (ROWS[0] @ w), 1e50 * (ROWS[1] @ w)])
    assert w.grad is None


def test_weights_that_float64_rounds_to_zero_are_refused():
    optimizer = gradsurgery.MGDA(SGD([torch.zeros(4)], lr=0.1), normalize="l2", preference=[1e-150, 1.0, 1.0])
    with pytest.raises(RuntimeError, match=r"MGDA: the weights .* are out of range: some are below 1e-308"):
        optimizer.combine(ROWS * 1e200)


@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.CAGrad, gradsurgery.NashMTL])
@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_an_infinite_weight_inside_reaches_no_solver(method, weight):
    class Broken(gradsurgery.FixedWeighter):
        def weights(self, losses):
            return [weight, 1.0] * super().weights(losses)

    w = fresh(torch.float64, 1.0, 3.0)
    with pytest.raises(RuntimeError, match="the weight of 'a' is out of range"):
        method(Broken(SGD([w], lr=0.1))).backward({"a": w[0] ** 2, "b": (w[1] - w[0]) ** 2})
    assert w.grad is None


def test_coordinates_whose_sum_overflows_are_not_dropped():
    rows = torch.tensor([[1e300, 1.0], [1e300, 1.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"GradDrop.combine: .*overflows torch.float64"):
        gradsurgery.GradDrop(SGD([torch.zeros(2)], lr=0.1), preference=[1e10, 1.0]).combine(rows)


@pytest.mark.parametrize("size", [1e-170, 1e160])
@pytest.mark.parametrize("switches", [{}, {"engine": "ghosts"}, {"engine": "blocks"}, {"streaming": True}], ids=str)
def test_every_engine_projects_rows_out_of_range(size, switches):
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(7, 5, dtype=torch.float64)

    def gradients(scale):
        optimizer = gradsurgery.PCGrad(SGD(net.parameters(), lr=0.1), shared_params=net, **switches)
        optimizer.zero_grad()
        y = net(x)
        report = optimizer.backward({"a": scale * y[:, 0].sum(), "b": scale * (0.3 * y[:, 1] - y[:, 0]).sum()})
        return report, torch.cat([p.grad.flatten() for p in net.parameters()])

    usual, expected = gradients(1.0)
    report, found = gradients(size)
    torch.testing.assert_close(found / size, expected, rtol=1e-8, atol=1e-10)
    assert report.weights == pytest.approx(usual.weights, rel=1e-8)
    assert {k: v / size for k, v in report.norms.items()} == pytest.approx(usual.norms, rel=1e-8)
    if usual.cosines is not None:
        torch.testing.assert_close(report.cosines, usual.cosines, rtol=1e-8, atol=1e-12)
        assert report.projections == usual.projections > 0


@pytest.mark.parametrize("normalize", ["l2", "loss"])
@pytest.mark.parametrize("size", [1e-170, 1e160])
def test_normalized_rows_out_of_range(normalize, size):
    def gradient(scale):
        w = fresh(torch.float64, 1.0, 3.0)
        optimizer = gradsurgery.CAGrad(SGD([w], lr=0.1), normalize=normalize)
        optimizer.backward({"a": scale * (w[0] ** 2 + w[1]), "b": scale * (w[1] - 2 * w[0]) ** 2})
        return w.grad

    torch.testing.assert_close(gradient(size), gradient(1.0), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("size", [1.0, 3e159])
@pytest.mark.parametrize("granularity", ["group", "parameter"])
def test_parts_have_ranges_of_their_own(granularity, size):
    v, w = fresh(torch.float64, 0.0, 0.0), fresh(torch.float64, 0.0, 0.0)
    groups = [{"params": [v]}, {"params": [w]}]
    optimizer = gradsurgery.PCGrad(SGD(groups, lr=0.1), granularity=granularity)
    a, b = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([-1.0, 0.0], dtype=torch.float64)
    report = optimizer.backward({"a": 1e160 * (a @ v) + size * (a @ w), "b": 1e160 * (b @ v) + size * (b @ w)})
    expected = torch.tensor([-0.5, 1.5], dtype=torch.float64)  # by hand
    torch.testing.assert_close(w.grad / size, expected)
    torch.testing.assert_close(v.grad / 1e160, expected)
    assert report.norms["a"] == pytest.approx(2**0.5 * math.hypot(1e160, size))


def test_features_out_of_range():
    w, z0 = fresh(torch.float64, 1.0, 2.0), torch.ones(2, dtype=torch.float64)

    def gradient(scale):
        w.grad = None
        z = w * z0
        optimizer = gradsurgery.MGDA(SGD([w], lr=0.1))
        report = optimizer.backward({"a": scale * (z[0] + z[1]), "b": scale * (z[1] - 2 * z[0])}, features=z)
        return w.grad / scale, report.norms["a"] / scale

    for found, expected in zip(gradient(1e160), gradient(1.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("size", [1e-170, 1e160])
def test_weighters_measure_gradients_out_of_range(size):
    def weights(scale):
        w = fresh(torch.float64, 1.0, 3.0)
        optimizer = gradsurgery.NormalizedGradientWeighter(SGD([w], lr=0.1))
        return optimizer.backward({"a": scale * (w[0] + w[1]), "b": scale * 5 * (w[0] - w[1])}).weights

    assert weights(size) == pytest.approx(weights(1.0), rel=1e-9)


def test_a_coefficient_may_bring_a_row_out_of_range():
    w = fresh(torch.float64, 1.0, 3.0)
    optimizer = gradsurgery.PCGrad(gradsurgery.FixedWeighter(SGD([w], lr=0.1), weights={"a": 1e200, "b": 1e200}))
    optimizer.backward({"a": w[0] + w[1], "b": -w[0]})
    torch.testing.assert_close(w.grad / 1e200, torch.tensor([-0.5, 1.5], dtype=torch.float64))
