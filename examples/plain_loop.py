"""The smallest loop: two losses of very different size on one trunk, first with the plain sum, then with ConFIG."""

import torch
from torch import nn

import gradsurgery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.label, self.corner = nn.Linear(32, 1), nn.Linear(32, 2)

    def forward(self, x):
        z = self.trunk(x)
        return self.label(z)[:, 0], self.corner(z)


torch.manual_seed(0)
inputs = torch.randn(512, 8)
labels = (inputs @ torch.randn(8) > 0).float()
corners = 30 * torch.tanh(inputs @ torch.randn(8, 2))


def train(method):
    torch.manual_seed(1)
    net = Net()
    optimizer = method(torch.optim.Adam(net.parameters(), lr=0.01))
    for _ in range(300):
        batch = torch.randint(512, (64,))
        label, corner = net(inputs[batch])
        losses = {
            "label": nn.functional.binary_cross_entropy_with_logits(label, labels[batch]),
            "corner": nn.functional.mse_loss(corner, corners[batch]),
        }
        optimizer.zero_grad()
        report = optimizer.backward(losses)
        optimizer.step()
    return ((net(inputs)[0] > 0) == labels.bool()).float().mean().item(), report


for method in (gradsurgery.FixedWeighter, gradsurgery.ConFIG):
    right, report = train(method)
    print(f"{method.__name__}: {right:.0%} of the labels right, last losses {report.losses}")
