"""A folder of PEFT LoRAs as the experts of one mixture: `experts/NAME/adapter_config.json` and its tensors.

Owns what the LoRAs must have in common: plain LoRAs on the same linear layers. Invariant: each is read as strictly as
it would be alone, every tensor it holds is declared by its own config, and every declared one is there.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.lora import LoraTuner
from adapters_store.convert.lora_mixtures import Lora, read_lora, refuse_unread, split_sites, whole_shape
from adapters_store.convert.peft_config import MAX_CONFIG_BYTES, PeftConfig, read_config
from adapters_store.convert.tensor_files import TensorFiles, open_tensors
from adapters_store.errors import CorruptUpload, MissingLayers, UnsupportedAdapter
from adapters_store.file_system import open_regular
from adapters_store.parts import CONFIG_PART, WEIGHTS_PART, expert_of, uploaded_name

_PREFIXES = ("base_model.model.model.", "base_model.model.", "model.", "")
_FACTOR = re.compile(r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<path>[a-z_]+\.(?P<name>[a-z_]+))\.lora_[AB]\.weight\Z")


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """One LoRA of the folder: its LoRAs by layer number and site."""

    name: str
    config: PeftConfig
    tuner: LoraTuner
    loras: dict[tuple[int, str], Lora]


def expert_names(source: Path) -> tuple[str, ...]:
    """Return the names of the LoRAs of an upload, sorted."""
    found = (expert_of(path.name) for path in source.iterdir())
    return tuple(sorted({part[0] for part in found if part is not None}))


def expert_config(source: Path, name: str, model_type: str) -> tuple[PeftConfig, LoraTuner]:
    """Read one LoRA's config.

    Raises:
        CorruptUpload: it is missing. UnsupportedAdapter: it is no plain LoRA, or a key is not served.
    """
    path = source / _staged(name, CONFIG_PART)
    try:
        with open_regular(path) as file:
            config = read_config(file.read(MAX_CONFIG_BYTES + 1), model_type=model_type)
    except FileNotFoundError:
        raise CorruptUpload(f"the upload lacks the file {uploaded_name(path.name)}", param="files") from None
    tuner = config.tuner
    if not isinstance(tuner, LoraTuner) or tuner.use_dora or tuner.lora_bias:
        raise UnsupportedAdapter(
            f"experts/{name} is no plain LoRA (peft_type {config.peft_type}, with DoRA or a bias); the experts of a "
            "mixture must be",
            param="experts",
        )
    return config, tuner


@contextmanager
def open_experts(source: Path, names: Iterable[str], base: BaseDims) -> Iterator[tuple[ExpertLora, ...]]:
    """Open LoRAs of the folder by name.

    Raises:
        AdapterRefused: one is not whole, or they act on different linear layers.
    """
    with ExitStack() as stack:
        experts = []
        for name in names:
            config, tuner = expert_config(source, name, base.model_type)
            path = source / _staged(name, WEIGHTS_PART)
            if not path.exists():
                raise CorruptUpload(f"the upload lacks the file {uploaded_name(path.name)}", param="files")
            files = stack.enter_context(open_tensors([path], _PREFIXES))
            experts.append(ExpertLora(name, config, tuner, _read(name, files, config, tuner, base)))
        for other in experts[1:]:
            if other.loras.keys() != experts[0].loras.keys():
                raise UnsupportedAdapter(
                    f"experts/{other.name} acts on other linear layers than experts/{experts[0].name}; the experts of "
                    "a mixture must act on the same",
                    param="experts",
                )
        yield tuple(experts)


def _staged(name: str, file: str) -> str:
    return f"experts:{name}:{file}"


def _read(
    name: str, files: TensorFiles, config: PeftConfig, tuner: LoraTuner, base: BaseDims
) -> dict[tuple[int, str], Lora]:
    loras: dict[tuple[int, str], Lora] = {}
    used: set[str] = set()
    for tensor in sorted(files.names):
        match = _FACTOR.match(tensor)
        parts = split_sites(match["name"], base) if match is not None else []
        if match is None or not parts or int(match["layer"]) >= base.num_hidden_layers:
            raise UnsupportedAdapter(
                f"experts/{name} holds {tensor}, which is no LoRA of a linear layer of this base", param=tensor
            )
        layer, stem = int(match["layer"]), f"layers.{match['layer']}.{match['path']}"
        if not config.targets.is_target(f"model.{stem}", layer):
            raise UnsupportedAdapter(
                f"experts/{name} holds {stem}, which its config does not target", param="target_modules"
            )
        pair = {f"{stem}.lora_{kind}.weight" for kind in "AB"}
        if not pair <= files.names:
            raise CorruptUpload(f"experts/{name} lacks one of {sorted(pair)}", param=stem)
        used |= pair
        rank = tuner.rank_pattern.of(f"model.{stem}", tuner.rank)
        for site, rows in parts:
            scaling = tuner.scaling_of(f"model.{stem}")
            loras[layer, site] = read_lora(files, stem, whole_shape(parts, base), rows, rank, scaling)
    refuse_unread(files, used)
    _check_complete(name, loras, config, base)
    return loras


def _check_complete(name: str, loras: dict[tuple[int, str], Lora], config: PeftConfig, base: BaseDims) -> None:
    """Refuse a LoRA that lacks a layer which its config targets; raises MissingLayers."""
    fused = {site: path for path, sites in FUSED_SITES.items() for site in sites}
    for layer in range(base.num_hidden_layers):
        for site in SITES:
            paths = [f"model.layers.{layer}.{path}" for path in (SITE_PATHS[site], fused.get(site)) if path]
            if (layer, site) not in loras and any(config.targets.is_target(path, layer) for path in paths):
                raise MissingLayers(
                    f"experts/{name} targets {paths[0]}, but its file has no tensors for it", param=paths[0]
                )
