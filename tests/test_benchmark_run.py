"""benchmark/run.sh: a grid of tiny runs is stopped half-way and goes on, on this machine and with
Slurm."""

import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

RUN = ROOT / "benchmark/run.sh"
FLAGS = """--critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 40 --eval-every 50
    --eval-episodes 2 --checkpoint-every 37 --device cpu --compile off"""
SCRIPTS, ENVS = ["crossq_sac", "sac_baseline"], ["Truncated-v0", "gate:Gate-v0"]
SEEDS, STEPS = [1, 2], 150
GATE = """
import pathlib, time, gymnasium, tiny_envs
class Gate(tiny_envs.Constant):
    '''After 60 steps of training it waits until the file `open` is there.'''
    def step(self, action):
        if self.total_steps == 60 and not pathlib.Path('open').exists():
            pathlib.Path(f'waiting-{time.time_ns()}').touch()
        while self.total_steps == 60 and not pathlib.Path('open').exists():
            time.sleep(0.05)
        return super().step(action)
gymnasium.register('Gate-v0', Gate, disable_env_checker=True)
"""
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def environ():
    return environment() | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def grid(*arguments, scripts=SCRIPTS, envs=ENVS, seeds=SEEDS, steps=STEPS, flags=FLAGS):
    """The command line of a grid of tiny runs."""
    envs = [env if ":" in env else f"tiny_envs:{env}" for env in envs]
    lists = {"--scripts": scripts, "--envs": envs, "--seeds": seeds, "--steps": [steps]}
    lists["--flags"] = flags.split()
    words = (word for key, value in lists.items() for word in (key, " ".join(map(str, value))))
    return [RUN, *words, *arguments]


@pytest.fixture
def call(tmp_path):
    """call(*command) runs in tmp_path, where gate.py is. The gate is open unless the test takes the
    file `open` away."""
    (tmp_path / "gate.py").write_text(GATE)
    (tmp_path / "open").touch()
    return functools.partial(
        subprocess.run, cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=120
    )


def wait_for(condition, what, seconds=100):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, what
        time.sleep(0.1)


def runs(folder):
    """{(env, script, seed): folder}, from the folders' names."""
    found = {}
    for path in filter(Path.is_dir, Path(folder).iterdir()):
        env, script, seed = re.fullmatch(r"(.+-v0)__(\w+)\+.*__(\d+)", path.name).groups()
        found[re.sub("^.*_", "", env), script, int(seed)] = path
    return found


def starts(run):
    """The run's command lines, in their order."""
    return [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("== ")]


def stop_half_way(folder, number, command):
    """Returns the command's output. The command and its group get the signal twice when two runs
    wait at the gate. It must leave no process behind."""
    (folder / "open").unlink()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A test run in the background of a script inherits SIGINT ignored, which no shell can trap.
    pipe["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=folder, env=environ(), start_new_session=True, **pipe)
    wait_for(lambda: len([*folder.glob("waiting-*")]) == 2, "two runs are in their middle")
    for _ in range(2):  # an impatient Ctrl-C, or `timeout`: both signal the group
        os.killpg(process.pid, number)
        time.sleep(0.5)  # the runs hear of it while they wait
    (folder / "open").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out
    folders = [os.readlink(p) for p in Path("/proc").glob("[0-9]*/cwd") if p.exists()]
    assert str(folder) not in folders
    return out


def references(folder, environments):
    """evaluations.csv of the grid's runs. The scripts alone make them, one after the other in one
    process."""
    code = """if True:
        import importlib, sys
        for script, env, seed in (x.split(",") for x in sys.argv[3:]):
            arguments = ["--env-id", env, "--seed", seed, "--total-timesteps", sys.argv[1]]
            arguments += ["--run-name", f"{env.split(':')[1]}__{script}__{seed}"]
            main = importlib.import_module(script).main
            assert main([*arguments, *sys.argv[2].split()]) == 0"""
    folder.mkdir()
    (folder / "gate.py").write_text(GATE)
    (folder / "open").touch()
    jobs = [",".join(map(str, job)) for job in itertools.product(SCRIPTS, environments, SEEDS)]
    paths = environ() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(STEPS), FLAGS, *jobs]
    subprocess.run(command, cwd=folder, env=paths, check=True, capture_output=True, timeout=120)
    found = {}
    for path in (folder / "runs").iterdir():
        env, script, seed = path.name.split("__")
        found[env, script, int(seed)] = (path / "evaluations.csv").read_bytes()
    return found


def test_stopped_half_way_and_called_again(tmp_path, call):
    """By Ctrl-C: two runs have finished, two are in their middle, the others have not begun."""
    out = stop_half_way(tmp_path, signal.SIGINT, grid("--workers", "2"))
    assert out.count("] finished ") == out.count("stopped ") == 2
    assert "2 of 8 runs finished" in out
    interrupted, finished = runs(tmp_path / "runs"), {}
    for (env, _, _), run in interrupted.items():
        assert (run / "checkpoint.pt").exists()
        assert (run / "finished").exists() == (env == "Truncated-v0")
        log = (run / "log.txt").read_text()
        assert f"ended at step {150 if env == 'Truncated-v0' else 61};" in log
        if env == "Truncated-v0":
            finished[run] = log
    assert (len(interrupted), len(finished)) == (4, 2)

    result = call(grid("--workers", "2"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 of 8 runs finished" in result.stdout
    assert result.stdout.count("start ") == result.stdout.count("] finished ") == 6
    assert re.search(r"\[8/8\] finished .* in 0:00:\d\d, about 0:00:00 left", result.stdout)
    assert all((run / "log.txt").read_text() == log for run, log in finished.items())
    found = runs(tmp_path / "runs")
    expected = references(tmp_path / "alone", ["tiny_envs:Truncated-v0", "gate:Gate-v0"])
    assert found.keys() == expected.keys() and len(found) == 8
    for (env, script, seed), run in found.items():
        assert (run / "evaluations.csv").read_bytes() == expected[env, script, seed]
        first, *others = starts(run)
        assert len(others) == ((env, seed) == ("Gate-v0", 1)) and "--resume" not in first
        assert all("--resume runs/" in line for line in others)

    result = call(grid("--workers", "2"))
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1
    assert "all 8 runs" in result.stdout


def test_sigterm_stops_as_well(tmp_path, call):
    out = stop_half_way(tmp_path, signal.SIGTERM, grid("--workers", "2", envs=ENVS[1:]))
    assert out.count("stopped ") == 2 and "0 of 4 runs finished" in out
    for run in runs(tmp_path / "runs").values():
        assert (run / "checkpoint.pt").exists()
        assert "ended at step 61;" in (run / "log.txt").read_text()


def test_a_failing_run_stops_no_other(tmp_path, call):
    """It is listed with its log and the log's last line, which says why. With more steps, the
    finished run goes on where it was."""
    one = {"scripts": ["sac_baseline"], "seeds": [1]}
    envs = ["Nonexistent-v0", "Truncated-v0"]
    result = call(grid("--workers", "1", "--out", "there", envs=envs, **one))
    assert result.returncode == 1 and "1 of 2 runs finished" in result.stdout
    bad, good = (runs(tmp_path / "there/runs")[env, "sac_baseline", 1] for env in envs)
    *_, count, path, last = result.stdout.splitlines()
    assert count == "failed: 1" and path.strip() == str(bad / "log.txt")
    assert last.startswith("    error: --env-id tiny_envs:Nonexistent-v0: ")
    assert not (bad / "finished").exists()
    assert (good / "finished").read_text() == "150\n"

    result = call(grid("--out", "there/runs", envs=["Truncated-v0"], steps=200, **one))
    assert result.returncode == 0 and "--resume" in starts(good)[1]
    assert (good / "finished").read_text() == "200\n"
    assert "\n200,1," in (good / "evaluations.csv").read_text()
    result = call(grid("--out", "there", envs=["Truncated-v0"], steps=100, **one))
    assert result.returncode == 0 and "all 1 runs" in result.stdout and len(starts(good)) == 2


def test_a_run_in_progress_is_not_started_twice(tmp_path, call):
    """It is not even where only run.sh was killed and its run lives on, because the log is
    locked."""
    (tmp_path / "open").unlink()
    one = {"scripts": ["sac_baseline"], "envs": ["gate:Gate-v0"], "seeds": [1]}
    process = subprocess.Popen(grid(**one), cwd=tmp_path, env=environ(), stdout=subprocess.DEVNULL)
    wait_for(lambda: [*tmp_path.glob("waiting-*")], "the run is in its middle")
    process.kill()
    process.wait()
    result = call(grid(**one))
    assert result.returncode == 1 and "is being run by another process" in result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "open").touch()
    wait_for((run / "finished").exists, "the run ends")
    assert call(grid(**one)).returncode == 0 and len(starts(run)) == 1


def test_help_explains_every_option_and_preset(call):
    result = call([RUN, "--help"])
    assert result.returncode == 0 and result.stdout.startswith("Runs a grid")
    source = RUN.read_text()
    options = set(re.findall(r"(--[a-z-]+)(?: [|]|\))", source)) - {"--help", "--task"}
    assert {"--scripts", "--envs", "--gpus", "--dry-run"} <= options
    assert all(option in result.stdout for option in options)
    assert all(f"  {preset}  " in result.stdout for preset in PRESETS)


PRESETS = {  # environments x settings x seeds
    "mujoco": 6 * 6 * 10,
    "rivals": 2 * 5 * 2,
    "dmc": 15 * 8 * 10,
    "myosuite": 10 * 8 * 10,
    "ablations": 6 * 32 * 5,
    "utd-scaling": 15 * 6 * 10,
    "quick": 2 * 4 * 3,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_commands_that_the_scripts_accept(call, tmp_path, monkeypatch, preset):
    """The script itself parses every setting of a preset. Nothing is created."""
    before = {*tmp_path.rglob("*")}
    result = call([RUN, preset, "--dry-run"])
    title, *commands = result.stdout.splitlines()
    assert result.returncode == 0 and f"{PRESETS[preset]} runs, 0 of them finished" in title
    assert len({*commands}) == PRESETS[preset] and {*tmp_path.rglob("*")} == before
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmark"), *sys.path])
    import ablate
    import probe

    names = "--(env-id|seed|run-name) [^ ]+ ?"
    settings = {re.sub(names, "", command): command for command in commands}  # one of each
    for command in settings.values():
        python, program, *words = command.split()
        ablated = program.endswith("/ablate.py")
        script = probe.load(words.pop(0) if ablated else program)
        base = (
            script
            if hasattr(script, "parse_args")
            else sys.modules[script.Agent.__base__.__module__]
        )
        parts = ablate.ablate(script) if ablated else vars(script)
        args, _ = base.parse_args(words, parts["Args"], parts["Agent"])
        assert (python, args.run_name) == (sys.executable, words[-1])


def test_a_setting_may_have_flags_of_its_own(call):
    settings = ["crossq_sac --brn-warmup 5000", "ablate crossq_td3 --actor-norm none"]
    result = call(
        [RUN, "--setting", settings[0], "--setting", settings[1], "--envs", "E-v0", "--dry-run"]
    )
    _, first, second = result.stdout.splitlines()
    assert re.search(r"/crossq_sac.py --env-id E-v0 .* --brn-warmup 5000 --run-name ", first)
    assert first.endswith(" E-v0__crossq_sac+brn-warmup=5000__1")
    assert re.search(r"/ablate.py \S+/crossq_td3.py --env-id E-v0 .* --actor-norm none ", second)
    assert second.endswith(" E-v0__ablate_crossq_td3+actor-norm=none__1")


def test_what_a_resume_may_change_is_not_in_a_name(call):
    """Otherwise the same call with another --device, for example, would begin all runs anew."""
    import crossq_sac

    names = {}
    for flag in (field.name for field in dataclasses.fields(crossq_sac.Args)):
        setting = f"crossq_sac --{flag.replace('_', '-')} x"
        result = call([RUN, "--setting", setting, "--envs", "E-v0", "--dry-run"])
        names[flag] = result.stdout.split()[-1] if result.returncode == 0 else result.stderr
    kept_out = {flag for flag, name in names.items() if name == "E-v0__crossq_sac__1"}
    refused = {flag for flag, name in names.items() if "is no flag for a setting" in name}
    others = {"total_timesteps", "resume", "evaluate"}
    assert refused == others | {"env_id", "seed", "run_name"}  # run.sh has its own
    assert kept_out == crossq_sac.Args.MAY_CHANGE - others


def test_a_flag_that_comes_again_replaces_the_first(call):
    """In the name too, and in either spelling; settings that are then the same are one run."""
    settings = ["--setting", "crossq_sac --utd 2 --critic-width 8", "--setting", "crossq_sac"]
    flags = ["--flags", "--critic_width 16 --track --utd=3"]
    result = call([RUN, *settings, *flags, "--envs", "E-v0", "--dry-run"])
    _, command = result.stdout.splitlines()
    assert " --total-timesteps 1000000 --critic_width 16 --track --utd=3 --run-name " in command
    assert command.endswith(" E-v0__crossq_sac+critic_width=16+utd=3__1")


def test_an_interpreter_by_a_relative_path(call, tmp_path):
    """The runs have another current directory."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    one = {"scripts": ["sac_baseline"], "envs": ["Truncated-v0"], "seeds": [1], "steps": 50}
    result = call(grid("--out", "there", **one), env=environ() | {"PYTHON": "./python"})
    assert result.returncode == 0, result.stdout


def test_gpus_and_workers(tmp_path, call):
    """Each visible GPU has its share of the runs. A stand-in for Python writes what it is given."""
    python = tmp_path / "python"
    said = "GPU $CUDA_VISIBLE_DEVICES, $OMP_NUM_THREADS thread"
    python.write_text(f'#!/bin/sh\nsleep 1\necho "{said}"\n')
    python.chmod(0o755)
    env = environ() | {"PYTHON": str(python)}
    del env["OMP_NUM_THREADS"]
    arguments = {"flags": "--critic-width 16", "envs": ["Truncated-v0"], "seeds": range(4)}
    gpus = env | {"CUDA_VISIBLE_DEVICES": "3,5"}
    result = call(grid("--jobs-per-gpu", "2", **arguments), env=gpus)
    assert "4 at a time on 2 GPUs" in result.stdout and result.returncode == 0
    assert re.findall(r"^start .* on GPU (\d)$", result.stdout, re.M)[:4] == ["3", "5", "3", "5"]
    logs = [(run / "log.txt").read_text() for run in runs(tmp_path / "runs").values()]
    seen = [log.splitlines()[-1] for log in logs]
    assert sorted(seen) == ["GPU 3, 1 thread"] * 4 + ["GPU 5, 1 thread"] * 4
    result = call(grid("--out", "cpu", **arguments), env=env)
    assert f"{len(os.sched_getaffinity(0))} at a time\n" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--sedes", "1"], "unknown argument --sedes"),
    (["--seeds"], "--seeds needs a value"),
    ([], "nothing to run"),
    (["mujoco", "--scripts", "crossq"], "no script crossq.py"),
    (["mujoco", "--steps", "1e6"], "--steps must be a positive whole number, not 1e6"),
    (["mujoco", "dmc"], "one preset at a time"),
    (["mujoco", "--launcher", "pbs"], "--launcher is local or slurm, not pbs"),
    (["mujoco", "--flags", "--utd 2 --seed 5"], "--seed is no flag for a setting"),
    (["mujoco", "--setting", "ablate"], "a setting begins with a script's name"),
    (["--scripts", "crossq_sac", "--envs", "x" * 300], "a run's name is too long"),
    (["mujoco", "--out", "gate.py"], "--out gate.py is no folder"),
])  # fmt: skip
def test_wrong_arguments(call, tmp_path, arguments, message):
    result = call([RUN, *arguments])
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------- Slurm


@pytest.fixture(scope="module")
def slurm():
    """A Slurm that runs already, or one that ../shared/slurm-localhost.sh starts for this test."""

    def answers():
        if not shutil.which("sbatch"):
            return False
        return not subprocess.run(["sinfo"], capture_output=True, timeout=30).returncode

    start = ROOT.parent / "shared/slurm-localhost.sh"
    if answers():
        yield
    elif start.exists() and os.geteuid() == 0:
        # Two CPUs for two tasks at a time. With OMP_NUM_THREADS=1, nproc would count one.
        env = os.environ | {"SLURM_LOCAL_PROCTRACK": "pgid", "SLURM_LOCAL_CPUS": "2"}
        result = subprocess.run([start, "fresh"], env=env, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no Slurm: {(result.stdout + result.stderr)[-300:]}")
        yield
        subprocess.run([start, "stop"], capture_output=True)
    else:
        pytest.skip("no Slurm: no sbatch with a cluster that answers, and none can be started here")


@pytest.mark.parametrize("end", ["time limit", "pre-emption"])
def test_slurm_array(tmp_path, call, slurm, end):
    """Of two tasks in their middle, one is stopped. Before a time limit, its batch shell gets a
    SIGUSR1 and asks for a requeue. At a pre-emption, all its processes get a SIGTERM, and Slurm
    requeues it. Either way it writes a checkpoint and resumes from it, and the other one goes on.
    """
    (tmp_path / "open").unlink()
    one = {"scripts": ["sac_baseline"], "envs": ["gate:Gate-v0"]}
    command = grid("--launcher", "slurm", "--jobs", "2", "--time", "10", **one)
    result = call([*command, "--dry-run"])
    options = r"sbatch .*--requeue --signal=B:USR1@60 --array=0,1%2 --time=10\n"
    assert re.search(options, result.stdout)
    assert not (tmp_path / "runs").exists()
    result = call(command)
    assert result.returncode == 0 and "submitted 2 of 2 runs" in result.stdout, result.stderr
    array = result.stdout.split()[0]

    def jobs(*arguments):
        command = [*arguments, array]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        again = call(command)
        assert again.returncode == 2 and "still queued" in again.stderr
        wait_for(lambda: len([*tmp_path.glob("waiting-*")]) == 2, "both tasks are in their middle")
        # This task has the array's own job id. What is asked for that id concerns all tasks.
        shown = jobs("scontrol", "show", "job", "-o")
        task = re.search(rf"JobId={array} ArrayJobId={array} ArrayTaskId=(\d)", shown)[1]
        signalled = {
            "time limit": ["scancel", "--batch", "--signal=USR1"],
            "pre-emption": ["scontrol", "requeue"],  # what Slurm does with PreemptMode=REQUEUE
        }
        subprocess.run([*signalled[end], f"{array}_{task}"], check=True)
        time.sleep(1)
        (tmp_path / "open").touch()
        wait_for(lambda: "_" not in jobs("squeue", "-h", "-r", "-o", "%i", "-j"), "the array ends")
    finally:
        subprocess.run(["scancel", array])
    for (_, _, seed), run in runs(tmp_path / "runs").items():
        stopped = seed == int(task) + 1
        assert len(starts(run)) == (2 if stopped else 1) and (run / "finished").exists()
        assert ("ended at step 61;" in (run / "log.txt").read_text()) == stopped
    assert "all 2 runs" in call(command).stdout
