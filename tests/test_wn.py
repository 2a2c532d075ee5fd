"""What is particular to crossq_wn_highutd.py, against formulas written down here a second time."""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_variants import (  # noqa: F401
    ACTIONS,
    BATCH,
    GAMMA,
    OBS,
    assert_gradients,
    both_are_lowest_somewhere,
    copy_of,
    forward,
    make_agent,
    make_batch,
    noise,
    run_loop,
    same,
)

import crossq_wn_highutd as wn

HIDDEN = ["weights.0", "weights.1", "biases.0", "biases.1"]
OUTPUT = ["weights.2", "biases.2"]


def neuron_norms(net, layer):
    """L2 norm of every neuron's vector of a dense layer: its column of W, and its b."""
    w, b = net.weights[layer].detach(), net.biases[layer].detach()
    return torch.cat([w, b], -2).square().sum(-2).sqrt()


# ------------------------------------------------------------------------------- batch norm


def test_batch_norm_is_pytorchs():
    """Forward, gradients and running statistics, with the biased variance; then in evaluation."""
    torch.manual_seed(0)
    ours = wn.BatchNorm((1, 7)).double()
    theirs = torch.nn.BatchNorm1d(7, eps=1e-3, momentum=0.01).double()
    with torch.no_grad():
        for a, b in ((ours.scale, theirs.weight), (ours.bias, theirs.bias)):
            a.copy_(torch.randn(7).double())
            b.copy_(a[0])
    variance = torch.ones(7).double()
    for i in range(6):
        x = (torch.randn(32, 7) * (1 + i) + i).double()
        weights = torch.randn(32, 7).double()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.allclose(ours(a), theirs(b), atol=1e-12)
        expected = torch.autograd.grad((theirs(b) * weights).sum(), [b, theirs.weight, theirs.bias])
        theirs.running_mean.lerp_(x.mean(0), -1 / 99)  # undo the second forward's
        gradients = torch.autograd.grad((ours(a) * weights).sum(), [a, ours.scale, ours.bias])
        for g, e in zip(gradients, expected):
            assert torch.allclose(g.reshape(e.shape), e, atol=1e-10)
        for _ in range(2):  # two forwards of ours
            variance = 0.99 * variance + 0.01 * x.var(0, correction=0)
    assert torch.allclose(ours.running_var[0], variance, atol=1e-12)
    x = torch.randn(5, 7).double()
    ours.eval()
    state = ours.running_mean, ours.running_var, ours.scale, ours.bias
    expected = F.batch_norm(x, *(tensor[0] for tensor in state), eps=1e-3)
    assert torch.allclose(ours(x), expected, atol=1e-12)


def test_batch_norm_of_an_ensemble_is_one_batch_norm_each():
    torch.manual_seed(0)
    both = wn.BatchNorm((2, 1, 7))
    x = torch.randn(2, 32, 7) * torch.tensor([1.0, 5.0])[:, None, None]
    for k in (0, 1):
        one = wn.BatchNorm((1, 7))
        assert torch.allclose(both(x)[k], one(x[k]), atol=1e-6)


# ---------------------------------------------------------------------- weight normalisation


def test_unit_norm_at_initialisation_and_after_every_update():
    """Bias included, actor and critic; the output layer moves freely."""
    agent = make_agent(wn, policy_delay=2)
    for i in range(6):
        for net in (agent.critic, agent.actor):
            for layer in (0, 1):
                norms = neuron_norms(net, layer)
                assert norms.numel() in (2 * 16, 16)
                assert torch.allclose(norms, torch.ones_like(norms), atol=1e-12)
        # So it is no matter of W alone.
        assert (agent.critic.biases[0].abs().max() > 1e-4) == (i > 0)
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
    for net in (agent.critic, agent.actor):
        assert (neuron_norms(net, 2) - 1).abs().min() > 1e-3


def test_projection_scales_each_neuron_and_nothing_else():
    torch.manual_seed(0)
    net = wn.MLP(5, 8, 3, ensemble=(2,))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    before = copy_of(net)
    net.project()
    for name, p in net.named_parameters():
        if name in HIDDEN:
            k = int(name[-1])
            w, b = before[f"weights.{k}"], before[f"biases.{k}"]
            for j, m in ((0, 3), (1, 7)):  # some neurons, by hand
                norm = math.sqrt(sum(float(v) ** 2 for v in [*w[j, :, m], b[j, 0, m]]))
                assert torch.allclose(p[j, :, m], before[name][j, :, m] / norm)
        else:
            assert torch.equal(p, before[name])
    once = copy_of(net)
    net.project()
    for name, tensor in net.state_dict().items():
        assert torch.allclose(once[name], tensor, atol=1e-6)


@pytest.fixture
def no_epsilon(monkeypatch):
    """Scale invariance is exact only without batch norm's epsilon."""
    monkeypatch.setattr(wn.BatchNorm, "eps", 0.0)


@pytest.mark.parametrize("layer", [0, 1])
def test_scale_invariance_and_its_gradient(no_epsilon, layer):
    """Theorems 4.1 and 4.2: c W and c b give the same outputs, and 1 / c of the gradients."""
    net = make_agent(wn, updates=3).critic.train()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, OBS + ACTIONS, generator=generator).double()
    weights = torch.randn(2, BATCH, 1, generator=generator).double()

    def outputs_and_gradients():
        q = net(x)
        parameters = [net.weights[layer], net.biases[layer], net.weights[2]]
        return q.detach(), torch.autograd.grad((q * weights).sum(), parameters)

    q, gradients = outputs_and_gradients()
    c = 0.3 + 4 * torch.rand(2, 1, 16, generator=generator).double()  # one per neuron
    with torch.no_grad():
        net.weights[layer] *= c
        net.biases[layer] *= c
    scaled_q, scaled_gradients = outputs_and_gradients()
    assert torch.allclose(q, scaled_q, rtol=1e-9) and q.std() > 0.1
    for g, scaled in zip(gradients[:2], scaled_gradients):
        assert torch.allclose(g / c, scaled, rtol=1e-6, atol=1e-10) and g.abs().max() > 1e-4
    assert torch.allclose(gradients[2], scaled_gradients[2], rtol=1e-7)


def test_projection_leaves_the_outputs_of_batch_norm_networks(no_epsilon):
    """So in evaluation too, once the running statistics are those of the projected weights."""
    agent = make_agent(wn)
    net, x = agent.critic.train(), torch.randn(BATCH, OBS + ACTIONS).double()
    with torch.no_grad():
        for p in (*net.weights, *net.biases):
            p.normal_()
        q = net(x)
        net.project()
        assert torch.allclose(net(x), q, rtol=1e-9)


# ---------------------------------------------------------------------------------- optimiser


def test_decay_groups_hold_exactly_the_output_layer():
    agent = make_agent(wn, weight_decay=0.03)
    names = {id(p): name for name, p in agent.named_parameters()}
    for net in ("critic", "actor"):
        optimizer = agent.optimizers[net]
        groups = [
            ({names[id(p)] for p in group["params"]}, group["weight_decay"])
            for group in optimizer.param_groups
        ]
        rest = [f"norms.{k}.{part}" for k in range(3) for part in ("scale", "bias")]
        assert groups[0] == ({f"{net}.{name}" for name in OUTPUT}, 0.03)
        assert groups[1] == ({f"{net}.{name}" for name in [*HIDDEN, *rest]}, 0.0)
        assert groups[2:] == []
        assert isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8


def test_the_temperature_does_not_decay():
    agent = make_agent(wn, weight_decay=0.03)
    (group,) = agent.optimizers["alpha"].param_groups
    assert group["params"] == [agent.log_alpha] and group["weight_decay"] == 0


@pytest.mark.parametrize("name", ["critic", "actor"])
def test_weight_decay_is_decoupled_and_of_the_output_layer(name):
    """A step with gradients of zero multiplies the output layer by 1 - lr decay, nothing else."""
    agent = make_agent(wn, updates=3, weight_decay=0.5)
    net, optimizer = getattr(agent, name), agent.optimizers[name]
    before = copy_of(net)
    optimizer.state.clear()  # the moments of earlier updates
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for part, p in net.named_parameters():
        expected = before[part] * (1 - 0.01 * 0.5 * (part in OUTPUT))
        assert torch.allclose(p, expected, rtol=1e-12, atol=0), part
        assert torch.equal(p, before[part]) == (part not in OUTPUT)


def test_temperature():
    """alpha_0 = 0.01, target entropy -dim(A) or as the flag says, its own rate."""
    agent = make_agent(wn, alpha_lr=0.02)
    assert agent.log_alpha.exp().item() == pytest.approx(0.01) and agent.target_entropy == -ACTIONS
    assert agent.optimizers["alpha"].param_groups[0]["lr"] == 0.02
    assert make_agent(wn, entropy_factor=0.5).target_entropy == -ACTIONS / 2


# ----------------------------------------------------------------------------- the two losses


def squashed(out, eps):
    mean, log_std = out.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * eps
    normal = torch.distributions.Normal(mean, log_std.exp())
    return u.tanh(), (normal.log_prob(u) - torch.log(1 - u.tanh().square())).sum(-1)


def test_critic_loss():
    """Both networks use the joint batch's own statistics; the target's weights are older."""
    agent, batch = make_agent(wn, updates=6, tau=0.1), make_batch(50)
    obs, action, reward, done, next_obs = batch
    next_action, log_prob = squashed(forward(agent.actor, next_obs, "running"), noise())
    next_pairs = torch.cat([next_obs, next_action.detach()], -1)
    pairs = torch.cat([torch.cat([obs, action], -1), next_pairs])
    next_q = forward(agent.target_critic, pairs, "batch")[..., 0][:, BATCH:]
    q = forward(agent.critic, pairs, "batch")[..., 0][:, :BATCH]
    assert (next_q - forward(agent.critic, pairs, "batch")[..., 0][:, BATCH:]).abs().max() > 1e-3
    assert both_are_lowest_somewhere(next_q)
    value = next_q.min(0).values - agent.log_alpha.exp() * log_prob
    expected = 0.5 * (q - (reward + GAMMA * (1 - done) * value).detach()).square().mean(-1).sum()
    loss, _ = agent.critic_loss(batch, {"noise": noise()})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    inputs = batch, {"noise": noise()}
    assert_gradients(agent, "critic", agent.critic_loss, inputs, expected, {"critic"})


def test_actor_loss():
    """The actor in training mode on s alone, the critic in evaluation mode; the temperature's."""
    agent, (obs, *_) = make_agent(wn, updates=6, entropy_factor=0.3, alpha=1.0), make_batch(50)
    action, log_prob = squashed(forward(agent.actor, obs, "batch"), noise())
    q = forward(agent.critic, torch.cat([obs, action], -1), "running")[..., 0]
    assert both_are_lowest_somewhere(q)
    alpha = agent.log_alpha.exp()
    expected = (alpha.detach() * log_prob - q.min(0).values).mean()
    statistics = copy_of(agent.critic)
    inputs = [obs], {"noise": noise()}
    assert_gradients(agent, "actor", agent.actor_loss, inputs, expected, {"actor"})
    assert same(statistics, copy_of(agent.critic))
    entropy = -log_prob.mean().detach()
    expected = alpha * (entropy + 0.3 * ACTIONS)
    assert_gradients(agent, "alpha", agent.alpha_loss, [entropy], expected, {"log_alpha"})


# -------------------------------------------------------------------------------- target network


def test_target_networks_running_statistics_never_move_and_never_matter():
    """They are 0 and 1 for ever, while the critic's move; wrong ones change no update."""
    agent, other = make_agent(wn, updates=2), make_agent(wn, updates=2)
    assert [norm.track_running_stats for norm in agent.critic.norms] == [True] * 3
    assert [norm.track_running_stats for norm in agent.target_critic.norms] == [False] * 3
    for buffer in other.target_critic.buffers():
        buffer.fill_(7.0)
    for i in range(4):
        before = copy_of(agent.critic)
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        other.update(make_batch(i), torch.Generator().manual_seed(i))
        buffers = dict(agent.target_critic.named_buffers())
        assert len(buffers) == 6
        for name, buffer in buffers.items():
            assert torch.equal(buffer, torch.full_like(buffer, "var" in name))
            assert not torch.equal(agent.critic.get_buffer(name), before[name])
    assert same(copy_of(agent.critic), copy_of(other.critic))
    assert same(copy_of(agent.actor), copy_of(other.actor))


def test_target_network_follows_with_tau_and_is_not_projected():
    """It starts as the critic, and takes up each update's projected weights, scales and biases."""
    agent = make_agent(wn, tau=0.25)
    expected = {name: p.detach().clone() for name, p in agent.critic.named_parameters()}
    for i in range(5):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        for name, p in agent.critic.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach()
        for name, p in agent.target_critic.named_parameters():
            assert torch.allclose(p, expected[name], rtol=1e-9, atol=1e-12) and name in expected
    assert neuron_norms(agent.target_critic, 0).min() < 1 - 1e-4


def test_tau_1_is_no_target_network():
    """The target's forward is then the critic's own: one joint pass, as CrossQ."""
    agent, batch = make_agent(wn, updates=3, tau=1), make_batch(9)
    obs, action, reward, done, next_obs = batch
    next_action, log_prob = squashed(forward(agent.actor, next_obs, "running"), noise())
    pairs = torch.cat([torch.cat([obs, action], -1), torch.cat([next_obs, next_action], -1)])
    q, next_q = forward(agent.critic, pairs, "batch")[..., 0].chunk(2, -1)
    target = reward + GAMMA * (1 - done) * (next_q.min(0).values - agent.log_alpha.exp() * log_prob)
    expected = 0.5 * (q - target).square().mean(-1).sum()
    loss, _ = agent.critic_loss(batch, {"noise": noise()})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


# --------------------------------------------------------------------------------------- loop


def test_utd_5_is_five_critic_updates_and_the_policy_delay_counts_them(run_loop):  # noqa: F811
    # Seven agent steps learn.
    flags = "--env-id tiny_envs:Truncated-v0 --learning-starts 10 --total-timesteps 17"
    agent = run_loop(wn, flags)["agent"]
    assert agent.n_updates == 35
    steps = {}
    for name, optimizer in agent.optimizers.items():
        (steps[name],) = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {"critic": 35, "actor": 11, "alpha": 11}


def test_action_repeat_counts_environment_steps(run_loop):  # noqa: F811
    """Rewards are summed; a repeat stops at the episode's end, and counts whole all the same."""
    flags = "--env-id tiny_envs:Truncated-v0 --action-repeat 4 --total-timesteps 24"
    buffer = run_loop(wn, f"{flags} --learning-starts 100")["buffer"]
    obs, action, reward, done, next_obs = buffer.rows[: buffer.size].split(buffer.widths, -1)
    # Episodes of 10 steps, cut by time.
    assert reward[:, 0].tolist() == [4, 4, 2, 4, 4, 2] and done.sum() == 0
    assert next_obs[2, 0] == 1 and obs[3, 0] == 0 and np.allclose(next_obs[:2, 0], [0.4, 0.8])


def test_compiled_updates_are_the_plain_ones():
    agents = [make_agent(wn).float() for _ in range(2)]
    wn.compile_updates(agents[1])
    for i in range(4):
        for agent in agents:
            agent.update([x.float() for x in make_batch(i)], torch.Generator().manual_seed(i))
    plain, compiled = (copy_of(agent) for agent in agents)
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], rtol=1e-3, atol=1e-4), name


# -------------------------------------------------------------------------------------- ablations


@pytest.fixture
def ablated(monkeypatch):
    """ablated(**changes): an agent of crossq_wn_highutd.py through benchmark/ablate.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import ablate
    import probe

    parts = types.SimpleNamespace(**ablate.ablate_weights(probe.load("crossq_wn_highutd.py")))
    return lambda updates=0, **changes: make_agent(parts, updates, **changes)


def decayed(agent):
    names = {id(p): name for name, p in agent.named_parameters()}
    groups = [group for optimizer in agent.optimizers.values() for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == 2 * 12 + 1
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def both(names):
    return {f"{net}.{name}" for net in ("critic", "actor") for name in names}


def test_weight_norm_ablations(ablated):
    unit = {}
    for mode in ("project", "soft", "none", "output"):
        agent = ablated(updates=4, weight_norm=mode, policy_delay=1)
        norms = [neuron_norms(agent.critic, k) for k in range(3)]
        unit[mode] = [bool((norm - 1).abs().max() < 1e-9) for norm in norms]
        assert decayed(agent) == both([*OUTPUT, *HIDDEN] if mode == "soft" else OUTPUT)
    assert unit == {
        "project": [True, True, False],
        "soft": [False] * 3,
        "none": [False] * 3,
        "output": [True, True, False],
    }
    agent = ablated(updates=4, weight_norm="output", policy_delay=1)
    for net in (agent.critic, agent.actor):  # the output layer without its bias
        norms = net.weights[2].norm(dim=-2)
        assert torch.allclose(norms, torch.ones_like(norms))
    plain = make_agent(wn, updates=4, policy_delay=1)
    assert same(copy_of(plain), copy_of(ablated(updates=4, policy_delay=1)))


def test_decay_of_batch_norm(ablated):
    norms = [f"norms.{k}.{part}" for k in range(3) for part in ("scale", "bias")]
    assert decayed(ablated(decay_norms=True)) == both([*OUTPUT, *norms])


def test_linear_decay_of_the_learning_rates(ablated):
    """In each optimiser's own steps over the run's critic updates, 2 * (120 / 2 - 20) = 80.

    So the critic ends at `lr_end`, the others, with a delay of 2, half way there. In a longer run
    no rate falls below `lr_end`.
    """
    length = {"total_timesteps": 120, "action_repeat": 2, "utd": 2, "learning_starts": 20}
    agent = ablated(lr_end=0.1, alpha_lr=0.04, policy_delay=2, **length)
    rates = []
    for i in range(200):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        rates.append([o.param_groups[-1]["lr"] for o in agent.optimizers.values()])
    critic, actor, alpha = np.array(rates).T / [[0.01], [0.01], [0.04]]
    assert np.allclose(critic[:80], 1 - 0.9 * np.arange(80) / 80)
    assert np.allclose(critic[80:], 0.1)
    assert np.allclose(actor[1:160:2], 1 - 0.9 * np.arange(80) / 80)
    assert np.allclose(actor[161:], 0.1) and np.allclose(actor, alpha)
