"""benchmark/run.sh: a grid of tiny runs, stopped half-way and gone on with, on this machine and
through Slurm."""

import functools
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
FLAGS = """--critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 40 --eval-every 50 --eval-episodes 2
    --checkpoint-every 37 --device cpu --compile off"""
SCRIPTS, ENVS, SEEDS, STEPS = (
    ["crossq_sac", "sac_baseline"],
    ["Truncated-v0", "gate:Gate-v0"],
    [1, 2],
    150,
)
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
    lists = {
        "--scripts": scripts,
        "--envs": envs,
        "--seeds": seeds,
        "--steps": [steps],
        "--flags": flags.split(),
    }
    return [
        RUN,
        *(word for key, value in lists.items() for word in (key, " ".join(map(str, value)))),
        *arguments,
    ]


@pytest.fixture
def call(tmp_path):
    """call(*command) in tmp_path, where gate.py is; the gate is open unless the test takes the file
    `open` away."""
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
    """{(env, script, seed): folder}, by the names."""
    found = {}
    for path in filter(Path.is_dir, Path(folder).iterdir()):
        env, script, seed = re.fullmatch(r"(.+-v0)__(\w+)\+.*__(\d+)", path.name).groups()
        found[re.sub("^.*_", "", env), script, int(seed)] = path
    return found


def starts(run):
    """The run's command lines, in their order."""
    return [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("== ")]


def stop_half_way(folder, number, command):
    """The command's output; it gets the signal when two runs wait at the gate, and must leave no
    process behind."""
    (folder / "open").unlink()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environ(), start_new_session=True, **pipe)
    wait_for(lambda: len([*folder.glob("waiting-*")]) == 2, "two runs are in their middle")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C: a terminal sends it to the runs as well
    else:
        process.send_signal(number)
    time.sleep(0.5)  # the runs hear of it while they wait
    (folder / "open").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out
    left = [
        p for p in Path("/proc").glob("[0-9]*/cwd") if p.exists() and Path(os.readlink(p)) == folder
    ]
    assert not left
    return out


def references(folder, environments):
    """evaluations.csv of the grid's runs, made by the scripts alone, one after the other in one
    process."""
    code = """if True:
        import importlib, sys
        for script, env, seed in (x.split(",") for x in sys.argv[3:]):
            module, arguments = importlib.import_module(script), ["--env-id", env, "--seed", seed, *sys.argv[2].split()]
            name = f"{env.split(':')[1]}__{script}__{seed}"
            assert module.main([*arguments, "--total-timesteps", sys.argv[1], "--run-name", name]) == 0"""
    folder.mkdir()
    (folder / "gate.py").write_text(GATE)
    (folder / "open").touch()
    jobs = [
        f"{script},{env},{seed}" for script in SCRIPTS for env in environments for seed in SEEDS
    ]
    paths = environ() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(STEPS), FLAGS, *jobs]
    subprocess.run(command, cwd=folder, env=paths, check=True, capture_output=True, timeout=120)
    keys = (path.name.split("__") for path in (folder / "runs").iterdir())
    return {
        (e, s, int(i)): (folder / f"runs/{e}__{s}__{i}/evaluations.csv").read_bytes()
        for e, s, i in keys
    }


def test_stopped_half_way_and_called_again(tmp_path, call):
    """By Ctrl-C: two runs have finished, two are in their middle, the others have not begun."""
    out = stop_half_way(tmp_path, signal.SIGINT, grid("--workers", "2"))
    assert (
        out.count("] finished ") == 2
        and out.count("stopped ") == 2
        and "2 of 8 runs finished" in out
    )
    interrupted = runs(tmp_path / "runs")
    for (env, _, _), run in interrupted.items():
        assert (run / "finished").exists() == (env == "Truncated-v0") and (
            run / "checkpoint.pt"
        ).exists()
        assert (
            f"ended at step {150 if env == 'Truncated-v0' else 61};"
            in (run / "log.txt").read_text()
        )
    finished = {
        run: (run / "log.txt").read_bytes()
        for (env, _, _), run in interrupted.items()
        if env == "Truncated-v0"
    }
    assert (len(interrupted), len(finished)) == (4, 2)

    result = call(grid("--workers", "2"))
    assert result.returncode == 0 and "8 of 8 runs finished" in result.stdout, (
        result.stdout + result.stderr
    )
    assert result.stdout.count("start ") == result.stdout.count("] finished ") == 6
    assert re.search(r"\[8/8\] finished .* in 0:00:\d\d, about 0:00:00 left", result.stdout)
    assert all((run / "log.txt").read_bytes() == log for run, log in finished.items())
    found = runs(tmp_path / "runs")
    expected = references(tmp_path / "alone", ["tiny_envs:Truncated-v0", "gate:Gate-v0"])
    assert found.keys() == expected.keys() and len(found) == 8
    for (env, script, seed), run in found.items():
        assert (run / "evaluations.csv").read_bytes() == expected[env, script, seed]
        lines = starts(run)
        assert (
            len(lines) == (2 if (env, seed) == ("Gate-v0", 1) else 1) and "--resume" not in lines[0]
        )
        assert all("--resume runs/" in line for line in lines[1:])

    result = call(grid("--workers", "2"))
    assert (result.returncode, len(result.stdout.splitlines())) == (
        0,
        1,
    ) and "all 8 runs" in result.stdout


def test_sigterm_stops_as_well(tmp_path, call):
    out = stop_half_way(tmp_path, signal.SIGTERM, grid("--workers", "2", envs=ENVS[1:]))
    assert out.count("stopped ") == 2 and "0 of 4 runs finished" in out
    assert all((run / "checkpoint.pt").exists() for run in runs(tmp_path / "runs").values())


def test_a_failing_run_stops_no_other(tmp_path, call):
    """It is listed with its log and the log's last line. With more steps, the finished one goes on
    where it was."""
    one = {"scripts": ["sac_baseline"], "seeds": [1]}
    result = call(
        grid("--workers", "1", "--out", "there", envs=["Nonexistent-v0", "Truncated-v0"], **one)
    )
    assert result.returncode == 1 and "1 of 2 runs finished" in result.stdout
    good, bad = (
        runs(tmp_path / "there/runs")[env, "sac_baseline", 1]
        for env in ("Truncated-v0", "Nonexistent-v0")
    )
    *_, count, path, last = result.stdout.splitlines()
    assert count == "failed: 1" and path.strip() == str(bad / "log.txt")
    assert "error: " in last and "Nonexistent" in last and not (bad / "finished").exists()
    assert (good / "finished").read_text() == "150\n"

    result = call(grid("--out", "there/runs", envs=["Truncated-v0"], steps=200, **one))
    assert result.returncode == 0 and "--resume" in starts(good)[1]
    assert (good / "finished").read_text() == "200\n" and "\n200,1," in (
        good / "evaluations.csv"
    ).read_text()
    result = call(grid("--out", "there", envs=["Truncated-v0"], steps=100, **one))
    assert result.returncode == 0 and "all 1 runs" in result.stdout and len(starts(good)) == 2


def test_a_run_in_progress_is_not_started_twice(tmp_path, call):
    """Not even where only run.sh was killed and its run lives on: the log is locked."""
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


PRESETS = {"mujoco": 6 * 3 * 10, "dmc": 15 * 3 * 10, "myosuite": 10 * 3 * 10, "ablations": 6 * 24 * 5,
           "utd-scaling": 15 * 6 * 10, "quick": 2 * 4 * 3}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_commands_that_the_scripts_accept(call, tmp_path, monkeypatch, preset):
    """Every setting of a preset, parsed by the script itself; nothing is created."""
    before = {*tmp_path.rglob("*")}
    result = call([RUN, preset, "--dry-run"])
    title, *commands = result.stdout.splitlines()
    assert result.returncode == 0 and f"{PRESETS[preset]} runs, 0 of them finished" in title
    assert len({*commands}) == PRESETS[preset] and {*tmp_path.rglob("*")} == before
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmark"), *sys.path])
    import ablate
    import probe

    settings = {
        re.sub("--(env-id|seed|run-name) [^ ]+ ?", "", command): command for command in commands
    }
    for command in settings.values():
        python, *words = command.split()
        module = probe.load(words[0 if "ablate" not in words[0] else 1])
        parts = {}
        if "ablate" in words[0]:
            parts, words = ablate.ablate(module), words[1:]
        args, _ = module.parse_args(words[1:], **parts)
        assert (python, args.run_name) == (sys.executable, words[-1])


def test_gpus_and_workers(tmp_path, call):
    """The visible GPUs, each with its share of runs; a stand-in for Python writes what it is
    given."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\nsleep 1\necho "GPU $CUDA_VISIBLE_DEVICES, $OMP_NUM_THREADS thread"\n'
    )
    (tmp_path / "python").chmod(0o755)
    env = {k: v for k, v in environ().items() if k != "OMP_NUM_THREADS"} | {
        "PYTHON": str(tmp_path / "python")
    }
    arguments = {"flags": "--critic-width 16", "envs": ["Truncated-v0"], "seeds": range(4)}
    result = call(
        grid("--jobs-per-gpu", "2", **arguments), env=env | {"CUDA_VISIBLE_DEVICES": "3,5"}
    )
    assert "4 at a time on 2 GPUs" in result.stdout and result.returncode == 0
    assert re.findall(r"^start .* on GPU (\d)$", result.stdout, re.M)[:4] == ["3", "5", "3", "5"]
    seen = [
        (run / "log.txt").read_text().splitlines()[-1] for run in runs(tmp_path / "runs").values()
    ]
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
])  # fmt: skip
def test_wrong_arguments(call, tmp_path, arguments, message):
    result = call([RUN, *arguments])
    assert (
        result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    )
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------- Slurm


@pytest.fixture(scope="module")
def slurm():
    """A running Slurm, or one that ../shared/slurm-localhost.sh starts for this test."""

    def answers():
        return (
            shutil.which("sbatch")
            and not subprocess.run(["sinfo"], capture_output=True, timeout=30).returncode
        )

    start = ROOT.parent / "shared/slurm-localhost.sh"
    if answers():
        yield
    elif start.exists() and os.geteuid() == 0:
        env = os.environ | {"SLURM_LOCAL_PROCTRACK": "pgid"}
        result = subprocess.run([start, "fresh"], env=env, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no Slurm: {(result.stdout + result.stderr)[-300:]}")
        yield
        subprocess.run([start, "stop"], capture_output=True)
    else:
        pytest.skip("no Slurm: no sbatch with a cluster that answers, and none can be started here")


@pytest.mark.parametrize("end", ["time limit", "pre-emption"])
def test_slurm_array(tmp_path, call, slurm, end):
    """Of two tasks in their middle, one gets the SIGTERM of a time limit, to its batch shell, which
    asks for a requeue, or that of a pre-emption, to all its processes, requeued by Slurm. It
    resumes, and the other one goes on."""
    (tmp_path / "open").unlink()
    one = {"scripts": ["sac_baseline"], "envs": ["gate:Gate-v0"]}
    command = grid("--launcher", "slurm", "--jobs", "2", "--time", "10", **one)
    result = call([*command, "--dry-run"])
    assert re.search(
        r"sbatch .*--requeue --signal=B:TERM@60 --array=0,1%2 --time=10\n", result.stdout
    )
    assert not (tmp_path / "runs").exists()
    result = call(command)
    assert result.returncode == 0 and "submitted 2 of 2 runs" in result.stdout, result.stderr
    array = result.stdout.split()[0]

    def jobs(*arguments):
        return subprocess.run(
            [*arguments, array], capture_output=True, text=True, check=True
        ).stdout

    try:
        again = call(command)
        assert again.returncode == 2 and "still queued" in again.stderr
        wait_for(lambda: len([*tmp_path.glob("waiting-*")]) == 2, "both tasks are in their middle")
        # the task that has the array's own job id: what is asked for that id concerns all of them
        shown = jobs("scontrol", "show", "job", "-o")
        task = re.search(rf"JobId={array} ArrayJobId={array} ArrayTaskId=(\d)", shown)[1]
        signalled = {
            "time limit": ["scancel", "--batch", "--signal=TERM", f"{array}_{task}"],
            "pre-emption": [
                "scontrol",
                "requeue",
                f"{array}_{task}",
            ],  # as Slurm itself does with PreemptMode=REQUEUE
        }
        subprocess.run(signalled[end], check=True)
        time.sleep(1)
        (tmp_path / "open").touch()
        wait_for(lambda: "_" not in jobs("squeue", "-h", "-r", "-o", "%i", "-j"), "the array ends")
    finally:
        subprocess.run(["scancel", array])
    found = runs(tmp_path / "runs")
    assert {seed: len(starts(run)) for (_, _, seed), run in found.items()} == {
        seed: 2 if seed == int(task) + 1 else 1 for seed in (1, 2)
    }
    assert all((run / "finished").exists() for run in found.values())
    assert "all 2 runs" in call(command).stdout
