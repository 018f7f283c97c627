"""GCond: the worst conflict first, settled between a winner and a loser."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sin
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GCond(Surgery):
    """Settle the worst conflict, then the next: a steady and strong gradient wins, and the other one gives way.

    In each round the pair with the smallest cosine c (eq. 3) is taken. Its winner w has the higher score
    0.8 max(0, S) + 0.2 N (eq. 7): S is the cosine with the task's gradient of the last step (eq. 8), N its length over
    the usual one, as a share of the pair's (eq. 9). With an angle α(c) that the thresholds bend (eq. 4),
    s_w = sin α and s_l = sin min(α, π/2) (eq. 5 and 6), both change at once:
    g_w ← g_w − s_w ⟨g_w, g_l⟩ / ‖g_l‖² g_l and g_l ← g_l − s_l ⟨g_w, g_l⟩ / ‖g_w‖² g_w. So a mild conflict moves both a
    little, a moderate one takes it all from the loser, and in a critical one the winner stays as it is. The direction
    is the sum of what results.

    Losses may rise to first order: mild conflicts stay in part, and few rounds may not reach every pair. Without
    conflict it is the plain sum (for weak ≤ 0), and it is positively homogeneous. It jumps where two scores tie; the
    task that comes first wins a tie. It is meant for gradients averaged over many micro-batches, as
    ``backward(losses, accumulate=True)`` adds them up: their cosines are more than noise.

    Paper: Limarenko & Studenikina, GCond: Gradient Conflict Resolution via Accumulation-based Stabilization for
    Large-Scale Multi-Task Learning, 2025, arXiv 2509.07252. The update of both gradients is that of the authors' code
    (``use_smooth_logic``); defaults are those of their experiments (table 7).

    Departures: the code compares with the last gradient as it was after its conflicts, this class with the gradient
    itself, as in eq. 8. The usual length is corrected for its start, where the code starts at 1 in the units of the
    loss, and no ε is added. Momentum is left to the wrapped optimizer; the code's own replaces β₁ of Adam.

    Args:
        optimizer: The optimizer that makes the step.
        thresholds: Cosines (critical, main, weak) below which a conflict is critical, moderate, mild; in increasing
            order within [−1, 1].
        power: p > 0, how α bends between critical and main.
        beta: Decay of the usual lengths, in [0, 1).
        scores: Weights ≥ 0 of steadiness and strength.
        rounds: Conflicts settled in one step at most, ≥ 1.
        dominance_window: After so many wins in a row a task loses. 0 turns it off.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [-3.0, 1.0]])
        >>> gradsurgery.GCond(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([2., 1.])
    """

    stateful = True
    observes = True
    rows_repeat_tasks = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        thresholds: Sequence[float] = (-0.8, -0.5, 0.0),
        power: float = 2.0,
        beta: float = 0.95,
        scores: Sequence[float] = (0.8, 0.2),
        rounds: int = 3,
        dominance_window: int = 0,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.thresholds = [self.check.number("thresholds", c, least=-1.0, most=1.0) for c in thresholds]
        if len(self.thresholds) != 3 or sorted(self.thresholds) != self.thresholds:
            raise ValueError(f"{self._name}: `thresholds` must be three cosines in increasing order, got {thresholds}.")
        self.power = self.check.number("power", power, above=0.0)
        self.beta = self.check.number("beta", beta, least=0.0, below=1.0)
        self.scores = [self.check.number("scores", w, least=0.0) for w in scores]
        if len(self.scores) != 2:
            raise ValueError(f"{self._name}: `scores` must be two numbers, got {scores}.")
        self.rounds = self.check.count("rounds", rounds, least=1)
        self.dominance_window = self.check.count("dominance_window", dominance_window, least=0)

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        last = [self.row_state("last", name, params) for name in self.names]
        for name, row in zip(self.names, rows, strict=True):
            self.keep_row("last", name, [None if g is None else g.clone() for g in row], params)
        return [*rows, *last]

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(self.names)
        norms, last = np.sqrt(gram.diagonal()[:m]), np.sqrt(gram.diagonal()[m:])
        count = self.recall("count", 0.0) + 1
        usual = self.recall("usual", 0.0)
        usual = usual + (self.lengths[:m] - usual) * ((1 - self.beta) / (1 - self.beta**count))
        self.keep("count", count)
        self.keep("usual", usual)
        # Of the gradients as they change: what they are made of, and their products with each other and with the last.
        mixing, products, past = np.eye(m), gram[:m, :m].copy(), gram[:m, m:].copy()
        for _ in range(self.rounds):
            squares = np.maximum(products.diagonal(), 0.0)
            here = np.flatnonzero(squares > m * self.noise * (np.abs(mixing) @ norms) ** 2)
            if len(here) < 2:
                break
            lengths = np.sqrt(squares[here])
            cosines = products[np.ix_(here, here)] / lengths / lengths[:, None]
            cosines[np.tril_indices(len(here))] = np.inf
            i, j = np.unravel_index(cosines.argmin(), cosines.shape)
            c = float(cosines[i, j])  # equation (3)
            if c >= self.thresholds[2]:
                break
            i, j = here[[i, j]]
            w, l = (j, i) if self._second_wins(i, j, np.sqrt(squares), usual, past, last) else (i, j)  # noqa: E741
            s_w, s_l = self._strengths(c)  # equations (4) to (6)
            change = np.eye(m)
            change[w, l] = -s_w * products[w, l] / products[l, l]
            change[l, w] = -s_l * products[w, l] / products[w, w]
            mixing, past, products = change @ mixing, change @ past, change @ products @ change.T
        return mixing.sum(axis=0)

    def _strengths(self, c: float) -> tuple[float, float]:
        """How much of the projection the winner and the loser make, s_w and s_l."""
        critical, main, weak = self.thresholds
        if c < critical:
            return 0.0, 1.0  # α = π
        if c < main:
            return sin(pi / 2 * (1 + ((c - main) / (critical - main)) ** self.power)), 1.0
        return (sin(pi / 2 * (1 - (c - main) / (weak - main))),) * 2

    def _second_wins(
        self, i: int, j: int, lengths: np.ndarray, usual: np.ndarray, past: np.ndarray, last: np.ndarray
    ) -> bool:
        winners = self.memory.get("winners", [])
        first, second = self.names[i], self.names[j]
        wins = bool(self.dominance_window) and len(winners) == self.dominance_window and len(set(winners)) == 1
        if wins and winners[0] in (first, second):
            result = winners[0] == first
        else:
            strength = lengths[[i, j]] / usual[[i, j]]
            strength = strength / strength.sum()  # equation (9)
            steady = [past[k, k] / (lengths[k] * last[k]) if last[k] > 0 else 0.0 for k in (i, j)]  # equation (8)
            score = self.scores[0] * np.maximum(0.0, steady) + self.scores[1] * strength  # equation (7)
            result = bool(score[1] > score[0])
        if self.dominance_window:
            self.memory["winners"] = [*winners, second if result else first][-self.dominance_window :]
        return result
