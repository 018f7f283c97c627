"""The images of the demo, its trainings, its table and its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import gradsurgery
from gradsurgery.__main__ import main
from gradsurgery.cli import demo, demo_pictures
from gradsurgery.cli.demo import Method, Row, Run, Score, Settings
from gradsurgery.problems import digits
from gradsurgery.problems.digits import PIXELS, SIDE, DigitFinder, Scenes, Source
from gradsurgery.watch import pictures

SMALL = Settings(steps=4, seeds=(0,), batch=8, scenes=64, probe_every=2)
SUM, PCGRAD = demo.METHODS[0], next(method for method in demo.METHODS if method.name == "PCGrad")


# --------------------------------------------------------------------------------------------------------------- images


def test_splits_share_no_digit():
    # The splits, one behind the other, are the whole collection in its order, so each entry is in one of them only.
    parts = [digits.source(split) for split in ("train", "validation", "test")]
    assert [len(part.labels) for part in parts] == [1200, 200, 397]
    together = torch.cat([part.ink for part in parts])
    assert np.array_equal(together.numpy(), (load_digits().images / 16).astype(np.float32))


def test_unknown_split():
    with pytest.raises(ValueError, match=r"source: `split` must be one of .* got 'all'"):
        digits.source("all")


def test_scenes_depend_on_the_seed_alone():
    ink = digits.source("test")
    before = torch.get_rng_state()
    first, again, other = (digits.paste(ink, 50, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for field, same, different in zip(first, again, other, strict=True):
        assert torch.equal(field, same)
        assert not torch.equal(field, different)


def test_scenes_are_what_they_say():
    ink = digits.source("validation")
    scenes = digits.paste(ink, 450, 0)
    assert scenes.images.shape == (450, 1, SIDE, SIDE)
    assert scenes.images.dtype == torch.uint8
    left, top, right, bottom = scenes.boxes.unbind(1)
    assert (left >= 0).all()
    assert (left < right).all()
    assert (right <= PIXELS + 1e-3).all()
    assert (top >= 0).all()
    assert (top < bottom).all()
    assert (bottom <= PIXELS + 1e-3).all()
    # 450 scenes of 200 digits: each twice, and 50 of them once more.
    counts = torch.bincount(scenes.labels, minlength=10) - 2 * torch.bincount(ink.labels, minlength=10)
    assert counts.sum() == 50
    assert (counts >= 0).all()


def test_the_box_is_where_the_ink_is():
    picture = torch.zeros(8, 8)
    picture[1:7, 2:5] = 1.0  # left 2, top 1, right 5, bottom 7
    block = Source(picture.expand(1, 8, 8), torch.tensor([0]), digits._extent(picture.expand(1, 8, 8)))
    assert block.extent.tolist() == [[2, 1, 5, 7]]
    scenes = digits.paste(block, 200, 0)
    for image, box in zip(scenes.images[:, 0], scenes.boxes, strict=True):
        inked = (image > (int(image.median()) + int(image.max())) // 2).nonzero()  # rows of (y, x)
        seen = torch.cat([inked.min(0).values.flip(0), inked.max(0).values.flip(0) + 1]) * (PIXELS / SIDE)
        assert (seen - box).abs().max() <= 1.25 * PIXELS / SIDE  # a cell, and the blur of resizing


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 1 / 3),
        ([0, 0, 10, 10], [2, 2, 7, 6], 0.2),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0.0),
        ([0, 0, 10, 10], [30, 30, 40, 40], 0.0),
        ([0, 0, 10, 10], [8, 0, 2, 10], 0.0),  # right of its own right side: empty
        ([5, 5, 5, 9], [5, 5, 5, 9], 0.0),
    ],
)
def test_iou(first, second, expected):
    first, second = torch.tensor([first], dtype=torch.float32), torch.tensor([second], dtype=torch.float32)
    assert digits.iou(first, second).item() == pytest.approx(expected, abs=1e-6)
    assert digits.iou(second, first).item() == pytest.approx(expected, abs=1e-6)


def test_the_losses_start_five_orders_of_magnitude_apart():
    scenes = digits.paste(digits.source("train"), 200, 0)
    losses = digits.losses(DigitFinder(0)(scenes.images), scenes)
    assert list(losses) == ["class", "box"]
    assert 2.0 < losses["class"] < 2.8
    assert 5e4 < losses["box"] < 2e5


def test_the_network_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (list(DigitFinder(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_last_shared_is_the_trunks_last_weight():
    model = DigitFinder()
    named = [name for name, parameter in model.named_parameters() if parameter.dim() == 4 and name.startswith("trunk")]
    assert model.get_parameter(named[-1]) is model.last_shared


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def few_held_out(monkeypatch):
    """Fewer images to score on."""
    scenes = digits.paste(digits.source("test"), 64, 0)
    monkeypatch.setattr(demo, "held_out_scenes", lambda: (scenes, scenes))


def test_batches_go_through_all_images():
    scenes = Scenes(torch.arange(10), torch.arange(10), torch.arange(10))
    settings = Settings(steps=5, batch=4)
    seen = torch.cat([batch.images for batch in demo.batches(scenes, settings, seed=0)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert torch.equal(seen, torch.cat([batch.labels for batch in demo.batches(scenes, settings, seed=0)]))
    assert not torch.equal(seen, torch.cat([batch.labels for batch in demo.batches(scenes, settings, seed=1)]))


def test_cosine_is_the_librarys_and_leaves_no_trace():
    scenes = digits.paste(digits.source("train"), 16, 0)
    model = DigitFinder(0)
    losses = digits.losses(model(scenes.images), scenes)
    measured = demo.cosine(losses, model)
    assert all(parameter.grad is None for parameter in model.parameters())
    report = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)).backward(losses)
    assert measured == pytest.approx(report.cosines[0, 1].item(), abs=1e-6)


def test_methods_start_from_the_same_weights_and_see_the_same_images(few_held_out):
    runs = [demo.train(method, 0, SMALL) for method in demo.METHODS]
    assert all(torch.equal(run.losses[0], runs[0].losses[0]) for run in runs)
    assert all(run.losses.isfinite().all() for run in runs)
    ends = {run.method: tuple(run.losses[-1].tolist()) for run in runs}
    assert ends["plain sum"] != ends["relative sum"] != ends["MGDA"] != ends["GradNorm"]


def test_a_training_can_be_repeated(few_held_out):
    first, again, other = demo.train(PCGRAD, 0, SMALL), demo.train(PCGRAD, 0, SMALL), demo.train(PCGRAD, 1, SMALL)
    assert torch.equal(first.losses, again.losses)
    assert first.test == again.test
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.losses, other.losses)


def test_measuring_the_cosine_changes_nothing(few_held_out):
    often, seldom = (demo.train(PCGRAD, 0, Settings(4, (0,), 8, scenes=64, probe_every=every)) for every in (1, 4))
    assert (len(often.cosines), len(seldom.cosines)) == (4, 1)
    assert torch.equal(often.losses, seldom.losses)
    assert often.test == seldom.test


def test_workers_do_what_one_process_does():
    settings = Settings(steps=4, seeds=(0, 1), batch=8, scenes=64, probe_every=2, jobs=2)
    watched: list[list[int]] = []
    together = demo.train_all((SUM, PCGRAD), settings, lambda steps: watched.append(list(steps)))
    here = demo.train_all((SUM, PCGRAD), Settings(4, (0, 1), 8, scenes=64, probe_every=2, jobs=1))
    assert [(run.method, run.seed) for run in here] == [
        ("plain sum", 0),
        ("PCGrad", 0),
        ("plain sum", 1),
        ("PCGrad", 1),
    ]
    assert watched[-1] == [8, 8]
    for a, b in zip(together, here, strict=True):
        assert (a.method, a.seed, a.test) == (b.method, b.seed, b.test)
        assert torch.equal(a.losses, b.losses)


@pytest.mark.slow
def test_the_plain_sum_forgets_the_class():
    settings = Settings(steps=400, seeds=(0,))
    balanced = next(method for method in demo.METHODS if method.name == "MGDA, loss")
    forgetful, good = (demo.train(method, 0, settings).test for method in (SUM, balanced))
    assert forgetful.accuracy < 0.35
    assert forgetful.iou > 0.7
    assert good.accuracy > 0.6
    assert good.iou > 0.7


# --------------------------------------------------------------------------------------------------- table and pictures


def made_up(method: str, seed: int = 0, both: float = 0.5, validation: float = 0.5, cosines=(0.5, -0.5)) -> Run:
    return Run(
        method=method,
        seed=seed,
        losses=torch.tensor([[2.3, 1e5], [1.0, 1e3]]),
        cosines=torch.tensor(cosines),
        seconds=0.01 * (seed + 1),
        validation=Score(0.9, 0.8, validation, 0.3, 900.0),
        test=Score(0.9, 0.8, both, 0.3, 900.4),
        digits=torch.zeros(64, dtype=torch.int64),
        boxes=torch.tensor([[10.0, 10.0, 200.0, 300.0]]).expand(64, 4),
    )


def test_a_family_is_chosen_on_validation_images():
    methods = (Method("a", family="f"), Method("b", family="f"), Method("c"))
    runs = [made_up("a", both=0.9, validation=0.2), made_up("b", both=0.1, validation=0.3), made_up("c")]
    assert [row.name for row in demo.rows(methods, runs)] == ["b", "c"]


def test_markdown_of_one_seed():
    (row,) = demo.rows((Method("c"),), [made_up("c")])
    lines = demo.markdown([row]).splitlines()
    assert lines[0].split(" | ")[1:] == ["digit right, %", "box IoU, %", "both right, %", "class loss", "box loss",
                                         "ms per step", "conflict, % |"]  # fmt: skip
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| c | 90.0 | 80.0 | 50.0 | 0.30 | 900 | 10.0 | 50 |"


def test_several_seeds_show_mean_and_deviation():
    (row,) = demo.rows(
        (Method("c"),), [made_up("c", 0, 0.4), made_up("c", 1, 0.5), made_up("c", 2, 0.6, cosines=(1, 1))]
    )
    assert row.cells() == ("c", "90.0 ±0.0", "80.0 ±0.0", "50.0 ±10.0", "0.30", "900", "20.0", "33")


def test_summary_is_plain_and_complete():
    methods = (Method("a", family="f"), Method("b", family="f"))
    runs = [made_up("a", validation=0.2), made_up("b", validation=0.3)]
    found = json.loads(json.dumps(demo.summary(methods, runs, demo.rows(methods, runs), SMALL)))
    assert [(method["name"], method["in the table"]) for method in found["methods"]] == [("a", False), ("b", True)]
    assert found["methods"][0]["runs"][0]["test"]["box_loss"] == 900.4
    assert found["settings"]["lr"] == SMALL.lr


def test_the_winner_comes_first():
    methods = (Method("a"), Method("b"), Method("c"))
    runs = [made_up(name, seed, both) for name, scores in (("a", (0.1, 0.8)), ("b", (0.5, 0.5)), ("c", (0.2, 0.2)))
            for seed, both in enumerate(scores)]  # fmt: skip
    lines = demo.markdown(demo.rows(methods, runs)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| b", "| a", "| c"]


def test_pages_show_the_table_that_the_demo_wrote():
    root = Path(demo.__file__).resolve().parents[2]
    table = (root / "docs/_static/demo/table.md").read_text(encoding="utf-8")
    lines = table.splitlines()[2:]
    assert lines == sorted(lines, key=lambda line: -float(line.split(" | ")[3].split()[0]))
    for page in ("README.md", "docs/demo.md"):
        assert f"\n{table}\n" in (root / page).read_text(encoding="utf-8"), page


@pytest.mark.parametrize("places", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [0.9, 0.1, 0.11, 0.12], [0.0] * 30])
def test_labels_are_moved_apart(places):
    moved = pictures.spread_out(places, gap=0.1, low=0.0, high=1.0)
    order = np.argsort(moved)
    assert (np.diff(moved[order]) >= 0.1 - 1e-9).all()
    assert (np.diff(np.asarray(places)[order]) >= 0).all()  # in the same order
    if len(places) <= 10:
        assert moved.min() >= -1e-9
        assert moved.max() <= 1 + 1e-9


def test_labels_with_room_stay():
    assert pictures.spread_out([0.8, 0.2], gap=0.1, low=0.0, high=1.0).tolist() == pytest.approx([0.8, 0.2])


def test_running_mean():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert pictures.smooth(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert pictures.smooth(values[:, None], 1).tolist() == values[:, None].tolist()


def test_pictures_of_many_methods(tmp_path):
    table = [Row(f"method {i}", (made_up(f"method {i}"),)) for i in range(10)]  # more than there are colours
    scenes = digits.paste(digits.source("test"), 8, 0)
    demo_pictures.draw(table, scenes, SMALL, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cosines.png", "losses.png", "predictions.png"]


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def small_demo(monkeypatch, few_held_out):
    """The demo with three methods and few images."""
    monkeypatch.setattr(
        demo, "METHODS", tuple(m for m in demo.METHODS if m.name in ("plain sum", "PCGrad", "MGDA, l2"))
    )
    scenes = digits.paste(digits.source("train"), 64, 0)
    monkeypatch.setattr(demo, "training_scenes", lambda seed, count: scenes)


@pytest.mark.parametrize("progress", [[], ["--no-progress"]])
def test_the_command(small_demo, tmp_path, capsys, progress):
    threads = torch.get_num_threads()
    folder = tmp_path / "new" / "folder"
    assert main(["demo", "--steps", "2", "--seeds", "2", "--jobs", "1", "--output", str(folder), *progress]) == 0
    shown, watched = capsys.readouterr()
    assert ("all methods" in watched) == (not progress)
    assert "all methods" not in shown
    names = ["plain sum", "PCGrad"]
    for name in names:
        assert name in shown
    assert "MGDA" not in shown  # it is an extra
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(files) == ["cosines.png", "losses.png", "numbers.json", "predictions.png", "table.md"]
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))
    rows = [line.split(" | ") for line in files["table.md"].decode().splitlines()[2:]]
    assert sorted(row[0] for row in rows) == sorted(f"| {n}" for n in names)
    assert [row[0][2:] for row in rows] == sorted(names, key=lambda name: shown.index(f"\n{name} "))
    assert [run["seed"] for run in json.loads(files["numbers.json"])["methods"][0]["runs"]] == [0, 1]
    assert torch.get_num_threads() == threads


def test_the_command_as_json(small_demo, tmp_path, capsys):
    assert main(["demo", "--json", "--quick", "--steps", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert [method["name"] for method in found["methods"]] == ["plain sum", "PCGrad"]


def test_all_adds_the_extras(small_demo, tmp_path, capsys):
    assert main(["demo", "--all", "--quick", "--steps", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    assert "MGDA, l2" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "rich"])
def test_a_missing_extra_is_named(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert demo.EXTRA[module] in said
    assert f"pip install {demo.EXTRA[module]}\n" in said
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["demo", "--seeds", "0"], ["demo", "--jobs", "many"], ["nothing"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: gradsurgery" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"gradsurgery {gradsurgery.__version__}"


def test_an_interrupt_is_no_crash(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_all", interrupted)
    assert main(["demo", "--output", str(tmp_path), "--no-progress"]) == 130
    assert "Interrupted" in capsys.readouterr().err
