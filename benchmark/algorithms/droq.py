"""DroQ: dropout Q-functions (Hiraoka et al., ICLR 2022, arXiv 2110.02034).

REDQ's twenty updates per step with two critics in place of ten: dropout and layer norm do the
ensemble's work. Every forward of a critic drops units, for the target and the actor too, each time
others. The target is the minimum over the two critics; the actor maximises their mean.

    python benchmark/algorithms/droq.py --env-id Hopper-v4                 # as in CrossQ's paper
    python benchmark/algorithms/droq.py --critic-lr 3e-4 --actor-lr 3e-4 --alpha-lr 3e-4  # its own
    python benchmark/algorithms/droq.py --critic-width 2048 --adam-beta1 0.5  # CrossQ, figure 15

On DeepMind Control CrossQ's paper has `--critic-lr 8e-4 --actor-lr 8e-4 --alpha-lr 8e-4`, and
run.sh adds `--action-repeat 2`. DroQ's authors have a dropout for each task, and MBPO's target
entropies, -1 on Hopper and -3 on HalfCheetah. Here it is -dim(A). Other flags and files are those
of sac_baseline.py.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from tyro.conf import Fixed, Suppress

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (0, 2)]
import redq  # noqa: E402

import sac_baseline  # noqa: E402


@dataclass
class Args(sac_baseline.Args):
    dropout: float = 0.01  # share of hidden units that are dropped
    utd: int = 20  # critic updates per agent step (update-to-data ratio)
    policy_delay: int = 20  # critic updates per actor update; at UTD 20 once per agent step
    bf16: Suppress[Fixed[bool]] = False


class DropoutMLP(nn.Module):
    """The dense layers of an ensemble with dropout and layer norm between them:
    (dense -> dropout -> layer norm -> ReLU) x 2 -> dense, [B, O], [B, A] -> [n_critics, B, 1].
    `uniform`, two of [n_critics, B, width] in [0, 1), says which units are dropped. The others are
    divided by their share, which keeps the mean. Without it nothing is dropped."""

    def __init__(self, mlp, args):
        super().__init__()
        self.weights, self.biases = mlp.weights, mlp.biases
        self.keep = 1 - args.dropout
        shape = args.n_critics, 1, args.critic_width
        self.scales = nn.ParameterList(torch.ones(shape) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(shape) for _ in range(2))

    def forward(self, obs, action, uniform=None):
        x = torch.cat([obs, action], -1)
        for k in range(2):
            x = x @ self.weights[k] + self.biases[k]
            if uniform is not None:
                x = x * (uniform[k] < self.keep) / self.keep
            x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)  # eps: CrossQ's code, JAX's
            x = (x * self.scales[k] + self.shifts[k]).relu()
        return x @ self.weights[2] + self.biases[2]


class Agent(redq.Agent):
    """Updated as REDQ's, with other losses and other random numbers."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.critic = DropoutMLP(self.critic, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        betas = (args.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)

    def draw(self, batch, rng):
        """A loss's random numbers: the policy's noise [B, A], and what critic and target drop."""
        noise = torch.randn(batch[1].shape, generator=rng, device=rng.device)
        shape = 2, self.args.n_critics, len(batch[0]), self.args.critic_width
        uniform = (torch.rand(shape, generator=rng, device=rng.device) for _ in range(2))
        return noise, *uniform

    def critic_loss(self, batch, draws):
        """Half the squared Bellman error: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        noise, uniform, target_uniform = draws
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)
            next_q = self.target_critic(next_obs, next_action, target_uniform).squeeze(-1)

        q = self.critic(obs, action, uniform).squeeze(-1)  # [n_critics, B]

        next_value = next_q.min(0).values - self.log_alpha.exp() * next_log_prob  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        return 0.5 * (q - target).square().mean(1).sum(), q.mean()

    def actor_q(self, obs, action, uniform=None):
        """What the actor maximises, the mean over the critics: [B]."""
        return self.critic(obs, action, uniform).squeeze(-1).mean(0)

    def actor_loss(self, obs, draws):
        """Minus the soft value, Q - alpha * log-prob; and the policy's entropy."""
        noise, uniform, _ = draws
        action, log_prob = self.policy(obs, noise)
        q = self.actor_q(obs, action, uniform)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()


def main(argv=None, **parts):
    sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    main()
