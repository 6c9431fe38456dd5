"""The files that an upload may consist of: their names, how they lie in staging, and which sets make one adapter.

Owns names alone; what the files hold is the converters' business. Invariant: a file name that `refuse_name` lets pass
becomes one plain file name in staging (`staged_name`, one to one), and `check_parts` lets pass only sets of files that
belong to one format.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from adapters_store.errors import CorruptUpload, UnsupportedFormat

CONFIG_PART, WEIGHTS_PART = PEFT_PARTS = ("adapter_config.json", "adapter_model.safetensors")
PICKLED_WEIGHTS_PART = "adapter_model.bin"
MODEL_CONFIG_PART = "config.json"
# what `unpickled.py` leaves in place of pickles: their hashes and plain values
TRANSLATED_PART = "translated.json"

MODEL_FORMATS = ("s2ft", "meteora", "hf_model")
# a config in PEFT's manner and one file of tensors
CONFIG_FORMATS = ("peft", "mixlora", "mola", "loramoe", "spiel", "s2ft_slices")
# files of tensors under any name, without a config that would be read
LOOSE_FORMATS = ("llava_mole", "mttl", "lt_sft", "compeft")
# a folder of LoRAs each with its config, and perhaps what routes between them
FOLDER_FORMATS = ("arrow",)

_MODEL_PART = "model.safetensors"
_WEIGHTS = (WEIGHTS_PART, PICKLED_WEIGHTS_PART)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(?:model-[0-9]{5}-of-(\d{5})\.safetensors|pytorch_model-[0-9]{5}-of-(\d{5})\.bin)\Z", re.ASCII)
_LOOSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}\.(?:safetensors|bin|pt|pth|ckpt)\Z")
_EXPERT = re.compile(
    r"experts/(?P<name>[A-Za-z0-9][A-Za-z0-9_.\-]{0,99})/"
    r"(?P<file>adapter_config\.json|adapter_model\.safetensors|adapter_model\.bin)\Z"
)
_STAGED_SEPARATOR = ":"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# written by other picklers than torch's: nothing restricts what they run
_FOREIGN_PICKLES = (".pkl", ".pickle", ".joblib", ".dill")


def staged_name(name: str) -> str:
    """Return the name of a part's file in staging: the folders of experts lie flat there."""
    return name.replace("/", _STAGED_SEPARATOR)


def uploaded_name(staged: str) -> str:
    """Return the name that a file in staging was uploaded under."""
    return staged.replace(_STAGED_SEPARATOR, "/")


def expert_of(staged: str) -> tuple[str, str] | None:
    """Return the expert's name and its file's for a staged part of a folder of LoRAs; None for any other part."""
    match = _EXPERT.match(uploaded_name(staged))
    return None if match is None else (match["name"], match["file"])


def translated_name(staged: str) -> str:
    """Return the name of the safetensors file that takes a pickle's place in staging."""
    stem = staged.rpartition(".")[0]
    if staged == "pytorch_model.bin":
        return _MODEL_PART
    return f"{stem.removeprefix('pytorch_') if _SHARD.match(staged) else stem}.safetensors"


def is_config_part(name: str) -> bool:
    """Return whether a part holds JSON, which is small."""
    return name.endswith(".json")


def is_pickle(name: str) -> bool:
    """Return whether a part is read by torch's restricted unpickler, in a process of its own."""
    return name.endswith(_PICKLES)


def is_part_name(name: str) -> bool:
    """Return whether some format has a file of this name."""
    known = (CONFIG_PART, MODEL_CONFIG_PART, *_INDEXES)
    return name in known or _LOOSE.match(name) is not None or _EXPERT.match(name) is not None


def is_model_part(name: str) -> bool:
    """Return whether the file holds tensors of a whole model, as safetensors."""
    return name == _MODEL_PART or (_SHARD.match(name) is not None and not is_pickle(name))


def is_model_file(name: str) -> bool:
    """Return whether the file holds tensors of a whole model, pickled or not."""
    return name in (_MODEL_PART, "pytorch_model.bin") or _SHARD.match(name) is not None


def refuse_name(name: str) -> None:
    """Refuse a file name that no format has.

    Raises:
        UnsupportedFormat: a pickle that nothing restricts. CorruptUpload: any other.
    """
    if name.lower().endswith(_FOREIGN_PICKLES):
        raise UnsupportedFormat(
            f"{ascii(name)[:80]} is a pickle, which is never opened here: save the tensors as safetensors",
            param="files",
        )
    if not is_part_name(name):
        raise CorruptUpload(
            f"the file name {ascii(name)[:80]} is not taken; send exactly {' and '.join(PEFT_PARTS)}, or the files of "
            "another format (docs/adapters.md lists them), those of several LoRAs as experts/NAME/FILE",
            param="files",
        )


def check_parts(names: Collection[str], source_format: str) -> None:
    """Refuse a set of files that is not one whole adapter of the format; raises CorruptUpload."""
    experts = [name for name in names if _EXPERT.match(name)]
    own = [name for name in names if name not in experts]
    # for `auto` the names say which of the kinds below it is
    if source_format in MODEL_FORMATS or (source_format == "auto" and any(map(is_model_file, own))):
        _check_model(own)
    elif source_format in FOLDER_FORMATS or (source_format == "auto" and experts):
        _check_folder(own, experts)
    elif source_format in LOOSE_FORMATS or (source_format == "auto" and _is_loose(own)):
        _check_loose(own, source_format)
    else:
        _check_config(own)
    _check_experts(experts, source_format)


def parts_in(folder: Path, source_format: str) -> tuple[str, ...]:
    """Return the names of the files of a folder that make up its adapter; safetensors go before pickles."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() or entry.is_symlink())
    experts = _expert_parts(folder) if source_format in ("auto", "meteora", *FOLDER_FORMATS) else ()
    is_config = CONFIG_PART in names or any(name in _WEIGHTS for name in names)
    if source_format in FOLDER_FORMATS:
        return _one_kind([name for name in names if name in (CONFIG_PART, *_WEIGHTS)]) + experts
    if source_format in CONFIG_FORMATS or (source_format == "auto" and is_config):
        weights = next((name for name in _WEIGHTS if name in names), WEIGHTS_PART)
        return (CONFIG_PART, weights, *experts)
    found = _one_kind([name for name in names if is_model_file(name)])
    if found and source_format not in LOOSE_FORMATS:
        return (*found, *((MODEL_CONFIG_PART,) if MODEL_CONFIG_PART in names else ()), *experts)
    if source_format in LOOSE_FORMATS or source_format == "auto":
        loose = _one_kind([name for name in names if _LOOSE.match(name)])
        config = (CONFIG_PART,) if CONFIG_PART in names else ()
        return loose + config if loose else (*experts,) if experts else PEFT_PARTS
    return (_MODEL_PART,)


def _one_kind(names: Iterable[str]) -> tuple[str, ...]:
    """Return the safetensors files, or without any the pickles: a folder often holds the same tensors twice."""
    found = tuple(names)
    return tuple(name for name in found if not is_pickle(name)) or found


def _expert_parts(folder: Path) -> tuple[str, ...]:
    """Return the parts of `experts/`; links to folders are not followed."""
    root = folder / "experts"
    if not root.is_dir() or root.is_symlink():
        return ()
    parts: list[str] = []
    for expert in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink()):
        names = [entry.name for entry in expert.iterdir()]
        own = [CONFIG_PART, next((name for name in _WEIGHTS if name in names), WEIGHTS_PART)]
        parts += [name for each in own if _EXPERT.match(name := f"experts/{expert.name}/{each}")]
    return tuple(parts)


def _is_loose(names: Collection[str]) -> bool:
    return CONFIG_PART not in names and any(name not in _WEIGHTS and _LOOSE.match(name) for name in names)


def _check_config(names: Collection[str]) -> None:
    weights = [name for name in names if name in _WEIGHTS]
    for lacking in (CONFIG_PART if CONFIG_PART not in names else None, WEIGHTS_PART if not weights else None):
        if lacking is not None:
            raise CorruptUpload(f"the upload lacks the file {lacking}", param="files")
    if len(weights) > 1:
        raise CorruptUpload(f"the upload holds both {weights[0]} and {weights[1]}; send one of them", param="files")
    _refuse_extra(set(names) - {CONFIG_PART, *weights}, "an adapter with a config")


def _check_model(names: Collection[str]) -> None:
    models = [name for name in names if is_model_file(name)]
    foreign = sorted(name for name in names if name in (CONFIG_PART, *_WEIGHTS))
    if foreign:
        raise CorruptUpload(f"{foreign[0]} does not belong to a checkpoint of a whole model", param="files")
    if not models:
        raise CorruptUpload(f"the upload lacks the file {_MODEL_PART}, or its shards", param="files")
    shards = [match for name in models if (match := _SHARD.match(name)) is not None]
    totals = {match[1] or match[2] for match in shards}
    kinds = {is_pickle(name) for name in models}
    if len(models) > 1 and (len(shards) < len(models) or len(totals) > 1 or len(kinds) > 1):
        raise CorruptUpload(f"the upload holds {_MODEL_PART} or its shards more than once", param="files")
    if totals and int(totals.pop()) != len(models):
        raise CorruptUpload(f"the upload holds {len(models)} shards; their names promise another number", param="files")
    _refuse_extra(set(names) - {*models, MODEL_CONFIG_PART, *_INDEXES}, "a checkpoint of a whole model")


def _check_loose(names: Collection[str], source_format: str) -> None:
    loose = [name for name in names if _LOOSE.match(name)]
    if not loose:
        raise CorruptUpload("the upload lacks a file of tensors", param="files")
    stems = {translated_name(name) for name in loose}
    # a library of mttl's is a file per expert
    is_library = source_format == "mttl" or (source_format == "auto" and all(map(_is_mttl, loose)))
    if len(stems) < len(loose) or (len(loose) > 1 and not is_library):
        raise CorruptUpload(f"the upload holds {len(loose)} files of tensors; this format is one file", param="files")
    _refuse_extra(set(names) - {*loose, CONFIG_PART}, "an adapter of this format")


def _is_mttl(name: str) -> bool:
    return name.endswith(".ckpt")


def _check_folder(names: Collection[str], experts: Collection[str]) -> None:
    if not experts:
        raise CorruptUpload("the upload lacks the LoRAs; send them as experts/NAME/adapter_config.json and so on")
    _refuse_extra(set(names) - {CONFIG_PART, *_WEIGHTS}, "a folder of LoRAs")


def _check_experts(experts: Collection[str], source_format: str) -> None:
    if experts and source_format not in ("auto", "meteora", *FOLDER_FORMATS):
        raise CorruptUpload(f"{min(experts)} does not belong to an adapter of this format", param="files")
    by_name: dict[str, list[str]] = {}
    for each in experts:
        _, name, file = each.split("/")
        by_name.setdefault(name, []).append(file)
    for name, files in by_name.items():
        if CONFIG_PART not in files or len(files) != 2:
            raise CorruptUpload(
                f"experts/{name} must hold {CONFIG_PART} and one of {' and '.join(_WEIGHTS)}", param="files"
            )


def _refuse_extra(extra: Collection[str], what: str) -> None:
    if extra:
        raise CorruptUpload(f"{min(extra)} does not belong to {what}", param="files")
