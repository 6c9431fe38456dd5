"""Which converter an upload goes to: as declared, or by the names of its files, its config and its tensors.

Owns the choice only. Invariant: what is detected is what the converter of that format accepts by name; nothing is
tried out.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from adapters_store.convert.arrow import convert_arrow, open_arrow
from adapters_store.convert.compeft import convert_compeft, open_compeft
from adapters_store.convert.hf_model import convert_hf_model, open_hf_model
from adapters_store.convert.llava_mole import convert_llava_mole, open_llava_mole
from adapters_store.convert.lt_sft import convert_lt_sft, open_lt_sft
from adapters_store.convert.meteora import convert_meteora, is_meteora
from adapters_store.convert.meteora_source import open_meteora
from adapters_store.convert.moe_config import peft_type_of
from adapters_store.convert.moe_peft import KINDS, convert_moe, open_moe
from adapters_store.convert.mttl import convert_mttl, open_mttl
from adapters_store.convert.options import Convert, ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.peft_source import open_peft
from adapters_store.convert.s2ft import convert_s2ft
from adapters_store.convert.s2ft_slices import convert_s2ft_slices, open_s2ft_slices
from adapters_store.convert.s2ft_source import open_s2ft
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.spiel import convert_spiel, open_spiel
from adapters_store.convert.tensor_files import translated
from adapters_store.errors import UnsupportedFormat
from adapters_store.formats import AUTO, is_model_part
from adapters_store.parts import CONFIG_PART, expert_of, is_pickle

_MTTL, _LT_SFT = ".ckpt", "pytorch_diff.bin"


@dataclass(frozen=True, slots=True)
class _Format:
    """Brings an upload into the canonical form, and opens one that was converted before as its own forward."""

    convert: Convert
    open_source: Callable[[Path, ConvertOptions], AbstractContextManager[SourceModel]]


def _open_s2ft(source: Path, options: ConvertOptions) -> AbstractContextManager[SourceModel]:
    return open_s2ft(source)


_FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "peft": _Format(convert_peft, open_peft),
        "s2ft": _Format(convert_s2ft, _open_s2ft),
        "meteora": _Format(convert_meteora, open_meteora),
        "hf_model": _Format(convert_hf_model, open_hf_model),
        "arrow": _Format(convert_arrow, open_arrow),
        "llava_mole": _Format(convert_llava_mole, open_llava_mole),
        "mttl": _Format(convert_mttl, open_mttl),
        "spiel": _Format(convert_spiel, open_spiel),
        "s2ft_slices": _Format(convert_s2ft_slices, open_s2ft_slices),
        "lt_sft": _Format(convert_lt_sft, open_lt_sft),
        "compeft": _Format(convert_compeft, open_compeft),
        **{name: _Format(partial(convert_moe, name=name), partial(open_moe, name=name)) for name in KINDS},
    }
)


def convert(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the folder `source` of an upload into the empty folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    _refuse_pickles(source)
    _FORMATS[_name(source, options)].convert(source, target, options)


def open_source(source: Path, options: ConvertOptions) -> AbstractContextManager[SourceModel]:
    """Open the folder `source`, which was converted before, as its own forward.

    Raises:
        AdapterRefused: as `convert`.
    """
    return _FORMATS[_name(source, options)].open_source(source, options)


def _name(source: Path, options: ConvertOptions) -> str:
    declared = options.declared.format
    return _detect(source) if declared == AUTO else declared


def _detect(source: Path) -> str:
    """Name the format by what lies there; raises UnsupportedFormat where several have such files."""
    names = [entry.name for entry in source.iterdir()]
    if any(is_model_part(name) for name in names):
        return "meteora" if is_meteora(source) else "s2ft"
    if any(expert_of(name) is not None for name in names):
        return "arrow"
    if CONFIG_PART in names:
        peft_type = peft_type_of(source)
        foreign = {kind: name for name, kind in KINDS.items()} | {"SFT": "spiel", "S2FT": "s2ft_slices"}
        return foreign.get(peft_type or "", "peft")
    pickles = translated(source)
    if _LT_SFT in pickles:
        return "lt_sft"
    if any(name.endswith(_MTTL) for name in pickles):
        return "mttl"
    if any(name.endswith(".safetensors") and name != "adapter_model.safetensors" for name in names):
        raise UnsupportedFormat(
            "several formats have a file of tensors without a config: say which with format (llava_mole, mttl, "
            "lt_sft, compeft)",
            param="format",
        )
    return "peft"


def _refuse_pickles(source: Path) -> None:
    name = next((entry.name for entry in sorted(source.iterdir()) if is_pickle(entry.name)), None)
    if name is not None:
        raise UnsupportedFormat(
            f"{name} is a pickle, which only a process of its own may open: save it with safe_serialization=True",
            param="files",
        )
