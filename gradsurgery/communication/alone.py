"""The communicator of one process: nothing is exchanged, and every question has the answer of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Agreement(NamedTuple):
    """Which losses the processes have together.

    Attributes:
        present: Places among all names of the losses that some process has, (m,).
        values: Their values over the whole batch, (m,), float64, where the losses are or on the host.
        shares: The share of this process in each, (m,); None: all of it.
    """

    present: Sequence[int]
    values: Tensor
    shares: np.ndarray | None


class Communicator:
    """One process alone. :class:`Processes` overrides what several have to tell each other.

    Attributes:
        size: Number of processes.
        rank: Place of this one.
        is_alone: There is no other.
        is_sharded: Parameters are DTensors, whose gradients come added up over the processes.
        slices: Rows may be cut into slices, one for each process.
        in_place: A pass that serves all losses may accumulate into ``.grad``, so that hooks which wait for it run.
    """

    size = 1
    rank = 0
    is_alone = True
    is_sharded = False
    slices = False
    in_place = True

    def over(self, params: Sequence[Tensor]) -> Communicator:
        """Choose the communicator for the parameters that the losses reach.

        Args:
            params: The parameters.

        Returns:
            This one, or another over the same processes.
        """
        return self

    # ------------------------------------------------------------------------------------ small numbers

    def fetch(self, alone: Sequence[Tensor], together: Sequence[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Bring numbers to the host in one transfer.

        Args:
            alone: Numbers that every process has.
            together: Numbers that are added up over the processes before.

        Returns:
            Both as flat float64 arrays.
        """
        numbers = host([*alone, *together])
        return numbers[: len(alone)], numbers[len(alone) :]

    def total(self, numbers: Tensor) -> Tensor:
        """Add up over the processes, in place if it can be.

        Args:
            numbers: A dense tensor of the same shape everywhere.

        Returns:
            The sum, the same bits everywhere.
        """
        return numbers

    def added(self, numbers: np.ndarray) -> np.ndarray:
        """Add up numbers of the host.

        Args:
            numbers: Any shape, float64.

        Returns:
            The sums.
        """
        return numbers

    def broadcast(self, numbers: np.ndarray, like: torch.device) -> np.ndarray:
        """Take the numbers of the first process.

        Args:
            numbers: Float64, of the same shape everywhere.
            like: The device of the losses.

        Returns:
            What the first process passed.
        """
        return numbers

    def any_of(self, marks: Tensor) -> Tensor:
        """Marks that are set on any process.

        Args:
            marks: Zeros and ones, uint8.

        Returns:
            The union, on the host.
        """
        return marks

    def stacked(self, matrix: np.ndarray) -> np.ndarray:
        """Square root of the sum of the products of every process: B Bᵀ = Σ Bᵣ Bᵣᵀ.

        Args:
            matrix: Bᵣ, (m, k) with k ≤ m.

        Returns:
            B, (m, k).
        """
        return matrix

    # --------------------------------------------------------------------------------------------- losses

    def agree(
        self,
        names: Sequence[str],
        present: Sequence[str],
        values: Tensor,
        sizes: Mapping[str, float] | float | None,
        kind: Callable[[], str],
        may_be_empty: bool,
    ) -> Agreement:
        """Make sure that all processes do the same, and find the losses of the whole batch.

        Args:
            names: Names of the losses, absent ones included.
            present: Those that this process has.
            values: Their values.
            sizes: How many samples this process has, for each loss or for all; None: as many as the others.
            kind: Describes the call. It must be the same everywhere.
            may_be_empty: Accept that no process has a loss.

        Returns:
            Which losses there are.
        """
        return Agreement([names.index(name) for name in present], values, None)

    def require_replicas(self, params: Sequence[Tensor]) -> None:
        """Compare the parameters that all processes have whole.

        Args:
            params: The parameters; DTensors are left out.
        """

    def is_same(self, number: float) -> bool:
        """Whether all processes have the same number, up to rounding.

        Args:
            number: A finite number.

        Returns:
            True if they do.
        """
        return True

    def united(self, masks: dict[Tensor, int], params: Sequence[Tensor], m: int) -> dict[Tensor, int]:
        """Which losses reach each parameter on any process.

        Args:
            masks: Bit masks of this process.
            params: The parameters, the same everywhere.
            m: Number of losses.

        Returns:
            Bit masks of the parameters that any loss reaches.
        """
        return masks

    # ------------------------------------------------------------------------------------------ gradients

    def totals(self, found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Add up one gradient per parameter over the processes. What no process has stays None.

        Args:
            found: The gradients.
            params: The parameters, the same everywhere.

        Returns:
            The sums.
        """
        return list(found)

    def joined(self, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Put the rows of all processes at the features behind each other.

        Args:
            row: One gradient for each part of the shared representation.
            params: These parts.

        Returns:
            One tensor a part and process.
        """
        return list(row)

    def local(self, g: Tensor, p: Tensor) -> Tensor:
        """The piece of a gradient that this process holds.

        Args:
            g: A gradient.
            p: Its parameter.

        Returns:
            The gradient itself where parameters are whole.
        """
        return g

    def like(self, g: Tensor | None, p: Tensor) -> Tensor | None:
        """Give a piece the form of its parameter.

        Args:
            g: The piece.
            p: The parameter.

        Returns:
            What fits ``p.grad``.
        """
        return g

    def lengths(self, pieces: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """The lengths of gradients from those of the pieces that this process holds.

        Args:
            pieces: Scalars, one per parameter; None where there is no gradient.
            params: The parameters, the same everywhere.

        Returns:
            Scalars, the same everywhere.
        """
        return list(pieces)

    def counts(self, p: Tensor) -> bool:
        """Whether what this process has of a parameter's gradients counts in sums over the processes.

        Args:
            p: The parameter.

        Returns:
            True on exactly one of the processes that hold the same.
        """
        return True


#: Nothing is known of other processes.
ALONE = Communicator()


def host(numbers: Sequence[Tensor]) -> list[np.ndarray]:
    """Bring small results to the host, in one transfer where they are on one device.

    Args:
        numbers: Tensors of any shape.

    Returns:
        Flat float64 arrays.
    """
    if all(x.device.type == "cpu" for x in numbers):
        return [
            (x if x.dtype is torch.float64 else x.double()).numpy(force=x.requires_grad).reshape(-1) for x in numbers
        ]
    device = numbers[0].device
    flat = [x.detach().reshape(-1).to(device, torch.float64) for x in numbers]
    joined = (flat[0] if len(flat) == 1 else torch.cat(flat)).cpu().numpy()
    parts, start = [], 0
    for x in flat:
        stop = start + x.shape[0]
        parts.append(joined[start:stop])
        start = stop
    return parts
