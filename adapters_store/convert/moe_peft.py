"""MixLoRA, MoLA and LoRAMoE adapters (MoE-PEFT's own file) -> canonical mixtures.

Owns the names of their tensors, old and new. MixLoRA gates whole MLPs, mixed after the activation, and has plain LoRAs
on attention; MoLA gates every linear layer by itself; LoRAMoE those of the MLP, with all experts. Invariant: the
tensors are exactly those that the config declares.

Source: MoE-PEFT (TUDB-Labs, Apache 2.0), `moe_peft/model.py` and `adapters/`; MixLoRA's first files, its `misc/`.
"""

import json
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
    read_lora,
    refuse_unread,
    sites_of,
    split_sites,
    whole_shape,
)
from adapters_store.convert.lora_source import LoraSource
from adapters_store.convert.moe_config import LEGACY_TARGETS, MoeConfig, read_moe_config
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles, open_tensors, tensor_paths
from adapters_store.errors import InvalidOption, NoTarget, UnsupportedAdapter, WrongBase
from adapters_store.gates import GateOptions
from adapters_store.parts import MODEL_CONFIG_PART

KINDS = {"mixlora": "MIXLORA", "mola": "MOLA", "loramoe": "LORAMOE"}
_ALL = GateOptions(select_all=True, weight="softmax_all")
_RENORMED = GateOptions(weight="softmax_all_renorm")
_LEGACY_NAMES = {new: old for old, new in LEGACY_TARGETS.items()}


def convert_moe(source: Path, target: Path, options: ConvertOptions, name: str) -> None:
    """Convert an adapter of the format `name`, one of `KINDS`; raises AdapterRefused."""
    if options.declared.options:
        key = sorted(options.declared.options)[0]
        raise InvalidOption(f"format {name} has no option {key[:80]!a}; adapter_config.json says all", param="options")
    with _open(source, options, name) as opened:
        config, loras = opened.config, opened.loras
        model_ops, values = model_ops_of(loras)
        foreign = Foreign(
            family="mixlora" if name == "mixlora" else "mixture",
            source_format=f"moe-peft/{config.kind}",
            sites=sites_of(loras, opened.model, options.base),
            model_ops=model_ops,
            model_values=values,
            experts=tuple(f"expert-{index}" for index in range(loras.num_experts)),
            recorded=config.recorded,
            ignored=config.ignored + opened.unused,
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_moe(source: Path, options: ConvertOptions, name: str) -> Iterator[SourceModel]:
    """Open an adapter that was converted before as its own forward."""
    with _open(source, options, name) as opened:
        yield opened.model


@dataclass(frozen=True, slots=True)
class _Opened:
    config: MoeConfig
    loras: Loras
    unused: tuple[str, ...]
    model: SourceModel


@contextmanager
def _open(source: Path, options: ConvertOptions, name: str) -> Iterator[_Opened]:
    config = read_moe_config(source, KINDS[name])
    _check_activation(config, options.base_dir)
    with open_tensors(tensor_paths(source), (f"{name}.layers.",)) as files:
        reader = _Reader(files, config, options.base)
        loras = reader.loras()
        refuse_unread(files, reader.used)
        yield _Opened(config, loras, tuple(reader.unused), LoraSource(loras))


def _check_activation(config: MoeConfig, base_dir: str | None) -> None:
    """Refuse a mixture of MLPs with another activation than the base's; raises UnsupportedAdapter, WrongBase."""
    if config.act_fn is None or config.kind != "MIXLORA":
        return
    if base_dir is None:
        raise WrongBase("the config's act_fn is compared with the base, which is not at hand: name it with --base")
    outer = json.loads((Path(base_dir) / MODEL_CONFIG_PART).read_text(encoding="utf-8"))
    inner = outer.get("text_config") or outer
    own = inner.get("hidden_activation") or inner.get("hidden_act") or "silu"
    if config.act_fn != own and {config.act_fn, own} != {"silu", "swish"}:
        raise UnsupportedAdapter(
            f"act_fn is {config.act_fn[:40]!a}; the base's MLP has {str(own)[:40]!a}: train with the base's own",
            param="act_fn",
        )


class _Reader:
    """The tensors that the config declares, and those of them that were found."""

    def __init__(self, files: TensorFiles, config: MoeConfig, base: BaseDims) -> None:
        self._files = files
        self._config = config
        self._base = base
        self.used: set[str] = set()
        # gates that weigh nothing, by name
        self.unused: list[str] = []

    def loras(self) -> Loras:
        """Return all LoRAs; raises CorruptUpload, UnsupportedAdapter, NoTarget."""
        sites: list[SiteLoras] = []
        mlps: list[MlpLoras] = []
        targets = {name: parts for name in self._config.targets if (parts := split_sites(name, self._base))}
        unknown = sorted(self._config.targets - targets.keys())
        if unknown:
            raise NoTarget(
                f"target_modules names {unknown[0][:80]!a}, which this base does not have", param="target_modules"
            )
        for layer in range(self._base.num_hidden_layers):
            whole: dict[str, tuple[Lora, ...]] = {}
            for name in sorted(targets):
                parts = targets[name]
                path = SITE_PATHS[parts[0][0]].rpartition(".")[0]
                if self._config.kind == "MIXLORA" and path == "mlp":
                    for site, rows in parts:
                        whole[site] = self._experts(layer, name, parts, rows)
                elif self._config.kind == "MOLA" or path == "mlp":
                    sites += self._gated(layer, f"{path}.{name}", name, parts)
                else:
                    sites += [
                        SiteLoras(layer, site, (self._lora(f"{layer}.{path}.{name}", parts, rows),))
                        for site, rows in parts
                    ]
            if self._config.kind == "MIXLORA":
                mlps += self._mlp(layer, whole)
        return Loras(tuple(sites), tuple(mlps))

    def _mlp(self, layer: int, sites: dict[str, tuple[Lora, ...]]) -> list[MlpLoras]:
        gate = self._gate(f"{layer}.mlp.moe_gate.weight", f"{layer}.gate.weight", self._base.hidden_size)
        if not sites:
            # every expert is the base's own MLP
            self.unused.append(gate)
            return []
        rule = Rule(self._config.top_k, 1.0, _RENORMED)
        return [MlpLoras(layer, sites, rule, lambda: self._files.floats(gate), is_whole=True)]

    def _gated(self, layer: int, path: str, name: str, parts: list[tuple[str, slice]]) -> list[SiteLoras]:
        gate = self._gate(f"{layer}.{path}.moe_gate.weight", "", whole_shape(parts, self._base)[1])
        rule = Rule(0, 1.0, _ALL) if self._config.kind == "LORAMOE" else Rule(self._config.top_k)
        return [
            SiteLoras(layer, site, self._experts(layer, name, parts, rows), rule, lambda: self._files.floats(gate))
            for site, rows in parts
        ]

    def _experts(self, layer: int, name: str, parts: list[tuple[str, slice]], rows: slice) -> tuple[Lora, ...]:
        folder = SITE_PATHS[parts[0][0]].rpartition(".")[0]
        loras = []
        for expert in range(self._config.num_experts):
            stems = [f"{layer}.{folder}.{name}.experts.{expert}", f"{layer}.experts.{expert}.{name}"]
            stems.append(f"{layer}.experts.{expert}.{_LEGACY_NAMES.get(name, name)}")
            found = [stem for stem in stems if f"{stem}.lora_A.weight" in self._files.names]
            loras.append(self._lora(found[0] if found else stems[0], parts, rows, is_expert=True))
        return tuple(loras)

    def _lora(self, stem: str, parts: list[tuple[str, slice]], rows: slice, *, is_expert: bool = False) -> Lora:
        config = self._config
        rank, scaling = (config.expert_rank, config.expert_scaling) if is_expert else (config.rank, config.scaling)
        self.used |= {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
        return read_lora(self._files, stem, whole_shape(parts, self._base), rows, rank, scaling)

    def _gate(self, name: str, legacy: str, num_in: int) -> str:
        own = legacy if legacy in self._files.names else name
        self._files.need_shape(own, (self._config.num_experts, num_in))
        self.used.add(own)
        return own
