"""Environments of a few lines, for tests: `--env-id tiny_envs:Name-v0` finds them."""

import gymnasium as gym
import numpy as np


class Constant(gym.Env):
    """Observation in R^3, reward 1 per step, ended after `length` steps by termination or by
    truncation.

    The observation: step in the episode / length, a number drawn at the reset, the last action's
    first entry. Action bounds are +-0.4 in two dimensions, as Humanoid's, to show the scaling;
    `last_action` keeps what came.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-0.4, 0.4, (2,), np.float32)

    def __init__(
        self,
        length=10,
        terminates=False,
        nan_at=None,
        nan_reward_at=None,
        image=False,
        discrete=False,
    ):
        self.length, self.terminates, self.nan_at, self.nan_reward_at = (
            length,
            terminates,
            nan_at,
            nan_reward_at,
        )
        self.t, self.mark, self.total_steps, self.last_action = 0, 0.0, 0, np.zeros(2)
        if image:
            self.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        if discrete:
            self.action_space = gym.spaces.Discrete(3)

    def _obs(self):
        return np.array([self.t / self.length, self.mark, self.last_action[0]])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.mark, self.last_action = 0, self.np_random.random(), np.zeros(2)
        return self._obs(), {}

    def step(self, action):
        self.t, self.total_steps, self.last_action = (
            self.t + 1,
            self.total_steps + 1,
            np.atleast_1d(action),
        )
        over = self.t >= self.length
        obs, reward = self._obs(), 1.0
        if self.total_steps == self.nan_at:
            obs = obs * np.nan
        if self.total_steps == self.nan_reward_at:
            reward = float("inf")
        return obs, reward, over and self.terminates, over and not self.terminates, {}


class Unbounded(Constant):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class DictObs(Constant):
    """The same, with a Dict of Boxes, one of them without a shape."""

    observation_space = gym.spaces.Dict(
        position=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        height=gym.spaces.Box(-np.inf, np.inf, (), np.float64),
    )

    def _obs(self):
        obs = super()._obs()
        return {"position": obs[:2], "height": np.float64(obs[2])}


for name, entry_point, kwargs in (
    ("Truncated", Constant, {}),
    ("Terminated", Constant, {"terminates": True}),
    ("NanObs", Constant, {"nan_at": 57}),
    ("InfReward", Constant, {"nan_reward_at": 57}),
    ("Image", Constant, {"image": True}),
    ("Discrete", Constant, {"discrete": True}),
    ("Unbounded", Unbounded, {}),
    ("DictObs", DictObs, {}),
):
    gym.register(f"{name}-v0", entry_point, kwargs=kwargs, disable_env_checker=True)
