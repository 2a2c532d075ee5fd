"""Watch the policy of a run, in a window or as an mp4 or a GIF, at its environment's true speed.

    python benchmark/watch.py runs/NAME                                # a window
    python benchmark/watch.py runs/NAME --episodes 3 --mp4 policy.mp4  # pip install imageio-ffmpeg
    python benchmark/watch.py runs/NAME --gif policy.gif --width 160 --fps 10  # small, for a page
    python benchmark/watch.py runs/NAME --program my_agent.py          # of an Agent of your own

It takes the runs of every program here and leaves them as they are. The episodes are those of
--evaluate: no exploration, and resets seeded from the run's seed. A step of the environment lasts
its `dt`, else 1 / render_fps, so 1000 steps of HalfCheetah are 50 seconds. A window that cannot
keep up leaves pictures out, and so does a recording to keep to --fps: the speed stays true.

A recording needs no screen. On Linux MuJoCo draws it through EGL (apt-get install libegl1
libgl1-mesa-dri) or, with MUJOCO_GL=osmesa, through OSMesa (apt-get install libosmesa6).
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path

import ablate
import gymnasium as gym
import imageio
import numpy as np
import probe
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GIF_COLOURS = 64


class Window(gym.Wrapper):
    """Holds an environment that draws itself to real time: a step lasts `seconds`."""

    def __init__(self, env, seconds):
        super().__init__(env)
        self.seconds = seconds

    def reset(self, **kwargs):
        self.unwrapped.render_mode = "human"
        result = self.env.reset(**kwargs)
        self.due = time.perf_counter()
        return result

    def step(self, action):
        """Leaves a drawing out where it is late, and begins to count again where very late."""
        late = time.perf_counter() - self.due
        if late > 0.5:
            self.due += late
        self.unwrapped.render_mode = None if self.seconds < late <= 0.5 else "human"
        result = self.env.step(action)
        self.due += self.seconds
        time.sleep(max(0, self.due - time.perf_counter()))
        return result


class Camera(gym.Wrapper):
    """Hands a picture of every n-th step, `width` pixels wide, to the writers."""

    def __init__(self, env, n, width, writers):
        super().__init__(env)
        self.n, self.width, self.writers, self.steps = n, width, writers, 0

    def step(self, action):
        result = self.env.step(action)
        if self.steps % self.n == 0:
            picture = Image.fromarray(self.env.render())
            if self.width is not None:
                height = round(picture.height * self.width / picture.width)
                picture = picture.resize((self.width, height))
            for writer in self.writers:
                writer.append_data(np.asarray(picture))
        self.steps += 1
        return result


class GifWriter:
    """Keeps the pictures, each to be shown for `seconds`, and writes them at the end."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.pictures = path, seconds, []

    def append_data(self, picture):
        self.pictures.append(picture)

    def close(self):
        n = len(self.pictures)
        # One palette, of ten pictures, and no dithering: what stands still takes no room.
        some = np.concatenate(self.pictures[:: math.ceil(n / 10)])
        palette = Image.fromarray(some).quantize(GIF_COLOURS)

        def quantized(picture):
            return Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)

        first, *rest = map(quantized, self.pictures)
        # A GIF counts in 10 ms. The times are rounded, not the delays: no error adds up.
        times = [10 * round(100 * self.seconds * k) for k in range(n + 1)]
        delays = np.diff(times).tolist()
        first.save(self.path, save_all=True, append_images=rest, duration=delays, loop=0)


def fail(*message):
    print("error:", *" ".join(map(str, message)).split(), file=sys.stderr)
    sys.exit(2)


def main_of(run, own_program):
    """The main(argv, evaluate=...) of the program that made a run; here or, if given, the own."""
    path = Path(run, "checkpoint.pt")
    try:
        name = torch.load(path, "cpu", weights_only=True, mmap=True).get("program")
    except Exception as error:  # torch.load raises many kinds
        fail("cannot read", path, "as a checkpoint:", repr(error)[:300])
    files = [*ROOT.glob("*.py"), *ROOT.glob("benchmark/algorithms/*.py")]
    if own_program is not None:
        files.append(own_program)
    programs = {file.stem: file for file in files}
    script = str(name).removeprefix("ablate_")
    if script not in programs:
        made_by = name or "an earlier version"
        fail(f"{run} was made by {made_by}, which is no program here; its file: --program FILE")
    program = probe.load(programs[script])
    if not hasattr(program, "main"):
        fail(programs[script], "has no main(argv, **parts) that hands its parts to a script's main")
    parts = {} if name == script else ablate.ablate(program)
    return functools.partial(program.main, **parts)


def seconds_per_step(env):
    """dt comes first: MuJoCo's render_fps is rounded, and DeepMind Control's is wrong."""
    dt, fps = getattr(env.unwrapped, "dt", None), env.unwrapped.metadata.get("render_fps")
    if not (dt or fps):
        fail(env, "has neither dt nor a render_fps: its speed is unknown")
    return dt or 1 / fps


def watching(options):
    """An `evaluate` that plays the program's own, in an environment that is drawn."""
    mode = "rgb_array" if options.mp4 or options.gif else "human"

    def evaluate(agent, env, step, run_dir):
        args, modes = agent.args, env.unwrapped.metadata.get("render_modes")
        if mode not in (modes or []):
            fail(args.env_id, "has no render mode", mode, "but", modes or "none at all")
        seconds = seconds_per_step(env) * args.action_repeat  # of an agent step
        n = math.ceil(round(1 / (seconds * options.fps), 6))  # of n agent steps, one is recorded
        if options.seed is not None:
            args.seed = options.seed
        limit = {"max_episode_steps": options.max_steps} if options.max_steps else {}
        env = probe.part_of(type(agent), "make_env")(args, render_mode=mode, **limit)
        writers = {}
        if options.mp4:
            how = {"format": "FFMPEG", "fps": 1 / (n * seconds), "macro_block_size": 2}
            writers[options.mp4] = imageio.get_writer(options.mp4, **how)
        if options.gif:
            writers[options.gif] = GifWriter(options.gif, n * seconds)
        env = Camera(env, n, options.width, writers.values()) if writers else Window(env, seconds)
        with contextlib.closing(env):
            rows = probe.part_of(type(agent), "evaluate")(agent, env, step, run_dir)
        for _, episode, total, length, success in rows:
            success = "" if success == "" else f", success {success}"
            print(f"episode {episode}: return {total:.1f}, {length} steps{success}")
        for path, writer in writers.items():
            writer.close()
            pictures, size = math.ceil(env.steps / n), path.stat().st_size / 1e6
            print(f"{path}: {pictures} pictures, {pictures * n * seconds:.1f} s, {size:.2f} MB")
        return rows

    return evaluate


def whole(least, most=10**9):
    """The type of an argument: a whole number in these bounds."""

    def number(text):
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return int(text)

    return number


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("run", type=Path, help="runs/NAME")
    add("--mp4", type=Path, metavar="FILE", help="record, without a window")
    add("--gif", type=Path, metavar="FILE", help="record, without a window")
    add("--episodes", type=whole(1), default=1, help="default: 1")
    add("--seed", type=whole(0), help="of the resets; default: the run's")
    add("--max-steps", type=whole(1), help="of the environment, in place of its own time limit")
    # Browsers show no GIF faster than 50.
    add("--fps", type=whole(1, 50), default=30, help="of a recording, at most; default: 30")
    add("--width", type=whole(1), help="of a recording, in pixels; default: as it is drawn")
    add("--program", type=Path, metavar="FILE", help="what made the run, where it is not found")
    options = parser.parse_args(argv)
    for path, suffix in ((options.mp4, ".mp4"), (options.gif, ".gif")):
        if path and (path.suffix != suffix or not path.parent.is_dir()):
            fail(f"{path} is not a {suffix} file in a folder that exists")
    if options.mp4 and importlib.util.find_spec("imageio_ffmpeg") is None:
        fail("--mp4 needs a package: pip install imageio-ffmpeg")
    if options.program and not options.program.is_file():
        fail(f"--program {options.program} is no file")
    return options


def main(argv=None):
    """Returns the exit code."""
    options = parse(argv)
    if sys.platform == "linux":
        if options.mp4 or options.gif:
            os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
        elif not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
            fail("there is no screen for a window: record with --gif FILE or --mp4 FILE")
    program = main_of(options.run, options.program)
    argv = ["--evaluate", str(options.run), "--eval-episodes", str(options.episodes)]
    argv += ["--device", "cpu", "--no-track"]
    try:
        return program(argv, evaluate=watching(options))
    except KeyboardInterrupt:
        return 130
    except gym.error.DependencyNotInstalled as error:
        fail(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not re.search("-packages.(OpenGL|mujoco|glfw|.*_render)", where):
            raise  # it is not of the drawing packages
        advice = "apt-get install libegl1 libgl1-mesa-dri, or see --help"
        fail("MuJoCo cannot draw here:", repr(error), f"({advice})")


if __name__ == "__main__":
    sys.exit(main())
