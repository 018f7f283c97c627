"""Inner products of rows, and square roots of them, against the same in double precision or in whole numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients.gram import Gram, Scaled, Table

LARGE = 300_001  # more than what two rows have in one bucket


def reference(rows):
    """Inner products in float64; complex entries are pairs of reals, and None stands for zeros."""
    sizes = [max(0 if g is None else g.numel() << g.is_complex() for g in column) for column in zip(*rows, strict=True)]

    def flat(g, size):
        if g is None:
            return torch.zeros(size, dtype=torch.float64)
        g = g.to_dense() if g.is_sparse else g
        return (torch.view_as_real(g) if g.is_complex() else g).double().flatten()

    whole = torch.stack([torch.cat([flat(g, n) for g, n in zip(row, sizes, strict=True)]) for row in rows])
    return (whole @ whole.T).numpy()


def mixed(dtype):
    """Rows over parameters of all kinds, some of which some losses do not reach."""
    dense = [[torch.randn(n, dtype=dtype) for n in (LARGE, 5, LARGE, 0, 3)] for _ in range(3)]
    dense[1][0] = dense[2][4] = None
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    rows = [[*row, torch.randn(2, 2, dtype=wide), torch.randn(7).half(), None] for row in dense]
    rows[0][1] = rows[0][1].to_sparse()
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_over_parameters_of_all_kinds_and_sizes(dtype):
    rows = mixed(dtype)
    expected = reference(rows)
    lengths = np.sqrt(expected.diagonal())
    found = gram_module.gram(rows).numpy()
    assert np.abs(found - expected).max() <= 1e-6 * lengths.max() ** 2
    made = gram_module.gram_in(rows, torch.float64, 0.5).numpy()
    np.testing.assert_allclose(made, expected / 4, rtol=1e-12, atol=1e-12 * lengths.max() ** 2)
    root = gram_module.triangle(rows)
    np.testing.assert_allclose(root @ root.T, expected, rtol=1e-12, atol=1e-12 * lengths.max() ** 2)
    for row, expected_length in zip(rows, lengths, strict=True):
        assert gram_module.length(row, torch.device("cpu")).item() == pytest.approx(expected_length, rel=1e-6)


def test_parameters_in_double_precision_keep_it_beside_others():
    double, single = torch.tensor([1 / 3, 1e-9], dtype=torch.float64), torch.tensor([2.0])
    for row in ([double, single], [single, double]):
        assert gram_module.gram([row]).item() == pytest.approx(float(double @ double) + 4, rel=1e-15)


def test_no_rows_at_all_have_products_of_zero():
    rows = [[None, torch.zeros(0)], [None, None]]
    assert gram_module.gram(rows).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert gram_module.length(rows[1], torch.device("cpu")).item() == 0


@pytest.mark.parametrize("width", [1, 127, 128, 129, 256, 300])
def test_products_over_chunks_are_exact_in_whole_numbers(width):
    a, b = (torch.randint(-4, 5, (m, width)).float() for m in (2, 3))
    found = gram_module.product(a, b, 128)
    assert found.dtype == torch.float64
    assert torch.equal(found, a.double() @ b.double().T)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1.0, 1e200, 1e307])
def test_the_length_of_a_row_of_any_size(size):
    row = [torch.full((4,), size, dtype=torch.float64)]
    assert gram_module.length(row, torch.device("cpu")).item() == pytest.approx(2 * size, rel=1e-15)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-10), (torch.float32, 2.0**-20)])
def test_a_square_root_keeps_rows_apart_whose_products_do_not(dtype, apart):
    row = torch.randn(50, dtype=dtype)
    near = row.clone()
    near[0] = row[0] + apart
    difference = (near.double() - row.double()).norm().item()
    first, second = gram_module.triangle([[row], [near]])
    assert np.linalg.norm(first - second) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_of_a_square_root_does_not_depend_on_the_order(dtype):
    rows = [[factor * torch.randn(40, dtype=dtype)] for factor in (1e-3, 1.0, 30.0)]
    rows[1] = [rows[0][0] * 1000 * (1 + 1e-7 * torch.randn(40, dtype=dtype))]
    products = {}
    for order in itertools.permutations(range(3)):
        root = gram_module.triangle([rows[i] for i in order])
        back = np.argsort(order)
        products[order] = (root[back] @ root[back].T).tobytes()
    assert len(set(products.values())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_square_root_has_room_for_rows_of_zero(dtype):
    rows = [[torch.tensor([3.0, 4.0], dtype=dtype)], [torch.zeros(2, dtype=dtype)]]
    root = gram_module.triangle(rows)
    np.testing.assert_allclose(root @ root.T, [[25.0, 0.0], [0.0, 0.0]], rtol=1e-14)


def test_a_square_root_of_products_has_room_for_rows_of_zero():
    gram = np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1e6]])
    root = gram_module.square_root(gram)
    np.testing.assert_allclose(root @ root.T, gram, rtol=1e-12, atol=1e-12)
    assert not root[1].any()


@pytest.mark.parametrize("size", [1e-26, 1e18])
@pytest.mark.parametrize("form", ["rows", "matrix"])
def test_products_that_single_precision_cannot_hold_are_made_again(form, size):
    matrix = size * torch.randn(3, 60_000)  # too many for double precision at first
    matrix[1] = 0.0
    table = Table(matrix if form == "matrix" else [[row[:100], row[100:]] for row in matrix])
    assert not table.is_double
    found = table.repaired(table.products().numpy())
    np.testing.assert_allclose(found, (matrix.double() @ matrix.double().T).numpy(), rtol=1e-6)
    assert table.unit == 1.0
    assert not table.far_apart


@pytest.mark.parametrize("size", [1e-170, 1e170])
def test_products_that_double_precision_cannot_hold_have_a_unit(size):
    matrix = size * torch.tensor([[3.0, 4.0], [0.0, 0.0], [4.0, -3.0]], dtype=torch.float64)
    table = Table(matrix)
    found = table.repaired(table.products().numpy())
    gram = Gram.of(table, found, scale=2.0)
    table.require_squares("Own")  # a row of zero is not far from the others
    np.testing.assert_allclose(gram.lengths().values(), [2.5 * size, 0.0, 2.5 * size], rtol=1e-15)
    root = gram.root()
    np.testing.assert_allclose(np.linalg.norm(root / size, axis=1), [2.5, 0.0, 2.5], rtol=1e-14)
    some = gram.only([0, 2])
    np.testing.assert_allclose(some.lengths().values(), [2.5 * size] * 2, rtol=1e-15)
    assert (some.unit, some.noise, some.scale) == (gram.unit, gram.noise, 2.0)
    inside = some.scaled(Scaled(np.array([1.0, 2.0]) / size))
    np.testing.assert_allclose(inside.values, [[6.25, 0.0], [0.0, 25.0]], atol=1e-13)


def test_rows_may_be_multiplied_twice():
    table = Table(torch.tensor([[3.0, 4.0], [4.0, -3.0]], dtype=torch.float64))
    gram = Gram.of(table, table.products().numpy()).scaled(Scaled(np.array([1.0, 2.0])))
    twice = gram.scaled(Scaled(np.array([0.5, 3.0]))).only([1])
    np.testing.assert_allclose(twice.values, [[900.0]], rtol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(twice.root(), axis=1), [30.0], rtol=1e-14)


def test_rows_too_far_apart_for_one_unit_stay_so_in_a_part():
    table = Table(torch.tensor([[1e-200, 0.0], [0.0, 1e120]], dtype=torch.float64))
    table.repaired(table.products().numpy())
    for some in (table, table.part([0])):
        with pytest.raises(RuntimeError, match="Own: the longest gradient is more than 1e280 times as long"):
            some.require_squares("Own")


@pytest.mark.parametrize(
    ("lengths", "moved"),
    [([1e-60, 1e60], False), ([0.0, 1.0], False), ([0.0], False), ([1e-61, 1.0], True), ([1.0, 1e61], True)],
)
def test_lengths_out_of_range_are_moved_to_the_middle(lengths, moved):
    found = gram_module.central(Scaled(np.array(lengths)))
    assert (found is not None) == moved
    if moved:
        exponents = [math.log2(length) + found for length in lengths]
        assert abs(exponents[0] + exponents[1]) <= 4


def test_reciprocals_and_products_of_numbers_out_of_range():
    numbers = Scaled(np.array([1e300, 0.0, 4.0])) * Scaled(np.array([1e300, 5.0, 0.5]))
    assert (numbers * numbers.inverse()).values().tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert numbers.at([2, 1]).values().tolist() == [2.0, 0.0]
    assert numbers.first(2).values().tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("power", [0, 700])
def test_rows_of_any_length_may_be_multiplied_twice(power):
    """Where float64 does not hold their squares they were divided by a unit, which counts once."""
    rows = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.25, 4.0]], dtype=torch.float64)
    scale = 2.0**power
    table = Table([[row * scale] for row in rows])
    gram = Gram.of(table, table.repaired(table.products().numpy()))
    assert (gram.unit == 1.0) == (power == 0)
    first, second = np.array([3.0, 0.5]), np.array([0.25, 8.0])
    once = gram.scaled(Scaled(first, -power))
    twice = once.scaled(Scaled(second))
    by = torch.from_numpy(first * second)[:, None]
    wanted = ((by * rows) @ (by * rows).T).numpy()
    np.testing.assert_allclose(twice.values, wanted, rtol=1e-14)
    np.testing.assert_allclose(twice.lengths().values(), np.sqrt(wanted.diagonal()), rtol=1e-14)
    np.testing.assert_allclose(twice.root() @ twice.root().T, wanted, rtol=1e-12)
    kept = twice.only([1]).scaled(Scaled(np.array([2.0])))
    np.testing.assert_allclose(kept.values, 4 * wanted[1:, 1:], rtol=1e-14)
    np.testing.assert_allclose(gram.lengths().values(), np.sqrt((rows**2).sum(1).numpy()) * scale, rtol=1e-14)
