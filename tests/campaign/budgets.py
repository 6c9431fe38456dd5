"""Which flags give a server room for so many of the campaign's adapters.

Owns the sizes: those of the largest adapter's image. Invariant: neither tier ever holds more adapters than it is given,
and its bytes are what so many of the largest take: small ones leave bytes over, never places.
"""

# data section of a rank 4 adapter on all seven sites of the tiny model, float32
LARGEST_BYTES = 49_152
# a step needs four blocks for each of its longest requests: with fewer than all of them ask for, they wait and preempt
_NUM_KV_BLOCKS = 100


def budget_options(*, num_host: int, num_device: int) -> tuple[str, ...]:
    """Return the options of `chorale serve`."""
    return (
        *("--adapter-device-count", str(num_device), "--adapter-device-bytes", str(num_device * LARGEST_BYTES)),
        *("--adapter-host-count", str(num_host), "--adapter-host-bytes", str(num_host * LARGEST_BYTES)),
        *("--kv-blocks", str(_NUM_KV_BLOCKS)),
    )
