"""The wall around a step: one bad step, one bad adapter, and an engine that is really lost."""

import logging

import pytest

from serve.messages import Failed, Finished
from tests.engine.bench import A, B, EngineBench
from tests.engine.fake_executor import StepLost
from tests.engine.toy_model import run_alone

pytestmark = pytest.mark.usefixtures("both_modes")


def test_a_step_that_fails_once_is_run_again_and_nobody_notices(caplog: pytest.LogCaptureFixture) -> None:
    bench = EngineBench()
    sent = [bench.submit(f"r{index}", [index, 1], (None, A)[index % 2]) for index in range(4)]
    for _ in range(4):
        bench.executor.num_lost_steps = 1
        bench.step()
    bench.drain()
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids
    assert "first attempt" in caplog.text


def test_an_adapter_that_breaks_the_step_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    sent = {name: bench.submit(name, [1, 2], digest) for name, digest in (("base", None), ("a", A), ("b", B))}
    bench.step(2)
    bench.executor.broken_digest = A
    bench.drain()
    end = bench.end("a")
    assert isinstance(end, Failed) and (end.code, end.http_status) == ("engine_error", 500)
    assert "adapter aaaaaaaaaaaa" in end.message
    for name in ("base", "b"):
        assert bench.tokens(name) == run_alone(sent[name], bench.limits).token_ids
    assert bench.engine.stats().num_kv_blocks_in_use == 0


def test_an_adapter_alone_in_its_step_does_not_end_the_engine_at_its_first_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    bench.executor.broken_digest = A
    bench.submit("a", [1, 2], A)
    bench.drain()
    assert isinstance(bench.end("a"), Failed)
    bench.submit("base", [1, 2])
    bench.drain()
    assert isinstance(bench.end("base"), Finished)
    # the base's good steps proved the engine alive, so the next failure counts as a first one again
    bench.submit("a2", [1, 2], A)
    bench.drain()
    assert isinstance(bench.end("a2"), Failed)


def test_an_adapter_alone_and_in_a_composition_does_not_end_the_engine_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    bench.submit("warm", [1], adapters=((A, 1.0), (B, 0.5)), max_tokens=1)
    bench.drain()
    bench.executor.broken_digest = A
    bench.submit("a", [1, 2], A)
    bench.submit("both", [1, 2], adapters=((A, 1.0), (B, 0.5)))
    bench.drain()
    assert isinstance(bench.end("a"), Failed)
    end = bench.end("both")
    assert isinstance(end, Failed) and "the composition of aaaaaaaaaaaa + bbbbbbbbbbbb" in end.message
    sound = bench.submit("b", [1, 2], B)
    bench.drain()
    assert bench.tokens("b") == run_alone(sound, bench.limits).token_ids


def test_adapters_that_have_nothing_in_common_and_all_fail_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    for digest in (A, B):
        bench.submit(f"warm {digest[0]}", [1], digest, max_tokens=1)
    bench.drain()
    bench.executor.num_lost_steps = 99
    bench.submit("a", [1, 2], A)
    bench.submit("b", [1, 2], B)
    with pytest.raises(StepLost):
        bench.drain()


def test_two_lost_steps_in_a_row_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    bench.executor.broken_digest = A
    bench.submit("a", [1, 2], A)
    bench.drain()
    bench.submit("a2", [1, 2], A)
    with pytest.raises(StepLost):
        bench.drain()


def test_a_step_of_the_base_that_fails_in_every_part_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    bench = EngineBench()
    bench.executor.num_lost_steps = 99
    bench.submit("base", [1, 2])
    bench.submit("a", [1, 2], A)
    with pytest.raises(StepLost):
        bench.drain()
