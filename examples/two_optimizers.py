"""Two optimizers for one model: surgery on the trunk with Adam, plain gradients for the word table with SparseAdam."""

import torch
from torch import nn

import gradsurgery

torch.manual_seed(0)
table = nn.Embedding(1000, 16, sparse=True)
trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))

of_table = torch.optim.SparseAdam(table.parameters(), lr=0.05)
of_trunk = gradsurgery.MGDA(torch.optim.Adam(trunk.parameters(), lr=0.01))

for _ in range(200):
    words = torch.randint(1000, (64,))
    even, size = trunk(table(words)).unbind(dim=1)
    losses = {
        "even": nn.functional.binary_cross_entropy_with_logits(even, (words % 2 == 0).float()),
        "size": (size - words / 1000).square().mean(),
    }
    of_trunk.zero_grad()
    of_table.zero_grad()
    report = of_trunk.backward(losses, other_optimizers=[of_table])  # the others get the plain gradient of the sum
    of_trunk.step()
    of_table.step()

gradient = table.weight.grad
print(f"losses {report.losses}; the gradient of the table is sparse: {gradient is not None and gradient.is_sparse}")
