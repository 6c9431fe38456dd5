"""How often digests were used lately: counts that halve as time goes, and are forgotten at zero.

Invariant: at most one count per use of the last sample is kept, so memory follows the number of residents, not that of
digests ever seen. Source: the ageing of TinyLFU (Einziger, Friedman, Manes, ACM ToS 2017), with exact counts.
"""

# uses after which counts halve, at least; and times as many as there are residents
_LEAST_SAMPLE = 640
_SAMPLE_PER_RESIDENT = 10


class RecentUses:
    """A count per digest."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._num_uses = 0

    def count(self, digest: str, num_residents: int = 0) -> None:
        """Count one use; the more residents there are, the longer uses are remembered."""
        self._counts[digest] = self[digest] + 1
        self._num_uses += 1
        if self._num_uses >= max(_LEAST_SAMPLE, _SAMPLE_PER_RESIDENT * num_residents):
            self._counts = {digest: count // 2 for digest, count in self._counts.items() if count > 1}
            self._num_uses = sum(self._counts.values())

    def __getitem__(self, digest: str) -> int:
        return self._counts.get(digest, 0)

    def __len__(self) -> int:
        return len(self._counts)
