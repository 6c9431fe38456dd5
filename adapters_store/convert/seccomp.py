"""A seccomp filter: from here on the kernel refuses this process the calls that a converter never needs.

Owns the list of calls, their numbers and the filter program. Refused (EPERM): every socket, every new process or
thread, every other program, every look into another process or at its turn, every change of limits, links, mounts,
namespaces, keys or clocks, and of the owner, mode, times or attributes of any file, which Landlock leaves open.
Invariant: on x86_64 and aarch64 the filter covers every thread of the process and there is no way back.
Source: seccomp(2), linux/filter.h; numbers from the kernel's tables of the two architectures.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

from adapters_store.convert.kernel_calls import syscall

_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# a flag of clone(2)
_CLONE_THREAD = 0x00010000
# offsets in struct seccomp_data
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
# calls of x86_64's 32-bit-pointer interface begin here
_X32 = 0x40000000
# number of seccomp(2), its architecture
_MACHINES = {"x86_64": (317, 0xC000003E), "aarch64": (277, 0xC00000B7)}
_ABSENT = (errno.ENOSYS, errno.EINVAL)

# name: number on x86_64, on aarch64 (None: it has no such call)
REFUSED: dict[str, tuple[int, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "bind": (49, 200),
    "listen": (50, 201),
    "socketpair": (53, 199),
    "accept4": (288, 242),
    "recvmmsg": (299, 243),
    "sendmmsg": (307, 269),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "personality": (135, 92),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
}
# glibc falls back from clone3 to clone, which is refused above
_CLONE3 = 435
# a process may send signals to itself: that is how it aborts
_TO_ITSELF_ONLY = {"kill": (62, 129), "tgkill": (234, 131)}


def refuse_calls(*, may_thread: bool = False) -> bool:
    """Install the filter.

    Args:
        may_thread: let the process have threads of its own; new processes stay refused.
    Returns:
        False where this kernel or architecture has no seccomp filters we know: then nothing is refused.
    Raises:
        OSError: the kernel has them and refused ours (no_new_privs is not set); then the process must end.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        return False
    number, architecture = _MACHINES[machine]
    program = b"".join(_program(machine, architecture, may_thread=may_thread))
    instructions = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    try:
        syscall(number, _SET_MODE_FILTER, _ALL_THREADS, pointer)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return True


def _program(machine: str, architecture: int, *, may_thread: bool) -> Iterator[bytes]:
    """Yield the filter's instructions: one pair per refused call, so that no jump is longer than four."""
    column = list(_MACHINES).index(machine)
    refuse = _RETURN, 0, 0, _REFUSE | errno.EPERM
    yield _instruction(_LOAD, 0, 0, _ARCHITECTURE)
    yield _instruction(_JUMP_EQUAL, 1, 0, architecture)
    yield _instruction(_RETURN, 0, 0, _KILL)
    yield _instruction(_LOAD, 0, 0, _NUMBER)
    if machine == "x86_64":
        yield _instruction(_JUMP_AT_LEAST, 0, 1, _X32)
        yield _instruction(_RETURN, 0, 0, _KILL)
    if may_thread:
        # a clone that is a thread passes, any other goes on to the refusal below
        yield _instruction(_JUMP_EQUAL, 0, 4, REFUSED["clone"][column] or 0)
        yield _instruction(_LOAD, 0, 0, _FIRST_ARGUMENT)
        yield _instruction(_JUMP_IF_BITS, 0, 1, _CLONE_THREAD)
        yield _instruction(_RETURN, 0, 0, _ALLOW)
        yield _instruction(_LOAD, 0, 0, _NUMBER)
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            yield _instruction(_JUMP_EQUAL, 0, 1, number)
            yield _instruction(*refuse)
    yield _instruction(_JUMP_EQUAL, 0, 1, _CLONE3)
    yield _instruction(_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
    for numbers in _TO_ITSELF_ONLY.values():
        yield _instruction(_JUMP_EQUAL, 0, 3, numbers[column])
        yield _instruction(_LOAD, 0, 0, _FIRST_ARGUMENT)
        yield _instruction(_JUMP_EQUAL, 1, 0, os.getpid())
        yield _instruction(*refuse)
        yield _instruction(_LOAD, 0, 0, _NUMBER)
    yield _instruction(_RETURN, 0, 0, _ALLOW)


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
