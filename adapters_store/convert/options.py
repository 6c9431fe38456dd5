"""What a conversion is told besides the files: the base, the image's dtype, the limits on ranks, the declared format.

Owns the passing of these between the server and the converter process. Invariant: `from_json(to_json(x)) == x`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from adapters_store.base import SITES, BaseDims
from adapters_store.formats import Declared


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`dtype` is a serving dtype: "float32", "bfloat16" or "float16".

    `max_product_rank` is the limit where a rank is a product of two (LoHa, LoKr); without effect below `max_rank`.
    `dense_budget_bytes` bounds what one adapter may hold of dense changes of whole matrices.
    `base_dir` holds the base's weights, which some formats need; None: they are not at hand.
    """

    base: BaseDims
    dtype: str
    max_rank: int
    max_product_rank: int = 0
    base_dir: str | None = None
    dense_budget_bytes: int = 0
    declared: Declared = field(default_factory=Declared)

    @property
    def largest_rank(self) -> int:
        """The rank that no module of any adapter exceeds."""
        return max(self.max_rank, self.max_product_rank)

    def max_image_bytes(self) -> int:
        """Return the size of the largest image that passes the limits: every module at its largest, in float32."""
        shapes = [self.base.site_shape(site) for site in SITES]
        # factors, scale and bias of the outputs, scale of the inputs
        values = sum(self.largest_rank * (num_out + num_in) + 2 * num_out + num_in for num_out, num_in in shapes)
        hidden, vocab = self.base.hidden_size, self.base.vocab_size
        # embedding and output head each have factors, the head a bias
        outer = 2 * self.largest_rank * (hidden + vocab) + vocab
        return 4 * (values * self.base.num_hidden_layers + outer) + self.dense_budget_bytes

    def to_json(self) -> str:
        """Return one line for the converter's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ConvertOptions":
        """Read `to_json`'s line; it comes from our own server, never from a stranger."""
        value = json.loads(text)
        return cls(**{**value, "base": BaseDims(**value["base"]), "declared": Declared(**value["declared"])})


# reads the foreign files in the first folder, writes adapter.json and adapter.safetensors into the second
Convert = Callable[[Path, Path, ConvertOptions], None]
