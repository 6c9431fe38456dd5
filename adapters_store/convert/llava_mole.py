"""LLaVA-MoLE checkpoint (`.pt`): the experts of its language model's MLPs and the LoRA on attention.

Owns its names. Per MLP one router of its input, with bias, chooses for all three linear layers: the best expert alone
with weight one (`routing` top1, as in the paper), or all by softmax (`dense`, as its inference script has it). What it
trained of the vision side acts on images only and is named in `ignored`. Invariant: of the language model nothing is
left unread.

Source: forwchen/LLaVA-MoLE, `moe.py` and `model.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora_mixtures import (
    Lora,
    Loras,
    MlpLoras,
    Rule,
    SiteLoras,
    model_ops_of,
    refuse_unread,
    sites_of,
)
from adapters_store.convert.lora_source import LoraSource
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles, open_tensors, tensor_paths
from adapters_store.errors import CorruptUpload, MissingLayers
from adapters_store.gates import GateOptions
from adapters_store.strict_json import Json

_PREFIXES = tuple(
    f"{outer}{inner}layers."
    for outer in ("state_dict.llm_model.", "llm_model.", "state_dict.", "")
    for inner in ("base_model.model.model.", "model.")
)
_BLIND = ("vit.", "in_adaptor.")
_PARTS = {"gate_proj": "moe_gate", "up_proj": "moe_up", "down_proj": "moe_down"}
_RULES = {
    "top1": Rule(1, 1.0, GateOptions(weight="one", has_bias=True)),
    "dense": Rule(0, 1.0, GateOptions(select_all=True, weight="softmax_all", has_bias=True)),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class _Opened:
    loras: Loras
    ignored: tuple[str, ...]
    recorded: dict[str, Json]


def convert_llava_mole(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the checkpoint in `source`; raises AdapterRefused."""
    with _open(source, options) as opened:
        model_ops, values = model_ops_of(opened.loras)
        foreign = Foreign(
            family="mixture",
            source_format="llava-mole/official",
            sites=sites_of(opened.loras, LoraSource(opened.loras), options.base),
            model_ops=model_ops,
            model_values=values,
            experts=tuple(f"expert-{index}" for index in range(opened.loras.num_experts)),
            recorded=opened.recorded,
            ignored=opened.ignored,
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_llava_mole(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a checkpoint that was converted before as its own forward."""
    with _open(source, options) as opened:
        yield LoraSource(opened.loras)


@contextmanager
def _open(source: Path, options: ConvertOptions) -> Iterator[_Opened]:
    values = OptionValues("a LLaVA-MoLE checkpoint", options.declared.options, ("alpha", "routing"))
    alpha = values.number("alpha", "lora_alpha of its LoRAs: 32 for the released llava_mole_r16_a32_e3")
    routing = values.choice("routing", "top1: one expert per token, as in the paper; dense: all by softmax", _RULES)
    with open_tensors(tensor_paths(source), _PREFIXES) as files:
        blind = {name for name in files.names if name.removeprefix("state_dict.").startswith(_BLIND)}
        reader = _Reader(files, alpha, _RULES[routing], options.base)
        loras = reader.loras()
        refuse_unread(files, reader.used | blind)
        parts = sorted({name.removeprefix("state_dict.").partition(".")[0] for name in blind})
        yield _Opened(loras, tuple(f"{part}.*" for part in parts), values.recorded)


class _Reader:
    """The tensors of the language model, and those of them that were read."""

    def __init__(self, files: TensorFiles, alpha: float, rule: Rule, base: BaseDims) -> None:
        self._files = files
        self._alpha = alpha
        self._rule = rule
        self._base = base
        self.used: set[str] = set()

    def loras(self) -> Loras:
        """Return every layer's experts and LoRAs; raises CorruptUpload, MissingLayers."""
        sites: list[SiteLoras] = []
        mlps: list[MlpLoras] = []
        for layer in range(self._base.num_hidden_layers):
            for site in _ATTENTION:
                stem = f"{layer}.{SITE_PATHS[site]}"
                for middle in (".default", ""):
                    if f"{stem}.lora_A{middle}.weight" in self._files.names:
                        lora = self._lora(site, f"{stem}.lora_A{middle}.weight", f"{stem}.lora_B{middle}.weight")
                        sites.append(SiteLoras(layer, site, (lora,)))
            if f"{layer}.mlp.router.weight" in self._files.names:
                mlps.append(self._mlp(layer))
        if mlps and len(mlps) < self._base.num_hidden_layers:
            raise MissingLayers(
                f"the checkpoint holds routers of {len(mlps)} layers; this base has {self._base.num_hidden_layers}",
                param="router",
            )
        if not mlps:
            raise CorruptUpload("the checkpoint holds no mlp.router of a layer", param="router")
        return Loras(tuple(sites), tuple(mlps))

    def _mlp(self, layer: int) -> MlpLoras:
        gate, bias = f"{layer}.mlp.router.weight", f"{layer}.mlp.router.bias"
        shape = self._files.shape(gate)
        num_experts = shape[0] if shape else 0
        self._files.need_shape(gate, (num_experts, self._base.hidden_size))
        self._files.need_shape(bias, (num_experts,))
        self.used |= {gate, bias}
        experts = {
            site: tuple(
                self._lora(site, f"{layer}.mlp.{part}.{e}.lora_A", f"{layer}.mlp.{part}.{e}.lora_B")
                for e in range(num_experts)
            )
            for site, part in _PARTS.items()
        }
        return MlpLoras(
            layer,
            experts,
            self._rule,
            lambda: self._files.floats(gate),
            is_whole=False,
            bias=lambda: self._files.floats(bias),
        )

    def _lora(self, site: str, a: str, b: str) -> Lora:
        num_out, num_in = self._base.site_shape(site)
        shape = self._files.shape(a)
        rank = shape[0] if shape else 0
        self._files.need_shape(a, (rank, num_in))
        self._files.need_shape(b, (num_out, rank))
        self.used |= {a, b}
        return Lora(rank, self._alpha / max(rank, 1), lambda: self._files.floats(a), lambda: self._files.floats(b))
