"""Which converter an upload goes to: as declared, or by the names of its files and tensors.

Owns the choice only. Invariant: what is detected is what the converter of that format accepts by name; nothing is
tried out.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from adapters_store.convert.meteora import convert_meteora, is_meteora
from adapters_store.convert.meteora_source import open_meteora
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.peft_source import open_peft
from adapters_store.convert.s2ft import convert_s2ft
from adapters_store.convert.s2ft_source import open_s2ft
from adapters_store.convert.source_model import SourceModel
from adapters_store.errors import InvalidOption
from adapters_store.formats import AUTO, is_model_part


def convert(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the folder `source` of an upload into the empty folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    declared = options.declared.format
    if declared == AUTO:
        declared = _detect(source)
    if declared == "meteora":
        convert_meteora(source, target, options)
    elif declared == "s2ft":
        convert_s2ft(source, target, options)
    else:
        _refuse_options(options)
        convert_peft(source, target, options)


def open_source(source: Path, options: ConvertOptions) -> AbstractContextManager[SourceModel]:
    """Open the folder `source`, which was converted before, as its own forward.

    Raises:
        AdapterRefused: as `convert`.
    """
    declared = options.declared.format
    if declared == AUTO:
        declared = _detect(source)
    if declared == "meteora":
        return open_meteora(source, options)
    if declared == "s2ft":
        return open_s2ft(source)
    return open_peft(source, options)


def _detect(source: Path) -> str:
    if not any(is_model_part(entry.name) for entry in source.iterdir()):
        return "peft"
    return "meteora" if is_meteora(source) else "s2ft"


def _refuse_options(options: ConvertOptions) -> None:
    if options.declared.options:
        name = sorted(options.declared.options)[0]
        raise InvalidOption(
            f"a PEFT adapter has no option {name[:80]!a}; adapter_config.json says how it acts", param="options"
        )
