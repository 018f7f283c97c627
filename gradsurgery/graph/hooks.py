"""Whether functions look at gradients on their way through a graph.

A node tells of functions that were registered at it, and not of those that were registered at the tensor it made. But
every registration in Python takes a number, and so does every node. A graph is free of hooks if no number was given for
a registration since the graph was begun. Registrations of this library do not count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from gradsurgery.graph.torch_private import nodes_made, number_of, registrations

# The number of all leaves.
_LEAF = 2**64 - 1
# How many registrations were this library's own.
_own = 0


class _Seen(threading.local):
    """Since when no function was registered, as far as this thread knows: its nodes have numbers of their own.

    Attributes:
        count: Registrations of others.
        since: The number of the first node that was made after it was found that there are as many.
    """

    def __init__(self) -> None:
        self.count = _others()
        self.since = nodes_made()


def _others() -> int | None:
    total = registrations()
    return None if total is None else total - _own


def look() -> None:
    """Note how many functions were registered so far, at a moment from which on graphs may be begun."""
    count = _others()
    if count != _seen.count:
        _seen.count, _seen.since = count, nodes_made()


def may_look(nodes: Iterable[Node]) -> bool:
    """Whether functions registered at tensors or nodes may see gradients that pass through a graph.

    Args:
        nodes: All nodes of the graph.

    Returns:
        False if there surely are none. Functions registered at leaves long ago, and what a module's own hooks put into
        the graph in each forward pass, are another question.
    """
    since, end = _seen.since, nodes_made()
    if since is None or end is None or _seen.count is None or _seen.count != _others():
        return True
    # A node of another thread has one of its numbers, and what was registered there in the meantime is not known.
    return any(not since <= (number := number_of(node)) < end and number != _LEAF for node in nodes)


def ours(register: Callable[..., RemovableHandle], what: Any) -> RemovableHandle:
    """Register a function of this library, which does not count.

    Args:
        register: What registers it.
        what: What it is handed.

    Returns:
        What removes it.
    """
    global _own
    handle = register(what)
    _own += 1  # afterwards: what is interrupted counts as a registration of somebody else
    return handle


def before(node: Node, function: Callable[..., Any]) -> RemovableHandle:
    """Register a function of this library that runs before a node.

    Args:
        node: The node.
        function: Takes the gradients at its outputs.

    Returns:
        What removes it.
    """
    return ours(node.register_prehook, function)


def is_hooked(node: Node) -> bool:
    """Whether functions were registered at a node. They are kept in one place, to which one more gives access.

    Args:
        node: The node.

    Returns:
        False for hooks of tensors, of which a node does not tell.
    """
    for register in (node.register_hook, node.register_prehook):
        handle = ours(register, lambda *_: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks is None or len(hooks) > 0:
            return True
    return False


_seen = _Seen()
