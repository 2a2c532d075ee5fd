"""benchmark/ablate.py: each ablation against a value worked out here."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import ablate  # noqa: E402
import probe  # noqa: E402

SAC, CROSSQ, WN = "sac_baseline.py", "crossq_sac.py", "crossq_wn_highutd.py"
TINY = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
TINY += " --learning-starts 20 --total-timesteps 60 --eval-every 30 --eval-episodes 1"
TINY = f"{TINY} --device cpu --no-compile --utd 1".split()


def make(script, **changes):
    parts = ablate.ablate(probe.load(script))
    args = parts["Args"](**{"critic_width": 16, "actor_width": 12, "device": "cpu"} | changes)
    torch.manual_seed(0)
    return parts["Agent"](5, 2, args)


def make_batch(ended=0.0):
    generator = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, 16, 5, generator=generator)
    action = torch.rand(16, 2, generator=generator) * 2 - 1
    return obs, action, torch.randn(16, generator=generator), torch.full((16,), ended), next_obs


def result(run):
    checkpoint = torch.load(Path("runs", run, "checkpoint.pt"), weights_only=True)
    return checkpoint["agent"], Path("runs", run, "evaluations.csv").read_text()


def same(a, b):
    (weights, evaluations), (others, other_evaluations) = a, b
    equal = [torch.equal(weights[name], others[name]) for name in weights | others]
    return evaluations == other_evaluations and all(equal)


@pytest.mark.parametrize("script", [SAC, CROSSQ, WN])
def test_without_a_flag_the_run_is_the_scripts(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    probe.load(script).main([*TINY, "--run-name", "plain"])
    ablate.main([script, *TINY, "--run-name", "ablated"])
    assert same(result("plain"), result("ablated"))


@pytest.mark.parametrize("norm", ["brn", "bn", "ln", "none"])
@pytest.mark.parametrize("activation", list(ablate.ACTIVATIONS))
def test_network_by_hand(norm, activation):
    """Layer norm before the activation, batch norms at the input and after it."""
    agent = make(CROSSQ, critic_norm=norm, activation=activation)
    x, mlp = torch.randn(32, 7), agent.critic.train()

    def standardise(x):
        var = x.var(-2, correction=0, keepdim=True)
        return (x - x.mean(-2, keepdim=True)) / (var + 1e-3).sqrt() if "b" in norm else x

    h = standardise(x)
    for k in range(3):
        h = h @ mlp.weights[k] + mlp.biases[k]
        if k < 2:
            h = F.layer_norm(h, h.shape[-1:]) if norm == "ln" else h
            h = standardise(ablate.ACTIVATIONS[activation](h))
    assert torch.allclose(mlp(x[:, :5], x[:, 5:]), h, atol=1e-5)
    n_in = mlp.weights[1].shape[-2]  # LeCun's std is its inverse root, for glu's 8 too
    assert (mlp.weights[1].std() * n_in**0.5).item() == pytest.approx(1.0, rel=0.2)


def test_activations_by_hand():
    x = torch.tensor([[-1.0, 7.0, 2.0, 0.5], [3.0, -2.0, 0.0, 1.0]])
    f = {name: activation(x) for name, activation in ablate.ACTIVATIONS.items()}
    assert f["relu6"].tolist() == [[0.0, 6.0, 2.0, 0.5], [3.0, 0.0, 0.0, 1.0]]
    assert torch.allclose(f["elu"], torch.where(x > 0, x, x.exp() - 1))
    assert torch.allclose(f["relu-over-max"], x.relu() / 7)
    assert torch.allclose(f["glu"], x[:, :2] * x[:, 2:].sigmoid())
    assert torch.allclose(f["layernormed-relu"], F.layer_norm(x.relu(), (4,)))
    assert torch.equal(f["sin"], x.sin()) and torch.equal(f["tanh"], x.tanh())


@pytest.mark.parametrize("script", [SAC, CROSSQ])
def test_momentum_and_warm_up_reach_every_layer(script):
    agent = make(script, bn_momentum=0.9, brn_warmup=7, critic_norm="brn", actor_norm="bn")
    assert [(n.momentum, n.warmup) for n in agent.critic.norms] == [(0.9, 7)] * 3
    assert [(n.momentum, n.warmup) for n in agent.actor.norms] == [(0.9, float("inf"))] * 3


@pytest.mark.parametrize("stats", ["own", "live"])
def test_targets_and_modes_of_a_normalised_sac(stats):
    """q is in training mode, its target is not. The actor's statistics move in its own updates."""
    norms = {"critic_norm": "brn", "actor_norm": "bn"}
    agent = make(SAC, **norms, target_stats=stats, tau=0.25, policy_delay=2)
    live, target = agent.critic.norms[0], agent.target_critic.norms[0]
    for n in (1, 2, 3, 4):
        before = target.running_mean.clone()
        agent.update(make_batch(), torch.Generator())
        assert (live.steps, target.steps, agent.actor.norms[2].steps) == (n, 0, n // 2)
        moved = live.running_mean if stats == "live" else before.lerp(live.running_mean, 0.25)
        assert torch.allclose(target.running_mean, moved)
    obs = make_batch()[0]
    played = agent.act(obs[0].numpy())
    mean, _ = agent.actor.eval()(obs).chunk(2, -1)
    assert np.allclose(played, mean[0].tanh().detach().numpy(), atol=1e-6)


def critic_error(agent, noise, ended=0.0, entropy=True, aggregate=lambda q: q.min(0).values):
    """q - target of CrossQ, written down again."""
    obs, action, reward, terminated, next_obs = make_batch(ended)
    agent.actor.eval()
    with torch.no_grad():
        next_action, log_prob = agent.policy(next_obs, noise)
    pairs = torch.cat([obs, next_obs]), torch.cat([action, next_action])
    q, next_q = agent.critic.train()(*pairs)[..., 0].split(16, 1)
    value = aggregate(next_q) - entropy * agent.log_alpha.exp() * log_prob
    return q - (reward + 0.99 * (1 - terminated) * value).detach()


@pytest.mark.parametrize("flags, ended, formula", [
    ({"entropy_in_target": False}, 0.0, {"entropy": False}),
    ({"q_aggregation": "mean"}, 0.0, {"aggregate": lambda q: q.mean(0)}),
    ({"bootstrap_at_termination": True}, 1.0, {"ended": 0.0}),
    ({}, 1.0, {"ended": 1.0}),
])  # fmt: skip
def test_target_by_formula(flags, ended, formula):
    noise = torch.ones(16, 2)
    expected = 0.5 * critic_error(make(CROSSQ), noise, **formula).square().mean(1).sum()
    loss, _ = make(CROSSQ, **flags).critic_loss(make_batch(ended), noise)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("aggregation", ["min", "mean"])
def test_what_the_actor_maximises(aggregation):
    agent, (obs, *_) = make(CROSSQ, q_aggregation=aggregation), make_batch()
    loss, _ = agent.actor_loss(obs, torch.zeros(16, 2))
    action, log_prob = agent.policy(obs, torch.zeros(16, 2))
    q = agent.critic(obs, action)[..., 0]
    q = q.min(0).values if aggregation == "min" else (q[0] + q[1]) / 2
    torch.testing.assert_close(loss, (log_prob - q).mean())  # alpha is 1


@pytest.mark.parametrize("alpha", [0.3, 1000.0])
def test_the_temperature_as_softplus_and_with_the_loss_of_its_logarithm(alpha):
    flags = {"temperature": "softplus", "temperature_loss": "log", "policy_delay": 1}
    agent = make(CROSSQ, alpha=alpha, **flags)
    assert agent.log_alpha.exp().item() == pytest.approx(alpha, rel=1e-5)
    (learnt,) = agent.alpha_optimizer.param_groups[0]["params"]
    (slope,) = torch.autograd.grad(agent.log_alpha, learnt)
    assert slope.item() == pytest.approx((1 - np.exp(-alpha)) / alpha, rel=1e-5)
    entropy = agent.update(make_batch(), torch.Generator())["diagnostics/entropy"]
    torch.testing.assert_close(learnt.grad, slope * (entropy - agent.target_entropy))


def test_gradients_are_cut_to_a_length():
    grads = {}
    for longest in (0.0, 0.05):
        agent = make(CROSSQ, max_grad_norm=longest, policy_delay=1)
        agent.update(make_batch(), torch.Generator().manual_seed(0))
        for name in ("critic", "actor", "alpha"):
            (group,) = getattr(agent, f"{name}_optimizer").param_groups
            grads[name, longest] = torch.cat([p.grad.flatten() for p in group["params"]])
        assert longest == 0 or max(grads[name, 0.05].norm() for name in ("actor", "alpha")) < 0.051
    cut = grads["critic", 0.0] * 0.05 / grads["critic", 0.0].norm()
    torch.testing.assert_close(grads["critic", 0.05], cut, rtol=1e-4, atol=1e-7)


def test_prioritized_replay_by_hand():
    parts = ablate.ablate(probe.load(CROSSQ))
    buffer = parts["Buffer"](1, 1, parts["Args"](replay="prioritized", buffer_size=8, device="cpu"))
    for k in range(4):
        buffer.add([k], [0.5], 10 * k, k == 3, [k + 1])
    assert buffer.rows[:4, -1].tolist() == [1, 1, 1, 1]  # all are new
    buffer.prioritize(torch.tensor([0, 2]), torch.tensor([3.0, 0.0]))
    buffer.add([4], [0.5], 40, False, [5])  # as the largest so far
    priorities = torch.tensor([3**0.6, 1, 1e-6**0.6, 1, 3**0.6])
    torch.testing.assert_close(buffer.rows[:5, -1], priorities)
    batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
    obs, action, reward, terminated, next_obs, priority, index, _ = batch
    counts = torch.bincount(index, minlength=5) / 20_000
    assert torch.allclose(counts, priorities / priorities.sum(), atol=0.01)
    assert torch.equal(priority, buffer.rows[index, -1]) and torch.equal(obs[:, 0], index.float())
    assert torch.equal(reward, 10.0 * index) and torch.equal(terminated, (index == 3).float())
    assert (action == 0.5).all() and torch.equal(next_obs, obs + 1)


def test_prioritized_update_by_formula():
    """The loss is weighted by importance, and the errors become priorities."""
    agent = make(CROSSQ, replay="prioritized", total_timesteps=5100, policy_delay=9)
    agent.n_updates = 50  # of 100, so beta is 0.7
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))
    priority, new = torch.linspace(0.01, 0.2, 16), {}

    class Buffer:
        def prioritize(self, index, error):
            new.update(zip(index.tolist(), error.tolist()))

    error = critic_error(make(CROSSQ), noise)
    weight = (1 / (40 * priority / 7)) ** 0.7  # of 40 rows, whose priorities sum to 7
    batch = (*make_batch(), priority, torch.arange(16), Buffer())
    info = agent.update(batch, torch.Generator().manual_seed(2))
    expected = (0.5 * weight / weight.max() * error**2).sum() / 16
    torch.testing.assert_close(info["losses/critic"], expected)
    torch.testing.assert_close([*new.values()], error.abs().mean(0).tolist())


def test_a_killed_run_with_priorities_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--replay prioritized --temperature softplus --buffer-size 22 --checkpoint-minutes 1e-9"
    script = probe.load(CROSSQ)
    parts = ablate.ablate(script)

    class Killed(parts["Agent"]):
        def act(self, obs, rng=None):
            if self.n_updates == 25:
                raise InterruptedError
            return super().act(obs, rng)

    ablate.main([CROSSQ, *TINY, *flags.split(), "--run-name", "whole"])
    with pytest.raises(InterruptedError):
        script.main([*TINY, *flags.split(), "--run-name", "part"], **parts | {"Agent": Killed})
    ablate.main([CROSSQ, "--resume", "runs/part"])
    assert same(result("whole"), result("part"))


@pytest.mark.parametrize("mode", ["project", "output", "soft", "none"])
def test_what_is_projected_and_what_decays(mode):
    agent = make(WN, weight_norm=mode, decay_norms=mode == "none")
    net, groups = agent.critic, agent.critic_optimizer.param_groups
    decaying = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    hidden, norms = [*net.weights[:2], *net.biases[:2]], [*net.norms.parameters()]
    assert {id(p) in decaying for p in hidden} == {mode == "soft"}
    assert {id(p) in decaying for p in norms} == {mode == "none"}
    assert {id(net.weights[2]), id(net.biases[2])} <= decaying
    with torch.no_grad():
        for parameter in (*net.weights, *net.biases):
            parameter.mul_(3).add_(0.5)
    output, bias = net.weights[2].clone(), net.biases[2].clone()
    net.project()
    unit = F.normalize(output, dim=-2)
    assert torch.allclose(net.weights[2], unit if mode == "output" else output)
    neurons = torch.cat([net.weights[1], net.biases[1]], -2).norm(dim=-2)
    assert torch.allclose(neurons, torch.ones(1)) == (mode in ("project", "output"))
    assert torch.equal(net.biases[2], bias)


def test_the_rates_fall_by_each_optimisers_own_steps():
    """31 environment steps are 16 of the agent. 8 of these come with 3 critic updates each."""
    rates = {"critic_lr": 3e-4, "actor_lr": 3e-4, "alpha_lr": 3e-4, "lr_end": 0.1}
    agent = make(WN, action_repeat=2, total_timesteps=31, learning_starts=8, utd=3, **rates)
    ends = {"critic": (3e-5, 24), "actor": (2.1e-4, 8), "alpha": (2.1e-4, 8)}
    seen = {name: [] for name in ends}
    for name in ends:
        optimizer = getattr(agent, f"{name}_optimizer")
        optimizer.register_step_pre_hook(
            lambda o, *_, to=seen[name]: to.append(o.param_groups[-1]["lr"])
        )
    for _ in range(24):
        agent.update(make_batch(), torch.Generator())
    for name, (end, steps) in ends.items():
        assert np.allclose(seen[name], np.linspace(3e-4, end, steps, endpoint=False), rtol=1e-9)


def test_probed_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--probe", CROSSQ, *TINY, "--critic-norm", "ln"])
    ablate.main()
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("tiny_envs_Terminated-v0__ablate__1__")
    assert json.loads((run / "args.json").read_text())["critic_norm"] == "ln"
    assert "critic/2/weight_norm" in (run / "probe.csv").read_text()


def test_no_program_assigns_to_another_modules_names():
    ours = "crossq_sac|crossq_td3|crossq_wn_highutd|sac_baseline|probe|ablate|plot|script"
    assigns = re.compile(rf"^\s*({ours})(\.\w+)+ *[-+|*/]?= |setattr\(({ours})\b", re.M)
    for path in (ROOT / "benchmark").rglob("*.py"):
        assert not assigns.search(path.read_text()), path
    assert assigns.search("  script.Agent.act = act") and assigns.search("setattr(script, n, f)")
