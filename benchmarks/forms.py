"""Losses as people write them: joined in one tensor, filled, compiled; and what each library makes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery.testing.adapters import import_peer

STEPS = 200
#: Relative error up to which float64 gradients count as right.
RIGHT = 1e-9
RATE = 0.01
SEED = 1
PRECISIONS = {"errors": torch.float64, "float32": torch.float32}
#: Methods that are trained with the heads in the surgery and without.
TRAINED = ("PCGrad", "MGDA", "UPGrad", "CAGrad")
SAID = {"error": "**refuses**", "no features": "no features"}

SECTION = """## Code as people write it

In most training code the losses do not come from separate tensors. They are stacked, multiplied by weights or written
into one tensor; or the model returns all outputs in one tensor, or is compiled. Autograd then gives every loss a
gradient in every head, full of zeros.

Each form below is a way in which public training code produces its losses (weighted stacks in DeepXDE, a filled tensor
in LibMTL, columns in torch-rechub, experts in Mixtral), or something that torch itself inserts. This library was
changed until it got all of them right, so its column says no more than that; do not add up columns. In the first row
nothing is joined: a library that is off there defines the method differently rather than misreading the code.

The right answer is PCGrad on the parameters that both losses reach in this batch, and the plain gradient on those that
one loss reaches, computed from separate losses in float64; an answer counts as right to within {right:.0e}. PCGrad with
two losses was chosen because all of these libraries have it and it has only one answer.

* right, … declared: right, but the caller has to list the shared parameters or pass the features, the tensor between
  trunk and heads
* off: relative error of the gradients of that part of the model
* no features: a compiled model gives no access to the tensor between trunk and heads
* refuses: an error, listed below

{table}

The settings; each other library is run with its defaults and with the best setting that was found:

{settings}

A library that is told where the trunk ends, or which parameters are shared, is right whenever one such declaration
holds for every batch. With experts none does: whether two losses share an expert depends on how the samples were
routed.

The errors:

{raised}

**How much it matters.** In float32 the right answers are off by at most {single}, which is rounding. If heads take part
in the surgery, their gradients change the weights, and the weights then scale their gradients. The table has the
relative error of the gradients at the first step, and both losses after {steps} steps of Adam with a learning rate of
{rate}, in float32, on the small model of the table above.

{trained}

This is one problem with one seed, no more than an example. A wrong direction shows in the gradients at once; the final
losses need not be worse. A method that gives one loss a weight near 0 suffers most, because the head of that loss then
stops learning.
"""


class Net(nn.Module):
    """A trunk and two heads; in one form a mixture of experts lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh())
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2))

    def outputs(self, z: Tensor) -> list[Tensor]:
        return [head(z) for head in self.heads]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.outputs(self.trunk(x)), dim=1)

    @property
    def shared(self) -> list[nn.Parameter]:
        """What the author of such a model would call shared."""
        return [*self.trunk.parameters(), *self.experts.parameters()]

    @property
    def private(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())


class Batch(NamedTuple):
    x: Tensor
    targets: Tensor


class Losses(NamedTuple):
    """What a training script has when it comes to the backward pass: two losses, and the features if there are any."""

    losses: Sequence[Tensor] | Tensor
    features: Tensor | None


class Twice(torch.autograd.Function):
    """A function in Python on all losses at once: torch knows nothing of what it does."""

    @staticmethod
    def forward(ctx: Any, *losses: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * one for one in losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * g for g in gradients)


def problem(dtype: torch.dtype) -> tuple[Net, Batch]:
    """A model, and noisy data whose two losses are in conflict at the first step."""
    torch.manual_seed(SEED)
    net = Net().to(dtype)
    x = torch.randn(32, 6, dtype=dtype)
    first = (2 * x[:, :1] - x[:, 1:2]).sin()
    targets = torch.cat([first, 3 * (x[:, 2:3] * x[:, :1] - first)], dim=1)
    return net, Batch(x, targets + 0.3 * torch.randn(32, 2, dtype=dtype))


def columns(out: Tensor, batch: Batch) -> list[Tensor]:
    return [(out[:, i] - batch.targets[:, i]).square().mean() for i in range(2)]


def apart(ys: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    return [(y - batch.targets[:, i : i + 1]).square().mean() for i, y in enumerate(ys)]


# ------------------------------------------------------------------------------------------------------ the forms


def _on_losses(join: Callable[[list[Tensor]], Any]) -> Callable[[Net, Batch], Losses]:
    def form(net: Net, batch: Batch) -> Losses:
        z = net.trunk(batch.x)
        return Losses(join(apart(net.outputs(z), batch)), z)

    return form


def _on_outputs(join: Callable[[list[Tensor], Batch], Any]) -> Callable[[Net, Batch], Losses]:
    def form(net: Net, batch: Batch) -> Losses:
        z = net.trunk(batch.x)
        return Losses(join(net.outputs(z), batch), z)

    return form


def _filled(losses: list[Tensor]) -> Tensor:
    found = torch.zeros(len(losses), dtype=losses[0].dtype)
    for i, loss in enumerate(losses):
        found[i] = loss
    return found


def _by_batch(ys: list[Tensor], batch: Batch) -> Tensor:
    return (torch.cat(ys, dim=1) - batch.targets).square().mean(0)


def _checkpointed(ys: list[Tensor], batch: Batch) -> list[Tensor]:
    return columns(checkpoint(lambda *all_of_them: torch.cat(all_of_them, 1), *ys, use_reentrant=False), batch)


def _compiled(net: Net, batch: Batch) -> Losses:
    if "compiled" not in net.__dict__:
        net.__dict__["compiled"] = torch.compile(net, backend="aot_eager")  # no submodule of itself
    return Losses(columns(net.__dict__["compiled"](batch.x), batch), None)


def _route(batch: Batch) -> Tensor:
    """The expert of each sample: two take turns, and the last sample has the third for itself."""
    to = torch.arange(len(batch.x)) % 2
    to[-1] = 2
    return to


def _by_sample(outs: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    half = len(batch.x) // 2
    return [
        (outs[0][:half] - batch.targets[:half, :1]).square().mean(),
        (outs[1][half:] - batch.targets[half:, 1:]).square().mean(),
    ]


def _routed(net: Net, batch: Batch) -> Losses:
    z, to = net.trunk(batch.x), _route(batch)
    mixed = torch.zeros_like(z)
    for k, expert in enumerate(net.experts):
        mixed[to == k] = expert(z[to == k]).tanh()
    half = len(z) // 2
    return Losses(_by_sample([net.heads[0](mixed[:half]), net.heads[1](mixed)], batch), z)


def _routed_apart(net: Net, batch: Batch) -> list[Tensor]:
    """The same two losses, sample by sample, so that nothing joins them."""
    to, half, terms = _route(batch), len(batch.x) // 2, []
    for k, one in enumerate(batch.x):
        i = int(k >= half)
        mixed = net.experts[int(to[k])](net.trunk(one[None])).tanh()
        terms.append((net.heads[i](mixed) - batch.targets[k, i]).square().sum() / half)
    return [torch.stack(terms[:half]).sum(), torch.stack(terms[half:]).sum()]


class Form(NamedTuple):
    """One way to write it.

    Attributes:
        name: What it is.
        code: How it reads.
        losses: The losses of a model on a batch.
        factor: What the losses are multiplied by on the way.
        apart: The same losses from tensors of their own; those of the two heads by default.
    """

    name: str
    code: str
    losses: Callable[[Net, Batch], Losses]
    factor: float = 1.0
    apart: Callable[[Net, Batch], list[Tensor]] | None = None


FORMS = (
    Form("one by one", "`[loss_a, loss_b]`", _on_losses(list)),
    Form("stacked, unbound", "`torch.stack(losses).unbind()`", _on_losses(lambda found: torch.stack(found).unbind())),
    Form(
        "stacked, times weights",
        "`torch.stack(losses) * weights`",
        _on_losses(lambda found: torch.stack(found) * torch.full((2,), 2.0, dtype=found[0].dtype)),
        2.0,
    ),
    Form("filled tensor", "`losses[i] = …`", _on_losses(_filled)),
    Form(
        "columns of `cat`",
        "`out = torch.cat(ys, 1)`, losses of `out[:, i]`",
        _on_outputs(lambda ys, batch: columns(torch.cat(ys, 1), batch)),
    ),
    Form("mean over the batch", "`(out - targets).square().mean(0)`", _on_outputs(_by_batch)),
    Form("checkpointed `cat`", "`checkpoint(cat, *ys)`, losses of columns", _on_outputs(_checkpointed)),
    Form("compiled model", '`torch.compile(model, backend="aot_eager")` returns `cat`', _compiled),
    Form("Python function", "`Function.apply(*losses)`", _on_losses(lambda found: Twice.apply(*found)), 2.0),
    Form("expert of one sample", "`mixed[to == k] = expert(z[to == k])`", _routed, 1.0, _routed_apart),
)


# ------------------------------------------------------------------------------------------------- who is asked

Backward = Callable[[Losses], object]


class Contender(NamedTuple):
    """A way to come from losses to `.grad`.

    Attributes:
        name: The heading of its column.
        setting: How it is called.
        build: Makes it for a model.
        declares: What it is told: the shared "parameters", the "features", or nothing.
    """

    name: str
    setting: str
    build: Callable[[Net], Backward]
    declares: str = ""


def _zero(net: Net) -> None:
    for p in net.parameters():
        p.grad = None


def _rest(net: Net, given: Losses) -> None:
    """The plain gradients of the heads."""
    torch.autograd.backward(list(given.losses), inputs=net.private)


def project(rows: Sequence[Tensor]) -> Tensor:
    """PCGrad for two gradients."""
    a, b = rows
    product = torch.dot(a, b).clamp(max=0.0)
    return a - product / b.dot(b) * b + b - product / a.dot(a) * a


def write(params: Sequence[Tensor], direction: Tensor) -> None:
    at = 0
    for p in params:
        p.grad = direction[at : at + p.numel()].view_as(p).clone()
        at += p.numel()


def ours(net: Net) -> Backward:
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.0))
    return lambda given: optimizer.backward(given.losses)


def loop(net: Net) -> Backward:
    """A training loop as in LibMTL: one gradient per loss in what was declared shared, and the heads' own beside it."""

    def run(given: Losses) -> None:
        rows = []
        for loss in given.losses:
            found = torch.autograd.grad(loss, net.shared, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        _rest(net, given)
        write(net.shared, project(rows))

    return run


def _torchjd() -> list[Contender]:
    autojac: Any = import_peer("torchjd", "torchjd.autojac")
    pcgrad: Any = import_peer("torchjd", "torchjd.aggregation").PCGrad()

    def reached(params: Sequence[Tensor]) -> list[Tensor]:
        return [p for p in params if getattr(p, "jac", None) is not None]

    def mtl(**options: bool) -> Callable[[Net], Backward]:
        def build(net: Net) -> Backward:
            def run(given: Losses) -> None:
                autojac.mtl_backward(list(given.losses), features=given.features, **options)
                autojac.jac_to_grad(reached(net.shared), pcgrad)

            return run

        return build

    def backward(net: Net) -> Backward:
        def run(given: Losses) -> None:
            autojac.backward(given.losses if isinstance(given.losses, Tensor) else list(given.losses))
            autojac.jac_to_grad(reached(list(net.parameters())), pcgrad)

        return run

    def backward_declared(net: Net) -> Backward:
        def run(given: Losses) -> None:
            autojac.backward(list(given.losses), inputs=net.shared, retain_graph=True, parallel_chunk_size=1)
            _rest(net, given)
            autojac.jac_to_grad(reached(net.shared), pcgrad)

        return run

    return [
        Contender("TorchJD `mtl_backward`", "`features=z`, the rest by default", mtl(), "features"),
        Contender(
            "`mtl_backward`, graph kept",
            "`features=z`, `retain_graph=True`; listing the parameters as well changes nothing",
            mtl(retain_graph=True),
            "features",
        ),
        Contender("TorchJD `backward`", "over all parameters, by default", backward),
        Contender(
            "`backward`, declared",
            "`inputs=` trunk and experts, `parallel_chunk_size=1`; the heads by `torch.autograd.backward`",
            backward_declared,
            "parameters",
        ),
    ]


def _pytorch_optimizer() -> list[Contender]:
    module: Any = import_peer("pytorch_optimizer", "pytorch_optimizer")

    def over_all(net: Net) -> Backward:
        optimizer = module.PCGrad(torch.optim.SGD(net.parameters(), lr=0.0), reduction="sum")
        return lambda given: optimizer.pc_backward(given.losses)

    def declared(net: Net) -> Backward:
        optimizer = module.PCGrad(torch.optim.SGD(net.shared, lr=0.0), reduction="sum")

        def run(given: Losses) -> None:
            optimizer.pc_backward(given.losses)
            for p in net.private:
                p.grad = None
            _rest(net, given)

        return run

    return [
        Contender("classic PCGrad", 'over all parameters, `reduction="sum"`', over_all),
        Contender(
            "classic PCGrad, declared",
            'over trunk and experts, `reduction="sum"`; the heads by `torch.autograd.backward`',
            declared,
            "parameters",
        ),
    ]


def contenders() -> list[Contender]:
    """This library, and those that are installed."""
    found = [Contender("gradsurgery", "nothing declared", ours)]
    for peer in (
        _torchjd,
        lambda: [Contender("LibMTL-style loop", "trunk and experts declared", loop, "parameters")],
        _pytorch_optimizer,
    ):
        try:
            found += peer()
        except RuntimeError as error:
            print(f"left out: {error}")
    return found


# ------------------------------------------------------------------------------------------------------- the truth


def reference(form: Form, net: Net, batch: Batch, method: Callable[[Sequence[Tensor]], Tensor] = project) -> None:
    """Write what is right: the method on what both losses reach, the plain gradient of the rest, from losses apart."""
    losses = form.apart(net, batch) if form.apart else apart(net.outputs(net.trunk(batch.x)), batch)
    params = list(net.parameters())
    rows = [torch.autograd.grad(form.factor * one, params, retain_graph=True, allow_unused=True) for one in losses]
    both = [k for k in range(len(params)) if all(row[k] is not None for row in rows)]
    for k, p in enumerate(params):
        p.grad = next((row[k] for row in rows if row[k] is not None), None)
    flat = [torch.cat([row[k].flatten() for k in both]) for row in rows]  # type: ignore[union-attr]
    write([params[k] for k in both], method(flat))


def gradients(net: Net) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def _length(found: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in found))


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors, of what two losses share (and experts) and of what belongs to one head."""
    result = {}
    for part in ("trunk", "experts", "heads"):
        names = [name for name in wanted if name.startswith(part)]
        scale = _length([wanted[name] for name in names])
        difference = _length([found[name] - wanted[name] for name in names])
        result[part] = difference / scale if scale else difference
    return result


class NotOffered(Exception):
    """The form has no features to hand over."""


def ask(contender: Contender, form: Form) -> dict[str, Any]:
    """What one contender makes of one form at the first step.

    Args:
        contender: Who is asked.
        form: What is asked.

    Returns:
        "outcome", with "errors" by part in float64 and "float32" in that precision if there is an answer; "detail"
        says what was raised.
    """
    try:
        found = {key: _first_step(contender, form, dtype) for key, dtype in PRECISIONS.items()}
    except NotOffered:
        return {"outcome": "no features"}
    except Exception as error:  # whatever another library may raise
        return {"outcome": "error", "detail": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    right = max(found["errors"].values()) < RIGHT
    return {"outcome": "right" if right else "off", "declares": contender.declares, **found}


def _first_step(contender: Contender, form: Form, dtype: torch.dtype) -> dict[str, float]:
    torch.compiler.reset()
    net, batch = problem(dtype)
    right = copy.deepcopy(net).double()
    reference(form, right, Batch(*(part.double() for part in batch)))
    backward, given = contender.build(net), form.losses(net, batch)
    if contender.declares == "features" and given.features is None:
        raise NotOffered
    backward(given)
    return errors({name: g.double() for name, g in gradients(net).items()}, gradients(right))


# ---------------------------------------------------------------------------------------- how much it matters


def whole(net: Net, batch: Batch, method: Callable[[Sequence[Tensor]], Tensor]) -> None:
    """Write what follows where zeros count as reached: the method acts on heads too."""
    params = [*net.trunk.parameters(), *net.private]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True, materialize_grads=True)])
        for one in apart(net.outputs(net.trunk(batch.x)), batch)
    ]
    write(params, method(rows))


def directed(method: str) -> Callable[[Sequence[Tensor]], Tensor]:
    """A method on gradients, at its default."""

    def direct(rows: Sequence[Tensor]) -> Tensor:
        p = nn.Parameter(torch.zeros_like(rows[0]))
        getattr(gradsurgery, method)(torch.optim.SGD([p], lr=0.0)).backward([g @ p for g in rows])
        assert p.grad is not None
        return p.grad

    return direct


def training(method: str, heads_too: bool) -> dict[str, Any]:
    """Train in float32 on the form with one head a loss.

    Args:
        method: Which surgery.
        heads_too: Whether zeros count as reached, so that the surgery acts on the heads.

    Returns:
        The relative "errors" of the gradients at the first step, and the two "losses" after training.
    """
    form, (net, batch) = FORMS[0], problem(torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    first: dict[str, float] = {}
    for _ in range(STEPS):
        _zero(net)
        reference(form, net, batch, directed(method))
        if heads_too:
            right = gradients(net)
            whole(net, batch, directed(method))
            first = first or errors(gradients(net), right)
        optimizer.step()
    with torch.no_grad():
        return {"errors": first, "losses": [float(one) for one in apart(net.outputs(net.trunk(batch.x)), batch)]}


# ------------------------------------------------------------------------------------------------------ the page


def ask_all() -> dict[str, Any]:
    """Everything that the section says, as numbers."""
    asked = contenders()
    return {
        "settings": [{"name": one.name, "setting": one.setting} for one in asked],
        "forms": [
            {"name": form.name, "code": form.code, "answers": {one.name: ask(one, form) for one in asked}}
            for form in FORMS
        ],
        "training": {
            method: {"shared": training(method, False), "heads too": training(method, True)} for method in TRAINED
        },
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def cell(answer: dict[str, Any]) -> str:
    """An answer in few words."""
    if answer["outcome"] == "right":
        return f"right, {answer['declares']} declared" if answer["declares"] else "right"
    if answer["outcome"] != "off":
        return SAID[answer["outcome"]]
    wrong = {part: error for part, error in answer["errors"].items() if error >= RIGHT}
    return "**off**: " + ", ".join(f"{part} {_percent(error)}" for part, error in wrong.items())


def section(found: dict[str, Any]) -> str:
    """The section "Code as people write it" in Markdown.

    Args:
        found: What :func:`ask_all` gives.

    Returns:
        Its text.
    """
    names = [one["name"] for one in found["settings"]]
    lines = ["| losses | as written | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    raised = []
    for form in found["forms"]:
        cells = [cell(form["answers"][name]) for name in names]
        lines.append("| " + " | ".join([form["name"], form["code"], *cells]) + " |")
        for name in names:
            if "detail" in form["answers"][name]:
                raised.append((name, form["answers"][name]["detail"].split(". ")[0], f'"{form["name"]}"'))
    messages: dict[tuple[str, str], list[str]] = {}
    for name, detail, form_name in raised:
        messages.setdefault((name, detail), []).append(form_name)
    singles = [
        max(answer["float32"].values())
        for form in found["forms"]
        for answer in form["answers"].values()
        if answer["outcome"] == "right"
    ]
    trained = [
        "| method | trunk | heads | losses, heads plain | losses, heads in the surgery |",
        "| --- |" + " --- |" * 4,
    ]
    for method, both in found["training"].items():
        off = both["heads too"]["errors"]
        ends = [" and ".join(f"{loss:.3f}" for loss in both[key]["losses"]) for key in ("shared", "heads too")]
        trained.append(f"| {method} | {_percent(off['trunk'])} | {_percent(off['heads'])} | {ends[0]} | {ends[1]} |")
    return SECTION.format(
        right=RIGHT,
        table="\n".join(lines),
        settings="\n".join(f"* {one['name']}: {one['setting']}" for one in found["settings"]),
        raised="\n".join(f"* {name}, {', '.join(forms)}: {detail}" for (name, detail), forms in messages.items())
        or "* nothing",
        single=f"{max(singles):.0e}",
        trained="\n".join(trained),
        steps=STEPS,
        rate=RATE,
    )
