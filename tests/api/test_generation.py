"""Choices side by side: deadlines, lagging readers, and a cancellation at every point."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from adapters_store.store import AdapterRef
from serve.api.generation import Generation, run_generation
from serve.api.output import OutputRules
from serve.api.sampling import choice_seed
from serve.api.target import Target
from serve.config import LimitsConfig
from serve.errors import Unavailable
from serve.messages import AdapterState, Finished, SamplingParams, Started, Submit, Tokens
from serve.text.tokenizer import TextTokenizer
from tests.api.byte_tokenizer import IM_END
from tests.api.fake_engine import FakeEngine
from tests.api.test_models import stats_with

ADAPTER = AdapterRef("poet", 1, "a" * 64, 8, 1000, "lora")


class StuckEngine(FakeEngine):
    """An engine whose adapters never load."""

    async def generate(self, submit: Submit) -> AsyncGenerator[Started | Tokens | Finished, None]:
        """Wait for ever before the first event."""
        await asyncio.Event().wait()
        async for event in super().generate(submit):
            yield event


def generation(num_choices: int = 1, *, adapter: AdapterRef | None = None) -> Generation:
    """Return a request for up to 200 tokens per choice."""
    return Generation(
        prompts=[[1, 2, 3]],
        sampling=[SamplingParams(max_tokens=200, seed=0)],
        num_choices=num_choices,
        seed=None,
        rules=OutputRules(stop_token_ids=frozenset({IM_END})),
        target=Target("m", adapter),
        priority=0,
        cold_start="wait",
    )


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> TextTokenizer:
    """Return the byte tokenizer."""
    return TextTokenizer.load(model_dir)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_cancellation_at_any_point_leaves_nothing_running(tokenizer: TextTokenizer, num_choices: int) -> None:
    async def run_until(step: int) -> bool:
        engine = FakeEngine()

        async def consume() -> None:
            async for _ in run_generation(engine, tokenizer, generation(num_choices), LimitsConfig()):
                pass

        task = asyncio.ensure_future(consume())
        for _ in range(step):
            await asyncio.sleep(0)
        was_running = not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.num_open == 0
        # a sequence was finished, or it was aborted: never neither
        assert len(engine.aborted) <= len(engine.submits)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return was_running

    step = 0
    while asyncio.run(run_until(step)):
        step += 1
    assert step > 10, "the loop ended before it could test anything"


@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_adapter_that_does_not_come_up_in_time_is_a_503(tokenizer: TextTokenizer, num_choices: int) -> None:
    async def run(engine: StuckEngine) -> None:
        limits = LimitsConfig(cold_start_timeout_s=0.02, request_timeout_s=0.2)
        async for _ in run_generation(engine, tokenizer, generation(num_choices, adapter=ADAPTER), limits):
            pass

    engine = StuckEngine(stats=stats_with())
    with pytest.raises(Unavailable, match=r"not ready within 0\.02 s") as raised:
        asyncio.run(run(engine))
    assert raised.value.code == "adapter_loading" and raised.value.retry_after_s is not None
    warm = StuckEngine(stats=stats_with(AdapterState(ADAPTER.digest, "device", 0, 1, 8)))
    with pytest.raises(Unavailable, match=r"took longer than 0\.2 s"):
        asyncio.run(run(warm))


@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_adapter_that_left_before_its_turn_and_does_not_come_back_is_a_503(
    tokenizer: TextTokenizer, num_choices: int
) -> None:
    async def run(engine: StuckEngine) -> None:
        limits = LimitsConfig(cold_start_timeout_s=0.02, request_timeout_s=5.0)
        pieces = run_generation(engine, tokenizer, generation(num_choices, adapter=ADAPTER), limits)
        engine.stats = stats_with()
        async for _ in pieces:
            pass

    warm = StuckEngine(stats=stats_with(AdapterState(ADAPTER.digest, "device", 0, 1, 8)))
    with pytest.raises(Unavailable, match=r"not ready within 0\.02 s"):
        asyncio.run(run(warm))


@pytest.mark.parametrize("num_choices", [1, 2])
def test_waiting_in_line_for_a_loaded_adapter_is_no_cold_start(tokenizer: TextTokenizer, num_choices: int) -> None:
    async def run(engine: StuckEngine) -> None:
        limits = LimitsConfig(cold_start_timeout_s=0.02, request_timeout_s=0.2)
        pieces = run_generation(engine, tokenizer, generation(num_choices, adapter=ADAPTER), limits)
        engine.stats = stats_with(AdapterState(ADAPTER.digest, "device", 0, 1, 8))
        async for _ in pieces:
            pass

    with pytest.raises(Unavailable, match=r"took longer than 0\.2 s"):
        asyncio.run(run(StuckEngine(stats=stats_with())))


@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_reader_that_lags_slows_its_own_sequence(tokenizer: TextTokenizer, num_choices: int) -> None:
    async def run() -> int:
        engine = FakeEngine()
        engine.script.write = lambda submit: [97] * 200
        pieces = run_generation(engine, tokenizer, generation(num_choices), LimitsConfig())
        await anext(pieces)
        for _ in range(2000):
            await asyncio.sleep(0)
        assert engine.num_open == num_choices, "a sequence was read to its end although nobody took it"
        # the first piece was taken above
        return 1 + len([piece async for piece in pieces])

    assert asyncio.run(run()) == 202 * num_choices


def test_seeds_are_mixed_into_64_bits_and_do_not_repeat() -> None:
    seeds = {choice_seed(seed, index) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for index in range(16)}
    assert len(seeds) == 80 and all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(5, 3) == choice_seed(5, 3)
