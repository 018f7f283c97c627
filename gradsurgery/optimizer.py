"""The wrapper that every method is: a true torch optimizer around another one.

Torch owns `param_groups`, `state`, `defaults` and the hooks of the wrapped optimizer; this class hands them through.
What a method learns between steps (windows, averages, weights) is its *memory*. ``backward`` proposes a new memory,
``step`` commits it, ``zero_grad`` discards it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import losses as losses_module
from gradsurgery import misuse, shards
from gradsurgery import rows as rows_module
from gradsurgery.call import Call, parameters, prepare, representation
from gradsurgery.losses import Losses, Tasks
from gradsurgery.report import Report
from gradsurgery.world import World, hold

_ZEROS = np.zeros(4, dtype=np.uint64)
_KEY = "gradsurgery"  # the one key that state_dict has beyond torch's own


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


class InOrder(dict[str, Any]):
    """What the user gave as a sequence: in the order of the losses, under "0", "1" and so on, whatever their names."""


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
            or the weights (weighting), unless the paper has its own place for them.
        weight_momentum: a in w ← a w_last + (1 − a) w, 0 ≤ a < 1: smoothed weights against noisy gradients (CR-MOGM,
            Zhou et al., NeurIPS 2022, algorithm 1). The first step uses w.
        min_weight: Lower bound of the method's weights in sum scale (1 is the plain sum), applied last.
        max_weight: Upper bound, likewise.
        seed: Start of the method's own random stream. Draws depend on the seed and the number of committed steps only.
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
            hint = " Pass an instance, not the class." if isinstance(optimizer, type) else ""
            raise TypeError(
                f"{self._name}: `optimizer` must be a torch.optim.Optimizer, got {_shown(optimizer)}.{hint}"
            )
        if unknown:
            raise TypeError(f"{self._name}: {_unknown(type(self), unknown, optimizer)}")
        self.base = optimizer
        self.reduction = self._choice("reduction", reduction, ("sum", "mean"))
        self.nonfinite = self._choice("nonfinite", nonfinite, ("raise", "skip", "drop"))
        self.every = self._count("every", every, least=1)
        self.warmup = self._count("warmup", warmup, least=0)
        self.preference = None if preference is None else self._by_name("preference", preference)
        self.weight_momentum = self._number("weight_momentum", weight_momentum, least=0.0, below=1.0)
        self.min_weight = -math.inf if min_weight is None else self._number("min_weight", min_weight)
        self.max_weight = math.inf if max_weight is None else self._number("max_weight", max_weight)
        self.seed = self._count("seed", seed, least=0)
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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the step of the wrapped optimizer, and commit what the last ``backward`` proposed.

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
        with loop.step():
            result = self.base.step(closure)
        if self._run["kept"] is not None:
            raise RuntimeError(
                f"{self._name}.step: the closure accumulated gradients and did not act on them, so the step was made "
                "without. Leave out accumulate=True in its last backward()."
            )
        self._commit()
        if closure is not None:
            loop.see_step(self)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, accumulated ones too, and discard what ``backward`` proposed but no step committed.

        Args:
            set_to_none: As in torch.
        """
        self.base.zero_grad(set_to_none)
        self._run.update(pending=None, kept=None)

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
            "memory": _copied(self._run["committed"]),
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
            ValueError: A part of what this class saved is missing. Nothing is loaded then.
        """
        bare = dict(state_dict)
        saved = bare.pop(_KEY, None)
        memory: dict[str, Any] = {"step": 0}
        if saved is not None:
            self._require_whole(saved)
            if (saved["class"], saved["version"]) == (self._name, self.version):
                memory = _copied(saved["memory"])
            else:
                warnings.warn(
                    f"{self._name}.load_state_dict: the memory in this state belongs to {saved['class']} "
                    f"(version {saved['version']}), not to {self._name} (version {self.version}). "
                    "The parameters' state is loaded; the method starts afresh.",
                    stacklevel=2,
                )
            if saved["inner"] is not None and isinstance(self.base, MultiLossOptimizer):
                bare[_KEY] = saved["inner"]
        self.base.load_state_dict(bare)
        self._run.update(committed=memory, pending=None, kept=None)
        self._run["loop"].plain_steps = None

    def _require_whole(self, saved: Any) -> None:
        if not isinstance(saved, Mapping):
            wrong = f"is a {type(saved).__name__}"
        elif missing := [key for key in ("class", "version", "memory", "inner") if key not in saved]:
            wrong = f"lacks {', '.join(missing)}"
        elif not isinstance(saved["memory"], Mapping):
            wrong = f"has a {type(saved['memory']).__name__} as its 'memory'"
        elif "step" not in saved["memory"]:
            wrong = "lacks memory['step']"
        else:
            return
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
            else:  # no loss is left
                report = Report((), np.zeros(0), flags=[*self._run["flags"], "skipped"])
                self._run["draft"] = None
            self._run["report"] = report
        return report

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
        memory = self._run["committed"] if draft is None else draft
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
        step = (self._run["draft"] or self._run["committed"])["step"]
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

    def by_name(self, argument: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put the names of the losses of this call to what the user gave in their order.

        Args:
            argument: Name of the argument, for the error.
            given: By name; `InOrder` if it was given in order.

        Returns:
            By name.

        Raises:
            ValueError: There are more or fewer entries than losses.
        """
        names = self._run["tasks"].names
        if not isinstance(given, InOrder) or given.keys() >= set(names):
            return given
        if len(given) != len(names):
            raise ValueError(
                f"{self._name}: `{argument}` must have one entry for each of the losses {list(names)}, in this order, "
                f"got {len(given)}. A dict gives entries by name."
            )
        return dict(zip(names, given.values(), strict=True))

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
        run.update(draft=dict(run["committed"] if run["pending"] is None else run["pending"]), tasks=tasks, flags=[])
        try:
            self._check_names(tasks)
            yield
            if run["draft"] is not None:
                run["pending"] = run["draft"]
        finally:
            run.update(_of_one_call())

    def _check_names(self, tasks: Tasks) -> None:
        if not self.stateful:
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

    def _commit(self) -> None:
        run = self._run
        if run["pending"] is not None:
            run["committed"] = {**run["pending"], "step": run["pending"]["step"] + 1}
            run["pending"] = None

    def _warn_of_ranks(self) -> None:
        """Replicas that drift apart give no sign of it."""
        if not self._run["warned_of_ranks"] and dist.get_world_size() > 1:
            self._run["warned_of_ranks"] = True
            warnings.warn(
                f"{self._name}.backward: {dist.get_world_size()} processes run, and nothing is exchanged between them. "
                "Replicas of one model that see different batches drift apart. Pass distributed=True to the "
                "constructor, or process_group=. Processes that train models of their own can ignore this.",
                stacklevel=4,
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

    def _stops(self, finite: np.ndarray, what: str, scaler: torch.amp.GradScaler | None) -> bool:
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
            f"{self._name}.backward: {what} of {', '.join(map(repr, bad))} is not finite. Nothing was "
            'written. nonfinite="skip" passes over such a batch, nonfinite="drop" leaves out a loss whose value is '
            "not finite."
        )

    def _spoiled(
        self, gradients: Sequence[Tensor | None], scaler: torch.amp.GradScaler | None, world: World | None
    ) -> bool:
        """Under the policy "skip", look for inf and nan in new gradients after a single backward pass."""
        grads = [g for g in gradients if g is not None]
        if self.nonfinite != "skip" or (scaler is not None and scaler.is_enabled()) or not grads:
            return False
        worst = rows_module.peak([shards.local(g) for g in grads], grads[0].device)
        if world is not None:
            worst = world.total(worst.to(world.device(worst.device)))
        if bool(torch.isfinite(worst)):
            return False
        self._run["draft"] = None
        self.flag("nonfinite")
        self.flag("skipped")
        return True

    # --------------------------------------------------------------------------- checks of arguments

    def _choice(self, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        if value not in allowed:
            raise ValueError(f"{self._name}: `{name}` must be one of {allowed}, got {value!r}.")
        return value

    def _count(self, name: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{self._name}: `{name}` must be an integer >= {least}, got {value!r}.")
        return value

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

    def _by_name(self, name: str, given: Mapping[str, float] | Sequence[float]) -> dict[str, float]:
        """Positive numbers by loss name, or in order."""
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise ValueError(f"{self._name}: `{name}` must be numbers by name or in order, got {given!r}.")
        named = given if isinstance(given, Mapping) else InOrder((str(i), value) for i, value in enumerate(given))
        kind = InOrder if isinstance(named, InOrder) else dict
        return kind(
            (str(key), self._number(f"{name}[{key!r}]", float(value), above=0.0)) for key, value in named.items()
        )


def _of_one_call() -> dict[str, Any]:
    """What a method has while ``backward`` runs, and forgets at its end."""
    return {
        "draft": None,
        "tasks": None,
        "call": None,
        "features": (),
        "residuals": None,
        "rows": None,
        "row_scales": 1.0,
        "positions": {},
        "pieces": {},
        "part": None,
        "factors": None,
        "measured": None,
        "projections": None,
    }


def _copied(value: Any) -> Any:
    """Copy the containers, share the tensors: memory never changes a value in place."""
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(entry) for entry in value]
    return value


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
