"""Autocast, a gradient scaler and clipping, with gradient surgery in the middle. On a GPU say "cuda" and float16."""

import torch
from torch import nn

import gradsurgery

DEVICE, DTYPE = "cpu", torch.bfloat16

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).to(DEVICE)
optimizer = gradsurgery.MGDA(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), normalize="loss")
scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
inputs = torch.randn(256, 8, device=DEVICE)
target = inputs[:, :1].sin()
skipped = 0

for step in range(100):
    with torch.autocast(DEVICE, dtype=DTYPE):
        near, far = model(inputs).split(1, dim=1)
        losses = {
            "near": nn.functional.mse_loss(near.float(), target),
            "far": nn.functional.mse_loss(far.float(), 100 * target),
        }
    if step == 10:
        losses["far"] = losses["far"] * float("inf")  # as an overflow would

    optimizer.zero_grad()
    report = optimizer.backward(losses, scaler=scaler)  # the scaler is handed over; do not scale the losses yourself
    skipped += "nonfinite" in report.flags
    scaler.unscale_(optimizer)  # always the wrapper, never the wrapped optimizer
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    scaler.step(optimizer)
    scaler.update()

print(f"losses {report.losses}, scale {scaler.get_scale():g}, {skipped} step skipped")
