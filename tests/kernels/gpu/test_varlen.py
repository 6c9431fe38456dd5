"""What torch's variable-length attention is asked for, its op replaced by the definition, since it needs a GPU."""

import pytest
import torch
from torch import Tensor

from adapter_kernels.gpu.varlen import is_available, rectangular_blocks, varlen_decode, varlen_prefill
from adapter_kernels.reference_attention import paged_attention_rows
from tests.kernels.gpu.paged_cases import Heads, paged_case, queries, relative_error

HEADS = Heads(4, 2, 32)


def attend_by_definition(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_ends: Tensor,
    key_ends: Tensor | None,
    max_rows: int,
    max_context: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> None:
    """As torch documents `varlen_attn_out` with a block table: causal, aligned to the last key."""
    assert key_ends is None and enable_gqa and num_splits == 1 and window_size[1] == 0
    assert all(tensor.dtype == torch.int32 for tensor in (row_ends, seqused_k, block_table))
    contexts: list[int] = []
    tables: list[list[int]] = []
    lengths = row_ends.diff().tolist()
    assert max(lengths) <= max_rows and int(seqused_k.max()) <= max_context
    for length, context, table in zip(lengths, seqused_k.tolist(), block_table.tolist(), strict=True):
        contexts += range(context - length + 1, context + 1)
        tables += [table] * length
    window = None if window_size[0] < 0 else window_size[0] + 1
    out.copy_(paged_attention_rows(q, k_cache, v_cache, contexts, tables, scale=scale, window=window, soft_cap=None))


@pytest.fixture
def torch_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn_out", attend_by_definition)


@pytest.mark.usefixtures("torch_op")
@pytest.mark.parametrize("window", [None, 1, 20])
def test_both_parts_reach_torch_as_it_documents(window: int | None) -> None:
    case = paged_case((5, 33), HEADS, torch.float32)
    blocks = rectangular_blocks(case.decode_part().block_begins, case.decode_part().block_ids, 40, 16)
    assert blocks.dtype == torch.int32 and blocks.shape == (2, 3)
    q = queries(11, HEADS, torch.float32)
    out = torch.full_like(q, float("nan"))
    # rows 0, 1: the sequences as decodes; rows 2 .. 10: their last 3 and 6 positions as chunks
    varlen_decode(
        q, case.k_cache, case.v_cache, case.decode_part(), out, scale=0.2, window=window, soft_cap=None, blocks=blocks
    )
    part = case.prefill_part((2, 27), 2, 16)
    varlen_prefill(q, case.k_cache, case.v_cache, part, out, scale=0.2, window=window, soft_cap=None, blocks=blocks)
    contexts = [5, 33, 3, 4, 5, 28, 29, 30, 31, 32, 33]
    tables = [case.tables[index] for index in (0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1)]
    expected = paged_attention_rows(
        q, case.k_cache, case.v_cache, contexts, tables, scale=0.2, window=window, soft_cap=None
    )
    assert relative_error(out, expected) < 1e-6


def test_it_is_not_available_without_a_gpu() -> None:
    assert not is_available(torch.device("cpu"))


def test_an_older_torch_is_recognised_and_a_soft_cap_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = paged_case((5,), HEADS, torch.float32)
    part, q = case.decode_part(), queries(1, HEADS, torch.float32)
    blocks = rectangular_blocks(part.block_begins, part.block_ids, 16, 16)
    for soft_cap, op in ((5.0, attend_by_definition), (None, lambda out, q: None), (None, None)):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn_out", op)
        with pytest.raises(NotImplementedError, match="soft cap"):
            varlen_decode(
                q, case.k_cache, case.v_cache, part, q, scale=1.0, window=None, soft_cap=soft_cap, blocks=blocks
            )
