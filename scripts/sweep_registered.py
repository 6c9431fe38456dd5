"""Stores with few and with very many registered adapters, for `sweep_cpu.py`.

Owns how they are stocked: in this process and without the converter's walls, since every file is the script's own.
Invariant: what is asked is registered as an upload would have it; what is there from an earlier run is used again.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adapters_store.base import read_base_dims
from adapters_store.convert.dispatch import convert
from adapters_store.proof import NotProbed
from adapters_store.store import AdapterStore
from loadtest.adapter_changes import read_source
from scripts.bench_model import Shape

_UNPROVEN = NotProbed("registered for a benchmark, never asked for")


def stock(folder: Path, base: Path, served_name: str, busy: Sequence[Path], num_registered: int, work: Path) -> None:
    """Register `busy` and as many small adapters beside them as make `num_registered` in the store `folder`."""
    source = read_source(_small_adapter(work / "idle"))
    dims = read_base_dims(base)
    with closing(AdapterStore.open(folder, dims, base_dir=base, served_name=served_name, convert=convert)) as store:
        known = {version.name for version in store.list()}
        for each in busy:
            if each.name not in known:
                store.put_dir(each.name, each, trusted=True, proving=_UNPROVEN)
        variant = work / "variant"
        variant.mkdir(exist_ok=True)
        for index in range(num_registered - len(busy)):
            if (name := f"idle-{index:05d}") in known:
                continue
            for file, content in source.files(index).items():
                (variant / file).write_bytes(content)
            store.put_dir(name, variant, trusted=True, proving=_UNPROVEN)


def _small_adapter(folder: Path) -> Path:
    """Write a rank-1 adapter of one site: what is registered beside the busy ones only has to be many."""
    folder.mkdir(parents=True, exist_ok=True)
    site = "base_model.model.model.layers.0.self_attn.q_proj"
    out_dim, in_dim = Shape().linears()["self_attn.q_proj"]
    rng = np.random.default_rng(0)
    tensors = {
        f"{site}.lora_A.weight": rng.standard_normal((1, in_dim), dtype=np.float32),
        f"{site}.lora_B.weight": rng.standard_normal((out_dim, 1), dtype=np.float32),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    config |= {"target_modules": ["q_proj"], "layers_to_transform": [0], "base_model_name_or_path": "bench-base"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
