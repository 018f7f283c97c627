"""GradDrop and the trimmed mean: coordinate by coordinate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradsurgery import testing
from gradsurgery.surgery.graddrop import GradDrop
from gradsurgery.surgery.trimmed_mean import TrimmedMean
from tests.support.catalogue import any_optimizer
from tests.support.row_methods import JS, REFERENCE, double, lossy

# ------------------------------------------------------------------------------------------------------------- GradDrop


def with_draws(draws, **options):
    optimizer = GradDrop(any_optimizer(), **options)
    optimizer.uniform = lambda like: draws
    return optimizer


@pytest.mark.parametrize("name", REFERENCE["methods"]["GradDrop fixed U"]["truth"])
def test_graddrop_reference(name):
    rows = double(REFERENCE["inputs"][name]["J"])
    draws = double([((7 * k + 3) % 11) / 11 + 0.013 for k in range(rows.shape[1])])
    expected = double(REFERENCE["methods"]["GradDrop fixed U"]["truth"][name]["direction"])
    torch.testing.assert_close(with_draws(draws).combine(rows), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_expectation_has_a_closed_form(leak):
    rows = JS[0]
    up, down = rows.clamp(min=0).sum(0), -rows.clamp(max=0).sum(0)
    purity = up / (up + down)
    expected = leak * rows.sum(0) + (1 - leak) * (purity * up - (1 - purity) * down)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every draw as often as every other
    d = with_draws(grid.repeat_interleave(4), leak=leak).combine(rows.repeat(1, 10_000))
    torch.testing.assert_close(d.reshape(-1, 4).mean(0), expected, rtol=0, atol=1e-3)


def test_graddrop_expectation_of_its_own_draws():
    rows = torch.randn(3, 1, dtype=torch.float64).expand(3, 20_000)
    up, down = rows.clamp(min=0).sum(0), -rows.clamp(max=0).sum(0)
    purity = (up / (up + down))[0]
    assert 0.05 < purity < 0.95
    kept = (GradDrop(any_optimizer()).combine(rows) > 0).double().mean()
    assert abs(kept - purity) < 5 * (purity * (1 - purity) / 20_000) ** 0.5


def test_graddrop_leak_is_what_stays():
    # Seen: the other way round, so that no leak gave the plain sum.
    rows = double([[1, 2, 3], [-1, -2, -3.1]])
    low = double([0.2, 0.2, 0.2])
    assert with_draws(low, leak=1.0).combine(rows).tolist() == pytest.approx([0, 0, -0.1])
    assert with_draws(low, leak=0.0).combine(rows).tolist() == [1, 2, 3]
    assert with_draws(low + 0.6, leak=0.0).combine(rows).tolist() == [-1, -2, -3.1]
    assert with_draws(low, leak=0.25).combine(rows).tolist() == pytest.approx([0.75, 1.5, 2.225])
    assert with_draws(low, leak={"0": 0.0, "1": 0.25}).combine(rows).tolist() == pytest.approx([0.75, 1.5, 2.225])
    assert with_draws(low, leak={"0": 0.5, "1": 0.0}).combine(rows).tolist() == [1, 2, 3]


def test_graddrop_draws_for_every_coordinate():
    # Seen: one draw per tensor, all coordinates kept or dropped together.
    d = GradDrop(any_optimizer()).combine(torch.tensor([1.0, -1.0])[:, None].expand(2, 1000))
    assert 400 < int((d > 0).sum()) < 600
    assert set(d.tolist()) == {1.0, -1.0}


def test_graddrop_keeps_what_agrees():
    for rows in (JS[0].abs(), -JS[0].abs()):
        testing.assert_plain_sum_without_conflict(
            lambda j: GradDrop(any_optimizer()).combine(torch.from_numpy(j)).numpy(), rows.numpy()
        )
    nothing = torch.zeros(2, 5)
    nothing[:, 0] = torch.tensor([2.0, 3.0])
    assert GradDrop(any_optimizer()).combine(nothing).tolist() == [5, 0, 0, 0, 0]
    edges = with_draws(double([0.0, 0.0, 1 - 2**-24, 1 - 2**-24]))
    assert edges.combine(double([[3, -3, 3, -3]])).tolist() == [3, -3, 3, -3], "whatever the draw"


def test_graddrop_draws_depend_on_seed_step_and_parameter_alone():
    rows = torch.tensor([1.0, -1.0])[:, None].expand(2, 200)
    optimizer = GradDrop(any_optimizer())
    state = torch.get_rng_state()
    first = optimizer.combine(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, optimizer.combine(rows, update=True)), "the same in every evaluation of a step"
    assert not torch.equal(first, optimizer.combine(rows)), "anew in every step"
    assert not torch.equal(first, GradDrop(any_optimizer(), seed=1).combine(rows))
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(first, GradDrop(any_optimizer()).combine(rows.to(dtype)).float())
    twins = [nn.Parameter(torch.zeros(200)) for _ in range(2)]
    GradDrop(torch.optim.SGD(twins, lr=0.1)).backward([(twins[0] + twins[1]).sum(), -(twins[0] + twins[1]).sum()])
    assert torch.equal(twins[0].grad, first)
    assert not torch.equal(twins[1].grad, first)


def test_graddrop_arguments():
    for leak in (-0.1, 1.1, math.nan, {"a": 2.0}):
        with pytest.raises(ValueError, match=r"GradDrop: `leak"):
            GradDrop(any_optimizer(), leak=leak)
    with pytest.raises(ValueError, match=r"GradDrop: `leak` must name every loss, \['1'\] is missing"):
        GradDrop(any_optimizer(), leak={"0": 0.5}).combine(torch.ones(2, 3))


# --------------------------------------------------------------------------------------------------------- trimmed mean


@pytest.mark.parametrize("k", [0, 1, 2])
def test_trimmed_mean_reference(k):
    case = REFERENCE["methods"][f"TrimmedMean k={k}"]["truth"]
    assert case
    for name, truth in case.items():
        found = TrimmedMean(any_optimizer(), trim_number=k, reduction="mean").combine(
            double(REFERENCE["inputs"][name]["J"])
        )
        torch.testing.assert_close(found, double(truth["direction"]), rtol=1e-9, atol=1e-12)


def test_trimmed_mean_is_bounded_by_honest_rows():
    rows = torch.randn(5, 50)
    rows[2] *= 1e30
    d = TrimmedMean(any_optimizer(), reduction="mean").combine(rows)
    honest = rows[[0, 1, 3, 4]]
    assert (d <= honest.max(0).values).all()
    assert (d >= honest.min(0).values).all()


def test_trimmed_mean_of_too_few_tasks_is_the_plain_sum():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = TrimmedMean(torch.optim.SGD([p], lr=0.1), trim_number=1)
    report = optimizer.backward(lossy(JS[0][:2], p))
    assert report.flags == ("too-few-tasks",)
    assert report.weights is None
    torch.testing.assert_close(p.grad, JS[0][:2].sum(0), rtol=1e-13, atol=0)
    p.grad = None
    assert optimizer.backward(lossy(JS[0], p)).flags == ()
    torch.testing.assert_close(p.grad, 3 * JS[0].median(0).values, rtol=1e-13, atol=0)


def test_trimmed_mean_counts_a_loss_that_does_not_reach_a_parameter_as_zero():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    TrimmedMean(torch.optim.SGD([p, q], lr=0.1)).backward([(p + q).sum(), (2 * p + 5 * q).sum(), (4 * p).sum()])
    assert p.grad.item() == 6  # 3 · median(1, 2, 4)
    assert q.grad.item() == 3  # 3 · median(1, 5, 0)


def test_trimmed_mean_of_several_small_parameters_is_that_of_one():
    rows = torch.tensor([[1.0, 2.0, -3.0, 4.0], [5.0, -6.0, 7.0, 0.5], [-2.0, 3.0, 1.0, 9.0]])
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    losses = [(row[:2] * params[0]).sum() + (row[2:] * params[1]).sum() for row in rows]
    TrimmedMean(torch.optim.SGD(params, lr=0.1)).backward(losses)
    torch.testing.assert_close(torch.cat([p.grad for p in params]), TrimmedMean(any_optimizer()).combine(rows))
