"""Part `loads` of `make gpu-check`: adapters into device memory while a batch runs: cold, swapped, after compaction.

Owns synthetic images of a real size and the steps beside them. Invariant: every load goes through `DeviceArena` as
served; a step is late when it takes longer than twice the median of steps without a load.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from adapter_kernels.gpu.copies import CudaCopies, InlineCopies
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.streams import CudaSide
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, SITES, DeviceTables
from adapters_store.store import OpenAdapter, SiteEntry
from scripts.gpu_check_model import make_spec
from scripts.gpu_check_part import Place, main_of
from scripts.gpu_check_report import Measure, Unit
from serve.engine.device_arena import DeviceArena
from serve.engine.device_timing import capture
from serve.engine.plan import LoadResult
from serve.engine.random_steps import decode_step, random_kv
from serve.model.fused_decoder import FusedDecoder
from serve.model.fused_weights import read_fused_weights
from serve.model.spec import ModelSpec
from serve.model.weight_source import RandomWeights

# what a PCIe 5 x16 link moves from pinned memory
PCIE_BYTES_PER_S = 50e9
# more first-token time than a resident adapter's request: what a cold one may cost (r64)
COLD_TARGET_MS = 2.0
# the arena holds so many adapters of rank 16, or a quarter of them at rank 64
_CAPACITY = 8
_BATCH, _CONTEXT = 32, 128
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load beside running steps."""

    result: LoadResult
    elapsed_ms: float
    step_ms: list[float]


class Bench:
    """Decoder, arena and images; made when the first unit needs them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.spec: ModelSpec = make_spec("tiny" if place.is_tiny else "llama-8b")
        self.dtype = torch.float32 if place.is_tiny else torch.bfloat16
        # the tiny model's rank 16 is as many bytes as it needs to be seen
        self.ranks = (2, 8) if place.is_tiny else (16, 64)

    @cached_property
    def small(self) -> OpenAdapter:
        """An image of the lower rank."""
        return self._image(self.ranks[0])

    @cached_property
    def large(self) -> OpenAdapter:
        """An image of the higher rank."""
        return self._image(self.ranks[1])

    @cached_property
    def arena(self) -> DeviceArena:
        """Room for `_CAPACITY` small adapters."""
        num_bytes = _CAPACITY * -(-self.small.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        memory = torch.zeros(num_bytes // self.dtype.itemsize, dtype=self.dtype, device=self.place.device)
        tables = DeviceTables.build(self.spec.dims.num_hidden_layers, 2 * _CAPACITY, memory)
        copies = InlineCopies() if self.place.is_tiny else CudaCopies(self.place.device)
        shapes = {site: self.spec.dims.site_shape(site) for site in SITES}
        images = {"small": self.small, "large": self.large}
        return DeviceArena(tables, shapes, self.spec.dims.num_hidden_layers, self.dtype, images.__getitem__, copies)

    @cached_property
    def step(self) -> Callable[[], object]:
        """One decode step of a batch without adapters, captured; part `grid` has run it where there is no GPU."""
        if self.place.is_tiny:
            return _nothing
        generator = torch.Generator(self.place.device).manual_seed(0)
        decoder = FusedDecoder(
            self.spec,
            read_fused_weights(RandomWeights(self.spec, self.dtype, self.place.device, generator)),
            max_model_len=None,
            max_step_tokens=_BATCH,
            max_decodes=_BATCH,
            side=CudaSide(self.place.device),
            configs=LaunchConfigs.for_device(self.place.name),
        )
        kv = random_kv(self.spec, _BATCH * _CONTEXT, self.dtype, self.place.device)
        inputs = decode_step(self.spec, _BATCH, _CONTEXT, None, self.place.device).inputs

        def run() -> None:
            decoder.logits(decoder.hidden(inputs, kv))

        return capture(run)

    def run_step(self) -> float:
        """Run a step to its end and return its milliseconds."""
        begin = time.perf_counter()
        self.step()
        self.place.wait()
        return 1e3 * (time.perf_counter() - begin)

    def load(self, name: str, slot: int) -> Loaded:
        """Load an image beside running steps, polling between them as the engine does."""
        steps: list[float] = []
        begin = time.perf_counter()
        self.arena.start_load(name, slot)
        while time.perf_counter() - begin < _TIMEOUT_S:
            if results := self.arena.poll():
                self.place.wait()
                elapsed_ms = 1e3 * (time.perf_counter() - begin)
                if results[0].error is not None:
                    raise RuntimeError(results[0].error)
                return Loaded(results[0], elapsed_ms, steps)
            steps.append(self.run_step())
        raise TimeoutError(f"{name} was not loaded within {_TIMEOUT_S} s")

    def clear(self, slots: range) -> None:
        """Drop slots."""
        for slot in slots:
            self.arena.drop(slot)

    def _image(self, rank: int) -> OpenAdapter:
        entries, size = [], 0
        for layer in range(self.spec.dims.num_hidden_layers):
            for site in SITES:
                out_dim, in_dim = self.spec.dims.site_shape(site)
                a, bt = size, size + _aligned(rank * in_dim * self.dtype.itemsize)
                size = bt + _aligned(rank * out_dim * self.dtype.itemsize)
                entries.append(SiteEntry(layer, site, (rank,), a, bt, None))
        # zeros would be kind to nothing here: copies and checks read every byte alike
        data = memoryview(np.ones(size // 4, dtype=np.float32).data).cast("B").toreadonly()
        dtype = str(self.dtype).removeprefix("torch.")
        return OpenAdapter(f"r{rank}", dtype, rank, size, self.spec.dims, data, tuple(entries))


def units(place: Place) -> list[Unit]:
    """Cold, swap, compaction."""
    bench = Bench(place)
    return [
        Unit("cold", partial(_cold, bench)),
        Unit("swap", partial(_swap, bench)),
        Unit("compaction", partial(_compaction, bench)),
    ]


def _cold(bench: Bench) -> list[Measure]:
    alone = [bench.run_step() for _ in range(3 if bench.place.is_tiny else 50)]
    # the first load makes buffers and compiles nothing; it is not measured
    bench.load("small", 0)
    bench.clear(range(1))
    found = []
    for name, image in (("small", bench.small), ("large", bench.large)):
        loads = []
        for _ in range(1 if bench.place.is_tiny else 5):
            loads.append(bench.load(name, 0))
            bench.clear(range(1))
        floor_ms = 1e3 * image.num_bytes / PCIE_BYTES_PER_S
        median_ms = statistics.median(load.elapsed_ms for load in loads)
        is_judged = name == "large" and not bench.place.is_tiny
        found.append(
            Measure(
                f"cold load r{image.rank}",
                median_ms,
                "ms",
                floor_ms,
                COLD_TARGET_MS if is_judged else None,
                num_samples=len(loads),
                cause=f"the link alone takes {floor_ms:.1f} ms and nothing hides it from the first token",
            )
        )
        found.append(_late(f"steps late beside a load of r{image.rank}", alone, loads, bench))
    return found


def _swap(bench: Bench) -> list[Measure]:
    loads = []
    for _ in range(1 if bench.place.is_tiny else 5):
        bench.load("small", 0)
        bench.arena.drop(0)
        loads.append(bench.load("small", 0))
        bench.clear(range(1))
    median_ms = statistics.median(load.elapsed_ms for load in loads)
    floor_ms = 1e3 * bench.small.num_bytes / PCIE_BYTES_PER_S
    return [Measure(f"swap r{bench.small.rank}", median_ms, "ms", floor_ms, num_samples=len(loads))]


def _compaction(bench: Bench) -> list[Measure]:
    """Every other one of a full arena's adapters leaves; one that needs the room of all of them comes."""
    alone = [bench.run_step() for _ in range(3 if bench.place.is_tiny else 50)]
    for slot in range(_CAPACITY):
        bench.load("small", slot)
    for slot in range(0, _CAPACITY, 2):
        bench.arena.drop(slot)
    loaded = bench.load("large", _CAPACITY)
    bench.clear(range(1, _CAPACITY + 1, 2))
    bench.clear(range(_CAPACITY, _CAPACITY + 1))
    floor_ms = 1e3 * bench.large.num_bytes / PCIE_BYTES_PER_S
    return [
        Measure(f"cold load r{bench.large.rank} behind a compaction", loaded.elapsed_ms, "ms", floor_ms),
        _late("steps late beside a compaction", alone, [loaded], bench),
    ]


def _late(name: str, alone: list[float], loads: list[Loaded], bench: Bench) -> Measure:
    usual_ms = statistics.median(alone)
    beside = [step_ms for load in loads for step_ms in load.step_ms]
    num_late = sum(step_ms > 2 * usual_ms for step_ms in beside)
    cause = f"{len(beside)} steps, slowest {max(beside, default=0.0):.2f} ms, usually {usual_ms:.2f} ms"
    target = None if bench.place.is_tiny else 0.0
    return Measure(name, num_late, "steps", 0.0, target, num_samples=max(1, len(beside)), cause=cause)


def _nothing() -> None:
    return None


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


if __name__ == "__main__":
    main_of("loads", units)
