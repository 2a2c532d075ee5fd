"""benchmark/run.sh: grids of tiny runs, on this machine and with Slurm. A stub stands in for Python
where the scripts are not the subject."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

import sac_baseline

RUN = ROOT / "benchmark/run.sh"
STUB = """#!/bin/bash
# It writes a checkpoint and waits for the file `open`. It fails in Bad-v0 unless `mended` exists.
echo "$* | GPU $CUDA_VISIBLE_DEVICES, $OMP_NUM_THREADS thread, trim at $MALLOC_TRIM_THRESHOLD_"
name=${*: -1}
name=${name#runs/}
[[ $* = *--resume* ]] || mkdir "runs/$name" || exit 1
touch "runs/$name/checkpoint.pt"
until [[ -e TMP/open ]]; do sleep 0.1; done
[[ $* != *Bad-v0* || -e TMP/mended ]]
"""


class Grid:
    """run.sh in a folder of its own. The gate stands open at first."""

    def __init__(self, folder):
        self.folder, self.runs, self.gate = folder, folder / "out/runs", folder / "open"
        self.gate.touch()
        (folder / "stub").write_text(STUB.replace("TMP", str(folder)))
        (folder / "stub").chmod(0o755)
        # The path is relative, though the runs have another current directory.
        self.environ = environment() | {"PYTHON": "./stub", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *arguments):
        command, pipe = [RUN, *arguments, "--out", "out"], subprocess.PIPE
        files = {"stdout": pipe, "stderr": pipe, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, **files)

    def __call__(self, *arguments):
        """The exit code and both outputs."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def starts(self, name):
        return re.findall("^== .*", (self.runs / f"{name}.log").read_text(), re.M)

    def begun(self, *names):
        return all((self.runs / name / "checkpoint.pt").exists() for name in names)

    def over(self):
        """No process has this folder, or one inside, as its current directory."""
        folders = [os.readlink(p) for p in Path("/proc").glob("[0-9]*/cwd") if p.exists()]
        return not any(folder.startswith(str(self.folder)) for folder in folders)


@pytest.fixture
def grid(tmp_path):
    yield Grid(tmp_path)
    (tmp_path / "open").touch()  # a failed test leaves no stub behind


def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, what
        time.sleep(0.1)


ONE, TWO = (["--scripts", "crossq_sac", "--envs", envs] for envs in ("A-v0", "A-v0 Bad-v0"))
RATES = "--action-repeat 2 --critic-lr 8e-4 --actor-lr 8e-4"
GOOD, BAD = "A-v0__crossq_sac__1", "Bad-v0__crossq_sac__1"


def test_finished_runs_are_skipped_and_failed_ones_listed_and_resumed(grid):
    code, out, err = grid(*TWO)
    assert code == 1 and f"not finished: {grid.runs}/{BAD}.log\n" in out
    assert f"finished {GOOD}\n" in out and f"{BAD} failed" in err
    (grid.folder / "mended").touch()
    code, out, _ = grid(*TWO)
    assert code == 0 and out.startswith("# 1 of 2 runs") and len(grid.starts(GOOD)) == 1
    first, second = grid.starts(BAD)
    assert first.endswith(f" --run-name {BAD}") and second.endswith(f" --resume runs/{BAD}")
    code, out, _ = grid(*TWO, "--steps", "1000")
    assert code == 0 and out.startswith("# 2 of 2 runs") and len(out.splitlines()) == 1
    assert grid(*TWO, "--steps", "2000000")[0] == 0  # takes them further
    assert grid.starts(GOOD)[1].endswith(f"--total-timesteps 2000000 --resume runs/{GOOD}")


@pytest.mark.parametrize("file, deleted", [("args.json", True), ("evaluations.csv", False)])
def test_a_run_killed_before_its_first_checkpoint_begins_again(grid, file, deleted):
    """Results are never deleted, though."""
    (grid.runs / GOOD).mkdir(parents=True)
    (grid.runs / GOOD / file).touch()
    assert grid(*ONE)[0] == (0 if deleted else 1)
    assert (grid.runs / GOOD / file).exists() != deleted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs(grid, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or run.sh would inherit "ignored"
    grid.gate.unlink()
    process = grid.start(*TWO, "--workers", "2")
    wait_for(lambda: grid.begun(GOOD, BAD), "both runs have begun")
    process.send_signal(number)
    assert process.wait(20) == 130
    wait_for(grid.over, "no process is left", 5)


def test_a_run_is_not_started_twice(grid):
    """It lives on after a SIGKILL to run.sh, and its log is locked."""
    grid.gate.unlink()
    process = grid.start(*ONE)
    wait_for(lambda: grid.begun(GOOD), "the run has begun")
    process.kill()
    process.wait()
    code, _, err = grid(*ONE)
    assert code == 1 and "is being run by another process" in err
    grid.gate.touch()
    wait_for(grid.over, "the run ends")
    assert grid(*ONE)[0] == 0 and len(grid.starts(GOOD)) == 1


def test_a_killed_script_resumes_to_the_same_evaluations(grid, monkeypatch):
    """The real script, in an environment of the user's own."""
    (grid.folder / "own.py").write_text("import tiny_envs")
    flags = "--critic-width 8 --learning-starts 40 --no-compile --eval-every 50"
    flags += " --checkpoint-minutes 0 --device cpu"
    run = ["--scripts", "sac_baseline", "--envs", "own:Truncated-v0", "--steps", "500"]
    run += ["--flags", flags]
    grid.environ["PYTHON"] = sys.executable
    log = grid.runs / "own_Truncated-v0__sac_baseline+critic-width=8+learning-starts=40__1.log"
    process = grid.start(*run)
    wait_for(lambda: log.exists() and "step 100: " in log.read_text(), "the run is in its middle")
    process.terminate()
    assert process.wait() == 130
    assert grid(*run)[0] == 0
    assert "--resume" in grid.starts(log.stem)[1] and log.read_text().count("step 50: ") == 1
    monkeypatch.chdir(grid.folder / "out")
    alone = ["--env-id", "tiny_envs:Truncated-v0", "--total-timesteps", "500"]
    sac_baseline.main([*flags.split(), *alone, "--run-name", "alone"])
    resumed, alone = (grid.runs / name / "evaluations.csv" for name in (log.stem, "alone"))
    assert resumed.read_text() == alone.read_text()


def test_gpus_take_turns_and_workers_have_one_thread(grid):
    del grid.environ["OMP_NUM_THREADS"]
    grid.environ["CUDA_VISIBLE_DEVICES"] = "3,5"
    assert grid(*ONE, "--seeds", "1 2")[0] == 0
    said = {log.read_text().split(" | ")[1] for log in grid.runs.glob("*.log")}
    assert said == {f"GPU {i}, 1 thread, trim at 2147483647\n" for i in (3, 5)}


SIZES = {"mujoco": 6 * 6 * 10, "rivals": 2 * 5 * 2, "quick": 2 * 4 * 3, "ablations": 6 * 32 * 5}
SIZES |= {"dmc": 15 * 8 * 10, "myosuite": 10 * 8 * 10, "utd-scaling": 15 * 6 * 10}


@pytest.mark.parametrize("preset", SIZES)
def test_the_scripts_accept_every_setting_of_a_preset(grid, tmp_path, monkeypatch, preset):
    """Each stops only at its environment, which is replaced by one that does not exist."""
    code, out, _ = grid(preset, "--dry-run")
    title, *commands = out.splitlines()
    assert code == 0 and title.startswith(f"# 0 of {SIZES[preset]} runs")
    assert len({*commands}) == SIZES[preset] and not grid.runs.exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmark"), *sys.path])
    import probe

    settings = {re.sub(r"--env-id .*", "", command) for command in commands}
    for _, program, *words in map(str.split, settings):
        with pytest.raises(Exception, match="`Missing` doesn't exist"):
            probe.load(program).main([*words, "--env-id", "Missing-v0"])


@pytest.mark.parametrize("preset, setting, flags", [
    ("dmc", "crossq_wn_highutd --utd 5", "--action-repeat 2 --utd 5"),
    ("dmc", "crossq_sac", f"{RATES} --policy-delay 1 --alpha-lr 8e-4"),
    ("dmc", "crossq_td3", f"{RATES} --policy-delay 1"),
    ("dmc", "redq", f"{RATES} --alpha-lr 8e-4"),
    ("dmc", "xqc", "--action-repeat 2 --gamma 0.99"),
    ("dmc", "bro --fast", "--fast"),
    ("utd-scaling", "sr_sac", "--action-repeat 2"),
    ("myosuite", "xqc", "--action-repeat 2 --gamma 0.95"),
    ("myosuite", "bro", ""),
])  # fmt: skip
def test_the_papers_settings_of_a_suite(grid, preset, setting, flags):
    _, first, *_ = grid(preset, "--setting", setting, "--dry-run")[1].splitlines()
    myo, dmc = "myosuite:myoHandReachFixed-v0", "shimmy:dm_control/dog-stand-v0"
    flags += f" --eval-every 25000 --env-id {myo if preset == 'myosuite' else dmc} --seed 1 "
    assert re.search(r"\.py (.* --seed 1)", first)[1].split() == flags.split()


def test_names_and_flags(grid):
    """A name has the flags that make another run. Those of --flags come last, so they count."""
    settings = ["--setting", "crossq_sac --utd 2 --bf16", "--setting", "ablate td3 --products tf32"]
    flags = "--device cpu --critic-width 9 --no-compile --eval-every 5 --track"
    _, out, _ = grid(*settings, "--envs", "my:E-v0", "--flags", flags, "--dry-run")
    _, first, second = out.splitlines()
    assert re.search(rf"/crossq_sac.py +--utd 2 --bf16 +{flags} --env-id my:E-v0 --seed 1 ", first)
    assert first.endswith(" my_E-v0__crossq_sac+utd=2+bf16+critic-width=9__1")
    assert re.search(rf"/ablate.py \S+/algorithms/td3.py +--products tf32 +{flags} ", second)
    assert second.endswith(" my_E-v0__ablate_td3+products=tf32+critic-width=9__1")


@pytest.mark.parametrize("arguments, message", [
    (["--sedes", "1"], "unknown argument --sedes"),
    (["mujoco", "--scripts", "crossq"], "no script crossq.py"),
    (["mujoco", "--steps", "1e6"], "positive integers"),
])  # fmt: skip
def test_wrong_arguments(grid, arguments, message):
    code, _, err = grid(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and message in err and not grid.runs.exists()


def test_slurm_array(grid):
    """One task is requeued in its middle, as by a pre-emption, and resumes. The other one fails,
    and the same call submits it alone again."""
    start = ROOT.parent / "shared/slurm-localhost.sh"
    env = os.environ | {"SLURM_LOCAL_PROCTRACK": "pgid", "SLURM_LOCAL_CPUS": "2"}
    if not start.exists() or os.geteuid() or subprocess.run([start, "fresh"], env=env).returncode:
        pytest.skip("no Slurm can be started here")

    def ended():
        return not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout

    options = ["--slurm", "--cpus-per-task=1"]
    code, _, err = grid(*TWO, *options, "--seeds", " ".join(map(str, range(600))))
    assert code == 2 and "Slurm's MaxArraySize is 1001" in err
    grid.gate.unlink()
    try:
        _, out, _ = grid(*TWO, *options)
        wait_for(lambda: grid.begun(GOOD, BAD), "both tasks are in their middle")
        array = re.search(r"Submitted batch job (\d+)", out)[1]
        subprocess.run(["scontrol", "requeue", f"{array}_0"], check=True)
        wait_for(lambda: len(grid.starts(GOOD)) == 2, "the task begins again")
        grid.gate.touch()
        wait_for(ended, "the array ends")
        (grid.folder / "mended").touch()
        assert grid(*TWO, *options)[1].startswith("# 1 of 2 runs")
        wait_for(ended, "the second array ends")
    finally:
        subprocess.run([start, "stop"])
    assert grid(*TWO)[1].startswith("# 2 of 2 runs")
    assert all("--resume" in grid.starts(name)[1] for name in (GOOD, BAD))
