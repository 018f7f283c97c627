"""What measures a tree: its structure on a small one that can be counted by hand, and two trees against each other."""

from __future__ import annotations

import ast
import itertools
import json
import math
import shutil
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._functorch import config as functorch

from benchmarks import compare, compiled, engines, middle, page, steps, structure, workloads

ROOT = Path(__file__).resolve().parents[2]

# A package in five files. One step enters 7 functions in 3 files; `again` is a return to optimizer.py, and
# `weigh` is called twice and counts once.
SMALL = {
    "__init__.py": """
        from gradsurgery.surgery.pcgrad import PCGrad

        __all__ = ["PCGrad"]
    """,
    "optimizer.py": """
        from gradsurgery import rows

        class Base:
            def __init__(self, base):
                self.base, self.world = base, None

            def zero_grad(self):
                self.base.zero_grad()

            def backward(self, losses, kept=None):
                \"\"\"Two lines.

                Args: none.
                \"\"\"
                gradients = rows.gather(losses, self)
                if self.world is None and kept is None:
                    return [g for g in map(lambda g: self.weigh(g), gradients) if g]

            def again(self):
                return [
                    1,
                ]

            def never(self, other):
                return other._secret if self.world is not None else other._run["x"]

            def step(self):
                self.base.step()
    """,
    "rows.py": """
        def gather(losses, owner):
            return owner.again()
    """,
    "surgery/__init__.py": "",
    "surgery/pcgrad.py": """
        from gradsurgery.optimizer import Base

        class PCGrad(Base):
            def weigh(self, g):
                return twice(g)

        def twice(g):
            return 2 * g
    """,
    "geometry/cones.py": """
        def branchy(a, b):
            for x in a:
                while x and b or a:
                    x = 1 if b else [y for y in a if y]
            for x in a: x
            for x in a: x
            for x in a: x
            for x in a: x
            for x in a: x
            try:
                if a: return 1
                elif b: return 2
            except ValueError:
                return 3
    """,
}


@pytest.fixture
def small(tmp_path):
    for name, text in SMALL.items():
        path = tmp_path / "gradsurgery" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
    return tmp_path


def test_a_small_tree_is_counted(small):
    found = structure.measure(small)
    assert found.pop("where") == {
        "private attributes of others": {"optimizer.py": 2},
        "tests of a mode in the core": {"optimizer.py": 2},
    }
    assert found == {
        "functions": 7,
        "files": 3,
        "lines": 22,
        "statements": 9,
        "returns": 1,
        "private attributes of others": 2,
        "complex functions (C901 over 10)": 1,
        "complex functions (every branch, over 15)": 1,
        "tests of a mode in the core": 2,
        "world is None": 2,
        "mentions of _run": 1,
        "files of the core": 4,
        "lines of the core": 3 + 28 + 2 + 0,
    }


def test_every_branch_counts():
    (function,) = structure.functions(ast.parse(textwrap.dedent(SMALL["geometry/cones.py"])))
    # 1, six loops, a while with two operators, a conditional expression, a comprehension with a condition, two ifs and
    # an except.
    assert structure.branches(function) == 1 + 6 + 3 + 1 + 2 + 2 + 1


def test_trees_stand_side_by_side(small, capsys):
    other = small.parent / "other"
    shutil.copytree(small, other)
    with (other / "gradsurgery" / "rows.py").open("a") as file:
        file.write("\ndef more(mine):\n    return mine._secret\n")
    structure.main([str(small), str(other), "--json"])
    both = json.loads(capsys.readouterr().out)
    assert [both[str(tree)]["lines of the core"] for tree in (small, other)] == [33, 36]
    text = structure.table(["one", "two"], list(both.values()))
    assert ["private", "attributes", "of", "others", "2", "3"] in [line.split() for line in text.splitlines()]
    assert ["rows.py", "0", "1"] in [line.split() for line in text.splitlines()]


def test_this_tree_can_be_measured():
    files = structure.modules(ROOT)
    core = structure.core(files)
    assert {"optimizer.py", "surgery/base.py", "weighting/base.py"} <= set(core)
    assert not {"surgery/pcgrad.py", "weighting/gradnorm.py", "monitor.py", "geometry/cones.py"} & set(core)
    found = structure.road(structure.calls_of_a_step(ROOT), files)
    assert found["files"] < found["functions"] < found["statements"] < found["lines"]


def test_a_tree_whose_step_fails_says_so(small):
    (small / "gradsurgery" / "rows.py").write_text("def gather(losses, owner):\n    raise KeyError('lost')\n")
    with pytest.raises(RuntimeError, match="KeyError: 'lost'"):
        structure.measure(small)


# ------------------------------------------------------------------------------------------------ private attributes


def names_by_text(tree: ast.Module) -> set[str]:
    """Private names that are looked up by their text, which the linter does not see."""
    looks = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and {"id", "attr"} & vars(node.func).keys():
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            for word in node.args if called in looks else ():
                text = word.values[0] if isinstance(word, ast.JoinedStr) and word.values else word
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found |= {part for part in text.value.split(".") if part.startswith("_") and part[:2] != "__"}
    return found


def test_private_names_are_found_in_every_disguise():
    code = """
        getattr(a, "_one", None), setattr(a, "_two", 1), hasattr(a, f"_three{b}"), operator.attrgetter("b._four")(a)
        getattr(a, "five"), getattr(a, "__six__"), getattr(a, seven), a.get("_eight"), f()(9), f"{a}"
    """
    assert names_by_text(ast.parse(textwrap.dedent(code))) == {"_one", "_two", "_three", "_four"}


def test_one_module_alone_reads_private_attributes():
    """Ruff forbids ``a._b`` in all others; this is the way around. Of named tuples ``_fields`` is documented."""
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "gradsurgery").rglob("*.py")}
    private = {file: names_by_text(ast.parse(path.read_text(encoding="utf-8"))) for file, path in files.items()}
    assert {file for file, names in private.items() if names - {"_fields"}} == {"gradsurgery/graph/torch_private.py"}


# ------------------------------------------------------------------------------------------------------- two trees


@pytest.mark.parametrize("n", [6, 10, 30, 31, 60])
def test_the_interval_contains_the_median_in_95_of_100_cases(n):
    """By enumeration: the interval misses the median where too few of n fair coins fall on one side."""
    low, high = compare.interval([float(x) for x in range(n)])
    left = int(low)
    assert high == n - 1 - left

    def missed(rank):
        return 2 * sum(math.comb(n, k) for k in range(rank + 1)) / 2**n

    assert missed(left) <= 0.05 < missed(left + 1)


def test_the_interval_of_a_few_is_their_range():
    assert compare.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_rows_say_what_is_certain():
    cell = ("MLP 2 × 64", "PCGrad", 2)
    rest = {"seconds": [0.001], "apart": 0.0}
    assert compare.line(cell, {"ratios": [0.9] * 10, **rest}).endswith("faster")
    assert compare.line(cell, {"ratios": [1.1] * 10, **rest}).endswith("slower")
    assert compare.line(cell, {"ratios": [0.9, 1.1] * 5, **rest}).endswith("0e+00")
    assert compare.line(cell, {"errors": {"the other": "KeyError: 1"}}).endswith("the other: KeyError: 1")


def test_each_process_measures_its_own_tree(tmp_path):
    """The other tree doubles every gradient of PCGrad, and has no MGDA."""
    shutil.copytree(ROOT / "gradsurgery", tmp_path / "gradsurgery")
    with (tmp_path / "gradsurgery" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("del MGDA\n_w = PCGrad.weights\nPCGrad.weights = lambda self, *args: 2 * _w(self, *args)\n")
    cells = [*itertools.product(["MLP 2 × 64"], ["PCGrad", "UPGrad"], [2]), ("PINN 3 × 20", "MGDA", 2)]
    found = dict(compare.compare(tmp_path, cells, pairs=2, restarts=1))
    assert list(found) == cells
    doubled, same, missing = found.values()
    assert doubled["apart"] == pytest.approx(0.5, abs=0.2)  # the heads' gradients are not in it
    assert same["apart"] == 0
    assert [len(same[key]) for key in ("ratios", "seconds")] == [2, 2]
    assert missing["errors"].keys() == {"the other"}
    assert "MGDA" in missing["errors"]["the other"]


def test_restarts_are_joined(tmp_path, monkeypatch):
    """This tree takes 3 seconds a call in the first processes and 5 in the second ones, the other always 2."""
    started = []

    class Fake:
        def __init__(self, tree):
            self.closed, self.mine = False, tree == compare.ROOT
            started.append(self)
            self.spent = 2.0 if not self.mine else 3.0 if len(started) <= 2 else 5.0

        def ask(self, what):
            return {"gradient": [1.0], "seconds": self.spent * (what if isinstance(what, int) else 1)}

        def close(self):
            self.closed = True

    monkeypatch.setattr(compare, "Worker", Fake)
    cells = [("MLP 2 × 64", "PCGrad", 2), ("MLP 2 × 64", "MGDA", 2)]
    found = dict(compare.compare(tmp_path, cells, pairs=5, restarts=2))
    assert list(found) == cells
    assert all(result["ratios"] == [1.5, 1.5, 2.5, 2.5, 2.5] for result in found.values())
    assert all(result["seconds"] == [2.0] * 5 for result in found.values())
    assert len(started) == 4
    assert all(worker.closed for worker in started)


def test_a_commit_is_unpacked(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    (tmp_path / "gradsurgery").mkdir()
    file = tmp_path / "gradsurgery" / "__init__.py"
    file.write_text("old = True\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "old")
    file.write_text("old = False\n")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with compare.package_of("HEAD") as tree:
        assert (tree / "gradsurgery" / "__init__.py").read_text() == "old = True\n"
    with pytest.raises(SystemExit, match="nowhere"), compare.package_of("nowhere"):
        pass


# ------------------------------------------------------------------------------------------ compiled models


def test_steps_of_a_compiled_model_are_timed_and_shown(tmp_path, monkeypatch, capsys):
    path = tmp_path / "performance.md"
    path.with_suffix(".json").write_text(json.dumps({"runs": []}))
    command = ["compiled", "--rounds", "2", "--backend", "aot_eager", "--write"]
    monkeypatch.setattr("sys.argv", [*command, str(path), "--models", "MLP 2 x 64"])
    with functorch.patch(donated_buffer=False):
        compiled.main()
    torch._dynamo.reset()
    run = json.loads(page.compiled_figures(path).read_text())
    assert len(run["rows"]) == 9
    assert {r["to_plain"] for r in run["rows"] if r["candidate"] == "plain sum"} == {1.0}
    assert all(r["milliseconds"] > 0 for r in run["rows"])
    table = page.compiled_table(run)
    assert table in path.read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 9 + 1


def test_a_model_that_is_compiled_in_pieces_is_no_measurement(monkeypatch):
    class Broken(workloads.Multi):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    monkeypatch.setitem(
        compiled.MODELS, "broken", lambda: (Broken(torch.nn.Linear(2, 2), 2, 2), lambda: torch.ones(1, 2))
    )
    options = SimpleNamespace(rounds=0, backend="eager", mode=None, device="cpu")
    with pytest.raises(RuntimeError, match="broken: the model was not compiled once and as a whole"):
        compiled.measure("broken", options)
    torch._dynamo.reset()


@pytest.mark.parametrize("model", [*engines.TUNED, *engines.UNSEEN], ids=lambda model: f"{model.family} {model.size}")
def test_every_model_of_the_grid_has_losses_with_gradients(model):
    trunk, width = model.build()
    losses, _ = workloads.Multi(trunk, width, 2)(model.draw())
    grads = torch.autograd.grad(losses[0], [p for p in trunk.parameters() if p.requires_grad], allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in grads) > len(grads) / 2


def test_the_grid_of_engines_compares_auto_with_the_faster_one():
    assert len(engines.TUNED) == 40
    assert len(engines.UNSEEN) == 12
    found = engines.cell(engines.TUNED[0], 2, engines.ENGINES, rounds=1, seconds=0.0)
    assert found["took"] == "rows"
    assert all(found[engine] > 0 for engine in engines.ENGINES)
    found |= {"run": "today"}
    slow = found | {"rows": 2.0, "ghosts": 1.0, "auto": 1.6, "took": "ghosts"}
    alone = found | {"rows": 2.0, "auto": 2.0}
    del alone["ghosts"]
    assert [engines.ratio(slow), engines.ratio(alone)] == [1.6, 1.0]
    assert engines.summary([slow, alone], "All") == "All: 1 of 2 cells within 1.15 (50%), worst 1.60, median 1.30"
    text = engines.section({"runs": {"today": engines.described()}, "tuned": [slow, alone], "unseen": [alone]})
    assert "| MLP | 2 | 1 | 1.30 | 1.60: 3 × 64, batch 64, m = 2 |" in text
    assert "| MLP (unseen) | 1 | 0 | 1.00 |" in text
    assert "3 cells of today (" in text


def test_a_part_of_the_grid_is_measured_anew(tmp_path, monkeypatch, capsys):
    """Its cells say of which run they are, and stand where those of the earlier run stood."""
    path = tmp_path / "engines.json"
    old = [
        {"rows": 1.0, "auto": 1.0, "took": "rows", "family": kind, "model": f"{kind}, {size}", "m": m, "run": run}
        for kind, size, m, run in (
            ("MLP", "3 × 64, batch 64", 2, "older"),
            ("MLP", "3 × 64, batch 64", 8, "old"),
            ("LoRA", "4 × 256, rank 4, batch 64", 2, "old"),
        )
    ]
    runs = {"older": {}, "old": {}}
    path.write_text(json.dumps({"runs": runs, "tuned": old, "unseen": []}))
    monkeypatch.setattr("sys.argv", ["engines", "--only", "MLP, 3 × 64", "--losses", "2", "--rounds", "1",
                                     "--json", str(path)])  # fmt: skip
    engines.main()
    found = json.loads(path.read_text())
    ((new, run),) = ((key, run) for key, run in found["runs"].items() if key != "old")
    assert run.keys() == engines.described().keys()
    assert [(c["model"][:3], c["m"], c["run"]) for c in found["tuned"]] == [
        ("MLP", 2, new), ("MLP", 8, "old"), ("LoR", 2, "old"),
    ]  # fmt: skip
    assert found["tuned"][0]["rows"] != 1.0
    assert "tuned: 1 of 1 cells" in (out := capsys.readouterr().out) or "tuned: 0 of 1 cells" in out


def test_points_that_would_take_too_much_memory_are_estimated_and_marked(monkeypatch):
    monkeypatch.setitem(steps.CURVES, "parameters", 600)
    options = SimpleNamespace(device="cpu", rounds=1, seconds=0.0)
    before = [
        {"axis": "depth", "at": at, "candidate": name, "milliseconds": 2.0 * at, "megabytes": size * at**2}
        for name, size in (("PCGrad", 1000.0), ("floor", 1.0))
        for at in (1, 2)
    ]
    points = {p["candidate"]: p for p in steps.curve("depth", 6, options, before)}
    guess = {"axis": "depth", "at": 6, "candidate": "PCGrad", "milliseconds": 12.0, "megabytes": 36000.0}
    assert points["PCGrad"] == pytest.approx(guess | {"estimated": True})
    assert {"plain sum", "floor"} <= points.keys()
    assert "estimated" not in points["floor"]
    assert 0 < points["floor"]["megabytes"] < 1
    every = [*before, *points.values()]
    assert page.exponents(every, "megabytes")["depth"]["PCGrad"] == pytest.approx(2.0)
    text = page.curve_text({"curves": every, "curves_base": steps.CURVES})
    assert "| PCGrad | 2, 1e+03 | 4, 4e+03 | ≈ 12, 3.6e+04 |" in text
    assert "600 parameters" not in text
    assert "else 4 losses, 0.0006 million parameters and\n6 layers" in text


def test_each_axis_varies_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        steps, "mlp_of_size", lambda *shape: seen.append(shape) or workloads.mlp_of_size(600, 2, shape[2])
    )
    monkeypatch.setattr(steps, "memory", lambda found: {c.name: 1e6 for c in found})
    monkeypatch.setattr(steps, "clock", lambda found, *_: {c.name: [1.0] for c in found})
    options = SimpleNamespace(device="cpu", rounds=1, seconds=0.0, curve_tasks=[2], curve_sizes=[1e5], curve_depths=[3])
    points = steps.curves(options)
    assert [(n, tasks, depth) for n, tasks, _, depth in seen] == [(1e6, 2, 6), (1e5, 4, 6), (1e6, 4, 3)]
    assert {(p["axis"], p["at"]) for p in points} == {("tasks", 2), ("parameters", 1e5), ("depth", 3)}


def test_steps_of_models_of_middle_size_are_shown(monkeypatch, tmp_path, capsys):
    small = (lambda: torch.nn.Linear(3, 4), 4, lambda: torch.randn(2, 3), 1.05)
    monkeypatch.setattr(middle, "MODELS", {"small": small})
    path = tmp_path / "middle.json"
    monkeypatch.setattr("sys.argv", ["middle", "--losses", "2", "--rounds", "1", "--json", str(path)])
    middle.main()
    results = json.loads(path.read_text())
    (found,) = results["cells"]
    assert (found["model"], found["m"], found["most"], found["took"]) == ("small", 2, 1.05, "rows")
    shown = f"| small | 1.05 | {found['rows']['to_floor']:.2f}, {found['auto']['to_floor']:.2f} |"
    assert shown in page.middle(results)
    assert "small" in capsys.readouterr().out
