"""What the processes of one training run tell each other within a step."""

from __future__ import annotations

import atexit
import gc
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.losses import Tasks

# The names that newer versions of torch have for what older ones call otherwise.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Those who hold a process group in `_group`.
_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def hold(owner: Any, group: dist.ProcessGroup) -> None:
    """Let an object hold the group that it works with, until the interpreter begins to end.

    Whoever lets go of a gloo group last waits for its threads, and these need the interpreter's lock as long as one of
    them still has a tensor. The reducer of DistributedDataParallel waits with the lock in its hands: for ever. While
    modules are torn down nobody gets the lock any more: the process aborts. Python code that runs lets go well.

    Args:
        owner: The object; its attribute `_group` is set.
        group: The process group.
    """
    owner._group = group
    _holders.add(owner)


@atexit.register
def _let_go() -> None:
    held = [owner._group for owner in list(_holders)]
    if held:
        gc.collect()  # models that nobody has any more go before their group
        for owner in list(_holders):
            owner._group = None
        held.clear()
        time.sleep(0.05)  # a thread that has just finished takes the lock once more, to put its tensors away


class World:
    """The processes that train one model together, each on its part of the batch.

    Every number that decides anything is the same on all of them: it is added up over the processes, or sent by the
    first one. All of them must therefore make the same calls in the same order.

    Args:
        group: The process group.
        owner: The class that errors should name.
    """

    def __init__(self, group: dist.ProcessGroup, owner: str) -> None:
        self.group = group
        self.owner = owner
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.first_rank = dist.get_global_rank(group, 0)
        # The backend decides where tensors must lie; gloo takes those of the host.
        backend = str(dist.get_backend(group))
        self._device = None if "nccl" in backend and "gloo" not in backend else torch.device("cpu")

    def device(self, like: torch.device) -> torch.device:
        """Where the small tensors of an exchange are put.

        Args:
            like: The device of the losses.

        Returns:
            That device, or the host if the backend works there.
        """
        return like if self._device is None else self._device

    def agree(
        self, tasks: Tasks, values: Tensor, sizes: Mapping[str, float] | float | None, kind: str, may_be_empty: bool
    ) -> tuple[Tasks, np.ndarray, np.ndarray]:
        """Make sure that all processes do the same, and find the losses of the whole batch.

        Args:
            tasks: The losses of this process.
            values: Their values, (m,).
            sizes: How many samples this process has, for each loss or for all; None: as many as the others.
            kind: Describes the call. It must be the same everywhere.
            may_be_empty: Accept that no process has a task.

        Returns:
            The tasks that are present anywhere, with roots ``None`` where this process lacks them; the share of this
            process in each loss, (m,); and the values of the losses over the whole batch, (m,).

        Raises:
            RuntimeError: The processes passed different losses, or no process has any.
            ValueError: A size is missing or negative.
        """
        self._require_same(tasks.names, kind)
        counts = np.zeros(len(tasks.names))
        place = {name: i for i, name in enumerate(tasks.names)}
        for name in tasks.present:
            size = sizes.get(name) if isinstance(sizes, Mapping) else 1.0 if sizes is None else sizes
            if size is None or not 0 <= float(size) < float("inf"):
                raise ValueError(
                    f"{self.owner}.backward: `batch_size` must be the number of samples on this process, >= 0, or such "
                    f"a number for each loss; for {name!r} it is {size!r}."
                )
            counts[place[name]] = float(size)
        local = np.zeros(len(tasks.names))
        for name, value in zip(tasks.present, values.tolist(), strict=True):
            if counts[place[name]]:
                local[place[name]] = counts[place[name]] * value
        device = self.device(values.device)
        both = self.total(torch.from_numpy(np.stack([counts, local])).to(device)).cpu().numpy()
        there = np.flatnonzero(both[0])
        if not len(there) and not may_be_empty:
            raise RuntimeError(f"{self.owner}.backward: every loss is None on every process.")
        shares = counts[there] / both[0, there]
        mine = dict(zip(tasks.present, zip(tasks.tensors, tasks.roots, strict=True), strict=True))
        zero = torch.zeros((), device=values.device)
        names = tuple(tasks.names[i] for i in there)
        found = [mine[name] if share else (zero, None) for name, share in zip(names, shares, strict=True)]
        united = Tasks(tasks.names, names, tuple(t for t, _ in found), tuple(r for _, r in found))
        return united, shares, both[1, there] / both[0, there]

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
        both = torch.stack([numbers, -numbers]).to(self._device or torch.device("cuda"))
        dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self.group)
        lowest, highest = both.cpu()
        return lowest, -highest

    def total(self, numbers: Tensor) -> Tensor:
        """Add up over the processes, in place.

        Args:
            numbers: A dense tensor of the same shape everywhere.

        Returns:
            The sum, the same bits everywhere.
        """
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def first(self, numbers: np.ndarray, like: torch.device) -> np.ndarray:
        """Take the numbers of the first process.

        Args:
            numbers: Float64, of the same shape everywhere.
            like: The device of the losses.

        Returns:
            What the first process passed.
        """
        sent = torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device(like))
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.cpu().numpy()

    def added(self, numbers: np.ndarray) -> np.ndarray:
        """Add numbers up over the processes.

        Args:
            numbers: Any shape, float64.

        Returns:
            The sums.
        """
        return np.asarray(self.total(torch.from_numpy(numbers).to(self._device or torch.device("cuda"))).cpu().numpy())

    def any_of(self, marks: Tensor) -> Tensor:
        """Marks that are set on any process.

        Args:
            marks: Zeros and ones, uint8.

        Returns:
            The union.
        """
        marks = marks.to(self._device or torch.device("cuda"))
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self.group)
        return marks.cpu()

    def stacked(self, matrix: np.ndarray) -> np.ndarray:
        """Square root of the sum of the products of every process: B Bᵀ = Σ Bᵣ Bᵣᵀ.

        Args:
            matrix: Bᵣ, (m, k) with k ≤ m.

        Returns:
            B, (m, m).
        """
        m = len(matrix)
        padded = np.zeros((m, m))
        padded[:, : matrix.shape[1]] = matrix
        mine = torch.from_numpy(padded).to(self._device or torch.device("cuda"))
        everyone = mine.new_empty(self.size * m, m)
        _all_gather(everyone, mine, group=self.group)
        blocks = everyone.cpu().numpy().reshape(self.size, m, m)
        below = np.asarray(np.linalg.qr(np.concatenate([b.T for b in blocks]), mode="r"))
        return np.ascontiguousarray(below.T)

    def united(self, masks: Mapping[Tensor, int], params: Sequence[Tensor], m: int) -> dict[Tensor, int]:
        """Which losses reach each parameter on any process.

        Args:
            masks: Bit masks of this process.
            params: The parameters, the same everywhere.
            m: Number of losses.

        Returns:
            Bit masks of the parameters that any loss reaches.
        """
        params = list(dict.fromkeys(params))
        if not m:
            return {}
        marks = torch.tensor([[masks.get(p, 0) >> i & 1 for p in params] for i in range(m)], dtype=torch.uint8)
        columns = self.any_of(marks).T.tolist()
        found = {p: sum(bit << i for i, bit in enumerate(column)) for p, column in zip(params, columns, strict=True)}
        return {p: mask for p, mask in found.items() if mask}

    def total_each(self, tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
        """Add up a gradient of each parameter over the processes; None counts as zeros.

        Args:
            tensors: One gradient a parameter.
            params: The parameters, the same everywhere.

        Returns:
            Dense sums.
        """
        sums: list[Tensor] = [None] * len(params)  # type: ignore[list-item]
        for places in _alike(params):
            flat = _flattened([tensors[j] for j in places], [params[j] for j in places])
            self.total(flat)
            for j, part in zip(places, flat.split([params[j].numel() for j in places]), strict=True):
                sums[j] = part.view(params[j].shape)
        return sums

    def joined(self, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Put the rows of all processes behind each other. Each may have another number of samples.

        Args:
            row: One gradient for each part of the shared representation.
            params: These parts.

        Returns:
            One flat tensor a part and process.
        """
        result: list[Tensor | None] = []
        for g, p in zip(row, params, strict=True):
            flat = (torch.zeros_like(p) if g is None else g).detach().reshape(-1)
            sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device or torch.device("cuda"))
            sizes[self.rank] = flat.numel()
            counts = self.total(sizes).tolist()
            padded = flat.new_zeros(max(counts))
            padded[: flat.numel()] = flat
            everyone = flat.new_empty(self.size * max(counts))
            _all_gather(everyone, padded, group=self.group)
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
        """Whether all processes have the same number, up to rounding.

        Args:
            number: A finite number.

        Returns:
            True if they do.
        """
        lowest, highest = (x.item() for x in self._extremes(torch.tensor([number], dtype=torch.float64)))
        return bool(highest - lowest <= 1e-3 * max(abs(lowest), abs(highest)))


class Slices:
    """Rows that are spread over the processes: each has the sum of one slice of the columns.

    A row is sent as soon as it is found, while the next loss is differentiated. m rows and one direction travel,
    (m + 1) n numbers in all, where summing the rows everywhere would take twice m n.

    Args:
        world: The processes.
        params: The parameters, of one dtype and device, the same everywhere.
        m: Number of rows.
    """

    def __init__(self, world: World, params: Sequence[Tensor], m: int) -> None:
        self.world = world
        self.params = params
        self.n = sum(p.numel() for p in params)
        self.width = -(-self.n // world.size)
        like = params[0]
        self.rows = torch.empty(m, self.width, dtype=like.dtype, device=like.device)
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, i: int, row: Sequence[Tensor | None]) -> None:
        """Send one row; it travels in the background.

        Args:
            i: Its place.
            row: One gradient a parameter.
        """
        flat = self.rows.new_zeros(self.width * self.world.size)
        _flattened(row, self.params, out=flat[: self.n])
        work = _reduce_scatter(self.rows[i], flat, group=self.world.group, async_op=True)
        self._sent.append((work, flat))
        while len(self._sent) > 2:
            self._wait()

    def _wait(self) -> None:
        work, _ = self._sent.pop(0)
        work.wait()

    def wait(self) -> None:
        """Wait until all rows are there."""
        while self._sent:
            self._wait()

    def take_out(self, places: Sequence[int]) -> Tensor:
        """Take the columns of some parameters out of the rows.

        Args:
            places: Positions of the parameters.

        Returns:
            Those columns of the rows, (m, width), zero elsewhere.
        """
        inside = torch.zeros(self.width * self.world.size, dtype=torch.bool)
        start = 0
        for j, p in enumerate(self.params):
            if j in places:
                inside[start : start + p.numel()] = True
            start += p.numel()
        here = inside[self.world.rank * self.width : (self.world.rank + 1) * self.width].to(self.rows.device)
        out = torch.where(here, self.rows, 0)
        self.rows.masked_fill_(here, 0)
        return out

    def direction(
        self, weights: np.ndarray, late: Tensor | None, factors: np.ndarray, found: Tensor | None = None
    ) -> list[Tensor]:
        """Combine the rows and collect the result.

        Args:
            weights: (m,).
            late: What :meth:`take_out` gave, or None.
            factors: Weights of that, (m,).
            found: The sum of the rows of this process, if it is known already.

        Returns:
            One tensor a parameter.
        """
        wide = torch.promote_types(self.rows.dtype, torch.float32)
        with torch.autocast(self.rows.device.type, enabled=False):  # it would multiply in half precision
            mine = (
                found
                if found is not None
                else torch.from_numpy(weights).to(self.rows.device, wide) @ self.rows.to(wide)
            )
            if late is not None:
                mine += torch.from_numpy(factors).to(self.rows.device, wide) @ late.to(wide)
        mine = mine.to(self.rows.dtype)
        flat = self.rows.new_empty(self.width * self.world.size)
        _all_gather(flat, mine, group=self.world.group)
        parts = flat[: self.n].split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


def alike(params: Sequence[Tensor]) -> bool:
    """Whether parameters can lie in one flat row.

    Args:
        params: Parameters.

    Returns:
        True if they have one dtype, real, and one device.
    """
    return len({(p.dtype, p.device) for p in params}) == 1 and not params[0].is_complex()


def _alike(params: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for j, p in enumerate(params):
        groups.setdefault((p.dtype, p.device), []).append(j)
    return list(groups.values())


def _flattened(tensors: Sequence[Tensor | None], params: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    flat = params[0].new_zeros(sum(p.numel() for p in params)) if out is None else out
    for g, part in zip(tensors, flat.split([p.numel() for p in params]), strict=True):
        if g is not None:
            part.view(g.shape).copy_(g.to_dense() if g.is_sparse else g)
    return flat
