"""Loops that train something else than the user thinks: a word once, and none where all is well."""

import copy
import gc
import linecache
import pickle
import warnings

import pytest
import torch

import gradsurgery as gs


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def losses(model):
    a, b = model(torch.ones(5, 3)).unbind(dim=1)
    return {"a": (a - 1).square().mean(), "b": (b + 2).square().mean()}


def wrapped(method=gs.PCGrad, base=torch.optim.SGD, **switches):
    model = net()
    return model, method(base(model.parameters(), lr=0.1), **switches)


def plain_step(model, optimizer):
    optimizer.zero_grad()
    sum(losses(model).values()).backward()
    optimizer.step()


def step(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(losses(model))
    optimizer.step()


@pytest.fixture
def said():
    """All warnings of a test, in order."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


# ------------------------------------------------------------------------------- backward() is never called


@pytest.mark.parametrize("method", [gs.PCGrad, gs.RealTimeWeighter, lambda base: gs.PCGrad(gs.RealTimeWeighter(base))])
def test_a_loop_that_never_calls_backward_is_told_so_once(method, said):
    model, optimizer = wrapped(method)
    for _ in range(4):
        plain_step(model, optimizer)
    assert [str(w.message).split(":")[0] for w in said] == [f"{optimizer._name}.step"]
    assert "In place of loss.backward(), call optimizer.backward(" in str(said[0].message)
    assert said[0].filename == __file__


def test_nothing_is_stepped_if_the_word_is_an_error():
    model, optimizer = wrapped()
    plain_step(model, optimizer)
    before = [p.clone() for p in model.parameters()]
    sum(losses(model).values()).backward()
    with pytest.raises(UserWarning, match="never called"):  # as all warnings are errors here
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_with_an_ordinary_backward_is_told_so_once(base, said):
    model, optimizer = wrapped(base=base)

    def closure():
        optimizer.zero_grad()
        total = sum(losses(model).values())
        total.backward()
        return total

    for _ in range(3):
        optimizer.step(closure)
    assert len(said) == 1
    assert "never called" in str(said[0].message)


def test_silence_after_a_plain_step_for_warming_up(said):
    model, optimizer = wrapped()
    plain_step(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    plain_step(model, optimizer)
    plain_step(model, optimizer)
    assert not said


@pytest.mark.parametrize("method", [gs.PCGrad, gs.RealTimeWeighter, lambda base: gs.PCGrad(gs.RealTimeWeighter(base))])
def test_silence_where_backward_is_called(method, said):
    model, optimizer = wrapped(method)
    for _ in range(3):
        step(model, optimizer)
    assert not said


def test_silence_for_lbfgs(said):
    model, optimizer = wrapped(base=torch.optim.LBFGS)

    def closure():
        optimizer.zero_grad()
        return optimizer.backward(losses(model)).objective

    for _ in range(3):
        optimizer.step(closure)
    assert not said


def test_silence_after_a_state_was_loaded(said):
    model, optimizer = wrapped()
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        plain_step(model, optimizer)
    assert not said


def test_silence_for_steps_without_gradients(said):
    _, optimizer = wrapped()
    for _ in range(3):
        optimizer.step()
    assert not said


def test_silence_for_steps_at_a_rate_of_zero(said):
    """Distributed checkpoints make such steps, with gradients of zero, to see what states an optimizer has."""
    model, optimizer = wrapped()
    for rate in (0.0, 0.0, 0.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        plain_step(model, optimizer)
    assert not said
    plain_step(model, optimizer)
    assert len(said) == 1


def test_silence_for_a_gan(said):
    generator, critic = net(0), net(1)
    both = gs.PCGrad(torch.optim.SGD(critic.parameters(), lr=0.1)), torch.optim.SGD(generator.parameters(), lr=0.1)
    for _ in range(3):
        both[1].zero_grad()
        critic(generator(torch.ones(2, 3)).sum(1, keepdim=True).expand(2, 3)).mean().backward()  # reaches the critic
        both[1].step()
        step(critic, both[0])
    assert not said


# ---------------------------------------------------------------------------- the wrapped optimizer is stepped


@pytest.mark.parametrize("method", [gs.PCGrad, gs.DWAWeighter, lambda base: gs.PCGrad(gs.DWAWeighter(base))])
@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_loop_that_steps_the_wrapped_optimizer_is_told_so_once(method, copied, said):
    model = net()
    model, optimizer = copied((model, method(torch.optim.SGD(model.parameters(), lr=0.1))))
    base = optimizer.base.base if isinstance(optimizer.base, gs.DWAWeighter) else optimizer.base
    for _ in range(3):
        base.zero_grad()
        optimizer.backward(losses(model))
        base.step()
    assert len(said) == 1
    assert f"Call step() of the {optimizer._name} instead" in str(said[0].message)
    assert said[0].filename == __file__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_within_a_step_is_told_of_its_own_steps(copied, said):
    model, optimizer = wrapped()
    copies = []
    hook = optimizer.base.register_step_post_hook(lambda *_: copies.append(copied((model, optimizer))))
    step(model, optimizer)
    hook.remove()
    model, optimizer = copies[0]
    optimizer.zero_grad()
    optimizer.backward(losses(model))
    optimizer.base.step()
    assert [optimizer._name in str(w.message) for w in said] == [True]
    assert "Call step() of the PCGrad instead" in str(said[0].message)


def test_the_step_of_the_weighter_inside_is_not_the_step_of_the_surgery(said):
    model, optimizer = wrapped(lambda base: gs.PCGrad(gs.DWAWeighter(base)))
    optimizer.backward(losses(model))
    optimizer.base.step()
    assert len(said) == 1


def test_silence_for_a_probe_that_never_steps(said):
    model, probe = wrapped()
    base = probe.base
    for _ in range(3):
        found = losses(model)
        probe.backward(found, retain_graph=True)
        base.zero_grad()
        sum(found.values()).backward()
        base.step()
    assert not said


def test_silence_for_two_wrappers_of_one_optimizer(said):
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = gs.PCGrad(base), gs.MGDA(base)
    for _ in range(2):
        step(model, first)
        step(model, second)
    assert not said


@pytest.mark.parametrize("wrap", [lambda o: torch.optim.lr_scheduler.StepLR(o, 1), lambda o: gs.Monitor(o)])
def test_silence_with_a_scheduler_and_a_monitor(wrap, said):
    model, optimizer = wrapped()
    wrap(optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert not said


def test_the_hook_goes_with_the_wrapper():
    base = torch.optim.SGD(net().parameters(), lr=0.1)
    for _ in range(3):
        gs.PCGrad(base)
    gc.collect()
    assert not base._optimizer_step_post_hooks


# ------------------------------------------------------------------------ a scaler that backward() was not given


@pytest.mark.parametrize("scales", [True, False])
def test_a_scaler_that_backward_was_not_given_is_told_so_once(scales, said):
    model, optimizer = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        optimizer.zero_grad()
        found = losses(model)
        optimizer.backward({name: scaler.scale(x) if scales else x for name, x in found.items()})
        if not scales:
            scaler.scale(torch.ones(()))  # as another loss would do
        scaler.step(optimizer)
        scaler.update()
    assert len(said) == 1
    assert "optimizer.backward(losses, scaler=scaler)" in str(said[0].message)
    assert said[0].filename == __file__


@pytest.mark.parametrize("enabled", [True, False])
def test_silence_where_the_scaler_is_passed_or_disabled(enabled, said):
    model, optimizer = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses(model), scaler=scaler if enabled else None)
        scaler.step(optimizer)
        scaler.update()
    assert not said


def test_silence_where_something_else_asks_whether_the_optimizer_unscales(said):
    model, optimizer = wrapped()
    optimizer.backward(losses(model))
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert not said


# --------------------------------------------------------------------------------- the sum is counted twice


@pytest.mark.parametrize("method", [gs.PCGrad, gs.RealTimeWeighter, lambda base: gs.PCGrad(gs.RealTimeWeighter(base))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sum_that_counts_twice_is_told_so_once(method, dtype, said):
    model = net().to(dtype)
    optimizer = method(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        a, b = model(torch.ones(5, 3, dtype=dtype)).unbind(dim=1)
        found = [(a - 1).square().mean(), (b + 2).square().mean()]
        sum(found).backward(retain_graph=True)
        optimizer.backward(found)
        optimizer.step()
    assert len(said) == 1
    assert "count twice" in str(said[0].message)
    assert said[0].filename == __file__


def test_a_scaled_sum_that_counts_twice_is_told_so(said):
    model, optimizer = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = losses(model)
    scaler.scale(sum(found.values())).backward(retain_graph=True)
    optimizer.backward(found, scaler=scaler)
    assert len(said) == 1


def test_what_is_written_is_the_same_with_and_without_the_look():
    result = []
    for steps in (0, 1):
        model, optimizer = wrapped()
        optimizer.transaction.committed["step"] = steps  # from the second step on nobody looks
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.backward(losses(model))
        result.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


def test_silence_for_a_regulariser_before(said):
    model, optimizer = wrapped()
    for _ in range(2):
        optimizer.zero_grad()
        sum(0.01 * p.square().sum() for p in model.parameters()).backward()
        optimizer.backward(losses(model))
        optimizer.step()
    assert not said


@pytest.mark.parametrize("before", [lambda x: x["a"], lambda x: 0.5 * (x["a"] + x["b"]), lambda x: 0 * x["a"]])
def test_silence_where_something_else_than_the_sum_was_there(before, said):
    model, optimizer = wrapped()
    found = losses(model)
    before(found).backward(retain_graph=True)
    optimizer.backward(found)
    assert not said


def test_silence_for_gradients_of_a_former_backward(said):
    model, optimizer = wrapped(gs.FixedWeighter)  # its update is the sum
    for _ in range(2):
        for _ in range(3):
            optimizer.backward(losses(model))
        optimizer.step()
    assert not said


# ------------------------------------------------------------------------------------ where a warning points


def strangers(model, optimizer):
    other = torch.nn.Linear(2, 2)
    a, b = other(model(torch.ones(5, 3))).unbind(dim=1)
    optimizer.backward([a.mean(), b.mean()])  # here


def unknown_name(model, optimizer):
    optimizer = type(optimizer)(optimizer.base, preference={"a": 1.0, "b": 1.0, "c": 1.0})
    optimizer.backward(losses(model))  # here


def another_memory(model, optimizer):
    optimizer.load_state_dict(gs.MoCo(torch.optim.SGD(model.parameters(), lr=0.1)).state_dict())  # here


def advice(model, optimizer):
    with gs.Monitor(optimizer):
        for _ in range(gs.monitor.INACTIVE_STEPS):
            optimizer.zero_grad()
            optimizer.backward({"a": model[2].weight.sum(), "b": model[2].weight.sum()})
            optimizer.step()  # here


def no_backward(model, optimizer):
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        sum(losses(model).values()).backward()
        optimizer.step()  # here


@pytest.mark.parametrize("method", [gs.PCGrad, lambda base: gs.PCGrad(gs.FixedWeighter(base))], ids=["alone", "nested"])
@pytest.mark.parametrize("slip", [strangers, unknown_name, another_memory, advice, no_backward])
def test_a_warning_points_at_the_line_of_the_user(slip, method, said):
    model, optimizer = wrapped(method)
    slip(model, optimizer)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert linecache.getline(__file__, said[0].lineno).endswith("# here\n")


def test_a_warning_in_a_program_that_has_no_line_of_a_user(said):
    exec("warn('so it is')", {"warn": gs.text.warn, "__name__": "gradsurgery.made_up"})
    assert [str(w.message) for w in said] == ["so it is"]
