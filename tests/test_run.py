"""A run of a script: seeds, exact resume after a kill, compilation, errors, files."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_identical,
    environment,
    evaluations,
    every_script,
    kill_in_the_middle,
    leaves,
    load,
    on_each_device,
    refused,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import crossq_sac


def scalars(run, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(tag)]


# ------------------------------------------------------------------------------ the same, and again


@every_script
def test_same_seed_same_result_and_another_seed_another(main, whole):
    main(*TINY, "--run-name", "same")
    assert_identical(whole(main), "runs/same")
    for seed in (1, 2):
        main(*TINY, "--run-name", seed, "--seed", seed, "--total-timesteps", 10)
    a, b = load("runs/1"), load("runs/2")
    weights = [key for key in a["agent"] if "weights" in key]
    assert not any(torch.equal(a["agent"][key], b["agent"][key]) for key in weights)
    assert not torch.isclose(a["rows"], b["rows"]).all(0)[[1, 3, 4]].any()


@on_each_device
@every_script
def test_killed_and_resumed(main, tmp_path, device):
    """A real process, killed in the middle and resumed, ends as a run that never stopped: on
    MuJoCo, with a replay buffer that has turned over, batch renormalisation beyond its warm-up, and
    compiled updates on CUDA."""
    arguments = [*TINY, "--env-id", "Hopper-v4", "--device", device, "--buffer-size", 48]
    arguments += ["--utd", 2, "--action-repeat", 2, "--total-timesteps", 240]
    arguments += ["--compile"] if device == "cuda" else []
    if hasattr(main.module.Args, "brn_warmup"):
        arguments += ["--brn-warmup", 30]
    main(*arguments, "--run-name", "whole")
    script = f"{main.module.__name__}.py"
    assert 120 <= kill_in_the_middle(script, arguments, tmp_path, 120) < 240
    main("--resume", "runs/killed")
    assert_identical("runs/whole", "runs/killed")
    assert [row["step"] for row in evaluations("runs/killed")][::2] == "50 100 150 200".split()


class Killed(BaseException):
    """Like a kill for all that a script can do about it: it catches only Exceptions."""


class DyingAgent(crossq_sac.Agent):
    deaths = []

    def update(self, batch, rng):
        if self.n_updates in self.deaths:
            self.deaths.remove(self.n_updates)
            raise Killed
        return super().update(batch, rng)


@pytest.mark.parametrize("when", ["writing", "before the rename", "after the rename"])
def test_killed_while_a_checkpoint_is_written(main, whole, monkeypatch, when):
    """Half-written, whole but not renamed, just renamed: the checkpoint that is seen is whole."""
    torch_save, replace, calls = torch.save, os.replace, [0]

    def dying_save(state, file):
        torch_save(state, file)
        calls[0] += 1
        if calls[0] == 6 and when == "writing":
            os.truncate(file, os.path.getsize(file) // 2)
            raise Killed

    def dying_replace(a, b):
        if calls[0] < 6 or "after" in when:
            replace(a, b)
        if calls[0] == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", dying_save)
        patch.setattr(os, "replace", dying_replace)
        main(*TINY, "--run-name", "a")
    assert load("runs/a")["progress"][0] == (50 if "after" in when else 40)
    main("--resume", "runs/a")
    assert_identical(whole(main), "runs/a")


def test_extending_a_run(main, whole):
    """Stored arguments are the defaults, and new ones replace them. TensorBoard keeps what it
    had."""
    shutil.copytree(whole(main), "runs/a")
    main("--resume", "runs/a", "--total-timesteps", 200, "--critic-lr", 0)
    assert [step for step, _ in scalars("runs/a", "eval/return")] == [50, 100, 150, 200]
    assert [row["step"] for row in evaluations("runs/a")][-3:] == ["150", "200", "200"]
    about = json.loads(Path("runs/a/args.json").read_text())
    assert (about["critic_lr"], about["batch_size"]) == (0, 16)
    before, after = load(whole(main))["agent"], load("runs/a")["agent"]
    for name, changes in (("critic.weights.0", False), ("actor.weights.0", True)):
        assert torch.equal(before[name], after[name]) != changes
    main(*TINY, "--buffer-size", 64, "--run-name", "full")
    with pytest.raises(RuntimeError, match="size"):
        main("--resume", "runs/full", "--buffer-size", 128)
    torch.save({"args": print}, "runs/full/checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):  # data, not code
        main("--resume", "runs/full")


def test_minutes_between_checkpoints(main, monkeypatch):
    """At the start, as the first episode after a minute ends, and at the end; a step takes 3 s."""
    now, saved = [0.0], []

    class Buffer(main.module.ReplayBuffer):
        def add(self, *transition):
            super().add(*transition)
            now[0] += 3

    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(main.module, "save", lambda *inputs: saved.append(inputs[-1][0]))
    main(*TINY, "--checkpoint-minutes", 1, "--total-timesteps", 100, Buffer=Buffer)
    assert saved == [0, 30, 60, 90, 100]


def test_an_algorithm_of_ones_own(main):
    """Parts that are passed to main: a flag, an optimiser and a buffer's attribute of its own, all
    of them in the checkpoint."""

    @dataclasses.dataclass
    class Args(main.module.Args):
        strength: float = 0.5  # of the random actions

    class Agent(DyingAgent):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra = torch.nn.Parameter(torch.zeros(3))
            self.extra_optimizer = torch.optim.Adam([self.extra])

        def update(self, batch, rng):
            self.descend(self.extra_optimizer, self.extra_loss, batch[2])
            return super().update(batch, rng)

        def extra_loss(self, reward):
            loss = (self.extra - reward.mean()).square().sum()
            return loss, loss

        def random_action(self, rng):
            return super().random_action(rng) * self.args.strength

    class Buffer(main.module.ReplayBuffer):
        def add(self, *transition):
            super().add(*transition)
            self.total = getattr(self, "total", 0) + float(transition[2])

    def evaluate(agent, env, step):
        return [(*row[:2], 7.5, *row[3:]) for row in main.module.evaluate(agent, env, step)]

    parts = {"Args": Args, "Agent": Agent, "Buffer": Buffer, "evaluate": evaluate}
    main(*TINY, "--strength", 0.25, "--run-name", "whole", **parts)
    Agent.deaths.append(35)
    with pytest.raises(Killed):
        main(*TINY, "--strength", 0.25, "--run-name", "part", **parts)
    main("--resume", "runs/part", **parts)
    assert_identical("runs/whole", "runs/part")
    checkpoint = load("runs/part")
    assert checkpoint["buffer"]["total"] == 150 and (checkpoint["agent"]["extra"] != 0).all()
    actions = checkpoint["rows"][:, 3:5].abs()
    assert actions[:40].max() <= 0.25 < actions[40:].max()
    assert {row["return"] for row in evaluations("runs/part")} == {"7.5"}


# ------------------------------------------------------------------------------ compilation


def test_compiled(main, run_script, monkeypatch):
    """In a process of its own, and killed and resumed in this one: the same, and for some updates
    nearly the same as uncompiled. Each loss is compiled before and after the other network
    has gradients, and not again."""
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # or it tries instructions for 10 seconds
    end = run_script("crossq_sac.py", *TINY, "--compile", "--run-name", "whole")
    assert end.returncode == 0 and "not compiled" not in end.stderr
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    DyingAgent.deaths.append(35)
    with pytest.raises(Killed):
        main(*TINY, "--compile", "--run-name", "part", Agent=DyingAgent)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]
    main(*TINY, "--run-name", "plain", "--total-timesteps", 70)
    compiled, plain = load("runs/part"), load("runs/plain")
    assert compiled["n_updates"] == plain["n_updates"] == 30
    for name, value in plain["agent"].items():
        assert torch.allclose(compiled["agent"][name], value, rtol=1e-2, atol=1e-3), name
    torch._dynamo.reset()
    main("--resume", "runs/part")
    assert_identical("runs/whole", "runs/part")


def test_without_a_compiler(main, whole, run_script, tmp_path):
    """One line, and the run ends as one that was never to be compiled."""
    env = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env["PATH"] = str(Path(sys.executable).parent)
    end = run_script("crossq_sac.py", *TINY, "--compile", "--run-name", "a", env=env)
    assert end.returncode == 0 and len(re.findall("(?m)^.*not compiled: .*$", end.stderr)) == 1
    assert_identical(whole(main), tmp_path / "runs/a")


@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """The compiler knows of no shapes for it."""
    return 2 * x


twice.register_autograd(lambda ctx, gradient: 2 * gradient)


def test_a_loss_that_the_compiler_refuses(main, capsys):
    class Agent(main.module.Agent):
        def critic_loss(self, batch, noise):
            loss, q_mean = super().critic_loss(batch, noise)
            return twice(loss), q_mean

    for name, warnings in (("compile", 1), ("no-compile", 0)):
        main(*TINY, f"--{name}", "--run-name", name, "--total-timesteps", 60, Agent=Agent)
        assert capsys.readouterr().err.count("not compiled: ") == warnings
    assert_identical("runs/compile", "runs/no-compile")


@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_the_users_own_bug_keeps_its_traceback(main, compile):
    class Agent(main.module.Agent):
        def critic_loss(self, batch, noise):
            return torch.ones(3) @ torch.ones(4), torch.zeros(())

    with pytest.raises(RuntimeError, match="size") as end:
        main(*TINY, compile, Agent=Agent)
    assert end.traceback[-1].name == "critic_loss"


# ------------------------------------------------------------------------------ errors


@every_script
def test_numbers_out_of_range(main, capsys):
    """Every number of Args: one line, and nothing created."""
    of_zero = {"seed", "learning_starts", "brn_warmup"}
    wrong = [("gamma", "1.5"), ("gamma", "nan")]
    for field in dataclasses.fields(main.module.Args):
        if field.type is int:
            wrong.append((field.name, -1 if field.name in of_zero else 0))
        if field.type is float:
            wrong.append((field.name, "-0.5"))
    assert len(wrong) > 16
    for name, value in wrong:
        flag = f"--{name.replace('_', '-')}"
        assert f"{name} {value} " in refused(main, capsys, *TINY, flag, value)
    assert not Path("runs").exists()
    flags = "--learning-starts 0 --gamma 0 --total-timesteps 20 --buffer-size 1000000"
    main(*TINY, *flags.split(), "--run-name", "zeros")
    assert load("runs/zeros")["n_updates"] == 20 * main.module.Args().utd
    assert Path("runs/zeros/checkpoint.pt").stat().st_size < 1e6  # the filled rows alone


@pytest.mark.parametrize("env", ["Discrete", "Unbounded", "Matrix"])
def test_actions_that_are_no_bounded_vector(main, capsys, env):
    assert "bounded Box" in refused(main, capsys, *TINY, "--env-id", f"tiny_envs:{env}-v0")
    assert not Path("runs").exists()


def test_a_real_process_says_one_line(run_script, tmp_path):
    env = {k: v for k, v in environment().items() if k != "PYTHONWARNINGS"}
    end = run_script("crossq_sac.py", "--env-id", "tiny_envs:Discrete-v0", env=env)
    assert (end.returncode, end.stdout) == (1, "") and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: .*Discrete\(3\)\n", end.stderr)


def test_a_used_run_name_is_refused(main, whole, capsys):
    shutil.copytree(whole(main), "runs/a")
    before = {path: path.read_bytes() for path in Path("runs/a").iterdir()}
    assert "runs/a exists" in refused(main, capsys, *TINY, "--run-name", "a", "--seed", 2)
    assert before == {path: path.read_bytes() for path in Path("runs/a").iterdir()}


def finite_checkpoint(run):
    tensors = [x for _, x in leaves(load(run)) if isinstance(x, torch.Tensor)]
    return all(x.isfinite().all() for x in tensors)


@pytest.mark.parametrize("env, episodes, where", [
    ("NanObs", 2, "action .* 57"), ("NanObs", 6, "action .* 50"),  # the second in the evaluation
    ("NanReward", 2, "rows .* 10"), ("Spike", 2, ".* is NaN or infinite at step .*"),
])  # fmt: skip
def test_nan_from_the_environment(main, capsys, env, episodes, where):
    """It is neither played nor evaluated nor saved."""
    flags = f"--env-id tiny_envs:{env}-v0 --eval-episodes {episodes} --run-name a".split()
    assert re.fullmatch(rf"error: {where}", refused(main, capsys, *TINY, *flags))
    assert finite_checkpoint("runs/a")


@every_script
def test_nan_in_a_loss(main, capsys):
    """Seen when losses are logged, every 1000 steps, and by name."""

    class Agent(main.module.Agent):
        def update(self, batch, rng):
            return super().update(batch, rng) | {"losses/critic": torch.tensor(torch.nan)}

    arguments = [*TINY, "--total-timesteps", 1100, "--learning-starts", 990, "--eval-every", 5000]
    error = refused(main, capsys, *arguments, "--run-name", "a", Agent=Agent)
    assert error == "error: losses/critic is NaN or infinite at step 1000"


def test_nan_in_the_weights_is_never_saved(main, capsys):
    """Not even if no action shows it."""

    class Agent(main.module.Agent):
        def update(self, batch, rng):
            info = super().update(batch, rng)
            if self.n_updates == 15:
                self.critic.weights[1].data[0, 0, 0] = torch.nan
            return info

    error = refused(main, capsys, *TINY, "--run-name", "a", "--policy-delay", 100, Agent=Agent)
    assert "critic." in error and "step 60" in error
    assert finite_checkpoint("runs/a") and load("runs/a")["progress"][0] == 50


# ------------------------------------------------------------------------------ files of a run


@every_script
def test_files_of_a_run(main, monkeypatch):
    """args.json, evaluations.csv and TensorBoard's tags. Steps are the environment's, but for
    --learning-starts. With --track, Weights & Biases gets TensorBoard's."""
    tracked = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=tracked.update))
    arguments = [*TINY, "--action-repeat", 2, "--total-timesteps", 2000, "--learning-starts", 990]
    main(*arguments, "--eval-every", 1000, "--run-name", "a", "--track")
    assert tracked["sync_tensorboard"] and tracked["id"] == "a"
    about = json.loads(Path("runs/a/args.json").read_text())
    assert about["torch"] == torch.__version__ and about["numpy"] == np.__version__
    assert vars(main.module.Args()).keys() | {"gymnasium", "command"} <= about.keys()
    lines = Path("runs/a/evaluations.csv").read_text().splitlines()
    rows = [f"{step},{episode},10.0,10," for step in (1000, 2000) for episode in (0, 1)]
    assert lines == ["step,episode,return,length,success", *rows]
    tags = {"losses/critic", "losses/actor", "diagnostics/q_mean", "charts/SPS"}
    if hasattr(main.module.Args, "alpha"):
        tags |= {"losses/alpha", "diagnostics/entropy"}
    assert tags <= set(EventAccumulator("runs/a").Reload().Tags()["scalars"])
    assert scalars("runs/a", "eval/return") == [(1000, 10.0), (2000, 10.0)]
    assert [step for step, _ in scalars("runs/a", "losses/critic")] == [2000]
    assert scalars("runs/a", "charts/episodic_return")[:2] == [(10, 10.0), (20, 10.0)]


def test_alone_in_an_empty_folder_with_the_users_own_environment(tmp_path):
    """A copy of the script runs by itself, without MuJoCo, and finds my_module in the current
    directory, not beside the script."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROOT / "crossq_sac.py", tmp_path / "elsewhere/copied.py")
    shutil.copy(ROOT / "tests/tiny_envs.py", tmp_path / "my_module.py")
    env = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    program = "import runpy, sys; sys.modules['mujoco'] = None; del sys.argv[0]\n"
    program += "sys.path[0] = 'elsewhere'; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [*TINY, "--env-id", "my_module:suite/Terminated-v0", "--total-timesteps", "50"]
    program = [sys.executable, "-c", program, "elsewhere/copied.py", *arguments]
    subprocess.run(program, cwd=tmp_path, env=env, check=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"my_module_suite_Terminated-v0__copied__1__[\d.]+", run.name)
    assert len(evaluations(run)) == 2


def test_two_runs_in_the_same_second(main, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e-3 * len([*Path().glob("runs/*")]))
    for gamma in (0.9, 0.99):
        main(*TINY, "--total-timesteps", 10, "--gamma", gamma)
    runs = [json.loads(path.read_text())["gamma"] for path in Path("runs").glob("*/args.json")]
    assert {*runs} == {0.9, 0.99}


@pytest.mark.parametrize("rounds", [False, True])
def test_matrix_products_are_of_float32(main, monkeypatch, rounds):
    """Fast products are taken if they are exact, but not from a processor that rounds them to
    bfloat16 (a stand-in)."""
    exact = torch.Tensor.__matmul__

    def product(a, b):
        fast = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        if rounds and fast:
            a, b = a.bfloat16(), b.bfloat16()
        return exact(a.double(), b.double()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    torch.set_float32_matmul_precision("highest" if not rounds else "medium")
    main(*TINY, "--total-timesteps", 20)
    assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")


@pytest.mark.learning
def test_learns_inverted_pendulum(run_script, tmp_path):
    """At 20 000 steps it balances longer than TD3 did: 666 of 1000, the authors' mean over 10
    seeds (gym v1)."""
    flags = "--env-id InvertedPendulum-v4 --critic-width 256 --total-timesteps 20000 --run-name a"
    assert run_script("crossq_sac.py", *flags.split(), timeout=3600).returncode == 0
    last = [float(row["return"]) for row in evaluations(tmp_path / "runs/a")][-5:]
    assert np.mean(last) > 666
