"""What the heartbeat says of each adapter: one state per digest over both tiers of memory.

Owns the description only. Invariant: every adapter in memory, or under way to it, is named once, by the fastest tier
that it has reached or is being loaded to.
"""

from collections.abc import Set as AbstractSet

from serve.engine.device_tier import DeviceTier
from serve.engine.host_tier import HostTier
from serve.messages import AdapterState


def describe(device: DeviceTier, host: HostTier | None, leaving: AbstractSet[str]) -> list[AdapterState]:
    """Return the state of each adapter; `leaving` are those that the operator evicted and running sequences hold."""
    images = {} if host is None else dict(host.images())
    states = []
    for digest, resident in device.residents.items():
        image = images.pop(digest, None)
        states.append(
            AdapterState(
                digest,
                tier="device" if resident.is_ready else "loading",
                num_pins=resident.num_pins,
                num_bytes=resident.num_bytes,
                rank=resident.rank,
                is_leaving=digest in leaving,
                num_host_bytes=0 if image is None else image.num_bytes,
            )
        )
    for digest, image in images.items():
        states.append(
            AdapterState(
                digest,
                tier="host" if image.is_here else "fetching",
                num_pins=0,
                num_bytes=0,
                rank=image.rank,
                is_leaving=image.leaves_for is not None,
                num_host_bytes=image.num_bytes if image.is_here else 0,
            )
        )
    return states
