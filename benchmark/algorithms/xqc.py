"""XQC, the successor of CrossQ + WN (Palenicek et al., ICLR 2026, arXiv 2509.25174).

CrossQ's joint pass, batch norm and weight norm stay. The critics predict a distribution over 101
returns from -5 to 5 and are trained by cross-entropy, as in C51 (Bellemare et al. 2017). Rewards
are scaled so that returns fit in. There are four hidden layers, and the output layer is
weight-normalised too. Two updates per step are enough.

    python benchmark/algorithms/xqc.py --env-id HalfCheetah-v4
    python benchmark/algorithms/xqc.py --env-id dm_control/dog-run-v0

The learning rates fall over the whole run, all alike, so a run that is extended differs from one
that was long from the start. With `--lr-end 0.9593` a run of 50 000 steps on MuJoCo is the
beginning of one of a million. In the authors' code the actor's running statistics move at every
update, here at the actor's alone. Flags, files and errors are those of crossq_wn_highutd.py,
without --weight-decay and with --lr-end.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from tyro.conf import Fixed, Suppress

sys.path.append(str(Path(__file__).resolve().parents[2]))
import crossq_wn_highutd  # noqa: E402

N_ATOMS, LARGEST_ATOM = 101, 5.0
LOG_STD_MIN = -10


@dataclasses.dataclass
class Args(crossq_wn_highutd.Args):
    critic_lr: float = 3e-4  # Adam, at the start
    actor_lr: float = 3e-4  # Adam, at the start
    alpha_lr: float = 3e-4  # Adam, at the start; 0 keeps the temperature at --alpha
    lr_end: float = 0.1  # share of the learning rates that is left at the end of the run
    utd: int = 2  # critic updates per agent step (update-to-data ratio)
    gamma: float = 0.995  # discount (authors: 1 - 5 / agent steps per episode, in [0.95, 0.995])
    entropy_factor: float = 0.5  # target entropy: -this * dim(A)
    weight_decay: Suppress[Fixed[float]] = 0.0  # all weights are projected

    MAY_BE_ZERO = crossq_wn_highutd.Args.MAY_BE_ZERO | {"lr_end"}
    AT_MOST = crossq_wn_highutd.Args.AT_MOST | {"lr_end": 1}

    @staticmethod
    def suite_defaults(env_id):
        dmc, myo = {"action_repeat": 2, "gamma": 0.99}, {"action_repeat": 2, "gamma": 0.95}
        return {"shimmy": dmc, "myosuite": myo}.get(crossq_wn_highutd.suite_of(env_id), {})


class MLP(nn.Module):
    """Norm -> (dense without bias -> norm -> ReLU) x 4 -> dense: [B, n_in] -> [B, n_out]; with
    ensemble=(N,) N networks side by side."""

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

    def forward(self, x):
        x = self.norms[0](x)
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

    def forward(self, x):
        mean, log_std = super().forward(x).chunk(2, -1)
        return torch.cat([mean, log_std.clamp(min=LOG_STD_MIN)], -1)


class ReplayBuffer(crossq_wn_highutd.ReplayBuffer):
    """Hands out rewards divided by the standard deviation of the discounted returns so far.

    A return is that of the steps up to now, not from now on. A time limit does not end it.
    """

    def __init__(self, obs_dim, action_dim, args, device):
        super().__init__(obs_dim, action_dim, args, device)
        self.gamma, self.discounted = args.gamma, 0.0
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # Welford's running variance

    def add(self, obs, action, reward, terminated, next_obs):
        super().add(obs, action, reward, terminated, next_obs)
        self.discounted = self.gamma * self.discounted + float(reward)
        self.count += 1
        change = self.discounted - self.mean
        self.mean += change / self.count
        self.squares += change * (self.discounted - self.mean)
        if terminated:
            self.discounted = 0.0

    def sample(self, n, rng):
        obs, action, reward, terminated, next_obs = super().sample(n, rng)
        std = math.sqrt(self.squares / self.count + 1e-8)
        return obs, action, reward / std, terminated, next_obs


def projected(probs, values):
    """C51's projection onto the atoms: probs [B, K] at values [B, K] -> [B, K] at the atoms.

    A value's probability goes to its two neighbours, the nearer one getting more.
    """
    places = (values.clamp(-LARGEST_ATOM, LARGEST_ATOM) + LARGEST_ATOM) / (2 * LARGEST_ATOM)
    atoms = torch.arange(N_ATOMS, device=values.device)
    distance = (places[..., None] * (N_ATOMS - 1) - atoms).abs()  # [B, K, K]
    return (probs[..., None] * (1 - distance).clamp(min=0)).sum(-2)


class Agent(crossq_wn_highutd.Agent):
    scaled_rewards = True  # so that probe.py does not compare Q with returns

    def make_critic(self):
        """The atoms' logits: [B, O + A] -> [n_critics, B, N_ATOMS]."""
        n_in, args = self.obs_dim + self.action_dim, self.args
        return MLP(n_in, args.critic_width, N_ATOMS, ensemble=(args.n_critics,))

    def make_actor(self):
        return Actor(self.obs_dim, self.args.actor_width, 2 * self.action_dim)

    def make_optimizers(self):
        args = self.args
        return {
            "critic": Adam(self.critic.parameters(), args.critic_lr, fused=True),
            "actor": Adam(self.actor.parameters(), args.actor_lr, fused=True),
            "alpha": Adam([self.log_alpha], args.alpha_lr, fused=True),
        }

    def atoms(self):
        return torch.linspace(-LARGEST_ATOM, LARGEST_ATOM, N_ATOMS, device=self.log_alpha.device)

    def q(self, critic, obs, action):
        """The means of the distributions: [n_critics, B]."""
        logits = critic(torch.cat([obs, action], -1))
        return logits.softmax(-1) @ self.atoms()

    def critic_loss(self, batch, draws):
        """Cross-entropy: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        self.actor.eval()
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, draws["noise"])

        both_obs = torch.cat([obs, next_obs])  # [2B, O]
        both_actions = torch.cat([action, next_action])  # [2B, A]
        pairs = torch.cat([both_obs, both_actions], -1)
        self.target_critic.train()
        with torch.no_grad():
            _, next_logits = self.target_critic(pairs).chunk(2, -2)  # [n_critics, B, K]
        self.critic.train()
        logits, _ = self.critic(pairs).chunk(2, -2)  # [n_critics, B, K]

        # Both critics learn the distribution of the one with the lower mean.
        next_probs = next_logits.softmax(-1)
        lower = (next_probs @ self.atoms()).argmin(0)  # [B]
        next_probs = next_probs[lower, torch.arange(len(lower), device=lower.device)]  # [B, K]
        next_values = self.atoms() - self.alpha() * next_log_prob[:, None]  # [B, K]
        discount = self.args.gamma * (1 - terminated[:, None])
        target = projected(next_probs, reward[:, None] + discount * next_values).detach()
        log_probs = logits.log_softmax(-1)
        loss = -(target * log_probs).sum(-1).mean(-1).sum()
        q = log_probs.exp() @ self.atoms()
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def descend(self, name, loss_fn, *inputs):
        """The learning rates fall linearly over the run's updates."""
        args = self.args
        agent_steps = math.ceil(args.total_timesteps / args.action_repeat) - args.learning_starts
        progress = self.n_updates / (agent_steps * args.utd)
        for group in self.optimizers[name].param_groups:
            group["lr"] = getattr(args, f"{name}_lr") * (1 - (1 - args.lr_end) * progress)
        return super().descend(name, loss_fn, *inputs)


def main(argv=None, **parts):
    own = {"Args": Args, "Agent": Agent, "ReplayBuffer": ReplayBuffer}
    return crossq_wn_highutd.main(argv, **own | parts)


if __name__ == "__main__":
    sys.exit(main())
