"""From an `EngineConfig` to a loaded model on the CPU: threads and KV cache size; done once at start.

Owns the start-up decisions that need the model's size; everything it learns goes into `StartFacts`, never back into
the config. Invariant: a config that cannot work is a `StartError` before the weights are read.
"""

import math
import os
from dataclasses import dataclass

import torch

from adapters_store.base import SITES
from serve.config import EngineConfig
from serve.engine.cpu_memory import blocks_of_their_own, bound_kernel_cache
from serve.engine.cpu_threads import start_threads
from serve.engine.sampling_plan import Grammars
from serve.engine.start_facts import MakeGrammars, ModelFacts, StartFacts, no_grammars, read_model_facts
from serve.errors import StartError
from serve.model.decoder import Decoder
from serve.model.kv_cache import KvCache, bytes_per_block
from serve.model.spec import ModelSpec
from serve.model.weights import load_decoder

# of the memory that is free after loading: the rest is for adapters, activations and the machine's other work
_KV_MEMORY_SHARE = 0.4
# on a CPU the adapters' memory grows as it is used: a bound, not a reservation
_ADAPTER_BYTES = 2 << 30
# a 512 x 512 product of 32 rows takes 40 us on one core, as long as waking a second one may (2026-11)
_MIN_THREADED_WEIGHTS = 512 * 512
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What the executor runs on."""

    facts: StartFacts
    spec: ModelSpec
    decoder: Decoder
    kv: KvCache
    block_size: int
    shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype
    # None when the base has no tokenizer.json: then no grammar reaches the engine
    grammars: Grammars | None


def load_parts(config: EngineConfig, make_grammars: MakeGrammars = no_grammars) -> ModelParts:
    """Load the model.

    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    model = read_model_facts(config, "cpu")
    spec, dtype = model.spec, model.dtype
    bound_kernel_cache()
    start_threads(config.num_threads or _num_threads(spec))
    cpu = torch.device("cpu")
    with blocks_of_their_own():
        decoder = load_decoder(config.model_dir, spec, dtype, cpu, max_model_len=model.max_model_len)
        grammars = make_grammars(model)
    num_blocks = _num_kv_blocks(config, model)
    return ModelParts(
        facts=StartFacts(model, "cpu", config.block_size, num_blocks, _adapter_bytes(config)),
        spec=spec,
        decoder=decoder,
        kv=KvCache.build(spec, num_blocks, config.block_size, dtype, cpu),
        block_size=config.block_size,
        shapes={site: spec.dims.site_shape(site) for site in SITES},
        dtype=dtype,
        grammars=grammars,
    )


def _adapter_bytes(config: EngineConfig) -> int:
    return _ADAPTER_BYTES if config.adapter_device_bytes is None else config.adapter_device_bytes


def _num_threads(spec: ModelSpec) -> int:
    """All cores; one where the layers are so small that handing work over costs more than it saves."""
    widest = max(math.prod(spec.dims.site_shape(site)) for site in SITES)
    return 1 if widest < _MIN_THREADED_WEIGHTS else len(os.sched_getaffinity(0))


def _num_kv_blocks(config: EngineConfig, model: ModelFacts) -> int:
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks < 1:
            raise StartError(f"--kv-blocks {config.num_kv_blocks}: at least 1 is needed")
        return config.num_kv_blocks
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES
    block_bytes = bytes_per_block(model.spec, config.block_size, model.dtype)
    affordable = int(free_bytes * _KV_MEMORY_SHARE) // block_bytes
    # more than every sequence at full length is never used
    useful = model.max_num_seqs * -(-model.max_model_len // config.block_size)
    num_blocks = min(affordable, useful)
    if num_blocks < 1:
        raise StartError(
            f"no memory for one KV block of {block_bytes} bytes: {free_bytes} bytes are free; "
            "free some, or serve a smaller model"
        )
    return num_blocks
