"""The papers' ablations as further flags of a script, and an example of how to extend one.
With --probe before the script's name, probe.py measures the run too.

    python benchmark/ablate.py crossq_sac.py --critic-norm ln --activation elu --critic-width 256
    python benchmark/ablate.py sac_baseline.py --critic-norm brn --target-stats live  # figure 13
    python benchmark/ablate.py crossq_wn_highutd.py --weight-norm none                # WN, figure 5
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import probe
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Adam, AdamW

sys.path.append(str(Path(__file__).resolve().parents[1]))
import crossq_sac  # noqa: E402
import crossq_wn_highutd  # noqa: E402
import sac_baseline  # noqa: E402

ACTIVATIONS = {  # the eight of figure 16
    "relu": F.relu,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "sin": torch.sin,
    "elu": F.elu,
    "glu": F.glu,  # halves the width
    "relu-over-max": lambda x: F.relu(x) / (F.relu(x).amax((-2, -1), keepdim=True) + 1e-6),
    "layernormed-relu": lambda x: F.layer_norm(F.relu(x), x.shape[-1:]),
}
Norm = Literal["brn", "bn", "ln", "none"]


@dataclass
class NetworkArgs:
    critic_norm: Norm = "brn"  # ln: layer norm before the activations (figures 9, 10, 13)
    actor_norm: Norm = "brn"  # the same for the actor
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    bn_momentum: float = 0.99  # share of the running statistics that stays (PyTorch: 1 - this)


class AblatedMLP(nn.Module):
    """A script's MLP, with its weights but other norms and another activation."""

    def __init__(self, mlp, args, norm, activation="relu"):
        super().__init__()
        self.args, self.norm, self.activation = args, norm, ACTIVATIONS[activation]
        if activation == "glu":  # half the inputs: LeCun's normal is wider by root 2
            for k in (1, 2):
                half = mlp.weights[k].detach()[..., : args.critic_width // 2, :]
                mlp.weights[k] = nn.Parameter(half * 2**0.5)
        self.norms = nn.ModuleList(self.make_norm(weight) for weight in mlp.weights)
        self.weights, self.biases = mlp.weights, mlp.biases

    def make_norm(self, weight):
        if self.norm in ("ln", "none"):
            return nn.Identity()
        warmup = self.args.brn_warmup if self.norm == "brn" else math.inf
        norm = crossq_sac.BatchRenorm((*weight.shape[:-2], 1, weight.shape[-2]), warmup)
        norm.momentum = self.args.bn_momentum
        return norm

    def forward(self, *inputs):
        x = torch.cat(inputs, -1)
        for k, (w, bias) in enumerate(zip(self.weights, self.biases)):
            if k > 0:
                x = F.layer_norm(x, x.shape[-1:]) if self.norm == "ln" else x
                x = self.activation(x)
            x = self.norms[k](x)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.args.bf16 and k == 1):
                x = x @ w + bias
        return x


def ablate_networks(agent):
    args = agent.args
    agent.critic = AblatedMLP(agent.critic, args, args.critic_norm, args.activation)
    agent.actor = AblatedMLP(agent.actor, args, args.actor_norm)
    betas = (args.adam_beta1, 0.999)
    agent.critic_optimizer = Adam(agent.critic.parameters(), args.critic_lr, betas, fused=True)
    agent.actor_optimizer = Adam(agent.actor.parameters(), args.actor_lr, betas, fused=True)


@dataclass
class CrossQArgs(crossq_sac.Args, NetworkArgs):
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    q_aggregation: Literal["min", "mean"] = "min"  # over the critics, for target and actor (RLinf)
    entropy_in_target: bool = True  # RLinf's backup_entropy
    max_grad_norm: float = 0.0  # longer gradients are cut to this; 0: none are (RLinf)
    temperature: Literal["exp", "softplus"] = "exp"  # of the parameter that is learnt (RLinf)
    # log: log alpha * (entropy - target), as in Stable-Baselines3 and SBX; CrossQ's code: alpha
    temperature_loss: Literal["alpha", "log"] = "alpha"
    replay: Literal["uniform", "prioritized"] = "uniform"  # proportional (Schaul et al. 2016)


class CrossQ(crossq_sac.Agent):
    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        ablate_networks(self)
        if args.temperature == "softplus":
            # log(exp(alpha) - 1) is learnt, in a form that cannot overflow
            nn.init.constant_(self.log_alpha, args.alpha + math.log(-math.expm1(-args.alpha)))
            register_parametrization(self, "log_alpha", LogSoftplus())
        if args.temperature_loss == "log":
            self.alpha_optimizer.register_step_pre_hook(self.divide_by_alpha)
        if args.max_grad_norm:
            for optimizer in (self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer):
                optimizer.register_step_pre_hook(self.cut_gradients)

    def divide_by_alpha(self, optimizer, *_):  # d log(alpha) = d alpha / alpha
        (learnt,) = optimizer.param_groups[0]["params"]
        learnt.grad /= self.log_alpha.exp().detach()

    def cut_gradients(self, optimizer, *_):
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.args.max_grad_norm)

    def aggregate(self, q):  # over the critics: [n_critics, B] -> [B]
        return q.mean(0) if self.args.q_aggregation == "mean" else q.min(0).values

    def actor_q(self, obs, action):  # [B]; probe.py measures its bias
        return self.aggregate(self.critic(obs, action).squeeze(-1))

    def critic_loss(self, batch, noise):
        obs, action, reward, terminated, next_obs, *weight = batch  # [B], if prioritised
        if self.args.bootstrap_at_termination:
            terminated = torch.zeros_like(terminated)
        self.actor.eval()
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)
        self.critic.train()
        both_obs = torch.cat([obs, next_obs])  # [2B, O]
        both_actions = torch.cat([action, next_action])  # [2B, A]
        q, next_q = self.critic(both_obs, both_actions).squeeze(-1).chunk(2, 1)  # [n_critics, B]
        next_value = self.aggregate(next_q)
        if self.args.entropy_in_target:
            next_value = next_value - self.log_alpha.exp() * next_log_prob
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        square = (q - target).square()
        if weight:
            self.error = square.detach().sqrt().mean(0)  # [B], for the priorities
            square = weight[0] * square
        return 0.5 * square.mean(1).sum(), q.mean()

    def actor_loss(self, obs, noise):
        self.actor.train()
        action, log_prob = self.policy(obs, noise)
        self.critic.eval()
        q = self.actor_q(obs, action)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def update(self, batch, rng):
        if self.args.replay == "uniform":
            return super().update(batch, rng)
        *batch, priority, index, buffer = batch
        # Weights by importance. A probability's other factors cancel out.
        weight = priority ** -(0.4 + 0.6 * progress(self.args, self.n_updates))
        info = super().update((*batch, weight / weight.max()), rng)
        buffer.prioritize(index, self.error)
        return info


def progress(args, steps):  # steps of an optimiser over all updates of the critic, at most 1
    agent_steps = math.ceil(args.total_timesteps / args.action_repeat) - args.learning_starts
    return min(1.0, steps / (agent_steps * args.utd))


class LogSoftplus(nn.Module):
    def forward(self, learnt):
        return F.softplus(learnt).log()


class PrioritizedReplay(crossq_sac.ReplayBuffer):
    """A row has one column more, its priority: (error + 1e-6) ** 0.6. A new row has the largest
    priority so far. A batch has more parts too: priorities [n], rows [n] and this buffer."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.widths.append(1)
        self.rows = torch.empty(args.buffer_size, sum(self.widths), device=args.device)
        self.largest = 1.0

    def add(self, obs, action, reward, terminated, next_obs):
        super().add(obs, action, reward, terminated, [*next_obs, self.largest])

    def sample(self, n, rng):
        priorities = self.rows[: self.added, -1].double()
        index = torch.multinomial(priorities, n, True, generator=rng)
        obs, action, *scalars, next_obs, priority = self.rows[index].split(self.widths, -1)
        reward, terminated, priority = (x.squeeze(-1) for x in (*scalars, priority))
        return obs, action, reward, terminated, next_obs, priority, index, self

    def prioritize(self, index, error):
        self.rows[index, -1] = (error + 1e-6) ** 0.6
        self.largest = max(self.largest, self.rows[index, -1].max().item())


@dataclass
class SACArgs(sac_baseline.Args, NetworkArgs):
    critic_norm: Norm = "none"  # ln: layer norm before the activations (figures 9, 10, 13)
    actor_norm: Norm = "none"  # the same for the actor
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm
    target_stats: Literal["own", "live"] = "own"  # of the target's brn or bn; live: the critic's


class SAC(sac_baseline.Agent):  # without norms it has no modes: they are set here
    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        ablate_networks(self)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False).eval()

    def critic_loss(self, batch, noise):
        self.actor.eval()
        self.critic.train()
        return super().critic_loss(batch, noise)

    def actor_loss(self, obs, noise):
        self.actor.train()
        self.critic.eval()
        return super().actor_loss(obs, noise)

    @torch.no_grad()
    def move_target(self):
        super().move_target()
        share = self.args.tau if self.args.target_stats == "own" else 1.0
        for target, live in zip(self.target_critic.buffers(), self.critic.buffers()):
            if live.is_floating_point():
                target.lerp_(live, share)

    def act(self, obs, rng=None):
        self.actor.eval()
        return super().act(obs, rng)


@dataclass
class WeightNormArgs(crossq_wn_highutd.Args):
    # soft: weight decay instead (figure 5); output: its weights too, not its bias (later code)
    weight_norm: Literal["project", "soft", "none", "output"] = "project"
    decay_norms: bool = False  # weight decay of batch norm's scale and bias too (later code)
    lr_end: float = 1.0  # share of the rates at the end of a linear decay (later code: 0.1)


class WeightNorm(crossq_wn_highutd.Agent):
    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        for net in (self.critic, self.actor):
            net.project = partial(project, net, args.weight_norm)  # after each update
            if args.weight_norm == "output":
                net.project()
        self.target_critic.load_state_dict(self.critic.state_dict())

    def make_optimizer(self, net, lr):
        output, hidden = [net.weights[2], net.biases[2]], [*net.weights[:2], *net.biases[:2]]
        decays = True, self.args.weight_norm == "soft", self.args.decay_norms
        groups = []
        for parameters, decay in zip((output, hidden, net.norms.parameters()), decays):
            groups.append({"params": parameters, "weight_decay": self.args.weight_decay * decay})
        return AdamW(groups, lr, fused=True)

    def update(self, batch, rng):
        args, n = self.args, self.n_updates
        fewer = n // args.policy_delay  # the rates fall with each optimiser's own steps
        for name, steps in (("critic", n), ("actor", fewer), ("alpha", fewer)):
            for group in getattr(self, f"{name}_optimizer").param_groups:
                share = 1 - (1 - args.lr_end) * progress(args, steps)
                group["lr"] = getattr(args, f"{name}_lr") * share
        return super().update(batch, rng)


@torch.no_grad()
def project(net, weight_norm):
    if weight_norm in ("project", "output"):
        crossq_wn_highutd.MLP.project(net)
    if weight_norm == "output":
        net.weights[2] /= net.weights[2].square().sum(-2, keepdim=True).sqrt()


def ablate(script):  # -> what to hand to the script's main
    def replay_buffer(*sizes_and_args):
        prioritized = sizes_and_args[-1].replay == "prioritized"
        return (PrioritizedReplay if prioritized else crossq_sac.ReplayBuffer)(*sizes_and_args)

    crossq = {"Args": CrossQArgs, "Agent": CrossQ, "Buffer": replay_buffer}
    sac = {"Args": SACArgs, "Agent": SAC}
    wn = {"Args": WeightNormArgs, "Agent": WeightNorm}
    parts = {"crossq_sac": crossq, "sac_baseline": sac, "crossq_wn_highutd": wn}
    return parts.get(script.__name__) or sys.exit(f"error: no ablations of {script.__name__}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    probed = "--probe" in argv
    argv = [word for word in argv if word != "--probe"]
    script = probe.first_script(__doc__, argv)
    parts = ablate(script)
    if probed:
        parts |= probe.probed(script, parts["Agent"])
    script.main(argv[1:], **parts)


if __name__ == "__main__":
    main()
