"""One loss per sample on handwritten digits of which 40 % have a wrong label: what each method makes of them.

    SEEDS=5 EPOCHS=20 python examples/label_noise.py

By default one seed and two epochs. It needs scikit-learn, for the images.
"""

import os
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import gradsurgery
from gradsurgery.problems import digits

SEEDS, EPOCHS, NOISE, BATCH = int(os.environ.get("SEEDS", "1")), int(os.environ.get("EPOCHS", "2")), 0.4, 64
PLAIN = {"mean loss": 1.0, "mean of the smallest 60 %": 0.6}
METHODS = {
    "UPGrad": lambda base: gradsurgery.UPGrad(base, reduction="mean"),
    "DualProj": lambda base: gradsurgery.DualProj(base, reduction="mean"),
    "MGDA": lambda base: gradsurgery.MGDA(base, reduction="mean"),
    "TrimmedMean": lambda base: gradsurgery.TrimmedMean(base, trim_number=BATCH // 5, reduction="mean"),
    "GroupDRO": lambda base: gradsurgery.GroupDROWeighter(base, reduction="mean"),
}
train, test = digits.source("train"), digits.source("test")


def run(method, seed):
    """Percent of the test images read right, and of the wrong labels learnt by heart."""
    torch.manual_seed(seed)
    wrong = torch.rand(len(train.labels)) < NOISE
    labels = torch.where(wrong, (train.labels + torch.randint(1, 10, train.labels.shape)) % 10, train.labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = METHODS.get(method, lambda base: base)(torch.optim.Adam(model.parameters(), lr=0.003))
    for _ in range(EPOCHS):
        for i in torch.randperm(len(labels)).split(BATCH):
            losses = F.cross_entropy(model(train.ink[i]), labels[i], reduction="none")
            optimizer.zero_grad()
            if method in PLAIN:
                losses.sort().values[: round(PLAIN[method] * len(losses))].mean().backward()
            elif method == "GroupDRO":  # a group is what has one label
                optimizer.backward(gradsurgery.losses_by_group(losses, labels[i], groups=10))
            else:
                optimizer.backward(losses, per_sample=method != "TrimmedMean")
            optimizer.step()
    right = model(test.ink).argmax(1) == test.labels
    learnt = model(train.ink[wrong]).argmax(1) == labels[wrong]
    return 100 * right.float().mean().item(), 100 * learnt.float().mean().item()


for name in (*PLAIN, *METHODS):
    right, learnt = zip(*(run(name, seed) for seed in range(SEEDS)), strict=True)
    told = (f"{statistics.mean(x):.1f} ± {statistics.pstdev(x):.1f} %" for x in (right, learnt))
    print(name, *told, sep=", ", end="; ", flush=True)
print(f"of test images right, and of wrong labels learnt; {SEEDS} seeds, {EPOCHS} epochs")
