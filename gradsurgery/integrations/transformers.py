"""The Trainer of Hugging Face transformers, for models that return several losses.

Nothing is imported from transformers: the mixin stands before `transformers.Trainer`, or a class derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.report import Report


class MultiLossTrainerMixin:
    """Lets a Trainer train a model on several losses.

    The model returns them under the key "losses", a dict of names to scalars, ``None`` for a task that is absent from
    the batch; or `compute_loss_func` returns that dict. What Trainer calls the loss is their unweighted sum. Gradient
    accumulation, clipping, bf16 and fp16, schedulers, checkpoints and resuming work as with one loss. The logs have
    ``<name>_loss`` and ``<name>_weight``, the means over the steps since the last log, and evaluation gives
    ``eval_<name>_loss``.

    In several processes the method exchanges the gradients, and is built with ``distributed=True``. DeepSpeed takes
    over the backward pass and is refused.

    ::

        class MultiLossTrainer(MultiLossTrainerMixin, transformers.Trainer):
            pass


        trainer = MultiLossTrainer(model, args, train_dataset=data, method=gradsurgery.PCGrad)

    Args:
        *args: As for Trainer.
        method: Wraps the optimizer that Trainer makes: a class, or a function of the optimizer. Not needed if
            `optimizers` already gives a wrapped one.
        **kwargs: As for Trainer.

    Raises:
        TypeError: `method` does not make an optimizer of this library, or a loss is neither a tensor nor None.
        ValueError: Label smoothing is on: it makes one loss of the model's output.
        RuntimeError: The optimizer is not one of this library, DeepSpeed is on, or there are no named losses.
    """

    def __init__(
        self, *args: Any, method: Callable[[Optimizer], MultiLossOptimizer] | None = None, **kwargs: Any
    ) -> None:
        self.method = method
        self._named: dict[str, Tensor | None] = {}
        self._sums: dict[str, tuple[float, int]] = {}  # for the next log: total and count by key
        self._evaluated: dict[str, tuple[float, int]] = {}  # likewise, over the samples of an evaluation
        self._opens = True  # the next batch opens a window of accumulation
        super().__init__(*args, **kwargs)
        if getattr(self, "label_smoother", None) is not None:
            raise ValueError(
                f"{type(self).__name__}: `label_smoothing_factor` makes one loss of the model's output. Set it to 0 "
                "and smooth the labels in the model's own loss."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the optimizer as Trainer does, and wrap it in the method. Trainer calls this.

        Args:
            *args: As in Trainer.
            **kwargs: Likewise.

        Returns:
            The wrapped optimizer.

        Raises:
            TypeError: `method` does not make an optimizer of this library.
        """
        trainer: Any = self
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.method is not None and _unwrapped(optimizer) is None:
            optimizer = self.method(optimizer)
            if not isinstance(optimizer, MultiLossOptimizer):
                raise TypeError(
                    f"{type(self).__name__}: `method` must return an optimizer of gradsurgery, got an object of type "
                    f"{type(optimizer).__name__}. Pass for example method=gradsurgery.PCGrad."
                )
            trainer.optimizer = optimizer
        return optimizer

    def compute_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Mapping[str, Tensor | None], Any]:
        """Compute the named losses of a batch. Override it where they come from somewhere else.

        Args:
            model: The model as Trainer runs it.
            inputs: The batch.
            num_items_in_batch: As in Trainer's ``compute_loss``.

        Returns:
            The losses by name, and the model's outputs.

        Raises:
            RuntimeError: There are no named losses.
        """
        trainer: Any = self
        labels = None
        if trainer.compute_loss_func is not None and "labels" in inputs:
            inputs = dict(inputs)
            labels = inputs.pop("labels")
        if trainer.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        if trainer.compute_loss_func is not None:
            losses = trainer.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            losses = outputs.get("losses") if isinstance(outputs, Mapping) else None
        if not isinstance(losses, Mapping):
            raise RuntimeError(
                f"{type(self).__name__}: the model must return a dict of scalar losses under the key 'losses', or "
                "`compute_loss_func` must return one; or override `compute_losses`."
            )
        return losses, outputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the sum of the losses, which is what Trainer sees in evaluation. Trainer calls this.

        Args:
            model: The model as Trainer runs it.
            inputs: The batch.
            return_outputs: Return the outputs too.
            num_items_in_batch: As in Trainer.

        Returns:
            The sum, or the sum and the model's outputs without the losses.

        Raises:
            TypeError: A loss is neither a tensor nor None.
        """
        trainer: Any = self
        losses, outputs = self.compute_losses(model, inputs, num_items_in_batch)
        for name, loss in losses.items():
            if loss is not None and not isinstance(loss, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: every loss must be a tensor, or None if its task is absent, got "
                    f"{type(loss).__name__} for {name!r}."
                )
        # Under nn.DataParallel each device gives its own value.
        named = _each(dict(losses), lambda loss: loss.mean() if loss.ndim else loss)
        if (
            trainer.args.average_tokens_across_devices
            and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)
            and num_items_in_batch is not None
        ):
            # As in Trainer: each process divided by the items of all, and the mean over processes divides once more.
            gpus = trainer.args.n_gpu
            share = trainer.accelerator.num_processes // trainer.get_tp_size() if gpus <= 1 else gpus
            if share > 1:
                named = _each(named, lambda loss: loss * share)
        self._named = named
        total = sum(
            (loss.detach() for loss in named.values() if loss is not None), torch.zeros((), device=trainer.args.device)
        )
        if not return_outputs:
            return total
        if isinstance(outputs, Mapping):
            # Trainer takes whatever is left for predictions.
            outputs = {"loss": total, **{key: value for key, value in outputs.items() if key != "losses"}}
        return total, outputs

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Let the method act on the losses of a batch, or keep its gradients if no step follows. Trainer calls this.

        Args:
            model: The model as Trainer runs it.
            inputs: The batch.
            num_items_in_batch: As in Trainer.

        Returns:
            The sum of the losses, for the logs.

        Raises:
            RuntimeError: The optimizer is not one of this library, or DeepSpeed is on.
        """
        trainer: Any = self
        optimizer = _unwrapped(trainer.optimizer)
        if optimizer is None or trainer.is_deepspeed_enabled:
            raise RuntimeError(
                f"{type(self).__name__}: named losses need an optimizer of gradsurgery and a backward pass that is not "
                "DeepSpeed's own. Pass method=gradsurgery.PCGrad, say, and leave `deepspeed` out."
            )
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()  # schedule-free optimizers
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with trainer.compute_loss_context_manager():
            total = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        named, self._named = self._named, {}
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or trainer.compute_loss_func is not None
        if not scaled:
            parts = trainer.current_gradient_accumulation_steps
            if parts > 1:
                named, total = _each(named, lambda loss: loss / parts), total / parts
        if self._opens:
            # Trainer clears the model's gradients only. A proposal whose step a scaler skipped goes here.
            optimizer.zero_grad()
        self._opens = trainer.accelerator.sync_gradients
        report = optimizer.backward(named, scaler=trainer.accelerator.scaler, accumulate=not self._opens)
        if self._opens:
            self._add(report)
        return total

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch as Trainer does, and keep each loss for the mean. Trainer calls this.

        Args:
            model: The model as Trainer runs it.
            inputs: The batch.
            *args: As in Trainer.
            **kwargs: Likewise.

        Returns:
            What Trainer's own returns.
        """
        trainer: Any = self
        self._named = {}
        result = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        named, self._named = self._named, {}
        if named:
            # One row per sample, as Trainer does with the loss: its gathering leaves out what pads the last batch.
            values = torch.stack(
                [torch.tensor(math.nan) if v is None else v.detach().float().cpu() for v in named.values()]
            )
            size = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 1)
            rows = trainer.gather_function(values.to(trainer.args.device).repeat(size, 1)).double().cpu()
            for name, column in zip(named, rows.unbind(1), strict=True):
                seen = column[~column.isnan()]
                total, count = self._evaluated.get(name, (0.0, 0))
                self._evaluated[name] = (total + float(seen.sum()), count + len(seen))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, and add the mean of each loss to the metrics. Trainer calls this.

        Args:
            *args: As in Trainer.
            **kwargs: Likewise.

        Returns:
            What Trainer's own returns.
        """
        self._evaluated = {}
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}_loss": t / n for k, (t, n) in self._evaluated.items() if n})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the means of every loss and weight since the last log. Trainer calls this.

        Args:
            logs: What Trainer logs.
            *args: As in Trainer.
            **kwargs: Likewise.
        """
        if "loss" in logs:
            logs.update({key: total / count for key, (total, count) in self._sums.items()})
            self._sums = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _add(self, report: Report) -> None:
        values = {f"{name}_loss": loss for name, loss in report.losses.items()}
        values.update({f"{name}_weight": weight for name, weight in (report.weights or {}).items()})
        if report.conflict_rate is not None:
            values["conflict_rate"] = report.conflict_rate
        for key, value in values.items():
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, count + 1)


def _each(named: dict[str, Tensor | None], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    return {name: None if loss is None else change(loss) for name, loss in named.items()}


def _unwrapped(optimizer: Any) -> MultiLossOptimizer | None:
    """The method under whatever Accelerate has put around it."""
    while optimizer is not None and not isinstance(optimizer, MultiLossOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
