"""benchmark/algorithms/crossq_discrete.py: losses by formula and by hand, one-hot actions, runs."""

import math

import crossq_discrete as discrete
import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import TINY, load, refused
from test_algorithms import assert_close

OBS, ACTIONS, B = 4, 3, 16


def make_agent(**changes):
    torch.manual_seed(0)
    sizes = {"critic_width": 16, "actor_width": 12, "brn_warmup": 0, "device": "cpu"}
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


def forward(net, x, training):
    """A network of dense layers between norms. In training they are Ioffe's formula, after the
    warm-up, with the statistics as they are before the forward."""
    for k in range(3):
        norm = net.norms[k]
        x = torch.relu(x) if k else x
        old = (norm.running_var + norm.eps).sqrt()
        if training:
            mean, var = x.mean(-2, keepdim=True), x.var(-2, correction=0, keepdim=True)
            std = (var + norm.eps).sqrt()
            r = (std / old).clamp(1 / 3, 3).detach()
            d = ((mean - norm.running_mean) / old).clamp(-5, 5).detach()
            x = (x - mean) / std * r + d
        else:
            x = (x - norm.running_mean) / old
        x = (x * norm.scale + norm.bias) @ net.weights[k] + net.biases[k]
    return x


def test_critic_loss_by_formula(double):
    """The lower of the critics' expectations over the next policy, without its entropy; one pass
    over [s; s'] in training mode; no gradient through the target."""
    agent, (batch, taken) = make_agent(), make_batch()
    obs, _, reward, terminated, next_obs = batch
    p = forward(agent.actor, next_obs, training=False).detach().softmax(1)
    both = forward(agent.critic, torch.cat([obs, next_obs]), training=True)
    q, next_q = both[:, :B], both[:, B:].detach()
    expected = 0.0
    for i in range(B):
        value = min(sum(p[i, a] * next_q[n, i, a] for a in range(ACTIONS)) for n in range(2))
        y = reward[i] + 0.99 * (0 if terminated[i] else value)
        expected = expected + sum((q[n, i, taken[i]] - y) ** 2 / 2 for n in range(2)) / B
    loss, _ = agent.critic_loss(batch)
    assert_close(loss, expected, agent.critic.parameters())


def test_by_hand():
    """One state, two critics with known Q, a policy of 1/4 and 3/4, temperature 1/2, gamma 1/2."""
    agent = make_agent(gamma=0.5, alpha=0.5)
    logits = torch.tensor([[0.0, math.log(3)]])
    agent.policy = lambda obs: (logits.softmax(-1), logits.log_softmax(-1))
    q = torch.tensor([[[1.0, 2.0], [4.0, 8.0]], [[3.0, 5.0], [6.0, 6.0]]])  # [critic, s and s', a]
    agent.critic = type("Known", (torch.nn.Module,), {"forward": lambda self, x: q})()
    one_hot, terminated = torch.tensor([[0.0, 1.0]]), torch.zeros(1)
    batch = torch.zeros(1, OBS), one_hot, torch.ones(1), terminated, torch.zeros(1, OBS)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    y = 1 + 0.5 * min(0.25 * 4 + 0.75 * 8, 0.25 * 6 + 0.75 * 6)
    loss, _ = agent.critic_loss(batch)
    assert loss.item() == pytest.approx(((2 - y) ** 2 + (5 - y) ** 2) / 2, rel=1e-6)
    q = torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]]])
    loss, _ = agent.actor_loss(batch[0])
    assert loss.item() == pytest.approx(-0.5 * entropy - (0.25 * 2 + 0.75 * 1.5), rel=1e-6)


def test_acts_by_sampling_and_evaluates_by_the_most_probable():
    agent, rng = make_agent(), torch.Generator().manual_seed(0)
    obs = np.ones(OBS, np.float32)
    agent.actor.eval()
    probs = agent.policy(torch.from_numpy(obs)[None])[0][0].detach()
    drawn = np.mean([agent.act(obs, rng) for _ in range(2000)], 0)
    assert drawn == pytest.approx(probs.numpy(), abs=0.04) and probs.max() < 0.95
    best = np.mean([agent.act(obs) for _ in range(20)], 0)
    assert best.argmax() == probs.argmax() and sorted(best) == [0, 0, 1]
    agent.actor.biases[2].data.fill_(math.nan)  # main refuses an action that is NaN
    assert np.isnan(agent.act(obs)).all() and np.isnan(agent.act(obs, rng)).all()


def test_random_actions_are_uniform_and_held():
    """A new one every fourth step on average, equal to the old one in a third of the cases."""
    agent, rng = make_agent(), torch.Generator().manual_seed(0)
    actions = np.array([agent.random_action(rng) for _ in range(10_000)])
    assert actions.mean(0) == pytest.approx([1 / 3] * 3, abs=0.04)
    repeated = (actions[1:].argmax(1) == actions[:-1].argmax(1)).mean()
    assert repeated == pytest.approx(0.75 + 0.25 / 3, abs=0.02)
    assert agent.state_dict()["held"] == actions[-1].argmax()  # a checkpoint has it


def test_the_environment_gets_the_action():
    """Gymnasium's Discrete may begin elsewhere than at 0."""
    name = tiny_envs.register("Shifted", action_space=gym.spaces.Discrete(4, start=-1))
    env = discrete.make_env(discrete.Args(env_id=name))
    assert env.action_space.shape == (4,)
    env.reset(seed=0)
    seen = []
    for action in np.eye(4, dtype=np.float32):
        env.step(action)
        seen.append(env.unwrapped.last_action.item())
    assert seen == [-1, 0, 1, 2]


def test_images_are_flattened_and_boxes_refused(main, capsys):
    main.module = discrete
    name = tiny_envs.register("DiscreteImage", tiny_envs.Image, action_space=gym.spaces.Discrete(3))
    size = gym.spaces.flatdim(gym.make(name).observation_space)
    main(*TINY, "--env-id", name, "--total-timesteps", 60, "--run-name", "image")
    rows = load("runs/image")["rows"]
    assert rows.shape == (60, 2 * size + 3 + 2) and (rows[:, size : size + 3].sum(1) == 1).all()
    error = refused(main, capsys, *TINY)
    assert error == "error: the action space must be Discrete, not Box(-0.4, 0.4, (2,), float32)"
