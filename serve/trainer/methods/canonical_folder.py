"""Adapters of the registry as the trainer needs them: the factors of plain LoRAs, the channels of S2FT adapters.

Owns reading canonical downloads. Invariant: nothing is read before its hash was compared, and an adapter that is more
than what is wanted of it is refused, never read in part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.errors import StoreError
from adapters_store.export.canonical_reader import CanonicalReader, open_canonical
from adapters_store.manifest import Manifest, Module
from adapters_store.model_ops import NO_MODEL_OPS
from serve.trainer.progress import NamedAdapter, TrainingFailed


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """A plain LoRA: A [r, in] and B^T [r, out] by (layer, site), the scaling in B; `rank` is the largest r."""

    name: str
    rank: int
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]]


def read_lora(adapter: NamedAdapter) -> ExpertFactors:
    """Read an expert; raises TrainingFailed when it is damaged or more than a LoRA of linear layers."""
    try:
        with open_canonical(adapter.folder) as reader:
            manifest = reader.manifest
            if not _is_plain_lora(manifest):
                raise TrainingFailed(
                    "bad_expert",
                    f"the expert {adapter.name!r} is no plain LoRA of linear layers (family {manifest.family}); the "
                    "experts of a mixture must be",
                )
            factors = {
                (module.layer, module.site): (_values(reader, module, "A"), _values(reader, module, "BT"))
                for module in manifest.modules
            }
    except StoreError as error:
        raise TrainingFailed("bad_expert", f"the expert {adapter.name!r} cannot be read: {error.message}") from error
    return ExpertFactors(adapter.name, max(module.rank for module in manifest.modules), factors)


def selected_channels(adapter: NamedAdapter) -> dict[tuple[int, str], Tensor]:
    """Return the channels that an adapter selects, by (layer, site); raises TrainingFailed when it selects none."""
    try:
        with open_canonical(adapter.folder) as reader:
            found = {
                (module.layer, module.site): torch.from_numpy(
                    reader.positions(module.tensor("cols.idx" if module.cols else "rows.idx")).astype("int64")
                )
                for module in reader.manifest.modules
                if module.cols or module.rows
            }
    except StoreError as error:
        raise TrainingFailed("bad_expert", f"{adapter.name!r} cannot be read: {error.message}") from error
    if not found:
        raise TrainingFailed(
            "bad_spec", f"{adapter.name!r} in disjoint_with is no S2FT adapter: it selects no channels"
        )
    return found


def _is_plain_lora(manifest: Manifest) -> bool:
    plain = all(
        module == Module(module.layer, module.site_index, module.rank, has_bias=False) and module.rank
        for module in manifest.modules
    )
    is_always = manifest.model_ops == NO_MODEL_OPS and not manifest.activation
    return bool(manifest.modules) and plain and is_always and not any(module.is_head for module in manifest.modules)


def _values(reader: CanonicalReader, module: Module, kind: str) -> Tensor:
    return torch.from_numpy(reader.values(module.tensor(kind)).copy())
