"""L-BFGS on a physics-informed network: u'' = -u on [0, π] with u(0) = 0 and u'(0) = 1, so that u = sin."""

import math

import torch
from torch import nn

import gradsurgery

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
x = torch.linspace(0, math.pi, 40, dtype=torch.float64)[:, None].requires_grad_()
start = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)


def slope(u, at):
    return torch.autograd.grad(u.sum(), at, create_graph=True)[0]


def losses():
    u = net(x)
    beginning = net(start)
    return {
        "equation": (slope(slope(u, x), x) + u).square().mean(),
        "value": beginning.square().mean(),
        "slope": (slope(beginning, start) - 1).square().mean(),
    }


# All weights stay constant within a step of L-BFGS, since only `step` moves what a method has learnt.
optimizer = gradsurgery.LRAnnealingWeighter(
    torch.optim.LBFGS(net.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe"), every=5
)


def closure():
    optimizer.zero_grad()
    return optimizer.backward(losses()).objective


for _ in range(15):
    optimizer.step(closure)

error = (net(x) - x.sin()).abs().max().item()
report = optimizer.report
assert report is not None  # there is one after the first `backward`
print(f"largest error {error:.1e}, weights {report.weights}")
