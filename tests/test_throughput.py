"""benchmark/throughput.py: the number of operations, the table, and one short measurement."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

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


@pytest.mark.parametrize("name", throughput.OURS)
def test_operations_are_those_of_the_script(name):
    """PyTorch's own count over a whole period of the policy delay."""
    script = importlib.import_module(name)
    args = script.Args(critic_width=4, actor_width=6, batch_size=5, compile="off")
    agent, rng = script.Agent(3, 2, args), torch.Generator().manual_seed(1)
    design = throughput.OURS[name]
    batch = [torch.randn(5, 3), torch.rand(5, 2), torch.rand(5), torch.zeros(5), torch.randn(5, 3)]
    with FlopCounterMode(display=False) as counter:
        for _ in range(args.policy_delay):
            agent.update(batch, rng)
            agent.act(batch[0][0].numpy(), rng)
    count = throughput.products(design, **SIZES)
    assert args.policy_delay == design.delay
    assert counter.get_total_flops() == pytest.approx(throughput.flop(count) * design.delay)


def test_table():
    """Medians and ranges; the share of the limit's median; side by side as 2 x 1; the limit has no
    row of its own."""
    setting = {"width": 256, "processes": 1, "threads": 2, "compile": "on"}
    ours = setting | {"contender": "crossq_sac", "start_s": 30.0, "rss_mb": 500.0}
    limit = setting | {"contender": "limit of crossq_sac", "compile": "", "steps_per_s": 200.0}
    limit |= {"gflop": 0.5, "gflop_per_s": 100.0, "env_us": 80.0}
    peer = setting | {"contender": "sbx-sac", "compile": "", "processes": 2, "threads": 1}
    peer |= {"steps_per_s": 50.0, "start_s": 11.0, "rss_mb": 900.0}
    rows = [ours | {"steps_per_s": speed} for speed in (90.0, 120.0, 100.0)]
    lines = throughput.table([*rows, limit, peer]).splitlines()
    speed, start, memory = "100.0 (90.0 to 120.0)", "30.0 (30.0 to 30.0)", "500 (500 to 500)"
    assert lines[2] == f"| `crossq_sac`, compiled | 256 | 2 | {speed} | {start} | {memory} | 50 % |"
    speed, start, memory = "50.0 (50.0 to 50.0)", "11.0 (11.0 to 11.0)", "900 (900 to 900)"
    assert lines[3] == f"| `sbx-sac` | 256 | 2 × 1 | {speed} | {start} | {memory} |  |"
    assert lines[5].endswith(
        "0.500 GFLOP per step at 100 GFLOP/s, and 80 µs of environment: "
        "at most 200.0 steps/s; measured 100.0, 50 %"
    )


@pytest.mark.parametrize("name", throughput.OURS)
def test_the_clock_counts_every_update(tmp_path, monkeypatch, name):
    """Of each script: the clock runs from the end of update 4 to that of update 9."""
    monkeypatch.chdir(tmp_path)
    job = {"contender": name, "env_id": "InvertedPendulum-v4", "device": "cpu", "compile": "off"}
    job |= {"seed": 0, "learning_starts": 9, "width": 8, "index": 0, "processes": 1}
    clock = throughput.Clock(job | {"warmup": 4, "steps": 5, "seconds": 600, "started": 0.0})
    with pytest.raises(throughput.Measured):
        throughput.train_ours(job, clock)
    assert clock.updates == 9 and clock.result["steps"] == 5
    assert clock.result["steps_per_s"] > 0 and Path("runs/0/checkpoint.pt").exists()


def test_a_measurement(run_script, tmp_path):
    """The real script in a process of its own: two rows, ours and its limit, and a table; nothing
    is overwritten."""
    flags = "--only crossq_sac --env-id InvertedPendulum-v4 --compile off --widths 8 --threads 1"
    flags += " --rounds 1 --steps 5 --warmup 3 --learning-starts 9"
    command = ["benchmark/throughput.py", *flags.split()]
    run = run_script(*command)
    assert run.returncode == 0, run.stderr
    with open(tmp_path / "throughput.csv") as file:
        ours, limit = csv.DictReader(file)
    assert (ours["contender"], ours["steps"]) == ("crossq_sac", "5")
    assert limit["contender"] == "limit of crossq_sac"
    assert float(ours["steps_per_s"]) > 0 and float(ours["start_s"]) > 0.5
    assert float(ours["rss_mb"]) > 50
    assert all(float(limit[key]) > 0 for key in ("gflop", "gflop_per_s", "env_us"))
    assert "| `crossq_sac`, not compiled | 8 | 1 |" in (tmp_path / "throughput.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.csv", "throughput.md"}
    again = run_script(*command)
    assert again.returncode == 2
    assert again.stderr == "throughput.py: error: throughput.csv exists already\n"
