"""Speed, start-up time and memory of the scripts, beside sb3-contrib and SBX, in the real loop.

    pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2 sbx-rl==0.28.0 \\
        jax==0.10.2 flax==0.12.8 optax==0.2.8 tfp-nightly==0.26.0.dev20261027
    python benchmark/throughput.py                                 # CrossQ here, in both packages
    python benchmark/throughput.py --only crossq_sac sbx-crossq --widths 256 --side-by-side 2
    python benchmark/throughput.py --table2 --memory default       # table 2 of CrossQ's paper

Run it on a machine that does nothing else. On CUDA, SBX needs jax[cuda12]==0.10.2 too.

A measurement is a new process: environment, batch, widths and --learning-starts are the same for
all, and UTD is 1, but 20 for REDQ and DroQ. No evaluation falls in there. Each of --rounds goes
through all contenders in turn, in each setting: threads, memory, products.

steps/s   Environment steps per second, from the end of update --warmup, which is after all
          compilation, for --steps further steps or --seconds, whichever is over first.
start     Seconds from the process's start to the end of update --warmup: imports, random steps and
          compilation with empty caches.
memory    The largest resident set until the end, with few transitions in the buffer yet.
over SBX  Steps/s over those of sbx-crossq in the same round, at the same width, threads, processes
          and memory setting. With --table2 it is the time of a step over SAC's.

--memory kept tells glibc to keep freed memory, by two MALLOC_ variables. Without them an update of
a wide critic takes thousands of page faults. --bf16 on is for the scripts and REDQ.

A process is pinned to as many CPUs as it has threads, the first ones it may use (choose others with
taskset). That bounds JAX's thread pool. --side-by-side K adds K processes at once with one thread
and one CPU each, which start their clocks together. Steps/s and memory are then sums.

OUT.csv has a row per measurement, and OUT.md the table: medians and ranges of the rounds.
"""

import collections
import csv
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
BATCH, ACTOR_WIDTH = 256, 256
OURS = {  # UTD: critic updates per environment step
    "crossq_sac": 1,
    "crossq_td3": 1,
    "crossq_wn_highutd": 1,
    "sac_baseline": 1,
    "redq": 20,
    "droq": 20,
}
PEERS = {  # module, class, arguments beyond those that all have
    "sb3-contrib-crossq": ("sb3_contrib", "CrossQ", {"policy_delay": 3}),
    "sbx-crossq": ("sbx", "CrossQ", {"policy_delay": 3}),
}
TABLE2 = {  # contender, width: a step's time over SAC's in CrossQ's paper, on an RTX 3090
    ("sac_baseline", 256): "1",
    ("crossq_sac", 256): "1.0 to 1.5",
    ("crossq_sac", 2048): "1.2 to 1.9",
    ("redq", 256): "4 to 6",
    ("droq", 256): "4 to 6",
}
MEMORY = {
    "default": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"},
}
SETTING = ["contender", "width", "processes", "threads", "memory", "bf16"]  # of a row
FIELDS = ["round", *SETTING, "steps_per_s", "start_s", "rss_mb", "cuda_mb", "steps", "versions"]


@dataclasses.dataclass
class Args:
    only: tuple[Literal[(*OURS, *PEERS)], ...] = (  # contenders
        "crossq_sac",
        "sb3-contrib-crossq",
        "sbx-crossq",
    )
    table2: bool = False  # the contenders and widths of the paper's table 2 in place of these two
    env_id: str = "Walker2d-v4"  # Gymnasium id
    widths: tuple[int, ...] = (256, 2048)  # units per hidden layer of the critics (actors: 256)
    threads: tuple[int, ...] = (2,)  # threads, and CPUs, of a process
    side_by_side: int = 0  # also measure this many processes at once, of one thread; 0: do not
    memory: tuple[Literal["default", "kept"], ...] = ("default", "kept")  # what glibc is told
    bf16: tuple[Literal["off", "on"], ...] = ("off", "on")  # that flag, where there is one
    compile: bool = True  # the scripts
    rounds: int = 3  # measurements of each contender in each setting
    steps: int = 2000  # environment steps timed, at most
    seconds: float = 15.0  # seconds timed, at most
    warmup: int = 60  # updates before the clock starts
    learning_starts: int = 500  # random steps before the first update
    device: Literal["cpu", "cuda"] = "cpu"  # for all
    out: Path = Path("throughput")  # OUT.csv and OUT.md; an OUT.csv that exists is refused


class Measured(Exception):
    """Ends a contender's training once its time has been taken."""


class Clock:
    """To be called at the end of each update. All contenders read something back in each step, ours
    the next action, so CUDA lags by less than one."""

    def __init__(self, job: dict):
        self.job, self.updates, self.begin, self.result = job, 0, None, {}

    def __call__(self) -> None:
        job, self.updates = self.job, self.updates + 1
        if self.updates < job["warmup"] or self.updates % job["utd"]:
            return  # environment steps are counted, each of which ends with its last update
        if self.begin is None:
            self.result["start_s"] = time.time() - job["started"]
            wait_for_others(job)
            self.begin, self.before = time.perf_counter(), self.updates
            return
        steps = (self.updates - self.before) // job["utd"]
        seconds = time.perf_counter() - self.begin
        late = seconds > job["seconds"] and steps % 3 == 0  # 3: whole actor periods
        if late or steps == job["steps"]:
            self.result |= {"steps_per_s": steps / seconds, "steps": steps}
            raise Measured


def wait_for_others(job: dict) -> None:
    """Processes side by side start their clocks together."""
    Path(f"ready{job['index']}").touch()
    while len(list(Path.cwd().glob("ready*"))) < job["processes"]:
        time.sleep(0.005)


def train_ours(job: dict, clock: Clock) -> None:
    """The script's real command line, with an Agent that tells the clock of its updates."""
    import probe

    rival = HERE / "algorithms" / f"{job['contender']}.py"
    script = probe.load(rival if rival.exists() else HERE.parent / rival.name)

    class Agent(script.Agent):
        def update(self, batch, rng):
            info = super().update(batch, rng)
            clock()
            return info

    flags = {key: job[key] for key in "env_id device seed learning_starts utd".split()}
    flags |= {"critic_width": job["width"], "actor_width": ACTOR_WIDTH, "batch_size": BATCH}
    flags |= {"eval_every": 10**9, "checkpoint_minutes": 10**9, "total_timesteps": 10**8}
    flags |= {"run_name": job["index"]}
    argv = [str(x) for key, value in flags.items() for x in (f"--{key.replace('_', '-')}", value)]
    argv.append("--compile" if job["compile"] else "--no-compile")
    argv += ["--bf16"] if job["bf16"] == "on" else []
    script.main(argv, Agent=Agent)


def train_peer(job: dict, clock: Clock) -> None:
    """SB3's interface, which all peers have; `train` is their update."""
    module, name, more = PEERS[job["contender"]]
    net_arch = {"pi": [ACTOR_WIDTH] * 2, "qf": [job["width"]] * 2}
    more = more | {"train_freq": 1, "gradient_steps": 1, "batch_size": BATCH}
    more |= {key: job[key] for key in ("learning_starts", "seed", "device")}
    more |= {"policy_kwargs": {"net_arch": net_arch}}
    model = getattr(importlib.import_module(module), name)("MlpPolicy", job["env_id"], **more)
    train = model.train
    model.train = lambda *args, **kwargs: (train(*args, **kwargs), clock())
    model.learn(10**8)


def work(job: dict) -> None:
    """A measuring process: its last line of output is the result."""
    if hasattr(os, "sched_setaffinity"):  # before the libraries count the CPUs
        cpus = sorted(os.sched_getaffinity(0))
        first = job["index"] * job["threads"]
        os.sched_setaffinity(0, cpus[first : first + job["threads"]] or cpus)
    clock = Clock(job)
    try:
        (train_peer if job["contender"] in PEERS else train_ours)(job, clock)
    except Measured:
        result = clock.result
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["rss_mb"] = rss / (2**20 if sys.platform == "darwin" else 2**10)
    packages = "torch jax stable-baselines3 sb3-contrib sbx-rl gymnasium mujoco numpy".split()
    installed = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    result["versions"] = ", ".join(f"{p} {installed[p]}" for p in packages if p in installed)
    if job["device"] == "cuda" and "jax" not in sys.modules:
        cuda = sys.modules["torch"].cuda
        result["cuda_mb"] = cuda.max_memory_allocated() / 2**20
        result["versions"] += f", {cuda.get_device_name()}"
    print(f"\n{json.dumps(result)}")


def environment(job: dict, folder: str, index: int) -> dict:
    """Of a measuring process: its threads, empty compilers' caches and what glibc is told."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    env |= MEMORY[job["memory"]]
    env |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(job["threads"])}
    env |= {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/c{index}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.75 / job["processes"])  # of a GPU's memory
    return env | ({"JAX_PLATFORMS": "cpu"} if job["device"] == "cpu" else {})


def measure(job: dict) -> dict:
    """Runs one measurement in a process, or job["processes"] at once; returns a row of the CSV."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running, outputs = [], [open(f"{folder}/output{i}", "w+") for i in range(job["processes"])]
        for index, output in enumerate(outputs):
            mine = {"index": index, "seed": job["round"] * 100 + index, "started": time.time()}
            command = [sys.executable, Path(__file__), "--work", json.dumps(job | mine)]
            how = {"cwd": folder, "env": environment(job, folder, index)}
            running.append(subprocess.Popen(command, stdout=output, stderr=output, **how))
        try:
            while None in (codes := [process.poll() for process in running]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in running:  # those side by side with one that failed
                process.kill()
                process.wait()
        texts = [output.seek(0) or output.read().strip() for output in outputs]
    if any(codes):
        raise RuntimeError("\n".join(texts)[-1000:])
    rows = [json.loads(text.splitlines()[-1]) for text in texts]
    sums = {key: sum(r[key] for r in rows) for key in ("steps_per_s", "rss_mb")}
    row = {key: job[key] for key in FIELDS if key in job} | rows[0] | sums
    return row | {"start_s": max(r["start_s"] for r in rows)}


def spread(values: list[float], digits: int = 0) -> str:
    if not values:
        return ""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rows: list[dict], table2: bool = False) -> str:
    """Markdown: medians and ranges of the rounds, and ratios within a round: steps/s over SBX's, or
    the time of a step over SAC's."""
    base, own = ("sac_baseline", "bf16") if table2 else ("sbx-crossq", "width")

    def place(row: dict) -> tuple:
        return tuple(row[key] for key in ("round", "processes", "threads", "memory", own))

    bases = {place(row): row["steps_per_s"] for row in rows if row["contender"] == base}
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in SETTING)].append(row)
    head = ["", "width", "UTD", "threads", "memory setting", "products", "steps/s", "start, s"]
    head += ["memory, MiB", *(["time over SAC's", "in the paper"] if table2 else ["over SBX"])]
    lines = [head, ["---"] * len(head)]
    for setting in sorted(groups, key=lambda s: (*s[2:5], s[1])):
        name, width, processes, threads, memory, bf16 = setting
        group = groups[setting]
        ratios = [row["steps_per_s"] / bases[place(row)] for row in group if place(row) in bases]
        ratios = [1 / ratio for ratio in ratios] if table2 else ratios
        count = f"{processes} x {threads}" if processes > 1 else threads
        cells = [f"`{name}`", width, OURS.get(name, 1), count, memory]
        cells.append("bfloat16" if bf16 == "on" else "float32")
        for key, digits in (("steps_per_s", 1), ("start_s", 1), ("rss_mb", 0)):
            cells.append(spread([row[key] for row in group], digits))
        cells.append(spread(ratios, 2))
        lines.append([*cells, TABLE2.get((name, width), "")] if table2 else cells)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def jobs(args: Args):
    """The measurements, in order."""
    pairs = list(TABLE2) if args.table2 else list(itertools.product(args.only, args.widths))
    settings = [(1, n) for n in args.threads]
    settings += [(args.side_by_side, 1)] if args.side_by_side > 1 else []
    common = "env_id device compile warmup steps seconds learning_starts".split()
    order = itertools.product(range(1, args.rounds + 1), settings, args.memory, pairs)
    for number, (processes, threads), memory, (name, width) in order:
        products = args.bf16 if name in OURS else [""]
        for bf16 in ["off"] if name == "droq" else products:  # DroQ has no --bf16
            job = {"round": number, "contender": name, "width": width, "processes": processes}
            job |= {"threads": threads, "memory": memory, "bf16": bf16, "utd": OURS.get(name, 1)}
            yield job | {key: getattr(args, key) for key in common}


def main() -> int:
    import tyro  # not in a measuring process: a peer's start is not to wait for it

    args = tyro.cli(Args, description=__doc__)
    todo = list(jobs(args))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if Path(f"{args.out}.csv").exists():
        sys.exit(f"error: {args.out}.csv exists already")
    if max(job["processes"] * job["threads"] for job in todo) > cpus:
        sys.exit(f"error: there are {cpus} CPUs")
    modules = {PEERS[job["contender"]][0] for job in todo if job["contender"] in PEERS}
    if missing := [name for name in modules if not importlib.util.find_spec(name)]:
        sys.exit(f"error: {' and '.join(missing)} cannot be imported: see --help, or use --only")
    load, rows, failed = os.getloadavg()[0], [], 0
    with open(f"{args.out}.csv", "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for job in todo:
            where = ", ".join(f"{key} {job[key]}" for key in ["round", *SETTING])
            try:
                row = measure(job)
            except RuntimeError as error:  # the others can still be compared
                failed = 1
                print(f"{where}: failed: {error}", file=sys.stderr)
                continue
            rows.append(row)
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
            print(f"{where}: {row['steps_per_s']:.1f} steps/s", flush=True)
    info = os.popen("cat /proc/cpuinfo 2>/dev/null")
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    versions = ", ".join(sorted({x for row in rows for x in row["versions"].split(", ")}))
    text = (
        f"{args.env_id}, batch {BATCH}, {args.device}, {'' if args.compile else 'not '}compiled; "
    )
    text += f"{cpus} CPUs, {(names or [platform.machine()])[0]}, load {load:.2f} at the start; "
    text += f"{versions}; medians and ranges of {args.rounds} rounds"
    Path(f"{args.out}.md").write_text(f"{text}\n\n{table(rows, args.table2)}\n")
    print(Path(f"{args.out}.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main())
