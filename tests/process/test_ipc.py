"""The frame format: any cut of the bytes gives the same messages, and nothing that is no frame gets through."""

import random
import struct
from pathlib import Path

import msgspec
import pytest

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
from serve.messages import Abort, Command, Embed, Event, Finished, FinishReason, Grammar, SamplingParams, Submit, Tokens

COMMANDS: list[Command] = [
    Submit("a", [1, 2, 3], SamplingParams(5, 7, logit_bias=((3, -1.5),), grammar=Grammar("regex", "é+")), "d" * 64),
    Abort("a"),
    Embed("b", list(range(1000))),
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
        msgspec.msgpack.encode({"type": "abort"}),
        msgspec.msgpack.encode([{"type": "no_such_command"}]),
        msgspec.msgpack.encode([{"type": "abort", "request_id": 7}]),
        msgspec.msgpack.encode([Tokens("a", [1])]),
        b"\x91\x81\xa4type\xa5\xff\xff\xff\xff\xff",
    ],
)
def test_a_payload_that_is_no_list_of_commands_is_a_frame_error(payload: bytes) -> None:
    with pytest.raises(FrameError, match="does not decode"):
        command_reader().feed(struct.pack("<I", len(payload)) + payload)


def test_events_come_back_as_their_own_types() -> None:
    events: list[Event] = [Tokens("a", [1, 2]), Finished("a", FinishReason.STOP, 2)]
    assert event_reader().feed(encode_frame(events)) == events


def test_the_engine_config_survives_its_way_through_stdin() -> None:
    config = EngineConfig(model_dir=Path("/m/ä"), store_dir=Path("s"), num_kv_blocks=7, dtype="float32")
    assert decode_config(encode_config(config)) == config
