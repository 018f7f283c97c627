"""Parameters that are sharded or replicated by a device mesh: fully_shard, hybrid sharding, tensor-parallel plans."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradsurgery
from tests.distributed.test_ddp import (
    alone,
    assert_same,
    data,
    losses_of,
    resume_from_distributed_checkpoint,
    shared_folder,
)
from tests.support.catalogue import any_optimizer, over_processes
from tests.support.processes import run_cases, wanted
from tests.support.weighting_catalogue import CATALOGUE as WEIGHTERS

# These differentiate down to a few parameters only, which autograd cannot do where parameters are gathered on the way.
MEASURING = (gradsurgery.GradNormWeighter, gradsurgery.NormalizedGradientWeighter, gradsurgery.LRAnnealingWeighter)

# Losses and their weights are whole everywhere; `test_ddp` has all methods that see these alone. Sharded are gradients.
SHARDED_WEIGHTERS = [
    row
    for row in WEIGHTERS
    if isinstance(row.build(any_optimizer()), (*MEASURING, gradsurgery.NTKWeighter))
    or row.name in ("FixedWeighter", "UncertaintyWeighter", "FAMOWeighter", "DWAWeighter")
]


class Net(nn.Module):
    """Blocks of sizes that no number of processes divides, and three heads."""

    def __init__(self, width=7):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 6)
        self.norm = nn.LayerNorm(6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.double()

    def forward(self, x):
        z = self.norm(self.second(self.first(x).tanh()))
        return [head(z) for head in self.heads]


def sharded(net, mesh=None, **options):
    for block in (net.first, net.second, *net.heads):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def whole(net):
    """The net with plain parameters and gradients, to compare."""
    plain = Net(net.second.in_features)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        full = q.full_tensor() if hasattr(q, "full_tensor") else q
        p.data = full.detach()
        if q.grad is not None:
            p.grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
    return plain


def trained(net, build, batches, sizes=None, **options):
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), **options)
    for x in batches:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, x), batch_size=sizes)
        optimizer.step()
    return optimizer


def fsdp(build, rank, size):
    x = data(size)
    net = sharded(Net())
    if isinstance(build(torch.optim.SGD(net.parameters(), lr=0.01)), MEASURING):
        with pytest.raises(RuntimeError, match=r"fully_shard"):
            trained(net, build, x[:, rank])
        return
    optimizer = trained(net, build, x[:, rank])
    wanted, single = alone(build, x.flatten(1, 2), net=Net())
    assert_same(whole(net), wanted)
    assert optimizer.report.losses == pytest.approx(single.report.losses, rel=1e-7)
    if single.report.weights is not None:
        assert optimizer.report.weights == pytest.approx(single.report.weights, rel=1e-5, abs=1e-8)


def fsdp_unequal(rank, size):
    x = data(size).flatten(1, 2)
    sizes = [2, 6 * size - 2]
    start = sum(sizes[:rank])
    net = sharded(Net())
    trained(net, gradsurgery.MGDA, x[:, start : start + sizes[rank]], sizes=sizes[rank])
    wanted, _ = alone(gradsurgery.MGDA, x, net=Net())
    assert_same(whole(net), wanted)


def fsdp_accumulation(rank, size):
    x = data(size)
    net = sharded(Net())
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    for step in x[:, rank]:
        optimizer.zero_grad()
        for k, half in enumerate(step.split(3)):
            losses = {name: loss / 2 for name, loss in losses_of(net, half).items()}
            optimizer.backward(losses, accumulate=k == 0)
        optimizer.step()
    wanted, _ = alone(gradsurgery.UPGrad, x.flatten(1, 2), net=Net())
    assert_same(whole(net), wanted)


def fsdp_scaler(rank, size):
    x = data(size)
    net = sharded(Net())
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in x[:, rank]:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, step), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    wanted, _ = alone(gradsurgery.MGDA, x.flatten(1, 2), net=Net())
    assert_same(whole(net), wanted)
    before = [p.to_local().clone() for p in net.parameters()]
    losses = losses_of(net, x[0, rank])
    losses["b"] = losses["b"] * (float("inf") if rank else 1.0)
    optimizer.zero_grad()
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p.to_local(), q) for p, q in zip(net.parameters(), before, strict=True))


def fsdp_half(rank, size):
    x = data(size).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = sharded(Net().float(), mp_policy=policy)
    trained(net, gradsurgery.MGDA, x[:, rank])
    plain = Net().float()
    alone(gradsurgery.MGDA, x.flatten(1, 2), net=plain)
    assert_same(whole(net).float(), plain, rtol=0.1, atol=0.02)


def fsdp_squares_outside_float32(rank, size):
    """A process has pieces of the rows only, and cannot make products anew on its own."""
    x = data(size)[0].float()

    def weighed(net, batch):
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01))
        losses = {name: 2.0**-80 * loss for name, loss in losses_of(net, batch).items()}
        return optimizer.backward(losses)

    report = weighed(sharded(Net().float()), x[rank])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
        wanted = weighed(Net().float(), x.flatten(0, 1))
    assert report.weights == pytest.approx(wanted.weights, rel=1e-4, abs=1e-6)


def fsdp_gradients_there_before(rank, size):
    x = data(size)[0]
    net = sharded(Net())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01)).backward(losses_of(net, x[rank]))
    wanted = Net()
    for p in wanted.parameters():
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")
        gradsurgery.PCGrad(torch.optim.SGD(wanted.parameters(), lr=0.01)).backward(losses_of(wanted, x.flatten(0, 1)))
    for p, q in zip(whole(net).parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def fsdp_checkpointing(rank, size):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    x = data(size)
    net = Net()
    net.second = checkpoint_wrapper(net.second)
    fully_shard(net.second)
    fully_shard(net)
    trained(net, gradsurgery.PCGrad, x[:, rank])
    wanted, _ = alone(gradsurgery.PCGrad, x.flatten(1, 2), net=Net())
    assert_same(whole(net), wanted)


def fsdp_checkpoint(build, rank, size):
    """Rows that a method keeps are pieces: each process has an entry of its own."""

    def start():
        net = sharded(Net())
        return net, build(torch.optim.AdamW(net.parameters(), lr=0.01))

    resume_from_distributed_checkpoint(start, data(size, 4)[:, rank], shared_folder(), f"gradsurgery.{rank}")


def fsdp_refuses(rank, size):
    x = data(size)[0, rank]
    net = sharded(Net())
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD(net.parameters(), lr=0.01), net.second.weight)
    with pytest.raises(RuntimeError, match="fully_shard"):
        optimizer.backward(losses_of(net, x))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01))
    present = ("a", "b", "c") if rank else ("a", "c")
    with pytest.raises(RuntimeError, match="absent on one process"):
        optimizer.backward(losses_of(net, x, present))


def debug_compares_what_is_whole_everywhere(rank, size):
    """Pieces differ by nature. A parameter outside of the mesh must not."""
    net = sharded(Net())
    trained(net, gradsurgery.MGDA, data(size)[:, rank], debug=True)
    net.loose = nn.Parameter(torch.full((3,), float(rank)))
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.01), debug=True)
    with pytest.raises(RuntimeError, match=r"the replicas differ between processes in 1 of 1 .* of shape \(3,\)"):
        optimizer.backward(losses_of(net, data(size)[0, rank]))


def a_parameter_that_nobody_exchanges(rank, size):
    """The heads lie outside of what was sharded: their gradients, and so their products, are those of one process."""
    x = data(size)[0, rank]
    net = Net()
    for block in (net.first, net.second):
        fully_shard(block)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01))
    with pytest.raises(RuntimeError, match=r"8 parameters .* outside of fully_shard.*fully_shard\(model\)"):
        optimizer.backward(losses_of(net, x))
    assert all(p.grad is None for p in net.parameters())


def old_fsdp_is_refused(rank, size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.01))
    out = net(data(size)[0, rank].float())
    with pytest.raises(RuntimeError, match="fully_shard"):
        optimizer.backward([out.mean(), out.square().mean()])


def tensor_parallel(build, rank, size):
    """Every process sees the same batch, and has a part of each layer."""
    x = data(size).flatten(1, 2)
    net = Net(8)
    mesh = init_device_mesh("cpu", (size,))
    together = PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True)
    plan = {
        "first": ColwiseParallel(),
        "second": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),  # its gradients are sums that are not yet added up
        **{f"heads.{i}": together for i in range(3)},
    }
    parallelize_module(net, mesh, plan)
    trained(net, build, x)
    wanted, _ = alone(build, x, net=Net(8))
    assert_same(whole(net), wanted)


def cases(rank, size):
    here = (rank, size)
    found = {}
    for row in (*over_processes(), *SHARDED_WEIGHTERS):
        found[f"fully_shard: {row.name}"] = lambda build=row.build: fsdp(build, *here)
    for case in (
        fsdp_unequal, fsdp_accumulation, fsdp_scaler, fsdp_half, fsdp_squares_outside_float32,
        fsdp_gradients_there_before, fsdp_checkpointing, fsdp_refuses, debug_compares_what_is_whole_everywhere,
        a_parameter_that_nobody_exchanges,
    ):  # fmt: skip
        found[case.__name__.replace("_", " ")] = lambda case=case: case(*here)
    for name in ("PCGrad", "MGDA", "GradDrop", "MoCo", "ExcessMTL", "MTAdam", "DWAWeighter"):
        build = next(row.build for row in (*over_processes(), *WEIGHTERS) if row.name == name)
        found[f"tensor parallel: {name}"] = lambda build=build: tensor_parallel(build, *here)
        found[f"distributed checkpoint: {name}"] = lambda build=build: fsdp_checkpoint(build, *here)
    found["old fsdp is refused"] = lambda: old_fsdp_is_refused(*here)
    return found


def mesh_cases(rank, size):
    """Four processes, as two by two."""

    def hybrid():
        x = data(size)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        net = sharded(Net(), mesh)
        trained(net, gradsurgery.PCGrad, x[:, rank])
        wanted, _ = alone(gradsurgery.PCGrad, x.flatten(1, 2), net=Net())
        assert_same(whole(net), wanted)

    def both():
        x = data(2)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        net = Net(8)
        parallelize_module(net, mesh["model"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
        for block in (net.first, net.second):
            fully_shard(block, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            trained(net, gradsurgery.MGDA, x[:, mesh["data"].get_local_rank()])
        wanted, _ = alone(gradsurgery.MGDA, x.flatten(1, 2), net=Net(8))
        assert_same(whole(net), wanted)

    return {"hybrid sharding": hybrid, "fully_shard of a tensor-parallel model": both}


@pytest.fixture(scope="module")
def told(request, tmp_path_factory):
    return run_cases(cases, 2, tmp_path_factory.mktemp("shards"), wanted(request.session, "test_sharded"))


@pytest.mark.parametrize("case", list(cases(0, 2)))
def test_sharded(told, case):
    assert not told[case], told[case]


@pytest.fixture(scope="module")
def told_by_four(request, tmp_path_factory):
    return run_cases(mesh_cases, 4, tmp_path_factory.mktemp("meshes"), wanted(request.session, "test_meshes"))


@pytest.mark.parametrize("case", list(mesh_cases(0, 4)))
def test_meshes(told_by_four, case):
    assert not told_by_four[case], told_by_four[case]
