"""What the methods for unlearning have in common: one loss that makes a model forget, and others that retain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Unlearning(Surgery):
    """Base of the methods with a forget loss f; the gradients of all others are added up to the retain gradient r.

    All losses are minimised, as everywhere: a loss that falls while the model forgets, such as minus the
    cross-entropy on what is to be forgotten, or NPO.

    Args:
        optimizer: The optimizer that makes the step.
        forget: Name of the forget loss; by default the first one in the first call.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        TypeError: `forget` is no name.
    """

    def __init__(self, optimizer: Optimizer, *, forget: str | None = None, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        if forget is None:
            self.check.by_order = True
        elif not isinstance(forget, str):
            raise TypeError(f"{self._name}: `forget` must be the name of a loss or None, got {forget!r}.")
        self.forget = forget

    def forget_row(self) -> int | None:
        """Find the forget loss among those that are present.

        Returns:
            Its row; None, with the flag "forget-absent", if it is absent from this batch.

        Raises:
            ValueError: No loss of the call has this name.
        """
        names = self.all_names
        wanted = self.order[0] if self.forget is None else self.forget
        if wanted not in names:
            stands = " (which None stands for, as the first loss of the first call)" if self.forget is None else ""
            raise ValueError(
                f"{self._name}: `forget` must be the name of a loss, one of {list(names)}, got {wanted!r}{stands}. "
                "Pass the losses as a dict with that name."
            )
        if wanted not in self.names:
            self.flag("forget-absent")
            return None
        return self.names.index(wanted)
