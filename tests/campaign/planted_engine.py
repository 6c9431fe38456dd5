"""The engine process with one bug: `python -m tests.campaign.planted_engine --socket PATH`; the environment names it.

Owns the plants of the engine's side. Invariant: a plant changes one decision and leaves the rest as it is.
"""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from serve.engine import sequence
from serve.engine.adapter_arena import AdapterArena
from serve.engine.adapter_moves import AdapterMoves
from serve.engine.kv_blocks import KvBlocks, hash_seed
from serve.engine.lifecycle import LiveSequences
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence
from serve.engine.worker import main
from serve.messages import Event
from tests.campaign.planting import chosen_plant, put


def _digest_missing_from_the_kv_key() -> None:
    put(sequence, "hash_seed", lambda digest, salt: hash_seed(None, salt))


def _pin_released_early() -> None:
    admit, give_back = LiveSequences.admit, LiveSequences._give_back

    def admit_wrong(self: LiveSequences, seq: Sequence, now_s: float) -> bool:
        is_admitted = admit(self, seq, now_s)
        if is_admitted:
            for digest in seq.acting.digests:
                self.tiers.unpin(digest)
        return is_admitted

    def give_back_wrong(self: LiveSequences, seq: Sequence) -> None:
        seq.adapter_slots = ()
        give_back(self, seq)

    put(LiveSequences, "admit", admit_wrong)
    put(LiveSequences, "_give_back", give_back_wrong)


def _extent_freed_twice() -> None:
    give_back = AdapterArena._give_back

    def wrong(self: AdapterArena, placement: object) -> None:
        give_back(self, placement)  # type: ignore[arg-type]
        free = self._slabs.get(placement.slab.profile)  # type: ignore[attr-defined]
        if free:
            free.append(free[-1])

    put(AdapterArena, "_give_back", wrong)


def _abort_keeps_the_pin() -> None:
    abort = Scheduler.abort

    def wrong(self: Scheduler, request_id: str) -> list[Event]:
        seq = self.live.by_id.get(request_id)
        if seq is not None:
            seq.adapter_slots = ()
        return abort(self, request_id)

    put(Scheduler, "abort", wrong)


def _abort_keeps_the_blocks() -> None:
    abort = Scheduler.abort

    def wrong(self: Scheduler, request_id: str) -> list[Event]:
        seq = self.live.by_id.get(request_id)
        if seq is not None:
            self.live.kv.acquire(seq.block_table, len(seq.block_table))
        return abort(self, request_id)

    put(Scheduler, "abort", wrong)


def _bytes_not_given_back() -> None:
    went = AdapterMoves.went
    put(AdapterMoves, "went", lambda self, digest, cause, num_bytes: went(self, digest, cause, 0))


def _block_freed_twice() -> None:
    release = KvBlocks.release

    def wrong(self: KvBlocks, table: list[int]) -> None:
        first = table[:1]
        release(self, table)
        self._free += [block_id for block_id in first if self._num_refs[block_id] == 0]

    put(KvBlocks, "release", wrong)


ENGINE_PLANTS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {
        "digest missing from the KV key": _digest_missing_from_the_kv_key,
        "pin released early": _pin_released_early,
        "extent freed twice": _extent_freed_twice,
        "abort keeps the pin": _abort_keeps_the_pin,
        "abort keeps the blocks": _abort_keeps_the_blocks,
        "bytes not given back": _bytes_not_given_back,
        "block freed twice": _block_freed_twice,
    }
)

if __name__ == "__main__":
    ENGINE_PLANTS.get(chosen_plant(), lambda: None)()
    raise SystemExit(main(sys.argv[1:]))
