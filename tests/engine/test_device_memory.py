"""How a device's memory is shared out, which device is chosen, and what a start that cannot work says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve.config import EngineConfig
from serve.engine.device_batch import StepBounds
from serve.engine.device_memory import DeviceMemory, Shares, Wishes, share_out, usable_bytes
from serve.engine.device_trial import RanklessAdapters, run_trial
from serve.engine.plan import LoadResult, Row, RowResult, StepPlan
from serve.engine.start_facts import choose_device, read_model_facts
from serve.errors import StartError
from tests.tiny_model import write_tiny_model

GIB = 1 << 30
BLOCK = 1 << 20


def wishes(**fields: int | None) -> Wishes:
    values: dict[str, int | None] = {"num_kv_blocks": None, "max_useful_blocks": 1 << 30, "block_bytes": BLOCK}
    values |= {"adapter_bytes": 2 * GIB, **fields}
    return Wishes(**values)  # type: ignore[arg-type]


def test_what_is_left_of_the_utilization_is_usable() -> None:
    assert usable_bytes(DeviceMemory(100 * GIB, 20 * GIB, 5 * GIB), 0.9) == 65 * GIB
    with pytest.raises(StartError, match=r"0\.25; raise it, lower --max-step-tokens"):
        usable_bytes(DeviceMemory(100 * GIB, 20 * GIB, 5 * GIB), 0.25)


def test_adapters_get_what_they_may_and_the_cache_the_rest() -> None:
    assert share_out(10 * GIB, wishes()) == Shares(8 * 1024, 2 * GIB)
    # half of what is there at most ...
    assert share_out(3 * GIB, wishes()) == Shares(1536, 3 * GIB // 2)
    # ... unless the cache cannot use its half
    assert share_out(3 * GIB, wishes(max_useful_blocks=100)) == Shares(100, 2 * GIB)
    assert share_out(2 * GIB, wishes(max_useful_blocks=100)) == Shares(100, 2 * GIB - 100 * BLOCK)
    assert share_out(10 * GIB, wishes(adapter_bytes=0)) == Shares(10 * 1024, 128)


def test_adapters_get_a_quarter_when_nobody_asks() -> None:
    assert share_out(8 * GIB, wishes(adapter_bytes=None)) == Shares(6 * 1024, 2 * GIB)
    assert share_out(8 * GIB, wishes(adapter_bytes=None, num_kv_blocks=1024)) == Shares(1024, 2 * GIB)


def test_a_fixed_number_of_blocks_is_kept_and_adapters_fit_around_it() -> None:
    assert share_out(3 * GIB, wishes(num_kv_blocks=1024)) == Shares(1024, 2 * GIB)
    assert share_out(2 * GIB, wishes(num_kv_blocks=1024)) == Shares(1024, GIB)
    with pytest.raises(StartError, match="--kv-blocks 1025 take 1025 MiB and 1024 MiB are free, enough for 1024"):
        share_out(GIB, wishes(num_kv_blocks=1025))
    with pytest.raises(StartError, match="--kv-blocks 0: at least 1"):
        share_out(GIB, wishes(num_kv_blocks=0))


def test_too_little_for_one_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(StartError, match=f"one KV block of {BLOCK} bytes: {BLOCK} bytes are free, {BLOCK // 2}"):
        share_out(BLOCK, wishes())


def test_whatever_is_given_away_fits() -> None:
    for usable in range(BLOCK * 2, BLOCK * 40, 700_001):
        for fields in (
            {},
            {"adapter_bytes": None},
            {"adapter_bytes": 5 * BLOCK + 77},
            {"max_useful_blocks": 3},
            {"num_kv_blocks": 2},
        ):
            shares = share_out(usable, wishes(**fields))
            assert shares.num_kv_blocks * BLOCK + shares.arena_bytes <= usable + 128
            assert shares.arena_bytes % 128 == 0


def test_the_device_is_what_was_asked_for_or_what_is_there() -> None:
    assert [choose_device(name, has_cuda=True) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert [choose_device(name, has_cuda=False) for name in ("auto", "cpu", "interpreter")] == [
        "cpu",
        "cpu",
        "interpreter",
    ]
    with pytest.raises(StartError, match=r"no CUDA device was found.*--device cpu"):
        choose_device("cuda", has_cuda=False)


@pytest.mark.parametrize(
    ("device", "sizes"),
    [("cpu", (64, 512, 32, 4)), ("interpreter", (64, 512, None, None)), ("cuda", (256, 2048, None, None))],
)
def test_a_gpu_runs_more_at_once_unless_asked(device: str, sizes: tuple[int | None, ...], tmp_path: Path) -> None:
    config = EngineConfig(write_tiny_model(tmp_path / "base"), tmp_path)
    model = read_model_facts(config, device)
    mixed = (model.max_mixed_prefill_tokens, model.mixed_prefill_divisor)
    assert (model.max_num_seqs, model.max_step_tokens, *mixed) == sizes
    config = replace(config, max_num_seqs=3, max_step_tokens=7, max_mixed_prefill_tokens=2)
    model = read_model_facts(config, device)
    mixed = (model.max_mixed_prefill_tokens, model.mixed_prefill_divisor)
    assert (model.max_num_seqs, model.max_step_tokens, *mixed) == (3, 7, 2, None)


def test_the_interpreter_never_computes_in_bfloat16(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    text = json.loads((folder / "config.json").read_text())
    dtype_key = "dtype" if "dtype" in text else "torch_dtype"
    (folder / "config.json").write_text(json.dumps(text | {dtype_key: "bfloat16"}))
    config = EngineConfig(model_dir=folder, store_dir=tmp_path)
    assert read_model_facts(config, "cpu").dtype_name == "bfloat16"
    assert read_model_facts(config, "interpreter").dtype_name == "float32"
    assert read_model_facts(replace(config, dtype="float16"), "interpreter").dtype_name == "float16"
    with pytest.raises(StartError, match=r"--dtype bfloat16.*use --dtype float32"):
        read_model_facts(replace(config, dtype="bfloat16"), "interpreter")


class Noting:
    """An executor that notes its plans."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.live: set[str] = set()

    def execute(self, plan: StepPlan) -> list[RowResult]:
        self.plans.append(plan)
        self.live |= {row.request_id for row in plan.rows}
        return []

    def start_load(self, digest: str, slot: int) -> None:
        raise NotImplementedError

    def poll_loads(self) -> list[LoadResult]:
        return []

    def drop(self, digest: str, slot: int) -> None:
        raise NotImplementedError

    def release_request(self, request_id: str) -> None:
        self.live.remove(request_id)

    def zero_blocks(self, block_ids: list[int]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("max_step_tokens", "max_num_seqs", "max_model_len"), [(96, 4, 40), (8, 20, 100), (60, 2, 7), (512, 3, 400)]
)
def test_a_trial_is_as_large_as_a_step_can_be(max_step_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
    executor, bounds = Noting(), StepBounds(max_step_tokens, max_num_seqs, -(-max_model_len // 16))
    run_trial(executor, bounds, max_model_len)
    largest = min(max_step_tokens, max_num_seqs * max_model_len)
    sizes = [sum(len(row.token_ids) for row in plan.rows) for plan in executor.plans]
    smaller = [form for form in (256, 16) if form < max_step_tokens]
    assert sizes == [largest, *(min(form, largest) for form in smaller), bounds.max_decodes] * 5 and not executor.live
    for plan in executor.plans:
        assert len(plan.rows) <= max_num_seqs
        assert all(_fits(row, max_model_len) for row in plan.rows)
        assert plan.slot_digests.keys() == {slot for row in plan.rows for slot in row.slots}
    adapters = RanklessAdapters(2, ("qkv", "o"))
    assert adapters.sites(0).fused == {(0, "qkv"), (0, "o"), (1, "qkv"), (1, "o")} and adapters.poll() == []
    assert not adapters.sites(0).has_families and adapters.sites(1).has_families


def _fits(row: Row, max_model_len: int) -> bool:
    num_tokens = row.start + len(row.token_ids)
    return num_tokens <= max_model_len and set(row.block_table) == {0} and 16 * len(row.block_table) >= num_tokens
