"""The communicators of several processes."""

from __future__ import annotations

import atexit
import gc
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.communication import shards
from gradsurgery.communication.alone import Agreement, Communicator

# The names that newer versions of torch have for what older ones call otherwise.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: The groups that somebody works with.
_groups: weakref.WeakKeyDictionary[Any, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def hold(owner: Any, group: dist.ProcessGroup) -> None:
    """Keep the group that an object works with until the interpreter begins to end, or the object is gone.

    Whoever is last to release a gloo group waits for its threads, and these need the interpreter's lock as long as one
    of them still has a tensor. The reducer of DistributedDataParallel holds the lock while it waits, and never returns.
    While modules are torn down nobody gets the lock any more, and the process aborts. Python code that runs can release
    the group safely.

    Args:
        owner: The object.
        group: The process group.
    """
    _groups[owner] = group


def held(owner: Any) -> dist.ProcessGroup | None:
    """The group that is kept for an object.

    Args:
        owner: The object.

    Returns:
        The group; None if there is none.
    """
    return _groups.get(owner)


@atexit.register
def _release() -> None:
    groups = list(_groups.values())
    if groups:
        gc.collect()  # models that nobody has any more go before their group
        _groups.clear()
        groups.clear()
        time.sleep(0.05)  # a thread that has just finished takes the lock once more, to put its tensors away


class Processes(Communicator):
    """The processes that train one model together, each on its part of the batch.

    Every number that decides anything is the same on all of them: it is added up over the processes, or sent by the
    first one. All of them must therefore make the same calls in the same order.

    Args:
        group: The process group.
        owner: The class that errors should name.
    """

    is_alone = False
    slices = True
    in_place = False

    def __init__(self, group: dist.ProcessGroup, owner: str) -> None:
        self.group = group
        self.owner = owner
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.first_rank = dist.get_global_rank(group, 0)
        # The backend decides where tensors must lie; gloo takes those of the host.
        backend = str(dist.get_backend(group))
        self._device = None if "nccl" in backend and "gloo" not in backend else torch.device("cpu")

    def over(self, params: Sequence[Tensor]) -> Communicator:
        return ShardedProcesses(self.group, self.owner) if shards.sharded(params) else self

    def _home(self, like: torch.device) -> torch.device:
        """Where small tensors of an exchange are put: with the losses, or on the host if the backend works there."""
        return like if self._device is None else self._device

    @property
    def _any_home(self) -> torch.device:
        return self._device or torch.device("cuda")

    def fetch(self, alone: Sequence[Tensor], together: Sequence[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if together:
            device, sizes = alone[0].device, [x.numel() for x in together]
            flat = torch.cat([x.reshape(-1).to(device, torch.float64) for x in together])
            together = self.total(flat).to(device).split(sizes)
        return super().fetch(alone, together)

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

        Raises:
            RuntimeError: The processes passed different losses, or no process has any.
            ValueError: A size is missing or negative.
        """
        self._require_same(names, kind())
        counts, local = np.zeros(len(names)), np.zeros(len(names))
        for name, value in zip(present, values.tolist(), strict=True):
            place = names.index(name)
            counts[place] = self._size_of(name, sizes)
            local[place] = counts[place] * value if counts[place] else 0.0
        both = self.total(torch.from_numpy(np.stack([counts, local])).to(self._home(values.device))).cpu().numpy()
        there = np.flatnonzero(both[0])
        if not len(there) and not may_be_empty:
            raise RuntimeError(f"{self.owner}.backward: every loss is None on every process.")
        values = torch.from_numpy(both[1, there] / both[0, there])
        return Agreement(there.tolist(), values, counts[there] / both[0, there])

    def _size_of(self, name: str, sizes: Mapping[str, float] | float | None) -> float:
        size = sizes.get(name) if isinstance(sizes, Mapping) else 1.0 if sizes is None else sizes
        if size is None or not 0 <= float(size) < float("inf"):
            raise ValueError(
                f"{self.owner}.backward: `batch_size` must be the number of samples on this process, >= 0, or such "
                f"a number for each loss; for {name!r} it is {size!r}."
            )
        return float(size)

    def _require_same(self, names: Sequence[str], kind: str) -> None:
        text = "\n".join([kind, *names])
        header = torch.tensor([len(names), zlib.crc32(text.encode())], dtype=torch.int64)
        lowest, highest = self._extremes(header)
        if torch.equal(lowest, highest):
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (list(names), kind), group=self.group)
        told = "; ".join(f"process {rank}: losses {names}, {kind}" for rank, (names, kind) in enumerate(everyone))
        raise RuntimeError(
            f"{self.owner}.backward: the processes must pass the same losses in the same kind of call, and None for a "
            f"task that is absent on one of them. They passed {told}."
        )

    def _extremes(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([numbers, -numbers]).to(self._any_home)
        dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self.group)
        lowest, highest = both.cpu()
        return lowest, -highest

    def total(self, numbers: Tensor) -> Tensor:
        moved = numbers.to(self._home(numbers.device))
        dist.all_reduce(moved, group=self.group)
        return moved

    def broadcast(self, numbers: np.ndarray, like: torch.device) -> np.ndarray:
        sent = torch.from_numpy(np.ascontiguousarray(numbers)).to(self._home(like))
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.cpu().numpy()

    def added(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray(self.total(torch.from_numpy(numbers).to(self._any_home)).cpu().numpy())

    def any_of(self, marks: Tensor) -> Tensor:
        marks = marks.to(self._any_home)
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self.group)
        return marks.cpu()

    def stacked(self, matrix: np.ndarray) -> np.ndarray:
        m = len(matrix)
        padded = np.zeros((m, m))
        padded[:, : matrix.shape[1]] = matrix
        mine = torch.from_numpy(padded).to(self._any_home)
        everyone = mine.new_empty(self.size * m, m)
        all_gather(everyone, mine, group=self.group)
        blocks = everyone.cpu().numpy().reshape(self.size, m, m)
        below = np.asarray(np.linalg.qr(np.concatenate([b.T for b in blocks]), mode="r"))
        return np.ascontiguousarray(below.T)

    def united(self, masks: Mapping[Tensor, int], params: Sequence[Tensor], m: int) -> dict[Tensor, int]:
        params = list(dict.fromkeys(params))
        if not m:
            return {}
        marks = torch.tensor([[masks.get(p, 0) >> i & 1 for p in params] for i in range(m)], dtype=torch.uint8)
        columns = self.any_of(marks).T.tolist()
        found = {p: sum(bit << i for i, bit in enumerate(column)) for p, column in zip(params, columns, strict=True)}
        return {p: mask for p, mask in found.items() if mask}

    def totals(self, found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        there = self.any_of(torch.tensor([g is not None for g in found], dtype=torch.uint8)).tolist()
        kept = [j for j, mark in enumerate(there) if mark]
        sums: list[Tensor | None] = [None] * len(params)
        for places in grouped([params[j] for j in kept]):
            at = [kept[k] for k in places]
            flat = flattened([found[j] for j in at], [params[j] for j in at])
            dist.all_reduce(flat, group=self.group)
            for j, part in zip(at, flat.split([params[j].numel() for j in at]), strict=True):
                sums[j] = part.view(params[j].shape)
        return sums

    def joined(self, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        result: list[Tensor | None] = []
        for g, p in zip(row, params, strict=True):
            flat = (torch.zeros_like(p) if g is None else g).detach().reshape(-1)
            sizes = torch.zeros(self.size, dtype=torch.int64, device=self._any_home)
            sizes[self.rank] = flat.numel()
            counts = self.total(sizes).tolist()
            padded = flat.new_zeros(max(counts))
            padded[: flat.numel()] = flat
            everyone = flat.new_empty(self.size * max(counts))
            all_gather(everyone, padded, group=self.group)
            result += [part[:n] for part, n in zip(everyone.split(max(counts)), counts, strict=True)]
        return result

    def require_replicas(self, params: Sequence[Tensor]) -> None:
        """Compare the parameters that all processes have whole.

        Args:
            params: The parameters; DTensors are left out.

        Raises:
            RuntimeError: One differs.
        """
        whole = [p.detach() for p in params if not hasattr(p, "device_mesh")]
        if not whole:
            return
        real = [torch.view_as_real(p) if p.is_complex() else p for p in whole]
        sums = [torch.stack([p.double().sum(), p.double().square().sum()]).cpu() for p in real]
        # As integers, so that the comparison is of bits, nan included.
        lowest, highest = self._extremes(torch.stack(sums).view(torch.int64) // 2)
        different = (lowest != highest).any(dim=1).nonzero().flatten().tolist()
        if different:
            raise RuntimeError(
                f"{self.owner}.backward: the replicas differ between processes in {len(different)} of {len(whole)} "
                f"parameters; the first is number {different[0]}, of shape {tuple(whole[different[0]].shape)}. "
                "Something outside this library writes to the parameters, or they started from different values."
            )

    def is_same(self, number: float) -> bool:
        lowest, highest = (x.item() for x in self._extremes(torch.tensor([number], dtype=torch.float64)))
        return bool(highest - lowest <= 1e-3 * max(abs(lowest), abs(highest)))

    def counts(self, p: Tensor) -> bool:
        return self.rank == 0


class ShardedProcesses(Processes):
    """Processes that hold pieces of the parameters as DTensors. Autograd adds their gradients up by itself."""

    is_sharded = True
    slices = False

    def over(self, params: Sequence[Tensor]) -> Communicator:
        return self

    def totals(self, found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        return list(found)

    def local(self, g: Tensor, p: Tensor) -> Tensor:
        return shards.local(shards.placed(g, p))

    def like(self, g: Tensor | None, p: Tensor) -> Tensor | None:
        return shards.like(g, p)

    def lengths(self, pieces: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        device = next((n.device for n in pieces if n is not None), torch.device("cpu"))
        mine = torch.zeros(len(params), dtype=torch.float64, device=device)
        for j, (n, p) in enumerate(zip(pieces, params, strict=True)):
            if n is not None and self.counts(p):
                mine[j] = n
        found = self.total(mine.square()).sqrt().unbind()
        return [None if n is None else whole.to(n) for n, whole in zip(pieces, found, strict=True)]

    def counts(self, p: Tensor) -> bool:
        return shards.counts_here(p, self.rank, self.first_rank)


def grouped(params: Sequence[Tensor]) -> list[list[int]]:
    """Put parameters together that can lie in one flat tensor.

    Args:
        params: The parameters.

    Returns:
        Their places, group by group.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for j, p in enumerate(params):
        groups.setdefault((p.dtype, p.device), []).append(j)
    return list(groups.values())


def flattened(tensors: Sequence[Tensor | None], params: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Put gradients behind each other.

    Args:
        tensors: One gradient per parameter; None counts as zeros.
        params: The parameters, of one dtype and device.
        out: Where to, zeros; by default a new tensor.

    Returns:
        A flat tensor.
    """
    flat = params[0].new_zeros(sum(p.numel() for p in params)) if out is None else out
    for g, part in zip(tensors, flat.split([p.numel() for p in params]), strict=True):
        if g is not None:
            part.view(g.shape).copy_(g.to_dense() if g.is_sparse else g)
    return flat
