"""Models of the sizes that GPUs are bought for, in plain torch: a shared trunk, and a head for each loss."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.workloads import Multi, Workload

Drawn = tuple[nn.Module, int, Callable[[], Tensor]]


class Bottleneck(nn.Module):
    """He et al., 2016: 1 × 1, 3 × 3, 1 × 1, and a way around them."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        straight = stride == 1 and inputs == outputs
        self.around = (
            nn.Identity()
            if straight
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet(width: int, blocks: tuple[int, ...], side: int, batch: int) -> Drawn:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = width
    for k, count in enumerate(blocks):
        inner = width * 2**k
        for j in range(count):
            layers.append(Bottleneck(before, inner, 2 if k and not j else 1))
            before = 4 * inner
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trunk, before, lambda: torch.randn(batch, 3, side, side)


class LowRank(nn.Module):
    """A frozen linear layer, and a product of two thin matrices that is trained beside it (LoRA, Hu et al., 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        # Not zero, as it would be at the start: the first gradient of `down` would be.
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class Block(nn.Module):
    """A layer of a transformer encoder, normalized first."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()

        def linear(i: int, o: int) -> nn.Module:
            return LowRank(i, o, rank) if rank else nn.Linear(i, o)

        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = linear(width, 3 * width), linear(width, width)
        self.inner = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))
        if rank:
            self.first.requires_grad_(False)
            self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.mixed(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.inner(self.second(x))


def encoder(width: int, layers: int, length: int, batch: int, rank: int = 0) -> Drawn:
    trunk = nn.Sequential(*(Block(width, max(1, width // 64), rank) for _ in range(layers)))
    return trunk, width, lambda: torch.randn(batch, length, width)


def vit(width: int, layers: int, side: int, patch: int, batch: int) -> Drawn:
    cut = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.Flatten(2))
    blocks = (Block(width, max(1, width // 64), 0) for _ in range(layers))
    trunk = nn.Sequential(cut, Swapped(), *blocks, nn.LayerNorm(width))
    return trunk, width, lambda: torch.randn(batch, 3, side, side)


class Swapped(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def mlp(width: int, depth: int, batch: int) -> Drawn:
    layers = [layer for i, o in pairwise([width] * (depth + 1)) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers), width, lambda: torch.randn(batch, width)


def recommender(rows: int, columns: int, fields: int, width: int, batch: int) -> Drawn:
    trunk = nn.Sequential(
        nn.Embedding(rows, columns), nn.Flatten(), nn.Linear(fields * columns, width), nn.ReLU(),
        nn.Linear(width, width // 2), nn.ReLU(),
    )  # fmt: skip
    return trunk, width // 2, lambda: torch.randint(rows, (batch, fields))


#: Name → what it is, how it is built, and how a small copy is built that shows that the script works.
LARGE: dict[str, tuple[str, Callable[[], Drawn], Callable[[], Drawn]]] = {
    "ResNet-50": (
        "batch 32 of 224 × 224",
        lambda: resnet(64, (3, 4, 6, 3), 224, 32),
        lambda: resnet(4, (1, 1), 32, 2),
    ),
    "ViT-B": (
        "16 × 16 patches without positions or a class token, batch 32 of 224 × 224",
        lambda: vit(768, 12, 224, 16, 32),
        lambda: vit(16, 1, 16, 8, 2),
    ),
    "encoder with LoRA": (
        "24 layers of 1024, rank 16, batch 16 of 256 tokens",
        lambda: encoder(1024, 24, 256, 16, rank=16),
        lambda: encoder(16, 2, 4, 2, rank=2),
    ),
    "wide MLP": ("8 layers of 4096, batch 1024", lambda: mlp(4096, 8, 1024), lambda: mlp(16, 2, 4)),
    "recommender": (
        "26 fields in one table of 1 000 000 × 64, layers of 1024 and 512, batch 4096",
        lambda: recommender(1_000_000, 64, 26, 1024, 4096),
        lambda: recommender(50, 4, 3, 8, 4),
    ),
}
#: Where a GPU waits for launches rather than for arithmetic.
NARROW: dict[str, Callable[[], Drawn]] = {
    "MLP 4 x 64, batch 64": lambda: mlp(64, 4, 64),
    "MLP 8 x 128, batch 256": lambda: mlp(128, 8, 256),
    "encoder 4 x 128, batch 8 of 32": lambda: encoder(128, 4, 32, 8),
}
#: For comparisons with float64 on the CPU: a layer of every kind.
SMALL: dict[str, Callable[[], Drawn]] = {
    "MLP": lambda: mlp(64, 3, 32),
    "convolutions": lambda: resnet(8, (1, 1), 32, 8),
    "encoder": lambda: encoder(64, 2, 16, 4),
    "encoder with LoRA": lambda: encoder(64, 2, 16, 4, rank=4),
    "recommender": lambda: recommender(500, 16, 4, 64, 32),
}


def workload(build: Callable[[], Drawn], tasks: int, device: torch.device) -> Workload:
    """A model with heads and inputs on a device.

    Args:
        build: What makes the trunk.
        tasks: Number of losses.
        device: Where to.

    Returns:
        The workload; its ``shared`` are the parameters of the trunk that are trained.
    """
    torch.manual_seed(0)
    trunk, width, draw = build()
    work = Workload(Multi(trunk, width, tasks), draw, device)
    work.shared = [p for p in work.shared if p.requires_grad]
    work.size = sum(p.numel() * p.element_size() for p in work.shared)
    return work
