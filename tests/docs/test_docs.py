"""Every example that a reader can copy is run: code blocks of the pages, and docstrings of the package.

A fenced block ``python`` runs on its own, in a fresh namespace and an empty folder. A block that opens with
```` ```python continues ```` goes on where the ``python`` block above it on the same page ended. Whatever is not meant
to run is not ``python``: a change to a training loop is a ``diff``, a shell session is ``bash``, output is ``text``.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import gradsurgery

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts
)
FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>.*?)[ \t]*$")
# Readers see Python, this file would not: refused, so that no example goes unrun by a slip.
LOOKALIKES = {"py", "py3", "python3", "ipython", "pycon", "code", "code-block", "code-cell", "testcode"}


class Block(NamedTuple):
    """One fenced block: its first line of code (from 1), the words after the fence, and the code."""

    line: int
    info: str
    code: str


def fenced_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order. An unclosed fence raises."""
    blocks: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        at += 1
        if opening is None:
            continue
        ticks, start = opening["ticks"], at
        while True:
            if at == len(lines):
                raise ValueError(f"the fence opened in line {start} is never closed")
            closing = FENCE.match(lines[at])
            at += 1
            if closing and not closing["info"] and closing["ticks"].startswith(ticks):
                break
        blocks.append(Block(start + 1, opening["info"], textwrap.dedent("\n".join(lines[start : at - 1])) + "\n"))
    return blocks


def runnable(text: str) -> list[list[Block]]:
    """Return the programs of a page: each a ``python`` block and the blocks that continue it."""
    programs: list[list[Block]] = []
    for block in fenced_blocks(text):
        language, _, rest = block.info.partition(" ")
        if language.strip("{}").lower() in LOOKALIKES:
            raise ValueError(f"line {block.line - 1}: write ```python, ```diff or ```text, not ```{block.info}")
        if language != "python":
            continue
        if rest not in {"", "continues"}:
            raise ValueError(f"line {block.line - 1}: only `continues` may follow ```python, got {rest!r}")
        if rest and not programs:
            raise ValueError(f"line {block.line - 1}: there is no block above to continue")
        if rest:
            programs[-1].append(block)
        else:
            programs.append([block])
    return programs


def source(program: list[Block]) -> str:
    """Return one program, padded so that a traceback names the lines of the page."""
    lines: list[str] = []
    for block in program:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


PROGRAMS = [
    pytest.param(page, program, id=f"{page.relative_to(ROOT)}:{program[0].line}")
    for page in PAGES
    if page.exists()
    for program in runnable(page.read_text(encoding="utf-8"))
]


def test_pages_have_programs():
    with_code = {str(program.values[0].relative_to(ROOT)) for program in PROGRAMS}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md"} <= with_code


@pytest.mark.parametrize(("page", "program"), PROGRAMS)
def test_code_of_pages_runs(page, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A real module, so that dataclasses, pickle and inspect find the classes that a block defines.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(source(program), str(page), "exec"), module.__dict__)


def figures(text: str) -> tuple[str, list[float]]:
    """Split a text into its words and its numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", text), [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def test_the_program_of_the_readme_prints_what_is_shown(capsys):
    """Words are the same; numbers differ by one in the last digit at most, since 300 steps amplify rounding."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = runnable(text)
    (shown,) = (block.code for block in fenced_blocks(text) if block.info == "text")
    exec(compile(source(program), "README.md", "exec"), {"__name__": "page"})
    (words, numbers), (expected, values) = figures(capsys.readouterr().out), figures(shown)
    assert words == expected
    steps = [10.0 ** -len(n.partition(".")[2]) for n in re.findall(r"\d+(?:\.\d+)?", shown)]
    assert all(abs(a - b) <= 1.001 * step for a, b, step in zip(numbers, values, steps, strict=True))


def test_the_readme_is_short():
    """Nobody scrolls further before deciding."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def modules() -> list[str]:
    """Return the dotted names of all modules of the package."""
    return ["gradsurgery", *(info.name for info in pkgutil.walk_packages(gradsurgery.__path__, "gradsurgery."))]


def namespace() -> dict[str, object]:
    """Return what a docstring example may use without saying where it comes from."""
    torch.manual_seed(0)
    return {"torch": torch, "gradsurgery": gradsurgery, "model": torch.nn.Linear(3, 2), "inputs": torch.ones(4, 3)}


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module, extraglobs=namespace()):
        runner.run(test, out=report.append)
    assert not report, "".join(report)


def test_every_method_has_an_example():
    bases = {gradsurgery.MultiLossOptimizer, gradsurgery.Surgery, gradsurgery.Weighter}
    public = [getattr(gradsurgery, name) for name in gradsurgery.__all__]
    classes = {value for value in public if inspect.isclass(value)}
    methods = [value for value in classes - bases if issubclass(value, gradsurgery.MultiLossOptimizer)]
    assert methods
    assert [method.__name__ for method in methods if ">>>" not in (method.__doc__ or "")] == []


def undocumented_errors(tree: ast.Module) -> list[str]:
    """Return the errors that a public function raises itself and does not name in its docstring."""
    missing: list[str] = []

    def visit(node: ast.AST, path: str, docstring: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", "")
            if isinstance(child, ast.ClassDef) and not name.startswith("_"):
                visit(child, f"{path}{name}.", ast.get_docstring(child))
            elif isinstance(child, ast.FunctionDef) and (name == "__init__" or not name.startswith("_")):
                text = docstring if name == "__init__" else ast.get_docstring(child)
                raised = {
                    found.exc.func.id
                    for found in ast.walk(child)
                    if isinstance(found, ast.Raise)
                    and isinstance(found.exc, ast.Call)
                    and isinstance(found.exc.func, ast.Name)
                    and found.exc.func.id.endswith("Error")
                }
                missing.extend(f"{path}{name}: {error}" for error in sorted(raised) if text and f"{error}:" not in text)

    visit(tree, "", None)
    return missing


def test_errors_are_documented():
    found = {
        str(path.relative_to(ROOT)): errors
        for path in sorted((ROOT / "gradsurgery").rglob("*.py"))
        if (errors := undocumented_errors(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


def test_an_undocumented_error_is_found():
    code = '''
class A:
    """A class.

    Raises:
        TypeError: Of the wrong type.
    """

    def __init__(self, x):
        if x:
            raise TypeError("x")
        raise ValueError("x")

    def act(self):
        """Act."""
        raise RuntimeError("x")

    def _act(self):
        """Act."""
        raise RuntimeError("x")
'''
    assert undocumented_errors(ast.parse(code)) == ["A.__init__: ValueError", "A.act: RuntimeError"]


def test_fenced_blocks():
    first = "text\n```python\na = 1\n```\n\n"
    indented = "- item\n\n  ```python continues\n  assert a == 1\n  ```\n\n"
    nested = "````text\n```python\n```\n````\n"
    page = first + indented + nested
    blocks = fenced_blocks(page)
    assert [(block.line, block.info) for block in blocks] == [(3, "python"), (9, "python continues"), (13, "text")]
    (program,) = runnable(page)
    assert source(program).splitlines()[2] == "a = 1"
    assert source(program).splitlines()[8] == "assert a == 1"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\na = 1\n", "never closed"),
        ("```py\na = 1\n```\n", "not ```py"),
        ("```{code-block} python\na = 1\n```\n", "write ```python"),
        ("```python no-run\na = 1\n```\n", "only `continues`"),
        ("```python continues\na = 1\n```\n", "no block above"),
    ],
)
def test_fences_that_would_not_run_are_refused(page, message):
    with pytest.raises(ValueError, match=message):
        runnable(page)


# ------------------------------------------------------------------------------------------------------------ tables


def broken_rows(text: str) -> list[int]:
    """Lines of tables that are not one row with as many cells as the head, from 1."""
    inside = {n for block in fenced_blocks(text) for n in range(block.line, block.line + block.code.count("\n") + 1)}
    broken, width = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if number in inside or not line.strip().startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        width = width or cells
        if cells != width or not line.rstrip().endswith("|"):
            broken.append(number)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_whole(page):
    assert not broken_rows(page.read_text(encoding="utf-8"))


def test_a_row_that_was_wrapped_is_found():
    assert broken_rows("| a | b |\n| - | - |\n| c | `x|y` |\n| d | long\nline | | e | f |\n") == [4]
    assert broken_rows("| a | b |\n| - | - |\n| c | d | | e | f |\n") == [3]
