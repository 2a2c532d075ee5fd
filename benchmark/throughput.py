"""Speed, start-up time and memory of our scripts and of their peers, and how far ours are from the machine's limit.

    python benchmark/throughput.py                                             # everything: hours
    python benchmark/throughput.py --only crossq_sac sbx-crossq --widths 256 --threads 1 --side-by-side 2

Run it with our requirements installed, on a machine that does nothing else. Peers get virtual environments of their own
under --venvs, made from PyPI once: our requirements and pinned versions of sb3-contrib (SB3 with it) or of SBX (JAX).

A measurement is a new process: environment, batch, widths, UTD 1 and --learning-starts are the same for all; the clock
runs from the end of update --warmup, which is after all compilation, for --steps further steps or --seconds, whichever
is over first. No evaluation or checkpoint falls in there. Rounds go through all contenders in turn (A B A B).
"start" runs from the process's start to the end of its first update; compilers find an empty cache. "memory" is the
process's largest resident set until the clock stops, with few transitions in the buffer yet.

Threads: a process is pinned to as many CPUs, the first ones it may use (choose others with taskset). That bounds JAX's
thread pool; OMP_NUM_THREADS bounds PyTorch's too. --side-by-side K adds K processes at once with one thread and one CPU
each, their clocks started together: steps/s and memory are then sums, start is that of the last.

The limit of our scripts: the time of a step's matrix products alone, in fp32, each shape timed with warm caches by
PyTorch or NumPy, whichever is faster, plus that of the environment alone under random actions.

OUT.csv has a row per measurement, the columns being FIELDS: seconds in start_s, MiB in *_mb, operations per step in
gflop. OUT.md has the table. CleanRL is left out: its last version on PyPI, 1.2.0, refuses Python 3.11, and 0.4.8, which
pip takes there instead, is from before Gymnasium.
"""

import collections
import csv
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
JAX = ("jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "tfp-nightly==0.26.0.dev20261027")
PINS = {"sb3": ("stable-baselines3==2.9.2", "sb3-contrib==2.9.2")}
PINS |= {"sbx": ("stable-baselines3==2.9.2", "sbx-rl==0.28.0", *JAX)}
PINS |= {"sbx-cuda": (*PINS["sbx"], "jax[cuda12]==0.10.2")}
PEERS = {  # virtual environment, module, class, arguments beyond those that all have
    "sb3-contrib-crossq": ("sb3", "sb3_contrib", "CrossQ", {"policy_delay": 3}),
    "sbx-crossq": ("sbx", "sbx", "CrossQ", {"policy_delay": 3}),
    "sb3-sac": ("sb3", "stable_baselines3", "SAC", {}),
    "sbx-sac": ("sbx", "sbx", "SAC", {}),
}
FIELDS = "round contender compile width threads processes steps_per_s start_s rss_mb cuda_mb steps".split()
FIELDS += "gflop gflop_per_s env_us versions".split()
BATCH, ACTOR_WIDTH = 256, 256


class Design(NamedTuple):
    """What decides a script's number of operations."""

    rows: int  # batches in the critic's training pass: 2 if joint
    target_rows: int  # batches in the target critic's pass
    heads: int  # outputs of the actor per action dimension
    norms: bool  # whether a norm precedes the first layers, whose inputs then need gradients too
    delay: int  # critic updates per actor update


OURS = {
    "crossq_sac": Design(2, 0, 2, True, 3),
    "crossq_td3": Design(2, 0, 1, True, 3),
    "crossq_wn_highutd": Design(2, 2, 2, True, 3),
    "sac_baseline": Design(1, 1, 2, False, 1),
}


@dataclasses.dataclass
class Args:
    only: tuple[Literal[(*OURS, *PEERS)], ...] = (*OURS, *PEERS)  # contenders
    env_id: str = "Walker2d-v4"  # Gymnasium id
    widths: tuple[int, ...] = (256, 2048)  # units per hidden layer of the critics; the actors' have 256
    threads: tuple[int, ...] = (1, 2)  # threads, and CPUs, of a process
    side_by_side: int = 0  # also measure this many processes at once, with one thread each; 0: do not
    compile: tuple[Literal["on", "off"], ...] = ("on",)  # of our scripts
    rounds: int = 3  # measurements of each contender in each setting
    steps: int = 2000  # environment steps timed, at most
    seconds: float = 30.0  # seconds timed, at most
    warmup: int = 60  # updates before the clock starts
    learning_starts: int = 500  # random steps before the first update
    device: Literal["cpu", "cuda"] = "cpu"  # for all
    venvs: Path = Path("~/.cache/crossq-throughput")  # where the peers' virtual environments are, or will be made
    out: Path = Path("throughput")  # OUT.csv and OUT.md are written; an OUT.csv that exists is refused


def products(design: Design, obs: int, action: int, width: int, batch=BATCH, actor_width=ACTOR_WIDTH, n_critics=2):
    """{(n, m, k, p): times per environment step} at UTD 1, of n products [m, k] @ [k, p]: 2 n m k p operations."""
    critic = [(n_critics, obs + action, width), (n_critics, width, width), (n_critics, width, 1)]
    actor = [(1, obs, actor_width), (1, actor_width, actor_width), (1, actor_width, design.heads * action)]
    count, nothing, first = collections.Counter(), 3, 0 if design.norms else 1

    def add(net, rows, times, weights=False, inputs_from=nothing):
        for layer, (n, k, p) in enumerate(net):
            count[n, rows, k, p] += times  # forward
            if weights:
                count[n, k, rows, p] += times  # gradient of the weights
            if layer >= inputs_from:
                count[n, rows, p, k] += times  # gradient of the layer's input

    add(actor, 1, 1)  # the action played
    add(actor, batch, 1)  # a', in eval mode
    if design.target_rows:
        add(critic, design.target_rows * batch, 1)
    add(critic, design.rows * batch, 1, weights=True, inputs_from=first)
    add(actor, batch, 1 / design.delay, weights=True, inputs_from=first)
    add(critic, batch, 1 / design.delay, inputs_from=0)  # only down to the actions
    return count


def flop(count: dict) -> float:
    """Floating-point operations per environment step of what `products` returns."""
    return sum(2 * n * m * k * p * times for (n, m, k, p), times in count.items())


class Measured(Exception):
    """Ends a contender's training once its time has been taken."""


class Clock:
    """To be called at the end of each update. All contenders read a loss back per update, so CUDA lags by less."""

    def __init__(self, job: dict):
        self.job, self.updates, self.result = job, 0, {}

    def __call__(self) -> None:
        job, self.updates = self.job, self.updates + 1
        if self.updates == 1:
            self.result["start_s"] = time.time() - job["started"]
        if self.updates == job["warmup"]:
            wait_for_others(job)
            self.begin = time.perf_counter()
        elif (steps := self.updates - job["warmup"]) > 0:
            seconds = time.perf_counter() - self.begin
            if steps == job["steps"] or (seconds > job["seconds"] and steps % 3 == 0):  # 3: whole actor periods
                self.result |= {"steps_per_s": steps / seconds, "steps": steps}
                raise Measured


def wait_for_others(job: dict) -> None:
    """Processes side by side start their clocks together."""
    Path(f"ready{job['index']}").touch()
    for _ in range(180_000):  # 15 minutes
        if len(list(Path.cwd().glob("ready*"))) == job["processes"]:
            return
        time.sleep(0.005)
    raise TimeoutError("a process side by side with this one is missing")


def train_ours(job: dict, clock: Clock) -> None:
    """The script's real command line; only Agent.update is wrapped."""
    script = importlib.import_module("probe").load(f"{ROOT}/{job['contender']}.py")
    update = script.Agent.update

    def timed(*args):
        info = update(*args)
        clock()
        return info

    script.Agent.update = timed
    flags = {key: job[key] for key in ("env_id", "device", "compile", "seed", "learning_starts")}
    flags |= {"critic_width": job["width"], "actor_width": ACTOR_WIDTH, "batch_size": BATCH, "utd": 1}
    flags |= {"eval_every": 10**9, "checkpoint_every": 10**9, "total_timesteps": 10**8, "run_name": job["index"]}
    script.main([str(x) for key, value in flags.items() for x in (f"--{key.replace('_', '-')}", value)])


def train_peer(job: dict, clock: Clock) -> None:
    """SB3's interface, which all peers have; `train` is their update."""
    _, module, name, more = PEERS[job["contender"]]
    net_arch = {"pi": [ACTOR_WIDTH] * 2, "qf": [job["width"]] * 2}
    more = more | {"train_freq": 1, "gradient_steps": 1, "batch_size": BATCH, "policy_kwargs": {"net_arch": net_arch}}
    more |= {"learning_starts": job["learning_starts"], "seed": job["seed"], "device": job["device"]}
    model = getattr(importlib.import_module(module), name)("MlpPolicy", job["env_id"], **more)
    train = model.train
    model.train = lambda *args, **kwargs: (train(*args, **kwargs), clock())
    model.learn(10**8)


def limit(job: dict) -> dict:
    """Steps/s of a step's matrix products and the environment alone."""
    import gymnasium as gym
    import numpy as np
    import torch

    def fastest(f, seconds: float) -> float:
        """Seconds per call: the best of five averages, each over `seconds`."""
        best, chunk = float("inf"), 10 if job["device"] == "cuda" else 1  # a GPU is not to wait for each launch
        f()
        for _ in range(5):
            calls, begin = 0, time.perf_counter()
            while (passed := time.perf_counter() - begin) < seconds:
                for _ in range(chunk):
                    f()
                if job["device"] == "cuda":
                    torch.cuda.synchronize()
                calls += chunk
            best = min(best, passed / calls)
        return best

    env = gym.make(job["env_id"])
    env.reset(seed=job["seed"])
    env.action_space.seed(job["seed"])
    actions = [env.action_space.sample() for _ in range(1000)]

    def step():
        _, _, terminated, truncated, _ = env.step(actions[np.random.randint(1000)])
        if terminated or truncated:
            env.reset()

    design = OURS[job["contender"].removeprefix("limit of ")]
    count = products(design, env.observation_space.shape[0], env.action_space.shape[0], job["width"])
    wait_for_others(job)
    env_s, product_s = fastest(step, 0.2), 0.0
    for (n, m, k, p), times in count.items():
        a, b, c = (torch.randn(n, *size, device=job["device"]) for size in ((m, k), (k, p), (m, p)))
        best = fastest(functools.partial(torch.bmm, a, b, out=c), 0.02)
        if job["device"] == "cpu":  # on AMD's processors PyTorch's library may take a slow path
            best = min(best, fastest(functools.partial(np.matmul, a.numpy(), b.numpy(), out=c.numpy()), 0.02))
        product_s += times * best
    result = {"steps_per_s": 1 / (env_s + product_s), "env_us": 1e6 * env_s, "gflop": flop(count) / 1e9}
    return result | {"gflop_per_s": result["gflop"] / product_s}


def work(job: dict) -> None:
    """A measuring process: its last line of output is the result."""
    if hasattr(os, "sched_setaffinity"):  # before the libraries count the CPUs
        cpus = sorted(os.sched_getaffinity(0))
        first = job["index"] * job["threads"]
        os.sched_setaffinity(0, cpus[first : first + job["threads"]] or cpus)
    if job["contender"] in (*OURS, *PEERS):
        clock = Clock(job)
        try:
            (train_ours if job["contender"] in OURS else train_peer)(job, clock)
        except Measured:
            result = clock.result
    else:
        result = limit(job)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["rss_mb"] = rss / (2**20 if sys.platform == "darwin" else 2**10)
    installed = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    known = ("torch", "jax", "stable-baselines3", "sb3-contrib", "sbx-rl", "gymnasium", "mujoco", "numpy")
    result["versions"] = ", ".join(f"{name} {installed[name]}" for name in known if name in installed)
    if job["device"] == "cuda" and "jax" not in sys.modules:
        cuda = sys.modules["torch"].cuda
        result["cuda_mb"] = cuda.max_memory_allocated() / 2**20
        result["versions"] += f", {cuda.get_device_name()}"
    print(f"\n{json.dumps(result)}")


def measure(python: str, job: dict) -> dict:
    """Runs one measurement in a process, or job["processes"] at once; returns a row of the CSV."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running, outputs = [], [open(f"{folder}/output{i}", "w+") for i in range(job["processes"])]
        for index, output in enumerate(outputs):
            env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TORCHINDUCTOR_CACHE_DIR": f"{folder}/c{index}"}
            env |= {"PYTHONWARNINGS": "ignore"} | ({"JAX_PLATFORMS": "cpu"} if job["device"] == "cpu" else {})
            mine = job | {"index": index, "seed": job["round"] * 100 + index, "started": time.time()}
            command = [python, Path(__file__).resolve(), "--work", json.dumps(mine)]
            running.append(subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output))
        try:
            while None in (codes := [process.poll() for process in running]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in running:  # of those side by side with one that failed
                process.kill()
                process.wait()
        texts = [output.seek(0) or output.read().strip() for output in outputs]
        if any(codes):
            raise RuntimeError("\n".join(texts)[-1000:])
        rows = [json.loads(text.splitlines()[-1]) for text in texts]
    row = {key: job[key] for key in FIELDS[:6]} | rows[0]
    row |= {key: sum(r[key] for r in rows) for key in ("steps_per_s", "rss_mb", "cuda_mb", "gflop_per_s") if key in row}
    return row | {key: max(r[key] for r in rows) for key in ("start_s", "env_us") if key in row}


def make_venv(folder: Path, pins: tuple[str, ...]) -> str:
    """The folder's Python. A folder that is not marked as holding just this is installed into."""
    marker, python = folder / "throughput-pins.txt", folder / "bin" / "python"
    wanted = (ROOT / "requirements.txt").read_text() + "\n".join(pins)
    if not marker.exists() or marker.read_text() != wanted:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements.txt", *pins], check=True)
        marker.write_text(wanted)
    return str(python)


def table(rows: list[dict]) -> str:
    """Markdown: medians over the rounds and ranges; below, how far each of ours is from its limit."""
    groups, notes = collections.defaultdict(list), []
    for row in rows:
        groups[row["width"], row["processes"], row["threads"], row["contender"], row["compile"]].append(row)

    def median(group, key):
        return statistics.median(row[key] for row in group)

    def cell(group, key, digits=0):
        low, high = min(row[key] for row in group), max(row[key] for row in group)
        return f"{median(group, key):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    lines = ["| | width | threads | steps/s | start, s | memory, MiB | of the limit |", "|---|---|---|---|---|---|---|"]
    for (width, processes, threads, name, compiled), group in sorted(groups.items(), key=lambda item: item[0][:3]):
        if name.startswith("limit of "):
            continue
        label = f"`{name}`" + {"on": ", compiled", "off": ", not compiled"}.get(compiled, "")
        count, share = f"{processes} × {threads}" if processes > 1 else threads, ""
        if best := groups.get((width, processes, threads, f"limit of {name}", "")):
            speed, at_most = median(group, "steps_per_s"), median(best, "steps_per_s")
            share = f"{100 * speed / at_most:.0f} %"
            gflop, rate, env_us = (median(best, key) for key in ("gflop", "gflop_per_s", "env_us"))
            note = f"- {label}, width {width}, threads {count}: {gflop:.3f} GFLOP per step at {rate:.0f} GFLOP/s, and "
            note += f"{env_us:.0f} µs of environment: at most {at_most:.1f} steps/s; measured {speed:.1f}, {share}"
            notes.append(note)
        memory = cell(group, "rss_mb") + (f", CUDA {cell(group, 'cuda_mb')}" if "cuda_mb" in group[0] else "")
        cells = label, width, count, cell(group, "steps_per_s", 1), cell(group, "start_s", 1), memory, share
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *notes])


def main() -> int:
    import tyro  # not in a measuring process: a peer's start is not to wait for it

    args = tyro.cli(Args, description=__doc__)
    sys.stdout.reconfigure(line_buffering=True)  # the progress of hours may go to a file
    settings = [(1, n) for n in args.threads] + ([(args.side_by_side, 1)] if args.side_by_side > 1 else [])
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ok = {f"{args.out}.csv exists already": not Path(f"{args.out}.csv").exists()}
    ok[f"--threads, --side-by-side: there are {cpus} CPUs"] = max(k * threads for k, threads in settings) <= cpus
    numbers = (args.rounds, args.steps, args.warmup, *args.threads, *args.widths)
    ok["--rounds, --steps, --warmup, --threads and --widths must be at least 1"] = min(numbers) >= 1
    for error in (message for message, fine in ok.items() if not fine):
        print(f"throughput.py: error: {error}", file=sys.stderr)
        return 2
    contenders = [(name, how) for name in args.only for how in (args.compile if name in OURS else [""])]
    contenders += [(f"limit of {name}", "") for name in args.only if name in OURS]
    venvs = {name: PEERS[name][0] for name in args.only if name in PEERS}
    if args.device == "cuda":
        venvs = {name: venv.replace("sbx", "sbx-cuda") for name, venv in venvs.items()}
    pythons = {venv: make_venv(args.venvs.expanduser().resolve() / venv, PINS[venv]) for venv in set(venvs.values())}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that measuring processes end too
    load, rows, failed = os.getloadavg()[0], [], 0
    with open(f"{args.out}.csv", "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        order = itertools.product(range(1, args.rounds + 1), args.widths, settings, contenders)
        for number, width, (processes, threads), (name, how) in order:
            job = {"round": number, "contender": name, "compile": how, "width": width, "env_id": args.env_id}
            job |= {"processes": processes, "threads": threads, "device": args.device, "warmup": args.warmup}
            job |= {"steps": args.steps, "seconds": args.seconds, "learning_starts": args.learning_starts}
            try:
                row = measure(pythons.get(venvs.get(name), sys.executable), job)
            except RuntimeError as e:  # the others can still be compared
                failed = 1
                print(f"{name}, width {width}, {processes} × {threads} threads, failed: {e}", file=sys.stderr)
                continue
            rows.append(row)
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})
            print(f"round {number}, {name} {how}, width {width}, {processes} × {threads}: {row['steps_per_s']:.1f}/s")
    names = [x.split(":")[1].strip() for x in os.popen("cat /proc/cpuinfo 2>/dev/null") if x.startswith("model name")]
    versions = ", ".join(sorted({x for row in rows for x in row["versions"].split(", ")}))
    text = f"{args.env_id}, batch {BATCH}, UTD 1, {args.device}; {cpus} CPUs, {(names or [platform.machine()])[0]}, "
    text += (
        f"load {load:.2f} at the start; {versions}; medians and ranges of {args.rounds} rounds of {args.steps} steps "
    )
    text += f"or {args.seconds:g} s"
    Path(f"{args.out}.md").write_text(f"{text}\n\n{table(rows)}\n")
    print(Path(f"{args.out}.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main())
