"""Where an adapter is on this replica, in the words of the API: one state and one tier for what a heartbeat said.

Owns the words. Invariant: they come from the last heartbeat; without one, or of an adapter that it does not name, the
adapter is on disk.
"""

from dataclasses import dataclass

from serve.messages import AdapterState, Stats


@dataclass(frozen=True, slots=True)
class Place:
    """`state`: absent, fetching (disk to host), host, loading (to the device), ready or leaving.

    `tier` is the fastest one in which it lies: disk, host or device.
    """

    state: str
    tier: str
    num_device_bytes: int = 0
    num_host_bytes: int = 0
    num_pins: int = 0


ON_DISK = Place("absent", "disk")


def places_of(stats: Stats | None) -> dict[str, Place]:
    """Return the place of every adapter that a heartbeat tells of, by digest."""
    return {} if stats is None else {adapter.digest: place(adapter) for adapter in stats.adapters}


def place(adapter: AdapterState) -> Place:
    """Name where an adapter is that a heartbeat tells of."""
    is_ready = adapter.tier == "device"
    state = "leaving" if adapter.is_leaving else "ready" if is_ready else adapter.tier
    tier = "device" if is_ready else "host" if adapter.num_host_bytes else "disk"
    # of a load under way: what it will take
    num_device_bytes = adapter.num_bytes if is_ready else 0
    return Place(state, tier, num_device_bytes, adapter.num_host_bytes, adapter.num_pins)
