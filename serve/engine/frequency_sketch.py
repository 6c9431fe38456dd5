"""How often digests were used, in bounded memory: a count-min sketch whose counts halve as time goes.

Invariant: an estimate is never below the true count since the last halvings, and memory does not grow with the number
of digests. Source: the sketch of TinyLFU (Einziger, Friedman, Manes, ACM ToS 2017).
"""

from hashlib import blake2b

_NUM_ROWS = 4
_NUM_COLUMNS = 4096
_MOST = 255
# counts halve after this many uses per column: about ten times the residents that fit in memory
_USES_PER_HALVING = 10 * _NUM_COLUMNS


class FrequencySketch:
    """Counters of one byte: four rows, an estimate is the smallest of a digest's four."""

    def __init__(self) -> None:
        self._counts = [bytearray(_NUM_COLUMNS) for _ in range(_NUM_ROWS)]
        self._num_uses = 0

    def count(self, digest: str) -> None:
        """Count one use."""
        for row, column in zip(self._counts, _columns(digest), strict=True):
            row[column] = min(row[column] + 1, _MOST)
        self._num_uses += 1
        if self._num_uses >= _USES_PER_HALVING:
            self._num_uses //= 2
            self._counts = [bytearray(count // 2 for count in row) for row in self._counts]

    def estimate(self, digest: str) -> int:
        """Return about how often a digest was used lately."""
        return min(row[column] for row, column in zip(self._counts, _columns(digest), strict=True))


def _columns(digest: str) -> list[int]:
    raw = blake2b(digest.encode(), digest_size=2 * _NUM_ROWS).digest()
    return [int.from_bytes(raw[i : i + 2], "little") % _NUM_COLUMNS for i in range(0, 2 * _NUM_ROWS, 2)]
