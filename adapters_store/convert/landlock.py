"""Landlock: from here on this process opens nothing but what lies beneath the folders it was given.

Owns the kernel's structures and access bits. Invariant: a kernel without Landlock changes nothing and says so; one
that has it either restricts the process as asked or raises.
Source: linux/landlock.h, versions 1 (Linux 5.13) to 7; the numbers are the same on all architectures.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters_store.convert.kernel_calls import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
_REMOVE_DIR, _MAKE_DIR, _REFER, _TRUNCATE = 1 << 4, 1 << 7, 1 << 13, 1 << 14
_READ = _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
# folders in a writable one, and moves between them
_FOLDERS = _MAKE_DIR | _REMOVE_DIR | _REFER
# the rights that a rule for one file may hold
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# highest right of each version of the interface; all of them are denied unless a rule gives them
_HIGHEST_RIGHT = {1: 12, 2: 13, 3: 14, 4: 14}
_LATEST_RIGHT = 15
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_ABSENT = (errno.ENOSYS, errno.EOPNOTSUPP)


def restrict_files(readable: Iterable[Path], writable: Iterable[Path], *, may_make_folders: bool = False) -> bool:
    """Deny this process every file but those beneath the folders, TCP, and signals to others; there is no way back.

    A readable folder's own links are followed to the files they mean today, wherever these lie.

    Returns:
        False where the kernel has no Landlock (or it is switched off): then nothing is restricted.
    Raises:
        OSError: a folder is missing, or the kernel refused; then the process must end.
    """
    try:
        version = syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    handled = (1 << (_HIGHEST_RIGHT.get(version, _LATEST_RIGHT) + 1)) - 1
    attributes = struct.pack("=QQQ", handled, _BIND_AND_CONNECT_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for folder in readable:
            for path in _meant(folder):
                _allow(ruleset, path, _READ & handled)
        for folder in writable:
            _allow(ruleset, folder, (_WRITE | _FOLDERS if may_make_folders else _WRITE) & handled)
        syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _meant(folder: Path) -> Iterator[Path]:
    """Yield the folder and the files that links in it mean: a download's cache is made of such links."""
    yield folder
    for entry in os.scandir(folder):
        if entry.is_symlink() and entry.is_file():
            yield Path(entry.path).resolve()


def _allow(ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not path.is_dir():
            rights &= _FILE_RIGHTS
        syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)
