"""Power loss: every disk state that any prefix of the store's calls may leave is reopened and judged.

Exhaustive for upload, replacement, re-upload, deletion and sweep of small adapters; the same search finds every one of
the planted bugs of `BUGS`.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters_store.blobs import Blobs
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.file_system import FileSystem
from adapters_store.formats import Declared
from adapters_store.proof import NO_ENGINE, Proving
from adapters_store.registry import AdapterVersion, Check, NewVersion, take_all
from adapters_store.registry_sqlite import SqliteRegistry
from adapters_store.store import AdapterStore
from adapters_store.upload import Upload
from tests.store.checker import Expected, judge, registry_bytes
from tests.store.folders import TINY, lora_config, lora_tensors, write_folder
from tests.store.recording import CrashModel, Event, RecordingFileSystem

IMAGE = "adapter.safetensors"


@dataclass(frozen=True)
class Told:
    """What the client did ("try put") or learnt ("ack put", "ack del")."""

    what: str
    name: str
    version: int = 0
    digest: str = ""


class Run:
    """One client's morning on a recorded store: what was called, and what the client was told in between."""

    def __init__(
        self, root: Path, files: RecordingFileSystem, store_type: type[AdapterStore], registry_states: list[bytes]
    ) -> None:
        self.root = root
        self.files = files
        self.registry_states = registry_states
        self.now = 1_000_000.0
        self.told: list[Told] = []
        self.store = store_type.open(
            root, TINY, image_dtype="float32", files=files, convert=self._convert, clock=lambda: self.now
        )
        assert isinstance(self.store._registry, SqliteRegistry)
        self.registry = self.store._registry
        self._record_pointers()

    def put(self, name: str, folder: Path, proving: Proving = NO_ENGINE) -> None:
        self.tell(Told("try put", name))
        version = self.store.put_dir(name, folder, proving=proving)
        self.tell(Told("ack put", name, version.version, version.digest))

    def delete(self, name: str) -> None:
        self.tell(Told("try del", name))
        self.store.delete(name)
        self._record_pointer()
        self.tell(Told("ack del", name))

    def tell(self, told: Told) -> None:
        self.told.append(told)
        self.files.events.append(Event("told", data=str(len(self.told)).encode()))

    def _convert(self, source: Path, target: Path, options: ConvertOptions) -> None:
        """Convert aside, then write the result through the recorder, as if the converter's writes were ours."""
        with tempfile.TemporaryDirectory() as aside:
            convert_peft(source, Path(aside), options)
            for path in sorted(Path(aside).iterdir()):
                descriptor = self.files.create(target / path.name)
                self.files.write(descriptor, path.read_bytes())
                self.files.close(descriptor)

    def _record_pointers(self) -> None:
        publish = self.registry.publish

        def recorded(new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
            version = publish(new, check=check)
            self._record_pointer()
            return version

        self.registry.publish = recorded  # type: ignore[method-assign]

    def _record_pointer(self) -> None:
        self.registry_states.append(registry_bytes(self.registry))
        self.files.events.append(Event("pointer"))


class SkipsImageSync(RecordingFileSystem):
    def sync_file(self, path: Path) -> None:
        if path.name != IMAGE:
            super().sync_file(path)


class SkipsManifestSync(RecordingFileSystem):
    def sync_file(self, path: Path) -> None:
        if path.name == IMAGE:
            super().sync_file(path)


class SkipsStagedFolderSync(RecordingFileSystem):
    def sync_dir(self, path: Path) -> None:
        if path.name != "object":
            super().sync_dir(path)


class SkipsObjectsFolderSync(RecordingFileSystem):
    def sync_dir(self, path: Path) -> None:
        if path.name != "objects":
            super().sync_dir(path)


class SyncsBeforeTheRename(Blobs):
    def publish(self, staged: Path, digest: str) -> None:
        self._files.sync_dir(self.root)
        if not (self.root / digest).is_dir():
            self._files.rename(staged, self.root / digest)


class WritesInPlace(Blobs):
    """Copies into the visible folder instead of renaming, and believes any folder it finds there."""

    def publish(self, staged: Path, digest: str) -> None:
        target = self.root / digest
        if target.is_dir():
            return
        self._files.make_dir(target)
        for path in sorted(staged.iterdir()):
            descriptor = self._files.create(target / path.name)
            self._files.write(descriptor, path.read_bytes())
            self._files.close(descriptor)
        self._files.sync_dir(self.root)


def store_with(blobs: type[Blobs]) -> type[AdapterStore]:
    class Planted(AdapterStore):
        def __init__(self, root: Path, *arguments: object, files: FileSystem, **options: object) -> None:
            super().__init__(root, *arguments, files=files, **options)  # type: ignore[arg-type]
            self._blobs = blobs(root / "objects", files)

    return Planted


class PointerBeforeObject(AdapterStore):
    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        publish, blobs = self._blobs.publish, self._blobs
        pairs: list[tuple[Path, str]] = []
        blobs.publish = lambda staged, digest: pairs.append((staged, digest))  # type: ignore[method-assign]
        try:
            return super()._commit(upload, name, declared)
        finally:
            blobs.publish = publish  # type: ignore[method-assign]
            for folder, digest in pairs:
                publish(folder, digest)


class RemovesBeforeThePointer(AdapterStore):
    def delete(self, name: str) -> None:
        self._blobs.remove(self.get(name).digest)
        super().delete(name)


class SweepsTheLiving(AdapterStore):
    def _needed(self, *, but: Path | None = None) -> set[str]:
        return set()


class NeverSweeps(AdapterStore):
    def sweep(self) -> None:
        return


class AcksBeforeThePointer(Run):
    def put(self, name: str, folder: Path, proving: Proving = NO_ENGINE) -> None:
        publish = self.registry.publish

        def told_early(new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
            self.tell(Told("ack put", name, 1, new.digest))
            return publish(new, check=check)

        self.registry.publish = told_early  # type: ignore[method-assign]
        super().put(name, folder)


Make = Callable[[Path, list[bytes]], Run]


def run_of(files: type[RecordingFileSystem], store: type[AdapterStore], run: type[Run] = Run) -> Make:
    return lambda root, states: run(root, files(), store, states)


SOUND = run_of(RecordingFileSystem, AdapterStore)
# name -> (the planted run, the store that reopens what it left)
BUGS: dict[str, tuple[Make, type[AdapterStore]]] = {
    "the image is not synced": (run_of(SkipsImageSync, AdapterStore), AdapterStore),
    "the manifest is not synced": (run_of(SkipsManifestSync, AdapterStore), AdapterStore),
    "the staged folder is not synced": (run_of(SkipsStagedFolderSync, AdapterStore), AdapterStore),
    "the objects folder is not synced": (run_of(SkipsObjectsFolderSync, AdapterStore), AdapterStore),
    "the sync comes before the rename": (run_of(RecordingFileSystem, store_with(SyncsBeforeTheRename)), AdapterStore),
    "files are written in place": (run_of(RecordingFileSystem, store_with(WritesInPlace)), AdapterStore),
    "the pointer comes before the object": (run_of(RecordingFileSystem, PointerBeforeObject), AdapterStore),
    "the bytes go before the pointer": (run_of(RecordingFileSystem, RemovesBeforeThePointer), AdapterStore),
    "the answer comes before the pointer": (
        run_of(RecordingFileSystem, AdapterStore, AcksBeforeThePointer),
        AdapterStore,
    ),
    "the sweep takes living objects": (SOUND, SweepsTheLiving),
    "nothing is swept": (SOUND, NeverSweeps),
}


def scenario(run: Run, folder: Path) -> None:
    """Upload, replace, upload the same bytes under another name, delete, sweep, upload again with a probe."""
    config = lora_config(r=1, target_modules=["k_proj"])
    first, second = (write_folder(folder / str(seed), config, tensors(seed)) for seed in (1, 2))
    run.put("a", first)
    run.put("a", second)
    run.put("b", first)
    run.delete("a")
    run.now += 7200
    run.store.sweep()
    run.put("c", second, lambda staged: {"digest": staged.digest})
    run.store.close()


def tensors(seed: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return lora_tensors(TINY, sites=("k_proj",), rank=1, seed=seed)


def search(make: Make, reopen: type[AdapterStore], folder: Path, *, stop_at_first: bool) -> tuple[int, list[str]]:
    """Run the scenario, then judge every state of every prefix; return how many, and what was wrong."""
    root = folder / "store"
    states: list[bytes] = []
    registry = SqliteRegistry(folder / "empty.sqlite")
    empty = registry_bytes(registry)
    registry.close()
    run = make(root, states)
    scenario(run, folder)
    model, expected, num_pointers, seen = CrashModel(root), Expected(), 0, set[tuple[object, ...]]()
    violations: list[str] = []
    for number, event in enumerate(run.files.events):
        model.apply(event)
        if event.kind == "pointer":
            num_pointers += 1
        elif event.kind == "told":
            advance(expected, run.told[int(event.data) - 1])
        pointers = states[num_pointers - 1] if num_pointers else empty
        for objects in model.crash_states():
            key = (num_pointers, repr(expected), repr(sorted((d, sorted(f.items())) for d, f in objects.items())))
            if key in seen:
                continue
            seen.add(key)
            found = judge_state(folder / "crashed", objects, pointers, expected, reopen)
            violations += [f"after call {number} ({event.kind} {event.path.name}): {line}" for line in found]
            if violations and stop_at_first:
                return len(seen), violations
    return len(seen), violations


def advance(expected: Expected, told: Told) -> None:
    match told.what:
        case "ack put":
            expected.acknowledge_put(told.name, told.version, told.digest)
        case "ack del":
            expected.acknowledge_delete(told.name)
        case _:
            expected.try_to(told.what[4:], told.name)


def judge_state(
    root: Path, objects: dict[str, dict[str, bytes]], pointers: bytes, expected: Expected, reopen: type[AdapterStore]
) -> list[str]:
    for name in ("objects", "staging/0123/object"):
        (root / name).mkdir(parents=True)
    (root / "registry.sqlite").write_bytes(pointers)
    for digest, files in objects.items():
        (root / "objects" / digest).mkdir()
        for name, data in files.items():
            (root / "objects" / digest / name).write_bytes(data)

    def open_it(path: Path, clock: Callable[[], float]) -> AdapterStore:
        return reopen.open(path, TINY, image_dtype="float32", convert=convert_peft, clock=clock)

    try:
        return judge(root, expected, ["a", "b", "c"], open_it).violations
    finally:
        shutil.rmtree(root)


def test_no_power_loss_tears_loses_or_orphans_anything(tmp_path: Path) -> None:
    num_states, violations = search(SOUND, AdapterStore, tmp_path, stop_at_first=False)
    assert violations == []
    assert num_states >= 20


@pytest.mark.parametrize("bug", BUGS)
def test_the_search_finds_a_planted_bug(bug: str, tmp_path: Path) -> None:
    make, reopen = BUGS[bug]
    _, violations = search(make, reopen, tmp_path, stop_at_first=True)
    assert violations, f"nobody noticed that {bug}"
