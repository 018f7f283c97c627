"""Accelerate: three arguments of `backward` stand in for `accelerator.backward`. Also under `accelerate launch`.

pip install ".[frameworks]"; python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gradsurgery


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.label, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, inputs):
        features = self.trunk(inputs)
        return self.label(features), self.value(features).squeeze(1)


def main():
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long(), -3 * inputs[:, 0] + inputs[:, 1])

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = TwoHeads()
    several = accelerator.num_processes > 1
    optimizer = gradsurgery.PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-2), distributed=several)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    for _ in range(5):
        for batch, labels, values in loader:
            with accelerator.accumulate(model):
                scores, predicted = model(batch)
                losses = {"label": cross_entropy(scores, labels), "value": mse_loss(predicted, values)}
                report = optimizer.optimizer.backward(
                    {name: loss / accelerator.gradient_accumulation_steps for name, loss in losses.items()},
                    scaler=accelerator.scaler,
                    accumulate=not accelerator.sync_gradients,
                )
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    accelerator.print(report)


if __name__ == "__main__":
    main()
