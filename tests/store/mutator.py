"""Seeded, structure-aware damage to safetensors files and JSON: what a fuzzer of bytes would need ages to hit.

Owns the edits; knows nothing of what is valid. Invariant: the same seed gives the same mutants, on every machine.
"""

import json
import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

NUMBERS: list[Json] = [0, 1, -1, 2, 3, 7, 16, 17, 24, 128, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30]
NUMBERS += [0.0, 0.5, 1.0, -1.0, 1e-9, 1e9, 1e308, True, False]
TEXTS: list[Json] = [
    "",
    "a",
    "q_proj",
    "all",
    "..",
    "../x",
    "a\n",
    "\u202e",
    "F32",
    "BF16",
    "U8",
    "I64",
    "F64",
    "group:",
]
TEXTS += ["lm_head", "sigmoid", "x" * 300]
OTHERS: list[Json] = [None, [], {}, [1], ["q_proj"], {"topk": 1}, {"a": 1}, [[[[]]]]]
# one level deeper than anything may be
DEEP: Json = json.loads("[" * 17 + "]" * 17)
LENGTHS = [0, 1, 2, 7, 100, 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1]
DTYPES: list[Json] = ["F32", "F16", "BF16", "I32", "I64", "I16", "U8", "F64", "BOOL", "f32", "", 1, None]
NAMES = ["", "a", "../../x", "pad.1", "L0.q.A", "L9.q.A", "a b", "a\0", "x" * 257, "ä", "__metadata__", "lm_head.A"]
# little-endian patterns of 2 and 4 bytes: NaN, infinities, largest, smallest, zeros, positions
WORDS = [b"\xff\xff", b"\x00\x7c", b"\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"]
WORDS += [b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00", b"\x00\x00\x00\x80", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f"]
WORDS += [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00", b"\x10\x00\x00\x00"]

Entries = list[tuple[str, Json]]


class Mutator:
    """A stream of mutants from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def safetensors(self, raw: bytes) -> bytes:
        """Return one mutant of a sound safetensors file."""
        begin = 8 + int.from_bytes(raw[:8], "little")
        entries: Entries = list(json.loads(raw[8:begin]).items())
        data = bytearray(raw[begin:])
        edits = [self._dtype, self._shape, self._offsets, self._name, self._entries, self._metadata]
        for _ in range(self.random.choice((1, 1, 1, 2))):
            if self.random.random() < 0.25:
                self.data(data)
            else:
                self.random.choice(edits)(entries, data)
        if self.random.random() < 0.3:
            _repair(entries)
        text = self._header_text(entries)
        length = len(text)
        if self.random.random() < 0.05:
            length = self.random.choice([*LENGTHS, length + 1, length - 1, length + len(data)])
        found = max(0, length).to_bytes(8, "little") + text + data
        if self.random.random() < 0.05:
            found = found[: self.random.randrange(len(found))]
        return found

    def data(self, data: bytearray) -> None:
        """Damage values in place: words that mean something to floats and positions, or bits, or the length."""
        choose = self.random
        if not data or choose.random() < 0.08:
            data += choose.randbytes(choose.choice((1, 4, 128)))
            return
        if choose.random() < 0.08:
            del data[choose.randrange(len(data)) :]
            return
        if choose.random() < 0.1:
            data[:] = bytes(len(data))
            return
        data[:] = self.words(data)

    def words(self, data: bytearray) -> bytearray:
        """Return the data with some words replaced; its length stays."""
        choose, found = self.random, bytearray(data)
        for _ in range(choose.choice((1, 1, 2, 4))):
            word = choose.choice(WORDS) if choose.random() < 0.7 else choose.randbytes(4)
            place = choose.randrange(len(found)) // len(word) * len(word)
            found[place : place + len(word)] = word[: len(found) - place]
        return found

    def json(self, raw: bytes) -> bytes:
        """Return one mutant of a sound JSON object, mostly still JSON."""
        value: Json = json.loads(raw)
        for _ in range(self.random.choice((1, 1, 2))):
            value = self.value(value)
        text = json.dumps(value, separators=(",", ":"), sort_keys=True)
        match self.random.randrange(20):
            case 0:
                text = self._twice(text)
            case 1:
                text = text.replace("1", self.random.choice(["NaN", "Infinity", "1e999", "01", "1.", "-0"]), 1)
            case 2:
                place = self.random.randrange(len(text) + 1)
                text = (
                    text[:place] + self.random.choice(["[" * 40, "{", "}", ",", '"', "\\ud800", "\x00"]) + text[place:]
                )
            case 3:
                text = text[: self.random.randrange(len(text))]
            case 4:
                text = text.replace(":", ": ", 1)
            case _:
                pass
        return text.encode("utf-8", "surrogatepass")

    def value(self, value: Json) -> Json:
        """Return a JSON value with one edit somewhere inside."""
        choose = self.random
        if isinstance(value, dict) and value and choose.random() < 0.9:
            key = choose.choice(sorted(value))
            match choose.randrange(12):
                case 0:
                    return {name: inner for name, inner in value.items() if name != key}
                case 1:
                    return value | {choose.choice(["extra", "Rank", "op", "bias", key + "x"]): self._scalar()}
                case 2:
                    return value | {choose.choice(sorted(value)): value[key]}
                case _:
                    return value | {key: self.value(value[key])}
        if isinstance(value, list) and value and choose.random() < 0.9:
            place = choose.randrange(len(value))
            match choose.randrange(8):
                case 0:
                    return value[:place] + value[place + 1 :]
                case 1:
                    return [*value, value[place]]
                case 2:
                    return value[::-1]
                case _:
                    return [*value[:place], self.value(value[place]), *value[place + 1 :]]
        if isinstance(value, int) and not isinstance(value, bool) and choose.random() < 0.6:
            return value + choose.choice((-2, -1, 1, 2, value))
        return self._scalar()

    def _scalar(self) -> Json:
        return self.random.choice(self.random.choice((NUMBERS, TEXTS, OTHERS, [*OTHERS, DEEP])))

    def _pick(self, entries: Entries) -> tuple[int, dict[str, Json]] | None:
        found = [
            (at, entry) for at, (name, entry) in enumerate(entries) if isinstance(entry, dict) and "shape" in entry
        ]
        return self.random.choice(found) if found else None

    def _put(self, entries: Entries, key: str, value: Json) -> None:
        if (picked := self._pick(entries)) is not None:
            at, entry = picked
            entries[at] = (entries[at][0], entry | {key: value})

    def _dtype(self, entries: Entries, data: bytearray) -> None:
        self._put(entries, "dtype", self.random.choice(DTYPES))

    def _shape(self, entries: Entries, data: bytearray) -> None:
        picked = self._pick(entries)
        shape = picked[1]["shape"] if picked is not None else []
        dims = list(shape) if isinstance(shape, list) else []
        choose = self.random
        edits: list[Callable[[], Json]] = [
            lambda: dims[::-1],
            lambda: [*dims, 1],
            lambda: [0, *dims],
            lambda: dims[:-1],
            lambda: [*dims[:-1], choose.choice(NUMBERS)],
            lambda: [dim + 1 if isinstance(dim, int) else dim for dim in dims],
            lambda: [dim // 2 if isinstance(dim, int) else dim for dim in dims],
            lambda: [choose.choice(NUMBERS) for _ in dims],
            lambda: choose.choice(OTHERS),
        ]
        if picked is not None:
            at, entry = picked
            entries[at] = (entries[at][0], entry | {"shape": choose.choice(edits)()})

    def _offsets(self, entries: Entries, data: bytearray) -> None:
        picked = self._pick(entries)
        offsets = picked[1].get("data_offsets") if picked is not None else None
        if picked is None or not isinstance(offsets, list) or len(offsets) != 2:
            return
        step = self.random.choice((-4, -1, 1, 4, 128, 2**32))
        first, last = (end if isinstance(end, int) else 0 for end in offsets)
        moved: list[list[Json]] = [
            [first + step, last + step],
            [first, last + step],
            [first + step, last],
            [last, first],
        ]
        moved += [[0, last - first], [self._scalar(), last], [first], [first, last, last]]
        at, entry = picked
        entries[at] = (entries[at][0], entry | {"data_offsets": self.random.choice(moved)})

    def _name(self, entries: Entries, data: bytearray) -> None:
        if entries:
            at = self.random.randrange(len(entries))
            name, entry = entries[at]
            names = [*NAMES, name + "x", name.replace("0", "1"), name.upper(), entries[-1][0]]
            entries[at] = (self.random.choice(names), entry)

    def _entries(self, entries: Entries, data: bytearray) -> None:
        at = self.random.randrange(len(entries))
        match self.random.randrange(6):
            case 0:
                del entries[at]
            case 1:
                entries.append(entries[at])
            case 2:
                self.random.shuffle(entries)
            case 3:
                entries[at] = (entries[at][0], self._scalar())
            case 4:
                entry = entries[at][1]
                entries[at] = (entries[at][0], self.value(entry) if isinstance(entry, dict) else entry)
            case _:
                end = len(data)
                data += bytes(4)
                added: Json = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
                entries.append((self.random.choice(NAMES), added))

    def _metadata(self, entries: Entries, data: bytearray) -> None:
        metadata: list[Json] = [
            {},
            {"format": "pt"},
            {"format": 1},
            {"a": {"b": "c"}},
            [],
            "x",
            None,
            {"a": "x" * 2000},
        ]
        entries.append(("__metadata__", self.random.choice(metadata)))

    def _header_text(self, entries: Entries) -> bytes:
        text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
        if self.random.random() < 0.06:
            place = self.random.randrange(len(text))
            text = text[:place] + self.random.choice(["[", "}", "NaN", " ", "\x00", "1e999", "-"]) + text[place + 1 :]
        return text.encode()

    def _twice(self, text: str) -> str:
        """Return the object with its first pair repeated: two readers may then disagree."""
        end = text.find(",")
        return text if end < 0 else text[:1] + text[1:end] + "," + text[1:]


def _repair(entries: Entries) -> None:
    """Move all offsets to where sizes put them, so that the edit reaches the checks behind these."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I16": 2, "U8": 1}
    position = 0
    for at, (name, entry) in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(shape := entry.get("shape"), list):
            continue
        size = sizes.get(str(entry.get("dtype")), 1)
        for dim in shape:
            size *= dim if isinstance(dim, int) and 0 <= dim < 2**40 else 1
        entries[at] = (name, entry | {"data_offsets": [position, position + size]})
        position += size


def edited(value: Any, choose: random.Random, other: Any) -> Any:
    """Return a frozen dataclass, or what such hold, with one edit somewhere inside; `other` is one of the same kind."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        # mostly what is there
        present = [name for name in names if getattr(value, name) not in (0, False, None, (), "")]
        name = choose.choice(present if present and choose.random() < 0.7 else names)
        theirs = getattr(other, name, None)
        return replace(value, **{name: edited(getattr(value, name), choose, theirs)})
    if isinstance(value, tuple):
        return _edited_tuple(value, choose, other)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + choose.choice((-1, 1, 2, 3, 16, 40, 128, 2048, 5000, -value, -value - 1))
    if isinstance(value, float):
        return choose.choice((0.0, -1.0, 1e-7, 1e7, 1.0, 2.5))
    if isinstance(value, str):
        texts = [text for text in TEXTS if isinstance(text, str)]
        return choose.choice([*texts, "norm", "k_norm", "both", "rank", "abs"])
    return other


def _edited_tuple(value: tuple[Any, ...], choose: random.Random, other: Any) -> tuple[Any, ...]:
    theirs = other if isinstance(other, tuple) else ()
    match choose.randrange(6):
        case 0 if value:
            return value[1:]
        case 1 if value:
            return (*value, *value[-1:] * choose.choice((1, 1, 130, 300)))
        case 2:
            both = {*value, *theirs}
            return tuple(sorted(both, key=repr))
        case _ if value:
            at = choose.randrange(len(value))
            return (*value[:at], edited(value[at], choose, theirs[0] if theirs else None), *value[at + 1 :])
    return theirs
