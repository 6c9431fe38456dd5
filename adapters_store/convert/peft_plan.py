"""What one PEFT file will do, before anything is written: its modules in full, and what it does outside them.

Owns the agreement of config and file, in both directions, for every kind. Invariant: every declared module has its
tensors, every tensor is declared, and every value that is needed at once has been read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.base import HEAD, SITE_PATHS, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.model_factors import ModelFactors, ModelTuner
from adapters_store.convert.outer_tensors import EMBED, FINAL_NORM_PLACE, LN_PART
from adapters_store.convert.peft_config import PeftConfig
from adapters_store.convert.peft_tensors import MODEL_NAME, PeftTensors, TensorFile
from adapters_store.convert.saved_biases import with_biases
from adapters_store.convert.saved_modules import norm_path, read_saved_modules
from adapters_store.convert.tuner import PlannedModule
from adapters_store.errors import MissingLayers, NoTarget, UnsupportedAdapter
from adapters_store.ops import HEAD_LAYER

_SPLIT_SITES = {fused: tuple(SITE_PATHS[site] for site in sites) for fused, sites in FUSED_SITES.items()}
_FUSED_TYPES = frozenset({"phi3"})


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Linear layers by path, the head among them, and the rest of the model.

    `paths` are those of everything that the kind itself acts on, as the trained model names them.
    """

    modules: dict[str, PlannedModule]
    model: ModelFactors
    paths: tuple[str, ...]


def plan_adapter(config: PeftConfig, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> AdapterPlan:
    """Return the plan of a file whose tensors are grouped.

    Raises:
        NoTarget: the targets name nothing of this base. MissingLayers: a declared module lacks in the file.
        AdapterRefused: other tensors lack, are extra, or have other shapes than the config says.
    """
    _check_layers(config, tensors, base)
    planned = config.tuner.plan(tensors, base)
    model = config.tuner.read_model(tensors, file, base) if isinstance(config.tuner, ModelTuner) else ModelFactors()
    _check_complete(config, tensors, model, base)
    saved = read_saved_modules(config.saved, tensors, file, base)
    planned = with_biases(planned, tensors, base, config.bias)
    tensors.outer.refuse_rest()
    return AdapterPlan(planned, _joined(model, saved), tuple(sorted(_found(tensors, model))))


def _joined(model: ModelFactors, saved: ModelFactors) -> ModelFactors:
    for own, other in ((model.norms, saved.norms), (model.token_rows, saved.token_rows)):
        twice = own.keys() & other.keys()
        if twice:
            raise UnsupportedAdapter(f"the file trains {sorted(twice, key=str)[0]!s} twice", param="modules_to_save")
    rows = {**model.token_rows, **saved.token_rows}
    if "both" in rows and len(rows) > 1:
        raise UnsupportedAdapter(
            "the file trains rows of the tied embedding and head, and one of the two apart", param="modules_to_save"
        )
    return ModelFactors({**model.norms, **saved.norms}, rows, model.embedding, model.prompt, model.prefix)


def _check_layers(config: PeftConfig, tensors: PeftTensors, base: BaseDims) -> None:
    """Refuse layers that the base does not have, and modules of the file that the config does not declare."""
    targets = config.targets
    for number in targets.layers or ():
        if number >= base.num_hidden_layers:
            raise NoTarget(
                f"layers_to_transform names layer {number}; this base has {base.num_hidden_layers} layers",
                param="layers_to_transform",
            )
    places = [(path, None if module.layer == HEAD_LAYER else module.layer) for path, module in tensors.modules.items()]
    if places and not any(targets.is_target(path, layer) for path, layer in places):
        shown = "all-linear" if targets.names is None else ", ".join(targets.names)[:80]
        raise NoTarget(
            f"target_modules names nothing that the file holds: {shown}; it holds {places[0][0]}",
            param="target_modules",
        )
    for path, module in tensors.modules.items():
        is_head = module.layer == HEAD_LAYER
        if not is_head and module.layer >= base.num_hidden_layers:
            name = next(iter(module.parts.values())).name
            raise UnsupportedAdapter(
                f"{name} is for layer {module.layer}; this base has {base.num_hidden_layers} layers", param=name
            )
        if not targets.is_target(path, None if is_head else module.layer):
            raise UnsupportedAdapter(f"the file holds {path}, which the config does not target", param="target_modules")


def _check_complete(config: PeftConfig, tensors: PeftTensors, model: ModelFactors, base: BaseDims) -> None:
    """Refuse a config that targets nothing of this base, and a file that lacks a targeted module."""
    kind, targets = config.kind, config.targets
    if kind.acts_on == "prompt":
        return
    found, wanted = _found(tensors, model), _wanted(config, tensors, base)
    # rows of a tied embedding are the head's too
    also = {HEAD} if "both" in model.token_rows else set()
    lacking, extra = sorted(wanted - found - also), sorted(found - wanted)
    if not wanted:
        shown = "all-linear" if targets.names is None else ", ".join(targets.names)[:80]
        raise NoTarget(f"target_modules names nothing that is served of this base: {shown}", param="target_modules")
    if lacking:
        raise MissingLayers(f"the config targets {lacking[0]}, but the file has no tensors for it", param=lacking[0])
    if extra:
        raise UnsupportedAdapter(f"the file holds {extra[0]}, which the config does not target", param="target_modules")


def _found(tensors: PeftTensors, model: ModelFactors) -> set[str]:
    """Return the paths of everything that the kind itself acts on."""
    places = [FINAL_NORM_PLACE if layer < 0 else f"layers.{layer}.{norm_path(norm)}" for layer, norm in model.norms]
    if model.embedding is not None or model.token_rows.keys() & {"embed", "both"}:
        places.append(EMBED)
    heads = {HEAD} if "lm_head" in model.token_rows else set()
    return heads | tensors.modules.keys() | {f"{tensors.prefix}{place}" for place in places}


def _wanted(config: PeftConfig, tensors: PeftTensors, base: BaseDims) -> set[str]:
    """Return the paths of the base's modules that the config targets."""
    names: Iterable[str] = _spelling(tensors, base.model_type) if config.kind.acts_on == "linear" else ()
    outside = {f"{tensors.prefix}{EMBED}", HEAD} if config.kind.acts_on != "norms" else set()
    if config.kind.acts_on == "norms":
        # which other norms there are differs between bases: the file's own say what must be in every layer
        shown = {place.split(".", 2)[-1] for place, _ in tensors.outer.names(LN_PART)}
        names = {"input_layernorm", "post_attention_layernorm", *shown} - {FINAL_NORM_PLACE}
        outside = {f"{tensors.prefix}{FINAL_NORM_PLACE}"}
    targets = config.targets
    layers = range(base.num_hidden_layers)
    inside = {(layer, f"{tensors.prefix}layers.{layer}.{name}") for layer in layers for name in names}
    wanted = {path for layer, path in inside if targets.is_target(path, layer)}
    return wanted | {path for path in outside if targets.is_target(path, None)}


def _spelling(tensors: PeftTensors, model_type: str) -> list[str]:
    """Return the linear layers of one decoder layer as the trained model names them: fused like Phi-3, or split."""
    present = {module.module for module in tensors.modules.values()}
    names = ["self_attn.o_proj", "mlp.down_proj"]
    for fused, split in _SPLIT_SITES.items():
        if fused in present and present & set(split):
            raise UnsupportedAdapter(f"the file holds both {fused} and its parts", param=MODEL_NAME)
        is_fused = fused in present or (model_type in _FUSED_TYPES and not present & set(split))
        names += [fused] if is_fused else split
    return names
