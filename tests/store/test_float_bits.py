"""bfloat16 and float16 by bit work agree with torch on every pattern, and round to nearest even."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.float_bits import decode, encode, is_finite, is_zero

SPECIAL = np.array([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x0000, 0x8000, 0x0001, 0x7F7F], dtype="<u2")


def test_all_65536_bfloat16_values_decode_and_encode_exactly() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    values = decode(bits.tobytes(), "BF16")
    finite = np.isfinite(values)
    again = np.frombuffer(encode(values, "BF16"), dtype="<u2")
    np.testing.assert_array_equal(again[finite], bits[finite])
    np.testing.assert_array_equal(np.isnan(decode(encode(values, "BF16"), "BF16")), np.isnan(values))
    np.testing.assert_array_equal(np.isinf(decode(encode(values, "BF16"), "BF16")), np.isinf(values))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=64))
def test_float32_rounds_to_bfloat16_as_torch_does(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    ours = decode(encode(values, "BF16"), "BF16")
    theirs = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F808000, 0x3F80),
        (0x3F818000, 0x3F82),
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x7F7FFFFF, 0x7F80),
        (0xFF7F8000, 0xFF80),
        (0x7F7F7FFF, 0x7F7F),
        (0x00008000, 0x0000),
        (0x00018000, 0x0002),
    ],
)
def test_ties_go_to_even_and_overflow_becomes_infinity(bits: int, rounded: int) -> None:
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    assert int.from_bytes(encode(value, "BF16"), "little") == rounded


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_nan_infinity_and_zero_are_told_apart(dtype: str) -> None:
    zero, one = np.zeros(3, np.float32), np.array([0, -0.0, 1e-3], np.float32)
    assert is_zero(encode(zero, dtype), dtype) and is_zero(encode(-zero, dtype), dtype)
    assert not is_zero(encode(one, dtype), dtype)
    for bad in (np.nan, np.inf, -np.inf):
        assert not is_finite(encode(np.array([0, bad], np.float32), dtype), dtype)
    assert is_finite(encode(one, dtype), dtype)


def test_float16_overflows_above_65504() -> None:
    assert is_finite(encode(np.array([65504.0], np.float32), "F16"), "F16")
    assert not is_finite(encode(np.array([65520.0], np.float32), "F16"), "F16")


def test_a_subnormal_is_neither_zero_nor_infinite() -> None:
    for pattern in SPECIAL:
        raw = np.array([pattern], dtype="<u2").tobytes()
        value = decode(raw, "BF16")[0]
        assert is_finite(raw, "BF16") == bool(np.isfinite(value))
        assert is_zero(raw, "BF16") == (value == 0)
