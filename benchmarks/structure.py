"""How much there is to read: ``python -m benchmarks.structure [TREE [TREE]] [--json]``.

Measures the package of any checkout, an old one too; two of them side by side. Each figure's definition:

- *functions*: those of the package that ``zero_grad``, ``backward`` and ``step`` of the third step of PCGrad enter:
  three losses, a trunk and three heads, small enough for rows, one process, CPU. Lambdas and comprehensions have no
  name and are not counted. *Files* are those that hold them, *lines* those of their definitions from the first
  decorator to the last line, docstrings included, and *statements* are counted without docstrings: each once.
- *returns*: calls, from one file into another that was entered before, of a function that was not.
- *private attributes of others*: ruff's SLF001.
- *complex functions*: ruff's C901 over 10. *By every branch*: 1, and 1 for each ``if``, loop, ``except``, ``case``,
  conditional expression, comprehension and its conditions, and each further operand of ``and`` or ``or``,
  nested functions included; over 15.
- *tests of a mode*: conditions (``if``, ``while``, conditional expressions, conditions of comprehensions) in the core
  that mention one of the `MODES`: names of engines, switches and ways to spread the work.
- *world is None*: comparisons of something called ``world`` or ``communicator`` with None, in the whole package.
- *mentions of _run*: attributes of this name, in the whole package.
- *core*: the package without what needs no reading to follow a step: the methods' own files (modules of ``surgery`` and
  ``weighting`` that define a class which the package exports, the base classes excepted), geometry, tools that watch or
  estimate, the command line, integrations, problems, testing.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "gradsurgery"
APART = {
    "geometry", "watch", "cli", "commands", "integrations", "problems", "testing",
    "monitor", "diagnose", "estimate", "pictures", "catalogue", "text", "demo", "__main__",
}  # fmt: skip
BASES = {"Surgery", "Weighter", "MultiLossOptimizer"}
MODES = {
    "_adds_rows", "_puts_rows_away", "_undecided", "accumulate", "accumulated", "adds_rows", "blocks", "communicator",
    "draft", "due", "early", "engine", "every", "features", "ghosts", "gram_only", "granularity", "hidden",
    "is_accumulated", "is_alone", "is_scaled", "is_sharded", "kept", "log_losses", "masks", "needs_gram_only",
    "nonfinite", "observes", "one_pass", "phase", "puts_away", "puts_rows_away", "row_device", "row_dtype", "scaler",
    "sharded", "shared_params", "slices", "spread", "streaming", "undecided", "warmup", "world", "writable",
}  # fmt: skip

# Runs in a process of its own, on the tree that is measured. Prints the calls in order: file, name, first line, and the
# file of the caller.
STEPS = """
import json, os, sys
import torch
import gradsurgery

root = os.path.dirname(os.path.abspath(gradsurgery.__file__)) + os.sep
torch.set_num_threads(1)
torch.manual_seed(0)
trunk = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh())
heads = torch.nn.ModuleList(torch.nn.Linear(16, 1) for _ in range(3))
optimizer = gradsurgery.PCGrad(torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.01))
calls = []

def place(frame):
    name = os.path.abspath(frame.f_code.co_filename)
    return name[len(root):] if name.startswith(root) else None

def record(frame, event, arg):
    if event == "call" and (here := place(frame)) is not None:
        code, caller = frame.f_code, frame.f_back
        while caller is not None and place(caller) is None:
            caller = caller.f_back
        calls.append((here, code.co_name, code.co_firstlineno, None if caller is None else place(caller)))

for step in range(3):
    features = trunk(torch.randn(12, 8))
    losses = {str(i): 10.0**i * (head(features) - i).square().mean() for i, head in enumerate(heads)}
    if step == 2:
        sys.setprofile(record)
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()
sys.setprofile(None)
print(json.dumps(calls))
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Calls = list[tuple[str, str, int, "str | None"]]


def calls_of_a_step(tree: Path) -> Calls:
    """The calls of the package's functions in the third step of PCGrad, in order."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: a step of PCGrad failed:\n{done.stderr}")
    return [tuple(call) for call in json.loads(done.stdout)]


def modules(tree: Path) -> dict[str, ast.Module]:
    """The package's files by their path below it, parsed."""
    root = tree / PACKAGE
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))
    }


def functions(module: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(module) if isinstance(node, Function))


def first_line(function: Function) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def statements(function: Function) -> int:
    """Statements below a function's head, docstrings not counted, nor functions inside, which count for themselves."""
    found, waiting = 0, list(function.body[ast.get_docstring(function) is not None :])
    while waiting:
        node = waiting.pop()
        found += isinstance(node, ast.stmt)
        if not isinstance(node, (*Function.__args__, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)
    return found


def road(calls: Calls, files: dict[str, ast.Module]) -> dict[str, int]:
    """What the calls of a step enter."""
    named = [call for call in calls if not call[1].startswith("<")]
    entered, seen, returns = set(), set(), 0
    for file, _, line, caller in named:
        if (file, line) not in entered and caller not in (None, file) and file in seen:
            returns += 1
        entered.add((file, line))
        seen.add(file)
    found = [f for file in seen for f in functions(files[file]) if (file, first_line(f)) in entered]
    lines = {(file, n) for file in seen for f in functions(files[file]) if (file, first_line(f)) in entered
             for n in range(first_line(f), f.end_lineno + 1)}  # fmt: skip
    return {
        "functions": len(entered),
        "files": len(seen),
        "lines": len(lines),
        "statements": sum(map(statements, found)),
        "returns": returns,
    }


def branches(function: ast.AST) -> int:
    """Complexity by every branch."""
    total = 1
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        else:
            total += isinstance(node, ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler
                                | ast.match_case)  # fmt: skip
    return total


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def mode_tests(module: ast.Module) -> int:
    """Conditions that mention a mode."""
    found = 0
    for node in ast.walk(module):
        conditions = node.ifs if isinstance(node, ast.comprehension) else []
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            conditions = [node.test]
        for condition in conditions:
            parts = list(ast.walk(condition))
            words = {name_of(part) for part in parts} | {p.value for p in parts if isinstance(p, ast.Constant)}
            found += not words.isdisjoint(MODES)
    return found


def compared_with_none(module: ast.Module) -> int:
    return sum(
        isinstance(node, ast.Compare)
        and name_of(node.left) in ("world", "communicator")
        and isinstance(node.comparators[0], ast.Constant)
        and node.comparators[0].value is None
        for node in ast.walk(module)
    )


def exported(package: ast.Module) -> set[str]:
    """The names in ``__all__``."""
    for node in package.body:
        if isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def core(files: dict[str, ast.Module]) -> list[str]:
    """The files that whoever follows a step may have to read."""
    methods = exported(files["__init__.py"]) - BASES

    def is_apart(file: str) -> bool:
        first, stem = file.removesuffix(".py").split("/")[0], Path(file).stem
        if first in ("surgery", "weighting"):
            return any(isinstance(node, ast.ClassDef) and node.name in methods for node in files[file].body)
        return first in APART or stem.endswith("_pictures")

    return [file for file in files if not is_apart(file)]


def ruff(tree: Path, rule: str) -> dict[str, int]:
    """Violations of a rule by file."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format", "json",
               "--config", "lint.mccabe.max-complexity = 10", "--select", rule, "--exit-zero", PACKAGE]  # fmt: skip
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    found: dict[str, int] = {}
    for violation in json.loads(done.stdout):
        file = Path(violation["filename"]).relative_to((tree / PACKAGE).resolve()).as_posix()
        found[file] = found.get(file, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def measure(tree: Path) -> dict[str, Any]:
    """All figures of one tree; where they lie, too, for private attributes and for tests of a mode."""
    tree = tree.resolve()
    files = modules(tree)
    inside = core(files)
    private, modes = ruff(tree, "SLF001"), {file: mode_tests(files[file]) for file in inside}
    return {
        **road(calls_of_a_step(tree), files),
        "private attributes of others": sum(private.values()),
        "complex functions (C901 over 10)": sum(ruff(tree, "C901").values()),
        "complex functions (every branch, over 15)": sum(
            branches(f) > 15 for module in files.values() for f in functions(module)
        ),
        "tests of a mode in the core": sum(modes.values()),
        "world is None": sum(map(compared_with_none, files.values())),
        "mentions of _run": sum(name_of(node) == "_run" for m in files.values() for node in ast.walk(m)),
        "files of the core": len(inside),
        "lines of the core": sum(len((tree / PACKAGE / file).read_text("utf-8").splitlines()) for file in inside),
        "where": {
            "private attributes of others": private,
            "tests of a mode in the core": {file: n for file, n in sorted(modes.items(), key=lambda i: -i[1]) if n},
        },
    }


def table(trees: list[str], found: list[dict[str, Any]]) -> str:
    """The figures, a column a tree; then where they lie."""
    rows = [["", *trees], *([name, *(str(f[name]) for f in found)] for name in found[0] if name != "where")]
    for title in found[0]["where"]:
        rows.append([f"{title}, by file", *[""] * len(found)])
        for file in dict.fromkeys(file for f in found for file in f["where"][title]):
            rows.append([f"  {file}", *(str(f["where"][title].get(file, 0)) for f in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line names, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", default=["."], metavar="TREE", help="a checkout; by default this one")
    parser.add_argument("--json", action="store_true", help="print JSON, a tree a key")
    options = parser.parse_args(arguments)
    found = [measure(Path(tree)) for tree in options.trees]
    if options.json:
        print(json.dumps(dict(zip(options.trees, found, strict=True)), indent=2))
    else:
        print(table(options.trees, found))


if __name__ == "__main__":
    main()
