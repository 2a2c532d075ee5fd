"""Run a script and measure, at each of its evaluations, what it leaves out: the Q-function's bias and per-layer norms.

    python benchmark/probe.py crossq_sac.py --env-id Hopper-v4 --critic-width 256 --run-name hopper   # while training
    python benchmark/probe.py crossq_sac.py --evaluate runs/hopper                                    # of a checkpoint

Everything after the script's name is the script's own command line. Each measurement is printed and appended to
`probe.csv` in the run's folder, with the columns step, quantity, value (after a resume, a step's last row counts):

q_bias/mean, q_bias/std        of (Q - G) / |mean G| over at least 1000 pairs (CrossQ, section 4.3)
LAYER/weight_norm, grad_norm   L2 norms of a dense layer's weights and of their last gradient
LAYER/effective_lr             gradient norm / weight norm (CrossQ + WN, section 4)
LAYER/r_min, r_max, d_abs_max  batch renorm's corrections in its last training forward
"""

import csv
import importlib.util
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

PAIRS = 1000  # state-action pairs at least


def q_bias(script, agent, env, step: int) -> dict[str, float]:
    """Normalised bias of Q(s_t, a_t) against the discounted soft Monte-Carlo return of the stochastic policy,
    G_t = r_t + gamma (G_t+1 - alpha log pi(a_t+1 | s_t+1)).

    As in Chen et al. 2021 (REDQ), the last 65 % of an episode that a time limit cuts are left out: the returns that
    follow them are cut too.
    """
    agent.actor.eval()
    agent.critic.eval()
    args, device = agent.args, agent.log_alpha.device
    rng = torch.Generator(device).manual_seed(script.reset_seed(args.seed, step, -1 % 2**32))
    alpha, all_q, all_g, episode = agent.log_alpha.exp().item(), [], [], 0
    with torch.no_grad():
        while sum(map(len, all_g)) < PAIRS:
            obs, _ = env.reset(seed=script.reset_seed(args.seed, step, 1_000_000 + episode))
            q, rewards, log_probs, over, episode = [], [], [], False, episode + 1
            while not over:
                obs = torch.from_numpy(obs).to(device)[None]
                action, log_prob = agent.actor.sample(
                    obs, torch.randn(1, *env.action_space.shape, generator=rng, device=device)
                )
                q.append(agent.aggregate(agent.critic(obs, action)).item())
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


def layers(script, agent) -> dict[str, float]:
    """Norms per dense layer (after at least one update), ranges of r and d per batch renorm layer."""
    out = {}
    for name, m in agent.named_modules():
        if isinstance(m, script.Dense) and m.weight.grad is not None:
            w, g = m.weight.detach().norm().item(), m.weight.grad.norm().item()
            out |= {f"{name}/weight_norm": w, f"{name}/grad_norm": g, f"{name}/effective_lr": g / w}
        elif isinstance(m, script.BatchRenorm) and hasattr(m, "r"):
            out |= {f"{name}/r_min": m.r.min().item(), f"{name}/r_max": m.r.max().item()}
            out[f"{name}/d_abs_max"] = m.d.abs().max().item()
    return out


def main(argv: list[str]) -> int:
    if not argv or not argv[0].endswith(".py"):
        print(f"probe.py: error: the first argument must be a script, not {argv[:1]}\n{__doc__}", file=sys.stderr)
        return 2
    spec = importlib.util.spec_from_file_location(Path(argv[0]).stem, argv[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = argv[1:]
    if not {"--run-name", "--resume", "--evaluate", "--help"} & set(arguments):
        arguments += ["--run-name", f"{Path(argv[0]).stem}__probe__{int(time.time())}"]
    evaluate = script.evaluate

    def probed(agent, env, step):
        rows = evaluate(agent, env, step)
        values = q_bias(script, agent, env, step) | layers(script, agent)
        run_dir = Path(agent.args.resume or agent.args.evaluate or Path("runs") / agent.args.run_name)
        with open(run_dir / "probe.csv", "a", newline="") as file:
            csv.writer(file).writerows((step, key, float(value)) for key, value in values.items())
        print(f"step {step}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items() if "q_bias" in key))
        return rows

    script.evaluate = probed
    return script.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
