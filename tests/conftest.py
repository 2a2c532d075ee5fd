"""Shared helpers: the scripts are imported from the folder above, and run as a user would, in a
folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the networks here are tiny: a second thread only costs

ROOT = Path(__file__).resolve().parent.parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmark" / "algorithms")]


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment():
    """One thread per process: the suite may share its cores; the tests' own environments are found
    from tests/."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture
def run_script(tmp_path):
    """run_script("crossq_sac.py", "--seed", 1, ...) -> CompletedProcess, with tmp_path as the
    current directory."""

    def run(script, *arguments, timeout=300, cwd=tmp_path):
        return subprocess.run(
            command(script, *arguments),
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
