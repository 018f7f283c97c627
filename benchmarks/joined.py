"""What it costs that losses or outputs pass through one tensor, against the same losses handed over one by one.

    python -m benchmarks.joined [--rounds 60]

All forms of a model take turns within a round, in another order each time. Times are those of one thread on the
processor; the median of the ratios of one round is printed. The *floor* is m bare ``torch.autograd.grad`` calls over
the trunk and the head of that loss, for separate losses. A step that takes less than it has not differentiated
everything, and ends the run with an error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import gradsurgery

Join = Callable[[Sequence[Tensor]], "Tensor | list[Tensor]"]


def separate(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [(y - i).square().mean() for i, y in enumerate(outputs)]


def filled(outputs: Sequence[Tensor]) -> list[Tensor]:
    losses = torch.zeros(len(outputs))
    for i, loss in enumerate(separate(outputs)):
        losses[i] = loss
    return list(losses.unbind())


def columns(outputs: Sequence[Tensor]) -> list[Tensor]:
    out = torch.cat(list(outputs), 1)
    return [(out[:, i] - i).square().mean() for i in range(out.shape[1])]


FORMS: dict[str, Join] = {
    "separate": separate,
    "stack, unbind": lambda outputs: list(torch.stack(separate(outputs)).unbind()),
    "stack times weights": lambda outputs: torch.stack(separate(outputs)) * torch.ones(len(outputs)),
    "filled": filled,
    "columns of cat": columns,
}
#: Width, heads, layers of the trunk, batch, width of the heads.
MODELS = {
    "3 linear heads on 1 x 32, batch 32": (32, 3, 1, 32, 0),
    "8 heads of 2 x 64, batch 64": (64, 8, 2, 64, 64),
    "8 heads of 2 x 64, batch 256": (64, 8, 2, 256, 64),
    "4 heads of 2 x 512, batch 256 (ghosts)": (512, 4, 3, 256, 512),
}


class Model(nn.Module):
    """A trunk, and a head per loss."""

    def __init__(self, width: int, heads: int, depth: int, head_width: int) -> None:
        super().__init__()
        sizes = [8, *[width] * depth]
        pairs = list(pairwise(sizes))
        self.trunk = nn.Sequential(*[layer for i, o in pairs for layer in (nn.Linear(i, o), nn.Tanh())])
        self.heads = nn.ModuleList(self.head(width, head_width) for _ in range(heads))

    @staticmethod
    def head(width: int, inner: int) -> nn.Module:
        if not inner:
            return nn.Linear(width, 1)
        return nn.Sequential(
            nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, inner), nn.Tanh(), nn.Linear(inner, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def floor(model: Model, losses: Sequence[Tensor]) -> float:
    wanted = [[*model.trunk.parameters(), *head.parameters()] for head in model.heads]
    start = time.process_time()
    for i, (loss, params) in enumerate(zip(losses, wanted, strict=True)):
        torch.autograd.grad(loss, params, retain_graph=i < len(losses) - 1)
    return time.process_time() - start


def measure(name: str, rounds: int) -> str:
    torch.manual_seed(0)
    width, heads, depth, batch, inner = MODELS[name]
    model, x = Model(width, heads, depth, inner), torch.randn(batch, 8)
    optimizers = {form: gradsurgery.UPGrad(torch.optim.SGD(model.parameters(), lr=0.0)) for form in FORMS}
    spent: dict[str, list[float]] = {form: [] for form in ("floor", *FORMS)}
    order, draw = list(spent), random.Random(0)
    for _ in range(rounds + 3):
        draw.shuffle(order)
        for form in order:
            if form == "floor":
                spent[form].append(floor(model, separate(model(x))))
                continue
            losses = FORMS[form](model(x))
            start = time.process_time()
            optimizers[form].backward(losses)
            spent[form].append(time.process_time() - start)
            optimizers[form].zero_grad()
    ratios = {
        form: statistics.median(a / b for a, b in zip(times[3:], spent["separate"][3:], strict=True))
        for form, times in spent.items()
    }
    fast = [form for form in FORMS if ratios[form] < ratios["floor"]]
    if fast:
        raise RuntimeError(f"{name}: {fast} took less than the floor, so that something was not differentiated.")
    cells = " | ".join(f"{ratios[form]:.2f}" for form in list(FORMS)[1:])
    return f"| {name} | {1 / ratios['floor']:.2f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| UPGrad | separate / floor | {' | '.join(f'{form} / separate' for form in list(FORMS)[1:])} |")
    print("| --- |" + " ---: |" * len(FORMS))
    for name in MODELS:
        print(measure(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()
