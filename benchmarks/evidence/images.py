"""Problems on images that come with scikit-learn: find and read digits, overlapping digits, photographs in the dark."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.problem import (
    Losses,
    Problem,
    SharedTrunk,
    Split,
    Start,
    chosen,
    class_loss,
    mlp,
    seeded,
    wrong,
)
from gradsurgery import label_entropy
from gradsurgery.cli import demo
from gradsurgery.problems import digits
from gradsurgery.problems.digits import PIXELS, Scenes

# ------------------------------------------------------------------------------------------- a digit on a canvas


def coarse(scenes: Scenes) -> Scenes:
    """The scenes of the demo at half the resolution, as numbers around 0: harder to read, and cheaper."""
    return scenes._replace(images=F.avg_pool2d(scenes.images.float() / 127.5 - 1.0, 2))


@functools.lru_cache(maxsize=8)
def _training_scenes(seed: int) -> Scenes:
    return coarse(digits.paste(digits.source("train"), 4000, 10 + seed))


@functools.lru_cache(maxsize=1)
def _held_out_scenes() -> dict[str, Scenes]:
    validation, test = demo.held_out_scenes()
    return {"validation": coarse(validation.part(0, 500)), "test": coarse(test.part(0, 1000))}


class Finder(nn.Module):
    """A smaller relative of `digits.DigitFinder`: the class by the largest feature anywhere, the box by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_block(1, 12, 5, 2), *_block(12, 24, 3), *_block(24, 24, 3))
        self.digit = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 10))
        self.box = nn.Sequential(nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.digit(features), PIXELS * torch.sigmoid(self.box(features))


def _block(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


FIND_STEPS = 120


def find(seed: int) -> Start:
    scenes = _training_scenes(seed)
    with seeded(seed):
        model = Finder()
    order = chosen(len(scenes.labels), FIND_STEPS, 32, seed)

    def losses(step: int, draw: int) -> Losses:
        rows = order[step, draw]
        batch = Scenes(*(field[rows] for field in scenes))
        return digits.losses(model(batch.images), batch)

    @torch.no_grad()
    def errors(split: Split) -> dict[str, float]:
        held_out = _held_out_scenes()[split]
        model.eval()
        scores, boxes = model(held_out.images)
        return {
            "class": wrong(scores, held_out.labels),
            "box": 1.0 - float(digits.iou(boxes, held_out.boxes).mean()),
        }

    priors = {
        "class": label_entropy(torch.bincount(scenes.labels).tolist()),
        "box": float(scenes.boxes.var(dim=0, correction=0).sum()),
    }
    return Start(model, [model.trunk[-3].weight], losses, errors, priors)


# ------------------------------------------------------------------------------------------- overlapping digits

PLACES = ("left", "middle", "right")


def overlapping(
    split: Literal["train", "validation", "test"], many: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Digits side by side, each half over its neighbour, where the darker ink wins; as in MultiMNIST.

    Args:
        split: Where the digits are from; no digit is in two splits.
        many: Digits in an image.
        count: Number of images.
        seed: The same seed gives the same images.

    Returns:
        Images, (count, 10 · (4 many + 4)), and labels from left to right, (count, many).
    """
    source = digits.source(split)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(source.labels), (count, many), generator=generator)
    down = torch.randint(3, (count, many), generator=generator)
    canvas = torch.zeros(count, 10, 4 * many + 4)
    everyone = torch.arange(count)[:, None]
    for i in range(many):
        rows = down[:, i, None] + torch.arange(8)
        part = canvas[:, :, 4 * i : 4 * i + 8]
        part[everyone, rows] = torch.maximum(part[everyone, rows], source.ink[which[:, i]])
    return canvas.flatten(1), source.labels[which]


@functools.lru_cache(maxsize=16)
def _overlapping(split: Literal["train", "validation", "test"], many: int, seed: int) -> tuple[Tensor, Tensor]:
    return overlapping(split, many, 4000 if split == "train" else 1500, seed)


READ_STEPS = 100


def read(seed: int, many: int) -> Start:
    images, labels = _overlapping("train", many, 20 + seed)
    names = (PLACES[0], PLACES[2]) if many == 2 else PLACES
    with seeded(seed):
        model = SharedTrunk(mlp([images.shape[1], 64, 64]), 64, dict.fromkeys(names, 10))
    order = chosen(len(images), READ_STEPS, 64, seed)

    def losses(step: int, draw: int) -> Losses:
        rows = order[step, draw]
        scores = model(images[rows])
        return {name: class_loss(scores[name], labels[rows, i]) for i, name in enumerate(names)}

    @torch.no_grad()
    def errors(split: Split) -> dict[str, float]:
        held_out, truth = _overlapping(split, many, 1)
        scores = model(held_out)
        return {name: wrong(scores[name], truth[:, i]) for i, name in enumerate(names)}

    counts = [torch.bincount(labels[:, i], minlength=10).tolist() for i in range(many)]
    priors = {name: label_entropy(count) for name, count in zip(names, counts, strict=True)}
    return Start(model, model.last_shared, losses, errors, priors)


# ------------------------------------------------------------------------------------------- photographs in the dark

#: From where to where the photographs belong to a split, in shares of their width.
STRIPS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
BRIGHTNESS = torch.tensor([0.299, 0.587, 0.114])  # of the three colours, as in ITU-R BT.601
PATCH = 12


@functools.lru_cache(maxsize=16)
def patches(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Parts of the two photographs, as they are and as a camera would take them in the dark.

    Args:
        split: Which strip of the photographs.
        count: How many.
        seed: The same seed gives the same patches.

    Returns:
        Dark and clean patches, (count, 3, PATCH, PATCH), from 0 to 1.
    """
    from sklearn.datasets import load_sample_image

    random = np.random.default_rng(seed)
    clean = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1)[None] / 255.0
        photograph = F.avg_pool2d(photograph, 2)[0]
        height, width = photograph.shape[1:]
        low, high = (int(share * width) for share in STRIPS[split])
        for _ in range(count // 2):
            top, left = random.integers(height - PATCH), random.integers(low, high - PATCH)
            clean.append(photograph[:, top : top + PATCH, left : left + PATCH])
    bright = torch.stack(clean)
    generator = torch.Generator().manual_seed(seed)
    gain = 0.1 + 0.3 * torch.rand(len(bright), 1, 1, 1, generator=generator)
    cast = 0.7 + 0.3 * torch.rand(len(bright), 3, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(bright.shape, generator=generator)
    return (gain * cast * bright**1.5 + noise).clamp(0.0, 1.0), bright


def brightness(images: Tensor) -> Tensor:
    """(n, 3, h, w) to (n, h, w)."""
    return torch.einsum("nchw,c->nhw", images, BRIGHTNESS)


def off_colour(images: Tensor, truth: Tensor) -> Tensor:
    """1 − cosine between the colours of two images, whatever their brightness; mean over the pixels."""
    # The same small grey is added to both, since a black pixel has no colour.
    return 1.0 - F.cosine_similarity(images + 0.02, truth + 0.02, dim=1).mean()


LIGHT_STEPS = 90


def light(seed: int) -> Start:
    dark, clean = patches("train", 2000, 30 + seed)
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 1)
        )
    order = chosen(len(dark), LIGHT_STEPS, 8, seed)

    def enhance(images: Tensor) -> Tensor:
        return torch.sigmoid(model(5.0 * images))

    def losses(step: int, draw: int) -> Losses:
        rows = order[step, draw]
        made, truth = enhance(dark[rows]), clean[rows]
        return {
            "illumination": (brightness(made) - brightness(truth)).square().mean(),
            "colour": off_colour(made, truth),
        }

    def constant(truth: Tensor) -> dict[str, float]:
        """What a grey image of the mean brightness pays."""
        mean = brightness(clean).mean()
        return {
            "illumination": float((brightness(truth) - mean).square().mean()),
            "colour": float(off_colour(torch.ones_like(truth), truth)),
        }

    @torch.no_grad()
    def errors(split: Split) -> dict[str, float]:
        night, day = patches(split, 400, 1)
        made, guess = enhance(night), constant(day)
        return {
            "illumination": float((brightness(made) - brightness(day)).square().mean()) / guess["illumination"],
            "colour": float(off_colour(made, day)) / guess["colour"],
        }

    return Start(model, list(model[-1].parameters()), losses, errors, constant(clean))


PROBLEMS = (
    Problem(
        "find digits",
        "classification and localisation",
        "The images of the demo at half the resolution, 16 × 16: which digit (cross-entropy), and where (squared error "
        "in pixels, some 10⁵ times as large). Three small convolutions. Errors: wrong digits in shares of guessing; "
        "1 − IoU.",
        ("class", "box"),
        ("class", "box"),
        find,
        FIND_STEPS,
        1e-2,
    ),
    *(
        Problem(
            f"{word} digits",
            "overlapping digits",
            f"{word.capitalize()} digits side by side, each half over its neighbour, in the manner of MultiMNIST; one "
            "cross-entropy each. An MLP of two layers of 64. Errors: wrong digits in shares of guessing.",
            names,
            names,
            functools.partial(read, many=len(names)),
            READ_STEPS,
            1e-2,
        )
        for word, names in (("two", (PLACES[0], PLACES[2])), ("three", PLACES))
    ),
    Problem(
        "low light",
        "image enhancement",
        "Patches of scikit-learn's two photographs, darkened, tinted and noisy: the brightness of each pixel (squared "
        "error) against its colour (1 − cosine). Three small convolutions, shared whole. Training, validation and test "
        "patches are from different strips. Errors in shares of a grey image's.",
        ("illumination", "colour"),
        ("illumination", "colour"),
        light,
        LIGHT_STEPS,
        1e-2,
    ),
)
