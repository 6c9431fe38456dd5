"""Bugs planted into the pure state machines, one at a time, to prove that the random walks see them.

Owns one small wrong replacement per bug, and the walk that must see it. Invariant: as in `planted_bugs`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from serve.engine.adapter_tiers import AdapterTiers
from serve.engine.device_tier import DeviceTier
from serve.engine.extents import Extents
from serve.engine.fairness import WaitingLine
from serve.engine.host_tier import HostTier
from serve.engine.kv_blocks import KvBlocks
from serve.engine.plan import FetchResult
from serve.engine.resident import Resident
from serve.engine.virtual_tokens import Level
from serve.tenants.gcra import Bucket


@dataclass(frozen=True, slots=True)
class StatePlant:
    """One bug, and the name of the walk that meets it."""

    walk: str
    plant: Callable[[pytest.MonkeyPatch], None]


def _pin_released_early(patch: pytest.MonkeyPatch) -> None:
    unpin = DeviceTier.unpin

    def wrong(self: DeviceTier, digest: str) -> None:
        unpin(self, digest)
        self.residents[digest].num_pins = 0

    patch.setattr(DeviceTier, "unpin", wrong)


def _device_bytes_not_given_back(patch: pytest.MonkeyPatch) -> None:
    # the operator's evictions take the slot and forget the bytes
    def wrong(self: AdapterTiers, digest: str, cause: str) -> None:
        self._leaving.discard(digest)
        resident = self.device.remove(digest)
        if cause != "operator":
            self.device.moves.went(digest, cause, resident.num_bytes)
        self.device._loader.drop(digest, resident.slot)

    patch.setattr(AdapterTiers, "_drop", wrong)


def _slot_lost_when_a_load_fails(patch: pytest.MonkeyPatch) -> None:
    remove = DeviceTier.remove

    def wrong(self: DeviceTier, digest: str) -> Resident:
        was_ready = self.residents[digest].is_ready
        resident = remove(self, digest)
        if not was_ready:
            self._free_slots.remove(resident.slot)
        return resident

    patch.setattr(DeviceTier, "remove", wrong)


def _image_dropped_under_a_load(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostTier, "hold", lambda self, digest: None)
    patch.setattr(HostTier, "let_go", lambda self, digest: None)


def _image_kept_when_its_adapter_is_deleted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostTier, "_drop_leaving", lambda self, digest, image: None)


def _image_forgotten_and_not_freed(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: HostTier, digest: str, cause: str) -> int:
        num_bytes = self._remove(digest).num_bytes
        self.moves.went(digest, cause, num_bytes)
        return num_bytes

    patch.setattr(HostTier, "_drop", wrong)


def _host_bytes_not_counted(patch: pytest.MonkeyPatch) -> None:
    finish = HostTier.finish_fetch

    def wrong(self: HostTier, result: FetchResult, is_settled: Callable[[str], bool]) -> str | None:
        error = finish(self, result, is_settled)
        image = self._images.get(result.digest)
        if image is not None:
            image.num_bytes = 0
        return error

    patch.setattr(HostTier, "finish_fetch", wrong)


def _one_image_fetched_twice(patch: pytest.MonkeyPatch) -> None:
    want = AdapterTiers.want

    def wrong(self: AdapterTiers, digest: str) -> object:
        state = want(self, digest)
        if self.host is not None and self.host.is_fetching and self.host.get(digest) is not None:
            self.host._fetcher.start_fetch(digest)
        return state

    patch.setattr(AdapterTiers, "want", wrong)


def _unload_forgets_a_load_under_way(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: AdapterTiers, digest: str) -> None:
        resident = self.device.residents.get(digest)
        if digest in self._unwanted and digest not in self._num_users:
            self._unwanted.discard(digest)
            if resident is not None and resident.is_ready:
                self._drop(digest, "unload")

    patch.setattr(AdapterTiers, "_drop_unwanted", wrong)


def _eviction_takes_a_pinned_adapter(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: AdapterTiers, digest: str) -> None:
        resident = self.device.residents.get(digest)
        if digest in self._leaving and resident is not None and resident.is_ready:
            resident.num_pins = 0
            self._drop(digest, "operator")

    patch.setattr(AdapterTiers, "_drop_leaving", wrong)


def _room_is_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceTier, "_make_room", lambda self, digest, needed: bool(self._free_slots))


def _block_freed_twice(patch: pytest.MonkeyPatch) -> None:
    release = KvBlocks.release

    def wrong(self: KvBlocks, table: list[int]) -> None:
        first = table[:1]
        release(self, table)
        self._free += [block_id for block_id in first if self._num_refs[block_id] == 0]

    patch.setattr(KvBlocks, "release", wrong)


def _shared_block_not_held(patch: pytest.MonkeyPatch) -> None:
    acquire = KvBlocks.acquire

    def wrong(self: KvBlocks, shared: list[int], num_blocks: int) -> list[int] | None:
        table = acquire(self, shared, num_blocks)
        for block_id in shared if table is not None else ():
            self._num_refs[block_id] -= self._num_refs[block_id] > 1
        return table

    patch.setattr(KvBlocks, "acquire", wrong)


def _overwritten_block_still_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvBlocks, "_forget", lambda self, block_id: None)


def _refused_table_keeps_its_blocks(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: KvBlocks, table: list[int], num_blocks: int) -> bool:
        while len(table) < num_blocks:
            if not self.num_available:
                return False
            table.append(self._take())
        return True

    patch.setattr(KvBlocks, "extend", wrong)


def _extent_freed_twice(patch: pytest.MonkeyPatch) -> None:
    release = Extents.release

    def wrong(self: Extents, begin: int) -> None:
        num_bytes = self._lengths[begin]
        release(self, begin)
        self._add_hole(begin, begin + num_bytes)

    patch.setattr(Extents, "release", wrong)


def _moved_extent_loses_its_old_place(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Extents) -> None:
        assert self._move is not None
        move, self._move = self._move, None
        self._lengths[move.target] = move.num_bytes

    patch.setattr(Extents, "close_move", wrong)


def _fixed_extent_moves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Extents, "_is_fixed", lambda self, begin, end, fixed: False)


def _rate_forgets_what_was_taken_at_once(patch: pytest.MonkeyPatch) -> None:
    take = Bucket.take

    def wrong(self: Bucket, cost: int, now_us: int) -> int:
        before = self._used_until
        wait_us = take(self, cost, now_us)
        if cost == 1:
            self._used_until = before
        return wait_us

    patch.setattr(Bucket, "take", wrong)


def _refusal_is_charged(patch: pytest.MonkeyPatch) -> None:
    take = Bucket.take

    def wrong(self: Bucket, cost: int, now_us: int) -> int:
        wait_us = take(self, cost, now_us)
        if wait_us:
            self._used_until += 1
        return wait_us

    patch.setattr(Bucket, "take", wrong)


def _newcomer_starts_with_credit(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Level[str], key: str) -> None:
        self._num_waiting[key] += 1

    patch.setattr(Level, "join", wrong)


def _leaver_still_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Level, "leave", lambda self, key: None)


def _served_tenants_keep_the_turn(patch: pytest.MonkeyPatch) -> None:
    turn = WaitingLine._tenant_turn

    def wrong(self: WaitingLine, heap: list[object]) -> object:
        return turn(self, heap)._replace(num_served=0.0)  # type: ignore[arg-type]

    patch.setattr(WaitingLine, "_tenant_turn", wrong)


def _named(walk: str, *plants: Callable[[pytest.MonkeyPatch], None]) -> dict[str, StatePlant]:
    return {plant.__name__.strip("_"): StatePlant(walk, plant) for plant in plants}


STATE_PLANTS: dict[str, StatePlant] = {
    **_named(
        "tiers",
        _pin_released_early,
        _device_bytes_not_given_back,
        _slot_lost_when_a_load_fails,
        _image_dropped_under_a_load,
        _image_kept_when_its_adapter_is_deleted,
        _image_forgotten_and_not_freed,
        _host_bytes_not_counted,
        _one_image_fetched_twice,
        _unload_forgets_a_load_under_way,
        _eviction_takes_a_pinned_adapter,
        _room_is_not_asked_for,
    ),
    **_named(
        "kv blocks",
        _block_freed_twice,
        _shared_block_not_held,
        _overwritten_block_still_found,
        _refused_table_keeps_its_blocks,
    ),
    **_named("extents", _extent_freed_twice, _moved_extent_loses_its_old_place, _fixed_extent_moves),
    **_named("rates", _rate_forgets_what_was_taken_at_once, _refusal_is_charged),
    **_named("waiting line", _newcomer_starts_with_credit, _leaver_still_counted, _served_tenants_keep_the_turn),
}
