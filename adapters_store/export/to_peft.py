"""Canonical adapter -> a folder that PEFT's `PeftModel.from_pretrained` reads as a plain LoRA.

Owns which ops a LoRA can say exactly: a low rank as it is, selected inputs or outputs of S2FT as a LoRA of their number
with one factor of zeros and ones, an added bias as `lora_bias`. Invariants: every stored bit of A, B and D arrives
unchanged, with `lora_alpha` equal to the rank, so the scaling is one; and what cannot be said exactly is refused.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.base import HEAD, SITE_PATHS
from adapters_store.export.canonical_reader import Bits, CanonicalReader
from adapters_store.export.tensor_writer import CannotExport, NewTensor, make_empty, write_json, write_tensors
from adapters_store.float_bits import encode
from adapters_store.formats import PEFT_PARTS
from adapters_store.manifest import Manifest
from adapters_store.model_ops import NO_MODEL_OPS
from adapters_store.ops import Module

_WAY_OUT = "export it with --to hf_model, which adds it to the base's weights, or keep the canonical files"
_KEPT = "serve the canonical files, which a Chorale server takes as they are"


@dataclass(frozen=True, slots=True)
class _Lora:
    """One module as PEFT names it, and its rank."""

    module: Module
    path: str
    rank: int


def export_peft(adapter: CanonicalReader, target: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into the new folder `target`.

    Raises:
        CannotExport: an op that no LoRA equals; nothing is written then. OSError: the disk.
    """
    manifest = adapter.manifest
    refuse_but_lora(manifest)
    loras = [_Lora(module, _path(module), _rank(module)) for module in manifest.modules]
    make_empty(target)
    has_bias = any(module.has_bias for module in manifest.modules)
    tensors = [tensor for lora in loras for tensor in _tensors(adapter, lora, has_bias=has_bias)]
    write_tensors(target / PEFT_PARTS[1], tensors)
    write_json(target / PEFT_PARTS[0], _config(manifest, loras, has_bias=has_bias))


def refuse_but_lora(manifest: Manifest) -> None:
    """Raise CannotExport unless every op of the adapter is one that a LoRA can say."""
    if manifest.model_ops != NO_MODEL_OPS:
        parts = ", ".join(manifest.model_ops.paths()) or "the gate of a whole MLP"
        way_out = _KEPT if manifest.num_virtual_tokens or manifest.model_ops.gates else _WAY_OUT
        raise CannotExport(f"the adapter acts on {parts}, which a LoRA of PEFT cannot; {way_out}")
    for module in manifest.modules:
        if module.experts is not None:
            raise CannotExport(
                f"{module.path} is a gated mixture, which a LoRA of PEFT cannot say; export it with --to meteora if it "
                f"came from there, or {_KEPT}"
            )
        foreign = [
            name
            for name, is_present in (
                ("out_scale", module.has_out_scale),
                ("in_scale", module.has_in_scale),
                ("a sparse delta", module.csr is not None),
                ("a dense delta", module.has_dense),
                ("in_blockdiag", module.blockdiag > 0),
                ("out_rot2", module.rot2_group > 0),
            )
            if is_present
        ]
        if foreign:
            raise CannotExport(f"{module.path} has {' and '.join(foreign)}, which no LoRA equals; {_WAY_OUT}")
        if _rank(module) == 0:
            raise CannotExport(f"{module.path} has a bias and no low rank, which no LoRA equals; {_WAY_OUT}")


def _path(module: Module) -> str:
    return HEAD if module.is_head else f"model.layers.{module.layer}.{SITE_PATHS[module.site]}"


def _rank(module: Module) -> int:
    return module.rank + module.cols + module.rows


def _tensors(adapter: CanonicalReader, lora: _Lora, *, has_bias: bool) -> list[NewTensor]:
    num_out, num_in = adapter.manifest.base.site_shape(lora.module.site)
    stem = f"base_model.model.{lora.path}"
    dtype = adapter.dtype
    tensors = [
        NewTensor(f"{stem}.lora_A.weight", dtype, (lora.rank, num_in), lambda: _factor_a(adapter, lora, num_in)),
        NewTensor(f"{stem}.lora_B.weight", dtype, (num_out, lora.rank), lambda: _factor_b(adapter, lora, num_out)),
    ]
    if has_bias:
        tensors.append(NewTensor(f"{stem}.lora_B.bias", dtype, (num_out,), lambda: _bias(adapter, lora, num_out)))
    return tensors


def _factor_a(adapter: CanonicalReader, lora: _Lora, num_in: int) -> bytes:
    """Return A [rank, in]: of the LoRA, then one row per selected input, then D of the selected outputs."""
    module = lora.module
    parts: list[Bits] = [adapter.bits(module.tensor("A"))] if module.rank else []
    if module.cols:
        parts.append(_ones(adapter, module.tensor("cols.idx"), num_in))
    if module.rows:
        parts.append(adapter.bits(module.tensor("rows.D")))
    return np.concatenate(parts, axis=0).tobytes()


def _factor_b(adapter: CanonicalReader, lora: _Lora, num_out: int) -> bytes:
    """Return B [out, rank], the stored rank rows turned back to PEFT's orientation."""
    module = lora.module
    parts: list[Bits] = [adapter.bits(module.tensor("BT"))] if module.rank else []
    if module.cols:
        parts.append(adapter.bits(module.tensor("cols.D")))
    if module.rows:
        parts.append(_ones(adapter, module.tensor("rows.idx"), num_out))
    return np.ascontiguousarray(np.concatenate(parts, axis=0).T).tobytes()


def _ones(adapter: CanonicalReader, name: str, width: int) -> Bits:
    """Return a row per position, 1 at the position and 0 elsewhere, as bits of the image's dtype."""
    positions = adapter.positions(name)
    rows = np.zeros((len(positions), width), dtype=np.float32)
    rows[np.arange(len(positions)), positions] = 1
    bits: Bits = np.frombuffer(encode(rows, adapter.dtype), dtype="<u4" if adapter.dtype == "F32" else "<u2")
    return bits.reshape(rows.shape)


def _bias(adapter: CanonicalReader, lora: _Lora, num_out: int) -> bytes:
    # PEFT knows one flag for all modules; the others' biases are zero
    if lora.module.has_bias:
        return adapter.raw(lora.module.tensor("bias"))
    return encode(np.zeros(num_out, dtype=np.float32), adapter.dtype)


def _config(manifest: Manifest, loras: list[_Lora], *, has_bias: bool) -> dict[str, object]:
    ranks = [lora.rank for lora in loras]
    rank = max(set(ranks), key=lambda each: (ranks.count(each), each))
    odd = {lora.path: lora.rank for lora in loras if lora.rank != rank}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": [lora.path for lora in loras],
        "bias": "none",
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    if manifest.activation:
        config["alora_invocation_tokens"] = [*manifest.activation]
    return config
