"""The base's embeddings by token: from the plain table, or out of the packed one that a tied head multiplies by.

Owns the choice between them. A tied head in oneDNN's blocked order holds every element of the table, so the plain one
need not stay beside it: 260 MiB of a 0.5 B base. Invariant: a lookup has the bits of the plain table. Where the packed
elements lie is learnt from a small packed table and then compared with every row of the true one; where that fails, the
plain table stays.
"""

import ctypes
import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from serve.model.layers import PackedLinear

logger = logging.getLogger(__name__)

# a multiple of the row blocks that oneDNN chooses from, 64, 48, 32 and 16; the table's remainder is probed too
_PROBED_ROWS = 768
# torch's own, without a promise that the next version has them
_NEEDED_OPS = ("data_ptr", "_nbytes")


class TokenTable(Protocol):
    """x [T, D] = table[token_ids], fresh; ids [T] int64 within 0 .. V - 1, anything else is an IndexError."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, token_ids: Tensor) -> Tensor: ...


class PlainTable:
    """The table [V, D] as the checkpoint has it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.dtype = weight.dtype
        self.device = weight.device

    def __call__(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._weight)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Where pairs of neighbouring 16-bit elements of a row lie, in pairs from the first byte.

    Pair i of row v: `v // num_rows * block_stride + v % num_rows * row_stride + i * pair_stride`.
    """

    num_rows: int
    block_stride: int
    row_stride: int
    pair_stride: int


class PackedTable:
    """The rows of a packed weight; `find` makes one.

    Elements of a row lie 256 bytes apart: 32 rows of 896 take 0.16 ms instead of 0.02, 512 rows 2.5 to 6.5 ms, of steps
    of 280 and 1000 ms (AVX-512, one thread, 2026-11).
    """

    def __init__(self, packed: Tensor, pairs: Tensor, blocks: _Blocks, shape: torch.Size, dtype: torch.dtype) -> None:
        # what `pairs` looks at
        self._packed = packed
        self._pairs = pairs
        tokens = torch.arange(shape[0])
        self._row_begins = (
            tokens // blocks.num_rows * blocks.block_stride + tokens % blocks.num_rows * blocks.row_stride
        )
        self._columns = torch.arange(shape[1] // 2) * blocks.pair_stride
        self.dtype = dtype
        self.device = torch.device("cpu")

    @classmethod
    def find(cls, packed: Tensor, weight: Tensor) -> "PackedTable | None":
        """Look up in `packed`, which oneDNN made of `weight` [V, D] bf16; None where not every row is found in it."""
        if weight.shape[1] % 2 or not all(hasattr(torch.ops.mkldnn, name) for name in _NEEDED_OPS):
            return None
        pairs = _memory(packed).view(torch.int32)
        blocks = _probe(weight)
        if blocks is None or not _holds(pairs, blocks, weight):
            return None
        return cls(packed, pairs, blocks, weight.shape, weight.dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        # a negative id is refused here, as the plain table does
        places = self._row_begins.index_select(0, token_ids)[:, None] + self._columns
        return self._pairs.index_select(0, places.view(-1)).view(places.shape).view(self.dtype)


def tie(weight: Tensor) -> tuple[TokenTable, PackedLinear]:
    """Make lookup and packed product of one table [V, D] bf16; the caller drops `weight`."""
    head = PackedLinear(weight, None)
    rows = PackedTable.find(head.packed, weight)
    if rows is not None:
        return rows, head
    logger.warning(
        "the token table stays in memory beside the head's packed copy, %d MiB: this build of torch lays packed rows "
        "out in a way that lookups do not know",
        weight.nbytes >> 20,
    )
    return PlainTable(weight), head


def _memory(packed: Tensor) -> Tensor:
    """Return the bytes of a packed weight as int16 elements; they live as long as `packed`."""
    num_bytes: int = torch.ops.mkldnn._nbytes(packed)
    memory = (ctypes.c_char * num_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.int16)


def _probe(weight: Tensor) -> _Blocks | None:
    """Pack a table as wide as `weight` whose first row and column are numbered, and see where the numbers went."""
    num_tokens, width = weight.shape
    num_rows = min(num_tokens, _PROBED_ROWS + num_tokens % _PROBED_ROWS)
    columns = _places(num_rows, width, slice(0, 1), width)
    rows = _places(num_rows, width, (slice(None), slice(0, 1)), num_rows)
    if columns is None or rows is None or num_rows < 2:
        return None
    row_stride = rows[1] - rows[0]
    block = next((v for v in range(num_rows) if rows[v] != rows[0] + v * row_stride), num_rows)
    block_stride = rows[block] - rows[0] if block < num_rows else block * row_stride
    pair_stride = columns[2] - columns[0] if width > 2 else 2
    strides = (block_stride, row_stride, pair_stride)
    if rows[0] != 0 or any(stride % 2 or stride < 2 for stride in strides):
        return None
    return _Blocks(block, *(stride // 2 for stride in strides))


def _places(num_rows: int, width: int, marked: slice | tuple[slice, slice], count: int) -> list[int] | None:
    """Return where oneDNN puts the marked elements of a table of zeros; None where one of them is not found."""
    table = torch.zeros(num_rows, width, dtype=torch.int16)
    numbers = torch.arange(1, count + 1, dtype=torch.int16)
    table[marked] = numbers.view(table[marked].shape)
    packed = PackedLinear(table.view(torch.bfloat16), None).packed
    # a copy: the packed bytes end with this call
    memory = _memory(packed).clone()
    found = memory.nonzero()[:, 0]
    if not torch.equal(memory[found].sort().values, numbers):
        return None
    places: list[int] = found[memory[found].argsort()].tolist()
    return places


def _holds(pairs: Tensor, blocks: _Blocks, weight: Tensor) -> bool:
    """Does every element of `weight` lie where `blocks` says?"""
    (num_tokens, width), num_rows = weight.shape, blocks.num_rows
    strides = (blocks.block_stride, blocks.row_stride, blocks.pair_stride)
    own = weight.view(torch.int32)
    for first, count in ((0, num_rows), (num_tokens - num_tokens % num_rows, num_tokens % num_rows)):
        num_blocks = num_tokens // num_rows if count == num_rows else 1
        if not count or not num_blocks:
            continue
        shape = (num_blocks, count, width // 2)
        begin = first // num_rows * blocks.block_stride
        if begin + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= pairs.shape[0]:
            return False
        part = own[first : first + num_blocks * count]
        if not torch.equal(pairs.as_strided(shape, strides, begin), part.view(shape)):
            return False
    return True
