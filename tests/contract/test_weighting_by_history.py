"""FAMO, weights from the variation of losses, softmax weights, and groups of tasks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.go4align import GO4AlignWeighter, grouped
from gradsurgery.weighting.group_dro import GroupDROWeighter
from gradsurgery.weighting.slaw import SLAWWeighter
from gradsurgery.weighting.uwso import UWSOWeighter
from tests.support.weighters import A, memory, setting, step
from tests.support.weighting_catalogue import NAMES, run, tied


def famo_by_torch(befores, afters, lr=0.025, decay=1e-3):
    """The official algorithm, with torch's Adam."""
    w = torch.zeros(len(befores[0]), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=lr, weight_decay=decay)
    weights = []
    for before, after in zip(torch.tensor(befores), torch.tensor(afters), strict=True):
        z = torch.softmax(w, 0)
        weights.append((z / before / (z / before).sum()).detach().numpy())
        delta = before.log() - after.log()
        adam.zero_grad()
        z.backward(delta)
        adam.step()
    return np.array(weights)


def test_famo_agrees_with_the_official_algorithm():
    expected = famo_by_torch(A[:-1], A[1:])
    p, optimizer = setting(FAMOWeighter, reduction="mean")
    found = []
    for before, after in itertools.pairwise(A):
        found.append(step(optimizer, p, before))
        optimizer.update(dict(zip(NAMES, torch.from_numpy(after), strict=True)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(run(FAMOWeighter, A, reduction="mean")[:-1], expected, rtol=1e-5)


def test_famo_equal_improvement_changes_nothing():
    p, optimizer = setting(FAMOWeighter, decay=0.0)
    for size in (1.0, 0.7, 0.3, 0.31):
        step(optimizer, p, size * np.array([0.1, 3.0, 1e5]))
    assert list(memory(optimizer)["logits"].values()) == [0.0, 0.0, 0.0], "rounding is not an improvement"


def test_famo_gives_more_weight_to_the_loss_that_fell_less():
    p, optimizer = setting(FAMOWeighter)
    step(optimizer, p, [1.0, 1.0, 1.0])
    optimizer.update({"a": 0.5, "b": 1.0, "c": 1.0})
    logits = memory(optimizer)["logits"]
    assert logits["a"] < 0 < logits["b"]


def test_famo_refuses_a_loss_below_its_bound():
    # Seen: nan for a loss of -0.1 with a lower bound of 0.
    p, optimizer = setting(FAMOWeighter)
    with pytest.raises(ValueError, match=r"FAMOWeighter: every loss must be finite and above its bound.*'b': -0.1"):
        step(optimizer, p, [1.0, -0.1, 1.0])
    p, optimizer = setting(FAMOWeighter, min_losses={"a": 0.0, "b": -1.0, "c": 0.0}, reduction="mean")
    np.testing.assert_allclose(step(optimizer, p, [1.0, -0.5, 1.0]), [0.25, 0.5, 0.25])


def test_famo_update_is_used_once_and_after_the_step():
    p, optimizer = setting(FAMOWeighter)
    with pytest.raises(RuntimeError, match=r"FAMOWeighter.update: there is no step to learn from"):
        optimizer.update([1.0, 1.0, 1.0])
    step(optimizer, p, [1.0, 1.0, 1.0])
    before = memory(optimizer)
    with pytest.raises(ValueError, match=r"`losses` must have the names of the losses"):
        optimizer.update([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"'b': 0.0"):
        optimizer.update({"a": 1.0, "b": 0.0})
    assert memory(optimizer) == before
    optimizer.update({"a": 0.5, "b": 1.0, "c": None})
    after = memory(optimizer)
    assert after["step"] == before["step"]
    assert after["logits"]["a"] < 0 < after["logits"]["b"]
    assert "c" not in after["logits"]
    with pytest.raises(RuntimeError, match="no step to learn from"):
        optimizer.update({"a": 0.5, "b": 1.0})
    step(optimizer, p, [0.4, 0.9, 1.0])
    assert memory(optimizer)["logits"] == after["logits"], "the next losses are not used a second time"


def test_famo_update_without_a_step_does_nothing():
    """As when a gradient scaler has skipped the step."""
    p, optimizer = setting(FAMOWeighter)
    optimizer.backward(dict(zip(NAMES, tied(p, [1.0, 1.0, 1.0]), strict=True)))
    optimizer.update({"a": 0.5, "b": 1.0, "c": 1.0})
    optimizer.zero_grad()
    assert memory(optimizer) == {"step": 0}


def test_famo_keeps_no_graph():
    # Seen: the graph of the previous step was kept alive.
    p, optimizer = setting(FAMOWeighter)
    step(optimizer, p, [1.0, 2.0, 3.0])
    assert all(type(x) is float for x in memory(optimizer)["before"].values())


def go4align_by_hand(history, groups, eta):
    """The authors' code, with the best of all partitions in place of k-means."""
    found, p = [], np.ones(len(history[0])) / len(history[0])
    for losses in np.asarray(history):
        p = p * np.exp(-eta * losses)
        p = p / p.sum()
        indicators = losses.sum() / losses * p
        candidates = []
        for labels in itertools.product(range(groups), repeat=len(losses)):
            means = [indicators[np.array(labels) == k].mean() for k in range(groups) if k in labels]
            labels = [sorted(set(labels)).index(k) for k in labels]
            fit = np.array(means)[labels]
            candidates.append((((indicators - fit) ** 2).sum(), fit))
        found.append(min(candidates, key=lambda candidate: candidate[0])[1])
    return np.array(found)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("eta", [0.0, 0.02])
def test_go4align_by_hand(groups, eta):
    history = np.exp(np.random.default_rng(groups).standard_normal((6, 5)))
    found = run(
        lambda base, **switches: GO4AlignWeighter(base, groups=groups, eta=eta, **switches), history, names="abcde"
    )
    np.testing.assert_allclose(found, go4align_by_hand(history, groups, eta), rtol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_groups_are_the_best_ones(shift):
    rng = np.random.default_rng(0)
    for _ in range(30):
        m, groups = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        values = shift + rng.integers(0, 6, m).astype(float)
        fit = grouped(values, groups)
        parts = [
            [values[np.array(labels) == k] for k in set(labels)]
            for labels in itertools.product(range(groups), repeat=m)
        ]
        best = min(sum(np.square(part - part.mean()).sum() for part in partition) for partition in parts)
        assert np.square(values - fit).sum() == pytest.approx(best, abs=1e-9)
        assert len(set(fit)) <= groups
        assert fit.mean() == pytest.approx(values.mean())


def test_cov_by_its_definition():
    found = run(CoVWeighter, A)
    np.testing.assert_array_equal(found[:2], 1.0)
    ratios = np.array([A[0] / A[0], *(A[t] / A[:t].mean(0) for t in range(1, len(A)))])
    for t in range(2, len(A)):
        cov = ratios[:t].std(0) / ratios[:t].mean(0)
        np.testing.assert_allclose(found[t], 3 * cov / cov.sum(), rtol=1e-12)


def test_cov_of_constant_losses_is_equal():
    np.testing.assert_array_equal(run(CoVWeighter, [[1.0, 5.0, 9.0]] * 6), 1.0)
    found = run(CoVWeighter, A, decay=0.9)
    assert np.isfinite(found).all()
    assert (found[3:] != run(CoVWeighter, A)[3:]).all()


def test_cov_with_decay_forgets_the_spread_too():
    """Against moments written out: weights fall as the factors of `decay` do."""
    history, decay = np.array(A), 0.8
    mean = ratios = variance = None
    for t, losses in enumerate(history[:-1]):
        now = losses / (losses if t == 0 else mean)
        keep = decay if t else 0.0
        variance = np.zeros(3) if t == 0 else keep * (variance + (1 - keep) * (now - ratios) ** 2)
        ratios = now if t == 0 else keep * ratios + (1 - keep) * now
        mean = losses if t == 0 else keep * mean + (1 - keep) * losses
    expected = np.sqrt(variance) / ratios
    found = run(CoVWeighter, history, decay=decay)[-1]
    np.testing.assert_allclose(found, 3 * expected / expected.sum(), rtol=1e-9)
    # A loss that was wild long ago, and calm since, against one that goes on as ever.
    calm = [[1.0 + (t < 20) * (t % 2), 1.0 + 0.1 * (t % 2), 1.0] for t in range(400)]
    assert run(CoVWeighter, calm, decay=0.9)[-1][0] < 1e-6
    assert run(CoVWeighter, calm)[-1][0] > 1.0


def test_slaw_by_its_definition():
    found = run(SLAWWeighter, A)
    for t in range(1, len(A)):
        inverse = 1 / A[: t + 1].std(0)
        np.testing.assert_allclose(found[t], 3 * inverse / inverse.sum(), rtol=1e-10)
    mean, square = A[:2].mean(0), (A[:2] ** 2).mean(0)  # plain means for the first 1/(1 - 0.5) steps
    found = run(SLAWWeighter, A, beta=0.5)
    for t in range(2, len(A)):
        mean, square = (mean + A[t]) / 2, (square + A[t] ** 2) / 2
        inverse = 1 / np.sqrt(square - mean**2)
        np.testing.assert_allclose(found[t], 3 * inverse / inverse.sum(), rtol=1e-8)


def test_slaw_of_a_small_variation_on_a_large_loss():
    """A difference of two large averages would lose it."""
    history = [[1e8 + 1000 * (-1) ** t, 1 + 1e-5 * (-1) ** t, 1 + 0.5 * (-1) ** t] for t in range(10)]
    found = run(SLAWWeighter, history)[-1]
    inverse = 1 / np.array([1000.0, 1e-5, 0.5])
    np.testing.assert_allclose(found, 3 * inverse / inverse.sum(), rtol=1e-6)


def test_uwso_limits():
    np.testing.assert_allclose(run(UWSOWeighter, [[0.5, 1, 2]], temperature=1e9)[0], 1.0, rtol=1e-8)
    np.testing.assert_allclose(run(UWSOWeighter, [[0.5, 1, 2]], temperature=1e-3)[0], [3, 0, 0], atol=1e-12)


def test_group_dro_by_its_definition():
    q, eta = np.full(3, 1 / 3), 0.3
    found = run(GroupDROWeighter, A, eta=eta, reduction="mean")
    for t, losses in enumerate(A):
        q = q * np.exp(eta * losses)
        q /= q.sum()
        np.testing.assert_allclose(found[t], q, rtol=1e-12)
    worst = run(GroupDROWeighter, [[1.0, 2.0, 1.0]] * 50, eta=100.0)[-1]
    np.testing.assert_allclose(worst, [0, 3, 0], atol=1e-300)
