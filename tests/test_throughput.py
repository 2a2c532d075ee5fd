"""benchmark/throughput.py: its clock, its table, its settings, and one short measurement."""

import csv
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import throughput  # noqa: E402

JOB = {"env_id": "InvertedPendulum-v4", "device": "cpu", "seed": 0, "width": 8, "bf16": "off"}
JOB |= {"learning_starts": 9, "compile": False, "index": 0, "processes": 1, "warmup": 4, "steps": 5}


@pytest.mark.parametrize("name", ["crossq_sac", "droq", "sb3-contrib-crossq"])
def test_the_clock_counts_environment_steps(tmp_path, monkeypatch, name):
    """At UTD 1 it runs from the end of update 4 to that of update 9. At UTD 20 it runs from the end
    of the first step, which has update 4, to that of the sixth. A step here takes 10 seconds."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(throughput.PEERS.get(name, ["torch"])[0])
    utd = throughput.OURS.get(name, 1)
    bf16 = "on" if name == "crossq_sac" else "off"
    job = JOB | {"contender": name, "utd": utd, "seconds": 99, "started": 1000, "bf16": bf16}
    clock = throughput.Clock(job)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 10 * clock.updates / utd)
    monkeypatch.setattr(throughput.time, "time", lambda: 1000 + clock.updates)
    train = throughput.train_peer if name in throughput.PEERS else throughput.train_ours
    with pytest.raises(throughput.Measured):
        train(clock.job, clock)
    first, last = (20, 120) if name == "droq" else (4, 9)
    assert clock.updates == last
    assert clock.result == {"start_s": first, "steps": 5, "steps_per_s": 0.1}
    for path in tmp_path.glob("runs/*/args.json"):
        args = json.loads(path.read_text())
        assert args["critic_width"] == 8 and args["bf16"] == (bf16 == "on")


def test_a_slow_contender_is_stopped_after_whole_actor_periods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = throughput.Clock(JOB | {"utd": 1, "steps": 2000, "seconds": 35, "started": 0})
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 10 * clock.updates)
    with pytest.raises(throughput.Measured):
        while True:
            clock()
    assert clock.result["steps"] == 6 and clock.updates == 10


def row(name, speed, **more):
    out = {"contender": name, "width": 256, "processes": 1, "threads": 2, "memory": "default"}
    out |= {"bf16": "off" if name in throughput.OURS else "", "round": 1, "start_s": 30.0}
    return out | {"rss_mb": 500.0, "steps_per_s": speed} | more


def test_table():
    """Medians, ranges, and ratios to SBX in the same round and setting: the third round has none."""
    rows = [row("crossq_sac", speed, round=k) for k, speed in enumerate((90.0, 120.0, 100.0))]
    rows += [row("sbx-crossq", speed, round=k) for k, speed in enumerate((60.0, 100.0))]
    rows += [row("crossq_sac", 200.0, bf16="on", memory="kept", processes=2, threads=1, round=7)]
    rows += [row("sbx-crossq", 80.0, memory="kept", processes=2, threads=1, round=7)]
    rows += [row("sbx-crossq", 999.0, processes=2, threads=1, round=7)]  # of no use to the others
    cells = [line.strip("| ").split(" | ") for line in throughput.table(rows).splitlines()]
    speed, ratio, rest = "100.0 (90.0 to 120.0)", "1.35 (1.20 to 1.50)", ["30.0 (30.0 to 30.0)"]
    rest.append("500 (500 to 500)")
    assert cells[2] == ["`crossq_sac`", "256", "1", "2", "default", "float32", speed, *rest, ratio]
    assert cells[3][0] == "`sbx-crossq`" and cells[3][-1] == "1.00 (1.00 to 1.00)"
    assert cells[5][3:7] == ["2 x 1", "kept", "bfloat16", "200.0 (200.0 to 200.0)"]
    assert cells[5][-1] == "2.50 (2.50 to 2.50)"


def test_table2():
    """The time of a step over SAC's, with the same products."""
    rows = [row("sac_baseline", 100.0), row("sac_baseline", 150.0, bf16="on"), row("redq", 20.0)]
    rows += [row("crossq_sac", 50.0, width=2048, bf16="on")]
    lines = throughput.table(rows, table2=True).splitlines()[2:]
    ends = {line.split("`")[1] + line.split(" | ")[5]: line.split(" | ")[-2:] for line in lines}
    assert ends["redqfloat32"] == ["5.00 (5.00 to 5.00)", "4 to 6 |"]
    assert ends["crossq_sacbfloat16"] == ["3.00 (3.00 to 3.00)", "1.2 to 1.9 |"]
    assert ends["sac_baselinebfloat16"] == ["1.00 (1.00 to 1.00)", "1 |"]


def test_jobs():
    """Each round goes through memory settings and contenders in turn; --bf16 where there is one."""
    args = throughput.Args(only=("crossq_sac", "droq", "sbx-crossq"), widths=(256,), rounds=1)
    found = [(job["memory"], job["contender"], job["bf16"]) for job in throughput.jobs(args)]
    ours = [("crossq_sac", "off"), ("crossq_sac", "on"), ("droq", "off"), ("sbx-crossq", "")]
    assert found == [(memory, *pair) for memory in ("default", "kept") for pair in ours]
    args = throughput.Args(table2=True, rounds=2, memory=("kept",), bf16=("off",), side_by_side=2)
    found = [(job["contender"], job["width"], job["utd"]) for job in throughput.jobs(args)]
    wanted = [("sac_baseline", 256, 1), ("crossq_sac", 256, 1), ("crossq_sac", 2048, 1)]
    assert found == [*wanted, ("redq", 256, 20), ("droq", 256, 20)] * 4


def test_what_glibc_is_told(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # not what the user's shell says
    job = JOB | {"threads": 1, "memory": "default"}
    assert not [key for key in throughput.environment(job, "", 0) if key.startswith("MALLOC_")]
    kept = throughput.environment(job | {"memory": "kept"}, "", 0)
    assert kept["MALLOC_TRIM_THRESHOLD_"] == "2147483647"
    assert kept["MALLOC_MMAP_THRESHOLD_"] == "1073741824"


def test_a_measurement(run_script, tmp_path):
    """The real script in a process of its own; nothing is overwritten."""
    flags = "--only crossq_sac --env-id InvertedPendulum-v4 --no-compile --widths 8 --threads 1"
    flags += " --rounds 1 --steps 6 --warmup 3 --learning-starts 9 --memory kept --bf16 on"
    run = run_script("benchmark/throughput.py", *flags.split())
    assert run.returncode == 0, run.stderr
    (found,) = csv.DictReader(open(tmp_path / "throughput.csv"))
    assert [found[key] for key in ("memory", "bf16", "steps")] == ["kept", "on", "6"]
    assert float(found["steps_per_s"]) > 0 and float(found["rss_mb"]) > 50
    assert 0.5 < float(found["start_s"]) < 300
    table = (tmp_path / "throughput.md").read_text()
    assert "| `crossq_sac` | 8 | 1 | 1 | kept | bfloat16 |" in table
    again = run_script("benchmark/throughput.py", *flags.split())
    assert again.returncode == 1 and "error: throughput.csv exists already" in again.stderr
