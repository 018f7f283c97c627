"""The rooms of the package, and what each may import: the table of docs/design.md, held by a test."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import gradsurgery
from gradsurgery.text.moved import Moved

ROOT = Path(gradsurgery.__file__).parent
#: From the bottom up. A room imports rooms below it, and itself.
ROOMS = [
    ["text"],
    ["geometry"],
    ["communication"],
    ["graph.torch_private"],
    ["graph"],
    ["gradients"],
    ["settings"],
    ["report", "losses"],
    ["misuse"],
    ["transaction"],
    ["batch"],
    ["sharing", "guard", "solve"],
    ["step"],
    ["weighting.deferred"],
    ["optimizer"],
    ["weighting.base"],
    ["surgery.base"],
]
#: Protocols name types of the rooms that they stand between, for type checkers alone.
BETWEEN = "protocols"
#: What the file of a method may import of the package: its base class, mathematics, and what docs/api/authors.md names.
FOR_AUTHORS = {
    "batch", "geometry", "gradients", "gradients.rows", "gradients.gram", "gradients.moments", "losses", "optimizer",
    "report", "surgery.base", "weighting.base",
}  # fmt: skip


def modules():
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path):
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradsurgery":
            base = node.module.partition(".")[2]
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                found.add(whole if whole in modules() or f"{whole}.__init__" in modules() else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("gradsurgery")}
    return found


def level(name):
    """Which room a module lies in, from the bottom; None for those above all of these."""
    for k, names in enumerate(ROOMS):
        if any(name == room or name.startswith(f"{room}.") for room in names):
            return k
    return None


@pytest.mark.parametrize("name", [name for name in modules() if level(name) is not None])
def test_a_room_imports_only_what_lies_below_it(name):
    for other in imported(modules()[name]) - {BETWEEN}:
        below = level(other)
        assert below is not None, f"{name} imports {other}"
        same = name.split(".")[0] == other.split(".")[0]
        assert below < level(name) or same, f"{name} imports {other}"


def test_the_top_folder_is_the_road():
    """What is read to follow a step, and what is typed: `import gradsurgery`, `python -m gradsurgery`."""
    road = {name for name in modules() if "." not in name} - {"__init__", "__main__"}
    assert len(road) <= 12, road
    assert road <= {name for names in ROOMS for name in names} | {BETWEEN}


def test_protocols_are_imported_for_types_alone():
    for name, path in modules().items():
        text = path.read_text("utf-8")
        if f"gradsurgery.{BETWEEN}" in text:
            assert re.search(rf"if TYPE_CHECKING:\n(    .*\n)*?    from gradsurgery\.{BETWEEN} import", text), name


METHODS = [
    name
    for name in modules()
    if re.match(r"(surgery|weighting)\.", name) and name.rpartition(".")[2] not in ("base", "__init__")
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_imports_only_what_an_author_outside_could(name):
    allowed = FOR_AUTHORS | {other for other in METHODS if other.split(".")[0] == name.split(".")[0]} | {"sharing"}
    assert imported(modules()[name]) <= allowed


@pytest.mark.parametrize("name", METHODS)
def test_a_method_touches_nothing_private_of_its_base_class(name):
    own = set()
    used = set()
    tree = ast.parse(modules()[name].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            own.add(node.target.attr)
    private = {x for x in used - own if x.startswith("_")}
    # The class name in errors, and what a base class in another method's file has of its own.
    for base in vars(importlib.import_module(f"gradsurgery.{name}")).values():
        if inspect.isclass(base) and base.__module__.startswith("gradsurgery.") and base.__module__ not in BASES:
            private -= set(vars(base))
    assert private <= {"_name"}


BASES = {"gradsurgery.surgery.base", "gradsurgery.weighting.base", "gradsurgery.optimizer"}
KEPT = Path(__file__).parents[1] / "data" / "signatures.json"


def documented():
    """Every class and function that a page of docs/api names, with its public members' signatures."""
    found = {}
    for page in sorted((ROOT.parent / "docs" / "api").glob("*.md")):
        module = ""
        for kind, name in re.findall(
            r"\.\. (currentmodule|autoclass|autofunction|automethod):: ([\w.]+)", page.read_text("utf-8")
        ):
            if kind == "currentmodule":
                module = f"{name}."
                continue
            path = name if name.startswith("gradsurgery.") else module + name
            found.update(signatures(path))
    return found


def signatures(path):
    *module, last = path.split(".")
    rest = [last]
    while ".".join(module[1:]) not in modules() and len(module) > 1:
        rest.insert(0, module.pop())
    thing = importlib.import_module(".".join(module))
    for name in rest:
        thing = getattr(thing, name)
    if not inspect.isclass(thing):
        return {path: shown(thing)}
    members = {
        f"{path}.{n}": shown(m) for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")
    }
    return {path: shown(thing), **members}


def shown(thing):
    """Names, kinds and defaults; annotations may be written in several ways."""
    plain = [p.replace(annotation=p.empty) for p in inspect.signature(thing).parameters.values()]
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(plain)))


def test_public_signatures_are_those_that_were_kept():
    """What docs/api names may grow. If it is to change, give the old way a warning, and write the new list."""
    kept = json.loads(KEPT.read_text("utf-8"))
    now = documented()
    assert {name: now.get(name) for name in kept} == kept


@pytest.mark.parametrize("name", sorted(n for n, module in sys.modules.items() if isinstance(module, Moved)))
def test_a_module_that_moved_can_be_imported_and_says_where_to(name):
    old = importlib.import_module(name)
    for entry, place in old.places.items():
        home, _, new = place.partition(":")
        with pytest.warns(DeprecationWarning, match=rf"^{name}\.{entry} is now {home}\.{new}\. .* version 1\.0"):
            assert getattr(old, entry) is getattr(importlib.import_module(home), new)
    assert hasattr(gradsurgery, name.rpartition(".")[2])
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'other'"):
        _ = old.other


def test_the_old_names_do_not_hide_functions():
    import gradsurgery.diagnose
    import gradsurgery.estimate
    import gradsurgery.monitor

    assert gradsurgery.diagnose is importlib.import_module("gradsurgery.watch.diagnose").diagnose
    assert gradsurgery.estimate is importlib.import_module("gradsurgery.watch.estimate").estimate
    assert gradsurgery.monitor.Monitor is gradsurgery.Monitor
