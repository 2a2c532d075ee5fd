"""The papers' ablations as further flags of a script, and an example of how to extend one.

    python benchmark/ablate.py crossq_sac.py --critic-norm ln --activation elu --critic-width 256
    python benchmark/ablate.py sac_baseline.py --critic-norm brn --target-stats live  # figure 13
    python benchmark/ablate.py sac_baseline.py --tau 1 --activation tanh              # figure 16
    python benchmark/ablate.py crossq_wn_highutd.py --weight-norm none                # WN, figure 5
    python benchmark/ablate.py --probe crossq_sac.py --critic-norm none               # and probe.py
    python benchmark/ablate.py crossq_sac.py --resume runs/NAME

What follows the script's name is the script's own command line with more flags, which are stored in
the run as its own are. A run is named after this program and the script.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
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
import crossq_td3  # noqa: E402
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
BITS = {"float32": 24, "tf32": 11, "bfloat16": 8}  # of the significand, with the implicit first one
Norm = Literal["brn", "bn", "ln", "none"]


class Named:
    """Puts the script into a run's default name: ENV__ablate_SCRIPT__SEED__TIME."""

    def __post_init__(self):
        script = type(self).__bases__[0].__module__
        name = f"{self.env_id}__ablate_{script}__{self.seed}__{time.time():.3f}"
        self.run_name = self.run_name or name.replace("/", "_").replace(":", "_")


# ------------------------------ networks: every script but crossq_wn_highutd.py


@dataclass
class NetworkFlags(Named):
    critic_norm: Norm = "brn"  # ln: layer norm before the activations (figures 9, 10, 13)
    actor_norm: Norm = "brn"  # the same for the actor
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    bn_momentum: float = 0.99  # share of the running statistics that stays (PyTorch: 1 - this)
    products: Literal[tuple(BITS)] = "float32"  # factors are rounded to this; it is not faster


class AblatedMLP(nn.Module):
    """A script's MLP, with its weights, but other norms, another activation, rounded products."""

    def __init__(self, mlp, args, norm, activation="relu"):
        super().__init__()
        if activation == "glu" and args.critic_width % 2:
            sys.exit(f"error: --activation glu halves --critic-width {args.critic_width}")
        self.bf16, self.bits = args.bf16, BITS[args.products]
        self.layer_norm = norm == "ln"
        self.activation = ACTIVATIONS[activation]
        self.weights, self.biases = mlp.weights, mlp.biases
        if activation == "glu":  # half the inputs: LeCun's normal is wider by root 2
            for k in (1, 2):
                weight = self.weights[k].detach()
                self.weights[k] = nn.Parameter(weight[..., : weight.shape[-2] // 2, :] * 2**0.5)
        self.norms = nn.ModuleList()
        for weight in self.weights:
            layer = nn.Identity()
            if norm in ("brn", "bn"):
                shape = (*weight.shape[:-2], 1, weight.shape[-2])
                layer = crossq_sac.BatchRenorm(shape, args.brn_warmup if norm == "brn" else math.inf)
                layer.momentum = args.bn_momentum
            self.norms.append(layer)

    def dense(self, k, x):
        x, w = self.norms[k](x), self.weights[k]
        product = x @ w if self.bits == 24 else RoundedProduct.apply(x, w, self.bits)
        return product + self.biases[k]

    def activate(self, x):
        return self.activation(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)

    def forward(self, *inputs):
        x = self.dense(0, torch.cat(inputs, -1))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.dense(1, self.activate(x))
        return self.dense(2, self.activate(x))


class RoundedProduct(torch.autograd.Function):
    """x @ w, and the two products of its gradient, of rounded factors, summed in float32. It shows
    what products in bfloat16 (AMX processors) or TF32 (GPUs) do to learning."""

    @staticmethod
    def forward(ctx, x, w, bits):
        x, w = rounded(x, bits), rounded(w, bits)
        ctx.save_for_backward(x, w)
        ctx.bits = bits
        return x @ w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        gradient = rounded(gradient, ctx.bits)
        return gradient @ w.mT, x.mT @ gradient, None


def rounded(x, bits):
    """x to the nearest with so many bits of significand, ties to even, still float32. It works on
    the bit pattern, because compilers undo the shorter ways: they drop two casts, and they fuse
    Veltkamp's product and difference."""
    dropped = 24 - bits
    pattern = x.view(torch.int32)
    pattern = pattern + (1 << dropped - 1) - 1 + (pattern >> dropped & 1)
    return (pattern >> dropped << dropped).view(torch.float32)


class Networks:
    """Mixed into a script's Agent: ablated networks, and optimisers of their parameters."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.critic = AblatedMLP(self.critic, args, args.critic_norm, args.activation)
        self.actor = AblatedMLP(self.actor, args, args.actor_norm)
        betas = (args.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, betas, fused=True)


@dataclass
class TD3Args(crossq_td3.Args, NetworkFlags):
    pass


class TD3(Networks, crossq_td3.Agent):
    pass


# ------------------------------ crossq_sac.py: targets, gradients, temperature, replay


@dataclass
class CrossQArgs(crossq_sac.Args, NetworkFlags):
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    q_aggregation: Literal["min", "mean"] = "min"  # over the critics, for target and actor (RLinf)
    entropy_in_target: bool = True  # RLinf's backup_entropy
    max_grad_norm: float = 0.0  # longer gradients are cut to this; 0: none are (RLinf)
    temperature: Literal["exp", "softplus"] = "exp"  # of the parameter that is learnt (RLinf)
    replay: Literal["uniform", "prioritized"] = "uniform"  # proportional (Schaul et al. 2016)


class CrossQ(Networks, crossq_sac.Agent):
    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        if args.temperature == "softplus":
            register_parametrization(self, "log_alpha", LogSoftplus())
            learnt = self.parametrizations.log_alpha.original
            self.alpha_optimizer = Adam([learnt], args.alpha_lr, fused=True)
        if args.max_grad_norm:
            for optimizer in (self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer):
                optimizer.register_step_pre_hook(self.cut_gradients)

    def cut_gradients(self, optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def aggregate(self, q):
        """Over the critics: [n_critics, B] -> [B]."""
        return q.mean(0) if self.args.q_aggregation == "mean" else q.min(0).values

    def actor_q(self, obs, action):
        """What the actor maximises, [B]. probe.py measures its bias."""
        return self.aggregate(self.critic(obs, action).squeeze(-1))

    def critic_loss(self, batch, noise):
        """A prioritised batch has the transitions' weights [B] as its sixth part."""
        obs, action, reward, terminated, next_obs, *weight = batch
        self.actor.eval()
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)

        self.critic.train()
        both_obs = torch.cat([obs, next_obs])
        both_actions = torch.cat([action, next_action])
        q, next_q = self.critic(both_obs, both_actions).squeeze(-1).chunk(2, 1)

        next_value = self.aggregate(next_q)
        if self.args.entropy_in_target:
            next_value = next_value - self.log_alpha.exp() * next_log_prob
        if self.args.bootstrap_at_termination:
            terminated = torch.zeros_like(terminated)
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        error = (q - target).square()
        if weight:
            self.error = error.detach().sqrt().mean(0)  # [B], the new priorities
            error = weight[0] * error
        return 0.5 * error.mean(1).sum(), q.mean()

    def actor_loss(self, obs, noise):
        self.actor.train()
        action, log_prob = self.policy(obs, noise)
        self.critic.eval()
        q = self.actor_q(obs, action)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def update(self, batch, rng):
        """Prioritised: weights by importance before the update, priorities after it."""
        if self.args.replay == "uniform":
            return super().update(batch, rng)
        *batch, probability, index, buffer = batch
        beta = 0.4 + 0.6 * min(1.0, self.n_updates / updates_of_run(self.args))
        weight = (min(buffer.added, len(buffer.rows)) * probability) ** -beta
        info = super().update((*batch, weight / weight.max()), rng)
        buffer.prioritize(index, self.error)
        return info


def updates_of_run(args):
    """The critic's updates in a whole run."""
    return (math.ceil(args.total_timesteps / args.action_repeat) - args.learning_starts) * args.utd


class LogSoftplus(nn.Module):
    """The logarithm of a temperature that is the softplus of what is learnt."""

    def forward(self, learnt):
        return F.softplus(learnt).log()

    def right_inverse(self, log_alpha):
        """log(exp(alpha) - 1), in a form that cannot overflow."""
        alpha = log_alpha.exp()
        return alpha + (-torch.expm1(-alpha)).log()


class PrioritizedReplay(crossq_sac.ReplayBuffer):
    """A row has one column more, its priority: (error + 1e-6) ** 0.6. A new row has the largest
    priority so far. A batch has more parts too: probabilities [n], rows [n] and this buffer."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.widths.append(1)
        self.rows = torch.empty(args.buffer_size, sum(self.widths), device=args.device)
        self.largest = 1.0

    def add(self, obs, action, reward, terminated, next_obs):
        super().add(obs, action, reward, terminated, [*next_obs, self.largest])

    def sample(self, n, rng):
        size = min(self.added, len(self.rows))
        ends = self.rows[:size, -1].double().cumsum(0)
        places = torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64) * ends[-1]
        index = torch.searchsorted(ends, places, right=True).clamp(max=size - 1)
        obs, action, reward, terminated, next_obs, priority = self.rows[index].split(self.widths, -1)
        transitions = obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs
        return *transitions, (priority.squeeze(-1) / ends[-1]).float(), index, self

    def prioritize(self, index, error):
        priority = (error + 1e-6) ** 0.6
        self.rows[index, -1] = priority
        self.largest = max(self.largest, priority.max().item())


def replay_buffer(obs_dim, action_dim, args):
    prioritized = args.replay == "prioritized"
    return (PrioritizedReplay if prioritized else crossq_sac.ReplayBuffer)(obs_dim, action_dim, args)


# ------------------------------ sac_baseline.py: norms, and what they mean for target networks


@dataclass
class SACArgs(sac_baseline.Args, NetworkFlags):
    critic_norm: Norm = "none"  # ln: layer norm before the activations (figures 9, 10, 13)
    actor_norm: Norm = "none"  # the same for the actor
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm
    target_stats: Literal["own", "live"] = "own"  # of a target network: averaged, or the critic's


class SAC(Networks, sac_baseline.Agent):
    """SAC has no modes, which norms need, and moves no running statistics of its targets."""

    def __init__(self, obs_dim, action_dim, args):
        if args.target_stats == "live" and args.critic_norm not in ("brn", "bn"):
            sys.exit("error: --target-stats live needs --critic-norm brn or bn")
        super().__init__(obs_dim, action_dim, args)
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


# ------------------------------ crossq_wn_highutd.py: weight norm, weight decay, rates


@dataclass
class WeightNormArgs(crossq_wn_highutd.Args, Named):
    # "soft" is weight decay of the hidden layers in place of their projection (figure 5); "output"
    # projects the output layer's weights too, but not its bias (the authors' later code).
    weight_norm: Literal["project", "soft", "none", "output"] = "project"
    decay_norms: bool = False  # weight decay of batch norm's scale and bias too (later code)
    # Share of the rates that is left after a linear decay over as many steps of each optimiser as
    # the run has critic updates (later code: 0.1). Actor and temperature take fewer steps.
    lr_end: float = 1.0


class Unprojected(crossq_wn_highutd.MLP):
    def project(self):
        pass


class OutputProjected(crossq_wn_highutd.MLP):
    @torch.no_grad()
    def project(self):
        super().project()
        self.weights[2] /= self.weights[2].square().sum(-2, keepdim=True).sqrt()


MLPS = {"project": crossq_wn_highutd.MLP, "output": OutputProjected}


class WeightNorm(crossq_wn_highutd.Agent):
    def __init__(self, obs_dim, action_dim, args):
        with torch.random.fork_rng([]):  # the weights below are drawn from the same numbers
            super().__init__(obs_dim, action_dim, args)
        MLP = MLPS.get(args.weight_norm, Unprojected)
        sizes = obs_dim + action_dim, args.critic_width, 1, args, (args.n_critics,)
        self.critic = MLP(*sizes)
        self.target_critic = MLP(*sizes).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        for norm in self.target_critic.norms:
            norm.track_running_stats = False
        self.actor = MLP(obs_dim, args.actor_width, 2 * action_dim, args)
        self.critic_optimizer = self.make_optimizer(self.critic, args.critic_lr)
        self.actor_optimizer = self.make_optimizer(self.actor, args.actor_lr)

    def make_optimizer(self, net, lr):
        hidden = [*net.weights[:2], *net.biases[:2]]
        output = [net.weights[2], net.biases[2]]
        decays = {"soft": self.args.weight_norm == "soft", "norms": self.args.decay_norms}
        decay = self.args.weight_decay
        groups = [
            {"params": output, "weight_decay": decay},
            {"params": hidden, "weight_decay": decay * decays["soft"]},
            {"params": [*net.norms.parameters()], "weight_decay": decay * decays["norms"]},
        ]
        return AdamW(groups, lr, fused=True)

    def update(self, batch, rng):
        args, updates = self.args, updates_of_run(self.args)
        actor_steps = self.n_updates // args.policy_delay
        for optimizer, lr, steps in (
            (self.critic_optimizer, args.critic_lr, self.n_updates),
            (self.actor_optimizer, args.actor_lr, actor_steps),
            (self.alpha_optimizer, args.alpha_lr, actor_steps),
        ):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - (1 - args.lr_end) * min(1.0, steps / updates))
        return super().update(batch, rng)


PARTS = {
    "crossq_sac": {"Args": CrossQArgs, "Agent": CrossQ, "Buffer": replay_buffer},
    "crossq_td3": {"Args": TD3Args, "Agent": TD3},
    "sac_baseline": {"Args": SACArgs, "Agent": SAC},
    "crossq_wn_highutd": {"Args": WeightNormArgs, "Agent": WeightNorm},
}


def ablate(script):
    """What to hand to the script's main."""
    if script.__name__ not in PARTS:
        sys.exit(f"error: {script.__name__} is not one of the four scripts")
    return PARTS[script.__name__]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    probed = "--probe" in argv
    argv = [word for word in argv if word != "--probe"]
    script = probe.first_script(__doc__, argv)
    parts = ablate(script)
    if probed:
        parts = parts | probe.probed(script, parts["Agent"])
    script.main(argv[1:], **parts)


if __name__ == "__main__":
    main()
