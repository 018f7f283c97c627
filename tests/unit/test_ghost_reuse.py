"""Weights that several calls use: one ghost, with the inputs and the output gradients of all its calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradsurgery
from gradsurgery.gradients import ghosts as ghost
from gradsurgery.watch.diagnose import peak_bytes
from tests.unit.test_ghost import Lambda, Net, Tied, at, body, compare, compare_hooked, gram_of, heads, rows_by_autograd

A, B = body("a.weight", "a.bias"), body("b.weight", "b.bias")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(function: Callable[..., Tensor], **layers: nn.Module) -> Net:
    """A body made of a function of some layers, and three heads on outputs of width 6."""
    return Net(Lambda(function, **layers), 6)


def square() -> nn.Linear:
    return nn.Linear(6, 6)


class Siamese(nn.Module):
    """Two inputs through one encoder. Some losses see both branches, one the left, one the right."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    def losses(self, pair: Tensor) -> list[Tensor]:
        left, right = (self.body(x) for x in pair.split([3, len(pair) - 3]))
        n = min(len(left), len(right))
        return [
            (left[:n] * right[:n]).sum(),
            left.square().sum(),
            right.sin().sum(),
            (left[:n] - 2 * right[:n]).abs().sum(),
        ]


SIAMESE = body("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 3, 6)])
def test_siamese_networks(shape: tuple[int, ...]) -> None:
    compare(Siamese(), at(torch.randn(shape)), SIAMESE)


def test_a_layer_that_is_called_again_on_its_outputs() -> None:
    model = net(lambda m, x: m.a(m.a(m.b(x).tanh()).tanh()), a=square(), b=nn.Linear(8, 6))
    compare(model, at(torch.randn(4, 8)), A + B + heads(model))


@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_networks(bias: bool) -> None:
    def unrolled(m: nn.Module, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 6, dtype=x.dtype)
        for step in x.unbind(1):
            state = torch.tanh(m.a(step) + m.b(state))
        return state

    model = net(unrolled, a=nn.Linear(8, 6, bias=bias), b=nn.Linear(6, 6, bias=bias))
    names = [name for name in A + B if bias or not name.endswith("bias")]
    compare(model, at(torch.randn(4, 5, 8)), names + heads(model))
    compare(model, at(torch.randn(4, 5, 8)), names, batched=True, params=list(model.body.parameters()))


def test_a_weight_that_is_not_transposed_used_twice() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w).tanh() @ self.w

    model = Net(Times(), 6)
    compare(model, at(torch.randn(4, 6)), body("w") + heads(model))


def test_one_call_without_the_bias() -> None:
    model = net(lambda m, x: m.a(x) + nn.functional.linear(x.tanh(), m.a.weight), a=square())
    compare(model, at(torch.randn(4, 6)), body("a.weight") + heads(model))


def test_a_bias_that_is_used_elsewhere_too() -> None:
    model = net(lambda m, x: m.a(m.a(x).tanh()) * m.a.bias, a=square())
    compare(model, at(torch.randn(4, 6)), body("a.weight") + heads(model))
    model = net(lambda m, x: m.b(m.a(m.a(x).tanh())), a=square(), b=square())
    model.body.b.bias = model.body.a.bias
    compare(model, at(torch.randn(4, 6)), body("a.weight", "b.weight") + heads(model))


def test_calls_with_different_numbers_of_samples() -> None:
    model = net(lambda m, x: m.a(x) + m.a(x[:1].tanh()) + m.a(x[:, :2].flatten()[:6]), a=square())
    compare(model, at(torch.randn(4, 6)), A + heads(model))


def test_one_call_whose_output_is_changed_in_place() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 1:3] *= 2.0
        return m.a(y.relu_())

    model = net(forward, a=square())
    compare(model, at(torch.randn(4, 6)), A + heads(model))


def test_the_same_call_given_to_several_losses() -> None:
    model = net(lambda m, x: m.a(x) + m.a(x), a=square())
    compare(model, at(torch.randn(4, 6)), A + heads(model))


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize(
    "kwargs", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"padding_idx": 0, "scale_grad_by_freq": True}]
)
def test_ghosts_equal_rows_where_fields_share_a_table(kwargs: dict) -> None:
    model = net(lambda m, x: m.a(x[:, 0]) + m.a(x[:, 1]) * m.a(x[:, 1]).tanh(), a=nn.Embedding(11, 6, **kwargs))
    index = torch.tensor([[2, 2], [0, 7], [2, 0], [10, 0], [2, 9]])
    compare(model, at(index), body("a.weight") + heads(model))
    compare(model, at(index), body("a.weight"), batched=True, params=list(model.body.parameters()))


def test_lookups_of_which_one_multiplies_by_frequency() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        plain = nn.functional.embedding(x, m.a.weight, padding_idx=1)
        return plain + nn.functional.embedding(x.flip(0), m.a.weight, scale_grad_by_freq=True)

    model = net(forward, a=nn.Embedding(11, 6))
    compare(model, at(torch.tensor([1, 2, 2, 10, 1])), body("a.weight") + heads(model))


def test_losses_that_reach_some_of_the_lookups() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def losses(self, index: Tensor) -> list[Tensor]:
            first, second = self.table(index[0]), self.table(index[1])
            return [self.head(first).sum(), self.head(second).square().sum(), (first * second[:3]).sum()]

    compare(Words(), at(torch.randint(9, (2, 3))), ["table.weight", "head.weight", "head.bias"])


# ------------------------------------------------------------------------------------------------ what goes direct


def test_a_weight_and_its_transpose_are_direct() -> None:
    model = net(lambda m, x: nn.functional.linear(m.a(x).tanh(), m.a.weight.t()), a=square())
    compare(model, at(torch.randn(4, 6)), heads(model))


def test_a_table_tied_to_an_output_layer_is_direct() -> None:
    model = Net(Tied(), 9)
    compare(model, at(torch.randint(9, (4,))), body("middle.weight", "middle.bias") + heads(model))


def test_a_weight_with_one_unknown_use_is_direct() -> None:
    model = net(lambda m, x: m.a(m.a(x).tanh()) + m.a.weight.sum(0), a=square())
    compare(model, at(torch.randn(4, 6)), heads(model))


def test_calls_in_different_precisions_are_direct() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            half = m.a(x).to(x.dtype)
        return half + m.a(x.tanh())

    model = net(forward, a=square())
    compare(model, at(torch.randn(4, 6)), heads(model), error=2e-2)


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("when", ["register_hook", "register_prehook"])
def test_a_hook_at_one_call_makes_the_weight_direct(call: int, when: str) -> None:
    model = net(lambda m, x: x, a=square(), b=square())
    body_ = model.body
    calls = [body_.a(torch.randn(4, 6))]
    calls.append(body_.a(calls[0].tanh()))
    getattr(calls[call].grad_fn, when)(lambda *grads: tuple(None if g is None else 2 * g for g in grads[0]))
    values = [head(body_.b(calls[1])).square().sum() for head in model.heads]
    compare_hooked(model, values, B + heads(model))


def test_a_hook_on_the_output_of_one_call_is_obeyed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y.register_hook(lambda g: 3 * g)
        return m.a(y.tanh())

    model = net(forward, a=square())
    compare_hooked(model, model.losses(torch.randn(4, 6)), A + heads(model))


def test_inputs_of_one_call_that_were_changed_in_place_are_an_error() -> None:
    model, x = net(lambda m, x: m.a(x) + m.a(x.tanh()), a=square()), torch.randn(4, 6)
    values = model.losses(x)
    plan = ghost.plan(values, list(model.body.parameters()), force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    x.add_(1)
    for use in (found.gram, lambda: found.combine([1.0] * 3)):
        with pytest.raises(RuntimeError, match="in place"):
            use()


# ------------------------------------------------------------------------------------------------ what it costs


def wide(tasks: int = 4, batch: int = 16) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """A siamese encoder 256 wide, and losses that compare its two outputs."""
    encoder = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.Tanh())))
    x = torch.randn(2, batch, 256)

    def losses() -> list[Tensor]:
        a, b = encoder(x[0]), encoder(x[1])
        return [(a - (i + 1) * b).square().mean() for i in range(tasks)]

    return encoder, losses


def test_grouping_pays_by_the_number_of_all_samples() -> None:
    for batch, pays in ((16, True), (1024, False)):
        encoder, losses = wide(batch=batch)
        plan = ghost.plan(losses(), list(encoder.parameters()))
        assert (plan is not None) == pays


def test_memory_is_predicted_from_all_calls() -> None:
    encoder = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    x = torch.randn(2, 64, 256)
    base = torch.optim.SGD(encoder.parameters(), lr=0.0)

    def losses() -> list[Tensor]:
        left, right = encoder(x[0]), encoder(x[1])
        return [(left - (i + 1) * right).square().mean() for i in range(6)]

    found = {cost.engine: cost for cost in gradsurgery.estimate(encoder, losses()).engines}
    given = losses()
    plain = peak_bytes(lambda: torch.autograd.backward(given), x.device)
    base.zero_grad()
    optimizer = gradsurgery.MGDA(base, engine="ghosts")
    given = losses()
    measured = (peak_bytes(lambda: optimizer.backward(given), x.device) - plain) / 1e6
    assert optimizer.report is not None
    assert optimizer.report.engine == "ghosts"
    size = sum(p.numel() for p in encoder.parameters()) * 4 / 1e6
    assert found["ghosts"].megabytes == pytest.approx(measured, rel=0.3, abs=2.5 * size)


def test_a_step_is_that_of_rows() -> None:
    encoder, losses = wide()
    gradients = {}
    for engine in ("rows", "auto"):
        optimizer = gradsurgery.UPGrad(torch.optim.SGD(encoder.parameters(), lr=0.1), engine=engine)
        report = optimizer.backward(losses())
        assert report.engine == ("rows" if engine == "rows" else "ghosts")
        gradients[engine] = torch.cat([p.grad.flatten() for p in encoder.parameters()])
        optimizer.zero_grad()
    off = gradients["auto"] - gradients["rows"]
    assert off.norm() < 1e-5 * gradients["rows"].norm()


def test_products_agree_with_those_of_rows_for_long_unrolled_loops() -> None:
    model = net(lambda m, x: m.b(x), a=square(), b=square())
    x = torch.randn(3, 6)
    state = x
    for _ in range(30):
        state = torch.tanh(model.body.a(state)) + 0.1 * state
    values = [head(model.body.b(state)).square().sum() for head in model.heads]
    params = list(model.body.parameters())
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    assert len(plan.ghosts) == 4
    want = gram_of(rows_by_autograd(values, params))
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    norms = np.sqrt(want.diagonal())
    assert (np.abs(found.gram() - want) <= 1e-6 * np.outer(norms, norms)).all()


@pytest.mark.parametrize(("together", "engine"), [(True, "ghosts"), (False, "rows")])
def test_calls_that_one_loss_alone_reaches_are_no_work_for_the_others(together: bool, engine: str) -> None:
    """A small batch a loss: what it costs to form a row is one call, however many losses there are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(320, 320), nn.Tanh(), nn.Linear(320, 320))
    losses = [net(torch.randn(8, 320)).square().mean() for _ in range(60)]
    if together:
        losses = [sum(losses) * (k + 1) for k in range(60)]
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    assert optimizer.backward(losses).engine == engine
