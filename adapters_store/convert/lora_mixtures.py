"""Low-rank experts as foreign files hold them, one after the other, and how they become one module each.

Owns the folding of scalings and the order of experts; which tensors they are is each format's file. Invariant: every
value of a B meets its scaling once, in float64, and is rounded to float32 once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from adapters_store.base import SITES, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.foreign import Site, Values
from adapters_store.convert.site_effect import Float64
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.gates import METEORA_GATE, Experts, GateOptions
from adapters_store.group_gates import GroupGate
from adapters_store.model_ops import ModelOps
from adapters_store.ops import Module

ReadFloats = Callable[[], Float32]


@dataclass(frozen=True, slots=True)
class Lora:
    """One product `scaling * b a` of a file: a() is [rank, in], b() [out, rank], the site's own rows of it."""

    rank: int
    scaling: float
    a: ReadFloats
    b: ReadFloats


@dataclass(frozen=True, slots=True)
class Rule:
    """How a gate chooses and weighs, as `GateOptions` spells it; `top_k` 0 stands for all experts."""

    top_k: int = 1
    temperature: float = 1.0
    options: GateOptions = METEORA_GATE

    def experts(self, ranks: tuple[int, ...]) -> Experts:
        """Return what a module says of experts of these ranks."""
        return Experts(ranks, len(ranks) if self.options.select_all else self.top_k, self.temperature, self.options)


@dataclass(frozen=True, slots=True)
class SiteLoras:
    """The LoRAs of one linear layer: one without a rule, or experts behind their own gate [experts, in]."""

    layer: int
    site: str
    loras: tuple[Lora, ...]
    rule: Rule | None = None
    gate: ReadFloats | None = None


@dataclass(frozen=True, slots=True)
class MlpLoras:
    """The experts of one MLP behind one gate of its input; `is_whole`: whole MLPs, mixed after the activation."""

    layer: int
    sites: dict[str, tuple[Lora, ...]]
    rule: Rule
    gate: ReadFloats
    is_whole: bool
    bias: ReadFloats | None = None

    def group(self) -> GroupGate:
        """Return the gate as the image holds it."""
        num_experts = len(next(iter(self.sites.values())))
        top_k = num_experts if self.rule.options.select_all else self.rule.top_k
        options = replace(self.rule.options, has_bias=self.bias is not None)
        return GroupGate(self.layer, num_experts, top_k, self.rule.temperature, options, self.is_whole)


@dataclass(frozen=True, slots=True)
class Loras:
    """All LoRAs of an adapter."""

    sites: tuple[SiteLoras, ...] = ()
    mlps: tuple[MlpLoras, ...] = ()

    @property
    def num_experts(self) -> int:
        """Experts of the widest mixture; 0 without any."""
        widths = [len(site.loras) for site in self.sites if site.rule is not None]
        widths += [len(loras) for mlp in self.mlps for loras in mlp.sites.values()]
        return max(widths, default=0)


def scaling_of(alpha: float, rank: int, *, is_stabilised: bool) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return alpha / math.sqrt(rank) if is_stabilised else alpha / rank


def read_lora(files: TensorFiles, stem: str, shape: tuple[int, int], rows: slice, rank: int, scaling: float) -> Lora:
    """Return the LoRA of `STEM.lora_A.weight` [rank, in] and `STEM.lora_B.weight` [all out, rank].

    Args:
        shape: (out, in) of the whole layer of the file; rows: those of one site.
    Raises:
        CorruptUpload: a tensor is missing. UnsupportedAdapter: its shape is another.
    """
    num_out, num_in = shape
    files.need_shape(f"{stem}.lora_A.weight", (rank, num_in))
    files.need_shape(f"{stem}.lora_B.weight", (num_out, rank))
    return Lora(
        rank,
        scaling,
        lambda: files.floats(f"{stem}.lora_A.weight"),
        lambda: files.floats(f"{stem}.lora_B.weight")[rows],
    )


def split_sites(name: str, base: BaseDims) -> list[tuple[str, slice]]:
    """Return the sites of a linear layer by its own name, fused or not, each with its rows; none: not one of ours."""
    fused = {path.rpartition(".")[2]: sites for path, sites in FUSED_SITES.items()}
    begin, parts = 0, []
    for site in fused.get(name, (name,) if name in SITES else ()):
        end = begin + base.site_shape(site)[0]
        parts.append((site, slice(begin, end)))
        begin = end
    return parts


def whole_shape(parts: list[tuple[str, slice]], base: BaseDims) -> tuple[int, int]:
    """Return (out, in) of a linear layer that `split_sites` split."""
    return parts[-1][1].stop, base.site_shape(parts[0][0])[1]


def refuse_unread(files: TensorFiles, used: Iterable[str]) -> None:
    """Refuse a file with a tensor that no rule of its format reads; raises UnsupportedAdapter."""
    extra = sorted(files.names - set(used))
    if extra:
        raise UnsupportedAdapter(
            f"the file holds {extra[0]}, which the config does not declare or this format does not have", param=extra[0]
        )


def sites_of(loras: Loras, source: SourceModel, base: BaseDims) -> tuple[Site, ...]:
    """Return every module as it is served, proven by `source`, the file's own forward."""
    sites = [_site(each, source, base) for each in loras.sites]
    for mlp in loras.mlps:
        group = mlp.group()
        for site, own in mlp.sites.items():
            module = _module(mlp.layer, site, experts=group.experts(tuple(lora.rank for lora in own)))
            # its experts are mixed outside the layer: the whole model is compared when the adapter is admitted
            sites.append(Site(module, _reader(SiteLoras(mlp.layer, site, own))))
    return tuple(sites)


def model_ops_of(loras: Loras) -> tuple[ModelOps, dict[str, Callable[[], Values]]]:
    """Return the gates of whole MLPs and their values."""
    groups = {mlp.group(): mlp for mlp in sorted(loras.mlps, key=lambda mlp: mlp.layer)}
    values: dict[str, Callable[[], Values]] = {}
    for group, mlp in groups.items():
        values[group.tensor("G")] = mlp.gate
        if mlp.bias is not None:
            values[group.tensor("Gb")] = mlp.bias
    return ModelOps(gates=tuple(groups)), values


def _site(own: SiteLoras, source: SourceModel, base: BaseDims) -> Site:
    num_out, num_in = base.site_shape(own.site)

    def apply(x: Float64) -> tuple[Float64, Float64]:
        y = source.linear(own.layer, own.site, x, np.zeros((num_out, num_in)), None)
        size = np.zeros((len(x), num_out))
        for lora in own.loras:
            size += lora.scaling * (np.abs(x) @ np.abs(lora.a().astype(np.float64)).T) @ np.abs(lora.b()).T
        return y.astype(np.float64), size

    gate = own.gate
    if own.rule is None or gate is None:
        return Site(_module(own.layer, own.site, rank=own.loras[0].rank), _reader(own), apply)
    experts = own.rule.experts(tuple(lora.rank for lora in own.loras))
    options = own.rule.options

    def logits(x: Float64) -> Float64:
        found: Float64 = normed(x, options.in_norm) @ gate().astype(np.float64).T
        return np.abs(found) if options.logit == "abs" else found

    return Site(_module(own.layer, own.site, experts=experts), _reader(own), apply, logits)


def normed(x: Float64, kind: str) -> Float64:
    """Return what a gate reads of rows x [T, in], by the name of its norm."""
    if kind == "layernorm_noaffine":
        centred = x - np.mean(x, axis=1, keepdims=True)
        return np.asarray(centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-5))
    if kind == "unit":
        return np.asarray(x / np.maximum(np.sqrt(np.sum(x**2, axis=1, keepdims=True)), 1e-12))
    return x


def _module(layer: int, site: str, *, rank: int = 0, experts: Experts | None = None) -> Module:
    return Module(layer, SITES.index(site), rank, has_bias=False, experts=experts)


def _reader(own: SiteLoras) -> Callable[[str], Values]:
    def read(kind: str) -> Values:
        if kind == "G":
            assert own.gate is not None, "only a module with a gate of its own asks for it"
            return own.gate()
        if kind == "A":
            return np.concatenate([lora.a() for lora in own.loras])
        # every expert's scaling in its own rank rows
        return np.concatenate([_scaled(lora) for lora in own.loras])

    return read


def _scaled(lora: Lora) -> Float32:
    with np.errstate(over="ignore"):
        return (lora.b().T.astype(np.float64) * lora.scaling).astype(np.float32)
