"""The switches that every method has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from tests.support.catalogue import any_optimizer

SEQUENCES = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())["sequences"]
ROWS = torch.tensor([[2.0, 1.0, 0.0], [-10.0, 1.0, 3.0], [1.0, 1.0, -1.0]], dtype=torch.float64)


class PlainSum(gradsurgery.Surgery):
    def weights(self, gram, losses):
        return np.ones(len(gram))


class Given(gradsurgery.Weighter):
    """Weights 1, 2, 3, …"""

    def weights(self, losses):
        return np.arange(1.0, len(losses) + 1)


class Net(nn.Module):
    def __init__(self, tasks=2):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))
        self.double()

    def forward(self, x):
        self.z = torch.tanh(self.trunk(x))
        return [(h(self.z) - 10.0**i).square().mean() for i, h in enumerate(self.heads)]


@pytest.fixture
def net():
    return Net()


def wrapped(method, net, **options):
    return method(torch.optim.SGD(net.parameters(), lr=0.1), **options)


# ------------------------------------------------------------------------------------------------- normalize


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
@pytest.mark.parametrize("method", [PlainSum, gradsurgery.PCGrad, gradsurgery.MGDA])
def test_normalize_divides_the_rows(method, normalize):
    losses = torch.tensor([0.5, 4.0, 2.0], dtype=torch.float64)
    n = ROWS.norm(dim=1)
    scales = {"l2": n, "loss": losses, "loss+": n * losses}[normalize]
    found = method(any_optimizer(), normalize=normalize).combine(ROWS, losses)
    expected = method(any_optimizer()).combine(ROWS / scales[:, None], losses)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_normalize_needs_positive_losses(net, x):
    optimizer = wrapped(gradsurgery.PCGrad, net, normalize="loss")
    with pytest.raises(ValueError, match=r"every loss must be > 0, since normalize=.*'1'"):
        optimizer.backward([net(x)[0], -net(x)[1]])
    assert all(p.grad is None for p in net.parameters())


# ------------------------------------------------------------------------------------------------ preference


@pytest.mark.parametrize("given", [[1.0, 3.0, 0.5], {"2": 0.5, "0": 1.0, "1": 3.0}, (x for x in (1.0, 3.0, 0.5))])
def test_preference_multiplies_rows(given):
    found = gradsurgery.MGDA(any_optimizer(), preference=given).combine(ROWS)
    scaled = ROWS * torch.tensor([[1.0], [3.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(found, gradsurgery.MGDA(any_optimizer()).combine(scaled), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("present", ["abc", "ac"])
def test_what_is_given_in_order_needs_no_names(present):
    """Losses with names: a sequence goes by their order in the call, those of absent tasks included."""
    values = [2.0, 1.0, 0.5]

    def kinds(given):
        spell = lambda x: "classification" if x == 1.0 else "regression"  # noqa: E731
        return {k: spell(x) for k, x in given.items()} if isinstance(given, dict) else [spell(x) for x in given]

    for build in (
        lambda given, base: gradsurgery.PCGrad(base, preference=given),
        lambda given, base: gradsurgery.STCHWeighter(base, preference=given),
        lambda given, base: gradsurgery.STCHWeighter(base, reference=given),
        lambda given, base: gradsurgery.InitialLossWeighter(base, initial_losses=given),
        lambda given, base: gradsurgery.PriorLossWeighter(base, given),
        lambda given, base: gradsurgery.RunningMaxWeighter(base, gamma=given),
        lambda given, base: gradsurgery.FixedWeighter(base, weights=given),
        lambda given, base: gradsurgery.FAMOWeighter(base, min_losses=given),
        lambda given, base: gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"], initial_losses=given),
        lambda given, base: gradsurgery.NormalizedGradientWeighter(base, alpha=1.0, initial_losses=given),
        lambda given, base: gradsurgery.UncertaintyWeighter(base, kind=kinds(given)),
    ):
        grads = []
        for given in (values, dict(zip("abc", values, strict=True))):
            p = nn.Parameter(torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64))
            optimizer = build(given, torch.optim.SGD([p], lr=0.1))
            terms = {name: (row @ p).square() + 2.0 for name, row in zip("abc", ROWS, strict=True)}
            optimizer.backward({name: term if name in present else None for name, term in terms.items()})
            grads.append(p.grad)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0, 4.0]])
def test_what_is_given_in_order_must_be_complete(values):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    losses = {name: row @ p + 9.0 for name, row in zip("abc", ROWS, strict=True)}
    message = rf"must have one entry for each of the losses \['a', 'b', 'c'\], in this order, got {len(values)}"
    with pytest.raises(ValueError, match=f"PCGrad: `preference` {message}"):
        gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1), preference=values).backward(losses)
    with pytest.raises(ValueError, match=f"InitialLossWeighter: `initial_losses` {message}"):
        gradsurgery.InitialLossWeighter(torch.optim.SGD([p], lr=0.1), initial_losses=values).backward(losses)
    assert p.grad is None


def test_preference_multiplies_weights_but_not_private_gradients(net, x):
    report = wrapped(Given, net, preference=[2.0, 0.5]).backward(net(x))
    assert report.weights == {"0": 2.0, "1": 1.0}
    net.zero_grad()
    wrapped(PlainSum, net, preference=[2.0, 0.5]).backward(net(x))
    for i in range(2):
        assert torch.equal(net.heads[i].weight.grad, torch.autograd.grad(net(x)[i], net.heads[i].weight)[0])
    expected = torch.autograd.grad(2 * net(x)[0] + 0.5 * net(x)[1], net.trunk[0].weight)[0]
    torch.testing.assert_close(net.trunk[0].weight.grad, expected)


def test_preference_has_its_own_place_in_some_methods():
    p = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    gram = (ROWS @ ROWS.T).numpy()
    nash = gradsurgery.NashMTL(any_optimizer(), scale="paper", preference=p.tolist())
    found = torch.linalg.lstsq(ROWS.T, nash.combine(ROWS)[:, None]).solution[:, 0].numpy()
    np.testing.assert_allclose(gram @ found, p.numpy() / found, rtol=1e-9)
    for method in (gradsurgery.UPGrad, gradsurgery.AlignedMTL):  # linear in the preference
        parts = [method(any_optimizer(), preference=np.where(e, 1.0, 1e-300).tolist()).combine(ROWS) for e in np.eye(3)]
        found = method(any_optimizer(), preference=p.tolist()).combine(ROWS)
        torch.testing.assert_close(found, p @ torch.stack(parts), rtol=1e-10, atol=1e-12)
    dual = gradsurgery.DualProj(any_optimizer(), preference=p.tolist()).combine(ROWS)
    assert (ROWS @ dual > -1e-12).all()
    assert (dual - p @ ROWS) @ dual == pytest.approx(0, abs=1e-9), "a projection on a cone"
    for method in (gradsurgery.ConFIG, gradsurgery.IMTLG):
        with pytest.raises(ValueError, match="`preference` has no effect"):
            method(any_optimizer(), preference=[1.0, 2.0])


def test_preference_is_checked(net, x):
    for given, message in (
        ([1.0, 0.0], r"PCGrad: `preference\['1'\]` must be > 0, got 0.0"),
        ("high", "`preference` must be numbers by name or in order"),
        (2.0, "`preference` must be numbers by name or in order"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped(gradsurgery.PCGrad, net, preference=given)
    optimizer = wrapped(gradsurgery.PCGrad, net, preference={"a": 1.0})
    with pytest.raises(ValueError, match=r"`preference` must name every loss, \['b'\] is missing"):
        optimizer.backward(dict(zip("ab", net(x), strict=True)))

    class Indifferent(PlainSum):
        preference_refused = "equal projections have no room for it"

    with pytest.raises(ValueError, match="Indifferent: `preference` has no effect here: equal projections"):
        wrapped(Indifferent, net, preference=[1.0, 1.0])


# ------------------------------------------------------------------------------------- weight_momentum and bounds


def test_weight_momentum_is_cr_mogm():
    case = SEQUENCES["CR-MOGM"]
    optimizer = gradsurgery.MGDA(any_optimizer(), weight_momentum=0.9, reduction="mean")
    for rows, expected in zip(SEQUENCES["_inputs"]["JS"][:6], case["closed_form"], strict=True):
        rows = torch.tensor(rows, dtype=torch.float64)
        found = optimizer.combine(rows, update=True)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64) @ rows, rtol=1e-9, atol=1e-10)


def test_weight_momentum_survives_absent_tasks_and_checkpoints(net, x):
    optimizer = wrapped(gradsurgery.MGDA, net, weight_momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(net(x))
        optimizer.step()
    memory = optimizer.state_dict()["gradsurgery"]["memory"]
    assert set(memory["smoothed_weights"]) == {"0", "1"}
    optimizer.backward([net(x)[0], None])
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"]["smoothed_weights"]["1"] == memory["smoothed_weights"]["1"]


@pytest.mark.parametrize(
    ("switch", "expected"),
    [({"weight_momentum": 0.5}, [1.0, 2.0, 3.5]), ({"max_weight": 3.0}, [1.0, 3.0, 3.0])],
    ids=["momentum", "bound"],
)
def test_weights_of_normalized_rows_are_smoothed_and_bounded_too(switch, expected):
    class Growing(gradsurgery.Surgery):
        def weights(self, gram, losses):
            count = self.memory.get("count", 0)
            self.memory["count"] = count + 1
            return np.full(len(gram), 2 * count + 1.0)

    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Growing(torch.optim.SGD([w], lr=0.1), normalize="l2", **switch)
    for weight in expected:
        optimizer.zero_grad()
        report = optimizer.backward([row @ w for row in ROWS])
        np.testing.assert_allclose(list(report.weights.values()), weight / ROWS.norm(dim=1).numpy(), rtol=1e-12)
        optimizer.step()


def test_weights_are_bounded_last(net, x):
    report = wrapped(Given, net, preference=[1.0, 5.0], min_weight=1.5, max_weight=4.0).backward(net(x))
    assert list(report.weights.values()) == [1.5, 4.0]
    report = wrapped(gradsurgery.MGDA, net, min_weight=0.25).backward(net(x))
    assert min(report.weights.values()) >= 0.25


BAD = [
    ({"weight_momentum": 1.0}, "`weight_momentum` must be < 1, got 1.0"),
    ({"weight_momentum": -0.1}, "`weight_momentum` must be >= 0"),
    ({"min_weight": 2.0, "max_weight": 1.0}, "`min_weight` 2.0 exceeds `max_weight` 1.0"),
    ({"min_weight": float("nan")}, "`min_weight` must be a finite number"),
    ({"granularity": "layer"}, "`granularity` must be one of"),
    ({"granularity": "group", "every": 2}, 'PCGrad: `every` > 1 needs granularity="all"'),
    ({"normalize": "l1"}, "`normalize` must be one of"),
    ({"row_dtype": torch.float16}, "PCGrad: `row_dtype` must be None or torch.bfloat16, got torch.float16"),
    ({"row_device": "nowhere"}, "PCGrad: `row_device` must be a device of this machine, got 'nowhere'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_switches_are_named(net, options, message):
    with pytest.raises(ValueError, match=message):
        wrapped(gradsurgery.PCGrad, net, **options)


TOLD = [  # the whole text
    (gradsurgery.PCGrad, {"every": 0}, "PCGrad: `every` must be an integer >= 1, got 0."),
    (gradsurgery.PCGrad, {"every": True}, "PCGrad: `every` must be an integer >= 1, got True."),
    (gradsurgery.PCGrad, {"warmup": 1.0}, "PCGrad: `warmup` must be an integer >= 0, got 1.0."),
    (gradsurgery.PCGrad, {"warmup": -1}, "PCGrad: `warmup` must be an integer >= 0, got -1."),
    (gradsurgery.PCGrad, {"seed": -1}, f"PCGrad: `seed` must be an integer >= 0 and < {2**64}, got -1."),
    (gradsurgery.PCGrad, {"seed": 2**64}, f"PCGrad: `seed` must be an integer >= 0 and < {2**64}, got {2**64}."),
    (gradsurgery.PCGrad, {"max_weight": "1"}, "PCGrad: `max_weight` must be a finite number, got '1'."),
    (gradsurgery.PCGrad, {"max_weight": True}, "PCGrad: `max_weight` must be a finite number, got True."),
    (gradsurgery.PCGrad, {"preference": b"ab"}, "PCGrad: `preference` must be numbers by name or in order, got b'ab'."),
    (gradsurgery.MGDA, {"tolerance": 0}, "MGDA: `tolerance` must be > 0, got 0."),
    (gradsurgery.ConicGrad, {"c": 1.5}, "ConicGrad: `c` must be <= 1, got 1.5."),
    (gradsurgery.FixedWeighter, {"weights": [1.0, -1.0]}, "FixedWeighter: `weights['1']` must be >= 0, got -1.0."),
    (gradsurgery.FAMOWeighter, {"min_losses": "ab"}, "FAMOWeighter: `min_losses` must be a finite number, got 'ab'."),
    (
        gradsurgery.UncertaintyWeighter,
        {"kind": 3},
        "UncertaintyWeighter: `kind` must be names of kinds by name or in order, got 3.",
    ),
]


@pytest.mark.parametrize(("method", "options", "said"), TOLD, ids=lambda x: getattr(x, "__name__", None))
def test_an_argument_out_of_bounds_is_told_in_full(net, method, options, said):
    with pytest.raises(ValueError, match="must be") as error:
        wrapped(method, net, **options)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (gradsurgery.PCGrad, {"every": 1, "warmup": 0, "seed": 0, "weight_momentum": 0.0}),
        (gradsurgery.PCGrad, {"seed": 2**64 - 1, "min_weight": 1.0, "max_weight": 1.0}),
        (gradsurgery.ConicGrad, {"c": 0.0}),
        (gradsurgery.ConicGrad, {"c": 1}),
        (gradsurgery.FixedWeighter, {"weights": [0.0, 1.0]}),
        (gradsurgery.AGDA, {"gamma": 0.0, "period": 1}),
    ],
    ids=str,
)
def test_an_argument_may_lie_on_its_bound(net, method, options):
    optimizer = wrapped(method, net, **options)
    for name, value in options.items():
        if name != "weights":
            assert getattr(optimizer, name) == value


def test_numbers_may_be_tensors_and_numbers_of_numpy(net, x):
    given = [torch.tensor(2.0), np.float32(3.0)]
    assert list(wrapped(gradsurgery.FixedWeighter, net, weights=given).backward(net(x)).weights.values()) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([], "nothing"),
        ([torch.ones(2), 3], "an object of type int"),
        ([nn.Linear], "the class Linear"),
        (3, "an object of type int"),
    ],
    ids=["none", "number among them", "class", "number"],
)
def test_what_is_no_parameter_is_named(net, given, what):
    with pytest.raises(TypeError, match="`shared_params`") as error:
        wrapped(gradsurgery.PCGrad, net, shared_params=given)
    assert str(error.value).endswith(f"or a module, got {what}.")


def test_one_parameter_may_be_shared_params(net, x):
    weight = net.trunk[0].weight
    optimizer = wrapped(gradsurgery.PCGrad, net, shared_params=weight)
    assert list(optimizer.shared_params) == [weight]


def test_the_primary_loss_is_a_name(net, x):
    with pytest.raises(TypeError) as error:
        wrapped(gradsurgery.Bloop, net, primary=0)
    assert str(error.value) == "Bloop: `primary` must be the name of a loss or None, got 0."
    assert wrapped(gradsurgery.Bloop, net, primary="b").primary == "b"


@pytest.mark.parametrize("option", [{"every": 2}, {"weight_momentum": 0.5}, {"min_weight": 0.0}, {"max_weight": 1.0}])
def test_methods_without_weights_refuse_what_needs_them(net, option):
    class Coordinates(PlainSum):
        has_weights = False

    with pytest.raises(ValueError, match=r"Coordinates: .* need a method that works by one weight per loss"):
        wrapped(Coordinates, net, **option)


# ------------------------------------------------------------------------------------------------ log_losses


@pytest.mark.parametrize("every", [1, 2])
def test_log_losses_act_on_logarithms(net, x, every):
    optimizer = wrapped(gradsurgery.MGDA, net, log_losses=True, every=every)
    for _ in range(every):
        optimizer.zero_grad()
        optimizer.backward(net(x))
        optimizer.step() if every > 1 else None
    found = [p.grad.clone() for p in net.parameters()]
    if every == 1:
        net.zero_grad()
        wrapped(gradsurgery.MGDA, net).backward([loss.log() for loss in net(x)])
        for p, g in zip(net.parameters(), found, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)
    else:
        head = net.heads[1].weight
        assert optimizer.report.flags == ("reused",)
        assert not torch.allclose(found[-2], torch.autograd.grad(net(x)[1], head)[0])


def test_log_losses_in_combine():
    losses = torch.tensor([0.5, 4.0, 2.0], dtype=torch.float64)
    found = gradsurgery.MGDA(any_optimizer(), log_losses=True).combine(ROWS, losses)
    expected = gradsurgery.MGDA(any_optimizer()).combine(ROWS / losses[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_log_losses_need_positive_losses():
    with pytest.raises(ValueError, match=r"every loss must be > 0, since log_losses=True.*'1': 0.0"):
        gradsurgery.MGDA(any_optimizer(), log_losses=True).combine(ROWS, [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="`losses` must be given"):
        gradsurgery.MGDA(any_optimizer(), log_losses=True).combine(ROWS)


# ------------------------------------------------------------------------------------------------ granularity


def test_granularity_acts_on_each_part(net, x):
    whole = list(net.trunk.parameters())
    rows = [torch.autograd.grad(loss, whole, retain_graph=True) for loss in net(x)]
    report = wrapped(gradsurgery.MGDA, net, granularity="parameter").backward(net(x))
    assert report.weights is None
    for j, p in enumerate(whole):
        table = torch.stack([row[j].flatten() for row in rows])
        expected = gradsurgery.MGDA(any_optimizer()).combine(table).reshape(p.shape)
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
    net.zero_grad()
    groups = [{"params": net.trunk[0].parameters()}, {"params": [*net.trunk[2].parameters(), *net.heads.parameters()]}]
    gradsurgery.MGDA(torch.optim.SGD(groups, lr=0.1), granularity="group").backward(net(x))
    for part in ((0, 1), (2, 3)):
        table = torch.stack([torch.cat([row[j].flatten() for j in part]) for row in rows])
        expected = gradsurgery.MGDA(any_optimizer()).combine(table)
        found = torch.cat([whole[j].grad.flatten() for j in part])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scale", "ratio"), [(1.0, 1.0), (2.0**-560, 1.0), (1.0, 2.0**-560)])
def test_the_report_adds_up_the_products_of_all_parts(scale, ratio):
    """Those of each part may have a unit of their own, where squares are too small for float64."""
    p = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    rows = ROWS, ratio * (1024 * ROWS.flip(1) + 1)
    losses = [sum(scale * row[i] @ q for row, q in zip(rows, p, strict=True)) for i in range(3)]
    report = gradsurgery.MGDA(torch.optim.SGD(p, lr=0.1), granularity="parameter").backward(losses)
    flat = torch.cat(rows, dim=1)
    torch.testing.assert_close(report.gram, scale**2 * flat @ flat.T, rtol=1e-12, atol=0)
    lengths = flat.norm(dim=1)
    torch.testing.assert_close(report.cosines, flat @ flat.T / lengths / lengths[:, None], rtol=1e-12, atol=1e-15)
    assert list(report.norms.values()) == pytest.approx((scale * lengths).tolist(), rel=1e-12)


def test_each_part_has_a_memory_of_its_own(net, x):
    optimizer = wrapped(gradsurgery.GradVac, net, granularity="parameter")
    optimizer.backward(net(x))
    optimizer.step()
    memory = optimizer.state_dict()["gradsurgery"]["memory"]
    cosines = [memory[f"parameter {k}"]["targets"]["0"]["1"] for k in range(4)]
    assert len(set(cosines)) == 4
    again = wrapped(gradsurgery.GradVac, net, granularity="parameter")
    again.load_state_dict(optimizer.state_dict())
    again.zero_grad()
    again.backward(net(x))
    again.step()
    assert again.state_dict()["gradsurgery"]["memory"]["parameter 3"]["targets"]["0"]["1"] != cosines[3]


def paper(optimizer, **switches):
    """A method that does not have the scale of the sum: a single row would get the length 1."""
    return gradsurgery.NashMTL(optimizer, scale="paper", **switches)


@pytest.mark.parametrize("method", [gradsurgery.MGDA, gradsurgery.IMTLG, paper])
def test_a_single_loss_has_its_plain_gradient_on_named_parameters(method):
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    report = method(torch.optim.SGD([w], lr=0.1), shared_params=w).backward([ROWS[1] @ w])
    torch.testing.assert_close(w.grad, ROWS[1])
    assert list(report.weights.values()) == [1.0]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", [gradsurgery.MGDA, gradsurgery.NashMTL, gradsurgery.IMTLG, paper])
def test_a_part_is_solved_for_the_losses_that_reach_it(method, inside):
    """Parameters are named, since found ones are shared: one that a single loss reaches has plain gradients."""
    reach = {"all": (0, 1, 2), "ends": (0, 2), "last": (1, 2), "one": (1,)}
    params = {name: nn.Parameter(torch.zeros(3, dtype=torch.float64)) for name in reach}
    by = [1.0, 5.0, 0.5] if inside else [1.0] * 3
    base = torch.optim.SGD(params.values(), lr=0.1)
    optimizer = method(
        gradsurgery.FixedWeighter(base, weights=by) if inside else base,
        granularity="parameter",
        shared_params=params.values(),
    )
    optimizer.backward([sum(ROWS[i] @ params[k] for k in reach if i in reach[k]) + 1.0 for i in range(3)])
    for name, who in reach.items():
        rows = torch.stack([by[i] * ROWS[i] for i in who])
        expected = method(any_optimizer()).combine(rows) if len(who) > 1 else rows[0]
        torch.testing.assert_close(params[name].grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("repeats", [False, True])
def test_rows_that_a_method_adds_are_left_out_where_they_repeat_absent_losses(repeats):
    class Adds(gradsurgery.Surgery):
        observes = True
        rows_repeat_tasks = repeats

        def observe(self, rows, losses, params):
            return [*rows, *([[None if g is None else 2 * g for g in row] for row in rows] if repeats else rows[:1])]

        def weights(self, gram, losses):
            seen.append(gram)
            return np.arange(1.0, len(losses) + 1)

    seen = []
    both, one = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = Adds(torch.optim.SGD([both, one], lr=0.1), granularity="parameter", shared_params=[both, one])
    optimizer.backward([ROWS[0] @ (both + one), ROWS[1] @ both, ROWS[2] @ (both + one)])
    rows = ROWS[[0, 2]] if repeats else ROWS * torch.tensor([[1.0], [0.0], [1.0]])
    rows = torch.cat([rows, 2 * rows if repeats else rows[:1]])
    np.testing.assert_allclose(seen[1], (rows @ rows.T).numpy(), rtol=1e-14)
    torch.testing.assert_close(both.grad, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) @ ROWS)
    torch.testing.assert_close(one.grad, ROWS[0] + (2.0 if repeats else 3.0) * ROWS[2])


@pytest.mark.parametrize("method", [gradsurgery.NashMTL, gradsurgery.MoCo, gradsurgery.GradDrop])
def test_the_report_is_free_of_the_loss_scale(method):
    net = Net().float()
    x = torch.randn(8, 5)
    usual = method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(net(x))
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(net(x), scaler=scaler)
    torch.testing.assert_close(found.gram, usual.gram, rtol=1e-5, atol=0)
    assert found.norms == pytest.approx(usual.norms, rel=1e-5)
    assert found.losses == pytest.approx(usual.losses)
    if usual.weights is not None:
        assert found.weights == pytest.approx(usual.weights, rel=1e-4)


# --------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("every", [1, 2])
def test_features_take_weights_from_the_representation(net, x, every):
    optimizer = wrapped(gradsurgery.MGDA, net, every=every)
    losses = net(x)
    rows = torch.stack([torch.autograd.grad(loss, net.z, retain_graph=True)[0].flatten() for loss in losses])
    report = optimizer.backward(losses, features=net.z)
    torch.testing.assert_close(report.gram, rows @ rows.T)
    w = list(report.weights.values())
    losses = net(x)
    expected = torch.autograd.grad(w[0] * losses[0] + w[1] * losses[1], list(net.trunk.parameters()), retain_graph=True)
    for p, g in zip(net.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
    for i, head in enumerate(net.heads):
        assert torch.equal(head.weight.grad, torch.autograd.grad(losses[i], head.weight, retain_graph=True)[0])


def test_features_cost_one_pass_through_the_trunk(net, x):
    passes = []
    net.trunk[0].weight.register_hook(lambda g: passes.append(1))
    losses = net(x)
    wrapped(gradsurgery.MGDA, net).backward(losses, features=[net.z])
    assert len(passes) == 1


def test_every_loss_must_reach_the_features(net, x):
    losses = net(x)
    with pytest.raises(RuntimeError, match="loss '1' does not reach `features`"):
        wrapped(gradsurgery.MGDA, net).backward([losses[0], net.trunk[0].weight.square().sum()], features=net.z)
    with pytest.raises(ValueError, match=r"Given.backward: `features` has no effect here"):
        wrapped(Given, net).backward(net(x), features=net.z)


def test_the_memory_of_a_part_stays_with_its_parameter(net, x):
    """Freezing one parameter must not hand its memory to the next."""
    optimizer = wrapped(gradsurgery.GradVac, net, granularity="parameter")
    optimizer.backward(net(x))
    optimizer.step()
    first = next(net.trunk.parameters())
    before = optimizer.state_dict()["gradsurgery"]["memory"]
    first.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.backward(net(x))
    optimizer.step()
    after = optimizer.state_dict()["gradsurgery"]["memory"]
    position = list(net.parameters()).index(first)
    assert after[f"parameter {position}"] == before[f"parameter {position}"]
    assert after[f"parameter {position + 1}"] != before[f"parameter {position + 1}"]


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (gradsurgery.PCGrad, {"lr": 0.1}, "PCGrad: there is no argument `lr` (give it to SGD, the optimizer inside)."),
        (gradsurgery.CAGrad, {"C": 0.5}, "CAGrad: there is no argument `C` (did you mean `c`?)."),
        (
            gradsurgery.DWAWeighter,
            {"warm_up": 3, "colour": 1},
            "DWAWeighter: there is no argument `warm_up` (did you mean `warmup`?) and none `colour`.",
        ),
    ],
)
def test_unknown_arguments_are_named(net, method, given, said):
    with pytest.raises(TypeError) as error:
        method(torch.optim.SGD(net.parameters(), lr=0.1), **given)
    assert str(error.value) == said
