"""What the campaign sends, as values: the prompts, the shares of each kind, and the k-th request of a seed.

Owns no state. Invariant: the k-th request of a seed is always the same wish; what it meets depends on the timing.
"""

import random
from bisect import bisect
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

MAX_TOKENS = 8
# what a client asks for that will leave: long enough to be left in the middle
LEFT_TOKENS = 64
_SHARED = list(range(40, 72))
# three share one block of 16 tokens, two of them a second: what a prefix cache mixes up shows in these
PROMPTS = [
    [*_SHARED, 1, 2, 3],
    [*_SHARED, *range(100, 109)],
    [*_SHARED[:16], 9, 8, 7, 6],
    [5, 5, 5, 5, 5, 5, 5, 3, 2, 1],
]


class Kind(StrEnum):
    """What a client does."""

    WHOLE = "whole"
    STREAM = "stream"
    TWO_PROMPTS = "two prompts"
    VERSION = "old version"
    BASE = "base"
    # leaves after so many events
    LEAVE = "leave"
    # the operator's wishes, which no answer may depend on
    PREFETCH = "prefetch"
    EVICT = "evict"


_SHARES = {
    Kind.WHOLE: 43,
    Kind.STREAM: 38,
    Kind.TWO_PROMPTS: 3,
    Kind.VERSION: 6,
    Kind.BASE: 2,
    Kind.LEAVE: 6,
    Kind.PREFETCH: 1,
    Kind.EVICT: 1,
}


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: of the name with this popularity rank, for so many tokens; `leaves_after` counts events."""

    kind: Kind
    name_index: int
    prompt_indices: tuple[int, ...]
    num_tokens: int
    leaves_after: int
    # which of a name's versions `name@version` means, counted from its newest
    versions_back: int


class ChangeKind(StrEnum):
    """What happens to a name meanwhile."""

    REPLACE = "replace"
    DELETE = "delete"
    CREATE = "create"


class Plan:
    """The wishes of one campaign; popularity falls as `1 / rank ** zipf`."""

    def __init__(self, seed: int, num_adapters: int, zipf: float = 1.0) -> None:
        self._seed = seed
        self._num_adapters = num_adapters
        self._popularity = list(accumulate(1 / (rank + 1) ** zipf for rank in range(num_adapters)))

    def wish(self, index: int) -> Wish:
        """Return the request of this number."""
        rng = random.Random(f"{self._seed}-wish-{index}")
        (kind,) = rng.choices([*_SHARES], [*_SHARES.values()])
        prompt_index = rng.randrange(len(PROMPTS))
        other = rng.randrange(len(PROMPTS))
        return Wish(
            kind=kind,
            name_index=self._popular(rng),
            prompt_indices=(prompt_index, other) if kind is Kind.TWO_PROMPTS else (prompt_index,),
            num_tokens=LEFT_TOKENS if kind is Kind.LEAVE else rng.randint(1, MAX_TOKENS),
            leaves_after=rng.choice((0, 0, 1, 2, 4)),
            versions_back=rng.randrange(3),
        )

    def change(self, index: int) -> tuple[ChangeKind, int]:
        """Return the change of this number and which name it is for; names asked for often change often."""
        rng = random.Random(f"{self._seed}-change-{index}")
        kinds, shares = [ChangeKind.REPLACE, ChangeKind.DELETE, ChangeKind.CREATE], [60, 20, 20]
        (kind,) = rng.choices(kinds, shares)
        return kind, self._popular(rng) if rng.random() < 0.5 else rng.randrange(self._num_adapters)

    def _popular(self, rng: random.Random) -> int:
        return bisect(self._popularity, rng.random() * self._popularity[-1])
