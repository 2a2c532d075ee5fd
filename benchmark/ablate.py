"""The papers' ablations as further flags of a script, and an example of how to extend one.

    python benchmark/ablate.py crossq_sac.py --critic-norm ln --activation elu --critic-width 256
    python benchmark/ablate.py sac_baseline.py --critic-norm brn --target-stats live  # figure 13
    python benchmark/ablate.py sac_baseline.py --tau 1 --activation tanh              # figure 16
    python benchmark/ablate.py crossq_wn_highutd.py --weight-norm none                # WN, figure 5
    python benchmark/ablate.py crossq_sac.py --replay prioritized
    python benchmark/ablate.py --probe crossq_sac.py --critic-norm none               # and probe.py

Everything after the script's name is its own command line, with the flags of `Ablations` added, or
of `WeightAblations` for crossq_wn_highutd.py. They are stored in the run as its own are. The run is
named after this program and the script; `ablate.py SCRIPT --resume runs/NAME` goes on with it.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import probe
import torch
import torch.nn.functional as F
from torch import nn

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
Norm = Literal["default", "brn", "bn", "ln", "none"]
Products = Literal[tuple(BITS)]


@dataclasses.dataclass
class Ablations:
    critic_norm: Norm = "default"  # ln: layer norm before the activations (figures 9, 10, 13)
    actor_norm: Norm = "default"  # the same for the actor
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    bn_momentum: float = 0.99  # share of the running statistics that stays (PyTorch: 1 - this)
    target_stats: Literal["own", "live"] = "own"  # of a target network: averaged, or the critic's
    products: Products = "float32"  # factors are rounded to this, on any processor; not faster
    q_aggregation: Literal["min", "mean"] = "min"  # over the critics, for target and actor (RLinf)
    max_grad_norm: float = 0.0  # longer gradients are cut to this; 0: none are (RLinf)
    temperature: Literal["exp", "softplus"] = "exp"  # of the parameter that is learnt (RLinf)


@dataclasses.dataclass
class CrossQAblations(Ablations):
    entropy_in_target: bool = True  # RLinf's backup_entropy
    # Prioritised replay (Schaul et al. 2016), proportional, with the paper's exponents. Prioritised
    # batches have other means and variances, so batch norm sees them too.
    replay: Literal["uniform", "prioritized"] = "uniform"


@dataclasses.dataclass
class BaselineAblations(Ablations):
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm


@dataclasses.dataclass
class WeightAblations:
    # "soft" is weight decay of the hidden layers in place of their projection (figure 5); "output"
    # projects the output layer's weights too, but not its bias (the authors' later code).
    weight_norm: Literal["project", "soft", "none", "output"] = "project"
    decay_norms: bool = False  # weight decay of batch norm's scale and bias too (later code)
    # Share of the critic's learning rate that is left at the end of a linear decay. It counts each
    # optimiser's own steps against the run's critic updates, so the rates of actor and temperature
    # fall by 1 / policy_delay of that (the authors' later code: 0.1).
    lr_end: float = 1.0


def ablate(script):
    """What to hand to script.main: its own classes, extended by flags and by what they choose."""
    return ablate_weights(script) if hasattr(script.MLP, "project") else ablate_norms(script)


def ablate_norms(script):
    """For the scripts of the first paper: norms, activations, products, targets, replay."""
    has_target = not hasattr(script, "BatchRenorm")  # sac_baseline.py
    renorm = (probe.load("crossq_sac.py") if has_target else script).BatchRenorm
    soft = hasattr(script.Agent, "alpha")  # not crossq_td3.py
    is_crossq = soft and not has_target
    flags = BaselineAblations if has_target else CrossQAblations if is_crossq else Ablations

    @dataclasses.dataclass
    class Args(script.Args, flags):
        MAY_BE_ZERO = script.Args.MAY_BE_ZERO | {"bn_momentum", "brn_warmup", "max_grad_norm"}
        AT_MOST = script.Args.AT_MOST | {"bn_momentum": 1}

    class Agent(replayed(script) if is_crossq else script.Agent):
        program = f"ablate_{Path(script.__file__).stem}"

        def __init__(self, obs_dim, action_dim, args):
            if args.activation == "glu" and args.critic_width % 2:
                script.fail("--activation glu needs an even --critic-width, not", args.critic_width)
            normed_target = has_target and args.critic_norm in ("brn", "bn")
            if args.target_stats == "live" and not normed_target:
                script.fail("--target-stats is of sac_baseline.py with --critic-norm brn or bn")
            if args.temperature == "softplus" and not soft:
                script.fail("--temperature softplus: there is no temperature in", script.__file__)
            super().__init__(obs_dim, action_dim, args)

        def reset(self):
            super().reset()
            if self.args.temperature == "softplus":
                with torch.no_grad():
                    alpha = self.args.alpha  # log(exp(alpha) - 1), in a form that cannot overflow
                    self.log_alpha.fill_(alpha + math.log(-math.expm1(-alpha)))

        def alpha(self):
            softplus = self.args.temperature == "softplus"
            return F.softplus(self.log_alpha) if softplus else super().alpha()

        def target_q(self, next_q, draws):
            mean = self.args.q_aggregation == "mean"
            return next_q.mean(0) if mean else super().target_q(next_q, draws)

        def actor_q(self, q):
            return q.mean(0) if self.args.q_aggregation == "mean" else super().actor_q(q)

        def gradients(self, loss_fn, parameters, *inputs):
            gradients, info = super().gradients(loss_fn, parameters, *inputs)
            if longest := self.args.max_grad_norm:
                norm = torch.nn.utils.get_total_norm(gradients)
                gradients = [g * (longest / norm).clamp(max=1) for g in gradients]
            return gradients, info

        def make_critic(self):
            return self.ablated(super().make_critic(), self.args.critic_norm, self.args.activation)

        def make_actor(self):
            return self.ablated(super().make_actor(), self.args.actor_norm)

        def ablated(self, mlp, norm, activation="relu"):
            if norm == "default":
                norm = "none" if has_target else "brn"

            def make_norm(shape):
                if norm not in ("brn", "bn"):
                    return nn.Identity()
                layer = renorm(shape, self.args.brn_warmup if norm == "brn" else math.inf)
                layer.momentum = self.args.bn_momentum
                return layer

            return AblatedMLP(mlp, make_norm, norm == "ln", activation, BITS[self.args.products])

        def critic_loss(self, batch, draws):
            if self.args.bootstrap_at_termination:
                obs, action, reward, terminated, *rest = batch
                batch = obs, action, reward, torch.zeros_like(terminated), *rest
            return super().critic_loss(batch, draws)

    parts = {"Args": Args, "Agent": with_modes(Agent) if has_target else Agent}
    return parts | ({"ReplayBuffer": replay_of(script)} if is_crossq else {})


def replayed(script):
    """CrossQ's agent with a weight per transition, and with the choice to leave out entropy."""

    class ReplayedAgent(script.Agent):
        def critic_loss(self, batch, draws):
            obs, action, reward, terminated, next_obs, *weight = batch
            if not weight and self.args.entropy_in_target:
                return super().critic_loss(batch, draws)
            self.actor.eval()
            with torch.no_grad():
                next_action, next_log_prob = self.policy(next_obs, draws["noise"])
            self.critic.train()
            both = torch.cat([obs, next_obs]), torch.cat([action, next_action])
            q, next_q = self.q(self.critic, *both).chunk(2, -1)
            next_value = self.target_q(next_q, draws)
            if self.args.entropy_in_target:
                next_value = next_value - self.alpha() * next_log_prob
            target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
            error = q - target  # [n_critics, B]
            weight = weight[0] if weight else torch.ones_like(reward)
            loss = 0.5 * (weight * error.square()).mean(-1).sum()
            info = {"losses/critic": loss, "diagnostics/q_mean": q.mean()}
            return loss, info | {"error": error.abs().mean(0)}

        def update(self, batch, rng):
            if self.args.replay == "uniform":
                info = super().update(batch, rng)
                info.pop("error", None)
                return info
            *batch, probability, index, buffer = batch
            args = self.args
            agent_steps = math.ceil(args.total_timesteps / args.action_repeat)
            updates = (agent_steps - args.learning_starts) * args.utd  # in the whole run
            beta = 0.4 + 0.6 * min(1.0, self.n_updates / updates)
            weight = (buffer.size * probability) ** -beta  # of importance sampling
            info = super().update((*batch, weight / weight.max()), rng)
            buffer.prioritize(index, info.pop("error"))
            return info

    return ReplayedAgent


def replay_of(script):
    """The replay buffer that --replay asks for."""

    class PrioritizedReplay(script.ReplayBuffer):
        """A row has one column more, its priority: (error + 1e-6) ** 0.6. A new one has the largest
        so far. A batch has more parts too: probabilities [n], rows [n] and this buffer."""

        def __init__(self, obs_dim, action_dim, args, device):
            super().__init__(obs_dim, action_dim, args, device)
            self.widths.append(1)
            self.rows = torch.empty(args.buffer_size, sum(self.widths), device=device)
            self.largest = 1.0

        def add(self, obs, action, reward, terminated, next_obs):
            super().add(obs, action, reward, terminated, [*next_obs, self.largest])

        def sample(self, n, rng):
            ends = self.rows[: self.size, -1].double().cumsum(0)
            places = torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64) * ends[-1]
            index = torch.searchsorted(ends, places, right=True).clamp(max=self.size - 1)
            obs, action, *scalars, next_obs, priority = self.rows[index].split(self.widths, -1)
            probability = (priority.squeeze(-1) / ends[-1]).float()
            reward, terminated = (scalar.squeeze(-1) for scalar in scalars)
            return obs, action, reward, terminated, next_obs, probability, index, self

        def prioritize(self, index, error):
            priority = (error + 1e-6) ** 0.6
            self.rows[index, -1] = priority
            self.largest = max(self.largest, priority.max().item())

    def make(obs_dim, action_dim, args, device):
        prioritized = args.replay == "prioritized"
        buffer = PrioritizedReplay if prioritized else script.ReplayBuffer
        return buffer(obs_dim, action_dim, args, device)

    return make


def with_modes(Agent):
    """SAC's agent, whose networks may have norms now: their modes, and the target's statistics."""

    class NormedAgent(Agent):
        def critic_loss(self, batch, draws):
            self.actor.eval()
            self.target_critic.eval()
            self.critic.train()
            return super().critic_loss(batch, draws)

        def actor_loss(self, batch, draws):
            self.actor.train()
            self.critic.eval()
            return super().actor_loss(batch, draws)

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

    return NormedAgent


class AblatedMLP(nn.Module):
    """A script's MLP, its weights, with other norms, another activation or rounded products."""

    def __init__(self, mlp, make_norm, layer_norm, activation, bits):
        super().__init__()
        self.layer_norm, self.bits = layer_norm, bits
        self.activation = ACTIVATIONS[activation]
        if activation == "glu":  # halves the inputs of a layer: LeCun's normal is wider by root 2
            for k in (1, 2):
                weight = mlp.weights[k].detach()
                mlp.weights[k] = nn.Parameter(weight[..., : weight.shape[-2] // 2, :] * 2**0.5)
        shapes = [(*weight.shape[:-2], 1, weight.shape[-2]) for weight in mlp.weights]
        self.norms = nn.ModuleList(make_norm(shape) for shape in shapes)
        self.weights, self.biases = mlp.weights, mlp.biases

    def product(self, x, w):
        return x @ w if self.bits == 24 else RoundedProduct.apply(x, w, self.bits)

    def forward(self, x):
        x = self.product(self.norms[0](x), self.weights[0]) + self.biases[0]
        for k in (1, 2):
            x = F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x
            x = self.product(self.norms[k](self.activation(x)), self.weights[k]) + self.biases[k]
        return x


class RoundedProduct(torch.autograd.Function):
    """x @ w, and the two products of its gradient, of rounded factors, summed in float32.

    It shows what products in bfloat16 (AMX processors) or TF32 (GPUs) do to learning.
    """

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
    """x to the nearest with so many bits of significand, ties to even, still float32.

    It works on the bit pattern, because compilers undo the shorter ways: they drop two casts, and
    where they fuse a product with a difference, as on CUDA, Veltkamp's splitting returns x itself.
    """
    dropped = 24 - bits
    pattern = x.view(torch.int32)
    pattern = pattern + (1 << dropped - 1) - 1 + (pattern >> dropped & 1)
    return (pattern >> dropped << dropped).view(torch.float32)


def ablate_weights(script):
    """For crossq_wn_highutd.py: weight normalisation, weight decay, learning rates."""

    @dataclasses.dataclass
    class Args(script.Args, WeightAblations):
        MAY_BE_ZERO = script.Args.MAY_BE_ZERO | {"lr_end"}
        AT_MOST = script.Args.AT_MOST | {"lr_end": 1}

    class Unprojected(script.MLP):
        def project(self):
            pass

    class OutputProjected(script.MLP):
        @torch.no_grad()
        def project(self):
            super().project()
            self.weights[2] /= self.weights[2].square().sum(-2, keepdim=True).sqrt()

    mlps = {"project": script.MLP, "output": OutputProjected}
    mlps |= {"soft": Unprojected, "none": Unprojected}

    class Agent(script.Agent):
        program = f"ablate_{Path(script.__file__).stem}"

        def make_critic(self):
            args, n_in = self.args, self.obs_dim + self.action_dim
            make = mlps[args.weight_norm]
            return make(n_in, args.critic_width, 1, ensemble=(args.n_critics,))

        def make_actor(self):
            make = mlps[self.args.weight_norm]
            return make(self.obs_dim, self.args.actor_width, 2 * self.action_dim)

        def make_optimizers(self):
            optimizers = super().make_optimizers()
            for name, net in (("critic", self.critic), ("actor", self.actor)):
                decayed, rest = optimizers[name].param_groups
                more = []
                if self.args.weight_norm == "soft":
                    more += [*net.weights[:2], *net.biases[:2]]
                if self.args.decay_norms:
                    more += net.norms.parameters()
                decayed["params"] += more
                rest["params"] = [p for p in rest["params"] if all(p is not q for q in more)]
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["initial_lr"] = group["lr"]
            return optimizers

        def descend(self, name, loss_fn, *inputs):
            args, steps = self.args, self.n_updates  # steps of this optimiser so far
            if name != "critic":  # after the critic's, so n_updates counts the present update
                steps = self.n_updates // args.policy_delay - 1
            agent_steps = math.ceil(args.total_timesteps / args.action_repeat)
            updates = (agent_steps - args.learning_starts) * args.utd  # of the critic, in the run
            left = 1 - (1 - args.lr_end) * min(1.0, steps / updates)
            for group in self.optimizers[name].param_groups:
                group["lr"] = group["initial_lr"] * left
            return super().descend(name, loss_fn, *inputs)

    return {"Args": Args, "Agent": Agent}


def main(argv):
    probed = "--probe" in argv
    argv = [a for a in argv if a != "--probe"]
    script = probe.first_script("ablate.py", __doc__, argv)
    if not hasattr(script, "train"):
        print(f"ablate.py: error: {argv[0]} is not one of the four scripts", file=sys.stderr)
        return 2
    parts = ablate(script)
    if probed:
        parts["evaluate"] = probe.probed(script)
    return script.main(argv[1:], **parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
