"""Data-parallel processes take the step that one process takes on the concatenated batch."""

import copy
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel as DDP

import gradsurgery
from gradsurgery.communication import held, processes
from gradsurgery.gradients import sliced
from gradsurgery.graph import reach
from tests.support.catalogue import over_processes
from tests.support.loops import same
from tests.support.processes import group_of_one, run_cases, same_everywhere, start, wanted
from tests.support.weighting_catalogue import CATALOGUE as WEIGHTERS

NAMES = ("a", "b", "c")
METHODS = {row.name: row.build for row in (*over_processes(), *WEIGHTERS)}


class Net(nn.Module):
    """A trunk and a head for each task; or one head that every loss reads."""

    def __init__(self, heads=3, norm=False):
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(6)] if norm else []
        self.trunk = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(heads))
        self.unused = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def losses_of(model, x, present=NAMES):
    out = model(x)
    losses = {
        name: (out[i % len(out)] - 3 * i - (1 - i) * x.sum(1, keepdim=True)).square().mean() + 0.1
        for i, name in enumerate(NAMES)
    }
    return {name: loss if name in present else None for name, loss in losses.items()}


def data(size, steps=3):
    return torch.randn(steps, size, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def alone(build, batches, present=NAMES, net=None, **options):
    """The same training in one process."""
    net = Net() if net is None else net
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
        for x in batches:
            optimizer.zero_grad()
            optimizer.backward(losses_of(net, x, present))
            optimizer.step()
    return net, optimizer


def together(build, batches, net=None, wrap=lambda net: net, sizes=None, **options):
    net = Net() if net is None else net
    model = wrap(net)
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), distributed=True, **options)
    for x in batches:
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x), batch_size=sizes)
        optimizer.step()
    return net, optimizer


def assert_same(found, wanted, rtol=1e-7, atol=1e-9):
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert (p.grad is None) == (q.grad is None), f"{name}.grad"


def equals_one_process(build, rank, size):
    x = data(size)
    found, optimizer = together(build, x[:, rank])
    wanted, single = alone(build, x.flatten(1, 2))
    assert_same(found, wanted)
    assert optimizer.report.losses == pytest.approx(single.report.losses, rel=1e-7)
    if single.report.weights is not None:
        assert optimizer.report.weights == pytest.approx(single.report.weights, rel=1e-5, abs=1e-8)


def stays_replicated(build, rank, size):
    net = Net().float()
    optimizer = build(torch.optim.AdamW(net.parameters(), lr=0.01), distributed=True, debug=True)
    for x in data(size, steps=5)[:, rank].float():
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, x))
        optimizer.step()
    same_everywhere(list(net.parameters()))


def ddp(options, rank, size, heads=3, norm=False, unused=False):
    x = data(size)
    frozen = Net(heads, norm)
    if not unused:
        frozen.unused.requires_grad_(False)
    for build in (gradsurgery.PCGrad, gradsurgery.UncertaintyWeighter, gradsurgery.MoCo):
        found, _ = together(build, x[:, rank], copy.deepcopy(frozen), lambda net: DDP(net, **options))
        if norm:
            continue
        wanted, _ = alone(build, x.flatten(1, 2), net=copy.deepcopy(frozen))
        assert_same(found, wanted)
        same_everywhere(list(found.parameters()))
    if norm:
        same_everywhere([p for p in found.parameters() if p.requires_grad])


def unequal_shards(build, rank, size):
    x = data(size).flatten(1, 2)
    sizes = [2, 6 * size - 2] if size == 2 else [2, 3, 6 * size - 5]
    start = sum(sizes[:rank])
    found, _ = together(build, x[:, start : start + sizes[rank]], sizes=sizes[rank])
    wanted, _ = alone(build, x)
    assert_same(found, wanted)


def absent_on_one_rank(build, rank, size):
    """The last process lacks task b: it is that of the others."""
    x = data(size)
    net, wanted = Net(), Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    single = build(torch.optim.SGD(wanted.parameters(), lr=0.01))
    for step in x:
        optimizer.zero_grad()
        present = NAMES if rank < size - 1 else ("a", "c")
        report = optimizer.backward(losses_of(net, step[rank], present))
        optimizer.step()
        assert report.names == NAMES
        single.zero_grad()
        losses = losses_of(wanted, step.flatten(0, 1))
        losses["b"] = losses_of(wanted, step[:-1].flatten(0, 1))["b"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
            single.backward(losses)
        single.step()
    assert_same(net, wanted)


def absent_where_the_graph_is_too_deep(rank, size):
    """No process can tell from its graph what a loss reaches; that one lacks a loss is no fault all the same."""
    with mock.patch.object(reach, "_DEEPEST", 2 if rank else reach._DEEPEST):
        absent_on_one_rank(gradsurgery.PCGrad, rank, size)
    with mock.patch.object(reach, "_DEEPEST", 2):
        absent_on_one_rank(gradsurgery.PCGrad, rank, size)
        net = Net()
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
        losses = losses_of(net, data(size)[0, rank])
        losses["b"] = nn.Parameter(torch.ones(1)).square().sum() if rank else None
        with pytest.raises(RuntimeError, match="loss 'b' reaches no parameter"):
            optimizer.backward(losses)
        absent_in_a_micro_batch(gradsurgery.PCGrad, rank, size)


def nothing_on_one_rank(rank, size):
    x = data(size)[0]
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    optimizer.backward(losses_of(net, x[rank], NAMES if rank else ()))
    optimizer.step()
    same_everywhere([p for p in net.parameters() if p.grad is not None])
    with pytest.raises(RuntimeError, match="every loss is None on every process"):
        optimizer.backward(losses_of(net, x[rank], ()))


def nan_on_one_rank(policy, rank, size):
    x = data(size)[0]
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True, nonfinite=policy)
    losses = losses_of(net, x[rank])
    if rank == size - 1:
        losses["b"] = losses["b"] * float("nan")
    if policy == "raise":
        with pytest.raises(RuntimeError, match="'b' is not finite"):
            optimizer.backward(losses)
    else:
        report = optimizer.backward(losses)
        assert ("skipped" in report.flags) == (policy == "skip")
    written = [p.grad is not None for p in net.parameters()]
    assert any(written) == (policy == "drop")
    optimizer.step()
    same_everywhere(list(net.parameters()))
    if policy == "drop":
        left = Net()
        single = gradsurgery.PCGrad(torch.optim.SGD(left.parameters(), lr=0.01))
        quietly(single, losses_of(left, x.flatten(0, 1), ("a", "c")))
        single.step()
        assert_same(net, left)


def bad_gradient_on_one_rank(rank, size):
    """The value is finite, the gradient is not."""
    x = data(size)[0]
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    losses = losses_of(net, x[rank])
    if rank:
        losses["b"] = losses["b"] + (losses["b"] * 0).sqrt()
    with pytest.raises(RuntimeError, match="gradient of 'b' is not finite"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())


def resume_from_distributed_checkpoint(start, batches, folder, key="gradsurgery"):
    """The recipe of the pages: torch's part as always, the method's memory as one opaque entry."""
    ends = []
    for again in (False, True):
        net, optimizer = start()
        if not again:
            steps(net, optimizer, batches[:2])
        parts = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        if again:
            parts[key] = b""
            dcp.load(parts, checkpoint_id=folder)
            set_state_dict(net, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
            memory = torch.load(io.BytesIO(parts[key]), weights_only=True)
            optimizer.load_state_dict({**optimizer.state_dict(), "gradsurgery": memory})
        else:
            torch.save(optimizer.state_dict()["gradsurgery"], buffer := io.BytesIO())
            parts[key] = buffer.getvalue()
            dcp.save(parts, checkpoint_id=folder)
        steps(net, optimizer, batches[2:])
        local = [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()]
        ends.append(([p.detach().clone() for p in local], optimizer.state_dict()["gradsurgery"]))
    assert same(*ends)


def steps(net, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, x))
        optimizer.step()


def shared_folder():
    """A new folder that all processes know."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def distributed_checkpoint(build, rank, size):
    def start():
        net = Net()
        net.unused.requires_grad_(False)  # torch would look for its moments
        return DDP(net), build(torch.optim.AdamW(net.parameters(), lr=0.01), distributed=True)

    resume_from_distributed_checkpoint(start, data(size, 4)[:, rank], shared_folder())


def scaler(rank, size):
    x = data(size)
    wanted, _ = alone(gradsurgery.CAGrad, x.flatten(1, 2))
    net = Net()
    optimizer = gradsurgery.CAGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), distributed=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in x[:, rank]:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, step), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert_same(net, wanted)
    before = [p.clone() for p in net.parameters()]
    losses = losses_of(net, x[0, rank])
    if rank:
        losses["b"] = losses["b"] * float("inf")
    optimizer.zero_grad()
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)), "all ranks skip"


def accumulation(build, rank, size):
    x = data(size)
    net = Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), distributed=True)
    for step in x[:, rank]:
        optimizer.zero_grad()
        for k, half in enumerate(step.split(3)):
            losses = {name: loss / 2 for name, loss in losses_of(net, half).items()}
            optimizer.backward(losses, accumulate=k == 0)
        optimizer.step()
    wanted, _ = alone(build, x.flatten(1, 2))
    assert_same(net, wanted)


def absent_in_a_micro_batch(build, rank, size):
    """Processes that lack a loss still measure where the others do."""
    x = data(size)
    net, wanted = Net(), Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    single = build(torch.optim.SGD(wanted.parameters(), lr=0.01))
    for step in x:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, step[rank], ("a", "c")), accumulate=True)
        optimizer.backward(losses_of(net, step[rank], NAMES if rank == 0 else ("a", "c")))
        optimizer.step()
        single.zero_grad()
        whole = losses_of(wanted, step.flatten(0, 1))
        losses = {"a": 2 * whole["a"], "b": losses_of(wanted, step[0])["b"], "c": 2 * whole["c"]}
        quietly(single, losses)
        single.step()
    assert_same(net, wanted)


def independent_logarithms(rank, size):
    """The losses of a further batch are those of all processes."""
    x, others = data(size), data(size, steps=6)[3:]
    sizes = [2, 6 * size - 2] if size == 2 else [2, 3, 6 * size - 5]
    start = sum(sizes[:rank])
    results = []
    for distributed in (True, False):
        net = Net()
        optimizer = gradsurgery.MoDo(
            torch.optim.SGD(net.parameters(), lr=0.01), log_losses=True, distributed=distributed
        )
        for batches in zip(x, others, strict=True):
            optimizer.zero_grad()
            whole = [batch.flatten(0, 1) for batch in batches]
            mine = [batch[start : start + sizes[rank]] for batch in whole] if distributed else whole
            first, second = (losses_of(net, batch) for batch in mine)
            quietly(optimizer, first, independent=[second], batch_size=sizes[rank] if distributed else None)
            optimizer.step()
        results.append(net)
    assert_same(*results)


def features(method, shared, rank, size):
    x = data(size)[0].flatten(0, 1)
    sizes = [2, 6 * size - 2] if size == 2 else [2, 3, 6 * size - 5]
    start = sum(sizes[:rank])
    results = []
    for here, distributed in ((x[start : start + sizes[rank]], True), (x, False)):
        net = Net()
        options = {} if shared is None else {"shared_params": shared(net)}
        optimizer = method(torch.optim.SGD(net.parameters(), lr=0.01), distributed=distributed, **options)
        z = net.trunk(here)
        losses = {
            name: (head(z) - i - here[:, i : i + 1]).square().mean()
            for i, (name, head) in enumerate(zip(NAMES, net.heads, strict=True))
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
            results.append((optimizer.backward(losses, features=z, batch_size=len(here)).weights, net))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for p, q in zip(results[0][1].parameters(), results[1][1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def measured(build, rank, size):
    def built(optimizer, **options):
        return build(optimizer, optimizer.param_groups[0]["params"][2], **options)

    equals_one_process(built, rank, size)


def residuals(rank, size):
    x = data(size)[0]
    results = []
    for here, distributed in ((x[rank], True), (x.flatten(0, 1), False)):
        net = Net()
        optimizer = gradsurgery.PCGrad(
            gradsurgery.NTKWeighter(torch.optim.SGD(net.parameters(), lr=0.01), probes=64), distributed=distributed
        )
        named = dict(zip(NAMES, net(here), strict=True))
        losses = {name: r.square().mean() for name, r in named.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
            optimizer.backward(losses, residuals=named)
        results.append(net)
    for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def half_precision_rows(rank, size):
    net = Net().bfloat16()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    optimizer.backward(losses_of(net, data(size)[0, rank].bfloat16()))
    optimizer.step()
    same_everywhere(list(net.parameters()))


def weight_out_of_range_on_one_rank(rank, size):
    """Half precision does not hold the weight of a loss that one process alone has: nobody writes."""
    net = Net()
    losses = losses_of(net, data(size)[0, rank])
    losses["a"] = losses["a"].half() if rank == 0 else None
    weights = {"a": 1e5, "b": 1.0, "c": 1.0}
    optimizer = gradsurgery.FixedWeighter(torch.optim.SGD(net.parameters(), lr=0.01), weights=weights, distributed=True)
    with pytest.raises(RuntimeError, match="the weight of 'a' is out of range"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())
    weights["a"] = 6e4
    optimizer = gradsurgery.FixedWeighter(torch.optim.SGD(net.parameters(), lr=0.01), weights=weights, distributed=True)
    losses = losses_of(net, data(size)[0, rank])
    assert optimizer.backward({**losses, "a": losses["a"].half() if rank == 0 else None}).weights["a"] == 6e4


def mixed_dtypes(rank, size):
    """Rows of several dtypes cannot be one flat tensor; they are added up one by one."""
    x = data(size)
    results = []
    for here, distributed in ((x[0, rank], True), (x[0].flatten(0, 1), False)):
        net = Net()
        net.trunk[0].float()
        net.trunk[0].register_forward_pre_hook(lambda module, args: (args[0].float(),))
        net.trunk[0].register_forward_hook(lambda module, args, out: out.double())
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01), distributed=distributed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
            optimizer.backward(losses_of(net, here))
        results.append(net)
    for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


class Silent(torch.autograd.Function):
    """What has no part in a loss gets no gradient, though the walk thinks that every loss reaches everything."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return tuple(y.clone() for y in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def private_after_all(build, join, rank, size):
    """Heads are private in steps that reuse weights and in those that find them, as they are without the join."""
    x = data(size, steps=4)
    results = []
    for distributed in (True, False):
        net = Net()
        optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01), distributed=distributed)
        reports = []
        for step in x:
            optimizer.zero_grad()
            out = [head(net.trunk(step[rank] if distributed else step.flatten(0, 1))) for head in net.heads]
            out = join.apply(*out) if distributed else out
            losses = [(2.0**i * y - i).square().mean() + 0.1 for i, y in enumerate(out)]
            reports.append(quietly(optimizer, losses))
            optimizer.step()
        results.append((net, reports))
    assert_same(*(net for net, _ in results))
    for ours, theirs in zip(*(reports for _, reports in results), strict=True):
        assert ours.flags == theirs.flags
        assert ours.weights == pytest.approx(theirs.weights, rel=1e-7)


def different_losses(rank, size):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    losses = list(losses_of(net, data(size)[0, rank]).values())
    with pytest.raises(RuntimeError, match=r"must pass the same losses.*process 0: losses \['0', '1'\]"):
        optimizer.backward(losses[:2] if rank == 0 else losses)
    with pytest.raises(RuntimeError, match="accumulate=True"):
        optimizer.backward(losses, accumulate=rank == 0)
    assert all(p.grad is None for p in net.parameters())
    optimizer.backward(losses_of(net, data(size)[0, rank]))


def replicas_that_differ(rank, size):
    net = Net()
    with torch.no_grad():
        net.heads[1].bias += rank
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True, debug=True)
    with pytest.raises(RuntimeError, match="the replicas differ"):
        optimizer.backward(losses_of(net, data(size)[0, rank]))


def complex_replicas(rank, size):
    """Both parts of an entry are compared."""
    p = nn.Parameter(torch.complex(torch.ones(3), torch.ones(3)))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.01), distributed=True, debug=True)
    optimizer.backward([p.abs().sum(), -p.real.sum()])
    with torch.no_grad():
        p.imag.add_(rank)
    with pytest.raises(RuntimeError, match="the replicas differ"):
        optimizer.backward([p.abs().sum(), -p.real.sum()])


def a_group_of_its_own(rank, size):
    pairs = [dist.new_group([0]), dist.new_group(list(range(1, size)))]
    group = pairs[min(rank, 1)]
    x = data(size)
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), process_group=group)
    for step in x[:, rank]:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, step))
        optimizer.step()
    wanted, _ = alone(gradsurgery.PCGrad, (x[:, :1] if rank == 0 else x[:, 1:]).flatten(1, 2))
    assert_same(net, wanted)


def zero_redundancy(rank, size):
    """Each process keeps the momentum of some parameters only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.* is deprecated")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    x = data(size)
    net = Net()
    base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9)
    optimizer = gradsurgery.MGDA(base, distributed=True)
    for step in x[:, rank]:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, step))
        optimizer.step()
    wanted, _ = alone(gradsurgery.MGDA, x.flatten(1, 2))
    assert_same(net, wanted)


def quietly(optimizer, losses, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
        return optimizer.backward(losses, **options)


def absent_in_a_reuse_step(rank, size):
    """All processes take the same road, whatever their own graphs look like."""
    x = data(size)
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True, every=2)
    optimizer.backward(losses_of(net, x[0, rank]))
    optimizer.step()
    optimizer.zero_grad()
    losses = losses_of(net, x[1, rank], NAMES if rank else ("a",))
    assert "reused" in optimizer.backward(losses).flags
    optimizer.step()
    same_everywhere(list(net.heads.parameters()))


class ByRank(gradsurgery.Surgery):
    """What rounding could do on another processor, written large."""

    def weights(self, gram, losses):
        return np.full(len(gram), 1.0 + dist.get_rank())


def weights_that_differ(rank, size):
    """Those of the first process hold for all."""
    x = data(size)[0]
    net = Net()
    report = ByRank(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True).backward(losses_of(net, x[rank]))
    assert list(report.weights.values()) == [1.0, 1.0, 1.0]
    wanted = Net()
    sum(losses_of(wanted, x.flatten(0, 1)).values()).backward()
    torch.testing.assert_close(net.trunk[0].weight.grad, wanted.trunk[0].weight.grad)


def named_and_not_reached(rank, size):
    net = Net()
    optimizer = gradsurgery.PCGrad(
        torch.optim.SGD(net.parameters(), lr=0.01), distributed=True, shared_params=net.parameters()
    )
    optimizer.backward(losses_of(net, data(size)[0, rank]))
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"unused.weight", "unused.bias"}


def inactive_hinge(rank, size):
    """A row of zeros is a row, here as in one process."""
    x = data(size)[0]
    results = []
    for here, distributed in ((x[rank], True), (x.flatten(0, 1), False)):
        net = Net()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01), distributed=distributed)
        losses = losses_of(net, here)
        losses["b"] = (losses["b"] - 1e9).clamp(min=0)
        results.append(quietly(optimizer, losses))
    assert results[0].weights == pytest.approx(results[1].weights)
    assert results[0].flags == results[1].flags


def reentrant_is_refused(rank, size):
    from torch.utils.checkpoint import checkpoint

    net = Net()
    x = data(size)[0, rank].requires_grad_()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    z = net.trunk(x) if rank else checkpoint(net.trunk, x, use_reentrant=True)
    losses = [head(z).square().mean() for head in net.heads]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(losses)


def frozen_on_one_rank(rank, size):
    net = Net()
    net.heads[0].weight.requires_grad_(bool(rank))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    with pytest.raises(RuntimeError, match="must pass the same losses"):
        optimizer.backward(losses_of(net, data(size)[0, rank]))


def others_in_one_micro_batch(rank, size):
    """Only the first micro-batch reaches the head of another optimizer."""
    x = data(size)[0]
    for method in (gradsurgery.PCGrad, gradsurgery.UncertaintyWeighter):
        results = []
        for here, distributed in ((x[rank], True), (x.flatten(0, 1), False)):
            net = Net()
            head = torch.optim.SGD(net.heads[2].parameters(), lr=0.01)
            rest = [*net.trunk.parameters(), *net.heads[:2].parameters()]
            optimizer = method(torch.optim.SGD(rest, lr=0.01), distributed=distributed)
            quietly(optimizer, losses_of(net, here), accumulate=True, other_optimizers=[head])
            quietly(optimizer, losses_of(net, here, ("a", "b")))
            results.append(net)
        for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)


def nothing_in_the_last_micro_batch(rank, size):
    x = data(size)[0]
    results = []
    for here, distributed in ((x[rank], True), (x.flatten(0, 1), False)):
        net = Net()
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=distributed)
        quietly(optimizer, losses_of(net, here), accumulate=True)
        if distributed:
            optimizer.backward(losses_of(net, here, ()))
        else:
            net.zero_grad()
            optimizer.zero_grad()
            quietly(optimizer, losses_of(net, here))
        results.append(net)
    for p, q in zip(results[0].heads.parameters(), results[1].heads.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def words(rank, size):
    """A row is sent as soon as it is found, and the direction is collected: (m + 1) n numbers, not 2 m n."""
    sent = {"scatter": 0, "gather": 0, "reduce": 0}
    scatter, gather, reduce = processes.reduce_scatter, processes.all_gather, dist.all_reduce

    def scattered(out, flat, *args, **kwargs):
        sent["scatter"] += flat.numel()
        return scatter(out, flat, *args, **kwargs)

    def gathered(out, flat, *args, **kwargs):
        sent["gather"] += out.numel()
        return gather(out, flat, *args, **kwargs)

    def reduced(tensor, *args, **kwargs):
        sent["reduce"] += tensor.numel()
        return reduce(tensor, *args, **kwargs)

    net = Net()
    shared = sum(p.numel() for p in net.trunk.parameters())
    private = sum(p.numel() for p in net.heads.parameters())
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    losses = losses_of(net, data(size)[0, rank])
    with (
        mock.patch.object(sliced, "reduce_scatter", scattered),
        mock.patch.object(sliced, "all_gather", gathered),
        mock.patch.object(dist, "all_reduce", reduced),
    ):
        optimizer.backward(losses)
    padded = -(-shared // size) * size
    assert sent["scatter"] == 3 * padded
    assert sent["gather"] == padded
    # The rest: private gradients once, the Gram matrix, and marks of a byte a loss and parameter.
    assert sent["reduce"] < private + 100 + 3 * 4 * len(list(net.parameters()))


def under_autocast(rank, size):
    """The direction is combined in the precision of the rows. Nothing here is a product of matrices but this."""
    found = []
    for enabled in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        optimizer = gradsurgery.MGDA(torch.optim.SGD([p], lr=0.1), distributed=True)
        losses = [((p - i) * (rank + 1)).square().sum() for i in range(3)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.backward(losses)
        found.append(p.grad)
    assert torch.equal(*found)


def a_copy_works_with_the_same_processes(rank, size):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), process_group=dist.group.WORLD)
    copied, other = copy.deepcopy((net, optimizer))
    assert other.process_group is optimizer.process_group
    other.backward(losses_of(copied, data(size)[0, rank]))
    same_everywhere([p.grad for p in copied.parameters() if p.grad is not None])
    assert all(p.grad is None for p in net.parameters())


def nothing_finite_in_the_last_micro_batch(rank, size):
    x = data(size)[0, rank]
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True, nonfinite="drop")
    optimizer.backward(losses_of(net, x), accumulate=True)
    report = optimizer.backward({name: loss * float("nan") for name, loss in losses_of(net, x).items()})
    assert report.names == NAMES
    assert "dropped" in report.flags


class Opaque(torch.autograd.Function):
    """Torch knows nothing of what it does."""

    @staticmethod
    def forward(ctx, *losses):
        return tuple(loss.clone() for loss in losses)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def joined(rank, size):
    """Heads are private on every process, whatever their outputs or losses pass through."""
    x = data(size)
    wanted, _ = alone(gradsurgery.MGDA, x.flatten(1, 2))

    def columns(net):
        return lambda x: torch.cat(net(x), 1).split(1, dim=1)

    def stacked(losses):
        return dict(zip(losses, torch.stack(list(losses.values())).unbind(), strict=True))

    def opaque(losses):
        return dict(zip(losses, Opaque.apply(*losses.values()), strict=True))

    for wrap, join in ((columns, dict), (lambda net: net, stacked), (lambda net: net, opaque), (DDP, stacked)):
        net = Net()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), distributed=True)
        for one in x[:, rank]:
            optimizer.zero_grad()
            optimizer.backward(join(losses_of(wrap(net), one)))
            optimizer.step()
        assert_same(net, wanted)


def cases(rank: int, size: int) -> dict[str, Callable[[], None]]:
    """Everything, in the same order in every process."""
    here = (rank, size)
    found: dict[str, Callable[[], None]] = {}
    some = {name: METHODS[name] for name in ("PCGrad", "MGDA", "MoCo", "GradDrop", "FAMOWeighter", "DWAWeighter")}
    # With three processes sums round in another order, and slices are uneven: nothing that a method could notice.
    for name, build in (METHODS if size == 2 else some).items():
        found[f"one process: {name}"] = lambda build=build: equals_one_process(build, *here)
        found[f"replicas: {name}"] = lambda build=build: stays_replicated(build, *here)
    for name, build in some.items():
        found[f"unequal shards: {name}"] = lambda build=build: unequal_shards(build, *here)
        found[f"absent on one rank: {name}"] = lambda build=build: absent_on_one_rank(build, *here)
        found[f"accumulation: {name}"] = lambda build=build: accumulation(build, *here)
        found[f"distributed checkpoint: {name}"] = lambda build=build: distributed_checkpoint(build, *here)
    for policy in ("raise", "skip", "drop"):
        found[f"nan on one rank: {policy}"] = lambda policy=policy: nan_on_one_rank(policy, *here)
    for text, options in {
        "plain": {},
        "bucket view": {"gradient_as_bucket_view": True},
        "find_unused_parameters": {"find_unused_parameters": True},
        "static_graph": {"static_graph": True},
    }.items():
        found[f"DDP {text}, one head"] = lambda options=options: ddp(options, *here, heads=1)
        found[f"DDP {text}, three heads"] = lambda options=options: ddp(options, *here)
        if options.get("find_unused_parameters"):
            found[f"DDP {text}, unused head"] = lambda options=options: ddp(options, *here, unused=True)
        found[f"DDP {text}, BatchNorm"] = lambda options=options: ddp(options, *here, norm=True)
    compositions = {
        "PCGrad(Uncertainty)": lambda o, **k: gradsurgery.PCGrad(gradsurgery.UncertaintyWeighter(o), **k),
        "MGDA, by parameter": lambda o, **k: gradsurgery.MGDA(o, granularity="parameter", **k),
        "MGDA of logarithms": lambda o, **k: gradsurgery.MGDA(o, log_losses=True, **k),
        "MoCo(DWA)": lambda o, **k: gradsurgery.MoCo(gradsurgery.DWAWeighter(o), **k),
        "every=2": lambda o, **k: gradsurgery.PCGrad(o, every=2, **k),
        "warmup=2": lambda o, **k: gradsurgery.PCGrad(o, warmup=2, **k),
        "Frank-Wolfe": lambda o, **k: gradsurgery.MGDA(o, solver="frank-wolfe", **k),
    }
    for name, build in compositions.items():
        found[name] = lambda build=build: equals_one_process(build, *here)
    for method in (gradsurgery.UPGrad, gradsurgery.IMTLG, gradsurgery.NormalizedGradientWeighter):
        found[f"features: {method.__name__}"] = lambda method=method: features(method, None, *here)
    named = {"trunk": lambda net: net.trunk, "one layer": lambda net: net.trunk[0], "heads": lambda net: net.heads}
    for name, shared in named.items():
        found[f"features, shared_params: {name}"] = lambda shared=shared: features(gradsurgery.UPGrad, shared, *here)
    joins = {
        "PCGrad": gradsurgery.PCGrad,
        "every=2": compositions["every=2"],
        "warmup=2": compositions["warmup=2"],
        "PCGrad(NormalizedGradient)": lambda o, **k: gradsurgery.PCGrad(gradsurgery.NormalizedGradientWeighter(o), **k),
        "NormalizedGradient": gradsurgery.NormalizedGradientWeighter,
    }
    for name, build in joins.items():
        for join in (Silent, Opaque):
            found[f"private after all: {name}, {join.__name__}"] = lambda build=build, join=join: private_after_all(
                build, join, *here
            )
    for build in (gradsurgery.NormalizedGradientWeighter, gradsurgery.LRAnnealingWeighter):
        found[f"absent on one rank: {build.__name__}"] = lambda build=build: absent_on_one_rank(build, *here)
        found[f"absent in a micro-batch: {build.__name__}"] = lambda build=build: absent_in_a_micro_batch(build, *here)
    found["independent batches of logarithms"] = lambda: independent_logarithms(*here)
    for case in (
        absent_in_a_reuse_step, absent_where_the_graph_is_too_deep, inactive_hinge, reentrant_is_refused,
        frozen_on_one_rank, others_in_one_micro_batch, nothing_in_the_last_micro_batch, weights_that_differ,
        named_and_not_reached,
    ):  # fmt: skip
        found[case.__name__.replace("_", " ")] = lambda case=case: case(*here)
    found["GradNorm"] = lambda: measured(gradsurgery.GradNormWeighter, *here)
    found["accumulation: GradNorm"] = lambda: accumulation(
        lambda o, **k: gradsurgery.GradNormWeighter(o, o.param_groups[0]["params"][2], **k), *here
    )
    for case in (
        nothing_on_one_rank, bad_gradient_on_one_rank, scaler, residuals, half_precision_rows, mixed_dtypes,
        weight_out_of_range_on_one_rank, zero_redundancy, different_losses, replicas_that_differ, complex_replicas,
        a_group_of_its_own, words, under_autocast, a_copy_works_with_the_same_processes,
        nothing_finite_in_the_last_micro_batch, joined,
    ):  # fmt: skip
        found[case.__name__.replace("_", " ")] = lambda case=case: case(*here)
    return found


@pytest.fixture(scope="module")
def told(request, tmp_path_factory):
    known: dict[int, dict[str, str]] = {}

    def of(size):
        if size not in known:
            names = wanted(request.session, "test_ddp", size=size)
            known[size] = run_cases(cases, size, tmp_path_factory.mktemp("ranks"), names)
        return known[size]

    return of


@pytest.mark.parametrize(
    ("size", "case"), [(size, case) for size in (2, 3) for case in cases(0, size)], ids=lambda part: str(part)
)
def test_ddp(told, size, case):
    assert not told(size)[case], told(size)[case]


def _one_dies(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=200)
    )
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), distributed=True)
    for step in data(2)[:, rank]:
        if rank and optimizer.state_dict()["gradsurgery"]["memory"]["step"] == 1:
            os._exit(0)
        before = [p.clone() for p in net.parameters()]
        optimizer.zero_grad()
        try:
            optimizer.backward(losses_of(net, step))
        except RuntimeError as error:
            same = all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
            empty = all(p.grad is None for p in net.parameters())
            Path(folder, "told").write_text(f"{same} {empty} {error}")
            os._exit(0)
        optimizer.step()


def test_a_process_that_dies_is_an_error_for_the_others(tmp_path):
    # The others wait no longer than the group's timeout, which is less than a test may take.
    start(_one_dies, (str(tmp_path),), 2)
    told = (tmp_path / "told").read_text()
    assert told.startswith("True True "), told


def test_an_optimizer_holds_the_group_that_it_has_worked_with():
    """Torch may wait for ever where the reducer of a model is the last to let go of a group."""
    with group_of_one():
        net = DDP(Net())
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
        optimizer.backward(losses_of(net, data(1)[0, 0]))
        assert held(optimizer) is dist.group.WORLD
    assert held(pickle.loads(pickle.dumps(optimizer))) is None


def test_distributed_needs_a_process_group():
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01), distributed=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        optimizer.backward(losses_of(net, data(1)[0, 0]))


def test_a_group_is_let_go_when_the_interpreter_begins_to_end():
    class Owner:
        pass

    owner = Owner()
    processes.hold(owner, "a group")
    assert held(owner) == "a group"
    processes._release()
    assert held(owner) is None
