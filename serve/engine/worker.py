"""The engine process: `python -m serve.engine.worker --socket PATH`, its `EngineConfig` as JSON on stdin.

Owns the composition of images, torch executor and pure engine; the process's life is `step_loop`'s. Only this process
imports torch. Invariant: what the executor learnt at start (`ModelParts`) is what the engine's limits and `Ready` say.
"""

import argparse
import logging
import sys
import time
from functools import partial

from adapters_store.blobs import open_image
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.executor import TorchExecutor
from serve.engine.limits import EngineLimits
from serve.engine.model_parts import ModelParts, load_parts
from serve.engine.step_loop import BuiltEngine, run_worker


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Load the model and put the engine on top.

    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    parts = load_parts(config)
    executor = TorchExecutor(parts, partial(open_image, config.store_dir / "objects"))
    return BuiltEngine(Engine(_limits(config, parts), executor, time.monotonic), parts.ready())


def _limits(config: EngineConfig, parts: ModelParts) -> EngineLimits:
    return EngineLimits(
        num_kv_blocks=parts.num_kv_blocks,
        block_size=parts.block_size,
        max_model_len=parts.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        max_waiting=config.max_waiting,
        adapter_host_bytes=config.adapter_host_bytes,
        adapter_device_bytes=config.adapter_device_bytes,
        num_adapter_slots=config.num_adapter_slots,
        eos_token_ids=parts.spec.eos_token_ids,
        enable_prefix_cache=config.enable_prefix_cache,
    )


def main(arguments: list[str]) -> int:
    """Run the engine process and return its exit status."""
    parser = argparse.ArgumentParser(prog="serve.engine.worker")
    parser.add_argument("--socket", required=True, help="path of the parent's Unix socket")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    return run_worker(parser.parse_args(arguments).socket, sys.stdin.buffer.read(), build_engine)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
