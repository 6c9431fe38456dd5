"""The hyper-parameters of a fine-tuning request: three places that may say them become one spec, checked to its end.

Owns what may be said where, and the names of fields in refusals. Invariant: a spec that passes here fails in the worker
for nothing that the request, its files' summaries and the base's configuration say.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.jobs.base_fit import fit_job
from adapters_store.jobs.jsonl import DataSummary
from adapters_store.jobs.model_name import check_suffix
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.jobs.spec_fields import CHECKS, refuse_empty
from adapters_store.registry import AdapterRef
from adapters_store.strict_json import Json
from serve.api.schemas_training import FineTuningRequest
from serve.errors import StartError
from serve.model.spec import read_spec as read_base

_MAX_SEED = (1 << 31) - 1
# what an adapter of these families may be: `model` is whatever a fine-tuned model differs in
_INGREDIENTS = {"experts": ("lora", "model"), "disjoint_with": ("s2ft", "model")}
_WANTED = {"experts": "a plain LoRA", "disjoint_with": "S2FT, which selects channels"}


def read_spec(body: FineTuningRequest) -> TrainSpec:
    """Return the one spec that `method`, `hyperparameters`, `adapter` and `seed` say together.

    Raises:
        InvalidJob: a field that nothing knows, of a wrong value, or said in two places; `param` is its dotted path.
    """
    values: dict[str, Json] = {}
    for place, said in _places(body):
        for name, value in said.items():
            if name in values and values[name] != value:
                raise InvalidJob(
                    _path(place, name), f"{_path(place, name)} and {_where(body, name)} differ; say it in one place"
                )
            values.setdefault(name, value)
    values.setdefault("seed", secrets.randbelow(_MAX_SEED))
    with _named_as_sent(body):
        if body.suffix:
            check_suffix(body.suffix)
        refuse_empty(values)
        return TrainSpec.parse(values)


def check_fit(
    body: FineTuningRequest, spec: TrainSpec, data: DataSummary, validation: DataSummary | None, model_dir: Path
) -> None:
    """Refuse what these files or this base cannot give.

    Raises:
        InvalidJob: `param` is the dotted path of the field that asks for too much.
    """
    with _named_as_sent(body):
        spec.check_data(data, validation)
        try:
            room = read_base(model_dir).room
        except StartError:
            # a base that cannot be read any more is the worker's to report
            return
        fit_job(spec, room)


def check_ingredient(field: str, name: str, ref: AdapterRef) -> None:
    """Refuse an adapter that cannot be an expert, or selects no channels; raises InvalidJob."""
    if ref.family not in _INGREDIENTS[field]:
        raise InvalidJob(
            f"adapter.{field}",
            f"{ascii(name)[:140]} in {field} is of the family {ref.family}; it must be {_WANTED[field]}",
        )


def _places(body: FineTuningRequest) -> list[tuple[str, dict[str, Json]]]:
    """Return what each place says, in the order in which they are read."""
    places: list[tuple[str, dict[str, Json]]] = []
    if body.method is not None and body.method.supervised is not None and body.method.supervised.hyperparameters:
        said = body.method.supervised.hyperparameters.model_dump(exclude_none=True)
        places.append(("method.supervised.hyperparameters", said))
    if body.hyperparameters is not None:
        places.append(("hyperparameters", body.hyperparameters.model_dump(exclude_none=True)))
    places.append(("adapter", body.adapter or {}))
    if body.seed is not None:
        places.append(("", {"seed": body.seed}))
    return places


def _where(body: FineTuningRequest, field: str) -> str:
    """Return the dotted path of a field: where the request says it first, or where it would."""
    for place, said in _places(body):
        if field in said:
            return _path(place, field)
    return _path("adapter", field) if field in CHECKS else field


def _path(place: str, field: str) -> str:
    return f"{place}.{field}".lstrip(".")


@contextmanager
def _named_as_sent(body: FineTuningRequest) -> Iterator[None]:
    try:
        yield
    except InvalidJob as error:
        raise InvalidJob(_where(body, error.param or ""), error.message, code=error.code) from None
