"""What a training loop does wrong without an error: each is said once per optimizer, with the cure."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.gradients import rows
from gradsurgery.gradients.gram import Row
from gradsurgery.graph import hooks
from gradsurgery.graph.torch_private import optimizer_hooks
from gradsurgery.text import warn

if TYPE_CHECKING:
    from gradsurgery.protocols import Losses, Wrapper

#: So many plain steps before the first ``backward`` are taken for a warm-up.
PLAIN_STEPS = 1


class Loop:
    """How the training loop calls one optimizer.

    Attributes:
        plain_steps: Steps with gradients before the first ``backward``; None once that is no concern any more.
        stepping: The wrapped optimizer steps because this one does.
        scaled: The last ``backward`` was given a gradient scaler.
        lasting: For how many steps in a row something has been so.
    """

    def __init__(self) -> None:
        self.plain_steps: int | None = 0
        self.stepping = False
        self.scaled = False
        self.lasting: dict[str, int] = {}
        self._written: weakref.ref[Tensor] | None = None  # one of the gradients that the last `backward` wrote

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written": None, "stepping": False}

    def lasts(self, kind: str, holds: bool, steps: int) -> bool:
        """Count the steps in a row in which something holds.

        Args:
            kind: What is counted.
            holds: Whether it does in this one.
            steps: How many are many.

        Returns:
            Whether it has held in so many.
        """
        self.lasting[kind] = self.lasting.get(kind, 0) + 1 if holds else 0
        return self.lasting[kind] >= steps

    @contextmanager
    def step(self) -> Iterator[None]:
        """Mark the steps of the wrapped optimizer that this one asks for."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def proposed(self, method: Wrapper, scaled: bool) -> None:
        """Note what ``backward`` leaves behind for the step.

        Args:
            method: The optimizer.
            scaled: It was given a gradient scaler.
        """
        self.scaled = scaled
        grads = (p.grad for group in method.param_groups for p in group["params"] if p.grad is not None)
        first = next(grads, None)
        self._written = None if first is None else weakref.ref(first)

    def see_step(self, method: Wrapper) -> None:
        """Look at a step: where do its gradients come from?

        Args:
            method: The optimizer.
        """
        if self.plain_steps is None or all(p.grad is None for p in rows.parameters(method)):
            return
        if all(group.get("lr") == 0 for group in method.param_groups):  # how distributed checkpoints make states
            return
        self.plain_steps += 1
        if self.plain_steps > PLAIN_STEPS:
            self.plain_steps, name = None, method.display_name
            warn(
                f"{name}.step: backward() of this optimizer was never called, and the gradients come from "
                f"elsewhere: every step is that of {_named(method.base)} alone, and the method does nothing. In place "
                'of loss.backward(), call optimizer.backward({"name": loss, ...}) with each loss by itself. For a '
                "plain warm-up ignore this, or pass warmup=."
            )

    def see_base_step(self, method: Wrapper) -> None:
        """Look at a step of the wrapped optimizer that the user made: are the gradients those of this one?

        Args:
            method: The optimizer.
        """
        written = None if self._written is None else self._written()
        if written is None or method.transaction.proposed is None or method.transaction.has_told("base"):
            return
        if any(p.grad is written for p in rows.parameters(method)):
            name = method.display_name
            method.transaction.warn_once(
                "base",
                f"{name}: step() of the wrapped {_named(method.base)} was called with the gradients that "
                f"backward() wrote, so that {name} does not learn of the step: its memory, `every`, `warmup` "
                f"and random draws stand still. Call step() of the {name} instead, and give it to schedulers, "
                "scalers and trainers.",
            )

    def see_scaler(self, method: Wrapper, caller: FrameType) -> None:
        """Look at a step that a gradient scaler is about to make.

        Args:
            method: The optimizer.
            caller: Who asks.
        """
        if self.scaled or method.transaction.proposed is None or method.transaction.has_told("scaler"):
            return
        if isinstance(caller.f_locals.get("self"), torch.amp.GradScaler):
            name = method.display_name
            method.transaction.warn_once(
                "scaler",
                f"{name}: a gradient scaler makes the step, and backward() was not given it. Gradients of "
                "losses that were not scaled are divided by the scale all the same; scaled losses mislead a method "
                "that looks at them. Pass the losses as they are, and the scaler: optimizer.backward(losses, "
                "scaler=scaler).",
            )

    def see_gradients(self, method: Wrapper, batch: Losses) -> None:
        """Look at the gradients found at the start of the first step: do they hold the sum of the losses already?

        It costs one more backward pass, and only where every parameter that the losses reach has a gradient.

        Args:
            method: The optimizer.
            batch: The losses of the call, before anything is differentiated.
        """
        transaction = method.transaction
        started = transaction.learnt["step"] or transaction.proposed is not None or transaction.has_told("twice")
        elsewhere = batch.accumulated is not None or not batch.comm.is_alone or batch.graph.hidden
        if started or elsewhere or not batch.owned or any(p.grad is None for p in batch.owned):
            return
        sums = rows.one_pass(batch.roots, batch.seeds, batch.owned, retain_graph=True, engine="grad")
        if _equal([p.grad for p in batch.owned], sums):
            name = method.display_name
            method.transaction.warn_once(
                "twice",
                f"{name}.backward: .grad holds the gradient of the sum of these losses already, and what is "
                "added now makes it count twice. Leave out sum(losses).backward(): optimizer.backward(losses) takes "
                "its place.",
            )


def watch(method: Wrapper) -> None:
    """Hear of the steps of the wrapped optimizer, before any hook of somebody else that may raise.

    Args:
        method: The optimizer. The hook does not keep it alive, and goes with it.
    """
    me = weakref.ref(method)

    def stepped(*_: object) -> None:
        if (alive := me()) is None:
            return
        transaction = alive.transaction
        if transaction.loop.stepping:
            transaction.update()
        else:
            transaction.loop.see_base_step(alive)

    table = optimizer_hooks(method.base, "step_post")
    if table is not None:
        handle = hooks.ours(method.base.register_step_post_hook, stepped)
        table.move_to_end(handle.id, last=False)
        weakref.finalize(method, handle.remove).atexit = False


@torch.no_grad()
def _equal(found: list[Tensor | None], sums: Row) -> bool:
    """Whether gradients are equal to rounding, and not 0."""
    apart = size = 0.0
    rough = 0.0
    for a, b in zip(found, sums, strict=True):
        if a is None or b is None:
            return False
        a, b = (g.to_dense() if g.is_sparse else g for g in (a, b))
        apart += float((a - b).abs().double().square().sum())
        size += float(b.abs().double().square().sum())
        rough = max(rough, torch.finfo(b.dtype).eps)
    return apart <= rough * size and size > 0


def _named(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__
