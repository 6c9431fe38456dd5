"""Arrays of a step put one after another as 32-bit words, so that one copy carries them all to the device.

Owns where each array's words lie; numpy only, and nothing of what they mean. Invariant: every array begins at a
multiple of 16 bytes, and arrays of the same sizes in the same order lie at the same places: so a captured CUDA graph
finds the next step's arrays where the last one's were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
_ALIGNMENT_WORDS = 4


@dataclass(frozen=True, slots=True)
class Field:
    """A run of 32-bit words."""

    begin: int
    size: int

    @property
    def end(self) -> int:
        """The first word behind it."""
        return self.begin + self.size


class Words:
    """Arrays of 32 or 64 bits, end to end."""

    def __init__(self) -> None:
        self._parts: list[Int32s] = []
        self.size = 0

    def put(self, values: Sequence[int] | Sequence[float] | NDArray[np.generic], dtype: type[np.generic]) -> Field:
        """Append an array; the answer says where its words lie."""
        return self._append(np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.int32))

    def put_padded(self, values: Sequence[int] | Int32s, size: int, fill: int) -> Field:
        """Append int32 values, filled up to `size`."""
        assert len(values) <= size, f"{len(values)} values do not fit {size} words"
        padded = np.full(size, fill, dtype=np.int32)
        padded[: len(values)] = values
        return self._append(padded)

    def write(self, target: Int32s) -> None:
        """Copy all words to the head of `target`."""
        if self._parts:
            np.concatenate(self._parts, out=target[: self.size])

    def _append(self, words: Int32s) -> Field:
        field = Field(self.size, len(words))
        padding = -len(words) % _ALIGNMENT_WORDS
        self._parts.append(words)
        if padding:
            self._parts.append(np.zeros(padding, dtype=np.int32))
        self.size += len(words) + padding
        return field


def padded_size(num_words: int) -> int:
    """Words that an array of `num_words` takes, its padding included."""
    return -(-num_words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS
