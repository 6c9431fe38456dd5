"""The routes of `/v1/fine_tuning/jobs`: create, list, look at, cancel, pause, resume, events, checkpoints.

Owns the JSON of jobs, events and checkpoints, as OpenAI's clients read it. Invariant: a status is one of OpenAI's six:
a paused job is shown as queued, and one that is being published as running.
"""

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request

from adapters_store.jobs.job import Checkpoint, Job, JobEvent, JobPage, JobState
from serve.api.errors import error_responses
from serve.api.job_request import create_job
from serve.api.json_body import read_model
from serve.api.openapi import json_endpoint
from serve.api.schemas_training import MAX_METADATA, FineTuningRequest
from serve.api.state import api_state
from serve.errors import InvalidValue
from serve.tenants.audit import AuditEvent

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], responses=error_responses())

Json = dict[str, object]

MAX_PAGE = 1000
_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_After = Annotated[str | None, Query(max_length=128)]
_METADATA_KEY = re.compile(r"metadata\[([^\[\]]{1,64})\]\Z")
_SHOWN = {JobState.PAUSED: JobState.QUEUED, JobState.PUBLISHING: JobState.RUNNING}


@router.post("", **json_endpoint(FineTuningRequest))
async def create(request: Request) -> Json:
    """Queue a job that trains an adapter of the base from an uploaded file."""
    state = api_state(request)
    job = await create_job(state, await read_model(request, FineTuningRequest))
    await state.record(AuditEvent.TRAINING, job.id, f"created from {job.new.training_file}")
    return job_json(job)


@router.get("")
async def list_jobs(request: Request, after: _After = None, limit: _Limit = 20) -> Json:
    """List jobs, newest first; `metadata[k]=v` keeps those with that entry, `metadata=null` those without any."""
    state = api_state(request)
    wanted, is_null = _metadata(request)

    def read() -> JobPage[Job]:
        jobs = state.training.jobs
        return jobs.page(state.tenant, after=after, limit=limit, metadata=wanted, without_metadata=is_null)

    page = await state.training.ask(read)
    return _list_of([job_json(job) for job in page.items], page.has_more)


@router.get("/{job_id}")
async def retrieve(request: Request, job_id: str) -> Json:
    """Return one job."""
    state = api_state(request)
    return job_json(await state.training.ask(state.training.jobs.get, job_id, state.tenant))


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str) -> Json:
    """End a job for good; checkpoints that were published stay."""
    state = api_state(request)
    job = await state.training.ask(state.training.jobs.cancel, job_id, state.tenant)
    await state.record(AuditEvent.TRAINING, job.id, "cancelled")
    return job_json(job)


@router.post("/{job_id}/pause")
async def pause(request: Request, job_id: str) -> Json:
    """Let a job rest; it goes on from its last saved step when it is resumed."""
    state = api_state(request)
    return job_json(await state.training.ask(state.training.jobs.pause, job_id, state.tenant))


@router.post("/{job_id}/resume")
async def resume(request: Request, job_id: str) -> Json:
    """Queue a paused job again."""
    state = api_state(request)
    return job_json(await state.training.ask(state.training.jobs.resume, job_id, state.tenant))


@router.get("/{job_id}/events")
async def list_events(request: Request, job_id: str, after: _After = None, limit: _Limit = 20) -> Json:
    """List a job's events, newest first."""
    state = api_state(request)

    def read() -> JobPage[JobEvent]:
        return state.training.jobs.events(job_id, state.tenant, after=after, limit=limit)

    page = await state.training.ask(read)
    return _list_of([_event_json(event) for event in page.items], page.has_more)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(request: Request, job_id: str, after: _After = None, limit: _Limit = 10) -> Json:
    """List a job's checkpoints, newest first; each can be asked for as `model`."""
    state = api_state(request)

    def read() -> JobPage[Checkpoint]:
        return state.training.jobs.checkpoints(job_id, state.tenant, after=after, limit=limit)

    page = await state.training.ask(read)
    return _list_of([_checkpoint_json(checkpoint) for checkpoint in page.items], page.has_more)


def job_json(job: Job) -> Json:
    """Return a job as OpenAI's clients read it."""
    new, progress, has_ended = job.new, job.progress, job.finished is not None
    estimate = None
    if progress is not None and progress.steps_per_s > 0 and not has_ended and job.state is JobState.RUNNING:
        estimate = int(progress.updated + (progress.total_steps - progress.step) / progress.steps_per_s)
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": new.model,
        "created_at": job.created,
        "finished_at": job.finished,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": new.tenant,
        "result_files": list(job.result_files),
        "status": _SHOWN.get(job.state, job.state).value,
        "validation_file": new.validation_file,
        "training_file": new.training_file,
        "hyperparameters": new.hyperparameters,
        "trained_tokens": job.trained_tokens if job.state is JobState.SUCCEEDED else None,
        "error": None
        if job.error is None
        else {"code": job.error.code, "message": job.error.message, "param": job.error.param},
        "seed": new.seed,
        "estimated_finish": estimate,
        "integrations": [],
        "method": {"type": "supervised", "supervised": {"hyperparameters": new.hyperparameters}},
        "metadata": new.metadata,
    }


def _event_json(event: JobEvent) -> Json:
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def _checkpoint_json(checkpoint: Checkpoint) -> Json:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": checkpoint.created,
        "fine_tuned_model_checkpoint": checkpoint.model_name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }


def _list_of(data: list[Json], has_more: bool) -> Json:
    ids = [item["id"] for item in data]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}


def _metadata(request: Request) -> tuple[dict[str, str], bool]:
    """Return the entries that a list is filtered by, and whether jobs without metadata are asked for."""
    wanted: dict[str, str] = {}
    is_null = False
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                raise InvalidValue("send metadata[key]=value, or metadata=null", param="metadata")
            is_null = True
        elif name.startswith("metadata["):
            match = _METADATA_KEY.match(name)
            if match is None or match[1] in wanted or len(wanted) == MAX_METADATA:
                raise InvalidValue(f"send up to {MAX_METADATA} metadata[key]=value, each key once", param="metadata")
            wanted[match[1]] = value
    if is_null and wanted:
        raise InvalidValue("metadata=null and metadata[key]=value exclude each other", param="metadata")
    return wanted, is_null
