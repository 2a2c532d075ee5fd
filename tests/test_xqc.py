"""benchmark/algorithms/xqc.py: atoms, projection, weight norm, reward scaling, learning rates."""

import math

import numpy as np
import pytest
import torch
import xqc
from conftest import ACTIONS, BATCH, OBS, make_batch
from test_algorithms import assert_close, make_agent

K = 101


def c51(probs, values):
    """The projection of Bellemare et al. 2017, algorithm 1, with loops."""
    out = [0.0] * K
    for p, value in zip(probs, values):
        b = (min(5.0, max(-5.0, value)) + 5) / 0.1
        low, high = math.floor(b), math.ceil(b)
        if low == high:
            out[low] += p
        else:
            out[low] += p * (high - b)
            out[high] += p * (b - low)
    return out


def network(net, x):
    """Norm -> (dense -> norm -> ReLU) x 4 -> dense, in training mode."""

    def norm(layer, x):
        mean, var = x.mean(-2, keepdim=True), x.var(-2, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-3).sqrt() * layer.scale + layer.bias

    x = norm(net.norms[0], x)
    for k in range(4):
        x = norm(net.norms[k + 1], x @ net.weights[k]).relu()
    return x @ net.weights[4] + net.bias


def test_critic_loss_by_formula(double):
    """Cross-entropy with the projected distribution of the critic with the lower mean, for both."""
    agent, (obs, action, reward, terminated, next_obs) = make_agent("xqc"), make_batch()
    with torch.no_grad():
        for parameter in agent.target_critic.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    noise = torch.randn(BATCH, ACTIONS)
    agent.actor.eval()
    next_action, log_prob = (x.detach() for x in agent.policy(next_obs, noise))
    pairs = torch.cat([torch.cat([obs, action], 1), torch.cat([next_obs, next_action], 1)])
    next_probs = network(agent.target_critic, pairs)[:, BATCH:].softmax(-1).detach()
    log_probs = network(agent.critic, pairs)[:, :BATCH].log_softmax(-1)
    atoms, expected, chosen = np.linspace(-5, 5, K), 0.0, []
    for b in range(BATCH):
        means = [float(next_probs[n, b] @ torch.tensor(atoms)) for n in range(2)]
        chosen.append(means.index(min(means)))
        gamma = 0.0 if terminated[b] else 0.995
        values = [reward[b].item() + gamma * (z - 0.01 * log_prob[b].item()) for z in atoms]
        target = torch.tensor(c51(next_probs[chosen[-1], b].tolist(), values))
        expected = expected - (target * (log_probs[0, b] + log_probs[1, b])).sum() / BATCH
    assert set(chosen) == {0, 1}
    loss, _ = agent.critic_loss(make_batch(), noise)
    assert_close(loss, expected, agent.critic.parameters())


def test_actor_loss_by_formula(double):
    """The lower of both critics' means, from running statistics."""
    agent, (obs, *_) = make_agent("xqc"), make_batch()
    with torch.no_grad():
        agent.critic.weights[4] *= 20  # so that each critic is the lower one somewhere
    for norm in agent.critic.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    noise = torch.randn(BATCH, ACTIONS)
    agent.actor.train()
    action, log_prob = agent.policy(obs, noise)
    agent.critic.eval()
    probs = agent.critic(obs, action).softmax(-1)
    q = (probs * torch.linspace(-5, 5, K)).sum(-1)
    assert set(q.argmin(0).tolist()) == {0, 1}
    expected = (0.01 * log_prob - torch.minimum(q[0], q[1])).mean()
    agent.critic.train()
    loss, _ = agent.actor_loss(obs, noise)
    assert_close(loss, expected, agent.actor.parameters())


def test_networks():
    agent = xqc.Agent(OBS, ACTIONS, xqc.Args())
    assert agent.critic(torch.zeros(3, OBS), torch.zeros(3, ACTIONS)).shape == (2, 3, 101)
    assert agent.atoms()[[0, 50, 100]].tolist() == pytest.approx([-5, 0, 5], abs=1e-6)
    widths = [[*weight.shape[-2:]] for weight in agent.critic.weights]
    assert widths == [[OBS + ACTIONS, 512], [512, 512], [512, 512], [512, 512], [512, 101]]
    assert [weight.shape[1] for weight in agent.actor.weights] == [256] * 4 + [2 * ACTIONS]
    agent.actor.bias.data.fill_(-50.0)
    agent.actor.eval()
    assert agent.actor(torch.zeros(1, OBS))[0, ACTIONS:].tolist() == [-10] * ACTIONS


def test_every_neurons_weights_have_norm_1_from_the_start_and_after_an_update():
    agent, rng = make_agent("xqc", policy_delay=1), torch.Generator().manual_seed(0)
    start = agent.critic.weights[0].clone()
    torch.testing.assert_close(start.norm(dim=-2), torch.ones(2, 16))
    for _ in range(3):
        agent.update(make_batch(), rng)
    assert not torch.equal(start, agent.critic.weights[0])
    for net in (agent.critic, agent.actor):
        for weight in net.weights:
            length = weight.detach().square().sum(-2).sqrt()
            torch.testing.assert_close(length, torch.ones_like(length))


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns():
    rng = np.random.default_rng(0)
    rewards, ends = 3 * rng.standard_normal(300) + 1, rng.random(300) < 0.05
    buffer = xqc.ReplayBuffer(1, 1, xqc.Args(gamma=0.9, buffer_size=400, device="cpu"))
    returns, total = [], 0.0
    for reward, end in zip(rewards, ends):
        buffer.add([0], [0], reward, end, [0])
        total = 0.9 * total + reward
        returns.append(total)
        total = 0.0 if end else total
    stored = buffer.rows[:300, 2].numpy()
    assert (stored == rewards.astype(np.float32)).all()  # as they came
    _, _, reward, _, _ = buffer.sample(4000, torch.Generator().manual_seed(0))
    assert sorted(set(reward.tolist())) == pytest.approx(sorted(stored / np.std(returns)), rel=1e-4)


def test_the_rates_fall_linearly_over_agent_steps():
    """1001 environment steps are 501 agent steps of two. The last 481 make 962 updates."""
    agent = make_agent("xqc", action_repeat=2, total_timesteps=1001, learning_starts=20)
    optimizers = agent.critic_optimizer, agent.actor_optimizer, agent.alpha_optimizer
    for n in (0, 481, 961):
        agent.n_updates = n
        agent.update(make_batch(), torch.Generator().manual_seed(0))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates == pytest.approx([3e-4 * (1 - 0.9 * k / 962) for k in (n, n + 1, n + 1)])
    # The docstring's short run is the beginning of one of a million steps.
    assert "--total-timesteps 50000 --lr-end 0.9593" in xqc.__doc__
    assert pytest.approx(0.9 / (1_000_000 - 5000), rel=1e-3) == (1 - 0.9593) / (50_000 - 5000)
