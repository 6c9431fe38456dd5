"""From the store's entries to the kernels' offset table: the same fields, of two rooms that do not know each other."""

from adapter_kernels.gate_options import GateOptions
from adapter_kernels.image import CsrRows, SiteRows, SparseRows
from adapters_store import gates
from adapters_store.entries import CsrEntry, SiteEntry, SparseEntry
from adapters_store.store import OpenAdapter


def site_rows(adapter: OpenAdapter) -> tuple[SiteRows, ...]:
    """Return where an open adapter's tensors lie, by layer and site."""
    return tuple(_rows(entry) for entry in adapter.entries)


def _rows(entry: SiteEntry) -> SiteRows:
    return SiteRows(
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
        gate_options=_options(entry.gate),
        gate_bias_offset=entry.gate_bias_offset,
        csr=_csr(entry.csr),
        dense_offset=entry.dense_offset,
        blockdiag=entry.blockdiag,
        blockdiag_offset=entry.blockdiag_offset,
        rot2_group=entry.rot2_group,
        c0_offset=entry.c0_offset,
        c1_offset=entry.c1_offset,
    )


def _sparse(entry: SparseEntry | None) -> SparseRows | None:
    return None if entry is None else SparseRows(entry.count, entry.idx_offset, entry.d_offset)


def _csr(entry: CsrEntry | None) -> CsrRows | None:
    if entry is None:
        return None
    return CsrRows(entry.nnz, entry.indptr_offset, entry.col_offset, entry.val_offset, entry.scale_offset)


def _options(gate: gates.GateOptions) -> GateOptions:
    # that all are selected is told by top_k, that there is a bias by its place
    return GateOptions(gate.in_norm, gate.logit, gate.weight, gate.mix, gate.group)
