"""Tokens that never leave the device: a decode takes the token that the step before chose for its sequence.

Owns one small kernel at the head of a step. Invariant: rows that are not chained keep the token that the host sent.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["num_rows"])
def _chain_tokens_kernel(token_ids_ptr, chain_ptr, chosen_ptr, num_rows, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(chain_ptr + rows, mask=rows < num_rows, other=-1)
    is_chained = source >= 0
    tokens = tl.load(chosen_ptr + source, mask=is_chained, other=0)
    tl.store(token_ids_ptr + rows, tokens, mask=is_chained)


def chain_tokens(token_ids: Tensor, chain: Tensor, chosen: Tensor) -> None:
    """Fill in the tokens of chained rows: token_ids[t] = chosen[chain[t]] where chain[t] >= 0.

    Args:
        token_ids: [>= S] int32, changed in place. chain: [S] int32, -1: not chained. chosen: [*] int32, the tokens of
            the step before by row of its logits.
    """
    num_rows = chain.shape[0]
    _chain_tokens_kernel[(triton.cdiv(num_rows, _BLOCK),)](token_ids, chain, chosen, num_rows, BLOCK=_BLOCK)
