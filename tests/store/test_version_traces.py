"""Names live at random: what they mean is what a simple model says, and nothing that is needed is ever removed."""

from pathlib import Path

import pytest

from tests.store.version_traces import BUGS, Wrong, planted, run_embedded, run_shared


@pytest.mark.parametrize("seed", range(4))
def test_names_mean_what_the_model_says_and_nothing_needed_goes(tmp_path: Path, seed: int) -> None:
    run_embedded(tmp_path / "embedded", seed, 250)
    run_shared(tmp_path / "shared", seed, 250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_more_lives(tmp_path: Path, seed: int) -> None:
    run_embedded(tmp_path / "embedded", seed, 1500)
    run_shared(tmp_path / "shared", seed, 1500)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(tmp_path: Path, bug: str) -> None:
    with planted(bug), pytest.raises((Wrong, AssertionError, KeyError)):
        for seed in range(8):
            run_shared(tmp_path / str(seed), seed, 250)
