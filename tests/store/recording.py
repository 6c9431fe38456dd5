"""A file system that records what it is asked, and the disk that a power loss would leave after any of its calls.

Owns the model of what is durable: bytes after a sync of their file, names after a sync of their folder; everything
else may be there, be there in part, or be missing, in any combination. A rename is atomic but not durable.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.file_system import FileSystem


@dataclass(frozen=True)
class Event:
    """One call, or one of the client's milestones: `kind` is the method's name, "pointer" or "ack"."""

    kind: str
    path: Path = Path()
    target: Path = Path()
    data: bytes = b""


class RecordingFileSystem(FileSystem):
    """The real disk, with every change written down in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._paths: dict[int, Path] = {}

    def make_dir(self, path: Path) -> None:
        super().make_dir(path)
        self.events.append(Event("make_dir", path))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self.events.append(Event("create", path))
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        super().write(descriptor, data)
        self.events.append(Event("write", self._paths[descriptor], data=bytes(data)))

    def sync_file(self, path: Path) -> None:
        super().sync_file(path)
        self.events.append(Event("sync_file", path))

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        self.events.append(Event("sync_dir", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.events.append(Event("rename", source, target))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.events.append(Event("unlink", path))

    def remove_dir(self, path: Path) -> None:
        super().remove_dir(path)
        self.events.append(Event("remove_dir", path))


@dataclass(eq=False)
class Node:
    """A file or folder: what programs see, and what is durable."""

    is_dir: bool
    data: bytes = b""
    durable: bytes = b""
    entries: dict[str, "Node"] = field(default_factory=dict)
    durable_entries: dict[str, "Node"] = field(default_factory=dict)

    def pending(self) -> list[str]:
        """Return the names whose durable entry differs from the visible one."""
        names = self.entries.keys() | self.durable_entries.keys()
        return sorted(name for name in names if self.entries.get(name) is not self.durable_entries.get(name))


class CrashModel:
    """Replays events over an empty folder and enumerates what a power loss may leave of `objects/`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.tree = Node(is_dir=True)
        for name in ("objects", "staging"):
            node = Node(is_dir=True)
            self.tree.entries[name] = self.tree.durable_entries[name] = node

    def apply(self, event: Event) -> None:
        """Advance by one event; the milestones change nothing here."""
        match event.kind:
            case "make_dir" | "create":
                self._folder(event.path).entries[event.path.name] = Node(is_dir=event.kind == "make_dir")
            case "write":
                self._node(event.path).data += event.data
            case "sync_file":
                node = self._node(event.path)
                node.durable = node.data
            case "sync_dir":
                node = self._node(event.path)
                node.durable_entries = dict(node.entries)
            case "rename":
                node = self._folder(event.path).entries.pop(event.path.name)
                self._folder(event.target).entries[event.target.name] = node
            case "unlink" | "remove_dir":
                del self._folder(event.path).entries[event.path.name]

    def crash_states(self) -> Iterator[dict[str, dict[str, bytes]]]:
        """Yield every possible content of `objects/` after a power loss now: digest -> file name -> bytes."""
        objects = self.tree.entries["objects"]
        for top in _choices(objects):
            per_object = [[(name, files) for files in _file_states(node)] for name, node in sorted(top.items())]
            for combination in itertools.product(*per_object):
                yield dict(combination)

    def _node(self, path: Path) -> Node:
        node = self.tree
        for part in path.relative_to(self._root).parts:
            node = node.entries[part]
        return node

    def _folder(self, path: Path) -> Node:
        return self._node(path.parent)


def _choices(folder: Node) -> Iterator[dict[str, Node]]:
    """Yield every mixture of old and new entries: each unsynced name by itself may have reached the disk."""
    pending = folder.pending()
    for is_new in itertools.product((False, True), repeat=len(pending)):
        chosen = {name: node for name, node in folder.entries.items() if name not in pending}
        for name, new in zip(pending, is_new, strict=True):
            node = (folder.entries if new else folder.durable_entries).get(name)
            if node is not None:
                chosen[name] = node
        yield chosen


def _file_states(folder: Node) -> Iterator[dict[str, bytes]]:
    for entries in _choices(folder):
        names = sorted(entries)
        for contents in itertools.product(*(_contents(entries[name]) for name in names)):
            yield dict(zip(names, contents, strict=True))


def _contents(file: Node) -> list[bytes]:
    """Return what an unsynced file may hold: what was synced before, half of the new bytes, all of them."""
    if file.data == file.durable:
        return [file.data]
    return [file.durable, file.data[: len(file.data) // 2], file.data]
