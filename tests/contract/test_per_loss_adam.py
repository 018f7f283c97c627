"""MultiAdam, AdaTask and MTAdam, against exact answers and a literal copy of what the papers say."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

import gradsurgery
from gradsurgery import AdaTask, MTAdam, MultiAdam
from tests.support.answers import answers

pytestmark = pytest.mark.filterwarnings("error")

FAMILY = [MultiAdam, AdaTask, MTAdam]
every_method = pytest.mark.parametrize("method", FAMILY)


class Literal:
    """The papers, one tensor and one loss after the other. A loss is given by its gradients, None where it has none."""

    def __init__(self, method, params, lr, betas=None, eps=1e-8, decay=0.0, ranks=None):
        self.method, self.params, self.lr, self.eps, self.decay = method, params, lr, eps, decay
        self.betas = betas or {MultiAdam: (0.99, 0.99), AdaTask: (0.9, 0.999), MTAdam: (0.9, 0.999, 0.9)}[method]
        self.ranks = ranks or {}
        self.state = {}

    def step(self, gradients):
        present = {name: row for name, row in gradients.items() if row is not None}
        for j, p in enumerate(self.params):
            here = {name: row[j] for name, row in present.items() if row[j] is not None}
            if not here:
                continue
            for name, g in here.items():
                state = self.state.setdefault((name, j), {"m": 0, "v": 0, "t": 0, "n": float(g.norm())})
                state["t"] += 1
                if self.method is MTAdam and state["t"] > 1:
                    state["n"] = self.betas[2] * state["n"] + (1 - self.betas[2]) * float(g.norm())
            anchor = next((n for name in gradients if (n := self.state.get((name, j), {"n": 0})["n"]) > 0), 0.0)
            terms, roots = [], []
            for name, g in here.items():
                state, (b1, b2, *_) = self.state[name, j], self.betas
                if self.method is MTAdam:
                    g = self.ranks.get(name, 1.0) * g * (anchor / state["n"] if state["n"] else 1.0)
                state["m"] = b1 * state["m"] + (1 - b1) * g
                state["v"] = b2 * state["v"] + (1 - b2) * g**2
                terms.append(state["m"] / (1 - b1 ** state["t"]))
                roots.append((state["v"] / (1 - b2 ** state["t"])).sqrt() + self.eps)
            if self.method is MTAdam:
                roots = [torch.stack(roots).amax(0)] * len(roots)
            d = sum(m / r for m, r in zip(terms, roots, strict=True))
            if self.method is MultiAdam:
                d = d / len(present)
            p -= self.lr * (d + self.decay * p)


def linear(params, gradients):
    """Losses with these gradients; None is an absent loss, and a parameter that it does not reach."""
    return {
        name: None if row is None else sum((g * p).sum() for g, p in zip(row, params, strict=True) if g is not None)
        for name, row in gradients.items()
    }


def fresh(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def draws(shapes, count, sizes=None, seed=1):
    """Gradients of several losses of very different size, step after step."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or {"a": 1.0, "b": 100.0, "c": 0.01}
    return [
        {
            name: [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            for name, size in sizes.items()
        }
        for _ in range(count)
    ]


def train(optimizer, params, steps):
    for gradients in steps:
        optimizer.zero_grad()
        optimizer.backward(linear(params, gradients))
        optimizer.step()


def follow(method, optimizer, params, steps, **options):
    """Train, and let the literal copy follow. Returns the largest difference."""
    twin = Literal(method, [p.detach().clone() for p in params], **options)
    worst = 0.0
    for gradients in steps:
        train(optimizer, params, [gradients])
        twin.step(gradients)
        worst = max([worst, *(float((p.detach() - q).abs().max()) for p, q in zip(params, twin.params, strict=True))])
    return worst


# ------------------------------------------------------------------------------------------------------ exact answers

SEQUENCES = [
    (key, name)
    for key, found in answers()["sequences"].items()
    if key.startswith("per-loss Adam")
    for name in found
    if name not in ("inputs", "shapes")
]


@pytest.mark.parametrize(("key", "name"), SEQUENCES)
def test_five_steps(key, name):
    found = answers()["sequences"][key]
    case, inputs = found[name], found["inputs"]
    params = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in inputs["start"]]
    options = {"preference": case["ranks"]} if "ranks" in case else {}
    method = {each.__name__: each for each in FAMILY}[name.partition("_")[0]]
    optimizer = method(params, lr=case["lr"], weight_decay=case.get("decay", 0.0), **options)
    for t, (rows, expected) in enumerate(zip(inputs["grads"], case["params"], strict=True)):
        gradients = {
            str(i): None
            if [t, i] in case.get("absent", [])
            else [None if g is None else torch.tensor(g, dtype=torch.float64) for g in row]
            for i, row in enumerate(rows)
        }
        if any(row is not None for row in gradients.values()):
            train(optimizer, params, [gradients])
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(q, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len(SEQUENCES) == 15


SHAPES = [(3, 2), (4,), ()]


@every_method
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_one_loss_is_adam(method, decay):
    """In two groups with options of their own, with gradients of zero and a parameter that is not reached."""
    params, twins = fresh(SHAPES), fresh(SHAPES)
    betas = (0.8, 0.95, 0.5)[: 3 if method is MTAdam else 2]

    def groups(own, count):
        return [{"params": own[:1]}, {"params": own[1:], "lr": 0.05, "betas": betas[:count], "eps": 1e-3}]

    optimizer = method(groups(params, 3), lr=0.02, weight_decay=decay)
    usual = optimizer.defaults["betas"][:2]
    bare = AdamW(groups(twins, 2), lr=0.02, betas=usual, weight_decay=decay)
    for t, gradients in enumerate(draws(SHAPES, 6, {"only": 3.0})):
        row = [0 * g if t == 2 else None if (t, j) == (3, 1) else g for j, g in enumerate(gradients["only"])]
        train(optimizer, params, [{"only": row}])
        for q, g in zip(twins, row, strict=True):
            q.grad = None if g is None else g.clone()
        bare.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@every_method
def test_one_loss_is_adam_in_single_precision(method):
    params, twins = fresh(SHAPES, torch.float32), fresh(SHAPES, torch.float32)
    optimizer = method(params, lr=0.1)
    bare = Adam(twins, lr=0.1, betas=optimizer.defaults["betas"][:2])
    for gradients in draws(SHAPES, 20, {"only": 1e-3}):
        train(optimizer, params, [{"only": [g.float() for g in gradients["only"]]}])
        for q, g in zip(twins, gradients["only"], strict=True):
            q.grad = g.float()
        bare.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_method
def test_one_loss_is_adam_for_complex_parameters(method):
    start = torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = method([p], lr=0.1)
    bare = Adam([q], lr=0.1, betas=optimizer.defaults["betas"][:2])
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward([(p * (2 - 1j)).abs().square().sum()])
        optimizer.step()
        bare.zero_grad()
        (q * (2 - 1j)).abs().square().sum().backward()
        bare.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------ parameters that come and go


@every_method
def test_losses_reach_what_they_reach(method):
    """Heads, a tensor that two of three losses reach, and losses that are absent, at step 1 and later."""
    steps = draws(SHAPES, 6)
    for t, gradients in enumerate(steps):
        gradients["a"][1] = gradients["b"][1] = None  # a head of c
        gradients["c"][2] = None
        if t in (0, 3):
            gradients["b"] = None
        if t == 4:
            gradients["a"] = gradients["c"] = None
    params = fresh(SHAPES)
    optimizer = method(params, lr=0.01, weight_decay=0.1)
    assert follow(method, optimizer, params, steps, lr=0.01, decay=0.1) < 1e-12


@every_method
def test_a_tensor_frozen_for_a_while_goes_on_where_it_was(method):
    params = fresh(SHAPES)
    optimizer, twin = method(params, lr=0.01), Literal(method, [p.detach().clone() for p in params], lr=0.01)
    for t, gradients in enumerate(draws(SHAPES, 6)):
        params[0].requires_grad_(t not in (0, 3))
        if not params[0].requires_grad:
            for row in gradients.values():
                row[0] = None
        train(optimizer, params, [gradients])
        twin.step(gradients)
        for p, q in zip(params, twin.params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


@every_method
def test_a_group_may_be_added_later(method):
    params = fresh(SHAPES)
    optimizer, twin = method(params[:2], lr=0.01), Literal(method, [p.detach().clone() for p in params], lr=0.01)
    for t, gradients in enumerate(draws(SHAPES, 5)):
        if t == 2:
            optimizer.add_param_group({"params": params[2:]})
        if t < 2:
            for row in gradients.values():
                row[2] = None
        train(optimizer, params, [gradients])
        twin.step(gradients)
        for p, q in zip(params, twin.params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)
    assert optimizer.param_groups[1]["lr"] == 0.01
    with pytest.raises(ValueError, match=rf"{method.__name__}: `eps` must be >= 0, got -1"):
        optimizer.add_param_group({"params": fresh([(1,)]), "eps": -1.0})


@every_method
def test_micro_batches_are_one_batch(method):
    params, whole = fresh(SHAPES), fresh(SHAPES)
    optimizer, twin = method(params, lr=0.01), method(whole, lr=0.01)
    for first, second in zip(draws(SHAPES, 3), draws(SHAPES, 3, seed=9), strict=True):
        optimizer.zero_grad()
        optimizer.backward(linear(params, first), accumulate=True)
        optimizer.backward(linear(params, second))
        optimizer.step()
        both = {name: [a + b for a, b in zip(first[name], second[name], strict=True)] for name in first}
        train(twin, whole, [both])
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_one_loss_alone_reaches_a_tensor_from_two_places():
    """The whole model of one loss, and a trunk without a second task, get Adam's step and not a plain gradient."""
    params = fresh(SHAPES)
    optimizer = AdaTask(params, lr=0.01)
    report = optimizer.backward(linear(params, {"a": draws(SHAPES, 1)[0]["b"], "b": None}))
    assert all(float(p.grad.abs().max()) < 1 + 1e-6 for p in params)
    assert "nothing-shared" not in report.flags
    apart = draws(SHAPES, 1)[0]
    apart = {"a": [apart["a"][0], None, None], "b": [None, apart["b"][1], apart["b"][2]]}
    optimizer.zero_grad()
    assert "nothing-shared" not in optimizer.backward(linear(params, apart)).flags
    assert all(float(p.grad.abs().max()) < 2 for p in params)


# ------------------------------------------------------------------------------------------------- priorities and scale


def test_preference_multiplies_the_steps():
    params, twins = fresh(SHAPES), fresh(SHAPES)
    (gradients,) = draws(SHAPES, 1)
    optimizer = AdaTask(params, preference={"a": 2.0, "b": 0.5, "c": 1.0})
    optimizer.backward(linear(params, gradients))
    single = {}
    for name in gradients:
        alone = AdaTask(twins)
        alone.zero_grad()
        alone.backward(linear(twins, {name: gradients[name]}))
        single[name] = [p.grad.clone() for p in twins]
    for j, p in enumerate(params):
        torch.testing.assert_close(
            p.grad, 2 * single["a"][j] + 0.5 * single["b"][j] + single["c"][j], rtol=1e-12, atol=0
        )


def test_multiadam_is_the_mean_and_adatask_the_sum():
    (gradients,) = draws(SHAPES, 1)
    for build in (
        lambda params: MultiAdam(params, reduction="sum"),
        lambda params: AdaTask(params, betas=(0.99, 0.99)),
    ):
        params, twins = fresh(SHAPES), fresh(SHAPES)
        optimizer, mean = build(params), MultiAdam(twins)
        optimizer.backward(linear(params, gradients))
        mean.backward(linear(twins, gradients))
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.grad, 3 * q.grad, rtol=1e-12, atol=0)


def test_mtadam_with_ranks_of_absent_anchors():
    """The anchor keeps its length while it is absent, and ranks hold for a loss that is alone in a batch."""
    ranks = {"a": 1.0, "b": 0.5, "c": 2.0}
    steps = draws(SHAPES, 6)
    steps[1]["a"] = steps[2]["a"] = steps[2]["c"] = steps[5]["b"] = None
    params = fresh(SHAPES)
    optimizer = MTAdam(params, lr=0.01, preference=ranks)
    assert follow(MTAdam, optimizer, params, steps, lr=0.01, ranks=ranks) < 1e-12


def test_mtadam_keeps_its_anchor_when_the_losses_come_in_another_order():
    steps = draws(SHAPES, 4)
    params, twins = fresh(SHAPES), fresh(SHAPES)
    optimizer, twin = MTAdam(params), MTAdam(twins)
    for t, gradients in enumerate(steps):
        train(optimizer, params, [gradients])
        train(twin, twins, [dict(reversed(gradients.items())) if t else gradients])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_mtadam_passes_over_an_anchor_without_a_gradient():
    """A first loss whose gradient is zero is no anchor, and zeros are divided by nothing."""
    steps = draws(SHAPES, 4)
    for t in range(3):
        steps[t]["a"] = [0 * g for g in steps[t]["a"]]
    params = fresh(SHAPES)
    assert follow(MTAdam, MTAdam(params, lr=0.01), params, steps, lr=0.01) < 1e-12


@pytest.mark.parametrize(("method", "scales"), [(MultiAdam, {"a": 1e4, "b": 1e-3}), (MTAdam, {"b": 1e-5, "c": 1e7})])
def test_the_size_of_a_loss_does_not_matter(method, scales):
    params, twins = fresh(SHAPES), fresh(SHAPES)
    optimizer, twin = method(params, eps=0.0), method(twins, eps=0.0)
    for gradients in draws(SHAPES, 4):
        train(optimizer, params, [gradients])
        scaled = {name: [scales.get(name, 1.0) * g for g in row] for name, row in gradients.items()}
        train(twin, twins, [scaled])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e15])
def test_without_epsilon_single_precision_goes_as_far_as_its_range(method, size):
    """Squares of 1e-30 vanish in single precision: the moments are held in double there."""
    params, twins = fresh(SHAPES, torch.float32), fresh(SHAPES, torch.float32)
    optimizer, twin = method(params, eps=0.0), method(twins, eps=0.0)
    for gradients in draws(SHAPES, 3, {"a": 1.0, "b": 2.0}):
        gradients["b"][1][0] = 0.0  # 0 / 0 is 0
        train(optimizer, params, [{name: [g.float() * size for g in row] for name, row in gradients.items()}])
        train(twin, twins, [{name: [g.float() for g in row] for name, row in gradients.items()}])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e19), (torch.float64, 1e100), (torch.float64, 1e200)])
def test_gradients_whose_squares_leave_the_range_are_refused(method, dtype, size):
    params = fresh([(2,), (3,)], dtype)
    optimizer = method(params)
    before = [p.detach().clone() for p in params]
    long = {"a": [torch.ones(2, dtype=dtype), None], "b": [None, torch.full((3,), size, dtype=dtype)]}
    with pytest.raises(RuntimeError, match=r"longer than 1e18: here that of 'b'\..*Divide the losses by a constant"):
        optimizer.backward(linear(params, long))
    assert all(p.grad is None for p in params)
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


# --------------------------------------------------------------------------------------------------- torch's contract


@every_method
def test_two_groups_and_schedulers(method):
    """Each group has its own rate and averages, and a scheduler changes what the step makes."""
    params = fresh(SHAPES)
    short = (0.5, 0.6, 0.7)[: method.betas_wanted]
    optimizer = method([{"params": params[:1]}, {"params": params[1:], "lr": 0.2, "betas": short}], lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    first = Literal(method, [params[0].detach().clone()], lr=0.1)
    second = Literal(method, [p.detach().clone() for p in params[1:]], lr=0.2, betas=short)
    for gradients in draws(SHAPES, 4):
        train(optimizer, params, [gradients])
        scheduler.step()
        first.step({name: row[:1] for name, row in gradients.items()})
        second.step({name: row[1:] for name, row in gradients.items()})
        first.lr, second.lr = first.lr / 2, second.lr / 2
    for p, q in zip(params, [*first.params, *second.params], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


@every_method
def test_one_cycle_moves_the_momentum(method):
    params = fresh(SHAPES)
    optimizer = method(params, lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.7)
    twin = Literal(method, [p.detach().clone() for p in params], lr=0.0)
    for gradients in draws(SHAPES, 3):
        twin.lr, twin.betas = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
        assert len(twin.betas) == method.betas_wanted
        assert 0.5 <= twin.betas[0] <= 0.7
        train(optimizer, params, [gradients])
        # The momentum changes from step to step, and the correction with it.
        twin.step(gradients)
        scheduler.step()
    for p, q in zip(params, twin.params, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


@every_method
def test_it_is_an_optimizer_like_any_other(method):
    """Hooks run once, pickling keeps the moments, and a twin that replays ``.grad`` gets the same parameters."""
    params, twins = fresh(SHAPES), fresh(SHAPES)
    optimizer = method(params, lr=0.01, weight_decay=0.1)
    replay = method(twins, lr=0.01, weight_decay=0.1).base
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.transaction.learnt["step"]))
    steps = draws(SHAPES, 4)
    for gradients in steps[:3]:
        train(optimizer, params, [gradients])
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        replay.step()
    assert seen == [1, 2, 3]
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert method.__name__ in repr(optimizer)
    again, other = pickle.loads(pickle.dumps((params, method(params, lr=0.01))))
    other.load_state_dict(optimizer.state_dict())
    train(other, again, steps[3:])
    train(optimizer, params, steps[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


SCHEDULERS = {
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, base_momentum=0.5, max_momentum=0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.2, anneal_epochs=3),
}


@every_method
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_step(method, name):
    params = fresh(SHAPES)
    optimizer = method(params, lr=0.05)
    scheduler = SCHEDULERS[name](optimizer)
    twin, rates = Literal(method, [p.detach().clone() for p in params], lr=0.0), set()
    for gradients in draws(SHAPES, 5):
        (group,) = optimizer.param_groups
        twin.lr, twin.betas = group["lr"], group["betas"]
        rates.add(twin.lr)
        train(optimizer, params, [gradients])
        twin.step(gradients)
        scheduler.step(*([1.0] if name == "plateau" else []))
    assert len(rates) > 1
    for p, q in zip(params, twin.params, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


@every_method
def test_a_resumed_run_is_the_same_bit_for_bit(method):
    steps = draws(SHAPES, 6)
    steps[1]["a"] = None
    params = fresh(SHAPES)
    optimizer = method(params, lr=0.01)
    train(optimizer, params, steps[:3])
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    train(optimizer, params, steps[3:])
    file.seek(0)
    with torch.serialization.safe_globals([nn.Parameter]):
        again, state = torch.load(file, weights_only=True)
    resumed = method(again)
    resumed.load_state_dict(state)
    train(resumed, again, steps[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@every_method
def test_copies_train_for_themselves(method):
    steps = draws(SHAPES, 4)
    params = fresh(SHAPES)
    optimizer = method(params, lr=0.01)
    train(optimizer, params, steps[:2])
    others, other = copy.deepcopy((params, optimizer))
    before = [p.detach().clone() for p in params]
    train(other, others, steps[2:])
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    train(optimizer, params, steps[2:])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_method
def test_a_step_that_a_scaler_skips_teaches_nothing(method):
    params = fresh(SHAPES, torch.float32)
    optimizer, scaler = method(params, lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = [{name: [g.float() for g in row] for name, row in gradients.items()} for gradients in draws(SHAPES, 4)]
    twin = Literal(method, [p.detach().clone() for p in params], lr=0.01)
    for t, gradients in enumerate(steps):
        skipped = t in (0, 2)
        optimizer.zero_grad()
        losses = linear(params, gradients)
        if skipped:
            losses["b"] = losses["b"] * math.inf
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if not skipped:
            twin.step(gradients)
        for p, q in zip(params, twin.params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**8


@every_method
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_refused_by_name(method, bad):
    params = fresh(SHAPES)
    optimizer = method(params)
    steps = draws(SHAPES, 2)
    train(optimizer, params, steps[:1])
    before, memory = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    steps[1]["c"][1][0] = bad
    optimizer.zero_grad()
    losses = linear(params, steps[1])
    losses["c"] = losses["c"].nan_to_num(0.0, 0.0, 0.0) if bad == math.inf else losses["c"]
    with pytest.raises(RuntimeError, match=r"of 'c' is not finite"):
        optimizer.backward(losses)
    optimizer.nonfinite = "skip"
    assert "skipped" in optimizer.backward(linear(params, steps[1])).flags
    optimizer.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert str(optimizer.state_dict()) == str(memory)


@every_method
def test_closures(method):
    params, twins = fresh(SHAPES), fresh(SHAPES)
    optimizer, twin = method(params, lr=0.01), method(twins, lr=0.01)
    for gradients in draws(SHAPES, 3):

        def closure(gradients=gradients):
            optimizer.zero_grad()
            return optimizer.backward(linear(params, gradients)).objective

        def twice(closure=closure):
            closure()
            return closure()

        expected = sum(float(loss.detach()) for loss in linear(params, gradients).values())
        assert float(optimizer.step(twice)) == pytest.approx(expected)
        train(twin, twins, [gradients])
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@every_method
def test_checkpoints_of_other_losses_and_other_optimizers(method):
    params = fresh(SHAPES)
    optimizer = method(params)
    train(optimizer, params, draws(SHAPES, 2))
    state = optimizer.state_dict()
    other = method(fresh(SHAPES))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"names of the losses must stay the same.*knows \['a', 'b', 'c'\]"):
        train(other, other.param_groups[0]["params"], draws(SHAPES, 1, {"a": 1.0, "b": 1.0}))
    resized = fresh([(5, 2), (4,), ()])
    other = method(resized)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"moments of 'a' in parameter 0 have shape \(3, 2\).*shape \(5, 2\)"):
        train(other, resized, draws([(5, 2), (4,), ()], 1))
    bare = Adam(params, betas=optimizer.defaults["betas"][:2])
    if method is not MTAdam:
        bare.load_state_dict(state)  # which reads its own keys
    for p in params:
        p.grad = torch.ones_like(p)
    bare.step()
    afresh = method(fresh(SHAPES))
    if method is MTAdam:
        with pytest.raises(ValueError, match=r"MTAdam\.load_state_dict: `betas` must be 3 numbers.*Nothing was loaded"):
            afresh.load_state_dict(bare.state_dict())
        return
    with pytest.warns(UserWarning, match="the state is that of an optimizer with moments of its own"):
        afresh.load_state_dict(bare.state_dict())
    assert not afresh.state
    train(afresh, afresh.param_groups[0]["params"], draws(SHAPES, 1))


@every_method
def test_a_state_without_its_options_gets_the_defaults(method):
    params = fresh(SHAPES)
    optimizer = method(params, eps=1e-6)
    optimizer.load_state_dict(SGD(fresh(SHAPES), lr=0.3).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["eps"] == 1e-6
    assert len(optimizer.param_groups[0]["betas"]) == method.betas_wanted


@every_method
def test_options_that_change_are_looked_at(method):
    params = fresh(SHAPES)
    optimizer = method(params)
    optimizer.param_groups[0]["betas"] = (1.0,) * method.betas_wanted
    with pytest.raises(ValueError, match=r"`betas\[0\]` must be < 1, got 1.0"):
        train(optimizer, params, draws(SHAPES, 1))


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "amsgrad": (True, ValueError, "`amsgrad` is not offered"),
    "foreach": (True, ValueError, "`foreach` is not offered"),
    "fused": (True, ValueError, "`fused` is not offered"),
    "momentum": (0.9, ValueError, "`momentum` is not offered: `betas`"),
    "maximize": (True, ValueError, "`maximize` is not offered: pass the losses with a minus sign"),
    "every": (2, ValueError, "need a method that works by one weight per loss"),
    "weight_momentum": (0.5, ValueError, "need a method that works by one weight per loss"),
    "warmup": (3, ValueError, "`warmup` has no meaning here"),
    "normalize": ("l2", ValueError, "`normalize` has no meaning here"),
    "granularity": ("parameter", ValueError, "`granularity` has no meaning here"),
    "row_dtype": (torch.bfloat16, ValueError, "`row_dtype` and `row_device` need a method that forgets its rows"),
    "lr": (-1.0, ValueError, "`lr` must be >= 0, got -1.0"),
    "eps": (-1.0, ValueError, "`eps` must be >= 0, got -1.0"),
    "weight_decay": (math.nan, ValueError, "`weight_decay` must be a finite number, got nan"),
    "betas": (0.9, ValueError, r"`betas` must be \d numbers, got 0.9"),
    "wieght_decay": (0.1, TypeError, r"there is no argument `wieght_decay` \(did you mean `weight_decay`\?\)"),
}


@every_method
@pytest.mark.parametrize("argument", REFUSED)
def test_refused(method, argument):
    value, kind, message = REFUSED[argument]
    with pytest.raises(kind, match=f"^{method.__name__}: .*{message}"):
        method(fresh(SHAPES), **{argument: value})


@every_method
def test_refused_for_a_group_and_for_what_is_no_parameters(method):
    name = method.__name__
    params = fresh(SHAPES)
    with pytest.raises(ValueError, match=f"{name}: a parameter group has `amsgrad`=True, which is not offered"):
        method([{"params": params, "amsgrad": True}])
    with pytest.raises(ValueError, match=f"{name}: `shared_params` has no meaning here: all parameters have moments"):
        method(params, shared_params=params)
    with pytest.raises(ValueError, match=rf"{name}: `betas\[1\]` must be < 1, got 1.0"):
        method(params, betas=(0.9, 1.0, 0.9)[: method.betas_wanted])
    for wrong in (Adam(params), nn.Linear(1, 1), Adam):
        with pytest.raises(TypeError, match=re.escape(f"{name}(model.parameters(), lr=...)")):
            method(wrong)
    with pytest.raises(TypeError, match=f"PCGrad: `optimizer` is already a surgery method .{name}"):
        gradsurgery.PCGrad(method(params))


@every_method
def test_sparse_gradients_are_refused(method):
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = method(table.parameters())
    with pytest.raises(RuntimeError, match=f"{method.__name__}.backward: sparse gradients are refused.*sparse=False"):
        optimizer.backward([table(torch.tensor([1, 2])).sum(), table(torch.tensor([2, 3])).square().sum()])
    assert table.weight.grad is None
    # With an optimizer of its own it gets the sparse gradient of the sum.
    trunk = nn.Linear(2, 1)
    optimizer, own = method(trunk.parameters()), SGD(table.parameters(), lr=0.1)
    out = trunk(table(torch.tensor([1, 2])))
    optimizer.backward([out.sum(), out.square().sum()], other_optimizers=own)
    assert table.weight.grad.is_sparse
