"""The comparison of all methods: how trainings are kept and compared, and the page that is written from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import page, results
from benchmarks.evidence.conclusions import conclusions
from benchmarks.evidence.contenders import LATER, SUM, TUNED, names
from benchmarks.evidence.problem import MOST
from benchmarks.evidence.reading import nearest, stands
from benchmarks.evidence.runner import Queue, Store, load, run
from benchmarks.evidence.statistics import bootstrap, delta_m, ranks, relative, resample, verdict
from benchmarks.evidence.training import PROBLEMS, Plan, Training, first_trainings, last_trainings, train

ROOT = Path(__file__).resolve().parents[2]
TINY = Plan(
    ("linnerud", "GradNorm's toy, 2 tasks", "Poisson", "quadratics"),
    (SUM, TUNED, "PCGrad", "MGDA", "Krum", "FixedWeighter", "RandomWeighter"),
    rates=2,
    vectors=2,
    seeds=(1, 2),
    share=0.02,
)


# ------------------------------------------------------------------------------------------------------ statistics


def test_delta_m_by_hand():
    # (0.5 − 0.4) / 0.5 = 0.2 and (0.2 − 0.3) / 0.2 = −0.5
    assert delta_m({"a": 0.4, "b": 0.3}, {"a": 0.5, "b": 0.2}) == pytest.approx(-0.15)
    assert delta_m({"a": 0.5}, {"a": 0.5}) == 0.0
    assert delta_m({"a": 0.0}, {"a": 0.5}) == 1.0


@pytest.mark.parametrize(("errors", "alone"), [({}, {}), ({"a": 1.0}, {"b": 1.0}), ({"a": 1.0}, {"a": 1.0, "b": 1.0})])
def test_delta_m_needs_the_same_tasks(errors, alone):
    with pytest.raises(ValueError, match="same tasks"):
        delta_m(errors, alone)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [3, 1, 2]),
        ([1.0, 1.0, 2.0], [1.5, 1.5, 3]),
        ([5.0, 5.0, 5.0], [2, 2, 2]),
        ([1.0, 2.0, 2.0, 2.0, 9.0], [1, 3, 3, 3, 5]),
        ([7.0], [1]),
        ([1.0, math.inf], [1, 2]),
    ],
)
def test_ranks_are_shared_by_equal_scores_and_keep_their_sum(scores, expected):
    assert ranks(scores) == expected
    assert sum(ranks(scores)) == len(scores) * (len(scores) + 1) / 2


def test_a_bootstrap_of_equal_values_has_no_width():
    assert bootstrap([[0.3, 0.3], [0.3]]) == pytest.approx((0.3, 0.3, 0.3))


def test_a_bootstrap_weighs_problems_equally_and_is_repeatable():
    groups = [[0.0, 0.0, 0.0, 0.0], [1.0]]
    estimate = bootstrap(groups)
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (0.0, 1.0)  # both problems the same, in a quarter of the draws each
    assert bootstrap(groups) == estimate
    assert bootstrap(groups, level=0.4) == (0.5, 0.5, 0.5)


def test_a_bootstrap_covers_the_mean_of_all_problems_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        centres = random.normal(size=14)
        groups = [(centre + 0.5 * random.normal(size=3)).tolist() for centre in centres]
        _, low, high = bootstrap(groups, draws=300, seed=trial)
        covered += low <= 0.0 <= high
    assert 0.85 <= covered / 100 <= 0.99


def test_resampling_draws_problems_and_then_seeds():
    drawn = resample([[0.0, 2.0], [10.0, 10.0]], 4000, 0)
    # Two draws of a problem; a problem's mean over two drawn seeds is 0, 1 or 2 for the first and 10 for the second.
    assert set(np.round(drawn, 6)) == {0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 5.5, 6.0, 10.0}
    assert np.mean(drawn == 10.0) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("groups", [[], [[1.0], []]])
def test_a_bootstrap_needs_values(groups):
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(groups)


def test_relative_scores_are_paired():
    assert relative([1.0, 2.0], [2.0, 1.0]) == pytest.approx([-math.log(2), math.log(2)])
    with pytest.raises(ValueError, match="zip"):
        relative([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-0.1, -0.2, -0.3], 1),
        ([0.1, 0.2, 0.3], -1),
        ([-0.1, -0.2, 0.01], 0),
        ([-0.001, -0.002, -0.003], 0),
        ([0.0, -0.2], 0),
    ],
)
def test_verdicts(differences, expected):
    assert verdict(differences) == expected


# ------------------------------------------------------------------------------------------------------ trainings


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """All trainings of the tiny plan."""
    kept = Store(tmp_path_factory.mktemp("evidence") / "deep" / "trainings.jsonl")
    run(TINY, kept, jobs=1)
    return kept


@pytest.fixture(scope="module")
def data(store) -> results.Data:
    """The summary, without a measurement of times."""
    costs = {name: {"milliseconds": 1.0, "ratio": {SUM: 1.0, "PCGrad": 2.5}} for name in results.PRICED}
    return json.loads(results.dumps(results.summary(TINY, store.records, costs)))


def test_a_plan_is_trained_whole(store):
    queue = Queue(TINY, store.records)
    # Krum has no place on problems of two losses, three of the four; single tasks: 3 of linnerud and 2 of the toy.
    contenders_there = 4 * len(TINY.contenders) - 3 + 5
    tuned = 4 * (TINY.vectors - 1) * TINY.rates
    assert queue.total() == contenders_there * (TINY.rates + len(TINY.seeds)) + tuned
    assert sum(queue.done().values()) == queue.total()
    assert next(queue.missing(), None) is None


def test_a_second_run_trains_nothing_and_a_cut_run_goes_on(store, tmp_path, monkeypatch):
    path = tmp_path / "trainings.jsonl"
    lines = store._path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:20])  # cut off in the middle of a line
    trained = []

    def counted(training, plan):
        trained.append(training.key)
        return train(training, plan)

    monkeypatch.setattr("benchmarks.evidence.runner.train", counted)
    again = Store(path)
    run(TINY, again, jobs=1)
    assert len(trained) == 3
    assert load(path) == again.records == store.records
    run(TINY, Store(path), jobs=1)
    assert len(trained) == 3


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    def interrupt(name: str) -> None:
        if len(kept.records) == 5:
            raise KeyboardInterrupt

    kept = Store(tmp_path / "trainings.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(TINY, kept, jobs=1, watch=interrupt)
    assert len(load(tmp_path / "trainings.jsonl")) == 5


@pytest.mark.slow
def test_processes_find_what_one_finds(store, tmp_path):
    kept = Store(tmp_path / "trainings.jsonl")
    run(TINY, kept, jobs=2)
    assert kept.records == store.records


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "trainings.jsonl"
    path.write_text('{"key": "a"}\n{"key"\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=":2 is not JSON"):
        load(path)


def test_further_seeds_come_after_every_problem_had_its_turn():
    records = {}
    queue = Queue(TINY, records)
    order = []
    while (training := next(queue.missing(), None)) is not None:
        records[training.key] = {"validation": {"x": 1.0}, "key": training.key}
        order.append(training)
    seeds = [training.seed for training in order]
    assert len(order) == queue.total()
    assert seeds.index(2) == len(seeds) - seeds.count(2)
    assert [t.problem for t in order if t.seed == 2] == sorted(
        (t.problem for t in order if t.seed == 2), key=TINY.problems.index
    )


def test_the_choice_is_made_on_validation_data():
    trainings = first_trainings(replace(TINY, vectors=1), "linnerud", TUNED)
    records = {t.key: {"validation": {"x": 1.0 - 0.1 * t.rate}, "test": {"x": t.rate}} for t in trainings}
    assert [t.rate for t in last_trainings(TINY, trainings, records)] == [1, 1]
    failed = {t.key: {"failed": "no"} if t.rate else {"validation": {"x": 5.0}} for t in trainings}
    assert {t.rate for t in last_trainings(TINY, trainings, failed)} == {0}


def test_what_a_method_does_not_stand_is_a_result(monkeypatch):
    def fail(self, number):
        raise ValueError("PCGrad: a loss\nis not finite.")

    monkeypatch.setattr("benchmarks.evidence.contenders.Stepper.step", fail)
    record = train(Training("linnerud", "PCGrad", 0, 0), TINY)
    assert record == {"key": "linnerud|PCGrad|0|0|0", "failed": "PCGrad: a loss is not finite."}


def test_a_training_is_repeatable(store):
    for key in ("linnerud|MGDA|0|0|0", "Poisson|RandomWeighter|1|0|0"):
        problem, contender, *numbers = key.split("|")
        assert train(Training(problem, contender, *map(int, numbers)), TINY) == store.records[key]


# ------------------------------------------------------------------------------------------------------ the summary


def test_ranks_are_stretched_and_failures_come_last():
    def result(*values: float | None) -> dict:
        errors = {str(seed): None if v is None else {"x": v} for seed, v in enumerate(values)}
        return {"errors": errors, "failed": {seed: "no" for seed, e in errors.items() if e is None}}

    found = results.stretched_ranks(
        {"p": {"a": result(0.1, 0.3), "b": result(0.2, 0.2), "c": result(None, 0.1), "alone: x": result(0.0, 0.0)}},
        ["p"],
        5,
    )
    assert found == {"a": {"p": [1.0, 5.0]}, "b": {"p": [3.0, 3.0]}, "c": {"p": [5.0, 1.0]}}


def test_the_plain_sum_and_fixed_weights_of_one_are_the_same(data):
    rows = {row["name"]: row for row in data["overall"]}
    assert rows["FixedWeighter"]["sum"]["ratio"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)
    assert rows["FixedWeighter"]["sum"]["even"] == 3


def test_the_summary_has_every_contender_somewhere(data):
    assert {row["name"] for row in data["overall"]} == set(TINY.contenders)
    assert data["plan"]["finished"] == data["plan"]["planned"]
    assert set(data["refused"]["Poisson"]) == {"Krum"}
    for problem in data["problems"]:
        here = set(data["results"][problem["name"]]) | set(data["refused"][problem["name"]])
        assert set(TINY.contenders) <= here
    deltas = [row for row in data["overall"] if "delta_m" in row]
    assert len(deltas) == len(TINY.contenders)


def test_what_is_near_on_a_toy_counts_as_there():
    assert results.floored({"gap": 1e-4}, PROBLEMS["quadratics"]) == {"gap": 0.01}
    assert results.floored({"gap": 0.3}, PROBLEMS["quadratics"]) == {"gap": 0.3}
    assert results.floored({"solution": 1e-4}, PROBLEMS["Poisson"]) == {"solution": 1e-4}
    assert results.floored(None, PROBLEMS["quadratics"]) is None


def test_failures_count_as_the_worst(store):
    records = dict(store.records)
    for key in list(records):
        if key.startswith("linnerud|MGDA") and "|0|0" not in key:
            records[key] = {"key": key, "failed": "it did not"}
    found = results.collect(TINY, records)["linnerud"]["MGDA"]
    assert found["failed"]
    assert max(results.scores(found).values()) == MOST


# ------------------------------------------------------------------------------------------------------ the page


def test_the_page_follows_from_its_data(data, tmp_path):
    path = tmp_path / "docs" / "evidence.md"
    page.write(path, data)
    written = path.read_text()
    again = json.loads(path.with_suffix(".json").read_text())
    assert page.text(again) == written
    more = (path.parent / "evidence-tables.md").read_text()
    assert page.tables(again) == more
    assert results.dumps(results.again(again)) == results.dumps(again)
    written += more
    pictures = {picture.stem for picture in (path.parent / "_static" / "evidence").glob("*.png")}
    assert pictures == {"overall", "map", *(page.slug(name) for name in TINY.problems)}
    for name in TINY.contenders:
        assert name in written
    assert all(f"_static/evidence/{name}.png" in written for name in pictures)
    assert "nan" not in written.lower().split()


def test_a_page_of_half_a_run_says_so(store):
    half = dict(list(store.records.items())[: len(store.records) // 2])
    data = json.loads(results.dumps(results.summary(TINY, half, {})))
    assert data["plan"]["finished"] < data["plan"]["planned"]
    told = f"Of the {data['plan']['planned']} planned training runs, {data['plan']['finished']} were made"
    assert told in page.text(data)


def test_a_page_of_nothing_concludes_nothing():
    data = json.loads(results.dumps(results.summary(TINY, {}, {})))
    assert conclusions(data) == []
    assert page.short(data) == []
    page.text(data)
    page.tables(data)


def test_conclusions_follow_the_figures(data):
    changed = json.loads(json.dumps(data))
    for row in changed["overall"]:
        for key in ("sum", "tuned"):
            if key in row:
                row["problems"] = 12
                ratio = [0.5, 0.4, 0.6] if row["name"] == "PCGrad" else [1.5, 1.2, 1.9]
                row[key]["ratio"] = row[key]["strict"] = ratio
                row[key]["without"] = {kind: {"a": ratio, "b": ratio} for kind in ("problem", "family")}
    first, second, third, *_ = conclusions(changed)
    assert "1 of 5 methods has a lower error, 4 a higher one, and for the other 0 no difference" in first
    assert "Lower: `PCGrad`. Higher, worst first: " in first
    assert "not if a certain" not in first
    assert "tuned fixed weights" in second
    assert third.startswith(
        "**Tuned fixed weights compared with the plain sum: higher error, whichever problem or family is left out.**"
    )
    assert page.short(changed)[0].endswith(": `PCGrad`.")


@pytest.mark.parametrize("kind", ["problem", "family"])
@pytest.mark.parametrize("name", ["PCGrad", "MGDA"])
def test_what_rests_on_one_problem_is_not_concluded(data, kind, name):
    changed = json.loads(json.dumps(data))
    for row in changed["overall"]:
        for key in ("sum", "tuned"):
            if key in row:
                row["problems"] = 12
                ratio = [0.5, 0.4, 0.6] if row["name"] == "PCGrad" else [1.5, 1.2, 1.9]
                row[key]["ratio"] = row[key]["strict"] = ratio
                row[key]["without"] = {one: {"Poisson": ratio, "linnerud": ratio} for one in ("problem", "family")}
                if row["name"] == name:
                    row[key]["without"][kind]["Poisson"] = [0.98, 0.95, 1.004] if name == "PCGrad" else [1.1, 0.99, 1.2]
    first = conclusions(changed)[0]
    counted = "0 of 5 methods have a lower error, 4" if name == "PCGrad" else "1 of 5 methods has a lower error, 3"
    assert f"{counted} a higher one, and for the other 1 no difference" in first
    assert f"`{name}`" not in first.split("Lower: ")[1].split("over all problems")[0]
    if name == "PCGrad":
        assert "`PCGrad`, whose ratio of 0.500 (0.400–0.600) becomes 0.980 (0.950–1.004) without Poisson" in first
        assert page.short(changed)[0].endswith(": none.")
    else:
        assert "For 1 others it is higher over all problems, but not if a certain" in first
    (row,) = (row for row in changed["overall"] if row["name"] == name)
    assert nearest(row, "sum", kind)[0] == "Poisson"
    assert not stands(row, "sum")
    assert page.left(row, "sum")[("problem", "family").index(kind)].endswith(", Poisson")


def test_leaving_out_a_problem_or_a_family_by_hand():
    e = math.e
    differences = {"Poisson": [math.log(2)] * 3, "Helmholtz": [math.log(8)] * 3, "wine": [math.log(e)] * 3}
    found = results.left_out(differences)
    assert found["problem"]["Poisson"][0] == pytest.approx(math.sqrt(8 * e), abs=1e-4)
    assert found["problem"]["wine"][0] == pytest.approx(4.0, abs=1e-4)
    assert found["family"] == {
        "physics-informed networks": [pytest.approx(e, abs=1e-4)] * 3,
        "tables": found["problem"]["wine"],
    }
    assert results.left_out({"Poisson": [0.1], "Burgers": [0.2]})["family"] == {}
    assert results.left_out({"Poisson": [0.1]}) == {"problem": {}, "family": {}}


def test_the_kept_page_is_written_from_its_data():
    kept = ROOT / "docs" / "evidence.md"
    data = json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
    assert page.text(data) == kept.read_text(encoding="utf-8")
    assert page.tables(data) == page.beside(kept).read_text(encoding="utf-8")
    assert data["plan"]["contenders"] == [name for name in names() if name not in LATER]
    assert [problem["name"] for problem in data["problems"]] == list(PROBLEMS)


def test_other_pages_quote_what_was_found():
    """README and the page on choosing: none beats constant weights from 60 trials on 12 problems, one beats the sum."""
    data = json.loads((ROOT / "docs" / "evidence.json").read_text(encoding="utf-8"))
    methods = [row for row in data["overall"] if row["kind"] != "baseline"]
    assert len(methods) == 55
    assert not [row["name"] for row in methods if row["tuned"]["ratio"][2] < 1]
    assert [row["name"] for row in methods if row["sum"]["ratio"][2] < 1 and stands(row, "sum")] == ["CAGrad"]
    assert data["plan"]["vectors"] * data["plan"]["rates"] == 60
    assert sum(problem["family"] != "toys" for problem in data["problems"]) == 12
