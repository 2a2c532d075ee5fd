"""The algorithm: batch renormalisation, joint pass, updates, replay buffer and time limits."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import crossq_sac
import crossq_td3
import crossq_wn_highutd
import sac_baseline
from crossq_sac import Agent, Args, BatchRenorm, ReplayBuffer

OBS, ACTIONS, BATCH = 5, 2, 16


def make_agent(**changes) -> Agent:
    torch.manual_seed(0)
    small = {"critic_width": 16, "actor_width": 16, "batch_size": BATCH, "compile": "off"}
    return Agent(OBS, ACTIONS, Args(**small | changes))


def make_batch(seed=0, done=0.0):
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, BATCH, OBS, generator=g)
    action = torch.rand(BATCH, ACTIONS, generator=g) * 2 - 1
    return [obs, action, torch.randn(BATCH, generator=g), torch.full((BATCH,), done), next_obs]


def noise(seed=1):
    return torch.randn(BATCH, ACTIONS, generator=torch.Generator().manual_seed(seed))


def critic_step(agent, batch, eps):
    return agent.descend("critic", agent.critic_loss, batch, {"noise": eps})


def actor_step(agent, obs, eps):
    info = agent.descend("actor", agent.actor_loss, [obs], {"noise": eps})
    return info | agent.descend("alpha", agent.alpha_loss, info["diagnostics/entropy"])


def q_values(agent, obs, action):
    """[n_critics, B], in the mode that the critic is in."""
    return agent.critic(torch.cat([obs, action], -1)).squeeze(-1)


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.named_buffers()}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------ batch renorm


def ioffe(x, mean, var, warm, r_max=3.0, d_max=5.0, eps=1e-3):
    """Ioffe 2017 in numpy: the output, and g -> the gradient of sum(output * g)."""
    mu, sigma = x.mean(0), np.sqrt(x.var(0) + eps)
    running = np.sqrt(var + eps)
    r, d = np.ones_like(mu), np.zeros_like(mu)
    if warm:
        r = np.clip(sigma / running, 1 / r_max, r_max)
        d = np.clip((mu - mean) / running, -d_max, d_max)
    normal = (x - mu) / sigma

    def gradient(g):
        g = g * r  # then the well-known backward pass of batch norm
        return (g - g.mean(0) - normal * (g * normal).mean(0)) / sigma

    return normal * r + d, gradient


@pytest.mark.parametrize("warm", [False, True])
def test_batch_renorm_is_ioffes(warm):
    """In float64, with a constant feature, one of tiny variance, and clipped r and d."""
    rng = np.random.default_rng(0)
    scales, shifts = [1.0, 0.0, 1e-4, 50.0, 1.0, 2.0], [0.0, 3.0, 1.0, 0.0, 100.0, -1.0]
    x = rng.normal(size=(32, 6)) * scales + shifts
    layer = BatchRenorm((1, 6), warmup=0 if warm else 100).double()
    mean, var = rng.normal(size=6), rng.uniform(0.5, 2.0, size=6)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor(mean))
        layer.running_var.copy_(torch.tensor(var))
    tensor, g = torch.tensor(x, requires_grad=True), rng.normal(size=x.shape)
    out = layer(tensor)
    expected, gradient = ioffe(x, mean, var, warm)
    assert np.allclose(out.detach(), expected, atol=1e-10)
    out.backward(torch.tensor(g))
    assert np.allclose(tensor.grad, gradient(g), atol=1e-9)
    if warm:  # the data was chosen so that both clips act
        assert (np.sqrt(x.var(0) + 1e-3) / np.sqrt(var + 1e-3)).max() > 3
        assert layer.r.max() == 3 and layer.d.max() == 5
    assert np.allclose(layer.running_mean, 0.99 * mean + 0.01 * x.mean(0))
    assert np.allclose(layer.running_var, 0.99 * var + 0.01 * x.var(0))  # biased


def test_batch_renorm_is_batch_norm_in_the_warm_up():
    """The output and the running mean of torch's, whose running variance is unbiased."""
    x = torch.randn(20, 3)
    ours, theirs = BatchRenorm((1, 3), 100), nn.BatchNorm1d(3, eps=1e-3, momentum=0.01)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours.running_mean[0], theirs.running_mean)


def test_training_output_is_eval_output_after_the_warm_up():
    """Unclipped, r and d turn the batch's statistics into the old running ones, exactly."""
    layer = BatchRenorm((1, 4), warmup=0)
    with torch.no_grad():
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 1.5)
    x = torch.randn(64, 4) * torch.tensor([1.0, 1.0, 0.7, 1.2])
    before = layer.eval()(x)
    assert torch.allclose(layer.train()(x), before, atol=1e-5)
    # Only now have the statistics moved.
    assert not torch.allclose(layer.eval()(x), before, atol=1e-5)


def test_warm_up_ends_after_exactly_so_many_training_forwards():
    """With a warm-up of 3, forwards 1 to 3 are batch norm, the fourth is not. Eval is no forward."""
    layer = BatchRenorm((1, 2), warmup=3)
    for forward in range(1, 6):
        x = torch.randn(8, 2) + 5
        layer.eval()(x)
        layer.train()(x)
        assert bool((layer.r == 1).all() and (layer.d == 0).all()) == (forward <= 3)
        assert layer.steps == forward
    plain = BatchRenorm((1, 2), warmup=math.inf)
    plain(torch.randn(8, 2))
    assert (plain.r == 1).all() and (plain.d == 0).all()


def test_in_the_warm_up_r_is_one_and_d_is_zero_whatever_the_batch():
    """They are chosen, not blended: 0 times an r or d that is NaN would be NaN."""
    layer = BatchRenorm((1, 3), warmup=2)
    layer(torch.tensor([[1e30, math.inf, math.nan], [1.0, 2.0, 3.0]]))
    assert layer.r.tolist() == [[1.0] * 3] and layer.d.tolist() == [[0.0] * 3]


@pytest.mark.parametrize("script", [crossq_sac, crossq_td3], ids=["sac", "td3"])
def test_every_layer_has_the_warm_up_of_the_flag(script):
    for flags, warmup in (({}, 100_000), ({"brn_warmup": 7}, 7)):
        agent = script.Agent(OBS, ACTIONS, script.Args(critic_width=16, **flags))
        norms = [*agent.critic.norms, *agent.actor.norms]
        assert [norm.warmup for norm in norms] == [warmup] * 6


def test_batch_renorm_state_survives_a_checkpoint():
    layer, other = BatchRenorm((2, 1, 3), warmup=1), BatchRenorm((2, 1, 3), warmup=1)
    for _ in range(3):
        layer(torch.randn(2, 8, 3))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 3)
    assert other.steps == 3
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_an_ensemble_is_as_many_separate_layers():
    """Each critic has its own statistics; a shared input [B, F] is normalised for each."""
    both = BatchRenorm((2, 1, 3), warmup=0)
    singles = [BatchRenorm((1, 3), warmup=0) for _ in range(2)]
    x = torch.randn(2, 8, 3) * torch.tensor([1.0, 2.0])[:, None, None]
    for _ in range(3):
        expected = torch.stack([layer(part) for layer, part in zip(singles, x)])
        assert torch.allclose(both(x), expected, atol=1e-6)
    assert torch.allclose(both.running_var, torch.stack([layer.running_var for layer in singles]))
    assert BatchRenorm((2, 1, 3), warmup=0)(x[0]).shape == (2, 8, 3)


# ------------------------------------------------------------------------------- the updates


@pytest.mark.parametrize("warmup", [100_000, 0])
def test_critic_gradient_is_that_of_one_joint_pass_with_a_constant_target(warmup):
    """Against the paper's figure 2 written down again, as batch norm and as batch renorm; a pass of
    its own for s' gives another gradient."""
    agent, batch = make_agent(brn_warmup=warmup), make_batch(done=0.25)
    for i in range(3):
        critic_step(agent, make_batch(i), noise())
    obs, action, reward, done, next_obs = batch
    agent.actor.eval(), agent.critic.train()
    with torch.no_grad():
        next_action, log_prob = agent.policy(next_obs, noise())
    before = {k: v.clone() for k, v in agent.critic.state_dict().items()}

    def gradient(joint, detach):
        agent.critic.load_state_dict(before)
        if joint:
            out = q_values(agent, torch.cat([obs, next_obs]), torch.cat([action, next_action]))
            q, next_q = out[:, :BATCH], out[:, BATCH:]
        else:
            q, next_q = q_values(agent, obs, action), q_values(agent, next_obs, next_action)
        value = torch.minimum(next_q[0], next_q[1]) - agent.log_alpha.exp().detach() * log_prob
        target = reward + 0.99 * (1 - done) * value
        target = target.detach() if detach else target
        loss = sum(0.5 * nn.functional.mse_loss(one, target) for one in q)
        return loss.item(), torch.autograd.grad(loss, list(agent.critic.parameters()))

    joint_loss, joint = gradient(True, True)
    separate = gradient(False, True)[1]
    through = gradient(True, False)[1]
    agent.critic.load_state_dict(before)
    parameters, draws = list(agent.critic.parameters()), {"noise": noise()}
    ours, info = agent.gradients(agent.critic_loss, parameters, batch, draws)
    assert info["losses/critic"].item() == pytest.approx(joint_loss, rel=1e-5)
    assert agent.critic.norms[0].d.any() == (warmup == 0)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, joint))
    assert not all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(ours, separate))
    assert not all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(ours, through))


def test_statistics_move_in_their_own_update_only_and_by_one_step():
    """The critic's in critic updates, the actor's in actor updates; acting moves none."""
    agent, batch = make_agent(), make_batch()
    actor, critic = statistics(agent.actor), statistics(agent.critic)
    critic_step(agent, batch, noise())
    assert same(actor, statistics(agent.actor)) and not same(critic, statistics(agent.critic))
    assert all(v == 1 for k, v in statistics(agent.critic).items() if k.endswith("steps"))
    mean = agent.critic.norms[0].running_mean[0, 0, :OBS]
    both = torch.cat([batch[0], batch[4]])
    assert torch.allclose(mean, 0.01 * both.mean(0), atol=1e-6)  # of s and s' together
    critic = statistics(agent.critic)
    actor_step(agent, batch[0], noise())
    assert same(critic, statistics(agent.critic)) and not same(actor, statistics(agent.actor))
    mean = agent.actor.norms[0].running_mean[0]
    assert torch.allclose(mean, 0.01 * batch[0].mean(0), atol=1e-6)  # of s alone
    actor = statistics(agent.actor)
    agent.act(np.zeros(OBS, np.float32), torch.Generator())
    assert same(actor, statistics(agent.actor))


def test_evaluation_leaves_the_agent_alone_and_training_goes_on():
    """No statistic and no weight moves in evaluate(); the update after it is the one without it."""
    small = {"critic_width": 16, "actor_width": 16}
    args = Args(env_id="tiny_envs:Truncated-v0", eval_episodes=2, **small)
    torch.manual_seed(0)
    agents = [Agent(3, 2, args) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    batch = [
        torch.randn(BATCH, 3),
        torch.rand(BATCH, 2),
        torch.randn(BATCH),
        torch.zeros(BATCH),
        torch.randn(BATCH, 3),
    ]
    for step in range(4):
        before = {k: v.clone() for k, v in agents[0].state_dict().items()}
        crossq_sac.evaluate(agents[0], crossq_sac.make_env(args), step, None)
        assert same(before, agents[0].state_dict())
        for agent in agents:
            critic_step(agent, batch, noise())
            actor_step(agent, batch[0], noise())
        assert same(agents[0].state_dict(), agents[1].state_dict())
    assert agents[0].actor.norms[0].steps == 4


def test_the_actor_update_leaves_the_critics_weights_alone_and_uses_them_in_eval_mode():
    agent, batch = make_agent(), make_batch()
    for i in range(3):
        critic_step(agent, make_batch(i), noise())
    before = {k: v.clone() for k, v in agent.critic.state_dict().items()}
    actor = {k: v.clone() for k, v in agent.actor.state_dict().items()}
    gradients = [p.grad.clone() for p in agent.critic.parameters()]
    info = actor_step(agent, batch[0], noise())
    assert same(before, agent.critic.state_dict())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, agent.critic.parameters()))
    agent.actor.load_state_dict(actor)
    agent.actor.train(), agent.critic.eval()
    action, log_prob = agent.policy(batch[0], noise())
    q = q_values(agent, batch[0], action).min(0).values
    expected = (1.0 * log_prob - q).mean().item()  # alpha was 1
    assert info["losses/actor"].item() == pytest.approx(expected, rel=1e-4)


def test_actor_and_temperature_have_a_loss_each():
    """To the actor's, alpha is a constant; to the temperature's, the entropy is."""
    agent, batch = make_agent(alpha=0.5), make_batch()
    loss, info = agent.actor_loss(batch, {"noise": noise()})
    assert torch.autograd.grad(loss, agent.log_alpha, allow_unused=True) == (None,)
    parameters = list(agent.actor.parameters())
    _, detached = agent.gradients(agent.actor_loss, parameters, batch, {"noise": noise()})
    entropy = detached["diagnostics/entropy"]
    assert info["diagnostics/entropy"].requires_grad and not entropy.requires_grad
    loss, info = agent.alpha_loss(entropy)
    assert loss.item() == pytest.approx(0.5 * (entropy.item() + ACTIONS))
    assert info["diagnostics/alpha"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("wide", [True, False])
def test_temperature_follows_the_entropy(wide):
    """Down above -dim(A), up below; Adam's first step is lr; the gradient is alpha (H - target)."""
    agent = make_agent(alpha=0.5)
    with torch.no_grad():
        agent.actor.weights[2].zero_()
        agent.actor.biases[2][..., ACTIONS:] = 0.0 if wide else -10.0
    info = actor_step(agent, make_batch()[0], noise())
    assert (info["diagnostics/entropy"] > agent.target_entropy) == wide
    assert agent.target_entropy == -ACTIONS
    step = agent.log_alpha.item() - math.log(0.5)
    assert step == pytest.approx(-1e-3 if wide else 1e-3, rel=1e-3)
    expected = 0.5 * (info["diagnostics/entropy"].item() + ACTIONS)
    assert agent.log_alpha.grad.item() == pytest.approx(expected, rel=1e-4)
    assert agent.optimizers["alpha"].param_groups[0]["betas"] == (0.9, 0.999)
    fixed = make_agent(alpha=0.5, alpha_lr=0.0)
    actor_step(fixed, make_batch()[0], noise())
    assert fixed.log_alpha.item() == pytest.approx(math.log(0.5))


def test_every_third_update_moves_the_actor():
    agent, rng, moved = make_agent(), torch.Generator().manual_seed(0), []
    for update in range(1, 10):
        before = [p.clone() for p in agent.actor.parameters()]
        agent.update(make_batch(update), rng)
        if any(not torch.equal(a, b) for a, b in zip(before, agent.actor.parameters())):
            moved.append(update)
    assert moved == [3, 6, 9] and agent.n_updates == 9


def test_optimisers_have_the_papers_constants():
    agent = make_agent()
    for name in ("critic", "actor"):
        (group,) = agent.optimizers[name].param_groups
        constants = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        assert constants == (1e-3, (0.5, 0.999), 1e-8, 0)


def test_terminal_rows_have_the_reward_as_target():
    """done = 1: nothing of s' in the target."""
    agent = make_agent()
    obs, action, reward, done, next_obs = make_batch(done=1.0)
    before = {k: v.clone() for k, v in agent.critic.state_dict().items()}
    info = critic_step(agent, [obs, action, reward, done, next_obs], noise())
    agent.critic.load_state_dict(before)
    with torch.no_grad():
        next_action, _ = agent.policy(next_obs, noise())
        q = q_values(agent, torch.cat([obs, next_obs]), torch.cat([action, next_action]))[:, :BATCH]
    expected = 0.5 * (q - reward).square().mean(1).sum().item()
    assert info["losses/critic"].item() == pytest.approx(expected, rel=1e-5)
    assert info["diagnostics/q_mean"].item() == pytest.approx(q.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("script", "tied"), [
    (crossq_sac, True),
    (crossq_td3, True),
    (crossq_wn_highutd, True),
    (sac_baseline, False),
])  # fmt: skip
def test_the_joint_pass_ties_the_gradient_to_the_next_pairs(script, tied):
    """With gamma 0 the target is the reward alone, yet s' and a' move q's gradient: they are in the
    batch's statistics. In SAC, without batch norm, they do not."""
    torch.manual_seed(0)
    args = script.Args(critic_width=16, actor_width=16, gamma=0.0)
    agent = script.Agent(OBS, ACTIONS, args)
    obs, action, reward, done, next_obs = make_batch()

    def gradients(next_obs, eps):
        batch, parameters = (obs, action, reward, done, next_obs), list(agent.critic.parameters())
        found, _ = agent.gradients(agent.critic_loss, parameters, batch, {"noise": eps})
        return torch.cat([gradient.flatten() for gradient in found])

    unchanged = gradients(next_obs, noise())
    assert torch.equal(gradients(next_obs, noise()), unchanged)
    for other in (gradients(next_obs + 3, noise()), gradients(next_obs, noise(2))):
        change = (other - unchanged).abs().max()
        assert change > 1e-3 if tied else change == 0


# ------------------------------------------------------------------------------ the networks


def test_log_prob_is_that_of_a_squashed_gaussian():
    """Against torch.distributions in float64; finite where the action is 1 to the last bit."""
    agent = make_agent().double()
    obs = torch.randn(BATCH, OBS).double()
    agent.actor.eval()
    for scale in (1.0, 3.0):
        eps = noise().double() * scale
        action, log_prob = agent.policy(obs, eps)
        mean, log_std = agent.actor(obs).chunk(2, -1)
        base = torch.distributions.Normal(mean, log_std.exp())
        tanh = torch.distributions.TanhTransform(cache_size=1)
        squashed = torch.distributions.TransformedDistribution(base, [tanh])
        expected = squashed.log_prob(tanh(mean + log_std.exp() * eps)).sum(-1)
        assert torch.allclose(log_prob, expected, atol=1e-8) and (action.abs() <= 1).all()
    with torch.no_grad():
        agent.actor.weights[2].zero_()
        agent.actor.biases[2][..., :ACTIONS] = 20.0
        agent.actor.biases[2][..., ACTIONS:] = 0.0
    action, log_prob = agent.float().policy(obs.float(), torch.zeros(BATCH, ACTIONS))
    expected = ACTIONS * (-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 20.0))
    assert (action == 1).all() and log_prob[0].item() == pytest.approx(expected, rel=1e-5)


def test_log_std_is_clipped_and_not_rescaled():
    """An untrained actor explores: sigma is near 1, and the bounds are -20 and 2."""
    agent = make_agent()
    log_std = agent.actor.eval()(torch.randn(100, OBS))[:, ACTIONS:]
    assert -2 < log_std.mean() < 2
    with torch.no_grad():
        agent.actor.weights[2].zero_()
        agent.actor.biases[2][..., ACTIONS:] = torch.tensor([-100.0, 100.0])
    action, _ = agent.policy(torch.zeros(1, OBS), torch.tensor([[1.0, 0.1]]))
    assert action.atanh()[0].tolist() == pytest.approx([math.exp(-20), 0.1 * math.exp(2)], rel=1e-4)


def test_initialisation_is_lecun_normal():
    torch.manual_seed(0)
    mlp = crossq_sac.MLP(400, 300, 1, 100_000, ensemble=(2,))
    for weight, bias, n in zip(mlp.weights, mlp.biases, (400, 300, 300)):
        assert weight.std().item() == pytest.approx(n**-0.5, rel=0.06)
        assert weight.abs().max() <= 2 * n**-0.5 / 0.8796 + 1e-6 and (bias == 0).all()
        assert not torch.equal(weight[0], weight[1])


def test_network_is_norm_dense_relu_norm_dense_relu_norm_dense():
    """The input is normalised too; every critic has weights and statistics of its own."""
    agent = make_agent()
    x, mlp = torch.randn(BATCH, OBS + ACTIONS) * 3 + 1, agent.critic.train()
    for critic in range(2):
        h = x
        for k in range(3):
            h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-3).sqrt()
            h = h @ mlp.weights[k][critic] + mlp.biases[k][critic]
            h = h.relu() if k < 2 else h
        assert torch.allclose(mlp(x)[critic], h, atol=1e-5)
    assert mlp.norms[0].scale.shape == (2, 1, OBS + ACTIONS)


@pytest.mark.parametrize("n", [1, 3])
def test_number_of_critics(n):
    agent = make_agent(n_critics=n)
    agent.update(make_batch(), torch.Generator().manual_seed(0))
    assert q_values(agent, *make_batch()[:2]).shape == (n, BATCH)


# ------------------------------------------------------------------ replay buffer and time limits


def test_buffer_wraps_around_and_keeps_contents():
    buffer, rng = (
        ReplayBuffer(2, 1, Args(buffer_size=5), torch.device("cpu")),
        torch.Generator().manual_seed(0),
    )
    buffer.rows.fill_(math.nan)  # unwritten rows would show
    for i in range(8):
        buffer.add(np.full(2, i), np.full(1, -i / 10), i + 0.5, i % 2 == 0, np.full(2, i + 1))
        obs, action, reward, done, next_obs = buffer.sample(200, rng)
        kept = range(max(0, i - 4), i + 1)
        assert set(obs[:, 0].tolist()) == set(kept)
        assert torch.equal(obs + 1, next_obs) and torch.equal(reward, obs[:, 0] + 0.5)
        assert torch.allclose(action[:, 0], -obs[:, 0] / 10)
        assert torch.equal(done, (obs[:, 0] % 2 == 0).float())
        assert buffer.rows.dtype == torch.float32
        assert (action.shape, reward.shape, done.shape) == ((200, 1), (200,), (200,))


def test_sampling_is_uniform():
    buffer = ReplayBuffer(1, 1, Args(buffer_size=64), torch.device("cpu"))
    for i in range(50):
        buffer.add([i], [0], 0, False, [0])
    obs, *_ = buffer.sample(50_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(obs[:, 0].long(), minlength=64)
    chi2 = ((counts[:50] - 1000.0) ** 2 / 1000).sum()
    assert counts[50:].sum() == 0 and 20 < chi2 < 90  # 49 degrees of freedom: 0.9999 of all draws


def test_memory_is_taken_when_written():
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffer = ReplayBuffer(
        376, 17, Args(buffer_size=1_000_000), torch.device("cpu")
    )  # Humanoid: 3 GB
    buffer.add(np.zeros(376), np.zeros(17), 0, False, np.zeros(376))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.fixture
def run_loop(tmp_path, monkeypatch):
    """The script's own loop on a tiny environment; returns agent, buffer and environment."""

    def run(*arguments):
        made = {"envs": []}

        class KeptAgent(Agent):
            def __init__(self, *args):
                super().__init__(*args)
                made["agent"] = self

        class KeptBuffer(ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                made["buffer"] = self

        def make_env(args):
            made["envs"].append(crossq_sac.make_env(args))
            return made["envs"][-1]

        monkeypatch.chdir(tmp_path)
        common = "--critic-width 32 --actor-width 16 --batch-size 64 --compile off --device cpu"
        arguments = [*common.split(), "--eval-every", "100000", *arguments]
        parts = {"Agent": KeptAgent, "ReplayBuffer": KeptBuffer, "make_env": make_env}
        assert crossq_sac.main(arguments, **parts) == 0
        return made["agent"], made["buffer"], made["envs"][0]

    return run


@pytest.mark.parametrize("env", ["Truncated", "Terminated"])
def test_truncation_bootstraps_and_termination_does_not(run_loop, env):
    """Reward 1 for ever is worth 1 / (1 - gamma) = 5, as a time limit is no end; with terminations,
    the last of 10 steps is worth 1, the first more."""
    arguments = f"--env-id tiny_envs:{env}-v0 --gamma 0.8 --alpha 1e-6 --alpha-lr 0"
    arguments += " --total-timesteps 2500 --learning-starts 300"
    agent, _, _ = run_loop(*arguments.split())
    obs = torch.tensor([[0.0, 0.5, 0.0], [0.9, 0.5, 0.0]])
    agent.critic.eval()
    q = q_values(agent, obs, torch.zeros(2, 2)).detach().mean(0)
    if env == "Truncated":
        assert torch.allclose(q, torch.full((2,), 5.0), rtol=0.12)
    else:
        assert q[1] < 1.6 and 3.0 < q[0] < 5.0
        assert q[0].item() == pytest.approx((1 - 0.8**10) / 0.2, rel=0.2)


@pytest.mark.parametrize("env", ["Truncated", "Terminated"])
def test_stored_transitions(run_loop, env):
    """The true last observation is stored, and no row crosses a reset. `terminated` is 1 at a
    termination, and 0 everywhere else, at a time limit too."""
    arguments = f"--env-id tiny_envs:{env}-v0 --total-timesteps 95 --learning-starts 1000".split()
    agent, buffer, env_ = run_loop(*arguments)
    assert buffer.size == 95 and agent.n_updates == 0
    obs, action, reward, terminated, next_obs = buffer.rows[:95].split(buffer.widths, -1)
    t = torch.arange(95) % 10
    assert torch.allclose(obs[:, 0], t / 10) and torch.allclose(next_obs[:, 0], (t + 1) / 10)
    # The episode's own mark.
    assert torch.equal(obs[:, 1], next_obs[:, 1]) and len(set(obs[:, 1].tolist())) == 10
    assert (reward == 1).all()
    ends = [9, 19, 29, 39, 49, 59, 69, 79, 89] if env == "Terminated" else []
    assert terminated[:, 0].nonzero()[:, 0].tolist() == ends
    assert (terminated[ends] == 1).all()
    # The agent's actions fill [-1, 1]; the environment, with bounds of 0.4, saw 0.4 times as much.
    assert action.min() < -0.9 and action.max() > 0.9 and abs(action.mean()) < 0.2
    assert torch.allclose(next_obs[:, 2], 0.4 * action[:, 0], atol=1e-6)
    assert env_.action_space.low[0] == -1 and env_.unwrapped.action_space.low[0] == np.float32(-0.4)


def test_warm_up_is_exactly_learning_starts_random_steps(run_loop, monkeypatch):
    """30 uniform actions, then the policy's; the first update comes after the 31st step."""
    acted, updated, n_rows = [], [], [0]
    act, update, add = Agent.act, Agent.update, ReplayBuffer.add

    def counting_add(self, *transition):
        n_rows[0] += 1
        add(self, *transition)

    monkeypatch.setattr(ReplayBuffer, "add", counting_add)
    monkeypatch.setattr(Agent, "act", lambda self, *a: acted.append(n_rows[0] + 1) or act(self, *a))
    monkeypatch.setattr(
        Agent, "update", lambda self, *a: updated.append(n_rows[0]) or update(self, *a)
    )
    flags = "--env-id tiny_envs:Truncated-v0 --total-timesteps 40 --learning-starts 30"
    _, buffer, _ = run_loop(*flags.split())
    assert acted == list(range(31, 41)) and updated == list(range(31, 41))
    # Uniform, and the run's own generator: the actions are its first numbers.
    rng = torch.Generator().manual_seed(1)
    expected = torch.stack([torch.rand(ACTIONS, generator=rng) * 2 - 1 for _ in range(30)])
    assert torch.allclose(buffer.rows[:30, 3:5], expected)


def test_actor_update_takes_the_states_of_the_batch_and_noise_of_its_own(monkeypatch):
    agent, batch, calls = make_agent(policy_delay=1), make_batch(), []
    entropy = {"diagnostics/entropy": 0.0}
    monkeypatch.setattr(agent, "descend", lambda *a: calls.append(a) or entropy)
    agent.update(batch, torch.Generator().manual_seed(0))
    critic, actor, alpha = calls
    assert critic[:2] == ("critic", agent.critic_loss) and critic[2] is batch
    assert actor[:2] == ("actor", agent.actor_loss) and actor[2] is batch
    assert alpha == ("alpha", agent.alpha_loss, 0.0)
    assert not torch.equal(actor[3]["noise"], critic[3]["noise"])


def test_evaluation_is_deterministic_and_its_seeds_are_the_steps():
    """tanh(mean), without noise; other steps have other episodes."""
    agent = make_agent()
    obs = np.ones(OBS, np.float32)
    mean = agent.actor.eval()(torch.ones(1, OBS))[:, :ACTIONS]
    assert np.allclose(agent.act(obs), mean.tanh().detach()[0])
    args = Args(env_id="Pendulum-v1", eval_episodes=1, critic_width=16, actor_width=16)
    env, seen = crossq_sac.make_env(args), []
    agent = Agent(3, 1, args)
    step = env.step
    env.step = lambda action: seen.append((action, agent.act(env.last))) or env_step(action)

    def env_step(action):
        out = step(action)
        env.last = out[0]
        return out

    reset = env.reset

    def env_reset(**k):
        out = reset(**k)
        env.last = out[0]
        return out

    env.reset = env_reset
    rows = [crossq_sac.evaluate(agent, env, at, None)[0][2] for at in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    assert all(np.array_equal(a, b) for a, b in seen)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = crossq_sac.make_env(Args(env_id="tiny_envs:Terminated-v0", action_repeat=4))
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.float32))[1:3] for _ in range(3)]
    assert steps == [(4.0, False), (4.0, False), (2.0, True)]


def test_dictionaries_are_flattened_in_the_order_of_the_space():
    env = crossq_sac.make_env(Args(env_id="tiny_envs:DictObs-v0"))
    obs, _ = env.reset(seed=0)
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert obs.dtype == np.float32 and obs.shape == (3,)
    obs, *_ = env.step(np.full(2, 0.5, np.float32))
    assert [obs[0], obs[2]] == pytest.approx([0.1, 0.2])  # "position", then "height"
