"""Turn queries and keys by position: angles once per step, three torch ops per layer.

Owns inverse frequencies and the rotation; reads no config. Invariant: a token's rotation depends on its position
alone, never on what else is in the step: so longrope's long or short factors are chosen once, at load.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.model.rope import RopeSpec


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of one step, [T, 1, rotary_dim]; the first half of the sines carries the minus sign."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """The angles of one `RopeSpec`."""

    def __init__(self, spec: RopeSpec, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the inverse frequencies.

        Args:
            max_model_len: longest sequence that will be served; longrope's long factors are used when it is beyond
                the original context length.
        """
        half = _inverse_frequencies(spec, max_model_len)
        scale = _cos_sin_scale(spec)
        self._frequencies = torch.cat((half, half)).to(device)
        sign = torch.cat((-torch.ones_like(half), torch.ones_like(half)))
        self._sin_scale = (sign * scale).to(device)
        self._cos_scale = scale
        self._dtype = dtype

    def rotation(self, positions: Tensor) -> Rotation:
        """Compute the rotation of `positions` [T], in fp32, rounded once to the model's dtype."""
        angles = positions.to(torch.float32)[:, None, None] * self._frequencies
        cos = angles.cos()
        if self._cos_scale != 1.0:
            cos = cos * self._cos_scale
        return Rotation(cos.to(self._dtype), (angles.sin() * self._sin_scale).to(self._dtype))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn the leading `rotary_dim` of each head: x * cos + swap_halves(x) * sin.

    Args:
        heads: [T, N, E], any strides.
    Returns:
        [T, N, E], new.
    """
    rotary_dim = rotation.cos.shape[-1]
    if rotary_dim == heads.shape[-1]:
        return torch.addcmul(heads * rotation.cos, heads.roll(rotary_dim // 2, -1), rotation.sin)
    turning, passing = heads[..., :rotary_dim], heads[..., rotary_dim:]
    turned = torch.addcmul(turning * rotation.cos, turning.roll(rotary_dim // 2, -1), rotation.sin)
    return torch.cat((turned, passing), dim=-1)


def _inverse_frequencies(spec: RopeSpec, max_model_len: int) -> Tensor:
    """One frequency per pair of dims, [rotary_dim / 2] fp32."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "llama3":
        return _llama3(frequencies, spec)
    if spec.kind == "longrope":
        is_long = max_model_len > spec.original_max_position_embeddings
        factors = torch.tensor(spec.long_factor if is_long else spec.short_factor, dtype=torch.float32)
        return 1.0 / (factors * spec.theta**exponents)
    return frequencies


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1: long waves divided by the factor, short ones kept, a smooth passage between."""
    original = spec.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / spec.low_freq_factor, frequencies / spec.factor, between)
    return torch.where(wavelengths < original / spec.high_freq_factor, frequencies, scaled)


def _cos_sin_scale(spec: RopeSpec) -> float:
    if spec.kind != "longrope":
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    original = spec.original_max_position_embeddings
    factor = spec.factor if spec.factor != 1.0 else spec.max_position_embeddings / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
