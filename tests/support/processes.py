"""Other processes on this machine, for the tests that need them: all cases of a kind run in one start.

On Linux they are forked from a server that has imported torch and this library, and has done nothing else: a process is
there at once, and as fresh as one that is started from nothing. Elsewhere each one imports for itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Cases = dict[str, Callable[[], None]]

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
# Imports alone, nothing that is called: torch imports its compiler when the first optimizer is made.
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "pytest", "gradsurgery"])


def start(function: Callable[..., None], args: tuple, size: int = 1) -> None:
    """Call `function(rank, *args)` in fresh processes, and wait for them.

    Args:
        function: A function of a module.
        args: What it gets after its rank; it is pickled.
        size: Number of processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first one that failed.
    """
    mp.start_processes(function, args=args, nprocs=size, start_method=METHOD)


def run_cases(
    cases_of: Callable[[int, int], Cases], size: int, folder: Path, names: set[str] | None = None
) -> dict[str, str]:
    """Run cases in `size` processes that form a gloo group.

    Args:
        cases_of: A function of a module, called in every process with its rank and the number of processes. All must
            give the same names in the same order.
        size: Number of processes.
        folder: Where to meet and to write.
        names: Which cases; None: all.

    Returns:
        For every case what went wrong on any rank; an empty text if nothing did.
    """
    start(_process, (cases_of, size, str(folder), names), size)
    told: dict[str, str] = {}
    for rank in range(size):
        for name, text in pickle.loads((folder / f"{rank}.pickle").read_bytes()).items():
            told[name] = told.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
    return told


def wanted(session: pytest.Session, function: str, **params: object) -> set[str]:
    """The cases that this run of the tests is to take, all or those that somebody named.

    Args:
        session: The run.
        function: Name of the test that has one parameter `case`.
        **params: Others that it has, and their values.

    Returns:
        Names of cases.
    """
    calls = [item.callspec.params for item in session.items if getattr(item, "originalname", "") == function]
    return {call["case"] for call in calls if params.items() <= call.items()}


def _process(rank: int, cases_of: Callable[[int, int], Cases], size: int, folder: str, names: set[str] | None) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    told: dict[str, str] = {}
    for name, case in cases_of(rank, size).items():
        if names is not None and name not in names:
            continue
        try:
            case()
            told[name] = ""
        except (Exception, pytest.fail.Exception):  # the latter is no Exception
            told[name] = traceback.format_exc()
        # All begin the next case together, so that a case that failed on one rank only does not run into it.
        dist.barrier()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(told))
    gc.collect()  # models go before their group: torch may wait for ever where a reducer is the last to hold it
    dist.destroy_process_group()


def same_everywhere(tensors: list[torch.Tensor]) -> None:
    """Assert that all processes hold the same bits."""
    for t in tensors:
        everyone = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, t.detach().contiguous())
        for other in everyone:
            assert torch.equal(other, t.detach()), "replicas differ"


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, for as long as the context lasts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
