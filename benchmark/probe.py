"""Run a script and measure at each evaluation: the Q-function's bias, and norms per layer.

    python benchmark/probe.py crossq_sac.py --env-id Hopper-v4 --run-name hopper

What follows the script's name is its own command line. Nothing in the run changes. The values go to
probe.csv in the run's folder: step, quantity, value. After a resume, a step's last row counts.

q_bias/mean, q_bias/std        of (Q - G) / |mean G| over at least 1000 pairs (CrossQ, section 4.3)
NET/K/weight_norm, grad_norm   L2 norms of dense layer K, bias included, and of its last gradient
NET/K/effective_lr             gradient norm / weight norm (CrossQ + WN, section 4)
NET/K/r_min, r_max, d_abs_max  batch renorm's before layer K; a copy of the agent in training mode
                               makes one more forward of the last update's batch
"""

import copy
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from crossq_sac import evaluate, reset_seed  # noqa: E402

PAIRS = 1000  # state-action pairs at least


@torch.no_grad()
def q_bias(agent, env, step):
    """Normalised bias of Q(s_t, a_t) against the discounted soft Monte-Carlo return of the
    stochastic policy, G_t = r_t + gamma (G_t+1 - alpha log pi(a_t+1 | s_t+1)), without entropy if
    the critic's target has none. Q is what the actor maximises: agent.actor_q(obs, action) [B] or,
    by default, the minimum over the critics. As in REDQ (Chen et al. 2021), the last 65 % of an
    episode cut by a time limit are left out, because the returns that follow are cut too."""
    agent.actor.eval()
    agent.critic.eval()
    args, soft = agent.args, hasattr(agent, "log_alpha")
    soft_target = soft and getattr(args, "entropy_in_target", True)  # a flag of ablate.py
    alpha = agent.log_alpha.exp().item() if soft_target else 0.0
    actor_q = getattr(agent, "actor_q", lambda *pair: agent.critic(*pair).min())
    rng = torch.Generator(args.device).manual_seed(reset_seed(args.seed, step, 2**32 - 1))
    all_q, all_g, episode = [], [], 0
    while len(all_q) < PAIRS:
        obs, _ = env.reset(seed=reset_seed(args.seed, step, 1_000_000 + episode))
        trajectory, over, episode = [], False, episode + 1
        while not over:
            obs = torch.from_numpy(obs).to(rng.device)[None]
            noise = torch.randn(1, *env.action_space.shape, generator=rng, device=rng.device)
            action, log_prob = agent.policy(obs, noise) if soft else (agent.policy(obs), 0.0)
            q = actor_q(obs, action)
            obs, reward, terminated, truncated, _ = env.step(action[0].cpu().numpy())
            trajectory.append((float(q), reward, float(log_prob)))
            over = terminated or truncated or env.episode_length >= 100_000
        g, value = [], 0.0  # value: G_t+1 - alpha log pi(a_t+1 | s_t+1)
        for _, reward, log_prob in reversed(trajectory):
            g.append(reward + args.gamma * value)
            value = g[-1] - alpha * log_prob
        keep = len(g) if terminated else math.ceil(0.35 * len(g))
        all_q += [q for q, _, _ in trajectory[:keep]]
        all_g += g[::-1][:keep]
    bias = (np.array(all_q) - all_g) / abs(np.mean(all_g))
    return {"q_bias/mean": bias.mean(), "q_bias/std": bias.std()}


def layers(agent):
    """Norms per dense layer after at least one update. BRO's layers are others and left out."""
    out = {}
    for net in ("critic", "actor"):
        mlp = getattr(agent, net)
        for k, dense in enumerate(zip(mlp.weights, mlp.biases) if hasattr(mlp, "weights") else ()):
            if dense[0].grad is not None:
                w = torch.nn.utils.get_total_norm([p.detach() for p in dense]).item()
                g = torch.nn.utils.get_total_norm([p.grad for p in dense]).item()
                norms = {"weight_norm": w, "grad_norm": g, "effective_lr": g / w}
                out |= {f"{net}/{k}/{name}": value for name, value in norms.items()}
    return out


def corrections(agent, batch):
    """Ranges of r and d: the critic's in critic_loss, the actor's at the batch's observations."""
    out, twin = {}, copy.deepcopy(agent)

    def record(norm, inputs):
        if norm.training:
            r_max, d_max = (norm.r_max, norm.d_max) if norm.steps >= norm.warmup else (1.0, 0.0)
            var, mean = torch.var_mean(inputs[0], -2, correction=0, keepdim=True)
            running_std = (norm.running_var + norm.eps).sqrt()
            r = ((var + norm.eps).sqrt() / running_std).clamp(1 / r_max, r_max)
            d = ((mean - norm.running_mean) / running_std).clamp(-d_max, d_max)
            ranges = {"r_min": r.min(), "r_max": r.max(), "d_abs_max": d.abs().max()}
            out.update((f"{names[norm]}/{name}", value.item()) for name, value in ranges.items())

    names = {m: n.replace(".norms.", "/") for n, m in twin.named_modules() if hasattr(m, "r_max")}
    for norm in names:
        norm.register_forward_pre_hook(record)
    if names:
        twin.critic_loss(batch, torch.randn_like(batch[1]))
        twin.actor.train()(batch[0])
    return out


def load(path):  # a script as a module, found from here or from the repository's top
    path = Path(path) if Path(path).exists() else ROOT / path
    sys.path.append(str(path.resolve().parent))  # which it may import from
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, script)  # tyro finds the flags' help there
    spec.loader.exec_module(script)
    return script


def first_script(doc, argv):  # that a command line begins with; without one, the help is printed
    if not argv or not argv[0].endswith(".py"):
        print(doc)
        sys.exit("--help" not in argv)
    return load(argv[0])


def probed(script, Agent):
    """Parts for the script's main. Discrete actions and scaled rewards (XQC) are refused."""
    for attribute in ("discrete_actions", "scaled_rewards"):
        if hasattr(Agent, attribute):
            sys.exit(f"error: the bias is not measured with {attribute.replace('_', ' ')}")

    class Probed(Agent):
        def update(self, batch, rng):
            self.batch = batch[:5]
            return super().update(batch, rng)

    def measure(agent, env, step):
        values = q_bias(agent, env, step) | layers(agent)
        values |= corrections(agent, agent.batch) if agent.n_updates else {}
        folder = Path(agent.args.resume or Path("runs", agent.args.run_name))
        with open(folder / "probe.csv", "a") as file:
            file.writelines(f"{step},{name},{value}\n" for name, value in values.items())
        return getattr(script, "evaluate", evaluate)(agent, env, step)

    return {"Agent": Probed, "evaluate": measure}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    script = first_script(__doc__, argv)
    script.main(argv[1:], **probed(script, script.Agent))


if __name__ == "__main__":
    main()
