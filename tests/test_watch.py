"""benchmark/watch.py: the episodes that it plays, of whose runs, and what it records of them."""

import csv
import importlib
import sys
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageSequence
from tiny_envs import Constant

sys.path.insert(0, str(ROOT / "benchmark"))
import watch  # noqa: E402

TINY = """--critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 20 --device cpu
    --total-timesteps 30 --eval-every 30 --no-compile --run-name a""".split()


class Drawn(Constant):
    """Brightness shows the last action, a bar the step. Return and success depend on the reset."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 20}
    length = 30

    def __init__(self, render_mode=None):
        super().__init__()

    def step(self, action):
        obs, reward, *over, info = super().step(action)
        return obs, reward + self.mark, *over, {"success": self.mark > 0.5}

    def render(self):
        brightness = 130 + 300 * self.last_action[0]  # actions are in +-0.4
        picture = np.full((32, 48, 3), brightness, np.uint8)
        picture[:4, : self.t] = 255
        return picture


class Fast(Drawn):
    dt = 0.008  # like DeepMind Control's, with a wrong render_fps


gym.register("Drawn-v0", Drawn, disable_env_checker=True)
gym.register("Fast-v0", Fast, disable_env_checker=True)


@pytest.fixture(autouse=True)
def train(tmp_path, monkeypatch):
    """train(PROGRAM, [SCRIPT,] FLAGS...): runs/a, by the program's main."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")  # watch.main sets it: gone again after the test
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def train(program="crossq_sac.py", *argv, env_id="Drawn-v0"):
        monkeypatch.setattr(sys, "argv", [program, *argv])
        importlib.import_module(Path(program).stem).main([*argv, "--env-id", env_id, *TINY])

    return train


def gif():
    """The pictures, each as often as it lasts 10 ms."""
    with Image.open("a.gif") as image:
        frames = ImageSequence.all_frames(image)
    return [np.asarray(f.convert("RGB")) for f in frames for _ in range(f.info["duration"] // 10)]


def test_the_episodes_are_those_of_the_last_evaluation(train, capsys):
    train()
    rows = list(csv.DictReader(open("runs/a/evaluations.csv")))
    returns = [float(row["return"]) for row in rows]
    before = {path: path.read_bytes() for path in Path("runs/a").iterdir()}
    capsys.readouterr()
    watch.main(["runs/a", "--episodes", "5"])
    expected = [f"episode {k}: return {value:.1f}, 30 steps" for k, value in enumerate(returns)]
    success = np.mean([int(row["success"]) for row in rows])
    assert 0 < success < 1 and len(set(returns)) == 5
    summary = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}, success rate {success:.2f}"
    assert capsys.readouterr().out.splitlines() == [*expected, summary]
    assert before == {path: path.read_bytes() for path in Path("runs/a").iterdir()}


@pytest.mark.parametrize(("env_id", "fps", "pictures", "seconds"), [
    ("Drawn-v0", 30, 30, 1.5),
    ("Drawn-v0", 5, 8, 1.6),
    ("Fast-v0", 50, 10, 0.24),
])  # fmt: skip
def test_recordings_play_at_the_true_speed(train, env_id, fps, pictures, seconds):
    train("crossq_sac.py", "--action-repeat", "2", env_id=env_id)
    watch.main(["runs/a", "--mp4", "a.mp4", "--gif", "a.gif", "--width", "24", "--fps", str(fps)])
    assert imageio_ffmpeg.count_frames_and_secs("a.mp4") == (pictures, pytest.approx(seconds, 0.02))
    shown = gif()
    assert len(shown) == pytest.approx(100 * seconds, abs=1) and shown[0].shape == (16, 24, 3)
    assert 1 + sum((a != b).any() for a, b in zip(shown, shown[1:])) == pictures


def test_a_window_keeps_to_real_time(train, monkeypatch):
    train()
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds + (0.02 if len(slept) < 20 else 0.2)  # and the next drawing

    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.main(["runs/a", "--window"])
    assert slept == pytest.approx([0.0] + [0.03] * 19 + [0.0] * 10)


@pytest.mark.parametrize("command", ["crossq_td3", "ablate crossq_sac --actor-norm none", "redq"])
def test_the_program_is_found_in_the_command(train, capsys, command):
    program, *flags = command.replace("crossq_sac", "crossq_sac.py").split()
    train(f"{program}.py", *flags)
    watch.main(["runs/a"])
    assert "mean" in capsys.readouterr().out


def test_a_program_of_your_own(train):
    own = "from crossq_sac import *\nclass Agent(Agent):\n    act = lambda *_: np.ones(2)"
    Path("mine.py").write_text(own)
    train("mine.py")
    with pytest.raises(SystemExit, match="runs/a was made by mine.py: give --program FILE"):
        watch.main(["runs/a"])
    watch.main(["runs/a", "--gif", "a.gif", "--program", "mine.py"])
    assert gif()[50][-1, -1, 0] == pytest.approx(250, abs=1)
