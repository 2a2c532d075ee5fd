"""Run a script and measure at each evaluation: the Q-function's bias, and norms per layer.

    python benchmark/probe.py crossq_sac.py --env-id Hopper-v4 --run-name hopper  # while training
    python benchmark/probe.py crossq_sac.py --evaluate runs/hopper                # of a checkpoint

Everything after the script's name is the script's own command line. It changes nothing in the run,
which is named as the script's own and which the script may resume. The bias is printed, and all is
appended to `probe.csv` in the run's folder, with the columns step, quantity, value (after a resume,
a step's last row counts):

q_bias/mean, q_bias/std        of (Q - G) / |mean G| over at least 1000 pairs (CrossQ, section 4.3)
NET/K/weight_norm, grad_norm   L2 norms of dense layer K, bias included, and of its last gradient
NET/K/effective_lr             gradient norm / weight norm (CrossQ + WN, section 4)
NET/K/r_min, r_max, d_abs_max  batch renorm's corrections before layer K, last training forward
"""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 1000  # state-action pairs at least
UNMEASURED = {  # attributes of an Agent, which its subclasses inherit
    "discrete_actions": "has no continuous actions",
    "scaled_rewards": "has the Q of scaled rewards",
}


def q_bias(script, agent, env, step):
    """Normalised bias of Q(s_t, a_t) against the discounted soft Monte-Carlo return of the
    stochastic policy, G_t = r_t + gamma (G_t+1 - alpha log pi(a_t+1 | s_t+1)); without entropy for
    a deterministic policy (TD3).

    Q is what the actor maximises: for most, the minimum over the critics. As in REDQ (Chen et al.
    2021), the last 65 % of an episode cut by a time limit are left out: the returns that follow are
    cut too.
    """
    reset_seed = part_of(script.Agent, "reset_seed")
    agent.actor.eval()
    agent.critic.eval()
    args, device = agent.args, next(agent.parameters()).device
    soft = hasattr(agent, "log_alpha")
    alpha = agent.alpha().item() if soft else 0.0
    rng = torch.Generator(device).manual_seed(reset_seed(args.seed, step, -1 % 2**32))
    all_q, all_g, episode = [], [], 0
    with torch.no_grad():
        while sum(map(len, all_g)) < PAIRS:
            obs, _ = env.reset(seed=reset_seed(args.seed, step, 1_000_000 + episode))
            q, rewards, log_probs, over, episode = [], [], [], False, episode + 1
            while not over:
                obs = torch.from_numpy(obs).to(device)[None]
                if soft:
                    noise = torch.randn(1, *env.action_space.shape, generator=rng, device=device)
                    action, log_prob = agent.policy(obs, noise)
                else:
                    action, log_prob = agent.policy(obs), torch.zeros(1)
                q.append(agent.actor_q(agent.q(agent.critic, obs, action)).item())
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


def soft_returns(rewards, log_probs, gamma, alpha):
    """G_t of every step of one episode; nothing follows its last step."""
    g, value = np.zeros(len(rewards)), 0.0  # value: G_t+1 - alpha log pi(a_t+1 | s_t+1)
    for t in reversed(range(len(rewards))):
        g[t] = rewards[t] + gamma * value
        value = g[t] - alpha * log_probs[t]
    return g


def layers(agent):
    """Norms per dense layer, bias included, after at least one update; ranges of r and d per batch
    renorm layer."""
    out = {}
    for net in ("critic", "actor"):
        mlp = getattr(agent, net)
        dense = zip(getattr(mlp, "weights", ()), getattr(mlp, "biases", ()))  # BRO's are others
        for k, parameters in enumerate(dense):
            if parameters[0].grad is not None:
                w = torch.nn.utils.get_total_norm([p.detach() for p in parameters]).item()
                g = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
                out[f"{net}/{k}/weight_norm"] = w
                out[f"{net}/{k}/grad_norm"] = g
                out[f"{net}/{k}/effective_lr"] = g / w
        for k, norm in enumerate(getattr(mlp, "norms", ())):
            if hasattr(norm, "r"):
                out[f"{net}/{k}/r_min"] = norm.r.min().item()
                out[f"{net}/{k}/r_max"] = norm.r.max().item()
                out[f"{net}/{k}/d_abs_max"] = norm.d.abs().max().item()
    return out


def load(path):
    """A script as a module; a name that is not found here is looked for at the repository's top."""
    path = Path(path) if Path(path).exists() else ROOT / path
    neighbours = str(path.resolve().parent), str(ROOT)  # which it may import
    sys.path += [folder for folder in neighbours if folder not in sys.path]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    # There its Agent's file is looked up, and the comments that are the flags' help.
    sys.modules.setdefault(path.stem, script)
    spec.loader.exec_module(script)
    return script


def first_script(program, doc, argv):
    """The script that a command line begins with. Without one it ends, by help or by one line."""
    name = argv[0] if argv else "none"
    if name in ("-h", "--help"):
        print(doc)
        sys.exit(0)
    if not name.endswith(".py"):
        problem = f"the first argument must be a script, not {name}; see --help"
    elif not any((folder / name).is_file() for folder in (Path.cwd(), ROOT)):
        problem = f"there is no {name}"
    else:
        script = load(name)
        if hasattr(script, "Agent") and hasattr(script, "main"):
            return script
        problem = f"{name} has no Agent, or no main(argv, **parts) that hands parts to a script's"
    print(f"{program}: error: {problem}", file=sys.stderr)
    sys.exit(2)


def part_of(Agent, name):
    """A program's evaluate, say: that of the first file along its Agent's classes."""
    modules = [sys.modules[cls.__module__] for cls in Agent.__mro__]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def probed(script):
    """The script's `evaluate`, which measures as well."""

    def evaluate(agent, env, step, run_dir):
        rows = part_of(script.Agent, "evaluate")(agent, env, step, run_dir)
        values = q_bias(script, agent, env, step) | layers(agent)
        with open(run_dir / "probe.csv", "a", newline="") as file:
            csv.writer(file).writerows((step, key, float(value)) for key, value in values.items())
        biases = [f"{key} {value:.3g}" for key, value in values.items() if "q_bias" in key]
        print(f"step {step}: {', '.join(biases)}")
        return rows

    return evaluate


def main(argv):
    script = first_script("probe.py", __doc__, argv)
    for attribute, why in UNMEASURED.items():
        if hasattr(script.Agent, attribute):
            print(f"probe.py: error: {argv[0]} {why}, so its bias is not measured", file=sys.stderr)
            return 2
    return script.main(argv[1:], evaluate=probed(script))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
