"""The attention kernels of part `kernels`: split decode, tiled prefill and the cache write against row-by-row torch.

Owns what is compared; caches come from the kernel tests' builder, NaN in every slot that no sequence owns.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch

from adapter_kernels import reference_attention
from adapter_kernels.gpu.kv_write import kv_write
from adapter_kernels.gpu.paged_decode import DecodeWorkspace, paged_decode
from adapter_kernels.gpu.paged_prefill import paged_prefill
from scripts.gpu_check_part import Place, largest, moved, relative_error
from tests.kernels.gpu.paged_cases import Heads, paged_case, queries

_SCALE = 0.15


@dataclass(frozen=True, slots=True)
class Form:
    """One form of attention: heads, window, cap, and the contexts it is tried on (the first is a padding row)."""

    heads: Heads
    window: int | None
    soft_cap: float | None
    contexts: tuple[int, ...] = (0, 1, 17, 300, 2049)


FORMS = (
    Form(Heads(32, 8, 128), None, None),
    Form(Heads(14, 2, 64), 256, None),
    Form(Heads(16, 8, 256), 100, 50.0),
    Form(Heads(6, 2, 80), None, 30.0),
    Form(Heads(8, 8, 32), None, None),
)
TINY_FORMS = (Form(Heads(4, 2, 32), 20, 5.0, (0, 1, 40)),)


def decode_error(dtype: torch.dtype, place: Place) -> float:
    """Largest error over the forms, with one split and with many."""
    return largest(_decode_error(form, dtype, place, splits) for form in _forms(place) for splits in (1, 16))


def prefill_error(dtype: torch.dtype, place: Place) -> float:
    """Largest error over the forms: chunks from the beginning and from the middle of a prompt."""
    return largest(_prefill_error(form, dtype, place) for form in _forms(place))


def kv_write_error(dtype: torch.dtype, place: Place) -> float:
    """0.0 when exactly the mapped rows were written, else 1.0."""
    rows = torch.randn(19, 2, 64).to(dtype)
    slots = torch.randperm(32)[:19].int()
    slots[3::5] = -1
    k, v = (torch.zeros(8, 4, 2, 64, dtype=dtype, device=place.device) for _ in range(2))
    k_wanted, v_wanted = (torch.zeros(8, 4, 2, 64, dtype=dtype) for _ in range(2))
    kv_write(rows.to(place.device), -rows.to(place.device), k, v, slots.to(place.device))
    reference_attention.kv_write(rows, -rows, k_wanted, v_wanted, slots)
    return float(not (torch.equal(k.cpu(), k_wanted) and torch.equal(v.cpu(), v_wanted)))


def _forms(place: Place) -> tuple[Form, ...]:
    return TINY_FORMS if place.is_tiny else FORMS


def _decode_error(form: Form, dtype: torch.dtype, place: Place, splits: int) -> float:
    case, heads = paged_case(form.contexts, form.heads, dtype), form.heads
    q = queries(len(form.contexts), heads, dtype)
    workspace = DecodeWorkspace.build(
        len(form.contexts), heads.num_heads, heads.head_dim, place.device, num_splits=splits
    )
    out = torch.full_like(q, torch.nan, device=place.device)
    caches = case.k_cache.to(place.device), case.v_cache.to(place.device)
    paged_decode(
        q.to(place.device),
        *caches,
        moved(case.decode_part(), place.device),
        out,
        workspace=workspace,
        **_math(form),
    )
    expected = reference_attention.paged_attention_rows(
        q, case.k_cache, case.v_cache, case.contexts, case.tables, **_math(form)
    )
    return relative_error(out, expected)


def _prefill_error(form: Form, dtype: torch.dtype, place: Place) -> float:
    # a chunk has rows: the padding row's context is left out
    contexts = form.contexts[1:]
    case, starts = paged_case(contexts, form.heads, dtype), [max(0, context - 150) for context in contexts]
    lengths = [context - start for context, start in zip(contexts, starts, strict=True)]
    q = queries(sum(lengths), form.heads, dtype)
    out = torch.full_like(q, torch.nan, device=place.device)
    part = moved(case.prefill_part(starts, 0, 16 if place.is_tiny else 128), place.device)
    paged_prefill(
        q.to(place.device), case.k_cache.to(place.device), case.v_cache.to(place.device), part, out, **_math(form)
    )
    rows = [context + 1 for start, end in zip(starts, contexts, strict=True) for context in range(start, end)]
    tables = [table for table, length in zip(case.tables, lengths, strict=True) for _ in range(length)]
    expected = reference_attention.paged_attention_rows(q, case.k_cache, case.v_cache, rows, tables, **_math(form))
    return relative_error(out, expected)


class _Math(TypedDict):
    scale: float
    window: int | None
    soft_cap: float | None


def _math(form: Form) -> _Math:
    return {"scale": _SCALE, "window": form.window, "soft_cap": form.soft_cap}
