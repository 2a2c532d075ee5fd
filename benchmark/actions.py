"""Stores actions of the replay buffer and of the policy at each evaluation of a run, and draws both
as densities (CrossQ, figures 4 and 12).

    python benchmark/actions.py crossq_sac.py --env-id Hopper-v4 --run-name hopper  # while training
    python benchmark/actions.py runs/hopper                                         # the figure

What follows a script's name is its own command line. Nothing in the run changes, so the script
itself may resume it. An evaluation stores runs/NAME/actions/STEP.npz with three arrays [500, A].
`replay` has actions of transitions drawn from the buffer. `policy` has the policy's actions at the
same observations; a stochastic policy is sampled. `training` has the same with the same noise, but
with the actor in training mode, as in its updates.

The figure, runs/NAME/actions.png and .svg, has a panel per step. It shows how far apart the halves
of CrossQ's joint pass are.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import probe
import torch
import tyro
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from tyro.conf import Positional

sys.path.append(str(probe.ROOT))
import crossq_sac  # noqa: E402

ROWS = 500  # transitions per measurement
BINS = 50  # of a density, from -1 to 1, in either dimension
COLOURS = {"replay": "#0072B2", "policy": "#D55E00"}
LEVELS = np.array([0.15, 0.4, 0.65, 0.9, 1.0])  # of a density's maximum


@torch.no_grad()
def sample(agent, buffer, step):
    """The three arrays of an evaluation. The run's own generator stays as it is."""
    rng = torch.Generator(buffer.rows.device).manual_seed(step)
    obs, replay, *_ = buffer.sample(ROWS, rng)
    noise = torch.randn(replay.shape, generator=rng, device=rng.device)
    twin = copy.deepcopy(agent)  # the forward in training mode moves running statistics
    soft, actions = hasattr(agent, "log_alpha"), {"replay": replay}
    for name, training in (("policy", False), ("training", True)):
        twin.actor.train(training)
        actions[name] = twin.policy(obs, noise)[0] if soft else twin.policy(obs)
    return {name: x.cpu().numpy() for name, x in actions.items()}


def measured(script):
    """Parts for the script's main."""
    buffers, Buffer = [], getattr(script, "ReplayBuffer", crossq_sac.ReplayBuffer)

    def make_buffer(obs_dim, action_dim, args):
        buffers.append(Buffer(obs_dim, action_dim, args))
        return buffers[0]

    def evaluate(agent, env, step):
        folder = Path(agent.args.resume or Path("runs", agent.args.run_name), "actions")
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{step}.npz", **sample(agent, buffers[0], step))
        return getattr(script, "evaluate", crossq_sac.evaluate)(agent, env, step)

    return {"Buffer": make_buffer, "evaluate": evaluate}


def ellipse(actions):
    """Outline [2, 100] at two standard deviations from the mean of actions [N, 2]."""
    variances, directions = np.linalg.eigh(np.cov(actions.T))
    angle = np.linspace(0, 2 * np.pi, 100)
    axes = directions * 2 * np.sqrt(variances.clip(0))
    return actions.mean(0)[:, None] + axes @ np.stack([np.cos(angle), np.sin(angle)])


def density(actions):
    """A smoothed histogram [BINS, BINS] of actions [N, 2]. No mass leaves the bounds."""
    counts, *_ = np.histogram2d(*actions.T, bins=BINS, range=[(-1, 1), (-1, 1)])
    return gaussian_filter(counts, 4, mode="reflect")


def figure(run: Positional[Path], at: tuple[int, ...] = (), dims: tuple[int, int] = (0, 1)):
    """Draws two dimensions of the actions at some steps, by default at five, evenly spread."""
    files = {int(path.stem): path for path in run.glob("actions/*.npz")}
    if not files:
        sys.exit(f"error: {run} has no actions/STEP.npz: train it with actions.py SCRIPT.py")
    some = np.linspace(0, len(files) - 1, min(5, len(files))).round().astype(int)
    samples = {step: np.load(files[step]) for step in at or np.sort([*files])[some]}
    picture = Figure(figsize=(max(2.6 * len(samples), 4), 3.6), layout="constrained")
    axes = picture.subplots(1, len(samples), sharex=True, sharey=True, squeeze=False)
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    for axis, (step, actions_of) in zip(axes.flat, samples.items()):
        size = actions_of["replay"].shape[1]
        if max(dims) >= size:
            sys.exit(f"error: --dims {dims[0]} {dims[1]}, but actions have {size} dimensions")
        for name, colour in COLOURS.items():
            actions = actions_of[name][:, list(dims)]
            height = density(actions)
            fills = [(colour, 0.6 * level) for level in LEVELS[:-1]]
            axis.contourf(centres, centres, height.T, LEVELS * height.max(), colors=fills)
            axis.plot(*ellipse(actions), color=colour, label=name)
            axis.plot(*actions.mean(0), "o", color=colour, markeredgecolor="white")
        axis.set(title=f"step {step:,}", xlabel=f"action[{dims[0]}]", aspect="equal")
    axes[0, 0].set_ylabel(f"action[{dims[1]}]")
    axes[0, 0].legend()
    picture.suptitle("density, mean and two standard deviations")
    for suffix in (".png", ".svg"):
        picture.savefig(run / f"actions{suffix}", dpi=150)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or not argv[0].endswith(".py"):
        return tyro.cli(figure, args=argv, description=__doc__)
    script = probe.first_script(__doc__, argv)
    if hasattr(script.Agent, "discrete_actions"):
        sys.exit(f"error: {argv[0]} has no continuous actions")
    script.main(argv[1:], **measured(script))


if __name__ == "__main__":
    main()
