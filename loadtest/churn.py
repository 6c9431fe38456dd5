"""Changes of the adapters while they serve: replace, evict, delete and upload again, at planned moments.

Owns the plan of the changes; `adapter_changes.py` carries them out. Invariant: a deleted adapter is uploaded again, so
the set of names at the end is the one at the start.
"""

import random
from dataclasses import dataclass

from loadtest.errors import InvalidScenario
from loadtest.tables import Table

KINDS = ("delete", "evict", "replace")


@dataclass(frozen=True, slots=True)
class Churn:
    """`count` changes, one every `every_s` seconds, of the `kinds` in turn; a deleted one returns after `absent_s`."""

    every_s: float
    count: int
    kinds: tuple[str, ...]
    absent_s: float


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """One change; `revision` numbers the contents an adapter is given, 0 is what it started with."""

    at_s: float
    kind: str
    adapter: int
    revision: int


def read_churn(table: Table) -> Churn:
    """Read a scenario's `[churn]`."""
    kinds = []
    for kind in table.values("kinds") if table.has("kinds") else list(KINDS):
        if kind not in KINDS:
            raise InvalidScenario(f"{table.where}.kinds: {kind!r} is none of {', '.join(KINDS)}")
        kinds.append(str(kind))
    churn = Churn(
        every_s=table.number("every_s", low=1e-3),
        count=table.whole("count", low=1, high=100_000),
        kinds=tuple(kinds),
        absent_s=table.number("absent_s", 0.5),
    )
    table.close()
    return churn


def plan_changes(churn: Churn, num_adapters: int, rng: random.Random) -> list[PlannedChange]:
    """Return the changes in time order, each to an adapter drawn at random."""
    revisions = [0] * num_adapters
    changes = []
    for index in range(churn.count):
        kind = churn.kinds[index % len(churn.kinds)]
        adapter = rng.randrange(num_adapters)
        if kind != "evict":
            revisions[adapter] += 1
        changes.append(PlannedChange((index + 1) * churn.every_s, kind, adapter, revisions[adapter]))
    return changes
