"""CrossQ + WN, in one file (Palenicek et al., NeurIPS 2025, arXiv 2502.07523).

CrossQ for many updates per step. Batch norm makes a layer blind to the scale of the weights before
it; these tend to grow, and the same step turns a longer vector less. So each neuron's weights are
projected back to norm 1 after every update. Target networks return, with CrossQ's joint pass.

    python crossq_wn_highutd.py --env-id dm_control/dog-walk-v0   # UTD 5
    python crossq_wn_highutd.py --env-id Walker2d-v4 --utd 2 --critic-width 256  # for a CPU
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.2.3", "mujoco==3.17.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "numpy==2.4.6; python_version >= '3.11'",
#   "numpy==2.2.6; python_version < '3.11'"]
# ///
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.optim import AdamW
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_STD_MIN, LOG_STD_MAX = -20, 2
TRUNCATED_NORMAL_STD = 0.87962566103423978  # of a standard normal cut off at -2 and 2
COMPILE_AFTER = {"on": 0, "auto": 2000, "off": math.inf}  # updates
LONGEST_EPISODE = 100_000  # environment steps; where nothing else ends an episode, this does


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # Gymnasium id, or your own: my_module:MyEnv-v0
    seed: int = 1  # of networks, exploration and environment
    total_timesteps: int = 1_000_000  # environment steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    critic_width: int = 512  # units per hidden layer
    actor_width: int = 256  # units per hidden layer
    n_critics: int = 2  # Q-functions
    critic_lr: float = 1e-4  # AdamW (paper's second version: 3e-4)
    actor_lr: float = 1e-4  # AdamW (second version: 3e-4)
    alpha_lr: float = 1e-4  # AdamW, of the temperature; 0 keeps it at --alpha
    weight_decay: float = 0.01  # AdamW, of the output layers alone
    policy_delay: int = 3  # critic updates per actor update
    tau: float = 0.005  # share of the critic that its target takes per update; 1: no target
    utd: int = 5  # critic updates per agent step (update-to-data ratio; paper: 1, 2, 5, 10, 20)
    batch_size: int = 256  # transitions
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 5000  # random agent steps before the first update
    gamma: float = 0.99  # discount (Swimmer: 0.9999)
    alpha: float = 0.01  # initial temperature (later code; the paper's 1 falls too slowly: README)
    entropy_factor: float = 1.0  # target entropy: -this * dim(A) (second version: 0.5)
    action_repeat: int = 1  # environment steps per agent step
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # deterministic episodes per evaluation
    run_name: str | None = None  # folder under runs/; default ENV__PROGRAM__SEED__TIME
    checkpoint_every: int = 25_000  # environment steps between checkpoints
    resume: str | None = None  # runs/NAME: go on from its checkpoint
    evaluate: str | None = None  # runs/NAME: evaluate its policy and exit
    track: bool = False  # log to Weights & Biases too (needs wandb)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: after 2000 updates
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # high: TF32 on CUDA

    MAY_BE_ZERO = {"seed", "alpha_lr", "weight_decay", "tau", "learning_starts", "gamma"}
    AT_MOST = {"gamma": 1, "tau": 1}
    MAY_CHANGE = {"total_timesteps", "eval_every", "eval_episodes"}  # by a resume
    MAY_CHANGE |= {"checkpoint_every", "device", "compile", "track", "resume", "evaluate"}

    @staticmethod
    def suite_defaults(env_id):
        """What differs on DeepMind Control and MyoSuite."""
        dmc, myo = {"action_repeat": 2}, {"action_repeat": 2, "gamma": 0.95}
        return {"shimmy": dmc, "myosuite": myo}.get(suite_of(env_id), {})


# ---------------------------------------------------------------------------------- the algorithm


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of x [..., B, F]; `shape` is (1, F), or (N, 1, F) for N
    networks side by side. track_running_stats = False freezes the running statistics."""

    momentum, eps, track_running_stats = 0.99, 1e-3, True

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x):
        if not self.training:
            running_std = (self.running_var + self.eps).sqrt()
            return (x - self.running_mean) * (self.scale / running_std) + self.bias
        mean = x.mean(-2, keepdim=True)
        var = (x - mean).square().mean(-2, keepdim=True)  # biased, for the running average too
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 1 - self.momentum)
                self.running_var.lerp_(var, 1 - self.momentum)
        return (x - mean) * (self.scale / (var + self.eps).sqrt()) + self.bias


class MLP(nn.Module):
    """Norm -> (dense -> ReLU -> norm) x 2 -> dense: [B, n_in] -> [B, n_out].

    With ensemble=(N,) it is N networks side by side: [B, n_in] -> [N, B, n_out].
    """

    def __init__(self, n_in, width, n_out, ensemble=()):
        super().__init__()
        self.norms = nn.ModuleList()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for n, m in ((n_in, width), (width, width), (width, n_out)):
            std = n**-0.5 / TRUNCATED_NORMAL_STD  # LeCun normal, as in CrossQ's code
            weight = torch.empty(*ensemble, n, m)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            self.norms.append(BatchNorm((*ensemble, 1, n)))
            self.weights.append(weight)
            self.biases.append(torch.zeros(*ensemble, 1, m))
        self.project()

    def forward(self, x):
        x = self.norms[0](x) @ self.weights[0] + self.biases[0]
        x = self.norms[1](x.relu()) @ self.weights[1] + self.biases[1]
        return self.norms[2](x.relu()) @ self.weights[2] + self.biases[2]

    @torch.no_grad()
    def project(self):
        """Weight normalisation: each hidden neuron's weights and bias get, together, norm 1."""
        for weight, bias in zip(self.weights[:2], self.biases[:2]):
            norm = (weight.square().sum(-2, keepdim=True) + bias.square()).sqrt()  # [..., 1, m]
            weight /= norm
            bias /= norm


class Agent(nn.Module):
    """Networks, optimisers, losses and updates.

    O, A and B are the sizes of an observation, an action and a batch. Actions are in [-1, 1].
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.obs_dim, self.action_dim, self.args = obs_dim, action_dim, args
        self.target_entropy = -args.entropy_factor * action_dim
        self.n_updates = 0
        self.reset()

    def reset(self):
        """Fresh networks and optimisers. Algorithms with resets call it again."""
        self.critic = self.make_critic()
        self.target_critic = self.make_critic()
        self.target_critic.load_state_dict(self.critic.state_dict())
        for norm in self.target_critic.norms:
            norm.track_running_stats = False  # never used: see critic_loss
        self.actor = self.make_actor()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(self.args.alpha)))
        self.optimizers = self.make_optimizers()

    def make_critic(self):
        """All Q-functions at once: [B, O + A] -> [n_critics, B, 1]."""
        n_in, args = self.obs_dim + self.action_dim, self.args
        return MLP(n_in, args.critic_width, 1, ensemble=(args.n_critics,))

    def make_actor(self):
        """The Gaussian's mean and log std: [B, O] -> [B, 2A]."""
        return MLP(self.obs_dim, self.args.actor_width, 2 * self.action_dim)

    def make_optimizers(self):
        """Keyed by name. Only the output layers decay: nothing else holds their norm."""
        args, optimizers = self.args, {}
        nets = ("critic", self.critic, args.critic_lr), ("actor", self.actor, args.actor_lr)
        for name, net, lr in nets:
            output = {"params": [net.weights[2], net.biases[2]], "weight_decay": args.weight_decay}
            rest = {"params": [*net.weights[:2], *net.biases[:2], *net.norms.parameters()]}
            optimizers[name] = AdamW([output, rest], lr, weight_decay=0.0, fused=True)
        alpha = AdamW([self.log_alpha], args.alpha_lr, weight_decay=0.0, fused=True)
        return optimizers | {"alpha": alpha}

    def policy(self, obs, noise):
        """A tanh-squashed Gaussian: obs [B, O], noise [B, A] -> action [B, A], log-prob [B]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # Minus log(1 - tanh(u)^2), for the change of variables, in a form that stays finite.
        log_prob = log_prob - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)

    def q(self, critic, obs, action):
        """obs [B, O], action [B, A] -> the Q of every critic [n_critics, B]."""
        return critic(torch.cat([obs, action], -1)).squeeze(-1)

    def alpha(self):
        """The temperature; learnt as its logarithm, so positive."""
        return self.log_alpha.exp()

    def target_q(self, next_q, draws):
        """From [n_critics, B] to the target's [B]; subclasses use `draws`, see draw."""
        return next_q.min(0).values

    def actor_q(self, q):
        """From [n_critics, B] to what the actor maximises [B]."""
        return q.min(0).values

    def critic_loss(self, batch, draws):
        """Half the squared Bellman error: mean over the batch, sum over the critics."""
        obs, action, reward, terminated, next_obs = batch
        self.actor.eval()  # not trained here: it uses its running statistics
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, draws["noise"])

        # CrossQ's joint pass: one forward of 2B rows normalises both halves by the mean and
        # variance of their mixture. The target network makes the same pass, in training mode too,
        # so that this batch normalises it; its running statistics are never used.
        both_obs = torch.cat([obs, next_obs])  # [2B, O]
        both_actions = torch.cat([action, next_action])  # [2B, A]
        self.target_critic.train()
        with torch.no_grad():
            _, next_q = self.q(self.target_critic, both_obs, both_actions).chunk(2, -1)
        self.critic.train()
        q, _ = self.q(self.critic, both_obs, both_actions).chunk(2, -1)  # [n_critics, B]

        next_value = self.target_q(next_q, draws) - self.alpha() * next_log_prob
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()  # [B]
        loss = 0.5 * (q - target).square().mean(-1).sum()
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def actor_loss(self, batch, draws):
        """The soft value, Q - alpha * log-prob, negated."""
        obs = batch[0]
        self.actor.train()
        action, log_prob = self.policy(obs, draws["noise"])
        self.critic.eval()
        q = self.q(self.critic, obs, action)  # [n_critics, B]
        loss = (self.alpha().detach() * log_prob - self.actor_q(q)).mean()
        return loss, {"losses/actor": loss, "diagnostics/entropy": -log_prob.mean()}

    def alpha_loss(self, entropy):
        """Raises the temperature while the policy's entropy is below its target."""
        alpha = self.alpha()
        return alpha * (entropy - self.target_entropy), {"diagnostics/alpha": alpha}

    def draw(self, batch, rng):
        """The policy's noise [B, A]; not drawn in compiled code, which takes no generator."""
        return {"noise": torch.randn(batch[1].shape, generator=rng, device=rng.device)}

    def update(self, batch, rng):
        """A critic update and, every policy_delay-th time, an actor update; returns scalars."""
        info = self.descend("critic", self.critic_loss, batch, self.draw(batch, rng))
        self.critic.project()
        self.move_target()
        self.n_updates += 1
        if self.n_updates % self.args.policy_delay == 0:
            info |= self.descend("actor", self.actor_loss, batch, self.draw(batch, rng))
            self.actor.project()
            info |= self.descend("alpha", self.alpha_loss, info["diagnostics/entropy"])
        return info

    @torch.no_grad()
    def move_target(self):
        """The target network follows the critic by the share tau (Polyak averaging)."""
        for target, source in zip(self.target_critic.parameters(), self.critic.parameters()):
            target.lerp_(source, self.args.tau)

    def descend(self, name, loss_fn, *inputs):
        """One step of the named optimiser. Its own parameters alone get gradients, so no other
        network needs freezing."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients, info = self.gradients(loss_fn, parameters, *inputs)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.contiguous()  # CUDA refuses padding, which compiling adds
        optimizer.step()
        return info

    def gradients(self, loss_fn, parameters, *inputs):
        """The part of a step that is compiled."""
        loss, info = loss_fn(*inputs)
        gradients = torch.autograd.grad(loss, parameters)
        return gradients, {name: scalar.detach() for name, scalar in info.items()}

    def random_action(self, rng):
        """Uniform in [-1, 1]: [A]."""
        return torch.rand(self.action_dim, generator=rng, device=rng.device).cpu().numpy() * 2 - 1

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [..., O] -> action [..., A], in NumPy: sampled if rng is given, else tanh(mean)."""
        self.actor.eval()
        obs = torch.as_tensor(obs).to(self.log_alpha)  # its precision and device
        noise = torch.zeros(1, *obs.shape[:-1], self.action_dim, device=obs.device)
        if rng is not None:
            noise.normal_(generator=rng)
        return self.policy(obs[None], noise)[0][0].cpu().numpy()


class ReplayBuffer:
    """The last --buffer-size transitions, float32, on the device; a row is a whole transition."""

    def __init__(self, obs_dim, action_dim, args, device):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(args.buffer_size, sum(self.widths), device=device)
        self.position, self.size = 0, 0

    def add(self, obs, action, reward, terminated, next_obs):
        row = np.hstack([obs, action, reward, terminated, next_obs], dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row)
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, n, rng):
        """n rows with replacement: obs [n, O], action [n, A], reward, terminated [n], next_obs."""
        index = torch.randint(self.size, (n,), generator=rng, device=self.rows.device)
        obs, action, reward, terminated, next_obs = self.rows[index].split(self.widths, -1)
        return obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs


# --------------------------------------------------------------------------------------- training


def train(run, eval_env, evaluate):
    """Evaluate, act, store, update, until the steps are done or a signal comes."""
    args, agent, buffer, rng = run.args, run.agent, run.buffer, run.rng
    compile_at = max(COMPILE_AFTER[args.compile], agent.n_updates)
    while not run.signals:
        if run.due(args.eval_every) and run.step > run.evaluated:
            run.log_evaluation(evaluate(agent, eval_env, run.step, run.folder))
        if run.step >= args.total_timesteps:
            break

        learning = run.step >= args.learning_starts * args.action_repeat
        action = agent.act(run.obs, rng) if learning else agent.random_action(rng)
        next_obs, reward, terminated, truncated, info = run.env.step(action)
        # `terminated`, not `terminated or truncated`: a time limit does not end the task. What
        # would come after it still has a value, so the target bootstraps.
        buffer.add(run.obs, action, reward, terminated, next_obs)
        run.obs = next_obs
        run.actions.append(action.tolist())  # for a resume
        run.step += args.action_repeat
        check_finite(run.step, observation=next_obs, reward=reward)
        if terminated or truncated:
            run.log({"charts/episodic_return": info["episode"]["r"]})
            run.open_episode(run.episode + 1)

        if learning:
            for _ in range(args.utd):
                if agent.n_updates == compile_at:
                    compile_updates(agent)
                run.losses |= agent.update(buffer.sample(args.batch_size, rng), rng)
            if run.due(1000 * args.action_repeat):
                run.log(run.losses)
        run.progress.update(args.action_repeat)
        if run.due(args.checkpoint_every):
            run.save()


def evaluate(agent, env, step, run_dir):
    """Deterministic episodes; rows of evaluations.csv: step, episode, return, length, success."""
    rows = []
    for episode in range(agent.args.eval_episodes):
        obs, _ = env.reset(seed=reset_seed(agent.args.seed, step, episode))
        success, over = "", False
        while not over:
            obs, reward, terminated, truncated, info = env.step(agent.act(obs))
            check_finite(step, observation=obs, reward=reward)
            for key in {"solved", "is_success", "success"} & info.keys():
                success = max(success or 0, int(info[key]))  # at any time of the episode
            over = terminated or truncated
        rows.append((step, episode, float(info["episode"]["r"]), info["episode"]["l"], success))
    return rows


# ------------------------------------- nothing about CrossQ below: environments, arguments, files


def fail(*message, code=2):
    """End with one line. Code 2: a wrong argument, environment or checkpoint; 1: a failed run."""
    print("error:", *" ".join(map(str, message)).split(), file=sys.stderr)
    sys.exit(code)


def check_finite(step, **values):
    for name, value in values.items():
        if not torch.as_tensor(value).float().isfinite().all():
            fail(name, "is NaN or infinite at step", step, code=1)


def reset_seed(*key):
    """A hash of the run's seed, the evaluation's step (training: 0) and the episode."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def suite_of(env_id):
    """The package that provides an id of DeepMind Control or MyoSuite; None for all others."""
    if env_id.removeprefix("shimmy:").startswith("dm_control/"):
        return "shimmy"
    name = env_id.removeprefix("myosuite:")
    return "myosuite" if name.startswith("myo") and ":" not in name else None


class Env(gym.Wrapper):
    """Plays each action n times and sums the rewards; a signal ends an evaluation here."""

    n, signals = 1, ()

    def step(self, action):
        if self.signals:
            raise KeyboardInterrupt
        total = 0.0
        for _ in range(self.n):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        if truncated and info["episode"]["l"] >= LONGEST_EPISODE:
            print(f"an episode was cut after {LONGEST_EPISODE} steps")
        return obs, total, terminated, truncated, info


def make_env(args, wrapper=lambda env: env, **kwargs):
    """An environment with float32 vectors and actions in [-1, 1], each played n times."""
    own_module, _, name = args.env_id.rpartition(":")
    suite = suite_of(args.env_id)
    module = suite or own_module
    try:
        if module:
            importlib.import_module(module)
        env = wrapper(gym.make(name, **kwargs))
    except (gym.error.Error, ImportError) as error:  # they name near matches and packages
        frames = [call.frame for call in inspect.getinnerframes(error.__traceback__)]
        packages = {frame.f_globals["__name__"].partition(".")[0] for frame in frames}
        if packages - {__name__.partition(".")[0], "importlib", "gymnasium", "shimmy", "myosuite"}:
            raise  # a mistake in the user's module
        suites = "(pip install shimmy[dm-control] dm_control==1.0.50 myosuite==3.0.0)"
        fail(f"--env-id {args.env_id}:", error, suites if suite else "")
    actions, obs = env.action_space, env.observation_space
    box = isinstance(actions, gym.spaces.Box) and actions.is_bounded() and len(actions.shape) == 1
    if not box or actions.dtype.kind != "f" or len(obs.shape or ()) > 2:
        needed = "needed: actions in a bounded Box of floats, vectors to observe, no images"
        fail(f"--env-id {args.env_id} has", actions, "and", obs, needed)
    # RescaleAction rounds, which may lead out of the bounds.
    env = gym.wrappers.TransformAction(env, lambda a: a.clip(actions.low, actions.high), actions)
    one = actions.dtype.type(1)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(env, LONGEST_EPISODE))
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    env = Env(gym.wrappers.RescaleAction(env, -one, one))
    env.n = args.action_repeat
    return env


def choose_device(args):
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_flush_denormal(True)  # denormals, which Adam leaves, are slow
    # On some CPUs "medium" is faster and as exact; others round to bfloat16, CUDA to TF32.
    torch.set_float32_matmul_precision("medium")
    a = torch.rand(256, 256, device=device)
    if (a @ a - a.double() @ a.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision(args.matmul_precision)
    return device


def compile_updates(agent):
    """Compile losses and gradients; without a compiler, or Python's headers, say so and go on."""
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph
    torch._dynamo.config.recompile_limit = 1000  # one process may train many agents
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # losses may use n_updates
    try:
        torch.compile(torch.square)(next(agent.parameters()).detach())
        agent.gradients = torch.compile(agent.gradients, fullgraph=True)
    except Exception as error:  # backends raise many kinds
        print(f"torch.compile does not work here: {error!r:.150}")


def parse_args(argv=None, Args=Args, Agent=Agent):
    """The arguments, checked, and the checkpoint of --resume or --evaluate, otherwise {}."""
    args, checkpoint = tyro.cli(Args, args=argv), {}
    if None not in (args.resume, args.evaluate):
        fail("--resume or --evaluate, not both")
    default = Args(**Args.suite_defaults(args.env_id))
    run_dir = args.evaluate if args.resume is None else args.resume
    if run_dir is not None:
        path = Path(run_dir, "checkpoint.pt")
        try:  # as data, never as code; to evaluate, the replay buffer stays on the disk
            checkpoint = torch.load(path, "cpu", weights_only=True, mmap=args.resume is None)
            program = checkpoint["program"] if "buffer" in checkpoint else "an earlier version"
            if program != program_of(Agent):
                raise ValueError(f"a run of {program}, not of {program_of(Agent)}")
            default = Args(**checkpoint["args"])
        except Exception as error:  # it raises many kinds
            fail("cannot go on from", path, "which is left as it is:", repr(error)[:300])
    args = tyro.cli(Args, args=argv, default=default)
    changed = {k for k, v in vars(args).items() if v != getattr(default, k)} - args.MAY_CHANGE
    if checkpoint and (changed or args.total_timesteps < default.total_timesteps):
        changed = changed or "total_timesteps downwards"
        fail(f"of {run_dir} only {sorted(args.MAY_CHANGE)} may change, not {changed}")
    for name, value in vars(args).items():
        zero, most = name in args.MAY_BE_ZERO, args.AT_MOST.get(name, 1e15)
        if type(value) in (int, float) and not (0 < value <= most or value == 0 and zero):
            above = ">=" if zero else ">"
            fail("--" + name.replace("_", "-"), "is", value, "but must be", above, "0 and <=", most)
    if args.buffer_size < args.batch_size:
        fail("--buffer-size must be at least --batch-size,", args.batch_size)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is none; use --device cpu or auto")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs a package: pip install wandb")
    return args, checkpoint


def program_of(Agent):
    """The file that defines Agent. Its runs are named after it, and only it resumes them."""
    file = getattr(sys.modules.get(Agent.__module__), "__file__", "notebook")
    return getattr(Agent, "program", None) or Path(file).stem


class Run:
    """A run's parts, where its loop stands, and its folder."""

    STATE = ("step", "episode", "actions", "evaluated", "evaluations", "starts")  # to be saved

    def __init__(self, args, env, agent, buffer, rng):
        self.args, self.env, self.agent, self.buffer, self.rng = args, env, agent, buffer, rng
        self.step = 0  # environment steps: agent steps x action repeat
        self.evaluated = 0  # step of the last evaluation
        self.evaluations = []  # rows of evaluations.csv
        self.starts = []  # device and versions, at the start and at every resume
        self.losses, self.signals = {}, []
        program = program_of(type(agent))
        name = args.run_name or f"{args.env_id}__{program}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.resume or Path("runs", re.sub(r"[/\\:]|^\.+$", "_", name)))
        used = any((self.folder / file).exists() for file in ("checkpoint.pt", "evaluations.csv"))
        if used and args.resume is None:
            fail(f"{self.folder} already holds a run: --resume it, or choose another --run-name")

    def due(self, every):
        return self.step % every < self.args.action_repeat

    def open_episode(self, number, actions=()):
        """Begin an episode; at a resume, its actions so far are played again."""
        self.episode, self.actions = number, list(actions)
        self.obs, _ = self.env.reset(seed=reset_seed(self.args.seed, 0, number))
        for action in actions:
            self.obs, *_ = self.env.step(np.float32(action))
        check_finite(self.step, observation=self.obs)

    def save(self):
        """Write checkpoint.pt aside and rename it: a kill leaves the old or the new one, whole."""
        check_finite(self.step, **self.losses)
        checkpoint = {
            "program": program_of(type(self.agent)),
            "args": vars(self.args) | {"resume": None},
            "run": {name: getattr(self, name) for name in self.STATE},
            "obs": self.obs.tolist(),
            "agent": self.agent.state_dict(),
            "n_updates": self.agent.n_updates,
            "optimizers": {k: v.state_dict() for k, v in self.agent.optimizers.items()},
            "rows": self.buffer.rows[: self.buffer.size].cpu().clone(),  # a view is saved whole
            "buffer": {k: v for k, v in vars(self.buffer).items() if k != "rows"},
            "rng": self.rng.get_state(),
            "global_rng": torch.get_rng_state(),  # of which a reset makes its networks
        }
        path = self.folder / "checkpoint.tmp"
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file)
        torch.load(path, "cpu", weights_only=True, mmap=True)  # fail now, not at a resume
        os.replace(path, self.folder / "checkpoint.pt")

    def load(self, checkpoint):
        """The reverse of save; the open episode is played again."""
        vars(self).update(checkpoint["run"])
        self.agent.load_state_dict(checkpoint["agent"])
        self.agent.n_updates = checkpoint["n_updates"]
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        vars(self.buffer).update(checkpoint["buffer"])
        self.buffer.rows[: self.buffer.size] = checkpoint.pop("rows")
        torch.set_rng_state(checkpoint["global_rng"])
        if checkpoint["rng"].shape == self.rng.get_state().shape:  # CUDA's is not the CPU's
            self.rng.set_state(checkpoint["rng"])
        self.open_episode(self.episode, self.actions)
        if self.obs.tolist() != checkpoint["obs"]:
            print("the open episode does not replay bit by bit here: a fresh one begins")
            self.open_episode(self.episode + 1)

    def open(self):
        """Make the folder, with args.json and a first checkpoint, and begin to log."""
        args, device, git = self.args, f"CPU, {torch.get_num_threads()} threads", ""
        if self.rng.device.type == "cuda":
            device = torch.cuda.get_device_name()
        with contextlib.suppress(OSError):  # there is no git
            command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
            git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
        self.starts.append({"device": device, "git": git} | versions)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = json.dumps({"args": vars(args), "starts": self.starts}, indent=2)
            (self.folder / "args.json").write_text(about)
        except OSError as error:
            fail(self.folder, "cannot be written:", error)
        self.save()
        if args.track:  # it copies TensorBoard's events, so it begins before them
            import wandb

            name = self.folder.name
            wandb.init(id=name, resume="allow", config=vars(args), sync_tensorboard=True)
        self.write_evaluations()
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        self.progress = tqdm(total=args.total_timesteps, initial=self.step, disable=None)
        self.clock = self.step, time.perf_counter()
        changed = [f"{k} {v}" for k, v in vars(args).items() if v != getattr(type(args), k)]
        size = self.buffer.rows.nbytes
        print(f"{self.folder} on {device}; buffer {size:,} bytes; {', '.join(changed)}")
        if device.startswith("CPU") and torch.get_num_threads() > 1:
            print("several runs at once are much faster with OMP_NUM_THREADS=1 set for each")

    def log(self, values):
        check_finite(self.step, **values)
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)

    def log_evaluation(self, rows):
        self.evaluated = self.step
        self.evaluations += rows
        self.write_evaluations()
        mean = float(np.mean([row[2] for row in rows]))
        step, then = self.clock
        self.clock = self.step, time.perf_counter()
        speed = (self.step - step) / (self.clock[1] - then)  # since the last evaluation
        self.log({"eval/return": mean, "charts/SPS": speed})
        self.progress.write(f"step {self.step:,}: return {mean:,.1f}; {speed:.0f} steps/s")
        sys.stdout.flush()  # a log file shows it at once

    def write_evaluations(self):
        with open(self.folder / "evaluations.tmp", "w") as file:
            for row in [("step", "episode", "return", "length", "success"), *self.evaluations]:
                print(*row, sep=",", file=file)
        os.replace(self.folder / "evaluations.tmp", self.folder / "evaluations.csv")

    def on_signal(self, number, frame):
        """SIGINT and SIGTERM end the loop; a second one ends the program at once."""
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(
    argv=None,
    Args=Args,
    Agent=Agent,
    ReplayBuffer=ReplayBuffer,
    make_env=make_env,
    evaluate=evaluate,
):
    """Train, or with --evaluate only evaluate; returns the exit code: 0, or 128 + a signal.

    A program that extends this one passes its own classes and functions.
    """
    warnings.filterwarnings("ignore", ".*(out of date|precision lowered)")  # on -v4, float32
    if os.getcwd() not in sys.path:  # for --env-id my_module:MyEnv-v0
        sys.path.append(os.getcwd())
    args, checkpoint = parse_args(argv, Args, Agent)
    env = make_env(args)
    device = choose_device(args)
    torch.manual_seed(args.seed)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(*sizes, args).to(device)
    if args.evaluate is not None:
        agent.load_state_dict(checkpoint["agent"])
        step = checkpoint["run"]["step"]
        _, _, returns, _, successes = zip(*evaluate(agent, env, step, Path(args.evaluate)))
        env.close()
        success = "" if "" in successes else f", success {np.mean(successes):.2f}"
        mean, std = np.mean(returns), np.std(returns)
        print(f"{args.evaluate} at step {step}: {mean:.1f} ± {std:.1f}{success}")
        return 0
    try:
        buffer = ReplayBuffer(*sizes, args, device)
    except RuntimeError as error:  # PyTorch has no memory
        fail(f"--buffer-size {args.buffer_size}:", error)
    rng = torch.Generator(device).manual_seed(args.seed)  # of all that is random from here on
    run = Run(args, env, agent, buffer, rng)
    eval_env = make_env(args)
    eval_env.set_wrapper_attr("signals", run.signals)
    if checkpoint:
        run.load(checkpoint)
    else:
        run.open_episode(0)
    run.open()
    with env, eval_env, run.writer, run.progress, contextlib.ExitStack() as at_the_end:
        with contextlib.suppress(ValueError):  # only a main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, run.on_signal)
                at_the_end.callback(signal.signal, number, before)
        with contextlib.suppress(KeyboardInterrupt):  # a resume repeats a cut evaluation
            train(run, eval_env, evaluate)
        run.save()
        run.progress.write(f"ended at step {run.step:,}; --resume {run.folder} goes on from here")
    return 128 + run.signals[0] if run.signals else 0


if __name__ == "__main__":
    sys.exit(main())
