"""Publishes what training workers have exported, as its tenant's own upload: converted, checked, probed, committed.

Owns the last step of a job, in the one process that has the engine for the probe. Invariants: an export passes the very
door of an upload, with no short cut; each is published once, however many servers share the store and whenever one of
them dies; a job succeeds only when its adapter can be asked for.
"""

import asyncio
import contextlib
import csv
import hashlib
import io
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from adapters_store.errors import AdapterNotFound, RegistryUnavailable, StorageFailed, StoreAway, StoreError
from adapters_store.jobs.exported import declared_by
from adapters_store.jobs.job import JobError, NewEvent, Parcel
from adapters_store.proof import Proving
from adapters_store.registry import AdapterVersion
from adapters_store.version_errors import PublishedMeanwhile
from serve.api.owned_adapters import OwnedAdapters
from serve.api.promotion import promote
from serve.api.state import ApiState
from serve.errors import ServeError
from serve.tenants.audit import AuditEvent
from serve.tenants.principal import Principal

logger = logging.getLogger("chorale.training")

_POLL_S, _RETRY_S, _SWEEP_S = 0.3, 3.0, 60.0
_MAX_TRIES = 20
_AWAY = (RegistryUnavailable, StoreAway)
_METRICS_NAME = "step_metrics.csv"
_COLUMNS = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


class JobPublisher:
    """The task of one server. Event loop only."""

    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._desk = state.training
        self._sweep_at = 0.0
        # what failed for a reason that may pass: not before this time, and how often it was tried
        self._later: dict[tuple[str, int | None], tuple[float, int]] = {}

    async def run(self) -> None:
        """Publish until cancelled; nothing that goes wrong with one job or with the disk ends it."""
        complaint = ""
        while True:
            try:
                await self._round()
                complaint = ""
            except (StoreError, ServeError) as error:
                # once, not three times a second for as long as an object store is away
                if error.message != complaint:
                    logger.warning("training jobs: %s", error.message)
                complaint = error.message
            # the wall of this task: it must outlive whatever one job can do to it
            except Exception:
                logger.exception("training jobs: unexpected")
            await asyncio.sleep(_POLL_S)

    async def _round(self) -> None:
        ready = self._state.engine.ready
        if ready is None:
            return
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_S
            await self._desk.ask(self._desk.sweep)
        for parcel in await self._desk.ask(self._desk.outbox.parcels, ready.base_fingerprint):
            not_before, num_tries = self._later.get((parcel.job.id, parcel.step), (0.0, 0))
            if now >= not_before:
                await self._deliver(parcel, num_tries)

    async def _deliver(self, parcel: Parcel, num_tries: int) -> None:
        """Publish one parcel, refuse it, or try it again later."""
        key = (parcel.job.id, parcel.step)
        try:
            principal = Principal(parcel.job.tenant, frozenset(), "trainer")
            view = self._state.store.seen_by(principal)
            publish = partial(self._publish, parcel, view, self._state.proving())
            version = await self._state.uploads.commit(publish)
            self._later.pop(key, None)
        except (StoreError, ServeError) as error:
            # what replicas share may be away for hours, and costs no job
            has_patience = isinstance(error, _AWAY) or num_tries < _MAX_TRIES
            is_final = error.http_status < 500 or not has_patience
            logger.warning("job %s: not published: %s", parcel.job.id, error)
            if not is_final:
                self._later[key] = (time.monotonic() + _RETRY_S, num_tries + 1)
                return
            self._later.pop(key, None)
            reason = JobError(error.code or "publication_failed", error.message)
            await self._desk.ask(self._refuse, parcel, reason)
            return
        if version is not None and self._state.door.tenancy is not None:
            detail = f"version {version.version} sha256:{version.digest}, trained by {parcel.job.id}"
            await self._state.door.tenancy.record(principal, AuditEvent.UPLOAD, version.name, detail)

    def _refuse(self, parcel: Parcel, reason: JobError) -> None:
        with self._desk.turns.taken(parcel.job.id) as is_ours:
            # somebody else's turn: if it is published after all, it is
            if is_ours and self._desk.outbox.is_waiting(parcel):
                self._desk.outbox.refused(parcel, reason)

    def _publish(self, parcel: Parcel, view: OwnedAdapters, proving: Proving) -> AdapterVersion | None:
        """Publish one parcel in a thread; None if somebody else does or did."""
        with self._desk.turns.taken(parcel.job.id) as is_ours:
            if not is_ours or not self._desk.outbox.is_waiting(parcel):
                return None
            try:
                folder = self._desk.folders.bring_export(parcel.job.id, parcel.export)
                return self._publish_from(folder, parcel, view, proving)
            except FileNotFoundError as error:
                raise StorageFailed("what the job has trained is gone; make the job again") from error
            finally:
                self._desk.folders.leave_job(parcel.job.id)

    def _publish_from(self, folder: Path, parcel: Parcel, view: OwnedAdapters, proving: Proving) -> AdapterVersion:
        version = _published(view, parcel.model_name)
        if version is None:
            # not trusted: what trained it read a tenant's data
            declared = declared_by(folder)
            version = view.put_dir(parcel.model_name, folder, declared=declared, proving=proving, once=True)
        result_files: tuple[str, ...] = ()
        if parcel.step is None:
            for event in self._promote(parcel, view, folder, version, proving):
                self._desk.outbox.tell(parcel.job.id, event)
            result_files = (self._keep_metrics(parcel),)
        self._desk.outbox.published(parcel, result_files=result_files)
        return version

    def _promote(
        self, parcel: Parcel, view: OwnedAdapters, folder: Path, version: AdapterVersion, proving: Proving
    ) -> list[NewEvent]:
        promotion = parcel.job.new.promotion
        if promotion is None:
            return []
        put = partial(view.put_dir, promotion.name, folder, declared=declared_by(folder), proving=proving, once=True)
        try:
            return promote(promotion, parcel.job.metrics, view, version.digest, put)
        except (*_AWAY, PublishedMeanwhile):
            # as long as the parcel waits, all of it is done again
            raise
        except (StoreError, ServeError) as error:
            # the job's own name is published; what it should replace stays as it is
            return [NewEvent(f"'{promotion.name}' was left as it is: {error.message}", level="warn")]

    def _keep_metrics(self, parcel: Parcel) -> str:
        """Keep the steps' metrics as a file of the tenant's; the same id whenever it is done again."""
        rows: dict[int, dict[str, object]] = {}
        for event in self._desk.jobs.events(parcel.job.id, None, limit=1 << 20).items:
            if event.type == "metrics" and event.data is not None:
                rows.setdefault(int(str(event.data["step"])), {}).update(event.data)
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
        file_id = f"file-{hashlib.sha256(parcel.job.id.encode()).hexdigest()[:24]}"
        file = self._desk.files.keep_result(parcel.job.tenant, _METRICS_NAME, text.getvalue().encode(), file_id=file_id)
        return file.id


@contextlib.asynccontextmanager
async def publishing(state: ApiState) -> AsyncIterator[None]:
    """Run a publisher for as long as the block does."""
    task = asyncio.create_task(JobPublisher(state).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _published(view: OwnedAdapters, name: str) -> AdapterVersion | None:
    """Return what a publisher that died before it could say so has published; the name holds the job's id."""
    try:
        return view.get(name)
    except AdapterNotFound:
        return None
