"""What inner products of the gradients of all samples cost, beside one plain backward pass.

    python -m benchmarks.per_sample [--quick] [--rounds 7]

All ways take turns within a round, in another order each time, and each timed call comes after an untimed plain step: a
call that allocates much slows whatever follows it. Times are those of one thread on the processor, without the forward
pass but for ``vmap``, which makes its own; the medians of the ratios of one round to the plain backward pass of that
round are printed. The exact check, which comes once in a hundred steps, is a column of its own. Weights are given, so
that no solver is timed. Peaks are resident memory above that before the step, where the system tells it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery


class Given(gradsurgery.surgery.base.Surgery):
    """Weights that cost nothing."""

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.linspace(0.5, 1.5, len(gram))


class Transformer(nn.Module):
    """64 tokens, width 128, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(1000, 128), nn.Parameter(torch.zeros(1, 64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(x) + self.positions).mean(1))


def mlp() -> nn.Module:
    widths = (256, 1024, 1024, 512)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def words(m: int) -> Tensor:
    return torch.randint(0, 1000, (m, 64))


#: Model, inputs, and the numbers of samples.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "MLP": (mlp, lambda m: torch.randn(m, 256), (64, 128, 256, 512)),
    "CNN": (cnn, lambda m: torch.randn(m, 3, 32, 32), (64, 128, 256)),
    "transformer": (Transformer, words, (64, 128)),
}
#: The other ways are timed up to so many samples.
MOST_OF_OTHERS = 64


class Workload:
    """A model and a batch, and every way to differentiate it.

    Args:
        build: Makes the model.
        inputs: Makes the inputs.
        m: Number of samples.
    """

    def __init__(self, build: Callable[[], nn.Module], inputs: Callable[[int], Tensor], m: int) -> None:
        torch.manual_seed(0)
        self.net, self.x, self.m = build(), inputs(m), m
        self.y = torch.randint(0, 10, (m,))
        self.params = list(self.net.parameters())
        self.methods = {mode: Given(torch.optim.SGD(self.params, lr=0.0)) for mode in ("keep", "rerun", "check")}
        for mode, method in self.methods.items():  # the first step is checked
            method.backward(self.losses(), per_sample="keep" if mode == "check" else mode)
            method.step()
            method.zero_grad()
        self.twin, self.engine = copy.deepcopy(self.net), None  # TorchJD's hooks stay on a model of its own

    def losses(self, way: str = "") -> Tensor:
        if way == "autogram" and self.engine is None:
            from torchjd.autogram import Engine

            self.engine = Engine(self.twin, batch_dim=0)
        net = self.twin if way == "autogram" else self.net
        return F.cross_entropy(net(self.x), self.y, reduction="none")

    def plain(self, losses: Tensor) -> None:
        losses.sum().backward()

    def keep(self, losses: Tensor) -> None:
        self.methods["keep"].backward(losses, per_sample="keep")

    def rerun(self, losses: Tensor) -> None:
        self.methods["rerun"].backward(losses, per_sample="rerun")

    def check(self, losses: Tensor) -> None:
        """A step with the exact check."""
        method = self.methods["check"]
        method.transaction.committed = {**method.transaction.committed, "checked": {}}
        method.backward(losses, per_sample="keep")

    def autogram(self, losses: Tensor) -> None:
        """The Gram matrix of TorchJD, and a weighted pass."""
        gram = self.engine.compute_gramian(losses)  # type: ignore[attr-defined]
        losses.backward(torch.linspace(0.5, 1.5, len(gram)))

    def vmap(self, losses: Tensor) -> None:
        """Rows by ``vmap(grad)``, their products, and their weighted sum."""
        params = {name: p.detach() for name, p in self.net.named_parameters()}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            out = torch.func.functional_call(self.net, params, (x[None],))
            return F.cross_entropy(out, y[None])

        rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, self.x, self.y)
        weights = torch.linspace(0.5, 1.5, self.m)
        gram = torch.zeros(self.m, self.m)
        for (_, g), p in zip(rows.items(), self.params, strict=True):
            flat = g.flatten(1)
            gram += flat @ flat.T
            p.grad = (weights @ flat).view(p.shape)

    def clear(self) -> None:
        for p in (*self.params, *self.twin.parameters()):
            p.grad = None

    def timed(self, way: str) -> float:
        """Seconds of one thread."""
        self.plain(self.losses())
        self.clear()
        losses = self.losses(way)
        start = time.process_time()
        getattr(self, way)(losses)
        took = time.process_time() - start
        del losses
        self.clear()
        return took


def resident() -> int:
    """Resident memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(run: Callable[[], None]) -> float:
    """The highest resident memory during a call above that before, MiB."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what was freed before would be used again unseen
        libc.malloc_trim(0)
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(0, most[0] - before) / 2**20


def measured(name: str, m: int, rounds: int, others: bool) -> dict[str, float]:
    """Ratios to plain, and the time of plain in milliseconds.

    Args:
        name: The model.
        m: Number of samples.
        rounds: How often everything is timed.
        others: Time autogram and vmap too.

    Returns:
        By the name of the way.
    """
    build, inputs, _ = MODELS[name]
    workload = Workload(build, inputs, m)
    ways = ["plain", "keep", "rerun", "check", *(["autogram", "vmap"] if others else [])]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            times[way].append(workload.timed(way))
    plain = times["plain"]
    found = {way: statistics.median(a / b for a, b in zip(times[way], plain, strict=True)) for way in ways[1:]}
    return {"plain, ms": 1e3 * statistics.median(plain), **found}


def peaks(name: str, m: int) -> dict[str, float]:
    """Peak memory of each way, MiB.

    Args:
        name: The model.
        m: Number of samples.

    Returns:
        By the name of the way.
    """
    build, inputs, _ = MODELS[name]
    workload = Workload(build, inputs, m)
    found = {}
    for way in ("plain", "keep", "rerun"):
        workload.clear()
        losses = workload.losses()
        found[way] = peak(lambda way=way, losses=losses: getattr(workload, way)(losses))  # type: ignore[misc]
        del losses
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the tables.

    Args:
        arguments: The command line; by default the real one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the smallest batch of the MLP and the CNN, two rounds")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--memory", action="store_true", help="peaks instead of times")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # of vmap, which is what is measured
    for name, (_, _, sizes) in MODELS.items():
        if args.only not in (None, name) or (args.quick and name == "transformer"):
            continue
        for m in (16,) if args.quick else sizes:
            if args.memory:
                found = peaks(name, m)
            else:
                found = measured(name, m, 2 if args.quick else args.rounds, m <= MOST_OF_OTHERS)
            row = "  ".join(f"{way} {value:.2f}" for way, value in found.items())
            print(f"{name:11}  m {m:3}  {row}", flush=True)


if __name__ == "__main__":
    main()
