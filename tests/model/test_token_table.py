"""Lookups in a packed table against the plain one, bit by bit, and the plain table where packed rows are not found."""

import logging
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from serve.model import token_table
from serve.model.layers import PackedLinear, can_pack
from serve.model.token_table import PackedTable, PlainTable, tie
from tests.model.paged_run import CPU, PagedRun, load
from tests.model.tiny_models import BY_NAME, save

pytestmark = pytest.mark.skipif(
    not can_pack(torch.bfloat16, CPU), reason="this CPU or torch build has no packed bf16 weights"
)
# by the rows that are probed: fewer, exactly as many, whole blocks beyond, a part of a block beyond
SHAPES = [(2, 2), (5, 40), (64, 32), (151, 896), (768, 64), (1536, 48), (1600, 33 * 2), (2311, 130)]


def any_bits(num_rows: int, width: int) -> Tensor:
    """Return a table of all kinds of bf16: zeros of both signs, denormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + width)
    bits = torch.randint(-(1 << 15), 1 << 15, (num_rows, width), generator=generator, dtype=torch.int16)
    return bits.view(torch.bfloat16)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_every_row_has_the_bits_of_the_plain_table(num_rows: int, width: int) -> None:
    weight = any_bits(num_rows, width)
    table = PackedTable.find(PackedLinear(weight, None).packed, weight)
    assert table is not None
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    assert same_bits(table(order), weight[order])
    # one token, none, and the same one several times
    assert same_bits(table(order[:1]), weight[order[:1]])
    assert table(order[:0]).shape == (0, width)
    assert same_bits(table(order[[0, 0, 1]]), weight[order[[0, 0, 1]]])


def test_the_plain_table_is_given_up() -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    kept, seen = weight.clone(), weakref.ref(weight)
    table, head = tie(weight)
    del weight
    assert seen() is None
    # what was looked up is a copy: nobody writes into the head by it
    table(torch.arange(200)).zero_()
    assert same_bits(table(torch.arange(200)), kept)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(head(x), PackedLinear(kept, None)(x))


@pytest.mark.parametrize("token_id", [-1, 200, 1 << 40])
def test_an_id_outside_the_table_is_refused_by_both(token_id: int) -> None:
    weight = any_bits(200, 64)
    for table in (PlainTable(weight), tie(weight)[0]):
        with pytest.raises(IndexError):
            table(torch.tensor([3, token_id]))


@pytest.mark.parametrize(
    "reason", ["odd width", "unknown layout", "another layout", "strides out of the memory", "a torch that hides it"]
)
def test_the_plain_table_stays_where_packed_rows_are_not_found(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = any_bits(2311, 63 if reason == "odd width" else 64)
    true = token_table._probe(weight) if weight.shape[1] == 64 else None
    if reason == "unknown layout":
        monkeypatch.setattr(token_table, "_places", lambda *_: None)
    if reason == "another layout":
        assert true is not None
        wrong = token_table._Blocks(true.num_rows, true.block_stride, true.pair_stride, true.row_stride)
        monkeypatch.setattr(token_table, "_probe", lambda _: wrong)
    if reason == "strides out of the memory":
        assert true is not None
        wrong = token_table._Blocks(true.num_rows, true.block_stride * 64, true.row_stride, true.pair_stride)
        monkeypatch.setattr(token_table, "_probe", lambda _: wrong)
    if reason == "a torch that hides it":
        monkeypatch.setattr(token_table, "_NEEDED_OPS", ("data_ptr", "no_such_op"))
    with caplog.at_level(logging.WARNING):
        table, _ = tie(weight)
    assert isinstance(table, PlainTable) and "stays in memory" in caplog.text
    ids = torch.tensor([0, 2310, 64, 767])
    assert same_bits(table(ids), functional.embedding(ids, weight))


@pytest.mark.parametrize("row", [0, 1, 63, 1535, 1536, 2303, 2304, 2310])
def test_one_bit_of_any_row_that_differs_keeps_the_plain_table(row: int) -> None:
    weight = any_bits(2311, 64)
    packed = PackedLinear(weight, None).packed
    assert PackedTable.find(packed, weight) is not None
    weight.view(torch.int16)[row, 17] ^= 1
    assert PackedTable.find(packed, weight) is None


def test_a_tied_model_answers_with_the_same_bits_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        folder = save(BY_NAME["qwen2-tied"].build(), tmp_path)
    packed = load(folder, torch.bfloat16)
    assert isinstance(packed._table, PackedTable)
    monkeypatch.setattr(PackedTable, "find", lambda *_: None)
    plain = load(folder, torch.bfloat16)
    assert isinstance(plain._table, PlainTable)
    ids = list(range(5, 25))
    assert torch.equal(PagedRun(packed).step({0: ids})[0], PagedRun(plain).step({0: ids})[0])
