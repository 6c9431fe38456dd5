"""From the store's entries to the kernels' offset table: the same fields, of two rooms that do not know each other."""

from adapter_kernels.image import SiteRows, SparseRows
from adapters_store.store import OpenAdapter, SparseEntry


def site_rows(adapter: OpenAdapter) -> tuple[SiteRows, ...]:
    """Return where an open adapter's tensors lie, by layer and site."""
    return tuple(
        SiteRows(
            layer=entry.layer,
            site=entry.site,
            ranks=entry.ranks,
            a_offset=entry.a_offset,
            bt_offset=entry.bt_offset,
            bias_offset=entry.bias_offset,
            gate_offset=entry.gate_offset,
            top_k=entry.top_k,
            temperature=entry.temperature,
            cols=_sparse(entry.cols),
            rows=_sparse(entry.rows),
            out_scale_offset=entry.out_scale_offset,
            in_scale_offset=entry.in_scale_offset,
        )
        for entry in adapter.entries
    )


def _sparse(entry: SparseEntry | None) -> SparseRows | None:
    return None if entry is None else SparseRows(entry.count, entry.idx_offset, entry.d_offset)
