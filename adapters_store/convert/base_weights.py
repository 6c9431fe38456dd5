"""The base's weights and biases at the layers of an adapter, for formulas that need them.

Owns finding a layer's rows in the base's files, fused or split on either side. Invariants: nothing is opened until it
is asked for, `was_asked` says whether it was, and at most a few MB of the base are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from adapters_store.base import HEAD, SITE_PATHS, BaseDims
from adapters_store.convert.model_files import ModelFiles, num_rows, open_model
from adapters_store.errors import WrongBase
from adapters_store.float_bits import Float32
from adapters_store.safetensors_header import CANONICAL_LIMITS

# fused linear layers of Phi-3 checkpoints: the sites whose rows they stack, in order
FUSED_SITES = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
_CHUNK_VALUES = 1 << 20
_EMBEDDING = "embed_tokens"


class BaseWeights:
    """The served base's linear layers, by layer number and sites, and its embedding and output head."""

    def __init__(self, folder: str | None, base: BaseDims) -> None:
        """Open nothing yet; `folder` is None where the base is not at hand."""
        self._folder = folder
        self._base = base
        self._stack = ExitStack()
        self._files: ModelFiles | None = None

    @property
    def was_asked(self) -> bool:
        """Did a formula need the base?"""
        return self._files is not None

    def rows(self, layer: int, sites: tuple[str, ...]) -> Iterator[tuple[slice, Float32]]:
        """Yield the weight of the stacked sites [out, in] in pieces of whole rows; raises WrongBase."""
        files = self._open()
        begin = 0
        for site in sites:
            stem, offset = self._find(files, layer, site)
            num_out, num_in = self._base.site_shape(site)
            step = num_rows((num_out, num_in), _CHUNK_VALUES)
            for first in range(0, num_out, step):
                last = min(first + step, num_out)
                yield slice(begin + first, begin + last), files.rows(f"{stem}.weight", offset + first, offset + last)
            begin += num_out

    def bias(self, layer: int, sites: tuple[str, ...]) -> Float32 | None:
        """Return the bias of the stacked sites [out], None where none of them has one; raises WrongBase."""
        files = self._open()
        biases = []
        has_any = False
        for site in sites:
            stem, offset = self._find(files, layer, site)
            num_out = self._base.site_shape(site)[0]
            has_own = f"{stem}.bias" in files.names
            has_any = has_any or has_own
            own = files.rows(f"{stem}.bias", offset, offset + num_out) if has_own else np.zeros(num_out, np.float32)
            biases.append(own)
        return np.concatenate(biases) if has_any else None

    def is_float32(self, layer: int, sites: tuple[str, ...]) -> bool:
        """Return whether the base's files hold the stacked sites in float32; raises WrongBase."""
        files = self._open()
        return all(files.dtype(f"{self._find(files, layer, site)[0]}.weight") == "F32" for site in sites)

    def table(self, place: str) -> Iterator[tuple[slice, Float32]]:
        """Yield the rows [V, H] of `embed_tokens` or `lm_head` in pieces; raises WrongBase."""
        files = self._open()
        name = f"{self._table_stem(files, place)}.weight"
        vocab = self._base.vocab_size
        step = num_rows((vocab, self._base.hidden_size), _CHUNK_VALUES)
        for first in range(0, vocab, step):
            last = min(first + step, vocab)
            yield slice(first, last), files.rows(name, first, last)

    def has_norm(self, layer: int, norm: str) -> bool:
        """Return whether the base has a norm of this name in a layer, -1: behind all; raises WrongBase."""
        return f"{norm if layer < 0 else f'layers.{layer}.{norm}'}.weight" in self._open().names

    def close(self) -> None:
        """Close the base's file that is open."""
        self._stack.close()

    def _open(self) -> ModelFiles:
        if self._folder is None:
            raise WrongBase(
                "this adapter is converted with the base's weights, which are not at hand: name them with --base"
            )
        if self._files is None:
            is_tied = self._base.tie_word_embeddings
            opened = open_model(Path(self._folder), CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied)
            self._files = self._stack.enter_context(opened)
        return self._files

    def _find(self, files: ModelFiles, layer: int, site: str) -> tuple[str, int]:
        """Return the layer in the base's files and the row in it at which the site begins."""
        if site == HEAD:
            return self._table_stem(files, HEAD), 0
        stem = f"layers.{layer}.{SITE_PATHS[site]}"
        found, offset = stem, 0
        for fused, sites in FUSED_SITES.items():
            if site in sites and f"layers.{layer}.{fused}.weight" in files.names:
                found = f"layers.{layer}.{fused}"
                offset = sum(self._base.site_shape(other)[0] for other in sites[: sites.index(site)])
        if f"{found}.weight" not in files.names:
            raise WrongBase(f"the base holds no {stem}.weight, which this adapter is converted with")
        return found, offset

    def _table_stem(self, files: ModelFiles, place: str) -> str:
        # a tied head is the embedding, and most checkpoints hold it once
        is_tied = place == HEAD and f"{HEAD}.weight" not in files.names and self._base.tie_word_embeddings
        stem = _EMBEDDING if is_tied else place
        if f"{stem}.weight" not in files.names:
            raise WrongBase(f"the base holds no {stem}.weight, which this adapter is converted with")
        return stem
