"""The eviction study's simulator: its arithmetic by hand, its generators against their distributions."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.eviction_simulation import Machine, simulate
from scripts.eviction_workloads import Workload, azure, churn, mooncake, zipf
from serve.engine.eviction import POLICIES, Lru

SMALL = Machine(num_slots=1, max_bytes=100, fixed_load_s=0.5, load_bytes_per_s=100, max_running=2)


def test_loads_queue_and_waits_are_counted_from_the_arrival() -> None:
    arrivals = ((0.0, "a", 1.0), (2.0, "a", 1.0), (2.5, "b", 1.0))
    outcome = simulate(Workload("by hand", 2, arrivals, {"a": 50, "b": 100}), Lru(), SMALL)
    # a loads in 0.5 + 0.5 s and is still there for the second; b waits until a is free at 3.0, then loads 1.5 s
    assert (outcome.num_requests, outcome.num_loads, outcome.loaded_bytes) == (3, 2, 150)
    assert outcome.hit_ratio == pytest.approx(1 / 3)
    assert outcome.mean_wait_s == pytest.approx((1.0 + 0.0 + 2.0) / 3)
    assert outcome.p99_wait_s == pytest.approx(2.0)


def test_no_more_requests_run_at_once_than_there_is_room_for() -> None:
    arrivals = tuple((0.0, "a", 1.0) for _ in range(4))
    outcome = simulate(Workload("full", 1, arrivals, {"a": 50}), Lru(), SMALL)
    assert outcome.mean_wait_s == pytest.approx((1.0 + 1.0 + 2.0 + 2.0) / 4)


@pytest.mark.parametrize("name", POLICIES)
def test_with_room_for_all_every_policy_loads_each_adapter_once(name: str, tmp_path: Path) -> None:
    (workload,) = [found for found in zipf(300, tmp_path, 1) if found.name == "zipf 1.3"]
    roomy = replace(Machine(), num_slots=2000, max_bytes=1 << 50)
    assert simulate(workload, POLICIES[name](), roomy).num_loads == workload.num_adapters


def test_popularity_follows_zipf(tmp_path: Path) -> None:
    found = {workload.name: workload for workload in zipf(20_000, tmp_path, 7)}
    uses = Counter(adapter for _, adapter, _ in found["zipf 1.0"].arrivals)
    # the first of 2,000 at exponent 1 gets 1 / H(2000) = 12.2 %, the tenth a tenth of that
    assert uses["a0"] / 20_000 == pytest.approx(0.122, abs=0.01)
    assert uses["a9"] / uses["a0"] == pytest.approx(0.1, abs=0.03)
    times = [time for time, _, _ in found["zipf 1.0"].arrivals]
    assert times == sorted(times)
    assert 20_000 / times[-1] == pytest.approx(6.0, rel=0.05)
    assert found["zipf 1.0"] == next(workload for workload in zipf(20_000, tmp_path, 7) if workload.name == "zipf 1.0")


def test_every_third_request_of_the_churn_scans(tmp_path: Path) -> None:
    (workload,) = churn(900, tmp_path, 1)
    scanned = [adapter for _, adapter, _ in workload.arrivals if adapter.startswith("scan")]
    assert len(scanned) == len(set(scanned)) == 300


def test_traces_are_read_and_left_out_where_they_are_missing(tmp_path: Path) -> None:
    assert list(azure(10, tmp_path, 1)) == list(mooncake(10, tmp_path, 1)) == []
    (tmp_path / "azure-llm-2023").mkdir()
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:05.9799600,9,80\n"
    )
    (workload,) = azure(10, tmp_path, 1)
    assert [(time, service) for time, _, service in workload.arrivals] == [(0.0, 0.25), (2.0, 2.0)]
    rows = [
        {"timestamp": 1500, "output_length": 40, "hash_ids": [0, 7, 8]},
        {"timestamp": 0, "output_length": 4, "hash_ids": [9]},
    ]
    (tmp_path / "mooncake" / "conversation_trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (talks,) = mooncake(10, tmp_path, 1)
    assert talks.arrivals == ((0.0, "a9", 0.1), (1.5, "a7", 1.0))
