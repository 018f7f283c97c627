"""A GAN whose two networks each have several losses, and a wrapped optimizer each."""

import torch
from torch import nn
from torch.nn.functional import softplus

import gradsurgery

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
generator_optimizer = gradsurgery.PCGrad(torch.optim.Adam(generator.parameters(), lr=0.002, betas=(0.5, 0.99)))
critic_optimizer = gradsurgery.UPGrad(torch.optim.Adam(critic.parameters(), lr=0.004, betas=(0.5, 0.99)))


def real(n):
    return 0.3 * torch.randn(n, 2) + torch.tensor([2.0, -1.0])


for _ in range(300):
    # The critic: the samples are detached, so that its losses reach its own parameters only.
    fake = generator(torch.randn(64, 2)).detach()
    critic_optimizer.zero_grad()
    critic_optimizer.backward({"real": softplus(-critic(real(64))).mean(), "fake": softplus(critic(fake)).mean()})
    critic_optimizer.step()

    # The generator: the losses pass through the critic, whose parameters are frozen meanwhile.
    critic.requires_grad_(False)
    batch, fake = real(64), generator(torch.randn(64, 2))
    losses = {"fool": softplus(-critic(fake)).mean(), "moments": (fake.mean(0) - batch.mean(0)).square().sum()}
    generator_optimizer.zero_grad()
    generator_optimizer.backward(losses)
    generator_optimizer.step()
    critic.requires_grad_(True)

print(f"mean of the samples {generator(torch.randn(2000, 2)).mean(0).tolist()}, of the data [2.0, -1.0]")
