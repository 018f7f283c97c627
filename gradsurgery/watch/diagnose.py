"""Look at a model's losses before choosing a method: who hurts whom, how much, what help would cost, and whether."""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from gradsurgery import losses as losses_module
from gradsurgery.batch import parameters
from gradsurgery.gradients import rows as rows_module
from gradsurgery.graph import hooks
from gradsurgery.graph.torch_private import buffers, hooks_after, profiler_is_on
from gradsurgery.losses import Losses
from gradsurgery.report import Report
from gradsurgery.surgery.base import Surgery
from gradsurgery.surgery.pcgrad import PCGrad
from gradsurgery.text import grid, number, terminal_width, wrapped
from gradsurgery.weighting.softadapt import SoftAdaptWeighter

#: A pair conflicts if its mean cosine is below −CONFLICT and more than ERRORS standard errors below 0. Gradients that
#: have nothing to do with each other have cosines of either sign near 0.
CONFLICT, ERRORS = 0.1, 2.0
#: Norms this many times apart: one loss then dominates the plain sum.
IMBALANCE = 10.0
#: A loss is held up if the common step leaves less than this share of its own descent (median over the batches).
KEEPS = 0.5
#: Fewer batches say little.
FEW = 5
#: Rounds of the measurement of costs: at least, and at most within so many seconds.
ROUNDS, SECONDS = (3, 20), 3.0

Features = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Pair:
    """How the gradients of two losses stand to each other.

    Args:
        first: One loss.
        second: The other.
        cosine: Mean cosine of their gradients over the batches.
        error: Standard error of that mean; nan for one batch.
        conflict_rate: Share of the batches with a negative cosine.
        batches: Number of batches that had both.
        first_loses: Share of its own descent that the first loses to the second in the step of the plain sum,
            −⟨gᵢ, gⱼ⟩ / ‖gᵢ‖², median; negative where it gains.
        second_loses: The same of the second.
    """

    first: str
    second: str
    cosine: float
    error: float
    conflict_rate: float
    batches: int
    first_loses: float = math.nan
    second_loses: float = math.nan

    @property
    def conflicts(self) -> bool:
        """Whether the cosine stays below zero, by 0.1 in the mean and by two standard errors."""
        return self.cosine <= -CONFLICT and not self.cosine + ERRORS * self.error > 0

    @property
    def word(self) -> str:
        """What that means, in words."""
        if self.conflicts:
            losses = ((self.first, self.first_loses), (self.second, self.second_loses))
            known = [f"{name} loses {_share(share)}" for name, share in losses if not math.isnan(share)]
            return "oppose each other" + (f": {', '.join(known)}" if known else "")
        if self.cosine >= CONFLICT and not self.cosine - ERRORS * self.error < 0:
            return "agree"
        return "no steady relation"


@dataclass(frozen=True)
class Cost:
    """What a step of one family costs on this model: forward and backward, without the optimizer's step.

    Args:
        family: "plain sum", "weighting", "surgery" or "surgery at features".
        method: Which method stood for it.
        milliseconds: The shortest time: what a step costs where no other program disturbs it.
        times: Ratio to that of the plain sum, measured in turns.
        megabytes: Most memory held beyond what was held before; None if it could not be measured.
    """

    family: str
    method: str
    milliseconds: float
    times: float
    megabytes: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Args:
        batches: Number of batches.
        skipped: How many of them had a loss or gradient that was not finite; they are left out.
        names: The losses.
        losses: (least, median, largest) value of each.
        norms: Median norm of the gradient of each over the shared parameters.
        kept: Of the descent that each loss would have from its own gradient alone, the share that is left in the step
            of the plain sum: ⟨gᵢ, Σ gⱼ⟩ / ‖gᵢ‖², median. 1: the others do not matter; above 1 they help; below 0 the
            loss rises.
        rises: Share of the batches in which the step of the plain sum raises each loss, to first order.
        kept_weighted: `kept` under the suggested weights.
        pairs: Every two losses, the worst first.
        weights: Constants that give all gradients one median norm, two digits, of sum m.
        costs: What a step costs.
        verdict: "sum", "weights", "surgery", "unclear", or "nothing shared".
        advice: What to do, in words.
    """

    batches: int
    skipped: int
    names: tuple[str, ...]
    losses: dict[str, tuple[float, float, float]]
    norms: dict[str, float]
    kept: dict[str, float]
    rises: dict[str, float]
    kept_weighted: dict[str, float]
    pairs: tuple[Pair, ...]
    weights: dict[str, float]
    costs: tuple[Cost, ...]
    verdict: str
    advice: str

    @property
    def norm_ratio(self) -> float:
        """The longest median norm over the shortest; inf if one is zero, 1 without gradients."""
        found = list(self.norms.values())
        return 1.0 if not found else max(found) / min(found) if min(found) > 0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON.

        Returns:
            Field names to values; numbers that are not finite become None.
        """
        found = {**asdict(self), "norm_ratio": self.norm_ratio}
        for pair, entry in zip(self.pairs, found["pairs"], strict=True):
            entry["conflicts"] = pair.conflicts
        return {key: _plain(value) for key, value in found.items()}

    def text(self, width: int) -> str:
        """Everything in words and tables.

        Args:
            width: Characters of a line.

        Returns:
            Lines.
        """
        used = self.batches - self.skipped
        parts = [f"{_several(used, 'batch', 'batches')}, {_several(len(self.names), 'loss', 'losses')}"]
        if self.skipped:
            parts[0] += f" ({self.skipped} more left out: not finite)"
        parts[0] += ".\n"
        parts.append(self._losses_table(width))
        if self.pairs:
            parts.append(self._pairs_table(width))
        if self.costs:
            parts.append(self._costs_table(width))
        parts.append(wrapped(self.advice, width))
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.text(terminal_width())

    def _losses_table(self, width: int) -> str:
        rows = []
        for name in self.names:
            low, middle, high = self.losses[name]
            cells = [name, number(middle), f"{number(low)} – {number(high)}", "", "", ""]
            if name in self.norms:
                cells[3] = number(self.norms[name])
            if name in self.kept:
                cells[4:] = [_share(self.kept[name]), f"{self.rises[name]:.0%}"]
            rows.append(cells)
        headings = ("loss", "median", "range", "gradient norm", "descent kept", "raised by the sum")
        return grid(headings, rows, width=width)

    def _pairs_table(self, width: int) -> str:
        rows = [
            (
                f"{pair.first}, {pair.second}",
                f"{pair.cosine:+.2f}" + ("" if math.isnan(pair.error) else f" ±{pair.error:.2f}"),
                f"{pair.conflict_rate:.0%}",
                pair.word,
            )
            for pair in self.pairs
        ]
        return grid(("pair", "mean cosine", "in conflict", ""), rows, left=(0, 3), width=width)

    def _costs_table(self, width: int) -> str:
        rows = [
            (
                cost.family,
                cost.method,
                f"{cost.milliseconds:.3g}",
                f"{cost.times:.2f}",
                "" if cost.megabytes is None else f"{cost.megabytes:.3g}",
            )
            for cost in self.costs
        ]
        headings = ("forward and backward", "measured with", "ms", "× plain sum", "peak MB")
        return grid(headings, rows, left=(0, 1), width=width)


def diagnose(
    optimizer_or_model: Optimizer | nn.Module,
    loss_fn: Callable[[Any], Losses | tuple[Losses, Features]],
    batches: Iterable[Any],
    *,
    limit: int | None = 20,
    features: bool = False,
    cost: bool = True,
) -> Diagnosis:
    """Measure, without training, whether several losses need any help on this model, and which.

    Nothing is trained and nothing is left behind: parameters, ``.grad``, buffers of all modules that run (so also the
    statistics of BatchNorm), random streams (of torch, numpy and Python), optimizer and method stay as they are. What a
    model keeps outside of buffers, such as a Python counter, is its own affair; so are the batches of an iterator,
    which are used up.

    The verdict follows from the gradients over the shared parameters, by rules that are easy to check:

    * A loss is *held up* if, in the median batch, the common step has less than half of the descent that its own
      gradient alone would give it: ⟨gᵢ, Σ wⱼ gⱼ⟩ < ½ wᵢ ‖gᵢ‖².
    * Norms are *far apart* if the medians differ by a factor of 10.
    * Two losses *oppose each other* if the mean cosine is below −0.1 and two standard errors below zero.

    "sum": nothing is held up under the plain sum and norms are not far apart. "weights": otherwise, if nothing is held
    up under constants that give all gradients one norm. "surgery": otherwise, if some two oppose each other. "unclear":
    the rest. It is said of these parameters and batches. Early and late in training it may differ; ask again then. And
    gradients are not the goal: only trained runs tell what helps.

    Args:
        optimizer_or_model: Whose parameters to look at: a torch optimizer, one of this library, or a model.
        loss_fn: Maps a batch to the losses, as ``backward`` takes them. It runs the model, in the mode it is in.
        batches: The batches, of any kind that `loss_fn` takes.
        limit: Look at so many batches at most; None for all.
        features: `loss_fn` returns a pair: the losses, and the shared representation. The cost of surgery there is
            measured too.
        cost: Measure what each family costs.

    Returns:
        The findings. ``print`` shows them; ``as_dict()`` is for programs.

    Raises:
        TypeError: `optimizer_or_model` is neither, or `loss_fn` returns something else than losses.
        ValueError: There is no batch, `limit` is below 1, or no batch had finite losses.
        RuntimeError: A loss reaches no parameter.

    Example:
        >>> def loss_fn(batch):
        ...     first, second = model(batch).unbind(dim=1)
        ...     return {"low": first.square().mean(), "high": (second - 1).square().mean()}
        >>> found = gradsurgery.diagnose(model, loss_fn, [inputs], cost=False)
        >>> found.names
        ('low', 'high')
    """
    if isinstance(optimizer_or_model, nn.Module):
        params: list[Tensor] = [p for p in optimizer_or_model.parameters() if p.requires_grad]
        shared = None
    elif isinstance(optimizer_or_model, Optimizer):
        params = parameters(optimizer_or_model)
        shared = optimizer_or_model.shared_params if isinstance(optimizer_or_model, Surgery) else None
    else:
        raise TypeError(
            f"diagnose: `optimizer_or_model` must be an optimizer or a module, got {type(optimizer_or_model).__name__}."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"diagnose: `limit` must be an integer >= 1 or None, got {limit!r}.")
    if not params:
        raise ValueError("diagnose: `optimizer_or_model` has no trainable parameters.")

    base = torch.optim.SGD(params, lr=0.0)
    probe = _Probe(base, shared)
    reports: list[Report] = []
    names: dict[str, None] = {}
    first: list[Any] = []
    roots = optimizer_or_model if isinstance(optimizer_or_model, nn.Module) else None
    with _untouched(params, roots), torch.enable_grad():
        for batch in itertools.islice(iter(batches), limit):
            first = first or [batch]
            losses, _ = _called(loss_fn, batch, features)
            reports.append(probe.backward(losses))
            names.update(dict.fromkeys(reports[-1].names))
            base.zero_grad()
            del losses
        if not reports:
            raise ValueError("diagnose: `batches` is empty. An iterator that was used before is empty, too.")
        used = [report for report in reports if "skipped" not in report.flags]
        if not used:
            raise ValueError("diagnose: in no batch were all losses and gradients finite.")
        costs = _costs(base, shared, loss_fn, first[0], features) if cost else ()
    return _judged(tuple(names), used, len(reports) - len(used), costs)


class _Probe(Surgery):
    """Looks at the gradients and leaves the sum as it is.

    Args:
        base: The optimizer whose parameters to look at.
        shared: Those of them that count as shared; None: what the graph tells.
    """

    def __init__(self, base: Optimizer, shared: Iterable[Tensor] | None) -> None:
        super().__init__(base, shared_params=shared, nonfinite="skip")
        self._name = "diagnose"  # whom errors are said by

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.ones(len(gram))


def _called(
    loss_fn: Callable[[Any], Losses | tuple[Losses, Features]], batch: Any, features: bool
) -> tuple[Losses, Features | None]:
    found: Any = loss_fn(batch)
    if not features:
        return found, None
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            "diagnose: with features=True `loss_fn` must return a pair: the losses, and the representation."
        )
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------ nothing changes


@contextmanager
def _untouched(params: Sequence[Tensor], model: nn.Module | None) -> Iterator[None]:
    """Put back whatever running a model forward and backward may change."""
    kept: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, *_: object) -> None:
        if module in kept:
            return
        for part in module.modules():
            if part not in kept:
                kept[part] = {key: (b, b.detach().clone()) for key, b in buffers(part).items() if b is not None}

    if model is not None:
        keep(model)
    # The model may be known to `loss_fn` alone, and losses may be modules with buffers of their own.
    hook = hooks.ours(nn.modules.module.register_module_forward_pre_hook, keep)
    streams = _random_state()
    try:
        with rows_module.emptied(params):
            yield
    finally:
        hook.remove()
        _set_random_state(streams)
        with torch.no_grad():
            for module, its in kept.items():
                for key, (buffer, value) in its.items():
                    buffers(module)[key] = buffer
                    buffer.copy_(value)


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    # What a loss function or a data loader draws from is not ours to choose.
    return torch.get_rng_state(), cuda, mps, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, mps, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if mps is not None:
        torch.mps.set_rng_state(mps)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


# ------------------------------------------------------------------------------------------------------------- findings


def _judged(names: tuple[str, ...], used: list[Report], skipped: int, costs: tuple[Cost, ...]) -> Diagnosis:
    values = {name: [r.losses[name] for r in used if name in r.names] for name in names}
    losses = {name: (min(v), statistics.median(v), max(v)) for name, v in values.items() if v}
    names = tuple(losses)
    grams = [(r.names, r.gram.numpy()) for r in used if r.gram is not None and len(r.names) > 1]
    norms = {
        name: statistics.median(lengths)
        for name in names
        if (lengths := [math.sqrt(gram[i, i]) for i, gram in _with(grams, name)])
    }
    weights = _suggested(norms)
    kept, rises = _kept(grams, dict.fromkeys(names, 1.0))
    kept_weighted, _ = _kept(grams, weights) if weights else ({}, {})
    pairs = tuple(sorted(_pairs(names, grams), key=lambda pair: pair.cosine))
    found = Diagnosis(
        batches=len(used) + skipped,
        skipped=skipped,
        names=names,
        losses=losses,
        norms=norms,
        kept=kept,
        rises=rises,
        kept_weighted=kept_weighted,
        pairs=pairs,
        weights=weights,
        costs=costs,
        verdict="",
        advice="",
    )
    verdict, advice = _verdict(found)
    return Diagnosis(**{**found.__dict__, "verdict": verdict, "advice": advice})


Grams = list[tuple[tuple[str, ...], np.ndarray]]


def _with(grams: Grams, name: str) -> list[tuple[int, np.ndarray]]:
    return [(names.index(name), gram) for names, gram in grams if name in names]


def _suggested(norms: dict[str, float]) -> dict[str, float]:
    """Reciprocals of the norms, with sum m, rounded as one would write them down."""
    if len(norms) < 2 or min(norms.values()) <= 0:
        return {}
    reciprocal = {name: 1 / norm for name, norm in norms.items()}
    factor = len(norms) / sum(reciprocal.values())
    return {name: float(f"{factor * value:.2g}") for name, value in reciprocal.items()}


def _kept(grams: Grams, weights: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What the common step leaves each loss of its own descent, and how often it raises the loss."""
    kept, rises = {}, {}
    for name in weights:
        shares = []
        for (names, _), (i, gram) in zip([g for g in grams if name in g[0]], _with(grams, name), strict=True):
            own = weights[name] * gram[i, i]
            if own > 0:
                shares.append(float(np.array([weights[n] for n in names]) @ gram[i]) / own)
        if shares:
            kept[name] = statistics.median(shares)
            rises[name] = sum(share < 0 for share in shares) / len(shares)
    return kept, rises


def _pairs(names: tuple[str, ...], grams: Grams) -> Iterator[Pair]:
    for first, second in itertools.combinations(names, 2):
        cosines, first_loses, second_loses = [], [], []
        for present, gram in grams:
            if first in present and second in present:
                i, j = present.index(first), present.index(second)
                if gram[i, i] > 0 and gram[j, j] > 0:
                    cosines.append(float(gram[i, j] / math.sqrt(gram[i, i]) / math.sqrt(gram[j, j])))
                    first_loses.append(-float(gram[i, j] / gram[i, i]))
                    second_loses.append(-float(gram[i, j] / gram[j, j]))
        if cosines:
            n = len(cosines)
            yield Pair(
                first,
                second,
                cosine=statistics.fmean(cosines),
                error=statistics.stdev(cosines) / math.sqrt(n) if n > 1 else math.nan,
                conflict_rate=sum(c < 0 for c in cosines) / n,
                batches=n,
                first_loses=statistics.median(first_loses),
                second_loses=statistics.median(second_loses),
            )


def _verdict(found: Diagnosis) -> tuple[str, str]:
    if len(found.names) < 2:
        return "sum", "The sum is fine: there is one loss only."
    few = "" if found.batches - found.skipped >= FEW else " These are few batches; look at more before you rely on it."
    silent = [repr(name) for name, norm in found.norms.items() if norm == 0]
    if silent:
        rest = ": nothing to compare." if not found.pairs else f". Is that meant?{few}"
        return "unclear", f"The gradient of {_and(silent)} is zero over the shared parameters{rest}"
    if not found.pairs:
        return (
            "nothing shared",
            "The sum is fine: no parameter is reached by two losses in one batch, so none can hurt another.",
        )
    held = [name for name, share in found.kept.items() if share < KEEPS]
    if not held and found.norm_ratio < IMBALANCE:
        return "sum", _why_the_sum(found) + few
    reasons = " ".join(_reasons(found, held))
    paste = f"weights = {{{', '.join(f'{name!r}: {weight:g}' for name, weight in found.weights.items())}}}"
    constants = f"Constants to start from, which make all gradients equally long here:\n\n    {paste}\n"
    held_weighted = [name for name, share in found.kept_weighted.items() if share < KEEPS]
    if not held_weighted:
        return "weights", (
            f"Weights should be enough. {reasons} With constant weights no loss is held up any more, so "
            f"try them before surgery. {constants}\n"
            "Multiply the losses by them, or FixedWeighter(optimizer, weights=weights). Tune them by factors of 3: "
            f"equal lengths are a start, not an optimum.{few}"
        )
    if _opposed(found):
        return "surgery", f"Surgery may help. {reasons} {_why_surgery(found, held_weighted)} {constants}{few}".rstrip()
    return "unclear", (
        f"Unclear. {reasons} But no two losses oppose each other steadily: this may be the noise of small "
        f"batches. Look at more or larger batches. {constants}{few}"
    ).rstrip()


def _opposed(found: Diagnosis) -> str:
    """Who opposes whom; empty if nobody does."""
    conflicts = [pair for pair in found.pairs if pair.conflicts]
    return "; ".join([f"{pair.first!r} and {pair.second!r}" for pair in conflicts[:3]] + ["…"] * (len(conflicts) > 3))


def _why_the_sum(found: Diagnosis) -> str:
    words = (
        "The sum is fine. No loss loses half of its own descent to the others, and the gradient norms are within "
        f"a factor of {found.norm_ratio:.1f}."
    )
    if opposed := _opposed(found):
        words += f" Some gradients do oppose each other ({opposed}), but the losses still fall."
    return words + " Surgery would change little."


def _reasons(found: Diagnosis, held: Sequence[str]) -> Iterator[str]:
    """What is wrong with the sum."""
    if found.norm_ratio >= IMBALANCE:
        longest, shortest = (f(found.norms, key=lambda n: found.norms[n]) for f in (max, min))
        yield (
            f"The gradient of {longest!r} is {number(found.norm_ratio, 2)} times as long as that of {shortest!r}: it "
            "dominates the sum."
        )
    rising = [repr(name) for name in held if found.kept[name] < 0]
    slow = [f"{name!r} ({found.kept[name]:.0%})" for name in held if found.kept[name] >= 0]
    if rising:
        yield f"In most batches the sum's step makes {_and(rising)} rise."
    if slow:
        yield f"The sum's step leaves {_and(slow)} less than half of the descent of its own gradient."


def _why_surgery(found: Diagnosis, held: Sequence[str]) -> str:
    apart = found.norm_ratio >= IMBALANCE
    kind = "NashMTL, ConFIG or IMTLG, which are invariant to gradient norms" if apart else "PCGrad or UPGrad"
    still = _and([f"{name!r} ({_share(found.kept_weighted[name])})" for name in held])
    price = "".join(
        f" It costs {cost.times:.1f} times the plain sum here." for cost in found.costs if cost.family == "surgery"
    )
    return (
        f"Some gradients oppose each other steadily ({_opposed(found)}), and "
        f"constant weights do not change that: {still} {'is' if len(held) == 1 else 'are'} still held up. "
        f"Try {kind}, with tuned constants as the baseline.{price}"
    )


def _share(value: float) -> str:
    """A share as a percentage, or as a factor where that would be a long number."""
    return f"{value:.0%}" if abs(value) < 10 else f"{number(value, 2)} ×"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _several(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------------------- cost


def _costs(
    base: Optimizer,
    shared: Iterable[Tensor] | None,
    loss_fn: Callable[[Any], Losses | tuple[Losses, Features]],
    batch: Any,
    features: bool,
) -> tuple[Cost, ...]:
    params = parameters(base)
    # Such a hook may be an optimizer of its own, which must not run here.
    if any(map(hooks_after, params)):
        return ()
    families = _families(base, shared, loss_fn, batch, features)
    where = params[0].device
    shortest = _shortest([run for _, _, run in families], base, where)
    found = []
    for (family, method, run), seconds in zip(families, shortest, strict=True):
        base.zero_grad()
        peak = peak_bytes(run, where)
        found.append(
            Cost(
                family,
                method,
                milliseconds=1e3 * seconds,
                times=seconds / shortest[0],
                megabytes=None if peak is None else peak / 1e6,
            )
        )
    return tuple(found)


def _families(
    base: Optimizer,
    shared: Iterable[Tensor] | None,
    loss_fn: Callable[[Any], Losses | tuple[Losses, Features]],
    batch: Any,
    features: bool,
) -> list[tuple[str, str, Callable[[], None]]]:
    """Each family, the method that stands for it, and its forward and backward pass; the plain sum first."""
    surgery = PCGrad(base, shared_params=shared, nonfinite="skip")
    weighter = SoftAdaptWeighter(base, nonfinite="skip")

    def plain() -> None:
        losses, _ = _called(loss_fn, batch, features)
        torch.autograd.backward(losses_module.read(losses, "diagnose").tensors)

    def weighted() -> None:
        weighter.backward(_called(loss_fn, batch, features)[0])

    def operated() -> None:
        surgery.backward(_called(loss_fn, batch, features)[0])

    def at_features() -> None:
        losses, z = _called(loss_fn, batch, features)
        surgery.backward(losses, features=z)

    families: list[tuple[str, str, Callable[[], None]]] = [
        ("plain sum", "", plain),
        ("weighting", "SoftAdaptWeighter", weighted),
        ("surgery", "PCGrad", operated),
    ]
    if features:
        families.append(("surgery at features", "PCGrad", at_features))
    return families


def _shortest(runs: Sequence[Callable[[], None]], base: Optimizer, where: torch.device) -> list[float]:
    """Seconds of each, the shortest of several, measured in turns."""

    def once(run: Callable[[], None]) -> float:
        base.zero_grad()
        wait(where)
        began = time.perf_counter()
        run()
        wait(where)
        return time.perf_counter() - began

    for run in runs:
        once(run)  # the first run pays for caches and compilers
    times: list[list[float]] = []
    began = time.perf_counter()
    while len(times) < ROUNDS[0] or (len(times) < ROUNDS[1] and time.perf_counter() - began < SECONDS):
        times.append([once(run) for run in runs])
    return [min(column) for column in zip(*times, strict=True)]


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that a function holds at one time, beyond what was held before.

    Args:
        run: The function.
        device: Where it works: CUDA, or the CPU.

    Returns:
        Bytes of tensors; None where it cannot be measured.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or profiler_is_on():  # profilers do not nest
        return None
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's profiler from writing to standard error that it starts and stops, which no setting prevents."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
