"""The engine changes what a step costs, and nothing else."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery
from tests.support.catalogue import CATALOGUE

GRAM_ONLY = [
    pytest.param(row.build, id=row.name)
    for row in CATALOGUE
    if row.build(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)).needs_gram_only
]


OVER_ENGINES = pytest.mark.parametrize("engine", ["ghosts", "blocks"])


class Net(nn.Module):
    """Layers that become ghosts, one that does not, and three heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(11, 4), nn.LayerNorm(6)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.double()

    def forward(self, x):
        z = self.second(self.norm(self.first(self.table(x).flatten(1)).tanh()))
        return {
            name: (head(z) - i * x[:, :1]).square().mean() + 0.1
            for i, (name, head) in enumerate(zip("abc", self.heads, strict=True))
        }


@pytest.fixture
def x():
    return torch.randint(11, (4, 7, 2), generator=torch.Generator().manual_seed(1))


def train(build, x, engine, scaler=None, losses_of=lambda losses: losses, **options):
    net = Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), engine=engine, **options)
    for batch in x:
        optimizer.zero_grad()
        report = optimizer.backward(losses_of(net(batch)), scaler=scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return net, report


def assert_same(found, wanted, rtol=1e-8, atol=1e-10):
    for (name, p), q in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert (p.grad is None) == (q[1].grad is None)


@OVER_ENGINES
@pytest.mark.parametrize("build", GRAM_ONLY)
def test_every_engine_gives_what_rows_give(build, engine, x):
    found, report = train(build, x, engine)
    wanted, told = train(build, x, "rows")
    assert_same(found, wanted)
    assert report.engine == engine
    assert told.engine == "rows"
    torch.testing.assert_close(report.gram, told.gram)


@OVER_ENGINES
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda o, **k: gradsurgery.PCGrad(gradsurgery.UncertaintyWeighter(o), **k), {}),
        (gradsurgery.MGDA, {"log_losses": True}),
        (gradsurgery.MGDA, {"normalize": "loss+"}),
        (gradsurgery.PCGrad, {"reduction": "mean", "preference": {"a": 1, "b": 2, "c": 3}}),
        (gradsurgery.CAGrad, {"every": 2}),
        (gradsurgery.CAGrad, {"warmup": 1, "weight_momentum": 0.5}),
        (gradsurgery.NashMTL, {"granularity": "parameter"}),
        (gradsurgery.GradDrop, {}),
    ],
)
def test_with_switches(build, options, engine, x):
    assert_same(train(build, x, engine, **options)[0], train(build, x, "rows", **options)[0])


@OVER_ENGINES
def test_under_a_gradient_scaler(engine, x):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0)

    found, _ = train(gradsurgery.MGDA, x, engine, scaler())
    assert_same(found, train(gradsurgery.MGDA, x, "rows")[0])
    spoiled = scaler()
    inf, _ = train(gradsurgery.MGDA, x[:1], engine, spoiled, lambda losses: {**losses, "b": losses["b"] * float("inf")})
    for p, q in zip(inf.parameters(), Net().parameters(), strict=True):
        assert torch.equal(p, q), "the step was skipped"
    assert spoiled.get_scale() == 512.0


@OVER_ENGINES
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_gradients_that_are_not_finite(policy, engine, x):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine, nonfinite=policy)
    losses = net(x[0])
    losses["b"] = losses["b"] + (losses["b"] * 0).sqrt()
    if policy == "raise":
        with pytest.raises(RuntimeError, match="gradient of 'b' is not finite"):
            optimizer.backward(losses)
    else:
        assert "skipped" in optimizer.backward(losses).flags
    assert all(p.grad is None for p in net.parameters())


@OVER_ENGINES
def test_absent_tasks(engine, x):
    without = {"losses_of": lambda losses: {**losses, "b": None}}
    assert_same(train(gradsurgery.UPGrad, x, engine, **without)[0], train(gradsurgery.UPGrad, x, "rows", **without)[0])


class Both(torch.autograd.Function):
    """The walk cannot see that each output depends on one input only."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.set_materialize_grads(False)
        return a * 1, b * 1

    @staticmethod
    def backward(ctx, g, h):
        return g, h


@OVER_ENGINES
@pytest.mark.parametrize("trunk", [True, False])
def test_what_only_one_loss_really_reaches_is_private(trunk, engine):
    def run(engine):
        torch.manual_seed(0)
        net = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}).double()
        z = net["trunk"](torch.ones(5, 3, dtype=torch.float64))
        z = z if trunk else z.detach()
        a, b = Both.apply(net["a"](z), net["b"](z))
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
        report = optimizer.backward([a.sum(), -b.square().sum()])
        return net, report

    (found, report), (wanted, told) = run(engine), run("rows")
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert report.flags == told.flags
    assert (report.gram is None) == (told.gram is None)


@pytest.mark.parametrize("engine", ["rows", "ghosts", "blocks"])
def test_what_turns_out_to_be_private_is_examined(engine):
    """The only gradient that is not finite is that of a layer which the walk took for shared."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 2), "b": nn.Linear(3, 2)}).double()
    inputs, bad = torch.ones(2, 5, 3, dtype=torch.float64)
    bad[0] = torch.inf
    z = net["trunk"](inputs)
    a, b = Both.apply(net["a"](z), net["b"](bad))
    b = torch.where(b.isfinite(), b, 0.0)  # a weight's gradient is the input times this one's, which is 0: inf · 0
    losses = {"a": z.square().mean() + a.sum(), "b": z.sum() + b.square().mean()}
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
    with pytest.raises(RuntimeError, match="gradient of 'b' is not finite"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())


@OVER_ENGINES
@pytest.mark.parametrize("keep", [True, False])
def test_the_graph_is_kept_if_asked(keep, engine, x):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
    losses = net(x[0])
    optimizer.backward(losses, retain_graph=keep)
    first = [p.grad.clone() for p in net.parameters()]
    if not keep:
        with pytest.raises(RuntimeError, match="already freed"):
            optimizer.backward(losses)
        return
    optimizer.backward(losses)
    for p, g in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@OVER_ENGINES
def test_micro_batches_form_rows(engine, x):
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
    optimizer.backward(net(x[0]), accumulate=True)
    assert optimizer.backward(net(x[1])).engine == "rows"


def test_small_models_are_not_looked_at_and_large_ones_are(x):
    net = Net()
    assert gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(net(x[0])).engine == "rows"
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512))
    out = wide(torch.randn(4, 64))
    report = gradsurgery.MGDA(torch.optim.SGD(wide.parameters(), lr=0.1)).backward([out.mean(), out.square().mean()])
    assert report.engine == "ghosts"


@pytest.mark.parametrize("known", [True, False])
def test_side_by_side_is_tried_once(known, monkeypatch):
    """And not again, whatever number of steps follows."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512))
    optimizer = gradsurgery.MGDA(torch.optim.SGD(wide.parameters(), lr=0.0), engine="ghosts")
    tried = []
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda *args, **kwargs: tried.append(1) or vmap(*args, **kwargs))
    x = torch.randn(4, 64)
    for _ in range(5):
        h = wide[0](x)  # the backward of the other one knows no batches
        out = wide[2](wide[1](h) if known else nn.functional.rrelu(h, training=True))
        report = optimizer.backward([out.mean(), out.square().mean(), out.abs().mean(), -out.mean()])
        assert report.engine == "ghosts"
        optimizer.step()
    assert len(tried) == (5 if known else 1)


def test_one_pass_and_weighting_say_so(x):
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    assert gradsurgery.RunningMaxWeighter(base).backward(net(x[0])).engine == "one pass"
    assert gradsurgery.PCGrad(base, warmup=1).backward(net(x[0])).engine == "one pass"


def test_an_engine_that_does_not_exist():
    with pytest.raises(ValueError, match="`engine` must be one of"):
        gradsurgery.PCGrad(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), engine="fast")


@OVER_ENGINES
def test_in_place_changes_between_the_forward_pass_and_the_call_are_errors(engine, x):
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), engine=engine)
    h = net.first(net.table(x[0]).flatten(1))
    out = net.second(h)
    losses = [out.mean(), out.square().mean()]
    h.data.add_(1)  # not counted as a change: what is read is what lies there, as autograd does
    with torch.no_grad():
        h.add_(1)
    before = copy.deepcopy([p.grad for p in net.parameters()])
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        optimizer.backward(losses)
    assert [p.grad for p in net.parameters()] == before
