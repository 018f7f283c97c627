"""Models to be timed: a shared trunk, and a private head for each of m losses."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class Multi(nn.Module):
    """A trunk and m private heads."""

    def __init__(self, trunk: nn.Module, width: int, tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        features = self.trunk(x)
        features = features.mean(1) if features.dim() == 3 else features
        return [(head(features) - i).square().mean() for i, head in enumerate(self.heads)], features


class Burgers(nn.Module):
    """One network u(t, x), and losses for parts of the domain: residuals in slabs of time, the walls, the start."""

    def __init__(self, tasks: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [2, *[width] * depth]
        layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
        self.trunk = nn.Sequential(*layers, nn.Linear(width, 1))
        self.heads = nn.ModuleList()
        self.tasks = tasks

    def forward(self, points: Tensor) -> tuple[list[Tensor], Tensor | None]:
        inside, edge = points.split([len(points) * 4 // 5, len(points) - len(points) * 4 // 5])
        inside = inside.requires_grad_()
        u = self.trunk(inside)
        (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[:, 1].sum(), inside, create_graph=True)
        residual = slope[:, 0] + u[:, 0] * slope[:, 1] - 0.01 / torch.pi * curvature[:, 1]
        walls, start = self.trunk(edge)[:, 0].chunk(2)
        start = start + torch.sin(torch.pi * edge[len(walls) :, 1])
        edges = [walls, start] if self.tasks > 2 else [torch.cat([walls, start])]
        slabs = residual.chunk(self.tasks - len(edges))
        return [part.square().mean() for part in (*slabs, *edges)], None


@dataclass
class Workload:
    """A model and its inputs.

    Attributes:
        model: Its ``trunk`` is shared, its ``heads`` are private. Called with inputs it gives the losses, and the
            features that all losses go through, if there are such.
        draw: Makes new inputs on the CPU.
        device: Where the model is.
    """

    model: nn.Module
    draw: Callable[[], Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.renew()
        self.shared = [p for p in self.model.trunk.parameters() if p.requires_grad]
        self.private = list(self.model.heads.parameters())
        self.size = sum(p.numel() * p.element_size() for p in self.shared)

    def renew(self) -> None:
        """Draw new inputs."""
        self.x = self.draw().to(self.device)


def linear(sizes: list[int]) -> list[nn.Module]:
    return [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]


def mlp(tasks: int, width: int = 512, depth: int = 4, batch: int = 128) -> tuple[nn.Module, Callable[[], Tensor]]:
    trunk = nn.Sequential(*linear([width] * (depth + 1)))
    return Multi(trunk, width, tasks), lambda: torch.randn(batch, width)


def conv(tasks: int, batch: int = 64) -> tuple[nn.Module, Callable[[], Tensor]]:
    blocks = [
        layer
        for i, o in ((3, 32), (32, 64), (64, 128))
        for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    trunk = nn.Sequential(*blocks, nn.Flatten(), *linear([2048, 256]))
    return Multi(trunk, 256, tasks), lambda: torch.randn(batch, 3, 32, 32)


def transformer(tasks: int, width: int = 256, layers: int = 3) -> tuple[nn.Module, Callable[[], Tensor]]:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return Multi(trunk, width, tasks), lambda: torch.randn(8, 64, width)


def recommender(tasks: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    trunk = nn.Sequential(nn.Embedding(50_000, 64), nn.Flatten(), *linear([8 * 64, 512, 256]))
    return Multi(trunk, 256, tasks), lambda: torch.randint(50_000, (128, 8))


def pinn(tasks: int, width: int = 64, depth: int = 4, points: int = 2560) -> tuple[nn.Module, Callable[[], Tensor]]:
    return Burgers(tasks, width, depth), lambda: torch.rand(points, 2)


# Name → what it is, and what builds the model and its inputs.
WORKLOADS: dict[str, tuple[str, Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]]] = {
    "MLP": ("4 layers of 512, batch 128", mlp),
    "wide MLP": ("6 layers of 2048, batch 64", lambda tasks: mlp(tasks, 2048, 6, 64)),
    "convolutions": ("3 strided convolutions with BatchNorm, one layer 2048 to 256, batch 64 of 32 × 32", conv),
    "transformer": ("3 encoder layers, 256 wide, 4 heads, batch 8 of 64 tokens", transformer),
    "recommender": ("8 fields in one table of 50 000 × 64, layers of 512 and 256, batch 128", recommender),
    "PINN": ("Burgers' equation, 4 tanh layers of 64, one full batch of 2560 points, losses by region", pinn),
}


def build(name: str, tasks: int, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return Workload(*WORKLOADS[name][1](tasks), device)


def mlp_of_size(parameters: float, tasks: int, device: torch.device, depth: int = 6) -> Workload:
    """An MLP with about so many parameters, batch 128.

    Args:
        parameters: How many entries its trunk has, about.
        tasks: Number of losses.
        device: Where it is.
        depth: Number of layers, of one width.

    Returns:
        The model and its inputs.
    """
    torch.manual_seed(0)
    return Workload(*mlp(tasks, round((parameters / depth) ** 0.5), depth), device)


def machine(device: str) -> str:
    """What is measured on.

    Args:
        device: The device, as torch names it.

    Returns:
        System and processor, and the accelerator if there is one.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    host = f"{platform.system()}, {model}"
    return host if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {host}"
