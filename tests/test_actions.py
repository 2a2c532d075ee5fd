"""benchmark/actions.py: what it stores of a run, that the run stays the same, and its figure."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils._pytree import tree_leaves

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmark"))
import actions  # noqa: E402

import crossq_sac  # noqa: E402
import crossq_td3  # noqa: E402

FLAGS = "--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
FLAGS += " --learning-starts 20 --eval-every 50 --eval-episodes 1 --device cpu --compile off"


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as matplotlib objects, by path; nothing is written."""
    figures = {}
    monkeypatch.setattr(actions, "save", lambda figure, path: figures.update({path: figure}))
    return figures


def filled(program, n=100):
    """An agent of the program, and a buffer whose action and observation tell the row."""
    torch.manual_seed(0)
    args = program.Args(critic_width=16, actor_width=16)
    buffer = program.ReplayBuffer(3, 2, program.Args(buffer_size=n), "cpu")
    for i in range(n):
        obs = np.full(3, 4 * i / n - 2)
        buffer.add(obs, obs[:2] / 4, 0.0, False, obs + 5)
    return program.Agent(3, 2, args), buffer


@pytest.mark.parametrize("program", [crossq_sac, crossq_td3])
def test_the_policy_acts_at_the_observations_of_the_replayed_rows(program):
    """It does so in evaluation mode. A stochastic policy is sampled; here its deviation is small,
    so that every row shows its observation."""
    agent, buffer = filled(program)
    stochastic = program is crossq_sac
    if stochastic:
        agent.actor.biases[2].data[:, 2:] = -4.0  # of the log std
    agent.train()
    before, state = torch.get_rng_state(), copy.deepcopy(agent.actor.state_dict())
    sample = actions.sample(agent, buffer, step=1)
    replay, policy = sample["replay"], sample["policy"]
    assert torch.equal(torch.get_rng_state(), before)
    assert replay.shape == policy.shape == (actions.ROWS, 2)
    assert len(np.unique(replay[:, 0])) > 90  # nearly all of the 100 rows
    obs = 4 * replay[:, [0, 1, 0]]  # of the rows that were drawn
    greedy = np.stack([agent.act(row) for row in obs])
    assert greedy.std(0).max() > 0.1
    difference = policy - greedy
    assert abs(difference).max() < (0.2 if stochastic else 1e-6)
    twin = copy.deepcopy(agent)
    twin.actor.train()
    if not stochastic:
        trained = twin.policy(torch.from_numpy(obs)).detach().numpy()
        assert abs(sample["training"] - trained).max() < 1e-6
    assert abs(sample["training"] - policy).mean() > 0.01
    assert same(agent.actor.state_dict(), state)
    again, other = (actions.sample(agent, buffer, step)["policy"] for step in (1, 2))
    assert np.array_equal(again, policy) and not np.array_equal(other, policy)
    if stochastic:
        _, log_std = agent.actor(torch.from_numpy(obs)).detach().numpy().T.reshape(2, 2, -1)
        noise = (np.arctanh(policy) - np.arctanh(greedy)) / np.exp(log_std.T)
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1


def test_measuring_does_not_change_the_run(tmp_path, monkeypatch):
    """Evaluations and the whole final checkpoint are those of a plain run."""
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --total-timesteps 150".split()
    assert crossq_sac.main([*arguments, "--run-name", "plain"]) == 0
    assert actions.main(["crossq_sac.py", *arguments, "--run-name", "measured"]) == 0
    plain, measured = Path("runs/plain"), Path("runs/measured")
    assert (plain / "evaluations.csv").read_text() == (measured / "evaluations.csv").read_text()
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (plain, measured))
    assert a["program"] == b["program"] == "crossq_sac" and a["n_updates"] == 130
    for name in ("agent", "optimizers", "rows", "buffer", "rng", "global_rng"):
        pairs = list(zip(*(tree_leaves(checkpoint[name]) for checkpoint in (a, b)), strict=True))
        assert pairs and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
    assert {path.stem for path in (measured / "actions").iterdir()} == {"50", "100", "150"}
    # Only what the buffer had at that step; in it an action is a row's fourth and fifth number.
    for step in (50, 100, 150):
        held = {tuple(row) for row in b["rows"][:step, 3:5].tolist()}
        stored = np.load(measured / "actions" / f"{step}.npz")["replay"].tolist()
        assert {tuple(row) for row in stored} <= held and len(set(map(tuple, stored))) > 0.9 * step


@pytest.mark.parametrize(
    "script",
    ["sac_baseline", "crossq_td3", "crossq_wn_highutd"]
    + [f"benchmark/algorithms/{name}" for name in ("redq", "droq", "td3")],
)
def test_every_program_is_measured_and_resumed(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --utd 1 --run-name run --total-timesteps 50".split()
    assert actions.main([f"{script}.py", *arguments]) == 0
    resumed = "--resume runs/run --total-timesteps 100".split()
    assert actions.main([f"{script}.py", *resumed]) == 0
    for step in (50, 100):
        stored = np.load(f"runs/run/actions/{step}.npz")
        assert stored["replay"].shape == stored["policy"].shape == (actions.ROWS, 2)
        assert len(np.unique(stored["replay"], axis=0)) > 0.9 * step
        assert np.abs(stored["policy"]).max() <= 1


def test_ellipse_and_density():
    """The ellipse is at the Mahalanobis distance 2; equal actions are a density too."""
    covariance = np.array([[0.04, 0.04], [0.04, 0.09]])
    normal = np.random.default_rng(0).multivariate_normal([0.2, -0.3], covariance, 1000)
    off = actions.ellipse(normal) - normal.mean(0)[:, None]
    distances = np.einsum("in,ij,jn->n", off, np.linalg.inv(np.cov(normal.T)), off) ** 0.5
    assert np.allclose(distances, 2)
    inside = normal[(abs(normal) < 1).all(1)]
    height = actions.density(inside)
    assert height.sum() == pytest.approx(len(inside))
    centres = (np.arange(actions.BINS) + 0.5) * 2 / actions.BINS - 1
    assert height.sum(1) @ centres == pytest.approx(inside[:, 0].sum(), rel=0.1)  # x comes first
    equal = np.ones((10, 2))
    assert np.allclose(actions.ellipse(equal), 1)
    assert actions.density(equal).sum() == pytest.approx(10)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_samples(run, steps, dims=3):
    """At step s, replay actions lie around -s / 2000, those of the policy around +s / 2000."""
    (run / "actions").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for step in steps:
        spread = 0.1 * rng.standard_normal((actions.ROWS, dims)) + np.arange(dims) / 10
        sample = {"replay": spread - step / 2000, "policy": spread + step / 2000}
        np.savez(run / "actions" / f"{step}.npz", **sample)


@pytest.mark.parametrize(
    ("arguments", "steps", "dims"),
    [
        ("", [100, 200, 300, 500, 600], (0, 1)),  # five of six
        ("--at 400", [400], (0, 1)),
        ("--at 100 600 --dims 2 0", [100, 600], (2, 0)),
    ],
)
def test_a_panel_per_step_has_both_means(tmp_path, drawn, arguments, steps, dims):
    write_samples(tmp_path / "run", range(100, 601, 100))
    assert actions.main([str(tmp_path / "run"), *arguments.split()]) == 0
    (path,) = drawn
    assert path == tmp_path / "run" / "actions"
    panels = drawn[path].axes
    assert [axis.get_title() for axis in panels] == [f"step {step}" for step in steps]
    labels = [f"action[{i}]" for i in dims]
    assert [panels[0].get_xlabel(), panels[0].get_ylabel()] == labels
    for axis, step in zip(panels, steps):
        outlines, means = axis.lines[::2], axis.lines[1::2]
        assert [line.get_label() for line in outlines] == ["replay", "policy"]
        colours = [line.get_color() for line in axis.lines]
        assert colours == [actions.COLOURS[i] for i in (0, 0, 1, 1)]
        for sign, outline, mean, contours in zip((-1, 1), outlines, means, axis.collections):
            expected = sign * step / 2000 + np.array(dims) / 10
            assert np.allclose(np.ravel(mean.get_data()), expected, atol=0.02)
            corners = np.array(outline.get_data())
            assert np.allclose((corners.max(1) + corners.min(1)) / 2, expected, atol=0.02)
            box = contours.get_paths()[-1].get_extents()  # where the density is highest
            assert np.allclose((box.min + box.max) / 2, expected, atol=0.06)


def test_the_figure_is_a_whole_file_and_leaves_the_run_alone(tmp_path):
    write_samples(tmp_path / "run", [100])
    assert actions.main([str(tmp_path / "run"), "--out", str(tmp_path / "a" / "b")]) == 0
    assert actions.plt.imread(tmp_path / "a" / "b" / "actions.png").std() > 0.01
    assert "<!-- run -->" in (tmp_path / "a" / "b" / "actions.svg").read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["actions"]


def test_what_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "run", [100, 200])
    write_samples(tmp_path / "flat", [100], dims=1)
    assert crossq_sac.main(f"{FLAGS} --total-timesteps 50 --run-name plain".split()) == 0
    capsys.readouterr()
    for arguments, message in (
        ("runs/none", "runs/none has no actions/STEP.npz"),
        ("run --at 100 150", "--at 150: not measured, but 100 200"),
        ("run --dims 0 3", "--dims must be two different ones from 0 to 2"),
        ("run --dims 1 1", "--dims must be two different ones"),
        ("crossq_sac.py --evaluate runs/plain", "--evaluate has no replay buffer"),
        ("flat", "needs actions of two dimensions"),
        ("none.py", "none.py"),
        ("benchmark/algorithms/crossq_discrete.py --help", "has no continuous actions"),
    ):
        with pytest.raises(SystemExit) as error:
            actions.main(arguments.split())
        err = capsys.readouterr().err
        assert error.value.code == 2 and message in err and err.count("\n") == 1
