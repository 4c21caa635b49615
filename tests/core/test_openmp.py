"""Threads of OpenMP: which ones a process keeps."""

import os
import signal
import subprocess
import sys

import pytest

from hovle_core.openmp import in_passing_thread

PROBE = """
import time
import psutil, torch
from hovle_core.openmp import in_passing_thread

def compute():
    return float((torch.ones(2**22) * 2).sum())

process = psutil.Process()
before = process.num_threads()
assert in_passing_thread(compute) == 2**23
deadline = time.monotonic() + 20
while process.num_threads() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(process.num_threads() - before)
compute()
print(process.num_threads() - before)
"""


def test_a_passing_thread_takes_its_helpers_along():
    """Or they count against those of the thread that computes from then on, and all sleep at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["0", "1"]


def test_ctrl_c_does_not_wait_for_a_passing_thread():
    code = (
        "import signal, time; from hovle_core.openmp import in_passing_thread\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "in_passing_thread(lambda: (print('works', flush=True), time.sleep(600)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors


def test_a_passing_thread_raises_what_its_function_raises():
    with pytest.raises(ValueError, match="no such"):
        in_passing_thread(lambda: (_ for _ in ()).throw(ValueError("no such")))
