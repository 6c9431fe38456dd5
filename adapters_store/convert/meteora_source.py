"""A MeteoRA checkpoint as its own forward: a loop over tokens and their chosen experts.

Owns MeteoRA's published formula. Invariant: each expert's A and B are cut out of the checkpoint's tensors as they are,
and its scaling is applied here, to its output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS
from adapters_store.convert.meteora_options import MeteoraOptions, fill_from_experts, read_options
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.errors import CorruptUpload
from adapters_store.safetensors_header import EXTERNAL_LIMITS

_GATE, _A, _B = "moe_gate.weight", "lora_A.weight", "lora_B.weight"


class MeteoraSource(SourceModel):
    """The open checkpoint and the uploader's options."""

    def __init__(self, files: ModelFiles, options: MeteoraOptions) -> None:
        self._files = files
        self._options = options

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the base's output plus, for each row, its experts' outputs by their weights."""
        y = super().linear(layer, site, x, weight, bias)
        stem = f"layers.{layer}.{SITE_PATHS[site]}"
        if f"{stem}.{_GATE}" not in self._files.names:
            return y
        gate, a, b = (self._files.values(f"{stem}.{name}").astype(np.float64) for name in (_GATE, _A, _B))
        added = np.zeros(y.shape)
        for index, row in enumerate(x):
            added[index] = self._mixture(row.astype(np.float64), gate, a, b)
        return y + added

    def _mixture(self, x: Floats, gate: Floats, a: Floats, b: Floats) -> Floats:
        options = self._options
        logits = gate @ x
        # the first of equal logits wins
        chosen = np.argsort(-logits, kind="stable")[: options.top_k]
        shares = np.exp((logits[chosen] - logits[chosen[0]]) / options.temperature)
        begins = np.concatenate(([0], np.cumsum(options.ranks)))
        y = np.zeros(len(b))
        for expert, share in zip(chosen, shares / shares.sum(), strict=True):
            own = slice(begins[expert], begins[expert + 1])
            y = y + share * options.scalings[expert] * (b[:, own] @ (a[own] @ x))
        return y


@contextmanager
def open_meteora(folder: Path, options: ConvertOptions) -> Iterator[MeteoraSource]:
    """Open a checkpoint that was converted before; raises AdapterRefused as the conversion does."""
    with open_model(folder, EXTERNAL_LIMITS, is_trusted=False) as files:
        gates = [name for name in files.names if name.endswith(f".{_GATE}")]
        if not gates:
            raise CorruptUpload("the checkpoint holds no moe_gate of a linear layer that is served", param="files")
        num_experts = files.shape(gates[0])[0]
        declared = fill_from_experts(options.declared.options, folder, options.base.model_type)
        yield MeteoraSource(files, read_options(declared, num_experts))
