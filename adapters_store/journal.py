"""The journal of a shared store: every change of its names, in order, one small file per change in the shared folder.

Owns the files under `journal/`; what a change means is `registry_changes`' business. It is the truth that replicas and
Redis follow, so a registry can always be rebuilt from it. Invariants: a numbered file appears whole, is durable before
`append` returns and never changes; exactly one of several writers gets a number (a hard link either makes a name or
fails, on network file systems too); each entry holds the SHA-256 of the one before, so a missing, altered or exchanged
one is found.
"""

import errno
import hashlib
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from adapters_store.errors import StorageFailed, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.locks import StoreLock

# what an entry follows when nothing was before it
NOTHING_BEFORE = "0" * 64

_CHECKPOINT = "checkpoint"
_TEMPORARY = ".new-"


class LinkingFileSystem(FileSystem):
    """The real disk with one more call: a second name for a file, which fails if the name exists."""

    def link(self, source: Path, target: Path) -> None:
        """Give a file another name; raises FileExistsError."""
        os.link(source, target, follow_symlinks=False)


class Journal:
    """The numbered entries of one store, from 0 on. Any number of processes may append; nobody overwrites."""

    def __init__(self, root: Path, files: LinkingFileSystem) -> None:
        self._root = root
        self._files = files
        with storage_errors():
            with suppress(FileExistsError):
                files.make_dir(root)
            # also when somebody else made it: whoever that was may have died before this
            files.sync_dir(root.parent)
            files.sync_dir(root)
        self.lock = StoreLock(root / "lock")

    def append(self, number: int, payload: bytes) -> bool:
        """Write entry `number` durably; False if somebody else has written it. Callers hold `lock`.

        An error after the entry got its name leaves the entry there: others may have followed it already.
        Raises:
            StorageFailed, StoreFull: the disk failed; the entry may or may not be there.
        """
        line = hashlib.sha256(payload).hexdigest().encode() + b" " + payload + b"\n"
        with storage_errors():
            return self._create(self._path(number), line)

    def read(self, number: int) -> bytes | None:
        """Return the payload of an entry, None if there is none (yet, or any more).

        Raises:
            StorageFailed: it is damaged or cannot be read.
        """
        try:
            line = _read_file(self._path(number))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageFailed(f"change {number} of the store's journal cannot be read; try again later") from error
        claimed, _, payload = line.removesuffix(b"\n").partition(b" ")
        if hashlib.sha256(payload).hexdigest().encode() != claimed:
            raise StorageFailed(
                f"change {number} of the store's journal is damaged; "
                f"restore {self._root.name}/{number:012d} from a backup"
            )
        return payload

    def checkpoint(self) -> int:
        """Return the number of the newest entry that holds everything before it; 0: begin at the beginning."""
        try:
            text = _read_file(self._root / _CHECKPOINT)
            return int(text)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise StorageFailed(
                f"the journal's checkpoint is damaged; restore {self._root.name}/checkpoint from a backup"
            ) from error

    def forget_before(self, number: int) -> int:
        """Let readers begin at entry `number`, remove those between it and entry 0, and return how many those were.

        Callers hold `lock`. A crash in between leaves entries that nobody reads; the next call removes them.
        """
        with storage_errors():
            temporary = self._write_temporary(b"%d\n" % number)
            self._files.rename(temporary, self._root / _CHECKPOINT)
            self._files.sync_dir(self._root)
            old = [each for each in self.numbers() if 0 < each < number]
            for each in old:
                self._files.unlink(self._path(each))
            for path in self._root.glob(f"{_TEMPORARY}*"):
                self._files.unlink(path)
        return len(old)

    def numbers(self) -> list[int]:
        """Return the numbers of all entries in the folder, in order; raises OSError."""
        return sorted(int(entry.name) for entry in os.scandir(self._root) if entry.name.isdecimal())

    def _create(self, path: Path, data: bytes) -> bool:
        temporary = self._write_temporary(data)
        try:
            self._files.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            self._files.unlink(temporary)
        self._files.sync_dir(self._root)
        return True

    def _write_temporary(self, data: bytes) -> Path:
        temporary = self._root / f"{_TEMPORARY}{uuid.uuid4().hex}"
        descriptor = self._files.create(temporary)
        try:
            self._files.write(descriptor, data)
        finally:
            self._files.close(descriptor)
        self._files.sync_file(temporary)
        return temporary

    def _path(self, number: int) -> Path:
        return self._root / f"{number:012d}"


def _read_file(path: Path) -> bytes:
    # a crash between link and unlink leaves a second name, so the number of names says nothing here
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read()
