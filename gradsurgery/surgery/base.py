"""The step that every surgery method makes: rows, Gram, weights, ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import losses as losses_module
from gradsurgery.batch import Batch, Layout, parameters
from gradsurgery.communication import shards
from gradsurgery.gradients import descent, moments
from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.gram import Gram, Row, Table
from gradsurgery.losses import Tasks
from gradsurgery.optimizer import MultiLossOptimizer, Switches
from gradsurgery.report import Report
from gradsurgery.settings import Switch
from gradsurgery.solve import Problem, solve
from gradsurgery.step import SurgeryStep
from gradsurgery.weighting.base import Weighter

if TYPE_CHECKING:
    from typing_extensions import Unpack


@cache
def _numbers(m: int) -> tuple[str, ...]:
    """Names of rows that have none."""
    return tuple(map(str, range(m)))


@cache
def _others(m: int) -> np.ndarray:
    """Every j ≠ i in row i, in order; not to be changed."""
    return np.arange(m - 1) + (np.arange(m - 1) >= np.arange(m)[:, None])


class Now:
    """What a method's own functions can ask for while a call lasts.

    It is changed in place, since a framework may run a method on an object of its own that shares its attributes.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.problem: Problem | None = None
        self.batch: Batch | None = None
        self.layout: Layout | None = None
        self.early: np.ndarray | None = None  # what the rows were multiplied by
        self.sent: Tensor | None = None

    def __enter__(self) -> Now:
        return self

    def __exit__(self, *_: object) -> None:
        self.problem = None


class SurgerySwitches(Switches, total=False):
    """Arguments that every surgery method takes; see :class:`Surgery`."""

    shared_params: Tensor | Iterable[Tensor] | torch.nn.Module | None
    normalize: Literal["none", "l2", "loss", "loss+"]
    log_losses: bool
    granularity: Literal["all", "group", "parameter"]
    engine: Literal["auto", "rows", "ghosts", "blocks"]
    row_dtype: torch.dtype | None
    row_device: torch.device | str | None


class Surgery(MultiLossOptimizer):
    """Base of the methods that work on the gradient of each loss.

    A parameter that two or more losses reach is *shared*; one that a single loss reaches is *private* and always gets
    the plain gradient of that loss. Each call decides this anew, in steps that reuse weights too. A method overrides
    :meth:`weights`, which sees the inner products of the rows over the shared parameters. It costs m backward passes a
    step and m rows of memory.

    Where fewer than two losses reach the parameters that a surgery acts on, there is nothing to balance: they get the
    plain gradient with `reduction`, whether `shared_params` names them or not. The method is not asked, and
    `preference`, `normalize`, `weight_momentum`, `min_weight` and `max_weight` do not act: a trunk does not jump as
    tasks come and go. Methods that keep rows between steps go on with these when one task alone is present, without
    those switches.

    Where a method promises that no loss rises to first order, that holds for the direction d as it is written, in its
    dtype: ``⟨gᵢ, d⟩ ≥ −4u Σₖ |gᵢₖ| |dₖ|`` with unit roundoff u, 2⁻²⁴ in float32. Where rounding could break it, sums
    are taken in double precision, rows are formed whatever the engine, and the direction is corrected by the least that
    is needed; if that fails the report has the flag "loss-may-rise". `weight_momentum`, `min_weight`, `max_weight`,
    `warmup`, steps that reuse weights, and rows at `features` give the promise up.

    Args:
        optimizer: The optimizer that makes the step, or a weighter around it. Under a weighter the method, and all
            that is said here of losses and rows, sees each loss multiplied by its coefficient, as if you had done so.
        shared_params: The parameters that the surgery acts on, or the module that has them; all others get the plain
            gradient of the sum. Where two losses reach any of them, one that a single loss reaches takes part too.
            Found from the graph by default.
        normalize: What the rows are divided by before the method sees them, for rows of very different lengths: "none";
            "l2": sᵢ = ‖gᵢ‖; "loss": sᵢ = lᵢ; "loss+": sᵢ = ‖gᵢ‖ lᵢ. The last two need positive losses. The weights α of
            the scaled rows are applied to them: the raw gradients get αᵢ/sᵢ. In methods that keep rows between steps
            (MoCo, ExcessMTL, Bloop, GCond) the rows are what these have made of them: s is the length of the average,
            say, or the present loss. Where the direction does not turn when single rows are scaled, as that of ConFIG
            and IMTLG, only its length changes.
        log_losses: Act on the logarithms of the losses, which must be positive: every gradient, private ones included,
            is divided by its loss (the ``LOG_`` variants of the FAMO repository). Not with a weighter inside, whose
            coefficients would drop out.
        granularity: One surgery for "all" shared parameters together, one per parameter "group" of the optimizer, or
            one per "parameter".
        engine: How methods that need no more than the inner products of the rows get them. "rows": from the rows.
            "ghosts": without forming gradients of linear layers, convolutions and embeddings, wherever that is exact.
            "auto": likewise, where the shapes say that it is faster. "blocks": from the rows of one block of the model
            at a time, and one more backward pass at the end: the least memory for deep models whose layers are wide and
            batches large, such as transformers. The result is the same up to rounding; a function of yours whose
            backward is not linear in its gradient is an error under "blocks". Where a 1-d tensor of 16 losses
            or more is handed over, or all that its ``unbind()`` returns, "auto" first looks whether each loss depends
            on a sample of its own: then one or two backward passes do, as with ``backward(losses, per_sample=True)``.
            An error, or the report's `reason` under "auto", names the operation that brings samples together, such as
            a batch norm in training or a contrastive loss. Layers that are known: linear, convolutions, embeddings,
            layer, group, instance and batch norms, attention, recurrent cells, scales, shifts, class tokens, tied
            weights, weight normalisation; the parameters of all others take a pass per loss. Tensor hooks see these
            passes, of weighted sums of the losses. Not with activation checkpointing, complex parameters, float16
            layers, `accumulate`, `features` or several processes. Per-sample gradients found in this way are those of
            autograd: nothing here is a promise of differential privacy.
        row_dtype: torch.bfloat16: each row is rounded to it as soon as its backward pass is over, and waits for the
            others in half the memory: an approximation, with the flag "rounded-rows". Inner products are those of the
            rounded rows and as accurate as ever, sums are taken in single precision, and ``.grad`` is of the
            parameter's dtype. Complex rows stay as they are, and so do those of parameters in half precision. What
            turns out to be private only when all rows are there has been rounded as well.
        row_device: Where each row waits for the others, "cpu" for instance. Inner products are formed there, and
            nothing is rounded. Each row travels there and back. Both switches form rows (``engine="rows"``), so
            compare with the ghosts of ``engine="auto"`` and with ``engine="blocks"`` first, which are exact. They are
            refused for rows at `features`, with micro-batches, with several processes, and by
            methods that keep rows between steps.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `optimizer` is a surgery method already.
        ValueError: An argument is out of range, or the combination has no meaning.
    """

    #: d(sJ) = s^degree d(J) for rows of one step. None: the method compares lengths with absolute numbers, or with
    #: those of other steps, and needs rows whose lengths have a square in float64.
    degree: float | None = 1.0
    #: The method reads loss values, so that ``combine`` cannot do without them.
    needs_losses = False
    #: Of how many losses at most none rises to first order, as the method promises; see descent.py.
    descends = 0
    #: The method keeps rows of its own between steps; see :meth:`observe`.
    observes = False
    #: Rows that :meth:`observe` adds are those of the same tasks in the same order once more, from another batch.
    rows_repeat_tasks = False
    #: `preference` multiplies the rows. Methods whose paper has another place for it read ``preferences()`` themselves.
    preference_scales_rows = True
    #: Parameters that only absent losses have reached move, too.
    moves_unreached = False
    #: Entries of the direction may be larger than the weighted rows are long: `.grad` is looked at for overflow.
    lengthens = False
    #: The method adds up gradients as they come, and has no rows.
    streaming = False
    #: The method acts on every parameter that a loss reaches: on those that one loss alone reaches too.
    acts_on_private = False
    #: Why sparse gradients are refused; empty if they are not.
    sparse_refused = ""

    shared_params = Switch()
    normalize = Switch()
    log_losses = Switch()
    granularity = Switch()
    engine = Switch()
    row_dtype = Switch()
    row_device = Switch()

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared_params: Tensor | Iterable[Tensor] | torch.nn.Module | None = None,
        normalize: Literal["none", "l2", "loss", "loss+"] = "none",
        log_losses: bool = False,
        granularity: Literal["all", "group", "parameter"] = "all",
        engine: Literal["auto", "rows", "ghosts", "blocks"] = "auto",
        row_dtype: torch.dtype | None = None,
        row_device: torch.device | str | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        if isinstance(optimizer, Surgery):
            raise TypeError(
                f"{self._name}: `optimizer` is already a surgery method ({type(optimizer).__name__}). "
                "Wrap the torch optimizer, or a weighter around it."
            )
        self._require_nothing_unused()
        self._take(
            shared_params=shared_params,
            normalize=normalize,
            log_losses=log_losses,
            granularity=granularity,
            engine=engine,
            row_dtype=row_dtype,
            row_device=row_device,
        )
        self._require_together()
        self._wanted_engine = self.engine
        self._follow()
        self._now = Now()

    def _checks(self) -> dict[str, Callable[[Any], Any]]:
        check = self.check
        return {
            **super()._checks(),
            "shared_params": lambda value: None if value is None else self._owned(value),
            "normalize": lambda value: check.choice("normalize", value, ("none", "l2", "loss", "loss+")),
            "log_losses": bool,
            "granularity": lambda value: check.choice("granularity", value, ("all", "group", "parameter")),
            "engine": lambda value: check.choice("engine", value, ("auto", "rows", "ghosts", "blocks")),
            "row_dtype": self._dtype_of_rows,
            "row_device": lambda value: None if value is None else self._home_of_rows(value),
        }

    def assign(self, switch: str, value: Any) -> None:
        super().assign(switch, value)
        if switch == "engine":
            self._wanted_engine = self.engine
        self._follow()

    def _follow(self) -> None:
        """Take the engine that was asked for, but form rows that are put away."""
        self.change_settings(engine="rows" if self.settings.puts_rows_away else self._wanted_engine)

    def _require_together(self) -> None:
        super()._require_together()
        if self.log_losses and isinstance(self.base, Weighter):
            raise ValueError(
                f"{self._name}: log_losses=True excludes a weighter inside ({type(self.base).__name__}): what "
                "multiplies a loss drops out of the gradient of its logarithm. Leave out one of the two."
            )
        if self.settings.puts_rows_away:
            self._require_rows_of_one_batch()
        if self.granularity != "all" and self.every > 1:
            raise ValueError(
                f'{self._name}: `every` > 1 needs granularity="all": weights of several parts cannot be '
                "reused in one backward pass."
            )

    def _owned(self, given: Any) -> frozenset[Tensor]:
        """The argument `shared_params`, whose parameters this optimizer must have."""
        named = frozenset(self.check.params(given))
        own = {p for group in self.param_groups for p in group["params"]}
        if foreign := [p for p in named if p not in own]:
            raise ValueError(
                f"{self._name}: `shared_params` has {len(foreign)} of {len(named)} parameters that "
                f"are not in the optimizer (one has shape {tuple(foreign[0].shape)}), so the surgery could not act "
                "on them. Give them to the optimizer first, or name parameters of the model that it trains."
            )
        return named

    def _require_nothing_unused(self) -> None:
        """Refuse arguments of a weighter inside that only the optimizer outside reads."""
        if not isinstance(self.base, Weighter):
            return
        usual = {"reduction": "sum", "nonfinite": "raise", "distributed": False, "debug": False}
        for switch, value in usual.items():
            if getattr(self.base, switch) != value:
                raise ValueError(
                    f"{self._name}: `{switch}`={getattr(self.base, switch)!r} of the {type(self.base).__name__} inside "
                    f"has no effect. Give it to {self._name}."
                )

    def _dtype_of_rows(self, dtype: torch.dtype | None) -> torch.dtype | None:
        if dtype in (None, torch.bfloat16):
            return dtype
        why = " Entries beyond 65504, as under a loss scale, overflow in float16." if dtype is torch.float16 else ""
        raise ValueError(f"{self._name}: `row_dtype` must be None or torch.bfloat16, got {dtype!r}.{why}")

    def _home_of_rows(self, given: torch.device | str) -> torch.device:
        try:
            device = torch.device(given)
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"{self._name}: `row_device` must be a device of this machine, got {given!r}.") from error
        if device.type == "meta":
            raise ValueError(f"{self._name}: `row_device` must hold numbers, and {given!r} holds none.")
        return device

    def _require_rows_of_one_batch(self) -> None:
        if self.observes:
            raise ValueError(
                f"{self._name}: `row_dtype` and `row_device` need a method that forgets its rows after each step. This "
                "one averages or compares rows of several batches, in single precision. Leave them out."
            )
        if self.engine not in ("auto", "rows"):
            raise ValueError(
                f"{self._name}: `row_dtype` and `row_device` need rows, so that engine={self.engine!r} excludes them."
            )
        if self.distributed:
            self._require_possible(accumulates=False, exchanges=True)

    def _samples_wanted(self, per_sample: bool | str) -> str:
        if per_sample not in (False, True, "keep", "rerun"):
            raise ValueError(
                f'{self._name}.backward: `per_sample` must be True, False, "keep" or "rerun", got {per_sample!r}.'
            )
        possible = self.engine == "auto" and self.adds_rows and not self.observes and not self.streaming
        if not per_sample:
            return "auto" if possible and self.needs_gram_only and self.phase == "solve" else ""
        if not possible:
            why = f"engine={self.engine!r} was asked for"
            if self.engine == "auto":
                why = "the method adds up gradients as they come"
                why = why if self.streaming else "the method looks at the gradients themselves"
            raise ValueError(
                f"{self._name}.backward: `per_sample` finds the inner products of the gradients without forming these, "
                f"and {why}. Leave it out: each loss then takes a backward pass."
            )
        if self.phase != "solve":
            return ""
        return "choose" if per_sample is True else str(per_sample)

    def _require_possible(self, accumulates: bool, exchanges: bool) -> None:
        if self.settings.puts_rows_away and (accumulates or exchanges):
            what = "accumulate=True" if accumulates else "several processes (`distributed`, `process_group`, DTensors)"
            raise ValueError(
                f"{self._name}: `row_dtype` and `row_device` are not for {what}: there rows are sums, to which each "
                "micro-batch or process adds its part in full precision. Leave them out."
            )

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """The method: weights of the rows.

        Args:
            gram: Inner products of the rows, (m, m), float64.
            losses: Values of the losses, (m,), float64.

        Returns:
            Weights, (m,). The update direction is the sum of the rows with these weights.

        Raises:
            TypeError: The class defines no method.
        """
        raise TypeError(f"{self._name} does not define `weights`.")

    def observe(self, rows: list[Row], losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Row]:
        """Replace the rows by what the method works on, such as their moving averages. Needs ``observes = True``.

        Args:
            rows: One row per present task, one entry per parameter, ``None`` where a loss does not reach it.
            losses: Values of the present losses, m detached scalars on their devices; not to be read on the host. They
                are multiplied by what a weighter inside gives, or logarithms under `log_losses`, as the rows are.
            params: The shared parameters.

        Returns:
            As many rows as the method wants; ``weights`` and the report see their inner products. Rows are dense, in
            single precision or better, without the loss scale, and must not be changed in place. If ``weights`` gives
            fewer weights than there are rows, the last rows are not part of the direction.
        """
        return rows

    def measure(self, numbers: Tensor) -> None:
        """Send numbers to the host together with the Gram matrix; :attr:`measured` has them in ``weights``.

        Args:
            numbers: (k, P), one column per shared parameter. Columns of parameters that have one surgery are added up.
        """
        self._now.sent = numbers

    def sent(self) -> Tensor | None:
        """Take what :meth:`measure` is to send.

        Returns:
            (k, P); None if there is nothing.
        """
        numbers, self._now.sent = self._now.sent, None
        return numbers

    @property
    def measured(self) -> np.ndarray:
        """What :meth:`measure` sent, added up, (k,), float64."""
        assert self._now.problem is not None
        assert self._now.problem.measured is not None
        return self._now.problem.measured

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        """The direction in one parameter: Σ wᵢ gᵢ. Coordinate-wise methods override it.

        Args:
            column: The rows of this parameter.
            applied: Weights, `reduction` included.
            like: The parameter.
            share: What `reduction` multiplies everything by: 1 or 1/m.

        Returns:
            A new tensor, or None if no loss reaches the parameter.
        """
        return rows_module.combine(column, applied, like)

    def over_pieces(self, numbers: Tensor) -> Tensor:
        """Add up numbers of one parameter over the processes that hold its pieces, for shares in :meth:`direct`.

        Every process has to ask, parameter by parameter in the same order. Only ratios of such sums have a meaning,
        since a piece may be held more than once.

        Args:
            numbers: What this process has found in its piece.

        Returns:
            The sums; the numbers themselves where parameters are whole.
        """
        batch = self._now.batch
        return numbers if batch is None or not batch.comm.is_sharded else batch.comm.total(numbers.clone())

    def count_projections(self, mixing: np.ndarray) -> None:
        """Note for the report how many projections were made.

        Args:
            mixing: Row i holds the weights of task i's projected gradient, (m, m).
        """
        made = int(np.count_nonzero(mixing)) - int(np.count_nonzero(mixing.diagonal()))
        self.transaction.projections = made + (self.transaction.projections or 0)

    def row_state(self, key: str, name: str, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Read a row kept in the memory.

        Args:
            key: What it is kept under.
            name: The task, or any other label.
            params: The shared parameters.

        Returns:
            One tensor per parameter, ``None`` where nothing is kept yet.
        """
        kept = self.memory.get(key, {}).get(name, {})
        places = self._layout.places
        return [None if (g := kept.get(places[p])) is None else g.to(p.device) for p in params]

    def keep_row(self, key: str, name: str, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Keep a row in the memory.

        Args:
            key: What it is kept under.
            name: The task, or any other label.
            row: One tensor per parameter. They must not be changed in place afterwards.
            params: The shared parameters.
        """
        kept = self.memory.get(key, {})
        places = self._layout.places
        new = {places[p]: g for p, g in zip(params, row, strict=True) if g is not None}
        self.memory[key] = {**kept, name: {**kept.get(name, {}), **new}}

    def recall_shares(self, key: str) -> np.ndarray:
        """Read the shares of the present tasks, which are kept on the simplex.

        Args:
            key: Their name in the memory.

        Returns:
            (m,), ≥ 0, of sum 1. Equal shares before the first call, or if the present tasks have none.
        """
        shares = self.recall(key, 1 / len(self.all_names))
        total = shares.sum()
        return shares / total if total > 0 else np.full(len(shares), 1 / len(shares))

    def keep_shares(self, key: str, shares: np.ndarray) -> None:
        """Keep the shares of the present tasks. Those of absent tasks, and what the present ones have in all, stay.

        Args:
            key: Their name in the memory.
            shares: (m,), of sum 1.
        """
        total = self.recall(key, 1 / len(self.all_names)).sum()
        if total > 0:
            self.keep(key, total * shares)

    def uniform(self, like: Tensor) -> Tensor:
        """Random numbers for one parameter: the same in every evaluation of a step, on every device and rank.

        Args:
            like: The parameter.

        Returns:
            Draws from [0, 1), of the shape of the parameter, float32, on its device.
        """
        layout = self._layout
        entropy = np.random.SeedSequence([self.seed, self.transaction.whole["step"], layout.place(like)])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        whole = layout.whole(like)
        whole = whole if hasattr(whole, "device_mesh") else like
        numbers = torch.rand(whole.shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device)
        return shards.drawn(numbers, whole)

    def place(self, p: Tensor) -> int:
        """The place of a parameter among all of the optimizer, which lasts: what is kept for it is kept under this.

        Args:
            p: One of the parameters that :meth:`observe` or :meth:`direct` was given.

        Returns:
            Its place.
        """
        return self._layout.place(p)

    def group(self, p: Tensor) -> dict[str, Any]:
        """The parameter group that a parameter belongs to, for methods with options of their own in there.

        Args:
            p: One of the parameters that :meth:`observe` or :meth:`direct` was given.

        Returns:
            The group, with its options as they are now.
        """
        return self.param_groups[self._layout.groups[self._layout.whole(p)]]

    def entry_lengths(self, row: Row, params: Sequence[Tensor]) -> Row:
        """The lengths of the gradients of one loss, parameter by parameter.

        Args:
            row: The row, as :meth:`observe` has it.
            params: The parameters.

        Returns:
            Scalars on the devices of the entries, over all processes where parameters are spread over them; ``None``
            where the loss does not reach a parameter.
        """
        batch, pieces = self._now.batch, moments.lengths(row)
        return pieces if batch is None else batch.comm.lengths(pieces, list(map(self._layout.whole, params)))

    def factor(self) -> np.ndarray:
        """A square root B of the Gram matrix, B Bᵀ = J Jᵀ, as accurate as the rows themselves.

        The Gram matrix squares their condition number. This reads all rows once more, in float64: for the rare input
        that needs it.

        Returns:
            B, (m, k), k ≤ m, float64.
        """
        assert self._now.problem is not None
        return self._now.problem.gram.root()

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of the rows in ``weights``, for comparison with those of other steps.

        Where products leave float64, the Gram matrix is that of the rows times a power of two, and these are not.

        Returns:
            (m,), float64.

        Raises:
            RuntimeError: They leave float64 themselves, through what multiplies the rows.
        """
        assert self._now.problem is not None
        if self._now.problem.lengths is None:  # nothing was multiplied
            return np.asarray(np.sqrt(self._now.problem.gram.values.diagonal()))
        lengths = self._now.problem.lengths
        values = lengths.values()
        if not ((values > 0) == (lengths.fraction != 0)).all() or not (values < math.inf).all():
            raise RuntimeError(
                f"{self._name}: gradients are out of range: with `preference` and the weights inside applied, their "
                "lengths, which the method keeps, leave float64. Divide the losses by a constant. Nothing was written."
            )
        return values

    def primary_row(self, primary: str | None) -> int | None:
        """Find the task that comes first, for the methods that have one.

        Args:
            primary: Its name; ``None`` stands for the first loss of the first call.

        Returns:
            Its row; None, with the flag "primary-absent", if the task is absent from this batch.

        Raises:
            ValueError: No loss of the call has this name.
        """
        wanted = self.primary_name(primary)
        if wanted not in self.names:
            self.flag("primary-absent")
            return None
        return self.names.index(wanted)

    def primary_name(self, primary: str | None) -> str:
        """The name of the task that comes first, present or not.

        Args:
            primary: Its name; ``None`` stands for the first loss of the first call.

        Returns:
            Its name.

        Raises:
            ValueError: No loss of the call has this name.
        """
        names = self.all_names
        wanted = self.order[0] if primary is None else primary
        if wanted not in names:
            stands = " (which None stands for, as the first loss of the first call)" if primary is None else ""
            raise ValueError(
                f"{self._name}: `primary` must be the name of a loss, one of {list(names)}, got {wanted!r}{stands}. "
                "Pass the losses as a dict with that name."
            )
        return wanted

    @property
    def noise(self) -> float:
        """How far entries of the Gram matrix may be off, relative to the lengths of the two rows."""
        assert self._now.problem is not None
        return self._now.problem.gram.noise

    def visiting_orders(self, shuffle: bool) -> np.ndarray:
        """In which order each task meets the others, for the methods that go pair by pair.

        Args:
            shuffle: Draw an order for every task; otherwise the order of the losses.

        Returns:
            (m, m − 1) indices; row i has every j ≠ i once.
        """
        orders = _others(m := len(self.names))
        return self.rng().permuted(orders, axis=1) if shuffle and m > 2 else orders

    def combine(self, rows: Tensor, losses: Sequence[float] | Tensor | None = None, update: bool = False) -> Tensor:
        """The direction for given rows, without any model: for research and tests.

        All columns count as shared, so that the method is asked about a single row too. ``backward`` with one loss
        gives its plain gradient, since nothing is shared then. The two differ in length where a method does not have
        the scale of the sum: one row gives ‖d‖ = 1 with ``NashMTL(scale="paper")``, for example, and its `preference`
        and `normalize` act.

        Args:
            rows: Gradients of m losses, (m, n), real floating point.
            losses: Their values, (m,); only methods that read them ask for them.
            update: Commit what the method learns, as a step would. By default the call is pure: it uses the committed
                memory and the next step's random draw, and changes nothing.

        Returns:
            The direction, (n,), with the dtype and device of the rows, after `reduction`.

        Raises:
            TypeError: `rows` is not a matrix of real floating point numbers.
            ValueError: `rows` is empty or not finite, or of another number than the losses that the method knows, or
                `losses` is missing or of the wrong length.
            RuntimeError: The method keeps rows of the parameters that it trains, and these are of another size.
        """
        where = f"{self._name}.combine"
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
            raise TypeError(f"{where}: `rows` must be a real floating point tensor of shape (m, n).")
        m = rows.shape[0]
        if m == 0:
            raise ValueError(f"{where}: `rows` must have at least one row, got shape {tuple(rows.shape)}.")
        if losses is None and (self.needs_losses or self.log_losses or self.normalize in ("loss", "loss+")):
            raise ValueError(f"{where}: `losses` must be given; this method reads them.")
        given = losses.detach().cpu() if isinstance(losses, Tensor) else losses
        values = np.array([math.nan] * m) if given is None else np.asarray(given, dtype=np.float64)
        if values.shape != (m,):
            raise ValueError(f"{where}: `losses` must have shape ({m},), one value per row, got {values.shape}.")
        rows = rows.detach()
        names = self._names_of_rows(rows)
        self._require_closed("combine")
        with self.transaction.apart(names, update):
            if "tasks" not in self.memory and (self.stateful or self.check.by_order):
                self._learn_names(names)
            factors = self._logarithmic(values) if self.settings.log_losses else None
            seen = self.seen(values, factors)
            return self._added_up(rows, seen, factors) if self.needs_gram_only else self._combined(rows, seen, factors)

    def _added_up(self, rows: Tensor, seen: np.ndarray, factors: np.ndarray | None) -> Tensor:
        """``combine`` for methods that need inner products only."""
        table, products = Table(rows), gram_module.gram_of_matrix(rows)
        if not gram_module.in_range(products):
            self._require_finite(rows)
            products = table.repaired(products)
        weights = solve(self, Problem(self.names, Gram.of(table, products)), seen, factors)
        if factors is not None:
            weights = weights * factors
        share = self.settings.share(len(products))
        applied = weights if share == 1.0 else share * weights
        held = self._held(table, products, applied, rows)
        total = sum(map(abs, applied.tolist()))
        # No entry of the direction is larger than this product.
        bound = max(total, total * table.unit * math.sqrt(max(products.diagonal().tolist())))
        doubtful = rows_module.may_overflow(bound, [rows])
        if held is not None:
            out = held.split([rows[0]])[0]
            assert out is not None
        else:
            if doubtful:
                self._require_fitting(applied, rows)
            out = rows_module.mixed(rows, applied)
        if doubtful:
            self._require_in_range(out)
        return out

    def _names_of_rows(self, rows: Tensor) -> tuple[str, ...]:
        """Rows stand for the losses that the method knows, in their order; otherwise for "0", "1" and so on."""
        m, size = rows.shape
        first = self.param_groups[0]["params"][0]
        reached = {j for places in self.memory.get("reached", {}).values() for j in places}
        if any(j or first.numel() != size for j in reached):  # `combine` has all in place 0
            raise RuntimeError(
                f"{self._name}.combine: the method keeps rows of the parameters that it trains, and cannot go on with "
                "others. Make another one for `combine`."
            )
        known = tuple(self.transaction.learnt.get("tasks", ()))
        if self.stateful and known and len(known) != m:
            raise ValueError(
                f"{self._name}.combine: the method keeps something for each of {list(known)}, so `rows` must have a "
                f"row for each, in this order; got {m}."
            )
        return known if self.stateful and known else _numbers(m)

    def _combined(self, rows: Tensor, seen: np.ndarray, factors: np.ndarray | None) -> Tensor:
        """``combine`` for methods that keep rows or work coordinate by coordinate."""
        self._require_finite(rows)
        m, like, late = len(rows), rows[0], factors
        table: list[Row] = [[row] for row in rows]
        with self._acting(Layout([[like]])):
            if self.observes:
                by = [1.0] * m if factors is None else factors.tolist()
                table = [[rows_module.wide(row) * c] for row, c in zip(rows, by, strict=True)]
                table = self.observe(table, list(torch.from_numpy(seen)), [like])
                late = None
            sent = self.sent()
            measured = None if sent is None else sent.sum(dim=1).double().cpu().numpy()
            whole = Table(table)
            products = whole.repaired(whole.products().cpu().numpy())
            weights = solve(self, Problem(self.names, Gram.of(whole, products), measured), seen, late)
            if late is not None and len(weights) == m:
                weights = weights * late
            share = self.settings.share(m)
            applied = share * weights
            held = self._held(whole, products, applied, like)
            if held is not None:
                (out,) = held.split([like])
            else:
                self._require_fitting(applied, like)
                out = self.direct([row for (row,) in table[: len(applied)]], applied.tolist(), like, share)
        assert out is not None
        self._require_in_range(out)
        return out

    def _require_fitting(self, weights: np.ndarray, rows: Tensor) -> None:
        largest = rows_module.largest_factor([rows])
        if not (np.abs(weights) <= largest).all():
            raise RuntimeError(
                f"{self._name}.combine: the weights {weights.tolist()} are out of range; the largest number of the "
                f"dtype is {largest:.3g}. `max_weight` bounds the weights."
            )

    def _require_in_range(self, direction: Tensor | None) -> None:
        if direction is not None and not torch.isfinite(direction).all():
            raise RuntimeError(
                f"{self._name}.combine: every row is finite, and their weighted sum overflows {direction.dtype}. "
                "Divide the rows by a constant, or pass them in a wider dtype."
            )

    def _held(self, table: Table, products: np.ndarray, applied: np.ndarray, like: Tensor) -> descent.Direction | None:
        """The direction, where its rounding could break what the method promises; see :mod:`descent`."""
        if not (self.promises(len(products)) and all(map(math.isfinite, applied.tolist()))):
            return None
        found = descent.held(table, products, applied, [like])
        if found is not None and not found.descends:
            self.flag("loss-may-rise")
        return found

    def promises(self, count: int) -> bool:
        """Whether no loss may rise along a weighted sum of rows.

        Args:
            count: Number of rows.

        Returns:
            True if that is so by the method and its switches.
        """
        return count <= self.descends and not self.settings.changes_weights and count == len(self.names)

    def _require_finite(self, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise ValueError(f"{self._name}.combine: `rows` must be finite.")

    # ------------------------------------------------------------------------------------------- one step

    def _act(self, batch: Batch) -> Report:
        if batch.features or batch.residuals is not None:
            self._require_meaning(batch)
        inner, now = self.inner, self._now
        now.batch, now.layout = batch, Layout([group["params"] for group in self.base.param_groups])
        try:
            with nullcontext() if inner is None else inner.proposing(batch.tasks.names, batch.names):
                report = SurgeryStep(self, batch, now.layout).take()
                if inner is not None and self.transaction.rejected:
                    inner.transaction.reject()
        finally:
            now.clear()
        return report

    def _require_meaning(self, batch: Batch) -> None:
        """Refuse what this method has no use for."""
        if batch.features and (self.observes or not self.has_weights):
            raise ValueError(
                f"{self._name}.backward: `features` needs a method that finds one weight per loss from this batch "
                "alone. This one works on the gradients of the parameters."
            )
        if batch.features and (self.granularity != "all" or self.settings.puts_rows_away):
            which = f'granularity="{self.granularity}"' if self.granularity != "all" else "`row_dtype` and `row_device`"
            raise ValueError(
                f"{self._name}.backward: `features` excludes {which}: the rows are those at the features, and there is "
                "one weight per loss. Leave out one of the two."
            )
        if batch.residuals is not None and (self.inner is None or not self.inner.uses_residuals):
            raise ValueError(f"{self._name}.backward: `residuals` has no effect here: NTKWeighter alone reads them.")

    # ------------------------------------------------------------------------------- what the step asks

    @property
    def inner(self) -> Weighter | None:
        """The weighter inside, or None."""
        return self.base if isinstance(self.base, Weighter) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses that take part, (m,)."""
        return self.transaction.present if self._now.problem is None else self._now.problem.names

    @property
    def needs_gram_only(self) -> bool:
        """The method sees nothing of the rows but their inner products."""
        return self.adds_rows and not self.observes and self.settings.granularity == "all"

    @property
    def adds_rows(self) -> bool:
        """The direction is a weighted sum of the rows: no class overrides :meth:`direct`."""
        return type(self).direct is Surgery.direct

    def visiting_order(self) -> list[int]:
        """In which order the losses come, for a method without rows.

        Returns:
            A permutation of the present losses.
        """
        return list(range(len(self.names)))

    @property
    def undecided(self) -> bool:
        """Whether the method does not know yet which parameters are private: until then none is."""
        return False

    @property
    def is_alone(self) -> bool:
        """Whether one loss alone is present, so that there is nothing to balance. `combine` asks the method anyway."""
        return self._now.batch is not None and len(self.names) == 1

    def parameters(self) -> list[Tensor]:
        """The trainable parameters of the optimizer, in the order of its groups.

        Returns:
            Each once.
        """
        return parameters(self)

    def preferences(self) -> np.ndarray:
        """The user's priorities of the present losses. A loss that is alone has none.

        Returns:
            (m,); ones if there are none.

        Raises:
            ValueError: A present loss has none.
        """
        return np.ones(1) if self.is_alone else super().preferences()

    def smoothed(self, weights: np.ndarray) -> np.ndarray:
        return super().smoothed(weights) if self.settings.changes_weights and not self.is_alone else weights

    def asked(self, problem: Problem) -> AbstractContextManager[object]:
        """Let the method's own functions see a problem.

        Args:
            problem: The problem.

        Returns:
            A context, at whose end it is forgotten.
        """
        self._now.problem = problem
        return self._now

    @contextmanager
    def _acting(self, layout: Layout) -> Iterator[None]:
        """Let the method's own functions see the places of the parameters, where there is no batch."""
        self._now.layout = layout
        try:
            yield
        finally:
            self._now.clear()

    @contextmanager
    def observing(self, early: np.ndarray | None) -> Iterator[None]:
        """Let :meth:`observe` see what the rows were multiplied by.

        Args:
            early: One factor per loss, (m,), or None.

        Yields:
            Nothing.
        """
        self._now.early = early
        yield

    @property
    def _layout(self) -> Layout:
        assert self._now.layout is not None
        return self._now.layout

    def further_rows(self, losses: Tasks, params: Sequence[Tensor]) -> list[Row]:
        """Differentiate the same losses on another batch, for :meth:`observe`.

        Args:
            losses: The losses, one for each that is present here.
            params: What :meth:`observe` was given.

        Returns:
            One row per present loss, of the kind that :meth:`observe` gets. The graph is kept.

        Raises:
            RuntimeError: Gradients at some parameters only cannot be found.
        """
        batch = self._now.batch
        assert batch is not None
        if batch.comm.is_sharded or batch.graph.hidden:
            raise RuntimeError(f"{self._name}.backward: `independent` does not work with sharded parameters.")
        places = [losses.present.index(name) for name in self.names]
        factors = np.ones(len(places)) if self._now.early is None else self._now.early
        if self.log_losses:
            factors = self._further_logarithmic(batch, [losses.tensors[i] for i in places])
        scale = None if batch.scaler is None else batch.loss_scale
        rows = []
        for i, seed, factor in zip(places, batch.seeds, factors.tolist(), strict=True):
            root = losses.roots[i]
            assert root is not None
            row = rows_module.gradient(root, params, seed.to(losses.tensors[i]), retain_graph=True)
            row = batch.comm.totals(row, params)
            rows_module.unscale(row, scale, factor)
            rows.append(row)
        return rows

    def _further_logarithmic(self, batch: Batch, tensors: Sequence[Tensor]) -> np.ndarray:
        """What the gradients of a further batch are multiplied by under `log_losses`: the reciprocals of its losses."""
        device = batch.values.device
        shares = torch.stack([seed.to(device, torch.float64) for seed in batch.seeds]) / batch.loss_scale.to(device)
        values = batch.comm.total(shares * losses_module.values(tensors, device)).cpu().numpy()
        # What is not finite makes rows that are not, of which `nonfinite` decides.
        known = np.where(np.isfinite(values), values, 1.0)
        self.require_positive(known, "log_losses=True takes its logarithm, in a batch of `independent` too")
        return np.asarray(1.0 / values)

    def factors(self, values: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        """What each loss is multiplied by before the surgery: by a weighter inside, and by the logarithm.

        Args:
            values: Values of the losses, (m,).
            measured: What the weighter has measured.

        Returns:
            (m,).
        """
        inner = self.inner
        # np.ones takes five times as long.
        logarithmic = self._logarithmic(values) if self.settings.log_losses else np.array([1.0] * len(values))
        return logarithmic if inner is None else inner.coefficients(values, measured) * logarithmic

    def _logarithmic(self, values: np.ndarray) -> np.ndarray:
        self.require_positive(values, "log_losses=True takes its logarithm")
        return 1.0 / values

    def seen(self, values: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
        """The values of the losses as the method sees them: multiplied by a weighter inside, or their logarithms.

        Args:
            values: The values, (m,).
            factors: What the losses are multiplied by; None: 1.

        Returns:
            (m,).
        """
        if self.settings.log_losses:
            self.require_positive(values, "log_losses=True takes its logarithm")
            return np.log(values)
        return values if factors is None else factors * values

    def parts(self, shared: Sequence[Tensor], layout: Layout) -> dict[str, list[int]]:
        """Places of the shared parameters that have a surgery of their own, by a name that lasts.

        Args:
            shared: The shared parameters.
            layout: The places of all parameters.

        Returns:
            Indices into `shared`.
        """
        granularity = self.settings.granularity
        if granularity == "all":
            return {"all": list(range(len(shared)))} if shared else {}
        if granularity == "parameter":
            return {f"parameter {layout.place(p)}": [j] for j, p in enumerate(shared)}
        by_group: dict[str, list[int]] = {}
        for j, p in enumerate(shared):
            by_group.setdefault(f"group {layout.groups[p]}", []).append(j)
        return by_group

    def part(self, name: str) -> AbstractContextManager[None]:
        """Give one group of the parameters a memory of its own while the method looks at it.

        Args:
            name: Its name.

        Returns:
            A context.
        """
        return nullcontext() if self.settings.granularity == "all" else self.transaction.part(name)
