"""Canonical adapters of ops outside the linear layers, written and opened by the store's own code.

Owns the way from tensors to files, for tests that need an adapter without any source format.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from adapter_kernels.model_image import ModelTensors
from adapters_store.base import BaseDims
from adapters_store.canonical import check_adapter
from adapters_store.convert.adapter_writer import write_image, write_manifest
from adapters_store.manifest import Manifest, Source
from adapters_store.model_ops import EmbedLowrank, KvPrefix, ModelOps, NormWeight, PromptEmbeds, TokenRows
from adapters_store.ops import Module, head_module


def store_adapter(root: Path, tensors: ModelTensors, base: BaseDims) -> str:
    """Write an adapter in float32 under `root/objects` and return its digest."""
    ops, found = _model_ops(tensors), _named(tensors)
    modules: tuple[Module, ...] = ()
    if tensors.head is not None:
        modules = (head_module(tensors.head.a.shape[0], has_bias=tensors.head.bias is not None),)
    staged = root / "staged"
    staged.mkdir()
    written = write_image(
        staged, modules, base, "float32", lambda name: found[name].contiguous().numpy().tobytes(), ops
    )
    source = Source("by hand", {}, {}, (), 0.0)
    manifest = Manifest(
        "model", base, "float32", written.num_bytes, written.sha256, modules, source, model_ops=ops
    )  # fmt: skip
    write_manifest(staged, manifest)
    assert check_adapter(staged, base, "float32", 64) == manifest
    digest = hashlib.sha256(manifest.to_bytes()).hexdigest()
    staged.rename(root / "objects" / digest)
    return digest


def _model_ops(tensors: ModelTensors) -> ModelOps:
    embed, head, lowrank = tensors.embed_rows, tensors.head_rows, tensors.embed_lowrank
    rows = [("both", embed)] if embed is head else [("embed", embed), ("lm_head", head)]
    prompt, prefix = tensors.prompt_embeds, tensors.kv_prefix
    return ModelOps(
        norms=tuple(sorted(NormWeight(layer, norm) for layer, norm in tensors.norms)),
        token_rows=tuple(TokenRows(target, len(own.idx)) for target, own in rows if own is not None),
        embed_lowrank=None if lowrank is None else EmbedLowrank(lowrank.bt.shape[0]),
        prompt_embeds=None if prompt is None else PromptEmbeds(prompt.shape[0]),
        kv_prefix=None if prefix is None else KvPrefix(prefix.k.shape[1]),
    )


def _named(tensors: ModelTensors) -> dict[str, Tensor]:
    found = {NormWeight(layer, norm).tensor: weight for (layer, norm), weight in tensors.norms.items()}
    for target, own in (("embed", tensors.embed_rows), ("lm_head", tensors.head_rows), ("both", tensors.embed_rows)):
        if own is not None:
            found |= {f"tokens.{target}.idx": own.idx.to(torch.int32), f"tokens.{target}.E": own.e}
    if tensors.embed_lowrank is not None:
        found |= {"embed.AT": tensors.embed_lowrank.at, "embed.BT": tensors.embed_lowrank.bt}
    if tensors.prompt_embeds is not None:
        found["prompt.E"] = tensors.prompt_embeds
    if tensors.kv_prefix is not None:
        found |= {"prefix.K": tensors.kv_prefix.k, "prefix.V": tensors.kv_prefix.v}
    if tensors.head is not None:
        found |= {"lm_head.A": tensors.head.a, "lm_head.BT": tensors.head.bt}
        if tensors.head.bias is not None:
            found["lm_head.bias"] = tensors.head.bias
    return found
