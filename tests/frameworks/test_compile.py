"""Models under torch.compile: plain steps, surgery steps and mixtures of both.

A backward that was compiled for one use frees its buffers ("donates" them), and refuses a second use. What decides is
how the graph was used first.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor

import gradsurgery
from tests.support import compiled_heads
from tests.support.loops import NAMES, inputs, losses_of, memory_of, same, weights_of
from tests.support.processes import start
from tests.support.reads import reads

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
# The first use of inductor imports a module of torch that warns about torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
OVER_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    # The cache on disk would hand over what an earlier run compiled, donated or not.
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A trunk and three heads; the losses are part of what is compiled."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in NAMES)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)

    def forward(self, x):
        z = torch.tanh(self.trunk(x))
        targets = (1.0, -3.0, 9.0)
        return losses_of({name: h(z) - t for name, h, t in zip(NAMES, self.heads, targets, strict=True)})


def setting(build, backend=None, **switches):
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    if issubclass(build, gradsurgery.Surgery):
        switches["shared_params"] = net.trunk.parameters()
    return net, build(base, **switches), torch.compile(net, backend=backend) if backend else net


def run(build, schedule, backend=None, **switches):
    """Steps of the method ("m") and plain ones ("p")."""
    net, optimizer, model = setting(build, backend, **switches)
    for t, kind in enumerate(schedule):
        optimizer.zero_grad()
        losses = model(inputs(t, torch.float32))
        if kind == "m":
            optimizer.backward(losses)
        else:
            sum(losses.values()).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def assert_like_eager(build, schedule, backend, **switches):
    found, expected = (run(build, schedule, b, **switches) for b in (backend, None))
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@OVER_BACKENDS
@pytest.mark.parametrize(
    ("build", "schedule", "switches"),
    [
        (gradsurgery.PCGrad, "mmmm", {}),
        (gradsurgery.PCGrad, "mmppmp", {}),
        (gradsurgery.MGDA, "mmmmmm", {"every": 2, "warmup": 2}),
        (gradsurgery.GradDrop, "mmmm", {"warmup": 2}),
        (gradsurgery.UncertaintyWeighter, "pmpm", {}),
    ],
    ids=["surgery", "plain steps after surgery", "cadence", "warmup", "weighting"],
)
def test_a_compiled_model_trains_as_an_eager_one(build, schedule, switches, backend):
    assert_like_eager(build, schedule, backend, **switches)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_surgery_after_a_plain_step_is_refused_with_the_cure(backend):
    net, optimizer, model = setting(gradsurgery.MGDA, backend)
    sum(model(inputs(0, torch.float32)).values()).backward()
    before = copy.deepcopy([p.grad for p in net.parameters()]), memory_of(optimizer)
    with pytest.raises(RuntimeError, match=r"compiled.*donated_buffer = False.*before the first compilation"):
        optimizer.backward(model(inputs(1, torch.float32)))
    assert same([p.grad for p in net.parameters()], before[0])
    assert same(memory_of(optimizer), before[1])

    # The cure works, also in the process that has compiled already.
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):
        assert_like_eager(gradsurgery.MGDA, "pmpm", backend)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_batch_of_another_size_may_be_refused_with_the_cures(backend):
    """Torch then compiles for all sizes, backward and all, before it can know how often that one will run."""

    def run_sizes(chosen, dynamic=None):
        net, optimizer, _ = setting(gradsurgery.MGDA)
        model = torch.compile(net, backend=chosen, dynamic=dynamic) if chosen else net
        for t, size in enumerate((8, 8, 5, 8, 3)):
            optimizer.zero_grad()
            optimizer.backward(model(inputs(t, torch.float32)[:size]))
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    wanted = run_sizes(None)
    with pytest.raises(RuntimeError, match=r"donated_buffer = False.*sizes that change.*dynamic=False"):
        run_sizes(backend)
    torch._dynamo.reset()
    torch.testing.assert_close(run_sizes(backend, dynamic=False), wanted, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):
        torch.testing.assert_close(run_sizes(backend), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("switches", [{}, {"warmup": 1}], ids=["surgery", "warmup"])
def test_losses_as_functions_run_after_a_plain_step(switches, backend):
    """One forward pass per loss: each compiled backward runs once, whatever buffers it gives away."""
    ends = []
    for chosen in (backend, None):
        net, optimizer, model = setting(gradsurgery.MGDA, chosen, **switches)
        sum(model(inputs(0, torch.float32)).values()).backward()
        for t in range(3):
            optimizer.zero_grad()
            x = inputs(t, torch.float32)
            optimizer.backward({name: lambda name=name, x=x, model=model: model(x)[name] for name in NAMES})
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


DEFERRED = [
    (gradsurgery.FixedWeighter, {"weights": [2.0, 0.5, 1.0]}),
    (gradsurgery.UncertaintyWeighter, {}),
    (gradsurgery.IMTLLWeighter, {}),
    (gradsurgery.DWAWeighter, {}),
]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("build", "switches"), DEFERRED, ids=[build.__name__ for build, _ in DEFERRED])
def test_deferred_weights_leave_a_compiled_model_in_one_piece(build, switches, backend, monkeypatch):
    net, optimizer, model = setting(build, backend, nonfinite="defer", **switches)
    other, now, _ = setting(build, **switches)
    torch._dynamo.utils.counters.clear()
    for t in range(6):
        optimizer.zero_grad()
        losses = model(inputs(t, torch.float32))
        with reads(monkeypatch) as (functions, operators, _):
            optimizer.backward(losses)
            optimizer.step()
        now.zero_grad()
        now.backward(other(inputs(t, torch.float32)))
        now.step()
        if t:  # compiling reads what it likes
            assert functions == operators == []
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == 1, "compiled once, and as a whole"
    torch.testing.assert_close(weights_of(net), weights_of(other), rtol=1e-5, atol=1e-6)
    assert not same(weights_of(net), weights_of(Net()))


def test_a_compiled_training_step_keeps_backward_out():
    def run_steps(backend):
        net, optimizer, _ = setting(gradsurgery.PCGrad)
        backward = torch.compiler.disable(optimizer.backward)

        def step(x):
            optimizer.zero_grad()
            report = backward(net(x))
            optimizer.step()
            return report.total

        step = torch.compile(step, backend=backend) if backend else step
        return [step(inputs(t, torch.float32)) for t in range(3)]

    assert run_steps("aot_eager") == pytest.approx(run_steps(None), rel=1e-5)


@pytest.mark.parametrize("compiled", ["whole", "heads"])
@pytest.mark.parametrize("form", ["cat", "losses", "list", "break"])
@OVER_BACKENDS
def test_heads_of_a_compiled_model_are_private(form, backend, compiled):
    """Each case in a process of its own: what was compiled before decides whether a backward may run twice."""
    start(compiled_heads.trains_as_an_eager_one, (form, backend, compiled))
