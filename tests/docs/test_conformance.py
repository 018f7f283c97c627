"""The conformance suite: this library passes every case, and no case is one that anything would pass."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import conformance, forms, page, solvers, two_pages
from gradsurgery import testing
from gradsurgery.testing import DEFECTS, PEERS, Library, examine

OURS = testing.ours()


class Weights:
    """Weights of any kind, with a memory that is not what it seems."""

    def __init__(self, weigh):
        self.weigh, self.calls = weigh, 0

    def __call__(self, *args):
        self.calls += 1
        return self.weigh(self.calls, *args)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Training:
    """A training that trains nothing."""

    weights = np.array([np.nan, np.nan])

    def __init__(self, returned):
        self.returned = returned

    def backward(self, losses):
        return self.returned

    def step(self):
        pass


class Decays(Training):
    """Zeros in place of None, so that weight decay moves what no loss reaches."""

    def __init__(self, base, **options):
        self.base, self.params = base, [p for group in base.param_groups for p in group["params"]]
        self.weights = np.array([1.0, 2.0])

    def backward(self, losses):
        for p in self.params:
            p.grad = torch.ones_like(p)
        return 0.0

    def step(self):
        self.base.step()


def broken(name, direction, weigh, training):
    """A library that offers every method, all of them wrong."""
    tables = {"direction": {}, "weights": {}, "training": {}}
    for case in DEFECTS:
        tables[case.kind][case.method] = {
            "direction": lambda **options: Weights(direction),
            "weights": lambda **options: Weights(weigh),
            "training": training,
        }[case.kind]
    return Library(name, tables["direction"], tables["weights"], tables["training"])


def noisy(call, history):
    print("nothing to see")
    return np.arange(history.shape[1], 0.0, -1) * call


BROKEN = [
    broken(
        "nan",
        lambda call, rows, losses=None: np.full(rows.shape[1], np.nan),
        lambda call, history: np.full(history.shape[1], np.nan),
        lambda *args, **options: Training(None),
    ),
    broken("plain", lambda call, rows, losses=None: call * rows.sum(axis=0).astype(np.float32), noisy, Decays),
]


@pytest.mark.parametrize("case", DEFECTS, ids=lambda case: f"{case.id}-{case.method}")
def test_every_case_is_right_here(case):
    assert examine(OURS, case) == ("right", "")


@pytest.mark.parametrize("case", DEFECTS, ids=lambda case: f"{case.id}-{case.method}")
def test_every_case_can_fail(case):
    assert {"wrong", "error"} & {examine(library, case).outcome for library in BROKEN}


def test_cases_tell_what_they_ask():
    assert len({(case.id, case.method) for case in DEFECTS}) == len(DEFECTS)
    for case in DEFECTS:
        assert case.asked
        assert case.right
        assert case.seen


def outcome(library):
    return examine(library, next(case for case in DEFECTS if case.id == "MG4"))


def test_outcomes():
    assert outcome(Library("has none")).outcome == "not offered"
    assert outcome(Library("takes no such option", {"MGDA": lambda: None})).outcome == "error"
    assert outcome(Library("right", {"MGDA": lambda: lambda rows: rows[0]})).outcome == "right"
    verdict = outcome(Library("wrong", {"MGDA": lambda: lambda rows: 2 * rows[0]}))
    assert verdict.outcome == "wrong"
    assert "expected [1, 2]" in verdict.detail


def test_an_option_that_a_library_lacks_is_not_held_against_it():
    case = next(case for case in DEFECTS if case.id == "MG8")
    assert (
        examine(Library("without `normalize`", {"MGDA": lambda: lambda rows: rows[0]}), case).outcome == "not offered"
    )

    def raises_itself(**options):
        raise TypeError("its own mistake")

    assert examine(Library("raises", {"MGDA": raises_itself}), case) == ("error", "TypeError: its own mistake")


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_cases():
    cases = {case.name: case for case in testing.reference_cases("MGDA")}
    assert cases["m2_n2_conflict"].rows.tolist() == [[2.0, 1.0], [-1.0, 1.0]]
    assert cases["m2_n2_conflict"].direction.tolist() == [0.0, 1.0]
    for name in testing.reference_methods():
        for case in testing.reference_cases(name):
            assert case.direction.shape == case.rows.shape[1:]
            assert case.losses.shape == case.rows.shape[:1]
    with pytest.raises(ValueError, match="`method` must be one of"):
        testing.reference_cases("Adam")


def test_check_reference():
    direct = OURS.directions["MGDA"]()
    testing.check_reference(direct, "MGDA")
    with pytest.raises(AssertionError, match="m3_n3_conflict"):
        testing.check_reference(lambda rows, losses: rows.mean(axis=0), "MGDA")
    with pytest.raises(AssertionError, match="m2_n2_conflict': 'inf"):
        testing.check_reference(lambda rows, losses: rows[0] * np.nan, "MGDA", ["m2_n2_conflict"])
    off = {"direction": lambda rows, losses: direct(rows, losses) * (1 + 1e-6), "method": "MGDA"}
    testing.check_reference(**off, tolerance=1e-5)
    with pytest.raises(AssertionError):
        testing.check_reference(**off)


# -------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("package", PEERS)
def test_a_missing_peer_is_named(package, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for module in ("torchjd", "torchjd.aggregation", "conflictfree", "conflictfree.grad_operator"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(RuntimeError, match=rf"{package} cannot be imported .*: pip install {package}$"):
        PEERS[package]()


def fake(monkeypatch, **modules):
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


class Mean(torch.nn.Module):
    """The mean of the rows, as an aggregator."""

    def __init__(self, *args, **options):
        super().__init__()

    def forward(self, rows):
        return rows.mean(dim=0)


class Learnt(torch.nn.Module):
    """A sum with learnt weights, as a scalarizer."""

    def __init__(self, m):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(m))

    def forward(self, losses):
        return self.w @ losses


def torchjd(monkeypatch):
    methods = [
        "PCGrad",
        "GradVac",
        "MGDA",
        "CAGrad",
        "IMTLG",
        "NashMTL",
        "FairGrad",
        "AlignedMTL",
        "UPGrad",
        "DualProj",
        "ConFIG",
        "Krum",
        "GradDrop",
        "PCD",
        "ExcessMTL",
    ]
    fake(
        monkeypatch,
        torchjd__aggregation=dict.fromkeys(methods, Mean),
        torchjd__autojac={},
        torchjd__scalarization={"UW": Learnt},
    )
    return PEERS["torchjd"]()


def test_torchjd_adapter(monkeypatch):
    library = torchjd(monkeypatch)
    rows = np.array([[1.0, 2.0], [3.0, -2.0]])
    assert library.directions["MGDA"]()(rows).tolist() == [2.0, 0.0]
    # Two steps of SGD with learning rate 0.1 on w: 1 - 0.1 (1 + 2), and 1 - 0.1 (4 + 0.5).
    found = library.weights["Uncertainty"]()(np.array([[1.0, 4.0], [2.0, 0.5]]))
    assert found.tolist() == pytest.approx([0.7, 0.55])
    resumed = library.weights["Uncertainty"]()
    resumed.load_state_dict({"w": torch.tensor([0.7, 0.55])})
    assert resumed(np.array([[0.0, 0.0]])).tolist() == pytest.approx([0.7, 0.55])


def test_other_adapters(monkeypatch):
    class Operator:
        def calculate_gradient(self, rows):
            return rows.sum(dim=0)

    class PCGrad:
        def __init__(self, optimizer, reduction):
            self.params = optimizer.param_groups[0]["params"]

        def pc_backward(self, losses):
            torch.autograd.backward(losses, inputs=self.params)

    class Rule:
        def __init__(self, beta, accuracy_order):
            self.beta = beta

        def get_component_weights(self, *losses, verbose):
            return torch.stack([values[-1] for values in losses]) * self.beta

    class Weighter:
        def __init__(self, num_losses, learning_rate, restoring_force_alpha, grad_norm_parameters):
            self.loss_weights = torch.ones(num_losses)

        def backward(self, losses):
            return None if len(losses) == 1 else sum(losses)

    operators = dict.fromkeys(("ConFIGOperator", "PCGradOperator", "IMTLGOperator"), Operator)
    fake(
        monkeypatch,
        conflictfree__grad_operator=operators,
        pytorch_optimizer={"PCGrad": PCGrad},
        softadapt=dict.fromkeys(("SoftAdapt", "NormalizedSoftAdapt", "LossWeightedSoftAdapt"), Rule),
        gradnorm_pytorch={"GradNormLossWeighter": Weighter},
    )
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    rows = np.array([[1.0, 2.0], [3.0, -2.0]])
    for package in ("conflictfree", "pytorch_optimizer"):
        assert PEERS[package]().directions["PCGrad"]()(rows).tolist() == [4.0, 0.0]
    history = np.array([[1.0, 4.0], [2.0, 0.5]])
    assert PEERS["softadapt"]().weights["SoftAdapt"](beta=2.0)(history).tolist() == [4.0, 1.0]
    p = torch.nn.Parameter(torch.zeros(1))
    training = PEERS["gradnorm-pytorch"]().trainings["GradNorm"](torch.optim.SGD([p], lr=0.1), shared_params=p)
    assert training.backward([torch.tensor(1.0), torch.tensor(2.0)]) == 3.0
    assert training.backward([torch.tensor(1.0)]) is None
    assert training.weights.tolist() == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------- benchmarks


def test_conformance_tables(monkeypatch):
    monkeypatch.setattr(testing, "DEFECTS", [case for case in DEFECTS if case.id in ("MG1", "MG4", "SA2")])
    mean = Library("mean", {"MGDA": lambda: lambda rows, losses=None: rows.mean(axis=0)})
    cases = conformance.verdicts([OURS, mean])
    text = conformance.table(cases, ["gradsurgery", "mean"]).splitlines()
    assert text[2].endswith("| right | **wrong** |")
    assert text[3].endswith("| right | right |")
    assert text[4].endswith("| right | – |")
    assert len(text) == 5  # and no totals: each library is asked another part of the cases
    assert "* **MG1** MGDA: " in conformance.misses(cases, ["gradsurgery", "mean"])
    monkeypatch.setattr(conformance, "ASKED", {"MGDA": ("MGDA", {}), "UPGrad": ("UPGrad", {})})
    text = conformance.exactness_table(conformance.exactness([OURS, mean]), ["gradsurgery", "mean"])
    assert "| MGDA | 12 (12) of 12 | 2 (3) of 12 |" in text
    assert "| UPGrad | 12 (12) of 12 | – |" in text


def everything(net):
    """PCGrad on all parameters as one vector, heads included."""

    def run(given):
        params = list(net.parameters())
        rows = [
            torch.autograd.grad(one, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            for one in given.losses
        ]
        forms.write(params, forms.project([torch.cat([g.flatten() for g in row]) for row in rows]))

    return run


def refusing(net):
    raise ValueError("no such thing\nand more")


def plain(net):
    return lambda given: torch.autograd.backward(list(given.losses))


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_every_form_is_right_here(form):
    assert forms.ask(forms.Contender("gradsurgery", "", forms.ours), form)["outcome"] == "right"


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_every_form_can_be_wrong(form):
    for build in (everything, plain):
        found = forms.ask(forms.Contender("other", "", build), form)
        assert found["outcome"] == "off"
        assert found["errors"]["trunk"] > 1e-2
    found = forms.ask(forms.Contender("loop", "", forms.loop, "parameters"), form)
    assert forms.cell(found).startswith(
        "**off**" if form.name == "expert of one sample" else "right, parameters declared"
    )


def test_the_section_on_code_as_people_write_it(monkeypatch):
    monkeypatch.setattr(forms, "STEPS", 2)
    monkeypatch.setattr(forms, "FORMS", [form for form in forms.FORMS if form.name in ("one by one", "compiled model")])
    monkeypatch.setattr(forms, "TRAINED", ("PCGrad", "MGDA"))
    asked = [
        forms.Contender("ours", "as it is", forms.ours),
        forms.Contender("all", "as a vector", everything),
        forms.Contender("none", "never", refusing),
        forms.Contender("features", "with z", forms.loop, "features"),
    ]
    monkeypatch.setattr(forms, "contenders", lambda: asked)
    found = forms.ask_all()
    text = forms.section(found)
    one, compiled = (line for line in text.splitlines() if line.startswith(("| one by one", "| compiled model")))
    assert "| right | **off**: trunk " in one
    assert one.endswith("| **refuses** | right, features declared |")
    assert compiled.endswith("| **refuses** | no features |")
    assert '* none, "one by one", "compiled model": ValueError: no such thing\n' in text
    trained = found["training"]["MGDA"]
    assert trained["heads too"]["errors"]["heads"] > 0.5
    assert trained["shared"]["losses"] != trained["heads too"]["losses"]


def test_the_page_says_what_was_measured():
    first = Path(conformance.__file__).parent.parent / "docs" / "conformance.md"
    data = json.loads(first.with_suffix(".json").read_text())
    written = data["written"]
    assert first.read_text(encoding="utf-8") == conformance.PAGE
    assert two_pages.beside(first).read_text(encoding="utf-8") == conformance.tables(data)
    assert two_pages.picture(first).exists()
    assert {form["answers"]["gradsurgery"]["outcome"] for form in written["forms"]} == {"right"}


def test_what_is_not_installed_takes_no_part(monkeypatch, capsys):
    for name in ("torchjd", "torchjd.autojac", "pytorch_optimizer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [one.name for one in forms.contenders()] == ["gradsurgery", "LibMTL-style loop"]
    assert capsys.readouterr().out.count("left out: ") == 2


def test_the_pages_on_solvers_are_written_from_their_figures():
    path = Path(conformance.__file__).parent.parent / "docs" / "solvers.md"
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    first, second = solvers.pages(data)
    assert path.read_text(encoding="utf-8") == first
    assert two_pages.beside(path).read_text(encoding="utf-8") == second
    assert two_pages.picture(path).exists()


def test_the_pages_on_performance_are_written_from_their_figures():
    first = Path(conformance.__file__).parent.parent / "docs" / "performance.md"
    runs = json.loads(first.with_suffix(".json").read_text(encoding="utf-8"))["runs"]
    text, tables = page.pages(runs, first)
    assert first.read_text(encoding="utf-8") == text
    assert two_pages.beside(first).read_text(encoding="utf-8") == tables
    assert all(page.curves_picture(run, first).exists() for run in runs if run.get("curves"))


def test_the_short_version_of_the_costs():
    def cell(candidate, tasks, ratio, memory):
        place = {"candidate": candidate, "workload": "MLP", "tasks": tasks}
        return place | {"to_floor": ratio, "memory": memory, "shortest": 1.0}

    steps = [cell("PCGrad", 2, 1.0, 3.0), cell("PCGrad", 4, 2.0, 5.0), cell("TorchJD, vmapped", 2, 9.0, 1.0)]
    steps += [cell("TorchJD, sequential", 2, 4.0, 7.0), cell("TorchJD, autogram", 2, 5.0, 8.0)]
    ours, theirs = page.short({"device": "cpu", "threads": 2, "steps": steps}).splitlines()
    assert ours.startswith(
        "* CPU, 2 threads: `PCGrad` takes 1.50 times the floor in the median of 2 cases (range 1.00 to 2.00)"
    )
    assert "Median memory: 4.0 times the size" in ours
    assert "takes 4.00 times the floor in the median of 1 cases" in theirs
    assert "Median memory: 7.0 times the size" in theirs


def test_the_short_version_names_what_is_slower():
    pair = {"method": "MGDA", "dtype": "float32", "ratio": 3.0, "met": True, "ours_error": 1e-16, "theirs_error": 1e-3}
    text = solvers.short([pair, pair | {"method": "Krum", "ratio": 0.5, "met": False, "ours_error": None}])
    assert "takes 1.8 times as long in the median of 2 settings; the range is 0.5 to 3." in text
    assert "this library is slower: Krum. Methods for which it misses its own speed target: Krum." in text
    assert "is 1e-16 in this library and 1e-03 in TorchJD" in text


def test_solver_figures(monkeypatch):
    torchjd(monkeypatch)
    jd = testing.import_peer("torchjd", "torchjd.aggregation")
    result = solvers.measure("MGDA", 4, 10, torch.float64, rounds=2, jd=jd)
    assert result["ours_error"] == 0.0
    assert result["theirs_error"] > 0.1
    assert result["ratio"] > 0
    assert "| MGDA | 4 | 10 | float64 |" in solvers.table([result])
    alone = solvers.measure("Krum", 8, 10, torch.float64, rounds=1, jd=None)
    assert "| Krum |" in solvers.wide_table([alone])
    samples = [solvers.measure_samples("Krum", m, 2, rounds=1) for m in (8, 4)]
    assert all(0 < sample["seconds"] < 10 for sample in samples)
    assert solvers.samples_table(samples).startswith("| method | 4 × 8 | 8 × 16 |\n| --- | --- | --- |\n| Krum | ")


def test_solvers_are_compared_on_rows_that_conflict():
    for m, n in ((4, 1000), (8, 10)):
        for rows in solvers.matrices(m, n, 3):
            assert rows.shape == (m, n)
            assert (rows @ rows.T).min() < 0
            assert OURS.directions["MGDA"]()(rows.numpy()).any(), "a common descent direction exists"
