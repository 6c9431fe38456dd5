"""Tuning without a GPU: what is tried, what is kept, and that candidates go through the model they will serve in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapter_kernels.gpu.launch_config import TUNED_OPS, LaunchConfig
from serve.engine.device_timing import Timing
from serve.engine.random_steps import RandomAdapters, decode_step
from serve.engine.tune import Bench, tune
from serve.engine.tune_choices import Sample, candidates, choose
from serve.model.spec import read_spec
from tests.tiny_model import write_tiny_model

CPU = torch.device("cpu")


def sample(config: LaunchConfig | None, median_us: float, spread_us: float = 1.0) -> Sample:
    return Sample(config, median_us, median_us - spread_us / 2, median_us + spread_us / 2)


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize("op", TUNED_OPS)
def test_candidates_are_few_distinct_and_valid(op: str, block_rows: int) -> None:
    found = candidates(op, block_rows)
    assert 4 <= len(found) <= 64
    assert len(set(found)) == len(found)
    for config in found:
        assert all(value & (value - 1) == 0 for value in (config.block_k, config.block_r, config.block_o))


def test_side_kernels_are_not_tried_with_tiles_that_crowd_out_the_gemm() -> None:
    for config in candidates("shrink", 64):
        assert 2 * config.num_stages * config.block_k * (64 + config.block_r) <= 32 << 10


def test_the_fastest_wins_when_it_is_faster_than_the_spread() -> None:
    quick, slow = LaunchConfig(block_k=128), LaunchConfig(block_k=256)
    assert choose(sample(None, 100.0), [sample(slow, 120.0), sample(quick, 90.0)]) == quick


@pytest.mark.parametrize("median_us", [99.5, 100.0, 130.0])
def test_what_is_as_fast_changes_nothing(median_us: float) -> None:
    assert choose(sample(None, 100.0), [sample(LaunchConfig(), median_us)]) is None
    # a noisy candidate must win by more than its noise
    assert choose(sample(None, 100.0), [sample(LaunchConfig(), 90.0, spread_us=20.0)]) is None


def test_nothing_tried_changes_nothing() -> None:
    assert choose(sample(None, 100.0), []) is None


def test_each_op_is_tuned_on_top_of_those_before_it(tmp_path: Path) -> None:
    calls: list[int] = []
    lines: list[str] = []

    def falling(run: Callable[[], object], device: torch.device) -> Timing:
        # each candidate is faster than all before it; nothing runs
        calls.append(1)
        return Timing.of([1000.0 - len(calls)])

    bench = Bench.build(read_spec(write_tiny_model(tmp_path / "tiny")), CPU, falling, max_rows=8)
    adapters = RandomAdapters.build(bench.spec, 4, 2, bench.dtype, CPU, max_rows=8)
    steps = [decode_step(bench.spec, rows, 20, adapters.route([0, 1, -1][:rows]), CPU) for rows in (3, 2)]
    found = tune(bench, steps, lines.append)
    # decode attention has one row, measured in a step of 17 to 256 rows
    ops = {"shrink", "expand", "qkv_sink", "swiglu_sink"}
    assert found == {(op, "narrow/1"): candidates(op, 1)[-1] for op in ops}
    # two steps of one shape class are tuned once
    assert len(lines) == len(ops)
    assert len(calls) == sum(1 + len(candidates(op, 1)) for op in ops)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_candidate_that_fails_is_left_out(tmp_path: Path) -> None:
    lines: list[str] = []

    def fussy(run: Callable[[], object], device: torch.device) -> Timing:
        if not lines:
            lines.append("first")
            return Timing.of([1000.0])
        raise RuntimeError("out of resources")

    bench = Bench.build(read_spec(write_tiny_model(tmp_path / "tiny")), CPU, fussy, max_rows=8)
    step = decode_step(bench.spec, 2, 20, None, CPU)
    with pytest.raises(RuntimeError, match="out of resources"):
        # the second op's present tiles fail: that is no candidate
        tune(bench, [step], lines.append)
    assert sum("RuntimeError" in line for line in lines) == len(candidates("shrink", 1))
