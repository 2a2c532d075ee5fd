"""TD3: twin delayed DDPG (Fujimoto et al., ICML 2018, arXiv 1802.09477), as in its authors' code.

What CrossQ-TD3 took away comes back: target networks of the critics and of the actor, which follow
on the updates with an actor step. No batch renormalisation, no joint pass; the actor maximises the
first critic alone.

    python benchmark/algorithms/td3.py --env-id Walker2d-v4
    python benchmark/algorithms/td3.py --env-id Walker2d-v4 --learning-starts 25000  # the original
    python benchmark/algorithms/td3.py --critic-lr 1e-3 --actor-lr 1e-3  # the paper's rates

CrossQ's paper does not say how its plain TD3 was run, so these are the authors' settings, except
for the random steps, which are 5000 as CrossQ's. Flags, files and errors are those of
crossq_td3.py, without --brn-warmup and with --tau.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn
from tyro.conf import Fixed, Suppress

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_td3  # noqa: E402
import sac_baseline  # noqa: E402


@dataclasses.dataclass
class Args(crossq_td3.Args):
    critic_width: int = 256  # units per hidden layer
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    adam_beta1: float = 0.9  # of critic and actor
    policy_delay: int = 2  # critic updates per update of the actor and of the targets
    tau: float = 0.005  # share of a network that its target takes
    brn_warmup: Suppress[Fixed[int]] = 0  # there is no batch renorm here

    MAY_BE_ZERO = crossq_td3.Args.MAY_BE_ZERO | {"tau"}
    AT_MOST = crossq_td3.Args.AT_MOST | {"tau": 1}

    @staticmethod
    def suite_defaults(env_id):
        myo = {"action_repeat": 2, "gamma": 0.95}
        suites = {"shimmy": {"action_repeat": 2}, "myosuite": myo}
        return suites.get(crossq_td3.suite_of(env_id), {})


class MLP(sac_baseline.MLP):
    """That of sac_baseline.py with PyTorch's initialisation: uniform within 1 / sqrt(inputs)."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        for weight, bias in zip(self.weights, self.biases):
            bound = weight.shape[-2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)


class Agent(crossq_td3.Agent):
    def reset(self):
        super().reset()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)

    def make_critic(self):
        n_in, args = self.obs_dim + self.action_dim, self.args
        return MLP(n_in, args.critic_width, 1, ensemble=(args.n_critics,))

    def make_actor(self):
        return MLP(self.obs_dim, self.args.actor_width, self.action_dim)

    def actor_q(self, q):
        return q[0]

    def critic_loss(self, batch, draws):
        """The squared Bellman error: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        clip = self.args.target_noise_clip
        with torch.no_grad():
            noise = (self.args.target_noise * draws["noise"]).clamp(-clip, clip)
            next_action = (self.target_actor(next_obs).tanh() + noise).clamp(-1, 1)
            next_q = self.q(self.target_critic, next_obs, next_action)  # [n_critics, B]
            next_value = self.target_q(next_q, draws)
            target = reward + self.args.gamma * (1 - terminated) * next_value  # [B]
        q = self.q(self.critic, obs, action)  # [n_critics, B]
        loss = (q - target).square().mean(-1).sum()
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def update(self, batch, rng):
        """CrossQ-TD3's update; the targets follow where the actor has moved."""
        info = super().update(batch, rng)
        if self.n_updates % self.args.policy_delay == 0:
            self.move_targets()
        return info

    @torch.no_grad()
    def move_targets(self):
        """Both target networks follow by the share tau (Polyak averaging)."""
        pairs = (self.target_critic, self.critic), (self.target_actor, self.actor)
        for target_net, net in pairs:
            for target, source in zip(target_net.parameters(), net.parameters()):
                target.lerp_(source, self.args.tau)


def main(argv=None, **parts):
    return crossq_td3.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    sys.exit(main())
