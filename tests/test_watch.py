"""benchmark/watch.py: what is recorded of a run, at which speed, and of whose runs."""

import sys
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_envs import Constant

sys.path.insert(0, str(ROOT / "benchmark"))

import ablate  # noqa: E402
import probe  # noqa: E402
import watch  # noqa: E402

TINY = "--critic-width 16 --actor-width 16 --batch-size 16 --learning-starts 20 --device cpu"
TINY = f"{TINY} --total-timesteps 30 --eval-every 1000 --compile off --run-name a".split()


class Drawn(Constant):
    """A picture is as bright as the last action is large, and has a bar as long as the episode."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 20}
    window_takes, drawing_takes, drawings, clock = 0.0, 0.0, 0, None

    def __init__(self, render_mode=None, length=30):
        super().__init__(length=length)
        self.render_mode = render_mode

    def step(self, action):
        result = super().step(action)
        if self.render_mode == "human":
            Drawn.clock.sleep(Drawn.drawing_takes if Drawn.drawings else Drawn.window_takes)
            Drawn.drawings += 1
        return result

    def render(self):
        picture = np.full((32, 48, 3), brightness(self.last_action[0]), np.uint8)
        picture[:4, : self.t] = 255
        return picture


class Fast(Drawn):
    """As one of DeepMind Control, whose render_fps is wrong."""

    dt = 0.008
    metadata = Drawn.metadata | {"render_fps": 8}


class SelfDrawn(Drawn):
    metadata = {"render_modes": ["human"], "render_fps": 20}


class Timeless(Drawn):
    metadata = {"render_modes": ["rgb_array"]}


class Faulty(Drawn):
    def render(self):
        return np.zeros(3)[7]


class Interrupted(Drawn):
    def render(self):
        raise KeyboardInterrupt


for env in (Drawn, Fast, SelfDrawn, Timeless, Faulty, Interrupted):
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)


def brightness(action):
    return round(130 + 300 * float(action))  # actions are in +-0.4


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("MUJOCO_GL", "egl")  # watch.main sets it: gone again after the test
    monkeypatch.setattr(sys, "path", list(sys.path))


def train(env_id="Drawn-v0", script="crossq_sac.py", *flags):
    assert probe.load(script).main(["--env-id", env_id, *TINY, *flags]) == 0


def gif(path="a.gif"):
    """The pictures, each as often as it lasts 10 ms."""
    with Image.open(path) as image:
        pictures = []
        for k in range(image.n_frames):
            image.seek(k)
            pictures += [np.asarray(image.convert("RGB"))] * (image.info["duration"] // 10)
    return pictures


def refused(capsys, *arguments):
    """The one line on stderr of a call that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        watch.main(list(arguments))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    return message


@pytest.mark.parametrize(("env_id", "repeat", "flags", "pictures", "seconds"), [
    ("Drawn-v0", 1, [], 30, 1.5),
    ("Drawn-v0", 2, [], 15, 1.5),
    ("Drawn-v0", 1, ["--episodes", "2"], 60, 3.0),
    ("Drawn-v0", 1, ["--max-steps", "10"], 10, 0.5),
    ("Drawn-v0", 2, ["--max-steps", "10"], 5, 0.5),
    ("Drawn-v0", 1, ["--fps", "10"], 15, 1.5),
    ("Drawn-v0", 1, ["--fps", "5"], 8, 1.6),
    ("Fast-v0", 1, [], 6, 0.24),
    ("Fast-v0", 1, ["--fps", "50"], 10, 0.24),
    ("Fast-v0", 2, ["--fps", "50"], 8, 0.256),
])  # fmt: skip
def test_recordings_play_at_the_true_speed(capsys, env_id, repeat, flags, pictures, seconds):
    """A picture of each agent step, or of every n-th one; the speed does not depend on n."""
    train(env_id, "crossq_sac.py", "--action-repeat", str(repeat))
    capsys.readouterr()
    assert watch.main(["runs/a", "--mp4", "a.mp4", "--gif", "a.gif", *flags]) == 0
    n, duration = imageio_ffmpeg.count_frames_and_secs("a.mp4")
    assert n == pictures and duration == pytest.approx(seconds, abs=0.02)
    shown = gif()
    assert len(shown) == pytest.approx(100 * seconds, abs=1)
    assert 1 + sum((a != b).any() for a, b in zip(shown, shown[1:])) == pictures
    out = capsys.readouterr().out
    assert f"a.mp4: {pictures} pictures, {seconds:.1f} s" in out
    assert f"a.gif: {pictures} pictures, {seconds:.1f} s" in out


def test_what_is_recorded_is_the_policy_of_the_checkpoint_in_the_episodes_of_evaluate(capsys):
    train()
    script = probe.load("crossq_sac.py")
    env = script.make_env(script.Args(env_id="Drawn-v0"))
    agent = script.Agent(3, 2, script.Args(critic_width=16, actor_width=16))
    agent.load_state_dict(torch.load("runs/a/checkpoint.pt", weights_only=True)["agent"])

    played = []
    for seed, flags in ((1, []), (7, ["--seed", "7"])):
        expected = []
        for episode in range(2):
            obs, _ = env.reset(seed=script.reset_seed(seed, 30, episode))
            for _ in range(5):
                obs, *_ = env.step(agent.act(obs))
                expected += [brightness(env.unwrapped.last_action[0])] * 5
        flags = ["--episodes", "2", "--max-steps", "5", *flags]
        assert watch.main(["runs/a", "--gif", "a.gif", *flags]) == 0
        shown = [picture[-1, -1, 0] for picture in gif()]
        assert shown == pytest.approx(expected, abs=3)  # there are no more colours
        out = capsys.readouterr().out
        assert "episode 1: return 5.0, 5 steps" in out
        assert "runs/a at step 30: 5.0 ± 0.0" in out
        played.append(expected)
    assert np.abs(np.subtract(*played)).max() > 6 and np.ptp(played) > 20


def test_width_and_no_more_than_the_recordings_is_written():
    train()
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("runs/a").iterdir()
    }
    assert watch.main(["runs/a", "--gif", "a.gif", "--width", "24"]) == 0
    after = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("runs/a").iterdir()
    }
    assert before == after
    assert sorted(path.name for path in Path().iterdir()) == ["a.gif", "runs"]
    assert gif()[0].shape == (16, 24, 3)


class Clock:
    """Stands for the module `time`: only sleeping and drawing take any."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(("repeat", "window_takes", "drawing_takes", "drawings", "seconds"), [
    (1, 0.0, 0.00, 30, 1.5),
    (2, 0.0, 0.00, 30, 1.5),
    (1, 0.0, 0.03, 30, 1.5),
    (1, 0.083, 0.083, 19, 1.5),  # all would take 2.5 seconds
    (2, 0.083, 0.083, 20, 1.5),
    (1, 3.0, 0.00, 30, 4.5),  # to open a window is not made up for
    (1, 0.6, 0.60, 30, 18.0),  # it gives up
])  # fmt: skip
def test_a_window_keeps_to_real_time(
    monkeypatch, repeat, window_takes, drawing_takes, drawings, seconds
):
    """It waits where drawing is fast, and leaves drawings out where it is slow."""
    train("SelfDrawn-v0", "crossq_sac.py", "--action-repeat", str(repeat))
    monkeypatch.setattr(watch, "time", Clock())
    monkeypatch.setattr(Drawn, "clock", watch.time)
    monkeypatch.setattr(Drawn, "window_takes", window_takes)
    monkeypatch.setattr(Drawn, "drawing_takes", drawing_takes)
    monkeypatch.setattr(Drawn, "drawings", 0)
    assert watch.main(["runs/a"]) == 0
    assert Drawn.drawings == drawings
    assert watch.time.now == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize("script", [
    "sac_baseline.py", "crossq_sac.py", "crossq_td3.py", "crossq_wn_highutd.py",
])  # fmt: skip
@pytest.mark.parametrize("ablated", [False, True])
def test_every_script_and_ablation(capsys, script, ablated):
    if not ablated:
        train("Drawn-v0", script)
    elif script == "crossq_wn_highutd.py":
        assert ablate.main([script, "--env-id", "Drawn-v0", *TINY, "--weight-norm", "none"]) == 0
    else:
        flags = ["--critic-norm", "ln", "--actor-norm", "none"]
        assert ablate.main([script, "--env-id", "Drawn-v0", *TINY, *flags]) == 0
    assert watch.main(["runs/a", "--gif", "a.gif"]) == 0
    assert "runs/a at step 30: 30.0" in capsys.readouterr().out and len(gif()) == 150


PLUGIN = """
import crossq_sac
from neighbour import LENGTH

class Agent(crossq_sac.Agent):
    "Of an environment half as long."

def make_env(args, **kwargs):
    return crossq_sac.make_env(args, length=LENGTH, **kwargs)

def main(argv=None, **parts):
    return crossq_sac.main(argv, Agent=Agent, make_env=make_env, **parts)
"""


@pytest.mark.parametrize("where", ["plugin.py", "benchmark/algorithms/plugin.py"])
def test_a_program_of_its_own(tmp_path, monkeypatch, capsys, where):
    """One in benchmark/algorithms is found, any other is given; its own make_env is drawn."""
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    Path(where).write_text(PLUGIN)
    Path(where).with_name("neighbour.py").write_text("LENGTH = 15")
    monkeypatch.syspath_prepend(Path(where).parent.resolve())
    assert probe.load(where).main(["--env-id", "Drawn-v0", *TINY]) == 0
    elsewhere = {str(ROOT), str(Path(where).parent.resolve())}
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in elsewhere])
    for name in ("plugin", "neighbour"):
        monkeypatch.delitem(sys.modules, name)
    if where == "plugin.py":
        monkeypatch.delitem(sys.modules, "crossq_sac")
        message = refused(capsys, "runs/a", "--gif", "a.gif")
        assert "runs/a was made by plugin" in message and "--program" in message
        assert watch.main(["runs/a", "--gif", "a.gif", "--program", where]) == 0
    else:
        monkeypatch.setattr(watch, "ROOT", tmp_path)
        assert watch.main(["runs/a", "--gif", "a.gif"]) == 0
    assert len(gif()) == 75

    Path(where).write_text("import crossq_sac")
    message = refused(capsys, "runs/a", "--gif", "a.gif", "--program", where)
    assert "plugin.py has no main(argv, **parts)" in message


def test_wrong_arguments(monkeypatch, capsys):
    assert "cannot read runs/a/checkpoint.pt" in refused(capsys, "runs/a", "--gif", "a.gif")
    train("SelfDrawn-v0")
    assert "render mode rgb_array but ['human']" in refused(capsys, "runs/a", "--gif", "a.gif")
    assert "is not a .gif file" in refused(capsys, "runs/a", "--gif", "a.png")
    assert "is not a .mp4 file" in refused(capsys, "runs/a", "--mp4", "nowhere/a.mp4")
    assert "is no file" in refused(capsys, "runs/a", "--program", "nowhere.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install imageio-ffmpeg" in refused(capsys, "runs/a", "--mp4", "a.mp4")
    if sys.platform == "linux":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert "no screen" in refused(capsys, "runs/a")
    for flags in ("--fps 51", "--fps 0", "--episodes 0", "--seed -1", "--width 0", "--max-steps x"):
        with pytest.raises(SystemExit) as end:
            watch.main(["runs/a", *flags.split()])
        assert end.value.code == 2
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_a_run_of_another_machine():
    """One with a GPU and an account to log to: neither is needed."""
    train()
    path = Path("runs/a/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= {"device": "cuda", "track": True}
    torch.save(checkpoint, path)
    assert watch.main(["runs/a", "--gif", "a.gif"]) == 0


def test_checkpoints_that_are_not_of_a_program_here(capsys):
    train()
    path = Path("runs/a/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"program": "../../elsewhere"}, path)
    assert "was made by ../../elsewhere" in refused(capsys, "runs/a", "--gif", "a.gif")
    del checkpoint["program"]
    torch.save(checkpoint, path)
    assert "was made by an earlier version" in refused(capsys, "runs/a", "--gif", "a.gif")
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot read" in refused(capsys, "runs/a", "--gif", "a.gif")


@pytest.mark.parametrize(("env_id", "message"), [
    ("tiny_envs:Truncated-v0", "render mode rgb_array but none at all"),
    ("Timeless-v0", "neither dt nor a render_fps"),
])  # fmt: skip
def test_environments_that_cannot_be_recorded(capsys, env_id, message):
    train(env_id)
    assert message in refused(capsys, "runs/a", "--gif", "a.gif")


def test_a_fault_of_the_environment_keeps_its_traceback_and_ctrl_c_needs_none():
    train("Faulty-v0")
    with pytest.raises(IndexError):
        watch.main(["runs/a", "--gif", "a.gif"])
    train("Interrupted-v0", "crossq_sac.py", "--run-name", "b")
    assert watch.main(["runs/b", "--gif", "a.gif"]) == 130


def test_mujoco(monkeypatch, run_script):
    """Where it cannot draw, one line says so. Where it can, a cart-pole's 20 steps are 0.8 s."""
    monkeypatch.delenv("MUJOCO_GL")
    train("InvertedPendulum-v4")
    flags = ["runs/a", "--gif", "a.gif", "--max-steps", "20", "--width", "64"]
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    result = run_script("benchmark/watch.py", *flags)
    assert result.returncode == 2 and "error: MuJoCo cannot draw here" in result.stderr
    assert "libegl1" in result.stderr and "Traceback" not in result.stderr

    monkeypatch.delenv("MUJOCO_GL")
    result = run_script("benchmark/watch.py", *flags)
    if "MuJoCo cannot draw here" in result.stderr:
        pytest.skip("no libEGL here")
    assert result.returncode == 0
    shown = gif()
    assert 0 < len(shown) <= 80 and len(shown) % 4 == 0 and shown[0].std() > 10
