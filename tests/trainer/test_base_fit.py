"""What a base and a job's files cannot give is refused by the name of the field that asks for it."""

import pytest

from adapters_store.base import BaseDims
from adapters_store.jobs.base_fit import BaseRoom, fit_job
from adapters_store.jobs.jsonl import DataSummary
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json

DIMS = BaseDims(
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    tie_word_embeddings=True,
    weights_fingerprint="sha256:" + "0" * 64,
)
ROOM = BaseRoom(DIMS, num_positions=256)
LABELS = ("poet", "clerk")


def summary(num_examples: int = 8, tasks: tuple[str, ...] = ()) -> DataSummary:
    """Return what a check found in a file all of whose examples are labelled, if any is."""
    return DataSummary(num_examples, "chat", 100, "0" * 64, tasks, num_examples if tasks else 0)


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"max_length": 257}, "max_length", ["257", "256 positions"]),
        ({"family": "prompt", "num_virtual_tokens": 4096}, "num_virtual_tokens", ["4096", "256", "at most 248"]),
        ({"family": "prompt", "num_virtual_tokens": 249}, "num_virtual_tokens", ["249", "at most 248"]),
        ({"family": "prompt", "num_virtual_tokens": 56, "max_length": 201}, "max_length", ["201", "56 of them"]),
        ({"family": "s2ft", "channels": 17}, "channels", ["17 of 64", "(16)"]),
        ({"family": "s2ft", "channels": [4, 4, 100_000]}, "channels", ["layer 2", "100000 of 64"]),
        ({"family": "s2ft", "channels": [4, 4]}, "channels", ["2 numbers", "3 layers"]),
        ({"family": "s2ft", "channels": [0, 0, 0]}, "channels", ["nothing would be trained"]),
        ({"family": "s2ft", "rank": 256}, "rank", ["rank 256", "(16)"]),
        ({"family": "s2ft", "channels": 9, "target_modules": ["v_proj"]}, "channels", ["9 of 32", "(8)"]),
    ],
)
def test_what_a_base_has_no_room_for_is_refused(given: dict[str, Json], param: str, words: list[str]) -> None:
    with pytest.raises(InvalidJob) as refused:
        fit_job(TrainSpec.parse(given), ROOM)
    assert refused.value.param == param
    assert all(word in refused.value.message for word in words), refused.value.message


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 256},
        {"family": "prompt", "num_virtual_tokens": 248},
        {"family": "s2ft", "channels": 16},
        {"family": "s2ft", "channels": [0, 16, 0], "target_modules": "all-linear"},
        {"family": "s2ft", "ratio": 0.25},
    ],
    ids=str,
)
def test_what_just_fits_is_taken(given: dict[str, Json]) -> None:
    if given.get("target_modules") == "all-linear":
        with pytest.raises(InvalidJob, match="16 of 32"):
            fit_job(TrainSpec.parse(given), ROOM)
        given = {**given, "channels": [0, 8, 0]}
    assert fit_job(TrainSpec.parse(given), ROOM).max_length in (8, 256)


@pytest.mark.parametrize(
    ("given", "has_valid", "param"),
    [
        ({"eval_every": 5}, False, "eval_every"),
        ({"eval_every": 5, "early_stopping": 2}, False, "early_stopping"),
        ({"validation_split": 0.01}, False, "validation_split"),
        ({"validation_split": 0.2}, True, "validation_split"),
        ({"family": "meteora", "experts": ["poet", "clerk"]}, False, "training_file"),
    ],
    ids=str,
)
def test_what_files_cannot_give_is_refused(given: dict[str, Json], has_valid: bool, param: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        TrainSpec.parse(given).check_data(summary(), summary() if has_valid else None)
    assert refused.value.param == param


def test_validation_that_there_is_may_be_asked_for() -> None:
    TrainSpec.parse({"eval_every": 5, "early_stopping": 2}).check_data(summary(), summary())
    TrainSpec.parse({"validation_split": 0.2, "eval_every": 5}).check_data(summary(), None)


def test_labels_are_the_experts_names_without_their_versions() -> None:
    spec = TrainSpec.parse({"family": "meteora", "experts": ["poet@2", "clerk@sha256:" + "0" * 64]})
    spec.check_data(summary(tasks=LABELS), None)
    spec.check_data(summary(tasks=LABELS), summary(tasks=("poet",)))
    for tasks in (("poet@2", "clerk"), ("painter",)):
        with pytest.raises(InvalidJob, match="the job's experts are poet, clerk") as refused:
            spec.check_data(summary(tasks=tasks), None)
        assert refused.value.param == "training_file"
    with pytest.raises(InvalidJob) as refused:
        spec.check_data(summary(tasks=LABELS), summary(tasks=("painter",)))
    assert refused.value.param == "validation_file"


def test_gates_that_learn_from_no_label_need_none() -> None:
    TrainSpec.parse({"family": "meteora", "experts": ["a", "b"], "gate_loss_weight": 0}).check_data(summary(), None)
