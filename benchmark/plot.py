"""Draws learning curves, aggregates and diagnostics, and prints tables, from `evaluations.csv`
files, beside the published curves.

    pip install matplotlib==3.11.2 scipy==1.17.1
    python benchmark/plot.py                            # benchmark/results/SETTING/ENV/SEED.csv
    python benchmark/plot.py --runs runs --out figures  # runs/NAME/{evaluations.csv,args.json}
    python benchmark/plot.py --runs runs --over critic-width  # or utd: a scaling figure

There are three figures, each as PNG and SVG. `curves` has a panel per environment. `aggregate` has
a panel per suite, if two of its environments are there. `panels` has the Q-bias, the weight norm
and the effective learning rate, if probe.py has left probe.csv files. They lie in a run's folder;
in results/ they are SETTING/ENV/SEED.probe.csv or _FOLDER/NAME/probe.csv. The tables are Markdown.

The script of a run under --runs is the one in its name, if that has the default form
ENV__PROGRAM__SEED__TIME or run.sh's form ENV__PROGRAM+FLAGS__SEED. Otherwise it is the program that
its checkpoint.pt names. Runs of one script and FLAGS are told apart by the flags in args.json that
differ, but not by those of machine and logging. A flag that some runs do not have is a difference
too, so runs from before a flag existed are told apart from later ones.

A score is the mean return of an evaluation's episodes, or the success rate where every evaluation
has one. Seeds are averaged only at the steps that all of them have, so a curve ends where the
shortest one ends. The IQM is the mean without the lowest and the highest quarter, both rounded
down: of fewer than four seeds it is the mean. The interval is a percentile bootstrap over the
seeds, in aggregates stratified by environment. With three seeds it covers less than its name says.
The papers show IQM and 70 % (CrossQ), and IQM and 90 % (CrossQ + WN). Aggregates are the means of
return / 1000 (DMC), of success (MyoSuite), or of (return - random) / (TD3 - random) (MuJoCo).

In the tables and in `over`, a value is the mean of a seed's evaluations around the step, as the
published values are: those within 5 % of it, and at least those within 2000 steps, or 8400 of SAC,
whose published evaluations are rare; before step 20 000 these shrink with the step.

`--x hours` counts from the TensorBoard events, without the pauses before a resume, and `--x
updates` counts those of the critic. Both place a point at the mean over its seeds, and both are
logarithmic where one setting's curve is more than five times as long as another's. `--x both` has
a panel of each side by side (CrossQ, figure 6); `curves` is then called `efficiency`.

`--over FLAG` makes one figure more, `over`: the returns at some steps over a flag that is a number.
Under --results the number is in the setting's name, as in -utd5; of critic-width, as in -w512.
"""

import argparse
import csv
import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

try:
    import matplotlib
    import numpy as np
    from scipy import stats
except ImportError as e:
    needed = "this needs: pip install matplotlib==3.11.2 scipy==1.17.1"
    print(f"plot.py: error: {e}; {needed}", file=sys.stderr)
    raise SystemExit(2) from None

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "plot"  # the same SVG every time
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

HERE = Path(__file__).resolve().parent
# Those of Okabe and Ito, which the colour-blind can tell apart too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES = ["-", "-.", (0, (8, 2))]  # of settings 1 to 6, 7 to 12, 13 to 18
# These flags do not change what is learnt by a step.
HOUSEKEEPING = """env_id seed total_timesteps device run_name eval_every eval_episodes
    checkpoint_every resume evaluate track compile""".split()
# The defaults of these depend on the suite.
BY_SUITE = "action_repeat gamma policy_delay critic_lr actor_lr alpha_lr".split()
RANDOM_TD3 = {  # TD7's appendix (arXiv 2306.02451); MR.Q and SimbaV2 normalise by it too
    "HalfCheetah-v4": (-289.415, 10574), "Hopper-v4": (18.791, 3226), "Walker2d-v4": (2.791, 3946),
    "Ant-v4": (-70.288, 3942), "Humanoid-v4": (120.423, 5165),
}  # fmt: skip
SUITES = {"DMC": "return / 1000", "MyoSuite": "success rate", "MuJoCo": "TD3-normalised return"}
DIAGNOSTICS = {  # quantity: axis label
    "q_bias/mean": "Q-bias: mean",
    "q_bias/std": "Q-bias: standard deviation",
    "weight_norm": "critic's weight norm, sum over layers",
    "effective_lr": "critic's effective lr, mean over layers",
}
AXES = {
    "steps": "environment steps",
    "hours": "wall-clock hours",
    "updates": "gradient steps of the critic",
}
AXES_OF = {x: [x] for x in AXES} | {"both": ["updates", "hours"]}  # by --x
SOURCE = "SimbaV2's repository"
# File in published/, algorithm (None: it has no such column), band, label, line (no line: it is in
# the table only). Those of rivals.csv are shown only beside runs of their program.
PUBLISHED = [
    ("crossq_gym_lowstep.csv", None, "q15 q85",
     f"CrossQ, 2048 wide ({SOURCE}); band: 70 % of the 10 seeds", "--"),
    ("gate_bootstrap.csv", "CrossQ(utd1)", "m5_q05 m5_q95", "", ""),
    ("gate_bootstrap.csv", "SAC(utd1)", "m5_q05 m5_q95",
     f"SAC, mean ({SOURCE}); band: 90 % of means of 5 seeds", ":"),
    ("bro_official.csv", "BRO(utd10)", "", "BRO, UTD 10 (its repository)", (0, (4, 1, 1, 1))),
    ("simba_repos.csv", "SimBa(utd2)", "", f"SimBa, UTD 2 ({SOURCE})", (0, (1, 3))),
    ("simba_repos.csv", "SAC(utd1)", "", f"SAC, UTD 1 ({SOURCE})", (0, (1, 1))),
    ("rivals.csv", "REDQ(utd20)", "min max",
     f"REDQ, UTD 20 ({SOURCE}); band: its 10 seeds", (0, (5, 1))),
    ("rivals.csv", "DroQ(utd20)", "min max",
     f"DroQ, UTD 20 ({SOURCE}); band: its 10 seeds", (0, (3, 2))),
    ("rivals.csv", "TD3(gym v1)", "min max",
     "TD3 on gym's -v1 (its repository); band: its 10 seeds", "-."),
    ("rivals.csv", "BRO(utd10)", "min max",
     f"BRO, UTD 10 ({SOURCE}); band: its seeds", (0, (4, 1, 1, 1))),
    ("rivals.csv", "BRO(utd2)", "min max",
     f"BRO (Fast), UTD 2 ({SOURCE}); band: its seeds", (0, (3, 1, 1, 1, 1, 1))),
    ("rivals.csv", "XQC(utd2)", "", "XQC, UTD 2 (its repository)", (0, (2, 1, 1, 1))),
    ("rivals.csv", "SR-SAC(utd32)", "", "SR-SAC, UTD 32 (its repository)", (0, (6, 1, 1, 1, 1, 1))),
]  # fmt: skip
# Of the published algorithms that have a single point somewhere.
MARKERS = {None: "o", "SAC(utd1)": "s", "BRO(utd10)": "D", "SimBa(utd2)": "^"}
MARKERS |= {"REDQ(utd20)": "P", "DroQ(utd20)": "X", "XQC(utd2)": "v", "SR-SAC(utd32)": "*"}
MARKERS |= {"TD3(gym v1)": "d", "BRO(utd2)": "p"}
OVER_STEPS = [20_000, 30_000, 50_000, 100_000, 300_000, 1_000_000]  # of --over
PUBLISHED_WIDTH = 2048  # of the published CrossQ
WINDOW = 16_666  # environment steps over which the published steps to a return were smoothed


@dataclasses.dataclass
class Run:
    setting: str
    env: str  # as in a folder's name: _ for slash and colon
    seed: str
    curves: dict[str, dict[int, float]]  # {quantity: {environment step: value}}
    x: dict[str, dict[int, float]]  # {x-axis: {environment step: place on it}}
    args: dict = dataclasses.field(default_factory=dict)  # of a run under --runs


@dataclasses.dataclass
class Curve:
    """One setting's evaluated steps [T], their places [T] on each x-axis, and the values [seeds, T]
    of each environment."""

    steps: list[int]
    x: dict[str, np.ndarray]
    values: list[np.ndarray]


@dataclasses.dataclass
class Panel:
    title: str
    ylabel: str
    scale: str
    curves: dict[str, Curve]  # by setting
    # Algorithm, label, line, {environment step: (value,) or (value, low, high)}.
    published: list[tuple]


def natural(name: str) -> list:
    """A key to sort by: utd 2 comes before utd 10, and what is published comes last."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)  # every second one is a number
    return [name.startswith("published"), *(float(p) if i % 2 else p for i, p in enumerate(parts))]


def note(message: str) -> None:
    print(f"plot.py: {message}", file=sys.stderr)


def fail(message: str) -> None:
    note(f"error: {message}")
    raise SystemExit(2)


# Reading


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file as dictionaries. Lines that start with # are comments."""
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_evaluations(path: Path) -> dict[str, dict[int, float]]:
    """From evaluations.csv: {"return": {step: mean over the episodes}}, and "success" in the same
    way if every episode has one."""
    rows, curves = read_table(path), {}
    for name in ("return", "success"):
        if all(row[name] for row in rows):
            values = defaultdict(list)
            for row in rows:
                values[int(row["step"])].append(float(row[name]))
            curves[name] = {step: float(np.mean(v)) for step, v in values.items()}
    return curves


def read_probe(path: Path) -> dict[str, dict[int, float]]:
    """From probe.csv: {quantity: {step: value}} for those of DIAGNOSTICS. Without such a file there
    are none."""
    values, curves = defaultdict(dict), defaultdict(dict)
    for step, quantity, value in csv.reader(open(path)) if path.exists() else ():
        values[int(step)][quantity] = float(value)  # after a resume, a step's last row counts
    for step, at in values.items():
        for name, combine in (("weight_norm", np.sum), ("effective_lr", np.mean)):
            layer = re.compile(rf"critic/\d+/{name}")
            layers = [value for quantity, value in at.items() if layer.fullmatch(quantity)]
            at |= {name: float(combine(layers))} if layers else {}  # none before the first update
        for name in DIAGNOSTICS.keys() & at.keys():
            curves[name][step] = at[name]
    return dict(curves)


def load_results(folder: Path) -> list[Run]:
    """Reads SETTING/ENV/SEED.csv, and _FOLDER/NAME/probe.csv, which is no learning curve."""
    runs = []
    for path in sorted(folder.glob("[!_]*/*/*.csv")):
        if path.name.endswith(".probe.csv"):
            continue
        curves = read_evaluations(path) | read_probe(path.with_suffix(".probe.csv"))
        runs.append(Run(path.parts[-3], path.parts[-2], path.stem, curves, {}))
    for path in sorted(folder.glob("_*/*/probe.csv")):
        runs.append(Run(path.parts[-2], path.parts[-3].strip("_"), "", read_probe(path), {}))
    for run in runs:
        run.x = {"steps": {step: step for curve in run.curves.values() for step in curve}}
    return runs


def load_runs(folder: Path, axes: list[str]) -> list[Run]:
    """Reads NAME/{evaluations.csv,args.json[,probe.csv]}. Of one setting, environment and seed only
    the longest run counts."""
    paths = [path.parent for path in sorted(folder.glob("*/args.json"))]
    paths = [path for path in paths if (path / "evaluations.csv").exists()]
    all_args = {path: json.loads((path / "args.json").read_text())["args"] for path in paths}
    scripts = {path: script_of(path) for path in paths}  # with the flags in its name
    shared = set.intersection(*(set(script[1:]) for script in scripts.values())) if paths else set()
    runs = {}
    for path, args in all_args.items():
        script, *named = scripts[path]
        flags = differing([all_args[p] for p in paths if scripts[p] == scripts[path]])
        flags = [f"{flag.replace('_', '-')}={args[flag]}" for flag in flags if flag in args]
        setting = ", ".join([script, *(flag for flag in named if flag not in shared), *flags])
        curves = read_evaluations(path / "evaluations.csv") | read_probe(path / "probe.csv")
        env = re.sub(r"[/\\:]", "_", args["env_id"])
        run = Run(setting, env, str(args["seed"]), curves, {}, args)
        done, key = curves["return"], (run.setting, run.env, run.seed)
        if not done:
            note(f"{path}: no evaluation yet")
            continue
        if key in runs:
            note(f"{path}: {key} is there twice; only the longer counts")
        if key not in runs or max(done) > max(runs[key].curves["return"]):
            run.x = {x: places(path, args, done, x) for x in axes}
            runs[key] = run
    return list(runs.values())


def places(path: Path, args: dict, steps: Iterable[int], x: str) -> dict[int, float]:
    """{environment step: place on the x-axis}."""
    if x == "hours":
        return hours(path)
    if x == "steps":
        return {step: step for step in steps}
    begin = args["learning_starts"] * args["action_repeat"]
    rate = args["utd"] / args["action_repeat"]
    return {step: (step - begin) * rate for step in steps if step >= begin}


def script_of(path: Path) -> list[str]:
    """The script of a run's folder, and the flags in its name: see the top. A script that
    ablate.py runs counts as the script itself, because the flags of ablate.py tell them apart."""
    name = r".+?__(?:ablate_)?([a-zA-Z]\w*?(?:\+.+?)?)__\d+(?:__\d+)?"
    if match := re.fullmatch(name, path.name):
        return match[1].split("+")
    if not (path / "checkpoint.pt").exists():
        fail(f"{path}: of which script? Call it ENV__PROGRAM__SEED__TIME, or leave its checkpoint")
    import torch  # only here: it takes seconds

    checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    return [checkpoint["program"].removeprefix("ablate_")]


def differing(all_args: list[dict]) -> list[str]:
    """The flags that differ between runs; those of BY_SUITE, between runs of one suite."""

    def differs(flag: str) -> bool:
        suites = [suite_of(args["env_id"]) if flag in BY_SUITE else None for args in all_args]
        values = [json.dumps(args.get(flag)) for args in all_args]
        return len(set(zip(suites, values))) > len(set(suites))

    flags = dict.fromkeys(flag for args in all_args for flag in args if flag not in HOUSEKEEPING)
    return [flag for flag in flags if differs(flag)]


def hours(path: Path) -> dict[int, float]:
    """{environment step: hours that the run had run when its evaluation was written}. The parts of
    a resumed run are added up."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    out, before = {}, 0.0
    for file in sorted(path.glob("events.out.tfevents.*")):
        events = list(EventFileLoader(str(file)).Load())
        for event in events:
            if any(value.tag == "eval/return" for value in event.summary.value):
                out[event.step] = (before + event.wall_time - events[0].wall_time) / 3600
        before += events[-1].wall_time - events[0].wall_time
    return out or fail(f"--x hours is not available: {path} has no events of eval/return")


def published(
    envs: list[str], last: int, statistic: str, settings: Iterable[str] = ()
) -> list[tuple]:
    """Name, label, line, {step <= last: (value, low, high) or (value,)} of each published algorithm
    that has all envs and, if it is one of rivals.csv, its program among the settings.

    Of several environments, it is the mean of their normalised values. Where a file has no IQM, it
    is the mean over the seeds.
    """
    out = []
    programs = {re.split("[-+,]", setting)[0] for setting in settings}
    for file, alg, band, label, line in PUBLISHED:
        program = str(alg).partition("(")[0].lower().replace("-", "_")
        if file == "rivals.csv" and program not in programs:
            continue
        tasks = []
        for env in envs:
            rows = read_table(HERE / "published" / file)
            rows = [r for r in rows if (r["env"], r.get("alg")) == (name_of(env), alg)]
            names = [statistic if rows and statistic in rows[0] else "mean", *band.split()]
            values = {int(r["env_step"]): tuple(float(r[name]) for name in names) for r in rows}
            tasks.append(values)
        steps = sorted(step for step in set.intersection(*map(set, tasks)) if step <= last)
        values = {step: tasks[0][step] for step in steps}
        if len(envs) > 1:
            label = label.split("; band")[0] + ", mean of the tasks"
            for s in steps:
                scores = [normalised(env, task[s][0]) for env, task in zip(envs, tasks)]
                values[s] = (np.mean(scores),)
        out += [(alg, f"published: {label}", line, values)] if values else []
    return out


def name_of(env: str) -> str:
    """What an environment is called in published/: dm_control_ball_in_cup-catch-v0 is
    ball-in-cup-catch, and myoHandPoseRandom-v0 is myo-pose-hard."""
    if match := re.fullmatch(r"myoHand(\w+)(Fixed|Random)-v0", env):
        task = re.sub("([A-Z])", r"-\1", match[1]).lower()
        return f"myo{task}" + "-hard" * (match[2] == "Random")
    return env.removeprefix("dm_control_").removesuffix("-v0").replace("_", "-")


# Statistics


def estimate(samples: list[np.ndarray], statistic: str, level: int) -> np.ndarray:
    """Mean or IQM over all seeds of all environments, and its stratified bootstrap interval.

    `samples` has an array [seeds, ...] per environment. Returns [3, ...]: value, low and high. One
    seed has no interval: low and high are NaN.
    """

    def pooled(*parts, axis):
        return stats.trim_mean(np.concatenate(parts, axis), 0.25 if statistic == "iqm" else 0, axis)

    value = pooled(*samples, axis=0)
    if min(map(len, samples)) < 2:
        return np.stack([value, value * np.nan, value * np.nan])
    options = {"n_resamples": 2000, "confidence_level": level / 100, "method": "percentile"}
    result = stats.bootstrap(samples, pooled, axis=0, rng=0, **options)
    return np.stack([value, result.confidence_interval.low, result.confidence_interval.high])


def common(runs: list[Run], quantity: str) -> Curve:
    """Has the steps that all seeds have, and nothing else."""
    there = [set(run.curves.get(quantity, {})).intersection(*run.x.values()) for run in runs]
    steps = sorted(set.intersection(*there))
    x = {
        axis: np.array([np.mean([run.x[axis][step] for run in runs]) for step in steps])
        for axis in runs[0].x
    }
    values = np.array([[run.curves[quantity][step] for step in steps] for run in runs])
    return Curve(steps, x, [values])


def suite_of(env: str) -> str | None:
    return {"dm_": "DMC", "myo": "MyoSuite"}.get(env[:3], "MuJoCo" if env in RANDOM_TD3 else None)


def normalised(env: str, values):
    low, high = {"DMC": (0, 1000), "MyoSuite": (0, 1)}.get(suite_of(env)) or RANDOM_TD3[env]
    return (values - low) / (high - low)


def merged(envs: list[str], curves: list[Curve]) -> Curve:
    """One setting's curves in several environments, normalised, at the steps that all of them
    have."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    x, values = defaultdict(list), []
    for env, curve in zip(envs, curves):
        columns = [curve.steps.index(step) for step in steps]
        for axis, at in curve.x.items():
            x[axis].append(at[columns])
        values.append(normalised(env, curve.values[0][:, columns]))
    return Curve(steps, {axis: np.mean(at, 0) for axis, at in x.items()}, values)


def steps_to(curve: Curve, threshold: float) -> np.ndarray:
    """[seeds]: the first step at which the evaluations of the last WINDOW steps have a mean above
    threshold, or inf if there is none."""
    steps, values = np.array(curve.steps), curve.values[0]
    trailing = np.stack([values[:, (s - WINDOW < steps) & (steps <= s)].mean(1) for s in steps], 1)
    return np.where(trailing > threshold, steps, np.inf).min(1)


# Panels


def group(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """{environment: {setting: runs}}, sorted."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.env, natural(run.setting), run.seed)):
        groups[run.env][run.setting].append(run)
    return groups


def curve_panels(runs: list[Run], statistic: str) -> list[Panel]:
    """A panel per environment. It shows success where every run has it, and otherwise return."""
    panels = []
    for env, settings in group(run for run in runs if "return" in run.curves).items():
        success = all("success" in run.curves for runs in settings.values() for run in runs)
        quantity = "success" if success else "return"
        curves = {setting: common(runs, quantity) for setting, runs in settings.items()}
        for setting, curve in curves.items():
            ends = sorted({max(run.curves["return"], default=0) for run in settings[setting]})
            if curve.steps[-1:] != ends[-1:]:
                note(f"{setting}, {env}: seeds end at {ends}, in common {curve.steps[-1:]}")
        curves = {setting: curve for setting, curve in curves.items() if curve.steps}
        # Published curves begin at 6000 steps, and are to be seen beside a shorter run.
        last = max([10_000, *(curve.steps[-1] for curve in curves.values())])
        ylabel = "success rate" if success else "evaluation return"
        panels.append(
            Panel(env, ylabel, "linear", curves, published([env], last, statistic, curves))
        )
    return panels


def aggregate_panels(panels: list[Panel], statistic: str) -> list[Panel]:
    """A panel per suite, over the environments that all settings have, so that settings can be
    compared. A setting with only one environment is left out."""
    out = []
    for suite, ylabel in SUITES.items():
        members = {panel.title: panel.curves for panel in panels if suite_of(panel.title) == suite}
        names = sorted({setting for curves in members.values() for setting in curves}, key=natural)
        names = [name for name in names if sum(name in curves for curves in members.values()) > 1]
        envs = [env for env, curves in members.items() if set(names) <= curves.keys()]
        if names and len(envs) > 1:
            curves = {name: merged(envs, [members[env][name] for env in envs]) for name in names}
            last = max(max(curve.steps, default=0) for curve in curves.values())
            title = f"{suite}: {len(envs)} tasks"
            curves = {name: curve for name, curve in curves.items() if curve.steps}
            out.append(
                Panel(title, ylabel, "linear", curves, published(envs, last, statistic, curves))
            )
    return out


def diagnostic_panels(runs: list[Run]) -> list[Panel]:
    """A panel per quantity and environment, of the runs that have a probe.csv."""
    panels = []
    runs = [run for run in runs if DIAGNOSTICS.keys() & run.curves.keys()]
    for env, settings in group(runs).items():
        for quantity, label in DIAGNOSTICS.items():
            curves = {setting: common(runs, quantity) for setting, runs in settings.items()}
            curves = {setting: curve for setting, curve in curves.items() if curve.steps}
            values = np.concatenate([curve.values[0].ravel() for curve in curves.values()] or [[0]])
            # A critic that diverges needs another scale.
            scale = "log" if 0 < 20 * values.min() < values.max() else "linear"
            scale = "symlog" if values.min() < 0 and abs(values).max() > 5 else scale
            panels.append(Panel(env, label, scale, curves, []))
    return panels


def split_off(flag: str, run: Run) -> tuple[str, float | None]:
    """The run's setting without the flag, and the flag's value, or None if that is no number."""
    if run.args:
        parts = run.setting.split(", ")
        rest = ", ".join(part for part in parts if not part.startswith(f"{flag}="))
        value = run.args.get(flag.replace("-", "_"))
        return rest, value if isinstance(value, (int, float)) else None
    short = "w" if flag == "critic-width" else flag
    if match := re.search(rf"-{short}(\d+(\.\d+)?)(?=-|$)", run.setting):
        return run.setting.replace(match[0], ""), float(match[1])
    return run.setting, None


def draw_over(flag: str, runs: list[Run], args, path: Path) -> None:
    """Writes path.png and path.svg: a panel per environment, with a line per setting and step. Over
    the critic's width, the published CrossQ stands beside it."""
    lines = defaultdict(lambda: defaultdict(list))  # {environment: {(setting, step): points}}
    values = defaultdict(set)
    for env, settings in group(run for run in runs if "return" in run.curves).items():
        for setting, members in settings.items():
            rest, value = split_off(flag, members[0])
            curve = common(members, "return")
            for step in OVER_STEPS if value is not None else ():
                if step in curve.steps:
                    score = estimate(around(setting, curve, step), args.statistic, args.interval)
                    lines[env][rest, step].append((value, *score.ravel()))
                    values[env].add(value)
    envs = [env for env in lines if len(values[env]) > 1]
    if not envs:
        steps = " or ".join(f"{step:,}" for step in OVER_STEPS)
        fail(f"--over {flag}: no task has runs that differ in it and an evaluation at {steps}")
    rests = sorted({rest for env in envs for rest, _ in lines[env]}, key=natural)
    steps = sorted({step for env in envs for _, step in lines[env]})
    size = max(4.6 * len(envs), 8.5), 5
    figure, axes = plt.subplots(1, len(envs), figsize=size, squeeze=False, layout="constrained")
    entries = {}

    def add(axis, label, step, points, **style):
        at, value, low, high = np.array(points).T
        i = steps.index(step)
        at = at * 1.03**i  # or the intervals of two steps would hide each other
        style |= {"color": COLOURS[i], "capsize": 3}
        entries[label] = axis.errorbar(at, value, (value - low, high - value), **style)

    for axis, env in zip(axes.flat, envs):
        for rest, step in sorted(lines[env], key=lambda key: (key[1], natural(key[0]))):
            label = f"{rest}, " * (len(rests) > 1) + f"{step:,} steps"
            add(axis, label, step, lines[env][rest, step], marker="os^v"[rests.index(rest) % 4])
        for alg, label, _, at in published([env], steps[-1], args.statistic):
            for step in steps if (flag, alg) == ("critic-width", None) else ():
                if step in at:
                    beside = [(PUBLISHED_WIDTH * 1.2, *at[step])]
                    add(axis, label, step, beside, marker="D", mfc="none", linestyle=":")
        ticks = sorted(values[env])
        axis.set(title=env, xlabel=flag, ylabel="evaluation return")
        axis.set_xscale("log" if ticks[0] > 0 else "linear")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    legend(figure, entries, entries, caption(args))
    save(figure, path)


def draw(panels: list[Panel], columns: int, styles: dict[str, dict], args, path: Path) -> None:
    """Writes path.png and path.svg: the panels, each over the x-axes that are asked for, and below
    them one legend, whose title says what line and band are."""
    over = [(panel, x) for panel in panels for x in AXES_OF[args.x]]
    columns = 2 if args.x == "both" else columns
    rows = -(-len(over) // columns)
    size = max(4.6 * columns, 7), 3.4 * rows + 1.4
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(over) :]:
        axis.remove()
    counts, entries = defaultdict(set), {}
    theirs = [line for panel in panels for line in panel.published]
    points = {label for _, label, _, values in theirs if len(values) == 1}
    for axis, (panel, x) in zip(axes.flat, over):
        for setting, curve in panel.curves.items():
            value, low, high = estimate(curve.values, args.statistic, args.interval)
            style, at = styles[setting], curve.x[x]
            marker = "" if len(at) > 1 else "o"
            (entries[setting],) = axis.plot(at, value, marker=marker, **style)
            axis.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
            counts[setting] |= set(map(len, curve.values))
        for alg, label, line, values in panel.published if x == "steps" else ():
            if line:
                value, *band = np.array(list(values.values())).T
                style = {"marker": MARKERS[alg], "markevery": [-1]} if label in points else {}
                style |= {"linestyle": line, "color": "0.3"}
                (entries[label],) = axis.plot(values.keys(), value, **style)
                if band:
                    axis.fill_between(values.keys(), *band, color="0.3", alpha=0.12, linewidth=0)
        axis.set(title=panel.title, xlabel=AXES[x], ylabel=panel.ylabel)
        axis.set(yscale=panel.scale, xlim=(0, None))
        ends = [curve.x[x][-1] for curve in panel.curves.values()]
        if x != "steps" and 0 < 5 * min(ends, default=0) < max(ends):
            axis.set_xscale("log", nonpositive="mask")  # an evaluation may be at update 0
            axis.autoscale(axis="x")
        axis.xaxis.set_major_formatter("{x:g}" if x == "hours" else EngFormatter(sep=""))  # 100k
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    entries = {label: entries[label] for label in sorted(entries, key=natural)}
    labels = [f"{name} ({seeds(counts[name])})" if name in counts else name for name in entries]
    ours = [curve for panel in panels for curve in panel.curves.values()]
    title = caption(args) + ", stratified by task" * any(len(curve.values) > 1 for curve in ours)
    legend(figure, entries, labels, title)
    save(figure, path)


def legend(figure, entries: dict, labels: Iterable[str], title: str) -> None:
    options = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "title_fontsize": 9}
    ncols = 1 + (len(entries) > 6)
    figure.legend(entries.values(), labels, title=title, ncols=ncols, **options)


def save(figure, path: Path) -> None:
    figure.savefig(f"{path}.png", dpi=150)
    figure.savefig(f"{path}.svg", metadata={"Date": None})
    plt.close(figure)


def caption(args) -> str:
    statistic = args.statistic.upper().replace("MEAN", "Mean")
    return f"{statistic} and {args.interval} % bootstrap interval over the seeds"


def seeds(counts: set[int]) -> str:
    ends = sorted({min(counts), max(counts)})
    return f"{' to '.join(map(str, ends))} seed{'s' * (counts != {1})}"


# Tables


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"


def around(setting: str, curve: Curve, step: int) -> list[np.ndarray]:
    """[seeds] of each environment: the means of the evaluations around a step, as the published
    values are: see the top."""
    least = (8400 if setting.startswith("sac") else 2000) * min(1, step / 20_000)
    near = np.abs(np.array(curve.steps) - step) <= max(least, 0.05 * step)
    return [values[:, near].mean(1) for values in curve.values]


def score_table(panels: list[Panel], args) -> list[str]:
    """Markdown: the scores around 20, 50 and 100 thousand steps, where there is an evaluation, and
    around the last step."""
    beside = (
        "published; a range: 5 to 95 % of the means of 5 seeds drawn from 10 (rivals: all seeds)"
    )
    out = [f"| task | around step | setting | {caption(args)} | each seed | {beside} |"]
    out.append("|---" * 6 + "|")
    for panel in panels:
        for setting, curve in panel.curves.items():
            for step in sorted({20_000, 50_000, 100_000, *curve.steps[-1:]} & set(curve.steps)):
                samples = around(setting, curve, step)
                value, low, high = map(number, estimate(samples, args.statistic, args.interval))
                each = ", ".join(map(number, samples[0])) if len(samples) == 1 else ""
                beside = [(alg, at[step]) for alg, *_, at in panel.published if alg and step in at]
                beside = [f"{alg} {' to '.join(map(number, v[1:] or v))}" for alg, v in beside]
                score = value if low == "nan" else f"{value} [{low}, {high}]"
                cells = panel.title, f"{step:,}", setting, score, each, ", ".join(beside)
                out.append(f"| {' | '.join(cells)} |")
    return out


def threshold_table(panels: list[Panel]) -> list[str]:
    """Markdown: the median steps to the returns of published/steps_to_threshold.csv, and how many
    seeds got there."""

    def cell(median: float, reached: int, n: int, last: int) -> str:
        return f"{f'{median:,.0f}' if np.isfinite(median) else f'> {last:,}'} ({reached} of {n})"

    table = defaultdict(dict)  # {(environment, return): {column: text}}
    curves_of = {panel.title: panel.curves for panel in panels}
    for row in read_table(HERE / "published" / "steps_to_threshold.csv"):
        at = table[row["env"], int(row["threshold"])]
        for setting, curve in curves_of.get(row["env"], {}).items():
            first = steps_to(curve, int(row["threshold"]))
            reached = np.isfinite(first).sum()
            at[setting] = cell(np.median(first), reached, len(first), curve.steps[-1])
        theirs = float(row["median_steps"]), row["n_reached"], row["n_seeds"]
        at[f"published {row['alg']}"] = cell(*theirs, 1_000_000)
    table = {key: at for key, at in table.items() if key[0] in curves_of}
    columns = sorted({column for at in table.values() for column in at}, key=natural)
    out = ["| task | return | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for (env, threshold), at in table.items():
        cells = env, f"{threshold:,}", *(at.get(column, "") for column in columns)
        out.append(f"| {' | '.join(cells)} |")
    return out if table else []


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    source = parser.add_mutually_exclusive_group()
    text = "default: benchmark/results"
    source.add_argument("--results", type=Path, default=HERE / "results", help=text)
    source.add_argument("--runs", type=Path, help="a folder of runs' folders")
    text = "where the figures go; default: into the folder that is read"
    parser.add_argument("--out", type=Path, help=text)
    parser.add_argument("--statistic", choices=["iqm", "mean"], default="iqm")
    text = "percent; default: 90"
    parser.add_argument("--interval", type=int, choices=[70, 90, 95], default=90, help=text)
    text = "all but steps: only with --runs"
    parser.add_argument("--x", choices=AXES_OF, default="steps", help=text)
    text = "a flag of the scripts, without --"
    parser.add_argument("--over", metavar="FLAG", help=text)
    args = parser.parse_args(argv)
    if args.x != "steps" and not args.runs:
        fail(f"--x {args.x} is not available: {args.results} has only evaluations; use --runs")
    runs = load_runs(args.runs, AXES_OF[args.x]) if args.runs else load_results(args.results)
    curves = curve_panels(runs, args.statistic)
    aggregates, diagnostics = aggregate_panels(curves, args.statistic), diagnostic_panels(runs)
    if not curves:
        fail(f"no evaluations in {args.runs or args.results}")
    settings = dict.fromkeys(s for panel in curves + diagnostics for s in panel.curves)
    styles = {}
    for i, setting in enumerate(settings):
        styles[setting] = {"color": COLOURS[i % 6], "linestyle": LINES[i // 6 % 3]}
    out = args.out or args.runs or args.results
    out.mkdir(parents=True, exist_ok=True)
    name = "efficiency" if args.x == "both" else "curves"
    draw(curves, min(3, len(curves)), styles, args, out / name)
    if aggregates:
        draw(aggregates, len(aggregates), styles, args, out / "aggregate")
    if diagnostics:
        draw(diagnostics, 2, styles, args, out / "panels")
    if args.over:
        draw_over(args.over.replace("_", "-"), runs, args, out / "over")
    print("\n".join([*score_table(curves + aggregates, args), "", *threshold_table(curves)]))


if __name__ == "__main__":
    main()
