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
    """Multiply-adds per row: critic 5*4 + 4*4 + 4*1 = 40, actor 3*6 + 6*6 + 6*4 = 78; two critics, batch 5."""
    act, next_action, critic = (
        2 * 78,
        5 * 2 * 78,
        2 * 5 * 2 * 40,
    )  # critic: forward, both, one batch
    actor_update = 3 * next_action + 2 * critic
    crossq = act + next_action + 3 * 2 * critic + actor_update / 3
    assert throughput.flop(
        throughput.products(throughput.OURS["crossq_sac"], **SIZES)
    ) == pytest.approx(crossq)
    # SAC: no norm before the first layers, so no gradient of their inputs; a target critic; no delay
    critic_update = 2 * critic + 2 * 5 * 2 * (4 * 4 + 4 * 1) + critic
    actor_update = 2 * next_action + 5 * 2 * (6 * 6 + 6 * 4) + 2 * critic
    sac = act + next_action + critic_update + actor_update
    assert throughput.flop(
        throughput.products(throughput.OURS["sac_baseline"], **SIZES)
    ) == pytest.approx(sac)


@pytest.mark.parametrize("name", throughput.OURS)
def test_operations_are_those_of_the_script(name):
    """PyTorch's own count over a whole period of the policy delay."""
    script = importlib.import_module(name)
    args = script.Args(critic_width=4, actor_width=6, batch_size=5, compile="off")
    agent, rng, design = (
        script.Agent(3, 2, args),
        torch.Generator().manual_seed(1),
        throughput.OURS[name],
    )
    batch = [torch.randn(5, 3), torch.rand(5, 2), torch.rand(5), torch.zeros(5), torch.randn(5, 3)]
    with FlopCounterMode(display=False) as counter:
        for _ in range(args.policy_delay):
            agent.update(batch, rng)
            agent.act(batch[0][0].numpy(), rng)
    count = throughput.products(design, **SIZES)
    assert args.policy_delay == design.delay
    assert counter.get_total_flops() == pytest.approx(throughput.flop(count) * design.delay)


def test_table():
    """Medians and ranges; the share of the limit's median; side by side as 2 x 1; the limit has no row of its own."""
    setting = {"width": 256, "processes": 1, "threads": 2, "compile": "on"}
    ours = [
        setting
        | {"contender": "crossq_sac", "steps_per_s": speed, "start_s": 30.0, "rss_mb": 500.0}
        for speed in (90.0, 120.0, 100.0)
    ]
    limit = {
        "contender": "limit of crossq_sac",
        "compile": "",
        "steps_per_s": 200.0,
        "gflop": 0.5,
        "env_us": 80.0,
    }
    peer = {
        "contender": "sbx-sac",
        "compile": "",
        "processes": 2,
        "threads": 1,
        "steps_per_s": 50.0,
    }
    rows = [
        *ours,
        setting | limit | {"gflop_per_s": 100.0},
        setting | peer | {"start_s": 11.0, "rss_mb": 900.0},
    ]
    lines = throughput.table(rows).splitlines()
    line = "| `crossq_sac`, compiled | 256 | 2 | 100.0 (90.0 to 120.0) | 30.0 (30.0 to 30.0) | 500 (500 to 500) | 50 % |"
    assert lines[2] == line
    assert (
        lines[3]
        == "| `sbx-sac` | 256 | 2 × 1 | 50.0 (50.0 to 50.0) | 11.0 (11.0 to 11.0) | 900 (900 to 900) |  |"
    )
    assert lines[5].endswith(
        "0.500 GFLOP per step at 100 GFLOP/s, and 80 µs of environment: at most 200.0 steps/s; measured 100.0, 50 %"
    )


def test_a_measurement(run_script, tmp_path):
    """The real script in a process of its own: two rows, ours and its limit, and a table; nothing is overwritten."""
    flags = "--only crossq_sac --env-id InvertedPendulum-v4 --compile off --widths 8 --threads 1 --rounds 1 --steps 5"
    command = ["benchmark/throughput.py", *flags.split(), "--warmup", "3", "--learning-starts", "9"]
    run = run_script(*command)
    assert run.returncode == 0, run.stderr
    ours, limit = csv.DictReader(open(tmp_path / "throughput.csv"))
    assert (ours["contender"], ours["steps"], limit["contender"]) == (
        "crossq_sac",
        "5",
        "limit of crossq_sac",
    )
    assert (
        float(ours["steps_per_s"]) > 0
        and float(ours["start_s"]) > 0.5
        and float(ours["rss_mb"]) > 50
    )
    assert (
        float(limit["gflop"]) > 0 and float(limit["gflop_per_s"]) > 0 and float(limit["env_us"]) > 0
    )
    assert "| `crossq_sac`, not compiled | 8 | 1 |" in (tmp_path / "throughput.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.csv", "throughput.md"}
    again = run_script(*command)
    assert (
        again.returncode == 2
        and again.stderr == "throughput.py: error: throughput.csv exists already\n"
    )
