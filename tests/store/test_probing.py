"""A probe between the bytes and the name: what it sees, what its failure leaves behind, what other processes may do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.errors import AdapterCorrupt, ProbeDisagrees, StoreError
from adapters_store.file_system import FileSystem
from adapters_store.proof import NotProbed, Proof, Staged
from adapters_store.staging import hold
from adapters_store.store import AdapterStore
from tests.store.folders import open_store

PROOF: Proof = {"max_error": 1e-6}


def refuse(staged: Staged) -> Proof:
    raise ProbeDisagrees("it acts otherwise")


def traces(store: AdapterStore) -> list[Path]:
    root = store._blobs.root.parent
    return [*(root / "objects").iterdir(), *(root / "staging").iterdir()]


def test_a_probe_sees_a_whole_adapter_that_nobody_can_ask_for(store: AdapterStore, good_folder: Path) -> None:
    def probe(staged: Staged) -> Proof:
        assert store.open_image(staged.digest).rank == staged.manifest.rank == 2
        assert sorted(path.name for path in staged.source.iterdir()) == sorted(os.listdir(good_folder))
        assert list(staged.folder.iterdir()) == []
        assert store.list() == [] and store.resolve("a") is None
        assert store.resolve(f"a@sha256:{staged.digest}") is None
        return PROOF

    version = store.put_dir("a", good_folder, proving=probe)
    assert version.proof == PROOF and store.get("a") == version
    assert store.open_image(version.digest).digest == version.digest


def test_a_version_without_probe_says_why(store: AdapterStore, good_folder: Path) -> None:
    version = store.put_dir("a", good_folder, proving=NotProbed("the operator switched it off"))
    assert (version.proof, version.not_probed) == (None, "the operator switched it off")


@pytest.mark.parametrize("error", [ProbeDisagrees("otherwise"), RuntimeError("the engine is gone")])
def test_a_failed_probe_publishes_nothing_and_leaves_nothing(
    error: Exception, store: AdapterStore, good_folder: Path
) -> None:
    def fail(staged: Staged) -> Proof:
        raise error

    with pytest.raises(type(error)):
        store.put_dir("a", good_folder, proving=fail)
    assert store.list() == [] and traces(store) == []
    # and the name is as free as before
    assert store.put_dir("a", good_folder).version == 1


def test_a_failed_probe_takes_nothing_from_a_version_of_the_same_bytes(store: AdapterStore, good_folder: Path) -> None:
    living = store.put_dir("a", good_folder)
    with pytest.raises(ProbeDisagrees):
        store.put_dir("b", good_folder, proving=refuse)
    assert store.open_image(living.digest).digest == living.digest


def test_two_probes_of_the_same_bytes_do_not_harm_each_other(store: AdapterStore, good_folder: Path) -> None:
    def probe(staged: Staged) -> Proof:
        with pytest.raises(ProbeDisagrees):
            store.put_dir("b", good_folder, proving=refuse)
        assert store.open_image(staged.digest).digest == staged.digest
        return PROOF

    assert store.put_dir("a", good_folder, proving=probe).proof == PROOF
    store.verify("a")


def test_a_name_that_is_taken_meanwhile_stays_with_its_owner(store: AdapterStore, good_folder: Path) -> None:
    def probe(staged: Staged) -> Proof:
        store.put_dir("Fr", good_folder)
        return PROOF

    with pytest.raises(StoreError, match="differs only in case"):
        store.put_dir("fr", good_folder, proving=probe)
    assert [version.name for version in store.list()] == ["Fr"]
    store.verify("Fr")


def test_another_process_sweeps_around_a_running_probe(store_dir: Path, store: AdapterStore, good_folder: Path) -> None:
    def probe(staged: Staged) -> Proof:
        _in_child(lambda: open_store(store_dir).close())
        assert store.open_image(staged.digest).digest == staged.digest
        return PROOF

    store.put_dir("a", good_folder, proving=probe)
    store.verify("a")


def test_an_upload_that_ends_while_held_objects_are_listed_is_no_failure(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = store._staging
    staged, vanishing = staging.root / "staged", staging.root / "vanishing"
    for folder in (staged, vanishing):
        folder.mkdir()
    hold(staged, "d" * 64, FileSystem())
    list_folder = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path) == vanishing and vanishing.exists():
            vanishing.rmdir()
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert staging.held() == {"d" * 64} and not vanishing.exists()
    assert staging.held(but=staged) == set()


def test_a_kill_during_a_probe_leaves_no_trace_after_the_sweep(
    store_dir: Path, store: AdapterStore, good_folder: Path
) -> None:

    def die(staged: Staged) -> Proof:
        os.kill(os.getpid(), signal.SIGKILL)
        return PROOF

    def upload_and_die() -> None:
        opened = open_store(store_dir)
        opened.put_dir("a", good_folder, proving=die)

    _in_child(upload_and_die, status=-signal.SIGKILL)
    digests = [path.name for path in store._blobs.root.iterdir()]
    assert len(digests) == 1, "the kill came before the object was there"
    assert store.list() == []
    store.sweep()
    assert traces(store) == []
    with pytest.raises(AdapterCorrupt):
        store.open_image(digests[0])


def _in_child(work: Callable[[], None], status: int = 0) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
