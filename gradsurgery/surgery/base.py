"""The step that every surgery method makes: rows, Gram, weights, ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import gram as gram_module
from gradsurgery import rows as rows_module
from gradsurgery import shards
from gradsurgery.call import Call, parameters
from gradsurgery.gram import Scaled, Table
from gradsurgery.losses import Tasks
from gradsurgery.optimizer import MultiLossOptimizer, Switches
from gradsurgery.report import Report
from gradsurgery.surgery import descent
from gradsurgery.surgery.step import Step
from gradsurgery.weighting.base import Weighter

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Rows whose lengths differ by more than two to this power have squares that float64 does not hold side by side.
_FAR_APART = 1000
# A term that is smaller than another by two to this power is lost when they are added up.
_NEGLIGIBLE = 60


@cache
def _numbers(m: int) -> tuple[str, ...]:
    """Names of rows that have none."""
    return tuple(map(str, range(m)))


@cache
def _others(m: int) -> np.ndarray:
    """Every j ≠ i in row i, in order; not to be changed."""
    return np.arange(m - 1) + (np.arange(m - 1) >= np.arange(m)[:, None])


def _lengths(rows: Table, gram: np.ndarray) -> Scaled:
    """The lengths of rows with these products."""
    return Scaled(rows.unit) * Scaled(np.sqrt(gram.diagonal()))


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
    dtype: ⟨gᵢ, d⟩ ≥ −4u Σₖ |gᵢₖ| |dₖ| with its unit roundoff u, 2⁻²⁴ in float32. Where rounding could break it, sums
    are taken in double precision, rows are formed whatever the engine, and the direction is corrected by the least that
    is needed; if that fails the report has the flag "loss-may-rise". `weight_momentum`, `min_weight`, `max_weight`,
    `warmup`, steps that reuse weights, and rows at `features` give the promise up.

    Args:
        optimizer: The optimizer that makes the step, or a weighter around it. Under a weighter the method, and all
            that is said here of losses and rows, sees each loss multiplied by its coefficient, as if you had done so.
        shared_params: The parameters that the surgery acts on, or the module that has them; all others get the plain
            gradient of the sum. Found from the graph by default.
        normalize: What the rows are divided by before the method sees them, for rows of very different lengths: "none";
            "l2": sᵢ = ‖gᵢ‖; "loss": sᵢ = lᵢ; "loss+": sᵢ = ‖gᵢ‖ lᵢ. The last two need positive losses. The weights α of
            the scaled rows are applied to them: the raw gradients get αᵢ/sᵢ. In methods that keep rows between steps
            (MoCo, ExcessMTL, Bloop, GCond) the rows are what these have made of them: s is the length of the average,
            say, or the present loss. Where the direction does not turn when single rows are scaled, as that of ConFIG
            and IMTLG, only its length changes.
        log_losses: Act on the logarithms of the losses, which must be positive: every gradient, private ones included,
            is divided by its loss (the ``LOG_`` variants of the FAMO repository). Not with a weighter inside, whose
            coefficients would drop out.
        granularity: One surgery for "all" shared parameters together, one a parameter "group" of the optimizer, or one
            a "parameter".
        engine: How methods that need no more than the inner products of the rows get them. "rows": from the rows.
            "ghosts": without forming gradients of linear layers, convolutions and embeddings, wherever that is exact.
            "auto": likewise, where the shapes say that it is faster. "blocks": from the rows of one block of the model
            at a time, and one more backward pass at the end: the least memory for deep models whose layers are wide and
            batches large, such as transformers. The result is the same up to rounding.
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
    # The method adds up gradients as they come, and has no rows; see streaming.py.
    streaming = False

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
        self.shared_params: frozenset[Tensor] | None = None
        if shared_params is not None:
            self.shared_params = frozenset(self._given_params(shared_params))
            own = {p for group in self.param_groups for p in group["params"]}
            if foreign := [p for p in self.shared_params if p not in own]:
                raise ValueError(
                    f"{self._name}: `shared_params` has {len(foreign)} of {len(self.shared_params)} parameters that "
                    f"are not in the optimizer (one has shape {tuple(foreign[0].shape)}), so the surgery could not act "
                    "on them. Give them to the optimizer first, or name parameters of the model that it trains."
                )
        self.normalize = self._choice("normalize", normalize, ("none", "l2", "loss", "loss+"))
        self.log_losses = bool(log_losses)
        if self.log_losses and isinstance(optimizer, Weighter):
            raise ValueError(
                f"{self._name}: log_losses=True excludes a weighter inside ({type(optimizer).__name__}): what "
                "multiplies a loss drops out of the gradient of its logarithm. Leave out one of the two."
            )
        self.granularity = self._choice("granularity", granularity, ("all", "group", "parameter"))
        self.engine = self._choice("engine", engine, ("auto", "rows", "ghosts", "blocks"))
        self.row_dtype = self._dtype_of_rows(row_dtype)
        self.row_device = None if row_device is None else self._home_of_rows(row_device)
        if self._puts_rows_away:
            self._require_rows_of_one_batch()
            self.engine = "rows"
        self.needs_losses = self.needs_losses or self.log_losses or self.normalize in ("loss", "loss+")
        if self.granularity != "all" and self.every > 1:
            raise ValueError(
                f'{self._name}: `every` > 1 needs granularity="all": weights of several parts cannot be '
                "reused in one backward pass."
            )

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

    @property
    def _puts_rows_away(self) -> bool:
        return self.row_dtype is not None or self.row_device is not None

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

    def _require_possible(self, accumulates: bool, exchanges: bool) -> None:
        if self._puts_rows_away and (accumulates or exchanges):
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

    def observe(
        self, rows: list[gram_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[gram_module.Row]:
        """Replace the rows by what the method works on, such as their moving averages. Needs ``observes = True``.

        Args:
            rows: One row a present task, one entry a parameter, ``None`` where a loss does not reach it.
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
            numbers: (k, P), one column a shared parameter. Columns of parameters that have one surgery are added up.
        """
        self._run["numbers"] = numbers

    @property
    def measured(self) -> np.ndarray:
        """What :meth:`measure` sent, added up, (k,), float64."""
        measured: np.ndarray = self._run["measured"]
        return measured

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

    def count_projections(self, mixing: np.ndarray) -> None:
        """Note for the report how many projections were made.

        Args:
            mixing: Row i holds the weights of task i's projected gradient, (m, m).
        """
        made = int(np.count_nonzero(mixing)) - int(np.count_nonzero(mixing.diagonal()))
        self._run["projections"] = made + (self._run.get("projections") or 0)

    def row_state(self, key: str, name: str, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Read a row kept in the memory.

        Args:
            key: What it is kept under.
            name: The task, or any other label.
            params: The shared parameters.

        Returns:
            One tensor a parameter, ``None`` where nothing is kept yet.
        """
        kept = self.memory.get(key, {}).get(name, {})
        positions = self._run["positions"]
        return [None if (g := kept.get(positions[p])) is None else g.to(p.device) for p in params]

    def keep_row(self, key: str, name: str, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Keep a row in the memory.

        Args:
            key: What it is kept under.
            name: The task, or any other label.
            row: One tensor a parameter. They must not be changed in place afterwards.
            params: The shared parameters.
        """
        positions = self._run["positions"]
        kept = self.memory.get(key, {})
        new = {positions[p]: g for p, g in zip(params, row, strict=True) if g is not None}
        self.memory[key] = {**kept, name: {**kept.get(name, {}), **new}}

    def recall_shares(self, key: str) -> np.ndarray:
        """Read the shares of the present tasks, which are kept on the simplex.

        Args:
            key: Their name in the memory.

        Returns:
            (m,), ≥ 0, of sum 1. Equal shares before the first call, or if the present tasks have none.
        """
        shares = self.recall(key, 1 / len(self._run["tasks"].names))
        total = shares.sum()
        return shares / total if total > 0 else np.full(len(shares), 1 / len(shares))

    def keep_shares(self, key: str, shares: np.ndarray) -> None:
        """Keep the shares of the present tasks. Those of absent tasks, and what the present ones have in all, stay.

        Args:
            key: Their name in the memory.
            shares: (m,), of sum 1.
        """
        total = self.recall(key, 1 / len(self._run["tasks"].names)).sum()
        if total > 0:
            self.keep(key, total * shares)

    def uniform(self, like: Tensor) -> Tensor:
        """Random numbers for one parameter: the same in every evaluation of a step, on every device and rank.

        Args:
            like: The parameter.

        Returns:
            Draws from [0, 1), of the shape of the parameter, float32, on its device.
        """
        step = (self._run["draft"] or self._learnt)["step"]
        entropy = np.random.SeedSequence([self.seed, step, self._run["positions"][like]])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        whole = self._run["pieces"].get(like, like)
        whole = whole if hasattr(whole, "device_mesh") else like
        numbers = torch.rand(whole.shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device)
        return shards.drawn(numbers, whole)

    def factor(self) -> np.ndarray:
        """A square root B of the Gram matrix, B Bᵀ = J Jᵀ, as accurate as the rows themselves.

        The Gram matrix squares their condition number. This reads all rows once more, in float64: for the rare input
        that needs it.

        Returns:
            B, (m, k), k ≤ m, float64.
        """
        fraction, exponent = self._run["row_scales"]
        found: np.ndarray = np.ldexp(fraction * self._run["rows"].triangle(), exponent)
        return found

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of the rows in ``weights``, for comparison with those of other steps.

        Where products leave float64, the Gram matrix is that of the rows times a power of two, and these are not.

        Returns:
            (m,), float64.

        Raises:
            RuntimeError: They leave float64 themselves, through what multiplies the rows.
        """
        lengths: Scaled | np.ndarray = self._run["lengths"]
        if isinstance(lengths, np.ndarray):  # the Gram matrix, where nothing was multiplied
            return np.asarray(np.sqrt(lengths.diagonal()))
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
        wanted = self._primary_name(primary)
        if wanted not in self.names:
            self.flag("primary-absent")
            return None
        return self.names.index(wanted)

    def _primary_name(self, primary: str | None) -> str:
        names = self._run["tasks"].names
        wanted = self.order[0] if primary is None else primary
        if wanted not in names:
            stands = " (which None stands for, as the first loss of the first call)" if primary is None else ""
            raise ValueError(
                f"{self._name}: `primary` must be the name of a loss, one of {list(names)}, got {wanted!r}{stands}. "
                "Pass the losses as a dict with that name."
            )
        return wanted

    def _as_primary(self, primary: str | None) -> str | None:
        """Check the argument `primary`."""
        if primary is None:
            self._goes_by_order = True
        elif not isinstance(primary, str):
            raise TypeError(f"{self._name}: `primary` must be the name of a loss or None, got {primary!r}.")
        return primary

    @property
    def noise(self) -> float:
        """How far entries of the Gram matrix may be off, relative to the lengths of the two rows."""
        noise: float = self._run["rows"].noise
        return noise

    def visiting_orders(self, shuffle: bool) -> np.ndarray:
        """In which order each task meets the others, for the methods that go pair by pair.

        Args:
            shuffle: Draw an order for every task; otherwise the order of the losses.

        Returns:
            (m, m − 1) indices; row i has every j ≠ i once.
        """
        m = len(self.names)
        orders = _others(m)
        return self.rng().permuted(orders, axis=1) if shuffle and m > 2 else orders

    def combine(self, rows: Tensor, losses: Sequence[float] | Tensor | None = None, update: bool = False) -> Tensor:
        """The direction for given rows, without any model: for research and tests.

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
        m = len(rows)
        if m == 0:
            raise ValueError(f"{where}: `rows` must have at least one row, got shape {tuple(rows.shape)}.")
        if losses is None and self.needs_losses:
            raise ValueError(f"{where}: `losses` must be given; this method reads them.")
        given = losses.detach().cpu() if isinstance(losses, Tensor) else losses
        values = np.full(m, np.nan) if given is None else np.asarray(given, dtype=np.float64)
        if values.shape != (m,):
            raise ValueError(f"{where}: `losses` must have shape ({m},), one value a row, got {values.shape}.")
        rows = rows.detach()
        names = self._names_of_rows(rows)
        share = 1.0 / m if self.reduction == "mean" else 1.0
        pending, self._run["pending"] = self._run["pending"], None
        try:
            with self._proposal(Tasks(names, names, (), ())):
                coefficients = self._logarithmic(values) if self.log_losses else None
                seen = self._seen(values, coefficients)
                if self.needs_gram_only:
                    table, gram = Table(rows), gram_module.gram_of_matrix(rows)
                    if not gram_module.in_range(gram):
                        self._require_finite(rows)
                        gram = table.repaired(gram)
                    weights = self._solve(table, gram, seen, coefficients)
                    if coefficients is not None:
                        weights = weights * coefficients
                    applied = weights if share == 1.0 else share * weights
                    held = self._held(table, gram, applied, [rows])
                    total = sum(map(abs, applied.tolist()))
                    # No entry of the direction is larger than this product.
                    bound = max(total, total * table.unit * math.sqrt(max(gram.diagonal().tolist())))
                    doubtful = rows_module.may_overflow(bound, [rows])
                    if doubtful and held is None:
                        self._require_fitting(applied, rows)
                    out: Tensor | None = rows_module.mixed(rows, applied) if held is None else held.split([rows[0]])[0]
                    if doubtful:
                        self._require_in_range(out)
                else:
                    out = self._combined(rows, seen, coefficients, share)
            if update:
                self._note_update()
                self._commit()
                pending = None
        finally:
            self._run["pending"] = pending
        assert out is not None
        return out

    def _names_of_rows(self, rows: Tensor) -> tuple[str, ...]:
        """Rows stand for the losses that the method knows, in their order; otherwise for "0", "1" and so on."""
        m, size = rows.shape
        first = self.param_groups[0]["params"][0]
        if any(j or first.numel() != size for j in self._reached_ever()):  # `combine` has all in place 0
            raise RuntimeError(
                f"{self._name}.combine: the method keeps rows of the parameters that it trains, and cannot go on with "
                "others. Make another one for `combine`."
            )
        known = tuple(self._learnt.get("tasks", ()))
        if self.stateful and known and len(known) != m:
            raise ValueError(
                f"{self._name}.combine: the method keeps something for each of {list(known)}, so `rows` must have a "
                f"row for each, in this order; got {m}."
            )
        return known if self.stateful and known else _numbers(m)

    def _combined(self, rows: Tensor, seen: np.ndarray, coefficients: np.ndarray | None, share: float) -> Tensor | None:
        """``combine`` for methods that keep rows or work coordinate by coordinate."""
        self._require_finite(rows)
        m, like = len(rows), rows[0]
        self._run["positions"] = {like: 0}
        table: list[gram_module.Row] = [[row] for row in rows]
        if self.observes:
            factors = [1.0] * m if coefficients is None else coefficients.tolist()
            table = [[rows_module.wide(row) * c] for row, c in zip(rows, factors, strict=True)]
            table = self.observe(table, list(torch.from_numpy(seen)), [like])
            coefficients = None
            if (numbers := self._run.pop("numbers", None)) is not None:
                self._run["measured"] = numbers.sum(dim=1).double().cpu().numpy()
        whole = Table(table)
        gram = whole.repaired(whole.products().cpu().numpy())
        weights = self._solve(whole, gram, seen, coefficients)
        if coefficients is not None and len(weights) == m:
            weights = weights * coefficients
        applied = share * weights
        if (held := self._held(whole, gram, applied, [like])) is None:
            self._require_fitting(applied, like)
            out = self.direct([row for (row,) in table[: len(applied)]], applied.tolist(), like, share)
        else:
            (out,) = held.split([like])
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

    def _held(
        self, table: Table, gram: np.ndarray, applied: np.ndarray, params: Sequence[Tensor], **spread: Any
    ) -> descent.Direction | None:
        """The direction, where its rounding could break what the method promises; see :mod:`descent`."""
        finite = all(map(math.isfinite, applied.tolist()))  # or a scaler will skip this step
        if not (finite and self._promises(len(gram))):
            return None
        found = descent.held(table, gram, applied, params, **spread)
        if found is not None and not found.descends:
            self.flag("loss-may-rise")
        return found

    def _promises(self, count: int) -> bool:
        """Whether no loss may rise along the weighted sum of so many rows."""
        return count == len(self.names) <= self.descends and not self.weight_momentum and not self._bounded

    @property
    def _bounded(self) -> bool:
        return self.min_weight > -math.inf or self.max_weight < math.inf

    def _require_finite(self, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise ValueError(f"{self._name}.combine: `rows` must be finite.")

    # ------------------------------------------------------------------------------------------- one step

    def _act(self, call: Call) -> Report:
        if call.features and (self.observes or not self.has_weights):
            raise ValueError(
                f"{self._name}.backward: `features` needs a method that finds one weight a loss from this batch alone. "
                "This one works on the gradients of the parameters."
            )
        if call.features and (self.granularity != "all" or self._puts_rows_away):
            which = f'granularity="{self.granularity}"' if self.granularity != "all" else "`row_dtype` and `row_device`"
            raise ValueError(
                f"{self._name}.backward: `features` excludes {which}: the rows are those at the features, and there is "
                "one weight a loss. Leave out one of the two."
            )
        inner = self.base if isinstance(self.base, Weighter) else None
        if self._run["residuals"] is not None and (inner is None or not inner.uses_residuals):
            raise ValueError(f"{self._name}.backward: `residuals` has no effect here: NTKWeighter alone reads them.")
        # Positions count frozen parameters too, so that freezing one does not exchange the rows of the others.
        everything = dict.fromkeys(p for group in self.param_groups for p in group["params"])
        self._run["positions"] = {p: j for j, p in enumerate(everything)}
        with nullcontext() if inner is None else inner._proposal(call.tasks):
            if inner is not None:
                inner._run.update(features=call.features, residuals=self._run["residuals"])
            report = Step(self, call).report()
            if inner is not None and self._run["draft"] is None:
                inner._run["draft"] = None
        return report

    @property
    def needs_gram_only(self) -> bool:
        """The method sees nothing of the rows but their inner products."""
        return self._adds_rows and not self.observes and self.granularity == "all"

    @property
    def _adds_rows(self) -> bool:
        return type(self).direct is Surgery.direct

    def parameters(self) -> list[Tensor]:
        """The trainable parameters of the optimizer, in the order of its groups.

        Returns:
            Each once.
        """
        return parameters(self)

    def _shared(self, mine: list[Tensor], masks: dict[Tensor, int] | None) -> list[Tensor]:
        """The parameters that the surgery acts on: given by the user, or reached by two losses or more."""
        if self.shared_params is not None:
            return [p for p in mine if p in self.shared_params]
        if masks is None:  # what is private shows when the gradients are there
            return list(mine)
        if self.observes:
            reached = self._reached_ever()
            here = {p: {n for i, n in enumerate(self.names) if masks.get(p, 0) >> i & 1} for p in mine}
            return [p for p in mine if len(here[p] | reached.get(self._run["positions"][p], set())) > 1]
        return [p for p in mine if masks[p] & (masks[p] - 1)]

    def _reached_ever(self) -> dict[int, set[str]]:
        """Which losses have reached each parameter, by its position: a task may be absent, its trunk stays shared."""
        reached: dict[int, set[str]] = {}
        for name, positions in self.memory.get("reached", {}).items():
            for j in positions:
                reached.setdefault(j, set()).add(name)
        return reached

    def _remember_reached(self, marks: Sequence[Sequence[int]], shared: Sequence[Tensor]) -> None:
        if self._run["draft"] is None:
            return
        known, ever = self.memory.get("reached", {}), self._reached_ever()
        places = [self._run["positions"][p] for p in shared]
        # What one loss alone has reached so far is private, and stays so if another one comes in its place.
        reached = [
            {n for n, mark in zip(self.names, column, strict=True) if mark} for column in zip(*marks, strict=True)
        ]
        lasting = [
            self.moves_unreached or len(now | ever.get(j, set())) > 1 for j, now in zip(places, reached, strict=True)
        ]
        for name, row in zip(self.names, marks, strict=True):
            now = {j for j, mark, kept in zip(places, row, lasting, strict=True) if mark and kept}
            if not now <= set(known.get(name, ())):
                known = {**known, name: sorted(now.union(known.get(name, ())))}
        self.memory["reached"] = known

    def _unscale(self, row: gram_module.Row, loss_scale: Tensor | None, factor: float = 1.0) -> None:
        """Take the loss scale out of a row, in single precision or better, and multiply it."""
        for j, g in enumerate(row):
            if g is not None:
                g = rows_module.wide(g)
                g = g if loss_scale is None else g / loss_scale.to(g.device)
                row[j] = g if factor == 1.0 else g * factor

    def _undecided(self) -> bool:
        """Whether the method does not know yet which parameters are private."""
        return False

    def preferences(self) -> np.ndarray:
        """The user's priorities of the present tasks. A task that is alone has none.

        Returns:
            (m,); ones if there are none.

        Raises:
            ValueError: A present task has none.
        """
        return np.ones(1) if self._alone else super().preferences()

    def _settled(self, weights: np.ndarray) -> np.ndarray:
        return weights if self._alone else super()._settled(weights)

    @property
    def _alone(self) -> bool:
        """Whether one task alone is present, so that there is nothing to balance. `combine` takes rows as they are."""
        return self._run["call"] is not None and len(self.names) == 1

    def _coefficients(self, values: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        """What each loss is multiplied by before the surgery: by a weighter inside, and by the logarithm."""
        if not isinstance(self.base, Weighter):
            return self._logarithmic(values)
        return self.base.coefficients(values, measured) * self._logarithmic(values)

    def _early_coefficients(self, found: Tensor, measured: Tensor | None) -> np.ndarray:
        """The same before the rows are looked at, at the price of one more transfer to the host."""
        values, *more = rows_module.host([found] if measured is None else [found, measured])
        if not np.isfinite(values).all():
            return np.where(np.isfinite(values), 1.0, np.nan)
        return self._coefficients(values, *more)

    def _logarithmic(self, values: np.ndarray) -> np.ndarray:
        if not self.log_losses:
            return np.ones(len(values))
        self._require_positive(values, "log_losses=True takes its logarithm")
        return 1.0 / values

    def _seen(self, values: np.ndarray, coefficients: np.ndarray | None) -> np.ndarray:
        """The values of the losses as the method sees them: multiplied by a weighter inside, or their logarithms."""
        if self.log_losses:
            self._require_positive(values, "log_losses=True takes its logarithm")
            return np.log(values)
        return values if coefficients is None else coefficients * values

    def _solve_where_reached(
        self,
        rows: Table,
        gram: np.ndarray,
        seen: np.ndarray,
        coefficients: np.ndarray | None,
        unscale: np.ndarray | float,
        reaching: Sequence[bool] | None,
    ) -> np.ndarray:
        """``_solve`` without the tasks that reach none of these parameters: they take no part, and have no zero row."""
        m = len(seen)
        if reaching is None and not isinstance(rows.rows, Tensor):
            reaching = [any(g is not None for g in row) for row in rows.rows[:m]]
        keep = [i for i in range(m) if reaching is None or reaching[i]]
        if len(keep) == m or (len(rows) != m and not self.rows_repeat_tasks):
            return self._solve(rows, gram, seen, coefficients, unscale)
        weights = np.ones(m)
        if len(keep) > 1:
            tasks, measured = self._run["tasks"], self._run.get("measured")
            self._run["tasks"] = tasks.only(keep)
            self._run["measured"] = None if measured is None else measured[keep]
            every = [start + i for start in range(0, len(rows), m) for i in keep]
            try:
                part = gram[np.ix_(every, every)]
                factors = None if coefficients is None else coefficients[keep]
                weights[keep] = self._solve(rows.part(every), part, seen[keep], factors, unscale)
            finally:
                self._run["tasks"] = tasks
        return weights

    def _solve(
        self,
        rows: Table,
        gram: np.ndarray,
        seen: np.ndarray,
        coefficients: np.ndarray | None,
        unscale: np.ndarray | float = 1.0,
    ) -> np.ndarray:
        """Weights of the multiplied rows, with `normalize` and `preference` around the method.

        Args:
            rows: The raw rows, still multiplied by the loss scale.
            gram: Their inner products without it, (m, m).
            seen: Values of the losses as the method sees them, (m,).
            coefficients: What still multiplies each row, (m,). None: 1.
            unscale: Reciprocal of the loss scale.

        Returns:
            (m,).
        """
        m = len(seen)
        if self._alone and not self.observes:
            return np.ones(1)
        normalize = "none" if self._alone else self.normalize
        scaled = self.preference is not None and self.preference_scales_rows
        self._require_squares(rows)
        plain = rows.unit == 1.0 and gram_module.in_range(gram)  # as almost always
        plain = plain or gram_module.central(_lengths(rows, gram)) is None
        if coefficients is None and normalize == "none" and not scaled and plain:
            self._run.update(rows=rows, row_scales=(unscale, 0), lengths=gram)
            weights = self._settled(self.weights(gram, seen))
            self._run["rows"] = None
            return weights
        coefficients = np.ones(m) if coefficients is None else coefficients
        if not np.isfinite(coefficients).all():  # what is multiplied by them is told of later
            return np.ones(m)

        # A method may have added rows of its own behind those of the tasks, or have rows of absent tasks.
        def spread(per_task: np.ndarray) -> Scaled:
            if self.rows_repeat_tasks:
                return Scaled(np.resize(per_task, len(gram)))
            return Scaled(np.append(per_task, np.ones(max(0, len(gram) - m)))[: len(gram)])

        # Any of these, and their products, may leave float64 where what comes of them does not.
        factors = spread(coefficients)
        lengths = _lengths(rows, gram) * factors
        around = Scaled(np.ones(len(gram)))
        if normalize in ("loss", "loss+"):
            self._require_positive(seen, f'normalize="{normalize}" divides by it')
            around = around * spread(seen).inverse()
        if normalize in ("l2", "loss+"):
            around = around * lengths.inverse()
        if self.preference_scales_rows:
            around = around * spread(self.preferences())
        seen_lengths = around * lengths
        central = gram_module.central(seen_lengths)
        correction = self._correction(central, seen_lengths)
        self._require_comparable(seen_lengths)
        scales = around * factors * Scaled(1.0, central or 0)
        row_scales = (scales.fraction[:, None] * unscale, scales.exponent[:, None])
        self._run.update(rows=rows, row_scales=row_scales, lengths=seen_lengths)
        scales = scales * Scaled(rows.unit)
        scaled_gram = np.ldexp(gram * np.multiply.outer(scales.fraction, scales.fraction),
                               np.add.outer(scales.exponent, scales.exponent))  # fmt: skip
        found = correction * Scaled(self.weights(scaled_gram, seen))
        self._run["rows"] = None
        if self.weight_momentum or self._bounded:
            found = Scaled(self._settled(found.values()))
        count = len(found.fraction)
        found = found * around.first(count)
        self._require_held(found, lengths.first(count))
        return found.values()

    def _correction(self, central: int | None, lengths: Scaled) -> Scaled:
        """What brings weights of rows that were multiplied by a power of two to those of the rows themselves."""
        if central is None:
            return Scaled(1.0)
        if self.degree is None:
            known = lengths.exponent[lengths.fraction != 0] * math.log10(2)
            raise RuntimeError(
                f"{self._name}: gradients longer than 1e60 or shorter than 1e-60 are out of range, and here they are "
                f"about 1e{known.min():.0f} to 1e{known.max():.0f} long: the method compares them with those of other "
                "steps or with absolute numbers, and float64 does not hold the products. Divide the losses by a "
                "constant. Nothing was written."
            )
        rest, whole = math.modf(central * (1.0 - self.degree))
        return Scaled(2.0**rest, int(whole))

    def _require_held(self, weights: Scaled, lengths: Scaled) -> None:
        """Refuse weights that float64 rounds to zero, or nearly so, where what they multiply counts in the sum."""
        with np.errstate(invalid="ignore"):
            lost = (weights.fraction != 0) & (np.abs(weights.values()) < np.finfo(np.float64).tiny)
        if lost.any():
            terms = weights * lengths
            exponents = np.where(terms.fraction != 0, terms.exponent, -np.inf)
            if (exponents[lost] > exponents.max() - _NEGLIGIBLE).any():
                raise RuntimeError(
                    f"{self._name}: the weights of gradients this long or short are out of range: some are below "
                    "1e-308. Divide the losses by a constant. Nothing was written."
                )

    def _require_squares(self, rows: Table) -> None:
        """Refuse rows so far apart that no power of two brings the squares of all into float64."""
        if rows.far_apart and self._adds_rows:
            raise RuntimeError(
                f"{self._name}: the longest gradient is more than 1e280 times as long as the shortest one, and float64 "
                "does not hold the squares of both. Multiply the losses by constants that bring them closer together. "
                "Nothing was written."
            )

    def _require_comparable(self, lengths: Scaled) -> None:
        """The same, once all that multiplies the rows is applied."""
        exponents = lengths.exponent[lengths.fraction != 0]
        if len(exponents) and exponents.max() - exponents.min() > _FAR_APART and self._adds_rows:
            apart = (exponents.max() - exponents.min()) * math.log10(2)
            raise RuntimeError(
                f"{self._name}: with `preference`, `normalize` and the weights inside applied, the longest gradient is "
                f"about 1e{apart:.0f} times as long as the shortest one, and float64 does not hold the squares of "
                "both. Bring the losses or what multiplies them closer together. Nothing was written."
            )

    def _parts(self, shared: Sequence[Tensor]) -> dict[str, list[int]]:
        """Places of the shared parameters that have a surgery of their own, by a name that lasts."""
        if self.granularity == "all":
            return {"all": list(range(len(shared)))} if shared else {}
        if self.granularity == "parameter":
            return {f"parameter {self._run['positions'][p]}": [j] for j, p in enumerate(shared)}
        group = {p: k for k, g in enumerate(self.param_groups) for p in g["params"]}
        by_group: dict[str, list[int]] = {}
        for j, p in enumerate(shared):
            by_group.setdefault(f"group {group[p]}", []).append(j)
        return by_group

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Give one part of the parameters a memory of its own while the method looks at it."""
        if self.granularity == "all":
            yield
            return
        self._run["draft"][name] = dict(self._run["draft"].get(name, {}))
        self._run["part"] = name
        try:
            yield
        finally:
            self._run["part"] = None
