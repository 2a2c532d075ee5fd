"""XQC, the successor of CrossQ + WN (Palenicek et al., ICLR 2026, arXiv 2509.25174).

CrossQ's joint pass, batch norm and weight norm stay. The critics predict a distribution over 101
returns from -5 to 5 and are trained by cross-entropy, as in C51 (Bellemare et al. 2017). Rewards
are scaled so that returns fit in. There are four hidden layers, and the output layer is
weight-normalised too. Two updates per step are enough.

    python benchmark/algorithms/xqc.py --env-id HalfCheetah-v4
    python benchmark/algorithms/xqc.py --total-timesteps 50000 --lr-end 0.9593  # of a million

On DeepMind Control the authors have `--action-repeat 2 --gamma 0.99`, and on MyoSuite
`--action-repeat 2 --gamma 0.95`. The learning rates fall over the whole run, so a run that is
extended differs from one that was long from the start. The second command is the beginning of a run
of a million steps. In the authors' code the actor's running statistics move at every update. Here
they move at the actor's alone. Other flags and files are those of crossq_wn_highutd.py.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from tyro.conf import Fixed, Suppress

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_wn_highutd  # noqa: E402

N_ATOMS, LARGEST_ATOM = 101, 5.0
LOG_STD_MIN = -10


@dataclass
class Args(crossq_wn_highutd.Args):
    critic_lr: float = 3e-4  # Adam, at the start
    actor_lr: float = 3e-4  # Adam, at the start
    alpha_lr: float = 3e-4  # Adam, of the temperature, at the start
    lr_end: float = 0.1  # share of the learning rates that is left at the end of the run
    utd: int = 2  # critic updates per agent step (update-to-data ratio)
    gamma: float = 0.995  # discount (authors: 1 - 5 / agent steps per episode, in [0.95, 0.995])
    entropy_factor: float = 0.5  # target entropy: -this * dim(A)
    weight_decay: Suppress[Fixed[float]] = 0.0  # all weights are projected
    bf16: Suppress[Fixed[bool]] = False


class MLP(nn.Module):
    """Norm -> (dense without bias -> norm -> ReLU) x 4 -> dense: [B, n_in], in one or more parts ->
    [B, n_out]. With ensemble=(N,) it is N networks side by side: -> [N, B, n_out]."""

    def __init__(self, n_in, width, n_out, ensemble=()):
        super().__init__()
        sizes = [n_in, *[width] * 4, n_out]
        self.weights = nn.ParameterList()
        for n, m in zip(sizes, sizes[1:]):
            weight = torch.empty(*ensemble, n, m)
            for matrix in weight.view(-1, n, m):
                nn.init.orthogonal_(matrix)
            self.weights.append(weight)
        norm = crossq_wn_highutd.BatchNorm
        self.norms = nn.ModuleList(norm((*ensemble, 1, n)) for n in sizes[:-1])
        self.bias = nn.Parameter(torch.zeros(*ensemble, 1, n_out))
        self.project()

    def forward(self, *inputs):
        x = self.norms[0](torch.cat(inputs, -1))
        for weight, norm in zip(self.weights[:-1], self.norms[1:]):
            x = norm(x @ weight).relu()
        return x @ self.weights[-1] + self.bias

    @torch.no_grad()
    def project(self):
        """Weight normalisation: each neuron's weights get norm 1, the outputs' too."""
        for weight in self.weights:
            weight /= weight.norm(dim=-2, keepdim=True)


class Actor(MLP):
    """Mean and log std [B, 2A]; the smallest log std is larger than in crossq_wn_highutd.py."""

    def forward(self, obs):
        mean, log_std = super().forward(obs).chunk(2, -1)
        return torch.cat([mean, log_std.clamp(min=LOG_STD_MIN)], -1)


class ReplayBuffer(crossq_wn_highutd.ReplayBuffer):
    """Hands out rewards divided by the standard deviation of the discounted returns so far. A
    return is that of the steps up to now, not from now on. A time limit does not end it."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.gamma, self.discounted = args.gamma, 0.0
        self.mean, self.squares = 0.0, 0.0  # Welford's running variance

    def add(self, obs, action, reward, terminated, next_obs):
        super().add(obs, action, reward, terminated, next_obs)
        self.discounted = self.gamma * self.discounted + float(reward)
        change = self.discounted - self.mean
        self.mean += change / self.added
        self.squares += change * (self.discounted - self.mean)
        if terminated:
            self.discounted = 0.0

    def sample(self, n, rng):
        obs, action, reward, terminated, next_obs = super().sample(n, rng)
        std = math.sqrt(self.squares / self.added + 1e-8)
        return obs, action, reward / std, terminated, next_obs


def projected(probs, values):
    """C51's projection onto the atoms: probs [B, K] at values [B, K] -> [B, K] at the atoms. A
    value's probability goes to its two neighbours, the nearer one getting more."""
    places = (values.clamp(-LARGEST_ATOM, LARGEST_ATOM) + LARGEST_ATOM) / (2 * LARGEST_ATOM)
    atoms = torch.arange(N_ATOMS, device=values.device)
    distance = (places[..., None] * (N_ATOMS - 1) - atoms).abs()  # [B, K, K]
    return (probs[..., None] * (1 - distance).clamp(min=0)).sum(-2)


class Agent(crossq_wn_highutd.Agent):
    scaled_rewards = True  # so that probe.py does not compare Q with returns

    def __init__(self, obs_dim, action_dim, args):
        nn.Module.__init__(self)  # not crossq_wn_highutd.py's networks
        self.args = args
        self.action_dim = action_dim
        self.target_entropy = -args.entropy_factor * action_dim
        self.n_updates = 0
        sizes = obs_dim + action_dim, args.critic_width, N_ATOMS, (args.n_critics,)
        self.critic = MLP(*sizes)  # the atoms' logits [n_critics, B, K]
        self.target_critic = MLP(*sizes).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor = Actor(obs_dim, args.actor_width, 2 * action_dim)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, fused=True)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr, fused=True)

    def atoms(self):
        return torch.linspace(-LARGEST_ATOM, LARGEST_ATOM, N_ATOMS, device=self.log_alpha.device)

    def critic_loss(self, batch, noise):
        """Cross-entropy: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        self.actor.eval()
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)

        # The joint pass of both networks, in training mode.
        self.critic.train()
        self.target_critic.train()
        both_obs = torch.cat([obs, next_obs])  # [2B, O]
        both_actions = torch.cat([action, next_action])  # [2B, A]
        with torch.no_grad():
            _, next_logits = self.target_critic(both_obs, both_actions).chunk(2, 1)
        logits, _ = self.critic(both_obs, both_actions).chunk(2, 1)  # [n_critics, B, K]

        # Both critics learn the distribution of the one with the lower mean.
        next_probs = next_logits.softmax(-1)
        lower = (next_probs @ self.atoms()).argmin(0)  # [B]
        next_probs = next_probs[lower, torch.arange(len(lower), device=lower.device)]  # [B, K]
        next_values = self.atoms() - self.log_alpha.exp() * next_log_prob[:, None]  # [B, K]
        discount = self.args.gamma * (1 - terminated[:, None])
        target = projected(next_probs, reward[:, None] + discount * next_values).detach()
        log_probs = logits.log_softmax(-1)
        q = log_probs.exp() @ self.atoms()
        return -(target * log_probs).sum(-1).mean(1).sum(), q.mean()

    def actor_q(self, obs, action):
        """What the actor maximises, the lower of the distributions' means: [B]."""
        return (self.critic(obs, action).softmax(-1) @ self.atoms()).min(0).values

    def actor_loss(self, obs, noise):
        """Minus the soft value, Q - alpha * log-prob; and the policy's entropy."""
        self.actor.train()
        action, log_prob = self.policy(obs, noise)
        self.critic.eval()
        q = self.actor_q(obs, action)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def update(self, batch, rng):
        """CrossQ + WN's, with learning rates that fall linearly over the run's updates."""
        args = self.args
        agent_steps = math.ceil(args.total_timesteps / args.action_repeat) - args.learning_starts
        for optimizer, lr, n in (
            (self.critic_optimizer, args.critic_lr, self.n_updates),
            (self.actor_optimizer, args.actor_lr, self.n_updates + 1),  # one critic update later
            (self.alpha_optimizer, args.alpha_lr, self.n_updates + 1),
        ):
            share = n / (agent_steps * args.utd)
            optimizer.param_groups[0]["lr"] = lr * (1 - (1 - args.lr_end) * share)
        return super().update(batch, rng)


def main(argv=None, **parts):
    crossq_wn_highutd.main(argv, **{"Args": Args, "Agent": Agent, "Buffer": ReplayBuffer} | parts)


if __name__ == "__main__":
    main()
