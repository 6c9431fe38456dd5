"""Two hundred thousand damaged adapters, refused or sound by a second opinion; and planted bugs, all of them found.

The work per mutant is bounded by what a reader asks of the file, not by a clock. `make test-long` runs fifty times as
many from other seeds.
"""

from pathlib import Path
from types import ModuleType

import pytest

from adapters_store import (
    canonical,
    gates,
    image_check,
    manifest,
    safetensors_header,
    strict_json,
)
from tests.store.folders import lora_tensors, safetensors_bytes
from tests.store.foreign_trials import config_seeds, folder_seeds, try_config, try_folder
from tests.store.mutant_trials import CanonicalTrials, Tally, try_header
from tests.store.mutator import Mutator
from tests.store.planted_rules import rules, switched_off

HEADER = safetensors_bytes(dict(list(lora_tensors(sites=("q_proj",)).items())[:2]))
# 200,000 together; a whole adapter costs twenty times a header
NUM_HEADERS, NUM_CONFIGS, NUM_ADAPTERS, NUM_FOLDERS = 120_000, 74_000, 4_500, 1_500
TIMES_IN_THE_LONG_RUN = 50


def run_headers(seed: int, count: int) -> Tally:
    tally, mutator = Tally(), Mutator(seed)
    for _ in range(count):
        try_header(mutator.safetensors(HEADER), tally)
    return tally


def run_configs(seed: int, count: int) -> Tally:
    tally, mutator, sound = Tally(), Mutator(seed), config_seeds()
    assert len(sound) >= 25
    for _ in range(count):
        try_config(mutator, sound, tally)
    return tally


def run_adapters(seed: int, count: int, folder: Path) -> Tally:
    tally, mutator = Tally(), Mutator(seed)
    trials = CanonicalTrials(folder, mutator)
    for _ in range(count):
        trials.try_one(tally)
    return tally


def run_folders(seed: int, count: int, folder: Path) -> Tally:
    tally, mutator = Tally(), Mutator(seed)
    sound = folder_seeds(folder)
    for number in range(count):
        try_folder(mutator, sound[number % len(sound)], folder, tally)
    return tally


def check(tally: Tally, count: int) -> None:
    """Nothing found, nothing lost, and mutants of both ends: a search that only ever meets refusals sees nothing."""
    assert tally.findings == []
    assert tally.num_mutants == count
    assert tally.num_accepted > count // 100 and tally.num_refused > count // 3


def test_a_sound_adapter_of_every_op_is_sound_to_both(tmp_path: Path) -> None:
    tally = Tally()
    trials = CanonicalTrials(tmp_path, Mutator(0))
    for manifest_bytes, image in trials.seeds():
        trials.try_files(manifest_bytes, image, tally)
    assert (tally.findings, tally.num_accepted) == ([], len(trials.seeds()))


def test_damaged_headers_are_refused_or_sound() -> None:
    check(run_headers(1, NUM_HEADERS), NUM_HEADERS)


@pytest.mark.filterwarnings("ignore:No value was provided:UserWarning")
def test_damaged_configs_are_refused_or_sound() -> None:
    check(run_configs(2, NUM_CONFIGS), NUM_CONFIGS)


def test_damaged_adapters_are_refused_or_sound(tmp_path: Path) -> None:
    check(run_adapters(3, NUM_ADAPTERS, tmp_path), NUM_ADAPTERS)


def test_damaged_uploads_are_refused_or_do_what_they_say(tmp_path: Path) -> None:
    check(run_folders(4, NUM_FOLDERS, tmp_path), NUM_FOLDERS)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore:No value was provided:UserWarning")
def test_ten_million_mutants(tmp_path: Path) -> None:
    times = TIMES_IN_THE_LONG_RUN
    check(run_headers(101, times * NUM_HEADERS), times * NUM_HEADERS)
    check(run_configs(102, times * NUM_CONFIGS), times * NUM_CONFIGS)
    check(run_adapters(103, times * NUM_ADAPTERS, tmp_path), times * NUM_ADAPTERS)
    check(run_folders(104, times * NUM_FOLDERS, tmp_path), times * NUM_FOLDERS)


# a module of the store, and a piece of the condition that is switched off
PLANTED: list[tuple[ModuleType, str]] = [
    (safetensors_header, "data_start > file_bytes"),
    (safetensors_header, "isinstance(metadata, dict)"),
    (safetensors_header, "_NAME.match(name)"),
    (safetensors_header, "dtype not in ITEM_BYTES"),
    (safetensors_header, "len(shape) > _MAX_DIMS"),
    (safetensors_header, "len(offsets) != 2"),
    (safetensors_header, "offsets[1] - offsets[0] != num_bytes"),
    (safetensors_header, "slot.begin != position"),
    (safetensors_header, "position != data_bytes"),
    (strict_json, "key in seen"),
    (canonical, "header.tensors != layout"),
    (canonical, "manifest.base != base"),
    (manifest, "not is_sane"),
    (manifest, "max(widths"),
    (gates, "experts.top_k != num_experts"),
    (image_check, "any(raw)"),
    (image_check, "is_finite(raw"),
    (image_check, "not any("),
    (image_check, "indices[0] < 0"),
    (image_check, "np.diff(indices) <= 0"),
    (image_check, "indptr[0] != 0"),
    (image_check, "columns.min()"),
]


@pytest.mark.parametrize(("module", "condition"), PLANTED, ids=[condition for _, condition in PLANTED])
def test_a_rule_that_is_switched_off_is_missed(module: ModuleType, condition: str, tmp_path: Path) -> None:
    (line,) = [line for line, found in rules(module) if condition in found]
    tally, mutator = Tally(), Mutator(5)
    trials = CanonicalTrials(tmp_path, mutator)
    with switched_off(module, line):
        while not tally.findings and tally.num_mutants < 6000:
            if module in (safetensors_header, strict_json):
                try_header(mutator.safetensors(HEADER), tally)
            else:
                trials.try_one(tally)
    assert tally.findings
    # and the module is what it was
    assert not run_headers(6, 50).findings
