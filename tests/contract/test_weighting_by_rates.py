"""Weights from how fast losses fall: SoftAdapt, and methods that count epochs, compare ratios or draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.relobralo import ReLoBRaLoWeighter
from gradsurgery.weighting.rlw import RandomWeighter
from gradsurgery.weighting.softadapt import (
    LossWeightedSoftAdaptWeighter,
    NormalizedSoftAdaptWeighter,
    SoftAdaptWeighter,
)
from tests.support.weighters import SEQUENCES, A, memory, setting, step
from tests.support.weighting_catalogue import NAMES, any_optimizer, run, tied

SOFTADAPT = {
    "SoftAdapt": SoftAdaptWeighter,
    "NormalizedSoftAdapt": NormalizedSoftAdaptWeighter,
    "LossWeightedSoftAdapt": LossWeightedSoftAdaptWeighter,
}


# ------------------------------------------------------------------------------------------------------------ SoftAdapt


DATA = {
    "readme3": [SEQUENCES["SoftAdapt"]["inputs"][c] for c in ("c1", "c2", "c3")],
    "readme4": [SEQUENCES["SoftAdapt"]["inputs"][c] for c in ("c1", "c2", "c3", "c4")],
    "A_last5": A[:5].T.tolist(),
}
RUNS = SEQUENCES["SoftAdapt"]["runs"]


def test_softadapt_reference():
    for case in RUNS:
        # The package takes means in float32, which shows in the loss-weighted variant.
        tolerance = max(1e-9, 1.5 * case["max_abs_diff_closed_form"])
        weights = SOFTADAPT[case["variant"]].get_component_weights(
            *DATA[case["data"]], beta=case["beta"], accuracy_order=case["accuracy_order"]
        )
        np.testing.assert_allclose(weights.numpy(), case["weights"], rtol=0, atol=tolerance, err_msg=str(case))
        if abs(case["beta"]) < 1:
            np.testing.assert_allclose(weights.numpy(), case["weights"], rtol=2e-7, err_msg=str(case))


README = {
    "SoftAdapt": ["9.9343e-01", "6.5666e-03", "3.8908e-22"],
    "NormalizedSoftAdapt": ["3.2207e-01", "3.2508e-01", "3.5285e-01"],
    "LossWeightedSoftAdapt": ["8.7978e-01", "1.2022e-01", "7.1234e-20"],
}


@pytest.mark.parametrize("variant", README)
def test_softadapt_readme_as_applied_weights(variant):
    columns = DATA["readme3"]
    history = [*zip(*columns, strict=True), (1.0, 1.0, 1.0)]
    found = run(SOFTADAPT[variant], history, beta=0.1, window=5, reduction="mean")
    assert (found[:5] == 1 / 3).all(), "ones until the first update"
    assert [f"{w:.4e}" for w in found[5]] == README[variant]
    by_list = SOFTADAPT[variant].get_component_weights(*map(np.array, columns), beta=0.1)
    np.testing.assert_allclose(found[5], by_list.numpy(), rtol=1e-15)


def test_softadapt_coefficients():
    for order, expected in SEQUENCES["SoftAdapt"]["finite_difference_coefficients"].items():
        n = int(order)
        for k, c in enumerate(expected):
            bump, still = np.zeros(n + 1), np.zeros(n + 1)
            bump[k] = 1.0
            w = SoftAdaptWeighter.get_component_weights(bump, still, beta=1.0, accuracy_order=n)
            assert math.log(w[0] / w[1]) == pytest.approx(c, rel=1e-9, abs=1e-12)


def test_softadapt_updates_every_interval_from_a_sliding_window():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=3, interval=2)
    found = [step(optimizer, p, values) for values in A[:7]]
    changes = [i for i in range(1, 7) if (found[i] != found[i - 1]).any()]
    assert changes == [2, 4, 6]
    expected = 3 * SoftAdaptWeighter.get_component_weights(*A[3:6].T, beta=1.0).numpy()
    np.testing.assert_allclose(found[6], expected, rtol=1e-14)


def test_softadapt_by_epochs_uses_their_means():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, interval="epoch")
    for epoch in (A[0:2], A[2:5], A[5:7]):
        for values in epoch:
            step(optimizer, p, values)
        optimizer.epoch_end()
    means = np.array([A[0:2].mean(0), A[2:5].mean(0), A[5:7].mean(0)])
    expected = 3 * SoftAdaptWeighter.get_component_weights(*means.T, beta=1.0).numpy()
    np.testing.assert_allclose(step(optimizer, p, A[7]), expected, rtol=1e-12)


def test_softadapt_does_not_judge_an_absent_task_by_its_old_slope():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=2)
    for values in ([1.0, 1.0, 1.0], [1.0, 3.0, 1.0]):
        step(optimizer, p, values)
    kept = memory(optimizer)["weights"]
    assert kept["b"] > 1.5 > kept["a"]
    for value in (2.0, 2.5, 3.0, 3.0):
        step(optimizer, p, [value, None, 1.0])
    after = memory(optimizer)["weights"]
    assert after["b"] == kept["b"]
    assert sum(after.values()) == pytest.approx(3.0)
    step(optimizer, p, [1.0, 1.0, 1.0])
    assert len(memory(optimizer)["window"]["b"]) == 2


def test_softadapt_epoch_end_updates_at_once_in_step_mode():
    p, optimizer = setting(SoftAdaptWeighter, beta=1.0, window=5)
    for values in A[:3]:
        step(optimizer, p, values)
    optimizer.epoch_end()
    expected = 3 * SoftAdaptWeighter.get_component_weights(*A[:3].T, beta=1.0).numpy()
    np.testing.assert_allclose(step(optimizer, p, A[3]), expected, rtol=1e-14)


def test_normalized_softadapt_absolute_keeps_the_order():
    # Seen: both losses fall, and the fast one gets 0.69 because the sum of the slopes is negative.
    fast, slow = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6]
    weights = NormalizedSoftAdaptWeighter.get_component_weights
    assert weights(fast, slow, beta=1).tolist() == pytest.approx([0.69385, 0.30615], abs=1e-5), "as the package does"
    plain = SoftAdaptWeighter.get_component_weights(fast, slow, beta=1)
    absolute = weights(fast, slow, beta=1, normalize="absolute")
    assert plain[0] < plain[1]
    assert absolute[0] < absolute[1]


@pytest.mark.parametrize("normalize", ["sum", "absolute"])
def test_normalized_softadapt_of_constant_losses_is_equal(normalize):
    # Seen: nan.
    weights = NormalizedSoftAdaptWeighter.get_component_weights([2.0] * 5, [7.0] * 5, normalize=normalize)
    assert weights.tolist() == pytest.approx([0.5, 0.5])
    if normalize == "sum":
        weights = NormalizedSoftAdaptWeighter.get_component_weights([1.0, 2.0], [2.0, 1.0])
        assert weights.tolist() == pytest.approx([0.5, 0.5]), "slopes that sum to 0"


def test_softadapt_needs_one_point_more_than_the_order():
    # Seen: IndexError.
    with pytest.raises(ValueError, match=r"loss '0' has 5 values; a finite difference of order 5 needs 6"):
        SoftAdaptWeighter.get_component_weights([1.0] * 5, [2.0] * 5, accuracy_order=5)
    for bad in ({"accuracy_order": 5}, {"accuracy_order": 0}, {"window": 1}, {"slope": "last"}, {"interval": "day"}):
        with pytest.raises(ValueError, match=r"SoftAdaptWeighter: `(accuracy_order|window|slope|interval)`"):
            SoftAdaptWeighter(any_optimizer(), **bad)
    with pytest.raises(ValueError, match="not finite"):
        SoftAdaptWeighter.get_component_weights([1.0, math.nan], [2.0, 1.0])
    with pytest.raises(ValueError, match="got none"):
        SoftAdaptWeighter.get_component_weights()


def test_softadapt_newest_slope_sees_a_jump():
    # Seen: a loss that has just jumped up by 8 gets weight 0.04.
    jumped, still = [5.0, 4.0, 3.0, 2.0, 10.0], [1.0] * 5
    weights = SoftAdaptWeighter.get_component_weights
    assert weights(jumped, still, beta=0.1)[0] < 0.5
    assert weights(jumped, still, beta=0.1, slope="newest")[0] > 0.5
    line = [1.0, 3.0, 5.0]
    torch.testing.assert_close(weights(line, still), weights(line, still, slope="newest"))


def test_softadapt_is_silent(capsys):
    # Seen: 302 characters in spite of verbose=False.
    SoftAdaptWeighter.get_component_weights([1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1], accuracy_order=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0])
def test_loss_weighted_softadapt_of_tiny_losses(scale):
    weights = LossWeightedSoftAdaptWeighter.get_component_weights([scale] * 3, [3 * scale] * 3)
    assert weights.tolist() == pytest.approx([0.25, 0.75], rel=1e-7)
    with pytest.raises(ValueError, match=r"mean of every loss must be >= 0.*'1': -1.0"):
        LossWeightedSoftAdaptWeighter.get_component_weights([1.0, 1.0], [-1.0, -1.0])


# ---------------------------------------------------------------------------------------- epochs, ratios and randomness


def test_dwa_reference():
    p, optimizer = setting(DWAWeighter)
    found = []
    for mean in A:
        for offset in (-0.1, 0.0, 0.1):  # three batches an epoch
            weights = step(optimizer, p, mean + offset * np.array([1, -1, 2]))
        found.append(weights)
        optimizer.epoch_end()
    np.testing.assert_allclose(found, SEQUENCES["DWA"]["torchjd"], rtol=1e-11)


def test_dwa_of_constant_losses_is_one():
    # Seen: (1.99, 0.007) at iteration 26, from a buffer filled with ones.
    p, optimizer = setting(DWAWeighter, m=2)
    for i in range(60):
        np.testing.assert_allclose(step(optimizer, p, (2000.0, 1.0), ("a", "b")), [1, 1], rtol=1e-15)
        if i % 7 == 6:
            optimizer.epoch_end()


def test_dwa_without_a_loss_in_an_epoch_keeps_the_ratio():
    p, optimizer = setting(DWAWeighter)
    for values in ([4.0, 4.0, 4.0], [2.0, 1.0, 4.0]):
        step(optimizer, p, values)
        optimizer.epoch_end()
    step(optimizer, p, [2.0, None, 4.0])
    optimizer.epoch_end()
    kept = memory(optimizer)
    assert (kept["before"], kept["previous"]) == ({"a": 2.0, "b": 4.0, "c": 4.0}, {"a": 2.0, "b": 1.0, "c": 4.0})
    optimizer.epoch_end()  # an epoch without any step changes nothing
    assert memory(optimizer) == kept


@pytest.mark.parametrize("committed", [True, False])
def test_epoch_end_between_backward_and_step(committed):
    """A step that is still to come counts as part of the epoch if it is made, and not if it is discarded."""
    p, optimizer = setting(DWAWeighter)
    step(optimizer, p, [1.0, 1.0, 1.0])
    optimizer.zero_grad()
    optimizer.backward(dict(zip(NAMES, tied(p, [3.0, 3.0, 3.0]), strict=True)))
    optimizer.epoch_end()
    if committed:
        optimizer.step()
    else:
        optimizer.zero_grad()
    kept = memory(optimizer)
    assert kept["previous"] == dict.fromkeys(NAMES, 2.0 if committed else 1.0)
    assert kept["epoch.sum"] == {}
    assert kept["step"] == 1 + committed


def test_epoch_end_that_fails_changes_nothing():
    p, optimizer = setting(DWAWeighter)
    step(optimizer, p, [1.0, 0.0, 1.0])
    before = memory(optimizer)
    with pytest.raises(ValueError, match=r"DWAWeighter.epoch_end: the mean of every loss must be > 0.*'b': 0.0"):
        optimizer.epoch_end()
    assert memory(optimizer) == before


class Drawn:
    """Stands in for a random stream."""

    def __init__(self, normals=(), uniform=0.0):
        self.normals, self.uniform = normals, uniform

    def standard_normal(self, size):
        return np.array(self.normals)

    def random(self):
        return self.uniform


def test_random_weights_reference(monkeypatch):
    monkeypatch.setattr(RandomWeighter, "rng", lambda self: Drawn([0.3, -1.2, 0.8]))
    found = run(RandomWeighter, [[1, 2, 3]], reduction="mean")
    np.testing.assert_allclose(found[0], SEQUENCES["RLW"]["weights"], rtol=1e-11)


def test_random_weights_are_reproducible_and_average_to_one():
    history = [[1.0, 1.0, 1.0]] * 400
    torch.manual_seed(1)
    found = run(RandomWeighter, history, seed=5)
    torch.manual_seed(2)
    assert (found[:50] == run(RandomWeighter, history[:50], seed=5)).all(), "no global state"
    assert (found[:50] != run(RandomWeighter, history[:50], seed=6)).all()
    assert len(np.unique(found[:, 0])) == 400
    np.testing.assert_allclose(found.mean(axis=0), 1.0, atol=5 * found.std() / 400**0.5)


@pytest.mark.parametrize(
    ("alpha", "key", "tolerance"),
    [(0.95, "closed_form_alpha095_tau1", 1e-10), (0.999, "closed_form_alpha0999_T1", 1e-10)],
)
def test_relobralo_reference(alpha, key, tolerance, monkeypatch):
    case = SEQUENCES["ReLoBRaLo"]
    looks_back = [False, False, False, True, False, False, True, False]  # rho = 1, 1, 0, 1, 1, 0, 1 from step 1 on
    monkeypatch.setattr(
        ReLoBRaLoWeighter, "rng", lambda self: Drawn(uniform=1.0 if looks_back[self.memory["step"]] else 0.0)
    )
    found = run(ReLoBRaLoWeighter, A, alpha=alpha)
    blocks = {**case["physicsnemo_sym"], **case["official_rbischof_under_torch_shim"]}
    expected = {**case, **blocks}[key]
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_relobralo_without_progress_stays_at_one():
    np.testing.assert_allclose(run(ReLoBRaLoWeighter, [[3.0, 0.1, 50.0]] * 50, alpha=0.5, rho=0.5), 1.0, rtol=1e-14)
    np.testing.assert_allclose(run(ReLoBRaLoWeighter, A, alpha=1.0, rho=1.0), 1.0, rtol=1e-14)
