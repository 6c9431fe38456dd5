"""The engine process: `python -m serve.engine.worker --socket PATH`, its `EngineConfig` as JSON on stdin.

Owns the composition of images, executor (CPU or device) and pure engine; the process's life is `step_loop`'s. Only this
process imports torch. Invariant: what the executor learnt at start (`StartFacts`) is what the engine's limits and
`Ready` say.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from adapter_kernels.native_cpu import why_absent
from adapters_store.blob_choice import image_opener
from adapters_store.copies import OpenImage
from serve.config import EngineConfig
from serve.engine.cpu_threads import leave_core
from serve.engine.engine import Engine
from serve.engine.executor import TorchExecutor
from serve.engine.grammar import GrammarMasks
from serve.engine.host_images import HostImages
from serve.engine.limits import EngineLimits
from serve.engine.model_parts import load_parts
from serve.engine.plan import Executor
from serve.engine.signed_images import Verify, image_verifier, verified
from serve.engine.start_facts import ModelFacts, StartFacts, choose_device
from serve.engine.step_loop import BuiltEngine, run_worker

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Load the model and put the engine on top.

    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    device = choose_device(config.device, has_cuda=torch.cuda.is_available())
    return _on_cpu(config) if device == "cpu" else _on_device(config, device)


def _on_cpu(config: EngineConfig) -> BuiltEngine:
    parts = load_parts(config, partial(_grammars, config))
    lack = why_absent()
    if lack is not None and parts.dtype == torch.bfloat16:
        logger.warning("compiled CPU kernels are not used, adapters and attention run in torch, slower: %s", lack)
    verify = image_verifier(config)
    images = _host_images(config, verify)
    executor = TorchExecutor(parts, verified(images.open if images is not None else _open_image(config), verify))
    engine = _engine(config, parts.facts, executor, images)
    return BuiltEngine(engine, parts.facts.ready(), close=partial(_close, executor.close, images))


def _on_device(config: EngineConfig, device: str) -> BuiltEngine:
    # triton is there only where the GPU path can be chosen: a CPU installation has none
    from serve.engine.device_parts import load_device_parts  # noqa: PLC0415

    verify = image_verifier(config)
    images = _host_images(config, verify)
    image = verified(images.open if images is not None else _open_image(config), verify)
    parts = load_device_parts(config, device, image, partial(_grammars, config))
    # graphs that steps missed are captured while nobody waits for a token
    rest = parts.executor.capture_pending
    engine = _engine(config, parts.facts, parts.executor, images)
    return BuiltEngine(engine, parts.facts.ready(), rest, close=partial(_close, parts.executor.close, images))


def _open_image(config: EngineConfig) -> OpenImage:
    return image_opener(config.store_dir, config.blobs_url, cache_bytes=config.blobs_cache_bytes)


def _host_images(config: EngineConfig, verify: Verify | None) -> HostImages | None:
    """Return the host tier's memory; None when it is switched off."""
    if config.adapter_host_bytes == 0:
        return None
    return HostImages(_open_image(config), config.adapter_host_bytes, verify=verify, prepare_thread=leave_core)


def _close(close_executor: Callable[[], None], images: HostImages | None) -> None:
    if images is not None:
        images.close()
    close_executor()


def _grammars(config: EngineConfig, model: ModelFacts) -> GrammarMasks | None:
    return GrammarMasks.of_model(config.model_dir, model.spec.dims.vocab_size, model.spec.eos_token_ids)


def _engine(config: EngineConfig, facts: StartFacts, executor: Executor, images: HostImages | None) -> Engine:
    return Engine(_limits(config, facts), executor, time.monotonic, images)


def _limits(config: EngineConfig, facts: StartFacts) -> EngineLimits:
    return EngineLimits(
        num_kv_blocks=facts.num_kv_blocks,
        block_size=facts.block_size,
        max_model_len=facts.max_model_len,
        max_num_seqs=facts.model.max_num_seqs,
        max_step_tokens=facts.model.max_step_tokens,
        max_mixed_prefill_tokens=facts.model.max_mixed_prefill_tokens,
        mixed_prefill_divisor=facts.model.mixed_prefill_divisor,
        max_waiting=config.max_waiting,
        adapter_device_bytes=facts.adapter_device_bytes,
        num_adapter_slots=config.num_adapter_slots,
        eos_token_ids=facts.model.spec.eos_token_ids,
        enable_prefix_cache=config.enable_prefix_cache,
        adapter_host_bytes=config.adapter_host_bytes,
        max_host_images=config.adapter_host_count,
        is_host_device_memory=facts.device == "cpu",
    )


def main(arguments: list[str]) -> int:
    """Run the engine process and return its exit status."""
    parser = argparse.ArgumentParser(prog="serve.engine.worker")
    parser.add_argument("--socket", required=True, help="path of the parent's Unix socket")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    return run_worker(parser.parse_args(arguments).socket, sys.stdin.buffer.read(), build_engine)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
