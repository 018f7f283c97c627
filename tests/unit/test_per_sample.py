"""One loss per sample: inner products of all gradients from one backward pass, and their weighted sum from a second."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery

M = 18
MODES = (True, "keep", "rerun")


class Fixed(gradsurgery.surgery.base.Surgery):
    """Weights that differ, and do not depend on the gradients."""

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.linspace(0.5, 1.5, len(gram))


class Tokens(nn.Module):
    """Class token, positions, attention."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.positions
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1)
        h = self.encoder(h if self.batch_first else h.transpose(0, 1))
        return self.head(h[:, 0] if self.batch_first else h[0])


class Last(nn.Module):
    """The last state of a recurrent network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)[0]
        return out[:, -1]


class Unrolled(nn.Module):
    """A cell that is called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class Tied(nn.Module):
    """A table that is the output layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.inner(self.table(x))) @ self.table.weight.t()).flatten(1)


class Twice(nn.Module):
    """One layer in two places, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x)) * self.scale - self.shift
        return torch.tanh(self.inner(h)) * self.temperature.exp() + x / self.scale


class Scaled(nn.Module):
    """Entries by a root mean square norm, a parametric ReLU and a slice of a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.RMSNorm(5), nn.PReLU(6)
        self.positions = nn.Parameter(torch.randn(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x) + self.positions[: x.shape[1]]).flatten(1)


class BothWays(nn.Module):
    """A weight that leads there and back, the latter transposed, where inner products follow from those of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight


class Made(nn.Module):
    """A weight that is used as it is, and in part, squared and multiplied by another as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.weight))
        penalty = self.weight.square().sum()
        return torch.cat([h, F.linear(x, self.weight[:4]), F.linear(x, self.other @ self.weight) * penalty], 1)


class Slope(nn.Module):
    """What it gives, and the gradient of that in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        out = self.net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.cat([out, slope], 1)


def numbers(*shape: int) -> Tensor:
    return torch.randn(M, *shape, dtype=torch.float64)


def words(*shape: int) -> Tensor:
    return torch.randint(0, 11, (M, *shape))


def normed(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), lambda: numbers(5)),
    "wide": (lambda: nn.Sequential(nn.Linear(5, M), nn.ReLU(), nn.Linear(M, M)), lambda: numbers(5)),
    "square tokens": (lambda: nn.Linear(5, 4), lambda: numbers(M, 5)),
    "tokens, few": (lambda: nn.Linear(40, 30), lambda: numbers(2, 40)),
    "tokens, many": (lambda: pooled(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), lambda: numbers(12, 3)),
    "convolution": (
        lambda: pooled(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2, bias=False)),
        lambda: numbers(3, 6, 6),
    ),
    "groups": (
        lambda: pooled(nn.Conv2d(4, 8, 3, 2, groups=2), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, groups=4)),
        lambda: numbers(4, 9, 9),
    ),
    "dilation": (lambda: pooled(nn.Conv2d(2, 3, 3, dilation=2), nn.AdaptiveAvgPool2d(2)), lambda: numbers(2, 9, 9)),
    "transposed": (
        lambda: pooled(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2)), lambda: numbers(4, 3, 3)
    ),
    "one dimension": (lambda: pooled(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 2, 2)), lambda: numbers(3, 7)),
    "three dimensions": (lambda: pooled(nn.Conv3d(2, 3, 2)), lambda: numbers(2, 3, 4, 3)),
    "norms": (
        lambda: pooled(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.LayerNorm((4, 3, 3)), nn.BatchNorm2d(4).eval()),
        lambda: numbers(2, 3, 3),
    ),
    "lowest batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), lambda: numbers(5)),
    "layer norm of tokens": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), lambda: numbers(4, 5)),
    "embedding": (lambda: pooled(nn.Embedding(11, 4), nn.Linear(4, 3)), lambda: words(6)),
    "embedding of few": (lambda: pooled(nn.Embedding(400, 9), nn.Linear(9, 3)), lambda: words(6)),
    "sparse": (lambda: pooled(nn.Embedding(11, 4, sparse=True, padding_idx=2), nn.Linear(4, 3)), lambda: words(6)),
    "by frequency": (lambda: pooled(nn.Embedding(11, 4, scale_grad_by_freq=True)), lambda: words(3)),
    "attention": (Tokens, lambda: words(6)),
    "attention, time first": (lambda: Tokens(batch_first=False), lambda: words(6)),
    "recurrent": (lambda: Last(nn.RNN(5, 6, batch_first=True)), lambda: numbers(4, 5)),
    "gated": (lambda: Last(nn.GRU(5, 6, num_layers=2, batch_first=True)), lambda: numbers(4, 5)),
    "fused": (lambda: Last(nn.LSTM(5, 6, batch_first=True)), lambda: numbers(4, 5)),
    "unrolled": (Unrolled, lambda: numbers(4, 5)),
    "tied": (Tied, lambda: words(3)),
    "twice": (Twice, lambda: numbers(5)),
    "both ways": (BothWays, lambda: numbers(2, 40)),
    "made of itself": (Made, lambda: numbers(5)),
    "slope": (Slope, lambda: numbers(5)),
    "scaled": (Scaled, lambda: numbers(6, 5)),
    "weight norm": (lambda: pooled(normed(nn.Linear(5, 6)), nn.Tanh(), normed(nn.Linear(6, 3))), lambda: numbers(5)),
    "bilinear": (lambda: Self(nn.Bilinear(5, 5, 3)), lambda: numbers(5)),
    "instance norm": (lambda: pooled(nn.Conv1d(3, 4, 2), nn.InstanceNorm1d(4, affine=True)), lambda: numbers(3, 7)),
}  # fmt: skip


class Self(nn.Module):
    """A layer of two inputs that are the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x, x)
        return out


def squares(out: Tensor) -> Tensor:
    return (out.flatten(1) - 0.3).square().mean(1)


def model_of(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, inputs = CASES[case]
    net = build().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(), module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net, inputs()


def jacobian(losses: Tensor, params: list[Tensor]) -> Tensor:
    rows = []
    for loss in losses:
        row = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        rows.append(flat([p.new_zeros(p.shape) if g is None else g for g, p in zip(row, params, strict=True)]))
    return torch.stack(rows)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in tensors])


def written(params: list[Tensor]) -> Tensor:
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])


def close(a: Tensor, b: Tensor, within: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= within * b.abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_products_and_direction_are_those_of_separate_passes(case: str, mode: Any) -> None:
    net, x = model_of(case)
    params = list(net.parameters())
    rows = jacobian(squares(net(x)), params)
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    for _ in range(2):  # checked, and not
        method.zero_grad()
        report = method.backward(squares(net(x)), per_sample=mode)
        assert report.engine == "per sample"
        assert report.gram is not None
        assert close(report.gram, rows @ rows.T)
        assert report.weights is not None
        assert close(written(params), rows.T @ torch.tensor(list(report.weights.values()), dtype=torch.float64))
        method.transaction.update()  # as if a step had been made, without moving the parameters
        method.transaction.commit()


# ------------------------------------------------------------------------------------------------ couplings


class Coupled(nn.Module):
    """A linear layer, something that brings samples together, and another layer."""

    def __init__(self, mixes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(5, 6), nn.Linear(6, 3)
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.mixes(torch.tanh(self.below(x))))


def over_the_batch(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[None, None], h[None, None], h[None, None])[0, 0]


def contrastive(out: Tensor) -> Tensor:
    return F.cross_entropy(out @ out.T, torch.arange(M), reduction="none")


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "batch norm": (nn.BatchNorm1d(6).double(), "NativeBatchNormBackward0"),
    "a mean": (lambda h: h + 1e-4 * h.mean(0), ""),
    "a standard deviation": (lambda h: h / h.std(), ""),
    "a softmax": (lambda h: h.softmax(0), "SoftmaxBackward0"),
    "a sum so far": (lambda h: h.cumsum(0), ""),
    "attention": (over_the_batch, ""),
    "the order": (lambda h: h.roll(1, 0) + h, "RollBackward0"),
    "a sorted batch": (lambda h: h.sort(0)[0], "SortBackward0"),
    "a norm of all": (lambda h: h / h.norm(), ""),
}
COUPLED_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "contrastive": contrastive,
    "centred": lambda out: squares(out) - squares(out).mean(),
    "whitened": lambda out: squares(out) / squares(out).std(),
}


def refused(net: nn.Module, losses: Callable[[], Tensor]) -> str:
    """What the error says; nothing may have been written."""
    params = list(net.parameters())
    for p in params:
        p.grad = torch.ones_like(p)
    method = gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match=r"DualProj\.backward: per_sample=True.*Nothing was written") as caught:
        method.backward(losses(), per_sample=True)
    assert all(bool((p.grad == 1).all()) for p in params if p.grad is not None)
    return str(caught.value)


@pytest.mark.parametrize("kind", MIXING)
def test_layers_that_bring_samples_together_are_refused_by_name(kind: str) -> None:
    torch.manual_seed(0)
    mixes, named = MIXING[kind]
    net, x = Coupled(mixes).double(), numbers(5)
    text = refused(net, lambda: squares(net(x)))
    assert named in text
    assert "brings samples together" in text


@pytest.mark.parametrize("kind", COUPLED_LOSSES)
def test_losses_that_depend_on_other_samples_are_refused(kind: str) -> None:
    net, x = model_of("linear")
    assert "brings samples together" in refused(net, lambda: COUPLED_LOSSES[kind](net(x)))


def test_a_batch_norm_is_told_what_to_do() -> None:
    torch.manual_seed(0)
    net, x = Coupled(nn.BatchNorm1d(6)).double(), numbers(5)
    assert "eval mode" in refused(net, lambda: squares(net(x)))


@pytest.mark.parametrize("kind", MIXING)
def test_without_being_asked_a_coupled_batch_takes_a_pass_per_loss(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Coupled(MIXING[kind][0]).double(), numbers(5)
    params = list(net.parameters())
    reports, found = [], []
    for engine in ("auto", "rows"):
        method = gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1), engine=engine)
        method.zero_grad()
        reports.append(method.backward(squares(net(x))))
        found.append(written(params))
    assert torch.equal(*found)
    assert reports[0].engine == "rows"
    assert reports[0].reason is not None
    assert "brings samples together" in reports[0].reason
    assert MIXING[kind][1] in reports[0].reason


def test_a_detached_statistic_couples_nothing() -> None:
    torch.manual_seed(0)
    net, x = Coupled(lambda h: h - h.mean(0).detach()).double(), numbers(5)
    params = list(net.parameters())
    rows = jacobian(squares(net(x)), params)
    report = Fixed(torch.optim.SGD(params, lr=0.1)).backward(squares(net(x)), per_sample=True)
    assert report.gram is not None
    assert close(report.gram, rows @ rows.T)


class Gate(nn.Module):
    """Adds a multiple of the mean over the batch, from 0 on: the same graph couples or not."""

    def __init__(self) -> None:
        super().__init__()
        self.by = torch.zeros((), dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.by * h.mean(0)


@pytest.mark.parametrize("mode", [True, "rerun"])
def test_each_step_that_holds_nothing_compares_the_length_of_the_direction(mode: Any) -> None:
    torch.manual_seed(0)
    gate = Gate()
    net, x = Coupled(gate).double(), numbers(5)
    params = list(net.parameters())
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    for _ in range(2):
        method.zero_grad()
        assert method.backward(squares(net(x)), per_sample=mode).engine == "per sample"
        method.step()
    gate.by.fill_(0.3)
    before = written(params)
    with pytest.raises(RuntimeError, match="Nothing was written"):
        method.backward(squares(net(x)), per_sample=mode)
    assert torch.equal(written(params), before)


def test_what_is_kept_on_the_users_word_is_not_compared_between_checks() -> None:
    torch.manual_seed(0)
    gate = Gate()
    net, x = Coupled(gate).double(), numbers(5)
    params = list(net.parameters())
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    method.backward(squares(net(x)), per_sample="keep")
    method.step()
    gate.by.fill_(0.3)
    assert method.backward(squares(net(x)), per_sample="keep").engine == "per sample"
    method.transaction.committed["step"] = 100
    method.transaction.discard()
    with pytest.raises(RuntimeError, match="brings samples together"):
        method.backward(squares(net(x)), per_sample="keep")


# ---------------------------------------------------------------------------------------- no false refusals


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e25])
def test_losses_of_any_scale_pass(scale: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    params = list(net.parameters())
    x = torch.randn(M, 5)
    rows = jacobian(squares(net(x)), params).double() * scale
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    report = method.backward(squares(net(x)) * scale, per_sample=True)
    assert report.gram is not None
    assert close(report.gram, rows @ rows.T, 1e-4 if scale > 1e-35 else 0.1)


def test_coupling_shows_at_any_scale() -> None:
    torch.manual_seed(0)
    net, x = Coupled(nn.BatchNorm1d(6)), torch.randn(M, 5)
    text = refused(net, lambda: squares(net(x)) * 1e-37)
    assert "NativeBatchNormBackward0" in text


@pytest.mark.parametrize("mode", [True, "keep", "rerun"])
def test_a_coupled_pair_shows_even_if_the_check_multiplies_both_by_the_same(mode: Any) -> None:
    for other in range(1, M):  # the check alone passes one in sixteen
        torch.manual_seed(0)
        net, x = Coupled(lambda h, k=other: torch.cat([h[:1] + h[k : k + 1], h[1:]])).double(), numbers(5)
        method = Fixed(torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(RuntimeError, match="brings samples together"):
            method.backward(squares(net(x)), per_sample=mode)


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_in_half_precision_is_no_coupling(autocast: bool) -> None:
    dtype = torch.bfloat16
    for seed in range(10):
        torch.manual_seed(seed)
        net, x = (
            nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
            torch.randn(1, 5) + 0.01 * torch.randn(M, 5),
        )
        if not autocast:
            net, x = net.to(dtype), x.to(dtype)
        params = list(net.parameters())

        def losses(net: nn.Module = net, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=autocast):
                return squares(net(x))

        rows = jacobian(losses(), params).double()
        report = Fixed(torch.optim.SGD(params, lr=0.1)).backward(losses(), per_sample="rerun")
        assert report.gram is not None
        assert close(report.gram, rows @ rows.T, 2 * torch.finfo(dtype).eps)


def test_samples_that_are_fitted_are_no_coupling() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(M, 5)
    sizes = torch.logspace(-42, 0, M)
    sizes[3] = 0.0
    params = list(net.parameters())
    rows = jacobian(squares(net(x)), params).double() * sizes[:, None].double()
    report = Fixed(torch.optim.SGD(params, lr=0.1)).backward(squares(net(x)) * sizes, per_sample=True)
    assert report.norms is not None
    found = torch.tensor(list(report.norms.values()), dtype=torch.float64)
    held = sizes > 1e-30
    assert close(found[held].log(), rows.norm(dim=1)[held].log(), 1e-4)
    assert found[3] == 0


def test_dropout_and_autocast_pass() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 3))
    params = list(net.parameters())
    x = torch.randn(M, 8)
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    torch.manual_seed(1)
    assert method.backward(squares(net(x)), per_sample=True).engine == "per sample"
    with torch.autocast("cpu", torch.bfloat16):
        losses = squares(net(x).float())
    rows = jacobian(losses, params).double()
    report = method.backward(losses, per_sample=True)
    assert report.gram is not None
    assert close(report.gram, rows @ rows.T, 0.02)


# --------------------------------------------------------------------------------- what it is given, and by whom


def test_from_sixteen_losses_on_nobody_has_to_ask() -> None:
    net, x = model_of("linear")
    params = list(net.parameters())
    method = gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1))
    losses = squares(net(x))
    assert method.backward(losses).engine == "per sample"
    assert method.backward(list(squares(net(x)))).engine == "per sample"
    assert method.backward(squares(net(x))[:15]).engine != "per sample"
    assert method.backward(list(squares(net(x)))[::-1]).engine != "per sample"


@pytest.mark.parametrize("groups", [2, 5, M])
@pytest.mark.parametrize("mode", MODES)
def test_means_over_groups_of_samples(groups: int, mode: Any) -> None:
    torch.manual_seed(0)
    net, x = model_of("convolution")
    params = list(net.parameters())
    ids = torch.cat([torch.arange(groups), torch.randint(0, groups, (M - groups,))])[torch.randperm(M)]

    def losses() -> dict[str, Tensor | None]:
        return gradsurgery.losses_by_group(squares(net(x)), ids, groups)

    rows = jacobian(torch.stack([v for v in losses().values() if v is not None]), params)
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    report = method.backward(losses(), per_sample=mode)
    assert report.engine == "per sample"
    assert report.gram is not None
    assert close(report.gram, rows @ rows.T)
    assert report.weights is not None
    assert close(written(params), rows.T @ torch.tensor(list(report.weights.values()), dtype=torch.float64))


def test_losses_that_are_not_per_sample_are_told_what_is_wanted() -> None:
    net, x = model_of("linear")
    out = net(x)
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match='reduction="none"'):
        method.backward({"a": out.sum(), "b": out.square().mean()}, per_sample=True)


class Experts(nn.Module):
    """A trunk, a head for all samples but one, and a head for that one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.many, self.one = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        return torch.cat([self.many(h[:-1]), self.one(h[-1:])])


@pytest.mark.parametrize("mode", MODES)
def test_a_head_of_one_sample_gets_its_plain_gradient(mode: Any) -> None:
    torch.manual_seed(0)
    net, x = Experts().double(), numbers(5)
    params = list(net.parameters())
    shared, own = [*net.trunk.parameters(), *net.many.parameters()], list(net.one.parameters())
    rows, plain = jacobian(squares(net(x)), shared), torch.autograd.grad(squares(net(x)).sum(), own)
    method = Fixed(torch.optim.SGD(params, lr=0.1))
    report = method.backward(squares(net(x)), per_sample=mode)
    assert report.gram is not None
    assert report.weights is not None
    assert close(report.gram, rows @ rows.T)
    assert close(written(own), flat(list(plain)))
    assert close(written(shared), rows.T @ torch.tensor(list(report.weights.values()), dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_shared_params_and_other_optimizers(mode: Any) -> None:
    net, x = model_of("linear")
    first, last = list(net[0].parameters()), list(net[2].parameters())  # type: ignore[index]
    rows, plain = jacobian(squares(net(x)), first), torch.autograd.grad(squares(net(x)).sum(), last)
    for others in (False, True):
        net.zero_grad()
        base = torch.optim.SGD(first if others else [*first, *last], lr=0.1)
        method = Fixed(base, shared_params=first)
        other = torch.optim.SGD(last, lr=0.1)
        report = method.backward(squares(net(x)), per_sample=mode, other_optimizers=[other] if others else ())
        assert report.gram is not None
        assert report.weights is not None
        assert close(report.gram, rows @ rows.T)
        assert close(written(last), flat(list(plain)))
        assert close(written(first), rows.T @ torch.tensor(list(report.weights.values()), dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_one_surgery_per_parameter(mode: Any) -> None:
    net, x = model_of("linear")
    params = list(net.parameters())
    found = []
    for options in ({"per_sample": mode}, {}):
        engine = "auto" if options else "rows"
        method = gradsurgery.MGDA(torch.optim.SGD(params, lr=0.1), granularity="parameter", engine=engine)
        method.zero_grad()
        method.backward(squares(net(x)), **options)
        found.append(written(params))
    assert close(*found, within=1e-6)


@pytest.mark.parametrize(
    "name", ["UPGrad", "DualProj", "MGDA", "CAGrad", "NashMTL", "Krum", "PCGrad", "IMTLG", "ConFIG"]
)
def test_methods_find_what_they_find_from_rows(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x, params = numbers(20), list(net.parameters())
    found = []
    for options, engine in (({"per_sample": True}, "auto"), ({}, "rows")):
        own = {"n_byzantine": 4} if name == "Krum" else {}
        method = getattr(gradsurgery, name)(torch.optim.SGD(params, lr=0.1), engine=engine, **own)
        method.zero_grad()
        method.backward(squares(net(x)), **options)
        found.append(written(params))
    assert close(*found, within=1e-6)


def test_methods_that_look_at_gradients_say_so() -> None:
    net, x = model_of("linear")
    method = gradsurgery.TrimmedMean(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"TrimmedMean\.backward: `per_sample`.*looks at the gradients themselves"):
        method.backward(squares(net(x)), per_sample=True)
    assert method.backward(squares(net(x))).engine == "rows"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": True}, "per_sample=True excludes `accumulate`"),
        ({"accumulate": True, "per_sample": "keep"}, "per_sample='keep' excludes `accumulate`"),
        ({"per_sample": "yes"}, 'must be True, False, "keep" or "rerun"'),
    ],
)
def test_calls_without_a_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    net, x = model_of("linear")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=said):
        method.backward(squares(net(x)), **{"per_sample": True, **options})


def test_weightings_and_named_engines_are_refused() -> None:
    net, x = model_of("linear")
    with pytest.raises(ValueError, match=r"Uncertainty.*for surgery methods"):
        gradsurgery.UncertaintyWeighter(torch.optim.SGD(net.parameters(), lr=0.1)).backward(
            squares(net(x)), per_sample=True
        )
    with pytest.raises(ValueError, match="engine='rows' was asked for"):
        gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1), engine="rows").backward(
            squares(net(x)), per_sample=True
        )


def test_checkpointing_is_refused_and_falls_back() -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        net, x = model_of("linear")
        x.requires_grad_()

        def losses(net: nn.Module = net, x: Tensor = x, reentrant: bool = reentrant) -> Tensor:
            return squares(checkpoint(net, x, use_reentrant=reentrant))

        method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(RuntimeError, match="checkpointing"):
            method.backward(losses(), per_sample=True)
        report = method.backward(losses())
        assert report.engine == "rows"


def test_a_scaler_gets_scaled_gradients_and_the_method_does_not() -> None:
    net, x = model_of("linear")
    net, x = net.float(), x.float()
    params = list(net.parameters())
    grams, found = [], []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        method = Fixed(torch.optim.SGD(params, lr=0.1))
        method.zero_grad()
        grams.append(method.backward(squares(net(x)), per_sample=True, scaler=scaler).gram)
        found.append(written(params) / scale)
    assert close(*grams, within=1e-5)
    assert close(*found, within=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_told_by_name(mode: Any) -> None:
    net, x = model_of("linear")
    x[4] = torch.nan
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="the value of '4' is not finite"):
        method.backward(squares(net(x)), per_sample=mode)
    x[4] = 0.0
    weights = torch.ones(M, dtype=torch.float64)
    weights[4] = torch.inf

    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: Tensor) -> Tensor:
            return losses.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * weights

    with pytest.raises(RuntimeError, match="the gradient of '4' is not finite"):
        method.backward(Spoils.apply(squares(net(x))), per_sample=mode)


# ------------------------------------------------------------------------------------------- between the calls


def hooks_below(losses: Tensor) -> int:
    """Hooks at nodes of a graph."""
    nodes: dict[Any, None] = {losses.grad_fn: None}
    waiting = list(nodes)
    while waiting:
        below = [child for child, _ in waiting.pop().next_functions if child is not None and child not in nodes]
        nodes.update(dict.fromkeys(below))
        waiting += below
    count = 0
    for node in nodes:
        handle = node.register_prehook(lambda *_: None)
        count += len(handle.hooks_dict_ref()) - 1
        handle.remove()
    return count


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_alive_after_a_call_and_no_hook_is_left(mode: Any, fails: bool) -> None:
    net, x = model_of("norms")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    gc.collect()
    gc.disable()
    try:
        alive = {id(t) for t in gc.get_objects() if type(t) is Tensor}
        losses = squares(net(x))
        if fails:
            with pytest.raises(RuntimeError, match="not finite"):
                method.backward(losses * torch.tensor([*(M - 1) * [1.0], torch.nan]), per_sample=mode)
        else:
            method.backward(losses, per_sample=mode)
        assert hooks_below(losses) == 0
        del losses
        known = alive | {id(p.grad) for p in net.parameters()}
        left = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in known and t.dim() > 2]
        assert not left
    finally:
        gc.enable()


def test_hooks_are_removed_when_a_pass_fails() -> None:
    torch.manual_seed(0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ArithmeticError("broken")

    net, x = Coupled(Fails.apply).double(), numbers(5)
    losses = squares(net(x))
    method = Fixed(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ArithmeticError, match="broken"):
        method.backward(losses, per_sample=True)
    assert hooks_below(losses) == 0


def test_the_graph_is_freed_and_kept_when_asked_for() -> None:
    net, x = model_of("linear")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = squares(net(x))
    method.backward(losses, per_sample=True, retain_graph=True)
    first = written(list(net.parameters()))
    method.zero_grad()
    method.backward(losses, per_sample=True, retain_graph=True)
    assert close(written(list(net.parameters())), first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("saved_at", [1, 99, 100, 101])
def test_a_resumed_run_goes_on_bit_for_bit(mode: Any, saved_at: int) -> None:
    def fresh() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
        return net, method

    def train(net: nn.Module, method: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(M, 5, generator=torch.Generator().manual_seed(step))
            method.zero_grad()
            method.backward(squares(net(x)), per_sample=mode)
            method.step()

    net, method = fresh()
    train(net, method, 0, saved_at)
    state = {k: v.clone() for k, v in net.state_dict().items()}, method.state_dict()
    state = copy.deepcopy(state)
    train(net, method, saved_at, 104)
    again, other = fresh()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(again, other, saved_at, 104)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert other.state_dict()["gradsurgery"]["memory"] == method.state_dict()["gradsurgery"]["memory"]


def test_a_parameter_with_a_hook_shows_each_row_to_it() -> None:
    net, x = model_of("linear")
    params = list(net.parameters())
    rows = jacobian(squares(net(x)), params[:1])
    seen: list[Tensor] = []
    handle = params[0].register_hook(lambda g: seen.append(g.clone()))
    report = Fixed(torch.optim.SGD(params, lr=0.1)).backward(squares(net(x)), per_sample="keep")
    handle.remove()
    assert report.engine == "per sample"
    assert close(torch.stack(seen).flatten(1), rows)


def test_weak_references_to_the_losses_die_with_them() -> None:
    net, x = model_of("linear")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = squares(net(x))
    method.backward(losses, per_sample=True)
    dead = weakref.ref(losses)
    gc.collect()
    del losses
    assert dead() is None


# ------------------------------------------------------------------------------------- what is refused by name


def test_float16_is_refused() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(5, 3).half(), torch.randn(M, 5).half()
    with pytest.raises(RuntimeError, match="AddmmBackward0 is in float16"):
        gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1)).backward(
            squares(net(x).float()), per_sample=True
        )


def test_complex_parameters_are_refused() -> None:
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128)), numbers(5).to(torch.complex128)
    method = gradsurgery.DualProj(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(RuntimeError, match="complex parameters"):
        method.backward((x @ weight).abs().square().mean(1), per_sample=True)
    assert method.backward((x @ weight).abs().square().mean(1)).engine == "rows"


def test_losses_over_several_processes_are_refused() -> None:
    from gradsurgery.batch import samples_of

    net, x = model_of("linear")
    found = samples_of(squares(net(x)).unbind(), automatic=False, is_alone=False)
    assert isinstance(found, str)
    assert "several processes" in found


def test_a_dropped_loss_takes_a_pass_per_loss() -> None:
    net, x = model_of("linear")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1), nonfinite="drop")
    losses = torch.where(torch.arange(M) == 4, torch.nan, squares(net(x)))
    report = method.backward(losses, per_sample=True)
    assert report.engine == "rows"
    assert report.reason is not None
    assert "dropped" in report.reason
    assert len(report.names) == M - 1


def test_steps_that_reuse_weights_take_one_pass() -> None:
    net, x = model_of("linear")
    method = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1), every=2, warmup=1)
    engines = []
    for _ in range(4):
        method.zero_grad()
        engines.append(method.backward(squares(net(x)), per_sample=True).engine)
        method.step()
    assert engines == ["one pass", "per sample", "one pass", "per sample"]


def test_the_last_micro_batch_has_no_samples_of_its_own() -> None:
    net, x = model_of("linear")
    params = list(net.parameters())
    written_by = []
    for engine in ("auto", "rows"):
        method = gradsurgery.DualProj(torch.optim.SGD(params, lr=0.1), engine=engine)
        method.zero_grad()
        method.backward(squares(net(x)), accumulate=True)
        if engine == "auto":
            with pytest.raises(RuntimeError, match="per_sample=True: gradients of earlier micro-batches wait"):
                method.backward(squares(net(x.flip(0))), per_sample=True)
        report = method.backward(squares(net(x.flip(0))))
        assert report.engine == "rows"
        written_by.append(written(params))
    assert close(*written_by)


# -------------------------------------------------------------------------------------------------- by-products


@pytest.mark.parametrize("case", ["linear", "tokens, many", "groups", "attention", "tied", "weight norm", "fused"])
def test_lengths_and_products_for_analysis(case: str) -> None:
    net, x = model_of(case)
    params = list(net.parameters())
    losses = squares(net(x))
    rows = jacobian(losses, params)
    for given in (net, params, torch.optim.SGD(params, lr=0.1)):
        assert close(gradsurgery.sample_gram(losses, given), rows @ rows.T)
    assert close(gradsurgery.sample_norms(losses, net), rows.norm(dim=1))
    assert all(p.grad is None for p in params)


def test_lengths_of_coupled_samples_are_refused() -> None:
    torch.manual_seed(0)
    net, x = Coupled(nn.BatchNorm1d(6)).double(), numbers(5)
    with pytest.raises(RuntimeError, match="sample_norms: NativeBatchNormBackward0 brings samples together"):
        gradsurgery.sample_norms(squares(net(x)), net)
    with pytest.raises(ValueError, match=r"sample_gram: `losses` must be a 1-d tensor with a graph.*got \(\)"):
        gradsurgery.sample_gram(squares(net(x)).sum(), net)
    with pytest.raises(ValueError, match="must have a parameter"):
        gradsurgery.sample_gram(squares(net(x)), [])


def test_a_hook_on_the_way_sees_each_row_where_nobody_has_asked_for_samples() -> None:
    net, x = model_of("linear")
    seen: list[Tensor] = []
    hidden = torch.tanh(net[0](x))  # type: ignore[index]
    hidden.register_hook(lambda g: seen.append(g.clone()))
    report = gradsurgery.DualProj(torch.optim.SGD(net.parameters(), lr=0.1)).backward(squares(net[2](hidden)))  # type: ignore[index]
    assert report.engine == "rows"
    assert report.reason is not None
    assert "hooks look at gradients on the way" in report.reason
    assert len(seen) == M


@pytest.mark.parametrize("mode", MODES)
def test_hooks_that_bring_samples_together_in_a_later_step_are_noticed(mode: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer, x = Fixed(torch.optim.SGD(net.parameters(), lr=0.01)), torch.randn(M, 4)

    def losses(mixes: bool) -> Tensor:
        hidden = net[:2](x)
        hidden.register_hook(lambda g: g - g.mean(0) if mixes else 2 * g)
        return squares(net[2](hidden))

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(losses(False), per_sample=mode)
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="Nothing was written"):
        optimizer.backward(losses(True), per_sample=mode)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("part", [1e-3, 1e-5])
@pytest.mark.parametrize("mode", MODES)
def test_groups_that_share_samples_by_a_small_part_are_refused(mode: Any, part: float) -> None:
    net, x = nn.Linear(4, 3), torch.randn(M, 4)
    optimizer = Fixed(torch.optim.SGD(net.parameters(), lr=0.01))
    vector = squares(net(x))
    with pytest.raises(RuntimeError, match="per_sample"):
        optimizer.backward([vector[:9].mean() + part * vector.sum(), vector[9:].sum()], per_sample=mode)
    vector = squares(net(x))
    with pytest.raises(RuntimeError, match="per_sample"):  # the second passes cancel in a sum
        optimizer.backward([vector[:9].mean() + vector[9], vector[10:].sum() - vector[9]], per_sample=mode)


def test_analysis_of_sparse_rows() -> None:
    table = nn.EmbeddingBag(9, 4, mode="sum", sparse=True, dtype=torch.float64)
    x = torch.randint(0, 9, (M, 6))
    losses = squares(table(x).tanh())
    rows = torch.stack([torch.autograd.grad(one, table.weight, retain_graph=True)[0].to_dense() for one in losses])
    rows = rows.reshape(M, -1)
    found = gradsurgery.sample_gram(losses, table.parameters())
    torch.testing.assert_close(found, rows @ rows.T)
