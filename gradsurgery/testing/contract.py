"""What every method owes its users, and what its paper promises, tried on inputs of all kinds."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.settings import shown
from gradsurgery.surgery.base import Surgery
from gradsurgery.testing import properties
from gradsurgery.testing.inputs import KINDS, Array, Input, drawn, possible
from gradsurgery.weighting.base import Weighter

Build = Callable[[Optimizer], MultiLossOptimizer]


@dataclass(frozen=True)
class Checked:
    """What :func:`check` has tried.

    Attributes:
        method: The name of the class.
        seed: Of the inputs.
        inputs: On how many inputs each promise was tried, by the name of the promise.
    """

    method: str
    seed: int
    inputs: dict[str, int]

    def __str__(self) -> str:
        tried = ", ".join(f"{name} ({count})" for name, count in self.inputs.items())
        return f"{self.method}, seed {self.seed}: {tried}"


class Subject:
    """A method under examination.

    Args:
        build: Makes the method around an optimizer.
        after_step: Called with the method after each step.
        names: Of the losses; None for "0", "1" and so on, as many as the input has.

    Raises:
        ValueError: `build` gives the same method twice.
    """

    def __init__(self, build: Build, after_step: Callable[[Any], object] | None, names: Sequence[str] | None) -> None:
        self.build, self.after_step, self.names = build, after_step, names
        one, other = self.made(nn.Parameter(torch.zeros(1))), self.made(nn.Parameter(torch.zeros(1)))
        if one is other:
            raise ValueError("check: `build` must make a new method in each call, and it gave the same one twice.")
        self.method = one

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.method.display_name

    def made(self, p: nn.Parameter) -> MultiLossOptimizer:
        """Make the method for one parameter.

        Args:
            p: The parameter.

        Returns:
            The method.

        Raises:
            TypeError: There is none.
            ValueError: It trains other parameters.
        """
        optimizer = torch.optim.SGD([p], lr=0.125)
        method = self.build(optimizer)
        if not isinstance(method, (Surgery, Weighter)):
            raise TypeError(f"check: `build` must return a Surgery or a Weighter, got {shown(method)}.")
        if all(q is not p for group in method.param_groups for q in group["params"]):
            raise ValueError("check: `build` must train the parameters of the optimizer that it is given.")
        return method

    def start(self, item: Input, order: Sequence[int] = ()) -> Run:
        """Begin a training.

        Args:
            item: The gradients and the losses.
            order: In which the losses are given; as they are by default.

        Returns:
            The training, before its first step.
        """
        p = nn.Parameter(torch.zeros(item.rows.shape[1], dtype=torch.float64))
        return Run(self, item, p, self.made(p), order or range(len(item.rows)))

    def direct(self, losses: Array) -> properties.Direction:
        """The surgery as a function.

        Args:
            losses: Values of the losses, (m,); rows beyond them get the first one once more.

        Returns:
            From rows to the direction.
        """
        method = self.method
        assert isinstance(method, Surgery)

        def direction(rows: Array) -> Array:
            values = np.resize(losses, len(rows))
            return np.asarray(method.combine(torch.from_numpy(rows.copy()), losses=values.tolist()).numpy())

        return direction

    def weights(self, item: Input, order: Sequence[int] = ()) -> Array:
        """Weights over a training.

        Args:
            item: The gradients and the losses.
            order: In which the losses are given; as they are by default.

        Returns:
            One row per step, (t, m), in the order of the input.

        Raises:
            AssertionError: The method reports no weights.
        """
        run = self.start(item, order)
        reports = [run.step(t) for t in range(len(item.history))]
        _require(all(report.weights is not None for report in reports), "the report has no weights")
        return np.array([[report.weights[name] for name in run.names] for report in reports])


class Run:
    """A training of one parameter on losses that are linear in it.

    Args:
        subject: The method under examination.
        item: The gradients and the losses.
        p: The parameter.
        method: The method around its optimizer.
        order: In which the losses are given.
    """

    def __init__(
        self, subject: Subject, item: Input, p: nn.Parameter, method: MultiLossOptimizer, order: Sequence[int]
    ) -> None:
        self.subject, self.item, self.p, self.method, self.order = subject, item, p, method, order
        self.names = subject.names or [str(i) for i in range(len(item.rows))]

    def losses(self, t: int, absent: Sequence[int] = ()) -> dict[str, Tensor | None]:
        """The losses of a step.

        Args:
            t: The step.
            absent: Which losses are None.

        Returns:
            By name. The gradient of each is its row exactly, and its value that of the history.
        """
        here = self.p - self.p.detach()
        values = self.item.history[t % len(self.item.history)].tolist()
        rows = torch.from_numpy(self.item.rows)
        losses = [row @ here + value for row, value in zip(rows, values, strict=True)]
        return {self.names[i]: None if i in absent else losses[i] for i in self.order}

    def backward(self, t: int, absent: Sequence[int] = ()) -> Any:
        """Clear the gradient and call ``backward``.

        Args:
            t: The step.
            absent: Which losses are None.

        Returns:
            The report.
        """
        self.method.zero_grad()
        return self.method.backward(self.losses(t, absent))

    def step(self, t: int, absent: Sequence[int] = ()) -> Any:
        """Make a step.

        Args:
            t: The step.
            absent: Which losses are None.

        Returns:
            The report.
        """
        report = self.backward(t, absent)
        self.end_step()
        return report

    def end_step(self) -> None:
        """Update the parameter."""
        self.method.step()
        if self.subject.after_step is not None:
            self.subject.after_step(self.method)

    def gradient(self) -> Tensor:
        """Look at ``.grad``.

        Returns:
            A copy; zeros where there is none.
        """
        return torch.zeros_like(self.p) if self.p.grad is None else self.p.grad.clone()

    def memory(self) -> dict[str, Any]:
        """Look at what the method has learnt.

        Returns:
            A copy.
        """
        return copy.deepcopy(self.method.state_dict()["gradsurgery"])


def _require(holds: bool | np.bool_, said: str) -> None:
    if not holds:
        raise AssertionError(said)


def _same(one: Any, other: Any) -> bool:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _require_same_memory(now: Any, before: Any, when: str) -> None:
    keys = now["memory"].keys() | before["memory"].keys()
    moved = sorted(k for k in keys if not _same(now["memory"].get(k), before["memory"].get(k)))
    _require(_same(now, before), f"{when}: the memory has changed in {moved}")


# -------------------------------------------------------------------------------------- what every method owes


def _finite(subject: Subject, item: Input, _: Any) -> None:
    run = subject.start(item)
    for t in range(3):
        report = run.step(t)
        _require(bool(run.gradient().isfinite().all()), f"step {t}: `.grad` is {run.gradient().tolist()}")
        given = [] if report.weights is None else list(report.weights.values())
        _require(np.isfinite(given).all(), f"step {t}: the weights are {given}")


def _written(subject: Subject, item: Input, _: Any) -> None:
    """Surgery: ``.grad`` is what ``combine`` says. Weighting: it is Σ wᵢ gᵢ with the weights of the report."""
    run = subject.start(item)
    for t in range(3):
        if isinstance(run.method, Surgery) and not isinstance(run.method.base, Weighter):
            wanted: Tensor | None = run.method.combine(
                torch.from_numpy(item.rows.copy()), losses=item.history[t].tolist()
            )
            run.backward(t)
        else:
            given = run.backward(t).weights
            wanted = None if given is None else torch.from_numpy(np.array(list(given.values())) @ item.rows)
        if wanted is not None:
            _require_close(run.gradient(), wanted, item, f"step {t}: `.grad`")
        run.end_step()


def _require_close(found: Tensor, wanted: Tensor, item: Input, what: str) -> None:
    size = max(float(wanted.abs().max()), float(np.abs(item.rows).max()))
    error = float((found - wanted).abs().max())
    _require(error <= 1e-9 * size, f"{what} is {found.tolist()}, and should be {wanted.tolist()}")


def _added(subject: Subject, item: Input, _: Any) -> None:
    run, twin = subject.start(item), subject.start(item)
    # Nothing that a sum of rows could be by chance.
    before = torch.linspace(0.3, 0.7, run.p.numel(), dtype=run.p.dtype) * (float(np.abs(item.rows).max()) or 1.0)
    run.p.grad = before.clone()
    run.method.backward(run.losses(0))
    twin.backward(0)
    _require_close(run.gradient(), before + twin.gradient(), item, "`.grad`, which had a gradient already,")


def _unchanged(subject: Subject, item: Input, _: Any) -> None:
    """``weights`` changes neither the inner products nor the losses that it is given, and ``backward`` no parameter."""
    run = subject.start(item)
    run.step(0)
    kept = run.method.state_dict()["gradsurgery"]
    frozen, there = copy.deepcopy(kept), run.p.detach().clone()
    seen = _watch(run.method)
    report = run.backward(1)
    _require(torch.equal(run.p, there), "`backward` has changed the parameter")
    for before, after in seen:
        _require(np.array_equal(before, after, equal_nan=True), f"`weights` has made {after} of its argument {before}")
    given = dict(zip(run.losses(1), item.history[1].tolist(), strict=True))
    _require(report.losses == given, f"the report has the losses {report.losses}, which were {given}")
    run.method.step()
    _require_same_memory(kept, frozen, "a state that was saved before this step")


def _watch(method: Any) -> list[tuple[Any, Any]]:
    """Copies of what ``weights`` is given, beside the arguments themselves as it leaves them."""
    seen: list[tuple[Any, Any]] = []
    original = method.weights

    def weights(*arguments: Any) -> Any:
        seen.extend((copy.deepcopy(a), a) for a in arguments)
        return original(*arguments)

    method.weights = weights
    return seen


def _discarded(subject: Subject, item: Input, _: Any) -> None:
    run = subject.start(item)
    for t in range(3):
        run.step(t)
    before = run.memory()
    run.backward(3)
    first = run.gradient()
    run.method.zero_grad()
    _require_same_memory(run.memory(), before, "`backward` and then `zero_grad`, without a step")
    run.backward(3)
    _require(
        torch.equal(run.gradient(), first),
        f"the same call of `backward` gives {first.tolist()} and then {run.gradient().tolist()}",
    )


def _resumed(subject: Subject, item: Input, _: Any) -> None:
    whole, resumed = subject.start(item), subject.start(item)
    for t in range(4):
        whole.step(t)
    file = io.BytesIO()
    torch.save(whole.method.state_dict(), file)
    file.seek(0)
    resumed.method.load_state_dict(torch.load(file, weights_only=True))
    resumed.p.data.copy_(whole.p.data)
    for t in range(4, 7):
        whole.backward(t)
        resumed.backward(t)
        _require(
            torch.equal(whole.gradient(), resumed.gradient()),
            f"step {t}: `.grad` is {resumed.gradient().tolist()} in the run that was resumed before step 4, and "
            f"{whole.gradient().tolist()} in the one that was not",
        )
        for run in (whole, resumed):
            run.end_step()
    _require_same_memory(resumed.memory(), whole.memory(), "a run that was resumed")


def _absent(subject: Subject, item: Input, _: Any) -> None:
    """A task that is None is left alone: what is kept for it stays, and the others go on."""
    run = subject.start(item)
    last = len(item.rows) - 1
    name = run.names[last]
    for t in range(2):
        run.step(t)
    before = run.memory()["memory"]
    report = run.step(2, absent=[last])
    _require(name not in report.names, "the report names a loss that is None")
    _require(bool(run.gradient().isfinite().all()), f"without one loss `.grad` is {run.gradient().tolist()}")
    after = run.memory()["memory"]
    for key, value in before.items():
        if isinstance(value, dict) and name in value:
            now = after.get(key, {}).get(name, value[name])
            _require(_same(now, value[name]), f"{key!r} of a loss that is None went from {value} to {after[key]}")
    run.step(3)
    _require(bool(run.gradient().isfinite().all()), f"once it is back `.grad` is {run.gradient().tolist()}")


class _Stop(Exception):
    pass


def _raise(*_: Any) -> Any:
    raise _Stop


def _on_error(subject: Subject, item: Input, _: Any) -> None:
    """``.grad`` and the memory are as before whatever raises: a loss, a backward pass, or the method at its end."""
    run = subject.start(item)
    run.step(0)
    run.method.zero_grad()
    before = run.memory()
    for what in ("a loss is nan", "a backward pass raises", "`weights` raises at its end"):
        run.p.grad = torch.ones_like(run.p)
        _fail(run, what)
        _require(
            run.p.grad is not None and torch.equal(run.p.grad, torch.ones_like(run.p)),
            f"{what}: `.grad` was ones, and is {run.gradient().tolist()}",
        )
        _require_same_memory(run.memory(), before, what)


def _fail(run: Run, what: str) -> None:
    losses, method = run.losses(1), run.method
    last = losses[run.names[-1]]
    assert last is not None
    handle = None
    own: Any = method
    if what == "a loss is nan":
        losses[run.names[-1]] = last * float("nan")
    elif what == "a backward pass raises":
        handle = run.p.register_hook(_raise)
    else:
        original = own.weights
        own.weights = lambda *arguments: (original(*arguments), _raise())
    try:
        method.backward(losses)
    except (_Stop, RuntimeError):
        return
    finally:
        if handle is not None:
            handle.remove()
        vars(method).pop("weights", None)
    raise AssertionError(f"{what}, and `backward` goes on")


# ------------------------------------------------------------------------------------- what papers promise


def _common_descent(subject: Subject, item: Input, most: Any) -> None:
    rows = item.rows if most is True else item.rows[: int(most)]
    properties.assert_common_descent(subject.direct(item.losses), rows)


def _homogeneous(subject: Subject, item: Input, degree: Any) -> None:
    for factor in (2.0**-30, 2.0**-3, 2.0**25):
        properties.assert_homogeneous(subject.direct(item.losses), item.rows, factor, degree)


def _row_scale(subject: Subject, item: Input, _: Any) -> None:
    factors = 2.0 ** np.random.default_rng(item.number).integers(-20, 21, len(item.rows))
    properties.assert_row_scale_invariant(subject.direct(item.losses), item.rows, factors.tolist())


def _orders(item: Input) -> Iterator[list[int]]:
    m = len(item.rows)
    yield list(range(m))[::-1]
    yield [*range(1, m), 0]


def _permutation(subject: Subject, item: Input, _: Any) -> None:
    for order in _orders(item):
        direction = subject.direct(item.losses)
        other = subject.direct(item.losses[order])
        d, turned = direction(item.rows), other(item.rows[order])
        size = max(float(np.abs(d).max()), float(np.abs(item.rows).max()))
        _require(
            np.abs(d - turned).max() <= 1e-9 * size,
            f"d = {d.tolist()}, and {turned.tolist()} for the tasks in the order {order}",
        )


def _rotation(subject: Subject, item: Input, _: Any) -> None:
    properties.assert_rotation_equivariant(subject.direct(item.losses), item.rows)


def _copies(subject: Subject, item: Input, _: Any) -> None:
    properties.assert_ignores_copies(subject.direct(item.losses), item.rows)


def _plain_sum(subject: Subject, item: Input, _: Any) -> None:
    properties.assert_plain_sum_without_conflict(subject.direct(item.losses), item.rows)


def _equal_rows(subject: Subject, item: Input, scale: Any) -> None:
    m = 2 + item.number % 4
    properties.assert_equal_rows(subject.direct(item.losses), item.rows[0], m, m if scale == "sum" else 1)


def _one_loss(subject: Subject, item: Input, of: Any) -> None:
    (row,) = item.rows
    run = subject.start(item)
    run.backward(0)
    for d in (subject.direct(item.losses)(item.rows), run.gradient().numpy()):
        if of == "direction":
            d, row = d / np.linalg.norm(d), row / np.linalg.norm(row)
        _require(np.abs(d - row).max() <= 1e-12 * np.abs(row).max(), f"d = {d.tolist()} for one row {row.tolist()}")


def _zero_direction(subject: Subject, item: Input, _: Any) -> None:
    run = subject.start(item)
    report = run.backward(0)
    _require(not run.gradient().any(), f"the input is Pareto-stationary, and d = {run.gradient().tolist()}")
    _require("stationary" in report.flags, f"the input is Pareto-stationary, and the flags are {report.flags}")


def _zero_rows(subject: Subject, item: Input, what: Any) -> None:
    if what == "stationary":
        return _zero_direction(subject, item, what)
    others = item.rows[item.rows.any(axis=1)]
    losses = item.losses[item.rows.any(axis=1)]
    d, without = subject.direct(item.losses)(item.rows), subject.direct(losses)(others)
    d, without = (x / (np.linalg.norm(x) or 1.0) for x in (d, without))
    _require(np.abs(d - without).max() <= 1e-9, f"d points along {d.tolist()}, and {without.tolist()} without the row")
    return None


def _total(subject: Subject, item: Input, mean: Any) -> None:
    for t, given in enumerate(subject.weights(item)):
        wanted = 1.0 if mean is True else float(mean)
        _require(abs(given.mean() - wanted) <= 1e-8 * abs(wanted), f"step {t}: the weights {given.tolist()}")


def _weights_permuted(subject: Subject, item: Input, _: Any) -> None:
    for order in _orders(item):
        _require_weights(subject.weights(item, order), subject.weights(item), f"in the order {order}")


def _require_weights(found: Array, wanted: Array, when: str) -> None:
    for t, (w, v) in enumerate(zip(found, wanted, strict=True)):
        _require(
            np.abs(w - v).max() <= 1e-6 * np.abs(v).max(), f"step {t}: weights {w.tolist()} {when}, not {v.tolist()}"
        )


def _loss_scale(subject: Subject, item: Input, stays: Any) -> None:
    for factor in (1e-6, 7.0, 1e4):
        factors = np.where(np.arange(len(item.rows)) == item.number % len(item.rows), factor, 1.0)
        other = Input(item.kind, item.number, item.rows * factors[:, None], item.history * factors)
        plain, scaled = subject.weights(item), subject.weights(other)
        if stays == "terms":
            plain, scaled = plain * item.history, scaled * other.history
            plain, scaled = (x / x.sum(axis=1, keepdims=True) for x in (plain, scaled))
        _require_weights(scaled, plain, f"with one loss times {factor:g}")


def _weights_homogeneous(subject: Subject, item: Input, degree: Any) -> None:
    for factor in (1e-9, 1e6):
        other = Input(item.kind, item.number, item.rows * factor, item.history * factor)
        wanted = subject.weights(item) * factor ** float(degree)
        _require_weights(subject.weights(other), wanted, f"with all losses times {factor:g}")


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        says: What is promised.
        test: Raises AssertionError where it is broken.
        kinds: On which kinds of input it is tried.
        default: What is promised if only its name is given.
        values: What may be given instead; empty if any number may.
    """

    says: str
    test: Callable[[Subject, Input, Any], None]
    kinds: Sequence[str]
    default: Any = True
    values: tuple[Any, ...] = (True,)


ALL = tuple(KINDS)
#: Of two losses or more: a surgery is not asked about one alone.
USUAL = ("random", "conflicting", "badly scaled")
EXACT = ("random", "independent", "dependent", "conflicting")

#: What every method owes its users.
CONTRACT = {
    "finite": Promise("gradients and weights are finite on every input", _finite, ALL),
    "written": Promise("`.grad` is what `combine` says, or the sum with the weights of the report", _written, USUAL),
    "added": Promise("the direction is added to what `.grad` holds", _added, USUAL),
    "no change in place": Promise("arguments, losses, parameters and saved states stay as they are", _unchanged, USUAL),
    "discard": Promise("`backward` teaches nothing before `step`, and repeats itself", _discarded, USUAL),
    "resume": Promise("after `load_state_dict` all goes on bit for bit", _resumed, ("nearly dependent", *USUAL)),
    "absent tasks": Promise("a loss that is None is left alone", _absent, USUAL),
    "grad on error": Promise("`.grad` and the memory are as before where something raises", _on_error, USUAL),
}
#: What the paper of a surgery may promise.
SURGERY = {
    "common descent": Promise(
        "no loss rises to first order, for any number of tasks or up to the one given", _common_descent, ALL, values=()
    ),
    "common descent at full rank": Promise(
        "no loss rises where the rows are independent", _common_descent, ("independent", "conflicting", "badly scaled")
    ),
    "homogeneous": Promise(
        "d(sJ) = s^degree d(J); the degree is 1 unless another is given", _homogeneous, EXACT, default=1, values=()
    ),
    "row scale": Promise(
        "the direction does not turn when independent rows are scaled", _row_scale, ("independent", "conflicting")
    ),
    "permutation": Promise("the order of the tasks does not matter", _permutation, USUAL),
    "rotation": Promise("only inner products count", _rotation, EXACT),
    "copies": Promise("a copy of a row does not turn the direction", _copies, ("independent", "conflicting")),
    "plain sum": Promise("without conflict the direction is the plain sum", _plain_sum, ("aligned",)),
    "equal rows": Promise(
        'm equal rows g give m g; "priority": g', _equal_rows, ("one loss",), default="sum", values=("sum", "priority")
    ),
    "one loss": Promise(
        'one loss gives its own gradient; "direction": up to its length',
        _one_loss,
        ("one loss",),
        default="gradient",
        values=("gradient", "direction"),
    ),
    "stationary": Promise(
        'Pareto-stationary input gives exactly zero and the flag "stationary"', _zero_direction, ("stationary",)
    ),
    "zero rows": Promise(
        'a zero row does not turn the direction; "stationary": it makes the input stationary',
        _zero_rows,
        ("zero row",),
        default="left out",
        values=("left out", "stationary"),
    ),
}
#: What the paper of a weighting may promise.
WEIGHTING = {
    "total": Promise("the mean weight is 1, or the number given", _total, USUAL, values=()),
    "permutation": Promise("the order of the tasks does not matter", _weights_permuted, USUAL),
    "loss scale": Promise(
        'weights stay when one loss is scaled over the whole run; "terms": weighted losses stay in proportion',
        _loss_scale,
        ("independent",),
        default="weights",
        values=("weights", "terms"),
    ),
    "homogeneous": Promise(
        "w(s l) = s^degree w(l) when all losses are scaled; the degree is 0 unless another is given",
        _weights_homogeneous,
        ("independent",),
        default=0,
        values=(),
    ),
}


def _asked(subject: Subject, promises: Iterable[str] | Mapping[str, Any]) -> dict[str, tuple[Promise, Any]]:
    """The contract and the promises, each with what is promised."""
    known = SURGERY if isinstance(subject.method, Surgery) else WEIGHTING
    if isinstance(promises, str):
        promises = [promises]
    given = dict(promises) if isinstance(promises, Mapping) else dict.fromkeys(promises)
    found = {name: (promise, promise.default) for name, promise in CONTRACT.items()}
    for name, value in given.items():
        if name not in known:
            listed = "".join(f"\n  {key!r}: {promise.says}" for key, promise in known.items())
            raise ValueError(f"check: {subject.name} cannot promise {name!r}. What it can promise:{listed}")
        promise = known[name]
        value = promise.default if value is None else value
        if promise.values and value not in promise.values:
            raise ValueError(f"check: {name!r} must be one of {promise.values}, got {value!r}.")
        if not promise.values and not isinstance(value, (int, float)):
            raise ValueError(f"check: {name!r} must be a number, got {value!r}.")
        found[name] = promise, value
    return found


def _broken(subject: Subject, name: str, promise: Promise, value: Any, items: Iterable[Input]) -> str:
    """Where a promise is broken first; empty if it is not."""
    for item in items:
        try:
            promise.test(subject, item, value)
        except Exception as error:
            figures = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            return (
                f"\n- {name!r} ({promise.says}), on {item.kind} input {item.number}: {figures}"
                f"\n  rows = {item.rows.tolist()}\n  losses = {item.losses.tolist()}"
            )
    return ""


def check(
    build: Callable[[Optimizer], MultiLossOptimizer],
    promises: Iterable[str] | Mapping[str, Any] = (),
    *,
    seed: int = 0,
    examples: int = 5,
    names: Sequence[str] | None = None,
    after_step: Callable[[Any], object] | None = None,
) -> Checked:
    """Examine a method: what every method owes its users, and what its paper promises.

    It is tried on random, conflicting, badly scaled, dependent, nearly dependent and degenerate gradients of up to six
    losses, in double precision and on the CPU; losses are positive.

    Args:
        build: Makes a new method around the optimizer that it is given, as a user would.
        promises: Names of what is promised beyond the contract, or a mapping from names to what exactly, such as
            ``{"common descent": 2}``. For a surgery: "common descent", "common descent at full rank", "homogeneous",
            "row scale", "permutation", "rotation", "copies", "plain sum", "equal rows", "one loss", "stationary", "zero
            rows". For a weighting: "total", "permutation", "loss scale", "homogeneous". The error for a name that is
            not known says what each means.
        seed: Of the inputs.
        examples: How many inputs of each kind.
        names: Names of the losses, where `build` speaks of them; all inputs then have so many losses. By default they
            are "0", "1" and so on, as in ``combine``.
        after_step: Called with the method after each step, such as ``lambda method: method.epoch_end()``.

    Returns:
        On how many inputs each promise was tried.

    Raises:
        AssertionError: A promise is broken: each one that is, with the first input on which it is, and the seed.
        ValueError: A promise is not known, or has no such value, or `build` gives the same method twice, or one that
            trains other parameters.
        TypeError: `build` returns no method.

    Example:
        >>> from gradsurgery.testing import check
        >>> checked = check(gradsurgery.UPGrad, ["common descent", "permutation", "plain sum"], examples=1)
        >>> checked.inputs["common descent"]
        13
    """
    if examples < 1:
        raise ValueError(f"check: `examples` must be >= 1, got {examples!r}.")
    subject = Subject(build, after_step, names)
    asked = _asked(subject, promises)
    m = None if names is None else len(names)
    broken, counts = "", {}
    for name, (promise, value) in asked.items():
        kinds = [kind for kind in promise.kinds if possible(kind, m)]
        items = [drawn(kind, seed, number, m) for kind in kinds for number in range(examples)]
        counts[name] = len(items)
        broken += _broken(subject, name, promise, value, items)
    if broken:
        raise AssertionError(f"{subject.name} does not keep what it promises (seed {seed}):{broken}")
    return Checked(subject.name, seed, counts)
