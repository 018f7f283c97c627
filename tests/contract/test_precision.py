"""Mixed precision: loss scaling, autocast, fused optimizers and half precision parameters, for every method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsurgery
from tests.support import loops
from tests.support.loops import METHODS, NAMES, Net, end_epoch, inputs, losses_of, memory_of, propose, same

OVER_METHODS = pytest.mark.parametrize("name", METHODS)
BAD = 3  # the step in which one loss overflows


def test_every_method_of_the_package_is_tried():
    tried = {
        type(build(loops.OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(2))]))).__name__ for build in METHODS.values()
    }
    assert tried == loops.public_methods()


def everything(net, optimizer):
    """All that training changes, copied."""
    return copy.deepcopy([net.state_dict(), optimizer.state_dict()])


def run(name, base, steps, *, scaled, dtype=torch.float64, autocast=False, clip=None, bad=None, what="value"):
    """Train; with a scaler as its users write it, without one as the reference."""
    net = Net(dtype)
    optimizer = METHODS[name](loops.OPTIMIZERS[base](net.parameters()))
    # The scale grows every second step, so that the method must see through it.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaled else None
    for t in steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            residuals = net(inputs(t, dtype))
        losses = losses_of(residuals)
        if t == bad and what == "value":
            losses["b"] = losses["b"] * float("inf")
        elif t == bad:  # the value stays, the gradient is 0/0
            losses["b"] = losses["b"] + (residuals["b"] - residuals["b"].detach()).abs().sqrt().sum()
        before = everything(net, optimizer)
        report = propose(optimizer, residuals, losses, scaler=scaler)
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if t == bad:
            assert "nonfinite" in report.flags or what == "gradient"
            assert same(everything(net, optimizer), before)
            continue
        assert "nonfinite" not in report.flags
        end_epoch(name, optimizer)
    return net, optimizer, scaler


@pytest.mark.parametrize(("clip", "what"), [(None, "gradient"), (0.5, "value")])
@OVER_METHODS
def test_loss_scaling_changes_nothing_and_an_overflow_teaches_nothing(name, clip, what):
    """Scales are powers of two, so that the run must equal one that never saw the bad batch."""
    net, optimizer, scaler = run(name, "sgd", range(6), scaled=True, clip=clip, bad=BAD, what=what)
    twin, reference, _ = run(name, "sgd", [t for t in range(6) if t != BAD], scaled=False, clip=clip)
    # Up twice, down once for the overflow, up again.
    assert scaler.get_scale() == 2.0**11
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(numbers(memory_of(optimizer)), numbers(memory_of(reference)), rtol=1e-9, atol=1e-12)


def numbers(memory):
    """All numbers in a memory, in one tensor."""
    if isinstance(memory, dict):
        parts = [numbers(memory[key]) for key in sorted(memory, key=str)]
    elif isinstance(memory, (list, tuple)):
        parts = [numbers(value) for value in memory]
    elif isinstance(memory, (int, float, torch.Tensor)):
        return torch.as_tensor(memory, dtype=torch.float64).reshape(-1)
    else:
        parts = []
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


@OVER_METHODS
def test_autocast_scaling_and_a_fused_optimizer_together(name):
    """The forward pass runs in bfloat16, the parameters are float32, and AdamW is torch's fused one."""
    options = {"dtype": torch.float32, "autocast": True, "clip": 0.5}
    net, _, _ = run(name, "fused", range(6), scaled=True, bad=BAD, **options)
    twin, _, _ = run(name, "fused", [t for t in range(6) if t != BAD], scaled=False, **options)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------- half precision parameters


def linear(rows, dtype):
    """Losses with the given gradients, over one shared parameter in the given precision."""
    p = nn.Parameter(torch.zeros(rows.shape[1], dtype=dtype))
    values = (1.0, 2.0, 4.0)
    pairs = zip(NAMES, rows, values, strict=True)
    return p, {name: (p * row.to(dtype)).double().sum() + value for name, row, value in pairs}


# In half precision the squares of the long rows overflow and those of the short ones vanish.
ROWS = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half()
LENGTHS = {"long": [300.0, 200.0, 400.0], "short": [2**-13, 2**-14, 2**-13], "both": [300.0, 2**-6, 4.0]}


@pytest.mark.parametrize("lengths", LENGTHS)
@OVER_METHODS
def test_half_rows_act_as_the_same_rows_in_double_precision(name, lengths):
    rows = (ROWS.float() * torch.tensor(LENGTHS[lengths])[:, None]).half().double()
    found = {}
    for dtype in (torch.float16, torch.float64):
        p, losses = linear(rows, dtype)
        optimizer = METHODS[name](torch.optim.SGD([p], lr=0.1))
        found[dtype] = optimizer.backward(losses), p.grad
    (report, grad), (exact_report, exact) = found[torch.float16], found[torch.float64]
    assert grad.dtype == torch.float16
    assert torch.isfinite(grad).all()
    # A surgery adds up in single precision and rounds once. In one backward pass autograd adds up in half precision, as
    # for any weighted sum, and each term is rounded.
    weights = torch.tensor(list(exact_report.weights.values())) if exact_report.weights else torch.ones(3)
    terms = (weights.abs()[:, None] * rows.abs()).sum(0)
    one_pass = exact_report.gram is None
    slack = 2.0**-11 * (4 * terms if one_pass else 1.01 * exact.abs() + 2e-4 * terms) + 2.0**-23
    assert ((grad.double() - exact).abs() <= slack).all()
    if exact_report.gram is not None:
        lengths = exact_report.gram.diagonal().sqrt()
        error = (report.gram - exact_report.gram) / (lengths[:, None] * lengths)
        assert error.abs().max() < 1e-6
        assert report.gram.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_half_rows_are_multiplied_in_single_precision(dtype):
    """100000 entries of 200: in the precision of the rows their products overflow, or stop growing at 2^16."""
    rows = torch.full((2, 100_000), 200.0, dtype=dtype)
    rows[1, ::2] = -200.0
    p = nn.Parameter(torch.zeros(100_000, dtype=dtype))
    report = gradsurgery.MGDA(torch.optim.SGD([p], lr=0.1)).backward([(p * row).float().sum() for row in rows])
    assert report.gram.tolist() == [[4e9, 0.0], [0.0, 4e9]]
    assert report.norms == pytest.approx({"0": 4e9**0.5, "1": 4e9**0.5})


@OVER_METHODS
def test_an_overflow_in_one_micro_batch_skips_the_whole_step(name):
    """It is written through when the method acts, and what the earlier micro-batches left is not carried over."""
    net = Net()
    optimizer = METHODS[name](loops.OPTIMIZERS["sgd"](net.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(3):
        optimizer.zero_grad()
        before = everything(net, optimizer)
        for k in range(2):
            losses = {n: loss / 2 for n, loss in losses_of(net(inputs(2 * t + k))).items()}
            if (t, k) == (1, 0):
                losses["b"] = losses["b"] * float("inf")
            optimizer.backward(losses, accumulate=k == 0, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert same(everything(net, optimizer), before) == (t == 1)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.isfinite(p).all() for p in net.parameters())
