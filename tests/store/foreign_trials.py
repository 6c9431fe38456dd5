"""Mutants of what strangers upload: PEFT's configs, LoRA folders, S2FT and MeteoRA checkpoints.

Owns the seeds and the second opinion on what became of them: the canonical files must pass the judge, and a LoRA must
change its layers by exactly the product that its own files and config say. Invariant: the oracle reads the uploaded
bytes itself.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import peft

from adapters_store.base import BaseDims
from adapters_store.convert.dispatch import convert
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft_config import read_config
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.errors import AdapterRefused
from adapters_store.formats import Declared
from tests.store.folders import TINY, lora_config, lora_tensors, safetensors_bytes
from tests.store.judge import canonical_fault
from tests.store.judge_files import Fault, floats, read_file, strict_json
from tests.store.judge_ops import SITES
from tests.store.mutant_trials import MAX_RANK, Tally
from tests.store.mutator import Mutator
from tests.store.tiny_checkpoints import GQA, S2ft, TinyBase, meteora_checkpoint, mixture, s2ft_checkpoint
from tests.store.tiny_checkpoints import write_checkpoint as write_model

# what older versions of PEFT wrote and the newest does not
OLDER_KEYS = {"enable_lora", "merge_weights", "lora_bias", "corda_config", "eva_config", "peft_version"}
OLDER_KEYS |= {"layers_pattern"}


def config_seeds() -> list[tuple[bytes, set[str]]]:
    """Return a config of every kind that is read, written by PEFT itself, and the keys that PEFT knows for it."""
    seeds = []
    kinds: dict[Any, Any] = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for name in sorted(PEFT_TYPES):
        kind = kinds.get(name)
        if kind is None:
            continue
        known = {field.name for field in fields(kind)}
        own = {key: value for key, value in _defaults(kind).items() if key in known}
        raw = json.dumps(own | {"peft_type": name}, sort_keys=True, default=str).encode()
        try:
            read_config(raw, model_type="llama")
        except AdapterRefused:
            continue
        seeds.append((raw, known | OLDER_KEYS))
    return seeds


def _defaults(kind: Any) -> dict[str, Any]:
    wished: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    wished |= {"num_virtual_tokens": 2, "token_dim": TINY.hidden_size}
    known = {field.name for field in fields(kind)}
    values = {key: value for key, value in wished.items() if key in known}
    try:
        found: dict[str, Any] = kind(**values).to_dict()
    except (TypeError, ValueError, ImportError):
        return values
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def config_fault(raw: bytes, known: set[str]) -> str | None:
    """Say why a config that was taken should not have been."""
    try:
        config = strict_json(raw, 1 << 20)
    except Fault as fault:
        return str(fault)
    foreign = [key for key in config if key not in known and config[key] not in (None, False, [], {})]
    if foreign and config.get("peft_type") == "LORA":
        return f"keys that PEFT does not know: {foreign}"
    for key in ("r", "num_virtual_tokens"):
        if type(config.get(key)) not in (int, type(None)) or (config.get(key) or 1) < 1:
            return f"{key} is {config[key]!r}"
    alpha = config.get("lora_alpha")
    # a kind that has no rank of its own leaves it unread
    if alpha is not None and config.get("r") and (type(alpha) not in (int, float) or not 0 < alpha < math.inf):
        return f"lora_alpha is {alpha!r}"
    return None


def try_config(mutator: Mutator, seeds: list[tuple[bytes, set[str]]], tally: Tally) -> None:
    """Try one mutant of a config."""
    raw, known = mutator.random.choice(seeds)
    mutant = mutator.json(raw)
    tally.take(lambda: read_config(mutant, model_type="llama"), lambda: config_fault(mutant, known))


@dataclass
class FolderSeed:
    """A sound upload: its files, what is declared of it, and what its acceptance must mean."""

    files: dict[str, bytes]
    declared: Declared
    options: ConvertOptions
    judge: Callable[[dict[str, bytes], Path, BaseDims], str | None]


def folder_seeds(root: Path) -> list[FolderSeed]:
    """Return a LoRA, an S2FT and a MeteoRA upload over one tiny base."""
    base = TinyBase.write(root / "base", GQA)
    options = ConvertOptions(base.dims, "float32", MAX_RANK, base_dir=str(base.folder))
    lora = {
        "adapter_config.json": json.dumps(lora_config(target_modules=["k_proj"], use_rslora=True)).encode(),
        "adapter_model.safetensors": safetensors_bytes(lora_tensors(TINY, sites=("k_proj",))),
    }
    s2ft = s2ft_checkpoint(base, S2ft(up=[[3], [1]], down=[[9, 1], []]))[0]
    write_model(root / "s2ft", s2ft)
    write_model(root / "meteora", meteora_checkpoint(base, mixture(base.dims, (1, 2), ("q_proj",))))
    told: dict[str, Any] = {"top_k": 2, "temperature": 1.0, "rank": [1, 2], "alpha": 2}
    return [
        FolderSeed(lora, Declared("peft"), options, lora_fault),
        FolderSeed(_model(root / "s2ft"), Declared("s2ft"), options, image_fault),
        FolderSeed(_model(root / "meteora"), Declared("meteora", told), options, image_fault),
    ]


def _model(folder: Path) -> dict[str, bytes]:
    return {"model.safetensors": (folder / "model.safetensors").read_bytes()}


def try_folder(mutator: Mutator, seed: FolderSeed, root: Path, tally: Tally) -> None:
    """Convert one mutant of an upload."""
    source, target = root / "source", root / "target"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    files, options = dict(seed.files), seed.options
    name = mutator.random.choice(sorted(files))
    is_json = name.endswith(".json")
    files[name] = mutator.json(files[name]) if is_json else mutator.safetensors(files[name])
    for filename, raw in files.items():
        (source / filename).write_bytes(raw)
    wanted = ConvertOptions(
        options.base, options.dtype, options.max_rank, base_dir=options.base_dir, declared=seed.declared
    )
    tally.take(lambda: convert(source, target, wanted), lambda: seed.judge(files, target, options.base))


def image_fault(files: dict[str, bytes], target: Path, base: BaseDims) -> str | None:
    """Judge the canonical files that came of an upload."""
    manifest, image = ((target / name).read_bytes() for name in ("adapter.json", "adapter.safetensors"))
    return canonical_fault(manifest, image, base.to_dict(), "float32", MAX_RANK)


def lora_fault(files: dict[str, bytes], target: Path, base: BaseDims) -> str | None:
    """Judge the canonical files of a LoRA, and compare what they do with what was uploaded."""
    if (fault := image_fault(files, target, base)) is not None:
        return fault
    config = strict_json(files["adapter_config.json"], 1 << 20)
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")):
        return None
    scaling = config.get("lora_alpha", 8) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    sent = _arrays(files["adapter_model.safetensors"])
    stored = _arrays((target / "adapter.safetensors").read_bytes())
    for name, b in sent.items():
        if not name.endswith("lora_B.weight"):
            continue
        layer, site = name.split("layers.")[1].split(".")[0], next(site for site in SITES if f".{site}." in name)
        stem = f"L{layer}.{site.removesuffix('_proj')}"
        wanted = scaling * (b @ sent[name.replace("lora_B", "lora_A")])
        found = stored.pop(f"{stem}.BT").T @ stored.pop(f"{stem}.A")
        if not np.allclose(wanted, found, rtol=1e-4, atol=1e-6 * float(np.abs(wanted).max(initial=0))):
            return f"{name} acts otherwise than it was sent"
    left = [name for name in stored if not name.startswith("pad.")]
    return f"tensors from nowhere: {left}" if left else None


def _arrays(raw: bytes) -> dict[str, Any]:
    tensors, data = read_file(raw, 1 << 20, 4096)
    return {
        name: np.array(floats(data[begin:end], dtype), dtype=np.float64).reshape(shape)
        for name, dtype, shape, begin, end in tensors
        if dtype in ("F32", "F16", "BF16")
    }
