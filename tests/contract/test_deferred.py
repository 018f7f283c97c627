"""``nonfinite="defer"``: no call waits for the values of the losses, and the next one says what was wrong with them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradsurgery
from gradsurgery import DWAWeighter, FixedWeighter, IMTLLWeighter, UncertaintyWeighter
from gradsurgery.weighting import deferred
from tests.support.loops import METHODS, NAMES, Net, inputs, losses_of, memory_of, same, weights_of
from tests.support.reads import reads

BY_NAME = {"a": 2.0, "b": 0.5, "c": 3.0}
assert tuple(BY_NAME) == NAMES
CASES = {
    "equal": (FixedWeighter, {}),
    "fixed": (FixedWeighter, {"weights": BY_NAME, "preference": BY_NAME}),
    "log variance": (UncertaintyWeighter, {"lr": 0.1}),
    "kinds": (UncertaintyWeighter, {"lr": 0.1, "kind": ["regression", "classification", "regression"], "initial": 0.3}),
    "one kind": (UncertaintyWeighter, {"lr": 0.1, "kind": "classification"}),
    "log1p": (UncertaintyWeighter, {"lr": 0.1, "form": "log1p"}),
    "sgd": (UncertaintyWeighter, {"lr": 0.1, "weight_optimizer": "sgd"}),
    "switches": (
        UncertaintyWeighter,
        {"lr": 0.1, "preference": BY_NAME, "weight_momentum": 0.5, "min_weight": 0.3, "max_weight": 1.1},
    ),
    "cadence": (UncertaintyWeighter, {"lr": 0.1, "every": 3, "warmup": 2, "reduction": "mean"}),
    "scales": (IMTLLWeighter, {"lr": 0.1}),
    "epochs": (DWAWeighter, {}),
    "epochs, cadence": (DWAWeighter, {"every": 2, "weight_momentum": 0.2}),
}
over_cases = pytest.mark.parametrize("case", CASES)
#: Those that learn from every step.
LEARNING = ["log variance", "kinds", "log1p", "sgd", "switches", "scales", "epochs"]


def start(case, policy="defer", dtype=torch.float64, base=torch.optim.SGD, **more):
    build, switches = CASES[case]
    net = Net(dtype)
    return net, build(base(net.parameters(), lr=0.01), nonfinite=policy, **switches, **more)


def losses_at(net, t, spoilt=None, value=float("nan"), absent=True):
    """Losses of step t; "b" is absent now and then."""
    found = losses_of(net(inputs(t, next(net.parameters()).dtype)))
    if spoilt is not None:
        found[spoilt] = found[spoilt] * value
    return {**found, "b": None} if absent and t % 4 == 2 else found


def step(net, optimizer, t, **options):
    optimizer.zero_grad()
    report = optimizer.backward(losses_at(net, t, **options))
    optimizer.step()
    if isinstance(optimizer, DWAWeighter) and t % 3 == 2:
        optimizer.epoch_end()
    return report


def assert_close(found, wanted):
    """Equal to rounding, through containers."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_close(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b)
    elif isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    else:
        assert found == (pytest.approx(wanted, rel=1e-12) if isinstance(wanted, float) else wanted)


# ------------------------------------------------------------------------------------ finite losses


@over_cases
def test_finite_losses_are_weighted_as_ever(case):
    (net, optimizer), (net_now, optimizer_now) = start(case), start(case, "raise")
    for t in range(12):
        report, report_now = step(net, optimizer, t), step(net_now, optimizer_now, t)
        assert_close(report.as_dict(), report_now.as_dict())
        assert_close(memory_of(optimizer), memory_of(optimizer_now))
    assert_close(weights_of(net), weights_of(net_now))
    assert not same(weights_of(net), weights_of(Net()))


@pytest.mark.parametrize("case", ["fixed", "log variance", "scales", "epochs"])
@pytest.mark.parametrize("sparse", [False, True])
def test_micro_batches_add_up(case, sparse):
    ends = []
    for policy in ("defer", "raise"):
        net, optimizer = start(case, policy)
        table = nn.Embedding(4, 5, sparse=sparse, dtype=torch.float64)
        nn.init.constant_(table.weight, 0.1)
        optimizer.add_param_group({"params": table.parameters()})
        for t in range(6):
            optimizer.zero_grad()
            for k in range(3):
                residuals = net(inputs(3 * t + k) + table(torch.tensor([k, k, 3, 3, 3, 3, 3, 3])))
                optimizer.backward({n: loss / 3 for n, loss in losses_of(residuals).items()}, accumulate=k < 2)
            assert table.weight.grad.is_sparse == sparse
            optimizer.step()
        ends.append([*weights_of(net), table.weight.detach(), memory_of(optimizer)])
    assert_close(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_parameters_keep_their_dtype(dtype, accumulate):
    ends = []
    for policy in ("defer", "raise"):
        net, optimizer = start("log variance", policy, dtype)
        for t in range(4):
            optimizer.zero_grad()
            if accumulate:
                optimizer.backward(losses_at(net, t + 50, absent=False), accumulate=True)
            optimizer.backward(losses_at(net, t, absent=False))
            assert {p.grad.dtype for p in net.parameters()} == {dtype}
            optimizer.step()
        ends.append(weights_of(net))
    torch.testing.assert_close(*ends)


def test_other_optimizers_get_the_plain_sum():
    ends = []
    for policy in ("defer", "raise"):
        net = Net()
        optimizer = FixedWeighter(torch.optim.SGD(net.heads.parameters(), lr=0.1), weights=BY_NAME, nonfinite=policy)
        optimizer.backward(losses_at(net, 0), other_optimizers=torch.optim.SGD(net.trunk.parameters(), lr=0.1))
        ends.append([p.grad for p in net.parameters()])
    assert same(*ends)


# ------------------------------------------------------------------------------- nothing is waited for


@over_cases
@pytest.mark.parametrize("policy", ["defer", "raise"])
def test_no_value_is_read(case, policy, monkeypatch):
    net, optimizer = start(case, policy)
    told = []
    for t in range(8):
        optimizer.zero_grad()
        losses = losses_at(net, t)
        with reads(monkeypatch) as (functions, operators, late):
            report = optimizer.backward(losses)
            optimizer.step()
        assert bool(functions or operators) == (policy == "raise"), (functions, operators)
        assert late == ([told[-1]] if told and policy == "defer" else []), "those of the previous call, once"
        told.append(report.losses)


@pytest.mark.parametrize("case", ["fixed", "log variance", "scales", "epochs"])
def test_no_value_is_read_with_micro_batches_or_a_scaler(case, monkeypatch):
    net, optimizer = start(case, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # which makes the scale
    for t in range(4):
        optimizer.zero_grad()
        micro, losses = losses_at(net, 50 + t, absent=False), losses_at(net, t)
        with reads(monkeypatch) as (functions, operators, _):
            optimizer.backward(micro, accumulate=True, scaler=scaler)
            optimizer.backward(losses, scaler=scaler)
        assert functions == operators == []
        scaler.step(optimizer)
        scaler.update()


def test_after_loading_nothing_is_read_either(monkeypatch):
    net, optimizer = start("switches", "raise")
    step(net, optimizer, 0)
    state = optimizer.state_dict()
    optimizer = UncertaintyWeighter(
        torch.optim.SGD(net.parameters(), lr=0.01), nonfinite="defer", **CASES["switches"][1]
    )
    optimizer.load_state_dict(state)
    for t in (2, 1):  # first an absent loss, so that its number is kept beside others
        losses = losses_at(net, t)
        with reads(monkeypatch) as (functions, operators, _):
            optimizer.backward(losses)
        assert functions == operators == []
        optimizer.step()


def test_a_report_is_read_when_somebody_asks(monkeypatch):
    net, optimizer = start("log variance")
    losses = losses_at(net, 0)
    with reads(monkeypatch) as (functions, _, _):
        report = optimizer.backward(losses)
        assert not functions
        assert report.weights == dict.fromkeys(NAMES, 0.5)
        assert functions == ["tolist"]
        assert report.weights is report.weights
        assert functions == ["tolist"], "once"


# ------------------------------------------------------------------------------ what is not finite


@over_cases
@pytest.mark.parametrize("bad_step", [0, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.*in the previous call")
def test_a_step_that_is_not_finite_changes_nothing_and_is_named_by_the_next(case, bad_step, value):
    net, optimizer = start(case)
    for t in range(6):
        before = weights_of(net), memory_of(optimizer)["memory"]
        report = step(net, optimizer, t, spoilt="a" if t == bad_step else None, value=value)
        late = t == bad_step + 1
        assert report.nonfinite_before == (("a",) if late else ())
        assert ("nonfinite-before" in report.flags) == late
        assert ("nonfinite_before" in report.as_dict()) == late
        if t == bad_step:
            assert all(not p.grad.any() for p in net.parameters())
            assert same(weights_of(net), before[0])
            learnt = memory_of(optimizer)["memory"]
            assert learnt["step"] == t + 1
            first = ("tasks", "last_weights", "order")
            for key in learnt.keys() - {"step", *first}:
                kept = before[1].get(key, {})
                for name, number in learnt[key].items():
                    # What a loss begins with stands for nothing.
                    assert number == kept.get(name, optimizer.initial if key == "log_variance" else number)
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(np.isfinite(list(report.weights.values())))


@pytest.mark.parametrize("case", LEARNING)
@pytest.mark.filterwarnings("ignore:.*in the previous call")
def test_learning_goes_on_as_if_the_bad_step_had_not_been(case):
    (net, optimizer), (other, without) = start(case), start(case)
    step(net, optimizer, 0, spoilt="c")
    for t in (0, 1, 3, 4):
        step(net, optimizer, t)
        step(other, without, t)
    assert same(weights_of(net), weights_of(other))
    found, wanted = (memory_of(o)["memory"] for o in (optimizer, without))
    assert found.pop("step") == wanted.pop("step") + 1
    assert found == wanted


def test_an_epoch_without_a_finite_step_has_no_mean():
    net, optimizer = start("epochs")
    optimizer.backward(losses_at(net, 0, spoilt="a"))
    optimizer.step()
    optimizer.epoch_end()
    assert "previous" not in memory_of(optimizer)["memory"] or not memory_of(optimizer)["memory"]["previous"]


def test_what_was_in_grad_stays():
    net, optimizer = start("log variance")
    optimizer.backward(losses_at(net, 0))
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.backward(losses_at(net, 1, spoilt="b"))
    assert same([p.grad for p in net.parameters()], before)


def test_one_warning_names_the_loss_and_its_value():
    net, optimizer = start("log variance")
    step(net, optimizer, 0, spoilt="b")
    with pytest.warns(
        UserWarning, match=r"UncertaintyWeighter\.backward: in the previous call, .* was not finite: \{'b': nan\}\."
    ):
        step(net, optimizer, 1, spoilt="c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(net, optimizer, 3).nonfinite_before == ("c",)
        assert step(net, optimizer, 4).nonfinite_before == ()


@pytest.mark.parametrize("case", ["log variance", "scales"])
def test_a_negative_loss_is_refused_one_call_later(case):
    net, optimizer = start(case)
    before = weights_of(net)
    step(net, optimizer, 0, spoilt="b", value=-1.0)
    assert same(weights_of(net), before)
    optimizer.zero_grad()
    with pytest.raises(
        ValueError, match=rf"{type(optimizer).__name__}: every loss must be >= 0, .*got {{'b': -.*previous"
    ):
        optimizer.backward(losses_at(net, 1))
    assert all(p.grad is None for p in net.parameters())
    step(net, optimizer, 1)  # and goes on
    assert not same(weights_of(net), before)


def test_negative_losses_are_fine_where_no_method_minds():
    net, optimizer = start("fixed")
    step(net, optimizer, 0, spoilt="b", value=-1.0)
    assert step(net, optimizer, 1).nonfinite_before == ()


@pytest.mark.filterwarnings("ignore:.*in the previous call")
def test_a_weight_that_the_dtype_cannot_hold_writes_nothing():
    p = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = UncertaintyWeighter(torch.optim.SGD([p], lr=0.1), initial=-20.0, nonfinite="defer")
    optimizer.backward({"a": p.square().sum()})
    assert p.grad.item() == 0.0
    optimizer.step()
    assert optimizer.backward({"a": p.square().sum()}).nonfinite_before == ("a",)


def test_a_fixed_weight_that_the_dtype_cannot_hold_is_refused_at_once():
    p = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = FixedWeighter(torch.optim.SGD([p], lr=0.1), weights=[1e9], nonfinite="defer")
    with pytest.raises(RuntimeError, match="the weight of '0' is out of range"):
        optimizer.backward([p.square().sum()])


@pytest.mark.parametrize("case", ["equal", "log variance", "epochs"])
@pytest.mark.filterwarnings("ignore:.*in the previous call")
def test_a_scaler_sees_what_is_not_finite_and_skips_the_step(case):
    net, optimizer = start(case, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t, spoilt in enumerate((None, "a", None)):
        before = weights_of(net), memory_of(optimizer)
        optimizer.zero_grad()
        optimizer.backward(losses_at(net, t, spoilt=spoilt, absent=False), scaler=scaler)
        assert any(not p.grad.isfinite().all() for p in net.parameters()) == (spoilt is not None)
        scaler.step(optimizer)
        scaler.update()
        assert same((weights_of(net), memory_of(optimizer)), before) == (spoilt is not None)
    assert optimizer.report.nonfinite_before == ("a",)


def test_gradients_of_every_kind_are_kept_out():
    coordinates = torch.tensor([[0, 1, 1]])
    sparse = torch.sparse_coo_tensor(coordinates, torch.tensor([1.0, float("nan"), 2.0]), (3,), check_invariants=True)
    kinds = [None, torch.tensor([float("nan"), 1.0]), sparse, torch.ones(2, device="meta"), torch.ones(1).expand(3)]
    found = list(kinds)
    deferred.kept_out(found, torch.tensor(False))
    assert found[0] is None
    assert found[1].tolist() == [0.0, 0.0]
    assert found[2].is_sparse
    assert found[2].to_dense().tolist() == [0.0, 0.0, 0.0]
    assert found[3].is_meta
    assert found[4].tolist() == [0.0] * 3
    found = [
        torch.tensor([3.0, -0.0]),
        torch.sparse_coo_tensor(coordinates, torch.ones(3), (3,), check_invariants=True),
    ]
    deferred.kept_out(found, torch.tensor(True))
    assert str(found[0].tolist()) == "[3.0, -0.0]"
    assert found[1].to_dense().tolist() == [1.0, 2.0, 0.0]


# ---------------------------------------------------------------------------------- saved and copied


@over_cases
@pytest.mark.parametrize("policies", [("defer", "defer"), ("raise", "defer"), ("defer", "raise")], ids="-".join)
def test_a_run_goes_on_from_a_checkpoint(case, policies):
    net, optimizer = start(case)
    for t in range(7):
        step(net, optimizer, t)
    half, first = start(case, policies[0])
    for t in range(4):
        step(half, first, t)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = start(case, policies[1])[1]
    second = type(second)(torch.optim.SGD(half.parameters(), lr=0.01), nonfinite=policies[1], **CASES[case][1])
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for t in range(4, 7):
        step(half, second, t)
    compare = same if policies == ("defer", "defer") else lambda a, b: assert_close(a, b) is None
    assert compare([weights_of(half), memory_of(second)], [weights_of(net), memory_of(optimizer)])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:.*in the previous call")
def test_a_copy_knows_what_it_has_not_looked_at(copied):
    pair = start("log variance")
    step(*pair, 0, spoilt="c")
    twin = copied(pair)
    for net, optimizer in (pair, twin):
        assert step(net, optimizer, 1).nonfinite_before == ("c",)
    assert same(weights_of(pair[0]), weights_of(twin[0]))
    assert same(memory_of(pair[1]), memory_of(twin[1]))


# ------------------------------------------------------------------------------------------ refusals


ABLE = {build for build, _ in CASES.values()}
BUILT = {name: type(build(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))) for name, build in METHODS.items()}


def test_the_methods_that_take_it_are_those_that_are_named():
    assert {cls for cls in BUILT.values() if vars(cls).get("can_defer")} == ABLE


@pytest.mark.parametrize("name", [name for name, cls in BUILT.items() if cls not in ABLE])
def test_others_refuse_it(name):
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="nonfinite") as error:
        METHODS[name](base, nonfinite="defer")
    assert str(error.value) == (
        f'{BUILT[name].__name__}: `nonfinite` "defer" needs weights that do not wait for the values of the losses, '
        "which FixedWeighter, UncertaintyWeighter, IMTLLWeighter and DWAWeighter have, got 'defer'. "
        'Pass "raise", "skip" or "drop".'
    )


def test_a_subclass_says_for_itself_that_it_can():
    class Own(FixedWeighter):
        pass

    class Able(FixedWeighter):
        can_defer = True

    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r'Own: `nonfinite` "defer" needs'):
        Own(base, nonfinite="defer")
    assert Able(base, nonfinite="defer").nonfinite == "defer"


def test_several_processes_are_refused():
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r'FixedWeighter: `nonfinite` "defer" works in one process.*distributed'):
        FixedWeighter(base, nonfinite="defer", distributed=True)


def test_below_a_surgery_it_is_refused():
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="`nonfinite`"):
        gradsurgery.PCGrad(UncertaintyWeighter(base, nonfinite="defer"))


# ------------------------------------------------------------------------------------------- a device


@pytest.mark.cuda
@over_cases
def test_on_a_gpu_no_call_waits(case):
    build, switches = CASES[case]
    net = Net(torch.float32).cuda()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01), nonfinite="defer", **switches)
    batches = [inputs(t, torch.float32).cuda() for t in range(8)]
    for t, x in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            optimizer.zero_grad()
            losses = losses_of(net(x))
            report = optimizer.backward({**losses, "b": None} if t % 4 == 2 else losses)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(np.isfinite(list(report.losses.values())))
