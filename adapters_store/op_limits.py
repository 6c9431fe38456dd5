"""The limits of the ops at a linear layer: how much of it an adapter may change, and in which units.

Owns the numbers and the refusals; the gates' are in `gates.py`. Invariant: a module that `check_module` lets pass can
be served as it is, and costs no more than a limit says.
"""

from collections.abc import Iterable

from adapters_store.base import BaseDims
from adapters_store.errors import CorruptUpload, LimitExceeded, UnsupportedAdapter
from adapters_store.float_bits import FILE_DTYPES, ITEM_BYTES
from adapters_store.gates import check_experts
from adapters_store.ops import Module

# a selection beyond this share of a dimension is a dense change in disguise
MAX_SELECTED_SHARE = 0.25
# beyond, indices and values weigh more than the dense matrix in 16 bits would
MAX_DENSITY = 0.10
# a block meets as many inputs as a rank row meets outputs: four bytes times its size per input
MAX_BLOCK = 1024


def check_module(module: Module, base: BaseDims) -> None:
    """Hold one module to the limits of its ops.

    Raises:
        CorruptUpload: nothing real has this form. LimitExceeded: too many experts, ranks, selected channels or
        values. InvalidGate: what a mixture's gate says. UnsupportedAdapter: an op that the output head does not have.
        Each `param` is the module's path.
    """
    if not module.is_head and not 0 <= module.layer < base.num_hidden_layers:
        raise CorruptUpload(f"{module.path} lies beyond the base's {base.num_hidden_layers} layers", param=module.path)
    nnz = 1 if module.csr is None else module.csr.nnz
    sizes = (module.rank, module.cols, module.rows, module.blockdiag, module.rot2_group, nnz - 1, *module.ranks)
    if not module.ops() or min(sizes) < 0:
        raise CorruptUpload(f"{module.path} holds no op, or one of negative size", param=module.path)
    check_experts(module.experts, module.path)
    num_out, num_in = base.site_shape(module.site)
    for op, count, dim in (("cols", module.cols, num_in), ("rows", module.rows, num_out)):
        check_selected(count, dim, f"{module.path} {op}", param=module.path)
    if module.csr is not None:
        check_density(module.csr.nnz, num_out * num_in, module.path)
    _check_blocks(module, num_in)
    _check_pairs(module, num_out)
    if module.is_head and module != Module(module.layer, module.site_index, module.rank, module.has_bias):
        raise UnsupportedAdapter(
            f"{module.path} holds more than low rank and bias, all that is served there: replace rows of it, or train "
            "the decoder's linear layers",
            param=module.path,
        )


def check_selected(count: int, dim: int, what: str, *, param: str) -> None:
    """Raise LimitExceeded when more of a dimension is selected than a sparse op may."""
    most = int(dim * MAX_SELECTED_SHARE)
    if count > most:
        raise LimitExceeded(
            f"{what} selects {count} of {dim}; the limit is {most} (a quarter): this is a dense change", param=param
        )


def check_density(nnz: int, num_weights: int, what: str) -> None:
    """Raise LimitExceeded when a sparse matrix changes more weights than it may."""
    most = int(num_weights * MAX_DENSITY)
    if nnz > most:
        raise LimitExceeded(
            f"{what} changes {nnz} of {num_weights} weights one by one; the limit is {most} (10 %): this is a dense "
            "change",
            param=what,
        )


def check_dense_bytes(modules: Iterable[Module], base: BaseDims, dtype: str, budget_bytes: int) -> None:
    """Hold the dense changes of an adapter in `dtype` to the operator's budget; raises LimitExceeded."""
    num_bytes = 0
    for module in modules:
        if module.has_dense:
            num_out, num_in = base.site_shape(module.site)
            num_bytes += num_out * num_in * ITEM_BYTES[FILE_DTYPES[dtype]]
    if num_bytes > budget_bytes:
        raise LimitExceeded(
            f"the adapter changes whole matrices, {num_bytes} bytes of them; this server accepts {budget_bytes} "
            "(--dense-budget-bytes)",
            param="dense",
        )


def _check_blocks(module: Module, num_in: int) -> None:
    size = module.blockdiag
    if size and (size < 2 or num_in % size):
        raise CorruptUpload(
            f"{module.path} has blocks of {size} inputs, which do not fill its {num_in} inputs", param=module.path
        )
    if size > MAX_BLOCK:
        raise LimitExceeded(f"{module.path} has blocks of {size} inputs; the limit is {MAX_BLOCK}", param=module.path)


def _check_pairs(module: Module, num_out: int) -> None:
    group = module.rot2_group
    if group and (group % 2 or num_out % group):
        raise CorruptUpload(
            f"{module.path} turns pairs in groups of {group}, which do not fill its {num_out} outputs with pairs",
            param=module.path,
        )
