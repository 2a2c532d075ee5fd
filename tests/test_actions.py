"""benchmark/actions.py: what it stores of a run, that the run stays the same, and its figure."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmark"))
import actions  # noqa: E402

import crossq_sac  # noqa: E402
import crossq_td3  # noqa: E402

FLAGS = "--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
FLAGS += " --learning-starts 20 --eval-every 50 --eval-episodes 1 --device cpu --no-compile"


@pytest.mark.parametrize("program", [crossq_sac, crossq_td3])
def test_the_policy_acts_at_the_observations_of_the_replayed_rows(program):
    """A row's action tells its observation. A stochastic policy's deviation is made small."""
    torch.manual_seed(0)
    args = program.Args(critic_width=16, actor_width=16, buffer_size=100, device="cpu")
    buffer, agent = program.ReplayBuffer(3, 2, args), program.Agent(3, 2, args)
    for i in range(100):
        obs = np.full(3, 4 * i / 100 - 2)
        buffer.add(obs, obs[:2] / 4, 0.0, False, obs + 5)
    if program is crossq_sac:
        agent.actor.biases[2].data[:, 2:] = -4.0  # of the log std
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    sample = actions.sample(agent, buffer, step=1)
    assert {name: x.shape for name, x in sample.items()} == dict.fromkeys(sample, (500, 2))
    assert len(np.unique(sample["replay"][:, 0])) > 90  # nearly all of the 100 rows
    greedy = np.stack([agent.act(4 * row[[0, 1, 0]]) for row in sample["replay"]])
    assert greedy.std(0).max() > 0.1
    deviation = abs(sample["policy"] - greedy).max()
    assert 1e-3 < deviation < 0.2 if program is crossq_sac else deviation < 1e-4
    assert abs(sample["training"] - sample["policy"]).mean() > 0.01
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_measuring_does_not_change_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --total-timesteps 150".split()
    crossq_sac.main([*arguments, "--run-name", "plain"])
    actions.main(["crossq_sac.py", *arguments, "--run-name", "measured"])
    plain, measured = (torch.load(f"runs/{name}/checkpoint.pt") for name in ("plain", "measured"))
    assert plain["progress"] == measured["progress"]
    assert torch.equal(plain["rows"], measured["rows"])
    for step in (50, 100, 150):  # in a row an action is the fourth and fifth number
        held = {tuple(row) for row in measured["rows"][:step, 3:5].tolist()}
        stored = np.load(f"runs/measured/actions/{step}.npz")["replay"].tolist()
        assert {tuple(row) for row in stored} <= held
        assert len(set(map(tuple, stored))) > 0.9 * step
    actions.main(["runs/measured", "--at", "50", "150", "--dims", "1", "0"])
    figure = Path("runs/measured/actions.svg").read_text()
    assert "<!-- step 50 -->" in figure and "<!-- step 150 -->" in figure
    assert "<!-- step 100 -->" not in figure and "<!-- action[1] -->" in figure


def test_ellipse_and_density():
    """The ellipse is at the Mahalanobis distance 2; equal actions are a density too."""
    covariance = np.array([[0.04, 0.04], [0.04, 0.09]])
    normal = np.random.default_rng(0).multivariate_normal([0.2, -0.3], covariance, 1000)
    off = actions.ellipse(normal) - normal.mean(0)[:, None]
    distances = np.einsum("in,ij,jn->n", off, np.linalg.inv(np.cov(normal.T)), off) ** 0.5
    assert np.allclose(distances, 2)
    inside = normal[(abs(normal) < 1).all(1)]
    height = actions.density(inside)
    centres = (np.arange(actions.BINS) + 0.5) * 2 / actions.BINS - 1
    assert height.sum(1) @ centres == pytest.approx(inside[:, 0].sum(), rel=0.1)  # x comes first
    assert actions.density(np.ones((10, 2))).sum() == pytest.approx(10)
