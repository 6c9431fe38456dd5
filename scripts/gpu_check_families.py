"""Decode cells of S2FT and MeteoRA for the part `grid` of `make gpu-check`, with the floors and targets of KERNELS 6.

Owns which cells there are and their floor: the bytes of each distinct adapter of the step, once. Invariant: a cell is
compared with the same step without adapters, measured in the same unit.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from scripts.gpu_check_model import Rates, base_floor_us
from scripts.gpu_check_report import Measure
from serve.engine.device_timing import Timing
from serve.engine.random_families import MakeRows, meteora_rows, random_family, s2ft_rows
from serve.engine.random_steps import RandomStep, decode_step
from serve.model.spec import ModelSpec


class TimedModel(Protocol):
    """What a cell needs of a model."""

    name: str
    spec: ModelSpec
    dtype: torch.dtype

    def time_decode(self, step: RandomStep, /) -> Timing:
        """Time a decode step."""
        ...


@dataclass(frozen=True, slots=True)
class FamilyCell:
    """One family: adapters in the step, rows, and the most that they may add, in percent."""

    name: str
    make_rows: MakeRows
    distinct: int
    batch: int
    target: float | None


REAL_CELLS = (
    FamilyCell("S2FT 64 channels", s2ft_rows, 32, 32, 5.0),
    FamilyCell("MeteoRA 28 experts r8 top-2", meteora_rows, 1, 32, 11.0),
)
TINY_CELLS = (
    FamilyCell("S2FT", s2ft_rows, 2, 2, None),
    FamilyCell("MeteoRA on o_proj", partial(meteora_rows, sites=("o_proj",)), 1, 2, None),
)


def family_cells(
    model: TimedModel, cells: tuple[FamilyCell, ...], context: int, rates: Rates, device: torch.device
) -> list[Measure]:
    """Measure each cell, and what it adds to the same step without adapters."""
    found = []
    bases: dict[int, Timing] = {}
    for cell in cells:
        if cell.batch not in bases:
            bases[cell.batch] = model.time_decode(decode_step(model.spec, cell.batch, context, None, device))
        base = bases[cell.batch]
        family = random_family(
            model.spec, cell.make_rows, cell.distinct, model.dtype, device, max_rows=max(cell.batch, 16)
        )
        routed = family.adapters.route([row % cell.distinct for row in range(cell.batch)])
        timing = model.time_decode(decode_step(model.spec, cell.batch, context, routed, device))
        floor_us = base_floor_us(model.spec, rates, cell.batch, context, model.dtype)
        added_us = 1e6 * family.bytes_per_adapter * cell.distinct / rates.bytes_per_s
        name = f"{model.name} {cell.name} D{cell.distinct} B{cell.batch}"
        found += [
            Measure(name, timing.median_us, "us", floor_us + added_us, p10=timing.p10_us, p90=timing.p90_us),
            Measure(
                f"{name} adds",
                100 * (timing.median_us / base.median_us - 1),
                "%",
                100 * added_us / floor_us,
                cell.target if model.name == "llama-8b" else None,
                cause=f"{timing.median_us - base.median_us:.0f} us over the base, {added_us:.0f} of them bytes",
            ),
        ]
    return found
