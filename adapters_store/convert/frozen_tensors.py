"""The weights that an adapter's checkpoint holds but did not train: compared with the base, bit by bit.

Owns the comparison and the one difference that is taken: vocabulary rows that resizing added behind the base's. The
served tokenizer never names those, so they act on nothing. Invariant: what passes is the served base itself.
"""

import json
from pathlib import Path

import numpy as np

from adapters_store.convert.model_files import BitPair, ModelFiles, num_rows
from adapters_store.errors import CorruptUpload, TrainedElsewhere, UnsupportedAdapter, WrongBase
from adapters_store.file_system import open_regular
from adapters_store.formats import MODEL_CONFIG_PART
from adapters_store.strict_json import Json, read_json

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
# a few special tokens, then rounding up to a multiple of 64
MAX_ADDED_ROWS = 128
_CHUNK_VALUES = 1 << 22
_MAX_CONFIG_BYTES = 1 << 20
# what a config may say differently without changing what the model computes with the base's own vocabulary
_FREE_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "max_position_embeddings",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def compare_frozen(names: list[str], found: ModelFiles, base: ModelFiles) -> tuple[str, ...]:
    """Compare tensors that both sides must have alike; return what was added to the vocabulary, as `name[from:to]`.

    Raises:
        WrongBase: shapes differ, or nothing of a tensor agrees. TrainedElsewhere: it was trained, in part or whole.
    """
    return tuple(added for name in names if (added := _compare(name, name, found, base)) is not None)


def compare_tensor(name: str, base_name: str, found: ModelFiles, base: ModelFiles) -> None:
    """Compare one tensor with that of another name in the base; raises as `compare_frozen`."""
    _compare(name, base_name, found, base)


def compare_config(source: Path, base_dir: Path) -> None:
    """Refuse a checkpoint whose `config.json` makes another model of the same weights.

    Raises:
        CorruptUpload: not strict JSON. UnsupportedAdapter: a key differs; `param` names it.
    """
    if not (source / MODEL_CONFIG_PART).exists():
        return
    with open_regular(source / MODEL_CONFIG_PART) as file:
        config = read_json(file.read(_MAX_CONFIG_BYTES + 1), MODEL_CONFIG_PART, max_bytes=_MAX_CONFIG_BYTES)
    base: dict[str, Json] = json.loads((base_dir / MODEL_CONFIG_PART).read_text(encoding="utf-8"))
    for key in sorted(config.keys() & base.keys() - _FREE_KEYS):
        if config[key] != base[key]:
            raise UnsupportedAdapter(
                f"config.json of the checkpoint has another {key[:80]!a} than the base's; its weights were trained for "
                "another computation",
                param=MODEL_CONFIG_PART,
            )


def check_names(found: ModelFiles, wanted: frozenset[str]) -> None:
    """Refuse a checkpoint that lacks a tensor or holds one that nothing here reads; raises CorruptUpload."""
    extra = sorted(found.names - wanted)
    if extra or found.others:
        name = found.original(extra[0]) if extra else found.others[0]
        raise UnsupportedAdapter(f"the checkpoint holds {name}, which the base does not have", param=name)
    lacking = sorted(wanted - found.names)
    if lacking:
        raise CorruptUpload(f"the checkpoint lacks {lacking[0]}", param=lacking[0])


def _compare(name: str, base_name: str, found: ModelFiles, base: ModelFiles) -> str | None:
    shape, base_shape = found.shape(name), base.shape(base_name)
    num_added = shape[0] - base_shape[0] if shape and base_shape else 0
    may_grow = name in _EMBEDDINGS and 0 <= num_added <= MAX_ADDED_ROWS
    if shape[1:] != base_shape[1:] or (num_added != 0 and not may_grow):
        raise WrongBase(
            f"{found.original(name)} has shape {list(shape)}; the base's has {list(base_shape)}",
            param=found.original(name),
        )
    if not _is_equal(BitPair.read(name, found, base, base_name)):
        raise TrainedElsewhere(
            f"{found.original(name)} is not the base's, bit by bit: it was trained or rounded, or the checkpoint is of "
            "another base",
            param=found.original(name),
        )
    return f"{found.original(name)}[{base_shape[0]}:{shape[0]}]" if num_added else None


def _is_equal(pair: BitPair) -> bool:
    num = len(pair.base)
    step = num_rows(pair.base.shape, _CHUNK_VALUES)
    return all(
        np.array_equal(pair.found[begin : min(begin + step, num)], pair.base[begin : begin + step])
        for begin in range(0, num, step)
    )
