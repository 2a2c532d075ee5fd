"""benchmark/probe.py: the Q-bias protocol and the per-layer diagnostics."""

import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import ablate  # noqa: E402
import probe  # noqa: E402

import crossq_sac  # noqa: E402

FLAGS = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
FLAGS += " --learning-starts 20 --eval-every 30 --eval-episodes 1 --device cpu"
SCRIPTS = ["sac_baseline", "crossq_td3", "crossq_wn_highutd", "benchmark/algorithms/redq"]


def test_soft_returns_by_hand():
    """Three steps, gamma 0.5, alpha 0.1: the entropy bonus of a step belongs to the return of the
    step before it."""
    g = probe.soft_returns([1.0, 2.0, 4.0], [-10.0, -20.0, -30.0], gamma=0.5, alpha=0.1)
    g2 = 4.0
    g1 = 2.0 + 0.5 * (g2 + 0.1 * 30.0)
    g0 = 1.0 + 0.5 * (g1 + 0.1 * 20.0)
    assert np.allclose(g, [g0, g1, g2])


def read(run):
    with open(run / "probe.csv") as file:
        return {(int(step), key): float(value) for step, key, value in csv.reader(file)}


class ConstantQ:
    """Stands for an agent whose Q is known: reward 1, episodes of 10 steps."""

    def __init__(self, value):
        self.args = crossq_sac.Args(gamma=0.9, env_id="tiny_envs:Terminated-v0")
        self.log_alpha = torch.tensor(math.log(1e-9))
        self.actor = self.critic = self
        self.value = value

    def eval(self):
        return self

    def parameters(self):
        return iter([self.log_alpha])

    def alpha(self):
        return self.log_alpha.exp()

    def actor_q(self, q):
        return q.min(0).values

    def q(self, critic, obs, action):
        return critic(torch.cat([obs, action], -1)).squeeze(-1)

    def policy(self, obs, noise):
        return noise.clamp(-1, 1), torch.zeros(1)

    def __call__(self, pairs):
        return torch.tensor([[self.value], [self.value + 1]])  # the smaller of two critics counts


@pytest.mark.parametrize(
    ("env_id", "kept"), [("tiny_envs:Terminated-v0", 10), ("tiny_envs:Truncated-v0", 4)]
)
def test_q_bias_against_known_returns(env_id, kept):
    """Bias and spread are those of (Q - G) / |mean G|, over whole episodes or, under a time limit,
    their first 35 %."""
    g = np.array([(1 - 0.9 ** (10 - t)) / 0.1 for t in range(kept)])
    env = crossq_sac.make_env(crossq_sac.Args(env_id=env_id))
    values = probe.q_bias(crossq_sac, ConstantQ(3.0), env, step=1)
    assert values["q_bias/mean"] == pytest.approx((3.0 - g.mean()) / g.mean(), rel=1e-5)
    assert values["q_bias/std"] == pytest.approx((g / g.mean()).std(), rel=1e-5)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_probe_does_not_change_the_run(tmp_path, monkeypatch, compile):
    """The probed run's evaluations are the plain run's; probe.csv holds bias, norms and, after the
    warm-up, r and d."""
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --total-timesteps 60 --brn-warmup 5 --compile {compile}".split()
    assert crossq_sac.main([*arguments, "--run-name", "plain"]) == 0
    assert probe.main([str(ROOT / "crossq_sac.py"), *arguments, "--run-name", "probed"]) == 0
    plain, probed = (Path("runs", name) for name in ("plain", "probed"))
    assert (plain / "evaluations.csv").read_text() == (probed / "evaluations.csv").read_text()
    rows = read(probed)
    assert rows[60, "critic/0/effective_lr"] == pytest.approx(
        rows[60, "critic/0/grad_norm"] / rows[60, "critic/0/weight_norm"]
    )
    r_min, r_max = rows[60, "critic/1/r_min"], rows[60, "critic/1/r_max"]
    assert 1 / 3 <= r_min < r_max <= 3  # 1 and 1 in the warm-up
    assert rows[60, "critic/1/d_abs_max"] > 0
    assert (30, "q_bias/mean") in rows and (60, "q_bias/std") in rows


def test_a_run_goes_on_with_and_without_the_probe(tmp_path, monkeypatch, capsys):
    """The probe changes nothing in a run, so the run stays the script's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "PAIRS", 10)
    first = f"{FLAGS} --total-timesteps 30 --run-name run".split()
    assert probe.main(["crossq_sac.py", *first]) == 0
    assert {step for step, _ in read(Path("runs/run"))} == {30}
    assert crossq_sac.main("--resume runs/run --total-timesteps 60".split()) == 0
    assert {step for step, _ in read(Path("runs/run"))} == {30}
    resumed = "--resume runs/run --total-timesteps 90".split()
    assert probe.main(["crossq_sac.py", *resumed]) == 0
    assert {step for step, _ in read(Path("runs/run"))} == {30, 90}
    assert crossq_sac.main("--resume runs/run --total-timesteps 100".split()) == 0
    capsys.readouterr()
    assert probe.main(["crossq_sac.py", "--evaluate", "runs/run"]) == 0
    printed = capsys.readouterr().out
    assert "q_bias/mean" in printed and "runs/run at step 100" in printed
    rows = read(Path("runs/run"))
    assert (100, "q_bias/mean") in rows and (100, "critic/0/grad_norm") not in rows  # no update


@pytest.mark.parametrize("script", SCRIPTS)
def test_probe_takes_every_script(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    arguments = f"{FLAGS} --total-timesteps 30".split()
    assert probe.main([f"{script}.py", *arguments]) == 0  # named as the script would
    assert probe.main([f"{script}.py", *arguments, "--run-name=a/b"]) == 0
    names = {re.sub(r"\d{10}", "TIME", path.name) for path in Path("runs").iterdir()}
    assert names == {f"tiny_envs_Terminated-v0__{Path(script).stem}__1__TIME", "a_b"}
    rows = read(Path("runs/a_b"))
    assert math.isfinite(rows[30, "q_bias/mean"]) and rows[30, "critic/2/weight_norm"] > 0
    assert ((30, "critic/1/r_min") in rows) == (script == "crossq_td3")


def test_a_script_keeps_its_name_wherever_it_is(tmp_path, monkeypatch):
    """A copy of a script in another folder, under another name, is a program of its own."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    source = (ROOT / "crossq_sac.py").read_text()
    Path("folder/my_crossq.py").write_text(source.replace("arXiv 1902.05605", "mine"))
    script = probe.load("folder/my_crossq.py")
    assert script.program_of(script.Agent) == "my_crossq" and "mine" in script.__doc__
    again = probe.load("crossq_sac.py")
    assert again.program_of(again.Agent) == "crossq_sac"


@pytest.mark.parametrize("program", [probe, ablate])
@pytest.mark.parametrize("argv, code, message", [
    ([], 2, "error: the first argument must be a script, not none; see --help"),
    (["--env-id", "Hopper-v4"], 2, "error: the first argument must be a script, not --env-id"),
    (["crossq_sax.py"], 2, "error: there is no crossq_sax.py"),
    (["benchmark/watch.py"], 2, "error: benchmark/watch.py has no Agent, or no main"),
    (["--help"], 0, "the script's"),
])  # fmt: skip
def test_the_first_argument_is_a_script(capsys, program, argv, code, message):
    with pytest.raises(SystemExit) as end:
        program.main(argv)
    out, error = capsys.readouterr()
    assert end.value.code == code
    assert message in (error if code else out) and error.count("\n") == bool(code)


@pytest.mark.parametrize("program, message", [
    ("crossq_discrete", "has no continuous actions"),
    ("xqc", "has the Q of scaled rewards"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, capsys, program, message):
    """With --help, so that without the refusal nothing trains."""
    monkeypatch.chdir(tmp_path)
    assert probe.main([f"{ROOT}/benchmark/algorithms/{program}.py", "--help"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("runs").exists()
    own = f"import sys\nsys.path.append('{ROOT}/benchmark/algorithms')\nimport {program} as base"
    Path("own.py").write_text(f"{own}\nclass Agent(base.Agent): pass\nmain = base.main")
    assert probe.main(["own.py", "--help"]) == 2


def test_bro_has_a_bias_and_no_norms(tmp_path, monkeypatch):
    """Its Q is the mean over critics and quantiles; its layers are others than the scripts'."""
    monkeypatch.chdir(tmp_path)
    tiny = "--env-id tiny_envs:Terminated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
    tiny += " --learning-starts 20 --total-timesteps 30 --eval-every 30 --eval-episodes 1"
    tiny += " --device cpu --compile off --run-name bro"
    assert probe.main([f"{ROOT}/benchmark/algorithms/bro.py", *tiny.split()]) == 0
    rows = [line.split(",")[1] for line in Path("runs/bro/probe.csv").read_text().splitlines()]
    assert rows == ["q_bias/mean", "q_bias/std"]
