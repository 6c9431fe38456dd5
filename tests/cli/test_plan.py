"""The planner's arithmetic against the figures that docs/kernels.md gives for Llama-3.1-8B on one H200."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters_store.base import BaseDims
from serve.cli.app import app
from serve.cli.planning import (
    DEVICES,
    Workload,
    adapter_image_bytes,
    decode_step,
    kv_bytes_per_token,
    num_parameters,
    plan_memory,
    prefill_s,
    servers_needed,
    steady_step,
)

LLAMA = BaseDims("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, "sha256:none")
H200 = DEVICES["h200"]
WORK = Workload(num_adapters=100, rank=16, requests_per_s=2.0, prompt_tokens=512, output_tokens=256)
# adapters that never share a step, so that every sequence has its own
DISTINCT = replace(WORK, num_adapters=10**12)


def test_sizes_are_those_of_the_model() -> None:
    assert num_parameters(LLAMA) == pytest.approx(8.03e9, rel=1e-3)
    # one unit of rank over the seven modules is exactly 5 MiB, a token's keys and values 128 KiB
    assert [adapter_image_bytes(LLAMA, rank) for rank in (8, 16, 64)] == [40 << 20, 80 << 20, 320 << 20]
    assert kv_bytes_per_token(LLAMA) == 128 << 10


@pytest.mark.parametrize(
    ("num_adapters", "rank", "microseconds", "share"),
    [(1, 16, 20, 0.006), (8, 16, 156, 0.045), (32, 16, 624, 0.179), (128, 16, 2497, 0.715), (32, 64, 2497, 0.715)],
)
def test_the_floors_are_the_published_ones(num_adapters: int, rank: int, microseconds: int, share: float) -> None:
    step = decode_step(LLAMA, H200, replace(DISTINCT, rank=rank), num_adapters)
    assert step.distinct_adapters == pytest.approx(num_adapters, rel=1e-3)
    assert step.base_s * 1e6 == pytest.approx(3491, rel=2e-3)
    assert step.adapter_s * 1e6 == pytest.approx(microseconds, rel=0.03)
    assert step.adapter_s / step.base_s == pytest.approx(share, abs=8e-4)


def test_a_prompt_of_8k_tokens_takes_what_its_products_take() -> None:
    plain = prefill_s(LLAMA, H200, replace(WORK, num_adapters=0, prompt_tokens=8192))
    # 145 ms in the design, which counts the output head too
    assert plain == pytest.approx(0.145, rel=0.02)
    assert prefill_s(LLAMA, H200, replace(WORK, prompt_tokens=8192)) / plain - 1 == pytest.approx(0.006, abs=5e-4)


def test_memory_adds_up_and_names_what_does_not_fit() -> None:
    memory = plan_memory(LLAMA, H200, replace(WORK, num_adapters=10_000), 0.9)
    assert memory is not None
    parts = memory.weight_bytes + memory.activation_bytes + memory.adapter_bytes + memory.kv_bytes
    assert parts == pytest.approx(memory.usable_bytes) and memory.usable_bytes == pytest.approx(126.9e9)
    assert memory.adapters_on_device * memory.bytes_per_adapter <= memory.adapter_bytes
    assert memory.kv_tokens * kv_bytes_per_token(LLAMA) <= memory.kv_bytes
    few = plan_memory(LLAMA, H200, replace(WORK, num_adapters=3), 0.9)
    assert few is not None and few.adapters_on_device == 3
    # what adapters do not need is for keys and values
    assert few.kv_bytes > memory.kv_bytes
    assert plan_memory(LLAMA, DEVICES["l4"], WORK, 0.6) is None


def test_in_the_steady_state_as_many_sequences_end_as_come() -> None:
    step = steady_step(LLAMA, H200, replace(WORK, requests_per_s=20.0), 256)
    assert step is not None
    busy = 20.0 * prefill_s(LLAMA, H200, WORK)
    assert step.num_sequences / (256 * step.seconds / (1 - busy)) == pytest.approx(20.0, rel=1e-6)


def test_more_load_needs_more_servers_and_never_fewer() -> None:
    needed = [servers_needed(LLAMA, H200, replace(WORK, requests_per_s=rate), 256) for rate in (1, 10, 100, 1000)]
    assert None not in needed and needed == sorted(needed, key=lambda number: number or 0)
    assert needed[0] == 1 and (needed[-1] or 0) > 5
    # prompts alone are more than one server can multiply
    assert steady_step(LLAMA, H200, replace(WORK, requests_per_s=1e6), 256) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with nothing but a config.json."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {name: getattr(LLAMA, name) for name in names} | {"model_type": "llama", "vocab_size": LLAMA.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_the_command_prints_the_plan(folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["plan", "--model", str(folder), "--gpu", "h200", "--adapters", "1000", "--qps", "20"]
    )
    assert done.exit_code == 0, done.output
    assert "16.06 GB" in done.output and "at 80.0 MiB" in done.output and "(bound by memory" in done.output
    assert "a real step is slower" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "h999"], "give one of h200"),
        (["--gpu", "l4", "--gpu-memory-utilization", "0.6"], "do not fit 0.6 of 24 GB"),
        (["--qps", "100000"], "one server does not keep up"),
    ],
)
def test_what_cannot_work_is_said(arguments: list[str], says: str, folder: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", str(folder), *arguments])
    assert says in done.output
    assert done.exit_code == (0 if "--qps" in arguments else 2)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", str(tmp_path)])
    assert done.exit_code == 2 and "give a folder with config.json" in done.output
