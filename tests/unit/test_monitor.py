"""What a monitor records, what it leaves alone, and when it speaks up."""

from __future__ import annotations

import copy
import csv
import importlib
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console

import gradsurgery
from gradsurgery import Monitor

A, B = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])  # of length 1, cosine −0.6


def linear(method=gradsurgery.PCGrad, lr=0.0, **switches):
    """A method on one parameter, which linear losses give any gradients one likes."""
    theta = torch.nn.Parameter(torch.zeros(2))
    return theta, method(torch.optim.SGD([theta], lr=lr), **switches)


def step(theta, optimizer, **gradients):
    """One step on losses with the given gradients; None is an absent task."""
    optimizer.zero_grad()
    losses = {name: None if g is None else (g * theta).sum() + 2.0 for name, g in gradients.items()}
    report = optimizer.backward(losses)
    optimizer.step()
    return report


def walk(theta, optimizer, steps, **gradients):
    for _ in range(steps):
        step(theta, optimizer, **gradients)


def test_records_every_number_of_every_step():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    first = step(theta, optimizer, a=A, b=2 * B)
    step(theta, optimizer, a=A, b=-B)
    assert monitor.steps == [1, 2]
    assert monitor.names == ("a", "b")
    history = monitor.history
    assert set(history) == {
        *("total", "loss/a", "loss/b", "weight/a", "weight/b"),
        *("norm/a", "norm/b", "cosine/a/b", "conflict_rate", "projections"),
    }
    assert history["total"].tolist() == [4.0, 4.0]
    assert history["norm/b"] == pytest.approx([2.0, 1.0])
    assert history["cosine/a/b"] == pytest.approx([-0.6, 0.6])
    assert history["conflict_rate"].tolist() == [1.0, 0.0]
    assert history["projections"].tolist() == [2.0, 0.0]
    assert history["weight/a"] == pytest.approx([first.weights["a"], 1.0])
    assert monitor.column("cosine", "b", "a").tolist() == history["cosine/a/b"].tolist()
    assert monitor.cosines == pytest.approx(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert monitor.conflict_rates == pytest.approx(np.array([[0.0, 0.5], [0.5, 0.0]]))
    share = abs(first.weights["a"]) / (abs(first.weights["a"]) + 2 * abs(first.weights["b"]))
    assert monitor.shares["a"][0] == pytest.approx(share)
    assert "2 steps of a, b, conflict rate 0.50" in repr(monitor)


def test_training_is_the_same_with_and_without():
    ends = []
    for watched in (False, True):
        theta, optimizer = linear(lr=0.1)
        monitor = Monitor(optimizer) if watched else None
        walk(theta, optimizer, 5, a=A, b=B)
        ends.append(theta.detach().clone())
    assert monitor is not None
    assert torch.equal(*ends)


def test_counts_committed_steps_and_goes_on_after_a_resume():
    theta, optimizer = linear()
    walk(theta, optimizer, 3, a=A, b=B)
    saved = optimizer.state_dict()
    theta, optimizer = linear()
    optimizer.load_state_dict(saved)
    monitor = Monitor(optimizer, every=2)
    walk(theta, optimizer, 4, a=A, b=B)
    assert monitor.steps == [5, 7]


def test_backward_without_step_is_not_recorded():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    optimizer.backward({"a": (A * theta).sum(), "b": (B * theta).sum()})
    optimizer.zero_grad()
    assert len(monitor) == 0
    optimizer.base.step()
    assert len(monitor) == 0
    assert monitor.skipped == 1


def test_report_of_before_is_not_recorded():
    theta, optimizer = linear()
    step(theta, optimizer, a=A, b=B)
    monitor = Monitor(optimizer)
    optimizer.step()
    assert (len(monitor), monitor.skipped) == (0, 0)


def test_batches_passed_over_are_counted():
    theta, optimizer = linear(nonfinite="skip")
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=B)
    step(theta, optimizer, a=A, b=B * torch.inf)
    step(theta, optimizer, a=A, b=B)
    assert monitor.steps == [1, 2]
    assert monitor.skipped == 1


def test_a_step_that_the_scaler_skips_is_not_seen():
    theta, optimizer = linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor = Monitor(optimizer)
    for gradient in (A, A * torch.inf, A):
        optimizer.zero_grad()
        optimizer.backward({"a": (gradient * theta).sum(), "b": (B * theta).sum()}, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert monitor.steps == [1, 2]
    assert monitor.column("norm", "a") == pytest.approx([1.0, 1.0])


def test_lbfgs_records_a_step_once():
    theta = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.PCGrad(torch.optim.LBFGS([theta], max_iter=4))
    monitor = Monitor(optimizer)

    def closure():
        optimizer.zero_grad()
        losses = {"a": (theta - A).square().sum(), "b": 3 * (theta - B).square().sum()}
        return optimizer.backward(losses).objective

    for _ in range(2):
        optimizer.step(closure)
    assert monitor.steps == [1, 2]


def test_micro_batches_are_one_step():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    optimizer.backward({"a": (A * theta).sum() + 1, "b": (B * theta).sum()}, accumulate=True)
    optimizer.backward({"a": (A * theta).sum() + 1, "b": (B * theta).sum()})
    optimizer.step()
    assert monitor.steps == [1]
    assert monitor.column("loss", "a").tolist() == [2.0]


def test_absent_and_late_tasks():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=None)
    step(theta, optimizer, a=A, b=B)
    step(theta, optimizer, a=None, b=B)
    assert np.isnan(monitor.column("loss", "b")).tolist() == [True, False, False]
    assert np.isnan(monitor.column("weight", "a")).tolist() == [False, False, True]
    assert monitor.cosines[0, 1] == pytest.approx(-0.6)
    assert monitor.conflict_rates[0, 1] == 1.0


@pytest.mark.parametrize("method", [gradsurgery.GradDrop, gradsurgery.FixedWeighter, gradsurgery.GradNormWeighter])
def test_methods_that_report_less(method, tmp_path):
    theta = torch.nn.Parameter(torch.zeros(2))
    more = {"shared_params": [theta]} if method is gradsurgery.GradNormWeighter else {}
    optimizer = method(torch.optim.SGD([theta], lr=0.1), **more)
    monitor = Monitor(optimizer)
    walk(theta, optimizer, 3, a=A, b=B)
    assert any(key.startswith("weight") for key in monitor.history) == optimizer.has_weights
    assert any(key.startswith("norm") for key in monitor.history) == (method is gradsurgery.GradDrop)
    Console(file=io.StringIO()).print(monitor.table())
    monitor.plot(tmp_path / "run.png")


def test_a_weighter_below_a_surgery():
    theta = torch.nn.Parameter(torch.zeros(2))
    optimizer = gradsurgery.PCGrad(gradsurgery.UncertaintyWeighter(torch.optim.SGD([theta], lr=0.1)))
    monitor = Monitor(optimizer)
    walk(theta, optimizer, 3, a=A, b=B)
    assert monitor.steps == [1, 2, 3]
    assert monitor.column("norm", "a") == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_pickling_and_copying_leave_the_monitor_behind(copied):
    theta, optimizer = linear()
    monitor = Monitor(optimizer, callback=lambda step, report: None)
    step(theta, optimizer, a=A, b=B)
    other = copied(optimizer)
    step(other.param_groups[0]["params"][0], other, a=A, b=B)
    assert monitor.steps == [1]
    step(theta, optimizer, a=A, b=B)
    assert monitor.steps == [1, 2]


def test_close_and_context_manager():
    theta, optimizer = linear()
    before = dict(optimizer.base._optimizer_step_post_hooks)
    with Monitor(optimizer) as monitor:
        assert len(optimizer.base._optimizer_step_post_hooks) == len(before) + 1
        step(theta, optimizer, a=A, b=B)
    step(theta, optimizer, a=A, b=B)
    monitor.close()
    assert monitor.steps == [1]
    assert dict(optimizer.base._optimizer_step_post_hooks) == before


def test_keeps_no_tensor():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=B)
    assert all(isinstance(column, np.ndarray) for column in monitor.history.values())
    assert not any(torch.is_tensor(x) for column in monitor._columns.values() for x in column)


def test_makes_no_more_backward_passes():
    theta, optimizer = linear()
    passes = []
    theta.register_hook(lambda g: passes.append(1))
    step(theta, optimizer, a=A, b=B)
    before = len(passes)
    Monitor(optimizer)
    step(theta, optimizer, a=A, b=B)
    assert len(passes) == 2 * before


def test_callback_and_writer():
    theta, optimizer = linear()
    seen, written = [], []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

    Monitor(optimizer, every=2, callback=lambda step, report: seen.append((step, report)), writer=Writer())
    reports = [step(theta, optimizer, a=A, b=B) for _ in range(3)]
    assert seen == [(1, reports[0]), (3, reports[2])]
    assert ("gradsurgery/loss/a", 2.0, 3) in written
    assert {tag for tag, _, step in written if step == 1} == {tag for tag, _, step in written if step == 3}


def test_csv(tmp_path):
    theta, optimizer = linear(warmup=1)
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=None)
    step(theta, optimizer, a=A, b=B)
    monitor.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["step"], first["loss/a"], first["loss/b"], first["flags"]) == ("1", "2.0", "", "warmup")
    assert float(second["cosine/a/b"]) == monitor.column("cosine", "a", "b")[1]


def test_pairs_whose_names_have_slashes_keep_columns_of_their_own():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    for names in (("a", "b/c"), ("a/b", "c"), ("a%2Fb", "c")):
        step(theta, optimizer, **dict(zip(names, (A, B), strict=True)))
    cosines = [key for key in monitor.history if key.startswith("cosine")]
    assert cosines == ["cosine/a/b%2Fc", "cosine/a%2Fb/c", "cosine/a%252Fb/c"]
    for row, pair in enumerate((("a", "b/c"), ("a/b", "c"), ("c", "a%2Fb"))):
        assert np.flatnonzero(~np.isnan(monitor.column("cosine", *pair))).tolist() == [row]


def test_a_pair_in_either_order_is_one_column():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=B)
    step(theta, optimizer, b=B, a=A)
    assert monitor.column("cosine", "a", "b") == pytest.approx([-0.6, -0.6])


def test_a_name_that_cannot_be_written_leaves_the_file_alone(tmp_path):
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    step(theta, optimizer, **{"a\ud800": A, "b": B})
    file = tmp_path / "run.csv"
    file.write_text("kept")
    with pytest.raises(ValueError, match=r"lone surrogate.*Rename the losses"):
        monitor.to_csv(file)
    assert file.read_text() == "kept"


def test_table():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    walk(theta, optimizer, 2, near=A, far=3 * B)
    text = printed(monitor, 80)
    assert "PCGrad: 2 recorded steps" in text
    assert "far -0.60, 100%" in text


def printed(monitor, width):
    out = io.StringIO()
    Console(file=out, width=width).print(monitor.table())
    return out.getvalue()


LONG = ("semantic_segmentation_cross_entropy", "surface_normals_cosine_similarity")


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize(
    "names", [("a", "b"), LONG, tuple(f"[task] {i}" for i in range(20))], ids=["two", "long", "20"]
)
def test_table_is_never_cut_off(width, names):
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    angles = np.linspace(0, 2.9, len(names))
    rows = {
        name: torch.tensor([np.cos(a), np.sin(a)], dtype=torch.float32) for name, a in zip(names, angles, strict=True)
    }
    walk(theta, optimizer, 2, **rows)
    text = printed(monitor, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    together = "".join(text.split())  # names and pairs of numbers may be on several lines
    assert text.count("→") == len(names) + 1
    if width == 140:
        assert all("".join(name.split()) in together for name in names)
        assert "-0.97,100%" in together


def test_table_of_one_task():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    walk(theta, optimizer, 2, only=A)
    assert "only 2 → 2 1 (1 – 1)" in " ".join(printed(monitor, 80).split())


@pytest.mark.parametrize("dark", [False, True])
def test_picture(tmp_path, dark):
    theta, optimizer = linear(lr=0.1)
    monitor = Monitor(optimizer)
    walk(theta, optimizer, 40, a=A, b=B, c=0.1 * A)
    figure = monitor.plot(tmp_path / "run.png", dark=dark)
    assert (tmp_path / "run.png").stat().st_size > 10_000
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:4] == ["Losses", "Weights", "Mean cosine between gradients", "Gradient norms over their mean"]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("names", [("only",), LONG, tuple(f"task {i}" for i in range(20))], ids=["one", "long", "20"])
def test_picture_has_room_for_labels(tmp_path, steps, names):
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    walk(theta, optimizer, steps, **{name: torch.tensor([1.0, 0.1 * i]) for i, name in enumerate(names)})
    figure = monitor.plot(tmp_path / "run.png")
    width, height = figure.get_size_inches()
    losses = figure.axes[0]
    assert losses.get_position().width * width > 1.5
    labels = [text for text in losses.texts if text.get_text() != ""]
    assert len(labels) == len(names)
    places = sorted(text.get_position()[1] for text in labels)
    assert 0 <= places[0] <= places[-1] <= 1
    apart = np.diff(places) * losses.get_position().height * height
    assert (apart > 0.1).all()  # inches: the height of a letter


def test_shortened_names_stay_apart():
    short = importlib.import_module("gradsurgery.watch.monitor_pictures").short
    assert short(["depth", *LONG]) == ["depth", "semantic_…_entropy", "surface_n…milarity"]
    assert short(["a" * 12 + "1" + "b" * 12, "a" * 12 + "2" + "b" * 12]) == [
        "a" * 12 + "1" + "b" * 12,
        "a" * 12 + "2" + "b" * 12,
    ]


def test_picture_of_numbers_that_are_not_finite(tmp_path):
    _, optimizer = linear()
    monitor = Monitor(optimizer)
    nan = np.full(2, np.nan)
    for number in range(1, 4):
        monitor._record(number, gradsurgery.Report(["a", "b"], nan, nan, np.full((2, 2), np.nan)))
    monitor.plot(tmp_path / "run.png")
    assert "a" in printed(monitor, 80)


def test_summing_up_twenty_tasks_takes_no_time():
    _, optimizer = linear()
    monitor = Monitor(optimizer)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 30))
    names = [str(i) for i in range(20)]
    for number in range(1, 301):
        monitor._record(number, gradsurgery.Report(names, rng.random(20), rng.random(20), rows @ rows.T))
    read = []
    column = monitor.column
    monitor.column = lambda *key: read.append(key) or column(*key)
    monitor.table()
    assert len(read) < 1000  # each column a few times, not once for each pair of each pair


def test_picture_of_nothing():
    _, optimizer = linear()
    with pytest.raises(RuntimeError, match="nothing was recorded yet"):
        Monitor(optimizer).plot()


def test_pictures_need_matplotlib(monkeypatch):
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    step(theta, optimizer, a=A, b=B)
    monkeypatch.setitem(__import__("sys").modules, "gradsurgery.watch.monitor_pictures", None)
    monkeypatch.setitem(__import__("sys").modules, "rich.table", None)
    with pytest.raises(RuntimeError, match=r"rich is not installed.*: pip install rich$"):
        monitor.table()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` must be an integer >= 1, got 0"),
        ({"callback": 3}, TypeError, "`callback` must be callable, got int"),
        ({"writer": object()}, TypeError, "`writer` must have add_scalar"),
    ],
)
def test_bad_arguments(arguments, error, message):
    _, optimizer = linear()
    with pytest.raises(error, match=message):
        Monitor(optimizer, **arguments)


def test_a_bare_optimizer_is_refused():
    with pytest.raises(TypeError, match="wrap the optimizer in FixedWeighter"):
        Monitor(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))


# ------------------------------------------------------------------------------------------------------------- warnings


def caught(walked):
    """The warnings of a walk, as texts."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        walked()
    return [str(warning.message) for warning in found]


INACTIVE_STEPS, LASTING = 40, 10  # instead of 500 and 100


@pytest.fixture
def hasty(monkeypatch):
    """A monitor that loses patience sooner, which saves thousands of steps."""
    module = importlib.import_module("gradsurgery.watch.monitor")
    assert (module.INACTIVE_STEPS, module.LASTING) == (500, 100)
    monkeypatch.setattr(module, "INACTIVE_STEPS", INACTIVE_STEPS)
    monkeypatch.setattr(module, "LASTING", LASTING)


def test_inactive_method_is_told_once():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, 499, a=A, b=A)) == []
    (message,) = caught(lambda: walk(theta, optimizer, 600, a=A, b=A))
    assert "equal for 500 steps" in message
    assert "Train the plain sum" in message
    assert monitor.advice == [message]


@pytest.mark.parametrize("switches", [{"reduction": "mean"}, {"every": 2}])
@pytest.mark.usefixtures("hasty")
def test_plain_sum_under_other_switches(switches):
    theta, optimizer = linear(**switches)
    Monitor(optimizer)
    assert len(caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=A))) == 1


@pytest.mark.usefixtures("hasty")
def test_equal_weights_outside_of_sum_scale():
    theta, optimizer = linear(gradsurgery.RealTimeWeighter)
    Monitor(optimizer)
    assert len(caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=B))) == 1


@pytest.mark.usefixtures("hasty")
def test_every_counts_the_steps_between():
    theta, optimizer = linear()
    Monitor(optimizer, every=10)
    (message,) = caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=A))
    assert "equal for" in message


@pytest.mark.usefixtures("hasty")
def test_one_conflict_starts_the_count_anew():
    theta, optimizer = linear()
    Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS - 1, a=A, b=A)) == []
    step(theta, optimizer, a=A, b=B)
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS - 1, a=A, b=A)) == []


@pytest.mark.parametrize(
    ("method", "switches"),
    [
        (gradsurgery.FixedWeighter, {}),
        (gradsurgery.GradDrop, {}),
        (gradsurgery.AGEM, {}),
        (gradsurgery.DWAWeighter, {}),  # these two move at the end of an epoch, which may have many steps
        (gradsurgery.SoftAdaptWeighter, {"interval": "epoch"}),
    ],
)
@pytest.mark.usefixtures("hasty")
def test_methods_that_may_rest(method, switches):
    theta, optimizer = linear(method, **switches)
    Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=A)) == []


@pytest.mark.usefixtures("hasty")
def test_warmup_and_single_tasks_do_not_count():
    theta, optimizer = linear(warmup=INACTIVE_STEPS)
    Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS, a=A, b=A)) == []
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=None)) == []


@pytest.mark.usefixtures("hasty")
def test_collapsed_weight_is_told_once():
    theta, optimizer = linear(gradsurgery.FixedWeighter, weights={"a": 1.0, "b": 1e-4})
    monitor = Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, LASTING - 1, a=A, b=B)) == []
    (message,) = caught(lambda: walk(theta, optimizer, 3 * LASTING, a=A, b=B))
    assert "weight of 'b' has been below 0.001 of the mean" in message
    assert "min_weight" in message
    assert monitor.advice == [message]


@pytest.mark.usefixtures("hasty")
def test_runaway_weight_is_told_once():
    theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = gradsurgery.RealTimeWeighter(torch.optim.SGD([theta], lr=0.0))
    Monitor(optimizer)

    def run(size):
        for _ in range(2 * LASTING):
            optimizer.zero_grad()
            optimizer.backward({"a": theta[0] * 1.0, "b": theta[1] * size})
            optimizer.step()

    assert caught(lambda: run(0.9)) == []
    (message,) = caught(lambda: run(1e-4))  # the other weight is 10 000 times less, and its loss as much more
    assert "weight of 'b' has run away, to 1e+04" in message
    assert "max_weight" in message


@pytest.mark.usefixtures("hasty")
def test_one_task_that_drives_the_update_is_told_once():
    theta, optimizer = linear()
    monitor = Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, LASTING - 1, a=30 * A, b=-B)) == []
    (message,) = caught(lambda: walk(theta, optimizer, 3 * LASTING, a=30 * A, b=-B))
    assert "'a' drives the update" in message
    assert "ConFIG" in message
    assert monitor.shares["a"][-1] > 0.95


@pytest.mark.usefixtures("hasty")
def test_a_method_that_prefers_the_shortest_gradient_gets_another_remedy():
    theta, optimizer = linear(gradsurgery.MGDA)
    Monitor(optimizer)
    (message,) = caught(lambda: walk(theta, optimizer, 3 * LASTING, short=A, long=torch.tensor([0.0, 30.0])))
    assert "'short' drives the update" in message
    assert "not the longest" in message
    assert 'normalize="loss"' in message


@pytest.mark.parametrize("method", [gradsurgery.NashMTL, gradsurgery.ConFIG, gradsurgery.RealTimeWeighter])
@pytest.mark.usefixtures("hasty")
def test_a_small_weight_that_evens_out_a_large_loss_is_quiet(method):
    """A loss 100 000 times as large gets a weight 100 000 times as small: that is what these methods are for."""
    theta = torch.nn.Parameter(torch.ones(2))
    optimizer = method(torch.optim.SGD([theta], lr=0.0))
    monitor = Monitor(optimizer)

    def run():
        for _ in range(INACTIVE_STEPS - 1):
            optimizer.zero_grad()
            optimizer.backward({"a": (A * theta).sum(), "b": 1e5 * theta[1]})
            optimizer.step()

    assert caught(run) == []
    assert monitor.column("weight", "b")[-1] < 1e-4 * monitor.column("weight", "a")[-1]


@pytest.mark.usefixtures("hasty")
def test_steps_that_are_not_recorded_count_for_inactivity():
    """The method acts in every second step, of which none is recorded."""
    theta, optimizer = linear()
    Monitor(optimizer, every=2)

    def run():
        for _ in range(INACTIVE_STEPS):
            step(theta, optimizer, a=A, b=A)
            step(theta, optimizer, a=A, b=B)

    assert caught(run) == []


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.NashMTL, gradsurgery.UncertaintyWeighter])
@pytest.mark.usefixtures("hasty")
def test_an_ordinary_run_is_quiet(method):
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
    x = torch.randn(64, 4)
    targets = torch.randn(3, 64, 1)
    optimizer = method(torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01))
    Monitor(optimizer)

    def run():
        for _ in range(2 * INACTIVE_STEPS):
            optimizer.zero_grad()
            z = trunk(x).tanh()
            optimizer.backward([(h(z) - y).square().mean() for h, y in zip(heads, targets, strict=True)])
            optimizer.step()

    assert caught(run) == []


@pytest.mark.usefixtures("hasty")
def test_balanced_conflict_is_quiet():
    theta, optimizer = linear()
    Monitor(optimizer)
    assert caught(lambda: walk(theta, optimizer, INACTIVE_STEPS + 1, a=A, b=B)) == []


@pytest.mark.parametrize("engine", ["rows", "ghosts"])
def test_projections_are_counted(engine):
    """Two gradients that oppose each other: each is projected off the other. The third opposes neither."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1), engine=engine)
    rows = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [0.0, 1.0]])
    with gradsurgery.Monitor(optimizer) as monitor:
        for chosen in ([0, 1, 2], [0, 2]):
            optimizer.zero_grad()
            report = optimizer.backward({str(i): (rows[i] * p).sum() for i in chosen})
            optimizer.step()
    assert monitor.column("projections").tolist() == [2.0, 0.0]
    assert report.as_dict()["projections"] == 0
    assert gradsurgery.MGDA(optimizer.base).backward([(row * p).sum() for row in rows]).projections is None


# --------------------------------------------------------------------------------- slow trouble, and none


def scripted(method, history, base=torch.optim.SGD, **options):
    """A run in which each loss has the values of `history`; the advice."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = method(base([p], lr=0.0), **options)
    monitor = Monitor(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for losses in history:
            optimizer.zero_grad()
            optimizer.backward({name: p.sum() * value for name, value in losses.items()})
            optimizer.step()
    return monitor.advice


def falling(steps, **sizes):
    return [{name: size * 0.999**t for name, size in sizes.items()} for t in range(steps)]


def test_a_weight_that_falls_a_hundredfold_early_under_adam_is_pointed_out():
    history = falling(500, small=1.0, large=1e5)

    def gradnorm(base, **options):
        return gradsurgery.GradNormWeighter(base, base.param_groups[0]["params"], **options)

    (said,) = scripted(gradnorm, history, torch.optim.AdamW)
    assert "the weight of 'large' has fallen from 1 to 0.00" in said
    assert "AdamW goes on dividing" in said
    assert 'start="losses"' in said
    assert not scripted(gradnorm, history, torch.optim.SGD)
    assert not scripted(gradnorm, history, torch.optim.AdamW, start="losses")
    assert not scripted(gradsurgery.RealTimeWeighter, falling(6000, a=1.0, b=2.0)[::6], torch.optim.AdamW)
    # Weights that come and go, and one that falls because its loss is learnt.
    assert not scripted(gradsurgery.RandomWeighter, falling(1000, a=1.0, b=2.0), torch.optim.AdamW)
    learnt = [{"a": 0.97**t + 1e-3, "b": 2 * 0.999**t} for t in range(300)]
    found = scripted(gradsurgery.GroupDROWeighter, learnt, torch.optim.AdamW, eta=0.05)
    assert not [line for line in found if "fallen from" in line]


def test_norms_tenfold_apart_are_pointed_out():
    (said,) = scripted(gradsurgery.PCGrad, falling(200, quiet=1.0, loud=12.0))
    assert "gradient of 'loud' is 12 times as long as that of 'quiet'" in said
    assert not scripted(gradsurgery.PCGrad, falling(200, quiet=1.0, loud=9.0))
    assert not scripted(gradsurgery.PCGrad, falling(99, quiet=1.0, loud=12.0))
    assert not scripted(gradsurgery.PCGrad, falling(200, quiet=1.0, loud=12.0), normalize="l2")
    learnt = [{"quiet": max(0.9**t, 0.05), "loud": 0.9} for t in range(300)]
    assert not scripted(gradsurgery.PCGrad, learnt)
    theta, optimizer = linear(gradsurgery.MGDA)
    Monitor(optimizer)
    (said,) = caught(lambda: walk(theta, optimizer, 200, short=A, long=torch.tensor([0.0, 12.0])))
    assert "gradient of 'short' is 12 times as long as that of 'long'" in said
    assert "as MGDA's do for the shortest" in said


def test_losses_that_do_not_fall_are_pointed_out():
    history = [{"stuck": 1.0 + 0.1 * (t % 2), "rises": 2.0 + t / 1000} for t in range(2000)]

    def said(history, method=gradsurgery.FixedWeighter):  # one pass a step
        return [line for line in scripted(method, history) if "fallen" in line]

    (line,) = said(history, gradsurgery.PCGrad)
    assert "no loss has fallen in 2000 recorded steps (means over the first and last 100: 'stuck' 1.05 → 1.05, " in line
    assert "'rises' 2.05 → 3.95)" in line
    assert not said(history[:1999])
    # A regulariser may rise, and the game against a discriminator stay where it is.
    assert not said([{**losses, "falls": 2.0 * 0.999**t} for t, losses in enumerate(history)])
    assert not said(falling(2100, a=1.0, b=2.0))
    fell_at_once = [{"a": 3.0 if t < 50 else 1.0, "b": 1.0 if t < 50 else 0.5} for t in range(2100)]
    assert not said(fell_at_once)


def test_losses_that_stand_still_late_in_a_run_are_left_alone():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.0))
    saved = optimizer.state_dict()
    saved["gradsurgery"]["memory"]["step"] = 5000
    optimizer.load_state_dict(saved)
    monitor = Monitor(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2001):
            optimizer.zero_grad()
            optimizer.backward({"a": p.sum(), "b": 2 * p.sum()})
            optimizer.step()
    assert not [line for line in monitor.advice if "fallen" in line]


STILL = [
    (gradsurgery.ReLoBRaLoWeighter, {}, {"alpha": 0.9, "rho": 0.9}, "`alpha` and `rho`"),
    (gradsurgery.UncertaintyWeighter, {"lr": 1e-5}, {"lr": 1e-2}, "pass lr=1e-2"),
    (gradsurgery.IMTLLWeighter, {"lr": 1e-5}, {"lr": 1e-2}, "pass lr=1e-2"),
    (gradsurgery.SoftAdaptWeighter, {}, {"beta": 100.0}, "`beta`"),
]


@pytest.mark.parametrize(("method", "slow", "quick", "cure"), STILL)
def test_weights_that_hardly_move_are_pointed_out(method, slow, quick, cure):
    history = [{"a": 2 * 0.99**t + 0.1, "b": 2 * 0.999**t + 0.1} for t in range(1001)]
    (said,) = scripted(method, history, **slow)
    assert "no weight has moved by more than 5% in 1000 recorded steps" in said
    assert cure in said
    assert not scripted(method, history, **quick)
    assert not scripted(method, history[:999], **slow)
    alike = [{"a": losses["a"], "b": 1.1 * losses["a"]} for losses in history]
    assert not [line for line in scripted(method, alike, **slow) if "no weight" in line]
    if method is gradsurgery.ReLoBRaLoWeighter:  # losses of different size that fall alike
        found = scripted(method, [{"a": x["a"], "b": 9 * x["a"]} for x in history], **slow)
        assert not [line for line in found if "no weight" in line]


def test_settled_weights_of_a_resumed_run_are_left_alone():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = gradsurgery.UncertaintyWeighter(torch.optim.Adam([p], lr=0.0), lr=1e-5)
    saved = optimizer.state_dict()
    saved["gradsurgery"]["memory"]["step"] = 5000
    optimizer.load_state_dict(saved)
    monitor = Monitor(optimizer)
    for _ in range(1001):  # as all warnings are errors here
        optimizer.zero_grad()
        optimizer.backward({"a": p.sum(), "b": 9 * p.sum()})
        optimizer.step()
    assert monitor.advice == []


def test_the_cure_of_a_collapse_is_that_of_the_method():
    said = scripted(gradsurgery.UWSOWeighter, [{"a": 0.02, "b": 0.5}] * 100)
    assert any("the weight of 'b' has been below" in line and "Raise `temperature`" in line for line in said)
