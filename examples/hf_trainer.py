"""Hugging Face Trainer: a model that returns a dict of losses, trained with any method. Offline, from a configuration.

pip install ".[frameworks]"; python examples/hf_trainer.py
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainingArguments
from transformers.utils.generic import ModelOutput

import gradsurgery
from gradsurgery.integrations.transformers import MultiLossTrainerMixin


class TwoHeads(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.topic, self.score = nn.Linear(config.hidden_size, 2), nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, topic=None, score=None):
        features = self.bert(input_ids).pooler_output
        outputs = ModelOutput(topics=self.topic(features), scores=self.score(features).squeeze(1))
        if topic is not None and score is not None:
            outputs["losses"] = {
                "topic": cross_entropy(outputs["topics"], topic),
                "score": mse_loss(outputs["scores"], score),
            }
        return outputs


class MultiLossTrainer(MultiLossTrainerMixin, Trainer):
    pass


def main():
    torch.manual_seed(0)
    model = TwoHeads(BertConfig(
        vocab_size=16, max_position_embeddings=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    ))  # fmt: skip
    data = [{"input_ids": ids, "topic": ids[0] % 2, "score": ids.float().mean()} for ids in torch.randint(16, (256, 6))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=16, gradient_accumulation_steps=2, logging_steps=12,
            learning_rate=1e-3, save_strategy="no", use_cpu=True, report_to=[], label_names=["topic", "score"],
        )  # fmt: skip
        # In several processes: method=lambda optimizer: gradsurgery.PCGrad(optimizer, distributed=True).
        trainer = MultiLossTrainer(model, arguments, train_dataset=data, eval_dataset=data, method=gradsurgery.PCGrad)
        trainer.train()
        print({key: round(value, 3) for key, value in trainer.evaluate().items() if key.endswith("_loss")})


if __name__ == "__main__":
    main()
