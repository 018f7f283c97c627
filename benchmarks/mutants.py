"""Which lines of logic no test dies without: each mutant changes one operator, and some test should fail.

python -m benchmarks.mutants [--files step transaction] [--count 40] [--seed 0]

Every mutant is a copy of the package with one change. The tests of its file run against it until one fails; a mutant on
which none does has survived, and is printed with its line. It takes minutes: as many as the tests of the file take, for
each survivor, and less for the rest.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The files that are changed, and the tests that are to notice, those that notice most first.
TESTS = {
    "step": ("test_kinds_of_step", "test_switches", "test_backward", "test_cheap_modes"),
    "batch": ("test_backward", "test_losses", "test_accumulation", "test_kinds_of_step"),
    "transaction": ("test_state", "test_faults", "test_misuse", "test_accumulation"),
    "guard": ("test_faults", "test_range", "test_deferred"),
    "sharing": ("test_kinds_of_step", "test_backward", "test_joined"),
    "gradients/exact": ("test_exact",),
    "gradients/gram": ("test_precision", "test_range", "test_ghost", "test_numerics"),
    "gradients/descent": ("test_common_descent",),
    "gradients/dense": ("test_kinds_of_step", "test_cheap_modes", "test_engines"),
    "gradients/rows": ("test_backward", "test_precision", "test_engines"),
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


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


def _annotations(tree: ast.AST) -> set[int]:
    """Nodes of annotations, which nothing runs."""
    found = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if (inside := getattr(node, field, None)) is not None:
                found |= {id(part) for part in ast.walk(inside)}
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def mutants(source: str) -> list[tuple[int, str, str]]:
    """All mutants of a file: line, what was changed, and the source."""
    tree, found = ast.parse(source), []
    unused = _annotations(tree)
    places = [(i, node) for i, node in enumerate(ast.walk(tree)) if id(node) not in unused]
    for place, node in places:
        for k, new in enumerate(changes(node)):
            fresh = ast.parse(source)
            old = next(n for i, n in enumerate(ast.walk(fresh)) if i == place)
            wanted = list(changes(old))[k]
            text = ast.unparse(ast.fix_missing_locations(_Replace(old, wanted).visit(fresh)))
            found.append((node.lineno, f"{ast.unparse(node)}  →  {ast.unparse(new)}", text))
    return found


def survives(tree: Path, file: str, source: str, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass with another source of a file. One that takes too long has not passed."""
    path = tree / "gradsurgery" / f"{file}.py"
    before = path.read_text("utf-8")
    path.write_text(source, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser"]
    try:
        done = subprocess.run([*command, *tests], cwd=tree, env=environment, capture_output=True, timeout=seconds)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(before, "utf-8")


def copied(root: Path, to: Path) -> Path:
    """A copy of all that the tests need."""
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "_build", "*.egg-info")
    shutil.copytree(root, to, ignore=ignore, dirs_exist_ok=True)
    return to


def run(root: Path, files: list[str], count: int, seed: int, seconds: float) -> int:
    """Try some mutants of each file, and say which survive. Returns their number."""
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(root, Path(folder))
        for file in files:
            source = (tree / "gradsurgery" / f"{file}.py").read_text("utf-8")
            tests = [str(next((tree / "tests").rglob(f"{name}.py")).relative_to(tree)) for name in TESTS[file]]
            if not survives(tree, file, source, tests, seconds):
                raise SystemExit(f"{file}: its tests fail, or take over {seconds:g} s, without any change.")
            every = mutants(source)
            chosen = sorted(random.Random(seed).sample(every, min(count, len(every))))
            survivors = [(line, what) for line, what, text in chosen if survives(tree, file, text, tests, seconds)]
            print(
                f"{file}: {len(chosen) - len(survivors)} of {len(chosen)} mutants killed, of {len(every)} possible ones"
            )
            for line, what in survivors:
                print(f"  gradsurgery/{file}.py:{line}: {what}")
            alive += len(survivors)
    return alive


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--count", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=900, help="after which tests count as failed")
    given = parser.parse_args(words)
    run(ROOT, given.files, given.count, given.seed, given.seconds)


if __name__ == "__main__":
    main()
