"""How long a thread may go on before another of its rank takes over, where the kernel lets it choose (Linux 6.12).

Owns one attribute of the calling thread, which the threads it starts inherit. Who has long slices is interrupted at
once by whoever wakes with a shorter one: sched(7), `sched_runtime`. Invariant: the thread's policy and niceness stay as
they are, and where nothing can be set nothing is changed.
"""

import ctypes
import platform
import struct
import sys

# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
_RUNTIME = 5
# sched_setattr, sched_getattr
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}


def set_time_slice(nanoseconds: int) -> bool:
    """Set the calling thread's slice; the kernel keeps it from 0.1 to 100 ms.

    Returns:
        Whether it was set.
    """
    fields = _read(0)
    if fields is None:
        return False
    fields[0], fields[_RUNTIME] = _ATTRIBUTES.size, nanoseconds
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.pack(*fields), _ATTRIBUTES.size)
    return bool(ctypes.CDLL(None).syscall(_CALLS[platform.machine()][0], 0, buffer, 0) == 0)


def time_slice(thread_id: int = 0) -> int:
    """Return a thread's slice in nanoseconds, the calling one's by default; 0 where it cannot be told."""
    fields = _read(thread_id)
    return 0 if fields is None else int(fields[_RUNTIME])


def _read(thread_id: int) -> list[int] | None:
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return None
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if ctypes.CDLL(None).syscall(_CALLS[platform.machine()][1], thread_id, buffer, _ATTRIBUTES.size, 0) != 0:
        return None
    return list(_ATTRIBUTES.unpack(buffer.raw))
