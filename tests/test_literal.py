"""Random combinations of switches, calls and engines against the literal reference; see literal.py."""

from __future__ import annotations

import pytest
from literal import run


# A draw holds one method with up to six switches, and seven calls of several kinds. Split, so that cores share them.
@pytest.mark.parametrize("first", range(0, 600, 60))
def test_every_combination_is_what_its_formulas_say(first):
    for seed in range(first, first + 60):
        run(seed)
