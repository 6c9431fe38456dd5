"""The source's own forward, place by place: what the probe at admission compares the served adapter with.

Owns the places where a source may change the base, and what the base alone does there. Runs in the probe's reference
process; numpy only. Invariants: nothing here or in a subclass reads the canonical file or `Delta.factors`, so a wrong
conversion cannot agree with it by being wrong twice; arguments are never changed in place.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
# runs one linear layer of the MLP: "gate_proj", "up_proj" or "down_proj", with all that the source does there
Linears: TypeAlias = Callable[[str, Floats], Floats]
Activation: TypeAlias = Callable[[Floats], Floats]


class SourceModel:
    """The base alone. A source overrides the places it changes; T rows of one sequence, H hidden size, V vocabulary.

    Rows are float32 as they come; a result may be float32 or float64.
    """

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the whole output [T, out] of one linear layer.

        Args:
            site: one of `adapters_store.base.SITES`, fused layers of a checkpoint split.
            weight: the base's, [out, in]; bias: the base's [out], None where it has none.
        """
        y: Floats = x @ weight.T
        return y if bias is None else y + bias

    def embed(self, token_ids: npt.NDArray[np.int64], rows: Floats) -> Floats:
        """Return the embeddings [T, H] of these tokens, before the base's factor; `rows` [T, H] are the base's."""
        return rows

    def norm(self, layer: int, name: str, weight: Floats) -> Floats:
        """Return a norm's weight as a checkpoint holds it; `name` as in `model_ops.NORMS`, layer -1: the last norm."""
        return weight

    def head(self, x: Floats, weight: Floats, bias: Floats | None, first: int) -> Floats:
        """Return the logits [T, n] of tokens `first..first + n`, before divisor and cap; weight [n, H]."""
        y: Floats = x @ weight.T
        return y if bias is None else y + bias

    def mlp(self, layer: int, x: Floats, linears: Linears, activation: Activation) -> Floats | None:
        """Return the MLP's output [T, H] for its normed input x; None: `down(activation(gate(x)) * up(x))`."""
        return None

    def prompt(self) -> Floats | None:
        """Return rows [n, H] that come before the tokens, in the scale of embeddings after the base's factor."""
        return None

    def kv_prefix(self, layer: int) -> tuple[Floats, Floats] | None:
        """Return keys, not rotated, and values [n, K, E] at positions 0 to n - 1, before all tokens."""
        return None

    def active_from(self, token_ids: tuple[int, ...]) -> int | None:
        """Return the first token that the source acts on: None: all; len(token_ids): none."""
        return None
