"""What the files of this folder are given that define no net and no inputs of their own."""

from __future__ import annotations

import pytest
import torch

from tests.support.two_heads import Net


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(8, 5, dtype=torch.float64)
