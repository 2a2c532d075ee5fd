"""benchmark/algorithms/bro.py: quantiles, networks, the exploring actor, resets."""

import math
from pathlib import Path

import bro
import numpy as np
import pytest
import torch
from conftest import ACTIONS, BATCH, OBS, TINY, assert_identical, copy_of, load, make_batch
from test_algorithms import assert_close, assert_fresh, make_agent

K = 5


def quantile_huber(quantiles, target):
    """Dabney et al. 2018, with loops: [K] and [K'] -> sum over K, mean over K'."""
    total, k = 0.0, len(quantiles)
    for i, mine in enumerate(quantiles):
        for theirs in target:
            u = theirs - mine
            huber = 0.5 * u**2 if abs(u) <= 1 else abs(u) - 0.5
            total = total + abs((i + 0.5) / k - (1.0 if u < 0 else 0.0)) * huber / len(target)
    return total


def layers(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]


def bronet(net, x, blocks):
    """The paper's network from its layers in order: dense, norm, dense, norm, ..., dense."""
    *body, head = layers(net)
    assert len(body) == 2 + 4 * blocks and all(norm.eps == 1e-6 for norm in body[1::2])
    x = body[1](body[0](x)).relu()
    for k in range(2, len(body), 4):
        dense, norm, dense2, norm2 = body[k : k + 4]
        x = x + norm2(dense2(norm(dense(x)).relu()))
    return head(x)


def critics(ensemble, obs, action):
    return torch.stack([bronet(net, torch.cat([obs, action], 1), 2) for net in ensemble])


def actor(agent, obs):
    """Mean and standard deviation; log std goes by tanh from -10 to 2."""
    mean, log_std = bronet(agent.actor, obs, 1).split(ACTIONS, 1)
    return mean, torch.exp(-10 + 12 * (torch.tanh(log_std) + 1) / 2)


def sampled(agent, obs, noise):
    mean, std = actor(agent, obs)
    u = mean + std * noise
    log_prob = torch.distributions.Normal(mean, std).log_prob(u)
    log_prob = log_prob + 2 * torch.cosh(u).log()  # 1 - tanh^2 is 1 / cosh^2
    return torch.tanh(u), log_prob.sum(1)


def test_losses_by_formula(double):
    """The target is the quantile-wise mean of both target critics, no minimum. The actor's Q is the
    mean over critics and quantiles."""
    agent, (obs, action, reward, terminated, next_obs) = make_agent("bro"), make_batch()
    agent.log_alpha.data.fill_(math.log(0.3))
    for parameter in agent.target_critic.parameters():
        parameter.data += 0.1
    noise = torch.randn(BATCH, ACTIONS)
    next_action, log_prob = sampled(agent, next_obs, noise)
    next_q = critics(agent.target_critic, next_obs, next_action)
    q, expected = critics(agent.critic, obs, action), 0.0
    for b in range(BATCH):
        value = (next_q[0, b] + next_q[1, b]) / 2 - 0.3 * log_prob[b]
        y = (reward[b] + (0.0 if terminated[b] else 0.99) * value).detach()
        expected = expected + (quantile_huber(q[0, b], y) + quantile_huber(q[1, b], y)) / BATCH
    loss, _ = agent.critic_loss(make_batch(), noise)
    assert_close(loss, expected, agent.critic.parameters())
    action, log_prob = sampled(agent, obs, noise)
    expected = (0.3 * log_prob - critics(agent.critic, obs, action).mean((0, 2))).mean()
    loss, entropy = agent.actor_loss(obs, noise)
    assert_close(loss, expected, agent.actor.parameters())
    torch.testing.assert_close(entropy, -log_prob.mean())


def test_exploring_actor_by_formula(double):
    """A shift of the actor's mean, 3/4 of its standard deviation, an upper bound of Q, the KL."""
    agent, (obs, *_) = make_agent("bro"), make_batch()
    for parameter in agent.explorer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    noise = torch.randn(BATCH, ACTIONS)
    mean, std = (x.detach() for x in actor(agent, obs))
    assert agent.explorer.last.bias is None
    shift = bronet(agent.explorer, torch.cat([obs, mean], 1), 1)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean + shift, std), normal(mean, std)).sum(1)
    action = torch.tanh(mean + shift + 0.75 * std * noise)
    q1, q2 = critics(agent.critic, obs, action)
    upper = ((q1 + q2) / 2 + 1.0 * (q1 - q2).abs() / 2).mean(1)
    loss, mean_kl = agent.explorer_loss(obs, noise)
    assert_close(loss, (0.25 * kl - upper).mean(), agent.explorer.parameters())
    torch.testing.assert_close(mean_kl, kl.mean() / ACTIONS)
    loss = agent.explorer_loss(obs, noise)[0]
    got = torch.autograd.grad(loss, [*agent.actor.parameters()], allow_unused=True)
    assert all(gradient is None for gradient in got)


@pytest.mark.parametrize("kl, sign", [(0.15, 1), (0.0, -1)])
def test_optimism_falls_and_kl_weight_grows_while_the_kl_is_too_large(kl, sign):
    """From 1 and 0.25, by Adam's first step of 3e-5 in the squashed logarithms."""
    agent = make_agent("bro")
    before = [x.item() for x in agent.dual_values()]
    assert before == pytest.approx([1.0, 0.25], rel=1e-5)
    duals = [x.item() for x in (agent.optimism, agent.kl_weight)]
    agent.explorer_loss = lambda obs, noise: (agent.explorer.last.weight.sum(), torch.tensor(kl))
    agent.update(make_batch(), torch.Generator().manual_seed(0))
    moves = [x.item() - old for x, old in zip((agent.optimism, agent.kl_weight), duals)]
    assert moves == pytest.approx([-sign * 3e-5, sign * 3e-5], rel=0.01)


def test_it_acts_by_the_exploring_actor_and_is_evaluated_by_the_other():
    agent, obs = make_agent("bro"), np.ones(OBS, np.float32)
    agent.explorer.last.weight.data += 0.1
    x = torch.from_numpy(obs)[None]
    mean, std = actor(agent, x)
    assert agent.act(obs) == pytest.approx(mean[0].tanh().detach().numpy(), abs=1e-6)
    noise = torch.randn(1, ACTIONS, generator=torch.Generator().manual_seed(3))
    shift = bronet(agent.explorer, torch.cat([x, mean], 1), 1)
    expected = (mean + shift + 0.75 * std * noise).tanh()[0].detach().numpy()
    assert agent.act(obs, torch.Generator().manual_seed(3)) == pytest.approx(expected, abs=1e-6)


def test_initial_weights_are_orthogonal():
    """With a gain of sqrt(2). The log stds' is 1, that of the exploring actor's shift 0.01."""
    agent = bro.Agent(OBS, ACTIONS, bro.Args())
    q = agent.critic(torch.zeros(3, OBS), torch.zeros(3, ACTIONS))
    assert q.shape == (2, 3, 100)

    def gains(weight):
        """Of its rows, or of its columns if these are fewer."""
        weight = weight.detach()
        products = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-4)
        return products.diag().sqrt()

    root = 2**0.5
    for net, width, last in (
        (agent.critic[0], 512, [root] * 100),
        (agent.critic[1], 512, [root] * 100),
        (agent.actor, 256, [root] * ACTIONS + [1] * ACTIONS),
        (agent.explorer, 256, [0.01] * ACTIONS),
    ):
        dense = [layer for layer in layers(net)[:-1] if isinstance(layer, torch.nn.Linear)]
        assert len(dense) == (5 if width == 512 else 3)
        for layer in dense:
            assert layer.out_features == width
            assert (gains(layer.weight) - root).abs().max() < 1e-4
        assert gains(net.last.weight).tolist() == pytest.approx(last, rel=1e-4)


# ------------------------------ resets


@pytest.mark.parametrize("fast, utd", [(False, 10), (False, 2), (True, 2)])
def test_resets_come_before_the_updates_of_their_agent_steps(fast, utd, monkeypatch):
    """With 2500 random steps, step 15 001 makes the updates from (15 000 - 2500) * UTD on."""
    changes = {"fast": fast, "utd": 10 if fast else utd, "learning_starts": 2500}
    agent, batch = make_agent("bro", **changes), make_batch()
    assert agent.args.utd == utd
    rng, resets = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(bro.sr_sac, "reset", lambda agent: resets.append(agent.n_updates))
    steps = [1000 * k + 1 for k in (15, 50, 250, 500, 750, 1000, 1500, 2000)]
    for step in steps:
        for update in ((step - 2501) * utd - 1, (step - 2501) * utd, (step - 2501) * utd + 1):
            agent.n_updates = update
            agent.update(batch, rng)
    assert [2500 + n / utd + 1 for n in resets] == (steps[:1] if fast else steps)


def test_a_reset_makes_everything_new():
    agent = make_agent("bro")
    seen = [copy_of(agent)]
    for i in range(2):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
    seen.append(copy_of(agent))
    bro.sr_sac.reset(agent)
    assert_fresh(agent, seen)
    assert agent.n_updates == 2 and agent.dual_optimizer.param_groups[0]["lr"] == 3e-5
    for name in ("log_alpha", "optimism", "kl_weight"):
        value = agent.state_dict()[name]
        assert torch.equal(value, seen[0][name]) and not torch.equal(value, seen[1][name])


@pytest.mark.parametrize("killed_at", [40, 110])
def test_resume_is_exact_before_and_after_a_reset(main, monkeypatch, killed_at):
    """A reset before update 80, at agent step 81."""
    monkeypatch.setattr(bro, "RESETS", [81])
    main.module = bro
    flags = [*TINY, "--n-quantiles", 5, "--utd", 2, "--total-timesteps", 110]

    class Killed(bro.Agent):
        def update(self, batch, rng):
            assert self.n_updates < killed_at
            return super().update(batch, rng)

    with pytest.raises(AssertionError):
        main(*flags, "--run-name", "killed", Agent=Killed)
    assert 0 < load("runs/killed")["n_updates"] <= killed_at
    main("--resume", "runs/killed")
    main(*flags, "--run-name", "whole")
    assert_identical("runs/whole", "runs/killed")
    steps = load(Path("runs/whole"))["optimizers"]["critic_optimizer"]["state"]
    assert {state["step"].item() for state in steps.values()} == {60}  # since the reset
