"""Predictions of what a step costs: memory is held to what is measured, times to their order."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery.watch.diagnose import peak_bytes


def wide(tasks=6, width=256, batch=32):
    torch.manual_seed(0)
    trunk = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))
    model = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(width, tasks)})
    return model, torch.randn(batch, width)


def losses_of(model, x):
    return list(model["head"](model["trunk"](x)).square().mean(0))


@pytest.mark.parametrize("batch", [32, 2048])
def test_memory_is_what_a_step_takes(batch):
    model, x = wide(batch=batch)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    found = gradsurgery.estimate(model, losses_of(model, x))
    losses = losses_of(model, x)
    plain = peak_bytes(lambda: torch.autograd.backward(losses), x.device)
    assert [cost.engine for cost in found.engines] == (
        ["ghosts", "rows", "blocks"] if batch == 32 else ["rows", "blocks"]
    )
    measured = {}
    for cost in found.engines:
        base.zero_grad()
        optimizer = gradsurgery.MGDA(base, engine=cost.engine)
        losses = losses_of(model, x)
        measured[cost.engine] = (peak_bytes(lambda o=optimizer, v=losses: o.backward(v), x.device) - plain) / 1e6
        assert optimizer.report.engine == cost.engine
        size = found.shared * 4 / 1e6
        assert cost.megabytes == pytest.approx(measured[cost.engine], rel=0.3, abs=2.5 * size)
        assert cost.fits
    by_name = {cost.engine: cost.megabytes for cost in found.engines}
    # Wide borders cost more than the rows that are spared.
    assert (by_name["blocks"] < 0.6 * by_name["rows"]) == (batch == 32)


def test_the_first_engine_is_the_one_that_is_taken():
    model, x = wide()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    for method, options in [
        (gradsurgery.MGDA, {}),
        (gradsurgery.MGDA, {"engine": "rows"}),
        (gradsurgery.MGDA, {"engine": "blocks"}),
        (gradsurgery.GradDrop, {}),
        (gradsurgery.PCGrad, {"streaming": True}),
        (gradsurgery.PCGrad, {"row_dtype": torch.bfloat16}),
    ]:
        optimizer = method(base, **options)
        found = gradsurgery.estimate(optimizer, losses_of(model, x))
        report = optimizer.backward(losses_of(model, x))
        assert found.engines[0].engine == report.engine
        assert report.reason
        base.zero_grad()


def test_rows_in_half_precision_take_half():
    model, x = wide()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    full, half = (
        gradsurgery.estimate(gradsurgery.PCGrad(base, engine="rows", **options), losses_of(model, x))
        for options in ({}, {"row_dtype": torch.bfloat16})
    )
    saved = full.engines[0].megabytes - half.engines[0].megabytes
    assert saved == pytest.approx(full.tasks * 2 * full.shared / 1e6)


def test_small_models_form_rows():
    model, x = wide(width=8)
    found = gradsurgery.estimate(model, losses_of(model, x))
    assert found.engines[0].engine == "rows"
    assert "entries in all rows" in found.reason


def test_a_table_of_which_rows_are_few():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Embedding(20_000, 16), "head": nn.Linear(16, 4)})
    z = model["trunk"](torch.arange(8))
    found = gradsurgery.estimate(model, list(model["head"](z).square().mean(0)))
    costs = {cost.engine: cost for cost in found.engines}
    assert costs["ghosts"].times < costs["rows"].times
    assert costs["ghosts"].megabytes < 0.1 * costs["rows"].megabytes


def test_nothing_is_left_behind():
    model, x = wide()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = losses_of(model, x)
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    gradsurgery.estimate(optimizer, losses)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.report is None
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(torch.get_rng_state(), random)
    optimizer.backward(losses)  # the graph is whole


def test_it_can_be_printed_and_written():
    model, x = wide(width=8)
    found = gradsurgery.estimate(model, losses_of(model, x))
    assert "automatic choice: rows" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["engines"][0]["engine"] == "rows"


def test_what_does_not_fit_is_said(monkeypatch):
    model, x = wide()
    monkeypatch.setattr(sys.modules["gradsurgery.watch.estimate"], "_free", lambda device: 1)
    found = gradsurgery.estimate(model, losses_of(model, x))
    assert {cost.engine: cost.fits for cost in found.engines}["rows"] is False
    assert " no\n" in str(found)


def test_bad_input():
    model, x = wide(width=8)
    with pytest.raises(TypeError, match="`optimizer_or_model` must be"):
        gradsurgery.estimate(3, losses_of(model, x))
    with pytest.raises(RuntimeError, match="'0' reaches none"):
        gradsurgery.estimate(nn.Linear(2, 2), losses_of(model, x))
    z = checkpoint(model["trunk"], x.requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradsurgery.estimate(model, list(model["head"](z).mean(0)))
