"""From the store's entries to the kernels' offset table: the same fields, of two rooms that do not know each other."""

from adapter_kernels.image import SiteRows
from adapters_store.store import OpenAdapter


def site_rows(adapter: OpenAdapter) -> tuple[SiteRows, ...]:
    """Return where an open adapter's tensors lie, by layer and site."""
    return tuple(
        SiteRows(
            layer=entry.layer,
            site=entry.site,
            ranks=(entry.rank,) if entry.rank else (),
            a_offset=entry.a_offset,
            bt_offset=entry.bt_offset,
            bias_offset=entry.bias_offset,
        )
        for entry in adapter.entries
    )
