"""A run that is saved and goes on in another process equals the uninterrupted one bit for bit.

Every method over every kind of optimizer, all in one file, and one process that goes on with all of them.
"""

from __future__ import annotations

import copy
import gzip
import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.support import loops
from tests.support.loops import METHODS, OPTIMIZERS, Net, memory_of, same, train
from tests.support.processes import start as start_processes

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [(name, base) for name in METHODS for base in ("sgd", "adamw", "lbfgs")]
BEFORE, AFTER = range(4), range(4, 7)


def start(name, base):
    net = Net()
    return net, METHODS[name](OPTIMIZERS[base](net.parameters()))


def checkpoint(net, optimizer):
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}


def go_on(rank, source, target):
    """What the other process does: load every checkpoint, go on, and save again."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(1234)  # a method's random stream is its own
    found = {}
    for (name, base), saved in torch.load(source, weights_only=True).items():
        net, optimizer = start(name, base)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        train(name, optimizer, net, AFTER)
        found[name, base] = checkpoint(net, optimizer)
    torch.save(found, target)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """For every pair the end of the uninterrupted run, and that of the one that went on in another process."""
    folder = tmp_path_factory.mktemp("resume")
    halves, wholes = {}, {}
    for name, base in PAIRS:
        net, optimizer = start(name, base)
        train(name, optimizer, net, BEFORE)
        halves[name, base] = copy.deepcopy(checkpoint(net, optimizer))
        train(name, optimizer, net, AFTER)
        wholes[name, base] = checkpoint(net, optimizer)
    torch.save(halves, folder / "half.pt")
    start_processes(go_on, (folder / "half.pt", folder / "whole.pt"))
    return wholes, torch.load(folder / "whole.pt", weights_only=True)


@pytest.mark.parametrize(("name", "base"), PAIRS)
def test_a_fresh_process_goes_on_bit_for_bit(finished, name, base):
    whole, resumed = (runs[name, base] for runs in finished)
    assert not same(whole["net"], Net().state_dict())
    assert same(resumed["net"], whole["net"])
    assert same(resumed["optimizer"], whole["optimizer"])


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_of_the_bare_optimizer_are_exchanged(name):
    """Training may begin bare and go on wrapped, and the other way round; the method then starts afresh."""
    net, optimizer = start(name, "adamw")
    train(name, optimizer, net, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    bare = loops.innermost(start(name, "adamw")[1])
    bare.load_state_dict(saved)
    moments = copy.deepcopy(bare.state_dict())
    assert same(moments, {key: saved[key] for key in ("state", "param_groups")})
    _, again = start(name, "adamw")
    fresh = memory_of(again)
    again.load_state_dict(moments)
    assert same(memory_of(again), fresh)
    assert same({key: again.state_dict()[key] for key in moments}, moments)


# ------------------------------------------------------------------------------------------ distributed checkpoints


def packed(value):
    """One opaque entry: what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    "name",
    ["PCGrad", "MGDA, every second step after one", "PCGrad over GradNormWeighter", "MoCo", "SLAWWeighter", "MTAdam"],
)
def test_distributed_checkpoint_with_the_methods_memory(name, tmp_path):
    """The recipe of the pages: torch's part as always, the memory as one opaque entry."""
    net, optimizer = start(name, "adamw")
    train(name, optimizer, net, BEFORE)
    parts = {
        "net": net.state_dict(),
        "optimizer": get_optimizer_state_dict(net, optimizer),
        "method": packed(optimizer.state_dict()["gradsurgery"]),
    }
    dcp.save(parts, checkpoint_id=tmp_path)
    train(name, optimizer, net, AFTER)

    again, reloaded = start(name, "adamw")
    parts = {"net": again.state_dict(), "optimizer": get_optimizer_state_dict(again, reloaded), "method": b""}
    dcp.load(parts, checkpoint_id=tmp_path)
    again.load_state_dict(parts["net"])
    set_optimizer_state_dict(again, reloaded, parts["optimizer"])
    memory = torch.load(io.BytesIO(parts["method"]), weights_only=True)
    reloaded.load_state_dict({**reloaded.state_dict(), "gradsurgery": memory})
    train(name, reloaded, again, AFTER)
    assert same(loops.weights_of(again), loops.weights_of(net))
    assert same(memory_of(reloaded), memory_of(optimizer))


def written_by_an_older_version():
    """Checkpoints of its methods after three steps, and the parameters after three more.

    They were made by `train` of loops.py with AdamW, before the core was taken apart.
    """
    with gzip.open(ROOT / "tests" / "data" / "checkpoints.pt.gz") as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


OLDER = written_by_an_older_version()


@pytest.mark.parametrize("name", OLDER)
def test_a_checkpoint_of_an_older_version_goes_on(name):
    saved = OLDER[name]
    net, optimizer = start(name, "adamw")
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    assert memory_of(optimizer)["memory"]["step"] == 3
    train(name, optimizer, net, range(3, 6))
    for p, q in zip(net.parameters(), saved["after"], strict=True):
        torch.testing.assert_close(p, torch.nn.Parameter(q), rtol=1e-6, atol=1e-9)
