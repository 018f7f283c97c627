"""Random combinations of switches, calls and engines against the literal reference; see literal.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.literal import run, simplex


# A draw holds one method with up to six switches, and seven calls of several kinds. Split, so that cores share them.
@pytest.mark.parametrize("first", range(0, 600, 60))
def test_every_combination_is_what_its_formulas_say(first):
    for seed in range(first, first + 60):
        run(seed)


def test_the_literal_projection_is_exact_for_entries_of_any_size():
    """A training that diverges gives entries that differ by 1e10, and shares are shares all the same."""
    assert simplex(np.array([1e-3, -1e1, 7.06e9])).tolist() == [0.0, 0.0, 1.0]
    np.testing.assert_allclose(simplex(np.array([1e6, 1e6 - 0.5])), [0.75, 0.25], rtol=1e-15)
