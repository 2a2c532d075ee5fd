"""CrossQ for discrete actions, on crossq_sac.py.

As in SAC for discrete actions (Christodoulou 2019, arXiv 1910.07207), a critic gives the Q of every
action at once and the actor their probabilities, so expectations over the policy are sums and no
noise is needed. The joint pass is over s and s' alone, because the action is no input any more.
What differs from that paper (benchmark/results/README.md shows what led to all but the last):

- The target is the lower of the critics' values of s', not the value of their lower Qs: a minimum
  for every action is far too low (Zhou et al. 2022, arXiv 2209.10081). The actor takes their mean.
- The target has no bonus for entropy: it would pay to put off a task's end (cf. arXiv 2509.09838).
- The learning rates are 3e-4: with CrossQ's 1e-3 the critics rise above any possible return.
- Random actions are held for a while.
- The target entropy is 0.6 log(A): 0.98 log(A) would keep the policy nearly uniform.

    python benchmark/algorithms/crossq_discrete.py --env-id CartPole-v1
    python benchmark/algorithms/crossq_discrete.py --env-id LunarLander-v3  # gymnasium[box2d]

It samples actions; evaluations take the most probable. Flags and files are crossq_sac.py's.
"""

import dataclasses
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_sac  # noqa: E402

NEW_ACTION = 0.25  # probability of a new random action at a step; otherwise the old one is held


@dataclasses.dataclass
class Args(crossq_sac.Args):
    env_id: str = "CartPole-v1"  # Gymnasium id, or your own: my_module:MyEnv-v0
    total_timesteps: int = 300_000  # environment steps
    critic_width: int = 256  # units per hidden layer
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    alpha_lr: float = 3e-4  # Adam, of the temperature; 0 keeps it at --alpha
    entropy_factor: float = 0.6  # target entropy: this * log(number of actions)

    AT_MOST = crossq_sac.Args.AT_MOST | {"entropy_factor": 1}


class OneHot(gym.ActionWrapper):
    """Takes an action as a vector with its largest entry at the action's place."""

    def __init__(self, env):
        if not isinstance(env.action_space, gym.spaces.Discrete):
            crossq_sac.fail("--env-id needs a Discrete action space, not", env.action_space)
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, (int(env.action_space.n),), np.float32)

    def action(self, action):
        return self.env.action_space.start + int(np.argmax(action))


def make_env(args, **kwargs):
    return crossq_sac.make_env(args, wrapper=OneHot, **kwargs)


class Agent(crossq_sac.Agent):
    """O and B: sizes of an observation and a batch; A: number of actions, which are one-hot."""

    discrete_actions = True  # for probe.py and actions.py, which measure continuous ones

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.target_entropy = args.entropy_factor * math.log(action_dim)
        # The last random action; a buffer, so that a checkpoint has it.
        self.register_buffer("held", torch.zeros((), dtype=torch.int64))

    def make_critic(self):
        """[B, O] -> [n_critics, B, A]."""
        args, n_out = self.args, self.action_dim
        shape = self.obs_dim, args.critic_width, n_out, args.brn_warmup
        return crossq_sac.MLP(*shape, ensemble=(args.n_critics,))

    def make_actor(self):
        """The actions' logits: [B, O] -> [B, A]."""
        args, n_out = self.args, self.action_dim
        return crossq_sac.MLP(self.obs_dim, args.actor_width, n_out, args.brn_warmup)

    def policy(self, obs):
        """obs [B, O] -> every action's probability [B, A] and its logarithm [B, A]."""
        log_probs = self.actor(obs).log_softmax(-1)
        return log_probs.exp(), log_probs

    def actor_q(self, q):
        """From [n_critics, B, A] to what the actor maximises [B, A]."""
        return q.mean(0)

    def draw(self, batch, rng):
        return {}  # nothing here is random

    def critic_loss(self, batch, draws):
        """As CrossQ's, with the expectation over the next action in place of a sample."""
        obs, action, reward, terminated, next_obs = batch
        self.actor.eval()
        with torch.no_grad():
            next_probs, _ = self.policy(next_obs)

        self.critic.train()
        both_q = self.critic(torch.cat([obs, next_obs]))  # [n_critics, 2B, A]
        q, next_q = both_q.chunk(2, 1)  # [n_critics, B, A] each

        next_value = self.target_q((next_probs * next_q).sum(-1), draws)  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()  # [B]
        q = (q * action).sum(-1)  # [n_critics, B], of the action taken
        loss = 0.5 * (q - target).square().mean(-1).sum()
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def actor_loss(self, batch, draws):
        """The expectation of alpha * log-prob - Q; the critics need no gradient for it."""
        obs = batch[0]
        self.actor.train()
        probs, log_probs = self.policy(obs)
        self.critic.eval()
        with torch.no_grad():
            q = self.actor_q(self.critic(obs))  # [B, A]
        loss = (probs * (self.alpha().detach() * log_probs - q)).sum(-1).mean()
        entropy = -(probs * log_probs).sum(-1).mean()
        return loss, {"losses/actor": loss, "diagnostics/entropy": entropy}

    def random_action(self, rng):
        """Uniform, and held for four steps on average (Dabney et al. 2021, arXiv 2006.01782)."""
        if torch.rand((), generator=rng, device=rng.device) < NEW_ACTION:
            self.held = torch.randint(self.action_dim, (), generator=rng, device=rng.device)
        return np.eye(self.action_dim, dtype=np.float32)[self.held.item()]

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [O] -> one-hot action [A], in NumPy: sampled if rng is given, otherwise the most
        probable one."""
        self.actor.eval()
        probs, _ = self.policy(torch.as_tensor(obs).to(self.log_alpha)[None])
        if not probs.isfinite().all():
            crossq_sac.fail("the policy is NaN: training has diverged", code=1)
        index = probs[0].argmax() if rng is None else probs[0].multinomial(1, generator=rng)
        return np.eye(self.action_dim, dtype=np.float32)[index.item()]


def main(argv=None, **parts):
    own = {"Args": Args, "Agent": Agent, "make_env": make_env}
    return crossq_sac.main(argv, **own | parts)


if __name__ == "__main__":
    sys.exit(main())
