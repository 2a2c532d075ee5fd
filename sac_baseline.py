r"""SAC, in one file (Haarnoja et al., 2018, arXiv 1812.05905), to compare CrossQ with.

The settings are those of CrossQ's paper (arXiv 1902.05605, table 1). Two critics with target
networks learn the soft value, and the temperature holds the policy's entropy at a target.

    python sac_baseline.py --env-id Walker2d-v4
    python sac_baseline.py --env-id Walker2d-v4 --utd 20 --policy-delay 20  # section 4.3
    python sac_baseline.py --resume runs/NAME  # continue after a kill
    python sac_baseline.py --env-id shimmy:dm_control/cheetah-run-v0 --action-repeat 2 \
        --critic-lr 8e-4 --actor-lr 8e-4 --alpha-lr 8e-4  # rates: appendix A.1
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.2.3", "mujoco==3.17.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "numpy==2.2.6"]
# ///
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.optim import Adam, Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Walker2d-v4"  # Gymnasium id; MODULE:ID imports the module first
    seed: int = 1  # of networks, exploration and environment
    total_timesteps: int = 1_000_000  # environment steps
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = True  # torch.compile losses and gradients
    bf16: bool = False  # second layer's product in bfloat16
    critic_width: int = 256  # units per hidden layer
    actor_width: int = 256  # units per hidden layer
    n_critics: int = 2  # Q-functions
    critic_lr: float = 1e-3  # Adam (table 1)
    actor_lr: float = 1e-3  # Adam (table 1)
    alpha_lr: float = 1e-3  # Adam, of the temperature
    adam_beta1: float = 0.9  # of critic and actor (table 1)
    policy_delay: int = 1  # critic updates per actor update (table 1)
    tau: float = 0.005  # the target's step towards the critic; 1: no target
    utd: int = 1  # critic updates per agent step (update-to-data ratio)
    batch_size: int = 256  # transitions
    buffer_size: int = 1_000_000  # transitions
    learning_starts: int = 5000  # random agent steps before the first update
    gamma: float = 0.99  # discount (Swimmer: 0.9999)
    alpha: float = 1.0  # initial temperature, the weight of the entropy
    action_repeat: int = 1  # environment steps per agent step
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # deterministic episodes per evaluation
    checkpoint_minutes: float = 10  # between checkpoints, made as episodes end
    run_name: str | None = None  # folder under runs/; default ENV__PROGRAM__SEED__TIME
    resume: str | None = None  # runs/NAME: continue this run
    track: bool = False  # Weights & Biases too (pip install wandb)


class MLP(nn.Module):
    """(Dense -> ReLU) x 2 -> dense, of joined inputs: [B, n_in] -> [B, n_out].
    With ensemble=(N,) it is N networks side by side: -> [N, B, n_out]."""

    def __init__(self, n_in, width, n_out, args, ensemble=()):
        super().__init__()
        self.bf16 = args.bf16
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for n, m in ((n_in, width), (width, width), (width, n_out)):
            std = n**-0.5 / 0.87962566103423978  # LeCun normal; 0.88 offsets the cut at 2 std
            weight = torch.empty(*ensemble, n, m)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            self.weights.append(weight)
            self.biases.append(torch.zeros(*ensemble, 1, m))

    def forward(self, *inputs):
        x = torch.cat(inputs, -1) @ self.weights[0] + self.biases[0]
        x, weight = x.relu(), self.weights[1]
        if self.bf16:  # most of the work is here; inputs and Q-values stay precise
            x, weight = x.bfloat16(), weight.bfloat16()
        x = x @ weight + self.biases[1]
        return x.relu() @ self.weights[2] + self.biases[2]


class Agent(nn.Module):
    """Networks, optimisers, losses and updates. O, A and B are the sizes of an observation, an
    action and a batch. Actions are in [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        self.target_entropy = -float(action_dim)
        self.n_updates = 0
        self.critic = MLP(obs_dim + action_dim, args.critic_width, 1, args, (args.n_critics,))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = MLP(obs_dim, args.actor_width, 2 * action_dim, args)  # mean and log std
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        betas = (args.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, betas, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, betas, fused=True)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr, fused=True)

    def policy(self, obs, noise):
        """A tanh-squashed Gaussian: obs [B, O], noise [B, A] -> action [B, A], log-prob [B]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # Change of variables: -log(1 - tanh(u)^2), in a form that stays finite.
        log_prob = log_prob - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)

    def critic_loss(self, batch, noise):
        """Half the squared Bellman error, summed over the critics; and q's mean."""
        obs, action, reward, terminated, next_obs = batch
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)
            next_q = self.target_critic(next_obs, next_action).squeeze(-1)  # [n_critics, B]

        q = self.critic(obs, action).squeeze(-1)  # [n_critics, B]

        next_value = next_q.min(0).values - self.log_alpha.exp() * next_log_prob  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        return 0.5 * (q - target).square().mean(1).sum(), q.mean()

    def actor_loss(self, obs, noise):
        """Minus the soft value, Q - alpha * log-prob; and the policy's entropy."""
        action, log_prob = self.policy(obs, noise)
        q = self.critic(obs, action).squeeze(-1).min(0).values  # [B]
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def update(self, batch, rng):
        """One critic update; every policy_delay-th time the actor and temperature too."""
        obs, action, *_ = batch
        noise = torch.randn(action.shape, generator=rng, device=rng.device)
        loss, q_mean = self.descend(self.critic_optimizer, self.critic_loss, batch, noise)
        self.move_target()
        info = {"losses/critic": loss, "diagnostics/q_mean": q_mean}
        self.n_updates += 1
        if self.n_updates % self.args.policy_delay == 0:
            noise = torch.randn(action.shape, generator=rng, device=rng.device)
            self.critic.requires_grad_(False)  # no gradients for it
            loss, entropy = self.descend(self.actor_optimizer, self.actor_loss, obs, noise)
            self.critic.requires_grad_(True)
            # The temperature rises while the entropy is below its target.
            alpha = self.log_alpha.exp()
            self.alpha_optimizer.zero_grad()
            (alpha * (entropy - self.target_entropy)).backward()
            self.alpha_optimizer.step()
            info |= {"losses/actor": loss, "losses/alpha": alpha, "diagnostics/entropy": entropy}
        return info

    @torch.no_grad()
    def move_target(self):
        """Polyak averaging of the parameters: target += tau * (critic - target)."""
        for target, source in zip(self.target_critic.parameters(), self.critic.parameters()):
            target.lerp_(source, self.args.tau)

    def descend(self, optimizer, loss_fn, *inputs):
        optimizer.zero_grad()
        results = self.backward(loss_fn, *inputs)
        optimizer.step()
        return results

    def backward(self, loss_fn, *inputs):  # main compiles this
        loss, extra = loss_fn(*inputs)
        loss.backward()
        return loss.detach(), extra.detach()

    def random_action(self, rng):  # uniform in [-1, 1]: [A], in NumPy
        return torch.rand(self.action_dim, generator=rng, device=rng.device).cpu().numpy() * 2 - 1

    @torch.inference_mode()
    def act(self, obs, rng=None):
        """obs [O] -> action [A], in NumPy: sampled if rng is given, otherwise tanh(mean)."""
        obs = torch.as_tensor(obs).to(self.log_alpha)
        noise = torch.zeros(1, self.action_dim, device=obs.device)
        if rng is not None:
            noise.normal_(generator=rng)
        return self.policy(obs[None], noise)[0][0].cpu().numpy()


class ReplayBuffer:
    """The last --buffer-size transitions, in float32 on the device, one per row."""

    def __init__(self, obs_dim, action_dim, args):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(args.buffer_size, sum(self.widths), device=args.device)
        self.added = 0

    def add(self, obs, action, reward, terminated, next_obs):
        row = np.hstack([obs, action, reward, terminated, next_obs], dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, n, rng):
        """With replacement: obs [n, O], action [n, A], reward [n], terminated [n], next_obs."""
        size = min(self.added, len(self.rows))
        index = torch.randint(size, (n,), generator=rng, device=self.rows.device)
        obs, action, reward, terminated, next_obs = self.rows[index].split(self.widths, -1)
        return obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs


# ---------- not the algorithm: environments, checkpoints, training


class Env(gym.Wrapper):
    """The agent's view: flat float32 observations; actions in [-1, 1], each repeated."""

    def __init__(self, env, repeat):
        super().__init__(env)
        box = env.action_space
        if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1 or not box.is_bounded():
            sys.exit(f"error: the actions must be a vector in a bounded Box, not {box}")
        n_obs = gym.spaces.flatdim(env.observation_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n_obs,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, box.shape, np.float32)
        self.low, self.high = box.low.astype(float), box.high.astype(float)
        self.repeat = repeat

    def flat(self, obs):
        return gym.spaces.flatten(self.env.observation_space, obs).astype(np.float32)

    def reset(self, **kwargs):
        self.episode_return = 0.0
        self.episode_length = 0  # environment steps
        obs, info = self.env.reset(**kwargs)
        return self.flat(obs), info

    def step(self, action):
        action = self.low + (self.high - self.low) * (np.asarray(action, float) + 1) / 2
        action = action.clip(self.low, self.high).astype(self.env.action_space.dtype)
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += np.float64(reward).item()
            self.episode_length += 1
            if terminated or truncated:
                break
        self.episode_return += total
        return self.flat(obs), total, terminated, truncated, info


def make_env(args):
    return Env(gym.make(args.env_id), args.action_repeat)


def reset_seed(*key):  # the run's seed, evaluation step (training: 0), episode
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def check_finite(step, **values):
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            sys.exit(f"error: {name} is NaN or infinite at step {step}")


def evaluate(agent, env, step):
    """Deterministic episodes, as rows of evaluations.csv."""
    rows = []
    for episode in range(agent.args.eval_episodes):
        obs, _ = env.reset(seed=reset_seed(agent.args.seed, step, episode))
        success, done = "", False
        while not done:
            action = agent.act(obs)
            check_finite(step, action=action)
            obs, _, terminated, truncated, info = env.step(action)
            for key in ("success", "is_success", "solved"):
                if key in info:  # a success at any time counts
                    success = "1" if success == "1" or np.any(info[key]) else "0"
            done = terminated or truncated or env.episode_length >= 100_000
        rows.append((step, episode, env.episode_return, env.episode_length, success))
    return rows


def save(folder, agent, buffer, rng, progress):
    """A kill leaves a whole checkpoint, old or new."""
    optimizers = {k: v.state_dict() for k, v in vars(agent).items() if isinstance(v, Optimizer)}
    checkpoint = {
        "args": asdict(agent.args),
        "agent": agent.state_dict(),
        "n_updates": agent.n_updates,
        "optimizers": optimizers,
        "rows": buffer.rows[: buffer.added].cpu().clone(),  # a view would save all rows
        "buffer": {k: v for k, v in vars(buffer).items() if k != "rows"},
        "rng": rng.get_state(),
        "progress": progress,
    }
    check_finite(progress[0], rows=checkpoint["rows"], **checkpoint["agent"])
    torch.save(checkpoint, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load(checkpoint, agent, buffer, rng):  # -> progress
    agent.load_state_dict(checkpoint["agent"])
    for name, state in checkpoint["optimizers"].items():
        optimizer = getattr(agent, name)  # args set its rates
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    agent.n_updates = checkpoint["n_updates"]
    vars(buffer).update(checkpoint["buffer"])
    buffer.rows[: buffer.added] = checkpoint["rows"]  # a full buffer cannot change its size
    rng.set_state(checkpoint["rng"])
    return checkpoint["progress"]


def parse(argv, Args):
    """The arguments, checked; --resume's checkpoint or None; the run's folder."""
    args, checkpoint = tyro.cli(Args, args=argv), None
    if args.resume:
        checkpoint = torch.load(Path(args.resume, "checkpoint.pt"), "cpu", weights_only=True)
        args = tyro.cli(Args, args=argv, default=Args(**checkpoint["args"]))
    for name, value in vars(args).items():
        low = 0 if type(value) is float or name in ("seed", "learning_starts", "brn_warmup") else 1
        if type(value) in (int, float) and not low <= value <= (1 if name == "gamma" else np.inf):
            sys.exit(f"error: {name} {value} is out of range")
    name = f"{args.env_id}__{Path(sys.argv[0]).stem}__{args.seed}__{time.time()}"
    args.run_name = args.run_name or name.replace("/", "_").replace(":", "_")
    folder = Path(args.resume or Path("runs", args.run_name))
    if folder.exists() and not args.resume:
        sys.exit(f"error: {folder} exists: --resume it or change --run-name")
    return args, checkpoint, folder


def compiled(function):
    """The function, compiled. If compiling fails, everything runs uncompiled."""
    torch._dynamo.config.trace_autograd_ops = True  # backward() too
    torch._inductor.config.comprehensive_padding = False  # which Adam on CUDA refuses
    fast = torch.compile(function)

    def call(*inputs):
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            torch.compiler.set_stance("force_eager")
            print(f"not compiled: {error!r:.150}", file=sys.stderr)
            return function(*inputs)

    return call


def main(
    argv=None, Args=Args, Agent=Agent, Buffer=ReplayBuffer, make_env=make_env, evaluate=evaluate
):
    """Train. Pass parts of your own to extend this."""
    sys.path.append(str(Path.cwd()))  # for --env-id my_module:MyEnv-v0
    args, checkpoint, folder = parse(argv, Args)
    env, eval_env = make_env(args), make_env(args)
    torch.set_float32_matmul_precision("medium")  # faster on some CPUs; kept if exact
    a = torch.rand(256, 256, device=args.device)
    if not torch.allclose(a @ a, (a.double() @ a.double()).float()):
        torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)  # Adam's averages become denormal, which is slow
    torch.manual_seed(args.seed)
    sizes = env.observation_space.shape + env.action_space.shape
    agent = Agent(*sizes, args).to(args.device)
    buffer = Buffer(*sizes, args)
    rng = torch.Generator(args.device).manual_seed(args.seed)
    step, episode, evaluations = load(checkpoint, agent, buffer, rng) if checkpoint else (0, 0, [])
    if args.compile:
        agent.backward = compiled(agent.backward)
    folder.mkdir(parents=True, exist_ok=checkpoint is not None)
    about = asdict(args) | {m.__name__: m.__version__ for m in (torch, gym, np)}
    (folder / "args.json").write_text(json.dumps(about | {"command": sys.argv}, indent=2))
    if args.track:
        import wandb

        wandb.init(id=folder.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(folder, purge_step=step + 1)
    bar = tqdm(total=args.total_timesteps, initial=step, mininterval=10)
    bar.write(f"{folder}: random steps, then slow first updates", sys.stderr)
    save(folder, agent, buffer, rng, (step, episode, evaluations))
    obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
    losses = {}
    saved = time.time()
    clock = step, time.time()
    while step < args.total_timesteps:
        learning = step >= args.learning_starts * args.action_repeat
        action = agent.act(obs, rng) if learning else agent.random_action(rng)
        check_finite(step, action=action)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # Not `or truncated`: after a time limit the task would go on, so the target bootstraps.
        buffer.add(obs, action, reward, terminated, next_obs)
        obs = next_obs
        step += args.action_repeat
        bar.update(args.action_repeat)

        if learning:
            for _ in range(args.utd):
                losses |= agent.update(buffer.sample(args.batch_size, rng), rng)
            if step % 1000 < args.action_repeat:
                check_finite(step, **losses)
                for name, value in losses.items():
                    writer.add_scalar(name, value, step)

        if step % args.eval_every < args.action_repeat:
            speed = (step - clock[0]) / (time.time() - clock[1])
            rows = evaluate(agent, eval_env, step)
            evaluations += rows
            head = "step,episode,return,length,success"
            np.savetxt(folder / "evaluations.csv", evaluations, "%s", ",", header=head, comments="")
            mean = np.mean([row[2] for row in rows])
            writer.add_scalar("eval/return", mean, step)
            writer.add_scalar("charts/SPS", speed, step)
            bar.write(f"step {step:,}: return {mean:,.1f}; {speed:.0f} steps/s", sys.stderr)
            clock = step, time.time()

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", env.episode_return, step)
            episode += 1
            obs, _ = env.reset(seed=reset_seed(args.seed, 0, episode))
            # Between episodes no environment state needs saving.
            if time.time() - saved > 60 * args.checkpoint_minutes:
                save(folder, agent, buffer, rng, (step, episode, evaluations))
                saved = time.time()
    save(folder, agent, buffer, rng, (step, episode + 1, evaluations))
    writer.close()


if __name__ == "__main__":
    main()
