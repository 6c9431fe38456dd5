"""Which tokens each penalised sequence has seen, and how often it wrote each: kept up to date, never recounted.

Owns one table per live sequence whose request has a penalty. Pure. Invariant: a table equals a fresh count of the
sequence's prompt and output so far; the cost of a step is that of its new tokens.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve.engine.plan import SampleSpec

_FIRST_ROOM = 256


@dataclass(slots=True)
class TokenCounts:
    """Distinct tokens of one sequence, those of the prompt first; `counts` are of the output alone."""

    ids: NDArray[np.int64]
    counts: NDArray[np.float32]
    size: int
    num_outputs: int = 0
    place_of: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of_prompt(cls, prompt_ids: list[int]) -> "TokenCounts":
        """Count nothing yet of the output."""
        seen = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        ids = np.zeros(len(seen) + _FIRST_ROOM, dtype=np.int64)
        ids[: len(seen)] = seen
        places = dict(zip(seen.tolist(), range(len(seen)), strict=True))
        return cls(ids, np.zeros(len(ids), dtype=np.float32), len(seen), place_of=places)

    def add(self, token_id: int) -> None:
        """Count one more token of the output."""
        place = self.place_of.setdefault(token_id, self.size)
        if place == self.size:
            if place == len(self.ids):
                self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
                self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
            self.ids[place] = token_id
            self.size += 1
        self.counts[place] += 1
        self.num_outputs += 1

    def seen(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        return self.ids[: self.size]

    def written(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens of the output, and how often each occurs."""
        chosen = self.counts[: self.size].nonzero()[0]
        return self.ids[chosen], self.counts[chosen]


class TokenHistories:
    """The tables of all live penalised sequences, by request id."""

    def __init__(self) -> None:
        self._tables: dict[str, TokenCounts] = {}

    def counts(self, request_id: str, spec: SampleSpec) -> TokenCounts:
        """Return a sequence's table, brought up to its newest token."""
        table = self._tables.get(request_id)
        if table is None or table.num_outputs > len(spec.output_ids):
            table = self._tables[request_id] = TokenCounts.of_prompt(spec.prompt_ids)
        for token_id in spec.output_ids[table.num_outputs :]:
            table.add(token_id)
        return table

    def release(self, request_id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
        self._tables.pop(request_id, None)
