"""Automatic optimisation under Lightning: ``training_step`` returns named losses.

Nothing is imported from Lightning, so that the mixin serves the packages `lightning` and `pytorch_lightning` alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.graph.torch_private import only_accumulates, trainer_of
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.report import Report


class MultiLossModuleMixin:
    """Lets a LightningModule return several losses under automatic optimisation.

    It stands before LightningModule among the bases. ``training_step`` then returns ``{"losses": {name: loss}}``, with
    other entries for the hooks if wanted, or the dict of losses itself; ``None`` in place of a loss marks a task that
    is absent from the batch. ``configure_optimizers`` returns a method around an optimizer. Precision plugins,
    `accumulate_grad_batches`, gradient clipping, schedulers, checkpoints and hooks work as with one loss; Lightning's
    own loss is the unweighted sum. A step that returns a tensor, or a dict with "loss" and without "losses", is left to
    Lightning: the plain gradient, without the method. So is all of manual optimisation.

    With the DDP strategy the method exchanges the gradients, and is built with ``distributed=True``. A strategy that
    takes over the backward pass (DeepSpeed) cannot work. L-BFGS is better run by manual optimisation: Lightning
    hands it the unweighted sum as the value of its closure.

    ::

        class Model(MultiLossModuleMixin, lightning.LightningModule):
            def training_step(self, batch, batch_index):
                return {"class": class_loss, "box": box_loss}

            def configure_optimizers(self):
                return gradsurgery.PCGrad(torch.optim.AdamW(self.parameters()))

    Raises:
        TypeError: The mixin stands after LightningModule, a loss is neither a tensor nor None, or the optimizer is not
            one of this library.
        RuntimeError: The strategy is that of DeepSpeed.
    """

    _named: Mapping[str, Tensor | None] | None = None  # between training_step and backward only: they hold the graph
    _inside = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(MultiLossModuleMixin)]:
            if not issubclass(base, MultiLossModuleMixin) and "backward" in vars(base):
                raise TypeError(
                    f"{cls.__name__}: MultiLossModuleMixin must stand before {base.__name__} among the bases."
                )
        # Lightning reads what `training_step` returns before anything of a module is asked, and refuses a dict
        # without "loss". Hence the step itself is wrapped, wherever it was defined.
        step = getattr(cls, "training_step", None)
        if step is not None and not hasattr(step, "takes_losses"):
            cls.training_step = _taking(step)  # type: ignore[attr-defined]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Let the method act on the losses that ``training_step`` returned. Lightning calls this.

        Args:
            loss: Their sum, divided and scaled by Lightning. Not used where there are named losses.
            *args: For a plain loss, as in Lightning.
            **kwargs: Likewise.

        Raises:
            TypeError: The optimizer is not one of this library.
        """
        named, self._named = self._named, None
        module: Any = self
        if named is None:
            found = module.optimizers(use_pl_optimizer=False)
            for one in found if isinstance(found, list) else [found]:
                if isinstance(one, MultiLossOptimizer):
                    one.transaction.loop.plain_steps = None  # whoever returns a plain loss here means it
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]
            return
        optimizer = module.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, MultiLossOptimizer):
            raise TypeError(
                f"{type(self).__name__}.configure_optimizers: named losses need an optimizer of gradsurgery, got "
                f"{type(optimizer).__name__}. Wrap it in a method, for example PCGrad(optimizer)."
            )
        trainer = module.trainer
        parts = trainer.accumulate_grad_batches
        report = optimizer.backward(
            {name: loss if loss is None or parts == 1 else loss / parts for name, loss in named.items()},
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            accumulate=only_accumulates(trainer),
        )
        if "accumulating" not in report.flags:
            self.log_report(report)

    def log_report(self, report: Report) -> None:
        """Log every loss, every weight and the conflict rate, once per step. Override it to log something else.

        Args:
            report: What the method did in this step.
        """
        values = {f"loss/{name}": loss for name, loss in report.losses.items()}
        values.update({f"weight/{name}": weight for name, weight in (report.weights or {}).items()})
        if report.conflict_rate is not None:
            values["conflict_rate"] = report.conflict_rate
        self.log_dict(values)  # type: ignore[attr-defined]

    def _take(self, output: Any) -> Any:
        """Keep the losses for ``backward``; give Lightning their sum, and nothing that holds the graph."""
        self._named = None
        if output is None:
            self._act_without_losses()
        if not isinstance(output, Mapping) or ("loss" in output and "losses" not in output):
            return output
        strategy = type(getattr(trainer_of(self), "strategy", None)).__name__
        if strategy == "DeepSpeedStrategy":
            raise RuntimeError(
                f"{type(self).__name__}: {strategy} takes over the backward pass, and the method never sees the "
                "losses. Use the DDP strategy with distributed=True, or ModelParallelStrategy with fully_shard."
            )
        named = output.get("losses", output)
        for name, loss in named.items() if isinstance(named, Mapping) else [("losses", named)]:
            if loss is not None and not isinstance(loss, Tensor):
                raise TypeError(
                    f"{type(self).__name__}.training_step: every loss must be a tensor, or None if its task is absent, "
                    f"by name; got {type(loss).__name__} for {name!r}."
                )
        self._named = dict(named)
        values = {name: None if loss is None else loss.detach() for name, loss in named.items()}
        present = [value for value in values.values() if value is not None]
        rest = {key: value for key, value in output.items() if key != "losses"} if "losses" in output else {}
        total = torch.stack([value.sum().to(present[0]) for value in present]).sum() if present else torch.zeros(())
        return {"loss": total, **rest, "losses": values}

    def _act_without_losses(self) -> None:
        """The last batch of a window was skipped, so that no ``backward`` follows: act on what the others have left."""
        module: Any = self
        if trainer_of(module) is None:  # somebody calls the step by hand
            return
        optimizer = module.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, MultiLossOptimizer) or not (names := optimizer.accumulated):
            return
        if not only_accumulates(module.trainer):
            scaler = getattr(module.trainer.precision_plugin, "scaler", None)
            self.log_report(optimizer.backward(dict.fromkeys(names), scaler=scaler))


def _taking(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A step that extends the one of its base gets the losses as they are; the outermost hands them over.
        if self._inside or not self.automatic_optimization:
            return step(self, *args, **kwargs)
        self._inside = True
        try:
            output = step(self, *args, **kwargs)
        finally:
            self._inside = False
        return self._take(output)

    training_step.takes_losses = True  # type: ignore[attr-defined]
    return training_step
