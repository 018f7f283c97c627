"""Training code of others in its own form: no wrapper, no declaration, and `.grad` as from losses never joined.

Each client builds its losses twice from the same parameters: as its authors write it, with what it joins, and apart,
one loss after the other from tensors of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery

BUILDS = (gradsurgery.MGDA, gradsurgery.UPGrad, gradsurgery.UncertaintyWeighter)
Losses = dict[str, Tensor] | Sequence[Tensor] | Tensor


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(params: Iterable[Tensor], own: Callable[[int], Losses], apart: Callable[[int], Losses]) -> None:
    """Assert that both forms give the same `.grad` and the same weights, over some steps of each method."""
    params = list(params)
    start = [p.detach().clone() for p in params]
    for build in BUILDS:
        runs = []
        for form in (own, apart):
            with torch.no_grad():
                for p, before in zip(params, start, strict=True):
                    p.copy_(before)
            optimizer = build(torch.optim.SGD(params, lr=1e-3))
            told = []
            for step in range(3):
                optimizer.zero_grad()
                report = optimizer.backward(form(step))
                weights = None if report.weights is None else list(report.weights.values())
                told.append(([None if p.grad is None else p.grad.clone() for p in params], weights))
                optimizer.step()
            runs.append(told)
        for (found, its), (wanted, their) in zip(*runs, strict=True):
            assert its == (their if their is None else pytest.approx(their, rel=1e-9))
            for a, b in zip(found, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def draws(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


# ------------------------------------------------------------------ DeepXDE: stacked losses, in-place loss weights


class Heat:
    """u_t = C u_xx with an unknown C, one network a field; losses of the equation, its border and a measurement."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.flux = mlp(2, 8, 1), mlp(2, 6, 1)
        self.c = torch.tensor(2.0, requires_grad=True)  # an external trainable variable
        self.loss_weights = [1.0, 10.0, 100.0]
        self.parameters = [*self.net.parameters(), *self.flux.parameters(), self.c]

    def residuals(self, step: int) -> list[Tensor]:
        x = torch.rand(12, 2, generator=draws(step)).requires_grad_()
        u, q = self.net(x), self.flux(x)
        first = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
        second = torch.autograd.grad(first[:, :1], x, torch.ones_like(u), create_graph=True)[0]
        border = torch.rand(6, 2, generator=draws(step + 100))
        return [first[:, 1:] - self.c * second[:, :1] + q, self.net(border), self.net(x[:4]) - x[:4, :1].detach().sin()]

    def own(self, step: int) -> Tensor:
        losses = torch.stack([F.mse_loss(error, torch.zeros_like(error)) for error in self.residuals(step)])
        losses *= torch.as_tensor(self.loss_weights)
        return losses

    def apart(self, step: int) -> list[Tensor]:
        return [w * error.square().mean() for w, error in zip(self.loss_weights, self.residuals(step), strict=True)]


def test_deepxde_stacks_its_losses_and_weights_them_in_place():
    client = Heat()
    check(client.parameters, client.own, client.apart)


@pytest.mark.parametrize("build", BUILDS[:2])
def test_the_unknown_of_an_inverse_problem_gets_its_plain_gradient(build):
    client = Heat()
    (wanted,) = torch.autograd.grad(client.apart(0)[0], [client.c])
    private = [torch.autograd.grad(client.apart(0)[0], p)[0] for p in client.flux.parameters()]
    report = build(torch.optim.Adam(client.parameters)).backward(client.own(0), names=("pde", "border", "data"))
    assert report.names == ("pde", "border", "data")
    torch.testing.assert_close(client.c.grad, wanted, rtol=1e-12, atol=0)
    for p, g in zip(client.flux.parameters(), private, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_deepxde_steps_with_a_closure():
    """Its training step hands the optimizer a closure, also where the optimizer calls it once."""
    moved = []
    for form in ("own", "apart"):
        client = Heat()
        optimizer = gradsurgery.UPGrad(torch.optim.Adam(client.parameters, lr=1e-2))

        def closure(client=client, form=form, optimizer=optimizer) -> Tensor:
            losses = getattr(client, form)(0)
            optimizer.zero_grad()
            optimizer.backward(losses)
            return sum(losses).detach()

        for _ in range(3):
            optimizer.step(closure)
        moved.append([p.detach().clone() for p in client.parameters])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------- LibMTL: a tensor that is filled


class Trainer:
    """An encoder and a decoder a task, by name; the losses of a batch are written into one tensor."""

    task_name = ("segmentation", "depth", "normal")

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.task_num = len(self.task_name)
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.decoders = nn.ModuleDict(
            {task: nn.Conv2d(6, c, 1) for task, c in zip(self.task_name, (4, 1, 3), strict=True)}
        )
        self.parameters = [*self.encoder.parameters(), *self.decoders.parameters()]

    def one(self, task: str, prediction: Tensor, image: Tensor) -> Tensor:
        if task == "segmentation":
            return F.cross_entropy(prediction, image.argmax(1))
        if task == "depth":
            return F.l1_loss(prediction, image.sum(1, keepdim=True))
        return 1 - F.cosine_similarity(prediction, image, dim=1).mean()

    def apart(self, step: int) -> list[Tensor]:
        image = torch.randn(4, 3, 8, 8, generator=draws(step))
        s = self.encoder(image)
        return [self.one(task, self.decoders[task](s), image) for task in self.task_name]

    def own(self, step: int) -> Tensor:
        image = torch.randn(4, 3, 8, 8, generator=draws(step))
        s = self.encoder(image)
        predictions = {task: self.decoders[task](s) for task in self.task_name}
        train_losses = torch.zeros(self.task_num)
        for i, task in enumerate(self.task_name):
            train_losses[i] = self.one(task, predictions[task], image)
        return train_losses


def test_libmtl_fills_a_tensor_of_losses():
    client = Trainer()
    check(client.parameters, client.own, client.apart)


# ----------------------------------------------------- torch-rechub: models that return torch.cat(ys, dim=1)


class Recommender(nn.Module):
    """Two embedded fields and two numbers, and a tower a task: the inputs are joined, and so are the outputs."""

    def __init__(self, n_task: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fields = nn.ModuleList(nn.Embedding(5, 3) for _ in range(2))
        self.towers = nn.ModuleList(mlp(width, 4, 1) for _ in range(n_task))

    def embed(self, step: int) -> Tensor:
        fields = torch.randint(5, (10, 2), generator=draws(step))
        dense = torch.randn(10, 2, generator=draws(step))
        return torch.cat([*(e(fields[:, k]) for k, e in enumerate(self.fields)), dense], dim=1)

    def predictions(self, step: int) -> list[Tensor]:
        """The predictions, one (B, 1) tensor per task."""
        raise NotImplementedError

    def forward(self, step: int) -> Tensor:
        return torch.cat(self.predictions(step), dim=1)


class SharedBottom(Recommender):
    def __init__(self) -> None:
        super().__init__(3, 6)
        self.bottom = mlp(8, 6, 6)

    def predictions(self, step: int) -> list[Tensor]:
        z = self.bottom(self.embed(step))
        return [torch.sigmoid(tower(z)) for tower in self.towers]


class MMOE(Recommender):
    """Every task mixes the experts with a gate of its own."""

    def __init__(self) -> None:
        super().__init__(3, 6)
        self.experts = nn.ModuleList(mlp(8, 6) for _ in range(4))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Softmax(dim=-1)) for _ in range(3))

    def predictions(self, step: int) -> list[Tensor]:
        x = self.embed(step)
        experts = torch.cat([expert(x).unsqueeze(1) for expert in self.experts], dim=1)
        return [
            torch.sigmoid(tower((gate(x).unsqueeze(-1) * experts).sum(dim=1)))
            for gate, tower in zip(self.gates, self.towers, strict=True)
        ]


class PLE(Recommender):
    """Experts that all tasks use beside those of one task, as joined inputs of each gate."""

    def __init__(self) -> None:
        super().__init__(2, 6)
        self.common = mlp(8, 6)
        self.special = nn.ModuleList(mlp(8, 6) for _ in range(2))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(8, 2), nn.Softmax(dim=-1)) for _ in range(2))

    def predictions(self, step: int) -> list[Tensor]:
        x = self.embed(step)
        common = self.common(x)
        return [
            torch.sigmoid(tower(torch.bmm(gate(x).unsqueeze(1), torch.stack([special(x), common], dim=1)).squeeze(1)))
            for gate, special, tower in zip(self.gates, self.special, self.towers, strict=True)
        ]


def clicks(step: int, n_task: int) -> Tensor:
    return torch.randint(2, (10, n_task), generator=draws(step + 50)).double()


@pytest.mark.parametrize("build", [SharedBottom, MMOE, PLE])
def test_rechub_losses_are_columns_of_what_the_model_returns(build):
    model, loss_fns = build(), [nn.BCELoss(), nn.BCELoss(), nn.MSELoss()]
    n_task = len(model.towers)

    def own(step: int) -> list[Tensor]:
        y_preds, ys = model(step), clicks(step, n_task)
        return [loss_fns[i](y_preds[:, i], ys[:, i].double()) for i in range(n_task)]

    def apart(step: int) -> list[Tensor]:
        ys = clicks(step, n_task)
        return [loss_fns[i](y.squeeze(1), ys[:, i]) for i, y in enumerate(model.predictions(step))]

    check(model.parameters(), own, apart)
    report = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1)).backward(own(0))
    assert "nothing-shared" not in report.flags


class ESMM(Recommender):
    """The chance of a purchase is that of a click times that of a purchase after it."""

    def __init__(self) -> None:
        super().__init__(2, 8)

    def predictions(self, step: int) -> list[Tensor]:
        x = self.embed(step)
        return [torch.sigmoid(tower(x)) for tower in self.towers]

    def forward(self, step: int) -> Tensor:
        cvr, ctr = self.predictions(step)
        ctcvr = torch.mul(ctr, cvr)
        return torch.cat([cvr, ctr, ctcvr], dim=1)


def test_esmm_has_no_loss_on_its_first_column():
    model = ESMM()

    def own(step: int) -> list[Tensor]:
        y_preds, ys = model(step), clicks(step, 3)
        loss_list = [F.binary_cross_entropy(y_preds[:, i], ys[:, i]) for i in range(3)]
        return loss_list[1:]

    def apart(step: int) -> list[Tensor]:
        (cvr, ctr), ys = model.predictions(step), clicks(step, 3)
        losses = F.binary_cross_entropy(ctr[:, 0], ys[:, 1]), F.binary_cross_entropy((ctr * cvr)[:, 0], ys[:, 2])
        return list(losses)

    check(model.parameters(), own, apart)
    model.zero_grad()
    gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1)).backward(own(0))
    purchase = torch.autograd.grad(apart(0)[1], list(model.towers[0].parameters()))  # private: the click does not ask
    for p, g in zip(model.towers[0].parameters(), purchase, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_esmm_multiplies_columns_of_one_tensor():
    model = ESMM()

    def own(step: int) -> dict[str, Tensor]:
        out, ys = torch.cat(model.predictions(step), dim=1), clicks(step, 3)
        p_ctr, p_cvr = out[:, 1], out[:, 0]
        p_ctcvr = p_ctr * p_cvr
        return {"click": F.binary_cross_entropy(p_ctr, ys[:, 1]), "buy": F.binary_cross_entropy(p_ctcvr, ys[:, 2])}

    def apart(step: int) -> list[Tensor]:
        (cvr, ctr), ys = model.predictions(step), clicks(step, 3)
        losses = F.binary_cross_entropy(ctr[:, 0], ys[:, 1]), F.binary_cross_entropy((ctr * cvr)[:, 0], ys[:, 2])
        return list(losses)

    check(model.parameters(), own, apart)


# ------------------------------------------------------------------------------------ detectors: a dict of losses


class Detector(nn.Module):
    """Queries that pass some layers; the same two heads judge the answers of all layers, stacked in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Linear(5, 6)
        self.layers = nn.ModuleList(mlp(6, 6, 6) for _ in range(3))
        self.class_embed, self.bbox_embed = nn.Linear(6, 4), mlp(6, 6, 4)

    def hidden(self, step: int) -> list[Tensor]:
        h = self.backbone(torch.randn(2, 7, 5, generator=draws(step))).tanh()
        return [h := h + layer(h) for layer in self.layers]

    def judge(self, logits: Tensor, boxes: Tensor, step: int, suffix: str = "") -> dict[str, Tensor]:
        labels = torch.randint(4, (2, 7), generator=draws(step + 7))
        targets = torch.rand(2, 7, 4, generator=draws(step + 9))
        return {
            f"loss_ce{suffix}": F.cross_entropy(logits.transpose(1, 2), labels),
            f"cardinality_error{suffix}": (logits.argmax(-1) != labels).double().sum(1).mean().detach(),
            f"loss_bbox{suffix}": F.l1_loss(boxes, targets, reduction="none").sum() / 14,
        }

    def loss_dict(self, step: int) -> dict[str, Tensor]:
        hs = torch.stack(self.hidden(step))
        outputs_class, outputs_coord = self.class_embed(hs), self.bbox_embed(hs).sigmoid()
        found = self.judge(outputs_class[-1], outputs_coord[-1], step)
        for i, (a, b) in enumerate(zip(outputs_class[:-1], outputs_coord[:-1], strict=True)):
            found.update(self.judge(a, b, step, f"_{i}"))
        return found

    def apart(self, step: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, h in zip(("_0", "_1", ""), self.hidden(step), strict=True):
            found = {**self.judge(self.class_embed(h), self.bbox_embed(h).sigmoid(), step, i), **found}
        return found


WEIGHT_DICT = {"loss_ce": 1.0, "loss_bbox": 5.0}
WEIGHT_DICT.update({f"{k}_{i}": v for i in range(2) for k, v in WEIGHT_DICT.items()})


def test_a_detector_with_auxiliary_layers():
    """Losses of early layers do not reach late ones, whose answers stand in the same tensor."""
    model = Detector()

    def weighted(loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: loss_dict[k] * v for k, v in WEIGHT_DICT.items() if k in loss_dict}

    check(model.parameters(), lambda step: weighted(model.loss_dict(step)), lambda step: weighted(model.apart(step)))


def test_a_detector_sums_its_layers_by_kind():
    model = Detector()

    def by_kind(loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            kind: sum(value for key, value in sorted(loss_dict.items()) if key.startswith(kind))
            for kind in ("loss_ce", "loss_bbox")
        }

    check(model.parameters(), lambda step: by_kind(model.loss_dict(step)), lambda step: by_kind(model.apart(step)))


def test_the_last_layer_of_a_detector_belongs_to_its_own_loss():
    model = Detector()

    def by_layer(loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        last = sum(loss_dict[k] * WEIGHT_DICT[k] for k in ("loss_ce", "loss_bbox"))
        early = sum(loss_dict[k] * v for k, v in WEIGHT_DICT.items() if k[-1].isdigit())
        return {"last": last, "auxiliary": early}

    check(model.parameters(), lambda step: by_layer(model.loss_dict(step)), lambda step: by_layer(model.apart(step)))
    model.zero_grad()
    layer = list(model.layers[2].parameters())
    private = torch.autograd.grad(by_layer(model.apart(0))["last"], layer)
    gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1)).backward(by_layer(model.loss_dict(0)))
    for p, g in zip(layer, private, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_a_metric_among_the_losses_is_named():
    """And nothing is written; losses that have a graph are picked as the client does."""
    model = Detector()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_dict = model.loss_dict(0)
    with pytest.raises(RuntimeError, match=r"MGDA\.backward: .*'cardinality_error'.*"):
        optimizer.backward(loss_dict)
    assert all(p.grad is None for p in model.parameters())
    report = optimizer.backward({k: v for k, v in loss_dict.items() if v.requires_grad})
    assert len(report.names) == 6


class OneStage(nn.Module):
    """Boxes and classes of a place stand in the channels of one tensor, and the places of all scales side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.boxes = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.classes = nn.ModuleList(nn.Conv2d(4, 3, 1) for _ in range(2))

    def scales(self, step: int) -> list[Tensor]:
        a = self.stem(torch.randn(2, 3, 16, 16, generator=draws(step))).tanh()
        return [a, self.down(a).tanh()]

    def judge(self, boxes: Tensor, classes: Tensor) -> dict[str, Tensor]:
        return {"box": F.smooth_l1_loss(boxes, torch.ones_like(boxes)), "cls": F.softplus(classes).sum() / 50}

    def own(self, step: int) -> dict[str, Tensor]:
        feats = [torch.cat((self.boxes[i](z), self.classes[i](z)), 1) for i, z in enumerate(self.scales(step))]
        boxes, classes = torch.cat([x.view(2, 7, -1) for x in feats], 2).split((4, 3), 1)
        return self.judge(boxes, classes)

    def apart(self, step: int) -> dict[str, Tensor]:
        scales = self.scales(step)
        boxes = [self.boxes[i](z).flatten(2) for i, z in enumerate(scales)]
        classes = [self.classes[i](z).flatten(2) for i, z in enumerate(scales)]
        counts = [b.shape[2] for b in boxes]
        box = sum(F.smooth_l1_loss(b, torch.ones_like(b)) * n for b, n in zip(boxes, counts, strict=True)) / sum(counts)
        return {"box": box, "cls": sum(F.softplus(c).sum() for c in classes) / 50}


def test_a_head_that_joins_boxes_and_classes():
    model = OneStage()
    check(model.parameters(), model.own, model.apart)


# --------------------------------------------------------------------- a mixture of experts: one sample, one expert


class Sparse(nn.Module):
    """Tokens go to the best of four experts, and what comes back is added at their places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.router, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(6, 1)
        self.experts = nn.ModuleList(mlp(6, 8, 6) for _ in range(4))
        with torch.no_grad():
            self.router.bias.copy_(
                torch.tensor([9.0, 9.0, -99.0, -99.0])
            )  # the third needs a push, nobody takes the last
            self.router.weight[:2].mul_(5.0)

    def routed(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(torch.randn(8, 4, generator=draws(step))).tanh()
        logits = self.router(x) + torch.tensor([0.0, 0.0, 300.0, 0.0]) * (torch.arange(8) == 6)[:, None]
        weights, chosen = torch.topk(logits.div(100).softmax(-1), 1, dim=-1)
        return x, weights, chosen

    def own(self, step: int) -> dict[str, Tensor]:
        x, weights, chosen = self.routed(step)
        final = torch.zeros_like(x)
        expert_mask = F.one_hot(chosen, num_classes=4).permute(2, 1, 0)
        for k, expert in enumerate(self.experts):
            idx, top_x = torch.where(expert_mask[k])
            if len(top_x):
                current = expert(x[None, top_x].reshape(-1, 6)) * weights[top_x, idx, None]
                final.index_add_(0, top_x, current)
        out = self.head(final).squeeze(1)
        return {"one": (out[:4] - 1).square().mean(), "two": (out[4:] + 2).square().mean()}

    def apart(self, step: int) -> dict[str, Tensor]:
        x, weights, chosen = self.routed(step)
        outs = []
        for i in range(8):
            expert = self.experts[int(chosen[i, 0])]
            outs.append(self.head(expert(x[i]) * weights[i]))
        return {
            "one": sum((y - 1).square().sum() for y in outs[:4]) / 4,
            "two": sum((y + 2).square().sum() for y in outs[4:]) / 4,
        }


def test_an_expert_that_one_sample_uses_belongs_to_its_loss():
    model = Sparse()
    chosen = model.routed(0)[2].flatten().tolist()
    assert chosen.count(2) == 1
    assert 3 not in chosen
    check(model.parameters(), model.own, model.apart)
    model.zero_grad()
    private = torch.autograd.grad(model.apart(0)["two"], list(model.experts[2].parameters()))
    gradsurgery.MGDA(torch.optim.SGD(model.parameters(), lr=0.1)).backward(model.own(0))
    for p, g in zip(model.experts[2].parameters(), private, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.experts[3].parameters())
