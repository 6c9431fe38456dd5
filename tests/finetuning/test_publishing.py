"""From a worker's export to an adapter of its tenant: the door of an upload, once, whatever dies in between."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters_store.errors import AdapterNotFound, RegistryUnavailable, StorageFailed
from adapters_store.jobs.job import Job, JobState, Promotion, Trained
from adapters_store.proof import NotProbed
from adapters_store.store import AdapterStore
from serve.api import job_publisher
from serve.api.job_publisher import JobPublisher
from serve.api.owned_adapters import OwnedAdapters
from serve.api.state import ApiState
from serve.api.training_desk import TrainingDesk
from serve.api.uploads import UploadPool
from serve.model.spec import read_spec
from serve.tenants.principal import Principal
from tests.finetuning.training_store import BASE, LEASE_S, TrainingStore, new_job
from tests.tiny_model import write_tiny_adapter, write_tiny_model

NOBODY = Principal("", frozenset(), "nobody")
ACME = Principal("acme", frozenset(), "key")


class Desk:
    """A server's publisher over a real store, without a server."""

    def __init__(self, root: Path, kind: str) -> None:
        """Open a store for the tiny base."""
        self.root = root
        base = write_tiny_model(root / "model")
        self.training = TrainingStore(root / "store", kind=kind)
        # the machine that trains
        self.there = self.training.one_more()
        self.store = AdapterStore.open(root / "store", read_spec(base).dims, base_dir=base, served_name="tiny")
        owned = OwnedAdapters(self.store, "tiny", NOBODY, lambda tenant: frozenset())
        self.view = owned.seen_by(ACME)
        parts = self.training
        self.state = SimpleNamespace(
            training=TrainingDesk(parts.jobs, parts.outbox, parts.files, parts.folders, parts.turns, parts.close),
            store=owned,
            engine=SimpleNamespace(ready=SimpleNamespace(base_fingerprint=BASE)),
            uploads=UploadPool(),
            proving=lambda: NotProbed("no engine here"),
            door=SimpleNamespace(tenancy=None),
        )
        self.publisher = JobPublisher(cast(ApiState, self.state))

    def close(self) -> None:
        """Give everything back."""
        self.state.uploads.close()
        self.training.close()
        self.store.close()

    def trained(self, *, seed: int = 1, metrics: dict[str, float] | None = None, **changes: object) -> Job:
        """Let a worker hand over a job whose adapter is a random LoRA."""
        job = self.training.jobs.create(new_job("acme", model="tiny", suffix="bot", **changes))
        self.training.folders.make_job(job.id, {}, {})
        run = self.there.begin_run(job.id, 1)
        folder = write_tiny_adapter(run, "adapter", 4, seed).folder
        (folder / "upload.json").write_text(json.dumps({"format": "peft", "options": {}}))
        (folder / "provenance.json").write_text('{"seed": 1}')
        claim = self.training.queue.claim("w", BASE, lease_s=LEASE_S)
        assert claim is not None and claim.job.id == job.id
        export = self.there.keep_export(job.id, "final.1", folder)
        self.there.share_export(job.id, export)
        self.there.leave_job(job.id)
        self.training.queue.hand_over(claim, Trained(export, dict(metrics or {}), 10, {}))
        return job

    def round(self) -> None:
        """Let the publisher look once."""
        asyncio.run(self.publisher._round())

    def export(self, job: Job) -> Path:
        """Return the folder that waits to be published."""
        return self.training.folders.job(job.id) / "exports" / "final.1"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Return a publisher at rest."""
    with closing(Desk(tmp_path, "sqlite")) as made:
        yield made


@pytest.fixture(params=["sqlite", "objects"])
def any_desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    """Return a publisher at rest, over one server's folder or over objects that machines share."""
    with closing(Desk(tmp_path, request.param)) as made:
        yield made


def test_an_export_becomes_its_tenants_adapter_and_its_folder_goes(any_desk: Desk) -> None:
    desk = any_desk
    job = desk.trained()
    desk.round()
    done = desk.training.jobs.get(job.id, "acme")
    assert done.state is JobState.SUCCEEDED and done.fine_tuned_model == job.model_name
    assert desk.view.resolve(job.model_name) is not None
    (version,) = desk.store.list()
    # with the word of how it was made
    assert (version.name, version.provenance) == (f"acme/{job.model_name}", {"seed": 1})
    (result,) = done.result_files
    assert desk.training.files.get(result, "acme").filename == "step_metrics.csv"
    assert job.id in desk.training.kept_jobs()
    desk.state.training.sweep()
    assert desk.training.kept_jobs() == set()
    assert desk.view.resolve(job.model_name) is not None


def test_a_publisher_that_dies_after_the_commit_publishes_nothing_twice(
    any_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = any_desk
    job = desk.trained()

    def die(*_: object, **__: object) -> None:
        raise StorageFailed("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(type(desk.training.outbox), "published", die)
        desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.PUBLISHING
    assert len(desk.view.versions(job.model_name)) == 1
    desk.publisher = JobPublisher(cast(ApiState, desk.state))
    desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.SUCCEEDED
    assert len(desk.view.versions(job.model_name)) == 1
    assert len(desk.training.files.page("acme", purpose=None, after=None, limit=9, newest_first=True).items) == 1


def test_a_publisher_that_has_not_heard_of_the_other_ones_version_makes_no_second_one(
    any_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = any_desk
    promised = Promotion("bot", "train_loss", below=1.0)
    job = desk.trained(metrics={"train_loss": 0.5}, promotion=promised)
    monkeypatch.setattr(job_publisher, "_RETRY_S", 0.0)

    def die(*_: object, **__: object) -> None:
        raise StorageFailed("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(type(desk.training.outbox), "published", die)
        desk.round()
    with monkeypatch.context() as patched:
        patched.setattr(job_publisher, "_published", lambda view, name: None)
        desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.PUBLISHING
    assert len(desk.view.versions(job.model_name)) == 1 and len(desk.view.versions("bot")) == 1
    desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.SUCCEEDED
    assert len(desk.view.versions(job.model_name)) == 1 and len(desk.view.versions("bot")) == 1


def test_two_servers_never_publish_one_job_at_once(any_desk: Desk) -> None:
    desk = any_desk
    job = desk.trained()
    with desk.training.turns.taken(job.id) as is_ours:
        assert is_ours
        desk.round()
        assert desk.training.jobs.get(job.id, None).state is JobState.PUBLISHING
    desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.SUCCEEDED


@pytest.mark.parametrize("damage", ["nan", "wrong shape", "no declaration", "a format nobody knows", "truncated"])
def test_an_export_gets_no_trusted_short_cut(desk: Desk, damage: str) -> None:
    job = desk.trained()
    weights, declared = desk.export(job) / "adapter_model.safetensors", desk.export(job) / "upload.json"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    if damage == "nan":
        save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, weights)
    elif damage == "wrong shape":
        save_file(tensors | {first: tensors[first][:, :-1].copy()}, weights)
    elif damage == "no declaration":
        declared.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        declared.write_text(json.dumps({"format": "../../etc", "options": {}}))
    desk.round()
    failed = desk.training.jobs.get(job.id, None)
    assert failed.state is JobState.FAILED and failed.error is not None and failed.error.message
    assert desk.store.list() == []


def test_an_export_made_of_links_is_not_even_copied(desk: Desk) -> None:
    job = desk.training.jobs.create(new_job("acme"))
    run = desk.training.folders.begin_run(job.id, 1)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").symlink_to("/etc/passwd")
    with pytest.raises(StorageFailed):
        desk.training.folders.keep_export(job.id, "final.1", run / "adapter")
    (run / "adapter" / "adapter_config.json").unlink()
    os.mkfifo(run / "adapter" / "adapter_config.json")
    with pytest.raises(StorageFailed):
        desk.training.folders.keep_export(job.id, "final.1", run / "adapter")


def promotion(*, above: float, canary: float | None) -> Promotion:
    """Return a wish to promote to `bot`."""
    return Promotion("bot", "valid_mean_token_accuracy", above=above, alias="stable", canary=canary)


def test_a_good_result_is_promoted_and_a_bad_one_leaves_everything_as_it_is(desk: Desk) -> None:
    good = {"valid_mean_token_accuracy": 0.95}
    desk.trained(seed=1, metrics=good, promotion=promotion(above=0.9, canary=10))
    desk.round()
    # the first version of a name: there is nobody to take a share from
    first = desk.view.pointers("bot")
    assert (first.current, first.aliases) == (1, {"stable": 1})
    bad = desk.trained(seed=2, metrics={"valid_mean_token_accuracy": 0.9}, promotion=promotion(above=0.9, canary=10))
    desk.round()
    assert desk.training.jobs.get(bad.id, None).state is JobState.SUCCEEDED
    assert desk.view.pointers("bot") == first and len(desk.view.versions("bot")) == 1
    told = [event.message for event in desk.training.jobs.events(bad.id, None, limit=100).items]
    assert any(message.startswith("Not promoted") for message in told)
    desk.trained(seed=3, metrics=good, promotion=promotion(above=0.9, canary=10))
    desk.round()
    then = desk.view.pointers("bot")
    # the plain name means the old one still, but for a share of its requests
    assert (then.current, then.aliases) == (1, {"stable": 2, "canary": 2})
    with pytest.raises(AdapterNotFound):
        desk.store.get("bot")


def test_a_registry_that_is_away_costs_no_job_and_no_promotion(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"valid_mean_token_accuracy": 0.95}
    job = desk.trained(seed=1, metrics=good, promotion=promotion(above=0.9, canary=None))
    is_away = {"put_dir": True, "move": True}
    put_dir = OwnedAdapters.put_dir

    def put(self: OwnedAdapters, name: str, *arguments: object, **options: object) -> object:
        if is_away["put_dir"] or (name == "bot" and is_away["move"]):
            raise RegistryUnavailable
        return put_dir(self, name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(OwnedAdapters, "put_dir", put)
    # an hour of it, without the waiting
    monkeypatch.setattr(job_publisher, "_RETRY_S", 0.0)
    monkeypatch.setattr(job_publisher, "_MAX_TRIES", 2)
    for _ in range(4):
        desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.PUBLISHING
    is_away["put_dir"] = False
    # away again between the adapter and its promotion
    for _ in range(4):
        desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.PUBLISHING
    is_away["move"] = False
    desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.SUCCEEDED
    assert desk.view.pointers("bot").aliases == {"stable": 1}
    assert [version.version for version in desk.view.versions(job.model_name)] == [1]


def test_a_promotion_that_cannot_be_fulfilled_fails_no_job(desk: Desk) -> None:
    bad_name = Promotion("tiny", "train_loss", below=1.0)
    job = desk.trained(metrics={"train_loss": 0.5}, promotion=bad_name)
    desk.round()
    assert desk.training.jobs.get(job.id, None).state is JobState.SUCCEEDED
    warned = [event for event in desk.training.jobs.events(job.id, None, limit=100).items if event.level == "warn"]
    assert len(warned) == 1 and "left as it is" in warned[0].message
