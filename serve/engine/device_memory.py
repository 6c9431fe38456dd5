"""How a device's memory is shared out: weights and activations are there, KV cache and adapter arena get the rest.

Owns the arithmetic and its refusals; measures nothing and allocates nothing. Invariant: what is given away together
with what is taken already stays within `--gpu-memory-utilization` of the device.
"""

from dataclasses import dataclass

from serve.errors import StartError

# of what is left: what adapters get unasked, and the most they may ask for, unless the KV cache cannot use the rest
_DEFAULT_ARENA_SHARE = 0.25
_MAX_ARENA_SHARE = 0.5
# extents are multiples of this
_ARENA_ALIGNMENT = 128
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device: all of them, those in use once the model is loaded, and what a step takes besides."""

    total_bytes: int
    used_bytes: int
    step_bytes: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator and the model ask for. `num_kv_blocks` None: as many as fit and are of use."""

    num_kv_blocks: int | None
    # every sequence at full length
    max_useful_blocks: int
    block_bytes: int
    # None: a share of what is left
    adapter_bytes: int | None


@dataclass(frozen=True, slots=True)
class Shares:
    """What was decided."""

    num_kv_blocks: int
    arena_bytes: int


def usable_bytes(memory: DeviceMemory, utilization: float) -> int:
    """Return what KV cache and adapters may take together.

    Raises:
        StartError: nothing is left.
    """
    usable = int(memory.total_bytes * utilization) - memory.used_bytes - memory.step_bytes
    if usable <= 0:
        raise StartError(
            "no GPU memory is left for KV cache and adapters: "
            f"{memory.used_bytes // _MIB} MiB are in use with the model loaded and a step takes "
            f"{memory.step_bytes // _MIB} MiB, of {memory.total_bytes // _MIB} MiB x --gpu-memory-utilization "
            f"{utilization:g}; raise it, lower --max-step-tokens or --max-num-seqs, or serve a smaller model"
        )
    return usable


def share_out(usable: int, wishes: Wishes) -> Shares:
    """Divide usable bytes between KV cache and adapter arena.

    Raises:
        StartError: the KV blocks asked for, or a single one, do not fit.
    """
    if wishes.num_kv_blocks is not None:
        return _around_fixed_cache(usable, wishes, wishes.num_kv_blocks)
    wished = _wished(usable, wishes)
    unused_by_cache = usable - wishes.max_useful_blocks * wishes.block_bytes
    arena = min(wished, max(int(usable * _MAX_ARENA_SHARE), unused_by_cache))
    num_blocks = min((usable - arena) // wishes.block_bytes, wishes.max_useful_blocks)
    if num_blocks < 1:
        raise StartError(
            f"no memory for one KV block of {wishes.block_bytes} bytes: {usable} bytes are free, {arena} of them for "
            "adapters; lower --adapter-device-bytes, raise --gpu-memory-utilization, or serve a smaller model"
        )
    return Shares(num_blocks, _aligned(arena))


def _around_fixed_cache(usable: int, wishes: Wishes, num_blocks: int) -> Shares:
    if num_blocks < 1:
        raise StartError(f"--kv-blocks {num_blocks}: at least 1 is needed")
    cache_bytes = num_blocks * wishes.block_bytes
    if cache_bytes > usable:
        raise StartError(
            f"--kv-blocks {num_blocks} take {cache_bytes // _MIB} MiB and {usable // _MIB} MiB are free, enough for "
            f"{usable // wishes.block_bytes} blocks; lower it or raise --gpu-memory-utilization"
        )
    return Shares(num_blocks, _aligned(min(_wished(usable, wishes), usable - cache_bytes)))


def _wished(usable: int, wishes: Wishes) -> int:
    return int(usable * _DEFAULT_ARENA_SHARE) if wishes.adapter_bytes is None else wishes.adapter_bytes


def _aligned(num_bytes: int) -> int:
    # never empty: the tables need an arena to point into
    return max(num_bytes // _ARENA_ALIGNMENT, 1) * _ARENA_ALIGNMENT
