"""SDMGrad: the min-norm point near a preferred direction, from independent batches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import SurgerySwitches
from gradsurgery.surgery.modo import DoubleSampling

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SDMGrad(DoubleSampling):
    """Follow MGDA's direction, drawn towards that of the mean loss.

    The weights minimise ‖Jᵀ(w + λw̃)‖² over the simplex, for the preferred weights w̃ (equal ones by default), and
    d = Jᵀ(w + λw̃) / (1 + λ). λ = 0 is MGDA, a large λ the preferred direction. On independent batches,
    ``backward(losses, independent=[first, second])``, the gradient J₁J₂ᵀ(w + λw̃) of the problem is unbiased and
    d = J₃ᵀ(w + λw̃) / (1 + λ) for `losses`; with one further batch J₂ is J₃, with none all three are the same.

    ``solver="sgd"`` is the authors' way: 20 steps of SGD with momentum, each projected on the simplex, on the problem
    divided by the square of the mean length, from the last step's weights. At that step size it moves between corners
    of the simplex rather than converge. ``solver="exact"`` finds the minimum; where it is zero on the one batch that
    there is, the flag is "stationary".

    Losses may rise to first order; with one batch, "exact" and λ = 0 none does. It is positively homogeneous.

    Paper: Xiao, Ban & Ji, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms,
    NeurIPS 2023, arXiv 2305.18409. λ as in the authors' experiments, the rest as in their code.

    Departures: with ``reduction="sum"`` the direction is multiplied by m, so that m equal rows g give m·g. Nothing is
    added before dividing. The authors' code writes the rows of all three batches to one tensor, and so uses one batch.
    ``"exact"`` makes J₁J₂ᵀ symmetric and leaves out its negative eigenvalues, which noise alone makes.

    Args:
        optimizer: The optimizer that makes the step.
        strength: λ ≥ 0, weight of the preferred direction.
        solver: "sgd" or "exact".
        lr: Step size of "sgd".
        momentum: Momentum of "sgd", from 0 in every step.
        iterations: Number of steps of "sgd".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is w̃, up to its sum.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> base = torch.optim.SGD([torch.zeros(2)], lr=0.1)
        >>> gradsurgery.SDMGrad(base, strength=0.0, solver="exact", reduction="mean").combine(rows)
        tensor([0.4000, 0.8000])
    """

    preference_scales_rows = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        strength: float = 0.3,
        solver: Literal["sgd", "exact"] = "sgd",
        lr: float = 10.0,
        momentum: float = 0.5,
        iterations: int = 20,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.strength = self.check.number("strength", strength, least=0.0)
        self.solver = self.check.choice("solver", solver, ("sgd", "exact"))
        self.descends = sys.maxsize if solver == "exact" and strength == 0 else 0
        self.lr = self.check.number("lr", lr, above=0.0)
        self.momentum = self.check.number("momentum", momentum, least=0.0, below=1.0)
        self.iterations = self.check.count("iterations", iterations, least=1)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(self.names)
        products, _ = self.cross(gram)
        preferred = self.preferences() / self.preferences().max()
        preferred /= preferred.sum()
        if self.solver == "exact":
            shares, stationary = self._exact(gram, products, preferred)
            if stationary:
                self.flag("stationary")
                return np.zeros(m)
        else:
            size = np.sqrt(np.maximum(products.diagonal(), 0.0)).mean() ** 2
            shares, speed = self.recall_shares("shares"), np.zeros(m)
            for _ in range(self.iterations if size > 0 else 0):
                speed = self.momentum * speed + products @ (shares + self.strength * preferred) / size
                shares = geometry.project_simplex(shares - self.lr * speed)
            self.keep_shares("shares", shares)
        return m * (shares + self.strength * preferred) / (1 + self.strength)

    def _exact(self, gram: np.ndarray, products: np.ndarray, preferred: np.ndarray) -> tuple[np.ndarray, bool]:
        """The weights, and whether they give zero on the one batch that there is."""
        # Σ w = 1, so Jᵀ(w + λw̃) = Σ wᵢ (gᵢ + λ Jᵀw̃): the min-norm point of shifted rows.
        shift = np.eye(len(preferred)) + self.strength * preferred
        if len(gram) == len(preferred):
            return geometry.min_norm(
                shift @ products @ shift.T, lambda: shift @ self.factor(), noise=self.noise, flag=self.flag
            )
        values, vectors = np.linalg.eigh((products + products.T) / 2)
        half = shift @ (vectors * np.sqrt(np.maximum(values, 0.0)))
        return geometry.min_norm(half @ half.T, lambda: half, flag=self.flag)[0], False
