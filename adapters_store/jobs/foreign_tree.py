"""Copies of what a walled process wrote: only regular files with one name, reached through no link, a bounded number.

Owns the walk. Invariant: whatever the process does meanwhile, nothing outside of the folder it may write to is read:
each step is taken from the folder that is open already, and follows no link.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.errors import StorageFailed
from adapters_store.file_system import FileSystem

_MAX_FILES, _MAX_DEPTH = 512, 8
_COPY_BYTES = 1 << 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# opening a FIFO must not wait for its writer
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def copy_foreign(root: Path, path: Path, target: Path, files: FileSystem) -> None:
    """Copy the folder `path`, which lies below `root`, durably to the new folder `target`.

    Args:
        root: a folder that the process cannot replace.
    Raises:
        OSError: a link, a FIFO, a file of several names, or the disk. StorageFailed: too many files, or too deep.
    """
    with _folder(root, path) as descriptor:
        _copy(descriptor, target, files, depth=1)


def foreign_names(root: Path, path: Path) -> list[str]:
    """Return the names in the folder `path`, which lies below `root`; none if it is not there or reached by a link."""
    try:
        with _folder(root, path) as descriptor:
            return sorted(os.listdir(descriptor))
    except OSError:
        return []


@contextmanager
def _folder(root: Path, path: Path) -> Iterator[int]:
    descriptor = os.open(root, _FOLDER_FLAGS)
    try:
        for name in path.relative_to(root).parts:
            inner = os.open(name, _FOLDER_FLAGS, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _copy(source: int, target: Path, files: FileSystem, *, depth: int) -> None:
    names = sorted(os.listdir(source))
    if len(names) > _MAX_FILES or depth > _MAX_DEPTH:
        raise StorageFailed(
            f"what was trained is a folder of {len(names)} files at depth {depth}; the limits are {_MAX_FILES} and "
            f"{_MAX_DEPTH}"
        )
    files.make_dir(target)
    for name in names:
        if stat.S_ISDIR(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
            inner = os.open(name, _FOLDER_FLAGS, dir_fd=source)
            try:
                _copy(inner, target / name, files, depth=depth + 1)
            finally:
                os.close(inner)
        else:
            _copy_file(source, name, target / name, files)
    files.sync_dir(target)


def _copy_file(source: int, name: str, target: Path, files: FileSystem) -> None:
    with os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=source), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
            raise OSError(errno.EINVAL, "not a regular file with one name")
        descriptor = files.create(target)
        try:
            while chunk := file.read(_COPY_BYTES):
                files.write(descriptor, chunk)
        finally:
            files.close(descriptor)
    files.sync_file(target)
