"""What a client may send to start a fine-tuning job: OpenAI's fields, and ours beside them.

Owns the shapes; the hyper-parameters themselves are checked by `adapters_store.jobs.spec`, the one white list.
Invariant: as in `schemas`, no coercion and a bound on every size; and here no unknown field passes, since a field of a
job that is not obeyed is a wrong model.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

from serve.api.schemas import RequestModel

MAX_METADATA = 16
_Id = Annotated[str, Field(min_length=1, max_length=128)]
# checked by the white list of `adapter`'s fields, which says the limit; a union here would only name its first branch
_Count = Annotated[JsonValue, WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]})]
_Rate = Annotated[JsonValue, WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}]})]
_Metric = Literal[
    "train_loss",
    "train_mean_token_accuracy",
    "train_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_token_accuracy",
]


class _Strict(BaseModel):
    """An object of which every field is known."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Hyperparameters(_Strict):
    """OpenAI's three; "auto" is decided by the size of the data."""

    n_epochs: _Count | None = None
    batch_size: _Count | None = None
    learning_rate_multiplier: _Rate | None = None


class Supervised(_Strict):
    """The one method that is trained here."""

    hyperparameters: Hyperparameters | None = None


class Method(_Strict):
    """How to train; `dpo` and `reinforcement` are OpenAI's others, refused by name."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class Condition(_Strict):
    """A metric of the finished job and its bound."""

    metric: _Metric
    above: float | None = None
    below: float | None = None


class Promote(_Strict):
    """What becomes of a good result: `name`'s next version, on a share of its requests, then under the alias."""

    when: Condition
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    alias: Annotated[str, Field(min_length=1, max_length=64)] = "stable"
    canary: Annotated[float, Field(ge=0, le=100)] | None = None


class FineTuningRequest(RequestModel):
    """POST /v1/fine_tuning/jobs."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused_fields: ClassVar[frozenset[str]] = frozenset({"integrations"})

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: _Id
    validation_file: _Id | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 31) - 1)] | None = None
    method: Method | None = None
    # OpenAI's form of before `method`
    hyperparameters: Hyperparameters | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    integrations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    # our extension: which family, and everything that its training takes
    adapter: Annotated[dict[Annotated[str, Field(max_length=64)], JsonValue], Field(max_length=64)] | None = None
    promote: Promote | None = None
