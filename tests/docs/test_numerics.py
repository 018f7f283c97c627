"""What docs/numerics.md says: how far inner products and directions are off, and what is equal bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
ENGINES = ["rows", "ghosts", "blocks"]
# The hidden width and the batch: rows of few entries, and of many.
FEW, MANY = (20, 32), (300, 64)


def table(heading):
    """The table of the page whose first column is `engine` and whose next one is the heading, by row and column."""
    lines = iter(PAGE.splitlines())
    header = next(line for line in lines if line.startswith(f"| engine | {heading} |"))
    columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            return found
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = dict(zip(columns, map(float, cells), strict=True))
    return found


PRODUCTS = table("float64 | float32, few entries")
DIRECTIONS = table("float64 | float32 | bfloat16")


class Net(nn.Module):
    def __init__(self, width, dtype, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.Tanh())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(4))
        self.to(dtype)

    def losses(self, batch, seed=0):
        generator = torch.Generator().manual_seed(seed)
        p = next(self.parameters())
        x = torch.randn(batch, p.shape[1], generator=generator).to(p.dtype)
        y = torch.randn(4, batch, generator=generator).to(p.dtype)
        z = self.trunk(x)
        return [(head(z)[:, 0] - target).square().mean() for head, target in zip(self.heads, y, strict=True)]


def setting(engine, width, dtype, **switches):
    net = Net(width, dtype)
    return net, gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine, **switches)


def exact(net, losses):
    """The rows, and their inner products in extended precision."""
    shared = list(net.trunk.parameters())
    rows = np.array(
        [
            torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).numpy()
            for loss in losses
        ]
    )
    wide = rows.astype(np.longdouble)
    return rows, np.array([[(g * h).sum() for h in wide] for g in wide]).astype(np.float64)


def measured(engine, size, name, seed=0):
    """How far products and direction are off, in the units of the page."""
    (width, batch), dtype = size, DTYPES[name]
    net, optimizer = setting(engine, width, dtype)
    rows, gram = exact(net, net.losses(batch, seed))
    report = optimizer.backward(net.losses(batch, seed))
    assert report.engine == engine
    lengths = np.sqrt(gram.diagonal())
    products = float((np.abs(report.gram.numpy() - gram) / np.outer(lengths, lengths)).max())
    weights = np.array(list(report.weights.values()))
    d = torch.cat([p.grad.flatten().double() for p in net.trunk.parameters()]).numpy()
    roundoff = torch.finfo(dtype).eps / 2
    return products, float(np.linalg.norm(d - weights @ rows) / (roundoff * np.abs(weights) @ lengths))


CASES = [
    (engine, size, name, "float32, few entries" if (name, size) == ("float32", FEW) else name)
    for engine in ENGINES
    for name in DTYPES
    for size in (FEW, MANY)
]


@pytest.mark.parametrize(("engine", "size", "name", "column"), CASES)
def test_products_and_directions_are_as_exact_as_the_page_says(engine, size, name, column):
    products, direction = zip(*(measured(engine, size, name, seed) for seed in range(2)), strict=True)
    assert max(products) <= PRODUCTS[engine][column]
    assert max(direction) <= DIRECTIONS[engine][name]


def test_few_entries_are_what_the_page_calls_few():
    power = "".join(str("⁰¹²³⁴⁵⁶⁷⁸⁹".index(digit)) for digit in re.search(r"up to 2([⁰-⁹¹²³]+) entries", PAGE)[1])
    n = 2 ** int(power) // 2
    rows = torch.full((2, n), 1.0 + 2.0**-12)  # squares that single precision rounds
    for entries, is_exact in ((n, True), (n + 1, False)):
        p = nn.Parameter(torch.zeros(entries))
        optimizer = gradsurgery.UPGrad(torch.optim.SGD([p], lr=0.1))
        row = torch.cat([rows[0], rows[0, : entries - n]])
        gram = optimizer.backward([(p * row).sum(), (p * row).sum()]).gram
        assert (gram[0, 0].item() == entries * (1.0 + 2.0**-12) ** 2) is is_exact


# ------------------------------------------------------------------------------------------------ bit for bit


def everything(net, optimizer, batch, steps):
    """Gradients of some steps, and the parameters at their end."""
    found = []
    for t in steps:
        optimizer.zero_grad()
        optimizer.backward(net.losses(batch, t))
        found += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return found + [p.detach().clone() for p in net.parameters()]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_call_gives_the_same_bits(engine, size):
    width, batch = size
    net, optimizer = setting(engine, width, torch.float32)
    first = everything(net, optimizer, batch, [0])
    net, optimizer = setting(engine, width, torch.float32)
    optimizer.backward(net.losses(batch, 7))
    optimizer.zero_grad()
    assert equal(everything(net, optimizer, batch, [0]), first)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_bit_for_bit(engine):
    width, batch = FEW
    net, optimizer = setting(engine, width, torch.float32, weight_momentum=0.5)
    everything(net, optimizer, batch, range(2))
    other, again = setting(engine, width, torch.float32, weight_momentum=0.5)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert equal(everything(other, again, batch, range(2, 4)), everything(net, optimizer, batch, range(2, 4)))


@pytest.mark.parametrize("engine", ENGINES)
def test_deterministic_algorithms_are_accepted_and_change_nothing(engine):
    width, batch = FEW
    plain = everything(*setting(engine, width, torch.float32), batch, range(2))
    torch.use_deterministic_algorithms(True)
    try:
        assert equal(everything(*setting(engine, width, torch.float32), batch, range(2)), plain)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("columns", [50, 60_000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_autocast_does_not_act_on_our_products(dtype, columns):
    rows = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer = setting("rows", 2, torch.float32)[1]
    plain = optimizer.combine(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(optimizer.combine(rows), plain)
