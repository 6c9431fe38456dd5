"""What to try for each kernel and which result to keep: the deciding half of tuning, without torch.

Owns the candidates and the rule of choice. Invariant: a candidate replaces the present tiles only when it is faster by
more than the present ones' own spread; two that differ by less are the same, and then nothing changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from adapter_kernels.gpu.launch_config import LaunchConfig

# values tried per field and op; fields that an op does not use stay at their default
_FIELDS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "shrink": {"block_k": (64, 128, 256, 512), "block_r": (16, 32), "num_warps": (2, 4), "num_stages": (1, 2, 3)},
    "expand": {"block_o": (64, 128, 256), "block_r": (16, 32), "num_warps": (2, 4), "num_stages": (1, 2)},
    "qkv_sink": {"block_r": (16, 32), "num_warps": (1, 2, 4), "num_stages": (1, 2)},
    "swiglu_sink": {"block_o": (64, 128, 256), "block_r": (16, 32), "num_warps": (2, 4), "num_stages": (1, 2)},
    "paged_decode": {"block_k": (32, 64, 128), "num_warps": (2, 4), "num_stages": (1, 2, 3)},
    "paged_prefill": {"block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
}
# of one program beside the base's GEMM: rows of x and of A in 2 bytes, as many stages of them
_SIDE_SHARED_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Sample:
    """What one candidate took: median and the 10th and 90th percentile, in microseconds."""

    config: LaunchConfig | None
    median_us: float
    p10_us: float
    p90_us: float


def candidates(op: str, block_rows: int) -> list[LaunchConfig]:
    """List the tiles worth trying for an op; those that could not run beside the base's GEMM are left out."""
    fields = _FIELDS[op]
    found = [replace(LaunchConfig(), **dict(zip(fields, values, strict=True))) for values in product(*fields.values())]
    return [config for config in found if _fits(op, config, block_rows)]


def choose(present: Sample, tried: list[Sample]) -> LaunchConfig | None:
    """Return the fastest candidate's tiles, or None where the present ones are as good."""
    if not tried:
        return None
    best = min(tried, key=lambda sample: (sample.median_us, sample.p90_us))
    spread_us = max(present.p90_us - present.p10_us, best.p90_us - best.p10_us)
    return best.config if best.median_us < present.median_us - spread_us else None


def _fits(op: str, config: LaunchConfig, block_rows: int) -> bool:
    if op == "shrink" and block_rows > 1:
        return 2 * config.num_stages * config.block_k * (block_rows + config.block_r) <= _SIDE_SHARED_BYTES
    if op == "expand" and block_rows > 1:
        return 2 * config.num_stages * config.block_o * config.block_r <= _SIDE_SHARED_BYTES
    return True
