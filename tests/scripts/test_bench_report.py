"""The CPU benchmark's arithmetic: ratios within a repeat, shares of the floor, results to go on from."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts.bench_load import LoadResult
from scripts.bench_report import OURS, Cell, Floor, StepTimes, against_others, of_floor, of_steps, ratios, read_saved


def cell(repeat: int, system: str, num_adapters: int, tokens_per_s: float) -> Cell:
    """Return a cell of 32 clients."""
    return Cell(repeat, system, 32, num_adapters, LoadResult(tokens_per_s, 1.0, 2.0, 0.1, 0.1, 5.0, 9.0, 0), 1.5)


CELLS = [
    cell(0, OURS, 0, 100.0),
    cell(0, OURS, 8, 80.0),
    cell(1, OURS, 0, 50.0),
    cell(1, OURS, 8, 45.0),
    cell(0, "peer", 8, 20.0),
]


def test_a_ratio_is_formed_within_one_repeat_alone() -> None:
    own = [one for one in CELLS if one.system == OURS and one.num_adapters == 8]
    assert ratios(CELLS, own, lambda one: (OURS, one.concurrency, 0)) == [0.8, 0.9]
    assert against_others(CELLS) == [f"{OURS} / peer, concurrency 32, 8 adapters: 4.00"]


def test_the_floor_of_a_request_is_its_share_of_a_prefill_and_of_every_decode_step() -> None:
    # 128 of 512 rows of 1 s; 64 steps of 0.5 s for 32 requests
    floor = Floor(512, 1.0, {32: 0.5})
    assert floor.tokens_per_s(32, 128, 64) == pytest.approx(64 / (0.25 + 1.0))
    assert floor.tokens_per_s(8, 128, 64) is None
    (line,) = of_floor(CELLS[:1], {0: Floor(512, 4.0, {32: 0.0})}, 128, 64)
    assert "156 %" in line


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    floors = {1: Floor(512, 1.0, {8: 0.25, 32: 0.5})}
    saved = {
        "cells": [asdict(one) for one in CELLS],
        "floors": {repeat: asdict(floor) for repeat, floor in floors.items()},
        "peft_tokens_per_s": {1: 26.5},
    }
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert read_saved(path) == (CELLS, floors, {1: 26.5}, {}), "a file from before steps were measured"
    steps = {0: StepTimes(0.25, {8: 1.1, 32: 1.25})}
    path.write_text(json.dumps(saved | {"steps": {k: asdict(own) for k, own in steps.items()}}), encoding="utf-8")
    assert read_saved(path) == (CELLS, floors, {1: 26.5}, steps)


def test_steps_are_set_against_the_cells_of_their_own_repeat() -> None:
    # the result's second field is its TTFT; of the last repeat no step was measured
    results = [LoadResult(10.0, ttft_s, 1.0, 0.1, 0.1, 5.0, 9.0, 0) for ttft_s in (0.3, 0.5, 9.0)]
    cells = [Cell(repeat, OURS, 1, 0, result) for repeat, result in enumerate(results)]
    steps = {0: StepTimes(0.25, {8: 1.05}), 1: StepTimes(0.4, {8: 1.15})}
    assert of_steps(cells, steps) == [
        "TTFT p50 at concurrency 1: 1.23 (1.20 to 1.25) times one bare forward of the prompt",
        "decode step over 8 adapters: 1.10 (1.05 to 1.15) times the base's step plus their bytes",
    ]
    assert of_steps([], {}) == []
