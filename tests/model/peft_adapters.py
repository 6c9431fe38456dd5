"""LoRA adapters made by PEFT on the tiny models, in PEFT's own form and as an adapter image for the decoder.

Owns the way from PEFT's modules to base-neutral sites, fused projections included, independent of the store's
converter. `SlowDelta` is the definition in plain loops.
"""

from dataclasses import dataclass

import peft
import torch
from torch import Tensor

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES, BaseLinear
from adapter_kernels.image import AdapterImage, SiteRows
from adapter_kernels.profile import Profile
from adapter_kernels.route import Placement, build_route
from adapter_kernels.slab import Slab
from adapters_store.base import SITES, BaseDims

_SPLIT_TARGETS = list(SITES)
_FUSED_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@dataclass(frozen=True)
class SiteWeights:
    """a [R, in], bt [R, out] with the scaling in it, bias [out] or None."""

    a: Tensor
    bt: Tensor
    bias: Tensor | None


Sites = dict[tuple[int, str], SiteWeights]


def add_lora(
    model: torch.nn.Module, *, rank: int, seed: int, bias: bool = False, fused: bool = False
) -> torch.nn.Module:
    """Wrap the model with a random LoRA on every linear layer of every decoder layer."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_bias=bias,
        target_modules=_FUSED_TARGETS if fused else _SPLIT_TARGETS,
        rank_pattern={"o_proj": rank + 3},
        task_type="CAUSAL_LM",
    )
    wrapped: torch.nn.Module = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return wrapped.eval()


def read_sites(model: torch.nn.Module, dims: BaseDims) -> Sites:
    """Collect the adapter's weights by layer and base-neutral site; a fused module's rows are cut apart."""
    sites: Sites = {}
    for path, module in model.named_modules():
        if "lora_A" not in dict(module.named_children()):
            continue
        layer, target = int(path.split(".layers.")[1].split(".")[0]), path.rsplit(".", 1)[1]
        down, up = module.lora_A["default"], module.lora_B["default"]
        scaling: float = module.scaling["default"]
        bt = up.weight.detach().T * scaling
        bias = None if up.bias is None else up.bias.detach() * scaling
        begin = 0
        for site in _members(target):
            end = begin + dims.site_shape(site)[0]
            own_bias = None if bias is None else bias[begin:end]
            sites[layer, site] = SiteWeights(down.weight.detach(), bt[:, begin:end], own_bias)
            begin = end
    return sites


def _members(target: str) -> tuple[str, ...]:
    return {"qkv_proj": FUSED_SITES["qkv"], "gate_up_proj": FUSED_SITES["gate_up"]}.get(target, (target,))


class SlowDelta:
    """`AdapterDelta` in loops over rows and sites: row t has the adapter when `has_adapter[t]`."""

    model = None

    def __init__(self, sites: Sites, dims: BaseDims, has_adapter: list[bool]) -> None:
        self._sites = sites
        self._dims = dims
        self._has_adapter = has_adapter

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        y = base(x)
        begin = 0
        for member in FUSED_SITES[site]:
            end = begin + self._dims.site_shape(member)[0]
            weights = self._sites[layer, member]
            for t in range(x.shape[0]):
                if self._has_adapter[t]:
                    y[t, begin:end] += (x[t] @ weights.a.T) @ weights.bt
                    if weights.bias is not None:
                        y[t, begin:end] += weights.bias
            begin = end
        return y


def cpu_delta(sites: Sites, dims: BaseDims, counts: list[int], has_adapter: list[bool]) -> CpuDelta:
    """The real CPU path for a step of sequences with `counts` rows each."""
    shapes = {site: dims.site_shape(site) for site in SITES}
    image = _pack(sites, shapes)
    slab = Slab(Profile.of(image), shapes, torch.float32)
    slab.write(5, image)
    place = Placement(0, slab, 5)
    return CpuDelta(build_route([place if has else None for has in has_adapter], counts))


def _pack(sites: Sites, shapes: dict[str, tuple[int, int]]) -> AdapterImage:
    chunks: list[Tensor] = []
    rows = []
    num_bytes = 0

    def put(tensor: Tensor) -> int:
        nonlocal num_bytes
        begin = num_bytes
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        chunks.extend([raw, torch.zeros(-raw.numel() % 128, dtype=torch.uint8)])
        num_bytes += raw.numel() + chunks[-1].numel()
        return begin

    for (layer, site), weights in sorted(sites.items(), key=lambda item: (item[0][0], SITES.index(item[0][1]))):
        bias_offset = None if weights.bias is None else put(weights.bias)
        a, bt = put(weights.a), put(weights.bt)
        rows.append(SiteRows(layer, site, (weights.a.shape[0],), a, bt, bias_offset))
    return AdapterImage(torch.cat(chunks), torch.float32, tuple(rows), shapes)
