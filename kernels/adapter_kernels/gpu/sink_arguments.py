"""What every sink's kernel is launched with for the adapters' part, in the order of its parameters.

Invariant: without adapters every pointer is None and every number 0, so no adapter code is compiled and nothing of it
is specialised.
"""

from torch import Tensor

from adapter_kernels.gpu.step import SiteAdapters

_NUM_POINTERS, _NUM_NUMBERS = 11, 6


def adapter_arguments(adapters: SiteAdapters | None) -> tuple[Tensor | int | None, ...]:
    """Return block_slot, block_start, block_len, perm, arena, ints, floats, x, base_bias, table, bridge; then
    plane_stride, row_stride, rank_capacity, num_slots, first_site, in_dim.
    """
    if adapters is None:
        return (None,) * _NUM_POINTERS + (0,) * _NUM_NUMBERS
    tables, route, bridge, families = adapters.tables, adapters.route, adapters.bridge, adapters.families
    return (
        route.block_slot,
        route.block_start,
        route.block_len,
        route.perm,
        tables.arena,
        None if families is None else tables.ints,
        None if families is None else tables.floats,
        None if families is None else families.x,
        None if families is None else families.base_bias,
        tables.rows,
        bridge,
        bridge.stride(0),
        bridge.stride(1),
        bridge.stride(2),
        tables.num_slots,
        adapters.first_site,
        0 if families is None else families.x.shape[1],
    )
