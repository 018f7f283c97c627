"""Rows that are never formed: inner products and gradients against rows that autograd computes in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery.gradients import formed, ghost_graph, ghost_layers
from gradsurgery.gradients import ghosts as ghost
from gradsurgery.gradients.gram import Workspace
from gradsurgery.graph import reach

Losses = Callable[[nn.Module], list[Tensor]]
WEIGHTS = [0.7, -1.3, 2.1, 0.4]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_rows(model: nn.Module, losses: Losses, params: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Rows of the same model in float64, by the definition."""
    names = {p: name for name, p in model.named_parameters()}
    double = copy.deepcopy(model).double()
    same = dict(double.named_parameters())
    wanted = [same[names[p]] for p in params]
    with torch.autocast("cpu", enabled=False):
        values = losses(double)
    rows = [torch.autograd.grad(v, wanted, retain_graph=True, allow_unused=True) for v in values]
    return [[None if g is None else g.to_dense() for g in row] for row in rows]


def gram_of(rows: list[list[Tensor | None]]) -> np.ndarray:
    flat = [[None if g is None else g.detach().double().reshape(-1) for g in row] for row in rows]
    dots = [
        [sum(float(g @ h) for g, h in zip(a, b, strict=True) if g is not None and h is not None) for b in flat]
        for a in flat
    ]
    return np.array(dots)


def compare(
    model: nn.Module,
    losses: Losses,
    ghosts: Sequence[str] | None,
    *,
    error: float = 1e-6,
    slack: float = 10.0,
    batched: bool = False,
    rows: list[list[Tensor | None]] | None = None,
    params: Sequence[Tensor] | None = None,
) -> None:
    """Check inner products and combined gradients, and which parameters are ghosts (None: no plan at all)."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(named.values()) if params is None else list(params)
    names = {p: name for name, p in named.items()}
    values = losses(model)
    expected = exact_rows(model, losses, params) if rows is None else rows
    plan = ghost.plan(values, params, force=True)
    if ghosts is None:
        assert plan is None
        return
    assert plan is not None
    assert sorted(names[params[place]] for place in plan.ghosts) == sorted(ghosts)
    found = plan.differentiate(values, [torch.ones_like(v) for v in values], batched=batched)
    assert not batched or found.batched
    assert found.reached() == [
        sum(1 << i for i, row in enumerate(expected) if row[k] is not None) for k in range(len(params))
    ]
    gram, want = found.gram(), gram_of(expected)
    norms = np.sqrt(want.diagonal())
    assert np.abs(gram - want).max() <= error * norms.max() ** 2
    assert (np.abs(gram - want) <= error * np.outer(norms, norms)).all()
    assert (gram == gram.T).all()
    weights = WEIGHTS[: len(values)]
    for k, p in enumerate(params):
        for i, row in enumerate(expected):
            close(found.row(i, k), row[k], p, slack * error)
    for k, (p, g) in enumerate(zip(params, found.combine(weights), strict=True)):
        column = [row[k] for row in expected]
        terms = [w * h for w, h in zip(weights, column, strict=True) if h is not None]
        close(g, sum(terms) if terms else None, p, slack * error)


def close(found: Tensor | None, expected: Tensor | None, like: Tensor, error: float) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        dense = found.to_dense()
        assert (dense.shape, dense.dtype) == (like.shape, like.dtype)
        assert (dense.double() - expected).norm() <= error * expected.norm() + 1e-300


class Net(nn.Module):
    """A body, whose outputs go to m private heads."""

    def __init__(self, body: nn.Module, width: int, tasks: int = 3) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(tasks))

    def losses(self, *inputs: Tensor) -> list[Tensor]:
        z = self.body(*inputs)
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


def at(x: Tensor) -> Losses:
    def losses(model: nn.Module) -> list[Tensor]:
        like = next(model.parameters()).dtype
        return model.losses(x.to(like) if x.is_floating_point() else x)

    return losses


def heads(model: Net) -> list[str]:
    return [f"heads.{i}.{kind}" for i in range(len(model.heads)) for kind in ("weight", "bias")]


def body(*names: str) -> list[str]:
    return [f"body.{n}" for n in names]


TWO = body("0.weight", "0.bias", "2.weight", "2.bias")


def mlp() -> Net:
    return Net(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh()), 5)


class Tied(nn.Module):
    """A table that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.middle(self.table(index)).tanh() @ self.table.weight.T


class Changed(nn.Module):
    """Outputs of a layer that are changed in place, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, 1:3] *= 2.0
        y.view(-1)[::2].mul_(0.3)
        return self.last(y.clone())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attend = nn.Linear(8, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.attend(y, y, y, need_weights=False)[0]


class Lambda(nn.Module):
    """A module around some layers and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("shape", [(4, 8), (1, 8), (4, 3, 8), (2, 3, 4, 8), (8,)])
def test_layers_over_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = mlp()
    compare(model, at(torch.randn(shape)), TWO + heads(model))


def test_many_losses_over_many_samples_are_added_up_in_one_product(monkeypatch) -> None:
    """There are more losses than outputs: one product per sample would hold more numbers than all gradients."""
    torch.manual_seed(0)
    samples, m = 24, 30
    layer, x = nn.Linear(6, 5), torch.randn(samples, 6)
    y = layer(x)
    edge = torch.autograd.graph.GradientEdge(y.grad_fn, 0)
    linear = ghost_layers.Linear((edge,), (layer.weight, layer.bias), (0, 1), (x,), (0,), True)
    rows = list(torch.randn(m, samples, 5))
    sizes = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(a.shape[0] * a.shape[1] * b.shape[2]) or bmm(a, b))
    found, _ = linear.products(rows, torch.float64, Workspace())
    formed = torch.stack([torch.cat([g.reshape(-1) for g in linear.combine([row.double()], [1.0])]) for row in rows])
    torch.testing.assert_close(found, (formed.double() @ formed.double().T), rtol=1e-5, atol=1e-4)
    assert max(sizes, default=0) <= m * samples * 5


def test_a_layer_without_bias() -> None:
    model = Net(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("0.weight", "2.weight", "2.bias") + heads(model))
    compare(model, at(torch.randn(4, 3, 8)), body("0.weight", "2.weight", "2.bias") + heads(model))


def test_a_layer_whose_bias_is_added_afterwards() -> None:
    model = Net(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), 5)
    x = torch.randn(8, 4, 3).permute(2, 1, 0)
    compare(model, at(x), body("0.weight", "2.weight", "2.bias") + heads(model))


def test_a_weight_that_is_not_transposed() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w) @ self.v.t()

    model = Net(Times(), 5)
    compare(model, at(torch.randn(4, 8)), body("w", "v") + heads(model))


def test_addmm_with_factors_is_left_alone() -> None:
    model = Net(Lambda(lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.t(), beta=0.5), a=nn.Linear(8, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("a.weight") + heads(model))
    model = Net(Lambda(lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.t(), alpha=0.5), a=nn.Linear(8, 5)), 5)
    compare(model, at(torch.randn(4, 8)), heads(model))


def test_layers_without_outputs_are_left_alone() -> None:
    """Adaptive softmax has some where the last clusters get no width."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(0, 8)), nn.Parameter(torch.ones(5, 0))
            self.table = nn.Parameter(torch.ones(3, 0))

        def forward(self, x: Tensor) -> Tensor:
            looked_up = nn.functional.embedding(torch.tensor([0, 2, 2, 1]), self.table)
            return nn.functional.linear(nn.functional.linear(x, self.w) + looked_up, self.v) + x[:, :5]

    model = Net(Narrow(), 5)
    compare(model, at(torch.randn(4, 8)), heads(model))


def test_one_module_called_with_other_parameters() -> None:
    def both(m: nn.Module, x: Tensor) -> Tensor:
        other = {name: p.tanh() for name, p in m.a.named_parameters()}
        return m.a(x) + torch.func.functional_call(m.a, other, (x,)) + m.b(x)

    model = Net(Lambda(both, a=nn.Linear(8, 5), b=nn.Linear(8, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("b.weight", "b.bias") + heads(model))

    def same(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x) + torch.func.functional_call(m.a, dict(m.a.named_parameters()), (x.tanh(),))

    model = Net(Lambda(same, a=nn.Linear(8, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("a.weight", "a.bias") + heads(model))


def test_tied_weights() -> None:
    model = Net(Tied(), 9)
    compare(model, at(torch.randint(9, (4,))), body("middle.weight", "middle.bias") + heads(model))


def test_two_layers_with_one_bias() -> None:
    model = Net(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 5)), 5)
    model.body[2].bias = model.body[0].bias
    compare(model, at(torch.randn(4, 8)), body("0.weight", "2.weight") + heads(model))


def test_activations_in_place() -> None:
    model = Net(nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True)), 5)
    compare(model, at(torch.randn(4, 8)), TWO + heads(model))


def test_a_view_changed_in_place() -> None:
    model = Net(Changed(), 5)
    names = body("first.weight", "first.bias", "last.weight", "last.bias")
    compare(model, at(torch.randn(4, 8)), names + heads(model))


def test_two_layers_that_are_given_the_same_gradient() -> None:
    model = Net(Lambda(lambda m, x: m.a(x) + m.b(x.tanh()), a=nn.Linear(8, 5), b=nn.Linear(8, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("a.weight", "a.bias", "b.weight", "b.bias") + heads(model))


def test_attention() -> None:
    model = Net(Attention(), 4)
    names = ("first.weight", "first.bias", "attend.in_proj_weight", "attend.out_proj.weight", "attend.out_proj.bias")
    compare(model, at(torch.randn(2, 3, 8)), body(*names) + heads(model)[::2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": (2, 0), "dilation": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": "same"},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "circular"},
        {"bias": False},
    ],
)
def test_convolutions(options: dict) -> None:
    first = nn.Conv2d(2, 3, **{"kernel_size": (3, 2), **options})
    model = Net(nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.AdaptiveAvgPool1d(2)), 2)
    names = body("0.weight", *(["0.bias"] if options.get("bias", True) else []), "2.weight", "2.bias")
    compare(model, at(torch.randn(6, 2, 5, 6)), names + heads(model), error=2e-5)


def test_convolutions_and_batch_norm_in_other_memory_formats() -> None:
    first = nn.Conv2d(2, 3, 3, bias=False)  # BatchNorm would take its bias out again
    model = Net(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)), 5)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(6, 2, 4, 4).to(memory_format=torch.channels_last)
    compare(model, at(x), body("0.weight", "4.weight", "4.bias") + heads(model), error=2e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ConvTranspose2d(2, 4, 3),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 4, 3)),
        nn.Sequential(nn.Unflatten(2, (1, 5)), nn.Conv3d(2, 4, 1)),
    ],
)
def test_other_convolutions_are_direct(layer: nn.Module) -> None:
    model = Net(nn.Sequential(layer, nn.Flatten(1), nn.Tanh(), nn.LazyLinear(5)), 5)
    x = torch.randn(6, 2, 5, 5)
    model.losses(x)
    compare(model, at(x), body("3.weight", "3.bias") + heads(model), error=2e-5)


def test_a_convolution_that_is_called_twice_is_direct() -> None:
    model = Net(Lambda(lambda m, x: m.a(m.a(x).tanh()).mean((2, 3)), a=nn.Conv2d(2, 2, 3, padding=1)), 2)
    compare(model, at(torch.randn(6, 2, 4, 4)), heads(model), error=2e-5)


def test_images_that_were_changed_in_place_are_an_error() -> None:
    model, x = Net(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), 16), torch.randn(3, 2, 4, 4)
    values = model.losses(x)
    plan = ghost.plan(values, list(model.body.parameters()), force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    x.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        found.gram()


def test_convolutions_pay_where_there_are_few_places_and_many_channels() -> None:
    for channels, size, pays in ((256, 2, True), (32, 16, False)):
        trunk = nn.Conv2d(channels, channels, 3, padding=1)
        z = trunk(torch.randn(16, channels, size, size))
        losses = [(z * k).sin().sum() for k in range(1, 9)]
        plan = ghost.plan(losses, list(trunk.parameters()))
        assert (plan is not None) == pays
        assert plan is None or not plan.is_batched  # they go one by one


def test_checkpointed_layers_are_direct() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(checkpoint(m.b, m.a(x).tanh(), use_reentrant=False))

    model = Net(Lambda(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 5)), 5)
    compare(model, at(torch.randn(4, 8)), body("a.weight", "a.bias", "c.weight", "c.bias") + heads(model))


def test_saved_tensors_that_are_kept_elsewhere_are_not_read() -> None:
    model = mlp()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        losses = model.losses(torch.randn(4, 8))
    assert ghost.plan(losses, list(model.parameters()), force=True) is None


def test_autocast() -> None:
    model = mlp()

    def losses(m: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(m.parameters()).dtype == torch.float32):
            return [loss.to(next(m.parameters()).dtype) for loss in at(x)(m)]

    x = torch.randn(4, 8)
    compare(model, losses, TWO + heads(model), error=2e-2)
    # Against the same rounded activations the products are exact.
    params = list(model.body.parameters())
    values = losses(model)
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    seeds = [torch.ones_like(v) for v in values]
    found = plan.differentiate(values, seeds, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # has no influence
        gram = found.gram()
        formed = [[found.row(i, k) for k in range(len(params))] for i in range(len(values))]
    np.testing.assert_allclose(gram, gram_of(formed), rtol=1e-6, atol=1e-6 * gram.diagonal().max())
    assert all(g is not None and g.dtype == torch.float32 for row in formed for g in row)


def test_one_cast_that_serves_two_layers() -> None:
    model = Net(Lambda(lambda m, x: m.a(x) + m.a(x.tanh()), a=nn.Linear(8, 5)), 5)
    x = torch.randn(4, 8)

    def losses(m: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(m.parameters()).dtype == torch.float32):
            return [loss.to(next(m.parameters()).dtype) for loss in at(x)(m)]

    compare(model, losses, body("a.weight", "a.bias") + heads(model), error=2e-2)


def test_compiled_models_are_direct() -> None:
    model = mlp()
    compiled = torch.compile(model.body, backend="aot_eager")
    values = [(h(compiled(torch.ones(4, 8)))).sum() for h in model.heads]
    assert ghost.plan(values, list(model.body.parameters()), force=True) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = torch.randn(4, 8).to(dtype)
    compare(model, at(x), TWO + heads(model), error=1e-12 if dtype == torch.float64 else 3e-2)


def test_frozen_parameters_and_inputs() -> None:
    model = mlp()
    model.body[0].requires_grad_(False)
    x = torch.randn(4, 8)
    compare(model, at(x), body("2.weight", "2.bias") + heads(model))
    compare(model, lambda m: at(x.clone().requires_grad_())(m), body("2.weight", "2.bias") + heads(model))
    model = mlp()
    model.body[0].weight.requires_grad_(False)
    compare(model, at(x), body("2.weight", "2.bias") + heads(model))
    model = mlp()
    model.body[0].bias.requires_grad_(False)
    compare(model, at(x), body("0.weight", "2.weight", "2.bias") + heads(model))


def test_losses_that_reach_different_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.trunk = nn.Embedding(30, 8), nn.Linear(8, 6)
            self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

        def losses(self, index: Tensor) -> list[Tensor]:
            z = self.trunk(self.table(index)).tanh()
            left, right = self.left(z).square().mean(), self.right(z).square().mean()
            return [left, right, left + self.trunk.weight.sum() * 0.0 + 2 * right, self.table(index).sum()]

    model = Branches()
    names = ["left.weight", "left.bias", "right.weight", "right.bias"]
    # The weight of the trunk is used outside its layer, and its bias goes where the weight goes.
    compare(model, at(torch.randint(30, (5,))), ["table.weight", *names])


def test_a_loss_that_is_the_output_of_a_layer_or_a_parameter() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 1)
            self.scale = nn.Parameter(torch.tensor(0.3))

        def losses(self, x: Tensor) -> list[Tensor]:
            y = self.b(self.a(x))
            return [y, y * self.scale, self.scale]

    model, x = Odd(), torch.randn(1, 4)
    params = list(model.parameters())
    values = model.losses(x)
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    assert [params[k] is model.scale for k in plan.direct] == [True]
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    rows = [torch.autograd.grad(v, params, allow_unused=True, retain_graph=True) for v in model.losses(x)]
    np.testing.assert_allclose(found.gram(), gram_of([list(r) for r in rows]), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding_idx": 2},
        {"scale_grad_by_freq": True},
        {"padding_idx": 0, "scale_grad_by_freq": True},
        {"max_norm": 1.0},
    ],
)
def test_embeddings(kwargs: dict) -> None:
    model = Net(nn.Sequential(nn.Embedding(11, 4, **kwargs), nn.Tanh(), nn.Linear(4, 5)), 5)
    index = torch.tensor([[2, 2, 5], [0, 7, 2], [0, 0, 10]])
    compare(model, at(index), body("0.weight", "2.weight", "2.bias") + heads(model))
    compare(model, at(index.int()[0]), body("0.weight", "2.weight", "2.bias") + heads(model))


@pytest.mark.parametrize("kwargs", [{"scale_grad_by_freq": True}, {"padding_idx": 0, "scale_grad_by_freq": True}])
def test_frequencies_divide_in_double_precision(kwargs: dict) -> None:
    model = Net(nn.Embedding(11, 4, **kwargs), 4).double()
    index = torch.tensor([2, 2, 2, 0, 7, 0, 0, 10])
    compare(model, at(index), body("weight") + heads(model), error=1e-14)


def test_sparse_tables_and_bags_are_direct() -> None:
    for table in (nn.Embedding(11, 4, sparse=True), nn.EmbeddingBag(11, 4)):
        model = Net(nn.Sequential(table, nn.Linear(4, 5)), 5)
        compare(model, at(torch.randint(11, (3, 6))), body("1.weight", "1.bias") + heads(model))


def test_a_table_in_half_precision() -> None:
    model = Net(nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 5)), 5).bfloat16()
    compare(model, at(torch.randint(11, (3, 6))), body("0.weight", "2.weight", "2.bias") + heads(model), error=3e-2)


# ------------------------------------------------------------------------------------------------ hooks


def rows_by_autograd(values: Sequence[Tensor], params: Sequence[Tensor]) -> list[list[Tensor | None]]:
    return [
        [
            None if g is None else g.double()
            for g in torch.autograd.grad(v, params, retain_graph=True, allow_unused=True)
        ]
        for v in values
    ]


def compare_hooked(model: nn.Module, values: list[Tensor], ghosts: Sequence[str]) -> None:
    params = list(model.parameters())
    rows = rows_by_autograd(values, params)
    compare(model, lambda _: values, ghosts, rows=rows)


def test_hooks_on_outputs_are_obeyed() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
            z = self.b(y.relu_())
            z.register_hook(lambda g: 3 * g)
            return z

    for x in (torch.randn(4, 8), torch.randn(2, 3, 8)):
        model = Net(Hooked(), 5)
        compare_hooked(model, model.losses(x), body("a.weight", "a.bias", "b.weight", "b.bias") + heads(model))


def test_module_hooks_are_obeyed() -> None:
    model = mlp()
    model.body[2].register_full_backward_hook(lambda _, grads, __: (2 * grads[0],))
    model.body[0].register_full_backward_pre_hook(lambda _, grads: (3 * grads[0],))
    x = torch.randn(4, 8, requires_grad=True)
    compare_hooked(model, model.losses(x), TWO + heads(model))


def test_hooks_on_weights_make_them_direct() -> None:
    model = mlp()
    model.body[0].weight.register_hook(lambda g: 2 * g)
    model.body[2].bias.register_hook(lambda g: 2 * g)
    compare_hooked(model, model.losses(torch.randn(4, 8)), body("2.weight") + heads(model))


def test_hooks_after_accumulation_make_parameters_direct() -> None:
    model = mlp()
    model.body[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    model.body[2].bias.register_post_accumulate_grad_hook(lambda p: None)
    compare_hooked(model, model.losses(torch.randn(4, 8)), body("2.weight") + heads(model))


@pytest.mark.parametrize("where", ["layer", "transposed"])
@pytest.mark.parametrize("when", ["register_hook", "register_prehook"])
def test_hooks_on_nodes_make_parameters_direct(where: str, when: str) -> None:
    model = mlp()
    y = model.body[0](torch.randn(4, 8))
    node = y.grad_fn if where == "layer" else y.grad_fn.next_functions[2][0]
    getattr(node, when)(lambda *grads: tuple(None if g is None else 2 * g for g in grads[0]))
    z = model.body[3](model.body[2](y))
    values = [head(z).square().sum() for head in model.heads]
    compare_hooked(model, values, body("2.weight", "2.bias") + heads(model))


def test_hooks_on_a_transposed_weight_make_it_direct() -> None:
    model = mlp()
    y = torch.randn(4, 8, requires_grad=True)
    transposed = model.body[0].weight.t()
    transposed.register_hook(lambda g: 2 * g)
    z = model.body[3](model.body[2](torch.addmm(model.body[0].bias, y, transposed)))
    del transposed
    values = [head(z).square().sum() for head in model.heads]
    compare_hooked(model, values, body("2.weight", "2.bias") + heads(model))


# ------------------------------------------------------------------------------------------------ graphs


def test_a_graph_that_is_kept_can_be_used_again() -> None:
    model = mlp()
    values = model.losses(torch.randn(4, 8))
    params = list(model.parameters())
    seeds = [torch.ones_like(v) for v in values]
    grams = []
    for batched in (False, True, False):
        plan = ghost.plan(values, params, force=True)
        assert plan is not None
        grams.append(plan.differentiate(values, seeds, retain_graph=True, batched=batched).gram())
    np.testing.assert_allclose(grams[1:], [grams[0]] * 2, rtol=1e-5)
    plan.differentiate(values, seeds)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(values[-1], params, allow_unused=True)


def test_a_graph_that_was_freed_is_an_error_with_the_cure() -> None:
    model = mlp()
    values = model.losses(torch.randn(4, 8))
    values[0].backward()
    params = list(model.parameters())
    plan = ghost.plan(values, params, force=True)
    assert plan is not None  # the heads of the other losses are alive
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        plan.differentiate(values, [torch.ones_like(v) for v in values])


def test_inputs_that_were_changed_in_place_are_an_error() -> None:
    model, x = mlp(), torch.randn(4, 8)
    values = model.losses(x)
    params = list(model.body.parameters())
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    x.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        found.gram()
    with pytest.raises(RuntimeError, match="in place"):
        found.combine([1.0] * 3)
    changed = model.losses(x)
    x.add_(1)
    later = ghost.plan(changed, params, force=True)
    assert later is not None
    assert {id(later.shared[k]) for k in later.direct} >= {id(model.body[0].weight)}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.differentiate(changed, [torch.ones_like(v) for v in changed])


def test_nothing_is_a_ghost_where_saved_tensors_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(node: object, name: str) -> Tensor:
        raise AttributeError(name)

    model = Net(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 5)), 5)
    monkeypatch.setattr(ghost_graph, "_saved_tensor", absent)
    assert ghost.plan(model.losses(torch.randint(11, (3,))), list(model.parameters()), force=True) is None


def test_nothing_is_a_ghost_in_a_graph_too_deep_to_be_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(reach, "_DEEPEST", 3)
    assert ghost.plan(model.losses(torch.randn(4, 8)), list(model.parameters()), force=True) is None


def test_parameters_of_other_classes_are_direct() -> None:
    class Own(nn.Parameter):
        pass

    model = mlp()
    model.body[0].weight = Own(model.body[0].weight.data)
    compare(model, at(torch.randn(4, 8)), body("2.weight", "2.bias") + heads(model))


def test_rows_can_be_formed_after_all() -> None:
    model = mlp()
    params = list(model.parameters())
    values = model.losses(torch.randn(4, 8))
    want = gram_of(rows_by_autograd(values, params))
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    assert len(found) == 3
    assert 1e-7 < found.noise < 1e-6
    root = found.triangle()
    np.testing.assert_allclose(root @ root.T, want, atol=1e-6 * want.max())
    np.testing.assert_allclose(found.part([0, 2]).gram(), want[np.ix_([0, 2], [0, 2])], atol=1e-6 * want.max())


def test_only_what_pays_is_a_ghost() -> None:
    wide, long = Net(nn.Sequential(nn.Linear(512, 512), nn.Tanh()), 512), torch.randn(16, 512)
    params = list(wide.body.parameters())
    plan = ghost.plan(wide.losses(long), params)
    assert plan is not None
    assert plan.ghosts == [0, 1]
    assert ghost.plan(wide.losses(torch.randn(1024, 512)), params) is None


def test_a_plan_that_spares_less_than_predictions_are_off_is_none() -> None:
    """The wide layer pays. Behind eight narrow ones that do not, it is a small part of the step."""

    def planned(count: int) -> ghost.Plan | None:
        body = nn.Sequential(*(nn.Linear(200, 200) for _ in range(count)), nn.Linear(200, 512))
        model = Net(body, 512)
        return ghost.plan(model.losses(torch.randn(16, 200)), list(body.parameters()), together=False)

    alone = planned(0)
    assert alone is not None
    assert alone.ghosts == [0, 1]
    assert planned(8) is None


def adapters(depth: int, width: int, rank: int) -> nn.Sequential:
    """Frozen layers with trained corrections of low rank."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(m.frozen(x) + m.up(m.down(x)))

    layers = [
        Lambda(
            forward,
            frozen=nn.Linear(width, width).requires_grad_(False),
            down=nn.Linear(width, rank, bias=False),
            up=nn.Linear(rank, width, bias=False),
        )
        for _ in range(depth)
    ]
    return nn.Sequential(*layers)


def squares(features: Tensor, m: int) -> list[Tensor]:
    return [(features[:, k::m] - k).square().mean() for k in range(m)]


def test_adapters_go_one_by_one_so_that_hooks_that_cannot_be_seen_get_single_gradients() -> None:
    """Side by side would pay. But nothing tells of a hook on a tensor that no operation saves."""
    body, x = adapters(8, 512, 16), torch.randn(32, 512)
    params = [p for p in body.parameters() if p.requires_grad]
    assert all(ghost.plan(squares(body(x), m), params) is None for m in (4, 8))
    seen: list[float] = []
    features = body(x) * 1.0
    features.register_hook(lambda g: seen.append(float(g.norm())))
    losses = squares(features + 0, 8)
    wanted = [float(torch.autograd.grad(one, features, retain_graph=True)[0].norm()) for one in losses]
    seen.clear()
    report = gradsurgery.UPGrad(torch.optim.SGD(params, lr=0.1)).backward(losses)
    assert report.engine == "rows"
    assert seen == pytest.approx(wanted)


def test_all_layers_are_ghosts_where_passing_side_by_side_spares_more_than_the_expensive_ones_cost() -> None:
    body, x = adapters(8, 512, 16), torch.randn(32, 512)
    params = [p for p in body.parameters() if p.requires_grad]
    alone = ghost.plan(squares(body(x), 32), params, together=False)
    plan = ghost.plan(squares(body(x), 32), params)
    assert plan is not None
    assert plan.is_batched
    assert plan.direct == []
    assert alone is None or alone.direct
    assert ghost.plan(squares(body(x), 8), params) is None


def test_what_a_loss_does_below_the_trunk_is_counted() -> None:
    body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    plan = ghost.plan(Net(body, 2).losses(torch.randn(4, 3)), list(body.parameters()), force=True)
    assert plan is not None
    # Two layers with a transposition and two leaves each, and a tanh. Nobody needs the gradient at the inputs.
    call = ghost_layers.calling(torch.device("cpu"))
    assert plan.passing() == (9 * call, 4 * 2 * 5, 16 * 5 * 2, 16 * (4 * 2 + 4 * 5))
    counted = ghost_graph.Passing(calls=1.0, products=100.0, weights=7.0, outputs=2.0)
    assert [counted.spared(m) for m in (2, 3, 4, 9)] == [0.0, 0.0, 2.0, 7 * 6 - 10]


@pytest.mark.parametrize("losses", [2, 4])
def test_entries_of_all_rows_decide_whether_anybody_looks(losses: int) -> None:
    body = nn.Sequential(nn.Linear(420, 420), nn.Tanh(), nn.Linear(420, 10))
    features = body(torch.randn(8, 420))
    report = gradsurgery.PCGrad(torch.optim.SGD(body.parameters(), lr=0.1)).backward(squares(features, losses))
    few = losses * sum(p.numel() for p in body.parameters()) < formed.FEW
    assert few == (losses == 2)
    assert (report.engine, report.reason.startswith("fewer than 524288")) == (
        ("rows", True) if few else ("ghosts", False)
    )


# ------------------------------------------------------------------------------------------------ accuracy


def test_terms_that_cancel_are_multiplied_once_more() -> None:
    """At a minimum over the whole batch the terms of a gradient are far larger than their sum."""
    model = Net(nn.Linear(40, 30), 30)
    x = torch.randn(16, 40)
    inverse = torch.cat([x, -x * (1 + 1e-4)])  # opposite terms

    def losses(m: nn.Module) -> list[Tensor]:
        like = next(m.parameters()).dtype
        y = m.body(inverse.to(like))
        return [(y * torch.full((30,), k + 1.0, dtype=like)).sum() + (y.sin()[:, k]).mean() * 1e-4 for k in range(3)]

    compare(model, losses, body("weight", "bias"), slack=1e4, params=list(model.body.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-10, 1e-8, 1e-6])
def test_terms_that_cancel_even_in_double_precision_are_formed(dtype: torch.dtype, apart: float) -> None:
    layer = nn.Linear(20, 5).to(dtype)
    x, c = torch.randn(8, 20).to(dtype), torch.randn(3, 8, 5).to(dtype)
    z = layer(torch.cat([x, x * (1 + apart)]))
    values = [(z * torch.cat([a, -a])).sum() for a in c[:2]] + [(z * c[2].repeat(2, 1)).sum()]
    rows = [[torch.autograd.grad(v, layer.weight, retain_graph=True)[0]] for v in values]
    plan = ghost.plan(values, [layer.weight], force=True)
    assert plan is not None
    gram, want = plan.differentiate(values, [torch.ones_like(v) for v in values]).gram(), gram_of(rows)
    # What rounding leaves of a gradient: its terms have squares of ‖a‖² ‖d‖².
    terms = np.array([float(a.double().norm() ** 2 * x.double().norm() ** 2) for a in c])
    lengths = np.sqrt(want.diagonal()) + torch.finfo(dtype).eps * np.sqrt(terms)
    off = 20 * torch.finfo(dtype).eps * np.sqrt(terms) + 1e-6 * np.sqrt(want.diagonal())
    assert (np.abs(gram - want) <= np.outer(off, lengths) + np.outer(lengths, off)).all()
    assert (gram.diagonal() >= 0).all()


@pytest.mark.parametrize("factor", [1e-25, 1e-14, 1e14, 1e18])
def test_rows_beyond_float32_squares(factor: float) -> None:
    model = mlp()
    x = torch.randn(4, 8)
    compare(model, lambda m: [loss * factor for loss in at(x)(m)], TWO + heads(model))


def test_rows_of_zeros_and_of_nan() -> None:
    model = mlp()
    x = torch.randn(4, 8)
    compare(model, lambda m: [loss * (i != 1) for i, loss in enumerate(at(x)(m))], TWO + heads(model))
    values = model.losses(x)
    params = list(model.body.parameters())
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    gram = plan.differentiate(values, [torch.tensor(s) for s in (1.0, torch.nan, 1.0)]).gram()
    assert np.isnan(gram[1]).all()
    assert np.isfinite(gram[np.ix_([0, 2], [0, 2])]).all()


def test_wide_layers_are_as_exact_as_narrow_ones() -> None:
    model = Net(nn.Sequential(nn.Linear(20_000, 64), nn.ReLU(), nn.Linear(64, 20_000)), 20_000)
    x = torch.rand(12, 20_000)
    compare(model, at(x), TWO, params=list(model.body.parameters()))


@pytest.mark.parametrize("api", ["old", "new"])
def test_products_do_not_follow_a_lower_precision_of_matrix_products(api: str) -> None:
    model = Net(nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 64)), 64)
    values = model.losses(torch.randn(50, 300))
    params = list(model.body.parameters())
    want = gram_of(rows_by_autograd(values, params))
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values])
    try:
        if api == "old":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        np.testing.assert_allclose(found.gram(), want, atol=1e-6 * want.max())
    finally:
        if api == "old":
            torch.set_float32_matmul_precision("highest")
        else:
            torch.backends.cuda.matmul.fp32_precision = "none"


# ------------------------------------------------------------------------------------------------ side by side


def test_losses_side_by_side() -> None:
    model = mlp()
    compare(model, at(torch.randn(4, 8)), TWO, batched=True, params=list(model.body.parameters()))
    compare(model, at(torch.randn(4, 8)), TWO + heads(model), batched=False)
    model = Net(nn.Sequential(nn.Embedding(11, 4, padding_idx=1), nn.LayerNorm(4), nn.Linear(4, 5)), 5)
    names = body("0.weight", "2.weight", "2.bias")
    compare(model, at(torch.randint(11, (3, 6))), names, batched=True, params=list(model.body.parameters()))


def test_private_parameters_side_by_side() -> None:
    model = mlp()
    values = model.losses(torch.randn(4, 8))
    shared, private = list(model.body.parameters()), list(model.heads.parameters())
    rows = rows_by_autograd(values, private)
    plan = ghost.plan(values, shared, force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values], others=private, batched=True)
    assert found.batched
    for row, others in zip(rows, found.others, strict=True):
        for expected, g, p in zip(row, others, private, strict=True):
            close(g, expected, p, 1e-6)


def test_rows_are_formed_side_by_side_too() -> None:
    model = Net(nn.Sequential(nn.Linear(8, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 5)), 5)
    values, params = model.losses(torch.randn(64, 8)), list(model.body.parameters())
    rows = rows_by_autograd(values, params)
    plan = ghost.plan(values, params)
    assert plan is not None
    assert plan.ghosts == [2, 3]
    found = plan.differentiate(values, [torch.ones_like(v) for v in values], batched=plan.is_batched)
    assert found.batched
    for i, row in enumerate(rows):
        for place, (expected, p) in enumerate(zip(row, params, strict=True)):
            close(found.row(i, place), expected, p, 1e-5)


def test_a_hook_on_a_parameter_sees_each_row() -> None:
    body, seen = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)), []
    body[0].bias.register_hook(lambda g: seen.append(g.shape))
    report = gradsurgery.PCGrad(torch.optim.SGD(body.parameters(), lr=0.1)).backward(
        squares(body(torch.randn(16, 512)), 4)
    )
    assert report.engine == "ghosts"
    assert seen == [(512,)] * 4


def test_what_knows_no_batches_goes_one_by_one() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
            return g * (2.0 if float(g.sum()) > 1e9 else 1.0)

    model = Net(Lambda(lambda m, x: m.b(Reads.apply(m.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 5)), 5)
    values = model.losses(torch.randn(4, 8))
    params = list(model.body.parameters())
    rows = rows_by_autograd(values, params)
    plan = ghost.plan(values, params, force=True)
    assert plan is not None
    found = plan.differentiate(values, [torch.ones_like(v) for v in values], batched=True)
    assert not found.batched
    want = gram_of(rows)
    np.testing.assert_allclose(found.gram(), want, atol=1e-6 * want.diagonal().max())


def test_losses_without_a_common_way_have_no_trunk() -> None:
    model = Net(Lambda(lambda m, x: torch.cat([m.a(x), m.b(x)], -1), a=nn.Linear(8, 2), b=nn.Linear(8, 3)), 5)
    x = torch.randn(4, 8)
    shared = list(model.body.parameters())
    plan = ghost.plan(model.losses(x), shared, force=True)
    assert plan is not None
    assert plan.trunk is not None
    a, b = model.body.a(x), model.body.b(x)
    plan = ghost.plan([a.sum() + b.sum(), a.sin().sum() - b.cos().sum()], shared, force=True)
    assert plan is not None
    assert plan.trunk is None


def test_ghosts_equal_rows_where_a_loss_goes_around_the_trunk() -> None:
    model = mlp()
    x = torch.randn(4, 8)

    def losses(m: nn.Module) -> list[Tensor]:
        like = next(m.parameters()).dtype
        first = m.body[0](x.to(like))
        z = m.body[3](m.body[2](first.relu()))
        return [m.heads[0](z).square().sum(), m.heads[1](z).sin().sum(), first.tanh().sum()]

    values = losses(model)
    plan = ghost.plan(values, list(model.body.parameters()), force=True)
    assert plan is not None
    assert plan.trunk is None
    first = list(model.body[0].parameters())
    plan = ghost.plan(values, first, force=True)
    assert plan is not None
    assert plan.trunk is not None
    rows = rows_by_autograd(values, first)
    found = plan.differentiate(values, [torch.ones_like(v) for v in values], batched=True)
    np.testing.assert_allclose(found.gram(), want := gram_of(rows), atol=1e-6 * want.max())


def test_hooks_at_the_trunk_act_once() -> None:
    model = mlp()
    for needed in (False, True):
        y = model.body[0](torch.randn(4, 8, requires_grad=True))
        z = model.body[2](y.tanh()) if needed else y[:, :5]
        (z if needed else y).register_hook(lambda g: 3 * g)
        values = [head(z).square().sum() for head in model.heads]
        params = list(model.body.parameters() if needed else model.body[0].parameters())
        rows = rows_by_autograd(values, params)
        plan = ghost.plan(values, params, force=True)
        assert plan is not None
        assert plan.trunk is not None
        found = plan.differentiate(values, [torch.ones_like(v) for v in values], batched=True)
        np.testing.assert_allclose(found.gram(), want := gram_of(rows), atol=1e-6 * want.max())


WATCHERS: dict[str, Callable[[nn.Module, list[Tensor], list[Tensor]], None]] = {
    "a hook on the inputs of a layer": lambda body, h, seen: h[0].register_hook(seen.append) and None,
    "a hook on the output of the trunk": lambda body, h, seen: h[1].register_hook(seen.append) and None,
    "a hook on a module": lambda body, h, seen: body[1].register_full_backward_hook(
        lambda _, grads, __: seen.append(grads[0])
    ) and None,
}  # fmt: skip


@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_looks_at_gradients_in_the_trunk_sees_those_of_each_loss(watcher: str) -> None:
    """Side by side they would be one tensor, of which nothing is left when the pass is over."""
    found = []
    for engine in ("ghosts", "rows"):
        torch.manual_seed(1)
        model, seen = mlp(), []
        optimizer = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1), engine=engine)
        if "module" in watcher:
            WATCHERS[watcher](model.body, [], seen)
        x = torch.randn(4, 8)
        h = [model.body[1](model.body[0](x))]
        h.append(model.body[2:](h[0]))
        if "module" not in watcher:
            WATCHERS[watcher](model.body, h, seen)
        report = optimizer.backward([head(h[1]).square().sum() for head in model.heads])
        assert report.engine == engine
        found.append(seen)
    torch.testing.assert_close(*found)
    assert len(found[0]) == len(model.heads)


@pytest.mark.parametrize("place", [0, 1])
def test_gradients_that_are_retained_in_the_trunk_are_those_of_all_losses(place: int) -> None:
    found = []
    for engine in ("ghosts", "rows"):
        torch.manual_seed(1)
        model = mlp()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1), engine=engine)
        h = [model.body[1](model.body[0](torch.randn(4, 8)))]
        h.append(model.body[2:](h[0]))
        h[place].retain_grad()
        optimizer.backward([head(h[1]).square().sum() for head in model.heads])
        found.append(h[place].grad)
    torch.testing.assert_close(*found)


def test_a_retained_gradient_that_nothing_tells_of_is_an_error_with_the_cure() -> None:
    """Here the tensor is the input of no layer."""
    model = mlp()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1), engine="ghosts")

    held = []

    def losses() -> list[Tensor]:
        held.append(2 * model.body[0](torch.ones(4, 8)))
        held[-1].retain_grad()
        z = model.body[2](held[-1].sin())
        return [head(z).square().sum() for head in model.heads]

    with pytest.raises(RuntimeError, match=r"retain_grad.*engine=\"rows\""):
        optimizer.backward(losses())
    assert all(p.grad is None for p in model.parameters())
    optimizer.engine = "rows"
    optimizer.backward(losses())


def test_losses_go_one_by_one_through_a_convolution_that_is_no_ghost() -> None:
    """As the patches of a vision transformer: nearly all entries belong to ghosts, and the convolution has rows."""

    def planned(first: nn.Module) -> ghost.Plan:
        trunk = nn.Sequential(first, nn.Flatten(), nn.Linear(32, 2000), nn.ReLU(), nn.Linear(2000, 2000))
        features = trunk(torch.randn(8, 2, 4, 4))
        values = [features[:, k].square().mean() for k in range(4)]
        found = ghost.plan(values, list(trunk.parameters()))
        assert found is not None
        return found

    patches, none = planned(nn.Conv2d(2, 2, 3, 1, 1)), planned(nn.Identity())
    assert {type(layer).__name__ for layer in patches.layers} == {"Linear"}
    assert (patches.is_batched, none.is_batched) == (False, True)
