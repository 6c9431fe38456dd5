"""The probe of the offline commands: an engine of its own over the store's folder, for as long as one upload takes.

Owns the engine process and the event loop that its gateway lives in. Invariant: both are gone when the block ends,
however it ends; the engine is small, on the CPU, and serves nobody else.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.proof import Proof, Staged
from serve.api.engine_client import EngineClient
from serve.config import EngineConfig, LimitsConfig, WatchdogConfig
from serve.metrics import Metrics
from serve.probe.probe import EngineProbe

# room for the longest virtual prompt and a probe's own
_NUM_KV_BLOCKS = 320
_MAX_NUM_SEQS = 4


def probe_offline(model_dir: Path, store_dir: Path, dtype: str, staged: Staged) -> Proof:
    """Prove one adapter on an engine that is started for it; a `Probe` once the first three are given.

    Raises:
        StartError: the engine does not start; the message says why. StoreError, ServeError: as `EngineProbe`.
    """
    # the engine process has another working folder
    with _running_engine(model_dir.absolute(), store_dir.absolute(), dtype) as probe:
        return probe(staged)


@contextmanager
def _running_engine(model_dir: Path, store_dir: Path, dtype: str) -> Iterator[EngineProbe]:
    """Start an engine that computes in the dtype of the store's images, and yield the probe that runs on it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="offline probe")
    thread.start()
    try:
        engine = asyncio.run_coroutine_threadsafe(_start(model_dir, store_dir, dtype), loop).result()
        try:
            yield EngineProbe(engine, loop)
        finally:
            asyncio.run_coroutine_threadsafe(engine.close(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(model_dir: Path, store_dir: Path, dtype: str) -> EngineClient:
    config = EngineConfig(
        model_dir=model_dir,
        store_dir=store_dir,
        device="cpu",
        dtype=dtype,
        num_kv_blocks=_NUM_KV_BLOCKS,
        max_num_seqs=_MAX_NUM_SEQS,
    )
    metrics = Metrics(max_adapters=config.num_adapter_slots, compat_vllm=False)
    engine = EngineClient(config, LimitsConfig(), WatchdogConfig(), metrics)
    engine.start()
    try:
        await engine.wait_ready()
    except BaseException:
        await engine.close()
        raise
    return engine
