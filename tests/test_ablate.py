"""benchmark/ablate.py: norms, activations and the like as flags of every script."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import ablate  # noqa: E402
import probe  # noqa: E402

SCRIPTS = ["crossq_sac.py", "sac_baseline.py", "crossq_td3.py"]
TINY = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 20"
TINY = f"{TINY} --total-timesteps 26 --eval-every 26 --eval-episodes 1 --device cpu --compile off".split()
FLAGS = [
    *(["--critic-norm", norm] for norm in ("brn", "bn", "ln", "none")),
    *(["--actor-norm", norm] for norm in ("brn", "bn", "ln", "none")),
    *(
        ["--activation", activation] for activation in ablate.ACTIVATIONS if activation != "relu6"
    ),  # no unit need reach 6
    ["--bootstrap-at-termination"],
    ["--products", "bfloat16"],
]


def make(script, **changes):
    """An ablated script and an agent of it."""
    script = ablate.ablate(probe.load(script))
    args = script.Args(**{"critic_width": 16, "actor_width": 12, "compile": "off"} | changes)
    torch.manual_seed(0)
    return script, script.Agent(5, 2, args)


def weights(run):
    state = torch.load(Path("runs") / run / "checkpoint.pt", weights_only=True)["agent"]
    return torch.cat([state[f"critic.weights.{k}"].flatten() for k in range(3)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_changes_the_result_and_the_default_does_not(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    assert probe.load(script).main([*TINY, "--run-name", "plain"]) == 0
    assert ablate.main([script, *TINY, "--run-name", "default"]) == 0
    plain = weights("plain")
    assert torch.equal(plain, weights("default"))
    same = (
        {"critic-norm none", "actor-norm none"}
        if script == "sac_baseline.py"
        else {"critic-norm brn", "actor-norm brn"}
    )
    same |= {"activation relu"} | ({"critic-norm bn", "actor-norm bn"} if "crossq" in script else set())  # warm-up
    for flags in FLAGS:
        name = " ".join(flags)[2:]  # a run's name is no flag
        assert ablate.main([script, *TINY, *flags, "--run-name", name]) == 0
        result = weights(name)
        assert (result.shape == plain.shape and torch.equal(result, plain)) == (name in same), name
        assert result.isfinite().all()


def test_all_together_resumed_and_compiled(tmp_path, monkeypatch, capsys):
    """With everything else than the default: a run in two halves is the run in one; the script alone refuses it."""
    monkeypatch.chdir(tmp_path)
    flags = "--critic-norm ln --actor-norm bn --activation glu --bootstrap-at-termination --compile on".split()
    assert ablate.main(["crossq_sac.py", *TINY, *flags, "--run-name", "whole"]) == 0
    assert ablate.main(["crossq_sac.py", *TINY, *flags, "--run-name", "part", "--total-timesteps", "23"]) == 0
    assert ablate.main(["crossq_sac.py", "--resume", "runs/part", "--total-timesteps", "26"]) == 0
    assert torch.equal(weights("whole"), weights("part"))
    assert Path("runs/whole/evaluations.csv").read_text() == Path("runs/part/evaluations.csv").read_text()
    with pytest.raises(SystemExit):
        probe.load("crossq_sac.py").main(["--resume", "runs/part"])
    assert "critic_norm" in capsys.readouterr().err


@pytest.mark.parametrize("activation", list(ablate.ACTIVATIONS))
@pytest.mark.parametrize("norm", ["brn", "bn", "ln", "none"])
def test_network_by_hand(norm, activation):
    """Layer norm before the activation, batch norms at the input and after it; a half-wide layer follows glu."""
    _, agent = make("crossq_sac.py", critic_norm=norm, activation=activation)
    x, mlp = torch.randn(32, 7), agent.critic.train()

    def standardise(x, on):
        return (x - x.mean(-2, keepdim=True)) / (x.var(-2, correction=0, keepdim=True) + 1e-3).sqrt() if on else x

    h = standardise(x, norm in ("brn", "bn"))
    for k in range(3):
        assert mlp.weights[k].shape[-2] == h.shape[-1]
        h = h @ mlp.weights[k] + mlp.biases[k]
        if k < 2:
            h = F.layer_norm(h, h.shape[-1:]) if norm == "ln" else h
            h = standardise(ablate.ACTIVATIONS[activation](h), norm in ("brn", "bn"))
    assert torch.allclose(mlp(x), h, atol=1e-5)
    spread = mlp.weights[1].std() * mlp.weights[1].shape[-2] ** 0.5  # LeCun: 1 / sqrt(inputs), for glu's 8 too
    assert spread.item() == pytest.approx(1.0, rel=0.2)


def test_activations_by_hand():
    x = torch.tensor([[-1.0, 7.0, 2.0, 0.5]])
    f = {name: activation(x) for name, activation in ablate.ACTIVATIONS.items()}
    assert torch.equal(f["relu6"], torch.tensor([[0.0, 6.0, 2.0, 0.5]]))
    assert torch.allclose(f["relu-over-max"], x.relu() / 7)
    assert torch.allclose(f["glu"], x[:, :2] * x[:, 2:].sigmoid())
    assert torch.allclose(f["layernormed-relu"].mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.equal(f["sin"], x.sin()) and torch.equal(f["tanh"], x.tanh()) and torch.equal(f["elu"], F.elu(x))


def test_batch_norm_momentum_and_warm_up_reach_every_layer():
    _, agent = make("sac_baseline.py", critic_norm="brn", actor_norm="bn", bn_momentum=0.9, brn_warmup=7)
    assert all(n.momentum == 0.9 and n.warmup == 7 for n in agent.critic.norms)
    assert all(n.warmup == float("inf") for n in agent.actor.norms)


@pytest.mark.parametrize("stats", ["own", "live"])
def test_target_network_with_batch_statistics(stats):
    """SAC with a normalised critic: q in training mode, its target in eval mode, statistics averaged or borrowed."""
    _, agent = make("sac_baseline.py", critic_norm="brn", target_stats=stats, tau=0.25)
    rng = torch.Generator().manual_seed(0)
    batch = [torch.randn(16, 5), torch.rand(16, 2) * 2 - 1, torch.randn(16), torch.zeros(16), torch.randn(16, 5)]
    before = agent.target_critic.norms[0].running_mean.clone()
    for n in (1, 2, 3):
        agent.update(batch, rng)
        live, target = agent.critic.norms[0], agent.target_critic.norms[0]
        assert live.steps == n and target.steps == 0  # one training forward per update; none of the target
        expected = live.running_mean if stats == "live" else before.lerp(live.running_mean, 0.25)
        assert torch.allclose(target.running_mean, expected)
        before = expected.clone()


def test_bootstrap_at_termination_stores_no_end():
    script, agent = make("crossq_sac.py")
    buffer = script.ReplayBuffer(4, 1, 1, torch.device("cpu"))
    for flag in (False, True):
        script.ReplayBuffer.bootstrap_at_termination = flag
        buffer.add([0.0], [0.0], 1.0, True, [0.0])
    assert buffer.rows[:2, 3].tolist() == [1.0, 0.0]


def test_help_and_errors(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert ablate.main(["--critic-norm", "ln"]) == 2
    assert ablate.main(["crossq_sac.py", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--critic-norm" in out and "figures 8, 9, 13" in out and "CrossQ small" in out
    with pytest.raises(SystemExit) as e:
        ablate.main(["crossq_sac.py", *TINY, "--activation", "glu", "--critic-width", "15"])
    assert e.value.code == 2 and "even --critic-width" in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_products(compiled):
    """Factors as PyTorch rounds them; products and gradient of rounded factors. Compiled, nothing is left out."""
    x = torch.cat([torch.randn(1000) * 10.0**k for k in range(-30, 30, 7)] + [torch.zeros(1)])
    rounded = torch.compile(ablate.to_bfloat16) if compiled else ablate.to_bfloat16
    assert torch.equal(rounded(x), x.bfloat16().float()) and not torch.equal(rounded(x), x)

    x, w, g = torch.randn(2, 7, 5), torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    product = torch.compile(ablate.Bfloat16Product.apply) if compiled else ablate.Bfloat16Product.apply
    y = product(a, b)
    y.backward(g)
    x, w, g = (t.bfloat16().double() for t in (x, w, g))
    torch.testing.assert_close(y, (x @ w).float())
    torch.testing.assert_close((a.grad, b.grad), ((g @ w.mT).float(), (x.mT @ g).float()))


@pytest.mark.parametrize("script, flags, message", [
    ("crossq_sac.py", ["--bn-momentum", "1.5"], "--bn-momentum is 1.5"),
    ("crossq_sac.py", ["--target-stats", "live"], "--target-stats is of"),
    ("sac_baseline.py", ["--target-stats", "live"], "--target-stats is of"),
])  # fmt: skip
def test_wrong_flags(tmp_path, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main([script, *TINY, *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err and not Path("runs").exists()
