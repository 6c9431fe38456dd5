"""Part `grid` of `make gpu-check`: step times of two random-weight models over rank, adapters and batch, and prefill.

Owns the cells, the targets of KERNELS 6 and, for a target that was missed, the variants of the launch plan whose times
are its cause. Invariant: a cell with adapters is compared with the same engine without, measured just before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from unittest import mock

import torch

from adapter_kernels.gpu import route
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.streams import CudaSide, InlineSide, SideStream
from adapter_kernels.gpu.tables import SITES
from scripts.gpu_check_families import REAL_CELLS, TINY_CELLS, family_cells
from scripts.gpu_check_model import (
    H200_BYTES_PER_S,
    H200_FLOP_PER_S,
    Rates,
    adapter_floor_us,
    base_floor_us,
    make_spec,
    prefill_floors_us,
)
from scripts.gpu_check_part import Place, main_of
from scripts.gpu_check_report import Measure, Unit
from serve.engine.device_timing import Timing, time_pass
from serve.engine.random_steps import RandomAdapters, RandomStep, decode_step, prefill_step, random_kv
from serve.model import fused_sites
from serve.model.fused_decoder import FusedDecoder
from serve.model.fused_weights import FusedWeights, read_fused_weights
from serve.model.kv_cache import KvCache
from serve.model.weight_source import RandomWeights

SHORT_CONTEXT, LONG_CONTEXT = 128, 1024
# (model, rank, adapters, batch, context) -> most that adapters may add to the step, in percent
TARGETS = {
    ("llama-8b", 16, 1, 32, SHORT_CONTEXT): 2.0,
    ("llama-8b", 16, 8, 32, SHORT_CONTEXT): 6.5,
    ("llama-8b", 16, 32, 32, LONG_CONTEXT): 17.0,
}
PREFILL_TARGETS = {("llama-8b", 16, 8192): 4.0}
UNTOUCHED_TARGET = 0.5
# every device is held to these; the unit `rates` says what it does itself
RATES = Rates(H200_BYTES_PER_S, H200_FLOP_PER_S)


@dataclass(frozen=True, slots=True)
class Extent:
    """Which cells are measured."""

    models: tuple[str, ...]
    ranks: tuple[int, ...]
    distinct: tuple[int, ...]
    batches: tuple[int, ...]
    prefills: tuple[int, ...]


REAL = Extent(("llama-8b", "qwen-0.5b"), (16, 8, 64), (1, 8, 32, 128), (1, 8, 32, 128), (512, 2048, 8192))
TINY = Extent(("tiny",), (8,), (1, 2), (2,), (20,))


@dataclass(frozen=True, slots=True)
class Cell:
    """One decode cell."""

    rank: int
    distinct: int
    batch: int
    context: int

    def name(self, model: str) -> str:
        """Its row in the table."""
        return f"{model} decode r{self.rank} D{self.distinct} B{self.batch} ctx{self.context}"


class Model:
    """One random-weight model and its cache; made when the first unit that needs it runs."""

    def __init__(self, name: str, extent: Extent, place: Place) -> None:
        self.name = name
        self.spec = make_spec(name)
        self.place = place
        # the interpreter's bf16 product is wrong
        self.dtype = torch.float32 if place.is_tiny else torch.bfloat16
        self._extent = extent

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""
        return max(*self._extent.batches, *self._extent.prefills)

    @cached_property
    def weights(self) -> FusedWeights:
        """The base."""
        generator = torch.Generator(self.place.device).manual_seed(0)
        return read_fused_weights(RandomWeights(self.spec, self.dtype, self.place.device, generator))

    @cached_property
    def decoder(self) -> FusedDecoder:
        """The launch plan as served."""
        return self.variant(self.side)

    @cached_property
    def kv(self) -> KvCache:
        """Room for the largest batch at short context, or 32 sequences at long context, or the longest prompt."""
        num_tokens = max(max(self._extent.batches) * SHORT_CONTEXT, 32 * LONG_CONTEXT, max(self._extent.prefills))
        return random_kv(self.spec, 512 if self.place.is_tiny else num_tokens, self.dtype, self.place.device)

    @cached_property
    def side(self) -> SideStream:
        """Where the adapters' small kernels run; one for all variants, since torch has 32 streams in turn."""
        return InlineSide() if self.place.is_tiny else CudaSide(self.place.device)

    def variant(self, side: SideStream) -> FusedDecoder:
        """The same weights under another launch plan."""
        configs = LaunchConfigs.for_device(None if self.place.is_tiny else self.place.name)
        return FusedDecoder(
            self.spec,
            self.weights,
            max_model_len=None,
            max_step_tokens=self.max_rows,
            max_decodes=max(self._extent.batches),
            side=side,
            configs=configs,
        )

    def adapters(self, rank: int, num_adapters: int, max_rows: int, sites: tuple[str, ...] = SITES) -> RandomAdapters:
        """Make adapters of this model."""
        return RandomAdapters.build(
            self.spec, rank, num_adapters, self.dtype, self.place.device, max_rows=max_rows, sites=sites
        )

    def decode(self, cell: Cell, adapters: RandomAdapters | None) -> RandomStep:
        """The step of a cell: its rows take the adapters in turn."""
        routed = None if adapters is None else adapters.route([row % cell.distinct for row in range(cell.batch)])
        return decode_step(self.spec, cell.batch, cell.context, routed, self.place.device)

    def time_decode(self, step: RandomStep, decoder: FusedDecoder | None = None) -> Timing:
        """Time a decode step from token ids to logits."""
        own = decoder or self.decoder

        def run() -> None:
            step.prepare()
            own.logits(own.hidden(step.inputs, self.kv))

        return time_pass(run, self.place.device)

    def time_prefill(self, step: RandomStep, decoder: FusedDecoder | None = None) -> Timing:
        """Time a prefill up to the logits of its last row."""
        own = decoder or self.decoder

        def run() -> None:
            step.prepare()
            own.logits(own.hidden(step.inputs, self.kv)[-1:])

        return time_pass(run, self.place.device, num_samples=8, is_captured=False)


def units(place: Place) -> list[Unit]:
    """Device rates, then per model and rank the decode cells and the prefills; nothing is built before it is needed."""
    extent = TINY if place.is_tiny else REAL
    found = [Unit("rates", partial(_measure_rates, place))]
    for name in extent.models:
        model = Model(name, extent, place)
        decodes = [Unit(f"{name}/decode/r{rank}", partial(_decode_cells, model, extent, rank)) for rank in extent.ranks]
        # what has a target comes first, should the time run out
        found.append(decodes[0])
        found.append(Unit(f"{name}/families", partial(_family_cells, model)))
        found.append(Unit(f"{name}/untouched", partial(_untouched_cells, model, extent)))
        found.append(Unit(f"{name}/prefill", partial(_prefill_cells, model, extent)))
        found += decodes[1:]
    return found


def _decode_cells(model: Model, extent: Extent, rank: int) -> list[Measure]:
    found = []
    adapters = model.adapters(rank, max(extent.distinct), max(extent.batches))
    for batch in extent.batches:
        contexts = (LONG_CONTEXT, SHORT_CONTEXT) if batch == 32 else (SHORT_CONTEXT,)
        for context in contexts if not model.place.is_tiny else (32,):
            base = model.time_decode(model.decode(Cell(rank, 0, batch, context), None))
            floor_us = base_floor_us(model.spec, RATES, batch, context, model.dtype)
            if rank == extent.ranks[0]:
                found.append(_us(f"{model.name} decode base B{batch} ctx{context}", base, floor_us))
            for distinct in extent.distinct:
                if distinct <= batch:
                    found += _decode_cell(model, adapters, Cell(rank, distinct, batch, context), base, floor_us)
    return found


def _decode_cell(
    model: Model, adapters: RandomAdapters, cell: Cell, base: Timing, floor_us: float
) -> Iterator[Measure]:
    timing = model.time_decode(model.decode(cell, adapters))
    added_us = adapter_floor_us(model.spec, RATES, cell.rank, cell.distinct, model.dtype)
    yield _us(cell.name(model.name), timing, floor_us + added_us)
    added = _percent(timing, base)
    target = TARGETS.get((model.name, cell.rank, cell.distinct, cell.batch, cell.context))
    cause = "" if target is None or added <= target else _decode_cause(model, adapters, cell, base)
    yield Measure(f"{cell.name(model.name)} adds", added, "%", 100 * added_us / floor_us, target, cause=cause)


def _decode_cause(model: Model, adapters: RandomAdapters, cell: Cell, base: Timing) -> str:
    """Time the variants of the launch plan: the one that costs little names what is wrong."""
    found = {"side stream off": model.time_decode(model.decode(cell, adapters), model.variant(InlineSide()))}
    for rows in (1, 16):
        with mock.patch.object(route, "block_rows_for", lambda _, rows=rows: rows):
            found[f"{rows} rows per block"] = model.time_decode(model.decode(cell, adapters))
    for splits in (1, 2, 4, 8):
        with mock.patch.object(fused_sites, "num_splits", lambda _, splits=splits: splits):
            decoder = model.variant(model.side)
        found[f"{splits} splits"] = model.time_decode(model.decode(cell, adapters), decoder)
    only_o = model.adapters(cell.rank, cell.distinct, cell.batch, sites=("o_proj",))
    found["o_proj alone"] = model.time_decode(model.decode(cell, only_o))
    return "variants add " + ", ".join(f"{name} {_percent(timing, base):+.1f} %" for name, timing in found.items())


def _prefill_cells(model: Model, extent: Extent) -> list[Measure]:
    found = []
    for rank in extent.ranks:
        adapters = model.adapters(rank, 1, model.max_rows)
        for num_tokens in extent.prefills:
            base = model.time_prefill(prefill_step(model.spec, num_tokens, None, model.place.device))
            step = prefill_step(model.spec, num_tokens, adapters.route([0] * num_tokens), model.place.device)
            timing = model.time_prefill(step)
            floor_us, added_us = prefill_floors_us(model.spec, RATES, num_tokens, rank)
            name = f"{model.name} prefill {num_tokens}"
            if rank == extent.ranks[0]:
                found.append(_us(f"{name} base", base, floor_us))
            found.append(_us(f"{name} r{rank}", timing, floor_us + added_us))
            added = _percent(timing, base)
            target = PREFILL_TARGETS.get((model.name, rank, num_tokens))
            cause = "" if target is None or added <= target else _prefill_cause(model, step, base)
            found.append(Measure(f"{name} r{rank} adds", added, "%", 100 * added_us / floor_us, target, cause=cause))
    return found


def _prefill_cause(model: Model, step: RandomStep, base: Timing) -> str:
    inline = model.time_prefill(step, model.variant(InlineSide()))
    return f"with the side stream off adapters add {_percent(inline, base):+.1f} %"


def _untouched_cells(model: Model, extent: Extent) -> list[Measure]:
    """What steps without adapter pay for a server that has some, and what one row's o_proj-only adapter costs."""
    batch = max(size for size in extent.batches if size <= 32)
    context = 32 if model.place.is_tiny else SHORT_CONTEXT
    bare = model.decode(Cell(0, 0, batch, context), None)
    first = model.time_decode(bare)
    only_o = model.adapters(extent.ranks[0], 1, batch, sites=("o_proj",))
    second = model.time_decode(bare)
    routed = only_o.route([0] + [-1] * (batch - 1))
    one_row = model.time_decode(decode_step(model.spec, batch, context, routed, model.place.device))
    target = None if model.place.is_tiny else UNTOUCHED_TARGET
    spread = f"the spread of one run is {100 * (first.p90_us / first.p10_us - 1):.1f} %"
    return [
        Measure(f"{model.name} no adapter in the batch adds", _percent(second, first), "%", 0.0, target, cause=spread),
        Measure(f"{model.name} o_proj-only adapter on one row adds", _percent(one_row, second), "%"),
    ]


def _family_cells(model: Model) -> list[Measure]:
    is_tiny = model.place.is_tiny
    cells, context = (TINY_CELLS, 32) if is_tiny else (REAL_CELLS, SHORT_CONTEXT)
    return family_cells(model, cells, context, RATES, model.place.device)


def _percent(timing: Timing, base: Timing) -> float:
    return 100 * (timing.median_us / base.median_us - 1)


def _us(name: str, timing: Timing, floor_us: float) -> Measure:
    return Measure(
        name, timing.median_us, "us", floor_us, p10=timing.p10_us, p90=timing.p90_us, num_samples=timing.num_samples
    )


def _measure_rates(place: Place) -> list[Measure]:
    """What this device copies and multiplies, beside what the floors assume."""
    size = 1 << (12 if place.is_tiny else 29)
    source = torch.randn(size // 2, device=place.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = time_pass(lambda: target.copy_(source), place.device)
    width = 64 if place.is_tiny else 8192
    a = torch.randn(width, width, device=place.device).to(torch.bfloat16)
    out = torch.empty_like(a)
    product = time_pass(lambda: torch.mm(a, a, out=out), place.device)
    return [
        Measure("device copy", 2 * size / copy.median_us / 1e6, "TB/s", H200_BYTES_PER_S / 1e12),
        Measure("bf16 product", 2 * width**3 / product.median_us / 1e6, "TFLOP/s", H200_FLOP_PER_S / 1e12),
    ]


if __name__ == "__main__":
    main_of("grid", units)
