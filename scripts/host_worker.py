"""An engine process without a model, for `bench_host.py`: the server's own engine, batches and frames at a fixed pace.

Started by the API as its worker in the place of `serve.engine.worker`. Every row that samples gets one and the same
token, a step takes `STEP_S` as if a model ran, and the processor time of this process is the host's own work.
"""

import argparse
import sys
import time

from scripts.bench_host import NoModel, limits_for
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.plan import RowResult, StepPlan
from serve.engine.step_loop import BuiltEngine, run_worker
from serve.messages import Ready
from serve.model.spec import read_spec

# a step of a 0.5 B model with 32 rows takes five times as long; what the host does per step does not depend on it
STEP_S = 0.02
_MAX_SEQUENCES = 256


class PacedNoModel(NoModel):
    """`NoModel` whose steps take time."""

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Build the batch, then sleep as long as a model would compute."""
        results = super().execute(plan)
        time.sleep(STEP_S)
        return results


def build(config: EngineConfig) -> BuiltEngine:
    """Build the engine for the base whose config and tokenizer the API reads."""
    spec = read_spec(config.model_dir)
    limits = limits_for(_MAX_SEQUENCES, output_tokens=2048)
    ready = Ready(
        base_fingerprint=spec.dims.weights_fingerprint,
        max_model_len=limits.max_model_len,
        num_kv_blocks=limits.num_kv_blocks,
        block_size=limits.block_size,
        dtype="bfloat16",
        device="none",
        eos_token_ids=list(spec.eos_token_ids),
        vocab_size=spec.dims.vocab_size,
        hidden_size=spec.dims.hidden_size,
    )
    return BuiltEngine(Engine(limits, PacedNoModel(), time.monotonic), ready)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="scripts.host_worker")
    parser.add_argument("--socket", required=True)
    raise SystemExit(run_worker(parser.parse_args().socket, sys.stdin.buffer.read(), build))
