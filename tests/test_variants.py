"""One update of each script, and what each alone has, against formulas written a second time. All
in float64."""

import copy
import types

import numpy as np
import pytest
import torch
from conftest import (
    ACTIONS,
    BATCH,
    GAMMA,
    OBS,
    copy_of,
    forward,
    make_agent,
    make_batch,
    same,
)
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import crossq_sac
import crossq_td3
import crossq_wn_highutd
import sac_baseline

SCRIPTS = [crossq_sac, crossq_td3, crossq_wn_highutd, sac_baseline]
pytestmark = pytest.mark.usefixtures("double")


def update(script, **changes):
    """An update of actor and critic after nine others: the batch, the agents before and after it,
    the noise of both losses, and what is logged."""
    agent = make_agent(script, updates=9, **{"policy_delay": 1} | changes)
    if script is not crossq_td3:
        agent.log_alpha.data.fill_(np.log(0.3))
    before, rng = copy.deepcopy(agent), torch.Generator().manual_seed(5)
    batch, rng_copy = make_batch(50), torch.Generator().manual_seed(5)
    info = agent.update(batch, rng)
    drawn = [torch.randn(BATCH, ACTIONS, generator=rng_copy) for _ in range(2)]
    return types.SimpleNamespace(batch=batch, before=before, after=agent, drawn=drawn, info=info)


def sample(agent, obs, eps, norm):
    """torch's own tanh-squashed Gaussian."""
    mean, log_std = forward(agent.actor, obs, norm).chunk(2, -1)
    normal = Normal(mean, log_std.clip(-20, 2).exp())
    squashed = TransformedDistribution(Independent(normal, 1), [TanhTransform()])
    u = normal.mean + normal.stddev * eps
    return torch.tanh(u), squashed.base_dist.log_prob(u) - torch.log(1 - u.tanh() ** 2).sum(-1)


def lower(q):
    """The minimum of two critics, of which each is the lower one somewhere."""
    assert 0.02 < (q[0] < q[1]).to(q).mean() < 0.98
    return torch.minimum(q[0], q[1])


def bellman_loss(u, q, next_value):
    _, _, reward, terminated, _ = u.batch
    target = (reward + GAMMA * (1 - terminated) * lower(next_value)).detach()
    return ((q[0] - target) ** 2).mean() / 2 + ((q[1] - target) ** 2).mean() / 2


def joint(critic, u, next_action):
    """The two halves of one pass: [2, B] each."""
    obs, action, _, _, next_obs = u.batch
    pairs = torch.cat([torch.cat([obs, action], 1), torch.cat([next_obs, next_action], 1)])
    return forward(critic, pairs, "batch")[..., 0].split(BATCH, 1)


def check(u, name, loss):
    """The update's loss of that network is `loss`, and its optimiser, which holds nothing else,
    descended its gradient with respect to the network before the step."""
    net, source = getattr(u.after, name), getattr(u.before, name)
    assert u.info[f"losses/{name}"].item() == pytest.approx(loss.item(), rel=1e-9)
    gradients = torch.autograd.grad(loss, list(source.parameters()))
    for (key, p), expected in zip(net.named_parameters(), gradients, strict=True):
        assert expected.abs().max() > 1e-6, key
        assert torch.allclose(p.grad, expected, rtol=1e-7, atol=1e-9), key
        assert not torch.equal(p, source.get_parameter(key))
    groups = getattr(u.after, f"{name}_optimizer").param_groups
    assert {p for group in groups for p in group["params"]} == set(net.parameters())


def check_temperature(u, entropy, target):
    """log(alpha) descended alpha * (entropy - target), a number that leaves the actor alone."""
    assert u.info["losses/alpha"].item() == pytest.approx(0.3)
    assert u.info["diagnostics/entropy"].item() == pytest.approx(entropy.item())
    expected = 0.3 * (entropy.item() - target)
    assert u.after.log_alpha.grad.item() == pytest.approx(expected, rel=1e-9)
    assert (u.after.log_alpha < u.before.log_alpha).item() == (entropy.item() > target)
    (group,) = u.after.alpha_optimizer.param_groups
    assert group["params"] == [u.after.log_alpha]


@pytest.mark.parametrize("script", [crossq_sac, crossq_wn_highutd, sac_baseline])
def test_an_update_on_sac(script):
    """The critic's loss: r + gamma (1 - terminated) (min of BOTH critics - alpha log pi). CrossQ
    takes them from the joint pass, SAC from target networks, and CrossQ + WN from target networks
    in a joint pass. The gradient goes through (s', a') as part of the statistics. The actor's: alpha log pi - min of BOTH critics, which are not targets, in
    evaluation mode, and already updated."""
    changes = {"entropy_factor": 0.3} if script is crossq_wn_highutd else {}
    u = update(script, **changes)
    obs, action, _, _, next_obs = u.batch
    running, batch = (None, None) if script is sac_baseline else ("running", "batch")
    next_action, next_log_prob = sample(u.before, next_obs, u.drawn[0], running)
    if script is sac_baseline:
        q = forward(u.before.critic, torch.cat([obs, action], 1))[..., 0]
        next_q = forward(u.before.target_critic, torch.cat([next_obs, next_action], 1))[..., 0]
        online = forward(u.before.critic, torch.cat([next_obs, next_action], 1))[..., 0]
    else:
        q, online = joint(u.before.critic, u, next_action)
        target = getattr(u.before, "target_critic", u.before.critic)
        next_q = joint(target, u, next_action)[1]
    assert script is crossq_sac or (next_q - online).abs().mean() > 0.01
    check(u, "critic", bellman_loss(u, q, next_q - 0.3 * next_log_prob))
    assert u.info["diagnostics/q_mean"].item() == pytest.approx(q.mean().item())

    action, log_prob = sample(u.before, obs, u.drawn[1], batch)
    q = forward(u.after.critic, torch.cat([obs, action], 1), running)[..., 0]
    check(u, "actor", (0.3 * log_prob - lower(q)).mean())
    check_temperature(u, -log_prob.mean(), -0.3 * ACTIONS if changes else -ACTIONS)


def test_an_update_on_td3():
    """The joint pass with a smoothed a', where both clips act. The actor's: minus the minimum of
    BOTH critics."""
    u = update(crossq_td3, target_noise=0.4)
    obs, _, _, _, next_obs = u.batch
    smoothing = 0.4 * u.drawn[0]
    assert 0.05 < (smoothing.abs() > 0.5).double().mean() < 0.5
    free = torch.tanh(forward(u.before.actor, next_obs, "running")) + smoothing.clip(-0.5, 0.5)
    assert 0.02 < (free.abs() > 1).double().mean() < 0.7
    q, next_q = joint(u.before.critic, u, free.clip(-1, 1).detach())
    check(u, "critic", bellman_loss(u, q, next_q))
    action = torch.tanh(forward(u.before.actor, obs, "batch"))
    q = forward(u.after.critic, torch.cat([obs, action], 1), "running")[..., 0]
    check(u, "actor", -lower(q).mean())
    assert {name.split(".")[0] for name in u.after.state_dict()} == {"critic", "actor"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_policy_delay(script):
    """Actor and temperature move with every third update (SAC: every one)."""
    agent, delay = make_agent(script), 1 if script is sac_baseline else 3
    actor = {name for name in agent.state_dict() if name.startswith(("actor.", "log_alpha"))}
    for i in range(1, 7):
        before = copy_of(agent)
        agent.update(make_batch(i), torch.Generator())
        moved = {k for k, v in copy_of(agent).items() if not torch.equal(v, before[k])}
        assert "critic.weights.0" in moved and agent.n_updates == i
        assert moved & actor == (actor if i % delay == 0 else set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_acting(script):
    """SAC explores with its own standard deviation, TD3 with noise of std 0.1, clipped. The actor
    is in evaluation mode."""
    agent, obs = make_agent(script, updates=9), np.ones(OBS)
    norm = None if script is sac_baseline else "running"
    out = forward(agent.actor, torch.ones(1, OBS), norm).detach()[0]
    for seed, std in ((0, 0.1), (1, 100.0)):
        agent.actor.train()  # the mode an actor update leaves
        eps = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(seed))
        if script is crossq_td3:
            agent.args.exploration_noise = std
            expected, mean = (out.tanh() + std * eps).clip(-1, 1), out
        else:
            mean, log_std = out.chunk(2)
            expected = torch.tanh(mean + log_std.exp() * eps)
        assert np.allclose(agent.act(obs, torch.Generator().manual_seed(seed)), expected)
        assert np.allclose(agent.act(obs), mean.tanh(), atol=1e-12)


PAPER = """n_critics 2 actor_width 256 critic_width 2048 batch_size 256 buffer_size 1e6
    learning_starts 5000 gamma 0.99 utd 1 policy_delay 3 critic_lr 1e-3 actor_lr 1e-3 alpha_lr 1e-3
    alpha 1 adam_beta1 0.5 brn_warmup 1e5 action_repeat 1 eval_every 1e4 eval_episodes 5
    total_timesteps 1e6 exploration_noise 0.1 target_noise 0.2 target_noise_clip 0.5 tau 0.005
    weight_decay 0.01 entropy_factor 1 checkpoint_minutes 10"""
OWN = {
    crossq_sac: "",
    crossq_td3: "",
    sac_baseline: "critic_width 256 adam_beta1 0.9 policy_delay 1",
    crossq_wn_highutd: "critic_width 512 critic_lr 1e-4 actor_lr 1e-4 alpha_lr 1e-4 alpha 0.01 utd 5",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings(script):
    """The papers' tables: every hyper-parameter, and what reaches the optimisers."""
    args = vars(script.Args())
    numbers = {k: v for k, v in args.items() if type(v) in (int, float) and k != "seed"}
    words = f"{PAPER} {OWN[script]}".split()
    wanted = dict(zip(words[::2], map(float, words[1::2])))
    assert numbers == {k: v for k, v in wanted.items() if k in args} and len(numbers) > 18
    assert args["compile"] and not args["bf16"] and not args["track"]
    agent = script.Agent(OBS, ACTIONS, script.Args(critic_width=8, actor_width=8))
    if "brn_warmup" in args:
        assert {norm.warmup for norm in [*agent.critic.norms, *agent.actor.norms]} == {100_000}
    beta = args.get("adam_beta1", 0.9)
    for name in ("critic", "actor", *(["alpha"] if script is not crossq_td3 else [])):
        optimizer = getattr(agent, f"{name}_optimizer")
        for group in optimizer.param_groups:
            assert group["lr"] == args[f"{name}_lr"] and group["eps"] == 1e-8
            assert group["betas"] == (0.9 if name == "alpha" else beta, 0.999)
            assert not group["weight_decay"] or script is crossq_wn_highutd
    if script is not crossq_td3:
        assert agent.log_alpha.exp().item() == pytest.approx(args["alpha"])


# ------------------------------------------------------------------------------ target networks


@pytest.mark.parametrize("script", [sac_baseline, crossq_wn_highutd])
@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_target_network_follows_every_critic_update_by_tau(script, tau):
    """It starts as the critic, gets no gradient, and shares no memory. With tau 1 it is a
    copy. Projected weights are averaged, so their norm falls below 1."""
    agent = make_agent(script, tau=tau)
    expected = {name: p.detach().clone() for name, p in agent.critic.named_parameters()}
    target = dict(agent.target_critic.named_parameters())
    assert same(expected, target)
    for i in range(5):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        for name, p in agent.critic.named_parameters():
            expected[name] = (1 - tau) * expected[name] + tau * p.detach()
            assert torch.allclose(target[name], expected[name], rtol=1e-9, atol=1e-12)
            assert target[name].grad is None and target[name].data_ptr() != p.data_ptr()
    if script is crossq_wn_highutd:
        assert (neuron_norms(agent.target_critic, 0).min() < 1 - 1e-4) == (tau < 1)


# ------------------------------------------------------------------------------ CrossQ + WN

OUTPUT = ["weights.2", "biases.2"]


def neuron_norms(net, layer):
    """L2 norm of every neuron's vector of a dense layer: its column of W, and its b."""
    w, b = net.weights[layer].detach(), net.biases[layer].detach()
    return torch.cat([w, b], -2).square().sum(-2).sqrt()


def test_unit_norm_at_initialisation_and_after_every_update():
    """Bias included, actor and critic. The output layer moves freely. Each neuron is scaled, and
    nothing else."""
    agent = make_agent(crossq_wn_highutd, policy_delay=2)
    for i in range(6):
        for net in (agent.critic, agent.actor):
            for norms in (neuron_norms(net, 0), neuron_norms(net, 1)):
                assert norms.numel() in (2 * 16, 16)
                assert torch.allclose(norms, torch.ones_like(norms), atol=1e-12)
            assert i < 2 or (neuron_norms(net, 2) - 1).abs().max() > 1e-3
        # So it is no matter of W alone.
        assert (agent.critic.biases[0].abs().max() > 1e-4) == (i > 0)
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
    factors = torch.rand(2, 1, 16) + 0.5
    before = copy_of(agent.critic)
    with torch.no_grad():
        for layer in (0, 1):
            agent.critic.weights[layer].mul_(factors)
            agent.critic.biases[layer].mul_(factors)
    agent.critic.project()
    assert all(torch.allclose(p, before[k]) for k, p in agent.critic.state_dict().items())


@pytest.mark.parametrize("name", ["critic", "actor"])
def test_weight_decay_is_decoupled_and_of_the_output_layer(name):
    """A step with gradients of zero multiplies the output layer by 1 - lr decay, nothing else. The
    temperature does not decay."""
    agent = make_agent(crossq_wn_highutd, updates=3, weight_decay=0.5)
    net, optimizer = getattr(agent, name), getattr(agent, f"{name}_optimizer")
    before = copy_of(net)
    optimizer.state.clear()  # the moments of earlier updates
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for part, p in net.named_parameters():
        assert torch.allclose(p, before[part] * (1 - 0.01 * 0.5 * (part in OUTPUT)), rtol=1e-12)
        assert torch.equal(p, before[part]) == (part not in OUTPUT)
    assert agent.alpha_optimizer.param_groups[0]["weight_decay"] == 0
