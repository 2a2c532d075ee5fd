"""benchmark/algorithms/xqc.py: atoms, projection, weight norm, reward scaling, learning rates."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xqc

OBS, ACTIONS, B, K = 4, 2, 8, 101
TINY = "--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
TINY += " --learning-starts 20 --total-timesteps 40 --eval-every 20 --eval-episodes 1"
TINY = f"{TINY} --device cpu --compile off".split()


def make_agent(**changes):
    torch.manual_seed(0)
    return xqc.Agent(OBS, ACTIONS, xqc.Args(**{"critic_width": 16, "actor_width": 12} | changes))


def make_batch():
    rng = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, B, OBS, generator=rng)
    action = torch.rand(B, ACTIONS, generator=rng) * 2 - 1
    terminated = (torch.arange(B) % 3 == 0) * 1.0
    return obs, action, torch.randn(B, generator=rng), terminated, next_obs


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


def test_projection_by_hand():
    """0.25 lies between atoms 52 and 53 (0.2 and 0.3); 7 goes to the last one, 5."""
    out = xqc.projected(torch.tensor([[0.4, 0.6]]), torch.tensor([[0.25, 7.0]]))[0]
    assert out.nonzero().flatten().tolist() == [52, 53, 100]
    assert out[[52, 53, 100]].tolist() == pytest.approx([0.2, 0.2, 0.6], abs=1e-5)


def test_projection_by_formula(double):
    torch.manual_seed(0)
    probs, values = torch.randn(B, K).softmax(-1), 4 * torch.randn(B, K)
    out = xqc.projected(probs, values)
    for b in range(B):
        assert out[b].tolist() == pytest.approx(
            c51(probs[b].tolist(), values[b].tolist()), abs=1e-10
        )
    assert out.sum(-1).tolist() == pytest.approx([1.0] * B)


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
    agent, (obs, action, reward, terminated, next_obs) = make_agent(), make_batch()
    with torch.no_grad():
        for parameter in agent.target_critic.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    noise = torch.randn(B, ACTIONS)
    agent.actor.eval()
    next_action, log_prob = (x.detach() for x in agent.policy(next_obs, noise))
    pairs = torch.cat([torch.cat([obs, action], 1), torch.cat([next_obs, next_action], 1)])
    next_probs = network(agent.target_critic, pairs)[:, B:].softmax(-1).detach()
    log_probs = network(agent.critic, pairs)[:, :B].log_softmax(-1)
    atoms, expected, chosen = np.linspace(-5, 5, K), 0.0, []
    for b in range(B):
        means = [float(next_probs[n, b] @ torch.tensor(atoms)) for n in range(2)]
        chosen.append(means.index(min(means)))
        gamma = 0.0 if terminated[b] else 0.995
        values = [reward[b].item() + gamma * (z - 0.01 * log_prob[b].item()) for z in atoms]
        target = torch.tensor(c51(next_probs[chosen[-1], b].tolist(), values))
        expected = expected - (target * (log_probs[0, b] + log_probs[1, b])).sum() / B
    assert set(chosen) == {0, 1}
    loss, _ = agent.critic_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    parameters = [*agent.critic.parameters()]
    got = torch.autograd.grad(loss, parameters)
    for mine, theirs in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_actor_loss_by_formula(double):
    """The lower of both critics' means, from running statistics."""
    agent, (obs, *_) = make_agent(), make_batch()
    agent.critic.eval()
    for norm in agent.critic.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    noise = torch.randn(B, ACTIONS)
    agent.actor.train()
    action, log_prob = agent.policy(obs, noise)
    probs = agent.critic(torch.cat([obs, action], 1)).softmax(-1)
    q = (probs * torch.linspace(-5, 5, K)).sum(-1)
    assert set(q.argmin(0).tolist()) == {0, 1}
    expected = (0.01 * log_prob - torch.minimum(q[0], q[1])).mean()
    loss, _ = agent.actor_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    assert not torch.isclose(loss, (0.01 * log_prob - q.mean(0)).mean())


def test_what_it_says():
    agent = xqc.Agent(OBS, ACTIONS, xqc.Args())
    logits = agent.critic(torch.zeros(3, OBS + ACTIONS))
    assert logits.shape == (2, 3, 101)
    assert agent.atoms()[[0, 50, 100]].tolist() == pytest.approx([-5, 0, 5], abs=1e-6)
    widths = [[*weight.shape[-2:]] for weight in agent.critic.weights]
    assert widths == [[6, 512], [512, 512], [512, 512], [512, 512], [512, 101]]
    assert [weight.shape[1] for weight in agent.actor.weights] == [256] * 4 + [4]
    assert (
        agent.args.utd == 2
        and agent.target_entropy == -1
        and agent.alpha().item() == pytest.approx(0.01)
    )
    for optimizer in agent.optimizers.values():
        (group,) = optimizer.param_groups
        assert (*group["betas"], group["eps"]) == (0.9, 0.999, 1e-8)
        assert group["weight_decay"] == 0 and group["lr"] == 3e-4
    assert xqc.Args.suite_defaults("dm_control/dog-run-v0")["gamma"] == 0.99
    assert (
        xqc.Args.suite_defaults("myoHandReachFixed-v0")["gamma"] == 0.95
        and xqc.Args().gamma == 0.995
    )


def test_every_neurons_weights_have_norm_1_from_the_start_and_after_an_update():
    agent, rng = make_agent(policy_delay=1), torch.Generator().manual_seed(0)
    start = agent.critic.weights[0].clone()
    torch.testing.assert_close(start.norm(dim=-2), torch.ones(2, 16))
    for _ in range(3):
        agent.update(make_batch(), rng)
    assert not torch.equal(start, agent.critic.weights[0])
    for net in (agent.critic, agent.actor):
        for weight in net.weights:
            length = weight.detach().square().sum(-2).sqrt()
            torch.testing.assert_close(length, torch.ones_like(length))


def test_the_smallest_log_std():
    agent = make_agent()
    agent.actor.bias.data.fill_(-50.0)
    agent.actor.eval()
    assert agent.actor(torch.zeros(1, OBS))[0, ACTIONS:].tolist() == [-10, -10]


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns():
    rng = np.random.default_rng(0)
    rewards, ends = 3 * rng.standard_normal(300) + 1, rng.random(300) < 0.05
    buffer = xqc.ReplayBuffer(1, 1, xqc.Args(gamma=0.9, buffer_size=400), torch.device("cpu"))
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


def test_the_rates_fall_over_agent_steps(monkeypatch):
    """1001 environment steps are 501 agent steps of two, of which the last 481 make updates."""
    agent = make_agent(action_repeat=2, total_timesteps=1001, learning_starts=20)
    agent.n_updates = 2 * 481
    monkeypatch.setattr(xqc.crossq_wn_highutd.Agent, "descend", lambda *inputs: None)
    agent.descend("critic", None)
    assert agent.optimizers["critic"].param_groups[0]["lr"] == pytest.approx(3e-5)


def test_a_short_run_with_the_docstrings_lr_end_is_the_beginning_of_a_long_one(monkeypatch):
    lr_end = float(re.search(r"--lr-end ([\d.]+)", xqc.__doc__)[1])
    monkeypatch.setattr(xqc.crossq_wn_highutd.Agent, "descend", lambda *inputs: None)
    rates = []
    for flags in {"total_timesteps": 1_000_000}, {"total_timesteps": 50_000, "lr_end": lr_end}:
        agent = make_agent(**flags, learning_starts=5000)
        for agent.n_updates in (0, 45_000, 90_000):
            agent.descend("critic", None)
            rates.append(agent.optimizers["critic"].param_groups[0]["lr"])
    assert rates[:3] == pytest.approx(rates[3:], rel=1e-5) and rates[0] > rates[1] > rates[2]


def test_the_rates_fall_to_a_tenth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = []

    class Agent(xqc.Agent):
        def descend(self, name, loss, *inputs):
            info = super().descend(name, loss, *inputs)
            rates.append((name, self.n_updates, self.optimizers[name].param_groups[0]["lr"]))
            return info

    assert xqc.main([*TINY, "--run-name", "run"], Agent=Agent) == 0
    critic = [lr for name, _, lr in rates if name == "critic"]
    assert len(critic) == 40 and critic[0] == 3e-4
    assert critic[20] == pytest.approx(3e-4 * 0.55) and critic[-1] == pytest.approx(
        3e-4 * (1 - 0.9 * 39 / 40)
    )
    for name, n, lr in rates:
        assert lr == pytest.approx(3e-4 * (1 - 0.9 * n / 40)), name


def test_resume_is_exact(tmp_path, monkeypatch):
    """The statistics of the returns too."""
    monkeypatch.chdir(tmp_path)

    class Killed(xqc.Agent):
        program = "xqc"

        def act(self, obs, rng=None):
            if self.n_updates == 30:
                raise InterruptedError
            return super().act(obs, rng)

    part = [*TINY, "--run-name", "part", "--checkpoint-every", "8"]
    with pytest.raises(InterruptedError):
        xqc.main(part, Agent=Killed)
    assert xqc.main(["--resume", "runs/part"]) == 0
    assert xqc.main([*TINY, "--run-name", "whole"]) == 0
    whole, part = (torch.load(Path("runs", name, "checkpoint.pt")) for name in ("whole", "part"))
    assert all(torch.equal(whole["agent"][k], part["agent"][k]) for k in whole["agent"])
    assert whole["buffer"] == part["buffer"] and whole["buffer"]["squares"] > 0
    assert torch.equal(whole["rows"], part["rows"])
    assert (
        Path("runs/whole/evaluations.csv").read_text()
        == Path("runs/part/evaluations.csv").read_text()
    )
