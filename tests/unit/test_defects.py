"""Where other implementations went wrong: each case, with the right answer.

Names start with the family: pcgrad, mgda, gradnorm. A comment says what was seen elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery import geometry
from tests.support.catalogue import any_optimizer

INPUTS = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())["inputs"]


def rows_of(name):
    return torch.tensor(INPUTS[name]["J"], dtype=torch.float64)


def mgda(**options):
    return gradsurgery.MGDA(any_optimizer(), reduction="mean", **options)


CONFLICT = torch.tensor([[2.0, 1.0], [-10.0, 1.0]], dtype=torch.float64)

# ---------------------------------------------------------------------------------------------------- PCGrad


def test_pcgrad_honours_reduction():
    # Seen: "sum" and "mean" gave the same, the mean.
    exact = [-2.281188118811881, 5.988118811881188]
    assert gradsurgery.PCGrad(any_optimizer()).combine(CONFLICT).tolist() == pytest.approx(exact)
    mean = gradsurgery.PCGrad(any_optimizer(), "mean").combine(CONFLICT)
    assert mean.tolist() == pytest.approx([x / 2 for x in exact])


def test_pcgrad_leaves_unused_parameters_alone():
    # Seen: zeros in .grad, so that weight decay moved the parameter from 1 to 0.95.
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([used, unused], lr=0.1, weight_decay=0.5))
    optimizer.pc_backward([used.sum(), (2 * used).sum()])
    optimizer.step()
    assert unused.grad is None
    assert unused.item() == 1.0


def test_pcgrad_never_projects_a_task_on_itself():
    # Seen in six implementations: the visit of j == i gives (1.116923, -2.090769) in these orders.
    rows = np.array([[3.0, -2.0], [2.0, 1.0], [-3.0, -1.0]])
    mixing = geometry.pcgrad_mixing(rows @ rows.T, np.array([[2, 1], [0, 2], [1, 0]]))
    assert (mixing.sum(axis=0) @ rows).tolist() == pytest.approx([1.283077, -2.035385], abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-12, 1e12])
def test_pcgrad_has_no_absolute_epsilon(scale):
    # Seen: with 1e-8 in a denominator small gradients are no longer projected.
    d = gradsurgery.PCGrad(any_optimizer()).combine(CONFLICT * scale)
    torch.testing.assert_close(d / scale, gradsurgery.PCGrad(any_optimizer()).combine(CONFLICT), rtol=1e-12, atol=0)
    assert (CONFLICT @ d > -1e-12 * scale).all()


def test_pcgrad_shuffles():
    # Seen: a fixed order, which favours the tasks by their position.
    rows = rows_of("m3_n3_conflict")
    optimizer = gradsurgery.PCGrad(any_optimizer())
    seen = {tuple(optimizer.combine(rows, update=True).tolist()) for _ in range(50)}
    assert len(seen) > 1
    fixed = gradsurgery.PCGrad(any_optimizer(), shuffle=False)
    assert len({tuple(fixed.combine(rows, update=True).tolist()) for _ in range(5)}) == 1


def test_double_precision_is_kept():
    # Seen: rows in the default dtype lose 1 + 1e-10.
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for method in (gradsurgery.PCGrad, gradsurgery.MGDA):
        p.grad = None
        method(torch.optim.SGD([p], lr=0.1)).backward([((1 + 1e-10) * p).sum(), p.sum() * (1 + 1e-10)])
        assert p.grad.item() - 2 == pytest.approx(2e-10, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ MGDA


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_mgda_satisfies_its_optimality_conditions(name):
    # Seen: relative error 0.32 on a matrix of rank 4; |d| = 2.47 where the shortest row has 2.8e-6.
    rows = rows_of(name)
    d = mgda().combine(rows)
    lengths = rows.norm(dim=1)
    assert (rows @ d >= d @ d - 1e-9 * lengths * d.norm() - 1e-18 * lengths.max()).all()
    assert d.norm() <= lengths.min() * (1 + 1e-12)


def test_mgda_frank_wolfe_stops_at_its_limit():
    # Seen: 105991 iterations although the limit was 250, since the counter never moved.
    rows = rows_of("m8_n10_rank4").numpy()
    _, iterations = geometry.frank_wolfe(rows @ rows.T, max_iterations=250, tolerance=1e-12)
    assert iterations <= 250
    optimizer = mgda(solver="frank-wolfe", max_iterations=3, tolerance=1e-12)
    p = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([p], lr=0.1), solver="frank-wolfe", max_iterations=3, tolerance=1e-12)
    assert "not-converged" in optimizer.backward([g @ p for g in rows_of("m8_n10_rank4")]).flags


def test_mgda_frank_wolfe_converges_to_the_exact_answer():
    for name in ("m2_n2_conflict", "m2_n2_noconflict", "m3_n2_rankdef", "m3_n3_conflict", "m3_n50_unit"):
        rows = rows_of(name)
        exact = mgda().combine(rows)
        errors = [
            float((mgda(solver="frank-wolfe", max_iterations=k, tolerance=1e-15).combine(rows) - exact).norm())
            for k in (10, 100, 20000)
        ]
        assert errors[2] <= 2e-3 * exact.norm(), name
        assert errors[0] >= errors[1] >= errors[2] or errors[0] < 1e-12, name


def test_mgda_frank_wolfe_honours_its_tolerance():
    gram = (rows_of("m3_n3_conflict") @ rows_of("m3_n3_conflict").T).numpy()
    loose, fine = (geometry.frank_wolfe(gram, 10**6, tolerance)[1] for tolerance in (1e-2, 1e-6))
    assert loose < fine < 10**6


@pytest.mark.parametrize("solver", ["exact", "frank-wolfe"])
def test_mgda_of_one_task(solver):
    # Seen: UnboundLocalError, or weight 0.
    rows = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert mgda(solver=solver).combine(rows).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("solver", ["exact", "frank-wolfe"])
def test_mgda_of_large_gradients(solver):
    # Seen: UnboundLocalError or zero weights once the squared norm passes 1e8.
    rows = torch.tensor([[2e4, 1e4], [-1e4, 1e4]], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([p], lr=0.1), reduction="mean", solver=solver)
    weights = optimizer.backward([g @ p for g in rows]).weights
    assert list(weights.values()) == pytest.approx([1 / 3, 2 / 3], rel=1e-9)


def test_mgda_reaches_the_corners():
    # Seen: weights clamped to (0.999, 0.001).
    gram = np.array([[1.0, 3.0], [3.0, 9.01]])
    assert geometry.min_norm(gram)[0].tolist() == [1.0, 0.0]


def test_mgda_normalised_by_losses_is_still_a_common_descent_direction():
    # Seen: weights of the scaled rows applied to the raw ones, ⟨g1, d⟩ = -0.90.
    rows = torch.tensor([[-0.1, 2.1], [-1.1, -0.4]], dtype=torch.float64)
    d = mgda(normalize="loss").combine(rows, losses=[1.68, 6.83])
    assert d.tolist() == pytest.approx([-0.155574, 0.012071], abs=1e-6)
    assert (rows @ d).tolist() == pytest.approx([0.040906, 0.166303], abs=1e-6)


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
def test_mgda_of_a_zero_row_is_zero(normalize):
    # Seen: nan.
    d = mgda(normalize=normalize).combine(rows_of("m3_n10_zero_row"), losses=[1.0, 2.0, 3.0])
    assert not d.any()


def test_mgda_is_scale_invariant():
    # Seen: relative error 0.118 for gradients near 1e-6.
    rows = rows_of("m3_n50_unit")
    for scale in (1e-12, 1e-6, 1e6, 1e12):
        torch.testing.assert_close(mgda().combine(rows * scale) / scale, mgda().combine(rows), rtol=1e-10, atol=1e-13)
