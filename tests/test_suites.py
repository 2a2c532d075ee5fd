"""DeepMind Control and MyoSuite: their defaults, time limits, success, exact resume."""

import importlib
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_run import SCRIPTS, assert_identical, evaluations, every_script, load, main, refused  # noqa: F401

TINY = """--critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 40 --eval-episodes 1
    --device cpu --compile off --utd 1""".split()
CROSSQ = {"policy_delay": 1, "critic_lr": 8e-4, "actor_lr": 8e-4}
DMC_DEFAULTS = {  # appendix A.1 of CrossQ's paper: 8e-4 for all algorithms, the temperature too
    "sac_baseline": CROSSQ | {"alpha_lr": 8e-4},
    "crossq_sac": CROSSQ | {"alpha_lr": 8e-4},
    "crossq_td3": CROSSQ,
    "crossq_wn_highutd": {},
}
WALKER, HAND = "dm_control/walker-walk-v0", "myoHandReachFixed-v0"
SUITES = {WALKER: {"action_repeat": 2}, HAND: {"action_repeat": 2, "gamma": 0.95}}
needs_shimmy = pytest.mark.skipif(not importlib.util.find_spec("shimmy"), reason="no shimmy")
needs_myosuite = pytest.mark.skipif(not importlib.util.find_spec("myosuite"), reason="no myosuite")
DMC = pytest.param("dm_control/cartpole-swingup-v0", marks=needs_shimmy)
MYO = pytest.param("myoFingerReachFixed-v0", marks=needs_myosuite)


@every_script
@pytest.mark.parametrize("env_id", SUITES)
def test_defaults_of_a_suite(main, env_id):  # noqa: F811
    """They change these arguments and no others, and give way to the command line."""
    assert main.module.Args.suite_defaults("Hopper-v4") == {}
    wanted = SUITES[env_id] | (DMC_DEFAULTS[main.module.__name__] if "dm_" in env_id else {})
    assert main.module.Args.suite_defaults(env_id) == wanted
    plain, _ = main.module.parse_args([])
    args, _ = main.module.parse_args(["--env-id", env_id])
    assert vars(args) == vars(plain) | {"env_id": env_id} | wanted
    flags = ["--action-repeat", "1", "--gamma", "0.9", "--policy-delay", "5", "--critic-lr", "0.1"]
    args, _ = main.module.parse_args([*flags, "--env-id", env_id])
    assert (args.action_repeat, args.gamma, args.policy_delay, args.critic_lr) == (1, 0.9, 5, 0.1)

    class Args(main.module.Args):
        @staticmethod
        def suite_defaults(env_id):
            return {"seed": len(env_id)}

    args, _ = main.module.parse_args(["--env-id", env_id], Args)
    assert vars(args) == vars(plain) | {"env_id": env_id, "seed": len(env_id)}


@every_script
@pytest.mark.parametrize("env_id", [DMC, MYO])
def test_a_run(main, capsys, env_id):  # noqa: F811
    """Defaults are shown and stored, steps are the environment's, a resume is exact."""
    steps = ["--eval-every", 100, "--checkpoint-every", 70, "--env-id", env_id]
    assert main(*TINY, *steps, "--total-timesteps", 200, "--run-name", "whole") == 0
    out = capsys.readouterr().out
    stored = json.loads(Path("runs/whole/args.json").read_text())["args"]
    assert "action_repeat 2" in out and stored["action_repeat"] == 2
    assert ("gamma 0.95" in out) == (stored["gamma"] == 0.95) == env_id.startswith("myo")
    assert load("runs/whole")["run"]["step"] == 200 and len(load("runs/whole")["rows"]) == 100
    rows = evaluations("runs/whole")
    assert [int(row["step"]) for row in rows] == [100, 200]
    if env_id.startswith("myo"):
        assert {row["success"] for row in rows} <= {"0", "1"}
    else:
        assert [(row["length"], row["success"]) for row in rows] == [("1000", "")] * 2
    assert main(*TINY, *steps, "--total-timesteps", 142, "--run-name", "part") == 0
    assert main("--resume", "runs/part", "--total-timesteps", 200) == 0
    assert_identical("runs/whole", "runs/part")


@pytest.mark.parametrize("env_id", [DMC])
def test_time_limits_of_dm_control_bootstrap(main, env_id):  # noqa: F811
    """1000 environment steps are 500 transitions; the last is no termination, the next anew."""
    arguments = [*TINY, "--env-id", env_id, "--learning-starts", 9999, "--total-timesteps", 1040]
    assert main(*arguments, "--run-name", "a") == 0
    module, rows = main.module, load("runs/a")["rows"]
    env = module.make_env(module.Args(env_id=env_id, action_repeat=2))
    n, a = env.observation_space.shape[0], env.action_space.shape[0]
    obs, done, next_obs = rows[:, :n], rows[:, n + a + 1], rows[:, -n:]
    assert len(rows) == 520 and done.sum() == 0
    joined = (next_obs[:-1] == obs[1:]).all(-1)
    assert torch.equal((~joined).nonzero(), torch.tensor([[499]]))


@pytest.mark.parametrize("env_id", [DMC])
def test_dictionary_observations_are_flattened_in_the_order_of_the_space(env_id, main):  # noqa: F811
    """Shimmy's order, which is the task's: for cartpole 3 positions, then 2 velocities."""
    ours, theirs = main.module.make_env(main.module.Args(env_id=env_id)), gym.make(env_id)
    obs, _ = ours.reset(seed=5)
    parts, _ = theirs.reset(seed=5)
    assert list(parts) == list(theirs.observation_space.spaces)
    assert [np.size(part) for part in parts.values()] == [3, 2]
    assert np.allclose(obs, np.concatenate([np.ravel(part) for part in parts.values()]))


@needs_myosuite
def test_success_is_what_the_simulator_calls_solved(main):  # noqa: F811
    """Its own info["solved"], at any step: here an elbow swings past its target or misses it."""
    solved = []

    class Watched(gym.Wrapper):
        def reset(self, **options):
            solved.append([])
            return self.env.reset(**options)

        def step(self, action):
            *out, info = self.env.step(action)
            solved[-1].append(bool(info["solved"]))
            return *out, info

    args = main.module.Args(env_id="myoElbowPose1D6MRandom-v0", eval_episodes=10, critic_width=16)
    env = Watched(main.module.make_env(args))
    agent = main.module.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.act = lambda obs: np.full(env.action_space.shape, -0.9, np.float32)
    rows = main.module.evaluate(agent, env, 0, None)
    assert [row[4] for row in rows] == [int(any(steps)) for steps in solved]
    assert not all(map(any, solved)) and any(any(steps) and not steps[-1] for steps in solved)


@pytest.mark.parametrize("package, env_id", [("shimmy", WALKER), ("myosuite", HAND)])
def test_missing_suite_names_the_command(main, capsys, monkeypatch, package, env_id):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(main, capsys, "--env-id", env_id)
    assert "pip install" in message and package in message and not Path("runs").exists()


@every_script
def test_a_suite_is_exactly_the_ids_that_are_sent_to_it(main):  # noqa: F811
    """A user's own module of a similar name has none of its defaults."""
    sent = {
        "dm_control/dog-run-v0": "shimmy",
        "shimmy:dm_control/dog-run-v0": "shimmy",
        "myoHandReachFixed-v0": "myosuite",
        "myosuite:myoHandReachFixed-v0": "myosuite",
        "my_pkg:myoelectric-v0": None,
        "myown:Mine-v0": None,
        "dm_own:Mine-v0": None,
        "Hopper-v4": None,
    }
    for env_id, package in sent.items():
        assert main.module.suite_of(env_id) == package
        assert bool(main.module.Args.suite_defaults(env_id)) == bool(package)
