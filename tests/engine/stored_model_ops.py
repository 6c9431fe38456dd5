"""Canonical adapters of ops that no slab packs, written and opened by the store's own code.

Owns the way from tensors to files, for tests that need an adapter without any source format.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras
from adapter_kernels.model_image import MlpGate, ModelTensors
from adapters_store.base import SITES, BaseDims
from adapters_store.canonical import check_adapter
from adapters_store.convert.adapter_writer import write_image, write_manifest
from adapters_store.gates import GateOptions
from adapters_store.group_gates import GroupGate
from adapters_store.manifest import Manifest, Source
from adapters_store.model_ops import EmbedLowrank, KvPrefix, ModelOps, NormWeight, PromptEmbeds, TokenRows
from adapters_store.ops import Module, head_module


def store_adapter(root: Path, extras: AdapterExtras, base: BaseDims) -> str:
    """Write an adapter in float32 under `root/objects` and return its digest."""
    tensors = extras.model or ModelTensors()
    ops, found = _model_ops(tensors), _named(tensors)
    modules = [*_experts(extras, ops, found)]
    if tensors.head is not None:
        modules.append(head_module(tensors.head.a.shape[0], has_bias=tensors.head.bias is not None))
    modules.sort()
    staged = root / "staged"
    staged.mkdir()
    written = write_image(
        staged, tuple(modules), base, "float32", lambda name: found[name].contiguous().numpy().tobytes(), ops
    )
    names = tuple(f"expert-{i}" for i in range(max((gate.num_experts for gate in ops.gates), default=0)))
    manifest = Manifest(
        family="model",
        base=base,
        dtype="float32",
        file_bytes=written.num_bytes,
        file_sha256=written.sha256,
        modules=tuple(modules),
        source=Source("by hand", {}, {}, (), 0.0),
        experts=names,
        model_ops=ops,
    )
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
        gates=tuple(_gate(layer, gate) for layer, gate in sorted(tensors.gates.items())),
    )


def _gate(layer: int, gate: MlpGate) -> GroupGate:
    mixture = gate.mixture
    options = GateOptions(
        mixture.options.in_norm, mixture.options.logit, has_bias=gate.bias is not None, weight=mixture.options.weight
    )
    return GroupGate(layer, mixture.num_experts, mixture.top_k, mixture.temperature, options, gate.is_ffn_moe)


def _experts(extras: AdapterExtras, ops: ModelOps, found: dict[str, Tensor]) -> Iterator[Module]:
    """Yield the modules that follow gates, and name their tensors."""
    gates = {gate.layer: gate for gate in ops.gates}
    for (layer, site), rare in extras.sites.items():
        if rare.experts is not None:
            experts = gates[layer].experts(rare.experts.ranks)
            module = Module(layer, SITES.index(site), 0, has_bias=False, experts=experts)
            found |= {module.tensor("A"): rare.experts.a, module.tensor("BT"): rare.experts.bt}
            yield module


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
    for layer, gate in tensors.gates.items():
        found[f"L{layer}.mlp.G"] = gate.weight
        if gate.bias is not None:
            found[f"L{layer}.mlp.Gb"] = gate.bias
    if tensors.head is not None:
        found |= {"lm_head.A": tensors.head.a, "lm_head.BT": tensors.head.bt}
        if tensors.head.bias is not None:
            found["lm_head.bias"] = tensors.head.bias
    return found
