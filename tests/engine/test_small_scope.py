"""Every short sequence of commands on a tiny engine: what a small world can show, it shows."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from types import FrameType
from typing import TypeVar

import pytest

from serve.engine.limits import EngineLimits
from serve.engine.scheduler import Scheduler
from serve.messages import Abort, Failed, Finished, SamplingParams, Submit, UnloadAdapter
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile
from tests.engine.toy_model import run_alone

Answer = TypeVar("Answer")
TINY = replace(
    LIMITS, num_kv_blocks=4, block_size=2, max_model_len=8, max_num_seqs=2, max_step_tokens=3, num_adapter_slots=1
)
PROMPT = [1, 2, 3, 4]
COMMANDS = ("base", "a", "b", "pair", "abort", "unload", "fail", "step")
# what acts changes within and between sequences; two adapter slots, one of them wanted by all
ACTS = ("base", "b", "both", "late", "prompted", "abort", "unload", "fail", "step")
TWO_SLOTS = replace(TINY, num_adapter_slots=2)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _play(commands: tuple[str, ...], limits: EngineLimits = TINY) -> None:
    bench = EngineBench(limits, {digest: AdapterFile(10, num_polls=2 if digest == B else 1) for digest in (A, B, C)})
    sent = []
    for number, command in enumerate(commands):
        if command in ("base", "a", "b"):
            digest = {"base": None, "a": A, "b": B}[command]
            sent.append(bench.submit(f"r{number}", PROMPT, digest, max_tokens=4))
        elif command == "pair":
            sent += [bench.submit(f"r{number}.{i}", PROMPT, A, max_tokens=2, group_id=f"g{number}") for i in (0, 1)]
        elif command == "both":
            sent.append(bench.submit(f"r{number}", PROMPT, max_tokens=3, adapters=((B, 0.5), (A, -1.0))))
        elif command == "late":
            sent.append(bench.submit(f"r{number}", PROMPT, A, max_tokens=3, active_from=3))
        elif command == "prompted":
            sent.append(bench.submit(f"r{number}", PROMPT, C, max_tokens=2, num_virtual_tokens=1))
        elif command == "abort" and sent:
            bench.engine.handle(Abort(sent[0].request_id))
        elif command == "unload":
            bench.engine.handle(UnloadAdapter(A))
        elif command == "fail":
            bench.files[B].num_failures = 1
        bench.step()
    bench.drain(200)
    for request in sent:
        ends = [event for event in bench.events[request.request_id] if isinstance(event, Finished | Failed)]
        assert len(ends) == 1, (commands, ends)
        expected = run_alone(request, limits).token_ids
        output = bench.tokens(request.request_id)
        assert output == expected[: len(output)], commands
        was_cut = isinstance(ends[0], Failed) or request is sent[0]
        assert was_cut or output == expected, commands
    stats = bench.engine.stats()
    assert (stats.num_kv_blocks_in_use, stats.num_adapter_pins) == (0, 0), commands


@pytest.mark.usefixtures("both_modes")
def test_every_sequence_of_four_commands_ends_well() -> None:
    for commands in itertools.product(COMMANDS, repeat=4):
        _play(commands)


@pytest.mark.usefixtures("both_modes")
def test_every_sequence_of_three_commands_of_all_that_can_act_ends_well() -> None:
    for commands in itertools.product(ACTS, repeat=3):
        _play(commands, TWO_SLOTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("both_modes")
def test_every_sequence_of_five_commands_of_all_that_can_act_ends_well() -> None:
    for commands in itertools.product(ACTS, repeat=5):
        _play(commands, TWO_SLOTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("both_modes")
def test_every_sequence_of_six_commands_ends_well() -> None:
    for commands in itertools.product(COMMANDS, repeat=6):
        _play(commands)


def test_the_bookkeeping_of_a_step_grows_with_the_sequences_and_no_faster() -> None:
    few, many = (_calls_of_a_decode_step(num_sequences) for num_sequences in (16, 64))
    assert few > 16 and many < 4.1 * few
    # 56 calls a sequence: 0.33 ms of CPU in all on a 2-core machine, 2026-11
    assert many < 60 * 64


def _calls_of_a_decode_step(num_sequences: int) -> int:
    """Count the Python and C calls of schedule and finish_step once all sequences decode: what no clock can blur."""
    limits = replace(
        LIMITS, num_kv_blocks=6400, block_size=16, max_model_len=2000, max_num_seqs=64, max_step_tokens=512
    )
    bench = EngineBench(limits)
    scheduler = Scheduler(limits, bench.executor, lambda: 0.0)
    params = SamplingParams(max_tokens=100, seed=1, ignore_eos=True)
    for index in range(num_sequences):
        scheduler.submit(Submit(f"r{index}", [index % 16] * 40, params, (None, A, B, C)[index % 4]))
    counts = []
    for _ in range(80):
        for load in bench.executor.poll_loads():
            scheduler.finish_load(load)
        step, scheduled = _counted(partial(scheduler.schedule, is_ahead=False))
        assert step is not None
        rows = step.plan.rows
        results = bench.executor.execute(step.plan)
        _, finished = _counted(partial(scheduler.finish_step, step, results))
        if len(rows) == num_sequences and all(len(row.token_ids) == 1 for row in rows):
            counts.append(scheduled + finished)
    assert len(counts) > 50
    return int(median(counts))


def _counted(action: Callable[[], Answer]) -> tuple[Answer, int]:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        answer = action()
    finally:
        sys.setprofile(before)
    return answer, calls
