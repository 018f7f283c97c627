"""Methods by name: what configuration files may say, and what they are told."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.optimizer import options_of
from gradsurgery.text import spellings

NEEDED = {
    "GradNormWeighter": {"shared_params": None},
    "Krum": {"n_byzantine": 0},
    "PriorLossWeighter": {"priors": [1.0, 1.0]},
    "SandMask": {"tau": 0.5},
}


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


def needed(name, base):
    options = dict(NEEDED.get(name, {}))
    return {key: base.param_groups[0]["params"] if value is None else value for key, value in options.items()}


def test_all_methods_are_there_and_nothing_else():
    found = gradsurgery.methods()
    assert list(found) == sorted(found, key=str.casefold)
    for name, value in found.items():
        assert value is getattr(gradsurgery, name)
        assert issubclass(value, gradsurgery.MultiLossOptimizer)
    left_out = {
        name
        for name in set(gradsurgery.__all__) - set(found)
        if inspect.isclass(x := getattr(gradsurgery, name)) and issubclass(x, gradsurgery.MultiLossOptimizer)
    }
    assert left_out == {"MultiLossOptimizer", "Surgery", "Weighter"}
    found.clear()
    assert gradsurgery.methods(), "a caller cannot empty the table"


@pytest.mark.parametrize("name", gradsurgery.methods())
def test_every_method_is_made_by_its_name(name):
    base = sgd()
    base = torch.optim.SGD(base.param_groups[0]["params"], lr=0.1)
    if "params" in inspect.signature(getattr(gradsurgery, name)).parameters:  # it is the optimizer itself
        assert type(gradsurgery.create(name, base.param_groups[0]["params"], lr=0.1)) is getattr(gradsurgery, name)
        return
    made = gradsurgery.create(name, base, **needed(name, base))
    assert type(made) is getattr(gradsurgery, name)
    assert made.base is base


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pcgrad", "PCGrad"),
        ("PC_Grad", "PCGrad"),
        ("nash-mtl", "NashMTL"),
        ("IMTL-G", "IMTLG"),
        ("imtl_l", "IMTLLWeighter"),
        ("UNCERTAINTY", "UncertaintyWeighter"),
        ("uncertainty_weighter", "UncertaintyWeighter"),
        ("and-mask", "AndMask"),
    ],
)
def test_spellings(text, name):
    assert gradsurgery.method(text) is getattr(gradsurgery, name)


def test_no_two_methods_share_a_spelling():
    known = gradsurgery.methods()
    by_name = {name: {key for key, value in spellings(known).items() if value == name} for name in known}
    assert all(by_name.values())
    assert all(not a & b for a, b in itertools.combinations(by_name.values(), 2))
    for name in known:
        assert gradsurgery.method(name.removesuffix("Weighter")) is known[name]


@pytest.mark.parametrize("ask", [gradsurgery.method, lambda name: gradsurgery.create(name, sgd())])
def test_an_unknown_name_is_told_what_is_near(ask):
    with pytest.raises(ValueError, match=r"there is no method 'pcgard'\. Did you mean PCGrad"):
        ask("pcgard")
    with pytest.raises(ValueError, match=r"there is no method 'xyzzy'\. gradsurgery\.methods\(\) has all"):
        ask("xyzzy")
    for base in ("Surgery", "Weighter", "", "Report", "__init__"):
        with pytest.raises(ValueError, match="there is no method"):
            ask(base)
    with pytest.raises(TypeError, match="`name` must be the name of a method, got <class"):
        ask(gradsurgery.PCGrad)


def test_an_unknown_option_is_told_what_there_is():
    with pytest.raises(TypeError) as caught:
        gradsurgery.create("cagrad", sgd(), resacle=1)
    said = str(caught.value)
    assert said.startswith("create: CAGrad: there is no argument `resacle` (did you mean `rescale`?). It takes `c`, ")
    assert "what every surgery takes: " in said
    assert "`granularity`" in said
    assert "`reduction`" in said
    with pytest.raises(TypeError, match=r"`lr` \(give it to SGD, the optimizer inside\)"):
        gradsurgery.create("cagrad", sgd(), lr=1)
    with pytest.raises(TypeError, match=r"It takes no options of its own, and what every weighting takes: `reduction`"):
        gradsurgery.create("RealTime", sgd(), temperature=1)


def test_a_missing_option_is_named():
    with pytest.raises(TypeError, match=r"^create: SandMask needs `tau`\. It takes `tau`, `k`, `relative`, and"):
        gradsurgery.create("sandmask", sgd())
    with pytest.raises(TypeError, match=r"^create: PriorLossWeighter needs `priors`"):
        gradsurgery.create("prior-loss", sgd())


def test_what_the_class_refuses_it_still_refuses():
    with pytest.raises(ValueError, match="CAGrad: `c` must be"):
        gradsurgery.create("cagrad", sgd(), c="0.5")
    with pytest.raises(TypeError, match=r"PCGrad: `optimizer` must be a torch.optim.Optimizer"):
        gradsurgery.create("pcgrad", nn.Linear(1, 1).parameters(), nothing=1)


def test_a_weighter_inside():
    made = gradsurgery.create("pcgrad", gradsurgery.create("fixed", sgd(), weights=[1.0, 2.0]), reduction="mean")
    (p,) = made.param_groups[0]["params"]
    made.backward([p[0], p[1]])
    assert p.grad.tolist() == [0.5, 1.0]


def test_options_of_a_class_of_the_users_own():
    class Mine(gradsurgery.PCGrad):
        def __init__(self, optimizer, *, strength=1.0, **switches):
            super().__init__(optimizer, **switches)

    assert options_of(Mine) == ["strength", *options_of(gradsurgery.PCGrad)]
    assert {"shuffle", "granularity", "reduction"} < set(options_of(Mine))
    with pytest.raises(TypeError, match=r"Mine: there is no argument `strenth` \(did you mean `strength`\?\)"):
        Mine(sgd(), strenth=2.0)
