"""ComPEFT: ternary signs times one number per tensor, on a LoRA's tensors or on the base's own parameters.

Owns the accepted file, since the published code keeps none: per tensor NAME `NAME.positive` and `NAME.negative`, flat
row-major places of its signs, `NAME.scale` one number, `NAME.shape`, and perhaps `NAME.init`, which the signs are added
to. With an `adapter_config.json` the names are a LoRA's (`...lora_A.weight`) and are decoded to a plain low rank;
without, they are parameters of the base, served as ternary sparse matrices. Invariant: no place has two signs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.delta_source import DeltaSource
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora import LoraTuner
from adapters_store.convert.lora_mixtures import (
    Lora,
    Loras,
    SiteLoras,
    refuse_unread,
    sites_of,
    split_sites,
    whole_shape,
)
from adapters_store.convert.lora_source import LoraSource
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.param_deltas import Deltas, ParamDelta, neutral_name, serve
from adapters_store.convert.peft_config import MAX_CONFIG_BYTES, read_config
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles, open_tensors, tensor_paths
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.file_system import open_regular
from adapters_store.float_bits import Float32
from adapters_store.parts import CONFIG_PART

_POSITIVE, _NEGATIVE, _SCALE, _SHAPE, _INIT = ".positive", ".negative", ".scale", ".shape", ".init"
_FACTOR = ".lora_A.weight"


@dataclass(frozen=True, slots=True)
class Ternary:
    """One tensor: what is added to nothing, or to `init`."""

    delta: ParamDelta
    init: Float32 | None

    def dense(self) -> Float32:
        """Return the whole tensor."""
        values = np.zeros(self.delta.shape, dtype=np.float32) if self.init is None else self.init.copy()
        values.reshape(-1)[self.delta.places] += self.delta.values
        return values


def convert_compeft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the file in `source`; raises AdapterRefused."""
    OptionValues("a ComPEFT file", options.declared.options, ())
    with open_tensors(tensor_paths(source)) as files:
        tensors = read_ternary(files)
        if (source / CONFIG_PART).exists():
            loras = _loras(source, tensors, options.base)
            foreign = Foreign("lora", "compeft/lora", sites_of(loras, LoraSource(loras), options.base))
        else:
            served = serve(_deltas(tensors), options)
            foreign = Foreign(
                family="sparse",
                source_format="compeft/full",
                sites=served.sites,
                model_ops=served.model_ops,
                model_values=served.model_values,
                is_base_dependent=served.used_base,
            )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_compeft(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a file that was converted before as its own forward."""
    with open_tensors(tensor_paths(source)) as files:
        tensors = read_ternary(files)
        if (source / CONFIG_PART).exists():
            yield LoraSource(_loras(source, tensors, options.base))
        else:
            yield DeltaSource(_deltas(tensors), options.base)


def read_ternary(files: TensorFiles) -> dict[str, Ternary]:
    """Read every tensor of the file; raises CorruptUpload, InvalidIndex."""
    tensors: dict[str, Ternary] = {}
    used: set[str] = set()
    for name in sorted(name for name in files.names if name.endswith(_SCALE)):
        stem = name.removesuffix(_SCALE)
        shape = tuple(int(size) for size in files.integers(f"{stem}{_SHAPE}").reshape(-1))
        scale = files.floats(name).reshape(-1)
        if len(scale) != 1 or not 1 <= len(shape) <= 2 or min(shape) < 1 or not np.isfinite(scale[0]):
            raise CorruptUpload(f"{stem} must have one finite scale and a shape of one or two dimensions", param=stem)
        positive = files.integers(f"{stem}{_POSITIVE}").reshape(-1)
        negative = files.integers(f"{stem}{_NEGATIVE}").reshape(-1)
        signs = np.concatenate((np.ones(len(positive)), -np.ones(len(negative)))).astype(np.float32)
        delta = ParamDelta.of(stem, shape, np.concatenate((positive, negative)), signs * scale[0], abs(float(scale[0])))
        init = None
        if f"{stem}{_INIT}" in files.names:
            files.need_shape(f"{stem}{_INIT}", shape)
            init = files.floats(f"{stem}{_INIT}")
        used |= {f"{stem}{part}" for part in (_POSITIVE, _NEGATIVE, _SCALE, _SHAPE, _INIT)}
        tensors[stem] = Ternary(delta, init)
    refuse_unread(files, used & files.names)
    if not tensors:
        raise CorruptUpload("the file holds no tensor with a scale", param="files")
    return tensors


def _deltas(tensors: dict[str, Ternary]) -> Deltas:
    with_init = [name for name, tensor in tensors.items() if tensor.init is not None]
    if with_init:
        raise CorruptUpload(
            f"{with_init[0]} has an init: parameters of the base begin at the base's own values", param=with_init[0]
        )
    return {neutral_name(name): tensor.delta for name, tensor in tensors.items()}


def _loras(source: Path, tensors: dict[str, Ternary], base: BaseDims) -> Loras:
    with open_regular(source / CONFIG_PART) as file:
        config = read_config(file.read(MAX_CONFIG_BYTES + 1), model_type=base.model_type)
    tuner = config.tuner
    if not isinstance(tuner, LoraTuner) or tuner.use_dora or tuner.lora_bias:
        raise UnsupportedAdapter(
            "the config is of no plain LoRA; ComPEFT's tensors are decoded to one", param="peft_type"
        )
    sites = []
    used = set()
    for name in sorted(name for name in tensors if name.endswith(_FACTOR)):
        stem, partner = name.removesuffix(_FACTOR), name.replace(".lora_A.", ".lora_B.")
        module = neutral_name(stem)
        parts = split_sites(module.rpartition(".")[2], base)
        layer = module.split(".")[1] if module.startswith("layers.") else ""
        if partner not in tensors or not parts or not layer.isdecimal() or int(layer) >= base.num_hidden_layers:
            raise UnsupportedAdapter(f"{name} is no LoRA of a linear layer of this base, or has no partner", param=name)
        rank, (num_out, num_in) = tuner.rank_pattern.of(f"model.{module}", tuner.rank), whole_shape(parts, base)
        if tensors[name].delta.shape != (rank, num_in) or tensors[partner].delta.shape != (num_out, rank):
            raise UnsupportedAdapter(
                f"{name} or its partner has another shape than the config and base need", param=name
            )
        used |= {name, partner}
        for site, rows in parts:
            scaling = tuner.scaling_of(f"model.{module}")
            lora = Lora(rank, scaling, tensors[name].dense, partial(_rows, tensors[partner], rows))
            sites.append(SiteLoras(int(layer), site, (lora,)))
    extra = sorted(tensors.keys() - used)
    if extra:
        raise UnsupportedAdapter(f"the file holds {extra[0]}, which belongs to no LoRA", param=extra[0])
    return Loras(tuple(sites))


def _rows(tensor: Ternary, rows: slice) -> Float32:
    return tensor.dense()[rows]
