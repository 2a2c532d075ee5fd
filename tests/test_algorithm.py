"""The algorithm: batch renormalisation, joint pass, networks, replay buffer and time limits."""

import importlib
import math

import numpy as np
import pytest
import torch
from conftest import (
    ACTIONS,
    BATCH,
    OBS,
    SCRIPTS,
    copy_of,
    every_script,
    forward,
    load,
    make_agent,
    make_batch,
    on_each_device,
    same,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import crossq_sac
import crossq_td3
import crossq_wn_highutd
import sac_baseline
from crossq_sac import Args, BatchRenorm, ReplayBuffer

# ------------------------------------------------------------------------------ batch renorm


def ioffe(x, mean, var, warm, r_max=3.0, d_max=5.0, eps=1e-3):
    """Ioffe 2017 in NumPy: the output, and g -> the gradient of sum(output * g)."""
    mu, sigma = x.mean(0), np.sqrt(x.var(0) + eps)
    running = np.sqrt(var + eps)
    r, d = np.ones_like(mu), np.zeros_like(mu)
    if warm:
        r = np.clip(sigma / running, 1 / r_max, r_max)
        d = np.clip((mu - mean) / running, -d_max, d_max)
        # The data below makes every clip act, and leaves some entries inside.
        assert {1 / 3, 3.0} < set(r) and {-5.0, 5.0} < set(d)
    normal = (x - mu) / sigma

    def gradient(g):
        g = g * r  # then the well-known backward pass of batch norm
        return (g - g.mean(0) - normal * (g * normal).mean(0)) / sigma

    return normal * r + d, gradient


@pytest.mark.parametrize("warm", [False, True])
def test_batch_renorm_is_ioffes(warm):
    """In float64, with a constant feature, one of tiny variance, and clipped r and d."""
    rng = np.random.default_rng(0)
    scales, shifts = [1.0, 0.0, 1e-4, 50.0, 1.0, 2.0], [0.0, 3.0, -9.0, 0.0, 100.0, -1.0]
    x = rng.normal(size=(32, 6)) * scales + shifts
    layer = BatchRenorm((1, 6), warmup=0 if warm else 100).double()
    mean, var = rng.normal(size=6), rng.uniform(0.5, 2.0, size=6)
    scale, bias = rng.normal(size=6), rng.normal(size=6)
    state = {"running_mean": mean, "running_var": var, "scale": scale, "bias": bias}
    with torch.no_grad():
        for name, value in state.items():
            getattr(layer, name).copy_(torch.tensor(value))
    tensor, g = torch.tensor(x, requires_grad=True), rng.normal(size=x.shape)
    evaluated = layer.eval()(tensor).detach()
    assert np.allclose(evaluated, (x - mean) / np.sqrt(var + 1e-3) * scale + bias, atol=1e-10)
    out = layer.train()(tensor)
    expected, gradient = ioffe(x, mean, var, warm)
    assert np.allclose(out.detach(), expected * scale + bias, atol=1e-10)
    out.backward(torch.tensor(g))
    assert np.allclose(tensor.grad, gradient(g * scale), atol=1e-9)
    assert np.allclose(layer.scale.grad, (g * expected).sum(0))
    assert np.allclose(layer.running_mean, 0.99 * mean + 0.01 * x.mean(0))
    assert np.allclose(layer.running_var, 0.99 * var + 0.01 * x.var(0))  # biased
    inside = [0, 5] if warm else []  # neither r nor d is clipped there: train == eval
    assert np.allclose(out.detach()[:, inside], evaluated[:, inside], atol=1e-10)


def test_warm_up_ends_after_exactly_so_many_training_forwards():
    """With a warm-up of 3, forwards 1 to 3 are batch norm, the fourth is not. Eval is no forward."""
    layer = BatchRenorm((1, 2), warmup=3)
    for forwards in range(1, 6):
        x = torch.randn(8, 2) + 5
        layer.eval()(x)
        batch_norm = nn.functional.batch_norm(x, None, None, training=True, eps=1e-3)
        assert torch.allclose(layer.train()(x), batch_norm, atol=1e-5) == (forwards <= 3)
        assert layer.steps == forwards


# ------------------------------------------------------------------------------ the updates


@pytest.mark.parametrize("script", [crossq_sac, crossq_td3, crossq_wn_highutd])
def test_statistics_move_in_their_own_update_only_and_by_one_step(script):
    """The critic's by s and s' together in each critic update, the actor's by s alone in each
    actor update. Acting moves none."""
    agent = make_agent(script)
    critic, actor, variance = torch.zeros(OBS), torch.zeros(OBS), torch.ones(OBS)
    for i in range(1, 7):
        batch = make_batch(i)
        agent.update(batch, torch.Generator().manual_seed(i))
        critic.lerp_(torch.cat([batch[0], batch[4]]).mean(0), 0.01)
        variance.lerp_(torch.cat([batch[0], batch[4]]).var(0, correction=0), 0.01)
        if i % 3 == 0:
            actor.lerp_(batch[0].mean(0), 0.01)
        for which in (0, 1):
            mean = agent.critic.norms[0].running_mean[which, 0, :OBS]
            assert torch.allclose(mean, critic, atol=1e-6)
            var = agent.critic.norms[0].running_var[which, 0, :OBS]
            assert torch.allclose(var, variance, atol=1e-6)
        assert torch.allclose(agent.actor.norms[0].running_mean[0], actor, atol=1e-6)
        before = copy_of(agent)
        agent.act(np.ones(OBS), torch.Generator())
        assert same(before, copy_of(agent))


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@on_each_device
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_operator_waits_for_the_device(script, device):
    """An update is as many operators each time, and none of them needs a tensor's value."""
    agent, counts = make_agent(importlib.import_module(script[:-3]), policy_delay=1), []
    agent.to(device)
    batch, rng = [x.to(device) for x in make_batch()], torch.Generator(device)
    waits = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}
    for update in range(4):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if update in (1, 2) else "default")
        with Recorder() as recorder:
            agent.update(batch, rng)
        assert not waits & set(recorder.names)
        counts.append(len(recorder.names))
    assert counts[2] == counts[3] > 100  # the first one makes the optimisers' state


# ------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize("script", [crossq_sac, crossq_wn_highutd, sac_baseline])
def test_extreme_actions(script):
    """log_std is clipped to [-20, 2]. log-prob is finite where the action is 1 to the last bit."""
    agent = make_agent(script).eval()
    agent.actor.weights[2].data.zero_()
    for mean, log_std, clipped in ((20.0, 0.0, 0.0), (0.0, 100.0, 2.0), (0.0, -100.0, -20.0)):
        agent.actor.biases[2].data[:] = torch.tensor([mean, mean, log_std, log_std])
        action, log_prob = agent.policy(torch.zeros(1, OBS), torch.full((1, ACTIONS), 0.1))
        u = np.float64(mean + 0.1 * math.exp(clipped))
        normal = -0.5 * 0.1**2 - clipped - 0.5 * math.log(2 * math.pi)
        expected = ACTIONS * (normal - 2 * (math.log(2) - u - np.log1p(np.exp(-2 * u))))
        assert action[0].tolist() == pytest.approx([np.tanh(u)] * ACTIONS)
        assert log_prob.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("script", [crossq_sac, sac_baseline])
def test_initialisation_is_lecun_normal(script):
    torch.manual_seed(0)
    mlp = script.MLP(400, 300, 1, script.Args(), ensemble=(2,))
    for weight, bias, n in zip(mlp.weights, mlp.biases, (400, 300, 300)):
        assert weight.std().item() == pytest.approx(n**-0.5, rel=0.06)
        assert weight.abs().max() <= 2 * n**-0.5 / 0.8796 + 1e-6 and (bias == 0).all()
        assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("script", [crossq_sac, crossq_wn_highutd, sac_baseline])
def test_network(script):
    """(Norm ->) dense -> ReLU, twice, -> dense. Every critic has weights and statistics of its
    own. --bf16 rounds the square product, and not the last one."""
    agent, (obs, action, *_) = make_agent(script, updates=3, n_critics=3), make_batch()
    mlp, norm = agent.critic, None if script is sac_baseline else "running"
    x = torch.cat([obs, action], -1)
    if norm:
        assert torch.allclose(mlp.train()(obs, action), forward(mlp, x, "batch"), atol=1e-5)
    plain = mlp.eval()(obs, action)
    assert plain.shape == (3, BATCH, 1) and torch.allclose(plain, forward(mlp, x, norm), atol=1e-5)
    mlp.eval().bf16 = make_agent(script, bf16=True).critic.bf16
    rounded = mlp(obs, action)
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - plain).abs().max() < 0.05 * plain.std()
    with torch.no_grad():
        mlp.weights[1].zero_()  # the only product in bfloat16
        exact = mlp(obs, action)
        mlp.bf16 = False
        assert torch.allclose(exact, mlp(obs, action), atol=1e-6)


# ------------------------------------------------------------------ replay buffer and time limits


def test_buffer_wraps_around_and_keeps_contents():
    buffer = ReplayBuffer(2, 1, Args(buffer_size=5, device="cpu"))
    rng = torch.Generator().manual_seed(0)
    buffer.rows.fill_(math.nan)  # unwritten rows would show
    for i in range(8):
        buffer.add(np.full(2, i), np.full(1, -i / 10), i + 0.5, i % 2 == 0, np.full(2, i + 1))
        obs, action, reward, terminated, next_obs = buffer.sample(200, rng)
        kept = range(max(0, i - 4), i + 1)
        assert set(obs[:, 0].tolist()) == set(kept)
        assert torch.equal(obs + 1, next_obs) and torch.equal(reward, obs[:, 0] + 0.5)
        assert torch.allclose(action[:, 0], -obs[:, 0] / 10)
        assert torch.equal(terminated, (obs[:, 0] % 2 == 0).float())
        assert buffer.rows.dtype == torch.float32
        assert (action.shape, reward.shape, terminated.shape) == ((200, 1), (200,), (200,))


@pytest.mark.parametrize("env", ["Truncated", "Terminated"])
def test_truncation_bootstraps_and_termination_does_not(main, env):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 5, for a time limit is no end. With
    terminations the last of 10 steps is worth 1, the first more."""
    flags = f"--env-id tiny_envs:{env}-v0 --gamma 0.8 --alpha 1e-6 --no-compile --device cpu"
    flags += " --critic-width 32 --actor-width 16 --batch-size 64 --total-timesteps 1400"
    flags += " --critic-lr 2e-3 --learning-starts 300 --run-name a"
    main(*flags.split())
    agent = crossq_sac.Agent(3, 2, Args(critic_width=32, actor_width=16))
    agent.load_state_dict(load("runs/a")["agent"])
    obs = torch.tensor([[0.0, 0.5, 0.0], [0.9, 0.5, 0.0]])
    q = agent.critic.eval()(obs, torch.zeros(2, 2)).detach().mean(0)[:, 0]
    if env == "Truncated":
        assert torch.allclose(q, torch.full((2,), 5.0), rtol=0.12)
    else:
        assert q[1] < 1.6 and q[0].item() == pytest.approx((1 - 0.8**10) / 0.2, rel=0.2)


@every_script
@pytest.mark.parametrize("env", ["Truncated", "Terminated"])
def test_stored_transitions(main, env):
    """The true last observation is stored, and no row crosses a reset. `terminated` is 1 at a
    termination and 0 everywhere else, at a time limit too. The first --learning-starts actions are
    uniform; the first update follows the next one."""
    updated = []

    class Agent(main.module.Agent):
        def update(self, batch, rng):
            updated.append(self)
            return super().update(batch, rng)

    flags = f"--env-id tiny_envs:{env}-v0 --total-timesteps 97 --learning-starts 95 --no-compile"
    flags += " --critic-width 8 --actor-width 8 --device cpu --utd 1 --run-name a"
    flags += " --eval-every 7 --eval-episodes 1"  # in an environment of its own
    main(*flags.split(), Agent=Agent)
    assert len(updated) == 2
    widths = [3, 2, 1, 1, 3]
    obs, action, reward, terminated, next_obs = load("runs/a")["rows"][:95].split(widths, -1)
    t = torch.arange(95) % 10
    assert torch.allclose(obs[:, 0], t / 10) and torch.allclose(next_obs[:, 0], (t + 1) / 10)
    assert torch.equal(obs[:, 1], next_obs[:, 1]) and len(set(obs[:, 1].tolist())) == 10
    assert (reward == 1).all()
    ends = [*range(9, 95, 10)] if env == "Terminated" else []
    assert terminated[:, 0].nonzero()[:, 0].tolist() == ends and terminated.sum() == len(ends)
    # The run's own generator draws the actions first. The environment, with bounds of 0.4, saw
    # 0.4 times as much.
    rng = torch.Generator().manual_seed(1)
    assert torch.equal(action, torch.stack([torch.rand(2, generator=rng) * 2 - 1 for _ in t]))
    assert torch.allclose(next_obs[:, 2], 0.4 * action[:, 0], atol=1e-6)


@every_script
def test_evaluation(main):
    """Deterministic: tanh(mean), of episodes that seed and step select. It leaves the agent
    alone."""
    args = main.module.Args(env_id="Pendulum-v1", critic_width=8, actor_width=8, eval_episodes=2)
    agent, seen = main.module.Agent(3, 1, args), []
    before, act, env = copy_of(agent), agent.act, main.module.make_env(args)
    agent.act = lambda *inputs: seen.append((*inputs, act(*inputs))) or seen[-1][-1]
    steps_and_seeds = (1, 1), (1, 1), (2, 1), (2, 2)
    runs = [main.module.evaluate(agent, env, step) for step, args.seed in steps_and_seeds]
    assert same(before, copy_of(agent))
    returns = [[row[2] for row in rows] for rows in runs]
    assert returns[0] == returns[1] and len({*returns[0], *returns[2], *returns[3]}) == 6
    assert [row[:2] for row in runs[2]] == [(2, 0), (2, 1)] and runs[0][0][3:] == (200, "")
    obs, actions = (torch.tensor(np.array(x)) for x in zip(*seen))
    mean = forward(agent.actor, obs, None if main.module is sac_baseline else "running")[:, :1]
    assert torch.allclose(actions, mean.tanh(), atol=1e-5) and len(seen) == 8 * 200
