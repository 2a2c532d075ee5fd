"""The contract of a run, script by script: command line, files, exact resume after any kill,
signals, errors."""

import ast
import csv
import difflib
import functools
import importlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import ROOT, command, environment, on_each_device
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\n# /// script\n" in path.read_text())
TINY = """--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 40
    --device cpu --compile off --eval-every 50 --eval-episodes 2 --total-timesteps 150 --checkpoint-every 37""".split()
MAY_CHANGE = {"device", "compile", "eval_every", "eval_episodes", "checkpoint_every", "track"}
RUN = MAY_CHANGE | {
    "env_id",
    "seed",
    "total_timesteps",
    "run_name",
    "resume",
    "evaluate",
}  # the rest is the algorithm


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Runs in this process must keep neither its signal handlers, nor the search path, nor other
    settings of it."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def main(request, tmp_path, monkeypatch):
    """main(*arguments) runs a script in this process, in tmp_path, and returns the exit code;
    main.module is it."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **parts):
        return run.module.main([str(a) for a in arguments], **parts)

    run.module = importlib.import_module(
        getattr(request, "param", "crossq_sac.py").removesuffix(".py")
    )
    return run


every_script = pytest.mark.parametrize("main", SCRIPTS, indirect=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(main) is the folder of a run of TINY that nothing interrupted, made once per script."""

    @functools.cache
    def make(module):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("whole"))
            assert module.main([*TINY, "--run-name", "whole"]) == 0
            return Path("runs/whole").resolve()

    return lambda main: make(main.module)


@pytest.fixture
def own_env(monkeypatch):
    """own_env(step=..., reset=...) registers tiny_envs.Constant with these attributes replaced, and
    returns its id."""

    def register(**attributes):
        cls = type("Own", (tiny_envs.Constant,), attributes)
        spec = gym.envs.registration.EnvSpec("Own-v0", entry_point=cls, disable_env_checker=True)
        monkeypatch.setitem(gym.registry, "Own-v0", spec)
        return "Own-v0"

    return register


def flag(name):
    return f"--{name.replace('_', '-')}"


def another(name, value):
    """The arguments that give a field of Args another value."""
    if isinstance(value, bool):
        return [f"--no-{flag(name)[2:]}" if value else flag(name)]
    text = "high" if name == "matmul_precision" else "other"
    return [
        flag(name),
        text
        if isinstance(value, str | None)
        else value + 1
        if isinstance(value, int)
        else value / 2,
    ]


def load(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def files(run):
    return {path.name: path.read_bytes() for path in Path(run).iterdir()}


def evaluations(run):
    return list(csv.DictReader(open(Path(run) / "evaluations.csv")))


def scalars(run, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(tag)]


def leaves(x, path=""):
    """Every tensor and number of a nested checkpoint with its path, but what names the run
    itself."""
    items = (
        x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else None
    )
    if items is None:
        yield path, x
    for key, value in items or ():
        if key not in ("args", "starts"):
            yield from leaves(value, f"{path}/{key}")


def assert_identical(a, b):
    """evaluations.csv and every tensor of the two checkpoints, bit by bit."""
    assert (Path(a) / "evaluations.csv").read_bytes() == (Path(b) / "evaluations.csv").read_bytes()
    left, right = dict(leaves(load(a))), dict(leaves(load(b)))
    assert left.keys() == right.keys() and len(left) > 50
    for key, value in left.items():
        equal = (
            torch.equal(value, right[key])
            if isinstance(value, torch.Tensor)
            else value == right[key]
        )
        assert equal, key


def refused(main, capsys, *arguments, code=2, tyro=False):
    """Runs main, expects that exit code and one line on stderr (tyro: its own box); returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(*arguments)
    err = capsys.readouterr().err
    assert e.value.code == code, err
    assert tyro or (err.count("\n") == 1 and err.startswith("error: ")), err
    return " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())


# ------------------------------------------------------------------------------ the same, and again


@every_script
def test_same_seed_same_result_and_another_seed_another(main, whole):
    assert main(*TINY, "--run-name", "same") == 0
    assert_identical(whole(main), "runs/same")
    for seed in (1, 2):
        assert main(*TINY, "--run-name", seed, "--seed", seed, "--total-timesteps", 10) == 0
    a, b = load("runs/1"), load("runs/2")
    assert not any(
        torch.equal(a["agent"][key], b["agent"][key]) for key in a["agent"] if "weights" in key
    )
    assert (
        not torch.isclose(a["rows"], b["rows"]).all(0)[[1, 3, 4]].any()
    )  # what the reset drew, and the actions


@every_script
def test_resume_from_any_step(main, whole, monkeypatch):
    """In the random warm-up, at its end, at an episode's end, in the middle of one and after an
    evaluation."""
    add, count, stops = main.module.ReplayBuffer.add, [0], [1, 25, 40, 41, 60, 100, 123]

    def stopping_add(self, *transition):
        add(self, *transition)
        count[0] += 1
        if count[0] in stops:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(main.module.ReplayBuffer, "add", stopping_add)
    for stop in stops:
        assert main(*(("--resume", "runs/a") if stop > 1 else (*TINY, "--run-name", "a"))) == 143
        assert load("runs/a")["run"]["step"] == stop
    assert main("--resume", "runs/a") == 0
    assert_identical(whole(main), "runs/a")


def wait_for(condition, timeout=300):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "it never came"
        time.sleep(0.01)


def kill_at_random(script, arguments, folder, targets):
    """For each target a real process, killed a random time after its checkpoint holds that step;
    the first begins folder/runs/killed, the others resume it. Returns how many were still alive."""
    run, kills, clock = folder / "runs/killed", 0, random.Random(0)
    arguments = [*arguments, "--run-name", "killed"]
    for target in targets:
        process = subprocess.Popen(command(script, *arguments), cwd=folder, env=environment())
        wait_for(
            lambda target=target: (
                (run / "checkpoint.pt").exists() and load(run)["run"]["step"] >= target
            )
        )
        time.sleep(clock.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.wait()
        arguments = ["--resume", "runs/killed"]
    return kills


def test_resume_after_sigkill_at_random_moments(main, tmp_path):
    """Real processes, killed again and again: the last one ends like a run that never stopped."""
    arguments = [*TINY, "--total-timesteps", 300, "--eval-every", 100]
    assert main(*arguments, "--run-name", "whole") == 0
    assert kill_at_random("crossq_sac.py", arguments, tmp_path, (50, 130))
    assert main("--resume", "runs/killed") == 0
    assert_identical("runs/whole", "runs/killed")


class Killed(BaseException):
    """Like a kill for all that a script can do about it: it catches only Exceptions."""


@pytest.mark.parametrize(
    "when", ["writing the first", "writing", "before the rename", "after the rename"]
)
def test_killed_while_a_checkpoint_is_written(main, whole, capsys, monkeypatch, when):
    """Half-written, whole but not renamed, just renamed: the checkpoint that is seen is always
    whole."""
    save, replace, calls, nth = torch.save, os.replace, [0], 1 if "first" in when else 4

    def dying_save(state, file):
        save(state, file)
        calls[0] += 1
        if calls[0] == nth and "writing" in when:
            file.truncate(file.tell() // 2)
            raise Killed

    def dying_replace(a, b):
        if calls[0] < nth or "after" in when:
            replace(a, b)
        if calls[0] == nth:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", dying_save)
        patch.setattr(os, "replace", dying_replace)
        main(*TINY, "--run-name", "a")
    if "first" in when:  # there is nothing to resume, and the same command starts anew
        assert "runs/a" in refused(main, capsys, "--resume", "runs/a")
        assert main(*TINY, "--run-name", "a") == 0
    else:
        assert load("runs/a")["run"]["step"] == (111 if "after" in when else 74)
        assert main("--resume", "runs/a") == 0
    assert_identical(whole(main), "runs/a")


@on_each_device
def test_resume_with_a_full_buffer_and_utd_and_action_repeat(main, device):
    """The ring buffer has turned over at the checkpoint, batch renorm has left its warm-up."""
    arguments = [*TINY, "--device", device, "--buffer-size", 64, "--utd", 2]
    arguments += ["--action-repeat", 2, "--brn-warmup", 30]
    assert main(*arguments, "--run-name", "whole", "--total-timesteps", 240) == 0
    assert main(*arguments, "--run-name", "part", "--total-timesteps", 146) == 0
    assert main("--resume", "runs/part", "--total-timesteps", 240) == 0
    assert_identical("runs/whole", "runs/part")


@pytest.mark.parametrize("env", ["Walker2d-v4", "Hopper-v4"])
def test_resume_in_the_middle_of_a_mujoco_episode(main, env):
    """The open episode's actions, played again, lead to the same state of the simulator."""
    arguments = [*TINY, "--env-id", env, "--eval-every", 55]
    assert main(*arguments, "--run-name", "whole", "--total-timesteps", 160) == 0
    assert main(*arguments, "--run-name", "part", "--total-timesteps", 60) == 0
    # Where an episode ends depends on the processor's rounding.
    for steps in range(66, 120, 6):
        if len(load("runs/part")["run"]["actions"]) > 5:
            break
        assert main("--resume", "runs/part", "--total-timesteps", steps) == 0
    assert len(load("runs/part")["run"]["actions"]) > 5
    assert main("--resume", "runs/part", "--total-timesteps", 160) == 0
    assert_identical("runs/whole", "runs/part")


@on_each_device
def test_compiled_run_resumes_exactly(main, device):
    """torch.compile changes nothing of that."""
    torch._dynamo.reset()  # it compiles a function only so many times in one process
    arguments = [*TINY, "--device", device, "--compile", "on"]
    assert main(*arguments, "--run-name", "whole", "--total-timesteps", 90) == 0
    assert main(*arguments, "--run-name", "part", "--total-timesteps", 60) == 0
    assert load("runs/part")["args"]["compile"] == "on"
    assert main("--resume", "runs/part", "--total-timesteps", 90) == 0
    assert_identical("runs/whole", "runs/part")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(main, tmp_path, number, code):
    """A real process: the exit code, how to go on, and nothing lost."""
    arguments = [
        *TINY,
        "--total-timesteps",
        100_000,
        "--run-name",
        "stopped",
        "--checkpoint-every",
        100_000,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command("crossq_sac.py", *arguments), cwd=tmp_path, env=environment(), **pipes
    )
    table = tmp_path / "runs/stopped/evaluations.csv"
    wait_for(lambda: table.exists() and table.read_text().count("\n") >= 4)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "--resume runs/stopped" in out and err == ""
    assert load("runs/stopped")["run"]["step"] >= 100
    assert main("--evaluate", "runs/stopped") == 0


def test_a_signal_while_a_checkpoint_is_written(main, whole, capsys, monkeypatch):
    """It is finished first, and nothing is lost."""
    save, calls = torch.save, [0]

    def interrupted(*arguments):
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert main(*TINY, "--run-name", "stopped") == 130
    assert "step 37" in (out := capsys.readouterr().out) and "--resume runs/stopped" in out
    assert load("runs/stopped")["run"]["step"] == 37
    assert main("--resume", "runs/stopped") == 0
    assert_identical(whole(main), "runs/stopped")


@pytest.mark.parametrize("env_step", [0, 7, 13])
def test_a_signal_in_an_evaluation(main, whole, env_step):
    """It ends at once, in its first step, in an episode or in the next one; the resumed run does it
    again from its start: no row is lost or doubled."""

    def interrupted(agent, env, step, run_dir):
        step_env, calls = env.step, [0]

        def stepping(action):
            calls[0] += 1
            assert calls[0] <= env_step + 1, "the evaluation went on"
            if calls[0] == env_step + 1:
                signal.raise_signal(signal.SIGTERM)
            return step_env(action)

        env.step = stepping
        return main.module.evaluate(agent, env, step, run_dir)

    assert main(*TINY, "--run-name", "stopped", evaluate=interrupted) == 143
    assert load("runs/stopped")["run"]["step"] == 50 and not evaluations("runs/stopped")
    assert main("--resume", "runs/stopped") == 0
    assert_identical(whole(main), "runs/stopped")


def test_an_open_episode_that_does_not_replay(main, capsys, monkeypatch):
    """As on another processor: said in one line, and the run goes on with a fresh episode."""
    assert main(*TINY, "--run-name", "a", "--total-timesteps", 35) == 0
    episode, obs = load("runs/a")["run"]["episode"], tiny_envs.Constant._obs
    monkeypatch.setattr(tiny_envs.Constant, "_obs", lambda self: obs(self) + 1e-3)
    capsys.readouterr()
    assert main("--resume", "runs/a", "--total-timesteps", 36) == 0
    assert capsys.readouterr().out.count("does not replay bit by bit") == 1
    run = load("runs/a")["run"]
    assert run["episode"] == episode + 1 and len(run["actions"]) == 1
    assert main("--resume", "runs/a", "--total-timesteps", 60) == 0
    assert "does not replay" not in capsys.readouterr().out and len(evaluations("runs/a")) == 2


# ------------------------------------------------------------------------------------------- errors

WRONG = {
    "an unknown environment": ("--env-id Hoper-v4", "Did you mean: `Hopper`"),
    "a version that does not exist": ("--env-id Hopper-v99", "v5"),
    "an unknown module": ("--env-id no_such_module:X-v0", "no_such_module"),
    "discrete actions": ("--env-id tiny_envs:Discrete-v0", "Discrete(3)"),
    "unbounded actions": ("--env-id tiny_envs:Unbounded-v0", "bounded"),
    "images": ("--env-id tiny_envs:Image-v0", "no images"),
    "an unknown flag": ("--gama 0.9", "--gamma"),
    "a value too many": ("extra", "extra"),
    "a value too few": ("--seed", "--seed"),
    "no number": ("--gamma much", "--gamma"),
    "no whole number": ("--total-timesteps 1e6", "--total-timesteps"),
    "no choice": ("--device tpu", "--device"),
    "gamma above 1": ("--gamma 1.5", "--gamma"),
    "beta1 of 1": ("--adam-beta1 1", "--adam-beta1"),
    "a seed beyond 64 bits": (f"--seed {2**80}", "--seed"),
    "a batch above the buffer": ("--buffer-size 8", "--buffer-size"),
    "a buffer above the memory": (f"--buffer-size {10**15}", f"--buffer-size {10**15}:"),
    "a run that is not there": ("--resume runs/none", "runs/none"),
    "a checkpoint for a folder": ("--resume runs/a/checkpoint.pt", "runs/a/checkpoint.pt"),
    "nothing to evaluate": ("--evaluate runs/none", "runs/none"),
    "an empty run": ("--resume=", "checkpoint.pt"),
    "an empty run to evaluate": ("--evaluate=", "checkpoint.pt"),
}


TYROS = "an unknown flag,a value too many,a value too few,no number,no whole number,no choice"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(main, capsys, case):
    """Exit code 2, one line (or tyro's box) that names the culprit, nothing created."""
    arguments, hint = WRONG[case]
    arguments = [*TINY, "--total-timesteps", 41, *arguments.split()]
    assert hint in refused(main, capsys, *arguments, tyro=case in TYROS.split(","))
    assert not [path for path in Path().iterdir() if path.name != "__pycache__"]


ZERO = {"seed", "brn_warmup", "gamma", "learning_starts", "adam_beta1", "alpha_lr", "tau", "weight_decay", "exploration_noise",
        "target_noise", "target_noise_clip"}  # fmt: skip


@every_script
def test_numbers_out_of_range(main, capsys):
    """Every number of Args: negative, not a number or infinite; and zero, but where that makes
    sense."""
    for name, value in vars(main.module.Args()).items():
        if type(value) in (int, float):
            for wrong in ("-3", "nan", "inf", *(["0"] if name not in ZERO else [])):
                arguments, box = [*TINY, flag(name), wrong], wrong in ("nan", "inf")
                box = box and isinstance(value, int)  # tyro's, which knows no such whole number
                assert flag(name) in refused(main, capsys, *arguments, tyro=box), (name, wrong)
            if name in ZERO:
                assert vars(main.module.parse_args([*TINY, flag(name), "0"])[0])[name] == 0
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(main, capsys):
    assert "--device cpu" in refused(main, capsys, *TINY, "--device", "cuda")


@pytest.mark.parametrize("shape, dtype", [((2,), "int64"), ((2, 3), "float32"), ((), "float32")])
def test_actions_that_are_no_vector_of_floats(main, capsys, own_env, shape, dtype):
    space = gym.spaces.Box(0, 3, shape, np.dtype(dtype).type)
    assert repr(space) in refused(main, capsys, *TINY, "--env-id", own_env(action_space=space))
    assert not Path("runs").exists()


def test_missing_optional_package(main, capsys, monkeypatch):
    """The install command is named, and nothing created."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(main, capsys, *TINY, "--track")
    assert not Path("runs").exists()


def test_a_real_process_says_one_line(tmp_path):
    """Nothing else on stderr, no warning either; exit code 2."""
    env = {k: v for k, v in environment().items() if k != "PYTHONWARNINGS"}
    arguments = command("crossq_sac.py", "--env-id", "Hoper-v4")
    out = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 2 and out.stdout == "" and not list(tmp_path.iterdir())
    assert out.stderr.count("\n") == 1 and "Hopper" in out.stderr


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "list", "foreign", "code"])
def test_damaged_checkpoints(main, capsys, whole, damage):
    """Exit code 2, one line, the file as it was; a checkpoint is data and never code."""

    class Code:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    path = Path(shutil.copytree(whole(main), "runs/a")) / "checkpoint.pt"
    data = path.read_bytes()
    if damage == "list":
        torch.save([1, 2], path)
    elif damage == "foreign":
        torch.save(load("runs/a") | {"program": "other"}, path)
    else:
        new = {"truncated": data[: len(data) // 2], "random": os.urandom(len(data)), "empty": b""}
        path.write_bytes((new | {"code": pickle.dumps(Code(), protocol=2)})[damage])
    damaged = files("runs/a")
    for option in ("--resume", "--evaluate"):
        assert "runs/a" in refused(main, capsys, option, "runs/a")
    assert files("runs/a") == damaged and not Path("executed").exists()


@pytest.mark.parametrize(("env", "named"), [("NanObs", "nan"), ("InfReward", "inf")])
def test_nan_from_the_environment(main, capsys, env, named):
    """Stops with code 1 at that step; the last good checkpoint stays."""
    err = refused(main, capsys, *TINY, "--env-id", f"tiny_envs:{env}-v0", "--run-name", "a", code=1)
    assert "step 57" in err and named in err.lower()
    assert load("runs/a")["run"]["step"] == 37


@pytest.mark.parametrize("at", [0, 20])
def test_nan_from_a_reset(main, capsys, own_env, at):
    """The first or third episode begins with NaN: it reaches neither the buffer's file nor a later
    checkpoint."""

    def reset(self, seed=None, options=None):
        obs, info = tiny_envs.Constant.reset(self, seed=seed)
        return (obs * np.nan if self.total_steps == at else obs), info

    arguments = [
        *TINY,
        "--env-id",
        own_env(reset=reset),
        "--run-name",
        "a",
        "--checkpoint-every",
        10,
    ]
    err = refused(main, capsys, *arguments, "--total-timesteps", 42, code=1)
    assert re.search(rf"nan.* step ({at}|{at + 1})\b", err, re.I)
    if at == 0:
        assert not Path("runs").exists()
    else:
        checkpoint = load("runs/a")
        assert checkpoint["rows"].isfinite().all() and np.isfinite(checkpoint["obs"]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_reward_that_float32_cannot_hold(main, capsys, own_env):
    def step(self, action):
        obs, _, *rest = tiny_envs.Constant.step(self, action)
        return obs, 1e39 if self.total_steps == 30 else 1.0, *rest

    arguments = [*TINY, "--env-id", own_env(step=step), "--run-name", "a", "--checkpoint-every", 10]
    assert "step 30" in refused(main, capsys, *arguments, code=1)
    assert load("runs/a")["rows"].isfinite().all() and load("runs/a")["run"]["step"] == 20


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_nan_in_an_evaluation(main, capsys, own_env, what):
    """The second environment of a run is that of the evaluations."""
    made = []

    def init(self):
        made.append(self)
        tiny_envs.Constant.__init__(self)

    def step(self, action):
        obs, reward, *rest = tiny_envs.Constant.step(self, action)
        factor = np.nan if self is made[-1] and len(made) > 1 and self.t == 3 else 1.0
        return (obs, reward * factor, *rest) if what == "reward" else (obs * factor, reward, *rest)

    arguments = [*TINY, "--env-id", own_env(__init__=init, step=step), "--run-name", "a"]
    err = refused(main, capsys, *arguments, "--total-timesteps", 51, code=1)
    assert re.search(r"\b50\b", err) and "nan" in err.lower()
    assert not evaluations("runs/a") and load("runs/a")["run"]["step"] == 37


@every_script
def test_nan_in_a_loss(main, capsys, monkeypatch):
    update, calls = main.module.Agent.update, [0]

    def diverging(self, *arguments):
        calls[0] += 1
        info = update(self, *arguments)
        return info | {
            "losses/critic": info["losses/critic"] * (float("nan") if calls[0] >= 10 else 1)
        }

    monkeypatch.setattr(main.module.Agent, "update", diverging)
    flags = "--utd 1 --total-timesteps 100 --checkpoint-every 45 --run-name a".split()
    err = refused(main, capsys, *TINY, *flags, code=1)
    assert "losses/critic" in err and "step 90" in err
    assert load("runs/a")["run"]["step"] == 45


def test_a_full_disk_keeps_the_last_checkpoint(main, capsys):
    """Really full: a limit on the size of files, met in the middle of torch.save."""
    arguments = [*TINY, "--critic-width", 64, "--run-name", "a"]
    assert main(*arguments, "--total-timesteps", 37) == 0
    size, limits = (
        Path("runs/a/checkpoint.pt").stat().st_size,
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    try:  # Adam's moments come with the first update: the next checkpoint is three times as large
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size // 2, limits[1]))
        with pytest.raises((OSError, RuntimeError)):  # a fault in training keeps its traceback
            main("--resume", "runs/a", "--total-timesteps", 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load("runs/a")["run"]["step"] == 37
    assert main("--resume", "runs/a", "--total-timesteps", 60) == 0


def test_unwritable_run_folder(main, capsys):
    Path("runs").write_text("a file where the folder should be")
    assert "runs" in refused(main, capsys, *TINY)


def test_an_existing_run_is_never_overwritten(main, whole, capsys):
    """Not even one whose large checkpoint was deleted."""
    shutil.copytree(whole(main), "runs/a")
    for _ in range(2):
        before = files("runs/a")
        assert "runs/a already holds a run" in refused(
            main, capsys, *TINY, "--run-name", "a", "--seed", 2
        )
        assert before == files("runs/a")
        Path("runs/a/checkpoint.pt").unlink(missing_ok=True)


@every_script
def test_resume_refuses_what_would_change_the_run(main, whole, capsys):
    """Each field of Args by name, but the ones that say where and how the run goes on."""
    shutil.copytree(whole(main), "runs/a")
    before = files("runs/a")
    for name, old in load("runs/a")["args"].items():
        if name not in MAY_CHANGE | {"total_timesteps", "resume", "evaluate"}:
            assert f"'{name}'" in refused(main, capsys, "--resume", "runs/a", *another(name, old))
    assert "total_timesteps" in refused(
        main, capsys, "--resume", "runs/a", "--total-timesteps", 149
    )
    assert before == files("runs/a")


def test_resume_takes_what_does_not_change_the_run(main, whole):
    shutil.copytree(whole(main), "runs/a")
    new = "--gamma 0.99 --total-timesteps 155 --eval-every 155 --eval-episodes 1 --checkpoint-every 9 --device auto"
    assert main("--resume", "runs/a", *new.split()) == 0
    assert load("runs/a")["run"]["step"] == 155 and [row["step"] for row in evaluations("runs/a")][
        -2:
    ] == ["150", "155"]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(main, whole):
    shutil.copytree(whole(main), "runs/a")
    assert main("--resume", "runs/a/") == 0
    assert_identical(whole(main), "runs/a")


# ----------------------------------------------------------------------------------- files of a run


@every_script
def test_files_of_a_run(main):
    """args.json, evaluations.csv and TensorBoard's tags; steps are environment steps."""
    arguments = [
        *TINY,
        "--action-repeat",
        2,
        "--total-timesteps",
        2000,
        "--learning-starts",
        990,
        "--eval-every",
        1000,
    ]
    assert main(*arguments, "--run-name", "x/y") == 0
    run = Path("runs/x_y")
    about = json.loads((run / "args.json").read_text())
    (start,) = about["starts"]
    assert about["args"]["action_repeat"] == 2 and start["torch"] == version("torch")
    assert {"device", "git", "gymnasium", "mujoco", "numpy"} <= start.keys()
    rows = evaluations(run)
    assert b"\r" not in (run / "evaluations.csv").read_bytes()
    assert list(rows[0]) == ["step", "episode", "return", "length", "success"]
    assert [
        (r["step"], r["episode"], float(r["return"]), r["length"], r["success"]) for r in rows
    ] == [(step, episode, 10.0, "10", "") for step in ("1000", "2000") for episode in ("0", "1")]
    tags = {"losses/critic", "losses/actor", "diagnostics/q_mean", "charts/SPS"}
    tags |= (
        {"diagnostics/alpha", "diagnostics/entropy"}
        if hasattr(main.module.Args, "alpha")
        else set()
    )
    assert tags <= set(EventAccumulator(str(run)).Reload().Tags()["scalars"])
    assert scalars(run, "eval/return") == [(1000, 10.0), (2000, 10.0)]
    assert scalars(run, "charts/episodic_return")[0] == (10, 10.0)


def test_tensorboard_keeps_what_was_written_before_a_resume(main, whole):
    shutil.copytree(whole(main), "runs/a")
    assert main("--resume", "runs/a", "--total-timesteps", 200) == 0
    assert [step for step, _ in scalars("runs/a", "eval/return")] == [50, 100, 150, 200]


def test_the_git_revision_if_any(main, monkeypatch):
    """Where there is none, neither is an error message in its place."""
    repository = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    for name, path in (("with", os.environ["PATH"]), ("without", "/nonexistent")):
        monkeypatch.setenv("PATH", path)
        assert main(*TINY, "--run-name", name, "--total-timesteps", 10) == 0
        (start,) = json.loads(Path(f"runs/{name}/args.json").read_text())["starts"]
        found = start["git"]
        assert found == (repository.stdout.strip() if name == "with" else "")


def test_default_run_name(main):
    assert main(*TINY, "--total-timesteps", 10) == 0
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny_envs_Truncated-v0__crossq_sac__1__\d+", run.name)


@pytest.mark.parametrize("name", [".", "..", "../a", "a/b"])
def test_a_run_is_a_folder_under_runs(main, name):
    assert main(*TINY, "--total-timesteps", 10, "--run-name", name) == 0
    assert (
        len([*Path().glob("runs/*/checkpoint.pt")]) == 1
        and len([*Path().rglob("checkpoint.pt")]) == 1
    )


def test_evaluate_leaves_the_run_as_it_is(main, whole, capsys):
    shutil.copytree(whole(main), "runs/a")
    assert main("--evaluate", "runs/a", "--eval-episodes", 3) == 0
    assert "10.0 ± 0.0" in capsys.readouterr().out and files("runs/a") == files(whole(main))


@every_script
@pytest.mark.parametrize("processor", ["this one", "exact", "rounds"])
def test_matrix_products_are_of_float32(main, monkeypatch, processor):
    """The fast products are taken if they are exact; not from a processor that rounds them to
    bfloat16 (stand-in)."""
    exact = torch.Tensor.__matmul__

    def product(a, b):
        if (
            processor == "rounds"
            and a.dtype == torch.float32
            and torch.get_float32_matmul_precision() == "medium"
        ):
            a, b = a.bfloat16(), b.bfloat16()
        return exact(a.double(), b.double()).float()

    if processor != "this one":
        monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert main(*TINY, "--total-timesteps", 20) == 0
    if processor != "this one":
        assert (
            torch.get_float32_matmul_precision()
            == {"exact": "medium", "rounds": "highest"}[processor]
        )
    a = torch.rand(300, 300)
    assert (a @ a - exact(a.double(), a.double())).abs().max() < 1e-3
    for precision in ("high", "medium") if processor == "rounds" else ():  # asked for
        assert (
            main(
                *TINY,
                "--total-timesteps",
                20,
                "--matmul-precision",
                precision,
                "--run-name",
                precision,
            )
            == 0
        )
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("key", ["is_success", "success", "solved"])
def test_success_at_any_time_of_an_episode_counts(main, capsys, own_env, key):
    """Every second episode of the evaluation succeeds, for one step in its middle."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = tiny_envs.Constant.step(self, action)
        return (
            obs,
            reward,
            terminated,
            truncated,
            {key: self.t == 5 and (self.total_steps - 1) // 10 % 2 == 1},
        )

    assert (
        main(*TINY, "--env-id", own_env(step=step), "--run-name", "a", "--total-timesteps", 50) == 0
    )
    assert [row["success"] for row in evaluations("runs/a")] == ["0", "1"]
    capsys.readouterr()
    assert main("--evaluate", "runs/a") == 0
    assert "success 0.50" in capsys.readouterr().out


def test_dictionary_observations_train(main):
    assert (
        main(*TINY, "--env-id", "tiny_envs:DictObs-v0", "--run-name", "a", "--total-timesteps", 45)
        == 0
    )
    assert load("runs/a")["rows"].shape == (45, 3 + 2 + 1 + 1 + 3)


def test_one_line_at_the_start_one_per_evaluation_one_at_the_end(main, capsys):
    """The first one says what is no default, the device and the size of the buffer."""
    assert main(*TINY, "--run-name", "a", "--eval-every", 70) == 0
    start, *evaluated, end = capsys.readouterr().out.splitlines()
    assert start.startswith("runs/a on CPU, ") and "buffer 40,000,000 bytes" in start
    assert "env_id tiny_envs:Truncated-v0, total_timesteps 150, device cpu" in start
    assert "critic_width 16" in start and "gamma" not in start
    assert [line.split(":")[0] for line in evaluated] == ["step 70", "step 140"]
    assert all(re.search(r"return 10\.0; [1-9]\d* steps/s$", line) for line in evaluated)
    assert end.startswith("ended at step 150")


def test_own_module_may_be_called_like_a_suite(main):
    for module in ("myown", "dm_own"):
        Path(f"{module}.py").write_text(
            "import gymnasium, tiny_envs\ngymnasium.register('Mine-v0', tiny_envs.Constant, disable_env_checker=True)"
        )
        assert (
            main(
                *TINY,
                "--env-id",
                f"{module}:Mine-v0",
                "--run-name",
                module,
                "--total-timesteps",
                10,
            )
            == 0
        )
        assert load(f"runs/{module}")["args"]["action_repeat"] == 1


def test_track_logs_to_weights_and_biases(main, monkeypatch):
    """It copies TensorBoard's events, so it must begin before them; a resumed run goes on under the
    same id."""
    calls = []

    def init(**kwargs):
        calls.append(kwargs | {"events": list(Path().rglob("events.out*"))})

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=True))
    assert main(*TINY, "--run-name", "a", "--total-timesteps", 10, "--track") == 0
    assert main("--resume", "runs/a", "--total-timesteps", 20) == 0
    assert [call["id"] for call in calls] == ["a", "a"] and all(
        call["sync_tensorboard"] for call in calls
    )
    assert calls[0]["config"]["gamma"] == 0.99 and calls[0]["events"] == []


# ---------------------------------------------------------------------------------------- the flags


@every_script
def test_every_flag_of_the_algorithm_changes_the_networks(main):
    """Each alone; a flag that did nothing would leave the plain run's weights."""
    arguments = [
        *TINY,
        "--learning-starts",
        5,
        "--total-timesteps",
        20,
        "--buffer-size",
        18,
    ]  # which turns over
    if hasattr(main.module.Args, "brn_warmup"):
        arguments += ["--brn-warmup", 2]
    assert main(*arguments, "--run-name", "plain") == 0
    plain, args = load("runs/plain")["agent"], load("runs/plain")["args"]
    for name in (
        args.keys() - RUN - {"matmul_precision"}
    ):  # it changes what the processor can, which may be nothing
        assert main(*arguments, *another(name, args[name]), "--run-name", name) == 0
        changed = load(f"runs/{name}")["agent"]
        networks = [key for key in plain if key.startswith(("critic.", "actor."))]
        assert any(not torch.equal(plain[key], changed[key]) for key in networks), name


PAPER = {"critic_width": 2048, "actor_width": 256, "n_critics": 2, "critic_lr": 1e-3, "actor_lr": 1e-3,
         "adam_beta1": 0.5, "brn_warmup": 100_000, "policy_delay": 3, "utd": 1, "batch_size": 256, "buffer_size": 1_000_000,
         "learning_starts": 5000, "gamma": 0.99, "action_repeat": 1, "matmul_precision": "highest"}  # fmt: skip
SAC = {"alpha_lr": 1e-3, "alpha": 1.0}
TD3 = {"exploration_noise": 0.1, "target_noise": 0.2, "target_noise_clip": 0.5}
BASELINE = {"critic_width": 256, "adam_beta1": 0.9, "policy_delay": 1, "tau": 0.005}
WN = {"critic_width": 512, "critic_lr": 1e-4, "actor_lr": 1e-4, "alpha_lr": 1e-4, "utd": 5, "tau": 0.005,
      "weight_decay": 0.01, "entropy_factor": 1.0, "alpha": 0.01}  # fmt: skip
DEFAULTS = {
    "crossq_sac": PAPER | SAC,
    "crossq_td3": PAPER | TD3,
    "crossq_wn_highutd": PAPER | SAC | WN,
    "sac_baseline": PAPER | SAC | BASELINE,
}
del DEFAULTS["sac_baseline"]["brn_warmup"]
del DEFAULTS["crossq_wn_highutd"]["brn_warmup"], DEFAULTS["crossq_wn_highutd"]["adam_beta1"]


@every_script
def test_defaults_are_the_papers(main):
    """Table 1, section 3.3 and the official code: every hyper-parameter, and the layer's own."""
    args = vars(main.module.Args())
    assert {name: value for name, value in args.items() if name not in RUN} == DEFAULTS[
        main.module.__name__
    ]
    assert (args["eval_every"], args["eval_episodes"], args["total_timesteps"]) == (
        10_000,
        5,
        1_000_000,
    )
    if hasattr(main.module, "BatchRenorm"):
        layer = main.module.BatchRenorm((1, 1))
        assert (layer.eps, layer.momentum, layer.r_max, layer.d_max, layer.warmup) == (
            1e-3,
            0.99,
            3,
            5,
            100_000,
        )


CONTRACT = """env_id seed total_timesteps device critic_width actor_width batch_size buffer_size learning_starts gamma
    utd policy_delay action_repeat eval_every eval_episodes run_name checkpoint_every resume evaluate track compile
    matmul_precision""".split()


@every_script
def test_help_explains_every_flag(main, capsys):
    with pytest.raises(SystemExit) as end:
        main("--help")
    assert end.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    source = Path(main.module.__file__).read_text().splitlines()
    assert set(CONTRACT) <= vars(main.module.Args()).keys()
    for name in vars(main.module.Args()):
        (line,) = [x for x in source if re.match(rf"    {name}: ", x)]
        assert re.search(rf"{flag(name)}(?![\w-])", text) and line.split("  # ")[1][:30] in text, (
            name
        )


@every_script
def test_every_flag_is_used(main):
    """No dead flag: each field is read somewhere, as args.NAME."""
    nodes = ast.walk(ast.parse(Path(main.module.__file__).read_text()))
    read = {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute) and re.search(r"\bargs$", ast.unparse(n.value))
    }
    assert vars(main.module.Args()).keys() <= read


# ----------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("script", SCRIPTS)
def test_alone_in_an_empty_folder_with_the_users_own_environment(tmp_path, script):
    """The file copied out runs by itself, and finds my_module in the current directory, not beside
    the script."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROOT / script, tmp_path / "elsewhere/copied.py")
    shutil.copy(ROOT / "tests/tiny_envs.py", tmp_path / "my_module.py")
    arguments = [
        *TINY,
        "--env-id",
        "my_module:Terminated-v0",
        "--run-name",
        "a",
        "--total-timesteps",
        "50",
    ]
    env = {k: v for k, v in environment().items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    arguments = [sys.executable, "elsewhere/copied.py", *arguments]
    out = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "") and len(evaluations(tmp_path / "runs/a")) == 2


def test_import_has_no_side_effect(tmp_path):
    code = (
        "import os, signal, torch; state = lambda: (signal.getsignal(signal.SIGINT), torch.get_default_dtype(),"
        "torch.get_float32_matmul_precision(), torch.get_rng_state().sum()); before = state()\n"
        f"for name in {[script[:-3] for script in SCRIPTS]}: __import__(name); assert before == state(), name\n"
        "assert not os.listdir()"
    )
    env = environment() | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


@on_each_device
@every_script
def test_smoke_on_mujoco(main, capsys, device):
    """A real task; the policy that --evaluate loads, running statistics included, is the one that
    was evaluated."""
    arguments = [
        *TINY,
        "--env-id",
        "Hopper-v4",
        "--device",
        device,
        "--run-name",
        "a",
        "--eval-episodes",
        3,
    ]
    assert main(*arguments) == 0
    returns = [float(row["return"]) for row in evaluations("runs/a") if row["step"] == "150"]
    assert json.loads(Path("runs/a/args.json").read_text())["starts"][0]["device"].startswith(
        "CPU"
    ) == (device == "cpu")
    capsys.readouterr()
    assert main("--evaluate", "runs/a") == 0
    assert (
        f"runs/a at step 150: {np.mean(returns):.1f} ± {np.std(returns):.1f}\n"
        == capsys.readouterr().out
    )


@pytest.mark.learning
def test_learns_inverted_pendulum(run_script, tmp_path):
    """At 20 000 steps it balances longer than TD3 did there: 666 of 1000, the authors' mean over 10
    seeds (gym v1)."""
    flags = "--env-id InvertedPendulum-v4 --critic-width 256 --total-timesteps 20000 --run-name learning"
    assert run_script("crossq_sac.py", *flags.split(), timeout=3600).returncode == 0
    rows = evaluations(tmp_path / "runs/learning")
    assert np.mean([float(row["return"]) for row in rows if row["step"] == "20000"]) > 666


# ------------------------------------------------------------------------- one text in all scripts

DIFFERENT = {  # what two scripts define in different words, and why
    "Args": "own hyper-parameters and defaults",
    "Args.suite_defaults": "what the first paper changes on DeepMind Control is of its own scripts",
    "MLP": "sac_baseline.py has no normalisation; CrossQ + WN has batch norm and projects its weights",
    "MLP.__init__": "the same",
    "MLP.forward": "sac_baseline.py has no normalisation",
    "Agent": "the algorithm",
    "Agent.__init__": "the target entropy: TD3 has none, that of CrossQ + WN is a flag",
    "Agent.reset": "target critic; TD3 has no temperature",
    "Agent.make_critic": "only batch renorm has a warm-up",
    "Agent.make_actor": "only batch renorm has a warm-up; TD3's has half the outputs",
    "Agent.make_optimizers": "TD3 has no temperature; the parameter groups of CrossQ + WN",
    "Agent.policy": "TD3's is deterministic",
    "Agent.actor_q": "what TD3 itself does",
    "Agent.critic_loss": "the joint pass; TD3's target",
    "Agent.actor_loss": "train and eval mode of batch norm; TD3's loss",
    "Agent.draw": "what the noise is for",
    "Agent.update": "target critic; TD3's actor update draws no noise; projections of CrossQ + WN",
    "Agent.act": "eval mode of batch norm; TD3's exploration noise",
}
OWN_IMPORTS = {
    "sac_baseline.py": {"import copy"},  # for the target critic
    "crossq_wn_highutd.py": {"from torch.optim import AdamW"},  # weight decay
}


def definitions(script):
    """Source text, decorators and all, of every top-level class, function and constant, and of a
    class's methods."""
    source = (ROOT / script).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), ast.get_source_segment(source, node)
        for part in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(part, ast.ClassDef | ast.FunctionDef):
                start = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
                name = part.name if part is node else f"{node.name}.{part.name}"
                yield name, source.splitlines()[start - 1 : part.end_lineno]


def test_definitions_are_the_same_text():
    """But for those that differ on purpose; a needless entry of that list fails too."""
    texts = {}
    for script in SCRIPTS:
        for name, text in definitions(script):
            texts.setdefault(name, set()).add(str(text))
    assert {name for name, versions in texts.items() if len(versions) > 1} == DIFFERENT.keys()


def test_imports_are_the_same():
    """But for a script's own needs; no script imports another."""
    common = []
    for script in SCRIPTS:
        nodes = ast.parse((ROOT / script).read_text()).body
        imports = [
            ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        own = OWN_IMPORTS.get(script, set())
        assert own <= set(imports) and not any(
            Path(other).stem in " ".join(imports) for other in SCRIPTS
        )
        adam = {"from torch.optim import Adam", "from torch.optim import AdamW"}
        common.append([line for line in imports if line not in own | adam])
    assert all(imports == common[0] for imports in common)


def test_inline_metadata_is_requirements_txt():
    """PEP 723: `uv run SCRIPT` installs what requirements.txt does, less pytest; the same text in
    every script."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    pattern = re.compile(r"^# /// script\n((?:#.*\n)+)# ///$", re.M)
    (block,) = {pattern.search((ROOT / script).read_text()).group(1) for script in SCRIPTS}
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    wanted = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["requires-python"] == ">=3.10"
    assert sorted(metadata["dependencies"]) == sorted(
        x for x in wanted if not x.startswith("pytest")
    )


def count_nodes(tree):
    left_out = ast.expr_context | ast.operator | ast.cmpop | ast.boolop | ast.unaryop
    return sum(not isinstance(node, left_out) for node in ast.walk(tree))


@pytest.mark.parametrize("script", SCRIPTS)
def test_density(script):
    """Lines of at most 100 columns, on average 52 characters and 7 syntax nodes; short
    functions."""
    text = (ROOT / script).read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    full = [line.strip() for line in lines if line.strip()]
    assert max(map(len, lines)) <= 100
    assert sum(map(len, full)) / len(full) <= 52 and count_nodes(tree) / len(full) <= 7
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_length(script):
    """What a student reads, above the last banner, has CleanRL's size. See Development in
    README."""
    text = (ROOT / script).read_text()
    algorithm = text[: text.index("nothing about CrossQ below")]
    assert len(algorithm.splitlines()) <= 420 and len(algorithm) <= 20_000
    assert len(text.splitlines()) <= 730 and len(text) <= 35_500


def test_the_diff_from_sac_to_crossq_is_short():
    """`diff sac_baseline.py crossq_sac.py` is the paper."""
    a, b = (
        (ROOT / script).read_text().splitlines() for script in ("sac_baseline.py", "crossq_sac.py")
    )
    lines = list(difflib.unified_diff(a, b, n=0, lineterm=""))[2:]
    assert 0 < sum(line[0] in "+-" for line in lines) < 110
