"""What a method remembers, what one call of ``backward`` proposes to remember, and what a saved memory must look like.

A saved one that was cut off or changed is refused before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from gradsurgery import misuse
from gradsurgery.gradients.accumulated import Accumulated
from gradsurgery.report import Report
from gradsurgery.text import warn

#: Steps are a word of the key of the random stream.
MOST_STEPS = 2**63 - 1


class Transaction:
    """The memory of one method: committed by ``step``, proposed by ``backward``, drafted while a call runs.

    Memory is a dict whose values are replaced and never changed in place, so that a draft is a shallow copy. The object
    itself is changed in place: a framework may run a method on an object of its own that shares this one.

    Attributes:
        committed: The memory after the last step.
        proposed: What the next step will commit, or None.
        updated: What the step that is being made commits, until it ends; None outside of it.
        stepped: The last call's proposal went into an update.
        accumulated: Gradients of micro-batches that no call has acted on, or None.
        report: What the last call did.
        loop: How the training loop uses the optimizer.
        names: Names of the losses of this call, absent ones included.
        present: Those that this batch has, (m,).
        writable: A call is running, and a method may learn from it: there is a draft.
        rejected: A call is running that must not be learnt from, and the scaler may see inf and nan.
        flags: What was unusual in this call.
        projections: How many projections it made, or None.
        repeated: Flags of the micro-batches so far, which the report on all of them has too.
    """

    def __init__(self) -> None:
        self.committed: dict[str, Any] = {"step": 0}
        self.proposed: dict[str, Any] | None = None
        self.updated: dict[str, Any] | None = None
        self.stepped = True
        self.accumulated: Accumulated | None = None
        self.report: Report | None = None
        self.loop = misuse.Loop()
        self.names: tuple[str, ...] = ()
        self.present: tuple[str, ...] = ()
        self.writable = False
        self.rejected = False
        self.flags: list[str] = []
        self.projections: int | None = None
        self.repeated: tuple[str, ...] = ()
        self._draft: dict[str, Any] = {}
        self._part: str | None = None
        self._told: set[str] = set()

    # --------------------------------------------------------------------------------- between the calls

    @property
    def learnt(self) -> dict[str, Any]:
        """The memory that belongs to the parameters as they are: what is committed, or is about to be."""
        return self.committed if self.updated is None else self.updated

    def update(self) -> None:
        """The parameters have been updated: what was proposed belongs to them, whatever a hook does now."""
        # What was accumulated has not been acted on: the step was made without.
        if self.proposed is not None and self.accumulated is None:
            self.updated = {**self.proposed, "step": self.proposed["step"] + 1}
            self.proposed, self.stepped = None, True

    def commit(self) -> None:
        """The step has ended."""
        self.committed, self.updated = self.learnt, None

    def discard(self) -> None:
        """Forget what was proposed and what was accumulated."""
        self.proposed, self.accumulated, self.repeated = None, None, ()

    def load(self, memory: dict[str, Any]) -> None:
        """Go on with a memory from elsewhere.

        Args:
            memory: The memory.
        """
        self.discard()
        self.committed, self.updated, self.stepped = memory, None, True

    def revise(self, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Change what is remembered outside of ``backward``.

        A call whose step is still to come gets the same change, or its commit would undo this one. All is computed
        before anything is replaced.

        Args:
            change: From a memory, which it must not change, to the entries that change.
        """
        kinds = ("committed", "updated", "proposed")
        revised = {kind: {**found, **change(found)} for kind in kinds if (found := getattr(self, kind)) is not None}
        for kind, memory in revised.items():
            setattr(self, kind, memory)

    @contextmanager
    def revising(self, names: tuple[str, ...], present: tuple[str, ...]) -> Iterator[None]:
        """Learn something about the last step, after it and outside of ``backward``.

        Args:
            names: Names of the losses.
            present: Those that there is something to learn of.

        Yields:
            Nothing. What is put into the memory meanwhile is committed, unless something raises.
        """
        stepped = self.stepped
        try:
            with self.aside(), self.open(names, present):
                self._draft = dict(self.learnt)
                yield
                self.committed, self.updated = self._draft, None
        finally:
            self.stepped = stepped

    def has_told(self, kind: str) -> bool:
        """Whether the user was warned of something already.

        Args:
            kind: Of what.

        Returns:
            True if so.
        """
        return kind in self._told

    def warn_once(self, kind: str, text: str) -> None:
        """Warn, but not a second time.

        Args:
            kind: Of what.
            text: The warning.
        """
        if kind not in self._told:
            self._told.add(kind)
            warn(text)

    # ------------------------------------------------------------------------------------- within a call

    def open(self, names: tuple[str, ...], present: tuple[str, ...]) -> Transaction:
        """Draft a memory. It becomes the proposal if nothing raises and the call was not rejected.

        Args:
            names: Names of the losses, absent ones included.
            present: Those that this batch has.

        Returns:
            A context, at whose end the draft is closed.
        """
        self._draft = dict(self.learnt if self.proposed is None else self.proposed)
        self.names, self.present, self.flags, self.projections = names, present, [], None
        self.writable, self.rejected, self.stepped = True, False, False
        return self

    @property
    def is_open(self) -> bool:
        """Whether a call is running."""
        return self.writable or self.rejected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.rejected:
            self.proposed = self._draft
        self.writable, self.rejected, self._draft = False, False, {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Put what was proposed aside, and back at the end.

        Yields:
            Nothing.
        """
        proposed, self.proposed = self.proposed, None
        try:
            yield
        finally:
            self.proposed = proposed

    @contextmanager
    def apart(self, names: tuple[str, ...], keeps: bool) -> Iterator[None]:
        """Draft a memory for a call that is a step of its own, and leave alone what was proposed.

        Args:
            names: Names of the losses, all of them present.
            keeps: Commit the draft, and forget what was proposed, if nothing raises.

        Yields:
            Nothing.
        """
        proposed, self.proposed = self.proposed, None
        try:
            with self.open(names, names):
                yield
            if keeps:
                self.update()
                self.commit()
                proposed = None
        finally:
            self.proposed = proposed

    @property
    def memory(self) -> dict[str, Any]:
        """The draft, or what is learnt so far where there is none; of one group of parameters if one is looked at."""
        memory = self._draft if self.writable else self.learnt
        found: dict[str, Any] = memory if self._part is None else memory[self._part]
        return found

    @property
    def whole(self) -> dict[str, Any]:
        """The draft, or what is learnt so far, of all groups of parameters together."""
        return self._draft if self.writable else self.learnt

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Give one group of parameters a memory of its own.

        Args:
            name: What it is kept under.

        Yields:
            Nothing.
        """
        self._draft[name] = dict(self._draft.get(name, {}))
        self._part = name
        try:
            yield
        finally:
            self._part = None

    def keep(self, key: str, value: Any) -> None:
        """Put an entry into the memory if it has changed, and if this call may be learnt from.

        Args:
            key: Its name.
            value: A collection. An empty one is as good as none.
        """
        if self.writable and value != self.memory.get(key, type(value)()):
            self.memory[key] = value

    def reject(self) -> None:
        """Learn nothing from this call: what it computed should not lead to a step."""
        self.rejected, self.writable = True, False

    def flag(self, what: str) -> None:
        """Note what is unusual in this call.

        Args:
            what: The flag.
        """
        self.flags.append(what)

    def repeat_flags(self) -> None:
        """At the end of a micro-batch that others follow: keep what the report on all of them has to say too."""
        self.repeated = tuple(dict.fromkeys([*self.repeated, *(what for what in self.flags if what == "dropped")]))


def listed(keys: Iterable[object], most: int = 5) -> str:
    """The first few of some keys.

    Args:
        keys: The keys.
        most: How many to show.

    Returns:
        Text.
    """
    shown = list(map(repr, keys))
    return ", ".join([*shown[:most], *(["…"] if len(shown) > most else [])]) or "none"


def wrong_entry(entry: object) -> str:
    """What is wrong with the entry of this library in the state of an optimizer, its memory's contents aside.

    Args:
        entry: The entry.

    Returns:
        The end of a sentence; empty if all is well.
    """
    if not isinstance(entry, Mapping):
        return f"is a {type(entry).__name__}"
    if missing := [key for key in ("class", "version", "memory", "inner") if key not in entry]:
        return f"lacks {', '.join(missing)}"
    if not isinstance(entry["memory"], Mapping):
        return f"has a {type(entry['memory']).__name__} as its 'memory'"
    return "" if "step" in entry["memory"] else "lacks memory['step']"


def wrong_memory(memory: Mapping[Any, Any], known: bool) -> str:
    """What is wrong with the contents of a memory.

    Args:
        memory: The memory of a method, or of one part of the parameters.
        known: It is that of a method of this library, whose every entry is known.

    Returns:
        The end of a sentence; empty if all is well.
    """
    for key, value in memory.items():
        if isinstance(key, str) and key.startswith(("group ", "parameter ")) and isinstance(value, Mapping):
            if wrong := wrong_memory(value, known):
                return wrong
            continue
        kind = KINDS.get(key, "number by name" if known else "plain value")
        if not isinstance(key, str) or not _IS[kind](value):
            return f"has memory[{key!r}] = {_short(value)}, which is no {kind}"
    return ""


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:56]}…"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_row(value: object) -> bool:
    return _by(_is_count, lambda g: isinstance(g, Tensor))(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _by(key: Callable[[object], bool], entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(key, value)) and all(map(entry, value.values()))


def _each(entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(entry, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_name, value)) and len(set(value)) == len(value)


_IS: dict[str, Callable[[object], bool]] = {
    "number by name": _by(_is_name, _is_number),
    f"whole number from 0 to {MOST_STEPS}": _is_count,
    "list of different names": _are_names,
    "list of names": _each(_is_name),
    "list of places": _each(_is_count),
    "list of places by name": _by(_is_name, _each(_is_count)),
    "list of numbers by name": _by(_is_name, _each(_is_number)),
    "table of numbers by name": _by(_is_name, _by(_is_name, _is_number)),
    "row by name": _by(_is_name, _is_row),
    "row": _is_row,
    "text by name": _by(_is_name, _is_name),
    "table of counts by name": _by(_is_name, _by(_is_count, _is_count)),
    "plain value": _is_plain,
}
_COUNT = f"whole number from 0 to {MOST_STEPS}"

#: Entries that are no number for each loss.
KINDS = {
    "step": _COUNT,
    "tasks": "list of different names",
    "order": "list of different names",
    "last_private": "list of places",
    "nonzero": "list of places by name",
    "reached": "list of places by name",
    "updates": _COUNT,
    "seen": _COUNT,
    "epochs": _COUNT,
    "tracked": "row by name",
    "average": "row by name",
    "momentum": "row by name",
    "last": "row by name",
    "roots": "row by name",
    "exp_avg": "row by name",
    "exp_avg_sq": "row by name",
    "exp_norm": "row by name",
    "exp_count": "table of counts by name",
    "pseudo": "row",
    "second": "row",
    "targets": "table of numbers by name",
    "winners": "list of names",
    "window": "list of numbers by name",
    "fresh": "list of different names",
    "failed": "list of different names",
    "checked": "text by name",
}
