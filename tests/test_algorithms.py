"""The programs of benchmark/algorithms: each is the algorithm whose name it bears, resumes exactly
and has the command line of its script.

TD3 is compared with stable-baselines3's, the others with formulas written down a second time.
"""

import collections
import importlib
import inspect
import itertools
import math
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from test_run import (
    RUN,
    TINY,
    another,
    assert_identical,
    evaluations,
    flag,
    kill_at_random,
    load,
    refused,
    restored,  # noqa: F401
)
from test_variants import (
    ACTIONS,
    BATCH,
    GAMMA,
    OBS,
    assert_gradients,
    copy_of,
    forward,
    make_agent,
    make_batch,
    noise,
    polyak,
    same,
    sample,
)

import crossq_sac
import crossq_td3
import crossq_wn_highutd
import sac_baseline

FOLDER = "benchmark/algorithms"
sys.path.append(str(ROOT / FOLDER))


class Program(NamedTuple):
    script: types.ModuleType  # that it extends
    short: str = ""  # flags of its short runs
    few: str = ""  # flags with which fifteen steps show what each flag does
    hidden: tuple = ()  # fields of the script's Args that are no flags of it
    mujoco: str = "Hopper-v4"  # a task whose returns depend on the policy


PROGRAMS = {
    "redq": Program(sac_baseline),
    "droq": Program(sac_baseline, few="--dropout 0.2"),
    "td3": Program(crossq_td3, hidden=("brn_warmup",)),
    "sr_sac": Program(sac_baseline, short="--reset-every 150", few="--reset-every 12"),
    "bro": Program(sac_baseline, short="--n-quantiles 7", few="--weight-decay 0.1 --dual-lr 0.1"),
    "xqc": Program(crossq_wn_highutd, hidden=("weight_decay",)),
    "crossq_discrete": Program(
        crossq_sac,
        short="--env-id tiny_envs:Discrete-v0",
        few="--brn-warmup 3",
        mujoco="CartPole-v1",
    ),
}
redq, droq, td3, sr_sac = map(importlib.import_module, ("redq", "droq", "td3", "sr_sac"))
LONG = ["--total-timesteps", 280, "--eval-every", 140]  # more flags of the runs that are killed


@pytest.fixture
def program(request, tmp_path, monkeypatch):
    """program(*arguments) runs it in this process, in tmp_path, and returns the exit code;
    program.parse(*arguments) only reads them; program.short are those of a short run."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return run.module.main([str(a) for a in arguments])

    def parse(*arguments):
        arguments = [str(a) for a in arguments]
        return run.script.parse_args(arguments, run.module.Args, run.module.Agent)[0]

    run.name, run.file, run.parse = request.param, f"{FOLDER}/{request.param}.py", parse
    run.module, about = importlib.import_module(run.name), PROGRAMS[run.name]
    run.script, run.hidden, run.few = about.script, RUN | {*about.hidden}, about.few.split()
    run.short = [*TINY, "--utd", 3, "--policy-delay", 2, *about.short.split()]
    return run


every_program = pytest.mark.parametrize("program", PROGRAMS, indirect=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(program) is the folder of a run that nothing interrupted, made once for each."""
    made = {}

    def make(program):
        if program.name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(program.name))
                assert program(*program.short, *LONG, "--run-name", "whole") == 0
                made[program.name] = Path("runs/whole").resolve()
        return made[program.name]

    return make


def small_agent(module, **changes):
    """In float32, as in a run."""
    torch.manual_seed(0)
    args = module.Args(**{"critic_width": 16, "actor_width": 16} | changes)
    return module.Agent(OBS, ACTIONS, args)


def update(agent, seed):
    batch = [x.to(next(agent.parameters()).dtype) for x in make_batch(seed)]
    return agent.update(batch, torch.Generator().manual_seed(seed))


def assert_loss(loss, inputs, expected):
    value, info = loss(*inputs)
    expected = torch.as_tensor(expected, dtype=torch.float64).item()
    assert value.item() == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert any(scalar is value for scalar in info.values())


def fill(net, outputs):
    """A network whose outputs are these numbers, whatever comes in."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.biases[2].copy_(torch.tensor(outputs, dtype=torch.float64).view_as(net.biases[2]))


# ------------------------------------------------------------------------------------ every program

COMMON = {"critic_width": 256, "actor_width": 256, "n_critics": 2, "adam_beta1": 0.9, "policy_delay": 1, "tau": 0.005,
          "utd": 1, "batch_size": 256, "buffer_size": 1_000_000, "learning_starts": 5000, "gamma": 0.99,
          "action_repeat": 1, "matmul_precision": "highest"}  # fmt: skip
SAC = COMMON | {"critic_lr": 1e-3, "actor_lr": 1e-3, "alpha_lr": 1e-3, "alpha": 1.0}
SLOW = {"critic_lr": 3e-4, "actor_lr": 3e-4}
DEFAULTS = {
    "redq": SAC | {"n_critics": 10, "n_target_critics": 2, "utd": 20, "policy_delay": 20},
    "droq": SAC | {"dropout": 0.01, "utd": 20, "policy_delay": 20},
    "td3": COMMON | SLOW | {"policy_delay": 2, "exploration_noise": 0.1, "target_noise": 0.2, "target_noise_clip": 0.5},
    "sr_sac": SAC | SLOW | {"alpha_lr": 3e-4, "utd": 32, "learning_starts": 10_000, "entropy_factor": 0.5,
                            "reset_every": 2_560_000},
    "bro": SAC | SLOW | {"alpha_lr": 3e-4, "dual_lr": 3e-5, "weight_decay": 1e-4, "critic_width": 512, "n_quantiles": 100,
                         "utd": 10, "batch_size": 128, "learning_starts": 2500, "entropy_factor": 0.5, "fast": False},
    "xqc": SAC | SLOW | {"alpha_lr": 3e-4, "lr_end": 0.1, "critic_width": 512, "utd": 2, "policy_delay": 3,
                         "gamma": 0.995, "alpha": 0.01, "entropy_factor": 0.5},
    "crossq_discrete": SAC | SLOW | {"alpha_lr": 3e-4, "adam_beta1": 0.5, "policy_delay": 3, "brn_warmup": 100_000,
                                     "entropy_factor": 0.6},
}  # fmt: skip
del DEFAULTS["xqc"]["adam_beta1"], DEFAULTS["crossq_discrete"]["tau"]
DMC_LR = {"critic_lr": 8e-4, "actor_lr": 8e-4, "alpha_lr": 8e-4}
SUITES = {
    "Hopper-v4": {},
    "dm_control/walker-walk-v0": {
        "all": {"action_repeat": 2},
        "redq": DMC_LR,
        "droq": DMC_LR,
        "bro": {"action_repeat": 1},
        "xqc": {"gamma": 0.99},
        "crossq_discrete": DMC_LR | {"policy_delay": 1},
    },
    "myoHandReachRandom-v0": {
        "all": {"action_repeat": 2, "gamma": 0.95},
        "bro": {"action_repeat": 1, "gamma": 0.99},
    },
}


@pytest.mark.parametrize("env_id", SUITES)
@every_program
def test_defaults(program, env_id):
    """Every hyper-parameter on MuJoCo, DeepMind Control and MyoSuite."""
    expected = DEFAULTS[program.name]
    for name in ("all", program.name):
        expected = expected | SUITES[env_id].get(name, {})
    args = vars(program.parse("--env-id", env_id))
    assert {name: args[name] for name in args.keys() - program.hidden} == expected


@pytest.mark.parametrize("program", ["redq", "droq", "td3", "sr_sac"], indirect=True)
def test_optimizers_and_target_entropy(program):
    """Adam with the learning rates above; SR-SAC's target entropy is half of SAC's."""
    agent, defaults = program.module.Agent(17, 6, program.module.Args()), DEFAULTS[program.name]
    for name, optimizer in agent.optimizers.items():
        (group,) = optimizer.param_groups
        settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        assert type(optimizer) is torch.optim.Adam
        assert settings == (defaults[f"{name}_lr"], (0.9, 0.999), 1e-8, 0)
    with_alpha = program.name != "td3"
    assert agent.optimizers.keys() == {"critic", "actor", *["alpha"] * with_alpha}
    if with_alpha:
        assert agent.target_entropy == (-3 if program.name == "sr_sac" else -6)


@every_program
def test_draws_come_from_the_runs_own_generator(program):
    """The same seed draws the same, each update its own; PyTorch's global generator is left
    alone."""
    agent, batch = small_agent(program.module, policy_delay=1), make_batch()
    if program.name == "droq":
        agent.args.dropout = 0.5
    before = torch.get_rng_state()
    rng = torch.Generator().manual_seed(0)
    first, second = agent.draw(batch, rng), agent.draw(batch, rng)
    again = agent.draw(batch, torch.Generator().manual_seed(0))
    assert same(first, again) and first.keys() == second.keys() == again.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    update(agent, 0)
    assert torch.equal(torch.get_rng_state(), before)


def commands(text):
    """The command lines of a docstring, split as a shell does."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


@every_program
def test_command_lines_of_the_docstring(program):
    """Each parses, names this file, and each of its flags changes the default."""
    found = commands(program.module.__doc__)
    assert len(found) == len(re.findall(r"\bpython ", program.module.__doc__)) >= 2
    for python, file, *arguments in found:
        assert (python, file) == ("python", program.file) and (ROOT / file).exists()
        args = vars(program.parse(*arguments))
        pairs = zip(arguments, [*arguments[1:], "--"])
        given = {name: value for name, value in pairs if name.startswith("--")}
        default = vars(program.parse("--env-id", given.get("--env-id", "Walker2d-v4")))
        for name, value in given.items():
            field = name.removeprefix("--").replace("-", "_")
            assert args[field] == type(args[field])(value)
            assert name == "--env-id" or args[field] != default[field], name


@every_program
def test_help(program, capsys):
    """Every flag, with the comment that stands beside it."""
    with pytest.raises(SystemExit) as end:
        program("--help")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    sources = [inspect.getsource(cls) for cls in program.module.Args.__mro__[:-1]]
    assert end.value.code == 0
    for name in vars(program.module.Args()):
        hidden = name in program.hidden - RUN
        shown = re.search(rf"{flag(name)}(?![\w-])", text)
        assert bool(shown) != hidden, name
        lines = [re.search(rf"^    {name}: .*?  # (.*)$", source, re.M) for source in sources]
        assert hidden or next(filter(None, lines))[1][:30] in text, name


@every_program
def test_every_flag_changes_the_networks(program):
    """Each alone; a flag that did nothing would leave the plain run's weights."""
    arguments = [*program.short, "--learning-starts", 5, "--total-timesteps", 15, "--utd", 2]
    arguments += ["--batch-size", 8, "--buffer-size", 12, *program.few]
    assert program(*arguments, "--run-name", "plain") == 0
    plain, args = load("runs/plain")["agent"], load("runs/plain")["args"]
    networks = [name for name in plain if name.startswith(("critic.", "actor."))]
    for name in args.keys() - program.hidden - {"matmul_precision", "fast"}:  # fast: test_bro.py
        assert program(*arguments, *another(name, args[name]), "--run-name", name) == 0
        changed = load(f"runs/{name}")["agent"]
        assert any(not torch.equal(plain[key], changed[key]) for key in networks), name


def spelled_out(args, hidden):
    """Every flag, with the value that it has in args."""
    for name, value in vars(args).items():
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{flag(name)[2:]}"
        elif value is not None and name not in hidden:
            yield from (flag(name), value)


@every_program
def test_killed_and_resumed_run_ends_like_a_whole_one(program, whole, tmp_path):
    """A real process with every flag, killed by SIGKILL; masks, subsets and resets are those of a
    run that never stopped."""
    arguments = spelled_out(program.parse(*program.short, *LONG), program.hidden - RUN)
    assert kill_at_random(program.file, list(arguments), tmp_path, [110])
    killed = load("runs/killed")["n_updates"]
    assert program("--resume", "runs/killed") == 0
    assert_identical(whole(program), "runs/killed")
    assert load("runs/killed")["n_updates"] == 720 > killed > 200
    assert program.name != "sr_sac" or killed < 600  # a reset before the kill, and one after


@every_program
def test_evaluate_and_resume(program, capsys):
    """--evaluate finds what the run's last evaluation found; --resume goes on with more steps; the
    run is named after the program."""
    env = PROGRAMS[program.name].mujoco
    assert program(*program.short, "--env-id", env, "--learning-starts", 100) == 0
    (run,) = Path("runs").glob(f"{env}__{program.name}__1__*")
    returns = [float(row["return"]) for row in evaluations(run) if row["step"] == "150"]
    capsys.readouterr()
    assert program("--evaluate", run) == 0
    expected = f"{run} at step 150: {np.mean(returns):.1f} ± {np.std(returns):.1f}\n"
    assert np.std(returns) > 0 and capsys.readouterr().out == expected
    assert program("--resume", run, "--total-timesteps", 160) == 0
    assert load(run)["run"]["step"] == 160 and load(run)["n_updates"] == 180


@every_program
def test_runs_of_other_programs_are_refused(program, whole, capsys):
    """By both names, in both directions; nothing is changed."""
    run, script = whole(program), program.script
    saved = (run / "checkpoint.pt").read_bytes()
    assert script.main([*TINY, "--total-timesteps", "1", "--run-name", "base"]) == 0
    others = {name: importlib.import_module(name) for name in PROGRAMS if name != program.name}
    for other in (script, *others.values()):
        for option in ("--resume", "--evaluate"):
            error = refused(lambda *x, other=other: other.main([*x]), capsys, option, str(run))
            assert f"a run of {program.name}, not of {other.__name__}" in error
    error = refused(program, capsys, "--resume", "runs/base")
    assert f"a run of {script.__name__}, not of {program.name}" in error
    assert (run / "checkpoint.pt").read_bytes() == saved


@every_program
def test_a_typo_in_the_environments_name(program):
    """A real process, started where the README says: exit code 2, one line, nothing created."""
    before = {path for path in ROOT.iterdir() if path.name[0] not in "._"}
    arguments = [sys.executable, program.file, "--env-id", "Hoper-v4"]
    env = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    out = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stdout) == (2, "") and out.stderr.count("\n") == 1
    assert out.stderr.startswith("error: --env-id Hoper-v4: ") and "Hopper" in out.stderr
    assert {path for path in ROOT.iterdir() if path.name[0] not in "._"} == before


WRONG = {
    "redq": ["--n-target-critics 11", "--n-critics 1", "--n-target-critics 0"],
    "droq": ["--dropout 1", "--dropout -0.1"],
    "td3": ["--tau 1.5", "--tau -1"],
    "sr_sac": ["--reset-every 0", "--entropy-factor -1"],
    "bro": ["--n-quantiles 0", "--dual-lr -1"],
    "xqc": ["--lr-end 1.5", "--lr-end -1"],
    "crossq_discrete": ["--entropy-factor 1.5"],
}


@every_program
def test_own_flags_out_of_range(program, capsys):
    for arguments in WRONG.get(program.name, []):
        named, _ = arguments.split()
        assert named in refused(program, capsys, *TINY, *arguments.split())
    assert not Path("runs").exists()


# --------------------------------------------------------------------------------------------- REDQ

SUBSET = torch.tensor([7, 2])


def test_redq_critic_gradient_is_that_of_the_minimum_over_the_drawn_pair():
    """All ten critics learn from min(Q_7, Q_2) of the target network - alpha log pi."""
    agent, batch = make_agent(redq, updates=9, policy_delay=3), make_batch(50)
    obs, action, reward, done, next_obs = batch
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
        next_action, log_prob = sample(agent, next_obs, noise())
        next_q = forward(agent.target_critic, torch.cat([next_obs, next_action], -1))[..., 0]
        assert 0.05 < (next_q[7] < next_q[2]).double().mean() < 0.95  # both are lowest somewhere
        target = torch.minimum(next_q[7], next_q[2]) - 0.3 * log_prob
        target = reward + GAMMA * (1 - done) * target
    q = forward(agent.critic, torch.cat([obs, action], -1))[..., 0]
    assert q.shape == (10, BATCH)
    loss = sum(((q[i] - target) ** 2).mean() / 2 for i in range(10))
    inputs = batch, {"noise": noise(), "subset": SUBSET}
    assert_loss(agent.critic_loss, inputs, loss)
    assert_gradients(agent, "critic", agent.critic_loss, inputs, loss, {"critic"})


def test_redq_actor_gradient_is_that_of_the_mean_over_all_ten():
    agent, obs = make_agent(redq, updates=9, policy_delay=3), make_batch(50)[0]
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
    action, log_prob = sample(agent, obs, noise())
    q = forward(agent.critic, torch.cat([obs, action], -1))[..., 0]
    loss = (0.3 * log_prob - sum(q[i] for i in range(10)) / 10).mean()
    inputs = [obs], {"noise": noise(), "subset": SUBSET}
    assert_loss(agent.actor_loss, inputs, loss)
    assert_gradients(agent, "actor", agent.actor_loss, inputs, loss, {"actor"})


def test_redq_by_hand():
    """Three critics, two of them in the target, all constant."""
    agent, batch = make_agent(redq, n_critics=3), make_batch()
    fill(agent.target_critic, [5.0, 1.0, 3.0])
    fill(agent.critic, [0.0, 1.0, 5.0])
    fill(agent.actor, [0.0] * 2 * ACTIONS)  # a standard normal before the tanh
    batch[2].fill_(1.0), batch[3].fill_(0.0)
    draws = {"noise": torch.zeros(BATCH, ACTIONS).double(), "subset": torch.tensor([0, 2])}
    log_prob = -math.log(2 * math.pi)  # at 0: twice -log(2 pi) / 2
    target = 1 + GAMMA * (3 - log_prob)  # alpha is 1
    expected = (target**2 + (target - 1) ** 2 + (target - 5) ** 2) / 2
    assert_loss(agent.critic_loss, (batch, draws), expected)
    assert_loss(agent.actor_loss, (batch, draws), log_prob - 2)


def test_redq_draws_one_new_pair_for_each_update():
    """Read off the target itself: one pair for the whole batch, any of the 45 about equally
    often."""
    agent = small_agent(redq, critic_width=4, actor_width=4)
    first, second = torch.tensor([*itertools.combinations(range(10), 2)]).T
    target_q, drawn, q = agent.target_q, [], torch.randn(10, 8)

    def spy(next_q, draws):
        assert next_q.shape == q.shape
        value = target_q(q, draws)
        (pair,) = (torch.minimum(q[first], q[second]) == value).all(-1).nonzero()
        drawn.append(pair.item())
        return value

    agent.target_q, rng = spy, torch.Generator().manual_seed(0)
    for _ in range(900):
        agent.update([x[:8].float() for x in make_batch()], rng)
    counts = collections.Counter(drawn)
    assert len(drawn) == 900 and len(counts) == 45  # 20 of each are expected
    assert min(counts.values()) >= 5 and max(counts.values()) <= 40
    assert sum(a == b for a, b in itertools.pairwise(drawn)) < 60  # by chance 20 times


# --------------------------------------------------------------------------------------------- DroQ


def droq_forward(net, x, masks):
    """Dense, dropout, layer norm, ReLU, twice; then dense."""
    for k in range(2):
        x = (torch.matmul(x, net.weights[k]) + net.biases[k]) * masks[k]
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6) * net.scales[k] + net.shifts[k]
        x = x.clamp(min=0)
    return (torch.matmul(x, net.weights[2]) + net.biases[2])[..., 0]


def droq_uniform(seed):
    """Of both layers, two critics and all rows."""
    return torch.rand(2, 2, BATCH, 16, generator=torch.Generator().manual_seed(seed)).double()


def droq_masks(seed):
    """0 with probability 0.3, otherwise 1 / 0.7."""
    return torch.where(droq_uniform(seed) < 0.7, 1 / 0.7, 0.0)


def make_droq():
    return make_agent(droq, updates=9, policy_delay=3, dropout=0.3)


def test_droq_critic_gradient_is_that_of_the_minimum_with_masks_of_its_own():
    """min over both target critics under their masks; the critics under others."""
    agent, batch = make_droq(), make_batch(50)
    obs, action, reward, done, next_obs = batch
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
        next_action, log_prob = sample(agent, next_obs, noise())
        pair = torch.cat([next_obs, next_action], -1)
        next_q = droq_forward(agent.target_critic, pair, droq_masks(1))
        assert 0.05 < (next_q[0] < next_q[1]).double().mean() < 0.95  # both are lowest somewhere
        target = torch.minimum(next_q[0], next_q[1]) - 0.3 * log_prob
        target = reward + GAMMA * (1 - done) * target
    q = droq_forward(agent.critic, torch.cat([obs, action], -1), droq_masks(2))
    loss = ((q[0] - target) ** 2).mean() / 2 + ((q[1] - target) ** 2).mean() / 2
    inputs = batch, {"noise": noise(), "target": droq_uniform(1), "critic": droq_uniform(2)}
    assert_loss(agent.critic_loss, inputs, loss)
    assert_gradients(agent, "critic", agent.critic_loss, inputs, loss, {"critic"})


def test_droq_actor_gradient_is_that_of_the_mean_under_dropout():
    agent, obs = make_droq(), make_batch(50)[0]
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
    action, log_prob = sample(agent, obs, noise())
    q = droq_forward(agent.critic, torch.cat([obs, action], -1), droq_masks(2))
    loss = (0.3 * log_prob - (q[0] + q[1]) / 2).mean()
    inputs = [obs], {"noise": noise(), "target": droq_uniform(1), "critic": droq_uniform(2)}
    agent.critic.uniform = droq_uniform(3)  # what the critic's update left
    assert_loss(agent.actor_loss, inputs, loss)
    assert_gradients(agent, "actor", agent.actor_loss, inputs, loss, {"actor"})


def test_droq_network_by_hand():
    """One input, two units: 3 and 1 -> dropped 6 and 0 -> normed 1 and -1 -> 2 * 1 + 0.5 and 0;
    then 0.001 and -0.001 -> 0.002 and 0, of a variance as small as epsilon."""
    net = droq.DropoutMLP(1, 2, 1, dropout=0.5).double()
    with torch.no_grad():
        net.weights[0].copy_(torch.tensor([[2.0, 0.0]]))
        net.biases[0].copy_(torch.tensor([[1.0, 1.0]]))
        net.scales[0].copy_(torch.tensor([[2.0, 1.0]]))
        net.shifts[0].copy_(torch.tensor([[0.5, 0.0]]))
        net.weights[1].copy_(torch.tensor([[4e-4, -4e-4], [100.0, 100.0]]))
        net.weights[2].copy_(torch.tensor([[10.0], [1000.0]]))
        net.biases[2].fill_(3.0)
    net.uniform = torch.tensor([[[0.1, 0.5]], [[0.0, 0.9]]]).double()
    expected = 3 + 10 / math.sqrt(2)  # 0.002 and 0: 0.001 / sqrt(1e-6 + 1e-6)
    assert net(torch.ones(1, 1).double()).item() == pytest.approx(expected, rel=1e-6)
    net.uniform = torch.tensor([[[0.1, 0.5]], [[0.5, 0.49]]]).double()
    expected = 3 + 10 / math.sqrt(2)  # 0 and -0.002: the mean is -0.001
    assert net(torch.ones(1, 1).double()).item() == pytest.approx(expected, rel=1e-6)


def test_droq_masks_of_an_update():
    """In all three passes a hundredth of the units of each layer is dropped, and no two passes,
    updates, layers, critics or rows share which."""
    agent = small_agent(droq, critic_width=256, policy_delay=1)
    seen = []
    for net in (agent.critic, agent.target_critic):
        net.register_forward_pre_hook(
            lambda module, _: seen.append((module, module.uniform.clone()))
        )
        net.eval()
    rng, batch = torch.Generator().manual_seed(0), [x.float() for x in make_batch()]
    for _ in range(2):
        agent.update(batch, rng)
    order = [agent.target_critic, agent.critic, agent.critic] * 2
    assert [module for module, _ in seen] == order and all(net.training for net in order)
    uniform = torch.stack([numbers for _, numbers in seen])  # [pass, layer, critic, row, unit]
    assert uniform.shape == (6, 2, 2, BATCH, 256) and agent.critic.keep == 0.99
    dropped = uniform >= 0.99
    share = dropped.float()
    assert (share.mean((2, 3, 4)) - 0.01).abs().max() < 0.003  # of each pass and layer
    assert share.mean(3).max() < 0.15 and share.mean(4).max() < 0.06  # of a unit, of a row
    layers = dropped.flatten(0, 2)
    for a, b in itertools.combinations(layers, 2):
        assert (a & b).float().mean() < 0.001  # by chance 0.0001


# ---------------------------------------------------------------------------------------------- TD3

SB3_OBS, SB3_ACTIONS, SB3_BATCH, WIDTH, UPDATES = 11, 3, 32, 24, 9


class Box(gym.Env):
    """Spaces only, with actions in [-1, 1]."""

    observation_space = gym.spaces.Box(-1, 1, (SB3_OBS,))
    action_space = gym.spaces.Box(-1, 1, (SB3_ACTIONS,))


@pytest.fixture
def reference(monkeypatch):
    """Stable-baselines3's TD3 in float64, its targets away from its networks; model.noise keeps
    the standard normal noise that it draws, model.grads the gradients of its steps."""
    sb3 = pytest.importorskip("stable_baselines3", reason="pip install -r tests/requirements.txt")
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.torch_layers import FlattenExtractor

    torch.manual_seed(0)
    arguments = {"policy_delay": 2, "tau": 0.1, "target_policy_noise": 0.4, "learning_rate": 1e-3}
    arguments |= {"target_noise_clip": 0.5, "gamma": GAMMA, "batch_size": SB3_BATCH}
    policy = {"net_arch": [WIDTH, WIDTH]}
    model = sb3.TD3("MlpPolicy", Box(), device="cpu", policy_kwargs=policy, **arguments)
    model.set_logger(configure(None, []))
    model.policy.double()
    for net in model.policy.modules():  # their preprocessing casts observations to float32
        if isinstance(net, FlattenExtractor):
            net.register_forward_hook(lambda module, inputs, output: output.double())
    with torch.no_grad():
        for net in (model.actor_target, model.critic_target):
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p)
    model.noise, model.grads = [], {}
    for name in ("critic", "actor"):
        their = getattr(model, name)
        their.optimizer.register_step_pre_hook(
            lambda *_, name=name: model.grads.update(tensors_of(model, {name}, "grad"))
        )

    def normal_(self, mean, std):
        model.noise.append(torch.randn(self.shape, dtype=self.dtype))
        return self.copy_(mean + std * model.noise[-1])

    def one_update(samples):
        model.replay_buffer.sample = lambda *_, **__: samples
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "normal_", normal_)
            model.train(gradient_steps=1, batch_size=SB3_BATCH)

    model.one_update = one_update
    return model


def tensors_of(model, names, attribute="data"):
    """Their weights, or gradients, under our names and in our shapes."""
    nets = {
        "critic": model.critic.q_networks,
        "target_critic": model.critic_target.q_networks,
        "actor": [model.actor.mu],
        "target_actor": [model.actor_target.mu],
    }
    out = {}
    for name in names:
        join = torch.stack if "critic" in name else torch.cat  # our critics are one ensemble
        linears = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in nets[name]]
        for k, layers in enumerate(zip(*linears)):
            weights = [getattr(layer.weight, attribute).T for layer in layers]
            out[f"{name}.weights.{k}"] = join(weights).clone()
            biases = [getattr(layer.bias, attribute)[None] for layer in layers]
            out[f"{name}.biases.{k}"] = join(biases).clone()
    return out


def test_nine_updates_of_td3_agree_with_stable_baselines3(reference, monkeypatch):
    """Same weights, batches and noise: losses, gradients and all four networks, over four actor
    updates."""
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    model, nets = reference, ("critic", "target_critic", "actor", "target_actor")
    args = td3.Args(critic_width=WIDTH, actor_width=WIDTH, critic_lr=1e-3, actor_lr=1e-3,
                    tau=0.1, target_noise=0.4, gamma=GAMMA)  # fmt: skip
    agent = td3.Agent(SB3_OBS, SB3_ACTIONS, args).double()
    agent.load_state_dict(tensors_of(model, nets))  # strict: each tensor of ours is one of theirs
    monkeypatch.setattr(agent, "draw", lambda batch, rng: {"noise": model.noise.pop()})
    close, clipped = {"rel": 1e-8, "abs": 1e-8}, []
    for step in range(1, UPDATES + 1):
        obs, next_obs = torch.randn(2, SB3_BATCH, SB3_OBS).double()
        action = torch.rand(SB3_BATCH, SB3_ACTIONS).double() * 2 - 1
        reward, done = torch.randn(SB3_BATCH).double(), (torch.rand(SB3_BATCH) < 0.1).double()
        samples = ReplayBufferSamples(obs, action, next_obs, done[:, None], reward[:, None], None)
        before, moves = copy_of(agent), step % 2 == 0
        model.one_update(samples)
        clipped.append((0.4 * model.noise[-1]).abs() > 0.5)
        info = agent.update([obs, action, reward, done, next_obs], None)
        logged = model.logger.name_to_value
        assert not model.noise and ("losses/actor" in info) == moves
        assert info["losses/critic"].item() == pytest.approx(logged["train/critic_loss"], **close)
        if moves:
            assert info["losses/actor"].item() == pytest.approx(logged["train/actor_loss"], **close)
        parameters = dict(agent.named_parameters())
        for name in tensors_of(model, ["critic", "actor"] if moves else ["critic"]):
            ours, theirs = parameters[name].grad, model.grads[name]
            assert theirs.abs().max() > 1e-6
            assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8), (step, name)
        ours = agent.state_dict()
        for name, theirs in tensors_of(model, nets).items():
            assert torch.allclose(ours[name], theirs, rtol=1e-8, atol=1e-8), (step, name)
            fixed = not moves and not name.startswith("critic.")
            assert torch.equal(ours[name], before[name]) == fixed, (step, name)
        theirs = model.actor(obs).detach().numpy()
        assert np.allclose(agent.act(obs[0].numpy()), theirs[0], rtol=0, atol=1e-8)
    assert 0.1 < torch.cat(clipped).double().mean() < 0.5


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
    agent = make_agent(td3, gamma=0.5)
    batch = [x[:4].clone() for x in make_batch()]
    fill(agent.target_actor, [math.atanh(0.7), 0.0])
    fill(agent.actor, [math.atanh(-0.5), 0.0])
    linear_in_the_action(agent.target_critic, [(1.0, 0.0), (-1.0, 1.1)])
    batch[2].copy_(torch.tensor([0.0, 0.0, 0.0, 2.0])), batch[3].copy_(torch.tensor([0, 0, 0, 1]))
    draws = {"noise": torch.tensor([[1.0, 0], [5, 0], [-5, 0], [1, 0]]).double()}
    # a' is 0.9, 1 (not 1.2), 0.2 and 0.9, so the targets are half of 0.2, 0.1 and 0.2, and 2.
    fill(agent.critic, [1.0, 0.0])
    expected = (0.9**2 + 0.95**2 + 0.9**2 + 1) / 4 + (0.1**2 + 0.05**2 + 0.1**2 + 2**2) / 4
    assert_loss(agent.critic_loss, (batch, draws), expected)
    linear_in_the_action(agent.critic, [(3.0, 7.0), (0.0, 1.0)])
    assert_loss(agent.actor_loss, (batch,), -5.5)  # -(3 * -0.5 + 7)


def test_td3_targets_move_on_delayed_updates_only():
    """From copies of the networks, by tau, after the actor's step."""
    agent = make_agent(td3, policy_delay=3, tau=0.3)
    for name in ("critic", "actor"):
        target, net = getattr(agent, f"target_{name}"), getattr(agent, name)
        assert same(copy_of(target), copy_of(net)) and copy_of(target).keys() == copy_of(net).keys()
        assert not any(p.requires_grad for p in target.parameters())
        assert not {p.data_ptr() for p in target.parameters()} & {
            p.data_ptr() for p in net.parameters()
        }
    for i in range(1, 8):
        before = {name: copy_of(getattr(agent, f"target_{name}")) for name in ("critic", "actor")}
        update(agent, i)
        for name, old in before.items():
            new, net = copy_of(getattr(agent, f"target_{name}")), copy_of(getattr(agent, name))
            expected = polyak(old, [net], 0.3) if i % 3 == 0 else old
            for key in new:
                assert torch.allclose(new[key], expected[key], rtol=0, atol=1e-12)
            assert same(new, old) == (i % 3 != 0)


def test_td3_starts_from_pytorchs_initialisation():
    """Weights and biases as those of nn.Linear: uniform within 1 / sqrt(inputs)."""
    agent = td3.Agent(16, 64, td3.Args(n_critics=3))
    for net, sizes in ((agent.critic, (80, 256, 256)), (agent.actor, (16, 256, 256))):
        for k, n in enumerate(sizes):
            weight, bias = net.weights[k].detach(), net.biases[k].detach()
            assert weight.shape[-2] == n
            assert n**-0.5 * 0.95 < weight.abs().max() <= n**-0.5
            assert weight.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.1)
            assert n**-0.5 * 0.5 < bias.abs().max() <= n**-0.5
            assert weight.dim() == 2 or not torch.isclose(weight[0], weight[1]).all(-1).any()


def test_td3_has_no_batch_renorm(capsys):
    """Neither layer nor flag; its modules are two pairs of networks."""
    agent = small_agent(td3)
    assert {name for name, _ in agent.named_children()} == {"critic", "actor", "target_critic", "target_actor"}  # fmt: skip
    assert not [m for m in agent.modules() if isinstance(m, crossq_td3.BatchRenorm)]
    assert not list(agent.buffers())
    with pytest.raises(SystemExit) as end:
        td3.main([*TINY, "--brn-warmup", "5"])
    assert end.value.code == 2 and "brn-warmup" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- SR-SAC


def test_sr_sac_begins_anew_at_every_fifth_update():
    """New weights, never seen before; the target is a copy of the critic; temperature and
    optimisers as at the start; the count of updates goes on."""
    agent = small_agent(sr_sac, reset_every=5, alpha=0.7)
    seen, optimizers = [copy_of(agent)], [agent.optimizers]
    for i in range(1, 12):
        update(agent, i)
        now = copy_of(agent)
        steps = {float(s["step"]) for o in agent.optimizers.values() for s in o.state.values()}
        assert agent.n_updates == i and steps == ({i % 5} if i % 5 else set())
        if i % 5 == 0:
            for name in now:
                if ".weights." in name:
                    assert not any(
                        torch.isclose(now[name], old[name]).all(-1).any() for old in seen
                    ), name
                assert ".biases." not in name or not now[name].any()
            assert now["log_alpha"].item() == pytest.approx(math.log(0.7))
            assert same(copy_of(agent.critic), copy_of(agent.target_critic))
            assert not any(p.requires_grad for p in agent.target_critic.parameters())
            parts = {"critic": agent.critic.parameters(), "actor": agent.actor.parameters()}
            for name, part in (parts | {"alpha": [agent.log_alpha]}).items():
                (group,) = agent.optimizers[name].param_groups
                assert {*map(id, group["params"])} == {*map(id, part)}
            assert all(agent.optimizers is not old for old in optimizers)
            optimizers.append(agent.optimizers)
        assert now.keys() == seen[0].keys() and not same(now, seen[-1])
        seen.append(now)


@pytest.mark.parametrize("program", ["sr_sac"], indirect=True)
def test_sr_sac_keeps_the_buffer(program, monkeypatch):
    """A reset after 30 updates, at step 50: the checkpoint holds all rows, those before the reset
    as they were; the fresh policy acts at once, without random steps."""
    random_action, calls = sr_sac.Agent.random_action, []
    monkeypatch.setattr(
        sr_sac.Agent, "random_action", lambda self, rng: calls.append(1) or random_action(self, rng)
    )
    arguments = [*TINY, "--utd", 3, "--reset-every", 30, "--run-name"]
    for steps in (49, 50, 70):
        assert program(*arguments, steps, "--total-timesteps", steps) == 0
    before, at, after = (load(f"runs/{steps}") for steps in (49, 50, 70))
    assert len(calls) == 3 * 40
    assert [len(x["rows"]) for x in (before, at, after)] == [49, 50, 70]
    assert torch.equal(before["rows"], at["rows"][:49])
    assert torch.equal(at["rows"], after["rows"][:50])
    assert [x["n_updates"] for x in (before, at, after)] == [27, 30, 90]
    states = [[bool(o["state"]) for o in x["optimizers"].values()] for x in (before, at, after)]
    assert states == [[True] * 3, [False] * 3, [False] * 3]
    for name, weight in at["agent"].items():
        if ".weights." in name:
            assert not torch.equal(weight, before["agent"][name])
            assert not torch.equal(weight, after["agent"][name])
