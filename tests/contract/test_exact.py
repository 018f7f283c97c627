"""How precise inner products are: whatever their rows, and whatever precision the user has allowed elsewhere."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import gradsurgery
from gradsurgery.gradients import exact, ghosts
from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.exact import exactly

CPU = torch.device("cpu")


def switches():
    backends = torch.backends
    return [x.fp32_precision for x in (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul)]


ALLOWED = {
    "all": lambda value: torch.set_float32_matmul_precision("medium" if value else "highest"),
    "cuda": lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if value else "none"),
    "mkldnn": lambda value: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16" if value else "none"),
    "above": lambda value: setattr(torch.backends, "fp32_precision", "tf32" if value else "none"),
}


@pytest.fixture(params=ALLOWED)
def allowed(request):
    start = switches()
    for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        switch.fp32_precision = "none"
    ALLOWED[request.param](True)
    yield switches()
    ALLOWED[request.param](False)
    for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        switch.fp32_precision = "none"
    assert set(switches()) | set(start) <= {"none", "ieee"}


class Watch(TorchFunctionMode):
    """Notes which precisions and casts are allowed while matrices are multiplied."""

    def __init__(self, fails=False):
        super().__init__()
        self.seen = []
        self.fails = fails

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("matmul", "__matmul__", "mm", "bmm"):
            backends = torch.backends
            precisions = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
            self.seen.append((precisions, torch.is_autocast_enabled("cpu")))
            if self.fails:
                raise MemoryError
        return func(*args, **(kwargs or {}))


def ghost_products():
    torch.manual_seed(0)
    layer = nn.Linear(300, 200)
    x = torch.randn(50, 300)
    losses = [layer(x).square().mean(), layer(x).tanh().mean()]
    plan = ghosts.plan(losses, list(layer.parameters()), force=True)
    with torch.autocast("cpu", enabled=False):
        return plan.differentiate(losses, [torch.ones(()), torch.ones(())])


PRODUCTS = {
    "rows": lambda: (lambda rows: gram_module.gram(rows))([[torch.randn(100_000)] for _ in range(2)]),
    "matrix": lambda: gram_module.gram_of_matrix(torch.randn(2, 100_000)),
    "table": lambda: gram_module.Table(torch.randn(2, 100_000)).products(),
    "sum": lambda: rows_module.mixed(torch.randn(2, 100, dtype=torch.bfloat16), np.ones(2)),
    "ghosts": lambda: ghost_products().products(),
    "ghosts, sum": lambda: ghost_products().combine([1.0, 2.0]),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("multiply", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_reduced_precisions_are_held_off_and_given_back(multiply, fails, allowed):
    with torch.autocast("cpu"), Watch(fails) as watch:
        if fails:
            with pytest.raises(MemoryError):
                multiply()
        else:
            multiply()
        assert torch.is_autocast_enabled("cpu")
    assert watch.seen
    assert all(not precisions & {"tf32", "bf16"} and not casts for precisions, casts in watch.seen)
    assert switches() == allowed


def test_what_follows_a_switch_above_goes_on_to_follow_it():
    try:
        torch.backends.fp32_precision = "tf32"
        with exactly(CPU):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "none"
        assert torch.backends.cuda.matmul.fp32_precision == "none"
    finally:
        torch.backends.fp32_precision = "none"


def test_the_last_of_two_threads_gives_back():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    entered, left = threading.Event(), threading.Event()
    inside = []

    def other():
        with exactly(CPU):
            entered.set()
            left.wait(60)
            inside.append(torch.backends.cuda.matmul.fp32_precision)

    thread = threading.Thread(target=other)
    try:
        with exactly(CPU):
            thread.start()
            assert entered.wait(60)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee", "the other one still multiplies"
        left.set()
        thread.join()
        assert inside == ["ieee"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        left.set()
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_step_gives_back_what_it_held_off(allowed):
    torch.manual_seed(0)
    layer = nn.Linear(400, 400)
    x = torch.randn(3, 400)
    y = layer(x)
    gradsurgery.UPGrad(torch.optim.SGD(layer.parameters(), lr=0.1)).backward([y.square().mean(), (y - 1).tanh().mean()])
    assert switches() == allowed


# ------------------------------------------------------------------------------------------------- the bound

# Of one sign, and equal: roundings that do not average out. The factors spread them over all ways to round.
ONE_SIGNED = {
    "equal": lambda n, rng: np.full(n, 1.0) * rng.uniform(1, 2),
    "uniform": lambda n, rng: rng.uniform(0, 1, n),
    "a few large ones first": lambda n, rng: rng.uniform(1, 2) * np.where(np.arange(n) % 128 == 0, 30.0, 0.7),
    "growing": lambda n, rng: np.linspace(0, 1, n) * rng.uniform(1, 2),
}


@pytest.mark.parametrize("n", [2**17 + 1, 2**19, 2**21 + 77])
@pytest.mark.parametrize("entries", ONE_SIGNED.values(), ids=ONE_SIGNED.keys())
def test_products_are_as_precise_as_is_said_whatever_the_number_of_entries(entries, n):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.stack([entries(n, rng) for _ in range(3)])).float()
    table = gram_module.Table([[row] for row in rows])
    exact = rows.double() @ rows.double().T
    lengths = exact.diagonal().sqrt()
    off = float(((table.products() - exact).abs() / torch.outer(lengths, lengths)).max())
    assert off <= table.noise <= 1e-5


def test_few_entries_are_multiplied_in_double_precision_and_are_said_to_be():
    rows = torch.full((4, 1000), 0.1)
    table = gram_module.Table([[row] for row in rows])
    exact = float(rows[0].double() @ rows[0].double())
    assert abs(float(table.products()[0, 1]) - exact) <= 1e-12 * exact  # in single precision it is 1e-6
    assert table.noise == gram_module.Table(rows).noise == 2e-7


def test_the_one_switch_of_older_torch_is_held_off_and_given_back(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(exact, "_allowed", lambda: [(None, "high")])
    with exactly(CPU):
        assert set_to == ["highest"]
    assert set_to == ["highest", "high"]
