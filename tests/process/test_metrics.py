"""The metrics page: the promised names, rest at zero, counters that never fall, labels that stay few."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.adapter_messages import AdapterMove, PinState
from serve.messages import AdapterState, Finished, FinishReason, Started, Stats, Tokens
from serve.metrics import MAX_ADAPTER_SERIES, MAX_LABEL_BYTES, Metrics, page
from serve.metrics.exposition import Exposition
from serve.metrics.training_page import TrainingSummary

REST = ("chorale_kv_blocks_in_use", "chorale_requests_running", "chorale_requests_waiting", "chorale_adapter_pins")
ALIASES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(slots=True)
class FakeClock:
    """Time that moves when told."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


CAUSES = ("room", "operator", "no_fit")


def stats(**fields: object) -> Stats:
    """Return a heartbeat of an idle engine, but for the given fields."""
    idle = Stats(
        step_index=0,
        num_running=0,
        num_waiting=0,
        num_kv_blocks=100,
        num_kv_blocks_in_use=0,
        block_size=16,
        num_adapter_pins=0,
        adapters=[],
        num_preemptions_total=0,
        num_prompt_tokens_total=0,
        num_generated_tokens_total=0,
        num_prefix_hit_tokens_total=0,
        num_adapter_loads_total=0,
        num_adapter_evictions_total=0,
        num_steps_total=0,
    )
    return replace(idle, **fields)  # type: ignore[arg-type]


def series(metrics: Metrics) -> dict[str, float]:
    """Parse the page as a scraper does and return value by name and labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_the_promised_gauges_are_there_and_zero_before_the_engine_has_spoken() -> None:
    page = series(Metrics())
    assert [page[name] for name in (*REST, *ALIASES)] == [0.0] * 7


def test_the_gauges_say_what_the_last_heartbeat_said_and_are_zero_once_the_engine_is_lost() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    metrics.observe_stats(stats(num_running=3, num_waiting=2, num_kv_blocks_in_use=25, num_adapter_pins=1))
    page = series(metrics)
    assert [page[name] for name in REST] == [25.0, 3.0, 2.0, 1.0]
    assert page["vllm:kv_cache_usage_perc"] == 0.25
    assert page["vllm:cache_config_info{block_size=16,num_gpu_blocks=100}"] == 1.0
    metrics.engine_lost()
    clock.now += 1.0
    page = series(metrics)
    assert [page[name] for name in REST] == [0.0] * 4
    assert page["chorale_engine_restarts_total"] == 1.0


def test_counters_never_fall_when_the_engine_starts_again() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    for total in (10, 25):
        metrics.observe_stats(stats(num_generated_tokens_total=total))
    metrics.engine_lost()
    metrics.observe_stats(stats(num_generated_tokens_total=4))
    # a restart that nobody told of
    metrics.observe_stats(stats(num_generated_tokens_total=1))
    assert series(metrics)["chorale_generation_tokens_total"] == 30.0


def test_a_request_is_measured_from_its_opening_to_its_end() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    metrics.name_adapter("d" * 64, "fr-legal")
    meter = metrics.open_request("d" * 64)
    clock.now = 2.0
    meter.saw(Started("r", 0, 0.5, 0.0))
    meter.saw(Tokens("r", [1]))
    clock.now = 3.0
    meter.saw(Tokens("r", [2]))
    clock.now = 3.5
    meter.saw(Tokens("r", [3]))
    meter.saw(Finished("r", FinishReason.STOP))
    meter.close("abort")
    page = series(metrics)
    assert page["chorale_time_to_first_token_seconds_sum"] == 2.0
    assert page["chorale_request_queue_time_seconds_sum"] == 0.5
    assert page["chorale_request_prefill_time_seconds_sum"] == 1.5
    assert page["chorale_inter_token_latency_seconds_sum"] == 1.5
    assert page["chorale_time_per_output_token_seconds_sum"] == 0.75
    assert page["chorale_e2e_request_latency_seconds_sum"] == 3.5
    assert page["chorale_requests_finished_total{reason=stop}"] == 1.0
    assert "chorale_requests_finished_total{reason=abort}" not in page
    assert page["chorale_adapter_tokens_total{adapter=fr-legal}"] == 3.0


def test_ten_thousand_adapters_leave_two_hundred_series_and_lose_no_count() -> None:
    metrics = Metrics()
    for i in range(10_000):
        metrics.open_request(f"{i:064d}"[::-1]).close("stop")
    counts = {name: value for name, value in series(metrics).items() if name.startswith("chorale_adapter_requests")}
    assert len(counts) == MAX_ADAPTER_SERIES + 1
    assert sum(counts.values()) == 10_000


def test_the_lora_series_is_one_hottest_first_and_its_label_is_capped() -> None:
    metrics = Metrics(max_adapters=64, unix_clock=lambda: 1234.5)
    digests = [f"{i:04d}" * 16 for i in range(2_000)]
    for i, digest in enumerate(digests):
        metrics.name_adapter(digest, f"adapter-{i}")
    held = [AdapterState(digest, "device", i, 100, 8) for i, digest in enumerate(digests)]
    metrics.observe_stats(stats(adapters=[*held, AdapterState("e" * 64, "loading", 0, 100, 8)]))
    (info,) = [
        sample
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "vllm:lora_requests_info"
    ]
    assert info.value == 1234.5
    assert int(info.labels["max_lora"]) == 64
    names = info.labels["running_lora_adapters"].split(",")
    assert names[:2] == ["adapter-1999", "adapter-1998"]
    assert len(info.labels["running_lora_adapters"].encode()) <= MAX_LABEL_BYTES
    assert info.labels["waiting_lora_adapters"] == "e" * 12


def test_two_resident_versions_of_one_name_are_one_series() -> None:
    metrics = Metrics()
    for digest in ("a" * 64, "b" * 64, "c" * 64):
        metrics.name_adapter(digest, "other" if digest[0] == "b" else "same")
    tiers = {"a": "host", "b": "device", "c": "device"}
    held = [AdapterState(letter * 64, tier, pins, 100, 8) for pins, (letter, tier) in enumerate(tiers.items())]
    metrics.observe_stats(stats(adapters=held, operator_pins=[PinState("c" * 64), PinState("b" * 64, "damaged")]))
    lines = metrics.render().decode().splitlines()
    loaded = [line for line in lines if line.startswith("vllm:lora_adapter_loaded{")]
    assert [line.split('"')[1::2] for line in loaded] == [
        ["same", "device", "true", "8"],
        ["other", "device", "false", "8"],
    ]
    assert any('running_lora_adapters="same,other"' in line for line in lines)


def test_moves_of_adapters_are_counted_by_cause_and_in_bytes_across_restarts() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    moves = [AdapterMove("a" * 64, "load", 100, 0.5), AdapterMove("a" * 64, "room", 100), AdapterMove("b", "no_fit", 0)]
    pins = [PinState("a" * 64), PinState("b" * 64, "damaged")]
    metrics.observe_stats(stats(adapter_moves=moves, step_adapters=[0, 3], num_adapter_hits_total=4))
    metrics.engine_lost()
    metrics.observe_stats(stats(adapter_moves=moves[:2], num_adapter_hits_total=1, num_adapter_misses_total=2))
    metrics.observe_stats(stats(operator_pins=pins, num_adapter_hits_total=1, num_adapter_misses_total=2))
    page = series(metrics)
    drops = {cause: f"chorale_adapter_drops_total{{cause={cause},tier=device}}" for cause in CAUSES}
    causes = {cause: page[name] for cause, name in drops.items()}
    assert causes == {"room": 2.0, "operator": 0.0, "no_fit": 1.0}
    swapped = [page[f"chorale_adapter_swap_bytes_total{{direction={way},tier=device}}"] for way in ("in", "out")]
    assert swapped == [200.0, 200.0]
    assert (page["chorale_adapter_hits_total"], page["chorale_adapter_misses_total"]) == (5.0, 2.0)
    assert page["chorale_adapter_load_seconds_sum{source=disk,target=device}"] == 1.0
    assert page["vllm:lora_adapter_load_seconds_count"] == 2.0
    assert (page["chorale_step_adapters_count"], page["chorale_step_adapters_sum"]) == (2.0, 3.0)
    assert page["chorale_adapters_pinned"] == 1.0


def test_among_idle_adapters_the_one_asked_for_most_often_lately_is_the_hottest() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    for digest, num_requests, age_s in (("a" * 64, 8, 600.0), ("b" * 64, 1, 0.0), ("c" * 64, 2, 0.0)):
        clock.now = 1000.0 - age_s
        for _ in range(num_requests):
            metrics.open_request(digest)
    clock.now = 1000.0
    metrics.observe_stats(stats(adapters=[AdapterState(letter * 64, "device", 0, 100, 8) for letter in "abc"]))
    names = ",".join(letter * 12 for letter in "cba")
    assert f'running_lora_adapters="{names}"' in metrics.render().decode()


def test_no_histogram_names_an_adapter() -> None:
    metrics = Metrics()
    metrics.name_adapter("d" * 64, "fr-legal")
    metrics.open_request("d" * 64).close("stop")
    metrics.observe_stats(
        stats(
            adapters=[AdapterState("d" * 64, "device", 1, 100, 8)], adapter_moves=[AdapterMove("d", "load", 100, 0.1)]
        )
    )
    families = list(text_string_to_metric_families(metrics.render().decode()))
    named = {family.type for family in families for sample in family.samples if "fr-legal" in sample.labels.values()}
    assert named == {"gauge", "counter"}


def test_the_page_is_rendered_at_most_ten_times_a_second() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    first = metrics.render()
    metrics.observe_stats(stats(num_running=5))
    assert metrics.render() is first
    clock.now += 0.1
    assert b"chorale_requests_running 5.0" in metrics.render()


def test_a_scraper_finds_the_page_that_the_heartbeat_has_rendered_and_nobody_is_rendered_for_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered: list[bytes] = []

    def render(exposition: Exposition, families: object) -> bytes:
        rendered.append(b"%d" % (len(rendered) + 1))
        return rendered[-1]

    monkeypatch.setattr(Exposition, "text", render)
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    metrics.observe_stats(stats())
    assert rendered == []
    assert metrics.render() == b"1"
    clock.now = 0.1
    metrics.observe_stats(stats())
    clock.now = 0.25
    assert metrics.render() == b"2"
    # no heartbeat, and something was counted: the scrape renders
    metrics.count_rejection("queue_full")
    clock.now = 0.35
    assert metrics.render() == b"3"
    clock.now = 10.0
    metrics.observe_stats(stats())
    assert len(rendered) == 3


@pytest.mark.parametrize("change", ["heartbeat", "lost", "refused", "stood in", "token", "closed", "trained"])
def test_what_was_counted_is_on_the_page_a_moment_later(change: str) -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    request = metrics.open_request()
    metrics.observe_stats(stats(num_running=1))
    before = metrics.render()
    changes: dict[str, Callable[[], object]] = {
        "heartbeat": lambda: metrics.observe_stats(stats(num_running=2)),
        "lost": metrics.engine_lost,
        "refused": lambda: metrics.count_rejection("queue_full"),
        "stood in": metrics.count_stand_in,
        "token": lambda: request.saw(Tokens("r", [1])),
        "closed": lambda: request.close("stop"),
        "trained": lambda: metrics.observe_training(TrainingSummary({"running": 1})),
    }
    clock.now = page.READY_PAGE_S
    changes[change]()
    assert metrics.render() != before


def test_a_page_since_which_nothing_was_counted_stays_and_then_asks_others_again() -> None:
    clock = FakeClock()
    metrics = Metrics(clock=clock, unix_clock=lambda: 100.0 + clock.now)
    first = metrics.render()
    clock.now = page.QUIET_PAGE_S - 0.01
    assert metrics.render() is first
    clock.now = page.QUIET_PAGE_S
    assert b"100.5" in metrics.render()


def test_the_page_is_written_as_the_client_library_writes_it() -> None:
    metrics = Metrics(unix_clock=lambda: 1763750000.25)
    for digest, name in (("a" * 64, 'quo"te\\back'), ("b" * 64, "line\nbreak")):
        metrics.name_adapter(digest, name)
        metrics.open_request(digest).close("stop")
    held = [AdapterState(letter * 64, "device", 0, 123_456_789, 8) for letter in "ab"]
    metrics.observe_stats(
        stats(
            adapters=held,
            adapter_moves=[AdapterMove("a", "load", 0, s) for s in (1e-7, 3.5, 1e9)],
            num_prompt_tokens_total=10**7,
        )
    )
    assert metrics.render() == generate_latest(metrics._registry)
    # the begins of all lines are known by now
    metrics.observe_stats(stats(adapters=held[:1], num_running=4))
    metrics._render(0.0, max_age_s=0.0)
    assert metrics.render() == generate_latest(metrics._registry)


def test_aliases_can_be_switched_off() -> None:
    assert "vllm:" not in Metrics(compat_vllm=False).render().decode()


def test_the_tiers_of_memory_are_told_apart() -> None:
    metrics = Metrics()
    states = [
        AdapterState("a" * 64, "device", 1, 100, 8, num_host_bytes=80),
        AdapterState("b" * 64, "device", 0, 200, 8),
        AdapterState("c" * 64, "host", 0, 0, 8, num_host_bytes=70),
        AdapterState("d" * 64, "loading", 0, 50, 8, num_host_bytes=40),
        AdapterState("e" * 64, "fetching", 0, 0, 0),
    ]
    moves = [
        AdapterMove("a" * 64, "load", 80, 0.5, "host", "disk"),
        AdapterMove("a" * 64, "load", 100, 0.25, "device", "host"),
        AdapterMove("f" * 64, "room", 60, 0.0, "host"),
    ]
    metrics.observe_stats(stats(adapters=states, adapter_moves=moves, num_adapter_host_hits_total=3))
    page = series(metrics)
    assert [page[f"chorale_adapters_resident{{tier={tier}}}"] for tier in ("host", "device")] == [3.0, 2.0]
    assert [page[f"chorale_adapter_bytes{{tier={tier}}}"] for tier in ("host", "device")] == [190.0, 300.0]
    assert [page[f"chorale_adapters_loading{{target={tier}}}"] for tier in ("host", "device")] == [1.0, 1.0]
    assert page["chorale_adapter_load_seconds_sum{source=disk,target=host}"] == 0.5
    assert page["chorale_adapter_load_seconds_sum{source=host,target=device}"] == 0.25
    assert page["chorale_adapter_drops_total{cause=room,tier=host}"] == 1.0
    assert page["chorale_adapter_drops_total{cause=room,tier=device}"] == 0.0
    assert page["chorale_adapter_host_hits_total"] == 3.0
    # the way to the device alone, as vLLM's
    assert page["vllm:lora_adapter_load_seconds_count"] == 1.0
    assert (page["vllm:num_gpu_loaded_lora_adapters"], page["vllm:num_cpu_loaded_lora_adapters"]) == (2.0, 1.0)
