"""Which flags give a server room for so many of the campaign's adapters.

Owns the sizes, measured from the store's own image of the largest adapter. Invariant: sizes differ little enough that
a budget for 16 of the largest holds at least 16 and at most twice as many.
"""

# data section of a rank 4 adapter on all seven sites of the tiny model, float32
LARGEST_BYTES = 49_152
# a step needs four blocks for each of its longest requests: with fewer than all of them ask for, they wait and preempt
_NUM_KV_BLOCKS = 100


def budget_options(*, num_host: int, num_device: int) -> tuple[str, ...]:
    """Return the options of `chorale serve`."""
    return (
        *("--adapter-device-bytes", str(num_device * LARGEST_BYTES)),
        *("--adapter-host-bytes", str(num_host * LARGEST_BYTES)),
        *("--kv-blocks", str(_NUM_KV_BLOCKS)),
    )
