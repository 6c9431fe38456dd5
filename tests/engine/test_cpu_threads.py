"""Where the engine's compute threads run; each case in a fresh process, since pools and affinities outlive a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from serve.engine.cpu_threads import leave_core, start_threads
start_threads(int(sys.argv[1]))
cores = [sorted(os.sched_getaffinity(int(task))) for task in sorted(os.listdir("/proc/self/task"), key=int)]
with ThreadPoolExecutor(1, initializer=leave_core) as pool:
    helper = pool.submit(lambda: sorted(os.sched_getaffinity(0))).result()
    nicer = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
print(json.dumps([*cores, helper, [os.getpriority(os.PRIO_PROCESS, 0), nicer]]))
"""


def report(num_threads: int) -> list[list[int]]:
    """The cores of each thread of the pool, those of a helper thread, and the nicenesses of both."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", REPORT, str(num_threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=600).stdout
    result: list[list[int]] = json.loads(output)
    return result


def test_threads_that_fill_the_machine_have_a_core_each() -> None:
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("one core: nothing to pin")
    *pool, helper, _ = report(len(mine))
    assert [cores for cores in pool if len(cores) == 1] == [[core] for core in mine]
    assert helper == mine


def test_fewer_threads_than_cores_are_left_to_the_kernel() -> None:
    mine = sorted(os.sched_getaffinity(0))
    assert all(cores == mine for cores in report(1)[:-1])


def test_a_helper_runs_behind_the_steps() -> None:
    *_, (steps, helper) = report(1)
    # a shell that is as nice as can be leaves no room
    assert helper > steps or steps == 19


SLICES = """
import json, os, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from serve.engine.cpu_threads import leave_core, start_threads
from serve.engine.time_slices import set_time_slice, time_slice
niceness = os.getpriority(os.PRIO_PROCESS, 0)
set_time_slice(5_000_000)
told = time_slice()
# imports may have started threads of their own
others = set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}
start_threads(2)
torch.zeros(1 << 22).add_(1.0)
steps = [time_slice(int(task)) for task in os.listdir("/proc/self/task") if task not in others]
with ThreadPoolExecutor(1, initializer=leave_core) as pool:
    helper = pool.submit(time_slice).result()
print(json.dumps([told, steps, helper, os.getpriority(os.PRIO_PROCESS, 0) - niceness]))
"""


def test_the_steps_have_long_slices_and_their_helpers_short_ones() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", SLICES]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=600).stdout
    told, steps, helper, change_of_niceness = json.loads(output)
    assert change_of_niceness == 0
    if told != 5_000_000:
        pytest.skip("this kernel lets no thread choose its slice")
    assert len(steps) >= 2
    assert set(steps) == {10_000_000}
    assert helper == 1_400_000
