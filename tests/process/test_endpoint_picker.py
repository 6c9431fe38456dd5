"""The port of the endpoint picker over pages of every state that an adapter can be in."""

import pytest

from serve.messages import AdapterState
from serve.metrics import Metrics
from tests.process.endpoint_picker import Unreadable, extract, score
from tests.process.test_metrics import stats


def _page(*adapters: AdapterState, is_up: bool = True) -> str:
    metrics = Metrics(max_adapters=2, unix_clock=lambda: 1234.5)
    for digest in "abc":
        metrics.name_adapter(digest * 64, f"voice-{digest}")
    if is_up:
        metrics.observe_stats(stats(adapters=list(adapters), num_waiting=3, num_kv_blocks_in_use=25))
    return metrics.render().decode()


def _held(letter: str, tier: str = "device") -> AdapterState:
    return AdapterState(letter * 64, tier, 0, 100, 8)


def test_the_picker_prefers_where_the_adapter_is_then_where_there_is_room_then_where_it_loads() -> None:
    with_room = extract(_page(_held("a")))
    assert [score(with_room, f"voice-{letter}") for letter in "ab"] == [1.0, 0.8]
    full = extract(_page(_held("a"), _held("b", "loading")))
    assert [score(full, f"voice-{letter}") for letter in "abc"] == [1.0, 0.6, 0.0]
    assert (full.max_adapters, full.num_lora_series, full.updated_at) == (2, 1, 1234.5)


def test_the_picker_reads_queue_and_memory() -> None:
    state = extract(_page())
    assert (state.num_queued, state.num_running, state.kv_usage) == (3.0, 0.0, 0.25)
    assert (state.block_size, state.num_blocks) == (16, 100)


def test_an_engine_that_is_down_is_unreadable_and_so_picked_by_nobody() -> None:
    with pytest.raises(Unreadable, match="cache_config_info"):
        extract(_page(is_up=False))


def test_without_the_aliases_the_page_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="num_requests_waiting"):
        extract(Metrics(compat_vllm=False).render().decode())
