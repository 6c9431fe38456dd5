"""The operator's pins where servers share an object store: a journal of its own, each entry all pins there are then.

Owns the entries' form and the choice between this and the file. Invariants: as for the file: a change is durable when
the call returns and no other process's is lost by it, the oldest pin comes first; a file of pins in the folder of a
server that came to share an object store is taken over and renamed, never removed.
"""

import json
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from adapters_store.blob_choice import open_journal
from adapters_store.change_log import ChangeLog
from adapters_store.errors import StorageFailed
from adapters_store.followed_journal import FollowedJournal
from adapters_store.journal import NOTHING_BEFORE
from adapters_store.json_values import integer, json_list, json_object, text
from adapters_store.pins import PINS_FILE, Pins, PinsFile, PinStore, is_digest
from adapters_store.registry_choice import put_aside
from adapters_store.strict_json import canonical_json

PINS_JOURNAL = "pins"
# so many entries stay for those who look now and then; each holds everything, so nothing more is needed
_NUM_KEPT = 64


@dataclass(frozen=True, slots=True)
class PinsEntry:
    """All pins, in their place: `before` is the SHA-256 of the payload of the entry before it."""

    number: int
    before: str
    pins: Pins

    @property
    def is_everything(self) -> bool:
        """Return that readers may begin here."""
        return True


class SharedPins:
    """A `PinStore` over a journal. Thread-safe; any number of processes on any number of machines."""

    def __init__(self, journal: ChangeLog) -> None:
        """Read the journal, founding it if it is new; raises StorageFailed."""
        self._journal = journal
        self._lock = threading.Lock()
        self._pins: Pins = ()
        self._place = FollowedJournal(journal, what="the store's pins", read=_read_entry, take=self._take)
        if journal.read(0) is None:
            with journal.lock.held():
                journal.append(0, _write_entry(PinsEntry(0, NOTHING_BEFORE, ())))
        self.read()

    def read(self) -> Pins:
        """Return the pins, oldest first; looks into the journal. Raises StorageFailed."""
        with self._lock:
            self._place.catch_up()
            return self._pins

    def add(self, digest: str) -> None:
        """Keep a pin; raises StorageFailed, StoreFull."""
        self._change(lambda pins: pins if digest in pins else (*pins, digest))

    def discard(self, digests: Collection[str]) -> None:
        """Forget pins, those that there are; raises StorageFailed, StoreFull."""
        self._change(lambda pins: tuple(digest for digest in pins if digest not in digests))

    def _change(self, change: Callable[[Pins], Pins]) -> None:
        with self._lock, self._journal.lock.held():
            while True:
                self._place.catch_up_wholly()
                changed = change(self._pins)
                if changed == self._pins:
                    return
                entry = PinsEntry(self._place.number + 1, self._place.last, changed)
                # somebody else's came first: both count
                if self._journal.append(entry.number, _write_entry(entry)):
                    self._place.catch_up()
                    break
            if self._place.number - self._journal.checkpoint() >= 2 * _NUM_KEPT:
                self._journal.forget_before(self._place.number - _NUM_KEPT)

    def _take(self, entry: PinsEntry) -> None:
        self._pins = entry.pins


def open_pins(root: Path, blobs_url: str | None) -> PinStore:
    """Return the pins of a store, from its folder or the object store; raises InvalidOption, StorageFailed."""
    if blobs_url is None:
        return PinsFile(root)
    shared = SharedPins(open_journal(blobs_url, PINS_JOURNAL))
    if (root / PINS_FILE).is_file():
        for digest in PinsFile(root).read():
            shared.add(digest)
        put_aside(root / PINS_FILE)
    return shared


def _write_entry(entry: PinsEntry) -> bytes:
    return canonical_json({"number": entry.number, "before": entry.before, "pins": [*entry.pins]})


def _read_entry(payload: bytes, number: int) -> PinsEntry:
    try:
        facts = json_object(json.loads(payload))
        if integer(facts.pop("number")) != number:
            raise ValueError("an entry of another place")
        before, pins = text(facts.pop("before")), tuple(text(pin) for pin in json_list(facts.pop("pins")))
        if facts or not all(map(is_digest, pins)):
            raise ValueError("another form")
        return PinsEntry(number, before, pins)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageFailed(
            f"change {number} of the store's pins is of an unknown form; update this server, or restore the entry"
        ) from error
