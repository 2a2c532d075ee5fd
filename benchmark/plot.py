"""Learning curves, aggregates, diagnostics and tables from `evaluations.csv` files, beside the
published curves.

    pip install matplotlib==3.11.2 scipy==1.17.1
    python benchmark/plot.py                             # benchmark/results/SETTING/ENV/SEED.csv
    python benchmark/plot.py --runs runs --out figures  # runs/NAME/{evaluations.csv,args.json}

Writes, as PNG and SVG, curves (a panel per environment), aggregate (a panel per suite of which two
environments are there) and panels (Q-bias, weight norm, effective learning rate; where probe.py has
left probe.csv files: in a run's folder, in results/ as SETTING/ENV/SEED.probe.csv or
_FOLDER/NAME/probe.csv). Prints Markdown tables.

The script of a run under --runs is the one in its name, if that has a script's default form
ENV__SCRIPT__SEED__TIME or run.sh's ENV__SCRIPT+FLAGS__SEED, else the one that its checkpoint.pt
names. Runs of one script and FLAGS are told apart by the flags in args.json that differ, machine
and logging aside.

Score: the mean return of an evaluation's episodes, or the success rate where every evaluation has
one. Seeds are averaged only at steps that all of them have, so a curve ends where the shortest
ends. IQM: the mean without the lowest and the highest quarter, rounded down: of fewer than four
seeds the mean. Interval: percentile bootstrap over the seeds, in aggregates stratified by
environment; with three seeds it covers less than its name says. The papers: IQM and 70 % (CrossQ),
IQM and 90 % (CrossQ + WN). Aggregates: return / 1000 (DMC), success (MyoSuite), (return - random) /
(TD3 - random) (MuJoCo). --x hours (from the TensorBoard events, pauses before a resume left out)
and updates (of the critic) place a point at the mean over its seeds.
"""

import argparse
import csv
import dataclasses
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

try:
    import matplotlib
    import numpy as np
    from scipy import stats
except ImportError as e:
    print(
        f"plot.py: error: {e}; this needs: pip install matplotlib==3.11.2 scipy==1.17.1",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "plot"  # the same SVG every time
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

HERE = Path(__file__).resolve().parent
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe-Ito: for the colour-blind too
LINES = ["-", "-.", (0, (8, 2))]  # of settings 1 to 6, 7 to 12, 13 to 18
HOUSEKEEPING = """env_id seed total_timesteps device run_name eval_every eval_episodes
    checkpoint_every resume evaluate
    capture_video track compile""".split()  # flags that do not change what is learnt by a step
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
SOURCE = "SimbaV2's repository"
# File in published/, algorithm (None: no such column), band, label, line (none: table only).
PUBLISHED = [
    (
        "crossq_gym_lowstep.csv",
        None,
        "q15 q85",
        f"CrossQ, 2048 wide ({SOURCE}); band: 70 % of the 10 seeds",
        "--",
    ),
    ("gate_bootstrap.csv", "CrossQ(utd1)", "m5_q05 m5_q95", "", ""),
    (
        "gate_bootstrap.csv",
        "SAC(utd1)",
        "m5_q05 m5_q95",
        f"SAC, mean ({SOURCE}); band: 90 % of means of 5 seeds",
        ":",
    ),
    ("bro_official.csv", "BRO(utd10)", "", "BRO, UTD 10 (its repository)", (0, (4, 1, 1, 1))),
    ("simba_repos.csv", "SimBa(utd2)", "", f"SimBa, UTD 2 ({SOURCE})", (0, (1, 3))),
    ("simba_repos.csv", "SAC(utd1)", "", f"SAC, UTD 1 ({SOURCE})", (0, (1, 1))),
]
MARKERS = {
    None: "o",
    "SAC(utd1)": "s",
    "BRO(utd10)": "D",
    "SimBa(utd2)": "^",
}  # where one has a single point
WINDOW = 16_666  # environment steps over which the published steps to a return were smoothed


@dataclasses.dataclass
class Run:
    setting: str
    env: str  # as in a folder's name: _ for slash and colon
    seed: str
    curves: dict[str, dict[int, float]]  # {quantity: {environment step: value}}
    x: dict[int, float]  # {environment step: place on the x-axis}


@dataclasses.dataclass
class Curve:
    """Of one setting: the evaluated steps [T], their places x [T], and values [seeds, T] of each
    environment."""

    steps: list[int]
    x: np.ndarray
    values: list[np.ndarray]


@dataclasses.dataclass
class Panel:
    title: str
    ylabel: str
    scale: str
    curves: dict[str, Curve]  # by setting
    published: list[
        tuple
    ]  # algorithm, label, line, {environment step: (value,) or (value, low, high)}


def natural(name: str) -> list:
    """Sorting key: utd 2 before utd 10, the published last."""
    return [
        name.startswith("published"),
        *(int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)),
    ]


def note(message: str) -> None:
    print(f"plot.py: {message}", file=sys.stderr)


def fail(message: str) -> None:
    note(f"error: {message}")
    raise SystemExit(2)


# Reading


def read_table(path: Path) -> list[dict]:
    """Rows of a CSV file as dictionaries; lines that start with # are comments."""
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_evaluations(path: Path) -> dict[str, dict[int, float]]:
    """evaluations.csv -> {"return": {step: mean over the episodes}}, and "success" where every
    episode has one."""
    rows, curves = read_table(path), {}
    for name in ("return", "success"):
        if all(row[name] for row in rows):
            values = defaultdict(list)
            for row in rows:
                values[int(row["step"])].append(float(row[name]))
            curves[name] = {step: float(np.mean(v)) for step, v in values.items()}
    return curves


def read_probe(path: Path) -> dict[str, dict[int, float]]:
    """probe.csv -> the quantities of DIAGNOSTICS, {quantity: {step: value}}; nothing if there is no
    such file."""
    values, curves = defaultdict(dict), defaultdict(dict)
    for step, quantity, value in csv.reader(open(path)) if path.exists() else ():
        values[int(step)][quantity] = float(value)  # after a resume, a step's last row counts
    for step, at in values.items():
        for name, combine in (("weight_norm", np.sum), ("effective_lr", np.mean)):
            layers = [
                v for quantity, v in at.items() if re.fullmatch(rf"critic/\d+/{name}", quantity)
            ]
            at |= {name: float(combine(layers))} if layers else {}  # none before the first update
        for name in DIAGNOSTICS.keys() & at.keys():
            curves[name][step] = at[name]
    return dict(curves)


def load_results(folder: Path) -> list[Run]:
    """SETTING/ENV/SEED.csv, and probe.csv of _FOLDER/NAME/, which are no learning curves."""
    runs = []
    for path in sorted(
        p for p in folder.glob("[!_]*/*/*.csv") if not p.name.endswith(".probe.csv")
    ):
        curves = read_evaluations(path) | read_probe(path.with_suffix(".probe.csv"))
        runs.append(Run(path.parts[-3], path.parts[-2], path.stem, curves, {}))
    for path in sorted(folder.glob("_*/*/probe.csv")):
        runs.append(Run(path.parts[-2], path.parts[-3].strip("_"), "", read_probe(path), {}))
    for run in runs:
        run.x = {step: step for curve in run.curves.values() for step in curve}
    return runs


def load_runs(folder: Path, x: str) -> list[Run]:
    """NAME/{evaluations.csv,args.json[,probe.csv]}; of one setting, environment and seed only the
    longest run."""
    paths = [
        path.parent
        for path in sorted(folder.glob("*/args.json"))
        if (path.parent / "evaluations.csv").exists()
    ]
    all_args, runs = (
        {path: json.loads((path / "args.json").read_text())["args"] for path in paths},
        {},
    )
    scripts = {path: script_of(path) for path in paths}  # with the flags in its name
    shared = set.intersection(*(set(script[1:]) for script in scripts.values())) if paths else set()
    for path, args in all_args.items():
        flags = differing([all_args[p] for p in paths if scripts[p] == scripts[path]])
        flags = [f"{flag.replace('_', '-')}={args[flag]}" for flag in flags if flag in args]
        setting = ", ".join(
            [scripts[path][0], *(flag for flag in scripts[path][1:] if flag not in shared), *flags]
        )
        curves = read_evaluations(path / "evaluations.csv") | read_probe(path / "probe.csv")
        run = Run(setting, re.sub(r"[/\\:]", "_", args["env_id"]), str(args["seed"]), curves, {})
        done, key = curves["return"], (run.setting, run.env, run.seed)
        if not done or key in runs:
            note(
                f"{path}: "
                + (
                    "no evaluation yet"
                    if not done
                    else f"{key} is there twice; only the longer counts"
                )
            )
        if done and (key not in runs or max(done) > max(runs[key].curves["return"])):
            run.x = hours(path) if x == "hours" else {step: step for step in done}
            if x == "updates":
                run.x = {
                    step: (step / args["action_repeat"] - args["learning_starts"]) * args["utd"]
                    for step in done
                }
                run.x = {step: n for step, n in run.x.items() if n >= 0}
            runs[key] = run
    return list(runs.values())


def script_of(path: Path) -> list[str]:
    """The script of a run's folder, and the flags in its name; see the top."""
    if match := re.fullmatch(
        r".+?__(?:ablate_)?([a-zA-Z]\w*?(?:\+.+?)?)__\d+(?:__\d+)?", path.name
    ):
        return match[1].split("+")
    if not (path / "checkpoint.pt").exists():
        fail(f"{path}: of which script? Call it ENV__SCRIPT__SEED__TIME, or leave its checkpoint")
    import torch  # only here: it takes seconds

    checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    return [checkpoint["program"].removeprefix("ablate_")]


def differing(all_args: list[dict]) -> list[str]:
    """Flags that differ between runs; action_repeat and gamma within an environment, on which their
    defaults depend."""

    def differs(flag: str) -> bool:
        key = "env_id" if flag in {"action_repeat", "gamma"} else None
        values = {(args.get(key), json.dumps(args.get(flag))) for args in all_args}
        return len(values) > len({env for env, _ in values})

    flags = dict.fromkeys(flag for args in all_args for flag in args if flag not in HOUSEKEEPING)
    return [flag for flag in flags if differs(flag)]


def hours(path: Path) -> dict[int, float]:
    """{environment step: hours of running until its evaluation was written}, over all parts of a
    resumed run."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    out, before = {}, 0.0
    for file in sorted(path.glob("events.out.tfevents.*")):
        events = list(EventFileLoader(str(file)).Load())
        for event in events:
            if any(value.tag == "eval/return" for value in event.summary.value):
                out[event.step] = (before + event.wall_time - events[0].wall_time) / 3600
        before += events[-1].wall_time - events[0].wall_time
    return out or fail(
        f"--x hours is not available: {path} has no TensorBoard events of eval/return"
    )


def published(envs: list[str], last: int, statistic: str) -> list[tuple]:
    """Of each published algorithm that has all envs: name, label, line, {step <= last: (value, low,
    high) or (value,)}.

    Of several environments, the mean of their normalised values. The mean over seeds where a file
    has no IQM.
    """
    out = []
    for file, alg, band, label, line in PUBLISHED:
        tasks = []
        for env in envs:
            rows = [
                r
                for r in read_table(HERE / "published" / file)
                if (r["env"], r.get("alg")) == (name_of(env), alg)
            ]
            names = [statistic if rows and statistic in rows[0] else "mean", *band.split()]
            tasks.append(
                {int(r["env_step"]): tuple(float(r[name]) for name in names) for r in rows}
            )
        steps = sorted(step for step in set.intersection(*map(set, tasks)) if step <= last)
        values = {step: tasks[0][step] for step in steps}
        if len(envs) > 1:
            label = label.split("; band")[0] + ", mean of the tasks"
            values = {
                s: (np.mean([normalised(env, task[s][0]) for env, task in zip(envs, tasks)]),)
                for s in steps
            }
        out += [(alg, f"published: {label}", line, values)] if values else []
    return out


def name_of(env: str) -> str:
    """Published names: dm_control_ball_in_cup-catch-v0 -> ball-in-cup-catch, myoHandPoseRandom-v0
    -> myo-pose-hard."""
    if match := re.fullmatch(r"myoHand(\w+)(Fixed|Random)-v0", env):
        return (
            "myo" + re.sub("([A-Z])", r"-\1", match[1]).lower() + "-hard" * (match[2] == "Random")
        )
    return env.removeprefix("dm_control_").removesuffix("-v0").replace("_", "-")


# Statistics


def estimate(samples: list[np.ndarray], statistic: str, level: int) -> np.ndarray:
    """Mean or IQM over all seeds of all environments, and its stratified bootstrap interval.

    samples: an array [seeds, ...] per environment. Returns [3, ...]: value, low, high; of one seed
    no interval, NaN.
    """

    def pooled(*parts, axis):
        return stats.trim_mean(np.concatenate(parts, axis), 0.25 if statistic == "iqm" else 0, axis)

    value = pooled(*samples, axis=0)
    if min(map(len, samples)) < 2:
        return np.stack([value, value * np.nan, value * np.nan])
    options = {
        "n_resamples": 2000,
        "confidence_level": level / 100,
        "method": "percentile",
        "rng": 0,
    }
    interval = stats.bootstrap(samples, pooled, axis=0, **options).confidence_interval
    return np.stack([value, interval.low, interval.high])


def common(runs: list[Run], quantity: str) -> Curve:
    """The steps that all seeds have, and nothing else."""
    steps = sorted(
        set.intersection(*(run.curves.get(quantity, {}).keys() & run.x.keys() for run in runs))
    )
    x = np.array([np.mean([run.x[step] for run in runs]) for step in steps])
    return Curve(
        steps, x, [np.array([[run.curves[quantity][step] for step in steps] for run in runs])]
    )


def suite_of(env: str) -> str | None:
    return {"dm_": "DMC", "myo": "MyoSuite"}.get(env[:3], "MuJoCo" if env in RANDOM_TD3 else None)


def normalised(env: str, values):
    low, high = {"DMC": (0, 1000), "MyoSuite": (0, 1)}.get(suite_of(env)) or RANDOM_TD3[env]
    return (values - low) / (high - low)


def merged(envs: list[str], curves: list[Curve]) -> Curve:
    """One setting's curves in several environments, normalised, at the steps that all of them
    have."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    columns = [[curve.steps.index(step) for step in steps] for curve in curves]
    values = [
        normalised(env, curve.values[0][:, c]) for env, curve, c in zip(envs, curves, columns)
    ]
    return Curve(steps, np.mean([curve.x[c] for curve, c in zip(curves, columns)], 0), values)


def steps_to(curve: Curve, threshold: float) -> np.ndarray:
    """[seeds]: first step at which the evaluations of the last WINDOW steps have a mean above
    threshold, else inf."""
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
    """A panel per environment: success where every run has it, else return."""
    panels = []
    for env, settings in group(run for run in runs if "return" in run.curves).items():
        success = all("success" in run.curves for runs in settings.values() for run in runs)
        curves = {
            setting: common(runs, "success" if success else "return")
            for setting, runs in settings.items()
        }
        for setting, curve in curves.items():
            ends = sorted({max(run.curves["return"], default=0) for run in settings[setting]})
            if curve.steps[-1:] != ends[-1:]:
                note(f"{setting}, {env}: seeds end at {ends}, in common {curve.steps[-1:]}")
        curves = {setting: curve for setting, curve in curves.items() if curve.steps}
        last = max(
            [10_000, *(curve.steps[-1] for curve in curves.values())]
        )  # published curves begin at 6000 steps
        ylabel = "success rate" if success else "evaluation return"
        panels.append(Panel(env, ylabel, "linear", curves, published([env], last, statistic)))
    return panels


def aggregate_panels(panels: list[Panel], statistic: str) -> list[Panel]:
    """A panel per suite, over the environments that all settings have, so that settings compare; a
    setting with one environment alone is left out."""
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
            out.append(Panel(title, ylabel, "linear", curves, published(envs, last, statistic)))
    return out


def diagnostic_panels(runs: list[Run]) -> list[Panel]:
    """A panel per quantity and environment, of the runs that have a probe.csv."""
    panels = []
    for env, settings in group(
        run for run in runs if DIAGNOSTICS.keys() & run.curves.keys()
    ).items():
        for quantity, label in DIAGNOSTICS.items():
            curves = {setting: common(runs, quantity) for setting, runs in settings.items()}
            curves = {setting: curve for setting, curve in curves.items() if curve.steps}
            values = np.concatenate([curve.values[0].ravel() for curve in curves.values()] or [[0]])
            scale = (
                "log" if 0 < 20 * values.min() < values.max() else "linear"
            )  # a critic that diverges
            scale = "symlog" if values.min() < 0 and abs(values).max() > 5 else scale
            panels.append(Panel(env, label, scale, curves, []))
    return panels


def draw(panels: list[Panel], columns: int, styles: dict[str, dict], args, path: Path) -> None:
    """Writes path.png and path.svg: the panels, below them one legend; its title says what line and
    band are."""
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(4.6 * columns, 7), 3.4 * rows + 1.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    counts, entries = defaultdict(set), {}
    points = {
        label for panel in panels for _, label, _, values in panel.published if len(values) == 1
    }
    for axis, panel in zip(axes.flat, panels):
        for setting, curve in panel.curves.items():
            value, low, high = estimate(curve.values, args.statistic, args.interval)
            entries[setting] = axis.plot(
                curve.x, value, marker="o"[len(curve.x) > 1 :], **styles[setting]
            )[0]
            axis.fill_between(
                curve.x, low, high, color=styles[setting]["color"], alpha=0.2, linewidth=0
            )
            counts[setting] |= set(map(len, curve.values))
        for alg, label, line, values in panel.published if args.x == "steps" else ():
            if line:
                value, *band = np.array(list(values.values())).T
                style = {"marker": MARKERS[alg], "markevery": [-1]} if label in points else {}
                entries[label] = axis.plot(
                    values.keys(), value, linestyle=line, color="0.3", **style
                )[0]
                if band:
                    axis.fill_between(values.keys(), *band, color="0.3", alpha=0.12, linewidth=0)
        axis.set(
            title=panel.title,
            xlabel=AXES[args.x],
            ylabel=panel.ylabel,
            yscale=panel.scale,
            xlim=(0, None),
        )
        if args.x != "hours":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    entries = {label: entries[label] for label in sorted(entries, key=natural)}
    labels = [
        f"{label} ({seeds(counts[label])})" if label in counts else label for label in entries
    ]
    title = caption(args) + ", stratified by task" * any(
        len(c.values) > 1 for p in panels for c in p.curves.values()
    )
    options = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "title_fontsize": 9}
    figure.legend(entries.values(), labels, title=title, ncols=1 + (len(labels) > 6), **options)
    for suffix in ("png", "svg"):
        figure.savefig(
            f"{path}.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None
        )
    plt.close(figure)


def caption(args) -> str:
    statistic = args.statistic.upper().replace("MEAN", "Mean")
    return f"{statistic} and {args.interval} % bootstrap interval over the seeds"


def seeds(counts: set[int]) -> str:
    return (
        f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seed{'s' * (counts != {1})}"
    )


# Tables


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"


def around(setting: str, curve: Curve, step: int) -> list[np.ndarray]:
    """[seeds] of each environment: the means of the evaluations around a step, as the published
    values are: within 5 % of it or 2000 steps, of SAC, which was evaluated less often, 8400."""
    near = np.abs(np.array(curve.steps) - step) <= max(
        8400 if setting.startswith("sac") else 2000, 0.05 * step
    )
    return [values[:, near].mean(1) for values in curve.values]


def score_table(panels: list[Panel], args) -> list[str]:
    """Markdown: scores around 20, 50 and 100 thousand steps and the last, where there is an
    evaluation."""
    beside = "published; a range: 5 to 95 % of the means of 5 seeds drawn from 10"
    out = [
        f"| task | steps | setting | {caption(args)} | each seed | {beside} |",
        "|---|---|---|---|---|---|",
    ]
    for panel in panels:
        for setting, curve in panel.curves.items():
            for step in sorted({20_000, 50_000, 100_000, *curve.steps[-1:]} & set(curve.steps)):
                samples = around(setting, curve, step)
                value, low, high = map(number, estimate(samples, args.statistic, args.interval))
                each = ", ".join(map(number, samples[0])) if len(samples) == 1 else ""
                beside = [(alg, at[step]) for alg, *_, at in panel.published if alg and step in at]
                beside = ", ".join(
                    f"{alg} {' to '.join(map(number, v[1:] or v))}" for alg, v in beside
                )
                interval = "" if low == "nan" else f" [{low}, {high}]"
                out.append(
                    f"| {panel.title} | {step:,} | {setting} | {value}{interval} | {each} "
                    f"| {beside} |"
                )
    return out


def threshold_table(panels: list[Panel]) -> list[str]:
    """Markdown: median steps to the returns of published/steps_to_threshold.csv, and how many seeds
    got there."""

    def cell(median: float, reached: int, n: int, last: int) -> str:
        return f"{f'{median:,.0f}' if np.isfinite(median) else f'> {last:,}'} ({reached} of {n})"

    table = defaultdict(dict)  # {(environment, return): {column: text}}
    curves_of = {panel.title: panel.curves for panel in panels}
    for row in read_table(HERE / "published" / "steps_to_threshold.csv"):
        at = table[row["env"], int(row["threshold"])]
        for setting, curve in curves_of.get(row["env"], {}).items():
            first = steps_to(curve, int(row["threshold"]))
            at[setting] = cell(
                np.median(first), np.isfinite(first).sum(), len(first), curve.steps[-1]
            )
        at[f"published {row['alg']}"] = cell(
            float(row["median_steps"]), row["n_reached"], row["n_seeds"], 1_000_000
        )
    table = {key: at for key, at in table.items() if key[0] in curves_of}
    columns = sorted({column for at in table.values() for column in at}, key=natural)
    out = ["| task | return | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    out += [
        f"| {env} | {r:,} | " + " | ".join(at.get(c, "") for c in columns) + " |"
        for (env, r), at in table.items()
    ]
    return out if table else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--results", type=Path, default=HERE / "results", help="default: benchmark/results"
    )
    source.add_argument("--runs", type=Path, help="a folder of runs' folders")
    parser.add_argument(
        "--out", type=Path, help="where the figures go; default: into the folder read"
    )
    parser.add_argument("--statistic", choices=["iqm", "mean"], default="iqm")
    parser.add_argument(
        "--interval", type=int, choices=[70, 90, 95], default=90, help="percent; default: 90"
    )
    parser.add_argument(
        "--x", choices=AXES, default="steps", help="hours and updates: only with --runs"
    )
    args = parser.parse_args(argv)
    if args.x != "steps" and not args.runs:
        fail(f"--x {args.x} is not available: {args.results} has only evaluations; use --runs")
    runs = load_runs(args.runs, args.x) if args.runs else load_results(args.results)
    curves = curve_panels(runs, args.statistic)
    aggregates, diagnostics = aggregate_panels(curves, args.statistic), diagnostic_panels(runs)
    if not curves:
        fail(f"no evaluations in {args.runs or args.results}")
    settings = dict.fromkeys(s for panel in curves + diagnostics for s in panel.curves)
    styles = {
        s: {"color": COLOURS[i % 6], "linestyle": LINES[i // 6 % 3]} for i, s in enumerate(settings)
    }
    out = args.out or args.runs or args.results
    out.mkdir(parents=True, exist_ok=True)
    draw(curves, min(3, len(curves)), styles, args, out / "curves")
    if aggregates:
        draw(aggregates, len(aggregates), styles, args, out / "aggregate")
    if diagnostics:
        draw(diagnostics, 2, styles, args, out / "panels")
    print("\n".join([*score_table(curves + aggregates, args), "", *threshold_table(curves)]))


if __name__ == "__main__":
    main()
