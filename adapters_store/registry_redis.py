"""The registry that replicas share: a journal in their shared folder, followed by each, announced through Redis.

Owns the order of a change: decided against all changes before it, written to the journal, followed like anybody's,
announced. Invariants: what was acknowledged is durable in the folder, whatever happens to Redis; the journal alone
decides who gets a number, so two replicas can never publish one version twice, also when Redis fails over and forgets;
reads come from memory and need neither Redis nor the folder; without Redis nothing changes, since nobody would hear.
"""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from adapters_store.change_log import ChangeLog
from adapters_store.errors import RegistryUnavailable, StorageFailed
from adapters_store.journal import NOTHING_BEFORE, Journal, LinkingFileSystem
from adapters_store.journal_reader import JournalReader
from adapters_store.pointers import Choose, Decide, Pointers
from adapters_store.registry import AdapterVersion, Check, NewVersion, Traffic, take_all
from adapters_store.registry_changes import (
    Change,
    Deleted,
    Entry,
    Everything,
    Founded,
    Moved,
    Published,
    Retired,
    write_entry,
)
from adapters_store.registry_state import RegistryState

JOURNAL = "journal"


class Head(Protocol):
    """Where replicas tell each other the newest number: Redis, or nobody at all for one process alone."""

    def top(self) -> int:
        """Return the newest number told; -1: none. Raises RegistryUnavailable."""
        ...

    def announce(self, number: int) -> None:
        """Tell it; raises RegistryUnavailable."""
        ...

    def forget(self) -> None:
        """Remove what was told; raises RegistryUnavailable."""
        ...

    def close(self) -> None:
        """Give back the connections."""
        ...


class SharedRegistry:
    """A `Registry` over a journal. Thread-safe; any number of processes on any number of machines."""

    def __init__(self, journal: ChangeLog) -> None:
        """Read the journal, founding it if it is new; changes are refused until `connect`.

        Raises:
            StorageFailed: the folder fails, or an entry is missing or damaged.
        """
        self._journal = journal
        self._head: Head | None = None
        self._before_close: Callable[[], None] | None = None
        self._is_away = False
        self._told = -1
        self._seen_s = time.monotonic()
        self._known = JournalReader(journal)
        self._found()
        self._known.catch_up_wholly()

    @classmethod
    def open(cls, store: Path) -> "SharedRegistry":
        """Read the journal of the store in this folder."""
        return cls(Journal(store / JOURNAL, LinkingFileSystem()))

    @property
    def store_id(self) -> str:
        """Return the store's identity, which its key in Redis carries."""
        return self._known.read(lambda state: state.store_id)

    @property
    def number(self) -> int:
        """Return the number of the newest change that this process knows."""
        return self._known.number

    @property
    def is_away(self) -> bool:
        """Return whether Redis did not answer the last time."""
        return self._is_away

    def connect(self, head: Head, *, before_close: Callable[[], None] | None = None) -> None:
        """Take changes from now on, and tell them to `head`, which `close` closes."""
        self._head, self._before_close = head, before_close

    def mark(self, *, is_away: bool, told: int = -1) -> None:
        """Remember whether Redis answers, and the newest number that it told; whoever asked it says so."""
        self._is_away, self._told = is_away, told

    @property
    def lag(self) -> int | None:
        """Return how many changes Redis knows of that this process does not; None while Redis does not answer."""
        return None if self._is_away else max(0, self._told - self.number)

    @property
    def seen_s_ago(self) -> float:
        """Return how long ago this process last looked at the journal's end."""
        return time.monotonic() - self._seen_s

    def publish(self, new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
        """Give the next number, make it the name's current version, return when durable."""

        def decide(state: RegistryState) -> Change:
            state.check_free(new.name)
            check(state)
            return Published(AdapterVersion(**_fields(new), version=state.next_number(new.name)))  # type: ignore[arg-type]

        entry = self._change(decide)
        assert entry is not None and isinstance(entry.change, Published)
        return entry.change.version

    def move(self, name: str, decide: Decide) -> Pointers:
        """Let `decide` see the name with nothing else moving, make its move, return the pointers when durable."""

        def decided(state: RegistryState) -> Change | None:
            move = decide(state.named(name))
            return None if move is None else Moved(name, move)

        self._change(decided)
        return self._known.read(lambda state: state.pointers(name)) or Pointers()

    def retire(self, name: str, choose: Choose, *, now: int) -> list[AdapterVersion]:
        """Forget the versions that `choose` names and return them; their digests count as retired from `now` on."""
        gone: list[AdapterVersion] = []

        def decided(state: RegistryState) -> Change | None:
            numbers = tuple(choose(state.named(name)))
            gone[:] = [version for version in state.versions(name) if version.version in numbers]
            return Retired(name, numbers, now) if numbers else None

        self._change(decided)
        return gone

    def delete(self, name: str, *, now: int) -> None:
        """Forget a name with its versions and aliases; their digests count as retired from `now` on."""
        self._change(lambda state: Deleted(name, now) if state.current(name) is not None else None)

    def fold(self, *, retired_since: int) -> int:
        """Write all changes as one and forget those before; return how many files went."""
        entry = self._change(lambda state: state.everything(retired_since=retired_since))
        assert entry is not None
        with self._journal.lock.held():
            # somebody else may have folded more meanwhile
            is_newest = entry.number > self._journal.checkpoint()
            return self._journal.forget_before(entry.number) if is_newest else 0

    def check_free(self, name: str) -> None:
        """Raise NameTaken as `Registry` says; RegistryUnavailable early, before somebody sends gigabytes in vain."""
        if self._head is None or self._is_away:
            raise RegistryUnavailable()
        self._known.read(lambda state: state.check_free(name))

    def current(self, name: str) -> AdapterVersion | None:
        """Return the name's current version."""
        return self._known.read(lambda state: state.current(name))

    def version(self, name: str, version: int) -> AdapterVersion | None:
        """Return one version by number."""
        return self._known.read(lambda state: state.version(name, version))

    def aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version that `name:alias` points to."""
        return self._known.read(lambda state: state.aliased(name, alias))

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        return self._known.read(lambda state: state.versions(name))

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        return self._known.read(lambda state: state.all_current())

    def pointers(self, name: str) -> Pointers | None:
        """Return where a name points and how it came to that."""
        return self._known.read(lambda state: state.pointers(name))

    def canary(self, name: str) -> int | None:
        """Return the version that gets a share of the plain name's requests."""
        return self._known.read(lambda state: state.canary(name))

    def traffic(self, name: str) -> Traffic | None:
        """Return what the plain name means, canary included, as of one moment."""
        return self._known.read(lambda state: state.traffic(name))

    def digests(self, *, retired_since: int) -> set[str]:
        """Return every digest that some version points to, or that was retired at or after that time.

        Whoever asks removes the others, so this looks into the folder first.
        Raises:
            RegistryUnavailable: Redis knows of changes that the folder does not show here.
        """
        top = -1
        if self._head is not None and not self._is_away:
            with suppress(RegistryUnavailable):
                top = self._head.top()
        self.catch_up()
        self._check_not_behind(top)
        return self._known.read(lambda state: state.digests(retired_since=retired_since))

    def everything(self) -> Everything:
        """Return all that is known, as one change."""
        return self._known.read(lambda state: state.everything())

    def catch_up(self) -> None:
        """Follow the journal to its end; raises StorageFailed."""
        begin_s = time.monotonic()
        self._known.catch_up()
        self._seen_s = begin_s

    def close(self) -> None:
        """Give back the connections."""
        if self._before_close is not None:
            self._before_close()
        if self._head is not None:
            self._head.close()

    def announce_anew(self) -> None:
        """Make Redis know this journal's newest number, whatever it knew; raises RegistryUnavailable."""
        if self._head is None:
            raise RegistryUnavailable()
        self._head.forget()
        self._head.announce(self.number)

    def adopt(self, everything: Everything) -> None:
        """Begin with what another registry knew; raises StorageFailed if this one has changes of its own."""

        def decide(state: RegistryState) -> Change:
            if self.number > 0:
                raise StorageFailed("the store's journal has changes of its own; nothing was taken over")
            return replace(everything, store_id=state.store_id)

        self._change(decide)

    def _change(self, decide: Callable[[RegistryState], Change | None]) -> Entry | None:
        """Let `decide` see everything, write down what it says, follow it, announce it."""
        if self._head is None:
            raise RegistryUnavailable()
        # asked now, not remembered: a frozen Redis looks like one that has nothing to say
        top = self._head.top()
        with self._journal.lock.held():
            entry = self._append(decide, top)
        if entry is not None:
            self.catch_up()
            # durable, so it happened: if Redis went just now, the others find it in the folder. Asked without the
            # lock, or a frozen Redis would hold up the changes of all replicas
            with suppress(RegistryUnavailable):
                self._head.announce(self.number)
        return entry

    def _append(self, decide: Callable[[RegistryState], Change | None], top: int) -> Entry | None:
        while True:
            self._known.catch_up_wholly()
            self._check_not_behind(top)
            entry = self._known.next_entry(decide)
            if entry is None or self._journal.append(entry.number, write_entry(entry)):
                return entry

    def _found(self) -> None:
        if self._journal.read(0) is None:
            with self._journal.lock.held():
                self._journal.append(0, write_entry(Entry(0, NOTHING_BEFORE, Founded(uuid.uuid4().hex))))

    def _check_not_behind(self, top: int) -> None:
        if top > self.number:
            raise RegistryUnavailable(
                f"Redis knows of change {top}, the shared folder shows {self.number} here; if the folder was restored "
                "from a backup, run `chorale store rebuild`"
            )


def _fields(new: NewVersion) -> dict[str, object]:
    # asdict would turn the report into a dict
    return {key: getattr(new, key) for key in asdict(new)}
