"""benchmark/algorithms/crossq_discrete.py: losses by formula and by hand, one-hot actions, runs."""

import math
import sys
from pathlib import Path

import crossq_discrete as discrete
import gymnasium as gym
import numpy as np
import pytest
import torch

import crossq_sac

OBS, ACTIONS, B = 4, 3, 16
TINY = "--env-id tiny_envs:Discrete-v0 --critic-width 16 --actor-width 16 --batch-size 16"
TINY += " --learning-starts 20 --total-timesteps 60 --eval-every 20 --eval-episodes 1"
TINY = f"{TINY} --device cpu --compile off".split()


def make_agent(**changes):
    torch.manual_seed(0)
    sizes = {"critic_width": 16, "actor_width": 12, "brn_warmup": 0}
    agent = discrete.Agent(OBS, ACTIONS, discrete.Args(**sizes | changes))
    with torch.no_grad():  # running statistics that are not those of the batch
        for norm in [*agent.critic.norms, *agent.actor.norms]:
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return agent


def make_batch():
    rng = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, B, OBS, generator=rng)
    taken = torch.randint(ACTIONS, (B,), generator=rng)
    one_hot = torch.zeros(B, ACTIONS)
    one_hot[torch.arange(B), taken] = 1
    terminated = (torch.arange(B) % 3 == 0) * 1.0
    return (obs, one_hot, torch.randn(B, generator=rng), terminated, next_obs), taken


def batch_renormed(norm, x):
    """Ioffe's formula, after the warm-up, with the statistics as they are before the forward."""
    mean, std = x.mean(-2, keepdim=True), (x.var(-2, correction=0, keepdim=True) + norm.eps).sqrt()
    old = (norm.running_var + norm.eps).sqrt()
    r = (std / old).clamp(1 / 3, 3).detach()
    d = ((mean - norm.running_mean) / old).clamp(-5, 5).detach()
    return ((x - mean) / std * r + d) * norm.scale + norm.bias


def forward(net, x, training):
    """A network of dense layers between norms, written down again."""
    for k in range(3):
        norm = net.norms[k]
        x = torch.relu(x) if k else x
        if training:
            x = batch_renormed(norm, x)
        else:
            std = (norm.running_var + norm.eps).sqrt()
            x = (x - norm.running_mean) / std * norm.scale + norm.bias
        x = x @ net.weights[k] + net.biases[k]
    return x


def assert_gradients(loss, expected, parameters):
    parameters = [*parameters]
    got = torch.autograd.grad(loss, parameters)
    for mine, theirs in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_critic_loss_by_formula(double):
    """The lower of the critics' expectations over the next policy, without its entropy; one pass
    over [s; s'] in training mode; no gradient through the target."""
    agent, gamma = make_agent(), 0.99
    batch, taken = make_batch()
    obs, _, reward, terminated, next_obs = batch
    logits = forward(agent.actor, next_obs, training=False).detach()
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    both = forward(agent.critic, torch.cat([obs, next_obs]), training=True)
    q, next_q = both[:, :B], both[:, B:].detach()
    y = torch.zeros(B)
    for i in range(B):
        value = min(sum(p[i, a] * next_q[n, i, a] for a in range(ACTIONS)) for n in range(2))
        y[i] = reward[i] + gamma * (0 if terminated[i] else value)
    expected = (
        sum(((q[n, i, taken[i]] - y[i]) ** 2 / 2 for n in range(2) for i in range(B)), 0.0) / B
    )
    loss, _ = agent.critic_loss(batch, {})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    assert_gradients(loss, expected, agent.critic.parameters())


def test_actor_and_temperature_by_formula(double):
    agent, alpha = make_agent(), 0.3
    agent.log_alpha.data.fill_(math.log(alpha))
    batch, _ = make_batch()
    obs = batch[0]
    logits = forward(agent.actor, obs, training=True)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    q = forward(agent.critic, obs, training=False).detach().mean(0)
    expected = (log_p.exp() * (alpha * log_p - q)).sum() / B
    entropy = -(log_p.exp() * log_p).sum() / B
    loss, info = agent.actor_loss(batch, {})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(info["diagnostics/entropy"], entropy, rtol=1e-8, atol=1e-8)
    assert_gradients(loss, expected, agent.actor.parameters())
    alpha_loss, _ = agent.alpha_loss(entropy.detach())
    (gradient,) = torch.autograd.grad(alpha_loss, agent.log_alpha)
    assert gradient.item() == pytest.approx(alpha * (entropy.item() - 0.6 * math.log(3)), rel=1e-8)


def test_by_hand():
    """One state, two critics with known Q, a policy of 1/4 and 3/4, temperature 1/2, gamma 1/2."""
    agent = make_agent(gamma=0.5, alpha=0.5)
    agent.action_dim = 2
    logits = torch.tensor([[0.0, math.log(3)]])
    agent.policy = lambda obs: (logits.softmax(-1), logits.log_softmax(-1))
    q = torch.tensor([[[1.0, 2.0], [4.0, 8.0]], [[3.0, 5.0], [6.0, 6.0]]])  # [critic, s and s', a]
    agent.critic = type("Known", (torch.nn.Module,), {"forward": lambda self, x: q})()
    one_hot, terminated = torch.tensor([[0.0, 1.0]]), torch.zeros(1)
    batch = torch.zeros(1, OBS), one_hot, torch.ones(1), terminated, torch.zeros(1, OBS)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    y = 1 + 0.5 * min(0.25 * 4 + 0.75 * 8, 0.25 * 6 + 0.75 * 6)
    loss, _ = agent.critic_loss(batch, {})
    assert loss.item() == pytest.approx(((2 - y) ** 2 + (5 - y) ** 2) / 2, rel=1e-6)
    q = torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]]])
    loss, _ = agent.actor_loss(batch, {})
    assert loss.item() == pytest.approx(-0.5 * entropy - (0.25 * 2 + 0.75 * 1.5), rel=1e-6)


def test_modes_and_running_statistics():
    """Only the network that is trained moves its statistics, and it does."""
    agent, (batch, _) = make_agent(), make_batch()
    before = {k: v.clone() for k, v in agent.state_dict().items() if "running" in k or "steps" in k}

    def moved():
        now = agent.state_dict()
        return {k.split(".")[0] for k, v in before.items() if not torch.equal(v, now[k])}

    agent.critic_loss(batch, {})
    assert moved() == {"critic"}
    agent.actor_loss(batch, {})
    assert moved() == {"critic", "actor"}
    assert agent.critic.norms[0].steps == 1


def test_acts_by_sampling_and_evaluates_by_the_most_probable():
    agent, rng = make_agent(), torch.Generator().manual_seed(0)
    obs = np.ones(OBS, np.float32)
    agent.actor.eval()
    probs = agent.policy(torch.from_numpy(obs)[None])[0][0].detach()
    drawn = np.mean([agent.act(obs, rng) for _ in range(4000)], 0)
    assert drawn == pytest.approx(probs.numpy(), abs=0.03) and probs.max() < 0.95
    best = agent.act(obs)
    assert (
        best.argmax() == probs.argmax() and sorted(best) == [0, 0, 1] and best.dtype == np.float32
    )


def test_a_diverged_policy_ends_with_one_line(capsys):
    agent = make_agent()
    agent.actor.biases[2].data.fill_(math.nan)
    for rng in (None, torch.Generator()):
        with pytest.raises(SystemExit) as end:
            agent.act(np.ones(OBS, np.float32), rng)
        assert end.value.code == 1
        assert capsys.readouterr().err == "error: the policy is NaN: training has diverged\n"


def test_random_actions_are_uniform_and_held():
    """A new one every fourth step on average, which in a third of the cases is the old one; and a
    resume goes on with the one that is held."""
    agent, rng = make_agent(), torch.Generator().manual_seed(0)
    actions = np.array([agent.random_action(rng) for _ in range(20_000)])
    assert actions.mean(0) == pytest.approx([1 / 3] * 3, abs=0.03)
    repeated = (actions[1:].argmax(1) == actions[:-1].argmax(1)).mean()
    assert repeated == pytest.approx(0.75 + 0.25 / 3, abs=0.02)
    while agent.held == 0:  # which is what it is at the start
        agent.random_action(rng)
    again = make_agent()
    again.load_state_dict(agent.state_dict())
    assert again.held == agent.held


def test_the_environment_gets_the_action():
    """Gymnasium's Discrete may begin elsewhere than at 0."""
    seen = []

    class Shifted(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        action_space = gym.spaces.Discrete(4, start=-1)

        def reset(self, seed=None, options=None):
            return np.zeros(2), {}

        def step(self, action):
            seen.append(action)
            return np.zeros(2), 0.0, False, False, {}

    gym.register("Shifted-v0", Shifted, disable_env_checker=True)
    env = discrete.make_env(discrete.Args(env_id="Shifted-v0"))
    assert env.action_space.shape == (4,)
    env.reset(seed=0)
    for action in np.eye(4, dtype=np.float32):
        env.step(action)
    assert seen == [-1, 0, 1, 2]


def test_runs_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert discrete.main([*TINY, "--run-name", "whole"]) == 0

    class Killed(discrete.Agent):
        def act(self, obs, rng=None):
            if self.n_updates == 25:
                raise InterruptedError
            return super().act(obs, rng)

    part = [*TINY, "--run-name", "part", "--checkpoint-every", "30"]
    with pytest.raises(InterruptedError):
        discrete.main(part, Agent=type("Agent", (Killed,), {"program": "crossq_discrete"}))
    assert discrete.main(["--resume", "runs/part"]) == 0
    whole, part = (torch.load(Path("runs", name, "checkpoint.pt")) for name in ("whole", "part"))
    assert all(torch.equal(whole["agent"][k], part["agent"][k]) for k in whole["agent"])
    actions = whole["rows"][:, 3:6]
    assert torch.equal(actions.sum(1), torch.ones(60)) and set(actions.unique().tolist()) == {0, 1}
    assert (
        Path("runs/whole/evaluations.csv").read_text()
        == Path("runs/part/evaluations.csv").read_text()
    )
    capsys.readouterr()
    assert discrete.main(["--evaluate", "runs/whole"]) == 0
    assert "runs/whole at step 60" in capsys.readouterr().out


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        discrete.main([*argv])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


def test_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "--env-id", "Pendulum-v1")
    assert "Discrete" in error and "Box" in error
    assert "CartPole" in refused(capsys, "--env-id", "CartPol-v1")
    assert "--entropy-factor" in refused(capsys, "--entropy-factor", "1.5")
    assert (
        crossq_sac.main([*TINY[2:], "--env-id", "tiny_envs:Truncated-v0", "--run-name", "other"])
        == 0
    )
    capsys.readouterr()
    assert "a run of crossq_sac, not of crossq_discrete" in refused(
        capsys, "--resume", "runs/other"
    )


def test_a_missing_box2d_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    error = refused(capsys, "--env-id", "LunarLander-v3")
    assert "gymnasium[box2d]" in error
