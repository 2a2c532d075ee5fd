"""Stores actions of the replay buffer and of the policy at each evaluation of a run, and draws both
as densities (CrossQ, figures 4 and 12).

    python benchmark/actions.py crossq_sac.py --env-id Hopper-v4 --run-name hopper  # while training
    python benchmark/actions.py runs/hopper                                         # the figure
    python benchmark/actions.py runs/hopper --at 10000 50000 --dims 0 2 --out figures

Everything after a script's name is the script's own command line. It changes nothing in the run,
which is named as the script's own and which the script may resume. An evaluation stores
runs/NAME/actions/STEP.npz: `replay` are the actions of 500 transitions drawn from the buffer,
`policy` are those of the current policy at the same observations, both [500, actions]. A stochastic
policy is sampled, as it is for the (s', a') of the critic's target. TD3's actions have no noise.
`training` are the policy's once more, with the same noise, but with the actor in training mode, in
which it is updated. How far they are from `policy`, in which it acts, is printed.

The figure, actions.png and actions.svg, has a panel per step. It shows how far the two halves of
CrossQ's joint pass are apart, and so why each would have other batch statistics.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import probe
import torch
from plot import COLOURS, plt, save
from scipy.ndimage import gaussian_filter

ROWS = 500  # transitions per measurement
BINS = 50  # of a density, from -1 to 1, in either dimension
SMOOTHING = 4  # standard deviation in bins
LEVELS = np.array([0.15, 0.4, 0.65, 0.9, 1.0])  # of a density's maximum


def fail(*message):
    print("actions.py: error:", *message, file=sys.stderr)
    sys.exit(2)


# Measuring


@torch.no_grad()
def sample(agent, buffer, step):
    """Actions [ROWS, A] of the buffer and of the policy, at the same observations. In training mode
    batch norm takes the statistics of these rows."""
    rng = torch.Generator(buffer.rows.device).manual_seed(step)  # the run's own stays as it is
    obs, replay, *_ = buffer.sample(ROWS, rng)
    noise = torch.randn(replay.shape, generator=rng, device=rng.device)
    soft, saved = hasattr(agent, "log_alpha"), copy.deepcopy(agent.actor.state_dict())
    agent.actor.train()
    training = agent.policy(obs, noise)[0] if soft else agent.policy(obs)
    agent.actor.load_state_dict(saved)  # that forward moved the running statistics
    agent.actor.eval()
    policy = agent.policy(obs, noise)[0] if soft else agent.policy(obs)
    gap = (training - policy).abs().mean().item()
    print(f"step {step}: actions in training and in evaluation mode differ by {gap:.3f} on average")
    actions = {"replay": replay, "policy": policy, "training": training}
    return {name: x.cpu().numpy() for name, x in actions.items()}


def measured(script):
    """Parts for the script's main: its `evaluate`, which stores actions as well, and its
    ReplayBuffer, which is kept for that."""
    buffers = []

    def make_buffer(obs_dim, action_dim, args, device):
        make = probe.part_of(script.Agent, "ReplayBuffer")
        buffers.append(make(obs_dim, action_dim, args, device))
        return buffers[0]

    def evaluate(agent, env, step, run_dir):
        if not buffers:
            fail("--evaluate has no replay buffer: measure while training")
        rows = probe.part_of(script.Agent, "evaluate")(agent, env, step, run_dir)
        (run_dir / "actions").mkdir(exist_ok=True)
        np.savez(run_dir / "actions" / f"{step}.npz", **sample(agent, buffers[0], step))
        return rows

    return {"ReplayBuffer": make_buffer, "evaluate": evaluate}


# Drawing


def ellipse(actions):
    """Outline [2, 100] at two standard deviations from the mean of actions [N, 2]."""
    variances, directions = np.linalg.eigh(np.cov(actions.T))
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    lengths = 2 * np.sqrt(variances.clip(0))
    return actions.mean(0)[:, None] + directions @ (lengths[:, None] * circle)


def density(actions):
    """A smoothed histogram [BINS, BINS] of actions [N, 2]; no mass leaves the bounds."""
    counts, *_ = np.histogram2d(*actions.T, bins=BINS, range=[(-1, 1), (-1, 1)])
    return gaussian_filter(counts, SMOOTHING, mode="reflect")


def draw(title, samples, dims, path):
    """Writes path.png and path.svg. `samples` is {step: {"replay": [N, A], "policy": [N, A]}}."""
    size = max(2.6 * len(samples), 4), 3.6
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(samples), figsize=size, **options)
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    for axis, (step, actions_of) in zip(axes.flat, samples.items()):
        for name, colour in zip(("replay", "policy"), COLOURS):
            actions = actions_of[name][:, dims]
            height = density(actions)
            fills = [(colour, 0.6 * level) for level in LEVELS[:-1]]
            axis.contourf(centres, centres, height.T, LEVELS * height.max(), colors=fills)
            axis.plot(*ellipse(actions), color=colour, label=name)
            axis.plot(*actions.mean(0), "o", color=colour, markeredgecolor="white")
        axis.set(title=f"step {step:,}", xlabel=f"action[{dims[0]}]", aspect="equal")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"action[{dims[1]}]")
    figure.suptitle(title, fontsize=9)
    title = "density, mean and two standard deviations"
    options = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "title_fontsize": 9}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title=title, ncols=2, **options)
    save(figure, path)


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("actions.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("run", type=Path, help="runs/NAME")
    add("--at", type=int, nargs="+", metavar="STEP", help="default: five, evenly spread")
    add("--dims", type=int, nargs=2, default=[0, 1], help="of an action, from 0; default: 0 1")
    add("--out", type=Path, help="where the figure goes; default: into the run's folder")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith(".py"):
        script = probe.first_script("actions.py", __doc__, argv)
        if hasattr(script.Agent, "discrete_actions"):
            fail(argv[0], "has no continuous actions")
        return script.main(argv[1:], **measured(script))
    options = parse(argv)
    files = {int(path.stem): path for path in options.run.glob("actions/*.npz")}
    if not files:
        fail(f"{options.run} has no actions/STEP.npz: train it with actions.py SCRIPT.py ...")
    steps = sorted(files)
    some = np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int)
    at = options.at or [steps[i] for i in some]
    if unknown := set(at) - set(steps):
        fail(f"--at {min(unknown)}: not measured, but {' '.join(map(str, steps))}")
    samples = {step: np.load(files[step]) for step in at}
    last = samples[at[0]]["replay"].shape[1] - 1
    if last == 0:
        fail("the figure needs actions of two dimensions, here there is one")
    if not 0 <= min(options.dims) < max(options.dims) <= last:
        fail("--dims must be two different ones from 0 to", last)
    out = options.out or options.run
    out.mkdir(parents=True, exist_ok=True)
    draw(options.run.name, samples, options.dims, out / "actions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
