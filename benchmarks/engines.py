"""Whether `engine="auto"` takes the fastest engine: 40 models it was tuned on, and 12 it has never seen.

Each cell is a model with m private heads. PCGrad makes its backward phase with rows, with ghosts wherever a layer can
be one, and with what "auto" decides by shapes. The three are interleaved; processor time, one thread, lower quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsurgery
from benchmarks.workloads import Multi, machine

ENGINES = ("rows", "ghosts", "auto")
LOSSES = (2, 8, 32, 64)
# What "auto" may cost, over the faster of the two others: in nine cells of ten, and in any.
USUAL, MOST = 1.15, 1.5
# An engine that takes so many times as long as another in the first round is not timed again: that first time stands.
HOPELESS = 3
# Four times as many losses bring ghosts nearer to rows by less than this: where they are farther, they are not tried.
FAR = 12


class Model(NamedTuple):
    """A trunk to be built, and its inputs.

    Attributes:
        family: What kind it is.
        size: How large, in words.
        build: Gives the trunk and the width of its features.
        draw: Gives inputs.
    """

    family: str
    size: str
    build: Callable[[], tuple[nn.Module, int]]
    draw: Callable[[], Tensor]


# ---------------------------------------------------------------------------------------------------- modules


class Residual(nn.Module):
    """x + f(x), or a projection of x where shapes differ."""

    def __init__(self, inside: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inside, self.shortcut = inside, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.inside(x))


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3, width), conv_norm(width, 2 * width, stride=2)
        self.c, self.d = conv_norm(2 * width, 4 * width, stride=2), nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.e, self.f = conv_norm(4 * width, 2 * width), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.g = conv_norm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        up = self.e(torch.cat([b, self.d(self.c(b))], 1))
        return self.g(torch.cat([a, self.f(up)], 1)).mean((2, 3))


class Recurrent(nn.Module):
    """A recurrent net; its last output."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.net = kind(inputs, width, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0][:, -1]


class Vision(nn.Module):
    """A vision transformer."""

    def __init__(self, image: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(torch.zeros((image // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.place)


class Experts(nn.Module):
    """Dense experts behind a gate."""

    def __init__(self, width: int, experts: int, inside: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp([width, inside, width]) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * self.gate(x).softmax(-1)[:, None]).sum(-1)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator in one dimension."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(width, width, modes, 2) / width)
        self.local, self.modes = nn.Conv1d(width, width, 1), modes

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)[..., : self.modes]
        mixed = torch.einsum("bik,iok->bok", spectrum, torch.view_as_complex(self.weights))
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(x))


class Adapted(nn.Module):
    """A frozen linear layer with a trained correction of low rank."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class Mean(nn.Module):
    """Mean over the places of an image or a sequence, (B, C, …) → (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Mixer(nn.Module):
    """A block of an MLP-Mixer."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.within = mlp([tokens, 2 * tokens, tokens]), mlp([width, 2 * width, width])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.second(x))


class GraphNet(nn.Module):
    """Two graph convolutions over one dense adjacency matrix."""

    def __init__(self, nodes: int, width: int) -> None:
        super().__init__()
        near = torch.rand(nodes, nodes) < 0.1
        self.register_buffer("near", near / near.sum(1, keepdim=True).clamp(min=1))
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.near @ torch.relu(self.second(self.near @ torch.relu(self.first(x))))


def mlp(widths: list[int], act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(*(layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), act())))


def conv_norm(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def cnn(width: int) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.ReLU(), Mean())


def resnet(width: int, blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv_norm(3, width)]
    for k in range(blocks):
        i, o = width << max(0, k - 1), width << k
        inside = nn.Sequential(conv_norm(i, o, 1 + (k > 0)), nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
        layers.append(Residual(inside, nn.Conv2d(i, o, 1, 1 + (k > 0))))
    return nn.Sequential(*layers, Mean())


def encoder(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that looks at it."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.net = nn.Transformer(width, 4, depth, depth, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x[:, ::2])


def fno(width: int, modes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, width, 1), *(Spectral(width, modes) for _ in range(4)), Mean())


def lora(width: int, depth: int, rank: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(Adapted(nn.Linear(width, width), rank), nn.GELU()) for _ in range(depth)))


def depthwise(width: int, depth: int) -> nn.Sequential:
    blocks = (nn.Sequential(conv_norm(width, width, groups=width), nn.Conv2d(width, width, 1)) for _ in range(depth))
    return nn.Sequential(nn.Conv2d(3, width, 1), *blocks, Mean())


def dilated(width: int, depth: int) -> nn.Sequential:
    blocks = (nn.Sequential(nn.Conv1d(width, width, 3, 1, 1 << k, 1 << k), nn.ReLU()) for k in range(depth))
    return nn.Sequential(nn.Conv1d(4, width, 1), *blocks, Mean())


# ------------------------------------------------------------------------------------------------------- grid


def family(
    name: str,
    words: str,
    sizes: Sequence[tuple[int, ...]],
    build: Callable[..., tuple[nn.Module, int]],
    draw: Callable[..., Tensor],
) -> list[Model]:
    """Models of one kind.

    Args:
        name: What kind.
        words: What a size is, as a format.
        sizes: The sizes.
        build: Gives the trunk of a size, and the width of its features.
        draw: Gives inputs for it.

    Returns:
        One for each size.
    """
    return [Model(name, words.format(*size), partial(build, *size), partial(draw, *size)) for size in sizes]


#: The models that the rule of "auto" may be tuned on, ten families of four sizes.
TUNED = [
    *family(
        "MLP", "{1} × {0}, batch {2}", ((64, 3, 64), (256, 4, 128), (512, 4, 32), (1024, 3, 256)),
        lambda w, d, b: (mlp([w] * (d + 1)), w), lambda w, d, b: torch.randn(b, w),
    ),
    *family(
        "CNN", "{0} channels, {1}², batch {2}", ((16, 16, 16), (32, 16, 32), (32, 32, 16), (64, 16, 8)),
        lambda w, s, b: (cnn(w), 4 * w), lambda w, s, b: torch.randn(b, 3, s, s),
    ),
    *family(
        "ResNet", "{1} blocks from {0}, {2}², batch {3}",
        ((16, 2, 16, 16), (16, 3, 32, 16), (32, 3, 16, 32), (64, 4, 16, 8)),
        lambda w, k, s, b: (resnet(w, k), w << k - 1), lambda w, k, s, b: torch.randn(b, 3, s, s),
    ),
    *family(
        "U-Net", "{0} channels, {1}², batch {2}", ((8, 16, 8), (16, 16, 8), (16, 32, 4), (32, 32, 4)),
        lambda w, s, b: (UNet(w), w), lambda w, s, b: torch.randn(b, 3, s, s),
    ),
    *family(
        "LSTM", "2 × {0}, {1} steps, batch {2}", ((64, 16, 16), (128, 16, 32), (256, 8, 16), (256, 24, 64)),
        lambda w, t, b: (Recurrent(nn.LSTM, 32, w, 2), w), lambda w, t, b: torch.randn(b, t, 32),
    ),
    *family(
        "ViT", "{1} × {0}, 16 patches, batch {2}", ((64, 2, 8), (128, 4, 8), (192, 6, 8), (192, 6, 32)),
        lambda w, d, b: (Vision(16, 4, w, d), w), lambda w, d, b: torch.randn(b, 3, 16, 16),
    ),
    *family(
        "encoder-decoder", "{1} × {0}, {2} tokens, batch {3}",
        ((64, 1, 16, 8), (128, 2, 16, 8), (128, 2, 64, 4), (256, 2, 16, 8)),
        lambda w, d, t, b: (Seq2Seq(w, d), w), lambda w, d, t, b: torch.randn(b, t, w),
    ),
    *family(
        "MoE", "{1} experts of twice {0}, batch {2}", ((64, 4, 64), (128, 8, 64), (256, 4, 128), (256, 16, 32)),
        lambda w, k, b: (Experts(w, k, 2 * w), w), lambda w, k, b: torch.randn(b, w),
    ),
    *family(
        "FNO", "4 × {0}, {1} modes of {2}, batch {3}",
        ((16, 8, 64, 16), (32, 12, 128, 16), (64, 16, 128, 8), (64, 16, 256, 16)),
        lambda w, k, n, b: (fno(w, k), w), lambda w, k, n, b: torch.randn(b, 2, n),
    ),
    *family(
        "LoRA", "{1} × {0}, rank {2}, batch {3}",
        ((256, 4, 4, 64), (512, 4, 8, 128), (512, 8, 16, 32), (1024, 4, 8, 256)),
        lambda w, d, r, b: (lora(w, d, r), w), lambda w, d, r, b: torch.randn(b, w),
    ),
]  # fmt: skip
#: Twelve models that were fixed before the rule was looked at, and are not tuned on.
UNSEEN = [
    *family("GRU", "2 × {0}, 12 steps, batch 24", ((192,),),
            lambda w: (Recurrent(nn.GRU, 24, w, 2), w), lambda w: torch.randn(24, 12, 24)),
    *family("MLP-Mixer", "{1} × {0}, 32 tokens, batch 8", ((128, 4),),
            lambda w, d: (nn.Sequential(*(Mixer(32, w) for _ in range(d))), w), lambda w, d: torch.randn(8, 32, w)),
    *family("depthwise CNN", "{1} blocks of {0}, 16², batch 8", ((64, 4),),
            lambda w, d: (depthwise(w, d), w), lambda w, d: torch.randn(8, 3, 16, 16)),
    *family("encoder", "{1} × {0}, 48 tokens, batch 4", ((160, 3),),
            lambda w, d: (encoder(w, d), w), lambda w, d: torch.randn(4, 48, w)),
    *family("graph net", "{0} nodes of {1}", ((400, 320),),
            lambda n, w: (GraphNet(n, w), w), lambda n, w: torch.randn(n, w)),
    *family("tanh net", "{1} × {0}, 1000 points", ((256, 5),),
            lambda w, d: (mlp([2, *[w] * d], nn.Tanh), w), lambda w, d: torch.rand(1000, 2)),
    *family("recommender", "table of {0} × {1}, layers of 512 and 256, batch 96", ((20_000, 32),),
            lambda n, w: (nn.Sequential(nn.Embedding(n, w), nn.Flatten(), *mlp([8 * w, 512, 256])), 256),
            lambda n, w: torch.randint(n, (96, 8))),
    *family("point net", "1-d convolutions to {0}, 256 points, batch 8", ((512,),),
            lambda w: (nn.Sequential(nn.Conv1d(3, 64, 1), nn.ReLU(), nn.Conv1d(64, w, 1), nn.ReLU(), Mean()), w),
            lambda w: torch.randn(8, 3, 256)),
    *family("dilated CNN", "{1} × {0} in 1-d, 128 steps, batch 8", ((64, 5),),
            lambda w, d: (dilated(w, d), w), lambda w, d: torch.randn(8, 4, 128)),
    *family("autoencoder", "784-{0}-100-{0}, batch 100", ((400,),),
            lambda w: (mlp([784, w, 100, w]), w), lambda w: torch.randn(100, 784)),
    *family("bottleneck MLP", "{0}-60-{0}-60, batch 50", ((1500,),),
            lambda w: (mlp([w, 60, w, 60]), 60), lambda w: torch.randn(50, w)),
    *family("3-d CNN", "16 to {0} channels, 8³, batch 4", ((64,),),
            lambda w: (nn.Sequential(nn.Conv3d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv3d(16, w, 3, 2), nn.ReLU(), Mean()),
                       w),
            lambda w: torch.randn(4, 1, 8, 8, 8)),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- timing


def cell(model: Model, m: int, engines: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Time one model with m losses.

    Args:
        model: The model.
        m: Number of losses.
        engines: Which to time.
        rounds: How often each engine is timed at most.
        seconds: After how many no further round begins, once there are three.

    Returns:
        Milliseconds for each engine, and what "auto" decided.
    """
    torch.manual_seed(0)
    trunk, width = model.build()
    net, x = Multi(trunk, width, m), model.draw()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizers = {e: gradsurgery.PCGrad(torch.optim.SGD(params, lr=0.0), engine=e) for e in engines}
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    began = time.perf_counter()
    for k in range(rounds + 1):
        if k > 3 and time.perf_counter() - began > seconds:
            break
        for engine, optimizer in optimizers.items():
            if k and times[engine][0] > HOPELESS * min(t[0] for t in times.values()):
                continue
            optimizer.zero_grad()
            losses, _ = net(x)
            start = time.thread_time()
            report = optimizer.backward(losses)
            times[engine].append(1e3 * (time.thread_time() - start))
            optimizer.step()  # what a step has found out about the model, the next one knows
    times = {engine: t[1:] or t for engine, t in times.items()}  # the first one pays for caches
    gc.collect()
    # The lower quartile: what else runs on the machine makes some rounds slow and none fast.
    found = {engine: round(sorted(t)[len(t) // 4], 3) for engine, t in times.items()}
    return {**found, "model": f"{model.family}, {model.size}", "family": model.family, "m": m, "took": report.engine}


def ratio(found: dict[str, Any]) -> float:
    """What "auto" costs over the faster of the two engines."""
    return float(found["auto"]) / min(float(found[engine]) for engine in ENGINES[:2] if engine in found)


def summary(cells: list[dict[str, Any]], name: str) -> str:
    """In how many cells "auto" is as fast as it should be.

    Args:
        cells: The cells.
        name: What they are.

    Returns:
        One line.
    """
    ratios = sorted(map(ratio, cells))
    usual = sum(r <= USUAL for r in ratios)
    return (
        f"{name}: {usual} of {len(ratios)} cells within {USUAL} ({usual / len(ratios):.0%}), worst {ratios[-1]:.2f}, "
        f"median {statistics.median(ratios):.2f}"
    )


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Cells of a run in the place of those that an earlier run has of the same models.

    Args:
        old: What was measured before: runs, and cells by group.
        new: The same, of one run.

    Returns:
        Both, cells in the order of the grid. Runs of which no cell is left are left out.
    """
    groups = {"tuned": TUNED, "unseen": UNSEEN}
    found: dict[str, Any] = {}
    for name, models in groups.items():
        cells = {(c["model"], c["m"]): c for results in (old, new) for c in results.get(name, [])}
        places = {f"{model.family}, {model.size}": k for k, model in enumerate(models)}
        found[name] = sorted(cells.values(), key=lambda c: (places[c["model"]], c["m"]))
    used = {c["run"] for cells in found.values() for c in cells}
    return {"runs": {k: run for k, run in {**old["runs"], **new["runs"]}.items() if k in used}, **found}


def section(results: dict[str, Any]) -> str:
    """The result, as a section of the page on performance.

    Args:
        results: What was measured: cells by group, and the runs that they are of.

    Returns:
        Markdown.
    """
    lines = ["| models | cells | ghosts chosen in | median | worst |", "| --- | ---: | ---: | ---: | --- |"]
    every = [found for name in ("tuned", "unseen") for found in results[name]]
    for name in ("tuned", "unseen"):
        cells = results[name]
        for kind in dict.fromkeys(found["family"] for found in cells):
            mine = [found for found in cells if found["family"] == kind]
            worst = max(mine, key=ratio)
            shown = worst["model"].removeprefix(f"{kind}, ")
            lines.append(
                f"| {kind}{'' if name == 'tuned' else ' (unseen)'} | {len(mine)} "
                f"| {sum(found['took'] == 'ghosts' for found in mine)} "
                f"| {statistics.median(map(ratio, mine)):.2f} | {ratio(worst):.2f}: {shown}, m = {worst['m']} |"
            )
    counts = ", ".join(map(str, sorted({found["m"] for found in every})))
    runs = "; ".join(
        f"{sum(found['run'] == key for found in every)} cells of {key} ({run['commit']}), {run['machine']}, torch "
        f"{run['torch']}, {run['beside']}"
        for key, run in results["runs"].items()
    )
    return (
        f"""
## Whether the fastest engine is taken

`engine="auto"` decides layer by layer, from the shapes, whether to form rows. The table compares the backward phase of
`PCGrad` with `engine="auto"` to the faster of `engine="rows"` and `engine="ghosts"`: time relative to that one, at
{counts} losses.

* {summary(results["tuned"], "Models used to tune the rule")}.
* {summary(results["unseen"], "Models that the rule has not seen")}.

Where "auto" forms rows it does what "rows" does, so any difference from 1 is noise or the time of the decision. Ghosts
that took {HOPELESS} times as long as rows in the first round were timed only once; where they took {FAR} times as long
they were not timed with more losses. Measured with `make bench-engines` on the CPU, with one thread: {runs}.

"""
        + "\n".join(lines)
        + "\n"
    )


def described() -> dict[str, Any]:
    """What is run, and where.

    Returns:
        The commit, the machine, the version of torch, and how many processes wanted a processor when it began.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    beside = f"load {os.getloadavg()[0]:.1f}"
    return {"commit": commit or "no commit", "machine": machine("cpu"), "torch": torch.__version__, "beside": beside}


def main() -> None:
    """Time the grid or a part of it, print it, and keep it if so wished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest model of each family, two losses numbers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one cell after which no round begins")
    parser.add_argument("--only", nargs="+", default=[""], help='models whose name contains one of these, as in "LoRA"')
    parser.add_argument("--losses", type=int, nargs="+", default=list(LOSSES), help="numbers of losses")
    parser.add_argument("--json", type=Path, help="keep the figures here; cells of other models and runs stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups = {"tuned": TUNED, "unseen": UNSEEN}
    counts = args.losses
    if args.quick:
        groups, counts = {"tuned": groups["tuned"][::4], "unseen": groups["unseen"][:2]}, (2, 8)
    run = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    results: dict[str, Any] = {"runs": {run: described()}}
    for name, models in groups.items():
        results[name] = []
        for model in models:
            if not any(part in f"{model.family}, {model.size}" for part in args.only):
                continue
            engines: Sequence[str] = ENGINES
            for m in counts:
                found = cell(model, m, engines, 1 if args.quick else args.rounds, args.seconds) | {"run": run}
                results[name].append(found)
                if found.get("ghosts", 0.0) > FAR * found["rows"]:
                    engines = ("rows", "auto")
                ghosts = found.get("ghosts", math.nan)
                print(
                    f"{found['model']:58} m={m:<3} rows {found['rows']:9.2f}  ghosts {ghosts:9.2f}  "
                    f"auto {found['auto']:9.2f} ({found['took']})  {ratio(found):.2f}",
                    flush=True,
                )
                keep(args.json, results)
    for name in groups:
        if results[name]:
            print(summary(results[name], name))


def keep(path: Path | None, results: dict[str, Any]) -> None:
    """Put a run beside what is kept of earlier ones.

    Args:
        path: Where; None: nowhere.
        results: The run.
    """
    if path is not None:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}
        path.write_text(json.dumps(merged(old, results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
