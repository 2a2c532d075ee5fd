"""benchmark/throughput.py: the number of operations, the limit, the tables, the clock, and one short
measurement."""

import csv
import importlib
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "algorithms")]

import throughput  # noqa: E402

SIZES = {"obs": 3, "action": 2, "width": 4, "batch": 5, "actor_width": 6}


def test_operations_by_hand():
    """Multiply-adds per row: critic 5*4 + 4*4 + 4*1 = 40, actor 3*6 + 6*6 + 6*4 = 78; two critics,
    batch 5."""
    act, next_action = 2 * 78, 5 * 2 * 78
    critic = 2 * 5 * 2 * 40  # forward, both, one batch
    actor_update = 3 * next_action + 2 * critic
    crossq = act + next_action + 3 * 2 * critic + actor_update / 3
    count = throughput.products(throughput.OURS["crossq_sac"], **SIZES)
    assert throughput.flop(count) == pytest.approx(crossq)
    # SAC: no norm before the first layers, so no gradient of their inputs; a target critic; no
    # delay
    critic_update = 2 * critic + 2 * 5 * 2 * (4 * 4 + 4 * 1) + critic
    actor_update = 2 * next_action + 5 * 2 * (6 * 6 + 6 * 4) + 2 * critic
    sac = act + next_action + critic_update + actor_update
    count = throughput.products(throughput.OURS["sac_baseline"], **SIZES)
    assert throughput.flop(count) == pytest.approx(sac)


@pytest.mark.parametrize("name", throughput.DESIGNS)
def test_operations_are_those_of_the_script(name):
    """PyTorch's own count over a whole period of the policy delay: three steps of CrossQ, of REDQ
    and DroQ one, by their own defaults."""
    script = importlib.import_module(name)
    args = script.Args(critic_width=4, actor_width=6, batch_size=5, compile="off")
    agent, rng = script.Agent(3, 2, args), torch.Generator().manual_seed(1)
    design = throughput.DESIGNS[name]
    steps = max(1, design.delay // design.utd)
    batch = [torch.randn(5, 3), torch.rand(5, 2), torch.rand(5), torch.zeros(5), torch.randn(5, 3)]
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            agent.act(batch[0][0].numpy(), rng)
            for _ in range(design.utd):
                agent.update(batch, rng)
    count = throughput.products(design, **SIZES)
    assert (args.policy_delay, args.n_critics) == (design.delay, design.n_critics)
    assert name not in throughput.RIVALS or args.utd == design.utd
    assert counter.get_total_flops() == pytest.approx(throughput.flop(count) * steps)


def test_ways():
    """Each of them makes the product of its own factors."""
    found = throughput.ways(2, 3, 4, 5, "cpu")
    assert len(found) == 9
    for way in found:
        products = [(*way.args, way.keywords["out"])] if way.keywords else way.args[0]
        for *_, c in products:
            c[:] = 0  # the way before may have filled it
        way()
        for a, b, c in products:
            np.testing.assert_allclose(c, np.asarray(a) @ np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_the_limit_is_that_of_the_fastest_way(tmp_path, monkeypatch, exact):
    """Every shape counts with the fastest of its ways, under the scripts' own matmul precision and
    the default one."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("probe").load(ROOT / "crossq_sac.py")
    monkeypatch.setattr(importlib.import_module("probe"), "load", lambda path: script)
    chosen = "medium" if exact else "highest"
    monkeypatch.setattr(
        script, "choose_device", lambda args: torch.set_float32_matmul_precision(chosen)
    )
    times, precisions = np.random.default_rng(1), set()
    shapes, timed = [], []  # of each shape the times of its ways
    ways = throughput.ways

    def noted_ways(*shape):
        shapes.append(shape[:4])
        timed.append([])
        return ways(*shape)

    def fastest(way, seconds, device):
        if timed:
            precisions.add(torch.get_float32_matmul_precision())
            timed[-1].append(times.uniform(1, 2))
        return timed[-1][-1] if timed else 0.5

    monkeypatch.setattr(throughput, "ways", noted_ways)
    monkeypatch.setattr(throughput, "fastest", fastest)
    job = {"contender": "redq", "env_id": "InvertedPendulum-v4", "device": "cpu", "width": 8}
    try:
        result = throughput.limit(job | {"seed": 0, "index": 0, "processes": 1})
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == {chosen, "highest"}
    assert {len(x) for x in timed} == {18 if exact else 9}
    count = throughput.products(throughput.DESIGNS["redq"], 4, 1, 8)
    assert set(shapes) == set(count)
    seconds = 0.5 + sum(count[shape] * min(x) for shape, x in zip(shapes, timed))
    assert 1 / result["steps_per_s"] == pytest.approx(seconds)


SETTING = {"processes": 1, "threads": 2, "compile": "on"}


def test_table():
    """Medians and ranges; the start is of its own measurement; the share is that of the limit's
    best round; side by side as 2 x 1; limit and start have no rows of their own."""
    ours = SETTING | {"width": 256, "contender": "crossq_sac"}
    start = ours | {"kind": "start", "compile": "auto", "to_update": 1000, "rss_mb": 1.0}
    limit = ours | {"kind": "limit", "compile": "", "gflop": 0.5, "env_us": 80.0}
    peer = ours | {"contender": "sbx-sac", "compile": "", "processes": 2, "threads": 1}
    peer |= {"kind": "speed", "steps_per_s": 50.0, "rss_mb": 900.0}
    ours |= {"kind": "speed", "rss_mb": 500.0}
    rows = [ours | {"steps_per_s": speed} for speed in (90.0, 120.0, 100.0)]
    rows += [start | {"to_update_s": seconds} for seconds in (30.0, 40.0, 31.0)]
    for speed, rate in ((200.0, 100.0), (150.0, 70.0), (100.0, 50.0)):
        rows.append(limit | {"steps_per_s": speed, "gflop_per_s": rate})
    lines = throughput.table([*rows, peer]).splitlines()
    assert "| to update 1000, s |" in lines[0] and len(lines) == 6
    speed, start, memory = "100.0 (90.0 to 120.0)", "31.0 (30.0 to 40.0)", "500 (500 to 500)"
    assert lines[2] == f"| `crossq_sac`, compiled | 256 | 2 | {speed} | {start} | {memory} | 50 % |"
    speed, memory = "50.0 (50.0 to 50.0)", "900 (900 to 900)"
    assert lines[3] == f"| `sbx-sac` | 256 | 2 × 1 | {speed} |  | {memory} |  |"
    assert lines[5].endswith(
        "0.500 GFLOP per step at 100 GFLOP/s, and 80 µs of environment: "
        "at most 200.0 steps/s; measured 100.0, 50 %"
    )


def test_table2():
    """Ratios of times, each to SAC in the same round and setting; without SAC there is none."""
    speeds = {("sac_baseline", 256): (100.0, 50.0, 80.0), ("redq", 256): (20.0, 12.5, 16.0)}
    speeds |= {("crossq_sac", 2048): (100.0, 50.0, 40.0)}
    rows = [
        SETTING | {"kind": "speed", "contender": name, "width": width, "round": k, "steps_per_s": x}
        for (name, width), values in speeds.items()
        for k, x in enumerate(values)
    ]
    rows += [row | {"threads": 1} for row in rows if row["contender"] == "redq"]
    rows += [rows[0] | {"threads": 3, "steps_per_s": 1.0}]  # SAC, but of another setting
    rows += [rows[0] | {"kind": "limit", "compile": "", "steps_per_s": 1000.0}]
    lines = throughput.table2(rows).splitlines()
    assert lines[2:] == [
        "| SAC, compiled | 256 | 1 | 2 | 80.00 (50.00 to 100.00) | 1.00 (1.00 to 1.00) | 1 |",
        "| CrossQ, compiled | 2048 | 1 | 2 | 50.00 (40.00 to 100.00) | 1.00 (1.00 to 2.00) | 1.2 to 1.9 |",
        "| REDQ, compiled | 256 | 20 | 2 | 16.00 (12.50 to 20.00) | 5.00 (4.00 to 5.00) | 4 to 6 |",
        "| SAC, compiled | 256 | 1 | 3 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 1 |",
    ]


def train(tmp_path, monkeypatch, name, **job):
    """A contender's clock once it has stopped the training, and the environment's last step."""
    monkeypatch.chdir(tmp_path)
    steps = []
    step = gym.wrappers.RecordEpisodeStatistics.step
    monkeypatch.setattr(
        gym.wrappers.RecordEpisodeStatistics,
        "step",
        lambda self, action: (steps.append(1), step(self, action))[1],
    )
    job |= {"contender": name, "env_id": "InvertedPendulum-v4", "device": "cpu", "seed": 0}
    job |= {"learning_starts": 9, "width": 8, "index": 0, "processes": 1}
    job |= {"utd": throughput.utd_of(name), "seconds": 20, "to_update": 7}
    clock = throughput.Clock(job)
    with pytest.raises(throughput.Measured):
        throughput.train_ours(job, clock)
    assert Path("runs/0/checkpoint.pt").exists()
    return clock, len(steps)


@pytest.mark.parametrize("name", throughput.DESIGNS)
def test_the_clock_counts_environment_steps(tmp_path, monkeypatch, name):
    """At UTD 1 it runs from the end of update 4 to that of update 9; at 20 from that of the first
    step, which has update 4, to that of the sixth."""
    measured = {"kind": "speed", "compile": "off", "warmup": 4, "steps": 5}
    begin = time.perf_counter()
    clock, steps = train(tmp_path, monkeypatch, name, **measured)
    seconds = time.perf_counter() - begin
    assert (steps, clock.updates) == ((15, 120) if name in throughput.RIVALS else (18, 9))
    assert clock.result["steps"] == 5
    assert clock.result["steps_per_s"] > 5 / seconds


@pytest.mark.parametrize("name", ["crossq_sac", "redq"])
def test_the_start_ends_with_the_update_asked_for(tmp_path, monkeypatch, name):
    """Of REDQ in the middle of a step. It began when the process did, here long ago."""
    measured = {"kind": "start", "compile": "auto", "warmup": 4, "steps": 2}
    measured |= {"started": time.time() - 1000}
    clock, _ = train(tmp_path, monkeypatch, name, **measured)
    assert clock.updates == clock.result["to_update"] == 7
    assert 1000 < clock.result["to_update_s"] < 1100


def test_a_measurement(run_script, tmp_path):
    """The real script in processes of their own: three rows, speed, limit and start, and a table;
    nothing is overwritten."""
    flags = "--only crossq_sac --env-id InvertedPendulum-v4 --compile off --widths 8 --threads 1"
    flags += " --rounds 1 --steps 5 --warmup 3 --learning-starts 9 --start-updates 4"
    command = ["benchmark/throughput.py", *flags.split()]
    run = run_script(*command)
    assert run.returncode == 0, run.stderr
    with open(tmp_path / "throughput.csv") as file:
        speed, limit, start = csv.DictReader(file)
    assert [row["kind"] for row in (speed, limit, start)] == ["speed", "limit", "start"]
    assert {row["contender"] for row in (speed, limit, start)} == {"crossq_sac"}
    assert [row["compile"] for row in (speed, limit, start)] == ["off", "", "auto"]
    assert (speed["steps"], speed["to_update_s"]) == ("5", "")
    assert float(speed["steps_per_s"]) > 0 and float(speed["rss_mb"]) > 50
    assert all(float(limit[key]) > 0 for key in ("gflop", "gflop_per_s", "env_us"))
    assert (start["to_update"], start["steps_per_s"]) == ("4", "")
    assert float(start["to_update_s"]) > 0.5
    text = (tmp_path / "throughput.md").read_text()
    assert "| `crossq_sac`, not compiled | 8 | 1 |" in text and "| to update 4, s |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.csv", "throughput.md"}
    again = run_script(*command)
    assert again.returncode == 2
    assert again.stderr == "throughput.py: error: throughput.csv exists already\n"


def test_what_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", "throughput.py --only sac_baseline --device cuda".split())
    assert throughput.main() == 2
    assert capsys.readouterr().err == "throughput.py: error: --device cuda: there is none\n"
    monkeypatch.setattr(sys, "argv", "throughput.py --out no/such".split())
    assert throughput.main() == 2
    assert capsys.readouterr().err == "throughput.py: error: --out: there is no folder no\n"
    assert not [*tmp_path.iterdir()]


def test_table2_measures_its_own_contenders(tmp_path, monkeypatch):
    """--table2 takes the paper's contenders and widths, without the start if that is not wanted;
    the ratios come after the table of speeds."""
    monkeypatch.chdir(tmp_path)
    jobs = []

    def measure(python, job):
        jobs.append(job)
        row = {key: job[key] for key in throughput.FIELDS[:7]}
        row |= {"steps_per_s": 100.0 / job["utd"], "rss_mb": 1.0, "versions": "torch 1"}
        return row | {"gflop": 1.0, "gflop_per_s": 1.0, "env_us": 1.0}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput.signal, "signal", lambda *_: None)
    argv = "throughput.py --table2 --threads 1 --rounds 2 --start-updates 0"
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "stdout", "w"))
    assert throughput.main() == 0
    wanted = [("sac_baseline", 256, 1), ("crossq_sac", 256, 1), ("crossq_sac", 2048, 1)]
    wanted += [("redq", 256, 20), ("droq", 256, 20)]
    for kind in ("speed", "limit"):
        mine = [job for job in jobs if job["kind"] == kind]
        assert [(job["contender"], job["width"], job["utd"]) for job in mine] == 2 * wanted
    assert len(jobs) == 20
    ratios = (tmp_path / "throughput.md").read_text().split("\n\n")[-1].splitlines()
    assert [line.split(" | ")[5][:5] for line in ratios[2:]] == ["1.00 "] * 3 + ["20.00"] * 2
