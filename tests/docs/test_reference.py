"""The reference names everything public once, and is written from the library by docs/site_methods.py."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import gradsurgery
from gradsurgery.cli import catalogue

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_methods", DOCS / "site_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(text):
    return [name.rpartition(".")[2] for name in re.findall(r"^\.\. auto(?:class|function):: (\S+)", text, re.MULTILINE)]


def test_everything_public_is_described_once(site):
    texts = [*site.pages().values(), *(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))]
    found = Counter(name for text in texts for name in described(text))
    assert {name: found[name] for name in gradsurgery.__all__} == dict.fromkeys(gradsurgery.__all__, 1)


def test_every_method_is_drawn_on_both_papers(site):
    pages = site.pages()
    kinds = {"surgery": gradsurgery.Surgery, "weighting": gradsurgery.Weighter}
    methods = {
        name: kind
        for name in gradsurgery.__all__
        for kind, base in kinds.items()
        if inspect.isclass(value := getattr(gradsurgery, name)) and issubclass(value, base) and value is not base
    }
    drawn = {name for name, text in pages.items() if f"pictures/{name}-light.svg" in text}
    assert drawn == set(methods)
    for name, kind in methods.items():
        for shade in ("light", "dark"):
            assert pages[kind].count(f"(pictures/{name}-{shade}.svg)") == 1
            assert f"pictures/{name}-{shade}.svg\n:class: only-{shade}" in pages[name]


def test_pages_are_written_and_stale_ones_deleted(site, tmp_path):
    (tmp_path / "Gone.md").write_text("# Gone")
    site.write(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.md")} == set(site.pages())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.md")}
    site.write(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.md")} == times


def test_drawings(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "surgeries", lambda: [catalogue.facts()["PCGrad"]])
    monkeypatch.setattr(site, "weightings", list)
    site.draw(tmp_path)
    light, dark = ((tmp_path / f"PCGrad-{shade}.svg").read_text() for shade in ("light", "dark"))
    assert light.startswith("<?xml")
    assert light != dark
    written = (tmp_path / "PCGrad-light.svg").stat().st_mtime_ns
    site.draw(tmp_path)
    assert (tmp_path / "PCGrad-light.svg").stat().st_mtime_ns == written
