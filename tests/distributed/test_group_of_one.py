"""A group of one process takes the roads of several, with nobody to talk to: its steps are those of no group."""

from __future__ import annotations

import pytest
import torch

import gradsurgery
from tests.distributed import test_ddp, test_sharded
from tests.support.processes import group_of_one

REPLICATED = (
    "one process: PCGrad", "one process: GradDrop", "one process: FAMOWeighter", "PCGrad(Uncertainty)",
    "MGDA, by parameter", "MGDA of logarithms", "MoCo(DWA)", "every=2", "warmup=2", "joined", "GradNorm",
    "accumulation: PCGrad", "accumulation: MoCo", "accumulation: FAMOWeighter", "accumulation: GradNorm",
    "nan on one rank: raise", "nan on one rank: skip", "nan on one rank: drop",
    "private after all: PCGrad, Silent", "private after all: every=2, Silent", "private after all: every=2, Opaque",
    "private after all: PCGrad(NormalizedGradient), Silent", "private after all: NormalizedGradient, Silent",
    "private after all: NormalizedGradient, Opaque", "absent in a micro-batch: NormalizedGradientWeighter",
    "inactive hinge", "reentrant is refused", "others in one micro batch", "nothing in the last micro batch",
    "nothing finite in the last micro batch", "residuals", "mixed dtypes", "half precision rows",
    "weight out of range on one rank", "named and not reached",
)  # fmt: skip
SHARDED = (
    "fully_shard: PCGrad", "fully_shard: MoCo", "fully_shard: DWAWeighter", "fully_shard: UPGrad",
    "fully_shard: GradDrop", "fully_shard: GradNormWeighter", "fsdp accumulation",
    "fsdp gradients there before", "fsdp checkpointing", "tensor parallel: GradDrop",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group():
    with group_of_one():
        yield


@pytest.mark.parametrize("case", REPLICATED)
def test_replicated(case):
    test_ddp.cases(0, 1)[case]()


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters(case):
    test_sharded.cases(0, 1)[case]()


def test_products_of_pieces_are_made_in_double_precision():
    noise = []

    class Noted(gradsurgery.PCGrad):
        def weights(self, gram, losses):
            noise.append(self.noise)
            return super().weights(gram, losses)

    for net in (test_sharded.Net().float(), test_sharded.sharded(test_sharded.Net().float())):
        optimizer = Noted(torch.optim.SGD(net.parameters(), lr=0.01))
        optimizer.backward(test_ddp.losses_of(net, test_ddp.data(1)[0, 0].float()))
    assert noise[0] == noise[1]
