"""The frame format: any cut of the bytes gives the same messages, and nothing that is no frame gets through."""

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from serve.adapter_messages import AdapterDone, AdapterMove, AskReady, EvictAdapter, PinAdapter, PinState, UnpinAdapter
from serve.config import EngineConfig
from serve.engine.ipc import (
    MAX_FRAME_BYTES,
    FrameError,
    command_reader,
    decode_config,
    encode_config,
    encode_frame,
    event_reader,
)
from serve.messages import (
    Abort,
    AdapterState,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    Grammar,
    LoadAdapter,
    Ready,
    SamplingParams,
    Shutdown,
    Started,
    StartFailed,
    Stats,
    Submit,
    TokenLogprobs,
    Tokens,
    UnloadAdapter,
)

COMMANDS: list[Command] = [
    Submit("a", [1, 2, 3], SamplingParams(5, 7, logit_bias=((3, -1.5),), grammar=Grammar("regex", "é+")), "d" * 64),
    Abort("a"),
    Embed("b", list(range(1000))),
    Submit("c", [1], SamplingParams(5, 7), adapters=(("d" * 64, 0.1), ("e" * 64, -2.0))),
    Embed("d", [1, 2], "last", "d" * 64, num_virtual_tokens=20),
    Embed("e", [1, 2], "mean", "d" * 64, active_from=1),
]


def test_frames_survive_any_cut_of_their_bytes() -> None:
    data = b"".join(encode_frame([command]) for command in COMMANDS) + encode_frame(COMMANDS)
    random_cuts = random.Random(5)
    for max_piece in (1, 2, 3, 7, 64, len(data)):
        reader = command_reader()
        received: list[Command] = []
        offset = 0
        while offset < len(data):
            end = offset + random_cuts.randint(1, max_piece)
            received += reader.feed(data[offset:end])
            offset = end
        assert received == COMMANDS + COMMANDS


def test_a_length_above_the_limit_is_refused_before_its_bytes_are_read() -> None:
    with pytest.raises(FrameError, match=f"a frame of {MAX_FRAME_BYTES + 1} bytes; the limit is {MAX_FRAME_BYTES}"):
        event_reader().feed(struct.pack("<I", MAX_FRAME_BYTES + 1))


def test_a_message_too_large_for_a_frame_is_refused_by_the_sender() -> None:
    with pytest.raises(FrameError, match="the limit is"):
        encode_frame([Abort("x" * (MAX_FRAME_BYTES + 1))])


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"Abort": {"request_id": "a"}}),
        msgspec.msgpack.encode(["Abort"]),
        msgspec.msgpack.encode([["Abort"]]),
        msgspec.msgpack.encode([["Abort", None]]),
        msgspec.msgpack.encode([["Abort", {}]]),
        msgspec.msgpack.encode([["Abort", {"request_id": 7}]]),
        msgspec.msgpack.encode([["NoSuchCommand", {"request_id": "a"}]]),
        msgspec.msgpack.encode([["Embed", {"request_id": "a", "prompt_token_ids": ["x"]}]]),
        encode_frame([Tokens("a", [1])])[4:],
        b"\x91\x92\xa5\xff\xff\xff\xff\xff\x80",
    ],
)
def test_a_payload_that_is_no_list_of_commands_is_a_frame_error(payload: bytes) -> None:
    with pytest.raises(FrameError, match="does not decode"):
        command_reader().feed(struct.pack("<I", len(payload)) + payload)


def test_events_come_back_as_their_own_types() -> None:
    logprobs = [TokenLogprobs(2, -0.5, [2, 7], [-0.5, -1.25])]
    events: list[Event] = [
        Started("a", 3, 0.25, 0.0, logprobs),
        Tokens("a", [1, 2], logprobs),
        Embedded("b", [1.0, -2.5]),
        Finished("a", FinishReason.STOP, 2),
        Failed("c", "engine_error", "é", 503),
        AdapterDone("p", 10, is_pending=True),
        replace(
            Stats(1, 2, 3, 4, 5, 6, 7, [AdapterState("d", "device", 1, 2, 8)], 8, 9, 10, 11, 12, 13, 14),
            adapter_moves=[AdapterMove("d", "load", 2, 0.5)],
            step_adapters=[1, 2],
            operator_pins=[PinState("d"), PinState("e", "too large")],
        ),
        Ready("f", 10, 20, 16, "float32", "cpu", [0, 1], 100, 64),
        StartFailed("no model"),
    ]
    assert {type(event) for event in events} == set(get_args(Event))
    received = event_reader().feed(encode_frame(events))
    assert received == events
    assert isinstance(received[3], Finished) and received[3].reason is FinishReason.STOP


def test_commands_come_back_with_their_defaults_and_their_tuples() -> None:
    commands = [*COMMANDS, LoadAdapter("d"), UnloadAdapter("d"), Shutdown()]
    commands += [
        PinAdapter("p", "d"),
        UnpinAdapter("p", "d"),
        EvictAdapter("p", "d"),
        AskReady("q", ("d", "e"), "t", 2.0),
    ]
    assert {type(command) for command in commands} == set(get_args(Command))
    assert command_reader().feed(encode_frame(commands)) == commands


def test_the_engine_config_survives_its_way_through_stdin() -> None:
    config = EngineConfig(model_dir=Path("/m/ä"), store_dir=Path("s"), num_kv_blocks=7, dtype="float32")
    assert decode_config(encode_config(config)) == config
