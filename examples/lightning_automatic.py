"""Lightning, automatic optimisation: `training_step` returns named losses, the Trainer does the rest.

pip install ".[frameworks]"; python examples/lightning_automatic.py
"""

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gradsurgery
from gradsurgery.integrations.lightning import MultiLossModuleMixin


class TwoHeads(MultiLossModuleMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.label, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def training_step(self, batch, batch_index):
        inputs, labels, values = batch
        features = self.trunk(inputs)
        return {
            "label": cross_entropy(self.label(features), labels),
            "value": mse_loss(self.value(features).squeeze(1), values),
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # In several processes: PCGrad(..., distributed=True).
        optimizer = gradsurgery.PCGrad(torch.optim.AdamW(self.parameters(), lr=1e-2))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(512, 8)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long(), -3 * inputs[:, 0] + inputs[:, 1])
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TwoHeads(), DataLoader(data, batch_size=32, shuffle=True))
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main()
