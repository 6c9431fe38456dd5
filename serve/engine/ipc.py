"""Frames on the Unix socket between the API and the engine: 4-byte little-endian length, then one msgpack list.

Owns the byte format of both directions and nothing of the sockets themselves; no torch, imported by both sides. Each
message of the list is a pair: the name of its class, and its fields as a map. No pickle, and no other class than ours.
Invariant: a frame above `MAX_FRAME_BYTES` or one that does not decode raises `FrameError` before anything of it is
used, and how the bytes were cut into reads never changes which messages come out.
"""

import struct
from collections.abc import Sequence
from functools import reduce
from operator import or_
from types import GenericAlias
from typing import Generic, TypeVar, cast, get_args

import msgspec

from serve.config import EngineConfig
from serve.messages import Command, Event

# the largest honest frame is a burst of long prompts or prompt logprobs: a few MiB
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")

MessageT = TypeVar("MessageT")


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    """One message on the wire. Each message class has its own subclass, tagged with its name: `[tag, body]`."""

    body: object


def _wire_of(message_class: type) -> type[_Wire]:
    wire = msgspec.defstruct(message_class.__name__, [("body", message_class)], bases=(_Wire,), tag=True)
    return cast(type[_Wire], wire)


# msgspec cannot tell plain dataclasses apart in a union, tagged structs around them it can
_WIRE_OF = {message_class: _wire_of(message_class) for message_class in get_args(Command) + get_args(Event)}


class FrameError(Exception):
    """The peer sent bytes that are not a frame; the connection cannot be used any more."""


def encode_frame(messages: Sequence[Command] | Sequence[Event]) -> bytes:
    """Return the messages as one frame.

    Raises:
        FrameError: the frame would be larger than the peer accepts.
    """
    payload = msgspec.msgpack.encode([_WIRE_OF[type(message)](message) for message in messages])
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(payload)} bytes; the limit is {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader(Generic[MessageT]):
    """Turns the bytes of one direction back into messages, however the reads were cut."""

    def __init__(self, message_classes: tuple[type, ...]) -> None:
        union = reduce(or_, (_WIRE_OF[message_class] for message_class in message_classes))
        self._decoder: msgspec.msgpack.Decoder[list[_Wire]] = msgspec.msgpack.Decoder(GenericAlias(list, (union,)))
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[MessageT]:
        """Take bytes as they arrived and return the messages of every frame they complete.

        Raises:
            FrameError: a length above the limit, or a payload that is not a list of our messages.
        """
        self._buffer += data
        messages: list[MessageT] = []
        offset = 0
        while len(self._buffer) - offset >= _LENGTH.size:
            (num_bytes,) = _LENGTH.unpack_from(self._buffer, offset)
            if num_bytes > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {num_bytes} bytes; the limit is {MAX_FRAME_BYTES}")
            end = offset + _LENGTH.size + num_bytes
            if len(self._buffer) < end:
                break
            messages += self._decode(bytes(self._buffer[offset + _LENGTH.size : end]))
            offset = end
        del self._buffer[:offset]
        return messages

    def _decode(self, payload: bytes) -> list[MessageT]:
        try:
            # the decoder has checked each body against the class its tag names
            return [cast(MessageT, wire.body) for wire in self._decoder.decode(payload)]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FrameError(f"a frame of {len(payload)} bytes does not decode: {error}") from error


def command_reader() -> FrameReader[Command]:
    """Build the reader of the engine's side."""
    return FrameReader(get_args(Command))


def event_reader() -> FrameReader[Event]:
    """Build the reader of the API's side."""
    return FrameReader(get_args(Event))


def encode_config(config: EngineConfig) -> bytes:
    """Return the engine's start-up argument as JSON."""
    return msgspec.json.encode(config, enc_hook=str)


def decode_config(data: bytes) -> EngineConfig:
    """Read what `encode_config` wrote.

    Raises:
        msgspec.DecodeError: not JSON, or a field of the wrong type.
    """
    return msgspec.json.decode(data, type=EngineConfig, dec_hook=_construct)


def _construct(kind: type, value: str) -> object:
    # paths are the only field type that JSON does not know
    return kind(value)
