"""BRO: bigger, regularised, optimistic (Nauman et al., NeurIPS 2024, arXiv 2405.16158).

Bigger: the critics are residual networks, 512 wide, that predict 100 quantiles of the return and
are updated ten times per step. Regularised: layer norm, weight decay, and resets of all networks.
Optimistic: the target is the critics' mean, not their minimum. A second actor explores. It shifts
the first one's mean to where an upper bound of Q is high, but not far away.

    python benchmark/algorithms/bro.py --env-id shimmy:dm_control/dog-trot-v0
    python benchmark/algorithms/bro.py --env-id shimmy:dm_control/dog-trot-v0 --fast  # BRO (Fast)

The settings are those of the authors' code, the same for all tasks. Its resets return to the very
same initial weights; here they are drawn anew. Other flags and files are those of sac_baseline.py.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam, AdamW
from tyro.conf import Fixed, Suppress

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (0, 2)]
import sr_sac  # noqa: E402

import sac_baseline  # noqa: E402

RESETS = [15_001, 50_001, 250_001, 500_001, 750_001, 1_000_001, 1_500_001, 2_000_001]  # agent steps
LOG_STD_MIN, LOG_STD_MAX = -10, 2
DUAL_MIN, DUAL_MAX = -10, 7.5  # bounds of the logarithms of optimism and KL weight
KL_TARGET = 0.05  # of the exploring policy from the actor, per action dimension
STD_SHARE = 0.75  # the exploring policy's standard deviation over the actor's


@dataclass
class Args(sac_baseline.Args):
    critic_width: int = 512  # units per hidden layer
    n_quantiles: int = 100  # of the return, per critic
    critic_lr: float = 3e-4  # AdamW
    actor_lr: float = 3e-4  # AdamW, of both actors
    alpha_lr: float = 3e-4  # Adam, of the temperature
    dual_lr: float = 3e-5  # Adam, of optimism and KL weight
    weight_decay: float = 1e-4  # AdamW
    utd: int = 10  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 128  # transitions
    learning_starts: int = 2500  # random agent steps before the first update
    entropy_factor: float = 0.5  # target entropy: -this * dim(A)
    fast: bool = False  # BRO (Fast): UTD 2, whatever --utd says, and only the first reset
    bf16: Suppress[Fixed[bool]] = False

    def __post_init__(self):
        if self.fast:
            self.utd = 2


class BroNet(nn.Module):
    """Dense -> norm -> ReLU, blocks x + (dense -> norm -> ReLU -> dense -> norm)(x), dense."""

    def __init__(self, n_in, width, n_blocks, n_out):
        super().__init__()

        def layer(n):
            return nn.Linear(n, width), nn.LayerNorm(width, eps=1e-6)

        self.first = nn.Sequential(*layer(n_in), nn.ReLU())
        self.blocks = nn.ModuleList()
        for _ in range(n_blocks):
            self.blocks.append(nn.Sequential(*layer(width), nn.ReLU(), *layer(width)))
        self.last = nn.Linear(width, n_out)
        for dense in self.modules():
            if isinstance(dense, nn.Linear):
                nn.init.orthogonal_(dense.weight, 2**0.5)
                nn.init.zeros_(dense.bias)

    def forward(self, *inputs):
        x = self.first(torch.cat(inputs, -1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Actor(BroNet):
    """Mean and log std [B, 2A], the latter brought between its bounds by tanh."""

    def forward(self, obs):
        mean, log_std = super().forward(obs).chunk(2, -1)
        return torch.cat([mean, between(LOG_STD_MIN, LOG_STD_MAX, log_std)], -1)


class Critics(nn.ModuleList):
    """The quantiles of the return: [B, O], [B, A] -> [n_critics, B, K]."""

    def forward(self, obs, action):
        return torch.stack([critic(obs, action) for critic in self])


def between(low, high, x):
    """A number without bounds, squashed into [low, high]."""
    return low + (high - low) / 2 * (1 + x.tanh())


def dual(value):
    """The parameter whose exp(between(DUAL_MIN, DUAL_MAX, .)) is value."""
    share = (math.log(value) - DUAL_MIN) / (DUAL_MAX - DUAL_MIN)
    return nn.Parameter(torch.tensor(math.atanh(2 * share - 1)))


def quantile_loss(quantiles, target):
    """The quantile Huber loss (Dabney et al. 2018): quantiles [n_critics, B, K], target [B, K] ->
    sum over critics and quantiles, mean over the batch and the target's quantiles."""
    k = quantiles.shape[-1]
    error = target[:, None, :] - quantiles[..., None]  # [n_critics, B, K, K of the target]
    huber = torch.where(error.abs() <= 1, error.square() / 2, error.abs() - 0.5)
    tau = (torch.arange(k, device=error.device) + 0.5)[:, None] / k  # [K, 1], the midpoints
    loss = torch.where(error < 0, 1 - tau, tau) * huber  # so that a share tau lies below
    return loss.sum(-2).mean((-2, -1)).sum()


class Agent(sac_baseline.Agent):
    def __init__(self, obs_dim, action_dim, args):
        nn.Module.__init__(self)  # not sac_baseline.py's networks
        self.args = args
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.target_entropy = -args.entropy_factor * action_dim
        self.n_updates = 0
        n_in, width = obs_dim + action_dim, args.actor_width
        self.explorer = BroNet(n_in, width, 1, action_dim)
        self.explorer.last = nn.Linear(width, action_dim, bias=False)
        nn.init.orthogonal_(self.explorer.last.weight, 0.01)  # it begins as the actor
        self.optimism, self.kl_weight = dual(1.0), dual(0.25)
        sizes = n_in, args.critic_width, 2, args.n_quantiles
        self.critic = Critics(BroNet(*sizes) for _ in range(args.n_critics))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = Actor(obs_dim, width, 1, 2 * action_dim)
        self.actor.last.weight.data[action_dim:] /= 2**0.5  # the log stds' gain is 1
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        slow = {"betas": (args.adam_beta1, 0.999), "weight_decay": args.weight_decay, "fused": True}
        quick = {"betas": (0.5, 0.999), "fused": True}
        self.critic_optimizer = AdamW(self.critic.parameters(), args.critic_lr, **slow)
        self.actor_optimizer = AdamW(self.actor.parameters(), args.actor_lr, **slow)
        self.explorer_optimizer = AdamW(self.explorer.parameters(), args.actor_lr, **slow)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr, **quick)
        self.dual_optimizer = Adam([self.optimism, self.kl_weight], args.dual_lr, **quick)

    def critic_loss(self, batch, noise):
        """The quantile Huber loss against the shifted and shrunk quantiles of s'."""
        obs, action, reward, terminated, next_obs = batch
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)
            next_q = self.target_critic(next_obs, next_action).mean(0)  # [B, K], no minimum
            next_value = next_q - self.log_alpha.exp() * next_log_prob[:, None]
            discount = self.args.gamma * (1 - terminated)
            target = reward[:, None] + discount[:, None] * next_value  # [B, K]
        q = self.critic(obs, action)  # [n_critics, B, K]
        return quantile_loss(q, target), q.mean()

    def actor_q(self, obs, action):
        """What the actor maximises, the mean over critics and quantiles: [B]."""
        return self.critic(obs, action).mean((0, -1))

    def actor_loss(self, obs, noise):
        """Minus the soft value, Q - alpha * log-prob; and the policy's entropy."""
        action, log_prob = self.policy(obs, noise)
        q = self.actor_q(obs, action)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def explore(self, obs, noise):
        """The exploring policy: action [B, A], and its KL divergence from the actor [B]."""
        mean, log_std = self.actor(obs).detach().chunk(2, -1)
        std = log_std.exp()
        shift = self.explorer(obs, mean)
        kl = (shift / std).square().sum(-1) / 2  # of Gaussians of the same standard deviation
        return (mean + shift + STD_SHARE * std * noise).tanh(), kl

    def dual_values(self):
        """Optimism, and the weight of the KL divergence."""
        return [between(DUAL_MIN, DUAL_MAX, x).exp() for x in (self.optimism, self.kl_weight)]

    def explorer_loss(self, obs, noise):
        """Minus an upper bound of Q, the critics' mean plus their disagreement, with a penalty on
        the KL divergence; and that divergence per action dimension."""
        action, kl = self.explore(obs, noise)
        q = self.critic(obs, action)  # [n_critics, B, K]
        spread = (q.amax(0) - q.amin(0)) / 2
        optimism, kl_weight = (x.detach() for x in self.dual_values())
        upper = (q.mean(0) + optimism * spread).mean(-1)  # [B]
        return (kl_weight * kl - upper).mean(), kl.mean() / self.action_dim

    def dual_loss(self, kl):
        """It lowers optimism and raises the KL's weight while the KL is above its target. The
        second result is optimism."""
        optimism, kl_weight = self.dual_values()
        return (optimism - kl_weight) * (kl - KL_TARGET), optimism

    def update(self, batch, rng):
        """SAC's update, then the exploring actor's and the duals'; before it a reset, if due."""
        args = self.args
        # The agent step that this update belongs to, counted from 1.
        agent_step = args.learning_starts + self.n_updates // args.utd + 1
        if self.n_updates % args.utd == 0 and agent_step in (RESETS[:1] if args.fast else RESETS):
            sr_sac.reset(self)
        info = super().update(batch, rng)
        if self.n_updates % args.policy_delay == 0:  # with the actor
            noise = torch.randn(batch[1].shape, generator=rng, device=rng.device)
            self.critic.requires_grad_(False)  # skip its gradients
            loss, kl = self.descend(self.explorer_optimizer, self.explorer_loss, batch[0], noise)
            self.critic.requires_grad_(True)
            optimism, kl_weight = self.dual_values()
            self.descend(self.dual_optimizer, self.dual_loss, kl)
            info |= {"losses/explorer": loss, "diagnostics/kl": kl}
            info |= {"diagnostics/optimism": optimism, "diagnostics/kl_weight": kl_weight}
        return info

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [O] -> action [A], in NumPy: the exploring policy's if rng is given, otherwise
        tanh(mean) of the actor."""
        if rng is None:
            return super().act(obs)
        obs = torch.as_tensor(obs).to(self.log_alpha)[None]
        noise = torch.randn(1, self.action_dim, generator=rng, device=rng.device)
        return self.explore(obs, noise)[0][0].cpu().numpy()


def main(argv=None, **parts):
    sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    main()
