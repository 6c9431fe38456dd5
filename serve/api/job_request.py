"""A fine-tuning request becomes a job: names resolved, hyper-parameters checked (`job_fields`), inputs laid ready.

Owns the order, and what a job keeps of its request. Invariant: every name of a file or an
adapter is looked up as the principal sees it, before the job exists; nothing in a job is a path that a client wrote.
"""

import asyncio
from dataclasses import replace

from adapters_store.errors import AdapterNotFound, StoreAway, StoreError
from adapters_store.jobs.files import FINE_TUNE, DataFile
from adapters_store.jobs.job import Job, NewJob, Promotion
from adapters_store.jobs.job_errors import DataFileNotFound
from adapters_store.jobs.job_rows import new_id
from adapters_store.jobs.model_name import line_name
from adapters_store.jobs.spec import TrainSpec
from adapters_store.names import check_alias, check_name
from adapters_store.steering import share_of
from adapters_store.strict_json import Json
from serve.api.job_fields import check_fit, check_ingredient, read_spec
from serve.api.json_body import show
from serve.api.schemas_training import FineTuningRequest, Promote
from serve.api.state import ApiState
from serve.errors import InvalidValue, ModelNotFound, UnsupportedParameter

# the spelling beside OpenAI's
_METRICS = {"train_token_accuracy": "train_mean_token_accuracy", "valid_token_accuracy": "valid_mean_token_accuracy"}


async def create_job(state: ApiState, body: FineTuningRequest) -> Job:
    """Check a request to its last field and queue its job.

    Raises:
        InvalidValue, InvalidJob, UnsupportedParameter: a field. ModelNotFound, DataFileNotFound: what it names.
        TooManyJobs: the tenant's bound. StoreError: the disk.
    """
    if body.model != state.config.served_model_name:
        await _refuse_model(state, body.model)
    spec = read_spec(body)
    training, validation = await state.training.ask(_data_files, state, body)
    sources = await asyncio.to_thread(_sources, state, spec)
    summary = training.summary
    assert summary is not None, "data files for training were checked"
    checked = None if validation is None else validation.summary
    await asyncio.to_thread(check_fit, body, spec, summary, checked, state.config.model_dir)
    new = NewJob(
        tenant=state.store.principal.tenant,
        base=state.ready.base_fingerprint,
        model=body.model,
        training_file=training.id,
        validation_file=None if validation is None else validation.id,
        suffix=body.suffix or None,
        seed=spec.seed,
        spec=_said(spec),
        hyperparameters=_shown_hyperparameters(spec, summary.num_examples),
        metadata=body.metadata,
        promotion=None,
        sources=sources,
    )
    if body.promote is not None:
        new = _with_promotion(state, new, body.promote)
    return await state.training.ask(_queue, state, new, spec)


def _said(spec: TrainSpec) -> dict[str, Json]:
    """Return what a spec says beyond the defaults, as it is parsed again by whoever trains."""
    defaults = TrainSpec().to_json()
    always: dict[str, Json] = {"family": spec.family, "seed": spec.seed}
    return {name: value for name, value in spec.to_json().items() if value != defaults[name]} | always


def _shown_hyperparameters(spec: TrainSpec, num_examples: int) -> dict[str, Json]:
    """Return OpenAI's three with "auto" decided; no multiplier where the rate itself was given."""
    resolved = spec.resolved(num_examples)
    multiplier = spec.learning_rate_multiplier
    if multiplier is None and spec.learning_rate is None:
        multiplier = 1.0
    return {"n_epochs": resolved.n_epochs, "batch_size": resolved.batch_size, "learning_rate_multiplier": multiplier}


async def _refuse_model(state: ApiState, model: str) -> None:
    if await asyncio.to_thread(state.store.resolve, model) is not None:
        raise InvalidValue(
            f"{show(model)} is an adapter; jobs train from the base {state.config.served_model_name!r}", param="model"
        )
    raise ModelNotFound(
        f"the model {show(model)} does not exist; jobs train from the base {state.config.served_model_name!r}",
        param="model",
    )


def _data_files(state: ApiState, body: FineTuningRequest) -> tuple[DataFile, DataFile | None]:
    found: list[DataFile] = []
    for param, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        if file_id is None:
            continue
        file = state.training.files.get(file_id, state.tenant, param=param)
        if file.purpose != FINE_TUNE or file.summary is None:
            raise InvalidValue(f"the file {file_id} has the purpose {file.purpose!r}, not 'fine-tune'", param=param)
        found.append(file)
    return found[0], found[1] if len(found) > 1 else None


def _sources(state: ApiState, spec: TrainSpec) -> dict[str, str]:
    """Return the digests of the adapters that a spec names, as this principal sees them."""
    digests: dict[str, str] = {}
    for field in ("experts", "disjoint_with"):
        for name in getattr(spec, field):
            ref = state.store.resolve(name)
            if ref is None:
                raise AdapterNotFound(f"there is no adapter {show(name)}", param=f"adapter.{field}")
            check_ingredient(field, name, ref)
            digests[name] = ref.digest
    return digests


def _with_promotion(state: ApiState, new: NewJob, promote: Promote) -> NewJob:
    bounds = (promote.when.above, promote.when.below)
    if bounds == (None, None):
        raise InvalidValue("'above' or 'below' is needed: the metric's bound", param="promote.when")
    metric = _METRICS.get(promote.when.metric, promote.when.metric)
    has_validation = new.validation_file is not None or bool(new.spec.get("validation_split"))
    if metric.startswith("valid_") and not has_validation:
        raise UnsupportedParameter(
            f"{promote.when.metric} is not measured without validation data; send 'validation_file', or "
            "'validation_split' in 'adapter'",
            param="promote.when.metric",
        )
    name = promote.name or line_name(new).rstrip(":")
    try:
        check_alias(promote.alias)
        check_name(name, state.config.served_model_name)
        share_of(promote.canary or 0.0)
    except StoreError as error:
        field = "canary" if error.param == "percent" else error.param
        raise InvalidValue(error.message, param=f"promote.{field}") from None
    promotion = Promotion(name, metric, *bounds, alias=promote.alias, canary=promote.canary)
    return replace(new, promotion=promotion)


def _queue(state: ApiState, new: NewJob, spec: TrainSpec) -> Job:
    desk, job_id = state.training, new_id("ftjob-")
    files = {"train.jsonl": new.training_file}
    if new.validation_file is not None:
        files["valid.jsonl"] = new.validation_file
    adapters = {f"experts/{index}": new.sources[name] for index, name in enumerate(spec.experts)}
    adapters |= {f"disjoint/{index}": new.sources[name] for index, name in enumerate(spec.disjoint_with)}
    try:
        desk.folders.make_job(job_id, files, adapters)
        most = state.config.tenant_limits.max_training_jobs
        return desk.jobs.create(new, job_id=job_id, max_unfinished=most)
    except FileNotFoundError:
        raise DataFileNotFound("a file or an adapter of this job was deleted meanwhile") from None
    except StoreAway:
        # the row may be there: a folder without one goes with a sweep, a row without folder would fail
        raise
    except BaseException:
        desk.folders.remove_job(job_id)
        raise
