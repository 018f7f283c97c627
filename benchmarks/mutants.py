"""Which lines of logic no test dies without: each mutant changes one operator, and some test should fail.

python -m benchmarks.mutants [--files step transaction] [--count 40] [--seed 0] [--cases 10] [--spawned]

The tests are collected once, and each is run once to see which lines it reaches; some cases of a test that has many,
and none that starts processes. Every mutant is a fork of that process in which one function has another code: the
tests that reach its line run, quick ones first, until one fails or they have taken long enough. What lies outside of
functions is imported anew. With `--spawned` a mutant that has lived so far is written into a copy of the library, for
the tests that start processes, which take a minute for each mutant. A mutant on which no test fails has survived, and
is printed at once. Those that change nothing a user can see are explained in `mutants.json`, and not tried.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import gc
import importlib.machinery
import itertools
import json
import math
import multiprocessing.process
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKWARD = ("test_backward", "test_backward_values", "test_propose_and_commit", "test_report_and_combine")
#: Of methods that keep rows between steps, or act on private parameters.
OWN_ROWS = ("test_row_averages", "test_row_methods_alike", "test_per_loss_adam")
#: Of ways of holding gradients.
ROADS = ("test_gradients", "test_engines", "test_group_of_one")
#: The files that are changed, and the tests that are to notice.
TESTS = {
    "step": (
        "test_kinds_of_step", "test_switches", *BACKWARD, "test_cheap_modes", "test_common_descent", *OWN_ROWS,
        "test_group_of_one",
    ),
    "batch": (
        *BACKWARD, "test_losses", "test_accumulation", "test_kinds_of_step", "test_switches", "test_joined",
        "test_per_sample", "test_deferred", "test_group_of_one", "test_modules",
    ),
    "transaction": (
        "test_state", "test_faults", "test_misuse", "test_accumulation", "test_propose_and_commit",
        "test_weighting_by_history", "test_switches", "test_gram_methods",
    ),
    "guard": ("test_faults", "test_range", "test_deferred"),
    "sharing": ("test_kinds_of_step", *BACKWARD, "test_joined", *OWN_ROWS, "test_group_of_one"),
    "solve": ("test_switches", "test_range", "test_priority_methods"),
    "settings": ("test_switches", "test_cheap_modes", "test_messages", "test_common_descent", "test_kinds_of_step"),
    "gradients/exact": ("test_exact",),
    "gradients/gram": ("test_gram", "test_precision", "test_range", "test_exact"),
    "gradients/descent": ("test_common_descent", "test_range"),
    "gradients/dense": ("test_kinds_of_step", "test_cheap_modes", "test_common_descent", "test_graddrop", *ROADS),
    "gradients/rows": (
        *BACKWARD, "test_precision", "test_kinds_of_step", "test_cheap_modes", *OWN_ROWS, *ROADS, "test_joined",
    ),
    "gradients/base": ("test_kinds_of_step", "test_joined", "test_common_descent", *ROADS),
    "gradients/flat": ("test_kinds_of_step", "test_common_descent", *ROADS),
    "gradients/blocks": ("test_blocks", "test_engines"),
}  # fmt: skip
#: The tests that start processes, and which of their cases notice the most.
SPAWNED = ("test_ddp", "test_sharded")
SPAWNED_CASES = "(2- or sharded) and not (replicas or process: or fully_shard:)"
#: Why some mutants may live: a list for each file, of the line, the change and the reason.
EXPLAINED = Path(__file__).with_name("mutants.json")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
#: What the process of a mutant ends with.
SURVIVED, KILLED, BROKEN = 0, 1, 3


class Mutant(NamedTuple):
    """One change of a file."""

    line: int
    text: str  # of that line
    change: str
    span: range  # lines of the statement
    function: bool  # whether a function holds it
    source: str  # of the file
    place: int  # of the node among all
    choice: int  # of what the node may be replaced by

    @property
    def tree(self) -> ast.Module:
        """The whole file with the change, and with the lines of the original."""
        whole = ast.parse(self.source)
        old = next(itertools.islice(_places(whole), self.place, None))[0]
        new = next(itertools.islice(changes(old), self.choice, None))
        # What is left out stays where nothing runs: a function takes new code only with the same names around it.
        if isinstance(new, ast.Pass):
            new = ast.If(ast.Constant(False), [old], [])
        elif isinstance(old, ast.IfExp):
            new = ast.IfExp(ast.Constant(True), new, old)
        return ast.fix_missing_locations(_Replace(old, new).visit(whole))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be replaced by."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        new.ops = [COMPARISONS[type(node.ops[0])]()]
        yield new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield new.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield new
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
        yield new
    elif isinstance(node, ast.IfExp):
        yield new.body
        yield new.orelse
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def _idle(tree: ast.AST) -> set[int]:
    """Nodes without an effect: annotations, which nothing runs, and `strict`, with which `zip` asserts something."""
    found = set()
    for node in ast.walk(tree):
        fields = ("value",) if isinstance(node, ast.keyword) and node.arg == "strict" else ("annotation", "returns")
        for field in fields:
            if (inside := getattr(node, field, None)) is not None:
                found |= {id(part) for part in ast.walk(inside)}
    return found


def _places(node: ast.AST, span: range = range(0), function: bool = False) -> Iterator[tuple[ast.AST, range, bool]]:
    """All nodes, with the lines of the statement that holds each, and whether a function's body does."""
    if isinstance(node, ast.stmt):
        body = getattr(node, "body", None)
        span = range(node.lineno, body[0].lineno if body else node.end_lineno + 1)
    yield node, span, function
    for field, value in ast.iter_fields(node):
        inside = function or (field == "body" and isinstance(node, ast.FunctionDef))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _places(child, span, inside)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file."""
    tree, lines, found = ast.parse(source), source.splitlines(), []
    idle = _idle(tree)
    for place, (node, span, function) in enumerate(_places(tree)):
        for k, new in enumerate(changes(node) if id(node) not in idle else ()):
            change, line = f"{ast.unparse(node)}  →  {ast.unparse(new)}", node.lineno
            found.append(Mutant(line, lines[line - 1].strip(), change, span, function, source, place, k))
    return found


def explained(file: str, mutant: Mutant, path: Path = EXPLAINED) -> bool:
    """Whether the list says why a mutant lives."""
    known = json.loads(path.read_text("utf-8")).get(file, []) if path.exists() else []
    return any((entry["line"], entry["change"]) == (mutant.text, mutant.change) for entry in known)


def swap(path: Path, tree: ast.Module) -> None:
    """Give the functions of a file, whoever holds them, the code of another tree of it."""
    codes, todo = {}, [compile(tree, str(path), "exec")]
    while todo:
        code = todo.pop()
        todo += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        codes[code.co_name, code.co_firstlineno] = code
    frozen = gc.get_freeze_count()
    gc.unfreeze()  # what tests have frozen is not among the objects
    for function in gc.get_objects():
        # By type: some objects of torch warn where they are asked for their class.
        if type(function) is types.FunctionType and function.__code__.co_filename == str(path):
            place = function.__code__.co_name, function.__code__.co_firstlineno
            # Two lambdas of a line have one name, and those within functions are made anew.
            function.__code__ = function.__code__ if place[0] == "<lambda>" else codes[place]
    if frozen:
        gc.freeze()


def import_as(path: Path, tree: ast.Module) -> None:
    """Import a file, when its turn comes, with the code of another tree of it."""
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> types.CodeType | None:
        return compile(tree, str(path), "exec") if self.path == str(path) else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def forked(task: Callable[[], int], seconds: int | None = None) -> int:
    """What a task returns in a process of its own, which may take some seconds of processor time."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = BROKEN
        try:
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                signal.alarm(20 * seconds)  # what waits for ever takes no processor time
            code = task()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def first_failure(session: pytest.Session, items: list[pytest.Item]) -> str | None:
    """Run tests until one fails, and return its name."""
    for item, after in zip(items, [*items[1:], None], strict=True):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return item.nodeid
    return None


class Reached(NamedTuple):
    """What one test does without any change."""

    seconds: float  # of processor time
    lines: dict[str, set[int]]  # that it runs of each file


def record(session: pytest.Session, paths: dict[str, str]) -> dict[str, Reached]:
    """Run every test, and see which lines it reaches. `paths` are files by path."""
    found: dict[str, Reached] = {}
    for item in session.items:
        lines: dict[str, set[int]] = {path: set() for path in paths}

        def local(frame: Any, event: str, arg: Any, lines: dict[str, set[int]] = lines) -> Any:
            lines[frame.f_code.co_filename].add(frame.f_lineno)
            return local

        def trace(frame: Any, event: str, arg: Any, local: Any = local) -> Any:
            return local if frame.f_code.co_filename in paths else None

        begin = time.process_time()
        sys.settrace(trace)
        failed = first_failure(session, [item])
        sys.settrace(None)
        if failed is not None:
            raise SystemExit(f"{failed} fails without any change.")
        found[item.nodeid] = Reached(time.process_time() - begin, {paths[path]: lines[path] for path in paths})
    return found


def _skipped(process: Any) -> None:
    """In place of the start of a process: its lines are not seen, and it has the code without the change."""
    pytest.skip("starts processes")


def in_session(tests: list[Path], folder: Path, task: Callable[[pytest.Session], int]) -> int:
    """What a task returns that gets the collected tests. Where they cannot be collected that is `KILLED`."""

    class Loop:
        def pytest_runtestloop(self, session: pytest.Session) -> bool:
            self.code = KILLED if session.testsfailed else task(session)
            return True

    loop = Loop()
    loop.code = KILLED
    multiprocessing.process.BaseProcess.start = _skipped  # type: ignore[method-assign]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what pytest says
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser and not cuda"]
    pytest.main([*options, f"--basetemp={folder / 'tests'}", *map(str, tests)], plugins=[loop])
    return loop.code


class Copy:
    """A copy of the library, for tests that start processes: these import what is written here.

    Args:
        root: The folder that holds `gradsurgery` and `tests`.
        folder: Where to copy to.
        tests: Names of test files.
        cases: Which of their cases, as for ``pytest -k``.
    """

    def __init__(self, root: Path, folder: Path, tests: tuple[str, ...], cases: str) -> None:
        self.folder, self.limit = folder, math.inf
        for name in ("gradsurgery", "tests"):
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*root.glob("*.toml"), *root.glob("*.ini"), *root.glob("conftest.py")):
            shutil.copy(path, folder)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser and not cuda", "-k", cases]
        self.command = [
            sys.executable,
            "-m",
            "pytest",
            *options,
            *(f"{p}" for n in tests for p in folder.rglob(n + ".py")),
        ]
        begin = time.monotonic()
        if not self.passes():
            raise SystemExit("The tests that start processes fail without any change.")
        self.limit = 60 + 5 * (time.monotonic() - begin)

    def passes(self) -> bool:
        """Whether the tests pass, in time."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(
            self.command, cwd=self.folder, env=environment, stdout=nowhere, stderr=nowhere, start_new_session=True
        )
        try:
            return process.wait(None if math.isinf(self.limit) else self.limit) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that wait for each other
            process.wait()

    def survives(self, file: str, mutant: Mutant) -> bool:
        """Whether the tests pass with a mutant."""
        path = self.folder / "gradsurgery" / f"{file}.py"
        path.write_text(ast.unparse(mutant.tree), "utf-8")
        try:
            return self.passes()
        finally:
            path.write_text(mutant.source, "utf-8")


class Run:
    """The mutants of some files, tried one after the other.

    Args:
        root: The folder that holds `gradsurgery` and `tests`.
        files: The tests of each file of `gradsurgery`.
        count: How many mutants of each, drawn at random.
        seed: Of the draw.
        seconds: What the tests of one mutant take at most.
        cases: How many cases of each test, drawn at random.
        spare: Seconds of processor time for a mutant beyond five times what its tests took.
        folder: Where to write for a while.
        spawned: For the tests that start processes, or None.
    """

    def __init__(
        self,
        root: Path,
        files: dict[str, tuple[str, ...]],
        count: int,
        seed: int,
        seconds: float,
        cases: int,
        spare: int,
        folder: Path,
        spawned: Copy | None = None,
    ) -> None:
        self.spawned = spawned
        self.paths = {file: root / "gradsurgery" / f"{file}.py" for file in files}
        self.tests = {file: [next((root / "tests").rglob(f"{name}.py")) for name in files[file]] for file in files}
        self.seconds, self.cases, self.spare, self.folder = seconds, cases, spare, folder
        self.random = random.Random(seed)
        every = {file: mutants(path.read_text("utf-8")) for file, path in self.paths.items()}
        self.possible = {file: len(found) for file, found in every.items()}
        self.chosen = {
            file: sorted(self.random.sample(found, min(count, len(found))), key=lambda mutant: mutant.line)
            for file, found in every.items()
        }
        self.reached: dict[str, Reached] = {}
        self.kills: collections.Counter[str] = collections.Counter()  # how many each test has killed
        self.counts = {file: collections.Counter[str]() for file in files}
        self.out = os.fdopen(os.dup(1), "w")

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def all(self) -> int:
        """Try all, say which survive, and return their number."""
        tests = sorted({test for several in self.tests.values() for test in several})
        if forked(lambda: in_session(tests, self.folder, self.in_functions)) != SURVIVED:
            raise SystemExit("The tests fail without any change.")
        self.__dict__.update(pickle.loads((self.folder / "score").read_bytes()))
        self.elsewhere()
        for file, counts in self.counts.items():
            self.say(
                f"{file}: {counts['killed']} of {len(self.chosen[file])} mutants killed, "
                f"{counts['explained']} explained, {counts['alive']} survive, of {self.possible[file]} possible ones"
            )
        return sum(counts["alive"] for counts in self.counts.values())

    def in_functions(self, session: pytest.Session) -> int:
        """Try the mutants that only change what a function does, in forks of this process."""
        for path in self.paths.values():
            swap(path, ast.parse(path.read_text("utf-8")))  # does no harm, or the tests say so
        self.draw(session)
        self.say(f"{len(session.items)} tests are run once")
        code = forked(lambda: self.recorded(session))
        if code != SURVIVED:
            return code
        self.reached = pickle.loads((self.folder / "reached").read_bytes())
        items = {item.nodeid: item for item in session.items}
        for file, mutant in self.each(function=True):
            names = self.noticing(file, mutant)
            self.judge(
                file, mutant, names, lambda m=mutant, f=file, n=names: self.swapped(f, m, [items[name] for name in n])
            )
        (self.folder / "score").write_bytes(
            pickle.dumps({"reached": self.reached, "kills": self.kills, "counts": self.counts})
        )
        return SURVIVED

    def draw(self, session: pytest.Session) -> None:
        """Leave some cases of each test."""
        of_test: dict[str, list[str]] = collections.defaultdict(list)
        for item in session.items:
            of_test[item.nodeid.partition("[")[0]].append(item.nodeid)
        drawn = {name for names in of_test.values() for name in self.random.sample(names, min(self.cases, len(names)))}
        session.items = [item for item in session.items if item.nodeid in drawn]

    def elsewhere(self) -> None:
        """Try the others, each in a process that imports the library anew."""
        for file, mutant in self.each(function=False):
            names = self.noticing(file, mutant)
            self.judge(file, mutant, names, lambda m=mutant, f=file, n=names: self.imported(f, m, n))

    def each(self, function: bool) -> Iterator[tuple[str, Mutant]]:
        for file, several in self.chosen.items():
            for mutant in several:
                if mutant.function is function and explained(file, mutant):
                    self.counts[file]["explained"] += 1
                elif mutant.function is function:
                    yield file, mutant

    def recorded(self, session: pytest.Session) -> int:
        found = record(session, {str(path): file for file, path in self.paths.items()})
        (self.folder / "reached").write_bytes(pickle.dumps(found))
        return SURVIVED

    def noticing(self, file: str, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant: first those that killed the most, then the file's own, then quick ones."""
        own = {test.name for test in self.tests[file]}
        names = [
            name
            for name, found in self.reached.items()
            if not mutant.function or not found.lines[file].isdisjoint(mutant.span)
        ]
        names.sort(key=lambda n: (-self.kills[n], Path(n.partition("::")[0]).name not in own, self.reached[n].seconds))
        totals = itertools.accumulate(self.reached[name].seconds for name in names)
        return [name for name, total in zip(names, totals, strict=True) if total <= self.seconds]

    def swapped(self, file: str, mutant: Mutant, items: list[pytest.Item]) -> int:
        swap(self.paths[file], mutant.tree)
        return self.first(items)

    def imported(self, file: str, mutant: Mutant, names: list[str]) -> int:
        import_as(self.paths[file], mutant.tree)

        def task(session: pytest.Session) -> int:
            items = {item.nodeid: item for item in session.items}
            return self.first([items[name] for name in names if name in items])

        return in_session(self.tests[file], self.folder, task)

    def first(self, items: list[pytest.Item]) -> int:
        """Run tests until one fails, and leave a note which."""
        if not items:
            return SURVIVED
        failed = first_failure(items[0].session, items)
        (self.folder / "killer").write_text(failed or "", "utf-8")
        return SURVIVED if failed is None else KILLED

    def judge(self, file: str, mutant: Mutant, names: list[str], task: Callable[[], int]) -> None:
        """Try one mutant. One that takes too long, or crashes, has not passed."""
        killer = self.folder / "killer"
        killer.unlink(missing_ok=True)
        code = forked(task, self.spare + int(5 * sum(self.reached[name].seconds for name in names)))
        if code == BROKEN:
            raise SystemExit(f"gradsurgery/{file}.py:{mutant.line}: {mutant.change}: could not be tried")
        if code != SURVIVED:
            self.kills[killer.read_text("utf-8") if killer.exists() else ""] += 1
        alive = code == SURVIVED and (self.spawned is None or self.spawned.survives(file, mutant))
        verdict = "alive" if alive else "killed"
        self.counts[file][verdict] += 1
        if verdict == "alive":
            done = f"{self.counts[file].total()}/{len(self.chosen[file])}"
            self.say(f"{done} gradsurgery/{file}.py:{mutant.line}: {mutant.change}  ({len(names)} tests)")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(TESTS))
    parser.add_argument("--tests", nargs="+", default=(), help="in place of those that are listed for the files")
    parser.add_argument("--count", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of processor time, for the tests of one mutant")
    parser.add_argument("--cases", type=int, default=10, help="of each test")
    parser.add_argument("--spare", type=int, default=10, help="seconds beyond five times what the tests took before")
    told = "tries what has lived so far on tests that start processes, too; which, as for `pytest -k`"
    parser.add_argument("--spawned", nargs="?", const=SPAWNED_CASES, default=None, help=told)
    parser.add_argument("--root", type=Path, default=ROOT, help="where `gradsurgery` and `tests` are")
    given = parser.parse_args(words)
    root = given.root.resolve()
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    for slow in ("torch", "scipy.optimize") if root == ROOT else ():  # once, and not in each process
        __import__(slow)
    files = {file: given.tests or TESTS[file] for file in given.files}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawned = None if given.spawned is None else Copy(root, folder / "copy", SPAWNED, given.spawned)
        run = Run(root, files, given.count, given.seed, given.seconds, given.cases, given.spare, folder, spawned)
        return run.all()


if __name__ == "__main__":
    main()
