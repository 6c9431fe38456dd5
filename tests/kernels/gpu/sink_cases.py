"""What the sinks' tests share: a random bridge over a random batch, and the dense delta that it stands for.

Owns no expectation about a sink itself (that is `reference_sinks`). Invariant: all that a sink must not read is NaN:
columns past a rank, rows without adapter, members that an adapter lacks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.step import SiteAdapters
from adapter_kernels.gpu.tables import DeviceTables
from adapter_kernels.reference import table_site
from tests.kernels.gpu.batches import Batch, route_of

# relative to the largest value; fp16 rounds the bridge, the sum and what follows it
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3}
# rows of the step, popularity, dtype: every ragged size, every popularity, every form of the route
RAGGED_STEPS = [
    (1, "identical", torch.float32),
    (17, "distinct", torch.float16),
    (63, "zipf", torch.float32),
    (133, "skewed", torch.float16),
    (133, "identical", torch.float32),
    (300, "uniform", torch.float32),
]


@dataclass(frozen=True, slots=True)
class SinkCase:
    """The adapters of one fused site as a sink takes them; `delta` is theirs, dense, zero where nothing acts, fp64."""

    adapters: SiteAdapters
    delta: Tensor
    # [T] bool: rows on which no member acts
    is_bare: Tensor


def make_sink_case(
    tables: DeviceTables,
    batch: Batch,
    first_site: int,
    widths: tuple[int, ...],
    *,
    num_splits: int = 1,
    rank_capacity: int = 16,
    block_rows: int | None = None,
    seed: int = 0,
) -> SinkCase:
    """Draw a bridge for the batch and weigh the tables' rank rows with it."""
    generator = torch.Generator().manual_seed(seed)
    bridge = torch.full((num_splits, batch.num_rows, len(widths), rank_capacity), torch.nan)
    delta = torch.zeros(batch.num_rows, sum(widths), dtype=torch.float64)
    is_bare = torch.ones(batch.num_rows, dtype=torch.bool)
    for row, slot in enumerate(batch.slots.tolist()):
        begin = 0
        for member, width in enumerate(widths):
            site = table_site(tables, first_site + member, slot, 0, width) if slot >= 0 else None
            if site is not None:
                planes = torch.randn(num_splits, site.bt.shape[0], generator=generator) / num_splits**0.5
                bridge[:, row, member, : site.bt.shape[0]] = planes
                c = planes.sum(0).to(tables.arena.dtype).double()
                delta[row, begin : begin + width] = c @ site.bt.double()
                if site.bias is not None:
                    delta[row, begin : begin + width] += site.bias.double()
                is_bare[row] = False
            begin += width
    adapters = SiteAdapters(tables, route_of(batch, block_rows), bridge, first_site, num_splits)
    return SinkCase(adapters, delta, is_bare)


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Compare with the tolerance of `out`'s dtype; NaN where a number is expected fails."""
    error = float((out.double() - expected).abs().max())
    assert error <= TOLERANCE[out.dtype] * max(1.0, float(expected.abs().max())), error
