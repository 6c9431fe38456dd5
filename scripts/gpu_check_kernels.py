"""Part `kernels` of `make gpu-check`: every op in bf16 and fp16 on the device, against its definition in fp32 or fp64.

Owns what is compared; inputs come from the kernel tests' own builders, expected values from `adapter_kernels`'
references. Invariant: outputs start full of NaN, so an element that was not written is an error that meets no target.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import reference, reference_sinks
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.expand import expand
from adapter_kernels.gpu.qkv_sink import qkv_sink
from adapter_kernels.gpu.route import DeviceRoute, RouteBuffers, build_route
from adapter_kernels.gpu.shrink import num_splits, shrink
from adapter_kernels.gpu.sink_inputs import DeltaInput, NormWeights, QkvDims
from adapter_kernels.gpu.swiglu_sink import swiglu_sink
from adapter_kernels.gpu.tables import DeviceTables, first_site
from scripts.gpu_check_attention import decode_error, kv_write_error, prefill_error
from scripts.gpu_check_part import Place, largest, main_of, moved, relative_error
from scripts.gpu_check_report import Measure, Unit
from tests.kernels.gpu.batches import POPULARITIES, Batch, random_batch, random_tables, rank_capacity
from tests.kernels.gpu.bridges import bridge_of
from tests.kernels.gpu.sink_cases import make_sink_case

RANKS = (16, 3, 0, 8, 17, 64, 1, 256)
# relative error in the norm: one rounding of the bridge and one of the result, 2^-9 and 2^-12 of a value at worst
TARGETS = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
# the shrink's inputs are exact and its sums fp32
SHRINK_TARGET = 1e-5
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer and the steps that it is tried on."""

    hidden: int
    intermediate: int
    dims: QkvDims
    num_rows: tuple[int, ...]
    popularities: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def sites(self) -> dict[str, tuple[int, int]]:
        """(out, in) by site."""
        query, kv = self.dims.num_heads * self.dims.head_dim, self.dims.num_kv_heads * self.dims.head_dim
        hidden, mlp = self.hidden, self.intermediate
        attention = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        return attention | {
            "o_proj": (hidden, query),
            "gate_proj": (mlp, hidden),
            "up_proj": (mlp, hidden),
            "down_proj": (hidden, mlp),
        }

    def widths(self, site: str) -> tuple[int, ...]:
        """Output columns of a fused site's members."""
        return tuple(self.sites[member][0] for member in FUSED_SITES[site])


REAL = Shape(896, 4864, QkvDims(14, 2, 64), (1, 17, 63, 133, 300), POPULARITIES, RANKS)
TINY = Shape(96, 160, QkvDims(2, 1, 32), (3, 17), ("uniform",), (16, 3, 0))
ACTIVATION = "silu"


@dataclass(frozen=True, slots=True)
class Step:
    """One random step: adapters on the host and on the device, and who has which."""

    shape: Shape
    tables: DeviceTables
    batch: Batch
    place: Place

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.tables.arena.dtype

    @property
    def capacity(self) -> int:
        """Columns of a bridge."""
        return rank_capacity(self.shape.ranks)

    def random(self, width: int) -> Tensor:
        """[T, width] on the host."""
        generator = torch.Generator().manual_seed(width)
        return torch.randn(self.batch.num_rows, width, generator=generator).to(self.dtype)

    def nan(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Unwritten memory on the device."""
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=self.place.device)


def units(place: Place) -> list[Unit]:
    """One unit per dtype and op; the interpreter's bf16 product is wrong, so there it is fp16 alone."""
    dtypes = {"fp16": torch.float16} if place.is_tiny else {"bf16": torch.bfloat16, "fp16": torch.float16}
    return [
        Unit(f"{op}/{name}", partial(_measure, f"{op} {name}", error, dtype, place))
        for name, dtype in dtypes.items()
        for op, error in OPS.items()
    ]


def route_error(step: Step) -> float:
    """0.0 when the route built on the device is the reference's, else 1.0."""
    batch, route = step.batch, _route(step)
    if route.block_rows == 1:
        return float(not torch.equal(route.slots.cpu(), batch.slots))
    expected = reference.group_rows(batch.local, batch.slot_of, route.block_rows, route.num_blocks)
    pairs = (
        (route.perm, expected.perm),
        (route.block_slot, expected.block_slot),
        (route.block_len, expected.block_len),
    )
    return float(not all(torch.equal(own.cpu(), other) for own, other in pairs))


def shrink_error(step: Step) -> float:
    """Largest error of the coefficients at a fused site of three members and at the widest site."""
    return largest(_shrink_error(step, site) for site in ("qkv", "down"))


def expand_error(step: Step) -> float:
    """Error of the deltas in a buffer; rows where nothing acts must have stayed NaN."""
    widths, site = step.shape.widths("gate_up"), first_site(0, "gate_up")
    x = step.random(step.shape.hidden)
    bridge = bridge_of(
        x, step.tables, site, 2, step.batch.slots, splits=num_splits(step.shape.hidden), capacity=step.capacity
    )
    out = step.nan(step.batch.num_rows, sum(widths))
    route = _route(step)
    expand(_there(step, bridge), moved(step.tables, step.place.device), site, widths, route, out, accumulate=False)
    expected = reference.table_delta(x, step.tables, site, widths, step.batch.slots)
    acts = reference.table_acts(step.tables, site, 2, step.batch.slots).repeat_interleave(torch.tensor(widths), dim=1)
    out = out.cpu()
    return relative_error(out[acts], expected[acts]) if bool(out[~acts].isnan().all()) else math.nan


def qkv_sink_error(step: Step) -> float:
    """Error of q, k and v behind the sink, rotation and deltas included."""
    dims, num_rows = step.shape.dims, step.batch.num_rows
    qkv = step.random(sum(step.shape.widths("qkv")))
    case = make_sink_case(
        step.tables, step.batch, 0, step.shape.widths("qkv"), num_splits=4, rank_capacity=step.capacity
    )
    cos, sin = _rotation(num_rows, dims.head_dim, step.dtype)
    q = step.nan(num_rows, dims.num_heads, dims.head_dim)
    k, v = (step.nan(num_rows // 4 + 2, 4, dims.num_kv_heads, dims.head_dim) for _ in range(2))
    slots = torch.randperm(k.shape[0] * 4)[:num_rows].int()
    qkv_sink(
        _there(step, qkv),
        moved(case.adapters, step.place.device),
        q_out=q,
        k_cache=k,
        v_cache=v,
        slot_mapping=_there(step, slots),
        cos=_there(step, cos),
        sin=_there(step, sin),
        norm=None,
        dims=dims,
    )
    rotation = (cos.double(), sin.double())
    expected = reference_sinks.qkv_sink(qkv.double(), case.delta, dims.num_heads, dims.num_kv_heads, rotation=rotation)
    pairs = [(q.cpu(), expected.q)]
    pairs += [(cache.flatten(0, 1).cpu()[slots.long()], rows) for cache, rows in ((k, expected.k), (v, expected.v))]
    return largest(relative_error(out, rows) for out, rows in pairs)


def swiglu_sink_error(step: Step) -> float:
    """Error of act(gate + dgate) * (up + dup)."""
    widths = step.shape.widths("gate_up")
    gate_up = step.random(sum(widths))
    site = first_site(0, "gate_up")
    case = make_sink_case(step.tables, step.batch, site, widths, num_splits=4, rank_capacity=step.capacity)
    out = step.nan(step.batch.num_rows, widths[0])
    swiglu_sink(_there(step, gate_up), moved(case.adapters, step.place.device), activation=ACTIVATION, out=out)
    return relative_error(out, reference_sinks.swiglu_sink(gate_up.double(), case.delta, ACTIVATION))


def add_norm_error(step: Step) -> float:
    """Error of the residual and of its norm, with deltas where adapters act and NaN in the buffer elsewhere."""
    width, site = step.shape.hidden, first_site(0, "o")
    x, h, delta = (step.random(width).roll(shift, 0) for shift in range(3))
    acts = reference.table_acts(step.tables, site, 1, step.batch.slots)
    buffer = DeltaInput(torch.where(acts, delta, torch.nan), step.tables, step.batch.slots, site)
    weight = torch.rand(width).to(step.dtype)
    x_out, normed = step.nan(*x.shape), step.nan(*x.shape)
    norm = NormWeights(_there(step, weight), _EPS, cast_first=True)
    own = moved(buffer, step.place.device)
    add_norm(_there(step, x), _there(step, h), delta=own, before=norm, x_out=x_out, normed=normed)
    dense = torch.where(acts, delta, 0.0).double()
    expected = reference_sinks.add_norm(
        x.double(), h.double(), dense, before=reference_sinks.Norm(weight.double(), _EPS)
    )
    assert expected.normed is not None
    return largest([relative_error(x_out, expected.x), relative_error(normed, expected.normed)])


OPS: dict[str, Callable[[Step], float]] = {
    "route": route_error,
    "shrink": shrink_error,
    "expand": expand_error,
    "qkv_sink": qkv_sink_error,
    "swiglu_sink": swiglu_sink_error,
    "add_norm": add_norm_error,
    "paged_decode": lambda step: decode_error(step.dtype, step.place),
    "paged_prefill": lambda step: prefill_error(step.dtype, step.place),
    "kv_write": lambda step: kv_write_error(step.dtype, step.place),
}
# these take no step: once is enough
_STEPLESS = {"paged_decode", "paged_prefill", "kv_write"}


def _measure(name: str, error_of: Callable[[Step], float], dtype: torch.dtype, place: Place) -> list[Measure]:
    op = name.split()[0]
    steps = list(_steps(dtype, place))
    errors = [error_of(step) for step in (steps[:1] if op in _STEPLESS else steps)]
    worst = None if math.isnan(error := largest(errors)) else error
    target = {"route": 0.0, "shrink": SHRINK_TARGET, "kv_write": 0.0}.get(op, TARGETS[dtype])
    cause = "" if worst is not None and worst <= target else "wrong result: compare the op's test under the interpreter"
    return [Measure(name, worst, "error", target=target, num_samples=len(errors), cause=cause)]


def _steps(dtype: torch.dtype, place: Place) -> Iterator[Step]:
    shape = TINY if place.is_tiny else REAL
    tables = random_tables(shape.sites, shape.ranks, dtype=dtype)
    for num_rows in shape.num_rows:
        for popularity in shape.popularities if num_rows < 100 else shape.popularities[2:3]:
            yield Step(shape, tables, random_batch(num_rows, len(shape.ranks), popularity), place)


def _shrink_error(step: Step, site: str) -> float:
    members = FUSED_SITES[site]
    in_dim, begin = step.shape.sites[members[0]][1], first_site(0, site)
    x = step.random(in_dim)
    bridge = step.nan(num_splits(in_dim), step.batch.num_rows, len(members), step.capacity, dtype=torch.float32)
    route, tables = _route(step), moved(step.tables, step.place.device)
    shrink(_there(step, x), tables, begin, len(members), route, bridge)
    expected = reference.table_bridge(x, step.tables, begin, len(members), step.batch.slots)
    sums = bridge.sum(0).cpu()
    found = [sums[row, member, : c.numel()] for row, of_row in enumerate(expected) for member, c in enumerate(of_row)]
    return relative_error(torch.cat(found), torch.cat([c for of_row in expected for c in of_row]))


def _route(step: Step) -> DeviceRoute:
    batch, device = step.batch, step.place.device
    buffers = RouteBuffers.build(batch.slots.to(device), len(batch.slot_of))
    return build_route(batch.local.to(device), batch.slot_of.to(device), buffers, batch.num_rows)


def _there(step: Step, tensor: Tensor) -> Tensor:
    return tensor.to(step.place.device)


def _rotation(num_rows: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(num_rows, rotary_dim // 2, generator=torch.Generator().manual_seed(3)) * 6.0
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)


if __name__ == "__main__":
    main_of("kernels", units)
