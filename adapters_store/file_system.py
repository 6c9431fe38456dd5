"""Every change the store makes to the disk, one method per system call, so that tests can record or fail each one.

Owns flags and modes (O_EXCL, O_NOFOLLOW, 0600, 0700); decides nothing. Invariant: no file is ever opened through a
link or overwritten in place.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


class FileSystem:
    """The real disk. Every method may raise OSError."""

    def make_dir(self, path: Path) -> None:
        """Create a folder that only the owner enters."""
        os.mkdir(path, 0o700)

    def create(self, path: Path) -> int:
        """Create a new file for writing and return its descriptor; an existing one is an error."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def close(self, descriptor: int) -> None:
        """Close a descriptor of `create`."""
        os.close(descriptor)

    def sync_file(self, path: Path) -> None:
        """Make the file's bytes durable."""
        self._sync(path, os.O_RDONLY | os.O_NOFOLLOW)

    def sync_dir(self, path: Path) -> None:
        """Make the folder's entries durable."""
        self._sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within the file system; replaces a file, never a folder that holds something."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name; readers that have it open keep their bytes."""
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder of the store and all it holds; links are removed, not followed."""
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                self.remove_tree(Path(entry.path))
            else:
                self.unlink(Path(entry.path))
        self.remove_dir(path)

    @staticmethod
    def _sync(path: Path, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a file holds."""

    num_bytes: int
    sha256: str


def write_pieces(files: FileSystem, path: Path, pieces: Iterable[bytes], *, max_bytes: int) -> WrittenFile:
    """Write a new file, without syncing it, and return what came; no piece behind `max_bytes` is written.

    Raises:
        OSError: the disk, or the file exists. What `pieces` raises.
    """
    hashed, num_bytes = hashlib.sha256(), 0
    descriptor = files.create(path)
    try:
        for piece in pieces:
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                break
            hashed.update(piece)
            files.write(descriptor, piece)
    finally:
        files.close(descriptor)
    return WrittenFile(num_bytes, hashed.hexdigest())


def open_regular(path: Path, *, is_trusted: bool = False) -> BinaryIO:
    """Open a file for reading, refusing with OSError what is not a regular file.

    Args:
        is_trusted: also follow links and take files with several names; never for what a stranger put there.
    """
    # O_NONBLOCK: opening a FIFO must not wait for its writer
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if is_trusted else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or (facts.st_nlink != 1 and not is_trusted):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file with one name")
    return os.fdopen(descriptor, "rb")
