"""Torch's threads on the CPU: how many, and each on a core of its own.

Owns the affinity and the time slices of the engine's compute threads, and the priority of the threads beside them. Left
to itself the kernel often wakes two of them on one core, and each parallel region then waits for a time slice: a decode
step of 47 ms took up to 450 ms on an otherwise idle machine (2 cores, Linux 6.18, 2026-11). Invariant: threads are
pinned only when they are to fill every core this process may use, so that two servers with fewer threads do not share a
core while others idle.
"""

import os
import sys
import threading
from pathlib import Path

import torch

from serve.engine.time_slices import set_time_slice

# large enough that torch splits the addition over all threads, which starts them
_WAKING_ELEMENTS = 1 << 22
# how much nicer than the steps their helpers are: a load takes what the steps leave, and a part of what they want
_HELPER_NICENESS = 10
_MAX_NICENESS = 19
# the steps fill their cores: whoever wakes, above all the API, interrupts them at once and does not wait for a tick
_STEP_SLICE_NS = 10_000_000
# a helper is to be interrupted by the steps, not they by it: about what the kernel gives on two cores
_HELPER_SLICE_NS = 1_400_000


def start_threads(num_threads: int) -> None:
    """Start torch's pool with `num_threads`, the calling thread included; call before the first torch operation."""
    # the pool inherits it
    set_time_slice(_STEP_SLICE_NS)
    cpus = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    if num_threads == 1 or num_threads != len(cpus):
        return
    before = _thread_ids()
    torch.zeros(_WAKING_ELEMENTS).add_(1.0)
    workers = sorted(_thread_ids() - before)
    if len(workers) != num_threads - 1:
        return
    for thread_id, cpu in zip([threading.get_native_id(), *workers], cpus, strict=True):
        os.sched_setaffinity(thread_id, {cpu})


def leave_core() -> None:
    """Let the calling thread run on every core, alone and behind the steps: for helpers of the pinned step thread."""
    torch.set_num_threads(1)
    set_time_slice(_HELPER_SLICE_NS)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if sys.platform == "linux":
        # there alone a priority is a thread's own
        mine = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, mine) + _HELPER_NICENESS
        os.setpriority(os.PRIO_PROCESS, mine, min(niceness, _MAX_NICENESS))


def _thread_ids() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
