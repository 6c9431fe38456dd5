"""Offline tuning: `python -m serve.engine.tune --model DIR --out FILE` measures tiles and writes a pinned table.

Owns the measuring: each candidate runs where it will serve, inside whole layers with random weights, adapters on all
sites, captured as a graph, L2 flushed. Decides by `tune_choices`. Invariant: runs on a GPU or not at all; the file is
written once, at the end, and is a table that `LaunchConfigs` reads.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from adapter_kernels.gpu.launch_config import LaunchConfig, LaunchConfigs, row_key, table_text
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.streams import CudaSide, InlineSide, SideStream
from serve.engine.device_timing import Timing, time_pass
from serve.engine.random_steps import RandomAdapters, RandomStep, decode_step, prefill_step, random_kv
from serve.engine.tune_choices import Sample, candidates, choose
from serve.errors import StartError
from serve.model.fused_decoder import FusedDecoder
from serve.model.fused_weights import read_fused_weights
from serve.model.spec import ModelSpec, read_spec
from serve.model.weight_source import RandomWeights

# enough layers that weights leave the L2 cache between two uses, few enough to be quick
_NUM_LAYERS = 4
# rows of the decode steps, one for each form of the route, and of the prefill
_DECODE_ROWS = (8, 64)
_PREFILL_ROWS = 2048
_CONTEXT = 1024
_NUM_ADAPTERS, _RANK = 8, 16

Row = tuple[str, str]
TimePass = Callable[[Callable[[], object], torch.device], Timing]


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """One model of few layers, and how its passes are timed."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    max_rows: int
    time_pass: TimePass

    @classmethod
    def build(cls, spec: ModelSpec, device: torch.device, timer: TimePass, max_rows: int = _PREFILL_ROWS) -> "Bench":
        """Cut the model down to a few layers."""
        num_layers = min(_NUM_LAYERS, spec.dims.num_hidden_layers)
        dims = dataclasses.replace(spec.dims, num_hidden_layers=num_layers)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(
            dataclasses.replace(spec, dims=dims, layers=spec.layers[:num_layers]), dtype, device, max_rows, timer
        )


def tune(bench: Bench, steps: list[RandomStep], say: Callable[[str], None]) -> dict[Row, LaunchConfig]:
    """Measure every op of every step, one after the other, each on top of what was found before it."""
    weights = read_fused_weights(
        RandomWeights(bench.spec, bench.dtype, bench.device, torch.Generator(bench.device).manual_seed(0))
    )
    kv = random_kv(bench.spec, max(_context_rows(step) for step in steps), bench.dtype, bench.device)
    side: SideStream = CudaSide(bench.device) if bench.device.type == "cuda" else InlineSide()

    def measure(step: RandomStep, rows: dict[Row, LaunchConfig]) -> Timing:
        decoder = FusedDecoder(
            bench.spec,
            weights,
            max_model_len=None,
            max_step_tokens=bench.max_rows,
            max_decodes=min(bench.max_rows, max(_DECODE_ROWS)),
            side=side,
            configs=LaunchConfigs(rows),
        )

        def run() -> None:
            step.prepare()
            decoder.hidden(step.inputs, kv)

        return bench.time_pass(run, bench.device)

    found: dict[Row, LaunchConfig] = {}
    for step in steps:
        for op, width in _tuned_widths(bench.spec, step):
            block_rows = block_rows_for(step.inputs.num_rows)
            row = row_key(op, width, block_rows)
            # attention has one row for all forms of the route: it is measured in the step of its own form
            if row not in found and row[1].endswith(f"/{block_rows}"):
                best = _tune_row(row, lambda rows, step=step: measure(step, rows), found, say)  # type: ignore[misc]
                found |= {} if best is None else {row: best}
    return found


def main(arguments: list[str]) -> int:
    """Run the command; 2 and one line where it cannot."""
    parser = argparse.ArgumentParser(prog="chorale tune")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        said = f"chorale: tune measures on a GPU, and torch {torch.__version__} sees none; run it on the machine that"
        print(f"{said} shall serve. Without a table kernels take their defaults", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        bench = Bench.build(read_spec(args.model), device, time_pass)
    except StartError as error:
        print(f"chorale: {error}", file=sys.stderr)
        return 2
    rows = tune(bench, make_steps(bench), lambda line: print(line, flush=True))
    name = torch.cuda.get_device_name(device)
    measured = f"{args.model.name}, torch {torch.__version__}, triton {version('triton')}"
    args.out.write_text(table_text([name], measured, rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} rows for {name}; to pin them, put the file into adapter_kernels/gpu/configs")
    return 0


def make_steps(bench: Bench) -> list[RandomStep]:
    """Decode steps of each form of the route and one prefill, all with several adapters."""
    adapters = RandomAdapters.build(
        bench.spec, _RANK, _NUM_ADAPTERS, bench.dtype, bench.device, max_rows=bench.max_rows
    )
    steps = [
        decode_step(bench.spec, num_rows, _CONTEXT, adapters.route(_mixed(num_rows)), bench.device)
        for num_rows in _DECODE_ROWS
    ]
    routed = adapters.route([0] * _PREFILL_ROWS)
    return [*steps, prefill_step(bench.spec, _PREFILL_ROWS, routed, bench.device)]


def _tune_row(
    row: Row,
    measure: Callable[[dict[Row, LaunchConfig]], Timing],
    found: dict[Row, LaunchConfig],
    say: Callable[[str], None],
) -> LaunchConfig | None:
    op, shape = row
    present = _sample(None, measure(found))
    tried = []
    for config in candidates(op, int(shape.split("/")[1])):
        try:
            tried.append(_sample(config, measure(found | {row: config})))
        # a tile that this device cannot run is no candidate; which error says so depends on its compiler
        except Exception as error:
            say(f"{op} {shape}: {config}: {type(error).__name__}")
    best = choose(present, tried)
    fastest = min([present, *tried], key=lambda sample: sample.median_us)
    kept = "kept" if best is None else str(best)
    say(f"{op} {shape}: {present.median_us:.1f} us, fastest of {len(tried)}: {fastest.median_us:.1f} us, {kept}")
    return best


def _tuned_widths(spec: ModelSpec, step: RandomStep) -> list[tuple[str, int]]:
    """The ops of a step with the width that each one's tiles are chosen by."""
    dims = spec.dims
    query = dims.num_attention_heads * dims.head_dim
    attention = "paged_decode" if step.inputs.decodes is not None else "paged_prefill"
    return [
        ("shrink", dims.hidden_size),
        ("shrink", dims.intermediate_size),
        ("expand", dims.hidden_size),
        ("qkv_sink", query + 2 * dims.num_key_value_heads * dims.head_dim),
        ("swiglu_sink", dims.intermediate_size),
        (attention, dims.head_dim),
    ]


def _mixed(num_rows: int) -> list[int]:
    return [row % _NUM_ADAPTERS for row in range(num_rows)]


def _context_rows(step: RandomStep) -> int:
    decodes = step.inputs.decodes
    return step.inputs.num_rows if decodes is None else decodes.num_seqs * _CONTEXT


def _sample(config: LaunchConfig | None, timing: Timing) -> Sample:
    return Sample(config, timing.median_us, timing.p10_us, timing.p90_us)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
