"""Every way of holding the gradients of m losses, behind one interface, :class:`base.Gradients`."""

from __future__ import annotations

from collections.abc import Callable

from gradsurgery.gradients import blocks, ghosts
from gradsurgery.gradients.base import Gradients as Gradients
from gradsurgery.gradients.base import Request as Request
from gradsurgery.gradients.base import Stream as Stream
from gradsurgery.gradients.dense import Dense, Offloaded, Sharded
from gradsurgery.gradients.flat import Flat
from gradsurgery.gradients.one_pass import OnePass
from gradsurgery.gradients.per_sample import PerSample
from gradsurgery.gradients.sample_graph import Refused as Refused
from gradsurgery.gradients.sliced import Sliced
from gradsurgery.gradients.streaming import Streaming

#: The engines, each of which gives gradients, or says why not; the first that gives some is taken.
ENGINES: tuple[Callable[[Request], Gradients | str], ...] = (
    OnePass.gather,
    Streaming.gather,
    PerSample.gather,
    blocks.gather,
    ghosts.gather,
    Sharded.gather,
    Sliced.gather,
    Offloaded.gather,
    Flat.gather,
    Dense.gather,
)


def gather(request: Request) -> Gradients:
    """Differentiate the losses.

    Args:
        request: What is wanted.

    Returns:
        The gradients, held by the first engine that can.

    Raises:
        AssertionError: No engine can, which does not happen.
    """
    reason = ""
    for engine in ENGINES:
        found = engine(request)
        if not isinstance(found, str):
            found.reason = found.reason or reason
            return found
        reason = reason or found
    raise AssertionError("rows can always be formed")
