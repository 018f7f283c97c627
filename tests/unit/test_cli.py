"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsurgery
from gradsurgery.__main__ import COMMANDS, main
from gradsurgery.cli import catalogue, comparing, diagnosing

ROOT = Path(gradsurgery.__file__).resolve().parent.parent
SCRIPT = """
import torch
from beside import SIZE

def make(features=False):
    model = torch.nn.Linear(SIZE, 2)
    def loss_fn(batch):
        first, second = model(batch).unbind(dim=1)
        losses = {"a": first.square().mean(), "b": 1000 * (second + first - 1).square().mean()}
        return losses
    return model, loss_fn, [torch.randn(4, SIZE) for _ in range(9)]

def wrong():
    return 3

def two():
    return make()[:2]

def broken():
    raise KeyError("mine")

def made(change):
    model, loss_fn, batches = make()
    return model, lambda batch: change(loss_fn(batch)), batches

def broken_loss():
    def change(losses):
        raise ValueError("mine: not finite")
    return made(change)

def empty():
    return *make()[:2], []

def detached():
    return made(lambda losses: {"a": losses["a"], "b": losses["b"].detach()})

def vector():
    return made(lambda losses: {"a": losses["a"], "b": losses["b"].repeat(3)})
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("SIZE = 3\n", encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT, encoding="utf-8")
    yield path
    for name in ("mine", "beside"):
        sys.modules.pop(name, None)


def outcome(capsys, *argv):
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("argv", [[], *([command.NAME] for command in COMMANDS)], ids=str)
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gradsurgery")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["list", "--kind", "x"], "invalid choice: 'x'"),
        (["list", "--needs", "luck"], "'luck' is none of values"),
        (["list", "--common-descent", "1"], "must be at least 2, got 1"),
        (["compare", "x"], "invalid choice: 'x'"),
        (["compare", "quadratics", "--steps", "-1"], "must be at least 1, got -1"),
        (["compare", "quadratics", "--lr", "fast"], "must be a positive number, got 'fast'"),
        (["diagnose", "mine.py:make", "--batches", "many"], "must be a whole number, got 'many'"),
        (["demo", "--seeds", "0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "usage:" in err
    assert message in err


def test_without_a_command_all_are_named(capsys):
    code, out, err = outcome(capsys)
    assert (code, out) == (2, "")
    assert all(command.HELP.split(",")[0] in " ".join(err.split()) for command in COMMANDS)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_lines_fit_the_terminal(capsys, monkeypatch, script, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for argv in (
        ["list"],
        ["explain", "MConFIG"],
        ["compare", "quadratics", "--methods", "MGDA,FAMO", "--steps", "2"],
        ["diagnose", f"{script}:make", "--batches", "2"],
    ):
        _, out, _ = outcome(capsys, *argv)
        assert max(map(len, out.splitlines())) <= width, argv


# ----------------------------------------------------------------------------------------------------------------- list


def test_list_names_every_method(capsys):
    code, out, err = outcome(capsys, "list")
    assert (code, err) == (0, "")
    first = [line.split(" ")[0] for line in out.splitlines()]
    assert [word for word in first if word in catalogue.facts()] == list(catalogue.facts())
    assert max(map(len, out.splitlines())) <= 100
    assert "{0} of {0} methods".format(len(catalogue.facts())) in out


@pytest.mark.parametrize(
    ("argv", "some", "none"),
    [
        (["--kind", "surgery"], "PCGrad", "FixedWeighter"),
        (["--common-descent"], "UPGrad", "PCGrad"),
        (["--common-descent", "2"], "PCGrad", "ConFIG"),
        (["--one-pass"], "MConFIG", "PCGrad"),
        (["--needs", "values"], "FAMOWeighter", "GradNormWeighter"),
        (["--needs", "products, rows-kept"], "MoCo", "MoDo"),
        (["--scale", "priority"], "AGEM", "PCGrad"),
    ],
)
def test_filters(capsys, argv, some, none):
    code, out, _ = outcome(capsys, "list", *argv, "--json")
    names = {entry["name"] for entry in json.loads(out)}
    assert code == 0
    assert some in names
    assert none not in names


def test_nothing_is_left(capsys):
    code, out, _ = outcome(capsys, "list", "--kind", "weighting", "--common-descent")
    assert (code, out) == (1, "No method is like that.\n")
    assert outcome(capsys, "list", "--kind", "weighting", "--common-descent", "--json")[:2] == (1, "[]\n")


def test_no_colour_in_a_pipe():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "gradsurgery", "list"], capture_output=True, env=environment, timeout=300, check=True
    )
    assert b"PCGrad" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


# -------------------------------------------------------------------------------------------------------------- explain


def test_explain(capsys):
    code, out, _ = outcome(capsys, "explain", "cagrad")
    assert code == 0
    assert out.startswith("CAGrad\n======\n")
    assert "d = g₀ + c ‖g₀‖ g_w / ‖g_w‖" in " ".join(out.split())
    assert "https://arxiv.org/abs/2110.14048" in out
    assert ":class:" not in out
    assert "``" not in out


@pytest.mark.parametrize("name", list(catalogue.facts()))
def test_explain_every_method(capsys, name):
    code, out, _ = outcome(capsys, "explain", name)
    assert code == 0
    assert not any(mark in out for mark in (":class:", ":meth:", "``", ">>>", "Args:"))
    assert max(map(len, out.splitlines())) <= 100


def test_explain_as_json(capsys):
    code, out, _ = outcome(capsys, "explain", "GradNorm", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["name"], facts["kind"], facts["needs"]) == ("GradNormWeighter", "weighting", ["values", "norms"])
    assert facts["explanation"].startswith(facts["summary"])


def test_explain_an_unknown_method(capsys):
    code, out, err = outcome(capsys, "explain", "PCGard")
    assert (code, out) == (2, "")
    assert "Did you mean PCGrad" in err


@pytest.mark.parametrize("more", [[], ["--dark"]])
def test_drawing(capsys, tmp_path, more):
    path = tmp_path / "drawing.png"
    code, out, _ = outcome(capsys, "explain", "UPGrad", "--plot", str(path), *more)
    assert code == 0
    assert str(path) in out
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("name", ["no-folder/x.png", "x.nothing"])
def test_drawing_nowhere(capsys, tmp_path, name):
    code, _, err = outcome(capsys, "explain", "UPGrad", "--plot", str(tmp_path / name))
    assert code == 2
    assert "cannot draw into" in err


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "gradsurgery.cli.method_pictures", raising=False)
    monkeypatch.delattr(gradsurgery.cli, "method_pictures", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        @staticmethod
        def find_spec(name, *_):
            if name.split(".")[0] == "matplotlib":
                raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.delitem(sys.modules, "gradsurgery.watch.pictures", raising=False)
    monkeypatch.delattr(gradsurgery.watch, "pictures", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    for argv in (["explain", "UPGrad"], ["compare", "quadratics"]):
        code, _, err = outcome(capsys, *argv, "--plot", "x.png")
        assert code == 2
        assert "pip install matplotlib" in err


@pytest.mark.parametrize("name", list(catalogue.facts()))
def test_every_method_has_a_direction(name):
    from gradsurgery.cli import method_pictures

    for rows in method_pictures.EXAMPLES:
        direction = method_pictures.direction(name, rows)
        assert direction is not None
        assert direction.shape == (2,)
        if catalogue.find(name).common_descent(len(rows)):
            assert (rows @ direction >= -1e-9).all()


def test_weightings_are_drawn_after_a_run():
    from gradsurgery.cli import method_pictures

    rows = method_pictures.EXAMPLES[1]
    weights = method_pictures.weights_after_a_run
    # Losses of 1, 2 and 1.5 have fallen to 0.1, 1.8 and 0.75.
    assert weights("FixedWeighter", rows) == pytest.approx([1, 1, 1])
    assert weights("InitialLossWeighter", rows) == pytest.approx([1, 1 / 2, 1 / 1.5])
    assert weights("RealTimeWeighter", rows) == pytest.approx([1 / 0.1, 1 / 1.8, 1 / 0.75])
    slow, fast, middle = (weights("DWAWeighter", rows)[i] for i in (1, 0, 2))
    assert slow > middle > fast  # the slower a loss falls, the more it gets
    lengths = weights("NTKWeighter", rows) * (rows**2).sum(axis=1)
    assert lengths == pytest.approx([lengths[0]] * 3)
    figure = method_pictures.draw("RealTimeWeighter")
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any(text.startswith("10 g₁ + 0.56 g₂ + 1.33 g₃, ÷ ") for text in said)
    assert "all weights are 1: the sum" in [t.get_text() for t in method_pictures.draw("FixedWeighter").axes[0].texts]


def test_the_pictures_show_a_conflict():
    from gradsurgery.cli import method_pictures

    for rows in method_pictures.EXAMPLES:
        assert (rows @ rows.sum(axis=0)).min() < 0  # the sum raises a loss, so that methods differ


# ------------------------------------------------------------------------------------------------------------- diagnose


def test_diagnose(capsys, script):
    code, out, err = outcome(capsys, "diagnose", f"{script}:make", "--no-cost", "--batches", "7")
    assert (code, err) == (0, "")
    assert out.startswith("7 batches, 2 losses.")
    assert "weights = {" in out


def test_diagnose_as_json(capsys, script):
    code, out, _ = outcome(capsys, "diagnose", f"{script}:make", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["batches"] == 9
    assert [cost["family"] for cost in found["costs"]] == ["plain sum", "weighting", "surgery"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine.py", "write SCRIPT.py:FUNCTION"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("mine.py:nothing", "has no function 'nothing'"),
        ("mine.py:wrong", "must return (model or optimizer, loss_fn, batches), got int"),
        ("mine.py:two", "must return (model or optimizer, loss_fn, batches), got Linear, function."),
    ],
)
def test_diagnose_what_is_not_there(capsys, script, monkeypatch, target, message):
    monkeypatch.chdir(script.parent)
    code, out, err = outcome(capsys, "diagnose", target)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", ["broken", "broken_loss"])
def test_errors_of_the_users_code_come_out(script, name):
    with pytest.raises((KeyError, ValueError), match="mine"):
        main(["diagnose", f"{script}:{name}"])


@pytest.mark.parametrize(
    ("name", "message"), [("empty", "`batches` is empty"), ("detached", "loss 'b' has no graph"), ("vector", "scalar")]
)
def test_errors_of_losses_and_batches_are_one_line(capsys, script, name, message):
    code, out, err = outcome(capsys, "diagnose", f"{script}:{name}")
    assert (code, out) == (2, "")
    assert err.startswith("gradsurgery diagnose: ")
    assert message in err
    assert err.count("\n") == 1


def test_load_runs_beside_the_script(script):
    assert diagnosing.load(f"{script}:make").__module__ == "mine"


# -------------------------------------------------------------------------------------------------------------- compare


def test_compare(capsys, tmp_path):
    path = tmp_path / "paths.png"
    argv = ["compare", "quadratics", "--methods", "mgda,UPGrad", "--steps", "200", "--plot", str(path)]
    code, out, _ = outcome(capsys, *argv)
    assert code == 0
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["UPGrad"][4] == "6/6"
    assert list(rows).index("plain sum") < list(rows).index("MGDA") < list(rows).index("UPGrad")
    assert path.stat().st_size > 20_000


def test_paths_of_many_methods(tmp_path):
    from gradsurgery import problems
    from gradsurgery.cli import method_pictures

    problem = problems.quadratics()
    far = torch.full((2, 2), 1e9, dtype=torch.float64)  # a path that leaves the frame, as of a method that diverges
    paths = {f"method {i}": [torch.stack([start, 0.5 * start])] for i, start in enumerate(2 * problem.starts[:5])}
    figure = method_pictures.draw_paths(problem, {**paths, "diverges": [far]}, tmp_path / "paths.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == [*paths, "diverges", "losses at the ends, 1 beyond"]
    assert figure.axes[len(paths) + 1].get_xlim()[1] < 100


def test_compare_as_json(capsys):
    code, out, _ = outcome(capsys, "compare", "concave", "--methods", "MGDA", "--steps", "50", "--json")
    found = json.loads(out)
    assert code == 0
    assert [walk["method"] for walk in found["methods"]] == ["plain sum", "MGDA"]
    assert all(len(walk["ends"]) == 6 for walk in found["methods"])


def test_a_method_that_cannot_walk(capsys):
    code, out, _ = outcome(capsys, "compare", "valleys", "--methods", "RealTime", "--steps", "20")
    assert code == 1
    assert "RealTimeWeighter cannot walk here" in out
    assert "plain sum" in out
    assert "NaN" not in outcome(capsys, "compare", "valleys", "--methods", "RealTime", "--steps", "5", "--json")[1]


def test_compare_unknown(capsys):
    assert outcome(capsys, "compare", "quadratics", "--methods", "Foo")[0] == 2


@pytest.mark.parametrize("problem", list(comparing.PROBLEMS))
def test_every_method_walks_on_every_problem_or_says_why_not(capsys, problem):
    code, out, err = outcome(capsys, "compare", problem, "--methods", "all", "--steps", "2", "--json")
    walks = json.loads(out)["methods"]
    assert err == ""
    assert [walk["method"] for walk in walks] == ["plain sum", *catalogue.facts()]
    failed = {walk["method"]: walk["error"] for walk in walks if walk["error"]}
    assert code == (1 if failed else 0)
    # Losses below zero are there on two of the landscapes, and some methods divide by losses.
    assert all("every loss must be" in error or "must be >= 0" in error for error in failed.values())
    assert failed.keys() <= {name for name, facts in catalogue.facts().items() if "values" in facts.needs}


# ------------------------------------------------------------------------------------------------------------ catalogue


def test_facts_agree_with_the_classes():
    for facts in catalogue.facts().values():
        method = facts.method
        kept = {"rows kept", "more batches"} & set(facts.needs)
        assert bool(kept) == getattr(method, "observes", False), facts.name
        assert ("values" in facts.needs) == method.needs_losses if facts.kind == "surgery" else True, facts.name
        if "entries" in facts.needs and facts.kind == "surgery" and not kept:
            assert not method.has_weights, facts.name
        assert facts.summary.endswith(".")
        assert facts.when.endswith(".")


def test_common_descent():
    pcgrad, upgrad = catalogue.find("PCGrad"), catalogue.find("UPGrad")
    assert [pcgrad.common_descent(m) for m in (2, 3, None)] == [True, False, False]
    assert [upgrad.common_descent(m) for m in (2, 3, None)] == [True, True, True]
    assert not catalogue.find("SDMGrad").common_descent()
