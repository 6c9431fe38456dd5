"""Token masks of constrained sequences, by llguidance on numpy. No torch here.

Owns one matcher per constrained sequence; the sampler applies the bits. Invariant: a token that `mask` allowed is
accepted by `accept`, and once the grammar is complete only end tokens are allowed.
"""

import numpy as np
from numpy.typing import NDArray

from serve.messages import Grammar


class GrammarMasks:
    """The matchers of all running constrained sequences."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._vocab_size = vocab_size

    def start(self, request_id: str, grammar: Grammar) -> None:
        """Compile and hold a matcher for a sequence."""

    def mask(self, request_id: str) -> NDArray[np.int32]:
        """Return the allowed next tokens as bits: token t is bit t % 32 of word t // 32."""
        return np.full((self._vocab_size + 31) // 32, -1, dtype=np.int32)

    def accept(self, request_id: str, token_id: int) -> None:
        """Advance by a sampled token."""

    def release(self, request_id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
