"""Trainings by the thousand: several at a time, each kept as soon as it is finished, none made twice."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import contenders
from benchmarks.evidence.problem import one_thread
from benchmarks.evidence.training import Plan, Training, first_trainings, last_trainings, pairs, train

Records = dict[str, dict[str, Any]]
Watch = Callable[[str], None]


def load(path: Path) -> Records:
    """Read the results so far.

    Args:
        path: A file with one JSON object a line; it need not exist. A last line that was cut off is left out.

    Returns:
        Results by key.

    Raises:
        ValueError: A line is not JSON, and it is not the last.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number + 1 == len(lines):
                break
            raise ValueError(f"{path}:{number + 1} is not JSON. Remove the line, its training is made anew.") from error
        records[record["key"]] = record
    return records


class Store:
    """Results on disk.

    Args:
        path: The file. Its last line is mended if it was cut off.
    """

    def __init__(self, path: Path) -> None:
        self.records = load(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        self._path = path

    def add(self, record: dict[str, Any]) -> None:
        """Keep a result at once.

        Args:
            record: The result, with its key.
        """
        self.records[record["key"]] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Queue:
    """What is to be trained next: all that is missing of a plan, in an order that gives every problem its turn.

    First come the trainings that choose settings and the first seed that is tested, problem by problem, then the
    further seeds: a run that is cut short then has fewer seeds instead of fewer problems.

    Args:
        plan: The plan.
        records: Results so far; the queue reads what is added to it.
    """

    def __init__(self, plan: Plan, records: Records) -> None:
        self.plan, self._records = plan, records
        self._first = {pair: first_trainings(plan, *pair) for pair in pairs(plan)}
        self._tuned: dict[tuple[str, str], list[Training]] = {}
        self._given: set[str] = set()

    def total(self) -> int:
        """Number of trainings in the plan."""
        return sum(len(trainings) + len(self.plan.seeds) for trainings in self._first.values())

    def done(self) -> dict[str, int]:
        """Number of finished trainings of the plan, by problem."""
        found = dict.fromkeys(self.plan.problems, 0)
        for pair, trainings in self._first.items():
            found[pair[0]] += sum(training.key in self._records for training in trainings)
            found[pair[0]] += sum(training.key in self._records for training in self._last(pair))
        return found

    def _last(self, pair: tuple[str, str]) -> list[Training]:
        if pair not in self._tuned:
            trainings = self._first[pair]
            if any(training.key not in self._records for training in trainings):
                return []
            self._tuned[pair] = last_trainings(self.plan, trainings, self._records)
        return self._tuned[pair]

    def missing(self) -> Iterator[Training]:
        """Trainings that can begin now and have not been given out; ask again when more are finished.

        Yields:
            One training after the other.
        """
        for turn in range(len(self.plan.seeds)):
            for pair, trainings in self._first.items():
                last = self._last(pair)
                for training in [*(trainings if turn == 0 else []), *last[turn : turn + 1]]:
                    if training.key not in self._records and training.key not in self._given:
                        self._given.add(training.key)
                        yield training


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees an interrupt, and lets what runs come to its end
    torch.set_num_threads(1)


def run(plan: Plan, store: Store, jobs: int, watch: Watch = lambda name: None) -> None:
    """Make all trainings of a plan that are missing.

    Args:
        plan: The plan.
        store: Results so far, and those that come.
        jobs: Trainings at the same time, each in a process with one thread.
        watch: Called after every training with the name of its problem.
    """
    queue = Queue(plan, store.records)
    if jobs == 1:
        with one_thread():
            while (training := next(queue.missing(), None)) is not None:
                store.add(train(training, plan))
                watch(training.problem)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    pool = ProcessPoolExecutor(jobs, context, _start_worker)
    running: dict[Future, Training] = {}
    try:
        while True:
            # A few in stock, so that no worker waits; not all, since settings are chosen on the way.
            for training in queue.missing():
                running[pool.submit(train, training, plan)] = training
                if len(running) >= 4 * jobs:
                    break
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                store.add(future.result())
                watch(running.pop(future).problem)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in running:  # what came to its end meanwhile
            if future.done() and not future.cancelled() and future.exception() is None:
                store.add(future.result())


def estimate(plan: Plan) -> float:
    """Seconds of processor time that the whole plan takes, from a few steps of PCGrad and of the plain sum.

    Args:
        plan: The plan.

    Returns:
        Seconds, to a factor of two or so.
    """
    total = 0.0
    with one_thread():
        for name in plan.problems:
            problem = plan.problem(name)
            seconds = {}
            for contender in (contenders.SUM, "PCGrad"):
                stepper = contenders.stepper(contender, problem, 0, problem.lr)
                steps = min(8, problem.steps)
                for step in range(2 * steps):
                    if step == steps:  # the first half warms up
                        began = time.process_time()
                    stepper.step(step % problem.steps)
                seconds[contender] = (time.process_time() - began) / steps
            for problem_name, contender in pairs(plan):
                if problem_name == name:
                    surgery = contender in contenders.surgeries()
                    count = len(first_trainings(plan, name, contender)) + len(plan.seeds)
                    total += count * problem.steps * seconds["PCGrad" if surgery else contenders.SUM]
    return total


@contextmanager
def progress(plan: Plan, store: Store, shown: bool) -> Iterator[Watch]:
    """Bars for the whole and for each problem; a line every now and then where there is no terminal.

    Args:
        plan: The plan.
        store: Results so far.
        shown: Whether anything is shown.

    Yields:
        What to call after every training.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    queue = Queue(plan, store.records)
    done, total = queue.done(), queue.total()
    each = {
        name: sum(len(first_trainings(plan, *pair)) + len(plan.seeds) for pair in pairs(plan) if pair[0] == name)
        for name in plan.problems
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    terminal = Console().is_terminal
    began, before = time.monotonic(), sum(done.values())
    with Progress(*columns, disable=not (shown and terminal)) as bars:
        whole = bars.add_task("[bold]all problems", total=total, completed=before)
        tasks = {name: bars.add_task(name, total=each[name], completed=done[name]) for name in plan.problems}

        def watch(name: str) -> None:
            done[name] += 1
            bars.advance(whole)
            bars.advance(tasks[name])
            made = sum(done.values())
            if shown and not terminal and (made % 100 == 0 or made == total):
                minutes = (time.monotonic() - began) / 60
                left = minutes * (total - made) / max(1, made - before)
                sys.stderr.write(f"{made} of {total} trainings, {minutes:.0f} min, some {left:.0f} min left\n")

        yield watch
