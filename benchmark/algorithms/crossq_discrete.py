"""CrossQ for discrete actions, on crossq_sac.py.

As in SAC for discrete actions (Christodoulou 2019, arXiv 1910.07207), a critic gives the Q of every
action at once and the actor their probabilities. Expectations over the policy are sums, and no
noise is needed. The joint pass is over s and s' alone, because the action is no longer an input.
What differs from that paper (benchmark/results/_rivals/_tries has the runs):

- The target is the lower of the critics' values of s', not the value of their lower Qs: a minimum
  for every action is far too low (Zhou et al. 2022, arXiv 2209.10081). The actor takes their mean.
- The target has no bonus for entropy: it would pay to put off a task's end (cf. arXiv 2509.09838).
- The learning rates are 3e-4. With CrossQ's 1e-3 the critics rise above any possible return.
- Random actions are held for a while. The target entropy is 0.6 log(A): 0.98 log(A) would keep the
  policy nearly uniform.

    python benchmark/algorithms/crossq_discrete.py --env-id CartPole-v1
    python benchmark/algorithms/crossq_discrete.py --env-id LunarLander-v3  # gymnasium[box2d]

It samples actions. Evaluations take the most probable. Images are flattened. Other flags and files
are those of crossq_sac.py.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.optim import Adam

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_sac  # noqa: E402
from crossq_sac import MLP  # noqa: E402

NEW_ACTION = 0.25  # probability of a new random action at a step; otherwise the old one is held


@dataclass
class Args(crossq_sac.Args):
    env_id: str = "CartPole-v1"  # Gymnasium id; MODULE:ID imports the module first
    total_timesteps: int = 300_000  # environment steps
    critic_width: int = 256  # units per hidden layer
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    alpha_lr: float = 3e-4  # Adam, of the temperature
    entropy_factor: float = 0.6  # target entropy: this * log(number of actions)


class OneHot(gym.ActionWrapper):
    """Takes an action as a vector with its largest entry at the action's place."""

    def __init__(self, env):
        if not isinstance(env.action_space, gym.spaces.Discrete):
            sys.exit(f"error: the action space must be Discrete, not {env.action_space}")
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, (int(env.action_space.n),), np.float32)

    def action(self, action):
        return self.env.action_space.start + int(np.argmax(action))


def make_env(args):
    return crossq_sac.Env(OneHot(gym.make(args.env_id)), args.action_repeat)


class Agent(crossq_sac.Agent):
    """O and B: sizes of an observation and a batch. A: number of actions, which are one-hot."""

    discrete_actions = True  # for probe.py and actions.py, which measure continuous ones

    def __init__(self, obs_dim, action_dim, args):
        nn.Module.__init__(self)  # not crossq_sac.py's networks
        self.args = args
        self.action_dim = action_dim
        self.target_entropy = args.entropy_factor * math.log(action_dim)
        self.n_updates = 0
        self.critic = MLP(obs_dim, args.critic_width, action_dim, args, (args.n_critics,))
        self.actor = MLP(obs_dim, args.actor_width, action_dim, args)  # logits
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        # The last random action. As a buffer it is part of a checkpoint.
        self.register_buffer("held", torch.zeros((), dtype=torch.int64))
        betas = (args.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, betas, fused=True)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr, fused=True)

    def policy(self, obs):
        """obs [B, O] -> every action's probability [B, A] and its logarithm [B, A]."""
        log_probs = self.actor(obs).log_softmax(-1)
        return log_probs.exp(), log_probs

    def critic_loss(self, batch):
        """As CrossQ's, with the expectation over the next action in place of a sample."""
        obs, action, reward, terminated, next_obs = batch
        self.actor.eval()
        with torch.no_grad():
            next_probs, _ = self.policy(next_obs)

        self.critic.train()
        q, next_q = self.critic(torch.cat([obs, next_obs])).chunk(2, 1)  # [n_critics, B, A]

        next_value = (next_probs * next_q).sum(-1).min(0).values  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        q = (q * action).sum(-1)  # [n_critics, B], of the action taken
        return 0.5 * (q - target).square().mean(1).sum(), q.mean()

    def actor_loss(self, obs):
        """The expectation of alpha * log-prob - Q, and the policy's entropy."""
        self.actor.train()
        probs, log_probs = self.policy(obs)
        self.critic.eval()
        with torch.no_grad():
            q = self.critic(obs).mean(0)  # [B, A]
        loss = (probs * (self.log_alpha.exp().detach() * log_probs - q)).sum(-1).mean()
        return loss, -(probs * log_probs).sum(-1).mean()

    def update(self, batch, rng):
        """As CrossQ's, without noise."""
        loss, q_mean = self.descend(self.critic_optimizer, self.critic_loss, batch)
        info = {"losses/critic": loss, "diagnostics/q_mean": q_mean}
        self.n_updates += 1
        if self.n_updates % self.args.policy_delay == 0:
            loss, entropy = self.descend(self.actor_optimizer, self.actor_loss, batch[0])
            alpha = self.log_alpha.exp()
            self.alpha_optimizer.zero_grad()
            (alpha * (entropy - self.target_entropy)).backward()
            self.alpha_optimizer.step()
            info |= {"losses/actor": loss, "losses/alpha": alpha, "diagnostics/entropy": entropy}
        return info

    def random_action(self, rng):
        """Uniform, and held for four steps on average (Dabney et al. 2021, arXiv 2006.01782)."""
        if torch.rand((), generator=rng, device=rng.device) < NEW_ACTION:
            self.held = torch.randint(self.action_dim, (), generator=rng, device=rng.device)
        return np.eye(self.action_dim, dtype=np.float32)[self.held.item()]

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [O] -> one-hot action [A], in NumPy: sampled if rng is given, otherwise the most
        probable one. All NaN if the policy is."""
        self.actor.eval()
        probs = self.policy(torch.as_tensor(obs).to(self.log_alpha)[None])[0][0]  # [A]
        if probs.isnan().any():
            return probs.cpu().numpy()
        index = probs.argmax() if rng is None else probs.multinomial(1, generator=rng)
        return np.eye(self.action_dim, dtype=np.float32)[index.item()]


def main(argv=None, **parts):
    crossq_sac.main(argv, **{"Args": Args, "Agent": Agent, "make_env": make_env} | parts)


if __name__ == "__main__":
    main()
