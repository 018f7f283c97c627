"""The sections of the run. Each gives rows; what fails or is not reached is a row too."""

from __future__ import annotations

import copy
import gc
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import gradsurgery
from benchmarks import candidates, compiled, steps
from benchmarks.gpu import models
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
TASKS = 4
Row = dict[str, Any]


@dataclass
class Section:
    """One section while it runs.

    Attributes:
        device: Where it runs.
        quick: Only show that the script works: tiny models, few rounds.
        deadline: When it has to end, by ``time.monotonic``.
        rows: What was found.
    """

    device: torch.device
    quick: bool
    deadline: float
    rows: list[Row] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def attempt(self, key: Row, act: Callable[[], Row]) -> None:
        """Add a row.

        Args:
            key: What the row is about.
            act: Finds the rest of it. What it raises is kept as `failed`; where no time is left it is not called.
        """
        if self.left <= 0:
            self.rows.append({**key, "left_out": "no time was left"})
            return
        try:
            self.rows.append({**key, **act()})
        except Exception as error:  # the other rows are worth having
            told = (str(error).strip() or "no message").splitlines()[0][:300]
            self.rows.append({**key, "failed": f"{type(error).__name__}: {told}"})
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ right results

#: Name, method, switches, and how far off the result may be: what is exact by rounding alone.
EXACT, ROUNDED = 2e-4, 2e-2
ENGINES: list[tuple[str, str, dict[str, Any], float]] = [
    ("PCGrad", "PCGrad", {}, EXACT),
    ("PCGrad, rows", "PCGrad", {"engine": "rows"}, EXACT),
    ("PCGrad, ghosts", "PCGrad", {"engine": "ghosts"}, EXACT),
    ("PCGrad, blocks", "PCGrad", {"engine": "blocks"}, EXACT),
    ("PCGrad, streaming", "PCGrad", {"streaming": True, "shuffle": False}, EXACT),
    ("PCGrad, rows on the CPU", "PCGrad", {"row_device": "cpu"}, EXACT),
    ("PCGrad, rows in bfloat16", "PCGrad", {"row_dtype": torch.bfloat16}, ROUNDED),
    ("PCGrad by parameter", "PCGrad", {"granularity": "parameter"}, EXACT),
    ("MGDA", "MGDA", {}, EXACT),
    ("UPGrad, ghosts", "UPGrad", {"engine": "ghosts"}, EXACT),
    ("GradDrop", "GradDrop", {}, EXACT),
    ("GradNormWeighter", "GradNormWeighter", {}, EXACT),
    ("UncertaintyWeighter", "UncertaintyWeighter", {}, EXACT),
    ("UncertaintyWeighter, defer", "UncertaintyWeighter", {"nonfinite": "defer"}, EXACT),
]


def gradient(work: Workload, method: str, switches: dict[str, Any], micro: bool = False) -> list[Tensor]:
    """What a method writes, after one step."""
    candidate = candidates.ours(work, method, **switches)
    optimizer = candidate.optimizer
    assert optimizer is not None
    if micro:
        optimizer.backward([0.5 * loss for loss in candidate.losses()[0]], accumulate=True)
        optimizer.backward([0.5 * loss for loss in work.model(work.x)[0]])
    else:
        optimizer.backward(candidate.losses()[0])
    return [p.grad for p in (*work.shared, *work.private)]


def wide(work: Workload) -> Workload:
    """A copy in float64, on the CPU."""
    model = copy.deepcopy(work.model).cpu().double()
    x = work.x.cpu()
    found = Workload(model, lambda: x.double() if x.is_floating_point() else x, torch.device("cpu"))
    found.shared = [p for p in found.shared if p.requires_grad]
    return found


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖g − g*‖ / ‖g*‖ over all parameters."""
    off = length = 0.0
    for a, b in zip(found, wanted, strict=True):
        off += float((a.cpu().double() - b.double()).square().sum())
        length += float(b.double().square().sum())
    return float((off / length) ** 0.5)


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions without TF32, which has ten bits."""
    # Before torch 2.9 there is one switch for all of cuDNN.
    new = hasattr(torch.backends.cudnn, "conv")
    switch: Any = torch.backends.cudnn.conv if new else torch.backends.cudnn
    name, off = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = getattr(switch, name)
    setattr(switch, name, off)
    try:
        yield
    finally:
        setattr(switch, name, before)


def results(section: Section) -> None:
    """Every engine on the device, against rows in float64 on the CPU."""
    plain = {"engine", "row_device", "row_dtype", "nonfinite"}
    for name, build in list(models.SMALL.items())[: 1 if section.quick else None]:
        work = models.workload(build, TASKS, section.device)
        reference = wide(work)
        cases = [(*case, False) for case in ENGINES] + [("PCGrad, micro-batches", "PCGrad", {}, EXACT, True)]
        for title, method, switches, most, micro in cases:

            def compare(
                method=method, switches=switches, most=most, micro=micro, work=work, reference=reference
            ) -> Row:
                exact = {k: v for k, v in switches.items() if k not in plain}
                if method == "PCGrad" and "streaming" not in switches:  # which is another method
                    exact["engine"] = "rows"
                with full_precision():
                    off = distance(gradient(work, method, switches, micro), gradient(reference, method, exact))
                row: Row = {"distance": off, "most": most}
                return row if off <= most else {**row, "failed": f"it is off by {off:.2g}, and may be by {most:g}"}

            section.attempt({"model": name, "candidate": title}, compare)


# -------------------------------------------------------------------------------------------------------------- tests


def marked_files() -> list[str]:
    """The files of tests that need a GPU, the smallest first."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.cuda" in path.read_text("utf-8")]
    return [str(path.relative_to(ROOT)) for path in sorted(found, key=lambda path: path.stat().st_size)]


def tests(section: Section) -> None:
    """The tests that need a GPU, in a process of their own."""
    files = marked_files()[: 1 if section.quick else None]
    options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "-rfE", *(["--collect-only"] if section.quick else [])]
    failed: list[Row] = []

    def run() -> Row:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(section.left, 1.0),
        )
        lines = (done.stdout.strip() or done.stderr.strip() or "nothing was printed").splitlines()
        wrong = [line.partition(" ")[2] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        failed.extend({"file": line.partition(" - ")[0], "failed": line.partition(" - ")[2]} for line in wrong)
        row: Row = {"result": lines[-1]}
        fine = done.returncode in (0, 5)  # 5: there are no such tests
        return row if fine or failed else {**row, "failed": lines[-1]}

    section.attempt({"file": ", ".join(files)}, run)
    section.rows += failed


# ----------------------------------------------------------------------------------------------------- compiled models


def compiled_models(section: Section) -> None:
    """``torch.compile(mode="reduce-overhead")``: right results where graphs are replayed, and times."""
    how: dict[str, Any] = {"backend": "aot_eager"} if section.quick else {"mode": "reduce-overhead"}
    torch._functorch.config.donated_buffer = False  # surgery runs a compiled backward several times
    replayed: list[tuple[str, dict[str, Any]]] = [
        ("PCGrad", {"engine": "rows"}),
        ("UncertaintyWeighter", {"nonfinite": "defer"}),
        ("FixedWeighter", {"nonfinite": "defer"}),
        ("UPGrad", {}),
    ]
    for method, switches in replayed[: 2 if section.quick else None]:

        def compare(method=method, switches=switches) -> Row:
            torch._dynamo.reset()
            works = [models.workload(models.NARROW["MLP 4 x 64, batch 64"], TASKS, section.device) for _ in range(2)]
            eager, other = works
            forward = torch.compile(lambda x: other.model(x)[0], **how)
            furthest = 0.0
            optimizers = [
                getattr(gradsurgery, method)(torch.optim.SGD([*w.shared, *w.private], lr=1e-3), **switches)
                for w in works
            ]
            for _ in range(5):
                x = torch.randn(64, 64, device=section.device)
                torch.compiler.cudagraph_mark_step_begin()
                for optimizer, losses in zip(optimizers, (eager.model(x)[0], forward(x)), strict=True):
                    optimizer.zero_grad()
                    optimizer.backward(losses)
                    optimizer.step()
                grads = [[p.grad for p in (*w.shared, *w.private)] for w in works]
                furthest = max(furthest, distance(grads[1], [g.cpu() for g in grads[0]]))
            row: Row = {"distance": furthest, "most": EXACT}
            return row if furthest <= EXACT else {**row, "failed": f"it is off by {furthest:.2g} from eager steps"}

        section.attempt({"model": "MLP 4 x 64", "candidate": f"{method} {switches or ''}".strip()}, compare)
    options = Namespace(
        device=str(section.device),
        rounds=2 if section.quick else 30,
        backend=how.get("backend", "inductor"),
        mode=how.get("mode"),
    )
    for name in ["MLP 2 x 64"] if section.quick else ["MLP 4 x 512", "transformer"]:
        timed: list[Row] = []

        def clock(name=name, timed=timed) -> Row:
            timed += compiled.measure(name, options)
            return {"rows": len(timed)}

        section.attempt({"model": name, "candidate": "times"}, clock)
        section.rows += timed


# ------------------------------------------------------------------------------------------------------ time and memory

WANTED = [
    "plain sum", "floor", "PCGrad", 'UncertaintyWeighter, "defer"', "TorchJD, mtl_backward",
    'PCGrad, engine="rows"', 'PCGrad, engine="blocks"', "UPGrad", "FixedWeighter", "UncertaintyWeighter",
    "TorchJD, sequential", "TorchJD, vmapped", "TorchJD, Gramian accumulation", "TorchJD, autogram",
]  # fmt: skip


def large(section: Section) -> None:
    """Step times and peak memory at GPU sizes, peers among them."""
    count = len(models.LARGE)
    for k, (name, (_, build, tiny)) in enumerate(models.LARGE.items()):
        until = section.left / (count - k)
        held: list[Any] = []
        section.attempt(
            {"model": name, "candidate": "the model"},
            lambda build=build, tiny=tiny, held=held: _held(held, tiny if section.quick else build, section.device),
        )
        if not held:
            continue
        work, found = held[0], []
        peaks: dict[str, int] = {}
        everyone = candidates.candidates(work)
        everyone.append(candidates.ours(work, "UncertaintyWeighter", 'UncertaintyWeighter, "defer"', nonfinite="defer"))
        for candidate in everyone:
            if candidate.name not in WANTED[: 5 if section.quick else None]:
                continue

            def weigh(candidate=candidate, peaks=peaks, found=found, work=work) -> Row:
                candidate.run(*candidate.losses())  # which tunes and allocates once
                losses, features = candidate.losses()
                peaks[candidate.name] = steps.peak_bytes(lambda: candidate.run(losses, features), work.device)
                found.append(candidate)
                return {"memory": peaks[candidate.name] / work.size}

            section.attempt({"model": name, "candidate": candidate.name}, weigh)
            for p in (*candidate.work.shared, *candidate.work.private):
                p.grad = None
        if {"floor", "plain sum"} <= peaks.keys():
            times = steps.clock(found, 2 if section.quick else 12, max(1.0, until / 2))
            for row in section.rows:
                if row["model"] == name and row["candidate"] in times and "failed" not in row:
                    row.update(steps.figures(times[row["candidate"]], times["floor"], times["plain sum"]))
        del work, found, everyone
        held.clear()


def _held(held: list[Any], build: Callable[[], models.Drawn], device: torch.device) -> Row:
    work = models.workload(build, TASKS, device)
    held.append(work)
    return {"parameters": sum(p.numel() for p in work.shared), "tasks": TASKS}


# ------------------------------------------------------------------------------------------------- waits and kernels

KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("FixedWeighter", "FixedWeighter", {}),
    ("FixedWeighter, defer", "FixedWeighter", {"nonfinite": "defer"}),
    ("UncertaintyWeighter", "UncertaintyWeighter", {}),
    ("UncertaintyWeighter, defer", "UncertaintyWeighter", {"nonfinite": "defer"}),
    ("GradNormWeighter", "GradNormWeighter", {}),
    ("PCGrad", "PCGrad", {}),
    ("PCGrad, rows", "PCGrad", {"engine": "rows"}),
    ("PCGrad, ghosts", "PCGrad", {"engine": "ghosts"}),
    ("PCGrad, blocks", "PCGrad", {"engine": "blocks"}),
    ("PCGrad, streaming", "PCGrad", {"streaming": True, "shuffle": False}),
    ("MGDA", "MGDA", {}),
    ("GradDrop", "GradDrop", {}),
]
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def waits(section: Section) -> None:
    """How often the host waits for the device in one backward phase, and how many kernels are launched."""
    work = models.workload(models.NARROW["MLP 8 x 128, batch 256"], TASKS, section.device)
    plain = candidates.candidates(work)[:2]
    kinds = KINDS[: 4 if section.quick else None]
    found = [*plain, *(candidates.ours(work, method, title, **switches) for title, method, switches in kinds)]
    for candidate in found:
        section.attempt({"model": "MLP 8 x 128", "candidate": candidate.name}, lambda c=candidate: counted(c))


def counted(candidate: candidates.Candidate) -> Row:
    """Waits and kernels of one call, after three that warm up.

    Args:
        candidate: Who is counted.

    Returns:
        Counts. Off CUDA there are no kernels and no waits; operators are counted everywhere.
    """
    device = candidate.work.device
    for _ in range(3):
        candidate.run(*candidate.losses())
    row: Row = {}
    if device.type == "cuda":
        losses, features = candidate.losses()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                candidate.run(losses, features)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row["waits"] = sum("synchronizing" in str(w.message) for w in told)
    losses, features = candidate.losses()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        steps.wait(device)
        with record_function("backward phase"):
            candidate.run(losses, features)
        steps.wait(device)
    events = profiler.events()
    assert events is not None
    spans = [e.time_range for e in events if e.name == "backward phase" and e.device_type == DeviceType.CPU]
    inside = [e for e in events if spans[0].start <= e.time_range.start <= spans[0].end]
    row["operators"] = sum(e.name.startswith("aten::") for e in inside)
    if device.type == "cuda":
        there = [e for e in events if e.device_type == DeviceType.CUDA and e.name != "backward phase"]
        row["kernels"] = sum(not e.name.startswith(("Memcpy", "Memset")) for e in there)
        row["copies to the host"] = sum(e.name.startswith("Memcpy DtoH") for e in there)
        row["calls that wait"] = sum(e.name in SYNCS for e in inside)
    return row


# ----------------------------------------------------------------------------------------------------- batched passes


def batched(section: Section) -> None:
    """m passes through the trunk one after the other, against one pass that ``vmap`` batches."""
    cells = [(name, m) for m in ((4,) if section.quick else (4, 16)) for name in models.NARROW]
    cells = cells[: 1 if section.quick else None]
    for k, (name, tasks) in enumerate(cells):

        def measure(name=name, tasks=tasks, k=k) -> Row:
            work = models.workload(models.NARROW[name], tasks, section.device)
            return against(work, section.left / (len(cells) - k))

        section.attempt({"model": name, "tasks": tasks}, measure)


def against(work: Workload, seconds: float, rounds: int = 30) -> Row:
    """Time both, and compare their rows.

    Args:
        work: The model.
        seconds: After which no other round begins, if there were three.
        rounds: How many there are at most.

    Returns:
        Milliseconds, their ratio, and how far the rows are apart.

    Raises:
        RuntimeError: The rows differ.
    """

    def one_by_one(losses: list[Tensor], z: Tensor) -> list[Tensor]:
        rows = [torch.autograd.grad(loss, work.shared, retain_graph=True) for loss in losses]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def together(losses: list[Tensor], z: Tensor) -> list[Tensor]:
        # The heads first, each by itself: they are short. Then the trunk once, with a cotangent for each loss.
        starts = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses])
        return list(torch.autograd.grad(z, work.shared, starts, retain_graph=True, is_grads_batched=True))

    ours = candidates.ours(work, "PCGrad")
    spent: dict[str, list[float]] = {"one by one": [], "together": [], "PCGrad": []}
    runs: dict[str, Callable[..., Any]] = {"one by one": one_by_one, "together": together, "PCGrad": ours.run}
    begin = time.monotonic()
    for k in range(rounds):
        if k > 2 and time.monotonic() - begin > seconds:
            break
        for name, run in runs.items():
            losses, z = ours.losses()
            steps.wait(work.device)
            start = time.perf_counter()
            run(losses, z)
            steps.wait(work.device)
            spent[name].append(time.perf_counter() - start)
    losses, z = ours.losses()
    assert z is not None
    off = distance(together(losses, z), [g.cpu() for g in one_by_one(losses, z)])
    if not off < EXACT:
        raise RuntimeError(f"the rows of the batched pass are off by {off:.2g}")
    ratios = [b / a for a, b in zip(spent["one by one"][1:], spent["together"][1:], strict=True)]
    return {
        **{f"milliseconds, {name}": statistics.median(times[1:]) * 1e3 for name, times in spent.items()},
        "to_one_by_one": statistics.median(ratios),
        "distance": off,
    }


#: Title, what it does, and its share of the time.
SECTIONS: dict[str, tuple[str, Callable[[Section], None], float]] = {
    "results": ("Right results", results, 0.12),
    "tests": ("Tests", tests, 0.18),
    "compiled": ("Compiled models", compiled_models, 0.2),
    "large": ("Time and memory", large, 0.36),
    "waits": ("Waits and kernels", waits, 0.07),
    "batched": ("Batched passes below the trunk", batched, 0.07),
}
