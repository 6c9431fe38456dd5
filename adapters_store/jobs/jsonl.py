"""A job's data file: JSON lines, `{"messages": [...]}` or `{"prompt", "completion"}`, read as a stream and checked.

Owns what a line may hold; which tokens that makes is the trainer's. Invariants: memory is bounded by one line, every
line is checked, and a file that `scan` passed gives the same examples to `examples`.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters_store.errors import CorruptUpload
from adapters_store.jobs.example import Example, read_example
from adapters_store.jobs.refusals import MAX_NAMED_LINES, InvalidData
from adapters_store.strict_json import read_json

_READ_BYTES = 1 << 20
# after so many bad lines the rest is not looked at
_MAX_BAD_LINES = 10_000


@dataclass(frozen=True, slots=True)
class DataLimits:
    """What one data file may hold."""

    max_bytes: int = 512 << 20
    max_line_bytes: int = 1 << 20
    max_examples: int = 1_000_000
    min_examples: int = 1


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What `scan` found; `kind` is "chat" or "completion", `tasks` the task labels in order of their first line."""

    num_examples: int
    kind: str
    num_bytes: int
    sha256: str
    tasks: tuple[str, ...]
    # examples in which every token of an answer that is learnt has a task
    num_labelled: int


class _Faults:
    """Bad lines: the first ten in words, the others counted."""

    def __init__(self) -> None:
        self.named: list[tuple[int, str]] = []
        self.total = 0

    def add(self, number: int, reason: str) -> None:
        """Count one; raises InvalidData when there are too many to go on."""
        self.total += 1
        if len(self.named) < MAX_NAMED_LINES:
            self.named.append((number, reason))
        if self.total >= _MAX_BAD_LINES:
            raise InvalidData(self.named, self.total)


def scan(path: Path, limits: DataLimits | None = None) -> DataSummary:
    """Read the whole file once and check every line.

    Raises:
        InvalidData: bad lines; too many lines or bytes; nothing to learn from.
    """
    limits = limits or DataLimits()
    faults, digest = _Faults(), hashlib.sha256()
    kind, tasks, num_examples, num_labelled = "", dict[str, None](), 0, 0
    with path.open("rb") as file:
        for number, raw in _lines(file, limits, digest.update):
            try:
                example = _read_line(raw, limits)
                if kind and example.kind != kind:
                    raise CorruptUpload(f"is a {example.kind} example; the lines before are {kind}: do not mix them")
            except CorruptUpload as error:
                faults.add(number, error.message)
                continue
            kind = example.kind
            num_examples += 1
            num_labelled += example.is_labelled
            tasks |= dict.fromkeys(example.tasks)
            if num_examples > limits.max_examples:
                raise InvalidData([(number, f"the file has more than {limits.max_examples} examples")], 1)
        num_bytes = file.tell()
    if faults.total:
        raise InvalidData(faults.named, faults.total)
    if num_examples < limits.min_examples:
        raise InvalidData([(1, f"the file has {num_examples} examples; at least {limits.min_examples} are needed")], 1)
    return DataSummary(num_examples, kind, num_bytes, digest.hexdigest(), tuple(tasks), num_labelled)


def examples(path: Path, limits: DataLimits | None = None) -> Iterator[Example]:
    """Yield the examples of a file in order; raises InvalidData at the first bad line."""
    limits = limits or DataLimits()
    with path.open("rb") as file:
        for number, raw in _lines(file, limits, lambda _: None):
            try:
                yield _read_line(raw, limits)
            except CorruptUpload as error:
                raise InvalidData([(number, error.message)], 1) from None


def _read_line(raw: bytes | None, limits: DataLimits) -> Example:
    if raw is None:
        raise CorruptUpload(f"is longer than {limits.max_line_bytes} bytes: split the example")
    return read_example(read_json(raw, "it", max_bytes=limits.max_line_bytes))


def _lines(file: BinaryIO, limits: DataLimits, seen: Callable[[bytes], None]) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield (number from 1, bytes) of every line that is not blank; None for one that is too long.

    Only `\n` ends a line: U+2028 inside a string is text. A `\r` before it belongs to the end.
    """
    number, rest, is_skipping, total = 0, b"", False, 0
    while block := file.read(_READ_BYTES):
        total += len(block)
        if total > limits.max_bytes:
            raise InvalidData([(number + 1, f"the file is larger than {limits.max_bytes} bytes")], 1)
        seen(block)
        *ended, rest = (rest + block).split(b"\n")
        for line in ended:
            number += 1
            if is_skipping:
                is_skipping = False
            elif len(line) > limits.max_line_bytes:
                yield number, None
            elif line.strip():
                yield number, line
        if len(rest) > limits.max_line_bytes:
            if not is_skipping:
                yield number + 1, None
            rest, is_skipping = b"", True
    if rest.strip() and not is_skipping:
        yield number + 1, rest
