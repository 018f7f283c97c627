"""Functions of the user that look at gradients on the way: they get the gradient of one loss at a time."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery import graph
from gradsurgery.gradients import ghosts
from gradsurgery.graph import hooks, torch_private

M, WIDTH = 5, 24


def losses_of(features):
    return [(features[:, k::M] - k).square().mean() for k in range(M)]


def trunk(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def through(body, watch=lambda h: h):
    """No operation saves the tensor that is watched."""
    h = body[:4](torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)) * 1.0
    return losses_of(body[4:](watch(h) + 0))


class Seen(torch.autograd.Function):
    """Notes what it is given."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.seen.append(g)
        return g, None


def registered(register):
    def watch(h, seen):
        register(h, seen)
        return h

    return watch


WATCHERS = {
    "a hook on a tensor": registered(lambda h, seen: h.register_hook(seen.append)),
    "a hook on a view": registered(lambda h, seen: h.view(-1).view_as(h).register_hook(seen.append)),
    "a hook before a node": registered(lambda h, seen: h.grad_fn.register_prehook(lambda gs: seen.append(gs[0]))),
    "a hook after a node": registered(lambda h, seen: h.grad_fn.register_hook(lambda _, gs: seen.append(gs[0]))),
    "a hook on several": registered(
        lambda h, seen: torch.autograd.graph.register_multi_grad_hook([h], lambda gs: seen.append(gs[0]))
    ),
    "a function": Seen.apply,
}


@pytest.fixture
def passed(monkeypatch):
    """Whether losses passed side by side, by call."""
    found = []
    differentiate = ghosts.Plan.differentiate

    def noted(*args, **options):
        made = differentiate(*args, **options)
        found.append(made.batched)
        return made

    monkeypatch.setattr(ghosts.Plan, "differentiate", noted)
    return found


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_watches_a_tensor_that_nothing_saves_gets_the_gradient_of_each_loss(watcher, retain, passed):
    found = {}
    for engine in ("ghosts", "rows"):
        body, seen = trunk(), []
        optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine=engine)
        losses = through(body, lambda h, seen=seen: WATCHERS[watcher](h, seen))
        assert optimizer.backward(losses, retain_graph=retain).engine == engine
        found[engine] = [g.clone() for g in seen]
    assert passed == [False]
    assert len(found["ghosts"]) == (M if watcher != "a hook on a view" else 0)
    torch.testing.assert_close(found["ghosts"], found["rows"])


@pytest.mark.parametrize("retain", [False, True])
def test_a_tensor_that_keeps_its_gradient_is_an_error_with_the_cure(retain):
    body = trunk()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="ghosts")
    kept = []
    losses = through(body, lambda h: h.retain_grad() or kept.append(h) or h)
    with pytest.raises(RuntimeError, match=r"retain_grad.*engine=\"rows\""):
        optimizer.backward(losses, retain_graph=retain)
    assert all(p.grad is None for p in body.parameters())


def test_without_hooks_losses_pass_side_by_side_in_every_step(passed):
    """Hooks on modules, optimizers and leaves that are registered once, and those of this library, change nothing."""
    body = trunk()
    body[0].register_forward_hook(lambda *_: None)
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="ghosts")
    other = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="blocks")
    for _ in range(3):
        optimizer.zero_grad()
        first, second = through(body), through(body)
        assert other.backward(second).engine == "blocks"
        optimizer.zero_grad()
        optimizer.backward(first)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        gradsurgery.Monitor(optimizer)
        optimizer.register_step_post_hook(lambda *_: None)
    assert passed == [True] * 3


@pytest.mark.parametrize("resumed", ["loaded", "copied"])
def test_a_run_that_goes_on_passes_side_by_side_from_its_first_step(resumed, passed):
    body = trunk()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="ghosts")
    saved = optimizer.state_dict()
    body[0].register_forward_hook(lambda *_: None)
    if resumed == "loaded":
        optimizer.load_state_dict(saved)
    else:
        body, optimizer = copy.deepcopy((body, optimizer))
    optimizer.backward(through(body))
    assert passed == [True]


def test_a_hook_of_one_step_is_forgotten_in_the_next(passed):
    body = trunk()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="ghosts")
    for watches in (True, False, True, False):
        seen = []
        watch = (lambda h, s=seen: h.register_hook(s.append) and h) if watches else (lambda h: h)
        optimizer.backward(through(body, watch))
        for p in body.parameters():  # not through the optimizer
            p.grad = None
        assert len(seen) == M * watches
    assert passed == [False, True, False, True]


def test_a_graph_that_is_older_than_what_is_known_may_have_hooks(passed):
    body = trunk()
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine="ghosts")
    seen = []
    losses = through(body, lambda h: h.register_hook(seen.append) and h)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.backward(losses, retain_graph=True)
    assert passed == [False, False]
    assert len(seen) == 2 * M


def test_threads_count_their_own_nodes():
    x = torch.ones(3, requires_grad=True)
    for _ in range(50):
        x * 2
    found = []

    def work():
        hooks.look()
        y = (2 * x).sum()
        found.append(hooks.may_look(graph.walk([y]).nodes))
        z = 2 * x
        z.register_hook(print)
        found.append(hooks.may_look(graph.walk([z.sum()]).nodes))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]


@pytest.mark.parametrize("missing", ["registrations", "nodes_made"])
def test_where_torch_does_not_tell_there_may_be_hooks(missing, monkeypatch):
    monkeypatch.setattr(hooks, missing, lambda: None)
    monkeypatch.setattr(hooks, "_seen", hooks._Seen())
    hooks.look()
    y = (2 * torch.ones(3, requires_grad=True)).sum()
    assert hooks.may_look(graph.walk([y]).nodes)


def test_what_is_read_of_torch_is_there():
    assert torch_private.registrations() is not None
    before = torch_private.nodes_made()
    y = 2 * torch.ones(3, requires_grad=True)
    assert torch_private.number_of(y.grad_fn) == before
    assert torch_private.nodes_made() == before + 1


@pytest.mark.parametrize("watched", [False, True])
def test_one_loss_per_sample_is_not_looked_for_where_hooks_would_see_sums(watched):
    body = nn.Sequential(trunk(), nn.Linear(WIDTH, 1))
    optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1))
    seen = []
    h = body[0](torch.randn(16, WIDTH)) * 1.0
    if watched:
        h.register_hook(seen.append)
    report = optimizer.backward((body[1](h + 0) - 1).square()[:, 0])
    assert report.engine == ("rows" if watched else "per sample")
    assert len(seen) == 16 * watched
    if watched:
        assert "hooks look at gradients on the way" in report.reason


def test_what_is_made_of_parameters_goes_one_by_one_where_hooks_may_look():
    """A weight that is normalised by hand: rows pass from it down to what it is made of."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        g, v = (nn.Parameter(torch.rand(shape)) for shape in ((5, 1), (5, WIDTH)))
        optimizer = gradsurgery.UPGrad(torch.optim.SGD([g, v], lr=0.1))
        seen = []
        weight = g * v / v.norm(dim=1, keepdim=True)
        if watched:
            weight.register_hook(seen.append)
        out = nn.functional.linear(torch.randn(16, WIDTH), weight)
        optimizer.backward((out - 1).square().sum(1), per_sample="keep")
        assert all(torch.isfinite(s).all() and s.shape == weight.shape for s in seen)
        found.append((g.grad, v.grad))
        assert bool(seen) == watched
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("engine", ["ghosts", "blocks"])
def test_what_another_thread_has_made_may_have_hooks(engine, passed):
    body, seen = trunk(), []

    def train():  # in a thread that has made no nodes yet, so that its numbers begin where those of the other do
        optimizer = gradsurgery.UPGrad(torch.optim.SGD(body.parameters(), lr=0.1), engine=engine)
        with ThreadPoolExecutor(1) as others:
            for _ in range(3):
                losses = others.submit(through, body, lambda h: h.register_hook(seen.append) and h).result()
                optimizer.zero_grad()
                optimizer.backward(losses)

    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(train).result()
    assert True not in passed
    assert len(seen) == 3 * M


def test_a_registration_that_is_interrupted_is_not_taken_for_one_of_the_library():
    def interrupted(_):
        raise KeyboardInterrupt

    hooks.look()
    with pytest.raises(KeyboardInterrupt):
        hooks.ours(interrupted, None)
    y = 2 * torch.ones(3, requires_grad=True)
    y.register_hook(print)
    assert hooks.may_look(graph.walk([y.sum()]).nodes)
