"""Several adapters that one sequence needs at once, over the tiers that know them one by one.

Owns no state. A sequence runs only when all of its adapters are READY in the same moment and then pins all of them, so
nobody holds one adapter while it waits for another, and two sequences cannot wait for each other. Wishes of a set keep
the set's one place in the line: what it has already is not evicted for what it still needs, nor for a later wish.
"""

from collections.abc import Sequence

from serve.engine.adapter_tiers import AdapterTiers, Residency


def refusal(tiers: AdapterTiers, digests: Sequence[str]) -> str | None:
    """Return the reason why these adapters can never act together here, when one is known."""
    for digest in digests:
        reason = tiers.refusal(digest)
        if reason is not None:
            return reason
    num_pinned = tiers.operator_pins.num_beside(digests)
    if len(digests) > tiers.device.num_slots - num_pinned:
        taken = f", {num_pinned} of them for other adapters that are pinned" if num_pinned else ""
        return (
            f"the composition holds {len(digests)} adapters; this server has adapter slots for "
            f"{tiers.device.num_slots}{taken}"
        )
    num_bytes, num_pinned = sum(map(tiers.known_bytes, digests)), tiers.operator_pins.num_bytes_beside(digests)
    if num_bytes > tiers.device.max_bytes - num_pinned:
        taken = f", {num_pinned} of them for other adapters that are pinned" if num_pinned else ""
        return (
            f"the {len(digests)} adapters of the composition take {num_bytes} bytes in memory; this server holds at "
            f"most {tiers.device.max_bytes}{taken} (--adapter-device-bytes)"
        )
    return None


def residency(tiers: AdapterTiers, digests: Sequence[str]) -> Residency:
    """Tell where a set is, without asking for it: READY when all are, ABSENT when one is nowhere."""
    return _least([tiers.residency(digest) for digest in digests])


def want(tiers: AdapterTiers, digests: Sequence[str]) -> Residency:
    """Ask for all of a set and start the loads for which there is room; see `AdapterTiers.want`."""
    if len(digests) > 1:
        tiers.rank(digests)
    return _least([tiers.want(digest) for digest in digests])


def _least(states: list[Residency]) -> Residency:
    if Residency.ABSENT in states:
        return Residency.ABSENT
    return Residency.LOADING if Residency.LOADING in states else Residency.READY
