"""The trainer's files between machines that share objects only: whole or not there, whatever dies or interferes."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
import pytest

from adapters_store.errors import StorageFailed, StoreAway
from adapters_store.jobs.files import DataFile
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import Trained
from adapters_store.jobs.job_errors import DataFileNotFound, LeaseLost
from adapters_store.jobs.shared_folders import SharedFolders
from adapters_store.jobs.turns import TURN_S
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME
from adapters_store.store import AdapterStore
from tests.finetuning.training_store import BASE, LEASE_S, TrainingStore, new_job
from tests.memory_objects import MemoryObjects
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder

LINES = b"".join(json.dumps({"prompt": f"p{number}", "completion": "c"}).encode() + b"\n" for number in range(3))
JOB = "ftjob-1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrainingStore]:
    """Return an empty store over objects."""
    with closing(TrainingStore(tmp_path, kind="objects")) as store:
        yield store


@pytest.fixture(params=["sqlite", "objects"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainingStore]:
    """Return an empty store of any kind."""
    with closing(TrainingStore(tmp_path, kind=request.param)) as store:
        yield store


def keep(store: TrainingStore) -> DataFile:
    """Upload a data file."""
    with store.files.stage() as upload:
        upload.write(LINES)
        return store.files.keep(upload, "acme", "d.jsonl")


def keys(store: TrainingStore, folder: str = "training") -> list[str]:
    """Return the keys of the objects in a folder, without the journal's."""
    found = (listed.key for listed in MemoryObjects(store.memory).list(folder))
    return sorted(key for key in found if not key.startswith("training/journal"))


def begun(machine: TrainingFolders, token: int) -> Path:
    """Begin a run of the job on a machine."""
    return machine.begin_run(JOB, token)


def save(run: Path, step: int, *, exported: bool = False, text: str = "state") -> None:
    """Save a resume point as a run does, and before it an adapter if there is one."""
    if exported:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step}" / "adapter.bin").write_text(f"adapter {step}")
    point = run / "resume" / f"step-{step:09d}"
    point.mkdir(parents=True)
    (point / "state.safetensors").write_text(text)


def files_in(folder: Path) -> dict[str, str]:
    """Return all files below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_data_file_is_read_on_any_machine_and_what_a_job_reads_outlives_it(any_store: TrainingStore) -> None:
    store = any_store
    file = keep(store)
    with store.files.open(file) as opened:
        assert opened.read() == LINES
    store.folders.make_job(JOB, {"train.jsonl": file.id}, {})
    store.files.delete(file.id, "acme")
    with pytest.raises(DataFileNotFound):
        store.files.get(file.id, "acme")
    with pytest.raises(DataFileNotFound):
        store.files.open(file)
    there = store.one_more()
    begun(there, 1)
    assert (there.inputs(JOB) / "train.jsonl").read_bytes() == LINES
    with pytest.raises(FileNotFoundError):
        store.folders.make_job("ftjob-2", {"train.jsonl": file.id}, {})
    assert store.kept_jobs() == {JOB}


def test_the_adapters_that_a_job_builds_on_come_along_byte_by_byte(store: TrainingStore, tmp_path: Path) -> None:
    write_folder(tmp_path / "source", lora_config(), lora_tensors())
    with closing(open_store(tmp_path / "adapters")) as adapters:
        assert isinstance(adapters, AdapterStore)
        digest = adapters.put_dir("fr", tmp_path / "source").digest
    published = {name: (tmp_path / "adapters" / "objects" / digest / name) for name in (MANIFEST_NAME, IMAGE_NAME)}
    for name, path in published.items():
        obstore.put(store.memory, f"objects/{digest}/{name}", path.read_bytes())
    store.folders.make_job(JOB, {}, {"experts/0": digest})
    there = store.one_more()
    begun(there, 1)
    for name, path in published.items():
        assert (there.inputs(JOB) / "experts" / "0" / name).read_bytes() == path.read_bytes()
    with pytest.raises(FileNotFoundError):
        store.folders.make_job("ftjob-2", {}, {"experts/0": "f" * 64})
    assert store.kept_jobs() == {JOB}


@pytest.mark.parametrize("damage", ["altered", "cut", "longer", "gone", "no index", "another form", "outside"])
def test_a_damaged_input_is_never_trained_on(store: TrainingStore, damage: str) -> None:
    file = keep(store)
    store.folders.make_job(JOB, {"train.jsonl": file.id}, {})
    data, index = f"training/jobs/{JOB}/inputs/train.jsonl", f"training/jobs/{JOB}/inputs/index.json"
    good = bytes(obstore.get(store.memory, index).bytes())
    harmed = {"altered": LINES.replace(b"p1", b"p7"), "cut": LINES[:-1], "longer": LINES + b"\n"}
    indices = {"another form": b'{"files": 3}', "outside": good.replace(b"train.jsonl", b"../train.js")}
    if damage in harmed:
        obstore.put(store.memory, data, harmed[damage])
    elif damage in indices:
        assert indices[damage] != good
        obstore.put(store.memory, index, indices[damage])
    else:
        obstore.delete(store.memory, data if damage == "gone" else index)
    there = store.one_more()
    with pytest.raises(StorageFailed):
        begun(there, 1)


def test_another_machine_goes_on_from_the_newest_point_with_all_that_was_exported(any_store: TrainingStore) -> None:
    store = any_store
    store.folders.make_job(JOB, {}, {})
    first, second, third = store.one_more(), store.one_more(), store.one_more()
    run = begun(first, 1)
    assert first.is_run_shared(JOB, 1)
    for step in (10, 20, 30):
        save(run, step, exported=step != 30)
        first.share_run(JOB, 1)
        assert first.is_run_shared(JOB, 1)
    # what was not shared was not saved
    wanted = {f"checkpoints/step-{step}/adapter.bin": f"adapter {step}" for step in (10, 20)}
    wanted["resume/step-000000030/state.safetensors"] = "state"
    assert wanted.items() <= files_in(begun(second, 2)).items()
    # killed before it saved anything: the third goes on from what there is
    again = begun(third, 3)
    assert wanted.items() <= files_in(again).items()
    save(again, 40)
    third.share_run(JOB, 3)
    assert "resume/step-000000040/state.safetensors" in files_in(begun(store.one_more(), 4))


def test_old_points_go_and_each_token_keeps_to_its_own(store: TrainingStore) -> None:
    store.folders.make_job(JOB, {}, {})
    dead, alive = store.one_more(), store.one_more()
    run = begun(dead, 1)
    for step in (1, 2, 3, 4):
        save(run, step)
        dead.share_run(JOB, 1)
    points = {key.split("/")[5] for key in keys(store, f"training/jobs/{JOB}/run-1")}
    assert points == {"step-000000003", "step-000000004"}
    save(begun(alive, 2), 5, text="mine")
    alive.share_run(JOB, 2)
    # believed dead, and not: it saves more than the other, under its own token
    save(run, 6, text="late")
    dead.share_run(JOB, 1)
    assert files_in(begun(store.one_more(), 3))["resume/step-000000005/state.safetensors"] == "mine"
    assert "resume/step-000000006/state.safetensors" not in files_in(begun(store.one_more(), 3))
    # what a later one saved is not for an earlier one
    assert files_in(begun(store.one_more(), 1)) == {}


@pytest.mark.parametrize("harmed", ["state.safetensors", "index.json", "checkpoint"])
def test_a_damaged_point_is_passed_over_for_an_older_one(store: TrainingStore, harmed: str) -> None:
    store.folders.make_job(JOB, {}, {})
    machine = store.one_more()
    run = begun(machine, 1)
    for step in (1, 2):
        save(run, step, exported=True, text=f"state {step}")
        machine.share_run(JOB, 1)
    place = f"training/jobs/{JOB}/run-1"
    key = "checkpoints/step-2/adapter.bin" if harmed == "checkpoint" else f"resume/step-000000002/{harmed}"
    obstore.put(store.memory, f"{place}/{key}", b"harmed")
    found = files_in(begun(store.one_more(), 2))
    assert found == {
        "checkpoints/step-1/adapter.bin": "adapter 1",
        "resume/step-000000001/state.safetensors": "state 1",
    }


@pytest.mark.parametrize("kind", ["file", "folder", "parent", "fifo", "two names", "deep", "many"])
def test_nothing_outside_of_its_run_leaves_through_what_a_walled_process_wrote(
    any_store: TrainingStore, tmp_path: Path, kind: str
) -> None:
    store = any_store
    store.folders.make_job(JOB, {}, {})
    machine = store.one_more()
    run = begun(machine, 1)
    secret = tmp_path / "secret" / "step-000000001"
    secret.mkdir(parents=True)
    (secret / "state.safetensors").write_text("another tenant's")
    point = run / "resume" / "step-000000001"
    if kind == "parent":
        (run / "resume").symlink_to(secret.parent)
    elif kind == "folder":
        (run / "resume").mkdir()
        point.symlink_to(secret)
    else:
        point.mkdir(parents=True)
        if kind == "fifo":
            os.mkfifo(point / "state.safetensors")
        elif kind == "two names":
            os.link(secret / "state.safetensors", point / "state.safetensors")
        elif kind == "file":
            (point / "state.safetensors").symlink_to(secret / "state.safetensors")
        elif kind == "deep":
            (point / "/".join("d" * 9)).mkdir(parents=True)
        else:
            for number in range(513):
                (point / f"{number}").touch()
    if store.kind == "objects" and kind != "parent":
        with pytest.raises(StorageFailed):
            machine.share_run(JOB, 1)
    else:
        machine.share_run(JOB, 1)
    with pytest.raises(StorageFailed):
        machine.keep_export(JOB, "final.1", point)
    assert not [key for key in keys(store) if "run-" in key or "exports" in key]


def test_an_export_is_published_from_any_machine_and_half_of_one_is_none(any_store: TrainingStore) -> None:
    store = any_store
    store.folders.make_job(JOB, {}, {})
    there = store.one_more()
    run = begun(there, 1)
    (run / "adapter" / "inner").mkdir(parents=True)
    (run / "adapter" / "inner" / "a.bin").write_text("weights")
    export = there.keep_export(JOB, "final.1", run / "adapter")
    if store.kind == "objects":
        with pytest.raises(FileNotFoundError):
            store.folders.bring_export(JOB, export)
    there.share_export(JOB, export)
    there.leave_job(JOB)
    assert files_in(store.folders.bring_export(JOB, export)) == {"inner/a.bin": "weights"}
    assert files_in(store.folders.bring_export(JOB, export)) == {"inner/a.bin": "weights"}


def test_a_publisher_whose_turn_ran_out_writes_nothing(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    held = store.queue.claim("w", BASE, lease_s=LEASE_S)
    assert held is not None
    store.queue.hand_over(held, Trained("exports/final.1", {}, 1, {}))
    (parcel,) = store.outbox.parcels(BASE)
    with pytest.raises(LeaseLost):
        store.outbox.published(parcel)
    with store.turns.taken(job.id) as is_ours:
        assert is_ours
        store.clock.now += TURN_S
        with pytest.raises(LeaseLost):
            store.outbox.published(parcel)
        assert store.outbox.is_waiting(parcel)
    store.published(parcel)
    assert not store.outbox.is_waiting(parcel)


def test_a_sweep_removes_what_no_row_names_once_it_is_old(store: TrainingStore) -> None:
    kept, gone = keep(store), keep(store)
    store.folders.make_job("ftjob-orphan", {}, {})
    store.rows().write(lambda db: db.execute("DELETE FROM files WHERE id = ?", (gone.id,)))
    memory = MemoryObjects(store.memory)
    for hours, expected in ((0, {kept.id, gone.id, "ftjob-orphan"}), (2, {kept.id})):
        later = datetime.now(UTC) + timedelta(hours=hours)
        with closing(SharedFolders(store.root / "sweeper", memory, clock=lambda later=later: later)) as sweeper:  # type: ignore[misc]
            sweeper.sweep(store.jobs.states, store.files.known_ids)
        assert {key.split("/")[2] for key in keys(store)} == expected


def test_copies_of_dead_processes_go_and_those_of_living_ones_stay(store: TrainingStore) -> None:
    root = store.root / "machine"
    living = SharedFolders(root, MemoryObjects(store.memory))
    dead = root / "training" / "scratch" / "dead"
    dead.mkdir()
    (dead / "copy").touch()
    with closing(SharedFolders(root, MemoryObjects(store.memory))):
        assert not dead.exists() and living.jobs.is_dir()
    living.close()
    assert list((root / "training" / "scratch").iterdir()) == []


class Away(MemoryObjects):
    """An object store that does not answer."""

    def put_file(self, key: str, path: Path) -> None:
        """Say so."""
        raise StoreAway

    def put(self, key: str, data: bytes) -> None:
        """Say so."""
        raise StoreAway

    def copy(self, source: str, target: str) -> None:
        """Say so."""
        raise StoreAway

    def get(self, key: str, *, max_bytes: int) -> bytes | None:
        """Say so."""
        raise StoreAway


def test_without_its_store_nothing_is_kept_and_nothing_half_is_left(store: TrainingStore) -> None:
    file = keep(store)
    before = keys(store)
    with closing(SharedFolders(store.root / "cut off", Away(store.memory))) as cut_off:
        with pytest.raises(StoreAway):
            cut_off.make_job(JOB, {"train.jsonl": file.id}, {})
        path = store.root / "data"
        path.write_bytes(LINES)
        with pytest.raises(StoreAway):
            cut_off.keep_data(path, "file-1")
        with pytest.raises(StoreAway):
            cut_off.begin_run(JOB, 1)
    assert keys(store) == before
