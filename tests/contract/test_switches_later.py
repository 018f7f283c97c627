"""Switches that are set on a method after it was made are checked as those that it is made with."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery
from gradsurgery.settings import Switch

WRONG = {
    "reduction": "avg",
    "nonfinite": "ignore",
    "every": 0,
    "warmup": -1,
    "preference": {"a": -1.0},
    "weight_momentum": 1.0,
    "min_weight": "low",
    "max_weight": math.nan,
    "seed": -3,
    "normalize": "l3",
    "granularity": "layer",
    "engine": "fast",
    "row_dtype": torch.float16,
    "row_device": "nowhere",
    "shared_params": "trunk",
}
RIGHT = {
    "reduction": "mean",
    "nonfinite": "skip",
    "every": 3,
    "warmup": 2,
    "preference": {"a": 2.0, "b": 1.0},
    "weight_momentum": 0.5,
    "min_weight": 0.1,
    "max_weight": 4,
    "seed": 7,
    "distributed": True,
    "process_group": None,
    "debug": True,
    "normalize": "l2",
    "log_losses": True,
    "granularity": "group",
    "engine": "rows",
    "row_dtype": torch.bfloat16,
    "row_device": "cpu",
}
OF_WEIGHTERS = [name for name in WRONG if hasattr(gradsurgery.Weighter, name)]


def made(kind=gradsurgery.UPGrad, **options):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return kind(torch.optim.SGD(net.parameters(), lr=0.1), **options)


def switches(kind):
    return {key for entry in kind.__mro__ for key, value in vars(entry).items() if isinstance(value, Switch)}


def test_all_switches_are_tried_here():
    assert switches(gradsurgery.Surgery) == WRONG.keys() | RIGHT.keys()


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((gradsurgery.UPGrad, name) for name in WRONG), *((gradsurgery.DWAWeighter, name) for name in OF_WEIGHTERS)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_value_is_told_as_in_the_constructor_and_the_old_one_stays(kind, name):
    with pytest.raises((ValueError, TypeError)) as wanted:
        made(kind, **{name: WRONG[name]})
    optimizer = made(kind)
    before = getattr(optimizer, name)
    with pytest.raises(wanted.type) as found:
        setattr(optimizer, name, WRONG[name])
    assert str(found.value) == str(wanted.value)
    assert name in str(found.value)
    assert kind.__name__ in str(found.value)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_value_is_what_the_constructor_makes_of_it(name):
    wanted = made(**{name: RIGHT[name]})
    optimizer = made()
    setattr(optimizer, name, RIGHT[name])
    assert optimizer.settings == wanted.settings
    assert optimizer.needs_losses == wanted.needs_losses


@pytest.mark.parametrize("name", sorted(switches(gradsurgery.Surgery)))
@pytest.mark.parametrize("options", [{}, {"preference": [1.0, 2.0], "min_weight": 0.5}])
def test_what_an_attribute_gives_it_takes(name, options):
    optimizer = made(**options)
    before = optimizer.settings
    setattr(optimizer, name, getattr(optimizer, name))
    assert optimizer.settings == before
    assert type(optimizer.preference) is type(before.preference)


def test_bounds_are_taken_away_by_none():
    optimizer = made(min_weight=0.5, max_weight=2.0)
    optimizer.min_weight = optimizer.max_weight = None
    assert (optimizer.min_weight, optimizer.max_weight) == (-math.inf, math.inf)


TOGETHER = {
    "bounds": (made, {"max_weight": 1.0}, "min_weight", 2.0, "`min_weight` 2.0 exceeds `max_weight` 1.0"),
    "cadence": (made, {"granularity": "group"}, "every", 2, "`every` > 1 needs granularity"),
    "defer": (made, {}, "nonfinite", "defer", '`nonfinite` "defer" needs weights'),
    "defer, spread": (
        lambda **o: made(gradsurgery.DWAWeighter, **o), {"nonfinite": "defer"}, "distributed", True, "in one process",
    ),
    "preference": (lambda: made(gradsurgery.MTAdamOfRows), {}, "preference", [1.0, 2.0], "`preference`"),
    "no weights": (lambda: made(gradsurgery.GradDrop), {}, "weight_momentum", 0.5, "one weight per loss"),
    "rows put away": (made, {"row_dtype": torch.bfloat16}, "engine", "ghosts", "need rows"),
    "rows that are kept": (lambda: made(gradsurgery.MoCo), {}, "row_device", "cpu", "forgets its rows"),
    "a weighter inside": (
        lambda: gradsurgery.UPGrad(made(gradsurgery.DWAWeighter)), {}, "log_losses", True, "excludes a weighter inside",
    ),
    "streaming": (lambda: made(gradsurgery.PCGrad, streaming=True), {}, "engine", "rows", "streaming=True excludes"),
    "own directions": (lambda: made(gradsurgery.MConFIG), {}, "normalize", "l2", "`normalize` has no effect"),
    "own lengths": (lambda: made(gradsurgery.DBMTL), {}, "normalize", "l2", "`normalize` has no effect"),
}  # fmt: skip
del TOGETHER["preference"]


@pytest.mark.parametrize("case", TOGETHER)
def test_switches_that_exclude_each_other_do_so_later_too(case):
    make, options, name, value, message = TOGETHER[case]
    optimizer = make(**options)
    before = optimizer.settings
    with pytest.raises(ValueError, match=message):
        setattr(optimizer, name, value)
    assert optimizer.settings is before


def test_adam_per_loss_refuses_later_what_it_refuses_first():
    optimizer = gradsurgery.MultiAdam(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="`warmup` has no meaning here"):
        optimizer.warmup = 2
    assert optimizer.warmup == 0


def test_a_group_of_processes_is_a_promise_to_exchange():
    optimizer, group = made(), object()
    optimizer.process_group = group
    assert optimizer.distributed
    with pytest.raises(ValueError, match=r"UPGrad: `distributed` must be true with a `process_group`, got False\."):
        optimizer.distributed = False
    assert optimizer.distributed


def test_losses_are_asked_for_once_the_method_reads_them():
    optimizer = made()
    optimizer.combine(torch.eye(2))
    optimizer.normalize = "loss"
    with pytest.raises(ValueError, match="losses"):
        optimizer.combine(torch.eye(2))


def test_losses_are_not_asked_for_any_more():
    optimizer = made(normalize="loss")
    optimizer.normalize = "none"
    optimizer.combine(torch.eye(2))


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_rows_that_are_put_away_later_are_formed_as_long_as_they_are(engine):
    optimizer = made(engine=engine)
    optimizer.row_dtype = torch.bfloat16
    assert optimizer.engine == "rows"
    optimizer.row_dtype = None
    assert optimizer.engine == engine
    optimizer = made(row_dtype=torch.bfloat16, engine="rows")
    optimizer.engine = engine
    assert optimizer.engine == "rows"
    optimizer.row_dtype = None
    assert optimizer.engine == engine


@pytest.mark.parametrize("name", ["normalise", "Normalize", "reductions", "shared_param", "max_weights", "log_loss"])
def test_what_is_nearly_a_switch_is_told_once(name):
    optimizer = made()
    with pytest.warns(UserWarning, match=rf"UPGrad: there is no switch `{name}`, .* Did you mean `\w+`\?") as told:
        setattr(optimizer, name, "loss")
    assert len(told) == 1
    setattr(optimizer, name, "l2")  # a warning is an error here
    assert optimizer.normalize == "none"


class Own(gradsurgery.Surgery):
    """A method that has attributes of its own, with names near those of switches."""

    def __init__(self, optimizer, **switches):
        super().__init__(optimizer, **switches)
        self.seeds = 3
        self.note = "own"

    def weights(self, gram, losses):
        self.preferences_seen = len(gram)
        return np.ones(len(gram))

    @property
    def reference(self):
        """Set by a property, and by a function inside another."""
        return self.seeds

    @reference.setter
    def reference(self, value):
        def take(name):
            setattr(self, name, value)

        take("seeded")


def test_a_subclass_may_have_attributes_with_names_like_those_of_switches():
    optimizer = made(Own)
    optimizer.combine(torch.eye(2))
    optimizer.seeds = 4
    optimizer.reference = 5
    assert (optimizer.seeds, optimizer.seeded, optimizer.preferences_seen) == (4, 5, 2)
    optimizer.initial_lr = optimizer.tag = "anything else"
    optimizer._engine = optimizer._seed = "what a framework keeps"
    assert pickle.loads(pickle.dumps(optimizer)).seeds == 4
    assert copy.deepcopy(optimizer).tag == "anything else"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.lr_scheduler.LinearLR(optimizer)
