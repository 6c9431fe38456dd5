"""Canonical MeteoRA bundle -> the official checkpoint layout, with the options that such a file does not store.

Owns names and orientation: `lora_A [sum r, in]`, `lora_B [out, sum r]`, `moe_gate [experts, in]`, and the base's own
tensors under PEFT's names. Invariants: every stored bit arrives unchanged (the scalings are in B, so each alpha in
`options.json` equals its rank), and what the layout cannot say is refused.
"""

from functools import partial
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.export.canonical_reader import CanonicalReader
from adapters_store.export.tensor_writer import CannotExport, NewTensor, make_empty, write_json, write_tensors
from adapters_store.float_bits import encode
from adapters_store.gates import METEORA_GATE, Experts
from adapters_store.manifest import Manifest
from adapters_store.model_ops import NO_MODEL_OPS
from adapters_store.ops import Module
from adapters_store.safetensors_header import CANONICAL_LIMITS

_KEPT = "serve the canonical files, which a Chorale server takes as they are"
_MODEL, _OPTIONS = "model.safetensors", "options.json"


def export_meteora(adapter: CanonicalReader, target: Path, *, base_dir: Path | None) -> None:
    """Write `model.safetensors` and `options.json` into the new folder `target`.

    Args:
        base_dir: the base, whose tensors the official file holds too; None leaves them out, which our own reader takes
            and the official code does not.
    Raises:
        CannotExport: not a MeteoRA bundle; nothing is written then. OSError: the disk. CorruptUpload: of the base.
    """
    experts = _experts(adapter.manifest)
    make_empty(target)
    own = [tensor for module in adapter.manifest.modules for tensor in _tensors(adapter, module)]
    if base_dir is None:
        write_tensors(target / _MODEL, own)
    else:
        with open_model(base_dir, CANONICAL_LIMITS, is_trusted=True) as base:
            write_tensors(target / _MODEL, [*_base_tensors(base, adapter.manifest), *own])
    options: dict[str, object] = {
        "top_k": experts.top_k,
        "temperature": experts.temperature,
        "rank": [*experts.ranks],
        "alpha": [*experts.ranks],
        "experts": [*adapter.manifest.experts],
    }
    write_json(target / _OPTIONS, options)


def _experts(manifest: Manifest) -> Experts:
    """Return the experts of every module, which are the same; raises CannotExport."""
    if manifest.model_ops != NO_MODEL_OPS or manifest.activation:
        raise CannotExport(f"the adapter does more than MeteoRA's linear layers can say; {_KEPT}")
    kinds = {module.experts for module in manifest.modules}
    (experts, *others) = kinds
    if experts is None or others:
        raise CannotExport(f"not every module has the same gated experts, as MeteoRA's have; {_KEPT}")
    if experts.gate != METEORA_GATE:
        raise CannotExport(f"its gates do not weigh as MeteoRA's (top-k, softmax over the chosen, linear); {_KEPT}")
    for module in manifest.modules:
        if module != Module(module.layer, module.site_index, 0, has_bias=False, experts=experts):
            raise CannotExport(f"{module.path} has more than a gated mixture, which MeteoRA's file cannot say; {_KEPT}")
    sites = {module.site for module in manifest.modules}
    if len(manifest.modules) != len(sites) * manifest.base.num_hidden_layers:
        raise CannotExport(f"MeteoRA has the same gated modules in every layer; this adapter has not; {_KEPT}")
    return experts


def _tensors(adapter: CanonicalReader, module: Module) -> list[NewTensor]:
    num_out, num_in = adapter.manifest.base.site_shape(module.site)
    stem = f"base_model.model.model.layers.{module.layer}.{SITE_PATHS[module.site]}"
    rank, dtype = sum(module.ranks), adapter.dtype

    def factor_b() -> bytes:
        return np.ascontiguousarray(adapter.bits(module.tensor("BT")).T).tobytes()

    return [
        NewTensor(f"{stem}.lora_A.weight", dtype, (rank, num_in), lambda: adapter.raw(module.tensor("A"))),
        NewTensor(f"{stem}.lora_B.weight", dtype, (num_out, rank), factor_b),
        NewTensor(
            f"{stem}.moe_gate.weight", dtype, (len(module.ranks), num_in), lambda: adapter.raw(module.tensor("G"))
        ),
    ]


def _base_tensors(base: ModelFiles, manifest: Manifest) -> list[NewTensor]:
    """Return the base's tensors, those of gated modules one name deeper, as PEFT wraps them."""
    gated = {f"layers.{module.layer}.{SITE_PATHS[module.site]}" for module in manifest.modules}
    tensors = []
    for name in sorted(base.names):
        stem, _, kind = name.rpartition(".")
        wrapped = f"{stem}.base_layer.{kind}" if stem in gated else name
        prefix = "base_model.model." if name.startswith("lm_head.") else "base_model.model.model."
        read = partial(_raw, base, name)
        tensors.append(NewTensor(f"{prefix}{wrapped}", base.dtype(name), base.shape(name), read))
    return tensors


def _raw(base: ModelFiles, name: str) -> bytes:
    return encode(base.values(name), base.dtype(name))
