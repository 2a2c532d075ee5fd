"""CrossQ on TD3, in one file.

Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample
Efficiency and Simplicity", ICLR 2024 (arXiv 1902.05605), section 4.1: the same three changes as in
`crossq_sac.py` (no target networks, batch renormalisation, one joint forward pass of a wider
critic), made to TD3 (Fujimoto et al., ICML 2018, arXiv 1802.09477).

    python crossq_td3.py --env-id Walker2d-v4                            # the paper's setting
    python crossq_td3.py --env-id HalfCheetah-v4 --critic-width 256      # "CrossQ small", for a CPU
    python crossq_td3.py --resume runs/NAME                              # go on after a kill
    python crossq_td3.py --evaluate runs/NAME --eval-episodes 10         # how good is it?
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "gymnasium[mujoco]==1.2.3", "mujoco==3.17.0", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1", "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'",
# ]
# ///
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).name
LOG_EVERY = 1000  # agent steps between two rows of losses and diagnostics
MAY_CHANGE = ["device", "compile", "eval_every", "eval_episodes", "checkpoint_every", "capture_video", "track"]
ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "relu6": F.relu6, "sin": torch.sin, "elu": F.elu, "glu": F.glu}
ACTIVATIONS["relu-over-max"] = lambda x: F.relu(x) / (F.relu(x).amax((-2, -1), keepdim=True) + 1e-6)
ACTIVATIONS["layernormed-relu"] = lambda x: F.layer_norm(F.relu(x), x.shape[-1:])


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # Gymnasium id; your own: my_module:MyEnv-v0, found from the current directory
    seed: int = 1  # seed of the networks, the exploration and the environment
    total_timesteps: int = 1_000_000  # environment steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    critic_width: int = 2048  # units per hidden layer (paper 3.3; 256 is "CrossQ small")
    actor_width: int = 256  # units per hidden layer
    n_critics: int = 2  # Q-functions in the ensemble
    critic_norm: Literal["brn", "bn", "ln", "none"] = "brn"  # batch renorm, batch norm, layer norm (figures 8, 13)
    actor_norm: Literal["brn", "bn", "ln", "none"] = "brn"  # the same for the actor
    bn_momentum: float = 0.99  # share of the old running statistics kept at an update (PyTorch counts 1 - this)
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm (table 1)
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    critic_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    actor_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    adam_beta1: float = 0.5  # of actor and critic (table 1; Adam's default is 0.9)
    policy_delay: int = 3  # critic updates per actor update (table 1; DeepMind Control: 1)
    utd: int = 1  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 256  # transitions
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 5000  # uniformly random agent steps before the first update
    gamma: float = 0.99  # discount (Swimmer: 0.9999)
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions played
    policy_noise: float = 0.2  # standard deviation of the noise on the target's actions (TD3's policy smoothing)
    noise_clip: float = 0.5  # bound of that noise
    q_aggregation: Literal["min", "mean"] = "min"  # over the critics, in the target and in the actor's loss
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    action_repeat: int = 1  # environment steps per agent step; rewards are summed
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # deterministic episodes per evaluation
    run_name: str | None = None  # folder under runs/; default ENV__SCRIPT__SEED__TIME
    checkpoint_every: int = 25_000  # environment steps between checkpoints
    resume: str | None = None  # runs/NAME: go on from its checkpoint
    evaluate: str | None = None  # runs/NAME: evaluate its policy and exit
    capture_video: bool = False  # mp4 of an evaluation's first episode (needs moviepy; headless: libegl1)
    track: bool = False  # log to Weights & Biases too (needs wandb)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: from 20 000 updates on, if it works here


def check(ok: bool, message: str, code: int = 2) -> None:
    """Unless ok, end with one line. Code 2: a wrong argument, environment or checkpoint; 1: a run that went wrong."""
    if not ok:
        print(f"{SCRIPT}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)


class ActionRepeat(gym.Wrapper):
    """Plays each action `n` times, sums the rewards, stops at an episode's end."""

    n = 1

    def step(self, action):
        total = 0.0
        for _ in range(self.n):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(args: Args, **kwargs) -> gym.Env:
    """An environment with float32 vector observations and actions in [-1, 1]; an unsuitable one ends with code 2."""
    sys.path.append(os.getcwd())  # for --env-id my_module:MyEnv-v0
    if kwargs and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # headless
    try:
        env = gym.make(args.env_id, **kwargs)
    except Exception as e:  # gymnasium's own messages name near matches and missing packages
        check(False, f"--env-id {args.env_id}: {e}")
    box, spaces, actions = gym.spaces.Box, env.observation_space, env.action_space
    spaces = spaces.values() if isinstance(spaces, gym.spaces.Dict) else [spaces]
    ok = isinstance(actions, box) and len(actions.shape) == 1 and actions.is_bounded()
    check(ok, f"--env-id {args.env_id} has the actions {actions}; a bounded one-dimensional Box is needed")
    ok = all(isinstance(space, box) and len(space.shape) < 3 for space in spaces)
    check(ok, f"--env-id {args.env_id} has the observations {env.observation_space}; vectors are needed, no images")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    env = ActionRepeat(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))  # only env.step leaves [-1, 1]
    env.n = args.action_repeat
    return env


def reset_seed(*key: int) -> int:
    """An environment's seed from (run seed, 0 or the evaluation's step, episode): nothing to carry over a resume."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe 2017, arXiv 1702.03275) over the batch dimension of x [..., B, F].

    In training mode x_hat = (x - mean_B) / std_B * r + d, with r = std_B / std_running and
    d = (mean_B - mean_running) / std_running, clipped and without gradient: the value is that of
    inference, the gradient that of batch norm. The first `warmup` training forwards are plain
    batch norm (r = 1, d = 0); inf never leaves it. In eval mode the running statistics normalise.
    `shape` ends in (1, F); a leading dimension gives each critic of an ensemble its own statistics.
    """

    def __init__(self, shape, momentum=0.99, warmup=100_000, eps=1e-3, r_max=3.0, d_max=5.0):
        super().__init__()
        self.momentum, self.warmup, self.eps, self.r_max, self.d_max = momentum, warmup, eps, r_max, d_max
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training forwards so far

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            k = self.scale / (self.running_var + self.eps).sqrt()
            return x * k + (self.bias - self.running_mean * k)
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        var = centred.square().mean(-2, keepdim=True)  # biased, for the running average too
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            running_std = (self.running_var + self.eps).sqrt()
            warm = (self.steps >= self.warmup).float()  # 0 or 1: an `if` would make the host wait for the device
            r = 1 + warm * ((std / running_std).clamp(1 / self.r_max, self.r_max) - 1)
            d = warm * ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.r, self.d = r, d  # for diagnostics from outside
            self.running_mean.lerp_(mean.detach(), 1 - self.momentum)  # only now: r and d use the old ones
            self.running_var.lerp_(var.detach(), 1 - self.momentum)
            self.steps += 1
        return (centred * (r / std) + d) * self.scale + self.bias


class Dense(nn.Module):
    """x [..., n_in] -> [..., n_out], or with ensemble=(N,): x [B, n_in] or [N, B, n_in] -> [N, B, n_out]."""

    def __init__(self, n_in: int, n_out: int, ensemble: tuple = ()):
        super().__init__()
        std = n_in**-0.5 / 0.87962566103423978  # LeCun normal: the default of flax, so of the official code
        self.weight = nn.Parameter(torch.empty(*ensemble, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(*ensemble, 1, n_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class MLP(nn.Module):
    """Norm -> (Dense -> activation -> norm) x 2 -> Dense. Layer norm instead stands before the activations only."""

    def __init__(self, n_in, width, n_out, norm, activation, args, ensemble=()):
        super().__init__()
        hidden = width // 2 if activation == "glu" else width
        act, warmup = ACTIVATIONS[activation], args.brn_warmup if norm == "brn" else math.inf
        self.activation = (lambda x: act(F.layer_norm(x, x.shape[-1:]))) if norm == "ln" else act
        self.dense = nn.ModuleList(Dense(n, width, ensemble) for n in (n_in, hidden))
        self.head = Dense(hidden, n_out, ensemble)
        self.norms = nn.ModuleList(
            BatchRenorm((*ensemble, 1, n), args.bn_momentum, warmup) if norm in ("brn", "bn") else nn.Identity()
            for n in (n_in, hidden, hidden)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x)
        for dense, norm in zip(self.dense, self.norms[1:]):
            x = norm(self.activation(dense(x)))
        return self.head(x)


class Critic(MLP):
    """An ensemble of Q-functions: obs [B, O], action [B, A] -> Q [n_critics, B]."""

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([obs, action], -1)).squeeze(-1)


class Actor(MLP):
    """A deterministic policy: obs [B, O] -> action [B, A] in [-1, 1]."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return super().forward(obs).tanh()


class ReplayBuffer:
    """The last `capacity` transitions, float32, on the device, one row each: obs, action, reward, done, next_obs."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # on a CPU, memory is taken when written
        self.position, self.size = 0, 0

    def add(self, obs, action, reward: float, done: bool, next_obs) -> None:
        row = np.concatenate([obs, action, [reward, done], next_obs], dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row)
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, n: int, rng: torch.Generator) -> list[torch.Tensor]:
        """n transitions, uniform with replacement: obs [n, O], action [n, A], reward [n], done [n], next_obs [n, O]."""
        index = torch.randint(self.size, (n,), generator=rng, device=self.rows.device)
        obs, action, reward, done, next_obs = self.rows[index].split(self.widths, -1)
        return [obs, action, reward.squeeze(-1), done.squeeze(-1), next_obs]


class Agent(nn.Module):
    """Networks, optimisers and the two updates. Every method sets the modes (train, eval) that its forwards need."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.n_updates = args, 0
        n_in, ensemble = obs_dim + action_dim, (args.n_critics,)
        self.critic = Critic(n_in, args.critic_width, 1, args.critic_norm, args.activation, args, ensemble)
        self.actor = Actor(obs_dim, args.actor_width, action_dim, args.actor_norm, "relu", args)
        self.critic_parameters, self.actor_parameters = list(self.critic.parameters()), list(self.actor.parameters())
        betas = (args.adam_beta1, 0.999)
        self.critic_opt = torch.optim.Adam(self.critic_parameters, args.critic_lr, betas, fused=True)
        self.actor_opt = torch.optim.Adam(self.actor_parameters, args.actor_lr, betas, fused=True)
        self.optimizers = self.critic_opt, self.actor_opt
        if args.compile == "on":
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph
            self.critic_gradients = torch.compile(self.critic_gradients, fullgraph=True)
            self.actor_gradients = torch.compile(self.actor_gradients, fullgraph=True)

    def aggregate(self, q: torch.Tensor) -> torch.Tensor:
        return q.min(0).values if self.args.q_aggregation == "min" else q.mean(0)  # [n_critics, B] -> [B]

    def critic_gradients(self, obs, action, reward, done, next_obs, noise):
        with torch.no_grad():
            noise = (self.args.policy_noise * noise).clamp(-self.args.noise_clip, self.args.noise_clip)
            next_action = (self.actor(next_obs) + noise).clamp(-1, 1)  # actor in eval mode
        # CrossQ: ONE forward of the critic, in training mode, on both halves together; no target network.
        q = self.critic(torch.cat([obs, next_obs]), torch.cat([action, next_action]))  # [n_critics, 2B]
        q, next_q = q.chunk(2, -1)  # [n_critics, B] each
        target = (reward + self.args.gamma * (1 - done) * self.aggregate(next_q)).detach()  # [B]
        loss = 0.5 * (q - target).square().mean(-1).sum()
        gradients = torch.autograd.grad(loss, self.critic_parameters)
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}, gradients

    def actor_gradients(self, obs):
        action = self.actor(obs)  # actor in training mode
        loss = -self.aggregate(self.critic(obs, action)).mean()  # critic in eval mode
        return {"actor_loss": loss.detach()}, torch.autograd.grad(loss, self.actor_parameters)

    def update_critic(self, obs, action, reward, done, next_obs, noise) -> dict:
        """One gradient step on a batch (shapes: see `ReplayBuffer.sample`); noise [B, A] draws a'. Returns scalars."""
        self.actor.eval()
        self.critic.train()
        info, gradients = self.critic_gradients(obs, action, reward, done, next_obs, noise)
        self.step_optimizer(self.critic_opt, gradients)
        self.n_updates += 1
        return info

    def update_actor(self, obs) -> dict:
        """One gradient step of the actor on obs [B, O]. Returns scalars."""
        self.actor.train()
        self.critic.eval()
        info, gradients = self.actor_gradients(obs)
        self.step_optimizer(self.actor_opt, gradients)
        return info

    def update(self, batch, rng: torch.Generator) -> dict:
        """A critic update and, with every `policy_delay`-th one, an actor update on the same batch. Returns scalars."""
        info = self.update_critic(*batch, torch.randn(batch[1].shape, generator=rng, device=rng.device))
        if self.n_updates % self.args.policy_delay == 0:
            info |= self.update_actor(batch[0])
        return info

    @staticmethod
    def step_optimizer(optimizer: torch.optim.Optimizer, gradients) -> None:
        for p, g in zip(optimizer.param_groups[0]["params"], gradients):
            p.grad = g
        optimizer.step()

    @torch.inference_mode()
    def act(self, obs: np.ndarray, noise: torch.Tensor | float = 0.0) -> np.ndarray:
        """obs [O] -> action [A] in [-1, 1]; noise [A] is standard normal, without it the policy is deterministic."""
        self.actor.eval()
        action = self.actor(torch.from_numpy(obs).to(self.actor_parameters[0].device)[None])[0]
        return (action + self.args.exploration_noise * noise).clamp(-1, 1).cpu().numpy()


def evaluate(agent: Agent, env: gym.Env, step: int) -> list[tuple]:
    """Deterministic episodes, as rows of evaluations.csv: step, episode, return, length, success (if there is one)."""
    rows, args = [], agent.args
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=reset_seed(args.seed, step, episode))
        total, length, success, over = 0.0, 0, "", False
        while not over:
            obs, reward, terminated, truncated, info = env.step(agent.act(obs))
            total, length, over = total + float(reward), length + args.action_repeat, terminated or truncated
            for key in {"solved", "is_success", "success"} & info.keys():
                success = max(success or 0, int(info[key]))  # success at any time counts
        rows.append((step, episode, total, length, success))
    return rows


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """The arguments, checked, and with --resume or --evaluate the checkpoint that they extend."""

    def parse(default: Args) -> Args:
        message = io.StringIO()
        try:
            with contextlib.redirect_stderr(message):
                return tyro.cli(Args, args=argv, default=default)
        except SystemExit as e:
            check(not e.code, re.sub("[─│╭╮╰╯]+", " ", message.getvalue()))  # tyro draws a box
            raise

    args, checkpoint = parse(Args()), None
    if run_dir := args.resume or args.evaluate:
        try:
            checkpoint = torch.load(Path(run_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)  # no code
            check(checkpoint["script"] == SCRIPT, f"{run_dir} is a run of {checkpoint['script']}, not of {SCRIPT}")
            stored = Args(**checkpoint["args"] | {"resume": args.resume, "evaluate": args.evaluate})
        except Exception as e:  # torch.load raises many kinds
            check(False, f"{run_dir} has no whole checkpoint.pt of {SCRIPT}; it was left as it is ({e!r:.200})")
        args = parse(stored)
        for name, old in vars(stored).items():
            new = getattr(args, name)
            ok = new == old or name in MAY_CHANGE or name == "total_timesteps" and new > old
            check(ok, f"--{name.replace('_', '-')} is {old} in {run_dir} and cannot become {new} there")
    for name, value in vars(args).items():
        share = name in ("gamma", "bn_momentum", "adam_beta1")
        low = 0 if share or name in ("seed", "brn_warmup", "learning_starts") else 1 if type(value) is int else 1e-12
        ok = type(value) not in (int, float) or low <= value <= (1 if share else 1e15)
        check(ok, f"--{name.replace('_', '-')} must lie between {low} and {1 if share else 1e15:g}, not be {value}")
    check(args.adam_beta1 < 1, "--adam-beta1 must be below 1")
    check(args.buffer_size >= args.batch_size, f"--buffer-size must be at least --batch-size, {args.batch_size}")
    ok = args.device != "cuda" or torch.cuda.is_available()
    check(ok, "--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if args.compile == "auto":
        long_enough = args.total_timesteps * args.utd >= 20_000 * args.action_repeat
        args.compile = "on" if long_enough and (shutil.which("g++") or shutil.which("clang++")) else "off"
    return args, checkpoint


def train(args: Args, checkpoint: dict | None) -> int:
    """Train, or with --evaluate only evaluate; returns the exit code: 0, or 128 + the signal that ended the run."""
    for wanted, package in ((args.track, "wandb"), (args.capture_video, "moviepy")):
        if wanted:
            importlib.import_module(package)
    env, eval_env = make_env(args), make_env(args, **{"render_mode": "rgb_array"} if args.capture_video else {})
    obs_dim, action_dim, repeat = env.observation_space.shape[0], env.action_space.shape[0], args.action_repeat
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = args.buffer_size * 4 * (2 * obs_dim + action_dim + 2)
    check(needed <= memory, f"--buffer-size {args.buffer_size} needs {needed:,} bytes; {name} has {memory:,}")
    run_name = args.run_name or f"{args.env_id}__{SCRIPT[:-3]}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.evaluate or Path("runs") / re.sub(r"[/\\:]", "_", run_name))
    new = checkpoint is not None or not (run_dir / "checkpoint.pt").exists()
    check(new, f"{run_dir} already holds a run: go on with --resume {run_dir}, or choose another --run-name")
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim, args).to(device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    rng = torch.Generator(device).manual_seed(args.seed)  # all randomness from here on, but the environment's
    agent_step, episode, episode_return, actions, evaluations = 0, 0, 0.0, [], []
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        agent_step, episode, evaluations = (checkpoint[key] for key in ("agent_step", "episode", "evaluations"))
        agent.n_updates = max(0, agent_step - args.learning_starts) * args.utd
    if args.capture_video:
        names = {"name_prefix": f"{'evaluate' if args.evaluate else 'train'}-from-{agent_step * repeat}"}
        names["episode_trigger"] = lambda i: i % args.eval_episodes == 0
        eval_env = gym.wrappers.RecordVideo(eval_env, str(run_dir / "videos"), **names)
    if args.evaluate:
        _, _, returns, _, successes = zip(*evaluate(agent, eval_env, agent_step * repeat))
        success = "" if "" in successes else f", success {np.mean(successes):.2f}"
        print(f"{run_dir} at step {agent_step * repeat}: {np.mean(returns):.1f} ± {np.std(returns):.1f}{success}")
        eval_env.close()
        return 0

    obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
    if checkpoint:
        buffer.size, buffer.position = len(checkpoint["rows"]), checkpoint["position"]
        buffer.rows[: buffer.size] = checkpoint.pop("rows")  # not kept twice
        if checkpoint["rng"].shape == rng.get_state().shape:  # another kind of device has another generator
            rng.set_state(checkpoint["rng"])
        actions = list(checkpoint["actions"].numpy())
        for action in actions:  # play the open episode again, up to where it was
            obs, reward, *_ = env.step(action)
            episode_return += float(reward)
        check(np.array_equal(obs, checkpoint["obs"].numpy()), f"{args.env_id} is not deterministic: cannot resume", 1)

    def save() -> None:
        state = {"script": SCRIPT, "args": vars(args), "agent": agent.state_dict(), "agent_step": agent_step}
        state |= {"episode": episode, "evaluations": evaluations, "rng": rng.get_state(), "obs": torch.from_numpy(obs)}
        state |= {"optimizers": [o.state_dict() for o in agent.optimizers], "position": buffer.position}
        state["actions"] = torch.from_numpy(np.array(actions, np.float32))
        state["rows"] = torch.from_numpy(buffer.rows[: buffer.size].cpu().numpy())  # saving a slice would save it all
        aside = run_dir / "checkpoint.tmp"
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, run_dir / "checkpoint.pt")  # after a kill or a power cut: the old one or the new one, whole

    stop = []  # the signals that came
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: stop.append(number))
    run_dir.mkdir(parents=True, exist_ok=True)
    if not checkpoint:
        save()
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    about = {"args": vars(args), "git": revision, "device": name, "python": sys.version}
    about |= {module.__name__: module.__version__ for module in (torch, gym, mujoco, np)}
    (run_dir / "args.json").write_text(json.dumps(about, indent=2))
    table = open(run_dir / "evaluations.csv", "w", buffering=1, newline="")  # flushed at each row's end
    rows_to = csv.writer(table, lineterminator="\n")
    rows_to.writerows([("step", "episode", "return", "length", "success"), *evaluations])
    if args.track:
        import wandb

        wandb.init(project="crossq", id=run_dir.name, resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=agent_step * repeat)
    info, n_timed, first_step, start = {}, 0, agent_step * repeat, time.perf_counter()
    sizes = [sum(p.numel() for p in ps) for ps in (agent.actor_parameters, agent.critic_parameters)]
    print(
        f"{run_dir}: {args.env_id} on {name}; actor {sizes[0]:,} and critic {sizes[1]:,} parameters; replay buffer ",
        end="",
    )
    print(f"up to {needed / 1e6:,.0f} MB")
    if device.type == "cpu" and args.critic_width > 512:
        print("A critic this wide is slow on a CPU: --critic-width 256 is many times faster")
    progress = tqdm(total=args.total_timesteps, initial=agent_step * repeat, unit="step", disable=None)

    while (step := agent_step * repeat) < args.total_timesteps and not stop:
        # ALGO LOGIC: one agent step, then `utd` updates
        if agent_step < args.learning_starts:
            action = torch.rand(action_dim, generator=rng, device=device).cpu().numpy() * 2 - 1
        else:
            action = agent.act(obs, torch.randn(action_dim, generator=rng, device=device))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent_step, step = agent_step + 1, step + repeat
        finite = np.isfinite(next_obs).all() and np.isfinite(reward)
        check(finite, f"the environment returned NaN or infinity at step {step}: {next_obs}, reward {reward}", 1)
        buffer.add(obs, action, reward, terminated and not args.bootstrap_at_termination, next_obs)
        actions.append(action)
        obs, episode_return = next_obs, episode_return + float(reward)
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            episode, episode_return, actions = episode + 1, 0.0, []
            obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
        if agent_step > args.learning_starts:
            for _ in range(args.utd):
                info |= agent.update(buffer.sample(args.batch_size, rng), rng)
            bad = [key for key, value in info.items() if not math.isfinite(value.item())]
            check(not bad, f"{bad} became NaN or infinite at step {step}; the last checkpoint is from before that", 1)
            n_timed += 1
            if n_timed == 10:  # both updates are compiled by now
                first_step, start = step, time.perf_counter()
            speed = (step - first_step) / (time.perf_counter() - start)
            if n_timed == 70:
                minutes = (args.total_timesteps - step) / speed / 60
                progress.write(f"{speed:.0f} steps/s: about {minutes:.0f} minutes to go, evaluations not counted")
            if agent_step % LOG_EVERY == 0:
                gradients = [p.grad for p in agent.critic_parameters]
                norms = [torch.nn.utils.get_total_norm(x).item() for x in (agent.critic_parameters, gradients)]
                values = {f"losses/{key}": value for key, value in info.items()} | {"charts/SPS": speed}
                values |= {"diagnostics/critic_weight_norm": norms[0], "diagnostics/critic_gradient_norm": norms[1]}
                values["diagnostics/critic_effective_lr"] = norms[1] / norms[0]  # CrossQ + WN, section 4
                for key, value in values.items():
                    writer.add_scalar(key, value, step)
        if step % args.eval_every < repeat:
            rows = evaluate(agent, eval_env, step)
            evaluations += rows
            rows_to.writerows(rows)
            mean = float(np.mean([row[2] for row in rows]))
            writer.add_scalar("eval/return", mean, step)
            progress.write(f"step {step:,}: evaluation return {mean:,.1f}")
        progress.update(repeat)
        if step % args.checkpoint_every < repeat or stop or step >= args.total_timesteps:
            save()
    progress.close()
    writer.close()
    if stop:
        print(f"stopped at step {step}; go on with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
    return 128 + stop[0] if stop else 0


def main(argv: list[str] | None = None) -> int:
    gym.logger.min_level = gym.logger.ERROR  # no advice to use -v5: the papers use -v4
    try:
        return train(*parse_args(argv))
    except ImportError as e:
        check(False, f"{e}; this needs: pip install {e.name}")
    except (PermissionError, FileExistsError, NotADirectoryError) as e:  # of the run's folder
        check(False, f"{e}; choose another current directory or --run-name")
    except OSError as e:  # a full disk, say
        check(False, f"{e}; the last checkpoint is whole", 1)


if __name__ == "__main__":
    sys.exit(main())
