"""AND-mask and SAND-mask: coordinates on whose sign the losses agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradsurgery import AndMask, SandMask
from tests.support.answers import answers
from tests.support.catalogue import any_optimizer

EXACT = {
    "AND-mask tau=1.0": lambda base: AndMask(base, reduction="mean"),
    "AND-mask tau=0.6": lambda base: AndMask(base, tau=0.6, reduction="mean"),
    "SAND-mask tau=0.5 k=10": lambda base: SandMask(base, tau=0.5, k=10.0, reduction="mean"),
}
BOTH = {"AndMask": AndMask, "SandMask": lambda base, **options: SandMask(base, tau=0.5, **options)}


def both(values=BOTH):
    return pytest.mark.parametrize("build", values.values(), ids=values)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", EXACT)
def test_exact_answers(name):
    cases = answers()["directions"][name]
    assert len(cases) == 33
    for key, case in cases.items():
        found = EXACT[name](any_optimizer()).combine(double(answers()["inputs"][key]["J"])).numpy()
        expected = np.array(case["direction"])
        assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected), key


@pytest.mark.parametrize("m", range(1, 11))
def test_the_threshold_is_met_exactly(m):
    """A mean of signs of k/m meets τ = k/m, which rounding of a mean in single precision would miss."""
    for votes in range(m, 0, -2):
        column = torch.ones(m, 1)
        column[: (m - votes) // 2] = -1
        tau = votes / m
        kept = AndMask(any_optimizer(), tau=tau).combine(torch.cat([column, torch.ones(m, 1)], dim=1))
        assert kept[0] == column.sum(), (votes, m)
        if tau < 1:
            above = AndMask(any_optimizer(), tau=np.nextafter(tau, 1.0)).combine(
                torch.cat([column, torch.ones(m, 1)], dim=1)
            )
            assert above.tolist() == [0, 2 * m]


def test_a_mean_of_nothing_but_agreement_is_the_plain_sum():
    rows = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    torch.testing.assert_close(AndMask(any_optimizer()).combine(rows), rows.sum(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(AndMask(any_optimizer(), tau=0.0).combine(-rows), -rows.sum(0), rtol=1e-15, atol=0)


@both()
def test_entries_that_no_loss_moves_do_not_count_in_the_share(build):
    rows = double([[1.0, 2.0], [2.0, -1.0]])
    wide = torch.cat([rows, torch.zeros(2, 5, dtype=torch.float64)], dim=1)
    assert build(any_optimizer()).combine(wide)[:2].tolist() == build(any_optimizer()).combine(rows).tolist()


@both()
def test_a_zero_row_is_left_out(build):
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with_zero = torch.cat([rows[:1], torch.zeros(1, 40, dtype=torch.float64), rows[1:]])
    for reduction in ("sum", "mean"):
        expected = build(any_optimizer(), reduction=reduction).combine(rows)
        assert expected.any()
        torch.testing.assert_close(build(any_optimizer(), reduction=reduction).combine(with_zero), expected)
    assert build(any_optimizer()).combine(torch.zeros(3, 4)).tolist() == [0] * 4


@both()
def test_an_entry_of_zero_is_no_vote(build):
    d = build(any_optimizer()).combine(double([[1.0, 1.0], [1.0, 0.0]]))
    assert d[0] > 0
    assert d[1] == 0


@both()
def test_shares_are_those_of_each_tensor(build):
    p, q = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3))
    rows = [(double([1.0, 2.0]), double([1.0, 1.0, 1.0])), (double([1.0, -2.0]), double([1.0, 1.0, 1.0]))]
    build(torch.optim.SGD([p, q], lr=0.1)).backward([a @ p + b @ q for a, b in rows])
    assert p.grad.tolist() == [4, 0]
    assert q.grad.tolist() == [2, 2, 2]


@both()
def test_a_loss_that_does_not_reach_a_tensor_has_no_part_in_it(build):
    p, q = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    rows = double([[1.0, 2.0], [3.0, 2.0], [1.0, 1.0]])
    build(torch.optim.SGD([p, q], lr=0.1)).backward([rows[0] @ (p + q), rows[1] @ (p + q), rows[2] @ p])
    assert q.grad.tolist() == build(any_optimizer()).combine(rows[:2]).tolist()
    assert p.grad.tolist() == build(any_optimizer()).combine(rows).tolist()


@both()
def test_absent_losses_are_left_out(build):
    p = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    rows = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3
    build(torch.optim.SGD([p], lr=0.1)).backward({"a": rows[0] @ p, "b": None, "c": rows[2] @ p})
    torch.testing.assert_close(p.grad, build(any_optimizer()).combine(rows[[0, 2]]), rtol=1e-14, atol=0)
    p.grad = None
    build(torch.optim.SGD([p], lr=0.1)).backward({"a": rows[0] @ p, "b": None, "c": None})
    assert torch.equal(p.grad, rows[0])


# ---------------------------------------------------------------------------------------------------------- SAND-mask


def test_short_gradients_make_it_the_and_mask_unless_relative():
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    long, short = (SandMask(any_optimizer(), tau=0.5).combine(rows * s) / s for s in (10.0, 1e-3))
    hard = AndMask(any_optimizer(), tau=0.51).combine(rows)
    torch.testing.assert_close(short, hard, rtol=1e-6, atol=0)
    assert (long - hard).norm() > 0.1 * hard.norm()
    for scale in (1e-200, 1e-3, 1e200):
        found = SandMask(any_optimizer(), tau=0.5, relative=True).combine(rows * scale) / scale
        torch.testing.assert_close(found, SandMask(any_optimizer(), tau=0.5, relative=True).combine(rows))


@pytest.mark.parametrize("scale", [1e-50, 1.0, 1e50])
@pytest.mark.parametrize("relative", [False, True])
def test_equal_gradients_have_no_variance(scale, relative):
    row = scale * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row[3] = 0.0
    d = SandMask(any_optimizer(), tau=0.9, relative=relative).combine(row.expand(5, 20))
    torch.testing.assert_close(d, 5 * row, rtol=1e-14, atol=0)


def test_long_gradients_are_out_of_range_where_the_variance_is_absolute():
    rows = double([[1e120, 1.0], [1e120, 2.0]])
    with pytest.raises(RuntimeError, match=r"SandMask: gradients longer than 1e60"):
        SandMask(any_optimizer(), tau=0.5).combine(rows * 1e100)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_a_direction_scales_with_rows_of_any_length(scale):
    rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = AndMask(any_optimizer()).combine(rows)
    torch.testing.assert_close(AndMask(any_optimizer()).combine(rows * scale) / scale, expected, rtol=1e-12, atol=0)


def test_tau_says_what_would_never_train():
    with pytest.raises(ValueError, match=r"SandMask: `tau` must be < 1, got 1.0: .*nothing would ever be trained"):
        SandMask(any_optimizer(), tau=1.0)
    with pytest.raises(TypeError, match="tau"):
        SandMask(any_optimizer())
    for options in ({"tau": -0.1}, {"tau": 1.1}, {"tau": 0.5, "k": 0.0}, {"tau": 0.5, "relative": 1.5}):
        with pytest.raises(ValueError, match=f"SandMask: `{list(options)[-1]}` must be"):
            SandMask(any_optimizer(), **options)
    with pytest.raises(ValueError, match="AndMask: `tau` must be <= 1"):
        AndMask(any_optimizer(), tau=2.0)


# ------------------------------------------------------------------------------------------------- what is written


def test_no_loss_rises_at_full_agreement_in_bfloat16():
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    d = AndMask(any_optimizer()).combine(rows)
    assert d.any()
    assert (d.double() * rows.double() >= 0).all()


def test_what_the_division_makes_too_long_is_told():
    """Each row and their sum are in range; one coordinate in ten thousand is kept, and so multiplied by that."""
    p = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    first = torch.full((10_000,), 10.0, dtype=torch.float16)
    second = -first.clone()
    second[0] = 10.0
    optimizer = AndMask(torch.optim.SGD([p], lr=0.1))
    losses = [(first * p).sum(dtype=torch.float32), (second * p).sum(dtype=torch.float32)]
    with pytest.raises(RuntimeError, match=r"AndMask.backward: every gradient is finite, .*overflows float16"):
        optimizer.backward(losses)
    assert p.grad is None


@both()
def test_micro_batches_add_up(build):
    rows = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = build(torch.optim.SGD([p], lr=0.1))
    optimizer.backward([row @ p for row in rows[0]], accumulate=True)
    optimizer.backward([row @ p for row in rows[1]])
    torch.testing.assert_close(p.grad, build(any_optimizer()).combine(rows.sum(0)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("relative", [False, True])
def test_a_loss_scale_does_not_change_the_variance(relative):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        p = nn.Parameter(torch.zeros(8))
        optimizer = SandMask(torch.optim.SGD([p], lr=1.0), tau=0.3, k=1.0, relative=relative)
        losses = [row @ p for row in rows]
        if scaler is None:
            optimizer.backward(losses)
            optimizer.step()
        else:
            optimizer.backward(losses, scaler=scaler)
            scaler.step(optimizer)
        steps.append(p.detach())
    torch.testing.assert_close(steps[1], steps[0])


@both()
def test_switches_that_need_weights_are_refused(build):
    with pytest.raises(ValueError, match="need a method that works by one weight per loss"):
        build(any_optimizer(), every=2)
