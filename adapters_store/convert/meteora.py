"""MeteoRA checkpoint (a whole PEFT model with gates, base included) -> canonical adapter of gated experts.

Owns the official key layout: per linear layer `lora_A [sum r, in]` and `lora_B [out, sum r]` concatenated by expert,
`moe_gate [experts, in]`, and the base's own tensors, which must be the served base bit by bit. Runs in the converter
process. Invariant: each expert's scaling is folded into its B in float32 exactly once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.convert.adapter_writer import encode_values, write_image, write_manifest
from adapters_store.convert.expert_loras import expert_names
from adapters_store.convert.frozen_tensors import compare_config, compare_frozen, compare_tensor
from adapters_store.convert.meteora_options import MeteoraOptions, fill_from_experts, read_options
from adapters_store.convert.model_files import ModelFiles, file_hashes, open_model
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.site_effect import Float64, SourceEffect, measure_effect
from adapters_store.convert.tensor_files import unread_keys
from adapters_store.errors import CorruptUpload, UnsupportedAdapter, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.gates import Experts, check_experts
from adapters_store.manifest import IMAGE_NAME, Manifest, Module, Source, check_expert_names
from adapters_store.parts import WEIGHTS_PART
from adapters_store.safetensors_header import CANONICAL_LIMITS, EXTERNAL_LIMITS

_GATE, _A, _B = "moe_gate.weight", "lora_A.weight", "lora_B.weight"
_OWN = (_GATE, _A, _B)
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True, slots=True)
class _Foreign:
    """The open checkpoint and how its experts act."""

    files: ModelFiles
    options: MeteoraOptions

    def stem(self, module: Module) -> str:
        """Return the module's name in the checkpoint."""
        return f"layers.{module.layer}.{SITE_PATHS[module.site]}"

    def scaled_b(self, module: Module) -> Float32:
        """Return B [out, sum r] with every expert's scaling in it."""
        options = self.options
        scaling = np.repeat(np.array(options.scalings, dtype=np.float32), options.ranks)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.files.values(f"{self.stem(module)}.{_B}") * scaling

    def encoded(self, module: Module, kind: str, dtype: str) -> bytes:
        """Return one tensor of the image, rounded once."""
        name = {"G": _GATE, "A": _A, "BT": _B}[kind]
        values = self.scaled_b(module).T if kind == "BT" else self.files.values(f"{self.stem(module)}.{name}")
        return encode_values(values, dtype, f"{self.stem(module)}.{name}")


def is_meteora(source: Path) -> bool:
    """Return whether the checkpoint in this folder has MeteoRA's gates."""
    with open_model(source, EXTERNAL_LIMITS, is_trusted=False) as files:
        return any(name.endswith(f".{_GATE}") for name in (*files.names, *files.others))


def convert_meteora(source: Path, target: Path, options: ConvertOptions) -> None:
    """Read the checkpoint in the folder `source`, write the adapter into the folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    with open_model(source, EXTERNAL_LIMITS, is_trusted=False) as files:
        sites = _sites(files, options.base)
        declared = fill_from_experts(options.declared.options, source, options.base.model_type)
        foreign = _Foreign(files, read_options(declared, _num_experts(files, sites)))
        modules = _modules(foreign, sites, options)
        ignored = _compare_base(source, files, modules, options)
        # the mixture was trained on from the LoRAs: their own tensors are older than the checkpoint's
        ignored += tuple(f"experts/{name}/{WEIGHTS_PART}" for name in expert_names(source)) + unread_keys(source)
        by_name = {module.tensor(kind): (module, kind) for module in modules for kind in ("G", "A", "BT")}
        written = write_image(
            target, modules, options.base, options.dtype, lambda name: foreign.encoded(*by_name[name], options.dtype)
        )
        effects = [_effect(module, foreign) for module in modules]
        error = measure_effect(target / IMAGE_NAME, effects, options.base, options.dtype)
    write_manifest(
        target,
        Manifest(
            family="meteora",
            base=options.base,
            dtype=options.dtype,
            file_bytes=written.num_bytes,
            file_sha256=written.sha256,
            modules=modules,
            source=Source("meteora/official", file_hashes(source), foreign.options.recorded, ignored, error),
            experts=foreign.options.experts,
        ),
    )


def _sites(files: ModelFiles, base: BaseDims) -> tuple[str, ...]:
    """Return the sites that have experts: the same in every layer, each with its three tensors."""
    sites = tuple(
        site
        for site in SITES
        if any(
            f"layers.{layer}.{SITE_PATHS[site]}.{kind}" in files.names
            for layer in range(base.num_hidden_layers)
            for kind in _OWN
        )
    )
    if not sites:
        raise CorruptUpload("the checkpoint holds no moe_gate of a linear layer that is served", param="files")
    wanted = {
        f"layers.{layer}.{SITE_PATHS[site]}.{kind}"
        for layer in range(base.num_hidden_layers)
        for site in sites
        for kind in _OWN
    }
    lacking = sorted(wanted - files.names)
    if lacking:
        raise CorruptUpload(
            f"the checkpoint lacks {lacking[0]}; every layer must have the same gated modules", param=lacking[0]
        )
    return sites


def _num_experts(files: ModelFiles, sites: tuple[str, ...]) -> int:
    shape = files.shape(f"layers.0.{SITE_PATHS[sites[0]]}.{_GATE}")
    return shape[0] if shape else 0


def _modules(foreign: _Foreign, sites: tuple[str, ...], options: ConvertOptions) -> tuple[Module, ...]:
    """Return the adapter's modules in image order, after checking limits and shapes."""
    base, own = options.base, foreign.options
    experts = Experts(own.ranks, own.top_k, own.temperature)
    check_experts(experts, "the mixture")
    if max(own.ranks) > options.max_rank:
        raise UnsupportedAdapter(
            f"an expert has rank {max(own.ranks)}; this server accepts up to {options.max_rank} (--max-rank)",
            param="options.rank",
        )
    modules = tuple(
        sorted(
            Module(layer, SITES.index(site), 0, has_bias=False, experts=experts)
            for layer in range(base.num_hidden_layers)
            for site in sites
        )
    )
    check_expert_names(own.experts, modules)
    for module in modules:
        num_out, num_in = base.site_shape(module.site)
        rank = sum(own.ranks)
        for kind, shape in ((_GATE, (len(own.ranks), num_in)), (_A, (rank, num_in)), (_B, (num_out, rank))):
            name = f"{foreign.stem(module)}.{kind}"
            if foreign.files.shape(name) != shape:
                raise UnsupportedAdapter(
                    f"{foreign.files.original(name)} has shape {list(foreign.files.shape(name))}; the ranks of the "
                    f"options and this base need {list(shape)}",
                    param=foreign.files.original(name),
                )
    return modules


def _compare_base(
    source: Path, files: ModelFiles, modules: tuple[Module, ...], options: ConvertOptions
) -> tuple[str, ...]:
    """Compare every other tensor of the file with the base; return what was added to the vocabulary.

    Raises:
        WrongBase: the base is not at hand, or is another. TrainedElsewhere: a tensor was trained.
        UnsupportedAdapter: a tensor that the base does not have.
    """
    own = {f"layers.{module.layer}.{SITE_PATHS[module.site]}.{kind}" for module in modules for kind in _OWN}
    others = sorted(files.names - own)
    if files.others:
        raise UnsupportedAdapter(f"the checkpoint holds {files.others[0]}, which is not read", param=files.others[0])
    if not others:
        return ()
    if options.base_dir is None:
        raise WrongBase(
            "the checkpoint holds the base's weights, which are compared with the served ones; these are not at hand: "
            "name them with --base"
        )
    base_dir = Path(options.base_dir)
    is_tied = options.base.tie_word_embeddings
    with open_model(base_dir, CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied) as base:
        compare_config(source, base_dir)
        plain = []
        for name in others:
            base_name = name.replace(_BASE_LAYER, ".")
            if base_name == "lm_head.weight" and options.base.tie_word_embeddings:
                base_name = "embed_tokens.weight"
            if base_name not in base.names:
                raise UnsupportedAdapter(
                    f"the checkpoint holds {files.original(name)}, which the base does not have",
                    param=files.original(name),
                )
            if base_name == name:
                plain.append(name)
            else:
                compare_tensor(name, base_name, files, base)
        return compare_frozen(plain, files, base)


def _effect(module: Module, foreign: _Foreign) -> SourceEffect:
    """Return the mixture's output by MeteoRA's formula: a loop over rows and their chosen experts."""
    options, stem = foreign.options, foreign.stem(module)

    def logits(x: Float64) -> Float64:
        gate = foreign.files.values(f"{stem}.{_GATE}").astype(np.float64)
        return np.asarray(x @ gate.T)

    def apply(x: Float64) -> tuple[Float64, Float64]:
        a = foreign.files.values(f"{stem}.{_A}").astype(np.float64)
        b = foreign.files.values(f"{stem}.{_B}").astype(np.float64)
        ends = np.cumsum(options.ranks)
        y, size = (np.zeros((len(x), len(b))) for _ in range(2))
        for row, scores in enumerate(logits(x)):
            chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: options.top_k]
            shares = np.exp((scores[chosen] - scores[chosen[0]]) / options.temperature)
            for expert, weight in zip(chosen, shares / shares.sum(), strict=True):
                part = slice(ends[expert] - options.ranks[expert], ends[expert])
                factor = weight * options.scalings[expert]
                y[row] += factor * (b[:, part] @ (a[part] @ x[row]))
                size[row] += factor * (np.abs(b[:, part]) @ (np.abs(a[part]) @ np.abs(x[row])))
        return y, size

    return SourceEffect(module, apply, logits)
