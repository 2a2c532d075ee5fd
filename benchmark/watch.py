"""Play the policy of a run: print its returns, show it in a window, or record it.

    python benchmark/watch.py runs/NAME --episodes 20              # returns, their mean and std
    python benchmark/watch.py runs/NAME --window                   # at the task's true speed
    python benchmark/watch.py runs/NAME --mp4 policy.mp4           # pip install imageio-ffmpeg
    python benchmark/watch.py runs/NAME --gif policy.gif --width 160 --fps 10
    python benchmark/watch.py runs/NAME --program my_agent.py      # an Agent of your own

It takes the runs of every program here and leaves them as they are. The policy is deterministic,
and the resets are those of the run's evaluation at the checkpoint's step. A recording leaves
pictures out to keep to --fps, but its speed stays true. It needs no screen: on Linux MuJoCo draws
through EGL (apt-get install libegl1 libgl1-mesa-dri) or, with MUJOCO_GL=osmesa, through OSMesa.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import ablate
import gymnasium as gym
import imageio
import numpy as np
import probe
import torch
from PIL import Image


class Window(gym.Wrapper):
    """Slows an environment that draws itself down to real time: a step lasts `seconds`."""

    def __init__(self, env, seconds):
        super().__init__(env)
        self.seconds, self.due = seconds, 0.0

    def step(self, action):
        result = self.env.step(action)
        now = time.perf_counter()
        self.due = max(self.due + self.seconds, now)  # it does not make up for being late
        time.sleep(self.due - now)
        return result


class Camera(gym.Wrapper):
    """Hands a picture of every n-th step, `width` pixels wide if given, to the writers."""

    def __init__(self, env, n, width, writers):
        super().__init__(env)
        self.n, self.width, self.writers, self.steps = n, width, writers, 0

    def step(self, action):
        result = self.env.step(action)
        if self.steps % self.n == 0:
            picture = Image.fromarray(self.env.render())
            if self.width:
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
        # One palette, from ten pictures, and no dithering: what stands still takes no room.
        some = np.concatenate(self.pictures[:: math.ceil(n / 10)])
        palette = Image.fromarray(some).quantize(64)
        pictures = [Image.fromarray(picture) for picture in self.pictures]
        first, *rest = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
        # A GIF counts in 10 ms. The times are rounded, not the delays, so no error adds up.
        delays = np.diff([10 * round(100 * self.seconds * k) for k in range(n + 1)]).tolist()
        first.save(self.path, save_all=True, append_images=rest, duration=delays, loop=0)


def part_finder(run, own_program=None):
    """A function that gives Args, Agent, make_env or evaluate of the program that made a run, which
    is the last script in the run's command. What it does not define is its Agent's parents'."""
    command = json.loads((run / "args.json").read_text())["command"]
    names = [Path(word).stem for word in command if word.endswith(".py")]
    here = Path(__file__).resolve().parent
    programs = {p.stem: p for p in [*here.parent.glob("*.py"), *here.glob("algorithms/*.py")]}
    if not (own_program or names and names[-1] in programs):
        sys.exit(f"error: {run} was made by {' '.join(command)[:100]}: give --program FILE")
    program = probe.load(own_program or programs[names[-1]])
    parts = vars(program) | (ablate.ablate(program) if "ablate" in names else {})
    scopes = [parts, *(vars(sys.modules[cls.__module__]) for cls in parts["Agent"].__mro__)]
    return lambda name: next(scope[name] for scope in scopes if name in scope)


def drawn(env_id, mode):
    """A Gymnasium id with a render mode: gym.make takes a specification in an id's place."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    spec = gym.spec(name)
    return dataclasses.replace(spec, kwargs=spec.kwargs | {"render_mode": mode})


def play(options):
    """Plays the episodes and records them; returns rows as in evaluations.csv."""
    part = part_finder(options.run, options.program)
    checkpoint = torch.load(options.run / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    args = part("Args")(**checkpoint["args"])
    args.device, args.eval_episodes = "cpu", options.episodes
    recording = options.mp4 or options.gif
    if recording or options.window:
        args.env_id = drawn(args.env_id, "rgb_array" if recording else "human")
    env = part("make_env")(args)
    agent = part("Agent")(*env.observation_space.shape, *env.action_space.shape, args)
    agent.load_state_dict(checkpoint["agent"])
    writers = []
    if recording or options.window:
        # MuJoCo's render_fps is rounded, and DeepMind Control's is wrong, so dt comes first.
        seconds = getattr(env.unwrapped, "dt", None) or 1 / env.metadata["render_fps"]
        n = math.ceil(round(1 / (seconds * options.fps), 6))  # one step of n is recorded
        how = {"format": "FFMPEG", "fps": 1 / (n * seconds), "macro_block_size": 2}
        writers += [imageio.get_writer(options.mp4, **how)] if options.mp4 else []
        writers += [GifWriter(options.gif, n * seconds)] if options.gif else []
        camera = Camera(env.env, n, options.width, writers)  # inside: it sees repeated steps too
        env.env = camera if recording else Window(env.env, seconds)
    rows = part("evaluate")(agent, env, checkpoint["progress"][0])
    env.close()
    for writer in writers:
        writer.close()
    return rows


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("run", type=Path, help="runs/NAME")
    add("--episodes", type=int, default=1, help="default: 1")
    add("--window", action="store_true", help="show it on the screen")
    add("--mp4", type=Path, metavar="FILE", help="record")
    add("--gif", type=Path, metavar="FILE", help="record")
    add("--fps", type=int, default=30, help="of a recording, at most; default: 30 (GIF: up to 50)")
    add("--width", type=int, help="of a recording, in pixels; default: as it is drawn")
    add("--program", type=Path, metavar="FILE", help="what made the run, if it is not found")
    options = parser.parse_args(argv)
    if sys.platform == "linux" and (options.mp4 or options.gif):
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
    warnings.filterwarnings("ignore", ".*out of date")  # the papers use the -v4 environments
    sys.path.append(os.getcwd())  # for my_module:MyEnv-v0
    _, episodes, returns, lengths, successes = zip(*play(options))
    for episode, total, length in zip(episodes, returns, lengths):
        print(f"episode {episode}: return {total:.1f}, {length} steps")
    rate = "" if "" in successes else f", success rate {np.float64(successes).mean():.2f}"
    print(f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}{rate}")


if __name__ == "__main__":
    main()
