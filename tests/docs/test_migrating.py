"""docs/migrating.md: every new call runs, and results compare with the other library's as the page says."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import gradsurgery
from gradsurgery.cli.catalogue import tables
from gradsurgery.testing import import_peer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
VALUES = (2.0, 0.5, 1.0)


class Row(NamedTuple):
    section: str
    old: str
    new: str
    result: str


def code(cell: str) -> str:
    return re.fullmatch(r"`([^`]+)`", cell)[1] if re.fullmatch(r"`([^`]+)`", cell) else ""


ROWS = [
    Row(section, *cells)
    for section, (head, *rows) in tables(PAGE)
    if head == ["old", "new", "result"]
    for cells in rows
]
# What a result says in its first words, and so whether it can be compared.
COMPARED = ("same", "m times theirs", "other")
PEERS = {
    "TorchJD": ("torchjd", ["torchjd.autojac", "torchjd.scalarization", "torchjd.aggregation"]),
    "SoftAdapt": ("softadapt", ["softadapt"]),
    "gradnorm-pytorch": ("gradnorm-pytorch", ["gradnorm_pytorch"]),
}
OTHERS = "PhysicsNeMo Sym, PINNacle, audiocraft, DomainBed"
WITH_PEER = [
    row
    for row in ROWS
    if row.section in PEERS and code(row.old) and "..." not in row.old and row.result.startswith(COMPARED)
]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(4, 5)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)])


def setting(section: str) -> dict:
    """What the page says that its tables use, in float64."""
    torch.manual_seed(0)
    model = Net().double()
    z = model.trunk(torch.randn(8, 4).double()).tanh()
    losses = [(head(z) - 3 * sign).square().mean() for head, sign in zip(model.heads, (1, -1), strict=True)]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    build = gradsurgery.PCGrad
    if section == "gradnorm-pytorch":
        build = lambda base: gradsurgery.GradNormWeighter(base, model.trunk.weight)  # noqa: E731
    first, second, third = [5.0, 4.0, 3.2, 2.7, 2.5], [1.0, 2.0, 3.0, 4.0, 5.5], [1.0, 1.5, 1.0, 0.7, 0.8]
    return {
        "torch": torch,
        "gradsurgery": gradsurgery,
        "model": model,
        "z": z,
        "losses": losses,
        "base": base,
        "optimizer": build(base),
        "first": first,
        "second": second,
        "third": third,
    }


def run(text: str, names: dict) -> object:
    """Run statements; the value is that of the last one, if it is an expression."""
    *before, last = text.split("; ")
    for statement in before:
        exec(statement, names)
    try:
        expression = compile(last, "migrating.md", "eval")
    except SyntaxError:
        exec(last, names)
        return None
    return eval(expression, names)


def test_the_page_has_rows():
    authors = "The authors' MultiAdam, AdaTask and MTAdam"
    others = "MTLlib, PaddleScience, AuxiLearn, conflictfree"
    assert {row.section for row in ROWS} == {"Pytorch-PCGrad", "LibMTL", OTHERS, authors, others, *PEERS}
    assert all(code(row.new) for row in ROWS)
    assert {row.section for row in WITH_PEER} == set(PEERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.new}")
def test_new_call_runs(row):
    names = setting(row.section)
    before = copy.deepcopy(names["model"].state_dict())
    value = run(code(row.new), names)
    optimizer = value if isinstance(value, gradsurgery.MultiLossOptimizer) else names["optimizer"]
    if "backward" not in row.new:
        if re.search(r"\[[\d.]+, [\d.]+, [\d.]+\]", row.new):  # a number for each of three losses
            names["losses"].append(names["z"].square().mean())
        optimizer.zero_grad()
        optimizer.backward(names["losses"])
    assert any(p.grad is not None and p.grad.any() for p in names["model"].parameters())
    optimizer.step()
    after = names["model"].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


# -------------------------------------------------------------------------------------------- against the other library


def theirs(section: str) -> dict:
    package, modules = PEERS[section]
    names = setting(section)
    for module in modules:
        try:
            found = import_peer(package, module)
        except RuntimeError as error:
            pytest.skip(str(error))
        names |= {name: getattr(found, name) for name in getattr(found, "__all__", dir(found))}
    return names


def matrix(m: int) -> torch.Tensor:
    """Rows that conflict and that no two methods answer alike."""
    rows = torch.randn(m, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows - 0.35 * rows.mean(0) * m


def coefficients(optimizer: gradsurgery.MultiLossOptimizer, values) -> torch.Tensor:
    p = optimizer.param_groups[0]["params"][0]
    report = optimizer.backward([value + 0.0 * p.sum() for value in values])
    return torch.tensor(list(report.weights.values()), dtype=torch.float64)


def progress(weighter, weights) -> torch.Tensor:
    """Weights after two steps, with gradients of lengths 1 and 3; the first loss has fallen to a tenth meanwhile."""
    for values in ((1.0, 1.0), (0.1, 1.0)):
        weighter(values)
    return torch.as_tensor(weights(), dtype=torch.float64)


def both_gradnorms(names: dict, new, other: dict, old) -> tuple[torch.Tensor, torch.Tensor]:
    def losses(side, values):
        entries = side["model"].trunk.weight.flatten()
        return [value + c * (x - x.detach()) for value, c, x in zip(values, (1.0, 3.0), entries[:2], strict=True)]

    def ours(values):
        new.zero_grad()
        new.backward(losses(names, values))
        new.step()

    here = progress(ours, lambda: list(new.backward(losses(names, (0.1, 1.0))).weights.values()))
    there = progress(lambda values: old.backward(losses(other, values)), lambda: old.loss_weights.tolist())
    return here, there


def answers(row: Row, names: dict, other: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same question put to both: our answer, theirs, and the number of losses."""
    new, old = run(code(row.new), names), run(code(row.old), other)
    if row.section == "SoftAdapt":
        return new, torch.as_tensor(old.detach(), dtype=torch.float64), len(new)
    if row.section == "gradnorm-pytorch":
        return *both_gradnorms(names, new, other, old), 2
    if not isinstance(new, gradsurgery.MultiLossOptimizer):  # both have filled .grad
        both = [torch.cat([p.grad.flatten() for p in side["model"].parameters()]) for side in (names, other)]
        return *both, 2
    outliers = "Krum" in row.old or "Trimmed" in row.old
    rows = matrix(5 if outliers else 2 if "two losses" in row.result else 3)
    if isinstance(new, gradsurgery.Surgery):
        return new.combine(rows), old(rows), len(rows)
    if isinstance(old, importlib.import_module("torchjd.scalarization").Scalarizer):
        values = torch.tensor(VALUES, requires_grad=True)
        old(values).backward()
        return coefficients(new, VALUES), values.grad.double(), len(VALUES)
    return coefficients(new, VALUES) @ rows, old(rows.float()).double(), len(rows)


# cvxpy, which TorchJD's Nash-MTL calls, speaks about the form of its problem.
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
@pytest.mark.parametrize("row", WITH_PEER, ids=lambda row: f"{row.section}: {row.old}")
def test_result_is_as_the_page_says(row, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    mine, their, m = answers(row, setting(row.section), theirs(row.section))
    if row.result.startswith("same direction"):
        assert torch.nn.functional.cosine_similarity(mine, their, dim=0) > 1 - 1e-6
        assert not torch.allclose(mine, their, rtol=0.01)
        return
    factor = m if row.result.startswith("m times") else 1
    off = float((mine - factor * their).norm() / mine.norm())
    if row.result.startswith("other"):
        assert off > 1e-3
    elif "nearly" in row.result:
        assert 1e-8 < off < 1e-2
    else:
        assert off < 1e-6
