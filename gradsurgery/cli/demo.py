"""Train one network to read and to find handwritten digits, with each method, and show what became of both losses."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradsurgery
from gradsurgery import MGDA, GradNormWeighter, MultiLossOptimizer, PCGrad
from gradsurgery.cli import complain, say_json, whole
from gradsurgery.problems import digits
from gradsurgery.problems.digits import DigitFinder, Scenes

NAME = "demo"
HELP = "train on two losses of very different size with each method, and compare"

QUICK_STEPS = 300
#: What the command needs beyond the library: modules, and the packages they come from.
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}

Wrap = Callable[[torch.optim.Optimizer, DigitFinder], MultiLossOptimizer]


@dataclass(frozen=True)
class Method:
    """One way to train on both losses.

    Args:
        name: What the table calls it.
        wrap: Puts a method of this library around the optimizer; None for plain sums.
        box_weight: Factor of the box loss; that of the class loss is 1.
        relative: Divide each loss by its value in the first step.
        family: Of the methods that share one, the table shows that which does best on the validation images.
        extra: Trained with ``--all`` only.
    """

    name: str
    wrap: Wrap | None = None
    box_weight: float = 1.0
    relative: bool = False
    family: str | None = None
    extra: bool = False


def _gradnorm(optimizer: torch.optim.Optimizer, model: DigitFinder, alpha: float) -> GradNormWeighter:
    return GradNormWeighter(optimizer, model.last_shared, alpha=alpha)


#: In the order of the table.
METHODS = (
    Method("plain sum"),
    # Half decades around the ratio of the two losses in the first step.
    *(Method(f"fixed, box × {w:g}", box_weight=w, family="fixed") for w in (1e-4, 3e-5, 1e-5, 3e-6)),
    Method("relative sum", relative=True),
    Method("PCGrad", lambda optimizer, model: PCGrad(optimizer)),
    Method("PCGrad, relative", lambda optimizer, model: PCGrad(optimizer), relative=True, extra=True),
    Method("MGDA", lambda optimizer, model: MGDA(optimizer)),
    Method("MGDA, l2", lambda optimizer, model: MGDA(optimizer, normalize="l2"), extra=True),
    Method("MGDA, loss", lambda optimizer, model: MGDA(optimizer, normalize="loss")),
    Method("MGDA, loss+", lambda optimizer, model: MGDA(optimizer, normalize="loss+"), extra=True),
    Method("MGDA, relative", lambda optimizer, model: MGDA(optimizer), relative=True, extra=True),
    Method("GradNorm", functools.partial(_gradnorm, alpha=0.12), extra=True),
    Method("GradNorm, relative", functools.partial(_gradnorm, alpha=0.12), relative=True),
    Method("GradNorm, alpha 1.5", functools.partial(_gradnorm, alpha=1.5), relative=True, extra=True),
)


@dataclass(frozen=True)
class Settings:
    """What all methods have in common.

    Args:
        steps: Training steps.
        seeds: Each seed has its own initial weights, training images and batches, the same for all methods.
        batch: Images in a batch.
        lr: Highest learning rate of AdamW: it rises over the first tenth of the steps, then falls to zero.
        scenes: Training images.
        probe_every: The cosine between the two gradients is measured in every so many steps.
        jobs: Trainings at the same time, each in a process with one thread.
    """

    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 32
    lr: float = 1e-2
    scenes: int = 16_384
    probe_every: int = 10
    jobs: int = 1


class Score(NamedTuple):
    """How well a network does on images it has not seen.

    Attributes:
        accuracy: Share of the images whose digit it reads right.
        iou: Mean overlap of its box with the true one.
        both: Share of the images whose digit it reads right and whose box overlaps by at least 0.75.
        class_loss: Cross-entropy, nats.
        box_loss: Squared error of the box, square pixels.
    """

    accuracy: float
    iou: float
    both: float
    class_loss: float
    box_loss: float


@dataclass(frozen=True)
class Run:
    """One training and what came of it.

    Args:
        method: Name of the method.
        seed: Its seed.
        losses: Class and box loss of every training batch, (steps, 2).
        cosines: Cosine between the gradients of the two losses over the trunk, at every probed step.
        seconds: Time of a step: forward pass, backward passes and the optimizer's step. A tenth of the steps were
            faster, which tells what a step costs where other programs do not disturb it.
        validation: Score on the validation images.
        test: Score on the test images.
        digits: Digits read on the first test images, (k,).
        boxes: Boxes found there, (k, 4).
    """

    method: str
    seed: int
    losses: Tensor
    cosines: Tensor
    seconds: float
    validation: Score
    test: Score
    digits: Tensor
    boxes: Tensor


@functools.lru_cache(maxsize=1)
def training_scenes(seed: int, count: int) -> Scenes:
    """The training images of a seed.

    Args:
        seed: The seed.
        count: How many.

    Returns:
        The images; kept for the next training with the same seed.
    """
    return digits.paste(digits.source("train"), count, seed)


@functools.lru_cache(maxsize=1)
def held_out_scenes() -> tuple[Scenes, Scenes]:
    """The images for validation and for testing, the same for all seeds.

    Returns:
        1000 images of the 200 validation digits, and 1588 of the 397 test digits.
    """
    return digits.paste(digits.source("validation"), 1000, 1), digits.paste(digits.source("test"), 1588, 2)


def batches(scenes: Scenes, settings: Settings, seed: int) -> Iterator[Scenes]:
    """Yield the batches of a training: all images in random order, again and again.

    Args:
        scenes: The training images.
        settings: Number of steps and size of a batch.
        seed: Seed of the order.

    Yields:
        One batch for each step.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting = torch.cat([waiting, torch.randperm(len(scenes.labels), generator=generator)])
        chosen, waiting = waiting[: settings.batch], waiting[settings.batch :]
        yield Scenes(*(field[chosen] for field in scenes))


@torch.no_grad()
def score(model: DigitFinder, scenes: Scenes) -> tuple[Score, Tensor, Tensor]:
    """Try a network on images.

    Args:
        model: The network. It is left in evaluation mode.
        scenes: The images and the truth, n of them.

    Returns:
        The score, the digits read (n,) and the boxes found (n, 4).
    """
    model.eval()
    scores, boxes = model(scenes.images)
    read, overlap = scores.argmax(dim=1), digits.iou(boxes, scenes.boxes)
    right = read == scenes.labels
    both = right & (overlap >= 0.75)
    losses = digits.losses((scores, boxes), scenes)
    numbers = (right.float().mean(), overlap.mean(), both.float().mean(), losses["class"], losses["box"])
    return Score(*(float(number) for number in numbers)), read, boxes


def cosine(losses: dict[str, Tensor], model: DigitFinder) -> float:
    """The cosine between the gradients of the two losses over the trunk; ``.grad`` is not touched.

    Args:
        losses: The two losses. Their graph is kept.
        model: The network.

    Returns:
        Number between −1 and 1; below 0 the losses are in conflict.
    """
    trunk = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
    first, second = (torch.cat([part.flatten() for part in row]).double() for row in rows)
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0, eps=0.0))


def train(method: Method, seed: int, settings: Settings, tick: Callable[[], None] = lambda: None) -> Run:
    """Train a new network and test it.

    Args:
        method: How to train.
        seed: Seed of initial weights, images and batches.
        settings: What all methods have in common.
        tick: Called after every step.

    Returns:
        The outcome.
    """
    model = DigitFinder(seed)
    base = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    optimizer = base if method.wrap is None else method.wrap(base, model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    values: list[list[float]] = []
    cosines: list[float] = []
    seconds: list[float] = []
    first: dict[str, float] = {}
    for step, batch in enumerate(batches(training_scenes(seed, settings.scenes), settings, seed)):
        began = time.perf_counter()
        losses = digits.losses(model(batch.images), batch)
        elapsed = time.perf_counter() - began

        values.append([float(loss.detach()) for loss in losses.values()])
        first = first or dict(zip(losses, values[0], strict=True))
        if step % settings.probe_every == 0:  # outside the clock, and the same for all methods
            cosines.append(cosine(losses, model))

        began = time.perf_counter()
        if method.relative:
            losses = {name: loss / first[name] for name, loss in losses.items()}
        optimizer.zero_grad()
        if isinstance(optimizer, MultiLossOptimizer):
            optimizer.backward(losses)
        else:
            (losses["class"] + method.box_weight * losses["box"]).backward()
        optimizer.step()
        seconds.append(elapsed + time.perf_counter() - began)
        scheduler.step()
        tick()

    (on_validation, _, _), (on_test, read, boxes) = (score(model, scenes) for scenes in held_out_scenes())
    return Run(
        method=method.name,
        seed=seed,
        losses=torch.tensor(values),
        cosines=torch.tensor(cosines),
        seconds=sorted(seconds)[len(seconds) // 10],
        validation=on_validation,
        test=on_test,
        digits=read[:64],
        boxes=boxes[:64],
    )


# Workers count their steps in one shared array, an entry for each job, where the progress bar reads them.
_counts: Any = None


def _start_worker(counts: Any) -> None:
    global _counts
    _counts = counts
    torch.set_num_threads(1)


def _work(job: int, method: int, seed: int, settings: Settings) -> Run:
    def tick() -> None:
        _counts[job] += 1

    return train(METHODS[method], seed, settings, tick)


def train_all(
    methods: Sequence[Method], settings: Settings, watch: Callable[[Sequence[int]], None] = lambda steps: None
) -> list[Run]:
    """Train with every method and every seed, several trainings at a time.

    Each training has one thread: small images leave a second one little to do, and threads that share busy cores wait
    for each other.

    Args:
        methods: Some of :data:`METHODS`.
        settings: What all methods have in common.
        watch: Called a few times a second with the number of steps made so far for each of the methods.

    Returns:
        The runs, seed by seed in the order of the methods.
    """
    # Seed by seed, so that a worker seldom has to paste images anew.
    jobs = [(METHODS.index(method), seed) for seed in settings.seeds for method in methods]

    def report(counts: Sequence[int]) -> None:
        watch([sum(counts[position :: len(methods)]) for position in range(len(methods))])

    if settings.jobs == 1:
        return _train_here(jobs, settings, report)
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    counts = context.Array("i", len(jobs), lock=False)
    with ProcessPoolExecutor(min(settings.jobs, len(jobs)), context, _start_worker, (counts,)) as pool:
        futures = [pool.submit(_work, job, method, seed, settings) for job, (method, seed) in enumerate(jobs)]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                report(counts[:])
        finally:  # after an error or an interrupt, start no more
            pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def _train_here(
    jobs: Sequence[tuple[int, int]], settings: Settings, report: Callable[[Sequence[int]], None]
) -> list[Run]:
    counts = [0] * len(jobs)
    runs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job, (method, seed) in enumerate(jobs):

            def tick(job: int = job) -> None:
                counts[job] += 1
                if counts[job] % 10 == 0:
                    report(counts)

            runs.append(train(METHODS[method], seed, settings, tick))
            report(counts)
    finally:
        torch.set_num_threads(threads)
    return runs


@dataclass(frozen=True)
class Row:
    """A row of the table: one method, over all seeds.

    Args:
        name: What the table calls it.
        runs: Its training runs, one per seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def mean(self) -> Score:
        """Mean of the test scores over the seeds."""
        return Score(*(statistics.fmean(column) for column in zip(*(run.test for run in self.runs), strict=True)))

    @property
    def spread(self) -> Score | None:
        """Standard deviation of the test scores over the seeds; None for one seed."""
        if len(self.runs) < 2:
            return None
        return Score(*(statistics.stdev(column) for column in zip(*(run.test for run in self.runs), strict=True)))

    @property
    def seconds(self) -> float:
        """Time of a step, the median over the seeds."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def conflict_rate(self) -> float:
        """Share of the probed steps at which the gradients of the two losses had a negative inner product."""
        return float((torch.cat([run.cosines for run in self.runs]) < 0).double().mean())

    @property
    def validation(self) -> float:
        """Share of the validation images with digit and box right, over all seeds: what settings are chosen by."""
        return statistics.fmean(run.validation.both for run in self.runs)

    def cells(self) -> tuple[str, ...]:
        """Write the numbers down.

        Returns:
            One cell for each of :data:`COLUMNS`.
        """
        mean, spread = self.mean, self.spread

        def share(field: str) -> str:
            text = f"{100 * getattr(mean, field):.1f}"
            return text if spread is None else f"{text} ±{100 * getattr(spread, field):.1f}"

        return (
            self.name,
            share("accuracy"),
            share("iou"),
            share("both"),
            f"{mean.class_loss:.2f}",
            f"{mean.box_loss:.0f}",
            f"{1000 * self.seconds:.1f}",
            f"{100 * self.conflict_rate:.0f}",
        )


#: Headings of the table, in two lines so that it fits an ordinary terminal.
COLUMNS = (
    "",
    "digit\nright, %",
    "box\nIoU, %",
    "both\nright, %",
    "class\nloss",
    "box\nloss",
    "ms\nper step",
    "conflict,\n%",
)


def rows(methods: Sequence[Method], runs: Sequence[Run]) -> list[Row]:
    """Gather the runs into the rows of the table.

    Args:
        methods: The methods, in the order of the table.
        runs: Their runs.

    Returns:
        A row for each method without a family, and one for the best of each family on the validation images, where the
        family's first member stands.
    """
    families: dict[str, list[Row]] = {}
    for method in methods:
        row = Row(method.name, tuple(run for run in runs if run.method == method.name))
        families.setdefault(method.family or method.name, []).append(row)
    return [max(members, key=lambda row: row.validation) for members in families.values()]


def winner_first(table: Sequence[Row]) -> list[Row]:
    """Sort the rows for a reader.

    Args:
        table: The rows.

    Returns:
        The rows, the one with the most test images right in both tasks first.
    """
    return sorted(table, key=lambda row: -row.mean.both)


def markdown(table: Sequence[Row]) -> str:
    """Write the table for a Markdown page.

    Args:
        table: The rows, in any order.

    Returns:
        The lines of the table, the best row first, each with its line break.
    """
    headings = tuple(heading.replace("\n", " ") for heading in COLUMNS)
    lines = [headings, ("---", *["---:"] * (len(COLUMNS) - 1)), *(row.cells() for row in winner_first(table))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def remarks(methods: Sequence[Method], table: Sequence[Row], settings: Settings) -> list[str]:
    """Say what the table means, and what was done to get it.

    Args:
        methods: The methods that were trained.
        table: The rows.
        settings: What they had in common.

    Returns:
        Sentences.
    """
    seeds = len(settings.seeds)
    fixed = [method for method in methods if method.family == "fixed"]
    said = [
        f"{settings.steps} steps of {settings.batch} images, {seeds} seed{'s' if seeds > 1 else ''}"
        + (", mean ± standard deviation" if seeds > 1 else "")
        + ". Both right: the digit, and the box to an IoU of 0.75. All on test images.",
        "Conflict: how often the gradients of the two losses over the trunk point against each other.",
    ]
    if fixed:
        weights = ", ".join(f"{method.box_weight:g}" for method in fixed)
        said.append(
            f"Fixed: the best on validation images of box weights {weights}, so {len(fixed)} trainings instead of one."
        )
    if any(method.relative for method in methods):
        said.append("Relative: each loss divided by its value in the first step.")
    return said


def summary(methods: Sequence[Method], runs: Sequence[Run], table: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """Collect every number behind the table, for a file.

    Args:
        methods: The methods that were trained.
        runs: Their runs.
        table: The rows.
        settings: What they had in common.

    Returns:
        Plain values.
    """
    shown = {row.name for row in table}
    return {
        "gradsurgery": gradsurgery.__version__,
        "torch": torch.__version__,
        "settings": asdict(settings),
        "methods": [
            {
                "name": method.name,
                "in the table": method.name in shown,
                "runs": [
                    {
                        "seed": run.seed,
                        "test": run.test._asdict(),
                        "validation": run.validation._asdict(),
                        "milliseconds a step": round(1000 * run.seconds, 2),
                        "conflict rate": round(float((run.cosines < 0).double().mean()), 3),
                        "mean cosine": round(float(run.cosines.mean()), 4),
                    }
                    for run in runs
                    if run.method == method.name
                ],
            }
            for method in methods
        ],
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: Where to.
    """
    parser.add_argument("--quick", action="store_true", help="one seed and fewer steps: a first look, under a minute")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/demo"),
        metavar="FOLDER",
        help="folder for pictures and numbers (%(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="the first seed (%(default)s)")
    parser.add_argument(
        "--seeds", type=whole(1), metavar="N", help=f"number of seeds ({len(Settings.seeds)}; quick: 1)"
    )
    parser.add_argument(
        "--steps", type=whole(1), metavar="N", help=f"training steps ({Settings.steps}; quick: {QUICK_STEPS})"
    )
    parser.add_argument("--jobs", type=whole(1), metavar="N", help="trainings at the same time (one a core, 4 at most)")
    parser.add_argument("--all", action="store_true", help="more variants of the methods, at twice the time")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON, instead of the table")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        The exit code.
    """
    missing = [package for module, package in EXTRA.items() if not _importable(module)]
    if missing:
        return complain(
            NAME, f"the demo needs {', '.join(missing)}. Install what is missing: pip install {' '.join(missing)}"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return complain(NAME, f"cannot write to {args.output}: {error.strerror}. Choose another folder with --output.")

    count = args.seeds or (1 if args.quick else len(Settings.seeds))
    settings = Settings(
        steps=args.steps or (QUICK_STEPS if args.quick else Settings.steps),
        seeds=tuple(range(args.seed, args.seed + count)),
        jobs=args.jobs or min(4, _cores()),
    )
    methods = METHODS if args.all else tuple(method for method in METHODS if not method.extra)
    began = time.perf_counter()
    with _progress(methods, settings, shown=not args.no_progress) as watch:
        runs = train_all(methods, settings, watch)
    table = rows(methods, runs)
    seconds = time.perf_counter() - began
    numbers = summary(methods, runs, table, settings)
    _save(table, numbers, settings, args.output)
    if args.json:
        say_json(numbers)
    else:
        _show(methods, table, settings, seconds, args.output)
    return 0


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress(methods: Sequence[Method], settings: Settings, shown: bool) -> Iterator[Callable[[Sequence[int]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    steps = settings.steps * len(settings.seeds)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # On standard error, so that what is piped is the result alone.
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        whole = progress.add_task("[bold]all methods", total=steps * len(methods))
        bars = [progress.add_task(method.name, total=steps) for method in methods]

        def watch(made: Sequence[int]) -> None:
            progress.update(whole, completed=sum(made))
            for bar, done in zip(bars, made, strict=True):
                progress.update(bar, completed=done)

        yield watch


def _show(methods: Sequence[Method], table: Sequence[Row], settings: Settings, seconds: float, folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file or a pipe has room
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for number, heading in enumerate(COLUMNS):
        grid.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in winner_first(table):
        grid.add_row(*row.cells())
    console.print(grid)
    for sentence in remarks(methods, table, settings):
        console.print(sentence, highlight=False)
    console.print(f"Trained in {seconds:.0f} s, {settings.jobs} at a time.", highlight=False)
    console.print(f"Pictures and numbers are in {folder}.", highlight=False)


def _save(table: Sequence[Row], numbers: dict[str, Any], settings: Settings, folder: Path) -> None:
    from gradsurgery.cli import demo_pictures

    (folder / "table.md").write_text(markdown(table), encoding="utf-8")
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    demo_pictures.draw(table, held_out_scenes()[1], settings, folder)
