"""Bugs of compositions, virtual tokens and adapters that act from a position on, planted one at a time.

Owns one small wrong replacement per bug; traces of both modes must see each. Invariant: a plant changes one decision
and leaves the rest as it is.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest

from serve.engine import adapter_sets, admission, sequence
from serve.engine.acting import Acting
from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.fairness import WaitingLine
from serve.engine.kv_blocks import hash_activation
from serve.engine.lifecycle import LiveSequences
from serve.engine.plan import Row, SampleSpec
from serve.engine.sequence import Sequence
from serve.messages import Embed, Submit
from tests.engine.planted_bugs import Plant


def _weights_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Acting, "name", property(lambda self: "+".join(self.digests) or None))


def _composition_runs_when_one_adapter_is_ready(patch: pytest.MonkeyPatch) -> None:
    want = adapter_sets.want

    def wrong(tiers: AdapterTiers, digests: SequenceOf[str]) -> Residency:
        state = want(tiers, digests)
        is_any = any(tiers.residency(digest) is Residency.READY for digest in digests)
        return Residency.READY if is_any else state

    patch.setattr(adapter_sets, "want", wrong)


def _composition_pins_its_first_adapter_only(patch: pytest.MonkeyPatch) -> None:
    admit = LiveSequences.admit

    def wrong(self: LiveSequences, seq: Sequence, now_s: float) -> bool:
        is_admitted = admit(self, seq, now_s)
        if is_admitted:
            for digest in seq.acting.digests[1:]:
                self.tiers.unpin(digest)
        return is_admitted

    patch.setattr(LiveSequences, "admit", wrong)


def _composition_unpins_its_first_adapter_only(patch: pytest.MonkeyPatch) -> None:
    give_back = LiveSequences._give_back

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        for digest in seq.acting.digests[1:] if seq.adapter_slots else ():
            self.tiers.pin(digest)
        give_back(self, seq)

    patch.setattr(LiveSequences, "_give_back", wrong)


def _weights_dealt_to_the_wrong_adapters(patch: pytest.MonkeyPatch) -> None:
    next_row = Sequence.next_row

    def wrong(self: Sequence, budget: int) -> Row:
        row = next_row(self, budget)
        slots, weights = [slot for slot, _ in row.composed], [weight for _, weight in row.composed]
        return replace(row, composed=tuple(zip(slots, reversed(weights), strict=True)))

    patch.setattr(Sequence, "next_row", wrong)


def _composition_that_never_fits_waits(patch: pytest.MonkeyPatch) -> None:
    refusal = adapter_sets.refusal
    patch.setattr(adapter_sets, "refusal", lambda tiers, digests: refusal(tiers, digests[:1]))


def _failed_load_ends_single_users_only(patch: pytest.MonkeyPatch) -> None:
    naming = WaitingLine.naming
    patch.setattr(
        WaitingLine, "naming", lambda self, digest: [s for s in naming(self, digest) if len(s.acting.digests) == 1]
    )


def _rows_run_across_their_edges(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "_edges", lambda self: ())
    # the books do not look: the device must
    patch.setattr("serve.engine.lifecycle._keeps_to_edges", lambda seq, row: True)


def _virtual_tokens_counted_in_the_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "num_prompt", property(lambda self: len(self.prompt_ids)))


def _virtual_tokens_missing_from_the_limit(patch: pytest.MonkeyPatch) -> None:
    refusal = admission._length_refusal
    patch.setattr(
        admission,
        "_length_refusal",
        lambda command, limits: refusal(replace(command, num_virtual_tokens=0), limits),
    )


def _virtual_tokens_told_as_cached(patch: pytest.MonkeyPatch) -> None:
    admit = LiveSequences.admit

    def wrong(self: LiveSequences, seq: Sequence, now_s: float) -> bool:
        is_new = not seq.was_admitted
        is_admitted = admit(self, seq, now_s)
        if is_admitted and is_new:
            seq.num_cached_tokens = seq.num_computed
        return is_admitted

    patch.setattr(LiveSequences, "admit", wrong)


def _virtual_tokens_penalised(patch: pytest.MonkeyPatch) -> None:
    build = Sequence.build

    def wrong(command: Submit | Embed, *, arrival_index: int, now_s: float) -> Sequence:
        seq = build(command, arrival_index=arrival_index, now_s=now_s)
        if seq.sample_spec is not None:
            seq.sample_spec = SampleSpec(seq.sample_spec.params, seq.prompt_ids, seq.output_ids)
        return seq

    patch.setattr(Sequence, "build", staticmethod(wrong))


def _activation_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence, "hash_activation", lambda parent, name, active_from: parent)


def _place_of_the_activation_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence, "hash_activation", lambda parent, name, active_from: hash_activation(parent, name, 0))


def _block_of_the_activation_taken_for_the_bases(patch: pytest.MonkeyPatch) -> None:
    prefix_hashes = Sequence.prefix_hashes

    def wrong(self: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
        acting = self.acting
        rounded = -(-acting.active_from // block_size) * block_size
        self.acting = replace(acting, active_from=rounded)
        try:
            return prefix_hashes(self, num_blocks, block_size)
        finally:
            self.acting = acting

    patch.setattr(Sequence, "prefix_hashes", wrong)


def _adapter_acts_from_the_first_position(patch: pytest.MonkeyPatch) -> None:
    next_row = Sequence.next_row

    def wrong(self: Sequence, budget: int) -> Row:
        row = next_row(self, budget)
        if self.acting.weights is None and self.adapter_slots:
            return replace(row, adapter_slot=self.adapter_slots[0])
        return row

    patch.setattr(Sequence, "next_row", wrong)
    patch.setattr("serve.engine.lifecycle._slots_at", lambda seq, position: seq.adapter_slots)


def _late_rows_of_an_adapter_run_as_the_base(patch: pytest.MonkeyPatch) -> None:
    next_row = Sequence.next_row

    def wrong(self: Sequence, budget: int) -> Row:
        row = next_row(self, budget)
        return replace(row, adapter_slot=None) if self.acting.active_from and self.output_ids else row

    patch.setattr(Sequence, "next_row", wrong)
    patch.setattr(
        "serve.engine.lifecycle._slots_at",
        lambda seq, position: (
            ()
            if seq.acting.active_from and (seq.output_ids or position < seq.acting.active_from)
            else seq.adapter_slots
        ),
    )


ACTING_PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _weights_missing_from_the_hash,
        _composition_runs_when_one_adapter_is_ready,
        _composition_pins_its_first_adapter_only,
        _composition_unpins_its_first_adapter_only,
        _weights_dealt_to_the_wrong_adapters,
        _composition_that_never_fits_waits,
        _failed_load_ends_single_users_only,
        _rows_run_across_their_edges,
        _virtual_tokens_counted_in_the_mean,
        _virtual_tokens_missing_from_the_limit,
        _virtual_tokens_told_as_cached,
        _virtual_tokens_penalised,
        _activation_missing_from_the_hash,
        _place_of_the_activation_missing_from_the_hash,
        _block_of_the_activation_taken_for_the_bases,
        _adapter_acts_from_the_first_position,
        _late_rows_of_an_adapter_run_as_the_base,
    )
}
