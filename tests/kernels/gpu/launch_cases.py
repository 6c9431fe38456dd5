"""Every launch that serving makes, as named cases: the launchers called on CPU tensors of real widths and few rows.

Owns the shapes: a Llama-3.1-8B and a Qwen2.5-0.5B layer, in bf16 and fp16, at the row counts of each route. Nothing is
computed: the cases run under `recorded_launches`. Invariant: a kernel that no case launches fails `test_compile.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.compose import compose
from adapter_kernels.gpu.composed_rows import BLOCK_COLUMNS
from adapter_kernels.gpu.expand import expand
from adapter_kernels.gpu.kv_write import kv_write
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.paged_decode import DecodeWorkspace, paged_decode
from adapter_kernels.gpu.paged_prefill import paged_prefill
from adapter_kernels.gpu.qkv_sink import qkv_sink
from adapter_kernels.gpu.route import DeviceRoute, RouteBuffers, build_route
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.sampling import chain_tokens
from adapter_kernels.gpu.scale_input import scale_input
from adapter_kernels.gpu.shrink import num_planes, num_splits, shrink
from adapter_kernels.gpu.sink_inputs import DeltaInput, NormWeights, QkNormWeights, QkvDims
from adapter_kernels.gpu.step import ComposedPart, DecodePart, PrefillPart, SiteAdapters, SiteInput
from adapter_kernels.gpu.swiglu_sink import swiglu_sink
from adapter_kernels.gpu.tables import DeviceTables

# called with the pinned tables of the GPU that it is compiled for
Case = Callable[[LaunchConfigs], None]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# rows of a step that take each form of the route: one row per block, blocks of 16, blocks of 64
ROWS = {1: 8, 16: 32, 64: 300}
NUM_ADAPTERS = 33
RANK_CAPACITY = 64
BLOCK_SIZE = 16
FLAGS = ("adapters", "families", "plain")
# all families: capacity as the engine's
FAMILY_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's dimensions."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Output columns of the members of each fused site."""
        kv = self.num_kv_heads * self.head_dim
        mlp = self.intermediate
        return {"qkv": (self.num_heads * self.head_dim, kv, kv), "o": (self.hidden,), "gate_up": (mlp, mlp)} | {
            "down": (self.hidden,)
        }

    def in_width(self, site: str) -> int:
        """Input columns of a fused site."""
        return {"o": self.num_heads * self.head_dim, "down": self.intermediate}.get(site, self.hidden)


SHAPES = {"llama-8b": Shape(4096, 14336, 32, 8, 128), "qwen-0.5b": Shape(896, 4864, 14, 2, 64)}


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def route(num_rows: int) -> DeviceRoute:
    return build_route(ints(num_rows), ints(NUM_ADAPTERS), RouteBuffers.build(ints(num_rows), NUM_ADAPTERS), num_rows)


def tables(dtype: torch.dtype) -> DeviceTables:
    return DeviceTables.build(1, NUM_ADAPTERS, empty(4096, dtype=dtype))


def site_adapters(
    dtype: torch.dtype, shape: Shape, site: str, num_rows: int, *, has_families: bool = False
) -> SiteAdapters:
    own_route = route(num_rows)
    planes = num_planes(num_splits(shape.in_width(site)), own_route.block_rows)
    capacity = FAMILY_COLUMNS if has_families else RANK_CAPACITY
    bridge = empty(planes, num_rows, len(FUSED_SITES[site]), capacity, dtype=torch.float32)
    families = None
    if has_families:
        x = empty(num_rows, shape.in_width(site), dtype=dtype)
        families = SiteInput(x, empty(sum(shape.widths[site]), dtype=dtype) if site == "qkv" else None)
    return SiteAdapters(tables(dtype), own_route, bridge, 0, planes, families)


def shrink_case(
    configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, site: str, num_rows: int, *, has_families: bool = False
) -> None:
    own = site_adapters(dtype, shape, site, num_rows, has_families=has_families)
    x = empty(num_rows, shape.in_width(site), dtype=dtype)
    config = configs.pick("shrink", x.shape[1], own.route.block_rows)
    members = len(FUSED_SITES[site])
    shrink(x, own.tables, 0, members, own.route, own.bridge, has_families=has_families, config=config)


def expand_case(
    configs: LaunchConfigs,
    dtype: torch.dtype,
    shape: Shape,
    site: str,
    num_rows: int,
    *,
    accumulate: bool,
    has_families: bool = False,
) -> None:
    own, widths = site_adapters(dtype, shape, site, num_rows, has_families=has_families), shape.widths[site]
    out = empty(num_rows, sum(widths), dtype=dtype)
    config = configs.pick("expand", out.shape[1], own.route.block_rows)
    families = own.families
    expand(own.bridge, own.tables, 0, widths, own.route, out, accumulate=accumulate, families=families, config=config)


def compose_case(
    configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, site: str, num_rows: int, *, is_scaled: bool
) -> None:
    own, widths = site_adapters(dtype, shape, site, num_rows, has_families=True), shape.widths[site]
    weights = empty(num_rows, dtype=torch.float32)
    part = ComposedPart(own.route, ints(num_rows), weights, ints(num_rows * BLOCK_COLUMNS).view(num_rows, -1))
    y = empty(num_rows, sum(widths), dtype=dtype)
    config = configs.pick("compose", y.shape[1], own.route.block_rows)
    compose(own, part, widths, torch.empty_like(y) if is_scaled else None, y, config=config)


def qkv_sink_case(
    configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, num_rows: int, *, flag: str, has_norm: bool
) -> None:
    dims = QkvDims(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    qkv, cache = empty(num_rows, sum(shape.widths["qkv"]), dtype=dtype), kv_cache(dtype, shape)
    turn = empty(num_rows, shape.head_dim, dtype=dtype)
    weight = empty(shape.head_dim, dtype=torch.float32)
    qkv_sink(
        qkv,
        site_adapters(dtype, shape, "qkv", num_rows, has_families=flag == "families") if flag != "plain" else None,
        q_out=empty(num_rows, shape.num_heads, shape.head_dim, dtype=dtype),
        k_cache=cache,
        v_cache=cache,
        slot_mapping=ints(num_rows),
        cos=turn,
        sin=turn,
        norm=QkNormWeights(weight, weight, 1e-5, cast_first=False) if has_norm else None,
        dims=dims,
        config=configs.pick("qkv_sink", qkv.shape[1], block_rows_for(num_rows)),
    )


def swiglu_sink_case(
    configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, num_rows: int, *, flag: str, activation: str
) -> None:
    swiglu_sink(
        empty(num_rows, 2 * shape.intermediate, dtype=dtype),
        site_adapters(dtype, shape, "gate_up", num_rows, has_families=flag == "families") if flag != "plain" else None,
        activation=activation,
        out=empty(num_rows, shape.intermediate, dtype=dtype),
        config=configs.pick("swiglu_sink", shape.intermediate, block_rows_for(num_rows)),
    )


def add_norm_case(configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, *, flag: str, cast_first: bool) -> None:
    x = empty(4, shape.hidden, dtype=dtype)
    norm = NormWeights(empty(shape.hidden, dtype=dtype if cast_first else torch.float32), 1e-5, cast_first)
    families = SiteInput(x, empty(shape.hidden, dtype=dtype)) if flag == "families" else None
    delta = None if flag == "plain" else DeltaInput(x, tables(dtype), ints(4), 3, families)
    after = None if cast_first else norm
    add_norm(x, x, delta=delta, after=after, before=norm, x_out=x, normed=torch.empty_like(x))


def decode_case(
    configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, *, soft_cap: float | None, num_splits: int
) -> None:
    q, cache = empty(8, shape.num_heads, shape.head_dim, dtype=dtype), kv_cache(dtype, shape)
    part = DecodePart(8, ints(8), ints(8), ints(64))
    workspace = DecodeWorkspace.build(8, shape.num_heads, shape.head_dim, torch.device("cpu"), num_splits=num_splits)
    config = configs.pick("paged_decode", shape.head_dim, 1)
    paged_decode(
        q, cache, cache, part, q, scale=0.1, window=None, soft_cap=soft_cap, workspace=workspace, config=config
    )


def prefill_case(configs: LaunchConfigs, dtype: torch.dtype, shape: Shape, *, soft_cap: float | None) -> None:
    q, cache = empty(300, shape.num_heads, shape.head_dim, dtype=dtype), kv_cache(dtype, shape)
    part = PrefillPart(0, ints(3), ints(3), ints(1), ints(1), ints(1), ints(1), ints(64))
    config = configs.pick("paged_prefill", shape.head_dim, 64)
    paged_prefill(q, cache, cache, part, q, scale=0.1, window=4096, soft_cap=soft_cap, config=config)


def scale_input_case(configs: LaunchConfigs, dtype: torch.dtype, shape: Shape) -> None:
    x = empty(8, shape.intermediate, dtype=dtype)
    scale_input(x, tables(dtype), 6, ints(8), torch.empty_like(x))


def kv_write_case(configs: LaunchConfigs, dtype: torch.dtype, shape: Shape) -> None:
    k, cache = empty(8, shape.num_kv_heads, shape.head_dim, dtype=dtype), kv_cache(dtype, shape)
    kv_write(k, k, cache, cache, ints(8))


def kv_cache(dtype: torch.dtype, shape: Shape) -> Tensor:
    return empty(4, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, dtype=dtype)


def chain_case(configs: LaunchConfigs) -> None:
    chain_tokens(ints(8), ints(8), ints(8))


def route_case(configs: LaunchConfigs, num_rows: int) -> None:
    route(num_rows)


def _lora_cases(dtype: torch.dtype, shape: Shape) -> Iterator[tuple[str, Case]]:
    for rows, num_rows in ROWS.items():
        own = partial(partial, dtype=dtype, shape=shape, num_rows=num_rows)
        for site in FUSED_SITES:
            yield f"shrink/{site}/{rows}", own(shrink_case, site=site)
            yield f"shrink/families/{site}/{rows}", own(shrink_case, site=site, has_families=True)
        for site in ("o", "down"):
            yield f"expand/{site}/{rows}", own(expand_case, site=site, accumulate=False)
            yield f"expand/families/{site}/{rows}", own(expand_case, site=site, accumulate=False, has_families=True)
        yield f"expand/qkv/{rows}", own(expand_case, site="qkv", accumulate=True)
        yield f"expand/families/qkv/{rows}", own(expand_case, site="qkv", accumulate=True, has_families=True)
        for site in FUSED_SITES:
            yield f"compose/{site}/{rows}", own(compose_case, site=site, is_scaled=False)
            yield f"compose/scaled/{site}/{rows}", own(compose_case, site=site, is_scaled=True)
        for flag in FLAGS:
            for norm in (False, True):
                key = f"qkv_sink/{flag}/{'norm' if norm else 'bare'}/{rows}"
                yield key, own(qkv_sink_case, flag=flag, has_norm=norm)
            for activation in ("silu", "gelu_tanh", "gelu"):
                key = f"swiglu_sink/{flag}/{activation}/{rows}"
                yield key, own(swiglu_sink_case, flag=flag, activation=activation)


def _base_cases(dtype: torch.dtype, shape: Shape) -> Iterator[tuple[str, Case]]:
    own = partial(partial, dtype=dtype, shape=shape)
    for flag in FLAGS:
        for cast_first in (True, False):
            key = f"add_norm/{flag}/{'cast_first' if cast_first else 'fp32'}"
            yield key, own(add_norm_case, flag=flag, cast_first=cast_first)
    for soft_cap in (None, 50.0):
        name = "plain" if soft_cap is None else "soft_cap"
        yield f"prefill/{name}", own(prefill_case, soft_cap=soft_cap)
        for splits in (1, 16):
            yield f"decode/{name}/{splits}", own(decode_case, soft_cap=soft_cap, num_splits=splits)
    yield "kv_write", own(kv_write_case)
    yield "scale_input", own(scale_input_case)


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {f"route/{rows}": partial(route_case, num_rows=ROWS[rows]) for rows in (16, 64)}
    cases["chain_tokens"] = chain_case
    for dtype_name, dtype in DTYPES.items():
        for shape_name, shape in SHAPES.items():
            for name, case in (*_lora_cases(dtype, shape), *_base_cases(dtype, shape)):
                cases[f"{name}/{shape_name}/{dtype_name}"] = case
    return cases


CASES = _cases()
# every kernel in every form that differs in what it needs of a device, at the 8B widths in bf16
_VARIANTS = ("/norm/", "/gelu_tanh/", "/gelu/", "/soft_cap/", "/fp32/", "expand/qkv/", "/plain/1/llama")
# of the forms for all families those that are nearest to a limit somewhere; the slow matrix has all
_FAMILIES = (
    "shrink/families/down/16",
    "shrink/families/qkv/64",
    "expand/families/down/16",
    "expand/families/down/64",
    "qkv_sink/families/bare/1/",
    "qkv_sink/families/bare/16",
    "swiglu_sink/families/silu/1/",
    "swiglu_sink/families/silu/16",
    "swiglu_sink/families/silu/64",
    "add_norm/families/cast_first",
)
# compositions run in the form for all families alone
_COMPOSED = ("compose/scaled/qkv/1/", "compose/down/16")
DEFAULT_CASES = [
    name
    for name in CASES
    if "/llama-8b/fp16" not in name
    and "qwen" not in name
    and not any(part in name for part in _VARIANTS)
    and ("families" not in name or name.startswith(_FAMILIES))
    and ("compose" not in name or name.startswith(_COMPOSED))
]
