"""How many tokens a row may have: what the job says, or else what the base takes; where it trains."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.jobs.base_fit import AUTO_MAX_LENGTH
from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json
from serve.trainer.loading import fit_base, load_base, read_base
from serve.trainer.progress import TrainingFailed
from tests.trainer.tiny_base import write_base

NUM_POSITIONS = 256


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ({}, 256),
        ({"max_length": "auto"}, 256),
        ({"family": "prompt", "num_virtual_tokens": 6}, 250),
        ({"max_length": 64}, 64),
    ],
    ids=["unsaid", "auto", "behind a prompt", "said"],
)
def test_rows_are_as_long_as_the_base_takes_unless_the_job_says_otherwise(
    given: dict[str, Json], decided: int, tmp_path: Path
) -> None:
    base = read_base(write_base(tmp_path / "base"))
    assert fit_base(TrainSpec.parse(given), base).max_length == decided


def test_no_row_is_longer_than_2048_tokens_unless_the_job_says_so(tmp_path: Path) -> None:
    roomy = replace(read_base(write_base(tmp_path / "base")), max_position_embeddings=100_000)
    assert fit_base(TrainSpec(), roomy).max_length == AUTO_MAX_LENGTH == 2048
    assert fit_base(TrainSpec(max_length=4096), roomy).max_length == 4096


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"'cuda:99'; this machine's torch sees [0-9]+ CUDA devices") as refused:
        load_base(write_base(tmp_path / "base"), TrainSpec(), "cuda:99")
    assert refused.value.code == "bad_device"


@pytest.mark.parametrize("given", [{}, {"family": "prompt", "num_virtual_tokens": 6}], ids=["lora", "prompt"])
def test_more_tokens_than_the_base_has_positions_are_refused(given: dict[str, Json], tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    too_many = NUM_POSITIONS + 1 - (6 if given else 0)
    with pytest.raises(TrainingFailed, match=f"max_length is {too_many} tokens; the base has {NUM_POSITIONS}"):
        fit_base(TrainSpec.parse({**given, "max_length": too_many}), base)
    assert fit_base(TrainSpec.parse({**given, "max_length": too_many - 1}), base).max_length == too_many - 1
