"""benchmark/plot.py: its statistics against values by hand, and figures and table of small runs."""

import argparse
import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402

RATE = 100  # of the fixtures: return = RATE * step / 1000 + 10 * seed


def options(statistic="iqm", interval=90, n_seeds=5):
    return argparse.Namespace(statistic=statistic, interval=interval, n_seeds=n_seeds)


def write_evaluations(path, seed, last, every=5000, success="", rate=RATE):
    """Two episodes per evaluation, 1 above and 1 below the rate."""
    lines = ["step,episode,return,length,success"]
    for step in range(every, last + 1, every):
        for episode in range(2):
            value = rate * step / 1000 + 10 * seed + 2 * episode - 1
            lines.append(f"{step},{episode},{value},1000,{success}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))


def write_run(folder, env_id, seed, command="crossq_sac.py", last=20_000, success="", **flags):
    write_evaluations(folder / "evaluations.csv", seed, last, success=success)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": last, "run_name": folder.name}
    args |= {"utd": 1, "learning_starts": 5000, "action_repeat": 1, "torch": f"2.{seed}"} | flags
    args["command"] = [*command.split(), "--env-id", env_id]
    (folder / "args.json").write_text(json.dumps(args))


def write_probe(path, rates=(0.25, 0.75)):
    rows = [(step, f"critic/{k}/weight_norm", 3) for step in (5000, 10_000) for k in (0, 1)]
    rows += [(5000, f"critic/{k}/effective_lr", v) for k, v in enumerate(rates)]
    rows += [(5000, "q_bias/mean", -0.5), (10_000, "q_bias/mean", 7), (5000, "q_bias/std", 0.1)]
    rows += [(10_000, "q_bias/mean", 0.125), (5000, "actor/0/weight_norm", 99)]  # after a resume
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{step},{quantity},{value}\n" for step, quantity, value in rows))


def table_rows(text, start=""):
    """The cells of the printed rows that begin in this way."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot.main draws, by file name. To write them would take seconds for each."""
    figures = {}

    def savefig(self, path, **_):
        figures[path.split("/")[-1]] = self

    monkeypatch.setattr(plot.plt.Figure, "savefig", savefig)
    return figures


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("numbers", "mean", "iqm"), [
    ([9, 1, 2, 0], 3, 1.5),  # without 0 and 9
    ([0, 1, 2, 3, 4, 5, 6, 70], 11.375, 3.5),  # the middle four
    ([0, 1, 2, 3, 100], 21.2, 2),  # a quarter of five, rounded down: one at each end
    ([0, 3, 9], 4, 4),  # of three nothing is cut
])  # fmt: skip
def test_mean_and_iqm(numbers, mean, iqm):
    samples = [np.array(numbers, dtype=float)]
    assert plot.estimate(samples, options("mean"))[0] == mean
    assert plot.estimate(samples, options("iqm"))[0] == iqm
    parts = [samples[0][:2], samples[0][2:]]  # over all runs, not per task
    assert plot.estimate(parts, options("iqm"))[0] == iqm


def test_interval_of_two_seeds_is_known():
    """The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    seeds = np.array([[0.0, 0.0], [1.0, 10.0]])  # [seeds, steps]
    assert plot.estimate([seeds], options("mean")).tolist() == [[0.5, 5], [0, 0], [1, 10]]
    fixed = np.array([4.0, 4.0])  # stratified: never drawn for the other task
    assert plot.estimate([seeds[:, 0], fixed], options("mean")).tolist() == [2.25, 2, 2.5]
    value, low, high = plot.estimate([np.array([7.0])], options())
    assert value == 7 and math.isnan(low) and math.isnan(high)  # one seed has no interval


@pytest.mark.parametrize("level", [70, 90])
def test_interval_covers(level):
    """Of 20 normal seeds, the mean's interval holds the true mean about as often as it says."""
    samples = np.random.default_rng(0).standard_normal((20, 300))  # 300 experiments at once
    _, low, high = plot.estimate([samples], options("mean", level))
    assert abs(np.mean((low < 0) & (high > 0)) - level / 100) < 0.07


@pytest.mark.parametrize(("setting", "step", "expected"), [
    ("crossq", 50_000, 50_000),  # within 2500 steps
    ("crossq", 100_000, 97_500),  # within 5000
    ("sac", 10_000, 10_000),  # within 4200
    ("sac", 50_000, (45_000 + 50_000) / 3),  # within 8400, and the evaluation at 55 000 is 0
])  # fmt: skip
def test_values_around_a_step(setting, step, expected):
    steps = np.arange(5, 105, 5) * 1000
    values = steps[None] * np.array([[1.0], [2.0]])
    values[:, steps == 55_000] = 0
    curve = plot.Curve(list(steps), {}, [values])
    assert plot.around(setting, curve, step).tolist() == pytest.approx([expected, 2 * expected])


def test_only_steps_of_all_seeds_are_averaged():
    """One seed has not ended and one has another grid. A mean is never over fewer seeds."""
    grids = [range(5000, 40_001, 5000), range(10_000, 40_001, 10_000), range(5000, 30_001, 5000)]
    runs = []
    for i, grid in enumerate(grids):
        curves = {"return": dict.fromkeys(grid, i)}
        runs.append(plot.Run("s", "e", str(i), curves, {"steps": {step: step for step in grid}}))
    curve = plot.common(runs, "return")
    assert curve.steps == [10_000, 20_000, 30_000]
    assert curve.values[0].tolist() == [[0] * 3, [1] * 3, [2] * 3]


def test_published_names_and_ranges():
    assert plot.name_of("dm_control_finger-turn_hard-v0") == "finger-turn-hard"
    assert plot.name_of("myoHandKeyTurnFixed-v0") == "myo-key-turn"

    def theirs(env, *settings, **how):
        return {alg: v for alg, *_, v in plot.published([env], 50_000, options(**how), settings)}

    cheetah = theirs("HalfCheetah-v4", "redq-w2048", "crossq_sac")
    assert set(cheetah) == {None, "CrossQ(utd1)", "SAC(utd1)", "REDQ(utd20)"}  # REDQ beside redq
    assert cheetah["REDQ(utd20)"][20_000] == (3488, 1149, 5323)
    assert cheetah["CrossQ(utd1)"][50_000] == (6446, 6002, 6848)
    assert theirs("HalfCheetah-v4", n_seeds=3)["CrossQ(utd1)"][50_000] == (6446, 5875, 6964)
    assert max(cheetah[None]) == 50_000
    assert set(theirs("Hopper-v4", "crossq_td3")) == {None, "CrossQ(utd1)", "SAC(utd1)"}
    assert set(theirs("Hopper-v4", "td3")) > {"TD3(gym v1)"}
    assert {"SimBa(utd2)", "SAC(utd1)"} == set(theirs("dm_control_dog-run-v0"))


def test_figure_5(tmp_path, capsys, drawn):
    """Six panels in the paper's order, with both published curves where there are any, and the
    table with the ranges of means of three seeds. One seed has not ended."""
    for env in plot.FIGURE_5.split():
        for seed in (1, 2, 3):
            path = tmp_path / "crossq_sac-w512" / env / f"{seed}.csv"
            write_evaluations(path, seed, 40_000 if (env, seed) == ("Ant-v4", 3) else 100_000)
    write_evaluations(tmp_path / "sac_baseline" / "Hopper-v4" / "1.csv", 1, 100_000, rate=10)
    plot.main(["--results", str(tmp_path), "--seeds", "--statistic", "mean"])
    axes = drawn["curves.png"].axes
    assert [axis.get_title() for axis in axes] == plot.FIGURE_5.split()
    assert [len(axis.lines) for axis in axes] == [4, 3, 3, 3, 3, 1]
    assert axes[0].lines[0].get_ydata()[:2].tolist() == [520, 1020]
    assert axes[2].lines[0].get_xdata()[-1] == 40_000  # where the shortest seed ends
    labels = ["crossq_sac-w512 (seeds: 3)", "sac_baseline (seeds: 1)"]
    assert labels_of(drawn["curves.png"])[:2] == labels
    assert labels_of(drawn["curves.png"])[3] == "published: SAC; band: 90 % of 3-seed means"
    assert set(drawn) == {"curves.png", "curves.svg"}
    out = capsys.readouterr().out
    head = "task, steps, crossq_sac-w512, sac_baseline, published CrossQ(utd1), published SAC(utd1)"
    assert table_rows(out, "task") == [head.split(", ")]
    ours = "2020 (2010, 2020, 2030)", "210 (210)"
    cells = ["Hopper-v4", "20,000", *ours, "601 to 1598", "151 to 312"]
    assert table_rows(out, "Hopper")[0] == cells
    assert [row[1] for row in table_rows(out, "Ant")] == ["20,000", "40,000"]
    cells = table_rows(out, "Walker2d")[2][2:4]
    assert cells == ["9770 (9760, 9770, 9780)", ""]  # 95, 100 thousand


def test_suites(tmp_path, capsys, drawn):
    """Success if every run has it. An aggregate has the settings that all its tasks have. What is
    published as a mean is a mean in the table, whatever the figures show."""
    for task, success in (("ReachFixed", 1), ("PoseRandom", 0)):
        write_run(tmp_path / task, f"myosuite:myoHand{task}-v0", 1, last=100_000, success=success)
    write_run(tmp_path / "a", "shimmy:dm_control/cheetah-run-v0", 1, last=100_000)
    plot.main(["--runs", str(tmp_path)])
    cheetah, pose, reach = drawn["curves.png"].axes
    assert cheetah.get_title() == "dm_control_cheetah-run-v0"
    assert (cheetah.get_ylabel(), reach.get_ylabel()) == ("evaluation return", "success rate")
    assert (pose.lines[0].get_ydata() == 0).all() and (reach.lines[0].get_ydata() == 1).all()
    (aggregate,) = drawn["aggregate.png"].axes
    assert aggregate.get_title() == "myo: 2 tasks"
    assert aggregate.lines[0].get_ydata().tolist() == [0.5] * 20
    row = table_rows(capsys.readouterr().out, "dm_control_cheetah-run-v0 | 50,000")
    assert row == [["dm_control_cheetah-run-v0", "50,000", "5010", "", "429", ""]]
    assert plot.normalised("dm_control_walker-walk-v0", 250) == 0.25


def test_runs_are_told_apart_by_program_and_differing_flags(tmp_path, drawn):
    for seed in (1, 2):
        for utd in (1, 10):
            write_run(tmp_path / f"sac{seed}{utd}", "Hopper-v4", seed, utd=utd)
        command = "benchmark/ablate.py crossq_sac.py --critic-norm ln"
        write_run(tmp_path / f"ln{seed}", "Hopper-v4", seed, command, critic_norm="ln")
        write_run(tmp_path / f"td3{seed}", "Hopper-v4", seed, "probe.py crossq_td3.py", gamma=0.99)
    write_run(tmp_path / "walker", "Walker2d-v4", 1, "/x/crossq_td3.py", gamma=0.9)
    write_run(tmp_path / "again", "Hopper-v4", 2, "crossq_td3.py", last=10_000, gamma=0.99)
    plot.main(["--runs", str(tmp_path)])
    ours = "ablate crossq_sac (seeds: 2)", "crossq_sac, utd=1 (seeds: 2)"
    ours += "crossq_sac, utd=10 (seeds: 2)", "crossq_td3 (seeds: 1)", "crossq_td3 (seeds: 2)"
    assert labels_of(drawn["curves.png"])[:5] == [*ours]
    lines = drawn["curves.png"].axes[0].lines
    assert lines[3].get_xdata()[-1] == 20_000  # of what is there twice, the longer counts


def test_efficiency_is_over_updates_and_over_hours(tmp_path, drawn, monkeypatch):
    for utd, repeat in ((1, 1), (20, 2)):
        name = f"utd{utd}"
        write_run(tmp_path / name, "Hopper-v4", 1, utd=utd, action_repeat=repeat)
    monkeypatch.setattr(
        plot, "hours", lambda path: {s: s / 1000 for s in range(5000, 20_001, 5000)}
    )
    plot.main(["--runs", str(tmp_path), "--x", "both"])
    updates, hours = drawn["efficiency.png"].axes
    assert (updates.get_xlabel(), hours.get_xlabel()) == (plot.AXES["updates"], plot.AXES["hours"])
    one, twenty = (line.get_data() for line in updates.lines)
    assert one[0].tolist() == [0, 5000, 10_000, 15_000]
    assert twenty[0].tolist() == [0, 50_000, 100_000]  # of 5000 agent steps
    assert hours.lines[1].get_xdata().tolist() == [10, 15, 20]
    assert twenty[1].tolist() == [1010, 1510, 2010]


def test_hours_leave_pauses_out(tmp_path):
    """Two parts: one of 2 h and, after a long pause, one that repeats the evaluation at 10 000."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    first, second = {5000: 7200, 10_000: 10_800}, {10_000: 361_800, 15_000: 363_600}
    for start, evaluations in ((3600, first), (360_000, second)):
        with open(tmp_path / f"events.out.tfevents.{start:010d}.host", "wb") as file:
            writer = RecordWriter(file)
            writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
            for step, time in evaluations.items():
                summary = Summary(value=[Summary.Value(tag="eval/return", simple_value=0.0)])
                event = Event(wall_time=time, step=step, summary=summary)
                writer.write(event.SerializeToString())
    assert plot.hours(tmp_path) == {5000: 1, 10_000: 2.5, 15_000: 3}


def test_probes(tmp_path, drawn):
    write_evaluations(tmp_path / "crossq" / "Hopper-v4" / "1.csv", 1, 10_000)
    write_probe(tmp_path / "crossq" / "Hopper-v4" / "1.probe.csv")
    write_probe(tmp_path / "_ablations" / "tanh" / "probe.csv", rates=())
    plot.main(["--results", str(tmp_path)])
    panels = drawn["panels.png"].axes
    assert [axis.get_title() for axis in panels] == ["Hopper-v4"] * 4 + ["ablations"] * 3
    values = [axis.lines[0].get_ydata().tolist() for axis in panels]
    assert values == ([[-0.5, 0.125], [0.1], [6, 6], [0.5]] * 2)[:-1]


def points_of(axis):
    """Of each line with error bars: the flag's values and the scores."""
    return [tuple(map(list, line.get_data())) for line, *_ in axis.containers]


def test_scores_over_the_width(tmp_path, drawn):
    """Widths are in the names. Only 256 has run for 30 000 steps. -medium is another setting, and
    one without a width has no place."""
    settings = ("crossq-w256", 30_000, 100), ("crossq-w512", 20_000, 200)
    for setting, last, rate in (*settings, ("crossq-w2048-medium", 20_000, 300), ("x", 9, 1)):
        for seed in (1, 2):
            path = tmp_path / setting / "HalfCheetah-v4" / f"{seed}.csv"
            write_evaluations(path, seed, last, rate=rate)
    plot.main(["--results", str(tmp_path), "--over", "critic-width"])
    (axis,) = drawn["over.png"].axes
    assert axis.get_xticks().tolist() == [256, 512, 2048] and axis.get_xscale() == "log"
    at_20, medium, published, at_30, _ = points_of(axis)
    assert at_20 == ([256, 512], [2015, 4015]) and medium == ([2048], [6015])
    assert published == ([2048 * 1.2], [3860.2])
    assert at_30 == ([256 * 1.03], [3015])  # the steps stand side by side
    interval = axis.containers[0][2][0].get_segments()[0]
    assert interval.tolist() == [[256, 2010], [256, 2020]]  # of two seeds, their range


def test_runs_over_a_flag_and_real_files(tmp_path):
    for utd in (1, 5):
        write_run(tmp_path / f"utd{utd}", "Hopper-v4", 1, utd=utd)
    runs = plot.load_runs(tmp_path, ["steps"])
    assert [plot.split_off("utd", run) for run in runs] == [("crossq_sac", 1), ("crossq_sac", 5)]
    plot.main(["--runs", str(tmp_path), "--over", "utd", "--out", str(tmp_path / "a" / "b")])
    for name in ("curves", "over"):
        png = plot.plt.imread(tmp_path / "a" / "b" / f"{name}.png")  # reads every pixel
        assert png.shape[0] > 300 and png.std() > 0.01
        assert (tmp_path / "a" / "b" / f"{name}.svg").read_text().endswith("</svg>\n")
    for wrong in (["--runs", str(tmp_path), "--over", "env-id"], ["--x", "both"]):
        with pytest.raises(SystemExit, match="no run has a number there|^2$"):
            plot.main(wrong)
