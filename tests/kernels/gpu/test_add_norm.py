"""add_norm against its definition: every form of a block's end, deltas of some rows, garbage in the others' deltas."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.sink_inputs import DeltaInput, NormWeights
from adapter_kernels.gpu.tables import BIAS, NONE, RANK, DeviceTables
from adapter_kernels.reference_sinks import Norm, NormedResidual
from adapter_kernels.reference_sinks import add_norm as reference_add_norm
from serve.model.families import NormKind
from serve.model.layers import make_norm
from tests.kernels.gpu.launches import record_launches

# relative to the largest value; fp16 rounds up to five times between input and output
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}
NUM_SLOTS = 5
SITE = 3
# adapter slot -> does it act at the site: by rank rows, by a bias alone, not at all
RANKS = {0: 4, 2: 0, 4: 0}
# the arena's first byte is as good a place as any
BIASES = {2: 0}


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one call; `delta` is dense and zero where no adapter acts, `buffer` has NaN there."""

    x: Tensor
    h: Tensor
    delta: Tensor
    buffer: DeltaInput


def make_case(num_rows: int, width: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(num_rows * width)
    x, h, delta = (torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(3))
    tables = DeviceTables.build(num_layers=1, num_slots=NUM_SLOTS, arena=torch.zeros(1, dtype=dtype))
    for slot, rank in RANKS.items():
        tables.rows[SITE, slot, [BIAS, RANK]] = torch.tensor([BIASES.get(slot, NONE), rank])
    # what an adapter does at other sites is of no interest here
    tables.rows[SITE - 1, :, [BIAS, RANK]] = torch.tensor([64, 8])
    slots = torch.tensor([(-1, 0, 4, 2)[row % 4] for row in range(num_rows)], dtype=torch.int32)
    acts = (slots == 0) | (slots == 2)
    buffer = torch.where(acts[:, None], delta, torch.nan)
    return Case(x, h, torch.where(acts[:, None], delta, 0.0), DeltaInput(buffer, tables, slots, SITE))


def norm_weights(width: int, kind: NormKind, dtype: torch.dtype) -> NormWeights:
    weight = torch.rand(width, generator=torch.Generator().manual_seed(width)) + 0.5
    if kind is NormKind.CAST_THEN_SCALE:
        return NormWeights(weight.to(dtype), 1e-6, cast_first=True)
    return NormWeights(weight, 1e-6, cast_first=False)


def as_norm(weights: NormWeights | None) -> Norm | None:
    return None if weights is None else Norm(weights.weight.double(), weights.eps)


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).abs().max()
    assert float(error) <= TOLERANCE[out.dtype] * max(1.0, float(expected.abs().max()))


def run(
    case: Case,
    delta: DeltaInput | None,
    residual_scale: float = 1.0,
    after: NormWeights | None = None,
    before: NormWeights | None = None,
) -> NormedResidual:
    x_out, normed = nan_like(case.x), None if before is None else nan_like(case.x)
    add_norm(
        case.x,
        case.h,
        delta=delta,
        residual_scale=residual_scale,
        after=after,
        before=before,
        x_out=x_out,
        normed=normed,
    )
    return NormedResidual(x_out, normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "num_rows, width, kind, placement",
    [
        (1, 64, NormKind.CAST_THEN_SCALE, "pre"),
        (17, 80, NormKind.SCALE_THEN_CAST, "post"),
        (17, 896, NormKind.UNIT_OFFSET, "both"),
        (63, 33, NormKind.CAST_THEN_SCALE, "both"),
        (5, 130, NormKind.SCALE_THEN_CAST, "none"),
        (133, 40, NormKind.UNIT_OFFSET, "pre"),
    ],
)
def test_every_form_agrees_with_its_definition(
    dtype: torch.dtype, num_rows: int, width: int, kind: NormKind, placement: str
) -> None:
    case = make_case(num_rows, width, dtype)
    after = norm_weights(width, kind, dtype) if placement in ("post", "both") else None
    before = norm_weights(width, kind, dtype) if placement in ("pre", "both") else None
    out = run(case, case.buffer, 0.22, after, before)
    expected = reference_add_norm(
        case.x.double(),
        case.h.double(),
        case.delta.double(),
        residual_scale=0.22,
        after=as_norm(after),
        before=as_norm(before),
    )
    assert_close(out.x, expected.x)
    assert (out.normed is None) == (expected.normed is None)
    if out.normed is not None and expected.normed is not None:
        assert_close(out.normed, expected.normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_delta_that_does_not_act_leaves_the_bits_of_a_launch_without_adapters(dtype: torch.dtype) -> None:
    case = make_case(17, 96, dtype)
    norm = norm_weights(96, NormKind.CAST_THEN_SCALE, dtype)
    mixed, alone = run(case, case.buffer, 1.0, norm, norm), run(case, None, 1.0, norm, norm)
    untouched = (case.delta == 0).all(dim=1)
    assert 4 < int(untouched.sum()) < 17
    assert torch.equal(mixed.x[untouched], alone.x[untouched])
    assert mixed.normed is not None and alone.normed is not None
    assert torch.equal(mixed.normed[untouched], alone.normed[untouched])
    assert not torch.equal(mixed.x, alone.x)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    case = make_case(8, 64, torch.float32)
    norm = norm_weights(64, NormKind.CAST_THEN_SCALE, torch.float32)
    clean = run(case, case.buffer, before=norm)
    # row 1 has slot 0, which acts
    case.buffer.delta[1] = math.nan
    broken = run(case, case.buffer, before=norm)
    others = [row for row in range(8) if row != 1]
    assert bool(broken.x[1].isnan().all())
    assert torch.equal(broken.x[others], clean.x[others])


@pytest.mark.parametrize("kind", list(NormKind))
def test_fp16_rounds_where_the_cpu_path_rounds(kind: NormKind) -> None:
    case = make_case(9, 128, torch.float16)
    weights = norm_weights(128, kind, torch.float16)
    # make_norm adds Gemma's 1 itself
    raw = weights.weight - 1.0 if kind is NormKind.UNIT_OFFSET else weights.weight
    norm = make_norm(raw, weights.eps, kind)
    h = torch.where(case.delta == 0, case.h, case.h + case.delta)
    x = torch.add(case.x, norm(h), alpha=0.5)
    out = run(case, case.buffer, 0.5, weights, weights)
    assert out.normed is not None
    # a last bit may differ where torch's sum of squares runs in another order
    assert float((out.x == x).float().mean()) > 0.99
    assert float((out.normed == norm(x)).float().mean()) > 0.98


def test_the_first_norm_reads_no_block() -> None:
    case = make_case(3, 48, torch.float32)
    norm = norm_weights(48, NormKind.CAST_THEN_SCALE, torch.float32)
    normed = nan_like(case.x)
    add_norm(case.x, None, before=norm, normed=normed)
    expected = reference_add_norm(case.x.double(), None, before=as_norm(norm)).normed
    assert expected is not None
    assert_close(normed, expected)


def test_the_residual_may_be_changed_in_place() -> None:
    case = make_case(3, 48, torch.float32)
    expected = run(case, case.buffer)
    x = case.x.clone()
    add_norm(x, case.h, delta=case.buffer, x_out=x)
    assert torch.equal(x, expected.x)


def test_no_rows_launch_nothing() -> None:
    empty = torch.empty(0, 64)
    with record_launches() as launches:
        add_norm(empty, empty, x_out=empty)
    assert launches == []
