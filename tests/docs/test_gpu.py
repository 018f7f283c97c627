"""The script that needs a GPU: here it runs from end to end on the CPU, with tiny models."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch._functorch import config as functorch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import models, page, sections
from benchmarks.gpu.sections import SECTIONS, Section

DOCS = Path(__file__).resolve().parents[2] / "docs"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    with functorch.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def test_the_page_is_what_the_figures_say():
    path = DOCS / "gpu.json"
    run = json.loads(path.read_text("utf-8")) if path.exists() else None
    assert (DOCS / "gpu.md").read_text("utf-8") == page.text(run)
    assert path.exists() or "**Not measured.**" in page.text(run)


@pytest.mark.slow
def test_all_of_it_works_on_the_cpu(tmp_path):
    path = tmp_path / "gpu.md"
    assert script.main(["--device", "cpu", "--quick", "--write", str(path)]) == 0
    run = json.loads(path.with_suffix(".json").read_text())
    assert list(run["sections"]) == list(SECTIONS)
    for found in run["sections"].values():
        assert found["rows"]
        assert not any({"failed", "left_out"} & row.keys() for row in found["rows"])
    measured = {row["model"] for row in run["sections"]["large"]["rows"] if "to_floor" in row}
    assert measured == set(models.LARGE)
    assert {row["candidate"] for row in run["sections"]["results"]["rows"]} >= {name for name, *_ in sections.ENGINES}
    assert run["seconds"] < 480
    assert "**Not measured.** No figure of this library comes from a GPU so far. What follows" in path.read_text()


def test_what_fails_or_is_not_reached_is_kept_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def rows(section):
        section.attempt({"model": "a"}, lambda: {"waits": 1, "kernels": 2})
        section.attempt({"model": "b"}, lambda: 1 // 0)
        section.deadline = time.monotonic()
        section.attempt({"model": "c"}, lambda: {"waits": 3})

    def whole(section):
        section.rows.append({"model": "d", "tasks": 4, "to_one_by_one": 0.5})
        raise RuntimeError("this ends the section")

    replaced = {"waits": ("Waits", rows, 0.5), "batched": ("Batched", whole, 0.5)}
    for name, entry in replaced.items():
        monkeypatch.setitem(SECTIONS, name, entry)
    path = tmp_path / "gpu.md"
    assert script.main(["--device", "cpu", "--sections", *replaced, "--write", str(path)]) == 1
    told = path.read_text()
    assert "| a | 1 | 2 |" in told
    assert "* **Failed:** b: ZeroDivisionError: integer division or modulo by zero" in told
    assert "* Left out: c, since no time was left." in told
    assert "**The section ended early:** RuntimeError: this ends the section" in told
    assert "| d | 4 | 0.50 |" in told
    assert capsys.readouterr().out.endswith("2 failures.\n")


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 1
    assert capsys.readouterr().err == 'There is no GPU here. ARGS="--device cpu --quick" shows that the script works.\n'


def test_a_wrong_result_fails(monkeypatch):
    right = sections.gradient

    def wrong(work, method, switches, micro=False):
        found = right(work, method, switches, micro)
        return found if work.x.dtype == torch.float64 else [1.001 * g for g in found]

    monkeypatch.setattr(sections, "gradient", wrong)
    monkeypatch.setattr(sections, "ENGINES", sections.ENGINES[:1])
    section = Section(CPU, True, time.monotonic() + 60)
    sections.results(section)
    assert [row["failed"] for row in section.rows] == ["it is off by 0.001, and may be by 0.0002"] * 2


def test_a_batched_pass_gives_the_same_rows(monkeypatch):
    work = models.workload(lambda: models.mlp(4, 2, 3), 2, CPU)
    row = sections.against(work, seconds=60.0, rounds=3)
    assert row["distance"] < 1e-6
    assert row["to_one_by_one"] > 0
    monkeypatch.setattr(sections, "distance", lambda found, wanted: 0.5)
    with pytest.raises(RuntimeError, match=r"batched pass are off by 0\.5"):
        sections.against(work, seconds=60.0, rounds=3)


def test_rounds_end_when_the_time_does(monkeypatch):
    work, calls = models.workload(lambda: models.mlp(4, 2, 3), 2, CPU), []
    monkeypatch.setattr(sections.steps, "wait", calls.append)
    sections.against(work, seconds=0.0)
    assert len(calls) == 3 * 3 * 2, "three rounds of three candidates"


@pytest.mark.parametrize("name", models.LARGE)
def test_the_models_have_the_sizes_that_they_are_named_for(name):
    with torch.device("meta"):
        trunk, width, _ = models.LARGE[name][1]()
    trained, frozen = (sum(p.numel() for p in trunk.parameters() if p.requires_grad == yes) for yes in (True, False))
    assert (trained, frozen, width) == {
        "ResNet-50": (23_508_032, 0, 2048),
        "ViT-B": (12 * (12 * 768**2 + 13 * 768) + (3 * 16**2 + 1) * 768 + 2 * 768, 0, 768),
        "encoder with LoRA": (24 * 16 * (4 + 2 + 5 + 5) * 1024, 24 * (12 * 1024**2 + 13 * 1024), 1024),
        "wide MLP": (8 * 4097 * 4096, 0, 4096),
        "recommender": (64_000_000 + (26 * 64 + 1) * 1024 + 1025 * 512, 0, 512),
    }[name]
