"""What ``nonfinite="defer"`` needs: numbers that stay on their device, and values that are looked at one call later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsurgery.gradients.gram import Row


class Numbers(Mapping[str, float]):
    """A number per loss in the memory of a method. It stays on its device until somebody reads one.

    Args:
        names: Names of the losses, (k,).
        values: Their numbers, (k,), float64. Nobody may change them in place.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self.names = tuple(names)
        self.values_there = values
        self._read: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        if not self._read:
            self._read = dict(zip(self.names, self.values_there.tolist(), strict=True))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # which Mapping answers by reading a number

    def entries(self) -> dict[str, Tensor]:
        """The numbers where they are.

        Returns:
            Scalars by name.
        """
        return dict(zip(self.names, self.values_there.unbind(), strict=True))


def there(values: Sequence[float], like: Tensor) -> Tensor:
    """Send numbers to a device, without waiting for it.

    Args:
        values: (k,).
        like: A tensor that is there.

    Returns:
        (k,), float64.
    """
    sent = torch.tensor(values, dtype=torch.float64, device="cpu")
    # From ordinary memory a copy waits until the device has taken it.
    return sent.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else sent.to(like.device)


def recalled(kept: Mapping[str, float], names: Sequence[str], default: float | Tensor, like: Tensor) -> Tensor:
    """Read what is kept for each loss, where it is.

    Args:
        kept: By name.
        names: Of which losses.
        default: For those that nothing is kept for: a number, or one per loss, (m,).
        like: A tensor on the device.

    Returns:
        (m,), float64.
    """
    if isinstance(kept, Numbers) and kept.names == tuple(names):
        return kept.values_there.to(like.device)
    filled = default if isinstance(default, Tensor) else torch.full_like(like, default)
    if not any(name in kept for name in names):
        return filled
    found = _scalars(kept, like)
    return torch.stack([found.get(name, d) for name, d in zip(names, filled.unbind(), strict=True)])


def merged(kept: Mapping[str, float], names: Sequence[str], values: Tensor) -> Numbers:
    """Keep a number for each of some losses; the others keep theirs.

    Args:
        kept: What was kept before, by name.
        names: For which losses.
        values: (m,), float64.

    Returns:
        By name, in a new object.
    """
    if kept.keys() <= set(names):
        return Numbers(names, values)
    found = {**_scalars(kept, values), **dict(zip(names, values.unbind(), strict=True))}
    return Numbers(tuple(found), torch.stack(list(found.values())))


def _scalars(kept: Mapping[str, float], like: Tensor) -> dict[str, Tensor]:
    if isinstance(kept, Numbers):
        return {name: x.to(like.device) for name, x in kept.entries().items()}
    return dict(zip(kept, there(list(kept.values()), like).unbind(), strict=True))


def kept_out(gradients: Row, fine: Tensor) -> None:
    """Put zeros in place of gradients unless all is well. No host waits to know.

    Args:
        gradients: One entry per parameter; they are replaced.
        fine: Whether all is well, a scalar.
    """
    marks: dict[torch.device, Tensor] = {fine.device: fine}
    zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for j, g in enumerate(gradients):
        if g is None:
            continue
        if g.device not in marks:
            marks[g.device] = fine.to(g.device, non_blocking=True)
        mark = marks[g.device]
        # A number would be copied from the host, and waited for.
        if (g.device, g.dtype) not in zeros:
            zeros[g.device, g.dtype] = torch.zeros((), dtype=g.dtype, device=g.device)
        zero = zeros[g.device, g.dtype]
        if g.is_sparse:
            g = g.coalesce()
            values = torch.where(mark, g.values(), zero)
            gradients[j] = torch.sparse_coo_tensor(
                g.indices(), values, g.shape, is_coalesced=True, check_invariants=False
            )
        else:
            gradients[j] = torch.where(mark, g, zero)


class Late:
    """The values of a call on their way to the host, where the next call looks at them.

    Args:
        names: Names of the losses, (m,).
        values: Their values, (m,), float64.
        fine: Whether each is as it should be, (m,).
    """

    def __init__(self, names: Sequence[str], values: Tensor, fine: Tensor) -> None:
        self._names = tuple(names)
        self._seen = torch.stack([values, fine.double()])
        self._event: torch.cuda.Event | None = None
        if self._seen.is_cuda:
            here = torch.empty(self._seen.shape, dtype=torch.float64, pin_memory=True)
            here.copy_(self._seen, non_blocking=True)
            with torch.cuda.device(self._seen.device):
                self._event = torch.cuda.Event()
                self._event.record()
            self._seen = here

    def read(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Look at the values. On CUDA this waits only if the device is a whole step behind.

        Returns:
            The losses by name, and the names of those that are not as they should be.
        """
        if self._event is not None:
            self._event.synchronize()
        values, fine = self._seen.tolist()
        losses = dict(zip(self._names, values, strict=True))
        return losses, tuple(name for name, yes in zip(self._names, fine, strict=True) if not yes)

    def __getstate__(self) -> dict[str, Any]:
        # An event belongs to one process.
        if self._event is not None:
            self._event.synchronize()
        return {"_names": self._names, "_seen": self._seen, "_event": None}


def library(array: Any) -> Any:
    """The library of an array: its functions have the same names in both.

    Args:
        array: An array of numpy or a tensor.

    Returns:
        ``numpy`` or ``torch``.
    """
    return torch if isinstance(array, Tensor) else np


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose entry by entry. On a device ``torch.where`` copies plain numbers from the host and waits for them.

    Args:
        condition: An array of numpy or a tensor, (m,).
        yes: A number, or such an array.
        no: Likewise.

    Returns:
        (m,), float64.
    """
    if not isinstance(condition, Tensor):
        return np.where(condition, yes, no)
    return torch.where(condition, *(x if isinstance(x, Tensor) else _filled(condition, x) for x in (yes, no)))


def _filled(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value, dtype=torch.float64)
