"""NTK weighting for physics-informed networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch, parameters
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.gram import length
from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack


#: `residuals` should have come by then.
WAITING_STEPS = 100


class NTKWeighter(RecordingWeighter):
    """Let all losses converge at the same rate, judged by the neural tangent kernel of their residuals.

    λᵢ = Σⱼ tr Kⱼ / tr Kᵢ with the traces tr Kᵢ = Σₖ ‖∇rₖ‖² over the residuals r of loss i. They are found anew when
    ``backward`` is given `residuals`, which needs backward passes of its own: every hundred steps or so. In between the
    last weights are used; before the first time they are 1. Multiplying the residuals of a loss by s divides its weight
    by s². A trace grows with the number of residuals: divide each by √N for means. A trace of 0 leaves the weight
    alone.

    Pitfall: without `residuals` the weights stay 1. A warning says so after 100 steps.

    Paper: Wang, Yu and Perdikaris, When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective, J. Comput.
    Phys. 2022, arXiv 2007.14527 (algorithm 1; checked against the authors' notebook).

    Departure: beyond `probes` residuals the trace is estimated (Hutchinson): the mean of ‖Σₖ vₖ ∇rₖ‖² over random signs
    v, drawn from the method's own stream.

    Args:
        optimizer: The torch optimizer that makes the step.
        probes: Backward passes per loss at most. A loss with no more residuals than this has its exact trace; the
            relative error of others is about √(2/probes).
        decay: Share of the old weights when new ones are found, 0 ≤ decay < 1.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.NTKWeighter(torch.optim.SGD([w], lr=0.1))
        >>> residuals = {"equation": 3 * w, "boundary": w - 2}
        >>> losses = {name: r.square().mean() for name, r in residuals.items()}
        >>> optimizer.backward(losses, residuals=residuals).weights
        {'equation': 1.1111111111111112, 'boundary': 10.0}
    """

    scale = "paper"
    uses_residuals = True

    def __init__(
        self, optimizer: Optimizer, *, probes: int = 32, decay: float = 0.0, **switches: Unpack[Switches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.probes = self.check.count("probes", probes, least=1)
        self.decay = self.check.number("decay", decay, least=0.0, below=1.0)

    def measure(self, batch: Batch) -> Tensor | None:
        residuals = batch.residuals
        if residuals is None or self.phase != "solve":
            return None
        if batch.graph.hidden or batch.comm.is_sharded:
            raise RuntimeError(
                f"{self._name}.backward: gradients of residuals cannot be found under reentrant activation "
                "checkpointing, where use_reentrant=False helps, or with sharded parameters."
            )
        named = self._checked(residuals)
        here = [name for name, root in zip(batch.names, batch.tasks.roots, strict=True) if root is not None]
        missing = [name for name in here if name not in named]
        unknown = [name for name in named if name not in batch.tasks.names]
        if missing or unknown:
            raise ValueError(
                f"{self._name}.backward: `residuals` must have the names of the losses: {missing} missing, "
                f"{unknown} unknown."
            )
        params, device, rng = parameters(self), batch.values.device, self.rng()
        # By sorted names, so that every rank draws the same, whatever the order of its dict.
        traces = {name: self._trace(named[name], params, rng, device) for name in sorted(here)}
        zero = torch.zeros((), dtype=torch.float64, device=device)
        found = torch.stack([traces.get(name, zero) for name in batch.names])
        # The residuals of the whole batch are those of all processes.
        return batch.comm.total(found)

    def _checked(self, residuals: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
        given = residuals.items() if isinstance(residuals, Mapping) else enumerate(residuals)
        named = {str(name): r for name, r in given}
        for name, r in named.items():
            if not isinstance(r, Tensor) or not r.is_floating_point() or not r.requires_grad or not r.numel():
                raise TypeError(
                    f"{self._name}.backward: `residuals[{name!r}]` must be a floating point tensor with a graph, not "
                    "detached and not empty."
                )
        return named

    def _trace(self, r: Tensor, params: list[Tensor], rng: np.random.Generator, device: torch.device) -> Tensor:
        n = r.numel()
        exact = n <= self.probes
        count = n if exact else self.probes
        total = torch.zeros((), dtype=torch.float64, device=device)
        for k in range(count):
            v = torch.zeros(n, dtype=r.dtype) if exact else torch.from_numpy(rng.integers(0, 2, n) * 2 - 1).to(r.dtype)
            if exact:
                v[k] = 1
            row = rows_module.gradient(r, params, v.reshape(r.shape).to(r.device), retain_graph=True)
            total = total + length(row, device).square()
        return total if exact else total / count

    def weights(self, losses: np.ndarray) -> np.ndarray:
        if self.has_measured:
            traces, old = self.measured, self.recall("weights", 1.0)
            there = traces > 0
            new = ratio(traces.sum(), np.where(there, traces, 1.0))
            decay = self.decay if "weights" in self.memory else 0.0
            self.keep("weights", np.where(there, decay * old + (1 - decay) * new, old))
        elif "weights" not in self.memory and self.memory["step"] >= WAITING_STEPS:
            self.warn_once(
                "residuals",
                f"{self._name}: backward() has not been given `residuals` in {WAITING_STEPS} steps, and until it is "
                "all weights stay 1. Pass them now and then: optimizer.backward(losses, residuals={name: tensor, "
                "...}).",
            )
        return self.held("weights")
