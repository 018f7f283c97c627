"""What the optimizers with a state of Adam's for each loss have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import moments
from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack

Row = rows_module.Row

_NOT_HERE = {
    "amsgrad": "no paper of this family keeps the largest second moment",
    "foreach": "tensors are worked on together wherever that is possible",
    "fused": "there is one implementation",
    "capturable": "there is one implementation",
    "differentiable": "there is one implementation",
    "maximize": "pass the losses with a minus sign",
    "momentum": "`betas` has the momentum of each loss",
}
# What a gradient may be as long as, so that its square is in range.
_LONGEST = {torch.float32: 1e18, torch.float64: 1e60}


class Descent(Optimizer):
    """Steps along the direction in ``.grad``: p ← (1 − lr λ) p − lr d.

    Its groups have the options of Adam, which the method around it reads.

    Args:
        params: Parameters, or groups of them.
        options: The options that groups have by default: `lr`, `betas`, `eps`, `weight_decay`.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those of a state that another optimizer has saved may lack some
            for name in ("lr", "betas", "eps", "weight_decay"):
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step.

        Args:
            closure: Evaluates the model and calls ``backward`` of the method around.

        Returns:
            What `closure` returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            here = [(p, p.grad) for p in group["params"] if p.grad is not None]
            moments.descend(
                [p for p, _ in here], [d for _, d in here], float(group["lr"]), float(group["weight_decay"])
            )
        return result


class PerLossAdam(Surgery):
    """Base of the optimizers that keep Adam's two moments for each loss. They take parameters and make the step.

    With the moments mᵢ, vᵢ of the gradient of loss i, each divided by its bias correction, a subclass says what the
    terms of the direction are; by default m̂ᵢ / (√v̂ᵢ + ε). The direction is their sum, `reduction` applied, and the
    step is p ← (1 − lr λ) p − lr d with decoupled weight decay λ, as in AdamW.

    All parameters that a loss reaches have these moments, heads too. Bias corrections count the gradients of one loss
    in one parameter. A loss that is absent, or does not reach a parameter, leaves its moments there alone and adds
    nothing. A gradient of zeros counts as a gradient, as in Adam.

    Args:
        params: Parameters or groups of them, as any torch optimizer takes them. A group may have its own `lr`,
            `betas`, `eps` and `weight_decay`.
        lr: Learning rate, ≥ 0.
        betas: Weights of the past in the averages, each in [0, 1).
        eps: ε ≥ 0, in the units of the gradients. Where it is 0, 0 / 0 counts as 0.
        weight_decay: λ ≥ 0.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. What replaces gradients by weighted sums has no
            meaning here and is refused: `every`, `warmup`, `normalize`, `granularity`, `shared_params` and the like.

    Raises:
        TypeError: `params` is an optimizer or a module, or an argument is not known.
        ValueError: An argument is out of range, or excluded.
    """

    #: How many `betas` there are.
    betas_wanted = 2
    acts_on_private = True
    stateful = True
    observes = True
    has_weights = False
    scale = "paper"
    degree = None
    sparse_refused = (
        "every entry has moments that change in every step. Build the embedding with sparse=False, or give it to "
        "another optimizer, which you pass in `other_optimizers`"
    )

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        name = type(self).__name__
        for key, why in _NOT_HERE.items():
            if key in switches:
                raise ValueError(f"{name}: `{key}` is not offered: {why}.")
        if isinstance(params, (Optimizer, torch.nn.Module, type)):
            raise TypeError(
                f"{name}: `params` must be parameters or groups of them, got "
                f"{getattr(params, '__name__', type(params).__name__)}. It takes the place of Adam: "
                f"{name}(model.parameters(), lr=...)."
            )
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(Descent(params, options), **switches)
        for group in (self.defaults, *self.param_groups):
            self._require_options(group)

    @classmethod
    def around(cls, optimizer: Optimizer, **options: Any) -> PerLossAdam:
        """Build the method in the place of an optimizer.

        Args:
            optimizer: The torch optimizer, whose parameters and learning rates are taken over.
            **options: Arguments of the constructor.

        Returns:
            The method.
        """
        build: Any = cls
        groups = [{"params": list(group["params"]), "lr": float(group["lr"])} for group in optimizer.param_groups]
        found: PerLossAdam = build(groups, **{"lr": float(optimizer.defaults["lr"]), **options})
        return found

    def _require_options(self, group: Mapping[str, Any]) -> None:
        """Check the options of a group."""
        for key, why in _NOT_HERE.items():
            if group.get(key):
                raise ValueError(
                    f"{self._name}: a parameter group has `{key}`={group[key]!r}, which is not offered: {why}."
                )
        self.check.number("lr", group["lr"], least=0.0)
        self.check.number("eps", group["eps"], least=0.0)
        self.check.number("weight_decay", group["weight_decay"], least=0.0)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != self.betas_wanted:
            raise ValueError(f"{self._name}: `betas` must be {self.betas_wanted} numbers, got {betas!r}.")
        for k, beta in enumerate(betas):
            self.check.number(f"betas[{k}]", beta, least=0.0, below=1.0)

    def _require_together(self) -> None:
        super()._require_together()
        # These put something else in the place of the moments, or of a part of them.
        excluded = {
            "warmup": (self.warmup, 0, "a plain sum is no direction of Adam's, and its learning rate is another one"),
            "shared_params": (self.shared_params, None, "all parameters have moments, heads too"),
            "normalize": (self.normalize, "none", "each term has Adam's length whatever the length of its gradient"),
            "granularity": (self.granularity, "all", "each entry has moments of its own"),
        }
        for key, (given, usual, why) in excluded.items():
            if given != usual:
                raise ValueError(f"{self._name}: `{key}` has no meaning here: {why}.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As in torch; its options are checked.

        Raises:
            ValueError: An option is out of range, or not offered.
        """
        self._require_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state. The moments of another optimizer, which are those of a sum of losses, are left out.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: It is not the state of an optimizer, or a part of what this class saved is missing or of a
                wrong kind. Nothing is loaded then.
        """
        self._require_averages(state_dict)
        state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        if isinstance(state, Mapping) and state:
            if any(state.values()):  # flat distributed checkpoints give an empty entry to each parameter
                self.warn_once(
                    "moments",
                    f"{self._name}.load_state_dict: the state is that of an optimizer with moments of its own. Those "
                    "of a sum of losses cannot be taken apart, and are left out: the moments start afresh.",
                )
            state_dict = {**state_dict, "state": {}}
        super().load_state_dict(state_dict)

    def _require_averages(self, state_dict: object) -> None:
        """Refuse a state whose groups have another number of averages. What else may be wrong with it shows later."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        for group in groups if isinstance(groups, (list, tuple)) else []:
            betas = group.get("betas") if isinstance(group, Mapping) else None
            if isinstance(betas, (list, tuple)) and len(betas) != self.betas_wanted:
                raise ValueError(
                    f"{self._name}.load_state_dict: `betas` must be {self.betas_wanted} numbers, and a group of the "
                    f"state has {betas!r}: it is that of another optimizer. Nothing was loaded."
                )

    # -------------------------------------------------------------------------------------------- one step

    def observe(self, rows: list[Row], losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Row]:
        for group in self.param_groups:  # schedulers, users and checkpoints change them
            self._require_options(group)
        groups = self._groups(params)
        self._widen(rows, groups)
        lengths = [self.entry_lengths(row, params) for row in rows]
        self.measure(_relative(rows, lengths, losses[0].device))
        rows = self.prepared(rows, lengths, params)
        found = [self._moments(name, row, params, groups) for name, row in zip(self.names, rows, strict=True)]
        divisors = self.divisors([each.root for each in found])
        exact = any(options["eps"] == 0 for options, _ in groups)
        return [
            moments.quotients(each.first, by, each.corrections, exact) for each, by in zip(found, divisors, strict=True)
        ]

    def prepared(self, rows: list[Row], lengths: Sequence[Row], params: Sequence[Tensor]) -> list[Row]:
        """What the moments are moments of.

        Args:
            rows: The gradients, one row per present loss.
            lengths: The lengths of their entries, scalars.
            params: The parameters.

        Returns:
            Rows of the same form.
        """
        return rows

    def divisors(self, roots: list[Row]) -> list[Row]:
        """What the first moments are divided by.

        Args:
            roots: √v̂ᵢ + ε, one row per present loss.

        Returns:
            Rows of the same form.
        """
        return roots

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if not (self.measured <= 1).all():
            long = [name for name, size in zip(self.names, self.measured.tolist(), strict=True) if not size <= 1]
            raise RuntimeError(
                f"{self._name}: gradients longer than 1e60 or shorter than 1e-60 are out of range, and so are those in "
                f"single precision longer than 1e18: here that of {', '.join(map(repr, long))}. The method keeps their "
                "squares. Divide the losses by a constant. Nothing was written."
            )
        return np.ones(len(gram))

    def _groups(self, params: Sequence[Tensor]) -> list[tuple[dict[str, Any], list[int]]]:
        """Places of the parameters that have the same options."""
        found: dict[int, tuple[dict[str, Any], list[int]]] = {}
        for j, p in enumerate(params):
            options = self.group(p)
            found.setdefault(id(options), (options, []))[1].append(j)
        return list(found.values())

    def _widen(self, rows: list[Row], groups: Sequence[tuple[dict[str, Any], list[int]]]) -> None:
        """Take double precision where squares of gradients that ε does not hide vanish in single precision."""
        least = torch.finfo(torch.float32)
        for options, places in groups:
            if options["eps"] < least.tiny**0.5 / least.eps:
                for row in rows:
                    for j in places:
                        g = row[j]
                        row[j] = None if g is None else g.double()

    def _moments(
        self,
        name: str,
        row: Row,
        params: Sequence[Tensor],
        groups: Sequence[tuple[dict[str, Any], list[int]]],
    ) -> _Moments:
        """Go on with the moments of one loss, and keep them."""
        before = [self._kept(key, name, row, params) for key in ("exp_avg", "exp_avg_sq")]
        counts = dict(self.memory.get("exp_count", {}).get(name, {}))
        found: list[Row] = [[None] * len(row) for _ in range(3)]
        corrections = [1.0] * len(row)
        for options, places in groups:
            here = [j for j in places if row[j] is not None]
            if not here:
                continue
            now = [g for j in here if (g := row[j]) is not None]
            b1, b2 = options["betas"][:2]
            steps = [counts.get(self.place(params[j]), 0) + 1 for j in here]
            counts.update({self.place(params[j]): k for j, k in zip(here, steps, strict=True)})
            first = moments.averages([before[0][j] for j in here], now, b1)
            second = moments.square_averages([before[1][j] for j in here], now, b2)
            root = moments.roots(second, [1 - b2**k for k in steps], options["eps"])
            for j, k, *entries in zip(here, steps, first, second, root, strict=True):
                corrections[j] = 1 - b1**k
                for kept, entry in zip(found, entries, strict=True):
                    kept[j] = entry
        first_row, second_row, root_row = found
        self.keep_row("exp_avg", name, first_row, params)
        self.keep_row("exp_avg_sq", name, second_row, params)
        self.memory["exp_count"] = {**self.memory.get("exp_count", {}), name: counts}
        return _Moments(first_row, root_row, corrections)

    def _kept(self, key: str, name: str, row: Row, params: Sequence[Tensor]) -> Row:
        """A row of the memory, of the same shapes as this one."""
        kept = self.row_state(key, name, params)
        for j, (m, g) in enumerate(zip(kept, row, strict=True)):
            if m is not None and g is not None and m.shape != g.shape:
                raise RuntimeError(
                    f"{self._name}.backward: the moments of {name!r} in parameter {self.place(params[j])} have shape "
                    f"{tuple(m.shape)}, and its gradient has shape {tuple(g.shape)}. They are those of another model: "
                    "load the state of this one, or build the optimizer anew."
                )
        return kept


class _Moments(NamedTuple):
    """Adam's state of one loss, in this step.

    Attributes:
        first: m, a row.
        root: √v̂ + ε, a row.
        corrections: What m is divided by, one number per entry.
    """

    first: Row
    root: Row
    corrections: list[float]


def _relative(rows: Sequence[Row], lengths: Sequence[Row], device: torch.device) -> Tensor:
    """The longest entry of each loss over what may be squared, in the first column, (m, P)."""
    found = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.float64, device=device)
    for i, (row, own) in enumerate(zip(rows, lengths, strict=True)):
        kinds = {(g.dtype, g.device) for g in row if g is not None}
        for dtype, where in kinds:
            here = [n for g, n in zip(row, own, strict=True) if g is not None and (g.dtype, g.device) == (dtype, where)]
            found[i, 0] += torch.stack([n for n in here if n is not None]).max().to(device) / _LONGEST[dtype]
    return found
