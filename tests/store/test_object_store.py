"""Adapters and journals in an S3-compatible store (moto's server): what is away, cut short, altered or raced for."""

import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
import pytest

from adapters_store.blob_cache import BlobCache, damage_of
from adapters_store.errors import AdapterCorrupt, InvalidOption, OwnerFull, StorageFailed, StoreAway, StoreError
from adapters_store.object_journal import ObjectJournal
from adapters_store.object_store import ObjectStore
from adapters_store.quotas import OwnerQuota
from adapters_store.registry_redis import SharedRegistry
from adapters_store.registry_replicas import open_remote
from adapters_store.store import AdapterStore
from adapters_store.upkeep_objects import collect_objects, verify_objects
from serve.tenants.key_store_journal import JournalKeyStore
from serve.tenants.keys import mint
from serve.tenants.principal import Scope
from tests.s3_server import S3Server
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder
from tests.store.registry_cases import Alone, new

PEPPER = b"p" * 32
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.close()


@pytest.fixture
def prefix(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return a prefix of the test's own; its environment names the server."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]


@pytest.fixture
def objects(server: S3Server, prefix: str) -> ObjectStore:
    # far beyond what an answer takes, also on a machine that does much else
    return ObjectStore(server.url(prefix), small_timeout_s=60.0)


def registry_over(objects: ObjectStore, *, kept_s: float = 3600.0) -> SharedRegistry:
    registry = SharedRegistry(ObjectJournal(objects, "journal", kept_s=kept_s))
    registry.connect(Alone())
    return registry


def replica(root: Path, objects: ObjectStore, *, cache_bytes: int = PLENTY) -> AdapterStore:
    """Open one replica's store: its own folder, the others' objects and journal."""
    store = open_store(root, registry=registry_over(objects))
    store.copies = BlobCache(root, objects, max_bytes=cache_bytes)
    return store


def put(store: AdapterStore, folder: Path, name: str, seed: int = 0) -> str:
    """Publish an adapter whose weights follow from a seed, and return its digest."""
    source = folder / f"seed{seed}"
    if not source.exists():
        write_folder(source, lora_config(), lora_tensors(seed=seed))
    return store.put_dir(name, source).digest


def catch_up(store: AdapterStore) -> None:
    assert store.shared is not None
    store.shared.catch_up()


# what an object store is asked


@pytest.mark.parametrize(
    "url",
    ["s3://", "https://bucket/x", "bucket", "s3://user:s3cret@bucket/x", "s3://bucket/x?a=b", "gs://bucket", ""],
)
def test_another_url_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(InvalidOption, match="s3://BUCKET/PREFIX") as refused:
        ObjectStore(url)
    assert "s3cret" not in str(refused.value)


def test_a_name_is_created_once(objects: ObjectStore) -> None:
    assert objects.create("j/1", b"mine\nof two lines")
    assert not objects.create("j/1", b"mine\nof two lines") and not objects.create("j/1", b"other")
    assert objects.read_created("j/1", max_bytes=100) == b"mine\nof two lines"
    assert objects.read_created("j/2", max_bytes=100) is None


def test_of_many_that_create_a_name_one_succeeds(objects: ObjectStore) -> None:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(objects.create("j/1", b"%d" % n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 7 + [True]


def test_a_lost_answer_to_a_creation_is_not_another_s(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written = obstore.put

    def lost_once(*args: object, **kwargs: object) -> object:
        written(*args, **kwargs)  # type: ignore[arg-type]
        # what the client's own second attempt finds
        return written(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("adapters_store.object_store.obstore.put", lost_once)
    assert objects.create("j/1", b"payload")


def test_a_store_that_is_gone_or_silent_is_one_clear_error_within_bounds(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = S3Server()
    try:
        for name, value in own.environment().items():
            monkeypatch.setenv(name, value)
        objects = ObjectStore(own.url(prefix), small_timeout_s=60.0)
        assert objects.create("j/1", b"x")
        own.freeze()
        with pytest.raises(StoreAway) as silent:
            ObjectStore(own.url(prefix), small_timeout_s=0.5).get("j/1", max_bytes=100)
        own.thaw()
    finally:
        own.close()
    for call in (lambda: objects.create("j/2", b"y"), lambda: list(objects.list("j")), lambda: objects.delete("j/1")):
        with pytest.raises(StoreAway) as gone:
            call()
    for refused in (silent.value, gone.value):
        assert (refused.http_status, refused.code) == (503, "store_unavailable") and refused.retry_after_s > 0
        assert "127.0.0.1" not in refused.message


# journals


def test_replicas_agree_through_objects_alone(objects: ObjectStore) -> None:
    registries = [registry_over(objects) for _ in range(3)]
    assert len({registry.store_id for registry in registries}) == 1

    def publish(registry: SharedRegistry, name: str) -> None:
        for letter in "abcd":
            registry.publish(new(name, letter))
            registry.publish(new("common", letter))

    threads = [threading.Thread(target=publish, args=(each, f"n{n}")) for n, each in enumerate(registries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for registry in registries:
        registry.catch_up()
    found = [registry.everything() for registry in (*registries, registry_over(objects))]
    assert found[1:] == found[:-1]
    # every number once, none left out: no version was given twice, and none was lost
    assert [version.version for version in registries[0].versions("common")] == list(range(1, 13))
    assert [version.version for version in registries[1].versions("n0")] == [1, 2, 3, 4]


def test_a_fold_lets_newcomers_and_the_far_behind_begin_there(
    objects: ObjectStore, server: S3Server, prefix: str
) -> None:
    one, behind = registry_over(objects, kept_s=0.0), registry_over(objects)
    for letter in "abc":
        one.publish(new(digest=letter))
    assert one.fold(retired_since=0) == 3
    assert one.publish(new("de")).version == 1
    # a look asks for the checkpoint every few seconds only, a change at once
    assert behind.publish(new("it")).version == 1
    one.catch_up()
    assert behind.everything() == one.everything() == registry_over(objects).everything()
    one.fold(retired_since=0)
    # a listing from the checkpoint on, under the prefix
    assert ObjectJournal(objects, "journal").numbers() == [7]
    assert [key for key in server.keys(prefix) if "checkpoints" in key] == ["journal-checkpoints/000000000007"]
    assert [key for key in server.keys(prefix) if key.startswith("journal/")] == [
        "journal/000000000000", "journal/000000000007"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data.replace(b'"rank":4', b'"rank":5'), bytes.upper]
)
def test_a_damaged_entry_is_named(objects: ObjectStore, server: S3Server, prefix: str, damage: object) -> None:
    registry_over(objects).publish(new())
    key = "journal/000000000001"
    altered = damage(server.read(prefix, key))  # type: ignore[operator]
    obstore.put(server.objects(prefix), key, altered)
    with pytest.raises(StorageFailed, match=r"change 1 .* damaged"):
        registry_over(objects)


def test_keys_lie_in_a_journal_of_objects_too(objects: ObjectStore, server: S3Server, prefix: str) -> None:
    one, other = (JournalKeyStore(ObjectJournal(objects, "keys"), PEPPER) for _ in range(2))
    text, record = mint("acme", frozenset({Scope.INFER}), PEPPER, now=1000, expires=None)
    one.add(record)
    assert other.snapshot().records == (record,)
    other.revoke(record.key_id, now=1500)
    assert one.version() == 2 and one.snapshot().records[0].revoked == 1500
    secret = text.encode()[20:84]
    assert all(secret not in server.read(prefix, key) for key in server.keys(prefix))


def test_a_folder_with_a_shared_store_of_its_own_holds_no_copies(tmp_path: Path, server: S3Server, prefix: str) -> None:
    SharedRegistry.open(tmp_path)
    with pytest.raises(InvalidOption, match="shared store of its own"):
        open_remote(tmp_path, server.url(prefix))


# adapters


def test_what_one_replica_publishes_another_fetches(tmp_path: Path, objects: ObjectStore) -> None:
    a, b = (replica(tmp_path / name, objects) for name in "ab")
    digest = put(a, tmp_path, "fr")
    catch_up(b)
    assert not (tmp_path / "b" / "objects" / digest).exists()
    assert bytes(b.open_image(digest).data) == bytes(a.open_image(digest).data)
    assert (tmp_path / "b" / "objects" / digest).is_dir() and list((tmp_path / "b" / "fetches").iterdir()) == []
    for store in (a, b):
        store.close()


def test_nothing_is_named_before_all_can_fetch_it(tmp_path: Path, objects: ObjectStore) -> None:
    a = replica(tmp_path / "a", objects)
    cache = a.copies
    assert isinstance(cache, BlobCache)

    def away(folder: Path, digest: str) -> None:
        raise StoreAway()

    cache.share = away  # type: ignore[method-assign]
    with pytest.raises(StoreAway):
        put(a, tmp_path, "fr")
    assert a.resolve("fr") is None and list((tmp_path / "a" / "staging").iterdir()) == []
    a.close()


def test_copies_are_served_while_the_object_store_is_away(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = S3Server()
    try:
        for name, value in own.environment().items():
            monkeypatch.setenv(name, value)
        objects = ObjectStore(own.url(prefix), small_timeout_s=60.0)
        a, b = (replica(tmp_path / name, objects) for name in "ab")
        known, unknown = put(a, tmp_path, "known", 1), put(a, tmp_path, "unknown", 2)
        catch_up(b)
        b.open_image(known)
    finally:
        own.close()
    assert b.open_image(known).digest == known and b.resolve("unknown") is not None
    with pytest.raises(StoreAway):
        b.open_image(unknown)
    with pytest.raises(StoreAway):
        put(b, tmp_path, "new", 3)
    for store in (a, b):
        store.close()


def test_a_damaged_copy_is_set_aside_and_fetched_again(tmp_path: Path, objects: ObjectStore) -> None:
    a = replica(tmp_path / "a", objects)
    digest = put(a, tmp_path, "fr")
    good = bytes(a.open_image(digest).data)
    for number, name in enumerate(("adapter.safetensors", "adapter.json", "adapter.safetensors")):
        path = tmp_path / "a" / "objects" / digest / name
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data[:-9] if number == 2 else data)
        assert bytes(a.open_image(digest).data) == good
        assert len(list((tmp_path / "a" / "damaged").iterdir())) == number + 1
    a.close()


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
@pytest.mark.parametrize("damage", ["altered", "cut", "longer", "gone"])
def test_a_damaged_object_is_never_served(
    tmp_path: Path, objects: ObjectStore, server: S3Server, prefix: str, name: str, damage: str
) -> None:
    a, b = (replica(tmp_path / each, objects) for each in "ab")
    digest = put(a, tmp_path, "fr")
    catch_up(b)
    key, other = f"objects/{digest}/{name}", server.objects(prefix)
    data = server.read(prefix, key)
    if damage == "gone":
        obstore.delete(other, key)
    else:
        bad = {"altered": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "cut": data[:-9], "longer": data + b"\0" * 64}
        obstore.put(other, key, bad[damage])
    with pytest.raises(AdapterCorrupt, match=digest[:12]):
        b.open_image(digest)
    assert list((tmp_path / "b" / "objects").iterdir()) == list((tmp_path / "b" / "fetches").iterdir()) == []
    # who has a copy goes on, and whoever looks is told
    assert a.open_image(digest).digest == digest and isinstance(b.copies, BlobCache)
    assert digest[:12] in damage_of(b.copies, digest)
    # sent again, it heals
    assert put(a, tmp_path, "fr") == digest and b.open_image(digest).digest == digest
    assert damage_of(b.copies, digest) == ""
    for store in (a, b):
        store.close()


def test_two_that_fetch_at_once_get_the_same(tmp_path: Path, objects: ObjectStore) -> None:
    a = replica(tmp_path / "a", objects)
    digest = put(a, tmp_path, "fr")
    caches = [BlobCache(tmp_path / "b", objects, max_bytes=PLENTY) for _ in range(4)]
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda c=c: found.append(bytes(c.open(digest).data))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    a.close()


def test_copies_stay_within_their_room_and_come_again(tmp_path: Path, objects: ObjectStore) -> None:
    a = replica(tmp_path / "a", objects)
    digests = [put(a, tmp_path, f"n{seed}", seed) for seed in range(4)]
    size = sum(path.stat().st_size for path in (tmp_path / "a" / "objects" / digests[0]).iterdir())
    cache = BlobCache(tmp_path / "b", objects, max_bytes=int(2.5 * size))
    for digest in (*digests, *digests):
        assert cache.open(digest).digest == digest
        kept = {path.name for path in (tmp_path / "b" / "objects").iterdir()}
        assert digest in kept and len(kept) <= 2
    # smaller than one: the one that is asked for is here all the same
    assert BlobCache(tmp_path / "b", objects, max_bytes=1).open(digests[0]).digest == digests[0]
    a.close()


def test_what_dead_processes_left_of_fetches_goes(tmp_path: Path, objects: ObjectStore) -> None:
    cache = BlobCache(tmp_path, objects, max_bytes=PLENTY)
    (tmp_path / "fetches" / "dead").mkdir()
    (tmp_path / "fetches" / "dead" / "adapter.json").write_bytes(b"half")
    with cache._place() as living:
        BlobCache(tmp_path, objects, max_bytes=PLENTY)
        assert list((tmp_path / "fetches").iterdir()) == [living]


def test_a_quota_holds_over_replicas_that_share_no_lock(tmp_path: Path, objects: ObjectStore) -> None:
    stores = [replica(tmp_path / name, objects) for name in "abc"]
    refused: list[StoreError] = []

    def publish(store: AdapterStore, number: int) -> None:
        store.quota = OwnerQuota(max_adapters=2)
        try:
            put(store, tmp_path / f"from{number}", f"n{number}", seed=number)
        except StoreError as error:
            refused.append(error)

    for number in range(3):
        (tmp_path / f"from{number}").mkdir()
    threads = [threading.Thread(target=publish, args=(store, number)) for number, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    catch_up(stores[0])
    assert [type(error) for error in refused] == [OwnerFull] and len(stores[0].list()) == 2
    for store in stores:
        store.close()


# upkeep


def test_upkeep_names_damage_and_orphans_and_removes_only_old_orphans(
    tmp_path: Path, objects: ObjectStore, server: S3Server, prefix: str
) -> None:
    a = replica(tmp_path / "a", objects)
    kept, damaged, deleted = (put(a, tmp_path, name, seed) for seed, name in enumerate(("kept", "damaged", "deleted")))
    a.delete("deleted")
    orphan = "f" * 64
    obstore.put(server.objects(prefix), f"objects/{orphan}/adapter.safetensors", b"of an upload that failed")
    obstore.put(server.objects(prefix), f"objects/{damaged}/adapter.safetensors", b"damaged")
    registry = a.shared
    assert registry is not None and isinstance(a.copies, BlobCache)
    found = {finding.digest: finding for finding in verify_objects(objects, a.copies, registry)}
    assert found[kept].problem == "" and "damaged" in found[damaged].problem and found[damaged].owner == "damaged@1"
    assert (found[deleted].owner, found[deleted].problem) == ("", "") and "gc" in found[orphan].problem
    # retired just now, and new: both stay
    now = datetime.now(UTC)
    assert collect_objects(objects, registry, retired_since=0, now=now).num_objects == 0
    later = now + timedelta(days=2)
    assert collect_objects(objects, registry, retired_since=0, now=later).num_objects == 1
    assert collect_objects(objects, registry, retired_since=2**40, now=later).num_objects == 1
    left = {key.split("/")[1] for key in server.keys(prefix) if key.startswith("objects/")}
    assert left == {kept, damaged}
    a.close()
