"""Products as precise as their entries, whatever the user has allowed: the one place that turns switches of torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")


class _Switches:
    """Which reduced precisions of single precision products are allowed, as torch keeps it: for the whole process.

    Threads that multiply at the same time share one change, which the last of them takes back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str]] = []

    def hold_off(self) -> bool:
        """Allow none of them.

        Returns:
            Whether there is something to give back; if so, `give_back` must be called.
        """
        with self._lock:
            if not self._inside:
                self._before = _allowed()
                for switch, _ in self._before:
                    _set(switch, "ieee")
            self._inside += bool(self._before)
            return bool(self._before)

    def give_back(self) -> None:
        """Allow what was allowed before, if nobody else multiplies."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for switch, value in self._before:
                    _set(switch, value)
                self._before = []


def _allowed() -> list[tuple[Any, str]]:
    """The switches that allow a reduced precision, and what each has to be set to so that it does again."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before torch 2.9 there is one switch
        precision = torch.get_float32_matmul_precision()
        return [] if precision == "highest" else [(None, precision)]
    above = ((backends.cuda.matmul, backends), (backends.mkldnn.matmul, backends.mkldnn))
    found = [(switch, switch.fp32_precision, parent) for switch, parent in above]
    # What a switch says may be what the one above it says. Then it is to follow that one again.
    return [(s, "none" if p.fp32_precision == value else value) for s, value, p in found if value in _REDUCED]


def _set(switch: Any, value: str) -> None:
    if switch is None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)
    else:
        switch.fp32_precision = value


_SWITCHES = _Switches()


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Multiply in the precision of the factors: without autocast, TF32 and other reduced precisions.

    Args:
        device: Where.

    Returns:
        A context, which restores everything at its end.
    """
    held = _SWITCHES.hold_off()
    if not held and not torch.is_autocast_enabled(device.type):  # as almost always
        return nullcontext()
    return _exactly(device, held)


@contextmanager
def _exactly(device: torch.device, held: bool) -> Iterator[None]:
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if held:
            _SWITCHES.give_back()
