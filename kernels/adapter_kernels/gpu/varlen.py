"""torch's own variable-length attention over the paged cache: a second backend behind the same arguments.

Owns the translation from the step's ragged parts to `varlen_attn_out`, and the check that this machine can run it. To
be measured by gpu-check; the kernels of `paged_decode.py` and `paged_prefill.py` are what serves until it is faster.
Invariant: one split per sequence, since torch would otherwise choose their number by the longest neighbour.
"""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from adapter_kernels.gpu.step import DecodePart, PrefillPart

# paged keys need one of these installed and activated; torch's built-in version 2 refuses a block table
_PAGED_IMPLEMENTATIONS = {"FA3", "FA4"}


def is_available(device: torch.device) -> bool:
    """Say whether torch takes a block table here: torch >= 2.13, CUDA, FlashAttention 3 or 4 activated."""
    implementation = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return device.type == "cuda" and implementation in _PAGED_IMPLEMENTATIONS and _varlen_attn_out() is not None


def rectangular_blocks(block_begins: Tensor, block_ids: Tensor, max_context: int, block_size: int) -> Tensor:
    """Block tables as torch wants them, [S, blocks of max_context] int32; once per step, not per layer.

    Places beyond a sequence's own blocks hold ids of its neighbours: `seqused_k` keeps them from being read.
    """
    columns = torch.arange(-(-max_context // block_size), device=block_ids.device)
    return block_ids[(block_begins[:, None] + columns).clamp_(max=block_ids.shape[0] - 1)]


def varlen_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    part: DecodePart,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    blocks: Tensor,
) -> None:
    """As `paged_decode`, bf16 and fp16 only.

    Args:
        blocks: [S, *] from `rectangular_blocks`.
    Raises:
        NotImplementedError: a soft cap, or a torch that takes no block table.
    """
    num_seqs = part.num_seqs
    row_ends = torch.arange(num_seqs + 1, dtype=torch.int32, device=q.device)
    _attend(
        q[:num_seqs], k_cache, v_cache, row_ends, part.context_lens, 1, out[:num_seqs], scale, window, soft_cap, blocks
    )


def varlen_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    part: PrefillPart,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    blocks: Tensor,
) -> None:
    """As `paged_prefill`, bf16 and fp16 only.

    Args:
        q, out: [T, H, E]: the whole step; its last row is the last chunk's.
        blocks: [C, *] from `rectangular_blocks`.
    Raises:
        NotImplementedError: a soft cap, or a torch that takes no block table.
    """
    first = part.first_row
    row_ends = torch.cat([part.row_begins, part.row_begins[-1:] + part.lengths[-1:]]) - first
    contexts = part.starts + part.lengths
    # the longest chunk is known on the device only; its bound merely sizes the grid
    max_rows = q.shape[0] - first
    _attend(q[first:], k_cache, v_cache, row_ends, contexts, max_rows, out[first:], scale, window, soft_cap, blocks)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_ends: Tensor,
    contexts: Tensor,
    max_rows: int,
    out: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    blocks: Tensor,
) -> None:
    attend = _varlen_attn_out()
    if soft_cap is not None or attend is None:
        raise NotImplementedError(
            "torch's variable-length attention: no soft cap, and a block table from torch 2.13 on"
        )
    attend(
        out,
        q,
        k_cache,
        v_cache,
        row_ends,
        None,
        max_rows,
        blocks.shape[1] * k_cache.shape[1],
        scale=scale,
        # torch counts the positions before a token, we count the token too; 0: none after it
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k_cache.shape[2],
        seqused_k=contexts,
        block_table=blocks,
        num_splits=1,
    )


def _varlen_attn_out() -> Callable[..., object] | None:
    try:
        # importing it registers operators, which older versions of torch do not have
        from torch.nn.attention import varlen  # noqa: PLC0415
    except ImportError:
        return None
    attend: Callable[..., object] | None = getattr(varlen, "varlen_attn_out", None)
    return attend if attend is not None and "block_table" in signature(attend).parameters else None
