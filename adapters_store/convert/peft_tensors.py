"""The tensors of a PEFT LORA file, grouped by the module they act on.

Owns the names that PEFT gives tensors, and the reading of one tensor at a time; knows nothing of scaling. Invariant:
every tensor of the file belongs to exactly one module, or the file is refused.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.errors import CorruptUpload, NonFiniteValues, UnsupportedAdapter
from adapters_store.float_bits import Float32, decode, is_finite
from adapters_store.safetensors_header import Header, TensorSlot

MODEL_NAME = "adapter_model.safetensors"

# fused linear layers of Phi-3 checkpoints: the sites whose rows they stack, in order
FUSED_SITES = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
SITES_OF = {path: (site,) for site, path in SITE_PATHS.items()} | FUSED_SITES

_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<path>(?P<prefix>|model\.|language_model\.|language_model\.model\.|model\.language_model\.)"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<module>[a-z_]+\.[a-z_]+))"
    r"\.lora_(?P<matrix>A|B)(?:\.default)?\.(?P<kind>weight|bias)\Z"
)
_FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module of the trained model: `path` as PEFT knew it, `module` without the layer, and its tensors."""

    path: str
    layer: int
    module: str
    a: TensorSlot
    b: TensorSlot
    bias: TensorSlot | None

    @property
    def sites(self) -> tuple[str, ...]:
        """The base's sites whose rows this module stacks."""
        return SITES_OF[self.module]


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """All modules of a file by path, and the prefix that their paths share (`model.` as a rule)."""

    modules: dict[str, LoraModule]
    prefix: str


def group_tensors(header: Header, *, lora_bias: bool) -> LoraTensors:
    """Sort the file's tensors into modules.

    Raises:
        UnsupportedAdapter: a tensor that is not a LoRA matrix of a decoder layer. CorruptUpload: one lacks or repeats.
    """
    found: dict[str, dict[str, TensorSlot]] = {}
    matches: dict[str, re.Match[str]] = {}
    for slot in header.tensors:
        match = _match(slot)
        path = match["path"]
        matches[path] = match
        part = "bias" if match["kind"] == "bias" else match["matrix"]
        if part in found.setdefault(path, {}):
            raise CorruptUpload(f"the file holds {path}.lora_{match['matrix']} twice", param=slot.name)
        found[path][part] = slot
    prefixes = {match["prefix"] for match in matches.values()}
    if len(prefixes) > 1:
        raise UnsupportedAdapter("the tensors name modules of more than one model", param=MODEL_NAME)
    modules = {path: _module(match, found[path], lora_bias=lora_bias) for path, match in matches.items()}
    return LoraTensors(modules=modules, prefix=prefixes.pop())


def read_tensor(file: BinaryIO, data_start: int, slot: TensorSlot) -> Float32:
    """Read one tensor as float32.

    Raises:
        NonFiniteValues: it holds NaN or infinity.
    """
    file.seek(data_start + slot.begin)
    raw = file.read(slot.end - slot.begin)
    if not is_finite(raw, slot.dtype):
        raise NonFiniteValues(f"tensor {slot.name} holds NaN or infinity", param=slot.name)
    return decode(raw, slot.dtype).reshape(slot.shape)


def check_shapes(module: LoraModule, rank: int, base: BaseDims) -> None:
    """Compare a module's tensors with its rank in the config and with the base.

    Raises:
        UnsupportedAdapter: they differ; `param` is the tensor.
    """
    shapes = [base.site_shape(site) for site in module.sites]
    num_in, num_out = shapes[0][1], sum(shape[0] for shape in shapes)
    wanted: list[tuple[TensorSlot, tuple[int, ...]]] = [(module.a, (rank, num_in)), (module.b, (num_out, rank))]
    if module.bias is not None:
        wanted.append((module.bias, (num_out,)))
    for slot, shape in wanted:
        if slot.shape != shape:
            raise UnsupportedAdapter(
                f"{slot.name} has shape {list(slot.shape)}; the config's rank {rank} and this base need {list(shape)}. "
                "Was the adapter trained for another base?",
                param=slot.name,
            )


def _match(slot: TensorSlot) -> re.Match[str]:
    match = _TENSOR_NAME.match(slot.name)
    if match is None or match["module"] not in SITES_OF or (match["matrix"], match["kind"]) == ("A", "bias"):
        raise UnsupportedAdapter(
            f"{slot.name} is not a LoRA matrix of a linear layer that is served: "
            "q, k, v, o, gate, up and down projections of decoder layers",
            param=slot.name,
        )
    if slot.dtype not in _FLOATS:
        raise UnsupportedAdapter(f"{slot.name} has dtype {slot.dtype}; read here: F32, F16, BF16", param=slot.name)
    return match


def _module(match: re.Match[str], parts: dict[str, TensorSlot], *, lora_bias: bool) -> LoraModule:
    path = match["path"]
    lacking = [part for part in ("A", "B") if part not in parts]
    if lacking:
        raise CorruptUpload(f"the file has no lora_{lacking[0]}.weight for {path}", param=path)
    if lora_bias and "bias" not in parts:
        raise CorruptUpload(f"lora_bias is true but the file has no lora_B.bias for {path}", param=path)
    if not lora_bias and "bias" in parts:
        raise UnsupportedAdapter(f"the file has a lora_B.bias for {path} but lora_bias is not true", param="lora_bias")
    return LoraModule(
        path=path,
        layer=int(match["layer"]),
        module=match["module"],
        a=parts["A"],
        b=parts["B"],
        bias=parts.get("bias"),
    )
