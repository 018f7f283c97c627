"""The report of a step, and ``combine``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery
from gradsurgery.communication import alone
from tests.support.two_heads import Counting, Halves, memory_of, sgd

# ----------------------------------------------------------------------------------------------------------- the report


def test_report_tells_what_happened(net, x):
    optimizer = gradsurgery.PCGrad(sgd(net))
    losses = net(x)
    report = optimizer.backward(losses)
    assert optimizer.report is report
    assert report.losses == {name: loss.item() for name, loss in losses.items()}
    assert report.total == sum(report.losses.values())
    assert report.objective == pytest.approx(sum(report.weights[n] * report.losses[n] for n in losses))
    assert list(report.norms.values()) == pytest.approx(report.gram.diagonal().sqrt().tolist())
    assert report.cosines.diagonal().tolist() == [1.0, 1.0]
    assert report.cosines[0, 1] < 0
    assert report.conflict_rate == 1.0
    assert "losses" in repr(report)
    assert set(report.as_dict()) >= {"losses", "total", "weights", "cosines", "flags"}
    report.gram.zero_()
    assert report.gram.any(), "a report hands out copies"
    assert all(loss.requires_grad for loss in losses.values())
    weighted = Halves(sgd(net)).backward(net(x))
    assert weighted.gram is weighted.norms is weighted.cosines is weighted.conflict_rate is None


class CountsReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wrap", [gradsurgery.PCGrad, gradsurgery.MGDA, Halves, lambda b: gradsurgery.PCGrad(Halves(b))]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_one_transfer_to_the_host_a_step(net, x, monkeypatch, wrap, scaled):
    transfers = []
    host = alone.host
    monkeypatch.setattr(alone, "host", lambda numbers: transfers.append(1) or host(numbers))
    optimizer = wrap(sgd(net))
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    losses = net(x)
    with CountsReads() as mode:
        optimizer.backward(losses, scaler=scaler)
    assert mode.reads == 0
    assert len(transfers) == 1


# -------------------------------------------------------------------------------------------------------------- combine


@pytest.mark.parametrize("wrap", [gradsurgery.PCGrad, gradsurgery.MGDA, Counting])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_combine_gives_what_backward_writes(wrap, reduction):
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    rows = torch.randn(4, 7, dtype=torch.float64)
    optimizer = wrap(torch.optim.SGD([p], lr=0.1), reduction=reduction)
    for _ in range(3):
        direction = optimizer.combine(rows)
        assert torch.equal(optimizer.combine(rows), direction), "pure: the same draw, the same state"
        optimizer.zero_grad()
        optimizer.backward([row @ p for row in rows])
        assert torch.equal(optimizer.combine(rows), direction), "not moved by what is pending"
        torch.testing.assert_close(p.grad, direction, rtol=1e-14, atol=0)
        optimizer.step()


def test_combine_with_update_commits(net):
    optimizer = Counting(sgd(net))
    rows = torch.randn(2, 5)
    for step in range(3):
        optimizer.combine(rows)
        optimizer.combine(rows, update=True)
        assert memory_of(optimizer)["step"] == step + 1
        assert memory_of(optimizer)["count"] == {"0": step + 1.0, "1": step + 1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_keeps_the_dtype(net, dtype):
    assert gradsurgery.MGDA(sgd(net)).combine(torch.randn(2, 5).to(dtype)).dtype == dtype


def test_combine_goes_on_where_named_losses_left_off(net):
    """Rows stand for the losses in the order in which the method met them."""
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    rows = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [0, -1, 1]])
    found = []
    for names in ("abc", "012"):
        optimizer = gradsurgery.GradVac(base)
        (p,) = base.param_groups[0]["params"]
        optimizer.backward({name: (p * row).sum() for name, row in zip(names, rows, strict=True)})
        optimizer.step()
        found.append(optimizer.combine(rows))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"GradVac\.combine.*keeps something for each of \['0', '1', '2'\]"):
        optimizer.combine(rows[:2])
    keeps_rows = gradsurgery.MoCo(base)
    keeps_rows.backward([(p * row).sum() for row in rows])
    keeps_rows.step()
    assert torch.isfinite(keeps_rows.combine(rows)).all()
    with pytest.raises(RuntimeError, match=r"MoCo\.combine: .*rows of the parameters"):
        keeps_rows.combine(torch.eye(3, 4))


def test_combine_checks_its_input(net):
    optimizer = gradsurgery.MGDA(sgd(net), normalize="loss")
    good = torch.eye(2)
    for arguments, error, message in (
        (([[1.0]],), TypeError, r"MGDA\.combine: `rows` must be a real floating point tensor of shape \(m, n\)"),
        ((torch.ones(3),), TypeError, "`rows`"),
        ((torch.ones(0, 3), []), ValueError, "at least one row"),
        ((good,), ValueError, "`losses` must be given"),
        ((good, [1.0]), ValueError, r"`losses` must have shape \(2,\)"),
        ((good, [1.0, -1.0]), ValueError, r"every loss must be > 0.*\{'1': -1.0\}"),
        ((good * float("nan"), [1.0, 1.0]), ValueError, "finite"),
    ):
        with pytest.raises(error, match=message):
            optimizer.combine(*arguments)


def test_a_method_that_changes_the_losses_in_place_does_not_change_the_report(net, x):
    class Shifts(gradsurgery.Surgery):
        def weights(self, gram, losses):
            losses -= losses.min()
            return 1.0 + losses

    losses = net(x)
    report = Shifts(sgd(net)).backward(losses)
    assert report.losses == {name: pytest.approx(float(one.detach())) for name, one in losses.items()}


def test_what_a_subclass_does_to_weights_and_directions_is_done_whenever_it_was_defined(net, x):
    class Twice(gradsurgery.Surgery):
        def weights(self, gram, losses):
            return torch.ones(len(gram)).numpy()

        def smoothed(self, weights):
            return 2 * super().smoothed(weights)

    shared = list(net.trunk.parameters())
    Twice(sgd(net)).backward(net(x))
    twice = [p.grad for p in shared]
    net.zero_grad()
    sum(net(x).values()).backward()
    for found, p in zip(twice, shared, strict=True):
        torch.testing.assert_close(found, 2 * p.grad)
    net.zero_grad()
    Twice.direct = lambda self, column, applied, like, share: torch.full_like(like, 7.0)
    Twice(sgd(net)).backward(net(x))
    assert all((p.grad == 7.0).all() for p in shared)
