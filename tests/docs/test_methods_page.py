"""docs/methods.md names every method once, and says of each what the class and its catalogue row say."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import gradsurgery
from gradsurgery.cli.catalogue import entries, tables
from gradsurgery.optimizer import Switches
from gradsurgery.surgery.base import SurgerySwitches
from tests.support.catalogue import ALL, CATALOGUE, any_optimizer
from tests.support.weighting_catalogue import CATALOGUE as WEIGHTING_CATALOGUE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
RISE = "common descent"


ENTRIES = entries(PAGE)
BASES = {gradsurgery.MultiLossOptimizer, gradsurgery.Surgery, gradsurgery.Weighter}
METHODS = {
    name: value
    for name in gradsurgery.__all__
    if inspect.isclass(value := getattr(gradsurgery, name))
    and issubclass(value, gradsurgery.MultiLossOptimizer)
    and value not in BASES
}


def rows_of(name):
    """The catalogue rows of a class, that of its defaults first."""
    rows = [row for row in [*CATALOGUE, *WEIGHTING_CATALOGUE] if re.split(r"[ ,]", row.name)[0] == name]
    return sorted(rows, key=lambda row: row.name != name)


def every_entry(*kinds):
    chosen = [entry for entry in ENTRIES if entry.name in METHODS and issubclass(METHODS[entry.name], kinds)]
    return pytest.mark.parametrize("entry", chosen, ids=lambda entry: entry.name)


def test_every_public_method_has_one_row():
    assert Counter(entry.name for entry in ENTRIES) == Counter(list(METHODS))


@every_entry(gradsurgery.Surgery, gradsurgery.Weighter)
def test_row_links_to_the_reference(entry):
    assert entry.link == f"gradsurgery.{entry.name}"
    assert all(entry.cells.values()), "no cell is empty"


def scales(name):
    """What the class and its catalogue rows declare: the default, and everything that any form of it has."""
    built = [row.build(any_optimizer()) for row in rows_of(name)]
    default = built[0].scale if built else METHODS[name].scale
    return default, {
        METHODS[name].scale,
        *(o.scale for o in built),
        *(getattr(r, "scale", default) for r in rows_of(name)),
    }


@every_entry(gradsurgery.Surgery, gradsurgery.Weighter)
def test_scale(entry):
    default, declared = scales(entry.name)
    said = [part.split()[0] for part in entry.cells["scale"].split(";")]
    assert said[0] == default
    assert sorted(said) == sorted(declared)


def promise(row):
    if row.common_descent:
        return "always" if row.common_descent == ALL else f"m = {row.common_descent}"
    return "independent rows" if row.descends_at_full_rank else "no"


@every_entry(gradsurgery.Surgery)
def test_no_loss_rises(entry):
    """What no catalogue row declares, and so no test has tried, the page does not promise."""
    declared = list(dict.fromkeys(promise(row) for row in rows_of(entry.name)))
    assert declared, "the method has no row in tests/support/catalogue.py"
    said = [part.strip() for part in entry.cells[RISE].split(";")]
    assert len(said) == len(declared)
    assert all(words.startswith(words_declared) for words, words_declared in zip(said, declared, strict=True))


@every_entry(gradsurgery.Weighter)
def test_weighters_make_no_such_promise(entry):
    assert RISE not in entry.cells


def arxiv(text):
    return set(re.findall(r"\b\d{4}\.\d{5}\b", text))


@every_entry(gradsurgery.Surgery, gradsurgery.Weighter)
def test_papers_are_those_of_the_docstring(entry):
    cell = entry.cells["method"]
    known = arxiv(METHODS[entry.name].__doc__)
    said = re.findall(r"\[([^\]`]+)\]\((https://[^)]+)\)", cell)
    assert all(url == f"https://arxiv.org/abs/{text}" for text, url in said if "arxiv" in url or arxiv(text))
    assert arxiv(cell) <= known
    assert bool(arxiv(cell)) == bool(known)


def test_every_switch_has_a_row():
    (table,) = [rows for _, (head, *rows) in tables(PAGE) if head[0] == "switch"]
    named = {name: row[1] for row in table for name in re.findall(r"`(\w+)`", row[0])}
    assert set(named) == {*Switches.__annotations__, *SurgerySwitches.__annotations__}
    assert {name for name, kind in named.items() if kind == "surgery"} == {*SurgerySwitches.__annotations__} - {
        *Switches.__annotations__
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("| method | scale |\n| --- | --- |\n| `PCGrad` | sum |\n", "must begin with"),
        ("| method | scale |\n| --- | --- |\n| [`PCGrad`](#gradsurgery.PCGrad) | sum | sum |\n", "number of cells"),
        ("| method | scale |\n| [`PCGrad`](#gradsurgery.PCGrad) | sum |\n", "made of dashes"),
    ],
)
def test_malformed_tables_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        entries(text)
