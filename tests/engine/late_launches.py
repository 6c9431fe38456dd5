"""What serving launches that the start has not compiled: `python -m tests.engine.late_launches`, one line per kernel.

Owns the steps: those of the start (the trial, the captures), then mixed ones of every form. Runs in a process of its
own: TRITON_INTERPRET must not be set when triton is imported. Invariant: launches are recorded, none runs, so it takes
no GPU; what is compared is the very signature that a GPU would compile.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.tables import SITES
from serve.engine.cuda_graphs import ALL_SITES, NO_SITES, GraphKey, decode_buckets
from serve.engine.device_parts import _Start, prepare_capture
from serve.engine.device_trial import RanklessAdapters, run_trial
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.engine.start_facts import read_model_facts
from serve.messages import SamplingParams
from tests.engine.device_cases import BLOCK_SIZE, write_model
from tests.kernels.gpu.recorded_launches import recorded_launches

Composed = tuple[tuple[int, float], ...]

_NUM_BLOCKS = 100
# what acts on the rows in turn: nothing, an adapter, several; slot 1 is of all families
_ACTING: tuple[tuple[int | Composed | None, ...], ...] = (
    (None,),
    (0,),
    (None, 0),
    (((0, 0.5),),),
    (((0, 0.5), (1, -2.0)), None, 1),
    (((0, 1.0),), 0, ((0, 1.0), (1, 0.5))),
)
# decodes beside chunks of these lengths: rows one by one, in blocks of 16, in blocks of 64
_STEPS = ((3, (5,)), (0, (2, 9)), (1, (40,)), (6, (17, 48)), (2, (150, 140)), (5, (256,)), (7, ()), (0, (33,)))


def main() -> None:
    """Print what is late."""
    with tempfile.TemporaryDirectory() as folder, recorded_launches() as launches:
        config = replace(write_model(Path(folder) / "base"), max_step_tokens=300, max_num_seqs=8)
        model = replace(read_model_facts(config, "interpreter"), max_model_len=300)
        start = _Start.begin(config, model, "interpreter")
        forward = start._forward(_NUM_BLOCKS, 0)
        adapters = RanklessAdapters(model.spec.dims.num_hidden_layers, tuple(FUSED_SITES), SITES)
        executor = start._executor(forward, adapters, None, None)
        run_trial(executor, start.bounds, model.max_model_len)
        for bucket in decode_buckets(start.bounds.max_decodes):
            for mask in (ALL_SITES, NO_SITES):
                prepare_capture(forward, start.buffers, BLOCK_SIZE, GraphKey(bucket, mask))()
        num_at_start = len(launches)
        for rows in _rows():
            executor.execute(StepPlan(rows, {0: "", 1: ""}))
    compiled = {launch.key for launch in launches[:num_at_start]}
    for launch in {launch.key: launch for launch in launches[num_at_start:]}.values():
        if launch.key not in compiled:
            print(launch.key)
    print(f"{num_at_start} launches at the start, {len(launches) - num_at_start} behind it")


def _rows() -> Iterator[list[Row]]:
    for num_decodes, chunks in _STEPS:
        for acting in _ACTING:
            lengths = [1] * num_decodes + list(chunks)
            yield [_row(i, length, acting[i % len(acting)]) for i, length in enumerate(lengths)]


def _row(index: int, length: int, acting: int | Composed | None) -> Row:
    sample = SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), [0], [])
    slot, composed = (None, acting) if isinstance(acting, tuple) else (acting, ())
    return Row(f"row-{index}", [1] * length, index, list(range(_NUM_BLOCKS)), slot, sample, composed=composed)


if __name__ == "__main__":
    main()
