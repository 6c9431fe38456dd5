"""SpIEL (`peft_type` SFT, of a fork of PEFT): single changed values of linear layers -> sparse matrices.

Owns its names, `MODULE.sft_delta.values [k]` and `MODULE.sft_delta.indices [k]`, flat and row-major, and its config's
keys, none of which changes what the values do. Invariant: values are added as they are, scale 1.

Source: AlanAnsell/peft, branch of "Scaling Sparse Fine-Tuning to Large Language Models", `tuners/sft`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.base import BaseDims
from adapters_store.convert.delta_source import DeltaSource
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora_mixtures import refuse_unread, split_sites, whole_shape
from adapters_store.convert.moe_config import read_config_file
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.param_deltas import Deltas, ParamDelta, neutral_name, serve
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles, open_tensors, tensor_paths
from adapters_store.errors import CorruptUpload, UnknownField, UnsupportedAdapter
from adapters_store.strict_json import Json

_VALUES, _PLACES = ".sft_delta.values", ".sft_delta.indices"
# all of them choose what is trained, which the file's places say better
_HARMLESS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    | {"target_modules", "exclude_modules", "density", "num_tunable_weights", "num_deltas", "dtype", "selection"}
    | {"selection_algorithm", "selection_level", "reselection_steps", "reselection_rate_policy", "candidate_proportion"}
    | {"initial_reselection_rate", "selection_accumulation_steps", "total_update_steps", "weight_decay", "drop_prob"}
    | {"layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_weights"}
)
_DEFAULTS: dict[str, tuple[Json, ...]] = {"modules_to_save": (None, []), "bias": ("none", None)}


def convert_spiel(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the folder `source`; raises AdapterRefused."""
    OptionValues("a SpIEL adapter", options.declared.options, ())
    ignored = _check_config(source)
    with open_tensors(tensor_paths(source)) as files:
        served = serve(read_deltas(files, options.base), options)
        foreign = Foreign("sparse", "peft/SFT", served.sites, ignored=ignored)
        write_foreign(source, target, foreign, options)


@contextmanager
def open_spiel(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a folder that was converted before as its own forward."""
    with open_tensors(tensor_paths(source)) as files:
        yield DeltaSource(read_deltas(files, options.base), options.base)


def read_deltas(files: TensorFiles, base: BaseDims) -> Deltas:
    """Read every module's values and places; raises CorruptUpload, UnsupportedAdapter, InvalidIndex."""
    deltas: Deltas = {}
    used: set[str] = set()
    for name in sorted(name for name in files.names if name.endswith(_VALUES)):
        stem = name.removesuffix(_VALUES)
        if f"{stem}{_PLACES}" not in files.names:
            raise CorruptUpload(f"the file lacks {stem}{_PLACES}", param=stem)
        module = neutral_name(stem)
        parts = split_sites(module.rpartition(".")[2], base)
        if not parts:
            raise UnsupportedAdapter(f"{name} changes no linear layer of this base", param=name)
        used |= {name, f"{stem}{_PLACES}"}
        places, values = files.integers(f"{stem}{_PLACES}"), files.floats(name)
        deltas[f"{module}.weight"] = ParamDelta.of(name, whole_shape(parts, base), places, values)
    refuse_unread(files, used)
    return deltas


def _check_config(source: Path) -> tuple[str, ...]:
    config = read_config_file(source)
    if config.get("peft_type") != "SFT":
        raise UnsupportedAdapter(
            f"peft_type is {ascii(config.get('peft_type'))[:40]}; this format has SFT", param="peft_type"
        )
    for key, defaults in _DEFAULTS.items():
        if key in config and config[key] not in defaults:
            raise UnsupportedAdapter(f"{key} is set, which is not served for SFT: train without it", param=key)
    unknown = sorted(config.keys() - _HARMLESS - _DEFAULTS.keys())
    if unknown:
        raise UnknownField(
            f"the config holds the key {unknown[0][:80]!a}, which this server does not know", param=unknown[0][:80]
        )
    plain = ("peft_type", "task_type", "target_modules", "peft_version", "inference_mode")
    return tuple(sorted(key for key in config if key not in plain and config[key] not in (None, False, "none")))
