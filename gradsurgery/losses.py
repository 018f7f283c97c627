"""What a user may pass as losses, and what a bad one is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurgery.graph import Root
from gradsurgery.graph.torch_private import without_subclasses

#: A scalar loss, a function that returns one or ``None``, or ``None`` for a task that is absent from this batch.
Loss = Tensor | Callable[[], Tensor | None] | None
#: What to do with an entry that is no loss.
_MEASURE = " If it is a metric and not a loss, leave it out."
#: A collection of losses.
Losses = Mapping[str, Loss] | Iterable[Loss] | Tensor


class Tasks(NamedTuple):
    """The losses of one call, in the user's order.

    Attributes:
        names: Names of all tasks, absent ones included.
        present: Names of the tasks that have a loss in this call, (m,).
        tensors: Their scalar losses, (m,).
        roots: Where differentiation starts, (m,): the losses, or places below them in the graph. None where only other
            processes have the loss.
    """

    names: tuple[str, ...]
    present: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    roots: tuple[Root | None, ...]

    def only(self, keep: Sequence[int]) -> Tasks:
        """Leave out tasks, as if the user had passed ``None`` for them.

        Args:
            keep: Positions among the present tasks to keep.

        Returns:
            The remaining tasks.
        """
        return Tasks(
            self.names,
            tuple(self.present[i] for i in keep),
            tuple(self.tensors[i] for i in keep),
            tuple(self.roots[i] for i in keep),
        )


def read(losses: Losses, owner: str, may_be_empty: bool = False, names: Sequence[str] | None = None) -> Tasks:
    """Check the losses and give each its name.

    Args:
        losses: A list, tuple, named tuple or 1-d tensor of scalar losses, or a mapping of names to them. ``None`` marks
            an absent task. Without names the tasks are called "0", "1", ….
        owner: The class that errors should name.
        may_be_empty: Accept that no task is present, since another process may have one.
        names: Names for losses that have none.

    Returns:
        Names and tensors in the order given.

    Raises:
        TypeError: The collection or one of its entries is of a kind that cannot be a loss.
        ValueError: The collection is empty or holds no present task, or a loss is not a scalar, or was passed twice.
        RuntimeError: A loss has no graph.
    """
    where = f"{owner}.backward"
    if isinstance(losses, Tensor):
        losses = _bare(_with_graph(losses, where))
    named = _entries(losses, where)
    if not named:
        raise ValueError(f"{where}: `losses` is empty. Pass at least one loss.")
    if names is not None:
        named = _renamed(named, losses, names, where)
    present = _present(named, where)
    if not present and not may_be_empty:
        raise ValueError(f"{where}: every loss is None. Skip the step when no task is in the batch.")
    checked = _checked(present[:1] if isinstance(losses, Tensor) else present, where)
    checked += [loss for _, loss in present[len(checked) :]]  # the entries of one tensor are all alike
    roots = _edges_of_stack(losses, checked, where) if isinstance(losses, Tensor) else checked
    return Tasks(tuple(n for n, _ in named), tuple(n for n, _ in present), tuple(checked), tuple(roots))


def _with_graph(losses: Tensor, where: str) -> Tensor:
    if losses.dim() != 1:
        raise TypeError(
            f"{where}: `losses` must be a collection of scalar losses, got one tensor of shape "
            f"{tuple(losses.shape)}. Pass a dict, a list or a 1-d tensor with one entry per task."
        )
    if len(losses) and not losses.requires_grad:
        raise _detached(where, "losses")
    return losses


def _entries(losses: Losses, where: str) -> list[tuple[str, Loss]]:
    """The losses of a collection, each with a name."""
    if isinstance(losses, Mapping):
        for name in losses:
            if not isinstance(name, str):
                raise TypeError(f"{where}: names of losses must be strings, got {name!r}.")
        return list(losses.items())
    if isinstance(losses, Tensor):
        with torch.enable_grad():  # around `backward` it may be off
            return [(str(i), loss) for i, loss in enumerate(losses.unbind())]
    if isinstance(losses, Iterable) and not isinstance(losses, (str, bytes)):
        entries = list(losses)
        fields: Sequence[str] = getattr(losses, "_fields", ()) or [str(i) for i in range(len(entries))]
        return list(zip(fields, entries, strict=True))
    raise TypeError(
        f"{where}: `losses` must be a dict, list, tuple or 1-d tensor of scalar losses, got {type(losses).__name__}."
    )


def _present(named: Sequence[tuple[str, Loss]], where: str) -> list[tuple[str, Tensor]]:
    """The losses that are there; functions are called."""
    present = []
    for name, given in named:
        if isinstance(given, torch.nn.Module):
            raise TypeError(
                f"{where}: loss {name!r} is the module {type(given).__name__}, not what it computes. Call it: "
                f"{type(given).__name__}()(outputs, targets)."
            )
        loss = given if isinstance(given, Tensor) or not callable(given) else given()
        if loss is not None:
            present.append((name, loss))
    return present


def _checked(present: Sequence[tuple[str, Tensor]], where: str) -> list[Tensor]:
    """The losses as scalars with a graph, each of which was passed once."""
    first_use: dict[int, str] = {}
    checked = []
    for name, loss in present:
        checked.append(_check(loss, name, where))
        if id(loss) in first_use:
            raise ValueError(
                f"{where}: losses {first_use[id(loss)]!r} and {name!r} are the same tensor object. "
                "Pass each loss once, and weight it if it should count twice."
            )
        first_use[id(loss)] = name
    unreal = [name for (name, _), loss in zip(present, checked, strict=True) if loss.device.type == "meta"]
    if unreal:
        raise ValueError(
            f"{where}: losses on the meta device have no values and no gradients: "
            f"{', '.join(map(repr, unreal))} on meta."
        )
    return checked


def _renamed(named: list[tuple[str, Loss]], losses: Losses, names: Sequence[str], where: str) -> list[tuple[str, Loss]]:
    if isinstance(losses, Mapping):
        raise ValueError(f"{where}: `names` are for losses in a list or a tensor, and a dict has names of its own.")
    given = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in given) or len(set(given)) < len(given):
        raise ValueError(f"{where}: `names` must be strings, each of them once, got {given}.")
    if len(given) != len(named):
        raise ValueError(f"{where}: `names` must have one entry for each of the {len(named)} losses, got {given}.")
    return [(name, loss) for name, (_, loss) in zip(given, named, strict=True)]


def _edges_of_stack(losses: Tensor, entries: list[Tensor], where: str) -> Sequence[Tensor | GradientEdge]:
    # Through torch.stack every loss would reach every other loss's parameters with a gradient of zeros, and no
    # parameter would be private any more. So differentiation starts below the stack.
    node = losses.grad_fn
    if node is not None and node.name() == "StackBackward0":
        for i, (below, _) in enumerate(node.next_functions):
            if below is None:
                raise _detached(where, str(i))
        return [GradientEdge(below, nr) for below, nr in node.next_functions if below is not None]
    return entries


def _bare(loss: Tensor) -> Tensor:
    """A loss as a plain tensor: a subclass may do anything in the arithmetic that follows. DTensors stay."""
    if type(loss) in (Tensor, torch.nn.Parameter) or hasattr(loss, "device_mesh"):
        return loss
    with torch.enable_grad(), without_subclasses():
        return loss.as_subclass(Tensor)


def _check(loss: object, name: str, where: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{where}: loss {name!r} must be a scalar tensor, a function that returns one, or None if absent, got "
            f"{type(loss).__name__}.{_MEASURE if isinstance(loss, (int, float)) else ''}"
        )
    if type(loss) is not Tensor:
        loss = _bare(loss)
    if loss.numel() != 1:
        raise ValueError(
            f"{where}: loss {name!r} must be a scalar, got shape {tuple(loss.shape)}. Reduce it with .mean() or .sum()."
        )
    if not loss.is_floating_point():
        raise TypeError(f"{where}: loss {name!r} must be real floating point, got {loss.dtype}.")
    if not loss.requires_grad:
        raise _detached(where, name)
    if loss.dim() == 0:
        return loss
    with torch.enable_grad():  # around `backward` it may be off
        return loss.reshape(())


def _detached(where: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{where}: loss {name!r} has no graph, so it has no gradient. It was computed or rescaled under "
        "torch.no_grad(), or cut off with .detach() or .item(). Detach only the scale, never the loss. "
        f"If the task is absent from this batch, pass None.{_MEASURE}"
    )


def values(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack the detached values of the losses.

    Args:
        tensors: m scalar losses, possibly of several dtypes and devices.
        device: Where to put the result.

    Returns:
        Their values, (m,), float64. A copy: it owns its memory.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    detached = [t.detach() for t in tensors]
    if {t.device for t in detached} == {device} and len({t.dtype for t in detached}) == 1:
        return torch.stack(detached).double()
    return torch.stack([t.to(device=device, dtype=torch.float64) for t in detached])


def losses_by_group(
    per_sample: Tensor, group_ids: Tensor, groups: Sequence[str] | int | None = None
) -> dict[str, Tensor | None]:
    """Split one head's losses by domain: one loss per group, the mean over its samples.

    The result goes to ``backward`` as it is, so that domains within one batch are treated as tasks.

    Args:
        per_sample: Loss of each sample, (B,), before any reduction, with a graph.
        group_ids: Group of each sample, (B,), integers 0, 1, ….
        groups: Names of the groups 0, 1, … or their number. A group without a sample in this batch then gets ``None``.
            By default the groups of this batch, named by their numbers; a method with state needs the full list.

    Returns:
        Names to scalar losses, in the order of the groups.

    Raises:
        ValueError: The shapes do not match, or an id has no name.

    Example:
        >>> losses = gradsurgery.losses_by_group(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]), groups=3)
        >>> {name: None if loss is None else loss.item() for name, loss in losses.items()}
        {'0': 1.0, '1': None, '2': 4.0}
    """
    if per_sample.dim() != 1 or group_ids.shape != per_sample.shape or group_ids.is_floating_point():
        raise ValueError(
            "losses_by_group: `per_sample` must have shape (B,) and `group_ids` the same shape and integers, got "
            f"{tuple(per_sample.shape)} and {tuple(group_ids.shape)} of {group_ids.dtype}."
        )
    seen = set(group_ids.tolist())
    if groups is None:
        names = {i: str(i) for i in sorted(seen)}
    else:
        names = dict(enumerate(map(str, range(groups) if isinstance(groups, int) else groups)))
    unknown = sorted(seen - set(names))
    if unknown:
        raise ValueError(f"losses_by_group: `group_ids` must be among 0 … {len(names) - 1}, got {unknown}.")
    return {name: per_sample[group_ids == i].mean() if i in seen else None for i, name in names.items()}
