"""Watch a run: losses, weights, norms, cosines and conflicts by step, and a word where something is wrong."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsurgery.graph import hooks
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.report import Report
from gradsurgery.text import number, warn
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.fixed import FixedWeighter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: Steps in which the update was the plain sum, before a word is said.
INACTIVE_STEPS = 500
#: Weights closer to each other than this, relative to their mean, are equal: float64 arithmetic is finer by far.
EQUAL = 1e-9
#: Recorded steps in a row that something has to last, before a word is said.
LASTING = 100
#: A weight has collapsed below this share of the mean, and run away above its reciprocal times the first mean.
COLLAPSED = 1e-3
#: Weights have moved early if so many fold within so many recorded steps.
EARLY_FOLD = 100.0
EARLY_STEPS = 1000
#: Weights are still if none has left this band around its first value in so many recorded steps.
STILL = 0.05
STILL_STEPS = 1000
#: Losses, or their progress, are apart, so that weights ought to move.
APART = 2.0
#: A loss has not fallen if its mean over the last of so many recorded steps is not below that of the first, by a share.
FALL_STEPS = 2000
FALLEN = 0.01
#: Weighted gradient norms differ by so much. A loss that has fallen as much has a short gradient because it is learnt.
UNEVEN = 10.0
#: A task drives the update above this share of the weighted norms.
DRIVES = 0.95


class Monitor:
    """Collect the reports of an optimizer, one for each committed step, without any more backward passes.

    A hook that runs after each step of the wrapped optimizer reads the report that exists anyway. It keeps numbers
    only, about 8 bytes each: no graph, no tensor. There are 4 m + 2 + m (m − 1) / 2 of them per step at most, so that
    100,000 steps take some 20 MB with 3 tasks and 200 MB with 20; `every` divides that. A step that a gradient scaler
    skipped is not seen. One that committed nothing, such as a batch passed over under ``nonfinite="skip"``, is counted
    in `skipped`.

    It warns, once for each task and reason, when

    * all weights have been those of the plain sum in 500 steps in a row, so that the method only costs time (outside of
      sum scale: equal, and the same in every step);
    * a weight has been below 0.001 of the mean weight in 100 recorded steps in a row, and the weighted gradient norm
      (the weighted loss, where norms are unknown) below 0.001 of its mean, too: collapsed. A small weight that only
      evens out a large loss is what it is for;
    * a weight has been above 1000 times the mean weight of the first recorded step in as many: run away;
    * one task's share of the weighted gradient norms has been above 0.95 in as many;
    * the weighted gradient norms of two tasks have been tenfold apart in as many, and the loss with the shorter one is
      still above a tenth of its first value;
    * a weighter has moved a weight a hundredfold down within the first 1000 recorded steps, and the weighted loss with
      it, under an optimizer that remembers the size of gradients, such as Adam, though the loss is still above a tenth
      of its first value;
    * no weight has moved by more than 5 % in the first 1000 recorded steps, where the method has an argument for its
      pace, though the losses, or their progress if that is what the method compares, are twofold apart;
    * no loss has fallen by 1 % from the first 100 of 2000 recorded steps to the last 100.

    The last three are not looked for in a run that is watched from its middle.

    Steps of warm-up and steps with one task do not count. Methods with a primary task follow it on purpose, and are not
    looked at.

    Args:
        optimizer: The optimizer to watch.
        every: Record every k-th committed step.
        callback: Called as ``callback(step, report)`` after every recorded step, with the parameters updated.
            What it raises comes out of ``optimizer.step()``.
        writer: Anything with ``add_scalar(tag, value, step)``, such as a TensorBoard ``SummaryWriter``.

    Attributes:
        steps: The numbers of the recorded steps; the first step is 1. A resumed run goes on counting.
        flags: The flags of each recorded step.
        skipped: Number of steps that committed nothing.
        advice: The warnings so far.

    Raises:
        TypeError: `optimizer` is not one of this library, or `callback` or `writer` cannot be called.
        ValueError: `every` is not a positive integer.

    Example:
        >>> optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with gradsurgery.Monitor(optimizer) as monitor:
        ...     for _ in range(3):
        ...         first, second = model(inputs).unbind(dim=1)
        ...         optimizer.zero_grad()
        ...         _ = optimizer.backward({"low": first.square().mean(), "high": (second - 1).square().mean()})
        ...         optimizer.step()
        >>> monitor.steps
        [1, 2, 3]
        >>> sorted(monitor.history)[:3]
        ['conflict_rate', 'cosine/low/high', 'loss/high']
    """

    def __init__(
        self,
        optimizer: MultiLossOptimizer,
        every: int = 1,
        callback: Callable[[int, Report], object] | None = None,
        writer: Any = None,
    ) -> None:
        if not isinstance(optimizer, MultiLossOptimizer):
            raise TypeError(
                f"Monitor: `optimizer` must be a method of this library, got {type(optimizer).__name__}. To watch the "
                "plain sum, wrap the optimizer in FixedWeighter."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Monitor: `every` must be an integer >= 1, got {every!r}.")
        if callback is not None and not callable(callback):
            raise TypeError(f"Monitor: `callback` must be callable, got {type(callback).__name__}.")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"Monitor: `writer` must have add_scalar(tag, value, step), got {type(writer).__name__}.")
        self.optimizer = optimizer
        self.every = every
        self.callback = callback
        self.writer = writer
        self.steps: list[int] = []
        self.flags: list[tuple[str, ...]] = []
        self.skipped = 0
        self.advice: list[str] = []
        self._columns: dict[str, array[float]] = {}
        self._names: list[str] = []
        self._kinds: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all steps with the same flags
        self._last_report: Report | None = optimizer.report
        self._watch = _Watch(optimizer, self.advice)
        # Torch drops hooks when an optimizer is pickled or copied, so the copy is not watched and this monitor stays.
        self._handle: Any = hooks.ours(optimizer.register_step_post_hook, self._after_step)

    def _after_step(self, *_: object) -> None:
        # The method commits behind this hook, and has noted what.
        transaction = self.optimizer.transaction
        report = transaction.report
        if report is None or report is self._last_report:
            return
        self._last_report = report
        if not transaction.stepped:
            self.skipped += 1
            return
        step = transaction.learnt["step"]
        self._watch.rest(report)
        if (step - 1) % self.every == 0:
            self._record(step, report)

    def _record(self, step: int, report: Report) -> None:
        values = scalars(report)
        for name in report.names:
            if name not in self._names:
                self._names.append(name)
        count = len(self.steps)
        for key in values:
            if key not in self._columns:
                self._columns[key] = array("d", [math.nan]) * count
        for key, column in self._columns.items():
            column.append(values.get(key, math.nan))
        self.steps.append(step)
        self.flags.append(self._kinds.setdefault(report.flags, report.flags))
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(f"gradsurgery/{key}", value, step)
        self._watch.fall(report.losses, step)
        self._watch.see(report)
        if self.callback is not None:
            self.callback(step, report)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order in which they were first seen."""
        return tuple(self._names)

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The numbers of all recorded steps, (steps,) each, nan where there was none.

        Keys: "total", "loss/NAME", "weight/NAME", "norm/NAME", "cosine/NAME/NAME", "conflict_rate",
        "projections". In names of pairs "/" is written "%2F", and "%" as "%25".
        """
        return {key: np.array(column) for key, column in self._columns.items()}

    def column(self, kind: str, *names: str) -> np.ndarray:
        """One column of the history.

        Args:
            kind: "loss", "weight", "norm", "cosine", "total", "conflict_rate" or "projections".
            *names: The task, or two for a cosine, in any order.

        Returns:
            (steps,), nan where there was no such number.
        """
        found = np.full(len(self.steps), math.nan)
        for key in (_key(kind, *names), _key(kind, *reversed(names))):  # the order of the losses may have changed
            if key in self._columns:
                found = np.where(np.isnan(found), self._columns[key], found)
        return found

    @property
    def cosines(self) -> np.ndarray:
        """Mean cosine between every two tasks, (m, m), nan for two that were never seen together."""
        m = len(self._names)
        found = np.eye(m)
        for i in range(m):
            for j in range(i):
                found[i, j] = found[j, i] = _mean(self.column("cosine", self._names[i], self._names[j]))
        return found

    @property
    def conflict_rates(self) -> np.ndarray:
        """Share of the recorded steps in which two tasks were in conflict, (m, m), nan for two never seen together."""
        m = len(self._names)
        found = np.zeros((m, m))
        for i in range(m):
            for j in range(i):
                cosine = self.column("cosine", self._names[i], self._names[j])
                found[i, j] = found[j, i] = _mean(np.where(np.isnan(cosine), math.nan, cosine < 0))
        return found

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Each task's share of the weighted gradient norms ``|wᵢ| ‖gᵢ‖``, (steps,), by name; nan where unknown."""
        parts = {name: np.abs(self.column("weight", name)) * self.column("norm", name) for name in self._names}
        total = np.nansum(list(parts.values()), axis=0) if parts else np.zeros(0)
        return {name: np.divide(p, total, out=np.full(len(p), math.nan), where=total > 0) for name, p in parts.items()}

    def close(self) -> None:
        """Stop watching. What was recorded stays."""
        self._handle.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        rate = _mean(self.column("conflict_rate"))
        conflict = "" if math.isnan(rate) else f", conflict rate {rate:.2f}"
        tasks = ", ".join(self._names) or "no task"
        return f"Monitor({self.optimizer.display_name}, {len(self)} steps of {tasks}{conflict})"

    def to_csv(self, path: str | Path) -> None:
        """Write all numbers into a file: a line a recorded step, empty cells where there was no number.

        Args:
            path: Where to. Flags are in the last column, with blanks between them.

        Raises:
            ValueError: A name cannot be written as UTF-8. The file is as it was.
        """
        text = io.StringIO(newline="")
        lines = csv.writer(text)
        lines.writerow(["step", *self._columns, "flags"])
        for row, (step, flags) in enumerate(zip(self.steps, self.flags, strict=True)):
            numbers = (column[row] for column in self._columns.values())
            lines.writerow([step, *("" if math.isnan(x) else repr(x) for x in numbers), " ".join(flags)])
        try:
            encoded = text.getvalue().encode("utf-8")
        except UnicodeEncodeError as error:
            names = [name for name in self._names if not _encodes(name)]
            raise ValueError(
                f"Monitor.to_csv: the names {names} hold a lone surrogate, which UTF-8 cannot write. Rename the "
                "losses. The file is as it was."
            ) from error
        Path(path).write_bytes(encoded)

    def table(self) -> Table:
        """Sum the run up: a row per task.

        Returns:
            A table to print with rich, in 60 columns or more. It has the losses at both ends of the run, the mean
            weight with its extremes, the median gradient norm, the mean share of the update, and the task that it
            disagrees with most, with their mean cosine and how often they were in conflict.

        Raises:
            RuntimeError: Rich is not installed.
        """
        try:
            from rich import box
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError:
            raise RuntimeError(needs("table", "rich")) from None
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 0, 0, 1),
            title_justify="left",
            caption_justify="left",
        )
        table.title = f"{self.optimizer.display_name}: {_counted(len(self), 'recorded step')}"
        # In a narrow terminal a cell takes several lines; only names are broken within a word.
        for heading in (
            "task",
            "loss\nfirst → last",
            "weight\nmean (range)",
            "gradient norm,\nshare of update",
            "most opposed,\ncosine, conflict",
        ):
            left = heading.startswith(("task", "most"))
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        shares, cosines, rates = self.shares, self.cosines, self.conflict_rates
        for i, name in enumerate(self._names):
            losses = _known(self.column("loss", name))
            weights, norms = _known(self.column("weight", name)), _known(self.column("norm", name))
            share = _mean(shares[name])
            apart = np.where(np.arange(len(self._names)) == i, math.nan, cosines[i])
            worst = None if np.isnan(apart).all() else int(np.nanargmin(apart))
            cells = (
                name,
                f"{number(losses[0])} → {number(losses[-1])}" if len(losses) else "–",
                f"{number(weights.mean())} ({number(weights.min())} – {number(weights.max())})"
                if len(weights)
                else "–",
                (number(np.median(norms)) if len(norms) else "–") + ("" if math.isnan(share) else f", {share:.0%}"),
                "–" if worst is None else f"{self._names[worst]} {apart[worst]:+.2f}, {rates[i, worst]:.0%}",
            )
            table.add_row(*map(Text, cells))
        counts = Counter(flag for flags in self.flags for flag in flags)
        lines = [f"flags: {', '.join(f'{flag} {n}' for flag, n in counts.most_common())}"] if counts else []
        lines += [f"{_counted(self.skipped, 'step')} committed nothing"] if self.skipped else []
        table.caption = Text("\n".join([*lines, *self.advice])) if lines or self.advice else None
        return table

    def plot(self, path: str | Path | None = None, *, dark: bool = False) -> Figure:
        """Draw the run: losses, weights, mean cosines and gradient norms.

        Args:
            path: A file to save it to; the ending says in which format.
            dark: Light lines on dark paper.

        Returns:
            The figure, of matplotlib.

        Raises:
            RuntimeError: Nothing was recorded, or matplotlib is not installed.
        """
        if not self.steps:
            raise RuntimeError("Monitor.plot: nothing was recorded yet. Call it after some steps of the optimizer.")
        try:
            from gradsurgery.watch import monitor_pictures
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise RuntimeError(needs("plot", "matplotlib")) from None
        return monitor_pictures.draw(self, path, dark)


#: What to do about a task that drives the update: because its gradient is longest, or since the method prefers it.
_LOUD = (
    "Its gradient is the longest. Give it a smaller constant factor, or take a method that is invariant to gradient "
    "norms (ConFIG, NashMTL, IMTLG), or put a weighter inside: PCGrad(InitialLossWeighter(...)). gradsurgery.diagnose "
    "suggests constants."
)
_CHOSEN = (
    "Its gradient is not the longest: the method's weights make it so, as MGDA's do for the shortest. Bring the losses "
    'to one size (constant factors, or normalize="loss" in a surgery), bound the weights (max_weight=), or take a '
    "method that is invariant to gradient norms (ConFIG, NashMTL, IMTLG)."
)


_EVEN = (
    "The method leaves that to you: bring the losses to one size by constant factors, or take a method that is "
    "invariant to gradient norms (ConFIG, NashMTL, IMTLG). gradsurgery.diagnose suggests constants."
)
_EARLY = (
    "So the model hardly moves for thousands of steps. Let the weights start near where they end: constant factors, "
    'InitialLossWeighter, or GradNormWeighter(..., start="losses"). Or shorten that memory: betas=(0.9, 0.9).'
)


class _Watch:
    """Looks for what goes wrong slowly.

    Args:
        optimizer: The optimizer.
        advice: Where the warnings go, too.
    """

    def __init__(self, optimizer: MultiLossOptimizer, advice: list[str]) -> None:
        self.name = optimizer.display_name
        # Constant weights are meant to stay as they are, and an epoch may have many steps.
        by_epoch = isinstance(optimizer, DWAWeighter) or getattr(optimizer, "interval", None) == "epoch"
        self.may_rest = by_epoch or isinstance(optimizer, FixedWeighter)
        # Methods with a primary task follow it on purpose.
        self.by_priority = optimizer.scale == "priority"
        # In sum scale the weights of the plain sum are known.
        self.sum_scale = optimizer.scale == "sum"
        self.mean = optimizer.reduction == "mean"
        self.advice = advice
        self.resting = 0
        self.last_mean = math.nan
        self.first_mean = 0.0
        # Of a weighter inside a surgery the report has no weights of its own.
        self.weighter = optimizer if isinstance(optimizer, Weighter) else None
        inner: Any = optimizer
        while isinstance(inner, MultiLossOptimizer):
            inner = inner.base
        self.base = type(inner).__name__
        self.adaptive = bool({"betas", "alpha", "rho", "lr_decay"} & inner.defaults.keys())
        # Whether a weighter compares sizes, as those that learn scales do, or the progress of the losses.
        self.by_size = optimizer.scale == "paper"
        self.first: dict[str, tuple[float, float]] = {}  # weight and loss in the first step, by name
        self.seen = 0
        self.still = True
        self.from_start: bool | None = None
        self.recorded = 0
        self.begun: dict[str, list[float]] = {}
        self.recent: dict[str, deque[float]] = {}
        self.since: Counter[tuple[str, str]] = Counter()
        self.said: set[tuple[str, str]] = set()

    def rest(self, report: Report) -> None:
        """Look whether a step, recorded or not, was that of the plain sum.

        Args:
            report: What happened in it.
        """
        if self.may_rest or (weights := self._weights(report)) is None:
            return
        mean = sum(map(abs, weights.values())) / len(weights)
        # Outside of sum scale a method rests if all weights are equal and stay what they are.
        rest = (1.0 / len(weights) if self.mean else 1.0) if self.sum_scale else self.last_mean
        self.last_mean = mean
        rests = max(abs(weight - rest) for weight in weights.values()) <= EQUAL * mean
        self.resting = self.resting + 1 if rests else 0
        if self.resting >= INACTIVE_STEPS and ("inactive", "") not in self.said:
            self.said.add(("inactive", ""))
            self._say(
                f"all weights have been equal for {self.resting} steps: every update was that of the plain sum, at the "
                "method's price. Train the plain sum, or let gradsurgery.diagnose say what the losses need."
            )

    def see(self, report: Report) -> None:
        """Look at a recorded step.

        Args:
            report: What happened in it.
        """
        if (weights := self._weights(report)) is None:
            return
        sizes = {name: abs(weight) for name, weight in weights.items()}
        mean = sum(sizes.values()) / len(sizes)
        self.first_mean = self.first_mean or mean
        norms = report.norms
        parts = {name: size * abs((norms or report.losses)[name]) for name, size in sizes.items()}
        total = sum(parts.values())
        for name, size in sizes.items():
            collapsed = size < COLLAPSED * mean and not parts[name] * len(parts) >= COLLAPSED * total
            if self._lasts("collapsed", name, collapsed):
                self._say(
                    f"the weight of {name!r} has been below {COLLAPSED:g} of the mean weight for {LASTING} recorded "
                    f"steps: the loss is hardly trained. {self._collapse()}"
                )
            if self._lasts("run away", name, size > self.first_mean / COLLAPSED):
                self._say(
                    f"the weight of {name!r} has run away, to {size:.3g}, where the mean weight was "
                    f"{self.first_mean:.3g} at the start. Set max_weight=10 (or another ceiling), or lower the "
                    "learning rate."
                )
            if norms is not None and self._lasts("drives", name, parts[name] > DRIVES * total):
                loudest = norms[name] >= max(norms.values())
                self._say(
                    f"{name!r} drives the update: {parts[name] / total:.1%} of the weighted gradient norms are its "
                    f"own, for {LASTING} recorded steps. {_LOUD if loudest else _CHOSEN}"
                )

        for name, weight in weights.items():
            self.first.setdefault(name, (weight, report.losses[name]))
        if norms is not None:
            self._see_norms(parts, norms, report.losses)
        self._see_moves(weights, report.losses)

    def _see_norms(self, parts: dict[str, float], norms: dict[str, float], losses: dict[str, float]) -> None:
        """Weighted gradient norms that are far apart."""
        short, long = min(parts, key=lambda k: parts[k]), max(parts, key=lambda k: parts[k])
        uneven = parts[long] > UNEVEN * parts[short] > 0 and not self._learnt(short, losses[short])
        if self._lasts("uneven", "", uneven) and ("drives", long) not in self.said:
            self._say(
                f"the weighted gradient of {long!r} is {parts[long] / parts[short]:.3g} times as long as that of "
                f"{short!r}, and has been more than {UNEVEN:g} times longer for {LASTING} recorded steps. "
                f"{_EVEN if norms[long] >= max(norms.values()) else _CHOSEN}"
            )

    def _learnt(self, name: str, loss: float) -> bool:
        """Whether a loss has fallen so far that a short gradient, or a small weight, is no wonder."""
        return abs(loss) * UNEVEN < abs(self.first[name][1])

    def _collapse(self) -> str:
        cure = "" if self.weighter is None else self.weighter.if_collapsed
        return cure or "Set min_weight=0.1 (or another floor), or divide the losses by their size first."

    def _see_moves(self, weights: dict[str, float], losses: dict[str, float]) -> None:
        """Weights of a weighter that move very far, or not at all, at the beginning."""
        self.seen += 1
        if self.weighter is None or not self.from_start or self.seen > max(EARLY_STEPS, STILL_STEPS):
            return
        for name, weight in weights.items():
            first, loss = self.first[name]
            self.still = self.still and abs(weight - first) <= STILL * abs(first)
            far = abs(weight) * EARLY_FOLD < abs(first) and abs(weight * losses[name]) * EARLY_FOLD < abs(first * loss)
            early = self.adaptive and far and self.seen <= EARLY_STEPS and not self._learnt(name, losses[name])
            if self._lasts("early", name, early):
                self._say(
                    f"the weight of {name!r} has fallen from {first:.3g} to {weight:.3g} in {self.seen} recorded "
                    f"steps, and {self.base} goes on dividing by the size of its gradients before. {_EARLY}"
                )
        cure = self.weighter.if_still
        if self.seen == STILL_STEPS and self.still and cure and self._apart(weights, losses):
            self._say(f"no weight has moved by more than {STILL:.0%} in {STILL_STEPS} recorded steps. {cure}")

    def _apart(self, weights: dict[str, float], losses: dict[str, float]) -> bool:
        """Whether there is something that weights could even out."""
        sizes = [abs(weight * losses[name] if self.by_size else losses[name]) for name, weight in weights.items()]
        begun = [1.0 if self.by_size else abs(self.first[name][1]) for name in weights]
        return max(sizes, default=0.0) > 0 and any(
            a * d > APART * b * c for a, b in zip(sizes, begun, strict=True) for c, d in zip(sizes, begun, strict=True)
        )

    def fall(self, losses: dict[str, float], step: int) -> None:
        """Look whether losses fall.

        Args:
            losses: The losses of a recorded step.
            step: Its number. A run that is watched from its middle is not looked at.
        """
        if self.from_start is None:
            self.from_start = step <= LASTING
        if not self.from_start or self.recorded == FALL_STEPS:
            return
        self.recorded += 1
        for name, loss in losses.items():
            begun = self.begun.setdefault(name, [])
            if len(begun) < LASTING:
                begun.append(loss)
            self.recent.setdefault(name, deque(maxlen=LASTING)).append(loss)
        if self.recorded == FALL_STEPS:
            ends = {name: (sum(old) / len(old), sum(self.recent[name]) / len(old)) for name, old in self.begun.items()}
            if all(last > first - FALLEN * abs(first) for first, last in ends.values()):
                found = ", ".join(f"{name!r} {first:.4g} → {last:.4g}" for name, (first, last) in ends.items())
                self._say(
                    f"no loss has fallen in {FALL_STEPS} recorded steps (means over the first and last {LASTING}: "
                    f"{found}). Train one alone with this learning rate, to see whether it can; if so, divide the "
                    "losses by their size first."
                )

    def _weights(self, report: Report) -> dict[str, float] | None:
        """The weights of a step that says something about the method; None for others."""
        weights = report.weights
        if weights is None or len(weights) < 2 or "warmup" in report.flags or self.by_priority:
            return None
        return weights if sum(map(abs, weights.values())) > 0 else None

    def _lasts(self, what: str, name: str, holds: bool) -> bool:
        """Whether something is to be said now: it has lasted, and was not said yet."""
        key = (what, name)
        self.since[key] = self.since[key] + 1 if holds else 0
        if self.since[key] < LASTING or key in self.said:
            return False
        self.said.add(key)
        return True

    def _say(self, what: str) -> None:
        message = f"{self.name}: {what}"
        self.advice.append(message)
        warn(message)


def scalars(report: Report) -> dict[str, float]:
    """Take a report apart into named numbers, for a logger.

    Args:
        report: The report.

    Returns:
        "total", "loss/NAME", and where the method has them "weight/NAME", "norm/NAME", "cosine/NAME/NAME" for each pair
        "conflict_rate", and "projections".
    """
    return dict(_scalars(report))


def _scalars(report: Report) -> Iterator[tuple[str, float]]:
    losses = report.losses
    yield "total", float(sum(losses.values()))
    for kind, values in (("loss", losses), ("weight", report.weights), ("norm", report.norms)):
        for name, value in (values or {}).items():
            yield f"{kind}/{name}", value
    cosines = report.cosines
    if cosines is not None and len(report.names) > 1:
        table = cosines.tolist()
        for i, first in enumerate(report.names):
            for j in range(i + 1, len(report.names)):
                yield _key("cosine", first, report.names[j]), table[i][j]
        rate = report.conflict_rate
        assert rate is not None
        yield "conflict_rate", rate
    if report.projections is not None:
        yield "projections", float(report.projections)


def _key(kind: str, *names: str) -> str:
    """The name of a column; no two pairs have the same."""
    if len(names) > 1:
        names = tuple(name.replace("%", "%25").replace("/", "%2F") for name in names)
    return "/".join((kind, *names))


def _encodes(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def needs(what: str, package: str) -> str:
    """The error where a package is missing.

    Args:
        what: What was asked for.
        package: What it needs.

    Returns:
        A sentence, and what to do.
    """
    return f"Monitor.{what}: {package} is not installed. Install it: pip install {package}"


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _mean(values: np.ndarray) -> float:
    known = _known(values)
    return float(known.mean()) if len(known) else math.nan


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
