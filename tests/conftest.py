"""Shared helpers. The scripts are imported from the folder above, or run as a user runs them, in
a folder of their own."""

import csv
import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the networks here are tiny: a second thread only costs

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmark" / "algorithms")]
SCRIPTS = ["crossq_sac.py", "crossq_td3.py", "crossq_wn_highutd.py", "sac_baseline.py"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
every_script = pytest.mark.parametrize("main", SCRIPTS, indirect=True)
TINY = """--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16
    --learning-starts 40 --buffer-size 1000 --device cpu --no-compile --eval-every 50
    --eval-episodes 2 --total-timesteps 150 --checkpoint-minutes 0""".split()


# ------------------------------------------------------------------------------ running


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment():
    """One thread per process; the tests' own environments are found from tests/."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture
def run_script(tmp_path):
    """run_script("crossq_sac.py", "--seed", 1, ...) -> CompletedProcess, with tmp_path as the
    current directory."""

    def run(script, *arguments, timeout=300, cwd=tmp_path, env=None):
        return subprocess.run(
            command(script, *arguments),
            cwd=cwd,
            env=env or environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def main(request, tmp_path, monkeypatch):
    """main(*arguments) runs a script in this process, in tmp_path; main.module is the script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = getattr(request, "param", "crossq_sac.py")

    def run(*arguments, **parts):
        return run.module.main([str(a) for a in arguments], **parts)

    run.module = importlib.import_module(name.removesuffix(".py"))
    precision = torch.get_float32_matmul_precision()
    yield run
    torch.set_float32_matmul_precision(precision)
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(main) is the folder of a run of TINY that nothing interrupted, made once per script."""

    @functools.cache
    def make(module):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("whole"))
            patch.setattr(sys, "path", [*sys.path])
            module.main([*TINY, "--run-name", "whole"])
            return Path("runs/whole").resolve()

    return lambda main: make(main.module)


def refused(main, capsys, *arguments, **parts):
    """Runs main, expects exit code 1 after one line on stderr, and returns that line."""
    with pytest.raises(SystemExit) as end:
        main(*arguments, **parts)
    line = end.value.code  # Python prints a string and exits with 1
    assert "error" not in capsys.readouterr().err
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line


def kill_in_the_middle(script, arguments, folder, step, name="killed"):
    """Starts a real process in folder, sends SIGKILL once its checkpoint holds that step, and
    returns the step of the checkpoint that it left."""
    process = subprocess.Popen(
        command(script, *arguments, "--run-name", name),
        cwd=folder,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    run = Path(folder, "runs", name)
    while process.poll() is None:
        if Path(run, "checkpoint.pt").exists() and load(run)["progress"][0] >= step:
            process.kill()
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    return load(run)["progress"][0]


# ------------------------------------------------------------------------------ files of a run


def load(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def evaluations(run):
    return list(csv.DictReader(open(Path(run, "evaluations.csv"))))


def leaves(x, path=""):
    """Every tensor and number of a checkpoint with its path, but the arguments."""
    if isinstance(x, dict | list | tuple):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            if (path, key) != ("", "args"):
                yield from leaves(value, f"{path}/{key}")
    else:
        yield path, x


def assert_identical(a, b):
    """evaluations.csv and every tensor of the two checkpoints, bit by bit."""
    assert Path(a, "evaluations.csv").read_bytes() == Path(b, "evaluations.csv").read_bytes()
    left, right = dict(leaves(load(a))), dict(leaves(load(b)))
    assert left.keys() == right.keys() and len(left) > 50
    for key, value in left.items():
        tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, right[key]) if tensor else value == right[key], key


# ------------------------------------------------------------------------------ agents, by hand

OBS, ACTIONS, BATCH, GAMMA = 5, 2, 64, 0.9


@pytest.fixture
def double():
    """Networks, batches and noise in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, BATCH, OBS, generator=g)
    next_obs = 2 * next_obs + 0.5  # so that the statistics of one half are not those of both
    action = torch.rand(BATCH, ACTIONS, generator=g) * 2 - 1
    reward = torch.randn(BATCH, generator=g)
    terminated = (torch.rand(BATCH, generator=g) < 0.25).to(reward)
    return obs, action, reward, terminated, next_obs


def make_agent(script, updates=0, **changes):
    """A small agent; after some updates nothing is at its initial value."""
    torch.manual_seed(0)
    small = {"critic_width": 16, "actor_width": 16, "gamma": GAMMA}
    args = script.Args(**small | {"critic_lr": 0.01, "actor_lr": 0.01} | changes)
    agent = script.Agent(OBS, ACTIONS, args)
    for i in range(updates):
        agent.update(make_batch(i), torch.Generator().manual_seed(i))
    return agent


def forward(net, x, norm=None):
    """The network's output by hand. norm: None, "batch" (the statistics of x: CrossQ's training
    mode in its warm-up) or "running"."""
    for k, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = x.clamp(min=0) if k else x
        if norm:
            layer = net.norms[k]
            mean, var = layer.running_mean, layer.running_var
            if norm == "batch":
                mean, var = x.mean(-2, keepdim=True), x.var(-2, correction=0, keepdim=True)
            x = (x - mean) / torch.sqrt(var + 1e-3) * layer.scale + layer.bias
        x = torch.matmul(x, weight) + bias
    return x


def copy_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)
