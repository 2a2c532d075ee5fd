"""benchmark/plot.py: its statistics are compared with values by hand, and its tables and figures
are made from small fixtures."""

import csv
import dataclasses
import importlib
import json
import math
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402

RATE = 100  # of the fixtures: return = RATE * step / 1000 + 10 * seed
SCRIPTS = ["sac_baseline", "crossq_sac", "crossq_td3", "crossq_wn_highutd"]


def write_evaluations(path, seed, last, every=5000, success=None, rate=RATE):
    """Writes two episodes per evaluation, 1 above and 1 below the rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("step", "episode", "return", "length", "success"))
        for step in range(every, last + 1, every):
            for episode in range(2):
                value = rate * step / 1000 + 10 * seed + 2 * episode - 1
                table.writerow((step, episode, value, 1000, "" if success is None else success))


def write_run(folder, env_id, seed, last=20_000, every=5000, success=None, **flags):
    write_evaluations(folder / "evaluations.csv", seed, last, every, success)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": last, "run_name": folder.name}
    args |= {"utd": 1, "learning_starts": 5000, "action_repeat": 1, "gamma": 0.99} | flags
    (folder / "args.json").write_text(json.dumps({"args": args}))


def write_probe(path, steps=(5000, 10_000)):
    rows = [(step, f"critic/{k}/weight_norm", 3) for step in steps for k in (0, 1)]
    rows += [(s, f"critic/{k}/effective_lr", v) for s in steps for k, v in enumerate((0.25, 0.75))]
    rows += [(s, q, v) for s in steps for q, v in (("q_bias/mean", -0.5), ("q_bias/std", 0.1))]
    # A resume has measured the last step again.
    rows += [(steps[-1], "q_bias/mean", 0.125), (steps[-1], "actor/0/weight_norm", 99)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def table_rows(text, start):
    """The cells of the printed rows that begin in this way."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def svg_texts(path):
    """The texts of a figure. matplotlib draws letters as shapes, and leaves each text in a
    comment."""
    text = path.read_text()
    ElementTree.fromstring(text)  # well-formed
    return [line.strip()[5:-4] for line in text.splitlines() if line.strip().startswith("<!-- ")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot.main draws, as matplotlib objects, by file name. To write them would
    take seconds for each."""
    figures = {}

    def savefig(self, path, **_):
        figures[path.split("/")[-1]] = self

    monkeypatch.setattr(plot.plt.Figure, "savefig", savefig)
    return figures


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_iqm_and_mean_of_small_arrays():
    def value(numbers, statistic):
        return plot.estimate([np.array(numbers, dtype=float)], statistic, 90)[0]

    assert value([0, 1, 2, 9], "mean") == 3
    assert value([9, 1, 2, 0], "iqm") == 1.5  # without 0 and 9
    assert value([0, 1, 2, 3, 4, 5, 6, 70], "iqm") == 3.5  # the middle four
    assert value([0, 1, 2, 3, 100], "iqm") == 2  # a quarter of five, rounded down: one at each end
    assert value([0, 3, 9], "iqm") == 4  # of three nothing is cut
    two_tasks = [np.array([0.0, 1.0]), np.array([2.0, 9.0])]
    assert plot.estimate(two_tasks, "iqm", 90)[0] == 1.5  # over all runs, not per task


def test_interval_of_two_seeds_is_known():
    """The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    seeds = np.array([[0.0, 0.0], [1.0, 10.0]])  # [seeds, steps]
    assert plot.estimate([seeds], "mean", 90).tolist() == [[0.5, 5], [0, 0], [1, 10]]
    fixed = np.array([4.0, 4.0])  # stratified: never drawn for the other task
    value, low, high = plot.estimate([seeds[:, 0], fixed], "mean", 90)
    assert (value, low, high) == (2.25, 2, 2.5)


def test_interval_without_spread():
    assert plot.estimate([np.array([7.0, 7.0, 7.0])], "iqm", 95).tolist() == [7, 7, 7]
    value, low, high = plot.estimate([np.array([7.0])], "iqm", 95)
    assert value == 7 and math.isnan(low) and math.isnan(high)  # one seed has no interval
    value, low, _ = plot.estimate([np.array([7.0, 8.0]), np.array([1.0])], "iqm", 95)
    assert math.isnan(low) and not math.isnan(value)


@pytest.mark.parametrize("level", [70, 90])
def test_interval_covers(level):
    """Of 20 normal seeds, the mean's interval holds the true mean about as often as it says."""
    samples = np.random.default_rng(0).standard_normal((20, 300))  # 300 experiments at once
    _, low, high = plot.estimate([samples], "mean", level)
    assert abs(np.mean((low < 0) & (high > 0)) - level / 100) < 0.07


def test_values_around_a_step():
    """They are within 5 % or 2000 steps, and of SAC within 8400, as the published ones are."""
    steps = np.arange(5, 105, 5) * 1000
    curve = plot.Curve(list(steps), steps, [steps[None] * np.array([[1.0], [2.0]])])
    for setting, step, expected in (
        ("crossq", 50_000, 50_000),
        ("crossq", 100_000, 97_500),
        ("sac", 10_000, 10_000),
        ("sac", 50_000, 50_000),
        ("sac_baseline", 100_000, 97_500),
    ):
        assert plot.around(setting, curve, step)[0].tolist() == [expected, 2 * expected]
    curve.values[0][0, steps == 55_000] = 0
    assert plot.around("crossq", curve, 50_000)[0][0] == 50_000
    assert plot.around("sac", curve, 50_000)[0][0] == 95_000 / 3
    curve = plot.Curve([1000, 2000, 3000, 4000, 5000], {}, [np.arange(1, 6)[None] * 1000.0])
    assert plot.around("crossq", curve, 5000)[0][0] == 5000  # in a short run not nearly all of it
    assert plot.around("sac", curve, 5000)[0][0] == 4000


def test_steps_to_a_return():
    steps = list(range(5000, 45_000, 5000))
    # Trailing means of four: 100, 150, 200, 250, 350, 450, 550, 650.
    rising = np.arange(1, 9) * 100.0
    late, never = np.where(np.arange(8) == 7, 4000.0, 0.0), np.zeros(8)  # at the last step 4000 / 4
    curve = plot.Curve(steps, np.array(steps), [np.stack([rising, late, never])])
    assert plot.steps_to(curve, 300).tolist() == [25_000, 40_000, np.inf]
    assert plot.steps_to(curve, 250).tolist() == [25_000, 40_000, np.inf]  # above, not at
    assert plot.steps_to(curve, 1000).tolist() == [np.inf] * 3


def test_only_steps_of_all_seeds_are_averaged():
    """One seed has not ended and one has another grid. A mean is never over fewer seeds."""
    grids = [range(5000, 40_001, 5000), range(10_000, 40_001, 10_000), range(5000, 30_001, 5000)]
    runs = []
    for i, grid in enumerate(grids):
        curves = {"return": dict.fromkeys(grid, i)}
        runs.append(plot.Run("s", "e", str(i), curves, {"steps": {step: step for step in grid}}))
    curve = plot.common(runs, "return")
    assert curve.steps == [10_000, 20_000, 30_000] and curve.values[0].shape == (3, 3)
    assert curve.values[0].mean(0).tolist() == [1, 1, 1]


def test_normalisation_and_names():
    assert plot.normalised("HalfCheetah-v4", np.array([-289.415, 10574])).tolist() == [0, 1]
    assert plot.normalised("dm_control_walker-walk-v0", 250) == 0.25
    assert plot.normalised("myoHandReachFixed-v0", 0.25) == 0.25
    assert plot.suite_of("Pendulum-v1") is None
    assert plot.name_of("dm_control_finger-turn_hard-v0") == "finger-turn-hard"
    assert plot.name_of("myoHandKeyTurnFixed-v0") == "myo-key-turn"
    assert plot.published(["Hopper-v4"], 200_000, "iqm")
    for env in ("dm_control_dog-run-v0", "myoHandPenTwirlRandom-v0"):
        algorithms = {alg for alg, *_ in plot.published([env], 200_000, "iqm")}
        assert algorithms == {"BRO(utd10)", "SimBa(utd2)", "SAC(utd1)"}


def test_rivals_are_shown_beside_their_programs_alone(tmp_path, capsys):
    """Of rivals.csv, REDQ beside redq, and TD3 neither beside crossq_td3 nor beside nothing."""

    def rivals(*settings):
        theirs = plot.published(["HalfCheetah-v4"], 50_000, "iqm", settings)
        return {alg: values for alg, *_, values in theirs if alg not in (None, *gate)}

    gate = "CrossQ(utd1)", "SAC(utd1)"
    assert rivals() == rivals("crossq_td3-w256") == {}
    assert rivals("redq, critic-width=2048") == rivals("redq-w2048") != {}
    assert rivals("redq-w2048", "crossq_sac") == {
        "REDQ(utd20)": {20_000: (3488, 1149, 5323), 50_000: (6477, 5672, 7296)}
    }
    for env in ("dm_control_finger-turn_hard-v0", "dm_control_cheetah-run-v0"):
        theirs = {alg for alg, *_ in plot.published([env], 1_000_000, "iqm", ["sr_sac", "xqc"])}
        assert {"SR-SAC(utd32)", "XQC(utd2)"} <= theirs, env
    assert [*rivals("td3", "droq", "bro", "xqc")] == [
        "DroQ(utd20)",
        "TD3(gym v1)",
        "BRO(utd10)",
        "BRO(utd2)",
        "XQC(utd2)",
    ]
    write_evaluations(tmp_path / "td3" / "HalfCheetah-v4" / "1.csv", 1, 50_000)
    plot.main(["--results", str(tmp_path)])
    assert "TD3(gym v1) 1,578 to 4,586" in capsys.readouterr().out


def test_a_run_shorter_than_the_published_ones_has_them_in_view(tmp_path, drawn):
    write_evaluations(tmp_path / "crossq" / "HalfCheetah-v4" / "1.csv", 1, 5000, every=1000)
    plot.main(["--results", str(tmp_path)])
    ours, *theirs = drawn["curves.png"].axes[0].lines
    assert ours.get_xdata()[-1] == 5000 and theirs[0].get_xdata().tolist() == [6000, 8000, 10_000]


def test_a_published_curve_of_one_point_is_seen(tmp_path, drawn):
    """Up to 100 000 steps SAC has one point."""
    for env in ("dm_control_cheetah-run-v0", "dm_control_dog-run-v0"):
        write_evaluations(tmp_path / "crossq" / env / "1.csv", 1, 100_000)
    plot.main(["--results", str(tmp_path)])
    markers = [line.get_marker() for line in drawn["curves.png"].axes[0].lines]
    # Ours; BRO; SimBa, which has two points; SAC.
    assert sorted(markers) == ["", "D", "None", "s"]


def test_results_to_figures_and_tables(tmp_path, capsys, drawn):
    """The layout is that of benchmark/results, with probe files. One seed is unfinished."""
    for setting, rate in (("crossq", 200), ("sac", 100)):
        for env in ("HalfCheetah-v4", "Hopper-v4"):
            for seed in (1, 2, 3):
                last = 40_000 if (setting, env, seed) == ("sac", "Hopper-v4", 3) else 50_000
                write_evaluations(tmp_path / setting / env / f"{seed}.csv", seed, last, rate=rate)
    # This one is in no suite, and nothing is published about it.
    write_evaluations(tmp_path / "sac" / "Pendulum-v1" / "1.csv", 1, 50_000)
    write_probe(tmp_path / "crossq" / "Hopper-v4" / "1.probe.csv")
    (tmp_path / "_ablations" / "tanh").mkdir(parents=True)
    write_probe(tmp_path / "_ablations" / "tanh" / "probe.csv")
    plot.main(["--results", str(tmp_path), "--statistic", "mean"])
    axes = cheetah, hopper, pendulum = drawn["curves.png"].axes
    assert [axis.get_title() for axis in axes] == ["HalfCheetah-v4", "Hopper-v4", "Pendulum-v1"]
    assert [len(axis.lines) for axis in axes] == [4, 4, 1]  # of 4, two are published
    # The rate is 200, and the mean of the seeds 1, 2 and 3 is 2.
    assert cheetah.lines[0].get_ydata()[:2].tolist() == [1020, 2020]
    assert hopper.lines[1].get_xdata()[-1] == 40_000  # where the shortest seed ends
    assert pendulum.lines[0].get_ydata()[-1] == 5010
    labels = labels_of(drawn["curves.png"])
    assert {"crossq (3 seeds)", "sac (1 to 3 seeds)"} < set(labels)
    assert sum("published: " in label and "SimbaV2's repository" in label for label in labels) == 2
    (aggregate,) = drawn["aggregate.png"].axes
    assert aggregate.get_title() == "MuJoCo: 2 tasks" and len(aggregate.lines) == 4
    expected = ((10_020 + 289.415) / (10_574 + 289.415) + (10_020 - 18.791) / (3226 - 18.791)) / 2
    assert aggregate.lines[0].get_ydata()[-1] == pytest.approx(expected)
    panels = drawn["panels.png"].axes
    assert {axis.get_title() for axis in panels} == {"Hopper-v4", "ablations"} and len(panels) == 8
    lines = [axis.lines[0] for axis in panels if axis.get_title() == "Hopper-v4"]
    values = [line.get_ydata().tolist() for line in lines]
    assert values == [[-0.5, 0.125], [0.1, 0.1], [6, 6], [0.5, 0.5]]

    out, err = capsys.readouterr()
    rows = table_rows(out, "HalfCheetah-v4 | 20,000 | crossq")
    band = "CrossQ(utd1) 3,069 to 4,338, SAC(utd1) 298 to 820"
    score = "4,020 [4,013, 4,027]"
    assert rows == [
        ["HalfCheetah-v4", "20,000", "crossq", score, "4,010, 4,020, 4,030", band],
    ]
    # The mean of the evaluations at 45 000 and 50 000 steps.
    assert table_rows(out, "Pendulum-v1")[-1][1:5] == ["50,000", "sac", "4,760", "4,760"]
    steps, returns = "20,000 50,000 20,000 40,000".split(), "1,000 2,000 2,500 3,000".split()
    assert [row[1] for row in table_rows(out, "Hopper-v4")] == steps + returns
    assert "sac, Hopper-v4: seeds end at [40000, 50000], in common [40000]" in err
    # At s thousand steps the trailing mean is 200 (s - 7.5) + 10 seed: above 3000 from 25 on.
    reached = table_rows(out, "HalfCheetah-v4 | 3,000")
    assert reached[0][2:5] == ["25,000 (3 of 3)", "40,000 (3 of 3)", "27,000 (10 of 10)"]
    never = table_rows(out, "HalfCheetah-v4 | 8,000")
    assert never[0][2:5] == ["50,000 (3 of 3)", "> 50,000 (0 of 3)", "100,000 (10 of 10)"]


def test_figures_are_whole_files(tmp_path):
    for seed in (1, 2):
        write_evaluations(tmp_path / "sac" / "Hopper-v4" / f"{seed}.csv", seed, 20_000)
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "a" / "b")])
    png = plot.plt.imread(tmp_path / "a" / "b" / "curves.png")  # reads every pixel
    assert png.shape[0] > 300 and png.shape[1] > 300 and png.std() > 0.01
    texts = svg_texts(tmp_path / "a" / "b" / "curves.svg")
    caption = "IQM and 90 % bootstrap interval over the seeds"
    assert {"Hopper-v4", "sac (2 seeds)", caption, "20k"} <= set(texts)


def test_runs_are_grouped_by_script_and_differing_flags(tmp_path, capsys, drawn):
    cheetah, sac = "HalfCheetah-v4", {"tau": 0.005, "critic_lr": 1e-3}
    for seed in (1, 2):
        for utd in (1, 5):
            name = f"{cheetah}__crossq_wn_highutd__{seed}__17000000{utd}"
            write_run(tmp_path / name, cheetah, seed, utd=utd)
        write_run(tmp_path / f"{cheetah}__sac_baseline__{seed}__170", cheetah, seed, **sac)
    # One is there again, and one has just begun.
    write_run(tmp_path / f"{cheetah}__sac_baseline__2__171", cheetah, 2, last=10_000, **sac)
    write_run(tmp_path / f"{cheetah}__sac_baseline__3__172", cheetah, 3, last=0, **sac)
    # The defaults of another suite are no difference of setting.
    walker = tmp_path / "dm_control_walker-walk-v0__sac_baseline__1__1"
    others = {"action_repeat": 2, "gamma": 0.95, "critic_lr": 8e-4}
    write_run(walker, "dm_control/walker-walk-v0", 1, **sac | others)
    write_probe(tmp_path / f"{cheetah}__sac_baseline__1__170" / "probe.csv")
    plot.main(["--runs", str(tmp_path), "--x", "updates"])
    cheetah, walker = drawn["curves.png"].axes
    assert walker.get_title() == "dm_control_walker-walk-v0" and len(walker.lines) == 1
    assert [line.get_xdata().tolist() for line in cheetah.lines] == [
        [0, 5000, 10_000, 15_000],
        [0, 25_000, 50_000, 75_000],
        [0, 5000, 10_000, 15_000],
    ]
    # It has half as many agent steps as environment steps.
    assert walker.lines[0].get_xdata().tolist() == [0, 2500, 5000]
    assert labels_of(drawn["curves.png"]) == [
        "crossq_wn_highutd, utd=1 (2 seeds)",
        "crossq_wn_highutd, utd=5 (2 seeds)",
        "sac_baseline (1 to 2 seeds)",
    ]
    err = capsys.readouterr().err
    assert "__171" in err and "the longer counts" in err and "__172: no evaluation yet" in err
    # There is no aggregate, because no suite has two environments.
    assert set(drawn) == {"curves.png", "curves.svg", "panels.png", "panels.svg"}


def test_efficiency_is_over_updates_and_over_hours(tmp_path, drawn, monkeypatch):
    """Here a run of 20 updates per step takes 20 times the hours too, so the axes are
    logarithmic."""
    tasks = {"Hopper-v4": 20, "Swimmer-v4": 2, "Walker2d-v4": 3}
    for env, most in tasks.items():
        for utd in (1, most):
            write_run(tmp_path / f"{env}__crossq_sac__1__{utd}", env, 1, utd=utd)

    def hours(path):
        utd = int(path.name.split("__")[-1])
        return {step: step / 1000 * utd for step in range(5000, 20_001, 5000)}

    monkeypatch.setattr(plot, "hours", hours)
    plot.main(["--runs", str(tmp_path), "--x", "both"])
    assert {name for name in drawn if name.endswith("png")} == {"efficiency.png", "aggregate.png"}
    panels = drawn["efficiency.png"].axes
    assert [axis.get_title() for axis in panels] == [env for env in tasks for _ in range(2)]
    assert [axis.get_subplotspec().colspan.start for axis in panels] == [0, 1] * 3
    places = {"updates": [0, 5000, 10_000, 15_000], "hours": [5, 10, 15, 20]}
    for i, axis in enumerate(panels):
        x, factor = ["updates", "hours"][i % 2], tasks[axis.get_title()]
        one, more = axis.lines
        assert axis.get_xlabel() == plot.AXES[x]
        assert axis.get_xscale() == ("log" if factor == 20 else "linear")
        assert one.get_xdata().tolist() == places[x]
        assert more.get_xdata().tolist() == [factor * place for place in places[x]]
        assert one.get_ydata().tolist() == [510, 1010, 1510, 2010]
    both = [axis.lines[0].get_xdata().tolist() for axis in drawn["aggregate.png"].axes]
    assert both == list(places.values())  # of the setting that both MuJoCo tasks have


def test_flags_that_depend_on_the_suite_are_compared_within_it(tmp_path, drawn):
    for env, rate in (("Hopper-v4", 1e-3), ("Walker2d-v4", 3e-4), ("Pendulum-v1", 1e-4)):
        write_run(tmp_path / f"{env}__crossq_sac__1__1", env, 1, critic_lr=rate)
    plot.main(["--runs", str(tmp_path)])
    labels = [label for label in labels_of(drawn["curves.png"]) if label.startswith("crossq_sac")]
    assert labels == [f"crossq_sac, critic-lr={rate} (1 seed)" for rate in (1e-4, 3e-4, 1e-3)]
    assert "aggregate.png" not in drawn  # no setting has two environments


def test_a_flag_that_only_some_runs_have_is_a_difference(tmp_path, drawn):
    """The flags of ablate.py are not among those of a plain run, nor later ones among those of an
    old run."""
    write_run(tmp_path / "Hopper-v4__crossq_sac__1__1", "Hopper-v4", 1, brn_warmup=100_000)
    ablated = {"brn_warmup": 100_000, "critic_norm": "default"}
    write_run(tmp_path / "Hopper-v4__ablate_crossq_sac__1__1", "Hopper-v4", 1, **ablated)
    write_run(tmp_path / "Hopper-v4__crossq_sac__1__0", "Hopper-v4", 1)
    plot.main(["--runs", str(tmp_path)])
    labels = [label for label in labels_of(drawn["curves.png"]) if label.startswith("crossq_sac")]
    assert labels == [
        "crossq_sac (1 seed)",
        "crossq_sac, brn-warmup=100000 (1 seed)",
        "crossq_sac, brn-warmup=100000, critic-norm=default (1 seed)",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_named_here_are_those_of_the_scripts(script):
    args = importlib.import_module(script).Args
    names = {field.name for field in dataclasses.fields(args)}
    assert args.MAY_CHANGE <= set(plot.HOUSEKEEPING) <= names
    for env_id in ("dm_control/walker-walk-v0", "myoHandReachFixed-v0"):
        assert set(args.suite_defaults(env_id)) <= set(plot.BY_SUITE)


def test_success_where_every_run_has_it(tmp_path, drawn):
    for env, success in (("myoHandReachFixed-v0", 1), ("myoHandPoseRandom-v0", 0)):
        write_run(tmp_path / f"{env}__crossq_wn_highutd__1__1", env, 1, success=success)
    write_run(tmp_path / "Hopper-v4__crossq_wn_highutd__1__1", "Hopper-v4", 1)
    plot.main(["--runs", str(tmp_path)])
    by_title = {axis.get_title(): axis for axis in drawn["curves.png"].axes}
    assert by_title["myoHandReachFixed-v0"].get_ylabel() == "success rate"
    assert by_title["myoHandReachFixed-v0"].lines[0].get_ydata().tolist() == [1] * 4
    assert by_title["Hopper-v4"].get_ylabel() == "evaluation return"
    assert drawn["aggregate.png"].axes[0].lines[0].get_ydata().tolist() == [0.5] * 4


def test_hours_leave_pauses_out(tmp_path):
    """There are two parts: one of 2 h and, after a long pause, one that repeats the evaluation at
    10 000 steps."""
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, second = {5000: 7200, 10_000: 10_800}, {10_000: 361_800, 15_000: 363_600}
    for start, evaluations in ((3600, first), (360_000, second)):
        with open(tmp_path / f"events.out.tfevents.{start:010d}.host", "wb") as file:
            writer = record_writer.RecordWriter(file)
            writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
            for step, time in evaluations.items():
                summary = Summary(value=[Summary.Value(tag="eval/return", simple_value=0.0)])
                event = Event(wall_time=time, step=step, summary=summary)
                writer.write(event.SerializeToString())
    assert plot.hours(tmp_path) == {5000: 1, 10_000: 2.5, 15_000: 3}


def test_script_comes_from_the_name_or_the_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    for name, script in (
        ("dm_control_walker-walk-v0__crossq_sac__12__1795249306", "crossq_sac"),
        ("Hopper-v4__ablate_crossq_sac__12__1795249306", "crossq_sac"),
        ("dm_control_dog-run-v0__crossq_td3+utd=2+gamma=1__1", "crossq_td3 utd=2 gamma=1"),
        ("Hopper-v4__ablate_crossq_sac+critic-norm=ln__10", "crossq_sac critic-norm=ln"),
    ):
        assert plot.script_of(tmp_path / name) == script.split()
    (tmp_path / "mine").mkdir()
    for program in ("crossq_td3", "ablate_crossq_td3"):
        checkpoint = {"program": program, "rows": torch.zeros(10)}
        torch.save(checkpoint, tmp_path / "mine/checkpoint.pt")
        assert plot.script_of(tmp_path / "mine") == ["crossq_td3"]


def test_runs_of_a_script_are_read(tmp_path, run_script, drawn, capsys):
    """Two of them have names of their own, so what they are is in their checkpoints."""
    flags = "--env-id tiny_envs:Truncated-v0 --critic-width 16 --actor-width 16 --batch-size 16"
    flags += " --learning-starts 40 --total-timesteps 60 --eval-every 20 --device cpu --run-name"
    for program, name in (
        (["crossq_sac.py"], "mine"),
        (["benchmark/ablate.py", "crossq_sac.py", "--critic-norm", "none"], "ablated"),
        (["crossq_td3.py"], "tiny_envs_Truncated-v0__crossq_td3__1"),
    ):
        result = run_script(*program, *flags.split(), name)
        assert result.returncode == 0, result.stderr
    for x in plot.AXES:
        plot.main(["--runs", str(tmp_path / "runs"), "--x", x])
        (axis,) = drawn["curves.png"].axes
        plain, ablated, td3 = labels_of(drawn["curves.png"])
        assert (plain, td3) == ("crossq_sac (1 seed)", "crossq_td3 (1 seed)")
        assert ablated.startswith("crossq_sac, critic-norm=none, ")
        for line in axis.lines:
            places, returns = line.get_data()
            assert set(returns) == {10.0}
            if x == "hours":
                assert 0 < places[0] < places[1] < places[2] < 0.1
            else:
                assert places.tolist() == {"steps": [20, 40, 60], "updates": [0, 20]}[x]
    assert capsys.readouterr().err == ""


def test_runs_of_run_sh_keep_their_flags_apart(tmp_path, drawn):
    """The flags that all runs share are left out. Plain runs have no entry in args.json for those
    of ablate.py."""
    for seed in (1, 2):
        write_run(tmp_path / f"Hopper-v4__crossq_sac+critic-width=256__{seed}", "Hopper-v4", seed)
        name = f"Hopper-v4__ablate_crossq_sac+critic-norm=ln+critic-width=256__{seed}"
        write_run(tmp_path / name, "Hopper-v4", seed, critic_norm="ln", actor_norm="brn")
    plot.main(["--runs", str(tmp_path)])
    ours = labels_of(drawn["curves.png"])[:2]
    assert ours == ["crossq_sac (2 seeds)", "crossq_sac, critic-norm=ln (2 seeds)"]


def points_of(axis):
    """Of each line with error bars: the flag's values and the scores."""
    return [tuple(map(list, line.get_data())) for line, *_ in axis.containers]


def test_scores_over_a_flag(tmp_path, drawn):
    """Widths are in the names. Only 256 has run for 30 000 steps. Another precision is another
    setting, and one without a width has no place. Pendulum has one width, and so no panel."""
    for setting, last, rate in (
        ("crossq_sac-w256", 30_000, 100),
        ("crossq_sac-w512", 20_000, 200),
        ("crossq_sac-w2048-medium", 20_000, 300),
        ("no_width", 20_000, 400),
    ):
        for seed in (1, 2):
            path = tmp_path / setting / "HalfCheetah-v4" / f"{seed}.csv"
            write_evaluations(path, seed, last, rate=rate)
    write_evaluations(tmp_path / "crossq_sac-w256" / "Pendulum-v1" / "1.csv", 1, 20_000)
    plot.main(["--results", str(tmp_path), "--over", "critic-width"])
    (axis,) = drawn["over.png"].axes
    assert axis.get_title() == "HalfCheetah-v4" and axis.get_xscale() == "log"
    assert axis.get_xticks().tolist() == [256, 512, 2048]
    at_20, medium, at_30, *published = points_of(axis)
    assert at_20 == ([256, 512], [2015, 4015]) and medium == ([2048], [6015])
    interval = axis.containers[0][2][0].get_segments()[0]
    assert interval.tolist() == [[256, 2010], [256, 2020]]  # of two seeds, their range
    assert at_30 == ([256 * 1.03], [3015])  # the steps stand side by side
    assert published == [([2048 * 1.2], [3860.2]), ([2048 * 1.2 * 1.03], [4955.1])]
    assert labels_of(drawn["over.png"])[:3] == [
        "crossq_sac, 20,000 steps",
        "crossq_sac-medium, 20,000 steps",
        "crossq_sac, 30,000 steps",
    ]


def test_runs_over_a_flag_have_its_value_in_args_json(tmp_path, drawn):
    """The default too, which is in no name. A flag that is a word has no place on an axis."""
    for name, flags in (
        ("crossq_wn_highutd", {"utd": 1, "weight_norm": "hidden"}),
        ("crossq_wn_highutd+utd=5", {"utd": 5, "weight_norm": "hidden"}),
        ("crossq_wn_highutd+utd=5+weight-norm=none", {"utd": 5, "weight_norm": "none"}),
    ):
        write_run(tmp_path / f"Hopper-v4__{name}__1", "Hopper-v4", 1, **flags)
    plot.main(["--runs", str(tmp_path), "--over", "utd"])
    plain, ablated = points_of(drawn["over.png"].axes[0])
    assert plain == ([1, 5], [2010, 2010]) and ablated == ([5], [2010])
    labels = labels_of(drawn["over.png"])
    assert labels == [
        "crossq_wn_highutd, 20,000 steps",
        "crossq_wn_highutd, weight-norm=none, 20,000 steps",
    ]
    with pytest.raises(SystemExit):
        plot.main(["--runs", str(tmp_path), "--over", "weight-norm"])


def test_what_is_not_there_is_said(tmp_path, capsys):
    write_run(tmp_path / "runs" / "Hopper-v4__crossq_sac__1__1", "Hopper-v4", 1)
    write_run(tmp_path / "named" / "mine", "Hopper-v4", 1)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--results", tmp_path / "empty"], "no evaluations in"),
        (["--results", tmp_path / "empty", "--x", "hours"], "--x hours is not available"),
        (["--results", tmp_path / "empty", "--x", "both"], "--x both is not available"),
        (["--runs", tmp_path / "runs", "--x", "hours"], "has no events of eval/return"),
        (["--runs", tmp_path / "runs", "--x", "both"], "has no events of eval/return"),
        (["--runs", tmp_path / "named"], "of which script?"),
        (["--runs", tmp_path / "runs", "--over", "utd"], "no task has runs that differ in it"),
    ):
        with pytest.raises(SystemExit) as error:
            plot.main(list(map(str, arguments)))
        err = capsys.readouterr().err
        assert error.value.code == 2 and message in err and err.count("\n") == 1


def test_the_shipped_results_can_be_drawn(tmp_path, drawn):
    """The README shows every setting beside the published CrossQ, 2048 wide, and SAC."""
    plot.main(["--out", str(tmp_path)])
    labels = labels_of(drawn["curves.png"])
    ours = ["crossq_sac-w256 (", "crossq_td3-w256 (", "sac_baseline ("]
    for start in (*ours, "published: CrossQ", "published: SAC"):
        assert any(label.startswith(start) for label in labels), start
