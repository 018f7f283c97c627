"""The wrapper that every method is: a true torch optimizer around another one.

Torch owns `param_groups`, `state`, `defaults` and the hooks of the wrapped optimizer; this class hands them through.
What a method learns between steps (windows, averages, weights) is its *memory*. ``backward`` proposes a new memory,
``step`` commits it, ``zero_grad`` discards it.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradsurgery import losses as losses_module
from gradsurgery import misuse
from gradsurgery.batch import FEWEST, Arguments, Batch, Reading, arguments, parameters, shown_mode
from gradsurgery.communication import ALONE, Communicator, Processes, hold, shards
from gradsurgery.gradients import Refused
from gradsurgery.graph import hooks
from gradsurgery.graph.torch_private import hooks_of_base, is_flat, optimizer_hooks
from gradsurgery.losses import Losses, Tasks
from gradsurgery.report import Report
from gradsurgery.settings import Checks, InOrder, Phase, Settings, Switch, shown
from gradsurgery.text import calling_frame, warn
from gradsurgery.transaction import Transaction, listed, wrong_entry, wrong_memory

# How near what is set on a method has to be to the name of a switch to be taken for it.
_NEAR = 0.85
_ZEROS = np.zeros(4, dtype=np.uint64)
_KEY = "gradsurgery"  # the one key that state_dict has beyond torch's own


_P = ParamSpec("_P")
_R = TypeVar("_R")


class Switches(TypedDict, total=False):
    """Arguments that every method takes; see :class:`MultiLossOptimizer`."""

    reduction: Literal["sum", "mean"]
    nonfinite: Literal["raise", "skip", "drop", "defer"]
    every: int
    warmup: int
    preference: Mapping[str, float] | Sequence[float] | None
    weight_momentum: float
    min_weight: float | None
    max_weight: float | None
    seed: int
    distributed: bool
    process_group: dist.ProcessGroup | None
    debug: bool


def told(backward: Callable[_P, _R]) -> Callable[_P, _R]:
    """Tell those who pass each loss as an argument of its own that they go into one.

    Args:
        backward: The method, which takes `losses` and keywords.

    Returns:
        The same method.
    """
    known = inspect.signature(backward).parameters
    open_ended = inspect.Parameter.VAR_KEYWORD in {p.kind for p in known.values()}

    @functools.wraps(backward)
    def called(*args: _P.args, **options: _P.kwargs) -> _R:
        losses = len(args) - 1 + ("losses" in options)
        if losses != 1 or not (open_ended or options.keys() <= known.keys()):
            raise _wrong_call(args, options, list(known))
        return backward(*args, **options)

    return called


def _wrong_call(args: Sequence[Any], options: Mapping[str, Any], known: Sequence[str]) -> TypeError:
    name = args[0].display_name
    unknown = [key for key in options if key not in known]
    if len(args) > 2:
        return TypeError(
            f"{name}.backward: takes all losses in one argument, got {len(args) - 1}. Pass a dict or a list: "
            'backward({"first": loss1, "second": loss2}), or backward([loss1, loss2]).'
        )
    if unknown and all(isinstance(options[key], Tensor) or options[key] is None for key in unknown):
        entries = ", ".join(f'"{key}": {key}' for key in unknown)
        return TypeError(
            f"{name}.backward: takes all losses in one argument, and not each by its name. Pass a dict or a list: "
            f"backward({{{entries}}})."
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0].lower(), known[2:], n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        return TypeError(f"{name}.backward: there is no argument `{unknown[0]}`{hint}.")
    return TypeError(f"{name}.backward: `losses` must be given once. Pass a dict or a list of scalar losses.")


class MultiLossOptimizer(Optimizer):
    """An optimizer that takes several losses.

    Base of all methods; not used by itself. It wraps any torch optimizer and is one: schedulers, gradient scalers,
    hooks, pickling and checkpoints work as on the wrapped one.

    Args:
        optimizer: The optimizer that makes the step, kept as `base`. For surgery it may be a weighter.
        reduction: "sum": the result stands in for the gradient of the plain sum of the losses. "mean": everything,
            private parameters included, is divided by the number of present tasks.
        nonfinite: What to do when a loss or a gradient is inf or nan. "raise": raise an error that names the loss.
            "skip": write nothing. "drop": leave out the tasks whose loss value is not finite. With a gradient scaler,
            inf and nan are always written through, so that the scaler skips the step. Where the update needs one
            backward pass only, gradients are examined under "skip" alone: it would cost a pass over all of them.
            "defer", for `FixedWeighter`, `UncertaintyWeighter`, `IMTLLWeighter` and `DWAWeighter`: no call waits for
            the device. Values are looked at in the next call, whose report names the losses that were not finite
            (`nonfinite_before`). Their step adds zeros to ``.grad`` and teaches the method nothing; the wrapped
            optimizer makes it all the same, momentum and weight decay included, and it counts as a step.
        every: Compute new weights in every k-th committed step and reuse the last ones, at the cost of one or two
            backward passes, in between. A surgery makes one pass per loss there too where the graph does not tell which
            parameters are private: under reentrant activation checkpointing, in a compiled model, or below functions
            written in Python that the losses reach in different ways. `shared_params` spares these, but for reentrant
            checkpointing and ``fully_shard``: there gradients alone tell whether two losses reach any that it names.
        warmup: Number of committed steps at the beginning that use the plain sum.
        preference: The user's priorities, > 0, by name or in the order of the losses. They multiply the rows (surgery)
            or the weights (weighting), unless the paper has its own place for them. What any argument gives in order
            belongs to the names that the first call has in this order, and stays theirs; ``state_dict`` keeps it.
        weight_momentum: a in w ← a w_last + (1 − a) w, 0 ≤ a < 1: smoothed weights against noisy gradients (CR-MOGM,
            Zhou et al., NeurIPS 2022, algorithm 1). The first step uses w.
        min_weight: Lower bound of the method's weights in sum scale (1 is the plain sum), applied last.
        max_weight: Upper bound, likewise.
        seed: Start of the method's own random stream, below 2**64. Draws depend on the seed and the number of
            committed steps only.
        distributed: The processes of the default group train this model together, each on its part of the batch.
            Gradients and losses are exchanged, so that every process makes the same step. With parameters sharded by
            ``fully_shard`` or a tensor-parallel plan this is detected automatically.
        process_group: The same with these processes.
        debug: Compare the parameters of all processes in every call, and raise where they differ.
        **unknown: There is no other argument; the error says which one may have been meant.

    Raises:
        TypeError: `optimizer` is not an optimizer, a nesting that has no meaning, or an argument that is not known.
        ValueError: An argument is out of range.
    """

    #: Format of the saved memory. A class raises it when it changes what it keeps.
    version = 1
    #: The method keeps something between steps by the names of the losses, so that they must stay the same.
    stateful = False
    #: What the weights stand for when all rows are equal: "sum" (m equal rows g give m·g), "paper" or "priority".
    scale: Literal["sum", "paper", "priority"] = "sum"
    #: The method works by one weight per loss; those that do not refuse what needs weights.
    has_weights = True
    #: The class takes ``nonfinite="defer"``: its weights can be found without a look at the values of the losses. A
    #: subclass says so for itself.
    can_defer = False
    #: Why `preference` is refused; empty if it is not.
    preference_refused = ""
    reduction = Switch()
    nonfinite = Switch()
    every = Switch()
    warmup = Switch()
    preference = Switch()
    weight_momentum = Switch()
    min_weight = Switch()
    max_weight = Switch()
    seed = Switch()
    distributed = Switch()
    process_group = Switch()
    debug = Switch()

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        nonfinite: Literal["raise", "skip", "drop", "defer"] = "raise",
        every: int = 1,
        warmup: int = 0,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        weight_momentum: float = 0.0,
        min_weight: float | None = None,
        max_weight: float | None = None,
        seed: int = 0,
        distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        debug: bool = False,
        **unknown: object,
    ) -> None:
        # Kept, since a framework may run these methods on an object of a subclass that it makes up.
        self._name = type(self).__name__
        # Not calling super().__init__ is what makes hooks run once, in the base: it would patch `step` on this class.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{self._name}: `optimizer` must be a torch.optim.Optimizer, got {shown(optimizer)}."
                f"{_instead(self._name, optimizer)}"
            )
        if unknown:
            raise TypeError(f"{self._name}: {unknown_options(type(self), unknown, optimizer)}")
        self.base = optimizer
        self.check = Checks(self._name)
        self.settings = Settings()
        self._take(
            reduction=reduction,
            nonfinite=nonfinite,
            every=every,
            warmup=warmup,
            preference=preference,
            weight_momentum=weight_momentum,
            min_weight=min_weight,
            max_weight=max_weight,
            seed=seed,
            process_group=process_group,
            distributed=bool(distributed) or process_group is not None,
            debug=debug,
        )
        self._require_together()
        # All else that changes after construction is in there and is changed in place: a framework may run these
        # methods on an object of its own that shares these attributes (Lightning does).
        self.transaction = Transaction()
        self._stream = RandomStream()
        if isinstance(optimizer, MultiLossOptimizer):
            optimizer.transaction.loop.plain_steps = None  # nobody calls `backward` of the one inside
        misuse.watch(self)
        hooks.look()

    def _checks(self) -> dict[str, Callable[[Any], Any]]:
        """What a value of each switch has to pass, and what makes of it what the settings hold."""
        check = self.check
        return {
            "reduction": lambda value: check.choice("reduction", value, ("sum", "mean")),
            "nonfinite": lambda value: check.choice("nonfinite", value, ("raise", "skip", "drop", "defer")),
            "every": lambda value: check.count("every", value, least=1),
            "warmup": lambda value: check.count("warmup", value, least=0),
            "preference": lambda value: None if value is None else check.numbers("preference", value, above=0.0),
            "weight_momentum": lambda value: check.number("weight_momentum", value, least=0.0, below=1.0),
            "min_weight": lambda value: check.bound("min_weight", value, -math.inf),
            "max_weight": lambda value: check.bound("max_weight", value, math.inf),
            "seed": lambda value: check.count("seed", value, least=0, below=2**64),
            "process_group": lambda value: value,
            "distributed": bool,
            "debug": bool,
        }

    def _take(self, **given: Any) -> None:
        checks = self._checks()
        self.change_settings(**{name: checks[name](value) for name, value in given.items()})

    def assign(self, switch: str, value: Any) -> None:
        """Set a switch, as ``optimizer.every = 4`` does: checked as the constructor checks it.

        Args:
            switch: Its name.
            value: The new value.

        Raises:
            Exception: What the constructor raises, mostly a ValueError. The old value stays.
        """
        before = self.settings
        try:
            self._take(**{switch: value})
            if switch == "process_group" and value is not None:
                self.change_settings(distributed=True)
            self._require_together()
        except Exception:
            self.settings = before
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__ and not name.startswith("_") and not hasattr(type(self), name):
            self._warn_of_typo(name, calling_frame(1).f_globals.get("__name__", ""))
        super().__setattr__(name, value)

    def _warn_of_typo(self, name: str, module: str) -> None:
        """Warn where somebody else than the authors of this class sets what is nearly the name of a switch."""
        if module.startswith("gradsurgery.") or module in {kind.__module__ for kind in type(self).__mro__}:
            return
        entries = {key: entry for kind in type(self).__mro__ for key, entry in vars(kind).items()}
        switches = sorted(key for key, entry in entries.items() if isinstance(entry, Switch))
        if near := difflib.get_close_matches(name.lower(), switches, n=1, cutoff=_NEAR):
            warn(
                f"{type(self).__name__}: there is no switch `{name}`, and setting it does nothing. Did you mean "
                f"`{near[0]}`? The switches are {', '.join(switches)}."
            )

    def _require_together(self) -> None:
        """Refuse switches that have no meaning together, or with this method."""
        self._require_deferrable()
        if self.process_group is not None and not self.distributed:
            raise ValueError(
                f"{self._name}: `distributed` must be true with a `process_group`, got {self.distributed!r}. Set "
                "`process_group` to None first."
            )
        if self.min_weight > self.max_weight:
            raise ValueError(
                f"{self._name}: `min_weight` {self.min_weight!r} exceeds `max_weight` {self.max_weight!r}."
            )
        if self.preference is not None and self.preference_refused:
            raise ValueError(f"{self._name}: `preference` has no effect here: {self.preference_refused}.")
        if not self.has_weights and (self.every > 1 or self.settings.changes_weights):
            raise ValueError(
                f"{self._name}: `every`, `weight_momentum`, `min_weight` and `max_weight` need a method that "
                "works by one weight per loss, and this one does not."
            )

    def _require_deferrable(self) -> None:
        if self.nonfinite != "defer":
            return
        if not vars(type(self)).get("can_defer"):
            raise ValueError(
                f'{self._name}: `nonfinite` "defer" needs weights that do not wait for the values of the losses, which '
                f"FixedWeighter, UncertaintyWeighter, IMTLLWeighter and DWAWeighter have, got 'defer'. "
                'Pass "raise", "skip" or "drop".'
            )
        if self.distributed:
            raise ValueError(
                f"{self._name}: `nonfinite` \"defer\" works in one process, got 'defer' with distributed processes. "
                'Pass "raise", "skip" or "drop".'
            )

    @classmethod
    def around(cls, optimizer: Optimizer, **options: Any) -> MultiLossOptimizer:
        """Build the method where an optimizer stands: around it. Methods that make the step themselves take its place.

        Args:
            optimizer: The torch optimizer.
            **options: Arguments of the constructor.

        Returns:
            The method.
        """
        return cls(optimizer, **options)

    # ------------------------------------------------------------------------------ torch's contract

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer: the same list, the same dicts."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The per-parameter state of the wrapped optimizer. A method's own memory is not in it."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the wrapped optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # The hook registrars that torch.optim.Optimizer defines write into these six dicts. A hook receives the base.
    _optimizer_step_pre_hooks = hooks_of_base("step_pre")
    _optimizer_step_post_hooks = hooks_of_base("step_post")
    _optimizer_state_dict_pre_hooks = hooks_of_base("state_dict_pre")
    _optimizer_state_dict_post_hooks = hooks_of_base("state_dict_post")
    _optimizer_load_state_dict_pre_hooks = hooks_of_base("load_state_dict_pre")
    _optimizer_load_state_dict_post_hooks = hooks_of_base("load_state_dict_post")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A gradient scaler asks before it steps. It is to unscale the gradients and skip the step, as with
        # any optimizer that does not have this.
        self.transaction.loop.see_scaler(self, calling_frame(1))
        raise AttributeError(f"{self._name} leaves the scale to the gradient scaler.")

    @property
    def train(self) -> Callable[[], Any]:
        """``train`` of the wrapped optimizer, where it has one, as schedule-free optimizers do."""
        base: Any = self.base
        found: Callable[[], Any] = base.train
        return found

    @property
    def eval(self) -> Callable[[], Any]:
        """``eval`` of the wrapped optimizer, where it has one."""
        base: Any = self.base
        found: Callable[[], Any] = base.eval
        return found

    @property
    def consolidate_state_dict(self) -> Callable[..., Any]:
        """``consolidate_state_dict`` of the wrapped optimizer, where it has one, as ZeroRedundancyOptimizer does."""
        base: Any = self.base
        found: Callable[..., Any] = base.consolidate_state_dict
        return found

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the step of the wrapped optimizer, and commit what the last ``backward`` proposed.

        Once the wrapped optimizer has made its update the commit is certain, whatever a hook that runs after the step
        raises; ``state_dict`` in such a hook has the new memory already. If it raises before, nothing is committed.

        Args:
            closure: Evaluates the model and calls ``backward``, for optimizers such as L-BFGS. It returns
                ``report.objective``.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RuntimeError: Gradients were accumulated that no call of ``backward`` has acted on.
        """
        transaction = self.transaction
        if transaction.accumulated is not None and closure is None:
            raise RuntimeError(
                f"{self._name}.step: gradients were accumulated that no call has acted on. Leave out "
                "accumulate=True in the backward() before step(), or throw them away with zero_grad()."
            )
        if closure is None:
            transaction.loop.see_step(self)
        try:
            with transaction.loop.step():
                result = self.base.step(closure)
            if transaction.updated is None:  # not every optimizer runs hooks
                transaction.update()
        finally:
            transaction.commit()
        if transaction.accumulated is not None:
            raise RuntimeError(
                f"{self._name}.step: the closure accumulated gradients and did not act on them, so the step was made "
                "without. Leave out accumulate=True in its last backward()."
            )
        if closure is not None:
            transaction.loop.see_step(self)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, accumulated ones too, and discard what ``backward`` proposed but no step committed.

        Args:
            set_to_none: As in torch.
        """
        self.base.zero_grad(set_to_none)
        self.transaction.discard()
        hooks.look()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer.

        Args:
            param_group: As in torch.
        """
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and the method's committed memory under one more key.

        Returns:
            A dict that ``torch.load(weights_only=True)`` reads and that the bare optimizer can load too.
        """
        state = dict(self.base.state_dict())
        inner = state.pop(_KEY, None)
        state[_KEY] = {
            "class": self._name,
            "version": self.version,
            "memory": _copied(self.transaction.learnt),
            "inner": inner,
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, saved by this class or by the bare wrapped optimizer.

        The memory of another method, or of another version of this one, is not used: a warning says so, and the method
        starts afresh. So it does, without a warning, from a bare optimizer's state.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: It is not the state of an optimizer, or a part of what this class saved is missing or of a
                wrong kind. Nothing is loaded then.
        """
        self._require_state(state_dict)
        bare = dict(state_dict)
        own = bare.pop(_KEY, None)
        memory: dict[str, Any] = {"step": 0}
        if own is not None:
            same = self._require_whole(own)
            if same:
                memory = _copied(own["memory"])
            else:
                warn(
                    f"{self._name}.load_state_dict: the memory in this state belongs to {own['class']} "
                    f"(version {own['version']}), not to {self._name} (version {self.version}). "
                    "The parameters' state is loaded; the method starts afresh."
                )
            if own["inner"] is not None and isinstance(self.base, MultiLossOptimizer):
                bare[_KEY] = own["inner"]

        def loaded() -> None:
            self.transaction.load(memory)
            self.transaction.loop.plain_steps = None

        with _ahead_of(optimizer_hooks(self, "load_state_dict_post"), loaded):
            self.base.load_state_dict(bare)
        hooks.look()

    def _require_state(self, state: object) -> None:
        where = f"{self._name}.load_state_dict: `state_dict` must be what state_dict() of an optimizer returned"
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}, got {shown(state)}.")
        kinds = {"state": Mapping, "param_groups": Sequence}
        if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
            raise ValueError(
                f"{where}, with 'state' and 'param_groups'. This one has no {' and no '.join(map(repr, wrong))}; its "
                f"keys are {listed(state)}. Is it the state of a model, or a checkpoint with the optimizer's "
                "state inside? Nothing was loaded."
            )

    def _require_whole(self, entry: Any) -> bool:
        """Check the entry of this library in a state. Returns whether its memory is one of this class."""
        wrong = wrong_entry(entry)
        same = not wrong and (entry["class"], entry["version"]) == (self._name, self.version)
        # What another class keeps is not read. A class from elsewhere may keep what it likes.
        if same:
            wrong = wrong_memory(entry["memory"], type(self).__module__.startswith("gradsurgery."))
        if not wrong:
            return same
        raise ValueError(
            f"{self._name}.load_state_dict: the entry {_KEY!r} of the state {wrong}: it was cut off or changed. "
            "Nothing was loaded. Delete the entry to load the rest; the method then starts afresh."
        )

    def __getstate__(self) -> dict[str, Any]:
        # What pickle and deepcopy keep: all but a `step` that a scheduler has put on the instance.
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiLossOptimizer:
        # The copy works with the same processes: a group is no part of the optimizer, and cannot be copied.
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        # As they are; torch's version would patch `step` on this class.
        self.__dict__.update(state)
        self.transaction.commit()  # a copy made by a hook is in no step
        misuse.watch(self)
        hooks.look()

    # ------------------------------------------------------------------------------- what users call

    @property
    def report(self) -> Report | None:
        """The report of the last ``backward``; None before the first."""
        return self.transaction.report

    @property
    def accumulated(self) -> tuple[str, ...]:
        """Names of the losses whose gradients were accumulated, and that no call of ``backward`` has acted on yet."""
        accumulated = self.transaction.accumulated
        return () if accumulated is None else tuple(accumulated.present)

    @told
    def backward(
        self,
        losses: Losses,
        *,
        names: Sequence[str] | None = None,
        accumulate: bool = False,
        batch_size: float | Mapping[str, float] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        other_optimizers: Optimizer | Iterable[Optimizer] = (),
        features: Tensor | Sequence[Tensor] | None = None,
        residuals: Mapping[str, Tensor] | Iterable[Tensor] | None = None,
        others: Optimizer | Iterable[Optimizer] = (),
        per_sample: bool | Literal["keep", "rerun"] = False,
    ) -> Report:
        """Turn the losses into gradients and add them to ``.grad``.

        Replaces ``sum(losses).backward()``. If anything raises, ``.grad`` and the method's memory are as before.

        Args:
            losses: Scalar losses: a dict of names to tensors (best), a list, tuple, named tuple or 1-d tensor. ``None``
                in place of a tensor marks a task that is absent from this batch. A function without arguments in place
                of a tensor is called, and returns one: with one forward pass per loss no graph is differentiated twice.
            names: Names for losses in a list or a 1-d tensor, in their order; "0", "1" and so on by default.
            accumulate: This is one of several micro-batches, not the last: keep the gradients of each loss and write
                nothing. It costs one row per loss, and for a moment two and one more while a micro-batch is added. The
                next call without it acts once on the sum. Divide each loss by the number of micro-batches, as always.
            batch_size: Number of samples on this process, for all losses or by name, where processes have parts of
                different sizes. 0 is an absent task.
            scaler: The gradient scaler of mixed precision. The method sees unscaled gradients, ``.grad`` gets scaled
                ones, and ``scaler.step(optimizer)`` follows as usual.
            retain_graph: Keep the graph, as in torch.
            other_optimizers: One more optimizer, or several, whose parameters the losses reach. They get the plain
                gradient of the sum.
            features: The shared representation, one tensor or several. Weights then come from the gradients there
                (MGDA-UB and its like), and one backward pass through the trunk follows: cheaper, and another method.
                Every loss must reach it.
            residuals: What :class:`gradsurgery.NTKWeighter` asks for, here or below a surgery.
            others: The old name of `other_optimizers`.
            per_sample: There is one loss per sample, loss i depending on sample i only: a 1-d tensor, everything that
                its ``unbind()`` returns, or means over groups of one, as :func:`gradsurgery.losses_by_group` makes.
                Surgery methods that need inner products only then take two backward passes, whatever the number of
                losses; see :class:`gradsurgery.surgery.base.Surgery`. True: what the first pass leaves is held, and
                spares the second one, where the graph proves that samples stay apart and memory allows it. "rerun":
                always two passes, which takes least memory. "keep": hold it in every step that makes no check. That
                losses depend on their own samples is then taken on your word in these steps. By default
                ``engine="auto"`` looks for samples from 16 losses on, and forms rows where it finds none.

        Returns:
            What happened; also kept as `report`.

        Raises:
            TypeError: The losses are of a kind that cannot be differentiated, or another argument is of a wrong kind.
            ValueError: There is no loss, or one is not a scalar, or was passed twice.
            RuntimeError: A loss has no graph, reaches no parameter, or is not finite under ``nonfinite="raise"``.
        """
        transaction, comm = self.transaction, self._communicator()
        transaction.loop.plain_steps = None
        if self.settings.debug:
            comm.require_replicas(parameters(self))
        going_on = accumulate or transaction.accumulated is not None
        if going_on or not comm.is_alone:
            self._require_possible(going_on, not comm.is_alone)
        further = other_optimizers if others == () else self._renamed(other_optimizers, others)
        tasks = losses_module.read(losses, self._name, may_be_empty=not comm.is_alone or going_on, names=names)
        # With several processes this call may be the first to see a task, so the names are those of the whole list.
        with self.proposing(tasks.names, tasks.present):
            wanted = self._samples_wanted(per_sample) if per_sample is not False or len(tasks.present) >= FEWEST else ""
            given = arguments(
                self._name, accumulate, batch_size, scaler, retain_graph, further, features, residuals, wanted
            )
            if not accumulate:
                transaction.flags += transaction.repeated
            transaction.report = self._report_on(tasks, comm, given)
        hooks.look()
        return transaction.report

    def _renamed(
        self, new: Optimizer | Iterable[Optimizer], old: Optimizer | Iterable[Optimizer]
    ) -> Optimizer | Iterable[Optimizer]:
        """Read `other_optimizers` under its old name."""
        if new != ():
            raise TypeError(
                f"{self._name}.backward: `others` is the old name of `other_optimizers`. Give the latter alone."
            )
        return old

    def _report_on(self, tasks: Tasks, comm: Communicator, given: Arguments) -> Report:
        """Read the losses, and act on them unless more micro-batches follow."""
        transaction = self.transaction
        if given.accumulate and comm.is_alone and not tasks.present:
            # A micro-batch without any task adds nothing; the last one acts on what was kept all the same.
            return Report((), np.zeros(0), flags=["accumulating"])
        reading = Reading(self._name, parameters(self), self.settings, transaction, comm, given)
        batch = reading.read(tasks)
        if batch is None:  # no loss is left
            report = Report((), np.zeros(0), flags=[*transaction.flags, "skipped"])
            transaction.reject()
        elif given.accumulate:
            transaction.accumulated = batch.accumulated
            report = Report(batch.names, batch.values, flags=[*transaction.flags, "accumulating"])
        else:
            transaction.loop.see_gradients(self, batch)
            report = self._act_on(batch, reading, tasks)
            transaction.loop.proposed(self, given.scaler is not None)
            transaction.accumulated = None
        if given.accumulate:
            transaction.repeat_flags()
        else:
            transaction.repeated = ()
        return report

    def _act_on(self, batch: Batch, reading: Reading, tasks: Tasks) -> Report:
        """Act on the losses; once more, one by one, where samples turn out to depend on each other."""
        flags = list(self.transaction.flags)
        try:
            return self._act(batch)
        except Refused as refused:
            mode = batch.per_sample
            if mode != "auto":
                raise RuntimeError(
                    f"{self._name}.backward: per_sample={shown_mode(mode)}: {refused}. Nothing was written. "
                    "per_sample=False takes one backward pass per loss."
                ) from None
            reason = str(refused)
        self.transaction.flags[:] = flags
        again = reading._replace(unsampled=reason).read(tasks)
        assert again is not None
        return self._act(again)

    def _samples_wanted(self, per_sample: bool | str) -> str:
        """What is wanted of one loss per sample: nothing, "auto", "choose", "keep" or "rerun"."""
        if per_sample:
            raise ValueError(
                f"{self._name}.backward: `per_sample` is for surgery methods. A weighting sees values of losses "
                "and takes one backward pass anyway. Leave it out."
            )
        return ""

    def _require_possible(self, accumulates: bool, exchanges: bool) -> None:
        """Refuse calls that a switch has no meaning for."""

    def _communicator(self) -> Communicator:
        """The processes to exchange with, in this call."""
        if not dist.is_available() or not dist.is_initialized():
            if self.settings.distributed:
                raise RuntimeError(
                    f"{self._name}.backward: distributed=True needs torch.distributed.init_process_group() first."
                )
            return ALONE
        if any(map(is_flat, parameters(self))):
            raise RuntimeError(
                f"{self._name}.backward: FullyShardedDataParallel flattens parameters, so that gradients of one loss "
                "cannot be told from that of another. Use torch.distributed.fsdp.fully_shard, or "
                "DistributedDataParallel with distributed=True."
            )
        group = self.process_group or dist.group.WORLD
        assert group is not None
        if self.distributed or shards.sharded(parameters(self)):
            hold(self, group)
            return Processes(group, self._name)
        self._warn_of_ranks()
        return ALONE

    def proposing(self, names: tuple[str, ...], present: tuple[str, ...]) -> AbstractContextManager[None]:
        """Open a draft of the memory, which becomes the proposal at the end.

        Args:
            names: Names of the losses, absent ones included.
            present: Those that this batch has.

        Returns:
            A context, at whose end the draft is closed.

        Raises:
            ValueError: The names are not those of the losses that the method keeps something for.
        """
        # Gradients that are gone were cleared by `model.zero_grad()`, and what was proposed with them is void too.
        transaction = self.transaction
        self._require_closed("backward")
        waits = transaction.proposed is not None and transaction.accumulated is None
        if waits and all(p.grad is None for p in parameters(self)):
            transaction.proposed = None
        before = transaction.learnt if transaction.proposed is None else transaction.proposed
        known = before.get("tasks")
        if self.stateful and known is not None and set(known) != set(names):
            raise ValueError(
                f"{self._name}.backward: the names of the losses must stay the same, since the method keeps "
                f"something for each: it knows {known}, got {list(names)}. Pass a dict with every name in every "
                "call, and None for a task that is absent."
            )
        draft = transaction.open(names, present)
        if known is None and (self.stateful or self.check.by_order):
            self._learn_names(names)
        return draft

    # --------------------------------------------------------------------- what methods are built on

    def _act(self, batch: Batch) -> Report:
        """Do the work of ``backward``: surgery and weighting each in its own way."""
        raise TypeError(f"{self._name}: wrap the optimizer in a method, such as PCGrad, not in this base class.")

    @property
    def memory(self) -> dict[str, Any]:
        """The draft of the memory that this call will propose. Replace its values; never change them in place.

        With one surgery per parameter or group, each has its own memory.
        """
        return self.transaction.memory

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses that take part, (m,)."""
        return self.transaction.present

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of all losses of this call, absent ones included."""
        return self.transaction.names

    @property
    def display_name(self) -> str:
        """What errors call this optimizer."""
        return self._name

    @property
    def phase(self) -> Phase:
        """What this step does about weights: "solve", "reuse" the last ones, or leave them at one in a "warmup"."""
        return self.settings.phase(self.memory, self.names)

    def rng(self) -> np.random.Generator:
        """The random stream of this step: the same for the same seed and number of committed steps.

        Returns:
            The generator, at the start of the stream. Another call puts it there again.
        """
        return self._stream.at(self.settings.seed, self.transaction.whole["step"])

    def warn_once(self, kind: str, text: str) -> None:
        """Warn the user, but not a second time about the same.

        Args:
            kind: Of what.
            text: The warning: what is wrong, and what to do.
        """
        self.transaction.warn_once(kind, text)

    def flag(self, what: str) -> None:
        """Put a flag on the report of this call.

        Args:
            what: For example "stationary".
        """
        self.transaction.flag(what)

    def preferences(self) -> np.ndarray:
        """The user's priorities of the present tasks.

        Returns:
            (m,); ones if there are none.

        Raises:
            ValueError: A present task has none.
        """
        return (
            np.ones(len(self.names)) if self.preference is None else np.array(self.each("preference", self.preference))
        )

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the losses in the order of the first call, for what the user gave in order."""
        first = self.transaction.whole.get("tasks")
        return tuple(first) if first and self.check.by_order else self.all_names

    def by_name(self, argument: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put the names of the losses to what the user gave in their order.

        Args:
            argument: Name of the argument, for the error.
            given: By name; `InOrder` if it was given in order.

        Returns:
            By name.

        Raises:
            ValueError: There are more or fewer entries than losses.
        """
        names = self.all_names
        if not isinstance(given, InOrder):
            if given.keys() >= set(self.names):  # or the error is about what is missing
                self.require_known(argument, given)
            return given
        if given.keys() >= set(names):
            return given
        if len(given) != len(self.order):
            raise ValueError(
                f"{self._name}: `{argument}` must have one entry for each of the losses {list(self.order)}, in this "
                f"order, got {len(given)}. A dict gives entries by name."
            )
        return dict(zip(self.order, given.values(), strict=True))

    def require_known(self, argument: str, given: Mapping[str, Any]) -> None:
        """Look for names that no loss has: each is a slip, or a task that was left out of the dict.

        Args:
            argument: Name of the argument.
            given: By name.

        Raises:
            ValueError: There is one, and the method gets all names in every call. Otherwise a warning says so once.
        """
        names = self.all_names
        strangers = [name for name in given if name not in names]
        if not strangers:
            return
        told = f"{self._name}: `{argument}` has an entry for {strangers}, and the losses are {list(names)}."
        if self.stateful:  # which gets all names in every call
            raise ValueError(f"{told} Give an entry to losses only.")
        self.warn_once("names", f"{told} A task that is absent from this batch is passed as None.")

    def each(self, argument: str, given: Mapping[str, Any]) -> list[Any]:
        """Look up what the user gave for each present task.

        Args:
            argument: Name of the argument, for the error.
            given: By name; `InOrder` if it was given in order.

        Returns:
            One entry a present task.

        Raises:
            ValueError: A present task is missing, or there are more or fewer entries than losses.
        """
        known = self.by_name(argument, given)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise ValueError(
                f"{self._name}: `{argument}` must name every loss, {missing} is missing. It has {list(known)}."
            )
        return [known[name] for name in self.names]

    def smoothed(self, weights: np.ndarray) -> np.ndarray:
        """Apply `weight_momentum`, `min_weight` and `max_weight` to what the method gave.

        Args:
            weights: (m,).

        Returns:
            (m,).
        """
        if momentum := self.settings.weight_momentum:
            last = self.recall("smoothed_weights", weights)
            weights = momentum * last + (1 - momentum) * weights
            self.keep("smoothed_weights", weights)
        return self.settings.bounded(weights)

    def recall(self, key: str, default: float | np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        """Read a number kept for each loss.

        Args:
            key: Its name in the memory.
            default: What a loss has that has none yet: a number, or one per loss, (m,).
            names: Of which losses; by default those that are present.

        Returns:
            (m,), float64.
        """
        kept, names = self.memory.get(key, {}), self.names if names is None else names
        if isinstance(default, (int, float)):
            return np.array([kept.get(name, default) for name in names], dtype=np.float64)
        defaults = np.broadcast_to(default, len(names)).tolist()
        return np.array([kept.get(name, d) for name, d in zip(names, defaults, strict=True)], dtype=np.float64)

    def keep(self, key: str, values: np.ndarray, names: Sequence[str] | None = None) -> None:
        """Keep a number for each loss; the others keep theirs.

        Args:
            key: Its name in the memory.
            values: (m,).
            names: For which losses; by default those that are present.
        """
        names = self.names if names is None else names
        self.memory[key] = {**self.memory.get(key, {}), **dict(zip(names, values.tolist(), strict=True))}

    def _require_closed(self, call: str) -> None:
        if self.transaction.is_open:
            raise RuntimeError(
                f"{self._name}.{call}: was called while backward() of the same optimizer runs, in a hook or in the "
                "backward function of a node. A call must end before the next one begins. Nothing was written."
            )

    def _learn_names(self, names: tuple[str, ...]) -> None:
        # Names that are numbers say themselves where they belong.
        if self.stateful or not all(map(str.isdecimal, names)):
            self.memory["tasks"] = list(names)

    def _warn_of_ranks(self) -> None:
        """Replicas that drift apart give no sign of it."""
        if dist.get_world_size() > 1:
            self.warn_once(
                "ranks",
                f"{self._name}.backward: {dist.get_world_size()} processes run, and nothing is exchanged between them. "
                "Replicas of one model that see different batches drift apart. Pass distributed=True to the "
                "constructor, or process_group=. Processes that train models of their own can ignore this.",
            )

    # --------------------------------------------------------------------------- checks of arguments

    def change_settings(self, **changes: Any) -> None:
        """Replace settings.

        Args:
            **changes: The new values by name, as the constructor makes them.
        """
        self.settings = replace(self.settings, **changes)

    def require_positive(self, losses: np.ndarray, why: str) -> None:
        """Refuse losses that are not positive, by name.

        Args:
            losses: Values of the present losses, (m,).
            why: What they are needed for.

        Raises:
            ValueError: A loss is not positive.
        """
        bad = {name: float(value) for name, value in zip(self.names, losses, strict=True) if not value > 0}
        if bad:
            raise ValueError(
                f"{self._name}: every loss must be > 0, since {why}; got {bad}. Nothing was written. Where a loss is 0 "
                "now and then there is nothing to learn from it: pass None for it in that batch, or add a small "
                "constant to it, in every batch."
            )


class RandomStream:
    """Random numbers that depend on a seed and a number of steps, and on nothing else."""

    def __init__(self) -> None:
        self._generator: np.random.Generator | None = None

    def at(self, seed: int, step: int) -> np.random.Generator:
        """Start the stream of a step.

        Args:
            seed: The seed.
            step: Number of committed steps.

        Returns:
            The generator, at the start of this stream.
        """
        # Made once: setting its state costs a tenth of making one.
        if self._generator is None:
            self._generator = np.random.Generator(np.random.Philox(key=0))
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": _ZEROS, "key": np.array([seed, step], dtype=np.uint64)},
            "buffer": _ZEROS,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


@contextmanager
def _ahead_of(table: OrderedDict[int, Any] | None, act: Callable[[], None]) -> Iterator[None]:
    """Do something once the optimizer inside has done its work, before a hook of somebody else can raise.

    Args:
        table: Torch's table of the hooks that follow; None for an optimizer that runs none.
        act: What to do. Without hooks it is done at the end.

    Yields:
        Nothing.
    """
    done: list[bool] = []

    def first(*_: object) -> None:
        if not done:
            done.append(True)
            act()

    if table is None:
        yield
    else:
        handle = hooks.ours(RemovableHandle, table)
        table[handle.id] = first
        table.move_to_end(handle.id, last=False)
        try:
            yield
        finally:
            handle.remove()
    first()


def _copied(value: Any) -> Any:
    """Copy the containers, share the tensors: memory never changes a value in place."""
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(entry) for entry in value]
    return value


def _instead(name: str, given: object) -> str:
    """What to pass instead of something that is no optimizer."""
    if isinstance(given, type):
        return (
            f" Pass an instance, not the class: {name}({given.__name__}(model.parameters(), lr=...)). Code that asks "
            f"for a class takes a function instead: "
            f"lambda params, **options: {name}({given.__name__}(params, **options))."
        )
    if isinstance(given, (torch.nn.Module, Tensor, Iterable)):
        return f" Wrap an optimizer of the parameters: {name}(torch.optim.AdamW(model.parameters(), lr=...))."
    return ""


def options_of(method: type[MultiLossOptimizer]) -> list[str]:
    """What a method takes by name, beside the optimizer.

    Args:
        method: The class.

    Returns:
        Names of arguments, its own first.
    """
    names = [
        name
        for cls in method.__mro__
        if issubclass(cls, MultiLossOptimizer) and "__init__" in vars(cls)
        for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return [name for name in dict.fromkeys(names) if name not in ("self", "optimizer")]


def unknown_options(method: type[MultiLossOptimizer], unknown: Mapping[str, object], optimizer: Optimizer) -> str:
    """Say of arguments that a class does not take what may have been meant.

    Args:
        method: The class.
        unknown: The arguments.
        optimizer: The optimizer inside, which may take them.

    Returns:
        A sentence.
    """
    known = options_of(method)
    said = []
    for name in unknown:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        if name in optimizer.defaults:
            hint = f" (give it to {type(optimizer).__name__}, the optimizer inside)"
        said.append(f"`{name}`{hint}")
    return f"there is no argument {' and none '.join(said)}."
