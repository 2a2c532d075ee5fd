"""CrossQ on SAC, in one file.

Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample
Efficiency and Simplicity", ICLR 2024 (arXiv 1902.05605). SAC's target networks are deleted. In
exchange the critic is batch-(re)normalised and sees (s, a) and (s', a') in ONE forward pass, so
that both are normalised with statistics of the same mixture. With wider critics this matches
REDQ and DroQ at an update-to-data ratio of 1 instead of 20.

    python crossq_sac.py --env-id Walker2d-v4                            # the paper's setting
    python crossq_sac.py --env-id HalfCheetah-v4 --critic-width 256      # "CrossQ small", for a CPU
    python crossq_sac.py --resume runs/NAME                              # go on after a kill
    python crossq_sac.py --evaluate runs/NAME --eval-episodes 10         # how good is it?
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium[mujoco]==1.2.3",
#   "mujoco==3.17.0",
#   "numpy==2.4.6; python_version >= '3.11'",
#   "numpy==2.2.6; python_version < '3.11'",
#   "tyro==1.0.17",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
# ]
# ///
import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
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

SCRIPT = "crossq_sac.py"
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # hard clip, as in the official code
LOG_EVERY = 1000  # agent steps between two rows of losses and diagnostics
MAY_CHANGE_ON_RESUME = {  # besides an extended --total-timesteps
    "device", "compile", "eval_every", "eval_episodes", "eval_q_bias", "checkpoint_every", "capture_video", "track",
    "resume", "evaluate",
}  # fmt: skip
ACTIVATIONS = {  # paper, figure 16
    "relu": F.relu,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "sin": torch.sin,
    "elu": F.elu,
    "glu": F.glu,  # halves the width
    "relu-over-max": lambda x: F.relu(x) / (F.relu(x).amax((-2, -1), keepdim=True) + 1e-6),
    "layernormed-relu": lambda x: F.layer_norm(F.relu(x), x.shape[-1:], eps=1e-6),
}
Norm = Literal["brn", "bn", "ln", "none"]


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # Gymnasium id; your own: my_module:MyEnv-v0, found from the current directory
    seed: int = 1  # seed of the networks, the exploration and the environment
    total_timesteps: int = 1_000_000  # environment steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    # The algorithm
    critic_width: int = 2048  # units per hidden layer (paper 3.3; 256 is "CrossQ small")
    actor_width: int = 256  # units per hidden layer
    n_critics: int = 2  # critics in the ensemble
    critic_norm: Norm = "brn"  # batch renorm, batch norm, layer norm before the activation, none (figures 8, 13)
    actor_norm: Norm = "brn"  # the same for the actor
    bn_momentum: float = 0.99  # share of the old running statistics kept at an update (PyTorch's is 1 - this)
    brn_warmup: int = 100_000  # training forwards of plain batch norm before batch renorm (table 1)
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # of the critic (figure 16)
    critic_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    actor_lr: float = 1e-3  # Adam (table 1; DeepMind Control: 8e-4)
    alpha_lr: float = 1e-3  # Adam with its default betas
    adam_beta1: float = 0.5  # of actor and critic (table 1; Adam's default is 0.9)
    policy_delay: int = 3  # critic updates per actor update (table 1; DeepMind Control: 1)
    utd: int = 1  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 256  # transitions
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 5000  # uniformly random agent steps before the first update
    gamma: float = 0.99  # discount (Swimmer: 0.9999)
    alpha: float = 1.0  # initial entropy temperature
    autotune: bool = True  # learn alpha towards an entropy of -dim(A); --no-autotune keeps it fixed
    q_aggregation: Literal["min", "mean"] = "min"  # over the critics, in the target and in the actor's loss
    bootstrap_at_termination: bool = False  # bootstrap at terminations too, not only at truncations
    action_repeat: int = 1  # environment steps per agent step; rewards are summed
    # The run
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # deterministic episodes per evaluation
    eval_q_bias: bool = False  # measure the Q-function's bias at each evaluation (section 4.3; slow)
    run_name: str | None = None  # folder under runs/; default ENV__SCRIPT__SEED__TIME
    checkpoint_every: int = 25_000  # environment steps between checkpoints
    resume: str | None = None  # runs/NAME: go on from its checkpoint
    evaluate: str | None = None  # runs/NAME: evaluate its policy and exit
    capture_video: bool = False  # mp4 of an episode per evaluation (needs moviepy; headless: libegl1 or libosmesa6)
    track: bool = False  # log to Weights & Biases too (needs wandb)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on from 20 000 updates if it works


def fail(message: str, code: int = 2):
    """End with one line. Code 2: a wrong argument, environment or checkpoint; 1: a run that went wrong."""
    print(f"{SCRIPT}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


# ---------------------------------------------------------------------------------- environment


class ActionRepeat(gym.Wrapper):
    """Plays each action n times, sums the rewards, stops at an episode's end."""

    def __init__(self, env: gym.Env, n: int):
        super().__init__(env)
        self.n = n

    def step(self, action):
        total = 0.0
        for _ in range(self.n):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(env_id: str, action_repeat: int = 1, render_mode: str | None = None) -> gym.Env:
    """One environment with float32 vector observations and actions in [-1, 1]; exits with code 2 if unsuitable."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for --env-id my_module:MyEnv-v0
    if render_mode and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*out of date.*")  # the papers use -v4
            env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.NameNotFound, gym.error.NamespaceNotFound, gym.error.VersionNotFound, gym.error.UnregisteredEnv):
        near = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
        fail(f"unknown environment {env_id!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    except (gym.error.Error, ImportError, AttributeError) as e:
        fail(f"environment {env_id!r} cannot be made: {e}")
    obs_space, act_space = env.observation_space, env.action_space
    if not isinstance(act_space, gym.spaces.Box) or len(act_space.shape) != 1 or not act_space.is_bounded():
        fail(f"{env_id} has the action space {act_space}; a bounded one-dimensional Box is needed")
    leaves = list(obs_space.values()) if isinstance(obs_space, gym.spaces.Dict) else [obs_space]
    if not all(isinstance(s, gym.spaces.Box) for s in leaves):
        fail(f"{env_id} has the observation space {obs_space}; a Box or a Dict of Boxes is needed")
    if any(len(s.shape) >= 3 for s in leaves):
        fail(f"{env_id} has image observations; this script is for vectors")
    env = gym.wrappers.FlattenObservation(env) if leaves[0] is not obs_space or obs_space.shape == () else env
    env = gym.wrappers.RescaleAction(gym.wrappers.DtypeObservation(env, np.float32), np.float32(-1), np.float32(1))
    return ActionRepeat(env, action_repeat) if action_repeat > 1 else env


def episode_seed(*key: int) -> int:
    """A reset seed from (run seed, stream, episode): a resumed run needs no environment state."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# ------------------------------------------------------------------------------------- networks


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe 2017, arXiv 1702.03275) over the batch dimension of x [..., B, F].

    In training mode x_hat = (x - mean_B) / std_B * r + d, with r = std_B / std_running and
    d = (mean_B - mean_running) / std_running, clipped and without gradient: the value is that of
    inference, the gradient that of batch norm. The first `warmup` training forwards are plain
    batch norm (r = 1, d = 0); warmup=inf never leaves it. In eval mode the running statistics normalise.
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
        self.r, self.d = torch.ones(shape), torch.zeros(shape)  # the last ones, for diagnostics

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
            warm = (self.steps >= self.warmup).float()  # 0 or 1; an `if` would make the device wait
            r = 1 + warm * ((std / running_std).clamp(1 / self.r_max, self.r_max) - 1)
            d = warm * ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.r, self.d = r, d
            self.running_mean.lerp_(mean.detach(), 1 - self.momentum)  # after r and d: those use the old ones
            self.running_var.lerp_(var.detach(), 1 - self.momentum)
            self.steps += 1
        return (centred * (r / std) + d) * self.scale + self.bias


class LayerNorm(nn.Module):
    """Layer normalisation of x [..., F] with a gain and bias of `shape`, as BatchRenorm has (ablation, figure 13)."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scale + self.bias


class Dense(nn.Module):
    """x [..., n_in] -> [..., n_out], or with ensemble=(N,): x [B, n_in] or [N, B, n_in] -> [N, B, n_out]."""

    def __init__(self, n_in: int, n_out: int, ensemble: tuple = ()):
        super().__init__()
        std = n_in**-0.5 / 0.87962566103423978  # LeCun normal: flax's default, as the paper's code
        self.weight = nn.Parameter(torch.empty(*ensemble, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(*ensemble, 1, n_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.name](x)


def mlp(n_in, width, n_out, norm, activation, args, ensemble=()) -> nn.Sequential:
    """Norm -> (Dense -> activation -> norm) x 2 -> Dense. Layer norm sits before the activation, and not on the input."""
    hidden = width // 2 if activation == "glu" else width
    warmup = args.brn_warmup if norm == "brn" else math.inf

    def batch_norm(n):
        return [BatchRenorm((*ensemble, 1, n), args.bn_momentum, warmup)] if norm in ("brn", "bn") else []

    layers = batch_norm(n_in)
    for n in (n_in, hidden):
        layers += [Dense(n, width, ensemble)]
        layers += [LayerNorm((*ensemble, 1, width))] if norm == "ln" else []
        layers += [Activation(activation)] + batch_norm(hidden)
    return nn.Sequential(*layers, Dense(hidden, n_out, ensemble))


class Critic(nn.Module):
    """An ensemble of Q-functions: obs [B, O], action [B, A] -> Q [n_critics, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        ensemble = (args.n_critics,)
        self.net = mlp(obs_dim + action_dim, args.critic_width, 1, args.critic_norm, args.activation, args, ensemble)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)


class Actor(nn.Module):
    """A tanh-squashed Gaussian policy in [-1, 1]: obs [B, O] -> mean and log_std before the squashing, [B, A] each."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim, args.actor_width, 2 * action_dim, args.actor_norm, "relu", args)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs [B, O] and standard normal noise [B, A] -> action [B, A] and its log-probability [B]."""
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without overflow
        return u.tanh(), log_prob.sum(-1)


# ---------------------------------------------------------------------------------------- agent


class ReplayBuffer:
    """The last `capacity` transitions, float32, on the device, one row each: obs, action, reward, done, next_obs."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # a CPU hands out the pages when written
        self.position, self.size = 0, 0

    def add(self, obs, action, reward: float, done: float, next_obs) -> None:
        row = np.concatenate([obs, action, [reward, done], next_obs], dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row)
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, n: int, rng: torch.Generator):
        """n transitions, uniform with replacement: obs [n, O], action [n, A], reward [n], done [n], next_obs [n, O]."""
        index = torch.randint(self.size, (n,), generator=rng, device=self.rows.device)
        obs, action, reward, done, next_obs = self.rows[index].split(self.widths, -1)
        return obs, action, reward.squeeze(-1), done.squeeze(-1), next_obs

    def state_dict(self) -> dict:
        filled = torch.from_numpy(self.rows[: self.size].cpu().numpy())  # saving a torch slice would save it all
        return {"rows": filled, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.position = len(state["rows"]), state["position"]
        self.rows[: self.size] = state["rows"]


class CrossQ:
    """Networks, optimisers and the two updates. Every method sets the mode (train or eval) that its forwards need."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        self.args, self.device, self.action_dim, self.target_entropy = args, device, action_dim, -float(action_dim)
        self.critic = Critic(obs_dim, action_dim, args).to(device)
        self.actor = Actor(obs_dim, action_dim, args).to(device)
        self.log_alpha = torch.tensor(math.log(args.alpha), device=device, requires_grad=True)
        self.critic_parameters, self.actor_parameters = list(self.critic.parameters()), list(self.actor.parameters())
        betas = (args.adam_beta1, 0.999)
        self.critic_opt = torch.optim.Adam(self.critic_parameters, args.critic_lr, betas, fused=True)
        self.actor_opt = torch.optim.Adam(self.actor_parameters, args.actor_lr, betas, fused=True)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], args.alpha_lr, fused=True)
        self.n_updates = 0

    def aggregate(self, q: torch.Tensor) -> torch.Tensor:
        return q.min(0).values if self.args.q_aggregation == "min" else q.mean(0)  # [n_critics, B] -> [B]

    def critic_gradients(self, obs, action, reward, done, next_obs, noise):
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(next_obs, noise)  # actor in eval mode
        # CrossQ: one forward pass, critic in training mode, over both halves together. No target network.
        q = self.critic(torch.cat([obs, next_obs]), torch.cat([action, next_action]))  # [n_critics, 2B]
        q, next_q = q.chunk(2, -1)  # [n_critics, B] each
        next_value = self.aggregate(next_q) - self.log_alpha.exp() * next_log_prob
        target = (reward + self.args.gamma * (1 - done) * next_value).detach()  # [B]
        loss = 0.5 * (q - target).square().mean(-1).sum()
        gradients = torch.autograd.grad(loss, self.critic_parameters)
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}, gradients

    def actor_gradients(self, obs, noise):
        alpha = self.log_alpha.exp()
        action, log_prob = self.actor.sample(obs, noise)  # actor in training mode
        q = self.aggregate(self.critic(obs, action))  # critic in eval mode: [B]
        entropy = -log_prob.mean()
        actor_loss = (alpha.detach() * log_prob - q).mean()
        alpha_loss = alpha * (entropy.detach() - self.target_entropy)
        # The gradients are taken with respect to the actor and log_alpha only: the critic is frozen.
        *gradients, alpha_gradient = torch.autograd.grad(
            actor_loss + alpha_loss, [*self.actor_parameters, self.log_alpha]
        )
        info = {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "entropy": entropy, "alpha": alpha}
        return {k: v.detach() for k, v in info.items()}, gradients, alpha_gradient

    def update_critic(self, obs, action, reward, done, next_obs, noise) -> dict:
        """One gradient step on a batch (shapes as `ReplayBuffer.sample`); noise [B, A] draws a'."""
        self.actor.eval()
        self.critic.train()
        info, gradients = self.critic_gradients(obs, action, reward, done, next_obs, noise)
        step_optimizer(self.critic_opt, gradients)
        self.n_updates += 1
        return info

    def update_actor(self, obs, noise) -> dict:
        """One gradient step of the actor on obs [B, O], then one of the temperature."""
        self.actor.train()
        self.critic.eval()
        info, gradients, alpha_gradient = self.actor_gradients(obs, noise)
        step_optimizer(self.actor_opt, gradients)
        if self.args.autotune:
            step_optimizer(self.alpha_opt, [alpha_gradient])
        return info

    def update(self, batch, rng: torch.Generator) -> dict:
        """A critic update, and with every `policy_delay`-th one an actor update on the same batch. Returns scalars."""
        info = self.update_critic(*batch, torch.randn(batch[1].shape, generator=rng, device=self.device))
        if self.n_updates % self.args.policy_delay == 0:
            info |= self.update_actor(batch[0], torch.randn(batch[1].shape, generator=rng, device=self.device))
        return info

    @torch.inference_mode()
    def act(self, obs: np.ndarray, noise: torch.Tensor | float = 0.0) -> np.ndarray:
        """obs [O] -> action [A] in [-1, 1]; noise [A] is standard normal, without it the policy is deterministic."""
        self.actor.eval()
        mean, log_std = self.actor(torch.from_numpy(obs).to(self.device)[None])
        return (mean + log_std.exp() * noise).tanh()[0].cpu().numpy()

    def compile(self) -> None:
        """Compile loss and gradient into one graph each; the optimisers stay outside."""
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph: torch >= 2.11
        self.critic_gradients = torch.compile(self.critic_gradients, fullgraph=True)
        self.actor_gradients = torch.compile(self.actor_gradients, fullgraph=True)

    def modules(self) -> dict:
        return {k: getattr(self, k) for k in ("critic", "actor", "critic_opt", "actor_opt", "alpha_opt")}

    def state_dict(self) -> dict:
        state = {k: m.state_dict() for k, m in self.modules().items()}
        return state | {"log_alpha": self.log_alpha.detach(), "n_updates": self.n_updates}

    def load_state_dict(self, state: dict) -> None:
        for k, m in self.modules().items():
            m.load_state_dict(state[k])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.n_updates = state["n_updates"]


def step_optimizer(optimizer: torch.optim.Optimizer, gradients) -> None:
    for p, g in zip(optimizer.param_groups[0]["params"], gradients):
        p.grad = g
    optimizer.step()


# ----------------------------------------------------------------------------------- evaluation


def evaluate(agent: CrossQ, env: gym.Env, episodes: int, *seed: int) -> list[tuple[float, int, str]]:
    """Deterministic episodes in a separate environment: (return, length in environment steps, success or "") of each."""
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode_seed(*seed, episode))
        total, length, success, over = 0.0, 0, "", False
        while not over:
            obs, reward, terminated, truncated, info = env.step(agent.act(obs))
            total, length, over = total + float(reward), length + agent.args.action_repeat, terminated or truncated
            for key in {"solved", "is_success", "success"} & info.keys():
                success = max(success or 0, int(info[key]))
        results.append((total, length, success))
    return results


def q_bias(agent: CrossQ, env: gym.Env, rng: torch.Generator, *seed: int, pairs: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation of (Q - G) / |mean G| over at least `pairs` pairs (s, a) of the stochastic policy.

    G is the discounted soft Monte-Carlo return, G_t = r_t + gamma (G_t+1 - alpha log pi(a_t+1|s_t+1)). As in Chen et
    al. 2021, the last 65 % of an episode cut by a time limit are left out: their returns are cut too.
    """
    agent.actor.eval()
    agent.critic.eval()
    alpha, all_q, all_g, episode = agent.log_alpha.exp().item(), [], [], 0
    with torch.no_grad():
        while sum(map(len, all_g)) < pairs:
            obs, _ = env.reset(seed=episode_seed(*seed, episode))
            q, rewards, log_probs, over, episode = [], [], [], False, episode + 1
            while not over:
                obs = torch.from_numpy(obs).to(agent.device)[None]
                noise = torch.randn(1, agent.action_dim, generator=rng, device=agent.device)
                action, log_prob = agent.actor.sample(obs, noise)
                q.append(agent.aggregate(agent.critic(obs, action)).item())
                obs, reward, terminated, truncated, _ = env.step(action[0].cpu().numpy())
                rewards.append(float(reward))
                log_probs.append(log_prob.item())
                over = terminated or truncated
            g, soft = np.zeros(len(q)), 0.0  # soft: G_t+1 - alpha log pi(a_t+1 | s_t+1)
            for t in reversed(range(len(q))):
                g[t] = rewards[t] + agent.args.gamma * soft
                soft = g[t] - alpha * log_probs[t]
            keep = len(q) if terminated else math.ceil(0.35 * len(q))
            all_q.append(q[:keep])
            all_g.append(g[:keep])
    q, g = np.concatenate(all_q), np.concatenate(all_g)
    bias = (q - g) / max(abs(g.mean()), 1e-8)
    return float(bias.mean()), float(bias.std())


def diagnostics(agent: CrossQ) -> dict:
    """Per dense layer of critic and actor: weight norm, gradient norm and their ratio, the effective learning rate
    of CrossQ + WN (section 4); per batch renorm layer: the ranges of r and d in its last training forward."""
    out = {}
    for net_name, net in (("critic", agent.critic), ("actor", agent.actor)):
        for name, m in net.net.named_children():
            key = f"{net_name}_{name}_{type(m).__name__.lower()}"
            if isinstance(m, Dense) and m.weight.grad is not None:
                w, g = m.weight.detach().norm().item(), m.weight.grad.norm().item()
                out |= {f"{key}/weight_norm": w, f"{key}/grad_norm": g, f"{key}/effective_lr": g / w}
            elif isinstance(m, BatchRenorm):
                out |= {f"{key}/r_min": m.r.min().item(), f"{key}/r_max": m.r.max().item()}
                out |= {f"{key}/d_abs_max": m.d.abs().max().item()}
    return out


# -------------------------------------------------------------------------------- files of a run


def write_atomically(path: Path, write) -> None:
    """write(file) aside, flush, rename: after a kill or a power cut `path` is the old file or the new one, whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            aside.unlink()
        fail(f"{path} could not be written: {e}; what was there before is still whole", 1)


def read_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data, not code
        args, script = Args(**checkpoint["args"]), checkpoint["script"]
    except FileNotFoundError:
        fail(f"there is no {path}; give the folder of a run, as in --resume runs/NAME")
    except Exception as e:  # torch.load raises many kinds
        fail(f"{path} is not a whole checkpoint of {SCRIPT} ({type(e).__name__}); it was left as it is")
    if script != SCRIPT:
        fail(f"{path} was written by {script}, not by {SCRIPT}")
    return checkpoint | {"args": args}


def describe(args: Args, device: torch.device) -> dict:
    """What args.json holds: arguments, git revision, versions, device."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {m.__name__: m.__version__ for m in (torch, gym, mujoco, np)} | {"python": sys.version.split()[0]}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"args": dataclasses.asdict(args), "git": git.stdout.strip(), "versions": versions, "device": name}


# ----------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """The arguments and, with --resume or --evaluate, the checkpoint; a wrong one ends in one line and exit code 2."""

    def parse(default=None):
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Args, args=argv, default=default)
        except SystemExit as e:
            if e.code:
                fail(re.sub(r"[─│╭╮╰╯]+", " ", box.getvalue()))
            raise

    args, checkpoint = parse(), None
    if run_dir := args.resume or args.evaluate:
        checkpoint = read_checkpoint(run_dir)
        stored = dataclasses.replace(checkpoint["args"], resume=args.resume, evaluate=args.evaluate)
        args = parse(default=stored)
        for name, old in dataclasses.asdict(stored).items():
            new, flag = getattr(args, name), "--" + name.replace("_", "-")
            if new != old and name not in MAY_CHANGE_ON_RESUME and not (name == "total_timesteps" and new > old):
                fail(f"{flag} is {old} in {run_dir} and cannot become {new} there")
    for name, low, high in BOUNDS:
        if not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}], not be {getattr(args, name)}")
    row_bytes = 0
    if args.buffer_size < args.batch_size:
        fail(f"--buffer-size {args.buffer_size} is smaller than one batch (--batch-size {args.batch_size})")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            fail(f"--{flag.replace('_', '-')} needs {package}: pip install {package}")
    return args, checkpoint


POSITIVE = (
    "total_timesteps critic_width actor_width n_critics policy_delay utd batch_size buffer_size action_repeat "
    "eval_every eval_episodes checkpoint_every"
).split()
BOUNDS = (
    [(name, 1, math.inf) for name in POSITIVE]
    + [(name, 1e-12, 1e3) for name in ("critic_lr", "actor_lr", "alpha_lr", "alpha")]
    + [(name, 0, 1) for name in ("gamma", "bn_momentum")]
    + [("adam_beta1", 0, 0.9999999), ("seed", 0, 2**63 - 1), ("brn_warmup", 0, math.inf), ("learning_starts", 0, math.inf)]
)


def measure(agent: CrossQ, env: gym.Env, obs_dim: int) -> float:
    """Compile the updates; seconds per agent step from a short measurement. The agent is left as it was."""
    args, saved, rng = agent.args, copy.deepcopy(agent.state_dict()), torch.Generator(agent.device).manual_seed(0)
    b = args.batch_size
    noise = {"generator": rng, "device": agent.device}
    batch = [torch.randn(*shape, **noise) for shape in ((b, obs_dim), (b, agent.action_dim), (b,), (b,), (b, obs_dim))]

    def seconds(f, n):
        start = time.perf_counter()
        for _ in range(n):
            f()
        agent.log_alpha.item()  # wait for the device
        return (time.perf_counter() - start) / n

    def cycle():
        for _ in range(args.policy_delay):
            agent.update(batch, rng)

    cycle()
    cycle()
    update = seconds(cycle, 2) / args.policy_delay
    agent.load_state_dict(saved)
    obs, _ = env.reset(seed=0)

    def step():
        if any(env.step(agent.act(obs))[2:4]):
            env.reset(seed=0)

    return args.utd * update + seconds(step, 50)


def train(args: Args, checkpoint: dict | None) -> int:
    """Train from scratch or from a checkpoint; returns the exit code (0, or 128 + signal)."""
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    env, eval_env = make_env(args.env_id, args.action_repeat), make_env(
        args.env_id, args.action_repeat, "rgb_array" if args.capture_video else None
    )
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    buffer_bytes = args.buffer_size * 4 * (2 * obs_dim + action_dim + 2)
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if buffer_bytes > memory:
        fail(f"--buffer-size {args.buffer_size} needs {buffer_bytes:,} bytes and {device} has {memory:,}")
    torch.manual_seed(args.seed)
    agent = CrossQ(obs_dim, action_dim, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    rng = torch.Generator(device).manual_seed(args.seed)  # all randomness of the training loop
    agent_step, episode, actions, evaluations = 0, 0, [], []  # actions: those of the current episode
    obs, _ = env.reset(seed=episode_seed(args.seed, 0, episode))
    episode_return = 0.0

    if args.compile == "auto":
        args.compile = "on" if args.total_timesteps * args.utd >= 20_000 * args.action_repeat else "off"
        may_fail = True
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        buffer.load_state_dict(checkpoint["buffer"])
        agent_step, episode, evaluations = checkpoint["agent_step"], checkpoint["episode"], checkpoint["evaluations"]
        if checkpoint["device"] == device.type:
            rng.set_state(checkpoint["rng"])
        obs, _ = env.reset(seed=episode_seed(args.seed, 0, episode))
        for action in checkpoint["actions"].numpy():  # bring the environment back to where it was
            obs, reward, *_ = env.step(action)
            actions.append(action)
            episode_return += float(reward)
        if not np.array_equal(obs, checkpoint["obs"].numpy()):
            print(f"{args.env_id} is not deterministic: its episode starts anew, the resumed run is not bit-identical")
            obs, _ = env.reset(seed=episode_seed(args.seed, 0, episode))
            actions, episode_return = [], 0.0
        run_dir = Path(args.resume)
    else:
        default = f"{args.env_id}__{SCRIPT[:-3]}__{args.seed}__{int(time.time())}"
        run_dir = Path("runs") / (args.run_name or default).replace("/", "_").replace(":", "_")
        if (run_dir / "checkpoint.pt").exists():
            fail(f"{run_dir} already holds a run; go on with --resume {run_dir} or choose another --run-name")
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"{run_dir} cannot be written: {e}")

    def save():
        state = {
            "script": SCRIPT, "args": dataclasses.asdict(args), "device": device.type,
            "agent_step": agent_step, "episode": episode, "evaluations": evaluations, "obs": torch.from_numpy(obs),
            "actions": torch.from_numpy(np.array(actions, np.float32).reshape(-1, action_dim)),
            "agent": agent.state_dict(), "buffer": buffer.state_dict(), "rng": rng.get_state(),
        }  # fmt: skip
        write_atomically(run_dir / "checkpoint.pt", lambda file: torch.save(state, file))

    if not checkpoint:
        save()
    write_atomically(run_dir / "args.json", lambda f: f.write(json.dumps(describe(args, device), indent=2).encode()))
    lines = "".join(f"{line}\n" for line in ["step,episode,return,length,success", *evaluations])
    write_atomically(run_dir / "evaluations.csv", lambda file: file.write(lines.encode()))
    csv = open(run_dir / "evaluations.csv", "a")
    if args.track:
        import wandb

        wandb.init(project="crossq", name=run_dir.name, id=run_dir.name, resume="allow", dir=str(run_dir),
                   config=dataclasses.asdict(args), sync_tensorboard=True)  # fmt: skip
    writer = SummaryWriter(run_dir, purge_step=agent_step * args.action_repeat)
    if args.capture_video:
        eval_env = gym.wrappers.RecordVideo(eval_env, str(run_dir / "videos"), episode_trigger=lambda i: i % args.eval_episodes == 0)

    stop = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda n, _: stop.append(n))
    if args.compile == "on":
        agent.compile()
    per_step = measure(agent, eval_env, obs_dim)
    n_actor, n_critic = (sum(p.numel() for p in m.parameters()) for m in (agent.actor, agent.critic))
    left = args.total_timesteps // args.action_repeat - agent_step
    print(
        f"{args.env_id} on {device} ({'compiled' if args.compile == 'on' else 'eager'}): actor {n_actor:,} and critic "
        f"{n_critic:,} parameters, replay buffer up to {buffer_bytes / 1e6:,.0f} MB, about {left * per_step / 60:.0f} min "
        f"at {args.action_repeat / per_step:.0f} steps/s" + (
            "; on a CPU, --critic-width 256 is many times faster" if device.type == "cpu" and args.critic_width > 512 else "")
    )
    progress = tqdm(total=args.total_timesteps, initial=agent_step * args.action_repeat, disable=None, unit="step")
    start, start_step, info = time.perf_counter(), agent_step, {}

    while (step := agent_step * args.action_repeat) < args.total_timesteps and not stop:
        # ALGO LOGIC: one agent step
        if agent_step < args.learning_starts:
            action = torch.rand(action_dim, generator=rng, device=device).cpu().numpy() * 2 - 1
        else:
            action = agent.act(obs, torch.randn(action_dim, generator=rng, device=device))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent_step += 1
        step += args.action_repeat
        check_finite(step, observation=next_obs, reward=reward)
        buffer.add(obs, action, reward, terminated and not args.bootstrap_at_termination, next_obs)
        actions.append(action)
        episode_return += float(reward)
        obs = next_obs
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            episode, actions, episode_return = episode + 1, [], 0.0
            obs, _ = env.reset(seed=episode_seed(args.seed, 0, episode))
        if agent_step > args.learning_starts:
            for _ in range(args.utd):
                info |= agent.update(buffer.sample(args.batch_size, rng), rng)
            check_finite(step, **{k: v.item() for k, v in info.items()})
            if agent_step % LOG_EVERY == 0:
                for key, value in (info | {f"diagnostics/{k}": v for k, v in diagnostics(agent).items()}).items():
                    writer.add_scalar(key if "/" in key else f"losses/{key}", value, step)
                writer.add_scalar("charts/SPS", (agent_step - start_step) * args.action_repeat / (time.perf_counter() - start), step)

        # Evaluation, then the checkpoint that holds its result
        if step // args.eval_every > (step - args.action_repeat) // args.eval_every:
            results = evaluate(agent, eval_env, args.eval_episodes, args.seed, step)
            for i, (ret, length, success) in enumerate(results):
                evaluations.append(f"{step},{i},{ret!r},{length},{success}")
                print(evaluations[-1], file=csv, flush=True)
            mean = float(np.mean([r[0] for r in results]))
            writer.add_scalar("eval/return", mean, step)
            progress.set_postfix({"eval return": f"{mean:.0f}"})
            if args.eval_q_bias:
                bias = q_bias(agent, eval_env, torch.Generator(device).manual_seed(args.seed), args.seed, step)
                writer.add_scalar("eval/q_bias_mean", bias[0], step)
                writer.add_scalar("eval/q_bias_std", bias[1], step)
        progress.update(args.action_repeat)
        if stop or step >= args.total_timesteps or step // args.checkpoint_every > (step - args.action_repeat) // args.checkpoint_every:
            save()
    progress.close()
    writer.close()
    csv.close()
    if stop:
        print(f"stopped at step {step}; go on with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
        return 128 + stop[0]
    return 0


def check_finite(step: int, **values) -> None:
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            fail(f"{name} is not finite at step {step}; the last checkpoint is from before that", 1)


def main(argv: list[str] | None = None) -> int:
    args, checkpoint = parse_args(argv)
    return train(args, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
