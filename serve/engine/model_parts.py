"""From an `EngineConfig` to a loaded model: dtype, threads, KV cache size, grammars; done once at start.

Owns the start-up decisions that need the model's size; everything it learns goes into `ModelParts`, never back into
the config. Invariant: a config that cannot work is a `StartError` before the weights are read.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters_store.base import SITES
from serve.config import EngineConfig
from serve.engine.cpu_threads import start_threads
from serve.engine.grammar import GrammarMasks
from serve.errors import StartError
from serve.messages import Ready
from serve.model.decoder import Decoder
from serve.model.kv_cache import KvCache, bytes_per_block
from serve.model.spec import ModelSpec, read_spec
from serve.model.weights import load_decoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of the memory that is free after loading: the rest is for adapters, activations and the machine's other work
_KV_MEMORY_SHARE = 0.4
# a 512 x 512 product of 32 rows takes 40 us on one core, as long as waking a second one may (2026-11)
_MIN_THREADED_WEIGHTS = 512 * 512
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What the executor runs on."""

    spec: ModelSpec
    decoder: Decoder
    kv: KvCache
    block_size: int
    num_kv_blocks: int
    max_model_len: int
    shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype
    dtype_name: str
    # None when the base has no tokenizer.json: then no grammar reaches the engine
    grammars: GrammarMasks | None

    def ready(self) -> Ready:
        """Say what start-up learnt."""
        return Ready(
            base_fingerprint=self.spec.dims.weights_fingerprint,
            max_model_len=self.max_model_len,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            dtype=self.dtype_name,
            device="cpu",
            eos_token_ids=list(self.spec.eos_token_ids),
            vocab_size=self.spec.dims.vocab_size,
            hidden_size=self.spec.dims.hidden_size,
        )


def load_parts(config: EngineConfig) -> ModelParts:
    """Load the model.

    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    if config.device == "cuda":
        raise StartError("--device cuda: this version serves on the CPU; use --device cpu or auto")
    spec = read_spec(config.model_dir)
    dtype_name = spec.dtype if config.dtype == "auto" else config.dtype
    dtype = _DTYPES[dtype_name]
    max_model_len = _max_model_len(config, spec)
    start_threads(config.num_threads or _num_threads(spec))
    cpu = torch.device("cpu")
    decoder = load_decoder(config.model_dir, spec, dtype, cpu, max_model_len=max_model_len)
    num_blocks = _num_kv_blocks(config, spec, dtype, max_model_len)
    return ModelParts(
        spec=spec,
        decoder=decoder,
        kv=KvCache.build(spec, num_blocks, config.block_size, dtype, cpu),
        block_size=config.block_size,
        num_kv_blocks=num_blocks,
        max_model_len=min(max_model_len, num_blocks * config.block_size),
        shapes={site: spec.dims.site_shape(site) for site in SITES},
        dtype=dtype,
        dtype_name=dtype_name,
        grammars=_grammars(config.model_dir, spec),
    )


def _num_threads(spec: ModelSpec) -> int:
    """All cores; one where the layers are so small that handing work over costs more than it saves."""
    widest = max(math.prod(spec.dims.site_shape(site)) for site in SITES)
    return 1 if widest < _MIN_THREADED_WEIGHTS else len(os.sched_getaffinity(0))


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if not 1 <= config.max_model_len <= limit:
        raise StartError(
            f"--max-model-len {config.max_model_len}: the model has positions for 1 to {limit}; choose within"
        )
    return config.max_model_len


def _num_kv_blocks(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, max_model_len: int) -> int:
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks < 1:
            raise StartError(f"--kv-blocks {config.num_kv_blocks}: at least 1 is needed")
        return config.num_kv_blocks
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES
    block_bytes = bytes_per_block(spec, config.block_size, dtype)
    affordable = int(free_bytes * _KV_MEMORY_SHARE) // block_bytes
    # more than every sequence at full length is never used
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(affordable, useful)
    if num_blocks < 1:
        raise StartError(
            f"no memory for one KV block of {block_bytes} bytes: {free_bytes} bytes are free; "
            "free some, or serve a smaller model"
        )
    return num_blocks


def _grammars(model_dir: Path, spec: ModelSpec) -> GrammarMasks | None:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return None
    return GrammarMasks(path.read_text(encoding="utf-8"), spec.dims.vocab_size, list(spec.eos_token_ids))
