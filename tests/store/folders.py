"""PEFT folders made by hand, a tiny base for them, and a store that converts in this process.

Owns the shape of test uploads. Invariant: the safetensors writer here shares no code with the reader under test.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.convert.peft import convert_peft
from adapters_store.store import AdapterStore

TINY = BaseDims(
    model_type="llama",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    vocab_size=32,
    tie_word_embeddings=False,
    weights_fingerprint="sha256:" + "0" * 64,
)

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def open_store(root: Path, base: BaseDims = TINY, *, image_dtype: str = "float32", **options: object) -> AdapterStore:
    """Open a store that converts in this process, which is a hundred times faster than in a child."""
    return AdapterStore.open(root, base, image_dtype=image_dtype, **{"convert": convert_peft, **options})  # type: ignore[arg-type]


def lora_config(**changes: object) -> dict[str, object]:
    """Return a valid config for all seven sites with some keys changed."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": list(SITES),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    return config | changes


def lora_tensors(
    base: BaseDims = TINY, *, rank: int = 2, sites: tuple[str, ...] = SITES, seed: int = 0, bias: bool = False
) -> Tensors:
    """Return random float32 tensors under PEFT's names."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(base.num_hidden_layers):
        for site in sites:
            num_out, num_in = base.site_shape(site)
            stem = f"base_model.model.model.layers.{layer}.{SITE_PATHS[site]}"
            tensors[f"{stem}.lora_A.weight"] = float32(random.standard_normal((rank, num_in)))
            tensors[f"{stem}.lora_B.weight"] = float32(random.standard_normal((num_out, rank)))
            if bias:
                tensors[f"{stem}.lora_B.bias"] = float32(random.standard_normal(num_out))
    return tensors


def float32(values: npt.ArrayLike) -> tuple[str, tuple[int, ...], bytes]:
    """Return an entry for `safetensors_bytes`."""
    array = np.asarray(values, dtype="<f4")
    return "F32", array.shape, array.tobytes()


def safetensors_bytes(tensors: Tensors) -> bytes:
    """Write a safetensors file, straight from the format's one-page description."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


def read_tensors(path: Path) -> Tensors:
    """Read a sound safetensors file, as `safetensors_bytes` takes it."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), raw[begin + first : begin + last])
    return tensors


def write_folder(folder: Path, config: dict[str, object] | bytes, tensors: Tensors | bytes) -> Path:
    """Write the two files of an upload; bytes are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    raw_config = config if isinstance(config, bytes) else json.dumps(config).encode()
    raw_tensors = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
    (folder / "adapter_config.json").write_bytes(raw_config)
    (folder / "adapter_model.safetensors").write_bytes(raw_tensors)
    return folder
