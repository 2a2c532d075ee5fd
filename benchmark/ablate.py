"""The papers' ablations as further flags of a script: what would crowd it and teaches less than it costs.

    python benchmark/ablate.py crossq_sac.py --critic-norm ln --activation elu --env-id Hopper-v4 --critic-width 256
    python benchmark/ablate.py sac_baseline.py --critic-norm brn --target-stats live    # and target networks (figure 9)
    python benchmark/ablate.py sac_baseline.py --tau 1 --activation tanh                # no target networks (figure 16)
    python benchmark/ablate.py crossq_wn_highutd.py --weight-norm none                  # CrossQ + WN, figure 5
    python benchmark/ablate.py --probe crossq_sac.py --critic-norm none                 # and benchmark/probe.py as well

Everything after the script's name is its own command line, with the flags of `Ablations` added (of `WeightAblations`
for crossq_wn_highutd.py): they are stored in the run as its own are. Such a run is resumed and evaluated through this
program.
"""

import dataclasses
import math
import sys
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
Norm = Literal["default", "brn", "bn", "ln", "none"]


@dataclasses.dataclass
class Ablations:
    critic_norm: Norm = "default"  # batch renorm, batch norm, layer norm before the activations (figures 8, 9, 13)
    actor_norm: Norm = "default"  # the same for the actor
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    bn_momentum: float = 0.99  # share of the old running statistics kept at an update (PyTorch counts 1 - this)
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm
    target_stats: Literal["own", "live"] = "own"  # of a batch-normalised target network: averaged, or the critic's
    products: Literal["float32", "bfloat16"] = "float32"  # bfloat16: of rounded factors, as an AMX processor computes
    # with --matmul-precision medium, but on any processor and no faster; to see what that does to learning


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the 8 bits of a bfloat16's significand, still float32 (Veltkamp's splitting: up to 1e33). Two casts
    would be faster, so fast that torch.compile leaves them out."""
    y = x * (2**16 + 1)
    return y - (y - x)


class Bfloat16Product(torch.autograd.Function):
    """x @ w, and the two products of its gradient, of factors rounded to bfloat16, summed in float32."""

    @staticmethod
    def forward(ctx, x, w):
        x, w = to_bfloat16(x), to_bfloat16(w)
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, gradient):
        (x, w), gradient = ctx.saved_tensors, to_bfloat16(gradient)
        return gradient @ w.mT, x.mT @ gradient


@dataclasses.dataclass
class WeightAblations:
    weight_norm: Literal["project", "soft", "none", "output"] = "project"  # soft: weight decay of the hidden layers in
    # place of their projection (figure 5); output: the output layer is projected too (the authors' later code)
    decay_norms: bool = False  # weight decay of batch norm's scale and bias too (the authors' later code)
    lr_end: float = 1.0  # share of the learning rates left at the end of a linear decay (the authors' later code: 0.1)


def ablate_weights(script):
    """Extends crossq_wn_highutd.py by the flags of `WeightAblations` and by what they choose; returns it."""
    script_mlp, script_agent = script.MLP, script.Agent

    @dataclasses.dataclass
    class Args(script.Args, WeightAblations):
        pass

    class MLP(script_mlp):
        def __init__(self, n_in, width, n_out, args, ensemble=()):
            MLP.weight_norm = args.weight_norm  # project() is called before an attribute of self could be set
            super().__init__(n_in, width, n_out, args, ensemble)

        @torch.no_grad()
        def project(self):
            if MLP.weight_norm in ("project", "output"):
                super().project()
            if MLP.weight_norm == "output":
                norm = (self.weights[2].square().sum(-2, keepdim=True) + self.biases[2].square()).sqrt()
                self.weights[2] /= norm
                self.biases[2] /= norm

    class Agent(script_agent):
        def __init__(self, obs_dim, action_dim, args):
            super().__init__(obs_dim, action_dim, args)
            for net, optimizer in ((self.critic, self.critic_opt), (self.actor, self.actor_opt)):
                decayed, rest = optimizer.param_groups[:2]
                more = [*net.weights[:2], *net.biases[:2]] if args.weight_norm == "soft" else []
                more += net.norms.parameters() if args.decay_norms else []
                decayed["params"] += more
                rest["params"] = [p for p in rest["params"] if all(p is not q for q in more)]
                for group in optimizer.param_groups:
                    group["initial_lr"] = group["lr"]

        def update(self, batch, rng):
            args = self.args
            total = (args.total_timesteps // args.action_repeat - args.learning_starts) * args.utd
            left = 1 - (1 - args.lr_end) * min(1.0, self.n_updates / total)
            for group in self.critic_opt.param_groups + self.actor_opt.param_groups:
                group["lr"] = group["initial_lr"] * left
            return super().update(batch, rng)

    script.Args, script.MLP, script.Agent = Args, MLP, Agent
    return script


def ablate(script):
    """Extends a loaded script by the flags of `Ablations` and by what they choose; returns it."""
    if hasattr(script.MLP, "project"):
        return ablate_weights(script)
    BatchRenorm = getattr(script, "BatchRenorm", None) or probe.load("crossq_sac.py").BatchRenorm
    default = "brn" if hasattr(script, "BatchRenorm") else "none"
    script_mlp, script_agent, script_add = script.MLP, script.Agent, script.ReplayBuffer.add

    @dataclasses.dataclass
    class Args(script.Args, Ablations):
        pass

    class MLP(script_mlp):
        def __init__(self, n_in, width, n_out, args, ensemble=()):
            super().__init__(n_in, width, n_out, args, ensemble)
            norm = args.critic_norm if ensemble else args.actor_norm  # only the critic is an ensemble
            norm = default if norm == "default" else norm
            self.product = Bfloat16Product.apply if args.products == "bfloat16" else torch.matmul
            self.layer_norm, self.activation = norm == "ln", ACTIVATIONS[args.activation if ensemble else "relu"]
            if self.activation is F.glu:
                script.check(width % 2 == 0, "--activation glu needs an even --critic-width")
                width //= 2
                for k in (1, 2):  # half the inputs: LeCun's normal is wider by the root of 2
                    self.weights[k] = nn.Parameter(self.weights[k].detach()[..., :width, :] * 2**0.5)
            warmup = args.brn_warmup if norm == "brn" else math.inf
            self.norms = nn.ModuleList(
                BatchRenorm((*ensemble, 1, n), args.bn_momentum, warmup) if norm in ("brn", "bn") else nn.Identity()
                for n in (n_in, width, width)
            )

        def forward(self, x):
            x = self.product(self.norms[0](x), self.weights[0]) + self.biases[0]
            for k in (1, 2):
                x = F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x
                x = self.product(self.norms[k](self.activation(x)), self.weights[k]) + self.biases[k]
            return x

    class Agent(script_agent):
        """Sets the modes where the script, SAC without any norm, need not; batch statistics of the target network."""

        def critic_loss(self, *batch):
            self.actor.eval()
            self.target_critic.eval()
            self.critic.train()
            return super().critic_loss(*batch)

        def actor_loss(self, *batch):
            self.actor.train()
            self.critic.eval()
            return super().actor_loss(*batch)

        def update(self, batch, rng):
            info = super().update(batch, rng)
            share = self.args.tau if self.args.target_stats == "own" else 1.0
            for target, live in zip(self.target_critic.buffers(), self.critic.buffers()):
                if live.is_floating_point():
                    target.lerp_(live, share)
            return info

        def act(self, obs, noise):
            self.actor.eval()
            return super().act(obs, noise)

    def add(self, obs, action, reward, done, next_obs):
        script_add(self, obs, action, reward, done and not self.bootstrap_at_termination, next_obs)

    script.Args, script.MLP, script.ReplayBuffer.add = Args, MLP, add
    if default == "none":
        script.Agent = Agent
    train = script.train

    def train_ablated(args, checkpoint):
        script.check(0 <= args.bn_momentum <= 1, f"--bn-momentum is {args.bn_momentum}; it must be >= 0 and <= 1")
        has_target = default == "none" and args.critic_norm in ("brn", "bn")
        script.check(args.target_stats == "own" or has_target, "--target-stats is of a batch-normalised target network")
        script.ReplayBuffer.bootstrap_at_termination = args.bootstrap_at_termination
        return train(args, checkpoint)

    script.train = train_ablated
    return script


def main(argv: list[str]) -> int:
    probed = "--probe" in argv
    argv = [a for a in argv if a != "--probe"]
    if not argv or not argv[0].endswith(".py"):
        print(f"ablate.py: error: the first argument must be a script, not {argv[:1]}\n{__doc__}", file=sys.stderr)
        return 2
    script = ablate(probe.load(argv[0]))
    return (probe.attach(script) if probed else script).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
