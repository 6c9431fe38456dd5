"""The journal of a shared store: damage is named, power loss and kill -9 lose nothing that was acknowledged."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.errors import StorageFailed, StoreFull
from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.registry_changes import Everything
from tests.live_server import REPO_ROOT
from tests.store.recording import CrashModel, Event, Node, RecordingFileSystem, _file_states
from tests.store.registry_cases import new, open_alone, set_alias

NUM_KILLS = 40


def entry(store: Path, number: int) -> Path:
    return store / "journal" / f"{number:012d}"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Return a store whose journal has the entries 0 to 3."""
    registry = open_alone(tmp_path)
    for letter in "abc":
        registry.publish(new(digest=letter))
    assert registry.number == 3
    return tmp_path


def test_a_flipped_bit_is_named(written: Path) -> None:
    data = bytearray(entry(written, 2).read_bytes())
    data[100] ^= 1
    entry(written, 2).write_bytes(data)
    with pytest.raises(StorageFailed, match=r"change 2 .* damaged.*000000000002"):
        open_alone(written)


def test_a_truncated_or_emptied_entry_is_named(written: Path) -> None:
    for size in (0, 10, 80):
        entry(written, 3).write_bytes(entry(written, 3).read_bytes()[:size])
        with pytest.raises(StorageFailed, match=r"change 3 .* damaged"):
            open_alone(written)


def test_a_missing_entry_is_named_and_its_number_not_given_again(written: Path) -> None:
    living = open_alone(written)
    entry(written, 2).unlink()
    with pytest.raises(StorageFailed, match=r"change 2 .* missing, change 3 is there"):
        open_alone(written)
    # who has followed it already goes on
    assert living.publish(new()).version == 4


def test_who_has_not_read_a_lost_entry_does_not_give_its_number_again(tmp_path: Path) -> None:
    ahead, behind = open_alone(tmp_path), open_alone(tmp_path)
    for _ in range(2):
        ahead.publish(new())
    entry(tmp_path, 1).unlink()
    with pytest.raises(StorageFailed, match=r"change 1 .* missing, change 2 is there"):
        behind.publish(new())
    assert not entry(tmp_path, 1).exists()


def test_a_fold_is_its_own_checkpoint_though_others_publish_meanwhile(written: Path) -> None:
    folding, other = open_alone(written), open_alone(written)
    held, num_times = folding._journal.lock.held, 0

    def after_another() -> contextlib.AbstractContextManager[None]:
        nonlocal num_times
        num_times += 1
        if num_times == 2:
            other.publish(new("de"))
        return held()

    folding._journal.lock.held = after_another  # type: ignore[method-assign]
    assert folding.fold(retired_since=0) == 3 and num_times == 2
    assert open_alone(written).everything() == other.everything()
    assert open_alone(written).publish(new()).version == 4


def test_an_entry_in_another_place_is_named(written: Path) -> None:
    shutil.copyfile(entry(written, 1), entry(written, 2))
    with pytest.raises(StorageFailed, match=r"change 2 .* unknown form"):
        open_alone(written)


def test_an_altered_entry_breaks_the_chain_even_with_a_right_checksum(written: Path) -> None:
    payload = entry(written, 2).read_bytes().partition(b" ")[2].rstrip(b"\n").replace(b'"rank":4', b'"rank":5')
    entry(written, 2).write_bytes(hashlib.sha256(payload).hexdigest().encode() + b" " + payload + b"\n")
    with pytest.raises(StorageFailed, match=r"change 3 .* does not follow change 2"):
        open_alone(written)


def test_an_entry_of_a_newer_release_is_refused(written: Path) -> None:
    payload = entry(written, 3).read_bytes().partition(b" ")[2].rstrip(b"\n").replace(b'"published"', b'"leased"')
    entry(written, 3).write_bytes(hashlib.sha256(payload).hexdigest().encode() + b" " + payload + b"\n")
    with pytest.raises(StorageFailed, match="update this server"):
        open_alone(written)


class FailingFileSystem(LinkingFileSystem):
    """Fails the n-th call that changes the disk, as a full disk does."""

    def __init__(self) -> None:
        self.calls_left = -1

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise OSError(28, "No space left on device")

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        self._count()
        super().write(descriptor, data)

    def sync_file(self, path: Path) -> None:
        self._count()
        super().sync_file(path)

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)

    def sync_dir(self, path: Path) -> None:
        self._count()
        super().sync_dir(path)


def test_a_disk_that_fails_at_any_call_publishes_at_most_what_all_see(tmp_path: Path) -> None:
    files = FailingFileSystem()
    registry = open_alone(tmp_path, files)
    known: list[int] = []
    for call in range(1, 6):
        files.calls_left = call
        with pytest.raises(StoreFull):
            registry.publish(new())
        files.calls_left = -1
        known.append(registry.publish(new()).version)
    # the fifth call is the folder's sync: its entry had its name already, and a number is never given twice
    assert known == [1, 2, 3, 4, 6]
    assert open_alone(tmp_path).everything() == registry.everything()


def test_without_any_lock_a_number_still_goes_to_one_writer(tmp_path: Path) -> None:
    sides = [open_alone(tmp_path) for _ in range(4)]
    numbers: list[int] = []
    for side in sides:
        side._journal.lock.held = contextlib.nullcontext  # type: ignore[method-assign]

    def publish(number: int) -> None:
        numbers.extend(sides[number].publish(new(f"n{number}")).version for _ in range(12))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == sorted([*range(1, 13)] * 4)
    assert open_alone(tmp_path).number == 48


class RecordingLinks(RecordingFileSystem, LinkingFileSystem):
    """Writes the links down too."""

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.events.append(Event("link", source, target))


class SkipsFileSync(RecordingLinks):
    def sync_file(self, path: Path) -> None:
        return


class SkipsFolderSync(RecordingLinks):
    def sync_dir(self, path: Path) -> None:
        return


class JournalModel(CrashModel):
    """What a power loss may leave of the journal's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.tree = Node(is_dir=True)

    def apply(self, event: Event) -> None:
        if event.kind == "link":
            self._folder(event.target).entries[event.target.name] = self._node(event.path)
        else:
            super().apply(event)

    def files(self) -> Iterator[dict[str, bytes]]:
        """Yield every possible content of the folder."""
        return _file_states(self.tree)


def lost_by_power(tmp_path: Path, files: RecordingLinks) -> str:
    """Publish, alias, delete and fold on a recorded disk; return what a power loss would lose or break."""
    store = tmp_path / "store"
    registry = open_alone(store, files)
    files.events = [event for event in files.events if event.path != store and event.kind != "make_dir"]
    states = [registry.everything()]
    for change in (
        lambda: registry.publish(new("a", "1")),
        lambda: registry.publish(new("b", "2")),
        lambda: set_alias(registry, "a", "prod", 1),
        lambda: registry.fold(retired_since=0),
        lambda: registry.publish(new("b", "3")),
    ):
        change()
        states.append(registry.everything())
        files.events.append(Event("ack"))
    model, num_acks, seen = JournalModel(store / "journal"), 0, set[str]()
    for number, event in enumerate(files.events):
        if event.kind == "ack":
            num_acks += 1
        else:
            model.apply(event)
        for content in model.files():
            key = f"{num_acks} {sorted(content.items())}"
            if key in seen or (num_acks == 0 and "000000000000" not in content):
                continue
            seen.add(key)
            if found := judge(tmp_path / "crashed", content, states[num_acks : num_acks + 2]):
                return f"after call {number} ({event.kind}): {found}"
    assert len(seen) > 20
    return ""


def judge(store: Path, content: dict[str, bytes], allowed: list[Everything]) -> str:
    folder = store / "journal"
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    try:
        registry = open_alone(store)
        if registry.everything() not in allowed:
            return f"{registry.everything()} is neither what was acknowledged nor that and the change under way"
        registry.publish(new("after"))
        return ""
    except StorageFailed as error:
        return error.message
    finally:
        shutil.rmtree(store)


def test_no_power_loss_loses_an_acknowledged_change(tmp_path: Path) -> None:
    assert lost_by_power(tmp_path, RecordingLinks()) == ""


@pytest.mark.parametrize("bug", [SkipsFileSync, SkipsFolderSync])
def test_the_search_finds_a_missing_sync(tmp_path: Path, bug: type[RecordingLinks]) -> None:
    assert lost_by_power(tmp_path, bug())


def test_kill_9_loses_no_acknowledged_version_and_damages_nothing(tmp_path: Path) -> None:
    choose = random.Random(5)
    store, acknowledged = tmp_path / "store", {"x": 0, "y": 0}
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.store.journal_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPO_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        text=True,
    )
    assert zygote.stdin is not None and zygote.stdout is not None
    try:
        for number in range(NUM_KILLS):
            logs = {name: tmp_path / f"{name}{number}" for name in acknowledged}
            pids = []
            for name, log in logs.items():
                log.touch()
                zygote.stdin.write(f"{store}\t{log}\t{name}\n")
                zygote.stdin.flush()
                pids.append(int(zygote.stdout.readline()))
            _kill_after(pids, logs["x"], choose.randrange(6), choose.uniform(0, 0.003))
            registry = open_alone(store)
            for name, log in logs.items():
                told = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("ack")]
                acknowledged[name] = max([acknowledged[name], *told])
                found = [version.version for version in registry.versions(name)]
                # every number once, none lost; at most one more, whose answer was under way
                assert found == list(range(1, len(found) + 1))
                assert acknowledged[name] <= len(found)
                acknowledged[name] = len(found)
        assert sum(acknowledged.values()) > NUM_KILLS
    finally:
        zygote.stdin.close()
        zygote.stdout.close()
        zygote.wait(120)


def _kill_after(pids: list[int], log: Path, num_lines: int, delay_s: float) -> None:
    deadline = time.monotonic() + 120
    while log.read_bytes().count(b"\n") < num_lines:
        assert time.monotonic() < deadline, "the worker hangs"
        time.sleep(0.0003)
    time.sleep(delay_s)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a killed worker is still there"
        time.sleep(0.0003)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_journal_needs_a_folder_it_can_write(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"")
    with pytest.raises(StorageFailed):
        Journal(tmp_path / "journal", LinkingFileSystem())
