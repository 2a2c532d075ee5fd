"""What once went wrong or is easy to get wrong: compilers, endless episodes, tracebacks, signals,
provenance, and the seam by which other programs extend a script."""

import builtins
import collections
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import ROOT, command, environment
from test_run import (  # noqa: F401
    TINY,
    Killed,
    assert_identical,
    evaluations,
    every_script,
    load,
    main,
    own_env,
    refused,
    restored,
    wait_for,
    whole,
)

# --------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_or_pythons_headers(main, whole, tmp_path, missing):  # noqa: F811
    """One line, and the run ends as one that was never to be compiled."""
    program = "import sys, sysconfig, crossq_sac\n"
    if missing == "headers":
        program += "sysconfig.get_path = lambda *_, **__: '/no/such/folder'\n"
    program += "sys.exit(crossq_sac.main())"
    env = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # or it tries them out for ten seconds
    env["PYTHONPATH"] += f":{ROOT}"
    if missing == "compiler":
        env["CXX"] = "/no/such/g++"
    arguments = [sys.executable, "-c", program, *TINY, "--compile", "on", "--run-name", "a"]
    end = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, "")
    assert end.stdout.count("torch.compile does not work here") == 1
    assert_identical(whole(main), "runs/a")


@every_script
def test_compile_auto_goes_by_the_updates_number_alone(main, monkeypatch):  # noqa: F811
    """Extended, resumed or whole: compiled from the same update on. A short run never is."""
    compiled = []
    monkeypatch.setitem(main.module.COMPILE_AFTER, "auto", 30)
    monkeypatch.setattr(
        main.module, "compile_updates", lambda agent: compiled.append(agent.n_updates)
    )
    flags = [*TINY, "--utd", 1, "--compile", "auto"]
    assert main(*flags, "--run-name", "short", "--total-timesteps", 70) == 0 and compiled == []
    assert main(*flags, "--run-name", "whole", "--total-timesteps", 100) == 0 and compiled == [30]
    assert main("--resume", "runs/short", "--total-timesteps", 90) == 0 and compiled == [30, 30]
    assert main("--resume", "runs/short", "--total-timesteps", 100) == 0
    assert compiled == [30, 30, 50]
    assert_identical("runs/short", "runs/whole")


def test_a_run_extended_past_the_switch_is_the_one_that_was_long_from_the_start(main, monkeypatch):  # noqa: F811
    """Really compiled, bit by bit. So is one that is resumed after the switch."""
    compiled, compile_updates = [], main.module.compile_updates

    def spy(agent):
        compile_updates(agent)
        compiled.append((agent.n_updates, "gradients" in vars(agent)))

    torch._dynamo.reset()  # it compiles a function only so many times in one process
    monkeypatch.setitem(main.module.COMPILE_AFTER, "auto", 20)
    monkeypatch.setattr(main.module, "compile_updates", spy)
    assert main(*TINY, "--compile", "auto", "--run-name", "whole", "--total-timesteps", 80) == 0
    assert main(*TINY, "--compile", "auto", "--run-name", "part", "--total-timesteps", 55) == 0
    assert compiled == [(20, True)]  # in an agent of its own for every process
    for steps in (70, 80):
        assert main("--resume", "runs/part", "--total-timesteps", steps) == 0
    assert compiled == [(20, True), (20, True), (30, True)]
    assert_identical("runs/whole", "runs/part")


# ------------------------------------------------------------------- episodes, suites, checkpoints


def test_an_environment_without_a_time_limit(main, capsys, own_env, monkeypatch):  # noqa: F811
    monkeypatch.setattr(main.module, "LONGEST_EPISODE", 60)

    def step(self, action):
        obs, reward, *_ = tiny_envs.Constant.step(self, action)
        assert self.t <= 60, "the episode goes on"
        return obs, reward, False, False, {}

    assert main(*TINY, "--env-id", own_env(step=step), "--run-name", "a") == 0
    assert [row["length"] for row in evaluations("runs/a")] == ["60"] * 6
    assert capsys.readouterr().out.count("an episode was cut after 60 steps") == 6 + 2
    assert len(load("runs/a")["run"]["actions"]) == 150 % 60


ENDLESS = """
import gymnasium, tiny_envs
class Endless(tiny_envs.Constant):
    def step(self, action):
        if self.total_steps == 300:  # that far comes the evaluation's alone
            open("evaluates", "w")
        obs, *_ = super().step(action)
        return obs, obs[2], False, False, {}
gymnasium.register("Endless-v0", Endless, disable_env_checker=True)
"""


def test_a_signal_in_an_evaluation_without_end(main, tmp_path, monkeypatch):  # noqa: F811
    """A real process ends at once; the resumed run is the one that was never interrupted."""
    Path("endless.py").write_text(ENDLESS)
    arguments = [*TINY, "--env-id", "endless:Endless-v0", "--total-timesteps", 60]
    program = command("crossq_sac.py", *arguments, "--run-name", "part")
    process = subprocess.Popen(program, cwd=tmp_path, env=environment())
    wait_for(Path("evaluates").exists)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(20) == 143
    finally:
        process.kill()
    assert load("runs/part")["run"]["step"] == 50 and not evaluations("runs/part")
    monkeypatch.setattr(main.module, "LONGEST_EPISODE", 100)  # not to wait so long
    assert main(*arguments, "--run-name", "whole") == 0
    assert main("--resume", "runs/part") == 0
    assert_identical("runs/whole", "runs/part")
    returns = [float(row["return"]) for row in evaluations("runs/part")]
    assert len(returns) == 2 and 0 not in returns


def test_evaluate_has_no_replay_buffer(main, monkeypatch):  # noqa: F811
    assert main(*TINY, "--run-name", "a") == 0
    loads, torch_load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(k) or torch_load(*a, **k))

    def no_buffer(*_):
        raise AssertionError("a replay buffer")

    assert main("--evaluate", "runs/a", ReplayBuffer=no_buffer) == 0
    assert [keywords["mmap"] for keywords in loads] == [True]


def test_checkpoints_of_others_are_refused_by_name(main, capsys):  # noqa: F811
    assert main(*TINY, "--run-name", "a") == 0
    saved = load("runs/a")
    for changes, named in (
        ({"program": "crossq_td3"}, "a run of crossq_td3, not of crossq_sac"),
        ({"buffer": None}, "an earlier version"),
        ({"buffer": None, "program": None}, "an earlier version"),
        ({"args": saved["args"] | {"novel_flag": 1}}, "novel_flag"),
    ):
        checkpoint = {k: v for k, v in (saved | changes).items() if v is not None}
        torch.save(checkpoint, "runs/a/checkpoint.pt")
        assert named in refused(main, capsys, "--resume", "runs/a")
    assert "not both" in refused(main, capsys, "--resume", "runs/a", "--evaluate", "runs/a")


def test_args_json_keeps_every_start(main):  # noqa: F811
    assert main(*TINY, "--run-name", "a", "--total-timesteps", 20) == 0
    first = json.loads(Path("runs/a/args.json").read_text())["starts"]
    for steps in (30, 40):
        assert main("--resume", "runs/a", "--total-timesteps", steps) == 0
    starts = json.loads(Path("runs/a/args.json").read_text())["starts"]
    assert len(starts) == 3 and starts[:1] == first


# ------------------------------------------------------------------------------ the user's own bugs


@pytest.mark.parametrize("error", [TypeError, OSError, ImportError, RuntimeError, KeyError])
@pytest.mark.parametrize("where", ["__init__", "reset", "step"])
def test_a_bug_in_the_users_environment_keeps_its_traceback(main, own_env, where, error):  # noqa: F811
    def fail(self, *_, **__):
        raise error("my own bug")

    with pytest.raises(error, match="my own bug") as raised:
        main(*TINY, "--env-id", own_env(**{where: fail}), "--run-name", "a")
    names, cause = [], raised.value
    while cause is not None:  # gymnasium raises a TypeError of a constructor once more
        names += [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
        cause = cause.__context__
    assert "fail" in names


def test_a_mistake_in_the_users_module_keeps_its_traceback(main):  # noqa: F811
    for name, text, error in (
        ("with_typo", "this is no Python", SyntaxError),
        ("with_import", "import no_such_package_at_all", ModuleNotFoundError),
    ):
        Path(f"{name}.py").write_text(text)
        with pytest.raises(error) as raised:
            main(*TINY, "--env-id", f"{name}:X-v0")
        assert f"{name}.py" in "".join(traceback.format_exception(raised.value))


# ------------------------------------------------------------------------------ signals and threads

INT, TERM = signal.SIGINT, signal.SIGTERM


def test_handlers_are_left_as_they_were(main, own_env):  # noqa: F811
    def mine(number, frame):
        pass

    def bug(self, action):
        raise ValueError

    for number in (INT, TERM):
        signal.signal(number, mine)
    assert main(*TINY, "--run-name", "a", "--total-timesteps", 10) == 0
    with pytest.raises(ValueError):
        main(*TINY, "--env-id", own_env(step=bug), "--run-name", "b")
    assert {signal.getsignal(number) for number in (INT, TERM)} == {mine}


def test_main_works_in_a_thread(main):  # noqa: F811
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(main(*TINY, "--run-name", "a", "--total-timesteps", 20))
    )
    thread.start()
    thread.join()
    assert codes == [0] and load("runs/a")["run"]["step"] == 20


@pytest.mark.parametrize(("first", "second"), [(INT, INT), (TERM, TERM), (INT, TERM)])
def test_a_second_signal_ends_at_once(tmp_path, first, second):
    """The environment hangs, so the first one waits for ever."""
    (tmp_path / "hanging.py").write_text(
        "import time, gymnasium, tiny_envs\n"
        "class Hanging(tiny_envs.Constant):\n"
        "    def step(self, action):\n"
        "        open('hangs', 'w')\n"
        "        for _ in range(1000): time.sleep(0.1)\n"
        "gymnasium.register('Hanging-v0', Hanging, disable_env_checker=True)\n"
    )
    arguments = command("crossq_sac.py", *TINY, "--env-id", "hanging:Hanging-v0")
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment())
    wait_for((tmp_path / "hangs").exists)
    process.send_signal(first)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    try:
        assert process.wait(20) == -second
    finally:
        process.kill()


def test_the_progress_bar_is_closed_and_the_search_path_grows_once(main, capsys, monkeypatch):  # noqa: F811
    bars = []

    class Bar(main.module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})
            self.closings = 0
            bars.append(self)

        def close(self):
            super().close()
            self.closings = getattr(self, "closings", 0) + 1

    monkeypatch.setattr(main.module, "tqdm", Bar)
    assert main(*TINY, "--run-name", "a") == 0
    with pytest.raises(SystemExit):
        main(*TINY, "--run-name", "b", "--env-id", "tiny_envs:NanObs-v0")
    assert len(bars) == 2 and all(bar.closings for bar in bars)
    assert sys.path.count(os.getcwd()) == 1


# -------------------------------------------------------------------------------- the seam

MY_ALGORITHM = """
import dataclasses
import sys
import torch
import crossq_sac as script

@dataclasses.dataclass
class Args(script.Args):
    subset: int = 1  # critics in the target
    strength: float = 0.5  # of the random actions
    MAY_BE_ZERO = script.Args.MAY_BE_ZERO | {"strength"}

class Agent(script.Agent):
    def draw(self, batch, rng):
        which = torch.randperm(self.args.n_critics, generator=rng)[: self.args.subset]
        return super().draw(batch, rng) | {"which": which}

    def target_q(self, next_q, draws):
        return next_q[draws["which"]].min(0).values

    def random_action(self, rng):
        return super().random_action(rng) * self.args.strength

def evaluate(agent, env, step, run_dir):
    rows = script.evaluate(agent, env, step, run_dir)
    return [(*row[:2], float(agent.act(env.reset(seed=1)[0])[0]), *row[3:]) for row in rows]

def main(argv=None):
    return script.main(argv, Args=Args, Agent=Agent, evaluate=evaluate)

if __name__ == "__main__":
    sys.exit(main())
"""


def test_a_users_own_algorithm(main, capsys, tmp_path):  # noqa: F811
    """A file of its own, with a flag of its own; its runs bear its name, and it resumes exactly."""
    Path("my_algorithm.py").write_text(MY_ALGORITHM)
    env = environment()
    env["PYTHONPATH"] += f":{ROOT}"
    arguments = [sys.executable, "my_algorithm.py", *TINY, "--strength", "0.25"]
    subprocess.run(arguments, cwd=tmp_path, env=env, check=True)
    (run,) = Path("runs").iterdir()
    assert "__my_algorithm__1__" in run.name
    rows, returns = load(run)["rows"], {row["return"] for row in evaluations(run)}
    assert rows[:40, 3:5].abs().max() <= 0.25 < rows[40:, 3:5].abs().max()
    assert len(returns) == 3 and "10.0" not in returns

    sys.path.insert(0, str(tmp_path))
    mine = importlib.import_module("my_algorithm")
    part = ["--run-name", "part", "--total-timesteps", "90"]
    assert mine.main([*TINY, "--strength", "0.25", *part]) == 0
    refusal = refused(main, capsys, "--resume", "runs/part")
    assert "a run of my_algorithm, not of crossq_sac" in refusal
    assert "subset" in refused(mine.main, capsys, ["--resume", "runs/part", "--subset", "2"])
    assert mine.main(["--resume", "runs/part", "--total-timesteps", "150"]) == 0
    assert_identical(run, "runs/part")
    assert mine.main([*TINY, "--strength", "0", "--run-name", "still"]) == 0
    assert not load("runs/still")["rows"][:40, 3:5].any()
    plain = load(run)["agent"]["critic.weights.0"]
    assert mine.main([*TINY, "--strength", "0.25", "--subset", "2", "--run-name", "both"]) == 0
    assert not torch.equal(plain, load("runs/both")["agent"]["critic.weights.0"])


def test_make_critic_and_reset(main):  # noqa: F811
    """Networks of one's own, and fresh ones on the way: the optimisers follow."""
    agents = []

    class Agent(main.module.Agent):
        program = "mine"

        def make_critic(self):
            critic = super().make_critic()
            critic.extra = torch.nn.Parameter(torch.zeros(()))
            return critic

        def update(self, batch, rng):
            if self.n_updates == 20:
                old = self.critic
                self.reset()
                agents.append((old, self.critic))
            return super().update(batch, rng)

        def critic_loss(self, batch, draws):
            loss, info = super().critic_loss(batch, draws)
            return loss + 0 * self.critic.extra, info

    assert main(*TINY, "--run-name", "whole", Agent=Agent) == 0
    old, new = agents[0]
    assert not torch.equal(old.weights[0], new.weights[0])
    assert main(*TINY, "--run-name", "part", "--total-timesteps", 90, Agent=Agent) == 0
    assert main("--resume", "runs/part", "--total-timesteps", 150, Agent=Agent) == 0
    assert_identical("runs/whole", "runs/part")


# ------------------------------------------------------------------------- and what was found last


def test_resets_before_and_after_a_resume(main):  # noqa: F811
    """Each has fresh networks of its own, the same ones as without the interruption."""

    class Agent(main.module.Agent):
        program = "mine"

        def update(self, batch, rng):
            if self.n_updates in (20, 70):
                self.reset()
            return super().update(batch, rng)

    assert main(*TINY, "--run-name", "whole", Agent=Agent) == 0
    assert main(*TINY, "--run-name", "part", "--total-timesteps", 90, Agent=Agent) == 0
    assert main("--resume", "runs/part", "--total-timesteps", 150, Agent=Agent) == 0
    assert_identical("runs/whole", "runs/part")


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("Hopper-v2", "gymnasium-robotics"),
        ("Hopper-v3", "gymnasium-robotics"),
        ("no_such.sub:X-v0", "no_such"),
    ],
)
def test_an_environment_that_is_elsewhere(main, capsys, env_id, hint):  # noqa: F811
    assert hint in refused(main, capsys, *TINY, "--env-id", env_id)


def test_gymnasiums_own_error_in_the_users_environment_keeps_its_traceback(main, own_env):  # noqa: F811
    def init(self):
        gym.make("Hoper-v4")

    with pytest.raises(gym.error.NameNotFound):
        main(*TINY, "--env-id", own_env(__init__=init))


def test_killed_while_the_evaluations_are_written(main, monkeypatch):  # noqa: F811
    """The table is the old or the new one, as the checkpoint is."""

    headers = [0]

    def dying_print(*values, file=None, **kwargs):
        headers[0] += values[0] == "step"
        if headers[0] == 4:  # the first is written at the start, this one at step 150
            raise Killed
        builtins.print(*values, file=file, **kwargs)

    monkeypatch.setattr(main.module, "print", dying_print, raising=False)
    with pytest.raises(Killed):
        main(*TINY, "--run-name", "a")
    assert [row["step"] for row in evaluations("runs/a")] == ["50", "50", "100", "100"]


def test_a_signal_reaches_an_evaluation_through_a_wrapper_of_the_users(main):  # noqa: F811
    def make_env(args):
        return gym.Wrapper(main.module.make_env(args))

    def evaluate(agent, env, step, run_dir):
        signal.raise_signal(signal.SIGTERM)
        return main.module.evaluate(agent, env, step, run_dir)

    assert main(*TINY, "--run-name", "a", make_env=make_env, evaluate=evaluate) == 143
    assert load("runs/a")["run"]["step"] == 50 and not evaluations("runs/a")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_actions_in_double_precision_warn_of_nothing(main, own_env):  # noqa: F811
    """As on DeepMind Control."""
    space = gym.spaces.Box(-1, 1, (2,), np.float64)
    assert main(*TINY, "--env-id", own_env(action_space=space), "--total-timesteps", 10) == 0


# ---------------------------------------------------------------------------- many runs, log files


def test_one_line_on_threads_where_there_are_several(main, monkeypatch, capsys):  # noqa: F811
    advice = "much faster with OMP_NUM_THREADS=1"
    for threads, lines in ((1, 0), (2, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert main(*TINY, "--run-name", f"r{threads}", "--total-timesteps", 50) == 0
        assert capsys.readouterr().out.count(advice) == lines


def test_a_log_file_shows_an_evaluation_at_once(tmp_path):
    """The process ends at its second evaluation without writing what is still in its buffers."""
    program = """if True:
        import os, sys, crossq_sac
        def evaluate(agent, env, step, run_dir):
            return os._exit(7) if step == 100 else crossq_sac.evaluate(agent, env, step, run_dir)
        crossq_sac.main(sys.argv[1:], evaluate=evaluate)"""
    env = environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    env.pop("PYTHONUNBUFFERED", None)
    arguments = [sys.executable, "-c", program, *TINY]
    out = subprocess.run(arguments, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 7 and "step 50: return 10.0" in out.stdout


# ------------------------------------------------------- what extending programs and users may do


def test_a_checkpoint_that_no_resume_could_read_is_not_kept(main):  # noqa: F811
    """Data alone are read again; the error names what is none, and the last checkpoint stays."""

    class Buffer(main.module.ReplayBuffer):
        def add(self, *transition):
            super().add(*transition)
            self.last = collections.deque(transition[3:4], 3) if self.size == 50 else None

    with pytest.raises(pickle.UnpicklingError, match="collections.deque"):
        arguments = [*TINY, "--run-name", "a", "--checkpoint-every", 25]
        main(*arguments, ReplayBuffer=Buffer)
    assert load("runs/a")["run"]["step"] == 25


def test_an_agent_of_a_notebook(main, monkeypatch):  # noqa: F811
    """Its module has no file."""
    agent = type("Agent", (main.module.Agent,), {"__module__": "__main__"})
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert main(*TINY, "--total-timesteps", 10, Agent=agent) == 0
    (run,) = Path("runs").iterdir()
    assert "__notebook__1__" in run.name
    assert main("--resume", run, "--total-timesteps", 20, Agent=agent) == 0


@every_script
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_stay_in_odd_bounds(main, own_env, dtype):  # noqa: F811
    """Rescaled, 1 becomes 0.30000004 in single precision where 0.3 is the most there can be."""
    low, high = np.array([0.1, -5], dtype), np.array([0.3, 30], dtype)
    space = gym.spaces.Box(low, high, dtype=dtype)
    env_id = own_env(action_space=space)
    env = main.module.make_env(main.module.Args(env_id=env_id))
    env.reset(seed=1)
    for action in ([1, 1], [-1, -1], [1, -1]):
        env.step(np.array(action, np.float32))
        assert env.unwrapped.last_action in space, env.unwrapped.last_action
    assert env.unwrapped.last_action == pytest.approx([0.3, -5])


@every_script
def test_several_observations_at_once(main):  # noqa: F811
    """In any precision; every one has noise of its own, and the first one that of one alone."""
    torch.manual_seed(0)
    agent = main.module.Agent(3, 2, main.module.Args(critic_width=8, actor_width=8))
    obs = np.zeros((4, 3))
    actions = agent.act(obs, torch.Generator().manual_seed(1))
    assert actions.shape == (4, 2) and len(np.unique(actions)) == 8
    alone = agent.act(np.zeros(3), torch.Generator().manual_seed(1))
    assert alone == pytest.approx(actions[0], abs=1e-6) and alone.shape == (2,)
    deterministic = agent.act(obs)
    assert deterministic == pytest.approx(np.broadcast_to(agent.act(np.zeros(3)), (4, 2)), abs=1e-6)


def test_warnings_on_the_users_environment_are_seen(main):  # noqa: F811
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(*TINY, "--env-id", "Walker2d-v4", "--total-timesteps", 10) == 0
        gym.logger.warn("yours")
    assert [str(w.message) for w in caught if "WARN" in str(w.message)] == [
        gym.utils.colorize("WARN: yours", "yellow")
    ]


def test_environments_are_closed(main):  # noqa: F811
    opened, closed = [], []

    class Counted(gym.Wrapper):
        def close(self):
            closed.append(self)
            super().close()

    def make_env(args):
        opened.append(Counted(main.module.make_env(args)))
        return opened[-1]

    assert main(*TINY, "--run-name", "a", make_env=make_env) == 0
    assert len(opened) == 2 and set(closed) == set(opened)
    assert main("--evaluate", "runs/a", make_env=make_env) == 0
    assert len(opened) == 3 and set(closed) == set(opened)


def test_a_copy_in_a_package(main, capsys, monkeypatch):  # noqa: F811
    """Its own frames are no mistake in the user's module."""
    Path("rl").mkdir()
    Path("rl/crossq.py").write_text((ROOT / "crossq_sac.py").read_text())
    monkeypatch.syspath_prepend(".")
    copy = importlib.import_module("rl.crossq")
    assert "Nope" in refused(copy.main, capsys, [*TINY, "--env-id", "Nope-v0"])
