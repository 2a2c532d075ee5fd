"""benchmark/probe.py: the Q-bias protocol and the per-layer diagnostics."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import probe  # noqa: E402

import crossq_sac  # noqa: E402

FLAGS = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
FLAGS += " --learning-starts 20 --eval-every 30 --eval-episodes 1 --device cpu --no-compile"


def read(run):
    """{(step, quantity): value}"""
    rows = [line.split(",") for line in Path("runs", run, "probe.csv").read_text().split()]
    return {(int(step), name): float(value) for step, name, value in rows}


class ConstantQ(torch.nn.Module):
    """Q is 3 for one critic and 4 for the other, and log pi(a_t | s_t) is -t."""

    def __init__(self):
        super().__init__()
        self.args = crossq_sac.Args(gamma=0.9, device="cpu")
        self.log_alpha = torch.tensor(0.2).log()
        self.actor = torch.nn.Identity()
        self.critic = TwoCritics()

    def policy(self, obs, noise):
        return noise.clamp(-1, 1), -10 * obs[:, 0]  # the first observation is t / 10


class TwoCritics(torch.nn.Module):
    def forward(self, obs, action):
        return torch.tensor([[[3.0]], [[4.0]]])


@pytest.mark.parametrize("env_id, kept", [("Terminated", 10), ("Truncated", 4)])
@pytest.mark.parametrize("aggregation, alpha", [("min", 0.2), ("mean", 0.2), ("min", 0)])
def test_q_bias_against_known_returns(env_id, kept, aggregation, alpha):
    """Rewards are 1, episodes 10 steps. A step's entropy belongs to the return of the step before,
    if the target has it. Under a time limit the first 35 % count."""
    agent, q = ConstantQ(), 3.0
    agent.args.entropy_in_target = alpha > 0
    if aggregation == "mean":
        agent.actor_q, q = lambda obs, action: agent.critic(obs, action)[..., 0].mean(0), 3.5
    g = [sum(0.9 ** (k - t) * (1 + alpha * k * (k > t)) for k in range(t, 10)) for t in range(kept)]
    env = crossq_sac.make_env(crossq_sac.Args(env_id=f"tiny_envs:{env_id}-v0"))
    values = probe.q_bias(agent, env, step=1)
    assert values["q_bias/mean"] == pytest.approx((q - np.mean(g)) / np.mean(g), rel=1e-5)
    assert values["q_bias/std"] == pytest.approx(np.std(g) / np.mean(g), rel=1e-5)


def test_the_probe_does_not_change_the_run(tmp_path, monkeypatch):
    """Its evaluations and final weights are the plain run's."""
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --total-timesteps 60 --brn-warmup 5".split()
    crossq_sac.main([*arguments, "--run-name", "plain"])
    probe.main(["crossq_sac.py", *arguments, "--run-name", "probed"])
    plain, probed = (torch.load(f"runs/{name}/checkpoint.pt") for name in ("plain", "probed"))
    for name, value in plain["agent"].items():
        assert torch.equal(value, probed["agent"][name])
    assert plain["progress"] == probed["progress"]
    rows = read("probed")
    assert (30, "q_bias/mean") in rows and (60, "q_bias/std") in rows
    agent = probed["agent"]  # nothing is updated after the last evaluation
    layer = torch.cat([agent[f"critic.{name}.1"].flatten() for name in ("weights", "biases")])
    norm = rows[60, "critic/1/weight_norm"]
    assert norm == pytest.approx(layer.norm().item(), rel=1e-5)
    assert rows[60, "critic/1/effective_lr"] == rows[60, "critic/1/grad_norm"] / norm


@pytest.mark.parametrize("warmup", [1, 100])
def test_r_and_d_by_hand(warmup):
    torch.manual_seed(0)
    args = crossq_sac.Args(critic_width=16, actor_width=16, brn_warmup=warmup, device="cpu")
    agent, rng = crossq_sac.Agent(3, 2, args), torch.Generator().manual_seed(0)
    batch = (*torch.randn(8, 5).split([3, 2], 1), *torch.zeros(2, 8), torch.randn(8, 3))
    for _ in range(3):
        agent.update(batch, rng)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    values = probe.corrections(agent, batch)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert len(values) == 2 * 3 * 3
    norm = agent.actor.norms[0]
    r = (batch[0].var(0, correction=0) + 1e-3).sqrt() / (norm.running_var + 1e-3).sqrt()
    d = (batch[0].mean(0) - norm.running_mean) / (norm.running_var + 1e-3).sqrt()
    expected = (r.min(), r.max(), d.abs().max()) if warmup == 1 else (1, 1, 0)
    names = ("r_min", "r_max", "d_abs_max")
    assert [values[f"actor/0/{name}"] for name in names] == pytest.approx([*map(float, expected)])
    both = torch.cat([p[1].grad.flatten() for p in (agent.critic.weights, agent.critic.biases)])
    assert probe.layers(agent)["critic/1/grad_norm"] == pytest.approx(both.norm().item())


SCRIPTS = ["sac_baseline", "crossq_td3", "crossq_wn_highutd"]
SCRIPTS += [f"benchmark/algorithms/{name}" for name in ("redq", "droq", "bro")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_measured_and_resumed(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --utd 1 --policy-delay 1 --run-name run --total-timesteps 30".split()
    probe.main([f"{script}.py", *arguments])
    probe.main([f"{script}.py", "--resume", "runs/run", "--total-timesteps", "60"])
    rows = read("run")
    assert np.isfinite(rows[30, "q_bias/mean"]) and np.isfinite(rows[60, "q_bias/mean"])
    assert ((60, "critic/2/weight_norm") in rows) == ("bro" not in script)  # other layers
    assert ((60, "critic/1/r_min") in rows) == (script == "crossq_td3")


@pytest.mark.parametrize("program", ["crossq_discrete", "xqc"])
def test_what_cannot_be_measured_is_refused(program):
    with pytest.raises(SystemExit, match="error: the bias is not measured with"):
        probe.main([f"benchmark/algorithms/{program}.py", "--help"])
