"""Bugs planted into the operator's pins and evictions, one at a time, for the trace checker to see.

Owns one small wrong replacement per bug. Invariant: as in `planted_bugs`.
"""

from collections.abc import Callable

import pytest

from serve.adapter_messages import AdapterDone, EvictAdapter, OperatorCommand
from serve.engine import engine
from serve.engine.adapter_tiers import AdapterTiers
from serve.engine.lifecycle import LiveSequences
from serve.engine.operator_hands import carry_out
from serve.engine.operator_pins import OperatorPins
from serve.messages import Event

Plant = Callable[[pytest.MonkeyPatch], None]


def _operator_pin_lost_on_the_way(patch: pytest.MonkeyPatch) -> None:
    # no walk asks for it again when its first load found no room
    patch.setattr(AdapterTiers, "begin_walk", _walk_without_pins)


def _walk_without_pins(self: AdapterTiers) -> None:
    self._order.begin_walk()
    self._has_room = True
    if self.host is not None:
        self.host.begin_walk()


def _operator_pin_lost_with_its_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OperatorPins, "weigh", lambda self, digest, num_bytes: self.discard(digest))


def _evicted_though_the_operator_pinned_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OperatorPins, "holds", lambda self, digest: False)


def _evicted_by_command_though_pinned(patch: pytest.MonkeyPatch) -> None:
    def wrong(command: OperatorCommand, live: LiveSequences) -> Event:
        if isinstance(command, EvictAdapter):
            return AdapterDone(command.request_id, live.tiers.evict(command.digest) or 0)
        return carry_out(command, live)

    patch.setattr(engine, "carry_out", wrong)


def _bytes_freed_twice(patch: pytest.MonkeyPatch) -> None:
    evict = AdapterTiers.evict

    def wrong(self: AdapterTiers, digest: str) -> int | None:
        num_bytes = evict(self, digest)
        if num_bytes:
            self.device.moves.went(digest, "operator", num_bytes)
        return num_bytes

    patch.setattr(AdapterTiers, "evict", wrong)


def _eviction_does_not_wait_for_running_sequences(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: AdapterTiers, digest: str) -> None:
        if digest in self._leaving and self.device.residents[digest].is_ready:
            self.device.residents[digest].num_pins = 0
            self._drop(digest, "operator")

    patch.setattr(AdapterTiers, "_drop_leaving", wrong)


def _eviction_forgotten_while_it_waits(patch: pytest.MonkeyPatch) -> None:
    unpin = AdapterTiers.unpin

    def wrong(self: AdapterTiers, digest: str) -> None:
        waits, self._leaving = self._leaving, set()
        unpin(self, digest)
        self._leaving = waits

    patch.setattr(AdapterTiers, "unpin", wrong)


def _pins_take_every_slot(patch: pytest.MonkeyPatch) -> None:
    build = OperatorPins.__init__

    def wrong(self: OperatorPins, num_slots: int, max_bytes: int) -> None:
        build(self, num_slots, max_bytes)
        self._max_pins = num_slots

    patch.setattr(OperatorPins, "__init__", wrong)


OPERATOR_PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _operator_pin_lost_on_the_way,
        _operator_pin_lost_with_its_size,
        _evicted_though_the_operator_pinned_it,
        _evicted_by_command_though_pinned,
        _bytes_freed_twice,
        _eviction_does_not_wait_for_running_sequences,
        _eviction_forgotten_while_it_waits,
        _pins_take_every_slot,
    )
}
