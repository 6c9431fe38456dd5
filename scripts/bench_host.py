"""The engine's own cost of a step, without any model: scheduling, batch building, and the frame to the API.

Run as a child process: prints JSON with milliseconds per decode step at each number of sequences. The engine, the batch
builder and the frames are the server's; only the model is left out (every row gets a fixed token).
"""

import argparse
import json
import statistics
import time

from adapter_kernels.route import Placement
from serve.engine.batch import build_batch
from serve.engine.engine import Engine
from serve.engine.ipc import encode_frame
from serve.engine.limits import EngineLimits
from serve.engine.plan import LoadResult, RowResult, StepPlan
from serve.messages import SamplingParams, Submit

BLOCK_SIZE = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64


class NoModel:
    """`serve.engine.plan.Executor` that builds each batch, times that, and answers at once."""

    def __init__(self) -> None:
        self.batch_s = 0.0

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Build the step's tensors; every row that samples gets token 5."""
        begin = time.perf_counter()
        build_batch(plan, BLOCK_SIZE, _no_adapter)
        self.batch_s += time.perf_counter() - begin
        return [RowResult(row.request_id, None if row.sample is None else 5) for row in plan.rows]

    def start_load(self, digest: str, slot: int) -> None:
        """Never asked: the base alone runs."""

    def poll_loads(self) -> list[LoadResult]:
        """Return nothing."""
        return []

    def drop(self, digest: str, slot: int) -> None:
        """Never asked."""

    def release_request(self, request_id: str) -> None:
        """Forget nothing."""

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Never asked."""


def main() -> None:
    """Print the medians over all decode steps of one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 128])
    args = parser.parse_args()
    print(json.dumps({str(count): decode_step(count) for count in args.sequences}))


def decode_step(count: int) -> dict[str, float]:
    """Return milliseconds per decode step of `count` sequences, by part."""
    executor = NoModel()
    engine = Engine(limits_for(count), executor, time.monotonic)
    for index in range(count):
        sampling = SamplingParams(OUTPUT_TOKENS, index, temperature=0.0, ignore_eos=True)
        engine.handle(Submit(f"r{index}", [index + 7] * PROMPT_TOKENS, sampling))
    parts: dict[str, list[float]] = {"schedule_ms": [], "batch_ms": [], "frame_ms": []}
    while engine.has_work():
        batch_s, begin = executor.batch_s, time.perf_counter()
        events = engine.step()
        stepped = time.perf_counter()
        encode_frame(events)
        framed = time.perf_counter()
        batch_ms = (executor.batch_s - batch_s) * 1000
        parts["batch_ms"].append(batch_ms)
        parts["schedule_ms"].append((stepped - begin) * 1000 - batch_ms)
        parts["frame_ms"].append((framed - stepped) * 1000)
    # the first steps are prefills, the last ones shrink
    decodes = {name: statistics.median(values[count // 16 + 4 : -4]) for name, values in parts.items()}
    return decodes | {"total_ms": sum(decodes.values())}


def limits_for(count: int, output_tokens: int = OUTPUT_TOKENS) -> EngineLimits:
    """Return limits under which `count` sequences run at once."""
    length = PROMPT_TOKENS + output_tokens
    blocks = count * (length // BLOCK_SIZE + 2)
    return EngineLimits(blocks, BLOCK_SIZE, max(1024, length + 1), count, 2048, count + 1, 0, 0, (1,))


def _no_adapter(slot: int) -> Placement:
    raise AssertionError(f"slot {slot} was asked for, and no request names an adapter")


if __name__ == "__main__":
    main()
