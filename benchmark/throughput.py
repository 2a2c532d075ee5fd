"""Speed, start-up time and memory of our scripts and of their peers, and how far ours are from the
machine's limit.

    python benchmark/throughput.py                              # our scripts and all peers: hours
    python benchmark/throughput.py --only crossq_sac sbx-crossq --widths 256 --threads 1
    python benchmark/throughput.py --table2 --threads 2 --start-updates 0    # the paper's table 2

Run it with our requirements installed, on a machine that does nothing else. Peers get virtual
environments of their own under --venvs, made from PyPI once: our requirements and pinned versions
of sb3-contrib (SB3 with it) or of SBX (JAX).

A measurement is a new process: environment, batch, widths and --learning-starts are the same for
all, and UTD is 1, but 20 for REDQ and DroQ. No evaluation or checkpoint falls in there. Rounds go
through all contenders in turn (A B A B), first for their speed, then for the limits, then for the
starts:

speed  Environment steps per second. The clock runs from the end of update --warmup, which is after
       all compilation, for --steps further steps or --seconds, whichever is over first. "memory" is
       the process's largest resident set until then, with few transitions in the buffer yet.
limit  The time of a step's matrix products alone, in fp32, each shape with warm caches in the
       fastest of several ways, plus that of the environment alone under random actions. The best
       round counts.
start  From the process's start to the end of update --start-updates, random steps included. Our
       scripts run as they do by default (--compile auto: compiled from update 2001), whatever
       --compile says here. Compilers find an empty cache. At width 2048 this takes minutes;
       --start-updates 0 leaves it out.

Threads: a process is pinned to as many CPUs, the first ones it may use (choose others with
taskset). That bounds JAX's thread pool; OMP_NUM_THREADS bounds PyTorch's too. --side-by-side K adds
K processes at once with one thread and one CPU each, their clocks started together: steps/s and
memory are then sums, the start is that of the last.

OUT.csv has a row per measurement, the columns being FIELDS: to_update_s is seconds to the end of
update to_update, *_mb MiB, gflop operations per step. OUT.md has the table, and that of --table2:
wall-clock per environment step over that of SAC in the same round. CleanRL is left out: its last
version on PyPI, 1.2.0, refuses Python 3.11, and 0.4.8, which pip takes there instead, is from
before Gymnasium.
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
FIELDS = "round kind contender compile width threads processes steps_per_s to_update".split()
FIELDS += "to_update_s rss_mb cuda_mb steps gflop gflop_per_s env_us versions".split()
BATCH, ACTOR_WIDTH = 256, 256
TABLE2 = (  # contender, width, and wall-clock over SAC's in CrossQ's paper, on an RTX 3090
    ("SAC", "sac_baseline", 256, "1"),
    ("CrossQ small", "crossq_sac", 256, ""),
    ("CrossQ", "crossq_sac", 2048, "1.2 to 1.9"),
    ("REDQ", "redq", 256, "4 to 6"),
    ("DroQ", "droq", 256, "4 to 6"),
)
COMPILED = {"on": ", compiled", "off": ", not compiled"}


class Design(NamedTuple):
    """What decides a script's number of operations."""

    rows: int  # batches in the critic's training pass: 2 if joint
    target_rows: int  # batches in the target critic's pass
    heads: int  # outputs of the actor per action dimension
    norms: bool  # whether a norm precedes the first layers, whose inputs then need gradients too
    delay: int  # critic updates per actor update
    utd: int = 1  # critic updates per environment step
    n_critics: int = 2


OURS = {
    "crossq_sac": Design(2, 0, 2, True, 3),
    "crossq_td3": Design(2, 0, 1, True, 3),
    "crossq_wn_highutd": Design(2, 2, 2, True, 3),
    "sac_baseline": Design(1, 1, 2, False, 1),
}
RIVALS = {  # in benchmark/algorithms/
    "redq": Design(1, 1, 2, False, 20, utd=20, n_critics=10),
    "droq": Design(1, 1, 2, False, 20, utd=20),
}
DESIGNS = OURS | RIVALS


@dataclasses.dataclass
class Args:
    only: tuple[Literal[(*DESIGNS, *PEERS)], ...] = (*OURS, *PEERS)  # contenders
    table2: bool = False  # the contenders and widths of the paper's table 2 in place of these two
    env_id: str = "Walker2d-v4"  # Gymnasium id
    widths: tuple[int, ...] = (256, 2048)  # units per hidden layer of the critics (actors: 256)
    threads: tuple[int, ...] = (1, 2)  # threads, and CPUs, of a process
    side_by_side: int = 0  # also measure this many processes at once, of one thread; 0: do not
    compile: tuple[Literal["on", "off"], ...] = ("on",)  # of our scripts, for their speed
    rounds: int = 3  # measurements of each contender in each setting
    steps: int = 2000  # environment steps timed, at most
    seconds: float = 30.0  # seconds timed, at most
    warmup: int = 60  # updates before the clock starts
    start_updates: int = 1000  # updates that belong to the start; 0: do not measure it
    learning_starts: int = 500  # random steps before the first update
    device: Literal["cpu", "cuda"] = "cpu"  # for all
    venvs: Path = Path("~/.cache/crossq-throughput")  # of the peers' virtual environments
    out: Path = Path("throughput")  # OUT.csv and OUT.md; an OUT.csv that exists is refused


def utd_of(contender: str) -> int:
    return DESIGNS[contender].utd if contender in DESIGNS else 1


def products(design, obs, action, width, batch=BATCH, actor_width=ACTOR_WIDTH):
    """{(n, m, k, p): times per environment step}, of n products [m, k] @ [k, p], which are
    2 n m k p operations."""
    n, heads, utd = design.n_critics, design.heads * action, design.utd
    critic = [(n, obs + action, width), (n, width, width), (n, width, 1)]
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
    add(actor, batch, utd)  # a', in eval mode
    if design.target_rows:
        add(critic, design.target_rows * batch, utd)
    add(critic, design.rows * batch, utd, weights=True, inputs_from=first)
    add(actor, batch, utd / design.delay, weights=True, inputs_from=first)
    add(critic, batch, utd / design.delay, inputs_from=0)  # only down to the actions
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
        self.job, self.updates, self.begin, self.result = job, 0, None, {}

    def __call__(self) -> None:
        job, self.updates = self.job, self.updates + 1
        if job["kind"] == "start":
            if self.updates == job["to_update"]:
                seconds = time.time() - job["started"]
                self.result = {"to_update": self.updates, "to_update_s": seconds}
                raise Measured
            return
        if self.updates < job["warmup"] or self.updates % job["utd"]:
            return  # the rest counts environment steps, each of which ends with its last update
        if self.begin is None:
            wait_for_others(job)
            self.begin, self.before = time.perf_counter(), self.updates
            return
        steps = (self.updates - self.before) // job["utd"]
        seconds = time.perf_counter() - self.begin
        late = seconds > job["seconds"] and steps % 3 == 0  # 3: whole actor periods
        if late or steps == job["steps"]:
            self.result = {"steps_per_s": steps / seconds, "steps": steps}
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
    folder = ROOT / "benchmark" / "algorithms" if job["contender"] in RIVALS else ROOT
    script = importlib.import_module("probe").load(folder / f"{job['contender']}.py")

    class Agent(script.Agent):
        def update(self, batch, rng):
            info = super().update(batch, rng)
            clock()
            return info

    keys = "env_id device compile seed learning_starts utd".split()
    flags = {key: job[key] for key in keys}
    flags |= {"critic_width": job["width"], "actor_width": ACTOR_WIDTH, "batch_size": BATCH}
    flags |= {"eval_every": 10**9, "checkpoint_every": 10**9, "total_timesteps": 10**8}
    flags |= {"run_name": job["index"]}
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


def fastest(f, seconds: float, device: str) -> float:
    """Seconds per call: the best of five averages, each over `seconds`."""
    best = float("inf")
    chunk = 10 if device == "cuda" else 1  # a GPU is not to wait for each launch
    f()
    for _ in range(5):
        calls, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            for _ in range(chunk):
                f()
            if device == "cuda":
                sys.modules["torch"].cuda.synchronize()
            calls += chunk
        best = min(best, passed / calls)
    return best


def ways(n: int, m: int, k: int, p: int, device: str) -> list:
    """Functions that make n products [m, k] @ [k, p]: which is fastest depends on the processor.
    Gradients have one factor transposed, which some libraries like better, others less."""
    import numpy as np
    import torch

    def one_by_one(triples):
        for a, b, c in triples:
            torch.mm(a, b, out=c)

    found = []
    for a_is_transposed, b_is_transposed in ((False, False), (True, False), (False, True)):
        a, b, c = (torch.randn(n, *size, device=device) for size in ((m, k), (k, p), (m, p)))
        a = a.mT.contiguous().mT if a_is_transposed else a
        b = b.mT.contiguous().mT if b_is_transposed else b
        found.append(functools.partial(torch.bmm, a, b, out=c))
        found.append(functools.partial(one_by_one, list(zip(a, b, c))))
        if device == "cpu":
            found.append(functools.partial(np.matmul, a.numpy(), b.numpy(), out=c.numpy()))
    return found


def limit(job: dict) -> dict:
    """Steps/s of a step's matrix products and the environment alone."""
    import gymnasium as gym
    import numpy as np
    import torch

    env = gym.make(job["env_id"])
    env.reset(seed=job["seed"])
    env.action_space.seed(job["seed"])
    actions = [env.action_space.sample() for _ in range(1000)]

    def step():
        _, _, terminated, truncated, _ = env.step(actions[np.random.randint(1000)])
        if terminated or truncated:
            env.reset()

    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    count, device = products(DESIGNS[job["contender"]], *sizes, job["width"]), job["device"]
    # The scripts choose "medium" where that is exact: on some processors it is much faster.
    script = importlib.import_module("probe").load(ROOT / "crossq_sac.py")
    script.choose_device(script.Args(device=device))
    precisions = {torch.get_float32_matmul_precision(), "highest"}
    wait_for_others(job)
    env_s, product_s = fastest(step, 0.2, device), 0.0
    for shape, times in count.items():
        candidates, best = ways(*shape, device), float("inf")
        for precision in precisions:
            torch.set_float32_matmul_precision(precision)
            best = min(best, *(fastest(way, 0.005, device) for way in candidates))
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
    if job["kind"] == "limit":
        result = limit(job)
    else:
        clock = Clock(job)
        try:
            (train_peer if job["contender"] in PEERS else train_ours)(job, clock)
        except Measured:
            result = clock.result
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
            env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.75 / job["processes"])  # of a GPU's
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
    row = {key: job[key] for key in FIELDS[:7]} | rows[0]
    sums = ("steps_per_s", "rss_mb", "cuda_mb", "gflop_per_s")
    row |= {key: sum(r[key] for r in rows) for key in sums if key in row}
    return row | {key: max(r[key] for r in rows) for key in ("to_update_s", "env_us") if key in row}


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


def spread(values: list[float], digits: int = 0) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def of_threads(row: dict) -> str:
    return f"{row['processes']} × {row['threads']}" if row["processes"] > 1 else row["threads"]


def table(rows: list[dict]) -> str:
    """Markdown: medians and ranges of the rounds; below, how far each of ours is from its limit."""
    groups, start, notes = collections.defaultdict(list), "start, s", []
    for row in rows:
        names = "kind width processes threads contender".split()
        compiled = row["compile"] if row["kind"] == "speed" else ""
        groups[(*(row[name] for name in names), compiled)].append(row)
        if row["kind"] == "start":
            start = f"to update {row['to_update']}, s"

    def cell(group, key, digits=0):
        return spread([row[key] for row in group], digits) if group else ""

    lines = [
        f"| | width | threads | steps/s | {start} | memory, MiB | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted((key for key in groups if key[0] == "speed"), key=lambda key: key[1:4]):
        group, width, name, share = groups[key], key[1], key[4], ""
        starts, limits = (groups.get((kind, *key[1:5], ""), []) for kind in ("start", "limit"))
        utd, count = utd_of(name), of_threads(group[0])
        label = f"`{name}`" + (f", UTD {utd}" if utd > 1 else "") + COMPILED.get(key[5], "")
        if limits:  # the best round: a limit that is exceeded is none
            best = max(limits, key=lambda row: row["steps_per_s"])
            speed = statistics.median(row["steps_per_s"] for row in group)
            share = f"{100 * speed / best['steps_per_s']:.0f} %"
            note = f"- {label}, width {width}, threads {count}: {best['gflop']:.3f} GFLOP per step "
            note += f"at {best['gflop_per_s']:.0f} GFLOP/s, and {best['env_us']:.0f} µs of "
            note += f"environment: at most {best['steps_per_s']:.1f} steps/s; "
            notes.append(f"{note}measured {speed:.1f}, {share}")
        memory = cell(group, "rss_mb")
        if "cuda_mb" in group[0]:
            memory += f", CUDA {cell(group, 'cuda_mb')}"
        measured = cell(group, "steps_per_s", 1), cell(starts, "to_update_s", 1), memory
        cells = label, width, count, *measured, share
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *notes])


def table2(rows: list[dict]) -> str:
    """Markdown: the time of an environment step over that of SAC in the same round."""
    lines = [
        "| | width | UTD | threads | steps/s | wall-clock over SAC's | in the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    speeds, threads = collections.defaultdict(dict), {}
    for row in rows:
        if row["kind"] == "speed":
            setting = row["processes"], row["threads"], row["compile"]
            speeds[setting, row["contender"], row["width"]][row["round"]] = row["steps_per_s"]
            threads[setting] = of_threads(row)
    for setting, (label, name, width, paper) in itertools.product(threads, TABLE2):
        mine = speeds.get((setting, name, width), {})
        sac = speeds.get((setting, *TABLE2[0][1:3]), {})
        ratios = [sac[number] / mine[number] for number in mine if number in sac]
        if ratios:
            measured = spread(list(mine.values()), 2), spread(ratios, 2)
            cells = label + COMPILED[setting[2]], width, utd_of(name), threads[setting], *measured
            lines.append(f"| {' | '.join(map(str, cells))} | {paper} |")
    return "\n".join(lines)


def main() -> int:
    import tyro  # not in a measuring process: a peer's start is not to wait for it

    args = tyro.cli(Args, description=__doc__)
    sys.stdout.reconfigure(line_buffering=True)  # the progress of hours may go to a file
    settings = [(1, n) for n in args.threads]
    if args.side_by_side > 1:
        settings.append((args.side_by_side, 1))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ok = {f"{args.out}.csv exists already": not Path(f"{args.out}.csv").exists()}
    ok[f"--out: there is no folder {args.out.parent}"] = args.out.parent.is_dir()
    enough = max(k * threads for k, threads in settings) <= cpus
    ok[f"--threads, --side-by-side: there are {cpus} CPUs"] = enough
    ok["--start-updates must be at least 0"] = args.start_updates >= 0
    numbers = (args.rounds, args.steps, args.warmup, *args.threads, *args.widths)
    ok["--rounds, --steps, --warmup, --threads and --widths must be at least 1"] = min(numbers) >= 1
    if args.device == "cuda":
        import torch  # takes seconds

        ok["--device cuda: there is none"] = torch.cuda.is_available()
    for error in (message for message, fine in ok.items() if not fine):
        print(f"throughput.py: error: {error}", file=sys.stderr)
        return 2
    pairs = [(name, width) for width in args.widths for name in args.only]
    if args.table2:
        pairs = [(name, width) for _, name, width, _ in TABLE2]
    measurements, ours = [], [pair for pair in pairs if pair[0] in DESIGNS]
    for pair in pairs:
        measurements += [("speed", *pair, how) for how in (args.compile if pair in ours else [""])]
    measurements += [("limit", *pair, "") for pair in ours]
    if args.start_updates:
        measurements += [("start", *pair, "auto" if pair in ours else "") for pair in pairs]
    venvs = {name: PEERS[name][0] for name, _ in pairs if name in PEERS}
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
        order = itertools.product(range(1, args.rounds + 1), settings, measurements)
        for number, (processes, threads), (kind, name, width, how) in order:
            job = {"round": number, "kind": kind, "contender": name, "compile": how, "width": width}
            job |= {"processes": processes, "threads": threads, "utd": utd_of(name)}
            job |= {"to_update": args.start_updates}
            common = "env_id device warmup steps seconds learning_starts".split()
            job |= {key: getattr(args, key) for key in common}
            where = f"{kind} of {f'{name} {how}'.strip()}, width {width}, {processes} × {threads}"
            try:
                row = measure(pythons.get(venvs.get(name), sys.executable), job)
            except RuntimeError as e:  # the others can still be compared
                failed = 1
                print(f"{where} threads, failed: {e}", file=sys.stderr)
                continue
            rows.append(row)
            rounded = {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}
            writer.writerow(rounded)
            key, unit = ("to_update_s", " s") if kind == "start" else ("steps_per_s", "/s")
            print(f"round {number}, {where}: {row[key]:.1f}{unit}")
    info = os.popen("cat /proc/cpuinfo 2>/dev/null")
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    versions = ", ".join(sorted({x for row in rows for x in row["versions"].split(", ")}))
    text = f"{args.env_id}, batch {BATCH}, UTD 1 unless said, {args.device}; "
    text += f"{cpus} CPUs, {(names or [platform.machine()])[0]}, load {load:.2f} at the start; "
    text += f"{versions}; medians and ranges of {args.rounds} rounds of {args.steps} steps "
    text += f"or {args.seconds:g} s"
    tables = [table(rows), *([table2(rows)] if args.table2 else [])]
    Path(f"{args.out}.md").write_text("\n\n".join([text, *tables]) + "\n")
    print(Path(f"{args.out}.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main())
