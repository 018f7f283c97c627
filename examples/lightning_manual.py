"""Lightning, manual optimisation: nothing beyond the optimizer, whose `backward` replaces `manual_backward`.

pip install ".[frameworks]"; python examples/lightning_manual.py
"""

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gradsurgery


class TwoHeads(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.label, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def training_step(self, batch, batch_index):
        inputs, labels, values = batch
        features = self.trunk(inputs)
        losses = {
            "label": cross_entropy(self.label(features), labels),
            "value": mse_loss(self.value(features).squeeze(1), values),
        }
        optimizer = self.optimizers()
        assert isinstance(optimizer, gradsurgery.PCGrad)  # for type checkers: Lightning's object poses as it
        optimizer.zero_grad()
        # Under precision="16-mixed" the plugin has a scaler; `optimizer.step()` then unscales and updates by itself.
        report = optimizer.backward(losses, scaler=getattr(self.trainer.precision_plugin, "scaler", None))
        optimizer.step()
        self.log_dict(report.losses)
        if report.conflict_rate is not None:  # the gradients were looked at, as in most steps of a surgery
            self.log("conflict_rate", report.conflict_rate)

    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 10.0)  # here, since a scaler has unscaled by now

    def configure_optimizers(self):
        return gradsurgery.PCGrad(torch.optim.AdamW(self.parameters(), lr=1e-2))


def main():
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(512, 8)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long(), -3 * inputs[:, 0] + inputs[:, 1])
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(TwoHeads(), DataLoader(data, batch_size=32, shuffle=True))
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main()
