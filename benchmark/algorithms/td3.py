"""TD3: twin delayed DDPG (Fujimoto et al., ICML 2018, arXiv 1802.09477), as in its authors' code.

What CrossQ-TD3 took away comes back: target networks of critics and actor, which follow when the
actor is updated. There is no batch renormalisation and no joint pass. The actor maximises the first
critic alone.

    python benchmark/algorithms/td3.py --env-id Walker2d-v4
    python benchmark/algorithms/td3.py --env-id Walker2d-v4 --learning-starts 25000  # the original
    python benchmark/algorithms/td3.py --critic-lr 1e-3 --actor-lr 1e-3  # the paper's rates

CrossQ's paper does not say how its plain TD3 was run. These are the authors' settings, except for
the random steps, which are CrossQ's 5000. On DeepMind Control run.sh adds `--action-repeat 2`, and
on MyoSuite `--action-repeat 2 --gamma 0.95`. Other flags and files are those of crossq_td3.py.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from tyro.conf import Fixed, Suppress

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_td3  # noqa: E402
import sac_baseline  # noqa: E402


@dataclass
class Args(crossq_td3.Args):
    critic_width: int = 256  # units per hidden layer
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    adam_beta1: float = 0.9  # of critic and actor
    policy_delay: int = 2  # critic updates per update of the actor and of the targets
    tau: float = 0.005  # share of a network that its target takes
    brn_warmup: Suppress[Fixed[int]] = 0


class MLP(sac_baseline.MLP):
    """That of sac_baseline.py with PyTorch's initialisation: uniform within 1 / sqrt(inputs)."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        for weight, bias in zip(self.weights, self.biases):
            bound = weight.shape[-2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)


class Agent(crossq_td3.Agent):
    def __init__(self, obs_dim, action_dim, args):
        nn.Module.__init__(self)  # not crossq_td3.py's networks
        self.args = args
        self.action_dim = action_dim
        self.n_updates = 0
        self.critic = MLP(obs_dim + action_dim, args.critic_width, 1, args, (args.n_critics,))
        self.actor = MLP(obs_dim, args.actor_width, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        betas = (args.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, betas, fused=True)

    def critic_loss(self, batch, noise):
        """The squared Bellman error: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        with torch.no_grad():
            clip = self.args.target_noise_clip
            noise = (self.args.target_noise * noise).clamp(-clip, clip)
            next_action = (self.target_actor(next_obs).tanh() + noise).clamp(-1, 1)
            next_q = self.target_critic(next_obs, next_action).squeeze(-1)  # [n_critics, B]

        q = self.critic(obs, action).squeeze(-1)  # [n_critics, B]

        next_value = next_q.min(0).values  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        return (q - target).square().mean(1).sum(), q.mean()

    def actor_q(self, obs, action):
        """What the actor maximises, the first critic: [B]."""
        return self.critic(obs, action)[0].squeeze(-1)

    def actor_loss(self, obs):
        """Minus the Q-value of the actor's actions; and that value."""
        q_mean = self.actor_q(obs, self.policy(obs)).mean()
        return -q_mean, q_mean

    def update(self, batch, rng):
        """CrossQ-TD3's update. The targets follow when the actor has moved."""
        info = super().update(batch, rng)
        if self.n_updates % self.args.policy_delay == 0:
            self.move_target(self.target_critic, self.critic)
            self.move_target(self.target_actor, self.actor)
        return info

    @torch.no_grad()
    def move_target(self, target_net, net):
        """A target network follows by the share tau (Polyak averaging)."""
        for target, source in zip(target_net.parameters(), net.parameters()):
            target.lerp_(source, self.args.tau)


def main(argv=None, **parts):
    crossq_td3.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    main()
