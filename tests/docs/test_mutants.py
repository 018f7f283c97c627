"""The script that looks for lines of logic that no test dies without."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from benchmarks import mutants

SOURCE = textwrap.dedent("""
    def least(a: int | None, b):
        log(a)
        if a < b and not b:
            return a + 1 if True else b
""")


def test_every_operator_is_changed_once():
    found = {what for _, what, _ in mutants.mutants(SOURCE)}
    assert found == {
        "log(a)  →  pass",
        "a < b  →  a <= b",
        "a < b and (not b)  →  a < b or not b",
        "not b  →  b",
        "a + 1  →  a - 1",
        "True  →  False",
        "a + 1 if True else b  →  a + 1",
        "a + 1 if True else b  →  b",
    }
    texts = {text for _, _, text in mutants.mutants(SOURCE)}
    assert len(texts) == len(found)
    assert ["if a <= b and (not b):" in text for text in texts].count(True) == 1


def test_a_mutant_that_no_test_notices_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gradsurgery").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "gradsurgery" / "__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    browser\n")
    (tmp_path / "gradsurgery" / "small.py").write_text(
        "def first(a, b):\n    return a < b\n\n\ndef second(a):\n    return a + 1\n"
    )
    (tmp_path / "tests" / "test_small.py").write_text(
        "from gradsurgery.small import first, second\n\n\n"
        "def test():\n    assert first(1, 2)\n    assert second(1) == 2\n"
    )
    monkeypatch.setitem(mutants.TESTS, "small", ("test_small",))
    assert mutants.run(tmp_path, ["small"], count=5, seed=0, seconds=300) == 1
    assert capsys.readouterr().out.splitlines() == [
        "small: 1 of 2 mutants killed, of 2 possible ones",
        "  gradsurgery/small.py:2: a < b  →  a <= b",
    ]
    (tmp_path / "tests" / "test_small.py").write_text("def test():\n    assert False\n")
    with pytest.raises(SystemExit, match="its tests fail"):
        mutants.run(tmp_path, ["small"], count=5, seed=0, seconds=300)


def test_all_files_and_tests_are_there():
    root = Path(mutants.__file__).parent.parent
    for file, tests in mutants.TESTS.items():
        assert (root / "gradsurgery" / f"{file}.py").exists()
        assert all(len(list((root / "tests").rglob(f"{name}.py"))) == 1 for name in tests)
