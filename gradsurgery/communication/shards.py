"""Parameters that are spread over processes as DTensors: everything here works on the local pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# Classes of parameters that are never spread.
_PLAIN = frozenset({Tensor, nn.Parameter})


def local(g: Tensor) -> Tensor:
    """The piece that this process holds.

    Args:
        g: Any tensor.

    Returns:
        The tensor itself if it is not spread.
    """
    spread: Any = g
    piece: Tensor = spread.to_local() if hasattr(g, "device_mesh") else g
    return piece


def placed(g: Tensor, p: Tensor) -> Tensor:
    """Bring a gradient to where its parameter lies. It may be a sum that is not yet added up.

    Args:
        g: A gradient.
        p: Its parameter.

    Returns:
        The gradient with the placements of the parameter.
    """
    spread: Any = g
    home: Any = p
    if hasattr(p, "device_mesh") and spread.placements != home.placements:
        moved: Tensor = spread.redistribute(home.device_mesh, home.placements)
        return moved
    return g


def like(g: Tensor | None, p: Tensor) -> Tensor | None:
    """Give a local piece the form of its parameter.

    Args:
        g: The piece.
        p: The parameter.

    Returns:
        What fits ``p.grad``.
    """
    if g is None or not hasattr(p, "device_mesh"):
        return g
    from torch.distributed.tensor import DTensor

    home: Any = p
    spread: Tensor = DTensor.from_local(
        g, home.device_mesh, home.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return spread


def counts_here(p: Tensor, rank: int, first: int) -> bool:
    """Whether this process is the one, among those that hold the same piece, whose piece counts in a sum.

    Args:
        p: A parameter.
        rank: The place of this process among all of them.
        first: Global rank of the first of them.

    Returns:
        True on exactly one process for each piece. A plain tensor counts on the first.
    """
    if not hasattr(p, "device_mesh"):
        return rank == 0
    spread: Any = p
    place = spread.device_mesh.get_coordinate()
    # Of several meshes with copies of the parameter, the one that has the first process counts.
    if first not in spread.device_mesh.mesh:
        return False
    # _StridedShard is no subclass of Shard, so it is replication that is asked for.
    return all(i == 0 for i, placement in zip(place, spread.placements, strict=True) if placement.is_replicate())


def drawn(numbers: Tensor, p: Tensor) -> Tensor:
    """Cut the local piece out of numbers that every process has whole.

    Args:
        numbers: Of the full shape of the parameter, the same everywhere.
        p: The parameter.

    Returns:
        The piece.
    """
    if not hasattr(p, "device_mesh"):
        return numbers
    from torch.distributed.tensor import distribute_tensor

    spread: Any = p
    return local(distribute_tensor(numbers, spread.device_mesh, spread.placements, src_data_rank=None))


def sharded(params: Sequence[Tensor]) -> list[Tensor]:
    """Parameters of which each process holds a piece, or that a device mesh replicates.

    Args:
        params: Parameters.

    Returns:
        Those that are DTensors.
    """
    if _PLAIN.issuperset(map(type, params)):
        return []
    return [p for p in params if hasattr(p, "device_mesh")]


def pieces(row: Sequence[Tensor | None], params: Sequence[Tensor], rank: int, first: int) -> list[Tensor | None]:
    """The entries of a row that this process puts into a sum over all of them.

    Args:
        row: Local pieces.
        params: The parameters.
        rank: The place of this process.
        first: Global rank of the first process.

    Returns:
        The row, with None for what another process counts.
    """
    return [g if g is not None and counts_here(p, rank, first) else None for g, p in zip(row, params, strict=True)]


def empty(p: Tensor) -> Tensor:
    """A tensor like the local piece of a parameter, to be looked at only for its form.

    Args:
        p: A parameter.

    Returns:
        The parameter itself if it is not spread.
    """
    return local(p.detach()) if hasattr(p, "device_mesh") else p
