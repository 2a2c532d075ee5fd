"""Speed, start-up time and memory of our scripts and of their peers, and how far ours are from the
machine's limit.

    python benchmark/throughput.py                                           # everything: hours
    python benchmark/throughput.py --only crossq_sac sbx-crossq --widths 256 --threads 1

Run it with our requirements installed, on a machine that does nothing else. Peers get virtual
environments of their own under --venvs, made from PyPI once: our requirements and pinned versions
of sb3-contrib (SB3 with it) or of SBX (JAX).

A measurement is a new process: environment, batch, widths, UTD 1 and --learning-starts are the same
for all; the clock runs from the end of update --warmup, which is after all compilation, for --steps
further steps or --seconds, whichever is over first. No evaluation or checkpoint falls in there.
Rounds go through all contenders in turn (A B A B). "start" runs from the process's start to the end
of its first update; compilers find an empty cache. "memory" is the process's largest resident set
until the clock stops, with few transitions in the buffer yet.

Threads: a process is pinned to as many CPUs, the first ones it may use (choose others with
taskset). That bounds JAX's thread pool; OMP_NUM_THREADS bounds PyTorch's too. --side-by-side K adds
K processes at once with one thread and one CPU each, their clocks started together: steps/s and
memory are then sums, start is that of the last.

The limit of our scripts: the time of a step's matrix products alone, in fp32, each shape timed with
warm caches by PyTorch or NumPy, whichever is faster, plus that of the environment alone under
random actions.

OUT.csv has a row per measurement, the columns being FIELDS: seconds in start_s, MiB in *_mb,
operations per step in gflop. OUT.md has the table. CleanRL is left out: its last version on PyPI,
1.2.0, refuses Python 3.11, and 0.4.8, which pip takes there instead, is from before Gymnasium.
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
FIELDS = "round contender compile width threads processes steps_per_s start_s rss_mb".split()
FIELDS += "cuda_mb steps gflop gflop_per_s env_us versions".split()
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
    widths: tuple[int, ...] = (256, 2048)  # units per hidden layer of the critics (actors: 256)
    threads: tuple[int, ...] = (1, 2)  # threads, and CPUs, of a process
    side_by_side: int = 0  # also measure this many processes at once, of one thread; 0: do not
    compile: tuple[Literal["on", "off"], ...] = ("on",)  # of our scripts
    rounds: int = 3  # measurements of each contender in each setting
    steps: int = 2000  # environment steps timed, at most
    seconds: float = 30.0  # seconds timed, at most
    warmup: int = 60  # updates before the clock starts
    learning_starts: int = 500  # random steps before the first update
    device: Literal["cpu", "cuda"] = "cpu"  # for all
    venvs: Path = Path("~/.cache/crossq-throughput")  # of the peers' virtual environments
    out: Path = Path("throughput")  # OUT.csv and OUT.md; an OUT.csv that exists is refused


def products(design, obs, action, width, batch=BATCH, actor_width=ACTOR_WIDTH, n_critics=2):
    """{(n, m, k, p): times per environment step} at UTD 1, of n products [m, k] @ [k, p], which are
    2 n m k p operations."""
    critic = [(n_critics, obs + action, width), (n_critics, width, width), (n_critics, width, 1)]
    heads = design.heads * action
    actor = [(1, obs, actor_width), (1, actor_width, actor_width), (1, actor_width, heads)]
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
    """To be called at the end of each update. All contenders read something back in each step, ours
    the next action, so CUDA lags by less than one."""

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
            late = seconds > job["seconds"] and steps % 3 == 0  # 3: whole actor periods
            if late or steps == job["steps"]:
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
    """The script's real command line, with an Agent that tells the clock of its updates."""
    script = importlib.import_module("probe").load(f"{ROOT}/{job['contender']}.py")

    class Agent(script.Agent):
        def update(self, batch, rng):
            info = super().update(batch, rng)
            clock()
            return info

    flags = {key: job[key] for key in ("env_id", "device", "compile", "seed", "learning_starts")}
    flags |= {"critic_width": job["width"], "actor_width": ACTOR_WIDTH, "batch_size": BATCH}
    flags |= {"eval_every": 10**9, "checkpoint_every": 10**9, "total_timesteps": 10**8}
    flags |= {"utd": 1, "run_name": job["index"]}
    argv = [str(x) for key, value in flags.items() for x in (f"--{key.replace('_', '-')}", value)]
    script.main(argv, Agent=Agent)


def train_peer(job: dict, clock: Clock) -> None:
    """SB3's interface, which all peers have; `train` is their update."""
    _, module, name, more = PEERS[job["contender"]]
    net_arch = {"pi": [ACTOR_WIDTH] * 2, "qf": [job["width"]] * 2}
    more = more | {"train_freq": 1, "gradient_steps": 1, "batch_size": BATCH}
    more |= {key: job[key] for key in ("learning_starts", "seed", "device")}
    more |= {"policy_kwargs": {"net_arch": net_arch}}
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
        best = float("inf")
        chunk = 10 if job["device"] == "cuda" else 1  # a GPU is not to wait for each launch
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
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    count = products(design, *sizes, job["width"])
    wait_for_others(job)
    env_s, product_s = fastest(step, 0.2), 0.0
    for (n, m, k, p), times in count.items():
        a, b, c = (torch.randn(n, *size, device=job["device"]) for size in ((m, k), (k, p), (m, p)))
        best = fastest(functools.partial(torch.bmm, a, b, out=c), 0.02)
        if job["device"] == "cpu":  # on AMD's processors PyTorch's library may take a slow path
            by_numpy = functools.partial(np.matmul, a.numpy(), b.numpy(), out=c.numpy())
            best = min(best, fastest(by_numpy, 0.02))
        product_s += times * best
    gflop = flop(count) / 1e9
    result = {"steps_per_s": 1 / (env_s + product_s), "env_us": 1e6 * env_s}
    return result | {"gflop": gflop, "gflop_per_s": gflop / product_s}


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
    known = "torch jax stable-baselines3 sb3-contrib sbx-rl gymnasium mujoco numpy".split()
    found = [f"{name} {installed[name]}" for name in known if name in installed]
    result["versions"] = ", ".join(found)
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
            env = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(job["threads"])}
            env["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/c{index}"
            if job["device"] == "cpu":
                env["JAX_PLATFORMS"] = "cpu"
            mine = job | {"index": index, "seed": job["round"] * 100 + index}
            mine |= {"started": time.time()}
            command = [python, Path(__file__).resolve(), "--work", json.dumps(mine)]
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
            running.append(process)
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
    sums = ("steps_per_s", "rss_mb", "cuda_mb", "gflop_per_s")
    row |= {key: sum(r[key] for r in rows) for key in sums if key in row}
    return row | {key: max(r[key] for r in rows) for key in ("start_s", "env_us") if key in row}


def make_venv(folder: Path, pins: tuple[str, ...]) -> str:
    """The folder's Python. A folder that is not marked as holding just this is installed into."""
    marker, python = folder / "throughput-pins.txt", folder / "bin" / "python"
    wanted = (ROOT / "requirements.txt").read_text() + "\n".join(pins)
    if not marker.exists() or marker.read_text() != wanted:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements.txt", *pins]
        subprocess.run(install, check=True)
        marker.write_text(wanted)
    return str(python)


def table(rows: list[dict]) -> str:
    """Markdown: medians and ranges of the rounds; below, how far each of ours is from its limit."""
    groups, notes = collections.defaultdict(list), []
    for row in rows:
        names = ("width", "processes", "threads", "contender", "compile")
        groups[tuple(row[name] for name in names)].append(row)

    def median(group, key):
        return statistics.median(row[key] for row in group)

    def cell(group, key, digits=0):
        low, high = min(row[key] for row in group), max(row[key] for row in group)
        return f"{median(group, key):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    lines = [
        "| | width | threads | steps/s | start, s | memory, MiB | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted(groups, key=lambda key: key[:3]):
        (width, processes, threads, name, compiled), group = key, groups[key]
        if name.startswith("limit of "):
            continue
        label = f"`{name}`" + {"on": ", compiled", "off": ", not compiled"}.get(compiled, "")
        count, share = f"{processes} × {threads}" if processes > 1 else threads, ""
        if best := groups.get((width, processes, threads, f"limit of {name}", "")):
            speed, at_most = median(group, "steps_per_s"), median(best, "steps_per_s")
            share = f"{100 * speed / at_most:.0f} %"
            gflop, rate, env_us = (median(best, key) for key in ("gflop", "gflop_per_s", "env_us"))
            note = f"- {label}, width {width}, threads {count}: {gflop:.3f} GFLOP per step at "
            note += f"{rate:.0f} GFLOP/s, and {env_us:.0f} µs of environment: at most "
            note += f"{at_most:.1f} steps/s; measured {speed:.1f}, {share}"
            notes.append(note)
        memory = cell(group, "rss_mb")
        if "cuda_mb" in group[0]:
            memory += f", CUDA {cell(group, 'cuda_mb')}"
        measured = cell(group, "steps_per_s", 1), cell(group, "start_s", 1), memory
        cells = label, width, count, *measured, share
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *notes])


def main() -> int:
    import tyro  # not in a measuring process: a peer's start is not to wait for it

    args = tyro.cli(Args, description=__doc__)
    sys.stdout.reconfigure(line_buffering=True)  # the progress of hours may go to a file
    settings = [(1, n) for n in args.threads]
    if args.side_by_side > 1:
        settings.append((args.side_by_side, 1))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ok = {f"{args.out}.csv exists already": not Path(f"{args.out}.csv").exists()}
    enough = max(k * threads for k, threads in settings) <= cpus
    ok[f"--threads, --side-by-side: there are {cpus} CPUs"] = enough
    numbers = (args.rounds, args.steps, args.warmup, *args.threads, *args.widths)
    ok["--rounds, --steps, --warmup, --threads and --widths must be at least 1"] = min(numbers) >= 1
    for error in (message for message, fine in ok.items() if not fine):
        print(f"throughput.py: error: {error}", file=sys.stderr)
        return 2
    contenders = []
    for name in args.only:
        contenders += [(name, how) for how in (args.compile if name in OURS else [""])]
    contenders += [(f"limit of {name}", "") for name in args.only if name in OURS]
    venvs = {name: PEERS[name][0] for name in args.only if name in PEERS}
    if args.device == "cuda":
        venvs = {name: venv.replace("sbx", "sbx-cuda") for name, venv in venvs.items()}
    folder = args.venvs.expanduser().resolve()
    pythons = {venv: make_venv(folder / venv, PINS[venv]) for venv in set(venvs.values())}
    # SIGTERM comes as an exception, so that measuring processes end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load, rows, failed = os.getloadavg()[0], [], 0
    with open(f"{args.out}.csv", "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        order = itertools.product(range(1, args.rounds + 1), args.widths, settings, contenders)
        for number, width, (processes, threads), (name, how) in order:
            job = {"round": number, "contender": name, "compile": how, "width": width}
            job |= {"processes": processes, "threads": threads}
            common = "env_id device warmup steps seconds learning_starts".split()
            job |= {key: getattr(args, key) for key in common}
            where = f"width {width}, {processes} × {threads}"
            try:
                row = measure(pythons.get(venvs.get(name), sys.executable), job)
            except RuntimeError as e:  # the others can still be compared
                failed = 1
                print(f"{name}, {where} threads, failed: {e}", file=sys.stderr)
                continue
            rows.append(row)
            rounded = {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}
            writer.writerow(rounded)
            print(f"round {number}, {name} {how}, {where}: {row['steps_per_s']:.1f}/s")
    info = os.popen("cat /proc/cpuinfo 2>/dev/null")
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    versions = ", ".join(sorted({x for row in rows for x in row["versions"].split(", ")}))
    text = f"{args.env_id}, batch {BATCH}, UTD 1, {args.device}; "
    text += f"{cpus} CPUs, {(names or [platform.machine()])[0]}, load {load:.2f} at the start; "
    text += f"{versions}; medians and ranges of {args.rounds} rounds of {args.steps} steps "
    text += f"or {args.seconds:g} s"
    Path(f"{args.out}.md").write_text(f"{text}\n\n{table(rows)}\n")
    print(Path(f"{args.out}.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main())
