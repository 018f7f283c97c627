"""Links of the pages lead somewhere: files and headings that exist, addresses that are well formed. No network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

import gradsurgery

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *DOCS.glob("*.md"),
        *DOCS.glob("api/*.md"),
    ]
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*(<[^>]*>|(?:[^()\s]|\([^()\s]*\))*)(?:\s+\"[^\"]*\")?\s*\)")
BARE = re.compile(r"(?:<|src=\"|href=\")(https?://[^>\"\s]*)[>\"]")
DIRECTIVE = re.compile(r"^[ \t]*(?:`{3,}|:{3,})\{(?:image|figure|include)\}[ \t]+(\S+)", re.MULTILINE)
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[^`\n]*\n.*?^(?P=indent)(?P=ticks)[ \t]*$", re.MULTILINE | re.DOTALL
)


class Link(NamedTuple):
    page: Path
    target: str


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", FENCE.sub("", text))


def targets(text: str) -> list[str]:
    """Everything that a page links to or shows."""
    words = prose(text)
    # The text of a link may be an image, with a target of its own.
    inner = [found for outer in LINK.finditer(words) for found in LINK.findall(outer[0][1:])]
    return [
        target.strip("<>") for target in [*LINK.findall(words), *inner, *BARE.findall(words), *DIRECTIVE.findall(text)]
    ]


def anchors(text: str) -> set[str]:
    """The headings of a page as they are linked to, on the built pages and in a repository viewer alike."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t]*$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(s.startswith(slug) for s in found)}")
    return found


def generated() -> set[str]:
    """Labels in the pages that the build writes. Nothing may link to the pages, which are missing without a build."""
    spec = importlib.util.spec_from_file_location("site_methods", DOCS / "site_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {label for text in module.pages().values() for label in re.findall(r"^\((.+)\)=$", text, re.MULTILINE)}


GENERATED = generated()


def problem(link: Link) -> str:
    """What is wrong with a link, or nothing."""
    if re.match(r"[a-z][a-z0-9+.-]*:", link.target):
        parts = urlsplit(link.target)
        if parts.scheme not in {"https", "http"}:
            return "neither a file nor http"
        if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}(:\d+)?", parts.netloc, re.IGNORECASE):
            return "no server"
        return "" if re.fullmatch(r"[\w\-.~:/?#\[\]@!$&'()*+,;=%]+", link.target, re.ASCII) else "odd characters"
    name, _, anchor = link.target.partition("#")
    path = (link.page.parent / name).resolve() if name else link.page
    if path.parent == DOCS / "reference":
        return "only there after a build: link to a label"
    if not name and anchor in GENERATED:
        return ""
    if not path.exists():
        return "no such file"
    if not anchor or (link.page == DOCS / "methods.md" and anchor.removeprefix("gradsurgery.") in gradsurgery.__all__):
        return ""
    return "" if anchor in anchors(path.read_text(encoding="utf-8")) else "no such heading"


LINKS = [Link(page, target) for page in PAGES for target in targets(page.read_text(encoding="utf-8"))]


def test_there_are_links():
    assert {DOCS / "index.md", DOCS / "methods.md", ROOT / "README.md"} <= {link.page for link in LINKS}
    assert sum("://" in link.target for link in LINKS) > 50
    assert sum("#" in link.target for link in LINKS) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    wrong = {link.target: said for link in LINKS if link.page == page and (said := problem(link))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.md", "no such file"),
        ("design.md#nothing-of-the-kind", "no such heading"),
        ("#nothing-of-the-kind", "no such heading"),
        ("reference/PCGrad.md", "only there after a build"),
        ("https://", "no server"),
        ("https://example", "no server"),
        ("ftp://example.org/x", "neither"),
        ("https://example.org/a b", "odd characters"),
        ("design.md#decisions", ""),
        ("../README.md#when-not-to-use-it", ""),
        ("#drawn", ""),
        ("https://arxiv.org/abs/2001.06782", ""),
    ],
)
def test_a_broken_link_is_found(target, said):
    found = problem(Link(DOCS / "index.md", target))
    assert found.startswith(said) if said else found == ""


def test_what_counts_as_a_link():
    page = "# A\n[a](b.md) and ![c](d.png), `[no](code)`\n[![e](f.png)](g.md)\n```text\n[no](fence)\n```\n<https://h.org>\n"
    page += "```{image} i.svg\n```\n[j](https://k.org/x_(y))\n"
    assert sorted(targets(page)) == ["b.md", "d.png", "f.png", "g.md", "https://h.org", "https://k.org/x_(y)", "i.svg"]
