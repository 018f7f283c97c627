"""The script that looks for lines of logic that no test dies without."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

from benchmarks import mutants

ROOT = Path(mutants.__file__).parent.parent
SOURCE = textwrap.dedent("""
    def least(a: int | None, b):
        log(zip(a, b, strict=True))
        if a < b and not b:
            return a + 1 if True else b
""")


def test_every_operator_is_changed_once():
    every = mutants.mutants(SOURCE)
    found = {mutant.change for mutant in every}
    assert found == {
        "log(zip(a, b, strict=True))  →  pass",
        "a < b  →  a <= b",
        "a < b and (not b)  →  a < b or not b",
        "not b  →  b",
        "a + 1  →  a - 1",
        "True  →  False",
        "a + 1 if True else b  →  a + 1",
        "a + 1 if True else b  →  b",
    }
    texts = {ast.unparse(mutant.tree) for mutant in every}
    assert len(texts) == len(found)
    assert ["if a <= b and (not b):" in text for text in texts].count(True) == 1


def test_a_mutant_knows_its_statement_and_what_holds_it():
    source = "if A and B:\n    C = (\n        1 + D\n    )\n\n\n@cached(True)\ndef f(x=2 * 3):\n    return not x\n"
    assert {mutant.change: (mutant.text, mutant.span, mutant.function) for mutant in mutants.mutants(source)} == {
        "A and B  →  A or B": ("if A and B:", range(1, 2), False),
        "1 + D  →  1 - D": ("1 + D", range(2, 5), False),
        "True  →  False": ("@cached(True)", range(8, 9), False),
        "2 * 3  →  2 / 3": ("def f(x=2 * 3):", range(8, 9), False),
        "not x  →  x": ("return not x", range(9, 10), True),
    }


def test_a_function_takes_the_code_of_each_of_its_mutants():
    """Whatever is left out: its `super`, or the only mention of a name around it."""
    source = (
        "class A:\n    def __init__(self, x):\n        super().__init__()\n        self.f = lambda: x if x else 0\n"
    )
    for mutant in mutants.mutants(source):
        namespace: dict = {}
        exec(compile(ast.parse(source), "a.py", "exec"), namespace)
        f = namespace["A"].__init__
        f.__code__ = next(
            code
            for klass in compile(mutant.tree, "a.py", "exec").co_consts
            if isinstance(klass, types.CodeType)
            for code in klass.co_consts
            if isinstance(code, types.CodeType)
        )
        assert namespace["A"](3).f() == (0 if mutant.change.endswith("  →  0") else 3)


def tried(root: Path, *words: str) -> tuple[list[str], str]:
    """What the script prints of a small library, and the end of its errors."""
    command = [sys.executable, "-m", "benchmarks.mutants", "--root", str(root), "--files", "small", "--spare", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--tests", "test_small", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    return done.stdout.splitlines(), done.stderr.strip().rpartition("\n")[2]


def test_a_mutant_that_no_test_notices_is_named(tmp_path):
    (tmp_path / "gradsurgery").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "gradsurgery" / "__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    browser\n    cuda\n")
    (tmp_path / "gradsurgery" / "small.py").write_text(
        "LEAST = 1 + 1\nMOST = 2 * 1\n\n\ndef first(a, b):\n    return a < b\n\n\n"
        "def second(a):\n    while a > 3:\n        a = a - 1\n    return a\n\n\ndef third(a):\n    return not a\n"
    )
    (tmp_path / "tests" / "test_small.py").write_text(
        "import multiprocessing\n\nfrom gradsurgery.small import LEAST, MOST, first, second\n\n\n"
        "def test_functions():\n    assert first(1, 2)\n    assert second(5) == 3\n\n\n"
        "def test_numbers():\n    assert LEAST == MOST == 2\n\n\n"
        "def test_processes():\n    multiprocessing.Process(target=print).start()\n    assert False\n"
    )
    (tmp_path / "conftest.py").write_text("import gc\n\n\ndef pytest_collection_finish():\n    gc.freeze()\n")
    # One never ends, and one is seen in an import alone.
    assert tried(tmp_path)[0] == [
        "3 tests are run once",
        "1/6 gradsurgery/small.py:6: a < b  →  a <= b  (1 tests)",
        "4/6 gradsurgery/small.py:16: not a  →  a  (0 tests)",
        "6/6 gradsurgery/small.py:2: 2 * 1  →  2 / 1  (3 tests)",
        "small: 3 of 6 mutants killed, 0 explained, 3 survive, of 6 possible ones",
    ]
    (tmp_path / "tests" / "test_ddp.py").write_text(
        "import subprocess\nimport sys\n\n\ndef test_processes():\n"
        "    code = 'from gradsurgery.small import third; assert third(True) is False'\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n\n\n"
        "def test_another():\n    assert False\n"
    )
    assert tried(tmp_path, "--spawned", "processes")[0] == [
        "3 tests are run once",
        "1/6 gradsurgery/small.py:6: a < b  →  a <= b  (1 tests)",
        "6/6 gradsurgery/small.py:2: 2 * 1  →  2 / 1  (3 tests)",
        "small: 4 of 6 mutants killed, 0 explained, 2 survive, of 6 possible ones",
    ]
    (tmp_path / "tests" / "test_small.py").write_text("def test():\n    assert False\n")
    assert tried(tmp_path) == (["1 tests are run once"], "The tests fail without any change.")


def test_all_files_and_tests_are_there():
    for file, tests in mutants.TESTS.items():
        assert (ROOT / "gradsurgery" / f"{file}.py").exists()
        assert all(len(list((ROOT / "tests").rglob(f"{name}.py"))) == 1 for name in tests)


def test_what_is_explained_is_still_possible():
    known = json.loads(mutants.EXPLAINED.read_text("utf-8"))
    gone = []
    for file, entries in known.items():
        every = mutants.mutants((ROOT / "gradsurgery" / f"{file}.py").read_text("utf-8"))
        possible = {(mutant.text, mutant.change) for mutant in every}
        gone += [(file, entry) for entry in entries if (entry["line"], entry["change"]) not in possible]
        assert all(set(entry) == {"line", "change", "why"} and entry["why"] for entry in entries)
    assert not gone, "remove them from mutants.json, or adapt them to the new lines"


def test_what_is_explained_is_told_from_the_rest(tmp_path):
    listed = tmp_path / "list.json"
    entry = {"line": "if a < b and not b:", "change": "a < b  →  a <= b", "why": "no b is an a"}
    listed.write_text(json.dumps({"least": [entry]}), "utf-8")
    every = mutants.mutants(SOURCE)
    assert [m.change for m in every if mutants.explained("least", m, listed)] == ["a < b  →  a <= b"]
    assert not any(mutants.explained("most", m, listed) for m in every)
    assert not any(mutants.explained("least", m, tmp_path / "none.json") for m in every)
