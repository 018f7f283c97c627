"""A PPO update on a bandit: policy, value and entropy losses. The policy loss and the entropy loss may be negative."""

import torch
from torch import nn
from torch.distributions import Categorical

import gradsurgery


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, state):
        z = self.trunk(state)
        return Categorical(logits=self.policy(z)), self.value(z)[:, 0]


torch.manual_seed(0)
actor, best = Actor(), torch.randn(4, 3)
# PCGrad takes losses of any sign. Methods that divide by losses or take their logarithm refuse negative ones.
optimizer = gradsurgery.PCGrad(
    torch.optim.Adam(actor.parameters(), lr=0.01), preference={"policy": 1.0, "value": 0.5, "entropy": 0.01}
)

for _ in range(30):
    state = torch.randn(256, 4)
    with torch.no_grad():
        old, value = actor(state)
        action = old.sample()
        reward = ((state @ best).argmax(1) == action).float()
        advantage = reward - value
        log_old = old.log_prob(action)
    for _ in range(4):
        new, value = actor(state)
        ratio = (new.log_prob(action) - log_old).exp()
        losses = {
            "policy": -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean(),
            "value": (value - reward).square().mean(),
            "entropy": -new.entropy().mean(),
        }
        optimizer.zero_grad()
        report = optimizer.backward(losses)
        nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
        optimizer.step()

print(f"mean reward {reward.mean():.2f} (by chance 0.33), losses {report.losses}")
