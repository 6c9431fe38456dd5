"""The operator's commands on adapters: pin, unpin, evict, and what a pin means for requests that wait.

Owns the answers, not the tiers' decisions. Invariant: each command is answered by exactly one event, and no waiting
sequence waits for room that pins have taken for good: it fails with the reason.
"""

from serve.adapter_messages import AdapterDone, EvictAdapter, OperatorCommand, PinAdapter
from serve.engine import adapter_sets
from serve.engine.lifecycle import LiveSequences
from serve.engine.sequence import Sequence
from serve.messages import Event, Failed


def carry_out(command: OperatorCommand, live: LiveSequences) -> Event:
    """Do what the operator asks and return the answer."""
    request_id, digest, tiers = command.request_id, command.digest, live.tiers
    if isinstance(command, PinAdapter):
        reason = tiers.refusal(digest)
        if reason is not None:
            return Failed(request_id, "adapter_load_failed", reason, 503)
        reason = tiers.operator_pins.add(digest, tiers.known_bytes(digest))
        if reason is not None:
            return Failed(request_id, "conflict", reason, 409)
        tiers.prefetch(digest)
        return AdapterDone(request_id)
    if isinstance(command, EvictAdapter):
        if digest in tiers.operator_pins:
            return Failed(request_id, "adapter_in_use", "the adapter is pinned; unpin it first", 409)
        num_bytes = tiers.evict(digest)
        return AdapterDone(request_id, num_bytes or 0, is_pending=num_bytes is None)
    tiers.operator_pins.discard(digest)
    return AdapterDone(request_id)


class PinnedOut:
    """Finds the waiting sequences that can never run beside what is pinned now."""

    def __init__(self, live: LiveSequences) -> None:
        self._live = live
        self._judged_at = (0, 0)

    def sequences(self) -> list[tuple[Sequence, str]]:
        """Return them with the reason; the line is read only when pins took more, or a sequence came back to it."""
        now = (self._live.tiers.operator_pins.num_takes, self._live.num_preemptions)
        if now[0] == 0 or now == self._judged_at:
            return []
        self._judged_at = now
        found = []
        for seq in self._live.waiting:
            reason = adapter_sets.refusal(self._live.tiers, seq.acting.digests) if seq.acting.digests else None
            if reason is not None:
                found.append((seq, reason))
        return found
