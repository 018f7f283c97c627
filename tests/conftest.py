"""What holds for every test."""

from __future__ import annotations

import os

# Pictures are written to files; a test machine has no screen. Set before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"
# Text is as wide as the terminal, and what starts the tests may say how wide that is.
os.environ["COLUMNS"] = "100"

import hypothesis
import pytest
import torch

# One thread: sums then run in one order on every machine, so "bit for bit" means the same everywhere, and tensors as
# small as those of the tests are faster without a pool.
torch.set_num_threads(1)

# No deadline: the first example pays for imports and caches. In CI the examples are the same in every run; on a desk
# they differ, and what fails is kept in .hypothesis and tried first the next time.
hypothesis.settings.register_profile("desk", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before each test, so that no test depends on those before it."""
    torch.manual_seed(0)
