"""The folders of uploads that are on their way: what dead owners left, and which objects living ones still need.

Owns the reading of `staging/` under the store's lock. Invariant: a folder whose owner lives is never touched, and an
object that such a folder holds is never removed.
"""

import os
from pathlib import Path

from adapters_store.file_system import FileSystem
from adapters_store.locks import lock_folder

_HOLD_PREFIX = "holds-"


class Staging:
    """All staging folders of one store, of all processes. Callers hold the store's lock."""

    def __init__(self, root: Path, files: FileSystem) -> None:
        self.root = root
        self._files = files

    def sweep(self) -> None:
        """Remove the folders whose owner died; raises OSError."""
        for folder in list(self.root.iterdir()):
            self._sweep(folder)

    def held(self, *, but: Path | None = None) -> set[str]:
        """Return the digests of objects that uploads hold while they are probed; without those of one folder."""
        return {digest for folder in list(self.root.iterdir()) if folder != but for digest in _held_in(folder)}

    def _sweep(self, folder: Path) -> None:
        try:
            lock = lock_folder(folder)
        except OSError:
            # its owner removed it meanwhile
            return
        if lock is None:
            return
        try:
            self._files.remove_tree(folder)
        except OSError:
            # a converter that outlived its server still writes there: the next sweep takes it
            return
        finally:
            os.close(lock)


def _held_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        # its owner removed it meanwhile, for which nobody needs the lock
        return []
    return [name.removeprefix(_HOLD_PREFIX) for name in names if name.startswith(_HOLD_PREFIX)]


def hold(folder: Path, digest: str, files: FileSystem) -> None:
    """Let a staging folder hold an object that no version points to yet; raises OSError.

    A power loss may forget it: its owner is dead then, and the object is swept as it should be.
    """
    files.close(files.create(folder / f"{_HOLD_PREFIX}{digest}"))
