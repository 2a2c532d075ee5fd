"""Environments of a few lines, for tests: `--env-id tiny_envs:Name-v0` finds them."""

import gymnasium as gym
import numpy as np

Box = gym.spaces.Box


class Constant(gym.Env):
    """Observation in R^3 and reward 1 per step. An episode has `length` steps.

    The observation: step in the episode / length, a number drawn at the reset, the last action's
    first entry. Actions are bounded by 0.4, as Humanoid's. `last_action` keeps what came. The
    observation is NaN at step number `nan_at`, and its variance too large for float32 after
    `spike_at`.
    """

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    action_space = Box(-0.4, 0.4, (2,), np.float32)
    length, terminates, reward, info = 10, False, 1.0, {}
    nan_at = nan_reward_at = spike_at = None

    def __init__(self):
        self.t, self.mark, self.total_steps, self.last_action = 0, 0.0, 0, np.zeros(2)

    def _obs(self):
        return np.array([self.t / self.length, self.mark, self.last_action[0]])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.mark, self.last_action = 0, self.np_random.random(), np.zeros(2)
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        self.total_steps += 1
        self.last_action = np.atleast_1d(action)
        obs = self._obs()
        if self.total_steps == self.nan_at:
            obs = obs * np.nan
        if self.total_steps == self.spike_at:
            obs = obs * 0 + 3e38
        reward = np.nan if self.total_steps == self.nan_reward_at else self.reward
        over = self.t >= self.length
        return obs, reward, over and self.terminates, over and not self.terminates, self.info


class DictObs(Constant):
    """A Dict of Boxes, one of them without a shape."""

    observation_space = gym.spaces.Dict(
        position=Box(-np.inf, np.inf, (2,), np.float64),
        height=Box(-np.inf, np.inf, (), np.float64),
    )

    def _obs(self):
        obs = super()._obs()
        return {"position": obs[:2], "height": np.float64(obs[2])}


class Image(Constant):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)

    def _obs(self):
        return np.full((8, 8, 3), 10 * self.t, np.uint8)


class Single(Constant):
    """Only one can be open at a time."""

    is_open = False

    def __init__(self):
        assert not Single.is_open, "another one is open"
        Single.is_open = True
        super().__init__()

    def step(self, action):
        assert self.t < self.length, "the episode is over"
        return super().step(action)


def register(name, base=Constant, **attributes):
    """Registers base with these attributes replaced as NAME-v0; returns that id."""
    entry_point = type(name, (base,), attributes)
    gym.register(f"{name}-v0", entry_point, disable_env_checker=True)
    return f"{name}-v0"


register("Truncated")
register("Terminated", terminates=True)
register("NanObs", nan_at=57)
register("NanReward", nan_reward_at=7)
register("Spike", spike_at=20)
register("Image", Image)
register("Discrete", action_space=gym.spaces.Discrete(3))
register("Unbounded", action_space=Box(-np.inf, np.inf, (2,), np.float32))
register("Matrix", action_space=Box(-1, 1, (2, 2), np.float32))
register("DictObs", DictObs)
register("Single", Single)
register("Fixed", action_space=Box(np.float32([0, 1]), np.float32([5, 1])))
register("Odd", action_space=Box(np.float32([0.1, -5]), np.float32([0.3, 30])))
register("Wide", observation_space=Box(-1.7e308, 1.7e308, (3,), np.float64))
register("ArrayReward", reward=np.ones(1, np.float32))
register("suite/Terminated", terminates=True)
