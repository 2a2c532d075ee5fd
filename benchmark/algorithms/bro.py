"""BRO: bigger, regularised, optimistic (Nauman et al., NeurIPS 2024, arXiv 2405.16158).

Bigger: the critics are residual networks, 512 wide, that predict 100 quantiles of the return and
are updated ten times per step. Regularised: layer norm, weight decay, and resets of all networks.
Optimistic: the target is the critics' mean, not their minimum, and a second actor explores, which
shifts the first one's mean to where an upper bound of Q is high, but not far away.

    python benchmark/algorithms/bro.py --env-id dm_control/dog-trot-v0
    python benchmark/algorithms/bro.py --env-id dm_control/dog-trot-v0 --fast  # BRO (Fast)

The settings are those of the authors' code. Its resets return to the very same initial weights;
here they are drawn anew. Other flags, files and errors are those of sac_baseline.py.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam, AdamW

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402

RESETS = [15_001, 50_001, 250_001, 500_001, 750_001, 1_000_001, 1_500_001, 2_000_001]  # agent steps
LOG_STD_MIN, LOG_STD_MAX = -10, 2
DUAL_MIN, DUAL_MAX = -10, 7.5  # bounds of the logarithms of optimism and KL weight
KL_TARGET = 0.05  # of the exploring policy from the actor, per action dimension
STD_SHARE = 0.75  # the exploring policy's standard deviation over the actor's


@dataclasses.dataclass
class Args(sac_baseline.Args):
    critic_width: int = 512  # units per hidden layer
    n_quantiles: int = 100  # of the return, per critic
    critic_lr: float = 3e-4  # AdamW
    actor_lr: float = 3e-4  # AdamW, of both actors
    alpha_lr: float = 3e-4  # Adam, of the temperature; 0 keeps it at --alpha
    dual_lr: float = 3e-5  # Adam, of optimism and KL weight
    weight_decay: float = 1e-4  # AdamW
    utd: int = 10  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 128  # transitions
    learning_starts: int = 2500  # random agent steps before the first update
    entropy_factor: float = 0.5  # target entropy: -this * dim(A)
    fast: bool = False  # BRO (Fast): UTD 2 in place of the default, and only the first reset

    MAY_BE_ZERO = sac_baseline.Args.MAY_BE_ZERO | {"weight_decay", "dual_lr"}

    def __post_init__(self):
        if self.fast:
            if self.utd not in (2, type(self).utd):
                sac_baseline.fail("--fast has --utd 2, not", self.utd)
            self.utd = 2

    @staticmethod
    def suite_defaults(env_id):
        return {}  # one setting for all


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

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Actor(BroNet):
    """Mean and log std [B, 2A], the latter brought between its bounds by tanh."""

    def forward(self, obs):
        mean, log_std = super().forward(obs).chunk(2, -1)
        return torch.cat([mean, between(LOG_STD_MIN, LOG_STD_MAX, log_std)], -1)


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
        super().__init__(obs_dim, action_dim, args)
        self.target_entropy = -args.entropy_factor * action_dim

    def reset(self):
        """The exploring actor and both duals too, before SAC's part makes the optimisers."""
        n_in, width = self.obs_dim + self.action_dim, self.args.actor_width
        self.explorer = BroNet(n_in, width, 1, self.action_dim)
        self.explorer.last = nn.Linear(width, self.action_dim, bias=False)
        nn.init.orthogonal_(self.explorer.last.weight, 0.01)  # it begins as the actor
        self.optimism, self.kl_weight = dual(1.0), dual(0.25)
        super().reset()

    def make_critic(self):
        args, n_in = self.args, self.obs_dim + self.action_dim
        sizes = n_in, args.critic_width, 2, args.n_quantiles
        return nn.ModuleList(BroNet(*sizes) for _ in range(args.n_critics))

    def make_actor(self):
        actor = Actor(self.obs_dim, self.args.actor_width, 1, 2 * self.action_dim)
        actor.last.weight.data[self.action_dim :] /= 2**0.5  # the log stds' gain is 1
        return actor

    def make_optimizers(self):
        args = self.args
        slow = {"betas": (args.adam_beta1, 0.999), "weight_decay": args.weight_decay, "fused": True}
        quick = {"betas": (0.5, 0.999), "fused": True}
        return {
            "critic": AdamW(self.critic.parameters(), args.critic_lr, **slow),
            "actor": AdamW(self.actor.parameters(), args.actor_lr, **slow),
            "explorer": AdamW(self.explorer.parameters(), args.actor_lr, **slow),
            "alpha": Adam([self.log_alpha], args.alpha_lr, **quick),
            "duals": Adam([self.optimism, self.kl_weight], args.dual_lr, **quick),
        }

    def q(self, critic, obs, action):
        """The quantiles of the return: [n_critics, B, K]."""
        pair = torch.cat([obs, action], -1)
        return torch.stack([net(pair) for net in critic])

    def target_q(self, next_q, draws):
        """The quantiles' means over the critics, no minimum: [n_critics, B, K] -> [B, K]."""
        return next_q.mean(0)

    def actor_q(self, q):
        """The mean over critics and quantiles: [n_critics, B, K] -> [B]."""
        return q.mean((0, -1))

    def critic_loss(self, batch, draws):
        """The quantile Huber loss against the shifted and shrunk quantiles of s'."""
        obs, action, reward, terminated, next_obs = batch
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, draws["noise"])
            next_q = self.q(self.target_critic, next_obs, next_action)  # [n_critics, B, K]
            next_value = self.target_q(next_q, draws) - self.alpha() * next_log_prob[:, None]
            discount = self.args.gamma * (1 - terminated)
            target = reward[:, None] + discount[:, None] * next_value  # [B, K]
        q = self.q(self.critic, obs, action)  # [n_critics, B, K]
        loss = quantile_loss(q, target)
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def explore(self, obs, noise):
        """The exploring policy: action [B, A], and its KL divergence from the actor [B]."""
        mean, log_std = self.actor(obs).detach().chunk(2, -1)
        std = log_std.exp()
        shift = self.explorer(torch.cat([obs, mean], -1))
        kl = (shift / std).square().sum(-1) / 2  # of Gaussians of the same standard deviation
        return (mean + shift + STD_SHARE * std * noise).tanh(), kl

    def explorer_loss(self, batch, draws):
        """An upper bound of Q, the critics' mean plus their disagreement, negated."""
        obs = batch[0]
        action, kl = self.explore(obs, draws["noise"])
        q = self.q(self.critic, obs, action)  # [n_critics, B, K]
        spread = (q.amax(0) - q.amin(0)) / 2
        optimism, kl_weight = self.dual_values()
        upper = (q.mean(0) + optimism.detach() * spread).mean(-1)  # [B]
        loss = (kl_weight.detach() * kl - upper).mean()
        return loss, {"losses/explorer": loss, "diagnostics/kl": kl.mean() / self.action_dim}

    def dual_values(self):
        """Optimism, and the weight of the KL divergence."""
        duals = self.optimism, self.kl_weight
        return [between(DUAL_MIN, DUAL_MAX, parameter).exp() for parameter in duals]

    def dual_loss(self, kl):
        """While the KL is above its target: less optimism, a greater weight of the KL."""
        optimism, kl_weight = self.dual_values()
        info = {"diagnostics/optimism": optimism, "diagnostics/kl_weight": kl_weight}
        return (optimism - kl_weight) * (kl - KL_TARGET), info

    def update(self, batch, rng):
        """SAC's update, then the exploring actor's and the duals'; before it a reset, if due."""
        args = self.args
        # The agent step that this update belongs to, counted from 1.
        agent_step = args.learning_starts + self.n_updates // args.utd + 1
        resets = RESETS[:1] if args.fast else RESETS
        if self.n_updates % args.utd == 0 and agent_step in resets:
            self.reset()
            self.to(rng.device)  # a reset makes them on the CPU
        info = super().update(batch, rng)
        if self.n_updates % args.policy_delay == 0:  # with the actor
            info |= self.descend("explorer", self.explorer_loss, batch, self.draw(batch, rng))
            info |= self.descend("duals", self.dual_loss, info["diagnostics/kl"])
        return info

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [..., O] -> action [..., A], in NumPy: the exploring policy's if rng is given, else
        tanh(mean) of the actor."""
        if rng is None:
            return super().act(obs)
        obs = torch.as_tensor(obs).to(self.log_alpha)[None]
        noise = torch.randn(*obs.shape[:-1], self.action_dim, generator=rng, device=rng.device)
        return self.explore(obs, noise)[0][0].cpu().numpy()


def main(argv=None, **parts):
    return sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    sys.exit(main())
