"""The external formats that an upload may have: the files each consists of, and what the uploader says about them.

Owns file names and the `format` and `options` of an upload; what the options mean is the converter's business.
Invariant: a file name that `is_part_name` refuses is never created, and `check_parts` lets pass only sets of files
that belong to one format.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.errors import CorruptUpload, InvalidOption, StoreError, UnsupportedFormat
from adapters_store.strict_json import Json, read_json

AUTO = "auto"
# how the operator spells them; `auto` goes by the names of files and tensors
FORMATS = (AUTO, "peft", "s2ft", "meteora")
MAX_OPTIONS_BYTES = 32 << 10

CONFIG_PART, WEIGHTS_PART = PEFT_PARTS = ("adapter_config.json", "adapter_model.safetensors")
MODEL_CONFIG_PART = "config.json"
_MODEL_PART = "model.safetensors"
_INDEX_PART = "model.safetensors.index.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-(?P<total>[0-9]{5})\.safetensors\Z")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")


@dataclass(frozen=True, slots=True)
class Declared:
    """What the uploader says about the files: one of `FORMATS`, and the options of that format."""

    format: str = AUTO
    options: dict[str, Json] = field(default_factory=dict)

    @classmethod
    def parse(cls, source_format: str | None, options: bytes | None) -> "Declared":
        """Read the two fields of an upload; None or nothing means `auto`, no options.

        Raises:
            InvalidOption: an unknown format, or options that are not one strict JSON object.
        """
        source_format = source_format or AUTO
        if source_format not in FORMATS:
            shown = ascii(source_format)[:40]
            raise InvalidOption(f"format is {shown}; known: {', '.join(FORMATS)}", param="format")
        try:
            values = read_json(options, "options", max_bytes=MAX_OPTIONS_BYTES) if options else {}
        except StoreError as error:
            raise InvalidOption(error.message, param="options") from None
        return cls(source_format, values)


def is_config_part(name: str) -> bool:
    """Return whether a part holds JSON, which is small."""
    return name.endswith(".json")


def is_part_name(name: str) -> bool:
    """Return whether some format has a file of this name."""
    return name in (*PEFT_PARTS, MODEL_CONFIG_PART, _INDEX_PART) or is_model_part(name)


def is_model_part(name: str) -> bool:
    """Return whether the file holds tensors of a whole model."""
    return name == _MODEL_PART or _SHARD.match(name) is not None


def refuse_name(name: str) -> None:
    """Refuse a file name that no format has.

    Raises:
        UnsupportedFormat: a pickle by its name. CorruptUpload: any other.
    """
    if name.lower().endswith(_PICKLE_SUFFIXES):
        raise UnsupportedFormat(f"{ascii(name)[:80]} is a pickle, {_way_out(name)}", param="files")
    if not is_part_name(name):
        raise CorruptUpload(
            f"the file name {ascii(name)[:80]} is not taken; send exactly {' and '.join(PEFT_PARTS)}, "
            f"or {_MODEL_PART} (or its shards) of an S2FT or MeteoRA checkpoint",
            param="files",
        )


def check_parts(names: Collection[str], source_format: str) -> None:
    """Refuse a set of files that is not one whole adapter of the format; raises CorruptUpload."""
    model_parts = [name for name in names if is_model_part(name)]
    if source_format == "peft" or (source_format == AUTO and not model_parts):
        _check_peft(names)
        return
    foreign = sorted(name for name in names if name in PEFT_PARTS)
    if foreign:
        raise CorruptUpload(f"{foreign[0]} does not belong to a checkpoint of a whole model", param="files")
    if not model_parts:
        raise CorruptUpload(f"the upload lacks the file {_MODEL_PART}, or its shards", param="files")
    totals = {match["total"] for name in model_parts if (match := _SHARD.match(name)) is not None}
    if len(model_parts) > 1 and (_MODEL_PART in model_parts or len(totals) > 1):
        raise CorruptUpload(f"the upload holds {_MODEL_PART} or its shards more than once", param="files")
    if totals and int(totals.pop()) != len(model_parts):
        raise CorruptUpload(
            f"the upload holds {len(model_parts)} shards; their names promise another number", param="files"
        )


def parts_in(folder: Path, source_format: str) -> tuple[str, ...]:
    """Return the names of the files of a folder that make up its adapter; files of PEFT come first.

    Raises:
        UnsupportedFormat: the folder holds a whole model as a pickle.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    is_peft = any(name in (*PEFT_PARTS, "adapter_model.bin") for name in names)
    if source_format == "peft" or (source_format == AUTO and is_peft):
        return PEFT_PARTS
    found = [name for name in names if is_model_part(name)]
    if not found:
        if pickled := next((name for name in names if name.endswith(_PICKLE_SUFFIXES)), None):
            raise UnsupportedFormat(f"the folder holds {pickled[:80]}, a pickle, {_way_out(pickled)}", param="files")
        return PEFT_PARTS if source_format == AUTO else (_MODEL_PART,)
    if MODEL_CONFIG_PART in names:
        found.append(MODEL_CONFIG_PART)
    return tuple(found)


def _check_peft(names: Collection[str]) -> None:
    lacking = [part for part in PEFT_PARTS if part not in names]
    if lacking:
        raise CorruptUpload(f"the upload lacks the file {lacking[0]}", param="files")
    extra = sorted(set(names) - set(PEFT_PARTS))
    if extra:
        raise CorruptUpload(f"{extra[0]} does not belong to a PEFT adapter", param="files")


def _way_out(name: str) -> str:
    if name.startswith("pytorch_model"):
        return (
            "which is never opened here: load it where you trust it and write it again with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    return "which is never opened here: save the adapter with safe_serialization=True"
