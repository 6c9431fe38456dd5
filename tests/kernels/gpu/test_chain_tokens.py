"""chain_tokens: rows that are chained take the token of the step before, all others keep what the host sent."""

import pytest
import torch

from adapter_kernels.gpu.sampling import chain_tokens
from tests.kernels.gpu.batches import RAGGED_ROWS


@pytest.mark.parametrize("num_rows", [*RAGGED_ROWS, 300])
def test_chained_rows_take_the_chosen_tokens(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    token_ids, chosen = (torch.randint(70, (num_rows + 5,), generator=generator, dtype=torch.int32) for _ in range(2))
    chain = torch.randperm(num_rows + 5, generator=generator)[:num_rows].int()
    chain[1::3] = -1
    expected = token_ids.tolist()
    for row, source in enumerate(chain.tolist()):
        if source >= 0:
            expected[row] = int(chosen[source])
    chain_tokens(token_ids, chain, chosen)
    assert token_ids.tolist() == expected
