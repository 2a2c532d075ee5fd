"""benchmark/ablate.py: norms, activations and the like as flags of every script."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_each_device

sys.path.insert(0, str(ROOT / "benchmark"))

import ablate  # noqa: E402
import probe  # noqa: E402

SCRIPTS = ["crossq_sac.py", "sac_baseline.py", "crossq_td3.py"]
WN = "crossq_wn_highutd.py"
TINY = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
TINY += " --learning-starts 20 --total-timesteps 26 --eval-every 26 --eval-episodes 1"
TINY = f"{TINY} --device cpu --compile off".split()
FLAGS = [
    *(["--critic-norm", norm] for norm in ("brn", "bn", "ln", "none")),
    *(["--actor-norm", norm] for norm in ("brn", "bn", "ln", "none")),
    *(["--activation", name] for name in ablate.ACTIVATIONS if name != "relu6"),  # none reaches 6
    ["--bootstrap-at-termination"],
    ["--products", "float32"],
    ["--products", "bfloat16"],
    ["--products", "tf32"],
    ["--q-aggregation", "mean"],
    ["--max-grad-norm", "0.1"],
]
SOFT_FLAGS = [["--temperature", "softplus"]]
CROSSQ_FLAGS = [*SOFT_FLAGS, ["--no-entropy-in-target"], ["--replay", "prioritized"]]
MORE_FLAGS = {"sac_baseline.py": SOFT_FLAGS, "crossq_sac.py": CROSSQ_FLAGS, "crossq_td3.py": []}
WN_FLAGS = [
    *(["--weight-norm", mode] for mode in ("project", "soft", "none", "output")),
    ["--decay-norms"],
    ["--lr-end", "0.1"],
]
OWN = {"activation relu", "products float32", "weight-norm project"}  # what the scripts do
OWN_NORMS = {  # in the warm-up, batch renorm is batch norm
    "sac_baseline.py": {"critic-norm none", "actor-norm none"},
    "crossq_sac.py": {"critic-norm brn", "critic-norm bn", "actor-norm brn", "actor-norm bn"},
    "crossq_td3.py": {"critic-norm brn", "critic-norm bn", "actor-norm brn", "actor-norm bn"},
    WN: set(),
}


def make(script, **changes):
    """An agent of an ablated script."""
    parts = ablate.ablate(probe.load(script))
    args = parts["Args"](**{"critic_width": 16, "actor_width": 12, "compile": "off"} | changes)
    torch.manual_seed(0)
    return parts["Agent"](5, 2, args)


def make_batch(ended=0.0):
    generator = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, 16, 5, generator=generator)
    action = torch.rand(16, 2, generator=generator) * 2 - 1
    return obs, action, torch.randn(16, generator=generator), torch.full((16,), ended), next_obs


def state(run):
    """Networks and optimisers of a run, and its evaluations."""
    checkpoint = torch.load(Path("runs", run, "checkpoint.pt"), weights_only=True)
    evaluations = Path("runs", run, "evaluations.csv").read_text()
    return checkpoint["agent"], checkpoint["optimizers"], evaluations


def weights(run):
    agent = state(run)[0]
    return torch.cat([agent[f"critic.weights.{k}"].flatten() for k in range(3)])


def same(a, b):
    """The same structure, and bit by bit the same tensors in it."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("script", [*SCRIPTS, WN])
def test_every_flag_changes_the_result_and_the_default_does_not(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    assert probe.load(script).main([*TINY, "--run-name", "plain"]) == 0
    assert ablate.main([script, *TINY, "--run-name", "default"]) == 0
    (agent, optimizers, evaluations), default = state("plain"), state("default")
    assert same(agent, default[0]) and evaluations == default[2]
    # With the rates' start, which may fall, the optimisers of CrossQ + WN have one entry more.
    assert script == WN or same(optimizers, default[1])
    plain = weights("plain")
    for flags in WN_FLAGS if script == WN else FLAGS + MORE_FLAGS[script]:
        name = " ".join(flags)[2:]  # a run's name is no flag
        assert ablate.main([script, *TINY, *flags, "--run-name", name]) == 0
        result = weights(name)
        unchanged = result.shape == plain.shape and torch.equal(result, plain)
        assert unchanged == (name in OWN | OWN_NORMS[script]), name
        assert result.isfinite().all()


def test_all_together_resumed_and_compiled(tmp_path, monkeypatch):
    """With everything else than the default: a run in two halves is the run in one."""
    monkeypatch.chdir(tmp_path)
    flags = "--critic-norm ln --actor-norm bn --activation glu --bootstrap-at-termination"
    flags = f"{flags} --products tf32 --compile on".split()
    ablated = ["crossq_sac.py", *TINY, *flags]
    assert ablate.main([*ablated, "--run-name", "whole"]) == 0
    assert ablate.main([*ablated, "--run-name", "part", "--total-timesteps", "23"]) == 0
    assert ablate.main(["crossq_sac.py", "--resume", "runs/part", "--total-timesteps", "26"]) == 0
    assert same(state("whole"), state("part"))


def test_replay_and_targets_resumed(tmp_path, monkeypatch):
    """Priorities are in the checkpoint, and the largest so far."""
    monkeypatch.chdir(tmp_path)
    flags = "--replay prioritized --no-entropy-in-target --temperature softplus --max-grad-norm 0.5"
    ablated = ["crossq_sac.py", *TINY, *flags.split(), "--q-aggregation", "mean"]
    ablated += ["--buffer-size", "22"]  # it has wrapped at the end
    script = probe.load("crossq_sac.py")
    parts = ablate.ablate(script)

    class Killed(parts["Agent"]):
        def act(self, obs, rng=None):
            if self.n_updates == 5:
                raise InterruptedError
            return super().act(obs, rng)

    assert ablate.main([*ablated, "--run-name", "whole"]) == 0
    arguments = [*ablated[1:], "--checkpoint-every", "23", "--run-name", "part"]
    with pytest.raises(InterruptedError):
        script.main(arguments, **parts | {"Agent": Killed})
    assert ablate.main(["crossq_sac.py", "--resume", "runs/part"]) == 0
    assert same(state("whole"), state("part"))


def test_weight_ablations_resumed(tmp_path, monkeypatch):
    """The rates too go on where they were."""
    monkeypatch.chdir(tmp_path)
    flags = "--weight-norm output --decay-norms --lr-end 0.1 --checkpoint-every 24".split()
    assert ablate.main([WN, *TINY, *flags, "--run-name", "whole"]) == 0
    script = probe.load(WN)
    parts = ablate.ablate(script)

    class Killed(parts["Agent"]):
        def act(self, obs, rng=None):
            if self.n_updates == 5 * 5:
                raise InterruptedError
            return super().act(obs, rng)

    with pytest.raises(InterruptedError):
        script.main([*TINY, *flags, "--run-name", "part"], Args=parts["Args"], Agent=Killed)
    assert ablate.main([WN, "--resume", "runs/part"]) == 0
    assert same(state("whole"), state("part"))


def test_a_run_is_named_after_program_and_script(tmp_path, monkeypatch, capsys):
    """It goes on through ablate.py and that script alone."""
    monkeypatch.chdir(tmp_path)
    for script in ("crossq_sac.py", WN):
        assert ablate.main([script, *TINY]) == 0
    runs = {path.name.rpartition("__")[0]: path for path in Path("runs").iterdir()}
    environment = "tiny_envs_Terminated-v0"
    ablated = f"{environment}__ablate_crossq_sac__1"
    assert {*runs} == {ablated, f"{environment}__ablate_crossq_wn_highutd__1"}
    plain = probe.load("crossq_sac.py").main
    assert plain([*TINY, "--run-name", "plain"]) == 0

    for flag in ("--resume", "--evaluate"):
        run = [flag, str(runs[ablated])]
        refusing = {
            "crossq_sac": lambda run=run: plain(run),
            "ablate_crossq_td3": lambda run=run: ablate.main(["crossq_td3.py", *run]),
        }
        for program, resume in refusing.items():
            with pytest.raises(SystemExit) as end:
                resume()
            message = capsys.readouterr().err
            assert end.value.code == 2 and f"of ablate_crossq_sac, not of {program}" in message
        assert ablate.main(["crossq_sac.py", *run]) == 0
        with pytest.raises(SystemExit) as end:
            ablate.main(["crossq_sac.py", flag, "runs/plain"])
        message = capsys.readouterr().err
        assert end.value.code == 2 and "of crossq_sac, not of ablate_crossq_sac" in message


def test_probed_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "PAIRS", 10)
    ablated = ["crossq_sac.py", *TINY, "--critic-norm", "ln"]
    assert ablate.main([*ablated, "--run-name", "plain"]) == 0
    assert ablate.main(["--probe", *ablated, "--run-name", "probed"]) == 0
    assert same(state("plain"), state("probed")) and not Path("runs/plain/probe.csv").exists()
    assert "critic/2/weight_norm" in Path("runs/probed/probe.csv").read_text()


@pytest.mark.parametrize("activation", list(ablate.ACTIVATIONS))
@pytest.mark.parametrize("norm", ["brn", "bn", "ln", "none"])
def test_network_by_hand(norm, activation):
    """Layer norm before the activation, batch norms at the input and after it; a half-wide layer
    follows glu."""
    agent = make("crossq_sac.py", critic_norm=norm, activation=activation)
    x, mlp = torch.randn(32, 7), agent.critic.train()

    def standardise(x):
        if norm not in ("brn", "bn"):
            return x
        var = x.var(-2, correction=0, keepdim=True)
        return (x - x.mean(-2, keepdim=True)) / (var + 1e-3).sqrt()

    h = standardise(x)
    for k in range(3):
        assert mlp.weights[k].shape[-2] == h.shape[-1]
        h = h @ mlp.weights[k] + mlp.biases[k]
        if k < 2:
            h = F.layer_norm(h, h.shape[-1:]) if norm == "ln" else h
            h = standardise(ablate.ACTIVATIONS[activation](h))
    assert torch.allclose(mlp(x), h, atol=1e-5)
    n_in = mlp.weights[1].shape[-2]  # LeCun's std is its inverse root, for glu's 8 too
    assert (mlp.weights[1].std() * n_in**0.5).item() == pytest.approx(1.0, rel=0.2)


def test_activations_by_hand():
    x = torch.tensor([[-1.0, 7.0, 2.0, 0.5]])
    f = {name: activation(x) for name, activation in ablate.ACTIVATIONS.items()}
    assert torch.equal(f["relu6"], torch.tensor([[0.0, 6.0, 2.0, 0.5]]))
    assert torch.allclose(f["relu-over-max"], x.relu() / 7)
    assert torch.allclose(f["glu"], x[:, :2] * x[:, 2:].sigmoid())
    assert torch.allclose(f["layernormed-relu"].mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.equal(f["sin"], x.sin())
    assert torch.equal(f["tanh"], x.tanh())
    assert torch.equal(f["elu"], F.elu(x))


@pytest.mark.parametrize("script", ["sac_baseline.py", "crossq_sac.py"])
def test_batch_norm_momentum_and_warm_up_reach_every_layer(script):
    norms = {"critic_norm": "brn", "actor_norm": "bn"}
    agent = make(script, bn_momentum=0.9, brn_warmup=7, **norms)
    assert [(n.momentum, n.warmup) for n in agent.critic.norms] == [(0.9, 7)] * 3
    assert [(n.momentum, n.warmup) for n in agent.actor.norms] == [(0.9, float("inf"))] * 3


@pytest.mark.parametrize("stats", ["own", "live"])
def test_target_network_with_batch_statistics(stats):
    """SAC with a normalised critic: q in training mode, its target in eval mode, statistics
    averaged or borrowed."""
    agent = make("sac_baseline.py", critic_norm="brn", target_stats=stats, tau=0.25)
    rng = torch.Generator().manual_seed(0)
    before = agent.target_critic.norms[0].running_mean.clone()
    for n in (1, 2, 3):
        agent.update(make_batch(), rng)
        live, target = agent.critic.norms[0], agent.target_critic.norms[0]
        assert live.steps == n and target.steps == 0  # one training forward, none of the target's
        expected = live.running_mean if stats == "live" else before.lerp(live.running_mean, 0.25)
        assert torch.allclose(target.running_mean, expected)
        before = expected.clone()


def test_modes_of_a_normalised_sac():
    """The actor's statistics move in its own updates alone; playing is in eval mode."""
    agent = make("sac_baseline.py", actor_norm="bn", policy_delay=2)
    rng = torch.Generator().manual_seed(0)
    for n in range(1, 5):
        agent.update(make_batch(), rng)
        assert [norm.steps.item() for norm in agent.actor.norms] == [n // 2] * 3
    alone = agent.act(make_batch()[0][0].numpy())
    agent.actor.eval()
    mean, _ = agent.actor(make_batch()[0]).chunk(2, -1)
    assert np.allclose(alone, mean[0].tanh().detach().numpy(), atol=1e-6)
    assert [norm.steps.item() for norm in agent.actor.norms] == [2] * 3


def test_bootstrap_at_termination():
    draws = {"noise": torch.randn(16, 2)}
    losses = {}
    for flag in (False, True):
        agent = make("crossq_sac.py", bootstrap_at_termination=flag)
        losses[flag] = [agent.critic_loss(make_batch(ended), draws)[0] for ended in (0.0, 1.0)]
    assert losses[False][0] != losses[False][1]
    assert losses[True][0] == losses[True][1] == losses[False][0]


# ------------------------------------------------------------------------------------ CrossQ + WN


def test_output_projects_the_kernel_alone():
    """The output layer's bias is neither in the norm nor scaled; hidden layers as ever."""
    agent = make(WN, weight_norm="output")
    for net in (agent.critic, agent.actor):
        assert torch.allclose(net.weights[2].norm(dim=-2), torch.tensor(1.0))  # from the start
        with torch.no_grad():
            for parameter in (*net.weights, *net.biases):
                parameter.mul_(3).add_(0.5)
        bias, direction = net.biases[2].clone(), F.normalize(net.weights[2], dim=-2)
        net.project()
        assert torch.equal(net.biases[2], bias)
        assert torch.allclose(net.weights[2], direction)
        for k in range(2):
            neurons = torch.cat([net.weights[k], net.biases[k]], -2)
            assert torch.allclose(neurons.norm(dim=-2), torch.tensor(1.0))


@pytest.mark.parametrize("mode, projected", [("project", True), ("soft", False), ("none", False)])
def test_other_modes_leave_the_output_layer(mode, projected):
    agent = make(WN, weight_norm=mode)
    before = agent.critic.weights[2].detach().clone()
    with torch.no_grad():
        agent.critic.weights[0].mul_(3)
    agent.critic.project()
    assert torch.equal(agent.critic.weights[2], before)
    neurons = torch.cat([agent.critic.weights[0], agent.critic.biases[0]], -2)
    assert torch.allclose(neurons.norm(dim=-2), torch.tensor(1.0)) == projected


def test_the_rates_fall_by_each_optimisers_own_steps(tmp_path, monkeypatch):
    """At policy delay 3, 3e-4 falls to 3e-5 for the critic, to 2.1e-4 for actor and temperature."""
    monkeypatch.chdir(tmp_path)
    script = probe.load(WN)
    parts = ablate.ablate(script)
    rates = {"critic": [], "actor": [], "alpha": []}

    class Recorded(parts["Agent"]):
        def make_optimizers(self):
            optimizers = super().make_optimizers()
            for name, optimizer in optimizers.items():
                optimizer.register_step_pre_hook(
                    lambda o, *_, name=name: rates[name].append([g["lr"] for g in o.param_groups])
                )
            return optimizers

    # 31 environment steps are 16 of the agent, of which 8 come with 3 updates each.
    flags = "--lr-end 0.1 --action-repeat 2 --total-timesteps 31 --learning-starts 8 --utd 3"
    flags += " --critic-lr 3e-4 --actor-lr 3e-4 --alpha-lr 3e-4 --policy-delay 3"
    script.main([*TINY, *flags.split()], Args=parts["Args"], Agent=Recorded)
    ends = {"critic": (3e-5, 24), "actor": (2.1e-4, 8), "alpha": (2.1e-4, 8)}
    for name, (end, steps) in ends.items():
        linear = np.linspace(3e-4, end, steps, endpoint=False)
        assert len(rates[name]) == steps
        assert np.allclose(np.array(rates[name]), linear[:, None], rtol=1e-9), name


# --------------------------------------------------------------------- targets, replay, temperature


def critic_error(agent, batch, noise, entropy=True, aggregate=lambda q: q.min(0).values):
    """q - target of CrossQ, written down again."""
    obs, action, reward, terminated, next_obs = batch
    agent.actor.eval()
    with torch.no_grad():
        next_action, log_prob = agent.policy(next_obs, noise)
    agent.critic.train()
    rows = torch.cat([torch.cat([obs, action], 1), torch.cat([next_obs, next_action], 1)])
    q, next_q = agent.critic(rows)[..., 0].split(16, 1)
    value = aggregate(next_q) - entropy * agent.log_alpha.exp() * log_prob
    return q - (reward + 0.99 * (1 - terminated) * value).detach()


@pytest.mark.parametrize("flags", [
    {"entropy_in_target": False},
    {"q_aggregation": "mean"},
    {"q_aggregation": "mean", "entropy_in_target": False},
])  # fmt: skip
def test_target_by_formula(flags):
    agent, again, noise = make("crossq_sac.py", **flags), make("crossq_sac.py"), torch.ones(16, 2)
    how = {"entropy": flags.get("entropy_in_target", True)}
    if "q_aggregation" in flags:
        how["aggregate"] = lambda q: q.mean(0)
    expected = 0.5 * critic_error(again, make_batch(), noise, **how).square().mean(1).sum()
    loss, _ = agent.critic_loss(make_batch(), {"noise": noise})
    torch.testing.assert_close(loss, expected)
    plain, _ = again.critic_loss(make_batch(), {"noise": noise})
    assert not torch.isclose(loss, plain)


def test_actor_maximises_the_mean():
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert make("crossq_sac.py", q_aggregation="mean").actor_q(q).tolist() == [2.0, 3.5]
    assert make("crossq_sac.py").actor_q(q).tolist() == [1.0, 2.0]


def test_softplus_begins_at_alpha_and_is_what_is_learnt():
    agent = make("sac_baseline.py", temperature="softplus", alpha=0.3)
    assert agent.alpha().item() == pytest.approx(0.3, rel=1e-6)
    loss, _ = agent.alpha_loss(torch.tensor(1.0))  # entropy 1, target -2
    (gradient,) = torch.autograd.grad(loss, agent.log_alpha)
    sigmoid = 1 - np.exp(-0.3)  # softplus' slope, where it is 0.3
    assert gradient.item() == pytest.approx(3 * sigmoid, rel=1e-5)
    assert make("sac_baseline.py", temperature="softplus", alpha=1000.0).alpha().item() == 1000


def test_gradients_are_cut_to_a_length():
    batch, draws = make_batch(), {"noise": torch.zeros(16, 2)}
    lengths, gradients = {}, {}
    for longest in (0.0, 0.05, 1e6):
        agent = make("crossq_sac.py", max_grad_norm=longest)
        gradients[longest], _ = agent.gradients(
            agent.critic_loss, [*agent.critic.parameters()], batch, draws
        )
        lengths[longest] = torch.cat([g.flatten() for g in gradients[longest]]).norm().item()
    assert lengths[0.0] > 0.05 and lengths[0.05] == pytest.approx(0.05, rel=1e-5)
    assert all(map(torch.equal, gradients[0.0], gradients[1e6]))
    share = 0.05 / lengths[0.0]
    torch.testing.assert_close(gradients[0.05], [g * share for g in gradients[0.0]])


def prioritized(rows=4):
    parts = ablate.ablate(probe.load("crossq_sac.py"))
    args = parts["Args"](replay="prioritized", buffer_size=8)
    buffer = parts["ReplayBuffer"](1, 1, args, torch.device("cpu"))
    for k in range(rows):
        buffer.add([k], [0.5], 10 * k, k == 3, [k + 1])
    return buffer


def test_prioritized_replay_by_hand():
    buffer, rng = prioritized(), torch.Generator().manual_seed(0)
    assert buffer.rows[:4, -1].tolist() == [1, 1, 1, 1]  # all are new
    buffer.prioritize(torch.tensor([0, 2]), torch.tensor([3.0, 0.0]))
    priorities = [3**0.6, 1, 1e-6**0.6, 1]
    assert buffer.rows[:4, -1].tolist() == pytest.approx(priorities, rel=1e-5)
    buffer.add([4], [0.5], 40, False, [5])
    priorities.append(3**0.6)  # as the largest so far
    batch = buffer.sample(20_000, rng)
    obs, action, reward, terminated, next_obs, probability, index, same_buffer = batch
    assert same_buffer is buffer
    for k, priority in enumerate(priorities):
        mine = index == k
        share = priority / sum(priorities)
        assert mine.float().mean().item() == pytest.approx(share, abs=0.01)
        torch.testing.assert_close(probability[mine], torch.full_like(probability[mine], share))
    assert torch.equal(obs[:, 0], index.float()) and torch.equal(next_obs[:, 0], index + 1.0)
    assert torch.equal(reward, 10.0 * index) and torch.equal(terminated, (index == 3).float())
    assert (action == 0.5).all() and next_obs.shape == (20_000, 1)


def test_prioritized_update_by_formula():
    """The loss is weighted by importance, and the errors become priorities."""
    args = {"replay": "prioritized", "total_timesteps": 5100, "policy_delay": 9}
    agent, again = make("crossq_sac.py", **args), make("crossq_sac.py")
    agent.n_updates = 50  # of 100, so beta is 0.7
    batch, rng = make_batch(), torch.Generator().manual_seed(2)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))
    probability = torch.linspace(0.01, 0.2, 16)
    seen = {}

    class Buffer:
        size = 40

        def prioritize(self, index, error):
            seen.update(zip(index.tolist(), error.tolist()))

    error = critic_error(again, batch, noise)
    weight = (1 / (40 * probability)) ** 0.7
    weight = weight / weight.max()
    expected = (0.5 * weight * error**2).sum() / 16
    info = agent.update((*batch, probability, torch.arange(16), Buffer()), rng)
    torch.testing.assert_close(info["losses/critic"], expected.detach())
    torch.testing.assert_close([*seen.values()], error.abs().mean(0).tolist())
    assert all(value.numel() == 1 for value in info.values())
    gradients = torch.autograd.grad(expected, [*again.critic.parameters()])
    for parameter, gradient in zip(agent.critic.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)


# ----------------------------------------------------------------------------- arguments and more


@pytest.mark.parametrize("script, flags", [
    ("crossq_sac.py", "--bn-momentum 0 --brn-warmup 0"),
    ("sac_baseline.py", "--critic-norm brn --bn-momentum 0 --brn-warmup 0"),
    ("crossq_sac.py", "--bn-momentum 1"),
    (WN, "--lr-end 0"),
    (WN, "--lr-end 1"),
])  # fmt: skip
def test_bounds_are_values_too(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    assert ablate.main([script, *TINY, *flags.split(), "--run-name", "run"]) == 0
    assert weights("run").isfinite().all()


@pytest.mark.parametrize("script, flags, message", [
    ("crossq_sac.py", "--bn-momentum 1.5", "--bn-momentum is 1.5 but must be >= 0 and <= 1"),
    ("crossq_td3.py", "--brn-warmup -1", "--brn-warmup is -1"),
    ("crossq_td3.py", "--temperature softplus", "no temperature"),
    ("crossq_sac.py", "--max-grad-norm -1", "--max-grad-norm is -1"),
    ("sac_baseline.py", "--brn-warmup -1", "--brn-warmup is -1"),
    (WN, "--lr-end -0.1", "--lr-end is -0.1"),
    (WN, "--lr-end 1.1", "--lr-end is 1.1 but must be >= 0 and <= 1"),
    ("crossq_sac.py", "--activation glu --critic-width 15", "glu needs an even --critic-width"),
    ("crossq_sac.py", "--target-stats live", "--target-stats is of"),
    ("crossq_sac.py", "--target-stats live --critic-norm bn", "--target-stats is of"),
    ("sac_baseline.py", "--target-stats live", "--target-stats is of"),
    ("sac_baseline.py", "--target-stats live --critic-norm ln", "--target-stats is of"),
])  # fmt: skip
def test_wrong_flags(tmp_path, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main([script, *TINY, *flags.split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert ablate.main(["benchmark/algorithms/redq.py"]) == 2
    assert "redq.py is not one of the four scripts" in capsys.readouterr().err
    told = {
        "crossq_sac.py": ["--critic-norm", "figures 9, 10, 13", "CrossQ small", "table 1"],
        "sac_baseline.py": ["--brn-warmup", "before batch renorm", "--target-stats"],
        WN: ["--weight-norm", "--decay-norms", "fall by 1 / policy_delay of that"],
    }
    for script, texts in told.items():
        with pytest.raises(SystemExit) as end:
            ablate.main([script, "--help"])
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert end.value.code == 0 and all(text in out for text in texts)


def to_bfloat16(x):
    return x.bfloat16().float()


def to_tf32(x):
    """Bit by bit: the nearest with 10 stored bits of 23; of two as near, the even one."""
    bits = x.view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


@on_each_device
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind, reference", [("bfloat16", to_bfloat16), ("tf32", to_tf32)])
def test_rounded_products(compiled, kind, reference, device):
    """Factors as the hardware rounds them; products and gradient of rounded factors. Compiled,
    nothing is left out."""
    bits = ablate.BITS[kind]
    rounded = torch.compile(ablate.rounded) if compiled else ablate.rounded
    significands = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    scales = torch.cat([torch.randn(1000) * 10.0**k for k in range(-30, 30, 7)] + [torch.zeros(1)])
    for x in (significands, -significands, scales):  # 1.0 to 2.0, each that there is
        x = x.to(device)
        assert torch.equal(rounded(x, bits), reference(x)) and not torch.equal(rounded(x, bits), x)

    x, w, g = torch.randn(2, 7, 5), torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    product = ablate.RoundedProduct.apply
    y = (torch.compile(product) if compiled else product)(a, b, bits)
    y.backward(g)
    x, w, g = (reference(t).double() for t in (x, w, g))
    torch.testing.assert_close(y, (x @ w).float())
    torch.testing.assert_close((a.grad, b.grad), ((g @ w.mT).float(), (x.mT @ g).float()))


def patched(source):
    """Assignments to attributes of what the source imports or loads; `script` is such a name, the
    standard library is not."""
    nodes = [*ast.walk(ast.parse(source))]
    foreign, targets, found = {"script"}, [], []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", None) or alias.name
                if module.split(".")[0] not in sys.stdlib_module_names:
                    foreign.add((alias.asname or alias.name).split(".")[0])
        if isinstance(node, ast.Assign):
            targets += node.targets
            loads = isinstance(node.value, ast.Call) and ast.unparse(node.value.func)
            if loads and loads.split(".")[-1] in ("load", "import_module"):
                foreign |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets.append(node.target)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets.append(ast.Attribute(node.args[0], "", ast.Store()))
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                found.append(ast.unparse(part))
    return [name for name in found if name.split(".")[0] in foreign]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmark").rglob("*.py")), ids=lambda p: p.name)
def test_no_program_assigns_to_another_modules_names(path):
    assert patched(path.read_text()) == []


@pytest.mark.parametrize("source", [
    "script.train = f",
    "script.Args, script.MLP = A, M",
    "script.ReplayBuffer.add = add",
    "import crossq_sac\ncrossq_sac.COUNT += 1",
    "module = probe.load(path)\nmodule.Agent: type = A",
    "from crossq_sac import Agent\nsetattr(Agent, 'update', f)",
])  # fmt: skip
def test_such_assignments_are_found(source):
    assert len(patched(source)) >= 1
