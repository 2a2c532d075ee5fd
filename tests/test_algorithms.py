"""benchmark/algorithms: settings, exact resumes and what an update moves, for each file; losses of
REDQ, DroQ and TD3 and resets of SR-SAC by hand. The other three have tests of their own."""

import importlib
import itertools
import math
import shlex
from collections import Counter

import pytest
import torch
import tyro
from conftest import (
    ACTIONS,
    BATCH,
    OBS,
    TINY,
    assert_identical,
    copy_of,
    kill_in_the_middle,
    load,
    make_batch,
)

NAMES = ["redq", "droq", "td3", "sr_sac", "bro", "xqc", "crossq_discrete"]
MODULES = {name: importlib.import_module(name) for name in NAMES}
redq, droq, td3, sr_sac = (MODULES[name] for name in NAMES[:4])
each = pytest.mark.parametrize("name", NAMES)
OWN = {"bro": {"n_quantiles": 5}}  # settings of small agents


def make_agent(name, **changes):
    torch.manual_seed(0)
    sizes = {"critic_width": 16, "actor_width": 16, "device": "cpu"}
    args = MODULES[name].Args(**sizes | OWN.get(name, {}) | changes)
    return MODULES[name].Agent(OBS, ACTIONS, args)


def fill(net, outputs):
    """A network whose outputs are these numbers, whatever comes in."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.biases[2].copy_(torch.tensor(outputs).view_as(net.biases[2]))


def assert_close(loss, expected, parameters):
    """The loss and its gradients."""
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    parameters = [*parameters]
    pairs = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


# ------------------------------ every algorithm

COMMON = {"critic_width": 256, "actor_width": 256, "n_critics": 2, "adam_beta1": 0.9, "policy_delay": 1, "tau": 0.005,
          "utd": 1, "batch_size": 256, "buffer_size": 1_000_000, "learning_starts": 5000, "gamma": 0.99,
          "action_repeat": 1, "bf16": False}  # fmt: skip
SAC = COMMON | {"critic_lr": 1e-3, "actor_lr": 1e-3, "alpha_lr": 1e-3, "alpha": 1.0}
SLOW = {"critic_lr": 3e-4, "actor_lr": 3e-4}
DEFAULTS = {
    "redq": SAC | {"n_critics": 10, "n_target_critics": 2, "utd": 20, "policy_delay": 20},
    "droq": SAC | {"dropout": 0.01, "utd": 20, "policy_delay": 20},
    "td3": COMMON | SLOW | {"policy_delay": 2, "exploration_noise": 0.1, "target_noise": 0.2, "target_noise_clip": 0.5,
                            "brn_warmup": 0},
    "sr_sac": SAC | SLOW | {"alpha_lr": 3e-4, "utd": 32, "learning_starts": 10_000, "entropy_factor": 0.5,
                            "reset_every": 2_560_000},
    "bro": SAC | SLOW | {"alpha_lr": 3e-4, "dual_lr": 3e-5, "weight_decay": 1e-4, "critic_width": 512, "n_quantiles": 100,
                         "utd": 10, "batch_size": 128, "learning_starts": 2500, "entropy_factor": 0.5, "fast": False},
    "xqc": SAC | SLOW | {"alpha_lr": 3e-4, "lr_end": 0.1, "critic_width": 512, "utd": 2, "policy_delay": 3,
                         "gamma": 0.995, "alpha": 0.01, "entropy_factor": 0.5, "weight_decay": 0.0},
    "crossq_discrete": SAC | SLOW | {"alpha_lr": 3e-4, "adam_beta1": 0.5, "policy_delay": 3, "brn_warmup": 100_000,
                                     "entropy_factor": 0.6},
}  # fmt: skip
del DEFAULTS["xqc"]["adam_beta1"], DEFAULTS["crossq_discrete"]["tau"]
RUN = {"env_id", "seed", "total_timesteps", "device", "compile", "eval_every", "eval_episodes"}
RUN |= {"checkpoint_minutes", "run_name", "resume", "track"}  # not the algorithm's


@each
def test_defaults_and_commands(name):
    """Every setting, and the commands of the docstring."""
    module = MODULES[name]
    args = vars(module.Args())
    assert {key: args[key] for key in args.keys() - RUN} == DEFAULTS[name]
    lines = [line.strip() for line in module.__doc__.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    assert len(commands) >= 2
    for _, file, *flags in commands:
        assert file == f"benchmark/algorithms/{name}.py"
        changed = vars(tyro.cli(module.Args, args=flags))
        flags = [flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")]
        assert all(changed[flag] != args[flag] for flag in flags if flag != "env_id")


@each
def test_optimizers_and_target_entropy(name):
    """Adam's learning rates and betas; dim(A) = 6."""
    agent, args = MODULES[name].Agent(17, 6, MODULES[name].Args()), DEFAULTS[name]
    for part in ("critic", "actor", "explorer", "alpha", "dual"):
        optimizer = getattr(agent, f"{part}_optimizer", None)
        if optimizer is None:
            continue
        (group,) = optimizer.param_groups
        lr = args["actor_lr" if part == "explorer" else f"{part}_lr"]
        beta1 = args.get("adam_beta1", 0.9) if part in ("critic", "actor", "explorer") else 0.9
        beta1 = 0.5 if name == "bro" and part in ("alpha", "dual") else beta1
        decay = 1e-4 if name == "bro" and part not in ("alpha", "dual") else 0
        assert (group["lr"], group["betas"], group["eps"]) == (lr, (beta1, 0.999), 1e-8), part
        assert group["weight_decay"] == decay, part
        if part not in ("alpha", "dual"):
            assert {*group["params"]} == {*getattr(agent, part).parameters()}
    entropies = {"redq": -6, "droq": -6, "td3": None, "crossq_discrete": 0.6 * math.log(6)}
    assert getattr(agent, "target_entropy", None) == entropies.get(name, -3)


@each
def test_what_an_update_moves(name):
    """The critic at every update, the actor at every second, statistics of norms with their
    networks. Randomness comes from the run's own generator."""
    agent, seen, norms = make_agent(name, policy_delay=2), [], []
    before, state = copy_of(agent), torch.get_rng_state()
    for seed in (1, 2):
        agent.update(make_batch(seed), torch.Generator().manual_seed(seed))
        now = copy_of(agent)
        moved = {key for key in now if not torch.equal(now[key], before[key])}
        seen.append({key.split(".")[0] for key in moved})
        norms.append({key.split(".")[0] for key in moved if key.endswith("running_mean")})
        before = now
    assert torch.equal(torch.get_rng_state(), state)
    critic, actor = {"critic", "target_critic"}, {"actor", "log_alpha"}
    if name == "td3":
        critic, actor = {"critic"}, {"target_critic", "actor", "target_actor"}
    if name == "crossq_discrete":
        critic = {"critic"}
    if name == "bro":
        actor |= {"explorer", "optimism", "kl_weight"}
    assert seen == [critic, critic | actor]
    normed = {"xqc": {"critic", "target_critic"}, "crossq_discrete": {"critic"}}.get(name, set())
    assert norms == [normed, normed | {"actor"} if normed else normed]
    assert all(p.requires_grad for p in agent.critic.parameters())


@pytest.mark.parametrize("main", [f"{name}.py" for name in NAMES], indirect=True)
def test_a_killed_process_is_resumed_exactly(main, tmp_path):
    """Each file as a process of its own, killed by SIGKILL, ends like a run that nothing stopped.
    SR-SAC resets after 110 updates, before and after the kill."""
    name = main.module.__name__
    flags = [*TINY, "--total-timesteps", 180, "--utd", 2, "--policy-delay", 2]
    flags += {"bro": ["--n-quantiles", 5], "sr_sac": ["--reset-every", 110]}.get(name, [])
    flags += ["--env-id", "tiny_envs:Discrete-v0"] * (name == "crossq_discrete")
    kill_in_the_middle(f"benchmark/algorithms/{name}.py", flags, tmp_path, 110)
    assert 140 <= load("runs/killed")["n_updates"] < 280
    main("--resume", "runs/killed")
    main(*flags, "--run-name", "whole")
    assert_identical("runs/whole", "runs/killed")
    assert load("runs/whole")["n_updates"] == 280


# ------------------------------ REDQ


def test_redq_by_hand():
    """Three critics, two of them in the target, all constant. alpha is 1."""
    agent, batch = make_agent("redq", n_critics=3), make_batch()
    fill(agent.target_critic, [5.0, 1.0, 3.0])
    fill(agent.critic, [0.0, 1.0, 5.0])
    fill(agent.actor, [0.0] * 2 * ACTIONS)  # a standard normal before the tanh
    batch[2].fill_(1.0), batch[3].fill_(0.0)
    draws = torch.tensor([0, 2]), torch.zeros(BATCH, ACTIONS)
    log_prob = -math.log(2 * math.pi)  # at 0: twice -log(2 pi) / 2
    target = 1 + 0.99 * (3 - log_prob)
    loss, q_mean = agent.critic_loss(batch, draws)
    assert loss.item() == pytest.approx((target**2 + (target - 1) ** 2 + (target - 5) ** 2) / 2)
    assert q_mean.item() == pytest.approx(2)
    loss, entropy = agent.actor_loss(batch[0], draws)
    assert loss.item() == pytest.approx(log_prob - 2) and entropy.item() == pytest.approx(-log_prob)
    batch[3].fill_(1.0)
    assert agent.critic_loss(batch, draws)[0].item() == pytest.approx((1 + 0 + 16) / 2)


def test_redq_draws_a_new_pair_for_each_update():
    """Each of the 45 pairs about equally often; the noise is new, too."""
    agent, rng = make_agent("redq"), torch.Generator().manual_seed(0)
    draws, critic_loss = [], agent.critic_loss
    agent.critic_loss = lambda batch, draw: draws.append(draw) or critic_loss(batch, draw)
    for _ in range(450):
        agent.update(make_batch(), rng)
    counts = Counter(tuple(sorted(pair.tolist())) for pair, _ in draws)
    assert {*counts} == {*itertools.combinations(range(10), 2)} and max(counts.values()) < 25
    assert len({noise.sum().item() for _, noise in draws}) == 450


# ------------------------------ DroQ


def test_droq_network_by_hand(double):
    """One input, two units: 3 and 1 -> dropped 6 and 0 -> normed 1 and -1 -> 2 * 1 + 0.5 and 0;
    then 0.001 and -0.001 -> 0.002 and 0, of a variance as small as epsilon."""
    args = droq.Args(dropout=0.5, n_critics=1, critic_width=2)
    net = droq.DropoutMLP(droq.sac_baseline.MLP(1, 2, 1, args, (1,)), args)
    with torch.no_grad():
        net.weights[0].copy_(torch.tensor([[2.0, 0.0]]))
        net.biases[0].copy_(torch.tensor([[1.0, 1.0]]))
        net.scales[0].copy_(torch.tensor([[2.0, 1.0]]))
        net.shifts[0].copy_(torch.tensor([[0.5, 0.0]]))
        net.weights[1].copy_(torch.tensor([[4e-4, -4e-4], [100.0, 100.0]]))
        net.weights[2].copy_(torch.tensor([[10.0], [1000.0]]))
        net.biases[2].fill_(3.0)
    expected = 3 + 10 / math.sqrt(2)  # 0.002 and 0: 0.001 / sqrt(1e-6 + 1e-6)
    for second in ([0.0, 0.9], [0.5, 0.49]):  # the latter: 0 and -0.002, of a mean of -0.001
        uniform = torch.tensor([[[[0.1, 0.5]]], [[second]]])
        out = net(torch.ones(1, 1), torch.ones(1, 0), uniform)
        assert out.item() == pytest.approx(expected, rel=1e-6)


def test_droq_losses(double):
    """The target is the minimum, the actor's Q the mean, each pass with masks of its own."""
    agent, batch = make_agent("droq", dropout=0.3, alpha=0.3), make_batch()
    obs, action, reward, terminated, next_obs = batch
    noise, own, other = draws = agent.draw(batch, torch.Generator().manual_seed(0))
    assert own.shape == other.shape == (2, 2, BATCH, 16) and not torch.equal(own, other)
    next_action, log_prob = agent.policy(next_obs, noise)
    q1, q2 = agent.target_critic(next_obs, next_action, other).squeeze(-1)
    assert 0 < (q1 < q2).sum() < BATCH  # both are lowest somewhere
    value = torch.minimum(q1, q2) - 0.3 * log_prob
    target = (reward + 0.99 * (1 - terminated) * value).detach()
    q = agent.critic(obs, action, own).squeeze(-1)
    expected = sum((q[i] - target).square().sum() / 2 / BATCH for i in range(2))
    assert_close(agent.critic_loss(batch, draws)[0], expected, agent.critic.parameters())
    action, log_prob = agent.policy(obs, noise)
    q1, q2 = agent.critic(obs, action, own).squeeze(-1)
    expected = (0.3 * log_prob - (q1 + q2) / 2).mean()
    assert_close(agent.actor_loss(obs, draws)[0], expected, agent.actor.parameters())
    assert torch.equal(agent.critic(obs, action), agent.critic(obs, action))  # nothing is dropped


# ------------------------------ TD3


def linear_in_the_action(critic, outputs):
    """Q_i = slope * action[0] + offset, for a (slope, offset) per critic."""
    fill(critic, [0.0] * len(outputs))
    with torch.no_grad():
        for i, (slope, offset) in enumerate(outputs):
            critic.weights[0][i, OBS, 0] = 1.0
            critic.biases[0][i, 0, 0] = 2.0  # so that no ReLU cuts
            critic.weights[1][i, 0, 0] = 1.0
            critic.weights[2][i, 0, 0] = slope
            critic.biases[2][i, 0, 0] = offset - 2 * slope


def test_td3_by_hand():
    """Noise of std 0.2 clipped to 0.5, actions clipped to 1, the minimum of two target critics."""
    agent = make_agent("td3", gamma=0.5)
    batch = [x[:4].clone() for x in make_batch()]
    fill(agent.target_actor, [math.atanh(0.7), 0.0])
    fill(agent.actor, [math.atanh(-0.5), 0.0])
    linear_in_the_action(agent.target_critic, [(1.0, 0.0), (-1.0, 1.1)])
    batch[2].copy_(torch.tensor([0.0, 0.0, 0.0, 2.0])), batch[3].copy_(torch.tensor([0, 0, 0, 1]))
    noise = torch.tensor([[1.0, 0], [5, 0], [-5, 0], [1, 0]])
    # a' is 0.9, 1 (not 1.2), 0.2 and 0.9, so the targets are half of 0.2, 0.1 and 0.2, and 2.
    fill(agent.critic, [1.0, 0.0])
    expected = (0.9**2 + 0.95**2 + 0.9**2 + 1) / 4 + (0.1**2 + 0.05**2 + 0.1**2 + 2**2) / 4
    assert agent.critic_loss(batch, noise)[0].item() == pytest.approx(expected)
    linear_in_the_action(agent.critic, [(3.0, 7.0), (0.0, 1.0)])
    loss, q_mean = agent.actor_loss(batch[0])
    assert loss.item() == -q_mean.item() == pytest.approx(-5.5)  # -(3 * -0.5 + 7)


def test_td3_targets_follow_the_actors_updates_by_tau():
    agent = make_agent("td3", policy_delay=3, tau=0.3)
    for i in range(1, 7):
        old = copy_of(agent)
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        for key, value in copy_of(agent).items():
            if key.startswith("target_"):
                net = agent.state_dict()[key.removeprefix("target_")]
                expected = 0.7 * old[key] + 0.3 * net if i % 3 == 0 else old[key]
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)


def test_td3_starts_from_pytorchs_initialisation():
    """Weights and biases as those of nn.Linear: uniform within 1 / sqrt(inputs)."""
    agent = td3.Agent(16, 64, td3.Args(n_critics=3))
    assert not list(agent.buffers())  # no batch renorm
    for net, sizes in ((agent.critic, (80, 256, 256)), (agent.actor, (16, 256, 256))):
        for k, n in enumerate(sizes):
            weight, bias = net.weights[k].detach(), net.biases[k].detach()
            assert weight.shape[-2] == n
            assert n**-0.5 * 0.95 < weight.abs().max() <= n**-0.5
            assert weight.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.1)
            assert n**-0.5 * 0.5 < bias.abs().max() <= n**-0.5


# ------------------------------ SR-SAC


def assert_fresh(agent, seen):
    """Weights that none of the seen states has, and optimisers of these parameters without
    state."""
    now = copy_of(agent)
    for key in now:
        if "weight" in key and now[key].dim() and now[key].std() > 0:  # not those of norms
            assert not any(torch.isclose(now[key], old[key]).all() for old in seen), key
    assert all(torch.equal(now[f"target_{k}"], now[k]) for k in now if k.startswith("critic."))
    for name, optimizer in vars(agent).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            assert not optimizer.state, name
    assert {*agent.critic_optimizer.param_groups[0]["params"]} == {*agent.critic.parameters()}
    assert {*agent.actor_optimizer.param_groups[0]["params"]} == {*agent.actor.parameters()}
    assert agent.alpha_optimizer.param_groups[0]["params"] == [agent.log_alpha]


def test_sr_sac_begins_anew_at_every_fifth_update():
    """The method that main has replaced stays, and its losses are those of the new networks."""
    agent, calls = make_agent("sr_sac", reset_every=5, alpha=0.7), []
    seen, backward = [copy_of(agent)], agent.backward
    agent.backward = lambda *inputs: calls.append(1) or backward(*inputs)  # critic and actor
    for i in range(1, 12):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
        assert 2 * agent.n_updates == len(calls) == 2 * i
        if i % 5 == 0:
            assert_fresh(agent, seen)
            assert agent.log_alpha.item() == pytest.approx(math.log(0.7))
        else:
            assert not torch.equal(agent.critic.weights[0], seen[-1]["critic.weights.0"])
        seen.append(copy_of(agent))
