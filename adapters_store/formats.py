"""The external formats that an upload may have, and what the uploader says about it.

Owns the names of the formats and the `format` and `options` of an upload; what the options mean is the converter's
business, and file names are `parts.py`'s. Invariant: a `Declared` names a known format, and its options are one strict
JSON object.
"""

from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.errors import InvalidOption, StoreError
from adapters_store.file_system import open_regular
from adapters_store.parts import (
    CONFIG_FORMATS,
    CONFIG_PART,
    FOLDER_FORMATS,
    LOOSE_FORMATS,
    MODEL_CONFIG_PART,
    MODEL_FORMATS,
    PEFT_PARTS,
    WEIGHTS_PART,
    check_parts,
    is_config_part,
    is_model_part,
    parts_in,
    refuse_name,
)
from adapters_store.strict_json import Json, read_json

# the names of files live in a module of their own
__all__ = [
    "AUTO",
    "CONFIG_PART",
    "EXPORT_PART",
    "FORMATS",
    "MAX_OPTIONS_BYTES",
    "MODEL_CONFIG_PART",
    "PEFT_PARTS",
    "WEIGHTS_PART",
    "Declared",
    "check_parts",
    "is_config_part",
    "is_model_part",
    "parts_in",
    "refuse_name",
]

AUTO = "auto"
# how the operator spells them; `auto` goes by the names of files and tensors
FORMATS = (AUTO, *CONFIG_FORMATS, *MODEL_FORMATS, *FOLDER_FORMATS, *LOOSE_FORMATS)
MAX_OPTIONS_BYTES = 32 << 10
# beside the files of an adapter that our trainer exported: how they are to be declared
EXPORT_PART = "upload.json"


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

    @classmethod
    def of_export(cls, folder: Path) -> "Declared":
        """Read what a folder of the trainer's says of itself in `upload.json`; nothing where it has none.

        Raises:
            StoreError: the file is not one strict JSON object of a known format and its options.
        """
        path = folder / EXPORT_PART
        if not path.is_file():
            return cls()
        with open_regular(path) as file:
            said = read_json(file.read(MAX_OPTIONS_BYTES + 1), EXPORT_PART, max_bytes=MAX_OPTIONS_BYTES)
        options, source_format = said.get("options", {}), said.get("format")
        if not isinstance(options, dict) or not isinstance(source_format, str):
            raise InvalidOption(f"{EXPORT_PART} must hold a format and its options", param=EXPORT_PART)
        return cls(cls.parse(source_format, None).format, options)
