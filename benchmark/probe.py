"""Run a script and measure, at each of its evaluations, what it leaves out: the Q-function's bias and per-layer norms.

    python benchmark/probe.py crossq_sac.py --env-id Hopper-v4 --critic-width 256 --run-name hopper   # while training
    python benchmark/probe.py crossq_sac.py --evaluate runs/hopper                                    # of a checkpoint

Everything after the script's name is the script's own command line. Each measurement is printed and appended to
`probe.csv` in the run's folder, with the columns step, quantity, value (after a resume, a step's last row counts):

q_bias/mean, q_bias/std        of (Q - G) / |mean G| over at least 1000 pairs (CrossQ, section 4.3)
NET/K/weight_norm, grad_norm   L2 norms of dense layer K's weights and biases, and of their last gradient
NET/K/effective_lr             gradient norm / weight norm (CrossQ + WN, section 4)
NET/K/r_min, r_max, d_abs_max  corrections of batch renorm before layer K in its last training forward
"""

import csv
import importlib.util
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

PAIRS = 1000  # state-action pairs at least


def q_bias(script, agent, env, step: int) -> dict[str, float]:
    """Normalised bias of Q(s_t, a_t) against the discounted soft Monte-Carlo return of the stochastic policy,
    G_t = r_t + gamma (G_t+1 - alpha log pi(a_t+1 | s_t+1)); without entropy for a deterministic policy (TD3).

    Q is the minimum over the critics, as in the updates. As in REDQ (Chen et al. 2021), the last 65 % of an episode cut
    by a time limit are left out: the returns that follow them are cut too.
    """
    agent.actor.eval()
    agent.critic.eval()
    args, soft, device = agent.args, hasattr(agent, "policy"), next(agent.parameters()).device
    rng = torch.Generator(device).manual_seed(script.reset_seed(args.seed, step, -1 % 2**32))
    alpha, all_q, all_g, episode = agent.log_alpha.exp().item() if soft else 0.0, [], [], 0
    with torch.no_grad():
        while sum(map(len, all_g)) < PAIRS:
            obs, _ = env.reset(seed=script.reset_seed(args.seed, step, 1_000_000 + episode))
            q, rewards, log_probs, over, episode = [], [], [], False, episode + 1
            while not over:
                obs = torch.from_numpy(obs).to(device)[None]
                noise = torch.randn(1, *env.action_space.shape, generator=rng, device=device)
                action, log_prob = agent.policy(obs, noise) if soft else (agent.actor(obs).tanh(), torch.zeros(1))
                q.append(agent.critic(torch.cat([obs, action], -1)).min().item())
                obs, reward, terminated, truncated, _ = env.step(action[0].cpu().numpy())
                rewards.append(float(reward))
                log_probs.append(log_prob.item())
                over = terminated or truncated
            keep = len(q) if terminated else math.ceil(0.35 * len(q))
            all_q.append(q[:keep])
            all_g.append(soft_returns(rewards, log_probs, args.gamma, alpha)[:keep])
    q, g = np.concatenate(all_q), np.concatenate(all_g)
    bias = (q - g) / abs(g.mean())
    return {"q_bias/mean": bias.mean(), "q_bias/std": bias.std()}


def soft_returns(rewards, log_probs, gamma: float, alpha: float) -> np.ndarray:
    """G_t of every step of one episode; nothing follows its last step."""
    g, value = np.zeros(len(rewards)), 0.0  # value: G_t+1 - alpha log pi(a_t+1 | s_t+1)
    for t in reversed(range(len(rewards))):
        g[t] = rewards[t] + gamma * value
        value = g[t] - alpha * log_probs[t]
    return g


def layers(agent) -> dict[str, float]:
    """Norms per dense layer, bias included (after at least one update), ranges of r and d per batch renorm layer."""
    out = {}
    for net in ("critic", "actor"):
        mlp = getattr(agent, net)
        for k, parameters in enumerate(zip(mlp.weights, mlp.biases)):
            if parameters[0].grad is not None:
                w = torch.nn.utils.get_total_norm([p.detach() for p in parameters]).item()
                g = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
                out |= {
                    f"{net}/{k}/{key}": v for key, v in (("weight_norm", w), ("grad_norm", g), ("effective_lr", g / w))
                }
        for k, norm in enumerate(getattr(mlp, "norms", ())):
            if hasattr(norm, "r"):
                out |= {f"{net}/{k}/r_min": norm.r.min().item(), f"{net}/{k}/r_max": norm.r.max().item()}
                out[f"{net}/{k}/d_abs_max"] = norm.d.abs().max().item()
    return out


def load(path: str):
    """A script as a module; a name without a folder is looked for here, then at the repository's top level."""
    path = Path(path) if Path(path).exists() else Path(__file__).resolve().parent.parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, script)  # where tyro looks for the comments that are the flags' help
    spec.loader.exec_module(script)
    return script


def attach(script):
    """Makes the script's evaluations measure too; returns it."""
    evaluate, train = script.evaluate, script.train

    def named(args, checkpoint):
        default = f"{args.env_id}__{script.SCRIPT.stem}__{args.seed}__{int(time.time())}"
        args.run_name = re.sub(r"[/\\:]", "_", args.run_name or default)  # as the script will, but known here
        return train(args, checkpoint)

    def probed(agent, env, step):
        rows = evaluate(agent, env, step)
        values = q_bias(script, agent, env, step) | layers(agent)
        run_dir = Path(agent.args.resume or agent.args.evaluate or Path("runs") / agent.args.run_name)
        with open(run_dir / "probe.csv", "a", newline="") as file:
            csv.writer(file).writerows((step, key, float(value)) for key, value in values.items())
        print(f"step {step}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items() if "q_bias" in key))
        return rows

    script.evaluate, script.train = probed, named
    return script


def main(argv: list[str]) -> int:
    if not argv or not argv[0].endswith(".py"):
        print(f"probe.py: error: the first argument must be a script, not {argv[:1]}\n{__doc__}", file=sys.stderr)
        return 2
    return attach(load(argv[0])).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
