"""What holds for every test."""

from __future__ import annotations

import os

# Pictures are written to files; a test machine has no screen. Set before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"
# Text is as wide as the terminal, and what starts the tests may say how wide that is.
os.environ["COLUMNS"] = "100"

import collections
import gc
import importlib.metadata

import hypothesis
import pytest
import torch

from gradsurgery.graph import hooks

# What is imported and collected stays to the end: a million objects, which each search for garbage would go through.
gc.disable()

# One thread: sums then run in one order on every machine, so "bit for bit" means the same everywhere, and tensors as
# small as those of the tests are faster without a pool.
torch.set_num_threads(1)

# No deadline: the first example pays for imports and caches. The examples are the same in every run and on every
# machine, so that what passes for one passes for all. `make explore` draws new ones; what fails there is kept in
# .hypothesis and tried first the next time.
hypothesis.settings.register_profile("fixed", deadline=None, max_examples=40, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile("explore" if os.environ.get("EXPLORE") else "fixed")


def pytest_report_header():
    """Which of the libraries that this one is compared with are there."""
    from gradsurgery.testing import PEERS

    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    found = [f"{name} {installed.get(name.replace('_', '-'), 'is not installed')}" for name in PEERS]
    return f"peers: {', '.join(found)}"


# Files whose tests take seconds each. A core that meets one of them last works on while the others are idle.
LONG = [
    "test_ddp", "test_sharded", "test_compile", "test_examples", "test_yardsticks", "test_literal", "test_evidence",
    "test_transformers", "test_lightning", "test_accelerate", "test_monitor", "test_mutants", "test_published",
    "test_conformance", "test_problems", "test_demo", "test_ghost_random", "test_cli", "test_docs",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort files for processes that share them out, and refuse names that differ from process to process."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        tests = collections.Counter(item.path for item in items)
        rank = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: (rank.get(item.path.stem, len(LONG)), -tests[item.path], item.path))
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"{len(named)} tests have an address in their name, such as {named[0]}: give them ids.")


def pytest_collection_finish():
    """From here on garbage is looked for, among what tests make."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before each test, and forget hooks of others, so that no test depends on those before it."""
    torch.manual_seed(0)
    hooks.look()
