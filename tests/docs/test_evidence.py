"""The comparison of all methods: its problems, its contenders, its statistics, and the page that it writes."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence import contenders, images, physics, tables
from benchmarks.evidence.problem import LEAST, MOST, mlp, score, seeded, unexplained, wrong
from benchmarks.evidence.training import PROBLEMS, schedule, vector
from gradsurgery.cli import catalogue
from gradsurgery.cli.catalogue import built

METHODS = list(catalogue.facts())


# ------------------------------------------------------------------------------------------------------ problems


def derivatives(function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and pure second derivatives by differentiating twice."""
    x = x.clone().requires_grad_()
    u = function(x)
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = [torch.autograd.grad(first[:, k].sum(), x, retain_graph=True)[0][:, k] for k in range(x.shape[1])]
    return u.detach(), first.detach(), torch.stack(second, dim=1)


def some_points(low: tuple[float, float], high: tuple[float, float], count: int = 50) -> Tensor:
    unit = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lowest = torch.tensor(low, dtype=torch.float64)
    return lowest + (torch.tensor(high, dtype=torch.float64) - lowest) * unit


def test_jets_are_what_differentiating_twice_gives():
    with seeded(0):
        network = nn.Sequential(*mlp([2, 7, 5], nn.Tanh), nn.Linear(5, 1))
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    for mine, reference in zip(physics.jets(network, x), derivatives(lambda x: network(x)[:, 0], x), strict=True):
        torch.testing.assert_close(mine.detach(), reference, rtol=1e-5, atol=1e-6)


def test_poisson_solution_solves_its_equation():
    x = some_points((0, 0), (1, 1))
    _, _, second = derivatives(physics.poisson, x)
    torch.testing.assert_close(-second.sum(dim=1), physics.poisson_source(x), rtol=1e-12, atol=1e-12)


def test_helmholtz_solution_solves_its_equation_and_is_zero_on_the_boundary():
    x = some_points((-1, -1), (1, 1))
    u, _, second = derivatives(physics.helmholtz, x)
    residual = second.sum(dim=1) + physics.K**2 * u - physics.helmholtz_source(x)
    assert residual.abs().max() < 1e-11
    edge = physics.square_boundary(40, -1.0, 1.0, torch.Generator().manual_seed(0)).double()
    assert physics.helmholtz(edge).abs().max() < 1e-6
    assert (edge.abs().amax(dim=1) == 1.0).all()


def test_burgers_reference_solves_its_equation():
    x, h = some_points((-0.9, 0.05), (0.9, 0.95)), 1e-4

    def at(dx: float, dt: float) -> Tensor:
        return physics.burgers(x + torch.tensor([dx, dt], dtype=torch.float64))

    u = at(0, 0)
    in_time, in_space = (at(0, h) - at(0, -h)) / (2 * h), (at(h, 0) - at(-h, 0)) / (2 * h)
    twice = (at(h, 0) - 2 * u + at(-h, 0)) / h**2
    residual = in_time + u * in_space - physics.VISCOSITY * twice
    assert residual.abs().max() < 1e-4 * in_time.abs().max()  # the differences err by h², and rounding by 1e-16 / h²


def test_burgers_reference_has_its_initial_and_boundary_values_and_has_converged():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    first = physics.burgers(torch.stack([x, torch.zeros_like(x)], dim=1))
    torch.testing.assert_close(first, -torch.sin(math.pi * x), rtol=1e-12, atol=1e-12)
    ends = torch.tensor([[-1.0, 0.3], [1.0, 0.8]], dtype=torch.float64)
    assert physics.burgers(ends).abs().max() < 1e-12
    points = some_points((-1, 0), (1, 1))
    torch.testing.assert_close(physics.burgers(points), physics.burgers(points, order=160), rtol=0, atol=1e-8)


@pytest.mark.parametrize("many", [2, 3])
def test_overlapping_digits_overlap_and_no_ink_is_lost(many):
    pictures, labels = images.overlapping("train", many, 50, 0)
    assert pictures.shape == (50, 10 * (4 * many + 4))
    assert labels.shape == (50, many)
    canvas = pictures.reshape(50, 10, -1)
    assert canvas.max() <= 1.0
    # The right half of the last digit has no neighbour.
    assert (canvas[:, :, -3:].sum(dim=(1, 2)) > 0).float().mean() > 0.9
    again, _ = images.overlapping("train", many, 50, 0)
    assert torch.equal(pictures, again)


def test_strips_of_the_photographs_do_not_overlap():
    ends = sorted(images.STRIPS.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    dark, clean = images.patches("test", 20, 0)
    assert dark.shape == clean.shape == (20, 3, images.PATCH, images.PATCH)
    assert dark.mean() < 0.5 * clean.mean()


def test_the_colour_loss_does_not_see_brightness():
    _, clean = images.patches("test", 20, 0)
    dimmer = 0.5 * (clean + 0.02) - 0.02  # the same colours, on the scale on which they are compared
    assert images.off_colour(dimmer, clean) < 1e-6
    assert images.off_colour(clean.flip(1), clean) > 1e-3


@pytest.mark.parametrize("name", ["linnerud", "diabetes", "wine"])
def test_a_table_holds_no_target_among_its_inputs(name):
    whole = tables.table(name)
    for target in whole.targets.values():
        assert not any(torch.equal(column, target.float()) for column in whole.inputs.T)
        assert len(target) == len(whole.inputs) > sum(tables.HELD_OUT[name])


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_start_is_what_its_problem_says(name):
    problem = PROBLEMS[name]
    start = problem.begin(0)
    losses = start.losses(0, 0)
    assert tuple(losses) == problem.losses
    assert all(loss.shape == () and loss.requires_grad for loss in losses.values())
    assert problem.alone == (problem.losses == problem.tasks)
    parameters = list(start.model.parameters())
    assert start.last_shared
    assert all(any(p is q for q in parameters) for p in start.last_shared)
    for loss in losses.values():  # the last shared layer is reached by every loss
        assert all(g is not None for g in torch.autograd.grad(loss, start.last_shared, retain_graph=True))
    assert (start.priors is not None) == problem.has_priors
    if start.priors:
        assert tuple(start.priors) == problem.losses
        assert min(start.priors.values()) > 0
    assert (start.residuals is not None) == problem.has_residuals
    if start.residuals:
        for loss, residual in start.residuals(0).items():
            torch.testing.assert_close(residual.square().sum(), losses[loss], rtol=1e-4, atol=1e-7)
    for split in ("validation", "test"):
        errors = start.errors(split)
        assert tuple(errors) == problem.tasks
        assert all(math.isfinite(error) and error >= 0 for error in errors.values())


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_start_depends_on_its_seed_alone(name):
    def values(seed: int, draw: int) -> list[float]:
        return [float(loss.detach()) for loss in PROBLEMS[name].begin(seed).losses(1, draw).values()]

    state = torch.random.get_rng_state()
    assert values(1, 0) == values(1, 0) != values(2, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    if PROBLEMS[name].batches:
        assert values(1, 0) != values(1, 1) != values(1, 2)


# ------------------------------------------------------------------------------------------------------ contenders


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_contender_steps_or_says_why_not(name):
    problem = PROBLEMS[name]
    for contender in [*contenders.alone(problem), *contenders.names()]:
        reason = contenders.refused(contender, problem)
        if reason is not None:
            assert len(reason) > 10
            continue
        stepper = contenders.stepper(contender, problem, 0, problem.lr)
        before = [p.detach().clone() for p in stepper.start.model.parameters()]
        # M-ConFIG waits until it has seen every loss, one a step.
        for number in range(len(problem.losses) if contender == "MConFIG" else 2):
            stepper.step(number)
        after = list(stepper.start.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), contender
        assert all(torch.isfinite(p).all() for p in after), contender


@pytest.mark.parametrize("name", METHODS)
def test_what_refuses_losses_below_zero_is_known(name):
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    given = {"shared_params": [p]} if name == "GradNormWeighter" else {}
    method = built(name, torch.optim.SGD([p], lr=0.1), tasks=3, **given)
    refuses = pytest.raises(ValueError, match="must be")
    with refuses if name in contenders.NEEDS_POSITIVE else nullcontext():
        for _ in range(12):  # some look at a window of steps
            method.zero_grad()
            method.backward({"a": p.sum() - 20, "b": p[0] - 30, "c": p[1] - p[2] - 10})
            method.step()
            if name in ("DWAWeighter", "IGBWeighter"):
                method.epoch_end()


def test_methods_that_need_more_losses_give_the_plain_sum_below():
    for name, least in contenders.LEAST_LOSSES.items():
        gradients = []
        for wrap in (True, False):
            p = nn.Parameter(torch.tensor([1.0, -2.0]))
            losses = [(i + 1) * p[0] ** 2 + p[1] * i for i in range(least - 1)]
            if wrap:
                built(name, torch.optim.SGD([p], lr=0.1)).backward(losses)
            else:
                torch.stack(losses).sum().backward()
            gradients.append(p.grad)
        torch.testing.assert_close(*gradients)


def test_a_single_task_training_leaves_other_heads_alone():
    problem = PROBLEMS["wine"]
    stepper = contenders.stepper(contenders.ALONE + "alcohol", problem, 0, problem.lr)
    head = stepper.start.model.heads["proline"].weight
    before = head.detach().clone()
    stepper.step(0)
    assert torch.equal(head, before)


def test_weight_vectors():
    problem = PROBLEMS["find digits"]
    assert vector(problem, 0) == {"class": 1.0, "box": 1.0}
    first = {name: float(loss.detach()) for name, loss in problem.begin(0).losses(0, 0).items()}
    relative = vector(problem, 1)
    assert relative["class"] * first["class"] == pytest.approx(relative["box"] * first["box"])
    drawn = [tuple(vector(problem, number).values()) for number in range(12)]
    assert len(set(drawn)) == 12
    assert all(sum(weights) == pytest.approx(2.0) for weights in drawn)


def test_the_learning_rate_rises_and_falls():
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == 1.0
    assert shares[9] == 1.0
    assert 0 < shares[-1] < 0.02
    assert min(schedule(step, 2) for step in range(2)) > 0


def test_grids_are_spaced_by_threes():
    rates = PROBLEMS["Poisson"].rates()
    assert rates[1] == PROBLEMS["Poisson"].lr
    assert all(b / a == pytest.approx(3) for a, b in itertools.pairwise(rates))
    assert PROBLEMS["Poisson"].rates(2) == rates[1:3]


def test_errors_of_a_table_are_shares_of_the_variance():
    target = torch.tensor([1.0, 3.0])
    assert unexplained(torch.tensor([2.0, 2.0]), target, 1.0) == 1.0
    assert unexplained(target, target, 1.0) == 0.0
    assert unexplained(torch.tensor([1.0, 1.0]), target, 4.0) == 0.5


def test_errors_of_labels_are_shares_of_guessing():
    scores = torch.eye(4)
    assert wrong(scores, torch.tensor([0, 1, 2, 3])) == 0.0
    assert wrong(scores, torch.tensor([0, 0, 0, 0])) == 1.0  # a quarter right, as by guessing


def test_scores():
    assert score({"a": 0.5, "b": 1.5}) == 1.0
    assert score({"a": 0.0}) == LEAST
    assert score({"a": float("nan"), "b": 0.0}) == pytest.approx((MOST + LEAST) / 2)
    assert score({"a": float("inf")}) == score(None) == score({}) == MOST
