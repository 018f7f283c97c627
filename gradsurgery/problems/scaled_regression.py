"""GradNorm's toy: regressions of one common function at very different scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ScaledRegression:
    """Regressions of a common tanh function whose targets differ in scale only (the toy of the GradNorm paper).

        fᵢ(x) = σᵢ tanh((B + εᵢ) x),    entries of B from N(0, 10), of εᵢ from N(0, 3.5), drawn once

    The tasks share B; εᵢ is their own, and σᵢ sets the size of their targets. Loss i is the mean squared error of task
    i. It starts near σᵢ², so that a large σᵢ drowns the other tasks in a plain sum. The paper has two tasks with σ = 1
    and 100, and a form with ten.

    Chen et al., GradNorm, ICML 2018, arXiv 1711.02257; they use α = 0.12 here. Chosen here, where the public
    descriptions leave room: 10 and 3.5 are standard deviations, inputs are uniform on the unit sphere, and the ten
    scales are :attr:`TEN`, from 1 to 100 in equal ratios.

    Everything is drawn from generators seeded by `seed`; the global random state is not touched.

    Args:
        scales: σᵢ, a positive number for each task.
        inputs: Length of x.
        outputs: Length of fᵢ(x).
        seed: Seed of B and εᵢ, of the batches and of the weights of :meth:`model`.
        dtype: Floating-point type of data and models.

    Raises:
        ValueError: If `scales` is empty or holds a number that is not positive and finite.

    Example:
        >>> from gradsurgery.problems import ScaledRegression
        >>> toy = ScaledRegression(scales=(1.0, 100.0), inputs=20, outputs=10)
        >>> model = toy.model(width=30)
        >>> small, large = toy.losses(model, toy.inputs(0))
        >>> bool(large > 5000 * small)
        True
    """

    #: Scales of the form with ten tasks.
    TEN = tuple(100.0 ** (i / 9.0) for i in range(10))

    def __init__(
        self,
        scales: Sequence[float] = (1.0, 100.0),
        *,
        inputs: int = 250,
        outputs: int = 100,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not scales or not all(0.0 < scale < math.inf for scale in scales):
            raise ValueError(
                f"ScaledRegression: `scales` must be positive and finite, got {tuple(scales)}. Give one for each task."
            )
        self.scales = tuple(float(scale) for scale in scales)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        common = 10.0 * torch.randn(outputs, inputs, generator=generator, dtype=dtype)
        own = 3.5 * torch.randn(len(self.scales), outputs, inputs, generator=generator, dtype=dtype)
        self.matrices = common + own  # (m, outputs, inputs)

    def inputs(self, index: int, size: int = 200) -> Tensor:
        """The batch of inputs with a given number.

        Args:
            index: Number of the batch, at least 0: another number gives new inputs, the same one the same. Keep one
                for testing.
            size: Number of samples.

        Returns:
            Tensor of shape (size, inputs), rows of length 1.
        """
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)
        x = torch.randn(size, self.matrices.shape[-1], generator=generator, dtype=self.matrices.dtype)
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)

    def targets(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the tasks should predict.

        Args:
            x: Inputs of shape (size, inputs).

        Returns:
            m tensors of shape (size, outputs), the i-th with entries between −σᵢ and σᵢ.
        """
        bent = torch.tanh(torch.einsum("moi,bi->mbo", self.matrices, x))
        return tuple(scale * task for scale, task in zip(self.scales, bent, strict=True))

    def model(self, width: int = 100, depth: int = 4) -> SharedTrunk:
        """A new network, always with the same weights.

        Args:
            width: Neurons of each hidden layer.
            depth: Number of hidden layers, all shared.

        Returns:
            The network, a ReLU trunk and an affine head for each task.
        """
        tasks, outputs, inputs = self.matrices.shape
        return SharedTrunk([inputs] + [width] * depth, outputs, tasks, self.seed, self.matrices.dtype)

    def losses(self, model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Mean squared error of each task.

        Args:
            model: Maps x to m tensors of shape (size, outputs).
            x: Inputs of shape (size, inputs).

        Returns:
            m scalar tensors.
        """
        return tuple(((y - t) ** 2).mean() for y, t in zip(model(x), self.targets(x), strict=True))

    @torch.no_grad()
    def relative_losses(self, model: nn.Module, x: Tensor) -> Tensor:
        """Losses divided by those of predicting zero: near 1 at the start, 0 when all is learnt, whatever the scale.

        Args:
            model: Maps x to m tensors of shape (size, outputs).
            x: Inputs of shape (size, inputs), best of a batch that is not trained on.

        Returns:
            Tensor of shape (m,), float64.
        """
        power = torch.stack([(t.double() ** 2).mean() for t in self.targets(x)])
        return torch.stack([loss.double() for loss in self.losses(model, x)]) / power


class SharedTrunk(nn.Module):
    """A ReLU trunk that all tasks share, and an affine head for each.

    Args:
        sizes: Widths of the trunk, the input first.
        outputs: Length of each head's output.
        tasks: Number of heads.
        seed: Seed of the weights, which have torch's usual distribution.
        dtype: Floating-point type of the weights.
    """

    def __init__(self, sizes: Sequence[int], outputs: int, tasks: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.trunk = nn.ModuleList(_linear(a, b, generator, dtype) for a, b in itertools.pairwise(sizes))
        self.heads = nn.ModuleList(_linear(sizes[-1], outputs, generator, dtype) for _ in range(tasks))

    @property
    def last_shared(self) -> nn.Module:
        """The last layer of the trunk, where GradNorm measures."""
        return self.trunk[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Predict for every task.

        Args:
            x: Inputs of shape (size, inputs).

        Returns:
            A tensor of shape (size, outputs) for each task.
        """
        for layer in self.trunk:
            x = torch.relu(layer(x))
        return tuple(head(x) for head in self.heads)


def _linear(inputs: int, outputs: int, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
    # skip_init, because the constructor of nn.Linear draws from the global random state.
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype)
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
