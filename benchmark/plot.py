"""Learning curves of `benchmark/results/` beside the published ones.

    pip install matplotlib==3.11.2 && python benchmark/plot.py

Reads benchmark/results/SETTING/ENV/SEED.csv (each an `evaluations.csv`), writes benchmark/results/curves.png and .svg
and prints a Markdown table. Ours: mean over the seeds of the mean evaluation return, and their range. Published: mean
over 10 seeds of the 2048-wide CrossQ and its 70 % interval, and SAC's band, from benchmark/published/.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe-Ito: colour-blind safe


def read_table(path: Path) -> list[dict]:
    """Rows of a CSV file as dictionaries; lines that start with # are comments."""
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def seed_curve(path: Path) -> dict[int, float]:
    """One run's evaluations.csv -> {step: mean return over that evaluation's episodes}."""
    returns = defaultdict(list)
    for row in read_table(path):
        returns[int(row["step"])].append(float(row["return"]))
    return {step: float(np.mean(values)) for step, values in returns.items()}


def results() -> dict[str, dict[str, list[dict[int, float]]]]:
    """{setting: {environment: [a curve per seed]}}"""
    table = defaultdict(lambda: defaultdict(list))
    for path in sorted((HERE / "results").glob("[!_]*/*/*.csv")):  # _ablations is no learning curve
        table[path.parent.parent.name][path.parent.name].append(seed_curve(path))
    return table


def main() -> None:
    ours = results()
    published = read_table(HERE / "published" / "crossq_gym_lowstep.csv")
    gates = read_table(HERE / "published" / "gate_bootstrap.csv")
    envs = sorted({env for by_env in ours.values() for env in by_env})
    figure, axes = plt.subplots(1, len(envs), figsize=(5 * len(envs), 4.2), squeeze=False)
    for axis, env in zip(axes[0], envs):
        last = max(max(curve) for by_env in ours.values() for curve in by_env.get(env, []))
        rows = [r for r in published if r["env"] == env and int(r["env_step"]) <= last]
        x = [int(r["env_step"]) / 1000 for r in rows]
        axis.plot(
            x, [float(r["mean"]) for r in rows], "--", color="0.35", label="CrossQ, 2048 wide, published (10 seeds)"
        )
        low, high = ([float(r[q]) for r in rows] for q in ("q15", "q85"))
        axis.fill_between(x, low, high, color="0.35", alpha=0.15, linewidth=0)
        sac = [r for r in gates if r["env"] == env and r["alg"] == "SAC(utd1)" and int(r["env_step"]) <= last]
        x, mean, low, high = (np.array([float(r[k]) for r in sac]) for k in ("env_step", "mean", "m3_q05", "m3_q95"))
        label = "SAC, published: 5 to 95 % of means of 3 seeds"
        axis.errorbar(x / 1000, mean, (mean - low, high - mean), fmt="none", ecolor="0.35", capsize=4, label=label)
        for colour, (setting, by_env) in zip(COLOURS, sorted(ours.items())):
            curves = by_env.get(env, [])
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            values = np.array([[curve[s] for s in steps] for curve in curves])
            x = np.array(steps) / 1000
            seeds = " to ".join(map(str, sorted({len(c) for c in by_env.values()})))
            axis.plot(x, values.mean(0), color=colour, label=f"{setting}, this project ({seeds} seeds)")
            axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=env, xlabel="environment steps (thousands)", xlim=(0, 1.02 * last / 1000))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("evaluation return")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    for suffix in ("png", "svg"):
        figure.savefig(HERE / "results" / f"curves.{suffix}", dpi=150)

    print("| task | step | setting | mean of the seeds | seeds | published CrossQ, 2048 wide | published SAC |")
    print("|---|---|---|---|---|---|---|")
    for setting, by_env in sorted(ours.items()):
        for env, curves in sorted(by_env.items()):
            bands = {
                (r["alg"], int(r["env_step"])): f"{r['m3_q05']} to {r['m3_q95']}" for r in gates if r["env"] == env
            }
            for step in (20_000, 50_000, 100_000):
                if all(step in curve for curve in curves):
                    values = [curve[step] for curve in curves]
                    seeds = ", ".join(f"{v:.0f}" for v in values)
                    bounds = " | ".join(bands.get((alg, step), "") for alg in ("CrossQ(utd1)", "SAC(utd1)"))
                    print(f"| {env} | {step:,} | {setting} | {np.mean(values):.0f} | {seeds} | {bounds} |")


if __name__ == "__main__":
    main()
