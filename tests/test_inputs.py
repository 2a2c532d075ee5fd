"""Environments of every kind: what the wrapper makes of them, and the two suites."""

import importlib.util
import types

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
from conftest import TINY, assert_identical, evaluations, load
from gymnasium.utils.env_checker import check_env

import crossq_sac
from crossq_sac import Args, evaluate, make_env


def make(name, **arguments):
    env = make_env(Args(env_id=f"tiny_envs:{name}-v0", **arguments))
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("name", ["Truncated", "DictObs", "Image", "Odd"])
@pytest.mark.filterwarnings("ignore")
def test_the_wrapper_conforms_to_gymnasiums_api(monkeypatch, name):
    monkeypatch.setattr(crossq_sac.Env, "spec", None)  # so that none is made anew from its id
    check_env(make(name), skip_render_check=True)


BOUNDS = [("Odd", [0.1, -5], [0.3, 30]), ("Fixed", [0, 1], [5, 1])]


@pytest.mark.parametrize("name, low, high", BOUNDS)
def test_actions_fill_their_bounds_and_stay_in_them(name, low, high):
    """In single precision 1 would become 0.30000004 where 0.3 is the most there can be. A fixed
    dimension has its one value."""
    env = make(name)
    for action, expected in (([1, 1], high), ([-3, -3], low), ([0, 0], np.add(low, high) / 2)):
        env.step(np.array(action, np.float32))
        seen = env.unwrapped.last_action
        assert seen in env.unwrapped.action_space and np.allclose(seen, expected)


@pytest.mark.parametrize("name", ["Fixed", "Wide", "ArrayReward", "Image"])
def test_training(main, name):
    """Also with bounds beyond float32, and rewards that are arrays."""
    main(*TINY, "--env-id", f"tiny_envs:{name}-v0", "--run-name", "a", "--total-timesteps", 60)
    assert [row["return"] for row in evaluations("runs/a")] == ["10.0"] * 2
    rows, width = load("runs/a")["rows"], 8 * 8 * 3 * 2 + 4 if name == "Image" else 10
    assert rows.isfinite().all() and rows.shape == (60, width)


def test_observations_are_flattened_in_the_order_of_the_space():
    env = make("DictObs")
    obs, *_ = env.step(np.full(2, 0.5, np.float32))
    assert obs.dtype == np.float32 and obs.shape == (3,) == env.observation_space.shape
    assert [obs[0], obs[2]] == pytest.approx([0.1, 0.2])  # "position", then "height"


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    for env in (make(name, action_repeat=4) for name in ("Terminated", "Truncated")):
        steps = [env.step(np.zeros(2, np.float32)) for _ in range(3)]
        assert [(r, t or u) for _, r, t, u, _ in steps] == [(4, False), (4, False), (2, True)]
        assert (env.episode_return, env.episode_length) == (10.0, 10)


def agent(eval_episodes=2):
    args = Args(eval_episodes=eval_episodes)
    return types.SimpleNamespace(args=args, act=lambda obs: np.zeros(2, np.float32))


@pytest.mark.parametrize("info, success", [
    ({}, ""), ({"episode": 7}, ""), ({"success": None}, "0"),
    ({"is_success": np.array([True])}, "1"), ({"solved": np.array([False])}, "0"),
])  # fmt: skip
def test_success(monkeypatch, info, success):
    """None is no success, one element is its truth, other keys are the environment's own."""
    monkeypatch.setattr(tiny_envs.Constant, "info", info)
    assert [row[4] for row in evaluate(agent(), make("Truncated"), 0)] == [success] * 2


@pytest.mark.parametrize("key", ["is_success", "success", "solved"])
def test_success_at_any_time_of_an_episode_counts(monkeypatch, key):
    """Every second episode succeeds, for one step in its middle."""
    succeeds = property(lambda env: {key: env.total_steps == 15})
    monkeypatch.setattr(tiny_envs.Constant, "info", succeeds)
    assert [row[4] for row in evaluate(agent(), make("Truncated"), 0)] == ["0", "1"]


def test_an_evaluation_ends_without_a_time_limit(monkeypatch):
    env = make("Truncated", action_repeat=100)
    monkeypatch.setattr(tiny_envs.Constant, "length", 10**9)
    rows = evaluate(agent(eval_episodes=1), env, 0)
    assert rows[0][2:4] == (100_000.0, 100_000)


def test_an_environment_of_which_only_one_instance_can_exist(main, whole):
    """One's own make_env returns the open one, and evaluations come as episodes end. Nothing else
    changes."""
    open_one = crossq_sac.Env(gym.make("Single-v0"), 1)
    with pytest.raises(AssertionError, match="another one is open"):
        gym.make("Single-v0")
    main(*TINY, "--run-name", "a", make_env=lambda args: open_one)
    assert_identical(whole(main), "runs/a")


def suite(name, env_id):
    there = importlib.util.find_spec(name)
    return pytest.param(env_id, marks=pytest.mark.skipif(not there, reason=f"no {name}"))


SUITES = [suite("shimmy", "shimmy:dm_control/cartpole-swingup-v0")]
SUITES += [suite("myosuite", "myosuite:myoFingerReachFixed-v0")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", SUITES)
def test_suites(main, env_id):
    """Time limits are no terminations: after the last step of an episode comes a fresh one. The
    observations are flat, and MyoSuite says what succeeds."""
    arguments = [*TINY, "--env-id", env_id, "--action-repeat", 2, "--eval-episodes", 1]
    steps = ["--learning-starts", 9999, "--total-timesteps", 1040, "--eval-every", 1000]
    main(*arguments, *steps, "--run-name", "a")
    env = make_env(Args(env_id=env_id, action_repeat=2))
    n, a = env.observation_space.shape[0], env.action_space.shape[0]
    rows, (row,) = load("runs/a")["rows"], evaluations("runs/a")
    assert len(rows) == 520 and rows[:, n + a + 1].sum() == 0
    joined = (rows[:-1, -n:] == rows[1:, :n]).all(-1)
    ends = (~joined).nonzero()[:, 0].tolist()
    if "dm_control" in env_id:
        assert ends == [499] and row["length"] == "1000" and row["success"] == ""
    else:
        length = int(row["length"]) // 2
        assert ends == [*range(length - 1, 519, length)] and row["success"] in "01"
