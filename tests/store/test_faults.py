"""A disk that fails: EIO and ENOSPC at every single call of an upload, a replacement, a deletion and a sweep.

Each time the caller gets one clear error or success, what was stored before stays whole, and a healthy store goes on.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.errors import StorageFailed, StoreError, StoreFull
from adapters_store.file_system import FileSystem
from adapters_store.registry import AdapterVersion, Check, NewVersion, take_all
from tests.store.checker import Expected, judge
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder

NAMES = ["a", "b"]


class FaultyFileSystem(FileSystem):
    """Raises at the call number `fail_at` (from 1); afterwards the disk works again, or stays broken."""

    def __init__(self) -> None:
        self.fail_at = 0
        self.error = errno.EIO
        self.stays_broken = False
        self.num_calls = 0

    def _call(self) -> None:
        self.num_calls += 1
        is_hit = self.fail_at and (
            self.num_calls >= self.fail_at if self.stays_broken else self.num_calls == self.fail_at
        )
        if is_hit:
            raise OSError(self.error, os.strerror(self.error))

    def make_dir(self, path: Path) -> None:
        self._call()
        super().make_dir(path)

    def create(self, path: Path) -> int:
        self._call()
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        # a full disk takes a part of the bytes
        super().write(descriptor, memoryview(data)[: len(data) // 2])
        self._call()
        super().write(descriptor, memoryview(data)[len(data) // 2 :])

    def sync_file(self, path: Path) -> None:
        self._call()
        super().sync_file(path)

    def sync_dir(self, path: Path) -> None:
        self._call()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._call()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._call()
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        self._call()
        super().remove_dir(path)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Return two uploads."""
    config = lora_config(r=1, target_modules=["k_proj"])
    first, second = (
        write_folder(tmp_path / str(seed), config, lora_tensors(rank=1, sites=("k_proj",), seed=seed))
        for seed in (1, 2)
    )
    yield first, second


@pytest.mark.parametrize("stays_broken", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_fault_at_every_call_of_a_replacement_leaves_the_old_version(
    error: int, stays_broken: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    files = FaultyFileSystem()
    files.error, files.stays_broken = error, stays_broken
    store = open_store(tmp_path / "store", files=files)
    expected = Expected()
    first = store.put_dir("a", folders[0])
    expected.acknowledge_put("a", 1, first.digest)
    num_failed = 0
    for fail_at in range(1, 100):
        files.num_calls, files.fail_at = 0, fail_at
        try:
            version = store.put_dir("b", folders[1])
        except StoreError as refusal:
            num_failed += 1
            assert isinstance(refusal, StorageFailed if error == errno.EIO else StoreFull)
            assert refusal.http_status == (500 if error == errno.EIO else 507)
            assert str(tmp_path) not in refusal.message
        else:
            expected.acknowledge_put("b", version.version, version.digest)
        was_hit, files.fail_at = files.num_calls >= fail_at, 0
        assert judge(tmp_path / "store", expected, NAMES).violations == []
        if not was_hit:
            break
        if "b" in expected.versions:
            store.delete("b")
            expected.acknowledge_delete("b")
    else:
        pytest.fail("an upload makes fewer than 100 calls")
    assert num_failed >= 10
    store.close()


def test_a_fault_in_a_sweep_is_reported_and_the_next_sweep_finishes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = FaultyFileSystem()
    now = [1_000_000.0]
    store = open_store(tmp_path / "store", files=files, clock=lambda: now[0])
    kept = store.put_dir("b", folders[1])
    for fail_at in range(1, 4):
        store.put_dir("a", folders[0])
        store.delete("a")
        now[0] += 7200
        files.num_calls, files.fail_at = 0, fail_at
        with pytest.raises(StorageFailed):
            store.sweep()
        files.fail_at = 0
        store.sweep()
        assert [path.name for path in (tmp_path / "store" / "objects").iterdir()] == [kept.digest]
    store.close()


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_registry_that_fails_at_the_pointer_never_leaves_half_an_adapter(
    is_durable: bool, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store")
    publish = store._registry.publish

    def failing(new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
        if is_durable:
            publish(new, check=check)
        raise StorageFailed("the disk under the registry failed")

    with monkeypatch.context() as patched:
        patched.setattr(store._registry, "publish", failing)
        with pytest.raises(StorageFailed):
            store.put_dir("a", folders[0])
    # an unanswered upload may have happened; then it is whole
    verdict = judge(tmp_path / "store", Expected(unanswered={"a": "put"}), NAMES)
    assert verdict.violations == []
    assert bool(verdict.found) == is_durable
    assert len(list((tmp_path / "store" / "objects").iterdir())) == int(is_durable)
    store.close()


def test_a_full_disk_while_converting_is_store_full(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def full(source: Path, target: Path, options: ConvertOptions) -> None:
        convert_peft(source, target, options)
        raise StoreFull("the adapter store's disk is full")

    store = open_store(tmp_path / "store", convert=full)
    with pytest.raises(StoreFull) as refusal:
        store.put_dir("a", folders[0])
    assert (refusal.value.http_status, refusal.value.code) == (507, "quota_exceeded")
    assert list((tmp_path / "store" / "staging").iterdir()) == []
    store.close()


def test_a_converter_that_writes_something_else_is_not_believed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tamper: list[Callable[[Path], object]] = []

    def tampering(source: Path, target: Path, options: ConvertOptions) -> None:
        convert_peft(source, target, options)
        tamper[-1](target)

    store = open_store(tmp_path / "store", convert=tampering)
    image, manifest = "adapter.safetensors", "adapter.json"

    def flip(path: Path, position: int) -> None:
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1
        path.write_bytes(raw)

    def link(target: Path) -> None:
        (target / image).rename(tmp_path / "elsewhere")
        (target / image).symlink_to(tmp_path / "elsewhere")

    changes: list[Callable[[Path], object]] = [
        lambda target: flip(target / image, -1),
        lambda target: flip(target / image, 20),
        lambda target: flip(target / manifest, 10),
        lambda target: (target / manifest).write_bytes(b" " + (target / manifest).read_bytes()),
        lambda target: (target / image).unlink(),
        lambda target: (target / manifest).unlink(),
        lambda target: (target / manifest).write_bytes((target / manifest).read_bytes().replace(b'"lora"', b'"lore"')),
        link,
    ]
    for change in changes:
        tamper.append(change)
        with pytest.raises(StoreError):
            store.put_dir("a", folders[0])
        assert store.list() == [] and list((tmp_path / "store" / "objects").iterdir()) == []
    store.close()
