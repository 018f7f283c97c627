"""Every way of holding the gradients of m losses, behind one interface, :class:`base.Gradients`."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

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


class Engine(NamedTuple):
    """A way of holding gradients.

    Attributes:
        gather: Gives gradients, or says why not; empty where there is nothing to say.
        when: It is asked only where this of the request is true, or not empty.
    """

    gather: Callable[[Request], Gradients | str]
    when: Callable[[Request], object]


_ALWAYS: Callable[[Request], object] = attrgetter("m")
#: The engines; the first that gives gradients is taken.
ENGINES = (
    Engine(OnePass.gather, attrgetter("one_pass")),
    Engine(Streaming.gather, attrgetter("stream")),
    Engine(PerSample.gather, attrgetter("batch.per_sample")),
    Engine(blocks.gather, _ALWAYS),
    Engine(ghosts.gather, _ALWAYS),
    Engine(Sharded.gather, attrgetter("batch.comm.is_sharded")),
    Engine(Sliced.gather, attrgetter("batch.comm.slices")),
    Engine(Offloaded.gather, attrgetter("puts_away")),
    Engine(Flat.gather, attrgetter("gram_only")),
    Engine(Dense.gather, _ALWAYS),
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
        if not engine.when(request):
            continue
        found = engine.gather(request)
        if not isinstance(found, str):
            found.reason = "; ".join(filter(None, (found.reason, reason)))
            return found
        reason = reason or found
    raise AssertionError("rows can always be formed")
