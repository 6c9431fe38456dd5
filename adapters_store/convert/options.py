"""What a conversion is told besides the files: the base, the dtype of the image, the limit on ranks.

Owns the passing of these between the server and the converter process. Invariant: `from_json(to_json(x)) == x`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.base import BaseDims


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`dtype` is a serving dtype: "float32", "bfloat16" or "float16"."""

    base: BaseDims
    dtype: str
    max_rank: int

    def to_json(self) -> str:
        """Return one line for the converter's command line."""
        return json.dumps({"base": self.base.to_dict(), "dtype": self.dtype, "max_rank": self.max_rank})

    @classmethod
    def from_json(cls, text: str) -> "ConvertOptions":
        """Read `to_json`'s line; it comes from our own server, never from a stranger."""
        value = json.loads(text)
        return cls(base=BaseDims(**value["base"]), dtype=value["dtype"], max_rank=value["max_rank"])


# reads the foreign files in the first folder, writes adapter.json and adapter.safetensors into the second
Convert = Callable[[Path, Path, ConvertOptions], None]
