"""The decoder's arithmetic in plain numpy: norm, rotation, attention, activation; for a few rows and no speed.

Owns formulas only, written from the published models and not from the server's own layers: agreeing with those is what
proves both. Invariant: every function returns new float32 arrays and reads nothing but its arguments.
"""

import math

import numpy as np
import numpy.typing as npt

from adapters_store.float_bits import Float32
from serve.model.rope import RopeSpec

Mask = npt.NDArray[np.bool_]


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Return x [.., D] over its root mean square, times weight [D]."""
    mean = np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + eps) * weight, dtype=np.float32)


def activate(name: str, x: Float32) -> Float32:
    """Return silu, gelu_tanh or gelu of x."""
    wide = x.astype(np.float64)
    if name == "silu":
        y = wide / (1 + np.exp(-wide))
    elif name == "gelu_tanh":
        y = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        erf = np.vectorize(math.erf, otypes=[np.float64])
        y = 0.5 * wide * (1 + erf(wide / math.sqrt(2)))
    return np.asarray(y, dtype=np.float32)


def rotate(heads: Float32, first: int, rope: RopeSpec, *, max_model_len: int) -> Float32:
    """Turn heads [T, N, E] at positions `first`, `first + 1`, ...: pair i is (i, i + rotary_dim / 2)."""
    half = rope.rotary_dim // 2
    angles = np.arange(first, first + len(heads))[:, None] * _frequencies(rope, max_model_len)
    scale = _amplitude(rope)
    cos, sin = (scale * np.cos(angles))[:, None, :], (scale * np.sin(angles))[:, None, :]
    left, right = heads[..., :half], heads[..., half : rope.rotary_dim]
    turned = heads.astype(np.float64)
    turned[..., :half] = left * cos - right * sin
    turned[..., half : rope.rotary_dim] = right * cos + left * sin
    return turned.astype(np.float32)


def attend(q: Float32, k: Float32, v: Float32, mask: Mask, *, scale: float, soft_cap: float | None) -> Float32:
    """Return softmax(q k^T * scale) v for queries [T, H, E] and keys and values [S, K, E], as [T, H * E]."""
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("the,she->hts", q.astype(np.float64), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(mask, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    attended = np.einsum("hts,she->the", shares, values)
    return np.asarray(attended.reshape(len(q), -1), dtype=np.float32)


def causal_mask(num_rows: int, num_before: int, window: int | None) -> Mask:
    """Return which keys [num_before + num_rows] each row may see: those at or before it, inside its window."""
    behind = (num_before + np.arange(num_rows))[:, None] - np.arange(num_before + num_rows)[None, :]
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the natural logarithm of softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _frequencies(rope: RopeSpec, max_model_len: int) -> npt.NDArray[np.float64]:
    """Return the angle per position of each pair of dims."""
    plain = rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    if rope.kind == "linear":
        return np.asarray(plain / rope.factor)
    if rope.kind == "longrope":
        is_long = max_model_len > rope.original_max_position_embeddings
        return np.asarray(plain / np.array(rope.long_factor if is_long else rope.short_factor))
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return np.asarray(blend * plain + (1 - blend) * plain / rope.factor)
    return np.asarray(plain)


def _amplitude(rope: RopeSpec) -> float:
    """Return longrope's factor on cosine and sine."""
    if rope.kind != "longrope":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings
    ratio = rope.factor if rope.factor != 1.0 else rope.max_position_embeddings / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1.0 else 1.0
