"""What sac_baseline.py and crossq_td3.py do, against formulas written down a second time."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import crossq_sac
import crossq_td3
import crossq_wn_highutd
import sac_baseline

OBS, ACTIONS, BATCH, GAMMA = 5, 2, 64, 0.9
SCRIPTS = [sac_baseline, crossq_sac, crossq_td3, crossq_wn_highutd]


def make_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, BATCH, OBS, generator=g).double()
    next_obs = 2 * next_obs + 0.5  # so that the statistics of one half are not those of both
    action = torch.rand(BATCH, ACTIONS, generator=g).double() * 2 - 1
    reward = torch.randn(BATCH, generator=g).double()
    done = (torch.rand(BATCH, generator=g) < 0.25).double()
    return [obs, action, reward, done, next_obs]


def make_agent(script, updates=0, **changes):
    """A small agent in float64; after some updates nothing is at its initial value."""
    torch.manual_seed(0)
    small = {"critic_width": 16, "actor_width": 16, "gamma": GAMMA}
    args = script.Args(**small | {"critic_lr": 0.01, "actor_lr": 0.01} | changes)
    agent = script.Agent(OBS, ACTIONS, args).double()
    for i in range(updates):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
    return agent


def noise(scale=1.0):
    return scale * torch.randn(BATCH, ACTIONS, generator=torch.Generator().manual_seed(99)).double()


def forward(net, x, norm=None, seen=None):
    """The network's output by hand; norm: None, "batch" (statistics of x) or "running".

    "batch" is CrossQ's training mode in its warm-up. `seen` keeps the inputs of the norms.
    """
    for k, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = x.clamp(min=0) if k else x
        if norm:
            layer = net.norms[k]
            mean, var = layer.running_mean, layer.running_var
            if norm == "batch":
                mean, var = x.mean(-2, keepdim=True), x.var(-2, correction=0, keepdim=True)
            if seen is not None:
                seen.append(x.detach())
            x = (x - mean) / torch.sqrt(var + 1e-3) * layer.scale + layer.bias
        x = torch.matmul(x, weight) + bias
    return x


def copy_of(net) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def assert_gradients(agent, optimizer, loss, inputs, expected_loss, names):
    """descend() leaves the gradient of expected_loss in the named optimiser's parameters, which are
    those of `names` and no others."""
    groups = agent.optimizers[optimizer].param_groups
    ours = {id(p) for group in groups for p in group["params"]}
    named = {name: p for name, p in agent.named_parameters() if id(p) in ours}
    assert {name.split(".")[0] for name in named} == names and len(ours) == len(named)
    assert ours == {id(p) for name, p in agent.named_parameters() if name.split(".")[0] in names}
    gradients = torch.autograd.grad(expected_loss, list(named.values()))
    agent.descend(optimizer, loss, *inputs)
    for (name, p), expected in zip(named.items(), gradients):
        assert expected.abs().max() > 1e-6, name
        assert torch.allclose(p.grad, expected, rtol=1e-7, atol=1e-9), name


def copy_of_rng(rng):
    return torch.Generator().set_state(rng.get_state())


def both_are_lowest_somewhere(q):
    """Otherwise the minimum over both critics is no test of it."""
    return 0.05 < (q[0] < q[1]).double().mean() < 0.95


@pytest.fixture
def run_loop(tmp_path, monkeypatch):
    """run_loop(script, flags): the script's own loop on a tiny environment.

    It returns the agent, its initial state, the noise that it acted on, and the buffer;
    updates=False leaves the updates out.
    """

    def run(script, flags, updates=True):
        made = {"acted": []}

        class Agent(script.Agent):
            def __init__(self, *args):
                super().__init__(*args)
                made["agent"], made["initial"] = self, copy_of(self)

            def act(self, obs, rng=None):
                if rng is not None:
                    made["acted"].append(torch.randn(self.action_dim, generator=copy_of_rng(rng)))
                return super().act(obs, rng)

            def update(self, *args):
                return super().update(*args) if updates else {"none": torch.zeros(())}

        class ReplayBuffer(script.ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                made["buffer"] = self

        small = "--critic-width 16 --actor-width 16 --batch-size 32 --compile off --device cpu"
        small += " --eval-every 1000000"
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            arguments = [*small.split(), *flags.split()]
            assert script.main(arguments, Agent=Agent, ReplayBuffer=ReplayBuffer) == 0
        return made

    return run


# ----------------------------------------------------------------------------- several scripts


def test_settings():
    """Table 1 of the CrossQ paper, and TD3's noise."""
    shared = {"n_critics": 2, "actor_width": 256, "utd": 1, "batch_size": 256, "gamma": 0.99}
    shared |= {"buffer_size": 1_000_000, "learning_starts": 5000}
    shared |= {"critic_lr": 1e-3, "actor_lr": 1e-3}
    sac = {"critic_width": 256, "adam_beta1": 0.9, "policy_delay": 1}
    sac |= {"tau": 0.005, "alpha": 1.0, "alpha_lr": 1e-3}
    td3 = {"critic_width": 2048, "adam_beta1": 0.5, "policy_delay": 3}
    td3 |= {"exploration_noise": 0.1, "target_noise": 0.2, "target_noise_clip": 0.5}
    for script, settings, beta in ((sac_baseline, sac, 0.9), (crossq_td3, td3, 0.5)):
        args = vars(script.Args())
        assert {name: args[name] for name in shared | settings} == shared | settings
        agent = make_agent(script, critic_lr=1e-3, actor_lr=1e-3)
        rates = {}
        for name, optimizer in agent.optimizers.items():
            (group,) = optimizer.param_groups
            rates[name] = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        expected = dict.fromkeys(("critic", "actor"), (1e-3, (beta, 0.999), 1e-8, 0))
        if script is sac_baseline:
            expected["alpha"] = 1e-3, (0.9, 0.999), 1e-8, 0
        assert rates == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_updates_take_the_batch_and_noise_of_their_own(script):
    """Standard normal, independent per row, dimension and update, and of critic and actor."""
    agent, calls = make_agent(script, policy_delay=1), {"critic_loss": [], "actor_loss": []}
    for name in calls:
        loss = getattr(agent, name)
        setattr(agent, name, lambda *x, name=name, loss=loss: calls[name].append(x) or loss(*x))
    rng, batch = torch.Generator().manual_seed(0), [torch.cat([x] * 32) for x in make_batch()]
    for _ in range(2):
        agent.update(batch, rng)
    critic, actor = calls.values()
    assert len(critic) == len(actor) == 2 and all(x is batch for x, *_ in critic + actor)
    with_noise = critic if script is crossq_td3 else critic + actor
    drawn = torch.cat([draws["noise"] for _, draws in with_noise], -1)
    assert drawn.shape == (32 * BATCH, ACTIONS * (2 if script is crossq_td3 else 4))
    assert torch.allclose(drawn.T.cov(), torch.eye(drawn.shape[1]), atol=0.15)
    assert drawn.mean(0).abs().max() < 0.1 and drawn[:, 0].unique().numel() > 2000


@pytest.mark.parametrize("script", SCRIPTS)
def test_noise_comes_from_the_runs_own_generator(script):
    """The same seed draws the same noise, and PyTorch's global generator is left alone."""
    agent, batch = make_agent(script), make_batch()
    before = torch.get_rng_state()
    draws = [agent.draw(batch, torch.Generator().manual_seed(seed))["noise"] for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_logged_q_is_that_of_the_batch(script):
    """Of (s, a) alone, the first half of a joint pass; of the critic, not of its target."""
    agent, batch, outputs = make_agent(script, updates=4), make_batch(50), []
    agent.critic.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss, info = agent.critic_loss(batch, {"noise": noise()})
    (output,) = outputs
    assert output.shape[1] == BATCH * (1 if script is sac_baseline else 2)
    assert torch.allclose(info["diagnostics/q_mean"], output[:, :BATCH].mean())
    assert info["losses/critic"] is loss


# -------------------------------------------------------------------------------------- SAC


@pytest.mark.parametrize("script", [sac_baseline, crossq_sac, crossq_wn_highutd])
def test_sac_explores_with_its_own_standard_deviation(script):
    """tanh(mean + std * noise), of the actor in evaluation mode; without a generator tanh(mean)."""
    agent, obs = make_agent(script, updates=9), np.ones(OBS)
    norm = None if script is sac_baseline else "running"
    mean, log_std = forward(agent.actor, torch.ones(1, OBS).double(), norm).detach().chunk(2, -1)
    for seed in range(5):
        agent.actor.train()  # the mode an actor update leaves
        drawn = torch.randn(1, ACTIONS, generator=torch.Generator().manual_seed(seed))
        expected = torch.tanh(mean + log_std.exp() * drawn)[0]
        action = agent.act(obs, torch.Generator().manual_seed(seed))
        assert action.shape == (ACTIONS,) and np.allclose(action, expected)
    assert np.allclose(agent.act(obs), torch.tanh(mean)[0], atol=1e-12)


def distribution(agent, obs):
    """torch's own tanh-squashed Gaussian, with the log_std clipped to [-20, 2]."""
    mean, log_std = forward(agent.actor, obs).split(ACTIONS, -1)
    normal = Normal(mean, log_std.clip(-20, 2).exp())
    return normal, TransformedDistribution(Independent(normal, 1), [TanhTransform()])


def sample(agent, obs, standard_normal):
    normal, squashed = distribution(agent, obs)
    u = normal.mean + normal.stddev * standard_normal
    action = torch.tanh(u)
    # Independent's log-prob of u, less the log-determinant of tanh, as the definition has it
    return action, squashed.base_dist.log_prob(u) - torch.log(1 - action**2).sum(-1)


def test_sac_critic_gradient_is_that_of_the_target_network():
    """r + gamma (1 - done) (min of BOTH target critics - alpha log pi); their weights are older."""
    agent, batch = make_agent(sac_baseline, updates=9), make_batch(50)
    obs, action, reward, done, next_obs = batch
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
        next_action, log_prob = sample(agent, next_obs, noise())
        next_pair = torch.cat([next_obs, next_action], -1)
        next_q = forward(agent.target_critic, next_pair)[..., 0]
        online = forward(agent.critic, next_pair)[..., 0]
        assert both_are_lowest_somewhere(next_q) and (next_q - online).abs().mean() > 0.01
        next_value = torch.minimum(next_q[0], next_q[1]) - 0.3 * log_prob
        target = reward + GAMMA * (1 - done) * next_value
    q = forward(agent.critic, torch.cat([obs, action], -1))[..., 0]
    loss = ((q[0] - target) ** 2).mean() / 2 + ((q[1] - target) ** 2).mean() / 2
    inputs = batch, {"noise": noise()}
    assert_gradients(agent, "critic", agent.critic_loss, inputs, loss, {"critic"})


def test_sac_actor_gradient_is_that_of_the_critic():
    """alpha log pi - min over BOTH critics, not targets; the temperature's: alpha (H + dim A)."""
    agent, obs = make_agent(sac_baseline, updates=9), make_batch(50)[0]
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
    action, log_prob = sample(agent, obs, noise())
    q = forward(agent.critic, torch.cat([obs, action], -1))[..., 0]
    assert both_are_lowest_somewhere(q)
    loss = (0.3 * log_prob - torch.minimum(q[0], q[1])).mean()
    critics = copy_of(agent.critic), copy_of(agent.target_critic)
    inputs = [obs], {"noise": noise()}
    assert_gradients(agent, "actor", agent.actor_loss, inputs, loss, {"actor"})
    assert same(critics[0], copy_of(agent.critic))
    assert same(critics[1], copy_of(agent.target_critic))
    entropy = -log_prob.detach().mean()
    loss = agent.log_alpha.exp() * (entropy + ACTIONS)
    assert_gradients(agent, "alpha", agent.alpha_loss, [entropy], loss, {"log_alpha"})


def test_log_std_is_clipped_and_extreme_actions_have_finite_log_probs():
    agent, obs = make_agent(sac_baseline), make_batch()[0]
    for bias, log_std in ((50.0, 2.0), (-50.0, -20.0)):
        with torch.no_grad():
            agent.actor.biases[2][0, ACTIONS:] = bias
            mean = forward(agent.actor, obs)[:, :ACTIONS]
            action, log_prob = agent.policy(obs, noise())
            u = mean + math.exp(log_std) * noise()
            assert torch.allclose(action, u.tanh()) and log_prob.isfinite().all()


def polyak(target: dict, critics: list[dict], tau: float) -> dict:
    for critic in critics:
        target = {name: (1 - tau) * target[name] + tau * critic[name] for name in target}
    return target


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_target_network_follows_every_critic_update_by_tau(tau):
    """From a start equal to the critic; with tau 1 it is a copy, bit for bit."""
    agent = make_agent(sac_baseline, tau=tau)
    start, critics = copy_of(agent.critic), []
    assert same(start, copy_of(agent.target_critic))
    assert start.keys() == copy_of(agent.target_critic).keys()
    for i in range(7):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        critics.append(copy_of(agent.critic))
        expected = polyak(start, critics, tau)
        for name, tensor in agent.target_critic.state_dict().items():
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-12)
            assert not torch.equal(tensor, start[name])
        assert same(critics[-1], copy_of(agent.target_critic)) == (tau == 1)


def test_target_network_in_the_loop_with_five_updates_per_step(run_loop, monkeypatch, tmp_path):
    """Averaged after each of the five updates, not once per step; kept by a resume."""
    critics, descend = [], sac_baseline.Agent.descend

    def spy(self, name, *rest):
        info = descend(self, name, *rest)
        if name == "critic":
            critics.append(copy_of(self.critic))
        return info

    monkeypatch.setattr(sac_baseline.Agent, "descend", spy)
    flags = "--env-id tiny_envs:Truncated-v0 --total-timesteps 50 --learning-starts 40 --utd 5"
    made = run_loop(sac_baseline, f"{flags} --critic-lr 0.02 --run-name a")
    assert len(critics) == 50
    start = {name: made["initial"][f"critic.{name}"] for name in critics[0]}
    for name, expected in polyak(start, critics, 0.005).items():
        tensor = made["agent"].target_critic.state_dict()[name]
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-5)  # float32
        assert torch.equal(made["initial"][f"target_critic.{name}"], start[name])
        assert (tensor - start[name]).abs().max() > 5e-3
    saved = torch.load(tmp_path / "runs/a/checkpoint.pt", weights_only=True)["agent"]
    target = made["agent"].target_critic.state_dict()
    target = {f"target_critic.{name}": tensor for name, tensor in target.items()}
    assert target.keys() < saved.keys() and same(target, saved)
    resumed = run_loop(sac_baseline, "--resume runs/a", updates=False)["agent"]
    assert resumed is not made["agent"] and same(copy_of(made["agent"]), copy_of(resumed))
    assert resumed.n_updates == 50  # the policy delay's phase


def test_target_network_is_not_trained():
    """No gradient, no optimiser state, no memory shared with the critic."""
    agent = make_agent(sac_baseline, updates=3)
    targets = list(agent.target_critic.parameters())
    assert all(p.grad is None and not p.requires_grad for p in targets)
    assert not {p.data_ptr() for p in targets} & {p.data_ptr() for p in agent.critic.parameters()}
    owned = (
        {id(p) for p in agent.critic.parameters()},
        {id(p) for p in agent.actor.parameters()},
        {id(agent.log_alpha)},
    )
    for optimizer, parameters in zip(agent.optimizers.values(), owned):
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == parameters
        assert {id(p) for p in optimizer.state} == parameters


def test_sac_has_no_normalisation():
    """Weights and biases only, no buffers; a row's value depends on no other row and on no mode."""
    agent, (obs, action, *_) = make_agent(sac_baseline, updates=2), make_batch()
    assert not hasattr(sac_baseline, "BatchRenorm") and not list(agent.buffers())
    critics = [(agent.critic, OBS + ACTIONS), (agent.target_critic, OBS + ACTIONS)]
    for net, n_in in [*critics, (agent.actor, OBS)]:
        names = {f"{kind}.{k}" for kind in ("weights", "biases") for k in range(3)}
        assert {name for name, _ in net.named_parameters()} == names
        x = torch.cat([obs, action], -1)[:, :n_in]
        whole = net.train()(x)
        assert torch.allclose(whole, forward(net, x)) and torch.equal(whole, net.eval()(x))
        assert torch.allclose(whole[..., :1, :], net(x[:1]))


@pytest.mark.parametrize(
    ("script", "delay"), [(sac_baseline, None), (sac_baseline, 2), (crossq_td3, None)]
)
def test_policy_delay(script, delay):
    """Actor and temperature move with every `delay`-th critic update; 1 in SAC, 3 in TD3."""
    agent = make_agent(script, **{"policy_delay": delay} if delay else {})
    delay = delay or (1 if script is sac_baseline else 3)
    for i in range(1, 7):
        before = copy_of(agent)
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        after = copy_of(agent)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert {name for name in moved if name.startswith("critic.")}
        actor = {name for name in before if name.startswith(("actor.", "log_alpha"))}
        assert moved & actor == (actor if i % delay == 0 else set())


# -------------------------------------------------------------------------------------- TD3


def test_td3_actor_is_deterministic_and_bounded():
    """tanh of the eval-mode actor's output, one output per dimension, also where it saturates."""
    agent = make_agent(crossq_td3, updates=9)
    for scale in (1, 100):
        obs = np.random.default_rng(0).normal(size=OBS) * scale
        out = forward(agent.actor, torch.from_numpy(obs)[None], "running")
        expected = torch.tanh(out)[0].detach()
        for _ in range(2):
            action = agent.act(obs)
            assert action.shape == (ACTIONS,) and np.allclose(action, expected, atol=1e-12)
            assert np.abs(action).max() <= 1
            agent.actor.train()  # the mode an actor update leaves
    assert agent.actor.weights[2].shape == (16, ACTIONS)


def test_td3_exploration_noise_is_clipped():
    agent, obs = make_agent(crossq_td3, updates=9), np.ones(OBS)
    action = agent.act(obs)
    for seed in range(5):
        for std in (0.1, 100.0):
            agent.args.exploration_noise = std
            noise = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(seed)).numpy()
            expected = np.clip(action + std * noise, -1, 1)
            assert np.allclose(agent.act(obs, torch.Generator().manual_seed(seed)), expected)
            assert std < 1 or set(np.abs(expected)) == {1.0}


def test_td3_exploration_in_the_loop(run_loop):
    """Uniform random actions first; then the policy's, with independent noise of std 0.1."""
    flags = "--env-id tiny_envs:Truncated-v0 --total-timesteps 3400 --learning-starts 400"
    made = run_loop(crossq_td3, f"{flags} --buffer-size 4000", updates=False)
    obs, action, *_ = made["buffer"].rows[:3400].split(made["buffer"].widths, -1)
    # The run's own generator: the actions are its first numbers.
    rng = torch.Generator().manual_seed(1)
    uniform = torch.stack([torch.rand(2, generator=rng) * 2 - 1 for _ in range(400)])
    assert torch.equal(action[:400], uniform)
    assert len(made["acted"]) == 3000 and made["acted"][0].shape == (2,)
    with torch.no_grad():
        deterministic = torch.tanh(forward(made["agent"].actor, obs[400:], "running"))
    added = action[400:] - deterministic
    assert action.abs().max() < 1  # so none is clipped
    assert torch.allclose(added, 0.1 * torch.stack(made["acted"]), atol=1e-6)
    assert torch.allclose(added.std(0), torch.tensor(0.1), rtol=0.06)
    assert added.mean(0).abs().max() < 0.01
    both = torch.cat([added[:-1], added[1:]], -1)  # this step's and the next one's
    assert (both.T.corrcoef() - torch.eye(4)).abs().max() < 0.08


def test_td3_critic_gradient_is_that_of_one_joint_pass_with_a_smoothed_target():
    """a' of the eval-mode actor, both clips at work; min over BOTH critics of the same pass."""
    agent, batch = make_agent(crossq_td3, updates=9), make_batch(50)
    obs, action, reward, done, next_obs = batch
    with torch.no_grad():
        smoothing = 0.2 * noise(2.0)
        assert 0.05 < (smoothing.abs() > 0.5).double().mean() < 0.5
        free = torch.tanh(forward(agent.actor, next_obs, "running")) + smoothing.clip(-0.5, 0.5)
        assert 0.02 < (free.abs() > 1).double().mean() < 0.7
        next_action = free.clip(-1, 1)
    seen = []
    obs_both, action_both = torch.cat([obs, next_obs]), torch.cat([action, next_action])
    q = forward(agent.critic, torch.cat([obs_both, action_both], 1), "batch", seen)[..., 0]
    q, next_q = q[:, :BATCH], q[:, BATCH:].detach()
    assert both_are_lowest_somewhere(next_q)
    target = reward + GAMMA * (1 - done) * torch.minimum(next_q[0], next_q[1])
    loss = ((q[0] - target) ** 2).mean() / 2 + ((q[1] - target) ** 2).mean() / 2
    before = copy_of(agent)
    agent.actor.train(), agent.critic.eval()  # the modes an actor update leaves
    inputs = batch, {"noise": noise(2.0)}
    assert_gradients(agent, "critic", agent.critic_loss, inputs, loss, {"critic"})
    # The statistics are those of both halves, in all three layers. The actor and its own stay.
    for k, x in enumerate(seen):
        layer = agent.critic.norms[k]
        assert x.shape[-2] == 2 * BATCH and layer.steps == 10
        mean, variance = x.mean(-2, keepdim=True), x.var(-2, correction=0, keepdim=True)
        old_mean = before[f"critic.norms.{k}.running_mean"]
        old_variance = before[f"critic.norms.{k}.running_var"]
        assert torch.allclose(layer.running_mean, 0.99 * old_mean + 0.01 * mean)
        assert torch.allclose(layer.running_var, 0.99 * old_variance + 0.01 * variance)
    for name, tensor in agent.actor.state_dict().items():
        assert torch.equal(tensor, before[f"actor.{name}"])


def test_td3_actor_gradient_is_that_of_the_minimum_of_eval_mode_critics():
    """-min over BOTH critics, the actor in training mode on s alone; only the actor moves."""
    agent, obs = make_agent(crossq_td3, updates=9), make_batch(50)[0]
    seen = []
    action = torch.tanh(forward(agent.actor, obs, "batch", seen))
    q = forward(agent.critic, torch.cat([obs, action], -1), "running")[..., 0]
    assert both_are_lowest_somewhere(q)
    before = copy_of(agent)
    agent.critic.train(), agent.actor.eval()  # the modes a critic update leaves
    loss = -torch.minimum(q[0], q[1]).mean()
    assert_gradients(agent, "actor", agent.actor_loss, [[obs]], loss, {"actor"})
    for k, x in enumerate(seen):
        layer = agent.actor.norms[k]
        assert layer.steps == 4  # after updates 3, 6, 9 and this one
        old = before[f"actor.norms.{k}.running_mean"]
        assert torch.allclose(layer.running_mean, 0.99 * old + 0.01 * x.mean(-2, keepdim=True))
    for name, tensor in agent.critic.state_dict().items():
        assert torch.equal(tensor, before[f"critic.{name}"])


def test_td3_statistics_move_in_their_own_updates_only():
    agent = make_agent(crossq_td3)
    for i in range(1, 7):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        before = copy_of(agent)
        agent.act(np.ones(OBS), torch.Generator())
        assert same(before, copy_of(agent))
        assert [layer.steps.item() for layer in agent.critic.norms] == [i] * 3
        assert [layer.steps.item() for layer in agent.actor.norms] == [i // 3] * 3


def test_td3_has_neither_target_networks_nor_a_temperature():
    """Critic and actor are all there is: in the state, among the modules and the optimisers."""
    agent = make_agent(crossq_td3, updates=3)
    assert agent.optimizers.keys() == {"critic", "actor"}
    assert {name.split(".")[0] for name in agent.state_dict()} == {"critic", "actor"}
    assert {name for name, _ in agent.named_children()} == {"critic", "actor"}
    assert not {"tau", "alpha", "alpha_lr"} & set(vars(agent.args))
    kinds = torch.nn.Module | list | tuple | torch.Tensor
    assert not [name for name, value in vars(agent).items() if isinstance(value, kinds)]
