"""The base's weights for the probe: one tensor at a time from the checkpoint's files, as float32.

Owns where each part of the decoder lies in the files. Invariant: at most one linear layer, or a piece of the head, is
in memory at a time.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.model_files import ModelFiles, num_rows, open_model
from adapters_store.float_bits import Float32
from adapters_store.safetensors_header import CANONICAL_LIMITS

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_CHUNK_VALUES = 1 << 23


@dataclass(frozen=True, slots=True)
class HeadPiece:
    """Rows `first..first + n` of the head: weight [n, H], bias [n]."""

    first: int
    weight: Float32
    bias: Float32 | None


class ProbeWeights:
    """The checkpoint of the served base. Use it as a context manager."""

    def __init__(self, folder: Path, dims: BaseDims) -> None:
        self._dims = dims
        self._stack = ExitStack()
        self._sites = BaseWeights(str(folder), dims)
        self._stack.callback(self._sites.close)
        self._files: ModelFiles = self._stack.enter_context(open_model(folder, CANONICAL_LIMITS, is_trusted=True))

    def site(self, layer: int, site: str) -> tuple[Float32, Float32 | None]:
        """Return weight [out, in] and bias [out] of one linear layer; raises WrongBase."""
        weight = np.empty(self._dims.site_shape(site), np.float32)
        for rows, values in self._sites.rows(layer, (site,)):
            weight[rows] = values
        return weight, self._sites.bias(layer, (site,))

    def norm(self, layer: int, name: str) -> Float32:
        """Return a norm's weight as the checkpoint holds it; layer -1: the last norm, whatever its name."""
        if layer < 0:
            return self._files.values("norm.weight")
        path = f"self_attn.{name}" if name in ("q_norm", "k_norm") else name
        return self._files.values(f"layers.{layer}.{path}.weight")

    def embeddings(self, token_ids: tuple[int, ...]) -> Float32:
        """Return the embeddings [T, H] of tokens."""
        name = _EMBEDDING if _EMBEDDING in self._files.names else _HEAD
        return np.concatenate([self._files.rows(name, token, token + 1) for token in token_ids])

    def head(self) -> Iterator[HeadPiece]:
        """Yield the head in pieces of whole rows."""
        name = _HEAD if _HEAD in self._files.names else _EMBEDDING
        vocab_size = self._files.shape(name)[0]
        step = num_rows(self._files.shape(name), _CHUNK_VALUES)
        for first in range(0, vocab_size, step):
            yield HeadPiece(first, self._files.rows(name, first, min(first + step, vocab_size)), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
