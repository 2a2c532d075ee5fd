"""Draw learning curves beside the published ones, and print tables, from evaluations.csv files.

    pip install matplotlib==3.11.2 scipy==1.17.1
    python benchmark/plot.py                            # benchmark/results/SETTING/ENV/SEED.csv
    python benchmark/plot.py --results benchmark/results/_figure5   # six panels: CrossQ, figure 5
    python benchmark/plot.py --runs runs --out figures  # runs/NAME/{evaluations.csv,args.json}
    python benchmark/plot.py --runs runs --x both       # over updates, and over hours: figure 6
    python benchmark/plot.py --runs runs --over critic-width        # or utd: a scaling figure

Each figure is a PNG and an SVG. `curves` has a panel per environment; with --x both it has two and
is called `efficiency`. `aggregate` has a panel per suite: means of return / 1000 (DMC) or success
(MyoSuite). `panels` has the Q-bias, weight norm and effective learning rate, if probe.py has left a
probe.csv: in a run's folder, as SETTING/ENV/SEED.probe.csv, or as _FOLDER/NAME/probe.csv. `over`
has the returns at some steps over a flag that is a number. Under --results the number is in the
setting's name, as in -utd5 and -w512. The table is Markdown.

Runs are told apart by their program and by the flags that differ between runs of one environment.
A score is the mean return of an evaluation's episodes, or their success rate if every evaluation
has one. A curve has the steps that all its seeds have. The IQM is the mean without the lowest and
the highest quarter, both rounded down: with fewer than four seeds it is the mean. The interval is a
percentile bootstrap over the seeds, in aggregates stratified by environment. With three seeds it
covers less than its name says. CrossQ's paper shows 70 %, CrossQ + WN's 90 %.

In the table and in `over`, a value is the mean of a seed's evaluations within 5 % of the step, and
at least within 2000 steps, as the published values are. For SAC it is 8400 steps, because its
published evaluations are rare. Below step 20 000 both shrink with the step.
"""

import argparse
import csv
import dataclasses
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "plot"  # the same SVG every time
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

HERE = Path(__file__).resolve().parent
# Those of Okabe and Ito, which the colour-blind can tell apart too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES = ["-", "-.", (0, (8, 2))]  # of settings 1 to 6, 7 to 12, 13 to 18
# Entries of args.json that do not change what is learnt by a step, unless rates fall in a run.
HOUSEKEEPING = """env_id seed total_timesteps device compile eval_every eval_episodes
    checkpoint_minutes run_name resume track torch gymnasium numpy command""".split()
# The order of CrossQ's figure 5. Other environments follow by name.
FIGURE_5 = "Hopper-v4 Walker2d-v4 Ant-v4 HalfCheetah-v4 Humanoid-v4 HumanoidStandup-v4"
SUITES = {"dm_control": "return / 1000", "myo": "success rate"}  # with their aggregates' labels
DIAGNOSTICS = {  # quantity: axis label
    "q_bias/mean": "Q-bias: mean",
    "q_bias/std": "Q-bias: standard deviation",
    "weight_norm": "critic's weight norm, sum over layers",
    "effective_lr": "critic's effective lr, mean over layers",
}
AXES = {
    "steps": "environment steps",
    "updates": "gradient steps of the critic",
    "hours": "wall-clock hours",
}
# File in published/, whose first lines name its source, algorithm (None: the file has one alone),
# columns of the band, label (none: in the table only), line. N is the number of seeds, 3 or 5.
# Those of rivals.csv are shown only beside runs of their program.
PUBLISHED = [
    ("crossq_gym_lowstep.csv", None, "q15 q85", "CrossQ, 2048 wide; band: 70 % of 10 seeds", "--"),
    ("gate_bootstrap.csv", "CrossQ(utd1)", "mN_q05 mN_q95", "", ""),
    ("gate_bootstrap.csv", "SAC(utd1)", "mN_q05 mN_q95", "SAC; band: 90 % of N-seed means", ":"),
    ("bro_official.csv", "BRO(utd10)", "", "BRO, UTD 10", (0, (4, 1, 1, 1))),
    ("simba_repos.csv", "SimBa(utd2)", "", "SimBa, UTD 2", (0, (1, 3))),
    ("simba_repos.csv", "SAC(utd1)", "", "SAC, UTD 1", (0, (1, 1))),
    ("rivals.csv", "REDQ(utd20)", "min max", "REDQ, UTD 20; band: its 10 seeds", (0, (5, 1))),
    ("rivals.csv", "DroQ(utd20)", "min max", "DroQ, UTD 20; band: its 10 seeds", (0, (3, 2))),
    ("rivals.csv", "TD3(gym v1)", "min max", "TD3 on gym's -v1; band: its 10 seeds", "-."),
    ("rivals.csv", "BRO(utd10)", "min max", "BRO, UTD 10; band: its seeds", (0, (4, 1, 1, 1))),
    ("rivals.csv", "BRO(utd2)", "min max", "BRO (Fast), UTD 2; band: its seeds", (0, (3, 1))),
    ("rivals.csv", "XQC(utd2)", "", "XQC, UTD 2", (0, (2, 1, 1, 1))),
    ("rivals.csv", "SR-SAC(utd32)", "", "SR-SAC, UTD 32, action repeat 1", (0, (6, 1, 1, 1, 1, 1))),
]
MARKERS = dict(zip((alg for _, alg, *_ in PUBLISHED), "o.sD^sPXdDpv*"))  # of single points
OVER_STEPS = [20_000, 30_000, 50_000, 100_000, 300_000, 1_000_000]  # of --over


@dataclasses.dataclass
class Run:
    setting: str
    env: str  # as in a folder's name: _ for a slash
    seed: str
    curves: dict[str, dict[int, float]]  # {quantity: {environment step: value}}
    x: dict[str, dict[int, float]]  # {x-axis: {environment step: place on it}}
    args: dict = dataclasses.field(default_factory=dict)  # of a run under --runs


@dataclasses.dataclass
class Curve:
    """Steps [T], their places [T] on each x-axis, and the values [seeds, T] of each environment."""

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


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file as dictionaries. Lines that start with # are comments."""
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_evaluations(path: Path) -> dict[str, dict[int, float]]:
    """{"return": {step: mean over the episodes}}; "success" too if every episode has one."""
    rows, curves = read_table(path), {}
    for name in ("return", "success"):
        if all(row[name] for row in rows):
            values = defaultdict(list)
            for row in rows:
                values[int(row["step"])].append(float(row[name]))
            curves[name] = {step: float(np.mean(v)) for step, v in values.items()}
    return curves


def read_probe(path: Path) -> dict[str, dict[int, float]]:
    """{quantity: {step: value}} for those of DIAGNOSTICS; nothing if there is no such file."""
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
        if not path.name.endswith(".probe.csv"):
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
    paths = [path.parent for path in sorted(folder.glob("*/evaluations.csv"))]
    all_args = {path: json.loads((path / "args.json").read_text()) for path in paths}
    programs = {path: program_of(args["command"]) for path, args in all_args.items()}
    runs = {}
    for path, args in all_args.items():
        flags = differing([all_args[p] for p in paths if programs[p] == programs[path]])
        flags = [f"{flag.replace('_', '-')}={args[flag]}" for flag in flags if flag in args]
        env = args["env_id"].split(":")[-1].replace("/", "_")
        key = ", ".join([programs[path], *flags]), env, str(args["seed"])
        curves = read_evaluations(path / "evaluations.csv") | read_probe(path / "probe.csv")
        if key not in runs or max(curves["return"]) > max(runs[key].curves["return"]):
            x = {axis: places(path, args, curves["return"], axis) for axis in axes}
            runs[key] = Run(*key, curves, x, args)
    return list(runs.values())


def program_of(command: list[str]) -> str:
    """crossq_sac or "ablate crossq_sac", say. probe.py and actions.py only watch."""
    scripts = [Path(word).stem for word in command if word.endswith(".py")]
    return " ".join(script for script in scripts if script not in ("probe", "actions"))


def differing(all_args: list[dict]) -> list[str]:
    """The flags that differ between runs of one environment."""

    def differs(flag: str) -> bool:
        pairs = {(args["env_id"], json.dumps(args.get(flag))) for args in all_args}
        return len(pairs) > len({env for env, _ in pairs})

    flags = dict.fromkeys(flag for args in all_args for flag in args if flag not in HOUSEKEEPING)
    return [flag for flag in flags if differs(flag)]


def places(path: Path, args: dict, steps: list[int], axis: str) -> dict[int, float]:
    """{environment step: place on the x-axis}."""
    if axis == "hours":
        return hours(path)
    if axis == "steps":
        return {step: step for step in steps}
    begin = args["learning_starts"] * args["action_repeat"]
    rate = args["utd"] / args["action_repeat"]
    return {step: (step - begin) * rate for step in steps if step >= begin}


def hours(path: Path) -> dict[int, float]:
    """{environment step: hours until its evaluation}, without the pauses before a resume."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    out, before = {}, 0.0
    for file in sorted(path.glob("events.out.tfevents.*")):
        events = list(EventFileLoader(str(file)).Load())
        for event in events:
            if any(value.tag == "eval/return" for value in event.summary.value):
                out[event.step] = (before + event.wall_time - events[0].wall_time) / 3600
        before += events[-1].wall_time - events[0].wall_time
    return out


def published(envs: list[str], last: int, options, settings=()) -> list[tuple]:
    """Panel.published, up to the last step: each algorithm that has all envs and, if it is one of
    rivals.csv, its program among the settings. Of several environments, the value is the mean of
    their normalised ones. If a file has no IQM, it is the mean over the seeds."""
    out = []
    programs = {re.split("[-+,]", setting)[0] for setting in settings}
    for file, alg, band, label, line in PUBLISHED:
        program = str(alg).partition("(")[0].lower().replace("-", "_")
        if file == "rivals.csv" and program not in programs:
            continue
        rows, tasks = read_table(HERE / "published" / file), []
        names = [options.statistic if options.statistic in rows[0] else "mean"]
        names += band.replace("N", str(options.n_seeds)).split()
        for env in envs:
            mine = [r for r in rows if (r["env"], r.get("alg")) == (name_of(env), alg)]
            tasks.append({int(r["env_step"]): tuple(float(r[x]) for x in names) for r in mine})
        steps = sorted(step for step in set.intersection(*map(set, tasks)) if step <= last)
        values = {step: tasks[0][step] for step in steps}
        if len(envs) > 1:
            label = label.split("; band")[0]
            for s in steps:
                scores = [normalised(env, task[s][0]) for env, task in zip(envs, tasks)]
                values[s] = (np.mean(scores),)
        label = f"published: {label.replace('N', str(options.n_seeds))}" if label else ""
        out += [(alg, label, line, values)] if values else []
    return out


def name_of(env: str) -> str:
    """What an environment is called in published/: dm_control_ball_in_cup-catch-v0 is
    ball-in-cup-catch, and myoHandPoseRandom-v0 is myo-pose-hard."""
    if match := re.fullmatch(r"myoHand(\w+)(Fixed|Random)-v0", env):
        task = re.sub("([A-Z])", r"-\1", match[1]).lower()
        return f"myo{task}" + "-hard" * (match[2] == "Random")
    return env.removeprefix("dm_control_").removesuffix("-v0").replace("_", "-")


def estimate(samples: list[np.ndarray], options) -> np.ndarray:
    """Mean or IQM over all seeds of all environments, and its stratified bootstrap interval.

    `samples` has an array [seeds, ...] per environment. Returns [3, ...]: value, low and high. With
    one seed these two are NaN."""
    cut = 0.25 if options.statistic == "iqm" else 0

    def pooled(*parts, axis):
        return stats.trim_mean(np.concatenate(parts, axis), cut, axis)

    value = pooled(*samples, axis=0)
    if min(map(len, samples)) < 2:
        return np.stack([value, value * np.nan, value * np.nan])
    how = {"n_resamples": 2000, "confidence_level": options.interval / 100, "method": "percentile"}
    interval = stats.bootstrap(samples, pooled, axis=0, rng=0, **how).confidence_interval
    return np.stack([value, interval.low, interval.high])


def common(runs: list[Run], quantity: str) -> Curve:
    """The steps that all seeds have, and nothing else."""
    there = [set(run.curves.get(quantity, {})).intersection(*run.x.values()) for run in runs]
    steps = sorted(set.intersection(*there))
    x = {a: np.mean([[run.x[a][s] for s in steps] for run in runs], 0) for a in runs[0].x}
    values = np.array([[run.curves[quantity][step] for step in steps] for run in runs])
    return Curve(steps, x, [values])


def around(setting: str, curve: Curve, step: int) -> np.ndarray:
    """[seeds]: the means of the evaluations around a step, as the published values: see the top."""
    least = (8400 if re.match(r"(ablate |sbx-)?sac", setting) else 2000) * min(1, step / 20_000)
    near = np.abs(np.array(curve.steps) - step) <= max(least, 0.05 * step)
    return curve.values[0][:, near].mean(1)


def normalised(env: str, values):
    return values / 1000 if env.startswith("dm_control") else values


def merged(envs: list[str], curves: list[Curve]) -> Curve:
    """One setting's normalised curves in several environments, at the steps they share."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    columns = [[curve.steps.index(step) for step in steps] for curve in curves]
    pairs = list(zip(curves, columns))
    x = {axis: np.mean([c.x[axis][at] for c, at in pairs], 0) for axis in curves[0].x}
    values = [normalised(env, c.values[0][:, at]) for env, (c, at) in zip(envs, pairs)]
    return Curve(steps, x, values)


def group(runs) -> dict[str, dict[str, list[Run]]]:
    """{environment: {setting: runs}}, sorted."""

    def order(run: Run) -> tuple:
        place = FIGURE_5.find(run.env) % 1000  # not found, -1, comes last
        return place, run.env, natural(run.setting), natural(run.seed)

    groups = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=order):
        groups[run.env][run.setting].append(run)
    return groups


def curves_of(settings: dict[str, list[Run]], quantity: str) -> dict[str, Curve]:
    curves = {setting: common(runs, quantity) for setting, runs in settings.items()}
    return {setting: curve for setting, curve in curves.items() if curve.steps}


def curve_panels(runs: list[Run], options) -> list[Panel]:
    """A panel per environment. It shows success if every run has it, and otherwise return."""
    panels = []
    for env, settings in group(run for run in runs if "return" in run.curves).items():
        success = all("success" in run.curves for runs in settings.values() for run in runs)
        curves = curves_of(settings, "success" if success else "return")
        # Published curves begin at 6000 steps, and are to be seen beside a shorter run.
        last = max([10_000, *(curve.steps[-1] for curve in curves.values())])
        ylabel = "success rate" if success else "evaluation return"
        theirs = published([env], last, options, curves)
        panels.append(Panel(env, ylabel, "linear", curves, theirs))
    return panels


def aggregate_panels(panels: list[Panel], options) -> list[Panel]:
    """A panel per suite, of the settings that have all its environments."""
    out = []
    for suite, ylabel in SUITES.items():
        members = {panel.title: panel.curves for panel in panels if panel.title.startswith(suite)}
        envs, names = list(members), set.intersection(*map(set, members.values() or [()]))
        if names and len(envs) > 1:
            names = sorted(names, key=natural)
            curves = {name: merged(envs, [members[env][name] for env in envs]) for name in names}
            curves = {name: curve for name, curve in curves.items() if curve.steps}
            last = max((curve.steps[-1] for curve in curves.values()), default=0)
            theirs = published(envs, last, options, curves)
            out.append(Panel(f"{suite}: {len(envs)} tasks", ylabel, "linear", curves, theirs))
    return out


def diagnostic_panels(runs: list[Run]) -> list[Panel]:
    """A panel per quantity and environment, of the runs that have a probe.csv."""
    panels = []
    for env, settings in group(r for r in runs if DIAGNOSTICS.keys() & r.curves.keys()).items():
        for quantity, label in DIAGNOSTICS.items():
            if curves := curves_of(settings, quantity):
                values = np.concatenate([curve.values[0].ravel() for curve in curves.values()])
                scale = "log" if 0 < 20 * values.min() < values.max() else "linear"  # one diverges
                panels.append(Panel(env, label, scale, curves, []))
    return panels


def draw(panels: list[Panel], columns: int, styles: dict[str, dict], options, path: Path) -> None:
    """Writes path.png and path.svg: the panels, each over options.axes, with one legend."""
    over = [(panel, axis) for panel in panels for axis in options.axes]
    columns = 2 if options.x == "both" else columns
    rows = -(-len(over) // columns)
    size = max(4.6 * columns, 7), 3.4 * rows + 1.4
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(over) :]:
        axis.remove()
    entries = {}
    for axis, (panel, x) in zip(axes.flat, over):
        for setting, curve in panel.curves.items():
            value, low, high = estimate(curve.values, options)
            style, at = styles[setting], curve.x[x]
            marker = "" if len(at) > 1 else "o"
            seeds = ", ".join(str(n) for n in sorted({len(values) for values in curve.values}))
            label = f"{setting} (seeds: {seeds})"
            (entries[label],) = axis.plot(at, value, marker=marker, **style)
            axis.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
        for alg, label, line, values in panel.published if x == "steps" else ():
            if label:
                value, *band = np.array(list(values.values())).T
                style = {"linestyle": line, "color": "0.3"}
                style |= {"marker": MARKERS[alg]} if len(values) == 1 else {}
                (entries[label],) = axis.plot(values.keys(), value, **style)
                if band:
                    axis.fill_between(values.keys(), *band, color="0.3", alpha=0.12, linewidth=0)
        axis.set(title=panel.title, xlabel=AXES[x], ylabel=panel.ylabel)
        axis.set(yscale=panel.scale, xlim=(0, None))
        if x != "steps":
            axis.set_xscale("log", nonpositive="mask")  # an evaluation may be at update 0
            axis.autoscale(axis="x")
        axis.xaxis.set_major_formatter("{x:g}" if x == "hours" else EngFormatter(sep=""))  # 100k

    save(figure, {name: entries[name] for name in sorted(entries, key=natural)}, options, path)


def save(figure, entries: dict, options, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{options.statistic} and {options.interval} % bootstrap interval over the seeds"
    how = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "title_fontsize": 9}
    how |= {"title": title.replace("iqm", "IQM"), "ncols": 1 + (len(entries) > 6)}
    figure.legend(entries.values(), entries.keys(), **how)
    figure.savefig(f"{path}.png", dpi=150)
    figure.savefig(f"{path}.svg", metadata={"Date": None})
    plt.close(figure)


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


def draw_over(flag: str, runs: list[Run], options, path: Path) -> None:
    """Writes path.png and path.svg: a panel per environment, with a line per setting and step. Over
    the critic's width, the published CrossQ stands beside it."""
    lines = defaultdict(lambda: defaultdict(list))  # {environment: {(step, label): points}}
    for env, settings in group(run for run in runs if "return" in run.curves).items():
        for setting, members in settings.items():
            rest, value = split_off(flag, members[0])
            curve = common(members, "return")
            for step in OVER_STEPS if value is not None else ():
                if step in curve.steps:
                    score = estimate([around(setting, curve, step)], options)
                    lines[env][step, rest].append((value, *score))
    if not lines:
        sys.exit(f"error: --over {flag}: no run has a number there and a step of {OVER_STEPS}")
    size = max(4.6 * len(lines), 8.5), 5
    figure, axes = plt.subplots(1, len(lines), figsize=size, squeeze=False, layout="constrained")
    entries = {}
    for axis, (env, at) in zip(axes.flat, lines.items()):
        ticks = sorted({point[0] for points in at.values() for point in points})
        steps = sorted({step for step, _ in at})
        for alg, label, _, values in published([env], steps[-1], options):
            for step in set(steps) & set(values) if (flag, alg) == ("critic-width", None) else ():
                at[step, label.replace(", 2048 wide", "")] = [(2048 * 1.2, *values[step])]
        markers = dict(zip(sorted({label for _, label in at}, key=natural), "osv^D<>ph*" * 9))
        for step, label in sorted(at, key=lambda key: (key[0], natural(key[1]))):
            x, value, low, high = np.array(at[step, label]).T
            i = OVER_STEPS.index(step)
            x = x * 1.03**i  # or the intervals of two steps would hide each other
            style = {"color": COLOURS[i], "marker": markers[label], "capsize": 3}
            bars = value - low, high - value
            entries[f"{label}, {step:,} steps"] = axis.errorbar(x, value, bars, **style)
        axis.set(title=env, xlabel=flag, ylabel="evaluation return")
        axis.set_xscale("log" if ticks[0] > 0 else "linear")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    save(figure, entries, options, path)


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"


def score_table(panels: list[Panel], options) -> str:
    """Markdown: each setting's mean around 20, 50 and 100 thousand steps and around its last step,
    beside what is published. --seeds adds each seed in brackets."""

    def cell(setting: str, curve: Curve | None, step: int) -> str:
        if curve is None or step not in curve.steps:
            return ""
        values = around(setting, curve, step)
        each = f" ({', '.join(map(number, values))})" if options.seeds else ""
        return number(values.mean()) + each

    settings = dict.fromkeys(setting for panel in panels for setting in panel.curves)
    theirs = dict.fromkeys(alg for panel in panels for alg, *_ in panel.published if alg)
    means = argparse.Namespace(statistic="mean", n_seeds=options.n_seeds)
    rows = [["task", "steps", *settings, *(f"published {alg}" for alg in theirs)]]
    rows.append(["---"] * len(rows[0]))
    for panel in panels:
        ends = [curve.steps[-1] for curve in panel.curves.values()] or [0]
        at = {alg: v for alg, *_, v in published([panel.title], max(ends), means, settings)}
        for step in sorted({20_000, 50_000, 100_000, *ends}):
            ours = [cell(setting, panel.curves.get(setting), step) for setting in settings]
            beside = [at.get(alg, {}).get(step, ()) for alg in theirs]
            beside = [" to ".join(map(number, values[1:] or values)) for values in beside]
            rows += [[panel.title, f"{step:,}", *ours, *beside]] if any(ours) else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "results", help="default: benchmark/results")
    add("--runs", type=Path, help="a folder of runs' folders, in place of --results")
    add("--out", type=Path, help="of the figures; default: the folder that is read")
    add("--statistic", choices=["iqm", "mean"], default="iqm", help="of the figures")
    add("--interval", type=int, choices=[70, 90, 95], default=90, help="percent; default: 90")
    add("--x", choices=["steps", "both"], default="steps", help="both: only with --runs")
    add("--over", metavar="FLAG", help="a flag of the scripts, without --")
    add("--seeds", action="store_true", help="print each seed's value in the table")
    options = parser.parse_args(argv)
    if options.x == "both" and not options.runs:
        parser.error("--x both needs --runs: results have neither updates nor hours")
    options.axes = ["steps"] if options.x == "steps" else ["updates", "hours"]
    folder = options.runs or options.results
    runs = load_runs(folder, options.axes) if options.runs else load_results(folder)
    counts = [len(members) for settings in group(runs).values() for members in settings.values()]
    options.n_seeds = 5 if max(counts, default=0) >= 5 else 3  # there are ranges for these two
    curves = curve_panels(runs, options)
    if not curves:
        sys.exit(f"error: no evaluations in {folder}")
    aggregates, diagnostics = aggregate_panels(curves, options), diagnostic_panels(runs)
    settings = dict.fromkeys(s for panel in curves + diagnostics for s in panel.curves)
    styles = {}
    for i, setting in enumerate(settings):
        styles[setting] = {"color": COLOURS[i % 6], "linestyle": LINES[i // 6 % 3]}
    out = options.out or folder
    out.mkdir(parents=True, exist_ok=True)
    name = "efficiency" if options.x == "both" else "curves"
    draw(curves, min(3, len(curves)), styles, options, out / name)
    if aggregates:
        draw(aggregates, len(aggregates), styles, options, out / "aggregate")
    if diagnostics:
        draw(diagnostics, 2, styles, options, out / "panels")
    if options.over:
        draw_over(options.over.replace("_", "-"), runs, options, out / "over")
    print(score_table(curves, options))
    text = "Published CrossQ and SAC: nine of ten means over"
    print(f"\nMeans over the seeds. {text} {options.n_seeds} of their ten seeds are in the range.")


if __name__ == "__main__":
    main()
