"""One weight of the base with what an adapter does to it at every token, in float32.

Owns the formulas, those of `kernels/adapter_kernels/reference.py` written as one matrix: y = W' x with the scales and
turns in W', and every additive op summed into it. Invariant: the order is that of the canonical format, so a served row
and a row of the merged model differ only by rounding.
"""

import numpy as np

from adapters_store.export.canonical_reader import CanonicalReader
from adapters_store.float_bits import Float32
from adapters_store.model_ops import TokenRows
from adapters_store.ops import Csr, Module


def merge_module(adapter: CanonicalReader, module: Module, weight: Float32) -> Float32:
    """Return the weight [out, in] of one linear layer with everything but the bias; `weight` is changed in place."""
    _turn_inputs(adapter, module, weight)
    if module.has_out_scale:
        weight *= adapter.values(module.tensor("out_scale"))[:, None]
    if module.rot2_group:
        weight[...] = _turned(adapter, module, weight)
    if module.rank:
        weight += adapter.values(module.tensor("BT")).T @ adapter.values(module.tensor("A"))
    if module.cols:
        weight[:, adapter.positions(module.tensor("cols.idx"))] += adapter.values(module.tensor("cols.D")).T
    if module.rows:
        weight[adapter.positions(module.tensor("rows.idx"))] += adapter.values(module.tensor("rows.D"))
    if module.csr is not None:
        _add_sparse(adapter, module, module.csr, weight)
    if module.has_dense:
        weight += adapter.values(module.tensor("dense"))
    return weight


def replace_rows(adapter: CanonicalReader, rows: TokenRows, table: Float32) -> Float32:
    """Return the embedding or head [vocab, hidden] with the adapter's rows."""
    table[adapter.positions(rows.tensor("idx"))] = adapter.values(rows.tensor("E"))
    return table


def _turn_inputs(adapter: CanonicalReader, module: Module, weight: Float32) -> None:
    """x' = (x * in_scale) R per block, so W' = (W R^T) * in_scale."""
    if size := module.blockdiag:
        blocks = adapter.values(module.tensor("in_blockdiag"))
        for index, block in enumerate(blocks):
            columns = slice(index * size, (index + 1) * size)
            weight[:, columns] = weight[:, columns] @ block.T
    if module.has_in_scale:
        weight *= adapter.values(module.tensor("in_scale"))


def _turned(adapter: CanonicalReader, module: Module, weight: Float32) -> Float32:
    """u' = c0 * u + c1 * partner(u), each group of outputs being two halves: (-second, first)."""
    c0, c1 = (adapter.values(module.tensor(f"rot2.{part}"))[:, None] for part in ("c0", "c1"))
    halves = weight.reshape(-1, 2, module.rot2_group // 2, weight.shape[1])
    partner = np.stack((-halves[:, 1], halves[:, 0]), axis=1).reshape(weight.shape)
    turned: Float32 = weight * c0 + partner * c1
    return turned


def _add_sparse(adapter: CanonicalReader, module: Module, csr: Csr, weight: Float32) -> None:
    indptr = adapter.positions(module.tensor("csr.indptr"))
    columns = adapter.positions(module.tensor("csr.col"))
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    if csr.is_ternary:
        packed = np.frombuffer(adapter.raw(module.tensor("csr.sign")), dtype=np.uint8)
        signs = 1 - 2 * np.unpackbits(packed, count=csr.nnz, bitorder="little").astype(np.float32)
        values: Float32 = signs * adapter.values(module.tensor("csr.scale"))
    else:
        values = adapter.values(module.tensor("csr.val"))
    weight[rows, columns] += values
