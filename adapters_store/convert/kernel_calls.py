"""Linux system calls that Python's library lacks, through ctypes: prctl and raw numbers, each failure an OSError.

Owns the calling convention only. Invariant: nothing is called on another system than Linux; there, `syscall` raises
OSError(ENOSYS), which every caller takes for a layer that is missing.
"""

import ctypes
import errno
import os
import sys


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Call the kernel; pointers are bytes or None. Raises OSError with the kernel's number."""
    return _checked("syscall", ctypes.c_long(number), *(_argument(value) for value in arguments))


def prctl(option: int, value: int = 0) -> int:
    """Call prctl(2) with one argument and three zeros; raises OSError."""
    return _checked("prctl", ctypes.c_int(option), *(ctypes.c_ulong(word) for word in (value, 0, 0, 0)))


def _argument(value: int | bytes | None) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(function: str, *arguments: object) -> int:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "not Linux")
    call = getattr(ctypes.CDLL(None, use_errno=True), function)
    call.restype = ctypes.c_long
    result = int(call(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
