"""Losses and heads that pass through one tensor: `.grad`, report and engine are those of separate losses."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery import graph
from gradsurgery.graph import footprints, reach, torch_private
from tests.support.two_heads import Nothing

M = 3
SCALES = (1.0, 10.0, 100.0)
NAMES = ("a", "b", "c")


class Net(nn.Module):
    """A trunk and a head per loss, in float64."""

    def __init__(self, width: int = 6, m: int = M) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(m))
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).tanh()
        return [head(z) for head in self.heads]


def loss(y: Tensor, i: int) -> Tensor:
    return SCALES[i] * (y.reshape(-1) - i).square().mean()


def separate(ys: list[Tensor]) -> list[Tensor]:
    return [loss(y, i) for i, y in enumerate(ys)]


def filled(ys: list[Tensor]) -> Tensor:
    losses = torch.zeros(len(ys), dtype=ys[0].dtype)
    for i, one in enumerate(separate(ys)):
        losses[i] = one
    return losses


def filled_in_another_order(ys: list[Tensor]) -> list[Tensor]:
    losses = torch.zeros(len(ys), dtype=ys[0].dtype)
    for i in (2, 0, 1):
        losses[i] = loss(ys[i], i)
    return list(losses)


def filled_columns(ys: list[Tensor]) -> list[Tensor]:
    out = torch.full((len(ys[0]), len(ys)), 7.0, dtype=ys[0].dtype)
    for i, y in enumerate(ys):
        out[:, i] = y[:, 0]
    return by_columns(out)


def by_columns(out: Tensor) -> list[Tensor]:
    return [loss(out[:, i], i) for i in range(out.shape[1])]


def index_put(ys: list[Tensor]) -> list[Tensor]:
    out = torch.zeros(len(ys), len(ys[0]), dtype=ys[0].dtype)
    for i, y in enumerate(ys):
        out = out.index_put((torch.tensor([i]),), y.t())
    return [loss(out[i], i) for i in range(len(ys))]


def index_add(ys: list[Tensor]) -> list[Tensor]:
    out = torch.zeros(len(ys), len(ys[0]), dtype=ys[0].dtype)
    for i, y in enumerate(ys):
        out = out.index_add(0, torch.tensor([i]), y.t())
    return [loss(out[i], i) for i in range(len(ys))]


def scattered(ys: list[Tensor]) -> list[Tensor]:
    out = torch.zeros(len(ys[0]), len(ys), dtype=ys[0].dtype)
    for i, y in enumerate(ys):
        out = out.scatter(1, torch.full((len(y), 1), i), y)
    return by_columns(out)


def nested(ys: list[Tensor]) -> list[Tensor]:
    return by_columns(torch.cat([torch.cat(ys[:2], 1), ys[2]], 1))


def with_constants(ys: list[Tensor]) -> list[Tensor]:
    constant = torch.ones_like(ys[0])
    out = torch.cat([constant, *ys], 1)
    return [loss(out[:, i + 1], i) for i in range(len(ys))]


def summed_by_sample(ys: list[Tensor]) -> list[Tensor]:
    targets, scales = torch.arange(M), torch.tensor(SCALES, dtype=ys[0].dtype)
    return list((scales * (torch.cat(ys, 1) - targets).square()).mean(0))


def mse_without_reduction(ys: list[Tensor]) -> list[Tensor]:
    out = torch.cat(ys, 1)
    targets = torch.arange(M, dtype=out.dtype).expand_as(out)
    each = nn.functional.mse_loss(out, targets, reduction="none")
    return [SCALES[i] * each[:, i].mean() for i in range(M)]


def through_many(ys: list[Tensor]) -> list[Tensor]:
    out = torch.hstack(ys).clamp(-1e6, 1e6).nan_to_num().flip(1).roll(1, 1).t().contiguous()
    out = torch.einsum("kb->bk", out).unsqueeze(0).permute(2, 0, 1).squeeze(1)
    order = [0, 2, 1]  # where flip and roll put the columns
    return [loss(out[order.index(i)], i) for i in range(M)]


def replaced(ys: list[Tensor]) -> list[Tensor]:
    out = torch.cat(ys, 1)
    out[:, 1] = out[:, 1] * 1.0
    return by_columns(out)


_MARKS = footprints._marks((M,))[0].astype(float)
#: Takes one of the numbers that mark entries to another one.
RATIO = float(_MARKS[1] / _MARKS[0])
assert RATIO * _MARKS[0] == _MARKS[1]


def rescaled_in_place(ys: list[Tensor]) -> list[Tensor]:
    out = torch.stack(separate(ys)).clone()
    out[0].mul_(RATIO)
    return [out[0] / RATIO, *out[1:]]


def added_in_place(ys: list[Tensor]) -> list[Tensor]:
    first, *others = separate(ys)
    out = torch.stack([first / 2, *others]).clone()
    out[0].add_(first, alpha=RATIO)
    return [out[0] / (0.5 + RATIO), *out[1:]]


def a_joined_part_written_in(ys: list[Tensor]) -> list[Tensor]:
    out = 1.0 * ys[2].expand(-1, M)
    out[:, :2] = torch.cat(ys[:2], 1)
    return by_columns(out)


def filled_in_another_precision(ys: list[Tensor]) -> list[Tensor]:
    losses = torch.zeros(M, dtype=torch.float64)
    for i, one in enumerate(separate(ys)):
        losses[i] = one.float()
    return list(losses)


def cast(ys: list[Tensor]) -> list[Tensor]:
    out = torch.cat(ys, 1).float().double().float()
    return [loss(out[:, i].double(), i) for i in range(M)]


def moved_rows(ys: list[Tensor]) -> list[Tensor]:
    return [loss(rows, i) for i, rows in enumerate(torch.cat(ys, 0).view(M, -1).unbind())]


class Twice(torch.autograd.Function):
    """Of the user's: torch knows nothing of what it does."""

    @staticmethod
    def forward(ctx, *losses):
        return tuple(2 * one for one in losses)

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(2 * g for g in gradients)


class Halved(torch.autograd.Function):
    """Likewise, of one tensor."""

    @staticmethod
    def forward(ctx, out):
        return out / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


FORMS = {
    "stack, unbind": lambda ys: list(torch.stack(separate(ys)).unbind()),
    "stack": lambda ys: torch.stack(separate(ys)),
    "stack times weights": lambda ys: torch.stack([one / 2 for one in separate(ys)]) * torch.full((M,), 2.0).double(),
    "stack times weights, indexed": lambda ys: [(torch.stack(separate(ys)) * 1.0)[i] for i in range(M)],
    "stack, split": lambda ys: list(torch.stack(separate(ys)).split(1)),
    "stack, split by sizes": lambda ys: list(torch.stack(separate(ys)).split([1, 1, 1])),
    "stack, chunk": lambda ys: list(torch.stack(separate(ys)).chunk(M)),
    "stack, negative index": lambda ys: [torch.stack(separate(ys))[i - M] for i in range(M)],
    "stack, nan_to_num": lambda ys: list(torch.stack(separate(ys)).nan_to_num().unbind()),
    "cat of losses": lambda ys: list(torch.cat([one.reshape(1) for one in separate(ys)])),
    "filled": filled,
    "filled, unbind": lambda ys: list(filled(ys).unbind()),
    "filled in another order": filled_in_another_order,
    "filled columns": filled_columns,
    "columns of cat": lambda ys: by_columns(torch.cat(ys, 1)),
    "columns of cat, in another order": lambda ys: [
        loss(torch.cat([ys[1], ys[0], ys[2]], 1)[:, k], i) for i, k in ((0, 1), (1, 0), (2, 2))
    ],
    "columns of hstack": lambda ys: by_columns(torch.hstack(ys)),
    "columns of stack": lambda ys: by_columns(torch.stack(ys, 1).squeeze(2)),
    "slices of cat": lambda ys: [loss(torch.cat(ys, 1)[:, i : i + 1], i) for i in range(M)],
    "slices of cat from the end": lambda ys: [loss(torch.cat(ys, 1)[:, i - M :][:, :1], i) for i in range(M)],
    "split of cat": lambda ys: [loss(y, i) for i, y in enumerate(torch.cat(ys, 1).split(1, dim=1))],
    "unbind of cat": lambda ys: [loss(y, i) for i, y in enumerate(torch.cat(ys, 1).unbind(1))],
    "index": lambda ys: [loss(torch.cat(ys, 1)[:, [i]], i) for i in range(M)],
    "index_select": lambda ys: [loss(torch.cat(ys, 1).index_select(1, torch.tensor([i])), i) for i in range(M)],
    "gather": lambda ys: [loss(torch.cat(ys, 1).gather(1, torch.full((len(ys[0]), 1), i)), i) for i in range(M)],
    "take": lambda ys: [loss(torch.cat(ys, 0).take(torch.arange(len(ys[0])) + i * len(ys[0])), i) for i in range(M)],
    "masked_select": lambda ys: [
        loss(torch.cat(ys, 1).masked_select(torch.arange(M).eq(i).expand(len(ys[0]), M)), i) for i in range(M)
    ],
    "diagonal": lambda ys: [
        loss(torch.diag_embed(torch.stack([y.reshape(-1) for y in ys])).diagonal(0, 1, 2)[i], i) for i in range(M)
    ],
    "where": lambda ys: by_columns(torch.where(torch.ones(M).bool(), torch.cat(ys, 1), torch.zeros(()).double())),
    "index_put": index_put,
    "index_add": index_add,
    "scatter": scattered,
    "cat of cat": nested,
    "cat with a constant": with_constants,
    "mean over the batch": summed_by_sample,
    "mse_loss without reduction": mse_without_reduction,
    "flip, roll, clamp, einsum, permute": through_many,
    "casts": cast,
    "cat of rows, view, unbind": moved_rows,
    "columns, then stack": lambda ys: torch.stack(by_columns(torch.cat(ys, 1))),
    "columns, then filled": lambda ys: filled(list(torch.cat(ys, 1).split(1, dim=1))),
    "a product with 0 in between": lambda ys: by_columns(torch.cat(ys, 1) + 0 * torch.cat(ys, 1)),
    "checkpointed": lambda ys: by_columns(checkpoint(lambda *all: torch.cat(all, 1), *ys, use_reentrant=False)),
    "a function of the user's on losses": lambda ys: [one / 2 for one in Twice.apply(*separate(ys))],
    "a function of the user's on outputs": lambda ys: by_columns(2 * Halved.apply(torch.cat(ys, 1))),
}
FORMS.update(
    {
        "cat with two constants": lambda ys: [
            loss(torch.cat([torch.ones_like(ys[0]), ys[0], torch.zeros_like(ys[0]), *ys[1:]], 1)[:, k], i)
            for i, k in enumerate((1, 3, 4))
        ],
        "copy_": lambda ys: by_columns(torch.zeros(8, M).double().copy_(torch.cat(ys, 1))),
        "index that repeats": lambda ys: [loss(torch.cat(ys, 1)[:, [i] * M].mean(1), i) for i in range(M)],
        "gather that repeats": lambda ys: [
            loss(torch.cat(ys, 1).gather(1, torch.full((8, M + 1), i)[:, :M]).mean(1), i) for i in range(M)
        ],
        "as_strided that repeats": lambda ys: [
            loss(torch.cat(ys, 1).as_strided((8, M), (M, 0), i).mean(1), i) for i in range(M)
        ],
        "embedding": lambda ys: [
            loss(nn.functional.embedding(torch.full((8,), i), torch.cat(ys, 1).t())[0], i) for i in range(M)
        ],
        "pad and crop to as many": lambda ys: [
            loss(nn.functional.pad(torch.cat(ys[::-1], 1), (i - 2, 2 - i)).sum(1), i) if i == 0 else loss(y, i)
            for i, y in enumerate(ys)
        ],
        "sum of padded columns": lambda ys: by_columns(
            sum(nn.functional.pad(y, (i, M - 1 - i)) for i, y in enumerate(ys))  # type: ignore[arg-type]
        ),
        "where between heads": lambda ys: by_columns(
            torch.where(torch.arange(M) == 0, ys[0], torch.where(torch.arange(M) == 1, ys[1], ys[2]))
        ),
        "masked_fill": lambda ys: by_columns(torch.cat(ys, 1).masked_fill(torch.arange(M) == M, 1.0)),
        "complex columns": lambda ys: by_columns((torch.complex(torch.cat(ys, 1), torch.cat(ys, 1)) * 1j).imag),
        "groups of a convolution": lambda ys: by_columns(
            nn.functional.conv1d(torch.cat(ys, 1).unsqueeze(2), torch.ones(M, 1, 1).double(), groups=M).squeeze(2)
        ),
        "a column replaced by itself": replaced,
        "an entry multiplied in place": rescaled_in_place,
        "an entry added to in place": added_in_place,
        "a joined part written into another tensor": a_joined_part_written_in,
        "filled in another precision": filled_in_another_precision,
    }
)
METHODS = (gradsurgery.MGDA, gradsurgery.UPGrad, gradsurgery.NashMTL)
#: What cannot be read: gradients decide, and the engine is chosen without the graph.
UNREAD = ("a function of the user's on losses", "a function of the user's on outputs")


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def gradients(net: Net) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_equal(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-9) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def assert_as_separate(form, build, steps=2, width=6, tolerance=1e-9, **options) -> None:
    """Assert that a joined form trains as separate losses do, over some steps."""
    seen = []
    for join in (separate, form):
        net = Net(width)
        optimizer = build(torch.optim.SGD(net.parameters(), lr=1e-4), **options)
        told = []
        for step in range(steps):
            optimizer.zero_grad()
            report = optimizer.backward(join(net(batch(step))))
            told.append((gradients(net), report.engine, report.weights, report.gram))
            optimizer.step()
        seen.append(told)
    for wanted, found in zip(*seen, strict=True):
        assert_equal(found[0], wanted[0], tolerance)
        assert found[1] == wanted[1]
        if wanted[2] is not None:
            assert found[2] == pytest.approx(wanted[2], rel=max(tolerance, 1e-7))
        torch.testing.assert_close(found[3], wanted[3], rtol=max(tolerance, 1e-9), atol=0)


@pytest.mark.parametrize("build", METHODS)
@pytest.mark.parametrize("name", FORMS)
def test_joined_losses_are_those_handed_over_one_by_one(name, build):
    tolerance = 1e-4 if name in ("casts", "filled in another precision") else 1e-9
    assert_as_separate(FORMS[name], build, tolerance=tolerance)


SOME = ("stack, unbind", "stack times weights", "filled, unbind", "columns of cat", "columns, then stack", "index")


@pytest.mark.parametrize("name", ["cat with two constants", "copy_"])
def test_what_can_be_read_leaves_nothing_to_zeros(name):
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    optimizer.backward(FORMS[name](net(batch(0))))
    optimizer.step()
    assert "nonzero" not in optimizer.state_dict()["gradsurgery"]["memory"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "options",
    [
        {"engine": "ghosts"},
        {"engine": "blocks"},
        {"granularity": "parameter"},
        {"every": 2},
        {"every": 3, "warmup": 1},
        {"normalize": "loss"},
        {"log_losses": True},
        {"preference": (1.0, 2.0, 3.0)},
        {"reduction": "mean"},
    ],
    ids=str,
)
def test_every_engine_and_switch(name, options):
    assert_as_separate(FORMS[name], gradsurgery.UPGrad, steps=4, width=16, **options)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "build",
    [
        gradsurgery.PCGrad,
        gradsurgery.CAGrad,
        gradsurgery.MoCo,
        gradsurgery.GradDrop,
        gradsurgery.FixedWeighter,
        gradsurgery.UncertaintyWeighter,
        lambda base, **options: gradsurgery.PCGrad(gradsurgery.RandomWeighter(base), **options),
        lambda base, **options: gradsurgery.PCGrad(base, streaming=True, **options),
    ],
)
def test_every_kind_of_method(name, build):
    seen = []
    for join in (separate, FORMS[name]):
        net = Net()
        optimizer = build(torch.optim.SGD(net.parameters(), lr=1e-4))
        for step in range(3):
            optimizer.zero_grad()
            optimizer.backward(join(net(batch(step))))
            optimizer.step()
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


@pytest.mark.parametrize("name", FORMS)
def test_a_fixed_sum_is_that_of_plain_training(name):
    seen = []
    for surgery in (False, True):
        net = Net()
        losses = FORMS[name](net(batch(0)))
        if surgery:
            gradsurgery.FixedWeighter(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(losses)
        else:
            sum(one.sum() for one in losses).backward()
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0], 1e-6 if name == "casts" else 1e-12)


class Witness:
    """Something that is alive as long as the node that holds it."""


def witnesses(losses: list[Tensor]) -> list[weakref.ref[Witness]]:
    """One for each node below some losses that is not a parameter's own."""
    found, seen, left = [], set(), [one.grad_fn for one in losses]
    while left:
        node = left.pop()
        if node is None or node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        left += [child for child, _ in node.next_functions]
        node.metadata["witness"] = witness = Witness()
        found.append(weakref.ref(witness))
    return found


@pytest.mark.parametrize(
    "build",
    [
        gradsurgery.MGDA,
        gradsurgery.FixedWeighter,
        functools.partial(gradsurgery.UPGrad, engine="ghosts"),
        functools.partial(gradsurgery.UPGrad, engine="blocks"),
        functools.partial(gradsurgery.PCGrad, streaming=True),
        functools.partial(gradsurgery.MGDA, every=2),
    ],
)
@pytest.mark.parametrize("name", FORMS)
def test_after_a_step_nothing_of_the_graph_or_the_rows_is_alive(name, build, monkeypatch):
    rows = []

    def watch(grad):
        def watched(*args, **kwargs):
            found = grad(*args, **kwargs)
            rows.extend(weakref.ref(g) for g in found or () if g is not None)
            return found

        return watched

    monkeypatch.setattr(torch.autograd, "grad", watch(torch.autograd.grad))
    monkeypatch.setattr(torch_private, "_ENGINE", watch(torch_private._ENGINE))
    net = Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=1e-4))
    gc.disable()  # nothing may wait for it
    try:
        for step in range(2):
            losses = list(FORMS[name](net(batch(step))))
            nodes = witnesses(losses)
            assert nodes
            optimizer.backward(losses)
            del losses
            optimizer.step()
            assert not any(node() for node in nodes)
            optimizer.zero_grad()
            assert all(row() is None for row in rows)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", SOME)
def test_micro_batches(name):
    seen = []
    for join in (separate, FORMS[name]):
        net = Net()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
        for step in range(2):
            for last in (False, False, True):
                report = optimizer.backward(join(net(batch(step))), accumulate=not last)
            seen_grads = gradients(net)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((seen_grads, report.weights))
    assert_equal(seen[1][0], seen[0][0])
    assert seen[1][1] == pytest.approx(seen[0][1])


def assert_same_call(name, call):
    """Assert that a call with a joined form gives what it gives with separate losses, and return that."""
    seen = []
    for join in (separate, FORMS[name]):
        net = Net()
        call(gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4)), join(net(batch(0))))
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])
    return seen[1]


@pytest.mark.parametrize("name", SOME)
def test_a_gradient_scaler(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same_call(name, lambda optimizer, losses: optimizer.backward(losses, scaler=scaler))


@pytest.mark.parametrize("name", SOME)
def test_an_absent_loss(name):
    def call(optimizer, losses):
        optimizer.backward({**dict(zip(NAMES, losses, strict=True)), "b": None})

    found = assert_same_call(name, call)
    assert all(g is None for g in found[-8:-4])  # the head of the absent loss


@pytest.mark.parametrize("name", SOME)
def test_rows_of_bfloat16(name):
    assert_as_separate(FORMS[name], gradsurgery.MGDA, row_dtype=torch.bfloat16)


def test_many_losses():
    """More losses than an integer of 64 bits has places for."""
    m, seen = 70, []
    for joined in (False, True):
        net = Net(m=m)
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
        ys = net(batch(0))
        out = torch.cat(ys, 1)
        optimizer.backward([(out[:, i] if joined else ys[i]).square().mean() for i in range(m)])
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


def filled_by_many(m: int) -> tuple[Net, list[int], Tensor]:
    net, calls = Net(m=m), []
    losses = torch.zeros(m, dtype=torch.float64)
    for i, y in enumerate(net(batch(0))):
        y.register_hook(lambda g, i=i: calls.append(i) and None)
        losses[i] = (y - i).square().mean()
    return net, calls, losses


def test_no_pass_goes_through_another_head_however_many_losses_are_filled_in():
    """Their joins lie one below the other, as many as there are losses."""
    net, calls, losses = filled_by_many(300)
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(losses)
    assert sorted(calls) == list(range(300))


def test_what_is_known_of_filled_columns_does_not_grow_with_the_batch():
    out = 1 * torch.zeros(50, M, requires_grad=True)
    out[:, 1] = 2 * torch.ones(50, requires_grad=True)
    join = out.grad_fn
    footprint = {0: np.array([[1, 2, 4]])}
    rest, put = footprints.spread(join, join.next_functions, footprint, footprints.Losses.of(M))
    assert put == 2
    assert rest.tolist() == [[1, 0, 4]]


def test_heads_that_two_losses_read_are_shared():
    """Loss 0 reads two columns of three, so that the head of the second is shared."""
    seen = []
    for joined in (False, True):
        net = Net()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
        ys = net(batch(0))
        columns = list(torch.cat(ys, 1).split(1, dim=1)) if joined else ys
        a = (columns[0] + columns[1]).square().mean()
        report = optimizer.backward({"a": a, "b": (columns[1] - 5).square().mean(), "c": columns[2].square().mean()})
        seen.append((gradients(net), report.gram))
    assert_equal(seen[1][0], seen[0][0])
    torch.testing.assert_close(seen[1][1], seen[0][1])


def test_a_parameter_used_above_and_below_a_join():
    """A penalty on the trunk keeps the losses from beginning below the join; zeros decide nothing there."""
    seen = []
    for joined in (False, True):
        net = Net()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
        ys = net(batch(0))
        columns = list(torch.cat(ys, 1).split(1, dim=1)) if joined else ys
        losses = [loss(y, i) + net.trunk[0].weight.square().sum() for i, y in enumerate(columns)]
        optimizer.backward(losses)
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


def test_an_output_that_no_loss_reads_leaves_its_head_alone():
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    out = torch.cat(net(batch(0)), 1)
    optimizer.backward([loss(out[:, 0], 0), loss(out[:, 1], 1)])
    assert all(p.grad is None for p in net.heads[2].parameters())
    assert all(p.grad is not None for p in net.heads[1].parameters())


@pytest.mark.parametrize("joins", [1, 2])
def test_a_loss_that_is_given_nothing_above_other_joins(joins):
    joined, apart = Net(), Net()
    ys = joined(batch(0))
    first = torch.cat(ys[:2], 1)
    for _ in range(joins - 1):
        first = torch.cat([first[:, :1], first[:, 1:]], 1)
    losses = by_columns(torch.cat([Nothing.apply(first[:, :1]), first[:, 1:], ys[2]], 1))
    found = gradsurgery.PCGrad(torch.optim.SGD(joined.parameters(), lr=0.1)).backward(losses)
    ys = apart(batch(0))
    losses = separate([Nothing.apply(ys[0]), *ys[1:]])
    wanted = gradsurgery.PCGrad(torch.optim.SGD(apart.parameters(), lr=0.1)).backward(losses)
    assert found.weights == pytest.approx(wanted.weights)
    assert_equal(gradients(joined), gradients(apart))


def test_large_outputs_are_told_apart_by_their_channels():
    """Images of two tasks in one tensor, more entries than any operation is tried on."""
    torch.manual_seed(0)
    trunk, one, two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 1, 1)
    x, seen = torch.randn(4, 1, 160, 160), []
    for joined in (False, True):
        optimizer = gradsurgery.MGDA(
            torch.optim.SGD([*trunk.parameters(), *one.parameters(), *two.parameters()], lr=1e-4)
        )
        z = trunk(x).tanh()
        a, b = one(z), two(z)
        if joined:
            out = torch.cat([a, b], 1)
            assert out.numel() > footprints._MOST
            a, b = out[:, :3], out[:, 3:]
        target = torch.zeros(4, 160, 160, dtype=torch.long)
        optimizer.zero_grad()
        optimizer.backward({"class": nn.functional.cross_entropy(a, target), "depth": (b - 3).square().mean()})
        seen.append([p.grad.clone() for p in (*trunk.parameters(), *one.parameters(), *two.parameters())])
    assert_equal(seen[1], seen[0], 1e-5)


def test_an_expert_that_one_sample_uses():
    """One loss per sample; the gate sends each sample to one expert, and their outputs come back in one tensor."""
    torch.manual_seed(0)
    trunk, experts, head = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1)
    trunk, experts, head = trunk.double(), experts.double(), head.double()
    params = [*trunk.parameters(), *experts.parameters(), *head.parameters()]
    x, to, seen = batch(0, 4), torch.tensor([0, 0, 2, 0]), []
    for joined in (False, True):
        optimizer = gradsurgery.MGDA(torch.optim.SGD(params, lr=1e-4))
        optimizer.zero_grad()
        if joined:
            z = trunk(x).tanh()
            out = torch.zeros_like(z)
            for k, expert in enumerate(experts):
                if (to == k).any():
                    out[to == k] = expert(z[to == k])
            losses = (head(out.relu()) - 1).square().squeeze(1).unbind()
        else:
            losses = [
                (head(experts[int(k)](trunk(one[None]).tanh()).relu()) - 1).square().squeeze()
                for one, k in zip(x, to, strict=True)
            ]
        optimizer.backward(losses)
        seen.append([None if p.grad is None else p.grad.clone() for p in params])
    assert_equal(seen[1], seen[0])
    assert experts[1].weight.grad is None


def test_hooks_of_a_head_see_its_own_loss_only():
    """A module hook gets one gradient, of its own loss, and never None."""
    net, seen = Net(), []
    net.heads[1][2].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    ys = net(batch(0))
    ys[2].register_hook(lambda g: seen.append(g.clone()))
    optimizer.backward(by_columns(torch.cat(ys, 1)))
    assert len(seen) == 2
    assert all(float(g.abs().max()) > 0 for g in seen)


def test_the_losses_below_a_join_are_differentiated_in_one_pass():
    net, passes = Net(), []
    out = torch.cat(net(batch(0)), 1)
    out.register_hook(lambda g: passes.append(g))
    gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(by_columns(out))
    assert len(passes) == 1


def test_losses_that_were_filled_in_are_brought_below_all_joins_in_one_call(monkeypatch):
    net, calls, losses = filled_by_many(5)
    monkeypatch.setattr(torch_private, "_ENGINE", None)  # then the public calls are made
    grad, made = torch.autograd.grad, []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **given: (made.append(1) and None) or grad(*args, **given)
    )
    gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(losses)
    assert len(made) == 5 + 1
    assert sorted(calls) == [0, 1, 2, 3, 4]


def test_no_pass_goes_through_the_head_of_another_loss():
    net, calls = Net(), []
    ys = net(batch(0))
    for i, y in enumerate(ys):
        y.register_hook(lambda g, i=i: calls.append(i) and None)
    gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(torch.stack(separate(ys)) * 1.0)
    assert sorted(calls) == [0, 1, 2]


def hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda g: 2 * g)
    return y


def a_hook_between_cats(ys: list[Tensor]) -> list[Tensor]:
    return by_columns(torch.cat([hooked(torch.cat(ys[:2], 1)), ys[2]], 1))


def a_hook_between_fills(ys: list[Tensor]) -> list[Tensor]:
    out = torch.zeros(len(ys[0]), M, dtype=ys[0].dtype)
    for i, y in enumerate(ys):
        out[:, i] = y[:, 0]
        if i == 1:
            out.register_hook(lambda g: 2 * g)
    return by_columns(out)


def a_hook_above_a_replaced_column(ys: list[Tensor]) -> list[Tensor]:
    out = torch.cat(ys, 1)
    both = hooked(out[:, :2] * 1.0)
    return by_columns(torch.cat([both, out[:, 2:]], 1))


@pytest.mark.parametrize("form", [a_hook_between_cats, a_hook_between_fills, a_hook_above_a_replaced_column])
def test_a_hook_of_a_tensor_between_two_joins_acts_once(form):
    seen = []
    for join in (lambda ys: separate([*map(hooked, ys[:2]), ys[2]]), form):
        net = Net()
        gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(join(net(batch(0))))
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


def test_a_hook_that_changes_its_argument_acts_once_a_pass():
    """GradNorm makes a pass per loss before that of the surgery."""

    def doubled(y: Tensor) -> Tensor:
        y = y * 1.0

        def change(g: Tensor) -> None:
            g.mul_(2)

        y.register_hook(change)
        return y

    seen = []
    for joined in (False, True):
        net = Net()
        weighter = gradsurgery.GradNormWeighter(torch.optim.SGD(net.parameters(), lr=1e-4), net.trunk[2].weight)
        ys = [doubled(y) for y in net(batch(0))]
        gradsurgery.MGDA(weighter).backward(by_columns(torch.cat(ys, 1)) if joined else separate(ys))
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


@pytest.mark.parametrize("hook", [lambda g: 2 * g, lambda g: g.clamp(-0.1, 0.1)])
@pytest.mark.parametrize("join", [lambda ys: torch.cat(ys, 1), lambda ys: torch.stack(ys, 1).squeeze(2)])
def test_a_hook_of_the_tensor_that_joins_acts_on_each_entry_once(join, hook):
    def watched(y: Tensor) -> Tensor:
        y.register_hook(hook)
        return y

    seen = []
    for form in (lambda ys: separate([watched(y) for y in ys]), lambda ys: by_columns(watched(join(ys)))):
        net = Net()
        gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(form(net(batch(0))))
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


def test_a_tensor_between_two_joins_retains_its_gradient():
    net = Net()
    ys = net(batch(0))
    inner = torch.cat(ys[:2], 1)
    inner.retain_grad()
    gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(by_columns(torch.cat([inner, ys[2]], 1)))
    wanted = [torch.autograd.grad(loss(y, i), y)[0] for i, y in enumerate(net(batch(0))[:2])]
    torch.testing.assert_close(inner.grad, torch.cat(wanted, 1))


def test_two_joins_of_which_others_read_a_part_that_must_be_kept():
    """Losses 1 and 2 begin below two joins and are differentiated together; loss 3 still needs the second one."""
    seen = []
    for joined in (False, True):
        torch.manual_seed(0)
        trunk, heads = (
            nn.Parameter(torch.randn(4, 6).double()),
            [nn.Parameter(torch.randn(6, 1).double()) for _ in range(4)],
        )
        ys = [(batch(0) @ trunk).tanh() @ head for head in heads]  # no two losses have a node of the trunk in common
        pairs = [torch.cat(ys[:2], 1), torch.cat(ys[2:], 1)] if joined else []
        columns = [y.square() for pair in pairs for y in pair.square().sqrt().unbind(1)] or [y.square() for y in ys]
        losses = [(k + 1) * (column.reshape(-1) - 1).square().mean() for k, column in enumerate(columns)]
        losses[0], losses[3] = losses[0] + trunk.square().sum(), losses[3] + trunk.square().sum()
        gradsurgery.UPGrad(torch.optim.SGD([trunk, *heads], lr=1e-4)).backward(losses)
        seen.append([p.grad for p in (trunk, *heads)])
    assert_equal(seen[1], seen[0])


def test_running_sums_of_columns_take_what_is_before_them():
    seen = []
    for joined in (False, True):
        net = Net()
        ys = net(batch(0))
        sums = torch.cat(ys, 1).cumsum(1).unbind(1) if joined else [ys[0], ys[0] + ys[1], ys[0] + ys[1] + ys[2]]
        optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4))
        report = optimizer.backward([loss(y, i) for i, y in enumerate(sums)])
        seen.append((gradients(net), report.gram))
    assert_equal(seen[1][0], seen[0][0])
    torch.testing.assert_close(seen[1][1], seen[0][1])


class Sequences(nn.Module):
    """A recurrent net over what four encoders have made of parts of a batch: early and late, for two samples."""

    def __init__(self, layers: int, both_ways: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))
        self.net = nn.LSTM(4, 5, layers, batch_first=True, bidirectional=both_ways)

    def forward(self) -> tuple[Tensor, Tensor]:
        parts = [encoder(torch.ones(1, 2, 3)) for encoder in self.encoders]
        x = torch.cat([torch.cat(parts[:2], 1), torch.cat(parts[2:], 1)], 0)
        # From zeros the gradient of what multiplies the state would be zero at the first time.
        start = torch.ones(self.net.num_layers * (1 + self.net.bidirectional), 2, 5)
        out, (last, _) = self.net(x, (start, start))
        return out, last


READ = {
    "all": lambda out, last: [out.sum(), out.square().sum()],
    "first and last": lambda out, last: [out[:, 0].sum(), out[:, -1].sum()],
    "last of one sample": lambda out, last: [out[0, -1].sum(), out[1].sum()],
    "one after the other": lambda out, last: [out[0, 1].sum(), out[1, 2].sum()],
    "last states": lambda out, last: [last[-1].sum(), last[0, 1].sum()],
    "half of the width": lambda out, last: [out[:, 0, :2].sum(), out[:, 1, -2:].sum()],
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(("layers", "both_ways"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_state_is_carried_through_time_and_samples_stay_apart(layers, both_ways, read):
    net = Sequences(layers, both_ways)
    losses = READ[read](*net())
    masks, params = graph.walk(losses).masks, list(net.parameters())
    found = [torch.autograd.grad(one, params, retain_graph=True, allow_unused=True) for one in losses]
    wanted = [
        sum((g is not None and bool(g.any())) << i for i, g in enumerate(column)) for column in zip(*found, strict=True)
    ]
    assert [masks.get(p, 0) for p in params] == wanted


@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_net_is_not_run_to_see_what_losses_at_the_last_time_reach(layers, monkeypatch):
    def run(node, *_):
        raise AssertionError(f"{node} was run")

    monkeypatch.setattr(footprints, "_carried", run)
    net = nn.LSTM(3, 5, layers, batch_first=True)
    z = net(torch.randn(4, 6, 3))[0][:, -1]
    masks = graph.walk([z.sum(), z.square().sum()]).masks
    assert [masks[p] for p in net.parameters()] == [3] * (4 * layers)


class TwoLayers(torch.autograd.Function):
    """One node for two layers, as that of cuDNN: the first state comes from the first weight alone."""

    @staticmethod
    def forward(ctx, x, first, second):
        ctx.save_for_backward(x, first, second)
        return torch.stack([x @ first, x @ first @ second])

    @staticmethod
    def backward(ctx, g):
        x, first, second = ctx.saved_tensors
        below = g[0] + g[1] @ second.T
        return below @ first.T, x.T @ below, (x @ first).T @ g[1]


def test_layers_of_one_node_that_only_one_loss_reaches_keep_its_plain_gradient(monkeypatch):
    name = footprints.name
    monkeypatch.setattr(
        footprints, "name", lambda kind: "CudnnRnn" if kind.__name__ == "TwoLayersBackward" else name(kind)
    )
    torch.manual_seed(0)
    first, second, x = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3)

    def losses():
        states = TwoLayers.apply(x, first, second)
        return {"a": states[0].sum(), "b": -0.1 * states[1].sum() - states[0].sum()}

    (plain,) = torch.autograd.grad(losses()["b"], second)
    gradsurgery.PCGrad(torch.optim.SGD([first, second], lr=0.1)).backward(losses())
    torch.testing.assert_close(second.grad, plain)


def test_queries_of_an_attention_stay_apart():
    key = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    seen = []
    for joined in (False, True):
        net = Net()
        ys = net(batch(0))
        queries = [torch.stack([y[:, 0] for y in ys])[None, None]] if joined else [y.reshape(1, 1, 1, 8) for y in ys]
        out = torch.cat([nn.functional.scaled_dot_product_attention(q, key, key) for q in queries], 2)
        found = (
            out[0, 0].unbind() if joined else [nn.functional.scaled_dot_product_attention(q, key, key) for q in queries]
        )
        gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=1e-4)).backward(
            [loss(one, i) for i, one in enumerate(found)]
        )
        seen.append(gradients(net))
    assert_equal(seen[1], seen[0])


def test_a_gradient_that_vanishes_by_its_values_is_one_all_the_same():
    """Equal gradients at two values that are normalised give gradients of zero below."""
    heads = [nn.Parameter(torch.tensor([0.0, k]).double()) for k in (1.0, 2.0)]
    out = nn.functional.batch_norm(torch.stack(heads, 1), None, None, training=True)
    assert all(graph.walk([out[:, 0].sum(), out[:, 1].sum()]).masks[p] for p in heads)


def test_an_entry_that_an_operation_drops_is_reached_all_the_same():
    upper, lower = (nn.Parameter(torch.ones(1, 2)) for _ in range(2))
    out = torch.cat([upper, lower]).tril()
    masks = graph.walk([out[0, 1], out[1, 0]]).masks
    assert masks is not None
    assert masks[upper] & 1


# ---------------------------------------------------------------------------------- names


def test_a_tensor_of_losses_takes_names():
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    report = optimizer.backward(torch.stack(separate(net(batch(0)))), names=NAMES)
    assert report.names == NAMES


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a", "b"), r"MGDA.backward: `names` must have one entry for each of the 3 losses, got \['a', 'b'\]"),
        (("a", "a", "b"), r"MGDA.backward: `names` must be strings, each of them once, got \['a', 'a', 'b'\]"),
        ((1, 2, 3), r"MGDA.backward: `names` must be strings, each of them once, got \[1, 2, 3\]"),
    ],
)
def test_names_that_do_not_fit(names, text):
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    with pytest.raises(ValueError, match=text):
        optimizer.backward(separate(net(batch(0))), names=names)


def test_a_dict_has_names_of_its_own():
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    with pytest.raises(ValueError, match=r"MGDA.backward: `names` are for losses in a list or a tensor"):
        optimizer.backward(dict(zip(NAMES, separate(net(batch(0))), strict=True)), names=NAMES)


# ------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("name", UNREAD)
def test_what_was_not_zero_once_is_remembered(name):
    """A gate closes one head for a step. Its gradient is zero then, and it is no other loss's head all the same."""
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    optimizer.backward(FORMS[name](net(batch(0))))
    optimizer.step()
    saved = optimizer.state_dict()["gradsurgery"]["memory"]["nonzero"]
    assert set(saved) == {"0", "1", "2"}
    fresh = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, fresh):
        one.zero_grad()
        ys = net(batch(1))
        one.backward(FORMS[name]([ys[0], ys[1], 0 * ys[2] + 2]))  # a loss of zero, with gradients of zero
    assert optimizer.state_dict()["gradsurgery"]["memory"] == fresh.state_dict()["gradsurgery"]["memory"]


def test_a_loss_that_was_always_zero_is_warned_about_once():
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    ys = net(batch(0))
    with pytest.warns(UserWarning, match=r"gradients of '1' are zero so far.*`shared_params`"):
        optimizer.backward(list(Twice.apply(loss(ys[0], 0), 0 * loss(ys[1], 1), loss(ys[2], 2))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = net(batch(0))
        optimizer.zero_grad()
        optimizer.backward(list(Twice.apply(loss(ys[0], 0), 0 * loss(ys[1], 1), loss(ys[2], 2))))


def test_a_loss_of_zeros_that_moves_a_parameter_of_its_own_is_in_no_doubt():
    net, own = Net(), nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*net.parameters(), own], lr=1e-4))
    ys = net(batch(0))
    a, b, c = Twice.apply(loss(ys[0], 0), 0 * loss(ys[1], 1), loss(ys[2], 2))
    optimizer.backward([a, b + own.square().sum(), c])  # a warning is an error
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"]["nonzero"]["1"] == []


def test_shared_params_decide_without_a_look_at_zeros():
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4), shared_params=net.trunk.parameters())
    optimizer.backward(FORMS[UNREAD[0]](net(batch(0))))
    optimizer.step()
    assert "nonzero" not in optimizer.state_dict()["gradsurgery"]["memory"]


def test_a_zero_initialised_head_keeps_a_gradient_of_zeros():
    """All losses are zero there: the parameter stays shared, and `.grad` is no None."""
    net = Net()
    for head in net.heads:
        nn.init.zeros_(head[2].weight)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1e-4))
    optimizer.backward(FORMS[UNREAD[1]](net(batch(0))))
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("options", [{"streaming": True}, {"every": 3}, {"warmup": 1}], ids=str)
def test_what_cannot_be_read_is_settled_in_every_kind_of_step(name, options):
    seen = []
    for join in (separate, FORMS[name]):
        net = Net()
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=1e-4), shuffle=False, **options)
        for step in range(4):
            optimizer.zero_grad()
            optimizer.backward(join(net(batch(step))))
            seen.append(gradients(net))
            optimizer.step()
    for wanted, found in zip(seen[:4], seen[4:], strict=True):
        assert_equal(found, wanted)


class Rising(gradsurgery.Surgery):
    """Weights 2, 3, 4, …"""

    def weights(self, gram, losses):
        return np.arange(2.0, 2.0 + len(losses))


def test_heads_below_what_cannot_be_read_stay_apart_where_no_trunk_is_left():
    """Every loss may reach every head, and what was not zero tells that each reaches its own."""
    net = Net()
    optimizer = Rising(torch.optim.SGD(net.parameters(), lr=0.0), every=9)
    optimizer.backward(FORMS[UNREAD[1]](net(batch(0))))
    optimizer.step()
    net.trunk.requires_grad_(False)
    optimizer.zero_grad()
    assert "reused" in optimizer.backward(FORMS[UNREAD[1]](net(batch(1)))).flags
    wanted = torch.autograd.grad(sum(separate(net(batch(1)))), list(net.heads.parameters()))
    assert_equal([p.grad for p in net.heads.parameters()], list(wanted))


def test_what_two_losses_were_seen_to_reach_is_shared_where_one_of_them_is_zero():
    net = Net(m=2)
    optimizer = Rising(torch.optim.SGD(net.parameters(), lr=0.0))
    optimizer.backward(FORMS[UNREAD[1]](net(batch(0))))
    optimizer.step()
    optimizer.zero_grad()
    z = net.trunk(batch(1)).tanh()
    ys = [head(z) for head in net.heads]
    optimizer.backward(FORMS[UNREAD[1]]([ys[0], 0 * ys[1] + 1]), features=z)  # a loss of zero
    weight = net.trunk[0].weight
    (plain,) = torch.autograd.grad(separate(net(batch(1)))[0], weight)
    torch.testing.assert_close(weight.grad, 2 * plain)


# ------------------------------------------------------------------------------ deep graphs


def deep(depth: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    trunk, heads = nn.Parameter(torch.full((2,), 0.5)), [nn.Parameter(torch.ones(2) * k) for k in (1, 2)]
    z = trunk
    for _ in range(depth):
        z = z * 1.0
    ys = torch.stack([(z * head).sum() for head in heads]) * torch.tensor([1.0, 3.0])
    return [trunk, *heads], list((ys - 9).square().unbind())


def check_deep(depth: int) -> None:
    params, losses = deep(depth)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(params, lr=0.1))
    optimizer.backward(losses)
    reference, separated = deep(0)
    plain = gradsurgery.MGDA(torch.optim.SGD(reference, lr=0.1))
    plain.backward(separated)
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_graph_of_thirty_thousand_nodes():
    check_deep(30_000)


@pytest.mark.parametrize("depth", [1000, 9000])
def test_a_thread_with_a_small_stack(depth):
    failed: list[BaseException] = []

    def work() -> None:
        try:
            check_deep(depth)
        except BaseException as error:
            failed.append(error)

    before = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert not failed, failed


def test_how_deep_a_graph_may_be_follows_from_the_stack():
    found: list[int] = []
    before = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=lambda: found.append(graph.deepest()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    # 4900 nodes overflow a stack of 1 MiB.
    assert 1000 < found[0] < 3000


@pytest.mark.parametrize("name", FORMS)
def test_nodes_come_in_one_order_however_deep_the_graph_may_be(name):
    """Where a model is cut into blocks depends on it."""
    losses = list(FORMS[name](Net()(batch(0))))
    starts = [loss.grad_fn for loss in losses]
    shallow = reach._inputs_first_shallow(starts, 500)
    assert shallow is not None
    assert list(shallow) == list(reach._inputs_first_deep(starts, 500))
    assert reach._inputs_first_shallow(starts, 2) is None
    seen = set()
    for node, below in shallow.items():
        assert all(child is None or child in seen for child, _ in below)
        seen.add(node)
