"""What the campaign has published, replaced and deleted, and which answers a request may therefore get.

Owns the history of every name as its client saw it: each change from when it was sent to when it was acknowledged.
Invariant: what was acknowledged before a request was sent is the oldest that the request may see; a digest is allowed
to exactly the requests during which it may have been current.
"""

import math
from bisect import insort
from dataclasses import dataclass, field


@dataclass(slots=True)
class Change:
    """One version published, or a deletion (no digest); `end` is infinite until it is acknowledged."""

    begin: float
    digest: str | None
    version: int = 0
    end: float = math.inf


@dataclass(slots=True)
class History:
    """The changes of one name, in order; one at a time."""

    changes: list[Change] = field(default_factory=list)

    def possible(self, sent: float, answered: float) -> set[str | None]:
        """Return the digests that a request may have met between these times; None stands for "no such adapter"."""
        found: set[str | None] = set() if self.changes and self.changes[0].end <= sent else {None}
        for change, after in zip(self.changes, [*self.changes[1:], None], strict=False):
            is_over = after is not None and after.end <= sent
            if change.begin <= answered and not is_over:
                found.add(change.digest)
        return found

    def possible_version(self, version: int, sent: float, answered: float) -> set[str | None]:
        """Return what a request for `name@version` may have met; its life ends with the name's deletion."""
        found: set[str | None] = set()
        index = next(i for i, change in enumerate(self.changes) if change.version == version)
        deletion = next((change for change in self.changes[index:] if change.digest is None), None)
        if self.changes[index].begin <= answered and (deletion is None or deletion.end > sent):
            found.add(self.changes[index].digest)
        if self.changes[index].end > sent or (deletion is not None and deletion.begin <= answered):
            found.add(None)
        return found


class Catalog:
    """Every name of the campaign, and the tokens that each version of it answers."""

    def __init__(self, base_answers: list[list[int]]) -> None:
        self.base_answers = base_answers
        self._answers: dict[str, list[list[int]]] = {}
        self._histories: dict[str, History] = {}
        self._changing: set[str] = set()
        self.num_live = 0

    @property
    def names(self) -> list[str]:
        """Every name there ever was, in the order of its first publication."""
        return list(self._histories)

    def history(self, name: str) -> History:
        """Return a name's history; raises KeyError for one that was never published."""
        return self._histories[name]

    def answers(self, digest: str) -> list[list[int]] | None:
        """Return what a version answers to each prompt; None for a digest that was never published here."""
        return self._answers.get(digest)

    def is_live(self, name: str) -> bool:
        """Say whether the last change of a name published something."""
        history = self._histories.get(name)
        return history is not None and history.changes[-1].digest is not None

    def is_changing(self, name: str) -> bool:
        """Say whether a change is under way."""
        return name in self._changing

    def begin(self, name: str, digest: str | None, at: float) -> Change:
        """Note that a change was sent; `finish` when it was acknowledged."""
        assert name not in self._changing, f"two changes of {name} at once"
        self._changing.add(name)
        change = Change(at, digest)
        self._histories.setdefault(name, History()).changes.append(change)
        return change

    def finish(self, name: str, change: Change, at: float, version: int = 0) -> None:
        """Note that a change was acknowledged, a publication with its number."""
        was_live = [earlier.digest is not None for earlier in self._histories[name].changes][-2:-1] == [True]
        change.end, change.version = at, version
        self._changing.discard(name)
        self.num_live += (change.digest is not None) - was_live

    def learn(self, digest: str, answers: list[list[int]]) -> None:
        """Remember what a version answers alone, before it is published."""
        self._answers[digest] = answers


def percentiles(seconds: list[float], *shares: float) -> list[float]:
    """Return the values below which these shares of the samples lie; nothing measured is NaN."""
    ordered: list[float] = []
    for value in seconds:
        insort(ordered, value)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan for share in shares]
