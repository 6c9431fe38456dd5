"""What shrink and expand are tested on: sites of awkward widths, random bridges, and how far results may be off.

Owns the tolerances of the adapter ops, one table by dtype, and the comparison per row and member.
"""

import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.gpu.tables import DeviceTables

# (out, in); neither is a multiple of a tile, and 100 is not even one of 8: no 16-byte vectors there
SHAPES = {
    "q_proj": (96, 100),
    "k_proj": (40, 100),
    "v_proj": (72, 100),
    "o_proj": (100, 96),
    "gate_proj": (136, 100),
    "up_proj": (136, 100),
    "down_proj": (100, 136),
}
DTYPES = (torch.float32, torch.float16)
# relative error of a row: fp32 differs by the order of sums; fp16 rounds c and the result, 2^-11 each
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3}
# shrink alone rounds nothing: inputs are exact in fp32, sums are fp32
SHRINK_TOLERANCE = 2e-6


def is_close(out: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Tell whether ||out - expected|| is within tolerance * ||expected||; NaN never is.

    Terms are of the order of one, so that a short row that happens to cancel is measured against one.
    """
    scale = max(1.0, float(expected.double().norm()))
    return float((out.double() - expected.double()).norm()) <= tolerance * scale


def nan_like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(shape, torch.nan, dtype=dtype)


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw a layer's input, [T, width]."""
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bridge_of(
    x: Tensor,
    tables: DeviceTables,
    first_site: int,
    num_members: int,
    slots: Tensor,
    *,
    splits: int = 1,
    capacity: int,
) -> Tensor:
    """Make the bridge that a shrink would leave, by the reference: NaN wherever it would not write.

    The planes are random parts of the sum, so that an expand that misses one is wrong.
    """
    bridge = nan_like(splits, x.shape[0], num_members, capacity)
    generator = torch.Generator().manual_seed(splits)
    for token, members in enumerate(reference.table_bridge(x, tables, first_site, num_members, slots)):
        for member, c in enumerate(members):
            rest = c
            for split in range(splits - 1):
                part = torch.randn(c.shape, generator=generator)
                bridge[split, token, member, : c.numel()] = part
                rest = rest - part
            bridge[splits - 1, token, member, : c.numel()] = rest
    return bridge
