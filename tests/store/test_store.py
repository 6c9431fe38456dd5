"""What the store promises its callers: versions, selectors, aliases, names, deletion, proof at opening, quotas."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.errors import AdapterCorrupt, AdapterNotFound, InvalidName, NameTaken, StorageFailed, StoreError
from adapters_store.store import AdapterStore, AdapterVersion
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, write_folder

PutSeed = Callable[[AdapterStore, str, int], AdapterVersion]


@pytest.fixture
def put_seed(tmp_path: Path) -> PutSeed:
    """Return a function that uploads an adapter whose weights follow from a seed."""

    def put(store: AdapterStore, name: str, seed: int) -> AdapterVersion:
        return store.put_dir(name, write_folder(tmp_path / f"seed{seed}", lora_config(), lora_tensors(seed=seed)))

    return put


def test_the_same_upload_has_the_same_digest_under_every_name(store: AdapterStore, put_seed: PutSeed) -> None:
    first, second = put_seed(store, "a", 1), put_seed(store, "b", 1)
    assert first.digest == second.digest
    assert len(list((store._blobs.root).iterdir())) == 1
    assert put_seed(store, "c", 2).digest != first.digest


def test_a_new_upload_of_a_name_is_a_new_version_and_the_old_one_stays(store: AdapterStore, put_seed: PutSeed) -> None:
    old, new = put_seed(store, "a", 1), put_seed(store, "a", 2)
    assert (old.version, new.version) == (1, 2)
    for spelling, wanted in {
        "a": new,
        "a@2": new,
        "a@1": old,
        f"a@sha256:{old.digest}": old,
        "base:a": new,
        "base:a@1": old,
        f"base:a@sha256:{new.digest}": new,
    }.items():
        ref = store.resolve(spelling)
        assert ref is not None and (ref.name, ref.version, ref.digest) == ("a", wanted.version, wanted.digest), spelling
    assert [v.version for v in store.versions("a")] == [1, 2]
    assert store.list() == [new] and store.get("a") == new


NOTHING = [
    "", "b", "A", "a@0", "a@3", "a@01", "a@", "a@sha256:", "a@sha256:" + "0" * 64, "a:canary", "base", "base:",
    "base:b", "base:base:a", ":a", "a:", "a@1@1", "../a", "a\0", "a" * 9999, "a@9999999999", "a@99999999999999999999",
]  # fmt: skip


def test_what_names_nothing_resolves_to_nothing(store: AdapterStore, put_seed: PutSeed) -> None:
    put_seed(store, "a", 1)
    for model in NOTHING:
        assert store.resolve(model) is None, model


def test_an_alias_points_to_one_version_until_it_is_moved(store: AdapterStore, put_seed: PutSeed) -> None:
    put_seed(store, "a", 1)
    put_seed(store, "a", 2)
    store.set_alias("a", "stable", 1)
    for spelling in ("a:stable", "base:a:stable"):
        ref = store.resolve(spelling)
        assert ref is not None and ref.version == 1
    store.set_alias("a", "stable", 2)
    ref = store.resolve("a:stable")
    assert ref is not None and ref.version == 2
    with pytest.raises(AdapterNotFound):
        store.set_alias("a", "stable", 3)
    with pytest.raises(AdapterNotFound):
        store.set_alias("nobody", "stable", 1)
    for alias in ("", "a:b", "a@b", "-a", "a\n", "ä", "a" * 65):
        with pytest.raises(InvalidName):
            store.set_alias("a", alias, 1)


def test_a_name_and_an_alias_never_mean_two_things(store: AdapterStore, put_seed: PutSeed) -> None:
    put_seed(store, "a", 1)
    store.set_alias("a", "canary", 1)
    with pytest.raises(NameTaken):
        put_seed(store, "a:canary", 2)
    put_seed(store, "a:stable", 3)
    with pytest.raises(NameTaken):
        store.set_alias("a", "stable", 1)


UNSAFE = [
    "", ".", "..", "/etc", "%2e%2e%2f", "..\\", "a/../b", "A/b", "/b", "a/", "a/b/c", "a,b", "a" * 129,
    "\uff41", "a\0", "\U0001f600", "-a",
    ".a", ":a", "a\n", "a ", " a", "a.", "a:", "a@1", "a@sha256:0", "base", "BASE", "base:x", "Base:x", "a\u202eb",
]  # fmt: skip


def test_a_name_that_is_unsafe_or_ambiguous_is_refused(store: AdapterStore, good_folder: Path) -> None:
    for name in UNSAFE:
        with pytest.raises(InvalidName) as refusal:
            store.put_dir(name, good_folder)
        assert refusal.value.param == "name" and refusal.value.http_status == 400, name
        assert refusal.value.message.isascii() and refusal.value.message.isprintable()
        with pytest.raises(AdapterNotFound):
            store.get(name)
    assert store.list() == []


def test_ordinary_names_are_taken(store: AdapterStore, good_folder: Path) -> None:
    for name in ("a", "A1", "ft:base:org:suffix:id", "a.b-c_d", "x" * 128, "con", "basement", "9"):
        assert store.put_dir(name, good_folder).name == name
        ref = store.resolve(name)
        assert ref is not None and ref.name == name


def test_a_case_twin_is_refused_and_the_first_one_stays(store: AdapterStore, put_seed: PutSeed) -> None:
    first = put_seed(store, "Foo", 1)
    with pytest.raises(NameTaken, match="'Foo'") as refusal:
        put_seed(store, "foo", 2)
    assert refusal.value.http_status == 409
    assert store.list() == [first]


def test_version_numbers_are_never_given_again(store: AdapterStore, put_seed: PutSeed) -> None:
    put_seed(store, "a", 1)
    put_seed(store, "a", 2)
    store.set_alias("a", "stable", 1)
    store.delete("a")
    assert store.resolve("a") is None and store.resolve("a@1") is None and store.resolve("a:stable") is None
    with pytest.raises(AdapterNotFound):
        store.delete("a")
    assert put_seed(store, "a", 3).version == 3
    assert store.resolve("a@1") is None


def test_deleting_keeps_the_bytes_for_accepted_requests_and_then_frees_them(store_dir: Path, good_folder: Path) -> None:
    now = [1_000_000.0]
    store = open_store(store_dir, clock=lambda: now[0])
    digest = store.put_dir("a", good_folder).digest
    held = store.open_image(digest)
    before = bytes(held.data)
    store.delete("a")
    now[0] += 3599
    store.sweep()
    store.open_image(digest)
    now[0] += 2
    store.sweep()
    assert list((store_dir / "objects").iterdir()) == []
    assert bytes(held.data) == before
    with pytest.raises(AdapterCorrupt):
        store.open_image(digest)
    store.close()


def test_an_object_that_another_name_still_uses_survives(store_dir: Path, good_folder: Path) -> None:
    now = [1_000_000.0]
    store = open_store(store_dir, clock=lambda: now[0])
    digest = store.put_dir("a", good_folder).digest
    before = bytes(store.open_image(digest).data)
    assert store.put_dir("b", good_folder).digest == digest
    store.delete("a")
    now[0] += 9999
    store.sweep()
    assert bytes(store.open_image(digest).data) == before
    store.close()


def test_everything_survives_a_restart(store_dir: Path, good_folder: Path) -> None:
    store = open_store(store_dir)
    version = store.put_dir("a", good_folder)
    store.set_alias("a", "stable", 1)
    store.close()
    again = open_store(store_dir)
    assert again.list() == [version]
    assert again.resolve("a:stable") is not None
    again.verify("a")
    again.close()


def test_two_stores_of_one_folder_see_each_other_and_sweep_only_the_dead(store_dir: Path, good_folder: Path) -> None:
    api = open_store(store_dir)
    with api.stage() as upload:
        for part in ("adapter_config.json", "adapter_model.safetensors"):
            with upload.open_part(part) as writer:
                writer.write((good_folder / part).read_bytes())
        engine = open_store(store_dir)
        engine.sweep()
        digest = upload.commit("a").digest
    assert engine.resolve("a") is not None
    assert engine.open_image(digest).digest == digest
    engine.close()
    api.close()


def test_an_adapter_of_another_base_is_not_shown_and_its_name_is_taken(store_dir: Path, good_folder: Path) -> None:
    store = open_store(store_dir)
    digest = store.put_dir("a", good_folder).digest
    store.close()
    other = open_store(store_dir, replace(TINY, vocab_size=99, weights_fingerprint="sha256:" + "2" * 64))
    assert other.resolve("a") is not None
    other.close()
    wider = open_store(store_dir, replace(TINY, intermediate_size=48))
    assert wider.resolve("a") is None and wider.list() == []
    with pytest.raises(AdapterNotFound):
        wider.get("a")
    with pytest.raises(AdapterNotFound):
        wider.delete("a")
    with pytest.raises(AdapterNotFound):
        wider.open_image(digest)
    with pytest.raises(NameTaken, match="another base"):
        wider.put_dir("a", good_folder)
    wider.close()


def test_the_report_says_what_acts_and_what_does_not(store: AdapterStore, tmp_path: Path) -> None:
    config = lora_config(target_modules=["v_proj", "down_proj", "wqkv"], lora_dropout=0.1, eva_config={"rho": 2})
    version = store.put_dir("a", write_folder(tmp_path / "f", config, lora_tensors(sites=("v_proj", "down_proj"))))
    assert version.report.applied == tuple(
        f"layers.{layer}.{path}" for layer in (0, 1) for path in ("self_attn.v_proj", "mlp.down_proj")
    )
    assert version.report.ignored == ("eva_config", "lora_dropout", "target_modules[wqkv]")
    assert version.report.missing == (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    )  # fmt: skip
    assert (version.family, version.rank, version.dtype) == ("lora", 2, "float32")
    assert version.base == TINY.to_dict()


def test_every_flipped_bit_of_a_stored_file_is_found_before_it_is_served(
    store: AdapterStore, good_folder: Path
) -> None:
    digest = store.put_dir("a", good_folder).digest
    for name in ("adapter.safetensors", "adapter.json"):
        path = store._blobs.root / digest / name
        good = path.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 97)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            with pytest.raises(AdapterCorrupt) as error:
                store.open_image(digest)
            assert (error.value.http_status, error.value.code) == (503, "adapter_corrupt")
        for cut in (good[:-1], good + b"\0", b""):
            path.write_bytes(cut)
            with pytest.raises(AdapterCorrupt):
                store.verify("a")
        path.write_bytes(good)
        store.verify("a")


def test_uploading_again_heals_a_damaged_object(store: AdapterStore, good_folder: Path) -> None:
    digest = store.put_dir("a", good_folder).digest
    path = store._blobs.root / digest / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterCorrupt):
        store.open_image(digest)
    assert store.put_dir("a", good_folder).digest == digest
    store.verify("a")


def test_a_digest_is_never_a_path(store: AdapterStore) -> None:
    for digest in ("", "../../etc", "0" * 63, "G" * 64, "0" * 64 + "\n", "0" * 64):
        with pytest.raises(AdapterCorrupt):
            store.open_image(digest)


def test_a_rank_above_the_limit_names_the_limit(store_dir: Path, tmp_path: Path) -> None:
    store = open_store(store_dir, max_rank=4)
    folder = write_folder(tmp_path / "f", lora_config(r=5), lora_tensors(rank=5))
    with pytest.raises(StoreError, match=r"rank 5.*up to 4") as refusal:
        store.put_dir("a", folder)
    assert refusal.value.param == "r"
    store.close()


def test_threads_upload_the_same_name_and_every_version_is_kept(store: AdapterStore, tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / f"t{i}", lora_config(), lora_tensors(seed=i)) for i in range(8)]
    versions: list[AdapterVersion] = []
    threads = [threading.Thread(target=lambda f=f: versions.append(store.put_dir("a", f))) for f in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(v.version for v in versions) == list(range(1, 9))
    assert len({v.digest for v in versions}) == 8
    store.verify("a")


def test_a_registry_that_is_not_one_is_refused_at_opening(store_dir: Path) -> None:
    store_dir.mkdir()
    (store_dir / "registry.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageFailed) as refusal:
        open_store(store_dir)
    assert str(store_dir) not in refusal.value.message


def test_a_store_where_nothing_can_be_created_is_refused_at_opening(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed):
        open_store(tmp_path / "file" / "store")


def test_a_store_that_keeps_few_versions_forgets_the_others_with_the_next_upload(
    store: AdapterStore, put_seed: PutSeed
) -> None:
    store.keep_versions = 2
    put_seed(store, "a", 1)
    store.set_alias("a", "stable", 1)
    for seed in (2, 3, 4, 5):
        put_seed(store, "a", seed)
    assert [version.version for version in store.versions("a")] == [1, 4, 5]
    store.remove_alias("a", "stable")
    gone = store.get("a").digest, store.versions("a")[0].digest
    put_seed(store, "a", 6)
    assert [version.version for version in store.versions("a")] == [5, 6]
    # for an hour, whoever was accepted under the old digest may still load it
    assert all(store.open_image(digest) for digest in gone)
