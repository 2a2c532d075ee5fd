"""benchmark/algorithms/bro.py: quantiles, networks, the exploring actor, resets."""

import dataclasses
import math
from pathlib import Path

import bro
import numpy as np
import pytest
import torch

OBS, ACTIONS, B, K = 4, 2, 8, 5
TINY = "--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
TINY += " --n-quantiles 7 --utd 2 --learning-starts 20 --total-timesteps 40 --eval-every 20"
TINY = f"{TINY} --eval-episodes 1 --device cpu --compile off".split()


def make_agent(**changes):
    torch.manual_seed(0)
    sizes = {"critic_width": 16, "actor_width": 12, "n_quantiles": K}
    return bro.Agent(OBS, ACTIONS, bro.Args(**sizes | changes))


def make_batch():
    rng = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, B, OBS, generator=rng)
    action = torch.rand(B, ACTIONS, generator=rng) * 2 - 1
    terminated = (torch.arange(B) % 3 == 0) * 1.0
    return obs, action, torch.randn(B, generator=rng), terminated, next_obs


def quantile_huber(quantiles, target):
    """Dabney et al. 2018, with loops: [K] and [K'] -> sum over K, mean over K'."""
    total, k = 0.0, len(quantiles)
    for i, mine in enumerate(quantiles):
        for theirs in target:
            u = theirs - mine
            huber = 0.5 * u**2 if abs(u) <= 1 else abs(u) - 0.5
            total = total + abs((i + 0.5) / k - (1.0 if u < 0 else 0.0)) * huber / len(target)
    return total


def test_quantile_loss_by_hand():
    """Two quantiles 0 and 2 (at 1/4 and 3/4), one target of 3 and -1/2, one critic."""
    expected = (0.25 * 2.5 + 0.75 * 0.125) / 2 + (0.75 * 0.5 + 0.25 * 2.0) / 2
    loss = bro.quantile_loss(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[3.0, -0.5]]))
    assert loss.item() == pytest.approx(expected)


def test_quantile_loss_by_formula(double):
    torch.manual_seed(0)
    quantiles = (3 * torch.randn(2, B, K)).requires_grad_()
    target = 3 * torch.randn(B, K)
    expected = sum(
        quantile_huber(quantiles[n, b], target[b]) / B for n in range(2) for b in range(B)
    )
    loss = bro.quantile_loss(quantiles, target)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    (mine,), (theirs,) = (torch.autograd.grad(x, quantiles) for x in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def layer_norm(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias


def bronet(parameters, x, blocks):
    """The paper's network from its layers in order: dense, norm, dense, norm, ..."""
    layers = iter(parameters)
    dense, norm = next(layers), next(layers)
    x = layer_norm(x @ dense.weight.T + dense.bias, norm).relu()
    for _ in range(blocks):
        dense, norm, dense2, norm2 = (next(layers) for _ in range(4))
        inner = layer_norm(x @ dense.weight.T + dense.bias, norm).relu()
        x = x + layer_norm(inner @ dense2.weight.T + dense2.bias, norm2)
    assert next(layers, None) is None
    return x


def layers(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]


def critics(ensemble, x):
    out = []
    for net in ensemble:
        *body, head = layers(net)
        out.append(bronet(body, x, 2) @ head.weight.T + head.bias)
    return torch.stack(out)


def actor(agent, obs):
    """Mean and standard deviation; log std goes by tanh from -10 to 2."""
    *body, head = layers(agent.actor)
    mean, log_std = (bronet(body, obs, 1) @ head.weight.T + head.bias).split(ACTIONS, 1)
    return mean, torch.exp(-10 + 12 * (torch.tanh(log_std) + 1) / 2)


def sampled(agent, obs, noise):
    mean, std = actor(agent, obs)
    normal = torch.distributions.Normal(mean, std)
    u = mean + std * noise
    log_prob = normal.log_prob(u) + 2 * torch.cosh(u).log()  # 1 - tanh^2 is 1 / cosh^2
    return torch.tanh(u), log_prob.sum(1)


def assert_gradients(loss, expected, parameters):
    parameters = [*parameters]
    got = torch.autograd.grad(loss, parameters)
    for mine, theirs in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_critic_loss_by_formula(double):
    """The target is the quantile-wise mean of both target critics: no minimum."""
    agent, (obs, action, reward, terminated, next_obs) = make_agent(), make_batch()
    agent.log_alpha.data.fill_(math.log(0.3))
    for parameter in agent.target_critic.parameters():
        parameter.data += 0.1
    noise = torch.randn(B, ACTIONS)
    next_action, log_prob = (x.detach() for x in sampled(agent, next_obs, noise))
    next_q = critics(agent.target_critic, torch.cat([next_obs, next_action], 1)).detach()
    q = critics(agent.critic, torch.cat([obs, action], 1))
    expected = 0.0
    for b in range(B):
        value = (next_q[0, b] + next_q[1, b]) / 2 - 0.3 * log_prob[b]
        y = reward[b] + (0.0 if terminated[b] else 0.99) * value
        expected = expected + (quantile_huber(q[0, b], y) + quantile_huber(q[1, b], y)) / B
    loss, _ = agent.critic_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    assert_gradients(loss, expected, agent.critic.parameters())


def test_actor_loss_by_formula(double):
    agent, (obs, *_) = make_agent(), make_batch()
    agent.log_alpha.data.fill_(math.log(0.3))
    noise = torch.randn(B, ACTIONS)
    action, log_prob = sampled(agent, obs, noise)
    q = critics(agent.critic, torch.cat([obs, action], 1)).mean((0, 2))
    expected = (0.3 * log_prob - q).mean()
    loss, info = agent.actor_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(info["diagnostics/entropy"], -log_prob.mean(), rtol=1e-8, atol=1e-8)
    assert_gradients(loss, expected, agent.actor.parameters())


def test_exploring_actor_by_formula(double):
    """A shift of the actor's mean; 3/4 of its standard deviation; an upper bound of Q; the KL."""
    agent, (obs, *_) = make_agent(), make_batch()
    for parameter in agent.explorer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    noise = torch.randn(B, ACTIONS)
    mean, std = (x.detach() for x in actor(agent, obs))
    *body, head = layers(agent.explorer)
    assert head.bias is None
    shift = bronet(body, torch.cat([obs, mean], 1), 1) @ head.weight.T
    wide, near = (
        torch.distributions.Normal(mean, std),
        torch.distributions.Normal(mean + shift, std),
    )
    kl = torch.distributions.kl_divergence(near, wide).sum(1)
    action = torch.tanh(mean + shift + 0.75 * std * noise)
    q1, q2 = critics(agent.critic, torch.cat([obs, action], 1))
    upper = ((q1 + q2) / 2 + 1.0 * (q1 - q2).abs() / 2).mean(1)
    expected = (0.25 * kl - upper).mean()
    loss, info = agent.explorer_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(info["diagnostics/kl"], kl.mean() / 2, rtol=1e-8, atol=1e-8)
    assert_gradients(loss, expected, agent.explorer.parameters())
    got = torch.autograd.grad(loss, [*agent.actor.parameters()], allow_unused=True)
    assert all(gradient is None for gradient in got)


def test_optimism_falls_and_kl_weight_grows_while_the_kl_is_too_large(double):
    agent = make_agent()
    optimism, kl_weight = agent.dual_values()
    assert optimism.item() == pytest.approx(1.0) and kl_weight.item() == pytest.approx(0.25)
    loss, _ = agent.dual_loss(torch.tensor(0.15))
    gradients = torch.autograd.grad(loss, [agent.optimism, agent.kl_weight])
    for gradient, parameter, value, sign in zip(
        gradients, (agent.optimism, agent.kl_weight), (1.0, 0.25), (1, -1)
    ):
        slope = value * 8.75 * (1 - math.tanh(parameter.item()) ** 2)
        assert gradient.item() == pytest.approx(sign * slope * 0.1, rel=1e-6)
    before = [x.item() for x in agent.dual_values()]
    agent.descend("duals", agent.dual_loss, torch.tensor(0.15))
    after = [x.item() for x in agent.dual_values()]
    assert after[0] < before[0] and after[1] > before[1]


def test_it_acts_by_the_exploring_actor_and_is_evaluated_by_the_other():
    agent, obs = make_agent(), np.ones(OBS, np.float32)
    x = torch.from_numpy(obs)[None]
    mean, std = actor(agent, x)
    assert agent.act(obs) == pytest.approx(mean[0].tanh().detach().numpy(), abs=1e-6)
    noise = torch.randn(1, ACTIONS, generator=torch.Generator().manual_seed(3))
    shift = agent.explorer(torch.cat([x, mean], 1))
    expected = (mean + shift + 0.75 * std * noise).tanh()[0].detach().numpy()
    assert agent.act(obs, torch.Generator().manual_seed(3)) == pytest.approx(expected, abs=1e-6)


def test_what_it_says():
    agent = bro.Agent(OBS, ACTIONS, bro.Args())
    q = agent.q(agent.critic, torch.zeros(3, OBS), torch.zeros(3, ACTIONS))
    assert q.shape == (2, 3, 100) and agent.target_entropy == -1
    assert [len(net.blocks) for net in agent.critic] == [2, 2] and agent.args.utd == 10
    assert [len(net.blocks) for net in (agent.actor, agent.explorer)] == [1, 1]
    assert {
        layer.out_features for layer in layers(agent.critic) if hasattr(layer, "out_features")
    } == {512, 100}
    for name, decay, lr, beta1 in (
        ("critic", 1e-4, 3e-4, 0.9),
        ("actor", 1e-4, 3e-4, 0.9),
        ("explorer", 1e-4, 3e-4, 0.9),
        ("alpha", 0, 3e-4, 0.5),
        ("duals", 0, 3e-5, 0.5),
    ):
        (group,) = agent.optimizers[name].param_groups
        assert (group["weight_decay"], group["lr"]) == (decay, lr)
        assert (*group["betas"], group["eps"]) == (beta1, 0.999, 1e-8)
    assert [1 + 1000 * k for k in (15, 50, 250, 500, 750, 1000, 1500, 2000)] == bro.RESETS
    assert bro.Args(fast=True).utd == 2 and bro.Args.suite_defaults("dm_control/dog-run-v0") == {}


def test_initial_weights_are_orthogonal():
    """With a gain of sqrt(2); the log stds' is 1, that of the exploring actor's shift 0.01."""
    agent = bro.Agent(OBS, ACTIONS, bro.Args())

    def gains(weight):
        """Of its rows, or of its columns where these are fewer."""
        weight = weight.detach()
        products = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-4)
        return products.diag().sqrt()

    root = 2**0.5
    for net, last in (
        (agent.critic[0], [root] * 100),
        (agent.critic[1], [root] * 100),
        (agent.actor, [root] * ACTIONS + [1] * ACTIONS),
        (agent.explorer, [0.01] * ACTIONS),
    ):
        for layer in layers(net)[:-1]:
            if isinstance(layer, torch.nn.Linear):
                assert (gains(layer.weight) - root).abs().max() < 1e-4
        assert gains(net.last.weight).tolist() == pytest.approx(last, rel=1e-4)


def test_one_quantile_is_no_other_algorithm():
    agent, batch = make_agent(n_quantiles=1, n_critics=1), make_batch()
    assert agent.q(agent.critic, *batch[:2]).shape == (1, B, 1)
    assert "losses/critic" in agent.update(batch, torch.Generator().manual_seed(0))


def test_an_update_is_of_critic_targets_actor_explorer_and_duals_in_this_order():
    agent, order = make_agent(), []
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    descend, move = agent.descend, agent.move_target

    def noted(name, *rest):
        order.append(name)
        return descend(name, *rest)

    agent.descend = noted
    agent.move_target = lambda: (order.append("target"), move())
    agent.update(make_batch(), torch.Generator().manual_seed(0))
    assert order == ["critic", "target", "actor", "alpha", "explorer", "duals"]
    after = agent.state_dict()
    for part in ("critic.", "target_critic", "actor.", "log_alpha", "explorer.", "optimism"):
        moved = [not torch.equal(after[k], before[k]) for k in after if k.startswith(part)]
        assert any(moved), part


def test_the_exploring_actor_is_delayed_as_the_other():
    agent = make_agent(policy_delay=2)
    steps = dict.fromkeys(agent.optimizers, 0)
    for name, optimizer in agent.optimizers.items():
        optimizer.step = lambda name=name: steps.update({name: steps[name] + 1})
    for _ in range(4):
        agent.update(make_batch(), torch.Generator().manual_seed(0))
    assert steps == {"critic": 4, "actor": 2, "explorer": 2, "alpha": 2, "duals": 2}


def test_fast_has_its_own_utd(capsys):
    with pytest.raises(SystemExit, match="2"):
        bro.main(["--env-id", "Hopper-v4", "--fast", "--utd", "4"])
    assert "error: --fast has --utd 2, not 4" in capsys.readouterr().err


def test_fast_is_open_to_a_subclass_with_another_utd():
    @dataclasses.dataclass
    class Args(bro.Args):
        utd: int = 4

    assert Args(fast=True).utd == 2 and Args().utd == 4


@pytest.mark.parametrize("fast, utd", [(False, 10), (False, 2), (True, 2)])
def test_resets_come_before_the_updates_of_their_agent_steps(fast, utd):
    """With 2500 random steps, step 15 001 makes the updates from (15 000 - 2500) * UTD on."""
    agent, batch = make_agent(fast=fast, utd=utd, learning_starts=2500), make_batch()
    rng, resets = torch.Generator().manual_seed(0), []
    agent.reset = lambda: resets.append(agent.n_updates)
    agent.descend = lambda *x: {"diagnostics/kl": 0, "diagnostics/entropy": 0}
    for step in (15_001, 50_001, 250_001, 500_001):
        for update in range((step - 2502) * utd, (step - 2500) * utd):
            agent.n_updates = update
            agent.update(batch, rng)
    steps = [2500 + n / utd + 1 for n in resets]
    assert steps == ([15_001] if fast else [15_001, 50_001, 250_001, 500_001])


def test_a_reset_makes_everything_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bro, "RESETS", [31])
    seen = []

    class Agent(bro.Agent):
        program = "bro"

        def reset(self):
            seen.append({k: v.clone() for k, v in self.state_dict().items()})
            super().reset()
            seen.append({k: v.clone() for k, v in self.state_dict().items()})

    assert bro.main([*TINY, "--run-name", "run"], Agent=Agent) == 0
    _, first, before, after = seen
    constant = ("norm", "bias", "log_alpha", "optimism", "kl_weight", ".1.weight", ".4.weight")
    for name, value in after.items():
        if not (value == value.flatten()[0]).all() or "head" in name:
            assert not torch.isclose(value, before[name]).any(), name
            assert not torch.isclose(value, first[name]).any(), name
        else:
            assert torch.equal(value, first[name]) and not torch.equal(value, before[name]), name
            assert any(word in name for word in constant)
    checkpoint = torch.load("runs/run/checkpoint.pt")
    assert checkpoint["n_updates"] == 40 and len(checkpoint["rows"]) == 40
    for name, optimizer in checkpoint["optimizers"].items():  # of steps 31 to 40
        assert {state["step"].item() for state in optimizer["state"].values()} == {20}, name


@pytest.mark.parametrize("killed_at", [14, 30])
def test_resume_is_exact_before_and_after_a_reset(tmp_path, monkeypatch, killed_at):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bro, "RESETS", [31])

    class Killed(bro.Agent):
        program = "bro"

        def act(self, obs, rng=None):
            if self.n_updates == killed_at:
                raise InterruptedError
            return super().act(obs, rng)

    part = [*TINY, "--run-name", "part", "--checkpoint-every", "6"]
    with pytest.raises(InterruptedError):
        bro.main(part, Agent=Killed)
    assert bro.main(["--resume", "runs/part"]) == 0
    assert bro.main([*TINY, "--run-name", "whole"]) == 0
    whole, part = (torch.load(Path("runs", name, "checkpoint.pt")) for name in ("whole", "part"))
    assert all(torch.equal(whole["agent"][k], part["agent"][k]) for k in whole["agent"])
    assert torch.equal(whole["rows"], part["rows"])
    assert (
        Path("runs/whole/evaluations.csv").read_text()
        == Path("runs/part/evaluations.csv").read_text()
    )
