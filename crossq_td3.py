"""CrossQ on TD3, in one file (Bhatt et al., ICLR 2024, arXiv 1902.05605, section 4.1).

The changes that make CrossQ of SAC, in `crossq_sac.py`, made to TD3 (Fujimoto et al., ICML 2018, arXiv 1802.09477): no
target networks, neither of the critic nor of the actor; in exchange batch renormalisation, ONE forward pass of the
critic on (s, a) and (s', a') together, and wider critics.

    python crossq_td3.py --env-id Walker2d-v4                            # the paper's setting
    python crossq_td3.py --env-id HalfCheetah-v4 --critic-width 256      # "CrossQ small", for a CPU
    python crossq_td3.py --resume runs/NAME                              # go on after a kill; or --evaluate it
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.2.3", "mujoco==3.17.0", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1", "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'"]
# ///
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).resolve()
MAY_CHANGE = "total_timesteps device compile eval_every eval_episodes checkpoint_every capture_video track".split()
DMC = {"action_repeat": 2, "critic_lr": 8e-4, "actor_lr": 8e-4, "policy_delay": 1}  # defaults for dm_control/... (A.1)
MYO = {"action_repeat": 2, "gamma": 0.95}  # defaults for myo...


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # Gymnasium id; your own: my_module:MyEnv-v0, found from the current directory
    seed: int = 1  # seed of the networks, the exploration and the environment
    total_timesteps: int = 1_000_000  # environment steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    critic_width: int = 2048  # units per hidden layer (paper 3.3; 256 is "CrossQ small")
    actor_width: int = 256  # units per hidden layer
    n_critics: int = 2  # Q-functions in the ensemble
    critic_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    actor_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    adam_beta1: float = 0.5  # of actor and critic (table 1; Adam's default is 0.9)
    policy_delay: int = 3  # critic updates per actor update (table 1; DeepMind Control: 1)
    utd: int = 1  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 256  # transitions
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 5000  # uniformly random agent steps before the first update
    gamma: float = 0.99  # discount (Swimmer: 0.9999)
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions played, which are in [-1, 1]
    target_noise: float = 0.2  # the same of the noise on a' (target policy smoothing)
    target_noise_clip: float = 0.5  # bound of that noise, in the same unit
    action_repeat: int = 1  # environment steps per agent step; rewards are summed
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # deterministic episodes per evaluation
    run_name: str | None = None  # folder under runs/; default ENV__SCRIPT__SEED__TIME
    checkpoint_every: int = 25_000  # environment steps between checkpoints
    resume: str | None = None  # runs/NAME: go on from its checkpoint
    evaluate: str | None = None  # runs/NAME: evaluate its policy and exit
    capture_video: bool = False  # mp4 of an evaluation's first episode (needs moviepy; headless: libegl1)
    track: bool = False  # log to Weights & Biases too (needs wandb)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: from 20 000 updates on, where there is g++
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # high: CUDA's TF32; medium: AMX's bfloat16 too


def check(ok: bool, message: str, code: int = 2) -> None:
    """Unless ok, end with one line. Code 2: a wrong argument, environment or checkpoint; 1: a run that went wrong."""
    if not ok:
        print(f"{SCRIPT.name}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)


class ActionRepeat(gym.Wrapper):
    """Plays each action `n` times, sums the rewards, stops at an episode's end."""

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
    if kwargs and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen too
    try:
        env = gym.make(re.sub("^(?=dm_.*/)", "shimmy:", re.sub("^(?=myo[^:]*$)", "myosuite:", args.env_id)), **kwargs)
        assert not kwargs or (env.reset() and env.render() is not None), "it draws no picture for --capture-video"
    except Exception as e:  # gymnasium's own messages name near matches and missing packages
        check(False, f"{args.env_id}: {e} (suites: pip install shimmy[dm-control] dm_control==1.0.50 myosuite==3.0.0)")
    actions, obs, Box, Dict = env.action_space, env.observation_space, gym.spaces.Box, gym.spaces.Dict
    ok = isinstance(actions, Box) and actions.is_bounded() and len(actions.shape) == 1 and actions.dtype.kind == "f"
    ok &= all(isinstance(s, Box) and len(s.shape) < 3 for s in (obs.values() if isinstance(obs, Dict) else [obs]))
    check(ok, f"--env-id {args.env_id}: {actions} and {obs}; needed: a bounded Box of floats, and vectors, no images")
    env = gym.wrappers.FlattenObservation(gym.wrappers.RecordEpisodeStatistics(env))
    env = ActionRepeat(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))  # only env.step leaves [-1, 1]
    env.n = args.action_repeat
    return gym.wrappers.DtypeObservation(env, np.float32)


def reset_seed(*key: int) -> int:
    """An environment's seed from (run seed, 0 or the evaluation's step, episode): nothing to carry over a resume."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe 2017, arXiv 1702.03275) over the batch dimension of x [..., B, F].

    In training, x_hat = (x - mean_B) / std_B * r + d with r = std_B / std_running, d = (mean_B - mean_running) /
    std_running, clipped and constant to autograd: the value of inference, the gradient of batch norm. In the first
    `warmup` forwards r = 1 and d = 0: batch norm. `shape` is (1, F), or (N, 1, F) for an ensemble."""

    def __init__(self, shape, momentum=0.99, warmup=100_000, eps=1e-3, r_max=3.0, d_max=5.0):
        super().__init__()
        self.momentum, self.warmup, self.eps, self.r_max, self.d_max = momentum, warmup, eps, r_max, d_max
        self.scale, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training forwards so far

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return (x - self.running_mean) * (self.scale / (self.running_var + self.eps).sqrt()) + self.bias
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        var = centred.square().mean(-2, keepdim=True)  # biased, for the running average too
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            running_std = (self.running_var + self.eps).sqrt()
            warm = (self.steps >= self.warmup).float()  # 0 or 1: an `if` would make the host wait for the device
            self.r = 1 + warm * ((std / running_std).clamp(1 / self.r_max, self.r_max) - 1)
            self.d = warm * ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.running_mean.lerp_(mean, 1 - self.momentum)  # only now: r and d use the old ones
            self.running_var.lerp_(var, 1 - self.momentum)
            self.steps += 1
        return (centred * (self.r / std) + self.d) * self.scale + self.bias


class MLP(nn.Module):
    """Norm -> (x W + b -> ReLU -> norm) x 2 -> x W + b: [B, n_in] -> [B, n_out]; ensemble=(N,): [N, B, n_out]."""

    def __init__(self, n_in: int, width: int, n_out: int, args: Args, ensemble: tuple = ()):
        super().__init__()
        sizes = (n_in, width, width, n_out)
        self.norms = nn.ModuleList(BatchRenorm((*ensemble, 1, n)) for n in sizes[:3])
        self.weights = nn.ParameterList(torch.empty(*ensemble, n, m) for n, m in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(*ensemble, 1, m) for m in sizes[1:])
        for weight in self.weights:  # LeCun normal: the default of flax, so of the official code
            std = weight.shape[-2] ** -0.5 / 0.87962566103423978
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x) @ self.weights[0] + self.biases[0]
        x = self.norms[1](x.relu()) @ self.weights[1] + self.biases[1]
        return self.norms[2](x.relu()) @ self.weights[2] + self.biases[2]


class ReplayBuffer:
    """The last `capacity` transitions, float32, on the device, one row each: obs, action, reward, done, next_obs."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths, self.position, self.size = [obs_dim, action_dim, 1, 1, obs_dim], 0, 0
        needed, pages = 4 * capacity * sum(self.widths), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else pages
        check(needed <= memory, f"--buffer-size {capacity:,} needs {needed:,} bytes of memory, there are {memory:,}")
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # on a CPU, memory is taken when written

    def add(self, obs, action, reward: float, done: bool, next_obs) -> None:
        self.rows[self.position] = torch.from_numpy(np.hstack([obs, action, reward, done, next_obs], dtype=np.float32))
        self.position, self.size = (self.position + 1) % len(self.rows), min(self.size + 1, len(self.rows))

    def sample(self, n: int, rng: torch.Generator) -> list[torch.Tensor]:
        """n transitions, uniform with replacement: obs [n, O], action [n, A], reward [n], done [n], next_obs [n, O]."""
        index = torch.randint(self.size, (n,), generator=rng, device=self.rows.device)
        obs, action, reward, done, next_obs = self.rows[index].split(self.widths, -1)
        return [obs, action, reward.squeeze(-1), done.squeeze(-1), next_obs]


class Agent(nn.Module):
    """CrossQ: networks, optimisers and the two updates. The mode, train or eval, stands beside every forward."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.n_updates = args, 0
        self.critic = MLP(obs_dim + action_dim, args.critic_width, 1, args, ensemble=(args.n_critics,))
        self.actor = MLP(obs_dim, args.actor_width, action_dim, args)
        betas = (args.adam_beta1, 0.999)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), args.actor_lr, betas, fused=True)
        worth_it = args.total_timesteps * args.utd >= 20_000 * args.action_repeat and shutil.which("g++")
        if args.compile == "on" or (args.compile == "auto" and worth_it):
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph
            self.gradients = torch.compile(self.gradients, fullgraph=True)

    def critic_loss(self, obs, action, reward, done, next_obs, noise):
        """Half the squared Bellman error, mean over the batch, sum over critics; shapes as in ReplayBuffer.sample."""
        with torch.no_grad():
            self.actor.eval()
            clip = self.args.target_noise_clip
            next_action = self.actor(next_obs).tanh() + (self.args.target_noise * noise).clamp(-clip, clip)
            next_action = next_action.clamp(-1, 1)
        # CrossQ: ONE forward of the critic, in training mode, on both halves together; no target network.
        self.critic.train()
        pairs = torch.cat([torch.cat([obs, action], -1), torch.cat([next_obs, next_action], -1)])  # [2B, O + A]
        q, next_q = self.critic(pairs).squeeze(-1).chunk(2, -1)  # [n_critics, B] each
        target = (reward + self.args.gamma * (1 - done) * next_q.min(0).values).detach()  # [B]
        loss = 0.5 * (q - target).square().mean(-1).sum()
        return loss, {"losses/critic": loss, "diagnostics/q_mean": q.mean()}

    def actor_loss(self, obs):
        """The policy's loss, Q negated: obs [B, O]."""
        self.actor.train()
        action = self.actor(obs).tanh()
        self.critic.eval()
        q = self.critic(torch.cat([obs, action], -1)).squeeze(-1).min(0).values  # [B]; TD3 itself: the first critic's
        loss = -q.mean()
        return loss, {"losses/actor": loss}

    def gradients(self, loss, parameters, *batch):
        value, info = loss(*batch)
        return {k: v.detach() for k, v in info.items()}, torch.autograd.grad(value, parameters)

    def descend(self, optimizer: torch.optim.Optimizer, loss, *batch) -> dict:
        """One step of the optimizer's own parameters, and of no others, on loss(*batch). Returns scalars."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        info, gradients = self.gradients(loss, parameters, *batch)
        for p, g in zip(parameters, gradients):
            p.grad = g
        optimizer.step()
        return info

    def update(self, batch, rng: torch.Generator) -> dict:
        """A critic update and, with every `policy_delay`-th one, an actor update on the same batch. Returns scalars."""
        info = self.descend(self.critic_opt, self.critic_loss, *batch, torch.randn_like(batch[1], generator=rng))
        self.n_updates += 1
        if self.n_updates % self.args.policy_delay == 0:
            info |= self.descend(self.actor_opt, self.actor_loss, batch[0])
        return info

    @torch.inference_mode()
    def act(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """obs [O] -> action [A] in [-1, 1]; noise [A] is standard normal, or zero for the deterministic policy."""
        self.actor.eval()
        action = self.actor(torch.from_numpy(obs).to(noise.device)[None])[0].tanh()
        return (action + self.args.exploration_noise * noise).clamp(-1, 1).cpu().numpy()


def evaluate(agent: Agent, env: gym.Env, step: int) -> list[tuple]:
    """Deterministic episodes, as rows of evaluations.csv: step, episode, return, length, success (if there is one)."""
    rows, args, zero = [], agent.args, torch.zeros(env.action_space.shape, device=next(agent.parameters()).device)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=reset_seed(args.seed, step, episode))
        success, terminated, truncated = "", False, False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, info = env.step(agent.act(obs, zero))
            check(np.isfinite([*obs, reward]).all(), f"NaN or infinity in the evaluation at {step}, reward {reward}", 1)
            for key in {"solved", "is_success", "success"} & info.keys():
                success = max(success or 0, int(info[key]))  # success at any time counts
        rows.append((step, episode, float(info["episode"]["r"]), int(info["episode"]["l"]), success))
    return rows


def parse_args(argv: list[str] | None) -> tuple[Args, dict]:
    """The arguments, checked, and the checkpoint of --resume or --evaluate, otherwise {}."""
    args, checkpoint = tyro.cli(Args, args=argv), {}
    args = tyro.cli(Args, args=argv, default=Args(**{"dm_": DMC, "myo": MYO}.get(args.env_id.split(":")[-1][:3], {})))
    if (run_dir := args.evaluate if args.resume is None else args.resume) is not None:
        try:
            checkpoint = torch.load(Path(run_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)  # no code
            check(checkpoint["script"] == SCRIPT.name, f"{run_dir} is a run of {checkpoint['script']}")
            stored = Args(**checkpoint["args"] | {"resume": args.resume, "evaluate": args.evaluate})
        except Exception as e:  # torch.load raises many kinds
            check(False, f"{run_dir} has no whole checkpoint.pt of {SCRIPT.name}; it was left as it is ({e!r:.200})")
        args = tyro.cli(Args, args=argv, default=stored)
        changed = [name for name, old in vars(stored).items() if getattr(args, name) != old and name not in MAY_CHANGE]
        ok = not changed and args.total_timesteps >= stored.total_timesteps
        check(ok, f"{changed or 'total_timesteps'} of {run_dir} cannot change so; can: {MAY_CHANGE}, the first upwards")
    for name, value in vars(args).items():
        high = {"gamma": 1, "tau": 1, "adam_beta1": 0.999}.get(name, 1e15)
        zero = high <= 1 or re.search("seed|starts|alpha_lr|noise|decay", name) is not None
        ok = type(value) not in (int, float) or (0 if zero else 1e-12) <= value <= high
        check(ok, f"--{name.replace('_', '-')} is {value}; it must be {'>=' if zero else '>'} 0 and <= {high:g}")
    check(args.buffer_size >= args.batch_size, f"--buffer-size must be at least --batch-size, {args.batch_size}")
    check(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is none; use --device cpu or auto")
    return args, checkpoint


def train(args: Args, checkpoint: dict) -> int:
    """Train, or with --evaluate only evaluate; returns the exit code: 0, or 128 + the signal that ended the run."""
    env, eval_env = make_env(args), make_env(args, **{"render_mode": "rgb_array"} if args.capture_video else {})
    obs_dim, action_dim, repeat = env.observation_space.shape[0], env.action_space.shape[0], args.action_repeat
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    torch.set_float32_matmul_precision("medium")  # oneDNN's products: faster than MKL's on AMD with AVX-512
    if ((a := torch.rand(256, 256, device=device)) @ a - a.double() @ a.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision(args.matmul_precision)  # there medium rounds: to bfloat16 (AMX), TF32 (CUDA)
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim, args).to(device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    rng = torch.Generator(device).manual_seed(args.seed)  # all randomness from here on, but the environment's
    agent_step, episode, actions, evaluations, agent.n_updates = checkpoint.get("loop", (0, 0, [], [], 0))
    step = agent_step * repeat
    run_name = args.run_name or f"{args.env_id}__{SCRIPT.stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.evaluate or Path("runs") / re.sub(r"[/\\:]|^\.+$", "_", run_name))
    new = not any((run_dir / file).exists() for file in ("checkpoint.pt", "evaluations.csv"))
    check(new or checkpoint, f"{run_dir} already holds a run: --resume {run_dir}, or choose another --run-name")
    if args.capture_video:
        importlib.import_module("moviepy")
        eval_env = gym.wrappers.RecordVideo(eval_env, f"{run_dir}/videos/{step}", lambda i: i % args.eval_episodes == 0)
    parts = {"agent": agent, "critic_opt": agent.critic_opt, "actor_opt": agent.actor_opt}
    for name in parts if checkpoint else ():
        parts[name].load_state_dict(checkpoint[name])
    if args.evaluate:
        _, _, returns, _, successes = zip(*evaluate(agent, eval_env, step))
        success = "" if "" in successes else f", success {np.mean(successes):.2f}"
        print(f"{run_dir} at step {step}: {np.mean(returns):.1f} ± {np.std(returns):.1f}{success}")
        return eval_env.close() or 0
    obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
    if checkpoint:
        buffer.size, buffer.position = len(checkpoint["rows"]), checkpoint["position"]
        buffer.rows[: buffer.size] = checkpoint.pop("rows")
        if checkpoint["rng"].shape == rng.get_state().shape:  # another kind of device has another generator
            rng.set_state(checkpoint["rng"])
        for action in actions:  # play the open episode again, up to where it was
            obs, *_ = env.step(np.float32(action))
        check(obs.tolist() == checkpoint["obs"], f"{args.env_id} is not deterministic: it cannot be resumed", 1)

    def save() -> None:
        """Killed at any time, checkpoint.pt is the old or the new one, whole. Uncloned, all rows would be written."""
        state = {name: part.state_dict() for name, part in parts.items()} | {"script": SCRIPT.name, "args": vars(args)}
        state |= {"loop": (agent_step, episode, actions, evaluations, agent.n_updates), "position": buffer.position}
        state |= {"rng": rng.get_state(), "obs": obs.tolist(), "rows": buffer.rows[: buffer.size].cpu().clone()}
        with open(run_dir / "checkpoint.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")

    if args.track:
        importlib.import_module("wandb").init(id=run_dir.name, resume="allow", config=vars(args), sync_tensorboard=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    save()
    git = os.popen(f"git -C '{SCRIPT.parent}' rev-parse HEAD 2>/dev/null").read().strip()
    about = {p: importlib.metadata.version(p) for p in ("torch", "gymnasium", "mujoco", "numpy")} | {"git": git}
    (run_dir / "args.json").write_text(json.dumps({"args": vars(args), "device": hardware} | about, indent=2))
    table = open(run_dir / "evaluations.csv", "w", buffering=1, newline="\n")  # flushed by the line
    table.writelines(",".join(map(str, row)) + "\n" for row in [("step,episode,return,length,success",), *evaluations])
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in agent.named_children())
    advice = "; slow on a CPU, try --critic-width 256" if device.type == "cpu" and args.critic_width > 512 else ""
    chosen = ", ".join(f"{name} {value}" for name, value in vars(args).items() if value != getattr(Args, name))
    print(f"{run_dir} on {hardware}: {chosen or args.env_id}; {sizes} parameters; buffer {buffer.rows.nbytes:,} bytes")
    progress = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    stop, info, first, start, warm = [], {}, step, time.perf_counter(), max(agent_step, args.learning_starts) + 100
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: stop.append(number))
    while step < args.total_timesteps and not stop:
        if agent_step < args.learning_starts:
            action = torch.rand(action_dim, generator=rng, device=device).cpu().numpy() * 2 - 1
        else:
            action = agent.act(obs, torch.randn(action_dim, generator=rng, device=device))
        next_obs, reward, terminated, truncated, episode_info = env.step(action)
        agent_step, step = agent_step + 1, step + repeat
        buffer.add(obs, action, reward, terminated, next_obs)
        actions.append(action.tolist())
        last_obs, obs = obs, next_obs
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_info["episode"]["r"], step)
            episode, actions = episode + 1, []
            obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
        ok = np.isfinite(np.hstack([last_obs, next_obs, obs, reward], dtype=np.float32)).all()
        check(ok, f"NaN or infinity from the environment at step {step}: an observation, or the reward {reward}", 1)
        if agent_step > args.learning_starts:
            for update in range(args.utd):
                info |= agent.update(buffer.sample(args.batch_size, rng), rng)
                for key, value in zip(info, torch.stack([*info.values()]).tolist()):  # CUDA is waited for once
                    check(math.isfinite(value), f"{key} became NaN or infinite at step {step}", 1)
                    if agent_step % 1000 == 0 and update == args.utd - 1:
                        writer.add_scalar(key, value, step)
        if agent_step == warm:  # compiled by now
            first, start = step, time.perf_counter()
        speed = (step - first) / (time.perf_counter() - start + 1e-9)  # environment steps per second
        if agent_step == warm + 200:
            progress.write(f"{speed:.0f} steps/s, {(args.total_timesteps - step) / speed / 60:.0f} min to go{advice}")
        if step % args.eval_every < repeat:
            rows = evaluate(agent, eval_env, step)
            evaluations += rows
            table.writelines(",".join(map(str, row)) + "\n" for row in rows)
            mean = float(np.mean([row[2] for row in rows]))
            writer.add_scalar("eval/return", mean, step)
            writer.add_scalar("charts/SPS", speed, step)
            progress.write(f"step {step:,}: evaluation return {mean:,.1f}; so far {speed:.0f} steps/s")
        progress.update(repeat)
        if step % args.checkpoint_every < repeat:
            save()
    save()
    writer.close()
    progress.write(f"ended at step {step:,}; --resume {run_dir} goes on from here")
    return eval_env.close() or (128 + stop[0] if stop else 0)


def main(argv: list[str] | None = None) -> int:
    gym.logger.min_level = gym.logger.ERROR  # no advice to use -v5: the papers use -v4
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            args, checkpoint = parse_args(argv)
    except SystemExit as e:  # tyro's errors come in a box
        return check(not e.code, re.sub(f"[─│╭╮╰╯]+|{SCRIPT.name}: error:", " ", box.getvalue())) or 0
    try:
        return train(args, checkpoint)
    except ImportError as e:
        check(False, f"{e}{f'; this needs: pip install {e.name}' if e.name else ''}")
    except (OSError, RuntimeError) as e:  # of the run's folder at the start, or later a full disk
        if isinstance(e, RuntimeError) and not isinstance(e.__context__, OSError):
            raise
        check(False, str(e.__context__ or e), 1 + isinstance(e, PermissionError | FileExistsError | NotADirectoryError))


if __name__ == "__main__":
    sys.exit(main())
