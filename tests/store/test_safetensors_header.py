"""The header parser refuses every planted fault, every truncation and every random mutation, cheaply."""

import io
import json
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import CorruptUpload
from adapters_store.safetensors_header import EXTERNAL_LIMITS, Header, read_header
from tests.store.folders import TINY, Tensors, lora_tensors, safetensors_bytes

GOOD = safetensors_bytes(lora_tensors(TINY, sites=("q_proj", "o_proj")))


def parse(raw: bytes) -> Header:
    return read_header(io.BytesIO(raw), len(raw), EXTERNAL_LIMITS, what="adapter_model.safetensors")


def with_header(text: str | bytes, data: bytes = b"\0" * 8) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**changes: object) -> str:
    return json.dumps({"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def and_bytes(begin: int, end: int) -> str:
    return entry()[:-1] + f', "b": {{"dtype": "U8", "shape": [{end - begin}], "data_offsets": [{begin}, {end}]}}}}'


PLANTED: dict[str, bytes] = {
    "an empty file": b"",
    "seven bytes": b"\0" * 7,
    "only a length": b"\0" * 8,
    "a length of 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "a length of 200 MB": (200 << 20).to_bytes(8, "little") + b"{}",
    "a header as long as the limit allows but not there": (1 << 20).to_bytes(8, "little") + b"{}",
    "no tensor": with_header("{}"),
    "an array": with_header("[]"),
    "leading space": with_header(" " + entry()),
    "a byte order mark": with_header(b"\xef\xbb\xbf" + entry().encode()),
    "UTF-16": with_header(entry().encode("utf-16")),
    "invalid UTF-8": with_header(b'{"\xff": 1}'),
    "not JSON": with_header('{"a.weight": '),
    "two values": with_header(entry() + entry()),
    "nesting of 100,000": with_header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nesting of 20": with_header('{"a":' + "[" * 20 + "]" * 20 + "}"),
    "the same name twice": with_header(entry()[:-1] + "," + entry()[1:]),
    "the same key twice in an entry": with_header(entry().replace('"dtype"', '"dtype": "F32", "dtype"')),
    "an unknown dtype": with_header(entry(dtype="F8_E4M3")),
    "a dtype that is no text": with_header(entry(dtype=["F32"])),
    "int8": with_header(entry(dtype="I8")),
    "float64": with_header(entry(dtype="F64", shape=[1])),
    "a negative dimension": with_header(entry(shape=[-1])),
    "a zero dimension with a huge one": with_header(entry(shape=[0, 1 << 62], data_offsets=[0, 0])),
    "a zero dimension": with_header(entry(shape=[0], data_offsets=[0, 0]), b""),
    "a product that overflows 64 bits": with_header(entry(shape=[1 << 33, 1 << 33])),
    "a fractional dimension": with_header(entry(shape=[2.0])),
    "a boolean dimension": with_header(entry(shape=[True, 2])),
    "five dimensions": with_header(entry(shape=[1, 1, 1, 1, 2])),
    "a number of 5,000 digits": with_header(entry().replace("[2]", "[" + "9" * 5000 + "]")),
    "NaN": with_header(entry().replace("[2]", "[NaN]")),
    "1e999": with_header(entry().replace("[2]", "[1e999]")),
    "three offsets": with_header(entry(data_offsets=[0, 4, 8])),
    "offsets that run backwards": with_header(entry(data_offsets=[8, 0])),
    "offsets that disagree with the shape": with_header(entry(data_offsets=[0, 4]), b"\0" * 4),
    "a hole at the start": with_header(entry(data_offsets=[4, 12]), b"\0" * 12),
    "a hole in the middle": with_header(
        entry()[:-1] + ', "b": {"dtype": "U8", "shape": [2], "data_offsets": [9, 11]}}', b"\0" * 11
    ),
    "an overlap": with_header(
        entry()[:-1] + ', "b": {"dtype": "U8", "shape": [2], "data_offsets": [7, 9]}}', b"\0" * 9
    ),
    "the same bytes twice": with_header(entry()[:-1] + "," + entry().replace("a.weight", "b")[1:]),
    "trailing bytes": with_header(entry(), b"\0" * 9),
    "one byte too few": with_header(entry(), b"\0" * 7),
    "an entry with a fourth key": with_header(entry(extra=1)),
    "an entry that lacks its shape": with_header('{"a": {"dtype": "F32", "data_offsets": [0, 8]}}'),
    "an entry that is null": with_header('{"a": null}'),
    "metadata that is no object": with_header('{"__metadata__": 1, ' + entry()[1:]),
    "metadata with a number": with_header('{"__metadata__": {"a": 1}, ' + entry()[1:]),
    "a path as a name": with_header(entry().replace("a.weight", "../../x")),
    "NUL in a name": with_header(entry().replace("a.weight", "a\\u0000")),
    "a newline in a name": with_header(entry().replace("a.weight", "a\\n")),
    "a right-to-left mark in a name": with_header(entry().replace("a.weight", "a\u202e")),
    "a lone surrogate in a name": with_header(entry().replace("a.weight", "\\ud800")),
    "an empty name": with_header(entry().replace("a.weight", "")),
    "a name of 10 kB": with_header(entry().replace("a.weight", "a" * 10_000)),
}


@pytest.mark.parametrize("raw", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptUpload) as refusal:
        parse(raw)
    assert refusal.value.http_status == 400
    assert refusal.value.code == "corrupt_adapter"
    assert len(refusal.value.message) < 300 and refusal.value.message.isprintable()


def test_every_truncation_is_refused() -> None:
    parse(GOOD)
    for length in range(len(GOOD)):
        with pytest.raises(CorruptUpload):
            parse(GOOD[:length])


def test_a_good_header_lists_its_tensors_in_order() -> None:
    header = parse(GOOD)
    assert header.tensors[0].begin == 0
    assert header.data_start + header.tensors[-1].end == len(GOOD)
    assert {slot.name for slot in header.tensors} == lora_tensors(TINY, sites=("q_proj", "o_proj")).keys()


def test_too_many_tensors_are_refused() -> None:
    tensors: Tensors = {f"t{i}": ("U8", (1,), b"\0") for i in range(EXTERNAL_LIMITS.max_tensors + 1)}
    with pytest.raises(CorruptUpload, match="4097 tensors"):
        parse(safetensors_bytes(tensors))


@pytest.mark.parametrize("make", [lambda: b" " * (88 << 20), lambda: b'{"a":1,' * 1000], ids=["long", "short"])
def test_a_huge_header_costs_neither_time_nor_memory(make: Callable[[], bytes]) -> None:
    raw = (88_900_000).to_bytes(8, "little") + make()
    tracemalloc.start()
    file = io.BytesIO(raw)
    with pytest.raises(CorruptUpload, match="88900000"):
        read_header(file, 88_900_008, EXTERNAL_LIMITS, what="x")
    # refused by its length alone: not one byte of the header was read
    assert file.tell() == 8
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # one copy of `raw` belongs to BytesIO
    assert peak_bytes < len(raw) + (4 << 20)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(CorruptUpload):
        parse(with_header(raw))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, 3))
def test_a_mutated_byte_gives_a_refusal_or_a_consistent_header(position: int, value: int, kind: int) -> None:
    raw = bytearray(GOOD)
    if kind == 0:
        raw[position] = value
    elif kind == 1:
        del raw[position]
    elif kind == 2:
        raw.insert(position, value)
    else:
        raw[position] ^= 1 << (value % 8)
    try:
        header = parse(bytes(raw))
    except CorruptUpload:
        return
    assert [slot.begin for slot in header.tensors] == [0, *(slot.end for slot in header.tensors[:-1])]
    assert header.data_start + header.tensors[-1].end == len(raw)
