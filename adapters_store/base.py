"""The frozen base model as the store sees it: dimensions, the seven sites and a fingerprint of the weights.

Reads `config.json` and safetensors headers only: no torch, no weights in memory. Invariant: `site_shape` is the only
place that says how large an adapter's matrices must be.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

# order of the sites inside a layer of the adapter image
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# the output head: no site of any layer, yet a linear layer that adapters may act on
HEAD = "lm_head"

# base-neutral module path of each site, as the manifest spells it
SITE_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}

# bytes hashed at both ends of each tensor: cheap on 100 GB, and two trainings never agree in them
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class BaseDims:
    """Dimensions of the base that adapters must match, and the fingerprint of its weights ("sha256:<hex>")."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    weights_fingerprint: str

    def site_shape(self, site: str) -> tuple[int, int]:
        """Return (out, in) of one of `SITES` or of `HEAD`, as in `nn.Linear.weight`."""
        hidden = self.hidden_size
        query = self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (self.intermediate_size, hidden),
            "up_proj": (self.intermediate_size, hidden),
            "down_proj": (hidden, self.intermediate_size),
            HEAD: (self.vocab_size, hidden),
        }[site]

    def to_dict(self) -> dict[str, str | int | bool]:
        """Return the manifest's `base` object."""
        return asdict(self)


def read_base_dims(model_dir: Path) -> BaseDims:
    """Read the dimensions of a Hugging Face model folder.

    Raises:
        OSError: a file is missing or unreadable. KeyError, ValueError: `config.json` lacks a field or is not JSON.
    """
    outer = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config = outer.get("text_config") or outer
    config = {**_DEFAULTS.get(config["model_type"], {}), **{k: v for k, v in config.items() if v is not None}}
    num_heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return BaseDims(
        model_type=str(config["model_type"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=num_heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or num_heads),
        # Mistral writes an explicit null; only then the quotient is right
        head_dim=int(config.get("head_dim") or hidden // num_heads),
        vocab_size=int(config["vocab_size"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))),
        weights_fingerprint=weights_fingerprint(model_dir),
    )


# what transformers assumes where a family's checkpoints leave a key out (Gemma 3 of 4 B names four keys in all)
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
_DEFAULTS: dict[str, dict[str, int | bool]] = {
    "gemma2": _GEMMA | {"vocab_size": 256_000},
    "gemma3_text": _GEMMA | {"vocab_size": 262_208},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True, "num_key_value_heads": 4},
}


def weights_fingerprint(model_dir: Path) -> str:
    """Hash names, dtypes, shapes and both ends of every tensor of the folder's safetensors files."""
    entries: list[tuple[str, str, str, bytes]] = []
    for path in sorted(model_dir.glob("*.safetensors")):
        entries.extend(_tensor_samples(path))
    digest = hashlib.sha256()
    for name, dtype, shape, sample in sorted(entries):
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _tensor_samples(path: Path) -> list[tuple[str, str, str, bytes]]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.name}: safetensors header of {header_bytes} bytes; limit {_MAX_HEADER_BYTES}")
        header = json.loads(file.read(header_bytes))
        if not isinstance(header, dict):
            raise ValueError(f"{path.name} is damaged: its safetensors header is no JSON object")
        start = 8 + header_bytes
        samples = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            head = file.read(min(_SAMPLE_BYTES, end - begin))
            file.seek(start + max(begin, end - _SAMPLE_BYTES))
            tail = file.read(min(_SAMPLE_BYTES, end - begin))
            samples.append((name, entry["dtype"], str(entry["shape"]), head + tail))
        return samples
