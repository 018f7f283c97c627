"""Real runs of the Trainer of transformers, on a tiny model built from its configuration: nothing is downloaded.

The yardstick is a loop written by hand, and a run that was never interrupted; both must agree to the last bit.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import runpy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import ModelOutput

import gradsurgery
from gradsurgery.integrations.transformers import MultiLossTrainerMixin
from tests.support.frameworks import METHODS, assert_close, assert_same
from tests.support.processes import run_cases, same_everywhere

ROOT = Path(__file__).resolve().parents[2]


class Tagger(BertPreTrainedModel):
    """Two heads on a tiny encoder; it returns its losses by name, and no loss."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.topic, self.score = nn.Linear(config.hidden_size, 2), nn.Linear(config.hidden_size, 1)
        self.post_init()

    @property
    def trunk(self) -> nn.Module:
        return self.bert.encoder.layer[1]

    def forward(self, input_ids: Tensor, topic: Tensor | None = None, score: Tensor | None = None) -> ModelOutput:
        features = self.bert(input_ids).last_hidden_state[:, 0]
        outputs = ModelOutput(topics=self.topic(features), scores=self.score(features).squeeze(1))
        if topic is not None and score is not None:
            outputs["losses"] = losses_of(outputs, topic, score)
        return outputs


def losses_of(outputs: ModelOutput, topic: Tensor, score: Tensor) -> dict[str, Tensor]:
    topics, scores = outputs["topics"], outputs["scores"]
    return {
        "topic": nn.functional.cross_entropy(topics, topic),
        "score": (scores - score).square().mean(),
        "tie": (scores + topics[:, 1] + 1).square().mean(),
    }


def tagger(dropout: float = 0.0) -> Tagger:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return Tagger(BertConfig(vocab_size=16, max_position_embeddings=8, **sizes, **dict.fromkeys(rates, dropout)))


def samples(size: int = 40) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 16, (size, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "topic": i[0] % 2, "score": i.float().mean() / 8 - i[0] % 2} for i in ids]


class MultiLossTrainer(MultiLossTrainerMixin, Trainer):
    pass


METHOD_TABLE = pytest.mark.parametrize("method", METHODS)


def build(
    folder: Path, method: str = "pcgrad", model: Tagger | None = None, kind: type = MultiLossTrainer, **options: Any
) -> Any:
    """A Trainer over five batches in their order, two epochs."""
    model = tagger() if model is None else model
    own = {key: options.pop(key) for key in ("compute_loss_func", "optimizers", "callbacks") if key in options}
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "label_names": ["topic", "score"],
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    if "optimizers" not in own:
        own["method"] = lambda base: METHODS[method](base, model)
    return kind(model, arguments, train_dataset=samples(), eval_dataset=samples(20)[:12], **own)


def method_of(trainer: Any) -> gradsurgery.MultiLossOptimizer:
    """The optimizer of this library, under Accelerate's."""
    return trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer


def by_hand(trainer: Any, *, parts: int = 1, scaler: GradScaler | None = None, half: torch.dtype | None = None) -> None:
    """The loop that ``train`` is to equal, with the trainer's own optimizer and scheduler."""
    windows = -(-5 // parts)
    trainer.create_optimizer_and_scheduler(2 * windows)
    model, optimizer = trainer.model, trainer.optimizer
    for _ in range(2):
        batches = [default_data_collator(samples()[i : i + 8]) for i in range(0, 40, 8)]
        for window in [batches[i : i + parts] for i in range(0, 5, parts)]:
            optimizer.zero_grad()
            for i, batch in enumerate(window):
                with torch.autocast("cpu", half) if half else nullcontext():
                    outputs = model(**batch)
                losses = {name: loss.float() / len(window) for name, loss in outputs["losses"].items()}
                optimizer.backward(losses, scaler=scaler, accumulate=i + 1 < len(window))
            stepped = True
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scale = scaler.get_scale()
                scaler.update()
                stepped = scaler.get_scale() >= scale
            if stepped:
                trainer.lr_scheduler.step()


def assert_same_training(trainer: Any, twin: Any) -> None:
    assert not torch.equal(trainer.model.topic.weight, tagger().topic.weight)
    assert_same(trainer.model.state_dict(), twin.model.state_dict())
    assert_same(trainer.optimizer.state_dict(), twin.optimizer.state_dict())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("parts", [1, 2])
@METHOD_TABLE
def test_training_equals_the_loop_by_hand(method: str, parts: int, tmp_path: Path) -> None:
    # Five batches in windows of two: the last window of an epoch has one, and Trainer divides by one there.
    trainer, twin = (build(tmp_path, method, gradient_accumulation_steps=parts) for _ in range(2))
    trainer.train()
    by_hand(twin, parts=parts)
    assert trainer.state.global_step == (10 if parts == 1 else 6)
    assert_same_training(trainer, twin)


@METHOD_TABLE
def test_training_in_bfloat16_equals_the_loop_by_hand(method: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, method, bf16=True)
    trainer.train()
    twin = build(tmp_path, method)  # afterwards: it resets what Accelerate shares between all of a process
    by_hand(twin, half=torch.bfloat16)
    assert_same_training(trainer, twin)


@METHOD_TABLE
def test_training_in_float16_equals_the_loop_by_hand(method: str, tmp_path: Path) -> None:
    # Trainer and Accelerate make a scaler where there is a GPU; here it is put in by hand, and the rest is theirs. The
    # first steps overflow.
    trainer = build(tmp_path, method, fp16=True)
    scalers = [GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-3) for _ in range(2)]
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scalers[0]
    assert trainer.accelerator.mixed_precision == "fp16"
    trainer.train()
    twin = build(tmp_path, method)
    by_hand(twin, scaler=scalers[1], half=torch.float16)
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**20
    assert 0 < method_of(trainer).state_dict()["gradsurgery"]["memory"]["step"] < 10
    assert_same_training(trainer, twin)


def test_a_step_that_is_skipped_teaches_nothing(tmp_path: Path) -> None:
    # Trainer clears the gradients of the model, and never asks the optimizer to.
    class Spoils(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            if state.global_step == 2:
                model.topic.weight.grad.fill_(torch.inf)

    options = {"num_train_epochs": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = build(tmp_path, "gradvac", callbacks=[Spoils()], **options)
    trainer.accelerator.scaler = GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**9
    twin = build(tmp_path, "gradvac", **options)
    twin.train_dataset = [*samples()[:16], *samples()[24:]]  # as if that batch had never been
    twin.train()
    assert_same_training(trainer, twin)


@METHOD_TABLE
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, tmp_path: Path) -> None:
    # With dropout and a shuffled order, so that every random stream has to go on where it was.
    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
    whole = build(tmp_path, method, tagger(0.2), save_strategy="steps", save_steps=2, **options)
    whole.train()
    for step in (2, 4):
        resumed = build(tmp_path, method, tagger(0.2), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step
        assert_same_training(resumed, whole)


# ---------------------------------------------------------------------------------------------- logs and evaluation


@pytest.mark.parametrize("parts", [1, 2])
def test_every_loss_and_weight_is_logged(parts: int, tmp_path: Path) -> None:
    trainer = build(tmp_path, logging_steps=2, gradient_accumulation_steps=parts, num_train_epochs=4 // parts)
    reports: list[gradsurgery.Report] = []
    add = trainer._add
    trainer._add = lambda report: (reports.append(report), add(report))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(reports) == trainer.state.global_step == 2 * len(rows)
    for row, pair in zip(rows, zip(reports[::2], reports[1::2], strict=True), strict=True):
        for name in ("topic", "score", "tie"):
            assert row[f"{name}_loss"] == pytest.approx(sum(r.losses[name] for r in pair) / 2)
            assert row[f"{name}_weight"] == pytest.approx(sum(r.weights[name] for r in pair) / 2)
        assert row["conflict_rate"] == pytest.approx(sum(r.conflict_rate for r in pair) / 2)
        assert row["loss"] == pytest.approx(sum(row[f"{name}_loss"] for name in ("topic", "score", "tie")), rel=1e-5)
    if parts == 2:
        # The mean over the window, as if it had been one batch.
        first = tagger()(**default_data_collator(samples()[:16]))["losses"]
        assert reports[0].losses["topic"] == pytest.approx(first["topic"].item(), rel=1e-5)


def test_evaluation_names_every_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_eval_batch_size=8)  # twelve samples: the second batch is smaller
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = tagger().eval()(**default_data_collator(samples(20)[:12]))["losses"]
    for name, loss in losses.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(losses.values()).item(), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_tie_loss"] == metrics["eval_tie_loss"]
    prediction = trainer.predict(samples(20)[:12])
    assert [part.shape for part in prediction.predictions] == [(12, 2), (12,)]
    assert "test_topic_loss" in prediction.metrics
    assert trainer.optimizer is None


def test_the_best_model_may_be_chosen_by_one_loss(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="topic_loss",
    )
    trainer.train()
    seen = [row["eval_topic_loss"] for row in trainer.state.log_history if "eval_topic_loss" in row]
    assert trainer.state.best_metric == min(seen)


# ------------------------------------------------------------------------------------------- where losses come from


def test_losses_may_come_from_a_function(tmp_path: Path) -> None:
    class Plain(Tagger):
        def forward(self, input_ids: Tensor, topic: Any = None, score: Any = None) -> ModelOutput:
            outputs = super().forward(input_ids)
            outputs["given"] = topic, score
            return outputs

    def function(outputs: ModelOutput, labels: Any, num_items_in_batch: Any) -> dict[str, Tensor]:
        return losses_of(outputs, *outputs["given"])

    model = Plain(tagger().config)
    model.load_state_dict(tagger().state_dict())
    trainer, twin = build(tmp_path, model=model, compute_loss_func=function), build(tmp_path)
    trainer.train()
    twin.train()
    assert_same_training(trainer, twin)


def test_losses_may_come_from_a_method_and_be_absent(tmp_path: Path) -> None:
    class Own(MultiLossTrainer):
        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            outputs = model(**inputs)
            return {**outputs["losses"], "tie": None}, outputs

    trainer = build(tmp_path, kind=Own)
    trainer.train()
    assert method_of(trainer).report.names == ("topic", "score")
    assert "tie_loss" not in trainer.state.log_history[-2]
    metrics = trainer.evaluate()
    assert "eval_score_loss" in metrics
    assert "eval_tie_loss" not in metrics


def test_a_model_may_divide_by_the_items_of_the_window(tmp_path: Path) -> None:
    # Such a model takes `num_items_in_batch`; Trainer then does not divide by the number of micro-batches.
    seen = []

    class Counting(Tagger):
        accepts_loss_kwargs = True

        def forward(
            self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **rest: Any
        ) -> ModelOutput:
            outputs = super().forward(input_ids, labels[:, 0].long(), labels[:, 1])
            seen.append(int(num_items_in_batch))
            outputs["losses"] = {k: loss * labels.numel() / num_items_in_batch for k, loss in outputs["losses"].items()}
            return outputs

    class Labelled(MultiLossTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    model = Counting(tagger().config)
    model.load_state_dict(tagger().state_dict())
    # Neither Adam nor clipping, which would hide a wrong factor.
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = build(tmp_path, model=model, **{**options, "label_names": ["labels"]})
    trainer.train_dataset = [
        {"input_ids": s["input_ids"], "labels": torch.stack([s["topic"].float(), s["score"]])} for s in samples()
    ]
    twin = build(tmp_path, **options)
    trainer.train()
    twin.train()
    assert set(seen) == {32, 16}
    for p, q in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_wrapped_optimizer_may_be_passed(tmp_path: Path) -> None:
    model = tagger()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=1e-3))
    trainer = build(tmp_path, model=model, optimizers=(optimizer, None))
    trainer.train()
    assert method_of(trainer) is optimizer
    assert len(optimizer.report.names) == 3


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="need an optimizer of gradsurgery"):
        build(tmp_path, optimizers=(None, None)).train()
    with pytest.raises(ValueError, match="`label_smoothing_factor` makes one loss"):
        build(tmp_path, label_smoothing_factor=0.1)

    class Wrong(MultiLossTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.method = lambda base: base
            return super().create_optimizer(*args, **kwargs)

    with pytest.raises(TypeError, match=r"`method` must return an optimizer of gradsurgery, got .* type AdamW"):
        build(tmp_path, kind=Wrong).train()

    class Nameless(MultiLossTrainer):
        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return super().compute_losses(lambda **given: ModelOutput(loss=torch.zeros(())), inputs)

    with pytest.raises(RuntimeError, match="must return a dict of scalar losses under the key 'losses'"):
        build(tmp_path, kind=Nameless).train()

    class Numbers(MultiLossTrainer):
        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return {"topic": 1.0}, None

    with pytest.raises(TypeError, match="got float for 'topic'"):
        build(tmp_path, kind=Numbers).train()


# ------------------------------------------------------------------------------------------------------------ processes


def cases_of(rank: int, size: int) -> dict[str, Callable[[], None]]:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29997"
    )
    warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")  # of the loop by hand
    transformers.utils.logging.set_verbosity_error()
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])

    def made(method: str, parts: int, together: bool, **options: Any) -> Any:
        model = tagger()

        def wrap(base: Optimizer) -> gradsurgery.MultiLossOptimizer:
            return METHODS[method](torch.optim.SGD(base.param_groups, momentum=0.9), model, distributed=together)

        each = 4 if together else 8
        trainer = build(
            folder, model=model, gradient_accumulation_steps=parts, per_device_train_batch_size=each, **options
        )
        trainer.method = wrap
        return trainer

    def together(method: str, parts: int) -> None:
        trainer = made(method, parts, together=True)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        same_everywhere([p.detach() for p in trainer.model.parameters()])
        metrics = trainer.evaluate()
        twin = made(method, parts, together=False)
        by_hand(twin, parts=parts)
        assert_close(trainer.model, twin.model)
        # Twelve samples for two processes with batches of eight: Trainer fills up the last batch, and leaves the rows
        # that did not belong to it out of the mean. The losses must be counted in the same way as their sum.
        names = ("topic", "score", "tie")
        total = sum(metrics[f"eval_{name}_loss"] for name in names)
        torch.testing.assert_close(total, metrics["eval_loss"], rtol=1e-5, atol=0)
        row = next(row for row in trainer.state.log_history if "loss" in row)
        torch.testing.assert_close(sum(row[f"{name}_loss"] for name in names), row["loss"], rtol=1e-4, atol=0)

    def resumed() -> None:
        whole = made("gradvac", 2, together=True, save_strategy="steps", save_steps=2)
        whole.train()
        dist.barrier()
        again = made("gradvac", 2, together=True)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert_same_training(again, whole)

    cases: dict[str, Callable[[], None]] = {}
    for method in ("gradvac", "gradnorm", "cadence"):
        cases[method] = lambda method=method: together(method, 1 if method == "cadence" else 2)
    cases["resumed"] = resumed
    return cases


def test_two_processes(tmp_path: Path) -> None:
    told = {name: text for name, text in run_cases(cases_of, 2, tmp_path).items() if text}
    assert not told, "\n\n".join(f"{name}: {text}" for name, text in told.items())


# ------------------------------------------------------------------------------------------------------------- example


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "hf_trainer.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert "_weight" in capsys.readouterr().out
