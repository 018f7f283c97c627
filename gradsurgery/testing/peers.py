"""Adapters for other libraries. Each imports its library when it is called, and says what to install if it is missing.

Nothing is mended on the way: an adapter only carries arguments and results. Where a library gives another length than
the reference, the adapter multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurgery.testing.adapters import Array, Library, import_peer


def _tensor(rows: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows))


# A torch module that maps rows to a direction.
class _Module:
    def __init__(self, build: Callable[[int], Any]) -> None:
        self.build = build
        self.module: Any = None
        self.saved: Any = None

    def __call__(self, rows: Array, losses: Array | None = None) -> Array:
        if self.module is None:
            self.module = self.build(len(rows))
            if self.saved is not None:
                self.module.load_state_dict(self.saved)
        return np.asarray(self.module(_tensor(rows)).detach().numpy())

    def state_dict(self) -> Any:
        return self.module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.saved = state


# A torch module that maps losses to one number; its derivatives are the weights.
class _Scalarizer:
    def __init__(self, build: Callable[[int], Any], after: str | None = None) -> None:
        self.build, self.after = build, after
        self.module: Any = None
        self.saved: Any = None

    def __call__(self, history: Array) -> Array:
        history = np.asarray(history, dtype=np.float64)
        if self.module is None:
            self.module = self.build(history.shape[1]).double()
            if self.saved is not None:
                self.module.load_state_dict(self.saved)
            learnt = list(self.module.parameters())
            self.optimizer = torch.optim.SGD(learnt, lr=0.1) if learnt else None
        for i, losses in enumerate(history):
            self._coefficients(losses)
            if self.optimizer is not None:
                self.optimizer.step()
            if self.after == "step":
                self.module.step()
            elif self.after == "update":
                self.module.update(torch.from_numpy(history[min(i + 1, len(history) - 1)]))
        return self._coefficients(history[-1])

    def _coefficients(self, losses: Array) -> Array:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        x = torch.tensor(losses, requires_grad=True)
        self.module(x).backward()
        assert x.grad is not None
        return x.grad.numpy()

    def state_dict(self) -> Any:
        return self.module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.saved = state


class _JacTraining:
    def __init__(self, autojac: Any, aggregator: Any, base: Optimizer) -> None:
        self.autojac, self.aggregator, self.base = autojac, aggregator, base

    def backward(self, losses: Sequence[Tensor]) -> None:
        self.autojac.backward(list(losses))
        params = [p for group in self.base.param_groups for p in group["params"] if getattr(p, "jac", None) is not None]
        self.autojac.jac_to_grad(params, self.aggregator)

    def step(self) -> None:
        self.base.step()

    @property
    def weights(self) -> Array:
        return np.array([])


def torchjd() -> Library:
    """TorchJD, with its aggregators and scalarizers.

    Returns:
        Its methods, in the lengths of the reference answers.
    """
    jd = import_peer("torchjd", "torchjd.aggregation")
    autojac = import_peer("torchjd", "torchjd.autojac")
    scalar = import_peer("torchjd", "torchjd.scalarization")

    def graddrop(leak: float = 0.0) -> _Module:
        return _Module(lambda m: jd.GradDrop(leak=torch.full((m,), leak, dtype=torch.float64) if leak else None))

    def mgda(solver: str = "exact", max_iterations: int = 100, tolerance: float = 1e-3) -> _Module:
        return _Module(lambda m: jd.MGDA(epsilon=tolerance, max_iters=max_iterations))

    def training(cls: Any) -> Callable[..., _JacTraining]:
        return lambda base: _JacTraining(autojac, cls(), base)

    def pbi(theta: float = 5.0, reference: Sequence[float] = (0.0, 0.0, 0.0)) -> _Scalarizer:
        return _Scalarizer(lambda m: scalar.PBI(theta, torch.ones(m).double(), torch.tensor(reference).double()))

    def stch(mu: float = 1.0, preference: Sequence[float] | None = None) -> _Scalarizer:
        weights = None if preference is None else torch.tensor(preference, dtype=torch.float64)
        return _Scalarizer(lambda m: scalar.STCH(mu, weights))

    return Library(
        "TorchJD",
        directions={
            "PCGrad": lambda: _Module(lambda m: jd.PCGrad()),
            "GradVac": lambda beta=0.5: _Module(lambda m: jd.GradVac(beta=beta)),
            "MGDA": mgda,
            "CAGrad": lambda c=0.4: _Module(lambda m: jd.CAGrad(c=c)),
            "IMTLG": lambda: _Module(lambda m: jd.IMTLG()),
            "NashMTL": lambda every=1: _Module(lambda m: jd.NashMTL(m, max_norm=0.0, update_weights_every=every)),
            "NashMTL, defaults": lambda: _Module(lambda m: jd.NashMTL(m)),
            "FairGrad": lambda alpha=2.0: _Module(lambda m: jd.FairGrad(alpha=alpha)),
            "AlignedMTL": lambda scale_mode="min": _Module(lambda m: jd.AlignedMTL(scale_mode=scale_mode)),
            "UPGrad": lambda: _Module(lambda m: jd.UPGrad()),
            "DualProj": lambda: _Module(lambda m: jd.DualProj()),
            "ConFIG": lambda: _Module(lambda m: jd.ConFIG()),
            "Krum": lambda n_byzantine, n_selected=1: _Module(lambda m: jd.Krum(n_byzantine, n_selected)),
            "GradDrop": graddrop,
            "PCD": lambda tau=0.02: _Module(lambda m: jd.PCD(tau=tau)),
            "ExcessMTL": lambda: _Module(lambda m: jd.ExcessMTL()),
        },
        weights={
            "DWA": lambda: _Scalarizer(lambda m: scalar.DWA(), "step"),
            "FAMO": lambda min_losses=0.0: _Scalarizer(
                lambda m: scalar.FAMO(m, min_losses=torch.full((m,), min_losses)), "update"
            ),
            "GeometricMean": lambda: _Scalarizer(lambda m: scalar.GeometricMean()),
            "Uncertainty": lambda: _Scalarizer(lambda m: scalar.UW(m)),
            "PBI": pbi,
            "STCH": stch,
        },
        trainings={"PCGrad": training(jd.PCGrad), "GradVac": training(jd.GradVac)},
    )


def conflictfree() -> Library:
    """The package of the ConFIG authors.

    Returns:
        Its gradient operators.
    """
    operators = import_peer("conflictfree", "conflictfree.grad_operator")
    models = {"min": "TrackMinimum", "max": "TrackMaximum", "mean": "TrackArithmeticAverage"}

    def config(length: str = "projection") -> Any:
        if length == "projection":
            return directions(operators.ConFIGOperator)()
        model = getattr(import_peer("conflictfree", "conflictfree.length_model"), models[length])()
        return directions(lambda: operators.ConFIGOperator(length_model=model))()

    def directions(operator: Any) -> Callable[[], Any]:
        return lambda: lambda rows, losses=None: operator().calculate_gradient(_tensor(rows)).numpy()

    return Library(
        "conflictfree",
        directions={
            "ConFIG": config,
            "PCGrad": directions(operators.PCGradOperator),
            "IMTLG": directions(operators.IMTLGOperator),
        },
    )


class _PCBackward:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def backward(self, losses: Sequence[Tensor]) -> None:
        self.optimizer.pc_backward(list(losses))

    def step(self) -> None:
        self.optimizer.step()

    @property
    def weights(self) -> Array:
        return np.array([])


def pytorch_optimizer() -> Library:
    """The collection of optimizers by kozistr, which has PCGrad among them.

    Returns:
        Its PCGrad.
    """
    module = import_peer("pytorch_optimizer", "pytorch_optimizer")

    def directions(reduction: str = "sum") -> Any:
        def direct(rows: Array, losses: Array | None = None) -> Array:
            p = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
            optimizer = module.PCGrad(torch.optim.SGD([p], lr=0.0), reduction=reduction)
            optimizer.pc_backward([g @ p for g in _tensor(rows)])
            assert p.grad is not None
            return p.grad.numpy()

        return direct

    def training(base: Optimizer, reduction: str = "sum") -> _PCBackward:
        return _PCBackward(module.PCGrad(base, reduction=reduction))

    return Library("pytorch_optimizer", directions={"PCGrad": directions}, trainings={"PCGrad": training})


def softadapt() -> Library:
    """The package of the SoftAdapt authors, on the torch backend of Keras.

    Returns:
        Its three variants.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    module = import_peer("softadapt", "softadapt")

    def weights(name: str) -> Callable[..., Any]:
        def make(beta: float = 0.1, accuracy_order: int | None = None) -> Any:
            rule = getattr(module, name)(beta=beta, accuracy_order=accuracy_order)

            def weigh(history: Array) -> Array:
                found = rule.get_component_weights(*_tensor(np.asarray(history)).T, verbose=False)
                return np.asarray(found.detach().cpu().numpy(), dtype=np.float64)

            return weigh

        return make

    return Library(
        "softadapt",
        weights={
            "SoftAdapt": weights("SoftAdapt"),
            "NormalizedSoftAdapt": weights("NormalizedSoftAdapt"),
            "LossWeightedSoftAdapt": weights("LossWeightedSoftAdapt"),
        },
    )


class _GradNorm:
    def __init__(self, weighter: Any, base: Optimizer) -> None:
        self.weighter, self.base = weighter, base

    def backward(self, losses: Sequence[Tensor]) -> float | None:
        total = self.weighter.backward(list(losses))
        return None if total is None else float(total)

    def step(self) -> None:
        self.base.step()

    @property
    def weights(self) -> Array:
        return np.asarray(self.weighter.loss_weights.detach().numpy().copy())


def gradnorm_pytorch() -> Library:
    """The GradNorm package of lucidrains.

    Returns:
        Its loss weighter, for two losses.
    """
    module = import_peer("gradnorm-pytorch", "gradnorm_pytorch")

    def training(base: Optimizer, shared_params: nn.Parameter, alpha: float = 1.5, lr: float = 0.025) -> _GradNorm:
        weighter = module.GradNormLossWeighter(
            num_losses=2, learning_rate=lr, restoring_force_alpha=alpha, grad_norm_parameters=shared_params
        )
        return _GradNorm(weighter, base)

    return Library("gradnorm-pytorch", trainings={"GradNorm": training})


#: Other libraries by the name of their package. Calling an entry imports the library.
PEERS: dict[str, Callable[[], Library]] = {
    "torchjd": torchjd,
    "conflictfree": conflictfree,
    "pytorch_optimizer": pytorch_optimizer,
    "softadapt": softadapt,
    "gradnorm-pytorch": gradnorm_pytorch,
}
