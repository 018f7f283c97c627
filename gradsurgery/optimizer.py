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
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradsurgery import losses as losses_module
from gradsurgery import misuse, saved, shards
from gradsurgery import rows as rows_module
from gradsurgery.call import Call, parameters, prepare, representation
from gradsurgery.losses import Losses, Tasks
from gradsurgery.report import Report
from gradsurgery.text import warn
from gradsurgery.world import World, hold

_ZEROS = np.zeros(4, dtype=np.uint64)
_KEY = "gradsurgery"  # the one key that state_dict has beyond torch's own


_P = ParamSpec("_P")
_R = TypeVar("_R")


class Switches(TypedDict, total=False):
    """Arguments that every method takes; see :class:`MultiLossOptimizer`."""

    reduction: Literal["sum", "mean"]
    nonfinite: Literal["raise", "skip", "drop"]
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
    name = args[0]._name
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


class InOrder(dict[str, Any]):
    """What the user gave as a sequence, under "0", "1" and so on: in the order of the losses of the first call."""


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
        every: Compute new weights in every k-th committed step and reuse the last ones, at the cost of one or two
            backward passes, in between. A surgery makes one pass a loss there too where the graph does not tell which
            parameters are private: under reentrant activation checkpointing, in a compiled model, or below functions
            written in Python that the losses reach in different ways. `shared_params` spares these.
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
            ``fully_shard`` or a tensor-parallel plan this is found by itself.
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
    #: The method works by one weight a loss; those that do not refuse what needs weights.
    has_weights = True
    #: Why `preference` is refused; empty if it is not.
    preference_refused = ""
    # Something the user gave goes by the order of the losses, which the first call fixes.
    _goes_by_order = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        nonfinite: Literal["raise", "skip", "drop"] = "raise",
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
                f"{self._name}: `optimizer` must be a torch.optim.Optimizer, got {_shown(optimizer)}."
                f"{_instead(self._name, optimizer)}"
            )
        if unknown:
            raise TypeError(f"{self._name}: {_unknown(type(self), unknown, optimizer)}")
        self.base = optimizer
        self.reduction = self._choice("reduction", reduction, ("sum", "mean"))
        self.nonfinite = self._choice("nonfinite", nonfinite, ("raise", "skip", "drop"))
        self.every = self._count("every", every, least=1)
        self.warmup = self._count("warmup", warmup, least=0)
        self.preference = None if preference is None else self._numbers("preference", preference, above=0.0)
        self.weight_momentum = self._number("weight_momentum", weight_momentum, least=0.0, below=1.0)
        self.min_weight = -math.inf if min_weight is None else self._number("min_weight", min_weight)
        self.max_weight = math.inf if max_weight is None else self._number("max_weight", max_weight)
        self.seed = self._count("seed", seed, least=0, below=2**64)
        self.distributed = bool(distributed) or process_group is not None
        self.process_group = process_group
        self.debug = bool(debug)
        if self.min_weight > self.max_weight:
            raise ValueError(f"{self._name}: `min_weight` {min_weight!r} exceeds `max_weight` {max_weight!r}.")
        if preference is not None and self.preference_refused:
            raise ValueError(f"{self._name}: `preference` has no effect here: {self.preference_refused}.")
        if not self.has_weights and (every, weight_momentum, min_weight, max_weight) != (1, 0.0, None, None):
            raise ValueError(
                f"{self._name}: `every`, `weight_momentum`, `min_weight` and `max_weight` need a method that "
                "works by one weight a loss, and this one does not."
            )
        self._group: dist.ProcessGroup | None = None  # held, never read
        # All else that changes after construction lives in this one dict and is changed in place: a framework may run
        # these methods on an object of its own that only reads through to this one (Lightning does).
        self._run: dict[str, Any] = {
            "committed": {"step": 0},
            "pending": None,
            "updated": None,  # what the update being made commits, until `step` ends
            "kept": None,
            "report": None,
            "warned": False,
            "warned_of_ranks": False,
            "loop": misuse.Loop(),
            "warned_of_doubt": False,
            "generator": None,
            "unbatched": False,
            "hooked": False,
            "flags": [],
            "earlier": (),  # flags of micro-batches, which the report on all of them repeats
            "warned_of_names": False,
            "stepped": True,  # the last call's proposal went into an update
            **_of_one_call(),
        }
        if isinstance(optimizer, MultiLossOptimizer):
            optimizer._run["loop"].plain_steps = None  # nobody calls `backward` of the one inside
        misuse.watch(self)

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
    _optimizer_step_pre_hooks = property(lambda self: self.base._optimizer_step_pre_hooks)
    _optimizer_step_post_hooks = property(lambda self: self.base._optimizer_step_post_hooks)
    _optimizer_state_dict_pre_hooks = property(lambda self: self.base._optimizer_state_dict_pre_hooks)
    _optimizer_state_dict_post_hooks = property(lambda self: self.base._optimizer_state_dict_post_hooks)
    _optimizer_load_state_dict_pre_hooks = property(lambda self: self.base._optimizer_load_state_dict_pre_hooks)
    _optimizer_load_state_dict_post_hooks = property(lambda self: self.base._optimizer_load_state_dict_post_hooks)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A gradient scaler asks before it steps. It shall unscale the gradients and skip the step by itself, as with
        # any optimizer that does not have this.
        self._run["loop"].see_scaler(self, sys._getframe(1))
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
        if self._run["kept"] is not None and closure is None:
            raise RuntimeError(
                f"{self._name}.step: gradients were accumulated that no call has acted on. Leave out "
                "accumulate=True in the backward() before step(), or throw them away with zero_grad()."
            )
        loop: misuse.Loop = self._run["loop"]
        if closure is None:
            loop.see_step(self)
        try:
            with loop.step():
                result = self.base.step(closure)
            if self._run["updated"] is None:  # not every optimizer runs hooks
                self._note_update()
        finally:
            self._commit()
        if self._run["kept"] is not None:
            raise RuntimeError(
                f"{self._name}.step: the closure accumulated gradients and did not act on them, so the step was made "
                "without. Leave out accumulate=True in its last backward()."
            )
        if closure is not None:
            loop.see_step(self)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, accumulated ones too, and discard what ``backward`` proposed but no step committed.

        Args:
            set_to_none: As in torch.
        """
        self.base.zero_grad(set_to_none)
        self._run.update(pending=None, kept=None, earlier=())

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
            "memory": _copied(self._learnt),
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
            self._run.update(committed=memory, updated=None, pending=None, kept=None, earlier=(), stepped=True)
            self._run["loop"].plain_steps = None

        with _ahead_of(getattr(self, "_optimizer_load_state_dict_post_hooks", None), loaded):
            self.base.load_state_dict(bare)

    def _require_state(self, state: object) -> None:
        where = f"{self._name}.load_state_dict: `state_dict` must be what state_dict() of an optimizer returned"
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}, got {_shown(state)}.")
        kinds = {"state": Mapping, "param_groups": Sequence}
        if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
            raise ValueError(
                f"{where}, with 'state' and 'param_groups'. This one has no {' and no '.join(map(repr, wrong))}; its "
                f"keys are {saved.listed(state)}. Is it the state of a model, or a checkpoint with the optimizer's "
                "state inside? Nothing was loaded."
            )

    def _require_whole(self, entry: Any) -> bool:
        """Check the entry of this library in a state. Returns whether its memory is one of this class."""
        wrong = saved.wrong_entry(entry)
        same = not wrong and (entry["class"], entry["version"]) == (self._name, self.version)
        # What another class keeps is not read. A class from elsewhere may keep what it likes.
        if same:
            wrong = saved.wrong_memory(entry["memory"], type(self).__module__.startswith("gradsurgery."))
        if not wrong:
            return same
        raise ValueError(
            f"{self._name}.load_state_dict: the entry {_KEY!r} of the state {wrong}: it was cut off or changed. "
            "Nothing was loaded. Delete the entry to load the rest; the method then starts afresh."
        )

    def __getstate__(self) -> dict[str, Any]:
        # What pickle and deepcopy keep: all but a `step` that a scheduler has put on the instance, and the processes.
        return {key: value for key, value in self.__dict__.items() if key not in ("step", "_group")}

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
        self._group = None
        self._commit()  # a copy made by a hook is in no step
        misuse.watch(self)

    # ------------------------------------------------------------------------------- what users call

    @property
    def report(self) -> Report | None:
        """The report of the last ``backward``; None before the first."""
        report: Report | None = self._run["report"]
        return report

    @property
    def accumulated(self) -> tuple[str, ...]:
        """Names of the losses whose gradients were accumulated, and that no call of ``backward`` has acted on yet."""
        return () if self._run["kept"] is None else tuple(self._run["kept"].present)

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
        others: Optimizer | Iterable[Optimizer] = (),
        features: Tensor | Sequence[Tensor] | None = None,
        residuals: Mapping[str, Tensor] | Iterable[Tensor] | None = None,
    ) -> Report:
        """Turn the losses into gradients and add them to ``.grad``.

        Replaces ``sum(losses).backward()``. If anything raises, ``.grad`` and the method's memory are as before.

        Args:
            losses: Scalar losses: a dict of names to tensors (best), a list, tuple, named tuple or 1-d tensor. ``None``
                in place of a tensor marks a task that is absent from this batch. A function without arguments in place
                of a tensor is called, and returns one: with one forward pass a loss no graph is differentiated twice.
            names: Names for losses in a list or a 1-d tensor, in their order; "0", "1" and so on by default.
            accumulate: This is one of several micro-batches, not the last: keep the gradients of each loss and write
                nothing. It costs one row a loss, and for a moment two and one more while a micro-batch is added. The
                next call without it acts once on the sum. Divide each loss by the number of micro-batches, as always.
            batch_size: Number of samples on this process, for all losses or by name, where processes have parts of
                different sizes. 0 is an absent task.
            scaler: The gradient scaler of mixed precision. The method sees unscaled gradients, ``.grad`` gets scaled
                ones, and ``scaler.step(optimizer)`` follows as usual.
            retain_graph: Keep the graph, as in torch.
            others: One more optimizer, or several, whose parameters the losses reach. They get the plain gradient of
                the sum.
            features: The shared representation, one tensor or several. Weights then come from the gradients there
                (MGDA-UB and its like), and one backward pass through the trunk follows: cheaper, and another method.
                Every loss must reach it.
            residuals: What :class:`gradsurgery.NTKWeighter` asks for, here or below a surgery.

        Returns:
            What happened; also kept as `report`.

        Raises:
            TypeError: The losses are of a kind that cannot be differentiated, or another argument is of a wrong kind.
            ValueError: There is no loss, or one is not a scalar, or was passed twice.
            RuntimeError: A loss has no graph, reaches no parameter, or is not finite under ``nonfinite="raise"``.
        """
        loop: misuse.Loop = self._run["loop"]
        loop.plain_steps = None
        world = self._world()
        if world is not None and self.debug:
            world.require_replicas(parameters(self))
        going_on = accumulate or self._run["kept"] is not None
        self._require_possible(going_on, world is not None)
        tasks = losses_module.read(losses, self._name, may_be_empty=world is not None or going_on, names=names)
        # With several processes this call may be the first to see a task, so the names are those of the whole list.
        with self._proposal(tasks):
            self._run["residuals"] = residuals
            at = representation(self._name, features)
            for what in () if accumulate else self._run["earlier"]:
                self.flag(what)
            if accumulate and world is None and not tasks.present:
                # A micro-batch without any task adds nothing; the last one acts on what was kept all the same.
                report = Report((), np.zeros(0), flags=["accumulating"])
            elif call := prepare(self, tasks, accumulate, batch_size, scaler, retain_graph, others, at, world):
                if accumulate:
                    report = Report(call.tasks.present, call.values, flags=[*self._run["flags"], "accumulating"])
                else:
                    self._run["call"] = call
                    loop.see_gradients(self, call)
                    report = self._act(call)
                    loop.proposed(self, scaler is not None)
                self._run["kept"] = call.kept if accumulate else None
                self._run["earlier"] = self._repeated() if accumulate else ()
            else:  # no loss is left
                report = Report((), np.zeros(0), flags=[*self._run["flags"], "skipped"])
                self._run["draft"] = None
                self._run["earlier"] = self._repeated() if accumulate else ()
            self._run["report"] = report
        return report

    def _repeated(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self._run["earlier"], *(f for f in self._run["flags"] if f == "dropped")]))

    def _require_possible(self, accumulates: bool, exchanges: bool) -> None:
        """Refuse calls that a switch has no meaning for."""

    def _world(self) -> World | None:
        """The processes to exchange with, in this call."""
        if not dist.is_available() or not dist.is_initialized():
            if self.distributed:
                raise RuntimeError(
                    f"{self._name}.backward: distributed=True needs torch.distributed.init_process_group() first."
                )
            return None
        if any(getattr(p, "_is_flat_param", False) for p in parameters(self)):
            raise RuntimeError(
                f"{self._name}.backward: FullyShardedDataParallel flattens parameters, so that gradients of one loss "
                "cannot be told from that of another. Use torch.distributed.fsdp.fully_shard, or "
                "DistributedDataParallel with distributed=True."
            )
        group = self.process_group or dist.group.WORLD
        assert group is not None
        if self.distributed or shards.sharded(parameters(self)):
            hold(self, group)
            return World(group, self._name)
        self._warn_of_ranks()
        return None

    # --------------------------------------------------------------------- what methods are built on

    def _act(self, call: Call) -> Report:
        """Do the work of ``backward``: surgery and weighting each in its own way."""
        raise TypeError(f"{self._name}: wrap the optimizer in a method, such as PCGrad, not in this base class.")

    @property
    def memory(self) -> dict[str, Any]:
        """The draft of the memory that this call will propose. Replace its values; never change them in place."""
        draft: dict[str, Any] | None = self._run["draft"]
        memory = self._learnt if draft is None else draft
        # With one surgery a parameter or group, each has a memory of its own.
        return memory if self._run["part"] is None else memory[self._run["part"]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks present in this call, (m,)."""
        present: tuple[str, ...] = self._run["tasks"].present
        return present

    def rng(self) -> np.random.Generator:
        """The random stream of this step: the same for the same seed and number of committed steps.

        Returns:
            The generator, at the start of the stream. Another call puts it there again.
        """
        step = (self._run["draft"] or self._learnt)["step"]
        # Made once: setting its state costs a tenth of making one.
        generator: np.random.Generator | None = self._run["generator"]
        if generator is None:
            generator = self._run["generator"] = np.random.Generator(np.random.Philox(key=0))
        generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": _ZEROS, "key": np.array([self.seed, step], dtype=np.uint64)},
            "buffer": _ZEROS,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return generator

    def flag(self, what: str) -> None:
        """Put a flag on the report of this call.

        Args:
            what: For example "stationary".
        """
        self._run["flags"].append(what)

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
        first = (self._run["draft"] or self._learnt).get("tasks")
        return tuple(first) if first and self._goes_by_order else self._run["tasks"].names

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
        names = self._run["tasks"].names
        if not isinstance(given, InOrder):
            if given.keys() >= set(self.names):  # or the error is about what is missing
                self._look_for_strangers(argument, given)
            return given
        if given.keys() >= set(names):
            return given
        if len(given) != len(self.order):
            raise ValueError(
                f"{self._name}: `{argument}` must have one entry for each of the losses {list(self.order)}, in this "
                f"order, got {len(given)}. A dict gives entries by name."
            )
        return dict(zip(self.order, given.values(), strict=True))

    def _look_for_strangers(self, argument: str, given: Mapping[str, Any]) -> None:
        """A name that no loss has is a slip, or a task that was left out of the dict."""
        names = self._run["tasks"].names
        strangers = [name for name in given if name not in names]
        if not strangers or (self._run["warned_of_names"] and not self.stateful):
            return
        told = f"{self._name}: `{argument}` has an entry for {strangers}, and the losses are {list(names)}."
        if self.stateful:  # which gets all names in every call
            raise ValueError(f"{told} Give an entry to losses only.")
        self._run["warned_of_names"] = True
        warn(f"{told} A task that is absent from this batch is passed as None.")

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

    def _settled(self, weights: np.ndarray) -> np.ndarray:
        """Smooth and bound what the method gave."""
        if self.weight_momentum:
            last = self.recall("smoothed_weights", weights)
            weights = self.weight_momentum * last + (1 - self.weight_momentum) * weights
            self.keep("smoothed_weights", weights)
        if (self.min_weight, self.max_weight) == (-math.inf, math.inf):
            return weights
        return np.clip(weights, self.min_weight, self.max_weight)

    def recall(self, key: str, default: float | np.ndarray) -> np.ndarray:
        """Read a number kept for each present task.

        Args:
            key: Its name in the memory.
            default: What a task has that has none yet: a number, or one a task, (m,).

        Returns:
            (m,), float64.
        """
        kept = self.memory.get(key, {})
        defaults = np.broadcast_to(default, len(self.names)).tolist()
        return np.array([kept.get(name, d) for name, d in zip(self.names, defaults, strict=True)], dtype=np.float64)

    def keep(self, key: str, values: np.ndarray) -> None:
        """Keep a number for each present task; absent tasks keep theirs.

        Args:
            key: Its name in the memory.
            values: (m,).
        """
        self.memory[key] = {**self.memory.get(key, {}), **dict(zip(self.names, values.tolist(), strict=True))}

    @contextmanager
    def _proposal(self, tasks: Tasks) -> Iterator[None]:
        """Open a draft of the memory. It becomes the proposal if nothing raises and the draft was not thrown away."""
        run = self._run
        # Gradients that are gone were cleared by `model.zero_grad()`, and what was proposed with them is void too.
        if run["pending"] is not None and run["kept"] is None and all(p.grad is None for p in parameters(self)):
            run["pending"] = None
        run.update(draft=dict(self._learnt if run["pending"] is None else run["pending"]), tasks=tasks, flags=[])
        run["stepped"] = False
        try:
            self._check_names(tasks)
            yield
            if run["draft"] is not None:
                run["pending"] = run["draft"]
        finally:
            self._forget()

    def _forget(self) -> None:
        """Let go of all that belongs to one call."""
        self._run.update(_of_one_call())

    def _check_names(self, tasks: Tasks) -> None:
        if not self.stateful:
            # Names that are numbers say themselves where they belong.
            if self._goes_by_order and "tasks" not in self.memory and not all(map(str.isdecimal, tasks.names)):
                self.memory["tasks"] = list(tasks.names)
            return
        known = self.memory.get("tasks")
        if known is None:
            self.memory["tasks"] = list(tasks.names)
        elif set(known) != set(tasks.names):
            raise ValueError(
                f"{self._name}.backward: the names of the losses must stay the same, since the method keeps "
                f"something for each: it knows {known}, got {list(tasks.names)}. Pass a dict with every name in every "
                "call, and None for a task that is absent."
            )

    @property
    def _learnt(self) -> dict[str, Any]:
        """The memory that belongs to the parameters as they are: what is committed, or is about to be."""
        run = self._run
        learnt: dict[str, Any] = run["committed"] if run["updated"] is None else run["updated"]
        return learnt

    def _note_update(self) -> None:
        """The wrapped optimizer has made its update: what was proposed belongs to it, whatever a hook does now."""
        run = self._run
        # What was accumulated has not been acted on: the step was made without.
        if run["pending"] is not None and run["kept"] is None:
            updated = {**run["pending"], "step": run["pending"]["step"] + 1}
            run.update(updated=updated, pending=None, stepped=True)

    def _commit(self) -> None:
        self._run.update(committed=self._learnt, updated=None)

    def _warn_of_ranks(self) -> None:
        """Replicas that drift apart give no sign of it."""
        if not self._run["warned_of_ranks"] and dist.get_world_size() > 1:
            self._run["warned_of_ranks"] = True
            warn(
                f"{self._name}.backward: {dist.get_world_size()} processes run, and nothing is exchanged between them. "
                "Replicas of one model that see different batches drift apart. Pass distributed=True to the "
                "constructor, or process_group=. Processes that train models of their own can ignore this."
            )

    def _due(self) -> Literal["act", "reuse", "warmup"]:
        """Which kind of step this is, by the number of committed steps and the last weights."""
        since = self.memory["step"] - self.warmup
        if since < 0:
            return "warmup"
        last = self.memory.get("last_weights")
        if since % self.every == 0 or last is None or set(last) != set(self.names):
            return "act"
        return "reuse"

    def _stops(
        self, finite: np.ndarray, what: str, scaler: torch.amp.GradScaler | None, wrong: str = "is not finite"
    ) -> bool:
        """Apply the policy for values that are not finite.

        Returns:
            True if nothing is to be written. With a scaler False: its skip needs to see the values in ``.grad``. Either
            way the draft of the memory is thrown away, since a step that should not happen teaches nothing.
        """
        if finite.all() or self._run["draft"] is None:
            return False
        self.flag("nonfinite")
        self._run["draft"] = None
        if scaler is not None and scaler.is_enabled():
            return False
        if self.nonfinite == "skip":
            self.flag("skipped")
            return True
        bad = [name for name, ok in zip(self.names, finite, strict=True) if not ok]
        raise RuntimeError(
            f"{self._name}.backward: {what} of {', '.join(map(repr, bad))} {wrong}. Nothing was "
            'written. nonfinite="skip" passes over such a batch, nonfinite="drop" leaves out a loss whose value is '
            "not finite."
        )

    def _fitting(
        self,
        weights: np.ndarray,
        most: np.ndarray | float,
        scaler: torch.amp.GradScaler | None,
        world: World | None = None,
    ) -> np.ndarray | None:
        """Apply the same policy to weights that what they multiply cannot hold.

        Args:
            weights: As they are applied, (m,), or one for each of the rows that the method has.
            most: The largest number of what they multiply, or one each.
            scaler: The gradient scaler, or None.
            world: The processes that share the work, or None.

        Returns:
            The weights; None if nothing is to be written.
        """
        fits = np.abs(weights) <= most  # nan does not
        # All have the same weights, but a loss that others lack may be in half precision.
        if world is not None and not (np.abs(weights) <= rows_module.LEAST_RANGE).all():
            fits = ~world.any_of(torch.from_numpy((~fits).astype(np.uint8))).numpy().astype(bool)
        if fits.all():
            return weights
        if scaler is not None and scaler.is_enabled():
            return np.where(np.isnan(weights) | fits, weights, np.copysign(np.inf, weights))
        shown = ", ".join(f"{w:.3g}" for w in weights[~fits])
        wrong = (
            f"is out of range ({shown}; the largest number of the dtype is {np.min(most):.3g}), so inf or nan would be "
        )
        m = len(self.names)
        of_tasks = fits if len(fits) == m else np.full(m, False)
        wrong += "written. `max_weight` bounds the weights"
        return None if self._stops(of_tasks, "the weight", scaler, wrong) else weights

    def _spoiled(
        self,
        gradients: Sequence[Tensor | None],
        scaler: torch.amp.GradScaler | None,
        world: World | None,
        doubtful: bool = False,
    ) -> bool:
        """Look for inf and nan in new gradients: under the policy "skip", or where sums may have overflowed."""
        grads = [g for g in gradients if g is not None]
        if (self.nonfinite != "skip" and not doubtful) or (scaler is not None and scaler.is_enabled()) or not grads:
            return False
        worst = rows_module.peak([shards.local(g) for g in grads], grads[0].device)
        if world is not None:
            worst = world.total(worst.to(world.device(worst.device)))
        if bool(torch.isfinite(worst)):
            return False
        if self.nonfinite != "skip":
            dtypes = ", ".join(sorted({str(g.dtype).removeprefix("torch.") for g in grads}))
            raise RuntimeError(
                f"{self._name}.backward: every gradient is finite, and their weighted sum overflows {dtypes}. "
                "Nothing was written. Divide the losses by a constant, bound the weights with `max_weight`, or keep "
                'the parameters in a wider dtype. nonfinite="skip" passes over such a batch.'
            )
        self._run["draft"] = None
        self.flag("nonfinite")
        self.flag("skipped")
        return True

    # --------------------------------------------------------------------------- checks of arguments

    def _given_params(self, given: Any) -> list[Tensor]:
        """The argument `shared_params`: a parameter, several, or a module."""
        if isinstance(given, torch.nn.Module):
            given = given.parameters()
        found = [given] if isinstance(given, Tensor) or not isinstance(given, Iterable) else list(given)
        if found and all(isinstance(p, Tensor) for p in found):
            return found
        wrong = "nothing" if not found else _shown(next(p for p in found if not isinstance(p, Tensor)))
        raise TypeError(
            f"{self._name}: `shared_params` must be a parameter or an iterable of parameters, at least one, such "
            f"as model.trunk.parameters(), or a module, got {wrong}."
        )

    def _choice(self, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        if value not in allowed:
            raise ValueError(f"{self._name}: `{name}` must be one of {allowed}, got {value!r}.")
        return value

    def _count(self, name: str, value: Any, least: int, below: float = math.inf) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
            bound = f" and < {below}" if below < math.inf else ""
            raise ValueError(f"{self._name}: `{name}` must be an integer >= {least}{bound}, got {value!r}.")
        return value

    def _warn_of_doubt(self, names: Sequence[str]) -> None:
        """Say once that it is not known which parameters a loss reaches."""
        if not self._run["warned_of_doubt"]:
            self._run["warned_of_doubt"] = True
            warn(
                f"{self._name}.backward: the graph does not tell which parameters the losses reach (they are joined in "
                "a compiled region or in a Python function), and the gradients of "
                f"{', '.join(map(repr, names))} are zero so far. They count as reaching all parameters until one is "
                "not zero. To say which parameters are shared, pass `shared_params`, such as model.trunk.parameters()."
            )

    def _require_positive(self, losses: np.ndarray, why: str) -> None:
        bad = {name: float(value) for name, value in zip(self.names, losses, strict=True) if not value > 0}
        if bad:
            raise ValueError(
                f"{self._name}: every loss must be > 0, since {why}; got {bad}. Nothing was written. Where a loss is 0 "
                "now and then there is nothing to learn from it: pass None for it in that batch, or add a small "
                "constant to it, in every batch."
            )

    def _number(
        self,
        name: str,
        value: Any,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{self._name}: `{name}` must be a finite number, got {value!r}.")
        bounds = {
            f">= {least:g}": value >= least,
            f"> {above:g}": value > above,
            f"<= {most:g}": value <= most,
            f"< {below:g}": value < below,
        }
        for bound, holds in bounds.items():
            if not holds:
                raise ValueError(f"{self._name}: `{name}` must be {bound}, got {value!r}.")
        return float(value)

    def _entries(self, name: str, given: Any, what: str = "numbers") -> dict[str, Any]:
        """What was given for each loss, by name or in order."""
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise ValueError(f"{self._name}: `{name}` must be {what} by name or in order, got {given!r}.")
        if isinstance(given, Mapping):
            return {str(key): value for key, value in given.items()}
        self._goes_by_order = True
        return InOrder((str(i), value) for i, value in enumerate(given))

    def _numbers(self, name: str, given: Any, **bounds: float) -> dict[str, float]:
        """Numbers for each loss, by name or in order."""
        named = self._entries(name, given)
        for key, value in named.items():
            plain = value.item() if isinstance(value, (Tensor, np.generic)) else value
            named[key] = self._number(f"{name}[{key!r}]", plain, **bounds)
        return named

    def _one_or_each(self, name: str, given: Any) -> float | dict[str, float]:
        """One number for all losses, or one for each."""
        each = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
        return self._numbers(name, given) if each else self._number(name, given)


def _of_one_call() -> dict[str, Any]:
    """What a method has while ``backward`` runs, and forgets at its end."""
    return {
        "draft": None,
        "tasks": None,
        "call": None,
        "features": (),
        "residuals": None,
        "rows": None,
        "row_scales": (1.0, 0),
        "lengths": None,
        "positions": {},
        "pieces": {},
        "part": None,
        "factors": None,
        "measured": None,
        "numbers": None,
        "projections": None,
        "complete": True,
    }


@contextmanager
def _ahead_of(hooks: OrderedDict[int, Any] | None, act: Callable[[], None]) -> Iterator[None]:
    """Do something once the optimizer inside has done its work, before a hook of somebody else can raise.

    Args:
        hooks: Torch's table of the hooks that follow; None for an optimizer that runs none.
        act: What to do. Without hooks it is done at the end.

    Yields:
        Nothing.
    """
    done: list[bool] = []

    def first(*_: object) -> None:
        if not done:
            done.append(True)
            act()

    if hooks is None:
        yield
    else:
        handle = RemovableHandle(hooks)
        hooks[handle.id] = first
        hooks.move_to_end(handle.id, last=False)
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


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _unknown(method: type, unknown: Mapping[str, object], optimizer: Optimizer) -> str:
    """Say of arguments that a class does not take what may have been meant."""
    known = {
        name
        for cls in method.__mro__
        if issubclass(cls, MultiLossOptimizer) and "__init__" in vars(cls)
        for name in inspect.signature(vars(cls)["__init__"]).parameters
    }
    said = []
    for name in unknown:
        near = difflib.get_close_matches(name.lower(), known - {"self", "optimizer", "switches", "unknown"}, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        if name in optimizer.defaults:
            hint = f" (give it to {type(optimizer).__name__}, the optimizer inside)"
        said.append(f"`{name}`{hint}")
    return f"there is no argument {' and none '.join(said)}."
