"""What every method of the catalogue promises, tried on generated and on fixed inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given as given_alone
from hypothesis import strategies as st
from torch import nn

import gradsurgery
from gradsurgery import testing
from tests.support.answers import answers
from tests.support.catalogue import GRAM, any_optimizer
from tests.support.samplers import (
    MAX_ROWS,
    badly_scaled,
    descending,
    integer_matrices,
    matrices,
    of_rank,
    scaled,
    scales,
    stationary,
    with_zero_row,
)
from tests.support.shared_examples import given

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())


def every(rows, promise=lambda row: True):
    chosen = [row for row in rows if promise(row)]
    assert chosen, "a promise that no method makes tests nothing"
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.name)


# ---------------------------------------------------------------------------------------------------- values


@every(GRAM)
def test_golden(row):
    rows, losses, expected = row.golden
    found = row.build(any_optimizer()).combine(torch.tensor(rows, dtype=torch.float64), losses=losses)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


# What the reference says in words; the methods read the rows themselves where the Gram matrix has lost the digits.
FROM_ROWS = {
    "1e-9 from an SVD of J, 1e-3 from the Gram matrix": 1e-9,
    "only from an SVD of J (1e-3); the Gram matrix loses the rank": 1e-3,
    "no unique dual solution: choose and document": None,
}
REFERENCES = [
    (row, name, reduction) for row in GRAM for name, reduction in row.reference.items() if name in REFERENCE["methods"]
]


@pytest.mark.parametrize(("row", "name", "reduction"), REFERENCES, ids=[name for _, name, _ in REFERENCES])
def test_directions_are_the_exact_answers(row, name, reduction):
    case = REFERENCE["methods"][name]
    optimizer = row.build(any_optimizer(), reduction=reduction)
    assert len(case["truth"]) >= 10
    for key, truth in case["truth"].items():
        rows = np.array(REFERENCE["inputs"][key]["J"])
        allowed = case["tolerance"]["exceptions"].get(key, case["tolerance"]["relative"])
        allowed = FROM_ROWS.get(allowed, allowed)
        if allowed is None:
            continue
        expected = np.array(truth["direction"])
        found = optimizer.combine(torch.from_numpy(rows), losses=REFERENCE["inputs"][key]["losses"]).numpy()
        if name == "IMTL-G" and key == "m3_n3_imtlg_negative":
            expected = -expected  # the paper's sign makes every loss rise; ours stays positive
        size = np.linalg.norm(expected) or np.linalg.norm(rows, axis=1).max()
        assert np.linalg.norm(found - expected) <= allowed * size, key


FURTHER = [
    (row, name, reduction)
    for row in GRAM
    for name, reduction in row.reference.items()
    if name in answers()["directions"]
]
# Their own solutions are no better where row lengths are 1e-4 and 1e3.
COARSE = ("ConicGrad", "CAGrad", "PIVRG")


def test_every_reference_is_one():
    names = {name for row in GRAM for name in row.reference}
    assert names <= set(REFERENCE["methods"]) | set(answers()["directions"])


@pytest.mark.parametrize(("row", "name", "reduction"), FURTHER, ids=[name for _, name, _ in FURTHER])
def test_directions_are_the_further_exact_answers(row, name, reduction):
    optimizer, cases = row.build(any_optimizer(), reduction=reduction), answers()["directions"][name]
    assert len(cases) >= 29
    for key, answer in cases.items():
        given, expected = answers()["inputs"][key], np.array(answer["direction"])
        if row.given:
            optimizer = row.build(any_optimizer(), reduction=reduction, **{row.given: given[row.given]})
        found = optimizer.combine(torch.tensor(given["J"], dtype=torch.float64), losses=given["losses"]).numpy()
        allowed = 1e-6 if "badscale" in key and name.startswith(COARSE) else 1e-9
        assert np.linalg.norm(found - expected) <= allowed * np.linalg.norm(expected), key


def test_pcgrad_expectation():
    """The mean over many draws is the mean over all orders."""
    case = REFERENCE["methods"]["PCGrad expectation"]["truth"]
    rows = torch.tensor(REFERENCE["inputs"]["m3_n3_conflict"]["J"], dtype=torch.float64)
    optimizer = gradsurgery.PCGrad(any_optimizer())
    draws = torch.stack([optimizer.combine(rows, update=True) for _ in range(4000)])
    spread = draws.std(0) / len(draws) ** 0.5
    expected = torch.tensor(case["m3_n3_conflict"]["direction"], dtype=torch.float64)
    assert ((draws.mean(0) - expected).abs() <= 4 * spread + 1e-12).all()
    assert len(torch.unique(draws.round(decimals=9), dim=0)) == 8, "every task draws its own order: 2 × 2 × 2"


# ------------------------------------------------------------------------------------------------ properties


@every(GRAM, lambda row: row.common_descent)
@given(rows=matrices())
def test_common_descent(row, rows):
    testing.assert_common_descent(row.direction(), rows[: row.common_descent])


FULL_RANK = st.integers(1, 6).flatmap(lambda m: of_rank(rank=m, rows=m))


@every(GRAM, lambda row: row.descends_at_full_rank)
@given(rows=badly_scaled(FULL_RANK, largest=6))
def test_common_descent_at_full_rank(row, rows):
    testing.assert_common_descent(row.direction(), rows)


@every(GRAM, lambda row: row.homogeneous is not None)
@given(rows=integer_matrices() | of_rank(), factor=scales())
def test_homogeneous(row, rows, factor):
    testing.assert_homogeneous(row.direction(), rows, factor, row.homogeneous)


@every(GRAM, lambda row: row.row_scale_invariant)
@given(rows=FULL_RANK, factors=st.lists(scales(20), min_size=6, max_size=6))
def test_row_scale_invariant(row, rows, factors):
    testing.assert_row_scale_invariant(row.direction(), rows, factors[: len(rows)])


@every(GRAM, lambda row: row.equivariant)
@given(rows=scaled(badly_scaled(integer_matrices(), largest=6)), places=st.permutations(range(MAX_ROWS)))
def test_permutation_equivariant(row, rows, places):
    order = [place for place in places if place < len(rows)]
    testing.assert_permutation_equivariant(row.direction(), rows, order)


@every(GRAM, lambda row: row.kind == "gram")
@given(rows=integer_matrices() | of_rank(conflict=True))
def test_rotation_equivariant(row, rows):
    testing.assert_rotation_equivariant(row.direction(), rows)


@every(GRAM, lambda row: row.ignores_copies)
@given(rows=FULL_RANK)
def test_ignores_copies(row, rows):
    testing.assert_ignores_copies(row.direction(), rows)


@every(GRAM, lambda row: row.keeps_the_sum)
@given(rows=scaled(badly_scaled(integer_matrices())))
def test_plain_sum_without_conflict(row, rows):
    testing.assert_plain_sum_without_conflict(row.direction(), np.abs(rows))


@every(GRAM, lambda row: row.scale != "paper")
@given(rows=scaled(descending(rows=1)), m=st.integers(1, 6))
def test_equal_rows_show_the_scale(row, rows, m):
    testing.assert_equal_rows(row.direction(), rows[0], m, m if row.scale == "sum" else 1)
    testing.assert_equal_rows(row.direction(reduction="mean"), rows[0], m, 1 if row.scale == "sum" else 1 / m)


@given_alone(rows=matrices())
def test_mgda_is_the_min_norm_point(rows):
    direct = next(row for row in GRAM if row.name == "MGDA").direction(reduction="mean")
    testing.assert_min_norm(direct, rows)


# A broken method for each property: what a property does not reject it does not test.
BROKEN = {
    "plain sum": lambda j: j.sum(axis=0),
    "first row": lambda j: j[0].copy(),
    "absolute epsilon": lambda j: j.sum(axis=0) / (1 + 1e-4 / (np.square(j).sum() + 1e-12)),
    "sum of absolute values": lambda j: np.abs(j).sum(axis=0),
    "half": lambda j: 0.5 * j.sum(axis=0),
    "mean": lambda j: j.mean(axis=0),
    "nan": lambda j: np.full(j.shape[1], np.nan),
}
J = np.array([[2.0, 1.0], [-10.0, 1.0]])
REJECTED = [
    ("plain sum", lambda f: testing.assert_common_descent(f, J)),
    ("absolute epsilon", lambda f: testing.assert_homogeneous(f, J, 1e-3)),
    ("plain sum", lambda f: testing.assert_homogeneous(f, J, 2.0, degree=0)),
    ("plain sum", lambda f: testing.assert_row_scale_invariant(f, J, [1.0, 2.0])),
    ("first row", lambda f: testing.assert_permutation_equivariant(f, J, [1, 0])),
    ("sum of absolute values", lambda f: testing.assert_rotation_equivariant(f, J)),
    ("plain sum", lambda f: testing.assert_ignores_copies(f, J)),
    ("half", lambda f: testing.assert_plain_sum_without_conflict(f, np.abs(J))),
    ("mean", lambda f: testing.assert_equal_rows(f, J[0], 3, 3)),
    ("mean", lambda f: testing.assert_min_norm(f, J)),
    ("first row", lambda f: testing.assert_min_norm(f, J)),
    *[
        ("nan", check)
        for check in (
            lambda f: testing.assert_common_descent(f, J),
            lambda f: testing.assert_homogeneous(f, J, 2.0),
            lambda f: testing.assert_min_norm(f, J),
            lambda f: testing.assert_plain_sum_without_conflict(f, np.abs(J)),
        )
    ],
]


@pytest.mark.parametrize(("broken", "check"), REJECTED)
def test_properties_reject_broken_methods(broken, check):
    with pytest.raises(AssertionError):
        check(BROKEN[broken])


# ------------------------------------------------------------------------------------------- degenerate input


@every(GRAM)
@given(rows=matrices())
def test_always_finite_and_defined(row, rows):
    assert np.isfinite(row.direction()(rows)).all()


@every(GRAM, lambda row: row.alone == "itself")
@given(rows=scaled(integer_matrices(rows=1)).filter(np.any))
def test_one_task_gives_its_own_gradient(row, rows):
    d = row.direction()(rows)
    if row.scale == "paper":
        d, rows = d / np.linalg.norm(d), rows / np.linalg.norm(rows)
    np.testing.assert_allclose(d, rows[0], rtol=1e-12)


@every(GRAM, lambda row: not row.build(any_optimizer()).acts_on_private)
def test_one_loss_alone_gets_its_plain_gradient(row):
    """No parameter is shared then. For `combine` all are, and the method, which is asked, may change the length."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    row.build(torch.optim.SGD([p], lr=0.1)).backward({"a": 3 * p[0] + 4 * p[1]})
    assert p.grad.tolist() == [3.0, 4.0]


def test_combine_asks_a_method_about_a_single_row():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.NashMTL(torch.optim.SGD([p], lr=0.1), scale="paper")
    rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(optimizer.combine(rows), torch.tensor([0.6, 0.8], dtype=torch.float64))


@every(GRAM, lambda row: row.stationary_is_zero)
@given(rows=stationary() | with_zero_row(), factor=scales())
def test_stationary_gives_zero_and_a_flag(row, rows, factor):
    if row.zero_rows == "dropped" and not np.abs(rows).max(axis=1).all():
        return
    p = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    optimizer = row.build(torch.optim.SGD([p], lr=0.1))
    tensors = [torch.from_numpy(factor * g) @ p + i for i, g in enumerate(rows, 1)]
    report = optimizer.backward(tensors)
    assert not p.grad.any()
    assert "stationary" in report.flags


@every(GRAM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_half_and_single_precision(row, dtype, tolerance):
    """Rows in low precision give what the same rows give in double precision, up to their rounding."""
    generator = torch.Generator().manual_seed(5)
    for scale in (1e-10, 1.0, 1e10):
        rows = (torch.randn(3, 400, generator=generator) * scale).to(dtype)
        rows[1] -= rows[0] / 2  # a clear conflict
        optimizer = row.build(any_optimizer())
        losses = [1.0, 2.0, 3.0]
        d, exact = optimizer.combine(rows, losses=losses), optimizer.combine(rows.double(), losses=losses)
        assert d.dtype == dtype
        assert (d.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_products_that_leave_single_precision_are_made_again(scale):
    rows = torch.tensor([[2.0, 1.0], [-1.0, 1.0]]) * scale
    d = gradsurgery.MGDA(any_optimizer(), reduction="mean").combine(rows)
    assert (d / scale).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@every(GRAM)
def test_combine_agrees_with_backward(row):
    rows = torch.tensor([[2.0, 1.0, 0.5], [-10.0, 1.0, 0.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer, twin = row.build(torch.optim.SGD([p], lr=0.0)), row.build(any_optimizer())
    for _ in range(3):
        optimizer.zero_grad()
        expected = twin.combine(rows, losses=[1.0, 2.0, 3.0])
        assert torch.equal(twin.combine(rows, losses=[1.0, 2.0, 3.0], update=True), expected)
        optimizer.backward([g @ p + i for i, g in enumerate(rows, 1)])
        torch.testing.assert_close(p.grad, expected, rtol=1e-13, atol=0)
        optimizer.step()
